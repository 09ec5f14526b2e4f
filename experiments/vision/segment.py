"""A U-Net cuts digits out of a textured background.

Ronneberger, Fischer & Brox 2015, "U-Net: Convolutional networks for biomedical image segmentation" (arXiv:1505.04597),
on images that are made of digits in place of the paper's cells, so that the bar is our own.

    python experiments/vision/segment.py --dataset mnist --preset paper --seeds 5 --workdir runs/segment

Expected: the intersection of the predicted and the true digits' pixels is at least 54 % of their union, and more than
that of the best threshold of the grey values.

An image of 48x48 pixels has three digits at random places, of random brightness, over a texture: waves of random
directions and frequencies, and noise. A pixel belongs to a digit where the digit is brighter than a quarter. Training
and test images are made of digits of their own splits, and each split has a seed of its own. The network has
three of the paper's five levels, and convolutions that keep the size. The figure `segmentation` shows images, true and
predicted masks.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses, optim
from dl_jax.core import seeds
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Tree, make_step, per_seed, start
from dl_jax.harness import Claim, Positive, Run, launch, rows_figure
from dl_jax.models.vision.unet import UNet


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of 28x28 or 8x8 grey images of ten classes
    train_split: str = "train"  # TFDS split whose digits are in the images to learn from
    test_split: str = "test"  # TFDS split whose digits are in the images to test on
    train_images: Positive[int] = 3000  # images to learn from
    test_images: Positive[int] = 1000  # images to test on
    maps: tuple[Positive[int], ...] = (8, 16, 32)  # maps of each level of the network
    steps: Positive[int] = 600  # train steps
    batch_size: Positive[int] = 32  # images per step, over all devices
    learning_rate: Positive[float] = 3e-3  # peak learning rate of Adam


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", train_images=500, test_images=200, maps=(4, 8, 8), steps=150, batch_size=16),
    "smoke": Config(dataset="digits", train_images=16, test_images=8, maps=(2, 2), steps=2, batch_size=8),
}  # fmt: skip

ours = functools.partial(Claim, paper="our bar", unit="%", better="higher", given={"dataset": "mnist"})
PILOT = "A pilot of one seed, with the last 10,000 training digits: "
CLAIMS = (
    ours("iou/network", at_least=54.0, locator="digits on a texture", note=PILOT + "58.5 %."),
    ours("iou/network", versus="iou/threshold", locator="digits on a texture, against the best threshold",
         note=PILOT + "58.5 against 26.3 %."),
)  # fmt: skip
KEEPS = ("segmentation.png",)  # files in the run's folder

SIZE = 48  # pixels of an image's side


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (
        scenes(data.grey_images(cfg.dataset, split), n, seed)
        for split, n, seed in ((cfg.train_split, cfg.train_images, 0), (cfg.test_split, cfg.test_images, 1))
    )
    model, tx = UNet(cfg.maps), optax.adam(optim.warmup_cosine(cfg.learning_rate, cfg.steps))
    key_init, key, key_test = run.keys(3)  # [S] each
    states = fit(
        per_seed(make_step(functools.partial(pixel_loss, model), tx), one_by_one=True),
        start(model, tx, key_init, key, jnp.zeros((1, SIZE, SIZE, 1))),
        data.shuffled(train, cfg.batch_size, run.seeds),
        steps=cfg.steps,
        run=run,
    )
    test_of = evaluator(functools.partial(overlap, model), test, 4 * cfg.batch_size, key_test)
    first, shown = seeds.split(states.variables)[0], data.rows(test, slice(8))
    found = jax.jit(functools.partial(predicted, model))(first, shown["image"])
    rows = {"image": shown["image"][..., 0], "digits": shown["inside"], "predicted": found}
    run.figure("segmentation", cfg.steps, lambda: rows_figure(rows))
    by_threshold = iou(test["image"][..., 0] > best_threshold(train), test["inside"])
    return {
        "iou/network": 100 * test_of(states.variables)["iou"],
        "iou/threshold": np.full(len(run.seeds), 100 * by_threshold),
    }


def scenes(digits: Mapping[str, np.ndarray], n: int, seed: int) -> dict[str, np.ndarray]:
    """n images of three digits: {"image": uint8 [n, 48, 48, 1], "inside": uint8 [n, 48, 48], 0 or 1}."""
    made = data.scenes(digits, n, seed, height=SIZE, width=SIZE)
    return {"image": made["image"], "inside": made["segmentation_mask"]}


def iou(found: np.ndarray, inside: np.ndarray) -> float:
    """The intersection of two masks over their union; 1 where both are empty."""
    found, inside = found.astype(bool), inside.astype(bool)
    union = (found | inside).sum()
    return float((found & inside).sum() / union) if union else 1.0


def best_threshold(records: Mapping[str, np.ndarray]) -> int:
    """The grey value above which pixels overlap most with the digits."""
    return max(range(0, 255, 5), key=lambda t: iou(records["image"][..., 0] > t, records["inside"]))


def pixel_loss(model: UNet, variables: Tree, batch: Batch, key: Array):
    logits: Any = model.apply(variables, classify.to_unit(batch["image"]), train=True)
    return losses.cross_entropy(logits, batch["inside"]).mean(), ({}, {})


def predicted(model: UNet, variables: Tree, image: Array) -> Array:  # uint8 [B, H, W, 1] -> bool [B, H, W]
    logits: Any = model.apply(variables, classify.to_unit(image), train=False)
    return logits.argmax(-1) == 1


def overlap(model: UNet, variables: Tree, batch: Batch, key: Array):
    """The intersection over the union of all pixels of the set."""
    found, inside = predicted(model, variables, batch["image"]), batch["inside"] == 1
    counts = lambda pixels: (pixels * batch["mask"][:, None, None]).sum()
    return {"iou": (counts(found & inside), counts(found | inside))}


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
