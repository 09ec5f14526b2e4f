"""Recurrent cells and their scan over time, with a backward pass of our own.

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
from jax import lax
from jax.sharding import PartitionSpec

Array = jax.Array
State = tuple[Array, ...]  # state of one layer and direction: (h,) or (h, c), float32 [B, H] each
Kept = tuple[Array, ...]  # arrays [B, H] that a step keeps for its backward pass


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
    kernel = _whole(kernel)

    def step(state: State, x: Array, valid: Array | None) -> tuple[State, Array, Kept]:
        h = _product(state[0], kernel)
        new, slopes, kept = cell.forward(state, x, h if bias is None else h + bias)
        return where_valid(valid, new, state), slopes, kept

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
    transposed = _whole(kernel).T  # outside of the scan, which would transpose it in every step on a CPU

    def body(carry: tuple[State, Array], inputs):
        (grad, slopes), (t, dh, kept, valid) = carry, inputs
        grad = (grad[0] + dh, *grad[1:])
        (dbefore, *rest), dgates, own = cell.backward(_at(slopes, t), kept, grad)
        dgates = where_valid(valid, dgates, jnp.zeros_like(dgates))
        new = (dbefore + _product(dgates, transposed), *rest)
        return (where_valid(valid, new, grad), _put(slopes, dgates, t)), own

    steps = jnp.arange(len(h))
    (dfirst, dgates), own = lax.scan(body, (dlast, slopes), (steps, dh, kept, valid), reverse=True)
    before = jnp.concatenate([first[None], h[:-1]])
    dkernel = lax.platform_dependent(
        before.astype(kernel.dtype), dgates.astype(kernel.dtype), cpu=_sum_of_rows, default=_sum_of_steps
    )
    dbias = None if bias is None else dgates.sum((0, 1)).astype(bias.dtype)
    dx = dgates
    if own is not None:
        own = where_valid(valid, own, jnp.zeros_like(own))
        dx = jnp.concatenate([dgates[..., : -own.shape[-1]], own], -1)
    return dkernel, dbias, dx.astype(like_x.dtype), dfirst, None


recur.defvjp(_recur_forward, _recur_backward)


def _whole(kernel: Array) -> Array:
    """`kernel`, gathered on every device that computes with it: split, it would be gathered in every step of a scan."""
    mesh = jax.sharding.get_abstract_mesh()
    return kernel if mesh.empty else lax.with_sharding_constraint(kernel, PartitionSpec())


def _sum_of_rows(x: Array, y: Array) -> Array:  # [T, B, M], [T, B, N] -> [M, N]
    """The product of two matrices, because XLA's CPU would transpose arrays of three axes."""
    x, y = (each.reshape(-1, each.shape[-1]) for each in (x, y))
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())))


def _sum_of_steps(x: Array, y: Array) -> Array:
    """The same without rows that devices would have to gather, where B is split over them."""
    return lax.dot_general(x, y, (((0, 1), (0, 1)), ((), ())))


def _at(x: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(x, t, keepdims=False)


def _put(x: Array, row: Array, t: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, row, t, 0)


def _product(h: Array, kernel: Array) -> Array:  # float32 [B, N], from factors of the kernel's dtype
    return jnp.matmul(h.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)


def where_valid(valid: Array | None, new: Any, old: Any) -> Any:
    return new if valid is None else jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, old)
