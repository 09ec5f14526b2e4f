"""The results page: `python -m dl_jax.results` writes docs/results.md and docs/results.svg from results/, experiments/
and papers/."""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path, PurePath
from urllib.parse import quote

from dl_jax.core.errors import InputError, one_line
from dl_jax.harness.results.answers import Answer, Entry, Section, changed_fields, sections
from dl_jax.harness.results.chart import chart, label
from dl_jax.harness.results.claims import MISSED, VERDICTS, Claim
from dl_jax.harness.results.papers import Paper, papers
from dl_jax.harness.results.record import Result, Row, amount, answer_cells, claimed_cells, tolerance_cell

PAGE, CHART = Path("docs/results.md"), Path("docs/results.svg")
RESULTS, EXPERIMENTS, PAPERS = Path("results"), Path("experiments"), Path("papers")

_INTRO = """\
# Results

Every experiment states its claims before it runs: numbers of a paper, each with a tolerance, or bars of our own where
no paper has a number. This page compares the claims with what the runs measured, misses included.

![every answered claim: what was measured against what was claimed](results.svg)
"""

_READING = """\
## How to read the tables

- **Claimed**: the number with the tolerance below it, both declared in the experiment's file before the run. "No loss"
  is a difference that must not exceed the tolerance; "< 0" and "> 0" are orderings, which state no size. "Unverified"
  marks a number that was recalled from memory and not read in the paper.
- **Measured**: mean ± sample standard deviation (number of seeds), and below it the 95 % confidence interval of the
  mean (Student's t). Differences are paired by seed. Only runs of the preset and the data that the claim names count,
  with at least as many seeds as it asks for.
- **Verdict**, with a link to the file that holds every value:
    - *reproduced*: the mean is within the tolerance. For a difference, the interval must exclude 0 on the claimed side,
      and the mean must be within the tolerance if a size is claimed; for "no loss", the worse end of the interval must
      be within the tolerance. For a bar, the mean (or the worst seed) must reach it. For a number of cells, the
      intervals of that many differences must exclude 0 on the better side.
    - *better than claimed*: outside the tolerance on the better side. The protocols differ; the note should say how.
    - *ordering only*: the interval excludes 0 on the claimed side, but the size is missed.
    - *not reproduced*: anything else. A seed that failed (a value that is not finite) makes a claim, or a cell, missed.
- Claims about the quick presets, which are small runs on the bundled digits, are not listed; a run with
  `--preset quick` prints them. Names of measurements, such as `bits/test_anew`, are explained in the experiment's file.

This page is written by `python -m dl_jax.results` from the files in `results/`, `experiments/` and `papers/`; do not
edit it.
"""


def render(
    results_dir: str | PurePath = RESULTS,
    experiments_dir: str | PurePath = EXPERIMENTS,
    papers_dir: str | PurePath = PAPERS,
) -> dict[Path, str]:
    """{path: text} of the page, in Markdown, and of its chart: the experiments below `experiments_dir`, the evidence
    in `results_dir`, and the cells of `papers_dir`/*.toml.

    Links are relative to PAGE's folder. Raises InputError as `sections` does, and for a malformed file of
    `papers_dir` or a cell that an experiment claims too.
    """
    found = sections(results_dir, experiments_dir)
    rest = _not_attempted(papers(papers_dir), [each.entry for each in found])
    parts = [_INTRO, _counts(found), *_missed(found), _READING, _contents(found), *map(_section, found), *rest]
    return {PAGE: "\n".join(parts), CHART: chart({each.entry.name: each.answers for each in found})}


def _counts(found: Sequence[Section]) -> str:
    words = Counter(answer.verdict for each in found for answer in each.answers)
    missed, unanswered = sum(words[word] for word in MISSED), sum(len(each.unanswered) for each in found)
    return (
        f"Runs have answered {_count(words.total(), 'claim')}: {words['reproduced']} reproduced, "
        f"{words['better than claimed']} better than claimed and **{missed} missed**. "
        f"{_count(unanswered, 'more claim')} {'has' if unanswered == 1 else 'have'} not been run.\n"
    )


