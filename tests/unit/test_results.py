"""Claims and verdicts, result files, and the results page."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax.core.errors import InputError
from dl_jax.harness.results import page as results
from dl_jax.harness.results.catalogue import catalogue
from dl_jax.harness.results.claims import Claim, interval, judge, summary, verdict
from dl_jax.harness.results.page import render
from dl_jax.harness.results.record import read

ROOT = Path(__file__).parents[2]
MNIST = {"dataset": "mnist"}


def claim(claimed=1.0, tolerance=0.1, **fields) -> Claim:
    return Claim("error", "Doe 2020", "Table 1", claimed, tolerance, **fields)


def judged(a_claim: Claim, error, baseline=None, preset="paper", config=MNIST) -> str:
    measured = {"error": error} if baseline is None else {"error": error, "baseline": baseline}
    return verdict(a_claim, measured, preset=preset, config=config)


# --- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "mean", "expected"),
    [
        ("lower", 1.0, "reproduced"),
        ("lower", 1.1, "reproduced"),  # exactly at the tolerance, which rounding must not miss
        ("lower", 0.9, "reproduced"),
        ("lower", 1.101, "not reproduced"),
        ("lower", 0.899, "better than claimed"),
        ("higher", 1.101, "better than claimed"),
        ("higher", 0.899, "not reproduced"),
        ("lower", math.nan, "not reproduced"),
        ("lower", -math.inf, "not reproduced"),
    ],
)
def test_a_value_is_judged_by_its_mean(better, mean, expected):
    assert judged(claim(better=better), [mean] * 5) == expected
    if math.isfinite(mean):
        assert judged(claim(better=better), [mean - 2, mean + 2, mean, mean - 1, mean + 1]) == expected


def test_a_failed_seed_is_never_left_out():
    assert judged(claim(), [1.0, 1.0, 1.0, 1.0, math.nan]) == "not reproduced"


def test_an_exact_count_needs_no_tolerance():
    exact = claim(431_080, 0, seeds=1)
    assert judged(exact, [431_080]) == "reproduced"
    assert judged(exact, [431_081]) == "not reproduced"


@pytest.mark.parametrize(
    ("fields", "keywords", "expected"),
    [
        ({}, {"preset": "quick"}, "not applicable"),
        ({"preset": "quick"}, {"preset": "quick"}, "reproduced"),
        ({"given": MNIST}, {}, "reproduced"),
        ({"given": MNIST}, {"config": {"dataset": "digits"}}, "not applicable"),
        ({"given": {"hidden": (3, 4)}}, {"config": {"hidden": [3, 4]}}, "reproduced"),
        ({"seeds": 6}, {}, "not applicable"),
        ({"metric": "other"}, {}, "not run"),
        ({"metric": "other"}, {"preset": "quick"}, "not applicable"),
    ],
)
def test_only_a_run_of_the_claimed_protocol_answers(fields, keywords, expected):
    a_claim = Claim(**{"metric": "error", "paper": "p", "locator": "l", "claimed": 1.0, "tolerance": 0.1, **fields})
    assert judged(a_claim, [1.0] * 5, **keywords) == expected


# Differences of five seeds; t(0.975, 4) = 2.776 445, so deviations of ±0.1 (sample standard deviation 0.1) put the
# interval's ends at the mean ± 0.124.
SPREAD = np.array([-0.1, -0.1, 0.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("claimed", "tolerance", "better", "mean", "expected"),
    [
        (None, 0, "lower", -0.13, "reproduced"),
        (None, 0, "lower", -0.12, "not reproduced"),  # the interval holds 0
        (None, 0, "lower", 0.5, "not reproduced"),
        (None, 0, "higher", 0.13, "reproduced"),
        (None, 0, "higher", -0.5, "not reproduced"),
        (-0.5, 0.1, "lower", -0.45, "reproduced"),
        (-0.5, 0.1, "lower", -0.3, "ordering only"),
        (-0.5, 0.1, "lower", -0.7, "better than claimed"),
        (-0.1, 0.1, "lower", -0.1, "not reproduced"),  # the right size, but no order
        (-0.5, 0.1, "lower", 0.5, "not reproduced"),
        (0.5, 0.1, "lower", 0.7, "ordering only"),  # a claimed loss that is larger
        (0.5, 0.1, "lower", 0.3, "better than claimed"),
        (0.5, 0.1, "higher", 0.3, "ordering only"),
        (0.0, 0.2, "lower", 0.07, "reproduced"),
        (0.0, 0.2, "lower", 0.08, "not reproduced"),  # the interval's worse end is outside
        (0.0, 0.2, "lower", -0.15, "reproduced"),
        (0.0, 0.2, "lower", -0.25, "better than claimed"),
        (0.0, 0.2, "higher", -0.07, "reproduced"),
        (0.0, 0.2, "higher", -0.08, "not reproduced"),
        (0.0, 0.2, "higher", 0.25, "better than claimed"),
    ],
)
def test_a_difference_is_judged_by_its_interval(claimed, tolerance, better, mean, expected):
    baseline = np.array([3.0, 5.0, 1.0, 9.0, 4.0])  # what the pairs have in common does not matter
    paired = claim(claimed, tolerance, better=better, versus="baseline")
    assert judged(paired, baseline + mean + SPREAD, baseline) == expected


def test_a_difference_needs_both_sides_with_the_same_seeds():
    paired = claim(None, 0, versus="baseline")
    assert judged(paired, [1.0] * 5) == "not run"
    assert judged(paired, [1.0] * 5, [1.0, 1.0, 1.0, 1.0, math.nan]) == "not reproduced"
    with pytest.raises(InputError, match="5 and 4 values"):
        judged(paired, [1.0] * 5, [1.0] * 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"better": "more"}, "better='more', expected 'lower' or 'higher'"),
        ({"claimed": None}, "claimed=None needs `versus`"),
        ({"claimed": None, "versus": "x"}, "tolerance=0.1 has no meaning"),
        ({"claimed": math.nan}, "expected a finite number"),
        ({"seeds": 0}, "expected at least 1"),
        ({"seeds": 1, "versus": "x"}, "expected at least 2"),
    ],
)
def test_a_contradictory_claim_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        claim(**fields)


def test_a_claim_given_an_unknown_field_is_refused():
    with pytest.raises(InputError, match="given='datset' is no field of the config; did you mean dataset"):
        judged(claim(given={"datset": "mnist"}), [1.0] * 5)


def test_summary_of_hand_values():
    stats = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (stats["mean"], stats["n"], stats["values"]) == (3.0, 5, [1, 2, 3, 4, 5])
    assert stats["std"] == pytest.approx(1.5811388300841898)
    assert stats["ci95"] == pytest.approx([3 - 1.9632432, 3 + 1.9632432])  # 2.7764451 * 1.5811388 / sqrt(5)
    one = summary(np.float32(0.5))
    assert (one["mean"], one["std"], one["ci95"], one["n"]) == (0.5, None, [None, None], 1)
    failed = summary([1.0, math.nan])
    assert (failed["values"], failed["mean"], failed["std"], failed["ci95"]) == ([1.0, None], None, None, [None, None])
    assert summary([math.inf] * 3)["std"] is None
    assert np.std([2.7] * 3, ddof=1) > 0 == summary([2.7] * 3)["std"]  # by nothing, not by rounding
    with pytest.raises(InputError, match="no values"):
        summary([])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_summary_is_the_sample_statistics_and_json(values):
    stats = json.loads(json.dumps(summary(values), allow_nan=False))
    assert stats["mean"] == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
    assert stats["std"] == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-6)  # exact rational arithmetic
    assert stats["ci95"][0] <= stats["mean"] <= stats["ci95"][1]


def test_the_interval_covers_the_mean_95_times_in_100():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    covered = np.mean([low <= 3.0 <= high for low, high in map(interval, draws)])
    assert abs(covered - 0.95) < 0.015  # three standard errors of 2000 draws


# --- result files and the page -----------------------------------------------------------------------------------

LENET = '''
"""LeNet | reaches 1 % test error.

