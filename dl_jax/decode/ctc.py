"""From logits of frames to labellings, for networks that `losses.ctc` trains, which defines the terms.

Logits are [B, T, K] and `lengths`, int [B], the numbers of valid frames; what stands in the padding has no effect. The
labels that are returned stand at the left, int32 [B, ..., T], with blanks after them, and come with their numbers. A
sequence with a valid frame whose largest logit is NaN, inf or −inf has no probabilities: its labels are −1 in all
places, as many as it has frames, its scores NaN, and so is its loss.

All functions raise InputError where shapes or types do not fit, T is 0, or `blank` is not in [0, K), and for lengths
outside [1, T]. Lengths that are traced cannot be checked; those above T count as T, and those below 1 as 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array
from dl_jax.decode.autoregressive import Beams
from dl_jax.losses.ctc import undefined, valid_frames


def best_path(logits: Array, lengths: Array, blank: int = 0) -> tuple[Array, Array]:  # -> int32 [B, T], int32 [B]
    """The labelling of the most probable path, and its number of labels.

    It need not be the most probable labelling, as many paths may share a less probable one (Graves et al. 2006, section
    3.2).
    """
    valid = valid_frames("best_path", logits, lengths, blank)
    path = jnp.where(valid, logits.argmax(-1), blank).astype(jnp.int32)  # [B, T]
    before = jnp.pad(path[:, :-1], ((0, 0), (1, 0)), constant_values=blank)
    kept = (path != blank) & (path != before)
    left = jnp.argsort(~kept, axis=1, stable=True)
    labels = jnp.take_along_axis(jnp.where(kept, path, blank), left, 1)
    nan = undefined(logits, valid)
    return jnp.where(nan[:, None], -1, labels), jnp.where(nan, valid.sum(1), kept.sum(1)).astype(jnp.int32)


class Lexicon(NamedTuple):
    """Which labellings are sequences of words, none or more: a deterministic automaton that reads labels.

    It starts in state 0. `lexicon` makes it.
    """

    following: Array | np.ndarray  # int32 [states, K], the next state; -1 where no word goes on with this label
    final: Array | np.ndarray  # bool [states], whether what was read so far is a sequence of whole words


def lexicon(words: Sequence[Sequence[int]] | np.ndarray, classes: int, blank: int = 0) -> Lexicon:
    """The lexicon of these words, each a sequence of labels in [0, classes), one label or more.

    A state is a set of places in words where a reader may be (the subset construction of Rabin & Scott 1959), because
    one word may begin with another. Raises InputError where there is no word, for an empty one, for a label outside
    [0, classes) or that is the blank, and for a blank outside [0, classes).
    """
    if not 0 <= blank < classes:
        raise InputError(f"lexicon: blank is {blank}, expected a class in [0, {classes}), as the logits have")
    if not len(words):
        raise InputError("lexicon: there are no words, expected one or more; give each as a sequence of labels")
    spelt = [tuple(int(label) for label in word) for word in words]
    for word in spelt:
        if not word or not all(0 <= label < classes and label != blank for label in word):
            raise InputError(
                f"lexicon: a word has the labels {word}, expected one or more in [0, {classes}) without the blank, "
                f"{blank}"
            )
    starts = {word: word for word in spelt}  # a place is what is left of a word; none is left at a word's end
    states: dict[frozenset[tuple[int, ...]], int] = {frozenset({()}): 0}
    rows, queue = [], [*states]
    for places in queue:  # grows as states are found
        rows.append([-1] * classes)
        left = places | starts.keys() if () in places else places
        for label in {rest[0] for rest in left if rest}:
            then = frozenset(rest[1:] for rest in left if rest and rest[0] == label)
            if then not in states:
                states[then] = len(states)
                queue.append(then)
            rows[-1][label] = states[then]
    return Lexicon(np.array(rows, np.int32), np.array([() in places for places in queue]))


class _Prefixes(NamedTuple):
    """W labellings of the frames so far, the best first."""

    labels: Array  # int32 [W, T], blanks after the last
    size: Array  # int32 [W], numbers of labels
    ends_blank: Array  # float32 [W], log-probability of all its paths that end with a blank
    ends_label: Array  # float32 [W], of those that end with its last label
    state: Array  # int32 [W], of the lexicon


def prefix_beam_search(
    logits: Array, lengths: Array, beams: int, blank: int = 0, words: Lexicon | None = None
) -> Beams:
    """Searches for the most probable labellings, of all labels or of sequences of words.

    After each frame the best `beams` of all labellings are kept, by the probability of all their paths (Graves 2012,
    "Supervised Sequence Labelling with Recurrent Neural Networks", section 7.5; Hannun et al. 2014, arXiv:1408.2873,
    algorithm 1, without a language model). The scores of the result, in nats, are log-probabilities of labellings, or
    lower where beams were left out whose paths would have joined; with as many beams as there are labellings they are
    exact. With `words`, only beginnings of sequences of words are kept, and whole ones are returned. All words are
    equally likely: nothing is divided by the probability of all sequences of words.

    Returns beams [B, W, T], the best first. Where there are fewer labellings than beams, the rest have the score −inf
    and no labels. Raises InputError where `beams` is below 1, or the lexicon was made for another number of classes, or
    has words with the label `blank`, as one made for another blank may have; a traced lexicon is not checked for that.
    """
    valid = valid_frames("prefix_beam_search", logits, lengths, blank)
    if beams < 1:
        raise InputError(f"prefix_beam_search: beams is {beams}, expected 1 or more")
    classes = logits.shape[-1]
    if words is None:
        words = Lexicon(jnp.zeros((1, classes), jnp.int32), jnp.ones(1, bool))
    else:
        _require_fit(words, classes, blank)
    log_p = jax.nn.log_softmax(jnp.where(valid[..., None], at_least_float32(logits), 0))
    search = lambda log_p, valid: _search(log_p, valid, beams, blank, words)
    found, scores = jax.vmap(search)(log_p, valid)
    missing = scores == -jnp.inf
    labels = jnp.where(missing[..., None], blank, found.labels)
    nan = undefined(logits, valid)[:, None]  # [B, 1]
    return Beams(
        jnp.where(nan[..., None], -1, labels),
        jnp.where(nan, jnp.nan, scores),
        jnp.where(nan, valid.sum(1, keepdims=True), jnp.where(missing, 0, found.size)).astype(jnp.int32),
    )


def _require_fit(words: Lexicon, classes: int, blank: int) -> None:
    if words.following.shape[1] != classes:
        raise InputError(
            f"prefix_beam_search: the lexicon is for {words.following.shape[1]} classes, expected {classes}, as the "
            "logits have; make it for these"
        )
    if not isinstance(words.following, Tracer) and (np.asarray(words.following)[:, blank] >= 0).any():
        raise InputError(
            f"prefix_beam_search: the lexicon has words with the label {blank}, expected none, as {blank} is the "
            "blank; make it for this blank"
        )


def _search(log_p: Array, valid: Array, beams: int, blank: int, words: Lexicon) -> tuple[_Prefixes, Array]:
    """The best labellings of one sequence, [T, K], and their log-probabilities [W]."""
    steps, classes = log_p.shape
    first = jnp.full(beams, -jnp.inf, log_p.dtype)
    zeros = jnp.zeros(beams, jnp.int32)
    start = _Prefixes(jnp.full((beams, steps), blank, jnp.int32), zeros, first.at[0].set(0), first, zeros)
    following, final = jnp.asarray(words.following), jnp.asarray(words.final)
    each = jnp.arange(beams)

    def advance(old: _Prefixes, frame: tuple[Array, Array]) -> tuple[_Prefixes, None]:
        p, there = frame  # [K], bool []
        total = jnp.logaddexp(old.ends_blank, old.ends_label)  # [W]
        at_end = jnp.maximum(old.size - 1, 0)
        last = old.labels[each, at_end]  # [W], the blank where there is none
        then = following[old.state]  # [W, K]
        # A label that repeats the last one is a new one only after a blank.
        before = jnp.where(jnp.arange(classes) == last[:, None], old.ends_blank[:, None], total[:, None])
        may = (then >= 0) & (jnp.arange(classes) != blank) & (total > -jnp.inf)[:, None]
        longer = jnp.where(may, before + p, -jnp.inf)  # [W, K]
        # One that is among the beams already joins its paths: parent[v, w] is whether w is v and one label more.
        parent = (old.labels[:, None] == old.labels.at[each, at_end].set(blank)).all(-1)
        parent &= (old.size[:, None] + 1 == old.size) & (total > -jnp.inf)[:, None] & (total > -jnp.inf)
        joining = jnp.where(parent, longer[:, last], -jnp.inf).max(0)  # [W]; there is one parent at most
        longer = jnp.where((parent[..., None] & (jnp.arange(classes) == last[:, None])).any(1), -jnp.inf, longer)

        stay_label = jnp.logaddexp(jnp.where(old.size > 0, old.ends_label + p[last], -jnp.inf), joining)
        stay_blank = total + p[blank]
        scores = jnp.concatenate([jnp.logaddexp(stay_blank, stay_label), longer.reshape(-1)])
        _, best = jax.lax.top_k(scores, beams)
        grown, place = best >= beams, jnp.maximum(best - beams, 0)
        source = jnp.where(grown, place // classes, best)  # [W]
        label = (place % classes).astype(jnp.int32)
        labels, size = old.labels[source], old.size[source]
        new = _Prefixes(
            jnp.where(grown[:, None] & (jnp.arange(steps) == size[:, None]), label[:, None], labels),
            size + grown,
            jnp.where(grown, -jnp.inf, stay_blank[source]),
            jnp.where(grown, longer.reshape(-1)[place], stay_label[source]),
            jnp.where(grown, then[source, label], old.state[source]),
        )
        return jax.tree.map(lambda n, o: jnp.where(there, n, o), new, old), None

    found, _ = jax.lax.scan(advance, start, (log_p, valid))
    scores = jnp.logaddexp(found.ends_blank, found.ends_label)
    scores = jnp.where(final[found.state], scores, -jnp.inf)
    order = jnp.argsort(-scores, stable=True)
    return jax.tree.map(lambda leaf: leaf[order], found), scores[order]
