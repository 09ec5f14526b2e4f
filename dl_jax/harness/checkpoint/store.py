"""Saving states asynchronously, and restoring the newest valid checkpoint.

Orbax writes a checkpoint under a temporary name and then renames it, so a save that is killed leaves no checkpoint.
Orbax's CheckpointManager is not used: it refuses a step at or below the newest one, even if that is damaged, and cannot
open a folder with a damaged metrics file. `files` describes the files on disk.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from dl_jax.core.errors import InputError, Unavailable
from dl_jax.core.files import patiently, sealed
from dl_jax.core.leaves import (
    Box,
    Spec,
    Tree,
    block_shape,
    digests,
    named,
    nested,
    parts_here,
    place_like,
    spec,
    stored_values,
)
from dl_jax.core.recorder import Best, require_mode
from dl_jax.harness.checkpoint import files
from dl_jax.harness.identity import Identity
from dl_jax.harness.peers import Peers, says_gone

FAILURES = {error.__name__: error for error in (files.Damaged, InputError, Unavailable)}


class Outcome(NamedTuple):
    """How a process's attempt to read a checkpoint ended, for the others."""

    meta: int | None = None  # the digest of the metadata; None where they are not valid
    failure: str = ""  # the name of one of FAILURES
    why: str = ""


class Checkpoints:
    """The checkpoints of one run in a directory, local or gs://, to which no other process group writes.

    The newest `keep` checkpoints are kept, and the best one by `best`, a metric's name and "min" or "max". With several
    processes, all of them have to call every method. Each writes and reads the shards of its own devices, and all
    restore the same checkpoint.

    `owner` says whose checkpoints these are. It is saved with them, and those of another owner are refused. `agree` is
    called at each save with {path: CRC-32} of the leaves that each process holds as a whole, and raises where those of
    another process differ.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: int = 2,
        best: Best | None = None,
        owner: Callable[[], Identity] | None = None,
        agree: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        """Creates the directory and removes what a killed writer left. Raises InputError where it cannot be written."""
        require_mode(best)
        self._name, self._root, self._keep, self._best = directory, files.absolute(directory), keep, best
        self._owner, self._agree = owner, agree
        self._peers = Peers()
        self._writer: Any = None  # made by the first save: importing Orbax takes a second
        self._finisher = ThreadPoolExecutor(1)
        self._unfinished: Future[None] | None = None  # the save under way
        self._latest: files.Meta | None = None  # what this writer last saved or restored
        self._damaged: dict[int, str] = {}  # what the last restore skipped, and why
        if jax.process_index() == 0:
            try:
                files.prepare(self._root)
            except files.Unreadable as error:
                raise Unavailable(f"{directory} cannot be read ({error}); give the same command again later") from error
            except Exception as error:
                raise InputError(
                    f"{directory} cannot be written ({files.reason(error)}); choose another --workdir"
                ) from error

    def save(self, step: int, tree: Tree, metrics: Mapping[str, float] = {}, note: Any = None) -> None:
        """Starts to write the arrays of `tree`, which may be donated or overwritten as soon as this returns.

        `note` is what JSON can represent, and is restored with the tree.
        If `step` is the step that this writer saved or restored last, it is replaced, unless nothing would change.
        Metrics that are not finite are left out, so they cannot make a checkpoint the best one.

        Raises InputError where an earlier save failed, this one cannot start, or the directory holds a checkpoint of
        this step or a later one that this writer has not restored, and where two processes differ in a shard that both
        hold; Unavailable where a save failed as another process has gone or a bucket does not answer; TypeError where a
        leaf is not an array.
        """
        self.wait()
        jax.block_until_ready(tree)  # what fails to be computed is no failure to write
        leaves = named(tree)
        values = {path: stored_values(leaf) for path, leaf in leaves.items()}
        held = {path: digests(array) for path, array in values.items()}
        blocks = {path: block_shape(array) for path, array in values.items()}
        one = {path: held[path][0] for path, array in values.items() if blocks[path] == array.shape}
        if self._agree:
            self._agree(one)
        split = {path: [*held[path].items()] for path in leaves if path not in one}
        crcs, differing = _merged(self._peers.gather(json.dumps(split)) if split else [])
        meta = files.describe(
            step,
            {path: [one.get(path), *map(_jsonable, spec(leaf))] for path, leaf in leaves.items()},
            {path: [list(blocks[path]), each] for path, each in crcs.items()},
            {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
            self._best,
            self._owner and self._owner(),
            note,
        )
        # Process 0 alone knows all digests, and alone writes them, so it says for all what comes next.
        covered = self._latest is not None and files.covers(self._latest, meta)
        if split:
            covered, differing = json.loads(self._peers.told(json.dumps([covered, differing])))
        if differing:
            raise InputError(f"processes differ: {differing}; give all of them the same command, code and data")
        if covered:
            return
        if jax.process_index() == 0:
            self._root.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            self._make_room(step)
        self._writer = self._writer or files.orbax_writer()
        # Orbax takes neither an empty array nor a tree without arrays.
        filled = {path: array for path, array in values.items() if array.size} or {"nothing": np.zeros(1)}
        try:
            self._writer.save(self._root / str(step), args=files.orbax_parts(nested(filled, decoded=False), meta))
        except Exception as error:
            raise self._failure(step, error) from error
        self._latest = meta
        self._unfinished = self._finisher.submit(self._finish, step)

    def restore(self, like: Tree) -> tuple[int, Tree, Any] | None:
        """The step of the newest valid checkpoint, its tree and its note; None if there is no checkpoint.

        `like` is a tree of arrays or `jax.ShapeDtypeStruct`s; each leaf is placed on the same devices as in `like`, and
        NumPy leaves stay NumPy. Damaged checkpoints are skipped with a warning, and the next save renames them to
        `damaged-<step>`. Raises InputError where all of them are damaged, and where the newest valid one has other
        leaves than `like`, belongs to another owner or was written by a newer dl_jax; Unavailable where one cannot be
        read.
        """
        self.wait()
        leaves = named(like)
        model = {path: spec(leaf) for path, leaf in leaves.items()}
        wanted = {path: parts_here(leaf) for path, leaf in leaves.items()}
        first = jax.process_index() == 0
        steps = json.loads(self._peers.told(json.dumps(self._steps() if first else [])))
        found, self._damaged = files.newest(steps, lambda step: self._read(step, model, wanted))
        for step, why in self._damaged.items() if first else ():
            warnings.warn(f"skipped the damaged checkpoint {self._name}/{step}: {why}", stacklevel=2)
        if found is None and self._damaged:
            raise InputError(
                f"all {len(self._damaged)} checkpoints in {self._name} are damaged, expected a valid one to resume "
                "from; bring one back from a copy, or give --restart to set them aside and begin at step 0"
            )
        if found is None:
            return None
        self._latest = found.meta
        placed = [place_like(found.parts.pop(path), leaf) for path, leaf in leaves.items()]
        return found.meta["step"], jax.tree.unflatten(jax.tree.structure(like), placed), found.meta.get("note")

    def wait(self) -> None:
        """Waits until the current save is on disk and older checkpoints are removed.

        Raises InputError or Unavailable where the save failed. Then the checkpoints before it are unchanged.
        """
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    def close(self) -> None:
        """Waits, then ends the writer's threads. A program that ends without calling it may lose the current save."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            if self._writer is not None:
                with contextlib.suppress(Exception):  # of a save that failed, which `wait` has told of
                    self._writer.close()

    def _finish(self, step: int) -> None:
        """Ends a save, in a thread of its own because object storage takes seconds to remove a checkpoint."""
        try:
            self._writer.wait_until_finished()
        except Exception as error:  # TensorStore has no type of its own for, say, a full disk
            raise self._failure(step, error) from error
        if jax.process_index() == 0:
            try:
                files.tidy(self._root)
                files.prune(self._root, self._keep, self._best)
            except OSError as error:  # the checkpoint itself is written
                words = f"older checkpoints in {self._name} were not removed ({files.reason(error)}); the run goes on"
                warnings.warn(words, stacklevel=2)

    def _steps(self) -> list[int]:
        return patiently(lambda: files.steps(self._root), self._name)

    def _read(self, step: int, model: Mapping[str, Spec], wanted: Mapping[str, set[Box]]) -> files.Valid:
        """What this process wants of a checkpoint. Raises the same on all processes unless all of them can have it.

        Raises Damaged; InputError where it does not fit; Unavailable where it cannot be read.
        """
        name, here, found, cause = f"{self._name}/{step}", Outcome(), None, None
        try:
            meta = patiently(lambda: files.read_meta(self._root, step), f"checkpoint {name}")
            here = Outcome(meta=sealed(meta)["crc32"])
            files.require_fit(meta, model, self._owner and self._owner(), name)
            found = files.Valid(
                meta, patiently(lambda: files.read_parts(self._root, meta, wanted), f"checkpoint {name}")
            )
        except (files.Damaged, InputError, Unavailable) as error:
            cause, here = error, here._replace(failure=type(error).__name__, why=str(error))
        outcomes = [Outcome(*json.loads(words)) for words in self._peers.gather(json.dumps(here))]
        failure, why = json.loads(self._peers.told(json.dumps(_worst(outcomes, name))))
        if failure or found is None:
            raise FAILURES[failure](why) from cause
        return found

    def _make_room(self, step: int) -> None:
        """Renames damaged checkpoints, and an older save of `step`. Raises InputError where a newer one exists."""
        for damaged in self._damaged.keys() & {*self._steps()}:  # but for what somebody removed by hand
            files.set_aside(self._root, damaged, "damaged")
        self._damaged = {}
        newest = max(self._steps(), default=-1)
        if newest == step and self._latest is not None and self._latest["step"] == step:
            files.set_aside(self._root, step, "replaced")
        elif newest >= step:
            raise InputError(
                f"{self._name} holds step {newest}, and a save of step {step} must be newer; "
                "restore it first or use another --workdir"
            )

    def _failure(self, step: int, error: Exception) -> InputError | Unavailable:
        self._latest = None
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # the next writer tries again
                files.tidy(self._root)
        what = f"checkpoint {self._name}/{step} was not written"
        if self._peers.count > 1 and says_gone(error):
            return Unavailable(
                f"{what}, as another process has gone ({files.reason(error)}); give the same command again"
            )
        if files.may_pass(error, self._name):
            return Unavailable(f"{what} ({files.reason(error)}); give the same command again when the bucket answers")
        full = "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)
        return InputError(
            f"{what} ({'disk full' if full else files.reason(error)}); make room there or use another --workdir"
        )


