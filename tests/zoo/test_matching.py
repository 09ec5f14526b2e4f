"""Networks for pairs of texts against their equations, pair by pair without padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.recur import VANILLA
from dl_jax.models.sequence.matching import DecomposableAttention, SiameseClassifier

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.integers(0, 7, (3, 5)), RNG.integers(0, 7, (3, 4))
LENGTHS = np.array([5, 1, 4], np.int32), np.array([3, 4, 1], np.int32)
SIAMESE = SiameseClassifier(7, 3, embedding=4, hidden=5, units=6, cell=VANILLA)
DECOMPOSABLE = DecomposableAttention(7, 3, embedding=4, hidden=5, dropout=0.0)
models = pytest.mark.parametrize("model", [SIAMESE, DECOMPOSABLE], ids=lambda model: type(model).__name__)


def linear(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0)


def siamese(params, *texts):
    """With plain recurrent layers, in float64."""
    params, vectors = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), []
    for text in texts:
        x, outputs = params["Embed_0"]["embedding"][text], []
        for layer, order in (("forward_0", slice(None)), ("backward_0", slice(None, None, -1))):
            weights, h = params["Recurrent_0"][layer], np.zeros(5)
            states = [h := np.tanh(linear(each, weights["input"]) + h @ weights["kernel"]) for each in x[order]]
            outputs.append(np.max(states, 0))
        vectors.append(np.concatenate(outputs))
    u, v = vectors
    x = np.concatenate([u, v, abs(u - v), u * v])
    return linear(np.tanh(linear(x, params["Dense_0"])), params["Dense_1"])


def decomposable(params, *texts):
    """Section 3 of the paper, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def forward(x, name):
        for layer in ("Dense_0", "Dense_1"):
            x = np.maximum(linear(x, params[name][layer]), 0)
        return x

    a, b = (linear(params["Embed_0"]["embedding"][text], params["project"]) for text in texts)
    e = np.exp([[forward(x, "attend") @ forward(y, "attend") for y in b] for x in a])
    beta = [sum(e[i, j] * b[j] for j in range(len(b))) / e[i].sum() for i in range(len(a))]
    alpha = [sum(e[i, j] * a[i] for i in range(len(a))) / e[:, j].sum() for j in range(len(b))]
    v1 = sum(forward(np.concatenate(pair), "compare") for pair in zip(a, beta, strict=True))
    v2 = sum(forward(np.concatenate(pair), "compare") for pair in zip(b, alpha, strict=True))
    return linear(forward(np.concatenate([v1, v2]), "aggregate"), params["Dense_0"])


@pytest.mark.parametrize(
    ("model", "pair"), [(SIAMESE, siamese), (DECOMPOSABLE, decomposable)], ids=["siamese", "attention"]
)
def test_each_pair_is_its_equations_without_the_padding(model, pair):
    variables = drawn(model, FIRST, SECOND, train=False)
    found = jit(lambda: model.apply(variables, FIRST, SECOND, *LENGTHS, train=False))()
    for row, (n, m) in enumerate(zip(*LENGTHS, strict=True)):
        expected = pair(variables["params"], FIRST[row, :n], SECOND[row, :m])
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=2e-5)


@models
def test_padding_has_no_effect_on_gradients(model):
    variables = drawn(model, FIRST, SECOND, spread=0.7, train=False)
    loss = lambda v, *texts: jnp.sin(model.apply(v, *texts, *LENGTHS, train=False)).sum()
    value = jit(jax.value_and_grad(loss))
    one = value(variables, FIRST, SECOND)
    for padding in (3, 99):  # also an id outside of the vocabulary, whose vector is NaN
        changed = [
            np.where(np.arange(x.shape[1]) < n[:, None], x, padding)
            for x, n in zip((FIRST, SECOND), LENGTHS, strict=True)
        ]
        other = value(variables, *changed)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


@models
def test_dropout_follows_its_key(model):
    model = model.clone(dropout=0.5)
    variables = drawn(model, FIRST, SECOND, train=False)
    train = jit(lambda key: model.apply(variables, FIRST, SECOND, train=True, rngs={"dropout": key}))
    one, same, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@models
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((FIRST, SECOND[:2]), r"texts \(3, 5\) and \(2, 4\)"),
        ((FIRST[:, :0], SECOND), r"texts \(3, 0\)"),
        ((FIRST, SECOND[0]), r"and \(4,\)"),
        ((FIRST, SECOND, LENGTHS[0], LENGTHS[0]), "a sequence has length 5, expected 1 to 4"),
    ],
)
def test_other_pairs_are_refused(model, inputs, message):
    with pytest.raises(InputError, match=message):
        shapes(model, *inputs, train=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (SIAMESE.clone(units=0), "units is 0"),
        (SIAMESE.clone(dropout=1.0), "dropout is 1.0"),
        (DECOMPOSABLE.clone(hidden=0), "hidden is 0"),
        (DECOMPOSABLE.clone(dropout=-1.0), "dropout is -1.0"),
    ],
)
def test_what_cannot_be_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        shapes(model, FIRST, SECOND, train=False)
