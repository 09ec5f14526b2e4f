import functools

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from dl_jax import classify
from dl_jax.compress import prune
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step, per_seed
from dl_jax.harness.run import Run, Settings

KEY = jax.random.key(0)


def network(key):
    """Two layers, kernels [6, 5] and [5, 3]."""
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "a": {"kernel": jax.random.normal(k1, (6, 5)), "bias": jax.random.normal(k3, (5,))},
        "b": {"kernel": jax.random.normal(k2, (5, 3)), "bias": jnp.zeros(3)},
    }


def loss(variables, batch, key):
    p = variables["params"]
    h = jnp.tanh(batch["x"] @ p["a"]["kernel"] + p["a"]["bias"])
    error = ((h @ p["b"]["kernel"] + p["b"]["bias"] - batch["y"]) ** 2).mean()
    return error, ({}, {})


def batches(step, seed=0):
    rng = np.random.default_rng([seed, step])
    return {"x": rng.normal(size=(8, 6)).astype(np.float32), "y": rng.normal(size=(8, 3)).astype(np.float32)}


def kernels(params):
    return [np.asarray(params[layer]["kernel"]) for layer in ("a", "b")]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def zeros(params):
    return [int((kernel == 0).sum()) for kernel in kernels(params)]


# rounds, smallest and nonzeros


def test_rounds_take_the_same_fraction_of_the_survivors_each_time():
    params = {
        "a": {"kernel": jax.random.normal(KEY, (40, 50)), "bias": jnp.ones(50)},
        "b": {"kernel": jnp.ones((9, 9))},
    }
    sparsity, left = prune.rounds(params, (0.0625, 1.0)), []
    for progress in (0.25, 0.5, 0.75, 1.0):
        params = prune.smallest(params, sparsity(progress))
        left.append([int(n) for n in prune.nonzeros(params).values()])
    assert left == [[1000, 81], [500, 81], [250, 81], [125, 81]]


@pytest.mark.parametrize("kept", [(0.1,), (0.1, 0.2, 0.3), (0.1, 0.0), (1.1, 0.5), (0.1, float("nan"))])
def test_rounds_need_a_share_for_each_kernel(kept):
    with pytest.raises(InputError, match=r"rounds: .*expected"):
        prune.rounds(network(KEY), kept)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.lists(st.integers(-3, 3), min_size=30, max_size=30))
def test_smallest_counts_exactly_also_among_equal_weights(per_cent, weights):
    kernel = np.array(weights, np.float32).reshape(6, 5)
    params = {"kernel": kernel, "bias": np.array([1e-9], np.float32)}
    pruned = np.asarray(prune.smallest(params, per_cent / 100)["kernel"])
    k = round(per_cent / 100 * 30)
    order = sorted(range(30), key=lambda i: (abs(weights[i]), i))  # Python's own stable sort
    expected = np.array([0 if i in order[:k] else weights[i] for i in range(30)], np.float32).reshape(6, 5)
    np.testing.assert_array_equal(pruned, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_smallest_orders_weights_of_every_size_and_keeps_what_is_not_finite(dtype):
    largest = float(jnp.finfo(dtype).max)
    weights = [0.0, -0.0, float(jnp.finfo(dtype).tiny), -1e-3, 1.0, -1.5, largest, -largest, -np.inf, np.nan]
    order = np.random.default_rng(0).permutation(len(weights))
    kernel, rank = jnp.array(weights, dtype)[order], np.array([0, 0, 1, 2, 3, 4, 5, 5, 6, 7])[order]
    for k in range(len(weights)):
        left = np.asarray(prune.smallest({"kernel": kernel}, k / len(weights))["kernel"], np.float64) != 0
        dropped = np.argsort(rank, stable=True)[:k]
        np.testing.assert_array_equal(left, (rank > 0) & ~np.isin(np.arange(len(weights)), dropped))


def test_smallest_works_layer_by_layer_at_rates_of_their_own_and_leaves_biases():
    params = network(KEY)
    rates = {"a": 0.9, "b": 0.25}
    pruned = prune.smallest(params, lambda path, leaf: rates[path[0].key])
    assert zeros(pruned) == [27, round(0.25 * 15)]
    for before, after in zip(kernels(params), kernels(pruned), strict=True):
        assert abs(before[after == 0]).max() < abs(before[after != 0]).min()
        np.testing.assert_array_equal(after[after != 0], before[after != 0])
    assert bits(pruned["a"]["bias"]) == bits(params["a"]["bias"])
    assert bits(prune.smallest(params, 0.0)) == bits(params)


def test_smallest_takes_further_weights_from_the_survivors():
    first = prune.smallest(network(KEY), 0.5)
    grown = jax.tree.map(lambda p: p * 0.01, first)  # survivors smaller than much that was pruned
    second = prune.smallest(grown, 0.8)
    assert zeros(second) == [24, 12]
    for before, after in zip(kernels(first), kernels(second), strict=True):
        assert (after[before == 0] == 0).all()


def test_smallest_and_nonzeros_over_seeds():
    params = jax.vmap(network)(jax.random.split(KEY, 3))
    pruned = jax.jit(jax.vmap(functools.partial(prune.smallest, sparsity=0.6)))(params)
    for seed in range(3):
        alone = prune.smallest(jax.tree.map(lambda leaf, seed=seed: leaf[seed], params), 0.6)
        assert bits(jax.tree.map(lambda leaf, seed=seed: leaf[seed], pruned)) == bits(alone)
    counts = jax.vmap(prune.nonzeros)(pruned)
    assert {name: n.tolist() for name, n in counts.items()} == {"a/kernel": [12] * 3, "b/kernel": [6] * 3}
    every = prune.nonzeros(network(KEY), where=lambda path, leaf: True)
    assert sum(map(int, every.values())) == 30 + 15 + 5  # the second bias is zero


# the schedule


def test_cubic_is_equation_1():
    schedule = prune.cubic(0.9, begin=10, end=30, initial=0.2)
    steps = np.arange(10, 31)
    expected = 0.9 + (0.2 - 0.9) * (1 - (steps - 10) / 20) ** 3  # float64
    np.testing.assert_allclose([schedule(s) for s in steps], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.array([0, 9, 30, 31, 10**6])), [0, 0, 0.9, 0.9, 0.9], rtol=1e-6)


