"""What a fit compiles and where it lies: the state, the batches and the arrays that a step reads, on the devices."""

import contextlib
import dataclasses
import functools
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dl_jax.core.devices import data_mesh, fetched, numeric, own, place, put, replicated, rows_over, states_over
from dl_jax.core.errors import InputError
from dl_jax.core.flops import flops
from dl_jax.core.ragged import Ragged
from dl_jax.core.step import SEED, Batch, Metric, State, Step, Tree, require_collections
from dl_jax.core.stream import Stream, gather
from dl_jax.core.target import Feed, Program, abstract, mesh_of, planned

Batches = Callable[[int], Batch]  # step -> batch

AHEAD = 2  # batches that are read and placed while the devices compute
# How much an accelerator computes in a call by default: 10 steps a call hid the host's work on an H100, and 1e12
# operations take it longer than a dispatch. A call also ends soon enough for a save within --grace.
MOST_STEPS, ENOUGH = 50, 1e12
RESIDENT = 0.25  # of a device's memory, which a data set may take
LARGE = 2**26  # bytes of the batches of a call
READINGS = 3  # of a plan, which takes the fastest: others wait for the disk or for other processes


class Layout(NamedTuple):
    """The batches of a fit, and where they and its state lie."""

    stream: Stream | Batches
    seeds: int  # by which the batches are split
    mesh: Mesh
    shardings: Any  # a tree like the state. None: it stays on the default device

    def put(self, state: State) -> State:
        return put(state, self.shardings) if self.shardings else jax.tree.map(jnp.asarray, state)

    def copied(self, tree: Tree) -> Tree:
        """`tree` on all devices that have a part of the state."""
        return replicated(tree, self.mesh) if self.shardings else jax.tree.map(jnp.asarray, tree)


