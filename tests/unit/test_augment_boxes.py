"""Boxes and label maps move with the images: against masks of the boxes that are moved, and invariants."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dl_jax import augment
from dl_jax.augment.base import LOST
from dl_jax.core.errors import InputError

B, H, W, N = 12, 40, 32, 5
KEY = jax.random.key(0)
MOVES = {
    "flip": augment.flip(),
    "vertical flip": augment.flip(vertical=True),
    "pad_and_crop": augment.pad_and_crop(6),
    "centre_crop": augment.centre_crop(25),
    "resized_crop": augment.resized_crop(50, scale=(0.3, 1.0)),
    "affine": augment.affine(scale=(0.8, 1.3), squeeze=(0.8, 1.2), translate=(-5, 5)),
    "turned": augment.affine(degrees=(90, 90)),
    "compose": augment.compose(augment.flip(), augment.pad_and_crop(3), augment.affine(scale=(0.9, 1.2))),
}
moving = pytest.mark.parametrize("name", MOVES)


def batch_of(seed=0, height=H, width=W):
    """Images whose channels are masks of the N boxes, which have whole pixels, and the sum of the masks as a map."""
    rng = np.random.default_rng(seed)
    sides = rng.integers(6, 16, (B, N, 2))
    corner = rng.integers(0, np.array([height, width]) - sides + 1)
    boxes = np.concatenate([corner, corner + sides], -1)
    y, x = np.arange(height)[:, None, None], np.arange(width)[:, None]
    within = lambda at, axis: (at >= boxes[:, None, None, :, axis]) & (at < boxes[:, None, None, :, axis + 2])
    masks = within(y, 0) & within(x, 1)  # [B, H, W, N]
    present = rng.random((B, N)) < 0.8
    scale = np.array([height, width, height, width], np.float32)
    return {
        "image": masks.astype(np.float32),
        "objects/bbox": np.where(present[..., None], boxes / scale, 0).astype(np.float32),
        "objects/mask": present,
        "objects/label": rng.integers(0, 3, (B, N)),
        "segmentation_mask": (masks * (1 + np.arange(N))).max(-1).astype(np.uint8),
    }


@functools.cache
def moved(name, seed=0):
    batch = batch_of(seed)
    return batch, jax.device_get(jax.jit(MOVES[name])(KEY, batch))


@moving
def test_a_box_is_that_around_its_moved_mask(name):
    """To the pixel that interpolation spreads; at its middle a pixel of a mask is above a half."""
    batch, found = moved(name)
    height, width = found["image"].shape[1:3]
    compared = 0
    for i, k in zip(*np.nonzero(found["objects/mask"]), strict=True):
        inside = found["image"][i, ..., k] > 0.5
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if rows.size and columns.size:
            around = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
            pixels = found["objects/bbox"][i, k] * [height, width, height, width]
            # A window of half the side magnifies pixels, and their edges, twice.
            np.testing.assert_allclose(pixels, around, atol=1.6 if name == "resized_crop" else 0.8)
            compared += 1
    assert compared > 0.4 * batch["objects/mask"].sum()


@moving
def test_what_has_left_the_image_is_masked_and_zero(name):
    batch, found = moved(name)
    there, before = found["objects/mask"], batch["objects/mask"]
    assert not (there & ~before).any()
    assert not found["objects/bbox"][~there].any()
    boxes = found["objects/bbox"][there]
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    np.testing.assert_array_equal(found["objects/label"], batch["objects/label"])
    seen = (found["image"] > 0.5).mean((1, 2))  # of the new image, [B, N]
    if name not in ("resized_crop", "affine", "compose"):  # which change the size of what they keep
        kept = seen * np.prod(found["image"].shape[1:3]) / np.maximum(batch["image"].sum((1, 2)), 1)
        np.testing.assert_array_equal(there, before & (kept > LOST))


@moving
def test_a_label_map_moves_as_the_image_does(name):
    """Where the image's masks, which share a draw with it, are not in between."""
    _, found = moved(name)
    assert found["segmentation_mask"].dtype == np.uint8
    assert found["segmentation_mask"].shape == found["image"].shape[:3]
    clear = ((found["image"] < 0.02) | (found["image"] > 0.98)).all(-1)
    expected = (np.rint(found["image"]) * (1 + np.arange(N))).max(-1)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(found["segmentation_mask"][clear], expected[clear])
    assert set(np.unique(found["segmentation_mask"])) <= set(range(N + 1))


