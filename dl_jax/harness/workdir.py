"""The folder of a run. One run at a time may use it, its processes share it, and no other run may continue in it."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from dl_jax.core import bucket
from dl_jax.core.errors import InputError, reason, spared
from dl_jax.core.files import (
    MISSING,
    absolute,
    children,
    exists,
    failures,
    is_folder,
    lock,
    move,
    patiently,
    write_whole,
)
from dl_jax.harness import lease
from dl_jax.harness.checkpoint.files import entries, free, metas, steps
from dl_jax.harness.identity import FIELDS, Identity, differences, is_identity

DEEPEST = 3  # maximum nesting of child runs: cell / seed and one more
BOOKKEEPING = ("config.json", "attempts.json", "result.json")
BEFORE = "before-restart"
LOCKS = (".lock", lease.NAME)  # names of what a run holds while it uses its folder


@contextlib.contextmanager
def work_directory(
    workdir: str | None,
    identity: Identity,
    script: Path,
    meet: Callable[[], None] | None,
    restart: bool,
    lost: Callable[[str], object],
) -> Iterator[epath.Path | None]:
    """A context that holds the folder of this run, so that no other run uses it. Raises InputError where it cannot.

    With `restart`, what was in the folder is set aside in it. `meet` waits for the other processes, if there are any. A
    thread calls `lost` with the reason where the folder, at an address, is no longer held (see `lease`). Raises
    Unavailable where a bucket does not answer.
    """
    if workdir is None:
        yield None
        return
    directory = epath.Path(absolute(workdir))
    if "://" in workdir:
        bucket.require(workdir, "--workdir")
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            require_writable(directory, workdir)
            at_address = "://" in workdir
            held.enter_context(leased(directory, workdir, lost) if at_address else locked(directory, workdir))
        if meet:
            meet()  # what uses the devices has less patience than a lease takes
            require_shared(directory)
        if jax.process_index() == 0:
            if restart:
                set_aside(directory)
            claim_directory(directory, identity, script)
        yield directory


@contextlib.contextmanager
def attempt(
    directory: epath.Path | None, facts: Mapping[str, Any], spent: Callable[[], Mapping[str, float]]
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Records in attempts.json what runs in this folder, `facts`, and the seconds that were `spent`, by on what.

    `facts` has at least the commit and whether it is clean, and is read anew each time.

    Yields a function that writes and returns all attempts so far, with this one last. It is called when a checkpoint
    is saved, so that a killed attempt has the seconds until its last one.
    """
    file = directory / "attempts.json" if directory and jax.process_index() == 0 else None
    earlier = earlier_attempts(file) if file else []

    def so_far() -> list[dict[str, Any]]:
        found = {name: round(seconds, 1) for name, seconds in spent().items()}
        attempts = [*earlier, {**facts, "seconds": found["all"], "spent": found}]
        if file:
            with spared(f"{file} cannot be written", "the next attempt will not know of this one", failures(file)):
                write_json(file, attempts)
        return attempts

    so_far()
    try:
        yield so_far
    finally:
        so_far()


def earlier_attempts(file: epath.Path) -> list[dict[str, Any]]:
    """The attempts in attempts.json.

    A file that is damaged counts as one attempt of an unknown commit, which is not clean. Raises Unavailable where it
    cannot be read.
    """
    found = read_json(file) if patiently(lambda: exists(file), str(file)) else []
    if isinstance(found, list) and all(map(_is_attempt, found)):
        return found
    words = f"{file} is damaged: the commits of earlier attempts are unknown, so the result will not count as clean"
    warnings.warn(words, stacklevel=2)
    return [{"commit": None, "clean": False, "seconds": None}]


def _is_attempt(found: Any) -> bool:
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    return (
        isinstance(found, dict)
        and {"commit", "clean", "seconds"} <= found.keys()
        and isinstance(found["clean"], bool)
        and (found["seconds"] is None or number(found["seconds"]))
        and isinstance(found.get("spent", {}), dict)
        and all(map(number, found.get("spent", {}).values()))
    )


def read_json(file: epath.Path) -> Any:
    """The content of a JSON file; None where it is missing or damaged. Raises Unavailable where it cannot be read."""
    try:
        return json.loads(patiently(file.read_bytes, str(file)))
    except (*MISSING, ValueError, RecursionError):
        return None


def write_json(file: epath.Path, content: Any) -> None:
    """Writes `content` as JSON. A kill leaves the old file or the new one."""
    write_whole(file, json.dumps(content, indent=2).encode() + b"\n")


def require_writable(directory: epath.Path, workdir: str) -> None:
    """Creates the folder. Raises InputError where it cannot be created or written."""
    try:
        if "://" not in workdir:  # in a bucket a folder begins with its first object
            directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").write_text("")
        (directory / ".writable").unlink(missing_ok=True)
    except Exception as error:
        if "://" in workdir:
            raise bucket.refusal(f"--workdir {workdir}", error) from error
        raise InputError(
            f"--workdir {workdir} cannot be written ({reason(error)}); choose a folder of yours"
        ) from error


