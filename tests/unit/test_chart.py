"""The chart of the results page: a row for every answer, at its place."""

import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax.harness import Claim
from dl_jax.harness.results.answers import Answer
from dl_jax.harness.results.chart import LEFT, LIMIT, RIGHT, chart, place
from dl_jax.harness.results.claims import verdict

SVG = "{http://www.w3.org/2000/svg}"
NAN, INF = math.nan, math.inf


class Row(NamedTuple):
    title: str
    x: float  # of the mark
    mark: tuple[str, str]  # path and colour
    accepted: tuple[float, float]
    interval: tuple[float, float] | None
    arrow: bool
    texts: list[str]


def claim(claimed: float | None = 1.0, tolerance: float = 0.1, *, metric: str = "error", **fields: Any) -> Claim:
    return Claim(metric, "p", "l", claimed, tolerance, **fields)


def bar(**fields: Any) -> Claim:
    return Claim("error", paper="own bar", locator="l", **fields)


def answer(a_claim: Claim, values: Sequence[float]) -> Answer:
    """Of differences where the claim is about one."""
    zeros = [0.0] * len(values)
    measured = {a_claim.metric: values, **({a_claim.versus: zeros} if a_claim.versus else {})}
    word = verdict(a_claim, measured, preset=a_claim.preset, config={})
    return Answer(a_claim, np.asarray(values), word, Path("results/r.json"), True)


def rows(*answers: Answer) -> list[Row]:
    found = []
    for group in ET.fromstring(chart({"vision/lenet": answers}).encode()).iterfind(f"{SVG}g"):
        parts = {part.get("class"): part.attrib for part in group}
        start, width = (float(parts["accepted"][key]) for key in ("x", "width"))
        ends = re.fullmatch(r"M([\d.]+),[\d.]+ H([\d.]+)", parts["interval"]["d"]) if "interval" in parts else None
        found.append(
            Row(
                title=group.findtext(f"{SVG}title", ""),
                x=float(parts["mark"]["transform"].removeprefix("translate(").split(",")[0]),
                mark=(parts["mark"]["d"], parts["mark"]["fill"]),
                accepted=(start, start + width),
                interval=(float(ends[1]), float(ends[2])) if ends else None,
                arrow="arrow" in parts,
                texts=[each.text or "" for each in group.iterfind(f"{SVG}text")],
            )
        )
    return found


def inside(row: Row) -> bool:
    return row.accepted[0] - 0.1 <= row.x <= row.accepted[1] + 0.1  # coordinates have one decimal


def units(row: Row) -> float:
    return LIMIT * (2 * row.x - LEFT - RIGHT) / (RIGHT - LEFT)


LOWER, HIGHER = claim(better="lower"), claim(better="higher")
ORDER, NO_LOSS = claim(None, 0, versus="base"), claim(0.0, 0.2, versus="base")
SPREAD = np.array([-0.1, -0.1, 0.0, 0.1, 0.1])  # its sample standard deviation is 0.1, its half-width 0.124


@pytest.mark.parametrize(
    ("a_claim", "mean", "word", "at"),
    [
        (LOWER, 1.05, "reproduced", -0.5),
        (LOWER, 1.1, "reproduced", -1),
        (LOWER, 1.11, "not reproduced", -1.1),
        (LOWER, 0.85, "better than claimed", 1.5),
        (HIGHER, 1.05, "reproduced", 0.5),
        (HIGHER, 0.75, "not reproduced", -2.5),
        (claim(-0.5, 0.1, versus="base"), -0.45, "reproduced", -0.5),
        (claim(-0.5, 0.1, versus="base"), -0.3, "ordering only", -2),
        (NO_LOSS, 0.07, "reproduced", -0.35),
        (NO_LOSS, -0.3, "better than claimed", 1.5),
        (ORDER, -0.25, "reproduced", 2.0135),
        (ORDER, 0.25, "not reproduced", -2.0135),
        (bar(at_most=1.0), 0.9, "reproduced", 1),
        (bar(at_most=1.0), 1.0, "reproduced", 0),
        (bar(at_least=1.0), 0.9, "not reproduced", -1),
        (bar(at_most=1.0, worst=True), 0.8, "reproduced", 1),  # the worst seed is at 0.9
        (bar(at_most=1.0, worst=True), 0.95, "not reproduced", -0.5),
    ],
)
def test_a_mark_lies_where_the_measurement_stands(a_claim: Claim, mean: float, word: str, at: float) -> None:
    (row,) = rows(answer(a_claim, mean + SPREAD))
    assert row.title.endswith(f": {word}")
    assert units(row) == pytest.approx(at, abs=0.005)
    assert inside(row) == (word == "reproduced")
    assert not row.arrow
    if a_claim.worst:
        assert row.interval is None
    else:
        assert row.interval
        assert sum(row.interval) / 2 == pytest.approx(row.x, abs=0.1)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    claimed=st.sampled_from([None, 0.0, -0.5, 0.5]),
    tolerance=st.sampled_from([0.05, 0.2, 0.6]),
    paired=st.booleans(),
    better=st.sampled_from(["lower", "higher"]),
    mean=st.floats(-1.5, 1.5),
)
def test_a_mark_is_in_the_shaded_part_if_and_only_if_its_claim_is_reproduced(claimed, tolerance, paired, better, mean):
    versus = "base" if paired or claimed is None else ""
    stated = claim(claimed, 0 if claimed is None else tolerance, versus=versus, better=better)
    found = answer(stated, mean + SPREAD)
    at = place(stated, found.values)
    low, high = at.accepted
    edge = min(abs(at.at - low), abs(at.at - high)) < 1e-6
    assert edge or (low < at.at < high) == (found.verdict == "reproduced")
    assert found.verdict != "better than claimed" or at.at >= high - 1e-6


