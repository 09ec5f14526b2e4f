"""experiments/learning/semi_supervised.py: the two losses, the ramps, the teacher, the labels, and exact resume."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax import classify, data, optim
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import start
from dl_jax.harness import Run
from dl_jax.harness.run import Preempted, Settings
from dl_jax.models.vision.mlp import MLP

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 2, 28, 28, 1), np.uint8)  # [B, k, H, W, C]


@pytest.fixture(scope="module")
def semi(load_experiment):
    return load_experiment("learning/semi_supervised")


@pytest.fixture(scope="module")
def model():
    return MLP((5,))


@pytest.fixture(scope="module")
def variables(model):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False))
    draw = lambda leaf: 0.1 * RNG.normal(size=leaf.shape).astype(np.float32)
    return {"params": jax.tree.map(draw, shapes)["params"], "teacher": jax.tree.map(draw, shapes)["params"]}


def probabilities(params, images):
    x = images.reshape(len(images), -1) / 255
    x = np.maximum(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
    logits = x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_pseudo_labels_are_the_classes_that_the_network_predicts(semi, model, variables):
    """Equation 15 in float64: the mean of −log of the largest probability, whose label has no gradient."""
    apply = semi.functools.partial(semi.logits_of, model)
    loss = semi.pseudo_label_loss(apply, classify.unit)
    value = lambda params: loss({"params": params}, {"unlabelled": jnp.asarray(IMAGES)}, jax.random.key(0))[0]
    found, grads = jax.jit(jax.value_and_grad(value))(variables["params"])
    given = jax.tree.map(np.float64, variables["params"])
    images = IMAGES.reshape(12, 28, 28, 1)
    p = probabilities(given, images)
    np.testing.assert_allclose(found, -np.log(p.max(-1)).mean(), rtol=1e-5)
    expected = (p - np.eye(10)[p.argmax(-1)]).mean(0)  # of the bias of the logits
    np.testing.assert_allclose(grads["Dense_1"]["bias"], expected, atol=1e-6)


def test_the_distance_to_the_teacher(semi, model, variables):
    """Equation 1 in float64; the teacher has no gradient, and the augmentation is another for each of the two."""
    apply = semi.functools.partial(semi.logits_of, model)
    loss = semi.consistency_loss(apply, classify.unit)
    batch = {"unlabelled": jnp.asarray(IMAGES)}
    value = lambda variables: loss(variables, batch, jax.random.key(0))[0]
    found, grads = jax.jit(jax.value_and_grad(value))(variables)
    images = IMAGES.reshape(12, 28, 28, 1)
    student, teacher = (
        probabilities(jax.tree.map(np.float64, variables[name]), images) for name in ("params", "teacher")
    )
    np.testing.assert_allclose(found, ((student - teacher) ** 2).sum(-1).mean(), rtol=1e-4)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["teacher"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["params"]))

    same = {"params": variables["params"], "teacher": variables["params"]}
    seen = semi.consistency_loss(apply, lambda key, batch: {"image": jax.random.uniform(key, (12, 28, 28, 1))})
    assert seen(same, batch, jax.random.key(0))[0] > 1e-4
    assert value(same) == 0


def test_the_ramps(semi):
    ramp = semi.sigmoid_ramp(4.0, 10)
    t = np.arange(15)
    np.testing.assert_allclose(ramp(t), 4 * np.exp(-5 * (1 - np.minimum(t, 10) / 10) ** 2), rtol=1e-6)
    cfg = dataclasses.replace(semi.Config(), steps=20, begin=0.1, full=0.5, alpha=3.0, consistency=10.0)
    weights = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semi, "with_second", lambda first, second, weight, tx: weights.append(weight))
        semi.steps(cfg, MLP((5,)), optax.sgd(0.1))
    alpha, consistency = ([float(weight(i)) for i in range(12)] for weight in weights)
    np.testing.assert_allclose(alpha, [0, 0, *(3 / 8 * np.arange(8)), 3, 3], atol=1e-6)  # Lee's equation 16
    np.testing.assert_allclose(consistency, [float(semi.sigmoid_ramp(10.0, 10)(i)) for i in range(12)])


def test_the_weight_of_the_second_term_is_that_of_the_step(semi):
    first, second = ((lambda v, b, k, s=s: (s * v["params"].sum(), ({}, {}))) for s in (1.0, 10.0))
    step = semi.with_second(first, second, lambda step: step / 4, optax.sgd(1.0))
    state = semi.State(jnp.int32(2), jnp.zeros(3), {}, optax.sgd(1.0).init(jnp.zeros(3)), jax.random.key(0))
    state, metrics = step(state, {})
    np.testing.assert_allclose(state.params, -6.0)
    assert {"labelled", "unlabelled", "loss"} <= set(metrics)


def test_the_teacher_is_the_mean_of_the_weights_at_first_and_then_follows(semi):
    move = lambda state, batch: (state._replace(step=state.step + 1, params=state.params + 1.0), {})
    follow = jax.jit(semi.followed_by_teacher(move, 0.75))
    state = semi.State(jnp.int32(0), jnp.zeros(2), {"teacher": jnp.zeros(2)}, (), jax.random.key(0))
    teacher, expected = 0.0, []
    for t in range(1, 8):
        state, _ = follow(state, {})
        teacher = t / 2 if t <= 3 else 0.75 * teacher + 0.25 * t
        expected.append(teacher)
        np.testing.assert_allclose(state.extra["teacher"], teacher, rtol=1e-6)
    assert expected[3] != 2


def test_images_without_labels_stand_beside_those_with(semi):
    records = {"image": np.arange(40), "label": np.arange(40)}
    few = {"image": np.arange(4), "label": np.arange(4)}
    others = data.shuffled({"image": records["image"].reshape(40, 1, 1)}, 12, (0, 1))
    stream = semi.beside(data.shuffled(few, 4, (0, 1)), others, 3)
    whole = stream(5)
    assert whole["unlabelled"].shape == (2, 4, 3, 1, 1)
    np.testing.assert_array_equal(whole["unlabelled"].reshape(2, 12, 1, 1), others(5)["image"])
    part = stream(5, slice(1, 3))
    for name, column in part.items():
        np.testing.assert_array_equal(column, whole[name][:, 1:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": (5,)}, "labels is 5, expected a multiple of 10: as many images of each class"),
        ({"labels": (100, 205)}, "labels is 205, expected a multiple of 10"),
        ({"labels": (10_000,)}, "1000 labels of each class, expected at most"),
        ({"begin": 0.5}, "begin is 0.5 and full 0.5 of 2 steps, which are steps 1 and 1, expected the first below"),
        ({"steps": 1}, "begin is 0.1 and full 0.5 of 1 steps, which are steps 0 and 0, expected the first below"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(semi, change, message, monkeypatch):
    monkeypatch.setattr(semi, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        semi.main(dataclasses.replace(semi.PRESETS["smoke"], **change), Run())


def test_the_methods_share_weights_labels_and_order(semi, monkeypatch):
    began = {}

    def fit(step, states, stream, *, steps, run):
        began[len(began)] = (states.params, states.key, stream(0)["label"], stream(0)["image"])
        return states

    monkeypatch.setattr(semi, "fit", fit)
    monkeypatch.setattr(semi, "evaluator", lambda *_: lambda variables: {"error": np.zeros(2)})
    cfg = dataclasses.replace(semi.PRESETS["smoke"], methods=semi.METHODS)
    semi.main(cfg, Run(settings=Settings(seeds=(0, 1))))
    assert len(began) == 3
    for each in (began[1], began[2]):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), each, began[0])
    _, _, labels, images = began[0]
    assert (images[0] != images[1]).any()  # each seed draws its own
    assert labels.shape == (2, cfg.batch_size)


def raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_fit_resumes_network_and_teacher(semi, model, tmp_path):
    tx = optax.adam(optim.warmup_cosine(0.01, 6))
    cfg = dataclasses.replace(semi.PRESETS["smoke"], steps=6)
    step = semi.per_seed(semi.steps(cfg, model, tx)["mean_teacher"])
    keys = jax.random.split(jax.random.key(0), 2)[:, None]
    states = start(model, tx, *keys, jnp.zeros((1, 28, 28, 1)))
    states = states._replace(extra={"teacher": jax.tree.map(jnp.copy, states.params)})
    images = IMAGES.reshape(12, 28, 28, 1)
    labelled = data.shuffled({"image": images[:4], "label": np.arange(4)}, 4, (0,))
    stream = semi.beside(labelled, data.shuffled({"image": images}, 8, (0,)), 2)
    whole = fit(step, states, stream, steps=6)
    with (
        pytest.raises(Preempted),
        contextlib.closing(Run(epath.Path(tmp_path), Settings(preempted=lambda step: step == 3))) as run,
    ):
        fit(step, states, stream, steps=6, run=run)
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        resumed = fit(step, states, stream, steps=6, run=run)
    both = lambda state: (state.params, state.extra, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, both(whole), both(resumed))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (whole.params, whole.extra)), strict=True))
