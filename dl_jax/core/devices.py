"""Data parallelism: batches are split over one mesh axis, and everything else is replicated.

`jax.jit` over arrays placed like this inserts the all-reduce of the gradient. The same code therefore runs on one
device and on many, and BatchNorm's statistics are those of the global batch.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name
from dl_jax.core.step import Tree

AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None, *, batch_size: int | None = None) -> Mesh:
    """A mesh with one axis, "data", of `devices` (default: all devices of all processes), process after process.

    With `batch_size`, the mesh takes the largest number of devices from each process that divides the batch: 5 of 8
    devices for a batch of 100.
    """
    # Not jax.make_mesh: it orders devices by the links of a TPU slice, and a process's rows would not be contiguous.
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if batch_size:
        processes = [list(own) for _, own in itertools.groupby(devices, key=lambda d: d.process_index)]
        each = min(map(len, processes))
        while each > 1 and batch_size % (each * len(processes)):
            each -= 1
        devices = [device for own in processes for device in own[:each]]
    # Auto: with Explicit axes, the default, a Linen CNN with Dropout raises ShardingTypeError.
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(tree: Tree, mesh: Mesh) -> Tree:
    """Copies `tree` to every device of the mesh. Every process has to pass the same values.

    A leaf that is replicated over this mesh already is returned as it is. Raises InputError for a non-numeric
    column (bytes, text, objects, times).
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:  # device_put takes no typed key to another process's devices
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, numeric(tree))


def process_rows(batch_size: int, mesh: Mesh) -> slice:
    """The rows of the global batch that this process reads: [p·b, (p + 1)·b) for process p, with b rows each.

    Raises InputError where the devices do not divide `batch_size`.
    """
    devices = mesh.devices.size
    if batch_size < 1 or batch_size % devices:
        raise InputError(
            f"batch size {batch_size} cannot be split over {devices} devices, expected a multiple of {devices}: "
            f"use --batch-size {max(1, round(batch_size / devices)) * devices}"
        )
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def place(rows: Tree, mesh: Mesh, axis: int = 0) -> Tree:
    """Places a batch on the mesh: one global array for each leaf, from the rows that each process has.

    `axis` is the axis of the rows in every leaf: 0 for [B, ...], 1 for [S, B, ...]. Raises InputError for a non-numeric
    column (bytes, text, objects, times).
    """
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
    put = lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf))
    return jax.tree.map(put, numeric(rows))


def sharded(tree: Tree, mesh: Mesh, axis: int = 0) -> Tree:
    """Splits `tree` over the devices along `axis`. Every process has to pass the whole tree."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    def put(leaf: Any) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree)


def numeric(tree: Tree) -> Tree:
    """`tree`. Raises InputError for a leaf that no device can hold: a column of bytes, text, objects or times."""
    if all(map(_is_numeric, jax.tree.leaves(tree))):  # without the paths, as this is called once per step
        return tree
    path, leaf = next(each for each in jax.tree_util.tree_leaves_with_path(tree) if not _is_numeric(each[1]))
    raise InputError(
        f"column {leaf_name(path)!r} is {np.asarray(leaf).dtype.name}, expected "
        "a numeric dtype; encode it as integers, such as ids, or leave the column out"
    )


def _is_numeric(leaf: Any) -> bool:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_, jax.dtypes.prng_key))
