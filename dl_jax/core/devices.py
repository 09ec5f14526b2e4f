"""Where arrays lie: a mesh of devices with two axes, one for the seeds and one for the rows of a batch.

`jax.jit` over arrays placed like this inserts the all-reduce of the gradient over the rows. The same code therefore
runs on one device and on many, and BatchNorm's statistics are those of the global batch. Seeds have nothing to tell
each other, so devices that differ in their seeds do not communicate.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name
from dl_jax.core.step import SEED, Tree

DATA = "data"  # the axis of a mesh over which the rows of a batch are split
WORTH_SPLITTING = 2**15  # numbers in a leaf; a smaller one costs more to gather than it saves


def data_mesh(
    devices: Sequence[Any] | None = None, *, batch_size: int | None = None, seeds: int = 1, by_process: bool = True
) -> Mesh:
    """A mesh ("seed", "data") of `devices` (default: all devices of all processes), process after process.

    Without `batch_size` it is [1, all devices]. With it, the mesh takes as many devices from each process as it can,
    and splits the seeds first and the rows of the batch second: s of [s, d] divides the number of seeds, and d the
    batch size. Of the splits that use equally many devices it is the one with most in s. So 16 seeds on 16 devices are
    [16, 1], 5 seeds of batches of 128 rows [1, 16], and one of 100 rows on 8 devices [1, 5]. Each process gives equally
    many devices, unless `by_process` is False. On TPUs d also divides the number of all devices: libtpu refuses an
    all-reduce over 12 of 16 chips.
    """
    # Not jax.make_mesh: it orders devices by the links of a TPU slice, and a process's rows would not be contiguous.
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    shape = (1, len(devices))
    if batch_size:
        key = lambda device: device.process_index if by_process else 0
        processes = [list(own) for _, own in itertools.groupby(devices, key=key)]
        of = len(devices) if devices[0].platform == "tpu" else None
        shape, each = _split(min(map(len, processes)), len(processes), batch_size, seeds, of)
        devices = [device for own in processes for device in own[:each]]
    # Auto: with Explicit axes, the default, a Linen CNN with Dropout raises ShardingTypeError.
    return Mesh(np.array(devices).reshape(shape), (SEED, DATA), axis_types=(AxisType.Auto,) * 2)


def _split(most: int, processes: int, batch_size: int, seeds: int, of: int | None) -> tuple[tuple[int, int], int]:
    """The shape [s, d] of the mesh, where d divides `of`, and the number of devices that it takes from each process."""
    for each in range(most, 0, -1):
        n = each * processes
        for s in range(min(n, seeds), 0, -1):
            whole = n % s == 0 and seeds % s == 0 and math.gcd(batch_size, of or batch_size) % (n // s) == 0
            if whole and ((n // s) % each == 0 or each % (n // s) == 0):  # a process holds a block of seeds and rows
                return (s, n // s), each
    return (1, processes), 1  # `own` refuses it


class Block(NamedTuple):
    """What a process holds of a batch [S, B, ...]."""

    seeds: slice
    rows: slice


def own(mesh: Mesh, batch_size: int, seeds: int = 1) -> Block:
    """The seeds and the rows of a global batch [S, B, ...] that this process reads.

    Raises InputError where the devices do not divide `batch_size`.
    """
    devices = mesh.shape[DATA]
    if batch_size < 1 or batch_size % devices:
        raise InputError(
            f"batch size {batch_size} cannot be split over {devices} devices, expected a multiple of {devices}: "
            f"use --batch-size {max(1, round(batch_size / devices)) * devices}"
        )
    here = [
        place
        for place, device in zip(np.ndindex(mesh.devices.shape), mesh.devices.flat, strict=True)
        if device.process_index == jax.process_index()
    ]
    sizes = seeds // mesh.shape[SEED], batch_size // devices
    first, last = (min(here), max(here)) if here else ((0, 0), (mesh.shape[SEED] - 1, devices - 1))
    return Block(*(slice(a * size, (b + 1) * size) for a, b, size in zip(first, last, sizes, strict=True)))


def rows_over(mesh: Mesh, seeds: bool, leading: int = 0) -> NamedSharding:
    """How a batch lies: [B, ...], with `seeds` [S, B, ...], and with further `leading` axes [k, S, B, ...]."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, *[SEED] * seeds, DATA))


def replicated(tree: Tree, mesh: Mesh) -> Tree:
    """Copies `tree` to every device of the mesh. Every process has to pass the same values.

    Raises InputError for a non-numeric column (bytes, text, objects, times).
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return put(numeric(tree), jax.tree.map(lambda _: whole, tree))


def put(tree: Tree, shardings: Tree) -> Tree:
    """Places every leaf of `tree` as its sharding says. Every process has to pass the whole tree, with equal values.

    A leaf that lies there already is returned as it is, and one that lies on several processes is copied to each first.
    """

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:  # device_put takes no typed key to another process
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
        values = np.asarray(whole(leaf))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(one, tree, shardings)


def place(block: Tree, sharding: NamedSharding, shape: Sequence[int]) -> Tree:
    """Places a batch: one global array for each leaf, from the block of it that each process has.

    `shape` is that of the axes that the leaves of the global batch have in common, such as (S, B). Raises InputError
    for a non-numeric column (bytes, text, objects, times).
    """

    def one(leaf: Any) -> jax.Array:
        values = np.asarray(leaf)
        whole = (*shape, *values.shape[len(shape) :])
        return jax.make_array_from_process_local_data(sharding, values, whole)

    return jax.tree.map(one, numeric(block))


def states_over(tree: Tree, mesh: Mesh, seeds: int | None, fsdp: bool = False) -> Tree:
    """How a train state lies, a tree of shardings: [S, ...] over the seeds, copied over the rows.

    `seeds` is S, or None for a state without the axis of seeds. With `fsdp`, the longest axis of each large leaf is
    also split over "data", if that divides it. Raises InputError where `fsdp` finds nothing to split.
    """
    devices = mesh.shape[DATA]

    def spec(leaf: Any) -> PartitionSpec:
        shape = np.shape(leaf)
        led = seeds is not None and shape[:1] == (seeds,) and mesh.shape[SEED] > 1
        names: list[str | None] = [SEED if led else None, *[None] * len(shape)][: len(shape)]
        free = [i for i in range(seeds is not None, len(shape)) if shape[i] % devices == 0]
        if fsdp and free and math.prod(shape[seeds is not None :]) >= WORTH_SPLITTING:
            names[max(free, key=lambda i: shape[i])] = DATA
        return PartitionSpec(*names)

    specs = jax.tree.map(spec, tree)
    if fsdp and not any(
        DATA in each for each in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    ):
        largest = max((math.prod(np.shape(leaf)[seeds is not None :]) for leaf in jax.tree.leaves(tree)), default=0)
        raise InputError(
            f"--fsdp finds nothing to split over {devices} devices: the largest array of a seed has {largest} numbers, "
            f"expected an array of {WORTH_SPLITTING} or more with an axis that {devices} divides; leave it out"
        )
    return jax.tree.map(lambda each: NamedSharding(mesh, each), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def fetched(tree: Tree) -> Tree:
    """`tree` as NumPy arrays on the host, whole on every process. Typed keys are not allowed.

    All processes have to call it together, as they send each other what one of them has only in part.
    """
    return jax.device_get(jax.tree.map(whole, tree))


def whole(leaf: Any) -> Any:
    """`leaf`, copied to all of its devices if this process has only a part of it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    assert isinstance(leaf.sharding, NamedSharding)
    return _everywhere(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)


@functools.cache
def _everywhere(sharding: NamedSharding) -> Any:
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)


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
