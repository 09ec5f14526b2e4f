"""Batches of sequences of similar lengths, so that little of a batch is padding."""

import bisect
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.ragged import Ragged
from dl_jax.core.stream import INDEX, Columns, Stream, check_batch, count, gather
from dl_jax.data.batches import order, per_seed

_TURNS = 2  # a spawn key beside those of `batches`


def buckets(records: Mapping[str, Any], length: str, boundaries: Sequence[int]) -> list[Columns]:
    """The records [N, ...] by their length: those of up to the first boundary, those of up to the second, and so on.

    `length` names the column of whole numbers [N] that counts; for pairs of sequences, give the longer one's. In each
    bucket all ragged columns are padded to its boundary. Buckets without records are left out. Give them to
    `core.evaluate`, which takes a list of records; for training there is `bucketed`.

    Raises InputError for no records, for boundaries that do not increase from 1 or more, for a length that is 0 or
    above the last boundary, and for a ragged column with a row that is longer than the boundary of its bucket.
    """
    count(records)
    if length not in records:
        raise InputError(f"length is {length!r}, expected one of the columns {', '.join(records)}")
    lengths, widths = np.asarray(records[length]), list(boundaries)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise InputError(f"column {length!r} is {lengths.dtype} {lengths.shape}, expected a whole number for each row")
    whole = all(isinstance(width, int | np.integer) and not isinstance(width, bool) for width in widths)
    if not widths or not whole or widths[0] < 1 or any(low >= high for low, high in itertools.pairwise(widths)):
        raise InputError(f"boundaries are {widths}, expected lengths that increase, such as (16, 32, 64)")
    for row in np.flatnonzero((lengths < 1) | (lengths > widths[-1]))[:1]:
        raise InputError(
            f"{length} of row {row} is {lengths[row]}, expected 1 to {widths[-1]}, the last boundary; leave the row "
            "out, cut it, or add a boundary"
        )
    place = np.searchsorted(widths, lengths)
    return [
        {name: _taken(name, column, np.flatnonzero(place == i), width) for name, column in records.items()}
        for i, width in enumerate(widths)
        if (place == i).any()
    ]


def widths(boundaries: Sequence[int], *lengths: np.ndarray) -> tuple[int, ...]:  # int [N] each
    """Those of the boundaries that are below the largest of all lengths, and that length.

    These are the boundaries for sets that are as long as they are. Raises InputError where there is no length.
    """
    longest = max((int(each.max()) for each in lengths if each.size), default=0)
    if longest < 1:
        raise InputError("there are no lengths above 0, expected those of one split or more; choose other splits")
    return (*(width for width in boundaries if width < longest), longest)


def _taken(name: str, column: Any, rows: np.ndarray, width: int) -> Any:
    if not isinstance(column, Ragged):
        return column[rows]
    taken = column.take(rows)
    longest = int(taken.lengths.max())
    if longest > width:
        raise InputError(
            f"column {name!r} has a row of length {longest} in the bucket of up to {width}; let `length` name a column "
            "with the longest of all ragged columns"
        )
    return taken.padded(width)


def bucketed(
    records: Mapping[str, Any],
    length: str,
    boundaries: Sequence[int],
    batch_size: int,
    seeds: int | Sequence[int],
    together: int = 1,
) -> Stream:
    """An endless stream of shuffled batches, each of one of the `buckets` and padded to its boundary: [S, B, L, ...].

    Each bucket is read in passes in which every example comes once, as in `shuffled`, and the buckets take turns in
    proportion to their sizes: after any number of passes over the records, each has given the batches of as many
    passes, less a fraction of a turn. Which bucket a step takes is the same for all seeds, and which rows it takes is
    the seed's own.

    A turn is `together` steps. A fit with `scan` above 1 has the steps of a call in one batch, so `scan` has to divide
    `together`. Each width is compiled once, so some four boundaries are usual.

    Raises InputError as `buckets` does, for a batch size or `together` below 1, and for no seed or a negative one.
    """
    parts = buckets(records, length, boundaries)
    check_batch(batch_size)
    if together < 1:
        raise InputError(f"together is {together}, expected 1 or more steps; give the --scan of the fit")
    turn = turns([count(part) for part in parts], batch_size * together)

    def stream(seed: int) -> Stream:
        orders = [order(count(part), seed) for part in parts]

        def read(step: int, rows: slice) -> Columns:
            bucket, before = turn(step // together)
            position = (before * together + step % together) * batch_size
            return gather(parts[bucket], {INDEX: orders[bucket](position, position + batch_size)[rows]})

        widest = lambda rows: gather(parts[-1], {INDEX: orders[-1](0, batch_size)[rows]})
        return Stream(batch_size, read, together=together, widest=widest)

    return stream(seeds) if isinstance(seeds, int | np.integer) else per_seed([stream(seed) for seed in seeds])


def turns(sizes: Sequence[int], rows: int) -> Callable[[int], tuple[int, int]]:
    """The order in which buckets of these sizes take turns of `rows` rows: turn -> (bucket, its turns before).

    In the first e passes over all records, a bucket of n records has floor(e n / rows) turns. Those of one pass are
    shuffled. Any turn can be computed without those before it.
    """
    total = sum(sizes)

    def done(e: int) -> list[int]:
        """The turns of each bucket in the first e passes."""
        return [e * size // rows for size in sizes]

    @functools.lru_cache(maxsize=2)
    def in_pass(e: int) -> np.ndarray:
        each = np.subtract(done(e + 1), done(e))
        generator = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(_TURNS, e)))
        return generator.permutation(np.repeat(np.arange(len(sizes)), each))

    def turn(t: int) -> tuple[int, int]:
        # After e passes there were at most e total / rows turns, and fewer by less than one for each bucket.
        first, last = t * rows // total, (t + len(sizes)) * rows // total + 1
        e = bisect.bisect_right(range(last + 1), t, lo=first, key=lambda e: sum(done(e))) - 1
        now, i = in_pass(e), t - sum(done(e))
        bucket = int(now[i])
        return bucket, done(e)[bucket] + int((now[:i] == bucket).sum())

    return turn
