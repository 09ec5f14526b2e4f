"""Pieces of words by byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909), with the library `tokenizers`."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.ragged import Ragged, ragged
from dl_jax.data.text.words import UNKNOWN, require_many

_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]  # ids 0 to 3
BEGIN, END = 2, 3  # ids of the beginning and of the end of a text


def byte_pairs(texts: Iterable[str | bytes], size: int) -> Any:
    """A `tokenizers.Tokenizer` of `size` pieces at most, learnt from texts.

    It knows every byte, so nothing is unknown and `decode` gives back the text. The ids 0 to 3 are padding, unknown,
    the beginning and the end of a text; a text that spells "<s>" has other ids. `to_str()` is what `run.keep` takes,
    and `Tokenizer.from_str` reads.

    Raises InputError for no text or a single one, for a size that has no room for all bytes, and where `tokenizers` is
    missing.
    """
    require_many(texts)
    library = _library()
    least = len(_SPECIAL) + 256
    if size < least:
        raise InputError(f"{size} pieces, expected {least} or more, one for each byte and {len(_SPECIAL)} more")
    texts = _read(texts)
    if not any(texts):
        raise InputError(f"{len(texts)} texts without a character, expected some to learn from")
    tokenizer = library.Tokenizer(library.models.BPE(unk_token=_SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def pieces(tokenizer: Any, texts: Iterable[str | bytes], *, begin: bool = False, end: bool = False) -> Ragged:
    """The ids of texts, a ragged column int32 [N, L], with the ids `BEGIN` and `END` around each where asked for.

    Raises InputError for no texts or a single one, and for a text without pieces.
    """
    require_many(texts)
    tokenizer.encode_special_tokens = True  # as text; a file does not keep this setting
    rows = [each.ids for each in tokenizer.encode_batch(_read(texts))]
    if not rows or not all(rows):
        which = f"text {rows.index([])} is empty" if rows else "there are no texts"
        raise InputError(f"{which}, expected one character or more in each text; leave empty texts out")
    return ragged([np.array([BEGIN] * begin + row + [END] * end, np.int32) for row in rows])


def _read(texts: Iterable[str | bytes]) -> list[str]:
    """The texts as str in which bytes that are no UTF-8 are U+FFFD. Raises InputError for what is no text."""
    encoded = [each.encode("utf-8", "surrogateescape") if isinstance(each, str) else each for each in texts]
    if wrong := [each for each in encoded if not isinstance(each, bytes)]:
        raise InputError(f"a text is {wrong[0]!r:.60}, expected str or bytes; convert it")
    return [each.decode("utf-8", "replace") for each in encoded]


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as e:
        raise InputError(
            "byte-pair encoding needs tokenizers, expected it to be installed: pip install -e '.[text]'"
        ) from e
    return tokenizers
