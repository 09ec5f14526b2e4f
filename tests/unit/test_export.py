"""Exported files are opened again and compared; damaged ones and wrong inputs give one clear error."""

import dataclasses
import errno
import functools
import itertools
import logging
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dl_jax.compress import codec
from dl_jax.core.errors import InputError
from dl_jax.export import onnx, plain, stablehlo
from dl_jax.models.generative import vae
from dl_jax.models.sequence import rnn
from dl_jax.models.vision import lenet

GOLDEN = Path(__file__).parent / "golden" / "exports-v1"


class Case(NamedTuple):
    apply: Callable[..., jax.Array]
    variables: Any
    inputs: tuple[np.ndarray, ...]

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        return np.asarray(jax.jit(self.apply)(self.variables, *inputs))

    def batch(self, size: int) -> tuple[np.ndarray, ...]:
        """Rows of the examples in another order."""
        rows = np.random.default_rng(size).integers(0, len(self.inputs[0]), size)
        return tuple(each[rows] for each in self.inputs)


def drawn(model: Any, inputs: dict[str, Any]) -> Any:
    """Variables from NumPy: to compile an initialisation would take longer than the export."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: (rng.normal(size=leaf.shape) / np.sqrt(max(10, leaf.size // leaf.shape[-1]))).astype(np.float32)
    return jax.tree.map(draw, jax.eval_shape(lambda key: model.init(key, **inputs, train=False), jax.random.key(0)))


def classifier(name: str, examples: dict[str, Any]) -> Case:
    model, inputs = examples[name]
    variables = drawn(model, inputs)
    return Case(lambda variables, *x: model.apply(variables, *x, train=False), variables, tuple(inputs.values()))


def decoder(name: str) -> Case:
    model, inputs = vae.examples()[name]
    variables = drawn(model, inputs)
    z = np.random.default_rng(1).standard_normal((3, model.latents), np.float32)
    return Case(lambda variables, z: model.apply(variables, z, method="decode"), variables, (z,))


def affine(variables: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ variables["kernel"] + variables["bias"])


CASES: dict[str, Callable[[], Case]] = {
    "LeNet5": lambda: classifier("LeNet5", lenet.examples()),
    "LeNetCaffe": lambda: classifier("LeNetCaffe", lenet.examples()),
    "LeNet300": lambda: classifier("LeNet300", lenet.examples()),
    "LSTM classifier": lambda: classifier("SequenceClassifier", rnn.examples()),
    "ConvVAE decoder": lambda: decoder("ConvVAE"),
}


class Exported(NamedTuple):
    case: Case
    file: Path  # ONNX
    difference: float

    def kinds(self) -> list[str]:
        """The operators of all nodes of an ONNX graph."""
        import onnx as format

        return [node.op_type for node in format.load(self.file).graph.node]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], Exported]:
    """Name -> the case as an ONNX file, written once."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def export(name: str) -> Exported:
        case, file = CASES[name](), folder / f"{name}.onnx"
        return Exported(case, file, onnx.export(*case, file))

    return export


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory) -> tuple[Case, Path]:
    """LeNetCaffe as StableHLO."""
    case, file = CASES["LeNetCaffe"](), tmp_path_factory.mktemp("convolutional") / "model"
    stablehlo.export(*case, file)
    return case, file


@pytest.fixture(scope="module")
def small() -> Case:
    draw = np.random.default_rng(2).standard_normal
    return Case(affine, {"kernel": draw((4, 5), np.float32), "bias": draw(5, np.float32)}, (draw((3, 4), np.float32),))


@pytest.fixture(scope="module")
def hlo(small, tmp_path_factory) -> Path:
    """`small` as StableHLO."""
    file = tmp_path_factory.mktemp("small") / "small.stablehlo"
    stablehlo.export(*small, file)
    return file


@pytest.fixture(scope="module")
def ort(small, tmp_path_factory) -> Path:
    """`small` as ONNX."""
    file = tmp_path_factory.mktemp("small") / "small.onnx"
    onnx.export(*small, file)
    return file


