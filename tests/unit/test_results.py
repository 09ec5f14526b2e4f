"""Result files, papers, and the results page."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.harness import Claim, on_digits
from dl_jax.harness.results import page as results
from dl_jax.harness.results.answers import experiments, sections
from dl_jax.harness.results.claims import judge, summary
from dl_jax.harness.results.gallery import GALLERY, gallery
from dl_jax.harness.results.page import CHART, PAGE, render
from dl_jax.harness.results.papers import papers
from dl_jax.harness.results.record import answer_cells, claim_of, claimed_cells, read, table_rows, tolerance_cell

ROOT = Path(__file__).parents[2]
MNIST = {"dataset": "mnist"}
DOE = "Doe 2020"


def claim(claimed: float | None = 1.0, tolerance: float = 0.1, **fields: Any) -> Claim:
    return Claim("error", DOE, "Table 1", claimed, tolerance, **fields)


LENET = '''
"""LeNet | reaches 1 % test error.

More.
"""
import dataclasses
import functools
from dl_jax.harness import Claim, on_digits

@dataclasses.dataclass(frozen=True)
class Config:
    steps: "int" = 1

doe = functools.partial(Claim, paper="Doe 2020")
ERRORS = {"paper": 1.0, "short": 0.5}
CLAIMS = (
    doe("error", locator="Table 1", claimed=ERRORS["paper"], tolerance=0.1, unit="%", given={"dataset": "mnist"},
        note="the paper says nothing of the batch size"),
    *(doe("error", locator="Table 1", claimed=value, tolerance=0.1, unit="%", verified=False, preset=preset)
      for preset, value in ERRORS.items() if preset != "paper"),
    doe("error", locator="Section 3", versus="baseline"),
    doe("error/imagenet", locator="Table 2", claimed=20.0, tolerance=1.0, unit="%"),
    on_digits("error", at_most=9.0, unit="%", note="a baseline"),
)
if __name__ == "__main__":
    raise RuntimeError("an experiment is never run")
'''


def lenet_claims() -> list[Claim]:
    return [
        claim(unit="%", given=MNIST, note="the paper says nothing of the batch size"),
        claim(0.5, 0.1, unit="%", verified=False, preset="short"),
        Claim("error", DOE, "Section 3", None, 0, versus="baseline"),
        Claim("error/imagenet", DOE, "Table 2", 20.0, 1.0, "%"),
        on_digits("error", at_most=9.0, unit="%", note="a baseline"),
    ]


def result(preset: str = "paper", claims: list[Claim] | None = None, **fields: Any) -> dict[str, Any]:
    measured = {"error": [1.0, 1.1, 0.9, 1.05, 0.95], "baseline": [1.5, 1.6, 1.4, 1.45, 1.55]}
    return {
        "experiment": "vision/lenet",
        "command": f"python experiments/vision/lenet.py --preset {preset}",
        "commit": "0123456789abcdef",
        "clean": True,
        "config": MNIST,
        "preset": preset,
        "dataset": "mnist",
        "seeds": [0, 1, 2, 3, 4],
        "measured": {name: summary(values) for name, values in measured.items()},
        "claims": judge(claims or lenet_claims(), measured, preset=preset, config=MNIST),
        "device": "cpu",
        "versions": {"jax": "0.10.2", "python": "3.11"},
        "wall_seconds": 90.0,
        **fields,
    }


CELLS = """\
paper = "Doe 2020"
title = "On errors"
authors = "Jane Doe"
year = 2020
url = "https://example.org/doe"

[[cell]]
locator = "Table 3, MLP"
quantity = "test error"
number = 1
unit = "%"
verified = true
read_in = "the paper"

