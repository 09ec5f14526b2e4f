"""`load`: a split as columns in memory, decoded once and kept on disk as memory-mapped .npy files."""

import contextlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from dl_jax.core import bucket
from dl_jax.core.errors import InputError, spared
from dl_jax.core.files import cache_address, cache_folder
from dl_jax.core.inputs import note
from dl_jax.core.ragged import Ragged, joined, ragged
from dl_jax.core.stream import Columns
from dl_jax.data import cached, copies
from dl_jax.data.describe import Feature
from dl_jax.data.records import EmptySplit, Example, Records, require_one_shape, stack
from dl_jax.data.source import Prepared, cache_entry, find, normal_split

BUDGET = 2 * 10**9  # bytes
_LISTING = "columns.json"
CHUNK = 256  # examples decoded at a time
_PATIENCE = 2.0  # seconds without a progress bar


class Change(NamedTuple):
    """What is done to each example when it is decoded, before it is kept."""

    name: str  # what is kept is named after it, so that another change is another name
    features: Callable[[dict[str, Feature]], dict[str, Feature]]  # the columns before -> those afterwards
    example: Callable[[Example], Example]


def check_columns(records: Columns, kinds: Mapping[str, str], name: str, expected: str) -> None:
    """Raises InputError unless columns of the set `name` are [N] and of these kinds, as NumPy names them: S, i or f.

    `expected` ends the message: what was expected, and what to do.
    """
    for column, kind in kinds.items():
        found = records[column]
        if found.dtype.kind != kind or found.ndim != 1:
            raise InputError(f"column {column!r} of {name} is {found.dtype} {found.shape}, expected {expected}")


def load(
    name: str,
    split: str,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    *,
    only: Sequence[str] | None = None,
    budget: int = BUDGET,
) -> Columns:
    """A split of a prepared TFDS set as read-only columns [N, ...], in TFDS's order.

    Images are uint8 [N, H, W, C], decoded as TensorFlow decodes them; of 16-bit images the upper 8 bits are kept. Class
    labels are int32 [N]. Text is a bytes array (dtype S, width of the longest); text ending in NUL raises InputError.
    Other tensors keep their dtype. A column whose examples differ in length is `Ragged`: it reads like an array [N, L,
    ...] padded with zeros to the longest, takes no more memory than the values, and has a companion `<column>/length`,
    int32 [N]. Nested features are called `outer/inner`. `only` names the columns to decode and keep; by default it is
    all of them.

    `split` is TFDS's: `train`, `train[:90%]`, `train+test`. The set `digits` needs no preparation; other sets are
    looked for in `data_dir` (see `source.data_folder`). The first call decodes the split and writes it to the cache
    folder (see `files.cache_folder`); later ones check the files against their digests and map them. Of a sum of splits
    the parts alone are kept; they are put together in memory, without those that are empty. A damaged cache is made
    anew, with a warning. If the cache is an address, what is decoded is copied there, and copied from there to the
    cache folder of another machine. The set's version and a digest of the columns are noted (see `inputs.note`).

    Raises InputError for a set, split or column that is missing or damaged, for examples that do not match their
    declared features, or that cannot be stacked, and for columns of more than `budget` bytes, for which there is
    `streamed`. Raises Unavailable where the cache cannot be read at present.
    """
    return load_changed(name, split, AS_IT_IS, data_dir, cache_dir, only=only, budget=budget)


def load_changed(
    name: str,
    split: str,
    change: Change,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    *,
    only: Sequence[str] | None = None,
    budget: int = BUDGET,
) -> Columns:
    """As `load`, of examples to which `change` has been applied; what is kept and noted carries its name."""
    found, split = find(name, data_dir, cache_dir), normal_split(split)
    read = (_sum if "+" in split else _kept)(found, split, change, cache_dir, only, budget)
    note(f"{found.name} {split}{_chosen(only)}{change.name}", f"{found.version} {read.digest}")
    return read.columns


def _chosen(only: Sequence[str] | None) -> str:
    return "" if only is None else " of " + ", ".join(sorted({*only}))


