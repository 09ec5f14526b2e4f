"""Texts as ids: of characters, which are bytes, of words, or of the pieces of words that byte-pair encoding finds.

ids = text.load("tiny_shakespeare", "train")                     # characters, uint8 [N]
words = text.split(records["text"], text.kim_words)              # words, a ragged column of bytes [N, L]
vocabulary = text.vocabulary(words.values, at_least=2)
records = {"word": words.of(vocabulary.ids(words.values)), "length": words.lengths}
"""

from dl_jax.data.text.characters import (
    SIZE,
    STANDARD_LIBRARY,
    VOCABULARY,
    decode,
    encode,
    load,
    random_windows,
    reading,
    windows,
)
from dl_jax.data.text.pairs import kept_share, noise_share, skip_grams
from dl_jax.data.text.pieces import BEGIN, END, byte_pairs, pieces
from dl_jax.data.text.words import PAD, UNKNOWN, Vocabulary, kim_words, letters, read_vocabulary, split, vocabulary

__all__ = [
    "BEGIN",
    "END",
    "PAD",
    "SIZE",
    "STANDARD_LIBRARY",
    "UNKNOWN",
    "VOCABULARY",
    "Vocabulary",
    "byte_pairs",
    "decode",
    "encode",
    "kept_share",
    "kim_words",
    "letters",
    "load",
    "noise_share",
    "pieces",
    "random_windows",
    "read_vocabulary",
    "reading",
    "skip_grams",
    "split",
    "vocabulary",
    "windows",
]