def _missed(found: Sequence[Section]) -> list[str]:
    rows = [
        (f"{_experiment(each.entry)}<br>**{escaped(label(answer.claim))}**", *_numbers(answer), _why(answer))
        for each in found
        for answer in each.answers
        if answer.verdict in MISSED
    ]
    return ["## Missed\n", _markdown(("claim", "claimed", "measured", "why"), rows)] if rows else []


def _why(answer: Answer) -> str:
    only = "Only the ordering is reproduced, not the size. " if answer.verdict == "ordering only" else ""
    return only + (_note(answer.claim) or "Not explained yet.") + _uncommitted(answer)


def _contents(found: Sequence[Section]) -> str:
    words = [word for word in VERDICTS if word != "not applicable"]
    counts = {
        _experiment(each.entry): Counter[str](answer.verdict for answer in each.answers)
        + Counter({"not run": len(each.unanswered)})
        for each in found
    }
    named = [*counts.items(), ("**all**", sum(counts.values(), Counter[str]()))]
    rows = [(name, *(str(count[word] or "") for word in words)) for name, count in named]
    intro = "Each section states the experiment's claim; its table shows what was measured."
    return f"## Experiments\n\n{intro}\n\n" + _markdown(("experiment", *words), rows)


def _experiment(entry: Entry) -> str:
    return f"[{entry.name}](#{entry.name.replace('/', '')})"


def _section(section: Section) -> str:
    entry, results = section.entry, section.results
    parts = [f"## {entry.name}\n\nClaim: {escaped(entry.title)} ([file]({link(entry.path)}))\n"]
    parts.append("```sh\n" + "".join(f"{command}\n" for command in commands(section)) + "```\n")
    if section.answers:
        header, names = _claims_column([answer.claim for answer in section.answers])
        rows = [
            (name, *_numbers(answer), _verdict(answer), _note(answer.claim))
            for name, answer in zip(names, section.answers, strict=True)
        ]
        parts.append(_markdown((header, "claimed", "measured", "verdict", "note"), rows))
    parts += [f"![{caption}]({link(figure)})\n\n<sub>{caption}</sub>\n" for figure, caption in captions(section)]
    parts += [f"<sub>{_provenance(path, result, entry)}</sub>\n" for path, result in results.items()]
    if section.unanswered:
        header, names = _claims_column(section.unanswered)
        rows = [(name, _claimed(each), _note(each)) for name, each in zip(names, section.unanswered, strict=True)]
        count, table = _count(len(rows), "claim"), _markdown((header, "claimed", "note"), rows)
        parts.append(f"<details>\n<summary>{count} that no run has answered yet</summary>\n\n{table}\n</details>\n")
    if not section.answers and not section.unanswered:
        parts.append("It makes no claim.\n")
    return "\n".join(parts)


def commands(section: Section) -> list[str]:
    """Those of the section's results, or the one that there is without any."""
    given = [one_line(result["command"]) for result in section.results.values()]
    return given or [f"python {section.entry.path.as_posix()}"]


def _claims_column(claims: Sequence[Claim]) -> tuple[str, list[str]]:
    """Header and cells of the column that names `claims`; what is the same for all of them stands in the header."""
    sources = [_source(claim) for claim in claims]
    shared = [part for part in sources[0] if all(part in other for other in sources)]
    rest = [[part for part in source if part not in shared] for source in sources]
    cells = [_two_lines(_name(claim), ", ".join(parts)) for claim, parts in zip(claims, rest, strict=True)]
    return _two_lines("claim", ", ".join(shared)), cells


def _source(claim: Claim) -> list[str]:
    """Where the claim stands, and what a run must be to answer it; that its preset is the paper's goes unsaid."""
    preset = [] if claim.preset == "paper" else [f"preset {claim.preset}"]
    return [claim.paper, claim.locator, *(f"{field}={value}" for field, value in claim.given.items()), *preset]


def _name(claim: Claim) -> str:
    return f"**{escaped(claim.quantity)}**"


def _claimed(claim: Claim) -> str:
    return _two_lines(escaped(claimed_cells(claim)[2]), tolerance_cell(claim))


