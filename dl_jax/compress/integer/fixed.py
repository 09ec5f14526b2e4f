"""Numbers in fixed point: integers on a grid, and the multipliers that take sums from one grid to another.

Jacob et al. 2018, arXiv:1712.05877, section 2.2.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dl_jax.core.step import Array

M_BITS = 15  # of the m of a multiplier


class Fixed(NamedTuple):
    """Real numbers scale · (values − zero)."""

    values: Array  # int8 at a point of the model; otherwise int32, sums
    scale: np.ndarray  # float64 [], or [1, ..., C] of the channels of sums
    zero: int

    def centred(self) -> Array:
        return self.values.astype(jnp.int32) - self.zero

    def real(self) -> Array:
        return self.centred().astype(jnp.float32) * jnp.asarray(self.scale, jnp.float32)


class Grid(NamedTuple):
    """How the values at a point are represented."""

    scale: np.ndarray  # float64 []
    zero: int
    end: int  # integers are -end .. end - 1

    def of_real(self, x: Array) -> Array:
        """The integers of real numbers, such as the model's input.

        By a product, as a division by a constant becomes one in compiled code only, and might round to a neighbour.
        """
        q = jnp.round(x * (1 / self.scale).astype(x.dtype)) + self.zero
        return jnp.clip(q, -self.end, self.end - 1)


class Multiplier(NamedTuple):
    """m · 2^(left − n), with 2^14 ≤ m < 2^15 unless it is below 2^-33; [] or [1, ..., C]."""

    m: np.ndarray
    n: np.ndarray  # 17 to 47
    left: np.ndarray  # 0 unless it is 1/4 or more


def as_multiplier(number: np.ndarray) -> Multiplier:
    fraction, exponent = np.frexp(number)  # number = fraction · 2^exponent, 1/2 ≤ fraction < 1
    m, n = np.round(fraction * 2**M_BITS), M_BITS - exponent
    m, n = np.where(m == 2**M_BITS, m / 2, m), np.where(m == 2**M_BITS, n - 1, n)
    left, right = np.maximum(17 - n, 0), np.maximum(n - 47, 0)
    return Multiplier(*(each.astype(np.int32) for each in (np.round(m / 2.0**right), n + left - right, left)))


def multiplied(sums: Array, by: Multiplier) -> Array:
    """floor(sums · m · 2^(left − n) + 1/2) in int32, with the product of 47 bits in two halves."""
    most = (2 ** (31 - by.left.astype(np.int64)) - 1).astype(np.int32)  # beyond, it leaves any grid
    sums = jnp.clip(sums, -most, most) << by.left
    high, low = sums >> 16, sums & 0xFFFF
    product = high * by.m + ((low * by.m) >> 16)  # without its 16 last bits, which n ≥ 17 rounds off
    return (product + (1 << (by.n - 17))) >> (by.n - 16)
