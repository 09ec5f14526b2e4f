"""Augmentations against brute force, exact invariants, and the statistics of their draws."""

import colorsys
import inspect
import math
import runpy
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import ndimage, stats

from dl_jax import augment, classify, losses
from dl_jax.augment import geometry, policy, sampling
from dl_jax.core.errors import InputError

KEY = jax.random.key(0)
LENET = {"scale": (0.9, 1.1), "squeeze": (0.9, 1.1), "shear": (-0.2, 0.2), "translate": (-2.0, 2.0)}
JITTER = {
    "brightness_factor": (0.6, 1.4),
    "contrast_factor": (0.6, 1.4),
    "saturation_factor": (0.6, 1.4),
    "hue_turns": (-0.1, 0.1),
}
ALL = {
    "flip": augment.flip(),
    "pad_and_crop": augment.pad_and_crop(3),
    "affine": augment.affine(degrees=(-15, 15), **LENET),
    "rotate": augment.rotate((-30, 30)),
    "scale": augment.scale((0.7, 1.3)),
    "translate": augment.translate((-3, 3)),
    "shear": augment.shear((-0.3, 0.3)),
    "brightness": augment.brightness((0.5, 1.5)),
    "contrast": augment.contrast((0.5, 1.5)),
    "saturation": augment.saturation((0.0, 2.0)),
    "hue": augment.hue((-0.5, 0.5)),
    "colour_jitter": augment.colour_jitter(**JITTER),
    "resized_crop": augment.resized_crop(7),
    "elastic": augment.elastic(20, 2),
    "barrel": augment.barrel((-0.2, 0.4)),
    "rand_augment": augment.rand_augment(1, 15),
    "noise": augment.noise(0.1),
    "cutout": augment.cutout(5),
    "compose": augment.compose(augment.flip(), augment.pad_and_crop(2), augment.noise(0.1)),
}
JITTED = {name: jax.jit(f) for name, f in ALL.items()}  # compiled once for all tests: one shape, SHAPE
SHAPE = (16, 12, 10, 3)
each = pytest.mark.parametrize("name", ALL)
# All programs there are, for what is dear to compile: `rotate`, `scale`, `translate` and `shear` are `affine` with
# other intervals, `colour_jitter` runs the four colours, and `compose` flips, crops and adds noise.
PROGRAMS = ["affine", "colour_jitter", "resized_crop", "elastic", "rand_augment", "cutout", "compose"]
each_program = pytest.mark.parametrize("name", PROGRAMS)


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def applied(augmentation: augment.Augmentation, images: np.ndarray, key: jax.Array = KEY) -> np.ndarray:
    return np.asarray(jax.jit(augmentation)(key, {"image": images})["image"])


def eager(augmentation: augment.Augmentation, images: np.ndarray) -> np.ndarray:
    """For many hyper-parameters and one shape: jitted it would be compiled for each of them."""
    return np.asarray(augmentation(KEY, {"image": jnp.asarray(images)})["image"])


def brute_force(image: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """[H, W, C] and the 2x3 map of its points (x right, y down, from the centre), pixel by pixel in float64."""
    h, w, c = image.shape
    inverse = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))
    centre = np.array([(w - 1) / 2, (h - 1) / 2])
    result = np.zeros((h, w, c))
    for row in range(h):
        for column in range(w):
            x, y = (inverse @ [column - centre[0], row - centre[1], 1])[:2] + centre
            for r in (int(np.floor(y)), int(np.floor(y)) + 1):
                for q in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= r < h and 0 <= q < w:
                        result[row, column] += (1 - abs(y - r)) * (1 - abs(x - q)) * image[r, q]
    return result


def forward_map(
    degrees: float = 0, scale: float = 1, squeeze: float = 1, shear: float = 0, translate: float = 0
) -> np.ndarray:
    t = np.deg2rad(degrees)
    rotation = np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])  # counter-clockwise where y points down
    slant = np.array([[1, -shear], [0, 1]])
    linear = rotation @ slant @ np.diag([scale * squeeze, scale / squeeze])
    return np.column_stack([linear, [translate, translate]])


# What holds for every augmentation


@each
def test_same_key_same_result(name):
    batch = {"image": jnp.asarray(random_images(*SHAPE))}
    result = JITTED[name](KEY, batch)["image"]
    np.testing.assert_array_equal(result, JITTED[name](KEY, batch)["image"])
    assert not np.array_equal(result, JITTED[name](jax.random.key(1), batch)["image"])
    assert not np.array_equal(result, batch["image"])


@each
def test_shape_dtype_range_and_other_columns_stay(name):
    images, label, mask = random_images(*SHAPE), np.arange(16), np.ones(16)
    before = images.copy()
    result = JITTED[name](KEY, {"image": images})["image"]
    assert result.shape == ((16, 7, 7, 3) if name == "resized_crop" else SHAPE)
    assert result.dtype == jnp.float32
    if name not in ("noise", "compose"):
        assert float(result.min()) >= 0
        assert float(result.max()) <= 1 + 1e-6

    def beside(key, images):
        batch = ALL[name](key, {"image": images, "label": label, "mask": mask})
        assert set(batch) == {"image", "label", "mask"}
        assert batch["label"] is label
        assert batch["mask"] is mask
        return batch["image"]

    jax.eval_shape(beside, KEY, images)
    np.testing.assert_array_equal(images, before)


@each
def test_equal_examples_are_drawn_apart(name):
    images = np.broadcast_to(random_images(*SHAPE)[:1], SHAPE)
    result = np.asarray(JITTED[name](KEY, {"image": images})["image"]).reshape(16, -1)
    assert len(np.unique(result, axis=0)) >= (2 if name == "flip" else 10)


