"""Compiling for devices that are not there: within `planning`, fits and evaluations are handed over, not run."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dl_jax.core.step import State, Tree


class Feed(NamedTuple):
    """What the host does for a call of a fit's program."""

    steps: int  # by which a call advances `state.step`
    batch_size: int | None  # rows of a step; None where the stream does not say
    row_bytes: int  # of the batches of a call, over all hosts
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
    take: Callable[[Program], None]


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def planning(target: Target) -> Iterator[None]:
    """A context in which `fit` and evaluations compute nothing: they give their programs to `target`.

    A fit then returns the state that it was given, and all metrics and measurements are NaN.
    """
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


def planned() -> Target | None:
    """The target of the plan that is being made; None where programs are to run."""
    return _TARGET.get()


def abstract(tree: Tree, shardings: Tree) -> Tree:
    """Shapes and types in place of arrays, with their shardings."""

    def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jax.dtypes.extended):
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)

    return jax.tree.map(one, tree, shardings)


def unknown(shapes: Tree) -> Tree:
    """Arrays of NaN of these shapes, and zeros where the type has no NaN."""
    fill = lambda s: np.full(s.shape, np.nan if np.issubdtype(s.dtype, np.inexact) else 0, s.dtype)
    return jax.tree.map(fill, shapes)
