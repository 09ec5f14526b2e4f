"""Columns to batches. The order is a pure function of (seed, step): there is no iterator, hence nothing to save.

A stream is a function step -> batch; `batches` makes one from columns in memory, `streaming.stream` one from disk.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from dl_jax.core.errors import InputError

Columns = dict[str, np.ndarray]  # every column [N, ...]
Stream = Callable[[int], Columns]  # step -> columns [B, ...]

_ORDER, _TRANSFORM = 0, 1  # keep the two uses of one seed apart


def order(n: int, seed: int) -> Callable[[int, int], np.ndarray]:
    """The endless sequence of example indices as a function (start, stop) -> int64 [stop - start].

    Epoch e covers the positions [e n, (e + 1) n) and is a permutation of 0 .. n - 1 drawn from (seed, e). Any position
    is reached at once: the last two permutations asked for are kept, none before is needed. Raises InputError for a
    negative seed.
    """
    _check_seed(seed)

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))).permutation(n)

    def indices(start: int, stop: int) -> np.ndarray:
        epochs = range(start // n, -(-stop // n))
        return np.concatenate([permutation(e)[max(start - e * n, 0) : stop - e * n] for e in epochs])

    return indices


def generator(seed: int, position: int) -> np.random.Generator:
    """The generator that belongs to a position of the order: the same whatever the number of processes."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_TRANSFORM, position)))


def batches(records: Mapping[str, np.ndarray], batch_size: int, seed: int, rows: slice = slice(None)) -> Stream:
    """Shuffled batches for ever: step -> rows `rows` of the global batch of `batch_size` examples.

    Step s covers the positions [s B, (s + 1) B) of `order`, across epoch borders, so that no example is dropped and a
    batch may be larger than the set. Process p of n passes `rows=slice(p * B // n, (p + 1) * B // n)` and gathers
    nothing but its own rows. Raises InputError for no records, columns of different lengths, a batch size below 1, rows
    outside the batch or a negative seed.
    """
    n = _count(records)
    check_batch(batch_size, rows)
    indices = order(n, seed)

    def batch(step: int) -> Columns:
        chosen = indices(step * batch_size, (step + 1) * batch_size)[rows]
        return {name: column[chosen] for name, column in records.items()}

    return batch


def later(stream: Stream, begin: int) -> Stream:
    """`stream` from step `begin` on: the next stage of a training goes on in the data where the one before ended."""
    return lambda step: stream(begin + step)


class Epoch:
    """The batches of one pass; may be iterated any number of times. See `epoch`."""

    def __init__(self, records: Mapping[str, np.ndarray], batch_size: int, rows: slice) -> None:
        self._records, self._batch_size, self._rows = records, batch_size, rows
        self._count = _count(records)

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def __iter__(self) -> Iterator[Columns]:
        for start in range(0, self._count, self._batch_size):
            positions = np.arange(start, start + self._batch_size)[self._rows]
            # Padding repeats the last example: its loss is finite, so that 0 times it is 0.
            chosen = np.minimum(positions, self._count - 1)
            batch = {name: column[chosen] for name, column in self._records.items()}
            yield {**batch, "mask": (positions < self._count).astype(np.float32)}


def epoch(records: Mapping[str, np.ndarray], batch_size: int, rows: slice = slice(None)) -> Epoch:
    """The batches of one pass in the set's own order, each with `mask` float32 [B]: 1 for an example, 0 for padding.

    Only the last batch is padded, with copies of the last example. `rows` is this process's part of each global batch,
    as in `batches`: every process gets the same number of batches. Raises InputError as `batches` does, and for records
    that have a column `mask` already.
    """
    check_batch(batch_size, rows)
    if "mask" in records:
        raise InputError("the records have a column 'mask', expected none: `epoch` adds it; rename the column")
    return Epoch(records, batch_size, rows)


def per_seed(streams: Sequence[Stream]) -> Stream:
    """One stream of batches [S, B, ...] from S streams of [B, ...]: each seed keeps its own order."""
    return lambda step: _stacked([stream(step) for stream in streams])


def windows(stream: Stream, k: int) -> Stream:
    """A stream of [k, B, ...]: at `step`, the batches of steps step .. step + k - 1, as `step.scanned` takes them.

    Raises InputError for k < 1.
    """
    if k < 1:
        raise InputError(f"{k} steps in one call, expected 1 or more; give a larger number")
    return lambda step: _stacked([stream(step + i) for i in range(k)])


def _stacked(parts: Sequence[Columns]) -> Columns:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def check_batch(batch_size: int, rows: slice) -> None:
    """Raises InputError for a batch size below 1, or rows that select nothing of the batch."""
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: expected 1 or more; use a positive --batch-size")
    if not range(batch_size)[rows]:
        raise InputError(
            f"rows {rows.start}:{rows.stop} select nothing of a batch of {batch_size}, expected some of it"
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"seed {seed}: expected 0 or more; use a non-negative --seed")


def _count(records: Mapping[str, np.ndarray]) -> int:
    lengths = {name: len(column) for name, column in records.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"columns of different lengths {lengths}, expected one row per example in each")
    if not sum(lengths.values()):
        raise InputError("no records, expected at least one example; choose a split that is not empty")
    return next(iter(lengths.values()))
