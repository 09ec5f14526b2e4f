"""Shuffled batches of columns in memory, in an order that is a pure function of (seed, step)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.stream import INDEX, Stream, check_batch, count, gather, stacked

_ORDER, _TRANSFORM = 0, 1  # spawn keys, so that the two uses of a seed are independent


def order(n: int, seed: int) -> Callable[[int, int], np.ndarray]:
    """The endless sequence of example indices, as a function (start, stop) -> int64 [stop - start].

    Epoch e covers the positions [e n, (e + 1) n) and is a permutation of 0 to n - 1 that is drawn from (seed, e). Any
    position can be computed without those before it; the last two permutations are cached. Raises InputError for a
    negative seed.
    """
    check_seed(seed)

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))).permutation(n)

    def indices(start: int, stop: int) -> np.ndarray:
        epochs = range(start // n, -(-stop // n))
        return np.concatenate([permutation(e)[max(start - e * n, 0) : stop - e * n] for e in epochs])

    return indices


def check_seed(seed: int) -> None:
    """Raises InputError for a negative seed."""
    if seed < 0:
        raise InputError(f"seed {seed}: expected 0 or more; use a non-negative --seed")


def generator(seed: int, position: int) -> np.random.Generator:
    """The random generator for the example at `position` of the order, whatever the number of processes."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_TRANSFORM, position)))


def rows(records: Mapping[str, Any], kept: np.ndarray | slice) -> dict[str, np.ndarray]:
    """The rows `kept` of all columns [N, ...]: indices, bools [N] or a slice. Ragged columns are padded."""
    return gather(records, {INDEX: kept})


def few(labels: np.ndarray, each: int, classes: int, seed: int) -> np.ndarray:  # int [N] -> int [classes · each]
    """Rows of `each` random examples of each class, drawn from the seed. Raises InputError where a class has fewer."""
    least = np.bincount(labels, minlength=classes).min()
    if least < each:
        raise InputError(f"{each} labels of each class, expected at most {least}, which the split has; lower --labels")
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.choice(np.flatnonzero(labels == c), each, replace=False) for c in range(classes)])


def shuffled(records: Mapping[str, np.ndarray], batch_size: int, seeds: int | Sequence[int]) -> Stream:
    """An endless stream of shuffled batches of `records` [N, ...]: [B, ...] for one seed, [S, B, ...] for S seeds.

    Step s covers the positions [s B, (s + 1) B) of each seed's `order`, also across the end of an epoch, so that no
    example is dropped and a batch may be larger than the set. Raises InputError for no records, no seed, columns of
    different lengths, a batch size below 1 or a negative seed.
    """
    n = count(records)
    check_batch(batch_size)
    if isinstance(seeds, int | np.integer):
        indices = order(n, seeds)
        read = lambda step, rows: {INDEX: indices(step * batch_size, (step + 1) * batch_size)[rows]}
        return Stream(batch_size, read, records=records)
    return per_seed([shuffled(records, batch_size, seed) for seed in seeds])


def per_seed(streams: Sequence[Stream]) -> Stream:
    """One stream of batches [S, B, ...] from S streams of batches [B, ...], one for each seed.

    The streams may differ in their order and in their data set. Raises InputError for no stream, and for streams of
    different batch sizes.
    """
    sizes = {stream.batch_size for stream in streams}
    if len(sizes) != 1:
        raise InputError(f"streams of batch sizes {sorted(sizes)}, expected one size; give one stream for each seed")
    first, alike = streams[0], {stream.together for stream in streams}
    if len(alike) != 1:
        raise InputError(f"streams that keep {alike} steps together, expected one number; bucket them alike")
    records = first.records if all(stream.records is first.records for stream in streams) else None
    of = (lambda stream: stream.read) if records is not None else (lambda stream: stream)
    read = lambda step, rows: stacked([of(stream)(step, rows) for stream in streams])
    widest = [stream.widest for stream in streams if stream.widest]
    return Stream(
        first.batch_size,
        read,
        first.axis + 1,
        records,
        first.together,
        (lambda rows: stacked([batch(rows) for batch in widest])) if widest else None,
    )
