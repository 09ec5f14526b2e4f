"""A run that is killed and started again ends with the bits of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 3  # one in each third of the run
PROGRAM = Path(__file__).parent / "programs" / "killed.py"


def test_kills_change_no_bit(tmp_path):
    seed = random.randrange(2**16)
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, str(KILLS), str(seed)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    attempts = found["attempts"]
    assert found["undisturbed"] == [0, 0]
    assert [status for _, status in attempts] == [-signal.SIGKILL] * KILLS + [0], seed
    first = [step for step, _ in attempts]
    # Each resumes at a checkpoint, at most one save (of every 4 steps) behind the kill before it.
    assert all(step % 4 == 0 for step in first), (seed, first)
    assert all(killed - 8 < step <= killed for killed, step in zip(found["steps"], first[1:], strict=True)), (
        seed,
        first,
    )
    assert len(set(found["digests"])) == 1, seed
    ends = [Path(tmp_path, name, "metrics.jsonl").read_text().splitlines() for name in ("undisturbed", "killed")]
    clocked = ("time", "steps_per_second", "data_wait")
    plain = [[{k: v for k, v in json.loads(line).items() if k not in clocked} for line in end] for end in ends]
    assert plain[0] == plain[1], (seed, "the curve is part of the result")


@pytest.mark.slow
def test_a_killed_experiment_ends_with_the_same_numbers(tmp_path):
    """The same through the command line, with a real experiment."""
    script = Path(__file__).parents[2] / "experiments/vision/lenet.py"
    flags = ["--preset", "smoke", "--steps", "40", "--distorted-steps", "40", "--seeds", "1", "--checkpoint-every", "5"]
    flags += ["--cpu-devices", "2"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    pin = lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def start(folder):
        command = [sys.executable, script, *flags, "--workdir", str(tmp_path / folder)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, preexec_fn=pin, text=True)

    assert start("undisturbed").wait() == 0
    for seconds in (6, 7, 8):
        process = start("killed")
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert start("killed").wait() == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("undisturbed", "killed")]
    assert results[0]["measured"] == results[1]["measured"]
    assert results[0]["device"].startswith("2 x cpu")
