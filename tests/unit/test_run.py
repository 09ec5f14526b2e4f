"""A run: what it remembers of its fit."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax.core.errors import InputError
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import ArgumentError, init_state, make_step
from dl_jax.harness.run import Preempted, Run, Settings


def quadratic(run: Run, steps: int = 9, seed: int = 0):
    """Fits one number, reports its loss at every step and twice the number at every third."""
    loss = lambda variables, batch, key: ((variables["params"]["w"] - 1) ** 2, ({}, {}))
    tx = optax.sgd(0.1)
    state = init_state(jax.random.key(seed), {"params": {"w": jnp.zeros([])}}, tx)
    measure = lambda variables: {"double": 2 * np.asarray(variables["params"]["w"])}
    return fit(make_step(loss, tx), state, lambda step: {}, steps=steps, run=run, every=1, watch=Watch(3, measure))


def test_history_holds_every_report_of_a_name():
    run = Run()
    quadratic(run)
    steps, losses = run.history("loss")
    assert steps.tolist() == list(range(1, 10))
    np.testing.assert_allclose(losses, 0.64 ** np.arange(9), rtol=1e-5)
    steps, doubles = run.history("double")
    assert steps.tolist() == [3, 6, 9]
    np.testing.assert_allclose(doubles, 2 * (1 - 0.8 ** np.array([3, 6, 9])), rtol=1e-5)


def test_history_is_that_of_an_undisturbed_run_after_a_resume_and_after_the_end(tmp_path):
    whole = Run()
    quadratic(whole)
    interrupted = Run(epath.Path(tmp_path), Settings(checkpoint_every=2, preempted=lambda step: step == 4))
    with pytest.raises(Preempted):
        quadratic(interrupted)
    interrupted.close()
    for _ in range(2):  # goes on from step 4, then finds the fit complete
        run = Run(epath.Path(tmp_path))
        quadratic(run)
        run.close()
        for name in ("loss", "double"):
            np.testing.assert_array_equal(run.history(name), whole.history(name))


@pytest.mark.parametrize("stopped", [True, False])
def test_a_fit_of_other_seeds_is_not_gone_on_with(tmp_path, stopped):
    settings = Settings(preempted=lambda step: stopped and step == 4)
    with contextlib.closing(Run(epath.Path(tmp_path), settings)) as run, contextlib.suppress(Preempted):
        quadratic(run)
    with (
        contextlib.closing(Run(epath.Path(tmp_path))) as run,
        pytest.raises(ArgumentError, match="give the --seed and --seeds it was begun with"),
    ):
        quadratic(run, seed=1)
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        assert quadratic(run).step == 9


def test_history_keeps_the_seeds_apart_and_calls_nan_what_was_not_finite(tmp_path):
    for _ in range(2):
        run = Run(epath.Path(tmp_path))
        tree = {"w": np.zeros(2)}
        run.start(tree, 2, None)
        if run.last_saved() == "nothing was saved":
            run.report(1, {"error": np.array([0.5, np.inf])})
            run.save(2, tree, {})
        run.close()
        steps, errors = run.history("error")
        assert steps.tolist() == [1]
        np.testing.assert_array_equal(errors, [[0.5, np.nan]])


def test_a_wrong_name_is_one_clear_error():
    run = Run()
    quadratic(run)
    with pytest.raises(InputError, match=r"no history of 'los', expected one of .*loss.*; did you mean loss"):
        run.history("los")
