"""Samples tokens from a model's logits, and token sequences from an autoregressive model.

`temperature`, `top_k` and `nucleus` map logits [..., V] to logits [..., V], with -inf for tokens that are excluded, so
that they compose: `draw(key, nucleus(temperature(logits, 0.8), 0.9))`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array, Tree

TINY = float(jnp.finfo(jnp.float32).tiny)  # compiled code rounds smaller numbers to 0
Choose = Callable[[Array, Array], Array]  # (key, logits [B, V]) -> tokens int32 [B]


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
    step: Callable[[Array, Tree], tuple[Array, Tree]],
    carry: Tree,
    prompt: Array,
    steps: int,
    key: Array,
    choose: Choose,
) -> tuple[Array, Tree]:
    """Generates `steps` tokens after `prompt`, each from the model's logits given all tokens before it.

    Returns the tokens int32 [B, steps], and the carry after all of them but the last. To continue, pass this carry,
    and the last token as the prompt. Raises InputError where the prompt is empty or not [B, P], or `steps` is below 1.

    Args:
      step: the model, (tokens int [B], carry) -> (logits [B, V] of the next tokens, carry).
      carry: the model's state before the prompt.
      prompt: int [B, P], one token or more.
      key: token i is chosen with fold_in(key, i).
      choose: (key, logits [B, V]) -> tokens int [B], for example `draw`, or `draw` of transformed logits.
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise InputError(f"generate: the prompt is {prompt.shape}, expected [B, P] with P of 1 or more; add a token")
    if steps < 1:
        raise InputError(f"generate: steps is {steps}, expected 1 or more tokens")
    prompt = prompt.astype(jnp.int32).T  # [P, B]
    carry, _ = jax.lax.scan(lambda carry, token: (step(token, carry)[1], None), carry, prompt[:-1])

    def advance(state: tuple[Array, Tree], i: Array) -> tuple[tuple[Array, Tree], Array]:
        token, carry = state
        logits, carry = step(token, carry)
        token = choose(jax.random.fold_in(key, i), logits).astype(jnp.int32)
        return (token, carry), token

    (_, carry), tokens = jax.lax.scan(advance, (prompt[-1], carry), jnp.arange(steps))
    return tokens.T, carry