[[cell]]
locator = "Table 3, CNN"
quantity = "test error"
number = 0.5
unit = "%"
verified = false
read_in = "memory"
note = "of one run"
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository with two experiments, a paper and a result, as the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would outlive a change within a second
    for folder in ("experiments/vision", "results", "papers"):
        Path(folder).mkdir(parents=True)
    Path("experiments/vision/lenet.py").write_text(LENET)
    Path("experiments/vision/_helper.py").write_text("no Python")
    Path("experiments/kmeans.py").write_text('"""Finds clusters."""\nCLAIMS = ()\n')
    Path("papers/doe2020.toml").write_text(CELLS)
    Path("results/lenet.json").write_text(json.dumps(result()))


EXPECTED = """\
Runs have answered 2 claims: 2 reproduced, 0 better than claimed and **0 missed**. 2 more claims have not been run.

## How to read the tables
@
## Experiments

Each section states the experiment's claim; its table shows what was measured.

| experiment | reproduced | better than claimed | ordering only | not reproduced | not run |
| --- | --- | --- | --- | --- | --- |
| [kmeans](#kmeans) |  |  |  |  |  |
| [vision/lenet](#visionlenet) | 2 |  |  |  | 2 |
| **all** | 2 |  |  |  | 2 |

## kmeans

Claim: Finds clusters. ([file](../experiments/kmeans.py))

```sh
python experiments/kmeans.py
```

It makes no claim.

## vision/lenet

Claim: LeNet \\| reaches 1 % test error. ([file](../experiments/vision/lenet.py))

```sh
python experiments/vision/lenet.py --preset paper
```

| claim<br><sub>Doe 2020</sub> | claimed | measured | verdict | note |
| --- | --- | --- | --- | --- |
| **error**<br><sub>Table 1, dataset=mnist</sub> | 1 %<br><sub>± 0.1</sub> | \
1.000 ± 0.079 (5)<br><sub>\\[0.902, 1.098\\]</sub> | \
[reproduced](../results/lenet.json) | the paper says nothing of the batch size |
| **error − baseline**<br><sub>Section 3</sub> | < 0 | -0.500 ± 0.071 (5)<br><sub>\\[-0.588, -0.412\\]</sub> | \
[reproduced](../results/lenet.json) |  |

<sub>[lenet](../results/lenet.json) · commit 0123456789ab · seeds 0, 1, 2, 3, 4 · 1.5 min on cpu · \
jax 0.10.2, python 3.11</sub>

<details>
<summary>2 claims that no run has answered yet</summary>

| claim<br><sub>Doe 2020</sub> | claimed | note |
| --- | --- | --- |
| **error**<br><sub>Table 1, preset short</sub> | 0.5 % (unverified)<br><sub>± 0.1</sub> |  |
| **error/imagenet**<br><sub>Table 2</sub> | 20 %<br><sub>± 1</sub> |  |

</details>

## Cells not attempted

Numbers of the papers' tables that no experiment measures.

<details>
<summary>Doe 2020: 2 cells</summary>

Jane Doe (2020), [On errors](https://example.org/doe) ([file](../papers/doe2020.toml))

| cell | quantity | claimed | read in |
| --- | --- | --- | --- |
| Table 3, MLP | test error | 1 % | the paper |
| Table 3, CNN | test error | 0.5 % (unverified) | memory |

- Table 3, CNN: of one run

</details>
"""


def page() -> str:
    """The Markdown, with plain spaces."""
    return render()[PAGE].replace("\N{NO-BREAK SPACE}", " ")


def chart_rows() -> list[str]:
    titles = "{http://www.w3.org/2000/svg}g/{http://www.w3.org/2000/svg}title"
    return [title.text or "" for title in ET.fromstring(render()[CHART].encode()).iterfind(titles)]


def test_the_page_lists_every_experiment_and_every_claim(repository: None) -> None:
    text, (before, after) = page(), EXPECTED.split("@")
    assert text.startswith("# Results\n")
    assert text[text.index("Runs have") :].startswith(before)
    assert text.endswith(after)
    for word in ("reproduced", "better than claimed", "ordering only", "not reproduced"):
        assert f"\n    - *{word}*: " in text[text.index("## How to read the tables") : text.index("## Experiments")]
    assert chart_rows() == ["error: reproduced", "error − baseline: reproduced"]


