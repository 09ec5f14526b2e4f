"""The Dockerfile's stages, and a target of it executed in a folder. No image is built.

In place of the base image is the Python that is given, and the folder takes the place of the root: what the Dockerfile
calls /opt, /src and /home lies in it. `useradd` is left out, because it would change the machine.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = re.compile(r"(?<![\w.])/(?=(?:opt|src|home)\b)")  # the roots of absolute paths that are moved


class Stage(NamedTuple):
    """FROM base, and what follows: (RUN, "pip install ..."), ..."""

    base: str
    lines: list[tuple[str, str]]


class Ready(NamedTuple):
    """What a container of the target would have."""

    folder: Path  # the work directory
    environment: dict[str, str]
    entrypoint: list[str]
    command: list[str]
    healthcheck: list[str]


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by their names."""
    found: dict[str, Stage] = {}
    stage = Stage("", [])
    plain = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    for line in filter(None, plain.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found[name] = Stage(base, [])
        else:
            stage.lines.append((word, rest))
    return found


def lines(found: dict[str, Stage], name: str) -> list[tuple[str, str]]:
    """All lines of a stage, those of its base stages first."""
    if name not in found:
        return []
    return [*lines(found, found[name].base), *found[name].lines]


def execute(name: str, root: Path, python: str, tree: Path = ROOT) -> Ready:
    """Copies from `tree` and runs what the target `name` of its Dockerfile copies and runs, within `root`."""
    found = stages((tree / "Dockerfile").read_text())
    moved = lambda text: FOLDERS.sub(f"{root}/", text)
    (root / "from").mkdir(exist_ok=True)
    (root / "from" / "python").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
    (root / "from" / "python").chmod(0o755)
    outside = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "VIRTUAL_ENV", "PIP_CONSTRAINT"))
    }
    environment = {**outside, "PATH": f"{root}/from:/usr/bin:/bin"}
    folder, starts = root, {"ENTRYPOINT": [], "CMD": [], "HEALTHCHECK": []}
    for word, rest in lines(found, name):
        match word:
            case "ENV":
                for key, value in (pair.split("=", 1) for pair in shlex.split(rest)):
                    environment[key] = moved(value).replace("$PATH", environment["PATH"])
            case "WORKDIR":
                folder = Path(moved(rest))
                folder.mkdir(parents=True, exist_ok=True)
            case "COPY" if rest.startswith("--from="):
                stage, source, target = rest.removeprefix("--from=").split()
                assert source == target  # a virtual environment cannot be moved: it is made where it is copied to
                execute(stage, root, python, tree)
            case "COPY":
                *sources, target = rest.split()
                for source in sources:
                    _copy(tree / source, folder / target / ("" if (tree / source).is_dir() else source))
            case "RUN" if not rest.startswith("useradd "):
                subprocess.run(["bash", "-ec", moved(rest)], cwd=folder, env=environment, check=True)
            case "ENTRYPOINT" | "CMD":
                starts[word] = json.loads(rest)
            case "HEALTHCHECK":
                starts[word] = json.loads(rest.partition("CMD ")[2])
    return Ready(folder, environment, starts["ENTRYPOINT"], starts["CMD"], starts["HEALTHCHECK"])


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copy(source, target)
