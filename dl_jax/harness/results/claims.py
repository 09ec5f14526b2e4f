"""What a paper claims, what was measured, and the verdict between the two."""

import dataclasses
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
    """One number of a paper, with the tolerance that is declared before the run.

    Without `versus` the claim is about the mean of `metric` over the seeds. With `versus` it is about the paired
    difference `metric - versus`, seed by seed: `claimed` is then the size of the difference, 0 for "no loss" (with
    `tolerance` as the margin), or None where the paper claims only that one beats the other.
    Raises InputError if the fields contradict each other.
    """

    metric: str  # a name in the result of `main`, e.g. "test_error/distorted"
    paper: str  # e.g. "LeCun et al. 1998"
    locator: str  # where in the paper: table, figure or section
    claimed: float | None
    tolerance: float  # in the unit of `claimed`
    unit: str = ""
    better: Literal["lower", "higher"] = "lower"
    preset: str = "paper"  # the only preset whose numbers can answer the claim
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # config fields and their values, e.g. the data
    verified: bool = True  # False: the number is from memory and is printed as "unverified"
    note: str = ""  # e.g. how the protocol differs from the paper's
    versus: str = ""  # the metric on the other side of a paired difference
    seeds: int = 5  # the fewest seeds that can answer the claim; 3 where a run exceeds half an hour

    def __post_init__(self) -> None:
        def check(good: bool, problem: str) -> None:
            if not good:
                raise InputError(f"claim on {self.metric!r}: {problem}")

        check(self.better in ("lower", "higher"), f"better={self.better!r}, expected 'lower' or 'higher'")
        check(0 <= self.tolerance < math.inf, f"tolerance={self.tolerance}, expected a finite number of at least 0")
        fewest = 2 if self.versus else 1  # a difference is judged by its spread
        check(self.seeds >= fewest, f"seeds={self.seeds}, expected at least {fewest}")
        if self.claimed is None:
            check(bool(self.versus), "claimed=None needs `versus`: only an order can be claimed without a number")
            check(self.tolerance == 0, f"tolerance={self.tolerance} has no meaning with claimed=None; give 0")
        else:
            check(math.isfinite(self.claimed), f"claimed={self.claimed}, expected a finite number")

    @property
    def quantity(self) -> str:
        return f"{self.metric} − {self.versus}" if self.versus else self.metric


def quantity(claim: Claim, measured: Measured) -> np.ndarray | None:
    """The values that answer `claim`, float64 [n]: the metric's, or its paired differences; None if not measured.

    Raises InputError if the two sides of a difference have not the same seeds.
    """
    names = (claim.metric, claim.versus) if claim.versus else (claim.metric,)
    if not all(name in measured for name in names):
        return None
    sides = [np.asarray(measured[name], np.float64).ravel() for name in names]
    if len({len(side) for side in sides}) > 1:
        lengths = " and ".join(str(len(side)) for side in sides)
        raise InputError(f"claim on {claim.quantity!r}: the two have {lengths} values, expected one per seed in both")
    return sides[0] if len(sides) == 1 else sides[0] - sides[1]


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
    A value that is not finite is a failed seed: it is never left out, and the claim is `not reproduced`.
    """
    values = quantity(claim, measured)
    if obstacle(claim, claim.seeds if values is None else len(values), preset=preset, config=config):
        return "not applicable"
    if values is None:
        return "not run"
    if not np.isfinite(values).all():
        return "not reproduced"
    return _difference(claim, values) if claim.versus else _value(claim, float(values.mean()))


def _value(claim: Claim, mean: float) -> Verdict:
    assert claim.claimed is not None  # Claim allows None only with `versus`
    if _within(abs(mean - claim.claimed), claim):
        return "reproduced"
    return "better than claimed" if _gain(claim, mean - claim.claimed) > 0 else "not reproduced"


def _difference(claim: Claim, values: np.ndarray) -> Verdict:
    mean, (low, high) = float(values.mean()), interval(values)
    if claim.claimed == 0:
        worst = max(-_gain(claim, low), -_gain(claim, high))
        if not _within(worst, claim):
            return "not reproduced"
        return "reproduced" if _within(abs(mean), claim) else "better than claimed"
    negative = claim.better == "lower" if claim.claimed is None else claim.claimed < 0
    if not (high < 0 if negative else low > 0):
        return "not reproduced"
    if claim.claimed is None or _within(abs(mean - claim.claimed), claim):
        return "reproduced"
    return "better than claimed" if _gain(claim, mean - claim.claimed) > 0 else "ordering only"


def _gain(claim: Claim, change: float) -> float:
    """`change` with the sign that makes better positive."""
    return -change if claim.better == "lower" else change


def _within(distance: float, claim: Claim) -> bool:
    """Whether `distance` is at most the tolerance, but for rounding (1.05 - 0.95 > 0.1 in float64)."""
    return distance <= claim.tolerance + 1e-9 * max(claim.tolerance, abs(claim.claimed or 0))


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
