"""Eight bits cost LeNet-300-100 nothing; two bits cost it little where it was trained with them, and a lot where not.

Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference"
(arXiv:1712.05877), sections 2 and 3; Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient
inference: a whitepaper" (arXiv:1806.08342), abstract.

    python experiments/compression/quantize_lenet.py --dataset mnist --preset paper --seeds 5 --workdir runs/quantize

Expected: with 8-bit weights and activations at most 0.2 points more test errors than in floating point, after training
and in training; quantisation-aware training ahead at 4 and at 2 bits, paired over seeds. Five seeds take eight
minutes on a CPU core.

Both papers measure on ImageNet and COCO, so what is reproduced is the mechanism: there is no number of theirs to meet,
and 0.2 points are our margin. Weights are symmetric per output channel. Activations have 8 bits on the ranges that
1,000 training digits gave: in training, those of the network that it began from, where Jacob et al. let them follow.
All networks of a seed are the same at first, and are then trained on with the same digits in the same order: in
floating point (`error/float`, which rounded is `error/ptq...`) or at some number of bits (`error/qat...`). What is
tested came back from packed integers, `kilobytes/...` of them. The second training's learning rate was chosen on the
last 10 % of the training set; the first one's is a guess.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses, optim
from dl_jax.compress import quantize
from dl_jax.core import devices
from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.core.evaluate import evaluate
from dl_jax.core.fit import fit
from dl_jax.core.step import Tree, init_state, make_step, per_seed
from dl_jax.harness import Claim
from dl_jax.harness.launch import launch
from dl_jax.harness.run import Run
from dl_jax.models.vision.lenet import LeNet300


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    steps: int = 6000  # train steps in floating point: 10 passes over 60,000 digits
    tuning_steps: int = 3000  # train steps after that, in floating point and at each number of bits
    batch_size: int = 100  # examples per step, over all devices
    learning_rate: float = 0.1  # at its peak
    tuning_rate: float = 0.02  # learning rate after that, at its peak
    momentum: float = 0.9  # of SGD
    bits: tuple[int, ...] = (8, 4, 2)  # bits of a weight
    activation_bits: int = 8  # bits of an activation
    calibration: int = 1000  # training examples that give the ranges of the activations


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", steps=600, tuning_steps=300, batch_size=50),
    "smoke": Config(dataset="digits", train_split="train[:64]", test_split="test[:40]", steps=4, tuning_steps=2,
                    batch_size=16, calibration=32),
}  # fmt: skip

MECHANISM = "mechanism row, no number of the paper: it reports ImageNet and COCO; the margin is ours"
ORDER = "the paper: on ImageNet 4-bit weights lose 2 % to 10 % with it; here both sides have trained for as long"
claim = functools.partial(Claim, given={"dataset": "mnist"})
no_loss = functools.partial(claim, versus="error/float", paper="Jacob et al. 2018", claimed=0, tolerance=0.2,
                            unit="points", note=MECHANISM)  # fmt: skip
CLAIMS = (
    no_loss("error/ptq8", locator="section 2, 8 bits after training"),
    no_loss("error/qat8", locator="section 3, 8 bits in training"),
    claim("error/qat4", versus="error/ptq4", paper="Krishnamoorthi 2018", locator="abstract, 4-bit weights",
          note=f"{ORDER}; missed, as this network loses nothing at 4 bits either way"),
    claim("error/qat2", versus="error/ptq2", paper="Krishnamoorthi 2018", locator="abstract, carried on to 2 bits",
          note=ORDER),
)  # fmt: skip

Tx = optax.GradientTransformation


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    for bits in (*cfg.bits, cfg.activation_bits):
        quantize.require_bits(bits)
    if len(set(cfg.bits)) < len(cfg.bits):
        raise InputError(f"bits are {', '.join(map(str, cfg.bits))}, expected each number once; leave out the others")
    require_positive({"how many bits are given": len(cfg.bits), "calibration": cfg.calibration})
    require_probability({"momentum": cfg.momentum})
    mesh = devices.data_mesh(batch_size=cfg.batch_size)
    folders = run.settings.data_dir, run.settings.cache_dir
    train, test = (data.grey_pictures(cfg.dataset, split, *folders) for split in (cfg.train_split, cfg.test_split))
    rows = devices.process_rows(cfg.batch_size, mesh)
    some = {name: column[: cfg.calibration] for name, column in train.items()}
    held_out, calibration = (
        [devices.place(batch, mesh) for batch in data.epoch(records, cfg.batch_size, rows)] for records in (test, some)
    )
    stream = data.per_seed([data.batches(train, cfg.batch_size, seed, rows) for seed in run.seeds])
    key_init, key, key_exam = jnp.stack([jax.random.split(jax.random.key(seed), 3) for seed in run.seeds], 1)  # [S]

    model = LeNet300()
    apply: Callable[..., Any] = model.apply
    rounded = quantize.with_activations(apply, cfg.activation_bits)
    read = lambda variables, batch: apply(variables, classify.to_unit(batch["image"]), train=False)
    ranges = jax.vmap(lambda variables: quantize.calibrate(read, variables, calibration))
    exam, exam_rounded = (classify.per_seed(classify.exam(each)) for each in (apply, rounded))

    def error(exam: classify.Exam, variables: Tree) -> np.ndarray:  # of [S, ...], in per cent [S]
        return 100 * evaluate(exam, variables, held_out, key_exam[0])["error"]

    def train_on(child: Run, loss: losses.Loss, variables: Tree, tx: Tx, begin: int, steps: int) -> Tree:
        states = jax.jit(jax.vmap(lambda key, variables: init_state(key, variables, tx)))(key, variables)
        batches = devices.placed(data.later(stream, begin), mesh, axis=1)
        step = per_seed(make_step(loss, tx))
        return fit(step, devices.replicated(states, mesh), batches, steps=steps, run=child).variables

    first_tx, tuning_tx = (
        optax.sgd(optim.warmup_cosine(rate, steps), cfg.momentum)
        for rate, steps in ((cfg.learning_rate, cfg.steps), (cfg.tuning_rate, cfg.tuning_steps))
    )
    tune = functools.partial(train_on, tx=tuning_tx, begin=cfg.steps, steps=cfg.tuning_steps)
    draw = lambda key: model.init(key, jnp.zeros((1, 28, 28, 1)), train=False)
    start = jax.jit(jax.vmap(draw))(key_init)
    first = train_on(run / "first", classify.loss(apply), start, first_tx, 0, cfg.steps)
    tuned = tune(run / "float", classify.loss(apply), first)
    first, rounding = ({**variables, quantize.RANGES: ranges(variables)} for variables in (first, tuned))

    found = {"error/float": error(exam, tuned), "kilobytes/float": kilobytes(tuned["params"], len(run.seeds))}
    for bits in cfg.bits:
        aware = tune(run / f"qat{bits}", losses.with_params(classify.loss(rounded), quantize.fake(bits)), first)
        for name, variables in {"ptq": rounding, "qat": aware}.items():
            params, found[f"kilobytes/{bits}"] = packed(variables["params"], bits)
            found[f"error/{name}{bits}"] = error(exam_rounded, {**variables, "params": params})
    return found


def packed(params: Any, bits: int) -> tuple[Any, np.ndarray]:
    """The weights [S, ...] that come back from packed integers; the kilobytes [S] of these, the scales and biases."""

    def of_weights(f: Callable[..., Any], *trees: Any) -> Any:
        is_weight = lambda leaf: isinstance(leaf, quantize.Quantized)
        change = lambda leaf, *others: f(leaf, *others) if is_weight(leaf) else leaf
        return jax.tree.map(change, *trees, is_leaf=is_weight)

    integers = jax.vmap(lambda params: quantize.quantize(params, bits))(params)
    small = of_weights(lambda q: q._replace(values=quantize.pack(q.values, bits)), integers)
    back = of_weights(lambda p, q: q._replace(values=quantize.unpack(p.values, bits, q.values.shape)), small, integers)
    return quantize.dequantize(back), kilobytes(small, len(jax.tree.leaves(params)[0]))


def kilobytes(trees: Any, seeds: int) -> np.ndarray:
    """The same for every seed: [S]."""
    return np.full(seeds, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / seeds / 1000)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
