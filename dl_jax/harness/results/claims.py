"""What a paper claims, what was measured, and the verdict between the two."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from dl_jax.core.errors import InputError, nearest

Verdict = Literal["reproduced", "better than claimed", "ordering only", "not reproduced", "not run", "not applicable"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MISSED: tuple[Verdict, ...] = ("ordering only", "not reproduced")
Measured = Mapping[str, Sequence[float]]  # metric -> one value per seed


@dataclasses.dataclass(frozen=True)
class Claim:
    """One number of a paper, or a bar of our own, that is declared before the run. It claims one of four things:

    - A value: the mean of `metric` over the seeds is `claimed` ± `tolerance`.
    - A bar: the mean, or with `worst` the worst seed, is `at_least` or `at_most` so much.
    - A difference `metric - versus`, paired seed by seed: it is `claimed` ± `tolerance`, or, without a number, beyond 0
      on the better side. A claimed difference of 0 is "no loss", with `tolerance` as the margin.
    - Differences in several `cells`, (metric, versus) each: `at_least` so many are beyond 0 on the better side.
      `metric` is then a name for the whole.

    Raises InputError if the fields contradict each other.
    """

    metric: str  # a name in the result of `main`, e.g. "test_error/distorted"
    paper: str  # e.g. "LeCun et al. 1998"
    locator: str  # where in the paper: table, figure or section
    claimed: float | None = None
    tolerance: float = 0.0  # in the unit of `claimed`
    unit: str = ""
    better: Literal["lower", "higher"] | None = None  # None: as the bar says, else "lower"
    preset: str = "paper"  # the only preset whose numbers can answer the claim
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # config fields and their values, e.g. the data
    verified: bool = True  # False: the number is from memory and is printed as "unverified"
    note: str = ""  # e.g. how the protocol differs from the paper's
    versus: str = ""  # the metric on the other side of a paired difference
    seeds: int = 5  # the fewest seeds that can answer the claim; 3 where a run exceeds half an hour
    at_least: float | None = None
    at_most: float | None = None
    worst: bool = False  # every seed must meet the bar, not only their mean
    cells: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        def check(good: bool, problem: str) -> None:
            if not good:
                raise InputError(f"claim on {self.metric!r}: {problem}")

        numbers = {name: getattr(self, name) for name in ("claimed", "at_least", "at_most")}
        stated = {name: value for name, value in numbers.items() if value is not None}
        shown = " and ".join(f"{name}={value}" for name, value in stated.items())
        bar = self.claimed is None and not self.versus and not self.cells
        unused = self.claimed is None and self.tolerance != 0
        check(len(stated) <= 1, f"{shown}, expected only one of them")
        check(bool(stated or self.versus), "nothing is claimed; give claimed, at_least, at_most or versus")
        check(all(map(math.isfinite, stated.values())), f"{shown}, expected a finite number")
        check(0 <= self.tolerance < math.inf, f"tolerance={self.tolerance}, expected a finite number of at least 0")
        check(not unused, f"tolerance={self.tolerance} has no meaning without claimed; leave it out")
        check(not self.versus or set(stated) <= {"claimed"}, f"{shown} with versus; give the difference as claimed")
        check(bar or not self.worst, "worst=True, expected only with a bar: at_least or at_most without cells")
        if self.cells:
            pairs = isinstance(self.cells, tuple) and all(map(_is_pair, self.cells))
            check(pairs, f"cells={self.cells}, expected a tuple of pairs (metric, versus)")
            count, n = self.at_least, len(self.cells)
            check(n == len(set(self.cells)), f"cells={self.cells}, expected each only once")
            check(type(count) is int and 1 <= count <= n, f"at_least={count}, expected a number of cells, 1 to {n}")
        fewest = 2 if self.versus or self.cells else 1  # a difference is judged by its spread
        check(self.seeds >= fewest, f"seeds={self.seeds}, expected at least {fewest}")
        side = ("lower" if self.at_least is None else "higher") if bar else self.better or "lower"
        check(self.better in (None, "lower", "higher"), f"better={self.better!r}, expected 'lower' or 'higher'")
        check(self.better in (None, side), f"better={self.better!r} contradicts {shown}; leave it out")
        object.__setattr__(self, "better", side)

    @property
    def quantity(self) -> str:
        if self.versus:
            return f"{self.metric} − {self.versus}"
        return f"worst seed of {self.metric}" if self.worst else self.metric


def quick_bar(
    dataset: str, metric: str, *, unit: str, note: str, at_least: float | None = None, at_most: float | None = None
) -> Claim:
    """Our own bar for the preset quick on a bundled data set; docs/guide.md says how it is set.

    `note` names a simple baseline and what it reaches. Raises InputError as `Claim` does.
    """
    return Claim(
        metric,
        paper="our bar",
        locator=f"bundled {dataset}",
        unit=unit,
        preset="quick",
        given={"dataset": dataset},
        note=note,
        at_least=at_least,
        at_most=at_most,
    )


on_digits = functools.partial(quick_bar, "digits")
on_shapes = functools.partial(quick_bar, "shapes")


def _is_pair(cell: Any) -> bool:
    return isinstance(cell, tuple) and len(set(cell)) == len(cell) == 2


def quantity(claim: Claim, measured: Measured) -> np.ndarray | None:
    """The values that answer `claim`, float64 [n], or [cells, n]: the metric's, or paired differences.

    None if one is not measured. Raises InputError if the two sides of a difference have not the same seeds.
    """
    pairs = claim.cells or ((claim.metric, claim.versus),)
    names = [name for pair in pairs for name in pair if name]
    if not all(name in measured for name in names):
        return None
    values = {name: np.asarray(measured[name], np.float64).ravel() for name in names}
    lengths = {len(each): None for each in values.values()}
    if len(lengths) > 1:
        counts = " and ".join(map(str, lengths))
        raise InputError(f"claim on {claim.quantity!r}: its metrics have {counts} values, expected one per seed")
    with np.errstate(invalid="ignore"):  # inf - inf
        answers = [values[a] - values[b] if b else values[a] for a, b in pairs]
    return np.stack(answers) if claim.cells else answers[0]


def obstacle(claim: Claim, n: int, *, preset: str, config: Mapping[str, Any]) -> str:
    """Why a run of `preset` and `config` with `n` seeds cannot answer `claim`, e.g. "needs preset paper"; else "".

    Raises InputError if the claim names a config field that does not exist.
    """
    for name, value in claim.given.items():
        if name not in config:
            hint = nearest(name, config)
            raise InputError(f"claim on {claim.metric!r}: given={name!r} is no field of the config{hint}")
        if _plain(config[name]) != _plain(value):
            return f"needs {name}={value}"
    if preset != claim.preset:
        return f"needs preset {claim.preset}"
    return f"needs {claim.seeds} seeds" if n < claim.seeds else ""


def _plain(value: Any) -> Any:
    """As JSON gives it back: a tuple is a list."""
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def verdict(claim: Claim, measured: Measured, *, preset: str, config: Mapping[str, Any]) -> Verdict:
    """The verdict on `claim` of a run that measured `measured` (one value per seed) under `preset` and `config`.

    A value: `reproduced` if the mean is within the tolerance, `better than claimed` if it misses on the better side.
    A paired difference must first have a 95 % confidence interval that excludes 0 on the claimed side; it is then
    `reproduced` if its size is within the tolerance or was not claimed, `better than claimed` or else `ordering only`.
    "No loss" (a claimed difference of 0): the interval's worse end lies within the tolerance.
    A bar, and a number of cells, is reached, `reproduced`, or not.
    A value that is not finite is a failed seed: it is never left out, and the claim, or the cell, is missed.
    """
    values = quantity(claim, measured)
    n = claim.seeds if values is None else values.shape[-1]
    if obstacle(claim, n, preset=preset, config=config):
        return "not applicable"
    if values is None:
        return "not run"
    if claim.cells:
        return "reproduced" if cells_won(claim, values) >= (claim.at_least or 0) else "not reproduced"
    if not np.isfinite(values).all():
        return "not reproduced"
    if claim.versus:
        return _difference(claim, values)
    return _value(claim, level(claim, values))


def level(claim: Claim, values: np.ndarray) -> float:
    """Of `values` [n] what is held against a value or a bar: the mean, or the worst seed."""
    if not claim.worst:
        return float(values.mean())
    return float(values.max() if claim.better == "lower" else values.min())


def cells_won(claim: Claim, values: np.ndarray) -> int:
    """In how many cells of `values` [cells, n] the difference's interval excludes 0 on the better side."""
    return sum(bool(np.isfinite(each).all()) and _beyond_0(each, claim.better == "lower") for each in values)


