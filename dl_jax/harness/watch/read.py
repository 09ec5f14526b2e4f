"""Reads the folder of a run, which may be going on: its config, its attempts, the reports of each fit, its result."""

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dl_jax.core import bucket
from dl_jax.core.errors import InputError, nearest
from dl_jax.core.files import MISSING, absolute, exists, patiently
from dl_jax.harness.identity import is_identity
from dl_jax.harness.results.record import Result, table_rows
from dl_jax.harness.workdir import folders_of_fits, read_json

SPEED = ("steps_per_second", "data_wait")  # of the metrics of a report, those that say nothing of the network
Record = Mapping[str, Any]


class Curve(NamedTuple):
    """All values of a metric, in the order in which they were reported."""

    steps: np.ndarray  # int [n]
    values: np.ndarray  # float64 [n, S], NaN where a value was not finite; S is 1 for a metric without a seed axis


class Fit(NamedTuple):
    """What metrics.jsonl of a fit holds."""

    curves: Mapping[str, Curve]  # by metric
    step: int  # the last that was reported
    began: float  # seconds since 1970: the first report and the last one
    reported: float
    speed: float  # median of the steps in a second; NaN where no report has it
    waited: float  # median share of the time that was spent waiting for data


class Watched(NamedTuple):
    """A run, as its folder shows it."""

    workdir: str  # as it was given
    identity: Mapping[str, Any]  # experiment, preset, config, seeds
    attempts: Sequence[Mapping[str, Any]]
    fits: Mapping[str, Fit]  # by the name of the child run, "" for the run itself, in the order of their first reports
    result: Result | None
    script: bytes  # the copy of the experiment's file; empty where there is none
    images: Mapping[str, epath.Path]  # PNGs that the run has kept, by their path in the folder
    damaged: Sequence[str]  # a sentence for each file or line that cannot be used


def read(workdir: str) -> Watched:
    """The run in a local folder or a gs:// address.

    What is damaged is left out and named in `damaged`; a last line that is incomplete is being written, and is left out
    without a word. Raises InputError where there is no run, and Unavailable where a file cannot be read.
    """
    directory = epath.Path(absolute(workdir))
    if "://" in workdir:
        bucket.require(workdir, "WORKDIR")
    identity = read_json(directory / "config.json")
    if not is_identity(identity):
        raise InputError(
            f"{workdir} holds no run (its config.json is missing, damaged or of another program); expected the folder "
            "that an experiment was given as --workdir"
        )
    damaged: list[str] = []
    fits, images = {}, {}
    for folder, names in patiently(lambda: list(folders_of_fits(directory)), workdir):
        name = os.fspath(folder)[len(os.fspath(directory)) :].strip("/")
        images |= {f"{name}/{png}".lstrip("/"): folder / png for png in sorted(names) if png.endswith(".png")}
        if "metrics.jsonl" in names:
            file = folder / "metrics.jsonl"
            records, wrong = records_of(content(file))
            shown = "/".join(filter(None, (workdir.rstrip("/"), name, "metrics.jsonl")))
            damaged += [f"line {line} of {shown} is damaged ({why}); all other lines are shown" for line, why in wrong]
            if records:
                fits[name] = fit_of(records)
    result, attempts = _result(directory / "result.json"), _attempts(directory / "attempts.json")
    for file, found, then in (
        ("result.json", result, "give the run's command again, which writes it anew"),
        ("attempts.json", attempts, "its commits are unknown"),
    ):
        if found is None and patiently(lambda file=file: exists(directory / file), workdir):
            damaged.append(f"{workdir}/{file} is damaged; {then}")
    return Watched(
        workdir=workdir,
        identity=identity,
        attempts=attempts or [],
        fits=dict(sorted(fits.items(), key=lambda item: item[1].began)),
        result=result,
        script=content(directory / f"{identity['experiment'].rpartition('/')[2]}.py"),
        images=images,
        damaged=damaged,
    )


