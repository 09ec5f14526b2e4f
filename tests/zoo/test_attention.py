"""Attention and its networks against their equations; what a token must not see; the cache against no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, shapes

from dl_jax import decode, inspect
from dl_jax.core.errors import InputError
from dl_jax.models.recur import LSTM
from dl_jax.models.sequence import attention
from dl_jax.models.sequence.attention import AdditivePooling, AttentionClassifier, TransformerEncoder, TransformerLM
from dl_jax.models.sequence.rnn import Recurrent

RNG = np.random.default_rng(0)
TOKENS, LENGTHS = RNG.integers(0, 7, (3, 5), np.int32), np.array([5, 1, 4], np.int32)
VALID = np.arange(5) < LENGTHS[:, None]
LM = TransformerLM(7, 6, width=8, layers=2, heads=2, bias=True)
PLAIN = LM.clone(bias=False)
ENCODER = TransformerEncoder(7, 6, width=8, layers=2, heads=4, bias=True)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_additive_attention_is_its_equation():
    query, states = RNG.standard_normal((3, 4)), RNG.standard_normal((3, 5, 6))
    w, u, v = RNG.standard_normal((4, 2)), RNG.standard_normal((6, 2)), RNG.standard_normal(2)
    energies = (query @ w)[:, None] + states @ u
    context, weights = jit(attention.additive)(*map(np.float32, (energies, v, states)), VALID)
    for row, length in enumerate(LENGTHS):
        expected = softmax(np.array([v @ np.tanh(w.T @ query[row] + u.T @ states[row, j]) for j in range(length)]))
        np.testing.assert_allclose(weights[row, :length], expected, atol=1e-6)
        assert not weights[row, length:].any()
        np.testing.assert_allclose(context[row], expected @ states[row, :length], atol=1e-5)


def test_where_nothing_is_valid_the_weights_are_nan():
    assert np.isnan(attention.masked_softmax(jnp.zeros((2, 3)), jnp.zeros((2, 3), bool))).all()


def test_pooling_ignores_what_padding_holds():
    model, states = AdditivePooling(4), RNG.standard_normal((3, 5, 6), np.float32)
    variables = drawn(model, states, VALID)
    value = jit(jax.value_and_grad(lambda v, x: (model.apply(v, x, VALID)[0] ** 2).sum(), (0, 1)))
    one = value(variables, states)
    other = value(variables, np.where(VALID[..., None], states, np.nan))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert not one[1][1][~VALID].any()


def test_the_classifier_is_its_parts_and_shows_its_weights():
    model = AttentionClassifier(7, 3, embedding=4, units=2, hidden=3)
    variables = drawn(model, TOKENS, train=False)
    params = variables["params"]

    def parts(params):
        x = params["Embed_0"]["embedding"][TOKENS]
        x, _ = Recurrent(LSTM, 3, bidirectional=True).apply({"params": params["Recurrent_0"]}, x, LENGTHS, train=False)
        context, weights = AdditivePooling(2).apply({"params": params["attention"]}, x, VALID)
        return context @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], weights

    shown = inspect.with_outputs(model.apply, "attention")
    (logits, ((_, weights),)), expected = jit(lambda: (shown(variables, TOKENS, LENGTHS, train=False), parts(params)))()
    np.testing.assert_allclose(logits, expected[0], atol=1e-5)
    np.testing.assert_allclose(weights, expected[1], atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert not weights[~VALID].any()


def norm(x, layer):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * layer["scale"] + layer["bias"]


def linear(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def in_numpy(params, text, heads, sees):
    """The states of one text, token by token and head by head, in float64; `sees(i)` are the tokens that i sees."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["words"]["embedding"][text] + params["places"][: len(text)]
    for name in ("blocks_0", "blocks_1"):
        block = params[name]
        q, k, v = np.split(linear(norm(x, block["norm_1"]), block["attention"]["qkv"]), 3, -1)
        size, y = q.shape[-1] // heads, np.zeros_like(x)
        for i in range(len(text)):
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                weights = softmax(k[sees(i), part] @ q[i, part] / np.sqrt(size))
                y[i, part] = weights @ v[sees(i), part]
        x = x + linear(y, block["attention"]["project"])
        y = linear(norm(x, block["norm_2"]), block["up"])
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, block["down"])
    return norm(x, params["norm"])


@functools.cache
def variables_of(model):
    return drawn(model, TOKENS, spread=0.7, train=False)


def test_the_language_model_is_its_equations():
    params = variables_of(LM)["params"]
    found = jit(lambda v: LM.apply(v, TOKENS, train=False))({"params": params})
    for row, text in enumerate(TOKENS):
        states = in_numpy(params, text, 2, lambda i: np.arange(i + 1))
        np.testing.assert_allclose(found[row], states @ params["words"]["embedding"].T, atol=2e-5)


