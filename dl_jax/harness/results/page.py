"""The results page: `python -m dl_jax.results` writes docs/results.md from results/*.json and experiments/."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from dl_jax.core.errors import InputError, nearest
from dl_jax.harness.results.catalogue import Entry, catalogue
from dl_jax.harness.results.claims import MISSED, VERDICTS, Claim, quantity
from dl_jax.harness.results.record import (
    Result,
    Row,
    claim_of,
    claimed_cells,
    interval_cell,
    measured_cell,
    measured_values,
    read,
    tolerance_cell,
)

PAGE, RESULTS, EXPERIMENTS = Path("docs/results.md"), Path("results"), Path("experiments")

_INTRO = """\
# Results

Written by `python -m dl_jax.results` from the files in `results/`; do not edit. Every experiment in `experiments/` is
listed with every claim it makes, also those that were missed or not run.

| verdict | a claim about a value | a claim about a difference, paired by seed |
| --- | --- | --- |
| reproduced | the mean over seeds is within the tolerance | the interval excludes 0 on the claimed side and the size, \
if one is claimed, is within the tolerance; for "no loss", the interval's worse end is within the tolerance |
| better than claimed | outside the tolerance on the better side: the protocols differ, which a note should explain | \
the same |
| ordering only | | the interval excludes 0 on the claimed side, but the size is missed |
| not reproduced | anything else, also if one seed failed | anything else, also if one seed failed |
| not run | `results/` has no run with the claim's preset, data and number of seeds | the same |

The tolerance is declared in the experiment's file before the run. Measured is mean ± sample standard deviation (number
of seeds), always in the preset that the claim names; a quicker run never stands in this column. The interval is the
95 % confidence interval of the mean (Student's t). "Unverified" marks a number from memory of the paper.
"""


def render(results_dir: str | PurePath = RESULTS, experiments_dir: str | PurePath = EXPERIMENTS) -> str:
    """The page, in Markdown, of the experiments below `experiments_dir` and the evidence in `results_dir`/*.json.

    Links are relative to PAGE's folder. Raises InputError for a malformed result, one of an unknown experiment, or one
    whose claims were changed in the experiment's file after the run.
    """
    entries = catalogue(experiments_dir)
    evidence: dict[str, dict[str, Result]] = {name: {} for name in entries}  # experiment -> path -> result
    for path in sorted(Path(results_dir).glob("*.json")):
        result = read(path)
        name = result["experiment"]
        if name not in entries:
            raise InputError(f"{path}: experiment {name!r} is not in {experiments_dir}{nearest(name, entries)}")
        evidence[name][path.as_posix()] = result
    sections = {name: _section(entry, evidence[name]) for name, entry in entries.items()}
    counts = {name: counted for name, (_, counted) in sections.items()}
    return "\n".join([_INTRO, _summary(counts), *(text for text, _ in sections.values())])


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
    empty = "Not run; the file computes its claims, so that they are listed once it has run.\n"
    parts = [
        f"## {entry.name}\n\n{entry.title} ([file]({_link(entry.path)}))\n",
        "".join(f"- {_provenance(path, result)}\n" for path, result in results.items()),
        _markdown(header, rows) if rows else empty if entry.claims is None else "It makes no claim.\n",
        "".join(f"- {claim.quantity}: {claim.note}\n" for claim in claims if claim.note),
    ]
    return "\n".join(part for part in parts if part), counts


def _all_claims(entry: Entry, results: Mapping[str, Result]) -> list[Claim]:
    """The claims of the file, then those it no longer makes and a run has answered: what was missed stays in sight."""
    claims: dict[str, Claim] = {}
    for claim in entry.claims or ():
        if _key(claim) in claims:
            raise InputError(f"{entry.path}: two claims on {claim.quantity!r} have the same paper, locator and given")
        claims[_key(claim)] = claim
    for path, result in results.items():
        for said in result["claims"]:
            then, answered = claim_of(said), said["verdict"] not in ("not run", "not applicable")
            if entry.claims is not None and _key(then) not in claims and not answered:
                continue
            now = claims.setdefault(_key(then), then)
            for field in ("claimed", "tolerance", "better", "seeds"):
                old, new = getattr(then, field), getattr(now, field)
                if old != new:
                    raise InputError(
                        f"{path}: the claim on {then.quantity!r} had {field}={old} at the run and has {new} now; "
                        "restore it or run the experiment again"
                    )
    return list(claims.values())


def _key(claim: Claim) -> str:
    """What makes two claims the same one, at the time of a run and now."""
    return json.dumps([claim.metric, claim.versus, claim.paper, claim.locator, claim.preset, claim.given], default=str)


def _answers(claim: Claim, results: Mapping[str, Result]) -> list[tuple[str, str, str, str]]:
    """(measured, interval, verdict, link) of every result that made this claim before it ran, and can answer it."""
    answers = []
    for path, result in results.items():
        for entry in result["claims"]:
            values = quantity(claim, measured_values(result))
            if _key(claim_of(entry)) == _key(claim) and values is not None and entry["verdict"] != "not applicable":
                link = f"[{PurePath(path).stem}]({_link(path)})" + ("" if result["clean"] else ", uncommitted changes")
                answers.append((measured_cell(values), interval_cell(values), entry["verdict"], link))
    return answers


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
