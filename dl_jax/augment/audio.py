"""Augmentations of recordings: noise in waves, and masks over time and frequency.

They take the columns "wave", float32 [B, N], or "frames", float32 [B, T, D], and "length", int [B], the number of
samples or of frames of each. What lies behind a recording stays as it is.
"""

import jax
import jax.numpy as jnp

from dl_jax.augment.base import Augmentation, Interval, checked, checked_integer
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Batch
from dl_jax.masks import from_lengths


def spec_augment(times: int, longest: int, bands: int, widest: int, most: float = 1.0) -> Augmentation:
    """Sets stretches of time and bands of frequency of batch["frames"] to 0 (Park et al. 2019, arXiv:1904.08779).

    This is section 2 of the paper without its warping of time. Each stretch has t frames and each band f features,
    whole numbers that are uniform in [0, longest] and [0, widest], and begins anywhere in the recording where it fits
    in. They may overlap. The paper's 0 is the mean, so standardise the frames first.

    Args:
        times: The number of stretches of time, 0 or more.
        longest: The largest number of frames of a stretch, 0 or more, at most `most` of the recording.
        bands: The number of bands of frequency, 0 or more.
        widest: The largest number of features of a band, 0 or more; that of all features if these are fewer.
        most: The largest part of a recording that a stretch covers, a fraction in [0, 1]; the paper's p.

    Raises InputError for other values, for frames that are not float32 [B, T, D], and for lengths that
    `masks.from_lengths` refuses.
    """
    for name, value in {"times": times, "longest": longest, "bands": bands, "widest": widest}.items():
        checked_integer(name, value, "a number of stretches, frames, bands or features", least=0)
    checked("(0, most)", (0, most), lambda low, high: high <= 1, "`most` in [0, 1]")

    def augment(key: Array, batch: Batch) -> Batch:
        frames, valid = _of(batch, "frames", "[B, T, D]", 3)
        b, _, d = frames.shape
        length = valid.sum(1)  # [B]
        key_time, key_band = jax.random.split(key)
        # A float32 product may round up to a whole number: 0.7 of 10 frames are 7, never 8.
        limit = jnp.minimum(longest, jnp.floor(most * length + 1e-4)).astype(jnp.int32)
        hidden = _covered(key_time, valid, length, limit, times)[:, :, None]
        every = jnp.full(b, d)
        narrow = _covered(key_band, jnp.ones((b, d), bool), every, jnp.minimum(widest, every), bands)[:, None, :]
        return {**batch, "frames": jnp.where((hidden | narrow) & valid[:, :, None], 0, frames)}

    return augment


def white_noise(decibels: Interval) -> Augmentation:
    """Adds Gaussian noise to batch["wave"], at a signal-to-noise ratio in dB that is drawn for each recording.

    The ratio is that of the mean square of a recording to the variance of the noise, 10 log10(P / σ²). Silence has no
    power, so it gets no noise and stays silent. A recording with a NaN gets NaN everywhere.

    Raises InputError for an interval that is not finite or not in order, for waves that are not float32 [B, N], and
    for lengths that `masks.from_lengths` refuses.
    """
    low, high = checked("decibels", decibels)

    def augment(key: Array, batch: Batch) -> Batch:
        wave, valid = _of(batch, "wave", "[B, N]", 2)
        key_ratio, key_noise = jax.random.split(key)
        ratio = jax.random.uniform(key_ratio, (len(wave), 1), minval=low, maxval=high)
        # Relative to the loudest sample: the square of a quiet one may be too small for float32.
        peak = jnp.where(valid, abs(wave), 0).max(1, keepdims=True)  # [B, 1]
        unit = jnp.where(valid, wave, 0) / jnp.where(peak == 0, 1, peak)
        power = (unit**2).sum(1, keepdims=True) / jnp.maximum(1, valid.sum(1, keepdims=True))
        sigma = peak * jnp.sqrt(jnp.where(peak == 0, 1, power)) * 10 ** (-ratio / 20)  # the root of 0 has no gradient
        return {**batch, "wave": jnp.where(valid, wave + sigma * jax.random.normal(key_noise, wave.shape), wave)}

    return augment


def _covered(key: Array, places: Array, n: Array, limit: Array, count: int) -> Array:
    """Whether each of `places` [B, L] is in one of `count` intervals of up to `limit` [B] of the first n [B]."""
    key_size, key_first = jax.random.split(key)
    shape = (len(n), count)
    size = jax.random.randint(key_size, shape, 0, limit[:, None] + 1)
    first = jax.random.randint(key_first, shape, 0, (n[:, None] - size) + 1)
    place = jnp.arange(places.shape[1])
    return ((place >= first[..., None]) & (place < (first + size)[..., None])).any(1)


def _of(batch: Batch, column: str, axes: str, ndim: int) -> tuple[Array, Array]:
    """batch[column] and which of its steps are valid, bool [B, L]. Raises InputError for another type or shape."""
    for name in (column, "length"):
        if name not in batch:
            raise InputError(f"a batch with the columns {', '.join(batch)}, expected {column} and length; rename them")
    values = jnp.asarray(batch[column])
    if values.ndim != ndim or values.dtype != jnp.float32:
        raise InputError(
            f"{column} {values.shape} of {values.dtype}: this augmentation expects float32 {axes}; convert them first"
        )
    return values, from_lengths(batch["length"], values.shape[1], len(values))
