"""Chromium without a window, driven over two pipes by the DevTools protocol."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")


def program() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser; a context, which ends it."""

    def __init__(self, width: int = 1000, height: int = 700) -> None:
        found = program()
        assert found
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (take, self._write), (self._read, give) = os.pipe(), os.pipe()
        flags = [*FLAGS, f"--user-data-dir={self._folder.name}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen(  # the browser reads from descriptor 3 and writes to 4
            ["bash", "-c", f'exec "$0" "$@" 3<&{take} 4>&{give}', found, *flags],
            pass_fds=(take, give),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(take)
        os.close(give)
        self._numbers, self._rest = itertools.count(1), b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a method of the protocol."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": parameters, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser ended"
            self._rest += data
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def visit(self, url: str) -> None:
        """Opens an address, and waits until its scripts have run."""
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Of an expression of JavaScript on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 30.0) -> Any:
        """The first value of the expression that is true."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"{expression} did not become true: {self.value('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def draw(self, element: str, points: Sequence[tuple[float, float]]) -> None:
        """Moves the pressed mouse along points, in shares of the element's width and height."""
        script = f"(({{left, top, width, height}}) => [left, top, width, height])({element}.getBoundingClientRect())"
        left, top, width, height = self.value(script)
        places = [(left + x * width, top + y * height) for x, y in points]
        moves = [("mousePressed", places[0]), *(("mouseMoved", each) for each in places), ("mouseReleased", places[-1])]
        for kind, (x, y) in moves:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def choose(self, element: str, file: Path) -> None:
        """Gives a file to an input of the page."""
        found = self.call("Runtime.evaluate", expression=element)["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=found)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