def layout_of(state: State, stream: Stream | Batches, carried: Sequence[str], fsdp: bool) -> Layout:
    """Where a fit has its batches and its state: see `fit`. Prints a line if devices are left over: it costs time."""
    require_collections(state.extra)
    unknown = sorted(set(carried) - state.extra.keys())
    if unknown:
        raise InputError(
            f"carried names {unknown[0]!r}, expected collections of state.extra: {sorted(state.extra)}; correct it"
        )
    target = planned()
    if not isinstance(stream, Stream):
        mesh = data_mesh(target and target.devices)
        # A state that another fit has left on some devices joins those of the mesh. One of several processes is one
        # array on all of them, as otherwise each would save its own.
        lies = any(len(x.devices()) > 1 for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
        spread = fsdp or target or lies or jax.process_count() > 1
        return Layout(stream, 1, mesh, states_over(state, mesh, None, fsdp) if spread else None)
    seeds = np.size(state.step) if stream.axis else 1
    mesh = mesh_of(stream.batch_size, seeds)
    if mesh.devices.size < jax.device_count() and jax.process_index() == 0 and not target:
        idle = f"{mesh.devices.size} of {jax.device_count()} devices"
        print(f"a batch of {stream.batch_size} is split over {idle}", file=sys.stderr)
    rest = {name: value for name, value in state.extra.items() if name not in carried}
    found = states_over(state._replace(extra=rest), mesh, np.size(state.step) if np.ndim(state.step) else None, fsdp)
    rows = rows_over(mesh, bool(stream.axis))
    split = {name: jax.tree.map(lambda _: rows, state.extra[name]) for name in carried}
    return Layout(stream, seeds, mesh, found._replace(extra={**found.extra, **split}))


def batches_of(layout: Layout, scan: int) -> Batches:
    """A function from the step to the batch, or batches, of one call, on the devices."""
    stream, seeds, mesh, _ = layout
    if not isinstance(stream, Stream):
        batches = lambda i: numeric(stream(i))
        return batches if scan == 1 else lambda i: _stacked([batches(i + j) for j in range(scan)])
    if stream.together and stream.together % scan:
        raise InputError(
            f"scan is {scan}, expected a divisor of {stream.together}, the steps with batches of one shape; give "
            f"data.bucketed together={scan}"
        )
    by_seed, leading = bool(stream.axis), () if scan == 1 else (scan,)
    sharding, mine = rows_over(mesh, by_seed, len(leading)), own(mesh, stream.batch_size, seeds)
    # For a data set in memory the batches of a scan are indices: `program` holds the records.
    records = None if leading else stream.records

    def read(i: int) -> Batch:
        batch = stream.read(i, mine.rows)
        if by_seed and (other := {len(column) for column in batch.values()} - {seeds}):
            raise InputError(
                f"a batch of {other.pop()} seeds, expected the {seeds} of the state; give the same seeds to both"
            )
        if mesh.shape[SEED] > 1:
            batch = {name: column[mine.seeds] for name, column in batch.items()}
        return batch if records is None else gather(records, batch)

    def placed(i: int) -> Batch:
        block = _stacked([read(i + j) for j in range(scan)]) if leading else read(i)
        return place(block, sharding, (*leading, *(seeds,) * by_seed, stream.batch_size))

    return placed


def steps_in_a_call(step: Step, state: State, layout: Layout, *counts: int) -> int:
    """How many steps a call of the compiled program makes where the caller does not say.

    It is 1 on a CPU, for a data set in memory that is too large for that of a device, and for steps that take long by
    themselves or have large batches. Otherwise it is the largest number up to `MOST_STEPS` such that what one call
    advances `state.step` divides all of `counts`, the steps at which something else is due. It depends on no
    measurement, so a run that resumes makes the same calls.
    """
    stream, _, mesh, _ = layout
    if _on_cpu(mesh) or not isinstance(stream, Stream):
        return 1
    padded = sum(math.prod(column.shape) * column.dtype.itemsize for column in (stream.records or {}).values())
    if padded > RESIDENT * _memory(mesh):
        return 1
    read = stream.read(int(np.max(fetched(state.step))), slice(None))
    batch = read if stream.records is None else gather(stream.records, read)
    operations = max(1.0, flops(jax.make_jaxpr(step)(state, batch)))
    size = sum(column.nbytes for column in read.values())
    enough = min(ENOUGH * mesh.devices.size / operations, LARGE / max(1, size))
    stride = max(1, advance_of(step, state, batch))
    due, alike = math.gcd(*counts), stream.together or 0  # every k divides 0
    possible = (k for k in range(1, MOST_STEPS + 1) if k <= enough and due % (k * stride) == alike % k == 0)
    return max(possible, default=1)


def advance_of(step: Step, state: State, batch: Batch) -> int:
    """By how much the step advances `state.step`. XLA computes nothing but what the counter depends on."""
    after = jax.jit(lambda step, state, batch: step(state, batch)[0].step)(_unwrapped(step), state, batch)
    return int(np.max(fetched(after))) - int(np.max(fetched(state.step)))


def calls_in_flight(mesh: Mesh) -> int:
    """How many calls may be under way at a time. Without a bound, simulated devices hung, and a NaN is noticed late.

    On accelerators the second hides the time that a result takes to the host. On CPUs it gained no time, and XLA has
    the temporary arrays of a call from the moment it is asked for: ResNet-20 took 2.7 GB instead of 1.5.
    """
    return 1 if _on_cpu(mesh) else 2


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _memory(mesh: Mesh) -> float:
    """The bytes of memory of a device; infinite where it does not tell."""
    target = planned()
    stats = None if target else mesh.local_devices[0].memory_stats()
    return target.memory if target else (stats or {}).get("bytes_limit", math.inf)


def planned_program(name: str, advance: Any, step: Step, state: State, layout: Layout, scan: int) -> Program:
    """What a plan takes: `advance`, a jitted function of (program, state, batch), traced for shapes on the mesh."""
    stream, _, mesh, shardings = layout
    at, everywhere = int(np.max(np.asarray(state.step))), NamedSharding(mesh, PartitionSpec())
    if isinstance(stream, Stream):
        all_rows = slice(None)
        read = functools.partial(stream if scan == 1 else stream.read, rows=all_rows)
        if stream.widest:
            read = lambda step, widest=stream.widest: widest(all_rows)
        rows = rows_over(mesh, bool(stream.axis), int(scan > 1))
    else:
        read, rows = stream, everywhere
    steps = scan * advance_of(step, state, stream(at))  # has also prepared what the first batch of an epoch takes
    times, batch = [], {}
    for _ in range(READINGS):
        began = time.perf_counter()
        batch = _stacked([read(at + j) for j in range(scan)]) if scan > 1 else read(at)
        times.append(time.perf_counter() - began)
    like = lambda tree, sharding: abstract(tree, jax.tree.map(lambda _: sharding, tree))
    state, batch, whole = abstract(state, shardings), like(batch, rows), program(step, stream, scan)
    feed = Feed(steps, getattr(stream, "batch_size", None), min(times), state)
    return Program(name, advance.trace(like(whole, everywhere), state, batch), mesh, feed)


@contextlib.contextmanager
def ahead(batches: Batches, stop: int) -> Iterator[Callable[[int, int], Batch]]:
    """A context in which a thread reads and places batches before they are asked for.

    Yields a function (step, stride) -> batch of that step, which also has the thread go on with the steps that follow
    at that stride, below `stop`. With stride 0, where it is not known yet, nothing is read ahead.
    """
    coming: dict[int, Future[Batch]] = {}
    asked: queue.SimpleQueue[tuple[int, Future[Batch]] | None] = queue.SimpleQueue()

    def read() -> None:
        while given := asked.get():
            step, future = given
            try:
                future.set_result(batches(step))
            except BaseException as error:
                future.set_exception(error)

    def batch(i: int, stride: int) -> Batch:
        for step in range(i, min(i + AHEAD * stride + 1, stop), stride) if stride else ():
            if step not in coming:
                coming[step] = Future()
                asked.put((step, coming[step]))
        return coming.pop(i).result() if i in coming else batches(i)

    # A daemon, unlike the threads of an executor: a read that hangs must not keep the process from ending.
    reader = threading.Thread(target=read, name="batches", daemon=True)
    reader.start()
    try:
        yield batch
        asked.put(None)
        reader.join()
    finally:
        asked.put(None)


def _stacked(batches: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def program(step: Step, stream: Stream | Batches, scan: int) -> jax.tree_util.Partial:
    """The function to compile. Arrays that it reads are leaves of the Partial, so they are arguments, not constants.

    They may be NumPy's, or on the devices of another fit.
    """
    if scan == 1:
        return _unwrapped(step)
    records = stream.records if isinstance(stream, Stream) else None
    resident = records and numeric({name: _whole(column) for name, column in records.items()})
    return jax.tree_util.Partial(_Scanned(scan), _unwrapped(step), resident)


def _whole(column: Any) -> Any:
    return np.asarray(column) if isinstance(column, Ragged) else column


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
