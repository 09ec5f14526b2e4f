import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax import optim
from dl_jax.core.errors import InputError
from dl_jax.core.fit import Watch, fit
from dl_jax.core.leaves import is_kernel
from dl_jax.core.step import State, init_state, make_step, per_seed

KEY = jax.random.key(0)
everything = lambda path, leaf: True

# warmup_cosine


def test_warmup_cosine_by_hand():
    rate = optim.warmup_cosine(peak=1.0, steps=12, warmup=0.25, final=0.2)
    up = [0.25, 0.5, 0.75, 1.0]  # steps 0 to 3 = 0.25 * 12
    down = [0.2 + 0.8 * (1 + np.cos(np.pi * t / 9)) / 2 for t in range(1, 10)]
    np.testing.assert_allclose([rate(s) for s in range(13)], up + down, rtol=1e-5)
    np.testing.assert_allclose([rate(13), rate(1000)], 0.2, rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.999), final=st.floats(0, 1e-2))
def test_warmup_cosine_rises_once_then_falls(steps, warmup, final):
    rate = np.asarray(optim.warmup_cosine(1e-2, steps, warmup, final)(jnp.arange(501)))  # one shape: compiled once
    assert rate[steps:] == pytest.approx(final, abs=1e-8)
    rate = rate[: steps + 1]
    top = int(rate.argmax())
    assert (rate[:steps] > 0).all()
    assert rate[top] == pytest.approx(1e-2)
    assert top == pytest.approx(warmup * steps, abs=1) or final == pytest.approx(1e-2)
    assert (np.diff(rate[: top + 1]) > 0).all()
    assert (np.diff(rate[top:]) <= 1e-8).all()


def test_warmup_cosine_scales_with_the_run():
    short, long = optim.warmup_cosine(1.0, 1000), optim.warmup_cosine(1.0, 100_000)
    np.testing.assert_allclose([short(s) for s in (200, 500, 900)], [long(100 * s) for s in (200, 500, 900)], rtol=1e-4)


# frozen

PARAMS = {
    "a": {"kernel": jnp.array([[1.0, -0.0, 1e-30]]), "bias": jnp.array([0.5])},
    "b": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([jnp.nan])},
}


@pytest.mark.parametrize("compiled", [jax.jit, lambda f: f])  # XLA drops x + 0.0, which changes -0.0 otherwise
def test_frozen_parameters_keep_every_bit_and_have_no_slots(compiled):
    in_a = lambda path, leaf: path[0].key == "a"
    tx = optim.frozen(optax.adamw(0.1, weight_decay=0.5), in_a)
    state, params = tx.init(PARAMS), PARAMS

    @compiled
    def step(params, state):
        gradients = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), {"a": params["a"]}) | {
            "b": jax.tree.map(jnp.ones_like, params["b"])
        }
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    for name in ("kernel", "bias"):
        assert np.asarray(params["a"][name]).tobytes() == np.asarray(PARAMS["a"][name]).tobytes()  # also -0.0
    assert params["b"]["kernel"] < 2 - 0.25
    slots = jax.tree.leaves(optax.tree.get(state, "mu")) + jax.tree.leaves(optax.tree.get(state, "nu"))
    assert len(slots) == 4  # two moments for b's two parameters, none for a's


def test_what_is_not_frozen_is_trained_as_without():
    alone = optax.adam(0.1)
    both = optim.frozen(alone, lambda path, leaf: path[-1].key == "bias")
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = both.update(gradients, both.init(PARAMS), PARAMS)
    expected, _ = alone.update(gradients, alone.init(PARAMS), PARAMS)
    for layer in "ab":
        np.testing.assert_array_equal(updates[layer]["kernel"], expected[layer]["kernel"])
        np.testing.assert_array_equal(updates[layer]["bias"], 0)


# proximal_elastic_net


