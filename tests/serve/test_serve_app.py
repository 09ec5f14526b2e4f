"""The service within this process: what it answers, refuses, measures, and takes over."""

import asyncio
import contextlib
import json
import threading
import time

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_files import CLASSES, SIDE, exported, images, model, png

from dl_jax import attribution
from dl_jax.export import record
from dl_jax.serve import __main__ as command
from dl_jax.serve import runtime
from dl_jax.serve.app import Service, app
from dl_jax.serve.decode import JSON

KERNEL = np.random.default_rng(3).normal(size=(SIDE * SIDE, 3)).astype(np.float32)
LINEAR = model(lambda inputs: [inputs[0].reshape(len(inputs[0]), -1) @ KERNEL])


@contextlib.asynccontextmanager
async def client(service, **options):
    made = app(service)
    transport = httpx2.ASGITransport(app=made, raise_app_exceptions=True, **options)
    async with service.running(made), httpx2.AsyncClient(transport=transport, base_url="http://here") as found:
        yield found


def service(found=LINEAR, file="net.onnx", log=lambda line: None, **changes):
    return Service(found, command.settings(command.Flags(file), None)._replace(**changes), log)


def asked(of, *requests):
    """The responses to requests (method, path, arguments of httpx2) that are sent at once."""

    async def ask():
        async with client(of) as here:
            return await asyncio.gather(*(here.request(method, path, **more) for method, path, more in requests))

    return asyncio.run(ask())


def rows(x):
    return {"json": {"inputs": np.asarray(x).tolist()}}


def line(response):
    """The one line of a refusal."""
    assert set(response.json()) == {"error"}
    found = response.json()["error"]
    assert "\n" not in found
    return found


def test_answers_are_those_of_the_model():
    some = images(5)
    one, all_, health = asked(
        service(), ("POST", "/predict", rows(some[:1])), ("POST", "/predict", rows(some)), ("GET", "/health", {})
    )
    logits = some.reshape(5, -1).astype(np.float64) @ KERNEL
    powers = np.exp(logits - logits.max(1, keepdims=True))
    expected = powers / powers.sum(1, keepdims=True)
    answers = all_.json()["answers"]
    assert [each["class"] for each in answers] == [CLASSES[i] for i in expected.argmax(1)]
    np.testing.assert_allclose([each["probabilities"] for each in answers], expected, rtol=1e-4)
    np.testing.assert_allclose([each["confidence"] for each in answers], expected.max(1), rtol=1e-4)
    assert one.json()["answers"][0]["class"] == answers[0]["class"]
    assert health.json() == {"live": True, "ready": True, "model": "0" * 12}


def test_a_png_and_arrays_get_the_same_answer():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    image = {"content": png(pixels), "headers": {"content-type": "image/png"}}
    first, second = asked(
        service(), ("POST", "/predict", image), ("POST", "/predict", rows((pixels / 255)[None, :, :, None]))
    )
    assert first.json()["answers"][0]["probabilities"] == pytest.approx(
        second.json()["answers"][0]["probabilities"], rel=1e-4
    )


def test_without_classes_the_outputs_are_the_answer():
    found = model(lambda inputs: [inputs[0] * 2], (3,), request=record.Arrays(), classes=())
    done, no = asked(service(found), ("POST", "/predict", rows([[1, 2, 3]])), ("POST", "/explain", rows([[1, 2, 3]])))
    assert done.json()["outputs"] == [[[2, 4, 6]]]
    assert no.status_code == 400
    assert "can be explained" in line(no)


def test_what_the_model_looked_at_is_the_occlusion_of_attribution():
    some = images(1)
    (found,) = asked(service(largest=5), ("POST", "/explain", rows(some)))
    best = CLASSES.index(found.json()["answer"]["class"])
    score = lambda x: (x.reshape(x.shape[0], -1) @ KERNEL)[:, best]
    expected = attribution.occlusion(score, some, found.json()["size"], found.json()["stride"])
    np.testing.assert_allclose(found.json()["map"], expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "request_", "status", "expected"),
    [
        ({}, ("POST", "/predict", {"content": b"x"}), 415, "content type 'none', expected image/png"),
        ({}, ("POST", "/predict", rows([[1]])), 400, "input 0 is float32[1, 1], expected float32[batch, 8, 8, 1]"),
        ({}, ("POST", "/predict", rows(images(33))), 413, "33 rows, expected at most 32 in a request"),
        ({"max_bytes": 10}, ("POST", "/predict", rows(images(1))), 413, "a body of more than 10 bytes"),
        ({"token": "a-secret"}, ("POST", "/predict", rows(images(1))), 401, "shows no token, or another one"),
        ({"token": "a-secret"}, ("GET", "/metrics", {}), 401, "shows no token, or another one"),
        (
            {"token": "a-secret"},
            ("GET", "/model", {"headers": {"authorization": "Bearer b"}}),
            401,
            "shows no token, or another one",
        ),
        ({}, ("GET", "/predict", {}), 405, "GET /predict: Method Not Allowed"),
        ({}, ("GET", "/nothing", {}), 404, "GET /nothing: Not Found"),
    ],
)
def test_a_request_that_is_refused_gets_a_status_and_a_line(changes, request_, status, expected):
    (found,) = asked(service(**changes), request_)
    assert (found.status_code, expected in line(found)) == (status, True), found.text
    needed = {401: {"www-authenticate": "Bearer"}, 405: {"allow": "POST"}}.get(status, {})  # by RFC 9110
    assert needed.items() <= dict(found.headers).items()


