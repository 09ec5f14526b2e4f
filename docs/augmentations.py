"""Draws docs/augmentations.png: every augmentation of dl_jax.augment on real pictures.

python docs/augmentations.py
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

from dl_jax import augment

DRAWS = 8
SIZE = 32  # pixels

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
}


def digits(count: int) -> jax.Array:
    """The first scans of scikit-learn's digits, enlarged from 8x8: [count, SIZE, SIZE, 1]."""
    scans = jnp.asarray(load_digits().images[:count] / 16, jnp.float32)
    return jax.image.resize(scans, (count, SIZE, SIZE), "cubic").clip(0, 1)[..., None]


def flower() -> jax.Array:
    """A square of scikit-learn's photograph of a dahlia, averaged down: [2 * SIZE, 2 * SIZE, 3]."""
    photograph = load_sample_image("flower.jpg")[40:360, 140:460] / 255
    side = 2 * SIZE
    step = photograph.shape[0] // side
    return jnp.asarray(photograph.reshape(side, step, side, step, 3).mean((1, 3)), jnp.float32)


def rows(augmentations: Mapping[str, augment.Augmentation], originals: list[jax.Array]) -> dict[str, np.ndarray]:
    """The original and DRAWS draws for each augmentation: label -> [1 + DRAWS, H, W, C]."""
    pictures = {}
    for number, (label, augmentation) in enumerate(augmentations.items()):
        original = originals[number % len(originals)]
        batch = {"image": jnp.broadcast_to(original, (DRAWS, *original.shape))}
        drawn = jax.jit(augmentation)(jax.random.key(number), batch)["image"]
        pictures[label] = np.clip(np.concatenate([original[None], drawn]), 0, 1)
    return pictures


def main() -> None:
    pictures = rows(DIGITS, list(digits(10))) | rows(COLOURS, [flower()])
    figure, axes = plt.subplots(len(pictures), 1 + DRAWS, figsize=(9.6, 0.76 * len(pictures) + 0.3), dpi=100)
    for line, (label, images) in zip(axes, pictures.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)  # matplotlib ignores all but the image for colour
            axis.set_axis_off()
        line[0].text(-0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center", ma="left", fontsize=7)
    axes[0, 0].set_title("original", fontsize=8)
    axes[0, 1].set_title("draws", fontsize=8, loc="left")
    figure.subplots_adjust(left=0.245, right=0.995, bottom=0.005, top=0.975, wspace=0.06, hspace=0.06)
    # Without the software's name and version the file depends on the picture alone.
    figure.savefig(Path(__file__).with_suffix(".png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
