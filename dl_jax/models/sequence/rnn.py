"""Recurrent networks: vanilla RNN, LSTM and GRU, stacked and bidirectional, over sequences of any length.

`recur` has the cells and their scan over time.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax import masks
from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.core.leaves import leaf_name
from dl_jax.models.layers import dense
from dl_jax.models.recur import GRU, LSTM, VANILLA, Array, Cell, State, recur, where_valid

Carry = tuple[State, ...]  # states of all layers, in order, and in each layer forward before backward


class Layer(nn.Module):
    """One recurrent layer in one direction: x [T, B, D] -> h float32 [T, B, H], and the last state.

    All weights and biases are initialised uniformly in ±1/√H, as in PyTorch, whose layers have more biases.
    """

    cell: Cell
    hidden: int
    reverse: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, state: State, valid: Array | None) -> tuple[Array, State]:
        if self.reverse:  # the padding then comes first, and leaves the state unchanged
            x, valid = x[::-1], None if valid is None else valid[::-1]

        def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            return jax.random.uniform(key, shape, dtype, -1, 1) / np.sqrt(self.hidden)

        units = self.cell.gates * self.hidden
        x = dense(units, dtype=self.dtype, kernel_init=draw, bias_init=draw, name="input")(x)
        kernel = self.param("kernel", draw, (self.hidden, units)).astype(self.dtype)
        bias = self.param("bias", draw, (units,)).astype(self.dtype) if self.cell.bias else None
        result: Any = recur(self.cell, kernel, bias, x, state, valid)
        h, state = result
        return (h[::-1] if self.reverse else h), state  # lax.scan(reverse=True) cannot be exported to ONNX


class Recurrent(nn.Module):
    """A stack of recurrent layers: x [B, T, D] -> y float32 [B, T, H · directions], and the carry after the last step.

    With `bidirectional` every layer has two sets of weights. One reads forward and the other backward, and their
    outputs are concatenated. Dropout uses the random stream "dropout".

    `lengths`, int [B], gives the number of valid steps of each sequence. The padding after them has no effect, its
    outputs are 0, the returned state is that after the last valid step, and the backward direction starts at the last
    valid step. `carry` is the state before the first step, zeros if None (`initial_carry`).

    Raises InputError where `hidden`, `layers` or T is below 1, for a dropout outside [0, 1), for a carry of other
    shapes than `initial_carry` has, and for lengths that are not int [B] or not in [1, T]. Lengths that are traced
    cannot be checked; those above T count as T.
    """

    cell: Cell
    hidden: int  # H, units of a layer in one direction
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0  # probability in training that an output is dropped on its way to the next layer
    dtype: DTypeLike = jnp.float32  # type of the matrix products; states are float32

    @nn.compact
    def __call__(
        self, x: Array, lengths: Array | None = None, carry: Carry | None = None, *, train: bool
    ) -> tuple[Array, Carry]:
        batch, steps, _ = x.shape
        require_positive({"hidden": self.hidden, "layers": self.layers, "the length of a sequence": steps})
        require_probability({"dropout": self.dropout})
        valid = None if lengths is None else masks.from_lengths(lengths, steps, batch).T[..., None]  # [T, B, 1]
        start = self.initial_carry(batch)
        carry = start if carry is None else tuple(map(tuple, carry))
        if (shapes := jax.tree.map(jnp.shape, carry)) != (expected := jax.tree.map(jnp.shape, start)):
            raise InputError(
                f"the carry has the states {shapes}, expected {expected}; give the carry of this network for {batch} "
                "sequences"
            )
        directions = 1 + self.bidirectional
        x = where_valid(valid, x.swapaxes(0, 1), 0.0)  # [T, B, D]; a NaN in the padding would make gradients NaN
        last = []
        for layer in range(self.layers):
            if layer:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            outputs = []
            for reverse in range(directions):
                name = f"{'backward' if reverse else 'forward'}_{layer}"
                run = Layer(self.cell, self.hidden, bool(reverse), self.dtype, name=name)
                y, state = run(x, carry[layer * directions + reverse], valid)
                outputs.append(y)
                last.append(state)
            x = jnp.concatenate(outputs, -1)
        x = where_valid(valid, x, 0.0)
        return x.swapaxes(0, 1), tuple(last)

    def initial_carry(self, batch: int) -> Carry:
        """The carry before the first step, zeros, for `batch` sequences."""
        return initial_carry(self.cell, self.hidden, self.layers * (1 + self.bidirectional), batch)


def initial_carry(cell: Cell, hidden: int, runs: int, batch: int) -> Carry:
    """Zeros [B, H] for each array of each state; `runs` is the number of layers times the number of directions."""
    return ((jnp.zeros((batch, hidden)),) * cell.states,) * runs


def with_forget_bias(variables: Any, bias: float) -> Any:
    """The variables of an LSTM with the biases of all forget gates set to `bias`.

    With a large bias the LSTM starts by remembering; 1 is usual (Gers et al. 2000; Jozefowicz et al. 2015, "An
    Empirical Exploration of Recurrent Network Architectures"). Every LSTM layer of a network is changed, and nothing
    else; leaves may have leading axes, such as the seed axis. Raises InputError where there is no LSTM layer, because
    no other cell has a forget gate of this kind.
    """
    shapes = {leaf_name(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    layers = {path.removesuffix("input/bias") for path in shapes if f"/{path}".endswith("/input/bias")}
    lstms = {layer for layer in layers if _is_lstm(shapes.get(f"{layer}kernel"), f"{layer}bias" in shapes)}
    if not lstms:
        found = f"none of {', '.join([*shapes][:6])} is of an LSTM layer" if shapes else "the variables hold no arrays"
        raise InputError(
            f"with_forget_bias: {found}, expected {LSTM_LAYER}; give it the variables of a network of LSTM cells"
        )

    def change(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        if leaf_name(path) not in {f"{layer}input/bias" for layer in lstms}:
            return leaf
        i, f, g, o = jnp.split(leaf, 4, -1)
        return jnp.concatenate([i, jnp.full_like(f, bias), g, o], -1)

    return jax.tree_util.tree_map_with_path(change, variables)


LSTM_LAYER = "input/bias [4 H] beside a kernel [H, 4 H]"


def _is_lstm(kernel: tuple[int, ...] | None, own_bias: bool) -> bool:
    """Whether the layer with a state's kernel of this shape has the gates of an LSTM."""
    return kernel is not None and len(kernel) > 1 and kernel[-1] == LSTM.gates * kernel[-2] and not own_bias


class SequenceClassifier(nn.Module):
    """Embedding, recurrent layers and a linear layer on the last valid state: tokens int [B, T] -> logits [B, classes].

    The other fields and `lengths` are those of `Recurrent`; dropout acts on the last state too.
    """

    vocabulary: int
    classes: int
    embedding: int  # width of a token's vector
    hidden: int
    layers: int = 1
    cell: Cell = LSTM
    bidirectional: bool = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, lengths: Array | None = None, *, train: bool) -> Array:
        x = nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype)(tokens)
        recurrent = Recurrent(self.cell, self.hidden, self.layers, self.bidirectional, self.dropout, self.dtype)
        _, carry = recurrent(x, lengths, train=train)
        x = jnp.concatenate([state[0] for state in carry[-1 - self.bidirectional :]], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class SequenceTagger(nn.Module):
    """Recurrent layers and a linear layer on every output: x [B, T, D] -> float32 [B, T, outputs], and the last carry.

    The other fields, `lengths` and `carry` are those of `Recurrent`; dropout acts on the outputs of the last layer too.
    """

    outputs: int
    hidden: int
    layers: int = 1
    cell: Cell = LSTM
    dropout: float = 0.0
    bidirectional: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, lengths: Array | None = None, carry: Carry | None = None, *, train: bool
    ) -> tuple[Array, Carry]:
        recurrent = Recurrent(self.cell, self.hidden, self.layers, self.bidirectional, self.dropout, self.dtype)
        x, carry = recurrent(x, lengths, carry, train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.outputs, dtype=self.dtype)(x).astype(jnp.float32), carry


