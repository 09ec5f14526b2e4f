"""Batches by Poisson sampling, in which every record is or is not, whatever the others are."""

from collections.abc import Mapping, Sequence

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.stream import INDEX, Stream, check_batch, count
from dl_jax.data.batches import check_seed, per_seed

_SAMPLE = 2  # a spawn key, beside those of `batches`
_RARE = 1e-12  # the probability below which a batch overflows, if no capacity is given


def poisson(
    records: Mapping[str, np.ndarray], batch_size: int, seeds: int | Sequence[int], capacity: int | None = None
) -> Stream:
    """An endless stream of Poisson samples of `records` [N, ...]: each record with probability q = batch_size / N.

    A batch has `capacity` rows and a column `mask` float32 that is 0 for those that are padding, which repeat the first
    record: `batch_size` is what the mask adds up to on average. By default the capacity is `capacity_for`. The
    sample of a step is drawn from (seed, step), [capacity, ...] for one seed and [S, capacity, ...] for S seeds.

    Raises InputError for what `shuffled` refuses, for a sampling rate above 1, a capacity below the batch size, records
    that have a column `mask`, and, when read, for a sample that exceeds the capacity: a shortened one would not be what
    an accountant counts on. `overflow` says how likely that is.
    """
    n = count(records)
    check_batch(batch_size)
    if batch_size > n:
        raise InputError(
            f"{batch_size} of {n} records on average are a sampling rate of {batch_size / n:.3g}, expected at most 1; "
            "lower the batch size"
        )
    if "mask" in records:
        raise InputError("the records have a column 'mask', expected none: `poisson` adds it; rename the column")
    rows = capacity_for(n, batch_size) if capacity is None else capacity
    if rows < batch_size:
        raise InputError(
            f"capacity is {rows}, expected {batch_size} or more, the records of a batch on average; raise it"
        )
    if not isinstance(seeds, int | np.integer):
        return per_seed([poisson(records, batch_size, seed, rows) for seed in seeds])
    check_seed(seeds)

    def read(step: int, part: slice) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(np.random.SeedSequence(seeds, spawn_key=(_SAMPLE, step)))
        drawn = rng.binomial(n, batch_size / n)
        if drawn > rows:
            raise InputError(
                f"step {step} of seed {seeds} draws {drawn} records, expected at most {rows}, the rows of a batch: "
                "without the others the sample would be no Poisson sample; raise the capacity"
            )
        index = np.zeros(rows, np.int64)
        index[:drawn] = rng.choice(n, drawn, replace=False)
        return {INDEX: index[part], "mask": (np.arange(rows) < drawn).astype(np.float32)[part]}

    return Stream(rows, read, records=records)


def capacity_for(n: int, batch_size: int) -> int:
    """The rows, a multiple of 16 if it is below n, that a sample of n records exceeds with a probability of 1e-12."""
    rows = -(-batch_size // 16) * 16
    while rows < n and overflow(n, batch_size, rows) > _RARE:
        rows += 16
    return min(rows, n)


def overflow(n: int, batch_size: int, capacity: int) -> float:
    """A bound on the probability that a Poisson sample has more than `capacity` rows: exp(−n KL(m / n ‖ q)).

    m is capacity + 1, and q = batch_size / n (Chernoff 1952). It is 0 where the capacity is n or more, and 1 where it
    is less than the batch size.
    """
    q, p = batch_size / n, (capacity + 1) / n
    if capacity >= n:
        return 0.0
    if p <= q:
        return 1.0
    rest = (1 - p) * np.log((1 - p) / (1 - q)) if p < 1 else 0.0
    return float(np.exp(-n * (p * np.log(p / q) + rest)))
