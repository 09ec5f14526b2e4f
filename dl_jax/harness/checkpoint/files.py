"""The files of checkpoints: functions that list, verify, read, rename and remove them.

    <step>/state/           the leaves as plain nested dicts, in Orbax's format; typed PRNG keys as their key data
    <step>/meta/metadata    JSON {schema, step, metrics, best, owner, note,
                            leaves: {path: [crc32, shape, dtype]},
                            blocks: {path: [shape of a block, [crc32, ...]]}, crc32}
    damaged-<step>/         a checkpoint that a restore skipped, and after which a newer one was saved

We keep digests because Orbax restores arrays with flipped bits without an error; the last `crc32` is the digest of the
metadata. A leaf that was split over devices has null in `leaves` and a digest for each of its shards in `blocks`, by
their numbers (see `core.leaves`), so that a process verifies what it needs without reading the rest.

Orbax writes the arrays, but TensorStore, the layer below it, reads them: if one leaf is damaged, Orbax's restore leaves
the reads of the others running, and each of them prints a traceback.

A checkpoint is damaged where a part is missing, cannot be parsed or does not match its digest. A part that cannot be
read (no permission, an I/O error, too many open files, a bucket that does not answer) says nothing about it: reading is
tried again, and then given up without a change to any file.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath

from dl_jax.core import bucket, errors
from dl_jax.core.errors import InputError, Unavailable
from dl_jax.core.files import MISSING, children, exists, is_folder, move, sealed, unsealed
from dl_jax.core.files import absolute as absolute_path
from dl_jax.core.leaves import Box, Spec, Tree, blocks_in, digest, number_of, whole_box
from dl_jax.core.leaves import differences as leaf_differences
from dl_jax.core.recorder import Best
from dl_jax.harness.identity import Identity, differences, read_by_both

Meta = dict[str, Any]
T = TypeVar("T")

SCHEMA = 1
WORTH_SLICING = 2**20  # bytes of an array that each of the devices that hold it would write
SHOWN = 4  # differing leaves in a message
# TensorStore's codes for what would not become better by waiting; other errors are checked by reading the files.
PASSING = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "ABORTED", "UNAUTHENTICATED")


class Valid(NamedTuple):
    """A checkpoint in which the digests of all that was read agree."""

    meta: Meta
    parts: dict[str, dict[Box, np.ndarray]]  # by path


class Damaged(Exception):
    """A checkpoint is damaged. The message says which part."""


class Unreadable(OSError):
    """A part of a checkpoint cannot be read at the moment. The message gives the system's reason."""


def orbax_writer() -> Any:
    """An asynchronous Orbax checkpointer that does not log, because its errors arrive as exceptions too."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_speaks)  # once, however often it is added
    # Devices that hold the same array each write a part of it, which takes a program for each shape, if it is worth it.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=WORTH_SLICING)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    # As `_location` has it.
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, type_handler_registry=registry)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(state=state, meta=ocp.JsonCheckpointHandler()))


def orbax_parts(state: Tree, meta: Meta) -> Any:
    """The arguments for `save` of that checkpointer."""
    import orbax.checkpoint as ocp

    return ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(sealed(meta)))


def absolute(directory: str) -> epath.Path:
    """The path in the form that Orbax needs: absolute, or an address such as gs://bucket/run.

    Raises InputError for an address where gcsfs is not installed.
    """
    if "://" in directory:
        bucket.client()
    return epath.Path(absolute_path(directory))


def prepare(root: epath.Path) -> None:
    """Creates the directory and removes what a killed save left.

    Raises OSError, or another error of object storage, where it cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "writable").touch()
    (root / "writable").unlink()
    tidy(root)


def tidy(root: epath.Path) -> None:
    """Removes what a killed or failed save left, and restores the checkpoint that it was to replace."""
    for path in entries(root):
        if _is_unfinished(path):
            path.rmtree()
        elif path.name.startswith("replaced-"):
            _undo(path, root / path.name.removeprefix("replaced-"))


def prune(root: epath.Path, keep: int, best: Best | None) -> None:
    """Removes all but the newest `keep` and the best step. Raises Unreadable where it cannot tell which is the best."""
    present = steps(root)
    kept = {*present[:keep], best_of(metas(root), best)}
    for step in present:
        if step not in kept:
            (root / str(step)).rmtree()


def set_aside(root: epath.Path, step: int, label: str) -> None:
    """Renames a step to `<label>-<step>`, or where there is one already, to `<label>-<step>-2` and so on."""
    free(root / f"{label}-{step}", lambda place: move(root / str(step), place))


def free(place: epath.Path, use: Callable[[epath.Path], T]) -> T:
    """Calls `use` with the first of `place`, `place-2`, `place-3` ... that does not exist."""
    names = (place if i == 1 else place.with_name(f"{place.name}-{i}") for i in itertools.count(1))
    return use(next(name for name in names if not exists(name)))


