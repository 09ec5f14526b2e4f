"""The detector's loss, its answers and their scores, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import detect as boxes
from dl_jax.core.errors import InputError
from dl_jax.harness import Run

H, W, CLASSES = 6, 8, 2


@pytest.fixture(scope="module")
def detect(load_experiment):
    return load_experiment("vision/detect")


class Maps:
    """A model whose outputs are its variables."""

    def apply(self, variables, image, *, train, mutable=None):
        return (variables, {}) if mutable else variables


def batch():
    """Two images with two objects and one, padded to three."""
    places = np.zeros((2, 3, 4), np.float32)
    places[0, 0], places[0, 1], places[1, 0] = (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 0.75), (0.25, 0.25, 1, 1)
    return {
        "image": np.zeros((2, 4 * H, 4 * W, 1), np.uint8),
        "objects/bbox": places,
        "objects/label": np.array([[0, 1, 0], [1, 0, 0]], np.int32),
        "objects/mask": np.array([[True, True, False], [True, False, False]]),
    }


def right_maps(given):
    """Maps that hold just the objects of a batch, with logits of ± 20."""
    of = jax.vmap(lambda *each: boxes.targets(*each, CLASSES, H, W))
    wanted = jax.tree.map(np.array, of(given["objects/bbox"], given["objects/label"], given["objects/mask"]))
    size, offset = np.zeros((2, 2, H, W, 2), np.float32)
    for i, k in zip(*np.nonzero(given["objects/mask"]), strict=True):
        row, column = wanted.cell[i, k]
        size[i, row, column], offset[i, row, column] = wanted.size[i, k], wanted.offset[i, k]
    return {"heat": np.where(wanted.heat == 1, 20, -20).astype(np.float32), "size": size, "offset": offset}


def test_the_loss_by_hand(detect):
    given = batch()
    loss = jax.jit(lambda maps: detect.detection_loss(Maps(), maps, given, None))
    maps = right_maps(given)
    value, (_, parts) = jax.device_get(loss(maps))
    assert value < 1e-6
    wrong = {**maps, "size": maps["size"] + np.array([1, 2]), "offset": maps["offset"] - np.array([0.5, 0])}
    value, (_, parts) = jax.device_get(loss({name: jnp.float32(each) for name, each in wrong.items()}))
    assert parts["size"] == pytest.approx(3, rel=1e-5)  # of each of the three objects, and no other cell's
    assert parts["offset"] == pytest.approx(0.5, rel=1e-5)
    assert value == pytest.approx(0.1 * 3 + 0.5, rel=1e-5)
    missed = {**maps, "heat": np.full_like(maps["heat"], -20)}
    assert loss(missed)[0] == pytest.approx(20, rel=1e-4)  # a logit of -20 costs 20 nats at each of 3 of 3 objects


def test_an_image_without_objects_has_a_finite_loss(detect):
    given = {**batch(), "objects/mask": np.zeros((2, 3), bool)}
    value, _ = jax.jit(lambda maps: detect.detection_loss(Maps(), maps, given, None))(right_maps(batch()))
    assert np.isfinite(value)


def test_right_maps_are_found_and_scored_as_such(detect):
    given = batch()
    found = jax.device_get(jax.jit(lambda maps: detect.found_objects(Maps(), maps, given))(right_maps(given)))
    perfect = detect.scored(found, given, ("a", "b"), sure=0.3)
    names = ["ap", "ap50", "ap50_a", "ap50_b", "count_error_a", "count_error_b"]
    assert sorted(perfect) == names
    np.testing.assert_allclose([perfect[name] for name in names], [100] * 4 + [0, 0], atol=1e-9)
    fewer = detect.scored(found._replace(present=found.present & (found.labels == 0)), given, ("a", "b"), sure=0.3)
    np.testing.assert_allclose([fewer[name] for name in names], [50, 50, 100, 0, 0, 1], atol=1e-9)
    everything = detect.scored(found, given, ("a", "b"), sure=0.0)  # also peaks of hardly any heat
    assert everything["count_error_a"] > 0


def test_the_less_sure_of_two_boxes_that_overlap_is_left_out(detect):
    maps = {name: np.zeros((1, H, W, n), np.float32) for name, n in (("heat", 1), ("size", 2), ("offset", 2))}
    maps["heat"] -= 20
    maps["heat"][0, 2, [2, 4], 0] = 3, 2  # two cells apart, of boxes that are eight wide
    maps["size"] += 8
    given = {"image": np.zeros((1, 4 * H, 4 * W, 1), np.uint8)}
    found = jax.device_get(jax.jit(lambda maps: detect.found_objects(Maps(), maps, given))(maps))
    assert (found.present & (found.scores > 0.5)).sum() == 1
    maps["heat"][0, 2, [2, 6], 0] = 3, 2
    maps["heat"][0, 2, 4, 0] = -20
    found = jax.device_get(jax.jit(lambda maps: detect.found_objects(Maps(), maps, given))(maps))
    assert (found.present & (found.scores > 0.5)).sum() == 2


def test_augmentation_takes_the_batches_and_keeps_their_shapes(detect):
    given = {**batch(), "mask": np.ones(2)}
    for see in (detect.seen(detect.PRESETS["smoke"], cell) for cell in ("plain", "augmented")):
        found = jax.eval_shape(see, jax.random.key(0), given)
        assert {name: leaf.shape for name, leaf in found.items()} == {name: leaf.shape for name, leaf in given.items()}


def test_the_figure_has_a_frame_for_each_object(detect):
    given = batch()
    found = jax.device_get(jax.jit(lambda maps: detect.found_objects(Maps(), maps, given))(right_maps(given)))
    figure = detect.drawn(found, given, ("a", "b"), 0.3)
    frames = [[patch.get_bbox().bounds for patch in axes.patches] for axes in figure.axes]
    assert [len(each) for each in frames] == [2, 1, 2, 1]
    np.testing.assert_allclose(frames[0][0], [-0.5, -0.5, 16, 12])  # x, y, width and height in pixels
    np.testing.assert_allclose(sorted(frames[2]), sorted(frames[0]), atol=1e-4)


@pytest.mark.data
def test_cells_and_their_refusals(detect, tfds_dir, monkeypatch):
    monkeypatch.setattr(detect, "fit", None)  # a step would fail
    cfg = detect.PRESETS["paper"]
    for change, message in (({"boxes": 20}, r"row \d+ has \d+ boxes, expected at most 20; raise"),
                            ({"height": 122}, "image of 122 x 160 pixels, expected sides that 4 divides")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            detect.main(dataclasses.replace(cfg, **change), Run())
    assert detect.class_names("bccd") == ("RBC", "WBC", "Platelets")


def test_numbers_are_compared_with_the_median_of_the_training_images(detect):
    train, test = np.array([[1, 0], [3, 0], [8, 4]]), np.array([[3, 1], [5, 0], [0, 1], [2, 0]])
    np.testing.assert_array_equal(detect.median_errors(train, test), [(0 + 2 + 3 + 1) / 4, 0.5])
