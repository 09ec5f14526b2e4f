"""Private digits: what is refused, what the networks share, and that a run goes on to the same bits."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from dl_jax.core.errors import InputError
from dl_jax.core.recorder import Watch
from dl_jax.harness.run import Preempted, Run, Settings


@pytest.fixture(scope="module")
def private(load_experiment):
    return load_experiment("learning/private")


@pytest.fixture
def cfg(private):
    return private.PRESETS["smoke"]


def task(private, cfg, run, noise=1.0):
    """Of random images, without an accountant."""
    rng = np.random.default_rng(0)
    records = {"image": rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8), "label": rng.integers(0, 10, 40)}
    stream, member = private.data.poisson(records, 8, run.settings.seeds), np.ones((len(run.settings.seeds), 40), bool)
    releases = private.privacy.Releases(8 / 40, 6, (cfg.axes_noise,))
    return private.Task(1, records, member, stream, 8, 0.5, releases, noise)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": 33}, "members is 33 and the training split has 64 images, expected twice as many"),
        (
            {"few_batch": 33},
            "--few-batch is 33 of 32 images, a sampling rate of 1.03, expected at most 1; lower it, or",
        ),
        (
            {"networks": ("whole",), "batch_size": 65},
            "--batch-size is 65 of 64 images, a sampling rate of 1.02, expected at most 1; lower it",
        ),
        ({"epsilon": 0.1}, "epsilon is 0.1, expected at least 1.99, which noise of 1000 times the clip norm gives"),
        (
            {"members": 1, "few_batch": 1},
            "members is 1 of 2, of whom the coins of seed 0 draw 2: an attack needs",
        ),
        ({"components": 785}, "785 principal axes of 784 features, expected 1 to 784"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(private, cfg, change, message, monkeypatch):
    monkeypatch.setattr(private, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        private.main(dataclasses.replace(cfg, **change), Run())


def test_fit_goes_on_to_the_same_bits(private, cfg, tmp_path):
    settings = Settings(seeds=(0, 1))
    watch = Watch(6, lambda variables: {})
    with contextlib.closing(Run(epath.Path(tmp_path) / "whole", settings)) as run:
        whole = private.learnt(cfg, run, task(private, cfg, run), watch)
    stopped = dataclasses.replace(settings, preempted=lambda step: step == 3)
    with (
        pytest.raises(Preempted),
        contextlib.closing(Run(epath.Path(tmp_path) / "part", stopped)) as run,
    ):
        private.learnt(cfg, run, task(private, cfg, run), watch)
    with contextlib.closing(Run(epath.Path(tmp_path) / "part", settings)) as run:
        resumed = private.learnt(cfg, run, task(private, cfg, run), watch)
    assert (np.asarray(whole.step) == 6).all()
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.extra), (resumed.params, resumed.extra))
    first, second = (np.asarray(leaf) for leaf in whole.params["Dense_0"]["kernel"])
    assert (first != second).any()


def test_without_noise_there_is_no_clipping_and_nothing_else_differs(private, cfg, monkeypatch):
    """The networks of the attack share weights, axes, samples and optimiser."""
    began, steps = [], []
    monkeypatch.setattr(
        private, "fit", lambda step, states, stream, **rest: began.append((states, stream(3))) or states
    )
    monkeypatch.setattr(private.privacy, "private_step", lambda loss, tx, **given: steps.append(given))
    monkeypatch.setattr(private, "per_seed", lambda step, one_by_one: step)
    run = Run(settings=Settings(seeds=(0, 1)))
    for noise in (1.5, None):
        private.learnt(cfg, run, task(private, cfg, run, noise), Watch(6, lambda variables: {}))
    assert steps == [
        {"clip": cfg.clip, "noise": 1.5, "batch_size": 8},
        {"clip": private.NO_CLIP, "noise": 0.0, "batch_size": 8},
    ]
    (first, batch), (second, other) = began
    given = lambda states, batch: (states.params, states.extra, jax.random.key_data(states.key), batch)
    jax.tree.map(np.testing.assert_array_equal, given(first, batch), given(second, other))
    axes = np.asarray(first.extra["axes"]["kernel"])
    assert axes.shape == (2, 64, cfg.components)
    assert (axes[0] != axes[1]).any()


def test_the_network_sees_components_of_images_of_one_norm(private, cfg):
    rng = np.random.default_rng(0)
    image, axes = rng.random((3, 2, 2, 1), np.float32), np.linalg.qr(rng.normal(size=(4, 4)))[0].astype(np.float32)
    model = private.MLP((cfg.hidden,))
    params = model.init(jax.random.key(0), np.zeros((1, 4), np.float32), train=False)["params"]
    found = private.logits_of(cfg, {"params": params, "axes": {"kernel": axes}}, image, train=False)
    flat = image.reshape(3, 4)
    x = cfg.scale * flat / np.linalg.norm(flat, axis=1, keepdims=True) @ axes
    np.testing.assert_allclose(found, model.apply({"params": params}, x, train=False), rtol=1e-4, atol=1e-5)
    brighter = private.logits_of(cfg, {"params": params, "axes": {"kernel": axes}}, image / 3, train=False)
    np.testing.assert_allclose(brighter, found, rtol=1e-4, atol=1e-5)


def test_attacks_are_of_members_and_as_many_others(private, cfg, monkeypatch):
    """Of losses that tell members apart for sure, and of those that say the opposite."""
    member = private.coins(2 * cfg.members, cfg.members, (0, 1))
    cfg = dataclasses.replace(cfg, networks=("few", "plain"), delta=1e-5)

    def learnt(cfg, run, task, watch):
        run.report(2, {"watch/accuracy": np.zeros(2)})
        return private.State(0, {"of": task.noise}, {}, (), None)

    monkeypatch.setattr(private, "learnt", learnt)
    monkeypatch.setattr(private, "evaluator", lambda *_: lambda variables: {"error": np.full(2, 0.25)})

    def collector(predict, batch_size):
        def losses(variables, records):
            assert len(records["label"]) == 2 * cfg.members
            return 1.0 - member if variables["params"]["of"] is None else 1.0 * member

        return losses

    monkeypatch.setattr(private, "collector", collector)
    found = private.main(cfg, Run(settings=Settings(seeds=(0, 1))))
    np.testing.assert_allclose(found["auc/plain"], 1)
    np.testing.assert_allclose(found["advantage/plain"], 1)
    np.testing.assert_allclose(found["auc/few"], 0)
    np.testing.assert_allclose(found["advantage/few"], 0)
    np.testing.assert_allclose(found["accuracy/few"], 75)
    assert (found["epsilon/few"] <= cfg.epsilon).all()
    assert "epsilon/plain" not in found


def test_a_coin_decides_for_each_image_and_another_one_in_each_seed(private):
    drawn = private.coins(4000, 1000, (0, 1))
    np.testing.assert_allclose(drawn.mean(1), 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 4000))
    assert abs(np.corrcoef(drawn)[0, 1]) < 5 / np.sqrt(4000)
    assert private.coins(30, 30, (0, 1)).all()


def test_samples_are_of_members_alone_at_the_rate_of_all(private, cfg):
    """Each member is in a sample with the probability that the accountant is told, and nobody else is."""
    cfg = dataclasses.replace(cfg, epsilon=100.0)
    records = {"x": np.arange(40), "label": np.zeros(40, int)}
    task = private.task_of(cfg, Run(settings=Settings(seeds=(3, 4))), 1, records, 20, 5, 6, 0.1)
    assert task.releases.rate == 0.25
    seen = np.zeros((2, 40))
    for step in range(2000):
        batch = task.stream(step)
        for seed in range(2):
            np.add.at(seen[seed], batch["x"][seed][batch["mask"][seed] > 0], 1)
    np.testing.assert_array_equal(seen > 0, task.member)
    np.testing.assert_allclose(seen[task.member] / 2000, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 2000))
    assert 0 < task.member.sum() < 80


def test_axes_come_from_members_alone_and_networks_that_are_published_together_share_no_noise(
    private, cfg, monkeypatch
):
    began = []
    monkeypatch.setattr(private, "fit", lambda step, states, stream, **rest: began.append(states) or states)
    run = Run(settings=Settings(seeds=(0, 1)))
    of = lambda **change: private.learnt(cfg, run, task(private, cfg, run)._replace(**change), Watch(6, lambda _: {}))
    given = task(private, cfg, run)
    half = np.arange(40) < np.array([[20], [40]])
    others = {**given.records, "image": np.where(half[0][:, None, None, None], given.records["image"], 7)}
    of(member=half), of(member=half, records=others), of(number=0)
    axes = [np.asarray(states.extra["axes"]["kernel"]) for states in began]
    np.testing.assert_array_equal(axes[0][0], axes[1][0])
    assert (axes[0][1] != axes[1][1]).any()
    of()
    assert (began[-1].extra["axes"]["kernel"] != axes[2]).any()
    assert (jax.random.key_data(began[-1].key) != jax.random.key_data(began[2].key)).any()
