"""Logit adjustment learns digits of which some are rare with a lower balanced error than cross-entropy.

Menon et al. 2021, "Long-tail learning via logit adjustment" (arXiv:2007.07314, ICLR 2021), on a small set in place of
the paper's CIFAR and larger ones, so that only the order is claimed.

    python experiments/vision/long_tail.py --dataset mnist --preset paper --seeds 5 --workdir runs/long_tail

Expected: the balanced error, the mean of the errors of the ten classes, is lower with logit adjustment than with plain
cross-entropy. Three other remedies are shown beside them.

The training split is cut: of digit c only n · imbalance^(−c / 9) images are left, where n is the number of images that
every digit has. All methods train the same network for as many steps, with Adam:

- cross_entropy: every image counts once.
- class_weights: an image counts in inverse proportion to the number of images of its class.
- focal: the focal loss of Lin et al. 2017 (arXiv:1708.02002), in which images that are easy count less.
- adjusted: cross-entropy of the logits plus the log of the classes' shares of the images (equation 10, with τ = 1),
  which are not added in the test.
- sampling: cross-entropy of batches in which every class is equally frequent; rare images are repeated.

The numbers are those after the last step. The figure `errors` shows the error of each class, the figure `reliability`
how often a digit is right that gets some probability. `calibration_error` is the mean over the classes of how far the
two are apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses, metrics, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Tree, make_step, per_seed, start
from dl_jax.harness import (
    Between,
    Claim,
    Distinct,
    NonNegative,
    Positive,
    Run,
    curves_figure,
    launch,
    on_digits,
    reliability_figure,
)
from dl_jax.models.vision.lenet import LeNetCaffe

Method = Literal["cross_entropy", "class_weights", "focal", "adjusted", "sampling"]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    imbalance: Annotated[float, Between(low=1)] = 100.0  # images of the first class for one of the last
    steps: Positive[int] = 1000  # train steps of each method
    batch_size: Positive[int] = 128  # images per step, over all devices
    learning_rate: Positive[float] = 1e-3  # peak learning rate of Adam
    gamma: NonNegative[float] = 2.0  # exponent of the focal loss
    rare: Annotated[int, Between(1, 10)] = 3  # classes whose mean error is the error of the tail
    methods: Distinct[Method] = ("cross_entropy", "class_weights", "focal", "adjusted", "sampling")  # the methods


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", imbalance=30.0, steps=150, batch_size=64),
    "smoke": Config(dataset="digits", imbalance=20.0, steps=2, batch_size=16,
                    methods=("sampling",)),
}  # fmt: skip

CLAIMS = (
    Claim("balanced_error/adjusted", versus="balanced_error/cross_entropy", paper="Menon et al. 2021",
          locator="Table 3, the order of logit-adjusted loss and ERM", unit="%", better="lower",
          given={"dataset": "mnist", "imbalance": 100.0},
          note="A pilot of one seed, on the last 10,000 training images: 4.1 against 6.1 %."),
    on_digits("balanced_error/adjusted", at_most=8.5, unit="%", note="cross-entropy: 11.4 %"),
)  # fmt: skip
KEEPS = ("errors.png", "reliability.png")  # files in the run's folder

CLASSES = 10
PerLabel = Callable[[Array, Array], Array]  # (logits [B, C], labels int [B]) -> [B]


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    train = data.rows(train, tail(train["label"], cfg.imbalance))
    counts = np.bincount(train["label"], minlength=CLASSES)
    model, tx = LeNetCaffe(CLASSES), optax.adam(optim.warmup_cosine(cfg.learning_rate, cfg.steps))
    key_init, key, key_test = run.keys(3)  # [S] each
    test_of = evaluator(functools.partial(tested, model), test, 8 * cfg.batch_size, key_test)
    of, errors, reliability = per_label(counts, cfg.gamma), {}, {}
    for name in cfg.methods:
        learnt = data.rows(train, balanced(train["label"])) if name == "sampling" else train
        states = fit(
            per_seed(make_step(functools.partial(mean_loss, model, of[name]), tx), one_by_one=True),
            start(model, tx, key_init, key, jnp.zeros((1, 28, 28, 1))),
            data.shuffled(learnt, cfg.batch_size, run.seeds),
            steps=cfg.steps,
            run=run / name,
        )
        found = test_of(states.variables)
        errors[name], reliability[name] = class_errors(found["confusion"]), found["reliability"]  # [S, 10, ...]
    curves = {name: (np.arange(CLASSES), each.T) for name, each in errors.items()}
    run.figure("errors", cfg.steps, lambda: curves_figure(
        curves, xlabel="class, from the most to the least frequent", ylabel="test error (%)"))  # fmt: skip
    mean = {name: each.mean(0) for name, each in reliability.items()}
    run.figure("reliability", cfg.steps, lambda: reliability_figure(mean, data.info(cfg.dataset).class_names))
    return {
        **{f"balanced_error/{name}": each.mean(1) for name, each in errors.items()},
        **{f"tail_error/{name}": each[:, -cfg.rare :].mean(1) for name, each in errors.items()},
        **{f"calibration_error/{name}": metrics.calibration_error(each) for name, each in reliability.items()},
    }


def per_label(counts: np.ndarray, gamma: float) -> dict[str, PerLabel]:
    """The loss of an image by each method, for these numbers of images of the classes, int [C]."""
    weight = jnp.asarray(counts.sum() / (len(counts) * counts), jnp.float32)  # 1 on average over the images
    log_share = jnp.asarray(np.log(counts / counts.sum()), jnp.float32)
    return {
        "cross_entropy": losses.cross_entropy,
        "class_weights": lambda logits, labels: weight[labels] * losses.cross_entropy(logits, labels),
        "focal": functools.partial(losses.focal, gamma=gamma),
        "adjusted": lambda logits, labels: losses.cross_entropy(logits + log_share, labels),
        "sampling": losses.cross_entropy,
    }


def tail(labels: np.ndarray, imbalance: float) -> np.ndarray:  # int [N] -> int [M]
    """The rows of the first n · imbalance^(−c / (C − 1)) images of class c, where n is what every class has.

    Raises InputError where no image of some class is left.
    """
    most = np.bincount(labels, minlength=CLASSES).min()
    left = (most * imbalance ** (-np.arange(CLASSES) / (CLASSES - 1)) + 1e-6).astype(int)  # [C]
    if left.min() < 1:
        raise InputError(
            f"imbalance is {imbalance:g} and the rarest class has {most} images, of which none would be left, expected "
            "one of each class; lower it, or give a larger split"
        )
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:n] for c, n in enumerate(left)]))


def balanced(labels: np.ndarray) -> np.ndarray:  # int [N] -> int [C · n]
    """Rows in which each class is as frequent as the most frequent one; those of rarer classes are repeated."""
    most = np.bincount(labels).max()
    return np.concatenate([np.resize(np.flatnonzero(labels == c), most) for c in np.unique(labels)])


def mean_loss(model: LeNetCaffe, of: PerLabel, variables: Tree, batch: Batch, key: Array):
    logits: Any = model.apply(variables, classify.to_unit(batch["image"]), train=True)
    return of(logits, batch["label"]).mean(), ({}, {})


def tested(model: LeNetCaffe, variables: Tree, batch: Batch, key: Array):
    logits: Any = model.apply(variables, classify.to_unit(batch["image"]), train=False)
    given = logits, batch["label"], batch["mask"]
    return {"confusion": metrics.confusion_matrix(*given), "reliability": metrics.reliability(*given)}


def class_errors(confusion: np.ndarray) -> np.ndarray:  # [S, C, C], rows are the labels -> [S, C]
    """The errors of the classes in per cent. Raises InputError for a class without images."""
    images = confusion.sum(-1)
    if not images.all():
        raise InputError(f"the test split has no image of class {np.argwhere(images == 0)[0, 1]}, expected all classes")
    return 100 * (1 - np.diagonal(confusion, axis1=1, axis2=2) / images)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
