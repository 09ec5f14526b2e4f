"""The step, its combinators and the loop, on a linear regression whose every number is known."""

import functools
import json
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax import data, optim
from dl_jax.core import fit as fit_module
from dl_jax.core import program
from dl_jax.core.errors import InputError
from dl_jax.core.fit import NonFiniteError, Recorder, Watch, fit
from dl_jax.core.recorder import Snapshot
from dl_jax.core.step import State, holding, init_state, make_step, per_seed, plain_state
from dl_jax.core.stream import Stream, no_data

WIDTH = 3
RECORDS = {
    "x": np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=64).astype(np.float32),
}


def loss(variables, batch, key):
    residual = batch["x"] @ variables["params"]["w"] - batch["y"]  # [B]
    return (residual**2).mean(), ({}, {"bias": residual.mean()})


def noisy_loss(variables, batch, key):
    value, (_, found) = loss(variables, batch, key)
    noise = jax.random.normal(key, (WIDTH,)) @ variables["params"]["w"]
    seen = variables["counter"]["seen"] + 1
    return value + 0.1 * noise, ({"counter": {"seen": seen}}, found)


def rows(step, size=8):
    index = (np.arange(size) + step * size) % len(RECORDS["y"])
    return {name: column[index] for name, column in RECORDS.items()}


ADAM = optax.adam(0.1)


def start(seed=0, tx=ADAM):
    w = jax.random.normal(jax.random.key(seed), (WIDTH,))
    return init_state(jax.random.key(seed), {"params": {"w": w}, "counter": {"seen": jnp.zeros([], jnp.int32)}}, tx)


