"""How fast a program can be at best on a slice: what each part of the hardware takes for a step, from its peak rate."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dl_jax.harness.plan.chips import Slice
from dl_jax.harness.plan.hlo import Collective

HOP = 1e-6  # seconds for a message over one link: an assumption, as in "How to Scale Your Model" (Austin et al. 2025)
# Seconds of the host for a call of the program: on the host of an H100, with JAX 0.11, `fit` took 0.73 ms for steps
# whose computation took 0.12 ms. It has not been measured on the host of a TPU.
CALL = 0.75e-3


class Bounds(NamedTuple):
    """The least seconds of a step. What takes longest limits the rate, as all can go on at the same time."""

    mxu: float  # products, at the peak rate of bfloat16
    hbm: float  # main memory
    ici: float  # links between the chips, with their latency
    host: float  # the loop: one call of the program, divided by its steps
    input: float  # reading the batches, on one thread of each host

    @property
    def binding(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def steps_per_second(self) -> float:
        return 1 / max(self)


def bounds(
    where: Slice, *, flops: float, moved: float, sent: Sequence[Collective], steps: int, reading: float
) -> Bounds:
    """The bounds of a step from what a call of `steps` steps does on one chip.

    Args:
      where: the slice.
      flops: floating-point operations.
      moved: bytes read and written in main memory.
      sent: collective operations.
      steps: steps of a call.
      reading: seconds in which a host reads its part of the batches.
    """
    chip = where.chip
    ici = sum(each.times * seconds(each, where) for each in sent)
    parts = flops / chip.flops, moved / chip.hbm_rate, ici, CALL, reading
    return Bounds(*(part / steps for part in parts))


def seconds(each: Collective, where: Slice) -> float:
    """The time of a collective operation at best: all links of the chips that take part are used in both directions.

    These chips are taken to fill whole axes of the slice, the last one first, and a part of the next.
    """
    n = each.devices
    if n < 2:
        return 0.0
    axes = _filled(n, where)
    links = sum(2 if wraps else 1 for _, wraps in axes)
    hops = sum(extent // 2 if wraps else extent - 1 for extent, wraps in axes)
    share = (n - 1) / n
    # In units of the result: an all-reduce is a reduce-scatter and an all-gather.
    sent, rounds = {
        "all-reduce": (2 * share, 2),
        "reduce-scatter": (n - 1, 1),
        "collective-permute": (1, 1),
    }.get(each.kind, (share, 1))
    return sent * each.bytes / (links * where.chip.link_rate) + rounds * hops * HOP


def _filled(n: int, where: Slice) -> list[tuple[int, bool]]:
    """(extent, whether its ends are joined) of the axes along which n chips lie."""
    axes = []
    for extent, wraps in reversed(list(zip(where.shape, where.chip.wraps(where.shape), strict=True))):
        if n > 1 and extent > 1:
            axes.append((min(n, extent), wraps and n >= extent))
            n = math.ceil(n / extent)
    return axes


def worthwhile_batch(found: Bounds, batch_size: int, split: int) -> int | None:
    """From which batch the chips compute for longer than they communicate or wait for the host's loop.

    It is a multiple of `split`, the number of parts of a batch, and None for a program without products.
    """
    if not found.mxu:
        return None
    return split * math.ceil(batch_size * max(found.ici, found.host) / found.mxu / split)
