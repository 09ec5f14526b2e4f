"""A run: what it remembers of its fit."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from etils import epath

from dl_jax.core.errors import InputError
from dl_jax.core.fit import Watch, fit
from dl_jax.core.recorder import Snapshot
from dl_jax.core.step import State, init_state, make_step
from dl_jax.harness.report.figures import confusion_figure
from dl_jax.harness.run import Preempted, Run, Settings


def quadratic(run: Run, steps: int = 9, seed: int = 0):
    """Fits one number, reports its loss at every step and twice the number at every third."""
    loss = lambda variables, batch, key: ((variables["params"]["w"] - 1) ** 2, ({}, {}))
    tx = optax.sgd(0.1)
    state = init_state(jax.random.key(seed), {"params": {"w": jnp.zeros([])}}, tx)
    measure = lambda variables: {"double": 2 * np.asarray(variables["params"]["w"])}
    return fit(make_step(loss, tx), state, lambda step: {}, steps=steps, run=run, every=1, watch=Watch(3, measure))


def test_the_largest_seed_is_its_own():
    (keys,) = Run(settings=Settings(seeds=(0, 2**32 - 1))).keys(1)
    assert len({tuple(data.tolist()) for data in jax.random.key_data(keys)}) == 2


@pytest.mark.parametrize("seeds", [(), (-1,), (2**32,), (0, 2**63), (3, 3), (1.5,), (True,), ("a",)])
def test_seeds_that_make_no_sense(seeds):
    with pytest.raises(InputError, match=r"^seeds? .*, expected "):
        Settings(seeds=seeds)


def test_curves_are_named_by_the_seeds_of_the_run(tmp_path, accumulated):
    with contextlib.closing(Run(epath.Path(tmp_path), Settings(seeds=(5, 6)))) as run:
        step = lambda state, batch: (state._replace(step=state.step + 1), {"error": jnp.float32([1, 3])})
        state = State(jnp.int32([0, 0]), {}, {}, (), jax.vmap(jax.random.key)(jnp.arange(2)))
        fit(step, state, lambda i: {}, steps=1, every=1, run=run)
    events = accumulated(tmp_path)
    assert {name for name in events.Tags()["scalars"] if name.startswith("error")} == {
        "error/seed5",
        "error/seed6",
        "error/mean",
    }
    assert [event.value for event in events.Scalars("error/seed6")] == [3.0]


def test_history_holds_every_report_of_a_name():
    run = Run()
    quadratic(run)
    steps, losses = run.history("loss")
    assert steps.tolist() == list(range(1, 10))
    np.testing.assert_allclose(losses, 0.64 ** np.arange(9), rtol=1e-5)
    steps, doubles = run.history("watch/double")
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
        for name in ("loss", "watch/double"):
            np.testing.assert_array_equal(run.history(name), whole.history(name))


def test_a_run_that_is_asked_to_end_while_it_saves_for_the_last_time_ends(tmp_path):
    asked = iter([False] * 9 + [True])  # after each of nine steps, and at the end
    with (
        contextlib.closing(Run(epath.Path(tmp_path), Settings(preempted=lambda step: next(asked)))) as run,
        pytest.raises(Preempted),
    ):
        quadratic(run)
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        assert quadratic(run).step == 9
        assert run.last_saved().startswith("the last good checkpoint is step 9")


@pytest.mark.parametrize("stopped", [True, False])
def test_a_fit_of_other_seeds_is_not_gone_on_with(tmp_path, stopped):
    settings = Settings(preempted=lambda step: stopped and step == 4)
    with contextlib.closing(Run(epath.Path(tmp_path), settings)) as run, contextlib.suppress(Preempted):
        quadratic(run)
    with (
        contextlib.closing(Run(epath.Path(tmp_path))) as run,
        pytest.raises(InputError, match="give the --seed and --seeds that it was begun with"),
    ):
        quadratic(run, seed=1)
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        assert quadratic(run).step == 9


def test_history_keeps_the_seeds_apart_and_calls_nan_what_was_not_finite(tmp_path):
    for _ in range(2):
        run = Run(epath.Path(tmp_path))
        snapshot = Snapshot({"w": np.zeros(2)}, {}, {})
        run.start(snapshot, 2, None)
        if run.last_saved() == "nothing was saved":
            run.report(1, {"error": np.array([0.5, np.inf])})
            run.save(2, snapshot, {})
        run.close()
        steps, errors = run.history("error")
        assert steps.tolist() == [1]
        np.testing.assert_array_equal(errors, [[0.5, np.nan]])


def test_a_wrong_name_is_one_clear_error():
    run = Run()
    quadratic(run)
    with pytest.raises(InputError, match=r"no history of 'los', expected one of .*loss.*; did you mean loss"):
        run.history("los")


def test_keys_are_each_seeds_own_split():
    one, other = Run(settings=Settings(seeds=(5, 9))).keys(2)
    for place, seed in enumerate((5, 9)):
        expected = jax.random.key_data(jax.random.split(jax.random.key(seed), 2))
        np.testing.assert_array_equal(jax.random.key_data(one[place]), expected[0])
        np.testing.assert_array_equal(jax.random.key_data(other[place]), expected[1])


def test_what_is_kept_is_a_file_of_its_kind(tmp_path):
    run = Run(epath.Path(tmp_path)) / "teacher"
    run.keep("vocabulary.json", {"words": ["a", "b"], "unknown": 0})
    run.keep("mean.npy", np.float32([0.1, 0.2]))
    run.keep("sample.txt", "hé")
    run.keep("net.bin", b"\x00")
    folder = tmp_path / "teacher"
    assert json.loads((folder / "vocabulary.json").read_text()) == {"words": ["a", "b"], "unknown": 0}
    np.testing.assert_array_equal(np.load(folder / "mean.npy"), np.float32([0.1, 0.2]))
    assert (folder / "sample.txt").read_text(encoding="utf-8") == "hé"
    assert (folder / "net.bin").read_bytes() == b"\x00"
    assert {path.name for path in folder.iterdir()} == {"vocabulary.json", "mean.npy", "sample.txt", "net.bin"}
    for content in (object(), {"loss": float("nan")}):
        with pytest.raises(InputError, match=r"cannot keep it\.json, a (object|dict)"):
            run.keep("it.json", content)
    with pytest.raises(InputError, match=r"cannot keep metrics\.jsonl, which is a file of the run itself"):
        run.keep("metrics.jsonl", "mine")


def test_images_and_figures_are_files_and_on_the_board(tmp_path, accumulated):
    run = Run(epath.Path(tmp_path))
    run.images(3, lambda: {"seen": np.zeros((2, 4, 4, 1), np.uint8)})
    run.figure("confusion", 3, lambda: confusion_figure(np.eye(2), "ab"))
    run.close()
    assert set(accumulated(tmp_path).Tags()["images"]) == {"seen", "confusion"}
    with PIL.Image.open(tmp_path / "seen.png") as seen, PIL.Image.open(tmp_path / "confusion.png") as confusion:
        assert seen.size == (4, 9)  # a line between the two
        assert confusion.size[0] > 100


def test_a_run_without_a_folder_draws_and_keeps_nothing():
    run = Run()
    run.images(1, lambda: pytest.fail("drawn"))
    run.figure("f", 1, lambda: pytest.fail("drawn"))
    run.keep("x", object())
