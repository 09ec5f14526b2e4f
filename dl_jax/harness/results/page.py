"""The results page: `python -m dl_jax.results` writes docs/results.md from results/, experiments/ and papers/."""

import argparse
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from dl_jax.core.errors import InputError, nearest
from dl_jax.harness.results.claims import MISSED, VERDICTS, Claim, quantity
from dl_jax.harness.results.papers import Paper, papers
from dl_jax.harness.results.record import (
    Result,
    Row,
    amount,
    answer_cells,
    claim_of,
    claimed_cells,
    measured_values,
    read,
    tolerance_cell,
)

PAGE = Path("docs/results.md")
RESULTS, EXPERIMENTS, PAPERS = Path("results"), Path("experiments"), Path("papers")

_INTRO = """\
# Results

Written by `python -m dl_jax.results` from the files in `results/`, `experiments/` and `papers/`; do not edit. Every
experiment is listed with every claim it makes, also those that were missed or not run; the bar of a quick preset,
which a quick run prints, is not listed. Cells of the papers' tables that no experiment attempts are listed at the end.

| verdict | a claim about a value | a claim about a difference, paired by seed | a bar, or a number of cells |
| --- | --- | --- | --- |
| reproduced | the mean over seeds is within the tolerance | the interval excludes 0 on the claimed side and the size, \
if one is claimed, is within the tolerance; for "no loss", the interval's worse end is within the tolerance | the \
mean, or the worst seed, reaches the bar; the intervals of enough differences exclude 0 on the better side |
| better than claimed | outside the tolerance on the better side: the protocols differ, which a note should explain | \
the same | |
| ordering only | | the interval excludes 0 on the claimed side, but the size is missed | |
| not reproduced | anything else, also if one seed failed | anything else, also if one seed failed | anything else; a \
cell with a failed seed does not count |
| not run | `results/` has no run with the claim's preset, data and number of seeds | the same | the same |

The tolerance is declared in the experiment's file before the run. Measured is mean ± sample standard deviation (number
of seeds), always in the preset that the claim names; a quicker run never stands in this column. The interval is the
95 % confidence interval of the mean (Student's t). "Unverified" marks a number from memory of the paper.
"""


class Entry(NamedTuple):
    """An experiment's file."""

    name: str  # "vision/lenet"
    path: Path
    title: str  # the first line of its docstring
    claims: tuple[Claim, ...]


def render(
    results_dir: str | PurePath = RESULTS,
    experiments_dir: str | PurePath = EXPERIMENTS,
    papers_dir: str | PurePath = PAPERS,
) -> str:
    """The page, in Markdown: the experiments below `experiments_dir`, which are imported and not run, the evidence in
    `results_dir`/*.json, and the cells of `papers_dir`/*.toml.

    Links are relative to PAGE's folder. Raises InputError for a malformed file, a result of an unknown experiment or
    one whose claims were changed in the experiment's file after the run, and a cell that an experiment claims too.
    """
    entries = experiments(experiments_dir)
    evidence: dict[str, dict[str, Result]] = {name: {} for name in entries}  # experiment -> path -> result
    for path in sorted(Path(results_dir).glob("*.json")):
        result = read(path)
        name = result["experiment"]
        if name not in entries:
            raise InputError(f"{path}: experiment {name!r} is not in {experiments_dir}{nearest(name, entries)}")
        evidence[name][path.as_posix()] = result
    sections = {name: _section(entry, evidence[name]) for name, entry in entries.items()}
    counts = {name: counted for name, (_, counted) in sections.items()}
    rest = _not_attempted(papers(papers_dir), entries.values())
    return "\n".join([_INTRO, _summary(counts), *(text for text, _ in sections.values()), *rest])


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
        problem = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"{file}: {problem}; an experiment must import without an error, and run nothing") from None
    finally:
        del sys.modules[module_name]
    docstring = (module.__doc__ or "").strip()
    if not docstring:
        raise InputError(f"{file} has no docstring; expected one whose first line says what is claimed")
    claims = getattr(module, "CLAIMS", None)
    if not isinstance(claims, tuple) or not all(isinstance(claim, Claim) for claim in claims):
        raise InputError(f"{file}: CLAIMS is missing or wrong, expected a tuple of Claim, () for none")
    return Entry(name, file, docstring.splitlines()[0], claims)


def _summary(counts: Mapping[str, Counter[str]]) -> str:
    words = [word for word in VERDICTS if word != "not applicable"]
    total = sum(counts.values(), Counter())
    named = [*((f"[{name}](#{name.replace('/', '')})", count) for name, count in counts.items()), ("**all**", total)]
    return _markdown(("experiment", *words), [(name, *(str(c[word] or "") for word in words)) for name, c in named])


