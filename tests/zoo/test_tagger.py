"""Taggers against their parts written out, and what padding of words and of sentences must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.recur import LSTM
from dl_jax.models.sequence.rnn import Recurrent
from dl_jax.models.sequence.tagger import ChainTagger, CharCNN, Tagger

RNG = np.random.default_rng(0)
WORDS, LENGTHS = RNG.integers(0, 7, (3, 5), np.int32), np.array([5, 1, 4], np.int32)
CHARS = RNG.integers(1, 9, (3, 5, 4), np.int32) * (np.arange(4) < RNG.integers(1, 5, (3, 5, 1))).astype(np.int32)
MODEL = Tagger(7, 3, embedding=4, hidden=5, characters=9, character_embedding=2, filters=6)
LETTERS = CharCNN(9, 2, 6, 0.0, jnp.float32)


def features(params, word):
    """Of one word without padding, in float64: each character with its neighbours, the largest of each filter."""
    table, kernel, bias = (
        np.asarray(leaf, np.float64)
        for leaf in (params["Embed_0"]["embedding"], params["Conv_0"]["kernel"], params["Conv_0"]["bias"])
    )
    x = np.pad(table[word], ((1, 1), (0, 0)))
    return np.max([sum(x[i + tap] @ kernel[tap] for tap in range(3)) + bias for i in range(len(word))], 0)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_features_of_characters_are_their_definition_without_the_padding(length):
    variables = drawn(LETTERS, CHARS, train=False)
    word = np.array([3, 8, 3, 1])[:length]
    padded = np.pad(word, (0, 6 - length))[None, None]
    found = jit(lambda chars: LETTERS.apply(variables, chars, train=False))(padded)
    np.testing.assert_allclose(found[0, 0], features(variables["params"], word), atol=1e-6)


def test_a_word_without_characters_has_zeros_and_finite_gradients():
    """Every bias is negative, so that zeros of a padding would win the maximum."""
    variables = drawn(LETTERS, CHARS, train=False)
    variables["params"]["Conv_0"]["bias"] = -abs(variables["params"]["Conv_0"]["bias"]) - 5
    chars = np.array([[[0, 0, 0], [2, 0, 0]]])
    loss = lambda v: (y := LETTERS.apply(v, chars, train=False)).sum() + (y**2).sum()
    apply, gradients = jit(lambda: (LETTERS.apply(variables, chars, train=False), jax.grad(loss)(variables)))()
    assert (apply[0, 0] == 0).all()
    assert (apply[0, 1] < 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_tagger_is_its_parts():
    variables = drawn(MODEL, WORDS, LENGTHS, CHARS, train=False)
    params = variables["params"]

    def parts(params):
        letters = LETTERS.apply({"params": params["characters_cnn"]}, CHARS, train=False)
        x = jnp.concatenate([params["words"]["embedding"][WORDS], letters], -1)
        recurrent = Recurrent(LSTM, 5, bidirectional=True)
        y, _ = recurrent.apply({"params": params["recurrent"]}, x, LENGTHS, train=False)
        return y @ params["output"]["kernel"] + params["output"]["bias"]

    found, expected = jit(lambda: (MODEL.apply(variables, WORDS, LENGTHS, CHARS, train=False), parts(params)))()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_padding_of_words_and_sentences_has_no_effect():
    """Neither what it holds nor how much of it there is, on emissions or gradients."""
    variables = drawn(MODEL, WORDS, LENGTHS, CHARS, train=False)
    longer = np.pad(WORDS, ((0, 0), (0, 2)), constant_values=6), np.pad(CHARS, ((0, 0), (0, 2), (0, 3)))
    longer[1][:, 5:] = 4

    def loss(variables, words, chars):
        emissions = MODEL.apply(variables, words, LENGTHS, chars, train=False)
        valid = np.arange(words.shape[1]) < LENGTHS[:, None]
        return jnp.sin(jnp.where(valid[..., None], emissions, 0)).sum(), emissions

    value = lambda *inputs: jit(jax.value_and_grad(loss, has_aux=True))(variables, *inputs)
    ((one, y), gradients), ((other, z), more) = value(WORDS, CHARS), value(*longer)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(y[row, :length], z[row, :length], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, more)


def test_a_chain_starts_at_zero_beside_the_same_tagger():
    chain = ChainTagger(*(getattr(MODEL, name) for name in ("vocabulary", "tags", "embedding", "hidden")))
    variables = jit(lambda: chain.init(jax.random.key(0), WORDS, LENGTHS, train=False))()
    rest = {name: leaf for name, leaf in variables["params"].items() if name not in ("start", "step", "end")}
    emissions, (start, step, end) = jit(lambda v: chain.apply(v, WORDS, LENGTHS, train=False))(variables)
    assert (start.shape, step.shape, end.shape) == ((3,), (3, 3), (3,))
    assert not start.any()
    assert not step.any()
    assert not end.any()
    plain = Tagger(7, 3, embedding=4, hidden=5)
    same = jit(lambda v: plain.apply(v, WORDS, LENGTHS, train=False))({"params": rest})
    np.testing.assert_array_equal(emissions, same)


def test_vectors_start_with_length_one_on_average():
    table = jit(lambda: Tagger(500, 3, hidden=1).init(jax.random.key(0), WORDS, train=False))()["params"]["words"]
    np.testing.assert_allclose((table["embedding"] ** 2).sum(-1).mean(), 1, atol=0.02)


@pytest.mark.parametrize(
    ("change", "chars", "message"),
    [
        ({}, None, "characters is 9 and chars are none, expected"),
        ({"characters": 0}, CHARS, r"characters is 0 and chars are \(3, 5, 4\)"),
        ({"characters": -1}, CHARS, "characters is -1"),
        ({}, CHARS[:, :3], r"chars are \(3, 3, 4\) for words \(3, 5\)"),
        ({}, CHARS[0], r"chars are \(5, 4\)"),
        ({"character_embedding": 0}, CHARS, "character_embedding is 0"),
        ({"dropout": 1.0}, CHARS, "dropout is 1.0"),
        ({"hidden": 0}, CHARS, "hidden is 0"),
        ({"filters": 0}, CHARS, "filters is 0"),
    ],
)
def test_what_cannot_be_is_refused(change, chars, message):
    with pytest.raises(InputError, match=message):
        shapes(MODEL.clone(**change), WORDS, LENGTHS, chars, train=False)
