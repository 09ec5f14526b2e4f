"""Metrics that are no sums: entities, BLEU and correlations."""

import itertools
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import metrics
from dl_jax.core.errors import InputError

# Entities

NAMES = ["O", "B-A", "I-A", "B-X", "I-X"]
LETTERS = "-AaXx"  # one for each name
# The entities that seqeval 1.2.2 finds, as TYPE START:STOP.
GOLDEN = (
    ("x-xAA", "X0:1 X2:3 A3:4 A4:5"),
    ("xAa-X", "X0:1 A1:3 X4:5"),
    ("AXAa-A-", "A0:1 X1:2 A2:4 A5:6"),
    ("-X-ax", "X1:2 A3:4 X4:5"),
    ("Xa--xa-", "X0:1 A1:2 X4:5 A5:6"),
    ("aXax-aa-", "A0:1 X1:2 A2:3 X3:4 A5:7"),
    ("xa-xa", "X0:1 A1:2 X3:4 A4:5"),
    ("aX-xaX", "A0:1 X1:2 X3:4 A4:5 X5:6"),
    ("x--xxxa-", "X0:1 X3:6 A6:7"),
    ("-aX", "A1:2 X2:3"),
    ("--ax", "A2:3 X3:4"),
    ("x-axAa-", "X0:1 A2:3 X3:4 A4:6"),
    ("xxxa-", "X0:3 A3:4"),
    ("X-x-x-", "X0:1 X2:3 X4:5"),
    ("Aa-", "A0:2"),
    ("A--A", "A0:1 A3:4"),
    ("aAXaAx", "A0:1 A1:2 X2:3 A3:4 A4:5 X5:6"),
    ("ax", "A0:1 X1:2"),
    ("a-x", "A0:1 X2:3"),
    ("----", ""),
    ("a-AAaaax", "A0:1 A2:3 A3:7 X7:8"),
    ("XAAA---", "X0:1 A1:2 A2:3 A3:4"),
    ("Aax", "A0:2 X2:3"),
    ("XXXa", "X0:1 X1:2 X2:3 A3:4"),
    ("aa-a", "A0:2 A3:4"),
    ("--aX-Xa-", "A2:3 X3:4 X5:6 A6:7"),
    ("A-", "A0:1"),
    ("x-X-A-xA", "X0:1 X2:3 A4:5 X6:7 A7:8"),
    ("aaaAAx-x", "A0:3 A3:4 A4:5 X5:6 X7:8"),
    ("XAaAAa-a", "X0:1 A1:3 A3:4 A4:6 A7:8"),
)


def named(letters):
    return [NAMES[LETTERS.index(letter)] for letter in letters]


def numbers(*rows):
    return np.array([[LETTERS.index(letter) for letter in row] for row in rows])


@pytest.mark.parametrize(("letters", "expected"), GOLDEN)
def test_entities_are_those_of_seqeval(letters, expected):
    found = metrics.entities(named(letters))
    assert " ".join(f"{kind}{start}:{stop}" for kind, start, stop in found) == expected


def test_entities_of_all_short_sequences():
    """From i to j stands an entity if it begins there, goes on by I alone, and no I of its type goes on after it."""
    for n in range(6):
        for letters in itertools.product(LETTERS, repeat=n):
            row, expected = "".join(letters) + "-", []
            for kind, i, j in itertools.product("AX", range(n), range(1, n + 1)):
                own, before = kind.lower(), row[i - 1] if i else "-"
                begins = row[i] == kind or (row[i] == own and before.upper() != kind)
                if i < j and begins and set(row[i + 1 : j]) <= {own} and row[j] != own:
                    expected.append((kind, i, j))
            assert sorted(metrics.entities(named(letters))) == sorted(expected), letters


TRUE = numbers("Aa-Xx-A-", "xx-aaA--", "---X----", "AaaxXx-a")
FOUND = numbers("AaaXx-a-", "xX-aA---", "--------", "Aaax-x-A")


def test_entity_scores_are_those_of_seqeval():
    """5 of 11 true and of 11 predicted entities; A: 3 of 6 and 6, X: 2 of 5 and 5."""
    lengths = np.full(4, 8)
    both = metrics.entity_scores(np.stack([FOUND, TRUE, 0 * TRUE]), TRUE, lengths, NAMES)
    for scores, first, support in ((both[0], 5 / 11, 11), (both[1]["A"], 0.5, 6), (both[1]["X"], 0.4, 5)):
        for each in (scores.precision, scores.recall, scores.f1):
            np.testing.assert_allclose(each, [first, 1, 0])  # a seed each; the last finds nothing
        assert scores.support == support
    assert [*both[1]] == ["A", "X"]
    alone, _ = metrics.entity_scores(FOUND, TRUE, lengths, NAMES)
    assert alone.f1.shape == ()
    assert float(alone.f1) == pytest.approx(5 / 11)


