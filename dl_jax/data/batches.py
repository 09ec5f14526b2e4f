"""Columns in memory to shuffled batches. The order is a pure function of (seed, step)."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.stream import INDEX, Stream, check_batch, count, stacked

_ORDER, _TRANSFORM = 0, 1  # keep the two uses of one seed apart


def order(n: int, seed: int) -> Callable[[int, int], np.ndarray]:
    """The endless sequence of example indices as a function (start, stop) -> int64 [stop - start].

    Epoch e covers the positions [e n, (e + 1) n) and is a permutation of 0 .. n - 1 drawn from (seed, e). Any position
    is reached at once: the last two permutations asked for are kept, none before is needed. Raises InputError for a
    negative seed.
    """
    if seed < 0:
        raise InputError(f"seed {seed}: expected 0 or more; use a non-negative --seed")

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


def shuffled(records: Mapping[str, np.ndarray], batch_size: int, seeds: int | Sequence[int]) -> Stream:
    """Shuffled batches of `records` [N, ...] without end: [B, ...] for one seed, [S, B, ...] for S of them.

    Step s covers the positions [s B, (s + 1) B) of each seed's own `order`, across epoch borders, so that no example is
    dropped and a batch may be larger than the set. Raises InputError for no records, no seed, columns of different
    lengths, a batch size below 1 or a negative seed.
    """
    n = count(records)
    check_batch(batch_size)
    if isinstance(seeds, int):
        indices = order(n, seeds)
        read = lambda step, rows: {INDEX: indices(step * batch_size, (step + 1) * batch_size)[rows]}
        return Stream(batch_size, read, records=records)
    return per_seed([shuffled(records, batch_size, seed) for seed in seeds])


def per_seed(streams: Sequence[Stream]) -> Stream:
    """One stream of batches [S, B, ...] from S streams of [B, ...]: each seed keeps its own order, or its own set.

    Raises InputError for no stream, and for batch sizes that differ.
    """
    sizes = {stream.batch_size for stream in streams}
    if len(sizes) != 1:
        raise InputError(f"streams of batch sizes {sorted(sizes)}, expected one size; give one stream for each seed")
    first = streams[0]
    if first.records is not None and all(stream.records is first.records for stream in streams):
        read = lambda step, rows: stacked([stream.read(step, rows) for stream in streams])
        return Stream(first.batch_size, read, first.axis + 1, first.records)
    return Stream(first.batch_size, lambda step, rows: stacked([s(step, rows) for s in streams]), first.axis + 1)