def _kept(
    found: Prepared, split: str, change: Change, cache_dir: str | None, only: Sequence[str] | None, budget: int
) -> "_Read":
    """What the cache folder has of a split that is no sum, after it was decoded where that is needed."""
    place = cache_entry(found, cache_dir) / f"{_folder_name(split + _chosen(only))}{change.name}"
    address = cache_address(cache_dir)
    shared = address and address / place.relative_to(cache_folder(cache_dir)).as_posix()

    def make() -> None:
        if shared and _received(shared, place):
            return
        _write(_decode(Records(found, split, only), change, budget), place)
        if shared:
            _send(place, shared)

    read = cached.get(place, lambda: _read(place), make)
    _require_budget(found, split, [read.columns], budget)
    return read


def _sum(
    found: Prepared, split: str, change: Change, cache_dir: str | None, only: Sequence[str] | None, budget: int
) -> "_Read":
    """What the parts of a sum of splits hold, one after the other, read-only."""
    parts, terms = [], split.split("+")
    for term in filter(None, terms):
        with contextlib.suppress(EmptySplit):
            parts.append(_kept(found, term, change, cache_dir, only, budget).columns)
    if not parts or not all(terms):
        Records(found, split, only)  # says what is wrong with the sum
    _require_budget(found, split, parts, budget)
    for name in parts[0]:
        require_one_shape(name, {np.shape(part[name])[1:] for part in parts if not isinstance(part[name], Ragged)})
    columns = {name: _one_after_the_other([part[name] for part in parts]) for name in parts[0]}
    return _Read(columns, _digest(columns))


def _require_budget(found: Prepared, split: str, parts: Sequence[Columns], budget: int) -> None:
    size = sum(column.nbytes for part in parts for column in part.values())
    if size > budget:
        raise InputError(_too_large(found, split, size, budget))


AS_IT_IS = Change("", lambda features: features, lambda example: example)


class _Read(NamedTuple):
    columns: Columns
    digest: str  # of what the columns hold, the same on every machine


def _folder_name(split: str) -> str:
    readable = re.sub(r"\W+", "_", split)[:40]
    return f"{readable}-{hashlib.sha256(split.encode()).hexdigest()[:8]}"


def _one_after_the_other(columns: Sequence[Any]) -> Any:
    """One column of the rows of all `columns`, which are ragged, or none of them is. They have one shape of example."""
    is_ragged = isinstance(columns[0], Ragged)
    parts = [column.values for column in columns if len(column.values)] or [columns[0].values] if is_ragged else columns
    values = np.concatenate(parts)
    values.flags.writeable = False
    return joined(values, np.concatenate([column.lengths for column in columns])) if is_ragged else values


def _read(place: Path) -> _Read | None:
    """What is in a cache folder, or None if there is none. Raises DamagedError unless it is what was written."""
    if not cached.exists(place):
        return None
    listing = cached.read_sealed(place / _LISTING)
    if listing is None:
        raise cached.DamagedError(f"{_LISTING} is missing")
    cached.require_whole(place, listing["files"])
    return _Read({name: _column(place, name, **form) for name, form in listing["columns"].items()}, listing["digest"])


def _write(columns: Columns, place: Path) -> None:
    def fill(folder: Path) -> None:
        forms = {name: _put(folder, name, column) for name, column in columns.items()}
        listing = {"columns": forms, "digest": _digest(columns), "files": cached.digests(folder)}
        cached.write_sealed(folder / _LISTING, listing)

    _whole(place, fill)


# A column is kept as the array of its values, texts as their bytes, one after the other. Beside it stand the lengths of
# its texts and of its ragged rows.


def _put(folder: Path, name: str, column: Any) -> dict[str, Any]:
    """Writes the files of a column, and returns the arguments that `_column` needs to read them."""
    is_ragged = isinstance(column, Ragged)
    values = column.values if is_ragged else column
    if is_ragged:
        cached.write_array(folder / _file_name(name, "rows"), _narrow(column.lengths))
    if values.dtype.kind != "S":
        cached.write_array(folder / _file_name(name), values)
        return {"is_ragged": is_ragged}
    lengths = np.char.str_len(values).ravel()
    filled = np.ascontiguousarray(values).view(np.uint8).reshape(len(lengths), values.itemsize)
    cached.write_array(folder / _file_name(name), filled[np.arange(values.itemsize) < lengths[:, None]])
    cached.write_array(folder / _file_name(name, "texts"), _narrow(lengths))
    return {"is_ragged": is_ragged, "texts": values.shape}


