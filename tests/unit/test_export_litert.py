"""LiteRT files: written, run and compared where the converter is installed; damaged ones are refused."""

import importlib.metadata
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dl_jax.compress.grid import dequantized, fake_quantize
from dl_jax.core.errors import InputError
from dl_jax.export import litert

X = np.random.default_rng(0).uniform(-1, 1, (5, 6)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).standard_normal((6, 6)).astype(np.float32)


def dense(w, x):
    return jnp.tanh(x @ w)


def test_a_missing_package_comes_with_the_command(tmp_path, monkeypatch):
    found = {"litert-converter": litert.CONVERTER, "ai-edge-litert": "2.3.0"}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    litert.require()
    for name, command in [
        ("ai-edge-litert", r"pip install -e '\.\[litert\]'"),
        ("litert-converter", "pip install --no-deps litert-converter==0.5.0"),
    ]:
        monkeypatch.delitem(found, name)
        with pytest.raises(InputError, match=f"LiteRT needs {name}, which is not installed; run: {command}"):
            litert.export(dense, WEIGHTS, [X], tmp_path / "net.tflite")
    monkeypatch.setitem(found, "litert-converter", "0.6.0")
    with pytest.raises(InputError, match=r"litert-converter is 0\.6\.0, expected 0\.5\.0; run: pip install"):
        litert.require()


def test_a_digest_lies_within_the_file_and_notices_every_damage(tmp_path):
    """Of made-up content, without the packages."""
    rng, file = np.random.default_rng(2), tmp_path / "net.tflite"
    content = litert.HEAD.pack(32, b"TFL3") + rng.bytes(500)
    whole = litert._with_digest(content)
    assert litert.HEAD.unpack_from(whole) == (48, b"TFL3")  # the root moved with the rest
    file.write_bytes(whole)
    assert litert._content(file.read_bytes(), file) == content
    damaged = [whole[:size] for size in (0, 7, 23, 24, 100, len(whole) - 1)] + [whole + b"\0", content]
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for data in damaged:
        file.write_bytes(data)
        with pytest.raises(InputError) as e:
            litert.load(file)
        assert re.search(r"is damaged|is not a LiteRT file of dl_jax|has layout \d+, expected 1", str(e.value))
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"cannot read .*none \(No such file or directory\); export"):
        litert.load(tmp_path / "none")


@pytest.fixture
def converter():
    """Skips a test where the converter is missing, which no extra installs."""
    pytest.importorskip("litert_converter", reason="litert-converter is installed by itself")
    pytest.importorskip("ai_edge_litert")


@pytest.mark.usefixtures("converter")
def test_the_file_computes_the_same_for_its_batch(tmp_path):
    file = tmp_path / "net.tflite"
    assert litert.export(lambda w, x, y: (dense(w, x), x - y), WEIGHTS, [X, 2 * X], file, batch=2) <= 1e-6
    found, second = litert.load(file)(X[3:], X[:2])
    np.testing.assert_allclose(found, dense(WEIGHTS, X[3:]), atol=1e-6)
    np.testing.assert_allclose(second, X[3:] - X[:2], atol=1e-6)
    with pytest.raises(InputError, match=r"input 0 is float32\[5, 6\], expected float32\[2, 6\]; reshape"):
        litert.load(file)(X, X)


@pytest.mark.usefixtures("converter")
def test_scans_are_written_out_and_other_loops_are_one_line(tmp_path):
    file = tmp_path / "net.tflite"
    scan = lambda w, x: lax.scan(lambda h, x: (jnp.tanh(x + h @ w), h), jnp.zeros((2, 6)), jnp.stack([x, 2 * x, -x]))[0]
    assert litert.export(scan, WEIGHTS, [X], file, batch=2) <= 1e-6
    before = file.read_bytes()
    loop = lambda w, x: lax.while_loop(lambda y: y.sum() < 100, lambda y: y * 2 + 1, x)
    with pytest.raises(InputError, match=r"converter to LiteRT failed at tfl\.while: .* is not written") as e:
        litert.export(loop, WEIGHTS, [X], file)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"LiteRT differs from JAX by .* is not written"):
        litert.export(dense, WEIGHTS, [X], file, tolerance=-1.0)
    assert file.read_bytes() == before


@pytest.mark.usefixtures("converter")
def test_rounded_numbers_are_computed_in_integers_with_our_scales(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    kernel = np.random.default_rng(3).integers(-127, 128, (3, 3, 2, 8)).astype(np.int8)
    scale = np.random.default_rng(4).uniform(0.001, 0.002, (1, 1, 1, 8)).astype(np.float32)
    images = np.random.default_rng(5).random((3, 8, 8, 2), np.float32)

    def apply(w, x):
        w, numbers = dequantized(*w), ("NHWC", "HWIO", "NHWC")
        x = fake_quantize(x, np.float32(1 / 255), np.float32(0), 255)
        x = nn.relu(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers))
        return fake_quantize(x, np.float32(0.01), np.float32(0), 255)

    file, weights = tmp_path / "net.tflite", (jnp.asarray(kernel), jnp.asarray(scale))
    litert.export(apply, weights, [images], file, tolerance=0.0101)
    found, expected = litert.load(file)(images[:1]), jax.jit(apply)(weights, images[:1])
    assert np.isclose(found, expected, atol=1e-5).mean() > 0.99  # the others are a step off
    interpreter = Interpreter(model_content=file.read_bytes())
    tensors = [each for each in interpreter.get_tensor_details() if each["dtype"] == np.int8]
    (weight,) = (each for each in tensors if tuple(each["shape"]) == (8, 3, 3, 2))
    np.testing.assert_array_equal(weight["quantization_parameters"]["scales"], scale.ravel())
    assert {round(float(each["quantization"][0]), 6) for each in tensors} >= {round(1 / 255, 6), 0.01}
