"""Connectionist temporal classification, CTC (Graves et al. 2006, "Connectionist Temporal Classification").

A network gives logits [B, T, K] for T frames and K classes, of which one is the blank. A path is a class for each
frame. Its labelling is what is left when runs of a class become one and blanks are then removed: aab−b gives abb
and −abb− gives ab, where − is the blank. The probability of a labelling is the sum of those of all its paths,
where the frames are independent of each other.

`lengths`, int [B], are the numbers of valid frames. The labels are int [B, N], of which the first `label_lengths`, int
[B], are valid; there may be none, and the blank is no label. What stands in the padding has no effect, whatever it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dl_jax import masks
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array
from dl_jax.losses.inputs import class_numbers

NEVER = -1e30  # the log-probability of what is impossible; sums of it stay finite in float32
IMPOSSIBLE = 1e29  # no possible path has so many nats


def negative_log_likelihood(
    logits: Array, lengths: Array, labels: Array, label_lengths: Array, blank: int = 0
) -> Array:  # [B, T, K], int [B], int [B, N], int [B] -> [B]
    """−log p(labels), in nats for each sequence, in float32 or wider; `optax.ctc_loss`, at least 0.

    Labels that need more frames than there are (`frames_needed`), or a class whose logit is −inf in all paths, are
    impossible: their loss is inf, and their gradient 0, so that they can be left out by `jnp.where`. A label outside
    [0, K), one that is the blank, a label length outside [0, N], and a sequence that is `undefined` give NaN.

    Raises InputError where shapes or types do not fit, T or N is 0, or `blank` is not in [0, K); for lengths outside
    [1, T] and label lengths outside [0, N]; and where labels need more frames than there are. What is traced cannot be
    checked. Traced lengths above T then count as T, and of a sequence of no frames every label is impossible.
    """
    valid = valid_frames("ctc", logits, lengths, blank)  # [B, T]
    labels, label_lengths = _labels(labels, label_lengths, len(logits))
    needed = frames_needed(labels, label_lengths)
    _require_room(needed, lengths)

    there = jnp.arange(labels.shape[1]) < label_lengths[:, None]  # [B, N]
    classes = logits.shape[2]
    labels = class_numbers(labels, classes)
    wrong = (there & ((labels == blank) | (labels == classes))).any(1)
    wrong = wrong | (label_lengths < 0) | (label_lengths > labels.shape[1]) | undefined(logits, valid)
    # Optax's sums multiply what they leave out by 0, so nothing may be infinite or NaN.
    taken = (valid & ~wrong[:, None])[..., None]
    logits = jnp.where(taken, jnp.maximum(at_least_float32(logits), NEVER), 0)
    padding = lambda mask: (~mask).astype(logits.dtype)  # Optax's masks are 1 in the padding
    with jax.default_matmul_precision("highest"):  # it takes the labels' log-probabilities by a matrix product
        nats = optax.ctc_loss(
            logits,
            padding(valid),
            jnp.where(there & ~wrong[:, None], labels, blank),
            padding(there),
            blank_id=blank,
            log_epsilon=NEVER,
        )
    # Rounding makes the loss of labels that are all but certain negative, by some 1e-7. Their gradient stays.
    nats = nats + jax.lax.stop_gradient(jnp.maximum(nats, 0) - nats)
    impossible = (needed > valid.sum(1)) | (nats > IMPOSSIBLE)
    return jnp.where(wrong, jnp.nan, jnp.where(impossible, jnp.inf, nats))


def frames_needed(labels: Array, label_lengths: Array) -> Array:  # int [B, N], int [B] -> int32 [B]
    """The least number of frames for these labels: one for each, and one for a blank between two that are equal."""
    there = jnp.arange(jnp.shape(labels)[1]) < jnp.asarray(label_lengths)[:, None]
    labels = jnp.asarray(labels)
    repeats = (labels[:, 1:] == labels[:, :-1]) & there[:, 1:]
    return there.sum(1, dtype=jnp.int32) + repeats.sum(1, dtype=jnp.int32)


def valid_frames(name: str, logits: Array, lengths: Array, blank: int) -> Array:  # [B, T, K], int [B] -> bool [B, T]
    """Which frames are valid.

    Raises InputError, which begins with `name`, for logits of other shapes, no frame or class, and a blank outside
    [0, K), and as `masks.from_lengths` does.
    """
    if logits.ndim != 3 or not all(logits.shape[1:]):
        raise InputError(
            f"{name}: logits are {logits.shape}, expected (B, T, K) for B sequences of T frames and K classes, with T "
            "and K at least 1; map other axes with jax.vmap"
        )
    if not 0 <= blank < logits.shape[2]:
        raise InputError(f"{name}: blank is {blank}, expected a class in [0, {logits.shape[2]}), as the logits have")
    return masks.from_lengths(lengths, logits.shape[1], logits.shape[0])


def undefined(logits: Array, valid: Array) -> Array:  # [B, T, K], bool [B, T] -> bool [B]
    """Which sequences have no probabilities: those with a valid frame whose largest logit is NaN, inf or −inf."""
    return (valid & ~jnp.isfinite(logits.max(-1))).any(1)


def _labels(labels: Any, label_lengths: Any, batch: int) -> tuple[Array, Array]:
    labels, label_lengths = (x if hasattr(x, "dtype") else np.asarray(x) for x in (labels, label_lengths))
    kinds = [x.dtype for x in (labels, label_lengths)]
    fit = labels.ndim == 2 and labels.shape[0] == batch and labels.shape[1] and label_lengths.shape == (batch,)
    if not fit or not all(jnp.issubdtype(kind, jnp.integer) for kind in kinds):
        raise InputError(
            f"ctc: labels are {kinds[0]} {labels.shape} and their lengths {kinds[1]} {label_lengths.shape}, expected "
            f"whole numbers ({batch}, N) with N at least 1, and ({batch},); pad them to one width"
        )
    if not isinstance(label_lengths, Tracer):
        for length in np.asarray(label_lengths):
            if not 0 <= length <= labels.shape[1]:
                raise InputError(
                    f"ctc: a label length is {length}, expected 0 to {labels.shape[1]}, the width of the labels; give "
                    "the number of valid labels of each sequence"
                )
    return labels, jnp.asarray(label_lengths)


def _require_room(needed: Array, lengths: Any) -> None:  # int [B] each
    if isinstance(needed, Tracer) or isinstance(lengths, Tracer):
        return
    for row, (least, frames) in enumerate(zip(np.asarray(needed), np.asarray(lengths), strict=True)):
        if least > frames:
            raise InputError(
                f"ctc: sequence {row} has {frames} frames, expected {least} or more, one for each label and one for a "
                "blank between equal labels; leave it out, or lower the network's stride"
            )