def _narrow(lengths: np.ndarray) -> np.ndarray:
    return lengths.astype(np.min_scalar_type(lengths.max(initial=0)))


def _column(folder: Path, name: str, is_ragged: bool, texts: Sequence[int] | None = None) -> Any:
    """Reads a column. `texts` is the shape of its values, if they are texts."""
    values = _mapped(folder / _file_name(name))
    if texts is not None:
        lengths = _mapped(folder / _file_name(name, "texts"))
        width = max(1, int(lengths.max(initial=0)))
        filled = np.zeros((len(lengths), width), np.uint8)
        filled[np.arange(width) < lengths[:, None]] = values
        values = filled.view(f"S{width}").reshape(texts)
        values.flags.writeable = False
    return joined(values, _mapped(folder / _file_name(name, "rows"))) if is_ragged else values


def _mapped(file: Path) -> np.ndarray:
    return np.asarray(cached.attempted(lambda: np.load(file, mmap_mode="r"), file))


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


def _file_name(column: str, part: str = "") -> str:
    return f"{quote(column, safe='')}{part and '#'}{part}.npy"  # `quote` leaves no # in a name


def _digest(columns: Columns) -> str:
    """A digest of the names, types, shapes and numbers of `columns`, which are contiguous."""
    arrays: dict[str, np.ndarray] = {}
    for name, each in columns.items():
        arrays |= {name: each.values, f"{name}#offsets": each.offsets} if isinstance(each, Ragged) else {name: each}
    parts = [(name, each.dtype.str, each.shape, zlib.crc32(each.data)) for name, each in sorted(arrays.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _decode(records: Records, change: Change, budget: int) -> Columns:
    found, split = records.found, records.split
    n, features = len(records), change.features(records.features)
    columns: Columns = {}
    rows: dict[str, list[np.ndarray]] = {name: [] for name, feature in features.items() if feature.ragged}
    held = 0  # bytes of the ragged rows
    for start in shown(range(0, n, CHUNK), n, f"decoding {found.name} {split}"):
        examples = [change.example(each) for each in records.read(range(start, min(start + CHUNK, n)))]
        for name, found_rows in rows.items():
            found_rows += [example[name] for example in examples]
            held += sum(example[name].nbytes for example in examples)
        part = stack([{name: value for name, value in example.items() if name not in rows} for example in examples])
        room = {name: _room(name, columns.get(name), column, n) for name, column in part.items()}
        size = held + sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in room.values())
        if size > budget:
            raise InputError(_too_large(found, split, size, budget))
        for name, column in part.items():
            columns[name] = _resized(columns.get(name), *room[name])
            columns[name][start : start + len(column)] = column
    columns |= {name: ragged(found_rows) for name, found_rows in rows.items()}
    lengths = {f"{name}/length": columns[name].lengths for name in rows}
    return {name: columns[name] for name in features} | lengths


def _too_large(found: Prepared, split: str, size: int, budget: int) -> str:
    return (
        f"{found.name} {split} takes {size / 1e6:,.0f} MB or more when decoded, expected at most {budget / 1e6:,.0f}: "
        "read it with data.streamed, or load a slice of it"
    )


def _room(name: str, column: np.ndarray | None, part: np.ndarray, n: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype that hold both `column` [N, ...] and `part` [B, ...]."""
    if column is None:
        return (n, *part.shape[1:]), part.dtype
    require_one_shape(name, {column.shape[1:], part.shape[1:]})
    return column.shape, np.result_type(column, part)


def _resized(column: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if column is None:
        return np.zeros(shape, dtype)
    return column.astype(dtype, copy=False)


def shown(starts: range, total: int, label: str) -> Iterator[int]:
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
