"""Exports models to StableHLO files, which XLA compiles on a CPU, a GPU or a TPU. Reading them needs only JAX.

JAX promises to read an export for six months: with a release of JAX up to six months newer than the one that wrote it.
After that it may refuse it, and since 0.11.1 it does so by an error instead of results that might differ. An earlier
JAX may refuse it too (docs.jax.dev/en/latest/export/export.html#compatibility-guarantees). So keep the weights beside
such a file, with the code of the network: `dl_jax.export.weights.save_variables` writes them to a file that is not
bound to a version.

A file is `HEADER` (magic, version of this layout, CRC-32 of the rest) followed by the bytes that `jax.export`
serialises. The checksum is needed because `jax.export` does not detect a flipped bit in a weight.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export

from dl_jax.core.errors import InputError
from dl_jax.export import Input, check, read, write
from dl_jax.export.traced import baked, difference, require_same, signature

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
    """Writes `apply(variables, *inputs)` to a file, for any batch size and for CPU, CUDA and TPU.

    The exported program is first read back and compared with `apply` on this machine; see `difference`. Returns the
    difference. Raises InputError where it exceeds `tolerance`, and then writes nothing, where the inputs do not share a
    batch axis, and where the file cannot be written.

    Args:
      apply: a pure function that can be traced with a batch of unknown size (`x.shape[0]`, not `len(x)`). It returns
        arrays, or tuples, lists or dicts of arrays.
      variables: become constants of the file.
      inputs: example inputs [B, ...].
      path: the file, which is replaced if it exists.
      tolerance: the largest difference allowed.
    """
    function, shapes = baked(apply, variables), signature(inputs)
    with _without_locations():
        data = bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes).serialize())
    error = difference(jax.jit(jax.export.deserialize(bytearray(data)).call), apply, variables, inputs, shapes)
    require_same(error, tolerance, "The StableHLO file", path)
    write(path, HEADER.pack(MAGIC, VERSION, zlib.crc32(data)) + data)
    return error


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Within it a program is lowered without the paths and lines of the sources, which are nobody else's matter."""
    limit = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The function in the file `path`, jitted: it takes arrays [B, ...] of any batch size B >= 1.

    Its outputs equal those of the exported function under `jax.jit`, compiled for the same batch size, bit by bit.
    They may differ where XLA compiles a batch size that it knows in another way, such as a batch of 1.

    Raises InputError where the file cannot be read, is damaged or of another kind, or was written by a JAX that this
    one cannot read, a newer one or one of more than six months ago. The function raises InputError for inputs of other
    shapes or types.
    """
    return opened(read(path), path)


def opened(content: bytes, path: str | os.PathLike[str]) -> Callable[..., Any]:
    """As `load`, of a file that was read already; `path` is what messages call it."""
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
    except Exception as e:  # the checksum is right, so that only the version of JAX can be the cause
        raise InputError(
            f"{path} cannot be read by JAX {jax.__version__}; use the JAX that wrote it, or one up to six months "
            "newer, or export the model again"
        ) from e

    def predict(*inputs: Any) -> Any:
        check(expected, inputs)
        return call(*inputs)

    return predict
