"""A temporal convolutional network predicts Bach's next chord better than an LSTM or GRU, and those than a plain RNN.

Bai, Kolter & Koltun 2018, "An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence
Modeling" (arXiv:1803.01271), Table 1, JSB chorales.

    python experiments/music/polyphonic.py --dataset jsb_chorales --preset paper --seeds 5 --workdir runs/polyphonic

Expected: 8.45 (LSTM), 8.43 (GRU), 8.91 (RNN) and 8.10 (TCN) ± 0.15 nats per frame: the negative log-likelihood of the
next frame of 88 keys, each a Bernoulli variable given the frames before, summed over the keys and averaged over all
predicted frames of the test set.

As in the authors' code (locuslab/TCN, poly_music) a batch is one chorale, its loss is summed over its frames, and the
test loss counts where the validation loss was best. Adam, the sizes of TCN and LSTM, the forget bias, dropout and
clipping are those of the paper's section 5 and Tables 2 and 3. Ours, chosen on the validation set, is what it does not
give: the learning rates of the recurrent networks, the sizes of GRU and RNN, and stopping after ten passes without a
better validation loss, where the authors make 100 and divide the learning rate by ten. Where their code differs from
their paper (it clips before there is a gradient, drops single units in place of channels, and starts the convolutions
uniformly), ours follows the paper.

Five seeds take an hour and a half on a CPU core. The quick preset has no music: there a frame is a row of a digit's
scan.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, metrics, optim
from dl_jax.core import devices
from dl_jax.core.errors import InputError, require_positive
from dl_jax.core.evaluate import evaluate
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import State, init_state, make_step, per_seed
from dl_jax.harness import Claim
from dl_jax.harness.launch import launch
from dl_jax.harness.run import Run
from dl_jax.losses.latent import bernoulli_log_prob
from dl_jax.models.sequence.rnn import GRU, LSTM, VANILLA, Cell, SequenceTagger, with_forget_bias
from dl_jax.models.sequence.tcn import TCN


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "jsb_chorales"  # TFDS name of a set of piano rolls, or of pictures, whose rows then are frames
    train_split: str = "train"  # TFDS split to learn from
    valid_split: str = "validation"  # TFDS split that says when to stop
    test_split: str = "test"  # TFDS split to test on
    steps: int = 22900  # train steps, at most: 100 passes over 229 chorales
    batch_size: int = 1  # sequences per step and seed, over all devices
    exam_size: int = 80  # sequences per batch of an evaluation, over all devices
    watch_every: int = 229  # steps between evaluations
    patience: int = 10  # evaluations without a better validation loss before a seed stops
    learning_rate: float = 1e-3  # of LSTM and GRU
    rnn_learning_rate: float = 5e-4  # of the plain RNN
    lstm_hidden: int = 200  # units per layer: 570,000 parameters
    gru_hidden: int = 230  # units per layer: 560,000 parameters
    rnn_hidden: int = 290  # units per layer: 304,000 parameters
    forget_bias: float = 10.0  # of the LSTM's forget gates at the start
    layers: int = 2  # of the recurrent networks
    dropout: float = 0.2  # after each recurrent layer, probability
    clip: float = 1.0  # largest norm of the recurrent networks' gradient
    tcn_learning_rate: float = 2e-3  # of the TCN
    tcn_hidden: int = 150  # channels
    tcn_levels: int = 2  # residual blocks
    tcn_taps: int = 3  # of each kernel
    tcn_dropout: float = 0.5  # after each convolution, probability
    tcn_clip: float = 0.4  # largest norm of the TCN's gradient


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", train_split="train[:80%]", valid_split="train[80%:]", steps=600, batch_size=32,
                    exam_size=360, watch_every=100, lstm_hidden=48, gru_hidden=56, rnn_hidden=100, tcn_hidden=32),
    "smoke": Config(dataset="digits", train_split="train[:32]", valid_split="train[32:64]", test_split="test[:40]",
                    steps=4, batch_size=8, exam_size=16, watch_every=2, lstm_hidden=4, gru_hidden=4, rnn_hidden=4,
                    tcn_hidden=4),
}  # fmt: skip

JSB = {"LSTM": 8.45, "GRU": 8.43, "RNN": 8.91, "TCN": 8.1}  # Table 1
NOTTINGHAM = {"LSTM": 3.29, "GRU": 3.46, "RNN": 4.05, "TCN": 3.07}
BETTER = (("TCN", "LSTM"), ("TCN", "GRU"), ("LSTM", "RNN"), ("GRU", "RNN"))
NOTES = {
    "RNN": "better than claimed, we suspect, as its learning rate was chosen for it alone",
    "TCN": "missed; we suspect the learning rate, which the authors divide by ten where ours stops",
}
nats = functools.partial(Claim, paper="Bai et al. 2018", unit="nats/frame")
jsb = functools.partial(nats, given={"dataset": "jsb_chorales"})
CLAIMS = (
    *(jsb(f"test_nll/{net.lower()}", locator=f"Table 1, JSB Chorales, {net}", claimed=value, tolerance=0.15,
          note=NOTES.get(net, "")) for net, value in JSB.items()),
    *(jsb(f"test_nll/{net.lower()}", versus=f"test_nll/{other.lower()}",
          locator=f"Table 1, JSB Chorales, {net} beats {other}") for net, other in BETTER),
    *(nats(f"Nottingham/{net.lower()}", locator=f"Table 1, Nottingham, {net}", claimed=value, tolerance=0.15,
           note="another task than this experiment's") for net, value in NOTTINGHAM.items()),
)  # fmt: skip


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    rates = ("learning_rate", "rnn_learning_rate", "tcn_learning_rate")
    require_positive({name: getattr(cfg, name) for name in (*rates, "clip", "tcn_clip")})
    mesh = devices.data_mesh(batch_size=cfg.batch_size)
    folders = (run.settings.data_dir, run.settings.cache_dir)
    splits = (cfg.train_split, cfg.valid_split, cfg.test_split)
    train, valid, test = (piano_rolls(cfg.dataset, split, *folders) for split in splits)
    rows, exam_rows = (devices.process_rows(size, mesh) for size in (cfg.batch_size, cfg.exam_size))
    streams = [data.batches(train, cfg.batch_size, seed, rows) for seed in run.seeds]
    batches = devices.placed(data.per_seed(streams), mesh, axis=1)  # [S, B, ...]
    exams = {
        name: [devices.place(batch, mesh) for batch in data.epoch(rolls, cfg.exam_size, exam_rows)]
        for name, rolls in (("valid_nll", valid), ("test_nll", test))
    }
    keys = jnp.stack([jax.random.split(jax.random.key(seed)) for seed in run.seeds])  # [S, 2]
    lanes = np.arange(len(run.seeds))

    found, nets = {}, networks(cfg, train["notes"].shape[-1])
    for net in nets.values():
        jax.eval_shape(functools.partial(beginning, net), keys[0])  # what is wrong with the last shows before the first
    for name, net in nets.items():
        child = run / name
        examine = jax.vmap(functools.partial(examined, net.apply), (0, None, None))
        fit(
            per_seed(make_step(functools.partial(prediction_loss, net.apply), net.tx)),
            devices.replicated(jax.jit(jax.vmap(functools.partial(beginning, net)))(keys), mesh),
            batches,
            steps=cfg.steps,
            run=child,
            every=cfg.watch_every,
            watch=Watch(cfg.watch_every, functools.partial(measured, examine, exams)),
            stop=optim.early_stopping("valid_nll", cfg.patience, mode="min", lanes=len(lanes)),
        )
        best = np.nanargmin(child.history("valid_nll")[1], 0)  # [S]
        found[f"test_nll/{name}"] = child.history("test_nll")[1][best, lanes]
    return found


class Network(NamedTuple):
    init: Callable[..., Any]  # (key, frames [B, T, K], train) -> variables
    apply: Callable[..., Any]  # (variables, frames [B, T, K], train, rngs) -> logits of the next frames [B, T, K]
    tx: optax.GradientTransformation
    keys: int  # K, of a frame


def networks(cfg: Config, keys: int) -> dict[str, Network]:
    """The four of the table."""

    def recurrent(cell: Cell, hidden: int, learning_rate: float) -> Network:
        model = SequenceTagger(keys, hidden, cfg.layers, cell, cfg.dropout)
        tx = optax.chain(optax.clip_by_global_norm(cfg.clip), optax.adam(learning_rate))
        return Network(model.init, lambda *args, **rest: model.apply(*args, **rest)[0], tx, keys)

    lstm = recurrent(LSTM, cfg.lstm_hidden, cfg.learning_rate)
    tcn = TCN(keys, cfg.tcn_hidden, cfg.tcn_levels, cfg.tcn_taps, cfg.tcn_dropout)
    tx = optax.chain(optax.clip_by_global_norm(cfg.tcn_clip), optax.adam(cfg.tcn_learning_rate))
    return {
        "lstm": lstm._replace(init=lambda *args, **rest: with_forget_bias(lstm.init(*args, **rest), cfg.forget_bias)),
        "gru": recurrent(GRU, cfg.gru_hidden, cfg.learning_rate),
        "rnn": recurrent(VANILLA, cfg.rnn_hidden, cfg.rnn_learning_rate),
        "tcn": Network(tcn.init, tcn.apply, tx, keys),
    }


def beginning(net: Network, keys: jax.Array) -> State:
    return init_state(keys[0], net.init(keys[1], jnp.zeros((1, 2, net.keys)), train=False), net.tx)


def frame_nll(logits: jax.Array, notes: jax.Array) -> jax.Array:  # [B, T - 1, K], uint8 [B, T, K] -> [B, T - 1]
    """Nats for each frame but the first, summed over its keys."""
    batch, steps, keys = logits.shape
    return -bernoulli_log_prob(logits.reshape(-1, keys), notes[:, 1:].reshape(-1, keys)).reshape(batch, steps)


def predicted(batch: Mapping[str, Any]) -> jax.Array:  # bool [B, T - 1]
    """Which frames there are to predict: all of a sequence but the first."""
    return jnp.arange(batch["notes"].shape[1] - 1) < batch["length"][:, None] - 1


def prediction_loss(apply: Callable[..., Any], variables, batch, key):
    """The sum over a sequence's frames, as the authors have it: a long chorale weighs more."""
    frames = batch["notes"].astype(jnp.float32)
    logits = apply(variables, frames[:, :-1], train=True, rngs={"dropout": key})
    total, count = metrics.masked(frame_nll(logits, frames), predicted(batch))
    return total / len(frames), ({}, {"nll": total / count})


