"""experiments/text/word_vectors.py: noise, the loss of pairs, what tells neighbours from noise, the nearest words."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import init_states, make_step, per_seed
from dl_jax.data import text
from dl_jax.harness.run import Run, Settings

RNG = np.random.default_rng(3)
KEY = jax.random.key(0)
NOISE = np.array([0, 0, 0.5, 0, 0.3, 0.2])
PAIRS = {"centre": np.array([2, 4, 5, 2, 2], np.int32), "context": np.array([4, 5, 2, 4, 5], np.int32)}
PARAMS = {name: RNG.normal(size=(6, 3)).astype(np.float32) for name in ("centre", "context")}


@pytest.fixture(scope="module")
def word_vectors(load_experiment):
    return load_experiment("text/word_vectors")


def test_noise_has_its_probabilities_and_none_of_probability_0(word_vectors):
    drawn = word_vectors.drawn(KEY, np.cumsum(NOISE), (100, 100))
    counts = np.bincount(drawn.ravel(), minlength=6)
    assert len(counts) == 6
    spread = np.sqrt(10_000 * NOISE * (1 - NOISE))
    assert (abs(counts - 10_000 * NOISE) <= 5 * spread).all()


@pytest.mark.parametrize(("uniform", "word"), [(0.0, 2), (0.49, 2), (0.5, 4), (1 - 2**-24, 5)])
def test_the_ends_of_the_noise(word_vectors, monkeypatch, uniform, word):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, uniform, jnp.float32))
    assert word_vectors.drawn(KEY, np.cumsum(NOISE) * 0.999, (1,)).tolist() == [word]


def test_the_loss_is_the_mean_over_pairs_with_their_noise(word_vectors):
    cumulative = np.cumsum(NOISE)
    loss = lambda params, batch: word_vectors.pair_loss(cumulative, 3, {"params": params}, batch, KEY)
    (value, _), noise = jax.jit(lambda *given: (loss(*given), word_vectors.drawn(KEY, cumulative, (5, 3))))(
        PARAMS, PAIRS
    )
    log_sigma = lambda x: -np.log1p(np.exp(-np.float64(x)))
    total = 0.0
    for i in range(5):
        centre = PARAMS["centre"][PAIRS["centre"][i]]
        total -= log_sigma(centre @ PARAMS["context"][PAIRS["context"][i]])
        total -= sum(log_sigma(-centre @ PARAMS["context"][word]) for word in noise[i])
    np.testing.assert_allclose(value, total / 5, rtol=1e-5)


def test_before_training_all_scores_are_equal(word_vectors):
    params = word_vectors.initial(KEY, 6, 4)
    assert abs(params["centre"]).max() <= 0.125
    loss = lambda params, batch: word_vectors.pair_loss(np.cumsum(NOISE), 3, {"params": params}, batch, KEY)
    value, _ = jax.jit(loss)(params, PAIRS)
    np.testing.assert_allclose(value, 4 * np.log(2), rtol=1e-6)
    batch = {**PAIRS, "noise": PAIRS["centre"], "mask": np.ones(5, np.float32)}
    total, count = jax.jit(word_vectors.told_apart)({"params": params}, batch, KEY)["accuracy"]
    assert (total, count) == (2.5, 5)


def test_pairs_are_told_apart_by_their_scores(word_vectors):
    batch = {**PAIRS, "noise": np.array([5, 4, 2, 2, 2], np.int32), "mask": np.array([1, 1, 1, 1, 0], np.float32)}
    total, count = jax.jit(word_vectors.told_apart)({"params": PARAMS}, batch, KEY)["accuracy"]
    score = lambda i, column: PARAMS["centre"][batch["centre"][i]] @ PARAMS["context"][batch[column][i]]
    won = [score(i, "context") > score(i, "noise") for i in range(4)]
    assert batch["context"][2] == batch["noise"][2]  # which is half of a pair
    assert (total, count) == (sum(won) + 0.5, 4)
    assert 0 < sum(won) < 3


@pytest.mark.parametrize("smoothing", [0.5, 20.0, np.inf])
def test_counts_of_pairs_by_a_slow_loop(word_vectors, smoothing):
    pairs = {name: RNG.choice([2, 4, 5], 40).astype(np.int32) for name in ("centre", "context")}
    held_out = {name: RNG.choice([2, 4, 5], 30).astype(np.int32) for name in ("centre", "context", "noise")}
    together = collections.Counter(zip(*(pairs[name].tolist() for name in ("centre", "context")), strict=True))
    contexts, centres = (collections.Counter(pairs[name].tolist()) for name in ("context", "centre"))

    def score(centre, context):
        share = contexts[context] / 40
        if smoothing == np.inf:
            return share / NOISE[context]
        given = (together[centre, context] + smoothing * share) / (centres[centre] + smoothing)
        return given / NOISE[context]

    won = 0.0
    for centre, context, noise in zip(*(held_out[name].tolist() for name in held_out), strict=True):
        right, wrong = score(centre, context), score(centre, noise)
        won += 0.5 if context == noise else float(right > wrong)
    np.testing.assert_allclose(word_vectors.counted(pairs, NOISE, smoothing, held_out), won / 30)


def test_each_held_out_pair_gets_one_word_of_noise(word_vectors):
    pairs = {name: np.tile(column, 1000) for name, column in PAIRS.items()}
    found, again = (word_vectors.with_noise(pairs, NOISE) for _ in range(2))
    np.testing.assert_array_equal(found["noise"], again["noise"])
    np.testing.assert_array_equal(found["context"], pairs["context"])
    np.testing.assert_allclose(np.bincount(found["noise"]) / 5000, NOISE, atol=0.04)


def test_the_nearest_have_the_largest_cosine(word_vectors):
    vectors = RNG.normal(size=(9, 4))
    vectors[:2] = 100 * vectors[4]  # padding and unknown words, which are never shown
    found = word_vectors.nearest(vectors, np.array([4, 7]), 3)
    for word, near in zip((4, 7), found, strict=True):
        cosine = lambda i, word=word: vectors[i] @ vectors[word] / np.linalg.norm(vectors[i])
        expected = sorted((i for i in range(2, 9) if i != word), key=cosine, reverse=True)
        assert near.tolist() == expected[:3]


def test_words_of_a_topic_become_neighbours(word_vectors):
    """A text that changes between two sets of ten words, five words at a time or more."""
    topics = np.repeat(RNG.integers(0, 2, 600), 8)
    ids = 2 + 10 * topics + RNG.integers(0, 10, len(topics))
    pairs = text.skip_grams(ids, 2, seed=0)
    noise = text.noise_share(np.bincount(ids, minlength=22))
    keys = KEY[None]
    states = init_states(keys, {"params": jax.vmap(lambda key: word_vectors.initial(key, 22, 6))(keys)}, ADAM)
    step = per_seed(make_step(functools.partial(word_vectors.pair_loss, np.cumsum(noise), 5), ADAM))
    states = fit(step, states, data.shuffled(pairs, 256, (0,)), steps=80)
    words = np.arange(2, 22)
    near = word_vectors.nearest(np.asarray(states.params["centre"][0]), words, 5)
    assert ((near < 12) == (words < 12)[:, None]).mean() > 0.95


ADAM = optax.adam(3e-2)


def test_a_word_that_is_not_known_is_refused_before_any_work(word_vectors):
    cfg = dataclasses.replace(word_vectors.PRESETS["smoke"], words=("if", "romeo"))
    with pytest.raises(InputError, match=r"--words holds 'romeo', expected words that occur 50 times .*, such as "):
        word_vectors.main(cfg, Run(settings=Settings(seeds=(0,))))
