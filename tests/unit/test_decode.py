"""Each way of drawing gives the distribution that its definition gives; generation is the loop that it stands for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import decode as sample
from dl_jax.core.errors import InputError
from dl_jax.models.sequence.rnn import CharLM

LOGITS = np.array([1.2, -0.3, 2.0, 0.4, -1.5, 1.9, 0.0], np.float32)
DRAWS = 20_000


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def renormalised(probabilities, kept):
    kept = np.isin(np.arange(len(probabilities)), list(kept))
    return np.where(kept, probabilities, 0) / probabilities[kept].sum()


def smallest_nucleus(probabilities, p):
    """The reference tries all sets: the fewest tokens with p or more, and of these sets the most probable."""
    for size in range(1, len(probabilities) + 1):
        best = max(itertools.combinations(range(len(probabilities)), size), key=lambda s: probabilities[list(s)].sum())
        if probabilities[list(best)].sum() >= p:
            return best
    raise AssertionError


def assert_drawn_from(tokens, expected):
    """Pearson's test at a level of 1e-6, and nothing where the probability is 0."""
    from scipy.stats import chi2

    counts = np.bincount(tokens, minlength=len(expected))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    cells = len(tokens) * expected[possible]
    statistic = ((counts[possible] - cells) ** 2 / cells).sum()
    assert statistic < chi2.isf(1e-6, max(possible.sum() - 1, 1))


P = softmax(LOGITS)
CASES = {
    "as it is": (lambda logits: logits, P),
    "t = 0.5": (lambda logits: sample.temperature(logits, 0.5), P**2 / (P**2).sum()),
    "t = 2": (lambda logits: sample.temperature(logits, 2.0), np.sqrt(P) / np.sqrt(P).sum()),
    "k = 1": (lambda logits: sample.top_k(logits, 1), renormalised(P, {2})),
    "k = 3": (lambda logits: sample.top_k(logits, 3), renormalised(P, {2, 5, 0})),
    "k = V": (lambda logits: sample.top_k(logits, 7), P),
    "p = 0.3": (lambda logits: sample.nucleus(logits, 0.3), renormalised(P, smallest_nucleus(P, 0.3))),
    "p = 0.8": (lambda logits: sample.nucleus(logits, 0.8), renormalised(P, smallest_nucleus(P, 0.8))),
    "p = 1": (lambda logits: sample.nucleus(logits, 1.0), P),
    "sharper, then a nucleus": (
        lambda logits: sample.nucleus(sample.temperature(logits, 0.5), 0.9),
        renormalised(P**2 / (P**2).sum(), smallest_nucleus(P**2 / (P**2).sum(), 0.9)),
    ),
    "three, then flatter": (
        lambda logits: sample.temperature(sample.top_k(logits, 3), 2.0),
        renormalised(np.sqrt(P), {2, 5, 0}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_renormalised_probabilities(name):
    f, expected = CASES[name]
    filtered = f(jnp.array(LOGITS))
    np.testing.assert_allclose(jax.nn.softmax(filtered), expected, atol=1e-6)
    tokens = jax.vmap(lambda key: sample.draw(key, filtered))(jax.random.split(jax.random.key(3), DRAWS))
    assert tokens.dtype == jnp.int32
    assert_drawn_from(np.asarray(tokens), expected)


def test_the_check_of_frequencies_can_fail():
    tokens = np.random.default_rng(0).choice(7, DRAWS, p=CASES["t = 0.5"][1])
    assert_drawn_from(tokens, CASES["t = 0.5"][1])
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, P)


@pytest.mark.parametrize("p", np.linspace(0.03, 0.99, 25))
def test_a_nucleus_is_the_smallest_set(p):
    filtered = np.asarray(sample.nucleus(jnp.array(LOGITS), float(p)))
    assert set(np.flatnonzero(np.isfinite(filtered))) == set(smallest_nucleus(P, p))
    np.testing.assert_array_equal(filtered[np.isfinite(filtered)], LOGITS[np.isfinite(filtered)])


def test_of_equal_logits_the_first_are_kept():
    ties = jnp.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    kept = lambda logits: np.flatnonzero(np.isfinite(logits)).tolist()
    assert sample.greedy(ties) == 1
    assert kept(sample.top_k(ties, 1)) == [1]
    assert kept(sample.top_k(ties, 3)) == [1, 2, 4]
    assert kept(sample.top_k(ties, 5)) == [0, 1, 2, 4, 5]
    assert kept(sample.nucleus(jnp.zeros(8), 0.5)) == [0, 1, 2, 3]  # exactly p is enough
    assert kept(sample.nucleus(jnp.zeros(8), 0.51)) == [0, 1, 2, 3, 4]


def test_leading_axes_are_rows_of_their_own():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 9))
    for f in (lambda x: sample.top_k(x, 4), lambda x: sample.nucleus(x, 0.6), lambda x: sample.temperature(x, 3.0)):
        rows = jnp.stack([jnp.stack([f(row) for row in matrix]) for matrix in logits])
        np.testing.assert_allclose(f(logits), rows, rtol=1e-6)
    np.testing.assert_array_equal(sample.greedy(logits), np.argmax(logits, -1))
    assert sample.draw(jax.random.key(1), logits).shape == (3, 4)


