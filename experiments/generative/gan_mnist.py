"""A generative adversarial network reaches 225 nats on MNIST by the original paper's Parzen-window estimate.

Goodfellow et al. 2014, "Generative Adversarial Nets", Table 1.

    timeout -s TERM 480 python experiments/generative/gan_mnist.py --dataset mnist --preset paper --seeds 5 \
        --checkpoint-every 20000 --workdir runs/gan

Expected: 225 ± 15 nats. The run needs 0.5 PFLOP per seed and is meant for an accelerator. On SIGTERM, which `timeout`
sends here after eight minutes, it saves a checkpoint and exits with status 143; the same command then resumes it.

    python experiments/generative/gan_mnist.py --dataset mnist --preset short --seeds 5 --workdir runs/gan-short

trains networks of a quarter of the width on 2 CPU cores. Its claims are bars of our own, declared before the run: the
10,000 samples must score more than 10,000 samples of the untrained generator, and more than 100 real digits. The number
100 was chosen on the validation split, where the untrained generator, whose output is near the mean image, scores less
than 100 digits.

    python experiments/generative/gan_mnist.py --dataset mnist --preset r1 --seeds 10 --workdir runs/gan-r1

trains these small networks without and with a penalty on the discriminator's slope at real images, γ/2 E‖∇D(x)‖², where
D(x) is the logit (Mescheder, Geiger & Nowozin 2018, "Which Training Methods for GANs do actually Converge?", equation
9), from the same start, on the same batches, with the same noise. `margin` is by how much the samples score more than
100 real digits, and `below` is 1 for a seed in which they score less. Our bars: no seed of ten is below with the
penalty, and one or more are without it. The first was missed: with the penalty no seed failed as two did without it, at
-475 and -444 nats, but five were below, by up to 133 nats; the best is at 101 instead of 53. The run took an hour of a
core.
γ = 0.1 was chosen among 0.02, 0.1, 0.3 and 1 with four other seeds on digits that are not trained on, where it left one
of four below 100 real digits after 10,000 steps, and 0.3 two. The paper's 10 would be 1.25 here, for a loss that
is half of the paper's and pixels in [0, 1] instead of [-1, 1].

The score is the mean log density of the test digits under a Parzen window: Gaussians around 10,000 samples, whose width
is chosen on 1,000 digits that are not trained on. This score says little (Theis et al. 2016, "A note on the evaluation
of generative models", section 3.2: samples of the true distribution score below k-means centroids). Therefore the score
of as many training digits is reported beside it. Networks, noise, dropout, learning rates and momentum are those of the
authors' code. Two things are ours. The generator is updated against the discriminator that was updated just before, as
in the paper's Algorithm 1; the code updates both at once. The length of the run, which is not given, is 250 epochs,
after which the code's momentum stops rising.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data
from dl_jax.core import seeds
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Metrics, State, Step, Tree, per_seed
from dl_jax.harness import Claim, Distinct, Positive, Probability, Run, launch, on_digits
from dl_jax.losses import latent
from dl_jax.models.generative.gan import Discriminator, Generator
from dl_jax.models.generative.vae import mean_image_bias

Net = Literal["gan", "r1"]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train[:50000]"  # TFDS split to learn from
    valid_split: str = "train[50000:51000]"  # TFDS split to choose the Parzen window's width on
    test_split: str = "test"  # TFDS split to test on
    noise: Positive[int] = 100  # units of the generator's input noise
    generator_hidden: tuple[Positive[int], ...] = (1200, 1200)  # ReLU units of each hidden layer of the generator
    discriminator_hidden: tuple[Positive[int], ...] = (240, 240)  # maxout units of each layer of the discriminator
    nets: Distinct[Net] = ("gan",)  # without and with the R1 penalty
    gamma: Positive[float] = 0.1  # weight γ of the R1 penalty
    pieces: Positive[int] = 5  # linear functions per maxout unit
    steps: Positive[int] = 125_000  # train steps of each network: 250 epochs of 50,000 digits
    batch_size: Positive[int] = 100  # real images per step and seed, over all devices, and as many generated ones
    learning_rate: Positive[float] = 0.1  # learning rate of both networks at the first step
    decay: Positive[float] = 1.000004  # divisor of the learning rate after each step
    momentum: Probability = 0.5  # momentum of both networks at the first step
    final_momentum: Probability = 0.7  # momentum of both networks at the last step, reached linearly
    samples: Positive[int] = 10_000  # generated images, each the centre of a Gaussian of the Parzen window
    scan_steps: Positive[int] = 100  # steps per call of the compiled program
    report_every: Positive[int] = 1000  # steps between reports of the losses


PRESETS = {
    "paper": Config(),
    "short": Config(generator_hidden=(300, 300), discriminator_hidden=(60, 60), steps=10_000, scan_steps=10),
    "r1": Config(generator_hidden=(300, 300), discriminator_hidden=(60, 60), steps=10_000, scan_steps=10,
                 nets=("gan", "r1")),
    "quick": Config(dataset="digits", train_split="train[:80%]", valid_split="train[80%:]",
                    generator_hidden=(128, 128), discriminator_hidden=(32, 32), steps=1000, samples=1000, scan_steps=10,
                    report_every=100),
    "smoke": Config(dataset="digits", train_split="train[:64]", valid_split="train[64:80]", test_split="test[:20]",
                    noise=6, generator_hidden=(8,), discriminator_hidden=(8,), pieces=2, steps=4, batch_size=16,
                    samples=50, scan_steps=2, report_every=4, nets=("r1",)),
}  # fmt: skip

DECLARED = (
    "This bar is for a small network and a short run, before which it was declared. In one of five seeds the "
    "discriminator won, at -310 nats. The other four seeds, at 16 to 37 nats, are above both bars."
)
FEW = 100  # real digits
claim = functools.partial(Claim, "parzen/gan", unit="nats", better="higher", given={"dataset": "mnist"})
ours = functools.partial(claim, paper="our bar", preset="short", note=DECLARED)
CLAIMS = (
    claim(paper="Goodfellow et al. 2014", locator="Table 1, MNIST, adversarial nets", claimed=225, tolerance=15,
          note="The paper's own ± 2 is over test digits. The length of its run is not given, and its authors warn "
          "that other hardware needs other hyper-parameters."),
    Claim("margin/r1", paper="our bar", locator="10,000 samples against 100 real digits", at_least=0.0, unit="nats",
          worst=True, preset="r1", seeds=10, given={"dataset": "mnist"},
          note="Pilots of four other seeds: 105, 106, 70 and -138 nats. Five of ten are below, where the samples show "
          "some of the digits only; we have not tried a penalty that fades, or slower learning."),
    Claim("below/gan", paper="our bar", locator="share of ten seeds that score less than 100 real digits",
          at_least=0.1, preset="r1", seeds=10, given={"dataset": "mnist"}),
    ours(versus="parzen/untrained", locator="samples after the last step against samples before the first"),
    ours(versus="parzen/digits_100", locator="10,000 samples against 100 real digits"),
    on_digits("parzen/gan", at_least=38.3, unit="nats",
              note="an untrained generator: 38.2, which pilots did not surely beat, at 39.2 ± 3.7; missed"),
)  # fmt: skip
KEEPS = ("*/samples.png",)  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    splits = cfg.train_split, cfg.valid_split, cfg.test_split
    train, valid, test = (data.grey_images(cfg.dataset, split)["image"] for split in splits)
    if cfg.samples > len(train):
        raise InputError(
            f"samples is {cfg.samples}, expected at most {len(train)}: as many digits of {cfg.train_split} are scored "
            "for comparison; give fewer samples, or a larger train_split"
        )
    generator = Generator(cfg.generator_hidden, output_bias=mean_image_bias(train))
    players = Players(generator, Discriminator(cfg.discriminator_hidden, cfg.pieces), cfg.noise, sgd(cfg))
    key, key_noise, key_digits = run.keys(3)  # [S] each
    states = jax.jit(jax.vmap(functools.partial(begin, players)))(key)  # every leaf [S, ...]
    stream = data.shuffled({"image": train}, cfg.batch_size, run.seeds)
    trained, every = {}, cfg.report_every
    for name in cfg.nets:
        step = per_seed(adversarial(players._replace(gamma=cfg.gamma if name == "r1" else 0.0)))
        trained[name] = fit(step, states, stream, steps=cfg.steps, run=run / name, scan=cfg.scan_steps, every=every)

    # From here on each process computes on its own host.
    pixels, valid, test = (images.reshape(len(images), -1) / np.float32(255) for images in (train, valid, test))
    generate = jax.jit(lambda params, key: players.generate(params, key, cfg.samples))
    seeds_of = {name: seeds.split(each.params) for name, each in {"untrained": states, **trained}.items()}
    found = collections.defaultdict(list)
    for i in range(len(run.seeds)):
        points = {name: np.asarray(generate(each[i]["generator"], key_noise[i])) for name, each in seeds_of.items()}
        for name in cfg.nets if i == 0 else ():
            (run / name).images(cfg.steps, lambda samples=points[name]: {"samples": samples[:100]})
        digits = pixels[np.asarray(jax.random.permutation(key_digits[i], len(pixels)))[: cfg.samples]]
        points |= {"digits_100": digits[:FEW], "training_digits": digits}
        score = {name: parzen(each.reshape(len(each), -1), valid, test) for name, each in points.items()}
        margin = {name: score[name] - score["digits_100"] for name in cfg.nets}
        below = {name: float(each < 0) for name, each in margin.items()}
        for kind, values in {"parzen": score, "margin": margin, "below": below}.items():
            for name, value in values.items():
                found[f"{kind}/{name}"].append(value)
    return {name: np.array(values) for name, values in found.items()}


class Players(NamedTuple):
    """The generator, the discriminator, the optimiser of both, and the weight of the discriminator's penalty."""

    generator: Generator
    discriminator: Discriminator
    noise: int  # units of the generator's input noise
    tx: optax.GradientTransformation
    gamma: float = 0.0  # weight of the R1 penalty

    def generate(self, params: Tree, key: Array, n: int) -> Any:  # -> [n, H, W, C]
        noise = jax.random.normal(key, (n, self.noise))
        return self.generator.apply({"params": params}, noise, train=True)

    def judge(self, params: Tree, image: Array, key: Array) -> Any:  # [B, H, W, C] -> logits [B]
        return self.discriminator.apply({"params": params}, image, train=True, rngs={"dropout": key})


