"""Evaluation: every example once, each seed with its own variables and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import metrics
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector, evaluator

RECORDS = {
    "x": np.random.default_rng(0).normal(size=(61, 3)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=61).astype(np.float32),
}
VARIABLES = {"params": {"w": np.random.default_rng(2).normal(size=(2, 3)).astype(np.float32)}}  # of two seeds
KEYS = jax.vmap(jax.random.key)(np.arange(2))


def error(variables, batch, key):
    residual = batch["x"] @ variables["params"]["w"] - batch["y"]
    return {"squared": metrics.masked(residual**2, batch["mask"]), "rows": (batch["mask"].sum(), jnp.float32(1))}


@pytest.mark.parametrize("batch_size", [1, 7, 16, 61, 64])  # on 1, 7, 8, 1 and 8 devices
def test_every_example_counts_once_whatever_the_batch_size(batch_size):
    found = evaluator(error, RECORDS, batch_size, KEYS)(VARIABLES)
    residual = RECORDS["x"].astype(np.float64) @ VARIABLES["params"]["w"].T - RECORDS["y"][:, None]  # [N, S]
    np.testing.assert_allclose(found["squared"], (residual**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["rows"] * -(-61 // batch_size), [61, 61])


def test_a_mean_over_nothing_is_nan_without_a_warning():
    never = lambda variables, batch, key: {"of_class_7": (jnp.zeros([]), jnp.zeros([]))}
    assert np.isnan(evaluator(never, RECORDS, 32, KEYS)(VARIABLES)["of_class_7"]).all()


def test_batch_i_of_a_seed_has_the_key_fold_in_i():
    noise = lambda variables, batch, key: {"noise": (jax.random.normal(key, (3,)), jnp.ones(3))}
    found = evaluator(noise, RECORDS, 32, KEYS)(VARIABLES)["noise"]
    keys = [[jax.random.fold_in(jax.random.key(seed), i) for i in range(2)] for seed in range(2)]
    expected = [np.mean([jax.random.normal(key, (3,)) for key in each], 0) for each in keys]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [16, 60])
def test_variables_that_lie_on_other_devices_are_fetched(batch_size):
    there = jax.device_put(VARIABLES, jax.devices()[3])
    here = evaluator(error, RECORDS, batch_size, KEYS)
    np.testing.assert_allclose(here(there)["squared"], here(VARIABLES)["squared"], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_a_collector_gives_each_seeds_answers_in_order_without_padding(batch_size):
    predict = lambda variables, batch: {"y": batch["x"] @ variables["params"]["w"], "x": batch["x"]}
    found = collector(predict, batch_size)(VARIABLES, RECORDS)
    np.testing.assert_allclose(found["y"], VARIABLES["params"]["w"] @ RECORDS["x"].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["x"], [RECORDS["x"], RECORDS["x"]])
    assert isinstance(found["x"], np.ndarray)


def test_a_collector_is_traced_once_for_each_shape():
    traced = []
    answers = collector(lambda variables, batch: (traced.append(batch["x"].shape), batch["x"] + 0)[1], 4)
    for n in (4, 9, 9):
        assert answers(VARIABLES, {"x": np.zeros((n, 3))}).shape == (2, n, 3)
    answers(VARIABLES, {"x": np.zeros((4, 5))})
    assert traced == [(4, 3), (4, 5)]


@pytest.mark.parametrize("records", [{"mask": np.zeros(3)}, {"x": np.zeros(0)}, {"x": np.zeros(2), "y": np.zeros(3)}])
def test_records_that_make_no_batch_are_refused_before_anything_is_trained(records):
    with pytest.raises(InputError):
        evaluator(error, records, 2, KEYS)
