"""What the experiments claim, and what the results answer: the content of the results page, before it is a text."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from dl_jax.core.errors import InputError, nearest, one_line
from dl_jax.harness.results.claims import Claim, Verdict, quantity
from dl_jax.harness.results.record import Result, claim_of, measured_values, read


class Entry(NamedTuple):
    """An experiment's file."""

    name: str  # "vision/lenet"
    path: Path
    title: str  # the first line of its docstring
    claims: tuple[Claim, ...]
    recipes: Mapping[str, Mapping[str, Any]]  # preset -> {field of its Config: value}


class Answer(NamedTuple):
    """What one result says of one claim."""

    claim: Claim
    values: np.ndarray  # the `quantity` of the claim
    verdict: Verdict
    path: Path  # of the result
    clean: bool  # False: the run had uncommitted changes


class Section(NamedTuple):
    """An experiment and its evidence."""

    entry: Entry
    results: Mapping[Path, Result]
    figures: tuple[Path, ...]
    answers: tuple[Answer, ...]
    unanswered: tuple[Claim, ...]


def sections(results_dir: str | PurePath, experiments_dir: str | PurePath) -> list[Section]:
    """One section for each experiment below `experiments_dir`, which are imported and not run, in order of name.

    The evidence is `results_dir`/*.json; `results_dir`/STEM.NAME.png is a figure of STEM.json. Raises InputError for a
    malformed file, a result of an unknown experiment or one whose claims were changed in the experiment's file after
    the run, and a figure of no result.
    """
    entries = experiments(experiments_dir)
    evidence: dict[str, dict[Path, Result]] = {name: {} for name in entries}
    for path in sorted(Path(results_dir).glob("*.json")):
        result = read(path)
        name = result["experiment"]
        if name not in entries:
            raise InputError(f"{path}: experiment {name!r} is not in {experiments_dir}{nearest(name, entries)}")
        evidence[name][path] = result
    figures = sorted(Path(results_dir).glob("*.png"))
    stems = {path.stem for results in evidence.values() for path in results}
    for figure in figures:
        if figure_of(figure) not in stems:
            raise InputError(f"{figure} is a figure of no result; expected a name of the form RESULT.NAME.png")
    return [_section(entry, evidence[name], figures) for name, entry in entries.items()]


def figure_of(figure: Path) -> str | None:
    """The stem of the result that a figure belongs to: "lenet" of results/lenet.confusion.png."""
    parts = figure.name.rsplit(".", 2)
    return parts[0] if len(parts) == 3 else None


def _section(entry: Entry, results: Mapping[Path, Result], figures: list[Path]) -> Section:
    answers, unanswered = [], []
    for claim in _all_claims(entry, results):
        found = list(_answers(claim, results))
        answers += found
        unanswered += [] if found else [claim]
    mine = tuple(figure for path in results for figure in figures if figure_of(figure) == path.stem)
    return Section(entry, results, mine, tuple(answers), tuple(unanswered))


def experiments(directory: str | PurePath) -> dict[str, Entry]:
    """{name: entry} of every experiment below `directory`, in order of name; names that start with "_" are left out.

    Raises InputError if there is no such directory, or a file cannot be imported, has no docstring or no CLAIMS.
    """
    root = Path(directory)
    if not root.is_dir():
        raise InputError(f"there is no {root}; run this at the root of the repository")
    files = [file for file in root.rglob("*.py") if not any(p.startswith("_") for p in file.relative_to(root).parts)]
    entries = [_entry(file, file.relative_to(root).with_suffix("").as_posix()) for file in files]
    return {entry.name: entry for entry in sorted(entries)}


def _entry(file: Path, name: str) -> Entry:
    module_name = f"_experiment_{name}"  # no name that an import could ask for
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec
    assert spec.loader
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)  # a dataclass looks its module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        problem = one_line(f"{type(e).__name__}: {e}")
        raise InputError(f"{file}: {problem}; an experiment must import without an error, and run nothing") from None
    finally:
        del sys.modules[module_name]
    docstring = (module.__doc__ or "").strip()
    if not docstring:
        raise InputError(f"{file} has no docstring; expected one whose first line says what is claimed")
    claims = getattr(module, "CLAIMS", None)
    if not isinstance(claims, tuple) or not all(isinstance(claim, Claim) for claim in claims):
        raise InputError(f"{file}: CLAIMS is missing or wrong, expected a tuple of Claim, () for none")
    recipes = {preset: dataclasses.asdict(config) for preset, config in getattr(module, "PRESETS", {}).items()}
    return Entry(name, file, docstring.splitlines()[0], claims, recipes)


def changed_fields(entry: Entry, result: Result) -> tuple[list[str], int]:
    """How the config in the experiment's file differs now from that of a run.

    The fields that are new or have another value now, and the number of fields that were removed. Fields that claims
    name in `given`, which flags may set, and fields that flags of the run have changed are left out.
    """
    preset, _, flags = result["preset"].partition(", changed: ")
    then, now = result["config"], json.loads(json.dumps(entry.recipes.get(preset, result["config"])))
    free = {*flags.split(", "), *(name for claim in entry.claims for name in claim.given)}
    changed = [name for name in sorted(now.keys() - free) if name not in then or then[name] != now[name]]
    return changed, len(then.keys() - now.keys() - free)


def _all_claims(entry: Entry, results: Mapping[Path, Result]) -> list[Claim]:
    """The claims of the file, then those it no longer makes and a run has answered: what was missed stays in sight.

    The bars of a quick preset are left out: a quick run prints them.
    """
    claims: dict[str, Claim] = {}
    for claim in entry.claims:
        if claim.preset == "quick":
            continue
        if _key(claim) in claims:
            raise InputError(f"{entry.path}: two claims on {claim.quantity!r} have the same paper, locator and given")
        claims[_key(claim)] = claim
    for path, result in results.items():
        for said in result["claims"]:
            then, answered = claim_of(said), said["verdict"] not in ("not run", "not applicable")
            if then.preset == "quick" or (_key(then) not in claims and not answered):
                continue
            now = claims.setdefault(_key(then), then)
            for field in ("claimed", "unit", "tolerance", "at_least", "at_most", "cells", "better", "seeds"):
                old, new = getattr(then, field), getattr(now, field)
                if old != new:
                    raise InputError(
                        f"{path}: the claim on {then.quantity!r} had {field}={old} at the run and has {new} now; "
                        "restore it or run the experiment again"
                    )
    return list(claims.values())


def _key(claim: Claim) -> str:
    """What makes two claims the same one, at the time of a run and now."""
    return json.dumps([claim.quantity, claim.paper, claim.locator, claim.preset, claim.given], default=str)


def _answers(claim: Claim, results: Mapping[Path, Result]) -> Iterator[Answer]:
    """Those of every result that made this claim before it ran, and can answer it."""
    for path, result in results.items():
        for said in result["claims"]:
            values = quantity(claim, measured_values(result))
            if _key(claim_of(said)) == _key(claim) and values is not None and said["verdict"] != "not applicable":
                yield Answer(claim, values, said["verdict"], path, result["clean"])
