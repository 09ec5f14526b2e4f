"""Ternary weights, -a, 0 and a, recognise digits nearly as well as real ones, and better than binary ones, -a and a.

Li & Liu 2016, "Ternary weight networks" (arXiv:1605.04711), sections 2 and 3: MNIST.

    python experiments/compression/ternary.py --dataset mnist --preset paper --seeds 3 --workdir runs/ternary

Expected: test accuracies of 99.41 ± 0.12 % with real weights, 99.35 ± 0.12 % with ternary and 99.05 ± 0.12 % with
binary ones. Ternary weights are better than binary ones, paired over seeds. The numbers of the paper are from memory.
Three seeds took 225 minutes on two CPU cores that had other work. `--preset full --seeds 5` trains for the authors' 25
epochs. It is meant for an accelerator.

Three networks learn the same digits in the same order from the same weights. All kernels are rounded, in training and
in the test, with one a for each: weights of at most 0.7 mean |w| become 0 where they are ternary, and a is the mean
magnitude of the others (equations 5 and 6). The network, the cross-entropy, batches of 50, the rate and its two
divisions by ten, momentum and weight decay are those of the authors' code (fengfu-chris/caffe-twns). The preset paper
has 5 epochs, with the divisions after the same shares of the steps. The weight decay leaves out the scales and biases.
Nothing was tuned.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses
from dl_jax.compress import quantize
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.leaves import is_kernel
from dl_jax.core.step import Tree, init_states, init_variables, make_step, per_seed
from dl_jax.harness import Claim, NonNegative, Positive, Probability, Run, launch, on_digits
from dl_jax.models.vision.lenet import NormalisedLeNet


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    maps: tuple[Positive[int], Positive[int]] = (32, 64)  # maps of each convolution
    hidden: Positive[int] = 512  # units of the hidden dense layer
    steps: Positive[int] = 6000  # train steps of each network: 5 epochs of 60,000 digits
    batch_size: Positive[int] = 50  # examples per step, over all devices
    learning_rate: Positive[float] = 0.01  # first learning rate, divided by ten after 1/2 and after 5/6 of the steps
    momentum: Probability = 0.9  # momentum of SGD
    weight_decay: NonNegative[float] = 1e-4  # L2 penalty on the weights, not the biases


PRESETS = {
    "paper": Config(),
    "full": Config(steps=30_000),
    "quick": Config(dataset="digits", maps=(16, 32), hidden=128, steps=300),
    "smoke": Config(dataset="digits", train_split="train[:64]", test_split="test[:40]", maps=(4, 4), hidden=8, steps=2,
                    batch_size=16),
}  # fmt: skip

claim = functools.partial(Claim, paper="Li and Liu 2016", unit="%", better="higher", given={"dataset": "mnist"})
LENGTHS = (  # of the runs: the preset, the seeds, and what a missed claim says
    ("paper", 3, "The authors train for 25 epochs, we for 5."),
    ("full", 5, ""),
)
CLAIMS = (
    *(
        claim(f"accuracy/{name}", locator=f"MNIST, {row}", claimed=value, tolerance=0.12, verified=False, preset=preset,
              seeds=seeds, note=note)
        for preset, seeds, note in LENGTHS
        for name, row, value in (
            ("real", "full precision", 99.41),
            ("ternary", "TWN", 99.35),
            ("binary", "BPWN", 99.05),
        )
    ),
    *(
        claim("accuracy/ternary", versus="accuracy/binary", locator="MNIST, TWN against BPWN", preset=preset,
              seeds=seeds, note=note)
        for preset, seeds, note in LENGTHS
    ),
    on_digits("accuracy/ternary", at_least=95.3, unit="%", note="logistic regression: 90.0 %"),
)  # fmt: skip

ROUNDINGS: dict[str, Callable[[Tree], Tree]] = {
    "real": lambda params: params,
    "ternary": quantize.ternary(),
    "binary": quantize.fake(1, axes=lambda path, kernel: ()),  # ±a with one a for a kernel, as of ternary weights
}


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    stream = data.shuffled(train, cfg.batch_size, run.seeds)
    model = NormalisedLeNet(cfg.maps, cfg.hidden)
    key_init, key, key_test = run.keys(3)  # [S] each
    variables = init_variables(model, key_init, jnp.zeros((1, 28, 28, 1)))
    rate = optax.piecewise_constant_schedule(cfg.learning_rate, {cfg.steps // 2: 0.1, cfg.steps * 5 // 6: 0.1})
    tx = optax.sgd(rate, cfg.momentum)
    test_of = evaluator(classify.evaluation(model.apply), test, 10 * cfg.batch_size, key_test)
    found = {}
    for name, rounding in ROUNDINGS.items():
        loss = losses.l2(losses.with_params(classify.loss(model.apply), rounding), cfg.weight_decay)
        step = per_seed(make_step(loss, tx), one_by_one=True)
        states = fit(step, init_states(key, variables, tx), stream, steps=cfg.steps, run=run / name)
        params = jax.jit(jax.vmap(rounding))(states.params)
        found[f"accuracy/{name}"] = 100 * (1 - test_of({**states.variables, "params": params})["error"])
        if name != "real":
            found[f"values/{name}"] = values(params)
    return found


def values(params: Tree) -> np.ndarray:  # [S, ...] -> [S]
    """The largest number of different values in a kernel."""
    kernels = [np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params) if is_kernel(path, leaf)]
    return np.array([max(len(np.unique(kernel[seed])) for kernel in kernels) for seed in range(len(kernels[0]))])


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
