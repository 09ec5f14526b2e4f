"""The service: the routes, what is refused, and a new file that takes the place of the old one."""

import asyncio
import concurrent.futures
import contextlib
import hmac
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dl_jax.core.errors import InputError, reason
from dl_jax.export import record
from dl_jax.serve import occlusion, runtime
from dl_jax.serve.batching import Batcher
from dl_jax.serve.decode import JSON, TYPES, TooLarge, Unsupported, decoded
from dl_jax.serve.drift import Window
from dl_jax.serve.limits import Rates
from dl_jax.serve.metrics import Metrics
from dl_jax.serve.runtime import Model

PAGE = Path(__file__).with_name("page.html")
DECODERS = 2  # requests that are decoded at a time, each with all the memory that an image takes
POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:"


class Settings(NamedTuple):
    """What a service is told."""

    file: str
    token: str | None  # that a request has to show
    largest: int  # rows of a call, and of a request
    wait: float  # seconds that a request waits for others
    timeout: float  # seconds until a request is given up
    max_bytes: int  # of a body
    concurrency: int  # requests that are worked on
    rate: float | None  # requests a second of a client
    threads: int  # of ONNX Runtime
    poll: float = 1.0  # seconds between two looks at the file


class Refused(Exception):
    """A request that gets this status and one line."""

    def __init__(self, status: int, line: str, headers: dict[str, str]) -> None:
        super().__init__(line)
        self.status, self.headers = status, headers


class Replaced(Exception):
    """Another model answered than the one for which a request was decoded."""


Work = Callable[[Model, list[np.ndarray]], Awaitable[dict[str, Any]]]  # a model and inputs for it -> what is answered


