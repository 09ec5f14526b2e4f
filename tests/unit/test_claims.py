"""Claims, and the verdicts on them."""

import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax.core.errors import InputError
from dl_jax.harness import Claim
from dl_jax.harness.results.claims import interval, judge, summary, verdict

MNIST = {"dataset": "mnist"}
NAN, INF = math.nan, math.inf


def claim(claimed: float | None = 1.0, tolerance: float = 0.1, **fields: Any) -> Claim:
    return Claim("error", "Doe 2020", "Table 1", claimed, tolerance, **fields)


def bar(**fields: Any) -> Claim:
    return Claim("error", paper="own bar", locator="digits", **fields)


def judged(
    a_claim: Claim,
    error: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray | None = None,
    preset: str = "paper",
    config: Mapping[str, Any] = MNIST,
) -> str:
    measured: dict[str, Any] = {"error": error} if baseline is None else {"error": error, "baseline": baseline}
    return verdict(a_claim, measured, preset=preset, config=config)


@pytest.mark.parametrize(
    ("better", "mean", "expected"),
    [
        ("lower", 1.1, "reproduced"),  # exactly at the tolerance, which rounding must not miss
        ("lower", 0.9, "reproduced"),
        ("lower", 1.101, "not reproduced"),
        ("lower", 0.899, "better than claimed"),
        ("higher", 1.101, "better than claimed"),
        ("higher", 0.899, "not reproduced"),
        ("lower", -INF, "not reproduced"),
    ],
)
def test_a_value_is_judged_by_its_mean(better: str, mean: float, expected: str) -> None:
    assert judged(claim(better=better), [mean] * 5) == expected
    if math.isfinite(mean):
        assert judged(claim(better=better), [mean - 2, mean + 2, mean, mean - 1, mean + 1]) == expected


@pytest.mark.parametrize("a_claim", [claim(), bar(at_most=2), bar(at_least=0), bar(at_most=2, worst=True)])
def test_a_failed_seed_is_never_left_out(a_claim: Claim) -> None:
    assert judged(a_claim, [1.0] * 5) == "reproduced"
    assert judged(a_claim, [1.0, 1.0, 1.0, 1.0, NAN]) == "not reproduced"


def test_an_exact_count_needs_no_tolerance() -> None:
    exact = Claim("error", "Doe 2020", "Table 1", claimed=431_080, seeds=1)
    assert judged(exact, [431_080]) == "reproduced"
    assert judged(exact, [431_081]) == "not reproduced"


@pytest.mark.parametrize(
    ("fields", "values", "expected"),
    [
        ({"at_most": 4}, [3.7, 3.7, 4.4, 4.4, 3.8], "reproduced"),  # the mean is 4.000000000000001 in float64
        ({"at_most": 4}, [3.7, 3.7, 4.4, 4.4, 3.9], "not reproduced"),  # 4.02
        ({"at_most": 4}, [0.0] * 5, "reproduced"),  # never "better than claimed"
        ({"at_most": 0}, [0.0] * 5, "reproduced"),
        ({"at_most": 0}, [0.0, 0.0, 0.0, 0.0, 1.0], "not reproduced"),
        ({"at_least": 90}, [80.0, 100.0, 90.0, 95.0, 85.0], "reproduced"),
        ({"at_least": 90}, [80.0, 100.0, 90.0, 95.0, 84.0], "not reproduced"),  # the mean is 89.8
        ({"at_least": -2}, [-3.0, -1.0, -2.0, -2.0, -2.0], "reproduced"),
        ({"at_least": 90}, [INF] * 5, "not reproduced"),
        ({"at_most": 4, "worst": True}, [1.0, 1.0, 1.0, 1.0, 4.0], "reproduced"),
        ({"at_most": 4, "worst": True}, [1.0, 1.0, 1.0, 1.0, 4.1], "not reproduced"),
        ({"at_least": 90, "worst": True}, [99.0, 99.0, 99.0, 99.0, 90.0], "reproduced"),
        ({"at_least": 90, "worst": True}, [99.0, 99.0, 99.0, 99.0, 89.9], "not reproduced"),
    ],
)
def test_a_bar_is_reached_or_not(fields: dict[str, Any], values: list[float], expected: str) -> None:
    assert judged(bar(**fields), values) == expected
    assert judged(bar(**fields), values[:4]) == "not applicable"


