"""The server as a process: its end under load, bad input, and the commands of the guide."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from serve_files import CLASSES, exported, images, listening, png

import dl_jax.serve
from dl_jax.core.errors import InputError
from dl_jax.export import record
from dl_jax.serve import __main__ as command
from dl_jax.serve import server

ROOT = Path(__file__).parents[2]
# Starts the command line, and says at its end whether JAX was imported.
PROGRAM = """
import sys
from dl_jax.serve.__main__ import main
status = main()
print("jax" in sys.modules)
sys.exit(status)
"""


@contextlib.contextmanager
def serving(*flags: str):
    """A process that serves, and its port."""
    words = [sys.executable, "-c", PROGRAM, *flags, "--port", "0"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, line + process.stdout.read()
        yield process, int(line.rpartition(":")[2]), line
    finally:
        process.kill()
        process.communicate()


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict]:
    with kept_open(port) as connection:
        connection.request("POST", "/predict", body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def kept_open(port: int):
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20))


def test_what_was_asked_before_sigterm_is_answered(tmp_path):
    """Requests wait for another one, half of which was sent, when the signal comes; the rest of it comes later.

    A connection that is only kept open does not hold the end up.
    """
    exported(tmp_path / "net.onnx")
    (tmp_path / "token").write_text("hidden-word\n")
    body = json.dumps({"inputs": images(1).tolist()}).encode()
    flags = (str(tmp_path / "net.onnx"), "--wait", "700", "--token-file", str(tmp_path / "token"))
    with (
        serving(*flags) as (process, port, first),
        concurrent.futures.ThreadPoolExecutor(12) as threads,
        kept_open(port) as idle,
        kept_open(port) as metrics,
        kept_open(port) as half,
    ):
        half.putrequest("POST", "/predict")
        for name, value in {"Content-Type": "application/json", "Authorization": "Bearer hidden-word"}.items():
            half.putheader(name, value)
        half.putheader("Content-Length", str(len(body)))
        half.endheaders(body[:100])
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        asked = [threads.submit(post, port, body, Authorization="Bearer hidden-word") for _ in range(12)]
        until = time.monotonic() + 10
        while time.monotonic() < until:  # all have arrived, none is answered
            metrics.request("GET", "/metrics", headers={"Authorization": "Bearer hidden-word"})
            if b"dl_jax_requests_running 13.0" in metrics.getresponse().read():
                break
        assert not any(each.done() for each in asked)
        process.send_signal(signal.SIGTERM)
        idle.request("GET", "/health")  # an open connection may send one more
        last = idle.getresponse()
        assert (last.status, last.getheader("connection")) == (200, "close")
        half.send(body[100:])
        last = half.getresponse()
        assert (last.status, last.getheader("connection")) == (200, "close")
        assert {each.result()[0] for each in asked} == {200}
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        with pytest.raises(ConnectionRefusedError):
            post(port, body)
    assert rest == "ended\nFalse\n"  # an ONNX file is served without JAX
    assert "hidden-word" not in first + rest


def test_headers_without_an_end_are_refused_before_they_take_memory(tmp_path):
    exported(tmp_path / "net.onnx")
    with serving(str(tmp_path / "net.onnx")) as (process, port, _):
        memory = lambda: int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[0])
        before = memory()
        for many in (b"X: " + b"a" * 20_000_000, b"X: a\r\n" * 3_000_000, b"POST / HTTP/1.1\r\n" * 2_000_000):
            with (
                contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as link,
                pytest.raises(OSError, match=r"reset|[Bb]roken"),  # it is closed before all is sent
            ):
                link.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n" + many)
        assert memory() < before + 8000  # kB
        with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as link:
            link.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\nX: " + b"a" * server.HEAD)
            assert link.recv(1000).endswith(b"more than 65536 bytes beside its body; send fewer headers")
        body = json.dumps({"inputs": images(32).tolist()}).encode()
        with kept_open(port) as link:
            for _ in range(9):  # bodies of any size, and many requests over a connection, are no headers
                link.request("POST", "/predict", body, {"Content-Type": "application/json", "X": "a" * 9000})
                answer = link.getresponse()
                assert (answer.status, len(json.loads(answer.read())["answers"])) == (200, 32)


def refused(capsys, *flags: str) -> str:
    """The one line of the command line, which ends with status 2."""
    before, sys.argv = sys.argv, ["serve", *flags]
    try:
        assert command.main() == 2
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    file = tmp_path / "net.onnx"
    exported(file)
    good = str(file)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on port {port} of 127.0.0.1 (Address already in use)" in refused(
            capsys, good, "--port", port
        )
    (tmp_path / "empty").touch()
    for flags, expected in {
        (str(tmp_path / "none.onnx"),): "none.onnx (No such file or directory)",
        (str(tmp_path),): "(Is a directory)",
        (str(tmp_path / "empty"),): "empty has no record empty.json beside it",
        (good, "--port", "70000"): "--port is 70000, expected 0 to 65535",
        (good, "--host", "0.0.0.0"): "--host 0.0.0.0 is open to others, expected a token",
        (good, "--host", "256.0.0.1", "--token", "a"): "--host 256.0.0.1 is no address",
        (good, "--host", "192.0.2.1", "--token", "a"): "cannot listen on port 8000 of 192.0.2.1",
        (good, "--batch", "1000000000"): "--batch is 1000000000, expected at most 4096",
        (good, "--threads", "100000"): "--threads is 100000, expected at most 256",
        (good, "--batch", "0"): "--batch is 0, expected more than 0",
        (good, "--rate", "-1"): "--rate is -1.0, expected more than 0",
        (good, "--timeout", "inf"): "--timeout is inf s, expected more than 0 and at most 3600",
        (good, "--wait", "20000"): "--wait is 20000 ms, expected 0 or more and less than --timeout",
        (good, "--token", "a", "--token-file", "b"): "both --token and --token-file are given",
        (good, "--token-file", str(tmp_path / "no")): "cannot be read (No such file or directory)",
        (good, "--token-file", str(tmp_path / "empty")): "is empty, expected a token",
        (good, "--token", "a b"): "the token has blanks",
    }.items():
        found = refused(capsys, *flags)
        assert expected in found
        assert "a b" not in found
    file.write_bytes(file.read_bytes()[:-1])
    assert "it was not exported by dl_jax, or is damaged" in refused(capsys, good, "--port", "0")


@pytest.mark.parametrize(
    ("module", "suffix", "expected"),
    [
        ("onnxruntime", "onnx", r"ONNX needs onnxruntime, which is not installed; run: pip install -e '\.\[export\]'"),
        ("ai_edge_litert.interpreter", "tflite", r"LiteRT needs ai-edge-litert, which is not installed; run: pip"),
        ("uvicorn", "onnx", r"a server needs uvicorn, which is not installed; run: pip install -e '\.\[serve\]'"),
    ],
)
def test_a_missing_runtime_is_told_with_its_extra(tmp_path, monkeypatch, module, suffix, expected):
    from dl_jax.export import litert

    exported(tmp_path / "net.onnx")
    file = tmp_path / f"net.{suffix}"
    if suffix == "tflite":
        file.write_bytes(litert._with_digest(litert.HEAD.pack(32, b"TFL3") + b"x" * 100))
        record.write(file, lambda x: x, [(images(2),)], batch=1)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "dl_jax.serve.server", raising=False)
    monkeypatch.delattr(dl_jax.serve, "server", raising=False)
    with pytest.raises(InputError, match=expected):
        command.serve(command.Flags(str(file), port=0))


def test_the_commands_of_the_guide(tmp_path):
    """The lines with curl in docs/guide.md are run as they stand, on another port."""
    guide = (ROOT / "docs/guide.md").read_text()
    section = guide[guide.index("## Serve a file") :]
    section = section[: section.index("\n## ", 1)]
    lines = [line for line in section.splitlines() if line.startswith("curl ")]
    assert len(lines) >= 4
    file = tmp_path / "net.onnx"
    exported(file)
    (tmp_path / "digit.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    (tmp_path / "rows.json").write_text(json.dumps({"inputs": images(2).tolist()}))
    with listening(file) as port:
        found = {}
        for line in lines:
            words = shlex.split(re.sub(r"\s+#.*", "", line).replace(":8000", f":{port}"))
            done = subprocess.run([*words, "--max-time", "20"], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found[line] = done.stdout
    assert all('"error"' not in each for each in found.values())
    predicted = [json.loads(out) for line, out in found.items() if "/predict" in line]
    assert [len(each["answers"]) for each in predicted] == [1, 2]
    assert {answer["class"] for each in predicted for answer in each["answers"]} <= set(CLASSES)
    assert any("dl_jax_requests_total" in out for out in found.values())


def test_connections_do_not_keep_the_body_of_an_answer_back():
    with (
        command.listening("127.0.0.1", 0) as place,
        socket.create_connection(place.getsockname()),
        place.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_connections_wait_while_a_server_starts(tmp_path):
    """It listens before its slow imports, so that who asks during a restart waits instead of being refused."""
    (tmp_path / "fastapi.py").write_text(
        "import sys\nsys.stdin.readline()\nraise ImportError('none', name='fastapi')\n"
    )
    exported(tmp_path / "net.onnx")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "net.onnx"), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 20
        while True:  # the import of fastapi lasts until a line is sent
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < until
            time.sleep(0.01)
        assert process.poll() is None
        _, err = process.communicate(b"go on\n", timeout=20)
    assert process.returncode == 2
    assert b"a server needs fastapi" in err
