"""Search for hyper-parameters: random points, successive halving, and choices of structure by Optuna.

Random points and halving are functions of numbers: what trains many networks, one for each point, as the seed axis of
one state asks `best` which of them go on (`experiments/learning/tuning.py`). Choices that change the shapes of arrays,
and so the program, are made one trial at a time by Optuna, which needs `pip install -e '.[tune]'`.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from dl_jax.core.errors import InputError, not_installed, one_line

if TYPE_CHECKING:
    import optuna


class Range(NamedTuple):
    """Numbers from `low` to `high`; with `log`, their logarithms are equally likely."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Range]  # of each hyper-parameter


def require_points(space: Space) -> None:
    """Raises InputError for a space without a point: one without a range, or with a range that holds no number."""
    if not space:
        raise InputError("the search space has no range, expected at least one; give low and high of what to search")
    for name, (low, high, log) in space.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise InputError(f"{name} is searched from {low:g} to {high:g}, which holds no number; give low <= high")
        if log and low <= 0:
            raise InputError(f"{name} is searched from {low:g} on a logarithmic scale, expected more than 0; raise low")


def drawn(space: Space, points: int, seed: int) -> dict[str, np.ndarray]:
    """Random points of the space: float32 [points] for each of its names. Raises InputError as `require_points`."""
    require_points(space)
    rng = np.random.default_rng(seed)

    def one(low: float, high: float, log: bool) -> np.ndarray:
        found = np.exp(rng.uniform(math.log(low), math.log(high), points)) if log else rng.uniform(low, high, points)
        return found.astype(np.float32).clip(np.float32(low), np.float32(high))  # rounding may leave the range

    return {name: one(*each) for name, each in space.items()}


class Rung(NamedTuple):
    """What successive halving does between two decisions."""

    networks: int  # that are trained
    steps: int  # at which they are compared, counted from step 0