def test_a_bar_says_which_side_is_better() -> None:
    assert (bar(at_most=4).better, bar(at_least=4).better, claim().better) == ("lower", "higher", "lower")


def test_what_claims_share_is_said_once() -> None:
    error = functools.partial(Claim, paper="Doe 2020", unit="%", given=MNIST)
    assert error("error", locator="Table 1", claimed=1.0, tolerance=0.1) == claim(unit="%", given=MNIST)


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
def test_only_a_run_of_the_claimed_protocol_answers(
    fields: dict[str, Any], keywords: dict[str, Any], expected: str
) -> None:
    a_claim = Claim(**{"metric": "error", "paper": "p", "locator": "l", "claimed": 1.0, "tolerance": 0.1, **fields})
    assert judged(a_claim, [1.0] * 5, **keywords) == expected


# Differences of five seeds; t(0.975, 4) = 2.776 445, so deviations of ±0.1 (sample standard deviation 0.1) put the
# interval's ends at the mean ± 0.124.
SPREAD = np.array([-0.1, -0.1, 0.0, 0.1, 0.1])
BASELINE = np.array([3.0, 5.0, 1.0, 9.0, 4.0])  # what the pairs have in common does not matter


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
        (0.5, 0.1, "lower", 0.7, "ordering only"),  # a claimed loss that is larger
        (0.5, 0.1, "lower", 0.3, "better than claimed"),
        (0.5, 0.1, "higher", 0.3, "ordering only"),
        (0.0, 0.2, "lower", 0.07, "reproduced"),
        (0.0, 0.2, "lower", 0.08, "not reproduced"),  # the interval's worse end is outside
        (0.0, 0.2, "lower", -0.15, "reproduced"),
        (0.0, 0.2, "lower", -0.25, "better than claimed"),
        (0.0, 0.2, "higher", -0.08, "not reproduced"),
        (0.0, 0.2, "higher", 0.25, "better than claimed"),
    ],
)
def test_a_difference_is_judged_by_its_interval(
    claimed: float | None, tolerance: float, better: str, mean: float, expected: str
) -> None:
    paired = claim(claimed, tolerance, better=better, versus="baseline")
    assert judged(paired, BASELINE + mean + SPREAD, BASELINE) == expected


def test_a_difference_needs_both_sides_with_the_same_seeds() -> None:
    paired = claim(None, 0, versus="baseline")
    assert judged(paired, [1.0] * 5) == "not run"
    assert judged(paired, [1.0] * 5, [1.0, 1.0, 1.0, 1.0, NAN]) == "not reproduced"
    assert judged(paired, [INF] * 5, [INF] * 5) == "not reproduced"
    with pytest.raises(InputError, match="5 and 4 values"):
        judged(paired, [1.0] * 5, [1.0] * 4)


@pytest.mark.parametrize(
    ("better", "differences", "won"),
    [
        ("lower", (-0.13, -0.13, -0.13), 3),
        ("lower", (-0.13, -0.12, -0.13), 2),  # the second interval holds 0
        ("lower", (0.5, -0.13, NAN), 1),
        ("higher", (0.13, 0.13, -0.5), 2),
        ("higher", (-0.13, -0.5, 0.12), 0),
    ],
)
def test_enough_cells_must_have_a_difference(better: str, differences: tuple[float, ...], won: int) -> None:
    measured: dict[str, Any] = {"one": BASELINE, "two": -BASELINE, "three": 2 * BASELINE}
    measured |= {
        f"{name}/new": measured[name] + d + SPREAD for name, d in zip(tuple(measured), differences, strict=True)
    }
    cells = tuple((f"{name}/new", name) for name in ("one", "two", "three"))
    for k in (1, 2, 3):
        wins = Claim("new wins", "Doe 2020", "Table 1", better=better, cells=cells, at_least=k)
        assert verdict(wins, measured, preset="paper", config={}) == ("reproduced" if won >= k else "not reproduced")
        few = {name: values[:4] for name, values in measured.items()}
        assert verdict(wins, few, preset="paper", config={}) == "not applicable"
        del few["two/new"]
        assert verdict(wins, few, preset="paper", config={}) == "not run"


