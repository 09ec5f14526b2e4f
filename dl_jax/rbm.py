"""Restricted Boltzmann machines of binary units: steps without gradients, the exact likelihood, and an estimate of it.

p(v, h) = exp(−E(v, h)) / Z with E(v, h) = −b·v − c·h − v·W·h, for visible units v in {0, 1}^D and hidden units h in
{0, 1}^H. Parameters are a dict {"weight": [D, H], "visible": b [D], "hidden": c [H]} of float32. Values are in nats.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dl_jax import classify
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Batch, Metrics, State, Step

Params = dict[str, Array]
MOST_HIDDEN = 25  # units whose 2^H states are enumerated
_LOW = 12  # units whose states are enumerated at a time


def logits(mean: np.ndarray) -> np.ndarray:  # [D] -> float32 [D]
    """The visible biases of a machine without weights whose units have this `mean`, clipped to [0.001, 0.999]."""
    clipped = np.clip(mean, 0.001, 0.999)
    return np.log(clipped / (1 - clipped)).astype(np.float32)


def binarised(key: Array, x: Array) -> Array:  # [..., D] -> float32 [..., D]
    """0 or 1 at random, with `x` in [0, 1] as the probability of 1.

    Raises InputError for x outside [0, 1]; under jit such a row gives NaN.
    """
    inside = ((x >= 0) & (x <= 1)).all(-1, keepdims=True)
    if not isinstance(inside, Tracer) and not inside.all():
        raise InputError(
            f"Bernoulli units have values from {jnp.min(x):g} to {jnp.max(x):g}, expected numbers in [0, 1]; divide "
            "pixels by 255"
        )
    return jnp.where(inside, jax.random.bernoulli(key, x).astype(jnp.float32), jnp.nan)


def hidden_mean(params: Params, v: Array) -> Array:  # [..., D] -> [..., H]
    """p(h = 1 | v)."""
    return jax.nn.sigmoid(params["hidden"] + v @ params["weight"])


def visible_mean(params: Params, h: Array) -> Array:  # [..., H] -> [..., D]
    """p(v = 1 | h)."""
    return jax.nn.sigmoid(params["visible"] + h @ params["weight"].T)


def free_energy(params: Params, v: Array) -> Array:  # [..., D] -> [...]
    """F(v) = −log Σ_h exp(−E(v, h)), so that log p(v) = −F(v) − log Z."""
    return -v @ params["visible"] - jax.nn.softplus(params["hidden"] + v @ params["weight"]).sum(-1)


def gibbs(params: Params, h: Array, key: Array, k: int) -> tuple[Array, Array]:  # [B, H] -> [B, D], [B, H]
    """The states v and h after k sweeps, each of which draws v given h and then h given v."""

    def sweep(h: Array, key: Array) -> tuple[Array, None]:
        return _sweep(params, h, key)[1], None

    keys = jax.random.split(key, k)
    h, _ = jax.lax.scan(sweep, h, keys[:-1])
    return _sweep(params, h, keys[-1])


def _sweep(params: Params, h: Array, key: Array) -> tuple[Array, Array]:
    key_v, key_h = jax.random.split(key)
    v = jax.random.bernoulli(key_v, visible_mean(params, h)).astype(jnp.float32)
    return v, jax.random.bernoulli(key_h, hidden_mean(params, v)).astype(jnp.float32)


def start(visible: Any, hidden: int, tx: optax.GradientTransformation, key: Array, chains: int = 0) -> State:
    """The state of one seed at step 0: weights N(0, 0.01²), these `visible` biases [D], and no hidden biases.

    With `chains` it is that of persistent CD. Their hidden units are 0 or 1 with equal probability.
    """
    key_weight, key_chain, key = jax.random.split(key, 3)
    visible = jnp.asarray(visible, jnp.float32)
    weight = 0.01 * jax.random.normal(key_weight, (len(visible), hidden))
    params = {"weight": weight, "visible": visible, "hidden": jnp.zeros(hidden)}
    states = jax.random.bernoulli(key_chain, 0.5, (chains, hidden)).astype(jnp.float32)
    return State(
        jnp.zeros([], jnp.int32), params, {"chain": {"hidden": states}} if chains else {}, tx.init(params), key
    )


def contrastive_divergence(tx: optax.GradientTransformation, k: int = 1) -> Step:
    """The step of CD-k, or of persistent CD where the state has chains (Hinton 2002; Tieleman 2008).

    The gradient of the mean −log p(v) is the difference of two means of −v h, −v and −h: of the batch, with the mean
    of h given v, and of the model, estimated by k Gibbs sweeps. These begin at the batch's hidden units, or, for
    persistent CD, where those of the step before ended. With several devices give `fit` carried=("chain",), as chains
    are rows.

    The visible units of a step are column `image` of the batch, [B, ...] in [0, 1] or integers up to 255, and are
    binarised anew. If the state has a collection "below", {"0": parameters, "1": ...}, the images first go `up` through
    these machines. Metrics are `reconstruction`, the squared difference of v from the batch, summed over units, and
    `gap`, how much higher the free energy of the batch is than that of v; both are means.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key_x, key_h, key_gibbs = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        params, chain, below = state.params, state.extra.get("chain"), state.extra.get("below", {})
        x = binarised(key_x, up([below[name] for name in sorted(below, key=int)], unit_rows(batch["image"])))
        mean = hidden_mean(params, x)  # [B, H]
        first = chain["hidden"] if chain else jax.random.bernoulli(key_h, mean).astype(jnp.float32)
        v, h = gibbs(params, first, key_gibbs, k)
        negative = hidden_mean(params, v)
        grads = {
            "weight": (v.T @ negative - x.T @ mean) / len(x),
            "visible": (v - x).mean(0),
            "hidden": (negative - mean).mean(0),
        }
        updates, opt_state = tx.update(grads, state.opt_state, params)
        metrics = {
            "reconstruction": ((v - x) ** 2).sum(-1).mean(),
            "gap": (free_energy(params, x) - free_energy(params, v)).mean(),
        }
        extra = {**state.extra, "chain": {"hidden": h}} if chain else state.extra
        return State(state.step + 1, optax.apply_updates(params, updates), extra, opt_state, state.key), metrics

    return step


