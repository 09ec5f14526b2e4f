"""The tagger: what is counted, other languages and columns, and the guide's program that tags a sentence."""

import contextlib
import dataclasses
import json
import re
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run, Settings

ROOT = Path(__file__).parents[2]
GREEK = (
    (["Η", "γάτα", "κοιμάται", "."], ["DET", "NOUN", "VERB", "PUNCT"]),
    (["Η", "Γάτα", "τρώει", "."], ["DET", "NOUN", "VERB", "PUNCT"]),
    (["στη", "σ", "τη", "γάτα"], ["_", "ADP", "DET", "NOUN"]),
)


@pytest.fixture(scope="module")
def tag(load_experiment):
    return load_experiment("text/tag")


class Sentences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Three Greek sentences, the same in each split."""

    name = "greek_sentences"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features, names = tfds.features, ["ADP", "DET", "NOUN", "PUNCT", "VERB", "_"]
        columns = {
            "tokens": features.Sequence(features.Text()),
            "upos": features.Sequence(features.ClassLabel(names=names)),
            "lemmas": features.Sequence(features.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(columns))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "dev", "test")}

    def _generate_examples(self):
        for i, (tokens, tags) in enumerate(GREEK):
            yield i, {"tokens": tokens, "upos": tags, "lemmas": tokens}


@pytest.fixture(scope="module")
def greek(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("greek"))
    Sentences(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def small(tag, **changes):
    settings = {"steps": 2, "batch_size": 2, "boundaries": (), "watch_every": 2, "cells": ("crf_chars",)}
    return dataclasses.replace(tag.Config(dataset="greek_sentences"), **settings, **changes)


def test_another_language_in_another_script_and_a_sentence_of_ones_own(tag, greek, tmp_path, monkeypatch):
    """The guide's program runs as it is written, in English, of which the network has learnt nothing."""
    monkeypatch.setenv("TFDS_DATA_DIR", greek)
    with contextlib.closing(Run(epath.Path(tmp_path / "runs/tag"), Settings(seeds=(0, 1)))) as run:
        found = tag.main(small(tag), run)
    assert found.keys() == {"accuracy/crf_chars"}
    assert found["accuracy/crf_chars"].shape == (2,)
    # What occurs once in small letters is unknown.
    assert json.loads((tmp_path / "runs/tag/vocabulary.json").read_text()) == ["γάτα", ".", "η"]
    program = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.S)[1]
    (tmp_path / "program.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    tags = runpy.run_path("program.py")["tags"]
    assert tags.shape == (1, 7)
    assert set(np.unique(tags)) <= set(range(6))


def test_a_column_that_is_no_class_label_is_refused(tag, greek, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", greek)
    with (
        contextlib.closing(Run(epath.Path(tmp_path), Settings(seeds=(0,)))) as run,
        pytest.raises(InputError, match=r"the column 'lemmas' of greek_sentences is .* a class label for each"),
    ):
        tag.main(small(tag, tags="lemmas"), run)


def test_small_letters_that_are_longer_than_the_words(tag):
    """Turkish words, as bytes of any width."""
    words = np.array(["İSTİKLAL".encode(), "İ".encode(), b"Ab", b"\xff"])
    assert tag.lowered(words).tolist() == ["İSTİKLAL".lower(), "İ".lower(), "ab", "\udcff"]


@pytest.mark.parametrize(
    ("tags", "message"),
    [([0, 1, 2], "expected a class label for each of the tokens"), ([0, -1, 2, 1], "words without a label")],
)
def test_missing_tags_are_refused(tag, monkeypatch, tags, message):
    column = lambda values, lengths: data.joined(np.array(values), lengths)
    lengths = [3, 1] if len(tags) == 4 else [2, 1]
    records = {"tokens": column([b"a", b"b", b"c", b"d"], [3, 1]), "upos": column(tags, lengths)}
    info = types.SimpleNamespace(labels={"upos": ("A", "B", "C")})
    monkeypatch.setattr(tag.data, "load", lambda *args, **rest: {**records, "tokens/length": records["tokens"].lengths})
    monkeypatch.setattr(tag.data, "info", lambda *args: info)
    with pytest.raises(InputError, match=message):
        tag.sentences(tag.Config(), "test")


def test_rows_of_multi_word_tokens_and_padding_do_not_count(tag):
    tags = np.array([[0, 1, 2], [2, 1, 9]])
    found = np.array([[[0, 1, 0], [2, 1, 9]], [[0, 0, 2], [0, 1, 9]]])  # [S, N, T]
    lengths = np.array([3, 2])
    np.testing.assert_allclose(tag.score(found, tags, lengths, ("a", "_", "b"))["accuracy"], [200 / 3, 200 / 3])
    np.testing.assert_allclose(tag.score(found, tags, lengths, ("a", "b", "c"))["accuracy"], [80, 60])


def test_tags_of_entities_are_scored_by_f1(tag):
    tags, found = np.array([[1, 2, 0]]), np.array([[[1, 2, 0]], [[1, 0, 0]]])
    np.testing.assert_allclose(tag.score(found, tags, np.array([3]), ("O", "B-x", "I-x"))["f1"], [100, 0])
