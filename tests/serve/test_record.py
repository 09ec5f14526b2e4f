"""The record beside an exported file."""

import hashlib
import json

import numpy as np
import pytest
from serve_files import CLASSES, content, exported, images, weights

from dl_jax.core.errors import InputError
from dl_jax.export import Input, onnx, record


def test_a_record_is_read_as_it_was_written_and_says_what_the_file_is(tmp_path):
    path = tmp_path / "net.onnx"
    kernel, some = exported(path), images(20)
    found = record.load(path)
    assert found.format == "onnx"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.bytes == path.stat().st_size
    assert found.inputs == (Input((None, 8, 8, 1), "float32"),)
    assert found.outputs == (Input((None, 3), "float32"),)
    assert found.classes == CLASSES
    logits = some.reshape(20, -1) @ kernel
    assert found.validation.examples == 20
    assert found.validation.mean == pytest.approx(some.mean(), rel=1e-5)
    assert found.validation.std == pytest.approx(some.std(), rel=1e-5)
    assert found.validation.answers == tuple(np.bincount(logits.argmax(1), minlength=3) / 20)
    powers = np.exp(logits.astype(np.float64))
    assert found.validation.confidence == pytest.approx((powers.max(1) / powers.sum(1)).mean(), rel=1e-5)
    record.require_same(found, path.read_bytes(), path)


@pytest.mark.parametrize(
    ("request_", "shape", "dtype"),
    [
        (record.Arrays(), (4, 3), "float64"),
        (record.Audio(rate=8000), (4, 100), "float32"),
        (record.Text(words=("good", "bad"), lower=False), (4, 7), "int32"),
    ],
)
def test_every_kind_of_request_is_kept(tmp_path, request_, shape, dtype):
    path = tmp_path / "net.tflite"
    path.write_bytes(b"of any content")
    give = lambda x: {"b": x, "a": (np.zeros(len(x), np.int32),)}
    written = record.write(path, give, [(np.ones(shape, dtype),)], request=request_, batch=4)
    assert record.load(path) == written
    assert written.request == request_
    assert written.inputs == (Input((4, *shape[1:]), dtype),)
    assert [each.dtype for each in written.outputs] == ["int32", dtype]  # a before b
    assert written.validation.answers == ()


def test_a_text_is_described_by_its_share_of_unknown_words():
    ids = np.array([[2, 1, 1, 0, 0], [3, 3, 3, 3, 3], [0, 0, 0, 0, 0]], np.int32)
    assert record.moments(record.Text(words=("a", "b")), ids)[:, 0].tolist() == [2 / 3, 0, 0]


def test_how_much_of_an_image_a_drawing_takes():
    some = np.zeros((3, 10, 10, 1), np.float32)
    some[0, 2:7, 4:6] = some[1, :8, :1] = 1  # 5 high; 8 high; nothing
    assert record.filled(some) == 0.5
    assert record.filled(np.ones((1, 4, 4, 3), np.float32)) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"net\.onnx has \d+ bytes, expected \d+ as its record"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
            r"net\.onnx is damaged: its SHA-256 is not [0-9a-f]{12}",
        ),
        (lambda path: record.path_of(path).unlink(), r"net\.onnx has no record net\.onnx\.json beside it; copy it"),
        (lambda path: record.path_of(path).write_text("{}"), r"net\.onnx\.json is damaged \(it does not match its dig"),
        (lambda path: record.path_of(path).write_text("{"), r"net\.onnx\.json is damaged \(it is no JSON object"),
        (
            lambda path: record.path_of(path).write_text(record.path_of(path).read_text().replace('"left"', '"write"')),
            r"net\.onnx\.json is damaged \(it does not match its digest\)",
        ),
    ],
)
def test_what_was_damaged_is_refused(tmp_path, change, expected):
    path = tmp_path / "net.onnx"
    exported(path)
    change(path)
    with pytest.raises(InputError, match=expected) as e:
        record.require_same(record.load(path), path.read_bytes(), path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, r"net\.onnx\.json has layout 2, expected 1; write it anew"),
        ({"classes": ["one"]}, r"is wrong: the first output is float32\[batch, 3\], expected logits of 1 classes"),
        ({"request": {"kind": "audio", "rate": 8000}}, r"is wrong: the file takes float32\[batch, 8, 8, 1\], expected"),
        ({"request": {"kind": "smell"}}, r"is no record \(KeyError: 'smell'\)"),
        ({"inputs": []}, r"is wrong: the file takes nothing"),
        ({"outputs": []}, r"is no record \(IndexError"),
        ({"inputs": [{"shape": [None, 8, 8, 1], "dtype": "real"}], "request": {"kind": "arrays"}}, "is no record"),
        ({"validation": {}}, r"is no record \(KeyError: 'answers'\)"),
        (
            {"validation": {"examples": 1, "mean": 0, "std": 0, "answers": [1], "confidence": 1}},
            "has shares of 1 classes",
        ),
    ],
)
def test_a_record_that_is_whole_and_wrong_is_refused(tmp_path, change, expected):
    path = tmp_path / "net.onnx"
    exported(path)
    found = json.loads(record.path_of(path).read_text())
    del found["crc32"]
    record.path_of(path).write_text(json.dumps(record.sealed({**found, **change})))
    with pytest.raises(InputError, match=expected) as e:
        record.load(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "batches", "more", "expected"),
    [
        ("net.dlj", [(images(2),)], {}, r"net\.dlj is none of the files that have a record, expected \.onnx"),
        ("net.onnx", [], {}, r"the validation data is empty"),
        ("net.onnx", [(images(2),)], {"classes": ("a", "b")}, r"the file gives \(2, 3\), expected logits \[B, 2\]"),
        (
            "net.onnx",
            [(images(2),)],
            {"request": record.Audio(8000)},
            r"the file takes float32\[batch, 8, 8, 1\], expected",
        ),
    ],
)
def test_a_record_that_would_be_wrong_is_not_written(tmp_path, name, batches, more, expected):
    path = tmp_path / name
    path.write_bytes(content(weights()))
    predict = onnx.opened(path.read_bytes(), path, 1)
    with pytest.raises(InputError, match=expected):
        record.write(path, predict, batches, **more)
    assert not record.path_of(path).exists()
