"""Two processes give what one gives; one that fails takes the other down.

One pair of processes does all that succeeds, see programs/pair.py, beside one of which a process fails.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dl_jax.harness.checkpoint import store as checkpoint

PROGRAM = Path(__file__).parent / "programs" / "pair.py"
EXPERIMENTS = {  # name -> what it measures
    "vision/lenet": "test_error/plain",
    "generative/vae_mnist": "nll/vae-k1",  # images are drawn by one process
    "text/char_lm": "bits/test",  # a state that has rows
}


class End(NamedTuple):
    status: int
    stderr: str
    at: float  # seconds, time.monotonic


class Pair(NamedTuple):
    folder: Path
    processes: list[subprocess.Popen[str]]
    ending: list[Future[End]]

    def wait_for(self, path: Path, seconds: float) -> None:
        """Waits until a file that a process writes is not empty."""
        deadline = time.monotonic() + seconds
        while not (path.exists() and path.read_text()):
            if any(process.poll() is not None for process in self.processes):
                pytest.fail(f"a process ended before {path.name} came: {self.ends()}")
            assert time.monotonic() < deadline, f"{path.name} never came"
            time.sleep(0.05)

    def ends(self) -> list[End]:
        """The outputs of both processes, once both have ended."""
        return [each.result(timeout=100) for each in self.ending]


def end_of(process: subprocess.Popen[str]) -> End:
    stderr = process.communicate()[1]
    return End(process.returncode, stderr, time.monotonic())


@contextlib.contextmanager
def start(folder: Path, *experiments: str) -> Iterator[Pair]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, PROGRAM, address, str(i), folder, *experiments] for i in range(2)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(c, env={**os.environ, "XLA_FLAGS": ""}, text=True, **pipes) for c in commands]
    with ThreadPoolExecutor(2) as waiting:
        try:
            yield Pair(folder, processes, [waiting.submit(end_of, process) for process in processes])
        finally:
            for process in processes:
                process.kill()


@pytest.fixture(scope="module")
def failing(tmp_path_factory) -> Iterator[Pair]:
    """A pair of which process 1 fails. It is begun first and asked last: the other waits for its end meanwhile."""
    with start(tmp_path_factory.mktemp("failing")) as pair:
        yield pair


@pytest.fixture(scope="module")
def pair(failing, tmp_path_factory) -> Iterator[Pair]:
    with start(tmp_path_factory.mktemp("pair"), *EXPERIMENTS) as pair:
        yield pair


def test_two_processes_equal_one_and_resume_as_one(pair, tmp_path):
    train = runpy.run_path(str(PROGRAM))["train"]
    alone = train(tmp_path / "one", 12, None)  # on eight devices, where the two have four
    for process in range(2):
        pair.wait_for(pair.folder / f"weights.{process}", 60)
        together = json.loads((pair.folder / f"weights.{process}").read_text())
        np.testing.assert_allclose(alone, together, atol=1e-6)
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (tmp_path / "one", pair.folder / "trained")]
    assert len(lines[0]) == len(lines[1]) == 3  # process 1 writes nothing
    # Two processes went on to step 12; one with another number of devices takes their checkpoint to step 16.
    longer = train(pair.folder / "trained", 16, None)
    whole = train(tmp_path / "whole", 16, None)
    np.testing.assert_allclose(longer, whole, atol=1e-6)


def check_experiments(pair: Pair, experiments: dict[str, str]) -> None:
    pair.wait_for(pair.folder / "told" / "metrics.jsonl", 600)
    for name, metric in experiments.items():
        first, second = ((pair.folder / f"{name}.{process}").read_text() for process in range(2))
        assert metric in first, name
        assert metric not in second, name
        assert (pair.folder / name / "result.json").exists(), name


def test_experiments_run_on_two_processes_and_one_of_them_speaks(pair):
    check_experiments(pair, EXPERIMENTS)


@pytest.mark.slow
def test_a_gan_runs_on_two_processes(tmp_path):
    experiments = {"generative/gan_mnist": "parzen/gan"}
    with start(tmp_path, *experiments) as pair:
        check_experiments(pair, experiments)


def test_sigterm_to_one_saves_and_ends_both_at_the_same_step(pair):
    pair.wait_for(pair.folder / "told" / "metrics.jsonl", 600)
    pair.processes[1].send_signal(signal.SIGTERM)
    ends = pair.ends()
    assert [end.status for end in ends] == [143, 143], ends
    step, tree = checkpoint.load(str(pair.folder / "told" / "checkpoints"))
    assert tree["state"]["step"] == step < 30_000


def test_a_process_that_fails_takes_the_other_down(failing):
    other, failed = failing.ends()
    assert failed.status == 1
    assert "a bug in one process" in failed.stderr
    assert other.status != 0
    assert "process 1 has ended: a bug in one process" in other.stderr
    assert other.at - failed.at < 20  # it hears of it within a second, on a machine that does other things too