def equal(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(plain(a)), jax.tree.leaves(plain(b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance) if tolerance else np.testing.assert_array_equal(x, y)


def plain(state: State):
    return state._replace(key=jax.random.key_data(state.key))


STEP = make_step(loss, ADAM)


class Log(Recorder):
    def __init__(self, save_at=(), skip=False):
        self.reports, self.saves, self.save_at, self.skip_nonfinite = [], [], save_at, skip
        self.snapshots, self.begin = {}, None

    def report(self, step, metrics):
        self.reports.append((step, metrics))

    def stepped(self, step):
        return step in self.save_at

    def save(self, step, tree, measured):
        self.saves.append((step, jax.device_get(plain(tree.state)), measured))
        self.snapshots[step] = jax.tree.map(jnp.copy, tree.state), tree.stop, json.loads(json.dumps(tree.window))

    def start(self, snapshot, steps, best):
        return self.begin or snapshot


def test_golden_step():
    """One SGD step on a batch of two, by hand: w - 0.1 * 2/B X^T (Xw - y)."""
    x, y, w = np.array([[1.0, 2, 0], [0, 1, -1]]), np.array([1.0, 2]), np.array([0.5, -1, 2])
    residual = x @ w - y  # -2.5, -5
    assert residual.tolist() == [-2.5, -5.0]
    tx = optax.sgd(0.1)
    state = init_state(jax.random.key(0), {"params": {"w": jnp.asarray(w, jnp.float32)}}, tx)
    state, found = make_step(loss, tx)(state, {"x": jnp.float32(x), "y": jnp.float32(y)})
    np.testing.assert_allclose(state.params["w"], [0.75, 0.0, 1.5], rtol=1e-6)  # gradient -2.5, -10, 5
    np.testing.assert_allclose(found["loss"], (2.5**2 + 5**2) / 2, rtol=1e-6)
    np.testing.assert_allclose(found["grad_norm"], np.sqrt(2.5**2 + 10**2 + 5**2), rtol=1e-6)
    np.testing.assert_allclose(found["bias"], -3.75, rtol=1e-6)
    assert state.step == 1


def test_the_key_of_a_step_depends_on_seed_and_step_alone():
    keys = []
    tx = optax.sgd(0.0)

    def record(variables, batch, key):
        jax.debug.callback(lambda k: keys.append(k.tolist()), jax.random.key_data(key), ordered=True)
        return variables["params"]["w"].sum(), ({}, {})

    state = start(tx=tx)
    step = make_step(record, tx)
    for i in (0, 1, 1, 5):
        step(state._replace(step=jnp.int32(i)), rows(i))
    jax.effects_barrier()
    assert keys == [jax.random.key_data(jax.random.fold_in(state.key, i)).tolist() for i in (0, 1, 1, 5)]


def test_extra_collections_pass_through():
    tx = optax.adam(0.1)
    state = fit(make_step(noisy_loss, tx), start(), rows, steps=7)
    assert state.extra["counter"]["seen"] == 7


@pytest.mark.parametrize("k", [2, 4, 8])
def test_microbatches_give_the_gradient_of_the_whole_batch(k):
    tx = optax.sgd(0.1)
    whole = fit(make_step(loss, tx), start(tx=tx), rows, steps=5)
    parts = fit(make_step(loss, tx, microbatches=k), start(tx=tx), rows, steps=5)
    equal(whole, parts, rtol=1e-5, atol=1e-6)


def test_microbatches_move_a_counter_once_a_step():
    tx = optax.sgd(0.1)
    state = fit(make_step(noisy_loss, tx, microbatches=4), start(tx=tx), rows, steps=3)
    assert state.extra["counter"]["seen"] == 3


@pytest.mark.parametrize("k", [1, 2, 4])
def test_microbatches_move_batch_statistics_once_a_step(k):
    """The running mean is that of the whole batch, the running variance the mean of the parts' variances."""
    x = np.random.default_rng(0).normal(3, 2, (8, 5)).astype(np.float32)
    net = nn.BatchNorm(momentum=0.9)

    def normalised(variables, batch, key):
        y, new = net.apply(variables, batch["x"], use_running_average=False, mutable=["batch_stats"])
        return jnp.square(y).mean(), (new, {})

    tx = optax.sgd(0.1)
    variables = net.init(jax.random.key(0), x, use_running_average=False)
    state, _ = make_step(normalised, tx, k)(init_state(jax.random.key(0), variables, tx), {"x": jnp.asarray(x)})
    parts = np.float64(x).reshape(-1, k, 5)  # part i holds rows i, i + k, ...
    np.testing.assert_allclose(state.extra["batch_stats"]["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.extra["batch_stats"]["var"], 0.9 + 0.1 * parts.var(0).mean(0), rtol=1e-5)


def plateau_loss(variables, batch, key):
    """The loss is the mean of the column, and the gradient is 1."""
    w = variables["params"]["w"]
    return batch["loss"].mean() + (w - jax.lax.stop_gradient(w)).sum(), ({}, {})


def halved(losses):
    """The weight after each step, which falls by the rate. After 3 steps without a better loss the rate is halved."""
    best, waited, rate, w, found = np.inf, 0, 1.0, 0.0, []
    for value in losses:
        better = value < 0.99 * best
        best, waited = (value, 0) if better else (best, waited + 1)
        if waited == 3:
            rate, waited = rate / 2, 0
        w -= rate
        found.append(w)
    return found


PLATEAU = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(0.5, patience=3, rtol=0.01))
PLATEAU_LOSSES = np.array([[9, 8, 8, 9, 8, 7, 7, 7, 7, 7, 7, 6, 5, 5], [*range(20, 6, -1)], [1] * 14], np.float32)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_each_seed_halves_its_rate_on_its_own_plateau(microbatches, one_by_one):
    """Uninterrupted, and resumed in the middle of a plateau."""
    spread = np.array([-1, 0.5, 0.5, 0], np.float32)  # the loss is that of the whole batch
    stream = lambda step: {"loss": PLATEAU_LOSSES[:, step % 14, None] + spread}
    step = per_seed(make_step(plateau_loss, PLATEAU, microbatches), one_by_one)
    keys = jax.random.split(jax.random.key(0), 3)
    begin = jax.vmap(lambda key: init_state(key, {"params": {"w": jnp.zeros(1)}}, PLATEAU))(keys)
    for cut in (4, 9, 14):
        state = fit(step, begin, stream, steps=cut)
        np.testing.assert_array_equal(state.params["w"][:, 0], [halved(row[:cut])[-1] for row in PLATEAU_LOSSES])
        equal(fit(step, state, stream, steps=14), fit(step, begin, stream, steps=14))
    assert len({*np.asarray(optax.tree.get(state.opt_state, "scale")).tolist()}) == 3  # 1/4, 1 and 1/16


@pytest.mark.parametrize("seeds", [False, True])
def test_an_optimiser_without_extra_arguments_gets_none(seeds):
    """One that takes no keyword, and the same program as that of an update written out."""
    adam = optax.adam(0.1)
    tx = optax.GradientTransformation(adam.init, lambda grads, state, params=None: adam.update(grads, state, params))

    def written_out(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        of = jax.value_and_grad(lambda params: loss({"params": params, **state.extra}, batch, key), has_aux=True)
        (value, (extra, metrics)), grads = of(state.params)
        updates, opt_state = adam.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(state.step + 1, params, {**state.extra, **extra}, opt_state, state.key)
        return new, {**metrics, "loss": value, "grad_norm": optax.tree.norm(grads)}

    given = start(), rows(0)
    if seeds:
        given = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), given)
    mapped = jax.vmap if seeds else lambda step: step
    text = lambda step: jax.jit(mapped(step)).lower(*given).as_text().replace("written_out", "step")
    assert text(make_step(loss, tx)) == text(make_step(loss, adam)) == text(written_out)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_microbatches_of_low_precision_are_added_in_float32(dtype):
    """512 parts: added in 16 bits, sums would stop growing at a few hundred units in the last place."""
    x = np.float32(10.5) + np.arange(512, dtype=np.float32) / 1024

    def low(variables, batch, key):
        seen = batch["x"].astype(dtype)
        value = (variables["params"]["w"] * seen).mean()
        return value, ({"stats": {"mean": seen.mean()}}, {"positive": (seen > 0).any(), "count": jnp.int8(100)})

    tx = optax.sgd(1.0)
    variables = {"params": {"w": jnp.ones([], dtype)}, "stats": {"mean": jnp.zeros([], dtype)}}
    state, found = make_step(low, tx, 512)(init_state(jax.random.key(0), variables, tx), {"x": jnp.asarray(x)})
    mean = np.float64(x.astype(dtype)).mean()
    np.testing.assert_allclose(np.float64(state.params["w"]), 1 - mean, rtol=8e-3)
    np.testing.assert_allclose(np.float64(state.extra["stats"]["mean"]), mean, rtol=8e-3)
    assert state.extra["stats"]["mean"].dtype == state.params["w"].dtype == dtype
    np.testing.assert_allclose([found["loss"], found["grad_norm"]], mean, rtol=8e-3)
    assert found["positive"] == 1
    assert found["count"] == 100


def test_the_norm_of_a_gradient_does_not_overflow_in_its_type():
    steep = lambda variables, batch, key: ((200 * variables["params"]["w"]).sum(), ({}, {}))
    tx = optax.sgd(1e-4)
    state = init_state(jax.random.key(0), {"params": {"w": jnp.ones(4, jnp.float16)}}, tx)
    assert make_step(steep, tx)(state, {})[1]["grad_norm"] == 400


@pytest.mark.parametrize("wrap", [functools.partial, jax.tree_util.Partial])
@pytest.mark.parametrize("scan", [1, 2])
def test_arrays_of_partials_are_arguments_of_the_program(monkeypatch, wrap, scan):
    """Nested partials would hide a table, which would be compiled in as a constant."""
    table = jnp.arange(5000.0)
    hidden = wrap(
        holding(lambda table, state, batch: (state._replace(step=state.step + 1), {"sum": table.sum()}), table)
    )
    inner = wrap(lambda table, state, batch: (state._replace(step=state.step + 1), {"sum": table.sum()}), table)
    advance, seen = fit_module._advance, []
    monkeypatch.setattr(fit_module, "_advance", lambda step, *rest: (seen.append(step), advance(step, *rest))[1])
    for step in (hidden, inner):
        log = Log()
        fit(step, start(), rows, steps=2, every=2, run=log, scan=scan)
        assert log.reports[0][1]["sum"] == table.sum()
        assert 5000 in [leaf.size for leaf in jax.tree.leaves(seen[-1])]


def test_settings_of_a_partial_stay_as_they_are():
    def step(twice, state, batch):
        state, metrics = STEP(state, batch)
        return STEP(state, batch) if twice else (state, metrics)  # a traced flag would end in an error

    assert fit(functools.partial(step, True), start(), rows, steps=4).step == 4


@pytest.mark.parametrize("column", [np.array([b"a"]), np.array(["a"]), np.array([None]), np.zeros(1, "M8[s]")])
def test_a_text_in_the_batch_of_a_plain_function_is_named(column):
    with pytest.raises(InputError, match=r"^column 'note' is .*, expected a numeric dtype; encode it"):
        fit(STEP, start(), lambda i: {**rows(i), "note": column}, steps=1)


def test_an_array_in_extra_that_is_no_collection_is_named():
    state = start()
    for extra in ({"codebook": jnp.zeros(3)}, jnp.zeros(3), None, (jnp.zeros(3),)):
        each = state._replace(extra=extra)
        expected = r"^extra(\['codebook'\])? is an? (array|NoneType|tuple), expected a (dict of )?collection"
        with pytest.raises(InputError, match=expected):
            _ = each.variables
        with pytest.raises(InputError, match=expected):
            fit(STEP, each, rows, steps=1)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "step", "time", "data_wait", "watch/error"])
