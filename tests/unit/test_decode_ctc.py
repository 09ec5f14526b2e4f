"""Labellings by CTC against sums over all paths, with and without a lexicon."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.decode import ctc
from dl_jax.losses import ctc as loss

B, T, K = 4, 5, 3
LENGTHS = np.array([5, 3, 1, 4], np.int32)
LOGITS = np.random.default_rng(0).normal(0, 1.5, (B, T, K)).astype(np.float32)
ALL = 40  # beams, more than there are labellings of 5 frames
WORDS = ((0,), (0, 1), (1, 1), (1, 0, 0), (0, 1))  # labels beside the blank 2; one begins with another

best_path = jax.jit(ctc.best_path, static_argnums=2)
search = jax.jit(ctc.prefix_beam_search, static_argnums=(2, 3))


def collapse(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def labellings(logits, blank):  # [T, K] -> {labels: log-probability}
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = {}
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        labels = collapse(path, blank)
        found[labels] = found.get(labels, 0.0) + np.exp(sum(log_p[t, k] for t, k in enumerate(path)))
    return {labels: np.log(p) for labels, p in found.items() if p > 0}


def concatenations(words, most):
    """All sequences of words of up to `most` labels."""
    found, new = {()}, {()}
    while new := {(*s, *word) for s in new for word in words if len(s) + len(word) <= most} - found:
        found |= new
    return found


def read(beams, b):  # -> {labels: score}, in their order
    rows = zip(*(np.asarray(each[b]) for each in beams), strict=True)
    return {tuple(map(int, labels[:n])): float(score) for labels, score, n in rows if score > -np.inf}


def expected(b, blank, allowed=None):
    """All labellings of a sequence, the most probable first."""
    every = labellings(LOGITS[b, : LENGTHS[b]], blank)
    kept = {labels: p for labels, p in every.items() if allowed is None or labels in allowed}
    return dict(sorted(kept.items(), key=lambda pair: -pair[1]))


@pytest.mark.parametrize("blank", [0, 2])
def test_the_best_path_is_collapsed(blank):
    labels, counts = best_path(LOGITS, LENGTHS, blank)
    assert labels.dtype == counts.dtype == jnp.int32
    for b in range(B):
        reference = collapse(LOGITS[b, : LENGTHS[b]].argmax(-1), blank)
        assert tuple(labels[b, : counts[b]]) == reference
        assert (labels[b, counts[b] :] == blank).all()


def test_repetitions_need_a_blank_between():
    path = np.array([[1, 1, 0, 1, 2, 2, 0, 0], [0, 2, 1, 2, 1, 1, 1, 1]])
    labels, counts = best_path(np.eye(3)[path], np.array([8, 5]), 0)
    np.testing.assert_array_equal(labels, [[1, 1, 2, 0, 0, 0, 0, 0], [2, 1, 2, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(counts, [3, 4])


@pytest.mark.parametrize("blank", [0, 2])
def test_with_room_for_all_labellings_the_search_is_exact(blank):
    beams = search(LOGITS, LENGTHS, ALL, blank)
    for b in range(B):
        found, reference = read(beams, b), expected(b, blank)
        assert list(found) == list(reference)
        np.testing.assert_allclose([*found.values()], [*reference.values()], atol=2e-6)
        assert (beams.lengths[b, len(found) :] == 0).all()
        assert (beams.tokens[b, len(found) :] == blank).all()


def test_the_most_probable_labelling_need_not_be_that_of_the_best_path():
    logits = jnp.log(jnp.array([[[0.6, 0.4], [0.6, 0.4]]]))  # blank blank: 0.36; label 1: 0.64
    assert best_path(logits, np.array([2]), 0)[1][0] == 0
    beams = search(logits, np.array([2]), 2, 0)
    assert read(beams, 0) == pytest.approx({(1,): np.log(0.64), (): np.log(0.36)}, abs=1e-6)


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_with_few_beams_scores_are_bounds(beams):
    rng = np.random.default_rng(beams)
    logits, lengths = rng.normal(0, 2, (6, 12, 5)).astype(np.float32), rng.integers(1, 13, 6)
    found = search(logits, lengths, beams, 0)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    for w in range(beams):
        there = np.asarray(found.scores[:, w]) > -np.inf
        exact = -loss.negative_log_likelihood(logits, lengths, found.tokens[:, w], found.lengths[:, w])
        assert (np.asarray(found.scores[:, w]) <= np.asarray(exact) + 1e-4)[there].all()
    for row, count in zip(found.tokens, (found.scores > -np.inf).sum(1), strict=True):
        assert len({tuple(np.asarray(labels)) for labels in row[: int(count)]}) == count
    more = search(logits, lengths, 60, 0)
    assert (np.asarray(more.scores[:, 0]) >= np.asarray(found.scores[:, 0]) - 1e-4).all()


def test_a_lexicon_is_all_sequences_of_its_words():
    words = ctc.lexicon(WORDS, K, blank=2)
    for labels in (labels for n in range(8) for labels in itertools.product((0, 1), repeat=n)):
        state = 0
        for label in labels:
            state = words.following[state, label] if state >= 0 else state
        read_whole = bool(state >= 0 and words.final[state])
        assert read_whole == (labels in concatenations(WORDS, 7))
    assert (words.following[:, 2] == -1).all()


def test_with_a_lexicon_the_search_is_exact_among_sequences_of_words():
    words = ctc.lexicon(WORDS, K, blank=2)
    beams = search(LOGITS, LENGTHS, ALL, 2, words)
    for b in range(B):
        found, reference = read(beams, b), expected(b, 2, concatenations(WORDS, T))
        assert list(found) == list(reference)
        np.testing.assert_allclose([*found.values()], [*reference.values()], atol=2e-6)


def test_words_may_be_the_rows_of_an_array():
    found, expected = ctc.lexicon(np.array([[1, 2], [2, 2]]), 3), ctc.lexicon([(1, 2), (2, 2)], 3)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_word_that_does_not_fit_leaves_nothing_but_silence():
    words = ctc.lexicon([(0, 1, 0, 1)], K, blank=2)
    assert list(read(search(LOGITS, LENGTHS, 9, 2, words), 1)) == [()]
    loud = np.where(np.arange(K) == 2, -np.inf, LOGITS)
    beams = search(loud, LENGTHS, 9, 2, words)
    assert (beams.scores[1] == -np.inf).all()
    assert (beams.lengths[1] == 0).all()


def test_padding_nan_and_seeds():
    spoilt = np.where(np.arange(T)[:, None] < LENGTHS[:, None, None], LOGITS, np.nan)
    for found, reference in (
        (best_path(spoilt, LENGTHS, 0), best_path(LOGITS, LENGTHS, 0)),
        (search(spoilt, LENGTHS, 4, 0), search(LOGITS, LENGTHS, 4, 0)),
    ):
        jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(reference))
    spoilt[1, 0, 1] = np.nan
    labels, counts = best_path(spoilt, LENGTHS, 0)
    assert (labels[1] == -1).all()
    assert counts[1] == 3
    beams = search(spoilt, LENGTHS, 4, 0)
    assert np.isnan(beams.scores[1]).all()
    assert (beams.tokens[1] == -1).all()
    assert (beams.lengths[1] == 3).all()
    assert np.isfinite(beams.scores[np.array([0, 3])]).all()
    both = jnp.stack([LOGITS, LOGITS[::-1]])
    of_seeds = jax.jit(jax.vmap(lambda logits: ctc.prefix_beam_search(logits, LENGTHS, 4, 0)))(both)
    alone = search(both[1], LENGTHS, 4, 0)
    np.testing.assert_array_equal(of_seeds.tokens[1], alone.tokens)
    half = search(LOGITS.astype(jnp.bfloat16), LENGTHS, 4, 0)
    assert half.scores.dtype == jnp.float32


@pytest.mark.parametrize("change", [{1: np.nan}, {1: np.inf}, dict.fromkeys(range(K), -np.inf)])
def test_frames_without_probabilities_have_no_labels(change):
    spoilt = LOGITS.copy()
    for k, value in change.items():
        spoilt[0, 4, k] = spoilt[1, 4, k] = value  # the latter in the padding
    labels, counts = best_path(spoilt, LENGTHS, 0)
    beams = search(spoilt, LENGTHS, 4, 0)
    for found, number in ((labels, counts), (beams.tokens[:, 0], beams.lengths[:, 0])):
        assert (found[0] == -1).all()
        assert number[0] == LENGTHS[0]
        assert (found[1:] >= 0).all()
    np.testing.assert_array_equal(np.isnan(beams.scores).any(1), [True, False, False, False])
    assert np.isnan(beams.scores[0]).all()


@pytest.mark.parametrize(
    "function", [ctc.best_path, lambda *given: ctc.prefix_beam_search(given[0], given[1], 2, given[2])]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: LOGITS[0]}, r"logits are \(5, 3\), expected \(B, T, K\)"),
        ({0: LOGITS[:, :0]}, r"logits are \(4, 0, 3\), expected .* at least 1"),
        ({1: np.array([5, 0, 1, 4])}, "a sequence has length 0, expected 1 to 5"),
        ({1: np.array([5, 6, 1, 4])}, "a sequence has length 6, expected 1 to 5"),
        ({2: 3}, r"blank is 3, expected a class in \[0, 3\)"),
    ],
)
def test_bad_input_is_one_line(function, change, message):
    given = [LOGITS, LENGTHS, 0]
    for place, value in change.items():
        given[place] = value
    with pytest.raises(InputError, match=message) as error:
        function(*given)
    assert "\n" not in str(error.value)


def test_bad_lexicons_and_beams():
    for words, message in (
        ([], "there are no words"),
        ([(1,), ()], r"a word has the labels \(\), expected one or more in \[0, 3\)"),
        ([(1, 3)], r"a word has the labels \(1, 3\)"),
        ([(1, 0)], r"a word has the labels \(1, 0\), expected .* without the blank, 0"),
    ):
        with pytest.raises(InputError, match=message):
            ctc.lexicon(words, 3)
    for blank in (-1, 3):
        with pytest.raises(InputError, match=rf"^lexicon: blank is {blank}, expected a class in \[0, 3\)"):
            ctc.lexicon([(1,)], 3, blank)
    with pytest.raises(InputError, match=r"the lexicon has words with the label 0, expected none, as 0 is the blank; "):
        ctc.prefix_beam_search(LOGITS, LENGTHS, 2, words=ctc.lexicon([(0, 1)], 3, blank=2))
    with pytest.raises(InputError, match="the lexicon is for 4 classes, expected 3"):
        ctc.prefix_beam_search(LOGITS, LENGTHS, 2, words=ctc.lexicon([(1,)], 4))
    with pytest.raises(InputError, match="beams is 0, expected 1 or more"):
        ctc.prefix_beam_search(LOGITS, LENGTHS, 0)
