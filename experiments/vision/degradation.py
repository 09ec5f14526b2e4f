"""A deeper plain network trains worse than a shallow one; with residual connections depth helps.

He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition", section 4.2 and Figure 6.

    python experiments/vision/degradation.py --dataset cifar10_jpeg --preset paper --seeds 3 --workdir runs/degradation

Expected: the error on the training images is higher for the plain network of 56 layers than for that of 20, and lower
for the residual network of 56 layers than for the plain one.

The networks are the paper's at a quarter of its pixels and half its width (16 x 16 pixels, 8 maps in the first stage),
and train for a few epochs instead of 164, so only the order of the errors is claimed. The data are CIFAR-10's images
from JPEG files. As in the paper: batches of 128, SGD with momentum 0.9, a weight decay of 1e-4, flips and shifts, and a
learning rate of 0.1 that is divided by ten after half and three quarters of the steps.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import augment, classify, data, losses
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.step import make_step, per_seed, start
from dl_jax.harness import Claim, NonNegative, Positive, Probability, Run, curves_figure, launch, on_shapes
from dl_jax.models.vision.resnet import CifarResNet


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "cifar10_jpeg"  # TFDS name of a set of colour images in ten classes, of `size` pixels or more
    train_split: str = "train"  # TFDS split to learn from; its error is what is compared
    test_split: str = "test"  # TFDS split to test on
    size: Positive[int] = 16  # pixels to which the images are scaled down
    shallow: Positive[int] = 20  # layers of the shallow network, 6 n + 2
    deep: Positive[int] = 56  # layers of the deep networks
    width: Positive[int] = 8  # maps of the first stage
    steps: Positive[int] = 2400  # train steps: 6 epochs
    batch_size: Positive[int] = 128  # examples per step, over all devices
    learning_rate: Positive[float] = 0.1  # learning rate of the first half of the steps
    momentum: Probability = 0.9  # momentum of SGD
    weight_decay: NonNegative[float] = 1e-4  # half the weight of the squared norm of the kernels in the loss
    padding: NonNegative[int] = 2  # largest shift of an image; pixels


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="shapes", steps=600, batch_size=32, learning_rate=0.02, shallow=8, deep=20, padding=1),
    "smoke": Config(dataset="shapes", train_split="train[:64]", test_split="test[:40]", size=8, shallow=8, deep=8,
                    width=4, steps=2, batch_size=16),
}  # fmt: skip

ORDER = {"paper": "He et al. 2016", "seeds": 3, "unit": "%", "given": {"dataset": "cifar10_jpeg"}}
CLAIMS = (
    Claim("train_error/plain_shallow", versus="train_error/plain_deep", locator="Figure 6, left", **ORDER),
    Claim("train_error/residual_deep", versus="train_error/plain_deep", locator="Figure 6, middle", **ORDER),
    on_shapes("train_error/residual_deep", at_most=84.7, unit="%", note="logistic regression: 88 %"),
)
KEEPS = ("error.png",)  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    splits = cfg.train_split, cfg.test_split
    train, test = (data.images(cfg.dataset, split, size=cfg.size, classes=10) for split in splits)
    nets = {
        "plain_shallow": CifarResNet(cfg.shallow, width=cfg.width, residual=False),
        "plain_deep": CifarResNet(cfg.deep, width=cfg.width, residual=False),
        "residual_deep": CifarResNet(cfg.deep, width=cfg.width),
    }
    rate = optax.piecewise_constant_schedule(cfg.learning_rate, {cfg.steps // 2: 0.1, cfg.steps * 3 // 4: 0.1})
    tx = optax.sgd(rate, cfg.momentum)
    mean = tuple((train["image"][:5000].mean((0, 1, 2)) / 255).tolist())
    see = augment.compose(classify.unit, augment.flip(), augment.pad_and_crop(cfg.padding, fill=mean))
    stream, found, curves = data.shuffled(train, cfg.batch_size, run.seeds), {}, {}
    key_init, key, key_test = run.keys(3)  # [S] each
    for name, net in nets.items():
        loss = losses.l2(losses.with_batch(classify.loss(net.apply), see), cfg.weight_decay)
        states = start(net, tx, key_init, key, jnp.zeros((1, cfg.size, cfg.size, 3)))
        step = per_seed(make_step(loss, tx), one_by_one=True)
        variables = fit(step, states, stream, steps=cfg.steps, run=run / name).variables
        for split, records in (("train", train), ("test", test)):
            error_of = evaluator(classify.evaluation(net.apply), records, 8 * cfg.batch_size, key_test)
            found[f"{split}_error/{name}"] = 100 * error_of(variables)["error"]
        steps, errors = (run / name).history("error")  # means over 100 steps, of augmented images
        curves[name] = steps, 100 * errors
    run.figure("error", cfg.steps, lambda: curves_figure(curves, xlabel="steps", ylabel="training error (%)"))
    return found


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