def test_precision_recall_and_f1_differ():
    scores, by_type = metrics.entity_scores(numbers("AAA-X"), numbers("A---X"), np.array([5]), NAMES)
    assert [float(x) for x in scores[:3]] == pytest.approx([2 / 4, 1, 2 / 3])
    assert [float(x) for x in by_type["A"][:3]] == pytest.approx([1 / 3, 1, 1 / 2])


def test_what_stands_after_the_end_has_no_effect():
    lengths, padding = np.array([5, 1, 4, 8]), np.arange(8) >= np.array([5, 1, 4, 8])[:, None]
    expected = metrics.entity_scores(np.where(padding, 0, FOUND), np.where(padding, 0, TRUE), lengths, NAMES)
    for filler in (-1, 2, 99):
        padded = np.where(padding, filler, FOUND), np.where(padding, filler, TRUE)
        assert metrics.entity_scores(*padded, lengths, NAMES) == expected


# BLEU


def test_bleu_by_hand():
    """5/6 words, 3/5 pairs, 2/4 triples and 1/3 quadruples; then all of them, but 5 words where 7 should be."""
    score, signature = metrics.bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert metrics.bleu(["a b c d e"], ["a b c d e f g"]).score == pytest.approx(100 * np.exp(1 - 7 / 5))
    assert metrics.bleu(["a b c d e."], ("a b c d e .",)).score == pytest.approx(100)  # it takes the full stop apart


def test_bleu_of_a_corpus_with_several_references():
    """The example of sacreBLEU's README, whose references stand the other way round there."""
    hypotheses = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    first = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    second = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]
    score, signature = metrics.bleu(hypotheses, list(zip(first, second, strict=True)))
    assert score == pytest.approx(48.53, abs=0.005)
    assert "nrefs:2" in signature
    assert metrics.bleu(hypotheses, [[first[0], second[0]], first[1], [first[2]]])[1].startswith("nrefs:var")


def test_bleu_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[text\]'"):
        metrics.bleu(["a"], ["a"])


# Correlations


def reference(x, y):
    """Pearson's correlation in loops of Python's float64."""
    x, y = [float(a) for a in x], [float(b) for b in y]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return over / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5


def ranks(x):
    """1 and the number of smaller values, plus half of the others that are equal."""
    return [1 + sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x]


@pytest.mark.parametrize("n", [2, 3, 40])
def test_correlations_match_loops_with_ties(n):
    rng = np.random.default_rng(n)
    targets = np.r_[0, 1, rng.integers(0, 4, n - 2)].astype(np.float32)
    rows = np.stack([np.r_[0, 2, rng.integers(0, 5, n - 2)], np.r_[3, 1, rng.normal(size=n - 2)]]).astype(np.float32)
    for given in (rows, jnp.asarray(rows)):
        found = metrics.pearson(given, targets), metrics.spearman(given, targets)
        expected = [reference(x, targets) for x in rows], [reference(ranks(x), ranks(targets)) for x in rows]
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert metrics.spearman(rows[0], targets).shape == ()


def test_ranks_see_the_order_alone():
    x = np.array([1.0, 2, 3, 4, 5])
    assert metrics.spearman(np.exp(10 * x), x) == pytest.approx(1)
    assert metrics.spearman(1 + 1e-14 * x, -x) == pytest.approx(-1)
    assert metrics.pearson(np.exp(10 * x), x) < 0.8