def test_a_quick_number_never_stands_in_the_measured_column(repository: None) -> None:
    Path("results/lenet.json").write_text(json.dumps(result("smoke")))
    assert "1.000 ± 0.079" not in page()
    assert "| **all** |  |  |  |  | 4 |" in page()
    assert chart_rows() == []


def test_settings_that_have_changed_since_a_run_are_named(repository: None) -> None:
    recipe = """
import dataclasses
@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    clip: float = 1.0
    hidden: tuple[int, ...] = (3, 4)
    steps: int = 9
PRESETS = {"paper": Config()}
"""
    Path("experiments/vision/lenet.py").write_text(LENET + recipe)
    same = {**MNIST, "clip": 1.0, "hidden": [3, 4], "steps": 9}
    for config, preset, expected in (
        (same, "paper", None),
        ({**same, "steps": 5}, "paper, changed: steps", None),  # by a flag, and answers no claim of the preset
        ({**same, "steps": 5}, "paper", "`steps`"),
        ({**MNIST, "hidden": [3, 5], "steps": 9, "width": 1}, "paper", "`clip`, `hidden`, 1 removed"),
    ):
        Path("results/lenet.json").write_text(json.dumps(result(config=config) | {"preset": preset, "claims": []}))
        found = re.search(r"settings that have changed since the run: (.*?)[*]{2}</sub>", page())
        assert (found and found[1]) == expected


def test_a_miss_and_uncommitted_changes_are_shown(repository: None) -> None:
    missed = result(clean=False, claims=[claim(2.0, 0.1, better="higher", given=MNIST)])
    Path("experiments/vision/lenet.py").write_text('"""LeNet."""\nCLAIMS = ()\n')  # the claim has been taken out since
    Path("results/lenet.json").write_text(json.dumps(missed))
    text = page()
    assert "commit 0123456789ab **with uncommitted changes**" in text
    assert "[**not reproduced**](../results/lenet.json) (the run had uncommitted changes) |" in text
    assert "| Not explained yet. (the run had uncommitted changes) |\n" in text
    assert "1 claim: 0 reproduced, 0 better than claimed and **1 missed**. 0 more claims have not been run." in text


def test_a_miss_stands_at_the_top_with_its_note(repository: None) -> None:
    missed = [claim(2.0, 0.1, given=MNIST, better="higher", note="A *bold*\nguess | `x`"), *lenet_claims()[1:]]
    file = Path("experiments/vision/lenet.py")
    file.write_text(f'"""LeNet."""\nfrom dl_jax.harness import Claim\nCLAIMS = {tuple(missed)!r}\n')
    Path("results/lenet.json").write_text(json.dumps(result(claims=missed)))
    top = page()[: page().index("## Experiments")]
    assert top.index("results.svg") < top.index("**1 missed**") < top.index("## Missed")
    assert (
        "\n| [vision/lenet](#visionlenet)<br>**error** | 2<br><sub>± 0.1</sub> | 1.000 ± 0.079 (5)"
        "<br><sub>\\[0.902, 1.098\\]</sub> | A \\*bold\\* guess \\| \\`x\\` |\n"
    ) in top
    assert "baseline" not in top  # reproduced
    assert chart_rows() == ["error: not reproduced", "error − baseline: reproduced"]


def test_a_difference_of_the_wrong_size_is_a_miss_that_says_so(repository: None) -> None:
    order = Claim("error", DOE, "Section 3", -2.0, 0.1, versus="baseline", note="Why.")
    Path("results/lenet.json").write_text(json.dumps(result(claims=[*lenet_claims(), order])))
    with pytest.raises(InputError, match=r"'error − baseline' had claimed=-2\.0 at the run"):
        render()
    order = Claim("error", DOE, "Section 4", -2.0, 0.1, versus="baseline", note="Why.")
    Path("results/lenet.json").write_text(json.dumps(result(claims=[*lenet_claims(), order])))
    assert "| Only the ordering is reproduced, not the size. Why. |\n" in page()
    assert "| **all** | 2 |  | 1 |  | 2 |" in page()


