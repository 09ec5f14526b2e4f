"""Binary and ternary weights in training. All gradients go straight through.

Courbariaux, Bengio and David, "BinaryConnect", NIPS 2015 (arXiv:1511.00363), sections 2.2 to 2.4. Li and Liu, "Ternary
weight networks", 2016 (arXiv:1605.04711), section 2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dl_jax.compress.quantize.weights import of_chosen, straight_through
from dl_jax.core.leaves import Where, at_least_float32, chosen, is_kernel
from dl_jax.core.step import Array, Batch, Loss, Tree


def binary(where: Where = is_kernel) -> Callable[[Tree], Tree]:
    """Returns a function params -> params of the signs, 1 for 0 (equation 1), for `losses.with_params`."""
    return lambda params: of_chosen(
        params, where, lambda path, w: straight_through(w, _signs(at_least_float32(w) >= 0, w))
    )


def stochastic_binary(key: Array, params: Tree, where: Where = is_kernel) -> Tree:
    """The chosen weights as 1 with probability clip((w + 1) / 2, 0, 1), and -1 otherwise (equations 2 and 3)."""

    def draw(path: jax.tree_util.KeyPath, w: Array) -> Array:
        own = jax.random.fold_in(key, [name for name, _ in leaves].index(path))
        wide = at_least_float32(w)
        up = jax.random.uniform(own, w.shape, wide.dtype) < jnp.clip((wide + 1) / 2, 0, 1)
        return straight_through(w, _signs(up, w))

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return of_chosen(params, where, draw)


def with_stochastic_binary(loss: Loss, where: Where = is_kernel) -> Loss:
    """Loss of the network with weights drawn by `stochastic_binary`, anew in each step."""

    def drawn(variables: Tree, batch: Batch, key: Array) -> tuple[Array, tuple[Tree, Tree]]:
        key_weights, key = jax.random.split(key)
        return loss({**variables, "params": stochastic_binary(key_weights, variables["params"], where)}, batch, key)

    return drawn


def within_one(where: Where = is_kernel) -> optax.GradientTransformation:
    """The last transform of a chain: keeps the chosen weights in [-1, 1], beyond which they change no sign (2.4)."""

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        if params is None:
            raise ValueError("within_one: update got no params, expected the current ones; call tx.update(..., params)")
        clip = lambda u, p, yes: jnp.clip(p + u, -1, 1) - p if yes else u
        return jax.tree.map(clip, updates, params, chosen(params, where)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def ternary(where: Where = is_kernel) -> Callable[[Tree], Tree]:
    """Returns a function params -> params of a · {-1, 0, 1}, with one a for each weight, for `losses.with_params`.

    Weights of at most 0.7 mean |w| become 0 (equation 6), and a is the mean magnitude of the others (equation 5).
    """

    def of(path: jax.tree_util.KeyPath, w: Array) -> Array:
        wide = at_least_float32(w)
        size = jnp.abs(wide)
        kept = size > 0.7 * size.mean()
        scale = jnp.where(kept, size, 0).sum() / jnp.maximum(kept.sum(), 1)
        return straight_through(w, jnp.where(kept, jnp.sign(wide), 0) * scale)

    return lambda params: of_chosen(params, where, of)


def _signs(up: Array, w: Array) -> Array:
    return jnp.where(up, 1, -1).astype(at_least_float32(w).dtype)
