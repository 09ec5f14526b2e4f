"""n devices are one device, for the step, the augmentation's randomness and BatchNorm; pmap is jit."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax import data, losses, metrics
from dl_jax.core import devices
from dl_jax.core import fit as fit_module
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector, evaluator
from dl_jax.core.fit import fit
from dl_jax.core.pmap import pmapped
from dl_jax.core.program import layout_of
from dl_jax.core.recorder import Recorder
from dl_jax.core.step import State, holding, init_state, init_states, make_step, per_seed, plain_state
from dl_jax.core.stream import Stream, no_data

RECORDS = {
    "image": np.random.default_rng(0).random((64, 8, 8, 1), np.float32),
    "label": np.random.default_rng(1).integers(0, 10, 64),
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, *, train: bool):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(image))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.3, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, image, *, train: bool):
        return nn.Dense(10)(nn.relu(nn.Conv(4, (3, 3))(image)).reshape(len(image), -1))


def loss_of(model):
    def loss(variables, batch, key):
        logits, new = model.apply(variables, batch["image"], train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        return losses.cross_entropy(logits, batch["label"]).mean(), (new, {})

    return loss


def noise(key, batch):
    return {**batch, "image": batch["image"] + 0.1 * jax.random.normal(key, batch["image"].shape)}


def start(model, tx):
    variables = jax.jit(lambda key: model.init(key, RECORDS["image"][:1], train=False))(jax.random.key(0))
    return init_state(jax.random.key(1), variables, tx)


def rows(step, size=16):
    index = (np.arange(size) + step * size) % 64
    return {name: column[index] for name, column in RECORDS.items()}


STREAM = Stream(16, lambda step, slice_: {name: column[slice_] for name, column in rows(step).items()})


@pytest.mark.parametrize(("microbatches", "scan"), [(1, 1), (2, 1), (1, 5)])
def test_eight_devices_equal_one(microbatches, scan):
    """A stream is split over all devices, a plain function of the step stays on one."""
    tx = optax.adam(1e-2)
    step = make_step(losses.with_batch(loss_of(Net()), noise), tx, microbatches)
    one = fit(step, start(Net(), tx), rows, steps=5)
    eight = fit(step, start(Net(), tx), STREAM, steps=5, every=5, scan=scan)
    assert len(jax.tree.leaves(one.params)[0].sharding.device_set) == 1
    assert len(jax.tree.leaves(eight.params)[0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(eight.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [1, 3])
def test_seeds_times_devices_equal_one_device(scan):
    """[S, B, ...] split over its seeds, then its rows; a carried collection [S, B] is split as the batch is."""

    def carrying(variables, batch, key):
        value, (_, metrics) = loss_of(Plain())({"params": variables["params"]}, batch, key)
        return value, ({"carry": {"sum": variables["carry"]["sum"] + batch["label"]}}, metrics)

    tx = optax.adam(1e-2)
    state = start(Plain(), tx)._replace(extra={"carry": {"sum": jnp.arange(16)}})
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    step, stream = per_seed(make_step(carrying, tx)), data.shuffled(RECORDS, 16, seeds=(0, 1))
    one = fit(step, states, lambda i: stream(i), steps=3)
    eight = fit(step, states, stream, steps=3, every=3, scan=scan, carried=("carry",))
    assert eight.extra["carry"]["sum"].sharding.shard_shape((2, 16)) == (1, 4)
    np.testing.assert_array_equal(one.extra["carry"]["sum"], eight.extra["carry"]["sum"])
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.mark.parametrize("one_by_one", [False, True])
def test_seeds_over_devices_equal_one_device_and_do_not_communicate(one_by_one, monkeypatch):
    tx, keys, texts = optax.sgd(1e-2, 0.9), jax.random.split(jax.random.key(0), 16), []
    states = jax.vmap(lambda key: init_state(key, Net().init(key, RECORDS["image"][:1], train=False), tx))(keys)
    step = per_seed(make_step(losses.with_batch(loss_of(Net()), noise), tx), one_by_one)
    stream = data.shuffled(RECORDS, 12, seeds=range(16))
    one = fit(step, states, lambda i: stream(i), steps=4)
    advance = fit_module._advance

    def listening(*given):
        texts.append(advance.lower(*given).compile().as_text())
        return advance(*given)

    listening.lower = advance.lower
    monkeypatch.setattr(fit_module, "_advance", listening)
    eight = fit(step, states, stream, steps=4)
    assert not any(word in texts[0] for word in COLLECTIVES)
    assert {x.sharding.shard_shape(x.shape)[0] for x in jax.tree.leaves(eight.variables)} == {2}
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(eight.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def measure(variables, batch, key):
        logits: Any = Net().apply(variables, batch["image"], train=False)
        return {"loss": metrics.masked(losses.cross_entropy(logits, batch["label"]), batch["mask"])}

    keys = jax.random.split(jax.random.key(1), 16)
    found = [evaluator(measure, RECORDS, 12, keys)(state.variables)["loss"] for state in (one, eight)]
    np.testing.assert_allclose(*found, rtol=1e-5)
    predict = lambda variables, batch: Net().apply(variables, batch["image"], train=False)
    found = [collector(predict, 12)(state.variables, RECORDS) for state in (one, eight)]
    assert found[0].shape == (16, 64, 10)
    constant = collector(lambda variables, batch: jnp.ones((12, 200)), 12)(eight.variables, RECORDS)
    assert constant.shape == (16, 64, 200)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


class Wide(nn.Module):
    """Has two large kernels, whose longest axes differ, beside small leaves."""

    @nn.compact
    def __call__(self, image, *, train: bool):
        return nn.Dense(10)(nn.relu(nn.Dense(1024)(nn.relu(nn.Dense(512)(image.reshape(len(image), -1))))))


class Sharded(Recorder):
    fsdp = True


@pytest.mark.parametrize(("seeds", "shard"), [(None, (512, 128)), (2, (1, 512, 256))])
def test_a_state_that_is_split_over_the_rows_devices_equals_one_that_is_not(seeds, shard):
    # Adam divides a gradient by its own size: where that is rounding alone, the order of a sum would decide the sign.
    tx = optax.adam(1e-3, eps=1e-3)
    step, state = make_step(loss_of(Wide()), tx), start(Wide(), tx)
    stream = STREAM
    if seeds:
        state, step = jax.tree.map(lambda x: jnp.stack([x] * seeds), state), per_seed(step)
        stream = data.shuffled(RECORDS, 16, seeds=range(seeds))
    whole = fit(step, state, lambda i: stream(i), steps=4)
    found = fit(step, state, stream, steps=4, run=Sharded())
    kernel = found.params["Dense_1"]["kernel"]  # [512, 1024]
    assert kernel.sharding.shard_shape(kernel.shape) == shard
    moment = found.opt_state[0].mu["Dense_1"]["kernel"]
    assert moment.sharding == kernel.sharding
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_large_enough_to_split_is_named():
    tx = optax.sgd(0.1)
    with pytest.raises(InputError, match=r"^--fsdp finds nothing to split over 8 devices: .* has 2560 numbers"):
        fit(make_step(loss_of(Plain()), tx), start(Plain(), tx), STREAM, steps=1, run=Sharded())


@pytest.mark.parametrize(
    ("batch_size", "seeds", "shape"),
    [
        (128, 1, (1, 8)),
        (128, 5, (1, 8)),
        (100, 5, (5, 1)),
        (12, 4, (4, 2)),
        (3, 16, (8, 1)),
        (7, 3, (1, 7)),
        (1, 1, (1, 1)),
    ],
)
def test_seeds_are_split_first_and_rows_second(batch_size, seeds, shape):
    assert devices.data_mesh(batch_size=batch_size, seeds=seeds).devices.shape == shape


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("batch_size", [3, 8, 24])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_blocks_of_all_processes_are_the_batch(processes, batch_size, seeds, monkeypatch):
    device = dataclasses.make_dataclass("Device", ["process_index", "id", "platform"], frozen=True)
    mesh = devices.data_mesh(
        [device(p, i, "cpu") for p in range(processes) for i in range(4)], batch_size=batch_size, seeds=seeds
    )
    times = np.zeros((seeds, batch_size), int)
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        try:
            block = devices.own(mesh, batch_size, seeds)
        except InputError:
            assert batch_size % processes  # it fits no mesh
            return
        times[block.seeds, block.rows] += 1
    assert (times == 1).all()


@pytest.mark.parametrize(("size", "said"), [(16, ""), (20, "a batch of 20 is split over 5 of 8 devices\n")])
def test_devices_that_stand_idle_are_named(size, said, capsys):
    tx = optax.sgd(0.1)
    fit(make_step(loss_of(Plain()), tx), start(Plain(), tx), data.shuffled(RECORDS, size, 0), steps=0)
    assert capsys.readouterr().err == said


def test_a_plain_function_of_the_step_takes_states_from_fewer_devices():
    """Such as parameters that a fit with another batch size has learned."""
    step = lambda held, states, batch: per_seed(advanced, one_by_one=True)(states, batch)
    advanced = lambda state, batch: (state._replace(step=state.step + 1, params=2 * state.params), {})
    mesh, params = devices.data_mesh(batch_size=5, seeds=3), jnp.ones((3, 2))
    assert mesh.devices.size < jax.device_count()
    few = devices.put(params, devices.states_over(params, mesh, 3))
    states = init_states(jax.random.split(jax.random.key(0), 3), {"params": few}, optax.sgd(0.1))
    done = fit(holding(step, np.ones(3)), states, lambda i: {}, steps=2)
    np.testing.assert_array_equal(done.params, np.full((3, 2), 4))


def test_without_data_the_state_of_several_processes_lies_on_all_devices(monkeypatch):
    """One array, which all of them save together; that of a single process stays where it is."""
    state = plain_state(jax.random.split(jax.random.key(0), 3), jnp.ones((3, 2)))
    assert layout_of(state, no_data, (), fsdp=False).shardings is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lies = jax.tree.leaves(layout_of(state, no_data, (), fsdp=False).shardings)
    assert len(lies) == 3
    assert all(each.is_fully_replicated and len(each.device_set) == jax.device_count() for each in lies)


@pytest.mark.parametrize("where", ["on five devices", "on the host"])
def test_what_a_step_holds_is_placed_once_where_the_batches_are(where, monkeypatch):
    """A teacher comes from a fit with another batch size, or from a file."""
    held, seen = {"scale": np.full(3, 2, np.float32)}, []
    if where == "on five devices":
        held = devices.replicated(held, devices.data_mesh(batch_size=5))
    advance = fit_module._advance
    monkeypatch.setattr(fit_module, "_advance", lambda program, *rest: seen.append(program) or advance(program, *rest))

    def step(held, state, batch):
        return state._replace(step=state.step + 1), {"sum": (held["scale"] * batch["x"]).sum()}

    state = State(jnp.int32(0), {}, {}, (), jax.random.key(0))
    stream = Stream(8, lambda i, rows: {"x": np.ones((8, 3), np.float32)[rows]})
    fit(holding(step, held), state, stream, steps=2)
    first, second = (jax.tree.leaves(program)[0] for program in seen)
    assert first is second
    assert len(first.sharding.device_set) == 8


def test_pmapped_equals_jit():
    tx = optax.adam(1e-2)
    state, loss = start(Plain(), tx), loss_of(Plain())
    expected = fit(make_step(loss, tx), state, rows, steps=4)
    step = pmapped(loss, tx)
    states = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    norms = []
    for i in range(4):
        batch = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), rows(i))
        states, metrics = step(states, batch)
        norms.append(float(metrics["grad_norm"][0]))
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(states.params), strict=True):
        for device in range(8):
            np.testing.assert_allclose(a, b[device], rtol=1e-5, atol=1e-5)
    _, metrics = make_step(loss, tx)(fit(make_step(loss, tx), state, rows, steps=3), rows(3))
    np.testing.assert_allclose(norms[-1], metrics["grad_norm"], rtol=1e-5)


def test_pmapped_gives_the_optimiser_the_mean_loss():
    """Each device alone would halve its rate at another step, or never."""
    tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(0.5, patience=1))
    loss = lambda variables, batch, key: (batch["loss"].mean() + 0 * variables["params"].sum(), ({}, {}))
    state = init_state(jax.random.key(0), {"params": jnp.zeros(1)}, tx)
    states, step = jax.tree.map(lambda x: jnp.stack([x] * 8), state), pmapped(loss, tx)
    each = np.arange(8, dtype=np.float32)
    for column, scale in ((0 * each + 40, 1), (40 - each, 1), (33 + each, 0.5), (40 - each, 0.25)):
        states, _ = step(states, {"loss": column[:, None]})
        np.testing.assert_array_equal(optax.tree.get(states.opt_state, "scale"), np.full(8, scale))


@pytest.mark.parametrize("size", [0, 4, 12])
def test_a_batch_that_the_devices_do_not_divide_is_named(size):
    with pytest.raises(InputError, match=rf"batch size {size} cannot be split over 8 devices, .*--batch-size \d+"):
        devices.own(devices.data_mesh(), size)


@pytest.mark.parametrize(("size", "expected"), [(128, 8), (100, 5), (60, 6), (1, 1), (11, 1)])
def test_a_mesh_for_a_batch_has_as_many_devices_as_divide_it(size, expected):
    mesh = devices.data_mesh(batch_size=size)
    assert mesh.devices.tolist() == [jax.devices()[:expected]]
    assert devices.own(mesh, size).rows == slice(0, size)


def test_each_process_gives_as_many_devices_to_a_mesh():
    device = dataclasses.make_dataclass("Device", ["process_index", "id", "platform"], frozen=True)
    scattered = [device(p, 4 * p + i, "cpu") for i in range(4) for p in (1, 0)]
    assert [d.id for d in devices.data_mesh(scattered, batch_size=18).devices.flat] == [0, 1, 2, 4, 5, 6]
    assert [d.id for d in devices.data_mesh(scattered, batch_size=5).devices.flat] == [0, 4]  # `own` refuses these


@pytest.mark.parametrize(
    ("batch_size", "seeds", "by_process", "expected"),
    [
        (60, 1, True, (1, 4)),
        (60, 5, False, (5, 2)),
        (250, 5, False, (5, 2)),
        (60, 3, True, (1, 4)),
        (64, 1, True, (1, 16)),
    ],
)
def test_the_rows_on_tpus_are_over_a_divisor_of_all_chips(batch_size, seeds, by_process, expected):
    device = dataclasses.make_dataclass("Device", ["process_index", "id", "platform"], frozen=True)
    chips = [device(i // 4, i, "tpu") for i in range(16)]
    mesh = devices.data_mesh(chips, batch_size=batch_size, seeds=seeds, by_process=by_process)
    assert mesh.devices.shape == expected


def test_process_rows_of_one_process_are_all():
    assert devices.own(devices.data_mesh(), 16).rows == slice(0, 16)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (np.array([b"one", b"three"]), "bytes40"),
        (np.array(["one", "three"]), "str160"),
        (np.array([{}, "x"], object), "object"),
        (np.array(["2020-01-01", "2021-01-01"], "datetime64[D]"), r"datetime64\[D\]"),
        (np.array(["one", "three"], np.dtypes.StringDType()), "StringDType.*"),
        (np.zeros(2, [("x", "i4")]), "void32"),
    ],
    ids=["bytes", "str", "object", "times", "strings", "records"],
)
def test_columns_that_no_device_holds_are_named(column, kind):
    records = {"label": np.arange(2), "objects": {"name": column}}
    mesh = devices.data_mesh(batch_size=2)
    placed = lambda tree, mesh: devices.place(tree, devices.rows_over(mesh, seeds=False), (2,))
    for place in (placed, devices.replicated):
        with pytest.raises(
            InputError, match=f"^column 'objects/name' is {kind}, expected a numeric dtype.* leave the column"
        ):
            place(records, mesh)


@pytest.mark.parametrize("scan", [1, 2])
def test_a_fit_on_texts_says_so_in_a_line(scan):
    records = {**RECORDS, "name": np.full(64, b"text")}
    tx = optax.sgd(0.1)
    with pytest.raises(InputError, match=r"column 'name' is .* encode it as integers"):
        fit(make_step(loss_of(Plain()), tx), start(Plain(), tx), data.shuffled(records, 16, 0), steps=2, scan=scan)
