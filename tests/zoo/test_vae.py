"""The autoencoders against numpy and brute force, and the parts of the experiment that trains them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.models.generative.vae import VAE, ConvVAE, mean_picture_bias

RNG = np.random.default_rng(0)
IMAGE = {"image": RNG.random((3, 28, 28, 1), np.float32)}
SMALL = {"latents": 5, "shape": (8, 12, 1)}
SMALL_IMAGE = RNG.random((3, 8, 12, 1), np.float32)


def initialised(model, image=IMAGE["image"]):
    variables = jax.jit(lambda: model.init(jax.random.key(0), image, train=False))()
    return jax.tree.map(lambda leaf: leaf + 0.1 * RNG.normal(size=leaf.shape).astype(np.float32), variables)


def test_vae_has_the_papers_layers():
    params = initialised(VAE())["params"]
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(net)) for name, net in params.items()}
    encoder = (784 * 200 + 200) + (200 * 200 + 200) + 2 * (200 * 50 + 50)
    decoder = (50 * 200 + 200) + (200 * 200 + 200) + (200 * 784 + 784)
    assert count == {"encoder": encoder, "decoder": decoder}
    kernel = VAE().init(jax.random.key(0), IMAGE["image"], train=False)["params"]["encoder"]["Dense_0"]["kernel"]
    largest = (6 / (784 + 200)) ** 0.5  # Glorot and Bengio
    assert 0.99 * largest < abs(kernel).max() <= largest


def test_vae_against_numpy():
    variables = initialised(VAE(hidden=(7, 6), **SMALL), SMALL_IMAGE)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def network(layers, x):
        x = np.tanh(x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])
        x = np.tanh(x @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"])
        return x @ layers["Dense_2"]["kernel"] + layers["Dense_2"]["bias"]

    mean, log_sigma = np.split(network(params["encoder"], SMALL_IMAGE.reshape(3, -1).astype(np.float64)), 2, -1)
    logits = network(params["decoder"], mean).reshape(3, 8, 12, 1)
    found = VAE(hidden=(7, 6), **SMALL).apply(variables, SMALL_IMAGE, train=False)
    for value, expected in zip(found, (logits, mean, np.log(np.exp(log_sigma) ** 2)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_transposed_convolutions_against_brute_force():
    """Each entry of z's grid paints its 4 x 4 kernel, two pixels from the next, one pixel over the edge."""
    model = ConvVAE(features=(4, 6), **SMALL)
    variables = initialised(model, SMALL_IMAGE)
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
    np.testing.assert_allclose(model.apply(variables, z, method=ConvVAE.decode), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [VAE(hidden=(7, 6), **SMALL), ConvVAE(features=(4, 6), **SMALL)])
def test_any_number_of_samples_is_decoded_at_once(model):
    variables = initialised(model, SMALL_IMAGE)
    z = RNG.normal(size=(2, 4, 3, 5)).astype(np.float32)
    decode = lambda z: model.apply(variables, z, method=type(model).decode)
    together = decode(z)
    assert together.shape == (2, 4, 3, 8, 12, 1)
    np.testing.assert_allclose(together[1, 2], decode(z[1, 2]), rtol=1e-5, atol=1e-5)


def test_the_output_bias_is_the_initialisers():
    paint = lambda key, shape, dtype: jnp.full(shape, 3.5, dtype)
    params = VAE(output_bias=paint, **SMALL).init(jax.random.key(0), SMALL_IMAGE, train=False)["params"]["decoder"]
    painted = {name: bool((layer["bias"] == 3.5).all()) for name, layer in params.items()}
    assert painted == {"Dense_0": False, "Dense_1": False, "Dense_2": True}


@pytest.mark.parametrize("model", [VAE, ConvVAE])
@pytest.mark.parametrize("latents", [0, -1])
def test_no_latent_unit(model, latents):
    with pytest.raises(InputError, match=f"{model.__name__} has {latents} latent units, expected 1 or more"):
        model(latents=latents).init(jax.random.key(0), IMAGE["image"], train=False)


def test_a_layer_without_units():
    for model, message in ((VAE(hidden=(4, 0)), "hidden is 0"), (ConvVAE(features=()), "features is 0")):
        with pytest.raises(InputError, match=message):
            model.init(jax.random.key(0), IMAGE["image"], train=False)


def test_pictures_of_another_shape():
    with pytest.raises(InputError, match=r"VAE takes pictures of shape \(8, 12, 1\), not \(28, 28, 1\)"):
        VAE(**SMALL).init(jax.random.key(0), IMAGE["image"], train=False)
    with pytest.raises(
        InputError, match=r"halves pictures 3 times, but got shape \(28, 28, 1\), expected .* 8 divides"
    ):
        ConvVAE(features=(2, 2, 2)).init(jax.random.key(0), IMAGE["image"], train=False)


def test_the_bias_starts_at_the_mean_picture():
    images = np.array([[[[0], [51], [255]]], [[[0], [102], [255]]]], np.uint8)
    model = VAE(hidden=(7,), latents=4, shape=(1, 3, 1), output_bias=mean_picture_bias(images))
    params = model.init(jax.random.key(0), np.zeros((1, 1, 3, 1), np.float32), train=False)["params"]
    np.testing.assert_allclose(jax.nn.sigmoid(params["decoder"]["Dense_1"]["bias"]), [0.001, 0.3, 0.999], rtol=1e-5)
