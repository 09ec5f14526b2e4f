"""The loop that drives a step, what it tells a run, and evaluation. It knows no model, data set or method."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.step import ArgumentError, Array, Batch, State, Step, Tree

Batches = Callable[[int], Batch]  # step -> batch
Measurements = dict[str, np.ndarray]
Best = tuple[str, Literal["min", "max"]]  # a measurement, and which end of it is good

HOPELESS = 10  # steps in a row that are not finite; more are not skipped
IN_FLIGHT = 2  # unbounded dispatch has hung simulated devices, and hides a NaN for as long


class Watch(NamedTuple):
    """Measures the variables every `every` steps and at the end.

    With `best`, ("error", "min") say, the checkpoint where that was best is kept beside the newest.
    """

    every: int
    measure: Callable[[Tree], Measurements]
    best: Best | None = None


class StopRule(NamedTuple):
    """Early stopping as two pure functions on the host; the rule's state is saved with the training state.

    `update(rule_state, measurements, step)` sees what `Watch` measured. The state has a field `stopped`: bool, [] or
    [S].
    """

    init: Callable[[], Any]
    update: Callable[[Any, Measurements, int], Any]


class Recorder:
    """What `fit` tells a run, and asks of it. This one records nothing."""

    skip_nonfinite: bool = False  # leave out a step whose metrics are not finite, instead of stopping

    def start(self, tree: Tree, steps: int, best: Best | None) -> Tree:
        """Returns what to begin from: `tree`, or what an earlier attempt at the same fit had reached."""
        return tree

    def stepped(self, step: int) -> bool:
        """Called after each step; whether to save now."""
        return False

    def report(self, step: int, metrics: Measurements) -> None: ...

    def save(self, step: int, tree: Tree, measured: Measurements) -> None: ...

    def finish(self, step: int, tree: Tree) -> None:
        """The fit is complete at `step`."""

    def last_saved(self) -> str:
        """Where the newest checkpoint is, in words."""
        return "nothing was saved"


class NonFiniteError(ArithmeticError):
    """A metric of the train step, or what it trained, became NaN or infinite."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names"])
@dataclasses.dataclass(frozen=True)
class _Row:
    """One step's metrics in a single array, so that the host fetches once."""

    names: tuple[str, ...]
    values: Array  # float32 [M] or [M, S]


def _where(lanes: Array, new: Tree, old: Tree) -> Tree:
    """Per lane, `new` or `old`; `lanes` is bool [] or [S], leaves are [...] or [S, ...]."""

    def choose(n: Array, o: Array) -> Array:
        return jnp.where(lanes.reshape(lanes.shape + (1,) * (n.ndim - lanes.ndim)), n, o)

    return jax.tree.map(choose, new, old)


@functools.partial(jax.jit, static_argnames=("skip", "freeze"), donate_argnames=("state",))
def _advance(step: Any, state: State, batch: Batch, stopped: Array, skip: bool, freeze: bool) -> tuple[State, _Row]:
    new, metrics = step(state, batch)
    names = tuple(sorted(metrics))
    values = jnp.stack([metrics[name].astype(jnp.float32) for name in names])
    if skip:
        new = _where(jnp.isfinite(values).all(0), new, state._replace(step=new.step))
    if freeze:
        new = _where(~stopped, new, state)
    return new, _Row(names, values)