# the transforms


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
        lambda: optax.adamw(0.05, weight_decay=0.3),
        lambda: optax.adam(0.05),
    ],
)
def test_keep_zeros_is_training_with_a_masked_gradient(optimiser):
    start = prune.smallest(network(KEY), 0.6)
    mask = jax.tree.map_with_path(lambda path, p: (p != 0) | (path[-1].key == "bias"), start)
    tx, by_hand = optax.chain(optimiser(), prune.keep_zeros()), optimiser()
    params = expected = start
    state, state_by_hand = tx.init(params), by_hand.init(params)
    gradient = jax.jit(jax.grad(lambda p, batch: loss({"params": p}, batch, None)[0]))
    for i in range(20):
        updates, state = tx.update(gradient(params, batches(i)), state, params)
        params = optax.apply_updates(params, updates)
        masked = jax.tree.map(lambda g, m: g * m, gradient(expected, batches(i)), mask)
        updates, state_by_hand = by_hand.update(masked, state_by_hand, expected)
        expected = optax.apply_updates(expected, updates)
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert zeros(params) == zeros(start)
    assert not np.allclose(params["a"]["kernel"], start["a"]["kernel"])
    assert (np.asarray(params["b"]["bias"]) != 0).all()  # zero at the start, but no weight


def reference(schedule, every, steps, momentum, rate):
    """Pruned SGD with momentum in float64, ranking by NumPy; the parameters after every step."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), network(KEY))
    trace = jax.tree.map(np.zeros_like, params)
    masks = {layer: np.ones_like(params[layer]["kernel"], bool) for layer in params}
    share = 0.0
    gradient = jax.jit(jax.grad(lambda p, batch: loss({"params": p}, batch, None)[0]))
    for n in range(1, steps + 1):
        g = gradient(jax.tree.map(lambda p: p.astype(np.float32), params), batches(n - 1))
        trace = jax.tree.map(lambda t, g: momentum * t + np.asarray(g, np.float64), trace, g)
        params = jax.tree.map(lambda p, t: p - rate * t, params, trace)
        target = float(schedule(n))
        if target > share and (n % every == 0 or schedule(n + 1) == schedule(n)):
            share = target
            for layer, mask in masks.items():
                size = np.where(mask, abs(params[layer]["kernel"]), -1).ravel()
                order = np.argsort(size, kind="stable")
                mask.ravel()[order[: round(target * size.size)]] = False
        for layer, mask in masks.items():
            params[layer]["kernel"] *= mask
        yield params


@pytest.mark.parametrize("every", [1, 4, 7])
def test_magnitude_follows_the_schedule_and_ends_where_it_ends(every):
    schedule = prune.cubic(0.8, begin=3, end=13)
    tx = optax.chain(optax.sgd(0.05, momentum=0.9), prune.magnitude(schedule, every))
    state = init_state(KEY, {"params": network(KEY)}, tx)
    step = jax.jit(make_step(loss, tx))
    before = [0, 0]
    for n, expected in enumerate(reference(schedule, every, 20, 0.9, 0.05), 1):
        state, _ = step(state, batches(n - 1))
        for found, wanted in zip(kernels(state.params), kernels(expected), strict=True):
            np.testing.assert_array_equal(found == 0, wanted == 0)
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
        if n % every == 0 or n >= 13:
            assert zeros(state.params) == [round(float(schedule(n)) * size) for size in (30, 15)]
        else:
            assert zeros(state.params) == before
        before = zeros(state.params)
    assert before == [24, 12]


def test_momentum_decay_and_noise_move_no_pruned_weight():
    noise = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u + 3.0, updates))
    tx = optax.chain(optax.sgd(0.1, 0.9), optax.add_decayed_weights(-0.1), noise, prune.keep_zeros())
    params = prune.smallest(network(KEY), 0.5)
    state, step = init_state(KEY, {"params": params}, tx), jax.jit(make_step(loss, tx))
    for i in range(3):
        state, _ = step(state, batches(i))
    for before, after in zip(kernels(params), kernels(state.params), strict=True):
        np.testing.assert_array_equal(before == 0, after == 0)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(optax.tree.get(state.opt_state, "trace")))


def test_a_pruned_weight_does_not_return_when_more_are_pruned():
    pull = optax.stateless(lambda updates, params: jax.tree.map(lambda p: 100.0 * (p == 0), params))
    tx = optax.chain(pull, prune.magnitude(lambda step: jnp.minimum(0.2 * step, 0.6)))
    params = network(KEY)
    state, found = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    assert [zeros(params) for params in found] == [[6, 3], [12, 6], [18, 9]]
    assert bits(kernels(found[2])) == bits(kernels(prune.smallest(network(KEY), 0.6)))


@pytest.mark.parametrize("tx", [prune.keep_zeros(), prune.magnitude(lambda step: 0.5)])
def test_zeros_are_exact_in_the_parameters_own_precision(tx):
    """Updates of lower precision than the parameters: -p rounded to it would not give exactly zero."""
    params = {"kernel": jnp.array([1.001, 0.0, 2.003, 3.007, 4.011])}
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.bfloat16), params), state, params)
    after = optax.apply_updates(params, updates)["kernel"]
    expected = params["kernel"] * (state.masks["kernel"])
    np.testing.assert_array_equal(after, expected)
    assert after[1] == 0


def test_layers_on_schedules_of_their_own():
    in_layer = lambda name: lambda path, leaf: path[0].key == name and path[-1].key == "kernel"
    one = prune.magnitude(lambda step: 0.5, where=in_layer("a"))
    other = prune.magnitude(lambda step: jnp.where(step < 3, 0.0, 0.8), where=in_layer("b"))
    tx = optax.chain(optax.sgd(0.1), one, other)
    state, step = init_state(KEY, {"params": network(KEY)}, tx), jax.jit(make_step(loss, tx))
    found = []
    for i in range(3):
        state, _ = step(state, batches(i))
        found.append(zeros(state.params))
    assert found == [[15, 0], [15, 0], [15, 12]]


# with the rest of the core


def gradual():
    return optax.chain(optax.adam(0.05), prune.magnitude(prune.cubic(0.8, begin=2, end=11), every=3))


def test_every_seed_has_its_own_mask_and_is_as_if_alone():
    tx, keys = gradual(), jax.random.split(KEY, 3)
    start = lambda key: init_state(key, {"params": network(key)}, tx)
    states, step = jax.vmap(start)(keys), make_step(loss, tx)
    stacked = lambda i: jax.tree.map(lambda *x: np.stack(x), *(batches(i, seed) for seed in range(3)))
    together = fit(per_seed(step), states, stacked, steps=12, scan=4)
    for seed in range(3):
        alone = fit(step, start(keys[seed]), lambda i, seed=seed: batches(i, seed), steps=12)
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together.params)
        for found, wanted in zip(kernels(one), kernels(alone.params), strict=True):
            np.testing.assert_array_equal(found == 0, wanted == 0)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    masks = np.asarray(together.opt_state[1].masks["a"]["kernel"])
    assert (masks[0] != masks[1]).any()


def test_seeds_at_different_steps_refresh_when_each_is_due():
    tx = prune.magnitude(lambda step: jnp.minimum(step / 10, 0.9), every=2)
    params = jax.vmap(network)(jax.random.split(KEY, 2))
    state = jax.vmap(tx.init)(params)._replace(step=jnp.array([0, 1]))
    updates, state = jax.vmap(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    pruned = jax.vmap(prune.nonzeros)(optax.apply_updates(params, updates))
    assert pruned["a/kernel"].tolist() == [30, 24]
    assert state.sparsity.tolist() == pytest.approx([0, 0.2])


def searches(jaxpr, inside_cond=False):
    """For each loop in a program, the search for the least weight that stays, whether a condition guards it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            yield inside_cond
        for inner in jaxprs_in_params(equation.params):
            yield from searches(inner, inside_cond or equation.primitive.name == "cond")


