"""The two players against numpy."""

import jax
import numpy as np

from dl_jax.models.generative.gan import Discriminator, Generator

RNG = np.random.default_rng(0)
SHAPE = (4, 3, 1)


def test_generator_against_numpy():
    model, noise = Generator(hidden=(8, 7), shape=SHAPE, spread=0.5), RNG.normal(size=(3, 5)).astype(np.float32)
    params = model.init(jax.random.key(0), noise, train=False)["params"]
    x = noise.astype(np.float64)
    for name in ("Dense_0", "Dense_1"):
        assert 0.4 < abs(params[name]["kernel"]).max() <= 0.5
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    x = 1 / (1 + np.exp(-(x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"])))
    np.testing.assert_allclose(model.apply({"params": params}, noise, train=True), x.reshape(3, *SHAPE), rtol=1e-5)


def test_discriminator_takes_the_largest_piece():
    model, image = Discriminator(hidden=(6, 4), pieces=3, spread=0.5), RNG.random((2, *SHAPE), np.float32)
    params = model.init(jax.random.key(0), image, train=False)["params"]
    x = image.reshape(2, -1).astype(np.float64)
    for name, units in {"Dense_0": 6, "Dense_1": 4}.items():
        kernel = np.asarray(params[name]["kernel"]).reshape(-1, units, 3)
        x = np.stack([x @ kernel[..., piece] for piece in range(3)]).max(0)  # biases are zero
    x = x @ params["Dense_2"]["kernel"]
    np.testing.assert_allclose(model.apply({"params": params}, image, train=False), x[:, 0], rtol=1e-5, atol=1e-6)
