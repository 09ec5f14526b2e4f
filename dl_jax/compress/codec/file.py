"""The compressed file of a pruned network with shared weights: `encode(tree) -> bytes`, `decode(bytes) -> tree`.

Lossless for any tree of numbers, to the last bit of a NaN. It is small where numbers are zero, as pruning leaves them,
or few in kind, as weight sharing leaves them (Han, Mao & Dally 2016, arXiv:1510.00149; `entries.py` says how); of a
dense float leaf, its exponents are coded.

    file      magic, version, leaves, CRC-32 of all before
    leaf      path, type, axes, shape, layout, entries and their distances where the layout has them, numbers
    numbers   how many kinds K there are, these, and their indices; or 0 and the numbers themselves

Integers are LEB128, numbers little-endian. Distances, indices and numbers are deflate streams, each after its length.
zlib codes them by Huffman's method alone. The end of a block takes a code too: of two kinds as frequent as each other,
a number takes 1.5 bits, of four 2.25.

A forged byte can stand for a thousand entries and each of these for 256 numbers, so `decode` has a limit for the tree.
Every length is checked before memory is taken for it, and all memory together stays below 12 times that limit (numbers
of one byte, each an entry; five times for float32).
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.compress.codec import entries
from dl_jax.compress.codec.wire import DamagedError, Reader, block, integer
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import named, nested

Tree = Any

MAGIC, VERSION = b"\x89DLJ\r\n\x1a", 2  # a copy that takes the file for text changes these bytes
DTYPES = [  # a file names a type by its place here
    *("float32", "float64", "float16", "bfloat16"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
]
DEEPEST = 64  # axes of a leaf and levels of a tree, at most


def encode(tree: Tree) -> bytes:
    """The compressed file of `tree`, nested dicts of arrays; `decode` gives back every bit.

    Empty dicts and None are not stored. Raises InputError for a leaf that is no array of numbers (floats of 16 bits or
    more, integers), a bare array, or more than 64 levels.
    """
    if jax.tree_util.all_leaves([tree]):
        raise InputError(f"cannot encode a bare {type(tree).__name__}, expected a dict of arrays; give it a name")
    try:
        leaves = named(tree)
    except TypeError as error:
        raise InputError(f"cannot encode the tree: {error}") from error
    data = b"".join([MAGIC, bytes([VERSION]), *(_packed(path, leaf) for path, leaf in leaves.items())])
    return data + _checksum(data)


def decode(data: bytes, limit: int = 2 * 10**9) -> dict[str, Any]:
    """The tree that `encode` was given, as plain nested dicts of NumPy arrays.

    Raises InputError for anything but the whole, undamaged content of such a file, and for a tree of more than `limit`
    bytes, before memory is taken for it.
    """
    if not data.startswith(MAGIC):
        raise InputError(f"no compressed model: it begins with {data[:7]!r}, expected {MAGIC!r}; choose another file")
    body = data[:-4]
    try:
        if len(body) <= len(MAGIC) or _checksum(body) != data[-4:]:
            raise DamagedError(f"the checksum of its {len(data)} bytes is wrong")
        version = body[len(MAGIC)]
        if version != VERSION:
            way = "update dl_jax" if version > VERSION else "no release reads it, encode the network again"
            raise InputError(f"compressed model of version {version}, expected {VERSION}; {way}")
        return _tree(Reader(body[len(MAGIC) + 1 :]), limit)
    except DamagedError as error:
        raise InputError(f"damaged compressed model: {error}; expected it as it was written, copy it again") from error


def _tree(reader: Reader, limit: int) -> dict[str, Any]:
    leaves: dict[str, np.ndarray] = {}
    total = 0
    while reader.left:
        path, shape, dtype = _head(reader)
        if path in leaves:
            raise DamagedError(f"two leaves of the path {path[:80]!r}")
        total += math.prod(shape) * dtype.itemsize
        if total > limit:
            raise InputError(
                f"compressed model of {total} bytes or more, expected at most {limit}; "
                "pass a higher limit to decode if you trust the file"
            )
        leaves[path] = entries.unpack(reader, shape, _patterns(dtype)).view(dtype)
    parents = {path[:i] for path in leaves for i, character in enumerate(path) if character == "/"}
    clash = parents & leaves.keys()
    if clash:
        raise DamagedError(f"{min(clash)[:80]!r} is both a leaf and a branch")
    tree = nested(leaves)
    if named(tree).keys() != leaves.keys():
        raise DamagedError("a path is not spelt as paths are")
    return tree


def _packed(path: str, leaf: Any) -> bytes:
    name = leaf.dtype.name
    if name not in DTYPES:
        raise InputError(f"cannot encode leaf {path} of type {name}, expected one of {', '.join(DTYPES)}; convert it")
    if path.count("/") >= DEEPEST:
        raise InputError(f"cannot encode leaf {path}, expected at most {DEEPEST} levels; flatten the tree")
    values = np.asarray(leaf, jnp.dtype(name), order="C")  # of this machine's byte order
    head = [DTYPES.index(name), values.ndim, *values.shape]
    return block(path.encode()) + b"".join(map(integer, head)) + entries.pack(values.view(_patterns(values.dtype)))


def _head(reader: Reader) -> tuple[str, tuple[int, ...], np.dtype]:
    """Path, shape and type of the next leaf."""
    path = reader.block().decode("ascii", errors="replace")
    code, axes = reader.integer(), reader.integer()
    if path.count("/") >= DEEPEST or axes > DEEPEST:
        raise DamagedError(f"a leaf with {path.count('/') + 1} levels and {axes} axes, more than {DEEPEST}")
    if code >= len(DTYPES):
        raise DamagedError(f"type {code} of leaf {path[:80]!r}, not 0 to {len(DTYPES) - 1}")
    dtype = jnp.dtype(DTYPES[code])
    shape = tuple(reader.integer() for _ in range(axes))
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 1 << 62:
        raise DamagedError(f"a shape beyond all memory of leaf {path[:80]!r}")
    return path, shape, dtype


def _patterns(dtype: np.dtype) -> np.dtype:
    """The unsigned integers of the same size, as a file holds them."""
    return np.dtype(f"<u{dtype.itemsize}")


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")
