"""Drawing gives the distribution of its definition, generation is its loop, and beam search finds the best."""

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


HASHES = 101


def table(vocabulary, seed=0):
    """Logits of the next token for each hash of all tokens before."""
    return np.random.default_rng(seed).normal(0, 1.5, (HASHES, vocabulary)).astype(np.float32)


def hashed(token, code):
    return (code * 5 + token + 1) % HASHES


def hashing(logits):
    """A model whose logits depend on all tokens before, by their hash."""

    def step(token, code):
        code = hashed(token, code)
        return jnp.array(logits)[code], code

    return step


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def normalised(log_p, length, alpha):
    return log_p / ((5 + length) / 6) ** alpha


def all_sequences(logits, code, steps, end):
    """{sequence: log-probability} of all that end, or have `steps` tokens, after what `code` stands for."""
    found, open_ = {}, {(): (0.0, code)}
    for _ in range(steps):
        longer = {}
        for sequence, (log_p, code) in open_.items():
            for token, more in enumerate(log_softmax(logits[code])):
                into = found if token == end else longer
                total = log_p + more
                into[*sequence, token] = total if token == end else (total, hashed(token, code))
        open_ = longer
    return found | {sequence: log_p for sequence, (log_p, _) in open_.items()}


def sequences(beams, row):
    """The sequences of one prompt, without what follows their ends."""
    return [tuple(map(int, tokens[:n])) for tokens, n in zip(beams.tokens[row], beams.lengths[row], strict=True)]


PROMPTS = np.array([[1, 2], [0, 2], [2, 2]])
CODES = [hashed(token, hashed(first, 7)) for first, token in PROMPTS]


def search(logits, steps, beams, end=0, alpha=0.0):
    run = lambda prompt: sample.beam_search(
        hashing(logits), jnp.full(len(prompt), 7), prompt, steps, beams, end, alpha=alpha
    )
    return jax.device_get(jax.jit(run)(PROMPTS))


