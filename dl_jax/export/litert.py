"""LiteRT files (`.tflite`, for phones and microcontrollers), written without TensorFlow or PyTorch.

    pip install -e '.[litert]' && pip install --no-deps litert-converter==0.5.0

The runtime is an extra of this package. The converter is installed by itself, since it asks for packages that it does
not use to convert, one of which contradicts ours. Other versions of it may differ and are refused.

A file is for one batch size. Loops over time are written out step by step, so that a long sequence makes a large file.
Rounded activations and dequantised weights (`compress.grid`) of 8 bits become LiteRT's own, and its int8 operations
compute with them.

A digest, the CRC-32 of the model, lies behind the first eight bytes, because the runtime does not detect a flipped bit
in a weight. All offsets in such a file (a FlatBuffer) are relative, so that other programs open it as it is.
"""

import importlib.metadata
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from dl_jax.core.errors import InputError, reason
from dl_jax.export import Input, check, read, write
from dl_jax.export.plain import Forms, Integers, Rounding, plain
from dl_jax.export.traced import baked, difference, require_same, signature

CONVERTER = "0.5.0"  # the version of litert-converter, whose module has no documented interface
COMMANDS = {
    "litert-converter": f"pip install --no-deps litert-converter=={CONVERTER}",
    "ai-edge-litert": "pip install -e '.[litert]'",
}
HEAD = struct.Struct("<I4s")  # the place of the root table, and "TFL3"
DIGEST = struct.Struct("<8sII")  # magic, version of this layout, CRC-32; 16 bytes, on which weights are aligned
MAGIC = b"\x89dljaxlt"
VERSION = 1
LOOPS = ("tfl.while", "tfl.if")  # the converter writes them, but not to a file


