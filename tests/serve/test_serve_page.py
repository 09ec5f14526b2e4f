"""The page in a browser."""

import numpy as np
import pytest
from browser import Browser, program
from serve_files import content, listening

from dl_jax.export import onnx, record

pytestmark = pytest.mark.skipif(program() is None, reason="needs Chromium (apt-get install chromium)")


def strokes(path):
    """Writes a classifier of 8x8 drawings: wide ones have ink at the left and the right, tall ones above and below."""
    kernel = np.zeros((8, 8, 2), np.float32)
    kernel[2:6, [0, 1, 6, 7], 0] = kernel[[0, 1, 6, 7], 2:6, 1] = 1
    path.write_bytes(content(kernel.reshape(64, 2)))
    some = np.zeros((4, 8, 8, 1), np.float32)
    some[:, 3:5] = 1
    record.write(path, onnx.load(path, 1), [(some,)], request=record.Image(), classes=("wide", "tall"))


def test_a_drawing_is_answered_and_explained_after_the_token_is_given(tmp_path):
    strokes(tmp_path / "net.onnx")
    text = lambda name: f"document.getElementById('{name}').textContent"
    shown = lambda name: f"document.getElementById('{name}').getClientRects().length > 0"
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
