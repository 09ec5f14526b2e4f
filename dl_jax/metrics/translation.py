"""BLEU of translations, by sacreBLEU. `pip install -e '.[text]'`."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from dl_jax.core.errors import InputError, not_installed


class Bleu(NamedTuple):
    """A corpus's BLEU score in [0, 100], and the signature that says how it was computed; report both."""

    score: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> Bleu:
    """The BLEU score (Papineni et al. 2002) of a corpus by sacreBLEU (Post 2018, arXiv:1804.08771) as it is set up.

    `references[i]` is the reference of `hypotheses[i]`, or several of them. Texts are as people write them: sacreBLEU
    tokenises them itself. Raises InputError where the numbers of texts differ or are 0, where something is no text, and
    where sacreBLEU is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise not_installed("BLEU", error, "text") from error
    if isinstance(hypotheses, str) or isinstance(references, str) or len(hypotheses) != len(references):
        counts = ["a text" if isinstance(x, str) else f"{len(x)} texts" for x in (hypotheses, references)]
        raise InputError(f"bleu: hypotheses are {counts[0]}, references {counts[1]}, expected two lists of one length")
    given = [[*each] if isinstance(each, Sequence) and not isinstance(each, str) else [each] for each in references]
    for texts in ([*hypotheses], *given):
        if not texts or not all(isinstance(text, str) for text in texts):
            wrong = next((text for text in texts if not isinstance(text, str)), "nothing")
            raise InputError(f"bleu: got {wrong!r:.60} for a text, expected one hypothesis or more with references")
    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), list(itertools.zip_longest(*given)))
    return Bleu(score.score, str(metric.get_signature()))