def test_a_note_may_be_reworded_after_the_run(repository: None) -> None:
    Path("experiments/vision/lenet.py").write_text(LENET.replace("the paper says nothing of", "It does not give"))
    assert "| It does not give the batch size |\n" in page()
    assert "the paper says nothing of" not in page()


def test_a_claim_that_was_changed_after_the_run_is_refused(repository: None) -> None:
    Path("experiments/vision/lenet.py").write_text(LENET.replace("tolerance=0.1", "tolerance=0.5"))
    with pytest.raises(InputError, match=r"lenet.json: .*'error' had tolerance=0.1 at the run and has 0.5 now"):
        render()


def test_a_unit_that_was_changed_after_the_run_is_refused(repository: None) -> None:
    Path("experiments/vision/lenet.py").write_text(LENET.replace('unit="%"', 'unit="nats"'))
    with pytest.raises(InputError, match=r"lenet.json: .*'error' had unit=% at the run and has nats now"):
        render()


def test_the_bar_of_a_quick_preset_may_move(repository: None) -> None:
    before = render()
    Path("experiments/vision/lenet.py").write_text(LENET.replace("at_most=9.0", "at_most=8.0"))
    assert render() == before


def test_a_claim_that_was_made_after_the_run_is_not_answered_by_it(repository: None) -> None:
    Path("results/lenet.json").write_text(json.dumps(result(claims=lenet_claims()[1:])))
    assert "| **all** | 1 |  |  |  | 3 |" in page()


def test_two_claims_that_cannot_be_told_apart_are_refused(repository: None) -> None:
    Path("experiments/vision/lenet.py").write_text(LENET.replace("preset=preset", 'given={"dataset": "mnist"}'))
    with pytest.raises(InputError, match="two claims on 'error' have the same paper, locator and given"):
        render()


def test_two_results_of_an_experiment_both_stand_on_the_page(repository: None) -> None:
    Path("results/lenet-b.json").write_text(json.dumps(result(commit="fedcba")))
    assert "| **all** | 4 |  |  |  | 2 |" in page()
    assert page().count("--preset paper\n") == 2
    for name in ("lenet", "lenet-b"):
        assert page().count(f"[reproduced](../results/{name}.json)") == 2
    assert chart_rows() == ["error: reproduced"] * 2 + ["error − baseline: reproduced"] * 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("p|q", "p\\|q"),
        ("two\n\nlines", "two lines"),
        ("*a* `b` [c](d) ~~e~~ $f$ \\", r"\*a\* \`b\` \[c\](d) \~\~e\~\~ \$f\$ \\"),
        ("snake_case _x_ __y__", r"snake_case \_x\_ \_\_y\_\_"),
        ("a < b <br> </td> &lt; R&D", r"a < b \<br> \</td> \&lt; R&D"),
    ],
)
def test_text_is_shown_as_it_is(repository: None, text: str, shown: str) -> None:
    other = Claim("error", text, "Table 8", 1.0, 0.1, note=text)
    Path("results/lenet.json").write_text(json.dumps(result(claims=[*lenet_claims(), other])))
    (row,) = (line for line in page().splitlines() if "Table 8" in line)
    assert row.startswith(f"| **error**<br><sub>{shown}, Table 8</sub> | ")
    assert row.endswith(f" | {shown} |")


# --- figures -----------------------------------------------------------------------------------------------------


def test_figures_stand_in_the_section_of_their_result(repository: None) -> None:
    Path("results/lenet-b.json").write_text(json.dumps(result(commit="fedcba")))
    for name in ("lenet.error_rates", "lenet.a", "lenet-b.b_"):
        Path(f"results/{name}.png").touch()
    text = page()
    section = text[text.index("## vision/lenet") : text.index("## Cells not attempted")]
    assert [line for line in section.splitlines() if line.startswith("![")] == [
        "![b (lenet-b)](../results/lenet-b.b_.png)",
        "![a (lenet)](../results/lenet.a.png)",
        "![error rates (lenet)](../results/lenet.error_rates.png)",
    ]
    assert "\n<sub>error rates (lenet)</sub>\n" in section
    assert text.count("![") == 4  # the chart, too


