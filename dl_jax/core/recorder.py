"""What a fit and a run tell each other: the interface, and the means of a step's metrics between two reports."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError, nearest
from dl_jax.core.step import Array, Tree

Measurements = dict[str, np.ndarray]
Best = tuple[str, Literal["min", "max"]]  # a measurement, and whether lower or higher is better

MAX_NONFINITE_IN_A_ROW = 10  # calls of the compiled program with a NaN or infinite metric; more end the run
RESERVED = ("step", "time", "steps_per_second", "data_wait", "skipped")  # what reports add to the metrics


class Watch(NamedTuple):
    """Measures the variables every `every` steps and at the end.

    A measurement `error` is reported as `watch/error`, apart from a metric `error` of the train step. `best`, such as
    ("error", "min"), keeps the checkpoint where that measurement was lowest (or "max", highest) beside the newest one.
    It has to be a single number: with several seeds, a mean that `measure` adds.
    """

    every: int
    measure: Callable[[Tree], Measurements]
    best: Best | None = None


class StopRule(NamedTuple):
    """Early stopping: two pure functions on the host, `init()` and `update(rule_state, measurements, step)`.

    `measurements` are those of `Watch`. The rule's state has a field `stopped`, bool [] or [S], and is saved with the
    training state.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Measurements, int], Any]


class Snapshot(NamedTuple):
    """What a checkpoint of a fit holds."""

    state: Tree  # a State
    stop: Tree  # the state of the StopRule; {} without one
    window: Mapping[str, Any]  # the metrics since the last report, as `Window.content` gives them


class Recorder:
    """The interface between `fit` and whatever records a run. This base class records nothing."""

    name: str = ""  # of the fit, among several of a run
    skip_nonfinite: bool = False  # undo a step with a metric that is not finite, instead of ending the run
    fsdp: bool = False  # split large arrays of the state over the devices too, which share the rows of a batch

    def start(self, snapshot: Snapshot, steps: int, best: Best | None) -> Snapshot:
        """Returns what to begin with: `snapshot`, or the restored checkpoint of an earlier attempt at the same fit."""
        return snapshot

    def stepped(self, step: int) -> bool:
        """Is called after each call of the program, and returns whether to save now."""
        return False

    def report(self, step: int, metrics: Measurements) -> None:
        """Records the means of the metrics since the last report, or the measurements of `Watch`."""

    def save(self, step: int, snapshot: Snapshot, measured: Measurements) -> None:
        """Saves `snapshot` as the checkpoint of `step`; `measured` are the measurements of `Watch` at it, or {}."""

    def finish(self, step: int, snapshot: Snapshot) -> None:
        """Is called once, when the fit is complete."""

    def last_saved(self) -> str:
        """A phrase for error messages that says where the newest checkpoint is."""
        return "nothing was saved"


class NonFiniteError(ArithmeticError):
    """A metric of the train step, a parameter or a collection became NaN or infinite."""


def require_mode(best: Best | None) -> None:
    """Raises InputError unless `best` is None or (name, "min" or "max")."""
    if best is not None and not (isinstance(best, tuple | list) and len(best) == 2 and best[1] in ("min", "max")):
        raise InputError(f"best is {best!r}, expected a pair of a measurement's name and 'min' or 'max'")