More.
"""
from dl_jax.claims import Claim
DOE = "Doe 2020"
THING = "thing"
NOTHING = f"no{THING}"
raise RuntimeError("an experiment is never imported")
CLAIMS = (
    Claim(metric="error", paper=DOE, locator="Table 1", claimed=1.0, tolerance=0.1, unit="%",
          given={"dataset": "mnist"}, note=f"the paper says {NOTHING} of the batch size"),
    Claim("error", DOE, "Table 1", 0.5, 0.1, "%", verified=False, preset="quick"),
    Claim("error", DOE, "Section 3", None, 0, versus="baseline"),
    Claim("error/imagenet", DOE, "Table 2", 20.0, 1.0, "%", better="lower"),
)
'''


def lenet_claims() -> list[Claim]:
    doe = "Doe 2020"
    note = "the paper says nothing of the batch size"
    return [
        claim(unit="%", given=MNIST, note=note),
        claim(0.5, 0.1, unit="%", verified=False, preset="quick"),
        Claim("error", doe, "Section 3", None, 0, versus="baseline"),
        Claim("error/imagenet", doe, "Table 2", 20.0, 1.0, "%"),
    ]


def result(preset="paper", claims=None, **fields) -> dict:
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


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two experiments and one result, as the current directory."""
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments/vision", "experiments/text", "results"):
        Path(folder).mkdir(parents=True)
    Path("experiments/vision/lenet.py").write_text(LENET)
    Path("experiments/text/rnn.py").write_text('"""An RNN."""\nCLAIMS = [Claim(m, "p", "l", 1, 0) for m in "ab"]\n')
    Path("experiments/text/_helper.py").write_text("no Python")
    Path("experiments/kmeans.py").write_text('"""Finds clusters."""\n')
    Path("results/lenet.json").write_text(json.dumps(result()))
    return tmp_path