def test_the_weights_are_not_ranked_at_every_step_also_over_seeds():
    tx = gradual()
    params = jax.vmap(network)(jax.random.split(KEY, 2))
    state = jax.vmap(tx.init)(params)
    jaxpr = jax.make_jaxpr(jax.vmap(tx.update))(params, state, params)
    assert list(searches(jaxpr.jaxpr)) == [True, True]  # one for each layer


def test_a_run_that_stops_in_the_middle_of_a_schedule_goes_on_bit_by_bit(tmp_path):
    tx, step = gradual(), make_step(loss, gradual())

    def trained(name, steps):
        run = Run(epath.Path(tmp_path / name), Settings(checkpoint_every=4))
        state = fit(step, init_state(KEY, {"params": network(KEY)}, tx), batches, steps=steps, run=run)
        run.close()
        return state

    undisturbed = trained("undisturbed", 14)
    half = trained("resumed", 7)  # 6 was a refresh, 9 is the next
    resumed = trained("resumed", 14)
    assert zeros(half.params) == [round(float(prune.cubic(0.8, 2, 11)(6)) * size) for size in (30, 15)]
    assert zeros(resumed.params) == [24, 12]
    key = lambda state: state._replace(key=jax.random.key_data(state.key))
    assert bits(key(resumed)) == bits(key(undisturbed))
    assert trained("resumed", 14).opt_state[1].masks["a"]["kernel"].dtype == bool


