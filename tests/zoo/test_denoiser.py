"""The denoiser: the embedding of the time, and that it reaches the U-Net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit

from dl_jax.core.errors import InputError
from dl_jax.models.generative.denoiser import Denoiser, from_blocks, sinusoids, to_blocks
from dl_jax.models.vision.unet import UNet


def test_the_embedding_of_a_time():
    t, size = np.array([0, 1, 37]), 8
    rates = np.array([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
    expected = [[*np.sin(time * rates), *np.cos(time * rates)] for time in t]
    np.testing.assert_allclose(sinusoids(jnp.array(t), size), expected, atol=1e-5)
    for wrong in (0, 7):
        with pytest.raises(InputError, match=f"an embedding of {wrong} numbers, expected an even number of 2 or more"):
            sinusoids(jnp.array(t), wrong)


def test_the_condition_of_the_unet_is_two_layers_of_the_embedding():
    rng = np.random.default_rng(0)
    model, image, time = Denoiser((2, 3), 6), rng.normal(size=(3, 4, 4, 2)).astype(np.float32), np.array([1, 4, 20])
    params = drawn(model, image, time, train=False, spread=0.5)["params"]
    x = np.asarray(sinusoids(jnp.array(time), 6), np.float64)
    for layer in (params["Dense_0"], params["Dense_1"]):
        x = x @ layer["kernel"] + layer["bias"]
        x = x / (1 + np.exp(-x))
    unet = UNet((2, 3), 2, jax.nn.silu)
    expected = jit(lambda x: unet.apply({"params": params["unet"]}, image, x, train=False))(np.float32(x))
    found = jit(lambda time: model.apply({"params": params}, image, time, train=False))(time)
    assert found.shape == image.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_pixels():
    """The channels of a block are its pixels, row by row."""
    image = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    blocks = np.asarray(to_blocks(jnp.array(image), 2))
    assert blocks.shape == (2, 2, 3, 12)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(blocks[:, i, j], image[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1))
    np.testing.assert_array_equal(from_blocks(jnp.array(blocks), 2), image)
    with pytest.raises(InputError, match="image of 4 x 6 pixels, expected sides that patch=4 divides"):
        to_blocks(jnp.array(image), 4)


def test_patches_are_what_the_unet_sees():
    image, time = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32), np.array([3, 9])
    model, plain = Denoiser((2, 3), 6, patch=2), Denoiser((2, 3), 6)
    params = drawn(model, image, time, train=False, spread=0.5)["params"]
    found = jit(lambda image: model.apply({"params": params}, image, time, train=False))(image)
    on_blocks = jit(lambda blocks: plain.apply({"params": params}, blocks, time, train=False))(to_blocks(image, 2))
    np.testing.assert_allclose(found, from_blocks(on_blocks, 2), rtol=1e-4, atol=1e-5)