def begin(players: Players, key: Array) -> State:
    """The initial state of both networks: params and opt_state are {"generator": ..., "discriminator": ...}."""
    key_g, key_d, key = jax.random.split(key, 3)
    noise, image = jnp.zeros((1, players.noise)), jnp.zeros((1, *players.generator.shape))
    params = {
        "generator": players.generator.init(key_g, noise, train=False)["params"],
        "discriminator": players.discriminator.init(key_d, image, train=False)["params"],
    }
    opt_state = {name: players.tx.init(tree) for name, tree in params.items()}
    return State(jnp.zeros([], jnp.int32), params, {}, opt_state, key)


def adversarial(players: Players) -> Step:
    """The train step: an update of the discriminator, then one of the generator against it (Algorithm 1, k = 1)."""
    grade_d = jax.value_and_grad(functools.partial(discriminator_loss, players))
    grade_g = jax.value_and_grad(functools.partial(generator_loss, players))

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key_d, key_g = jax.random.split(jax.random.fold_in(state.key, state.step))
        params, opt_state, real = dict(state.params), dict(state.opt_state), batch["image"] / 255

        def descend(player: str, grads: Tree) -> None:
            updates, opt_state[player] = players.tx.update(grads, opt_state[player], params[player])
            params[player] = optax.apply_updates(params[player], updates)

        loss_d, grads = grade_d(params["discriminator"], params["generator"], real, key_d)
        descend("discriminator", grads)
        loss_g, grads = grade_g(params["generator"], params["discriminator"], len(real), key_g)
        descend("generator", grads)
        state = State(state.step + 1, params, state.extra, opt_state, state.key)
        return state, {"discriminator_loss": loss_d, "generator_loss": loss_g}

    return step


