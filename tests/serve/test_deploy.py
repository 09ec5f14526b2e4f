"""The Dockerfile, the manifest and the dashboard of a service, and the package as it is distributed.

The slow tests install from a package index: a target of the Dockerfile without building an image, and the wheel.
"""

import contextlib
import dataclasses
import functools
import http.server
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
import yaml
from dockerfile import execute, lines, stages
from serve_files import CLASSES, exported, images, listening, model

import dl_jax
from dl_jax.serve.__main__ import Flags, checked
from dl_jax.serve.drift import Drift
from dl_jax.serve.metrics import Metrics
from dl_jax.serve.server import DRAIN, GRACE

ROOT = Path(__file__).parents[2]
TARGETS = ("train", "train-cuda", "train-tpu", "serve")
STAGES = stages((ROOT / "Dockerfile").read_text())
TOKEN = "a-token"


def starts(target: str, word: str) -> list[str]:
    """The last list after this word in a target."""
    *_, rest = [rest for each, rest in lines(STAGES, target) if each == word]
    return json.loads(rest.partition("CMD ")[2] if word == "HEALTHCHECK" else rest)


def program(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed; pip install -e '.[ops]'")
    return found


# The Dockerfile


def test_stages_are_read_with_their_bases():
    text = "# note\nFROM a:1 AS one\nENV X=1\nRUN first \\\n  second\n\nFROM one AS two\nUSER 3\n"
    found = stages(text)
    assert lines(found, "one") == [("ENV", "X=1"), ("RUN", "first    second")]
    assert lines(found, "two") == [*lines(found, "one"), ("USER", "3")]


def test_hadolint_finds_nothing():
    done = subprocess.run([program("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_ends_as_another_user_than_root(target):
    *_, user = [rest for word, rest in lines(STAGES, target) if word == "USER"]
    assert user == "10001:10001"
    base = STAGES[target].base
    assert all("build" not in each for each in (base, STAGES[base].base))  # only what is copied is left of a build


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_copied_is_there_and_sent_to_the_builder(target):
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    for word, rest in lines(STAGES, target):
        if word == "COPY" and rest.startswith("--from="):
            assert rest.removeprefix("--from=").split()[0] in STAGES
        elif word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored
    assert ignored[0] == "*"  # so that nothing else is, such as tokens and runs


def test_extras_of_an_image_are_those_of_the_package_and_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    built = [rest for stage in STAGES for word, rest in STAGES[stage].lines if word == "RUN" and "pip install" in rest]
    assert len(built) == 4
    for line in built:
        assert set(re.findall(r"'\.\[([\w,]+)\]'", line)[0].split(",")) <= set(extras)
        assert " --constraint constraints-py312-latest.txt " in line
    assert "FROM python:3.12-slim" in (ROOT / "Dockerfile").read_text()  # the constraints are those of this Python


def flags(words: list[str]) -> Flags:
    return tyro.cli(Flags, args=words)


def test_the_server_of_the_image_is_open_to_others_with_a_token_of_a_file():
    assert starts("serve", "ENTRYPOINT") == ["python", "-m", "dl_jax.serve"]
    found = flags(starts("serve", "CMD"))
    assert found.token_file
    assert (found.host, found.port, found.token) == ("0.0.0.0", 8000, "")
    assert ("EXPOSE", "8000") in lines(STAGES, "serve")


@pytest.mark.parametrize("target", TARGETS[:3])
def test_an_image_to_train_begins_with_an_experiment(target):
    python, script, *_ = starts(target, "CMD")
    assert python == "python"
    assert (ROOT / script).exists()
    assert ("COPY", "experiments experiments") in STAGES[target].lines


def test_the_healthcheck_fails_where_nothing_answers_or_what_answers_is_not_live():
    status = 200

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/live" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    check = healthcheck(port)
    assert subprocess.run(check, capture_output=True).returncode == 0
    status = 503
    assert subprocess.run(check, capture_output=True).returncode == 1
    server.shutdown()
    server.server_close()
    assert subprocess.run(check, capture_output=True).returncode == 1


def healthcheck(port: int) -> list[str]:
    """The image's, for this port and Python."""
    python, option, code = starts("serve", "HEALTHCHECK")
    assert (python, ":8000/" in code) == ("python", True)
    return [sys.executable, option, code.replace(":8000/", f":{port}/")]


# The manifest


@functools.cache
def manifests() -> tuple[Any, Any]:
    service, deployment = yaml.safe_load_all((ROOT / "docs/examples/serve.yaml").read_text())
    return service, deployment


def container() -> tuple[Any, Any]:
    """The specification of the pod, and of its container."""
    pod = manifests()[1]["spec"]["template"]["spec"]
    [found] = pod["containers"]
    return pod, found


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_knows_every_field(version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for manifest in manifests():
        assert kubernetes_validate.validate(manifest, version, strict=True) == version
    wrong = {**manifests()[0], "spec": {"selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_service_leads_to_the_pods():
    service, deployment = manifests()
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    [port] = container()[1]["ports"]
    assert [each["targetPort"] for each in service["spec"]["ports"]] == [port["name"]]


def test_the_pod_serves_a_mounted_file_with_a_mounted_token(tmp_path):
    pod, found = container()
    given = flags(found["args"])
    mounts = {mount["mountPath"]: mount["name"] for mount in found["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    folder, _, key = given.token_file.rpartition("/")
    assert volumes[mounts[folder]]["secret"]["secretName"] == "serve-token"
    assert f"--from-literal={key}=" in (ROOT / "docs/examples/serve.yaml").read_text()
    assert "persistentVolumeClaim" in volumes[mounts[given.file.rpartition("/")[0]]]
    assert given.port == found["ports"][0]["containerPort"]
    (tmp_path / "token").write_text(TOKEN)
    assert checked(dataclasses.replace(given, token_file=str(tmp_path / "token"))) == TOKEN


def test_the_probes_ask_for_what_needs_no_token(tmp_path):
    exported(tmp_path / "net.onnx")
    _, found = container()
    with listening(tmp_path / "net.onnx", TOKEN) as port:
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = found[name]["httpGet"]["path"]
            assert urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10).status == 200
    assert found["livenessProbe"]["httpGet"]["path"] == "/health/live"  # a busy pod is not restarted


def test_the_pod_has_limits_and_few_rights():
    pod, found = container()
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == "10001:10001"
    assert not found["securityContext"]["allowPrivilegeEscalation"]
    assert found["securityContext"]["readOnlyRootFilesystem"]
    assert set(found["resources"]["limits"]) == {"cpu", "memory"}
    given = flags(found["args"])
    before = found["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before + DRAIN + given.timeout + GRACE


# The dashboard


def panels() -> list[dict[str, Any]]:
    return json.loads((ROOT / "docs/examples/grafana.json").read_text())["panels"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_every_metric_on_the_dashboard_is_one_of_the_server():

    drift = Drift(*(0 for _ in Drift._fields))
    metrics = Metrics(lambda: drift, lambda: 0)
    metrics.show(model(list))
    metrics.requests.labels("/predict", 200).inc()
    metrics.seconds.labels("/predict").observe(1)
    metrics.answers.labels("left").inc()
    metrics.swaps.labels("taken").inc()
    text = metrics.text().decode()
    there = dict(re.findall(r"^(dl_jax_\w+?)(?:\{(.*)\})? ", text, re.M))
    counted = {name for name in there if not name.endswith("_created")}
    used = {name for query in queries() for name in re.findall(r"dl_jax_\w+", query)}
    assert used <= counted
    assert {name.removesuffix("_bucket") for name in used} >= {"dl_jax_requests_total", "dl_jax_request_seconds"}
    labels = {label for query in queries() for label in re.findall(r"\b(\w+)=~?\"", query)} - {"job"}
    grouped = {
        label.strip()
        for query in queries()
        for group in re.findall(r"by \(([^)]*)\)", query)
        for label in group.split(",")
    }
    known = {label for each in there.values() for label in re.findall(r"(\w+)=", each)} | {"le", "instance"}
    assert labels | grouped <= known


def test_the_queries_are_promql():
    parser = pytest.importorskip("promql_parser")
    for query in queries():
        parser.parse(query.replace("$__rate_interval", "5m"))
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        parser.parse("sum(rate(dl_jax_requests_total[5m])")


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())


# What is installed


@contextlib.contextmanager
def answering(words: list[str], folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """The port of a server that these words start, which ends with status 0 after SIGTERM."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*words, "--port", str(port)], cwd=folder, env=environment)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield port
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()


def predicted(port: int) -> dict[str, Any]:

    body = json.dumps({"inputs": images(2).tolist()}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, headers)
    return json.loads(urllib.request.urlopen(request, timeout=20).read())


def assert_serves(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """A file is served as it should be by a program outside this tree, and its container would be healthy."""

    kernel = exported(folder / "net.onnx")
    (folder / "token").write_text(TOKEN)
    expected = images(2).reshape(2, -1) @ kernel
    end = [str(folder / "net.onnx"), "--host", "0.0.0.0", "--token-file", str(folder / "token")]
    with answering([*words, *end], folder, environment) as port:
        answers = predicted(port)["answers"]
        assert subprocess.run(healthcheck(port)).returncode == 0
    assert [answer["class"] for answer in answers] == [CLASSES[i] for i in expected.argmax(-1)]
    odds = np.exp(expected - expected.max(-1, keepdims=True))
    np.testing.assert_allclose(
        [answer["probabilities"] for answer in answers], odds / odds.sum(-1, keepdims=True), rtol=1e-5
    )


def interpreter() -> str:
    """The Python that this environment is made of, if it is the Dockerfile's."""
    if f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim" != STAGES["base"].base:
        pytest.skip(f"the Dockerfile has {STAGES['base'].base}, this is Python {sys.version.split()[0]}")
    return str(Path(sys.base_prefix) / "bin" / "python3")


@pytest.mark.slow
def test_the_lines_of_the_target_that_serves_make_a_server(tmp_path):
    ready = execute("serve", tmp_path, interpreter())
    python = shutil.which("python", path=ready.environment["PATH"])
    assert python
    assert python.startswith(str(tmp_path))
    assert_serves([python, *ready.entrypoint[1:]], ready.folder, ready.environment)


@pytest.mark.slow
def test_the_lines_of_the_target_that_trains_make_a_run(tmp_path):
    ready = execute("train", tmp_path, interpreter())
    python = shutil.which("python", path=ready.environment["PATH"])
    assert python
    shorter = [
        "--seeds",
        "1",
        "--steps",
        "8",
        "--distorted-steps",
        "8",
        "--watch-every",
        "8",
        "--workdir",
        "runs/lenet",
    ]
    done = subprocess.run([python, *ready.command[1:], *shorter], cwd=ready.folder, env=ready.environment)
    assert done.returncode == 0
    assert (ready.folder / "runs/lenet/result.json").exists()


@pytest.mark.slow
def test_the_wheel_is_made_of_the_source_distribution_and_serves(tmp_path):
    """Both hold all sources and the page; the wheel is installed in a fresh environment, away from the tree."""
    pytest.importorskip("build")
    uv = shutil.which("uv")  # where it is, this takes a fifth of the time
    with_uv = ["--installer", "uv"] if uv else []
    build = [sys.executable, "-m", "build", *with_uv, "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True)
    [wheel], [sdist] = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    assert wheel.name == f"dl_jax-{dl_jax.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dl_jax").rglob("*.py")} | {"dl_jax/serve/page.html"}
    assert sources <= names
    assert {name.partition("/")[0] for name in names} == {"dl_jax", f"dl_jax-{dl_jax.__version__}.dist-info"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert sources | {"LICENSE", "README.md", "pyproject.toml"} <= inside

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "fresh")], check=True)
    python = str(tmp_path / "fresh/bin/python")
    row = "py311-jax010" if sys.version_info < (3, 12) else "py312-latest"
    pinned = ["--constraint", str(ROOT / f"constraints-{row}.txt")]
    install = [uv, "pip", "install", "--python", python] if uv else [python, "-I", "-m", "pip", "install"]
    subprocess.run([*install, "--quiet", *pinned, f"{wheel}[serve]"], check=True)
    where = [python, "-I", "-c", "import dl_jax; print(dl_jax.__version__, dl_jax.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == dl_jax.__version__
    assert found[1].startswith(str(tmp_path))
    assert_serves([python, "-I", "-m", "dl_jax.serve"], tmp_path, {"PATH": "/usr/bin:/bin"})