def test_the_encoder_is_its_equations_without_the_padding():
    params = variables_of(ENCODER)["params"]
    found = jit(lambda v: ENCODER.apply(v, TOKENS, LENGTHS, train=False))({"params": params})
    for row, length in enumerate(LENGTHS):
        states = in_numpy(params, TOKENS[row, :length], 4, lambda i, n=length: np.arange(n))
        np.testing.assert_allclose(found[row, :length], states, atol=2e-5)
        assert not found[row, length:].any()


def test_padding_of_the_encoder_has_no_gradient_and_adds_none():
    variables = variables_of(ENCODER)
    changed = np.where(VALID, TOKENS, 6 - TOKENS)
    outside = np.where(VALID, TOKENS, 99)  # of the vocabulary, whose vector is NaN
    longer = np.pad(TOKENS, ((0, 0), (0, 1)))
    loss = lambda v, tokens: jnp.sin(ENCODER.apply(v, tokens, LENGTHS, train=False)).sum()
    value = jit(jax.value_and_grad(loss))
    one, *others = (value(variables, tokens) for tokens in (TOKENS, changed, outside, longer))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def test_no_gradient_comes_from_the_future():
    """Exactly zero, and not zero from any token of the past: [outputs, inputs] is lower triangular."""
    params = variables_of(PLAIN)["params"]

    def logits(shift):  # of the vectors at each place
        places = jnp.asarray(params["places"]).at[:5].add(shift)
        return PLAIN.apply({"params": {**params, "places": places}}, TOKENS[:1], train=False)[0]  # [T, V]

    jacobian = jit(jax.jacobian(logits))(jnp.zeros((5, 8)))  # [T, V, T, D]
    largest = abs(jacobian).max((1, 3))
    assert (largest[np.triu_indices(5, 1)] == 0).all()
    assert (largest[np.tril_indices(5)] > 0).all()


def one_by_one(model, variables, tokens, size=None):
    """The logits of a model that reads its tokens by `step`, in a scan."""
    step = functools.partial(model.apply, variables, method="step")

    def body(carry, token):
        logits, carry = step(token, carry)
        return carry, logits

    carry, logits = jax.lax.scan(body, model.initial_carry(len(tokens), size), tokens.T)
    return logits.swapaxes(0, 1), carry


