"""Loading, scaling, cropping, enlarging and checking images and labels."""

import hashlib
import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import image, shapes


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


# data.images

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((40, 30), (16, 16), (17, 50))]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> dict[str, str]:
    """A set of three images of different sizes, with boxes."""

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    class Ragged(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "ragged"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=5),
                "id": tfds.features.Text(),
                "bbox": tfds.features.BBoxFeature(),
                "camera": {"id": tfds.features.Scalar(np.int32)},
                "camera_id": tfds.features.Scalar(np.int32),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, picture in enumerate(PICTURES):
                box, cameras = tfds.features.BBox(0.0, 0.0, 1.0, 1.0), {"camera": {"id": 7}, "camera_id": 8}
                yield i, {"image": png(picture), "label": i, "id": f"n{i}", "bbox": box, **cameras}

    folder = tmp_path_factory.mktemp("ragged")
    tfds.disable_progress_bar()
    Ragged(data_dir=folder, file_format="array_record").download_and_prepare()
    return {"data_dir": str(folder), "cache_dir": str(folder / "cache")}


def by_pillow(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(picture).resize((width, height), PIL.Image.Resampling.BILINEAR))


def test_images_of_different_sizes_are_scaled_to_their_shorter_side_and_cropped(ragged):
    found = data.images("ragged", "train", size=16, columns=("label", "id"), **ragged)
    assert set(found) == {"image", "label", "id"}
    assert (found["image"].shape, found["image"].dtype) == ((3, 16, 16, 3), np.uint8)
    expected = [by_pillow(PICTURES[0], 21, 16)[2:18], PICTURES[1], by_pillow(PICTURES[2], 16, 47)[:, 15:31]]
    for pixels, label in zip(found["image"], found["label"], strict=True):  # TFDS keeps examples in an order of its own
        np.testing.assert_array_equal(pixels, expected[label])
        assert found["id"][list(found["label"]).index(label)] == f"n{label}".encode()
    again = data.images("ragged", "train", size=12, columns=(), **ragged)  # another size is kept beside the first
    assert {name: column.shape for name, column in again.items()} == {"image": (3, 12, 12, 3)}
    np.testing.assert_array_equal(data.images("ragged", "train", size=16, **ragged)["image"], found["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 16, "channels": 1}, "ragged has an image of 3 channels, expected 1: set the channels"),
        ({"size": 17}, "ragged has an image of 16x16 pixels, expected 17x17 or more: choose a smaller size"),
        ({"size": 0}, "size=0: expected"),
        ({"size": 16, "classes": 2}, r"label 2 of example \d of data set ragged .* expected 0 to 1"),
        ({"size": 16, "columns": ("labels",)}, "the columns bbox, camera/id, camera_id, id, image, label, expected"),
        ({"size": 16, "columns": ("image", "label")}, r"columns=\('image', 'label'\): expected .* without 'image'"),
        ({"size": 16, "columns": "label"}, "columns='label': expected a tuple of names"),
        ({"size": 16, "classes": 0}, "classes=0: expected 1 or more"),
        ({"size": 16, "columns": ("bbox",)}, "column 'bbox' of data set ragged lies in the coordinates of the images"),
    ],
)
def test_images_that_do_not_fit_are_refused(ragged, options, message):
    with pytest.raises(InputError, match=message) as error:
        data.images("ragged", "train", **{"columns": ("label",), **options}, **ragged)
    assert "\n" not in str(error.value)


def test_columns_of_similar_names_are_kept_apart(ragged):
    for column, value in (("camera/id", 7), ("camera_id", 8)):
        found = data.images("ragged", "train", size=16, columns=(column,), **ragged)
        assert found[column].tolist() == [value] * 3


def test_one_channel_and_four_are_scaled_as_each_is():
    four = RNG.integers(0, 256, (20, 30, 4), np.uint8)
    found = image.resized(four, 8, 9)
    assert found.shape == (8, 9, 4)
    for channel in range(4):
        np.testing.assert_array_equal(found[..., channel], by_pillow(four[..., channel], 8, 9))
    np.testing.assert_array_equal(image.resized(four[..., :1], 8, 9), found[..., :1])


@pytest.mark.data
def test_images_of_a_real_set(tfds_dir, tmp_path):
    found = data.images("cifar10_jpeg", "test[:20]", size=32, data_dir=tfds_dir, cache_dir=str(tmp_path))
    whole = data.load("cifar10_jpeg", "test[:20]", data_dir=tfds_dir, cache_dir=str(tmp_path))
    np.testing.assert_array_equal(found["image"], whole["image"])
    np.testing.assert_array_equal(found["label"], whole["label"])
    grey = data.images("mnist", "test[:20]", size=14, channels=1, data_dir=tfds_dir, cache_dir=str(tmp_path))
    assert grey["image"].shape == (20, 14, 14, 1)
    with pytest.raises(InputError, match="image of 1 channels, expected 3"):
        data.images("mnist", "test[:20]", size=28, data_dir=tfds_dir, cache_dir=str(tmp_path))