def shrunk(z, t, l1, l2):
    """The new parameters, where the chain before moves them from 0.7 to `z`."""
    tx = optim.proximal_elastic_net(t, l1, l2, where=everything)
    params = jnp.full_like(z, 0.7)
    updates, _ = tx.update(z - params, tx.init(params), params)  # jitted it would be compiled for each penalty
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize(("t", "l1", "l2"), [(0.1, 1.0, 0.0), (0.5, 0.4, 3.0), (1.0, 0.0, 1.0), (0.3, 2.0, 0.5)])
def test_proximal_operator_is_the_argmin(t, l1, l2):
    z = np.linspace(-2, 2, 41)
    w = np.linspace(-2, 2, 40_001)[:, None]
    objective = (w - z) ** 2 / 2 + t * (l1 * np.abs(w) + l2 / 2 * w**2)
    np.testing.assert_allclose(shrunk(jnp.asarray(z, jnp.float32), t, l1, l2), w[objective.argmin(0), 0], atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    z=st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4),
    t=st.floats(1e-3, 1),
    l1=st.floats(0, 10),
    l2=st.floats(0, 10),
)
def test_proximal_operator_meets_its_optimality_condition(z, t, l1, l2):
    z = np.asarray(z)
    w = np.asarray(shrunk(jnp.asarray(z, jnp.float32), t, l1, l2), np.float64)
    slope = (w - z) / t + l2 * w  # minus the subgradient of l1 |w|: -l1 sign(w), or within [-l1, l1] where w is 0
    tolerance = 1e-5 / t + 1e-4
    np.testing.assert_allclose(slope[w != 0], -l1 * np.sign(w[w != 0]), atol=tolerance)
    assert (np.abs(slope[w == 0]) <= l1 + tolerance).all()
    clear = np.abs(z) < t * l1 - 1e-5
    assert (w[clear] == 0).all()  # exactly


def test_proximal_follows_the_schedule_and_spares_the_rest():
    params = {"kernel": jnp.array([1.0, -0.05]), "bias": jnp.array([0.05])}
    tx = optim.proximal_elastic_net(lambda step: jnp.where(step == 0, 0.1, 0.2), l1=1.0)
    state, zero = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for expected in ([0.9, 0.0], [0.7, 0.0]):
        updates, state = tx.update(zero, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)
        assert params["kernel"][1] == 0
    np.testing.assert_array_equal(params["bias"], jnp.array([0.05]))


@pytest.mark.parametrize("l1_ratio", [1.0, 0.6])
def test_proximal_gradient_descent_finds_the_elastic_net(l1_ratio):
    from sklearn.linear_model import ElasticNet

    rng, alpha = np.random.default_rng(0), 0.1
    x = rng.normal(size=(60, 12))
    y = x @ np.where(np.arange(12) < 4, [2.0, -1.0, 0.5, 0.0] * 3, 0) + 0.1 * rng.normal(size=60)
    known = ElasticNet(alpha=alpha, l1_ratio=l1_ratio, fit_intercept=False, tol=1e-8, max_iter=100_000).fit(x, y).coef_

    def loss(variables, batch, key):
        residual = batch["x"] @ variables["params"]["kernel"] - batch["y"]
        return jnp.mean(residual**2) / 2, ({}, {})

    rate = float(1 / np.linalg.eigvalsh(x.T @ x / 60).max())
    prox = optim.proximal_elastic_net(rate, alpha * l1_ratio, alpha * (1 - l1_ratio))
    tx = optax.chain(optax.sgd(rate), prox)
    state = init_state(KEY, {"params": {"kernel": jnp.ones(12)}}, tx)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    state = fit(make_step(loss, tx), state, lambda step: batch, steps=200)
    np.testing.assert_allclose(state.params["kernel"], known, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(state.params["kernel"]) == 0, known == 0)
    assert 0 < (known == 0).sum() < 12


# early_stopping


def run(rule, values, state=None, first=0):
    """The rule's states after each measurement, at steps 10, 20, ..."""
    state, states = state or rule.init(), []
    for i, value in enumerate(values, first + 1):
        state = rule.update(state, {"loss": np.asarray(value)}, 10 * i)
        states.append(state)
    return states


def test_early_stopping_by_hand():
    states = run(optim.early_stopping("loss", 2, mode="min"), [3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.1])
    assert [bool(s.stopped) for s in states] == [False] * 5 + [True, True]
    assert [int(s.waited) for s in states] == [0, 0, 1, 0, 1, 2, 2]
    assert [int(s.best_step) for s in states] == [10, 20, 20, 40, 40, 40, 40]  # for good: 0.1 comes too late
    assert float(states[-1].best) == 1.0


def test_min_delta_is_the_least_improvement_that_counts():
    states = run(optim.early_stopping("loss", 3, 0.5, mode="max"), [1.0, 1.4, 1.5, 1.6, 1.7])
    assert [int(s.best_step) for s in states] == [10, 10, 10, 40, 40]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_never_best(mode):
    states = run(optim.early_stopping("loss", 3, mode=mode), [np.nan, 5.0, np.inf, -np.inf, np.nan])
    assert [int(s.best_step) for s in states] == [-1, 20, 20, 20, 20]
    assert float(states[-1].best) == 5.0
    assert [bool(s.stopped) for s in states] == [False, False, False, False, True]
    assert bool(run(optim.early_stopping("loss", 2, mode=mode), [np.nan, np.nan])[-1].stopped)


def test_a_constant_float64_metric_does_not_improve():  # 0.1 in float64 is less than 0.1 in float32
    assert run(optim.early_stopping("loss", 2, mode="min"), [np.float64(0.1)] * 3)[-1].stopped