class CharLM(nn.Module):
    """A language model of characters: tokens int [B, T] -> logits [B, T, V] of the next characters, and the last carry.

    Pass the carry that was returned for one piece of a text with the next piece. The other fields are those of
    `SequenceTagger`.
    """

    vocabulary: int
    hidden: int
    layers: int = 1
    cell: Cell = LSTM
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, carry: Carry | None = None, *, train: bool) -> tuple[Array, Carry]:
        x = nn.Embed(self.vocabulary, self.hidden, dtype=self.dtype)(tokens)
        tagger = SequenceTagger(self.vocabulary, self.hidden, self.layers, self.cell, self.dropout, dtype=self.dtype)
        return tagger(x, carry=carry, train=train)

    def initial_carry(self, batch: int) -> Carry:
        """The carry before the first character, zeros, for `batch` texts."""
        return initial_carry(self.cell, self.hidden, self.layers, batch)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    rng = np.random.default_rng(0)
    x, tokens = rng.standard_normal((3, 6, 4), np.float32), rng.integers(0, 7, (3, 6), np.int32)
    ragged = {"lengths": np.array([6, 2, 4], np.int32)}
    return {
        "RNN": (Recurrent(VANILLA, 5), {"x": x}),
        "LSTM": (Recurrent(LSTM, 5, layers=2, dropout=0.5), {"x": x, **ragged}),
        "GRU": (Recurrent(GRU, 5, bidirectional=True), {"x": x, **ragged}),
        "SequenceClassifier": (
            SequenceClassifier(7, classes=3, embedding=4, hidden=5, bidirectional=True),
            {"tokens": tokens, **ragged},
        ),
        "SequenceTagger": (SequenceTagger(3, hidden=5, bidirectional=True), {"x": x, **ragged}),
        "CharLM": (CharLM(7, hidden=5, layers=2, cell=GRU), {"tokens": tokens}),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The networks of the experiments, whose layers' sizes give their numbers of parameters.

    Those for chorales of 88 keys have the sizes of Bai et al. 2018 (arXiv:1803.01271); the language model has ours.
    """
    frames = {"x": jax.ShapeDtypeStruct((1, 129, 88), jnp.float32)}
    tokens = {"tokens": jax.ShapeDtypeStruct((1, 64), jnp.int32)}

    def layers(gates: int, biases: int, inputs: int, hidden: int, n: int) -> int:
        return gates * hidden * sum(d + hidden + biases for d in (inputs, *[hidden] * (n - 1)))

    return {
        "LSTM": (SequenceTagger(88, 200, 2, LSTM, 0.2), frames, layers(4, 1, 88, 200, 2) + 201 * 88),
        "GRU": (SequenceTagger(88, 230, 2, GRU, 0.2), frames, layers(3, 2, 88, 230, 2) + 231 * 88),
        "RNN": (SequenceTagger(88, 290, 2, VANILLA, 0.2), frames, layers(1, 1, 88, 290, 2) + 291 * 88),
        "CharLM": (CharLM(256, 256, dropout=0.1), tokens, 256 * 256 + layers(4, 1, 256, 256, 1) + 257 * 256),
    }
