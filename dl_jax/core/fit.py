"""The training loop, and the interface by which it reports to a run. It does not depend on a model or data set."""

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dl_jax.core.devices import data_mesh, numeric, place, process_rows, replicated, sharded
from dl_jax.core.errors import InputError, nearest
from dl_jax.core.step import Array, Batch, Metric, State, Step, Tree, require_collections
from dl_jax.core.stream import Stream, gather

Batches = Callable[[int], Batch]  # step -> batch
Measurements = dict[str, np.ndarray]
Best = tuple[str, Literal["min", "max"]]  # a measurement, and whether lower or higher is better

MAX_NONFINITE_IN_A_ROW = 10  # calls of the compiled program with a NaN or infinite metric; more end the run
RESERVED = ("step", "time", "steps_per_second", "data_wait", "skipped")  # what reports add to the metrics
IN_FLIGHT = 2  # calls under way at a time: without a bound, simulated devices hung, and a NaN is noticed late


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


class Recorder:
    """The interface between `fit` and whatever records a run. This base class records nothing."""

    skip_nonfinite: bool = False  # undo a step with a metric that is not finite, instead of ending the run

    def start(self, tree: Tree, steps: int, best: Best | None) -> Tree:
        """Returns the tree to begin with: `tree`, or the restored checkpoint of an earlier attempt at the same fit."""
        return tree

    def stepped(self, step: int) -> bool:
        """Is called after each call of the program, and returns whether to save now."""
        return False

    def report(self, step: int, metrics: Measurements) -> None:
        """Records the means of the metrics since the last report, or the measurements of `Watch`."""

    def save(self, step: int, tree: Tree, measured: Measurements) -> None:
        """Saves `tree` as the checkpoint of `step`; `measured` are the measurements of `Watch` at it, or {}."""

    def finish(self, step: int, tree: Tree) -> None:
        """Is called once, when the fit is complete."""

    def last_saved(self) -> str:
        """A phrase for error messages that says where the newest checkpoint is."""
        return "nothing was saved"


