"""ResNets of 20 to 110 layers reach 8.75 to 6.43 % test error on CIFAR-10.

He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition", section 4.2 and Table 6.

    python experiments/vision/cifar_resnet.py --dataset cifar10 --preset paper --seeds 5 --workdir runs/cifar_resnet

Expected: 8.75 ± 0.5 % with 20 layers. A step took 0.45 s on two CPU cores, eight hours for a seed, so it has not
been run; that its first logits and update equal PyTorch's is tested.

As in the paper: 45,000 images to learn from, the mean subtracted, flips and shifts of four pixels, batches of 128, SGD
with momentum 0.9 and a weight decay of 1e-4, a learning rate of 0.1 that is divided by ten after 32,000 and 48,000 of
64,000 steps, and shortcuts without parameters. For 110 layers the paper begins with a tenth of the rate until the
training error is below 80 %, some 400 steps: give --warmup 400. The mean is that of each channel; the paper's is that
of each pixel.

The preset fast has parts of the recipe of Jordan 2024, "94 % on CIFAR-10 in 3.29 seconds on a single GPU", on the same
network: large batches, a triangular learning rate, label smoothing, Nesterov's momentum, cutout and an average of the
weights. Its rates are ours and have not been tried, and that paper's network is another one: nothing is claimed for it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import augment, classify, data, losses, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import State, Tree, make_step, per_seed, start
from dl_jax.harness import Claim, NonNegative, Positive, Probability, Run, launch, on_shapes
from dl_jax.models.layers import Normalise
from dl_jax.models.vision.resnet import CifarResNet


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "cifar10"  # TFDS name of a set of 32x32 colour images in ten classes
    train_split: str = "train[:45000]"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    depth: Positive[int] = 20  # layers, 6 n + 2
    width: Positive[int] = 16  # maps of the first stage
    drop_path: Probability = 0.0  # probability that an example skips the last block in training
    steps: Positive[int] = 64_000  # train steps
    batch_size: Positive[int] = 128  # examples per step, over all devices
    learning_rate: Positive[float] = 0.1  # largest learning rate
    triangle: bool = False  # whether the rate rises over a fifth of the steps and falls to 0, instead of two drops
    warmup: NonNegative[int] = 0  # first steps with a tenth of the learning rate, without the triangle
    momentum: Probability = 0.9  # momentum of SGD
    nesterov: bool = False  # whether the momentum is Nesterov's
    weight_decay: NonNegative[float] = 1e-4  # half the weight of the squared norm of the kernels in the loss
    label_smoothing: Probability = 0.0  # share of a label that is spread over all classes
    average: Probability = 0.0  # decay of the average of the weights that is tested; 0 tests the last weights
    padding: NonNegative[int] = 4  # largest shift of an image; pixels
    cutout: NonNegative[int] = 0  # side of the square that is cut out; pixels
    watch_every: Positive[int] = 4000  # steps between test errors of the weights as they are (for the curve only)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # type of activations; parameters are float32


PRESETS = {
    "paper": Config(),
    "fast": Config(train_split="train", depth=56, steps=1500, batch_size=1024, learning_rate=2.0, triangle=True,
                   momentum=0.85, nesterov=True, weight_decay=5e-4, label_smoothing=0.2, average=0.99, cutout=12,
                   watch_every=250),
    "quick": Config(dataset="shapes", train_split="train", steps=300, width=8, depth=8, watch_every=100),
    "smoke": Config(dataset="shapes", train_split="train[:32]", test_split="test[:20]", depth=8, width=4, steps=2,
                    batch_size=16, average=0.5, cutout=4, label_smoothing=0.1, drop_path=0.1, triangle=True,
                    watch_every=2),
}  # fmt: skip

error = functools.partial(Claim, "test_error", paper="He et al. 2016", unit="%", tolerance=0.5)
CLAIMS = (
    *(
        error(locator=f"Table 6, ResNet-{depth}", claimed=claimed,
              given={"dataset": "cifar10", "depth": depth, "warmup": 400 * (depth == 110)})
        for depth, claimed in {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}.items()
    ),
    on_shapes("test_error", at_most=73.1, unit="%", note="logistic regression: 88 %"),
)  # fmt: skip
KEEPS = ("seen.png",)  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (data.images(cfg.dataset, split, size=32, classes=10) for split in (cfg.train_split, cfg.test_split))
    mean = tuple((train["image"].mean((0, 1, 2)) / 255).tolist())
    net = CifarResNet(cfg.depth, width=cfg.width, drop_path=cfg.drop_path, normalise=Normalise(mean, (1.0,) * 3),
                      dtype=jnp.dtype(cfg.compute_dtype))  # fmt: skip
    parts = [classify.unit, augment.flip(), augment.pad_and_crop(cfg.padding, fill=mean)]
    see = augment.compose(*parts, *([augment.cutout(cfg.cutout, fill=mean)] if cfg.cutout else []))
    loss = losses.with_batch(classify.loss(net.apply), see)
    if cfg.label_smoothing:
        loss = losses.label_smoothing(loss, net.classes, cfg.label_smoothing)
    tx = optimiser(cfg)
    step = per_seed(make_step(losses.l2(loss, cfg.weight_decay), tx), one_by_one=True)
    key_init, key, key_test = run.keys(3)  # [S] each
    test_of = evaluator(classify.evaluation(net.apply), test, 8 * cfg.batch_size, key_test)
    states = fit(
        step,
        start(net, tx, key_init, key, jnp.zeros((1, 32, 32, 3))),
        data.shuffled(train, cfg.batch_size, run.seeds),
        steps=cfg.steps,
        run=run,
        watch=Watch(cfg.watch_every, lambda variables: {"test_error": 100 * test_of(variables)["error"]}),
    )
    run.images(cfg.steps, lambda: {"seen": see(key[0], data.rows(train, slice(64)))["image"]})
    return {"test_error": 100 * test_of(tested(cfg, states))["error"]}


def optimiser(cfg: Config) -> optax.GradientTransformation:
    peak, rise = cfg.learning_rate, cfg.steps // 5
    if not cfg.triangle and cfg.warmup >= max(1, cfg.steps // 2):
        raise InputError(f"warmup is {cfg.warmup}, expected less than half of the {cfg.steps} steps")
    if cfg.triangle:
        sides = optax.linear_schedule(0, peak, rise), optax.linear_schedule(peak, 0, cfg.steps - rise)
        rate = optax.join_schedules(sides, [rise])
    else:
        drops = {cfg.steps // 2: 0.1, cfg.steps * 3 // 4: 0.1}
        first, jump = (peak / 10, {cfg.warmup: 10.0}) if cfg.warmup else (peak, {})
        rate = optax.piecewise_constant_schedule(first, {**jump, **drops})
    sgd = optax.sgd(rate, cfg.momentum, nesterov=cfg.nesterov)
    return optax.chain(sgd, optim.averaged(cfg.average)) if cfg.average else sgd


def tested(cfg: Config, states: State) -> Tree:
    """The variables whose error is reported: with the average of the weights if there is one.

    The statistics of batch normalisation, which are averages anyway, stay those of the last steps.
    """
    return {**states.variables, "params": optim.average(states.opt_state)} if cfg.average else states.variables


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
