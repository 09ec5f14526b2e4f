"""A replay buffer: the newest rows that were written to it, of fixed size, so that it can be part of a state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Tree


class Replay(NamedTuple):
    """The newest N rows. Row i that was written, counted from 0, is at i modulo N."""

    rows: Tree  # every leaf [N, ...]
    written: Array  # int32 [], rows so far


def empty(size: int, row: Tree) -> Replay:
    """A buffer for `size` rows like `row`, a tree of arrays or of shapes. Raises InputError for a size below 1."""
    if size < 1:
        raise InputError(f"the size of a replay buffer is {size} rows, expected 1 or more; give a larger one")
    return Replay(jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), row), jnp.zeros([], jnp.int32))


def pushed(replay: Replay, rows: Tree) -> Replay:
    """The buffer with B more rows, leaves [B, ...], in place of the oldest.

    Raises InputError for more rows than it holds.
    """
    size, new = (len(jax.tree.leaves(tree)[0]) for tree in (replay.rows, rows))
    if new > size:
        raise InputError(f"{new} rows for a replay buffer of {size}, expected no more than it holds; make it larger")
    places = (replay.written + jnp.arange(new)) % size
    return Replay(jax.tree.map(lambda old, x: old.at[places].set(x), replay.rows, rows), replay.written + new)


def drawn(replay: Replay, key: Array, n: int) -> Tree:
    """n of the rows, leaves [n, ...], each drawn from all with equal probability. The buffer must not be empty."""
    held = jnp.minimum(replay.written, len(jax.tree.leaves(replay.rows)[0]))
    places = jax.random.randint(key, (n,), 0, held)
    return jax.tree.map(lambda x: x[places], replay.rows)
