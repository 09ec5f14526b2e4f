"""LeNet-300-100 and LeNet-5 become files 40 and 39 times smaller than their parameters, without loss of accuracy.

Han, Mao & Dally 2016, "Deep compression" (arXiv:1510.00149), tables 1 and 2: pruning, weight sharing, Huffman coding.

    python experiments/compression/deep_compression.py --dataset mnist --preset paper --seeds 5 --workdir runs/deep
    ls -l runs/deep/*.dlj

Expected: 1,066,440 bytes of float32 parameters become a file 40 ± 4 times smaller, counting all bytes of the file. The
test error of the network decoded from the file equals that of the reference network within 0.15 points (1.64 % for the
reference and 1.58 % for the compressed network in the paper). Five seeds took five minutes on two CPU cores. With
`--preset lenet5`, the 1,724,320 bytes of Caffe's LeNet-5 become 39 ± 4 times fewer (0.80 and 0.74 %); that took 143
minutes on two cores that had other work.

As in the paper: the three stages, the fraction of the weights kept in each layer, the bits (6 of every layer of
LeNet-300-100, and 8 of convolutions and 5 of dense layers of LeNet-5), and k-means that starts from evenly spaced
values. Our choices, where the paper gives none: SGD with a cosine schedule and a clipped gradient, four prunings that
each keep the same fraction of the remaining weights, and a weaker L2 penalty after pruning. After a pruning, training
restarts at the full learning rate; Han et al. 2015 restart at a tenth of it. These choices were made on the last 6,000
training digits; rates and steps of LeNet-5 are those of prune_lenet.py. The file stores distances up to 256, where the
paper's are up to 32, so that fewer filler zeros are needed. It scans each kernel in the direction that takes fewer
bytes. One of the 64 indices is reserved for the filler zeros. The Huffman coding is that of deflate, by zlib.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses, optim
from dl_jax.compress import prune, share
from dl_jax.compress.codec import decode, encode, entries
from dl_jax.core import seeds
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Loss, Tree, init_states, init_variables, make_step, per_seed
from dl_jax.harness import Between, Claim, Fraction, NonNegative, Positive, Probability, Run, Some, launch, on_digits
from dl_jax.models.vision.lenet import LeNet300, LeNetCaffe

Bits = Annotated[int, Between(1, 8)]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    steps: Positive[int] = 18750  # train steps of the reference network: 20 epochs of 60,000 digits
    prune_rounds: Positive[int] = 4  # number of prunings, each followed by training of the remaining weights
    prune_steps: Positive[int] = 5625  # train steps after each pruning: 6 epochs
    share_steps: Positive[int] = 938  # train steps of the shared values: 1 epoch
    batch_size: Positive[int] = 64  # examples per step, over all devices
    learning_rate: Positive[float] = 0.1  # peak learning rate of the reference network, and after each pruning
    share_learning_rate: Positive[float] = 3e-4  # peak learning rate of the shared values
    momentum: Probability = 0.9  # momentum of SGD
    clip: Positive[float] = 1.0  # largest norm of the gradient
    weight_decay: NonNegative[float] = 5e-4  # L2 penalty on the weights, not the biases, of the reference network
    prune_weight_decay: NonNegative[float] = 1e-4  # L2 penalty on the weights after pruning
    convolutional: bool = False  # compress Caffe's variant of LeNet-5 instead of LeNet-300-100
    kept: Some[Fraction] = (0.08, 0.09, 0.26)  # fraction of each layer's weights that is kept
    bits: Some[Bits] = (6, 6, 6)  # bits of an index of each layer: zero, or one of its 2^bits - 1 shared values


PRESETS = {
    "paper": Config(),
    "lenet5": Config(convolutional=True, kept=(0.66, 0.12, 0.08, 0.19), bits=(8, 8, 5, 5), steps=10_000,
                     prune_steps=2500, learning_rate=0.02, clip=100.0),
    "quick": Config(dataset="digits", steps=500, prune_steps=150, share_steps=100),
    "smoke": Config(dataset="digits", train_split="train[:64]", test_split="test[:40]", steps=2, prune_rounds=2,
                    prune_steps=1, share_steps=1, batch_size=16),
}  # fmt: skip

claim = functools.partial(Claim, paper="Han et al. 2016", given={"dataset": "mnist"})
error = functools.partial(claim, unit="%")
ratio = functools.partial(claim, unit="x", better="higher")
error5, ratio5 = (functools.partial(each, preset="lenet5") for each in (error, ratio))
CLAIMS = (
    ratio("ratio/file", locator="Table 1, LeNet-300-100 compressed", claimed=40, tolerance=4,
          note="From 1070 KB to 27 KB. Ours counts every byte of the file: biases, codebooks, names, checksum."),
    error("test_error/decoded", versus="test_error/reference", locator="Table 1, no loss of accuracy", claimed=0,
          tolerance=0.15, note="The network is read back from the file."),
    error("test_error/reference", locator="Table 1, LeNet-300-100 reference", claimed=1.64, tolerance=0.25,
          note="Ours is trained for 20 passes with a cosine schedule; the paper does not say how its own was."),
    error("test_error/decoded", locator="Table 1, LeNet-300-100 compressed", claimed=1.58, tolerance=0.25),
    ratio("ratio/pruned", locator="Table 2, pruned", claimed=12, tolerance=0.5,
          note="Of weights, not biases. It follows from the shares of the weights that are kept, which are the "
          "paper's."),
    ratio("ratio/quantised", locator="Table 2, pruned and quantised", claimed=32, tolerance=3.2,
          note="Of weights, not biases: 6 bits of value and 5 of distance for an entry, with fillers and codebooks "
          "counted."),
    ratio5("ratio/file", locator="Table 1, LeNet-5 compressed", claimed=39, tolerance=4),
    error5("test_error/decoded", versus="test_error/reference", locator="Table 1, LeNet-5, no loss of accuracy",
           claimed=0, tolerance=0.15),
    error5("test_error/reference", locator="Table 1, LeNet-5 reference", claimed=0.80, tolerance=0.18),
    error5("test_error/decoded", locator="Table 1, LeNet-5 compressed", claimed=0.74, tolerance=0.17),
    on_digits("ratio/file", at_least=38, unit="x", note="nothing compressed: 1; missed"),
    on_digits("test_error/decoded", at_most=8, unit="%", note="logistic regression: 10.0 %; missed"),
)  # fmt: skip
KEEPS = ("lenet*_seed*.dlj",)  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    stream = data.shuffled(train, cfg.batch_size, run.seeds)
    model, name = (LeNetCaffe(), "lenet5") if cfg.convolutional else (LeNet300(), "lenet300")
    key_init, key, key_test = run.keys(3)  # [S] each
    start = init_variables(model, key_init, jnp.zeros((1, 28, 28, 1)))
    sparsity = prune.rounds(start["params"], cfg.kept)
    test_of = evaluator(classify.evaluation(model.apply), test, cfg.batch_size, key_test)

    def training(loss: Loss, rate: float, steps: int, *last: optax.GradientTransformation):
        tx = optax.chain(optim.clipped_sgd(rate, steps, cfg.momentum, cfg.clip), *last)
        step = per_seed(make_step(loss, tx), one_by_one=cfg.convolutional)

        def learn(name: str, variables: Tree, begin: int) -> Tree:
            """Trains `variables` [S, ...] on the batches from step `begin` on. Returns the parameters [S, ...]."""
            states = init_states(key, variables, tx)
            return fit(step, states, stream.later(begin), steps=steps, run=run / name).params

        return learn

    loss = classify.loss(model.apply)
    sparse_loss = losses.l2(loss, cfg.prune_weight_decay)
    train_dense = training(losses.l2(loss, cfg.weight_decay), cfg.learning_rate, cfg.steps)
    train_sparse = training(sparse_loss, cfg.learning_rate, cfg.prune_steps, prune.keep_zeros())
    train_shared = training(functools.partial(sharing_loss, sparse_loss), cfg.share_learning_rate, cfg.share_steps)

    params = reference = train_dense("reference", start, 0)
    done = cfg.steps
    for i in range(cfg.prune_rounds):
        smaller = functools.partial(prune.smallest, sparsity=sparsity((i + 1) / cfg.prune_rounds))
        params = train_sparse(f"pruned{i}", {"params": jax.vmap(smaller)(params)}, done)
        done += cfg.prune_steps
    values = [2**bits - 1 for bits in cfg.bits]
    codebooks, clusters = seeds.stack([share.cluster(one, values) for one in seeds.split(params)])
    codebooks = train_shared("shared", {"params": codebooks, "clusters": clusters}, done)
    shared = jax.vmap(lambda books, assigned: share.expanded(assigned)(books))(codebooks, clusters)

    files = [encode(network) for network in seeds.split(shared)]
    for seed, file in zip(run.seeds, files, strict=True):
        run.keep(f"{name}_seed{seed}.dlj", file)
    decoded = [decode(file) for file in files]
    networks = {"reference": reference, "pruned": params, "shared": shared, "decoded": seeds.stack(decoded)}
    return {
        **{f"test_error/{name}": 100 * test_of({"params": each})["error"] for name, each in networks.items()},
        "ratio/pruned": np.array([ratio_pruned(tree) for tree in decoded]),
        "ratio/quantised": np.array([ratio_quantised(tree, cfg.bits) for tree in decoded]),
        "ratio/file": np.array([ratio_file(tree, file) for tree, file in zip(decoded, files, strict=True)]),
    }


def sharing_loss(loss: Loss, variables: Tree, batch: Batch, key: Array):
    """`loss` as a function of the codebooks. The clusters of each seed are a collection that is not trained."""
    dense = {"params": variables["params"]}
    return losses.with_params(loss, share.expanded(variables["clusters"]))(dense, batch, key)


def ratio_pruned(params: Tree) -> float:
    """The number of weights, without biases, divided by the number of non-zero weights."""
    return sum(kernel.size for kernel in kernels(params)) / sum(map(np.count_nonzero, kernels(params)))


def ratio_quantised(params: Tree, bits: Sequence[int], distance_bits: int = 5) -> float:
    """The float32 bits of the weights divided by the bits that they take before Huffman coding.

    These are the codebooks, and entries of constant length: an index of `bits` bits of its layer, which stands for a
    codebook value or a filler zero, and a distance.
    """
    taken = 0
    for kernel, width in zip(kernels(params), bits, strict=True):
        count = len(entries.distances(kernel.T.ravel() != 0, distance_bits))
        taken += count * (width + distance_bits) + 32 * (2**width - 1)
    return 32 * sum(kernel.size for kernel in kernels(params)) / taken


def kernels(params: Tree) -> list[np.ndarray]:
    """The kernels of all layers, from input to output."""
    return [params[layer]["kernel"] for layer in sorted(params)]


def ratio_file(params: Tree, file: bytes) -> float:
    """The bytes of all parameters divided by the bytes of the file."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / len(file)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