def require_best(best: Best | None, measured: Measurements) -> None:
    if best is None:
        return
    name, _ = best
    if name not in measured:
        known = ", ".join(sorted(measured))
        raise InputError(f"best is {name!r}, expected a measurement of watch: {known}{nearest(name, measured)}")
    if np.size(measured[name]) != 1:
        raise InputError(
            f"best is {name!r}, which has {np.size(measured[name])} values, one for each seed; expected a single "
            "number, so let watch measure their mean too"
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names", "pairs"])
@dataclasses.dataclass(frozen=True)
class Row:
    """The metrics of one call in a single array, so that the host fetches one array only."""

    names: tuple[str, ...]  # M
    pairs: tuple[int, ...]  # P, indices of the metrics that are (sum, weight)
    values: Array  # float32 [M + P] or [M + P, S]: the means and sums, then the weights of the pairs


def row_of(metrics: Any) -> Row:
    names = tuple(sorted(metrics))
    for name in names:
        if name in RESERVED or name.startswith("watch/"):
            raise InputError(f"the step has a metric {name!r}, a name that reports use themselves; choose another")
    found = [metrics[name] for name in names]
    pairs = tuple(i for i, metric in enumerate(found) if isinstance(metric, tuple))
    values = [metric[0] if isinstance(metric, tuple) else metric for metric in found] + [found[i][1] for i in pairs]
    return Row(names, pairs, jnp.stack([v.astype(jnp.float32) for v in values]) if values else jnp.zeros(0))


class Window:
    """The metrics since the last report. Their means are taken in float64 and leave out steps that are not finite.

    `content` is what it holds, for JSON, so that a run that resumes reports the same means as one that went on; the
    times since the last report are not part of it.
    """

    def __init__(self, content: Mapping[str, Any] = {}) -> None:
        self.reset()
        self.lost_in_a_row: Any = np.asarray(content.get("lost_in_a_row", 0))  # calls, [] or [S]
        if "steps" in content:
            self.names, self.pairs, self.steps = tuple(content["names"]), tuple(content["pairs"]), content["steps"]
            self.totals, self.whole = (np.asarray(content[name], np.float64) for name in ("totals", "whole"))

    def reset(self) -> None:
        self.names: tuple[str, ...] = ()
        self.pairs: tuple[int, ...] = ()
        self.steps, self.steps_here = 0, 0  # in this window, and those of them that this process has made
        self.totals: np.ndarray = np.zeros(())  # [M + P] or [M + P, S], over the steps that are finite
        self.whole: np.ndarray = np.zeros(())  # steps that are finite, [] or [S]
        self.began, self.waited, self.elsewhere = time.perf_counter(), 0.0, 0.0  # seconds

    def content(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in ("totals", "whole", "lost_in_a_row")}
        return {"names": list(self.names), "pairs": list(self.pairs), "steps": self.steps, **arrays}

    def add(self, step: int, stride: int, row: Row, stopped: np.ndarray, run: Recorder) -> None:
        """Waits for the metrics of a call of `stride` steps that ends at `step`, and adds them.

        Raises NonFiniteError where they end the run.
        """
        values: np.ndarray = np.asarray(row.values, np.float64)
        if (self.names, self.pairs) != (row.names, row.pairs):  # the first call, or of a step that was renamed since
            self.steps, self.totals, self.whole = 0, np.zeros(()), np.zeros(())
        self.names, self.pairs = row.names, row.pairs
        whole = np.isfinite(values).all(0)
        times = np.full(len(values), float(stride))  # a mean stands for the steps of the call, a sum has them in it
        times[[*row.pairs, *range(len(row.names), len(values))]] = 1
        times = times.reshape(-1, *(1,) * (values.ndim - 1))
        self.totals, self.whole = self.totals + np.where(whole, times * values, 0), self.whole + stride * whole
        self.steps, self.steps_here = self.steps + stride, self.steps_here + stride
        lost = ~(np.isfinite(values) | stopped)
        self.lost_in_a_row = np.where(lost.any(0), self.lost_in_a_row + 1, 0)
        too_many = self.lost_in_a_row.max() >= MAX_NONFINITE_IN_A_ROW
        if lost.any() and (too_many or not run.skip_nonfinite):
            names = [*row.names, *(f"the weight of {row.names[i]}" for i in row.pairs)]
            bad = ", ".join(f"{n} is {v}" for n, v, b in zip(names, values.tolist(), lost, strict=True) if b.any())
            before = f" and {MAX_NONFINITE_IN_A_ROW - 1} times in a row before" if too_many else ""
            raise NonFiniteError(
                f"{bad} at step {step}{before}, expected finite numbers; {run.last_saved()}; lower the learning rate"
                f"{'' if too_many else ' or use --on-nan skip'}"
            )

    def means(self, skip: bool) -> Measurements:
        """{name: mean}, NaN where no step was finite. A pair is left out where its weights sum to 0 in every seed."""
        m = len(self.names)
        weights = np.array(np.broadcast_to(self.whole, self.totals[:m].shape), np.float64)
        weights[list(self.pairs)] = self.totals[m:]
        means = np.divide(self.totals[:m], weights, out=np.full(weights.shape, np.nan), where=weights != 0)
        empty = {self.names[i] for i in self.pairs if not weights[i].any()}
        seconds = time.perf_counter() - self.began - self.elsewhere
        rates = {"steps_per_second": self.steps_here / seconds, "data_wait": self.waited / seconds}
        skipped = {"skipped": (self.steps - self.whole).astype(int)} if skip else {}
        named = {name: mean for name, mean in zip(self.names, means, strict=True) if name not in empty}
        return {**named, **{k: np.asarray(v) for k, v in (rates | skipped).items()}}
