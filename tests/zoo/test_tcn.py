"""The temporal convolutional network against its definition: causality, receptive field, weight normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.models.sequence.tcn import TCN, CausalConv


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def initialised(model, x, scale=1.0):
    init = model.init if isinstance(model, CausalConv) else lambda key, x: model.init(key, x, train=False)
    return jax.tree.map(lambda leaf: scale * leaf, jax.jit(init)(jax.random.key(0), x))


def test_a_causal_convolution_is_its_equation():
    model, x = CausalConv(5, taps=3, dilation=2, dtype=jnp.float32), draw(2, 9, 4)
    params = {"kernel": draw(3, 4, 5, seed=1), "scale": draw(5, seed=2), "bias": draw(5, seed=3)}
    y = model.apply({"params": params}, x)
    v = params["kernel"].astype(np.float64)
    kernel = params["scale"] * v / np.sqrt((v**2).sum((0, 1)))
    for t in range(9):
        expected = params["bias"].astype(np.float64)
        for tap in range(3):
            if (past := t - 2 * (2 - tap)) >= 0:
                expected = expected + x[:, past] @ kernel[tap]
        np.testing.assert_allclose(y[:, t], expected + np.zeros((2, 1)), atol=1e-5)


def test_weight_normalisation_starts_as_the_plain_kernel_and_scales_it():
    model, x = CausalConv(5, taps=3, dilation=1, dtype=jnp.float32), draw(2, 9, 4)
    params = initialised(model, x)["params"]
    norms = np.sqrt((np.asarray(params["kernel"], np.float64) ** 2).sum((0, 1)))
    np.testing.assert_allclose(params["scale"], norms, rtol=1e-6)
    longer = {**params, "kernel": 7 * params["kernel"]}  # the direction alone counts
    np.testing.assert_allclose(model.apply({"params": longer}, x), model.apply({"params": params}, x), atol=1e-6)


@pytest.mark.parametrize(("levels", "taps"), [(1, 2), (2, 3), (3, 2), (2, 5)])
def test_the_gradient_shows_the_receptive_field(levels, taps):
    """Output t depends on the inputs t - field + 1 .. t, on all of them, and on no other."""
    model, t = TCN(outputs=3, hidden=8, levels=levels, taps=taps), 24
    x = draw(1, 30, 8)
    # Positive weights and inputs keep every ReLU on, so that no path is closed by chance.
    variables = jax.tree.map(jnp.abs, initialised(model, x, 20))
    gradient = jax.grad(lambda x: model.apply(variables, x, train=False)[0, t].sum())(abs(x))
    seen = np.flatnonzero(np.asarray(gradient[0]).any(-1))
    np.testing.assert_array_equal(seen, np.arange(t - model.receptive_field + 1, t + 1))


def test_the_papers_receptive_field():
    assert TCN(88, hidden=150, levels=2, taps=3).receptive_field == 1 + 2 * 2 * (1 + 2)
    assert TCN(10, hidden=25, levels=8, taps=7).receptive_field == 1 + 2 * 6 * 255


def test_parameter_count_of_the_chorale_model():
    params = initialised(TCN(88, hidden=150, levels=2, taps=3), draw(1, 5, 88))["params"]
    convolutions = 3 * 88 * 150 + 3 * (3 * 150 * 150) + 4 * 2 * 150
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == convolutions + 89 * 150 + 151 * 88


def test_a_block_is_two_convolutions_beside_its_input():
    model, x = TCN(outputs=3, hidden=4, levels=1, taps=2), draw(2, 6, 4)
    params = initialised(model, x, 30)["params"]
    conv = CausalConv(4, taps=2, dilation=1, dtype=jnp.float32)
    inner = x
    for name in ("CausalConv_0", "CausalConv_1"):
        inner = np.maximum(conv.apply({"params": params["Block_0"][name]}, inner), 0)
    expected = np.maximum(x + inner, 0) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, x, train=False), expected, rtol=1e-5, atol=1e-6)


def test_dropout_drops_whole_channels_in_training_only():
    model, x = TCN(outputs=3, hidden=6, levels=1, taps=2, dropout=0.5), abs(draw(4, 9, 6))
    variables = jax.tree.map(jnp.abs, initialised(model, x, 20))  # every unit is on
    _, kept = model.apply(
        variables, x, train=True, rngs={"dropout": jax.random.key(1)}, capture_intermediates=True, mutable=True
    )
    (dropped,) = kept["intermediates"]["Block_0"]["Dropout_1"]["__call__"]
    zero = np.asarray(dropped == 0)
    np.testing.assert_array_equal(zero.any(1), zero.all(1))
    assert zero.any()
    assert not zero.all()
    still = model.apply(variables, x, train=False)
    np.testing.assert_array_equal(still, model.clone(dropout=0.0).apply(variables, x, train=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"taps": 0}, "taps is 0"), ({"levels": 0}, "levels is 0"), ({"hidden": 0}, "hidden is 0"),
     ({"dropout": -0.1}, "dropout is -0.1, expected a probability")],
)  # fmt: skip
def test_a_network_that_cannot_be_is_refused(change, message):
    model = TCN(outputs=3, hidden=4, levels=1, taps=2).clone(**change)
    with pytest.raises(InputError, match=message):
        initialised(model, draw(2, 6, 4))
