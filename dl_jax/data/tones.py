"""The bundled set `tones`: ten classes of two tones each, as six speakers would whistle them, at 8 kHz.

It stands in for spoken digits where there are none: the columns `audio`, `label` and `speaker` are those of `fsdd`. The
two frequencies of a class are those of a telephone's key. A speaker multiplies both by a factor of their own and has a
timbre of their own: how loud the first overtone is, and how fast the tone rises and dies away. Length, level, phases
and the noise, from 16 dB above the tones to 6 dB below them, are drawn anew for each recording.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dl_jax.data.bundled import Bundled

RATE = 8000  # samples a second
ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)  # Hz, of the keys of a telephone (ITU-T Q.23)
KEYS = {str(digit): (ROWS[(digit - 1) // 3], COLUMNS[(digit - 1) % 3]) for digit in range(1, 10)}
KEYS = {"0": (ROWS[3], COLUMNS[1]), **KEYS}
SPEAKERS = tuple("abcdef")
PITCH = (0.97, 0.98, 0.99, 1.01, 1.02, 1.03)  # factor of each speaker's frequencies
TAKES = {"train": 10, "test": 4}  # recordings of each class by each speaker
SHORTEST, LONGEST = 0.15, 0.45  # seconds
NOISE = -16, 6  # decibels that the tones are above the noise, from the least to the most


def tone(rng: np.random.Generator, label: int, speaker: int) -> np.ndarray:  # -> int16 [n]
    """A recording of a class, 0 to 9, by a speaker, 0 to 5."""
    n = int(rng.integers(round(SHORTEST * RATE), round(LONGEST * RATE)))
    t = np.arange(n) / RATE
    timbre = 0.1 + 0.1 * speaker
    wave = np.zeros(n)
    for frequency in KEYS[str(label)]:
        angle = 2 * np.pi * (frequency * PITCH[speaker] * t + rng.random())
        wave += np.sin(angle) + timbre * np.sin(2 * angle + rng.random())
    attack, decay = 0.01 + 0.005 * speaker, 0.1 + 0.05 * speaker  # seconds
    wave *= np.minimum(1, t / attack) * np.exp(-t / decay)
    noise = rng.normal(size=n) * np.sqrt((wave**2).mean()) * 10 ** (-rng.uniform(*NOISE) / 20)
    wave = wave + noise
    return np.rint(wave / abs(wave).max() * 32767 * rng.uniform(0.1, 0.9)).astype(np.int16)


def features() -> Mapping[str, Any]:
    import tensorflow_datasets as tfds

    return {
        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="zlib"),
        "label": tfds.features.ClassLabel(names=list(KEYS)),
        "speaker": tfds.features.ClassLabel(names=list(SPEAKERS)),
    }


def splits() -> dict[str, Iterable[Mapping[str, Any]]]:
    """The examples of each split, in random order; each split has a seed of its own."""

    def examples(seed: int, takes: int) -> list[Mapping[str, Any]]:
        rng = np.random.default_rng(seed)
        kinds = rng.permutation([(label, speaker) for label in range(10) for speaker in range(6)] * takes)
        return [
            {"audio": tone(rng, label, speaker), "label": int(label), "speaker": int(speaker)}
            for label, speaker in kinds
        ]

    return {split: examples(seed, takes) for seed, (split, takes) in enumerate(TAKES.items())}


SET = Bundled(
    "tones", "1.0.0", "Pairs of tones in ten classes by six speakers, at 8 kHz", features, splits, ("audio", "label")
)
