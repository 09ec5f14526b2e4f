"""Layers in the trace: whose they are, what they read, and that changing what they read is all that changes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.inspect import inputs, with_inputs
from dl_jax.models.recur import LSTM, Cell, recur

X = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)  # [B, T, D]


def drawn(model, *args, **kwargs):
    """Variables of random numbers: to compile an initialisation would take longer."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes)


def test_the_layers_of_flaxs_own_recurrent_network():
    """The gates' kernels stand side by side in one product, and the hidden state is met in every step."""
    model = nn.RNN(nn.OptimizedLSTMCell(4), return_carry=True)
    variables = drawn(model, X)
    found, outputs = jax.jit(lambda v: (inputs(model.apply)(v, X), model.apply(v, X)))(variables)
    assert set(found) == {f"cell/{kind}{gate}" for kind in "ih" for gate in "ifgo"}
    for gate in "ifgo":
        np.testing.assert_allclose(found[f"cell/i{gate}"][0].swapaxes(0, 1), X, rtol=1e-6)
        hidden = np.concatenate([np.zeros((1, 2, 4)), outputs[1].swapaxes(0, 1)[:-1]])
        np.testing.assert_allclose(found[f"cell/h{gate}"][0], hidden, atol=1e-6)


def step(params, h, x):
    return np.tanh(x @ params["i"]["kernel"] + params["i"]["bias"] + h @ params["h"]["kernel"])


def test_a_hidden_state_is_changed_in_every_step():
    model = nn.RNN(nn.SimpleCell(4))
    variables = drawn(model, X)
    changed = with_inputs(model.apply, lambda path, x: x / 2 if path == "cell/h" else x)
    found = jax.jit(changed)(variables, X)
    h = np.zeros((2, 4))
    for t in range(5):
        h = step(variables["params"]["cell"], h / 2, X[:, t])
        np.testing.assert_allclose(found[:, t], h, atol=1e-5)


def test_of_calls_with_derivatives_of_their_own_the_layers_are_found_and_the_gradients_right():
    cell: Cell = LSTM
    x, rng = X.swapaxes(0, 1), np.random.default_rng(2)
    params = {"in": {"kernel": rng.normal(size=(3, 16))}, "own": {"kernel": rng.normal(size=(4, 16))}}
    params = jax.tree.map(np.float32, params)

    def apply(variables, x, f=lambda x: x):
        p = variables["params"]
        start = (jnp.zeros((2, 4)),) * 2
        return recur(cell, p["own"]["kernel"], None, f(x) @ p["in"]["kernel"], start, None)[0]

    assert set(jax.eval_shape(inputs(apply), {"params": params}, x)) == {"in", "own"}
    half = with_inputs(apply, lambda path, x: x / 2 if path == "in" else x)
    of = lambda f: jax.jit(jax.value_and_grad(lambda p: (f({"params": p}, x) ** 2).sum()))(params)
    found, expected = of(half), of(functools.partial(apply, f=lambda x: x / 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_products_of_data_and_of_parameters_are_no_layers():
    """Attention multiplies data with data, and a kernel may be a product of parameters."""
    model = nn.MultiHeadDotProductAttention(1)
    found = jax.eval_shape(inputs(model.apply), drawn(model, X), X)
    assert {path: [x.shape for x in xs] for path, xs in found.items()} == {
        **{name: [(2, 5, 3)] for name in ("query", "key", "value")},
        "out": [(2, 5, 1, 3)],
    }
    low_rank = lambda variables, x: x @ (variables["params"]["a"]["left"] @ variables["params"]["a"]["right"])
    params = {"a": {"left": np.ones((3, 1)), "right": np.ones((1, 4))}, "unused": {"kernel": np.ones((3, 3))}}
    assert set(inputs(low_rank)({"params": params}, X)) == {"a"}


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap])
def test_layers_within_transformations(wrap):
    def apply(variables, x):
        return wrap(lambda x: jnp.tanh(x) @ variables["params"]["dense"]["kernel"])(x)

    variables = {"params": {"dense": {"kernel": np.ones((3, 2), np.float32)}}}
    np.testing.assert_allclose(inputs(apply)(variables, X)["dense"][0], np.tanh(X), rtol=1e-5)
    doubled = with_inputs(apply, lambda path, x: 2 * x)(variables, X)
    np.testing.assert_allclose(doubled, 2 * np.tanh(X) @ np.ones((3, 2)), rtol=1e-5)


def test_modes_and_collections_pass_through():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dropout(0.5, deterministic=not train)(nn.Conv(4, (3,))(x))
            return nn.BatchNorm(use_running_average=not train)(x)

    variables = drawn(Net(), X, train=False)
    settings = {"train": True, "rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
    of = lambda apply: jax.jit(lambda v: apply(v, X, **settings))(variables)
    same, exact = of(with_inputs(Net().apply, lambda path, x: x)), of(Net().apply)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), same, exact)


def test_a_function_without_layers():
    with pytest.raises(InputError, match="found no layer that has a kernel, expected at least one; give it a model"):
        inputs(lambda variables, x: x * variables["params"]["scale"])({"params": {"scale": 2.0}}, X)
