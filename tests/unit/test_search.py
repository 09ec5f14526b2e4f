"""dl_jax/search.py: points, the papers' tables of rungs, halving by brute force, and studies that are killed."""

import json
import math
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dl_jax import search
from dl_jax.core.errors import InputError
from dl_jax.search import Range, Rung

RNG = np.random.default_rng(0)


def test_points_are_uniform_or_log_uniform_and_depend_on_the_seed():
    space = {"a": Range(1e-4, 1.0, log=True), "b": Range(-2.0, 6.0), "c": Range(3.0, 3.0, log=True)}
    found = search.drawn(space, 20_000, 0)
    shares = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(np.log10(found["a"]), shares), -4 + 4 * shares, atol=0.08)
    np.testing.assert_allclose(np.quantile(found["b"], shares), -2 + 8 * shares, atol=0.15)
    assert set(found["c"]) == {np.float32(3)}
    assert all((np.float32(space[k].low) <= each).all() and (each <= np.float32(space[k].high)).all()
               for k, each in found.items())  # fmt: skip
    assert abs(np.corrcoef(np.log(found["a"]), found["b"])[0, 1]) < 0.03
    again, other = search.drawn(space, 20_000, 0), search.drawn(space, 20_000, 1)
    np.testing.assert_array_equal(found["a"], again["a"])
    assert (found["a"] != other["a"]).all()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "the search space has no range, expected at least one"),
        ({"rate": Range(0.1, 0.01)}, "rate is searched from 0.1 to 0.01, which holds no number; give low <= high"),
        ({"rate": Range(0.1, math.nan)}, "rate is searched from 0.1 to nan, which holds no number"),
        ({"rate": Range(0, math.inf)}, "rate is searched from 0 to inf, which holds no number"),
        ({"rate": Range(0, 1, log=True)}, "rate is searched from 0 on a logarithmic scale, expected more than 0"),
    ],
)
def test_a_space_without_a_point_is_refused(space, message):
    with pytest.raises(InputError, match=message):
        search.drawn(space, 3, 0)


@pytest.mark.parametrize(
    ("networks", "first", "table"),
    [  # Li et al. 2018, Table 1, with R = 81 and eta = 3: (n_i, r_i) of the brackets s = 4 to 0
        (81, 1, [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)]),
        (34, 3, [(34, 3), (11, 9), (3, 27), (1, 81)]),
        (15, 9, [(15, 9), (5, 27), (1, 81)]),
        (8, 27, [(8, 27), (2, 81)]),
        (5, 81, [(5, 81)]),
    ],
)
def test_the_rungs_of_hyperband(networks, first, table):
    assert [tuple(rung) for rung in search.rungs(networks, 3, first, 81)] == table


@pytest.mark.parametrize(
    ("first", "table"),
    [  # Li et al. 2020, Figure 1, with n = 9, r = 1, R = 9 and eta = 3: (n_i, r_i) of the brackets s = 0 to 2
        (1, [(9, 1), (3, 3), (1, 9)]),
        (3, [(9, 3), (3, 9)]),
        (9, [(9, 9)]),
    ],
)
def test_the_rungs_of_the_asynchronous_paper(first, table):
    schedule = search.rungs(9, 3, first, 9)
    assert [tuple(rung) for rung in schedule] == table
    # The budgets of its rungs count networks times resource; ours go on where they stopped.
    assert all(rung.networks * rung.steps == 9 * first for rung in schedule)


def test_a_last_rung_that_is_no_power_away():
    assert search.rungs(8, 2, 10, 50) == (Rung(8, 10), Rung(4, 20), Rung(2, 40), Rung(1, 50))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((8, 3, 1, 9), r"of 8 networks one of 3 goes on at each of 2 rungs, which leaves none, expected 9 networks"),
        ((0, 2, 5, 5), "of 0 networks one of 2 goes on at each of 0 rungs, which leaves none, expected 1 networks"),
        ((8, 1, 1, 9), "one of 1 networks goes on, from step 1 to step 9, expected one of 2 or more"),
        ((8, 2, 0, 9), "from step 0 to step 9, expected one of 2 or more, and a first step of 1 or more"),
        ((8, 2, 10, 9), "from step 10 to step 9, expected .* a first step of 1 or more that is not beyond the last"),
    ],
)
def test_a_schedule_that_leaves_no_network_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        search.rungs(*given)