def records_of(lines: bytes) -> tuple[list[Record], list[tuple[int, str]]]:
    """The records in a metrics.jsonl, and (number, what is wrong) of each line that is damaged.

    A last line without its end is left out, because a run that is going on may be writing it.
    """
    records, wrong, sizes = [], [], {}
    for number, line in enumerate(lines.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(_record(line, sizes))
        except ValueError as error:
            wrong.append((number, str(error)))
        except RecursionError:
            wrong.append((number, "it is nested too deeply"))
    return records, wrong


def _record(line: bytes, sizes: dict[str, int]) -> Record:
    """The record in a line. `sizes` are the numbers of values of metrics, and grow. Raises ValueError if damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError("it is no JSON") from None
    if not (isinstance(record, dict) and type(record.get("step")) is int and _is_number(record.get("time"))):
        raise ValueError("it has no step and time")
    for name, value in record.items():
        size = len(_flat(value))
        if not size or not all(item is None or _is_number(item) for item in _flat(value)):
            raise ValueError(f"{name} is no number")
        if sizes.setdefault(name, size) != size:
            raise ValueError(f"{name} has {size} values, expected {sizes[name]} as before")
    return record


def fit_of(records: Sequence[Record]) -> Fit:
    """The curves of a fit from the records in its metrics.jsonl, of which there is at least one."""
    names = {name: None for record in records for name in record if name not in ("step", "time")}
    curves = {name: _curve(name, records) for name in names}
    speed, waited = (float(np.median(curves[name].values)) if name in curves else np.nan for name in SPEED)
    return Fit(
        curves={name: curve for name, curve in curves.items() if name not in SPEED},
        step=int(records[-1]["step"]),
        began=records[0]["time"],
        reported=records[-1]["time"],
        speed=speed,
        waited=waited,
    )


def _curve(name: str, records: Sequence[Record]) -> Curve:
    mine = [record for record in records if name in record]
    values = np.array([_flat(record[name]) for record in mine], np.float64)  # null becomes NaN
    return Curve(np.array([record["step"] for record in mine]), values)


def _flat(value: Any) -> list[Any]:
    """The numbers in nested lists, in C order."""
    return [item for each in value for item in _flat(each)] if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _result(file: epath.Path) -> Result | None:
    """The content of a result.json; None where it is missing or damaged."""
    result = read_json(file)
    try:
        table_rows(result)
        whole = _are_attempts(result.get("attempts", [])) and isinstance(result.get("command", ""), str)
    except Exception:  # damage takes any form
        return None
    return result if whole else None


def _attempts(file: epath.Path) -> list[dict[str, Any]] | None:
    """The content of an attempts.json; None where it is missing or damaged."""
    found = read_json(file)
    return found if _are_attempts(found) else None


def _are_attempts(found: Any) -> bool:
    """Whether it is a list of objects, whose seconds, where they are known, are numbers."""
    if not isinstance(found, list):
        return False
    return all(isinstance(each, dict) and _is_number(each.get("seconds") or 0) for each in found)


def content(file: epath.Path) -> bytes:
    """What a file holds; nothing where it is missing."""
    try:
        return patiently(file.read_bytes, os.fspath(file))
    except MISSING:
        return b""


def chosen(run: Watched, pattern: str) -> Watched:
    """The run with those curves whose names, such as "distorted/loss", match the pattern of a shell, such as "*/loss".

    Fits without such a curve are left out. Raises InputError where no curve matches.
    """
    found = {
        fit: {metric: curve for metric, curve in each.curves.items() if fnmatchcase(curve_name(fit, metric), pattern)}
        for fit, each in run.fits.items()
    }
    if pattern != "*" and not any(found.values()):
        known = [curve_name(fit, metric) for fit, each in run.fits.items() for metric in each.curves]
        expected = f"expected a pattern of one of {', '.join(known)}" if known else "and the run has reported none yet"
        raise InputError(f"--only {pattern} matches no curve of {run.workdir}, {expected}{nearest(pattern, known)}")
    kept = {fit: run.fits[fit]._replace(curves=curves) for fit, curves in found.items() if curves}
    return run._replace(fits=kept)


def curve_name(fit: str, metric: str) -> str:
    """The metric with the child run before it, if there is one."""
    return f"{fit}/{metric}" if fit else metric