@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.0, np.nan]), min_size=3, max_size=3), max_size=12),
    patience=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
)
def test_lanes_stop_as_single_runs(values, patience, mode):
    together = run(optim.early_stopping("loss", patience, mode=mode, seeds=3), values)
    for seed in range(3):
        alone = run(optim.early_stopping("loss", patience, mode=mode), [v[seed] for v in values])
        for many, one in zip(together, alone, strict=True):
            assert all(m[seed] == o for m, o in zip(many, one, strict=True))


@pytest.mark.parametrize("seeds", [None, 2])
def test_resumed_equals_uninterrupted(seeds):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12,) if seeds is None else (12, seeds))
    rule = optim.early_stopping("loss", 4, 0.01, mode="min", seeds=seeds)
    whole = run(rule, values)
    shapes = [(x.shape, x.dtype) for x in rule.init()]
    for cut in range(12):
        before = run(rule, values[:cut])[-1] if cut else rule.init()
        file = io.BytesIO()
        np.savez(file, **before._asdict(), allow_pickle=False)
        file.seek(0)
        with np.load(file) as saved:
            restored = optim.Stopping(**{name: saved[name] for name in optim.Stopping._fields})
        after = run(rule, values[cut:], restored, cut)
        for states in zip(whole[cut:], after, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))
        assert all(isinstance(x, np.ndarray) for state in after for x in state)
        assert [[(x.shape, x.dtype) for x in state] for state in after] == [shapes] * len(after)


def test_update_changes_no_argument():
    rule = optim.early_stopping("loss", 1, mode="min", seeds=2)
    state = rule.init()
    copies = [x.copy() for x in state]
    rule.update(state, {"loss": np.array([1.0, 2.0])}, 10)
    assert all(np.array_equal(a, b) for a, b in zip(copies, state, strict=True))


def test_fit_stops_each_lane_when_its_rule_says_so():
    """Seed 0's measurement rises from step 20 on, seed 1's never does: seed 0 freezes at 30, seed 1 goes on to 60."""

    def count(state: State, batch):
        return state._replace(step=state.step + 1, params=state.params + 1), {"loss": state.params}

    def measure(variables):
        n = np.asarray(variables["params"])
        return {"loss": np.array([abs(n[0] - 20), -n[1]])}

    state = State(jnp.zeros(2, jnp.int32), jnp.zeros(2), {}, (), jax.random.split(KEY, 2))
    state = fit(
        per_seed(count),
        state,
        lambda step: {"x": np.zeros((2, 1), np.float32)},
        steps=60,
        watch=Watch(10, measure),
        stop=optim.early_stopping("loss", 1, mode="min", seeds=2),
    )
    np.testing.assert_array_equal(state.params, [30, 60])


# Bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: optim.warmup_cosine(1.0, 0), "steps is 0"),
        (lambda: optim.warmup_cosine(1.0, 10, warmup=1.0), "warmup is 1.0"),
        (lambda: optim.warmup_cosine(1.0, 10, warmup=-0.1), "warmup is -0.1"),
        (
            lambda: optim.frozen(optax.sgd(1.0), lambda path, leaf: False).init(PARAMS),
            "a/bias, a/kernel, b/bias, b/kernel",
        ),
        (lambda: optim.proximal_elastic_net(0.1, -1.0), "l1 weight is -1.0"),
        (lambda: optim.proximal_elastic_net(0.1, 1.0, float("nan")), "l2 weight is nan"),
        (lambda: optim.proximal_elastic_net(0.1, 1.0).init({"w": jnp.ones(2)}), "none of the 1 parameters (w)"),
        (lambda: optim.early_stopping("loss", 0, mode="min"), "patience is 0"),
        (lambda: optim.early_stopping("loss", 1, -1.0, mode="min"), "min_delta is -1.0"),
        (lambda: optim.early_stopping("loss", 1, mode="lowest"), "'lowest'"),
        (lambda: run(optim.early_stopping("los", 1, mode="min"), [1.0]), "did you mean loss?"),
        (lambda: run(optim.early_stopping("loss", 1, mode="min"), [[1.0, 2.0]]), "shape (2,), expected ()"),
        (lambda: run(optim.early_stopping("loss", 1, mode="min", seeds=3), [[1.0, 2.0]]), "expected (3,)"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_proximal_needs_the_parameters():
    tx = optim.proximal_elastic_net(0.1, 1.0, where=is_kernel)
    with pytest.raises(ValueError, match="no params"):
        tx.update({"kernel": jnp.ones(2)}, tx.init({"kernel": jnp.ones(2)}))


def test_max_norm_bounds_every_unit_and_leaves_the_others_alone():
    random = np.random.default_rng(0)
    for shape in ((5, 4), (3, 3, 2, 4)):
        params = {"kernel": jnp.asarray(random.normal(size=shape), jnp.float32), "bias": jnp.full(4, 9.0)}
        updates = {"kernel": jnp.asarray(random.normal(size=shape), jnp.float32), "bias": jnp.ones(4)}
        free = np.asarray(params["kernel"] + updates["kernel"], np.float64)
        norms = np.sqrt((free**2).sum(tuple(range(len(shape) - 1))))
        limit = float(np.median(norms))  # two units are beyond it, two are not
        tx = optim.max_norm(limit)
        moved, _ = jax.jit(tx.update)(updates, tx.init(params), params)
        new = np.asarray(optax.apply_updates(params, moved)["kernel"], np.float64)
        np.testing.assert_allclose(new, np.where(norms > limit, free * limit / norms, free), rtol=1e-5)
        np.testing.assert_array_equal(moved["bias"], updates["bias"])
        inside = np.flatnonzero(norms < limit)
        np.testing.assert_array_equal(moved["kernel"][..., inside], updates["kernel"][..., inside])


def test_max_norm_of_a_unit_without_weights_has_a_finite_gradient_free_update():
    params = {"kernel": jnp.zeros((3, 2))}
    tx = optim.max_norm(1.0)
    moved, _ = tx.update({"kernel": jnp.zeros((3, 2))}, tx.init(params), params)
    np.testing.assert_array_equal(moved["kernel"], np.zeros((3, 2)))


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_max_norm_needs_a_positive_limit(limit):
    with pytest.raises(InputError, match=r"max_norm: limit is .*expected a positive norm"):
        optim.max_norm(limit)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_max_norm_of_low_precision_adds_squares_in_float32(dtype):
    """300 · 30² is no float16."""
    params = {"kernel": jnp.full((300, 2), 30, dtype) * jnp.array([1, 0.01], dtype)}
    tx = optim.max_norm(100.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)["kernel"]
    assert new.dtype == dtype
    norms = np.linalg.norm(np.asarray(new, np.float64), axis=0)
    np.testing.assert_allclose(norms, [100, 30 * 0.01 * 300**0.5], rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_proximal_of_low_precision_is_its_equation_rounded_once(dtype):
    rng = np.random.default_rng(0)
    p, u = (jnp.asarray(rng.normal(0, scale, 200), dtype) for scale in (1, 1e-2))
    tx = optim.proximal_elastic_net(0.1, 0.7, 0.5, where=everything)
    found = tx.update(u, tx.init(p), p)[0]
    z = np.asarray(p, np.float64) + np.asarray(u, np.float64)
    new = np.sign(z) * np.maximum(abs(z) - 0.07, 0) / 1.05
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), new - np.asarray(p, np.float64), rtol=5e-3, atol=1e-7)
    zeros = np.asarray(optax.apply_updates(p, found)) == 0
    np.testing.assert_array_equal(zeros, new == 0)
    assert zeros.any()


def test_proximal_zeros_are_exact_where_updates_are_coarser_than_parameters():
    p = jnp.array([0.0123456789, 1.0], jnp.float32)
    tx = optim.proximal_elastic_net(0.1, 1.0, where=everything)
    updates, _ = tx.update(jnp.zeros(2, jnp.bfloat16), tx.init(p), p)
    np.testing.assert_array_equal(optax.apply_updates(p, updates) == 0, [True, False])


# averaged


def test_the_average_is_that_of_the_updated_weights_by_hand():
    tx = optax.chain(optax.sgd(0.5), optim.averaged(0.3))
    params, expected = {"w": jnp.array([1.0, -2.0])}, np.array([1.0, -2.0])
    state = tx.init(params)
    for step in range(6):
        updates, state = tx.update({"w": jnp.array([1.0, step])}, state, params)
        params = optax.apply_updates(params, updates)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.asarray(params["w"])
        np.testing.assert_allclose(optim.average(state)["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(params["w"], [1 - 3.0, -2 - 7.5])  # as by SGD alone


def test_each_seed_has_its_own_average():
    tx = optax.chain(optax.sgd(0.5), optim.averaged(0.3))
    params, grads = jnp.array([[1.0, -2.0], [3.0, 0.5]]), jnp.array([[1.0, 0.0], [0.2, -1.0]])

    def after_two(params, grads):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return optim.average(state)

    found = jax.vmap(after_two)(params, grads)
    alone = [after_two(*both) for both in zip(params, grads, strict=True)]
    np.testing.assert_allclose(found, alone, rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(InputError, match=rf"decay is {decay}, expected a number in \[0, 1\)"):
        optim.averaged(decay)