def load(directory: str, step: int | None = None) -> tuple[int, Tree]:
    """Reads the newest valid checkpoint, or that of `step`, without a model. It writes nothing.

    The result is the step and nested dicts of NumPy arrays. NamedTuples become dicts by field, tuples and lists dicts
    with the keys "0", "1" ..., and typed PRNG keys their key data (uint32 [..., words]); None and empty containers are
    left out. Raises InputError where there is no such checkpoint, or none is valid.
    """
    root = files.absolute(directory)
    steps = patiently(lambda: files.steps(root), directory)
    if step is not None and step not in steps:
        raise InputError(f"{directory} has no checkpoint {step}; it has {steps or 'none at all'}")

    def read(step: int) -> files.Valid:
        meta = files.read_meta(root, step)
        files.require_fit(meta, None, None, f"{directory}/{step}")
        return files.Valid(meta, files.read_parts(root, meta))

    patient = lambda step: patiently(lambda: read(step), f"checkpoint {directory}/{step}")
    found, damage = files.newest(steps if step is None else [step], patient)
    if found is None:
        reasons = "; ".join(f"{step}: {why}" for step, why in damage.items()) or "there is none at all"
        raise InputError(f"no valid checkpoint in {directory} ({reasons}); give another directory or step")
    for skipped, why in damage.items():
        warnings.warn(f"skipped the damaged checkpoint {directory}/{skipped}: {why}", stacklevel=2)
    return found.meta["step"], nested({path: array for path, parts in found.parts.items() for array in parts.values()})


