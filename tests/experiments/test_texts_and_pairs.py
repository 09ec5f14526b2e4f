"""Classifiers of texts and of pairs: their targets, their controls, and what is refused."""

import dataclasses

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.harness import Run


@pytest.fixture(scope="module")
def classify(load_experiment):
    return load_experiment("text/classify")


@pytest.fixture(scope="module")
def match(load_experiment):
    return load_experiment("text/match")


def test_a_split_without_labels_is_refused(classify, monkeypatch):
    unlabelled = {"text": np.array([b"a", b"b"]), "label-coarse": np.array([0, -1], np.int32)}
    monkeypatch.setattr(classify.data, "load", lambda *args, **rest: unlabelled)
    with pytest.raises(InputError, match="trec's split test has the label -1, expected 0 or more"):
        classify.labelled(classify.Config(), "test")


@pytest.mark.parametrize("name", ["classify", "match"])
def test_one_class_is_refused_before_any_training(name, request, monkeypatch):
    module = request.getfixturevalue(name)
    cfg = dataclasses.replace(module.PRESETS["smoke"], train_split="train[:1]")
    monkeypatch.setattr(module, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=r"all 1 examples of docstrings to learn from have the label \d+"):
        module.main(cfg, Run())


@pytest.mark.parametrize("column", ["text", "label-coarse"])
def test_columns_of_another_kind_are_refused(classify, monkeypatch, column):
    records = {"text": np.array([b"a", b"b"]), "label-coarse": np.zeros(2, np.int32)}
    monkeypatch.setattr(classify.data, "load", lambda *args, **rest: {**records, column: np.ones(2, np.float32)})
    with pytest.raises(InputError, match=rf"column '{column}' of trec is float32 \(2,\), expected a text or a class"):
        classify.labelled(classify.Config(), "test")


def test_the_control_reads_words_and_pairs_of_words(classify):
    """Who bites whom is in no single word."""
    texts = np.array([b"dogs bite men", b"men bite dogs", b"cats bite men", b"men bite cats"])
    given = {"text": texts, "label": np.array([0, 1, 0, 1])}
    assert classify.tfidf_accuracy(given, given) == 100
    assert classify.tfidf_accuracy(given, {"text": np.array([b"bite men \xff"]), "label": np.array([1])}) == 0


def test_a_degree_is_the_mean_of_its_distribution(match):
    degrees = np.linspace(1, 5, 33)
    found = match.mixtures(degrees, 5)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(found @ np.arange(1, 6), degrees, rtol=1e-6)
    assert (found >= 0).all()
    np.testing.assert_allclose(found[1], [0.875, 0.125, 0, 0, 0])
    with pytest.raises(InputError, match=r"degrees from 0 to 6, expected 1 to 5"):
        match.mixtures(np.array([0, 6]), 5)


def test_pairs_of_docstrings(match):
    """Every other sentence stands beside words of its own, the rest beside those of the next one."""
    found = match.pairs(match.PRESETS["smoke"], "test[:32]")
    sentences = data.load("docstrings", "test[:32]")["summary"].tolist()
    own = [
        set(second.split()) <= set(first.split()) for first, second in zip(found["first"], found["second"], strict=True)
    ]
    np.testing.assert_array_equal(found["relation"][:, :2].argmax(1), own)
    np.testing.assert_array_equal(found["relatedness"].argmax(1), 4 * np.array(own))
    assert own == [False, True] * 16
    assert found["second"][0] == b" ".join(sentences[1].split()[::2])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", np.array([0, -1], np.int32), "label -1 of example 1"),
        ("label", np.array([0, 3], np.int32), "label 3 of example 1 .* expected 0 to 2"),
        ("label", np.array([0.5, 1]), "the labels of data set sick2014 are float64"),
        ("relatedness_score", np.array([b"a", b"b"]), "column 'relatedness_score' of sick2014 is"),
    ],
)
def test_columns_that_are_no_pairs(match, monkeypatch, column, values, message):
    records = {"sentence_A": np.array([b"a", b"b"]), "sentence_B": np.array([b"a", b"b"]),
               "label": np.zeros(2, np.int32), "relatedness_score": np.ones(2, np.float32)}  # fmt: skip
    monkeypatch.setattr(match.data, "load", lambda *args, **rest: {**records, column: values})
    with pytest.raises(InputError, match=message):
        match.pairs(match.Config(), "test")


def test_scores_of_pairs(match):
    truth = np.eye(5)[[0, 2, 4, 1]]
    reverse = truth[:, ::-1]
    found = match.scores("relatedness", np.stack([truth, reverse]), truth)
    for values in found.values():
        np.testing.assert_allclose(values, [1, -1])
    np.testing.assert_allclose(match.scores("relation", np.stack([truth, reverse]), truth)["accuracy"], [100, 25])


def test_the_control_of_pairs_sees_what_they_share(match):
    first = np.array([b"a dog runs", b"a cat sleeps", b"men swim", b"birds sing"] * 3)
    second = np.where(np.arange(12) % 2, first, np.roll(first, 1))
    own = np.arange(12) % 2
    given = {
        "first": first,
        "second": second,
        "relation": np.eye(2)[own],
        "relatedness": match.mixtures(1 + 4 * own, 5),
    }
    found = match.tfidf_scores(given, given)
    assert found["accuracy/tfidf"] == 100
    assert found["pearson/tfidf"] > 0.9
