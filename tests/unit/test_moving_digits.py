"""Clips of moving digits: their motions, read from the frames, and what a bag of frames cannot tell."""

import collections
import itertools

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import bundled, moving_digits
from dl_jax.data.moving_digits import MOTIONS, clip, clips
from dl_jax.data.prepare import prepare

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}
DIGIT = np.random.default_rng(0).integers(1, 256, (12, 12), np.uint8)  # no part of it is empty or like another


def motion_of(video):
    """The motion that the frames [16, 32, 32] show, by rules that know nothing of how they were made."""
    pairs = list(itertools.pairwise(video))
    lit = [bool(frame.any()) for frame in video]
    if not all(lit):
        pattern = "".join("01"[each] for each in lit)
        assert pattern in "1111000011110000111100001111"
        assert len({frame.tobytes() for frame in video if frame.any()}) == 1
        return "blink"
    for motion, shift, axis in (("left", -1, 1), ("right", 1, 1), ("up", -1, 0), ("down", 1, 0)):
        for speed in (1, 2):
            if all((np.roll(a, speed * shift, axis) == b).all() and (a != b).any() for a, b in pairs):
                return motion
    ink = np.diff([frame.sum(dtype=int) for frame in video])
    if not ink.any():
        assert all((a == b).all() for a, b in pairs)
        return "still"
    zero = [i for i, step in enumerate(ink) if step == 0]
    assert zero == [7]  # 15 steps from 14 to 28 pixels, one of which is rounded away
    return "grow" if (ink >= 0).all() else "shrink" if (ink <= 0).all() else "none"


@pytest.fixture(scope="module")
def records():
    images = np.stack([np.roll(DIGIT, i, 0) for i in range(10)])[..., None]
    return clips(images, np.arange(10), 96, seed=0)


def test_the_records(records):
    video, label, digit = (records[name] for name in ("video", "label", "digit"))
    assert (video.dtype, video.shape) == (np.uint8, (96, 16, 32, 32, 1))
    assert np.bincount(label).tolist() == [12] * 8
    assert label.dtype == digit.dtype == np.int32
    assert set(digit) == set(range(10))
    assert [motion_of(each[..., 0]) for each in video] == [MOTIONS[each] for each in label]


def test_a_clip_backwards_is_a_clip_of_the_opposite_motion(records):
    for video, label in zip(records["video"][..., 0], records["label"], strict=True):
        assert motion_of(video[::-1]) == OPPOSITE.get(MOTIONS[label], MOTIONS[label])


def test_opposite_motions_are_the_same_frames_in_another_order():
    """The clips from all starts have the same bags of frames, each as often: a bag is right in 62.5 % at most."""
    start = lambda motion, i: (i, 3) if motion in ("up", "down") else (3, i)
    bags = {
        motion: collections.Counter(
            tuple(sorted(frame.tobytes() for frame in clip(DIGIT, motion, start(motion, i), speed)))
            for i in range(32)
            for speed in (1, 2)
        )
        for motion in MOTIONS
    }
    for one, other in itertools.combinations(MOTIONS, 2):
        if OPPOSITE.get(one) == other:
            assert bags[one] == bags[other]
        else:
            assert not bags[one].keys() & bags[other].keys()
    right = [max(of[bag] for of in bags.values()) for bag in set().union(*bags.values())]
    assert sum(right) / (64 * len(MOTIONS)) == 0.625


def test_the_same_seed_gives_the_same_records_and_another_one_others(records):
    images = np.stack([np.roll(DIGIT, i, 0) for i in range(10)])[..., None]
    for seed, same in ((0, True), (1, False)):
        again = clips(images, np.arange(10), 96, seed)
        assert (again["video"] == records["video"]).all() == same


@pytest.mark.parametrize(
    ("shape", "dtype", "labels", "n", "message"),
    [
        ((3, 8, 8), np.uint8, 3, 2, r"digits are uint8 \(3, 8, 8\), expected uint8 \[N, S, S, 1\]"),
        ((3, 8, 9, 1), np.uint8, 3, 2, r"digits are uint8 \(3, 8, 9, 1\)"),
        ((3, 8, 8, 3), np.uint8, 3, 2, r"digits are uint8 \(3, 8, 8, 3\)"),
        ((3, 8, 8, 1), np.float32, 3, 2, r"digits are float32"),
        ((3, 8, 8, 1), np.uint8, 2, 2, "2 labels of 3 digits, expected one of each"),
        ((0, 8, 8, 1), np.uint8, 0, 2, "0 labels of 0 digits"),
        ((3, 8, 8, 1), np.uint8, 3, 0, "the number of clips is 0, expected more than 0"),
    ],
)
def test_what_is_refused(shape, dtype, labels, n, message):
    with pytest.raises(InputError, match=message):
        clips(np.zeros(shape, dtype), np.zeros(labels, int), n, 0)


