"""With 100 labels, images without labels lower the error on digits: by pseudo-labels and by a mean teacher.

Lee 2013, "Pseudo-Label: The simple and efficient semi-supervised learning method for deep neural networks" (ICML
workshop); Tarvainen & Valpola 2017, "Mean teachers are better role models" (arXiv:1703.01780), here on digits.

    python experiments/learning/semi_supervised.py --dataset mnist --preset paper --seeds 5 --workdir runs/semi

Expected: with 100 labels both methods have a lower test error than the supervised network, and pseudo-labels also with
600 and 1,000. For the other numbers of labels pilots showed no sure gain, and what is claimed is that the methods lose
no more than 0.6 points there. Five seeds took 32 minutes on a busy CPU core.

All three methods train the same network, from the same weights, with the same augmentation and number of updates:

- supervised: cross-entropy of the labelled images.
- pseudo_label: also cross-entropy of images without labels, whose class is the one that the network predicts for them
  at this step, without augmentation and dropout.
- mean_teacher: also the squared distance between the probabilities of the network and of a teacher for images without
  labels, each augmented anew. The teacher's weights are a moving average of the network's, and it is what is tested.

The weight of the second term rises from 0. The labels are as many of each class, drawn from the seed, and the same for
the three methods, whose differences are therefore paired: with 100 labels the draw moves the error of every method more
than anything else does. All images of the split, also those with labels, serve as images without labels. The numbers
are those after the last step.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import augment, classify, data, losses, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Loss, Metrics, State, Step, Tree, make_step, per_seed, start
from dl_jax.harness import (
    Claim,
    Distinct,
    Fraction,
    NonNegative,
    Positive,
    Probability,
    Run,
    Some,
    curves_figure,
    launch,
    on_digits,
)
from dl_jax.models.vision.mlp import MLP

Method = Literal["supervised", "pseudo_label", "mean_teacher"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from; some of its images have labels
    test_split: str = "test"  # TFDS split to test on
    labels: Some[Positive[int]] = (100, 600, 1000, 3000)  # labelled images, as many of each class
    hidden: Positive[int] = 256  # hidden units
    dropout: Probability = 0.5  # probability that a hidden unit is dropped
    shift: NonNegative[int] = 2  # largest shift of an image in training; pixels
    steps: Positive[int] = 1500  # train steps of each method
    batch_size: Positive[int] = 32  # labelled images per step, over all devices
    unlabelled: Positive[int] = 2  # images without labels for each labelled one
    learning_rate: Positive[float] = 2e-3  # peak learning rate of Adam
    begin: Fraction = 0.1  # part of the steps before the weight of pseudo-labels rises from 0
    full: Fraction = 0.5  # part of the steps at which the weights of both second terms have risen
    alpha: Positive[float] = 1.0  # weight of pseudo-labels in the end
    consistency: Positive[float] = 3.0  # weight of the distance to the teacher in the end
    decay: Probability = 0.99  # decay of the teacher's moving average
    methods: Distinct[Method] = METHODS  # the methods


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", labels=(100,), steps=500),
    "smoke": Config(dataset="digits", train_split="train[:200]", test_split="test[:40]", labels=(20,), hidden=8,
                    steps=2, batch_size=16, unlabelled=2, methods=("mean_teacher",)),
}  # fmt: skip

PILOTS = "Pilots of three seeds on the last 10,000 training images, paired: "
FOUND = {100: "-2.6 ± 1.4", 600: "-1.0 ± 0.4", 1000: "-0.5 ± 0.2"}  # by pilots of pseudo-labels
LARGER = " points. Lee's network is larger, and trains for longer without augmentation."
MISSED = " With two of the five draws the error changed by less than half a point; we do not know why."
gain = functools.partial(Claim, unit="%", better="lower", given={"dataset": "mnist"})
no_loss = functools.partial(
    gain, paper="our bar", claimed=0, tolerance=0.6, locator="no loss, which is not sure to gain"
)
CLAIMS = (
    *(gain(f"error/pseudo_label_{n}", versus=f"error/supervised_{n}", paper="Lee 2013",
           locator=f"Table 1, the order with {n:,} labels",
           note=PILOTS + found + LARGER + (MISSED if n == 100 else "")) for n, found in FOUND.items()),
    gain("error/mean_teacher_100", versus="error/supervised_100", paper="Tarvainen & Valpola 2017",
         locator="Tables 1 and 2, the order of mean teacher and supervised-only",
         note=PILOTS + "-2.9 ± 0.7 points. The paper has SVHN and CIFAR-10."),
    no_loss("error/pseudo_label_3000", versus="error/supervised_3000", note=PILOTS + "-0.2 ± 0.2 points."),
    *(no_loss(f"error/mean_teacher_{n}", versus=f"error/supervised_{n}", note=f"{PILOTS}{found} points.")
      for n, found in ((600, "-0.2 ± 0.5"), (1000, "-0.1 ± 0.1"), (3000, "0.2 ± 0.2"))),
    on_digits("error/pseudo_label_100", at_most=13.9, unit="%", note="logistic regression of 100 labels: 13.9 %"),
)  # fmt: skip
KEEPS = ("error.png",)  # files in the run's folder

CLASSES = 10


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    require_labels(cfg.labels)
    begin, full = round(cfg.begin * cfg.steps), round(cfg.full * cfg.steps)
    if begin >= full:
        raise InputError(
            f"begin is {cfg.begin} and full {cfg.full} of {cfg.steps} steps, which are steps {begin} and {full}, "
            "expected the first below the second, as the weight rises between; change them or give more steps"
        )
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    labelled = {n: [data.rows(train, data.few(train["label"], n // CLASSES, CLASSES, seed)) for seed in run.seeds]
                for n in cfg.labels}  # fmt: skip
    unlabelled = data.shuffled({"image": train["image"]}, cfg.batch_size * cfg.unlabelled, run.seeds)
    model, tx = MLP((cfg.hidden,), dropout=cfg.dropout), optax.adam(optim.warmup_cosine(cfg.learning_rate, cfg.steps))
    key_init, key, key_test = run.keys(3)  # [S] each
    states = start(model, tx, key_init, key, jnp.zeros((1, 28, 28, 1)))
    followed = states._replace(extra={"teacher": jax.tree.map(jnp.copy, states.params)})
    test_of = evaluator(classify.evaluation(model.apply), test, 1000, key_test)
    error = lambda params: 100 * test_of({"params": params})["error"]
    step_of = {name: per_seed(step, one_by_one=True) for name, step in steps(cfg, model, tx).items()}

    found = {}
    for n, some in labelled.items():
        alone = data.per_seed(
            [data.shuffled(records, cfg.batch_size, seed) for records, seed in zip(some, run.seeds, strict=True)]
        )
        for name in cfg.methods:
            stream = alone if name == "supervised" else beside(alone, unlabelled, cfg.unlabelled)
            begin = followed if name == "mean_teacher" else states
            learnt = fit(step_of[name], begin, stream, steps=cfg.steps, run=run / f"{name}_{n}")
            found[f"error/{name}_{n}"] = error(learnt.extra.get("teacher", learnt.params))
            if name == "mean_teacher":
                found[f"error/student_{n}"] = error(learnt.params)
    curves = {name: (np.array(cfg.labels), np.stack([found[f"error/{name}_{n}"] for n in cfg.labels]))
              for name in cfg.methods}  # fmt: skip
    run.figure("error", cfg.steps, lambda: curves_figure(
        curves, xlabel="labels", ylabel="test error (%)", log_x=True, log_y=True))  # fmt: skip
    return found


def require_labels(labels: tuple[int, ...]) -> None:
    """Raises InputError where the labels cannot be divided evenly among the classes."""
    for n in labels:
        if n % CLASSES:
            raise InputError(f"labels is {n}, expected a multiple of {CLASSES}: as many images of each class")


def beside(labelled: data.Stream, unlabelled: data.Stream, each: int) -> data.Stream:
    """The stream `labelled` with a column `unlabelled` [S, B, each, H, W, C]: so many images of `unlabelled` a row."""

    def read(step: int, rows: slice) -> data.Columns:
        first, last, _ = rows.indices(labelled.batch_size)
        images = unlabelled(step, slice(first * each, last * each))["image"]  # [S, b · each, H, W, C]
        shape = (len(images), last - first, each, *images.shape[2:])
        return {**labelled(step, rows), "unlabelled": images.reshape(shape)}

    return data.Stream(labelled.batch_size, read, axis=1)


def steps(cfg: Config, model: MLP, tx: optax.GradientTransformation) -> dict[Method, Step]:
    """The step of each method."""
    apply = functools.partial(logits_of, model)
    see = augment.compose(classify.unit, augment.pad_and_crop(cfg.shift))
    supervised = losses.with_batch(classify.loss(apply), see)
    pseudo, consistent = pseudo_label_loss(apply, see), consistency_loss(apply, see)
    first, last = round(cfg.begin * cfg.steps), round(cfg.full * cfg.steps)
    alpha = optax.linear_schedule(0, cfg.alpha, last - first, first)  # Lee 2013, equation 16
    weight = sigmoid_ramp(cfg.consistency, last)
    return {
        "supervised": make_step(supervised, tx),
        "pseudo_label": with_second(supervised, pseudo, alpha, tx),
        "mean_teacher": followed_by_teacher(with_second(supervised, consistent, weight, tx), cfg.decay),
    }


def logits_of(model: MLP, variables: Tree, image: Array, *, train: bool, rngs: Any = None) -> Any:  # -> [B, classes]
    """The logits of the network, which does not see its teacher."""
    return model.apply({"params": variables["params"]}, image, train=train, rngs=rngs)


def with_second(first: Loss, second: Loss, weight: optax.Schedule, tx: optax.GradientTransformation) -> Step:
    """The step of the sum of `first` and of `second` times its weight at this step."""

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        terms = {"labelled": (1.0, first), "unlabelled": (weight(state.step), second)}
        return make_step(losses.weighted_sum(terms), tx)(state, batch)

    return step


def followed_by_teacher(step: Step, decay: float) -> Step:
    """`step`, after which the teacher's weights move towards the network's: θ' ← a θ' + (1 − a) θ.

    a = min(decay, 1 − 1 / (t + 1)) after t steps, so that the first ones have equal weights (the authors' code). The
    teacher is a collection of the state, beside its parameters.
    """

    def follow(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = step(state, batch)
        rate = jnp.maximum(1 - decay, 1 / (state.step + 1))
        teacher = optax.incremental_update(state.params, state.extra["teacher"], rate)
        return state._replace(extra={**state.extra, "teacher": teacher}), metrics

    return follow


def sigmoid_ramp(peak: float, length: int) -> optax.Schedule:
    """peak · exp(−5 (1 − t / length)²) up to t = length, then `peak` (Laine & Aila 2017, arXiv:1610.02242)."""
    return lambda step: peak * jnp.exp(-5 * (1 - jnp.minimum(step / length, 1)) ** 2)


def pseudo_label_loss(apply: Callable[..., Any], see: augment.Augmentation) -> Loss:
    """Cross-entropy of images without labels to the class that the network predicts (Lee 2013, equations 14 and 15)."""

    def loss(variables: Tree, batch: Batch, key: Array):
        images, (key_see, key) = flat(batch["unlabelled"]), jax.random.split(key)
        labels = apply(variables, classify.to_unit(images), train=False).argmax(-1)  # no gradient passes
        return classify.loss(apply)(variables, see(key_see, {"image": images, "label": labels}), key)

    return loss


def consistency_loss(apply: Callable[..., Any], see: augment.Augmentation) -> Loss:
    """‖f(x, θ') − f(x, θ)‖² of probabilities, with another augmentation and dropout each (arXiv:1703.01780, eq. 1)."""

    def loss(variables: Tree, batch: Batch, key: Array):
        def answer(params: Tree, key: Array) -> Array:  # -> [B, classes]
            key_see, key = jax.random.split(key)
            image = see(key_see, {"image": flat(batch["unlabelled"])})["image"]
            return jax.nn.softmax(apply({"params": params}, image, train=True, rngs={"dropout": key}))

        key, key_teacher = jax.random.split(key)
        target = jax.lax.stop_gradient(answer(variables["teacher"], key_teacher))
        return ((target - answer(variables["params"], key)) ** 2).sum(-1).mean(), ({}, {})

    return loss


def flat(images: Array) -> Array:  # [B, k, H, W, C] -> [B · k, H, W, C]
    return images.reshape(-1, *images.shape[2:])


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
