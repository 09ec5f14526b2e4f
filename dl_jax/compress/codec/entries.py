"""A leaf as entries, each a number and its distance from the entry before, in the layout that takes the fewest bytes.

Han, Mao & Dally 2016 (arXiv:1510.00149), sections 2 to 4: where the next number that is not zero lies more than 2^b
places on, an entry of zero fills in; numbers go through a codebook; both are Huffman coded. What the paper fixes is
chosen by size here: b, which axis runs fastest, and whether a codebook or distances are worth their bytes at all.

Numbers are bit patterns, unsigned integers, of which 0 alone is zero: -0.0 is not.
"""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from dl_jax.compress.codec import huffman
from dl_jax.compress.codec.wire import DamagedError, Reader, integer

SPANS = range(1, 9)  # b: a distance fits a byte
TRANSPOSED, SPARSE = 1, 2  # bits of a layout: the first axis runs fastest; there are distances


def distances(occupied: np.ndarray, bits: int) -> np.ndarray:  # bool [N] -> int64 [M]
    """How far each entry lies behind the one before it, the first one behind -1: 1 to 2^bits. They sum to N.

    Entries are the occupied places, the last place, and fillers, one after every 2^bits places of a longer gap.
    """
    if not len(occupied):
        return np.zeros(0, np.int64)
    places = np.flatnonzero(occupied)
    if not occupied[-1]:
        places = np.append(places, len(occupied) - 1)
    gaps = np.diff(places, prepend=-1)
    fillers = (gaps - 1) >> bits
    ends = np.cumsum(fillers + 1) - 1  # the entry that ends each gap
    out = np.full(ends[-1] + 1, 1 << bits)
    out[ends] = gaps - (fillers << bits)
    return out


def pack(leaf: np.ndarray) -> bytes:  # uint [...]
    """`leaf` in its smallest layout."""
    return min(_layouts(leaf), key=len)


def _layouts(leaf: np.ndarray) -> Iterator[bytes]:
    kinds, symbols = np.unique(leaf, return_inverse=True)
    symbols = symbols.reshape(leaf.shape)  # ranks among the kinds: zero, where there is one, is symbol 0
    yield integer(0) + huffman.write(symbols.ravel(), kinds)
    if not len(kinds) or kinds[0] != 0:
        return
    for layout in [SPARSE, SPARSE | TRANSPOSED]:
        flat = symbols.ravel(_order(layout))
        for bits in SPANS:
            gaps = distances(flat > 0, bits)
            head = integer(layout) + integer(len(gaps)) + huffman.write(gaps - 1, np.arange(256, dtype=np.uint8))
            yield head + huffman.write(flat[np.cumsum(gaps) - 1], kinds)


def unpack(reader: Reader, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:  # -> uint [...]
    """The leaf that `pack` wrote. Raises DamagedError; allocates nothing that the bytes it read do not account for."""
    size = math.prod(shape)
    layout = reader.integer()
    if layout > SPARSE | TRANSPOSED:
        raise DamagedError(f"layout {layout}, not 0 to {SPARSE | TRANSPOSED}")
    if not layout & SPARSE:
        flat = huffman.read(reader, size, dtype)
    else:
        entries = reader.integer()
        places = np.cumsum(huffman.read(reader, entries, np.dtype(np.uint8)).astype(np.int64) + 1) - 1
        numbers = huffman.read(reader, entries, dtype)
        if not entries or places[-1] != size - 1:
            raise DamagedError(f"{entries} entries that do not end where a leaf of {size} numbers does")
        flat = np.zeros(size, dtype)
        flat[places] = numbers
    return np.array(flat.reshape(shape, order=_order(layout)), order="C")


def _order(layout: int) -> Literal["C", "F"]:
    """NumPy's name for the order of the numbers."""
    return "F" if layout & TRANSPOSED else "C"
