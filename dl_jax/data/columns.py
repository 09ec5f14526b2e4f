"""`load`: a split as columns in memory, decoded once and kept on disk as memory-mapped .npy files."""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from dl_jax.core import bucket
from dl_jax.core.errors import InputError, spared
from dl_jax.core.files import cache_address, cache_folder
from dl_jax.core.inputs import note
from dl_jax.core.stream import Columns
from dl_jax.data import cached, copies
from dl_jax.data.describe import Feature
from dl_jax.data.records import Example, Records, stack
from dl_jax.data.source import Prepared, cache_entry, find, normal_split

BUDGET = 2 * 10**9  # bytes
_LISTING = "columns.json"
_CHUNK = 256  # examples decoded at a time
_PATIENCE = 2.0  # seconds without a progress bar


class Change(NamedTuple):
    """What is done to each example when it is decoded, before it is kept."""

    name: str  # what is kept is named after it, so that another change is another name
    features: Callable[[dict[str, Feature]], dict[str, Feature]]  # the columns before -> those afterwards
    example: Callable[[Example], Example]


def load(
    name: str, split: str, data_dir: str | None = None, cache_dir: str | None = None, *, budget: int = BUDGET
) -> Columns:
    """A split of a prepared TFDS set as read-only columns [N, ...], in TFDS's order.

    Images are uint8 [N, H, W, C], decoded as TensorFlow decodes them; of 16-bit images the upper 8 bits are kept. Class
    labels are int32 [N]. Text is a bytes array (dtype S, width of the longest); text ending in NUL raises InputError.
    Other tensors keep their dtype. A column whose examples differ in length is padded with zeros to [N, L, ...] and has
    a companion `<column>/length`, int32 [N]. Nested features are called `outer/inner`.

    `split` is TFDS's: `train`, `train[:90%]`, `train+test`. The set `digits` needs no preparation; other sets are
    looked for in `data_dir` (see `source.data_folder`). The first call decodes the split and writes it to the cache
    folder (see `files.cache_folder`); later ones check the files against their digests and map them. A damaged cache
    is decoded anew, with a warning. If the cache is an address, what is decoded is copied there, and copied from there
    to the cache folder of another machine. The set's version and a digest of the columns are noted (see `inputs.note`).

    Raises InputError for a set, split or file that is missing or damaged, for examples that do not match their declared
    features, or that cannot be stacked, and for columns of more than `budget` bytes, for which there is `streamed`.
    Raises Unavailable where the cache cannot be read at present.
    """
    return load_changed(name, split, AS_IT_IS, data_dir, cache_dir, budget=budget)


def load_changed(
    name: str,
    split: str,
    change: Change,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    *,
    budget: int = BUDGET,
) -> Columns:
    """As `load`, of examples to which `change` has been applied; what is kept and noted carries its name."""
    found, split = find(name, data_dir, cache_dir), normal_split(split)
    place = cache_entry(found, cache_dir) / f"{_folder_name(split)}{change.name}"
    address = cache_address(cache_dir)
    shared = address and address / place.relative_to(cache_folder(cache_dir)).as_posix()

    def make() -> None:
        if shared and _received(shared, place):
            return
        _write(_decode(found, split, change, budget), place)
        if shared:
            _send(place, shared)

    read = cached.get(place, lambda: _read(place), make)
    size = sum(column.nbytes for column in read.columns.values())
    if size > budget:
        raise InputError(_too_large(found, split, size, budget))
    note(f"{found.name} {split}{change.name}", f"{found.version} {read.digest}")
    return read.columns


AS_IT_IS = Change("", lambda features: features, lambda example: example)


class _Read(NamedTuple):
    columns: Columns
    digest: str  # of what the columns hold, the same on every machine


def _folder_name(split: str) -> str:
    readable = re.sub(r"\W+", "_", split)[:40]
    return f"{readable}-{hashlib.sha256(split.encode()).hexdigest()[:8]}"


def _read(place: Path) -> _Read | None:
    """What is in a cache folder, or None if there is none. Raises DamagedError unless it is what was written."""
    if not cached.exists(place):
        return None
    listing = cached.read_sealed(place / _LISTING)
    if listing is None:
        raise cached.DamagedError(f"{_LISTING} is missing")
    cached.require_whole(place, listing["files"])
    return _Read({name: _mapped(place / _file_name(name)) for name in listing["columns"]}, listing["digest"])


def _mapped(file: Path) -> np.ndarray:
    return np.asarray(cached.attempted(lambda: np.load(file, mmap_mode="r"), file))


def _write(columns: Columns, place: Path) -> None:
    def fill(folder: Path) -> None:
        for name, column in columns.items():
            cached.write_array(folder / _file_name(name), column)
        listing = {"columns": list(columns), "digest": _digest(columns), "files": cached.digests(folder)}
        cached.write_sealed(folder / _LISTING, listing)

    _whole(place, fill)


