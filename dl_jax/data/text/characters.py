"""A text as ids, and windows of it: in order, for truncated back-propagation, or from anywhere.

An id is a byte, so the vocabulary is the same for every text and no character is unknown. Bytes that do not occur cost
almost nothing once the model predicts them with low probability. In ASCII text a byte is a character.
"""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dl_jax.core.errors import InputError, nearest
from dl_jax.core.inputs import note
from dl_jax.core.stream import Columns, Stream, check_batch
from dl_jax.data.batches import check_seed, generator, order, per_seed
from dl_jax.data.columns import load as load_columns

VOCABULARY = 256
STANDARD_LIBRARY = "standard_library"
SIZE = 1_000_000  # bytes of the standard library that are read, at most

_SPLITS = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}  # tenths of it


def encode(text: str) -> np.ndarray:
    """Ids uint8 [N] of a text in UTF-8."""
    return np.frombuffer(text.encode(), np.uint8)


def decode(ids: np.ndarray) -> str:
    """The text of ids [N]; bytes that are no UTF-8 become U+FFFD. Raises InputError for ids outside 0 .. 255."""
    ids = np.asarray(ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise InputError(f"ids are {ids.dtype}, expected whole numbers; decode what `encode` gave")
    if ids.size and not 0 <= ids.min() <= ids.max() < VOCABULARY:
        raise InputError(f"ids from {ids.min()} to {ids.max()}, expected bytes, 0 to 255; decode what `encode` gave")
    return bytes(ids.astype(np.uint8)).decode(errors="replace")


def load(name: str, split: str) -> np.ndarray:
    """A split as ids uint8 [N]: of `standard_library`, or the column `text` of a TFDS set, its records line by line.

    `standard_library` is the source text of the running Python's own top-level modules, in the order of their names up
    to `SIZE` bytes: eight tenths to learn from, then one for validation and one for testing. It needs no download, and
    differs from one Python to the next, so a digest of it is noted (see `inputs.note`). Raises InputError as
    `data.load` does, where there is no such column, and where this Python has no such split or no source text.
    """
    if name == STANDARD_LIBRARY:
        return _standard_library(split)
    records = load_columns(name, split)
    if "text" not in records or records["text"].dtype.kind != "S" or records["text"].ndim != 1:
        found = ", ".join(f"{column} ({values.dtype} {values.shape})" for column, values in records.items())
        raise InputError(
            f"data set {name} has the columns {found}, expected bytes in column 'text', one text a record; "
            f"choose another --dataset, such as {STANDARD_LIBRARY}"
        )
    return np.frombuffer(b"\n".join(records["text"].tolist()), np.uint8)


def _standard_library(split: str) -> np.ndarray:
    if split not in _SPLITS:
        raise InputError(
            f"{STANDARD_LIBRARY} has no split {split!r}, expected {', '.join(_SPLITS)}{nearest(split, _SPLITS)}"
        )
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("[a-z]*.py"))
    if not files:
        raise InputError(
            f"this Python has no source text in {folder}, expected its standard library; choose another --dataset"
        )
    sources, size = [], 0
    for file in files:
        if size < SIZE:
            sources.append(file.read_bytes())
            size += len(sources[-1])
    ids = np.frombuffer(b"".join(sources)[:SIZE], np.uint8)
    start, stop = (len(ids) * tenth // 10 for tenth in _SPLITS[split])
    ids = ids[start:stop]
    note(f"{STANDARD_LIBRARY} {split}", hashlib.sha256(ids.data).hexdigest()[:16])
    return ids


def windows(ids: np.ndarray, batch_size: int, length: int, seeds: int | Sequence[int]) -> Stream:
    """An endless stream of windows of a text of ids [N]: {"token", "target": int32 [B, T], "first": bool [B]}.

    The text is split into B = `batch_size` contiguous segments, one per row, and each segment into windows of T =
    `length` characters; `target` is the character after each token. Row b starts at a window drawn from the seed and b,
    reads on, and wraps around, so that every pass shows every window once. `first` is True where a row does not
    continue its previous window, so a carried state must be reset. Characters after a segment's last full window are
    not used. With S seeds the columns are [S, B, ...].

    Raises InputError for a text of fewer than B T + 1 characters, a length or batch size below 1 or a negative seed.
    """
    check_batch(batch_size)
    _check_length(length)
    if not isinstance(seeds, int | np.integer):
        return per_seed([windows(ids, batch_size, length, seed) for seed in seeds])
    segment = (len(ids) - 1) // batch_size
    count = segment // length  # windows in a segment
    if count < 1:
        raise InputError(
            f"a text of {len(ids)} characters is too short for {batch_size} rows of {length}, expected at least "
            f"{batch_size * length + 1}: use a longer text, or a smaller --batch-size or --length"
        )
    starts = order(count, seeds)(0, batch_size)  # [B]
    begins = np.arange(batch_size) * segment  # [B]

    def read(step: int, rows: slice) -> Columns:
        window = (starts[rows] + step) % count  # [B]
        shown = ids[(begins[rows] + window * length)[:, None] + np.arange(length + 1)].astype(np.int32)  # [B, T + 1]
        return {"token": shown[:, :-1], "target": shown[:, 1:], "first": (window == 0) | (step == 0)}

    return Stream(batch_size, read)


def random_windows(ids: np.ndarray, batch_size: int, length: int, seeds: int | Sequence[int]) -> Stream:
    """An endless stream of windows from anywhere in a text of ids [N]: {"token", "target": int32 [B, T]}.

    Every step draws, from the seed and the step, where each window of T = `length` characters begins: all N − T places
    are equally likely, and windows may overlap. `target` is the character after each token. With S seeds the columns
    are [S, B, T].

    Raises InputError for a text of fewer than T + 1 characters, a length or batch size below 1 or a negative seed.
    """
    check_batch(batch_size)
    _check_length(length)
    if not isinstance(seeds, int | np.integer):
        return per_seed([random_windows(ids, batch_size, length, seed) for seed in seeds])
    check_seed(seeds)
    if len(ids) <= length:
        raise InputError(
            f"a text of {len(ids)} characters is too short for a window of {length}, expected at least {length + 1}: "
            "use a longer text, or a smaller --length"
        )

    def read(step: int, rows: slice) -> Columns:
        starts = generator(seeds, step).integers(0, len(ids) - length, batch_size)[rows]  # the same for any rows
        shown = ids[starts[:, None] + np.arange(length + 1)].astype(np.int32)  # [B, T + 1]
        return {"token": shown[:, :-1], "target": shown[:, 1:]}

    return Stream(batch_size, read)


def reading(ids: np.ndarray, length: int) -> Columns:
    """One pass over a text of ids [N] as W windows of one row, in order: {"token", "target": int32 [W, 1, T], ...}.

    Every character but the first is a target once; `mask` float32 [W, 1, T] is 0 in the padding at the end. `first`
    bool [W, 1] holds in the first window alone, as in `windows`. Raises InputError for a text of fewer than 2
    characters or a length below 1.
    """
    _check_length(length)
    n = len(ids) - 1
    if n < 1:
        raise InputError(f"a text of {len(ids)} characters, expected 2 or more; choose a split that is not empty")
    count = -(-n // length)
    positions = np.arange(count * length).reshape(count, 1, length)
    shown = [ids[np.minimum(positions + i, n)].astype(np.int32) for i in (0, 1)]
    first = (np.arange(count) == 0)[:, None]
    return {"token": shown[0], "target": shown[1], "first": first, "mask": (positions < n).astype(np.float32)}


def _check_length(length: int) -> None:
    if length < 1:
        raise InputError(f"a window of {length} characters, expected 1 or more; use a positive --length")
