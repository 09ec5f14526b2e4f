"""Every command that the README shows is run, but for installing and testing; other pages are in test_pages."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dl_jax.harness.launch import CLAIM_MISSED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ELSEWHERE = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install -e . "
    "&& python experiments/vision/lenet.py --dataset digits",  # what follows the installation is run below
    "pip install -e '.[export]'",
    "pip install -e '.[test]' && python -m pytest",
    "python experiments/compression/pipeline.py",  # test_experiments runs it in small
    "python -m dl_jax.watch runs/lenet",  # test_pages watches the first run
}
PAPER = "python experiments/vision/lenet.py --dataset mnist --preset paper --seeds 5 --workdir runs/lenet"
SHORTER = (  # flags that cut it down to seconds
    "--seeds 2 --steps 8 --distorted-steps 8 --watch-every 8 "  # the programs of the first hour, compiled once
    "--batch-size 64 --warmup 0.3 --train-split train[:1437] --test-split test[:360]"
)


def commands(text: str) -> list[str]:
    """Those in blocks of a shell, in lines that are indented, and within a sentence, a line for each."""
    fenced = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    indented = [line.strip() for line in re.findall(r"^    (?:python|\./)\S* .*$", prose, re.M)]
    inline = [" ".join(words.split()) for words in re.findall(r"`((?:python3?|\./\S+)\s[^`]+)`", prose)]
    return [line for line in (*fenced, *indented, *inline) if line]


def run(command: str, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    words = [sys.executable if words[0] == "python" else words[0], *words[1:], *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "tpu_setup.sh").symlink_to(ROOT / "tpu_setup.sh")
    return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)


def within(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a Python command in this process, which has imported JAX already; gives the exit status."""
    words = shlex.split(command)[1:]
    run, name = (runpy.run_module, words[1]) if words[0] == "-m" else (runpy.run_path, str(ROOT / words[0]))
    monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
    monkeypatch.delitem(sys.modules, f"{name}.__main__", raising=False)  # another test may have imported it
    with pytest.raises(SystemExit) as ended:
        run(name, run_name="__main__")
    return ended.value.code or 0


def test_every_command_of_the_readme_is_known_here():
    assert set(commands(README)) == ELSEWHERE


def test_help(monkeypatch, capsys):
    status = within("python experiments/vision/lenet.py --help", monkeypatch)
    out = capsys.readouterr().out
    assert status == 0
    assert "--learning-rate" in out
    assert "LeNet-5 reaches 0.95 %" in out


@pytest.mark.data
def test_preparing_what_is_prepared_is_done_at_once(monkeypatch, capsys, tfds_dir):
    assert within("python -m dl_jax.data prepare mnist", monkeypatch) == 0
    assert "mnist" in capsys.readouterr().out


@pytest.mark.data
def test_the_paper_run_on_mnist(tmp_path, tfds_dir):
    done = run(PAPER, tmp_path, *SHORTER.split())
    assert done.returncode == 0, done.stderr
    assert "needs preset paper" in done.stdout
    assert (tmp_path / "runs/lenet/result.json").exists()


def test_the_dry_run_of_a_slice(tmp_path):
    done = run("./tpu_setup.sh --dry-run install", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gcloud" in done.stdout


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    done = run("python benchmarks/train_step.py", tmp_path, "--quick")
    assert done.returncode == 0, done.stderr
    assert "fit / bare step, MLP" in done.stdout


@pytest.mark.slow
def test_the_first_run_in_full(tmp_path):
    done = run("python experiments/vision/lenet.py --dataset digits", tmp_path)
    assert done.returncode == CLAIM_MISSED, done.stderr  # as the README says
    assert "(5)" in done.stdout