def test_a_diverged_seed_has_no_correlation():
    rows = np.array([[1.0, np.nan, 2], [1, 2, 3], [1, np.inf, 2]])
    for correlation in (metrics.pearson, metrics.spearman):
        np.testing.assert_allclose(correlation(rows, np.arange(3)), [np.nan, 1, np.nan])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.entities(["O", "E-A"]), "a tag is 'E-A'"),
        (lambda: metrics.entities(["B"]), "a tag is 'B'"),
        (lambda: metrics.entity_scores(TRUE[0], TRUE, np.full(4, 8), NAMES), "predicted (8,) for tags (4, 8)"),
        (lambda: metrics.entity_scores(TRUE[0], TRUE[0], np.full(4, 8), NAMES), "expected (..., N, T) for (N, T)"),
        (lambda: metrics.entity_scores(TRUE, TRUE, np.full(3, 8), NAMES), "whole numbers (4,)"),
        (lambda: metrics.entity_scores(TRUE, TRUE, np.full(4, 9), NAMES), "length 9, expected 1 to 8"),
        (lambda: metrics.entity_scores(TRUE - 1, TRUE, np.full(4, 8), NAMES), "from -1 to 3, expected integers from 0"),
        (lambda: metrics.entity_scores(TRUE, TRUE, np.full(4, 8), NAMES[:4]), "from 0 to 4, expected integers"),
        (lambda: metrics.entity_scores(TRUE * 1.0, TRUE, np.full(4, 8), NAMES), "class numbers are float64"),
        (lambda: metrics.entity_scores(TRUE, TRUE, np.full(4, 8), [*NAMES, "PER"]), "a tag is 'PER'"),
        (lambda: metrics.bleu("a text", ["a text"]), "hypotheses are a text, references 1 texts"),
        (lambda: metrics.bleu(["a"], ["a", "b"]), "hypotheses are 1 texts, references 2 texts"),
        (lambda: metrics.bleu([], []), "got 'nothing' for a text"),
        (lambda: metrics.bleu(["a"], [[]]), "got 'nothing' for a text"),
        (lambda: metrics.bleu([b"a"], ["a"]), "got b'a' for a text"),
        (lambda: metrics.bleu(["a"], [["a", 3]]), "got 3 for a text"),
        (lambda: metrics.spearman(np.arange(3), np.full(3, 2.5)), "all 3 targets are 2.5"),
        (lambda: metrics.pearson(np.arange(3), np.arange(4)), "predictions (3,) for targets (4,)"),
        (lambda: metrics.pearson(np.ones((2, 1)), np.ones(1)), "with N at least 2"),
        (lambda: metrics.pearson(np.ones(()), np.ones(())), "predictions () for targets ()"),
        (lambda: metrics.spearman(np.arange(2), np.array([1, np.nan])), "a target is not finite"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_sentences_have_no_entities():
    found, _ = metrics.entity_scores(np.zeros((2, 0, 3), int), np.zeros((0, 3), int), np.zeros(0, int), ("O", "B-x"))
    np.testing.assert_array_equal(found.f1, [0, 0])


def test_equal_predictions_have_no_correlation():
    """A network that has collapsed does not end the run of the others."""
    np.testing.assert_array_equal(metrics.spearman(np.array([[1, 2], [3, 3]]), np.arange(2)), [1, np.nan])
    assert np.isnan(metrics.pearson(np.ones(3), np.arange(3)))
    assert np.isnan(metrics.pearson(1 + 1e-14 * np.arange(3), np.arange(3)))


# Word errors


def fewest_edits(found, reference):
    """The reference: all ways of aligning, by recursion."""
    if not found or not reference:
        return len(found) + len(reference)
    return min(
        fewest_edits(found[1:], reference) + 1,
        fewest_edits(found, reference[1:]) + 1,
        fewest_edits(found[1:], reference[1:]) + (found[0] != reference[0]),
    )


def test_edit_distances_are_the_least_of_all_alignments():
    rng = np.random.default_rng(0)
    for _ in range(60):
        found, reference = (tuple(rng.integers(0, 3, rng.integers(0, 6)).tolist()) for _ in range(2))
        assert metrics.edit_distance(found, reference) == fewest_edits(found, reference)
    assert metrics.edit_distance("kitten", "sitting") == 3
    assert metrics.edit_distance(np.array([1, 2, 2]), [2, 2]) == 1


def test_the_word_error_rate_is_of_all_words():
    found, references = [["a", "b", "c"], [], ["x", "y"]], [["a", "c"], ["d"], []]
    assert metrics.word_error_rate(found, references) == (1 + 1 + 2) / 3  # also of words that nobody said
    assert metrics.word_error_rate(references, references) == 0
    assert metrics.word_error_rate(np.array([[3, 4]]), [[3, 5]]) == 0.5


@pytest.mark.parametrize(
    ("found", "references", "message"),
    [
        ([["a"]], [["a"], ["b"]], "1 sequences for 2 references, expected as many"),
        (["a b"], [["a", "b"]], "a sequence of words is the text 'a b', expected separate words"),
        ("ab", "ab", "a sequence of words is the text 'ab'"),
        ([["a"], []], [[], []], "the references have no words, expected one or more"),
        ([], [], "the references have no words"),
    ],
)
def test_bad_words_are_one_line(found, references, message):
    with pytest.raises(InputError, match=message) as error:
        metrics.word_error_rate(found, references)
    assert "\n" not in str(error.value)
