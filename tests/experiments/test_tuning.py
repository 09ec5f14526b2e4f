"""experiments/learning/tuning.py: halving and the full search, kills, one look at the test split, and simulations."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from etils import epath

from dl_jax import search
from dl_jax.core.errors import InputError
from dl_jax.harness import Run
from dl_jax.harness.run import Preempted, Settings


@pytest.fixture(scope="module")
def tuning(load_experiment):
    return load_experiment("learning/tuning")


@pytest.fixture(scope="module")
def small(tuning):
    """Four networks of two seeds, of which two and one go on."""
    return dataclasses.replace(tuning.PRESETS["smoke"], networks=4, first=2, steps=8)


def test_halving_trains_the_networks_of_the_full_search(tuning, small):
    """Who goes on is best at that step, and who arrives has the parameters of the full search."""
    run = Run(settings=Settings(seeds=(0, 1)))
    task = tuning.task_of(small, run)
    drawn = [search.drawn(tuning.space(small), 4, seed) for seed in (0, 1)]
    points = {name: np.stack([each[name] for each in drawn]) for name in tuning.space(small)}
    begin = tuning.started(task, (4,), points)
    at = {steps: tuning.trained(task, (4,), begin, steps, Run(settings=run.settings)) for steps in (2, 4, 8)}
    scores = {steps: tuning.errors(task, (4,), states, task.validation) for steps, states in at.items()}
    found = tuning.halved(task, (4,), begin, search.rungs(4, 2, 2, 8), run)
    assert [each.numbers.shape for each in found] == [(2, 2), (2, 1), (2, 1)]
    for seed in (0, 1):
        alive = [0, 1, 2, 3]
        for each, steps in zip(found, (2, 4, 8), strict=True):
            ranks = scores[steps][seed]
            alive = sorted(alive, key=ranks.__getitem__)[: max(1, len(alive) // 2)]
            assert [*each.numbers[seed]] == alive
    last = tuning.rows(task, at[8], found[-1].numbers)
    for mine, other in zip(*(tuning.jax.tree.leaves(each.params) for each in (found[-1].states, last)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found[-1].states.opt_state.hyperparams["learning_rate"],
                                  np.take_along_axis(points["learning_rate"], found[-1].numbers, 1)[:, 0])  # fmt: skip


def test_networks_of_a_seed_differ_by_their_points_alone(tuning, small):
    run = Run(settings=Settings(seeds=(0, 1)))
    task = tuning.task_of(small, run)
    points = {name: np.full((2, 3), each.high, np.float32) for name, each in tuning.space(small).items()}
    points["learning_rate"][:, 2] = 1e-4
    states = tuning.trained(task, (4,), tuning.started(task, (4,), points), 3, run)
    kernel = np.asarray(states.params["Dense_0"]["kernel"])
    np.testing.assert_allclose(kernel[0], kernel[1], rtol=1e-5, atol=1e-7)
    assert np.abs(kernel[0] - kernel[2]).max() > 0.01
    assert np.abs(kernel[0] - kernel[3]).max() > 0.01


def test_the_test_split_is_seen_once_for_each_winner(tuning, small, monkeypatch):
    seen, errors = [], tuning.errors

    def counted(task, hidden, states, records):
        seen.append("test" if records is task.test else "validation")
        return errors(task, hidden, states, records)

    monkeypatch.setattr(tuning, "errors", counted)
    found = tuning.main(small, Run(settings=Settings(seeds=(0, 1))))
    assert seen.count("test") == 4
    chosen = seen.index("test")
    assert chosen >= len(seen) - 8  # after it only winners are measured
    assert (found["validation_error/halving"] >= found["validation_error/full"]).all()
    same = found["same_winner"] == 1
    np.testing.assert_allclose(found["test_error/halving"][same], found["test_error/full"][same])
    np.testing.assert_allclose(found["steps_share"], 100 * (4 * 2 + 2 * 2 + 1 * 4) / (4 * 8))


def test_a_run_that_is_killed_tries_the_same_structures(tuning, tmp_path):
    cfg = dataclasses.replace(tuning.PRESETS["smoke"], width=(4, 5), trials=2)
    seeds = (0,)

    def run_in(folder, preempted):
        with contextlib.closing(Run(epath.Path(folder), Settings(seeds=seeds, preempted=preempted))) as run:
            return tuning.main(cfg, run)

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = run_in(tmp_path / "whole", lambda step: False)
    asked = itertools.count()
    with pytest.raises(Preempted):  # two fits of two steps, of which each asks thrice, and two rungs of one step
        run_in(tmp_path / "killed", lambda step: next(asked) == 3 + 2 + 2 + 3)
    assert {"structure0", "structure1"} <= {path.name for path in (tmp_path / "killed").iterdir()}
    again = run_in(tmp_path / "killed", lambda step: False)
    for name, values in whole.items():
        np.testing.assert_array_equal(values, again[name], name)
    facts = {**dataclasses.asdict(cfg), "seeds": seeds}
    studies = [
        search.study(tmp_path / name / "structures.journal", "structures", facts) for name in ("whole", "killed")
    ]
    trials = [search.minimise(study, None, 2, 0) for study in studies]  # completed: no objective is asked
    assert trials[0] == trials[1]
    assert len(trials[0]) == 2
    assert [len(study.trials) for study in studies] == [2, 3]  # one failed, and was begun anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": (0.1, 0.01)}, "learning_rate is searched from 0.1 to 0.01, which holds no number"),
        ({"b1": (0.9, 0.5)}, "b1 is searched from 0.9 to 0.5, which holds no number"),
        ({"layers": (3, 1)}, "layers is searched from 3 to 1, which holds no number"),
        ({"width": (8, 4)}, "width is searched from 8 to 4, which holds no number"),
        ({"networks": 1}, "of 1 networks one of 2 goes on at each of 1 rungs, which leaves none"),
        ({"first": 3}, "from step 3 to step 2, expected"),
        ({"eta": 1}, "one of 1 networks goes on, .* expected one of 2 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(tuning, change, message, monkeypatch):
    monkeypatch.setattr(tuning, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        tuning.main(dataclasses.replace(tuning.PRESETS["smoke"], **change), Run())


def test_an_address_is_refused(tuning):
    with pytest.raises(InputError, match="--workdir is gs://bucket/a, expected a folder of this machine"):
        tuning.journal(Run(epath.Path("gs://bucket/a")))


def test_simulated_searches_against_closed_forms(tuning):
    """A grid's best point is the next number in each dimension, whose squared distance is (1 / 8)² / 3 on average;
    the distance to the nearest of n random numbers has E d² = ∫ 2 d P(all are further) dd."""
    found = tuning.simulated(4000, (0, 1))
    np.testing.assert_allclose(found["best_of_60/simulated"], 100 * (1 - 0.95**60), atol=1.2)
    for k in (1, 2, 3):
        np.testing.assert_allclose(found[f"regret/grid_{k}"], k / 192, rtol=0.05)
    best, d = np.linspace(0.0005, 0.9995, 500)[:, None], np.linspace(0, 1, 4001)
    within = np.minimum(best + d, 1) - np.maximum(best - d, 0)
    exact = np.trapezoid(2 * d * (1 - within) ** 64, d, axis=1).mean()
    np.testing.assert_allclose(found["regret/random_1"], exact, rtol=0.25)
    assert found["best_of_60/simulated"][0] != found["best_of_60/simulated"][1]
