"""What the tests of the zoo share: results for NumPy, and variables that need no compilation."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` whose results are NumPy's: JAX would compile every comparison of them."""
    compiled = jax.jit(function)
    return lambda *inputs: jax.device_get(compiled(*inputs))


def shapes(model: Any, *inputs: Any, **keywords: Any) -> Any:
    """The shapes and types of the variables that `model` starts with. Raises what the model raises."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **keywords))


def drawn(model: Any, *inputs: Any, spread: float = 1.0, **keywords: Any) -> Any:
    """Variables uniform in ± spread, biases too, by numpy: compiling the initialisers takes longer than the net."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.uniform(-spread, spread, leaf.shape).astype(leaf.dtype), shapes(model, *inputs, **keywords)
    )


def moved(tree: Any, by: float) -> Any:
    """Every number plus one uniform in ± by: biases start at zero, where one that is left out is not seen."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + rng.uniform(-by, by, leaf.shape).astype(leaf.dtype), tree)