def best_step(directory: str) -> int | None:
    """The step of the checkpoint with the best metric, by the criterion in the newest checkpoint.

    Of equally good ones it is the newest. None if there is no criterion, or no checkpoint has a finite value of it.
    """
    root = files.absolute(directory)
    metas = patiently(lambda: files.metas(root), directory)
    return files.best_of(metas, metas[max(metas)]["best"]) if metas else None


def _jsonable(value: tuple[int, ...] | str) -> list[int] | str:
    return list(value) if isinstance(value, tuple) else value


def _merged(gathered: Sequence[str]) -> tuple[dict[str, list[int]], str]:
    """{path: digests of all blocks} from those that the processes hold, and what differs where two hold the same."""
    found: dict[str, dict[int, int]] = {}
    for process, words in enumerate(gathered):
        for path, held in json.loads(words).items():
            known = found.setdefault(path, {})
            for number, crc in held:
                if known.setdefault(number, crc) != crc:
                    return {}, f"block {number} of {path} on process {process} and on one before it"
    return {path: [known[number] for number in sorted(known)] for path, known in found.items()}, ""


def _worst(outcomes: Sequence[Outcome], name: str) -> tuple[str, str]:
    """What all processes raise, an exception's name and message, after each has tried to read a checkpoint."""
    for failure in ("InputError", "Unavailable"):
        for each in outcomes:
            if each.failure == failure:
                return failure, each.why
    for process, each in enumerate(outcomes):
        if each.meta != outcomes[0].meta and outcomes[0].meta is not None:
            return "InputError", (
                f"process {process} cannot read {name} as process 0 does ({each.why or 'another file'}); "
                "give a --workdir that all hosts share"
            )
    return next(((each.failure, each.why) for each in outcomes if each.failure), ("", ""))
