"""A network that hears strings of spoken digits writes them down letter by letter, and a lexicon corrects its spelling.

Graves, Fernández, Gomez & Schmidhuber 2006, "Connectionist temporal classification" (CTC), trains it without being told
when a letter is spoken. The network is a small TDNN (Waibel et al. 1989), like that of icefall's recipe for "yesno". We
know of no paper with strings of these recordings, so the bars are our own.

    python experiments/audio/ctc.py --dataset fsdd --preset paper --seeds 5 --workdir runs/ctc

Expected: a word error rate of at most 3 % if a beam search among sequences of the ten words ("lexicon") reads the
network, and of at most 7 % if the most probable path is read as it is ("greedy"). Five seeds took 14 minutes on 2
CPU cores.

A string is 1 to --digits recordings of one speaker, one after the other; the strings that are tested are made of
recordings that were not learned, of the same speakers. The network reads 40 log-mel energies every 10 ms, standardised
by the mean and spread of the strings that are learned, and gives the letters of the words and a space after each. The
sizes, rates and steps were chosen on the last tenth of the training recordings. The last step is tested. The set
`tones` has pairs of tones in the place of digits.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, metrics, optim
from dl_jax.core import seeds
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector
from dl_jax.core.fit import fit
from dl_jax.core.ragged import ragged
from dl_jax.core.step import Array, Batch, Tree, make_step, per_seed, start
from dl_jax.data import audio
from dl_jax.decode.ctc import Lexicon, best_path, lexicon, prefix_beam_search
from dl_jax.harness import Claim, Positive, Probability, Run, launch
from dl_jax.losses import ctc
from dl_jax.models.sequence.tdnn import TDNN


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "fsdd"  # TFDS name of a set of spoken digits, with their speakers
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    rate: Positive[int] = 8000  # samples of the recordings a second
    train_strings: Positive[int] = 2000  # strings to learn from
    test_strings: Positive[int] = 300  # strings to test on
    digits: Positive[int] = 5  # recordings in a string, at most
    boundaries: tuple[Positive[int], ...] = (96, 160, 240)  # frames to which shorter strings are padded
    hidden: Positive[int] = 96  # channels of each convolution
    dropout: Probability = 0.1  # dropout probability after each convolution
    steps: Positive[int] = 2500  # train steps
    batch_size: Positive[int] = 16  # strings per step, over all devices
    learning_rate: Positive[float] = 4e-3  # peak learning rate of Adam
    clip: Positive[float] = 5.0  # largest norm of the gradient
    beams: Positive[int] = 16  # labellings that the beam search keeps


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="tones", train_strings=600, test_strings=100, steps=400),
    "smoke": Config(dataset="tones", train_strings=16, test_strings=8, digits=2, boundaries=(), hidden=4, steps=2,
                    batch_size=8, beams=2),
}  # fmt: skip

ours = functools.partial(Claim, paper="our bar", unit="%", given={"dataset": "fsdd"})
CLAIMS = (
    ours("word_error/lexicon", at_most=3.0, locator="strings of 1 to 5 digits, beam search with ten words",
         note="Pilots of two seeds, on the last tenth of the training recordings: 1.1 ± 0.5 %."),
    ours("word_error/greedy", at_most=7.0, locator="strings of 1 to 5 digits, the most probable path",
         note="Pilots of two seeds, on the last tenth of the training recordings: 3.9 ± 1.5 %."),
    ours("word_error/lexicon", versus="word_error/greedy", locator="strings of 1 to 5 digits, lexicon or none"),
)  # fmt: skip
KEEPS = ("letters.json", "moments.npy")  # files in the run's folder

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS: tuple[str, ...] = ("", *sorted(set("".join(WORDS))), " ")  # by class; the first is the blank


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (
        strings(cfg, split, n, seed)
        for split, n, seed in ((cfg.train_split, cfg.train_strings, 0), (cfg.test_split, cfg.test_strings, 1))
    )
    mean, std = audio.moments(train["frames"])
    run.keep("letters.json", LETTERS)
    run.keep("moments.npy", np.stack([mean, std]))
    for part in (train, test):
        part["frames"] = audio.standardised(part["frames"], mean, std)
    model = TDNN(len(LETTERS), cfg.hidden, dropout=cfg.dropout)
    tx = optax.chain(optax.clip_by_global_norm(cfg.clip), optax.adam(optim.warmup_cosine(cfg.learning_rate, cfg.steps)))
    widths = functools.partial(data.widths, cfg.boundaries)
    key_init, key = run.keys(2)  # [S] each
    states = fit(
        per_seed(make_step(functools.partial(writing_loss, model), tx)),
        start(model, tx, key_init, key, jnp.zeros((1, 1, train["frames"].shape[-1]))),
        data.bucketed(train, "length", widths(train["length"]), cfg.batch_size, run.seeds),
        steps=cfg.steps,
        run=run,
    )
    words = lexicon([spelt([number]).tolist() for number in range(len(WORDS))], len(LETTERS))
    write = collector(functools.partial(written, model, words, cfg.beams), 3 * cfg.batch_size)
    errors: dict[str, list[float]] = {"greedy": [], "lexicon": []}
    parts = data.buckets(test, "length", widths(test["length"]))
    answers = [seeds.split(write(states.variables, part)) for part in parts]  # [buckets][S]
    true = [sentence for part in parts for sentence in sentences(part["letters"], part["letters/length"])]
    for of_seed in zip(*answers, strict=True):
        for way, rates in errors.items():
            found = [sentence for answer in of_seed for sentence in sentences(*answer[way])]
            rates.append(100 * metrics.word_error_rate(found, true))
    return {f"word_error/{way}": np.array(rates) for way, rates in errors.items()}


def strings(cfg: Config, split: str, n: int, seed: int) -> dict[str, Any]:
    """Strings of recordings: frames, Ragged [n, T, 40], with "length", and letters [n, L] with "letters/length".

    Raises InputError for labels that are not 0 to 9, for a recording that is silent, and for a string that has more
    letters than frames.
    """
    records = audio.recordings(cfg.dataset, split, cfg.rate, ("audio", "label", "speaker"))
    audio.levels(records["audio"])  # raises InputError for silence, of which no letters can be learned
    made = audio.strings(records["audio"], records["label"], records["speaker"], n, cfg.digits, seed)
    if not (records["label"].min() >= 0 and records["label"].max() < len(WORDS)):
        raise InputError(
            f"{cfg.dataset} has labels from {records['label'].min()} to {records['label'].max()}, expected the digits "
            "0 to 9; choose a set of spoken digits"
        )
    frames = audio.log_mel(made["wave"], cfg.rate)
    digits = made["transcript"]
    letters = ragged([spelt(digits.values[a:b]) for a, b in zip(digits.offsets, digits.offsets[1:], strict=False)])
    needed = np.asarray(ctc.frames_needed(jnp.asarray(letters), jnp.asarray(letters.lengths)))
    for row in np.flatnonzero(needed > frames.lengths)[:1]:
        raise InputError(
            f"string {row} of {cfg.dataset} {split} has {frames.lengths[row]} frames, expected {needed[row]} or more "
            "for its letters; leave short recordings out"
        )
    return {
        "frames": frames,
        "length": frames.lengths,
        "letters": np.asarray(letters),
        "letters/length": letters.lengths,
    }


def spelt(digits: Sequence[int] | np.ndarray) -> np.ndarray:  # -> int32 [L]
    """The letters of digits, with a space after each."""
    return np.array([LETTERS.index(letter) for digit in digits for letter in f"{WORDS[digit]} "], np.int32)


def sentences(letters: np.ndarray, lengths: np.ndarray) -> Sequence[Sequence[str]]:  # int [N, L], int [N]
    """The words that were written down."""
    return ["".join(LETTERS[i] for i in row[:n]).split() for row, n in zip(letters, lengths, strict=True)]


def writing_loss(model: TDNN, variables: Tree, batch: Batch, key: Array):
    """The nats of the letters of a string, a mean."""
    output: Any = model.apply(
        variables, batch["frames"], batch["length"], train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    logits, new = output
    nats = ctc.negative_log_likelihood(logits, batch["length"], batch["letters"], batch["letters/length"])
    return nats.mean(), (new, {})


def written(model: TDNN, words: Lexicon, beams: int, variables: Tree, batch: Batch):
    """The letters, int [B, T], and how many, of the most probable path and of the best sequence of words."""
    logits: Any = model.apply(variables, batch["frames"], batch["length"], train=False)
    found = prefix_beam_search(logits, batch["length"], beams, words=words)
    return {"greedy": best_path(logits, batch["length"]), "lexicon": (found.tokens[:, 0], found.lengths[:, 0])}


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