def test_the_gallery_has_figure_claim_verdicts_and_command_of_every_experiment(repository: None) -> None:
    files = gallery(sections("results", "experiments"))
    chart = PAGE.parent / "gallery" / "vision-lenet.svg"
    assert set(files) == {GALLERY, chart}
    assert {element.text for element in ET.fromstring(files[chart]).iter()} >= {"vision/lenet", "error"}
    text = files[GALLERY]
    assert re.findall("^## (.*)$", text, re.M) == ["kmeans", "vision/lenet"]
    card = text.partition("## vision/lenet\n")[2]
    assert "LeNet \\| reaches 1 % test error." in card
    assert "```sh\npython experiments/vision/lenet.py --preset paper\n```" in card
    assert "**Claims:** 2 reproduced, 2 not run ([the numbers](results.md#visionlenet))" in card
    assert "](gallery/vision-lenet.svg)" in card
    assert "**Claims:** it makes no claim" in text
    Path("results/lenet.a_b.png").touch()
    files = gallery(sections("results", "experiments"))
    assert set(files) == {GALLERY}
    assert "![a b (lenet)](../results/lenet.a_b.png)" in files[GALLERY]


@pytest.mark.parametrize("name", ["lenett.a.png", "lenet.png", "lenet.a.b.png"])
def test_a_figure_of_no_result_is_refused(repository: None, name: str) -> None:
    Path(f"results/{name}").touch()
    with pytest.raises(InputError, match=f"^results/{name} is a figure of no result; expected a name of the form"):
        render()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = (", "SyntaxError: .*; an experiment must import"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('one\\ntwo')", "ValueError: one two;"),
        ("raise SystemExit(2)", "SystemExit: 2;"),
        ("from dl_jax.harness import Claim\nClaim('error', 'p', 'l', 1.0, -1.0)", "InputError: .*tolerance=-1.0"),
        ("CLAIMS = ()", "has no docstring"),
        ('"""A."""', "CLAIMS is missing or wrong, expected a tuple of Claim"),
        ('"""A."""\nCLAIMS = ("error",)', "CLAIMS is missing or wrong"),
    ],
)
def test_a_bad_experiment_file_is_named(repository: None, source: str, message: str) -> None:
    Path("experiments/bad.py").write_text(source)
    before = set(sys.modules)
    with pytest.raises(InputError, match=rf"^experiments/bad\.py.*{message}") as caught:
        experiments("experiments")
    assert "\n" not in str(caught.value)
    assert not [name for name in set(sys.modules) - before if "experiment" in name]


def test_experiments_are_imported_and_leave_nothing_behind(repository: None) -> None:
    entries = experiments("experiments")
    assert {name: entry.title for name, entry in entries.items()} == {
        "kmeans": "Finds clusters.",
        "vision/lenet": "LeNet | reaches 1 % test error.",
    }
    assert list(entries["vision/lenet"].claims) == lenet_claims()
    assert not [name for name in sys.modules if name.endswith("vision/lenet")]


# --- bars and cells in files and tables --------------------------------------------------------------------------

BARS = [
    Claim("error", paper="own bar", locator="a", at_most=4.0, unit="%", note="majority: 90 %, linear: 6.9 %"),
    Claim("right", paper="own bar", locator="b", at_least=90, unit="%", verified=False),
    Claim("error", paper="own bar", locator="c", at_most=1.1, unit="%", worst=True),
    Claim(
        "most nets win", paper="Doe 2020", locator="d", cells=(("error", "baseline"), ("right", "error")), at_least=2
    ),
]
BARS_MEASURED = {
    "error": [1.0, 1.1, 0.9, 1.05, 0.95],
    "baseline": [1.5, 1.6, 1.4, 1.45, 1.55],
    "right": [90.0] * 5,
}


