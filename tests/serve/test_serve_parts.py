"""The parts of the server: batches in simulated time, requests as arrays, limits, drift, occlusion."""

import concurrent.futures
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_files import CLASSES, SIDE, content, exported, images, model, png, weights

from dl_jax import attribution
from dl_jax.core.errors import InputError
from dl_jax.export import onnx, record
from dl_jax.serve import batching, drift, limits, occlusion, runtime
from dl_jax.serve.app import DECODERS
from dl_jax.serve.decode import JSON, MAX_PIXELS, TooLarge, Unsupported, decoded

NONE = model(lambda inputs: [])


def job(rows: int, arrived: float) -> batching.Job:
    return batching.Job([np.zeros((rows, 1))], arrived, concurrent.futures.Future())


class Simulated:
    """A queue of jobs that arrive at their times, and a clock that waiting for them moves on."""

    def __init__(self, jobs, now):
        self.jobs, self.now = list(jobs), now

    def take(self, seconds):
        if self.jobs and self.jobs[0].arrived <= self.now + seconds:
            self.now = max(self.now, self.jobs[0].arrived)
            return self.jobs.pop(0)
        self.now += seconds
        return None


@pytest.mark.parametrize(
    ("jobs", "under_way", "now", "rows", "left", "until"),
    [
        ([(1, 0.0)], 1, 0.0, [1], 0, 0.0),  # alone, it does not wait
        ([(1, 0.0)], 2, 0.0, [1], 0, 0.01),  # another one is under way, for longer than it waits
        ([(1, 0.0), (1, 0.004)], 2, 0.0, [1, 1], 0, 0.004),  # both are here
        ([(1, 0.0), (1, 0.0), (1, 0.004)], 1, 0.0, [1, 1], 1, 0.0),  # what waits already goes with it
        ([(1, 0.0), (1, 0.004), (1, 0.02)], 3, 0.0, [1, 1], 1, 0.01),  # one more comes in time
        ([(3, 0.0), (5, 0.001), (1, 0.002)], 9, 0.0, [3, 5], 1, 0.001),  # the batch is full at once
        ([(6, 0.0), (4, 0.001), (1, 0.002)], 9, 0.0, [6], 2, 0.001),  # the next one does not fit and is held
        ([(1, 0.0), (1, 0.1), (1, 0.2), (1, 0.9)], 9, 0.5, [1, 1, 1], 1, 0.5),  # late: what waits goes with it
        ([(9, 0.0), (1, 0.0)], 2, 0.0, [9], 1, 0.0),  # more than a batch goes alone
    ],
)
def test_batches_in_simulated_time(jobs, under_way, now, rows, left, until):
    jobs = [job(*each) for each in jobs]
    waiting = Simulated(jobs[1:], now)
    found, held = batching.collected(jobs[0], waiting.take, 8, 0.01, lambda: waiting.now, lambda: under_way)
    assert [each.rows for each in found] == rows
    assert len(waiting.jobs) + (held is not None) == left
    assert waiting.now == pytest.approx(until)
    assert [*found, *([held] if held else []), *waiting.jobs] == jobs  # none is lost, in their order


def test_every_job_gets_its_own_rows_and_a_failure_is_told_to_all():
    calls, go = [], threading.Event()

    def predict(inputs):
        go.wait()
        calls.append(len(inputs[0]))
        if (inputs[0] < 0).any():
            raise ValueError("negative")
        return [2 * inputs[0], inputs[0].sum(1)]

    given_ = [np.full((n, 2), i, np.float32) for i, n in enumerate((1, 3, 2, 4, 1))]
    seen = []
    batcher = batching.Batcher(lambda: model(predict), 6, 0.0, seen.append, lambda: 9)
    first = [batcher.submit([each]) for each in given_]
    bad = batcher.submit([np.full((6, 2), -1, np.float32)])
    cancelled = batcher.submit([given_[0]])
    cancelled.cancel()
    go.set()
    for each, future in zip(given_, first, strict=True):
        _, (double, total) = future.result(10)
        np.testing.assert_array_equal(double, 2 * each)
        np.testing.assert_array_equal(total, each.sum(1))
    with pytest.raises(ValueError, match="negative"):
        bad.result(10)
    last = batcher.submit([given_[1]])
    batcher.close(10)
    assert last.done()
    assert not batcher.alive(10)
    assert seen == calls
    assert sum(calls) == 11 + 6 + 3  # what was cancelled is not computed
    assert max(calls) <= 6


