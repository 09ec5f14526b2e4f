"""How far what was recognised is from what was said: edit distance and word error rate."""

from collections.abc import Hashable, Sequence

import numpy as np

from dl_jax.core.errors import InputError

Words = Sequence[Hashable]  # words, characters or class numbers


def edit_distance(found: Words, reference: Words) -> int:
    """The least number of words to insert, delete or replace that make one sequence of the other (Levenshtein 1966)."""
    numbers = {word: i for i, word in enumerate(dict.fromkeys([*found, *reference]))}
    target = np.array([numbers[word] for word in reference], int)
    places = np.arange(len(target) + 1)
    distances = places  # from no word of `found` to the first j words of `reference`
    for i, word in enumerate(found, 1):
        replaced = distances[:-1] + (target != numbers[word])
        best = np.concatenate([[i], np.minimum(replaced, distances[1:] + 1)])
        distances = np.minimum.accumulate(best - places) + places  # or inserted after a shorter one
    return int(distances[-1])


def word_error_rate(found: Sequence[Words], references: Sequence[Words]) -> float:
    """The edit distances of all pairs of sequences, divided by the number of words of all references, as a fraction.

    It may be above 1. With class numbers it is the label error rate, and with characters that of characters. Words for
    an empty reference are errors, but add no reference words; so an empty reference alone has no rate. Raises
    InputError where the numbers of sequences differ, a sequence of words is a text, which would count characters, and
    where the references have no words.
    """
    if len(found) != len(references):
        raise InputError(
            f"word_error_rate: {len(found)} sequences for {len(references)} references, expected as many; give one for "
            "each"
        )
    for words in (found, references, *found, *references):
        if isinstance(words, str):
            raise InputError(
                f"word_error_rate: a sequence of words is the text {words!r:.60}, expected separate words; give "
                "text.split(), or list(text) to count characters"
            )
    total = sum(map(len, references))
    if not total:
        raise InputError("word_error_rate: the references have no words, expected one or more; leave empty sets out")
    return sum(edit_distance(*pair) for pair in zip(found, references, strict=True)) / total
