"""Masks of padded sequences against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import masks
from dl_jax.core.errors import InputError


def test_a_step_before_the_length_is_valid():
    expected = [[True, True, True], [True, False, False], [True, True, False]]
    for dtype in (np.int8, np.uint8, np.int32):
        np.testing.assert_array_equal(masks.from_lengths(np.array([3, 1, 2], dtype), 3), expected)
    np.testing.assert_array_equal(masks.from_lengths(np.array([200], np.uint8), 300)[0], np.arange(300) < 200)


def test_lengths_that_are_traced_are_cut_to_the_steps():
    found = jax.jit(lambda lengths: masks.from_lengths(lengths, 3))(jnp.array([5, 0, 3]))
    np.testing.assert_array_equal(found, [[True] * 3, [False] * 3, [True] * 3])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[1], [2]], r"lengths are int64 \(2, 1\), expected whole numbers \[B\]"),
        (2, r"lengths are int64 \(\)|lengths are int32 \(\)"),
        ([1.0, 2.0], "lengths are float"),
        ([True], "lengths are bool"),
        ([1, 4], "a sequence has length 4, expected 1 to 3"),
        ([1, 0], "a sequence has length 0, expected 1 to 3"),
    ],
)
def test_other_lengths_are_refused(lengths, message):
    with pytest.raises(InputError, match=message.replace("int64", "int(32|64)")):
        masks.from_lengths(np.array(lengths), 3)
