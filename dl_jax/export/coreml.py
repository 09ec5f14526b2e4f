"""Core ML packages (`.mlpackage`, for iOS 18, macOS 15 and newer), in float32. `pip install -e '.[coreml]'`.

They are converted on any system, but only a Mac can run them. So a package is not compared with JAX here: what is
checked is its specification. Run it on a Mac, by `coremltools.models.MLModel(path).predict({"input_0": x})`, before it
is used. A package is for one batch size.

Rounded activations are written as the operations that they consist of, and dequantised weights as float32.

A digest, the CRC-32 of the program and of its weights, is an entry `dl_jax.crc32` of the package's metadata.
"""

import collections
import contextlib
import importlib.util
import io
import itertools
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jax.interpreters import mlir

from dl_jax.core.errors import InputError, reason
from dl_jax.export import Input, read
from dl_jax.export.plain import plain
from dl_jax.export.traced import baked, signature

PROGRAM, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
KEY = b"dl_jax.crc32"
CRC_DIGITS = 8
TYPES = {65568: "float32", 65552: "float16", 65600: "float64", 131104: "int32"}  # Core ML's number -> NumPy's name


class Specification(NamedTuple):
    """What a package says of itself."""

    inputs: Mapping[str, Input]
    outputs: Mapping[str, Input]
    operations: Mapping[str, int]  # how often each occurs, also in loops
    bytes: int  # of the program and the weights


def export(
    apply: Callable[..., Any],
    variables: Any,
    inputs: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    batch: int = 1,
) -> Specification:
    """Writes `apply(variables, *inputs)` for batches of `batch` rows to the package `path`.

    Its inputs are called input_0, input_1, ..., its outputs output_0, ... The shapes and types of both have to be those
    of the function; floats are float32, everything else int32.

    Args:
      apply: a pure function that returns arrays, or a tree of them.
      variables: the first argument of `apply`. They become constants of the package.
      inputs: example arrays [B, ...], one for each further argument of `apply`.
      path: the folder to write, with a name that ends in .mlpackage. It is replaced if it is a package.
      batch: the only batch size that the package will take.

    Raises InputError where an operation cannot be converted or the specification is not that of the function, in which
    case nothing is written, where the examples do not share a batch axis, where packages are missing, and where the
    folder cannot be written.
    """
    require()
    path = Path(path)
    if path.suffix != ".mlpackage" or (path.exists() and not (path / PROGRAM).is_file()):
        raise InputError(f"cannot write {path}: expected the name of a new folder or package that ends in .mlpackage")
    function, shapes = baked(apply, variables), signature(inputs, batch)
    flat = plain(function, shapes)
    expected = [_described(each) for each in shapes], [_described(each) for each in jax.eval_shape(flat, *shapes)]
    with _quiet():
        try:
            model = _converted(flat, shapes)
        except Exception as e:  # the converter has no class of its own for errors
            raise InputError(
                f"the converter to Core ML says: {reason(e)}: {path} is not written; export the model to ONNX or "
                "StableHLO"
            ) from e
        found = _specification(model.get_spec(), 0)
        if (list(found.inputs.values()), list(found.outputs.values())) != expected:
            raise InputError(
                f"the Core ML program takes {_listed(found.inputs.values())} and gives "
                f"{_listed(found.outputs.values())}, expected {_listed(expected[0])} and {_listed(expected[1])}: "
                f"{path} is not written; give inputs and outputs these types"
            )
        _write(model, path)
    return specification(path)


def specification(path: str | os.PathLike[str]) -> Specification:
    """What the package `path` says of itself.

    Raises InputError where it cannot be read, is damaged, or was not written by `export`, and where a package is
    missing.
    """
    require()
    program, weights = (read(Path(path, name)) for name in (PROGRAM, WEIGHTS))
    begin = len(_entry(b"", b""))
    if program[: begin - CRC_DIGITS] != _entry(b"", b"")[:-CRC_DIGITS]:
        raise InputError(f"{path} is not a Core ML package of dl_jax; export the model with dl_jax.export.coreml")
    if program[:begin] != _entry(program[begin:], weights):
        raise InputError(f"{path} is damaged: its checksum does not match; copy it again or export the model again")
    with _quiet():
        from coremltools.proto import Model_pb2  # pyright: ignore[reportMissingImports]
    message: Any = Model_pb2.Model  # made when it is imported: nothing is known of its methods before
    return _specification(message.FromString(program), len(program) + len(weights))


