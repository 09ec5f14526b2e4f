"""Images with boxes: loaded, padded and checked, and made of digits."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import image

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (20 + 3 * i, 30, 3), np.uint8) for i in range(4)]
BOXES = [[(0.1, 0.2, 0.5, 0.6)], [], [(0.0, 0.0, 1.0, 1.0), (0.3, 0.3, 0.3, 0.4), (0.25, 0.5, 0.75, 1.0)], []]
LABELS = [[1], [], [0, 2, 2], []]


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, str]:
    """A set of four images of different sizes with one, no, three and no boxes; one has no area."""
    features = tfds.features

    class Cells(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "cells"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            objects = {"bbox": features.BBoxFeature(), "label": features.ClassLabel(names=["a", "b", "c"])}
            declared = {
                "image": features.Image(shape=(None, None, 3)),
                "number": np.int32,
                "objects": features.Sequence(objects),
            }
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(declared))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, pixels in enumerate(IMAGES):
                pairs = zip(BOXES[i], LABELS[i], strict=True)
                objects = [{"bbox": features.BBox(*box), "label": label} for box, label in pairs]
                file = io.BytesIO()
                PIL.Image.fromarray(pixels).save(file, "PNG")  # TFDS would encode it with TensorFlow
                yield i, {"image": file.getvalue(), "number": i, "objects": objects}

    folder = tmp_path_factory.mktemp("cells")
    tfds.disable_progress_bar()
    Cells(data_dir=folder, file_format="array_record").download_and_prepare()
    return {"data_dir": str(folder), "cache_dir": str(folder / "cache")}


def test_images_are_resized_and_boxes_stay(cells):
    found = data.objects("cells", "train", height=12, width=16, **cells)
    order = data.load("cells", "train", only=("number",), **cells)["number"]  # TFDS has one of its own
    assert set(found) == {"image", "objects/bbox", "objects/label"}
    for i, number in enumerate(order):
        np.testing.assert_array_equal(found["image"][i], image.resized(IMAGES[number], 12, 16))
        there = len(BOXES[number])
        assert found["objects/bbox"].lengths[i] == there
        np.testing.assert_allclose(found["objects/bbox"][i][:there].reshape(-1, 4), np.reshape(BOXES[number], (-1, 4)))
    kept = data.with_area(found)
    padded = data.padded_objects(kept, most=5, classes=3)
    assert {name: (column.shape, column.dtype) for name, column in padded.items()} == {
        "image": ((4, 12, 16, 3), np.uint8),
        "objects/bbox": ((4, 5, 4), np.float32),
        "objects/label": ((4, 5), np.int32),
        "objects/mask": ((4, 5), bool),
    }
    for i, number in enumerate(order):
        with_area = [k for k, box in enumerate(BOXES[number]) if box[0] < box[2]]
        there = len(with_area)
        np.testing.assert_array_equal(padded["objects/mask"][i], np.arange(5) < there)
        np.testing.assert_array_equal(padded["objects/label"][i, :there], [LABELS[number][k] for k in with_area])
        expected = np.reshape([BOXES[number][k] for k in with_area], (-1, 4))
        np.testing.assert_allclose(padded["objects/bbox"][i, :there], expected)
        assert not padded["objects/bbox"][i, there:].any()
        assert not padded["objects/label"][i, there:].any()


def test_sets_and_sizes_that_do_not_fit_are_refused(cells):
    with pytest.raises(InputError, match=r"height=0, width=16: expected the sides .* 1 or more"):
        data.objects("cells", "train", height=0, width=16, **cells)
    with pytest.raises(InputError, match="data set digits has the columns image, label, expected 'objects/bbox'"):
        data.objects("digits", "train", height=12, width=16, cache_dir=cells["cache_dir"])


def records(*rows, labels=None):
    """The columns of images with these boxes."""
    boxes = data.ragged([np.array(row, np.float32).reshape(-1, 4) for row in rows])
    numbers = [np.zeros(len(row), np.int32) for row in rows] if labels is None else list(map(np.array, labels))
    return {"objects/bbox": boxes, "objects/label": data.ragged(numbers)}


GOOD = [0.1, 0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (records([GOOD], [GOOD] * 4), "row 1 has 4 boxes, expected at most 3; raise the number of boxes"),
        (records([], [GOOD, [0.1, 0.1, 0.5, 1.2]]), r"box 1 of row 1 is \[0.1, 0.1, 0.5, 1.2\], expected ymin, xmin"),
        (records([[-0.1, 0.1, 0.5, 0.2]]), r"box 0 of row 0 is \[-0.1, .* as fractions of the image; divide"),
        (records([[np.nan, 0.1, 0.5, 0.2]]), r"box 0 of row 0 is \[nan, .* as fractions of the image"),
        (
            records([GOOD], [], [GOOD, [0.4, 0.1, 0.4, 0.2]]),
            "box 1 of row 2 is .* expected ymin < ymax and xmin < xmax",
        ),
        (records([[1.0, 0.1, 1 + 5e-6, 0.2]]), "box 0 of row 0 is .* expected ymin < ymax and xmin < xmax"),
        (records([[0.4, 0.5, 0.6, 0.2]]), "box 0 of row 0 is .* expected ymin < ymax and xmin < xmax; leave it out"),
        (records([], [GOOD, GOOD], labels=[[], [0, 3]]), "label 1 of row 1 is 3, expected 0 to 2; leave the box out"),
        (records([GOOD], labels=[[-1]]), "label 0 of row 0 is -1, expected 0 to 2"),
        (records([GOOD], [GOOD], labels=[[0], [0, 1]]), "row 1 has 1 boxes and 2 labels, expected one for each"),
    ],
)
def test_boxes_that_make_no_sense_are_refused(given, message):
    with pytest.raises(InputError, match=message) as error:
        data.padded_objects(given, most=3, classes=3)
    assert "\n" not in str(error.value)
    if "one for each" in message:
        with pytest.raises(InputError, match=message):
            data.with_area(given)


def test_boxes_that_end_a_rounding_outside_are_clipped():
    found = data.padded_objects(records([[-1e-7, 0.1, 1 + 1e-6, 1]]), most=1, classes=1)
    np.testing.assert_allclose(found["objects/bbox"], [[[0, 0.1, 1, 1]]])
    assert found["objects/bbox"].min() == 0
    assert found["objects/bbox"].max() == 1


@pytest.mark.data
def test_cells_of_a_real_set(tfds_dir, tmp_path):
    given = data.objects("bccd", "validation", height=120, width=160, data_dir=tfds_dir, cache_dir=str(tmp_path))
    boxes = data.with_area(given)["objects/bbox"]
    assert boxes.lengths.sum() == given["objects/bbox"].lengths.sum() - 1
    assert data.padded_objects(data.with_area(given), 30, 3)["objects/mask"].sum() == 1137
    with pytest.raises(InputError, match=r"box \d+ of row \d+ is .* expected ymin < ymax"):
        data.padded_objects(given, 30, 3)


# Scenes of digits


def digits():
    """Two, of which the second is too dark to count."""
    scans = np.zeros((2, 28, 28, 1), np.uint8)
    scans[0, 4:9, 6:8], scans[1, 4:9, 6:8] = 255, 60
    return [{"image": scans[i : i + 1], "label": np.array([7])} for i in range(2)]


def test_scenes_of_digits_on_a_texture():
    bright, dark = (data.scenes(each, 6, 0) for each in digits())
    assert (bright["image"].shape, bright["image"].dtype) == ((6, 48, 48, 1), np.uint8)
    assert not dark["segmentation_mask"].any()
    inside = bright["segmentation_mask"] == 1
    assert ((inside.sum((1, 2)) <= 3 * 10) & (inside.sum((1, 2)) >= 10)).all()  # digits may cover each other
    blank = data.scenes({**digits()[0], "image": np.zeros((1, 28, 28, 1), np.uint8)}, 6, 0)["image"][..., 0]
    np.testing.assert_array_equal(bright["image"][..., 0][~inside], blank[~inside])
    assert bright["image"][..., 0][inside].min() >= 127
    again, other = (data.scenes(digits()[0], 6, seed)["image"] for seed in (0, 1))
    np.testing.assert_array_equal(again, bright["image"])
    assert (other != again).any()


def test_the_boxes_of_scenes_are_around_the_digits():
    made = data.scenes(digits()[0], 20, 0, height=40, width=60, pasted=2)
    pixels = np.rint(made["objects/bbox"] * [40, 60, 40, 60]).astype(int)
    np.testing.assert_array_equal(pixels[..., 2:] - pixels[..., :2], np.full((20, 2, 2), [5, 2]))
    covered = np.zeros((20, 40, 60), bool)
    for i, (top, left, bottom, right) in zip(np.repeat(np.arange(20), 2), pixels.reshape(-1, 4), strict=True):
        covered[i, top:bottom, left:right] = True
    np.testing.assert_array_equal(covered, made["segmentation_mask"] == 1)
    np.testing.assert_array_equal(made["objects/label"], np.full((20, 2), 7))
    assert made["objects/mask"].all()
    dark = data.scenes(digits()[1], 3, 0)
    assert not any(dark[f"objects/{name}"].any() for name in ("bbox", "label", "mask"))


def test_scenes_that_cannot_be_made_are_refused():
    for shape in ((0, 8, 8, 1), (2, 8, 9, 1), (2, 8, 8, 3), (2, 8, 8)):
        with pytest.raises(InputError, match=r"digits uint8 \(.*\), expected uint8 \[N, S, S, 1\] with N of 1 or more"):
            data.scenes({"image": np.zeros(shape, np.uint8), "label": np.zeros(shape[0], np.int32)}, 1, 0)
    with pytest.raises(InputError, match=r"digits float32 \(2, 8, 8, 1\), expected uint8"):
        data.scenes({"image": np.zeros((2, 8, 8, 1), np.float32), "label": np.zeros(2, np.int32)}, 1, 0)
    with pytest.raises(InputError, match="the number of images is 0"):
        data.scenes(digits()[0], 0, 0)


def test_a_digit_larger_than_the_scene_is_refused():
    with pytest.raises(InputError, match="images of 27x48, expected 28x28, the size of a digit, or more"):
        data.scenes(digits()[0], 1, 0, height=27)