def test_a_call_that_hangs_does_not_keep_it_from_ending():
    go = threading.Event()
    hangs = model(lambda inputs: [inputs[0] * go.wait(10)])
    batcher = batching.Batcher(lambda: hangs, 4, 0.0, lambda rows: None, lambda: 1)
    asked = batcher.submit([np.ones((1, 2))])
    batcher.close(0.01)
    assert batcher.alive(10)
    assert not batcher.alive(0)
    go.set()
    asked.result(10)


def test_the_rows_of_a_call_are_padded_to_a_size_that_the_file_takes():
    calls = []

    def predict(x):
        calls.append(len(x))
        return (x.sum(1), x)

    x = np.arange(22, dtype=np.float32).reshape(11, 2)
    total, same = runtime.sized(predict, (1, 2, 4))([x])
    np.testing.assert_array_equal(total, x.sum(1))
    np.testing.assert_array_equal(same, x)
    assert calls == [4, 4, 4]
    found = model(predict).record
    assert runtime.sizes(found._replace(format="stablehlo"), 20) == (1, 2, 4, 8, 16, 32)
    assert runtime.sizes(found._replace(format="stablehlo"), 1) == (1,)
    assert runtime.sizes(found, 20) == ()
    assert runtime.sizes(found._replace(inputs=(found.inputs[0]._replace(shape=(3, 2)),)), 20) == (3,)


def test_a_file_is_opened_and_one_of_other_inputs_is_not_taken_over(tmp_path):
    path = tmp_path / "net.onnx"
    kernel = exported(path)
    found = runtime.opened(path, 4, 1)
    some = images(3)
    np.testing.assert_allclose(found.predict([some])[0], some.reshape(3, -1) @ kernel, rtol=1e-4, atol=1e-5)
    new = exported(path, seed=5)
    taken = runtime.taken_over(found, path, 4, 1)
    np.testing.assert_allclose(taken.predict([some])[0], some.reshape(3, -1) @ new, rtol=1e-4, atol=1e-5)
    assert taken.version != found.version
    record.write(path, onnx.load(path, 1), [(some,)], classes=CLASSES)  # now its requests are arrays
    with pytest.raises(InputError, match=r"takes arrays float32\[batch, 8, 8, 1\], expected image float32\[batch"):
        runtime.taken_over(found, path, 4, 1)


def test_a_file_for_recordings_of_another_rate_is_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "opened", lambda *_: model(list, (6,), request=record.Audio(16_000)))
    with pytest.raises(
        InputError, match=r"takes audio float32\[batch, 6\] at 16000 Hz, expected .* at 8000 Hz as before"
    ):
        runtime.taken_over(model(list, (6,), request=record.Audio(8000)), tmp_path, 4, 1)


def test_a_file_that_is_not_what_its_record_says_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(content(weights()[:, :2]))
    record.write(path, lambda x: np.zeros((len(x), 3), np.float32), [(images(2),)], request=record.Image())
    with pytest.raises(InputError, match=r"gives float32\[1, 2\], expected float32\[1, 3\] as its record says"):
        runtime.opened(path, 4, 1)


def test_a_png_of_the_models_size_is_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    (found,) = decoded(png(pixels), "image/png", NONE.record, 4)
    np.testing.assert_array_equal(found, pixels[None, :, :, None] / np.float32(255))
    colours = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    (found,) = decoded(png(colours), "image/png; x=y", model(lambda x: [], (SIDE, SIDE, 3)).record, 4)
    np.testing.assert_array_equal(found, colours[None] / np.float32(255))


