"""Linear-chain conditional random fields over sequences of tags (Lafferty et al. 2001, "Conditional Random Fields").

A path y of tags through a sequence of n steps has the score

    score(y) = start[y_1] + Σ_t scores[t, y_t] + Σ_t step[y_t-1, y_t] + end[y_n]

and the probability exp(score(y)) / Z, where Z is the sum of exp(score) over all K^n paths. `scores` [B, T, K] are those
of a network for each step and tag, and a `Chain` has the others. `lengths`, int [B], are the numbers of valid steps;
what stands in the padding after them has no effect, whatever it is. All is computed in float32 or wider.

A score of −inf forbids a tag or a transition. Gradients stay finite as long as a path is left. Second derivatives
overflow in float32 where the scores of two tags are some 44 nats or more apart.

All functions raise InputError where shapes or types do not fit. Those that go over all paths raise it too where every
path of a sequence is forbidden. This cannot be seen of what is traced: log Z and the best score are then −inf, the tags
−1, and the negative log-likelihood, the marginals and all gradients NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from dl_jax import masks
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array
from dl_jax.losses.classification import require_labels
from dl_jax.losses.inputs import class_numbers


class Chain(NamedTuple):
    """The scores of a chain of K tags. The same with bools says what is allowed (`forbidding`)."""

    start: Array  # [K], of the first tag
    step: Array  # [K, K], from a tag (row) to the next (column)
    end: Array  # [K], of the last tag


def log_partition(scores: Array, chain: Chain, lengths: Array) -> Array:  # [B, T, K], int [B] -> [B]
    """log Z, the log of the sum over all paths of exp(score)."""
    scores, chain, valid = _checked("log_partition", scores, chain, lengths)
    log_z = _log_terms(scores, chain, valid).sum(1)
    _require_paths("log_partition", log_z)
    return log_z


def path_score(scores: Array, tags: Array, chain: Chain, lengths: Array) -> Array:  # int [B, T], int [B] -> [B]
    """The score of the path `tags`. A tag outside [0, K) gives NaN, unless it is padding."""
    require_labels("path_score", scores, tags)
    scores, chain, valid = _checked("path_score", scores, chain, lengths)
    return _path_terms(scores, tags, chain, valid).sum(1)


def negative_log_likelihood(scores: Array, tags: Array, chain: Chain, lengths: Array) -> Array:  # -> [B]
    """log Z − score(tags), in nats for each sequence; infinite where the path `tags`, int [B, T], is forbidden.

    The difference is taken step by step, so that it keeps its digits where both terms are large. A tag outside [0, K)
    gives NaN, unless it is padding.
    """
    require_labels("negative_log_likelihood", scores, tags)
    scores, chain, valid = _checked("negative_log_likelihood", scores, chain, lengths)
    terms = _log_terms(scores, chain, valid)
    _require_paths("negative_log_likelihood", terms.sum(1))
    return (terms - _path_terms(scores, tags, chain, valid)).sum(1)


def marginals(scores: Array, chain: Chain, lengths: Array) -> Array:  # [B, T, K], int [B] -> [B, T, K]
    """The posterior probability of each tag at each step, which is the gradient of log Z; 0 in the padding."""
    scores, chain, valid = _checked("marginals", scores, chain, lengths)

    def total(scores: Array) -> tuple[Array, Array]:
        log_z = _log_terms(scores, chain, valid).sum(1)
        return log_z.sum(), log_z

    found, log_z = jax.grad(total, has_aux=True)(scores)
    _require_paths("marginals", log_z)
    return found


def viterbi(scores: Array, chain: Chain, lengths: Array) -> tuple[Array, Array]:  # -> int32 [B, T], [B]
    """The path of the highest score, and that score; of equal paths one is returned. The tags of padding are 0."""
    scores, chain, valid = _checked("viterbi", scores, chain, lengths)
    same = jnp.arange(scores.shape[-1])

    def advance(best: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:  # [B, K], of paths up to here
        score, there = inputs
        best = best - _finite(best.max(-1, keepdims=True))
        moves = best[:, :, None] + chain.step  # [B, K, K]
        there = there[:, None]
        return jnp.where(there, moves.max(1) + score, best), jnp.where(there, moves.argmax(1), same)

    def retrace(tag: Array, before: Array) -> tuple[Array, Array]:
        tag = jnp.take_along_axis(before, tag[:, None], 1)[:, 0]
        return tag, tag

    best, before = lax.scan(advance, chain.start + scores[:, 0], _later(scores, valid))
    best = best + chain.end
    last = best.argmax(-1)
    _, tags = lax.scan(retrace, last, before, reverse=True)
    tags = jnp.where(valid, jnp.concatenate([tags, last[None]]).T, 0).astype(jnp.int32)
    score = _path_terms(scores, tags, chain, valid).sum(1)
    _require_paths("viterbi", score)
    return jnp.where(jnp.isneginf(score)[:, None], -1, tags), score


def forbidding(chain: Chain, allowed: Chain) -> Chain:
    """`chain` with a score of −inf wherever `allowed`, a chain of bools, is False. No gradient reaches these scores.

    The scores may have leading axes, such as that of seeds. Raises InputError where shapes or types do not fit, and
    where nothing is left that leads from a start to an end; of bools that are traced this cannot be seen.
    """
    bools: Any = (yes if hasattr(yes, "dtype") else np.asarray(yes) for yes in allowed)
    allowed = Chain(*bools)
    k = allowed.start.shape[-1:]
    for name, shape, score, yes in zip(Chain._fields, (k, k * 2, k), chain, allowed, strict=True):
        scored = np.shape(score)
        if not k or yes.dtype != bool or not yes.shape == shape == scored[-len(shape) :]:
            raise InputError(
                f"forbidding: {name} is allowed by {yes.dtype} {yes.shape}, scored by {scored}, expected bools "
                f"{shape or '[K]'} and scores of this shape; give a Chain of bools for the same tags"
            )
    if not any(isinstance(yes, Tracer) for yes in allowed) and not _leads_to_an_end(*map(np.asarray, allowed)):
        raise InputError("forbidding: no tag that may be the last is reached from one that may be first; allow more")
    return Chain(*(jnp.where(yes, at_least_float32(s), -jnp.inf) for s, yes in zip(chain, allowed, strict=True)))


def bio_transitions(names: Sequence[str]) -> Chain:
    """What the BIO tags of these classes allow, as a chain of NumPy's bools: I-x follows B-x or I-x, and nothing else.

    The names are "O", outside, or for each type x of entity "B-x", its begin, and "I-x", inside (Ramshaw & Marcus 1995;
    the variant IOB2). Raises InputError for another name, one that is there twice, and an I-x without its B-x.
    """
    for name in names:
        if name != "O" and (name[:2] not in ("B-", "I-") or not name[2:]):
            raise InputError(f"bio_transitions: a class is named {name!r}, expected 'O', 'B-type' or 'I-type'")
        if name[:2] == "I-" and f"B-{name[2:]}" not in names:
            raise InputError(
                f"bio_transitions: there is {name!r} without {f'B-{name[2:]}'!r}, expected both; in tags of the "
                "variant IOB1, rename the first of each entity"
            )
    if not names or len(set(names)) < len(names):
        raise InputError(f"bio_transitions: the classes are {list(names)}, expected different names, one or more")
    inside = np.array([name.startswith("I-") for name in names])
    kinds = np.array([name[2:] for name in names])  # "" for O
    parts: tuple[Any, ...] = ~inside, ~inside | (kinds[:, None] == kinds), np.ones(len(names), bool)
    return Chain(*parts)


def _checked(name: str, scores: Array, chain: Chain, lengths: Array) -> tuple[Array, Chain, Array]:
    """Scores and chain in one type, zeros in the padding, and which steps are valid, bool [B, T]."""
    if scores.ndim != 3 or not all(scores.shape[1:]):
        raise InputError(
            f"{name}: scores are {scores.shape}, expected (B, T, K) for B sequences of T steps and K tags, with T and "
            "K at least 1; map other axes with jax.vmap"
        )
    batch, steps, tags = scores.shape
    shapes, expected = tuple(jnp.shape(part) for part in chain), ((tags,), (tags, tags), (tags,))
    if shapes != expected:
        raise InputError(
            f"{name}: the chain has {', '.join(map(str, shapes))}, expected {', '.join(map(str, expected))} as scores "
            f"{scores.shape} have {tags} tags"
        )
    dtype = jnp.promote_types(jnp.result_type(scores, *chain), jnp.float32)
    valid = masks.from_lengths(lengths, steps, batch)
    scores = jnp.where(valid[..., None], jnp.asarray(scores, dtype), 0)  # a NaN would make gradients NaN
    return scores, Chain(*(jnp.asarray(part, dtype) for part in chain)), valid


def _require_paths(name: str, log_z: Array) -> None:  # [B]
    if not isinstance(log_z, Tracer) and (forbidden := jnp.isneginf(log_z)).any():
        raise InputError(
            f"{name}: sequence {int(forbidden.argmax())} of the batch has no path, expected one or more whose scores "
            "are all above -inf; allow more tags or transitions"
        )


def _leads_to_an_end(start: np.ndarray, step: np.ndarray, end: np.ndarray) -> bool:
    reached = start
    for _ in start:
        reached = reached | step[reached].any(0)
    return bool((reached & end).any())


def _last(valid: Array) -> Array:  # bool [B, T], True at the last step of each sequence
    return valid & ~jnp.pad(valid[:, 1:], ((0, 0), (0, 1)))


def _later(scores: Array, valid: Array) -> tuple[Array, Array]:  # [T - 1, B, K], [T - 1, B], for scans over time
    return scores[:, 1:].swapaxes(0, 1), valid[:, 1:].T


def _path_terms(scores: Array, tags: Array, chain: Chain, valid: Array) -> Array:  # -> [B, T]
    """The parts of the path's score: a step's is that of its tag and of the transition to it."""
    tags = jnp.where(valid, class_numbers(tags, scores.shape[-1]), 0)
    at = lambda table, *index: table.at[index].get(mode="fill", fill_value=jnp.nan)
    emitted = jnp.take_along_axis(scores, tags[..., None], -1, mode="fill", fill_value=jnp.nan)[..., 0]
    moved = jnp.concatenate([at(chain.start, tags[:, :1]), at(chain.step, tags[:, :-1], tags[:, 1:])], 1)
    return jnp.where(valid, emitted + moved, 0) + jnp.where(_last(valid), at(chain.end, tags), 0)


# The forward recursion. With alpha_t [B, K], the log of the sum over all paths that end at step t with a given tag,
#
#     alpha_t[j] = scores[t, j] + log Σ_i exp(alpha_t-1[i] + step[i, j]).
#
# Alpha is kept relative to the largest of the step before, so that it has digits left for what its tags differ in.

Move = Callable[[Array], tuple[Array, Array]]  # alpha [B, K], at most 0 -> the log of the sum [B, K], and if exact, [B]


def _log_terms(scores: Array, chain: Chain, valid: Array) -> Array:  # -> [B, T]
    """Terms whose sum over time is log Z: what was taken from alpha after each step, and the rest at the last step.

    The sum over i is a matrix product of exp(alpha) and exp(step), which takes K² multiplications where log-sum-exp
    takes K² exponentials. It is exact unless all terms of a sum are so much smaller than their factors may be that they
    underflow. If this happens anywhere, the recursion is computed anew by log-sum-exp.
    """
    terms, exact = _forward(_by_products, scores, chain, valid)
    # Its arrays [T, B, K, K] are made where its gradient is computed, not for every call.
    careful = jax.checkpoint(lambda *given: _forward(_by_sums, *given)[0])
    terms = lax.cond(_for_all(~exact), careful, lambda *_: terms, scores, chain, valid)
    # Where there is no path, make the gradient NaN for all scores: it is that of log 0.
    every = jnp.where(valid[..., None], scores, 0).sum((1, 2)) + sum(part.sum() for part in chain)  # [B]
    impossible = jnp.isneginf(terms).any(1)
    spoilt = jnp.log(jnp.exp(jnp.where(impossible, every - jnp.inf, 0)))  # [B], -inf or 0
    return terms + jnp.where(_last(valid), spoilt[:, None], 0)


@custom_vmap
def _for_all(condition: Array) -> Array:
    """The condition, or under `jax.vmap` whether any has it: one for all, for which `lax.cond` takes one branch."""
    return condition


@_for_all.def_vmap
def _(size: int, batched: list[bool], condition: Array) -> tuple[Array, bool]:
    return condition.any(), False


def _forward(
    move_by: Callable[[Array], Move], scores: Array, chain: Chain, valid: Array
) -> tuple[Array, Array]:  # -> terms [B, T], and whether they are exact, bool []
    move = move_by(chain.step)

    def advance(alpha: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        score, there = inputs
        top = _finite(lax.stop_gradient(alpha.max(-1)))  # [B]
        new, exact = move(alpha - top[:, None])
        return jnp.where(there[:, None], new + score, alpha), (jnp.where(there, top, 0), exact | ~there)

    alpha, (tops, exact) = lax.scan(advance, chain.start + scores[:, 0], _later(scores, valid))
    rest = _log_sum_exp(alpha + chain.end, 1)  # [B]
    return jnp.where(_last(valid), rest[:, None], jnp.pad(tops.T, ((0, 0), (0, 1)))), exact.all()


def _by_products(step: Array) -> Move:
    top = _finite(lax.stop_gradient(step.max(0)))  # [K], for each tag the largest score of a transition to it
    kernel, allowed = jnp.exp(step - top), (step > -jnp.inf).astype(step.dtype)
    kind = jnp.finfo(step.dtype)
    least = len(step) * float(kind.tiny) / float(kind.eps)  # K terms that underflow are less than a rounding of it
    product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def move(alpha: Array) -> tuple[Array, Array]:
        total = product(jnp.exp(alpha), kernel)
        empty = product((alpha > -jnp.inf).astype(step.dtype), allowed) == 0  # a sum that is 0 by right
        return _log(total) + top, ((total >= least) | empty).all(-1)

    return move


def _by_sums(step: Array) -> Move:
    return lambda alpha: (_log_sum_exp(alpha[:, :, None] + step, 1), jnp.ones(len(alpha), bool))


def _log_sum_exp(terms: Array, axis: int) -> Array:
    """jax.nn.logsumexp, whose gradient is NaN where all terms are −inf; here it is 0."""
    top = _finite(lax.stop_gradient(terms.max(axis, keepdims=True)))
    return _log(jnp.exp(terms - top).sum(axis)) + top.squeeze(axis)


def _finite(top: Array) -> Array:
    """A maximum to subtract, with 0 in place of −inf."""
    return jnp.where(jnp.isneginf(top), 0, top)


def _log(x: Array) -> Array:
    """log x, whose gradient is 0 at 0."""
    return jnp.where(x == 0, -jnp.inf, jnp.log(jnp.where(x == 0, 1, x)))