def test_a_file_has_no_array_that_nothing_reads(ort):
    """ONNX Runtime warns of one whenever it opens the file."""
    import onnx as format

    graph = format.load(ort).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}


OPEN_AND_CALL = """
import sys
import numpy as np
from dl_jax.export import stablehlo
for file in sys.argv[1:]:
    inputs = np.load(f"{file}.npz")
    np.save(f"{file}.npy", stablehlo.load(file)(*[inputs[name] for name in inputs.files]))
assert not {"flax", "dl_jax.models"} & set(sys.modules)
"""


def test_stablehlo_gives_the_same_bits_in_another_process(convolutional, tmp_path):
    recurrent, found = CASES["LSTM classifier"](), {}
    stablehlo.export(*recurrent, tmp_path / "model")
    for case, file in (convolutional, (recurrent, tmp_path / "model")):
        inputs = case.batch(7)
        np.savez(f"{file}.npz", *inputs)
        found[file] = np.asarray(stablehlo.load(file)(*inputs))
        expected = case.reference(*inputs)
        np.testing.assert_allclose(found[file], expected, atol=1e-6 * max(1, np.abs(expected).max()), rtol=0)
    subprocess.run([sys.executable, "-c", OPEN_AND_CALL, *map(str, found)], check=True, timeout=300)
    for file, expected in found.items():
        np.testing.assert_array_equal(np.load(f"{file}.npy"), expected, strict=True)


@pytest.mark.parametrize("load", [stablehlo.load, onnx.load])
def test_files_that_were_written_before_modules_moved_predict_as_before(load):
    """y = relu(x W + b) of W = [[0, 1, 2], [3, 4, 5]] / 4 and b = [1, -1, 0.5]."""
    predict = load(GOLDEN / f"dense.{load.__module__.rpartition('.')[2]}")
    x = np.float32([[1, 2], [3, -4], [0, 0]])
    np.testing.assert_array_equal(predict(x), [[2.5, 1.25, 3.5], [0, 0, 0], [1, 0, 0.5]])


def test_a_compressed_model_of_before_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^compressed model of version 1, expected 2; .*encode the network again$"):
        codec.decode((GOLDEN / "dense.dlj").read_bytes())


def test_stablehlo_takes_any_batch_and_can_be_part_of_a_program(small, hlo):
    predict = stablehlo.load(hlo)
    for size in (1, 2, 33):
        (x,) = small.batch(size)
        np.testing.assert_array_equal(predict(x), small.reference(x))
    (x,) = small.batch(6)
    np.testing.assert_allclose(jax.jit(lambda x: predict(2 * x).sum(-1))(x), small.reference(2 * x).sum(-1), rtol=1e-6)


def test_stablehlo_is_for_three_platforms_with_a_plain_convolution_beside_the_one_for_cpus(convolutional):
    _, file = convolutional
    exported = jax.export.deserialize(bytearray(file.read_bytes()[stablehlo.HEADER.size :]))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    convolutions = re.findall(r"= stablehlo.convolution\(.*: \((tensor\S+), ", exported.mlir_module())
    assert set(convolutions) == {"tensor<?x28x28x1xf32>", "tensor<?x12x12x20xf32>"}


def test_stablehlo_does_not_name_the_files_of_the_program(tmp_path):
    stablehlo.export(lambda params, x: jax.jit(jnp.sin)(x) + params, 1.0, [np.ones((2, 3))], tmp_path / "f")
    assert b".py" not in (tmp_path / "f").read_bytes()


def test_stablehlo_keeps_trees_of_results(tmp_path):
    file = tmp_path / "model"
    stablehlo.export(lambda v, x: {"sum": x.sum(-1), "pair": (x + v, x)}, 1.0, (np.ones((2, 3), np.float32),), file)
    found = stablehlo.load(file)(np.ones((4, 3), np.float32))
    np.testing.assert_array_equal(found["sum"], np.full(4, 3))
    np.testing.assert_array_equal(found["pair"][0], np.full((4, 3), 2))