def test_rewinding():
    """A ticket: the original weights where the trained ones are large, and only those are trained again."""
    start = network(KEY)
    plain, kept = optax.sgd(0.1, 0.9), optax.chain(optax.sgd(0.1, 0.9), prune.keep_zeros())
    trained = fit(make_step(loss, plain), init_state(KEY, {"params": start}, plain), batches, steps=10).params
    pruned = prune.smallest(trained, lambda path, leaf: 0.2 if path[0].key == "a" else 0.1)
    ticket = jax.tree.map(lambda p, s: jnp.where(p != 0, s, 0), pruned, start)
    again = fit(make_step(loss, kept), init_state(KEY, {"params": ticket}, kept), batches, steps=10).params
    assert zeros(again) == [6, round(1.5)]
    for trained_kernel, ticket_kernel, kernel in zip(*map(kernels, (pruned, ticket, again)), strict=True):
        np.testing.assert_array_equal(kernel == 0, trained_kernel == 0)
        np.testing.assert_array_equal(ticket_kernel == 0, trained_kernel == 0)
    assert bits(start) == bits(network(KEY))  # the caller's arrays outlive the donation


# bad input


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan")])
def test_a_sparsity_is_a_fraction_below_one(sparsity):
    with pytest.raises(
        InputError, match=rf"sparsity of a/kernel is {sparsity}, expected a fraction of zeros in \[0, 1\)"
    ):
        prune.smallest(network(KEY), sparsity)
    with pytest.raises(InputError, match=f"sparsity of b/kernel is {sparsity}"):
        prune.smallest(network(KEY), lambda path, leaf: sparsity if path[0].key == "b" else 0.5)
    with pytest.raises(InputError, match=f"final sparsity is {sparsity}"):
        prune.cubic(sparsity, 0, 10)
    with pytest.raises(InputError, match=f"initial sparsity is {sparsity}"):
        prune.cubic(0.9, 0, 10, sparsity)
    for schedule in (lambda n: sparsity, lambda n: jnp.where(n < 100, 0.5, sparsity)):
        with pytest.raises(InputError, match=rf"magnitude: sparsity after update \d+ is {float(sparsity):.1f}"):
            prune.magnitude(schedule)


