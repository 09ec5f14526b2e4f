"""n devices are one device, for the step, the augmentation's randomness and BatchNorm; pmap is jit."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax import losses
from dl_jax import metrics as measures
from dl_jax.core import devices
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluate
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step, per_seed

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


def train_on(n, steps=5, microbatches=1):
    mesh = devices.data_mesh(jax.devices()[:n])
    tx = optax.adam(1e-2)
    step = make_step(losses.with_batch(loss_of(Net()), noise), tx, microbatches)
    state = devices.replicated(start(Net(), tx), mesh)
    return fit(step, state, devices.placed(rows, mesh), steps=steps)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_eight_devices_equal_one(microbatches):
    one, eight = train_on(1, microbatches=microbatches), train_on(8, microbatches=microbatches)
    assert len(jax.tree.leaves(eight.params)[0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(eight.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_lanes_times_devices_equal_one_device():
    """[S, B, ...] split over its rows."""
    tx = optax.adam(1e-2)
    step = per_seed(make_step(loss_of(Plain()), tx))
    state = jax.tree.map(lambda x: jnp.stack([x, x]), start(Plain(), tx))
    stacked = lambda i: jax.tree.map(lambda a, b: np.stack([a, b]), rows(i), rows(i + 1))
    mesh = devices.data_mesh()
    one = fit(step, state, stacked, steps=3)
    eight = fit(step, devices.replicated(state, mesh), devices.placed(stacked, mesh, axis=1), steps=3)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_evaluation_on_eight_devices_equals_one():
    model, tx = Plain(), optax.sgd(0.1)
    variables = start(model, tx).variables

    def measure(variables, batch, key):
        logits = model.apply(variables, batch["image"], train=False)
        return {"nats": measures.cross_entropy(logits, batch["label"], jnp.ones(len(logits)))}

    def on(n):
        mesh = devices.data_mesh(jax.devices()[:n])
        batches = [devices.place(rows(i), mesh) for i in range(4)]
        return evaluate(measure, devices.replicated(variables, mesh), batches, jax.random.key(0))["nats"]

    np.testing.assert_allclose(on(8), on(1), rtol=1e-6)


def test_pmapped_equals_jit():
    tx = optax.adam(1e-2)
    state, loss = start(Plain(), tx), loss_of(Plain())
    expected = fit(make_step(loss, tx), state, rows, steps=4)
    step = devices.pmapped(loss, tx)
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


@pytest.mark.parametrize(("size", "devices"), [(128, 8), (100, 5), (60, 6), (1, 1), (11, 1)])
def test_a_mesh_for_a_batch_has_as_many_devices_as_divide_it(size, devices, capsys):
    mesh = devices.data_mesh(batch_size=size)
    assert (f"a batch of {size} is split over {devices} of 8 devices" in capsys.readouterr().err) == (devices < 8)
    assert mesh.devices.tolist() == jax.devices()[:devices]
    assert devices.process_rows(size, mesh) == slice(0, size)


def test_each_process_gives_as_many_devices_to_a_mesh():
    device = dataclasses.make_dataclass("Device", ["process_index", "id"], frozen=True)
    scattered = [device(p, 4 * p + i) for i in range(4) for p in (1, 0)]
    assert [d.id for d in devices.data_mesh(scattered, batch_size=18).devices] == [0, 1, 2, 4, 5, 6]
    assert [d.id for d in devices.data_mesh(scattered, batch_size=5).devices] == [0, 4]  # process_rows refuses these


def test_process_rows_of_one_process_are_all():
    assert devices.process_rows(16, devices.data_mesh()) == slice(0, 16)
