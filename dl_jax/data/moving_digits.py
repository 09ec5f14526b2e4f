"""Videos of a digit in one of eight motions, which no single frame shows: the sets `moving_digits` and `moving_scans`.

`python -m dl_jax.data prepare moving_digits` makes the first of MNIST, which has to be prepared before; the second is
bundled and made of the bundled `digits`. A clip has 16 frames of 32 x 32 pixels, which are a torus: what leaves the
frame on one side enters it on the other. One digit stays in its place, moves by one or two pixels a frame in one of
four directions, grows from 14 to 28 pixels or shrinks from 28 to 14, or blinks: it is shown for four frames and hidden
for four. Elsewhere the digit's image has 20 pixels. It is scaled by Pillow's bilinear filter and starts anywhere.

A motion and its opposite (left and right, up and down, grow and shrink) consist of the same frames in another order, so
that a bag of frames cannot tell them apart: whoever knows everything about a bag of frames is right about the other two
motions and about half of these six, 62.5 % of all.

Random numbers decide digit, place, speed and phase. Version 1.0.0 of the set, which was made elsewhere, has the same
kinds of clips, each of which `clip` gives for some choice of these, but other choices.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError, require_positive
from dl_jax.data import digits
from dl_jax.data.bundled import Bundled, Derived

FRAMES, SIZE = 16, 32  # frames of a clip, pixels of a frame's side
MOTIONS = ("still", "left", "right", "up", "down", "grow", "shrink", "blink")
LARGEST, USUAL = 28, 20  # pixels of the side of the digit's image
GROWING = np.rint(LARGEST * np.linspace(0.5, 1, FRAMES)).astype(int)  # the same in each frame of a clip
PERIOD = 8  # frames after which a blink repeats; the digit is shown in half of them
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns


def clip(image: np.ndarray, motion: str, place: tuple[int, int], speed: int = 1, phase: int = 0) -> np.ndarray:
    """The frames of one digit, uint8 [16, 32, 32].

    Args:
        image: The digit, uint8 [S, S].
        motion: One of MOTIONS.
        place: Row and column of the upper left corner of the first frame's digit, as if it had 28 pixels where it
            grows or shrinks.
        speed: Pixels a frame, of a motion in one of four directions.
        phase: How many frames of its period a blink has behind it at the start.

    Raises InputError for another motion.
    """
    if motion not in MOTIONS:
        raise InputError(f"motion {motion!r}, expected one of {', '.join(MOTIONS)}; choose one")
    t, (down, right) = np.arange(FRAMES), DIRECTIONS.get(motion, (0, 0))
    sides = {"grow": GROWING, "shrink": GROWING[::-1]}.get(motion, np.full(FRAMES, USUAL))
    margins = (LARGEST - sides) // 2 if motion in ("grow", "shrink") else 0  # the centre stays where it is
    rows, columns = place[0] + margins + speed * t * down, place[1] + margins + speed * t * right
    shown = (t + phase) % PERIOD < PERIOD // 2 if motion == "blink" else t >= 0
    scaled = {side: _scaled(image, int(side)) for side in {*sides}}
    frames = np.zeros((FRAMES, SIZE, SIZE), np.uint8)
    for i in t[shown]:
        side = np.arange(int(sides[i]))
        frames[i][np.ix_((rows[i] + side) % SIZE, (columns[i] + side) % SIZE)] = scaled[sides[i]]
    return frames


def _scaled(image: np.ndarray, side: int) -> np.ndarray:
    import PIL.Image

    return np.asarray(PIL.Image.fromarray(image).resize((side, side), PIL.Image.Resampling.BILINEAR))


def clips(images: np.ndarray, labels: np.ndarray, n: int, seed: int) -> dict[str, np.ndarray]:
    """n clips of random digits, places, speeds and phases, in equal parts of each motion, in random order.

    Takes digits uint8 [N, S, S, 1] with labels [N] and returns {"video": uint8 [n, 16, 32, 32, 1], "label": int32 [n],
    the motion, "digit": int32 [n]}. Raises InputError for images of another shape or type, for other labels than one of
    each image, and for n below 1.
    """
    require_positive({"the number of clips": n})
    if images.dtype != np.uint8 or images.ndim != 4 or len({*images.shape[1:3]}) != 1 or images.shape[3] != 1:
        raise InputError(
            f"digits are {images.dtype} {images.shape}, expected uint8 [N, S, S, 1]: square grey images; convert them"
        )
    if not 0 < len(images) == len(labels):
        raise InputError(f"{len(labels)} labels of {len(images)} digits, expected one of each; choose a split of both")
    rng = np.random.default_rng(seed)
    motion = rng.permutation(np.arange(n) % len(MOTIONS)).astype(np.int32)
    which, places = rng.integers(len(images), size=n), rng.integers(SIZE, size=(n, 2))
    speeds, phases = rng.integers(1, 3, size=n), rng.integers(PERIOD, size=n)
    video = [
        clip(images[which[i], ..., 0], MOTIONS[motion[i]], (places[i, 0], places[i, 1]), speeds[i], phases[i])
        for i in range(n)
    ]
    return {"video": np.stack(video)[..., None], "label": motion, "digit": labels[which].astype(np.int32)}


def features() -> Mapping[str, Any]:
    import tensorflow_datasets as tfds

    return {
        "video": tfds.features.Tensor(shape=(FRAMES, SIZE, SIZE, 1), dtype=np.uint8, encoding="zlib"),
        "label": tfds.features.ClassLabel(names=list(MOTIONS)),
        "digit": tfds.features.ClassLabel(num_classes=10),
    }


def _splits(
    digits_of: Callable[[str], tuple[np.ndarray, np.ndarray]], sizes: Mapping[str, int]
) -> dict[str, Iterable[Mapping[str, Any]]]:
    """The examples of each split, from images and labels of the digits of that split; each has a seed of its own."""
    columns = {split: clips(*digits_of(split), n, seed) for seed, (split, n) in enumerate(sizes.items())}
    return {
        split: [dict(zip(c, row, strict=True)) for row in zip(*c.values(), strict=True)] for split, c in columns.items()
    }


def _scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The bundled digits with a margin of two pixels, as MNIST's have one."""
    images, labels = digits.splits()[split]
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), labels


TARGET = ("video", "label")
SCANS = Bundled(
    "moving_scans",
    "1.0.0",
    "Clips of scikit-learn's scans of handwritten digits in eight motions",
    features,
    lambda: _splits(_scans, {"train": 1200, "test": 400}),
    TARGET,
)
OF_MNIST = Derived(
    "moving_digits",
    "1.1.0",  # 1.0.0 has other clips, and was made elsewhere
    "Clips of MNIST's digits in eight motions",
    features,
    "mnist",
    lambda digits_of: _splits(digits_of, {"train": 1600, "test": 400}),
    TARGET,
)