def _section(entry: Entry, results: Mapping[str, Result]) -> tuple[str, Counter[str]]:
    """The section of one experiment, and how often each verdict stands in it."""
    claims = _all_claims(entry, results)
    rows, counts = [], Counter[str]()
    for claim in claims:
        for *cells, word, link in _answers(claim, results) or [("", "", "not run", "")]:
            name, paper, number = claimed_cells(claim)
            given = "".join(f", {field}={value}" for field, value in claim.given.items())
            shown = f"**{word}**" if word in MISSED else word
            rows.append((name + given, paper, number, *cells, tolerance_cell(claim), shown, link))
            counts[word] += 1
    header = ("metric", "paper", "claimed", "measured", "interval", "tolerance", "verdict", "evidence")
    parts = [
        f"## {entry.name}\n\n{entry.title} ([file]({_link(entry.path)}))\n",
        "".join(f"- {_provenance(path, result)}\n" for path, result in results.items()),
        _markdown(header, rows) if rows else "It makes no claim.\n",
        "".join(f"- {claim.quantity}: {note}\n" for claim in claims if (note := _note(claim))),
    ]
    return "\n".join(part for part in parts if part), counts


def _note(claim: Claim) -> str:
    cells = ", ".join(f"{metric} − {versus}" for metric, versus in claim.cells)
    return "; ".join(part for part in (cells, claim.note) if part)


def _all_claims(entry: Entry, results: Mapping[str, Result]) -> list[Claim]:
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
            for field in ("claimed", "tolerance", "at_least", "at_most", "cells", "better", "seeds"):
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


def _answers(claim: Claim, results: Mapping[str, Result]) -> list[tuple[str, str, str, str]]:
    """(measured, interval, verdict, link) of every result that made this claim before it ran, and can answer it."""
    answers = []
    for path, result in results.items():
        for entry in result["claims"]:
            values = quantity(claim, measured_values(result))
            if _key(claim_of(entry)) == _key(claim) and values is not None and entry["verdict"] != "not applicable":
                link = f"[{PurePath(path).stem}]({_link(path)})" + ("" if result["clean"] else ", uncommitted changes")
                answers.append((*answer_cells(claim, values), entry["verdict"], link))
    return answers


def _not_attempted(all_papers: Sequence[Paper], entries: Iterable[Entry]) -> list[str]:
    """The section of the cells that no experiment attempts, folded away by paper. Raises InputError if one does."""
    claimed = {(claim.paper, claim.locator, claim.unit): entry.path for entry in entries for claim in entry.claims}
    parts = ["## Cells not attempted\n\nNumbers of the papers' tables that no experiment measures.\n"]
    for paper in all_papers:
        rows = []
        for i, cell in enumerate(paper.cells):
            experiment = claimed.get((paper.paper, cell.locator, cell.unit))
            if experiment:
                raise InputError(
                    f"{paper.path}: cell.{i}.locator {cell.locator!r} is claimed in {experiment} too; take it out here"
                )
            number = amount(cell.number, cell.unit) + ("" if cell.verified else " (unverified)")
            rows.append((cell.locator, cell.quantity, number, cell.read_in))
        notes = "".join(f"- {cell.locator}: {cell.note}\n" for cell in paper.cells if cell.note)
        count = "1 cell" if len(rows) == 1 else f"{len(rows)} cells"
        parts += [
            f"<details>\n<summary>{paper.paper}: {count}</summary>\n",
            f"{paper.authors} ({paper.year}), [{paper.title}]({paper.url}) ([file]({_link(paper.path)}))\n",
            _markdown(("cell", "quantity", "claimed", "read in"), rows),
            *([notes] if notes else []),
            "</details>\n",
        ]
    return parts if all_papers else []


def _provenance(path: str, result: Result) -> str:
    facts = [
        f"[{PurePath(path).stem}]({_link(path)}): `{result['command']}`",
        f"commit {result['commit'][:12]}" + ("" if result["clean"] else " **with uncommitted changes**"),
        f"seeds {', '.join(map(str, result['seeds']))}",
        f"{_duration(result)} on {result['device']}",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    return " · ".join(facts)


def _duration(result: Result) -> str:
    """Minutes and, where that is known, in how many attempts, and which other commits took part."""
    attempts = result.get("attempts", [])
    others = sorted({str(each["commit"])[:12] for each in attempts} - {result["commit"][:12]})
    killed = any(each["seconds"] is None for each in attempts)
    words = ("more than " if killed else "") + f"{result['wall_seconds'] / 60:.3g} min"
    words += f" in {len(attempts)} attempts" if len(attempts) > 1 else ""
    return words + (f", of commits {', '.join(others)} too" if others else "")


def _link(path: str | PurePath) -> str:
    return Path(os.path.relpath(path, PAGE.parent)).as_posix()


def _markdown(header: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, or with --check compares it. Exit status: 0, 1 if the page is out of date, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m dl_jax.results", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    check = parser.parse_args(arguments).check
    try:
        text = render()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if not check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"error: {PAGE} is out of date; run python -m dl_jax.results and commit it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
