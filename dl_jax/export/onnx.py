"""ONNX files for ONNX Runtime: float, and quantised to int8. `pip install -e '.[export]'`.

A file begins with an entry `dl_jax.crc32` of the model's metadata, the CRC-32 of the bytes after it, because ONNX
Runtime does not detect a flipped bit in a weight. Files without such an entry, of older versions or other programs, are
opened as they are.
"""

import contextlib
import importlib.util
import logging
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dl_jax.core import cores
from dl_jax.core.errors import InputError, not_installed
from dl_jax.export import Input, check, read, write

TYPES = {  # ONNX Runtime's name -> numpy's
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
FIRST_OPSET, OPSET = 13, 23  # DequantizeLinear has a scale per channel since 13; 23 is the default of jax2onnx
KEY = b"dl_jax.crc32"
CRC_DIGITS = 8


def export(
    apply: Callable[..., Any],
    variables: Any,
    inputs: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    batch: int | None = None,
    tolerance: float = 1e-5,
) -> float:
    """Writes `apply(variables, *inputs)` to the ONNX file `path`, and returns how far it differs.

    Writes the file only if ONNX Runtime's output matches that of `apply` at the highest precision (`difference`).

    Activations and weights that `compress.grid` rounds to 8 bits are written with the same scales and zero points, as
    nodes QuantizeLinear and DequantizeLinear: weights are stored as int8, and a runtime computes a layer in integers
    where both its inputs and its output are rounded. An output may then differ from that of `apply` by some steps of
    the rounding, for which `tolerance` has to allow. x86 CPUs without VNNI saturate sums of two products of weights
    that use all 8 bits, and may then differ by much more, also where this machine does not: round weights to 7 bits.

    Args:
      apply: a pure function that returns one array or a tuple of them. It is traced with a batch of unknown size, so it
        has to use `x.shape[0]`, not `len(x)`.
      variables: the first argument of `apply`. They become constants of the file.
      inputs: example arrays [B, ...] with different values, one for each further argument of `apply`.
      path: the file to write. It is replaced if it exists.
      opset: the version of ONNX's operators, for a runtime that knows no newer ones.
      batch: the only batch size that the file takes; by default it takes any.
      tolerance: largest allowed absolute difference, relative where outputs exceed 1.

    The first export of a process takes some seconds more, because jax2onnx is slow to
    import. Raises InputError where the difference exceeds `tolerance`, in which case nothing is written, where the
    examples do not share a batch axis, where `opset` is not one of those that can be written, where packages are
    missing, and where the file cannot be written.
    """
    if not FIRST_OPSET <= opset <= OPSET:
        raise InputError(f"opset is {opset}, expected {FIRST_OPSET} to {OPSET}; take the newest that the runtime knows")
    import jax
    import jax.numpy as jnp

    from dl_jax.export import nodes
    from dl_jax.export.plain import plain
    from dl_jax.export.traced import baked, difference, require_same, signature

    try:
        import jax2onnx

        nodes.register()
    except ImportError as e:
        raise not_installed("ONNX", e, "export") from e

    function, shapes = baked(apply, variables), signature(inputs, batch)
    with _quiet(), _restored(jnp):
        model = jax2onnx.to_onnx(plain(function, shapes, nodes.FORMS), shapes, opset=opset)
    data = nodes.with_biases(model).SerializeToString()
    predict = _predictor(*_written(data, path))
    with jax.default_matmul_precision("highest"):
        error = difference(predict, apply, variables, inputs, shapes)
    require_same(error, tolerance, "ONNX Runtime", path)
    write(path, _entry(data) + data)
    return error


def require() -> None:
    """Raises InputError where a package that writes or runs ONNX files is missing: to ask before a long training."""
    for name in ("jax2onnx", "onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise not_installed("ONNX", ImportError(name=name), "export")


def load(path: str | os.PathLike[str], threads: int | None = None) -> Callable[..., Any]:
    """The function in the ONNX file `path`, on the CPU: NumPy arrays [B, ...] -> one array, or a tuple of them.

    It computes in as many `threads`, by default one for each core that the process may use. They sleep between calls,
    and to wake them takes some 0.1 ms: one thread is the fastest for small networks that are called with few rows.

    Raises InputError where the file cannot be read, is damaged or is not an ONNX model, where `threads` is below 1, and
    where ONNX Runtime is missing. The function raises it for inputs of other shapes or types.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected at least 1")
    return opened(read(path), path, threads)


def opened(data: bytes, path: str | os.PathLike[str], threads: int | None = None) -> Callable[..., Any]:
    """As `load`, of a file that was read already; `path` is what messages call it."""
    return _predictor(*_opened(path, _content(data, path), threads))


def quantized(
    path: str | os.PathLike[str], batches: Iterable[Sequence[np.ndarray]], out: str | os.PathLike[str]
) -> None:
    """Writes the float ONNX file `path` with its convolutions and dense layers in int8 to the file `out`.

    Their weights are symmetric and scaled per output channel; their inputs and outputs are unsigned and scaled per
    tensor to the range that they take on `batches`. Everything else stays in float, also the kernels of a recurrent
    layer, which are used inside a loop. The conversions around int8 operations are fused by the runtime where it can
    (the QDQ format). Weights use 7 of their 8 bits, so that x86 CPUs without VNNI compute the same as others.

    Args:
      path: a model as `export` writes it.
      batches: calibration data, the inputs of one call each; some hundred training examples in all.
      out: the file to write. It is replaced if it exists, and may be `path`.

    Raises InputError where there are no batches, they do not fit the model or are not finite, where `path` is damaged
    or not an ONNX model, where a package is missing, where fewer than half of the weights of convolutions and dense
    layers became int8 (nothing is written then), and where `out` cannot be written.
    """
    content = _content(read(path), path)
    _, expected = _opened(path, content)
    feeds = [_named(expected, batch) for batch in batches]
    if not feeds:
        raise InputError(
            "the calibration set is empty, expected at least one batch; give some hundred training examples"
        )
    for i, (name, array) in ((i, each) for i, feed in enumerate(feeds) for each in feed.items()):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(
                f"input {name} of batch {i} of the calibration set has NaN or infinite values, expected finite "
                "numbers, which have a range; leave these examples out"
            )
    try:
        import onnx
        import onnx.inliner
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as e:
        raise not_installed("ONNX", e, "export") from e

    class Feeds(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            return feeds.pop(0) if feeds else None

    source = onnx.load_from_string(content)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        floats, prepared, small = (Path(folder, f"{name}.onnx") for name in ("floats", "prepared", "quantized"))
        floats.write_bytes(content)
        # Folds constants, and a bias into the product before it.
        quant_pre_process(floats, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            _with_flat_biases(onnx.load(prepared)),
            small,
            Feeds(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Relu"],  # a runtime fuses the last with the one before
            per_channel=True,
            reduce_range=True,  # 7 bits of a weight: with 8, CPUs without VNNI saturate sums of two products
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        data = small.read_bytes()
    _session(data)  # what does not open is not written
    kinds, int8 = onnx.TensorProto, [onnx.TensorProto.INT8]
    floats = [kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE]
    weights = sum(_weights(onnx.inliner.inline_local_functions(source).graph, floats, {}).values())
    integers = _count(onnx.load_from_string(data), int8) - _count(source, int8)
    if not integers or 2 * integers < weights:
        raise InputError(
            f"{integers} of {weights} weights in {path} became int8, expected half of them or more: {out} is not "
            "written; only convolutions and dense layers on [B, D], outside of loops, are quantised, so keep the float "
            "file, or round the weights of other layers by compress.quantize"
        )
    write(out, _entry(data) + data)


PRODUCT_NODES = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")
REARRANGING_NODES = (
    "Cast",
    "Identity",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)  # what a weight may pass on its way there


def _weights(graph: Any, types: Collection[int], outside: Mapping[str, Any]) -> dict[str, int]:
    """How many numbers each tensor of these of ONNX's types holds that a product takes, in loops too, by name.

    A table that is looked up or added is no weight. `outside` are the tensors that the graph around this one knows.
    """
    tensors = {**outside, **{tensor.name: (tensor.name, tensor) for tensor in graph.initializer}}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Constant":
            tensors |= {name: (name, attribute.t) for name in node.output for attribute in node.attribute}
        if node.op_type in REARRANGING_NODES and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
        if node.op_type in PRODUCT_NODES:
            known = (tensors[name] for name in node.input[:2] if name in tensors)
            found |= {name: math.prod(tensor.dims) for name, tensor in known if tensor.data_type in types}
        for body in (attribute.g for attribute in node.attribute if attribute.HasField("g")):  # of a loop or branch
            pairs = zip(body.input, node.input, strict=False)  # a branch has no inputs
            given = {inner.name: tensors[name] for inner, name in pairs if name in tensors}
            found |= _weights(body, types, {**tensors, **given})
    return found


def _count(model: Any, types: Collection[int]) -> int:
    """The number of elements in a model's initialisers and constants of these types."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    tensors = [*model.graph.initializer, *_constants(nodes)]
    return sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type in types)


def _constants(nodes: Iterable[Any]) -> Iterator[Any]:
    """The tensors within nodes of a graph, those in the bodies of loops too."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield from graph.initializer
            yield from _constants(graph.node)


def _with_flat_biases(model: Any) -> Any:
    """[1, N] -> [N], as the quantiser wants them."""
    biases = {node.input[2] for node in model.graph.node if node.op_type == "Gemm" and len(node.input) > 2}
    for tensor in model.graph.initializer:
        if tensor.name in biases:
            del tensor.dims[:-1]
    del model.graph.value_info[:]  # the shapes as they were; the quantiser infers them again
    return model


def _session(data: bytes, threads: int | None = None) -> tuple[Any, dict[str, Input]]:
    """ONNX Runtime's session of a model, on the CPU, and what the model takes by name."""
    try:
        import onnxruntime
    except ImportError as e:
        raise not_installed("ONNX", e, "export") from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # By default there are as many threads as the machine has cores, also where the process may use fewer.
    options.intra_op_num_threads = threads or cores.usable()
    # Threads that sleep between calls: spinning, they would slow down whatever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    expected = {
        each.name: Input(
            tuple(size if isinstance(size, int) else None for size in each.shape),
            TYPES.get(str(each.type), str(each.type)),
        )
        for each in session.get_inputs()
    }
    return session, expected