@pytest.mark.parametrize("name", ["elastic", "barrel"])
def test_label_maps_follow_where_lines_bend_and_boxes_are_refused(name):
    augmentation = {"elastic": augment.elastic(20, 4), "barrel": augment.barrel((0.2, 0.4))}[name]
    batch = batch_of()
    without = {column: value for column, value in batch.items() if not column.startswith("objects")}
    found = jax.device_get(jax.jit(augmentation)(KEY, without))
    clear = ((found["image"] < 0.02) | (found["image"] > 0.98)).all(-1)
    expected = (np.rint(found["image"]) * (1 + np.arange(N))).max(-1)
    np.testing.assert_array_equal(found["segmentation_mask"][clear], expected[clear])
    assert (found["segmentation_mask"] != batch["segmentation_mask"]).any()
    with pytest.raises(InputError, match=r"column 'objects/bbox' .* which this augmentation does not transform"):
        jax.eval_shape(augmentation, KEY, batch)


@pytest.mark.parametrize("vertical", [False, True])
def test_two_flips_are_the_identity_and_some_images_stay(vertical):
    flip = jax.jit(augment.flip(vertical=vertical))
    batch = batch_of()
    once = jax.device_get(flip(KEY, batch))
    twice = jax.device_get(flip(KEY, once))
    for name, column in batch.items():
        np.testing.assert_allclose(twice[name], column, atol=1e-6)
    same = (once["image"] == batch["image"]).all((1, 2, 3))
    assert 0 < same.sum() < B
    np.testing.assert_array_equal(once["objects/bbox"][same], batch["objects/bbox"][same])
    changed = (abs(once["objects/bbox"] - batch["objects/bbox"]) > 1e-6).any((0, 1))
    np.testing.assert_array_equal(changed, [vertical, not vertical] * 2)


def test_a_turn_gives_the_box_around_the_corners():
    """A square that is turned by 45 degrees about the image's centre is as wide as its diagonal."""
    box = np.array([[[0.4, 0.4, 0.6, 0.6]]], np.float32)
    batch = {"image": np.zeros((1, 20, 20, 1), np.float32), "objects/bbox": box, "objects/mask": np.ones((1, 1), bool)}
    found = jax.jit(augment.rotate((45, 45)))(KEY, batch)["objects/bbox"]
    half = 0.1 * np.sqrt(2)
    np.testing.assert_allclose(found, [[[0.5 - half] * 2 + [0.5 + half] * 2]], rtol=1e-5)