def test_a_larger_png_is_scaled_and_cropped_at_its_centre():
    pixels = np.zeros((16, 48), np.uint8)
    pixels[:, 16:24] = 200  # the left half of the middle third
    (found,) = decoded(png(pixels), "image/png", NONE.record, 4)
    np.testing.assert_allclose(found[0, :, 1:3, 0], 200 / 255, atol=1e-6)  # between them the filter mixes
    np.testing.assert_allclose(found[0, :, 5:, 0], 0, atol=1e-6)


def test_transparent_pixels_are_black_and_sixteen_bits_become_eight():
    import PIL.Image

    clear = PIL.Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    deep = PIL.Image.fromarray(np.full((SIDE, SIDE), 0x8000, np.uint16))
    for image, value in ((clear, 0), (deep, 128 / 255)):
        file = io.BytesIO()
        image.save(file, "PNG")
        (found,) = decoded(file.getvalue(), "image/png", NONE.record, 4)
        np.testing.assert_allclose(found, value, atol=1e-6)


def recording(values: np.ndarray, rate: int = 8000) -> bytes:  # int16 [n, channels]
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((values.shape[1], 2, rate, 0, "NONE", ""))
        written.writeframes(values.astype("<i2").tobytes())
    return file.getvalue()


AUDIO = model(lambda inputs: [], (6,), request=record.Audio(8000)).record
TEXT = model(lambda inputs: [], (5,), "int32", record.Text(("good", "film"))).record


def test_a_recording_is_scaled_averaged_and_padded():
    (found,) = decoded(recording(np.array([[16384, 0], [-32768, -32768]])), "audio/wav", AUDIO, 4)
    np.testing.assert_array_equal(found, [[0.25, -1, 0, 0, 0, 0]])


def test_a_text_becomes_ids():
    (found,) = decoded(b"A GOOD  film", "text/plain; charset=utf-8", TEXT, 4)
    np.testing.assert_array_equal(found, [[1, 2, 3, 0, 0]])
    assert found.dtype == np.int32


def rows(value: object) -> bytes:
    return json.dumps({"inputs": value}).encode()


GREY = NONE.record
IMAGE = np.zeros((1, SIDE, SIDE, 1)).tolist()


BAD = [
    (GREY, b"x", "text/plain", "content type 'text/plain', expected image/png or application/json", Unsupported),
    (GREY, b"x", "", "content type 'none', expected image/png", Unsupported),
    (GREY, b"x", "image/png", "the body is no PNG", InputError),
    (GREY, png(np.zeros((8, 8), np.uint8))[:45], "image/png", "the PNG cannot be read", InputError),
    (
        GREY,
        png(np.zeros((1, 300_000), np.uint8)),
        "image/png",
        "an image of 300000x1 pixels is too narrow",
        InputError,
    ),
    (GREY, png(np.zeros((1, 1), np.uint8))[:16] + b"\xff" * 40, "image/png", "an image of 4294967295x", TooLarge),
    (GREY, b"{", JSON, "the body is no JSON", InputError),
    (GREY, b"\xff\xfe{", JSON, "the body is no JSON", InputError),
    (GREY, b'{"inputs": NaN}', JSON, "the body is no JSON .NaN is no number", InputError),
    (GREY, b'{"inputs": 1' + b"0" * 5000 + b"}", JSON, "the body is no JSON", InputError),
    (GREY, b"[" * 200_000, JSON, "the JSON is nested too deeply", InputError),
    (GREY, b"[]", JSON, "the JSON is no object with the one key inputs", InputError),
    (GREY, b'{"inputs": [], "more": 1}', JSON, "the JSON is no object with the one key inputs", InputError),
    (GREY, rows([[1, 2], [3]]), JSON, "inputs are no array, expected float32.batch, 8", InputError),
    (GREY, rows("1"), JSON, "inputs have texts, expected float32", InputError),
    (GREY, rows([{}]), JSON, "inputs are no numbers", InputError),
    (GREY, rows([None]), JSON, "inputs are no numbers", InputError),
    (GREY, rows([True]), JSON, "inputs are no numbers", InputError),
    (GREY, rows([10**400]), JSON, "inputs are no ", InputError),
    (GREY, b'{"inputs": [1e39]}', JSON, "inputs have numbers beyond float32", InputError),
    (GREY, rows(0.5), JSON, "input 0 is float32.., expected float32.batch, 8, 8, 1", InputError),
    (GREY, rows([[0.5]]), JSON, "input 0 is float32.1, 1., expected float32.batch, 8, 8, 1", InputError),
    (GREY, rows(IMAGE * 5), JSON, "5 rows, expected at most 4 in a request", TooLarge),
    (GREY, rows(np.full((1, 8, 8, 1), 255).tolist()), JSON, "values outside .0, 1., expected only", InputError),
    (AUDIO, b"RIFF", "audio/wav", "the body is no WAV file", InputError),
    (AUDIO, recording(np.zeros((2, 1)), 16000), "audio/wav", "16 bits at 16000 Hz, expected 16 bits", InputError),
    (AUDIO, recording(np.zeros((7, 1))), "audio/wav", "a recording of 7 samples, expected 1 to 6", InputError),
    (AUDIO, recording(np.zeros((0, 1))), "audio/wav", "a recording of 0 samples, expected 1 to 6", InputError),
    (TEXT, b"\xff", "text/plain", "the text is not UTF-8", InputError),
    (TEXT, b" ", "text/plain", "a text of 0 words, expected 1 to 5", InputError),
    (TEXT, b"a b c d e f", "text/plain", "a text of 6 words, expected 1 to 5", InputError),
    (TEXT, rows([[1.5, 0, 0, 0, 0]]), JSON, "inputs are no numbers such as int32", InputError),
    (TEXT, rows([[2**40, 0, 0, 0, 0]]), JSON, "inputs have numbers beyond int32", InputError),
    (TEXT, rows([[4, 0, 0, 0, 0]]), JSON, "values outside .0, 3.", InputError),
]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float32", "float16", "bool"])
def test_arrays_of_any_type_are_taken_as_they_are(dtype):
    found = model(lambda inputs: [], (2,), dtype, record.Arrays()).record
    expected = np.array([[0, 1], [1, 0]], dtype)
    (array,) = decoded(rows(expected.tolist()), JSON, found, 4)
    np.testing.assert_array_equal(array, expected, strict=True)