PAGE = """\
| experiment | reproduced | better than claimed | ordering only | not reproduced | not run |
| --- | --- | --- | --- | --- | --- |
| [kmeans](#kmeans) |  |  |  |  |  |
| [text/rnn](#textrnn) |  |  |  |  |  |
| [vision/lenet](#visionlenet) | 2 |  |  |  | 2 |
| **all** | 2 |  |  |  | 2 |

## kmeans

Finds clusters. ([file](../experiments/kmeans.py))

It makes no claim.

## text/rnn

An RNN. ([file](../experiments/text/rnn.py))

Not run; the file computes its claims, so that they are listed once it has run.

## vision/lenet

LeNet | reaches 1 % test error. ([file](../experiments/vision/lenet.py))

- [lenet](../results/lenet.json): `python experiments/vision/lenet.py --preset paper` · commit 0123456789ab · \
seeds 0, 1, 2, 3, 4 · 1.5 min on cpu · jax 0.10.2, python 3.11

| metric | paper | claimed | measured | interval | tolerance | verdict | evidence |
| --- | --- | --- | --- | --- | --- | --- | --- |
| error, dataset=mnist | Doe 2020, Table 1 | 1 % | 1.000 ± 0.079 (5) | [0.902, 1.098] | ± 0.1 | reproduced | \
[lenet](../results/lenet.json) |
| error | Doe 2020, Table 1 | 0.5 % (unverified) |  |  | ± 0.1 | not run |  |
| error − baseline | Doe 2020, Section 3 | < 0 | -0.500 ± 0.071 (5) | [-0.588, -0.412] |  | reproduced | \
[lenet](../results/lenet.json) |
| error/imagenet | Doe 2020, Table 2 | 20 % |  |  | ± 1 | not run |  |

- error: the paper says nothing of the batch size
"""


def test_the_page_lists_every_experiment_and_every_claim(repository):
    page = render()
    assert page[page.index("| experiment |") :] == PAGE
    assert page.startswith("# Results\n")
    for word in ("reproduced", "better than claimed", "ordering only", "not reproduced", "not run"):
        assert f"\n| {word} |" in page[: page.index("| experiment |")]


def test_a_quick_number_never_stands_in_the_measured_column(repository):
    Path("results/lenet.json").write_text(json.dumps(result("smoke")))
    page = render()
    assert "1.000 ± 0.079" not in page
    assert "| **all** |  |  |  |  | 4 |" in page


def test_uncommitted_changes_and_misses_are_shown(repository):
    missed = result(clean=False, claims=[claim(2.0, 0.1, better="higher", given=MNIST)])
    Path("experiments/vision/lenet.py").write_text('"""LeNet."""\nCLAIMS = ()\n')  # the claim has been taken out since
    Path("results/lenet.json").write_text(json.dumps(missed))
    page = render()
    assert "commit 0123456789ab **with uncommitted changes**" in page
    assert "| **not reproduced** | [lenet](../results/lenet.json), uncommitted changes |" in page


def test_a_claim_that_was_changed_after_the_run_is_refused(repository):
    file = Path("experiments/vision/lenet.py")
    file.write_text(file.read_text().replace("tolerance=0.1", "tolerance=0.5"))
    with pytest.raises(InputError, match=r"lenet.json: .*'error' had tolerance=0.1 at the run and has 0.5 now"):
        render()


def test_a_claim_that_was_made_after_the_run_is_not_answered_by_it(repository):
    Path("results/lenet.json").write_text(json.dumps(result(claims=lenet_claims()[1:])))
    assert "| **all** | 1 |  |  |  | 3 |" in render()


def test_two_claims_that_cannot_be_told_apart_are_refused(repository):
    file = Path("experiments/vision/lenet.py")
    file.write_text(file.read_text().replace('preset="quick"', 'given={"dataset": "mnist"}'))
    with pytest.raises(InputError, match="two claims on 'error' have the same paper, locator and given"):
        render()


