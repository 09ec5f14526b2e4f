"""Canonical Huffman codes: from counts to code lengths, from symbols to bits, and back.

Symbols are ranks 0 .. K - 1 in canonical order: lengths never fall, and each code is the one before plus one, with
zeros appended. So the lengths say everything. Left-justified in 64 bits, the codes cut [0, 2^64) into one interval
each, of 2^(64 - length): the codes are cumulative sums, and decoding is a binary search.

Huffman 1952, "A method for the construction of minimum-redundancy codes"; van Leeuwen 1976 for the two queues.
"""

import numpy as np

from dl_jax.compress.codec.wire import DamagedError, Reader, block, integer

KINDS = 1 << 16  # different symbols in a code, at most: beyond that the time is hardly worth it
LONGEST = 56  # bits of a code: with 7 of offset within a byte they fit 64; a longer code needs 10^11 symbols
CHUNK = 1 << 16  # bytes whose bits are looked up at once: bounds memory


def write(symbols: np.ndarray, alphabet: np.ndarray) -> bytes:  # int [n], [K] of the stored type -> bytes
    """alphabet[symbols] in the fewest bytes: after a 0 as they are, or the code, then its stream.

    A code is its longest length L, how many codes have 1 .. L bits, and the symbols in canonical order.
    """
    plain = bytes(1) + alphabet[symbols].tobytes()
    counts = np.bincount(symbols, minlength=len(alphabet))
    (used,) = np.nonzero(counts)
    if not 0 < len(used) <= KINDS or _least_bytes(counts[used], alphabet.itemsize) >= len(plain):
        return plain
    lengths = code_lengths(counts[used])
    order = np.argsort(lengths, kind="stable")
    used, lengths = used[order], lengths[order]
    ranks = np.zeros(len(alphabet), np.int64)
    ranks[used] = np.arange(len(used))
    histogram = np.bincount(lengths)[1:].tolist()
    head = b"".join(integer(value) for value in [len(histogram), *histogram])
    return min(plain, head + alphabet[used].tobytes() + block(pack(ranks[symbols], lengths)), key=len)


def read(reader: Reader, n: int, dtype: np.dtype) -> np.ndarray:  # -> [n]
    """What `write` wrote of `n` symbols. Raises DamagedError."""
    longest = reader.integer()
    if not longest:
        return reader.array(n, dtype)
    if longest > LONGEST:
        raise DamagedError(f"a code of {longest} bits, more than {LONGEST}")
    histogram = [reader.integer() for _ in range(longest)]
    alphabet = reader.array(sum(histogram), dtype)
    lengths = np.repeat(np.arange(1, longest + 1), histogram)
    return alphabet[unpack(reader.block(), n, lengths)]


def _least_bytes(counts: np.ndarray, itemsize: int) -> float:  # int [K], each 1 or more
    """What no code falls below: its symbols and their entropy. Saves building it in vain."""
    return len(counts) * itemsize + (counts @ np.log2(counts.sum() / counts)) / 8


def code_lengths(counts: np.ndarray) -> np.ndarray:  # int [K], each 1 or more -> int64 [K]
    """The bits of each symbol in a code of the least total length, Σ counts · lengths.

    Σ 2^-length is 1 (Kraft), except for one symbol alone: it takes a bit too, so that its number shows in the stream.
    """
    k = len(counts)
    if k < 2:
        return np.ones(k, np.int64)
    order = np.argsort(counts, kind="stable")
    weights = [*counts[order].tolist(), *[0] * (k - 1)]  # leaves, then inner nodes as they come: two rising queues
    parents = [0] * (2 * k - 1)
    leaf, inner = 0, k
    for node in range(k, 2 * k - 1):
        for _ in range(2):
            if inner == node or (leaf < k and weights[leaf] <= weights[inner]):
                child, leaf = leaf, leaf + 1
            else:
                child, inner = inner, inner + 1
            parents[child] = node
            weights[node] += weights[child]
    depths = [0] * (2 * k - 1)
    for node in range(2 * k - 3, -1, -1):  # parents come after their children
        depths[node] = depths[parents[node]] + 1
    lengths = np.empty(k, np.int64)
    lengths[order] = depths[:k]
    return lengths