@pytest.mark.parametrize("tiny", [1e-30, sample.TINY])
def test_at_a_tiny_temperature_or_nucleus_the_largest_is_left(tiny):
    logits = jnp.array([3.0, 1e4, 1e4 - 1, -1e4])
    for choose in (sample.temperature, sample.nucleus):
        for filtered in (choose(logits, tiny), jax.jit(choose, static_argnums=1)(logits, tiny)):
            np.testing.assert_array_equal(jax.nn.softmax(filtered), [0, 1, 0, 0])


def test_half_precision_is_drawn_in_float32():
    logits = jnp.array(LOGITS, jnp.bfloat16)
    key = jax.random.key(0)
    assert sample.draw(key, logits) == sample.draw(key, logits.astype(jnp.float32))
    assert sample.temperature(logits, 0.5).dtype == jnp.float32


TRANSITIONS = np.array([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5], [0.2, 0.2, 0.6]])


def markov(token, carry):
    """Logits of a Markov chain; the carry counts the tokens and adds them up."""
    with np.errstate(divide="ignore"):
        logits = jnp.array(np.log(TRANSITIONS), jnp.float32)[token]
    return logits, {"seen": carry["seen"] + 1, "sum": carry["sum"] + token}


def empty(batch):
    return {"seen": jnp.int32(0), "sum": jnp.zeros(batch, jnp.int32)}


def test_generated_pairs_have_the_chains_frequencies():
    prompt = jnp.zeros((500, 1), jnp.int32)
    tokens, _ = sample.generate(markov, empty(500), prompt, 100, jax.random.key(0), sample.draw)
    tokens = np.asarray(tokens)
    assert tokens.shape == (500, 100)
    assert tokens.dtype == np.int32
    for state in range(3):
        assert_drawn_from(tokens[:, 1:][tokens[:, :-1] == state], TRANSITIONS[state])
    assert_drawn_from(tokens[:, 0], TRANSITIONS[0])
    assert len({tuple(row) for row in tokens}) == 500  # rows are independent


def test_generation_is_a_loop_and_can_be_continued():
    greedy = lambda key, logits: sample.greedy(logits)
    prompt = jnp.array([[2, 0, 1], [1, 1, 2]])
    tokens, carry = sample.generate(markov, empty(2), prompt, 6, jax.random.key(0), greedy)
    expected, last = [], prompt[:, -1]
    for _ in range(6):
        last = TRANSITIONS[np.asarray(last)].argmax(-1)
        expected.append(last)
    np.testing.assert_array_equal(tokens, np.stack(expected, 1))
    assert carry["seen"] == 3 + 5  # all but the last one
    np.testing.assert_array_equal(carry["sum"], prompt.sum(1) + tokens[:, :-1].sum(1))
    first, carry = sample.generate(markov, empty(2), prompt, 2, jax.random.key(0), greedy)
    second, _ = sample.generate(markov, carry, first[:, -1:], 4, jax.random.key(0), greedy)
    np.testing.assert_array_equal(jnp.concatenate([first, second], 1), tokens)


def test_generation_with_a_carry_is_generation_from_all_that_came_before():
    model = CharLM(vocabulary=11, hidden=6, layers=2)
    prompt = jnp.array([[3, 1, 4], [1, 5, 9]])
    params = jax.jit(lambda: model.init(jax.random.key(0), prompt, train=False))()

    def step(token, carry):
        logits, carry = model.apply(params, token[:, None], carry, train=False)
        return logits[:, 0], carry

    key = jax.random.key(1)
    tokens, _ = sample.generate(step, model.initial_carry(2), prompt, 5, key, sample.draw)
    whole = jax.jit(lambda seen: model.apply(params, seen, train=False)[0])
    seen = np.zeros((2, 8), np.int32)  # one length, compiled once: what comes later has no say in a logit
    seen[:, :3] = prompt
    for i in range(3, 8):
        seen[:, i] = sample.draw(jax.random.fold_in(key, i - 3), whole(seen)[:, i - 1])
    np.testing.assert_array_equal(tokens, seen[:, 3:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sample.temperature(x, 0), "temperature is 0, expected 1.2e-38 or more"),
        (lambda x: sample.temperature(x, 1e-38), "temperature is 1e-38"),
        (lambda x: sample.temperature(x, -1), "temperature is -1"),
        (lambda x: sample.temperature(x, float("nan")), "temperature is nan"),
        (lambda x: sample.temperature(x, float("inf")), "temperature is inf"),
        (lambda x: sample.top_k(x, 0), "k is 0, expected 1 to 7"),
        (lambda x: sample.top_k(x, 8), "k is 8, expected 1 to 7"),
        (lambda x: sample.nucleus(x, 0), "p is 0, expected 1.2e-38 to 1"),
        (lambda x: sample.nucleus(x, 1e-38), "p is 1e-38"),
        (lambda x: sample.nucleus(x, 1.01), "p is 1.01"),
        (lambda x: sample.nucleus(x, -0.5), "p is -0.5"),
        (lambda x: sample.nucleus(x, float("nan")), "p is nan"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(jnp.array(LOGITS))


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [((2, 0), 3, r"the prompt is \(2, 0\)"), ((2,), 3, r"the prompt is \(2,\)"), ((2, 1), 0, "steps is 0")],
)
def test_bad_prompts_are_refused(shape, steps, message):
    with pytest.raises(InputError, match=message):
        sample.generate(markov, empty(2), jnp.zeros(shape, int), steps, jax.random.key(0), sample.draw)