def _written(data: bytes, path: str | os.PathLike[str]) -> tuple[Any, dict[str, Input]]:
    try:
        return _session(data)
    except InputError:
        raise
    except Exception as e:
        reason = " ".join(str(e).split())
        raise InputError(
            f"ONNX Runtime cannot run the exported network ({reason}): {path} is not written; where it has no "
            "operation for a type such as bfloat16, export a network that computes in float32"
        ) from e


def _opened(path: str | os.PathLike[str], content: bytes, threads: int | None = None) -> tuple[Any, dict[str, Input]]:
    try:
        return _session(content, threads)
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{path} is not an ONNX model that ONNX Runtime can open; export the model again") from e


def _content(data: bytes, path: str | os.PathLike[str]) -> bytes:
    """The content of a file, without the entry of its digest. Raises InputError where the two differ."""
    content = data[len(_entry(b"")) :]
    if data == _entry(content) + content:
        return content
    if data.startswith(_entry(b"")[:-CRC_DIGITS]):
        raise InputError(f"{path} is damaged: its checksum does not match; copy it again or export the model again")
    return data  # of another program, which may have kept our entry somewhere else


def _entry(content: bytes) -> bytes:
    """A protobuf entry `metadata_props` of ONNX's ModelProto, field 14: `KEY` and the digest of `content`.

    The fields of a protobuf message may stand in any order, so that a model is one with the entry before it.
    """
    pair = _field(1, KEY) + _field(2, f"{zlib.crc32(content):0{CRC_DIGITS}x}".encode())
    return _field(14, pair)


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


def _predictor(session: Any, expected: Mapping[str, Input]) -> Callable[..., Any]:
    def predict(*inputs: Any) -> Any:
        outputs = session.run(None, _named(expected, inputs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return predict


def _named(expected: Mapping[str, Input], inputs: Sequence[Any]) -> dict[str, np.ndarray]:
    check(list(expected.values()), inputs)
    return dict(zip(expected, map(np.asarray, inputs), strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps packages from printing through a root logger that has no handler yet, and onnx_ir's warnings to itself."""
    root, handler, chatty = logging.getLogger(), logging.NullHandler(), logging.getLogger("onnx_ir")
    level = chatty.level
    root.addHandler(handler)
    chatty.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.removeHandler(handler)
        chatty.setLevel(level)


@contextlib.contextmanager
def _restored(module: ModuleType) -> Iterator[None]:
    """Undoes what happens to the module's names: jax2onnx leaves behind a `jnp.cumsum` that takes no axis by place."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)