def unit_rows(image: Any) -> Array:  # [B, ...] -> float32 [B, D]
    """Integers divided by 255, and floats as they are, with one axis of units."""
    return classify.to_unit(image).reshape(len(image), -1)


def up(machines: Sequence[Params], x: Array) -> Array:  # [B, D] -> [B, H]
    """The mean-field pass through these machines, from the lowest to the highest."""
    for params in machines:
        x = hidden_mean(params, x)
    return x


def log_partition(params: Params) -> Array:  # -> []
    """log Z = log Σ_h exp(c·h) Π_i (1 + exp(b_i + (W h)_i)), exact, over the 2^H states of the hidden units.

    Raises InputError for more than 25 hidden units.
    """
    hidden = len(params["hidden"])
    if hidden > MOST_HIDDEN:
        raise InputError(
            f"the partition function of {hidden} hidden units has 2^{hidden} terms, expected at most {MOST_HIDDEN} "
            "units; estimate it by annealed_importance"
        )
    low = min(hidden, _LOW)
    weight, rest = jnp.split(params["weight"], [low], 1)
    with jax.default_matmul_precision("highest"):  # on accelerators the default rounds to 10 bits
        h = _states(jnp.arange(2**low), low)
        inputs, energy = params["visible"] + h @ weight.T, h @ params["hidden"][:low]  # [2^low, D], [2^low]

        def part(i: Array) -> Array:  # with the i-th state of the other units
            other = _states(i, hidden - low)
            terms = energy + other @ params["hidden"][low:] + jax.nn.softplus(inputs + rest @ other).sum(-1)
            return jax.nn.logsumexp(terms)

        return jax.nn.logsumexp(jax.lax.map(part, jnp.arange(2 ** (hidden - low))))


