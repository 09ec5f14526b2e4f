"""Entities in sequences of BIO tags, and how many of them were found."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dl_jax import masks
from dl_jax.core.errors import InputError


class Entity(NamedTuple):
    """An entity of a type, from the step `start` up to, but not including, `stop`."""

    kind: str
    start: int
    stop: int


class EntityScores(NamedTuple):
    """Precision, recall and their harmonic mean, as fractions float64 [...]; 0 where there is nothing to divide by."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: int  # the number of true entities


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sequence of tags "O", "B-type" and "I-type", in order.

    An entity begins at a B, and at an I that does not continue one of its type, as in the script conlleval of the
    CoNLL-2000 shared task (Tjong Kim Sang & Buchholz 2000) and in seqeval's default mode. Raises InputError for another
    tag.
    """
    found: list[Entity] = []
    kind = None  # of the entity that the last step belongs to
    for step, tag in enumerate(tags):
        if tag == "O":
            kind = None
            continue
        if tag[:2] not in ("B-", "I-") or not tag[2:]:
            raise InputError(f"entities: a tag is {tag!r}, expected 'O', 'B-type' or 'I-type'; convert other schemes")
        if tag[0] == "I" and tag[2:] == kind:
            found[-1] = found[-1]._replace(stop=step + 1)
        else:
            kind = tag[2:]
            found.append(Entity(kind, step, step + 1))
    return found


def entity_scores(
    predicted: np.ndarray, tags: np.ndarray, lengths: np.ndarray, names: Sequence[str]
) -> tuple[EntityScores, dict[str, EntityScores]]:
    """Precision, recall and F1 of entities: micro-averaged, and for each type that `names` know.

    An entity is found if one of the same type with the same first and last step is predicted. The micro-average is that
    of the counts of all types. These are the numbers of seqeval in its default mode.

    Args:
      predicted: class numbers int [..., N, T]. The axes before N, such as that of seeds, are those of the scores.
      tags: the true class numbers, int [N, T].
      lengths: the numbers of valid steps, int [N]; what stands after them has no effect.
      names: the names of the classes, "O", "B-type" and "I-type".

    Raises InputError where shapes or types do not fit, for a class number outside of the names, and for a name that is
    no tag.
    """
    predicted, tags, lengths = np.asarray(predicted), np.asarray(tags), np.asarray(lengths)
    if tags.ndim != 2 or predicted.shape[-2:] != tags.shape:
        raise InputError(
            f"entity_scores: predicted {predicted.shape} for tags {tags.shape}, expected (..., N, T) for (N, T); give "
            "one class number for each step"
        )
    valid = np.asarray(masks.from_lengths(lengths, tags.shape[1], len(tags)))
    outer = predicted.shape[:-2]
    true = _all_entities(tags, valid, names)
    guesses = [_all_entities(each, valid, names) for each in predicted.reshape(math.prod(outer), *tags.shape)]

    def scores(kinds: set[str]) -> EntityScores:
        of = lambda found: {(row, entity) for row, entity in found if entity.kind in kinds}
        there = of(true)
        correct = np.array([len(there & of(guess)) for guess in guesses], np.float64).reshape(outer)
        guessed = np.array([len(of(guess)) for guess in guesses], np.float64).reshape(outer)
        ratio = lambda a, b: np.divide(a, b, out=np.zeros(outer), where=b > 0)
        support = np.full(outer, float(len(there)))
        f1 = ratio(2 * correct, guessed + support)
        return EntityScores(ratio(correct, guessed), ratio(correct, support), f1, len(there))

    kinds = sorted({entity.kind for name in names for entity in entities([name])})
    return scores({*kinds}), {kind: scores({kind}) for kind in kinds}


def _all_entities(tags: np.ndarray, valid: np.ndarray, names: Sequence[str]) -> set[tuple[int, Entity]]:
    """(row, entity) of tags [N, T], at steps that are valid, bool [N, T]."""
    shown = tags[valid]
    if not np.issubdtype(tags.dtype, np.integer) or (shown.size and not 0 <= shown.min() <= shown.max() < len(names)):
        span = f" from {shown.min()} to {shown.max()}" if shown.size else ""
        raise InputError(
            f"entity_scores: class numbers are {tags.dtype}{span}, expected integers from 0 to {len(names) - 1}, the "
            f"places of {len(names)} names"
        )
    return {
        (row, entity)
        for row, (numbers, there) in enumerate(zip(tags, valid, strict=True))
        for entity in entities([names[int(number)] for number in numbers[there]])
    }