@each_program
def test_an_examples_draws_depend_on_its_position_alone(name):
    images = random_images(*SHAPE)
    whole = JITTED[name](KEY, {"image": images})["image"]
    np.testing.assert_allclose(JITTED[name](KEY, {"image": images[:4]})["image"], whole[:4], atol=2e-6)


@each_program
def test_devices_share_a_batch_without_exchange(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    images = random_images(*SHAPE)
    batch = {"image": jax.device_put(images, rows)}
    compiled = jax.jit(ALL[name], out_shardings={"image": rows}).lower(KEY, batch).compile()
    shared, alone = compiled(KEY, batch)["image"], JITTED[name](KEY, {"image": images})["image"]
    np.testing.assert_allclose(shared, alone, atol=2e-6)
    program = compiled.as_text() or ""
    assert "fusion" in program
    assert not [line for line in program.splitlines() if "all-" in line or "collective-permute" in line]


@each_program
def test_vmapped_over_seeds(name):
    images, keys = random_images(3, *SHAPE), jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(ALL[name]))(keys, {"image": images})["image"]
    for found, key, own in zip(mapped, keys, images, strict=True):
        np.testing.assert_allclose(found, JITTED[name](key, {"image": own})["image"], atol=2e-6)


@pytest.mark.parametrize(
    "augmentation",
    [
        augment.compose(),
        augment.pad_and_crop(0),
        augment.affine(),
        augment.brightness((1, 1)),
        augment.contrast((1, 1)),
        augment.saturation((1, 1)),
        augment.noise(0),
    ],
)
def test_identity_is_exact(augmentation):
    images = random_images(2, 7, 10, 3)
    np.testing.assert_array_equal(applied(augmentation, images), images)


def test_identity_of_hue_to_rounding():
    images = random_images(3, 8, 8, 3)
    np.testing.assert_allclose(applied(augment.hue((0, 0)), images), images, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "rand_augment"])  # which rounds
def test_gradients_pass_and_are_finite(name):
    images = random_images(*SHAPE)
    images[:, :2] = 0.5  # grey: no hue
    gradient = jax.jit(jax.grad(lambda x: ALL[name](KEY, {"image": x})["image"].sum()))(images)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).sum() > 0


# Geometry


def test_flip_is_its_own_inverse_and_takes_half():
    images = random_images(2000, 3, 4, 2)
    once = applied(augment.flip(), images)
    np.testing.assert_array_equal(applied(augment.flip(), once), images)
    flipped = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(once, images, strict=True)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(once, images, strict=True)])
    assert (flipped ^ kept).all()
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_pad_and_crop_gives_every_window_equally_often():
    image, padding, n = random_images(5, 6, 2, seed=1), 2, 5000
    result = applied(augment.pad_and_crop(padding), np.broadcast_to(image, (n, 5, 6, 2)))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[r : r + 5, q : q + 6].tobytes(): 0 for r in range(5) for q in range(5)}
    assert len(windows) == 25
    for window in result:
        windows[window.tobytes()] += 1  # a KeyError is a window that does not exist
    counts = np.array(list(windows.values()))
    assert ((counts - n / 25) ** 2 / (n / 25)).sum() < 51.2  # chi-squared, 24 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("size", "turns"), [(8, 1), (9, 1), (8, 2), (9, -1)])
def test_quarter_turns_are_rot90(size, turns):
    images = random_images(2, size, size, 3)
    result = applied(augment.rotate((90 * turns, 90 * turns)), images)
    np.testing.assert_allclose(result, np.rot90(images, turns, axes=(1, 2)), atol=1e-5)


RESAMPLE = jax.jit(augment.resample)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (2, 0), (0, -3), (-1, 2), (5, 5), (20, 0)])
def test_whole_pixel_translation_is_a_roll_with_zeros(right, down):
    images = random_images(2, 7, 9, 3)
    expected = np.zeros_like(images)
    for row in range(7):
        for column in range(9):
            if 0 <= row - down < 7 and 0 <= column - right < 9:
                expected[:, row, column] = images[:, row - down, column - right]
    source = jnp.broadcast_to(jnp.array([[1.0, 0, -right], [0, 1, -down]]), (2, 2, 3))
    np.testing.assert_array_equal(RESAMPLE(images, source), expected)
    if right == down:
        np.testing.assert_array_equal(applied(augment.translate((right, right)), images), expected)


ONE_BY_ONE: list[tuple[Callable[[float], augment.Augmentation], dict[str, float]]] = [
    (lambda v: augment.rotate((v, v)), {"degrees": 33}),
    (lambda v: augment.scale((v, v)), {"scale": 1.3}),
    (lambda v: augment.scale((v, v)), {"scale": 0.6}),
    (lambda v: augment.affine(squeeze=(v, v)), {"squeeze": 1.25}),
    (lambda v: augment.shear((v, v)), {"shear": 0.4}),
    (lambda v: augment.translate((v, v)), {"translate": -1.7}),
]


@pytest.mark.parametrize(("make", "value"), ONE_BY_ONE)
def test_one_distortion_against_brute_force(make, value):
    image = random_images(9, 12, 2)
    expected = brute_force(image, forward_map(**value))
    np.testing.assert_allclose(eager(make(*value.values()), image[None])[0], expected, atol=1e-5)
    if value == ONE_BY_ONE[0][1]:  # compiled or not
        np.testing.assert_allclose(applied(make(*value.values()), image[None])[0], expected, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    degrees=st.floats(-180, 180),
    scale=st.floats(0.4, 2.5),
    squeeze=st.floats(0.5, 2.0),
    shear=st.floats(-1, 1),
    translate=st.floats(-4, 4),
)
def test_all_distortions_together_against_brute_force(**values):
    image = random_images(9, 12, 2)
    result = eager(augment.affine(**{name: (v, v) for name, v in values.items()}), image[None])[0]
    np.testing.assert_allclose(result, brute_force(image, forward_map(**values)), atol=5e-5)


