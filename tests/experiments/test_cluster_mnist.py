"""experiments/generative/cluster_mnist.py: a round of deep embedded clustering, and what is refused."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax import classify
from dl_jax.core.errors import InputError
from dl_jax.core.step import init_variables, plain_state
from dl_jax.harness.run import Preempted, Run, Settings
from dl_jax.models.generative.autoencoder import DenseAutoencoder

MODEL = DenseAutoencoder((5,), 2, (3, 3, 1))
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 3, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("generative/cluster_mnist")


@pytest.fixture(scope="module")
def trees():
    """The parameters of two seeds' encoders and centres."""
    params = init_variables(MODEL, jax.random.split(jax.random.key(0), 2), jnp.zeros((1, 3, 3, 1)))["params"]
    encoder = {name: layer for name, layer in params.items() if name.startswith("encoder")}
    return {"encoder": encoder, "centres": jax.random.normal(jax.random.key(1), (2, 3, 2))}


def test_a_round_is_sgd_towards_a_fixed_target(experiment, trees):
    params = jax.tree.map(lambda leaf: leaf[0], trees)
    tx = optax.sgd(0.3, 0.9)
    state = plain_state(jax.random.key(7), params)._replace(opt_state=tx.init(params))
    step = jax.jit(lambda state: experiment.embedding_round(MODEL, tx, (2, 5), jnp.asarray(IMAGES), state, {}))
    new, measured = step(state)

    def soft(params, rows):
        encoder = params["encoder"]
        x = jnp.asarray(IMAGES, jnp.float32)[rows].reshape(len(rows), -1) / 255
        x = jax.nn.relu(x @ encoder["encoder_0"]["kernel"] + encoder["encoder_0"]["bias"])
        z = x @ encoder["encoder_1"]["kernel"] + encoder["encoder_1"]["bias"]
        kernel = 1 / (1 + ((z[:, None] - params["centres"]) ** 2).sum(-1))
        return kernel / kernel.sum(-1, keepdims=True)

    q = np.asarray(soft(params, np.arange(12)), np.float64)
    weight = q**2 / q.sum(0)
    target = weight / weight.sum(1, keepdims=True)
    rows = np.asarray(jax.random.permutation(jax.random.fold_in(state.key, 0), 12))[:10].reshape(2, 5)
    velocity, values = jax.tree.map(jnp.zeros_like, params), []
    loss = jax.jit(jax.value_and_grad(lambda params, p, rows: (p * jnp.log(p / soft(params, rows))).sum(-1).mean()))
    for each in rows:
        value, grads = loss(params, target[each].astype(np.float32), each)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - 0.3 * v, params, velocity)
        values.append(value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new.params, params)
    np.testing.assert_allclose(measured["divergence"], np.mean(values), rtol=1e-4)
    assert new.step == 1


def test_rounds_resume_where_they_were(experiment, trees, tmp_path):
    config = dataclasses.replace(experiment.PRESETS["smoke"], rounds=4, batch_size=4, dec_rate=0.1)
    keys = jax.random.split(jax.random.key(0), 2)
    decoder = {"decoder_0": trees["encoder"]["encoder_0"]}  # which is left out
    params = {**trees["encoder"], **decoder}
    train = lambda run: experiment.sharpened(config, run, MODEL, params, trees["centres"], IMAGES, keys)
    whole = train(Run(settings=Settings(seeds=(0, 1))))
    settings = Settings(seeds=(0, 1), preempted=lambda step: step == 2)
    with pytest.raises(Preempted), contextlib.closing(Run(epath.Path(tmp_path), settings)) as run:
        train(run)
    with contextlib.closing(Run(epath.Path(tmp_path), Settings(seeds=(0, 1)))) as run:
        resumed = train(run)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert whole["encoder"].keys() == trees["encoder"].keys()


def test_points_of_all_seeds_or_of_each(experiment):
    """Seeds that share their points differ in their starts; the same key on a seed's own points is the same."""
    config = dataclasses.replace(experiment.PRESETS["smoke"], clusters=3, passes=6)
    x = classify.to_unit(IMAGES).reshape(12, 9)
    keys = jax.random.split(jax.random.key(0), 2)
    shared, own = (
        experiment.clustered(config, Run(settings=Settings(seeds=(0, 1))), np.asarray(points), keys)
        for points in (x, np.stack([x, x]))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), shared, own)
    centres, clusters = shared
    for of_seed, labels in zip(centres, clusters, strict=True):
        for k in range(3):
            np.testing.assert_allclose(of_seed[k], np.asarray(x)[labels == k].mean(0), atol=1e-5)


def test_the_most_certain_points_of_each_cluster(experiment):
    soft = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    assert experiment.most_certain(soft, 2).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"clusters": 101},
            "^clusters is 101, expected 1 to 100, the number of points; change it",
        ),
        (
            {"updates": 7},
            r"^a round of 7 updates takes 112 images, expected at most 100, those of train.*; lower updates",
        ),
    ],
)
def test_bad_input_is_one_line_before_any_training(experiment, changes, expected, monkeypatch):
    monkeypatch.setattr(experiment, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=expected):
        experiment.main(dataclasses.replace(experiment.PRESETS["smoke"], **changes), Run())
