"""Compiling for devices that are not there: within `planning`, fits and evaluations are handed over, not run."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from dl_jax.core.devices import DATA, data_mesh
from dl_jax.core.step import SEED, State, Tree


class Feed(NamedTuple):
    """What the host does for a call of a fit's program."""

    steps: int  # by which a call advances `state.step`
    batch_size: int | None  # rows of a step; None where the stream does not say
    seconds: float  # that reading a call's batches has taken here, on one thread, for all hosts
    state: State  # shapes and shardings


class Program(NamedTuple):
    """A compiled program in the making."""

    name: str  # of the fit, or "evaluation"
    traced: Any  # a `jax.stages.Traced` of arguments with shardings
    mesh: Mesh
    feed: Feed | None  # None for an evaluation


class Target(NamedTuple):
    """For which devices to compile, and who takes the programs."""

    devices: Sequence[Any]
    memory: float  # bytes of a device
    take: Callable[[Program], None]


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def planning(target: Target) -> Iterator[None]:
    """A context in which `fit` and evaluations compute nothing: they give their programs to `target`.

    A fit then returns the state that it was given, and metrics and measurements are made up: see `unknown`.
    """
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


def planned() -> Target | None:
    """The target of the plan that is being made; None where programs are to run."""
    return _TARGET.get()


def mesh_of(batch_size: int, seeds: int) -> Mesh:
    """The mesh of `data_mesh` on the devices of this run, or on those that a plan is made for.

    A run needs a part of the batch for each of its processes. A plan that finds none is made for the most devices that
    can share the batch, whosever they are.
    """
    target = planned()
    if not target:
        return data_mesh(batch_size=batch_size, seeds=seeds)
    shape = data_mesh(target.devices, batch_size=batch_size, seeds=seeds).devices.shape
    if batch_size % shape[1]:
        shape = data_mesh(target.devices, batch_size=batch_size, seeds=seeds, by_process=False).devices.shape
    # The first devices of the slice, because libtpu does not compile for one device of each host.
    devices = sorted(target.devices, key=lambda device: device.id)[: math.prod(shape)]
    return Mesh(np.array(devices).reshape(shape), (SEED, DATA), axis_types=(AxisType.Auto,) * 2)


def abstract(tree: Tree, shardings: Tree) -> Tree:
    """Shapes and types in place of arrays, with their shardings."""

    def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jax.dtypes.extended):
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)

    return jax.tree.map(one, tree, shardings)


def unknown(shapes: Tree) -> Tree:
    """Numbers from 0 to 1 of these shapes, in place of what is not computed.

    They are drawn at random: experiments that look for the best of equal numbers, or of NaN, would not go on.
    """
    random = np.random.default_rng(0)
    return jax.tree.map(lambda shape: random.random(shape.shape).astype(shape.dtype), shapes)
