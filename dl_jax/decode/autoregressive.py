"""Samples tokens from a model's logits, and token sequences from an autoregressive model, or searches for the best.

`temperature`, `top_k` and `nucleus` map logits [..., V] to logits [..., V], with -inf for tokens that are excluded, so
that they compose: `draw(key, nucleus(temperature(logits, 0.8), 0.9))`.

`generate` and `beam_search` take a model as a function of the last token and a carry, which holds all that the model
keeps of the tokens before. What depends on earlier tokens, such as a penalty for repetitions, is a wrapper of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array, Tree

TINY = float(jnp.finfo(jnp.float32).tiny)  # compiled code rounds smaller numbers to 0
Choose = Callable[[Array, Array], Array]  # (key, logits [B, V]) -> tokens int32 [B]
Step = Callable[[Array, Tree], tuple[Array, Tree]]  # (tokens int [B], carry) -> (logits [B, V] of the next, carry)


def draw(key: Array, logits: Array) -> Array:  # [..., V] -> int32 [...]
    """A random token with the probabilities softmax(logits)."""
    return jax.random.categorical(key, at_least_float32(logits)).astype(jnp.int32)


def greedy(logits: Array) -> Array:  # [..., V] -> int32 [...]
    """The token with the largest logit, or the first of these if several are equal."""
    return logits.argmax(-1).astype(jnp.int32)


def temperature(logits: Array, t: float) -> Array:
    """Logits of the distribution softmax(logits / t), which is sharper for t < 1 and flatter for t > 1.

    Raises InputError unless t is finite and at least the smallest normal float32; use `greedy` for the limit at 0.
    """
    if not TINY <= t < float("inf"):
        raise InputError(f"temperature is {t}, expected {TINY:.2g} or more; use decode.greedy for the limit at 0")
    logits = at_least_float32(logits)
    return (logits - logits.max(-1, keepdims=True)) / t  # the largest stays 0, however small t is


def top_k(logits: Array, k: int) -> Array:
    """Keeps the k largest logits and sets the others to -inf (Fan et al. 2018, arXiv:1805.04833, section 5.4).

    Of equal logits the first are kept. Raises InputError where k is not in [1, V].
    """
    if not 1 <= k <= logits.shape[-1]:
        raise InputError(f"top_k: k is {k}, expected 1 to {logits.shape[-1]}, the size of the vocabulary")
    return jnp.where(_ranks(logits) < k, logits, -jnp.inf)


def nucleus(logits: Array, p: float) -> Array:
    """Keeps the smallest set of most probable tokens whose probabilities sum to p or more, and sets the others to -inf.

    This is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751, section 3.1, equation 2). Of equal logits the
    first are kept. Raises InputError where p is not in (0, 1], or below the smallest normal float32.
    """
    if not TINY <= p <= 1:
        raise InputError(f"nucleus: p is {p}, expected {TINY:.2g} to 1; use decode.greedy for the limit at 0")
    if p == 1:
        return logits  # unchanged: a cumulative sum in float32 may reach 1 before the last token
    ranks = _ranks(logits)
    probabilities = jax.nn.softmax(at_least_float32(logits))
    ranked = -jnp.sort(-probabilities)
    before = jnp.cumsum(ranked, -1) - ranked  # the sum over all larger probabilities
    return jnp.where(jnp.take_along_axis(before, ranks, -1) < p, logits, -jnp.inf)


def _ranks(logits: Array) -> Array:  # [..., V] -> int [..., V]
    """The rank of each logit, 0 for the largest; equal logits are ranked in their order."""
    return jnp.argsort(jnp.argsort(-logits, stable=True))


def generate(
    step: Step,
    carry: Tree,
    prompt: Array,
    steps: int,
    key: Array,
    choose: Choose,
) -> tuple[Array, Tree]:
    """Generates `steps` tokens after `prompt`, each from the model's logits given all tokens before it.

    Returns the tokens int32 [B, steps], and the carry after all of them but the last. To continue, pass this carry,
    and the last token as the prompt. A token is -1 where a logit is NaN, as beyond the end of a cache. Raises
    InputError where the prompt is empty or not [B, P], or `steps` is below 1.

    Args:
      step: the model, (tokens int [B], carry) -> (logits [B, V] of the next tokens, carry).
      carry: the model's state before the prompt.
      prompt: int [B, P], one token or more.
      key: token i is chosen with fold_in(key, i).
      choose: (key, logits [B, V]) -> tokens int [B], for example `draw`, or `draw` of transformed logits.
    """
    carry, last = _read("generate", step, carry, prompt, steps)

    def advance(state: tuple[Array, Tree], i: Array) -> tuple[tuple[Array, Tree], Array]:
        token, carry = state
        logits, carry = step(token, carry)
        token = choose(jax.random.fold_in(key, i), logits).astype(jnp.int32)
        token = jnp.where(jnp.isnan(logits).any(-1), -1, token)
        return (token, carry), token

    (_, carry), tokens = jax.lax.scan(advance, (last, carry), jnp.arange(steps))
    return tokens.T, carry


def _read(name: str, step: Step, carry: Tree, prompt: Array, steps: int) -> tuple[Tree, Array]:
    """The carry before the last token of a prompt, and this token int32 [B]; refuses bad prompts and steps."""
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise InputError(f"{name}: the prompt is {prompt.shape}, expected [B, P] with P of 1 or more; add a token")
    if steps < 1:
        raise InputError(f"{name}: steps is {steps}, expected 1 or more tokens")
    prompt = prompt.astype(jnp.int32).T  # [P, B]
    carry, _ = jax.lax.scan(lambda carry, token: (step(token, carry)[1], None), carry, prompt[:-1])
    return carry, prompt[-1]


class Beams(NamedTuple):
    """The K best sequences that `beam_search` found for each prompt, the best first."""

    tokens: Array  # int32 [B, K, steps], without the prompt; after a sequence's end there are end tokens
    scores: Array  # float32 [B, K], log-probabilities in nats, divided by the length penalty
    lengths: Array  # int32 [B, K], numbers of tokens, with the end token if the sequence has ended


def beam_search(step: Step, carry: Tree, prompt: Array, steps: int, beams: int, end: int, alpha: float = 0.0) -> Beams:
    """Searches for the most probable sequences after `prompt`, of up to `steps` tokens or up to an end token.

    At each step the best `beams` of all continuations are kept, by log P(Y) / ((5 + |Y|) / 6)^alpha, where |Y| is the
    number of tokens with the end token (Wu et al. 2016, arXiv:1609.08144, equation 14, without the coverage penalty). A
    sequence that has ended stays among them as long as no others are better. With one beam this is greedy decoding.
    Where there are fewer sequences than beams, the rest have the score -inf and length 0. A logit of -inf excludes a
    token, and a sequence after which all are excluded is none. A sequence with a logit that is NaN has the score NaN
    and stands first.

    Raises InputError where the prompt is empty or not [B, P], `steps` or `beams` is below 1, `alpha` is negative, `end`
    is not in [0, V), or a leaf of the carry has not B rows.

    Args:
      step: the model, (tokens int [N], carry) -> (logits [N, V] of the next tokens, carry), called with N = B and
        N = B · beams.
      carry: the model's state before the prompt; every leaf has a row for each sequence, [B, ...].
      prompt: int [B, P], one token or more.
      steps: the largest number of tokens of a sequence.
      beams: K, the number of sequences that are kept.
      end: the token that ends a sequence.
      alpha: the larger, the longer the sequences; 0.6 to 0.7 is usual for translation.
    """
    if beams < 1:
        raise InputError(f"beam_search: beams is {beams}, expected 1 or more")
    if not 0 <= alpha < float("inf"):
        raise InputError(f"beam_search: alpha is {alpha}, expected 0 or more; 0 is no length penalty")
    carry, last = _read("beam_search", step, carry, prompt, steps)
    batch = len(last)
    for leaf in jax.tree.leaves(carry):
        if jnp.shape(leaf)[:1] != (batch,):
            raise InputError(
                f"beam_search: a leaf of the carry is {jnp.shape(leaf)}, expected [{batch}, ...], a row for each prompt"
            )
    carry = reorder(carry, jnp.repeat(jnp.arange(batch), beams))
    first = jnp.zeros((batch, beams)).at[:, 1:].set(-jnp.inf)  # at the start all beams are one
    found = Beams(jnp.full((batch, beams, steps), end, jnp.int32), first, jnp.zeros((batch, beams), jnp.int32))

    def advance(state: tuple[Beams, Array, Array, Tree], i: Array) -> tuple[tuple[Beams, Array, Array, Tree], None]:
        found, log_p, token, carry = state
        logits, carry = step(token.reshape(-1), carry)
        size = logits.shape[-1]
        if not 0 <= end < size:
            raise InputError(f"beam_search: end is {end}, expected a token in [0, {size}), the vocabulary")
        logits = at_least_float32(logits).reshape(batch, beams, size)
        # Where all tokens are excluded there is no way on, and no softmax. Of a beam that is none there is no token.
        none = (logits == -jnp.inf) | (log_p == -jnp.inf)[..., None]
        new = jnp.where(none, -jnp.inf, jax.nn.log_softmax(logits))
        ended = (token == end) & (i > 0)  # [B, K]; an end token in the prompt does not count
        stay = jnp.where(jnp.arange(size) == end, 0.0, -jnp.inf)
        total = log_p[..., None] + jnp.where(ended[..., None], stay, new)  # [B, K, V]
        lengths = found.lengths + ~ended
        scores = (total / (((5 + lengths) / 6) ** alpha)[..., None]).reshape(batch, -1)
        _, best = jax.lax.top_k(jnp.where(jnp.isnan(scores), jnp.inf, scores), beams)  # [B, K]
        parents, token = best // size, (best % size).astype(jnp.int32)
        scores, log_p = (jnp.take_along_axis(x, best, 1) for x in (scores, total.reshape(batch, -1)))
        lengths = jnp.take_along_axis(lengths, parents, 1)
        tokens = jnp.take_along_axis(found.tokens, parents[..., None], 1).at[:, :, i].set(token)
        carry = reorder(carry, (parents + beams * jnp.arange(batch)[:, None]).reshape(-1))
        return (Beams(tokens, scores, lengths), log_p, token, carry), None

    token = jnp.repeat(last, beams).reshape(batch, beams)
    (found, *_), _ = jax.lax.scan(advance, (found, first, token, carry), jnp.arange(steps))
    missing = found.scores == -jnp.inf
    tokens, lengths = jnp.where(missing[..., None], end, found.tokens), jnp.where(missing, 0, found.lengths)
    return Beams(tokens, found.scores, lengths)


def reorder(carry: Tree, parents: Array) -> Tree:
    """The rows `parents`, int [N], of a carry whose leaves have a row for each sequence."""
    return jax.tree.map(lambda leaf: leaf[parents], carry)


def repetition_penalty(logits: Array, seen: Array, theta: float) -> Array:  # [..., V], bool [..., V] -> [..., V]
    """Logits that are lower for tokens which were seen: divided by theta, or multiplied by it where they are negative.

    For positive logits this is the penalised sampling of Keskar et al. 2019 (arXiv:1909.05858, section 4.1), which
    divides those of seen tokens by theta; they found 1.2 good. Division would make negative ones more probable. Logits
    are not shifted before: the penalty depends on where their zero is. Apply it before `temperature`.

    Raises InputError where theta is below 1 or not finite.
    """
    if not 1 <= theta < float("inf"):
        raise InputError(f"repetition_penalty: theta is {theta}, expected 1 or more; 1 is no penalty")
    logits = at_least_float32(logits)
    return jnp.where(seen, jnp.where(logits > 0, logits / theta, logits * theta), logits)


def with_repetition_penalty(step: Step, theta: float) -> Step:
    """The step of a model whose logits have the `repetition_penalty` for all tokens that it has read, with the prompt.

    The carry of the result is a pair of the model's carry and the tokens that were read, bool [B, V]. The step raises
    InputError where these are not of the logits' shape.

        penalised = decode.with_repetition_penalty(step, 1.2)
        decode.generate(penalised, (carry, jnp.zeros((batch, vocabulary), bool)), prompt, steps, key, choose)
    """

    def penalised(token: Array, carry: tuple[Tree, Array]) -> tuple[Array, tuple[Tree, Array]]:
        inner, seen = carry
        logits, inner = step(token, inner)
        if seen.shape != logits.shape:
            raise InputError(f"with_repetition_penalty: seen is {seen.shape}, expected {logits.shape}, as the logits")
        seen = seen | (jnp.arange(seen.shape[-1]) == token[:, None])
        return repetition_penalty(logits, seen, theta), (inner, seen)

    return penalised
