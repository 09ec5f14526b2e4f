"""Integers and arrays as bytes, and a reader that trusts nothing."""

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
