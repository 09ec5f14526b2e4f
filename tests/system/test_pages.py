"""The pages of docs/: every command on them is run by a test or checked, and tutorials are followed word for word."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_readme import commands

import dl_jax
from dl_jax.harness.fields import check
from dl_jax.harness.flags import Common, check_common, parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FOLLOW = Path(__file__).parent / "programs" / "follow.py"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# What other projects' programs do with their flags is theirs to test; some are in tests of a page of their own.
OF_OTHERS = {
    "cp",
    "curl",
    "docker",
    "echo",
    "eval",
    "export",
    "gcloud",
    "git",
    "openssl",
    "chmod",
    "ssh-add",
    "uv",
    "xpk",
}
SHORT = "--seeds 2 --steps 8 --distorted-steps 8 --watch-every 8"
# The commands of the tutorials, and the test of this file that runs each of them.
RUN_BY = {
    "first-hour.md": {
        "python experiments/vision/lenet.py --workdir runs/first": "test_the_first_hour",
        "python -m dl_jax.watch runs/first": "test_the_first_hour",
        "python experiments/vision/lenet.py --help": "test_the_first_hour",
        "python experiments/vision/lenet.py --learning-rate 0.03 --workdir runs/faster": "test_the_first_hour",
        "python -m dl_jax.watch runs/first runs/faster": "test_the_first_hour",
        "python export.py": "test_the_first_hour",
        "python -m dl_jax.serve digits.onnx": "test_the_first_hour",
    },
    "reproduce.md": {
        "python experiments/compression/filter_prune.py --preset paper --seeds 1 --workdir runs/filters": (
            "test_a_number_is_reproduced"
        ),
        "python -m dl_jax.data prepare mnist": "test_preparing_what_is_prepared_is_done_at_once",  # of test_readme
        "python experiments/vision/lenet.py --dataset mnist --preset paper --seeds 5 --workdir runs/lenet": (
            "test_the_paper_run_on_mnist"
        ),
    },
    "extend.md": {
        "python -m dl_jax.models Gated": "test_a_model_and_an_experiment_are_added",
        "python -m pytest tests/zoo/test_models.py -k 'gated.Gated'": "test_a_model_and_an_experiment_are_added",
        "python experiments/vision/gated.py --preset smoke --seeds 2 --workdir runs/smoke": (
            "test_a_model_and_an_experiment_are_added"
        ),
        "python -m pytest tests/experiments/test_experiments.py -k 'vision/gated'": (
            "test_a_model_and_an_experiment_are_added"
        ),
        "python experiments/vision/gated.py": "test_the_added_experiment_answers_its_bar",
    },
    "own-model.md": {
        "python mine.py": "test_ones_own_network_is_compressed",
        "python experiments/compression/pipeline.py --preset smoke --seeds 2": "test_smoke",  # of test_experiments
    },
}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def simple(line: str) -> list[list[str]]:
    """The commands of a line of a shell, as words, without comments and variables that are set for them."""
    words, found = shlex.split(line, comments=True), [[]]
    for word in words:
        if word in ("&&", "|", ";"):
            found.append([])
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


def problem(words: list[str], text: str, load_experiment) -> str:
    """What is wrong with a command of the page with this text, "" if nothing is."""
    match words:
        case ["python" | "python3", "-m", "venv" | "http.server" | "pytest" | "ruff" | "pyright", *rest]:
            missing = [path for path in rest if path.startswith("tests/") and not (ROOT / path).exists()]
            return f"there is no {missing[0]}" if missing else ""
        case ["python", "-m", module, *rest] if module.startswith("dl_jax."):
            path = ROOT.joinpath(*module.split("."))
            file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            return unknown(rest, file) if file.exists() else f"there is no module {module}"
        case ["python", script, *flags] if script.startswith("experiments/") and (ROOT / script).exists():
            return misread(script, flags, load_experiment)
        case ["python", script, *flags] if script.startswith(("benchmarks/", ".ci/")) and (ROOT / script).exists():
            return unknown(flags, ROOT / script)
        case ["python", script, *_]:  # which the page says to write
            return "" if f"`{script}`" in text else f"there is no {script}"
        case ["pip", "install", *rest]:
            asked = {extra for word in rest if "[" in word for extra in word[word.index("[") + 1 : -1].split(",")}
            return f"there is no extra {asked - set(EXTRAS)}" if asked - set(EXTRAS) else ""
        case ["./tpu_setup.sh", *rest]:
            return "" if set(rest) & set((ROOT / "tpu_setup.sh").read_text().split()) or rest == ["--help"] else rest[0]
        case ["sbatch", script, *_]:
            return "" if (ROOT / script).exists() else f"there is no {script}"
        case [".", ".venv/bin/activate"] | ["properdocs", "build", "--strict"]:
            return ""
        case [program, *_]:
            return "" if program in OF_OTHERS else f"no test knows the program {program}"
    return "no command"


def unknown(flags: list[str], file: Path) -> str:
    """Flags stand in the file, or one that it imports, with dashes, or as a parameter's name with underscores."""
    text = file.read_text()
    text += "".join(
        path.read_text()
        for name in re.findall(r"^from (dl_jax\S*) import", text, re.M)
        if (path := ROOT.joinpath(*name.split(".")).with_suffix(".py")).exists()
    )
    names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
    gone = [name for name in names if name not in text and name[2:].replace("-", "_") not in text]
    return f"{file.name} has no {gone[0]}" if gone else ""


