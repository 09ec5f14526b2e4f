"""experiments/learning/continual.py: the questions of the scenarios, what is stored, and what each method keeps."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax.core.errors import InputError
from dl_jax.core.step import State, make_step
from dl_jax.harness.run import Preempted, Run, Settings

RNG = np.random.default_rng(0)
LABELS = np.arange(100) % 10
RECORDS = {"image": RNG.integers(0, 256, (100, 2, 2, 1), np.uint8), "label": LABELS}


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("learning/continual")


def linear(variables, image, *, train):  # [B, 2, 2, 1] -> [B, 10]
    return image.reshape(len(image), -1) @ variables["params"]["kernel"]


def kernel():
    return {"kernel": jnp.asarray(RNG.normal(size=(4, 10)), jnp.float32)}


def batch_of(posed, rows=slice(None)):
    return {**{name: jnp.asarray(column[rows]) for name, column in posed.items()}, "weight": jnp.ones(100)[rows]}


def test_the_questions_of_the_scenarios(experiment):
    """A seven is of the fourth of five contexts; it has an output of two, of two for all contexts, or of all so far."""
    outputs = lambda scenario, context: np.flatnonzero(
        experiment.questions_of(scenario, RECORDS, context, 5)["allowed"][7]
    )
    target = lambda scenario: experiment.questions_of(scenario, RECORDS, 3, 5)["target"][7]
    assert [target(scenario) for scenario in ("task", "domain", "class")] == [7, 1, 7]
    assert list(outputs("task", 3)) == list(outputs("task", 4)) == [6, 7]
    assert list(outputs("domain", 3)) == [0, 1]
    assert list(outputs("class", 3)) == list(range(8))
    assert list(outputs("class", 4)) == list(range(10))
    assert list(experiment.questions_of("class", RECORDS, 0, 2)["context"][:10]) == [0] * 5 + [1] * 5


def test_a_stored_digit_was_stored_before(experiment):
    cfg = dataclasses.replace(experiment.Config(), budget=24)
    first, second = experiment.stored_rows(LABELS, cfg, (0, 1))
    before = None
    for context in range(1, 5):
        rows = experiment.digits_of(first, context, cfg)
        counts = np.bincount(LABELS[rows], minlength=10)
        each = min(24 // (2 * context), 10)
        assert list(counts) == [each] * 2 * context + [0] * (10 - 2 * context)
        old = [] if before is None else before
        assert {row for row in rows if LABELS[row] < 2 * context - 2} <= set(old)
        before = rows
    assert set(experiment.digits_of(first, 4, cfg)) != set(experiment.digits_of(second, 4, cfg))


def test_batches_have_what_a_method_may_see(experiment):
    records, old = experiment.questions_of("task", RECORDS, 2, 5), [np.array([0, 1, 12]), np.array([3, 10, 11])]
    stream = experiment.batches(records, 8, 2, (5, 6))
    assert set(np.unique(stream(3)["target"])) == {4, 5}
    joint = experiment.batches(records, 60, 2, (5, 6), joint=True)
    assert set(np.unique(joint(0)["target"])) == {0, 1, 2, 3, 4, 5}
    both = experiment.batches(records, 8, 2, (5, 6), old)
    batch = both(1)
    assert batch["target"].shape == (2, 16)
    assert (batch["context"][:, :8] == 2).all()
    assert [set(LABELS[rows]) for rows in old] == [set(row) for row in batch["target"][:, 8:]]
    assert batch["weight"][0, :8].mean() / 2 == pytest.approx(1 / 3)
    assert batch["weight"][0].mean() == pytest.approx(1)
    half = both(1, slice(4, 12))
    np.testing.assert_array_equal(half["target"], batch["target"][:, 4:12])


def test_outputs_that_are_not_allowed_have_no_probability(experiment):
    batch, params = batch_of(experiment.questions_of("task", RECORDS, 4, 5)), kernel()
    value, _ = experiment.label_loss(linear)({"params": params}, batch, None)
    logits = np.asarray(linear({"params": params}, RECORDS["image"] / 255, train=True), np.float64)
    pair = np.stack([logits[i, LABELS[i] // 2 * 2 : LABELS[i] // 2 * 2 + 2] for i in range(100)])
    nats = np.log(np.exp(pair).sum(1)) - pair[np.arange(100), LABELS % 2]
    np.testing.assert_allclose(value, nats.mean(), rtol=1e-5)


def test_two_penalties_are_one(experiment, monkeypatch):
    """F1 (θ − θ1)² + F2 (θ − θ2)² has the gradient of the anchor's penalty, at any θ."""
    at, fishers = [kernel()["kernel"] for _ in range(2)], [jnp.abs(kernel()["kernel"]) for _ in range(2)]
    given = iter(fishers)
    monkeypatch.setattr(experiment, "evaluator", lambda *args: lambda variables: {"0": next(given)[None]})
    states = State(jnp.zeros(1, jnp.int32), {"kernel": jnp.zeros((1, 4, 10))}, {}, (), jax.random.key(0)[None])
    states = states._replace(extra=experiment.no_anchor(states.params))
    records = experiment.questions_of("task", RECORDS, 4, 5)
    for context, place in enumerate(at):
        states = states._replace(params={"kernel": place[None]})
        states = experiment.keep_fisher(linear, 10, jax.random.key(0), states, records, context)
    loss = experiment.anchored(lambda variables, batch, key: (0.0, ({}, {})), 3.0)
    extra = jax.tree.map(lambda x: x[0], states.extra)
    now = kernel()["kernel"]
    found = jax.grad(lambda k: loss({"params": {"kernel": k}, **extra}, {}, None)[0])(now)
    expected = sum(6.0 * f * (now - place) for f, place in zip(fishers, at, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_fisher_information_of_a_linear_classifier(experiment):
    """Of softmax(x W) it is x_i² p_j (1 − p_j) for the weight from i to j."""
    params = {"kernel": kernel()["kernel"] / 3}
    image = np.repeat(RECORDS["image"][:1], 20, 0)
    allowed = np.broadcast_to(np.arange(10) < 4, (20, 10))
    batch = {"image": image, "allowed": allowed, "mask": np.float32(np.arange(20) < 15)}
    total, weight = experiment.fisher(linear, {"params": params}, batch, jax.random.key(1))["0"]
    x = image[0].ravel() / 255
    logits = np.where(np.arange(10) < 4, x @ np.asarray(params["kernel"]), -np.inf)
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(total / weight, np.outer(x**2, p * (1 - p)), rtol=1e-4, atol=1e-7)
    assert (np.asarray(total)[:, 4:] == 0).all()


def test_work_is_what_the_steps_lowered_the_loss_by(experiment):
    """With small steps, Σ work is the fall of the loss; and where a context ends it becomes the anchor's weight."""
    tx = experiment.with_work(optax.sgd(1e-3))
    batch, params = batch_of(experiment.questions_of("class", RECORDS, 4, 5)), kernel()
    loss = experiment.label_loss(linear)
    state = State(jnp.int32(0), params, {}, tx.init(params), jax.random.key(0))
    step = jax.jit(make_step(loss, tx))
    for _ in range(50):
        state, _ = step(state, batch)
    fall = loss({"params": params}, batch, None)[0] - loss(state.variables, batch, None)[0]
    np.testing.assert_allclose(state.opt_state.work["kernel"].sum(), fall, rtol=0.01)
    states = jax.tree.map(lambda x: x[None], state)
    begun = experiment.no_anchor({"kernel": params["kernel"][None]})
    kept = experiment.keep_work(0.1, states._replace(extra=begun), {}, 0)
    change = state.params["kernel"] - params["kernel"]
    expected = state.opt_state.work["kernel"] / (change**2 + 0.1)
    np.testing.assert_allclose(kept.extra["anchor"]["weight"]["kernel"][0], expected, rtol=1e-5)
    np.testing.assert_array_equal(kept.extra["anchor"]["at"]["kernel"], states.params["kernel"])
    assert (np.asarray(kept.opt_state.work["kernel"]) == 0).all()


@pytest.mark.parametrize(
    ("scenario", "groups"),
    [("task", [[0, 1], [2, 3]]), ("domain", [[0, 1]]), ("class", [[0, 1, 2, 3]])],
)
def test_the_teachers_answers_are_learned_for_the_outputs_of_before(experiment, scenario, groups):
    """After two contexts: 1/3 of the labels' loss, and 2/3 of T² cross-entropy to the teacher over each group."""
    params, teacher = kernel(), kernel()
    states = State(jnp.zeros(1, jnp.int32), {"kernel": teacher["kernel"][None]}, {}, (), jax.random.key(0)[None])
    records = experiment.questions_of(scenario, RECORDS, 1, 5)
    extra = jax.tree.map(lambda x: x[0], experiment.keep_teacher(5, states, records, 1).extra)
    batch = batch_of(experiment.questions_of(scenario, RECORDS, 2, 5), slice(4, 6))
    label = experiment.label_loss(linear)
    value, _ = experiment.distilled(linear, label, 2.0)({"params": params, **extra}, batch, None)
    mine, its = (
        np.asarray(linear({"params": each}, RECORDS["image"][4:6] / 255, train=True), np.float64) / 2
        for each in (params, teacher)
    )
    terms = []
    for group in groups:
        p = np.exp(its[:, group]) / np.exp(its[:, group]).sum(1, keepdims=True)
        log_q = mine[:, group] - np.log(np.exp(mine[:, group]).sum(1, keepdims=True))
        terms.append(4 * -(p * log_q).sum(1).mean())
    expected = label({"params": params}, batch, None)[0] / 3 + 2 / 3 * np.mean(terms)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_before_the_first_teacher_the_labels_alone_count(experiment):
    params, batch = kernel(), batch_of(experiment.questions_of("class", RECORDS, 0, 5), slice(0, 2))
    label = experiment.label_loss(linear)
    extra = jax.tree.map(lambda x: x[0], experiment.no_teacher(5, {"kernel": params["kernel"][None]}))
    value, _ = experiment.distilled(linear, label, 2.0)({"params": params, **extra}, batch, None)
    np.testing.assert_allclose(value, label({"params": params}, batch, None)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": 3}, "contexts is 3, expected 1, 2, 5 or 10"),
        ({"budget": 9}, "budget is 9, expected 10 or more"),
        (
            {"train_split": "train[:3]"},
            r"train\[:3\] has no image of class \d, of context [12] of 2; choose a larger split",
        ),
        (
            {"test_split": "test[:3]"},
            r"test\[:3\] has no image of class \d, of context [12] of 2; choose a larger split",
        ),
    ],
)
def test_bad_input_is_a_line_before_any_training(experiment, monkeypatch, change, message):
    monkeypatch.setattr(experiment, "fit", lambda *args, **options: pytest.fail("a network was trained"))
    with pytest.raises(InputError, match=message):
        experiment.main(dataclasses.replace(experiment.PRESETS["smoke"], **change), Run())


def test_a_run_that_is_stopped_in_its_second_context_goes_on_to_the_same_bits(experiment, tmp_path, monkeypatch):
    """With what the first leaves for it: an anchor, and what the optimiser has added up."""
    cfg = dataclasses.replace(experiment.PRESETS["smoke"], steps=4, methods=("si",))
    fit, calls, trained = experiment.fit, itertools.count(1), []

    def recorded(*args, **options):
        trained.append(fit(*args, **options))
        return trained[-1]

    monkeypatch.setattr(experiment, "fit", recorded)
    never, fourth = Settings(seeds=(0,)), Settings(seeds=(0,), preempted=lambda step: next(calls) == 4)
    for name, settings in (("whole", never), ("part", fourth), ("part", never)):
        stops = pytest.raises(Preempted) if settings is fourth else contextlib.nullcontext()
        with stops, contextlib.closing(Run(epath.Path(tmp_path) / name, settings)) as run:
            experiment.main(cfg, run)
    first, whole, stopped, again, resumed = (jax.device_get((s.params, s.extra, s.opt_state)) for s in trained)
    for found, expected in ((stopped, first), (again, first), (resumed, whole)):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