def test_affine_draws_are_uniform_and_independent():
    """Read off an image whose value is its x or y coordinate, undisturbed at the centre pixel and its neighbours."""
    n, size = 4000, 9
    y, x = np.mgrid[:size, :size].astype(np.float32) - size // 2
    ramp = np.broadcast_to(np.stack([x, y], -1), (n, size, size, 2))
    c = size // 2
    moved = applied(augment.translate((-2, 3)), ramp)[:, c, c]  # the source of the centre: minus the shift
    assert moved.min() >= -3
    assert moved.max() <= 2
    np.testing.assert_allclose(-moved.mean(0), 0.5, atol=4 * 5 / np.sqrt(12 * n))
    np.testing.assert_allclose(moved.std(0), 5 / np.sqrt(12), rtol=0.05)
    assert abs(np.corrcoef(moved.T)[0, 1]) < 4 / np.sqrt(n)
    turned = applied(augment.rotate((-20, 40)), ramp)
    degrees = np.rad2deg(np.arctan2(turned[:, c, c + 1, 1], turned[:, c, c + 1, 0]))
    assert np.histogram(degrees, bins=6, range=(-20, 40))[0] == pytest.approx(n / 6, rel=0.15)
    enlarged = 1 / applied(augment.scale((0.8, 1.4)), ramp)[:, c, c + 1, 0]
    assert np.histogram(enlarged, bins=6, range=(0.8, 1.4))[0] == pytest.approx(n / 6, rel=0.15)


def test_squeeze_keeps_the_area():
    y, x = np.mgrid[:9, :9].astype(np.float32) - 4
    result = applied(augment.affine(squeeze=(0.7, 1.4)), np.broadcast_to(np.stack([x, y], -1), (50, 9, 9, 2)))
    width, height = result[:, 4, 5, 0], result[:, 5, 4, 1]
    np.testing.assert_allclose(width * height, 1, rtol=1e-4)
    assert (width > 1).any()
    assert (width < 1).any()


def test_the_padding_has_the_colour_that_was_asked_for():
    images = random_images(200, 6, 6, 2)
    fill = np.array([0.25, 0.75], np.float32)
    shifted = applied(augment.pad_and_crop(3, fill), images)
    plain = applied(augment.pad_and_crop(3), images)
    np.testing.assert_array_equal(shifted, np.where((plain == 0).all(-1, keepdims=True), fill, plain))
    assert (plain == 0).any()
    hole = applied(augment.cutout(3, (0.25, 0.75)), images)
    np.testing.assert_array_equal(hole, np.where(applied(augment.cutout(3), images) == 0, fill, images))


def test_resampling_fills_what_lies_outside():
    images = random_images(2, 5, 6, 2)
    source = jnp.broadcast_to(jnp.array([[1.0, 0, 2.5], [0, 1, 0]]), (2, 2, 3))
    found = jax.jit(augment.resample)(images, source, jnp.array([0.2, 0.9]))
    padded = np.concatenate([images, np.broadcast_to(np.float32([0.2, 0.9]), (2, 5, 4, 2))], 2)
    np.testing.assert_allclose(found, (padded[:, :, 2:8] + padded[:, :, 3:9]) / 2, atol=1e-6)


def test_the_centre_is_cropped():
    images = random_images(2, 7, 10, 3)
    np.testing.assert_array_equal(applied(augment.centre_crop(4), images), images[:, 1:5, 3:7])


WINDOWS = jax.jit(sampling.resize_windows, static_argnums=5)


@pytest.mark.parametrize(("h", "w"), [(5, 5), (6, 9), (20, 31), (13, 2)])
def test_windows_are_resized_as_pillow_does(h, w):
    """Enlarged, reduced and both; Pillow rounds twice, after each axis."""
    image = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)
    expected = PIL.Image.fromarray(image[3 : 3 + h, 4 : 4 + w]).resize((9, 9), PIL.Image.Resampling.BILINEAR)
    at = [jnp.array([each]) for each in (3, 4, h, w)]
    found = WINDOWS(np.float32(image[None]), *at, 9)[0]
    np.testing.assert_allclose(found, np.asarray(expected), atol=1.01)


def brute_force_window(part, log_ratio, place, height, width):
    """torchvision's rule, for draws [10], [10] and [2]."""
    for area, drawn in zip(part * height * width, np.exp(log_ratio), strict=True):
        h, w = round(np.sqrt(area / drawn)), round(np.sqrt(area * drawn))
        if 0 < h <= height and 0 < w <= width:
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        h, w = round(width / (3 / 4)), width
    elif width / height > 4 / 3:
        h, w = height, round(height * 4 / 3)
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(12, 10), (30, 8), (5, 60)])
def test_windows_are_drawn_as_torchvision_does(height, width):
    n, limits = 300, (math.log(3 / 4), math.log(4 / 3))
    one, other = jax.random.split(KEY)
    low, high = jnp.float32([0.08, limits[0]]), jnp.float32([1, limits[1]])
    draws = np.asarray(jax.random.uniform(one, (n, 10, 2), minval=low, maxval=high))
    places = np.asarray(jax.random.uniform(other, (n, 2)))
    expected = [brute_force_window(d[:, 0], d[:, 1], p, height, width) for d, p in zip(draws, places, strict=True)]
    found = np.stack(geometry.random_windows(KEY, n, height, width, (0.08, 1), (3 / 4, 4 / 3)), -1)
    assert (found != np.array(expected)).any(-1).mean() < 0.02  # a product that rounds to the other side
    assert (found[:, :2] >= 0).all()
    assert (found[:, :2] + found[:, 2:] <= [height, width]).all()
    assert (found[:, 2:] > 0).all()