def misread(script: str, flags: list[str], load_experiment) -> str:
    """What an experiment's command line says is parsed and checked as for a run, where it says more than all do."""
    module = load_experiment(script.removeprefix("experiments/").removesuffix(".py"))
    if flags == ["--help"]:
        return ""
    preset = flags[flags.index("--preset") + 1] if "--preset" in flags else "quick"
    if preset not in module.PRESETS:
        return f"{script} has no preset {preset}"
    fields = {field.name for each in (module.PRESETS[preset], Common) for field in dataclasses.fields(each)}
    names = [flag[2:].replace("-", "_") for flag in flags if flag.startswith("--") and flag != "--preset"]
    if gone := set(names) - fields:
        return f"{script} has no flag {sorted(gone)}"
    if set(names) - {"dataset", "seeds", "workdir"}:  # to parse takes a moment
        try:
            _, config, common = parse(flags, module.PRESETS, "")
        except SystemExit as end:
            return f"status {end.code}"
        check(config)
        check_common(common)
    return ""


def test_every_command_on_every_page_is_one_that_there_is(load_experiment):
    once = functools.cache(load_experiment)
    wrong, seen = [], set()
    for file in PAGES:
        text = file.read_text(encoding="utf-8")
        for line in commands(text):
            if line not in seen:
                seen.add(line)
                for words in simple(line):
                    if why := problem(words, text, once):
                        wrong.append(f"{file.name}: {line}: {why}")
    assert len(seen) > 100
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "python experiments/vision/lenet.py --learning-rates 1",
        "python experiments/vision/lenet.py --preset none",
        "python experiments/vision/gone.py",
        "python experiments/vision/lenet.py --learning-rate high",
        "python -m dl_jax.gone",
        "python -m dl_jax.results --gone",
        "python benchmarks/train_step.py --gone",
        "python -m pytest tests/gone.py",
        "pip install -e '.[gone]' && python -m pytest",
        "python unsaid.py",
        "gone --flag",
    ],
)
def test_what_is_no_longer_there_is_found(line, load_experiment, capsys):
    assert any(problem(words, "", load_experiment) for words in simple(line))


@pytest.mark.parametrize("name", RUN_BY)
def test_the_commands_of_a_tutorial_are_run(name):
    """But for installing and copying."""
    fenced = [line for block in re.findall(r"```sh\n(.*?)```", page(name), re.S) for line in block.splitlines()]
    run = {line for line in fenced if line.startswith("python ")}
    assert run == set(RUN_BY[name])
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [test for test in RUN_BY[name].values() if f"def {test}(" not in tests] == []


def follow(folder: Path, *lines: str, of: Path = ROOT) -> str:
    """Runs commands in `folder`, with the code that is in `of`, and gives what they print."""
    environment = {**os.environ, "PYTHONPATH": str(of), "XLA_FLAGS": ""}
    command = [sys.executable, str(FOLLOW), *lines]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def programs(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page(name), re.S)


