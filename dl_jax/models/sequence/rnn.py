"""Recurrent networks: vanilla RNN, LSTM and GRU, stacked and bidirectional, over sequences of any length.

A cell combines two projections [B, G H] by pointwise arithmetic: x, a matrix product of the input, and h, a matrix
product of the state. They hold G gates of H units side by side. The projection of the input is one product over all
steps, before the scan. The gradient of the state's kernel is one product over all steps, after the backward scan
(`recur`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability

Array = jax.Array
State = tuple[Array, ...]  # state of one layer and direction: (h,) or (h, c), float32 [B, H] each
Kept = tuple[Array, ...]  # arrays [B, H] that a step keeps for its backward pass
Carry = tuple[State, ...]  # states of all layers, in order, and in each layer forward before backward


class Cell(NamedTuple):
    """The arithmetic of one step of a recurrent layer, and of its backward pass.

    `forward(state, x, h)` returns the new state, the slopes [B, G H], which are the derivatives of the new state with
    respect to the gates' inputs, and the other arrays [B, H] that `backward` needs. `backward(slopes, kept, grad)`
    takes the gradient of the new state. It returns three gradients: that of the old state, without the part that flows
    through the kernel; that of h [B, G H]; and that of x at the last gate [B, H], or None if it equals that of h there.
    """

    gates: int
    states: int  # number of arrays in the state, of which h is the first
    bias: bool  # whether h has a bias of its own; for cells that add x and h the bias of x is enough
    forward: Callable[[State, Array, Array], tuple[State, Array, Kept]]
    backward: Callable[[Array, Kept, State], tuple[State, Array, Array | None]]


def _tanh_step(state: State, x: Array, h: Array) -> tuple[State, Array, Kept]:
    h = jnp.tanh(x + h)
    return (h,), 1 - h**2, ()


def _tanh_back(slopes: Array, kept: Kept, grad: State) -> tuple[State, Array, None]:
    return (jnp.zeros_like(grad[0]),), grad[0] * slopes, None


def _lstm_step(state: State, x: Array, h: Array) -> tuple[State, Array, Kept]:
    i, f, g, o = jnp.split(x + h, 4, axis=-1)
    i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
    c = f * state[1] + i * g
    squashed = jnp.tanh(c)
    slopes = g * i * (1 - i), state[1] * f * (1 - f), i * (1 - g**2), squashed * o * (1 - o)
    return (o * squashed, c), jnp.concatenate(slopes, -1), (f, o * (1 - squashed**2))


def _lstm_back(slopes: Array, kept: Kept, grad: State) -> tuple[State, Array, None]:
    i, f, g, o = jnp.split(slopes, 4, axis=-1)
    dh, dc = grad
    dc = dc + dh * kept[1]
    return (jnp.zeros_like(dh), dc * kept[0]), jnp.concatenate([dc * i, dc * f, dc * g, dh * o], -1), None


def _gru_step(state: State, x: Array, h: Array) -> tuple[State, Array, Kept]:
    (xr, xz, xn), (hr, hz, hn) = jnp.split(x, 3, axis=-1), jnp.split(h, 3, axis=-1)
    r, z = nn.sigmoid(xr + hr), nn.sigmoid(xz + hz)
    n = jnp.tanh(xn + r * hn)
    candidate = (1 - z) * (1 - n**2)
    slopes = candidate * hn * r * (1 - r), (state[0] - n) * z * (1 - z), candidate * r
    return ((1 - z) * n + z * state[0],), jnp.concatenate(slopes, -1), (z, candidate)


def _gru_back(slopes: Array, kept: Kept, grad: State) -> tuple[State, Array, Array]:
    (r, z, n), (dh,) = jnp.split(slopes, 3, axis=-1), grad
    return (dh * kept[0],), jnp.concatenate([dh * r, dh * z, dh * n], -1), dh * kept[1]


VANILLA = Cell(1, 1, False, _tanh_step, _tanh_back)
"""The vanilla cell: h' = tanh(x + h) (Elman 1990)."""
LSTM = Cell(4, 2, False, _lstm_step, _lstm_back)
"""The LSTM cell without peepholes (Gers et al. 2000): c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c').

The order of the gates is i, f, g, o."""
GRU = Cell(3, 1, True, _gru_step, _gru_back)
"""The GRU cell as in cuDNN and PyTorch: h' = (1 − z) tanh(xn + r hn) + z h.

The reset gate r is applied after the matrix product; Cho et al. 2014 (arXiv:1406.1078) apply it before the product, and
swap z and 1 − z. The order of the gates is r, z, n."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(
    cell: Cell,
    kernel: Array,  # [H, G H]
    bias: Array | None,  # [G H], if the cell has one
    x: Array,  # [T, B, G H], the projection of the input
    state: State,  # before the first step
    valid: Array | None,  # bool [T, B, 1]; where it is False, the step leaves the state unchanged
) -> tuple[Array, State]:
    """Runs a cell over T steps. Returns h after every step, float32 [T, B, H], and the state after the last step.

    The backward pass computes the gradient of `kernel` in one product over all steps; differentiating `lax.scan` would
    add up one product per step. The forward pass overwrites x with the slopes, and the backward pass overwrites the
    slopes with the gradients of the gates, which saves a third of an LSTM's temporary memory. There is no forward-mode
    derivative.
    """
    step = _step(cell, kernel, bias)

    def body(state: State, inputs: tuple[Array, Array | None]) -> tuple[State, Array]:
        state, *_ = step(state, *inputs)
        return state, state[0]

    state, h = lax.scan(body, state, (x.astype(jnp.float32), valid))
    return h, state


def _step(cell: Cell, kernel: Array, bias: Array | None) -> Callable[..., tuple[State, Array, Kept]]:
    """One step of the forward pass: (state, x [B, G H], valid) -> (new state, slopes, kept)."""

    def step(state: State, x: Array, valid: Array | None) -> tuple[State, Array, Kept]:
        h = _product(state[0], kernel)
        new, slopes, kept = cell.forward(state, x, h if bias is None else h + bias)
        return _where(valid, new, state), slopes, kept

    return step


def _recur_forward(cell: Cell, kernel, bias, x, state, valid):
    step = _step(cell, kernel, bias)

    def body(carry: tuple[State, Array], inputs: tuple[Array, Array | None]):
        (state, x), (t, valid) = carry, inputs
        state, slopes, kept = step(state, _at(x, t), valid)
        return (state, _put(x, slopes, t)), (state[0], kept)

    start = state, x.astype(jnp.float32)
    (last, slopes), (h, kept) = lax.scan(body, start, (jnp.arange(len(x)), valid))
    return (h, last), (kernel, bias, jnp.zeros((), x.dtype), state[0], valid, h, slopes, kept)


def _recur_backward(cell: Cell, residuals, grads):
    kernel, bias, like_x, first, valid, h, slopes, kept = residuals
    dh, dlast = grads

    def body(carry: tuple[State, Array], inputs):
        (grad, slopes), (t, dh, kept, valid) = carry, inputs
        grad = (grad[0] + dh, *grad[1:])
        (dbefore, *rest), dgates, own = cell.backward(_at(slopes, t), kept, grad)
        dgates = _where(valid, dgates, jnp.zeros_like(dgates))
        new = (dbefore + _product(dgates, kernel.T), *rest)
        return (_where(valid, new, grad), _put(slopes, dgates, t)), own

    steps = jnp.arange(len(h))
    (dfirst, dgates), own = lax.scan(body, (dlast, slopes), (steps, dh, kept, valid), reverse=True)
    before = jnp.concatenate([first[None], h[:-1]]).astype(kernel.dtype)
    dkernel = lax.dot_general(before, dgates.astype(kernel.dtype), (((0, 1), (0, 1)), ((), ())))
    dbias = None if bias is None else dgates.sum((0, 1)).astype(bias.dtype)
    dx = dgates
    if own is not None:
        own = _where(valid, own, jnp.zeros_like(own))
        dx = jnp.concatenate([dgates[..., : -own.shape[-1]], own], -1)
    return dkernel, dbias, dx.astype(like_x.dtype), dfirst, None


recur.defvjp(_recur_forward, _recur_backward)


def _at(x: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(x, t, keepdims=False)


def _put(x: Array, row: Array, t: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, row, t, 0)


def _product(h: Array, kernel: Array) -> Array:  # float32 [B, N], from factors of the kernel's dtype
    return jnp.matmul(h.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)


def _where(valid: Array | None, new: Any, old: Any) -> Any:
    return new if valid is None else jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, old)


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
        x = nn.Dense(units, dtype=self.dtype, kernel_init=draw, bias_init=draw, name="input")(x)
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

    Raises InputError where `hidden`, `layers` or T is below 1, for a dropout outside [0, 1), and for lengths that are
    not int [B] or not in [1, T]. Lengths that are traced cannot be checked; those above T count as T.
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
        valid = None if lengths is None else _valid(lengths, batch, steps)  # [T, B, 1]
        carry = self.initial_carry(batch) if carry is None else carry
        directions = 1 + self.bidirectional
        x, last = _where(valid, x.swapaxes(0, 1), 0.0), []  # [T, B, D]; a NaN in the padding would make gradients NaN
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
        x = _where(valid, x, 0.0)
        return x.swapaxes(0, 1), tuple(last)

    def initial_carry(self, batch: int) -> Carry:
        """The carry before the first step, zeros, for `batch` sequences."""
        return initial_carry(self.cell, self.hidden, self.layers * (1 + self.bidirectional), batch)


def initial_carry(cell: Cell, hidden: int, runs: int, batch: int) -> Carry:
    """Zeros [B, H] for each array of each state; `runs` is the number of layers times the number of directions."""
    return ((jnp.zeros((batch, hidden)),) * cell.states,) * runs


def _valid(lengths: Array, batch: int, steps: int) -> Array:  # int [B] -> bool [T, B, 1]
    if np.shape(lengths) != (batch,) or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise InputError(
            f"lengths are {jnp.result_type(lengths)} {np.shape(lengths)}, expected whole numbers ({batch},); give one "
            "for each sequence"
        )
    if not isinstance(lengths, Tracer) and ((low := np.min(lengths)) < 1 or (low := np.max(lengths)) > steps):
        raise InputError(f"a sequence has length {low}, expected 1 to {steps}, the steps of the batch; trim or pad it")
    return (jnp.arange(steps)[:, None] < jnp.asarray(lengths))[..., None]


def with_forget_bias(variables: Any, bias: float) -> Any:
    """The variables of an LSTM with the biases of all forget gates set to `bias`.

    With a large bias the LSTM starts by remembering; 1 is usual (Gers et al. 2000; Jozefowicz et al. 2015, "An
    Empirical Exploration of Recurrent Network Architectures"). Every LSTM layer of a network is changed, and nothing
    else; leaves may have leading axes, such as the seed axis. Raises InputError where there is no LSTM layer, because
    no other cell has a forget gate of this kind.
    """
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    shapes = {name(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    layers = {path.removesuffix("input/bias") for path in shapes if f"/{path}".endswith("/input/bias")}
    lstms = {layer for layer in layers if _is_lstm(shapes.get(f"{layer}kernel"), f"{layer}bias" in shapes)}
    if not lstms:
        found = f"none of {', '.join([*shapes][:6])} is of an LSTM layer" if shapes else "the variables hold no arrays"
        raise InputError(
            f"with_forget_bias: {found}, expected {LSTM_LAYER}; give it the variables of a network of LSTM cells"
        )

    def change(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        if name(path) not in {f"{layer}input/bias" for layer in lstms}:
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

    The other fields and `carry` are those of `Recurrent`; dropout acts on the outputs of the last layer too.
    """

    outputs: int
    hidden: int
    layers: int = 1
    cell: Cell = LSTM
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, carry: Carry | None = None, *, train: bool) -> tuple[Array, Carry]:
        recurrent = Recurrent(self.cell, self.hidden, self.layers, dropout=self.dropout, dtype=self.dtype)
        x, carry = recurrent(x, carry=carry, train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.outputs, dtype=self.dtype)(x).astype(jnp.float32), carry


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
        tagger = SequenceTagger(self.vocabulary, self.hidden, self.layers, self.cell, self.dropout, self.dtype)
        return tagger(x, carry, train=train)

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
        "SequenceTagger": (SequenceTagger(3, hidden=5), {"x": x}),
        "CharLM": (CharLM(7, hidden=5, layers=2, cell=GRU), {"tokens": tokens}),
    }
