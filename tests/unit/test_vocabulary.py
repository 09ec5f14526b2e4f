"""Words, pieces of words and their ids, and the pairs of words that vectors are learnt from."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax.core.errors import InputError
from dl_jax.data import text

quick = settings(deadline=None, max_examples=40)
words_of = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3), max_size=30)


@quick
@given(words_of, st.integers(1, 3), st.one_of(st.none(), st.integers(1, 5)))
def test_a_vocabulary_has_the_frequent_words(words, at_least, most):
    counts = collections.Counter(word.encode() for word in words if word)
    ranked = sorted((w for w, n in counts.items() if n >= at_least), key=lambda w: (-counts[w], w))[:most]
    if not ranked:
        with pytest.raises(InputError, match="no word of"):
            text.vocabulary(words, at_least, most)
        return
    found = text.vocabulary(words, at_least, most)
    assert list(found.words) == ranked
    assert len(found) == len(ranked) + 2
    expected = [0 if not w else 2 + ranked.index(w.encode()) if w.encode() in ranked else 1 for w in words]
    assert found.ids(words).tolist() == expected
    assert found.ids(np.array([w.encode() for w in words])[None]).tolist() == [expected]
    shown = [w if w.encode() in ranked else "<unk>" for w in words if w]
    assert found.text(expected) == shown
    assert text.read_vocabulary(json.dumps(found.kept())) == found


def test_bytes_that_are_no_text_are_words_too():
    found = text.vocabulary(np.array([b"\xff\xfe", b"\xff\xfe", b"ok"]))
    assert text.read_vocabulary(json.dumps(found.kept())) == found
    assert found.ids(np.array([b"ok", b"\xff\xfe", b"\xff"])).tolist() == [3, 2, 1]


def test_nothing_is_known_of_an_empty_vocabulary():
    assert text.Vocabulary(()).ids(["a", ""]).tolist() == [1, 0]


def test_a_text_that_spells_a_special_piece_has_no_special_piece():
    written = "a <s> b </s> <pad> <unk>"
    tokenizer = text.byte_pairs([written, "a b"], 300)
    read = type(tokenizer).from_str(tokenizer.to_str())
    for each in (tokenizer, read):
        ids = text.pieces(each, [written], begin=True, end=True)[0].tolist()
        assert (ids[0], ids[-1], min(ids[1:-1]) > 3) == (2, 3, True)
        assert each.decode(ids) == written


def test_pieces_of_a_column_of_texts_are_those_of_its_texts():
    texts = ["añ b", "c"]
    for column in (np.char.encode(texts, "utf-8"), np.array(texts), [b"a\xc3\xb1 b", "c"]):
        tokenizer = text.byte_pairs(column, 300)
        assert tokenizer.decode_batch([row.tolist() for row in text.pieces(tokenizer, column)]) == texts
    odd = text.byte_pairs([b"\xff a", "\udcff"], 300)
    assert odd.decode(text.pieces(odd, [b"\xff a"])[0].tolist()) == "\ufffd a"


def test_a_text_without_words_may_be_a_word():
    found = text.split(["...", "a b"], text.kim_words, empty="<none>")
    assert found[:].tolist() == [[b"<none>", b""], [b"a", b"b"]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: text.vocabulary([]), "no word of 0 occurs 1 times or more"),
        (lambda: text.vocabulary(["a", ""], 2), "no word of 2 occurs 2 times or more, expected one at least; lower"),
        (lambda: text.vocabulary(["a"], 0), "at_least is 0"),
        (lambda: text.vocabulary(["a"], most=0), "most is 0"),
        (lambda: text.vocabulary(np.arange(3)), "words are int64, expected bytes or str"),
        (
            lambda: text.vocabulary(["a"]).ids(["a", "b"], known=True),
            "the word 'b' is not among the 1 that are known",
        ),
        (lambda: text.vocabulary(["a"]).text([3]), "ids from 3 to 3, expected 0 to 2; take"),
        (lambda: text.read_vocabulary("{"), "a JSON list of words, not '{'"),
        (lambda: text.read_vocabulary("[1]"), "a JSON list of words"),
        (lambda: text.read_vocabulary('{"a": 1}'), "a JSON list of words"),
        (lambda: text.vocabulary(["a"]).text([2.5]), "ids are float64, expected whole numbers"),
        (lambda: text.decode(np.array([65.5])), "ids are float64, expected whole numbers"),
        (lambda: text.byte_pairs(["a", 1], 300), "a text is 1, expected str or bytes"),  # type: ignore[list-item]
        (lambda: text.skip_grams(np.arange(3), 2, 0, np.ones(2)), "keep has 2 probabilities for ids from 0 to 2"),
        (lambda: text.read_vocabulary('["a", "a"]'), "an empty word or one word twice"),
        (lambda: text.read_vocabulary('[""]'), "an empty word or one word twice"),
        (lambda: text.split([]), "there are no texts, expected one word or more"),
        (lambda: text.split(["a", "  "]), "text 1, '  ', has no word"),
        (lambda: text.split("ab"), "texts are the one text 'ab', expected a list of texts"),
        (lambda: text.vocabulary("ab"), "texts are the one text 'ab', expected a list of texts"),
        (lambda: text.byte_pairs("ab", 300), "texts are the one text 'ab', expected a list of texts"),
        (lambda: text.pieces(text.byte_pairs(["ab"], 300), "ab"), "texts are the one text 'ab', expected a list"),
        (
            lambda: text.split(["ένα", "δύο", "one"], text.kim_words, empty="<none>"),
            "2 of 3 texts have no word, such as 'ένα', expected words in most",
        ),
        (lambda: text.split(text.split(["a b", "c"])), r"texts of shape \(2, 2\), expected \[N\]"),
        (lambda: text.skip_grams(np.arange(3), 2, -1), "seed -1"),
        (lambda: text.split(["a\0 b"]), "is empty or ends in a NUL"),
        (lambda: text.letters(np.array([b"a"]), 0), "0 letters of a word"),
        (lambda: text.skip_grams(np.arange(3), 0, 0), "a window of 0 words"),
        (lambda: text.skip_grams(np.arange(1), 2, 0), "1 words of 1 are left, expected 2 or more"),
        (lambda: text.skip_grams(np.arange(3), 2, 0, np.zeros(3)), "0 words of 3 are left"),
        (lambda: text.kept_share(np.ones(3), 0.0), "the threshold is 0.0"),
        (lambda: text.noise_share(np.zeros(3)), "counts of 3 words, expected 0 or more each and not all 0"),
        (lambda: text.noise_share(np.array([])), "counts of 0 words"),
        (lambda: text.noise_share(np.array([1, -1])), "counts of 2 words"),
        (lambda: text.noise_share(np.ones(3), -1.0), "the power of the frequency is -1.0"),
        (lambda: text.noise_share(np.ones(3), np.nan), "the power of the frequency is nan"),
        (lambda: text.byte_pairs(["a"], 259), "259 pieces, expected 260 or more"),
        (lambda: text.byte_pairs([""], 300), "1 texts without a character"),
        (lambda: text.pieces(text.byte_pairs(["a b"], 300), ["a", ""]), "text 1 is empty"),
    ],
)
def test_what_cannot_be(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("It's a film, isn't it?", ["it", "'s", "a", "film", ",", "is", "n't", "it", "?"]),
        (
            "they've (all) seen\tit! ; I'd-say -- 12",
            ["they", "'ve", "(", "all", ")", "seen", "it", "!", "i", "'d", "say", "12"],
        ),
        ("we'll, they're `quoted` ça", ["we", "'ll", ",", "they", "'re", "`quoted`", "a"]),
    ],
)
def test_the_words_of_kim(sentence, words):
    assert text.kim_words(sentence) == words


def test_texts_are_split_into_rows():
    column = text.split(np.array([b"ein Wort", "Zürich ist".encode(), b"\xff"]))
    assert column[:].tolist() == [[b"ein", b"Wort"], ["Zürich".encode(), b"ist"], [b"\xff", b""]]
    assert text.split(["ab", "c"], list)[:].tolist() == [[b"a", b"b"], [b"c", b""]]


def test_letters_are_bytes_cut_or_padded():
    words = np.array([[b"abc", b""], ["é".encode(), b"x"]])
    assert text.letters(words, 2).tolist() == [[[97, 98], [0, 0]], [[0xC3, 0xA9], [120, 0]]]
    assert text.letters(words[:, ::-1], 4)[0].tolist() == [[0, 0, 0, 0], [97, 98, 99, 0]]


SENTENCES = ["the cat sat on the mat", "Zürich, 漢字\n  and\ttabs", "the theatre of the absurd"]


def test_pieces_give_back_the_text_and_learn_frequent_pairs():
    tokenizer = text.byte_pairs(SENTENCES * 10, 290)
    assert tokenizer.get_vocab_size() <= 290
    rows = text.pieces(tokenizer, [*SENTENCES, "unseen: ÿ"], begin=True, end=True)
    assert rows.dtype == np.int32
    for i, sentence in enumerate([*SENTENCES, "unseen: ÿ"]):
        ids = rows[i][: rows.lengths[i]]
        assert (ids[0], ids[-1]) == (text.BEGIN, text.END)
        assert ids[1:-1].min() > text.END  # nothing unknown
        assert tokenizer.decode(ids[1:-1].tolist()) == sentence
    assert len(tokenizer.encode("the").ids) == 1
    assert tokenizer.encode("the").ids == type(tokenizer).from_str(tokenizer.to_str()).encode("the").ids


@quick
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**32))
def test_pairs_are_those_of_a_slow_loop(n, window, seed):
    ids = np.arange(n) + 2
    pairs = text.skip_grams(ids, window, seed)
    reach = np.random.default_rng(seed).integers(1, window + 1, n)
    slow = [(ids[i], ids[j]) for i in range(n) for j in range(n) if 0 < abs(i - j) <= reach[i]]
    assert sorted(zip(pairs["centre"].tolist(), pairs["context"].tolist(), strict=True)) == sorted(slow)


def test_frequent_words_are_removed_before_the_windows():
    ids = np.array([2, 3, 2, 4, 2, 5])
    pairs = text.skip_grams(ids, 1, 0, keep=np.array([0, 0, 0, 1, 1, 1]))
    assert sorted(zip(*pairs.values(), strict=True)) == [(3, 4), (4, 3), (4, 5), (5, 4)]
    share = text.kept_share(np.array([0, 0, 900, 99, 1]), threshold=0.1)
    np.testing.assert_allclose(share, [1, 1, np.sqrt(1 / 9), 1, 1])


@pytest.mark.parametrize("power", [0.75, 1.0, 0.0])
def test_noise_is_drawn_by_a_power_of_the_frequency(power):
    counts = np.array([0, 16, 1, 81, 0])
    weights = np.array([0, 16**power, 1, 81**power, 0])
    np.testing.assert_allclose(text.noise_share(counts, power), weights / weights.sum())
    if power == 0.75:
        np.testing.assert_allclose(text.noise_share(counts), np.array([0, 8, 1, 27, 0]) / 36)