@pytest.mark.parametrize(("found", "body", "kind", "expected", "error"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_refused_in_one_line(found, body, kind, expected, error):
    with pytest.raises(InputError, match=expected) as e:
        decoded(body, kind, found, 4)
    assert type(e.value) is error
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300


def test_several_inputs_come_in_a_list():
    pair = GREY._replace(request=record.Arrays(), inputs=(GREY.inputs[0]._replace(shape=(None, 2)), AUDIO.inputs[0]))
    found = decoded(rows([[[1, 2]], [[0] * 6]]), JSON, pair, 4)
    assert [each.shape for each in found] == [(1, 2), (1, 6)]
    for given_, expected in (([[[1, 2]]], "list of 2 arrays"), ([[[1, 2]], [[0] * 6] * 2], "batches of 1 and 2")):
        with pytest.raises(InputError, match=expected):
            decoded(rows(given_), JSON, pair, 4)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["image/png", JSON, "audio/wav", "text/plain"]), st.booleans())
def test_any_bytes_are_an_input_or_a_line(body, kind, signed):
    if signed:
        body = {"image/png": png(np.zeros((3, 3), np.uint8))[:33], "audio/wav": recording(np.zeros((1, 1)))[:40]}.get(
            kind, b""
        ) + body
    for each in (GREY, AUDIO, TEXT):
        found = outcome(body, kind, each)
        if isinstance(found, str):
            assert "\n" not in found
        else:
            assert each.inputs[0].fits(found[0])
            assert np.isfinite(found[0]).all()


def outcome(body: bytes, kind: str, found: record.Record) -> list[np.ndarray] | str:
    try:
        return decoded(body, kind, found, 4)
    except InputError as e:
        return str(e)


def test_a_client_may_ask_at_its_rate():
    rates = limits.Rates(2.0)
    waits = [rates.wait("a", now) for now in (0.0, 0.0, 0.0, 0.25, 0.5, 0.5)]
    assert waits == pytest.approx([0, 0, 0.5, 0.25, 0, 0.5])  # two at once, then one each half second
    assert rates.wait("b", 0.5) == 0
    assert [rates.wait("a", 100.0) for _ in range(3)] == pytest.approx([0, 0, 0.5])  # not more than two are saved
    for i in range(limits.CLIENTS + 5):
        rates.wait(str(i), 200.0)
    assert len(rates._clients) == limits.CLIENTS