# Warps


def mapped(images, rows, columns):
    return np.stack(
        [
            np.stack(
                [
                    ndimage.map_coordinates(plane, [r, c], order=1, mode="grid-constant")
                    for plane in np.moveaxis(x, -1, 0)
                ],
                -1,
            )
            for x, r, c in zip(images, rows, columns, strict=True)
        ]
    )


def test_elastic_distortion_against_scipy():
    images, alpha, sigma = random_images(*SHAPE), 20, 2
    field = np.asarray(jax.random.uniform(KEY, (16, 2, 12, 10), minval=-1, maxval=1))
    moved = alpha * ndimage.gaussian_filter(field.astype(float), sigma, axes=(2, 3), mode="constant", truncate=4)
    assert 1 < np.abs(moved).max() < 10
    expected = mapped(images, np.arange(12)[:, None] + moved[:, 0], np.arange(10) + moved[:, 1])
    np.testing.assert_allclose(JITTED["elastic"](KEY, {"image": images})["image"], expected, atol=1e-5)


@pytest.mark.parametrize("strength", [-0.3, 0.0, 0.5])
def test_barrel_distortion_against_scipy(strength):
    images = random_images(2, 9, 12, 2)
    y, x = np.mgrid[:9, :12] - np.array([4.0, 5.5])[:, None, None]
    stretch = 1 + strength * (x**2 + y**2) / (4.5**2 + 6**2)
    expected = mapped(images, [4 + y * stretch] * 2, [5.5 + x * stretch] * 2)
    np.testing.assert_allclose(eager(augment.barrel((strength, strength)), images), expected, atol=1e-5)


def test_distortions_of_no_strength_change_nothing():
    images = random_images(2, 7, 10, 3)
    np.testing.assert_array_equal(eager(augment.elastic(0, 2), images), images)
    np.testing.assert_array_equal(eager(augment.barrel((0, 0)), images), images)


# Mixing


MIXERS = {"mixup": jax.jit(augment.mixup(0.7, 16)), "cutmix": jax.jit(augment.cutmix(1.0, 16))}
each_mixer = pytest.mark.parametrize("name", MIXERS)


@each_mixer
def test_labels_are_mixed_as_the_images_are(name):
    """Constant images show the fraction of the other: each example is mixed with the one before it."""
    image = np.broadcast_to(np.linspace(0.1, 1, 16, dtype=np.float32)[:, None, None, None], SHAPE)
    batch = {"image": image, "label": np.arange(16), "weight": np.ones(16)}
    mixed = MIXERS[name](KEY, batch)
    kept = np.diagonal(mixed["label"])
    before = np.roll(np.eye(16), 1, 0)
    np.testing.assert_allclose(mixed["label"], kept[:, None] * np.eye(16) + (1 - kept)[:, None] * before, atol=1e-6)
    expected = kept * image[:, 0, 0, 0] + (1 - kept) * np.roll(image[:, 0, 0, 0], 1)
    np.testing.assert_allclose(mixed["image"].mean((1, 2, 3)), expected, atol=1e-6)
    assert len(np.unique(kept)) > 10
    assert kept.min() >= 0
    assert kept.max() <= 1
    assert mixed["weight"].shape == (16,)


@each_mixer
def test_labels_that_are_probabilities_are_mixed_as_they_are(name):
    batch = {"image": random_images(*SHAPE), "label": np.arange(16)}
    soft = {**batch, "label": 0.9 * np.eye(16, dtype=np.float32) + 0.1 / 16}
    whole, smoothed = (MIXERS[name](KEY, each)["label"] for each in (batch, soft))
    np.testing.assert_allclose(smoothed, 0.9 * whole + 0.1 / 16, atol=1e-6)
    with pytest.raises(InputError, match=r"labels \(16, 3\): expected one class number per example"):
        MIXERS[name](KEY, {**batch, "label": np.ones((16, 3), np.float32)})


