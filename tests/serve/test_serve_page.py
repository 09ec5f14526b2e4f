"""The page in a browser."""

import time
import wave

import numpy as np
import pytest
from browser import Browser, program
from serve_files import CLASSES, content, listening, model, png

from dl_jax.export import onnx, record

pytestmark = pytest.mark.skipif(program() is None, reason="needs Chromium (apt-get install chromium)")


text = lambda name: f"document.getElementById('{name}').textContent"
shown = lambda name: f"document.getElementById('{name}').getClientRects().length > 0"
rows = "Array.from(document.querySelectorAll('.row'), row => row.innerText.split(/\\s+/).slice(0, 2).join(' '))"


def strokes(path, *classes):
    """Writes a classifier of 8x8 drawings: wide ones have ink at the left and the right, tall ones above and below."""
    kernel = np.zeros((8, 8, 2), np.float32)
    places = {"wide": (slice(2, 6), [0, 1, 6, 7]), "tall": ([0, 1, 6, 7], slice(2, 6))}
    for i, name in enumerate(classes):
        kernel[(*places[name], i)] = 1
    path.write_bytes(content(kernel.reshape(64, 2)))
    some = np.zeros((4, 8, 8, 1), np.float32)
    some[:, 3:5] = 1
    record.write(path, onnx.load(path, 1), [(some,)], request=record.Image(), classes=classes)


def test_a_drawing_is_answered_and_explained_after_the_token_is_given(tmp_path):
    strokes(tmp_path / "net.onnx", "wide", "tall")
    with listening(tmp_path / "net.onnx", "open") as port, Browser() as page:
        page.visit(f"http://127.0.0.1:{port}/")
        assert "shows no token" in page.until(text("error"))
        assert not page.value(shown("pad"))
        page.value("document.getElementById('token').value = 'open'")
        page.value("document.getElementById('go').click()")
        page.until(shown("pad"))
        assert page.until(text("error")) == "Draw something, or choose an image."
        for points, answer in (
            ([(0.2, 0.3), (0.4, 0.3), (0.6, 0.3)], "wide"),
            ([(0.3, 0.2), (0.3, 0.5), (0.3, 0.9)], "tall"),
        ):
            page.value("document.getElementById('clear').click()")
            assert not page.value(shown("looked"))
            page.draw("document.getElementById('pad')", points)
            page.until(shown("heat"))
            assert page.value(text("answer")) == answer
            assert float(page.value(text("confidence")).split()[-2]) > 75
            assert page.value(text("error")) == ""
            # The score falls where the ends of the stroke are hidden: they are red, the middle is not.
            pixel = "Array.from(document.getElementById('heat').getContext('2d').getImageData({}, {}, 1, 1).data)"
            end = (30, 280) if answer == "wide" else (280, 30)
            red, green, *_ = page.value(pixel.format(*end))
            assert red > green + 50
            red, green, *_ = page.value(pixel.format(280, 280))
            assert red < green + 50


def test_a_new_file_is_shown_with_its_own_classes(tmp_path):
    strokes(tmp_path / "net.onnx", "wide", "tall")
    with listening(tmp_path / "net.onnx") as port, Browser() as page:
        page.visit(f"http://127.0.0.1:{port}/")
        page.until(shown("pad"))
        page.draw("document.getElementById('pad')", [(0.2, 0.3), (0.6, 0.3)])
        page.until(shown("heat"))
        before = page.value(text("model"))
        strokes(tmp_path / "net.onnx", "tall", "wide")
        until = time.monotonic() + 20
        while page.value(text("model")) == before:
            assert time.monotonic() < until
            page.value("document.getElementById('go').click()")
            page.until(shown("heat"))
        assert page.value(text("answer")) == "wide"
        assert page.value(rows)[0].startswith("wide 9")


def test_a_sentence_is_answered_and_an_error_takes_the_place_of_the_answer():
    def predict(inputs):
        [ids] = inputs
        return [np.stack([(ids == 2).sum(1), (ids == 3).sum(1), 0 * ids[:, 0]], 1).astype(np.float32) * 4]

    with listening(model(predict, (4,), "int32", record.Text(("good", "bad")))) as port, Browser() as page:
        page.visit(f"http://127.0.0.1:{port}/")
        page.until(shown("text"))
        page.value("document.getElementById('text').value = 'a bad Film'")
        page.value("document.getElementById('go').click()")
        page.until(shown("words"))
        assert page.value(text("answer")) == CLASSES[1]
        colours = (
            "Array.from(document.querySelectorAll('#words span'), each => [each.innerText, each.style.background])"
        )
        assert [(word, "0.6" in colour) for word, colour in page.value(colours)] == [
            ("a", False),
            ("bad", True),  # without it the score falls
            ("Film", False),
        ]
        page.value("document.getElementById('text').value = 'a b c d e'")
        page.value("document.getElementById('go').click()")
        assert page.until(text("error")) == "a text of 5 words, expected 1 to 4 between blanks; cut it"
        assert page.value(f"[{text('answer')}, {text('confidence')}, {text('bars')}, {shown('looked')}]") == [
            *("–", "", "", False)
        ]


def test_a_file_with_an_image_and_one_with_a_recording_are_answered(tmp_path):
    strokes(tmp_path / "net.onnx", "wide", "tall")
    picture = np.zeros((80, 80), np.uint8)
    picture[10:70, 35:45] = 255
    (tmp_path / "tall.png").write_bytes(png(picture))
    with wave.open(str(tmp_path / "loud.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.full(40, 16384, "<i2").tobytes())
    loud = model(lambda inputs: [8 * np.stack([inputs[0].mean(1) - 0.2, 0.2 - inputs[0].mean(1), inputs[0].min(1)], 1)],
                 (50,), request=record.Audio(8000))  # fmt: skip
    with Browser() as page:
        for served, file, answer in (
            (tmp_path / "net.onnx", "tall.png", "tall"),
            (loud, "loud.wav", CLASSES[0]),
        ):
            with listening(served) as port:
                page.visit(f"http://127.0.0.1:{port}/")
                page.until(shown("file"))
                page.choose("document.getElementById('file')", tmp_path / file)
                page.until(shown("heat"))
                assert page.value(text("answer")) == answer
                assert page.value(text("error")) == ""