class NonFiniteError(ArithmeticError):
    """A metric of the train step, a parameter or a collection became NaN or infinite."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names", "pairs"])
@dataclasses.dataclass(frozen=True)
class _Row:
    """The metrics of one call in a single array, so that the host fetches one array only."""

    names: tuple[str, ...]  # M
    pairs: tuple[int, ...]  # P, indices of the metrics that are (sum, weight)
    values: Array  # float32 [M + P] or [M + P, S]: the means and sums, then the weights of the pairs


def _row(metrics: Any) -> _Row:
    names = tuple(sorted(metrics))
    for name in names:
        if name in RESERVED or name.startswith("watch/"):
            raise InputError(f"the step has a metric {name!r}, a name that reports use themselves; choose another")
    found = [metrics[name] for name in names]
    pairs = tuple(i for i, metric in enumerate(found) if isinstance(metric, tuple))
    values = [metric[0] if isinstance(metric, tuple) else metric for metric in found] + [found[i][1] for i in pairs]
    return _Row(names, pairs, jnp.stack([v.astype(jnp.float32) for v in values]) if values else jnp.zeros(0))


def _where(seeds: Array, new: Tree, old: Tree) -> Tree:
    """`new` for the seeds where `seeds` (bool [] or [S]) is true, `old` for the others; leaves [...] or [S, ...]."""

    def choose(n: Array, o: Array) -> Array:
        return jnp.where(seeds.reshape(seeds.shape + (1,) * (n.ndim - seeds.ndim)), n, o)

    return jax.tree.map(choose, new, old)


@functools.partial(jax.jit, static_argnames=("skip", "freeze"), donate_argnames=("state",))
def _advance(step: Any, state: State, batch: Batch, stopped: Array, skip: bool, freeze: bool) -> tuple[State, _Row]:
    new, metrics = step(state, batch)
    row = _row(metrics)
    if skip:
        new = _where(jnp.isfinite(row.values).all(0), new, state._replace(step=new.step))
    if freeze:
        new = _where(~stopped, new, state)
    return new, row


class _Window:
    """The metrics since the last report. Their means are taken in float64 and leave out steps that are not finite."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.pairs: tuple[int, ...] = ()
        self.lost_in_a_row: Any = 0  # steps, [] or [S]
        self.reset()

    def reset(self) -> None:
        self.rows: list[np.ndarray] = []  # each [M + P] or [M + P, S]
        self.began, self.waited, self.elsewhere = time.perf_counter(), 0.0, 0.0  # seconds

    def add(self, step: int, row: _Row, stopped: np.ndarray, run: Recorder) -> None:
        """Waits for the metrics of a call and adds them. Raises NonFiniteError where they end the run."""
        values: np.ndarray = np.asarray(row.values, np.float64)
        self.names, self.pairs = row.names, row.pairs
        self.rows.append(values)
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

    def means(self, stride: int, skip: bool) -> Measurements:
        """{name: mean}, NaN where no step was finite. A pair is left out where its weights sum to 0 in every seed."""
        rows, m = np.stack(self.rows), len(self.names)  # [n, M + P] or [n, M + P, S]
        whole = np.asarray(np.isfinite(rows).all(1, keepdims=True))  # [n, 1] or [n, 1, S]
        totals = np.where(whole, rows, 0).sum(0)  # [M + P] or [M + P, S]
        weights = np.array(np.broadcast_to(whole.sum(0), totals[:m].shape), np.float64)
        weights[list(self.pairs)] = totals[m:]
        means = np.divide(totals[:m], weights, out=np.full(weights.shape, np.nan), where=weights != 0)
        empty = {self.names[i] for i in self.pairs if not weights[i].any()}
        seconds = time.perf_counter() - self.began - self.elsewhere
        rates = {"steps_per_second": stride * len(rows) / seconds, "data_wait": self.waited / seconds}
        skipped = {"skipped": stride * (~whole[:, 0]).sum(0)} if skip else {}
        named = {name: mean for name, mean in zip(self.names, means, strict=True) if name not in empty}
        return {**named, **{k: np.asarray(v) for k, v in (rates | skipped).items()}}