@pytest.mark.parametrize(("vocabulary", "beams"), [(3, 40), (4, 130)])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0])
def test_with_enough_beams_all_sequences_are_found_in_order(vocabulary, beams, alpha):
    logits = table(vocabulary)
    found = search(logits, 4, beams, alpha=alpha)
    for row, code in enumerate(CODES):
        scores = {s: normalised(log_p, len(s), alpha) for s, log_p in all_sequences(logits, code, 4, 0).items()}
        best = sorted(scores, key=scores.__getitem__, reverse=True)
        assert sequences(found, row)[: len(best)] == best
        np.testing.assert_allclose(found.scores[row, : len(best)], [scores[s] for s in best], rtol=1e-5)
        assert (found.scores[row, len(best) :] == -np.inf).all()
        assert not found.lengths[row, len(best) :].any()
        assert len(best) < beams
    np.testing.assert_array_equal(found.tokens[np.arange(4) >= found.lengths[..., None]], 0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_few_beams_are_the_best_of_their_continuations(alpha):
    """A beam search written out with lists."""
    logits = table(4, seed=1)
    found = search(logits, 6, 3, alpha=alpha)
    for row, code in enumerate(CODES):
        kept = [((), 0.0, code)]
        for _ in range(6):
            new = []
            for sequence, log_p, at in kept:
                if sequence[-1:] == (0,):
                    new.append((sequence, log_p, at))
                    continue
                for token, more in enumerate(log_softmax(logits[at])):
                    new.append(((*sequence, token), log_p + more, hashed(token, at)))
            kept = sorted(new, key=lambda each: -normalised(each[1], len(each[0]), alpha))[:3]
        assert sequences(found, row) == [sequence for sequence, *_ in kept]
        expected = [normalised(log_p, len(sequence), alpha) for sequence, log_p, _ in kept]
        np.testing.assert_allclose(found.scores[row], expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_beam_is_greedy_up_to_the_end_token(alpha):
    logits = table(3, seed=2)
    greedy = lambda key, logits: sample.greedy(logits)
    tokens, _ = sample.generate(hashing(logits), jnp.full(3, 7), PROMPTS, 8, jax.random.key(0), greedy)
    found = search(logits, 8, 1, alpha=alpha)
    ends = [list(row).index(0) + 1 if 0 in row else 8 for row in np.asarray(tokens)]
    assert 1 < min(ends) < 8
    np.testing.assert_array_equal(found.lengths[:, 0], ends)
    for row, n in enumerate(ends):
        np.testing.assert_array_equal(found.tokens[row, 0, :n], tokens[row, :n])


def test_the_length_penalty_by_hand():
    """P(end) is 0.4 at once and 1 after another token: the scores are log 0.4 and log 0.6 / ((5 + 2) / 6)^alpha."""
    logits = np.log(np.array([[0.4, 0.6], [1.0, 1e-30]], np.float32))  # of the first token and of others
    step = lambda token, read: (jnp.array(logits)[jnp.minimum(read, 1)], read + 1)
    for alpha in (0.0, 1.0, 5.0):
        found = sample.beam_search(step, jnp.zeros(1, int), jnp.ones((1, 1), int), 2, 2, 0, alpha)
        np.testing.assert_allclose(found.scores[0], [np.log(0.6) / (7 / 6) ** alpha, np.log(0.4)], rtol=1e-6)
        np.testing.assert_array_equal(found.tokens[0], [[1, 0], [0, 0]])
        np.testing.assert_array_equal(found.lengths[0], [2, 1])


def test_a_length_penalty_prefers_the_longer_sequence():
    logits = np.log(np.array([[0.55, 0.45], [1.0, 1e-30]], np.float32))
    step = lambda token, read: (jnp.array(logits)[jnp.minimum(read, 1)], read + 1)
    best = [
        sample.beam_search(step, jnp.zeros(1, int), jnp.ones((1, 1), int), 2, 2, 0, alpha).lengths[0, 0]
        for alpha in (0.0, 1.0, 3.0)
    ]
    assert best == [1, 1, 2]  # log 0.45 / log 0.55 is 1.34: above 7 / 6, below (7 / 6)^3


def test_an_end_token_in_the_prompt_does_not_end_a_sequence():
    found = sample.beam_search(hashing(table(3)), jnp.full(2, 7), jnp.zeros((2, 1), int), 3, 2, 0)
    assert (found.scores < 0).all()
    assert (found.lengths > 0).all()


def test_dead_ends_are_no_sequences():
    """After 1 comes 2 only, after 2 the end or 2 again, and after 3, which is excluded, nothing."""
    none = -np.inf
    table = jnp.array([[0, 0, 0, 0], [none, none, 0, none], [0, none, 0.3, none], [none] * 4])
    found = sample.beam_search(lambda token, carry: (table[token], carry), jnp.zeros(1), jnp.array([[1]]), 3, 4, 0)
    assert found.tokens[0].tolist() == [[2, 0, 0], [2, 2, 2], [2, 2, 0], [0, 0, 0]]
    assert found.lengths[0].tolist() == [2, 3, 3, 0]
    end, on = np.log(1 / (1 + np.exp(0.3))), np.log(np.exp(0.3) / (1 + np.exp(0.3)))
    np.testing.assert_allclose(found.scores[0], [end, 2 * on, on + end, -np.inf], rtol=1e-6)
    lost = sample.beam_search(
        lambda token, carry: (table[3 + 0 * token], carry), jnp.zeros(1), jnp.array([[1]]), 2, 2, 0
    )
    assert (np.asarray(lost.scores) == -np.inf).all()
    assert not np.asarray(lost.lengths).any()


def test_a_token_of_logits_that_are_nan_is_no_token():
    step = lambda token, read: (jnp.where(read[:, None] < 3, jnp.zeros((len(token), 3)), jnp.nan), read + 1)
    for choose in (sample.draw, lambda key, logits: sample.greedy(logits)):
        tokens, _ = sample.generate(step, jnp.zeros(2, int), jnp.ones((2, 1), int), 5, jax.random.key(0), choose)
        assert (np.asarray(tokens[:, :3]) >= 0).all()
        assert (np.asarray(tokens[:, 3:]) == -1).all()


def test_a_model_that_gives_nan_is_seen():
    """Such as one that runs past its block, beside a sequence that has ended before."""
    step = lambda token, read: (jnp.where(read[:, None] < 2, jnp.zeros((len(token), 3)), jnp.nan), read + 1)
    found = sample.beam_search(step, jnp.zeros(2, int), jnp.ones((2, 1), int), 3, 3, 0)
    assert np.isnan(found.scores[:, 0]).all()


def test_beams_carry_their_own_states():
    """The score of each sequence is its log-probability by a model that reads it from its beginning."""
    model = CharLM(vocabulary=5, hidden=4, layers=2)
    params = jax.tree.map(lambda leaf: 3 * leaf, jax.jit(lambda: model.init(jax.random.key(0), PROMPTS, train=False))())

    def step(token, carry):
        logits, carry = model.apply(params, token[:, None], carry, train=False)
        return logits[:, 0], carry

    found = jax.jit(lambda: sample.beam_search(step, model.initial_carry(3), jnp.array(PROMPTS), 5, 4, 0))()
    whole = np.concatenate([np.repeat(PROMPTS, 4, 0), found.tokens.reshape(12, 5)], 1)
    logits = jax.jit(lambda tokens: model.apply(params, tokens, train=False)[0])(whole)
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, 1:-1], whole[:, 2:, None], 2)[..., 0]
    counted = np.arange(5) < np.reshape(found.lengths, (12, 1))
    np.testing.assert_allclose(np.where(counted, log_p, 0).sum(1), np.ravel(found.scores), rtol=1e-5)
    assert len({tuple(row) for row in whole}) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 0}, "beams is 0, expected 1 or more"),
        ({"alpha": -0.1}, "alpha is -0.1, expected 0 or more"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"end": 3}, r"end is 3, expected a token in \[0, 3\)"),
        ({"end": -1}, "end is -1"),
        ({"steps": 0}, "beam_search: steps is 0"),
        ({"prompt": jnp.zeros((2, 0), int)}, r"beam_search: the prompt is \(2, 0\)"),
        ({"carry": jnp.int32(0)}, r"a leaf of the carry is \(\), expected \[2, ...\]"),
        ({"carry": jnp.zeros(3, int)}, r"a leaf of the carry is \(3,\)"),
    ],
)
def test_a_search_that_cannot_be_is_refused(change, message):
    step = lambda token, carry: (jnp.zeros((len(token), 3)), carry)
    settings = {"carry": jnp.zeros(2, int), "prompt": jnp.zeros((2, 1), int), "steps": 2, "beams": 2, "end": 0}
    with pytest.raises(InputError, match=message):
        sample.beam_search(step, **{**settings, **change})