def steps(root: epath.Path) -> list[int]:
    """The steps of the complete checkpoints, newest first. Raises Unreadable where they cannot be listed."""
    try:
        named = [path for path in entries(root) if path.name.isdecimal() and is_folder(path)]
        return sorted((int(path.name) for path in named if not _is_unfinished(path)), reverse=True)
    except Unreadable:
        raise
    except Exception as error:  # a bucket's client has errors of its own
        raise Unreadable(reason(error)) from error


def metas(root: epath.Path) -> dict[int, Meta]:
    """The metadata of each step whose metadata are valid. Raises Unreadable."""
    found = {}
    for step in steps(root):
        try:
            found[step] = read_meta(root, step)
        except Damaged:
            continue
    return found


def best_of(candidates: Mapping[int, Meta], criterion: Sequence[str] | None) -> int | None:
    """The step with the best metric, the newest of equally good ones; None without a criterion or a value."""
    if criterion is None:
        return None
    name, end = criterion
    sign = 1 if end == "max" else -1
    scores = {step: sign * meta["metrics"][name] for step, meta in candidates.items() if name in meta["metrics"]}
    return max(scores, key=lambda step: (scores[step], step), default=None)


def describe(
    step: int,
    leaves: Mapping[str, list],
    blocks: Mapping[str, list],
    metrics: Mapping[str, float],
    best: Best | None,
    owner: Any,
    note: Any,
) -> Meta:
    """The metadata of a checkpoint, in types that JSON preserves."""
    return {
        "schema": SCHEMA,
        "step": step,
        "metrics": dict(metrics),
        "best": best and list(best),
        "owner": owner,
        "note": note,
        "leaves": dict(leaves),
        "blocks": dict(blocks),
    }


def covers(meta: Meta, other: Meta) -> bool:
    """Whether the checkpoint of `meta` has everything that `other` describes. False if a leaf has no digest."""
    same = all(meta.get(key, {}) == other[key] for key in ("step", "leaves", "blocks"))
    known = all(crc is not None or path in other["blocks"] for path, (crc, *_) in other["leaves"].items())
    return same and known and other["metrics"].items() <= meta["metrics"].items()


def newest(candidates: Iterable[int], read: Callable[[int], T]) -> tuple[T | None, dict[int, str]]:
    """What `read(step)` gives for the first step that is not Damaged, and {step: reason} of those before it."""
    damage: dict[int, str] = {}
    for step in candidates:
        try:
            return read(step), damage
        except Damaged as error:
            damage[step] = str(error)
    return None, damage


def read_meta(root: epath.Path, step: int) -> Meta:
    """The metadata of a step, without their digest. Raises Damaged where they are not valid, and Unreadable."""
    data = _read(root / str(step) / "meta" / "metadata")
    try:
        meta = unsealed(data)
    except ValueError as error:
        raise Damaged(f"its metadata are damaged, {error}") from error
    if meta.get("step") != step:
        raise Damaged(f"it holds step {meta.get('step')}")
    return meta


def _read(file: epath.Path) -> bytes:
    """The content of a file. Raises Damaged where it is missing, and Unreadable where it cannot be read."""
    try:
        return file.read_bytes()
    except MISSING as error:
        raise Damaged(f"{file.name} is missing") from error
    except Exception as error:  # a bucket's client has errors of its own
        raise Unreadable(reason(error)) from error


def reason(error: Exception) -> str:
    """Why `error` happened, in one line, without the specification of a store that TensorStore adds."""
    return errors.reason(error).split(" [tensorstore_spec")[0][:160]


def may_pass(error: Exception, directory: str) -> bool:
    """Whether a failure to write may be over later: a bucket has failed, and has not refused it."""
    failed = isinstance(error, OSError) or bucket.is_failure(error) or str(error).startswith(PASSING)
    return "://" in directory and failed and isinstance(bucket.refusal(directory, error), Unavailable)


def require_fit(meta: Meta, model: Mapping[str, Spec] | None, owner: Identity | None, name: str) -> None:
    """Raises InputError where a checkpoint has another schema, other leaves than a model, or another owner."""
    if meta["schema"] != SCHEMA:
        raise InputError(
            f"checkpoint {name} has schema {meta['schema']}, and this dl_jax reads {SCHEMA}; use the one that wrote it"
        )
    known = owner and meta.get("owner")
    foreign = differences(*read_by_both(known, owner), "in the checkpoint") if known and owner else []
    if foreign:
        raise InputError(
            f"checkpoint {name} belongs to another run: {'; '.join(foreign[:SHOWN])}; use another --workdir, or "
            "--restart to set aside what is there"
        )
    if model is None:
        return
    found = leaf_differences(
        {path: Spec(tuple(shape), dtype) for path, (_, shape, dtype) in meta["leaves"].items()}, model
    )
    if found:
        shown = "; ".join([*found[:SHOWN], *(["..."] if len(found) > SHOWN else [])])
        raise InputError(
            f"checkpoint {name} does not fit this model ({len(found)} difference{'s' * (len(found) > 1)}): {shown}; "
            "use another --workdir or the config and seeds it was written with"
        )


