"""Several processes give what one gives; one that fails takes the others down.

One pair of processes does all that succeeds, see programs/pair.py, beside one of which a process fails. Those of
programs/shards.py change in number from one attempt at a run to the next.
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
from dl_jax.harness.run import Run, Settings

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


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def start(folder: Path, *experiments: str) -> Iterator[Pair]:
    address = free_address()
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


def test_a_state_of_a_fit_without_data_is_one_for_both_and_is_saved(pair):
    for process in range(2):
        pair.wait_for(pair.folder / f"doubled.{process}", 60)
        assert json.loads((pair.folder / f"doubled.{process}").read_text()) == [0, 8]
    step, tree = checkpoint.load(str(pair.folder / "doubled" / "checkpoints"))
    assert step == 3
    np.testing.assert_array_equal(tree["state"]["params"], [0, 8])


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


class Forks(NamedTuple):
    """The process of programs/shards.py, and a folder."""

    process: subprocess.Popen[str]
    folder: Path

    def run(self, name: str, processes: int, devices: int, end: int | None, *flags: str) -> list[int]:
        """The exit statuses of an attempt at the run in the folder "run"; its notes are in the folder `name`."""
        order = {"processes": processes, "devices": devices, "address": free_address(), "end": end}
        order |= {"notes": str(self.folder / name), "flags": ["--workdir", str(self.folder / "run"), *flags]}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{json.dumps(order)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def said(self, name: str) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / name).glob("said.*")))

    def steps(self, name: str, event: str) -> list[int]:
        """The steps of the states that an attempt "saved" or "restored"."""
        return sorted({int(path.name.split("-")[1].split(".")[0]) for path in (self.folder / name).glob(f"{event}-*")})

    def state(self, name: str, event: str, step: int) -> tuple[dict[str, np.ndarray], list[int]]:
        """The leaves of a state that an attempt saved or restored, and the bytes on each process.

        Parts that several devices have are equal, and all parts together fill each leaf.
        """
        files = [np.load(path) for path in sorted((self.folder / name).glob(f"{event}-{step}.*.npz"))]
        leaves: dict[str, np.ndarray] = {}
        parts: dict[str, dict[str, np.ndarray]] = {}
        for file in files:
            for key, values in file.items():
                path, _, box = key.partition("|")
                assert parts.setdefault(path, {}).setdefault(box, values).tobytes() == values.tobytes()
        for path, held in parts.items():
            boxes = {box: json.loads(box) for box in held}
            shape = [max(stop) for stop in zip(*([b for _, b in box] for box in boxes.values()), strict=True)]
            leaf = leaves[path] = np.empty(shape, next(iter(held.values())).dtype)
            for box, values in held.items():
                leaf[tuple(slice(*each) for each in boxes[box])] = values
            assert sum(values.size for values in held.values()) == leaf.size
        return leaves, [sum(values.nbytes for values in file.values()) for file in files]

    def check_restored(self, name: str, before: str, step: int) -> None:
        """An attempt has restored the state of `step` that the one before had saved, bit for bit."""
        assert self.steps(name, "restored") == [step]
        (saved, _), (restored, _) = self.state(before, "saved", step), self.state(name, "restored", step)
        assert restored.keys() == saved.keys()
        for path, values in saved.items():
            assert restored[path].dtype == values.dtype
            assert restored[path].shape == values.shape
            assert restored[path].tobytes() == values.tobytes(), path


@pytest.fixture
def forks(tmp_path) -> Iterator[Forks]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, str(PROGRAM.with_name("shards.py"))]
    with subprocess.Popen(command, env={**os.environ, "XLA_FLAGS": ""}, text=True, **pipes) as process:
        yield Forks(process, tmp_path)
        process.stdin.close()


def test_a_run_goes_on_with_other_processes_from_the_very_same_bits(forks):
    """4 processes, 1 and 2 with --fsdp, but for two in between that have one seed each, of which one is damaged."""
    attempts = [  # name, processes, devices of each, the step at which it is asked to end, flags
        ("four", 4, 1, 2, "--fsdp"),
        ("one", 1, 2, 6, "--fsdp"),
        ("seeds", 2, 1, 10),
        ("two", 2, 2, None, "--fsdp"),
    ]
    for i, (name, *attempt) in enumerate(attempts):
        statuses = forks.run(name, *attempt, "--seeds", "2", "--checkpoint-every", "100")
        assert set(statuses) == {0 if name == "two" else 143}, forks.said(name)
        if i:
            before = attempts[i - 1][0]
            step = forks.steps(before, "saved")[-1]
            if name == "two":
                assert f"skipped the damaged checkpoint {forks.folder}/run/checkpoints/{step}" in forks.said(name)
                step = forks.steps(before, "saved")[-2]  # that of a measurement
            forks.check_restored(name, before, step)
        newest = forks.steps(name, "saved")[-1]
        leaves, held = forks.state(name, "saved", newest)
        share = np.array(held) / sum(values.nbytes for values in leaves.values())
        assert (share < {4: 0.26, 1: 1.01, 2: 0.51}[len(held)]).all()  # each process has only its part of the state
        if name == "seeds":  # a shard is damaged that process 1 will need, and process 0 will not
            shards = forks.folder / "run" / "checkpoints" / str(newest) / "state" / "ocdbt.process_1"
            largest = max((p for p in shards.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
            content = bytearray(largest.read_bytes())
            content[len(content) // 2] ^= 1
            largest.write_bytes(content)
    program = runpy.run_path(str(PROGRAM.with_name("shards.py")), {"ORDER": {"end": None, "notes": str(forks.folder)}})
    alone = program["main"](program["Config"](), Run(None, Settings(seeds=(0, 1))))
    measured = lambda: json.loads((forks.folder / "run" / "result.json").read_text())["measured"]["error"]["values"]
    np.testing.assert_allclose(measured(), alone["error"], rtol=1e-6)
    lines = (forks.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 4, 8, 8, 12, 12]  # the metrics, and those of watch
    assert (forks.folder / "run" / "biases.png").exists()
    # The run that has ended, with half as many devices, which evaluate the state that four have saved.
    (forks.folder / "run" / "result.json").unlink()
    assert forks.run("ended", 2, 1, None, "--fsdp", "--seeds", "2", "--checkpoint-every", "100") == [0, 0]
    forks.check_restored("ended", "two", forks.steps("two", "saved")[-1])
    assert forks.steps("ended", "saved") == []
    np.testing.assert_allclose(measured(), alone["error"], rtol=1e-6)


def test_a_process_that_fails_takes_the_other_down(failing):
    other, failed = failing.ends()
    assert failed.status == 1
    assert "a bug in one process" in failed.stderr
    assert other.status != 0
    assert "process 1 has ended: a bug in one process" in other.stderr
    assert other.at - failed.at < 20  # it hears of it within a second, on a machine that does other things too