def test_drift_by_hand():
    window = drift.Window(GREY)  # mean 0.5, std 0.25, classes at a third each, confidence 0.5
    assert np.isnan(window.drift().shift)
    x = np.concatenate([np.full((1, SIDE, SIDE, 1), 0.25), np.full((3, SIDE, SIDE, 1), 0.75)]).astype(np.float32)
    logits = np.log(np.array([[8, 1, 1], [8, 1, 1], [8, 1, 1], [1, 8, 1]]) / 10)
    window.add(x, logits)
    found = window.drift()
    assert found.examples == 4
    assert found.mean == pytest.approx(0.625)
    assert found.shift == pytest.approx(0.5)
    assert found.spread == pytest.approx(np.sqrt(3) / 8 / 0.25)
    assert found.answers == pytest.approx((5 / 12 + 1 / 12 + 1 / 3) / 2)
    assert found.confidence == pytest.approx(0.3)
    window.add(np.full((drift.WINDOW, SIDE, SIDE, 1), 0.5), np.zeros((drift.WINDOW, 3)))
    assert window.drift()[:3] == (drift.WINDOW, 0.5, 0.0)  # the older ones are forgotten


@pytest.mark.parametrize("shape", [(14, 21, 1), (5, 9, 3)])
def test_hidden_windows_are_those_of_attribution(shape):
    rng = np.random.default_rng(0)
    image, kernel = rng.random(shape, np.float32), rng.normal(size=shape).astype(np.float32)
    score = lambda images: (images * kernel).sum((1, 2, 3)) ** 2
    hidden = occlusion.hidden(record.Image(), image)
    found = score(image[None]) - score(np.stack(list(hidden.copies)))
    expected = attribution.occlusion(score, image[None], hidden.size, hidden.stride)
    assert hidden.shape == expected.shape[1:]
    np.testing.assert_allclose(found.reshape(hidden.shape), expected[0], rtol=1e-3, atol=1e-3)


def test_hidden_parts_of_recordings_and_texts():
    wave_ = np.arange(1, 33, dtype=np.float32)
    hidden = occlusion.hidden(record.Audio(8000), wave_)
    copies = np.stack(list(hidden.copies))
    assert hidden.shape == (16,)
    np.testing.assert_array_equal((copies == 0).sum(0), 1)  # each sample is hidden once
    text = record.Text(("a", "b"))
    hidden = occlusion.hidden(text, np.array([3, 2, 0, 0], np.int32))
    assert [each.tolist() for each in hidden.copies] == [[1, 2, 0, 0], [3, 1, 0, 0]]
    assert occlusion.hidden(record.Arrays(), wave_).shape == (0,)


def test_the_largest_image_takes_little_memory():
    """It is 16 kB as a PNG; of its kind DECODERS are read at a time."""
    program = """
import re, sys
from serve_files import model, png
from dl_jax.serve.decode import decoded
import numpy as np, PIL.Image
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
found = model(lambda inputs: [], (28, 28, 3)).record
decoded(png(np.zeros((28, 28, 4), np.uint8)), "image/png", found, 1)
before = peak()
decoded(sys.stdin.buffer.read(), "image/png", found, 1)
print(peak() - before)
"""
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.new("RGBA", (MAX_PIXELS // 2000, 2000)).save(file, "PNG")
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=file.getvalue(),
        env={**os.environ, **path},
        capture_output=True,
        check=True,
    )
    assert 10_000 < int(done.stdout) < 80_000  # kB
    assert DECODERS <= 2


def test_a_long_text_among_numbers_is_refused_before_it_takes_memory():
    """NumPy would give each of the numbers as much space as the text: 400 MB."""
    body = rows(["a" * 50_000, *[0] * 2000])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="inputs have texts, expected float32"):
            decoded(body, JSON, GREY, 4)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
