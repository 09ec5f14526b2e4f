"""`stream`: batches of a set that does not fit into memory, decoded by threads ahead of the step."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dl_jax.data.batches import Columns, check_batch, generator, order
from dl_jax.data.records import Example, Records, stack
from dl_jax.data.source import find

Transform = Callable[[np.random.Generator, Example], Example]
_AHEAD = 2  # batches decoded beyond the one asked for


def stream(
    name: str,
    split: str,
    batch_size: int,
    seed: int,
    *,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    rows: slice = slice(None),
    transform: Transform | None = None,
    threads: int | None = None,
) -> "Prefetched":
    """Shuffled batches for ever, read from the record files: step -> the batch that `batches(load(...), ...)` gives.

    The order is that of `batches`, so that it needs no state to save: start at any step. `transform(rng, example)` runs
    on each example before batching, as for a random crop; `rng` depends on the seed and the example's position in the
    order alone. It must give all examples the same shapes. Each batch is decoded by `threads` (default: one per core),
    and the two after it are begun. Raises InputError as `load` and `batches` do.
    """
    check_batch(batch_size, rows)
    records = Records(find(name, data_dir, cache_dir), split)
    indices = order(len(records), seed)

    def positions(step: int) -> range:
        return range(step * batch_size, (step + 1) * batch_size)[rows]

    def decode(part: range) -> list[Example]:
        examples = records.read(indices(part[0], part[-1] + 1)[:: part.step].tolist())
        if transform is None:
            return examples
        return [transform(generator(seed, i), example) for i, example in zip(part, examples, strict=True)]

    return Prefetched(positions, decode, threads or _cores())


class Prefetched:
    """step -> batch, decoded by threads. Steps asked for in order are found begun; any other step starts afresh."""

    def __init__(
        self, positions: Callable[[int], range], decode: Callable[[range], list[Example]], threads: int
    ) -> None:
        self._positions, self._decode, self._threads = positions, decode, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dl_jax-data")
        self._begun: dict[int, list[Future[list[Example]]]] = {}

    def __call__(self, step: int) -> Columns:
        wanted = range(step, step + 1 + _AHEAD)
        for other in [s for s in self._begun if s not in wanted]:
            for part in self._begun.pop(other):
                part.cancel()
        for s in wanted:
            if s not in self._begun:
                self._begun[s] = [self._pool.submit(self._decode, part) for part in self._parts(s)]
        return stack([example for part in self._begun.pop(step) for example in part.result()])

    def _parts(self, step: int) -> list[range]:
        positions = self._positions(step)
        k = min(self._threads, len(positions))
        return [positions[i * len(positions) // k : (i + 1) * len(positions) // k] for i in range(k)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
