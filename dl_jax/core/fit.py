"""The training loop. It does not depend on a model or data set."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dl_jax.core import events
from dl_jax.core.devices import DATA, fetched, whole
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import is_real
from dl_jax.core.program import (
    Batches,
    Layout,
    ahead,
    batches_of,
    calls_in_flight,
    layout_of,
    planned_program,
    program,
    steps_in_a_call,
)
from dl_jax.core.recorder import (
    NonFiniteError,
    Recorder,
    Row,
    Snapshot,
    StopRule,
    Watch,
    Window,
    require_best,
    require_mode,
    row_of,
)
from dl_jax.core.step import Array, Batch, State, Step, Tree
from dl_jax.core.stream import Stream
from dl_jax.core.target import Target, planned, unknown

Lies = tuple[NamedSharding, ...]  # of the leaves of a state; () where they lie on the default device


@events.phase("steps")
def fit(
    step: Step,
    state: State,
    stream: Stream | Batches,
    *,
    steps: int,
    run: Recorder | None = None,
    scan: int | None = None,
    every: int = 100,
    watch: Watch | None = None,
    stop: StopRule | None = None,
    carried: Sequence[str] = (),
) -> State:
    """Runs `step` on the batches of `stream` until `state.step` is `steps`, or `stop` has stopped every seed.

    Args:
      step: a function `(state, batch) -> (state, metrics)` that adds 1 or more to `state.step`. It is compiled here.
      state: the state to begin with. It is copied, so the caller can go on using it.
      stream: the batches. A `Stream` is split over the devices as `devices.data_mesh` says, first by its seeds, then by
        its rows: each process reads its own, and a thread reads and places them ahead. A state lies where its seeds
        are, and is copied to the devices that share them, or, with `run.fsdp`, split over these as well. The batches of
        a plain function of the step are passed to the compiled program unchanged, so every process has to give the
        whole batch; all devices of several processes compute the same then, one of a single process.
      steps: the value of `state.step` at which the fit ends.
      run: records the metrics, saves checkpoints, and may hold a checkpoint to resume from.
      scan: the number of steps in one call of the compiled program. If it is above 1, a data set in memory is kept on
        the devices, and the host sends only the indices of the rows. By default it is 1 on CPUs, and on accelerators as
        many as hide the work of the host: see `program.steps_in_a_call`.
      every: the number of steps between reports of the metrics' means.
      watch: a function of the variables to measure, such as the validation error, and how often.
      stop: an early-stopping rule, which is updated after each measurement of `watch`.
      carried: names of the collections in `state.extra` that have one row for each row of the batch, such as the carry
        of truncated back-propagation. Give them for the global batch, [B, ...] or [S, B, ...]; they are split over the
        devices like the batch.

    The result is the state at the end.

    Raises InputError where `steps` is negative; where `every`, `scan` or `watch.every` is below 1; where a call of the
    compiled program does not advance `state.step`, or by a number that does not divide `steps`, `every` or
    `watch.every`; where `scan` does not divide the steps that the stream keeps together; where `carried` names a
    collection that `state.extra` does not have; where a metric of the step has a name that reports use (`RESERVED`, or
    one that begins with "watch/"); where `stop` is given without `watch`; where `watch.best` does not name a
    measurement that is a single number, or its end is not "min" or "max"; where the batch cannot be split over the
    processes; and where the checkpoint to resume from has other random keys than `state`.

    Raises NonFiniteError where a metric is not finite (if the run has `skip_nonfinite`, only after 10 such calls in a
    row), and where a parameter or collection is not finite when it is saved or returned.
    """
    _require_intervals(steps, every, scan, watch, stop)
    run = run or Recorder()
    layout = layout_of(state, stream, carried, run.fsdp)
    due = steps, every, watch.every if watch else 0
    target = planned()
    if target:
        _hand_over(target, step, state, layout, scan, due, run, watch, stop)
        return state
    state = layout.put(state)
    given = Snapshot(state, stop.init() if stop else {}, {})
    saved = run.start(given, steps, watch.best if watch else None)
    if saved is not given and not _same_keys(saved.state, state):  # the batches are those of other seeds
        raise InputError(
            "the checkpoint to resume from has other random keys than this run; give the --seed and --seeds that it "
            "was begun with, or another --workdir"
        )
    at_a_time = calls_in_flight(layout.mesh)
    mesh, lies = layout.mesh, tuple(jax.tree.leaves(layout.shardings))
    state, rule = _copied(saved.state, lies), saved.stop  # a copy: donation deletes the buffers of its input
    i, stride, window = _count(state), 0, Window(saved.window)
    if scan is None:
        scan = 1 if i >= steps else _steps_in_a_call(step, state, layout, due, run)
    if isinstance(stream, Stream) and stream.together and i < steps and i % scan:
        raise InputError(
            f"the fit goes on at step {i} with {scan} steps in a call, which have to be of one bucket, expected a "
            f"multiple of them; give a scan that divides {i}"
        )
    batches, compiled = batches_of(layout, scan), layout.copied(program(step, stream, scan))
    pending: collections.deque[tuple[int, Row, np.ndarray]] = collections.deque()

    def stopped() -> np.ndarray:
        return np.asarray(rule.stopped if stop else False)

    def settle(most: int) -> None:
        while len(pending) > most:
            at, row, frozen = pending.popleft()
            window.add(at, stride, row, frozen, run)
            events.progress()
            if at % every == 0 or at == steps:
                report(at)

    def report(at: int) -> None:
        run.report(at, window.means(run.skip_nonfinite))
        events.waited(window.waited)
        window.reset()

    with _reporting(settle), ahead(batches, steps if isinstance(stream, Stream) else 0) as upcoming:
        while i < steps and not stopped().all():
            asked = time.perf_counter()
            batch = upcoming(i, stride)
            window.waited += time.perf_counter() - asked
            settle(at_a_time - 1)
            state, row = _advance(compiled, state, batch, stopped(), run.skip_nonfinite, stop is not None, mesh, lies)
            stride = stride or _checked_stride(_count(state) - i, i, steps, every, watch)
            i += stride
            row = dataclasses.replace(row, values=whole(row.values))
            row.values.copy_to_host_async()
            pending.append((i, row, stopped()))
            measured = {}
            if watch and (i % watch.every == 0 or i == steps):
                settle(0)
                began = time.perf_counter()
                with events.phase("evaluation"):
                    measured = watch.measure(_seen(state.variables, run.fsdp))
                require_best(watch.best, measured)
                window.elsewhere += time.perf_counter() - began
                run.report(i, {f"watch/{name}": value for name, value in measured.items()})
                rule = stop.update(rule, measured, i) if stop else rule
                if stopped().all() and window.steps:  # the fit ends between two reports
                    report(i)
            due = run.stepped(i)
            if due or (watch and watch.best and measured):
                settle(0)
                _require_finite(state, i, run)
                run.save(i, Snapshot(state, rule, window.content()), measured)
    settle(0)
    _require_finite(state, i, run)
    run.finish(i, Snapshot(state, rule, window.content()))
    return _seen(state, run.fsdp)


@contextlib.contextmanager
def _reporting(settle: Callable[[int], None]) -> Iterator[None]:
    """A context after which, if it ends by an exception, what the calls before it have measured is reported."""
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # the first one tells what is wrong
            settle(0)
        raise


def _steps_in_a_call(step: Step, state: State, layout: Layout, due: Sequence[int], run: Recorder) -> int:
    return 1 if run.skip_nonfinite else steps_in_a_call(step, state, layout, _count(state), *due)


def _hand_over(
    target: Target,
    step: Step,
    state: State,
    layout: Layout,
    scan: int | None,
    due: Sequence[int],
    run: Recorder,
    watch: Watch | None,
    stop: StopRule | None,
) -> None:
    """Gives the program of a fit to the plan that is being made, and reports made-up numbers."""
    scan = scan or _steps_in_a_call(step, state, layout, due, run)
    lies, running = tuple(jax.tree.leaves(layout.shardings)), np.shape(stop.init().stopped) if stop else ()
    advance = lambda step, state, batch: _advance(
        step, state, batch, jnp.zeros(running, bool), run.skip_nonfinite, stop is not None, layout.mesh, lies
    )
    given = planned_program(run.name, jax.jit(advance, donate_argnums=1), step, state, layout, scan)
    target.take(given)
    row = given.traced.out_info[1]
    metric = jax.ShapeDtypeStruct(row.values.shape[1:], row.values.dtype)
    run.report(due[0], unknown(dict.fromkeys(row.names, metric)))
    if watch:
        run.report(due[0], {f"watch/{name}": value for name, value in watch.measure(state.variables).items()})


def _seen(tree: Tree, fsdp: bool) -> Tree:
    """What the caller gets: readable on every process, although processes train different seeds.

    What `fsdp` has split stays split.
    """
    return jax.tree.map(lambda leaf: leaf if fsdp and DATA in leaf.sharding.spec else whole(leaf), tree)


def _where(seeds: Array, new: Tree, old: Tree) -> Tree:
    """`new` for the seeds where `seeds` (bool [] or [S]) is true, `old` for the others; leaves [...] or [S, ...]."""

    def choose(n: Array, o: Array) -> Array:
        return jnp.where(seeds.reshape(seeds.shape + (1,) * (n.ndim - seeds.ndim)), n, o)

    return jax.tree.map(choose, new, old)


@functools.partial(jax.jit, static_argnames=("skip", "freeze", "mesh", "lies"), donate_argnames=("state",))
def _advance(
    step: Any, state: State, batch: Batch, stopped: Array, skip: bool, freeze: bool, mesh: Mesh, lies: Lies
) -> tuple[State, Row]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        new, metrics = step(state, batch)
    row = row_of(metrics)
    if skip:
        new = _where(jnp.isfinite(row.values).all(0), new, state._replace(step=new.step))
    if freeze:
        new = _where(~stopped, new, state)
    return _laid(new, lies), row


@functools.partial(jax.jit, static_argnums=1)
def _copied(state: State, lies: Lies) -> State:
    return _laid(jax.tree.map(jnp.copy, state), lies)


def _laid(state: State, lies: Lies) -> State:
    """`state` with the shardings of its leaves, so that the result of a call lies as its input did."""
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, leaves, lies)) if lies else state


@jax.jit
def _same_keys(state: State, other: State) -> Array:  # -> bool []
    return jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(other.key))


def _count(state: State) -> int:
    """The largest step of all seeds: a seed that has stopped stays behind."""
    return int(np.max(fetched(state.step)))


def _require_intervals(steps: int, every: int, scan: int | None, watch: Watch | None, stop: StopRule | None) -> None:
    if steps < 0:
        raise InputError(f"steps is {steps}, expected 0 or more; give the step at which the fit ends")
    for name, value in {
        "every": every,
        "scan": 1 if scan is None else scan,
        "watch.every": watch.every if watch else 1,
    }.items():
        if value < 1:
            raise InputError(f"{name} is {value}, expected a number of steps, 1 or more; give 1 for every single step")
    if stop and not watch:
        raise InputError("stop is given without watch, expected both: a stop rule decides by measurements of watch")
    require_mode(watch.best if watch else None)


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


def _require_finite(state: State, step: int, run: Recorder) -> None:
    if not _all_finite((state.params, state.extra)):
        raise NonFiniteError(
            f"a parameter or statistic is NaN or infinite at step {step}, expected finite numbers; "
            f"{run.last_saved()}; lower the learning rate"
        )


@jax.jit
def _all_finite(tree: Tree) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if is_real(x)]
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in floats]))
