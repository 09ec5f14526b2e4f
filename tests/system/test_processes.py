"""Two processes give what one gives; one that fails takes the other down."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dl_jax.harness.checkpoint import store as checkpoint

PROGRAM = Path(__file__).parent / "programs" / "two.py"


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(processes: int, devices: int, folder: Path, *more: str) -> list[subprocess.Popen[str]]:
    address = free_address()
    environment = {**os.environ, "XLA_FLAGS": ""}
    return [
        subprocess.Popen(
            [sys.executable, PROGRAM, address, str(processes), str(i), str(devices), folder, *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(running: list[subprocess.Popen[str]]) -> np.ndarray:
    ends = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), ends
    return np.array(json.loads(ends[0][0].splitlines()[-1]))


def test_two_processes_equal_one_and_resume_as_one(tmp_path):
    one = finish(start(1, 4, tmp_path / "one"))
    two = finish(start(2, 2, tmp_path / "two"))
    np.testing.assert_allclose(one, two, atol=1e-6)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 3  # process 1 writes nothing
    # Two processes went on to step 12; one with another number of devices takes their checkpoint to step 16.
    longer = finish(start(1, 1, tmp_path / "two", "-1", "16"))
    whole = finish(start(1, 4, tmp_path / "whole", "-1", "16"))
    np.testing.assert_allclose(longer, whole, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("vision/lenet", "test_error/plain"),
        ("generative/vae_mnist", "nll/vae-k1"),  # seeds are lanes, and pictures are drawn by one process
        pytest.param("generative/gan_mnist", "parzen/gan", marks=pytest.mark.slow),
        ("text/char_lm", "bits/test"),  # a state that has rows
    ],
)
def test_an_experiment_runs_on_two_processes(name, metric, tmp_path):
    script = (PROGRAM.parents[3] / "experiments" / name).with_suffix(".py")
    flags = ["--preset", "smoke", "--seeds", "1", "--workdir", str(tmp_path), "--processes", "2"]
    flags += ["--coordinator", free_address()]
    commands = [[sys.executable, str(script), *flags, "--process-id", str(i)] for i in range(2)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, env=environment, text=True, **pipes) for command in commands]
    ends = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], ends
    assert metric in ends[0][0]
    assert metric not in ends[1][0] + ends[1][1]
    assert (tmp_path / "result.json").exists()


def test_sigterm_to_one_saves_and_ends_both_at_the_same_step(tmp_path):
    running = start(2, 1, tmp_path, "-1", "100000", "0.01")
    lines = tmp_path / "metrics.jsonl"
    while not (lines.exists() and lines.read_text()):
        assert all(process.poll() is None for process in running)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [143, 143], ends
    step, tree = checkpoint.load(str(tmp_path / "checkpoints"))
    assert tree["state"]["step"] == step < 100_000


def test_a_process_that_fails_takes_the_other_down(tmp_path):
    began = time.monotonic()
    running = start(2, 1, tmp_path, "3")
    ends = [process.communicate(timeout=100) for process in running]
    assert time.monotonic() - began < 75  # starting up, and the 45 seconds promised
    assert running[1].returncode == 1
    assert "a bug in one process" in ends[1][1]
    assert running[0].returncode != 0