def _whole(place: Path, fill: Callable[[Path], None]) -> None:
    """All or nothing: the folder that `fill` fills appears under its name when it is complete and on disk."""
    for leftover in place.parent.glob(f"{place.name}.*.tmp"):  # of a process that was killed; the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(suffix=".tmp", prefix=f"{place.name}.", dir=place.parent))
    try:
        fill(partial)
        cached.remove(place)  # a damaged one
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _received(shared: Any, place: Path) -> bool:
    """Copies what another machine has decoded from the address `shared`, the name of a cache folder there.

    False where it is not there or damaged, of which a warning tells. Raises Unavailable where it cannot be read.
    """
    try:
        listing = cached.read_sealed(shared / _LISTING)
        if listing is None:
            return False

        def fill(folder: Path) -> None:
            for name in (*listing["files"], _LISTING):
                copies.download(shared / name, folder / name)
            cached.require_whole(folder, listing["files"])

        _whole(place, fill)
    except (cached.DamagedError, InputError) as error:
        warnings.warn(f"{shared} in the cache is damaged ({error}); it is made anew", stacklevel=2)
        return False
    return True


def _send(place: Path, shared: Any) -> None:
    """Copies a cache folder to the address `shared`, its listing last; others do not use it before."""
    with spared(f"{shared} cannot be written", "other machines decode it again", Exception):
        for file in sorted(place.iterdir(), key=lambda file: file.name == _LISTING):
            bucket.client().put_file(str(file), os.fspath(shared / file.name))


def _file_name(column: str) -> str:
    return quote(column, safe="") + ".npy"


def _digest(columns: Columns) -> str:
    """A digest of the names, types, shapes and numbers of `columns`, which are contiguous."""
    parts = [(name, each.dtype.str, each.shape, zlib.crc32(each.data)) for name, each in sorted(columns.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _decode(found: Prepared, split: str, change: Change, budget: int) -> Columns:
    records = Records(found, split)
    n, features = len(records), change.features(records.features)
    columns: Columns = {}
    for start in _shown(range(0, n, _CHUNK), n, f"decoding {found.name} {split}"):
        examples = records.read(range(start, min(start + _CHUNK, n)))
        chunk = _padded([change.example(example) for example in examples], features)
        room = {name: _room(columns.get(name), part, n) for name, part in chunk.items()}
        size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in room.values())
        if size > budget:
            raise InputError(_too_large(found, split, size, budget))
        for name, part in chunk.items():
            columns[name] = _resized(columns.get(name), *room[name])
            rows = columns[name][start : start + len(part)]
            rows[tuple(map(slice, part.shape))] = part
    return columns


def _too_large(found: Prepared, split: str, size: int, budget: int) -> str:
    return (
        f"{found.name} {split} takes {size / 1e6:,.0f} MB or more when decoded, expected at most {budget / 1e6:,.0f}: "
        "read it with data.streamed, or load a slice of it"
    )


def _padded(examples: list[Example], features: dict[str, Feature]) -> Columns:
    """Columns [B, ...] of a few examples, ragged ones padded to the longest and followed by their lengths."""
    lengths = {name: np.array([len(e[name]) for e in examples], np.int32) for name, f in features.items() if f.ragged}
    longest = {name: max(1, int(length.max())) for name, length in lengths.items()}
    padded = [e | {name: _lengthened(e[name], most) for name, most in longest.items()} for e in examples]
    return stack(padded) | {f"{name}/length": length for name, length in lengths.items()}


def _lengthened(value: np.ndarray, length: int) -> np.ndarray:
    out = np.zeros((length, *value.shape[1:]), value.dtype)
    out[: len(value)] = value
    return out


def _room(column: np.ndarray | None, part: np.ndarray, n: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype that hold both `column` [N, ...] and `part` [B, ...]."""
    if column is None:
        return (n, *part.shape[1:]), part.dtype
    return tuple(map(max, column.shape, part.shape)), np.result_type(column, part)


def _resized(column: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if column is not None and column.shape == shape and column.dtype == dtype:
        return column
    out = np.zeros(shape, dtype)
    if column is not None:
        out[tuple(map(slice, column.shape))] = column
    return out


def _shown(starts: range, total: int, label: str) -> Iterator[int]:
    """Yields from `starts`; shows on stderr how far it is once it has taken a while."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr, soft_wrap=True)
    progress = Progress(console=console, transient=True)
    began, task = time.monotonic(), None
    try:
        for start in starts:
            yield start
            if task is None and time.monotonic() - began > _PATIENCE:
                task = progress.add_task(label, total=total)
                if console.is_terminal:
                    progress.start()
                else:
                    console.print(f"{label}: {total} examples, once", highlight=False)
            if task is not None:
                progress.update(task, completed=start + starts.step)
    finally:
        if progress.live.is_started:  # stopping writes an empty line otherwise
            progress.stop()
