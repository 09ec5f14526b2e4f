"""Batches as a pure function of the step: `Stream`, `no_data` and `epoch`, one pass over a set. Never imports JAX."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError

Columns = dict[str, Any]  # every column an array [N, ...] or Ragged, or an array [B, ...] of a batch
ALL = slice(None)
INDEX = "index"  # the column of a batch that points into a stream's records


@dataclasses.dataclass(frozen=True)
class Stream:
    """An endless sequence of batches: `stream(step, rows)` gives the rows `rows` of the global batch of `step`.

    A stream has no state, so there is nothing to save: a step gives the same batch at any time and on any process. Each
    process asks for its own rows only.
    """

    batch_size: int  # B, rows of a global batch
    read: Callable[[int, slice], Columns]  # (step, rows) -> columns; `index` int [..., B] points into `records`
    axis: int = 0  # of the rows: 0 in [B, ...], 1 in [S, B, ...] for S seeds
    # Columns [N, ...] of a set in memory; None where `read` gives the batch itself.
    records: Mapping[str, np.ndarray] | None = None
    # The steps i k to (i + 1) k - 1 have batches of one shape for k = `together`; None where all steps have.
    together: int | None = None
    widest: Callable[[slice], Columns] | None = None  # a batch that is as large as any, where shapes differ

    def __call__(self, step: int, rows: slice = ALL) -> Columns:
        batch = self.read(step, rows)
        return batch if self.records is None else gather(self.records, batch)

    def later(self, begin: int) -> "Stream":
        """The stream whose step 0 is step `begin` of this one, for a second training stage.

        Raises InputError where `begin` lies within steps that have to stay together.
        """
        if self.together and begin % self.together:
            raise InputError(
                f"a stage that begins at step {begin} of the stream, expected a multiple of {self.together}, the steps "
                "with batches of one shape; train for such a number of steps before"
            )
        return dataclasses.replace(self, read=lambda step, rows: self.read(begin + step, rows))


def gather(records: Mapping, batch: Mapping) -> dict:
    """The batch whose columns are the rows batch["index"] of `records` [N, ...] and the batch's other columns.

    Works on NumPy arrays and on traced JAX arrays. Raises InputError where the two have a column of the same name.
    """
    rest = {name: column for name, column in batch.items() if name != INDEX}
    clash = sorted(records.keys() & rest.keys())
    if clash:
        raise InputError(f"column {clash[0]!r} is in the records and in the batch that points into them; rename one")
    return {**{name: column[batch[INDEX]] for name, column in records.items()}, **rest}


def stacked(parts: Sequence[Mapping]) -> Columns:
    """Batches stacked along a new first axis. Raises InputError where their shapes differ."""

    def column(name: str) -> np.ndarray:
        shapes = {np.shape(part[name]) for part in parts}
        if len(shapes) > 1:
            raise InputError(
                f"batches of shapes {min(shapes)} and {max(shapes)} in column {name!r}, expected one shape for all "
                "seeds; bucket the data of all seeds together"
            )
        return np.stack([part[name] for part in parts])

    return {name: column(name) for name in parts[0]}


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The batches of one pass over a data set, as `epoch` gives them. It can be iterated more than once."""

    records: Mapping[str, np.ndarray]
    batch_size: int
    rows: slice

    def __len__(self) -> int:
        return -(-count(self.records) // self.batch_size)

    def __iter__(self) -> Iterator[Columns]:
        n = count(self.records)
        for start in range(0, n, self.batch_size):
            positions = np.arange(start, start + self.batch_size)[self.rows]
            # Padding repeats the last example: its loss is finite, so that 0 times it is 0.
            batch = gather(self.records, {INDEX: np.minimum(positions, n - 1)})
            yield {**batch, "mask": (positions < n).astype(np.float32)}


def epoch(records: Mapping[str, np.ndarray], batch_size: int, rows: slice = ALL) -> Epoch:
    """The batches of one pass over `records` in their order, with a column `mask` float32 [B] that is 0 for padding.

    The last batch is padded with copies of the last example. `rows` are this process's rows of each global batch; every
    process gets the same number of batches. Raises InputError for no records, columns of different lengths, a batch
    size below 1, rows outside the batch, and records that have a column `mask` already.
    """
    check_batch(batch_size, rows)
    if "mask" in records:
        raise InputError("the records have a column 'mask', expected none: `epoch` adds it; rename the column")
    count(records)
    return Epoch(records, batch_size, rows)


def no_data(step: int) -> Columns:
    """The stream of a step that needs no batch, or that reads a whole set, which `core.step.holding` gives it."""
    return {}


def check_batch(batch_size: int, rows: slice = ALL) -> None:
    """Raises InputError for a batch size below 1, or where `rows` selects no row of the batch."""
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: expected 1 or more; use a positive --batch-size")
    if not range(batch_size)[rows]:
        raise InputError(
            f"rows {rows.start}:{rows.stop} select nothing of a batch of {batch_size}; give rows within it"
        )


def count(records: Mapping[str, np.ndarray]) -> int:
    """The number of examples. Raises InputError for no examples, and for columns of different lengths."""
    lengths = {name: len(column) for name, column in records.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"columns of different lengths {lengths}, expected one row per example in each; select the same rows"
        )
    if not sum(lengths.values()):
        raise InputError("no records, expected at least one example; choose a split that is not empty")
    return next(iter(lengths.values()))