def fit(
    step: Step,
    state: State,
    stream: Stream | Batches,
    *,
    steps: int,
    run: Recorder | None = None,
    scan: int = 1,
    every: int = 100,
    watch: Watch | None = None,
    stop: StopRule | None = None,
    carried: Sequence[str] = (),
) -> State:
    """Runs `step` on the batches of `stream` until `state.step` is `steps`, or `stop` has stopped every seed.

    Args:
      step: a function `(state, batch) -> (state, metrics)` that adds 1 or more to `state.step`. It is compiled here.
      state: the state to begin with. It is copied, so the caller can go on using it.
      stream: the batches. A `Stream` is split over as many devices as divide its batch size: each process reads its own
        rows, and the state is copied to all of these devices. The batches of a plain function of the step are passed to
        the compiled program unchanged, so every process has to give the whole batch.
      steps: the value of `state.step` at which the fit ends.
      run: records the metrics, saves checkpoints, and may hold a checkpoint to resume from.
      scan: the number of steps in one call of the compiled program. If it is above 1, a data set in memory is kept on
        the devices, and the host sends only the indices of the rows.
      every: the number of steps between reports of the metrics' means.
      watch: a function of the variables to measure, such as the validation error, and how often.
      stop: an early-stopping rule, which is updated after each measurement of `watch`.
      carried: names of the collections in `state.extra` that have one row for each row of the batch, such as the carry
        of truncated back-propagation. Give them for the global batch, [B, ...] or [S, B, ...]; they are split over the
        devices like the batch.

    The result is the state at the end.

    Raises InputError where `steps` is negative; where `every`, `scan` or `watch.every` is below 1; where a call of the
    compiled program does not advance `state.step`, or by a number that does not divide `steps`, `every` or
    `watch.every`; where `carried` names a collection that `state.extra` does not have; where a metric of the step has a
    name that reports use (`RESERVED`, or one that begins with "watch/"); where `stop` is given without `watch`; where
    `watch.best` does not name a measurement that is a single number, or its end is not "min" or "max"; where the batch
    cannot be split over the processes; and where the checkpoint to resume from has other random keys than `state`.

    Raises NonFiniteError where a metric is not finite (if the run has `skip_nonfinite`, only after 10 such calls in a
    row), and where a parameter or collection is not finite when it is saved or returned.
    """
    _require_intervals(steps, every, scan, watch, stop)
    run = run or Recorder()
    mesh = _mesh(stream)
    state, batches = _on_devices(state, stream, mesh, scan, carried)
    program = _program(step, stream, mesh, scan)
    saved = run.start({"state": state, "stop": stop.init() if stop else {}}, steps, watch.best if watch else None)
    if saved["state"] is not state and not _same_keys(saved["state"], state):  # the batches are those of other seeds
        raise InputError(
            "the checkpoint to resume from has other random keys than this run; give the --seed and --seeds that it "
            "was begun with, or another --workdir"
        )
    state, rule = _copied(saved["state"]), saved["stop"]  # a copy: donation deletes the buffers of its input
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
        state, row = _advance(program, state, batch, stopped(), run.skip_nonfinite, stop is not None)
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
            _require_best(watch.best, measured)
            window.elsewhere += time.perf_counter() - began
            run.report(i, {f"watch/{name}": value for name, value in measured.items()})
            rule = stop.update(rule, measured, i) if stop else rule
        due = run.stepped(i)
        if due or (watch and watch.best and measured):
            settle(0)
            _require_finite(state, i, run)
            run.save(i, {"state": state, "stop": rule}, measured)
    settle(0)
    if window.rows:  # a stop rule ended the fit between two reports
        run.report(i, window.means(stride, run.skip_nonfinite))
    _require_finite(state, i, run)
    run.finish(i, {"state": state, "stop": rule})
    return state


def _mesh(stream: Stream | Batches) -> Mesh:
    """A mesh of as many devices as divide the batch. Prints a line if devices are left over, as that costs time."""
    if not isinstance(stream, Stream):
        return data_mesh()
    mesh = data_mesh(batch_size=stream.batch_size)
    if mesh.devices.size < jax.device_count() and jax.process_index() == 0:
        idle = f"{mesh.devices.size} of {jax.device_count()} devices"
        print(f"a batch of {stream.batch_size} is split over {idle}", file=sys.stderr)
    return mesh


def _on_devices(
    state: State, stream: Stream | Batches, mesh: Mesh, scan: int, carried: Sequence[str]
) -> tuple[State, Batches]:
    """The state on the devices, and a function from the step to the batch, or batches, of one call on the devices."""
    require_collections(state.extra)
    unknown = sorted(set(carried) - state.extra.keys())
    if unknown:
        raise InputError(
            f"carried names {unknown[0]!r}, expected collections of state.extra: {sorted(state.extra)}; correct it"
        )
    if not isinstance(stream, Stream):
        state = _whole(state, stream, mesh)
        batches = lambda i: numeric(stream(i))
        return state, batches if scan == 1 else lambda i: _stacked([batches(i + j) for j in range(scan)])
    rows = process_rows(stream.batch_size, mesh)
    split = {name: sharded(state.extra[name], mesh, stream.axis) for name in carried}
    rest = {name: value for name, value in state.extra.items() if name not in carried}
    state = _whole(state._replace(extra=rest), stream, mesh)
    state = state._replace(extra={**state.extra, **split})
    if scan == 1:
        return state, lambda i: place(stream(i, rows), mesh, stream.axis)
    # For a data set in memory the batches are indices: `_program` holds the records.
    return state, lambda i: place(_stacked([stream.read(i + j, rows) for j in range(scan)]), mesh, stream.axis + 1)


def _whole(tree: Tree, stream: Stream | Batches, mesh: Mesh) -> Tree:
    """`tree` on every device of the mesh; left on the default device for a plain function in one process."""
    on_mesh = isinstance(stream, Stream) or jax.process_count() > 1
    return replicated(tree, mesh) if on_mesh else jax.tree.map(jnp.asarray, tree)