def first_hour(folder: Path) -> list[str]:
    """Prepares `folder` for the commands of first-hour.md; gives these, with the runs cut down to seconds."""
    (folder / "experiments").symlink_to(ROOT / "experiments")
    (folder / "export.py").write_text(programs("first-hour.md")[0])
    (folder / "predict.py").write_text(programs("guide.md")[0] + "print(digits.shape, step)\n")
    (folder / "runs").mkdir()
    (folder / "runs" / "lenet").symlink_to("first")  # as the guide's program calls it
    lines = [line for line in re.findall(r"^python .*$", page("first-hour.md"), re.M) if ".serve " not in line]
    return [f"{line} {SHORT}" if "--workdir" in line else line for line in lines]


def test_the_first_run_is_watched_and_the_guides_program_predicts_with_it(tmp_path):
    out = follow(tmp_path, *first_hour(tmp_path)[:2], "python predict.py")
    assert all(part in out for part in ("── distorted ─", "test_error/distorted", "state     finished"))
    assert "(360,) 8" in out


@contextlib.contextmanager
def serving(flags: Sequence[str], folder: Path) -> Iterator[str]:
    """The address of a server that is started in `folder`, at a port that is free."""
    words = [sys.executable, "-m", "dl_jax.serve", *flags, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().split()[-1]
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_file_of_the_pipeline_is_served_as_the_guide_says(tmp_path):
    text = page("guide.md")
    section = text[text.index("## Serve a file") :]
    section = section[: section.index("\n## ", 1)]
    train, serve = re.findall(r"^python (?:experiments|-m).*$", section, re.M)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    [_, inputs] = re.findall(r"```python\n(.*?)```", section, re.S)
    (tmp_path / "inputs.py").write_text(inputs)
    follow(tmp_path, train, "python inputs.py")
    curls = [
        shlex.split(line, comments=True) for line in re.findall(r"^curl .*8000/(?:predict|explain)$", section, re.M)
    ]
    assert len(curls) >= 2
    _, _, _, *flags = shlex.split(serve)
    with serving(flags[: flags.index("--port")], tmp_path) as address:
        for words in curls:
            words = [word.replace("http://127.0.0.1:8000", address) for word in words]
            done = subprocess.run(
                [*words, "--max-time", "20"], cwd=tmp_path, capture_output=True, text=True, check=True
            )
            assert json.loads(done.stdout).keys() & {"answers", "answer"}


@pytest.mark.slow
def test_the_first_hour(tmp_path):
    """In its order; the last run finds its folder finished."""
    out = follow(tmp_path, *first_hour(tmp_path))
    assert "learning_rate" in out
    assert "step 8: " in out
    assert "--learning-rate" in out
    with serving(["digits.onnx"], tmp_path) as address:
        body = json.dumps({"inputs": np.zeros((1, 28, 28, 1)).tolist()}).encode()
        asked = urllib.request.Request(f"{address}/predict", body, {"Content-Type": "application/json"})
        assert len(json.loads(urllib.request.urlopen(asked, timeout=20).read())["answers"]) == 1


def added(folder: Path) -> list[str]:
    """The tree with the files that extend.md says to write, in `folder`; the commands of the page."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("dl_jax", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    text = page("extend.md")
    files = dict(re.findall(r"[Ww]rite\s+this\s+to\s+`(\S+)`:\n\n```python\n(.*?)```", text, re.S))
    assert len(files) == len(programs("extend.md")) == 2
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return re.findall(r"^python .*$", text, re.M)  # in blocks of a shell alone


def test_a_model_and_an_experiment_are_added(tmp_path):
    lines = added(tmp_path)
    out = follow(tmp_path, *lines[:-1], of=tmp_path)
    assert "158,010" in out
    assert "error" in out
    assert len(re.findall(r"^=.* \d+ passed", out, re.M)) == 2
    assert " failed" not in out
    assert (tmp_path / "runs/smoke/result.json").exists()


def test_whole_programs_on_pages_have_the_style_of_the_rest(tmp_path):
    added(tmp_path)
    new = ["dl_jax/models/vision/gated.py", "experiments/vision/gated.py", "mine.py", "export.py"]
    (tmp_path / "mine.py").write_text(programs("own-model.md")[0])
    (tmp_path / "export.py").write_text(programs("first-hour.md")[0])
    for arguments in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *arguments, *new]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_added_experiment_answers_its_bar(tmp_path):
    lines = added(tmp_path)
    assert "our bar" in follow(tmp_path, lines[-1], of=tmp_path)


@pytest.mark.slow
def test_a_number_is_reproduced(tmp_path, monkeypatch, capsys):
    for name in ("experiments", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    [line] = [line for line in RUN_BY["reproduce.md"] if "filter_prune" in line]
    follow(tmp_path, line)
    (tmp_path / "compare.py").write_text(programs("reproduce.md")[0])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("compare.py")
    rows = re.findall(r": ([\d.]+), committed ([\d.]+) %", capsys.readouterr().out)
    assert len(rows) == 8
    assert all(mine == committed for mine, committed in rows)


@pytest.mark.slow
def test_ones_own_network_is_compressed(tmp_path):
    shutil.copy(DOCS / "compress.py", tmp_path)
    (tmp_path / "mine.py").write_text(programs("own-model.md")[0])
    out = follow(tmp_path, "python mine.py")
    shares = dict(re.findall(r"^(\w+)\.onnx: \d+ kB, agrees with the network on ([\d.]+) %", out, re.M))
    assert set(shares) == {"float", "small", "int8"}
    assert float(shares["float"]) == 100
    assert min(map(float, shares.values())) > 90


@pytest.fixture(scope="module")
def website():
    spec = importlib.util.spec_from_file_location("website", DOCS / "website.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "link", "on_the_site"),
    [
        ("index.md", "docs/guide.md#images", "guide.md#images"),
        ("index.md", "CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("index.md", "experiments/vision/lenet.py", "experiments/vision/lenet.py.md"),
        ("guide.md", "../README.md", "index.md"),
        ("guide.md", "scale.md#buckets", "scale.md#buckets"),
        ("guide.md", "compress.py", "docs/compress.py.md"),
        ("results.md", "../results/vision-lenet.json", "results/vision-lenet.json"),
        ("api/core.md", "../../dl_jax/core/fit.py", "../dl_jax/core/fit.py.md"),
        ("guide.md", "gone.md", "gone.md"),  # which a strict build refuses
        ("guide.md", "../../outside", "../../outside"),
        ("guide.md", "#images", "#images"),
        ("guide.md", "https://example.org/a", "https://example.org/a"),
    ],
)
def test_links_lead_to_the_same_file_on_the_site(website, name, link, on_the_site):
    assert website.relinked(name, f"see [it]({link}).") == f"see [it]({on_the_site})."


def test_every_file_of_the_package_has_its_place_in_the_api(website):
    files = {
        path for path in (ROOT / "dl_jax").rglob("*.py") if not path.name.startswith("_") or path.name == "__init__.py"
    }
    names = {website.dotted(path.with_suffix("")).removesuffix(".__init__") for path in files} - {"dl_jax"}
    described = [name for text in website.api().values() for name in re.findall(r"^::: (\S+)$", text, re.M)]
    assert sorted(described) == sorted(names)


def test_names_that_a_package_gives_its_users_are_linked(website):
    found = website.reexported(ROOT / "dl_jax" / "losses" / "__init__.py")
    assert "[`huber`][dl_jax.losses.regression.huber]" in found
    assert website.reexported(ROOT / "dl_jax" / "control" / "__init__.py") == []


def test_comments_that_say_shapes_come_to_the_api(tmp_path):
    griffe = pytest.importorskip("griffe")
    source = '''
import typing

class State(typing.NamedTuple):
    """All."""

    step: int  # int32 [], or [S]
    key: int

def f(
    x: str = "#",  # [B, T]
    # one more
    y: int = 0,
) -> int:  # -> [B]
    """Doubles."""
    return 2  # not this

def g(x): return x  # [B]

def h(x):
    return x  # nor this
'''
    (tmp_path / "shaped.py").write_text(source)
    extensions = griffe.load_extensions(str(DOCS / "comments.py"))
    module = griffe.load("shaped", extensions=extensions, search_paths=[tmp_path], allow_inspection=False)
    said = lambda name: module[name].docstring and module[name].docstring.value
    assert said("State.step") == "int32 [], or [S]"
    assert said("State.key") is None
    assert said("f") == "Doubles.\n\n`x: [B, T]`\n\n`-> [B]`"
    assert said("h") is None


def test_every_page_has_its_place_in_the_navigation():
    """A strict build refuses a page that is named there and missing; here a page that is not named."""
    text = (ROOT / "properdocs.yml").read_text()
    assert [path.name for path in DOCS.glob("*.md") if f" {path.name}\n" not in text] == []


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "date-released"} <= set(citation)
    assert citation["version"] == dl_jax.__version__
    assert all("name" in author or "family-names" in author for author in citation["authors"])
