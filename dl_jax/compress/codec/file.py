"""The compressed file of a pruned network with shared weights: `encode(tree) -> bytes`, `decode(bytes) -> tree`.

The coding is lossless for any tree of numbers, including the bits of a NaN. The file is small if many numbers are zero,
as after pruning, or if there are few different numbers, as after weight sharing (Han, Mao & Dally 2016,
arXiv:1510.00149; see `entries.py`). Of a dense float leaf only the exponents become shorter.

    file      magic, version, leaves, CRC-32 of all bytes before
    leaf      path, type, number of axes, shape, layout, numbers; before these, if the layout is sparse, the number of
              entries and their distances
    numbers   the number K of different numbers, these numbers, and the indices into them; or 0 and the numbers

Integers are LEB128 and numbers little-endian. Distances, indices and numbers are deflate streams, each preceded by its
length. They use Huffman coding alone. The end of a block takes a code too, so that a number takes 1.5 bits where there
are two equally frequent values, and 2.25 bits where there are four.

In a forged file one byte can stand for a thousand entries and each of these for 256 numbers, so `decode` has a limit on
the size of the tree. Every length is checked before memory is allocated for it. The memory in use stays below 12 times
the limit in the worst case, numbers of one byte that are all entries, and below 5 times for float32.
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

MAGIC, VERSION = b"\x89DLJ\r\n\x1a", 2  # copying the file as text would change these bytes
DTYPES = [  # a file stores a type as its index in this list
    *("float32", "float64", "float16", "bfloat16"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
]
DEEPEST = 64  # largest number of axes of a leaf, and of levels of a tree


def encode(tree: Tree) -> bytes:
    """The compressed file of `tree`, nested dicts of arrays, which `decode` restores bit by bit.

    Empty dicts and None are not stored. Raises InputError for a leaf that is not an array of integers or of floats of
    16 bits or more, for an array outside a dict, and for more than 64 levels.
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
    """The tree in the compressed file `data`, as plain nested dicts of NumPy arrays.

    Raises InputError where `data` is not the whole, undamaged content of such a file, and for a tree of more than
    `limit` bytes, before memory is allocated for it.
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
        raise InputError(f"damaged compressed model: {error}; expected the file as written, copy it again") from error


def _tree(reader: Reader, limit: int) -> dict[str, Any]:
    leaves: dict[str, np.ndarray] = {}
    total = 0
    while reader.left:
        path, shape, dtype = _head(reader)
        if path in leaves:
            raise DamagedError(f"two leaves have the path {path[:80]!r}")
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
        raise DamagedError("a path is not percent-encoded as `encode` writes it")
    return tree


def _packed(path: str, leaf: Any) -> bytes:
    name = leaf.dtype.name
    if name not in DTYPES:
        raise InputError(f"cannot encode leaf {path} of type {name}, expected one of {', '.join(DTYPES)}; convert it")
    if path.count("/") >= DEEPEST:
        raise InputError(f"cannot encode leaf {path}, expected at most {DEEPEST} levels; flatten the tree")
    values = np.asarray(leaf, jnp.dtype(name), order="C")  # in this machine's byte order
    head = [DTYPES.index(name), values.ndim, *values.shape]
    return block(path.encode()) + b"".join(map(integer, head)) + entries.pack(values.view(_patterns(values.dtype)))


def _head(reader: Reader) -> tuple[str, tuple[int, ...], np.dtype]:
    """Path, shape and type of the next leaf."""
    path = reader.block().decode("ascii", errors="replace")
    code, axes = reader.integer(), reader.integer()
    if path.count("/") >= DEEPEST or axes > DEEPEST:
        raise DamagedError(f"a leaf with {path.count('/') + 1} levels and {axes} axes, expected at most {DEEPEST}")
    if code >= len(DTYPES):
        raise DamagedError(f"type {code} of leaf {path[:80]!r}, expected 0 to {len(DTYPES) - 1}")
    dtype = jnp.dtype(DTYPES[code])
    shape = tuple(reader.integer() for _ in range(axes))
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 1 << 62:
        raise DamagedError(f"a shape too large for any memory of leaf {path[:80]!r}")
    return path, shape, dtype


def _patterns(dtype: np.dtype) -> np.dtype:
    """The unsigned integer type of the same size, little-endian as in the file."""
    return np.dtype(f"<u{dtype.itemsize}")


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")
