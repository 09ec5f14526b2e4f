"""The loss and the test metrics of classifiers, and trees of several seeds."""

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import classify, losses
from dl_jax.core import seeds

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1), np.uint8)
BATCH = {"image": IMAGE, "label": np.array([0, 1, 2, 0, 1, 2])}
VARIABLES = {"params": {"w": np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)}}


def apply(variables, image, train, rngs=None):
    assert image.dtype == jnp.float32
    assert (rngs is not None) == train
    return image.reshape(len(image), -1) @ variables["params"]["w"]


LOGITS = (IMAGE.reshape(6, 4) / np.float32(255)) @ VARIABLES["params"]["w"]


def test_grey_levels_become_fractions_and_floats_stay():
    found = classify.to_unit(np.array([0, 51, 255], np.uint8))
    np.testing.assert_allclose(found, [0, 0.2, 1], rtol=1e-6)
    np.testing.assert_array_equal(classify.to_unit(found), found)
    batch = classify.unit(jax.random.key(0), BATCH)
    np.testing.assert_allclose(batch["image"], IMAGE / 255, rtol=1e-6)
    assert batch["label"] is BATCH["label"]


def test_the_loss_is_the_mean_cross_entropy():
    found, (collections, metrics) = classify.loss(apply)(VARIABLES, BATCH, jax.random.key(0))
    np.testing.assert_allclose(found, losses.cross_entropy(LOGITS, BATCH["label"]).mean(), rtol=1e-6)
    assert collections == {}
    np.testing.assert_allclose(metrics["error"], (LOGITS.argmax(1) != BATCH["label"]).mean())


def test_the_evaluation_counts_each_example_once():
    masked = {**BATCH, "mask": np.array([1, 1, 1, 1, 0, 0], np.float32)}
    found = classify.evaluation(apply)(VARIABLES, masked, jax.random.key(0))
    kept = LOGITS[:4], BATCH["label"][:4]
    np.testing.assert_allclose(found["error"], ((kept[0].argmax(1) != kept[1]).sum(), 4))
    np.testing.assert_allclose(found["nats"], (losses.cross_entropy(*kept).sum(), 4), rtol=1e-5)


def test_outputs_are_those_of_all_pictures_in_order():
    images = np.arange(2500.0).reshape(2500, 1, 1, 1)
    sizes = []

    def predict(some):
        sizes.append(len(some))
        return 2 * some[:, 0, 0]

    np.testing.assert_array_equal(classify.outputs(predict, images), 2 * images[:, 0, 0])
    assert sizes == [1000, 1000, 500]


def test_seeds_come_apart_and_together():
    tree = {"a": jnp.arange(6.0).reshape(3, 2), "b": {"c": jnp.arange(3)}}
    parts = seeds.split(tree)
    assert [part["b"]["c"] for part in parts] == [0, 1, 2]
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(parts))
    jax.tree.map(np.testing.assert_array_equal, seeds.stack(parts), tree)