def test_every_damage_of_a_stablehlo_file_is_noticed(hlo, tmp_path):
    whole, file = hlo.read_bytes(), tmp_path / "damaged"
    rng = np.random.default_rng(1)
    damaged = [whole[:size] for size in (0, 1, 8, 15, 16, 17, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"\0", bytes(len(whole)), rng.bytes(len(whole))]
    for place in [*range(stablehlo.HEADER.size), *rng.integers(0, len(whole), 300)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"is damaged|is not a StableHLO file|has layout \d+, expected 1") as e:
            stablehlo.load(file)
        assert "\n" not in str(e.value)


def test_what_this_jax_cannot_read_is_one_error(hlo, tmp_path):
    exported = jax.export.deserialize(bytearray(hlo.read_bytes()[stablehlo.HEADER.size :]))
    later = dataclasses.replace(exported, mlir_module_serialized=b"with operations that are not known yet")
    for data in (b"another layout", bytes(later.serialize())):
        header = stablehlo.HEADER.pack(stablehlo.MAGIC, stablehlo.VERSION, zlib.crc32(data))
        (tmp_path / "model").write_bytes(header + data)
        with pytest.raises(InputError, match=f"cannot be read by JAX {jax.__version__}; use the JAX that wrote it"):
            stablehlo.load(tmp_path / "model")


@pytest.mark.parametrize("load", [stablehlo.load, onnx.load])
def test_a_missing_file_is_named(load, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*model \(No such file or directory\); export"):
        load(tmp_path / "model")


@pytest.mark.parametrize("export", [stablehlo.export, onnx.export])
def test_a_file_is_written_whole_or_not_at_all(export, small, tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*nowhere.*No such file"):
        export(*small, tmp_path / "nowhere" / "model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder.*directory"):
        export(*small, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_disk_that_fills_up_leaves_the_file_before(small, tmp_path, monkeypatch):
    file, write = tmp_path / "model", Path.write_bytes
    file.write_bytes(b"the one before")

    def half(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(InputError, match=r"cannot write .*model \(No space left on device\); name a file"):
        stablehlo.export(*small, file)
    assert file.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([np.ones((2, 5), np.float32)], r"input 0 is float32\[2, 5\], expected float32\[batch, 4\]"),
        ([np.ones(4, np.float32)], r"input 0 is float32\[4\], expected float32\[batch, 4\]"),
        ([np.ones((0, 4), np.float32)], r"input 0 is float32\[0, 4\], expected float32\[batch, 4\]"),
        ([np.ones((2, 4))], r"input 0 is float64\[2, 4\], expected float32\[batch, 4\]; reshape or convert it"),
        ([[[1.0, 2.0, 3.0, 4.0]]], r"input 0 is list\[1, 4\], expected float32\[batch, 4\]"),
        ([], r"0 inputs, expected 1: float32\[batch, 4\]"),
    ],
)
def test_wrong_inputs_are_one_error_in_both_formats(inputs, message, hlo, ort):
    for predict in (stablehlo.load(hlo), onnx.load(ort)):
        with pytest.raises(InputError, match=message):
            predict(*inputs)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_onnx_computes_in_as_many_threads_as_are_asked_for(ort):
    threads = lambda: len(os.listdir("/proc/self/task"))
    before = threads()
    one = onnx.load(ort, threads=1)
    assert threads() == before
    three = onnx.load(ort, threads=3)
    assert threads() == before + 2  # the caller's thread is one of the three
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(one(x), three(x), rtol=1e-6)
    with pytest.raises(InputError, match="threads is 0, expected at least 1"):
        onnx.load(ort, threads=0)


def test_inputs_of_two_batch_sizes(tmp_path):
    x = np.ones((2, 3), np.float32)
    stablehlo.export(lambda _, x, y: x + y, None, (x, x), tmp_path / "model")
    with pytest.raises(InputError, match=r"inputs with batches of [25] and [25], expected one size"):
        stablehlo.load(tmp_path / "model")(x, np.ones((5, 3), np.float32))


@pytest.mark.parametrize("inputs", [(), (np.float32(1),), (np.ones((0, 3)),), (np.ones((2, 3)), np.ones((3, 3)))])
def test_examples_share_a_batch(inputs, small, tmp_path):
    for export in (stablehlo.export, onnx.export):
        with pytest.raises(InputError, match="expected arrays with the same batch as their first axis"):
            export(affine, small.variables, inputs, tmp_path / "model")


@pytest.mark.parametrize("name", CASES)
def test_onnx_computes_the_same(name, exported):
    case, file, difference = exported(name)
    assert 0 <= difference <= 1e-5
    predict = onnx.load(file)
    for size in (1, 5) if name == "LeNet300" else (5,):
        inputs = case.batch(size)
        found, expected = predict(*inputs), case.reference(*inputs)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["LeNet5", "LeNetCaffe"])
def test_onnx_has_real_convolutions(name, exported):
    kinds = exported(name).kinds()
    assert kinds.count("Conv") == 2
    assert kinds.count("Gemm") == 2  # the dense layers with their biases
    assert "MatMul" not in kinds  # banded products would be two
    assert "If" not in kinds


def test_onnx_has_relu_and_transposed_convolutions(exported):
    assert exported("LeNet300").kinds().count("Relu") == 2
    assert exported("LeNetCaffe").kinds().count("MaxPool") == 2
    assert exported("ConvVAE decoder").kinds().count("ConvTranspose") == 2
    assert exported("LSTM classifier").kinds().count("Loop") == 2  # both directions, not unrolled


def test_examples_have_the_types_that_jax_gives_them(tmp_path):
    def apply(table, tokens):
        return table[tokens].sum(1)

    table, tokens = np.arange(5, dtype=np.float64), np.array([[0, 4, 1], [2, 2, 3]])  # float64, int64
    for format in (stablehlo, onnx):
        format.export(apply, table, (tokens,), tmp_path / "model")
        predict = format.load(tmp_path / "model")
        np.testing.assert_array_equal(predict(tokens.astype(np.int32)), np.array([5, 7], np.float32), strict=True)
        with pytest.raises(InputError, match=r"input 0 is int64\[2, 3\], expected int32\[batch, 3\]"):
            predict(tokens)


def test_onnx_gives_several_results(tmp_path):
    x = np.ones((2, 3), np.float32)
    onnx.export(lambda v, x: (x + v, jnp.maximum(x, 0).sum(-1)), 1.0, (x,), tmp_path / "model.onnx")
    first, second = onnx.load(tmp_path / "model.onnx")(-x)
    np.testing.assert_array_equal(first, np.zeros((2, 3)))
    np.testing.assert_array_equal(second, np.zeros(2))


@pytest.mark.parametrize(
    "apply",
    [
        lambda _, x: lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: x + 1e-4),  # ONNX gets the default
        lambda _, x: jnp.log(-jnp.abs(x)),  # not a number
    ],
)
def test_onnx_that_differs_is_refused(apply, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_text("the one before")
    with pytest.raises(InputError, match=r"ONNX Runtime differs from JAX by (1\.0e-04|inf), expected at most 1e-05"):
        onnx.export(apply, None, (np.linspace(0.5, 1, 6, dtype=np.float32).reshape(2, 3),), file)
    assert file.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [file]


def test_what_onnx_runtime_cannot_run_is_one_line_and_not_written(tmp_path):
    kernel = jnp.ones((3, 2), jnp.bfloat16)
    with pytest.raises(InputError, match=r"ONNX Runtime cannot run the exported network \([^\n]*\): .* is not written"):
        onnx.export(lambda w, x: (x.astype(jnp.bfloat16) @ w).astype(jnp.float32), kernel,
                    [np.ones((2, 3), np.float32)], tmp_path / "net.onnx")  # fmt: skip
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "apply",
    [
        lambda v, x: x.reshape(len(x), -1) @ v,
        lambda v, x: jax.jit(lambda x: x.reshape(int(x.shape[0]), -1))(x) @ v,
        lambda v, x: jnp.stack([row.ravel() for row in x]) @ v,
        lambda v, x: x.reshape(-1, 6) @ v + (0 if x.shape[0] > 1 else 1),
    ],
    ids=["len", "int", "loop", "branch"],
)
def test_a_batch_that_the_function_makes_a_number_is_one_clear_line(apply, tmp_path):
    weights, x = np.ones((6, 2), np.float32), np.linspace(0, 1, 18, dtype=np.float32).reshape(3, 2, 3)
    for export in (onnx.export, stablehlo.export):
        with pytest.raises(InputError, match=r"^the function needs the number of rows in a batch, .*; write x.shape"):
            export(apply, weights, (x,), tmp_path / "model")
    assert not list(tmp_path.iterdir())
    onnx.export(apply, weights, (x,), tmp_path / "model", batch=3)


def test_an_error_for_any_batch_is_the_functions_own(tmp_path):
    x = np.ones((3, 2, 3), np.float32)
    with pytest.raises(TypeError, match="dot_general requires"):
        stablehlo.export(lambda v, x: x.reshape(x.shape[0], -1) @ v, np.ones((5, 2)), (x,), tmp_path / "model")


def test_stablehlo_of_a_function_that_is_not_pure_is_not_written(tmp_path):
    calls = itertools.count()  # another number at every trace
    with pytest.raises(InputError, match=r"StableHLO file differs from JAX by \d\.\de-0\d, expected at most 1e-05"):
        stablehlo.export(lambda _, x: x + 0.1 * next(calls), None, (np.ones((2, 3), np.float32),), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_tolerance_is_the_callers(small, tmp_path):
    def apply(variables, x):
        return lax.platform_dependent(x, cpu=lambda x: 200 * x, default=lambda x: 200 * x + 0.1)

    x = np.array([[1.0], [-1.0]], np.float32)
    difference = onnx.export(apply, None, (x,), tmp_path / "model.onnx", tolerance=1e-3)
    assert difference == pytest.approx(0.1 / 200, rel=1e-3)  # relative to the largest output


def prediction(file: Path, x: np.ndarray) -> np.ndarray | str:
    """What the model in an ONNX file predicts, or the message where it is refused."""
    try:
        return onnx.load(file)(x)
    except InputError as e:
        return str(e)


def test_every_damage_of_an_onnx_file_is_noticed(small, ort, tmp_path):
    """ONNX Runtime opens most of these files. Damage to the name of the digest leaves the model as it is."""
    whole, file = ort.read_bytes(), tmp_path / "damaged.onnx"
    begin = whole.index(onnx.KEY) + len(onnx.KEY)
    (x,) = small.batch(4)
    expected, rng = onnx.load(ort)(x), np.random.default_rng(1)
    damaged = [whole[:size] for size in (0, 5, begin, begin + 10, begin + 11, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"\0", whole + onnx._field(14, b"")]
    for place in [*range(begin + 20), *rng.integers(begin, len(whole), 150).tolist()]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for data in damaged:
        file.write_bytes(data)
        found = prediction(file, x)
        if isinstance(found, str):
            assert re.search(r"is damaged: its checksum does not match|is not an ONNX model", found)
            assert "\n" not in found
        else:
            assert data.endswith(whole[begin:])
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="is damaged: its checksum"):
        onnx.quantized(file, [small.inputs], tmp_path / "int8.onnx")


def test_the_digest_is_metadata_of_the_model(ort, exported, tmp_path):
    import onnx as format

    int8 = tmp_path / "int8.onnx"
    case, floats, _ = exported("LeNet300")
    onnx.quantized(floats, [case.inputs], int8)
    for file in (ort, floats, int8):
        model = format.load(file)
        format.checker.check_model(model)
        (digest,) = (each.value for each in model.metadata_props if each.key == "dl_jax.crc32")
        entry = len(onnx._entry(b""))
        assert digest == f"{zlib.crc32(file.read_bytes()[entry:]):08x}"
        model.graph.name = "changed"
        changed = tmp_path / "changed.onnx"
        format.save(model, changed)  # another program puts our entry, which it keeps, elsewhere
        assert onnx.load(changed)


def test_a_model_of_another_program_is_opened_as_it_is(small, ort, tmp_path):
    import onnx as format

    model, file = format.load(ort), tmp_path / "model.onnx"
    del model.metadata_props[:]
    format.save(model, file)
    (x,) = small.batch(4)
    np.testing.assert_array_equal(onnx.load(file)(x), onnx.load(ort)(x))


@pytest.mark.parametrize("data", [b"", b"not a model", None])
def test_what_is_no_onnx_model(data, ort, tmp_path):
    file = tmp_path / "model.onnx"
    content = b"not a model"
    file.write_bytes(onnx._entry(content) + content if data is None else data)
    with pytest.raises(InputError, match="is not an ONNX model that ONNX Runtime can open"):
        onnx.load(file)
    with pytest.raises(InputError, match="is not an ONNX model that ONNX Runtime can open"):
        onnx.quantized(file, [(np.ones((2, 4), np.float32),)], tmp_path / "int8.onnx")


@pytest.mark.parametrize("package", ["jax2onnx", "onnxruntime"])
def test_a_missing_package_comes_with_the_command(package, small, tmp_path, monkeypatch):
    onnx.require()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"ONNX needs {package}, .* run: pip install -e '\.\[export\]'"):
        onnx.require()
    with pytest.raises(InputError, match=rf"ONNX needs {package}, .* run: pip install -e '\.\[export\]'"):
        onnx.export(*small, tmp_path / "model.onnx")


def test_exporting_leaves_jax_as_it_was(small, tmp_path):
    """Exporters replace functions while they trace."""
    modules = (jax, jnp, lax, jax.nn, jax.random, nn)
    before = [dict(vars(module)) for module in modules]
    onnx.export(*small, tmp_path / "model.onnx")
    after = [vars(module) for module in modules]
    assert [name for b, a in zip(before, after, strict=True) for name in b if a[name] is not b[name]] == []


def test_exporting_leaves_logging_as_it_was(small, tmp_path):
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        onnx.export(*small, tmp_path / "model.onnx")
        assert root.handlers == []
    finally:
        root.handlers = handlers


@pytest.mark.parametrize("name", ["LeNet300", "LeNetCaffe"])
def test_int8_is_small_and_near(name, exported, tmp_path):
    import onnx as format

    floats, int8 = exported(name).file, tmp_path / "int8.onnx"
    images = 2 * np.random.default_rng(3).random((96, 28, 28, 1), np.float32)
    images[:64] /= 2
    onnx.quantized(floats, [(images[i : i + 32],) for i in (0, 32)], int8)
    before, after = (onnx.load(file)(images) for file in (floats, int8))
    largest = np.abs(before[:64]).max()
    assert 0 < np.abs(before - after)[:64].max() < 0.05 * largest
    assert np.abs(after[64:]).max() < 1.01 * largest < np.abs(before[64:]).max()  # clipped to the calibrated range
    graph = format.load(int8).graph
    sizes = {t.name: t.dims for t in graph.initializer}
    integers = {t.name for t in graph.initializer if t.data_type == format.TensorProto.INT8 and len(t.dims) > 1}
    scales = [n.input[1] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in integers]
    channels = sorted(sizes[scale][0] for scale in scales)
    assert channels == ([10, 100, 300] if name == "LeNet300" else [10, 20, 50, 500])
    assert int8.stat().st_size < 0.27 * floats.stat().st_size


def test_a_network_that_stays_in_float_is_not_called_quantised(tmp_path):
    """An LSTM's recurrent kernel is multiplied in a loop, which ONNX Runtime's quantiser does not enter."""
    model, x = rnn.Recurrent(rnn.LSTM, 8), np.random.default_rng(0).random((3, 4, 5), np.float32)
    variables, file, int8 = drawn(model, {"x": x}), tmp_path / "lstm.onnx", tmp_path / "int8.onnx"
    onnx.export(lambda variables, x: model.apply(variables, x, train=False)[0], variables, [x], file)
    with pytest.raises(
        InputError, match=r"\d+ of \d+ weights in .* became int8, expected half of them or more"
    ) as error:
        onnx.quantized(file, [(x,)], int8)
    assert f"{int8} is not written" in str(error.value)
    assert not int8.exists()


class Looking(nn.Module):
    """A dense layer on a row of a table, which is much larger, beside a table that is added."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5000, 8)(tokens) + self.param("offset", nn.initializers.ones, (1, 8))
        return nn.Dense(8)(nn.relu(nn.Dense(8)(x)))


def test_a_table_that_is_looked_up_does_not_count_as_a_weight(tmp_path):
    import onnx as format

    tokens = np.random.default_rng(0).integers(0, 5000, 32).astype(np.int32)
    variables = Looking().init(jax.random.key(0), tokens)
    floats, int8 = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    onnx.export(Looking().apply, variables, [tokens], floats)
    onnx.quantized(floats, [(tokens,)], int8)
    before, after = (onnx.load(file)(tokens) for file in (floats, int8))
    assert np.abs(before - after).max() < 0.05 * np.abs(before).max()
    kinds = {t.data_type for t in format.load(int8).graph.initializer if list(t.dims) == [8, 8]}
    assert kinds == {format.TensorProto.INT8}


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_calibration_data_that_is_not_finite(wrong, ort, tmp_path):
    batches = [(np.ones((2, 4), np.float32),), (np.array([[0, 1, wrong, 0]], np.float32),)]
    with pytest.raises(InputError, match="of batch 1 of the calibration set has NaN or infinite values"):
        onnx.quantized(ort, batches, tmp_path / "int8.onnx")
    assert not list(tmp_path.iterdir())


def test_calibration_data_is_checked(ort, tmp_path):
    for batches, message in [
        ([], "the calibration set is empty, expected at least one batch"),
        (iter(()), "the calibration set is empty"),
        ([(np.ones((2, 5), np.float32),)], r"input 0 is float32\[2, 5\], expected float32\[batch, 4\]"),
    ]:
        with pytest.raises(InputError, match=message):
            onnx.quantized(ort, batches, tmp_path / "int8.onnx")
    assert not list(tmp_path.iterdir())


def primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives, those inside others included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                names |= primitives(getattr(inner, "jaxpr", inner))
    return names


def test_plain_inlines_calls_and_folds_constants():
    @jax.custom_vjp
    def double(x):
        return jax.jit(lambda x: 2 * x)(x)

    double.defvjp(lambda x: (double(x), None), lambda _, g: (g,))

    def function(x):
        table = jnp.cumsum(jax.jit(jnp.exp)(jnp.arange(3.0)))  # depends on no input

        def body(carry, row):
            carry = lax.platform_dependent(carry, row, cpu=lambda c, r: c - r, default=lambda c, r: c + r)
            return jax.nn.silu(carry), double(carry)

        return lax.scan(body, x * table, jnp.ones((4, 3)))

    x = np.array([[1.0, 2.0, 3.0]], np.float32)
    inlined = plain.plain(function, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
    before, after = (primitives(jax.make_jaxpr(f)(x).jaxpr) for f in (function, inlined))
    assert before >= {"custom_vjp_call", "cumsum", "cond", "scan", "exp"}
    assert after == {"mul", "scan", "add", "logistic", "broadcast_in_dim"}
    carry, rows = x * np.cumsum(np.exp(np.arange(3))), []
    for _ in range(4):
        carry = carry + 1
        rows.append(2 * carry)
        carry = carry / (1 + np.exp(-carry))
    found = inlined(jnp.asarray(x))
    np.testing.assert_allclose(found[0], carry, rtol=1e-5)
    np.testing.assert_allclose(found[1], np.stack(rows), rtol=1e-5)
