"""`python -m dl_jax.watch`: what is read of a folder, what is drawn of it, and what differs between two."""

import html.parser
import itertools
import json
import math
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_jax.harness.report.figures import sheet_png
from dl_jax.harness.report.writers import JsonLines
from dl_jax.harness.results.claims import Claim, judge, summary
from dl_jax.harness.watch import command, draw, facts, page
from dl_jax.harness.watch.read import Curve, chosen, fit_of, read, records_of

CLAIM = Claim("error", "Doe 2020 <draft>", "Table 1", 1.0, 0.2, "%")
CONFIG = {"dataset": "mnist", "steps": 300, "learning_rate": 0.1}
ATTEMPT = {
    "commit": "a" * 40,
    "clean": True,
    "seconds": 61.0,
    "versions": {"jax": "0.10.2"},
    "device": "1 x cpu",
    "data": {"mnist train": "3.0.1 bb19"},
}
Make = Callable[..., str]


@pytest.fixture
def make(tmp_path, monkeypatch) -> Make:
    """A function that makes the folder of a run below the working directory and returns its relative path.

    Its reports come 0.01 s apart: those of one millisecond would have no order.
    """
    monkeypatch.chdir(tmp_path)
    clock = itertools.count(time.time(), 0.01)

    def made(name: str, *, attempts: list[Any] | None = None, error: list[float] | None = None, **identity: Any) -> str:
        folder = Path(name)
        folder.mkdir()
        identity = {"experiment": "vision/net", "preset": "paper", "config": CONFIG, "seeds": [3, 4], **identity}
        (folder / "config.json").write_text(json.dumps(identity))
        (folder / "attempts.json").write_text(json.dumps([ATTEMPT] if attempts is None else attempts))
        (folder / "net.py").write_text("STEPS = 1\n")
        for child in ("plain", "distorted/late"):
            lines = JsonLines(folder / child / "metrics.jsonl", 0)
            with monkeypatch.context() as patched:
                patched.setattr("time.time", lambda: next(clock))
                for step in (100, 200, 300):
                    loss = [1 / step, math.nan if step == 200 else 2 / step]
                    lines.write(step, {"loss": loss, "steps_per_second": step, "data_wait": 0.25})
                lines.write(300, {"watch/error": 0.5})
            lines.close()
        (folder / "plain" / "digits.png").write_bytes(sheet_png(np.zeros((1, 8, 8, 1))))
        if error is not None:
            measured = {"error": error}
            result = {**identity, "measured": {"error": summary(error)}, "attempts": [ATTEMPT]}
            result["claims"] = judge([CLAIM], measured, preset="paper", config=identity["config"])
            (folder / "result.json").write_text(json.dumps(result))
        return name

    return made


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Exit status, stdout and stderr of the command."""

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["watch", *arguments])
        status = command.main()
        return status, *capsys.readouterr()

    return called


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_reported(make):
    run = read(make("run", error=[1.0, 1.1, 0.9, 1.05, 0.95]))
    assert run.damaged == []
    assert list(run.fits) == ["plain", "distorted/late"]  # in the order of their reports
    fit = run.fits["plain"]
    assert list(fit.curves) == ["loss", "watch/error"]
    np.testing.assert_array_equal(fit.curves["loss"].steps, [100, 200, 300])
    np.testing.assert_array_equal(
        fit.curves["loss"].values, [[1 / 100, 2 / 100], [1 / 200, np.nan], [1 / 300, 2 / 300]]
    )
    np.testing.assert_array_equal(fit.curves["watch/error"].values, [[0.5]])
    assert (fit.step, fit.speed, fit.waited) == (300, 200, 0.25)
    assert run.result
    assert run.result["claims"][0]["verdict"] == "reproduced"
    assert run.script == b"STEPS = 1\n"
    assert list(run.images) == ["plain/digits.png"]


WHOLE = b'{"step": 1, "time": 5.0, "loss": [1.0, null]}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"step": 2, "ti\n', "it is no JSON"),
        (b"\n", "it is no JSON"),
        (b"[" * 100_000 + b"\n", "it is nested too deeply"),
        (b"\xff\xfe\n", "it is no JSON"),
        (b"3\n", "it has no step and time"),
        (b'{"step": "2", "time": 5.0}\n', "it has no step and time"),
        (b'{"step": 2, "time": 5.0, "loss": "low"}\n', "loss is no number"),
        (b'{"step": 2, "time": 5.0, "loss": []}\n', "loss is no number"),
        (b'{"step": 2, "time": 5.0, "loss": [1.0]}\n', "loss has 1 values, expected 2 as before"),
    ],
)
def test_a_damaged_line_is_named_and_the_others_are_read(line, reason):
    records, wrong = records_of(WHOLE + line + WHOLE.replace(b"1,", b"3,", 1))
    assert wrong == [(2, reason)]
    assert fit_of(records).curves["loss"].steps.tolist() == [1, 3]


def test_a_line_that_is_being_written_is_left_out_without_a_word():
    for length in range(1, len(WHOLE)):
        records, wrong = records_of(WHOLE + WHOLE[:length])
        assert (len(records), wrong) == (1, [])


def test_a_pattern_chooses_curves(make):
    run = read(make("run"))
    kept = chosen(run, "*/loss").fits
    assert {fit: list(each.curves) for fit, each in kept.items()} == {"plain": ["loss"], "distorted/late": ["loss"]}
    assert list(chosen(run, "plain/*").fits) == ["plain"]
    assert chosen(run, "*") == run


# --- drawing -----------------------------------------------------------------------------------------------------


def curve_of(seed: int, n: int = 50, seeds: int = 3) -> Curve:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, seeds))
    values[rng.random((n, seeds)) < 0.1] = np.nan
    return Curve(np.sort(rng.integers(0, 1000, n)), values)


@pytest.mark.parametrize("columns", [2, 7, 400])
def test_a_band_is_the_mean_and_the_range_of_each_column(columns):
    curve = curve_of(0)
    axes = draw.axes_of([curve])
    assert axes
    assert (axes.low, axes.high, axes.log) == (np.nanmin(curve.values), np.nanmax(curve.values), False)
    band = draw.band_of(curve, axes, columns)
    seen: dict[int, list[float]] = {}
    for step, row in zip(curve.steps, curve.values, strict=True):
        at = round((step - axes.first) / (axes.last - axes.first) * (columns - 1))
        seen.setdefault(at, []).extend(value for value in row if not math.isnan(value))
    place = lambda value: (value - axes.low) / (axes.high - axes.low)
    assert band.columns.tolist() == sorted(seen)
    for i, column in enumerate(band.columns.tolist()):
        values = seen[column]
        expected = [place(each) for each in (min(values), sum(values) / len(values), max(values))]
        np.testing.assert_allclose([band.low[i], band.mean[i], band.high[i]], expected, atol=1e-12)


def test_a_logarithmic_axis_is_for_positive_values_of_several_magnitudes():
    steps = np.arange(3)
    axes_of = lambda *values: draw.axes_of([Curve(steps, np.array(values)[:, None])])
    assert axes_of(1e-3, 1e-1, 1.0) == (0, 2, -3.0, 0.0, True)
    assert axes_of(0.0, 0.1, 1.0) == (0, 2, 0.0, 1.0, False)
    assert axes_of(-1e-3, 0.1, 1.0) == (0, 2, -1e-3, 1.0, False)
    assert axes_of(0.02, 0.1, 1.0) == (0, 2, 0.02, 1.0, False)
    assert axes_of(4.0, 4.0, 4.0) == (0, 2, 2.0, 6.0, False)
    assert axes_of(np.nan, 1.0, np.inf) is None  # one step with a finite value
    band = draw.band_of(Curve(steps, np.array([[1e-3], [1e-1], [1.0]])), draw.Axes(0, 2, -3, 0, True), 3)
    np.testing.assert_allclose(band.mean, [0, 2 / 3, 1], atol=1e-12)


def test_text_has_a_dot_where_the_line_is():
    width, height = 30, 5
    across = width - draw.LABEL - 1
    columns, rows = 2 * across, 4 * height
    x = np.arange(columns)
    lines = draw.text_plot(Curve(x, np.cos(x / 6)[:, None]), width, height)
    assert [len(line) for line in lines] == [width] * (height + 1)
    assert lines[-1].split() == ["0", "step", str(columns - 1)]
    drawn = np.zeros((rows, columns), bool)
    bits = {(0, 0): 0, (1, 0): 1, (2, 0): 2, (0, 1): 3, (1, 1): 4, (2, 1): 5, (3, 0): 6, (3, 1): 7}  # of Unicode
    for i, line in enumerate(lines[:height]):
        for j, character in enumerate(line[draw.LABEL + 1 :]):
            for (row, column), bit in bits.items():
                if character not in " ░":
                    drawn[4 * i + row, 2 * j + column] = (ord(character) - 0x2800) >> bit & 1
    cos = np.cos(x / 6)
    expected = np.rint((cos.max() - cos) / (cos.max() - cos.min()) * (rows - 1)).astype(int)
    assert drawn[expected, x].all()
    for column in range(1, columns):  # nothing else but what joins it to the column before
        found = np.flatnonzero(drawn[:, column])
        assert {found.min(), found.max()} == {*sorted(expected[[column - 1, column]])}


def test_text_is_shaded_between_the_extremes():
    values = np.stack([np.zeros(8), np.ones(8), np.full(8, 0.5)], 1)
    lines = draw.text_plot(Curve(np.arange(8), values), 20, 5)
    assert [line[draw.LABEL + 1] for line in lines[:5]] == ["░", "░", lines[2][-1], "░", "░"]
    assert lines[2][-1] not in "░ "
    assert [line[: draw.LABEL].strip() for line in lines[:5]] == ["1", "", "", "", "0"]


def test_a_single_step_is_no_plot():
    assert draw.text_plot(Curve(np.array([30]), np.array([[1.0, 2.0]])), 40, 5) == []
    assert draw.svg_plot("loss", {"run": Curve(np.array([30, 30]), np.array([[1.0], [2.0]]))}) == ""


def test_ticks_are_few_round_numbers_in_the_range():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = rng.normal() * 10 ** rng.uniform(-6, 6)
        high = low + 10 ** rng.uniform(-3, 6) * max(abs(low), 1e-6)
        found = draw.ticks(low, high)
        assert 3 <= len(found) <= 7
        assert low - 1e-6 * (high - low) <= found[0] < found[-1] <= high + 1e-6 * (high - low)
        gaps = np.diff(found)
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-3)
        assert round(gaps[0] / 10 ** math.floor(math.log10(gaps[0] * 1.0001)), 2) in (1, 2, 5)
        assert all(tick == round(tick) for tick in draw.ticks(low, low + 2 + high - low, whole=True))


def test_svg_has_the_curves_at_their_places():
    one, other = curve_of(1), Curve(np.array([0, 500]), np.array([[4.0], [5.0]]))
    root = ElementTree.fromstring(draw.svg_plot('a & b "c"', {"one": one, "other": other}))
    name = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{name}title").text == 'a & b "c"'  # type: ignore[union-attr]
    axes = draw.axes_of([one, other])
    assert axes
    lines, bands = (
        [list(map(_point, e.get("points", "").split())) for e in root.iter(name + kind)]
        for kind in ("polyline", "polygon")
    )
    assert len(lines) == len(bands) == 2
    step = lambda x: axes.first + (x - draw.LEFT) / (draw.RIGHT - draw.LEFT - 1) * (axes.last - axes.first)
    value = lambda y: axes.low + (draw.BOTTOM - y) / (draw.BOTTOM - draw.TOP) * (axes.high - axes.low)
    pixel = 0.06 * (axes.high - axes.low) / (draw.BOTTOM - draw.TOP)
    np.testing.assert_allclose([value(y) for _, y in lines[1]], [4, 5], atol=pixel)
    np.testing.assert_allclose([step(x) for x, _ in lines[1]], [0, 500], atol=2)
    ys = [value(y) for _, y in bands[0]]
    assert [min(ys), max(ys)] == pytest.approx([np.nanmin(one.values), np.nanmax(one.values)], abs=pixel)


def _point(text: str) -> tuple[float, float]:
    x, y = text.split(",")
    return float(x), float(y)


def test_the_last_values_say_what_was_not_finite():
    said = lambda *values: draw.last_values(Curve(np.array([1, 2]), np.array([values, values], float)))
    assert said(0.5) == "0.5"
    assert said(1, 2, 4.5) == "2.5 [1, 4.5] (3)"
    assert said(1, np.nan, 2) == "1.5 [1, 2] (3, 1 not finite)"
    assert said(np.inf, np.nan) == "not finite"


# --- the record of a run, and of two -----------------------------------------------------------------------------


def test_every_difference_of_two_runs_is_named(make):
    one = read(make("one"))
    second = {**ATTEMPT, "commit": "b" * 40, "versions": {"jax": "0.11.0"}, "data": {"mnist train": "3.0.1 ffff"}}
    config = {"dataset": "mnist", "steps": 400, "warm_up": [1, 2]}
    other = make("other", config=config, seeds=[3, 5], attempts=[ATTEMPT, second], preset="quick")
    Path(other, "net.py").write_text("STEPS = 2\n")
    topics = facts.compared(one, read(other))
    rows = {(topic.name, row[0]): row[1:] for topic in topics for row in topic.rows}
    digests = rows.pop(("code", "CRC-32 of net.py"))
    assert digests[0] != digests[1]
    assert rows == {
        ("experiment", "preset"): ("paper", "quick"),
        ("config", "learning_rate"): ("0.1", "not set"),
        ("config", "steps"): ("300", "400"),
        ("config", "warm_up"): ("not set", "[1, 2]"),
        ("seeds", "seeds"): ("[3, 4]", "[3, 5]"),
        ("code", "commit"): ("a" * 40, f"{'a' * 40}, then {'b' * 40}"),
        ("data", "mnist train"): ("3.0.1 bb19", "3.0.1 bb19, then 3.0.1 ffff"),
        ("versions", "jax"): ("0.10.2", "0.10.2, then 0.11.0"),
    }
    assert facts.sentences(topics) == ["No difference in device."]


def test_what_is_not_recorded_is_not_called_equal(make):
    old = make("old", attempts=[{"commit": "a" * 40, "clean": True, "seconds": 1.0}])
    said = facts.sentences(facts.compared(read(make("new")), read(old)))
    assert said == [
        "No difference in experiment, config, seeds, code.",
        "Nothing is recorded of data, versions, device in old.",
    ]


def test_attempts_after_the_result_measured_nothing(make):
    later = {**ATTEMPT, "commit": "c" * 40, "data": {"mnist train": "4.0.0 dddd"}}
    one = read(make("one", error=[1.0, 2.0]))
    other = read(make("other", error=[1.0, 2.0], attempts=[ATTEMPT, later]))
    assert [topic for topic in facts.compared(one, other) if topic.rows] == []


def test_differences_of_measurements_are_paired_by_seed(make):
    one, same, better, others = (
        read(make(name, error=error, seeds=seeds))
        for name, error, seeds in (
            ("one", [1.0, 2.0], [3, 4]),
            ("same", [1.0, 2.0], [3, 4]),
            ("better", [0.5, 1.3], [3, 4]),
            ("others", [0.5, 1.3], [5, 6]),
        )
    )
    last = lambda run: facts.measured(one, run)[1][0][-1]
    assert last(same) == "the same"
    assert last(better) == "-0.60 ± 0.14 (2)"  # of -0.5 and -0.7
    assert last(others) == ""
    header, rows = facts.measured(one, read(make("going_on")))
    assert header == ("last value", "one", "going_on")
    assert rows[0] == ("plain/loss", *["0.005 [0.003333, 0.006667] (2) at step 300"] * 2)


# --- the command -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_drawn(make, call):
    status, out, err = call(make("run", error=[1.0, 1.1, 0.9, 1.05, 0.95]))
    assert (status, err) == (0, "")
    for part in ("── plain ─", "── distorted/late ─", "\n0.005 [0.003333, 0.006667] (2) ", " 0.5 at step 300"):
        assert part in out
    assert re.search(r"error +Doe 2020 <draft>, Table 1 +1 % +1\.000 ± 0\.079 \(5\) +± 0\.2( %)? +reproduced", out)
    assert re.search(r"^plain +300 +0:00 +200 +25\.0%$", out, re.MULTILINE)
    assert re.search(r"^state +finished$", out, re.MULTILINE)
    assert max(len(line) for line in out.partition("fit ")[0].splitlines()) <= command.WIDE


def test_a_run_that_goes_on_is_drawn(make, call):
    folder = make("run")
    with Path(folder, "plain", "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 400, "ti')
    status, out, err = call(folder)
    assert (status, err) == (0, "")
    assert re.search(r"^state +no result yet, the last report came \d+:\d\d ago$", out, re.MULTILINE)


def test_a_run_without_reports_is_no_error(make, call):
    folder = make("run")
    for file in Path(folder).rglob("metrics.jsonl"):
        file.write_text("")
    status, out, err = call(folder)
    assert (status, err) == (0, "")
    assert "no result yet, no report" in out


def test_damage_is_said_and_the_rest_is_drawn(make, call):
    folder = make("run")
    with Path(folder, "plain", "metrics.jsonl").open("a") as stream:
        stream.write("}\n")
    Path(folder, "result.json").write_text("{")
    Path(folder, "attempts.json").write_text("[3]")
    status, out, err = call(folder, "--html", "run.html")
    assert status == 2
    damage = [
        "line 5 of run/plain/metrics.jsonl is damaged (it is no JSON); all other lines are shown",
        "run/result.json is damaged; give the run's command again, which writes it anew",
        "run/attempts.json is damaged; its commits are unknown",
    ]
    assert err.splitlines() == [f"error: {each}" for each in damage]
    assert "── plain ─" in out
    assert all(f'<p class="damaged">{html.escape(each)}</p>' in Path("run.html").read_text() for each in damage)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"experiment": 3}, "run holds no run"),
        ("config.json", {"config": [1]}, "run holds no run"),
        ("config.json", {"seeds": 5}, "run holds no run"),
        ("result.json", {"attempts": 3}, "run/result.json is damaged"),
        ("result.json", {"attempts": "x"}, "run/result.json is damaged"),
        ("result.json", {"attempts": None}, "run/result.json is damaged"),
        ("result.json", {"attempts": [{"seconds": "1"}]}, "run/result.json is damaged"),
        ("result.json", {"command": 3}, "run/result.json is damaged"),
        ("result.json", {"claims": [3]}, "run/result.json is damaged"),
        ("result.json", {"measured": 3}, "run/result.json is damaged"),
    ],
)
def test_a_value_of_another_type_is_damage(make, call, file, change, said):
    folder = Path(make("run", error=[1.0, 2.0]))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **change}))
    status, _, err = call("run")
    assert status == 2
    [line] = err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["empty"], "empty holds no run"),
        (["foreign"], "foreign holds no run"),
        (["run", "nowhere"], "nowhere holds no run"),
        (["run", "--only", "*/los"], "--only */los matches no curve of run, expected a pattern of one of plain/loss, "),
        (["run", "--html", "empty"], "--html empty cannot be written (Is a directory); name a file"),
        (["run", "--follow"], "--follow is given with an output that is no terminal, expected one run"),
        (["run", "run", "--follow"], "--follow is given with a second run, expected one run"),
    ],
)
def test_bad_input_is_one_line(make, call, arguments, said):
    make("run")
    Path("empty").mkdir()
    Path("foreign").mkdir()
    Path("foreign", "config.json").write_text('{"experiment": 1}')
    status, _, err = call(*arguments)
    assert status == 2
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_following_ends_with_the_result(make, call, monkeypatch):
    folder, seen = make("run"), []
    Path(make("finished", error=[1.0, 1.1, 0.9, 1.05, 0.95]), "result.json").rename("result.json")

    def sleep(seconds: float) -> None:
        seen.append(seconds)
        if len(seen) == 2:
            Path("result.json").rename(Path(folder, "result.json"))

    monkeypatch.setattr(command.time, "sleep", sleep)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, err = call(folder, "--follow")
    assert (status, err) == (0, "")
    assert seen == [command.REDRAW_EVERY] * 2
    assert "reproduced" in out


class Page(html.parser.HTMLParser):
    """Collects the text of a page and what it refers to, and asserts that its tags are closed in their order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(make, call, tmp_path):
    make("run", error=[1.0, 1.1, 0.9, 1.05, 0.95])
    make("other")
    for arguments, parts in (
        (["run"], ["Doe 2020 <draft>", "reproduced", "plain/digits.png", "learning_rate 0.1", "0.005 [0.003333"]),
        (["run", "other"], ["No difference in experiment", "plain/loss", "distorted/late/loss"]),
    ):
        status, _, err = call(*arguments, "--html", "page.html")
        assert (status, err) == (0, "")
        source = Path("page.html").read_text()
        found = Page(source)
        assert "script" not in found.tags
        assert found.tags >= {"svg", "polyline", "polygon", "table"}
        assert all(each.startswith("data:image/png;base64,") for each in found.sources)
        assert str(tmp_path) not in source
        assert all(part in found.text for part in parts)
    assert re.findall("https?://[^\"' ]*", source.replace("http://www.w3.org/2000/svg", "")) == []


def test_large_figures_are_left_in_the_folder(make, monkeypatch):
    run = read(make("run"))
    monkeypatch.setattr(page, "LARGEST", 10)
    assert "digits.png has 0 kB and is left in the folder" in page.page(run, 0.0)
