"""Integers and arrays as bytes, and a reader that trusts nothing."""

import zlib

import numpy as np


class DamagedError(ValueError):
    """Bytes that no encoder of ours writes."""


def integer(value: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first, the eighth bit set on all bytes but the last."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def block(content: bytes) -> bytes:
    """`content` after its length."""
    return integer(len(content)) + content


def deflated(values: np.ndarray) -> bytes:  # [n]
    """`values` as a block of raw deflate (RFC 1951): the first byte of each, then the second of each, and so on.

    zlib codes bytes by Huffman's method alone, without searching for repetitions, and has a code for each place.
    """
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    places = values.reshape(-1, 1).view(np.uint8).T  # [itemsize, n]
    stream = b"".join(coder.compress(place.tobytes()) + coder.flush(zlib.Z_BLOCK) for place in places)
    return block(stream + coder.flush())


class Reader:
    """Takes bytes from the front. Raises DamagedError for more than there are, before anything is allocated."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._data) - self._at

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise DamagedError(f"{n} bytes wanted at byte {self._at}, {self.left} left")
        self._at += n
        return self._data[self._at - n : self._at]

    def integer(self) -> int:
        """A number below 2^63."""
        value = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise DamagedError(f"an integer of more than 63 bits before byte {self._at}")

    def block(self) -> bytes:
        return self.take(self.integer())

    def array(self, n: int, dtype: np.dtype) -> np.ndarray:  # -> [n]
        return np.frombuffer(self.take(n * dtype.itemsize), dtype)

    def inflated(self, n: int, dtype: np.dtype) -> np.ndarray:  # -> [n]
        """What `deflated` wrote of `n` numbers. However far the stream would go on, no more than these are made."""
        stream, size = self.block(), n * dtype.itemsize
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflater.decompress(stream, size + 1)  # a byte more shows what is too long; 0 is no bound at all
        except zlib.error as error:
            raise DamagedError(f"a stream that is no deflate: {error}") from error
        if len(content) != size or not inflater.eof or inflater.unused_data:
            raise DamagedError(f"a stream that does not end after {n} numbers of {dtype.itemsize} bytes")
        places = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, n)
        return np.ascontiguousarray(places.T).view(dtype).ravel()