@each_mixer
def test_devices_that_mix_give_the_same(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = {"image": random_images(*SHAPE), "label": np.arange(16)}
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    for found, alone in zip(
        jax.tree.leaves(MIXERS[name](KEY, placed)), jax.tree.leaves(MIXERS[name](KEY, batch)), strict=True
    ):
        np.testing.assert_allclose(found, alone, atol=2e-6)


def test_mixup_draws_from_the_beta_distribution():
    n, alpha = 4000, 0.4
    batch = {"image": np.zeros((n, 1, 1, 1), np.float32), "label": np.arange(n) % 2}
    kept = np.asarray(jax.jit(augment.mixup(alpha, 2))(KEY, batch)["label"])[np.arange(n), np.arange(n) % 2]
    assert stats.kstest(kept, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_cutmix_pastes_a_rectangle_of_the_other_image():
    images = random_images(*SHAPE)
    batch = {"image": images, "label": np.arange(16)}
    mixed = np.asarray(MIXERS["cutmix"](KEY, batch)["image"])
    other = np.roll(images, 1, 0)
    pasted = (mixed == other).all(-1)
    np.testing.assert_array_equal(mixed, np.where(pasted[..., None], other, images))
    for mask in pasted:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns)
        assert (np.diff(np.flatnonzero(rows)) == 1).all()
        assert (np.diff(np.flatnonzero(columns)) == 1).all()
    assert 0 < pasted.mean() < 1


def test_a_classifiers_loss_takes_mixed_labels():
    batch = {"image": random_images(*SHAPE), "label": np.arange(16) % 4}
    logits = jnp.asarray(random_images(16, 4))
    loss = classify.loss(lambda variables, image, train, rngs: logits)
    mix = augment.mixup(1, 4)
    value, _ = losses.label_smoothing(losses.with_batch(loss, mix), 4, 0.1)({}, batch, KEY)
    targets = mix(
        jax.random.split(jax.random.split(KEY)[1])[0], {**batch, "label": losses.smooth_labels(batch["label"], 4, 0.1)}
    )["label"]
    np.testing.assert_allclose(value, losses.soft_cross_entropy(logits, targets).mean(), rtol=1e-6)


# RandAugment against Pillow


def by_pillow(image: PIL.Image.Image, operation: str, strength: float) -> PIL.Image.Image:
    factor, (width, height) = 1 + 0.9 * strength, image.size
    bilinear = lambda a, b, c, d, e, f: image.transform(
        image.size, PIL.Image.Transform.AFFINE, (a, b, c, d, e, f), PIL.Image.Resampling.BILINEAR, fillcolor=(128,) * 3
    )
    x, y = width / 2, height / 2
    match operation:
        case "identity":
            return image
        case "auto_contrast":
            return PIL.ImageOps.autocontrast(image)
        case "equalize":
            return PIL.ImageOps.equalize(image)
        case "rotate":
            return image.rotate(30 * strength, PIL.Image.Resampling.BILINEAR, fillcolor=(128,) * 3)
        case "solarize":
            return PIL.ImageOps.solarize(image, 255 * (1 - abs(strength)))
        case "saturation":
            return PIL.ImageEnhance.Color(image).enhance(factor)
        case "posterize":
            return PIL.ImageOps.posterize(image, 8 - round(4 * abs(strength)))
        case "contrast":
            return PIL.ImageEnhance.Contrast(image).enhance(factor)
        case "brightness":
            return PIL.ImageEnhance.Brightness(image).enhance(factor)
        case "sharpness":
            return PIL.ImageEnhance.Sharpness(image).enhance(factor)
        case "shear_x":
            return bilinear(1, 0.3 * strength, -0.3 * strength * y, 0, 1, 0)
        case "shear_y":
            return bilinear(1, 0, 0, 0.3 * strength, 1, -0.3 * strength * x)
        case "translate_x":
            return bilinear(1, 0, 150 / 331 * width * strength, 0, 1, 0)
        case "translate_y":
            return bilinear(1, 0, 0, 0, 1, 150 / 331 * height * strength)
    raise AssertionError(operation)


OPERATED = jax.jit(policy.operated)


def test_the_operations_of_rand_augment_are_pillows():
    """All 14 in both directions; Pillow rounds, and leaves a point outside its image's pixels to the fill."""
    y, x = np.mgrid[:24, :20] / 24
    smooth = np.stack([x, y, (x + y) / 2], -1) * [200, 150, 250] + 20
    image = np.round(smooth + np.random.default_rng(0).random((24, 20, 3)) * 20).astype(np.uint8)
    names = list(policy.OPERATIONS)
    cases = [(name, sign * 0.7) for name in names for sign in (1, -1)]
    images = np.broadcast_to(np.float32(image) / 255, (len(cases), 24, 20, 3))
    found = OPERATED(images, np.array([names.index(n) for n, _ in cases]), np.float32([s for _, s in cases]))
    for result, (name, strength) in zip(np.asarray(found) * 255, cases, strict=True):
        expected = np.asarray(by_pillow(PIL.Image.fromarray(image), name, strength), float)
        different = np.abs(result - expected).max(-1) > 2
        assert different.mean() < (
            0.15 if name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y") else 0.005
        ), name
        if name in ("identity", "equalize", "posterize", "solarize"):
            np.testing.assert_allclose(result, expected, atol=1e-3, err_msg=name)
        if name != "identity":
            assert np.abs(result - image).max() > 4, name


def test_the_histogram_of_other_devices_is_that_of_the_cpu():
    values = np.random.default_rng(0).integers(0, 256, (2, 3, 77))
    table = np.random.default_rng(1).integers(0, 256, (2, 3, 256))
    np.testing.assert_array_equal(policy.counted_by_digits(values), policy.counted(values))
    np.testing.assert_array_equal(policy.counted(values)[1, 2], np.bincount(values[1, 2], minlength=256))
    np.testing.assert_array_equal(policy.looked_up_by_digits(table, values), policy.looked_up(table, values))


def test_the_operations_of_rand_augment_follow_each_other():
    images, (key, other) = random_images(28, 24, 20, 3), jax.random.split(KEY)
    drawn = jax.random.randint(key, (28, 2), 0, 14)
    strength = jax.random.rademacher(other, (28, 2), jnp.float32) * 0.5
    twice = OPERATED(OPERATED(images, drawn[:, 0], strength[:, 0]), drawn[:, 1], strength[:, 1])
    found = applied(augment.rand_augment(2, 15), images)
    assert (np.abs(found - twice).max((1, 2, 3)) < 1e-5).mean() > 0.9  # or a value was rounded to the other side


def test_rand_augment_draws_every_operation_and_direction():
    """Of one operation on a ramp with a stripe: what each does to it is different."""
    image = random_images(8, 8, 3)
    drawn = applied(augment.rand_augment(1, 20), np.broadcast_to(image, (600, 8, 8, 3))).reshape(600, -1)
    kinds, counts = np.unique(np.round(drawn, 5), axis=0, return_counts=True)
    one_way = 5  # identity, auto_contrast, equalize, solarize, posterize
    assert len(kinds) == one_way + 2 * (14 - one_way)
    assert counts.max() < 600 / 14 * 1.6
    assert counts.min() > 600 / 28 * 0.4


# Colour


def test_brightness_scales_and_clips():
    images = random_images(500, 2, 2, 1)
    result = applied(augment.brightness((0.5, 1.5)), images)
    factor = result.min((1, 2, 3)) / images.min((1, 2, 3))
    np.testing.assert_allclose(result, np.clip(factor[:, None, None, None] * images, 0, 1), rtol=1e-5)
    assert factor.min() >= 0.5 - 1e-6
    assert factor.max() <= 1.5 + 1e-6
    assert abs(factor.mean() - 1) < 4 / np.sqrt(12 * 500)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_contrast_leaves_the_mean_luminance(channels):
    images = 0.4 + 0.2 * random_images(20, 6, 6, channels)  # nothing reaches 0 or 1
    weights = np.array(augment.REC601 if channels == 3 else [1 / channels] * channels)
    result = applied(augment.contrast((0.0, 2.0)), images)
    np.testing.assert_allclose((result @ weights).mean((1, 2)), (images @ weights).mean((1, 2)), atol=1e-6)
    ratio = result.std((1, 2)) / images.std((1, 2))
    assert ratio.max() <= 2 + 1e-4
    np.testing.assert_allclose(ratio, ratio[:, :1] + np.zeros(channels), rtol=1e-3)


def test_contrast_0_is_flat():
    images = random_images(3, 6, 6, 3)
    result = applied(augment.contrast((0, 0)), images)
    grey = (images @ np.array(augment.REC601)).mean((1, 2))
    np.testing.assert_allclose(result, np.broadcast_to(grey[:, None, None, None], result.shape), atol=1e-6)


def test_saturation_leaves_luminance_and_0_is_grey():
    images = 0.45 + 0.1 * random_images(20, 5, 5, 3)
    weights = np.array(augment.REC601)
    result = applied(augment.saturation((0.0, 2.0)), images)
    np.testing.assert_allclose(result @ weights, images @ weights, atol=1e-6)
    grey = applied(augment.saturation((0, 0)), images)
    np.testing.assert_allclose(grey, np.repeat((images @ weights)[..., None], 3, -1), atol=1e-6)
    doubled = applied(augment.saturation((2, 2)), images)
    np.testing.assert_allclose(doubled, 2 * images - grey, atol=1e-6)


@pytest.mark.parametrize("turns", [-0.5, -0.21, 0.0, 0.1, 1 / 3, 0.5])
def test_hue_against_colorsys(turns):
    corners = np.stack(np.meshgrid([0, 0.5, 1], [0, 0.5, 1], [0, 0.5, 1]), -1).reshape(1, 27, 1, 3).astype(np.float32)
    images = np.concatenate([corners, random_images(1, 27, 1, 3)], 2)
    expected = np.empty_like(images)
    for at in np.ndindex(images.shape[:3]):
        h, s, v = colorsys.rgb_to_hsv(*(float(channel) for channel in images[at]))
        expected[at] = colorsys.hsv_to_rgb((h + turns) % 1, s, v)
    np.testing.assert_allclose(applied(augment.hue((turns, turns)), images), expected, atol=2e-6)


def test_a_third_of_a_turn_takes_red_to_green():
    red = np.zeros((1, 1, 1, 3), np.float32) + np.array([1, 0, 0], np.float32)
    np.testing.assert_allclose(applied(augment.hue((1 / 3, 1 / 3)), red)[0, 0, 0], [0, 1, 0], atol=1e-6)


def test_colour_jitter_is_its_parts_in_order():
    images, keys = random_images(4, 6, 6, 3), jax.random.split(KEY, 4)
    expected = images
    parts = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    for part, interval, key in zip(parts, JITTER.values(), keys, strict=True):
        expected = applied(part(interval), expected, key)
    np.testing.assert_allclose(applied(augment.colour_jitter(**JITTER), images), expected, atol=1e-6)


# Noise


def test_noise_has_its_standard_deviation_and_is_not_clipped():
    result = applied(augment.noise(0.3), np.zeros((50, 20, 20, 1), np.float32))
    n = result.size
    assert abs(result.std() - 0.3) < 4 * 0.3 / np.sqrt(2 * n)
    assert abs(result.mean()) < 4 * 0.3 / np.sqrt(n)
    assert abs((np.abs(result) < 0.3).mean() - 0.6827) < 4 * 0.47 / np.sqrt(n)
    assert result.min() < -0.6


@pytest.mark.parametrize("size", [1, 4, 8])
def test_cutout_zeroes_the_clipped_square_alone(size):
    h, w, n = 8, 9, 2000
    images = 0.1 + 0.9 * random_images(n, h, w, 2)
    result = applied(augment.cutout(size), images)
    hole = result == 0
    np.testing.assert_array_equal(hole[..., 0], hole[..., 1])
    np.testing.assert_array_equal(result[~hole], images[~hole])
    squares = {}
    for row in range(h):
        for column in range(w):
            top, left = row - size // 2, column - size // 2
            square = np.zeros((h, w), bool)
            square[max(top, 0) : top + size, max(left, 0) : left + size] = True
            squares[square.tobytes()] = squares.get(square.tobytes(), 0) + 1
    seen = dict.fromkeys(squares, 0)
    for mask in hole[..., 0]:
        seen[mask.tobytes()] += 1  # a KeyError is a hole that is no square around a pixel
    expected = np.array(list(squares.values())) * n / (h * w)
    assert len(seen) == h * w if size < 8 else len(seen) > 1
    assert (np.abs(np.array(list(seen.values())) - expected) < 5 * np.sqrt(expected)).all()


# Bad input

FILLED = {
    "pad_and_crop": lambda fill: augment.pad_and_crop(2, fill),
    "cutout": lambda fill: augment.cutout(3, fill),
    "elastic": lambda fill: augment.elastic(5, 2, fill),
    "barrel": lambda fill: augment.barrel((-0.1, 0.1), fill),
    "rand_augment": lambda fill: augment.rand_augment(1, 9, fill),
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: augment.noise(-0.1),
        lambda: augment.noise(float("nan")),
        lambda: augment.noise(float("inf")),
        lambda: augment.pad_and_crop(-1),
        lambda: augment.cutout(0),
        lambda: augment.scale((0.0, 1.0)),
        lambda: augment.scale((-1.0, 1.0)),
        lambda: augment.affine(squeeze=(0.0, 1.0)),
        lambda: augment.rotate((10, -10)),
        lambda: augment.rotate((float("nan"), 1.0)),
        lambda: augment.translate((0, float("inf"))),
        lambda: augment.shear((1, 0)),
        lambda: augment.brightness((-0.1, 1.0)),
        lambda: augment.contrast((-0.1, 1.0)),
        lambda: augment.saturation((-0.1, 1.0)),
        lambda: augment.hue((-0.6, 0.0)),
        lambda: augment.hue((0.0, 0.6)),
        lambda: augment.centre_crop(0),
        lambda: augment.resized_crop(0),
        lambda: augment.resized_crop(8, scale=(0.0, 1.0)),
        lambda: augment.resized_crop(8, scale=(0.5, 1.1)),
        lambda: augment.resized_crop(8, ratio=(0.0, 1.0)),
        lambda: augment.elastic(-1, 4),
        lambda: augment.elastic(34, 0),
        lambda: augment.barrel((-0.4, 0.0)),
        lambda: augment.mixup(0, 10),
        lambda: augment.cutmix(1, 0),
        lambda: augment.rand_augment(0),
        lambda: augment.rand_augment(2, 31),
        lambda: augment.centre_crop(2.5),
        lambda: augment.resized_crop("8"),
        lambda: augment.pad_and_crop(1.5),
        lambda: augment.cutout(2.5),
        lambda: augment.rand_augment(1.5),
        lambda: augment.mixup(1, 2.5),
        lambda: augment.mixup("1", 10),
        lambda: augment.noise(None),
        lambda: augment.elastic(1, (2, 3)),
        lambda: augment.rand_augment(2, "9"),
        lambda: augment.brightness(1.5),
        lambda: augment.hue((0.1,)),
        lambda: augment.rotate(("-1", "1")),
        *(
            lambda make=make, fill=fill: make(fill)
            for make in FILLED.values()
            for fill in (1.5, -0.1, math.nan, (0.5, 2, 0.5), (), "white", np.full((9, 9), 0.5))
        ),
    ],
)
def test_hyper_parameters_without_sense_are_refused(make):
    with pytest.raises(InputError, match=r"^[^\n]+=[^\n]+: expected [^\n]+$"):
        make()


