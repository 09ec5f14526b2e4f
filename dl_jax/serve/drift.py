"""How far the latest inputs and answers are from the validation data of a file."""

import collections
import math
from typing import NamedTuple

import numpy as np

from dl_jax.export.record import Record, Validation, mean_and_std, moments, probabilities

WINDOW = 1000  # the latest examples that count


class Drift(NamedTuple):
    """A comparison of the latest examples with those of validation; NaN where there is nothing to compare."""

    examples: int
    mean: float  # of the inputs' values
    std: float
    shift: float  # of the mean, in standard deviations of the values in validation
    spread: float  # the standard deviation divided by that in validation
    answers: float  # total variation between the distributions of answers: 0 for equal ones, 1 for disjoint ones
    confidence: float  # the mean confidence less that in validation


class Window:
    """The latest `WINDOW` examples that a file answered."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._moments: collections.deque[np.ndarray] = collections.deque(maxlen=WINDOW)
        self._answers: collections.deque[tuple[int, float]] = collections.deque(maxlen=WINDOW)  # class, confidence

    def add(self, inputs: np.ndarray, output: np.ndarray) -> None:  # the first input and output, [B, ...]
        self._moments.extend(moments(self._record.request, inputs))
        if self._record.classes:
            found = probabilities(output)
            self._answers.extend(zip(found.argmax(1).tolist(), found.max(1).tolist(), strict=True))

    def drift(self) -> Drift:
        return compared(self._record.validation, list(self._moments), list(self._answers))


def compared(
    validation: Validation, moments: list[np.ndarray], answers: list[tuple[int, float]]
) -> Drift:  # [2] each; class and confidence
    """The drift of examples, given the `record.moments` and the answer of each."""
    if not moments:
        return Drift(0, *[math.nan] * 6)
    mean, std = mean_and_std(np.stack(moments))
    varied = validation.std > 0
    shift = (mean - validation.mean) / validation.std if varied else math.nan
    spread = std / validation.std if varied else math.nan
    if not answers or validation.confidence is None:
        return Drift(len(moments), mean, std, shift, spread, math.nan, math.nan)
    classes, confidences = zip(*answers, strict=True)
    shares = np.bincount(classes, minlength=len(validation.answers)) / len(classes)
    variation = float(np.abs(shares - np.array(validation.answers)).sum() / 2)
    return Drift(len(moments), mean, std, shift, spread, variation, float(np.mean(confidences)) - validation.confidence)
