"""A leaf as entries, each a number and its distance from the entry before, in the layout that takes the fewest bytes.

Han, Mao & Dally 2016 (arXiv:1510.00149), sections 2 to 4: where the next number that is not zero lies more than 2^b
places on, an entry of zero fills in; numbers go through a codebook; both are Huffman coded, here by deflate. What the
paper fixes is chosen by size: which axis runs fastest, and whether a codebook or distances are worth their bytes at
all. b is 8, so a distance fits a byte: fewer bits made no file smaller, since a rare distance takes a long code anyway.

Numbers are bit patterns, unsigned integers, of which 0 alone is zero: -0.0 is not.
"""

import math

import numpy as np

from dl_jax.compress.codec.wire import DamagedError, Reader, deflated, integer

BITS = 8  # b
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
    kinds, symbols = np.unique(leaf, return_inverse=True)
    symbols = symbols.reshape(leaf.shape)  # ranks among the kinds: zero, where there is one, is symbol 0
    layouts = [integer(0) + _write(symbols.ravel(), kinds)]
    if 0 in kinds[:1]:
        for layout, flat in [(SPARSE, symbols.ravel()), (SPARSE | TRANSPOSED, symbols.T.ravel())]:
            gaps = distances(flat > 0, BITS)
            head = integer(layout) + integer(len(gaps)) + deflated((gaps - 1).astype(np.uint8))
            layouts.append(head + _write(flat[np.cumsum(gaps) - 1], kinds))
    return min(layouts, key=len)


def unpack(reader: Reader, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:  # -> uint [...]
    """The leaf that `pack` wrote. Raises DamagedError."""
    size, layout = math.prod(shape), reader.integer()
    if layout > SPARSE | TRANSPOSED:
        raise DamagedError(f"layout {layout}, not 0 to {SPARSE | TRANSPOSED}")
    if layout & SPARSE:
        count = reader.integer()
        if count > size:
            raise DamagedError(f"{count} entries in a leaf of {size} numbers")
        ends = reader.inflated(count, np.dtype(np.uint8)).astype(np.int64)
        ends += 1
        np.cumsum(ends, out=ends)
        if not count or ends[-1] != size:
            raise DamagedError(f"{count} entries that do not end where a leaf of {size} numbers does")
        ends -= 1
        flat = np.zeros(size, dtype)
        flat[ends] = _read(reader, count, dtype)
    else:
        flat = _read(reader, size, dtype)
    leaf = flat.reshape(shape[::-1]).T if layout & TRANSPOSED else flat.reshape(shape)
    return np.array(leaf, order="C")


def _write(symbols: np.ndarray, kinds: np.ndarray) -> bytes:  # int [n], uint [K] -> bytes
    """kinds[symbols] in fewer bytes: after a 0 as they are, or after K and the kinds as their indices."""
    plain = integer(0) + deflated(kinds[symbols])
    indexed = integer(len(kinds)) + kinds.tobytes() + deflated(symbols.astype(_index(len(kinds))))
    return min(plain, indexed, key=len)


def _read(reader: Reader, n: int, dtype: np.dtype) -> np.ndarray:  # -> uint [n]
    """What `_write` wrote of `n` numbers. Raises DamagedError."""
    count = reader.integer()
    if not count:
        return reader.inflated(n, dtype)
    kinds, symbols = reader.array(count, dtype), reader.inflated(n, _index(count))
    if symbols.max(initial=0) >= count:
        raise DamagedError(f"number {symbols.max()} of a codebook of {count}")
    return kinds[symbols]


def _index(count: int) -> np.dtype:
    """The smallest type for 0 to `count` - 1, as a file holds it."""
    return np.min_scalar_type(max(count - 1, 0)).newbyteorder("<")