def test_boxes_of_numbers_that_make_no_sense():
    """Without area, upside down, and with a NaN, which stays to be seen; padding may hold anything."""
    rows = [[0.2, 0.2, 0.2, 0.5], [0.6, 0.2, 0.3, 0.5], [np.nan, 0.2, 0.5, 0.5], [0.1, 0.1, 0.5, 0.5], [np.nan] * 4]
    batch = {
        "image": np.zeros((1, 20, 20, 1), np.float32),
        "objects/bbox": np.array([rows], np.float32),
        "objects/mask": np.array([[True] * 4 + [False]]),
    }
    found = jax.device_get(jax.jit(augment.translate((0, 0)))(KEY, batch))
    np.testing.assert_array_equal(found["objects/mask"], [[False, False, True, True, False]])
    expected = [[0] * 4, [0] * 4, [np.nan] * 4, rows[3], [0] * 4]
    np.testing.assert_allclose(found["objects/bbox"][0], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_boxes_in_half_precision_stay_so(dtype):
    batch = batch_of()
    half = {**batch, "objects/bbox": jnp.asarray(batch["objects/bbox"], dtype)}
    found = jax.jit(MOVES["pad_and_crop"])(KEY, half)["objects/bbox"]
    assert found.dtype == dtype
    there = moved("pad_and_crop")[1]["objects/bbox"]
    assert (abs(np.float32(found) - there).max(-1) < 0.01).mean() > 0.9  # a few are masked at another area


def test_seeds_as_an_axis_draw_for_themselves():
    batch = batch_of()
    keys = jax.random.split(KEY, 2)
    both = jax.jit(jax.vmap(MOVES["affine"], (0, None)))(keys, batch)
    for i, key in enumerate(keys):
        alone = jax.jit(MOVES["affine"])(key, batch)
        for name in ("objects/bbox", "objects/mask", "segmentation_mask"):
            np.testing.assert_allclose(both[name][i], alone[name], atol=1e-6)
    assert (np.array(both["objects/bbox"][0]) != np.array(both["objects/bbox"][1])).any()


@pytest.mark.parametrize("name", ["compose", "resized_crop"])
def test_devices_share_a_batch_without_exchange(name):
    batch = {column: np.concatenate([values, values])[:16] for column, values in batch_of().items()}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(MOVES[name], in_shardings=(NamedSharding(mesh, PartitionSpec()), rows), out_shardings=rows)
    compiled = step.lower(KEY, batch).compile()
    assert not re.findall(r"all-gather|all-reduce|collective-permute|all-to-all", compiled.as_text())
    alone = jax.jit(MOVES[name])(KEY, batch)
    for column, found in compiled(KEY, jax.device_put(batch, rows)).items():
        np.testing.assert_allclose(found, alone[column], atol=1e-6)


def test_no_boxes_at_all():
    batch = {**batch_of(), "objects/bbox": np.zeros((B, 0, 4), np.float32), "objects/mask": np.zeros((B, 0), bool)}
    found = jax.jit(MOVES["compose"])(KEY, batch)
    assert found["objects/bbox"].shape == (B, 0, 4)
    np.testing.assert_allclose(found["image"], moved("compose")[1]["image"], atol=1e-5)


def test_no_box_loses_its_area_by_rounding():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.9, (B, 50, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.005, 0.02, corner.shape)], -1)
    batch = {**batch_of(), "objects/mask": np.ones((B, 50), bool), "objects/bbox": jnp.asarray(boxes, jnp.bfloat16)}
    found = jax.device_get(jax.jit(augment.affine(scale=(0.5, 1)))(KEY, batch))
    places, present = np.float32(found["objects/bbox"]), found["objects/mask"]
    assert present.mean() > 0.5
    assert ((places[..., 2:] > places[..., :2]).all(-1) == present).all()


@pytest.mark.parametrize("shape", [(H, W, 1), (H, W), (H, W, 2, 3)])
def test_label_maps_keep_their_axes(shape):
    batch = batch_of()
    given = np.broadcast_to(batch["segmentation_mask"].reshape(B, H, W, *[1] * (len(shape) - 2)), (B, *shape))
    found = jax.jit(MOVES["flip"])(KEY, {**batch, "segmentation_mask": given})["segmentation_mask"]
    assert found.shape == (B, *shape)
    np.testing.assert_array_equal(found.reshape(B, H, W, -1)[..., 0], moved("flip")[1]["segmentation_mask"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects/mask": np.ones((B, N + 1), bool)}, r"'objects/mask' bool \(12, 6\): expected floats \(12, N, 4\)"),
        ({"objects/mask": np.ones((B, N), np.float32)}, "'objects/mask' float32"),
        ({"objects/bbox": np.ones((B, N, 4), np.int32)}, r"columns 'objects/bbox' int32 \(12, 5, 4\)"),
        ({"objects/bbox": np.ones((B, 4), np.float32)}, "pad all images to N boxes"),
        ({"objects/mask": None}, r"column 'objects/bbox' .* has image .* move it with 'objects/mask' beside it"),
        (
            {"segmentation_mask": np.ones((B, H, W + 1), np.uint8)},
            "column 'segmentation_mask' .* has image coordinates",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(change, message):
    batch = {name: column for name, column in {**batch_of(), **change}.items() if column is not None}
    with pytest.raises(InputError, match=message) as error:
        jax.eval_shape(augment.flip(), KEY, batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("augmentation", [augment.mixup(1, 3), augment.cutmix(1, 3), augment.rand_augment()])
def test_what_does_not_move_boxes_still_refuses_them(augmentation):
    with pytest.raises(InputError, match="has image coordinates"):
        jax.eval_shape(augmentation, KEY, {**batch_of(), "label": np.zeros(B, int)})