def test_the_repetition_penalty_is_its_equation():
    logits = abs(LOGITS) + np.float32(0.1)
    seen = np.array([True, False, True, False, True, False, False])
    found = jax.nn.softmax(sample.temperature(sample.repetition_penalty(jnp.array(logits), seen, 1.2), 0.7))
    weights = np.exp(logits.astype(np.float64) / (0.7 * np.where(seen, 1.2, 1.0)))
    np.testing.assert_allclose(found, weights / weights.sum(), rtol=1e-5)


def test_the_penalty_never_makes_a_seen_token_more_probable():
    logits = np.append(LOGITS, [-np.inf, 0.0]).astype(np.float32)
    for token in range(len(logits)):
        found = np.asarray(sample.repetition_penalty(jnp.array(logits), np.arange(len(logits)) == token, 1.5))
        expected = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        np.testing.assert_allclose(found[token], expected, rtol=1e-6)
        np.testing.assert_array_equal(np.delete(found, token), np.delete(logits, token))
    np.testing.assert_array_equal(sample.repetition_penalty(jnp.array(logits), np.ones(9, bool), 1.0), logits)
    assert sample.repetition_penalty(jnp.array(logits, jnp.bfloat16), np.ones(9, bool), 1.5).dtype == jnp.float32


def test_generation_with_a_penalty_is_a_loop_over_all_tokens_so_far():
    logits, greedy = table(5, seed=3), lambda key, logits: sample.greedy(logits)
    carry = jnp.full(3, 7), jnp.zeros((3, 5), bool)
    step = sample.with_repetition_penalty(hashing(logits), 3.0)
    tokens, (_, seen) = sample.generate(step, carry, PROMPTS, 6, jax.random.key(0), greedy)
    plain, _ = sample.generate(hashing(logits), carry[0], PROMPTS, 6, jax.random.key(0), greedy)
    assert (tokens != plain).any()
    for row, (prompt, code) in enumerate(zip(PROMPTS, CODES, strict=True)):
        read = list(prompt)
        for token in np.asarray(tokens[row]):
            x = logits[code].astype(np.float64)
            x = np.where(np.isin(np.arange(5), read), np.where(x > 0, x / 3, x * 3), x)
            assert token == x.argmax()
            read.append(token)
            code = hashed(token, code)
        np.testing.assert_array_equal(np.flatnonzero(seen[row]), sorted({*map(int, read[:-1])}))
    beams = sample.beam_search(step, carry, jnp.array(PROMPTS), 6, 1, end=4)
    upto = beams.lengths[0, 0]
    np.testing.assert_array_equal(beams.tokens[0, 0, :upto], tokens[0, :upto])


@pytest.mark.parametrize("theta", [0.9, 0, -1, float("nan"), float("inf")])
def test_a_penalty_that_is_none_is_refused(theta):
    with pytest.raises(InputError, match=f"theta is {theta}, expected 1 or more"):
        sample.repetition_penalty(jnp.array(LOGITS), np.ones(7, bool), theta)


@pytest.mark.parametrize("shape", [(2, 1), (2, 4)])
def test_seen_tokens_of_another_vocabulary_are_refused(shape):
    step = sample.with_repetition_penalty(lambda token, carry: (jnp.zeros((2, 3)), carry), 1.2)
    with pytest.raises(InputError, match=r"expected \(2, 3\), as the logits"):
        step(jnp.zeros(2, int), (None, jnp.zeros(shape, bool)))