def pack(ranks: np.ndarray, lengths: np.ndarray) -> bytes:  # int [n], rising int [K] -> bytes
    """The codes of `ranks` one after another, most significant bit first, with zeros up to a whole byte."""
    codes = _starts(lengths) >> _uint64(64 - lengths)  # [K]
    each = lengths[ranks]  # [n]
    at = np.cumsum(each) - each
    bits = np.zeros(int(each.sum()), np.uint8)
    for place in range(int(each.max(initial=0))):  # from the left of all codes at once
        (has,) = np.nonzero(each > place)
        bits[at[has] + place] = (codes[ranks[has]] >> _uint64(each[has] - 1 - place)) & np.uint64(1)
    return np.packbits(bits).tobytes()


def unpack(stream: bytes, n: int, lengths: np.ndarray) -> np.ndarray:  # rising int [K] -> int64 [n]
    """The ranks that `pack` put into `stream`, in time and memory bounded by the stream, whatever `n` is.

    Raises DamagedError unless the lengths make a whole code and the stream is `n` symbols long.
    """
    _require_whole(lengths)
    bits = 8 * len(stream)
    if n > bits:
        raise DamagedError(f"{n} symbols in {bits} bits")
    starts = _starts(lengths)
    steps = _length_at_each_bit(stream, starts, lengths) + bytes(LONGEST)  # beyond the end nothing advances
    places, at = np.empty(n, np.int64), 0
    for i in range(n):
        places[i] = at
        at += steps[at]
    if not at <= bits < at + 8 or (places >= bits).any():
        raise DamagedError(f"{n} symbols end at bit {at} of {bits}")
    return _search(_words(stream)[places >> 3] << _uint64(places & 7), starts)


def _starts(lengths: np.ndarray) -> np.ndarray:  # rising int [K], K > 0 -> uint64 [K]
    """The left-justified codes."""
    widths = np.uint64(1) << _uint64(64 - lengths)
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(widths[:-1], dtype=np.uint64)])


def _search(windows: np.ndarray, starts: np.ndarray) -> np.ndarray:  # uint64 [M], uint64 [K] -> int64 [M]
    """The rank of the code that each window begins with."""
    return np.searchsorted(starts, windows, side="right") - 1


def _words(stream: bytes) -> np.ndarray:  # -> uint64 [bytes]
    """The 64 bits from each byte on, zeros beyond the end."""
    padded = np.frombuffer(stream + bytes(8), np.uint8)
    words = np.zeros(len(stream), np.uint64)
    for i in range(8):
        words |= _uint64(padded[i : i + len(stream)]) << np.uint64(56 - 8 * i)
    return words


def _length_at_each_bit(stream: bytes, starts: np.ndarray, lengths: np.ndarray) -> bytes:
    """How long the code is that would begin at each bit of the stream."""
    words, short = _words(stream), lengths.astype(np.uint8)
    chunks = (words[i : i + CHUNK, None] << np.arange(8, dtype=np.uint64) for i in range(0, len(words), CHUNK))
    return b"".join(short[_search(windows.ravel(), starts)].tobytes() for windows in chunks)


def _require_whole(lengths: np.ndarray) -> None:
    """Raises DamagedError unless all sequences of bits begin with one of the codes, or there is one code, of a bit."""
    used = sum(count << (LONGEST - length) for length, count in enumerate(np.bincount(lengths).tolist()))
    if used != 1 << LONGEST and lengths.tolist() != [1]:
        raise DamagedError(f"{len(lengths)} code lengths that make no Huffman code")


def _uint64(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint64)
