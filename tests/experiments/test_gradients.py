"""experiments/text/gradients.py: its sequences, how the networks start, and the gradients that it draws."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax.core.step import init_variables
from dl_jax.harness.run import Run, Settings


@pytest.fixture(scope="module")
def gradients(load_experiment):
    return load_experiment("text/gradients")


@pytest.fixture(scope="module")
def tasks(gradients):
    return gradients.tasks(gradients.PRESETS["paper"])


@pytest.mark.parametrize("length", [2, 9, 100])
def test_one_number_is_marked_in_each_half(gradients, length):
    drawn = gradients.adding(np.random.default_rng(0), 1000, length)
    numbers, marks = drawn["x"][..., 0], drawn["x"][..., 1]
    np.testing.assert_array_equal(marks[:, : length // 2].sum(1), 1)
    np.testing.assert_array_equal(marks[:, length // 2 :].sum(1), 1)
    np.testing.assert_allclose((numbers * marks).sum(1), drawn["target"], rtol=1e-6)
    assert (marks.sum(0) > 0).all()
    assert drawn["x"].dtype == drawn["target"].dtype == np.float32


@pytest.mark.parametrize("length", [10, 25, 100])
def test_the_order_is_that_of_two_symbols(gradients, length):
    drawn = gradients.order(np.random.default_rng(0), 400, length)
    symbols = drawn["x"].argmax(-1)
    np.testing.assert_array_equal(drawn["x"].sum(-1), 1)
    for row, target in zip(symbols, drawn["target"], strict=True):
        first, second = np.flatnonzero(row < 2)
        assert length // 10 <= first < 2 * length / 10
        assert 4 * length // 10 <= second < length / 2
        assert target == 2 * row[first] + row[second]
    assert set(drawn["target"]) == {0, 1, 2, 3}


def test_a_batch_is_a_function_of_seed_and_step(gradients, tasks):
    stream = gradients.sequences(tasks["adding"], 6, 3)
    whole, part = stream(5), stream(5, slice(2, 4))
    np.testing.assert_array_equal(whole["x"][2:4], part["x"])
    np.testing.assert_array_equal(whole["target"][2:4], part["target"])
    assert not np.array_equal(whole["x"], stream(6)["x"])
    assert not np.array_equal(whole["x"], gradients.sequences(tasks["adding"], 6, 4)(5)["x"])


def started(gradients, task, net, hidden=5, seeds=2):
    model = gradients.SequenceTagger(task.outputs, hidden, cell=gradients.CELLS[net])
    variables = init_variables(model, jax.random.split(jax.random.key(0), seeds), jnp.zeros((1, 2, task.inputs)))
    return model, variables, gradients.STARTS[net](variables, task.length)


@pytest.mark.parametrize(("net", "keeps", "admits"), [("lstm", 1, 0), ("gru", 1, None)])
def test_gates_start_by_remembering(gradients, tasks, net, keeps, admits):
    _, before, after = started(gradients, tasks["adding"], net)
    bias = lambda tree: np.asarray(tree["params"]["Recurrent_0"]["forward_0"]["input"]["bias"])
    gates, old = (bias(tree).reshape(2, -1, 5) for tree in (after, before))
    log_u = np.broadcast_to(np.log(np.linspace(1, 99, 5)), (2, 5))
    for i in range(gates.shape[1]):
        expected = log_u if i == keeps else -log_u if i == admits else old[:, i]
        np.testing.assert_allclose(gates[:, i], expected, rtol=1e-6)


def test_a_vanilla_rnn_starts_with_spectral_radius_1(gradients, tasks):
    _, before, after = started(gradients, tasks["adding"], "rnn")
    kernel = lambda tree: np.asarray(tree["params"]["Recurrent_0"]["forward_0"]["kernel"])
    np.testing.assert_allclose(abs(np.linalg.eigvals(kernel(after))).max(-1), 1, rtol=1e-5)
    ratio = kernel(after) / kernel(before)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-4)


@pytest.mark.parametrize(("net", "problem"), [("lstm", "order"), ("rnn", "adding")])
def test_the_norms_are_those_of_the_loss_as_a_function_of_each_state(gradients, tasks, net, problem):
    task = tasks[problem]
    model, _, variables = started(gradients, task, net, seeds=1)
    variables = jax.tree.map(lambda leaf: leaf[0], variables)
    batch = task.draw(np.random.default_rng(0), 3, 10)
    norms = jax.jit(lambda: gradients.state_gradients(model, task, variables, batch))()
    assert norms.shape == (10,)

    def rest(carry, t):
        outputs = model.apply(variables, batch["x"][:, t:], carry=carry, train=False)[0][:, -1]
        return task.loss(outputs, batch["target"]).sum()

    for t in (1, 7, 9):
        carry = model.apply(variables, batch["x"][:, :t], train=False)[1]
        grads = jax.tree.leaves(jax.grad(rest)(carry, t))
        assert len(grads) == (2 if net == "lstm" else 1)
        expected = np.sqrt(sum((np.asarray(grad) ** 2).sum(-1) for grad in grads)).mean()
        np.testing.assert_allclose(norms[t], expected, rtol=1e-4)


def test_only_the_cells_that_are_not_free_clip_the_gradient(gradients, monkeypatch):
    """With momentum the steps of a long gradient and of one that is ten times as long are equal if both are clipped."""
    learned = {}
    monkeypatch.setattr(gradients, "init_variables", lambda *args: {"params": np.zeros(3, np.float32)})
    monkeypatch.setattr(gradients, "STARTS", dict.fromkeys(gradients.STARTS, lambda variables, length: variables))
    monkeypatch.setattr(gradients, "init_states", lambda *args: None)
    monkeypatch.setattr(gradients, "state_gradients", lambda *args: jnp.ones(20))
    monkeypatch.setattr(gradients, "evaluator", lambda *args: lambda variables: {"error": np.zeros(1)})
    monkeypatch.setattr(gradients, "make_step", lambda loss, tx: tx)
    monkeypatch.setattr(gradients, "per_seed", lambda tx: tx)

    def fit(tx, states, stream, run, **settings):
        learned[run.name] = tx
        return types.SimpleNamespace(variables={"params": np.zeros((1, 3))})

    monkeypatch.setattr(gradients, "fit", fit)
    cfg = dataclasses.replace(gradients.PRESETS["quick"], test_sequences=8, nets=("rnn", "gru"))
    gradients.main(cfg, Run(settings=Settings(seeds=(0,))))

    def ratio(tx: optax.GradientTransformation) -> float:
        norms = []
        for factor in (100.0, 1000.0):
            params, state = jnp.zeros(3), tx.init(jnp.zeros(3))
            for _ in range(2):  # the first step of the warm-up may have a learning rate of 0
                update, state = tx.update(jnp.full(3, factor), state, params)
            norms.append(float(jnp.linalg.norm(update)))
        return norms[1] / norms[0]

    assert learned.keys() == {f"short_order/{net}{end}" for net in ("rnn", "gru") for end in ("", "_free")}
    for name, tx in learned.items():
        assert ratio(tx) == pytest.approx(10 if name.endswith("free") else 1, rel=1e-3), name


def test_the_axis_of_the_norms_begins_where_they_have_vanished(gradients):
    t, norms = np.arange(4), np.array([[1e-30], [1e-20], [1e-5], [1.0]])
    assert gradients.figure({"a": (t, norms)}).axes[0].get_ylim()[0] == 1e-10
    assert 1e-6 < gradients.figure({"a": (t[2:], norms[2:])}).axes[0].get_ylim()[0] < 1e-5
