import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import masks
from dl_jax.core.errors import InputError


def test_a_step_is_valid_before_its_sequence_ends():
    found = masks.from_lengths(np.array([3, 1, 4]), 4)
    np.testing.assert_array_equal(found, [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert found.dtype == bool
    assert masks.from_lengths(np.zeros(0, int), 4).shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
def test_small_integer_types(dtype):
    """300 steps are more than two of them hold."""
    lengths = np.array([1, 100, 127], dtype)
    np.testing.assert_array_equal(masks.from_lengths(lengths, 300), np.arange(300) < lengths.astype(int)[:, None])


def test_seeds_and_unknown_lengths():
    """What is traced is not checked: 9 of 4 steps counts as 4, and -1 as 0."""
    lengths = jnp.array([[3, 1], [9, -1]])
    found = jax.jit(jax.vmap(lambda each: masks.from_lengths(each, 4)))(lengths)
    np.testing.assert_array_equal(found.sum(-1), [[3, 1], [4, 0]])


def test_lengths_may_be_a_list():
    np.testing.assert_array_equal(masks.from_lengths([2, 1], 3), [[True, True, False], [True, False, False]])


def test_constants_within_a_compiled_function_are_checked():
    constant = jnp.array([3, 5])
    np.testing.assert_array_equal(jax.jit(lambda: masks.from_lengths(constant, 5).sum(-1))(), [3, 5])
    with pytest.raises(InputError, match="length 5, expected 1 to 4"):
        jax.jit(lambda: masks.from_lengths(constant, 4))()


@pytest.mark.parametrize(
    ("lengths", "batch", "words"),
    [
        ([2, 5], None, "length 5, expected 1 to 4"),
        ([0, 4], None, "length 0, expected 1 to 4"),
        ([-2, 7], None, "length -2, expected 1 to 4"),
        ([[2], [4]], None, "(2, 1), expected whole numbers with one axis"),
        (2, None, "(), expected whole numbers with one axis"),
        ([2.0, 4.0], None, "float32 (2,), expected whole numbers"),
        ([True, True], None, "bool (2,), expected whole numbers"),
        ([2, 4], 3, "(2,), expected whole numbers (3,)"),
        ([2, 4], 0, "(2,), expected whole numbers (0,)"),
    ],
)
def test_bad_lengths_are_refused(lengths, batch, words):
    for each in (np.array(lengths), jnp.array(lengths)):
        with pytest.raises(InputError) as error:
            masks.from_lengths(each, 4, batch)
        assert words in str(error.value)
    if "length " not in words:  # shape and type are known of what is traced too
        with pytest.raises(InputError):
            jax.jit(lambda each: masks.from_lengths(each, 4, batch))(jnp.array(lengths))