@pytest.mark.parametrize("size", [None, 5])
def test_with_a_cache_it_is_the_same_model(size):
    variables = variables_of(PLAIN)
    cached, carry = jit(lambda v: one_by_one(PLAIN, v, TOKENS, size))(variables)
    whole = jit(lambda v: PLAIN.apply(v, TOKENS, train=False))(variables)
    np.testing.assert_allclose(cached, whole, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(carry.read, [5, 5, 5])


def test_seeds_as_an_axis_of_a_cached_model():
    members = jax.tree.map(lambda leaf: np.stack([leaf, -leaf]), variables_of(PLAIN))
    cached = jit(jax.vmap(lambda v: one_by_one(PLAIN, v, TOKENS)[0]))(members)
    whole = jit(jax.vmap(lambda v: PLAIN.apply(v, TOKENS, train=False)))(members)
    np.testing.assert_allclose(cached, whole, rtol=0, atol=2e-5)


def test_half_precision_of_a_cached_model():
    half = PLAIN.clone(dtype=jnp.bfloat16)
    cached, carry = jit(lambda v: one_by_one(half, v, TOKENS))(variables_of(PLAIN))
    assert {leaf.dtype for leaf in carry.keys} == {jnp.dtype("bfloat16")}
    assert cached.dtype == jnp.float32
    whole = jit(lambda v: PLAIN.apply(v, TOKENS, train=False))(variables_of(PLAIN))
    np.testing.assert_allclose(cached, whole, atol=0.15 * abs(whole).max())


def test_it_generates_what_it_would_without_a_cache():
    variables = variables_of(PLAIN)
    step = functools.partial(PLAIN.apply, variables, method="step")
    greedy = lambda key, logits: decode.greedy(logits)
    prompt = TOKENS[:, :2]
    found, _ = jit(
        lambda prompt: decode.generate(step, PLAIN.initial_carry(3, 6), prompt, 4, jax.random.key(0), greedy)
    )(prompt)
    whole = jit(lambda tokens: PLAIN.apply(variables, tokens, train=False))
    seen = np.zeros((3, 6), np.int32)
    seen[:, :2] = prompt
    for i in range(2, 6):
        seen[:, i] = whole(seen)[:, i - 1].argmax(-1)
    np.testing.assert_array_equal(found, seen[:, 2:])


def test_rematerialisation_keeps_less_and_has_the_same_gradient():
    """With dropout, whose mask is drawn again."""
    plain, again = (TransformerLM(11, 8, 6, 1, 3, dropout=0.3, remat=remat) for remat in (False, True))
    variables = variables_of(plain)

    def loss(variables, model):
        logits = model.apply(variables, TOKENS, train=True, rngs={"dropout": jax.random.key(3)})
        return (logits**2).sum()

    ours, theirs = (jit(jax.grad(lambda v, model=model: loss(v, model)))(variables) for model in (again, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
    kept = lambda model: jax.eval_shape(lambda v: jax.vjp(lambda v: loss(v, model), v)[1], variables)
    size = lambda model: sum(leaf.size for leaf in jax.tree.leaves(kept(model)))
    assert size(again) < 0.5 * size(plain)


def test_past_the_end_of_the_cache_is_nan_where_traced_and_refused_where_known():
    variables = variables_of(PLAIN)
    logits, carry = jit(lambda v: one_by_one(PLAIN, v, np.zeros((2, 8), np.int32), 4))(variables)
    assert np.isfinite(logits[:, :4]).all()
    assert np.isnan(logits[:, 4:]).all()
    assert np.isfinite(carry.keys[0]).all()
    full = carry._replace(read=np.array([1, 4]))
    with pytest.raises(InputError, match="the cache of 4 tokens is full"):
        PLAIN.apply(variables, np.zeros(2, np.int32), full, method="step")


def test_rows_may_have_read_different_numbers_of_tokens():
    """As after a reordering of beams: each row continues at its own place."""
    variables = variables_of(PLAIN)
    (_, short), (_, long) = (jit(lambda v, n=n: one_by_one(PLAIN, v, TOKENS[:, :n]))(variables) for n in (2, 4))
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), short, long)
    step = jit(lambda v, carry: PLAIN.apply(v, TOKENS[:, 4], carry, method="step")[0])
    both = [step(variables, jax.tree.map(np.asarray, carry)) for carry in (short, long)]
    np.testing.assert_allclose(step(variables, mixed), np.concatenate([both[0][:1], both[1][1:]]), atol=1e-5)


def test_each_beam_has_its_own_cache():
    """The score of each sequence is its log-probability without a cache."""
    variables, prompt = variables_of(PLAIN), TOKENS[:, :2]
    step = functools.partial(PLAIN.apply, variables, method="step")
    search = jit(lambda prompt: decode.beam_search(step, PLAIN.initial_carry(3, 5), prompt, 4, 3, end=0))
    found = search(prompt)
    whole = np.concatenate([np.repeat(prompt, 3, 0), found.tokens.reshape(9, 4)], 1)
    log_p = jit(lambda tokens: jax.nn.log_softmax(PLAIN.apply(variables, tokens, train=False)))(whole)
    log_p_of = np.take_along_axis(log_p[:, 1:-1], whole[:, 2:, None], 2)[..., 0]
    counted = np.arange(4) < found.lengths.reshape(9, 1)
    np.testing.assert_allclose(np.where(counted, log_p_of, 0).sum(1), found.scores.ravel(), rtol=1e-5)


def test_weights_start_as_in_nanogpt():
    model = TransformerLM(50, 40, width=64, layers=1, heads=2)
    params = jit(lambda: model.init(jax.random.key(0), TOKENS, train=False))()["params"]
    near = lambda leaf, spread: np.testing.assert_allclose(leaf.std(), spread, rtol=0.1)
    near(params["words"]["embedding"], 0.02)
    near(params["places"], 0.02)
    near(params["blocks_0"]["attention"]["qkv"]["kernel"], 0.02)
    near(params["blocks_0"]["up"]["kernel"], 0.02)
    near(params["blocks_0"]["attention"]["project"]["kernel"], 0.02 / np.sqrt(2))
    near(params["blocks_0"]["down"]["kernel"], 0.02 / np.sqrt(2))
    assert all(leaf.shape[-1] > 1 for leaf in jax.tree.leaves(params))
    assert "bias" not in params["norm"]


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (LM, (np.zeros((1, 7), int),), "7 tokens, expected 1 to 6, the block"),
        (LM, (np.zeros((1, 0), int),), "0 tokens, expected 1 to 6"),
        (LM.clone(heads=3), (TOKENS,), "width is 8 for 3 heads, expected a multiple"),
        (LM.clone(layers=0), (TOKENS,), "layers is 0"),
        (LM.clone(dropout=1.0), (TOKENS,), "dropout is 1.0"),
        (ENCODER, (TOKENS, LENGTHS + 1), "a sequence has length 6, expected 1 to 5"),
        (ENCODER, (TOKENS, LENGTHS[:1]), r"lengths are int32 \(1,\), expected whole numbers \(3,\)"),
        (AttentionClassifier(7, 3, 4, units=0, layers=0), (TOKENS,), "units is 0"),
        (AttentionClassifier(7, 3, 4, 2, layers=0), (TOKENS[:, :0],), "the length of a text is 0"),
    ],
)
def test_what_cannot_be_is_refused(model, inputs, message):
    with pytest.raises(InputError, match=message):
        shapes(model, *inputs, train=False)


@pytest.mark.parametrize("size", [0, 7])
def test_a_text_beyond_the_block_is_refused(size):
    with pytest.raises(InputError, match=f"a text of {size} tokens, prompt and what is generated, expected 1 to 6"):
        LM.initial_carry(2, size)