def _value(claim: Claim, found: float) -> Verdict:
    if claim.claimed is None:
        bar = claim.at_most if claim.at_least is None else claim.at_least
        assert bar is not None  # Claim allows None only for a difference
        return "reproduced" if _within(-gain(claim, found - bar), 0, bar) else "not reproduced"
    if _within(abs(found - claim.claimed), claim.tolerance, claim.claimed):
        return "reproduced"
    return "better than claimed" if gain(claim, found - claim.claimed) > 0 else "not reproduced"


def _difference(claim: Claim, values: np.ndarray) -> Verdict:
    mean = float(values.mean())
    if claim.claimed == 0:
        worst = max(-gain(claim, end) for end in interval(values))
        if not _within(worst, claim.tolerance):
            return "not reproduced"
        return "reproduced" if _within(abs(mean), claim.tolerance) else "better than claimed"
    if not _beyond_0(values, claim.better == "lower" if claim.claimed is None else claim.claimed < 0):
        return "not reproduced"
    if claim.claimed is None or _within(abs(mean - claim.claimed), claim.tolerance, claim.claimed):
        return "reproduced"
    return "better than claimed" if gain(claim, mean - claim.claimed) > 0 else "ordering only"


def _beyond_0(values: np.ndarray, below: bool) -> bool:
    """Whether the 95 % confidence interval of `values` [n] lies below 0, or above it."""
    low, high = interval(values)
    return high < 0 if below else low > 0