@pytest.mark.parametrize(
    ("augmentation", "images", "message"),
    [
        (augment.pad_and_crop(8), np.zeros((1, 8, 9, 1), np.float32), "padding=8: expected less than the 8x9"),
        (augment.cutout(9), np.zeros((1, 8, 9, 1), np.float32), "size=9: expected a square no larger than the 8x9"),
        (
            augment.centre_crop(9),
            np.zeros((1, 8, 9, 1), np.float32),
            "size=9: expected a window no larger than the 8x9",
        ),
        (augment.hue((0, 0)), np.zeros((1, 8, 8, 1), np.float32), "3 channels"),
        (augment.saturation((1, 1)), np.zeros((1, 8, 8, 1), np.float32), "3 channels"),
        (augment.flip(), np.zeros((1, 8, 8), np.float32), r"expect float32 \[B, H, W, C\]"),
        (augment.flip(), np.zeros((1, 8, 8, 1), np.uint8), "uint8: .* convert and scale"),
    ],
)
def test_images_that_do_not_fit_are_refused(augmentation, images, message):
    with pytest.raises(InputError, match=message):
        augmentation(KEY, {"image": images})
    with pytest.raises(InputError, match=message):
        jax.jit(augmentation)(KEY, {"image": images})


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize(("channels", "values"), [(1, 3), (3, 1), (3, 2)])
def test_a_colour_has_as_many_values_as_the_image(name, channels, values):
    images = np.zeros((2, 8, 8, channels), np.float32)
    with pytest.raises(InputError, match=rf"fill=\(0\.5.*: expected one value.*; give {channels} values"):
        jax.eval_shape(FILLED[name]((0.5,) * values), KEY, {"image": images})
    for fill in (0.5, (0.5,) * channels, [0, 1, 1][:channels], np.full(channels, 0.5, np.float32)):
        assert jax.eval_shape(FILLED[name](fill), KEY, {"image": images})["image"].shape == images.shape