def test_other_bad_input():
    with pytest.raises(InputError, match=r"from 0.5 to 0.4, expected a rise"):
        prune.cubic(0.4, 0, 10, 0.5)
    for begin, end in ((10, 10), (11, 10), (-1, 10)):
        with pytest.raises(InputError, match=f"begin is {begin} and end is {end}"):
            prune.cubic(0.9, begin, end)
    with pytest.raises(InputError, match="every is 0"):
        prune.magnitude(prune.cubic(0.9, 0, 10), every=0)
    nothing = lambda path, leaf: False
    for use in (
        lambda params: prune.smallest(params, 0.5, nothing),
        lambda params: prune.nonzeros(params, nothing),
        prune.keep_zeros(nothing).init,
        prune.magnitude(prune.cubic(0.9, 0, 10), where=nothing).init,
    ):
        with pytest.raises(InputError, match="`where` chooses none"):
            use(network(KEY))
    for tx in (prune.keep_zeros(), prune.magnitude(prune.cubic(0.9, 0, 10))):
        with pytest.raises(ValueError, match="got no params"):
            tx.update(network(KEY), tx.init(network(KEY)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(image.reshape(image.shape[0], -1))))


def problem():
    rng = np.random.default_rng(0)
    batch = {"image": rng.random((5, 2, 1, 1), np.float32), "label": np.array([0, 1, 2, 0, 1])}
    variables = jax.jit(lambda: Net().init(jax.random.key(0), batch["image"], train=False))()
    return classify.loss(Net().apply), variables, batch


def test_sensitivity_is_the_slope_of_the_loss_along_a_factor_of_each_weight():
    loss, variables, batch = problem()
    scores = jax.jit(functools.partial(prune.sensitivity, loss))(variables, batch, jax.random.key(0))
    flat, unravel = jax.flatten_util.ravel_pytree(variables["params"])
    value = jax.jit(jax.vmap(lambda flat: loss({"params": unravel(flat)}, batch, jax.random.key(0))[0]))
    more, less = (np.float32(flat) * (1 + sign * 0.01 * np.eye(len(flat), dtype=np.float32)) for sign in (1, -1))
    slopes = (value(more) - value(less)) / 0.02  # of one factor in each row
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(scores)[0], np.abs(slopes), atol=3e-5)
    assert np.max(scores["Dense_0"]["kernel"]) > 0.01


def test_the_highest_scores_over_all_layers_stay():
    loss, variables, batch = problem()
    scores = jax.jit(functools.partial(prune.sensitivity, loss))(variables, batch, jax.random.key(0))
    found, before, scores = jax.device_get(
        (prune.highest(variables["params"], scores, 0.7), variables["params"], scores)
    )
    kernels = [(name, place) for name in ("Dense_0", "Dense_1") for place in np.ndindex(found[name]["kernel"].shape)]
    by_score = sorted(kernels, key=lambda each: float(scores[each[0]]["kernel"][each[1]]))
    zeros = {(name, place) for name, place in kernels if found[name]["kernel"][place] == 0}
    assert zeros == set(by_score[: round(0.7 * 20)])
    for name in ("Dense_0", "Dense_1"):
        kernel = found[name]["kernel"]
        np.testing.assert_array_equal(kernel[kernel != 0], before[name]["kernel"][kernel != 0])
        np.testing.assert_array_equal(found[name]["bias"], before[name]["bias"])
    left = prune.nonzeros(found)
    assert left["Dense_0/kernel"] / 8 != left["Dense_1/kernel"] / 12  # layers are not pruned alike


def test_random_scores_leave_every_weight_equally_often():
    params = {"a": {"kernel": jnp.ones((4, 5))}, "b": {"kernel": jnp.ones((10,)), "bias": jnp.ones(3)}}
    prune_at = lambda key: prune.highest(params, prune.random_scores(key, params), 0.8)
    found = jax.jit(jax.vmap(prune_at))(jax.random.split(jax.random.key(0), 2000))
    counts = np.concatenate([found[name]["kernel"].reshape(2000, -1) for name in ("a", "b")], 1)
    np.testing.assert_array_equal(counts.sum(1), 6)
    np.testing.assert_allclose(counts.mean(0), 0.2, atol=5 * np.sqrt(0.2 * 0.8 / 2000))
    assert (found["b"]["bias"] == 1).all()


def test_highest_refuses_a_sparsity_of_one_or_more():
    params = {"kernel": jnp.ones(3)}
    with pytest.raises(InputError, match="highest: sparsity is 1, expected a fraction of zeros"):
        prune.highest(params, params, 1)