class Service:
    """A model that answers, and what is known of its requests."""

    def __init__(self, model: Model, settings: Settings, log: Callable[[str], None]) -> None:
        self.model, self.settings, self.log = model, settings, log
        self._window = Window(model.record)
        self._rates = Rates(settings.rate) if settings.rate else None
        self._running = 0
        self.metrics = Metrics(lambda: self._window.drift(), lambda: self._running)
        self.metrics.show(model)
        self._batcher: Batcher
        self._decoders: concurrent.futures.ThreadPoolExecutor

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """A context in which requests are answered and the file is looked after."""
        self._batcher = Batcher(
            lambda: self.model,
            self.settings.largest,
            self.settings.wait,
            self.metrics.rows.observe,
            lambda: self._running,
        )
        self._decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, "decode")
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            self._decoders.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self._batcher.close, self.settings.timeout)

    def health(self) -> dict[str, Any]:
        """Whether it is live: no call of the model has stopped or hangs; and ready: live, and not at its limit."""
        live = self._batcher.alive(self.settings.timeout)
        ready = live and self._running < self.settings.concurrency
        return {"live": live, "ready": ready, "model": self.model.version}

    def described(self) -> dict[str, Any]:
        """What a client has to know of the model."""
        found = self.model.record
        inputs = [{"shape": [None, *each.shape[1:]], "dtype": each.dtype} for each in found.inputs]
        return {
            "model": self.model.version,
            "format": found.format,
            "request": {
                "kind": found.request.KIND,
                "types": [*TYPES[found.request.KIND][:1], JSON],
                "filled": getattr(found.request, "filled", None),
            },
            "inputs": inputs,
            "classes": list(found.classes),
        }

    def require_token(self, request: Request) -> None:
        """Raises Refused for a request without the token."""
        given, token = request.headers.get("authorization", ""), self.settings.token
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            line = "the request shows no token, or another one; send Authorization: Bearer TOKEN"
            raise Refused(401, line, {"WWW-Authenticate": "Bearer"})

    async def answer(self, request: Request, work: Work) -> Response:
        """What `work` makes of the inputs of a request, or a line that says why there is no answer."""
        began, path = time.monotonic(), request.url.path
        self._running += 1
        try:
            response = await self._answer(request, work)
        finally:
            self._running -= 1
        self.metrics.requests.labels(path, response.status_code).inc()
        self.metrics.seconds.labels(path).observe(time.monotonic() - began)
        return response

    async def _answer(self, request: Request, work: Work) -> Response:
        limits = self.settings
        try:
            self._admit(request)
            async with asyncio.timeout(limits.timeout):
                body = await _body(request, limits.max_bytes)
                kind = request.headers.get("content-type", "")
                while True:
                    model = self.model
                    decoding = self._decoders.submit(decoded, body, kind, model.record, limits.largest)
                    inputs = await asyncio.wrap_future(decoding)
                    with contextlib.suppress(Replaced):  # the new model may have other words: decoded anew for it
                        return _json(await work(model, inputs))
        except Refused as error:
            return _refusal(error)
        except TimeoutError:
            return _line(504, f"no answer within {limits.timeout:g} s; try again later, or send less", {})
        except ClientDisconnect:
            return _line(400, "the request ended before its body did", {})
        except Unsupported as error:
            return _line(415, str(error), {})
        except TooLarge as error:
            return _line(413, str(error), {})
        except InputError as error:
            return _line(400, str(error), {})
        except Exception as error:  # a service goes on
            self.log(f"error: a request failed: {type(error).__name__}: {reason(error)[:200]}")
            return _line(500, "the model failed at this request", {})

    def _admit(self, request: Request) -> None:
        client, limits = request.client.host if request.client else "", self.settings
        if self._rates and (wait := self._rates.wait(client, time.monotonic())):
            later = {"Retry-After": str(math.ceil(wait))}
            raise Refused(429, f"more than {limits.rate:g} requests a second; send fewer", later)
        self.require_token(request)
        if self._running > limits.concurrency:
            later = {"Retry-After": "1"}
            raise Refused(503, f"{limits.concurrency} requests are being answered; try again later", later)

    async def predict(self, model: Model, inputs: list[np.ndarray]) -> dict[str, Any]:
        """The answers of the model to the rows of a request."""
        outputs = await self._outputs(model, inputs)
        if model is self.model:
            self._window.add(inputs[0], outputs[0])
        found = _answers(model, outputs)
        for each in found.get("answers", ()):
            self.metrics.answers.labels(each["class"]).inc()
        return {"model": model.version, **found}

    async def explain(self, model: Model, inputs: list[np.ndarray]) -> dict[str, Any]:
        """The answer to one row, and by how much its logit falls where parts of the row are hidden."""
        found = model.record
        if not found.classes or found.request.KIND == record.Arrays.KIND or len(inputs[0]) != 1:
            raise InputError(
                "only a single image, recording or text that has a class can be explained; send one to a classifier"
            )
        logits, *_ = await self._outputs(model, inputs)
        best = int(logits[0].argmax())
        hidden = occlusion.hidden(found.request, inputs[0][0])
        falls: list[np.ndarray] = []
        while part := list(itertools.islice(hidden.copies, self.settings.largest)):
            scores, *_ = await self._outputs(model, [np.stack(part)])
            falls.append(logits[0, best] - scores[:, best])
        return {
            "model": model.version,
            "answer": _answers(model, [logits])["answers"][0],
            "map": np.concatenate(falls).reshape(hidden.shape).tolist(),
            "size": hidden.size,
            "stride": hidden.stride,
        }

    async def _outputs(self, model: Model, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Raises Replaced where another model answered, and InputError where the answer is not finite."""
        other, outputs = await asyncio.wrap_future(self._batcher.submit(inputs))
        if other is not model:
            raise Replaced
        if not all(np.isfinite(each).all() for each in outputs):
            raise InputError("the answer is not finite; send inputs like those that the model was trained with")
        return outputs

    async def _watch(self) -> None:
        """Takes over a new file once it and its record have stopped changing."""
        known = before = self.model.stamp
        while True:
            await asyncio.sleep(self.settings.poll)
            now = runtime.stamp(self.settings.file)
            if now != known and now == before:
                known = now
                await self._take_over()
            before = now

    async def _take_over(self) -> None:
        path, limits = self.settings.file, self.settings
        try:
            new = await asyncio.to_thread(runtime.taken_over, self.model, path, limits.largest, limits.threads)
        except Exception as error:  # damage takes any form
            self.metrics.swaps.labels("refused").inc()
            self.log(f"the new {path} is not taken over, {self.model.version} stays: {reason(error)}")
            return
        old, self.model, self._window = self.model, new, Window(new.record)
        self.metrics.swaps.labels("taken").inc()
        self.metrics.show(new)
        what = f"{new.version} instead of {old.version}" if new.version != old.version else "another record"
        self.log(f"took over the new {path}: {what}")


def app(service: Service) -> FastAPI:
    """The routes of a service."""
    made = FastAPI(
        title="dl_jax.serve", openapi_url=None, docs_url=None, redoc_url=None, lifespan=service.running
    )  # documentation would load scripts from elsewhere

    @made.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return _line(
            error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}", dict(error.headers or {})
        )

    @made.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _refusal(error)

    @made.post("/predict")
    async def predict(request: Request) -> Response:
        return await service.answer(request, service.predict)

    @made.post("/explain")
    async def explain(request: Request) -> Response:
        return await service.answer(request, service.explain)

    @made.get("/health")
    async def health() -> Response:
        found = service.health()
        return _json(found, 200 if found["ready"] else 503)

    @made.get("/health/live")
    async def live() -> Response:
        found = service.health()
        return _json(found, 200 if found["live"] else 503)

    @made.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.require_token(request)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @made.get("/model")
    async def model(request: Request) -> Response:
        service.require_token(request)
        return _json(service.described())

    @made.get("/")
    async def page() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    return made


async def _body(request: Request, most: int) -> bytes:
    """Raises TooLarge for a body of more than `most` bytes, at once where its header says so."""
    line = f"a body of more than {most} bytes, expected at most that; send less"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise TooLarge(line)
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > most:
            raise TooLarge(line)
    return b"".join(parts)


def _answers(model: Model, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
    classes = model.record.classes
    if not classes:
        return {"outputs": [each.tolist() for each in outputs]}
    rows = record.probabilities(outputs[0])
    return {
        "answers": [
            {"class": classes[row.argmax()], "confidence": float(row.max()), "probabilities": row.tolist()}
            for row in rows
        ]
    }


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type=JSON)


def _line(status: int, line: str, headers: dict[str, str]) -> Response:
    return _json({"error": line}, status, headers)


def _refusal(error: Refused) -> Response:
    return _line(error.status, str(error), error.headers)
