"""Pairs of words that occur near each other, from which vectors of words are learnt."""

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.stream import Columns
from dl_jax.data.batches import check_seed


def skip_grams(ids: np.ndarray, window: int, seed: int, keep: np.ndarray | None = None) -> Columns:
    """The pairs {"centre", "context": int32 [P]} of the words of a text of ids [N], those of a distance together.

    Each word in turn is the centre, and the words that are 1 to r away on both sides are its contexts, where r is drawn
    from 1 to `window` for each centre (Mikolov et al. 2013, arXiv:1301.3781, section 3.2). `keep` [V] has for each id
    the probability with which an occurrence of it stays in the text; the others are removed first, so that windows
    reach farther (`kept_share`).

    Raises InputError where the text has fewer than two words, or has lost them, for an id without a probability, for a
    window below 1, and for a negative seed.
    """
    if window < 1:
        raise InputError(f"a window of {window} words, expected 1 or more on each side")
    check_seed(seed)
    if keep is not None and len(ids) and not 0 <= ids.min() <= ids.max() < len(keep):
        raise InputError(
            f"keep has {len(keep)} probabilities for ids from {ids.min()} to {ids.max()}, expected one for each; count "
            "the words of this vocabulary"
        )
    rng = np.random.default_rng(seed)
    left = ids if keep is None else ids[rng.random(len(ids)) < keep[ids]]
    if len(left) < 2:
        raise InputError(
            f"{len(left)} words of {len(ids)} are left, expected 2 or more; give a longer text, or keep more"
        )
    reach = rng.integers(1, window + 1, len(left))
    centres, contexts = [], []
    for distance in range(1, min(window, len(left) - 1) + 1):
        for centre, context in ((slice(distance, None), slice(-distance)), (slice(-distance), slice(distance, None))):
            near = reach[centre] >= distance
            centres.append(left[centre][near])
            contexts.append(left[context][near])
    return {"centre": np.concatenate(centres).astype(np.int32), "context": np.concatenate(contexts).astype(np.int32)}


def kept_share(counts: np.ndarray, threshold: float = 1e-3) -> np.ndarray:  # [V] -> float64 [V]
    """The probability sqrt(t / f) with which an occurrence of a word of the share f of a text is kept, 1 at most.

    Mikolov et al. 2013, arXiv:1310.4546, equation 5, has this for `threshold` t = 1e-5 and texts of 1e9 words; shorter
    texts want a higher one. A word that does not occur is kept. Raises InputError for a threshold that is not above 0.
    """
    if not threshold > 0:
        raise InputError(f"the threshold is {threshold}, expected a share of the text above 0, such as 1e-3")
    share = np.asarray(counts, np.float64) / max(1, np.sum(counts))
    return np.minimum(1, np.sqrt(threshold / np.where(share > 0, share, threshold)))


def noise_share(counts: np.ndarray, power: float = 0.75) -> np.ndarray:  # [V] -> float64 [V]
    """The probability f^power / Σ f^power with which a word of the frequency f is drawn as noise.

    Mikolov et al. 2013, arXiv:1310.4546, section 2.2, found the power 3/4 best. A word that does not occur has
    probability 0. Raises InputError where no word occurs, a count is negative, and for a negative power.
    """
    counts = np.asarray(counts, np.float64)
    if not (counts.size and counts.min() >= 0 and counts.max() > 0):
        raise InputError(f"counts of {counts.size} words, expected 0 or more each and not all 0; count a longer text")
    if not 0 <= power < np.inf:
        raise InputError(f"the power of the frequency is {power}, expected 0 or more, such as 0.75")
    weights = np.where(counts > 0, (counts / counts.max()) ** power, 0)
    return weights / weights.sum()