@contextlib.contextmanager
def locked(directory: epath.Path, workdir: str) -> Iterator[None]:
    """A context that holds the folder's lock, which the system releases when the process ends.

    Raises InputError where another process holds it, or the file of the lock cannot be opened.
    """
    what = f"--workdir {workdir} cannot be locked"
    with contextlib.ExitStack() as held:
        try:
            alone = "make sure that no other run uses it; the run goes on"
            held.enter_context(lock(directory / LOCKS[0], what, alone, wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"--workdir {workdir} is in use by another process; wait for it, or choose another"
            ) from error
        except OSError as error:
            raise InputError(f"{what} ({reason(error)}); choose a folder of yours") from error
        yield


@contextlib.contextmanager
def leased(directory: epath.Path, workdir: str, lost: Callable[[str], object]) -> Iterator[None]:
    """A context that holds the lease of a folder in a bucket. `lost` is called where it is lost (see `lease`).

    Raises InputError where another process holds it, and Unavailable where the bucket does not answer.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lease.leased(directory, lost))
        except BlockingIOError as error:
            raise InputError(
                f"--workdir {workdir} is in use by another process, {error.strerror}; wait for it, or choose another"
            ) from error
        except Exception as error:
            raise bucket.refusal(f"--workdir {workdir}", error) from error
        yield


def claim_directory(directory: epath.Path, identity: Identity, script: Path) -> None:
    """Writes config.json and copies the experiment's file.

    Raises InputError where the folder holds a run with another config, preset or seeds, or files of the same names
    that are not of a run.
    """
    config, wanted = directory / "config.json", json.loads(json.dumps(identity))
    begun, found = has_begun(directory), known_identity(directory)
    if found is None and (begun or exists(config)):
        raise InputError(
            f"{config} is missing, damaged or not of a run, expected the identity of the run in this folder; restore "
            "it, use another folder, or --restart to set aside what is there"
        )
    if begun and found:
        differing = differences(found, wanted, "in the folder")
        if differing:
            raise InputError(
                f"--workdir {directory} holds another run: {'; '.join(differing)}; use those values, another folder, "
                "or --restart to set aside what is there"
            )
    if found is None:
        taken = [name for name in (*BOOKKEEPING, script.name) if exists(directory / name)]
        if taken:
            raise InputError(
                f"--workdir {directory} holds a file {taken[0]} that is not of a run; choose a folder that is empty"
            )
    if not begun:
        with spared(f"{directory} is not as a run leaves it", "what could not be written", failures(directory)):
            (directory / "attempts.json").unlink(missing_ok=True)  # left by a run that ended before its first fit
            write_whole(directory / script.name, script.read_bytes())
    if read_json(config) != wanted:
        try:
            write_json(config, wanted)
        except failures(config) as error:
            raise InputError(f"{config} cannot be written ({reason(error)}); choose another folder") from error


def set_aside(directory: epath.Path) -> None:
    """Moves all that is in the folder to a new subfolder `before-restart`, `before-restart-2`, and so on.

    Folders go first: where a kill leaves some of it, config.json is among what still says that there was a run. Raises
    InputError where it cannot.
    """

    def move_to(place: epath.Path) -> None:
        old = [path for path in children(directory) if path.name not in LOCKS and not path.name.startswith(BEFORE)]
        if old and "://" not in os.fspath(place):
            place.mkdir()
        for path in sorted(old, key=is_folder, reverse=True):
            move(path, place / path.name)

    try:
        free(directory / BEFORE, move_to)
    except failures(directory) as error:
        raise InputError(f"{directory} cannot be set aside ({reason(error)}); choose another folder") from error


def has_begun(directory: epath.Path) -> bool:
    """Whether the folder holds the record of a fit or a result. If not, another run may use it, as nothing is lost.

    Raises Unavailable where it cannot be read.
    """

    def found() -> bool:
        return exists(directory / "result.json") or any(
            "metrics.jsonl" in names or ("checkpoints" in names and bool(steps(folder / "checkpoints")))
            for folder, names in folders_of_fits(directory)
        )

    return patiently(found, str(directory))


def known_identity(directory: epath.Path) -> dict[str, Any] | None:
    """The identity of the run in the folder, from config.json; where this is damaged, from a checkpoint's metadata.

    Raises Unavailable where they cannot be read.
    """
    config = read_json(directory / "config.json")
    if is_identity(config):
        return config
    if config is not None:  # of another program
        return None

    def found() -> dict[str, Any] | None:
        roots = (folder / "checkpoints" for folder, names in folders_of_fits(directory) if "checkpoints" in names)
        owners = (meta.get("owner") for root in roots for meta in metas(root).values())
        return next(filter(is_identity, owners), None)

    owner = patiently(found, str(directory))
    if owner:
        warnings.warn(f"{directory}/config.json is missing or damaged, rebuilt from a checkpoint", stacklevel=2)
    return owner and {name: owner[name] for name in FIELDS if name in owner}


def folders_of_fits(folder: epath.Path, depth: int = 0) -> Iterator[tuple[epath.Path, set[str]]]:
    """The folder of the run and those of its children, each with the names of what it holds."""
    paths = entries(folder)
    yield folder, {path.name for path in paths}
    for path in paths:
        child = depth < DEEPEST and path.name not in ("checkpoints", "profile") and not path.name.startswith(BEFORE)
        if child and is_folder(path):
            yield from folders_of_fits(path, depth + 1)


def require_shared(directory: epath.Path) -> None:
    """Raises InputError unless every process sees the same folder."""
    from jax.experimental import multihost_utils

    token = int(multihost_utils.broadcast_one_to_all(np.int32(int.from_bytes(os.urandom(3)))))
    if jax.process_index() == 0:
        (directory / f".shared-{token}").write_text("")
    multihost_utils.sync_global_devices("shared folder")
    seen = multihost_utils.process_allgather(np.array((directory / f".shared-{token}").exists()))
    if jax.process_index() == 0:
        (directory / f".shared-{token}").unlink()
    if not seen.all():
        raise InputError(
            f"--workdir {directory} is not shared: processes {np.flatnonzero(~seen).tolist()} of {len(seen)} do not "
            "see what process 0 writes there; use a network folder or gs://"
        )
