"""A temporal convolutional network predicts Bach's next chord better than an LSTM or GRU, which beat a plain RNN.

Bai, Kolter & Koltun 2018, "An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence
Modeling" (arXiv:1803.01271), Table 1, JSB chorales.

    python experiments/music/polyphonic.py --dataset jsb_chorales --preset paper --seeds 5 --workdir runs/polyphonic

Expected: 8.45 (LSTM), 8.43 (GRU), 8.91 (RNN) and 8.10 (TCN) ± 0.15 nats per frame. This is the negative log-likelihood
of the next frame of 88 keys, each a Bernoulli variable given the earlier frames, summed over the keys and averaged over
all predicted frames of the test set. Of the Nottingham tunes (`--preset nottingham --nets tcn`, three seeds) it is 3.07
± 0.15 for the TCN; the recurrent networks read 177,000 frames one after the other in each epoch.

As in the authors' code (locuslab/TCN, poly_music), a batch is one chorale, its loss is summed over its frames, and the
test loss is that at the lowest validation loss. Adam, the sizes of TCN and LSTM, the forget bias, dropout and clipping
are those of the paper's section 5 and Tables 2 and 3. The other settings were chosen on the validation set: the
learning rates of the recurrent networks, the sizes of GRU and RNN, and stopping after ten epochs without a lower
validation loss; the authors train for 100 epochs and divide the learning rate by ten. Where the authors' code differs
from their paper, ours follows the paper: their code clips before there is a gradient, drops single units instead of
channels, and initialises the convolutions uniformly. The settings of the TCN for the Nottingham tunes are the defaults
of that code. These tunes differ in length, so that a batch is padded to one of a few lengths.

Each figure `rolls` shows the first piece of the test set above the probabilities that a network predicts of its keys,
with the first seed's variables at its lowest validation loss; nothing is predicted of the first frame. Five seeds took
38 minutes on 2 CPU cores. The quick preset has no music; a frame is then a row of a scanned digit.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, masks, metrics, optim
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import Watch, fit
from dl_jax.core.ragged import Ragged
from dl_jax.core.step import Array, make_step, per_seed, start
from dl_jax.harness import Claim, Distinct, Positive, Probability, Run, Some, launch, on_digits, rolls_figure
from dl_jax.harness.checkpoint import store
from dl_jax.losses.latent import bernoulli_log_prob
from dl_jax.models.sequence.rnn import GRU, LSTM, VANILLA, Cell, SequenceTagger, with_forget_bias
from dl_jax.models.sequence.tcn import TCN

Net = Literal["lstm", "gru", "rnn", "tcn"]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "jsb_chorales"  # TFDS name of a set of piano rolls, or of images, whose rows are taken as frames
    train_split: str = "train"  # TFDS split to learn from
    valid_split: str = "validation"  # TFDS split for early stopping
    test_split: str = "test"  # TFDS split to test on
    steps: Positive[int] = 22900  # largest number of train steps: 100 epochs of 229 chorales
    batch_size: Positive[int] = 1  # sequences per step and seed, over all devices
    test_batch: Positive[int] = 80  # sequences per batch of an evaluation, over all devices
    boundaries: Some[Positive[int]] = (64, 96, 192, 256, 384, 640)  # lengths to which shorter sequences are padded
    nets: Distinct[Net] = ("lstm", "gru", "rnn", "tcn")  # the networks to train
    watch_every: Positive[int] = 229  # steps between evaluations
    patience: Positive[int] = 10  # evaluations without a better validation loss before a seed stops
    learning_rate: Positive[float] = 1e-3  # learning rate of LSTM and GRU
    rnn_learning_rate: Positive[float] = 5e-4  # learning rate of the plain RNN
    lstm_hidden: Positive[int] = 200  # units per layer of the LSTM: 570,000 parameters
    gru_hidden: Positive[int] = 230  # units per layer of the GRU: 560,000 parameters
    rnn_hidden: Positive[int] = 290  # units per layer of the plain RNN: 304,000 parameters
    forget_bias: float = 10.0  # initial bias of the LSTM's forget gates
    layers: Positive[int] = 2  # layers of each recurrent network
    dropout: Probability = 0.2  # dropout probability after each recurrent layer
    clip: Positive[float] = 1.0  # largest norm of the gradient of a recurrent network
    tcn_learning_rate: Positive[float] = 2e-3  # learning rate of the TCN
    tcn_hidden: Positive[int] = 150  # channels of the TCN
    tcn_levels: Positive[int] = 2  # residual blocks of the TCN
    tcn_taps: Positive[int] = 3  # size of each kernel of the TCN
    tcn_dropout: Probability = 0.5  # dropout probability after each convolution of the TCN
    tcn_clip: Positive[float] = 0.4  # largest norm of the gradient of the TCN


PRESETS = {
    "paper": Config(),
    "nottingham": Config(dataset="nottingham", steps=69_400, watch_every=694, test_batch=16,
                         tcn_learning_rate=1e-3, tcn_levels=4, tcn_taps=5,
                         tcn_dropout=0.25, tcn_clip=0.2),
    "quick": Config(dataset="digits", train_split="train[:80%]", valid_split="train[80%:]", steps=600, batch_size=32,
                    test_batch=360, watch_every=100, lstm_hidden=48, gru_hidden=56, rnn_hidden=100, tcn_hidden=32),
    "smoke": Config(dataset="digits", train_split="train[:32]", valid_split="train[32:64]", test_split="test[:40]",
                    steps=2, batch_size=8, test_batch=16, watch_every=1, nets=("rnn", "tcn"), rnn_hidden=4, layers=1,
                    tcn_hidden=4, tcn_levels=1),
}  # fmt: skip

KEYS = 88  # of a piano
JSB = {"LSTM": 8.45, "GRU": 8.43, "RNN": 8.91, "TCN": 8.1}  # Table 1
NOTTINGHAM = {"LSTM": 3.29, "GRU": 3.46, "RNN": 4.05, "TCN": 3.07}
QUICK = {"LSTM": 3.05, "GRU": 2.55, "RNN": 2.56, "TCN": 2.68}
BETTER = (("TCN", "LSTM"), ("TCN", "GRU"), ("LSTM", "RNN"), ("GRU", "RNN"))
NOTES = {
    "RNN": "We suspect that it is better than claimed because its learning rate was chosen for it alone.",
    "TCN": "We do not know why. The authors divide their learning rate by ten where our training stops; in pilots of "
    "three seeds that lowered the validation loss of one by 0.02, and of two not at all. Their start, clipping and "
    "kind of dropout were tried too, with one seed each, and did not explain the difference.",
}
PLAIN = "In the paper LSTM and GRU are 0.46 and 0.48 nats ahead. Our RNN is better than the paper's."
nats = functools.partial(Claim, paper="Bai et al. 2018", unit="nats/frame")
jsb = functools.partial(nats, given={"dataset": "jsb_chorales"})
CLAIMS = (
    *(jsb(f"test_nll/{net.lower()}", locator=f"Table 1, JSB Chorales, {net}", claimed=value, tolerance=0.15,
          note=NOTES.get(net, "")) for net, value in JSB.items()),
    *(jsb(f"test_nll/{net.lower()}", versus=f"test_nll/{other.lower()}",
          locator=f"Table 1, JSB Chorales, {net} beats {other}", note=PLAIN if other == "RNN" else "")
      for net, other in BETTER),
    *(nats(f"test_nll/{net.lower()}", locator=f"Table 1, Nottingham, {net}", claimed=value, tolerance=0.15, seeds=3,
           preset="nottingham", given={"dataset": "nottingham", **({} if net == "TCN" else {"nets": Config().nets})})
      for net, value in NOTTINGHAM.items()),
    *(on_digits(f"test_nll/{net.lower()}", at_most=value, unit="nats/frame", note="each pixel by itself: 3.20")
      for net, value in QUICK.items()),
)  # fmt: skip
KEEPS = ("*/rolls.png",)  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, valid, test = (
        piano_rolls(cfg.dataset, split) for split in (cfg.train_split, cfg.valid_split, cfg.test_split)
    )
    key, key_init = run.keys(2)  # [S] each
    width = train["notes"].shape[-1]
    boundaries = functools.partial(data.widths, cfg.boundaries)
    stream = data.bucketed(train, "length", boundaries(train["length"]), cfg.batch_size, run.seeds)
    held_out = {
        f"{split}_nll": data.buckets(rolls, "length", boundaries(rolls["length"]))
        for split, rolls in {"valid": valid, "test": test}.items()
    }
    every, found, piece = networks(cfg, width), {}, test["notes"][0][: test["length"][0]]  # [T, K]
    for name in cfg.nets:
        net = every[name]
        measure = functools.partial(prediction_nll, net.apply)
        losses_of = {loss: evaluator(measure, rolls, cfg.test_batch, key) for loss, rolls in held_out.items()}
        fit(
            per_seed(make_step(functools.partial(prediction_loss, net.apply), net.tx), net.one_by_one),
            start(net, net.tx, key_init, key, jnp.zeros((1, 2, width))),
            stream,
            steps=cfg.steps,
            run=run / name,
            every=cfg.watch_every,
            # Both losses are measured at every evaluation, but only the validation loss is selected on.
            watch=Watch(cfg.watch_every, functools.partial(watched, losses_of), best=("first_valid_nll", "min")),
            stop=optim.early_stopping("valid_nll", cfg.patience, mode="min", seeds=len(run.seeds)),
        )
        best = np.nanargmin((run / name).history("watch/valid_nll")[1], 0)  # [S]
        found[f"test_nll/{name}"] = (run / name).history("watch/test_nll")[1][best, np.arange(len(best))]
        (run / name).figure("rolls", cfg.steps, functools.partial(figure, net.apply, run / name, piece))
    return found


def watched(losses_of: Mapping[str, Callable[[Any], Any]], variables: Any) -> dict[str, np.ndarray]:
    """The losses [S], and the validation loss of the first seed, by which its best checkpoint is kept."""
    found = {loss: of(variables)["nll"] for loss, of in losses_of.items()}
    return {**found, "first_valid_nll": found["valid_nll"][0]}


def figure(apply: Callable[..., Any], run: Run, piece: np.ndarray):  # [T, K]
    """A piece above the probabilities of its frames, given those before, by the first seed's best checkpoint."""
    folder = f"{run.directory}/checkpoints"
    saved = store.load(folder, store.best_step(folder))[1]["state"]
    variables = jax.tree.map(lambda leaf: leaf[0], {"params": saved["params"]})
    logits = jax.jit(functools.partial(apply, train=False))(variables, piece[None, :-1].astype(np.float32))
    predicted = np.concatenate([np.full((1, piece.shape[1]), np.nan), jax.nn.sigmoid(logits[0])])  # [T, K]
    return rolls_figure({"notes": piece, "probability": predicted})


