"""What a fit compiles and where it lies: the state, the batches and the arrays that a step reads, on the devices."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dl_jax.core.devices import data_mesh, numeric, place, process_rows, replicated, sharded
from dl_jax.core.errors import InputError
from dl_jax.core.step import Batch, Metric, State, Step, Tree, require_collections
from dl_jax.core.stream import Stream, gather

Batches = Callable[[int], Batch]  # step -> batch


def mesh_for(stream: Stream | Batches) -> Mesh:
    """A mesh of as many devices as divide the batch. Prints a line if devices are left over, as that costs time."""
    if not isinstance(stream, Stream):
        return data_mesh()
    mesh = data_mesh(batch_size=stream.batch_size)
    if mesh.devices.size < jax.device_count() and jax.process_index() == 0:
        idle = f"{mesh.devices.size} of {jax.device_count()} devices"
        print(f"a batch of {stream.batch_size} is split over {idle}", file=sys.stderr)
    return mesh


def on_devices(
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
    # For a data set in memory the batches are indices: `program` holds the records.
    return state, lambda i: place(_stacked([stream.read(i + j, rows) for j in range(scan)]), mesh, stream.axis + 1)


def _whole(tree: Tree, stream: Stream | Batches, mesh: Mesh) -> Tree:
    """`tree` on every device of the mesh; left on the default device for a plain function in one process."""
    on_mesh = isinstance(stream, Stream) or jax.process_count() > 1
    return replicated(tree, mesh) if on_mesh else jax.tree.map(jnp.asarray, tree)


def _stacked(batches: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def program(step: Step, stream: Stream | Batches, mesh: Mesh, scan: int) -> Step:
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