def bars_result(**fields: Any) -> dict[str, Any]:
    measured = {name: summary(values) for name, values in BARS_MEASURED.items()}
    return {
        **result(),
        "measured": measured,
        "claims": judge(BARS, BARS_MEASURED, preset="paper", config=MNIST),
        **fields,
    }


def test_bars_survive_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(bars_result()))
    entries = read(tmp_path / "r.json")["claims"]
    assert [claim_of(entry) for entry in entries] == BARS
    assert [entry["verdict"] for entry in entries] == ["reproduced", "reproduced", "reproduced", "not reproduced"]


def test_a_claim_of_an_older_file_has_the_fields_it_had() -> None:
    old = {"metric": "error", "paper": DOE, "locator": "Table 1", "claimed": 1.0, "tolerance": 0.1, "better": "lower"}
    assert claim_of({**old, "verdict": "reproduced"}) == claim()


def test_bars_in_the_final_table() -> None:
    _, rows = table_rows(bars_result())
    assert rows[:4] == [
        ("error", "own bar, a", "≤ 4 %", "1.000 ± 0.079 (5)", "", "reproduced"),
        ("right", "own bar, b", "≥ 90 % (unverified)", "90 ± 0 (5)", "", "reproduced"),
        ("worst seed of error", "own bar, c", "≤ 1.1 %", "1.1 (5)", "", "reproduced"),
        ("most nets win", "Doe 2020, d", "≥ 2 of 2 cells", "1 of 2 (5)", "", "not reproduced"),
    ]
    assert [row[0] for row in rows[4:]] == ["baseline"]
    _, rows = table_rows(bars_result(preset="quick", claims=judge(BARS, BARS_MEASURED, preset="quick", config=MNIST)))
    assert [row[-1] for row in rows[:4]] == ["not applicable: needs preset paper"] * 4


def test_the_worst_seed_is_the_lowest_where_higher_is_better() -> None:
    worst = Claim("right", paper="own bar", locator="a", at_least=90, worst=True)
    assert answer_cells(worst, np.array([91.5, 89.25, 99.0])) == ("89.25 (3)", "")
    assert answer_cells(worst, np.array([91.5, math.nan, 99.0])) == ("nan (3)", "")


def test_an_order_and_no_loss_have_no_number() -> None:
    order = Claim("error", DOE, "Table 1", versus="baseline", better="higher", unit="nats")
    no_loss = Claim("error", DOE, "Table 1", 0, 0.2, versus="baseline", unit="%")
    assert (claimed_cells(order)[2], tolerance_cell(order)) == ("> 0 nats", "")
    assert (claimed_cells(no_loss)[2], tolerance_cell(no_loss)) == ("no loss", "± 0.2 %")


@pytest.fixture
def barred(repository: None) -> Path:
    """The file of an experiment that claims BARS; its result lies beside it."""
    file = Path("experiments/vision/lenet.py")
    file.write_text(f'"""LeNet."""\nfrom dl_jax.harness import Claim\nCLAIMS = {tuple(BARS)!r}\n')
    Path("results/lenet.json").write_text(json.dumps(bars_result()))
    return file


def test_bars_on_the_page(barred: Path) -> None:
    text, link = page(), "(../results/lenet.json)"
    assert "| **all** | 3 |  |  | 1 |  |" in text
    for row in (
        r"| **error**<br><sub>own bar, a</sub> | ≤ 4 % | 1.000 ± 0.079 (5)<br><sub>\[0.902, 1.098\]</sub> | "
        f"[reproduced]{link} | majority: 90 %, linear: 6.9 % |",
        f"| **worst seed of error**<br><sub>own bar, c</sub> | ≤ 1.1 % | 1.1 (5) | [reproduced]{link} |  |",
        "| **most nets win**<br><sub>Doe 2020, d</sub> | ≥ 2 of 2 cells | 1 of 2 (5) | "
        f"[**not reproduced**]{link} | error − baseline, right − error |",
    ):
        assert f"\n{row}\n" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("at_most=4.0", "at_most=5.0", "'error' had at_most=4.0 at the run and has 5.0 now"),
        ("at_least=90", "at_least=80", "'right' had at_least=90 at the run and has 80 now"),
        ("'right', 'error'", "'right', 'baseline'", "'most nets win' had cells=.* at the run and has .* now"),
    ],
)
def test_a_bar_that_was_moved_after_the_run_is_refused(barred: Path, old: str, new: str, message: str) -> None:
    barred.write_text(barred.read_text().replace(old, new))
    with pytest.raises(InputError, match=f"lenet.json: the claim on {message}"):
        render()