def test_a_metric_of_a_name_that_reports_use_is_refused(name):
    clashing = lambda variables, batch, key: (jnp.sum(variables["params"]["w"]), ({}, {name: jnp.float32(1)}))
    with pytest.raises(InputError, match=f"metric '{name}'"):
        fit(make_step(clashing, ADAM), start(), rows, steps=1)


def test_measurements_of_watch_are_kept_apart_from_metrics_of_the_step():
    log = Log()
    counted = lambda state, batch: (state._replace(step=state.step + 1), {"error": jnp.float32(1)})
    fit(counted, start(), rows, steps=4, every=1, run=log, watch=Watch(2, lambda variables: {"error": np.float32(9)}))
    found = {name: [float(m[name]) for _, m in log.reports if name in m] for name in ("error", "watch/error")}
    assert found == {"error": [1] * 4, "watch/error": [9, 9]}


def test_per_seed_equals_each_seed_alone():
    tx, seeds = optax.adam(0.1), (3, 4, 5)
    step = make_step(noisy_loss, tx)
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(start, seeds))
    together = fit(
        per_seed(step), states, lambda i: jax.tree.map(lambda *x: np.stack(x), *[rows(i + s) for s in seeds]), steps=20
    )
    for place, seed in enumerate(seeds):
        alone = fit(step, start(seed), lambda i, seed=seed: rows(i + seed), steps=20)
        equal(jax.tree.map(lambda x, place=place: x[place], together), alone, rtol=1e-5, atol=1e-6)


def test_the_only_seed_is_computed_as_the_step_itself():
    """One by one, a single seed needs neither a loop nor the batching rules of vmap."""
    step, state, batch = make_step(noisy_loss, ADAM), start(), rows(0)
    alone = lambda tree: jax.tree.map(lambda x: x[None], tree)  # [...] -> [1, ...]
    of_one = per_seed(step, one_by_one=True)
    found, metrics = jax.jit(of_one)(alone(state), alone(batch))
    equal(found, alone(step(state, batch)[0]), rtol=1e-6, atol=1e-7)
    assert {np.shape(value) for value in metrics.values()} == {(1,)}
    text = str(jax.make_jaxpr(of_one)(alone(state), alone(batch)))
    assert "scan[" not in text
    assert "platform_index" not in text


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("of", "seeds"), [((0,), 3), ((0,), (3, 4)), ((0, 1), (3,))])
def test_batches_of_another_number_of_seeds_are_refused(one_by_one, of, seeds):
    """`seeds=3` makes batches without the axis: a single seed would learn from the first row of each."""
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(start, of))
    stream = data.shuffled(RECORDS, 8, seeds=seeds)
    with pytest.raises(
        InputError,
        match=r"^(states and batches of .* seeds, expected one number in all leaves|a batch of . seeds, expected the)",
    ):
        fit(per_seed(make_step(noisy_loss, ADAM), one_by_one), states, stream, steps=2)


def test_any_tree_is_mapped_over_seeds():
    step = lambda state, batch: ({"sum": state["sum"] + batch["x"].sum()}, {"sum": state["sum"]})
    for one_by_one in (False, True):
        for n in (1, 2):
            new, metrics = per_seed(step, one_by_one)({"sum": jnp.zeros(n)}, {"x": jnp.ones((n, 5))})
            np.testing.assert_array_equal(new["sum"], [5] * n)
            np.testing.assert_array_equal(metrics["sum"], [0] * n)


