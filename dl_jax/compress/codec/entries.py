"""A leaf as entries, each a number and its distance from the previous entry, in the layout that takes the fewest bytes.

Han, Mao & Dally 2016 (arXiv:1510.00149), sections 2 to 4. Entries are the non-zero numbers. Where the next non-zero
number is more than 2^b places away, an entry of value zero, a filler, is put between. Numbers are stored as indices
into a codebook, and indices and distances are Huffman coded, here by deflate. The paper fixes which axis runs fastest
and always uses a codebook and distances; here the smallest of these layouts is chosen. b is 8, so that a distance fits
into a byte: fewer bits made no file smaller, since rare distances take long codes anyway.

Numbers are handled as bit patterns, which are unsigned integers. Only the pattern 0 counts as zero: -0.0 does not.
"""

import math

import numpy as np

from dl_jax.compress.codec.wire import DamagedError, Reader, deflated, integer

BITS = 8  # b, bits of a distance
TRANSPOSED, SPARSE = 1, 2  # bits of a layout. TRANSPOSED: the first axis runs fastest. SPARSE: there are distances.


def distances(occupied: np.ndarray, bits: int) -> np.ndarray:  # bool [N] -> int64 [M]
    """The distance of each entry from the previous one, 1 to 2^bits; the first entry is measured from place -1.

    Entries are the occupied places, the last place, and one filler after every 2^bits places of a longer gap. The
    distances sum to N.
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
    """The bytes of `leaf` in the layout that takes the fewest."""
    kinds, symbols = np.unique(leaf, return_inverse=True)
    symbols = symbols.reshape(leaf.shape)  # indices into the distinct numbers; index 0 is zero if the leaf has a zero
    layouts = [integer(0) + _write(symbols.ravel(), kinds)]
    if 0 in kinds[:1]:
        for layout, flat in [(SPARSE, symbols.ravel()), (SPARSE | TRANSPOSED, symbols.T.ravel())]:
            gaps = distances(flat > 0, BITS)
            head = integer(layout) + integer(len(gaps)) + deflated((gaps - 1).astype(np.uint8))
            layouts.append(head + _write(flat[np.cumsum(gaps) - 1], kinds))
    return min(layouts, key=len)


def unpack(reader: Reader, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:  # -> uint [...]
    """The leaf that `pack` wrote. Raises DamagedError for bytes that it cannot have written."""
    size, layout = math.prod(shape), reader.integer()
    if layout > SPARSE | TRANSPOSED:
        raise DamagedError(f"layout {layout}, expected 0 to {SPARSE | TRANSPOSED}")
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
    """The numbers kinds[symbols] in the shorter of two forms: 0 and the numbers, or K, the kinds and the symbols."""
    plain = integer(0) + deflated(kinds[symbols])
    indexed = integer(len(kinds)) + kinds.tobytes() + deflated(symbols.astype(_index(len(kinds))))
    return min(plain, indexed, key=len)


def _read(reader: Reader, n: int, dtype: np.dtype) -> np.ndarray:  # -> uint [n]
    """The `n` numbers that `_write` wrote. Raises DamagedError for bytes that it cannot have written."""
    count = reader.integer()
    if not count:
        return reader.inflated(n, dtype)
    kinds, symbols = reader.array(count, dtype), reader.inflated(n, _index(count))
    if symbols.max(initial=0) >= count:
        raise DamagedError(f"index {symbols.max()} into a codebook of {count}")
    return kinds[symbols]


def _index(count: int) -> np.dtype:
    """The smallest unsigned integer type that holds 0 to `count` - 1, little-endian as in the file."""
    return np.min_scalar_type(max(count - 1, 0)).newbyteorder("<")
