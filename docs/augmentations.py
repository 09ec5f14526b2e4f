"""Draws docs/augmentations.png: every augmentation of dl_jax.augment on real images.

python docs/augmentations.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import augment

DRAWS = 8
SIZE = 32  # height and width of an image in pixels
ENLARGED = 2  # factor by which each image is enlarged
GAP = 6  # pixels between two images
LABELS = 240  # width of the column of labels in pixels

DIGITS = {
    "flip()": augment.flip(),
    "pad_and_crop(4)": augment.pad_and_crop(4),
    "rotate((-30, 30))": augment.rotate((-30, 30)),
    "scale((0.6, 1.4))": augment.scale((0.6, 1.4)),
    "translate((-6, 6))": augment.translate((-6, 6)),
    "shear((-0.5, 0.5))": augment.shear((-0.5, 0.5)),
    "affine(\n  scale=(0.8, 1.2), squeeze=(0.8, 1.2),\n  shear=(-0.3, 0.3), translate=(-3, 3))": augment.affine(
        scale=(0.8, 1.2), squeeze=(0.8, 1.2), shear=(-0.3, 0.3), translate=(-3, 3)
    ),
    "elastic(34, 4)": augment.elastic(34, 4),
    "barrel((-0.3, 0.5))": augment.barrel((-0.3, 0.5)),
    "noise(0.2)": augment.noise(0.2),
    "cutout(12)": augment.cutout(12),
    "compose(\n  rotate((-15, 15)), contrast((0.4, 1)),\n  noise(0.1))": augment.compose(
        augment.rotate((-15, 15)), augment.contrast((0.4, 1)), augment.noise(0.1)
    ),
}
COLOURS = {
    "brightness((0.4, 1.6))": augment.brightness((0.4, 1.6)),
    "contrast((0.2, 1.8))": augment.contrast((0.2, 1.8)),
    "saturation((0, 2))": augment.saturation((0, 2)),
    "hue((-0.5, 0.5))": augment.hue((-0.5, 0.5)),
    "colour_jitter(\n  brightness_factor=(0.6, 1.4),\n  contrast_factor=(0.6, 1.4),\n  saturation_factor=(0.6, 1.4),"
    "\n  hue_turns=(-0.1, 0.1))": augment.colour_jitter(
        brightness_factor=(0.6, 1.4), contrast_factor=(0.6, 1.4), saturation_factor=(0.6, 1.4), hue_turns=(-0.1, 0.1)
    ),
    "centre_crop(24)": augment.centre_crop(24),
    "resized_crop(32)": augment.resized_crop(SIZE),
    "rand_augment()": augment.rand_augment(),
    "mixup(1, 10)": augment.mixup(1, 10),
    "cutmix(1, 10)": augment.cutmix(1, 10),
}


def digits(count: int) -> np.ndarray:
    """`count` scans of scikit-learn's digits, from index 2 on, resized from 8x8: [count, SIZE, SIZE, 1]."""
    from sklearn.datasets import load_digits

    values, _ = load_digits(return_X_y=True)  # [1797, 64], 0 to 16
    scans = jnp.asarray(values[2 : 2 + count].reshape(count, 8, 8) / 16, jnp.float32)
    return np.asarray(jax.image.resize(scans, (count, SIZE, SIZE), "cubic").clip(0, 1))[..., None]


def flower() -> np.ndarray:
    """A square crop of scikit-learn's photograph of a dahlia, downsampled by averaging: [SIZE, SIZE, 3]."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image("flower.jpg")[40:360, 140:460] / 255
    step = len(photograph) // SIZE
    return photograph.reshape(SIZE, step, SIZE, step, 3).mean((1, 3)).astype(np.float32)


def row(number: int, augmentation: augment.Augmentation, original: np.ndarray) -> np.ndarray:
    """The original image and its augmented versions side by side, on white: [H, W, 3] with values in [0, 1].

    Every second example of the batch is the image, the others are turned upside down, to be mixed with it.
    """
    pair = np.stack([original[::-1], original])
    batch = {"image": np.tile(pair, (DRAWS, 1, 1, 1)), "label": np.zeros(2 * DRAWS, int)}
    drawn = np.asarray(jax.jit(augmentation)(jax.random.key(number), batch)["image"][1::2])
    margin = (SIZE - drawn.shape[1]) // 2  # of a crop
    drawn = np.pad(drawn, ((0, 0), (margin, margin), (margin, margin), (0, 0)), constant_values=1)
    images = np.clip([original, *drawn], 0, 1).repeat(ENLARGED, 1).repeat(ENLARGED, 2)
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    framed = np.pad(images, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=1)
    return np.concatenate(list(framed), 1)


def main() -> None:
    import matplotlib.pyplot as plt

    augmentations = DIGITS | COLOURS
    originals = [*digits(len(DIGITS)), *[flower()] * len(COLOURS)]
    rows = [row(n, f, image) for n, (f, image) in enumerate(zip(augmentations.values(), originals, strict=True))]
    mosaic = np.concatenate(rows)
    height, width = mosaic.shape[0] + 24, LABELS + mosaic.shape[1]
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    figure.figimage(mosaic, LABELS, 0, origin="upper")
    for n, label in enumerate(augmentations):
        middle = mosaic.shape[0] - n * len(rows[0]) - SIZE * ENLARGED / 2
        figure.text(8 / width, middle / height, label, va="center", fontsize=8)
    for column, title in enumerate(("original", "draws")):
        left = LABELS + column * (SIZE * ENLARGED + GAP)
        figure.text(left / width, 1 - 16 / height, title, fontsize=8)
    # Without the name and version of the software in its metadata the file depends only on the pixels.
    figure.savefig(Path(__file__).with_suffix(".png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
