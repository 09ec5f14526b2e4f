"""Enlarging and checking images and labels."""

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError


def images(height: int = 28, width: int = 28, channels: int = 1, dtype=np.uint8) -> dict[str, np.ndarray]:
    return {"image": np.zeros((3, height, width, channels), dtype), "label": np.array([0, 9, 4])}


def test_enlarging_repeats_pixels_and_centres_them_on_zeros():
    small = np.array([[1, 2], [3, 4]], np.uint8).reshape(1, 2, 2, 1)
    expected = [
        [1, 1, 2, 2, 0],
        [1, 1, 2, 2, 0],
        [3, 3, 4, 4, 0],
        [3, 3, 4, 4, 0],
        [0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(data.enlarge(small, 5)[0, :, :, 0], expected)
    np.testing.assert_array_equal(data.enlarge(small[:, :, :1], 4)[0, :, :, 0], [[0, 1, 1, 0]] * 2 + [[0, 3, 3, 0]] * 2)


def test_eight_pixels_become_24_within_28():
    scans = np.random.default_rng(0).integers(1, 256, (2, 8, 8, 3), np.uint8)
    large = data.enlarge(scans, 28)
    assert large.shape == (2, 28, 28, 3)
    assert large.dtype == np.uint8
    np.testing.assert_array_equal(large[:, 2:26:3, 2:26:3], scans)
    np.testing.assert_array_equal(large[:, 4:26:3, 4:26:3], scans)
    assert np.count_nonzero(large) == 9 * scans.size


def test_images_of_the_size_stay_and_larger_ones_are_refused():
    same = images()["image"]
    assert data.enlarge(same, 28) is same
    with pytest.raises(InputError, match="images are 28x28, expected at most 8x8"):
        data.enlarge(same, 8)


def test_sound_images_and_labels_pass():
    data.check_images(images(), "scans", sizes=(8, 28))
    data.check_images(images(8, 8, 3), "scans", sizes=(8,), channels=3)
    data.check_labels(images(), "scans", classes=10)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            images(32, 32, 3),
            "images of data set scans are uint8 of shape 32x32x3, expected uint8 images of 8x8x1 or 28",
        ),
        (images(28, 8), "uint8 of shape 28x8x1"),
        (images(dtype=np.float32), "float32 of shape 28x28x1"),
        ({"text": np.array([b"a"])}, "has the columns text, expected uint8 images"),
    ],
)
def test_other_images_are_refused(records, message):
    with pytest.raises(InputError, match=message):
        data.check_images(records, "scans", sizes=(8, 28))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0, -1, -1], r"label -1 of example 1 of data set scans \(2 invalid labels\): expected 0 to 9"),
        ([0, 3, 10], r"label 10 of example 2"),
        ([0.0, 1.0, 2.0], "are float64 of shape"),
        ([[0], [1], [2]], r"int64 of shape \(3, 1\)"),
    ],
)
def test_other_labels_are_refused(label, message):
    with pytest.raises(InputError, match=message):
        data.check_labels({"label": np.array(label)}, "scans", classes=10)
    with pytest.raises(InputError, match="columns image, expected class labels"):
        data.check_labels({"image": np.zeros(3)}, "scans", classes=10)


def test_grey_images_are_the_digits_enlarged_and_their_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("DL_JAX_CACHE_DIR", str(tmp_path))
    images = data.grey_images("digits", "train[:50]")
    raw = data.load("digits", "train[:50]")
    assert set(images) == {"image", "label"}
    np.testing.assert_array_equal(images["image"], data.enlarge(raw["image"], 28))
    np.testing.assert_array_equal(images["label"], raw["label"])
    with pytest.raises(InputError, match="expected 0 to 4"):
        data.grey_images("digits", "train[:50]", classes=5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("classes", [128, 200, 256, 300])
def test_labels_of_small_integer_types_are_compared_with_the_class_count_as_it_is(dtype, classes):
    last = min(classes, int(np.iinfo(dtype).max) + 1) - 1
    data.check_labels({"label": np.array([0, last], dtype)}, "scans", classes)
    if last < np.iinfo(dtype).max:
        with pytest.raises(InputError, match=f"label {last + 1} of example 1"):
            data.check_labels({"label": np.array([0, last + 1], dtype)}, "scans", classes)
    with pytest.raises(InputError, match="are bool of shape"):
        data.check_labels({"label": np.zeros(2, bool)}, "scans", 2)
