"""`.ci/release.py` in a small repository: what it refuses, what it writes, and how it ends."""

import datetime
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHANGELOG = (
    "# Changelog\n\n## [0.2.0] - unreleased\n\n### Added\n\n- A thing.\n\n## [0.1.0] - 2026-01-02\n\n- Another.\n"
)
GOLDEN = "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\nfolder.mkdir(parents=True)\n(folder / 'a').touch()\n"


def git(repository: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *who, *arguments], cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits away from a release: `.ci/run` only notes how it was called."""
    files = {
        "dl_jax/__init__.py": '__version__ = "0.1.0"\n',
        "CHANGELOG.md": CHANGELOG,
        "CITATION.cff": "cff-version: 1.2.0\nversion: 0.1.0\ndate-released: 2026-01-02\n",
        "tests/unit/golden_files.py": GOLDEN,
        ".ci/run": '#!/bin/sh\necho "called with $*"\nexit "${FAILS:-0}"\n',
        ".gitignore": "__pycache__/\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".ci/run").chmod(0o755)
    shutil.copy(ROOT / ".ci/release.py", tmp_path / ".ci/release.py")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    git(tmp_path, "tag", "v0.1.0")
    return tmp_path


def commit(repository: Path) -> None:
    git(repository, "add", "-A")
    git(repository, "commit", "--quiet", "--allow-empty", "-m", "x")


def release(repository: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ".ci/release.py", *words]
    return subprocess.run(
        command, cwd=repository, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def refusal(repository: Path, *words: str, **environment: str) -> str:
    """The one line of a command that is refused, and changes nothing."""
    before = git(repository, "status", "--porcelain")
    done = release(repository, *words, **environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert git(repository, "status", "--porcelain") == before
    return done.stderr


def test_a_release_is_prepared_committed_and_checked(repository):
    before = datetime.date.today()
    done = release(repository, "prepare", "0.2.0")
    assert done.returncode == 0, done.stderr
    [day] = re.findall(r"date-released: (.+)", (repository / "CITATION.cff").read_text())
    assert before <= datetime.date.fromisoformat(day) <= datetime.date.today()
    assert (repository / "dl_jax/__init__.py").read_text() == '__version__ = "0.2.0"\n'
    assert (repository / "CHANGELOG.md").read_text() == CHANGELOG.replace("unreleased", day)
    assert (repository / "CITATION.cff").read_text() == f"cff-version: 1.2.0\nversion: 0.2.0\ndate-released: {day}\n"
    assert (repository / "tests/golden/0.2.0/a").exists()
    commit(repository)
    done = release(repository, "check")
    assert done.returncode == 0, done.stderr
    assert "called with --all\n" in done.stdout
    *_, last = done.stdout.splitlines()
    assert last == f"git tag -a v0.2.0 -m 'dl_jax 0.2.0' {git(repository, 'rev-parse', 'HEAD')}"
    assert git(repository, "tag") == "v0.1.0"  # it makes none
    assert "`.ci/run --all` failed" in refusal(repository, "check", FAILS="1")
    git(repository, "tag", "v0.2.0")
    assert "the version is 0.2.0, expected one after v0.2.0" in refusal(repository, "check")


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A change of a file, which is committed."""

    def edit(repository: Path) -> None:
        path = repository / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        commit(repository)

    return edit


@pytest.mark.parametrize(
    ("edit", "version", "expected"),
    [
        (lambda repository: (repository / "b").touch(), "0.2.0", "1 files are not committed, such as b"),
        (lambda _: None, "0.2", "the version is '0.2', expected MAJOR.MINOR.PATCH"),
        (lambda _: None, "0.1.0", "the version is 0.1.0, expected one after v0.1.0"),
        (lambda repository: git(repository, "tag", "v0.10.0"), "0.9.0", "expected one after v0.10.0"),
        (edited("CHANGELOG.md", "- A thing.", ""), "0.2.0", "the section 0.2.0 of CHANGELOG.md is empty"),
        (edited("CHANGELOG.md", "unreleased", "2026-01-03"), "0.2.0", "of CHANGELOG.md has a date"),
        (edited("CHANGELOG.md", "## [", "## "), "0.2.0", "CHANGELOG.md has no section"),
    ],
)
def test_what_is_not_ready_to_be_prepared(repository, edit, version, expected):
    edit(repository)
    assert expected in refusal(repository, "prepare", version)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda repository: (repository / "b").touch(), "1 files are not committed, such as b"),
        (edited("dl_jax/__init__.py", "0.2.0", "0.3.0"), "CHANGELOG.md begins with 0.2.0, expected 0.3.0"),
        (
            lambda repository: git(repository, "checkout", "HEAD~", "--", "CHANGELOG.md") + str(commit(repository)),
            "is unreleased, expected its date",
        ),
        (edited("CITATION.cff", "version: 0.2.0", "version: 0.1.0"), "CITATION.cff has version 0.1.0, expected 0.2.0"),
        (edited("CITATION.cff", "\nversion: 0.2.0", ""), "CITATION.cff has version None, expected 0.2.0"),
        (lambda repository: git(repository, "rm", "-rq", "tests/golden") + str(commit(repository)), "is not there"),
    ],
)
def test_what_is_not_ready_to_be_tagged(repository, edit, expected):
    assert release(repository, "prepare", "0.2.0").returncode == 0
    commit(repository)
    edit(repository)
    assert expected in refusal(repository, "check")


def test_a_release_is_written_once(repository):
    (repository / "tests/golden/0.2.0").mkdir(parents=True)
    (repository / "tests/golden/0.2.0/a").touch()
    commit(repository)
    assert "tests/golden/0.2.0 is there already" in refusal(repository, "prepare", "0.2.0")


def test_this_repository_could_be_prepared():
    """Its version, its changelog and the writer of golden files are where the script looks for them."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.VERSION.fullmatch(script.package_version())
    assert script.top_section()["date"]
    assert (ROOT / "tests/unit/golden_files.py").exists()