# --- papers/ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[cell]]", "[[cell", "Expected"),
        ("year = 2020\n", "", "year is missing, expected an integer"),
        ("year = 2020", "year = true", "year is True, expected an integer"),
        ("url =", "link = 1\nurl =", "link is no key here; expected paper, title"),
        ("unit =", "units =", "cell.0.units is no key here; did you mean unit"),
        ("number = 1\n", "", "cell.0.number is missing, expected a number"),
        ("number = 0.5", 'number = "0.5"', "cell.1.number is '0.5', expected a number"),
        ("verified = true", "verified = 1", "cell.0.verified is 1, expected true or false"),
        ("MLP", "CNN", "cell.1.locator 'Table 3, CNN' is there twice, expected once for each unit"),
        ("Table 3, CNN", "Table 2", "cell.1.locator 'Table 2' is claimed in experiments/vision/lenet.py too"),
    ],
)
def test_a_bad_file_of_a_paper_is_named(repository: None, old: str, new: str, message: str) -> None:
    file = Path("papers/doe2020.toml")
    file.write_text(CELLS.replace(old, new))
    with pytest.raises(InputError, match=rf"^papers/doe2020\.toml: {message}") as caught:
        render()
    assert "\n" not in str(caught.value)


def test_a_cell_is_a_table(repository: None) -> None:
    Path("papers/doe2020.toml").write_text(CELLS[: CELLS.index("[[cell]]")] + "cell = [1]\n")
    with pytest.raises(InputError, match=r"doe2020.toml: cell.0 is 1, expected a table, \[\[cell\]\]"):
        papers("papers")


def test_one_locator_may_hold_two_units(repository: None) -> None:
    Path("papers/doe2020.toml").write_text(CELLS.replace("Table 3, CNN", "Table 3, MLP").replace('"%"', '"x"', 1))
    assert [cell.unit for cell in papers("papers")[0].cells] == ["x", "%"]


def test_a_claim_that_has_moved_to_papers_does_not_come_back(repository: None) -> None:
    moved = Claim("error/mlp", DOE, "Table 3, MLP", 1.0, 0.1, "%")  # the run could not answer it
    Path("results/lenet.json").write_text(json.dumps(result(claims=[*lenet_claims(), moved])))
    assert "error/mlp" not in page()
    assert "| **all** | 2 |  |  |  | 2 |" in page()


# --- malformed results, and the command --------------------------------------------------------------------------


def changed(judged: list[dict[str, Any]] | None = None, **fields: Any) -> str:
    record = result(**fields)
    return json.dumps({**record, "claims": judged or record["claims"]})


def edited(*path: str | int, value: Any) -> str:
    """The result with the item at `path` replaced."""
    record = result()
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{", "expected a result.json"),
        ("[]", "the object"),
        ("{}", "experiment"),
        (changed(commit=None), "commit is missing or wrong, expected a string"),
        (changed(clean="yes"), "clean"),
        (changed(seeds=5), "seeds is missing or wrong, expected a list of integers"),
        (changed(wall_seconds=True), "wall_seconds"),
        (changed(measured={"error": [1.0]}), "measured.error.values"),
        (changed(measured={"error": {"values": ["1"]}}), "measured.error.values"),
        (edited("measured", "error", "mean", value=0.9), "measured.error.mean"),
        (edited("measured", "error", "std", value=None), "measured.error.std"),
        (edited("claims", 0, "verdict", value="better than claimed"), "claims.0.verdict .* expected 'reproduced'"),
        (edited("claims", 0, "tolerance", value=-1), "claims.0: .*tolerance=-1"),
        (edited("claims", 0, "colour", value="red"), "claims.0: .*colour"),
        (edited("claims", 0, "given", value={"datset": 1}), "claims.0: .*datset"),
        (edited("claims", 0, "cells", value=1), "claims.0: .*int"),
    ],
)
def test_a_malformed_result_names_the_file_and_the_key(tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=rf"bad\.json: .*{key}") as caught:
        read(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)


