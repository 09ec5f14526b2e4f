"""Files of compressed networks against those of the original one, over seeds: size, time of a call, errors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dl_jax import classify
from dl_jax.compress import measure
from dl_jax.compress.measure import Counts, Latency, Size

Name = tuple[str, str]  # the network in a file, and the file format
Images = Mapping[str, np.ndarray]  # image, uint8 [N, H, W, C], and label, int [N]


class File(NamedTuple):
    """A file that was written, and the function images float32 [B, H, W, C] in [0, 1] -> logits [B, classes] in it."""

    path: Path
    predict: Callable[..., Any]
    counts: Counts  # of the network before export
    runs: bool = True  # whether the file can be run as it is


class Cost(NamedTuple):
    """The measurements of one file."""

    counts: Counts
    size: Size
    validation_error: float  # per cent
    error: float  # test error in per cent
    latency: Mapping[int, Latency]  # by batch size; empty for a file that cannot be run directly


def costs(
    files: Mapping[Name, File], validation: Images, test: Images, batches: Sequence[int], rounds: int
) -> dict[Name, Cost]:
    """Measures files; `rounds` calls of all that run are timed, in alternating order, for each of the batch sizes."""
    runs = {name: file.predict for name, file in files.items() if file.runs}
    images = classify.to_unit(test["image"][: max(batches)])
    shape = images.shape[1:]
    latency = {
        batch: measure.latency(runs, np.resize(images[:batch], (batch, *shape)), rounds=rounds) for batch in batches
    }

    def error(file: File, records: Images) -> float:
        found = classify.outputs(file.predict, np.asarray(classify.to_unit(records["image"])))
        return 100 * float((found.argmax(1) != records["label"]).mean())

    return {
        name: Cost(
            file.counts,
            measure.size(file.path),
            error(file, validation),
            error(file, test),
            {batch: times[name] for batch, times in latency.items() if name in times},
        )
        for name, file in files.items()
    }


class Comparison(NamedTuple):
    """The costs of files, the same ones for each seed."""

    original: str  # the network that the others are compared with
    costs: Sequence[Mapping[Name, Cost]]  # by seed


def reference(of: Comparison, name: Name) -> Name:
    """The file that another one is compared with: the original's of its format, or else the last of the original's."""
    same = of.original, name[1]
    return same if same in of.costs[0] else [each for each in of.costs[0] if each[0] == of.original][-1]


def errors(of: Comparison, name: Name) -> np.ndarray:  # [S]
    """The test errors of a file in per cent."""
    return np.array([costs[name].error for costs in of.costs])


def points_lost(of: Comparison, name: Name) -> np.ndarray:  # [S]
    """By how many points the test error of a file is higher than the original's."""
    return errors(of, name) - errors(of, reference(of, name))


def times_smaller(of: Comparison, name: Name) -> np.ndarray:  # [S]
    """How many times fewer bytes a file has than the original's."""
    before = reference(of, name)
    return np.array([costs[before].size.raw / costs[name].size.raw for costs in of.costs])


def times_faster(of: Comparison, name: Name, batch: int) -> np.ndarray:  # [S]
    """How many times faster a call on `batch` rows is than that of the original's file, by p50."""
    before = reference(of, name)
    pairs = ((costs[before].latency[batch].p50, costs[name].latency[batch].p50) for costs in of.costs)
    return np.array([slow / fast for slow, fast in pairs])


def speeds(of: Comparison, format: str, batch: int) -> str:
    """Each file of a format beside the original's, such as "small 2.3 times faster", by the median over the seeds."""

    def words(name: Name) -> str:
        ratio = np.median(times_faster(of, name, batch))
        if 0.95 < ratio < 1.05:
            return "as fast"
        return f"{ratio:.1f} times faster" if ratio > 1 else f"{1 / ratio:.1f} times SLOWER"

    return ", ".join(f"{name[0]} {words(name)}" for name in of.costs[0] if name[1] == format and name[0] != of.original)


def recommended(of: Comparison, max_loss: float) -> Name | None:
    """The fastest file, at the smallest batch size, of those that are smaller and faster than the original's.

    It has to be faster at each batch size, by the median over the seeds, and to lose at most `max_loss` points on
    validation data, in their mean. None if there is no such file.
    """

    def good(name: Name) -> bool:
        before = reference(of, name)
        lost = np.mean([costs[name].validation_error - costs[before].validation_error for costs in of.costs])
        gains = [times_smaller(of, name), *(times_faster(of, name, batch) for batch in of.costs[0][name].latency)]
        return bool(lost <= max_loss and min(map(np.median, gains)) > 1)

    def seconds(name: Name) -> float:
        return float(np.median([costs[name].latency[min(costs[name].latency)].p50 for costs in of.costs]))

    timed = [name for name, cost in of.costs[0].items() if name[0] != of.original and cost.latency]
    return min(filter(good, timed), key=seconds, default=None)