def test_a_number_of_cells_counts_from_what_is_needed() -> None:
    measured = {name: list(m + SPREAD) for name, m in {"a": 1.0, "b": 2.0, "c": 0.0}.items()}
    cells = (("a", "b"), ("c", "a"), ("b", "a"))  # two of them are won
    for at_least, at in ((1, 1), (2, 0), (3, -1)):
        some = Claim("wins", "p", "l", cells=cells, at_least=at_least)
        values = np.stack([np.subtract(measured[x], measured[y]) for x, y in cells])
        word = verdict(some, measured, preset="paper", config={})
        (row,) = rows(Answer(some, values, word, Path("results/r.json"), True))
        assert (units(row), inside(row), row.interval) == (pytest.approx(at, abs=0.005), at >= 0, None)


@pytest.mark.parametrize(
    ("a_claim", "values", "x", "said"),
    [
        (LOWER, [0.1] * 5, RIGHT, "+9.0"),
        (LOWER, [1.9] * 5, LEFT, "-9.0"),
        (LOWER, [1.0, 1.0, 1.0, 1.0, NAN], LEFT, "not finite"),
        (LOWER, [-INF] * 5, LEFT, "not finite"),
        (HIGHER, [INF] * 5, LEFT, "not finite"),
        (claim(431.0, 0.0), [430.0] * 5, RIGHT, "+inf"),
        (ORDER, [-1.0] * 5, RIGHT, "+inf"),
    ],
)
def test_what_is_beyond_the_scale_is_an_arrow_at_its_edge(
    a_claim: Claim, values: list[float], x: float, said: str
) -> None:
    (row,) = rows(answer(a_claim, values))
    assert (row.x, row.arrow) == (x, True)
    assert said in row.texts


def test_what_is_exactly_claimed_needs_no_spread() -> None:
    assert place(claim(431.0, 0.0), np.array([431.0])) == ("value", 0, None, (-1, 1))
    assert place(bar(at_most=2.7), np.full(3, 2.7)).at == 0  # whose mean is 2.7 but for rounding


def test_a_miss_is_named_with_its_numbers_and_stands_out() -> None:
    good, better, order, missed = rows(
        answer(LOWER, 1.0 + SPREAD),
        answer(LOWER, 0.8 + SPREAD),
        answer(claim(-0.5, 0.1, versus="base", unit="%"), -0.3 + SPREAD),
        answer(claim(2.0, 0.1, better="higher", unit="nats", preset="short"), 1.7 + SPREAD),
    )
    assert len({row.mark[0] for row in (good, better, order, missed)}) == 4
    assert len({row.mark[1] for row in (good, better, order, missed)}) == 4
    assert good.texts == better.texts == ["error"]
    assert order.texts == ["error − base", "measured -0.30, claimed -0.5 %"]
    assert missed.texts == ["error (short)", "measured 1.70, claimed 2 nats"]


def test_the_chart_counts_and_leaves_out_experiments_without_an_answer() -> None:
    some = {"a/b": [answer(LOWER, [1.0] * 5), answer(LOWER, [2.0] * 5)], "empty": [], "c": [answer(ORDER, SPREAD)]}
    texts = [text.text for text in ET.fromstring(chart(some).encode()).iterfind(f"{SVG}text")]
    assert texts[0] == "3 claims, measured against claimed: 1 met, 2 missed"
    assert {"a/b", "c"} < set(texts)
    assert "empty" not in texts
    assert ET.fromstring(chart({}).encode()).findtext(f"{SVG}title") == (
        "0 claims, measured against claimed: 0 met, 0 missed"
    )


def test_names_are_text() -> None:
    odd = claim(better="higher", metric='a<b> & "c"\nd', unit="<nats>")
    (row,) = rows(answer(odd, [0.0] * 5))
    assert row.title == 'a<b> & "c" d: not reproduced'
    assert row.texts[0] == 'a<b> & "c" d'
    assert row.texts[-1] == "measured 0, claimed 1 <nats>"


def test_long_names_stay_within_the_chart() -> None:
    svg = ET.fromstring(chart({"e": [answer(claim(metric="x" * 80), [1.0] * 5)]}).encode())
    (name,) = (text for text in svg.iter(f"{SVG}text") if text.text == "x" * 80)
    assert float(name.attrib["x"]) - float(name.attrib["textLength"]) >= 0


def test_the_same_answers_are_the_same_bytes() -> None:
    program = (
        "import numpy as np; from pathlib import Path; from dl_jax.harness import Claim;"
        "from dl_jax.harness.results.answers import Answer; from dl_jax.harness.results.chart import chart;"
        "rows = [Answer(Claim(name, 'p', 'l', 1.0, 0.1), np.array([1.0, 1.1]), 'reproduced', Path('r'), True)"
        "        for name in ('x', 'y')];"
        "print(chart({'e': rows}))"
    )
    for seed in ("1", "2"):  # of the order of sets
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True)
        answers = [
            Answer(claim(metric=name), np.array([1.0, 1.1]), "reproduced", Path("r"), True) for name in ("x", "y")
        ]
        assert done.stdout.decode() == chart({"e": answers}) + "\n"
