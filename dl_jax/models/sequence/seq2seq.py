"""An encoder and a decoder with attention, for one sequence from another (Bahdanau et al. 2015, arXiv:1409.0473).

The numbers of sections and equations are those of the paper.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import dense, valid_steps
from dl_jax.models.recur import GRU, Array
from dl_jax.models.sequence.attention import additive
from dl_jax.models.sequence.rnn import Recurrent


class Carry(NamedTuple):
    """The state of the decoder, and what it attends to. Every leaf has a row for each sequence."""

    state: Array  # float32 [B, H]
    keys: Array  # [B, S, A], the part of the energies that a source step gives
    values: Array  # [B, S, 2 H], the encoder's outputs
    valid: Array  # bool [B, S]


class Seq2Seq(nn.Module):
    """Logits of a target sequence from a source: source int [B, S], target int [B, T] -> logits float32 [B, T, V].

    Returns the weights [B, T, S] of the attention too. `target` are the tokens before those that are predicted: a start
    token, and in training the tokens of the sequence without its last (teacher forcing). `lengths`, int [B], are the
    numbers of source tokens; those after them have no effect. Padding at the end of a target has none on the rest.

    The encoder is a bidirectional GRU. Before it reads token y, the decoder, a GRU with state s, attends to the outputs
    of the encoder by `additive`, and reads their weighted mean c with y. The logits are a linear layer of a maxout
    layer of s, y and c (appendix A.2.2). The GRUs apply the reset gate after the product, as in `recur.GRU`. The
    encoder's weights are drawn as those of `Recurrent`, vectors of tokens as in `nn.Embed`, and all others uniformly in
    ±1/√n for n inputs. Dropout acts on the vectors of tokens and the maxout layer, and uses the random stream
    "dropout".

    `start` reads a source, and `step` decodes from there, one token after the other:

        carry = model.apply(variables, source, lengths, method="start")
        step = functools.partial(model.apply, variables, method="step")
        tokens, _ = decode.generate(step, carry, start_tokens, steps, key, choose)

    The weights for decoded tokens are those of a call with the start token and these tokens.

    Raises InputError for sizes below 1, a dropout outside [0, 1), an empty target or one of another batch size, and
    lengths that are not int [B] or not in [1, S].
    """

    source_vocabulary: int
    target_vocabulary: int  # V
    embedding: int = 620  # width of a token's vector
    hidden: int = 1000  # H, units of the encoder in one direction, and of the decoder
    units: int = 1000  # A, of the attention
    maxout: int = 500  # units of the maxout layer, each the larger of two
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        sizes = ("source_vocabulary", "target_vocabulary", "embedding", "hidden", "units", "maxout")
        require_positive({name: getattr(self, name) for name in sizes})
        require_probability({"dropout": self.dropout})
        gates, outputs = GRU.gates * self.hidden, 2 * self.hidden
        draw = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        layer = functools.partial(dense, dtype=self.dtype, kernel_init=draw)
        self.source = nn.Embed(self.source_vocabulary, self.embedding, dtype=self.dtype)
        self.target = nn.Embed(self.target_vocabulary, self.embedding, dtype=self.dtype)
        self.encoder = Recurrent(GRU, self.hidden, bidirectional=True, dtype=self.dtype)
        self.first, self.keys, self.input = layer(self.hidden), layer(self.units), layer(gates)
        self.query = self.param("query", draw, (self.hidden, self.units))
        self.vector = self.param("vector", draw, (self.units, 1))
        self.context = self.param("context", draw, (outputs, gates))
        self.kernel = self.param("kernel", draw, (self.hidden, gates))
        self.bias = self.param("bias", nn.initializers.zeros, (gates,))
        self.readout, self.output = layer(2 * self.maxout), layer(self.target_vocabulary)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, source: Array, target: Array, lengths: Array | None = None, *, train: bool
    ) -> tuple[Array, Array]:
        if jnp.ndim(target) != 2 or target.shape[0] != source.shape[0] or not target.shape[1]:
            raise InputError(
                f"target {jnp.shape(target)} for source {jnp.shape(source)}, expected [B, T] with T of 1 or more and "
                "the same B; begin each row with a start token"
            )
        carry = self.start(source, lengths, train=train)
        words = self.drop(self.target(target.T), deterministic=not train)  # [T, B, E]

        def advance(state: Array, x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
            new, context, weights = self._advance(carry._replace(state=state), x)
            return new, (state, context, weights)

        _, (states, contexts, weights) = jax.lax.scan(advance, carry.state, self.input(words))
        logits = self._logits(states, words, contexts, train)
        return logits.swapaxes(0, 1), weights.swapaxes(0, 1)

    def start(self, source: Array, lengths: Array | None = None, *, train: bool = False) -> Carry:
        """The carry before the first token of the target, for sources int [B, S].

        The state is a layer of the backward encoder's state at the first token (appendix A.2.2).
        """
        words = self.drop(self.source(source), deterministic=not train)
        outputs, (_, (backward,)) = self.encoder(words, lengths, train=train)
        values = outputs.astype(self.dtype)
        state = jnp.tanh(self.first(backward).astype(jnp.float32))
        return Carry(state, self.keys(values), values, valid_steps(lengths, source))

    def step(self, token: Array, carry: Carry) -> tuple[Array, Carry]:
        """Reads one more token of the target: int [B] -> logits float32 [B, V] of the next one, and the carry."""
        word = self.target(token)
        state, context, _ = self._advance(carry, self.input(word))
        return self._logits(carry.state, word, context, False), carry._replace(state=state)

    def _advance(self, carry: Carry, x: Array) -> tuple[Array, Array, Array]:
        """The next state, the context that it read, and the weights of that; x [B, 3 H] is a token's part of the gates.

        These are the equations of appendix A.2.2.
        """
        energies = carry.keys + self._product(carry.state, self.query)[:, None]
        context, weights = additive(energies, self.vector[:, 0], carry.values, carry.valid)
        x = x.astype(jnp.float32) + self._product(context, self.context)
        (state,), *_ = GRU.forward((carry.state,), x, self._product(carry.state, self.kernel) + self.bias)
        return state, context, weights

    def _product(self, x: Array, kernel: Array) -> Array:  # float32
        return jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)

    def _logits(self, state: Array, word: Array, context: Array, train: bool) -> Array:
        """The logits [..., V] from the state before a token, the token's vector, and the context that was read."""
        x = self.readout(jnp.concatenate([each.astype(self.dtype) for each in (state, word, context)], -1))
        x = ops.max_over(x.reshape(*x.shape[:-1], self.maxout, 2), -1)
        return self.output(self.drop(x, deterministic=not train)).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of inputs, for the tests of the whole zoo."""
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 7, (3, 5), np.int32), rng.integers(0, 6, (3, 4), np.int32)
    inputs = {"source": source, "target": target, "lengths": np.array([5, 1, 4], np.int32)}
    return {"Seq2Seq": (Seq2Seq(7, 6, embedding=4, hidden=5, units=6, maxout=3), inputs)}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """RNNsearch of the paper, whose layers' sizes (appendix B.1) give its number of parameters with our biases."""
    tokens = {name: jax.ShapeDtypeStruct((1, 50), jnp.int32) for name in ("source", "target")}
    v, m, n, a, o = 30_000, 620, 1000, 1000, 500
    encoder = 2 * 3 * n * (m + n + 2)
    attention = (2 * n + 1) * a + n * a + a
    decoder = (n + 1) * n + 3 * n * (m + 1 + 2 * n + n + 1)
    readout = (n + m + 2 * n + 1) * 2 * o + (o + 1) * v
    return {"RNNsearch": (Seq2Seq(v, v), tokens, 2 * v * m + encoder + attention + decoder + readout)}
