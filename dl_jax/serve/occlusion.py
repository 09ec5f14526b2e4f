"""What a file looked at, by occlusion: it needs no gradients, only answers to copies of an input.

By how much does the logit of the answer fall where a part of the input is hidden? For images this is
`dl_jax.attribution.occlusion` with windows of 0; for recordings windows in time are 0, and of a text each word in turn
becomes an unknown one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dl_jax.export.record import Arrays, Audio, Image, Request, Text

PARTS = 7  # windows beside each other along the shorter side of an image
MOMENTS = 16  # windows one after the other in a recording


class Copies(NamedTuple):
    """Copies of an example, in each of which one window is hidden."""

    shape: tuple[int, ...]  # of the map: a value for each copy
    size: int  # of a window
    stride: int  # from one window to the next
    copies: Iterator[np.ndarray]


def hidden(request: Request, example: np.ndarray) -> Copies:
    """The copies of an example of such a request, in the order of the map; of arrays there are none.

    An image [H, W, C] has overlapping square windows, a seventh of the shorter side, half a window apart; a recording
    [samples] windows of a sixteenth; a text [T] one copy for each of its words.
    """
    match request:
        case Image():
            height, width = example.shape[:2]
            size = max(1, min(height, width) // PARTS)
            stride = max(1, size // 2)
            tops, lefts = (range(0, n - size + 1, stride) for n in (height, width))
            places = ((slice(top, top + size), slice(left, left + size)) for top in tops for left in lefts)
            return Copies((len(tops), len(lefts)), size, stride, (_with(example, place, 0) for place in places))
        case Audio():
            size = max(1, len(example) // MOMENTS)
            starts = range(0, len(example) - size + 1, size)
            copies = (_with(example, slice(start, start + size), 0) for start in starts)
            return Copies((len(starts),), size, size, copies)
        case Text():
            words = int((example != Text.PADDING).sum())
            return Copies((words,), 1, 1, (_with(example, i, Text.UNKNOWN) for i in range(words)))
        case Arrays():
            return Copies((0,), 1, 1, iter(()))


def _with(example: np.ndarray, place: Any, value: int) -> np.ndarray:
    copy = example.copy()
    copy[place] = value
    return copy