def discriminator_loss(players: Players, params: Tree, generator: Tree, real: Array, key: Array) -> Array:
    """The binary cross-entropy of real against generated images, averaged over as many of each, and the penalty."""
    key_noise, key_real, key_fake = jax.random.split(key, 3)
    fake = players.generate(generator, key_noise, len(real))
    yes, no = players.judge(params, real, key_real), players.judge(params, fake, key_fake)
    value = (jax.nn.softplus(-yes).mean() + jax.nn.softplus(no).mean()) / 2
    if not players.gamma:
        return value
    return value + players.gamma / 2 * r1(lambda image: players.judge(params, image, key_real), real)


def r1(score: Callable[[Array], Array], image: Array) -> Array:  # [B, ...] -> [B]; [B, ...] -> []
    """The mean over images of the squared norm of the gradient of their score: E‖∇D(x)‖² (Mescheder et al. 2018).

    The score of an image must not depend on the others. Its gradient with respect to parameters is a second derivative.
    """
    slope = jax.grad(lambda image: score(image).sum())(image)
    return (slope**2).sum() / len(image)


def generator_loss(players: Players, params: Tree, discriminator: Tree, n: int, key: Array) -> Array:
    """−log D(G(z)) on n samples, with the fixed point of the minimax game but stronger gradients early (section 3)."""
    key_noise, key_judge = jax.random.split(key)
    return jax.nn.softplus(-players.judge(discriminator, players.generate(params, key_noise, n), key_judge)).mean()


def sgd(cfg: Config) -> optax.GradientTransformation:
    """SGD as in the authors' code, with a decaying learning rate and a rising momentum."""
    return optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.exponential_decay(cfg.learning_rate, 1, 1 / cfg.decay),
        momentum=optax.linear_schedule(cfg.momentum, cfg.final_momentum, cfg.steps),
    )


def parzen(samples: np.ndarray, valid: np.ndarray, test: np.ndarray) -> float:  # [N, D] each
    """The mean log density of `test` in nats under Gaussians around `samples`, whose width is chosen on `valid`."""
    score = lambda pixels, width: np.mean(np.asarray(log_parzen(pixels, samples, width), np.float64))
    best = max(np.logspace(-1, 0, 10), key=lambda width: score(valid, width))
    return float(score(test, best))


@jax.jit
def log_parzen(pixels: Array, samples: Array, width: Array) -> Array:  # [B, D], [N, D], [] -> [B]
    """The log density in nats of each row of `pixels` under Gaussians of deviation `width` around `samples`."""
    squares = jnp.sum(samples**2, -1)

    def one(x: Array) -> Array:  # [D]
        distances = squares - 2 * jnp.dot(samples, x, precision="highest") + jnp.sum(x**2)  # [N]
        return latent.log_mean_exp(-distances / (2 * width**2)) - len(x) / 2 * jnp.log(2 * jnp.pi * width**2)

    return jax.lax.map(one, pixels, batch_size=100)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
