"""uvicorn with a service, until SIGTERM or Ctrl-C."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dl_jax.serve.app import Service, app

HEAD = 65_536  # bytes of a request beside its body
DRAIN = 0.3  # seconds in which connections that are open may still send a request, after a signal
GRACE = 5.0  # seconds beyond the timeout of a request, after which an end no longer waits for it


class Protocol(HttpToolsProtocol):
    """HTTP whose requests have at most `HEAD` bytes beside the body, such as headers: its parser would take any number.

    Pieces of `chunked` bodies come with some bytes each, which count too.
    """

    head = 0  # bytes of the request that were read so far and are not of its body

    def data_received(self, data: bytes) -> None:
        self.head += len(data)
        super().data_received(data)
        if self.head > HEAD and not self.transport.is_closing():
            self.send_400_response(f"a request with more than {HEAD} bytes beside its body; send fewer headers")

    def on_body(self, body: bytes) -> None:
        self.head -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.head = 0
        super().on_message_complete()


class Server(uvicorn.Server):
    """uvicorn, which says when it listens, and after a signal ends in the usual way, without raising it again.

    uvicorn closes a connection at once if its request was not read yet. Here what is connected may send one more, whose
    answer says that the connection is closed.
    """

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started
        config.app = self._last(config.app)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await asyncio.sleep(DRAIN)
        await super().shutdown(sockets)

    def _last(self, app: Any) -> Any:
        """The application, whose answers say after a signal that they are the last ones of their connections."""

        async def called(scope: Any, receive: Any, send: Any) -> None:
            async def marked(message: Any) -> None:
                if message["type"] == "http.response.start" and self.should_exit:
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
                await send(message)

            await app(scope, receive, marked)

        return called

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def run(service: Service, place: socket.socket) -> None:
    """Answers requests at `place` until a signal; then those that were sent, and returns."""
    host, port = place.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    found = service.model.record
    line = (
        f"serving {service.settings.file} ({found.format}, {found.bytes} bytes, {service.model.version}) at {address}"
    )
    config = uvicorn.Config(
        app(service),
        loop="auto",  # uvloop where it is installed
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client would choose whose rate it uses up
        timeout_graceful_shutdown=round(service.settings.timeout + GRACE),
    )
    Server(config, lambda: service.log(line)).run([place])
    service.log("ended")
