"""Words of texts, and vocabularies that number them."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.ragged import Ragged, joined

PAD, UNKNOWN = 0, 1  # ids that stand for no word
_FIRST = 2  # the id of the first word

_KIM = (
    (r"[^A-Za-z0-9(),!?'`]", " "),
    *((ending, f" {ending}") for ending in ("'s", "'ve", "n't", "'re", "'d", "'ll")),
    (r"([,!()?])", r" \1 "),
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words that a model knows. Their ids begin at 2: 0 is padding, 1 a word that is not known."""

    words: tuple[bytes, ...]  # in UTF-8, each once, none of them empty

    def __len__(self) -> int:
        """The number of ids, with those of padding and unknown words: what an embedding needs."""
        return _FIRST + len(self.words)

    def ids(self, words: np.ndarray | Sequence[str], *, known: bool = False) -> np.ndarray:
        """The ids, int32 like `words`, which are bytes or str; empty ones are padding.

        With `known`, every word has to be of the vocabulary. Raises InputError where one is not.
        """
        asked = _bytes(words)
        order = np.argsort(np.array(self.words, np.bytes_), kind="stable")
        ordered = np.array(self.words, np.bytes_)[order] if self.words else np.array([b""])
        place = np.minimum(np.searchsorted(ordered, asked), len(ordered) - 1)
        found = ordered[place] == asked
        if known and (missing := ~found & (asked != b"")).any():
            raise InputError(
                f"the word {_shown(asked[missing][0])!r} is not among the {len(self.words)} that are known, expected "
                "one of them; make the vocabulary of these texts too"
            )
        ids = _FIRST + order[place] if self.words else np.full(asked.shape, UNKNOWN)
        return np.where(asked == b"", PAD, np.where(found, ids, UNKNOWN)).astype(np.int32)

    def text(self, ids: np.ndarray | Sequence[int]) -> list[str]:
        """The words of ids [L], without padding; unknown ones are "<unk>". Raises InputError for other ids."""
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise InputError(f"ids are {ids.dtype}, expected whole numbers; give the ids of words")
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise InputError(
                f"ids from {ids.min()} to {ids.max()}, expected 0 to {len(self) - 1}; take the vocabulary of this run"
            )
        return ["<unk>" if i == UNKNOWN else _shown(self.words[i - _FIRST]) for i in ids.ravel() if i != PAD]

    def kept(self) -> list[str]:
        """What `run.keep("vocabulary.json", ...)` takes, and `read_vocabulary` reads."""
        return [word.decode("utf-8", "surrogateescape") for word in self.words]


def vocabulary(words: np.ndarray | Iterable[str], at_least: int = 1, most: int | None = None) -> Vocabulary:
    """The vocabulary of the words that occur `at_least` times, `most` of them at most, the most frequent first.

    Words of equal frequency are in the order of their bytes. Raises InputError where no word is left, for words that
    are neither bytes nor str or are a single one, and where `at_least` or `most` is below 1.
    """
    require_many(words)
    if at_least < 1 or (most is not None and most < 1):
        raise InputError(f"at_least is {at_least} and most is {most}, expected 1 or more of each")
    asked = _bytes(words if isinstance(words, np.ndarray) else list(words))
    found, times = np.unique(asked[asked != b""], return_counts=True)
    found = found[np.argsort(-times, kind="stable")][: (times >= at_least).sum()][:most]
    if not len(found):
        raise InputError(
            f"no word of {asked.size} occurs {at_least} times or more, expected one at least; lower at_least, or give "
            "longer texts"
        )
    return Vocabulary(tuple(found.tolist()))


