"""Gradients without differentiation: estimates from values of a function alone, at points around the parameters.

An estimate is a function `(value, params, key) -> (the mean of the values, a tree like params)`, with which a step can
do what it does with `jax.value_and_grad`. `value` gives a scalar for params, and is evaluated in pairs on both sides of
them. `experiments/learning/black_box.py` is an example.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dl_jax.core.errors import require_positive
from dl_jax.core.step import Array, Tree

Value = Callable[[Tree], Array]  # params -> []
Estimate = Callable[[Value, Tree, Array], tuple[Array, Tree]]


def spsa(size: float) -> Estimate:
    """(f(θ + cΔ) − f(θ − cΔ)) / 2c · Δ, where every element of Δ is 1 or −1 at random and c is `size`.

    Simultaneous perturbation (Spall 1992, IEEE TAC 37(3), equation 2.2, where 1/Δ stands for Δ). It takes two values
    whatever the number of parameters. Raises InputError for a size that is not positive.
    """
    require_positive({"size": size})

    def estimate(value: Value, params: Tree, key: Array) -> tuple[Array, Tree]:
        signs = drawn(jax.random.rademacher, params, key, 1)
        values = on_both_sides(value, params, signs, size)
        return values.mean(), along(values / size, signs)

    return estimate


def evolution(size: float, pairs: int) -> Estimate:
    """1/2nσ · Σ (u(f(θ + σε)) − u(f(θ − σε))) ε over n pairs, where ε is normal, u ranks the values and σ is `size`.

    Evolution strategies with antithetic noise and centred ranks (Salimans et al. 2017, arXiv:1703.03864, section 2 and
    3). Ranks do not see the scale of the values, so the result has to be scaled, as Adam does. It takes 2n values.
    Raises InputError for a size that is not positive, and for no pairs.
    """
    require_positive({"size": size, "pairs": pairs})

    def estimate(value: Value, params: Tree, key: Array) -> tuple[Array, Tree]:
        noise = drawn(jax.random.normal, params, key, pairs)
        values = on_both_sides(value, params, noise, size)
        return values.mean(), along(centred_ranks(values) / size, noise)

    return estimate


def drawn(draw: Callable[..., Array], params: Tree, key: Array, n: int) -> Tree:
    """n random directions, a tree like params with leaves [n, ...], from a function `(key, shape, dtype) -> array`."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [draw(k, (n, *jnp.shape(x)), jnp.result_type(x)) for k, x in zip(keys, leaves, strict=True)]
    )


def on_both_sides(value: Value, params: Tree, directions: Tree, size: float) -> Array:  # -> [n, 2]
    """The values at params + size · direction and at params − size · direction, for directions with leaves [n, ...]."""
    moved = jax.tree.map(lambda p, d: p + size * jnp.stack([d, -d], 1), params, directions)  # [n, 2, ...]
    return jax.vmap(jax.vmap(value))(moved)


def along(values: Array, directions: Tree) -> Tree:  # [n, 2], leaves [n, ...]
    """1/2n · Σ (values on one side − those on the other) · direction, the mean of central differences times a size."""
    differences = (values[:, 0] - values[:, 1]) / 2
    return jax.tree.map(lambda d: jnp.tensordot(differences, d, 1) / len(differences), directions)


def centred_ranks(values: Array) -> Array:
    """The ranks of all elements, from −1/2 for the least to 1/2 for the largest; equal ones share their mean rank."""
    one, other = values[..., None], values.ravel()  # compared, and not subtracted, as values may be infinite
    beyond = (one > other).sum(-1) - (one < other).sum(-1)  # how many are below minus how many are above
    return beyond / (2 * (values.size - 1))
