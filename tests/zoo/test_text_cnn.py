"""The convolutional network for sentences against its definition, text by text, and its constraint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import drawn, jit, shapes

from dl_jax import optim
from dl_jax.core.errors import InputError
from dl_jax.models.sequence.text_cnn import TextCNN, is_output_kernel

MODEL = TextCNN(7, 3, embedding=4, maps=5, widths=(2, 4))
TOKENS, LENGTHS = np.random.default_rng(0).integers(0, 7, (3, 6), np.int32), np.array([6, 1, 3], np.int32)


def in_numpy(params, text):
    """One text without padding: the largest of all windows that hold a token of it, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    largest = []
    for width in MODEL.widths:
        layer, x = params[f"width_{width}"], np.pad(params["words"]["embedding"][text], ((width - 1,) * 2, (0, 0)))
        windows = [x[i : i + width] for i in range(len(text) + width - 1)]
        y = [(window[..., None] * layer["kernel"]).sum((0, 1)) + layer["bias"] for window in windows]
        largest.append(np.maximum(np.max(y, 0), 0))
    return np.concatenate(largest) @ params["output"]["kernel"] + params["output"]["bias"]


@pytest.mark.parametrize("low", [0.0, -3.0], ids=["any bias", "biases that make zeros win"])
def test_each_text_is_its_definition_without_the_padding(low):
    """Texts of one token and of three are shorter than the widest window."""
    variables = drawn(MODEL, TOKENS, train=False)
    for width in MODEL.widths:
        variables["params"][f"width_{width}"]["bias"] -= np.float32(low)  # a window of padding alone would have it
    found = jit(lambda: MODEL.apply(variables, TOKENS, LENGTHS, train=False))()
    for row, (text, length) in enumerate(zip(TOKENS, LENGTHS, strict=True)):
        np.testing.assert_allclose(found[row], in_numpy(variables["params"], text[:length]), rtol=1e-5, atol=1e-5)


def test_padding_has_no_effect_on_gradients():
    variables = drawn(MODEL, TOKENS, train=False)
    loss = lambda v, tokens, lengths: jnp.sin(MODEL.apply(v, tokens, lengths, train=False)).sum()
    padded = jit(jax.grad(loss))(variables, TOKENS, LENGTHS)
    alone = [jit(jax.grad(loss))(variables, TOKENS[i : i + 1, :n], None) for i, n in enumerate(LENGTHS)]
    total = jax.tree.map(lambda *leaves: np.sum(leaves, 0), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), padded, total)


def test_the_constraint_limits_the_weights_of_each_class_and_nothing_else():
    variables = jax.tree.map(lambda leaf: 10 * leaf, drawn(MODEL, TOKENS, train=False)["params"])
    variables["output"]["kernel"][:, 1] /= 100  # below the limit: stays
    tx = optax.chain(optax.sgd(0.0), optim.max_norm(3.0, is_output_kernel))
    updates, _ = tx.update(variables, tx.init(variables), variables)
    found = jax.device_get(optax.apply_updates(variables, updates))
    norms = np.linalg.norm(found["output"]["kernel"], axis=0)
    np.testing.assert_allclose(norms[[0, 2]], 3, rtol=1e-5)
    assert norms[1] < 1
    before = variables["output"]["kernel"]
    np.testing.assert_allclose(found["output"]["kernel"], before * norms / np.linalg.norm(before, axis=0), rtol=1e-5)
    found["output"]["kernel"] = before
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_vectors_start_uniform_below_a_quarter():
    table = jit(lambda: TextCNN(400, 2, maps=1).init(jax.random.key(0), TOKENS, train=False))()["params"]["words"]
    assert 0.24 < abs(table["embedding"]).max() <= 0.25


@pytest.mark.parametrize(
    ("change", "tokens", "lengths", "message"),
    [
        ({"maps": 0}, TOKENS, None, "maps is 0"),
        ({"widths": ()}, TOKENS, None, "the number of widths is 0"),
        ({"widths": (2, 0)}, TOKENS, None, "the least width is 0"),
        ({"dropout": 1.5}, TOKENS, None, "dropout is 1.5"),
        ({}, TOKENS[:, :0], None, "the length of a text is 0"),
        ({}, TOKENS, LENGTHS[:2], r"lengths are int32 \(2,\), expected"),
        ({}, TOKENS, LENGTHS[:1], r"lengths are int32 \(1,\), expected"),
        ({}, TOKENS, LENGTHS + 1, "length 7, expected 1 to 6"),
    ],
)
def test_what_cannot_be_is_refused(change, tokens, lengths, message):
    with pytest.raises(InputError, match=message):
        shapes(MODEL.clone(**change), tokens, lengths, train=False)