def _numbers(answer: Answer) -> tuple[str, str]:
    """Claimed, and measured without a line break within a number."""
    measured = (text.replace(" ", "\N{NO-BREAK SPACE}") for text in answer_cells(answer.claim, answer.values))
    return _claimed(answer.claim), _two_lines(*measured)


def _two_lines(text: str, small: str) -> str:
    return f"{text}<br><sub>{escaped(small)}</sub>" if small else text


def _verdict(answer: Answer) -> str:
    shown = f"**{answer.verdict}**" if answer.verdict in MISSED else answer.verdict
    return f"[{shown}]({link(answer.path)}){_uncommitted(answer)}"


def _uncommitted(answer: Answer) -> str:
    return "" if answer.clean else " (the run had uncommitted changes)"


def _note(claim: Claim) -> str:
    cells = ", ".join(f"{metric} − {versus}" for metric, versus in claim.cells)
    return escaped("; ".join(part for part in (cells, claim.note) if part))


def captions(section: Section) -> list[tuple[Path, str]]:
    """The figures of a section, "results/lenet.error_rates.png" with the caption "error rates (lenet)"."""
    named = [(figure, *figure.name.rsplit(".", 2)) for figure in section.figures]
    return [(figure, escaped(f"{name.replace('_', ' ')} ({stem})")) for figure, stem, name, _ in named]


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
            rows.append(tuple(map(escaped, (cell.locator, cell.quantity, number, cell.read_in))))
        notes = "".join(f"- {escaped(f'{cell.locator}: {cell.note}')}\n" for cell in paper.cells if cell.note)
        parts += [
            f"<details>\n<summary>{escape(paper.paper)}: {_count(len(rows), 'cell')}</summary>\n",
            f"{escaped(paper.authors)} ({paper.year}), [{escaped(paper.title)}]({paper.url}) "
            f"([file]({link(paper.path)}))\n",
            _markdown(("cell", "quantity", "claimed", "read in"), rows),
            *([notes] if notes else []),
            "</details>\n",
        ]
    return parts if all_papers else []


def _provenance(path: Path, result: Result, entry: Entry) -> str:
    facts = [
        f"[{path.stem}]({link(path)})",
        f"commit {result['commit'][:12]}" + ("" if result["clean"] else " **with uncommitted changes**"),
        f"seeds {', '.join(map(str, result['seeds']))}",
        f"{_duration(result)} on {escaped(result['device'])}",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    fields, removed = changed_fields(entry, result)
    changed = [*(f"`{name}`" for name in fields), *([f"{removed} removed"] if removed else [])]
    facts += [f"**settings that have changed since the run: {', '.join(changed)}**"] if changed else []
    return " · ".join(facts)


def _duration(result: Result) -> str:
    """Minutes and, where that is known, in how many attempts, and which other commits took part."""
    attempts = result.get("attempts", [])
    others = sorted({(each["commit"] or "unknown")[:12] for each in attempts} - {result["commit"][:12]})
    killed = any(each["seconds"] is None for each in attempts)
    words = ("more than " if killed else "") + f"{result['wall_seconds'] / 60:.3g} min"
    words += f" in {len(attempts)} attempts" if len(attempts) > 1 else ""
    return words + (f", of commits {', '.join(others)} too" if others else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def link(path: str | PurePath) -> str:
    """The address of a file of the repository, relative to the folder of PAGE."""
    return quote(Path(os.path.relpath(path, PAGE.parent)).as_posix())


def escaped(text: str) -> str:
    """`text` as Markdown that shows it as it is, on one line and within a cell; "_" within a word needs no escape."""
    special = r"[\\`*\[\]|~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, r"\\\g<0>", one_line(text))


def _markdown(header: Sequence[str], rows: Sequence[Row]) -> str:
    """A table; the cells are Markdown, without a bare "|"."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, or with --check compares it. Exit status: 0, 1 if a file is out of date, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m dl_jax.results", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    try:
        files = render()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if not check:
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"error: {path} is out of date; run python -m dl_jax.results and commit it", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
