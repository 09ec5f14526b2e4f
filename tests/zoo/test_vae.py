"""The autoencoders against numpy and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.generative.vae import VAE, ConvVAE, TwoLayerVAE, mean_image_bias

RNG = np.random.default_rng(0)
IMAGE = np.zeros((1, 28, 28, 1), np.float32)
SMALL = {"latents": 5, "shape": (8, 12, 1)}
SMALL_IMAGE = RNG.random((3, 8, 12, 1), np.float32)


def test_vae_has_the_papers_layers():
    params = shapes(VAE(), IMAGE, train=False)["params"]
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(net)) for name, net in params.items()}
    encoder = (784 * 200 + 200) + (200 * 200 + 200) + 2 * (200 * 50 + 50)
    decoder = (50 * 200 + 200) + (200 * 200 + 200) + (200 * 784 + 784)
    assert count == {"encoder": encoder, "decoder": decoder}


def test_vae_starts_after_glorot_and_bengio():
    params = jit(lambda: VAE(hidden=(40, 30), **SMALL).init(jax.random.key(0), SMALL_IMAGE, train=False))()["params"]
    for layer in (*params["encoder"].values(), *params["decoder"].values()):
        largest = (6 / sum(layer["kernel"].shape)) ** 0.5
        assert 0.97 * largest < abs(layer["kernel"]).max() <= largest
        assert not layer["bias"].any()


def test_vae_against_numpy():
    model = VAE(hidden=(7, 6), **SMALL)
    variables = drawn(model, SMALL_IMAGE, spread=0.5, train=False)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def network(layers, x):
        x = np.tanh(x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])
        x = np.tanh(x @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"])
        return x @ layers["Dense_2"]["kernel"] + layers["Dense_2"]["bias"]

    mean, log_sigma = np.split(network(params["encoder"], SMALL_IMAGE.reshape(3, -1).astype(np.float64)), 2, -1)
    logits = network(params["decoder"], mean).reshape(3, 8, 12, 1)
    found = jit(lambda variables: model.apply(variables, SMALL_IMAGE, train=False))(variables)
    for value, expected in zip(found, (logits, mean, np.log(np.exp(log_sigma) ** 2)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_two_layers_against_numpy():
    model = TwoLayerVAE(hidden=(7, 6), top=2, top_hidden=(4, 3), **SMALL)
    variables = drawn(model, SMALL_IMAGE, spread=0.5, train=False)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def network(name, x):
        layers = params[name]
        for layer in ("Dense_0", "Dense_1"):
            x = np.tanh(x @ layers[layer]["kernel"] + layers[layer]["bias"])
        return x @ layers["Dense_2"]["kernel"] + layers["Dense_2"]["bias"]

    mean, log_sigma = np.split(network("encoder", SMALL_IMAGE.reshape(3, -1)), 2, -1)
    top, top_log_sigma = np.split(network("top_encoder", mean), 2, -1)
    below, below_log_sigma = np.split(network("top_decoder", top), 2, -1)
    logits = network("decoder", below).reshape(3, 8, 12, 1)
    found = jit(lambda variables: model.apply(variables, SMALL_IMAGE, train=False))(variables)
    call = lambda x, method: jit(lambda x: model.apply(variables, x, method=method))(np.float32(x))
    up, down = call(mean, TwoLayerVAE.encode_top), call(top, TwoLayerVAE.decode_top)
    expected = logits, mean, 2 * log_sigma, top, 2 * top_log_sigma, below, 2 * below_log_sigma
    for value, right in zip((*found, *up, *down), expected, strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=1e-5)


def test_transposed_convolutions_against_brute_force():
    """Each entry of the input grid adds a 4 x 4 kernel to the output, at steps of two pixels, one over the edge."""
    model = ConvVAE(features=(4, 6), **SMALL)
    variables = drawn(model, SMALL_IMAGE, spread=0.5, train=False)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["decoder"])
    z = RNG.normal(size=(2, 5)).astype(np.float32)

    def doubled(x, layer):  # [B, H, W, C] -> [B, 2 H, 2 W, features]
        canvas = np.zeros((len(x), 2 * x.shape[1] + 2, 2 * x.shape[2] + 2, layer["bias"].size))
        flipped = layer["kernel"][::-1, ::-1]  # Flax's transposed convolution correlates the stretched input
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                canvas[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("bc,hwcf->bhwf", x[:, i, j], flipped)
        return canvas[:, 1:-1, 1:-1] + layer["bias"]

    x = (z @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]).reshape(2, 2, 3, 6)
    for name in ("ConvTranspose_0", "ConvTranspose_1"):
        x = doubled(np.maximum(x, 0), params[name])
    found = jit(lambda variables, z: model.apply(variables, z, method=ConvVAE.decode))(variables, z)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_halving_convolutions_against_brute_force():
    """Each output depends on 4 x 4 pixels, at steps of two pixels, one pixel over the edge."""
    model = ConvVAE(features=(4, 6), **SMALL)
    variables = drawn(model, SMALL_IMAGE, spread=0.5, train=False)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["encoder"])
    x = SMALL_IMAGE.astype(np.float64)
    for name in ("Conv_0", "Conv_1"):
        padded, kernel = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), params[name]["kernel"]
        x = np.zeros((3, x.shape[1] // 2, x.shape[2] // 2, kernel.shape[-1]))
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                x[:, i, j] = np.einsum("bhwc,hwcf->bf", padded[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4], kernel)
        x = np.maximum(x + params[name]["bias"], 0)
    mean, log_sigma = np.split(x.reshape(3, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 2, -1)
    found = jit(lambda variables: model.apply(variables, SMALL_IMAGE, method=ConvVAE.encode))(variables)
    for value, expected in zip(found, (mean, 2 * log_sigma), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [VAE(hidden=(7, 6), **SMALL), ConvVAE(features=(4, 6), **SMALL)])
def test_any_number_of_samples_is_decoded_at_once(model):
    variables = drawn(model, SMALL_IMAGE, spread=0.3, train=False)
    z = RNG.normal(size=(2, 4, 3, 5)).astype(np.float32)
    decode = jit(lambda z: model.apply(variables, z, method=type(model).decode))
    together = decode(z)
    assert together.shape == (2, 4, 3, 8, 12, 1)
    np.testing.assert_allclose(together[1, 2], decode(z[1, 2]), rtol=1e-5, atol=1e-5)


def test_the_output_bias_is_the_initialisers():
    paint = lambda key, shape, dtype: jnp.full(shape, 3.5, dtype)
    model = VAE(hidden=(7, 6), output_bias=paint, **SMALL)
    params = jit(lambda: model.init(jax.random.key(0), SMALL_IMAGE, train=False)["params"]["decoder"])()
    painted = {name: bool((layer["bias"] == 3.5).all()) for name, layer in params.items()}
    assert painted == {"Dense_0": False, "Dense_1": False, "Dense_2": True}


@pytest.mark.parametrize("model", [VAE, ConvVAE])
@pytest.mark.parametrize("latents", [0, -1])
def test_no_latent_unit(model, latents):
    with pytest.raises(InputError, match=f"{model.__name__} has {latents} latent units, expected 1 or more"):
        shapes(model(latents=latents), IMAGE, train=False)


def test_a_layer_without_units():
    for model, message in ((VAE(hidden=(4, 0)), "hidden is 0"), (ConvVAE(features=()), "features is 0")):
        with pytest.raises(InputError, match=message):
            shapes(model, IMAGE, train=False)
    with pytest.raises(InputError, match="top is 0"):
        shapes(TwoLayerVAE(top=0), IMAGE, train=False)


def test_pictures_of_another_shape():
    with pytest.raises(InputError, match=r"VAE takes images of shape \(8, 12, 1\), not \(28, 28, 1\)"):
        shapes(VAE(**SMALL), IMAGE, train=False)
    with pytest.raises(InputError, match=r"halves images 3 times, but got shape \(28, 28, 1\), expected .* 8 divides"):
        shapes(ConvVAE(features=(2, 2, 2)), IMAGE, train=False)


def test_the_bias_starts_at_the_mean_image():
    images = np.array([[[[0], [51], [255]]], [[[0], [102], [255]]]], np.uint8)
    model = VAE(hidden=(7,), latents=4, shape=(1, 3, 1), output_bias=mean_image_bias(images))
    image = np.zeros((1, 1, 3, 1), np.float32)
    bias = jit(lambda: model.init(jax.random.key(0), image, train=False)["params"]["decoder"]["Dense_1"]["bias"])()
    np.testing.assert_allclose(1 / (1 + np.exp(-bias)), [0.001, 0.3, 0.999], rtol=1e-5)
