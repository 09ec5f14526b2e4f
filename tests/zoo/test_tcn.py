"""The temporal convolutional network against its definition: causality, receptive field, weight normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.sequence.tcn import TCN, CausalConv


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_a_causal_convolution_is_its_equation():
    model, x = CausalConv(5, taps=3, dilation=2, dtype=jnp.float32), draw(2, 9, 4)
    params = {"kernel": draw(3, 4, 5, seed=1), "scale": draw(5, seed=2), "bias": draw(5, seed=3)}
    y = jit(lambda params: model.apply({"params": params}, x))(params)
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
    params = jit(lambda: model.init(jax.random.key(0), x))()["params"]
    assert 0.008 < params["kernel"].std() < 0.012  # the supplement's 0.01, of 60 draws
    norms = np.sqrt((params["kernel"].astype(np.float64) ** 2).sum((0, 1)))
    np.testing.assert_allclose(params["scale"], norms, rtol=1e-6)
    assert not params["bias"].any()
    longer = {**params, "kernel": 7 * params["kernel"]}  # the direction alone counts
    apply = jit(lambda params: model.apply({"params": params}, x))
    np.testing.assert_allclose(apply(longer), apply(params), atol=1e-6)


def test_a_channel_of_zeros_is_zero_and_has_a_gradient():
    model, x = CausalConv(2, taps=3, dilation=1, dtype=jnp.float32), draw(1, 4, 2)
    kernel = draw(3, 2, 2, seed=1)
    kernel[..., 1] = 0
    params = {"kernel": kernel, "scale": np.array([2.0, 3.0], np.float32), "bias": np.zeros(2, np.float32)}
    total = lambda params: (lambda y: (y.sum(), y))(model.apply({"params": params}, x))
    (_, y), grads = jit(jax.value_and_grad(total, has_aux=True))(params)
    assert not y[..., 1].any()
    assert y[..., 0].all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(grads["kernel"][2, :, 1], 3 * x.sum((0, 1)), rtol=1e-5)  # of the present: scale · x
    assert grads["scale"][1] == 0


@pytest.mark.parametrize(("levels", "taps"), [(1, 2), (2, 3), (3, 2)])
def test_the_gradient_shows_the_receptive_field(levels, taps):
    """Output t depends on the inputs t - field + 1 .. t, on all of them, and on no other."""
    model, t = TCN(outputs=3, hidden=4, levels=levels, taps=taps), 19
    x = draw(1, 22, 4)
    # Positive weights and inputs keep every ReLU on, so that no path is closed by chance.
    variables = jax.tree.map(abs, drawn(model, x, spread=0.3, train=False))
    gradient = jit(jax.grad(lambda x: model.apply(variables, x, train=False)[0, t].sum()))(abs(x))
    seen = np.flatnonzero(np.asarray(gradient[0]).any(-1))
    np.testing.assert_array_equal(seen, np.arange(t - model.receptive_field + 1, t + 1))


def test_the_papers_receptive_field():
    assert TCN(88, hidden=150, levels=2, taps=3).receptive_field == 1 + 2 * 2 * (1 + 2)
    assert TCN(10, hidden=25, levels=8, taps=7).receptive_field == 1 + 2 * 6 * 255


def test_parameter_count_of_the_chorale_model():
    params = shapes(TCN(88, hidden=150, levels=2, taps=3), draw(1, 5, 88), train=False)["params"]
    convolutions = 3 * 88 * 150 + 3 * (3 * 150 * 150) + 4 * 2 * 150
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == convolutions + 89 * 150 + 151 * 88


def test_a_block_is_two_convolutions_beside_its_input():
    """The second block is dilated and as wide as its input, the first is wider and has a linear shortcut."""
    model, x = TCN(outputs=3, hidden=4, levels=2, taps=2), draw(2, 6, 5)
    params = drawn(model, x, train=False)["params"]

    def written_out(params):
        y = x
        for level in range(2):
            conv, block = CausalConv(4, taps=2, dilation=2**level, dtype=jnp.float32), params[f"Block_{level}"]
            inner = y
            for name in ("CausalConv_0", "CausalConv_1"):
                inner = jnp.maximum(conv.apply({"params": block[name]}, inner), 0)
            y = y @ block["Dense_0"]["kernel"] + block["Dense_0"]["bias"] if level == 0 else y
            y = jnp.maximum(y + inner, 0)
        return y @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]

    found = jit(lambda params: model.apply({"params": params}, x, train=False))(params)
    np.testing.assert_allclose(found, jit(written_out)(params), rtol=1e-5, atol=1e-6)


def test_dropout_drops_whole_channels_in_training_only():
    model, x = TCN(outputs=3, hidden=6, levels=1, taps=2, dropout=0.5), abs(draw(4, 9, 6))
    variables = jax.tree.map(abs, drawn(model, x, train=False))  # every unit is on
    options = {"capture_intermediates": True, "mutable": True, "rngs": {"dropout": jax.random.key(1)}}

    def outputs(variables):
        _, kept = model.apply(variables, x, train=True, **options)
        never, still = model.clone(dropout=0.0).apply(variables, x, train=True), model.apply(variables, x, train=False)
        return kept["intermediates"]["Block_0"], never, still

    block, never, still = jit(outputs)(variables)
    for name in ("Dropout_0", "Dropout_1"):
        zero = block[name]["__call__"][0] == 0
        np.testing.assert_array_equal(zero.any(1), zero.all(1))
        assert zero.any()
        assert not zero.all()
    np.testing.assert_array_equal(still, never)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"taps": 0}, "taps is 0"), ({"levels": 0}, "levels is 0"), ({"hidden": 0}, "hidden is 0"),
     ({"dropout": -0.1}, "dropout is -0.1, expected a probability")],
)  # fmt: skip
def test_a_network_that_cannot_be_is_refused(change, message):
    model = TCN(outputs=3, hidden=4, levels=1, taps=2).clone(**change)
    with pytest.raises(InputError, match=message):
        shapes(model, draw(2, 6, 4), train=False)


@pytest.mark.parametrize("shape", [(6, 4), (2, 0, 4), (0, 6, 4), (2, 6, 0), (2, 3, 6, 4)])
def test_what_is_no_batch_of_sequences_is_refused(shape):
    model = TCN(outputs=3, hidden=4, levels=1, taps=2)
    with pytest.raises(InputError, match=r"^x of shape \(.*\), expected \[B, T, D\], one or more of each; reshape it"):
        shapes(model, np.zeros(shape, np.float32), train=False)


def test_sequences_of_another_width_than_the_parameters_are_refused():
    model = TCN(outputs=3, hidden=4, levels=1, taps=2)
    variables = drawn(model, draw(2, 6, 4), train=False)
    with pytest.raises(InputError, match=r"^5 features in \(2, 6, 5\), expected 4 as in the parameters of TCN; "):
        model.apply(variables, draw(2, 6, 5), train=False)