def test_halving_by_brute_force():
    """Networks with curves of losses, trained and dropped one by one."""
    curves = RNG.normal(size=(3, 16, 41)).cumsum(2)  # [S, n, steps]
    curves[1, :4] = np.nan
    schedule = search.rungs(16, 2, 5, 40)
    numbers = np.tile(np.arange(16), (3, 1))
    for rung in schedule:
        assert numbers.shape[1] == rung.networks
        scores = np.take_along_axis(curves[:, :, rung.steps], numbers, 1)
        numbers = np.take_along_axis(numbers, search.best(scores, max(1, rung.networks // 2)), 1)
    for seed in range(3):
        alive, taken = list(range(16)), 0
        for at in range(1, 41):
            taken += len(alive)
            if at in (5, 10, 20, 40):
                score = [(math.isnan(one), one, i) for i, one in enumerate(curves[seed, :, at])]
                alive = sorted(alive, key=score.__getitem__)[: max(1, len(alive) // 2)]
        assert alive == [*numbers[seed]]
        assert taken == search.steps_taken(schedule) == 16 * 5 + 8 * 5 + 4 * 10 + 2 * 20


def test_of_equal_scores_the_earlier_and_nan_last():
    scores = np.array([[3.0, np.nan, 1.0, 1.0, np.inf], [np.nan] * 5])
    np.testing.assert_array_equal(search.best(scores, 4), [[2, 3, 0, 1], [0, 1, 2, 3]])


FACTS = {"space": {"x": [0, 1]}, "seeds": (0, 1)}


def objective(trial, i):
    """A function of one to three numbers, whose number is a choice too."""
    layers = trial.suggest_int("layers", 1, 3)
    return sum((trial.suggest_float(f"x{j}", 0, 1) - 0.3) ** 2 for j in range(layers)) + 0.1 * layers


def completed(file, trials, of=objective):
    return search.minimise(search.study(file, "structures", FACTS), of, trials, seed=3)


def test_a_study_that_is_killed_goes_on_as_it_would_have(tmp_path):
    """Also where TPE decides, which it does after ten trials."""
    whole = completed(tmp_path / "whole", 16)

    class Killed(Exception):
        pass

    for last in (0, 4, 12):

        def killed(trial, i, last=last):
            value = objective(trial, i)
            if i == last:
                raise Killed
            return value

        with pytest.raises(Killed):
            completed(tmp_path / "killed", 16, killed)
    assert completed(tmp_path / "killed", 16) == whole
    assert completed(tmp_path / "killed", 16) == whole  # nothing is left to do
    assert completed(None, 16) == whole
    assert len({trial.params["x0"] for trial in whole}) == 16
    assert completed(tmp_path / "whole", 17)[:16] == whole


def test_tpe_sees_the_trials_before(tmp_path):
    values = [trial.value for trial in completed(None, 40)]
    assert np.mean(values[20:]) < np.mean(values[:10])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/unit")
import test_search
def of(trial, i):
    value = test_search.objective(trial, i)
    if i == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return value
test_search.completed(Path(sys.argv[1]), 13, of)
"""


def test_a_killed_process_loses_one_trial(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with (tmp_path / "killed").open("ab") as file:
        file.write(b'{"op_code":6,"worker_id":')  # and a line that it did not end
    os.symlink(tmp_path / "killed", tmp_path / "killed.lock")
    assert completed(tmp_path / "killed", 13) == completed(tmp_path / "whole", 13)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    for line in (tmp_path / "killed").read_text().splitlines():
        json.loads(line)


def test_a_score_that_is_not_finite_is_a_bad_one():
    trials = completed(None, 3, lambda trial, i: [math.nan, 1.0, -math.inf][i] + 0 * objective(trial, i))
    assert [trial.value for trial in trials] == [math.inf, 1.0, math.inf]


def test_another_study_is_refused(tmp_path):
    completed(tmp_path / "file", 2)
    with pytest.raises(InputError, match="file holds the study structures, expected other; move it away"):
        search.study(tmp_path / "file", "other", FACTS)
    with pytest.raises(InputError, match=r"file holds a study of seeds \[0, 1\], no eta, expected seeds \[5\], eta 3;"):
        search.study(tmp_path / "file", "structures", {"eta": 3, **FACTS, "seeds": (5,)})


def test_nothing_is_not_the_same_as_none():
    assert search.differences({"a": 1, "b": 2}, {"a": 1, "c": None}) == ("b 2, no c", "no b, c None")


def test_what_is_no_journal_is_refused_and_kept(tmp_path):
    (tmp_path / "file").write_bytes(b"SQLite format 3\0")
    with pytest.raises(InputError, match=r"the end of .*file is no line of Optuna's journal; move it away"):
        search.study(tmp_path / "file", "structures", FACTS)
    assert (tmp_path / "file").read_bytes() == b"SQLite format 3\0"
    with pytest.raises(InputError, match="cannot be read, expected a journal of Optuna"):
        search.study(tmp_path, "structures", FACTS)


def test_trials_that_do_not_say_what_they_depend_on_are_refused(tmp_path):
    completed(tmp_path / "file", 2)
    lines = (tmp_path / "file").read_text().splitlines(keepends=True)
    (tmp_path / "file").write_text("".join(line for line in lines if '"facts"' not in line))
    with pytest.raises(InputError, match="file holds trials and not what they depend on; move it away"):
        search.study(tmp_path / "file", "structures", FACTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:2], b"xx" + lines[2], *lines[3:]], "line 3 of .*file is damaged, expected an object"),
        (lambda lines: [b"\xff\xfe\n", *lines], "line 1 of .*file is damaged"),
        (lambda lines: [b"3\n", *lines], "line 1 of .*file is damaged"),
        (lambda lines: [b"{}\n", *lines], "file cannot be read as Optuna's journal .*; move it away to begin"),
        (lambda lines: lines[1:], "file holds no study, expected structures; move it away"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    completed(tmp_path / "file", 2)
    lines = (tmp_path / "file").read_bytes().splitlines(keepends=True)
    (tmp_path / "file").write_bytes(b"".join(damage(lines)))
    with pytest.raises(InputError, match=message) as refused:
        completed(tmp_path / "file", 2)
    assert "\n" not in str(refused.value)


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"a study needs optuna, .* run: pip install -e '\.\[tune"):
        search.study(None, "structures", {})


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="a study in 2 processes, expected one"):
        search.study(None, "structures", {})