def test_guesses_of_the_token_are_limited_too():
    found = asked(service(token="a-secret", rate=2), *[("POST", "/predict", rows(images(1)))] * 4)
    assert sorted(each.status_code for each in found) == [401, 401, 429, 429]


def test_errors_are_counted_from_zero():
    (found,) = asked(service(), ("GET", "/metrics", {}))
    assert 'dl_jax_requests_total{path="/predict",status="500"} 0.0' in found.text


def test_a_body_without_a_length_is_cut_off():
    read = []

    async def endless():
        while True:
            read.append(1)
            yield b"x" * 1000

    (found,) = asked(service(max_bytes=5000), ("POST", "/predict", {"content": endless()}))
    assert found.status_code == 413


def test_the_token_lets_in():
    shown = {"headers": {"authorization": "Bearer a-secret"}}
    predicted, metrics, page = asked(
        service(token="a-secret"),
        ("POST", "/predict", {**rows(images(1)), **shown}),
        ("GET", "/metrics", shown),
        ("GET", "/", {}),
    )
    assert [each.status_code for each in (predicted, metrics, page)] == [200] * 3
    assert "a-secret" not in metrics.text + page.text


def test_a_client_that_asks_too_often_has_to_wait():
    found = asked(service(rate=2), *[("POST", "/predict", rows(images(1)))] * 4)
    assert sorted(each.status_code for each in found) == [200, 200, 429, 429]
    refused = next(each for each in found if each.status_code == 429)
    assert "more than 2 requests a second" in line(refused)
    assert refused.headers["retry-after"] == "1"


def held(go):
    """A model that answers once `go` is set."""

    def predict(inputs):
        go.wait(10)
        return LINEAR.predict(inputs)

    return model(predict)


def test_more_requests_than_may_be_under_way_are_refused_and_it_is_not_ready():
    go = threading.Event()
    of = service(held(go), concurrency=3)

    async def ask():
        async with client(of) as here:
            asked = [asyncio.create_task(here.post("/predict", **rows(images(1)))) for _ in range(5)]
            while sum(each.done() for each in asked) < 2:
                await asyncio.sleep(0.01)
            ready, live = await here.get("/health"), await here.get("/health/live")
            go.set()
            return ready, live, await asyncio.gather(*asked)

    ready, live, found = asyncio.run(ask())
    assert (ready.status_code, live.status_code) == (503, 200)
    assert ready.json()["live"]
    assert not ready.json()["ready"]
    assert sorted(each.status_code for each in found) == [200] * 3 + [503] * 2
    assert "3 requests are being answered" in line(next(each for each in found if each.status_code == 503))


def test_a_request_is_given_up_after_its_time_and_the_next_one_is_answered():
    """While the call hangs, the service is not live."""
    go = threading.Event()
    of = service(held(go), timeout=0.05)

    async def ask():
        async with client(of) as here:
            late = await here.post("/predict", **rows(images(1)))
            while (hung := await here.get("/health/live")).status_code == 200:
                await asyncio.sleep(0.01)
            assert hung.json() == {"live": False, "ready": False, "model": "0" * 12}
            go.set()
            return late, await here.post("/predict", **rows(images(1)))

    late, found = asyncio.run(ask())
    assert (late.status_code, found.status_code) == (504, 200)
    assert "no answer within 0.05 s" in line(late)


def test_a_failure_of_the_model_is_a_line_for_the_client_and_one_in_the_log():
    lines = []

    def predict(inputs):
        raise RuntimeError("a wire\nbroke")

    (found,) = asked(service(model(predict), log=lines.append), ("POST", "/predict", rows(images(1))))
    assert found.status_code == 500
    assert "the model failed at this request" in line(found)
    assert lines == ["error: a request failed: RuntimeError: a wire broke"]


def test_an_answer_that_is_not_finite_is_told():
    (found,) = asked(
        service(model(lambda inputs: [np.full((len(inputs[0]), 3), np.nan)])), ("POST", "/predict", rows(images(1)))
    )
    assert found.status_code == 400
    assert "the answer is not finite" in line(found)


def test_requests_at_once_share_a_call_and_are_counted():
    of = service(wait=0.2, largest=8)
    found = asked(of, *[("POST", "/predict", rows(images(1, seed))) for seed in range(8)], ("POST", "/predict", {}))
    assert [each.status_code for each in found] == [200] * 8 + [415]
    value = lambda name, **labels: of.metrics.registry.get_sample_value(f"dl_jax_{name}", labels or None)
    assert value("requests_total", path="/predict", status="200") == 8
    assert value("requests_total", path="/predict", status="415") == 1
    assert value("batch_rows_count") == 1
    assert value("batch_rows_sum") == 8
    assert value("request_seconds_count", path="/predict") == 9
    assert value("requests_running") == 0
    assert sum(value("answers_total", **{"class": name}) or 0 for name in CLASSES) == 8
    assert value("drift_examples") == 8
    assert value("drift_mean") == pytest.approx(0.5, abs=0.05)
    assert 0 <= value("drift_answers") <= 1
    text = of.metrics.text().decode()
    assert 'dl_jax_model_info{format="onnx",version="000000000000"} 1.0' in text