@pytest.mark.parametrize("stream", [rows, data.shuffled(RECORDS, 8, seeds=3)], ids=["function", "stream"])
def test_a_scan_equals_single_steps_and_averages_metrics(stream):
    one, four, step = Log(), Log(), make_step(noisy_loss, ADAM)
    expected = fit(step, start(), stream, steps=16, every=8, run=one)
    found = fit(step, start(), stream, steps=16, every=8, run=four, scan=4)
    equal(expected, found, rtol=1e-6, atol=1e-7)
    assert [s for s, _ in four.reports] == [8, 16]
    for (_, a), (_, b) in zip(one.reports, four.reports, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("begin", "steps", "every", "wrong"),
    [
        (0, 15, 5, "steps is 15"),
        (0, 16, 6, "every is 6"),
        (2, 18, 8, "every is 8, expected a multiple of 4, as must be the first step, 2"),
    ],
)
def test_a_scan_wants_multiples(begin, steps, every, wrong):
    with pytest.raises(InputError, match=f"{wrong}.* each call advances 4 steps"):
        fit(STEP, start()._replace(step=jnp.int32(begin)), rows, steps=steps, every=every, scan=4)


@pytest.mark.parametrize(
    ("steps", "every", "watch", "begin", "advance", "expected"),
    [
        (1000, 100, None, 0, 1, 50),
        (1000, 100, 30, 0, 1, 10),
        (1000, 100, None, 8, 1, 4),  # resumes a run that made other calls
        (1000, 100, None, 50, 1, 50),
        (1001, 100, None, 0, 1, 1),
        (1200, 400, None, 0, 20, 20),  # 20 calls of a rollout
        (1000, 100, None, 0, 200, 1),  # `fit` then says what is wrong
    ],
)
def test_the_steps_of_a_call_of_an_accelerator_divide_all_that_is_due(
    steps, every, watch, begin, advance, expected, monkeypatch
):
    monkeypatch.setattr(program, "_on_cpu", lambda mesh: False)
    counted = lambda table, state, batch: (state._replace(step=state.step + advance), {"x": batch["x"].mean() + table})
    step, stream = holding(counted, jnp.float32(1)), data.shuffled(RECORDS, 8, 0)
    state = start()._replace(step=jnp.int32(begin))
    layout = program.layout_of(state, stream, (), False)
    assert program.steps_in_a_call(step, state, layout, begin, steps, every, watch or 0) == expected


def test_an_accelerator_scans_by_default_and_equals_single_steps(monkeypatch):
    shapes, advance = [], fit_module._advance
    step = per_seed(make_step(noisy_loss, ADAM), one_by_one=True)
    states, stream = jax.tree.map(lambda x: jnp.stack([x, x]), start()), data.shuffled(RECORDS, 8, (0, 1))
    one, many = Log(), Log()
    expected = fit(step, states, stream, steps=40, every=20, run=one)
    monkeypatch.setattr(fit_module, "_advance", lambda *a: shapes.append(a[2]["index"].shape) or advance(*a))
    monkeypatch.setattr(program, "_on_cpu", lambda mesh: False)
    found = fit(step, states, stream, steps=40, every=20, run=many)
    assert shapes == [(20, 2, 8)] * 2
    equal(expected, found, rtol=1e-5, atol=1e-6)
    for (a, left), (b, right) in zip(one.reports, many.reports, strict=True):
        assert a == b
        np.testing.assert_allclose(left["loss"], right["loss"], rtol=1e-5)
    many.skip_nonfinite = True  # undoes a call, so it has to be a step
    with pytest.raises(KeyError, match="index"):
        fit(step, states, stream, steps=40, every=20, run=many)


def test_long_steps_and_large_sets_are_not_scanned_by_default(monkeypatch):
    monkeypatch.setattr(program, "_on_cpu", lambda mesh: False)
    stream = data.shuffled(RECORDS, 8, 0)
    layout = lambda stream: program.layout_of(start(), stream, (), False)
    calls = lambda stream=stream: program.steps_in_a_call(STEP, start(), layout(stream), 0, 100)
    assert calls() == 50
    monkeypatch.setattr(program, "flops", lambda jaxpr: 8 * program.ENOUGH / 7)  # on 8 devices
    assert calls() == 5
    monkeypatch.setattr(program, "_memory", lambda mesh: 1000)
    assert calls() == 1
    monkeypatch.undo()
    assert calls() == 1  # on a CPU
    monkeypatch.setattr(program, "_on_cpu", lambda mesh: False)
    assert calls(Stream(8, stream)) == 50  # not in memory
    monkeypatch.setattr(program, "LARGE", 20 * 8 * 4 * (WIDTH + 1))
    assert calls(Stream(8, stream)) == 20


def test_batches_are_read_ahead_in_order_and_no_further_than_needed():
    asked, threads = [], set()

    def read(i, rows):
        asked.append(i)
        threads.add(threading.current_thread().name)
        return {name: column[(np.arange(8) + 8 * i) % 64][rows] for name, column in RECORDS.items()}

    expected = fit(STEP, start(), rows, steps=6)
    equal(expected, fit(STEP, start(), Stream(8, read), steps=6), rtol=1e-5, atol=1e-6)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert len(threads) == 2  # the first is read before it is known how far a call advances


