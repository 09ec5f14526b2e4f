"""n devices are one device, for the step, the augmentation's randomness and BatchNorm; pmap is jit."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax import data, losses
from dl_jax.core import devices
from dl_jax.core import fit as fit_module
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.pmap import pmapped
from dl_jax.core.step import State, holding, init_state, make_step, per_seed
from dl_jax.core.stream import Stream

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
    """[S, B, ...] split over its rows; a carried collection [S, B] is split as the batch is."""

    def carrying(variables, batch, key):
        value, (_, metrics) = loss_of(Plain())({"params": variables["params"]}, batch, key)
        return value, ({"carry": {"sum": variables["carry"]["sum"] + batch["label"]}}, metrics)

    tx = optax.adam(1e-2)
    state = start(Plain(), tx)._replace(extra={"carry": {"sum": jnp.arange(16)}})
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    step, stream = per_seed(make_step(carrying, tx)), data.shuffled(RECORDS, 16, seeds=(0, 1))
    one = fit(step, states, lambda i: stream(i), steps=3)
    eight = fit(step, states, stream, steps=3, every=3, scan=scan, carried=("carry",))
    assert eight.extra["carry"]["sum"].sharding.shard_shape((2, 16)) == (2, 2)
    np.testing.assert_array_equal(one.extra["carry"]["sum"], eight.extra["carry"]["sum"])
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "said"), [(16, ""), (20, "a batch of 20 is split over 5 of 8 devices\n")])
def test_devices_that_stand_idle_are_named(size, said, capsys):
    tx = optax.sgd(0.1)
    fit(make_step(loss_of(Plain()), tx), start(Plain(), tx), data.shuffled(RECORDS, size, 0), steps=0)
    assert capsys.readouterr().err == said


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


@pytest.mark.parametrize("size", [0, 4, 12])
def test_a_batch_that_the_devices_do_not_divide_is_named(size):
    with pytest.raises(InputError, match=rf"batch size {size} cannot be split over 8 devices, .*--batch-size \d+"):
        devices.process_rows(size, devices.data_mesh())


@pytest.mark.parametrize(("size", "expected"), [(128, 8), (100, 5), (60, 6), (1, 1), (11, 1)])
def test_a_mesh_for_a_batch_has_as_many_devices_as_divide_it(size, expected):
    mesh = devices.data_mesh(batch_size=size)
    assert mesh.devices.tolist() == jax.devices()[:expected]
    assert devices.process_rows(size, mesh) == slice(0, size)


def test_each_process_gives_as_many_devices_to_a_mesh():
    device = dataclasses.make_dataclass("Device", ["process_index", "id"], frozen=True)
    scattered = [device(p, 4 * p + i) for i in range(4) for p in (1, 0)]
    assert [d.id for d in devices.data_mesh(scattered, batch_size=18).devices] == [0, 1, 2, 4, 5, 6]
    assert [d.id for d in devices.data_mesh(scattered, batch_size=5).devices] == [0, 4]  # process_rows refuses these


def test_process_rows_of_one_process_are_all():
    assert devices.process_rows(16, devices.data_mesh()) == slice(0, 16)


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
    for place in (devices.place, devices.replicated):
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