def examined(apply: Callable[..., Any], variables, batch, key):
    frames = batch["notes"].astype(jnp.float32)
    logits = apply(variables, frames[:, :-1], train=False)
    return {"nll": metrics.masked(frame_nll(logits, frames), predicted(batch) * batch["mask"][:, None])}


def measured(examine: Callable[..., Any], exams: Mapping[str, Any], variables) -> dict[str, np.ndarray]:
    """Both at every evaluation; the validation loss alone decides."""
    return {name: evaluate(examine, variables, exam, jax.random.key(0))["nll"] for name, exam in exams.items()}


def piano_rolls(name: str, split: str, data_dir: str | None, cache_dir: str | None) -> dict[str, np.ndarray]:
    """{"notes": uint8 [N, T, K] of 0 and 1, "length": int32 [N]}; a picture's dark rows stand in for frames.

    Raises InputError for a set that holds neither.
    """
    records = data.load(name, split, data_dir, cache_dir)
    if "notes" in records:
        return {"notes": records["notes"], "length": records["notes/length"]}
    if "image" in records and records["image"].ndim == 4:
        notes = (records["image"][..., 0] > 127).astype(np.uint8)
        return {"notes": notes, "length": np.full(len(notes), notes.shape[1], np.int32)}
    raise InputError(
        f"{name} has the columns {', '.join(sorted(records))}, expected 'notes' [T, keys] or 'image' of one size; "
        "use --dataset jsb_chorales or digits"
    )


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