def require() -> None:
    """Raises InputError where a package that writes Core ML packages is missing: to ask before a long training."""
    for name in ("coremltools", "stablehlo_coreml"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"Core ML needs {name}, which is not installed; run: pip install -e '.[coreml]'")


def _converted(function: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct]) -> Any:
    import coremltools  # pyright: ignore[reportMissingImports]
    from stablehlo_coreml import build_pass_pipeline, convert  # pyright: ignore[reportMissingImports]

    target = coremltools.target.iOS18
    exported = jax.export.export(jax.jit(function, keep_unused=True), platforms=("cpu",))(*shapes)
    # The program as it is exported leaves out what is a default, as the converter wants it.
    module = mlir.ir.Module.parse(exported.mlir_module(), mlir.make_ir_context())
    model: Any = coremltools.convert(  # of the source "milinternal" it is an MLModel
        convert(module, minimum_deployment_target=target),
        source="milinternal",
        minimum_deployment_target=target,
        pass_pipeline=build_pass_pipeline(),
        compute_precision=coremltools.precision.FLOAT32,  # what float16 loses could not be measured here
        skip_model_load=True,
    )
    spec = model.get_spec()
    for kind, features in (("input", spec.description.input), ("output", spec.description.output)):
        for i, name in enumerate([each.name for each in features]):
            coremltools.utils.rename_feature(spec, name, f"{kind}_{i}")
    return coremltools.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)


def _write(model: Any, path: Path) -> None:
    """Writes a package with its digest, in the place of one that may be there."""
    new, old = (path.with_name(f"{path.stem}.{os.getpid()}.{part}.mlpackage") for part in ("partial", "old"))
    try:
        try:
            model.save(str(new))
            program = (new / PROGRAM).read_bytes()
            weights = (new / WEIGHTS).read_bytes()
            (new / PROGRAM).write_bytes(_entry(program, weights) + program)
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise InputError(f"cannot write {path} ({reason(e)}); name a folder within one that you may write to") from e


def _specification(spec: Any, size: int) -> Specification:
    def features(every: Any) -> dict[str, Input]:
        kinds = {each.name: each.type.multiArrayType for each in every}
        return {name: Input(tuple(kind.shape), TYPES.get(kind.dataType, "?")) for name, kind in kinds.items()}

    blocks = [block for f in spec.mlProgram.functions.values() for block in f.block_specializations.values()]
    operations = collections.Counter(itertools.chain.from_iterable(map(_operations, blocks)))
    return Specification(features(spec.description.input), features(spec.description.output), operations, size)


def _operations(block: Any) -> Iterator[str]:
    for operation in block.operations:
        yield operation.type
        for inner in operation.blocks:
            yield from _operations(inner)


def _described(array: Any) -> Input:
    return Input(array.shape, "float32" if np.issubdtype(array.dtype, np.floating) else "int32")


def _listed(every: Any) -> str:
    return ", ".join(map(str, every))


def _entry(program: bytes, weights: bytes) -> bytes:
    """The protobuf entry Model.description.metadata.userDefined[KEY] with a digest, as ONNX files begin with one.

    The parts of a protobuf message that occur twice are merged, so that a program is one with the entry before it.
    """
    digest = f"{zlib.crc32(weights, zlib.crc32(program)):0{CRC_DIGITS}x}".encode()
    pair = _field(1, KEY) + _field(2, digest)
    return _field(2, _field(100, _field(100, pair)))


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of fewer than 128 bytes, with a number below 2048."""
    tag = number << 3 | 2
    return (bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])) + bytes([len(content)]) + content


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps coremltools from showing its progress, and from warnings: it cannot run models here, and left a folder."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        logging.disable(before)
