"""BiLSTM taggers of words with features of their characters (Ma & Hovy 2016, arXiv:1603.01354).

`Tagger` scores the tags of each word on its own. `ChainTagger` adds the parameters of a linear chain, with which a
conditional random field scores whole sequences of tags.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import dense
from dl_jax.models.recur import LSTM, VANILLA, Array, Cell
from dl_jax.models.sequence.rnn import Recurrent

Chain = tuple[Array, Array, Array]  # scores of the first tag [K], of a tag after another [K, K], of the last tag [K]
PADDING = 0  # the character that fills words up


def uniform(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Vectors [..., D] uniform in ±√(3 / D), which have length 1 on average (section 3.1)."""
    return jax.random.uniform(key, shape, dtype, -1, 1) * np.sqrt(3 / shape[-1])


class CharCNN(nn.Module):
    """Features of words from their characters: chars int [B, T, C] -> [B, T, filters] (section 2.1, figure 1).

    A convolution over three characters, and the maximum over the characters of a word. Characters that are 0 are
    padding: they have no vector and no part in the maximum. A word without characters has the features 0.
    """

    vocabulary: int
    embedding: int  # width of a character's vector
    filters: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, chars: Array, *, train: bool) -> Array:
        chars = jnp.asarray(chars)
        words = chars.reshape(-1, chars.shape[-1])  # [B T, C]
        valid = (words != PADDING)[..., None]
        x = nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype, embedding_init=uniform)(words)
        x = jnp.where(valid, nn.Dropout(self.dropout, deterministic=not train)(x), 0)
        convolve = ops.conv_general_dilated
        x = nn.Conv(self.filters, (3,), dtype=self.dtype, conv_general_dilated=convolve)(x)  # [B T, C, filters]
        x = ops.max_over(jnp.where(valid, x, -jnp.inf), 1)
        return jnp.where(valid.any(1), x, 0).reshape(*chars.shape[:2], self.filters)


class _Tagger(nn.Module):
    vocabulary: int
    tags: int  # K
    embedding: int = 100  # width of a word's vector
    hidden: int = 200  # units of the recurrent layer in one direction
    characters: int = 0  # different characters, with that of the padding; 0 for no features of characters
    character_embedding: int = 30  # width of a character's vector
    filters: int = 30  # features of characters
    cell: Cell = LSTM
    dropout: float = 0.5
    dtype: DTypeLike = jnp.float32

    def _emissions(self, words: Array, lengths: Array | None, chars: Array | None, train: bool) -> Array:
        sizes = ("vocabulary", "tags", "embedding", "character_embedding", "filters")
        require_positive({name: getattr(self, name) for name in sizes})
        require_probability({"dropout": self.dropout})
        x = nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype, embedding_init=uniform, name="words")(words)
        if (chars is None) != (self.characters == 0) or self.characters < 0:
            given = "none" if chars is None else jnp.shape(chars)
            raise InputError(
                f"characters is {self.characters} and chars are {given}, expected a number of characters with chars "
                "[B, T, C], or 0 without; change one of them"
            )
        if chars is not None:
            if jnp.shape(chars)[:-1] != jnp.shape(words):
                raise InputError(
                    f"chars are {jnp.shape(chars)} for words {jnp.shape(words)}, expected [B, T, C] for [B, T]; give "
                    "the characters of each word"
                )
            letters = CharCNN(
                self.characters, self.character_embedding, self.filters, self.dropout, self.dtype, name="characters_cnn"
            )
            x = jnp.concatenate([x, letters(chars, train=train)], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        recurrent = Recurrent(self.cell, self.hidden, bidirectional=True, dtype=self.dtype, name="recurrent")
        x, _ = recurrent(x, lengths, train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.tags, dtype=self.dtype, name="output")(x).astype(jnp.float32)


class Tagger(_Tagger):
    """Scores of each word's tags from a BiLSTM: words int [B, T] -> emissions float32 [B, T, K].

    With `characters` above 0 it reads the words' characters too, chars int [B, T, C] with 0 for padding, which is one
    of the `characters` kinds. `lengths`, int [B], are the numbers of words; those after them have no effect. Dropout
    acts on the vectors of characters and on the inputs and outputs of the BiLSTM, and uses the random stream "dropout".
    The sizes are those of the paper (table 1).

    Raises InputError where characters are given and `characters` is 0 or the other way round, for sizes below 1, a
    dropout outside [0, 1), and lengths that `Recurrent` refuses.
    """

    @nn.compact
    def __call__(self, words: Array, lengths: Array | None = None, chars: Array | None = None, *, train: bool) -> Array:
        return self._emissions(words, lengths, chars, train)


class ChainTagger(_Tagger):
    """`Tagger` with the parameters of a linear chain: words int [B, T] -> (emissions [B, T, K], (start, step, end)).

    start [K] scores the first tag, step [K, K] the tag of the second axis after that of the first, and end [K] the last
    tag. They are parameters, float32, and 0 at the start (Ma & Hovy 2016, section 2.3; Lample et al. 2016,
    arXiv:1603.01360, equation 1). The other arguments are those of `Tagger`.
    """

    @nn.compact
    def __call__(
        self, words: Array, lengths: Array | None = None, chars: Array | None = None, *, train: bool
    ) -> tuple[Array, Chain]:
        emissions = self._emissions(words, lengths, chars, train)
        zeros, k = nn.initializers.zeros, self.tags
        chain = self.param("start", zeros, (k,)), self.param("step", zeros, (k, k)), self.param("end", zeros, (k,))
        return emissions, chain


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    rng = np.random.default_rng(0)
    inputs = {"words": rng.integers(0, 7, (3, 5), np.int32), "lengths": np.array([5, 1, 4], np.int32)}
    chars = rng.integers(1, 9, (3, 5, 4), np.int32) * (np.arange(4) < rng.integers(1, 5, (3, 5, 1)))
    return {
        "Tagger": (
            Tagger(7, 3, embedding=4, hidden=5, characters=9, character_embedding=4, filters=6, cell=VANILLA),
            {**inputs, "chars": chars.astype(np.int32)},
        ),
        "ChainTagger": (ChainTagger(7, 3, embedding=4, hidden=5, cell=VANILLA), inputs),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's network for the 45 tags of the Penn Treebank, whose layers' sizes give its number of parameters.

    The vocabulary is the 400,000 words of GloVe, the characters are 94, as in ASCII, and padding.
    """
    words, chars = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 40), (1, 40, 20)))
    letters = 95 * 30 + (3 * 30 + 1) * 30
    lstm = 2 * 4 * 200 * (100 + 30 + 200 + 1)
    parameters = 400_000 * 100 + letters + lstm + (2 * 200 + 1) * 45
    return {
        "Tagger": (Tagger(400_000, 45, characters=95), {"words": words, "chars": chars}, parameters),
        "ChainTagger": (
            ChainTagger(400_000, 45, characters=95),
            {"words": words, "chars": chars},
            parameters + 45 * (45 + 2),
        ),
    }
