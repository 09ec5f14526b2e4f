"""LeNet-300-100 and LeNet-5 do without 11 of 12 weights, at the error that they had before.

Han, Pool, Tran & Dally 2015, "Learning both weights and connections for efficient neural networks", table 1.

    python experiments/compression/prune_lenet.py --dataset mnist --preset paper --seeds 5 --workdir runs/prune

Expected: 12 ± 0.5 times fewer parameters, counted as what is not zero, biases included; test error 1.64 ± 0.25 % before
and 1.59 ± 0.25 % after, the difference within ± 0.15 points; five seeds take some ten minutes on 2 CPU cores. The same
of LeNet-5, 0.80 and 0.77 %, is `--preset lenet5`, half an hour.

The paper prunes below a threshold, a multiple of a layer's standard deviation, and gives the share of each layer's
weights that then remains (tables 3 and 4): here a layer's smallest weights go until that share is left, the same
fraction of the survivors at each of four prunings. Then the rest is trained on at a tenth of the learning rate, as in
the paper. Biases stay. Ours, as the paper is silent: SGD with momentum, an L2 penalty, batches of 64, cosine schedules
and the numbers of steps. LeNet-300-100's learning rate and the weaker penalty after pruning were chosen on the last
10 % of the training set; LeNet-5's steps and mean learning rate are about those of Caffe's example. Seeds run one after
another: on a CPU neither network gains from lanes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, losses, metrics, optim, parallel
from dl_jax.claims import Claim
from dl_jax.compress import prune
from dl_jax.launch import launch
from dl_jax.models.lenet import LeNet300, LeNetCaffe
from dl_jax.run import Run
from dl_jax.train import Tree, evaluate, fit, init_state, make_step


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

PAPER = "Han et al. 2015"
CLAIMS = (
    Claim("test_error/lenet300", PAPER, "Table 1, LeNet-300-100 Ref", 1.64, 0.25, "%", given={"dataset": "mnist"}),
    Claim("test_error/lenet300_pruned", PAPER, "Table 1, LeNet-300-100 Pruned", 1.59, 0.25, "%",
          given={"dataset": "mnist"}),
    Claim("test_error/lenet300_pruned", PAPER, "Table 1, LeNet-300-100 Pruned against Ref", 0, 0.15, "%",
          given={"dataset": "mnist"}, versus="test_error/lenet300"),
    Claim("rate/lenet300", PAPER, "Table 1, LeNet-300-100 Pruned", 12, 0.5, "x", "higher", given={"dataset": "mnist"}),
    Claim("test_error/lenet5", PAPER, "Table 1, LeNet-5 Ref", 0.80, 0.18, "%", preset="lenet5",
          given={"dataset": "mnist"}),
    Claim("test_error/lenet5_pruned", PAPER, "Table 1, LeNet-5 Pruned", 0.77, 0.18, "%", preset="lenet5",
          given={"dataset": "mnist"}),
    Claim("test_error/lenet5_pruned", PAPER, "Table 1, LeNet-5 Pruned against Ref", 0, 0.15, "%", preset="lenet5",
          given={"dataset": "mnist"}, versus="test_error/lenet5"),
    Claim("rate/lenet5", PAPER, "Table 1, LeNet-5 Pruned", 12, 0.5, "x", "higher", preset="lenet5",
          given={"dataset": "mnist"}),
    Claim("rate/alexnet", PAPER, "Table 1, AlexNet Pruned", 9, 0.5, "x", "higher", given={"dataset": "imagenet2012"}),
    Claim("rate/vgg16", PAPER, "Table 1, VGG-16 Pruned", 13, 0.5, "x", "higher", given={"dataset": "imagenet2012"}),
)  # fmt: skip


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    mesh = parallel.data_mesh()
    folders = (run.settings.data_dir, run.settings.cache_dir)
    train, test = (data.grey_pictures(cfg.dataset, split, *folders) for split in (cfg.train_split, cfg.test_split))
    rows = parallel.process_rows(cfg.batch_size, mesh)
    exam = [parallel.place(batch, mesh) for batch in data.epoch(test, cfg.batch_size, rows)]
    model, name = (LeNetCaffe(), "lenet5") if cfg.convolutional else (LeNet300(), "lenet300")
    draw = jax.jit(functools.partial(model.init, train=False))
    reading = functools.partial(reading_loss, model.apply)
    examine = functools.partial(examined, model.apply)
    peak = cfg.retrain * cfg.learning_rate
    dense_tx = optax.sgd(optim.warmup_cosine(cfg.learning_rate, cfg.steps), cfg.momentum)
    sparse_tx = optax.chain(optax.sgd(optim.warmup_cosine(peak, cfg.round_steps), cfg.momentum), prune.keep_zeros())
    dense_step = make_step(losses.l2(reading, cfg.weight_decay), dense_tx)
    sparse_step = make_step(losses.l2(reading, cfg.retrain_weight_decay), sparse_tx)
    errors, errors_pruned, rates = [], [], []
    for seed in run.seeds:
        child, (key_init, key) = run / f"seed{seed}", jax.random.split(jax.random.key(seed))
        batches = parallel.placed(data.batches(train, cfg.batch_size, seed, rows), mesh)
        error = lambda params, key=key: 100 * evaluate(examine, {"params": params}, exam, key)["error"]
        start = init_state(key, draw(key_init, jnp.zeros((1, 28, 28, 1))), dense_tx)
        start = parallel.replicated(start, mesh)
        params = dense = fit(dense_step, start, batches, steps=cfg.steps, run=child / "dense").params
        for i in range(1, cfg.rounds + 1):
            params = prune.smallest(params, functools.partial(pruned_fraction, params, cfg.kept, i / cfg.rounds))
            start = parallel.replicated(init_state(key, {"params": params}, sparse_tx), mesh)
            params = fit(sparse_step, start, batches, steps=cfg.round_steps, run=child / f"round{i}").params
        errors.append(error(dense))
        errors_pruned.append(error(params))
        rates.append(parameters(dense) / parameters(params))
        show(child / f"round{cfg.rounds}", cfg.round_steps, params)
    return {
        f"test_error/{name}": np.array(errors),
        f"test_error/{name}_pruned": np.array(errors_pruned),
        f"rate/{name}": np.array(rates),
    }


def reading_loss(apply: Callable[..., Any], variables, batch, key):
    logits = apply(variables, seen(batch), train=True)  # [B, 10]
    error = (logits.argmax(-1) != batch["label"]).mean()
    return losses.cross_entropy(logits, batch["label"]).mean(), ({}, {"error": error})


def examined(apply: Callable[..., Any], variables, batch, key):
    return {"error": metrics.error_rate(apply(variables, seen(batch), train=False), batch["label"], batch["mask"])}


def seen(batch: Mapping) -> jax.Array:
    """Grey levels from 0 .. 255 to [0, 1]."""
    return batch["image"].astype(jnp.float32) / 255


def pruned_fraction(
    params: Tree, kept: tuple[float, ...], progress: float, path: jax.tree_util.KeyPath, leaf: jax.Array
) -> float:
    """Sparsity of a layer: down to `kept` of it at progress 1, by the same fraction of the survivors each time."""
    layers = dict(zip(prune.nonzeros(params), kept, strict=True))
    return 1 - layers[jax.tree_util.keystr(path, simple=True, separator="/")] ** progress


def parameters(params: Tree) -> int:
    """How many are not zero, biases included."""
    return sum(int(n) for n in prune.nonzeros(params, where=lambda path, leaf: True).values())


def show(run: Run, step: int, params: Tree) -> None:
    """How many weights of the first dense layer see each pixel (the paper's figure 4), in TensorBoard."""
    kernel = np.asarray(params["Dense_0"]["kernel"])
    if run.board and len(kernel) == 28 * 28:
        seen = np.count_nonzero(kernel, axis=1).reshape(1, 28, 28, 1)
        run.board.image("weights_left_at_each_pixel", step, seen / seen.max())


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