@pytest.mark.parametrize("mix", [augment.mixup(1, 10), augment.cutmix(1, 10)])
def test_only_batches_with_labels_are_mixed(mix):
    with pytest.raises(InputError, match="columns image, mask: expected labels to mix in column 'label'"):
        jax.eval_shape(mix, KEY, {"image": random_images(2, 4, 4, 3), "mask": np.ones(2, np.float32)})


@pytest.mark.parametrize("mix", [augment.mixup(1, 3), augment.cutmix(1, 3)])
def test_a_label_outside_gives_rows_of_nan(mix):
    labels = mix(KEY, {"image": random_images(4, 4, 4, 3), "label": np.array([0, 3, 2, 1])})["label"]
    np.testing.assert_array_equal(np.isnan(labels).all(-1), [False, True, True, False])
    assert np.isfinite(labels[np.array([0, 3])]).all()


def test_the_figure_shows_every_augmentation():
    public = {name for name in augment.__all__ if inspect.isfunction(getattr(augment, name))} - {"resample", "up_to"}
    public -= {"spec_augment", "white_noise"}  # of recordings: tests/unit/test_augment_audio.py
    script = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "augmentations.py"))
    shown = {label.split("(")[0] for rows in (script["DIGITS"], script["COLOURS"]) for label in rows}
    assert shown == public
    assert set(ALL) == public - {"centre_crop", "mixup", "cutmix"}  # these have tests of their own


