"""Quantised arithmetic against its definition, its derivatives against those of the paper, and its marks in a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.compress import grid
from dl_jax.core.equations import bound, evaluate, trace

X = np.random.default_rng(0).normal(0, 3, (40, 3)).astype(np.float32)
SCALE, ZERO, LEVELS = np.float32([[0.1, 0.3, 0.02]]), np.float32(5), 15


def test_the_definition():
    q = np.clip(np.round(X / SCALE) + ZERO, 0, LEVELS)
    np.testing.assert_array_equal(grid.fake_quantize(X, SCALE, ZERO, LEVELS), (q - ZERO) * SCALE)
    values = np.random.default_rng(1).integers(-127, 128, (40, 3), np.int8)
    np.testing.assert_array_equal(grid.dequantized(values, SCALE), values * SCALE)


def test_the_derivatives_are_those_of_the_paper():
    """Esser et al. 2020, equations 3 and 5, for each element: Q_N = zero, Q_P = levels − zero."""
    _, back = jax.vjp(lambda x, s: grid.fake_quantize(x, s, ZERO, LEVELS), X, np.broadcast_to(SCALE, X.shape))
    dx, ds = back(jnp.ones(X.shape))
    ratio = X.astype(np.float64) / SCALE
    below, above = ratio <= -ZERO - 0.5, ratio >= LEVELS - ZERO + 0.5
    np.testing.assert_array_equal(dx, np.where(below | above, 0, 1))
    expected = np.where(below, -ZERO, np.where(above, LEVELS - ZERO, np.round(ratio) - ratio))
    np.testing.assert_allclose(ds, expected, atol=1e-5)
    assert below.any()
    assert above.any()
    _, back = jax.vjp(lambda s: grid.dequantized(jnp.int8([[3, -4, 5]]), s), SCALE)
    np.testing.assert_array_equal(back(jnp.ones((1, 3)))[0], [[3, -4, 5]])


def net(kernel, x):
    x = grid.fake_quantize(jax.nn.relu(x), SCALE, ZERO, LEVELS)
    return jax.lax.scan(lambda c, row: (c + row @ grid.dequantized(*kernel), c), jnp.zeros(3), x)[0]


@pytest.mark.parametrize("change", [lambda f: f, jax.jit, lambda f: lambda k, x: jax.vmap(f, (None, 0))(k, x[None])[0]])
def test_calls_are_found_in_traces_of_traces(change):
    kernel = (jnp.ones((3, 3), jnp.int8), SCALE)
    found, levels = [], []

    def note(equation, inputs):
        if mark := grid.marked(equation):
            found.append(mark)
            levels.extend(inputs[3:])
        if equation.primitive.name == "scan":
            evaluate(
                equation.params["jaxpr"], [jnp.zeros(v.shape, v.dtype) for v in equation.params["jaxpr"].in_avals], note
            )
        return bound(equation, inputs)

    def again(kernel, x):
        called = trace(change(net), kernel, x)
        return called.result(evaluate(called.jaxpr, [*kernel, x], bound))

    called = trace(again, kernel, X)
    (result,) = evaluate(called.jaxpr, [*kernel, X], note)
    assert found == [grid.fake_quantize, grid.dequantized]
    assert levels == [LEVELS]
    np.testing.assert_allclose(result, net(kernel, X), rtol=1e-5)
