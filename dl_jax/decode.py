"""Drawing tokens from a model's logits, and text from an autoregressive model.

`temperature`, `top_k` and `nucleus` take logits [..., V] and return logits [..., V], -inf where a token is out, so that
they nest: `draw(key, nucleus(temperature(logits, 0.8), 0.9))`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Tree
from dl_jax.losses.inputs import at_least_float32

TINY = float(jnp.finfo(jnp.float32).tiny)  # compiled code takes smaller numbers for 0
Choose = Callable[[Array, Array], Array]  # (key, logits [B, V]) -> tokens int32 [B]


def draw(key: Array, logits: Array) -> Array:  # [..., V] -> int32 [...]
    """A token from softmax(logits)."""
    return jax.random.categorical(key, at_least_float32(logits)).astype(jnp.int32)


def greedy(logits: Array) -> Array:  # [..., V] -> int32 [...]
    """The token with the largest logit; of equal ones the first."""
    return logits.argmax(-1).astype(jnp.int32)


def temperature(logits: Array, t: float) -> Array:
    """Logits of the distribution softmax(logits / t): below 1 sharper, above 1 flatter.

    Raises InputError unless t is a positive, finite number of normal float32 size; the limit at 0 is `greedy`.
    """
    if not TINY <= t < float("inf"):
        raise InputError(f"temperature is {t}, expected {TINY:.2g} or more; use sample.greedy for the limit at 0")
    logits = at_least_float32(logits)
    return (logits - logits.max(-1, keepdims=True)) / t  # the largest stays 0, however small t is


def top_k(logits: Array, k: int) -> Array:
    """The k largest logits, of equal ones the first; -inf elsewhere (Fan et al. 2018, arXiv:1805.04833, section 5.4).

    Raises InputError where k is not in [1, V].
    """
    if not 1 <= k <= logits.shape[-1]:
        raise InputError(f"top_k: k is {k}, expected 1 to {logits.shape[-1]}, the size of the vocabulary")
    return jnp.where(_ranks(logits) < k, logits, -jnp.inf)


def nucleus(logits: Array, p: float) -> Array:
    """The fewest largest logits that together have a probability of p or more, of equal ones the first; -inf elsewhere.

    Holtzman et al. 2020 (arXiv:1904.09751), section 3.1, equation 2. Raises InputError where p is not in (0, 1], or
    too small for a normal float32.
    """
    if not TINY <= p <= 1:
        raise InputError(f"nucleus: p is {p}, expected {TINY:.2g} to 1; use sample.greedy for the limit at 0")
    if p == 1:
        return logits  # all of them: a float32 sum may reach 1 before the last
    ranks = _ranks(logits)
    probabilities = jax.nn.softmax(at_least_float32(logits))
    ranked = -jnp.sort(-probabilities)
    before = jnp.cumsum(ranked, -1) - ranked  # of all larger ones
    return jnp.where(jnp.take_along_axis(before, ranks, -1) < p, logits, -jnp.inf)


def _ranks(logits: Array) -> Array:  # [..., V] -> int [..., V]
    """Place of each logit from the largest, 0, down; equal ones in their order."""
    return jnp.argsort(jnp.argsort(-logits, stable=True))


def generate(
    step: Callable[[Array, Tree], tuple[Array, Tree]],
    carry: Tree,
    prompt: Array,
    steps: int,
    key: Array,
    choose: Choose,
) -> tuple[Array, Tree]:
    """`steps` tokens after `prompt`, each chosen from what the model says of those before it.

    Args:
      step: (tokens int [B], carry) -> (logits [B, V] of the next ones, carry), any model's.
      carry: its state before the prompt.
      prompt: int [B, P], one token or more.
      key: token i is chosen with fold_in(key, i).
      choose: (key, logits [B, V]) -> tokens int [B]: `draw`, or a composition that ends in it.

    Returns:
      tokens int32 [B, steps], and the carry after all of them but the last: give both the last token, as the prompt,
      and this carry to continue.

    Raises:
      InputError: the prompt is empty or not [B, P], or `steps` is below 1.
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise InputError(f"generate: the prompt is {prompt.shape}, expected [B, P] with P of 1 or more; give a token")
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