class Network(NamedTuple):
    """A network and how it is trained."""

    init: Callable[..., Any]  # (key, frames [B, T, K], train) -> variables
    apply: Callable[..., Any]  # (variables, frames [B, T, K], train, rngs) -> logits of the next frames [B, T, K]
    tx: optax.GradientTransformation
    one_by_one: bool  # train seeds one after the other on a CPU: LSTM, GRU and RNN are then 1.3 times faster, TCN not


def networks(cfg: Config, keys: int) -> dict[str, Network]:
    """The four networks of the table, for frames of `keys` keys."""

    def recurrent(cell: Cell, hidden: int, learning_rate: float) -> Network:
        model = SequenceTagger(keys, hidden, cfg.layers, cell, cfg.dropout)
        tx = optax.chain(optax.clip_by_global_norm(cfg.clip), optax.adam(learning_rate))
        return Network(model.init, lambda *args, **rest: model.apply(*args, **rest)[0], tx, one_by_one=True)

    lstm = recurrent(LSTM, cfg.lstm_hidden, cfg.learning_rate)
    tcn = TCN(keys, cfg.tcn_hidden, cfg.tcn_levels, cfg.tcn_taps, cfg.tcn_dropout)
    tx = optax.chain(optax.clip_by_global_norm(cfg.tcn_clip), optax.adam(cfg.tcn_learning_rate))
    return {
        "lstm": lstm._replace(init=lambda *args, **rest: with_forget_bias(lstm.init(*args, **rest), cfg.forget_bias)),
        "gru": recurrent(GRU, cfg.gru_hidden, cfg.learning_rate),
        "rnn": recurrent(VANILLA, cfg.rnn_hidden, cfg.rnn_learning_rate),
        "tcn": Network(tcn.init, tcn.apply, tx, one_by_one=False),
    }