# Crops of a stream


def test_a_streams_crops_are_windows_of_the_image():
    y, x = np.mgrid[:60, :80]
    ramp = np.stack([y * 3, x * 3, 0 * x], -1).astype(np.uint8)
    crop = data.resized_crop(8)
    sides = []
    for i in range(300):
        found = crop(np.random.default_rng(i), {"image": ramp, "label": np.int32(3)})
        assert found["image"].shape == (8, 8, 3)
        assert found["label"] == 3
        corners = found["image"][[0, -1], [0, -1], :2] / 3  # centres of the outer pixels, in pixels of the ramp
        sides.append((corners[1] - corners[0]) * 8 / 7)
    height, width = np.array(sides).T
    assert (height * width / 4800).min() < 0.15
    assert (height * width / 4800).max() > 0.85
    assert np.log(width / height).min() > np.log(3 / 4) - 0.3
    assert np.log(width / height).max() < np.log(4 / 3) + 0.3
    np.testing.assert_array_equal(
        crop(np.random.default_rng(1), {"image": ramp})["image"],
        crop(np.random.default_rng(1), {"image": ramp})["image"],
    )


def test_a_window_that_never_fits_is_the_middle_and_a_whole_image_is_scaled():
    picture = PICTURES[2]  # 17x50
    whole = data.resized_crop(8, scale=(1, 1))(np.random.default_rng(0), {"image": picture})["image"]
    np.testing.assert_array_equal(whole, by_pillow(picture[:, 13:36], 8, 8))  # 17 * 4 / 3 = 23 columns
    square = data.resized_crop(8, scale=(1, 1), ratio=(1, 1))(np.random.default_rng(0), {"image": PICTURES[1]})["image"]
    np.testing.assert_array_equal(square, by_pillow(PICTURES[1], 8, 8))


def test_a_streams_crops_resume_at_any_step(ragged):
    crops = lambda threads: data.streamed("ragged", "train", 4, 0, transform=kept, threads=threads, **ragged)
    kept = lambda rng, example: crop(rng, {"image": example["image"]})
    crop = data.resized_crop(6)
    one, other = crops(1), crops(3)
    batches = [one(step)["image"] for step in range(4)]
    np.testing.assert_array_equal(other(3)["image"], batches[3])
    assert batches[0].shape == (4, 6, 6, 3)
    assert not np.array_equal(batches[0], batches[3])


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 8, "scale": (0, 1)}, {"size": 8, "ratio": (2, 1)}])
def test_crops_without_sense_are_refused(options):
    with pytest.raises(InputError, match=r"size=.*: expected"):
        data.resized_crop(**options)


def test_a_streams_crops_refuse_boxes():
    example = {"image": PICTURES[0], "objects/bbox": np.zeros((2, 4), np.float32)}
    with pytest.raises(InputError, match="column 'objects/bbox' lies in the coordinates of the image"):
        data.resized_crop(8)(np.random.default_rng(0), example)


# The bundled shapes


def test_shapes_are_the_same_everywhere():
    """Digests of the first images; another one is another version of the set."""
    first, labels = shapes.images(20, seed=0)
    assert hashlib.sha256(first.tobytes()).hexdigest()[:16] == "63d7d868d1881747"
    assert sorted(np.bincount(labels, minlength=10)) == [2] * 10


def test_shapes_prepare_themselves(tmp_path: Path):
    found = data.images("shapes", "test", size=32, cache_dir=str(tmp_path))
    assert (found["image"].shape, found["image"].dtype) == ((1000, 32, 32, 3), np.uint8)
    assert np.bincount(found["label"]).tolist() == [100] * 10
    described = data.info("shapes", cache_dir=str(tmp_path))
    assert (described.splits, described.classes) == ({"train": 4000, "test": 1000}, 10)
    assert described.class_names[:2] == ("disc", "ring")


def test_the_mean_colour_does_not_tell_a_shape():
    """The nearest mean colour of a kind is right hardly more often than a tenth of the time."""
    pixels, labels = shapes.images(1000, seed=5)
    colours = pixels.mean((1, 2))
    means = np.stack([colours[:500][labels[:500] == kind].mean(0) for kind in range(10)])
    nearest = ((colours[500:, None] - means) ** 2).sum(-1).argmin(-1)
    assert (nearest == labels[500:]).mean() < 0.1 + 4 * np.sqrt(0.09 / 500)
