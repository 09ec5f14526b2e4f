"""A transformer of 0.8 million parameters predicts tiny Shakespeare at 1.88 nats per character, as nanoGPT's does.

Karpathy, nanoGPT (github.com/karpathy/nanoGPT), README.md, the example for a CPU. There is no paper.

    python experiments/text/char_transformer.py --dataset tiny_shakespeare --preset paper --seeds 5 \\
        --workdir runs/char_transformer

Expected: 1.88 ± 0.04 nats per character on the last tenth of the text. Five seeds take some 16 minutes on a CPU core.

The settings are nanoGPT's, and nothing is chosen: its flags for a CPU, and config/train_shakespeare_char.py and
train.py for the rest. Windows of 64 characters are drawn from anywhere in the first 90 % of the text. Biases are left
out, and weight decay acts on matrices, which include the vectors of characters and positions. The last tenth are the
splits `validation` and `test` of TFDS. Three things differ. nanoGPT estimates its number from 20 random batches; here
every character is predicted once, in windows that do not overlap. A character is one of 256 bytes instead of the 65
that occur; the model soon gives the others almost no probability. GELU has the form with tanh.

Generation with a cache of keys and values has the probabilities of generation without it (`difference/cache`), in less
time: the run prints the characters per second of both. Sampled texts are written to `samples.txt` in its folder.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import decode, losses, metrics, optim
from dl_jax.compress import measure
from dl_jax.core import seeds
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import Array, Batch, Tree, make_step, per_seed, start
from dl_jax.data import text
from dl_jax.harness import Claim, NonNegative, Positive, Probability, Run, launch
from dl_jax.models.sequence.attention import TransformerLM


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "tiny_shakespeare"  # TFDS name of a set with a column of text, or standard_library
    steps: Positive[int] = 2000  # train steps: 1.5 million characters
    batch_size: Positive[int] = 12  # windows per step, over all devices
    block: Positive[int] = 64  # characters in a window
    width: Positive[int] = 128  # of a character's vector
    layers: Positive[int] = 4  # blocks of attention and MLP
    heads: Positive[int] = 4  # of the attention
    dropout: Probability = 0.0  # probability that an output is dropped in training
    learning_rate: Positive[float] = 1e-3  # peak learning rate of AdamW
    final_rate: NonNegative[float] = 1e-4  # learning rate at the end
    warmup: Probability = 0.05  # fraction of the steps in which the learning rate rises
    b2: Probability = 0.99  # decay of AdamW's mean of squared gradients
    weight_decay: NonNegative[float] = 0.1  # of matrices, times the learning rate
    clip: Positive[float] = 1.0  # largest norm of the gradient
    watch_every: Positive[int] = 500  # steps between measurements on the validation split (for the curve only)
    samples: Positive[int] = 8  # texts that are written, each as long as a window


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset=text.STANDARD_LIBRARY, steps=500, width=64, layers=2, learning_rate=3e-3, watch_every=250),
    "smoke": Config(dataset=text.STANDARD_LIBRARY, steps=2, batch_size=64, width=8, layers=1, heads=2, watch_every=2,
                    samples=2),
}  # fmt: skip

CLAIMS = (
    Claim("nats/last_tenth", paper="nanoGPT", locator='README.md at commit 0110f3c8, "I only have a macbook"',
          claimed=1.88, tolerance=0.04, unit="nats", given={"dataset": "tiny_shakespeare"},
          note="nanoGPT's number is an estimate from 20 random batches, ours the mean over all characters."),
    Claim("difference/cache", paper="our bar", locator="log-probabilities with a cache against those without",
          at_most=1e-3, worst=True, unit="nats", given={"dataset": "tiny_shakespeare"},
          note="The largest of 768 characters; in exact arithmetic it is 0."),
    Claim("nats/test", paper="our bar", locator="Python's standard library", at_most=2.33, unit="nats", preset="quick",
          given={"dataset": text.STANDARD_LIBRARY},
          note="one byte from the byte before it: 2.39 on Python 3.11, 2.37 on 3.12"),
)  # fmt: skip
KEEPS = ("samples.txt",)  # files in the run's folder

PROMPT = "\n"
Write = Callable[[Tree, Array, Array], Array]  # (params, prompt int [B, P], key) -> tokens int32 [B, block - P]


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    if cfg.block <= len(PROMPT):
        raise InputError(f"--block is {cfg.block}, expected {len(PROMPT) + 1} or more, to write texts; change it")
    train, *held_out = (text.load(cfg.dataset, split) for split in ("train", "validation", "test"))
    windows = [held_out_windows(ids, cfg.block) for ids in held_out]
    model = TransformerLM(text.VOCABULARY, cfg.block, cfg.width, cfg.layers, cfg.heads, cfg.dropout)
    rate = optim.warmup_cosine(cfg.learning_rate, cfg.steps, cfg.warmup, cfg.final_rate)
    adamw = optax.adamw(rate, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=matrices)
    tx = optax.chain(optax.clip_by_global_norm(cfg.clip), adamw)
    key_init, key, key_test, key_sample = run.keys(4)  # [S] each
    nats = functools.partial(window_nats, model)
    on_validation, on_test = (evaluator(nats, each, 8 * cfg.batch_size, key_test) for each in windows)
    states = fit(
        per_seed(make_step(functools.partial(window_loss, model), tx), one_by_one=True),
        start(model, tx, key_init, key, jnp.zeros((1, 1), jnp.int32)),
        text.random_windows(train, cfg.batch_size, cfg.block, run.seeds),
        steps=cfg.steps,
        run=run,
        watch=Watch(cfg.watch_every, lambda variables: {"nats/validation": on_validation(variables)["nats"]}),
    )
    found = [each(states.variables)["nats"] for each in (on_validation, on_test)]
    members, shown = seeds.split(states.params), windows[1]["token"][: cfg.batch_size]
    differences = jax.jit(functools.partial(cache_difference, model))
    if jax.process_index() == 0:
        show_samples(model, members[0], cfg.samples, key_sample[0], run)
    return {
        "nats/validation": found[0],
        "nats/test": found[1],
        "nats/last_tenth": np.average(found, axis=0, weights=[each["counted"].sum() for each in windows]),
        "difference/cache": np.array([differences(params, shown) for params in members]),
    }


def matrices(params: Tree) -> Tree:
    """Which parameters have a weight decay: all but the scales of norms."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def held_out_windows(ids: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """All windows of a text, {"token", "target": int32 [W, T], "counted": float32 [W, T], 0 in the padding}."""
    columns = text.reading(ids, length)
    return {"token": columns["token"][:, 0], "target": columns["target"][:, 0], "counted": columns["mask"][:, 0]}


def logits_of(model: TransformerLM, params: Tree, tokens: Array, **settings: Any) -> Array:  # int [B, T] -> [B, T, V]
    found: Any = model.apply({"params": params}, tokens, **settings)
    return found


def window_loss(model: TransformerLM, variables: Tree, batch: Batch, key: Array):
    """The mean nats per character of windows [B, T]."""
    logits = logits_of(model, variables["params"], batch["token"], train=True, rngs={"dropout": key})
    return losses.cross_entropy(logits, batch["target"]).mean(), ({}, {})


def window_nats(model: TransformerLM, variables: Tree, batch: Batch, key: Array):
    """The evaluation metric: nats per character, which is predicted from those before it in its window."""
    logits = logits_of(model, variables["params"], batch["token"], train=False)
    return {"nats": metrics.cross_entropy(logits, batch["target"], batch["counted"] * batch["mask"][:, None])}


def cached_step(model: TransformerLM, params: Tree, token: Array, carry: Tree) -> tuple[Array, Tree]:
    """Logits [B, V] of the characters after `token`, int [B], and the cache that holds it too."""
    found: Any = model.apply({"params": params}, token, carry, method="step")
    return found


def cache_difference(model: TransformerLM, params: Tree, tokens: Array) -> Array:  # int [B, T] -> []
    """The largest difference between log-probabilities with a cache, which reads a token at a time, and without."""

    def read(carry: Tree, token: Array) -> tuple[Tree, Array]:
        logits, carry = cached_step(model, params, token, carry)
        return carry, logits

    _, cached = jax.lax.scan(read, model.initial_carry(len(tokens)), tokens.T)  # [T, B, V]
    whole = logits_of(model, params, tokens, train=False)
    return jnp.abs(jax.nn.log_softmax(cached).swapaxes(0, 1) - jax.nn.log_softmax(whole)).max()


def writers(model: TransformerLM) -> dict[str, Write]:
    """Functions that write texts of a block, prompt included, with a cache and by reading all of the text anew."""

    def anew(params: Tree, token: Array, carry: Tree) -> tuple[Array, Tree]:
        tokens, read = carry
        tokens = tokens.at[:, read].set(token)
        logits = logits_of(model, params, tokens, train=False)  # what stands after `read` has no effect
        return logits[:, read], (tokens, read + 1)

    def write(step: Callable[..., tuple[Array, Tree]], begin: Callable[[int], Tree]) -> Write:
        choose = lambda key, logits: decode.draw(key, decode.temperature(logits, 0.8))

        def texts(params: Tree, prompt: Array, key: Array) -> Array:
            rows, read = prompt.shape
            step_of = functools.partial(step, params)
            return decode.generate(step_of, begin(rows), prompt, model.block - read, key, choose)[0]

        return jax.jit(texts)

    empty = lambda rows: (jnp.zeros((rows, model.block), jnp.int32), 0)
    return {
        "with a cache": write(functools.partial(cached_step, model), model.initial_carry),
        "without": write(anew, empty),
    }


def show_samples(model: TransformerLM, params: Tree, rows: int, key: Array, run: Run) -> None:
    """Keeps sampled texts, prints one, and compares the two ways to write them."""
    write, prompt = writers(model), jnp.tile(text.encode(PROMPT).astype(np.int32), (rows, 1))
    found = {name: np.asarray(texts(params, prompt, key)) for name, texts in write.items()}
    samples = [text.decode(ids) for ids in found["with a cache"]]
    run.keep("samples.txt", "\n".join(f"=== {i}\n{sample}\n" for i, sample in enumerate(samples, 1)))
    same = np.mean(found["with a cache"] == found["without"])
    print(f"\nA sample:\n{samples[0]}\n\nWithout a cache, {same:.0%} of the characters of all samples are the same.")
    times = measure.latency(write, params, prompt, key, rounds=3, warm_up=1)
    speeds = ", ".join(f"{name} {found[name].size / each.p50:,.0f}" for name, each in times.items())
    print(f"Characters per second, {rows} texts at a time: {speeds}\n")


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
