"""Clients of a server, for benchmarks/serve.py: they ask for answers over connections that stay open."""

import asyncio
import collections
import io
import itertools
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGES = 16  # different ones, asked for in turn


class Load:
    """What clients saw."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of each request until its answer
        self.statuses: collections.Counter[int] = collections.Counter()
        self.versions: collections.Counter[str] = collections.Counter()  # of the models that answered
        self.again = 0  # requests that were sent once more
        self.lost = 0  # requests without an answer

    @property
    def requests(self) -> int:
        return self.statuses.total() + self.lost

    @property
    def wrong(self) -> int:
        """Requests without the answer that they should get."""
        return self.lost + sum(n for status, n in self.statuses.items() if status != 200)

    def milliseconds(self, percent: float) -> float:
        return 1000 * float(np.percentile(self.seconds, percent))


class Answer(NamedTuple):
    status: int
    body: bytes
    last: bool  # of its connection


Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(link: Link, message: bytes) -> Answer:
    """The answer to a request over an open connection. Raises OSError or EOFError where it ends before."""
    reader, writer = link
    writer.write(message)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = re.search(rb"content-length: (\d+)", head)
    assert length
    body = await reader.readexactly(int(length[1]))
    return Answer(int(head[9:12]), body, b"connection: close" in head)


async def load(port: int, messages: Iterable[bytes], clients: int, pause: float | None = None) -> Load:
    """Sends all messages, from so many clients at a time.

    With `pause`, a request without an answer is sent once more after so many seconds, over a new connection.
    """
    found, shared = Load(), iter(messages)
    await asyncio.gather(*(client(port, shared, found, pause) for _ in range(clients)))
    return found


async def client(port: int, messages: Iterator[bytes], found: Load, pause: float | None) -> None:
    link: Link | None = None
    for message in messages:
        began = time.perf_counter()
        for attempt in range(1 if pause is None else 2):
            if attempt:
                found.again += 1
                await asyncio.sleep(pause or 0)
            try:
                link = link or await asyncio.open_connection("127.0.0.1", port)
                answer = await ask(link, message)
            except (OSError, EOFError):
                link = closed(link)
                continue
            found.seconds.append(time.perf_counter() - began)
            found.statuses[answer.status] += 1
            if version := re.match(rb'{"model": "(\w+)"', answer.body):
                found.versions[version[1].decode()] += 1
            link = closed(link) if answer.last else link
            break
        else:
            found.lost += 1
    closed(link)


def closed(link: Link | None) -> None:
    if link:
        link[1].close()


def messages(file: Path) -> list[bytes]:
    """Requests for an image each."""
    shape = json.loads(Path(f"{file}.json").read_text())["inputs"][0]["shape"]
    return [request("POST", "/predict", "image/png", body) for body in pngs(*shape[1:])]


def pngs(height: int, width: int, channels: int) -> list[bytes]:
    import PIL.Image

    draw, found = np.random.default_rng(0), []
    for _ in range(IMAGES):
        pixels = draw.integers(0, 256, (height, width, channels), np.uint8)
        PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file := io.BytesIO(), "PNG")
        found.append(file.getvalue())
    return found


def request(method: str, path: str, kind: str, body: bytes, more: str = "") -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: here\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    )
    return head.encode("latin-1") + body


def repeated(some: Sequence[bytes], n: int) -> Iterator[bytes]:
    return itertools.islice(itertools.cycle(some), n)