def test_two_results_of_an_experiment_both_stand_on_the_page(repository):
    Path("results/lenet-b.json").write_text(json.dumps(result(commit="fedcba")))
    assert "| **all** | 4 |  |  |  | 2 |" in render()


def test_a_bar_does_not_break_the_table(repository):
    barred = Claim("error", "p|q", "l", 1.0, 0.1)
    Path("results/lenet.json").write_text(json.dumps(result(claims=[*lenet_claims(), barred])))
    assert "| error | p\\|q, l |" in render()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = (", r"bad.py:1: .* must be Python"),
        ("x = 1", "bad.py has no docstring"),
        ('"""A."""\nCLAIMS = (Claim("error", "p", "l", 1.0, -1.0),)', "bad.py: CLAIMS: .*tolerance=-1.0"),
        ('"""A."""\nCLAIMS = (Claim(metrik="error"),)', "bad.py: CLAIMS: .*metrik"),
    ],
)
def test_a_bad_experiment_file_is_named(repository, source, message):
    Path("experiments/bad.py").write_text(source)
    with pytest.raises(InputError, match=message):
        catalogue("experiments")


def test_computed_claims_are_not_guessed(tmp_path):
    for expression in (
        "(f(),)",
        "make()",
        "(Claim(metric=name()),)",
        "(Claim(**fields),)",
        "(1 + 2,)",
        '(Claim(f"{x!r}"),)',
    ):
        (tmp_path / "a.py").write_text(f'"""A."""\nCLAIMS = {expression}\n')
        assert catalogue(tmp_path)["a"].claims is None
    (tmp_path / "a.py").write_text('"""A."""\nCLAIMS: tuple[Claim, ...] = ()\n')
    assert catalogue(tmp_path)["a"].claims == ()


def changed(judged=None, **fields) -> str:
    record = result(**fields)
    return json.dumps({**record, "claims": judged or record["claims"]})


def edited(*path, value) -> str:
    """The result with the item at `path` replaced."""
    record = result()
    place = record
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
    ],
)
def test_a_malformed_result_names_the_file_and_the_key(tmp_path, text, key):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=rf"bad\.json: .*{key}") as caught:
        read(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)


def test_a_failed_seed_survives_the_file(tmp_path):
    measured = {"error": [1.0, math.nan, 1.0, 1.0, 1.0]}
    claims = judge([claim()], measured, preset="paper", config=MNIST)
    (tmp_path / "r.json").write_text(changed(measured={"error": summary(measured["error"])}, judged=claims))
    assert read(tmp_path / "r.json")["claims"][0]["verdict"] == "not reproduced"


def test_a_result_of_an_unknown_experiment_is_refused(repository):
    Path("results/lenet.json").write_text(json.dumps(result(experiment="vision/lenett")))
    with pytest.raises(InputError, match=r"'vision/lenett' is not in experiments; did you mean vision/lenet\?"):
        render()


def test_the_command_writes_the_page_and_checks_it(repository, capsys):
    assert results.main(["--check"]) == 1
    assert "docs/results.md is out of date; run python -m dl_jax.results" in capsys.readouterr().err
    assert results.main([]) == 0
    assert Path("docs/results.md").read_text(encoding="utf-8") == render()
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


def test_python_m(repository):
    command = [sys.executable, "-W", "error", "-m", "dl_jax.results", "--check"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: docs/results.md is out of date")


def test_a_resumed_run_says_so(repository):
    attempts = [{"commit": commit * 40, "clean": True, "seconds": 45.0} for commit in "ab"]
    fields = {"commit": "b" * 40, "attempts": attempts}
    Path("results/lenet.json").write_text(json.dumps(result(**fields)))
    assert f"· 1.5 min in 2 attempts, of commits {'a' * 12} too on cpu" in results.render()
    attempts.append({"commit": None, "clean": False, "seconds": None})
    Path("results/lenet.json").write_text(json.dumps(result(**fields)))
    assert f"· more than 1.5 min in 3 attempts, of commits None, {'a' * 12} too on cpu" in results.render()


@pytest.mark.parametrize("metric", ["error", "error/another_task"])
def test_a_claim_that_is_no_longer_made_stays_in_sight_where_a_run_answered_it(repository, metric):
    old = Claim(metric, "Roe 1999", "Table 9", 1.0, 0.5)
    Path("results/lenet.json").write_text(json.dumps(result(claims=[*lenet_claims(), old])))
    assert ("Roe 1999" in render()) == (metric == "error")
