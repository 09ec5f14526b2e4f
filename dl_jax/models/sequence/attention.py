"""Attention: additive (Bahdanau et al. 2015, arXiv:1409.0473) and of several heads (Vaswani et al. 2017), and networks
with either: a classifier of texts, an encoder, and a language model with a cache of keys and values.

The transformers normalise before each sublayer and have learned positions, as GPT-2 (Radford et al. 2019) and nanoGPT.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import dense, valid_steps
from dl_jax.models.recur import LSTM, Array
from dl_jax.models.sequence.rnn import Recurrent


def masked_softmax(scores: Array, mask: Array) -> Array:  # [..., T], bool that broadcasts to it -> float32 [..., T]
    """The softmax over the last axis of the scores where `mask` holds; the others have weight 0. NaN if it never does.

    It is computed in float32.
    """
    return jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -jnp.inf), -1)


def additive(
    energies: Array,  # [B, T, A]
    vector: Array,  # [A]
    values: Array,  # [B, T, D]
    valid: Array,  # bool [B, T]
) -> tuple[Array, Array]:
    """The mean of the values [B, D], weighted by additive attention, and the weights [B, T], both float32.

    The weights are the softmax over valid steps of vector · tanh(energies), where energies = W s + U h_j for a query s
    and states h_j (Bahdanau et al. 2015, appendix A.1.2). Products are computed in the type of the values.
    """
    scores = jnp.matmul(jnp.tanh(energies).astype(values.dtype), vector.astype(values.dtype))
    weights = masked_softmax(scores, valid)
    return _weighted(weights, values), weights


def _weighted(weights: Array, values: Array) -> Array:  # [..., T], [..., T, D] -> float32 [..., D]
    context = jnp.matmul(weights.astype(values.dtype)[..., None, :], values, preferred_element_type=jnp.float32)
    return context[..., 0, :]


class AdditivePooling(nn.Module):
    """The mean of states [B, T, D], weighted by additive attention without a query: -> float32 [B, D], weights [B, T].

    The score of a state h is v · tanh(U h + b) (Yang et al. 2016, "Hierarchical Attention Networks", equations 5 to 7).
    Steps that are not `valid`, bool [B, T], have weight 0; what they hold has no effect.
    """

    units: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Array, valid: Array) -> tuple[Array, Array]:
        require_positive({"units": self.units})
        states = jnp.where(valid[..., None], states, 0).astype(self.dtype)
        energies = dense(self.units, dtype=self.dtype, name="energies")(states)
        vector = self.param("vector", nn.initializers.normal(1 / np.sqrt(self.units)), (self.units,))
        return additive(energies, vector, states, valid)


class AttentionClassifier(nn.Module):
    """Embedding, BiLSTM, additive attention over the steps, linear layer: tokens int [B, T] -> logits [B, classes].

    Without `layers` the attention is over the vectors of the tokens. `lengths`, int [B], are the numbers of tokens;
    those after them have no effect. Dropout acts on the vectors, between and after the layers, and uses the random
    stream "dropout". The weights [B, T] of the attention are an output of the module "attention":

        logits, ((_, weights),) = inspect.with_outputs(model.apply, "attention")(variables, tokens, train=False)

    Raises InputError for sizes below 1, a dropout outside [0, 1), and lengths that are not int [B] or
    not in [1, T].
    """

    vocabulary: int
    classes: int
    embedding: int  # width of a token's vector
    units: int  # of the attention
    hidden: int = 100  # units of a recurrent layer in one direction
    layers: int = 1  # recurrent layers
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, lengths: Array | None = None, *, train: bool) -> Array:
        require_positive({name: getattr(self, name) for name in ("vocabulary", "classes", "embedding")})
        require_positive({"the length of a text": tokens.shape[1]})
        require_probability({"dropout": self.dropout})
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = drop(nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype)(tokens))
        if self.layers:
            recurrent = Recurrent(LSTM, self.hidden, self.layers, True, self.dropout, self.dtype)
            x, _ = recurrent(x, lengths, train=train)
            x = drop(x)
        x, _ = AdditivePooling(self.units, self.dtype, name="attention")(x, valid_steps(lengths, tokens))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class Cache(NamedTuple):
    """The keys and values of the tokens that a `TransformerLM` has read. Every leaf has a row for each sequence.

    On CPUs, steps are 9 times as fast with the heads before the tokens as after them.
    """

    keys: tuple[Array, ...]  # [B, heads, S, D / heads] of each layer, for up to S tokens
    values: tuple[Array, ...]
    read: Array  # int32 [B], the number of tokens so far


class SelfAttention(nn.Module):
    """Attention of several heads of a sequence to itself: x [B, T, D] -> [B, T, D] (Vaswani et al. 2017, section 3.2).

    `mask`, bool that broadcasts to [B, heads, T, S], says which of the S steps each of the T steps sees. These are the
    steps of `x`; with `past`, the keys and values [B, heads, S, D / heads] and the numbers int [B] of those that are
    filled, x is one step, whose key and value are put there. Returns the keys and values too.
    """

    heads: int
    dropout: float  # probability in training that a weight is dropped
    bias: bool
    project_init: nn.initializers.Initializer
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, past: tuple[Array, Array, Array] | None = None, *, train: bool
    ) -> tuple[Array, tuple[Array, Array]]:
        batch, steps, width = x.shape
        layer = dense(3 * width, use_bias=self.bias, dtype=self.dtype, kernel_init=_normal, name="qkv")
        heads = (y.reshape(batch, steps, self.heads, -1) for y in jnp.split(layer(x), 3, -1))
        q, k, v = (y.swapaxes(1, 2) for y in heads)  # [B, heads, T, D / heads]
        if past is not None:
            rows, (keys, values, read) = jnp.arange(batch), past
            k, v = (jnp.asarray(old).at[rows, :, read].set(new[:, :, 0]) for old, new in ((keys, k), (values, v)))
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = masked_softmax(scores / np.sqrt(q.shape[-1]), mask)
        weights = nn.Dropout(self.dropout, deterministic=not train)(weights).astype(self.dtype)
        y = jnp.matmul(weights, v).swapaxes(1, 2).reshape(batch, steps, width)
        project = dense(width, use_bias=self.bias, dtype=self.dtype, kernel_init=self.project_init, name="project")
        return project(y), (k, v)


class Block(nn.Module):
    """A block of a transformer: x + attention(norm(x)), then x + MLP(norm(x)) of 4 D units, [B, T, D] -> [B, T, D].

    The activation is GELU in the form with tanh, which GPT-2 was trained with. nanoGPT has the exact form with erf,
    which alone takes twice as long on a CPU. See `SelfAttention` for the mask and `past`.
    """

    heads: int
    layers: int  # of the network: kernels that write to the residual stream start 1 / √(2 layers) as large
    dropout: float
    bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, past: tuple[Array, Array, Array] | None = None, *, train: bool
    ) -> tuple[Array, tuple[Array, Array]]:
        width = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        last = nn.initializers.normal(SPREAD / np.sqrt(2 * self.layers))
        attention = SelfAttention(self.heads, self.dropout, self.bias, last, self.dtype, name="attention")
        y, kept = attention(_norm(self.bias, self.dtype, "norm_1")(x), mask, past, train=train)
        x = x + drop(y)
        y = _norm(self.bias, self.dtype, "norm_2")(x)
        y = dense(4 * width, use_bias=self.bias, dtype=self.dtype, kernel_init=_normal, name="up")(y)
        y = nn.gelu(y, approximate=True)
        y = dense(width, use_bias=self.bias, dtype=self.dtype, kernel_init=last, name="down")(y)
        return x + drop(y), kept


SPREAD = 0.02  # standard deviation of the initial weights (nanoGPT)
_normal = nn.initializers.normal(SPREAD)


def _norm(bias: bool, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_bias=bias, dtype=dtype, name=name)


class _Transformer(nn.Module):
    vocabulary: int
    block: int  # most tokens of a sequence
    width: int  # D
    layers: int
    heads: int
    dropout: float = 0.0
    bias: bool = False  # of linear layers and norms, as GPT-2 has them
    remat: bool = False  # whether the backward pass computes each block anew, instead of keeping its arrays
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        require_positive({name: getattr(self, name) for name in ("vocabulary", "block", "width", "layers", "heads")})
        require_probability({"dropout": self.dropout})
        if self.width % self.heads:
            raise InputError(f"width is {self.width} for {self.heads} heads, expected a multiple; change one of them")
        self.words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, embedding_init=_normal)
        self.places = self.param("places", _normal, (self.block, self.width))
        self.drop = nn.Dropout(self.dropout)
        block = lambda: Block(self.heads, self.layers, self.dropout, self.bias, self.dtype)
        self.blocks = [block() for _ in range(self.layers)]
        self.norm = _norm(self.bias, self.dtype)

    def _first_places(self, tokens: Array) -> Array:  # -> [T, D]
        steps = tokens.shape[1]
        if not 1 <= steps <= self.block:
            raise InputError(f"{steps} tokens, expected 1 to {self.block}, the block of the model; shorten the text")
        return self.places[:steps]

    def _states(self, tokens: Array, places: Array, mask: Array, past: Cache | None, train: bool) -> tuple[Array, Any]:
        """The states [B, T, D] after all blocks, and the keys and values of each block."""
        x = self.drop(self.words(tokens) + places.astype(self.dtype), deterministic=not train)
        kept = []
        for i, block in enumerate(self.blocks):
            of_layer = None if past is None else (past.keys[i], past.values[i], past.read)
            run = lambda block, x, of_layer=of_layer: block(x, mask, of_layer, train=train)
            x, keys_and_values = (nn.remat(run) if self.remat else run)(block, x)
            kept.append(keys_and_values)
        return self.norm(x), kept


class TransformerEncoder(_Transformer):
    """A transformer in which every token sees all of the text: tokens int [B, T] -> states float32 [B, T, D].

    `lengths`, int [B], are the numbers of tokens; those after them have no effect, and their states are 0. Dropout acts
    on the vectors, the attention and the outputs of sublayers, and uses the random stream "dropout".

    Raises InputError for a text longer than `block`, a width that is no multiple of the heads, sizes below 1, a dropout
    outside [0, 1), and lengths that are not int [B] or not in [1, T].
    """

    def __call__(self, tokens: Array, lengths: Array | None = None, *, train: bool) -> Array:
        valid = valid_steps(lengths, tokens)
        tokens = jnp.where(valid, tokens, 0)  # the vector of an id outside of the vocabulary is NaN
        x, _ = self._states(tokens, self._first_places(tokens), valid[:, None, None, :], None, train)
        return jnp.where(valid[..., None], x, 0).astype(jnp.float32)


class TransformerLM(_Transformer):
    """A language model: tokens int [B, T] -> logits float32 [B, T, V] of the tokens after each.

    A token sees itself and those before it, so that padding at the end of a text, of ids of the vocabulary, has no
    effect on the rest. The vectors of the tokens are the weights of the last layer too, as in GPT-2. Dropout acts on
    the vectors, the attention and the outputs of sublayers, and uses the random stream "dropout".

    `step` reads one token after the other, with the keys and values of those before in a cache:

        step = functools.partial(model.apply, variables, method="step")
        decode.generate(step, model.initial_carry(batch, prompt.shape[1] + steps), prompt, steps, key, choose)

    Raises InputError for a text longer than `block`, a width that is no multiple of the heads, sizes below 1, and a
    dropout outside [0, 1).
    """

    def __call__(self, tokens: Array, *, train: bool) -> Array:
        steps = tokens.shape[1]
        causal = jnp.tril(jnp.ones((steps, steps), bool))
        x, _ = self._states(tokens, self._first_places(tokens), causal, None, train)
        return self._logits(x)

    def _logits(self, x: Array) -> Array:
        kernel = self.words.embedding.astype(self.dtype).T
        return ops.dense_product(x.astype(self.dtype), kernel, None).astype(jnp.float32)

    def step(self, token: Array, carry: Cache) -> tuple[Array, Cache]:
        """Reads one more token: int [B] -> logits float32 [B, V] of the next one, and the carry.

        Raises InputError where the cache is full. Where this cannot be known, because the carry is traced, the logits
        are NaN then.
        """
        size = carry.keys[0].shape[2]
        if not isinstance(carry.read, Tracer) and np.max(np.asarray(carry.read), initial=0) >= size:
            raise InputError(f"the cache of {size} tokens is full; make a larger one by initial_carry, or begin anew")
        # Where no row is left, `take` gives NaN and the write of key and value is dropped.
        at = jnp.where(carry.read < size, carry.read, self.block)
        places = jnp.take(self.places, at, axis=0)[:, None]  # [B, 1, D]
        mask = jnp.arange(size) <= carry.read[:, None]  # [B, S]
        x, kept = self._states(token[:, None], places, mask[:, None, None], carry, False)
        keys, values = zip(*kept, strict=True)
        return self._logits(x[:, 0]), Cache(keys, values, carry.read + 1)

    def initial_carry(self, batch: int, size: int | None = None) -> Cache:
        """An empty cache for `batch` sequences of up to `size` tokens, by default `block`.

        A smaller cache is faster. Raises InputError where `size` is not in [1, block]: the model has no positions for
        more.
        """
        size = self.block if size is None else size
        if not 1 <= size <= self.block:
            raise InputError(
                f"a text of {size} tokens, prompt and what is generated, expected 1 to {self.block}, the block of the "
                "model; generate fewer"
            )
        zeros = (jnp.zeros((batch, self.heads, size, self.width // self.heads), self.dtype),) * self.layers
        return Cache(zeros, zeros, jnp.zeros(batch, jnp.int32))


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    tokens = np.random.default_rng(0).integers(0, 7, (3, 5), np.int32)
    ragged = {"tokens": tokens, "lengths": np.array([5, 1, 4], np.int32)}
    return {
        "AttentionClassifier": (AttentionClassifier(7, 3, embedding=4, units=5, layers=0, dropout=0.5), ragged),
        "TransformerEncoder": (TransformerEncoder(7, 8, width=8, layers=1, heads=2, bias=True), ragged),
        "TransformerLM": (TransformerLM(7, 8, width=8, layers=1, heads=2, dropout=0.5), {"tokens": tokens}),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The smallest GPT-2, nanoGPT's model of characters, a small encoder, and a classifier.

    GPT-2 has 124,439,808 parameters in OpenAI's checkpoint. nanoGPT prints 10.65M for its model of the 65 characters of
    Shakespeare, without the positions. Both are from memory. The others have our sizes, and the numbers that their
    layers' sizes give.
    """

    def layers(width: int, n: int, bias: int) -> int:  # with the last norm
        return n * (12 * width**2 + bias * 9 * width) + (2 * n + 1) * (1 + bias) * width

    tokens = {"tokens": jax.ShapeDtypeStruct((1, 64), jnp.int32)}
    lstm = 2 * 4 * 100 * (100 + 100 + 1)
    classifier = 20_000 * 100 + lstm + (200 + 2) * 100 + 201 * 2
    return {
        "GPT2": (TransformerLM(50_257, 1024, 768, 12, 12, bias=True), tokens, 124_439_808),
        "CharGPT": (TransformerLM(65, 256, 384, 6, 6, 0.2), tokens, 10_646_784 + 256 * 384),
        "TransformerEncoder": (
            TransformerEncoder(20_000, 256, 128, 2, 4),
            tokens,
            (20_000 + 256) * 128 + layers(128, 2, 0),
        ),
        "AttentionClassifier": (AttentionClassifier(20_000, 2, 100, 100), tokens, classifier),
    }
