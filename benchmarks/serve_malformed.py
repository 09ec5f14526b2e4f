"""Requests that are not as they should be, for benchmarks/serve.py, and what a server says of them."""

import asyncio
import collections
import contextlib
import json
import re
from collections.abc import Sequence

from benchmarks.serve_clients import request

STRANGERS = 32  # clients that send malformed requests
QUIET = 0.5  # seconds
STATUS = re.compile(rb"(?:HTTP/1.1 1.*?\r\n\r\n)*HTTP/1.1 ([2-5]..) ", re.DOTALL)  # the first but "100 Continue"


def drawn(n: int, some: Sequence[bytes]) -> list[bytes]:
    """What Hypothesis draws, the same at each call: requests that are mostly not as they should be.

    `some` are good requests, whose images are damaged.
    """
    import hypothesis
    from hypothesis import strategies as st

    images = [each.partition(b"\r\n\r\n")[2] for each in some]
    words = st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=20)
    values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9), st.lists)
    rows = st.one_of(values.map(lambda x: json.dumps({"inputs": x})), values.map(json.dumps)).map(str.encode)
    damaged = st.tuples(st.sampled_from(images), st.integers(0, 2000), st.binary(max_size=9)).map(
        lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + len(x[2]) :]
    )
    bodies = st.one_of(st.binary(max_size=300), rows, damaged, damaged.map(lambda x: x[: len(x) // 2]))
    paths = st.sampled_from(["/predict", "/explain", "/model", "/health", "/health/live", "/metrics", "/"]) | words.map(
        "/".__add__
    )
    kinds = st.sampled_from(["application/json", "image/png", "audio/wav", "text/plain", ""]) | words
    close = "Connection: close\r\n"
    wellformed = st.builds(
        request, st.sampled_from(["POST"] * 5 + ["GET", "PUT", "HEAD"]), paths, kinds, bodies, st.just(close)
    )
    more = words.map(lambda x: f"X: {x}\r\n") | st.sampled_from(
        [
            "Transfer-Encoding: chunked\r\n",
            "Content-Length: -1\r\n",
            "Expect: 100-continue\r\n",
            "Upgrade: websocket\r\n",
        ]
    )
    odd = st.builds(request, st.sampled_from(["POST"]) | words, paths, kinds, bodies, more.map(close.__add__))
    cut = st.tuples(wellformed, st.integers(0, 400)).map(lambda x: x[0][: x[1]])
    found: list[bytes] = []

    @hypothesis.settings(
        max_examples=n,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
    @hypothesis.given(st.one_of(wellformed, wellformed, odd, cut, st.binary(max_size=300)))
    def collect(each: bytes) -> None:
        found.append(each)

    collect()
    return found


async def malformed(port: int, requests: Sequence[bytes], patience: float) -> collections.Counter[str]:
    """How many requests got each status; "none" is that of a connection that was closed without one.

    A connection is half closed by the client once it has heard nothing for `QUIET` seconds: much of this is unfinished.
    Raises TimeoutError where it then is not ended within `patience` seconds.
    """
    statuses: collections.Counter[str] = collections.Counter()
    shared = iter(requests)

    async def client() -> None:
        for each in shared:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(each)
            reading = asyncio.create_task(reader.read())
            await asyncio.wait([reading], timeout=QUIET)
            content = b""
            with contextlib.suppress(OSError):
                if not reading.done():
                    writer.write_eof()
                content = await asyncio.wait_for(reading, patience)
            status = STATUS.match(content)
            statuses[status[1].decode() if status else "none"] += 1
            writer.close()

    await asyncio.gather(*(client() for _ in range(STRANGERS)))
    return statuses
