"""What chips and slices can do, from their makers' documentation, and the slices that exist."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dl_jax.core.errors import InputError
from dl_jax.harness.plan import gpus

GIB = 2**30


class Chip(NamedTuple):
    """One chip. Rates are peaks per second."""

    flops: float  # of float32 products in JAX's default precision: bfloat16 on TPUs, TF32 on GPUs
    hbm: float  # bytes of memory for programs
    hbm_rate: float  # bytes
    link_rate: float  # bytes over one link between chips, in one direction
    wraps: Callable[[tuple[int, ...]], tuple[bool, ...]]  # for each axis of a slice, whether its ends are joined
    shapes: Callable[[], Iterator[tuple[int, ...]]]


def _plane() -> Iterator[tuple[int, ...]]:
    yield from ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def _cube() -> Iterator[tuple[int, ...]]:
    yield from ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    fours = range(4, MOST // 16 + 1, 4)
    yield from (s for s in itertools.combinations_with_replacement(fours, 3) if math.prod(s) <= MOST)


def _host() -> Iterator[tuple[int, ...]]:
    yield from ((1,), (2,), (4,), (8,))


def _of_sixteen(shape: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(extent == 16 for extent in shape)


def _of_fours(shape: tuple[int, ...]) -> tuple[bool, ...]:
    return (all(extent % 4 == 0 for extent in shape),) * len(shape)


MOST = 4096  # chips of the largest slice that is planned

# docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e: peak compute, HBM bandwidth, shapes of slices, and the bandwidth
# between chips, which is given for all links in both directions (v5e 400 GB/s of 4 links, v5p 1200 of 6, v6e 800 of 4).
# v4's links: Jouppi et al. 2023, "TPU v4", table 4 (6 links of 50 GB/s). The memory is what libtpu leaves to programs,
# as it says where one does not fit.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 50e9, _of_fours, _cube),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, _of_sixteen, _plane),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, _of_fours, _cube),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 100e9, _of_sixteen, _plane),
    # NVIDIA's data sheet of the H100 SXM: dense TF32, memory, and NVLink's 900 GB/s, which are 450 in each direction.
    "h100": Chip(494.7e12, 80e9, 3350e9, 450e9, lambda shape: (False,), _host),
}
GPUS = {"h100": gpus.H100}  # what XLA has to know of them


class Slice(NamedTuple):
    """A slice: "v5e:4x4" has 16 chips of v5e, each linked to its neighbours in a plane. "h100:8" is a host of GPUs."""

    name: str
    kind: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)


def slice_of(name: str) -> Slice:
    """The slice of this name, such as "v5e:4x4". Raises InputError, with the slices that exist, for another."""
    kind, _, extent = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--plan {name}, expected a slice such as v5e:4x4; the chips are {', '.join(CHIPS)}")
    shapes = list(CHIPS[kind].shapes())
    shown = {"x".join(map(str, shape)): shape for shape in shapes}
    if extent not in shown:
        by_size = sorted(shown, key=lambda text: math.prod(shown[text]))
        raise InputError(f"--plan {name}, expected {kind}: and one of {', '.join(by_size)}")
    return Slice(name, kind, CHIPS[kind], shown[extent])