def prediction_loss(apply: Callable[..., Any], variables, batch, key):
    """The loss in nats, summed over the frames of a sequence as in the authors' code: a long chorale weighs more."""
    total, count = frames_nll(apply, variables, batch, train=True, rngs={"dropout": key})
    return total / len(batch["notes"]), ({}, {"nll": total / count})


def prediction_nll(apply: Callable[..., Any], variables, batch, key):
    """The evaluation metric: nats per frame."""
    return {"nll": frames_nll(apply, variables, batch, train=False)}


def frames_nll(apply: Callable[..., Any], variables, batch, **settings) -> tuple[Array, Array]:
    """The NLL in nats, summed over the keys of all frames after the first, and the number of these frames."""
    notes = batch["notes"].astype(jnp.float32)  # [B, T, K]
    logits = apply(variables, notes[:, :-1], **settings)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    nats = -bernoulli_log_prob(flat(logits), flat(notes[:, 1:])).reshape(logits.shape[:2])  # [B, T - 1]
    there = masks.from_lengths(batch["length"], notes.shape[1])[:, 1:]
    return metrics.masked(nats, there * batch["mask"][:, None] if "mask" in batch else there)


def piano_rolls(name: str, split: str) -> dict[str, Any]:
    """The columns {"notes": uint8 [N, T, K] of 0 and 1, "length": int32 [N]} of a split.

    For a set of images the rows of an image, thresholded at half of the largest intensity, are the frames. Raises
    InputError for a set that has neither notes nor images of one size, for notes that are no 0 and 1 of the 88 keys of
    a piano, and for a sequence of fewer than two frames, of which nothing is predicted.
    """
    records = data.load(name, split)
    if "notes" in records:
        notes = records["notes"]  # Ragged, or an array where all pieces are equally long
        values = notes.values if isinstance(notes, Ragged) else notes
        wrong = values[(values != 0) & (values != 1)][:1]
        if notes.shape[2:] != (KEYS,) or wrong.size:
            raise InputError(
                f"{name} has notes of shape {notes.shape}{''.join(f' with {value}' for value in wrong)}, expected 0 "
                f"and 1 of {KEYS} keys, (N, T, {KEYS}); convert them into piano rolls, and leave out keys that a piano "
                "lacks"
            )
    elif "image" in records and records["image"].ndim == 4:
        notes = (records["image"][..., 0] > 127).astype(np.uint8)
    else:
        raise InputError(
            f"{name} has the columns {', '.join(sorted(records))}, expected 'notes' [T, keys] or 'image' of one size; "
            "use --dataset jsb_chorales or digits"
        )
    length = records.get("notes/length", np.full(len(notes), notes.shape[1], np.int32))
    for piece in np.flatnonzero(length < 2)[:1]:
        raise InputError(
            f"piece {piece} of {name} {split} has length {length[piece]}, expected two frames or more, as the first is "
            "not predicted; leave it out"
        )
    return {"notes": notes, "length": length}


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