def test_a_batch_that_cannot_be_read_ends_the_fit():
    def read(i, rows):
        if i == 3:
            raise OSError("no such record")
        return RECORDS | {}

    log = Log()
    with pytest.raises(OSError, match="no such record"):
        fit(STEP, start(), Stream(64, read), steps=6, every=1, run=log)
    assert [step for step, _ in log.reports] == [1, 2, 3]
    for thread in threading.enumerate():
        if thread.name == "batches":
            thread.join(10)
            assert not thread.is_alive()


def test_a_read_that_hangs_does_not_keep_the_fit_from_ending():
    hangs = threading.Event()

    class Ends(Log):
        def stepped(self, step):
            if step == 2:
                raise RuntimeError("the run was asked to end")
            return False

    def read(i, rows):
        if i == 3:
            hangs.wait(60)
        return RECORDS | {}

    began = time.perf_counter()
    with pytest.raises(RuntimeError, match="asked to end"):
        fit(STEP, start(), Stream(64, read), steps=6, run=Ends())
    assert time.perf_counter() - began < 30
    hangs.set()


def test_seeds_may_share_a_batch():
    """The stream has no axis of seeds, so the rows are split, and every device trains all seeds."""
    states = jax.tree.map(lambda x: jnp.stack([x] * 4), start())
    step = jax.vmap(STEP, (0, None))
    expected = fit(step, states, rows, steps=4)
    equal(
        expected,
        fit(step, states, Stream(8, lambda i, part: {k: v[part] for k, v in rows(i).items()}), steps=4),
        rtol=1e-5,
    )


def test_a_step_that_does_not_count_is_named():
    with pytest.raises(InputError, match=r"advanced state\.step by 0"):
        fit(lambda state, batch: (state, {"loss": jnp.zeros([])}), start(), rows, steps=2)


def test_a_resident_set_is_an_argument_of_the_program(monkeypatch):
    """A captured array would be compiled in: a program as large as the set, compiled anew for each set."""
    sizes = []
    stream = data.shuffled({"x": np.ones((100_000, WIDTH), np.float32), "y": np.ones(100_000, np.float32)}, 8, seeds=0)
    advance = fit_module._advance

    def seen(program, *args):
        sizes.append(len(advance.lower(program, *args).as_text()))
        return advance(program, *args)

    monkeypatch.setattr(fit_module, "_advance", seen)
    fit(STEP, start(), stream, steps=4, every=4, scan=2)
    fit(holding(lambda table, state, batch: STEP(state, batch), stream.records), start(), rows, steps=1)
    assert len(sizes) == 3
    assert max(sizes) < 100_000


def test_a_batch_that_points_into_the_records_keeps_its_other_columns():
    weighted = lambda variables, batch, key: (jnp.mean(batch["weight"] * batch["y"]), ({}, {}))
    records, weight = {"y": RECORDS["y"]}, np.arange(8, dtype=np.float32)
    read = lambda step, rows: {"index": (np.arange(8) + step * 8)[rows] % 64, "weight": weight[rows]}
    stream, log = Stream(8, read, records=records), Log()
    for scan in (1, 2):
        fit(make_step(weighted, ADAM), start(), stream, steps=2, every=2, run=log, scan=scan)
    expected = np.mean([np.mean(weight * records["y"][i : i + 8]) for i in (0, 8)])
    np.testing.assert_allclose([report["loss"] for _, report in log.reports], [expected, expected], rtol=1e-6)
    clash = Stream(8, lambda step, rows: {"index": np.arange(8)[rows], "y": weight[rows]}, records=records)
    with pytest.raises(InputError, match="column 'y' is in the records and in the batch"):
        fit(make_step(weighted, ADAM), start(), clash, steps=1)


def test_holding_passes_a_tree_as_the_first_argument():
    def step(scale, state, batch):
        return STEP(state, {**batch, "y": scale * batch["y"]})

    doubled = lambda i: {**rows(i), "y": 2 * rows(i)["y"]}
    equal(fit(holding(step, jnp.float32(2)), start(), rows, steps=3), fit(STEP, start(), doubled, steps=3))


def test_one_by_one_is_side_by_side():
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(start, (3, 4, 5)))
    stream, step = data.shuffled(RECORDS, 8, seeds=(3, 4, 5)), make_step(noisy_loss, ADAM)
    one, other = (fit(per_seed(step, one_by_one), states, stream, steps=10) for one_by_one in (False, True))
    equal(one, other, rtol=1e-5, atol=1e-6)


def reporting(metrics):
    """A step that reports `metrics(step)` and trains nothing."""
    return lambda state, batch: (state._replace(step=state.step + 1), metrics(state.step))


@pytest.mark.parametrize("scan", [1, 2])
def test_a_pair_is_a_weighted_mean_and_is_left_out_where_nothing_happened(scan):
    """Steps 0 to 3 report (s, s): Σ s² / Σ s is no mean of means. Nothing happens from step 4 on."""
    weight = lambda s: jnp.where(s < 4, s, 0).astype(jnp.float32)
    log = Log()
    step = reporting(lambda s: {"length": (weight(s) * s, weight(s)), "plain": s.astype(jnp.float32)})
    fit(step, start(), no_data, steps=8, every=4, run=log, scan=scan)
    (_, first), (_, second) = log.reports
    np.testing.assert_allclose(first["length"], (1 + 4 + 9) / (1 + 2 + 3))
    np.testing.assert_allclose(first["plain"], 1.5)
    assert "length" not in second
    np.testing.assert_allclose(second["plain"], 5.5)


def test_a_pair_is_each_seeds_own():
    log = Log()
    step = per_seed(reporting(lambda s: {"length": (jnp.float32(3) * (s > 4), jnp.where(s > 4, 2.0, 0.0))}))
    states = jax.tree.map(lambda *x: jnp.stack(x), start(0), start(1)._replace(step=jnp.int32(4)))
    fit(step, states, lambda i: {"x": np.zeros((2, 1))}, steps=6, every=2, run=log)  # the second from 4
    ((_, report),) = log.reports
    np.testing.assert_array_equal(report["length"], [np.nan, 1.5])


