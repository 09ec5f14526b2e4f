"""Columns whose rows differ in length, kept without padding. Never imports JAX."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged:
    """A column of N rows of different lengths, which reads like an array [N, L, ...] padded with zeros.

    Only what is read is padded: `column[rows]` is an array [..., L, ...] for an integer, a slice or an array of rows,
    and `np.asarray(column)` is the whole one. Texts are padded with empty ones.
    """

    values: np.ndarray  # [M, ...], the rows one after the other
    offsets: np.ndarray  # int64 [N + 1]; row i is values[offsets[i] : offsets[i + 1]]
    width: int  # L, the length that rows are padded to; no row is longer

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:  # int32 [N]
        return np.diff(self.offsets).astype(np.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), self.width, *self.values.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in memory."""
        return self.values.nbytes + self.offsets.nbytes

    def __getitem__(self, rows: Any) -> np.ndarray:
        begin, length = self.offsets[:-1][rows], np.diff(self.offsets)[rows]
        place = np.arange(self.width)
        there = place < np.expand_dims(length, -1)  # [..., L]
        out = np.zeros((*there.shape, *self.values.shape[1:]), self.dtype)
        out[there] = self.values[(np.expand_dims(begin, -1) + place)[there]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def take(self, rows: np.ndarray) -> "Ragged":  # int [R]
        """The rows `rows`, in this order, unpadded."""
        lengths = np.diff(self.offsets)[rows]
        begin = self.offsets[:-1][rows]
        places = np.repeat(begin - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        return Ragged(self.values[places], _offsets(lengths), self.width)

    def of(self, values: np.ndarray) -> "Ragged":  # [M, ...]
        """The column with other values in the same rows, such as the ids of its words.

        Raises InputError where their number differs.
        """
        if len(values) != len(self.values):
            raise InputError(f"{len(values)} values for rows of {len(self.values)}, expected one for each")
        return dataclasses.replace(self, values=values)

    def padded(self, width: int) -> "Ragged":
        """The column with rows that are padded to `width`. Raises InputError where a row is longer."""
        longest = int(self.lengths.max(initial=0))
        if longest > width:
            raise InputError(f"a row of length {longest}, expected at most {width}; raise the width, or cut the row")
        return dataclasses.replace(self, width=width)


def ragged(rows: Sequence[Any]) -> Ragged:
    """The column of `rows`, arrays [L_i, ...] of which there is at least one; they are padded to the longest.

    Raises InputError for no rows, and for rows that differ in more than their length.
    """
    arrays = [np.asarray(row) for row in rows]
    if len({array.shape[1:] for array in arrays}) != 1 or not arrays[0].ndim:
        shapes = ", ".join(sorted({str(array.shape) for array in arrays})[:3]) or "none"
        raise InputError(f"rows of shapes {shapes}, expected one row or more that differ only in their first axis")
    filled = [array for array in arrays if len(array)]  # np.asarray([]) is of float64, whatever the others are
    return joined(np.concatenate(filled or arrays), [len(array) for array in arrays])


def joined(values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> Ragged:
    """The column whose rows of these `lengths` [N] follow each other in `values` [M, ...].

    They are padded to the longest, but to 1 at least. Raises InputError where the lengths do not add up to M.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.sum() != len(values) or (lengths < 0).any():
        raise InputError(f"lengths that add up to {lengths.sum()}, expected {len(values)}, the number of values")
    return Ragged(values, _offsets(lengths), max(1, int(lengths.max(initial=0))))


def _offsets(lengths: np.ndarray) -> np.ndarray:  # [N] -> int64 [N + 1]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