def gain(claim: Claim, change: float) -> float:
    """`change` with the sign that makes better positive."""
    return -change if claim.better == "lower" else change


def _within(distance: float, tolerance: float, of: float = 0.0) -> bool:
    """Whether a `distance` from the number `of` is at most the tolerance, but for rounding (1.05 - 0.95 > 0.1)."""
    return distance <= tolerance + 1e-9 * max(tolerance, abs(of))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of the mean of `values` [n] by Student's t; unbounded for fewer than two values."""
    from scipy.special import stdtrit  # a dependency of jax and scikit-learn; a second to import

    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half = float(stdtrit(n - 1, 0.975) * _std(values) / math.sqrt(n))
    return float(values.mean()) - half, float(values.mean()) + half


def _std(values: np.ndarray) -> float:
    """Sample standard deviation of `values` [n > 1]; exactly 0 of equal ones, from which a rounded mean may differ."""
    return float(values.std(ddof=1)) if np.ptp(values) else 0.0


def summary(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """{values, mean, std, n, ci95} of one value per seed [n], ready for JSON: what is not finite is None.

    `std` is the sample's (n - 1 in the denominator). Raises InputError if there is no value.
    """
    x = np.asarray(values, np.float64).ravel()
    if not len(x):
        raise InputError("summary of no values, expected one value per seed")
    with np.errstate(invalid="ignore", over="ignore"):
        mean, std = float(x.mean()), _std(x) if len(x) > 1 else math.nan
        ci95 = interval(x)
    return {
        "values": [_finite(v) for v in x.tolist()],
        "mean": _finite(mean),
        "std": _finite(std),
        "n": len(x),
        "ci95": [_finite(end) for end in ci95],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def judge(
    claims: Sequence[Claim], measured: Measured, *, preset: str, config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The `claims` of a result: every claim's fields and its verdict."""
    return [
        {**dataclasses.asdict(claim), "verdict": verdict(claim, measured, preset=preset, config=config)}
        for claim in claims
    ]
