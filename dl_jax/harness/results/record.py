"""result.json: reading what a run left behind, and its numbers as a person reads them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.harness.results.claims import Claim, cells_won, level, obstacle, quantity, summary, verdict

Result = Mapping[str, Any]  # the content of a result.json
Row = tuple[str, ...]


def read(path: str | PurePath) -> dict[str, Any]:
    """The result at `path`.

    Raises InputError that names the file and the key if one is missing, has the wrong type, or if a mean, a standard
    deviation or a verdict is not what the values say.
    """
    try:
        result = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: {e}; expected a result.json, run the experiment again") from None

    def expect(good: bool, key: str, expected: str) -> None:
        if not good:
            raise InputError(f"{path}: {key} is missing or wrong, expected {expected}; run the experiment again")

    expect(isinstance(result, dict), "the object", "{...}")
    for key, (good, expected) in _KEYS.items():
        expect(key in result and good(result[key]), key, expected)
    for name, stats in result["measured"].items():
        values = stats.get("values") if isinstance(stats, dict) else None
        good = isinstance(values, list) and len(values) > 0 and all(v is None or _is_number(v) for v in values)
        expect(good, f"measured.{name}.values", "a number or null for every seed")
        truth = summary(measured_values(result)[name])
        for key in ("mean", "std"):
            expect(key in stats and _same(stats[key], truth[key]), f"measured.{name}.{key}", str(truth[key]))
    for i, entry in enumerate(result["claims"]):
        try:
            truth = verdict(claim_of(entry), measured_values(result), preset=result["preset"], config=result["config"])
        except (TypeError, InputError) as e:
            raise InputError(f"{path}: claims.{i}: {e}; run the experiment again") from None
        expect(entry.get("verdict") == truth, f"claims.{i}.verdict", repr(truth))
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(stored: Any, truth: float | None) -> bool:
    if stored is None or truth is None:
        return stored is truth
    return _is_number(stored) and math.isclose(stored, truth, rel_tol=1e-9, abs_tol=1e-12)


_STRING = (lambda v: isinstance(v, str), "a string")
_OBJECT = (lambda v: isinstance(v, dict), "an object")
_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "experiment": _STRING,
    "command": _STRING,
    "commit": _STRING,
    "clean": (lambda v: isinstance(v, bool), "true or false"),
    "config": _OBJECT,
    "preset": _STRING,
    "dataset": (lambda v: v is None or isinstance(v, str), "a string or null"),
    "seeds": (lambda v: isinstance(v, list) and all(type(s) is int for s in v), "a list of integers"),
    "measured": _OBJECT,
    "claims": (lambda v: isinstance(v, list) and all(isinstance(c, dict) for c in v), "a list of objects"),
    "device": _STRING,
    "versions": _OBJECT,
    "wall_seconds": (_is_number, "a number"),
}


def claim_of(entry: Mapping[str, Any]) -> Claim:
    """The Claim in an entry of a result's `claims`."""
    fields = {key: value for key, value in entry.items() if key != "verdict"}
    return Claim(**{**fields, "cells": tuple(map(tuple, fields.get("cells", ())))})


def measured_values(result: Result) -> dict[str, list[float]]:
    """{metric: one value per seed} of a result; a failed seed (null) is NaN."""
    return {k: [math.nan if v is None else v for v in stats["values"]] for k, stats in result["measured"].items()}


def table_rows(result: Result) -> tuple[Row, list[Row]]:
    """Header and rows of the table that ends a run: its claims, then the metrics that no row has shown yet.

    A number that cannot answer a claim (another preset, other data, too few seeds) stands in a row of its own, never
    beside the claimed one.
    """
    measured, rows, shown = measured_values(result), [], set()
    for entry in result["claims"]:
        claim, word = claim_of(entry), entry["verdict"]
        values = quantity(claim, measured)
        if values is None or word == "not applicable":
            n = claim.seeds if values is None else values.shape[-1]
            why = obstacle(claim, n, preset=result["preset"], config=result["config"])
            rows.append((*claimed_cells(claim), "", tolerance_cell(claim), f"{word}: {why}" if why else word))
        else:
            shown.add(claim.quantity)
            rows.append((*claimed_cells(claim), answer_cells(claim, values)[0], tolerance_cell(claim), word))
    rows += [(name, "", "", measured_cell(values), "", "") for name, values in measured.items() if name not in shown]
    return ("metric", "paper", "claimed", "measured ± std (n)", "tolerance", "verdict"), rows


def claimed_cells(claim: Claim) -> tuple[str, str, str]:
    """What is claimed, by whom, and the number."""
    if claim.cells:
        number = f"≥ {claim.at_least} of {len(claim.cells)} cells"
    elif claim.at_least is not None:
        number = f"≥ {amount(claim.at_least, claim.unit)}"
    elif claim.at_most is not None:
        number = f"≤ {amount(claim.at_most, claim.unit)}"
    elif claim.claimed is None:
        number = f"{'<' if claim.better == 'lower' else '>'} {amount(0, claim.unit)}"
    elif claim.versus and claim.claimed == 0:
        number = "no loss"
    else:
        number = amount(claim.claimed, claim.unit)
    return claim.quantity, f"{claim.paper}, {claim.locator}", number if claim.verified else f"{number} (unverified)"


def amount(number: float, unit: str) -> str:
    return f"{number:.7g} {unit}".rstrip()


def tolerance_cell(claim: Claim) -> str:
    if claim.claimed is None:
        return ""
    return f"± {amount(claim.tolerance, '' if claim.claimed else claim.unit)}"  # "no loss" has no unit beside it


def answer_cells(claim: Claim, values: np.ndarray) -> tuple[str, str]:
    """What `values`, the `quantity` of `claim`, say: the number that is held against the claim, and its interval."""
    if claim.cells or claim.worst:
        return f"{level_cell(claim, values)} ({values.shape[-1]})", ""
    return measured_cell(values), interval_cell(values)


def level_cell(claim: Claim, values: np.ndarray) -> str:
    """The one number that is held against the claim: "0.974", or "7 of 9"."""
    if claim.cells:
        return f"{cells_won(claim, values)} of {len(values)}"
    if claim.worst:
        return f"{level(claim, values):.5g}"
    mean, std = (math.nan if each is None else each for each in (summary(values)[key] for key in ("mean", "std")))
    return _number(mean, std)


def measured_cell(values: Sequence[float] | np.ndarray) -> str:
    """Mean ± sample standard deviation (n), with two digits of the deviation: "0.974 ± 0.052 (5)"."""
    stats = summary(values)
    mean, std, n = (math.nan if stats[key] is None else stats[key] for key in ("mean", "std", "n"))
    return f"{_number(mean, std)} ({n})" if n == 1 else f"{_number(mean, std)} ± {_number(std, std)} ({n})"


def interval_cell(values: Sequence[float] | np.ndarray) -> str:
    """The 95 % confidence interval of the mean: "[0.909, 1.039]"; empty where there is none."""
    stats = summary(values)
    ends = stats["ci95"]
    return "" if None in ends else f"[{', '.join(_number(end, stats['std']) for end in ends)}]"


def _number(value: float, std: float) -> str:
    """`value` with as many decimals as show two digits of `std`."""
    if not (math.isfinite(std) and std > 1e-8):
        return f"{value:.5g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(std)))}f}"