def test_microbatches_add_pairs_up():
    def counted(variables, batch, key):
        value, (extra, _) = loss(variables, batch, key)
        return value, (extra, {"positive": ((batch["y"] * (batch["y"] > 0)).sum(), (batch["y"] > 0).sum())})

    y, log = rows(0)["y"], Log()
    fit(make_step(counted, ADAM, microbatches=4), start(), rows, steps=1, every=1, run=log)
    np.testing.assert_allclose(log.reports[0][1]["positive"], y[y > 0].mean(), rtol=1e-6)


@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_step_without_metrics_works(seeds, skip):
    log, state = Log(skip=skip), start()
    step = reporting(lambda s: {})
    if seeds:
        step, state = per_seed(step), jax.tree.map(lambda x: jnp.stack([x, x]), state)
    assert np.all(fit(step, state, lambda i: {"x": np.zeros((2, 1))}, steps=3, every=3, run=log).step == 3)
    assert set(log.reports[0][1]) == {"steps_per_second", "data_wait", *(["skipped"] if skip else [])}


@pytest.mark.parametrize("batch_size", [1, 8, None])  # on one device, on eight, and a plain function
@pytest.mark.parametrize("scan", [1, 2])
def test_a_step_is_traced_once(batch_size, scan):
    traced, stream = [], rows if batch_size is None else data.shuffled(RECORDS, batch_size, seeds=0)
    step = lambda state, batch: traced.append(1) or STEP(state, batch)
    state = fit(step, start(), stream, steps=6, every=6, scan=scan)
    fit(step, state, stream, steps=8, every=2, scan=scan)
    assert len(traced) == 1


def test_a_step_of_seeds_one_by_one_is_traced_once_for_all_platforms():
    traced, stream = [], data.shuffled(RECORDS, 8, seeds=(0, 1))
    step = per_seed(lambda state, batch: traced.append(1) or STEP(state, batch), one_by_one=True)
    fit(step, jax.tree.map(lambda *x: jnp.stack(x), start(0), start(1)), stream, steps=3)
    assert len(traced) == 1


def test_fit_leaves_the_callers_state_usable():
    state = start()  # that nothing else refers to, or it could not be donated
    fit(STEP, state, rows, steps=3)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@settings(deadline=None, max_examples=10)
@given(cut=st.integers(0, 12))
def test_a_fit_cut_in_two_is_the_same_fit(cut):
    step = make_step(noisy_loss, optax.adam(0.1))
    whole = fit(step, start(), rows, steps=12)
    equal(whole, fit(step, fit(step, start(), rows, steps=cut), rows, steps=12))


def test_reports_are_exact_means():
    log, single = Log(), Log()
    step = STEP
    fit(step, start(), rows, steps=10, every=4, run=log)
    fit(step, start(), rows, steps=10, every=1, run=single)
    values = [float(m["loss"]) for _, m in single.reports]
    assert [s for s, _ in log.reports] == [4, 8, 10]
    means = [np.mean(values[0:4]), np.mean(values[4:8]), np.mean(values[8:])]
    np.testing.assert_allclose([float(m["loss"]) for _, m in log.reports], means, rtol=1e-12)
    assert all(0 <= m["data_wait"] <= 1 for _, m in log.reports)


def poisoned(step):
    batch = rows(step)
    return {**batch, "y": np.full_like(batch["y"], np.nan)} if step in (4, 5) else batch


def test_nan_stops_with_the_step_and_the_last_checkpoint():
    log = Log(save_at=(2, 4, 6))
    with pytest.raises(NonFiniteError, match="loss is nan at step 5, expected finite numbers; nothing was saved"):
        fit(STEP, start(), poisoned, steps=10, run=log)
    assert [step for step, *_ in log.saves] == [2, 4]


def test_nan_skipped_is_as_if_the_step_had_not_changed_anything():
    tx, log = optax.adam(0.1), Log(skip=True)
    step = make_step(loss, tx)
    found = fit(step, start(), poisoned, steps=10, every=10, run=log)
    expected = fit(step, start(), rows, steps=4)._replace(step=jnp.int32(6))
    equal(found, fit(step, expected, rows, steps=10))
    ((_, report),) = log.reports
    assert report["skipped"] == 2
    assert np.isfinite(report["loss"])


def test_a_call_that_is_skipped_counts_all_its_steps():
    """The batch of step 4 is not finite, so neither is the mean of the call of steps 4 and 5."""
    log, poison = Log(skip=True), lambda i: {**rows(i), "y": rows(i)["y"] * np.float32(np.nan if i == 4 else 1)}
    found = fit(STEP, start(), poison, steps=8, every=8, run=log, scan=2)
    assert log.reports[0][1]["skipped"] == 2
    expected = fit(STEP, start(), rows, steps=4, scan=2)._replace(step=jnp.int32(6))
    equal(found, fit(STEP, expected, rows, steps=8, scan=2))


@pytest.mark.parametrize("every", [3, 100])
def test_skipping_for_ever_is_an_error(every):
    always = lambda i: {**rows(i), "y": np.full(8, np.inf, np.float32)}
    log = Log(skip=True)
    with pytest.raises(NonFiniteError, match="at step 10 and 9 times in a row before"):
        fit(STEP, start(), always, steps=100, run=log, every=every)
    assert all(np.isnan(report["loss"]) for _, report in log.reports)