PAIR = ("a", "b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing is claimed; give claimed, at_least, at_most or versus"),
        ({"claimed": 1.0, "at_most": 2.0}, "claimed=1.0 and at_most=2.0, expected only one of them"),
        ({"at_least": 1.0, "at_most": 2.0}, "at_least=1.0 and at_most=2.0, expected only one of them"),
        ({"at_most": 1.0, "versus": "x"}, "at_most=1.0 with versus; give the difference as claimed"),
        ({"at_most": 1.0, "tolerance": 0.1}, "tolerance=0.1 has no meaning without claimed"),
        ({"versus": "x", "tolerance": 0.1}, "tolerance=0.1 has no meaning without claimed"),
        ({"at_most": 1.0, "better": "higher"}, "better='higher' contradicts at_most=1.0; leave it out"),
        ({"claimed": 1.0, "better": "more"}, "better='more', expected 'lower' or 'higher'"),
        ({"claimed": 1.0, "tolerance": -1.0}, "tolerance=-1.0"),
        ({"claimed": NAN}, "claimed=nan, expected a finite number"),
        ({"at_least": INF}, "at_least=inf, expected a finite number"),
        ({"claimed": 1.0, "worst": True}, "worst=True, expected only with a bar"),
        ({"claimed": 1.0, "seeds": 0}, "seeds=0, expected at least 1"),
        ({"versus": "x", "seeds": 1}, "seeds=1, expected at least 2"),
        ({"cells": (PAIR,), "at_least": 1, "seeds": 1}, "seeds=1, expected at least 2"),
        ({"cells": (PAIR,), "at_least": 2}, "at_least=2, expected a number of cells, 1 to 1"),
        ({"cells": (PAIR,), "at_least": 0}, "at_least=0, expected a number of cells, 1 to 1"),
        ({"cells": (PAIR,), "at_least": 0.5}, "at_least=0.5, expected a number of cells"),
        ({"cells": (PAIR,), "at_most": 1}, "at_least=None, expected a number of cells"),
        ({"cells": (PAIR,), "at_least": 1, "worst": True}, "worst=True, expected only with a bar"),
        ({"cells": (PAIR, PAIR), "at_least": 1}, "expected each only once"),
        ({"cells": PAIR, "at_least": 1}, r"expected a tuple of pairs \(metric, versus\)"),
        ({"cells": (("a", "a"),), "at_least": 1}, r"expected a tuple of pairs \(metric, versus\)"),
    ],
)
def test_a_contradictory_claim_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^claim on 'error': .*{message}"):
        Claim("error", "Doe 2020", "Table 1", **fields)


def test_a_claim_given_an_unknown_field_is_refused() -> None:
    with pytest.raises(InputError, match="given='datset' is no field of the config; did you mean dataset"):
        judged(claim(given={"datset": "mnist"}), [1.0] * 5)


def test_judge_gives_every_field_and_the_verdict() -> None:
    (entry,) = judge([bar(at_most=4)], {"error": [1.0] * 5}, preset="paper", config={})
    assert entry.pop("verdict") == "reproduced"
    assert Claim(**entry) == bar(at_most=4)


def test_summary_of_hand_values() -> None:
    stats = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (stats["mean"], stats["n"], stats["values"]) == (3.0, 5, [1, 2, 3, 4, 5])
    assert stats["std"] == pytest.approx(1.5811388300841898)
    assert stats["ci95"] == pytest.approx([3 - 1.9632432, 3 + 1.9632432])  # 2.7764451 * 1.5811388 / sqrt(5)
    one = summary(np.float32(0.5))
    assert (one["mean"], one["std"], one["ci95"], one["n"]) == (0.5, None, [None, None], 1)
    failed = summary([1.0, NAN])
    assert (failed["values"], failed["mean"], failed["std"], failed["ci95"]) == ([1.0, None], None, None, [None, None])
    assert summary([INF] * 3)["std"] is None
    assert np.std([2.7] * 3, ddof=1) > 0 == summary([2.7] * 3)["std"]  # by nothing, not by rounding
    with pytest.raises(InputError, match="no values"):
        summary([])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_summary_is_the_sample_statistics_and_json(values: list[float]) -> None:
    stats = json.loads(json.dumps(summary(values), allow_nan=False))
    assert stats["mean"] == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
    assert stats["std"] == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-6)  # exact rational arithmetic
    assert stats["ci95"][0] <= stats["mean"] <= stats["ci95"][1]


def test_the_interval_covers_the_mean_95_times_in_100() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    covered = np.mean([low <= 3.0 <= high for low, high in map(interval, draws)])
    assert abs(covered - 0.95) < 0.015  # three standard errors of 2000 draws