def test_requests_that_are_all_here_do_not_wait_for_more():
    began = time.monotonic()
    found = asked(service(wait=5.0), ("POST", "/predict", rows(images(1))), ("POST", "/predict", rows(images(1, 2))))
    assert [each.status_code for each in found] == [200, 200]
    assert time.monotonic() - began < 4


def test_a_new_file_is_taken_over_without_a_lost_request_and_a_damaged_one_is_not(tmp_path):
    path, lines = tmp_path / "net.onnx", []
    exported(path)
    of = service(runtime.opened(path, 8, 1), str(path), lines.append, poll=0.02)
    first = of.model.version

    async def until(here, done):
        seen, end = [], time.monotonic() + 10
        while not done() and time.monotonic() < end:
            seen += await asyncio.gather(*(here.post("/predict", **rows(images(2))) for _ in range(4)))
        return seen

    async def ask():
        async with client(of) as here:
            exported(path, seed=1)
            seen = await until(here, lambda: lines)
            path.write_bytes(b"damaged")
            return seen + await until(here, lambda: len(lines) > 1) + [await here.post("/predict", **rows(images(2)))]

    seen = asyncio.run(ask())
    second = of.model.version
    assert {each.status_code for each in seen} == {200}
    assert [each.json()["model"] for each in (seen[0], seen[-1])] == [first, second]
    assert first != second
    assert lines == [
        f"took over the new {path}: {second} instead of {first}",
        f"the new {path} is not taken over, {second} stays: {path} has 7 bytes, expected {of.model.record.bytes} as "
        "its record says: it was not exported by dl_jax, or is damaged; copy both files again",
    ]


def bag(words):
    """A classifier of texts that counts words by their ids."""
    count = lambda x: np.stack([(x == i).sum(1) for i in (2, 3, 1)], 1).astype(np.float32)
    return model(lambda inputs: [count(inputs[0])], (5,), "int32", record.Text(words), ("good", "bad", "other"))


def test_words_that_made_the_answer():
    text = {"content": b"so bad bad good", "headers": {"content-type": "text/plain"}}
    (found,) = asked(service(bag(("good", "bad"))), ("POST", "/explain", text))
    assert found.json()["answer"]["class"] == "bad"
    assert found.json()["map"] == [0, 1, 1, 0]


def test_a_request_that_waits_while_the_words_change_is_answered_by_the_new_ones():
    go, old, new = threading.Event(), bag(("good", "bad")), bag(("bad", "good"))

    def predict(inputs):
        go.wait(10)
        return old.predict(inputs)

    of = service(old._replace(predict=predict), largest=1)
    text = {"content": b"good", "headers": {"content-type": "text/plain"}}

    async def ask():
        async with client(of) as here:
            asked = [asyncio.create_task(here.post("/predict", **text)) for _ in range(3)]
            await asyncio.sleep(0.1)  # one is being computed, two wait
            of.model = new._replace(record=new.record._replace(sha256="1" * 64, classes=("bad", "good", "other")))
            go.set()
            return await asyncio.gather(*asked)

    found = [each.json() for each in asyncio.run(ask())]
    assert {each["answers"][0]["class"] for each in found} == {"good"}
    assert sorted(each["model"][0] for each in found) == ["0", "1", "1"]


def test_the_page_asks_nobody_else():
    page, about = asked(service(), ("GET", "/", {}), ("GET", "/model", {}))
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http:" not in page.text
    assert "https:" not in page.text
    assert about.json()["request"] == {"kind": "image", "types": ["image/png", JSON], "filled": 1.0}


FUZZED = service(token=None, timeout=5)


KINDS = [JSON, "image/png", "", "text/plain; charset=\xff", "application/json;;;"]
VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), st.lists)
REQUESTS = st.tuples(
    st.sampled_from(["POST", "GET", "PUT"]),
    st.sampled_from(["/predict", "/explain", "/model", "/health", "/health/live", "/x"]),
    st.one_of(st.binary(max_size=300), VALUES.map(lambda x: json.dumps({"inputs": x}).encode())),
    st.sampled_from(KINDS),
)


@settings(max_examples=10, deadline=None)
@given(st.lists(REQUESTS, min_size=8, max_size=8))
def test_no_request_makes_it_fail(requests):
    send = lambda method, path, body, kind: (
        method,
        path,
        {"content": body, "headers": {"content-type": kind.encode("latin-1")}},
    )
    for found in asked(FUZZED, *[send(*each) for each in requests]):
        assert found.status_code in (200, 400, 404, 405, 413, 415)
        if found.status_code != 200:
            line(found)
