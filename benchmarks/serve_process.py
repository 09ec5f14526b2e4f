"""A process that serves, for benchmarks/serve.py: what it costs, and what it prints."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0  # seconds for a process to start or to end
TICKS = os.sysconf("SC_CLK_TCK")


class Server(NamedTuple):
    """A process that serves."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path  # what it printed

    def cpu(self) -> float:
        """Seconds of CPU time until now, of all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def mebibytes(self) -> float:
        """Resident memory."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) / 1024


def started(file: Path, log: Path, flags: Sequence[str] = (), port: int = 0) -> Server:
    """A server that listens. What it prints goes to `log`."""
    words = [sys.executable, "-m", "dl_jax.serve", str(file), "--port", str(port), *flags]
    with open(log, "wb") as out:
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    until = time.monotonic() + PATIENCE
    while not (found := re.search(r" at http://[^ ]*:(\d+)\n", log.read_text())):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            process.wait()
            raise RuntimeError(f"the server did not start: {log.read_text()}")
        time.sleep(0.01)
    return Server(process, int(found[1]), log)


def end(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(PATIENCE)
    finally:
        server.process.kill()
        server.process.wait()


@contextlib.contextmanager
def serving(file: Path, log: Path, flags: Sequence[str] = ()) -> Iterator[Server]:
    server = started(file, log, flags)
    try:
        yield server
    finally:
        end(server)


def complaints(server: Server) -> int:
    """Lines that the server printed of errors, such as the first of a traceback."""
    return len(re.findall("^.*(?:traceback|exception|error).*$", server.log.read_text(), re.IGNORECASE | re.MULTILINE))
