"""Dropout with a bound on the weights regularises a dense network better than the bound or a penalty alone.

Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov 2014, "Dropout: A simple way to prevent neural networks from
overfitting" (JMLR 15), Table 9: a network of 1024-1024-2048 units on MNIST.

    python experiments/vision/regularisation.py --dataset mnist --preset short --seeds 5 --workdir runs/regularisation

Expected of the short schedule: the test error falls from max-norm to dropout with max-norm; from L2 to max-norm it did
not for sure, and with dropout it matters little which of the two is added. The numbers of the table belong to the
preset paper, which takes a million updates.

All methods train the same network for as many steps, by SGD with momentum, a cosine schedule and a bound on the norm of
the gradient; the paper lowers a rate that it does not give:

- none: no regularisation.
- l2, l2_l1: penalties on the kernels.
- max_norm: the norm of each unit's incoming weights is bounded.
- dropout_l2, dropout_max_norm: these with dropout of pixels and hidden units.
- proximal: the penalties of l2_l1 by the proximal operator, after which weights are exactly 0.
- early_stopping: none, but a part of the training images is held out. Its number is the test error at the step with the
  lowest error on these, and training stops where that has not fallen for some time.

The other numbers are those after the last step. The short schedule has narrower layers and learns from 10,000 images.
Its rate (of 0.01, 0.03 and 0.1), its bound (of 2 and 3) and its weight of L2 (of 1e-4 and 5e-4) were chosen on the last
10,000 training images, in pilots of one seed and of several widths and lengths.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.leaves import chosen, is_kernel
from dl_jax.core.recorder import Watch
from dl_jax.core.step import Loss, Tree, make_step, per_seed, start
from dl_jax.harness import Claim, Distinct, NonNegative, Positive, Probability, Run, Some, launch, on_digits
from dl_jax.models.vision.mlp import MLP

Name = Literal[
    "none", "l2", "l2_l1", "max_norm", "dropout_l2", "dropout_max_norm", "proximal", "early_stopping"
]  # fmt: skip
NAMES: tuple[Name, ...] = get_args(Name)


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    hidden: Some[Positive[int]] = (1024, 1024, 2048)  # units of the hidden layers
    steps: Positive[int] = 1_000_000  # train steps of each method
    batch_size: Positive[int] = 100  # images per step, over all devices
    learning_rate: Positive[float] = 0.03  # peak learning rate
    momentum: Probability = 0.95  # momentum of SGD
    clip: Positive[float] = 1.0  # largest norm of the gradient
    l2: NonNegative[float] = 1e-4  # weight of half the sum of the squares
    l1: NonNegative[float] = 1e-6  # weight of the sum of the absolute values
    max_norm: Positive[float] = 3.0  # largest norm of a unit's incoming weights
    dropout: Probability = 0.5  # probability that a hidden unit is dropped
    input_dropout: Probability = 0.2  # probability that a pixel is dropped
    held_out: Probability = 1 / 6  # share of the training images that early stopping measures its error on
    watch_every: Positive[int] = 1000  # steps between these measurements
    patience: Positive[int] = 20  # measurements without a lower error after which it stops
    methods: Distinct[Name] = NAMES  # the methods


PRESETS = {
    "paper": Config(),
    "short": Config(train_split="train[:10000]", hidden=(512, 512, 1024), steps=8000, watch_every=250, patience=6,
                    methods=NAMES[1:]),
    "quick": Config(dataset="digits", hidden=(256, 256), steps=1500, batch_size=50, watch_every=100, patience=5),
    "smoke": Config(dataset="digits", train_split="train[:64]", test_split="test[:40]", hidden=(8,), steps=2,
                    batch_size=16, watch_every=1, patience=1, methods=("dropout_max_norm", "early_stopping")),
}  # fmt: skip

claim = functools.partial(Claim, paper="Srivastava et al. 2014", unit="%")
TABLE = {"l2": 1.62, "l2_l1": 1.60, "max_norm": 1.35, "dropout_l2": 1.25, "dropout_max_norm": 1.05}
LATER = "In the paper L1 is added towards the end of training, here from the start."
PILOT = (
    "A pilot of one seed and 12,000 steps, on the last 10,000 training images: 3.43, 3.28 and 2.80 %. L2 and max-norm "
    "were 0.15 points apart, which is about what seeds differ by."
)
CLAIMS = (
    *(claim(f"test_error/{name}", locator=f"Table 9, {name}", claimed=value, tolerance=0.15,
            given={"dataset": "mnist"}, note=LATER if name == "l2_l1" else "") for name, value in TABLE.items()),
    *(claim(f"test_error/{better}", versus=f"test_error/{worse}", locator=f"Table 9, the order of {better} and {worse}",
            better="lower", preset="short", given={"dataset": "mnist"}, note=PILOT)
      for worse, better in (("l2", "max_norm"), ("max_norm", "dropout_max_norm"))),
    on_digits("test_error/dropout_max_norm", at_most=6.0, unit="%", note="logistic regression: 10.0 %"),
)  # fmt: skip


class Method(NamedTuple):
    """How a network is regularised; by default not at all."""

    tx: optax.GradientTransformation
    dropout: float = 0.0
    input_dropout: float = 0.0
    penalised: Callable[[Loss], Loss] = lambda loss: loss


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    key_init, key, key_test = run.keys(3)  # [S] each
    found = {}

    def trained(name: str, images: Mapping[str, np.ndarray], method: Method, **watched) -> Tree:  # variables [S, ...]
        model = MLP(cfg.hidden, dropout=method.dropout, input_dropout=method.input_dropout)
        step = per_seed(make_step(method.penalised(classify.loss(model.apply)), method.tx), one_by_one=True)
        states = start(model, method.tx, key_init, key, jnp.zeros((1, 28, 28, 1)))
        stream = data.shuffled(images, cfg.batch_size, run.seeds)
        return fit(step, states, stream, steps=cfg.steps, run=run / name, **watched).variables

    def error_on(images: Mapping[str, np.ndarray]) -> Callable[[Tree], np.ndarray]:  # -> [S], in per cent
        of = evaluator(classify.evaluation(MLP(cfg.hidden).apply), images, 10 * cfg.batch_size, key_test)
        return lambda variables: 100 * of(variables)["error"]

    test_error, of = error_on(test), methods(cfg)
    kept, held_out = divided(train, cfg.held_out) if "early_stopping" in cfg.methods else ({}, {})
    for name in cfg.methods:
        if name == "early_stopping":
            validation_error = error_on(held_out)
            measure = lambda v, on=validation_error: {"validation_error": on(v), "test_error": test_error(v)}
            stop = optim.early_stopping("validation_error", cfg.patience, mode="min", seeds=len(run.seeds))
            trained(name, kept, of[name], watch=Watch(cfg.watch_every, measure), stop=stop)
            steps, errors = (run / name).history("watch/validation_error")
            at_best = functools.partial(of_lowest, errors)
            found["test_error/early_stopping"] = at_best((run / name).history("watch/test_error")[1])
            found["steps/early_stopping"] = at_best(np.tile(np.asarray(steps)[:, None], len(run.seeds)))
        else:
            variables = trained(name, train, of[name])
            found[f"test_error/{name}"] = test_error(variables)
            found[f"zeros/{name}"] = zeros(variables["params"])
    return found


def methods(cfg: Config) -> dict[Name, Method]:
    rate = optim.warmup_cosine(cfg.learning_rate, cfg.steps)
    sgd = optax.chain(optax.clip_by_global_norm(cfg.clip), optax.sgd(rate, cfg.momentum))
    plain, bounded = Method(sgd), Method(optax.chain(sgd, optim.max_norm(cfg.max_norm)))
    dropout = {"dropout": cfg.dropout, "input_dropout": cfg.input_dropout}
    l2 = functools.partial(losses.l2, weight=cfg.l2)
    l2_l1 = functools.partial(losses.elastic_net, l1=cfg.l1, l2=cfg.l2)
    # A momentum of m makes a step 1 / (1 - m) times as long in the direction in which gradients agree.
    proximal = optim.proximal_elastic_net(lambda step: rate(step) / (1 - cfg.momentum), cfg.l1, cfg.l2)
    return {
        "none": plain,
        "l2": plain._replace(penalised=l2),
        "l2_l1": plain._replace(penalised=l2_l1),
        "max_norm": bounded,
        "dropout_l2": plain._replace(penalised=l2, **dropout),
        "dropout_max_norm": bounded._replace(**dropout),
        "proximal": Method(optax.chain(sgd, proximal)),
        "early_stopping": plain,
    }


def of_lowest(errors: np.ndarray, values: np.ndarray) -> np.ndarray:  # [steps, S] each -> [S]
    """Each seed's value at the step of its lowest error; a NaN is none."""
    return np.take_along_axis(values, np.nanargmin(errors, 0)[None], 0)[0]


def divided(images: Mapping[str, np.ndarray], share: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All but the last `share` of the images, and these. Raises InputError where one of the two has none."""
    count = len(images["label"])
    first = count - round(share * count)
    if not 0 < first < count:
        raise InputError(
            f"{share:g} of {count} images are {count - first}, expected 1 to {count - 1} to hold out; set --held-out"
        )
    return data.rows(images, slice(first)), data.rows(images, slice(first, None))


def zeros(params: Tree) -> np.ndarray:  # -> [S]
    """The percentage of the weights of all kernels [S, ...] that are exactly 0."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(chosen(params, is_kernel)), strict=True)
    kernels = [np.asarray(each).reshape(len(each), -1) for each, yes in pairs if yes]
    return 100 * (np.concatenate(kernels, 1) == 0).mean(1)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