class _Window:
    """The metrics since the last report; their means are taken in float64 over the finite steps."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.lost_in_a_row: Any = 0  # steps, [] or [S]
        self.reset()

    def reset(self) -> None:
        self.rows: list[np.ndarray] = []  # each [M] or [M, S]
        self.began, self.waited, self.elsewhere = time.perf_counter(), 0.0, 0.0  # seconds

    def add(self, step: int, row: _Row, stopped: np.ndarray, run: Recorder) -> None:
        """Waits for the step. Raises NonFiniteError."""
        values: np.ndarray = np.asarray(row.values, np.float64)
        self.names = row.names
        self.rows.append(values)
        lost = ~(np.isfinite(values) | stopped)
        self.lost_in_a_row = np.where(lost.any(0), self.lost_in_a_row + 1, 0)
        hopeless = self.lost_in_a_row.max() >= HOPELESS
        if lost.any() and (hopeless or not run.skip_nonfinite):
            bad = ", ".join(f"{n} is {v}" for n, v, b in zip(row.names, values.tolist(), lost, strict=True) if b.any())
            before = f" and in the {HOPELESS - 1} steps before" if hopeless else ""
            raise NonFiniteError(
                f"{bad} at step {step}{before}, expected finite numbers; {run.last_saved()}; lower the learning rate"
                f"{'' if hopeless else ' or use --on-nan skip'}"
            )

    def means(self, stride: int, skip: bool) -> Measurements:
        """NaN where no step was finite."""
        rows = np.stack(self.rows)  # [n, M] or [n, M, S]
        whole = np.asarray(np.isfinite(rows).all(1, keepdims=True))  # [n, 1] or [n, 1, S]
        count = whole.sum(0)
        means = np.where(count > 0, np.where(whole, rows, 0).sum(0) / np.maximum(count, 1), np.nan)  # [M] or [M, S]
        seconds = time.perf_counter() - self.began - self.elsewhere
        rates = {"steps_per_second": stride * len(rows) / seconds, "data_wait": self.waited / seconds}
        skipped = {"skipped": (~whole[:, 0]).sum(0)} if skip else {}
        return {**dict(zip(self.names, means, strict=True)), **{k: np.asarray(v) for k, v in (rates | skipped).items()}}


def fit(
    step: Step,
    state: State,
    batches: Batches,
    *,
    steps: int,
    run: Recorder | None = None,
    every: int = 100,
    watch: Watch | None = None,
    stop: StopRule | None = None,
) -> State:
    """Drives `step` until `state.step` is `steps`, or `stop` has stopped every lane. The only loop in the codebase.

    `batches(i)` is the batch of step i. Metrics are reported as means over `every` steps. The caller's `state` stays
    usable. How far one call advances (1, or k for `scanned(step, k)`) is read off `state.step` after the first call.

    Raises ArgumentError where `steps` is negative, `steps`, `every` or `watch.every` is not a multiple of that, a stop
    rule has nothing to watch, or the run to go on with has other keys than `state`; NonFiniteError where a metric, or
    what was trained and is about to be saved or returned, is not finite.
    """
    _require_intervals(steps, every, watch, stop)
    run = run or Recorder()
    step = jax.tree_util.Partial(step)
    saved = run.start({"state": state, "stop": stop.init() if stop else {}}, steps, watch.best if watch else None)
    if saved["state"] is not state and not _same_keys(saved["state"], state):  # another run's data must not join
        raise ArgumentError(
            "the run to go on with has other random keys; give the --seed and --seeds it was begun with, or another "
            "--workdir"
        )
    state, rule = _copied(saved["state"]), saved["stop"]  # our copy, so that donation eats no caller's
    i, stride, window = _count(state), 0, _Window()
    pending: collections.deque[tuple[int, _Row, np.ndarray]] = collections.deque()

    def stopped() -> np.ndarray:
        return np.asarray(rule.stopped if stop else False)

    def settle(most: int) -> None:
        while len(pending) > most:
            window.add(*pending.popleft(), run)

    while i < steps and not stopped().all():
        asked = time.perf_counter()
        batch = batches(i)
        window.waited += time.perf_counter() - asked
        settle(IN_FLIGHT - 1)
        state, row = _advance(step, state, batch, stopped(), run.skip_nonfinite, stop is not None)
        stride = stride or _checked_stride(_count(state) - i, i, steps, every, watch)
        i += stride
        pending.append((i, row, stopped()))
        measured = {}
        if i % every == 0 or i == steps:
            settle(0)
            run.report(i, window.means(stride, run.skip_nonfinite))
            window.reset()
        if watch and (i % watch.every == 0 or i == steps):
            settle(0)
            began = time.perf_counter()
            measured = watch.measure(state.variables)
            window.elsewhere += time.perf_counter() - began
            run.report(i, measured)
            rule = stop.update(rule, measured, i) if stop else rule
        due = run.stepped(i)
        if due or (watch and watch.best and measured):
            settle(0)
            _require_finite(state, i, run)
            run.save(i, {"state": state, "stop": rule}, measured)
    settle(0)
    _require_finite(state, i, run)
    run.finish(i, {"state": state, "stop": rule})
    return state


@jax.jit
def _copied(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _same_keys(state: State, other: State) -> Array:  # -> bool []
    return jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(other.key))


def _count(state: State) -> int:
    """The furthest lane's step."""
    return int(np.max(np.asarray(state.step)))


def _require_intervals(steps: int, every: int, watch: Watch | None, stop: StopRule | None) -> None:
    if steps < 0:
        raise ArgumentError(f"steps is {steps}, expected 0 or more")
    for name, value in {"every": every, "watch.every": watch.every if watch else 1}.items():
        if value < 1:
            raise ArgumentError(f"{name} is {value}, expected a number of steps, 1 or more")
    if stop and not watch:
        raise ArgumentError("a stop rule without a watch would never be asked; give fit both")


def _checked_stride(stride: int, i: int, steps: int, every: int, watch: Watch | None) -> int:
    if stride < 1:
        raise ArgumentError(f"the step advanced state.step by {stride}, expected 1 or more: add to state.step in it")
    wanted = {"steps": steps - i, "every": every, "watch.every": watch.every if watch else stride}
    for name, value in wanted.items():
        if value % stride:
            raise ArgumentError(f"{name} leaves {value} steps, expected a multiple of the {stride} steps of one call")
    return stride


def _require_finite(state: State, step: int, run: Recorder) -> None:
    if not _all_finite((state.params, state.extra)):
        raise NonFiniteError(
            f"a parameter or statistic is NaN or infinite at step {step}, expected finite numbers; "
            f"{run.last_saved()}; lower the learning rate"
        )


@jax.jit
def _all_finite(tree: Tree) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in floats]))