def test_a_failed_seed_survives_the_file(tmp_path: Path) -> None:
    measured = {"error": [1.0, math.nan, 1.0, 1.0, 1.0]}
    claims = judge([claim()], measured, preset="paper", config=MNIST)
    (tmp_path / "r.json").write_text(changed(measured={"error": summary(measured["error"])}, judged=claims))
    assert read(tmp_path / "r.json")["claims"][0]["verdict"] == "not reproduced"


def test_a_result_of_an_unknown_experiment_is_refused(repository: None) -> None:
    Path("results/lenet.json").write_text(json.dumps(result(experiment="vision/lenett")))
    with pytest.raises(InputError, match=r"'vision/lenett' is not in experiments; did you mean vision/lenet\?"):
        render()


def test_the_command_writes_the_page_and_checks_it(repository: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["--check"]) == 1
    assert "docs/results.md is out of date; run python -m dl_jax.results" in capsys.readouterr().err
    assert results.main([]) == 0
    assert {path: path.read_text(encoding="utf-8") for path in (PAGE, CHART)} == render()
    assert results.main(["--check"]) == 0
    Path("results/lenet.json").write_text(json.dumps(result(device="gpu")))
    assert results.main(["--check"]) == 1
    assert "on cpu" in Path("docs/results.md").read_text()  # --check writes nothing
    Path("results/lenet.json").write_text("{")
    assert results.main(["--check"]) == 2
    assert "error: results/lenet.json: " in capsys.readouterr().err
    shutil.rmtree("experiments")
    assert results.main([]) == 2
    assert "there is no experiments" in capsys.readouterr().err


@pytest.mark.parametrize("path", [PAGE, CHART])
def test_a_changed_or_missing_file_is_noticed(repository: None, capsys: pytest.CaptureFixture[str], path: Path) -> None:
    results.main([])
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert results.main(["--check"]) == 1
    path.unlink()
    assert results.main(["--check"]) == 1
    error = f"error: {path} is out of date; run python -m dl_jax.results and commit it\n"
    assert capsys.readouterr().err == error * 2


def test_python_m(repository: None) -> None:
    command = [sys.executable, "-W", "error", "-m", "dl_jax.results", "--check"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: docs/results.md is out of date")


def test_a_resumed_run_says_so(repository: None) -> None:
    attempts = [{"commit": commit * 40, "clean": True, "seconds": 45.0} for commit in "ab"]
    fields = {"commit": "b" * 40, "attempts": attempts}
    Path("results/lenet.json").write_text(json.dumps(result(**fields)))
    assert f"· 1.5 min in 2 attempts, of commits {'a' * 12} too on cpu" in page()
    attempts.append({"commit": None, "clean": False, "seconds": None})
    Path("results/lenet.json").write_text(json.dumps(result(**fields)))
    assert f"· more than 1.5 min in 3 attempts, of commits {'a' * 12}, unknown too on cpu" in page()


@pytest.mark.parametrize("metric", ["error", "error/another_task"])
def test_a_claim_that_is_no_longer_made_stays_in_sight_where_a_run_answered_it(repository: None, metric: str) -> None:
    old = Claim(metric, "Roe 1999", "Table 9", 1.0, 0.5)
    Path("results/lenet.json").write_text(json.dumps(result(claims=[*lenet_claims(), old])))
    assert ("Roe 1999" in page()) == (metric == "error")
