"""An adversarial net of MNIST: 225 nats by the Parzen window of the paper that began them.

Goodfellow et al. 2014, "Generative Adversarial Nets", Table 1.

    timeout -s TERM 480 python experiments/generative/gan_mnist.py --dataset mnist --preset paper --seeds 5 \
        --checkpoint-every 20000 --workdir runs/gan

Expected: 225 ± 15 nats, on an accelerator: 0.5 PFLOP a seed. Told to end, here after eight minutes, the run saves and
exits with 143, and the same command goes on from there.

    python experiments/generative/gan_mnist.py --dataset mnist --preset short --seeds 5 --workdir runs/gan-short

trains networks of a quarter of the width on 2 CPU cores. Its bars are our own, declared before the run: 10,000 samples
score more than those from before the first step, and more than 100 real digits. One hundred was chosen on the
validation split, where the untrained generator, which paints the mean picture, scores less.

The number is the log density of the test digits under Gaussians around 10,000 samples, of a width chosen on 1,000
digits that were not learnt from. It says little (Theis et al. 2016, "A note on the evaluation of generative models",
section 3.2: samples of the true distribution score below k-means centroids), so what as many training digits score
stands beside it. Networks, noise, dropout, rates and momentum are those of the authors' code. Ours: as in the paper's
Algorithm 1 the generator answers the discriminator that has just learnt, where the code moves both at once; and the
length of the run, which is not given, is 250 passes, when the code's momentum stops rising.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data
from dl_jax.core import devices
from dl_jax.core import seeds as lanes
from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.core.fit import fit
from dl_jax.core.step import Batch, Metrics, State, Step, Tree, gathered, per_seed, scanned
from dl_jax.harness import Claim
from dl_jax.harness.launch import launch
from dl_jax.harness.run import Run
from dl_jax.losses import latent
from dl_jax.models.generative.gan import Discriminator, Generator
from dl_jax.models.generative.vae import mean_picture_bias


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train[:50000]"  # TFDS split to learn from
    valid_split: str = "train[50000:51000]"  # TFDS split to choose the Parzen window's width on
    test_split: str = "test"  # TFDS split to test on
    noise: int = 100  # units of the generator's noise
    generator_hidden: tuple[int, ...] = (1200, 1200)  # ReLU units of each layer
    discriminator_hidden: tuple[int, ...] = (240, 240)  # maxout units of each layer
    pieces: int = 5  # linear pieces of a maxout unit
    steps: int = 125_000  # steps of each player: 250 passes over 50,000 digits
    batch_size: int = 100  # real pictures per step and seed, over all devices, and as many generated ones
    learning_rate: float = 0.1  # of both players at the first step
    decay: float = 1.000004  # what the learning rate is divided by after each step
    momentum: float = 0.5  # of both players at the first step
    final_momentum: float = 0.7  # of both players at the last step, reached linearly
    samples: int = 10_000  # Gaussians of the Parzen window
    scan_steps: int = 100  # steps in one call of the compiled program
    report_every: int = 1000  # steps between reports of the losses


PRESETS = {
    "paper": Config(),
    "short": Config(generator_hidden=(300, 300), discriminator_hidden=(60, 60), steps=10_000, scan_steps=10),
    "quick": Config(dataset="digits", train_split="train[:80%]", valid_split="train[80%:]",
                    generator_hidden=(128, 128), discriminator_hidden=(32, 32), steps=1000, samples=1000, scan_steps=10,
                    report_every=100),
    "smoke": Config(dataset="digits", train_split="train[:64]", valid_split="train[64:80]", test_split="test[:20]",
                    noise=6, generator_hidden=(16,), discriminator_hidden=(8,), pieces=2, steps=4, batch_size=16,
                    samples=50, scan_steps=2, report_every=4),
}  # fmt: skip

DECLARED = (
    "for a small net and a short run, declared before it; missed, as in one of five seeds the discriminator won, at "
    "-310 nats: the other four, 16 to 37, are above both bars"
)
FEW = 100  # real digits
claim = functools.partial(Claim, "parzen/gan", unit="nats", better="higher", given={"dataset": "mnist"})
ours = functools.partial(claim, paper="our bar", preset="short", note=DECLARED)
CLAIMS = (
    claim(paper="Goodfellow et al. 2014", locator="Table 1, MNIST, adversarial nets", claimed=225, tolerance=15,
          note="the paper's own ± 2 is over test digits; the length of its run is not given, and its authors warn "
          "that other hardware needs other hyper-parameters"),
    ours(versus="parzen/untrained", locator="samples after the last step against samples before the first"),
    ours(versus="parzen/digits_100", locator="10,000 samples against 100 real digits"),
)  # fmt: skip


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    require_positive({"noise": cfg.noise, "learning_rate": cfg.learning_rate, "decay": cfg.decay})
    require_probability({"momentum": cfg.momentum, "final_momentum": cfg.final_momentum})
    mesh = devices.data_mesh(batch_size=cfg.batch_size)
    folders = run.settings.data_dir, run.settings.cache_dir
    splits = (cfg.train_split, cfg.valid_split, cfg.test_split)
    train, valid, test = (data.grey_pictures(cfg.dataset, split, *folders)["image"] for split in splits)
    if not 1 <= cfg.samples <= len(train):
        raise InputError(
            f"samples={cfg.samples}, expected 1 to {len(train)}: as many digits of {cfg.train_split} "
            "are scored beside them; give fewer, or a larger train_split"
        )
    players = Players(
        Generator(cfg.generator_hidden, output_bias=mean_picture_bias(train)),
        Discriminator(cfg.discriminator_hidden, cfg.pieces),
        cfg.noise,
        sgd(cfg),
    )
    # [S, 3]: what trains a seed, the noise of its samples, the choice of the real digits beside them.
    keys = jnp.stack([jax.random.split(jax.random.key(seed), 3) for seed in run.seeds])
    states = jax.jit(jax.vmap(functools.partial(start, players)))(keys[:, 0])  # every leaf [S, ...]

    order = {"index": np.arange(len(train))}
    rows = devices.process_rows(cfg.batch_size, mesh)
    streams = [data.batches(order, cfg.batch_size, seed, rows) for seed in run.seeds]
    indices = devices.placed(data.windows(data.per_seed(streams), cfg.scan_steps), mesh, axis=2)  # [k, S, B]
    records = devices.replicated({"image": train}, mesh)
    step = gathered(scanned(per_seed(adversarial(players)), cfg.scan_steps), records)
    state = fit(step, devices.replicated(states, mesh), indices, steps=cfg.steps, every=cfg.report_every, run=run)

    # On the host: what follows is each process's own.
    before, after = (lanes.split(state.params["generator"]) for state in (states, state))
    generate = jax.jit(players.generate, static_argnames="n")
    pixels, valid, test = (images.reshape(len(images), -1) / np.float32(255) for images in (train, valid, test))
    measured = []
    for lane, (_, key_noise, key_digits) in enumerate(keys):
        untrained, pictures = (
            np.asarray(generate(params[lane], key_noise, n=cfg.samples)) for params in (before, after)
        )
        digits = pixels[np.asarray(jax.random.permutation(key_digits, len(pixels)))[: cfg.samples]]
        points = {
            "parzen/gan": pictures.reshape(cfg.samples, -1),
            "parzen/untrained": untrained.reshape(cfg.samples, -1),
            "parzen/digits_100": digits[:FEW],
            "parzen/training_digits": digits,
        }
        measured.append({name: parzen(samples, valid, test) for name, samples in points.items()})
        if run.board and not lane:
            run.board.image("samples", cfg.steps, pictures[:100])
    return {name: np.array([values[name] for values in measured]) for name in measured[0]}


class Players(NamedTuple):
    """The two networks, and what optimises each."""

    generator: Generator
    discriminator: Discriminator
    noise: int  # units
    tx: optax.GradientTransformation

    def generate(self, params: Tree, key: jax.Array, n: int) -> Any:  # -> [n, H, W, C]
        noise = jax.random.normal(key, (n, self.noise))
        return self.generator.apply({"params": params}, noise, train=True)

    def judge(self, params: Tree, image: jax.Array, key: jax.Array) -> Any:  # [B, H, W, C] -> logits [B]
        return self.discriminator.apply({"params": params}, image, train=True, rngs={"dropout": key})


def start(players: Players, key: jax.Array) -> State:
    """Two networks in one state: params and opt_state are {"generator": ..., "discriminator": ...}."""
    key_g, key_d, key = jax.random.split(key, 3)
    noise, image = jnp.zeros((1, players.noise)), jnp.zeros((1, *players.generator.shape))
    params = {
        "generator": players.generator.init(key_g, noise, train=False)["params"],
        "discriminator": players.discriminator.init(key_d, image, train=False)["params"],
    }
    opt_state = {name: players.tx.init(tree) for name, tree in params.items()}
    return State(jnp.zeros([], jnp.int32), params, {}, opt_state, key)


def adversarial(players: Players) -> Step:
    """One update of the discriminator, then one of the generator against it (Algorithm 1 with k = 1)."""
    grade_d = jax.value_and_grad(functools.partial(discriminator_loss, players))
    grade_g = jax.value_and_grad(functools.partial(generator_loss, players))

    def descend(grads: Tree, opt_state: Tree, params: Tree) -> tuple[Tree, Tree]:
        updates, opt_state = players.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key_d, key_g = jax.random.split(jax.random.fold_in(state.key, state.step))
        generator, discriminator, real = state.params["generator"], state.params["discriminator"], batch["image"] / 255
        loss_d, grads = grade_d(discriminator, generator, real, key_d)
        discriminator, opt_d = descend(grads, state.opt_state["discriminator"], discriminator)
        loss_g, grads = grade_g(generator, discriminator, len(real), key_g)
        generator, opt_g = descend(grads, state.opt_state["generator"], generator)
        params = {"generator": generator, "discriminator": discriminator}
        opt_state = {"generator": opt_g, "discriminator": opt_d}
        state = State(state.step + 1, params, state.extra, opt_state, state.key)
        return state, {"discriminator_loss": loss_d, "generator_loss": loss_g}

    return step


def discriminator_loss(players: Players, params: Tree, generator: Tree, real: jax.Array, key: jax.Array) -> jax.Array:
    """Cross-entropy of "from the data" over real pictures and as many generated ones."""
    key_noise, key_real, key_fake = jax.random.split(key, 3)
    fake = players.generate(generator, key_noise, len(real))
    yes, no = players.judge(params, real, key_real), players.judge(params, fake, key_fake)
    return (jax.nn.softplus(-yes).mean() + jax.nn.softplus(no).mean()) / 2


def generator_loss(players: Players, params: Tree, discriminator: Tree, n: int, key: jax.Array) -> jax.Array:
    """−log D(G(z)), which has the fixed point of the minimax game and stronger gradients early (section 3)."""
    key_noise, key_judge = jax.random.split(key)
    return jax.nn.softplus(-players.judge(discriminator, players.generate(params, key_noise, n), key_judge)).mean()


def sgd(cfg: Config) -> optax.GradientTransformation:
    """Of the authors' code: a decaying rate, a rising momentum."""
    return optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.exponential_decay(cfg.learning_rate, 1, 1 / cfg.decay),
        momentum=optax.linear_schedule(cfg.momentum, cfg.final_momentum, cfg.steps),
    )


def parzen(samples: np.ndarray, valid: np.ndarray, test: np.ndarray) -> float:  # [N, D] each
    """Mean log density of `test` in nats, under Gaussians around the samples of the width that suits `valid` best."""
    score = lambda pixels, width: np.mean(np.asarray(log_parzen(pixels, samples, width), np.float64))
    best = max(np.logspace(-1, 0, 10), key=lambda width: score(valid, width))
    return float(score(test, best))


@jax.jit
def log_parzen(pixels: jax.Array, samples: jax.Array, width: jax.Array) -> jax.Array:  # [B, D], [N, D], [] -> [B]
    squares = jnp.sum(samples**2, -1)

    def one(x: jax.Array) -> jax.Array:  # [D]
        distances = squares - 2 * jnp.dot(samples, x, precision="highest") + jnp.sum(x**2)  # [N]
        return latent.log_mean_exp(-distances / (2 * width**2)) - len(x) / 2 * jnp.log(2 * jnp.pi * width**2)

    return jax.lax.map(one, pixels, batch_size=100)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