def test_one_lost_seed_among_others_is_an_error():
    states = jax.tree.map(lambda *x: jnp.stack(x), start(0), start(1))
    half = lambda i: {**{k: np.stack([v, v]) for k, v in rows(i).items()}, "y": np.float32([[1] * 8, [np.nan] * 8])}
    with pytest.raises(NonFiniteError, match="loss is"):
        fit(per_seed(make_step(loss, ADAM)), states, half, steps=100, run=Log(skip=True), every=4)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"steps": -4}, "steps is -4"),
        ({"every": 0}, "every is 0"),
        ({"watch": Watch(0, lambda variables: {})}, r"watch\.every is 0"),
        (
            {"watch": Watch(1, lambda variables: {}, ("error", "minimum"))},
            r"best is .*'minimum'.*, expected .* 'min' or",
        ),  # type: ignore[arg-type]
        ({"scan": 0}, "scan is 0"),
        ({"carried": ("carry",)}, r"carried names 'carry', expected collections of state.extra: \['counter'\]"),
        ({"stop": optim.early_stopping("error", 1, mode="min")}, "stop is given without watch"),
    ],
)
def test_intervals_that_make_no_sense(wrong, expected):
    with pytest.raises(InputError, match=expected):
        fit(STEP, start(), rows, **{"steps": 2, **wrong})


@pytest.mark.parametrize(("k", "expected"), [(0, "microbatches is 0"), (3, "a batch of 8 rows cannot be split into 3")])
def test_microbatches_that_make_no_sense(k, expected):
    with pytest.raises(InputError, match=expected):
        fit(make_step(loss, ADAM, microbatches=k), start(), rows, steps=1)


def test_the_best_measurement_is_saved():
    errors = iter([3.0, 1.0, 2.0])
    log = Log()
    watch = Watch(4, lambda variables: {"error": np.float32(next(errors))}, best=("error", "min"))
    fit(STEP, start(), rows, steps=12, run=log, watch=watch)
    assert [(step, float(measured["error"])) for step, _, measured in log.saves] == [(4, 3.0), (8, 1.0), (12, 2.0)]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"loss": np.float32(1)}, "best is 'error', expected a measurement of watch: loss"),
        ({"errors": np.float32(1)}, "best is 'error', expected .*; did you mean errors"),
        ({"error": np.ones(2)}, "best is 'error', which has 2 values, one for each seed"),
    ],
)
def test_the_best_is_a_single_number_that_is_measured(measured, expected):
    with pytest.raises(InputError, match=expected):
        fit(STEP, start(), rows, steps=2, watch=Watch(1, lambda variables: measured, best=("error", "min")))


@pytest.mark.parametrize("place", ["params", "extra"])
@pytest.mark.parametrize("save_at", [(2, 5), (2,)])
def test_what_is_not_finite_is_neither_saved_nor_returned(place, save_at):
    def step(state, batch):
        bad = {"w": jnp.where(state.step >= 3, jnp.nan, jnp.ones(2))}
        return state._replace(step=state.step + 1, **{place: bad}), {"loss": jnp.zeros([])}

    log, state = Log(save_at=save_at), start()._replace(**{place: {"w": jnp.ones(2)}})
    at = 5 if 5 in save_at else 10
    with pytest.raises(NonFiniteError, match=f"a parameter or statistic is NaN or infinite at step {at}"):
        fit(step, state, rows, steps=10, run=log)
    assert [step for step, *_ in log.saves] == [2]


def test_watch_and_early_stopping_freeze_each_seed():
    tx, seeds = optax.sgd(0.05), (0, 1, 2)
    states = jax.tree.map(lambda *x: jnp.stack(x), *[start(s, tx) for s in seeds])
    script = iter(np.float32([[5, 5, 5], [4, 6, 4], [3, 7, 3], [2, 8, 4], [1, 9, 5], [0, 9, 9]]))
    seen = []

    def measure(variables):
        seen.append(np.asarray(variables["params"]["w"]))
        return {"error": next(script)}

    rule = optim.early_stopping("error", patience=2, mode="min", seeds=3)
    batches = lambda i: jax.tree.map(lambda x: np.stack([x] * 3), rows(i))
    step = per_seed(make_step(loss, tx))
    state = fit(step, states, batches, steps=12, watch=Watch(2, measure), stop=rule)
    assert state.step.tolist() == [12, 6, 10]  # seed 1 worsens at once, seed 2 from its fourth measurement
    np.testing.assert_array_equal(state.params["w"][1], seen[2][1])
    np.testing.assert_array_equal(state.params["w"][2], seen[4][2])


def test_fit_ends_when_every_seed_has_stopped():
    rule = optim.early_stopping("error", patience=1, mode="min")
    asked = []
    batches = lambda i: asked.append(i) or rows(i)
    watch = Watch(2, lambda variables: {"error": np.float32(len(asked))})
    log = Log()
    state = fit(STEP, start(), batches, steps=100, watch=watch, stop=rule, run=log)
    assert state.step == 4
    assert asked == [0, 1, 2, 3]
    told = {name: step for step, report in log.reports for name in report}
    assert told["loss"] == 4  # between two reports


