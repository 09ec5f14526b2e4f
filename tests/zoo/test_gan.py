"""The generator and the discriminator against NumPy."""

import jax
import numpy as np
from quick import drawn, jit, moved

from dl_jax.models.generative.gan import Discriminator, Generator

RNG = np.random.default_rng(0)
SHAPE = (4, 3, 1)


def started(model, x):
    """The initial parameters of a model."""
    return jit(lambda: model.init(jax.random.key(0), x, train=False))()["params"]


def test_generator_against_numpy():
    model, noise = Generator(hidden=(8, 7), shape=SHAPE, spread=0.5), RNG.normal(size=(3, 5)).astype(np.float32)
    params = started(model, noise)
    for layer in params.values():
        assert 0.4 < abs(layer["kernel"]).max() <= 0.5
        assert not layer["bias"].any()
    params, x = moved(params, 0.2), noise.astype(np.float64)
    for name in ("Dense_0", "Dense_1"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    x = 1 / (1 + np.exp(-(x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"])))
    found = jit(lambda params: model.apply({"params": params}, noise, train=True))(params)
    np.testing.assert_allclose(found, x.reshape(3, *SHAPE), rtol=1e-5)


def test_discriminator_takes_the_largest_piece():
    model, image = Discriminator(hidden=(6, 4), pieces=3, spread=0.5), RNG.random((2, *SHAPE), np.float32)
    params = started(model, image)
    for layer in (params["Dense_0"], params["Dense_1"]):
        assert 0.4 < abs(layer["kernel"]).max() <= 0.5
        assert not layer["bias"].any()
    params, x = moved(params, 0.2), image.reshape(2, -1).astype(np.float64)
    for name, units in {"Dense_0": 6, "Dense_1": 4}.items():
        kernel, bias = params[name]["kernel"].reshape(-1, units, 3), params[name]["bias"].reshape(units, 3)
        x = np.stack([x @ kernel[..., piece] + bias[..., piece] for piece in range(3)]).max(0)
    x = x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    found = jit(lambda params: model.apply({"params": params}, image, train=False))(params)
    np.testing.assert_allclose(found, x[:, 0], rtol=1e-5, atol=1e-6)


def test_pixels_and_hidden_units_are_dropped_in_training_only():
    model, image = Discriminator(hidden=(30,), pieces=2, spread=0.5), RNG.random((2, *SHAPE), np.float32)
    variables = drawn(model, image, train=False)

    def outputs(variables):
        for rates in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
            rated = model.clone(dropout=rates[0], input_dropout=rates[1])
            yield [rated.apply(variables, image, train=t, rngs={"dropout": jax.random.key(0)}) for t in (True, False)]

    (never, still), *dropped = jit(lambda variables: list(outputs(variables)))(variables)
    np.testing.assert_array_equal(never, still)
    for training, test in dropped:
        assert (abs(training - still) > 1e-2).all()
        np.testing.assert_array_equal(test, still)
