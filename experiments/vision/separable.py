"""A network of depthwise-separable convolutions does as well as a dense one with seven times the multiply-adds.

Howard et al. 2017, "MobileNets: efficient convolutional neural networks for mobile vision applications", section 3.1
and Table 4.

    python experiments/vision/separable.py --dataset mnist --preset paper --seeds 3 --workdir runs/separable

Expected: the difference in test error is no more than 0.3 points (our bar: on ImageNet, the paper loses 1.1 points),
with 6.99 times fewer multiply-adds. Latencies of both networks are printed; they depend on the machine.

The networks are small ones for 28 pixels, of a convolution and five blocks; the training is ours: SGD with momentum, a
cosine schedule and clipping.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import classify, data, optim
from dl_jax.compress import measure
from dl_jax.core import seeds
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import Watch, fit
from dl_jax.core.flops import flops
from dl_jax.core.step import Tree, make_step, per_seed, start
from dl_jax.harness import Claim, Positive, Probability, Run, Some, launch, on_digits
from dl_jax.models.vision.mobilenet import MobileNetV1


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    stem: tuple[Positive[int], Positive[int]] = (16, 1)  # maps and stride of the first convolution
    blocks: Some[tuple[Positive[int], Positive[int]]] = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1))  # of the others
    steps: Positive[int] = 1875  # train steps: four epochs of 60,000 digits
    batch_size: Positive[int] = 128  # examples per step, over all devices
    learning_rate: Positive[float] = 0.1  # peak learning rate
    momentum: Probability = 0.9  # momentum of SGD
    clip: Positive[float] = 1.0  # largest norm of the gradient
    watch_every: Positive[int] = 375  # steps between measurements of the test error (for the curve only)


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", blocks=((16, 2), (32, 2), (32, 1)), steps=200, batch_size=64, watch_every=100),
    "smoke": Config(dataset="digits", train_split="train[:64]", test_split="test[:40]", stem=(8, 2), blocks=((8, 2),),
                    steps=2, batch_size=16, watch_every=2),
}  # fmt: skip

ours = functools.partial(Claim, paper="our bar", seeds=3, given={"dataset": "mnist"})
CLAIMS = (
    ours("test_error/separable", versus="test_error/dense", locator="separable against dense", claimed=0.0,
         tolerance=0.3, unit="%", note="On ImageNet: 29.4 and 28.3 % (Howard et al. 2017, Table 4)."),
    ours("multiply_adds/ratio", locator="dense against separable", claimed=6.99, tolerance=0.005, unit="x",
         better="higher", note="On ImageNet: 4866 and 569 million (Howard et al. 2017, Table 4)."),
    on_digits("test_error/separable", at_most=10.0, unit="%", note="logistic regression: 10.0 %"),
    on_digits("test_error/dense", at_most=5.0, unit="%", note="logistic regression: 10.0 %"),
)  # fmt: skip


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    nets = {
        name: MobileNetV1(cfg.stem, cfg.blocks, classes=10, separable=name == "separable")
        for name in ("separable", "dense")
    }
    tx = optim.clipped_sgd(cfg.learning_rate, cfg.steps, cfg.momentum, cfg.clip)
    stream, found, variables = data.shuffled(train, cfg.batch_size, run.seeds), {}, {}
    key_init, key, key_test = run.keys(3)  # [S] each
    for name, net in nets.items():
        test_of = evaluator(classify.evaluation(net.apply), test, 8 * cfg.batch_size, key_test)
        error = lambda variables, test_of=test_of: {"test_error": 100 * test_of(variables)["error"]}
        step = per_seed(make_step(classify.loss(net.apply), tx), one_by_one=True)
        states = start(net, tx, key_init, key, jnp.zeros((1, 28, 28, 1)))
        states = fit(step, states, stream, steps=cfg.steps, run=run / name, watch=Watch(cfg.watch_every, error))
        found[f"test_error/{name}"] = error(states.variables)["test_error"]
        variables[name] = seeds.split(states.variables)[0]
    counts = {name: multiply_adds(net, variables[name]) for name, net in nets.items()}
    found["multiply_adds/ratio"] = np.full(len(run.seeds), counts["dense"] / counts["separable"])
    if jax.process_index() == 0:
        print_latencies(nets, variables)
    return found


def multiply_adds(net: MobileNetV1, variables: Tree) -> float:
    """The multiply-adds for one image."""
    predict = functools.partial(net.apply, train=False)
    return flops(jax.make_jaxpr(predict)(variables, jnp.zeros((1, 28, 28, 1)))) / 2


def print_latencies(nets: Mapping[str, MobileNetV1], variables: Mapping[str, Tree]) -> None:
    predict = {name: jax.jit(functools.partial(net.apply, variables[name], train=False)) for name, net in nets.items()}
    for size in (1, 128):
        times = measure.latency(predict, np.zeros((size, 28, 28, 1), np.float32), rounds=20)
        shown = ", ".join(f"{name} {1e3 * each.p50:.2f} ms" for name, each in times.items())
        print(f"median latency of a batch of {size}: {shown}")


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
