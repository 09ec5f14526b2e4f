"""Core ML packages: what their specification says, and damaged ones."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dl_jax.core.errors import InputError
from dl_jax.export import coreml

X = np.random.default_rng(0).uniform(-1, 1, (5, 6)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).standard_normal((6, 6)).astype(np.float32)


def apply(w, x, count):
    return jnp.tanh(x @ w), count + 1


def test_a_missing_package_comes_with_the_command(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "coremltools" else find(name))
    with pytest.raises(InputError, match=r"Core ML needs coremltools, .* run: pip install -e '\.\[coreml\]'"):
        coreml.export(apply, WEIGHTS, [X, np.arange(5)], tmp_path / "net.mlpackage")
    with pytest.raises(InputError, match="Core ML needs coremltools"):
        coreml.specification(tmp_path / "net.mlpackage")


def test_a_package_its_specification_and_damage_to_it(tmp_path):
    pytest.importorskip("coremltools")
    path = tmp_path / "net.mlpackage"
    for _ in range(2):  # the second takes the place of the first
        found = coreml.export(apply, WEIGHTS, [X, np.arange(5, dtype=np.int32)], path, batch=3)
    assert {name: str(each) for name, each in found.inputs.items()} == {
        "input_0": "float32[3, 6]",
        "input_1": "int32[3]",
    }
    assert {name: str(each) for name, each in found.outputs.items()} == {
        "output_0": "float32[3, 6]",
        "output_1": "int32[3]",
    }
    assert found.operations["tanh"] == 1
    assert list(tmp_path.iterdir()) == [path]

    import coremltools

    spec = coremltools.utils.load_spec(str(path))  # as other programs read it
    assert coreml.KEY.decode() in spec.description.metadata.userDefined
    stored = b"".join((path / name).read_bytes() for name in (coreml.PROGRAM, coreml.WEIGHTS))
    assert WEIGHTS.tobytes() in stored or WEIGHTS.T.tobytes() in stored

    with pytest.raises(InputError, match=r"the converter to Core ML says: .*net\.mlpackage is not written") as e:
        coreml.export(lambda w, x: lax.linalg.eigh(x[:, :, None] * x[:, None])[0], WEIGHTS, [X], path)
    assert "\n" not in str(e.value)
    assert coreml.specification(path) == found
    file = path / coreml.PROGRAM
    whole = file.read_bytes()
    for place in (0, 30, 45, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(InputError, match=r"is damaged: its checksum|is not a Core ML package of dl_jax"):
            coreml.specification(path)


def test_what_cannot_be_a_package(tmp_path):
    pytest.importorskip("coremltools")
    (tmp_path / "folder.mlpackage").mkdir()
    for name in ("net.onnx", "folder.mlpackage"):
        with pytest.raises(InputError, match=r"expected the name of a new folder or package that ends in \.mlpackage"):
            coreml.export(apply, WEIGHTS, [X, np.arange(5)], tmp_path / name)
    with pytest.raises(InputError, match=r"cannot read .*none\.mlpackage"):
        coreml.specification(tmp_path / "none.mlpackage")
