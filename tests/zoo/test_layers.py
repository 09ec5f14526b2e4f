"""Layers that image networks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.models.layers import Normalise


def test_normalising_takes_a_sets_statistics_to_0_and_1():
    images = np.random.default_rng(0).random((50, 4, 4, 3)) * [0.2, 0.5, 1.0] + [0.1, 0.3, 0.0]  # float64
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    layer = Normalise(tuple(mean), tuple(std))
    found = np.asarray(layer.apply({}, jnp.asarray(images, jnp.float32)))
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std((0, 1, 2)), 1, atol=1e-5)
    assert not jax.tree.leaves(layer.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3))))
    assert layer.apply({}, jnp.zeros((1, 2, 2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("mean", "std", "channels"),
    [
        ((0.5,) * 3, (0.2,) * 3, 1),
        ((0.5,), (0.2,), 3),
        ((0.5,) * 3, (0.2,), 3),
        (0.5, 0.2, 3),
        ((0.5,), (0.2,) * 3, 3),
        ((0.5,) * 3, (0.2, 0.0, 0.2), 3),
        ((0.5,), (-0.2,), 1),
        ((0.5,), (float("nan"),), 1),
    ],
)
def test_statistics_of_other_channels_and_without_spread_are_refused(mean, std, channels):
    with pytest.raises(InputError, match=rf"of images \(1, 2, 2, {channels}\): expected one mean") as raised:
        Normalise(mean, std).init(jax.random.key(0), jnp.zeros((1, 2, 2, channels)))
    assert "\n" not in str(raised.value)
