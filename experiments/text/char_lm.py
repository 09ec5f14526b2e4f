"""An LSTM whose state is carried on from window to window predicts tiny Shakespeare at 2.2 bits per character.

The text is Karpathy's (github.com/karpathy/char-rnn, 2015) in the splits of TFDS; a character is a byte. We know of no
paper with an LSTM's number on it, so the bars are our own.

    python experiments/text/char_lm.py --dataset tiny_shakespeare --preset paper --seeds 5 --workdir runs/char_lm

Expected: 2.2 ± 0.03 bits per character on the test split, and fewer than with a state that is reset at every window.
Five seeds take some 70 minutes on a CPU core.

Training is truncated back-propagation through time (Williams & Peng 1990). Gradients reach back over 64 characters,
while the LSTM's state depends on all characters that a row has read. This state is part of the training state, and
sharded like the batch. An evaluation reads a split from its first to its last character with one state; the first
character is not predicted. The test error is that after the last step. The hyper-parameters were chosen on the
validation split. Sampled texts are written to `samples.txt` in the run's folder.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import decode, losses, optim
from dl_jax.core import seeds
from dl_jax.core.devices import whole
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import Array, Batch, State, Tree, make_step, per_seed, start
from dl_jax.data import text
from dl_jax.harness import Claim, Positive, Probability, Run, launch
from dl_jax.models.sequence.rnn import Carry, CharLM


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "tiny_shakespeare"  # TFDS name of a set with a column of text, or standard_library
    steps: Positive[int] = 4000  # train steps: 8 epochs of a million characters
    batch_size: Positive[int] = 32  # parts of the text that are read in parallel, over all devices
    length: Positive[int] = 64  # characters in a window, over which gradients reach back
    hidden: Positive[int] = 256  # units of each LSTM layer
    layers: Positive[int] = 1  # LSTM layers
    dropout: Probability = 0.1  # probability that an output of a layer is dropped in training
    learning_rate: Positive[float] = 4e-3  # peak learning rate of Adam
    warmup: Probability = 0.05  # fraction of the steps in which the learning rate rises
    clip: Positive[float] = 1.0  # largest norm of the gradient
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # type of matrix products; parameters are float32
    watch_every: Positive[int] = 1000  # steps between measurements on the validation split
    sample_length: Positive[int] = 500  # characters in a sample


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset=text.STANDARD_LIBRARY, steps=200, hidden=128, watch_every=100),
    "smoke": Config(dataset=text.STANDARD_LIBRARY, steps=2, batch_size=8, length=64, hidden=8, watch_every=2,
                    sample_length=20),
}  # fmt: skip

claim = functools.partial(Claim, "bits/test", paper="our bar", unit="bits", given={"dataset": "tiny_shakespeare"})
CLAIMS = (
    claim(locator="no paper gives an LSTM's number on this text", claimed=2.2, tolerance=0.03,
          note="The bar was set before a run had ended, and the test split is harder than the validation split, on "
          "which the same networks give 2.09 (bits/validation). For comparison, in nats on the last tenth of the text "
          "(ours: nats/last_tenth), nanoGPT's README.md at commit 0110f3c8 gives 1.4697 for a Transformer of 10.7 "
          "million parameters and 1.88 for one of 0.8 million."),
    claim(versus="bits/test_anew", locator="a state carried on against one that starts anew with every window",
          note="Both are the same network, which has learned with a state carried on."),
    claim(locator="Python's standard library", at_most=3.39, preset="quick", given={"dataset": text.STANDARD_LIBRARY},
          note="one byte from the byte before it: 3.45 on Python 3.11, 3.42 on 3.12"),
)  # fmt: skip
KEEPS = ("samples.txt",)  # files in the run's folder

PROMPT = "\n"
SAMPLERS: Mapping[str, decode.Choose] = {
    "greedy": lambda key, logits: decode.greedy(logits),
    "temperature 0.8": lambda key, logits: decode.draw(key, decode.temperature(logits, 0.8)),
    "top 10": lambda key, logits: decode.draw(key, decode.top_k(logits, 10)),
    "nucleus 0.9": lambda key, logits: decode.draw(key, decode.nucleus(logits, 0.9)),
}


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, *held_out = (text.load(cfg.dataset, split) for split in ("train", "validation", "test"))
    model = CharLM(text.VOCABULARY, cfg.hidden, cfg.layers, dropout=cfg.dropout, dtype=jnp.dtype(cfg.compute_dtype))
    rate = optim.warmup_cosine(cfg.learning_rate, cfg.steps, cfg.warmup)
    tx = optax.chain(optax.clip_by_global_norm(cfg.clip), optax.adam(rate))
    key_init, key, key_sample = run.keys(3)  # [S] each
    score = jax.jit(jax.vmap(functools.partial(read, model), (0, None)))
    validation, test = (text.reading(ids, cfg.length) for ids in held_out)
    counts = [len(ids) - 1 for ids in held_out]
    bits = [1 / count / np.log(2) for count in counts]

    def nats(variables: Tree, windows: Batch) -> np.ndarray:  # [S], the sum over all characters
        params = jax.tree.map(whole, variables["params"])  # gathered once, not for every window
        return np.asarray(score(params, windows), np.float64).sum(-1)

    states = fit(
        per_seed(make_step(functools.partial(window_loss, model), tx)),
        begin(model, tx, cfg.batch_size, key_init, key),
        text.windows(train, cfg.batch_size, cfg.length, run.seeds),
        steps=cfg.steps,
        run=run,
        watch=Watch(cfg.watch_every, lambda variables: {"bits/validation": nats(variables, validation) * bits[0]}),
        carried=("carry",),
    )
    texts = samples(model, seeds.split(states.params)[0], cfg.sample_length, key_sample[0])
    run.keep("samples.txt", "\n".join(f"=== {name}\n{sample}\n" for name, sample in texts.items()))
    if jax.process_index() == 0:
        name, sample = list(texts.items())[-1]
        print(f"\nA sample ({name}):\n{sample}\n")
    anew = {**test, "first": np.ones_like(test["first"])}
    found = [nats(states.variables, windows) for windows in (validation, test, anew)]
    return {
        "bits/validation": found[0] * bits[0],
        "bits/test": found[1] * bits[1],
        "bits/test_anew": found[2] * bits[1],
        "nats/last_tenth": (found[0] + found[1]) / sum(counts),
    }


def begin(model: CharLM, tx: optax.GradientTransformation, rows: int, key_init: Array, key: Array) -> State:
    """The initial states of S seeds, with a zero carry [S, rows, H] in `extra`; both keys are [S]."""
    states = start(model, tx, key_init, key, jnp.zeros((1, 1), jnp.int32))
    carry = jax.tree.map(lambda leaf: jnp.zeros((len(key), *leaf.shape)), model.initial_carry(rows))
    return states._replace(extra={"carry": carry})


def predict(model: CharLM, params: Tree, carry: Carry, window: Batch, **settings: Any) -> tuple[Array, Carry]:
    """The cross-entropy [B, T] of the targets in nats, and the carry after the window.

    The carry of a row is set to zero before a window that is the first of a text.
    """
    carry = jax.tree.map(lambda leaf: jnp.where(window["first"][:, None], 0, leaf), carry)
    result: Any = model.apply({"params": params}, window["token"], carry, **settings)
    logits, carry = result
    return losses.cross_entropy(logits, window["target"]), carry


def window_loss(model: CharLM, variables: Tree, batch: Batch, key: Array):
    """The mean nats per character of a window; its collections hold the new carry."""
    settings = {"train": True, "rngs": {"dropout": key}}
    nats, carry = predict(model, variables["params"], variables["carry"], batch, **settings)
    return nats.mean(), ({"carry": carry}, {"bits": nats.mean() / np.log(2)})


def read(model: CharLM, params: Tree, windows: Batch) -> Array:  # [W, 1, T] -> [W]
    """The sum of the nats of each window of a text, read in order from a zero carry."""

    def advance(carry: Carry, window: Batch) -> tuple[Carry, Array]:
        nats, carry = predict(model, params, carry, window, train=False)
        return carry, (nats * window["mask"]).sum()

    return jax.lax.scan(advance, model.initial_carry(1), windows)[1]


def samples(model: CharLM, params: Tree, length: int, key: Array) -> dict[str, str]:
    """A text of `length` characters for each of `SAMPLERS`, by its name."""

    def step(token: Array, carry: Carry) -> tuple[Array, Carry]:
        result: Any = model.apply({"params": params}, token[:, None], carry, train=False)
        logits, carry = result
        return logits[:, 0], carry

    prompt, carry = jnp.asarray(text.encode(PROMPT)[None]), model.initial_carry(1)
    write = jax.jit(lambda choose: decode.generate(step, carry, prompt, length, key, choose)[0], static_argnums=0)
    return {name: text.decode(np.asarray(write(choose)[0])) for name, choose in SAMPLERS.items()}


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