def export(
    apply: Callable[..., Any],
    variables: Any,
    inputs: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    batch: int = 1,
    tolerance: float = 1e-5,
) -> float:
    """Writes `apply(variables, *inputs)` for batches of `batch` rows to the file `path`; returns how far it differs.

    Writes the file only if the runtime's output matches that of `apply` (`difference`). Where weights or activations
    are rounded, allow for a step of the rounding.

    Args:
      apply: a pure function that returns one array or a tuple of them.
      variables: the first argument of `apply`. They become constants of the file.
      inputs: example arrays [B, ...] with different values, one for each further argument of `apply`.
      path: the file to write. It is replaced if it exists.
      batch: the only batch size that the file will take.
      tolerance: largest allowed absolute difference, relative where outputs exceed 1.

    Raises InputError where the difference exceeds `tolerance` or an operation cannot be converted, in which case
    nothing is written, where the examples do not share a batch axis, where packages are missing or of another version,
    and where the file cannot be written.
    """
    require()
    function, shapes = baked(apply, variables), signature(inputs, batch)
    flat = jax.jit(plain(function, shapes, Forms(_rounded, _dequantized), unroll=True), keep_unused=True)
    content = _converted(jax.export.export(flat, platforms=("cpu",))(*shapes), path)
    with jax.default_matmul_precision("highest"):
        error = difference(_predictor(content), apply, variables, inputs, shapes)
    require_same(error, tolerance, "LiteRT", path)
    write(path, _with_digest(content))
    return error


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The function in the file `path`, on one core: NumPy arrays [B, ...] -> one array, or a tuple of them.

    It may be called by one thread at a time. Raises InputError where the file cannot be read, is damaged or was not
    written by `export`, and where the runtime is missing. The function raises it for inputs of other shapes or types,
    another batch size among them.
    """
    return opened(read(path), path)


def opened(data: bytes, path: str | os.PathLike[str]) -> Callable[..., Any]:
    """As `load`, of a file that was read already; `path` is what messages call it."""
    return _predictor(_content(data, path))


def require() -> None:
    """Raises InputError where a package that writes or runs LiteRT files is missing: to ask before a long training."""
    for name in COMMANDS:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as e:
            raise _missing(name) from e
        if name == "litert-converter" and found != CONVERTER:
            raise InputError(f"litert-converter is {found}, expected {CONVERTER}; run: {COMMANDS[name]}")


def _rounded(x: jax.Array, rounding: Rounding) -> jax.Array:
    scale, zero, largest = rounding
    return _noted(x if largest is None else jnp.minimum(x, largest), np.asarray([scale], np.float64), zero - 128)


def _dequantized(weights: Integers) -> jax.Array:
    values, scale, axis = weights
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    floats = jnp.asarray(values * scale.reshape(shape if axis is not None else ()))
    extra = {} if axis is None else {"quantization_dimension": np.int32(axis)}
    return _noted(floats, scale.ravel().astype(np.float64), 0, narrow_range=True, **extra)


def _noted(x: jax.Array, scale: np.ndarray, zero: int, narrow_range: bool = False, **attributes: Any) -> jax.Array:
    """x with a note for the converter: int8 numbers of this scale represent it."""
    zeros = np.full(scale.shape, zero, np.int64)
    note = lax.composite(lambda x, **_: x, "quant.fake_quant")
    return note(x, dtype="i8", narrow_range=narrow_range, scale=scale, zero_point=zeros, **attributes)


def _converted(exported: jax.export.Exported, path: str | os.PathLike[str]) -> bytes:
    """The LiteRT model of a function. Raises InputError where it has operations that cannot be converted."""
    from litert_converter.mlir import ir, passmanager  # pyright: ignore[reportMissingImports]
    from litert_converter.mlir._mlir_libs import (  # pyright: ignore[reportMissingImports]
        converter_api_ext as converter,
    )

    context = ir.Context()
    converter.prepare_mlir_context(context)
    config = converter.ConvertToTFLConfig()
    config.model_origin_framework = "JAX"
    config.canonicalizing_inf_as_min_max_float = False
    config.strict_qdq_mode = True  # writes the notes of `_noted` as LiteRT's own
    counts = len(exported.in_avals), len(exported.out_avals)
    names = [[f"{kind}_{i}" for i in range(n)] for kind, n in zip(("input", "output"), counts, strict=True)]
    written: set[str] = set()  # names of operations

    def see(operation: Any) -> Any:
        written.add(operation.name)
        return ir.WalkResult.ADVANCE

    try:
        with context:
            module = ir.Module.parse(exported.mlir_module())
            converter.set_signature(module.operation, "serving_default", *names)
            module = converter.merge_modules([module])
            converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
            module.operation.walk(see)
            return converter.export_flatbuffer_to_bytes(module.operation)
    except Exception as e:  # the converter has no class of its own for errors
        left = [name for name in written if name.partition(".")[0] not in ("arith", "builtin", "func", "tfl")]
        found = ", ".join(sorted(left) or [name for name in LOOPS if name in written]) or reason(e)
        raise InputError(
            f"the converter to LiteRT failed at {found}: {path} is not written; export the model to ONNX or StableHLO"
        ) from e


def _predictor(content: bytes) -> Callable[..., Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise _missing("ai-edge-litert") from e
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    takes, gives = interpreter.get_input_details(), interpreter.get_output_details()
    expected = [Input(tuple(map(int, each["shape"])), np.dtype(each["dtype"]).name) for each in takes]

    def predict(*inputs: Any) -> Any:
        check(expected, inputs)
        for each, array in zip(takes, inputs, strict=True):
            interpreter.set_tensor(each["index"], np.asarray(array))
        interpreter.invoke()
        outputs = [interpreter.get_tensor(each["index"]) for each in gives]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return predict


def _with_digest(content: bytes) -> bytes:
    """`content` with a digest after its head, whose offset to the rest grows by as much."""
    root, kind = HEAD.unpack_from(content)
    return HEAD.pack(root + DIGEST.size, kind) + DIGEST.pack(MAGIC, VERSION, zlib.crc32(content)) + content[HEAD.size :]


def _content(data: bytes, path: str | os.PathLike[str]) -> bytes:
    """The model in a file, without its digest. Raises InputError where the two differ."""
    begin = HEAD.size + DIGEST.size
    if len(data) < begin or data[HEAD.size :][: len(MAGIC)] != MAGIC:
        raise InputError(f"{path} is not a LiteRT file of dl_jax; export the model with dl_jax.export.litert")
    (root, kind), (_, version, digest) = HEAD.unpack_from(data), DIGEST.unpack_from(data, HEAD.size)
    if version != VERSION:
        raise InputError(f"{path} has layout {version}, expected {VERSION}; export the model again")
    content = HEAD.pack(max(root - DIGEST.size, 0), kind) + data[begin:]
    if zlib.crc32(content) != digest:
        raise InputError(f"{path} is damaged: its checksum does not match; copy it again or export the model again")
    return content


def _missing(package: str) -> InputError:
    return InputError(f"LiteRT needs {package}, which is not installed; run: {COMMANDS[package]}")
