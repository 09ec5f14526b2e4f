"""Convolutional networks of waveforms and of log-mel energies are compared with a linear model on spoken digits.

Dai, Dai, Qu, Li & Das 2017 (arXiv:1610.00087) classify waveforms by a convolutional network, Hershey et al. 2017
(arXiv:1609.09430) log-mel energies by networks like those of images. The recordings are those of the Free Spoken Digit
Dataset. We know of no paper with these numbers, so the bars are our own.

    python experiments/audio/digits.py --dataset fsdd --preset paper --seeds 5 --workdir runs/digits
    python experiments/audio/digits.py --dataset fsdd --preset speakers --seeds 5 --workdir runs/speakers

Expected: both networks are right more often than a logistic regression on log-mel spectra, and so is the one of log-mel
energies for a speaker that it has not heard. Five seeds of the preset paper took 24 minutes on a CPU core that had
other work.

The test recordings are of the speakers that were learned from. With the preset `speakers`, a log-mel network is fitted
for each speaker in turn, learns from the recordings of the others, and is tested on the test recordings of this one.
`unheard/log_mel` is the mean accuracy over speakers.

All recordings are made equally loud. They are learned at three speeds, and waveforms with white noise. The linear model
was chosen by cross-validation on the training recordings. The last step is tested. The figures `spectrograms` show test
recordings, first those that the first seed heard wrong. The set `tones` has pairs of tones in the place of digits.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import optax

from dl_jax import data, hear, losses, optim
from dl_jax.augment.audio import white_noise
from dl_jax.core.fit import fit
from dl_jax.core.step import Loss, make_step, per_seed, start
from dl_jax.data import audio
from dl_jax.harness import Between, Claim, Distinct, Positive, Probability, Run, Some, launch, spectrograms_figure
from dl_jax.models.sequence.mel_cnn import MelCNN
from dl_jax.models.sequence.wave_cnn import WaveCNN

Network = Literal["waveform", "log_mel"]
Decibels = Annotated[float, Between(0, 200)]
Seconds = Annotated[float, Between(0.01, 3600)]
Speed = Annotated[float, Between(0.1, 10)]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "fsdd"  # TFDS name of a set of spoken digits, with their speakers
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    rate: Positive[int] = 8000  # samples of the recordings a second
    networks: Distinct[Network] = ("waveform", "log_mel")  # the networks
    unheard: bool = False  # whether each speaker in turn is not learned from, and alone tested
    maps: Some[Positive[int]] = (32, 64, 128, 128)  # of each convolution of the waveform
    mel_maps: Some[Positive[int]] = (16, 32, 64)  # of each convolution of the log-mel energies
    dropout: Probability = 0.2  # dropout probability before the output
    speeds: Some[Speed] = (0.9, 1.0, 1.1)  # at which each recording is learned
    noise: tuple[Decibels, Decibels] = (10.0, 40.0)  # dB below a waveform in training, at random from one to the other
    seconds: tuple[Seconds, ...] = (0.384, 0.512, 0.64, 1.024)  # to which shorter recordings are padded
    steps: Positive[int] = 1600  # train steps of the network that reads waveforms
    mel_steps: Positive[int] = 800  # train steps of the network that reads log-mel energies
    batch_size: Positive[int] = 32  # recordings per step, over all devices
    learning_rate: Positive[float] = 3e-3  # peak learning rate of Adam
    clip: Positive[float] = 5.0  # largest norm of the gradient
    sections: Positive[int] = 10  # of a recording, whose mean spectra the linear model reads
    shown: Positive[int] = 8  # recordings in a figure


PRESETS = {
    "paper": Config(),
    "speakers": Config(networks=("log_mel",), unheard=True, mel_steps=500),
    "quick": Config(dataset="tones", speeds=(1.0,), seconds=(), steps=200, mel_steps=200),
    "smoke": Config(dataset="tones", train_split="train[:40]", test_split="test[:20]", networks=("log_mel",),
                    mel_maps=(4,), speeds=(1.0,), seconds=(), mel_steps=2, batch_size=8, sections=2, shown=1),
}  # fmt: skip

ours = functools.partial(Claim, paper="our bar", unit="%", given={"dataset": "fsdd"})
CLAIMS = (
    ours("accuracy/waveform", versus="accuracy/linear", better="higher", locator="WaveCNN against the linear model",
         note="Pilots of two seeds, on train[80%:]: 98.2 ± 0.4 %; the linear model: 96.9 %."),
    ours("accuracy/log_mel", versus="accuracy/linear", better="higher", locator="MelCNN against the linear model",
         note="Pilots of two seeds, on train[80%:]: 98.2 ± 0.3 %; the linear model: 96.9 %."),
    ours("unheard/log_mel", versus="unheard/linear", better="higher", preset="speakers",
         locator="a speaker that was not learned from, MelCNN against the linear model",
         note="The linear model, on the training recordings of each speaker: 63.2 %."),
    ours("accuracy/log_mel", at_least=96.2, preset="quick", given={"dataset": "tones"}, locator="bundled tones",
         note="Logistic regression, on train[80%:]: 91.7 %. Pilots of three seeds there: 97.2 ± 0.5 %."),
)  # fmt: skip
KEEPS = ("**/spectrograms.png",)  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    columns = ("audio", "label", "speaker")
    splits = cfg.train_split, cfg.test_split
    ways = readings(cfg, len(data.info(cfg.dataset).class_names))
    train, test = (audio.recordings(cfg.dataset, split, cfg.rate, columns) for split in splits)
    if not cfg.unheard:
        return {f"accuracy/{name}": found for name, found in accuracies(cfg, ways, train, test, run).items()}
    each = []
    for speaker in np.unique(test["speaker"]):
        others, own = np.flatnonzero(train["speaker"] != speaker), np.flatnonzero(test["speaker"] == speaker)
        parts = hear.taken(train, others), hear.taken(test, own)
        each.append(accuracies(cfg, ways, *parts, run / f"speaker{speaker}"))
    return {f"unheard/{name}": np.mean([found[name] for found in each], 0) for name in each[0]}


def accuracies(
    cfg: Config, ways: Mapping[Network, "Reading"], train: data.Columns, test: data.Columns, run: Run
) -> dict[str, np.ndarray]:
    """The accuracies [S] on the test recordings, in per cent, of the linear model and of each network."""
    regression = hear.linear_accuracy(train, test, cfg.rate, cfg.sections)
    found = {"linear": np.full(len(run.seeds), regression)}
    for name in cfg.networks:
        heard = learned(cfg, ways[name], train, test, run / name)  # [S, N]
        found[name] = 100 * (heard == test["label"]).mean(1)
        (run / name).figure("spectrograms", ways[name].steps, functools.partial(figure, cfg, test, heard[0]))
    return found


class Reading(NamedTuple):
    """A way to read recordings."""

    column: Literal["wave", "frames"]  # what is read
    of: Callable[[Mapping[str, Any]], data.Columns]  # recordings -> this column, `length` and `label`
    example: np.ndarray  # of the column, [1, N] or [1, T, D]
    a_second: int  # samples or frames
    model: Any
    loss: Loss
    steps: int  # train steps


def readings(cfg: Config, classes: int) -> dict[Network, Reading]:
    """The ways to read recordings. Raises InputError where the noise is not from a lower to a higher level."""
    wave, mel = WaveCNN(classes, cfg.maps, dropout=cfg.dropout), MelCNN(classes, cfg.mel_maps, dropout=cfg.dropout)
    noisy = losses.with_batch(hear.loss(wave.apply, "wave"), white_noise(cfg.noise))
    frames = functools.partial(hear.frames, rate=cfg.rate)
    seen = np.zeros((1, 100, 40), np.float32)  # 40 mel bins, every 10 ms
    return {
        "waveform": Reading("wave", hear.waves, seen[..., 0], cfg.rate, wave, noisy, cfg.steps),
        "log_mel": Reading("frames", frames, seen, 100, mel, hear.loss(mel.apply, "frames"), cfg.mel_steps),
    }


def learned(cfg: Config, way: Reading, train: data.Columns, test: data.Columns, run: Run) -> np.ndarray:
    """The labels, int [S, N], that a network gives the recordings of `test` after it has learned from `train`."""
    learnt, tested = way.of(hear.at_speeds(train, cfg.speeds)), way.of(test)
    tx = optax.chain(optax.clip_by_global_norm(cfg.clip), optax.adam(optim.warmup_cosine(cfg.learning_rate, way.steps)))
    widths = functools.partial(data.widths, [round(way.a_second * seconds) for seconds in cfg.seconds])
    key_init, key = run.keys(2)  # [S] each
    states = fit(
        per_seed(make_step(way.loss, tx), one_by_one=True),
        start(way.model, tx, key_init, key, way.example),
        data.bucketed(learnt, "length", widths(learnt["length"]), cfg.batch_size, run.seeds),
        steps=way.steps,
        run=run,
    )
    return hear.answers(way.model.apply, way.column, tested, widths(tested["length"]))(states.variables)


def figure(cfg: Config, test: data.Columns, heard: np.ndarray):
    """Log-mel energies of test recordings, first those of which the label `heard`, int [N], is not the one said."""
    names = data.info(cfg.dataset).class_names
    rows = np.argsort(heard == test["label"], kind="stable")[: cfg.shown]
    energies = hear.frames(hear.taken(test, rows), cfg.rate)["frames"]
    return spectrograms_figure(
        [energies[i][:length] for i, length in enumerate(energies.lengths)],
        [f"said {names[test['label'][row]]}, heard {names[heard[row]]}" for row in rows],
        seconds=0.01,
    )


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