def read_parts(
    root: epath.Path, meta: Meta, wanted: Mapping[str, Iterable[Box]] | None = None
) -> dict[str, dict[Box, np.ndarray]]:
    """{path: {part: values}} of the wanted parts of all leaves, on the host; by default the whole leaves.

    A block with which a part overlaps is read once, as a whole, and no other block is read. Raises Damaged where one of
    them is not valid, and Unreadable.
    """
    import tensorstore

    state = root / str(meta["step"]) / "state"
    shapes = {path: tuple(shape) for path, (_, shape, _) in meta["leaves"].items()}
    wanted = wanted or {path: {whole_box(shape)} for path, shape in shapes.items()}
    layouts = {path: _layout(meta, path) for path in shapes}
    filled = [path for path, shape in shapes.items() if 0 not in shape]
    needed = {path: {b for box in wanted[path] for b in blocks_in(box, layouts[path][1])} for path in filled}

    def fetch() -> dict[str, dict[Box, Any]]:
        opened = {path: tensorstore.open(_location(state, path), open=True, read=True) for path in filled}
        stores = {path: store.result() for path, store in opened.items()}
        reads = {path: {b: stores[path][_slices(b)].read() for b in needed[path]} for path in filled}
        return {path: {b: read.result() for b, read in each.items()} for path, each in reads.items()}

    try:
        found = fetch()
    except Exception as error:  # damage takes any form
        _require_readable(state, error)
        try:
            found = fetch()  # it may have been a failure to read that is over
        except Exception as again:
            raise Damaged(f"its arrays cannot be read, {reason(again)}") from again
    parts = {}
    for path, (shape, block, crcs) in layouts.items():
        dtype = meta["leaves"][path][2]
        stored, blocks = np.dtype("uint32" if dtype.startswith("key<") else dtype), found.pop(path, {})
        for box, values in blocks.items():
            crc = crcs[number_of(box, shape, block)]
            if values.dtype != stored or crc not in (None, digest(values)):
                raise Damaged(f"{path} does not match its digest")
        parts[path] = {box: _part(box, blocks, stored) for box in wanted[path]}
    return parts


def _layout(meta: Meta, path: str) -> tuple[tuple[int, ...], tuple[int, ...], list[int | None]]:
    """The shape of a leaf, that of its blocks, and their digests; None for one that has none."""
    crc, shape, _ = meta["leaves"][path]
    block, crcs = meta.get("blocks", {}).get(path, (shape, [crc]))  # before there were blocks, a split leaf had null
    return tuple(shape), tuple(block), crcs


def _part(box: Box, blocks: Mapping[Box, np.ndarray], dtype: np.dtype) -> np.ndarray:
    """A part of an array, from the blocks that overlap with it."""
    if box in blocks:
        return blocks[box]
    part = np.zeros([stop - start for start, stop in box], dtype)
    for block, values in blocks.items():
        both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, block, strict=True))
        if all(start < stop for start, stop in both):
            part[_slices(both, box)] = values[_slices(both, block)]
    return part


def _slices(box: Box, within: Box | None = None) -> tuple[slice, ...]:
    """The index of a part in an array, or in another part `within` which it lies."""
    origin = [start for start, _ in within] if within else [0] * len(box)
    return tuple(slice(start - o, stop - o) for (start, stop), o in zip(box, origin, strict=True))


def _require_readable(folder: epath.Path, error: Exception) -> None:
    """Raises Unreadable unless all files in a folder can be read, so that `error` tells of their content."""
    if isinstance(error, MemoryError) or str(error).startswith(PASSING):
        raise Unreadable(reason(error)) from error
    for path in entries(folder):
        if is_folder(path):
            _require_readable(path, error)
        else:
            with contextlib.suppress(Damaged):
                _read(path)


def _location(state: epath.Path, path: str) -> dict[str, Any]:
    """TensorStore's specification of the place where Orbax stores a leaf."""
    folder = f"{state.as_posix()}/"
    base = folder if "://" in folder else {"driver": "file", "path": folder}
    store = {"driver": "ocdbt", "base": base, "path": f"{path.replace('/', '.')}/"}
    return {"driver": "zarr", "kvstore": store}


def entries(root: epath.Path) -> list[epath.Path]:
    """What is in a folder; nothing if there is no such folder. Raises Unreadable where it cannot be listed."""
    try:
        return children(root)
    except (FileNotFoundError, NotADirectoryError):  # object storage has no empty directories
        return []
    except Exception as error:
        raise Unreadable(reason(error)) from error


def _undo(replaced: epath.Path, place: epath.Path) -> None:
    """Renames a checkpoint back, unless the save that was to replace it is complete."""
    if exists(place) and not _is_unfinished(place):
        replaced.rmtree()
    else:
        move(replaced, place)


def _is_unfinished(path: epath.Path) -> bool:
    """Orbax renames a finished save into place, and on object storage, which cannot, marks it with a file."""
    if ".orbax-checkpoint-tmp" in path.name:
        return True
    return path.as_posix().startswith("gs://") and path.name.isdecimal() and not exists(path / "commit_success.txt")


def _speaks(record: logging.LogRecord) -> bool:
    ours = "orbax" not in record.pathname
    return ours or (record.levelno >= logging.ERROR and not record.exc_info)
