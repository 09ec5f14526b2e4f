"""Streams shuffled batches of a set that does not fit into memory, decoded by threads ahead of the step."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from dl_jax.core import cores
from dl_jax.core.inputs import note
from dl_jax.core.ragged import ragged
from dl_jax.core.stream import Columns, Stream, check_batch
from dl_jax.data import cached
from dl_jax.data.batches import generator, order, per_seed
from dl_jax.data.columns import CHUNK, shown
from dl_jax.data.records import Example, Records, stack
from dl_jax.data.source import cache_entry, find

Transform = Callable[[np.random.Generator, Example], Example]
_AHEAD = 2  # number of batches that are decoded ahead of the requested one


def streamed(
    name: str,
    split: str,
    batch_size: int,
    seeds: int | Sequence[int],
    *,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    only: Sequence[str] | None = None,
    transform: Transform | None = None,
    threads: int | None = None,
) -> Stream:
    """An endless stream of shuffled batches, read from the record files, equal to that of `shuffled(load(...), ...)`.

    A run can resume at any step, as the order has no state. Columns that differ in length are padded to the longest of
    the split, which is looked for once by reading them all, and kept in the cache folder. `only` names the columns to
    decode, by default all. `transform(rng, example)` is applied to each example before batching, for example a random
    crop, and must give all examples the same shapes; `rng` depends only on the seed and the example's position in the
    order. `threads` threads (default: one per core) decode a batch and the next two. The set's version and a digest of
    its description and of its files' sizes are noted (see `inputs.note`).

    Raises InputError as `load` and `shuffled` do.
    """
    check_batch(batch_size)
    if not isinstance(seeds, int | np.integer):
        options: Any = {"only": only, "transform": transform, "threads": threads}
        one = lambda seed: streamed(name, split, batch_size, seed, data_dir=data_dir, cache_dir=cache_dir, **options)
        return per_seed([one(seed) for seed in seeds])
    seed, records = seeds, Records(find(name, data_dir, cache_dir), split, only)
    widths = {} if transform else longest(records, cache_dir)
    note(f"{records.name} {records.split} as records", records.fingerprint)
    indices = order(len(records), seed)

    def decode(part: range) -> list[Example]:
        examples = records.read(indices(part[0], part[-1] + 1)[:: part.step].tolist())
        if transform is None:
            return examples
        return [transform(generator(seed, i), example) for i, example in zip(part, examples, strict=True)]

    return Stream(batch_size, Prefetched(batch_size, decode, widths, threads or cores.usable()))


class Prefetched:
    """A function (step, rows) -> batch that decodes with threads, and decodes the next steps ahead.

    If steps are requested in order, their decoding has already begun. Any other step starts anew.
    """

    def __init__(
        self, batch_size: int, decode: Callable[[range], list[Example]], widths: Mapping[str, int], threads: int
    ) -> None:
        """Columns of `widths` are padded to these, and followed by their lengths."""
        self._batch_size, self._decode, self._widths, self._threads = batch_size, decode, widths, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dl_jax-data")
        self._begun: dict[range, list[Future[list[Example]]]] = {}  # batches by their positions in the order

    def __call__(self, step: int, rows: slice) -> Columns:
        asked, *ahead = (self._positions(s, rows) for s in range(step, step + 1 + _AHEAD))
        for other in [positions for positions in self._begun if positions not in (asked, *ahead)]:
            for part in self._begun.pop(other):
                part.cancel()
        for positions in (asked, *ahead):
            if positions not in self._begun:
                self._begun[positions] = [self._pool.submit(self._decode, part) for part in self._parts(positions)]
        return padded([example for part in self._begun.pop(asked) for example in part.result()], self._widths)

    def _positions(self, step: int, rows: slice) -> range:
        return range(step * self._batch_size, (step + 1) * self._batch_size)[rows]

    def _parts(self, positions: range) -> list[range]:
        k = min(self._threads, len(positions))
        return [positions[i * len(positions) // k : (i + 1) * len(positions) // k] for i in range(k)]


def padded(examples: list[Example], widths: Mapping[str, int]) -> Columns:
    """Columns [B, ...] of examples; those of `widths` are padded to it, and followed by columns of their lengths."""
    rows = {name: ragged([example[name] for example in examples]).padded(width) for name, width in widths.items()}
    rest = stack([{name: value for name, value in example.items() if name not in rows} for example in examples])
    whole = {**rest, **{name: np.asarray(column) for name, column in rows.items()}}
    return {name: whole[name] for name in examples[0]} | {f"{name}/length": rows[name].lengths for name in rows}


def longest(records: Records, cache_dir: str | None = None) -> Mapping[str, int]:
    """The length of the longest example in each column of `records` whose examples differ in length, but 1 at least."""
    found, names = records.found, [name for name, feature in records.features.items() if feature.ragged]
    if not names:
        return {}
    key = hashlib.sha256(f"{records.split} {names}".encode()).hexdigest()[:16]
    file = cache_entry(found, cache_dir) / f"longest-{key}.json"

    def make() -> None:
        most = dict.fromkeys(names, 1)
        ragged_ones = Records(found, records.split, names)
        for start in shown(range(0, len(records), CHUNK), len(records), f"measuring {found.name} {records.split}"):
            for example in ragged_ones.read(range(start, min(start + CHUNK, len(records)))):
                most = {name: max(most[name], len(example[name])) for name in names}
        cached.write_sealed(file, most)

    return cached.get(file, lambda: cached.read_sealed(file), make)