def read_vocabulary(content: str | bytes) -> Vocabulary:
    """The vocabulary that a run has kept, from the content of its file. Raises InputError for another content."""
    try:
        words = json.loads(content)
        if not isinstance(words, list):
            raise TypeError
        encoded = [word.encode("utf-8", "surrogateescape") for word in words]
    except (ValueError, AttributeError, TypeError) as e:
        raise InputError(f"a vocabulary is a JSON list of words, not {content[:40]!r}...; give the run's file") from e
    if len(set(encoded)) != len(encoded) or b"" in encoded:
        raise InputError("the vocabulary has an empty word or one word twice, expected each once; give the run's file")
    return Vocabulary(tuple(encoded))


def split(texts: np.ndarray | Iterable[str], words: Callable[[str], list[str]] = str.split, empty: str = "") -> Ragged:
    """The words of texts [N], bytes or str: a ragged column of bytes [N, L], from the function text -> words.

    Bytes that are no UTF-8 are kept. A text without words, such as "...", is the one word `empty` where this is given.
    Raises InputError for no texts or a single one, for a text without words where `empty` is not given, where more than
    half of them have none, as of another script than `words` is for, and for a word that ends in NUL, which a column of
    texts would lose.
    """
    require_many(texts)
    if isinstance(texts, Ragged | np.ndarray) and len(texts.shape) != 1:
        raise InputError(f"texts of shape {texts.shape}, expected [N], one text each; these are split already")
    encoded = _bytes(texts if isinstance(texts, np.ndarray) else list(texts))
    rows = [words(_shown(each)) for each in encoded.tolist()]
    if not rows or not (all(rows) or empty):
        first = rows.index([]) if rows else 0
        which = f"text {first}, {_shown(encoded[first])!r}, has no word" if rows else "there are no texts"
        raise InputError(f"{which}, expected one word or more in each text; leave empty texts out")
    if 2 * (without := rows.count([])) > len(rows):
        raise InputError(
            f"{without} of {len(rows)} texts have no word, such as {_shown(encoded[rows.index([])])!r}, expected words "
            "in most; give texts in the script that these words are for, or another function to split them"
        )
    rows = [row or [empty] for row in rows]
    flat = [word.encode("utf-8", "surrogateescape") for row in rows for word in row]
    if bad := [word for word in flat if word.endswith(b"\0") or not word]:
        raise InputError(f"the word {bad[0]!r} is empty or ends in a NUL, expected text; remove what is no text")
    return joined(np.array(flat, np.bytes_), [len(row) for row in rows])


def require_many(texts: Any) -> None:
    """Raises InputError for a single text, whose characters would be taken for texts."""
    if isinstance(texts, str | bytes):
        raise InputError(f"texts are the one text {texts[:40]!r}, expected a list of texts; put it into a list")


def kim_words(text: str) -> list[str]:
    """The words of an English text as Kim 2014 ("Convolutional Neural Networks for Sentence Classification") has them.

    They are in lower case. Endings such as 's and n't are words, as are commas, brackets, ! and ?; other signs separate
    words. These are the rules of the author's code for all sets but the Stanford sentiment treebank and TREC, whose
    case it keeps.
    """
    for pattern, with_spaces in _KIM:
        text = re.sub(pattern, with_spaces, text)
    return text.lower().split()


def letters(words: np.ndarray, most: int) -> np.ndarray:  # bytes [...] -> uint8 [..., most]
    """The first `most` bytes of each word, 0 after its end. Raises InputError where `most` is below 1."""
    if most < 1:
        raise InputError(f"{most} letters of a word, expected 1 or more")
    cut = np.ascontiguousarray(_bytes(words).astype(f"S{most}"))
    return cut.view(np.uint8).reshape(*cut.shape, most)


def _bytes(words: np.ndarray | Sequence[str]) -> np.ndarray:
    """Words as bytes in UTF-8."""
    array: Any = np.asarray(words) if len(words) else np.array([], np.bytes_)
    if array.dtype.kind == "U":
        return np.char.encode(array, "utf-8", "surrogateescape")
    if array.dtype.kind != "S":
        raise InputError(f"words are {array.dtype}, expected bytes or str; convert them")
    return array


def _shown(word: bytes) -> str:
    return word.decode("utf-8", "surrogateescape")