def _stacked(batches: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def _program(step: Step, stream: Stream | Batches, mesh: Mesh, scan: int) -> Step:
    """The function to compile. Arrays that it reads are leaves of the Partial, so they are arguments, not constants."""
    step = _whole(_unwrapped(step), stream, mesh)  # its arrays may be NumPy's, or on the devices of another fit
    if scan == 1:
        return step
    records = stream.records if isinstance(stream, Stream) else None
    return jax.tree_util.Partial(_Scanned(scan), step, records and replicated(dict(records), mesh))


def _unwrapped(step: Step) -> jax.tree_util.Partial:
    """The step as one Partial. Arrays of partials within it become its leaves, where a nested one would hide them."""
    function: Any = step
    args, keywords = (), {}
    while all(hasattr(function, name) for name in ("func", "args", "keywords")):
        held = jax.tree.leaves((function.args, function.keywords))
        if not (isinstance(function, jax.tree_util.Partial) or all(hasattr(leaf, "dtype") for leaf in held)):
            break  # settings of a functools.partial, such as a flag, stay as they are
        args, keywords = (*function.args, *args), {**function.keywords, **keywords}
        function = function.func
    return jax.tree_util.Partial(function, *args, **keywords)


@dataclasses.dataclass(frozen=True)
class _Scanned:
    """k steps in one call, on batches [k, ...]; metrics are means over the steps.

    Hashable, so equal k share a compiled program.
    """

    k: int

    def __call__(self, step: Step, records: Any, state: State, batches: Batch) -> tuple[State, dict[str, Metric]]:
        def one(state: State, batch: Batch) -> tuple[State, Any]:
            return step(state, batch if records is None else gather(records, batch))

        state, metrics = jax.lax.scan(one, state, batches, length=self.k)
        return state, {
            name: (m[0].sum(0), m[1].sum(0)) if isinstance(m, tuple) else m.mean(0) for name, m in metrics.items()
        }


@jax.jit
def _copied(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _same_keys(state: State, other: State) -> Array:  # -> bool []
    return jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(other.key))


def _count(state: State) -> int:
    """The largest step of all seeds: a seed that has stopped stays behind."""
    return int(np.max(np.asarray(state.step)))


def _require_intervals(steps: int, every: int, scan: int, watch: Watch | None, stop: StopRule | None) -> None:
    if steps < 0:
        raise InputError(f"steps is {steps}, expected 0 or more; give the step at which the fit ends")
    for name, value in {"every": every, "scan": scan, "watch.every": watch.every if watch else 1}.items():
        if value < 1:
            raise InputError(f"{name} is {value}, expected a number of steps, 1 or more; give 1 for every single step")
    if stop and not watch:
        raise InputError("stop is given without watch, expected both: a stop rule decides by measurements of watch")
    require_mode(watch.best if watch else None)


def require_mode(best: Best | None) -> None:
    """Raises InputError unless `best` is None or (name, "min" or "max")."""
    if best is not None and not (isinstance(best, tuple | list) and len(best) == 2 and best[1] in ("min", "max")):
        raise InputError(f"best is {best!r}, expected a pair of a measurement's name and 'min' or 'max'")


def _checked_stride(stride: int, i: int, steps: int, every: int, watch: Watch | None) -> int:
    if stride < 1:
        raise InputError(f"the step advanced state.step by {stride}, expected 1 or more: add to state.step in it")
    intervals = {"every": every, "watch.every": watch.every if watch else stride}
    for name, value in {"steps": steps, **intervals}.items():
        if (value - i) % stride or (name in intervals and value % stride):
            also = f", as must be the first step, {i}" if name in intervals else f" (counted from step {i})"
            raise InputError(
                f"{name} is {value}, expected a multiple of {stride}{also}: each call advances {stride} steps"
            )
    return stride


def _require_best(best: Best | None, measured: Measurements) -> None:
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
