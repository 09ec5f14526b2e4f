"""A traced call without nested calls computes what the function computes, with the function's own derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core import equations


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, scale=1.0):  # [B, T, 3]
        x = nn.relu(nn.Dense(4)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
        return {"logits": jax.checkpoint(jnp.tanh)(x) * scale}


X = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)


def names(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name in equations.DERIVATIVES:
            continue
        for value in equation.params.values():
            for each in value if isinstance(value, tuple) else (value,):
                if hasattr(getattr(each, "jaxpr", each), "eqns"):
                    yield from names(getattr(each, "jaxpr", each))


@pytest.mark.parametrize("train", [False, True])
def test_a_trace_computes_what_the_function_does(train):
    variables = Net().init(jax.random.key(0), X, train=False)
    settings = {"train": train, "rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"], "scale": 2.0}
    called = equations.trace(Net().apply, variables, X, **settings)
    inputs = [*jax.tree.leaves(variables), *called.others]
    found = called.result(equations.evaluate(called.jaxpr, inputs, equations.bound))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, Net().apply(variables, X, **settings))
    assert not {*names(called.jaxpr.jaxpr)} & {*equations.CALLS, "platform_index"}
    assert [jax.tree_util.keystr(path) for path in called.paths] == [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    ]


def test_loops_branches_and_platforms():
    def f(v, x):
        x = jax.lax.platform_dependent(x, cpu=lambda x: x + 100, default=lambda x: x + v)
        x = jax.lax.cond(x[0] > 0, jax.jit(lambda x: 2 * x), jax.jit(lambda x: -x), x)
        x = jax.lax.while_loop(jax.jit(lambda x: x[0] < 10), jax.jit(lambda x: x + 1), x)
        return jax.lax.scan(lambda c, _: (jax.jit(lambda c: c * v)(c), c), x, length=3)

    called = equations.trace(f, 2.0, jnp.ones(2))
    assert not {*names(called.jaxpr.jaxpr)} & {*equations.CALLS, "platform_index"}
    last, each = called.result(equations.evaluate(called.jaxpr, [2.0, *called.others], equations.bound))
    np.testing.assert_array_equal(each[:, 0], [10, 20, 40])  # ((1 + 2) * 2 = 6, then up to 10)
    np.testing.assert_array_equal(last, [80, 80])


def test_custom_derivatives_stay():
    called = equations.trace(lambda v, x: jax.nn.relu(v * x).sum(), 1.0, jnp.zeros(2))
    f = lambda x: equations.evaluate(called.jaxpr, [1.0, x], equations.bound)[0]
    np.testing.assert_array_equal(jax.grad(f)(jnp.zeros(2)), [0, 0])  # that of a maximum would be 1/2
