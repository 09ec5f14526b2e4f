"""`python -m dl_jax.serve FILE`."""

import contextlib
import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dl_jax.core.errors import InputError, exit_status, not_installed, reason, require_positive

if TYPE_CHECKING:
    from dl_jax.serve.app import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LONGEST = 3600  # seconds of a request
MOST = {"--batch": 4096, "--concurrency": 65_536, "--threads": 256}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Predict over HTTP with a file that this project exported (ONNX, LiteRT, StableHLO).

    POST /predict answers, /health and /metrics tell how it goes, and / is a page to try it. A new file of the same
    inputs is taken over while requests are answered; SIGTERM answers what was asked and ends.
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """The file, with its record beside it (FILE.json)."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own need a token."""
    token: str = ""
    """What requests have to show: Authorization: Bearer TOKEN. Other users of the machine see it; prefer a file."""
    token_file: str = ""
    """A file with the token."""
    batch: int = 32
    """Rows of a call of the model, and of a request."""
    wait: float = 2.0
    """Milliseconds that a request waits for others that are under way, to be answered together."""
    timeout: float = 10.0
    """Seconds until a request is given up."""
    max_bytes: int = 4_000_000
    """Bytes of a request."""
    concurrency: int = 64
    """Requests that are answered at a time."""
    rate: float | None = None
    """Requests a second of each client; by default as many as it sends."""
    threads: int = 1
    """Threads of ONNX Runtime."""


def checked(flags: Flags) -> str | None:
    """The token of the flags. Raises InputError for bad ones."""
    at_least_one = {"--batch": flags.batch, "--concurrency": flags.concurrency, "--threads": flags.threads}
    require_positive({**at_least_one, "--max-bytes": flags.max_bytes})
    for name, given in at_least_one.items():
        if given > MOST[name]:
            raise InputError(f"{name} is {given}, expected at most {MOST[name]}; give fewer")
    if not 0 < flags.timeout <= LONGEST:
        raise InputError(f"--timeout is {flags.timeout:g} s, expected more than 0 and at most {LONGEST}; give another")
    if flags.rate is not None:
        require_positive({"--rate": flags.rate})
    if not 0 <= flags.wait < 1000 * flags.timeout:
        raise InputError(f"--wait is {flags.wait:g} ms, expected 0 or more and less than --timeout; give fewer")
    if not 0 <= flags.port < 65536:
        raise InputError(f"--port is {flags.port}, expected 0 to 65535; give another")
    if flags.token and flags.token_file:
        raise InputError("both --token and --token-file are given, expected one; leave one out")
    token = _read_token(flags.token_file) if flags.token_file else flags.token
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError("the token has blanks or characters beyond ASCII, expected neither; choose another")
    if not token and flags.host not in LOOPBACK:
        raise InputError(f"--host {flags.host} is open to others, expected a token for it; give --token-file")
    return token or None


def _read_token(path: str) -> str:
    try:
        token = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--token-file {path} cannot be read ({reason(e)}); write the token to it") from e
    if not token:
        raise InputError(f"--token-file {path} is empty, expected a token; write one to it")
    return token


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises InputError where it is in use or none of this machine.

    Its connections send at once: an answer is a head and a body, and the kernel would keep the second back until the
    client acknowledges the first, which takes 40 ms. asyncio sets this only for sockets that it made itself.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise InputError(f"--host {host} is no address ({reason(e)}); give one of this machine, or 0.0.0.0") from e
    try:
        place = socket.create_server((host, port), family=family, backlog=2048)
        place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        return place
    except OSError as e:
        why = os.strerror(e.errno) if e.errno else reason(e)  # of a few words
        raise InputError(
            f"cannot listen on port {port} of {host} ({why}); choose another --port, or 0 for any that is free"
        ) from e


def serve(flags: Flags) -> None:
    """Answers requests until it is asked to end. Raises InputError for bad flags or a bad file."""
    token = checked(flags)
    # Connections wait for the imports, which take a second.
    with contextlib.closing(listening(flags.host, flags.port)) as place:
        try:
            from dl_jax.serve import app, runtime, server
        except ImportError as e:
            raise not_installed("a server", e, "serve") from e

        model = runtime.opened(flags.file, flags.batch, flags.threads)
        server.run(app.Service(model, settings(flags, token), _log), place)


def settings(flags: Flags, token: str | None) -> "Settings":
    """What the flags say, for a service."""
    from dl_jax.serve.app import Settings

    return Settings(
        file=flags.file,
        token=token,
        largest=flags.batch,
        wait=flags.wait / 1000,
        timeout=flags.timeout,
        max_bytes=flags.max_bytes,
        concurrency=flags.concurrency,
        rate=flags.rate,
        threads=flags.threads,
    )


def _log(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    return exit_status(lambda: serve(tyro.cli(Flags, prog="python -m dl_jax.serve")))


if __name__ == "__main__":
    sys.exit(main())