def rungs(networks: int, eta: int, first: int, last: int) -> tuple[Rung, ...]:
    """The rungs at which one of `eta` networks goes on, and is trained for `eta` times as many steps.

    They begin with all networks at step `first` and end with ⌊networks / eta^k⌋ at step `last` (Jamieson & Talwalkar
    2016, arXiv:1502.07943; with these numbers Li et al. 2018, arXiv:1603.06560, Table 1, and Li et al. 2020,
    arXiv:1810.05934, Figure 1). Raises InputError where a rung would have no network, and for numbers that make no
    schedule.
    """
    if eta < 2 or not 1 <= first <= last:
        raise InputError(
            f"one of {eta} networks goes on, from step {first} to step {last}, expected one of 2 or more, and a first "
            "step of 1 or more that is not beyond the last; change them"
        )
    steps = [first]
    while steps[-1] * eta < last:
        steps.append(steps[-1] * eta)
    schedule = tuple(Rung(networks // eta**i, at) for i, at in enumerate(steps + [last] * (steps[-1] < last)))
    if schedule[-1].networks < 1:
        raise InputError(
            f"of {networks} networks one of {eta} goes on at each of {len(schedule) - 1} rungs, which leaves none, "
            f"expected {eta ** (len(schedule) - 1)} networks or more; give more, or a later first rung"
        )
    return schedule


def steps_taken(schedule: tuple[Rung, ...]) -> int:
    """Train steps of all networks together. A network goes on where the rung before has left it."""
    before = (0, *(rung.steps for rung in schedule))
    return sum(rung.networks * (rung.steps - begin) for rung, begin in zip(schedule, before, strict=False))


def best(scores: np.ndarray, networks: int) -> np.ndarray:  # [..., n] -> int [..., networks]
    """Which networks have the lowest scores, the lowest first; of equal ones the earlier. NaN counts as the highest."""
    return np.argsort(np.where(np.isnan(scores), np.inf, scores), axis=-1, kind="stable")[..., :networks]


class Trial(NamedTuple):
    """A completed trial of a study."""

    params: dict[str, Any]
    value: float


def study(file: Path | None, name: str, facts: Mapping[str, Any]) -> "optuna.Study":
    """An Optuna study that minimises, kept in the journal `file`, or in memory where it is None.

    If the file exists, the study goes on. `facts` say in types of JSON what the trials depend on. What a process that
    was killed has left is repaired: a line without an end, and a lock; who calls this has to be the only one that uses
    the folder, as a run is.

    Raises InputError where Optuna is not installed, for a file that is damaged or holds another study, and for several
    processes, of which each would ask for trials of its own.
    """
    try:
        import optuna
        from optuna.storages import InMemoryStorage, JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise not_installed("a study", error, "tune") from error
    if jax.process_count() > 1:
        raise InputError(f"a study in {jax.process_count()} processes, expected one; start it on one host")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    facts = json.loads(json.dumps(facts))
    if file is None:
        found = optuna.create_study(storage=InMemoryStorage(), study_name=name)
        found.set_user_attr("facts", facts)
        return found
    lines = repaired(file)
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        names = optuna.get_all_study_names(storage)
        expected = [name] if lines else []
        found = (
            optuna.create_study(storage=storage, study_name=name, load_if_exists=True) if names == expected else None
        )
        known = found.user_attrs.get("facts") if found else None
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:  # all from reading the lines
        raise InputError(
            f"{file} cannot be read as Optuna's journal ({one_line(error) or type(error).__name__}); move it away to "
            "begin the search anew"
        ) from error
    if found is None:
        held = f"the study {', '.join(names)}" if names else "no study"
        raise InputError(f"{file} holds {held}, expected {name}; move it away to begin the search anew")
    if known is None and not found.trials:
        found.set_user_attr("facts", facts)
    elif not isinstance(known, dict):
        raise InputError(f"{file} holds trials and not what they depend on; move it away to begin the search anew")
    elif known != facts:
        held, expected = differences(known, facts)
        raise InputError(f"{file} holds a study of {held}, expected {expected}; move it away to begin the search anew")
    return found


def differences(known: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, str]:
    """What of `known` is not in `facts`, and of `facts` not in `known`, as texts."""
    same = {name for name in known.keys() & facts.keys() if known[name] == facts[name]}
    other = [name for name in {**known, **facts} if name not in same]

    def text(of: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {of[name]}" if name in of else f"no {name}" for name in other)

    return text(known), text(facts)


def repaired(file: Path) -> int:
    """The lines of a journal, 0 where there is none, after what a killed process has left is removed.

    Raises InputError for any other damage, and for what cannot be read.
    """
    try:
        content = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise InputError(f"{file} cannot be read, expected a journal of Optuna ({one_line(error)}); move it") from error
    whole = content[: content.rfind(b"\n") + 1]
    lines, rest = whole.splitlines(), content[len(whole) :]
    for number, line in enumerate(lines, 1):
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(line), dict):
                continue
        raise InputError(
            f"line {number} of {file} is damaged, expected an object of JSON, as Optuna writes them; move the file "
            "away to begin the search anew"
        )
    if rest and not rest.startswith(b"{"):  # no line that a process did not live to end
        raise InputError(f"the end of {file} is no line of Optuna's journal; move it away to begin the search anew")
    Path(f"{file}.lock").unlink(missing_ok=True)
    if rest:
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    return len(lines)


def minimise(
    study: "optuna.Study", objective: Callable[["optuna.Trial", int], float], trials: int, seed: int
) -> list[Trial]:
    """Completes the study to `trials` trials, and returns them all in their order.

    `objective(trial, i)` asks `trial` for the choices of trial i and returns its score; what is not finite counts as
    infinite. Each trial has a TPE sampler of its own (Bergstra et al. 2011), seeded from (seed, i), because
    the state of a sampler is not in the journal. The choices of a trial are therefore a function of the seed and of
    the trials before it: a study that was killed goes on as it would have, and its last trial begins anew. The first
    ten trials are random, as is Optuna's default.
    """
    import optuna

    for left in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(left.number, state=optuna.trial.TrialState.FAIL)
    done = lambda: study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    for i in range(len(done()), trials):
        of_trial = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=of_trial)
        trial = study.ask()
        value = float(objective(trial, i))
        study.tell(trial, value if math.isfinite(value) else math.inf)
    return [Trial(each.params, each.values[0]) for each in done()]