GEOMETRY = ("flip", "pad_and_crop", "affine", "rotate", "scale", "translate", "shear", "compose")
GEOMETRY += ("resized_crop", "elastic", "barrel", "rand_augment")


@pytest.mark.parametrize(
    "column",
    [
        ("bbox", (16, 4)),
        ("objects/bbox", (16, 3, 4)),
        ("gt_boxes", (16, 2, 4)),
        ("faces/bbox/length", (16,)),
        ("keypoints_2d", (16, 5, 2)),
        ("landmarks/lefteye_x", (16,)),
        ("Polygon", (16, 7, 2)),
        ("mask", (16, 6, 5)),  # of another size than the image's
        ("segmentation_mask", (16, 6, 5, 1)),
        ("depth", (16, 12, 10)),
        ("image_right", (16, 12, 10, 3)),
        ("boundingBox", (16, 4)),
        ("GTBoxes", (16, 3, 4)),
        ("BBox", (16, 4)),
        ("gtboxes", (16, 3, 4)),
        ("bbox2d", (16, 4)),
        ("xywh", (16, 4)),
        ("points", (16, 9, 2)),
        ("corners", (16, 4, 2)),
        ("joints", (16, 9, 2)),
        ("coordinates", (16, 2)),
        ("depthMap", (16, 4, 4)),  # half as large as the image
        ("optical_flow", (16, 12, 10, 2)),
        ("heatmaps", (16, 6, 5, 9)),
        ("label_map", (16, 12, 10)),
    ],
    ids=lambda column: column[0],
)
def test_what_lies_in_the_images_coordinates_does_not_stay_behind(column):
    """Boxes at their old place would teach the wrong thing; colours and noise leave them right."""
    name, shape = column
    batch = {"image": random_images(*SHAPE), "mask": np.ones(16, np.float32), "label": np.arange(16)}
    whole = {**batch, name: np.zeros(shape, np.float32)}
    for augmentation in GEOMETRY:
        with pytest.raises(InputError, match=f"column '{name}' .* has image coordinates"):
            jax.eval_shape(ALL[augmentation], KEY, whole)
        jax.eval_shape(ALL[augmentation], KEY, batch)
    for augmentation in set(ALL) - set(GEOMETRY):
        assert jax.eval_shape(ALL[augmentation], KEY, whole).keys() == whole.keys()
    for augmentation in (augment.centre_crop(5), augment.mixup(1, 16), augment.cutmix(1, 16)):
        with pytest.raises(InputError, match=f"column '{name}' .* has image coordinates"):
            jax.eval_shape(augmentation, KEY, whole)


@pytest.mark.parametrize(
    "column",
    [
        ("attention_mask", (16, 10, 10)),
        ("attentionMask", (16, 1, 12, 10)),
        ("causal_mask", (16, 10, 10)),
        ("teacher", (16, 12, 10)),  # features with the image's height and width
        ("teacher_features", (16, 12, 10, 8)),
        ("label", (16, 10)),
        ("image_id", (16,)),
        ("depth", (16,)),
        ("boxing", (16,)),
        ("viewpoint", (16,)),
    ],
    ids=lambda column: column[0],
)
def test_what_lies_elsewhere_passes(column):
    name, shape = column
    batch = {"image": random_images(*SHAPE), name: np.zeros(shape, np.float32)}
    assert jax.eval_shape(ALL["flip"], KEY, batch)[name].shape == shape


def test_the_refusal_of_a_column_says_how_to_go_on():
    batch = {"image": random_images(*SHAPE), "points": np.zeros(16, np.float32)}
    with pytest.raises(InputError, match=r"remove the column, transform both, or rename it if") as error:
        augment.flip()(KEY, batch)
    assert "\n" not in str(error.value)


def test_columns_within_others_are_seen_too():
    batch = {"image": random_images(*SHAPE), "objects": {"bbox": np.zeros((16, 3, 4), np.float32)}}
    with pytest.raises(InputError, match="column 'objects/bbox'"):
        augment.flip()(KEY, batch)


def test_every_augmentation_that_moves_pixels_is_known_to_move_them():
    """What takes an image of one bright pixel to one that is bright elsewhere."""
    image = np.zeros(SHAPE, np.float32)
    image[:, 3, 2] = 1
    moves = lambda name: JITTED[name](KEY, {"image": image})["image"][:, [2, 3, 4], 3:].max() > 0.6
    assert {name for name in ALL if moves(name)} <= set(GEOMETRY)


def test_an_interval_on_both_sides():
    assert augment.up_to(0.25) == (-0.25, 0.25)
    assert augment.up_to(0.25, 1) == (0.75, 1.25)