def _states(i: Array, n: int) -> Array:  # int [...] -> float32 [..., n]
    return ((i[..., None] >> jnp.arange(n)) & 1).astype(jnp.float32)


class Annealed(NamedTuple):
    """What annealed importance sampling has found."""

    log_weights: Array  # [M]: log Z is estimated by the log of their mean exponential
    visible: Array  # [M, D]: p(v = 1 | h) at the end of the chains, which are samples of the machine if they mix


def annealed_importance(params: Params, base: Array, key: Array, betas: Array, chains: int) -> Annealed:
    """Annealed importance sampling of log Z (Neal 2001; Salakhutdinov & Murray 2008, section 4.1).

    Each of the M chains goes through machines from one without weights, whose visible biases are `base` [D], to that of
    `params`, one Gibbs sweep at each of `betas` [K], which rise from 0 to 1:
    p*_β(v) = exp(((1 − β) base + β b)·v) Π_j (1 + exp(β (c + v W)_j)), with the log partition function
    H log 2 + Σ log(1 + exp(base)) at β = 0.
    """
    key, key_v = jax.random.split(key)
    shape = chains, len(base)
    v = jax.random.bernoulli(key_v, jax.nn.sigmoid(base), shape).astype(jnp.float32)
    first = len(params["hidden"]) * jnp.log(2.0) + jax.nn.softplus(base).sum()

    def warm(between: tuple[Array, Array, Array], carry: tuple[Array, Array, Array]) -> tuple[Any, None]:
        before, beta, key = between
        v, h, log_weight = carry
        inputs, visible = params["hidden"] + v @ params["weight"], v @ (params["visible"] - base)  # [M, H], [M]
        higher = lambda beta: beta * visible + jax.nn.softplus(beta * inputs).sum(-1)
        log_weight = log_weight + higher(beta) - higher(before)
        key_h, key_v = jax.random.split(key)
        h = jax.random.bernoulli(key_h, jax.nn.sigmoid(beta * inputs)).astype(jnp.float32)
        mean = jax.nn.sigmoid((1 - beta) * base + beta * (params["visible"] + h @ params["weight"].T))
        return (jax.random.bernoulli(key_v, mean).astype(jnp.float32), h, log_weight), None

    steps = betas[:-1], betas[1:], jax.random.split(key, len(betas) - 1)
    begin = v, jnp.zeros((chains, len(params["hidden"]))), jnp.full(chains, first)
    with jax.default_matmul_precision("highest"):
        (_, h, log_weights), _ = jax.lax.scan(lambda carry, between: warm(between, carry), begin, steps)
        return Annealed(log_weights, visible_mean(params, h))


def temperatures(n: int) -> np.ndarray:  # float32 [n]
    """Inverse temperatures from 0 to 1 for `annealed_importance`, in the shares of Salakhutdinov & Murray 2008.

    Of their 14,500, 500 are even in [0, 0.5], 4,000 in [0.5, 0.9] and 10,000 in [0.9, 1]. Raises InputError for fewer
    than 2.
    """
    if n < 2:
        raise InputError(f"{n} temperatures, expected 2 or more, from 0 to 1; 14,500 are usual")
    return np.interp(np.linspace(0, 14_500, n), [0, 500, 4_500, 14_500], [0, 0.5, 0.9, 1]).astype(np.float32)


def log_partition_estimate(log_weights: np.ndarray) -> tuple[float, float]:  # [M] -> ([], [])
    """The estimate of log Z, and its standard error by the delta method."""
    log_weights = np.asarray(log_weights, np.float64)
    relative = np.exp(log_weights - log_weights.max())
    error = relative.std(ddof=1) / relative.mean() / np.sqrt(len(relative))
    return float(log_weights.max() + np.log(relative.mean())), float(error)