def test_another_motion_is_refused():
    with pytest.raises(InputError, match="motion 'turn', expected one of still, left, right"):
        clip(DIGIT, "turn", (0, 0))


def test_one_clip_of_one_digit():
    found = clips(np.full((1, 1, 1, 1), 255, np.uint8), np.array([7]), 1, 0)
    assert (found["video"].shape, found["label"].tolist(), found["digit"].tolist()) == ((1, 16, 32, 32, 1), [0], [7])
    assert (found["video"] == 255).sum() == 16 * 400


def test_the_bundled_set(tmp_path):
    cache = str(tmp_path)
    described = data.info("moving_scans", cache_dir=cache)
    assert (described.splits, described.class_names) == ({"train": 1200, "test": 400}, MOTIONS)
    test = data.load("moving_scans", "test", cache_dir=cache)
    assert [motion_of(video) for video in test["video"][::8, ..., 0]] == [MOTIONS[each] for each in test["label"][::8]]
    assert np.bincount(test["label"]).tolist() == [50] * 8


def write_digits(root):
    """A prepared set called mnist with ten digits in each split."""
    rng = np.random.default_rng(0)
    splits = {
        split: (rng.integers(1, 256, (10, 28, 28, 1), np.uint8), np.arange(10, dtype=np.uint8))
        for split in ("train", "test")
    }
    made = bundled.image_set("mnist", "3.0.1", "", tuple("0123456789"), (28, 28, 1), lambda: splits)
    bundled.write(made, made.splits(), root)


def test_preparing_it_of_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = tmp_path / "tfds"
    with pytest.raises(InputError, match=r"data set mnist is not prepared in .*: prepare it with"):
        prepare("moving_digits", str(here))
    monkeypatch.setattr(moving_digits, "clips", lambda images, labels, n, seed: clips(images, labels, n // 100, seed))
    write_digits(here)
    found = prepare("moving_digits", str(here))
    assert (found.name, found.version) == ("moving_digits", "1.1.0")
    described = data.info("moving_digits", str(here))
    assert (described.splits, described.class_names) == ({"train": 16, "test": 4}, MOTIONS)
    records = data.load("moving_digits", "train", str(here))
    assert [motion_of(video) for video in records["video"][..., 0]] == [MOTIONS[each] for each in records["label"]]


def test_another_version_is_not_known(tmp_path):
    with pytest.raises(
        InputError, match=r"moving_digits:2.0.0 is unknown, expected moving_digits or moving_digits:1.1.0"
    ):
        prepare("moving_digits:2.0.0", str(tmp_path))


@pytest.mark.data
def test_the_clips_of_a_set_that_was_prepared_before_are_ours(tfds_dir):
    """Each is what `clip` makes of one of MNIST's digits, for some place, speed and phase."""
    test, mnist = data.load("moving_digits", "test"), data.load("mnist", "test")
    places = [(row, column) for row in range(32) for column in range(32)]
    for motion in ("right", "grow", "blink"):
        i = int(np.flatnonzero(test["label"] == MOTIONS.index(motion))[0])
        video = test["video"][i, ..., 0]
        first = next(t for t, frame in enumerate(video) if frame.any())
        digits = mnist["image"][mnist["label"] == test["digit"][i]][..., 0]
        ours = ((digit, clip(digit, motion, (0, 0), 0, -first)[first]) for digit in digits)
        alike = [(digit, frame) for digit, frame in ours if frame.sum() == video[first].sum()]
        starts = [(d, at) for d, frame in alike for at in places if (np.roll(frame, at, (0, 1)) == video[first]).all()]
        assert len(starts) == 1
        made = [clip(starts[0][0], motion, starts[0][1], speed, phase) for speed in (1, 2) for phase in range(8)]
        assert any((video == each).all() for each in made)