def test_a_step_may_be_an_epoch_without_a_gradient():
    """k-means by Lloyd's algorithm, against NumPy; the points are an argument of the program."""

    def kmeans(points, state, batch):  # [N, D]
        squares = ((points[:, None] - state.params) ** 2).sum(-1)  # [N, K]
        mine = jax.nn.one_hot(squares.argmin(-1), len(state.params))
        centres = mine.T @ points / mine.sum(0)[:, None]
        return state._replace(step=state.step + 1, params=centres), {"inertia": squares.min(-1).mean()}

    points, expected, inertias = RECORDS["x"], RECORDS["x"][:4].astype(np.float64), []
    for _ in range(5):
        squares = ((points[:, None] - expected) ** 2).sum(-1)
        inertias.append(squares.min(-1).mean())
        expected = np.stack([points[squares.argmin(-1) == k].mean(0) for k in range(4)])
    log, state = Log(), plain_state(jax.random.key(0), jnp.asarray(points[:4]))
    state = fit(holding(kmeans, jnp.asarray(points)), state, no_data, steps=5, every=1, run=log)
    np.testing.assert_allclose(state.params, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([report["inertia"] for _, report in log.reports], inertias, rtol=1e-5)


def test_seeds_may_have_no_optimiser_and_no_data():
    """Each seed counts its own steps, and draws from its own key."""
    keys = jax.random.split(jax.random.key(0), 2)

    def walk(state, batch):
        assert batch == {}
        key = jax.random.fold_in(state.key, state.step)
        return state._replace(step=state.step + 1, params=state.params + jax.random.normal(key)), {}

    state = fit(jax.vmap(walk, (0, None)), plain_state(keys, jnp.zeros(2)), no_data, steps=3, run=Log())
    assert state.step.tolist() == [3, 3]
    drawn = [sum(jax.random.normal(jax.random.fold_in(key, i)) for i in range(3)) for key in keys]
    np.testing.assert_allclose(state.params, drawn, rtol=1e-5)


def test_a_step_may_be_a_rollout():
    """A walker climbs by 1; an episode ends at 5, after 5 steps. A rollout of 3 steps sees an end, or not."""

    def rollout(state, batch):
        def walk(height, _):
            height = height + 1
            ended = height == 5
            return jnp.where(ended, 0, height), (jnp.where(ended, 5.0, 0.0), ended)

        height, (returns, ended) = jax.lax.scan(walk, state.extra["height"], length=3)
        metrics = {"return": (returns.sum(), ended.sum())}
        return state._replace(step=state.step + 1, extra={"height": height}), metrics

    log, state = Log(), State(jnp.int32(0), {}, {"height": jnp.int32(0)}, (), jax.random.key(0))
    state = fit(rollout, state, no_data, steps=5, every=1, run=log)
    assert state.extra["height"] == 0  # 15 steps, three episodes
    assert [report.get("return") for _, report in log.reports] == [None, 5, None, 5, 5]  # ends at steps 5, 10 and 15


PAIRS = per_seed(
    make_step(
        lambda variables, batch, key: (
            loss(variables, batch, key)[0],
            (
                {},
                {
                    "bias": loss(variables, batch, key)[1][1]["bias"],
                    "rare": (batch["y"][0], jnp.float32(batch["y"][0] > 0)),
                },
            ),
        ),
        ADAM,
    )
)


def timeless(reports):
    """The reports without what a clock has measured."""
    return [
        (step, {k: v for k, v in found.items() if k not in ("steps_per_second", "data_wait")})
        for step, found in reports
    ]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cut", [1, 4, 6, 7, 12])
def test_a_resumed_fit_reports_the_means_of_one_that_went_on(cut, skip):
    """Also of pairs of which one window has none, of seeds, and where some steps are not finite."""
    states = jax.vmap(lambda key: start()._replace(key=key))(jax.random.split(jax.random.key(0), 2))
    states = states._replace(extra={})

    def batches(i):
        batch = {name: np.stack([value, -value]) for name, value in rows(i).items()}
        batch["y"] = np.where(skip and i in (2, 5), np.nan, batch["y"]).astype(np.float32)
        return batch

    whole, first, second = Log(skip=skip), Log((cut,), skip), Log(skip=skip)
    settings = {"every": 7, "steps": 14, "watch": Watch(3, lambda variables: {"zero": np.zeros(2)})}
    fit(PAIRS, states, batches, run=whole, **settings)
    fit(PAIRS, states, batches, run=first, **settings)
    second.begin = Snapshot(*first.snapshots[cut])
    fit(PAIRS, states, batches, run=second, **settings)
    kept = [(step, found) for step, found in first.reports if step <= cut]
    for (step, found), (other, wanted) in zip(timeless(kept + second.reports), timeless(whole.reports), strict=True):
        assert step == other
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{name} at {step}")


def test_a_fit_that_resumes_with_more_steps_a_call_reports_the_means_of_all_steps():
    states = jax.vmap(lambda key: start()._replace(key=key))(jax.random.split(jax.random.key(0), 2))._replace(extra={})
    batches = lambda i: {name: np.stack([value, -value]) for name, value in rows(i).items()}
    whole, first, second = Log(), Log((4,)), Log()
    fit(PAIRS, states, batches, run=whole, every=12, steps=12)
    fit(PAIRS, states, batches, run=first, every=12, steps=12)
    second.begin = Snapshot(*first.snapshots[4])
    fit(PAIRS, states, batches, run=second, every=12, steps=12, scan=4)
    ((_, found),), ((_, wanted),) = timeless(second.reports), timeless(whole.reports)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)


def test_steps_in_a_row_that_are_not_finite_are_counted_across_a_resume():
    poison = lambda i: {**rows(i), "y": np.full(8, np.nan, np.float32)} if i >= 2 else rows(i)
    first, second = Log((8,), skip=True), Log(skip=True)
    with pytest.raises(NonFiniteError, match="at step 12 and 9 times in a row before"):
        fit(STEP, start(), poison, steps=20, run=first)
    second.begin = Snapshot(*first.snapshots[8])
    with pytest.raises(NonFiniteError, match="at step 12 and 9 times in a row before"):
        fit(STEP, start(), poison, steps=20, run=second)
