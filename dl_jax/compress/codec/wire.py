"""Integers and arrays as bytes, and a reader of these that checks every length."""

import zlib

import numpy as np


class DamagedError(ValueError):
    """Raised for bytes that `encode` cannot have written."""


def integer(value: int) -> bytes:
    """`value` >= 0 in LEB128: seven bits per byte, the lowest first; all bytes but the last have the eighth bit set."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def block(content: bytes) -> bytes:
    """The length of `content` as an integer, then `content`."""
    return integer(len(content)) + content


def deflated(values: np.ndarray) -> bytes:  # [n]
    """`values` as a block of raw deflate (RFC 1951): the first byte of each value, then the second, and so on.

    zlib uses Huffman coding alone, without searching for repetitions, with a separate code for each byte position.
    """
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    places = values.reshape(-1, 1).view(np.uint8).T  # [itemsize, n]
    stream = b"".join(coder.compress(place.tobytes()) + coder.flush(zlib.Z_BLOCK) for place in places)
    return block(stream + coder.flush())


class Reader:
    """Reads integers, blocks and arrays from `data`, one after the other.

    Every method raises DamagedError where fewer bytes are left than it needs, before memory is allocated.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """The number of bytes not yet read."""
        return len(self._data) - self._at

    def take(self, n: int) -> bytes:
        """The next `n` bytes."""
        if n > self.left:
            raise DamagedError(f"{n} bytes expected at byte {self._at}, {self.left} left")
        self._at += n
        return self._data[self._at - n : self._at]

    def integer(self) -> int:
        """The next integer, below 2^63."""
        value = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise DamagedError(f"an integer of more than 63 bits before byte {self._at}")

    def block(self) -> bytes:
        """The content of the next block, as `block` writes it."""
        return self.take(self.integer())

    def array(self, n: int, dtype: np.dtype) -> np.ndarray:  # -> [n]
        """The next `n` numbers, stored as they are."""
        return np.frombuffer(self.take(n * dtype.itemsize), dtype)

    def inflated(self, n: int, dtype: np.dtype) -> np.ndarray:  # -> [n]
        """The `n` numbers that `deflated` wrote. A stream that holds more is refused, and only these are allocated."""
        stream, size = self.block(), n * dtype.itemsize
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflater.decompress(stream, size + 1)  # one byte more detects a long stream; 0 means no limit
        except zlib.error as error:
            raise DamagedError(f"a stream that is not deflate: {error}") from error
        if len(content) != size or not inflater.eof or inflater.unused_data:
            raise DamagedError(f"a stream that does not end after {n} numbers of {dtype.itemsize} bytes")
        places = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, n)
        return np.ascontiguousarray(places.T).view(dtype).ravel()
