"""LeNet-300-100 and LeNet-5 do without 11 of 12 weights, at the error that they had before.

Han, Pool, Tran & Dally 2015, "Learning both weights and connections for efficient neural networks", table 1.

    python experiments/compression/prune_lenet.py --dataset mnist --preset paper --seeds 5 --workdir runs/prune

Expected: 12 ± 0.5 times fewer parameters, counted as what is not zero, biases included; test error 1.64 ± 0.25 % before
and 1.59 ± 0.25 % after, the difference within ± 0.15 points; five seeds take some 20 minutes on a CPU core. The same of
LeNet-5, 0.80 and 0.77 %, is `--preset lenet5`, an hour. The rate follows from the shares that are kept: what is
measured is the error.

The paper prunes below a threshold, a multiple of a layer's standard deviation, and gives the share of each layer's
weights that then remains (tables 3 and 4): here a layer's smallest weights go until that share is left, the same
fraction of the survivors at each of four prunings. Then the rest is trained on at a tenth of the learning rate, as in
the paper. Biases stay. Ours, as the paper is silent: SGD with momentum, an L2 penalty, batches of 64, cosine schedules
and the numbers of steps. LeNet-300-100's learning rate and the weaker penalty after pruning were chosen on the last
10 % of the training set; LeNet-5's steps and mean learning rate are about those of Caffe's example. Each training goes
on in the data where the one before ended.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses, optim
from dl_jax.compress import prune
from dl_jax.core import devices
from dl_jax.core.errors import require_positive, require_probability
from dl_jax.core.evaluate import evaluate
from dl_jax.core.fit import fit
from dl_jax.core.step import Step, Tree, init_state, make_step
from dl_jax.harness import Claim
from dl_jax.harness.launch import launch
from dl_jax.harness.run import Run
from dl_jax.models.vision.lenet import LeNet300, LeNetCaffe


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    convolutional: bool = False  # prune LeNet-5 as Caffe has it, instead of LeNet-300-100
    kept: tuple[float, ...] = (0.08, 0.09, 0.26)  # fraction of each layer's weights that stays
    steps: int = 18_750  # train steps of the dense network: 20 passes over 60,000 digits
    rounds: int = 4  # times that weights are pruned and the rest is trained on
    round_steps: int = 7500  # train steps after each pruning: 8 passes
    batch_size: int = 64  # examples per step, over all devices
    learning_rate: float = 0.1  # of the dense network, at its peak
    retrain: float = 0.1  # the peak after a pruning; fraction of the learning rate
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of the L2 penalty on the dense network's weights, biases left out
    retrain_weight_decay: float = 1e-4  # the same after a pruning


PRESETS = {
    "paper": Config(),
    "lenet5": Config(convolutional=True, kept=(0.66, 0.12, 0.08, 0.19), steps=10_000, round_steps=2500,
                     learning_rate=0.02),
    "quick": Config(dataset="digits", steps=800, round_steps=300),
    "smoke": Config(dataset="digits", train_split="train[:64]", test_split="test[:40]", steps=4, rounds=2,
                    round_steps=2, batch_size=16),
}  # fmt: skip

BY_CONSTRUCTION = "follows from the shares of the weights that are kept, which are the paper's"
SLOW = "missed: in part, we suspect, as the rest is trained on at a tenth of the learning rate"
claim = functools.partial(Claim, paper="Han et al. 2015", given={"dataset": "mnist"})
error = functools.partial(claim, unit="%", tolerance=0.25)
no_loss = functools.partial(claim, unit="%", claimed=0, tolerance=0.15)
rate = functools.partial(claim, unit="x", better="higher", claimed=12, tolerance=0.5, note=BY_CONSTRUCTION)
error5 = functools.partial(error, tolerance=0.18, preset="lenet5")
CLAIMS = (
    error("test_error/lenet300", locator="Table 1, LeNet-300-100 Ref", claimed=1.64),
    error("test_error/lenet300_pruned", locator="Table 1, LeNet-300-100 Pruned", claimed=1.59),
    no_loss("test_error/lenet300_pruned", versus="test_error/lenet300",
            locator="Table 1, LeNet-300-100 Pruned against Ref",
            note="missed: the rest is trained on at a tenth of the learning rate, as in the paper; at the full rate "
            "again, in deep_compression.py, the same shares of the weights lose nothing"),
    rate("rate/lenet300", locator="Table 1, LeNet-300-100 Pruned"),
    error5("test_error/lenet5", locator="Table 1, LeNet-5 Ref", claimed=0.80),
    error5("test_error/lenet5_pruned", locator="Table 1, LeNet-5 Pruned", claimed=0.77, note=SLOW),
    no_loss("test_error/lenet5_pruned", versus="test_error/lenet5", locator="Table 1, LeNet-5 Pruned against Ref",
            preset="lenet5", note=SLOW),
    rate("rate/lenet5", locator="Table 1, LeNet-5 Pruned", preset="lenet5"),
)  # fmt: skip


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    require_positive({"rounds": cfg.rounds, "retrain": cfg.retrain})
    require_probability({"momentum": cfg.momentum})
    mesh = devices.data_mesh(batch_size=cfg.batch_size)
    folders = (run.settings.data_dir, run.settings.cache_dir)
    train, test = (data.grey_pictures(cfg.dataset, split, *folders) for split in (cfg.train_split, cfg.test_split))
    rows = devices.process_rows(cfg.batch_size, mesh)
    held_out = [devices.place(batch, mesh) for batch in data.epoch(test, cfg.batch_size, rows)]
    model, name = (LeNetCaffe(), "lenet5") if cfg.convolutional else (LeNet300(), "lenet300")
    draw = jax.jit(functools.partial(model.init, train=False))
    exam, loss = classify.exam(model.apply), classify.loss(model.apply)
    peak = cfg.retrain * cfg.learning_rate
    dense_tx = optax.sgd(optim.warmup_cosine(cfg.learning_rate, cfg.steps), cfg.momentum)
    sparse_tx = optax.chain(optax.sgd(optim.warmup_cosine(peak, cfg.round_steps), cfg.momentum), prune.keep_zeros())
    dense_step = make_step(losses.l2(loss, cfg.weight_decay), dense_tx)
    sparse_step = make_step(losses.l2(loss, cfg.retrain_weight_decay), sparse_tx)

    def measured(seed: int) -> tuple:
        key_init, key, key_exam = jax.random.split(jax.random.key(seed), 3)
        stream = data.batches(train, cfg.batch_size, seed, rows)
        variables = draw(key_init, jnp.zeros((1, 28, 28, 1)))
        sparsity = prune.rounds(variables["params"], cfg.kept)

        def learn(child: Run, step: Step, tx: optax.GradientTransformation, variables: Tree, begin: int, steps: int):
            state = devices.replicated(init_state(key, variables, tx), mesh)
            batches = devices.placed(data.later(stream, begin), mesh)
            return fit(step, state, batches, steps=steps, run=child).params

        child = run / f"seed{seed}"
        params = dense = learn(child / "dense", dense_step, dense_tx, variables, 0, cfg.steps)
        for i in range(cfg.rounds):
            rest = {"params": prune.smallest(params, sparsity((i + 1) / cfg.rounds))}
            begin = cfg.steps + i * cfg.round_steps
            params = learn(child / f"round{i + 1}", sparse_step, sparse_tx, rest, begin, cfg.round_steps)
        show(child / f"round{cfg.rounds}", cfg.round_steps, params)
        errors = [100 * evaluate(exam, {"params": each}, held_out, key_exam)["error"] for each in (dense, params)]
        return *errors, parameters(dense) / parameters(params)

    names = f"test_error/{name}", f"test_error/{name}_pruned", f"rate/{name}"
    return dict(zip(names, np.transpose([measured(seed) for seed in run.seeds]), strict=True))


def parameters(params: Tree) -> int:
    """How many are not zero, biases included."""
    return sum(int(n) for n in prune.nonzeros(params, where=lambda path, leaf: True).values())


def show(run: Run, step: int, params: Tree) -> None:
    """How many weights of the first dense layer see each pixel (the paper's figure 4), in TensorBoard."""
    kernel = np.asarray(params["Dense_0"]["kernel"])
    if run.board and len(kernel) == 28 * 28:
        left = np.count_nonzero(kernel, axis=1).reshape(1, 28, 28, 1)
        run.board.image("weights_left_at_each_pixel", step, left / left.max())


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
