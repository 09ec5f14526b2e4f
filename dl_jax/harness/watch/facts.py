"""What is recorded of a run beside its curves, and what differs between two runs."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dl_jax.core.errors import one_line
from dl_jax.harness.identity import differing
from dl_jax.harness.report.terminal import duration
from dl_jax.harness.results.record import measured_cell, measured_values
from dl_jax.harness.watch.draw import last_values
from dl_jax.harness.watch.read import Watched, curve_name

Row = tuple[str, ...]


class Topic(NamedTuple):
    """A part of the record of two runs, and how it differs."""

    name: str
    rows: Sequence[Row]  # of each difference: key, value in the first run and in the second one
    unknown: Sequence[str]  # the folders of the runs that have no record of it


def facts(run: Watched) -> dict[str, Mapping[str, Any] | None]:
    """What can be compared of a run, by topic; None for what its folder does not say.

    Attempts may have run with other code, versions or devices: the values of all are joined. Those after the result are
    left out, as they measured nothing.
    """
    identity, result, attempts = run.identity, run.result or {}, _attempts(run)
    code = _merged({"commit": each.get("commit"), "clean": each.get("clean")} for each in attempts)
    script = f"{identity['experiment'].rpartition('/')[2]}.py"
    digest = {f"CRC-32 of {script}": f"{zlib.crc32(run.script):08x}"} if run.script else {}

    def recorded(key: str) -> Mapping[str, Any] | None:
        found = [each[key] for each in (*attempts, result) if key in each]
        return _merged(each if isinstance(each, dict) else {key: each} for each in found) if found else None

    return {
        "experiment": {key: identity[key] for key in ("experiment", "preset")},
        "config": identity["config"],
        "seeds": {"seeds": identity.get("seeds")},
        "code": {**code, **digest},
        "data": recorded("data"),
        "versions": recorded("versions"),
        "device": recorded("device"),
    }


def _attempts(run: Watched) -> Sequence[Mapping[str, Any]]:
    """The attempts behind the result; without one, all so far."""
    return (run.result or {}).get("attempts", run.attempts)


def _merged(found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The values of each key, as text; several that differ are joined in their order."""
    merged: dict[str, dict[str, None]] = {}
    for each in found:
        for key, value in each.items():
            merged.setdefault(key, {})[str(value)] = None
    return {key: ", then ".join(values) for key, values in merged.items()}


def compared(one: Watched, other: Watched) -> list[Topic]:
    """Every difference of two runs, by topic."""
    topics, there = [], facts(other)
    for name, a in facts(one).items():
        b = there[name]
        unknown = [run.workdir for run, found in ((one, a), (other, b)) if found is None]
        pairs = [] if a is None or b is None else differing(a, b)
        topics.append(Topic(name, [(key, one_line(x), one_line(y)) for key, x, y in pairs], unknown))
    return topics


def sentences(topics: Sequence[Topic]) -> list[str]:
    """What does not differ, and what is not known."""
    same, lost = [topic.name for topic in topics if not topic.rows and not topic.unknown], {}
    for topic in topics:
        for workdir in topic.unknown:
            lost.setdefault(workdir, []).append(topic.name)
    lines = [f"No difference in {', '.join(same)}."] if same else []
    return lines + [f"Nothing is recorded of {', '.join(names)} in {workdir}." for workdir, names in lost.items()]


def measured(one: Watched, other: Watched) -> tuple[Row, list[Row]]:
    """Header and rows of what both runs measured: their results, or the last values of their curves.

    With equal seeds the difference is paired, seed by seed.
    """
    if one.result and other.result:
        a, b = measured_values(one.result), measured_values(other.result)
        paired = one.identity.get("seeds") == other.identity.get("seeds")
        rows = [
            (
                name,
                *_both(measured_cell, a.get(name), b.get(name)),
                _difference(a.get(name), b.get(name)) if paired else "",
            )
            for name in {**a, **b}
        ]
        return ("measured ± std (n)", one.workdir, other.workdir, "second − first"), rows
    c, d = (
        {curve_name(fit, name): curve for fit, each in run.fits.items() for name, curve in each.curves.items()}
        for run in (one, other)
    )
    shown = lambda curve: f"{last_values(curve)} at step {curve.steps[-1]}"
    rows = [(name, *_both(shown, c.get(name), d.get(name))) for name in {**c, **d}]
    return ("last value", one.workdir, other.workdir), rows


def _both(shown: Callable[[Any], str], one: Any, other: Any) -> Row:
    return tuple("none" if each is None else shown(each) for each in (one, other))


def _difference(one: Sequence[float] | None, other: Sequence[float] | None) -> str:
    if one is None or other is None or len(one) != len(other):
        return ""
    return "the same" if np.array_equal(one, other, equal_nan=True) else measured_cell(np.subtract(other, one))


def summary(run: Watched, now: float) -> list[tuple[str, str]]:
    """What a run is and how far it has come, as (name, text). `now` is the time in seconds since 1970."""
    known, result, all_attempts = facts(run), run.result, _attempts(run)
    joined = lambda topic: ", ".join(f"{key} {value}" for key, value in (known[topic] or {}).items())
    seconds = sum(each.get("seconds") or 0 for each in all_attempts)
    attempts = f"{len(all_attempts)} attempt{'' if len(all_attempts) == 1 else 's'}"
    last = max((fit.reported for fit in run.fits.values()), default=None)
    ago = "no report" if last is None else f"the last report came {duration(max(0.0, now - last))} ago"
    preset = result["preset"] if result else run.identity["preset"]
    lines = {
        "run": f"{run.workdir}: {run.identity['experiment']}, preset {preset}",
        "command": result.get("command", "") if result else "",
        "state": "finished" if result else f"no result yet, {ago}",
        "time": f"{duration(seconds)} in {attempts}" if seconds else attempts,
        "seeds": ", ".join(map(str, run.identity.get("seeds", ()))),
        **{topic: joined(topic) for topic in ("config", "code", "data", "versions")},
        "device": (known["device"] or {}).get("device", ""),
    }
    return [(name, text) for name, text in lines.items() if text]


def fit_rows(run: Watched) -> tuple[Row, list[Row]]:
    """Header and rows of a table of the fits."""
    header = ("fit", "step", "from the first report to the last", "steps/s", "waiting for data")
    rows = [
        (name or "train", str(fit.step), duration(fit.reported - fit.began), f"{fit.speed:.3g}", f"{fit.waited:.1%}")
        for name, fit in run.fits.items()
    ]
    return header, rows
