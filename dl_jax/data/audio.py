"""Audio as columns: recordings of a set, log-mel energies, resampling, levels, and strings of recordings.

A wave is a row of a `Ragged` column, [N, samples], of int16, or of floats whose full scale is [-1, 1]. What is
computed of it has no padding either: `column[rows]` pads what is read, and `column.lengths` are the numbers of samples
or frames.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError, require_positive
from dl_jax.core.ragged import Ragged, joined, ragged
from dl_jax.core.stream import Columns
from dl_jax.data.columns import load
from dl_jax.data.describe import info

FULL_SCALE = 32768  # of int16
FLOOR = 1e-6  # energy that is added before the logarithm is taken, so that silence has one
_AT_ONCE = 8192  # frames that are transformed at a time


def recordings(name: str, split: str, rate: int, only: Sequence[str] = ("audio", "label")) -> Columns:
    """The columns `only` of a split of the set `name`, in which `audio` are waves, Ragged float32 in [-1, 1].

    `audio/length`, int32 [N], are their numbers of samples. Raises InputError for a set without these columns, whose
    audio is no row of int16 or floats, whose rate is not known or not `rate` (samples a second), and for values that
    are not finite or outside [-1, 1].
    """
    described = info(name)
    missing = [column for column in only if column not in described.features]
    if missing:
        raise InputError(
            f"data set {name} has the columns {', '.join(described.features)}, expected {', '.join(only)}; choose "
            "another --dataset"
        )
    if described.rate != rate:
        found = "at a rate that its description does not state" if described.rate is None else f"at {described.rate} Hz"
        raise InputError(
            f"the audio of data set {name} is {found}, expected {rate} Hz; choose another --dataset, or prepare "
            "it anew with `data.audio.resample`"
        )
    records = load(name, split, only=only)
    wave = records["audio"]
    if not isinstance(wave, Ragged):  # all are of one length
        wave = ragged(wave)
    values = to_unit(wave)
    for place in np.flatnonzero(abs(values) > 1)[:1]:
        raise InputError(
            f"data set {name}: {_value_at(wave, place)}, expected [-1, 1]; prepare it anew with floats that are "
            "divided by their full scale"
        )
    return {**records, "audio": wave.of(values), "audio/length": wave.lengths}


def to_unit(wave: Ragged) -> np.ndarray:  # -> float32 [M]
    """The values of waves in [-1, 1]: those of int16 divided by 32,768, floats as they are.

    Raises InputError for other types, for values of more than one channel, and for what float32 has as NaN or infinity.
    """
    values = wave.values
    if values.ndim != 1 or not (values.dtype == np.int16 or values.dtype.kind == "f"):
        raise InputError(
            f"waves of {values.dtype} {wave.shape}, expected int16 or floats [N, samples], one channel; convert them"
        )
    if values.dtype == np.int16:
        return values.astype(np.float32) / FULL_SCALE
    with np.errstate(over="ignore"):
        new = values.astype(np.float32)
    for place in np.flatnonzero(~np.isfinite(new))[:1]:
        raise InputError(f"{_value_at(wave, place)}, expected finite ones in float32; leave it out or repair it")
    return new


def _value_at(wave: Ragged, place: int) -> str:
    row = int(np.searchsorted(wave.offsets, place, "right")) - 1
    return f"wave {row} has the value {wave.values[place]} at sample {place - wave.offsets[row]}"


def mel_filters(bins: int, size: int, rate: int) -> np.ndarray:  # -> float32 [size // 2 + 1, bins]
    """Triangles over the frequencies of a Fourier transform of `size` samples, as columns.

    Their corners are evenly spaced in mel, 2595 log10(1 + f / 700 Hz), from 0 to half the rate, and their height is 1
    (Davis & Mermelstein 1980, figure 1, whose spacing this formula replaces). Raises InputError for sizes below 1 and
    where a triangle has no frequency in it.
    """
    require_positive({"the number of mel bins": bins, "the size of a frame": size, "the rate": rate})
    mel = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), bins + 2)
    corners = 700 * (10 ** (mel / 2595) - 1)
    frequency = np.arange(size // 2 + 1)[:, None] * rate / size
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    filters = np.maximum(0, np.minimum((frequency - low) / (middle - low), (high - frequency) / (high - middle)))
    empty = np.flatnonzero(~filters.any(0))
    if len(empty):
        raise InputError(
            f"mel bin {empty[0]} of {bins} lies between two frequencies of a frame of {size} samples at {rate} Hz, "
            "expected one in each; use fewer bins or longer frames"
        )
    return filters.astype(np.float32)


def log_mel(wave: Ragged, rate: int, bins: int = 40, seconds: float = 0.025, hop: float = 0.01) -> Ragged:
    """Logarithms of mel energies: waves -> frames, Ragged float32 [N, T, bins].

    A frame is multiplied by a Hann window and padded with zeros to a power of two; its energies |DFT|² are added up by
    `mel_filters`, and the result is log(energy + FLOOR), so that silence has the finite value log(FLOOR).

    Args:
        wave: Waves, int16 or floats in [-1, 1].
        rate: Their samples a second.
        bins: Mel bins.
        seconds: Length of a frame. A wave of n samples has (n - size) // step + 1 frames, those that fit in.
        hop: Seconds from one frame to the next.

    Raises InputError for values that `to_unit` refuses, for a wave that is shorter than a frame, for frames or hops of
    less than a sample, and as `mel_filters` does.
    """
    values, size, step = to_unit(wave), round(rate * seconds), round(rate * hop)
    require_positive({"the samples of a frame": size, "the samples from one frame to the next": step})
    for row in np.flatnonzero(wave.lengths < size)[:1]:
        raise InputError(
            f"wave {row} has {wave.lengths[row]} samples, expected {size} or more, those of a frame of {seconds} s at "
            f"{rate} Hz; leave it out"
        )
    counts = (wave.lengths - size) // step + 1
    transform = 1 << (size - 1).bit_length()
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)
    filters = mel_filters(bins, transform, rate)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a frame in its wave
    starts = np.repeat(wave.offsets[:-1], counts) + step * number
    found = np.empty((len(starts), bins), np.float32)
    for first in range(0, len(starts), _AT_ONCE):
        frames = values[starts[first : first + _AT_ONCE, None] + np.arange(size)] * window
        energy = np.abs(np.fft.rfft(frames, transform)) ** 2
        found[first : first + _AT_ONCE] = np.log(energy @ filters + FLOOR)
    return joined(found, counts)


def moments(features: Ragged) -> tuple[np.ndarray, np.ndarray]:  # [N, T, D] -> float32 [D], float32 [D]
    """Mean and standard deviation of each feature over all frames, which are to be those of the training split.

    Padding has no part in them. Of a feature that is always the same, such as any of silence, the standard deviation is
    given as 1, so that `standardised` gives zeros. Raises InputError where there is no frame.
    """
    if not len(features.values):
        raise InputError("no frames, expected those of one recording or more; choose a split that is not empty")
    mean = features.values.mean(0, dtype=np.float64)
    std = features.values.std(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6 * np.maximum(1, abs(mean)), std, 1).astype(np.float32)


def standardised(features: Ragged, mean: np.ndarray, std: np.ndarray) -> Ragged:
    """(features - mean) / std of each feature: what is padded with zeros is padded with the mean."""
    return features.of((features.values - mean) / std)


def levelled(wave: Ragged) -> Ragged:
    """Waves, float32, each divided by its root mean square. Raises InputError as `levels` does."""
    return wave.of((to_unit(wave) / np.repeat(levels(wave), wave.lengths)).astype(np.float32))


def levels(wave: Ragged) -> np.ndarray:  # -> float64 [N]
    """The root mean square of each wave.

    Raises InputError for values that `to_unit` refuses, and for silence, which has no level.
    """
    row = np.repeat(np.arange(len(wave)), wave.lengths)
    energy = np.bincount(row, to_unit(wave).astype(np.float64) ** 2, len(wave))
    for silent in np.flatnonzero(energy == 0)[:1]:
        raise InputError(
            f"wave {silent} is silent, {wave.lengths[silent]} samples of 0, expected a level that can be made equal; "
            "leave it out"
        )
    return np.sqrt(energy / wave.lengths)


def resample(wave: Ragged, rate: int, to: int) -> Ragged:
    """Waves at `rate` samples a second as float32 waves at `to`, by SciPy's polyphase filter against aliasing.

    A wave of n samples becomes one of ceil(n to / rate). Raises InputError for rates below 1 and for values that
    `to_unit` refuses.
    """
    from scipy.signal import resample_poly

    require_positive({"the rate": rate, "the new rate": to})
    values, common = to_unit(wave), gcd(rate, to)
    rows = [values[first:last] for first, last in zip(wave.offsets[:-1], wave.offsets[1:], strict=True)]
    new = [resample_poly(row, to // common, rate // common) if len(row) else row for row in rows]
    return ragged([row.astype(np.float32) for row in new])


def sections(features: Ragged, n: int) -> np.ndarray:  # [N, T, D] -> float32 [N, n, D]
    """The means of n sections of equal length of each recording's frames, for models that take a fixed number.

    A section has one frame or more: those of a recording with fewer than n frames share them. Raises InputError for n
    below 1, and for a recording without frames.
    """
    require_positive({"the number of sections": n})
    for row in np.flatnonzero(features.lengths < 1)[:1]:
        raise InputError(f"recording {row} has no frames, expected 1 or more; leave it out")
    lengths = features.lengths[:, None].astype(np.int64)
    first = np.arange(n) * lengths // n  # [N, n]
    last = np.maximum(first + 1, np.arange(1, n + 1) * lengths // n)
    sums = _cumulated(features.values.astype(np.float64))
    begin = features.offsets[:-1, None]
    return ((sums[begin + last] - sums[begin + first]) / (last - first)[..., None]).astype(np.float32)


def strings(
    wave: Ragged, label: np.ndarray, speaker: np.ndarray, n: int, most: int, seed: int
) -> Mapping[str, Any]:  # int [N], int [N]
    """n strings of 1 to `most` recordings of one speaker, one after the other.

    These are for connectionist temporal classification. Returns {"wave": Ragged [n, samples], "transcript": Ragged
    int32 [n, most], the labels of a string's recordings, "speaker": int32 [n]}. Speakers are equally likely. Raises
    InputError for n or `most` below 1, for labels and speakers that are no whole numbers, and where there are not as
    many of them as waves.
    """
    require_positive({"the number of strings": n, "the most recordings of a string": most})
    if not 0 < len(wave) == len(label) == len(speaker):
        raise InputError(
            f"{len(label)} labels and {len(speaker)} speakers of {len(wave)} waves, expected one of each; choose a "
            "split of all three"
        )
    for name, numbers in {"labels": label, "speakers": speaker}.items():
        if np.asarray(numbers).dtype.kind not in "iu":
            raise InputError(f"{name} of {np.asarray(numbers).dtype}, expected whole numbers; number them")
    rng = np.random.default_rng(seed)
    of = {each: np.flatnonzero(speaker == each) for each in np.unique(speaker)}
    who = rng.choice(np.unique(speaker), n)
    which = [rng.choice(of[each], count) for each, count in zip(who, rng.integers(1, most + 1, n), strict=True)]
    counts = np.array([len(each) for each in which])
    parts = wave.take(np.concatenate(which))
    ends = np.cumsum(counts)
    return {
        "wave": joined(parts.values, parts.offsets[ends] - parts.offsets[ends - counts]),
        "transcript": joined(np.asarray(label)[np.concatenate(which)].astype(np.int32), counts),
        "speaker": who.astype(np.int32),
    }


def _cumulated(values: np.ndarray) -> np.ndarray:  # [M, ...] -> [M + 1, ...]
    return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, 0)])
