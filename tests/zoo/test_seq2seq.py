"""The encoder-decoder against its equations, its decoding against teacher forcing, and the padding of sources."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, shapes

from dl_jax import decode
from dl_jax.core.errors import InputError
from dl_jax.models.recur import GRU
from dl_jax.models.sequence.rnn import Recurrent
from dl_jax.models.sequence.seq2seq import Seq2Seq

RNG = np.random.default_rng(0)
SOURCE, TARGET, LENGTHS = RNG.integers(0, 7, (3, 5)), RNG.integers(0, 6, (3, 4)), np.array([5, 1, 4], np.int32)
MODEL = Seq2Seq(7, 6, embedding=4, hidden=5, units=3, maxout=2)
VARIABLES = drawn(MODEL, SOURCE, TARGET, train=False)
FORCED = jit(lambda v, source, target, lengths: MODEL.apply(v, source, target, lengths, train=False))
STEP = functools.partial(MODEL.apply, VARIABLES, method="step")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def written_out(params, outputs, backward, target):
    """The decoder for one source without padding, in float64: outputs [S, 2 H], the backward state at the first."""
    params, outputs, backward = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, outputs, backward))
    linear = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]
    state, logits, rows = np.tanh(linear(backward, "first")), [], []
    for token in target:
        word = params["target"]["embedding"][token]
        energies = np.tanh(state @ params["query"] + linear(outputs, "keys"))
        scores = np.exp(energies @ params["vector"][:, 0])
        rows.append(scores / scores.sum())
        context = rows[-1] @ outputs
        pairs = linear(np.concatenate([state, word, context]), "readout")
        logits.append(linear(np.maximum(pairs[::2], pairs[1::2]), "output"))
        x, h = linear(word, "input") + context @ params["context"], state @ params["kernel"] + params["bias"]
        (xr, xz, xn), (hr, hz, hn) = np.split(x, 3), np.split(h, 3)
        z = sigmoid(xz + hz)
        state = (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * state
    return np.stack(logits), np.stack(rows)


def test_it_is_its_equations_without_the_padding():
    params = VARIABLES["params"]
    encoder = Recurrent(GRU, 5, bidirectional=True)
    embedded = params["source"]["embedding"][SOURCE]
    outputs, (_, (backward,)) = jit(
        lambda: encoder.apply({"params": params["encoder"]}, embedded, LENGTHS, train=False)
    )()
    logits, weights = FORCED(VARIABLES, SOURCE, TARGET, LENGTHS)
    assert (logits.shape, weights.shape) == ((3, 4, 6), (3, 4, 5))
    for row, length in enumerate(LENGTHS):
        expected = written_out(params, outputs[row, :length], backward[row], TARGET[row])
        np.testing.assert_allclose(logits[row], expected[0], atol=1e-5)
        np.testing.assert_allclose(weights[row, :, :length], expected[1], atol=1e-5)
        assert not weights[row, :, length:].any()


def test_padding_of_a_source_has_no_effect():
    loss = lambda v, source: jnp.sin(MODEL.apply(v, source, TARGET, LENGTHS, train=False)[0]).sum()
    value = jit(jax.value_and_grad(loss))
    changed = np.where(np.arange(5) < LENGTHS[:, None], SOURCE, 6 - SOURCE)
    one, other = (value(VARIABLES, each) for each in (SOURCE, changed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, other)
    logits, weights = FORCED(VARIABLES, SOURCE, TARGET, LENGTHS)
    longer, more = FORCED(VARIABLES, np.pad(SOURCE, ((0, 0), (0, 2))), TARGET, LENGTHS)
    np.testing.assert_allclose(longer, logits, atol=1e-5)
    np.testing.assert_allclose(more, np.pad(weights, ((0, 0), (0, 0), (0, 2))), atol=1e-6)


def test_a_logit_depends_on_the_target_before_it_alone():
    logits, _ = FORCED(VARIABLES, SOURCE, TARGET, LENGTHS)
    changed = TARGET.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 6
    differs = (FORCED(VARIABLES, SOURCE, changed, LENGTHS)[0] != logits).any((0, 2))
    np.testing.assert_array_equal(differs, [False, False, True, True])


def test_steps_are_teacher_forcing_one_by_one():
    def steps(source, target):
        carry = MODEL.apply(VARIABLES, source, LENGTHS, method="start")
        _, logits = jax.lax.scan(lambda carry, token: STEP(token, carry)[::-1], carry, target.T)
        return logits.swapaxes(0, 1)

    np.testing.assert_allclose(jit(steps)(SOURCE, TARGET), FORCED(VARIABLES, SOURCE, TARGET, LENGTHS)[0], atol=1e-5)


def test_it_generates_what_teacher_forcing_says():
    def tokens(source):
        carry = MODEL.apply(VARIABLES, source, LENGTHS, method="start")
        greedy = lambda key, logits: decode.greedy(logits)
        return decode.generate(STEP, carry, jnp.zeros((3, 1), jnp.int32), 4, jax.random.key(0), greedy)[0]

    found = jit(tokens)(SOURCE)
    before = np.concatenate([np.zeros((3, 1), int), found[:, :-1]], 1)
    np.testing.assert_array_equal(FORCED(VARIABLES, SOURCE, before, LENGTHS)[0].argmax(-1), found)


def test_beams_read_the_source_of_their_row():
    """The score of each sequence is its log-probability by teacher forcing."""
    start = np.ones((3, 1), int)

    def search(source):
        return decode.beam_search(STEP, MODEL.apply(VARIABLES, source, LENGTHS, method="start"), start, 4, 2, end=0)

    found = jit(search)(SOURCE)
    targets = np.concatenate([np.repeat(start, 2, 0), found.tokens.reshape(6, 4)], 1)
    logits, _ = FORCED(VARIABLES, np.repeat(SOURCE, 2, 0), targets[:, :-1], np.repeat(LENGTHS, 2))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p = np.take_along_axis(log_p, targets[:, 1:, None], 2)[..., 0]
    counted = np.arange(4) < found.lengths.reshape(6, 1)
    np.testing.assert_allclose(np.where(counted, log_p, 0).sum(1), found.scores.ravel(), rtol=1e-5)


def test_dropout_acts_in_training_only():
    model = MODEL.clone(dropout=0.5)
    train = jit(lambda key: model.apply(VARIABLES, SOURCE, TARGET, train=True, rngs={"dropout": key})[0])
    assert (train(jax.random.key(0)) != train(jax.random.key(1))).any()


@pytest.mark.parametrize(
    ("change", "target", "lengths", "message"),
    [
        ({}, TARGET[:, :0], LENGTHS, r"target \(3, 0\) for source \(3, 5\)"),
        ({}, TARGET[:2], LENGTHS, r"target \(2, 4\) for source \(3, 5\)"),
        ({}, TARGET[0], LENGTHS, r"target \(4,\)"),
        ({}, TARGET, LENGTHS + 1, "length 6, expected 1 to 5"),
        ({"maxout": 0}, TARGET, LENGTHS, "maxout is 0"),
        ({"units": 0}, TARGET, LENGTHS, "units is 0"),
        ({"dropout": 1.0}, TARGET, LENGTHS, "dropout is 1.0"),
    ],
)
def test_what_cannot_be_is_refused(change, target, lengths, message):
    with pytest.raises(InputError, match=message):
        shapes(MODEL.clone(**change), SOURCE, target, lengths, train=False)
