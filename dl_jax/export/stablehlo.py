"""StableHLO files: what XLA compiles on a CPU, a GPU or a TPU. Reading them needs JAX alone.

A later JAX reads them too, `jax.export` promises for half a year; an earlier one says that it cannot.

A file is `HEADER` (magic, version of this layout, CRC-32 of the rest) and what `jax.export` serialises. That by itself
does not notice a flipped bit in a weight.
"""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export

from dl_jax.core.errors import InputError
from dl_jax.export import Input, baked, check, difference, read, require_same, symbolic, write

PLATFORMS = ("cpu", "cuda", "tpu")
HEADER = struct.Struct("<8sII")
MAGIC = b"\x89dljaxhl"
VERSION = 1


def export(
    apply: Callable[..., Any],
    variables: Any,
    inputs: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-5,
) -> float:
    """Writes `apply(variables, *inputs)` for any batch size and for CPU, CUDA and TPU, if the file computes the same.

    What is written is read back and compared with `apply` on this machine (`difference`).

    Args:
      apply: pure and traceable with a batch of unknown size: `x.shape[0]`, not `len(x)`. Gives arrays, or tuples, lists
        or dicts of them.
      variables: become constants of the file.
      inputs: examples [B, ...].
      path: is replaced if it exists.
      tolerance: the largest difference allowed.

    Returns:
      The difference.

    Raises:
      InputError: the difference exceeds `tolerance` (nothing is written), the examples do not share a batch axis, or
        the file cannot be written.
    """
    function, shapes = baked(apply, variables), symbolic(inputs)
    data = bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes).serialize())
    error = difference(jax.jit(jax.export.deserialize(bytearray(data)).call), function, inputs, shapes)
    require_same(error, tolerance, "The StableHLO file", path)
    write(path, HEADER.pack(MAGIC, VERSION, zlib.crc32(data)) + data)
    return error


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The function in the file `path`: jitted, of arrays [B, ...], for any batch size B >= 1.

    It gives what `jax.jit` gives for the exported function when that is compiled for the same batch size, bit by bit
    except where XLA treats a batch size that it knew from the start in a way of its own (a batch of 1 may).

    Raises:
      InputError: the file cannot be read, is damaged or not of this kind, or its JAX is too new for this one. The
        function raises it for inputs of other shapes or types.
    """
    content = read(path)
    header, data = content[: HEADER.size], content[HEADER.size :]
    if header[: len(MAGIC)] != MAGIC or len(header) < HEADER.size:
        raise InputError(f"{path} is not a StableHLO file of dl_jax; export the model with dl_jax.export.stablehlo")
    _, version, digest = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{path} has layout {version}, expected {VERSION}; export the model again")
    if zlib.crc32(data) != digest:
        raise InputError(f"{path} is damaged: its checksum does not match; copy it again or export the model again")
    try:
        exported = jax.export.deserialize(bytearray(data))
        expected = [
            Input(tuple(size if isinstance(size, int) else None for size in each.shape), each.dtype.name)
            for each in exported.in_avals
        ]
        call = jax.jit(exported.call)
        call.lower(*[jax.ShapeDtypeStruct([size or 1 for size in each.shape], each.dtype) for each in expected])
    except Exception as e:  # it is as it was written: only its version can be wrong
        raise InputError(
            f"{path} cannot be read by JAX {jax.__version__}; use the JAX that wrote it, or a later one"
        ) from e

    def predict(*inputs: Any) -> Any:
        check(expected, inputs)
        return call(*inputs)

    return predict
