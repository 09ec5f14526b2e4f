"""experiments/text/translate.py: its stories, what a loss and an output depend on, and how texts are scored."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector
from dl_jax.data import text
from dl_jax.models.sequence.seq2seq import Seq2Seq

SOURCES = ["a dog runs .", "two dogs run to a big red house .", "dogs ."]
TARGETS = ["ein hund rennt .", "hunde .", "zwei hunde rennen zu dem haus ."]


@pytest.fixture(scope="module")
def translate(load_experiment):
    return load_experiment("text/translate")


@pytest.fixture(scope="module")
def tokenizer():
    return text.byte_pairs([*SOURCES, *TARGETS], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    size = tokenizer.get_vocab_size()
    return Seq2Seq(size, size, embedding=4, hidden=5, units=3, maxout=4)


@pytest.fixture(scope="module")
def variables(model):
    tokens, rng = jnp.zeros((1, 1), jnp.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), tokens, tokens)
    return jax.tree.map(lambda shape: rng.standard_normal(shape.shape).astype(shape.dtype), shapes)


@pytest.fixture(scope="module")
def columns(translate, tokenizer):
    return translate.encoded(tokenizer, translate.Pairs(SOURCES, TARGETS), 20)


def test_the_answers_of_stories_are_right(translate):
    given, last, verbs = translate.questions("test"), [], {"go": "went to the", "take": "took the", "meet": "met"}
    for source, answer in zip(*given, strict=True):
        ((deed, person, do, which, told),) = re.findall(r"^(\w+) did (\w+) (\w+) (first|last) \? (.*)$", source)
        assert deed == {"go": "where", "take": "what", "meet": "whom"}[do]
        assert re.fullmatch(rf"({person} (went to the|took the|met) \w+ \. ?){{4,7}}", told)
        named = re.findall(rf"{verbs[do]} (\w+)", told)
        assert answer == named[0 if which == "first" else -1] != person
        last.append(named[-1])
    assert {*given.targets} == {*translate.PEOPLE, *translate.PLACES, *translate.THINGS}
    most = max(map(given.targets.count, given.targets))
    named = f"asked for: {translate.exact(last, given.targets):.1f} %", f"answer: {most / 10:.1f} %"
    notes = [claim.note for claim in translate.CLAIMS if claim.metric == "exact/test"]
    assert [name in note for name, note in zip(named, notes, strict=True)] == [True, True]


def test_stories_are_read_to_their_end(translate):
    cfg, given = translate.PRESETS["questions"], translate.questions("test")
    columns = translate.encoded(text.byte_pairs([*given.sources, *given.targets], cfg.pieces), given, 99)
    assert columns["source/length"].max() <= cfg.lengths[-1]


def test_no_story_is_in_two_splits(translate):
    told = [[source.split(" ? ")[1] for source in translate.questions(split).sources] for split in translate.STORIES]
    assert [len(stories) for stories in told] == [10_000, 1000, 1000]
    assert len(set().union(*told)) == sum(len(set(stories)) for stories in told)
    assert len(set(translate.questions("train").sources)) == 10_000
    with pytest.raises(InputError, match="questions has no split 'valid', expected train, validation, test"):
        translate.questions("valid")


def test_pairs_of_two_columns(translate, monkeypatch):
    texts = lambda *given: np.array([each.encode() for each in given])
    columns = {"en": texts("A Dog.", " ", "Two"), "de": texts("Ein HÜND.", "b", "Zwei"), "label": np.zeros(3, np.int32)}
    monkeypatch.setattr(translate.data, "load", lambda name, split, only: columns)
    cfg = translate.Config()
    assert translate.pairs(cfg, "train") == translate.Pairs(("a dog.", "two"), ("ein hünd.", "zwei"))
    with pytest.raises(InputError, match=r"column 'label' of multi30k is int32 \(3,\), expected a text"):
        translate.pairs(dataclasses.replace(cfg, target="label"), "train")
    columns["de"] = texts("", "", "")
    with pytest.raises(InputError, match="train of multi30k has no example with both texts"):
        translate.pairs(cfg, "train")


def test_the_control_has_the_sources_of_others(translate):
    given = translate.questions("test")
    control = translate.shuffled(given)
    assert control.targets == given.targets
    assert sorted(control.sources) == sorted(given.sources)
    assert np.mean([a == b for a, b in zip(control.sources, given.sources, strict=True)]) < 0.01


def test_only_the_first_pieces_are_read(translate, tokenizer, columns):
    cut = translate.encoded(tokenizer, translate.Pairs(SOURCES, TARGETS), 6)
    for name in ("source", "target"):
        for i in range(3):
            whole = columns[name][i][: columns[f"{name}/length"][i]]
            np.testing.assert_array_equal(cut[name][i][: cut[f"{name}/length"][i]], whole[:6])
    np.testing.assert_array_equal(cut["length"], np.minimum(columns["length"], 6))
    target = columns["target"][1]
    assert target[:4].tolist() == [text.BEGIN, *tokenizer.encode(TARGETS[1]).ids, text.END]


def test_padding_is_neither_in_the_loss_nor_in_its_gradient(translate, model, variables, columns):
    of = jax.jit(jax.value_and_grad(lambda v, batch: translate.piece_loss(model, v, batch, jax.random.key(0))[0]))
    batch = {name: column[:] for name, column in columns.items()}
    other = {**batch, **{name: np.where(batch[name] == text.PAD, 99, batch[name]) for name in ("source", "target")}}
    (value, gradient), (again, same) = of(variables, batch), of(variables, other)
    np.testing.assert_allclose(value, again, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, same)


def test_the_cross_entropy_is_that_of_a_text_alone(translate, model, variables, columns):
    source, target = (columns[name][1][: columns[f"{name}/length"][1]] for name in ("source", "target"))
    apply = jax.jit(functools.partial(model.apply, train=False))
    logits = np.asarray(apply(variables, source[None], target[None, :-1])[0][0], np.float64)  # without padding
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_p[np.arange(len(target) - 1), target[1:]].sum()
    batch = {name: column[:] for name, column in columns.items()}
    for mask in np.eye(3, dtype=np.float32)[1], np.ones(3, np.float32):
        metric = jax.jit(functools.partial(translate.nats, model))
        found, count = metric(variables, {**batch, "mask": mask}, jax.random.key(0))["nats"]
        assert count == ((columns["target/length"] - 1) * mask).sum()
        assert (abs(found - expected) < 1e-4) == (mask.sum() == 1)


def test_an_output_does_not_depend_on_the_texts_beside_it(translate, model, variables, tokenizer):
    cfg = dataclasses.replace(translate.Config(), lengths=(20,), beams=2, test_batch=3)
    seeds = jax.tree.map(lambda leaf: leaf[None], variables)
    best = collector(functools.partial(translate.search, cfg, model), cfg.test_batch)
    write = lambda sources: translate.outputs(cfg, tokenizer, best, seeds, sources)[0]
    together = write(SOURCES)
    assert len(set(together)) == 3
    assert write([SOURCES[2], "a", SOURCES[0], SOURCES[1]])[0::2] == [together[2], together[0]]


def test_the_attention_over_a_source_sums_to_1_for_each_piece(translate, model, variables, tokenizer):
    source, written = translate.ids_of(tokenizer, SOURCES[1], TARGETS[1], 99)
    assert tokenizer.decode(source.tolist()) == SOURCES[1]
    assert tokenizer.decode(written.tolist()) == TARGETS[1]
    assert translate.ids_of(tokenizer, SOURCES[1], TARGETS[1], 3)[0].tolist() == source[:3].tolist()
    assert (written[0], written[-1]) == (text.BEGIN, text.END)
    weights = translate.attention(model, variables, source, written)
    assert weights.shape == (len(written) - 1, len(source))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    figure = translate.attention_figure(tokenizer, source, written, weights)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(written) - 1
    assert labels[-1] == "</s>"
    assert translate.ids_of(tokenizer, "dogs", "", 99)[1].tolist() == [text.BEGIN, text.END]  # nothing was written


def test_outputs_are_compared_with_whole_targets(translate):
    assert translate.exact(["kitchen", "the kitchen", "garden", ""], ["kitchen", "kitchen", "garden", "office"]) == 50
    kept = translate.listing(translate.Pairs(["a b c d e"], ["f g h i j"]), ["f g h i j"])
    assert kept.startswith("BLEU 100.0 of these 1 (nrefs:1|case:mixed")
    assert kept.endswith("\na b c d e\n  = f g h i j\n  ~ f g h i j\n")
