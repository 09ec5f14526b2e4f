"""What TPU chips and slices can do, from Google's documentation, and the slices that exist."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dl_jax.core.errors import InputError

GIB = 2**30


class Chip(NamedTuple):
    """One chip. Rates are peaks per second."""

    flops: float  # bfloat16, which JAX's default precision uses for float32 products too
    hbm: float  # bytes of memory
    hbm_rate: float  # bytes
    link_rate: float  # bytes over one link between chips, in one direction
    wraps: Callable[[tuple[int, ...]], bool]  # whether the ends of a slice of this shape are joined to a torus
    shapes: Callable[[], Iterator[tuple[int, ...]]]


def _plane() -> Iterator[tuple[int, ...]]:
    yield from ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def _cube() -> Iterator[tuple[int, ...]]:
    yield from ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    fours = range(4, MOST // 16 + 1, 4)
    yield from (s for s in itertools.combinations_with_replacement(fours, 3) if math.prod(s) <= MOST)


MOST = 4096  # chips of the largest slice that is planned

# docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e: peak compute, HBM capacity and bandwidth, and the bandwidth
# between chips, which is given for all links in both directions (v5e 400 GB/s of 4 links, v5p 1200 of 6, v6e 800 of 4),
# and shapes of slices. v4's links: Jouppi et al. 2023, "TPU v4", table 4 (6 links of 50 GB/s).
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 50e9, lambda shape: all(n % 4 == 0 for n in shape), _cube),
    "v5e": Chip(197e12, 16e9, 819e9, 50e9, lambda shape: max(shape) >= 16, _plane),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 100e9, lambda shape: all(n % 4 == 0 for n in shape), _cube),
    "v6e": Chip(918e12, 32e9, 1638e9, 100e9, lambda shape: max(shape) >= 16, _plane),
}


class Slice(NamedTuple):
    """A slice: "v5e:4x4" has 16 chips of v5e, each linked to its neighbours in a plane."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)


def slice_of(name: str) -> Slice:
    """The slice of this name, such as "v5e:4x4". Raises InputError, with the slices that exist, for another."""
    kind, _, extent = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--plan {name}, expected a slice such as v5e:4x4; a TPU is one of {', '.join(CHIPS)}")
    shapes = list(CHIPS[kind].shapes())
    shown = {"x".join(map(str, shape)): shape for shape in shapes}
    if extent not in shown:
        by_size = sorted(shown, key=lambda text: math.prod(shown[text]))
        raise InputError(f"--plan {name}, expected {kind}: and one of {', '.join(by_size)}")
    return Slice(name, CHIPS[kind], shown[extent])
