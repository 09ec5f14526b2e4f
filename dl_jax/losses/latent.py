"""Densities, bounds on log p(x), and an estimate of it, for latent-variable models.

A leading axis k indexes samples: z is [k, B, L] and log p(x | z) is [k, B]. Values are in nats, computed in float32 or
wider, whatever the dtype of the networks' outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array, Tree

LOG_2PI = float(np.log(2 * np.pi))
ACTIVE = 1e-2  # the variance over the data from which a latent unit's posterior mean counts as active


class Layer(NamedTuple):
    """A stochastic layer above another: p(z_i | z_i+1) and q(z_i+1 | z_i), Gaussians with independent units."""

    encode: Callable[[Array], tuple[Array, Array]]  # z_i [k, B, L] -> mean and log variance of q(z_i+1 | z_i)
    decode: Callable[[Array], tuple[Array, Array]]  # z_i+1 [k, B, M] -> mean and log variance of p(z_i | z_i+1)


class LatentModel(NamedTuple):
    """x from latent variables z, and a recognition model q(z | x), a Gaussian with independent units.

    p(z) is N(0, I). With layers above z, N(0, I) is the distribution of the highest one, and samples are of all layers.
    """

    encode: Callable[[Array], tuple[Array, Array]]  # x [B, ...] -> mean and log variance of q(z | x), [B, L] each
    log_conditional: Callable[[Array, Array], Array]  # x [B, ...], z [k, B, L] -> log p(x | z) [k, B]
    above: tuple[Layer, ...] = ()  # from the one next to z to the highest


def bernoulli_log_prob(logits: Array, x: Array) -> Array:  # [..., B, D...], [B, D...] -> [..., B]
    """Σ x log σ(l) + (1 − x) log(1 − σ(l)) over all axes of `x` but the first, in float32 or wider.

    For x in {0, 1} this is a log probability. Raises InputError for x outside [0, 1]; under jit such an example gives
    NaN.
    """
    outer = logits.shape[: logits.ndim - x.ndim + 1]
    logits = at_least_float32(logits).reshape(*outer, -1)
    x = x.reshape(len(x), -1)  # one axis of pixels: a CPU is slow on a last axis of 1
    inside = ((x >= 0) & (x <= 1)).all(-1)  # [B]
    if not isinstance(inside, Tracer) and not inside.all():
        raise InputError(
            f"bernoulli_log_prob: values from {jnp.min(x):g} to {jnp.max(x):g}, expected numbers in [0, 1]; "
            "divide pixels by 255, or use gaussian_log_prob"
        )
    return jnp.where(inside, jnp.sum(x * logits - jax.nn.softplus(logits), -1), jnp.nan)


def of_networks(
    model: Any, variables: Tree, log_prob: Callable[[Array, Array], Array] = bernoulli_log_prob
) -> LatentModel:
    """The latent model of an autoencoder: a Flax module with the methods `encode` and `decode`, such as `VAE`.

    `encode` gives the mean and the log variance of q(z | x), and log p(x | z) is `log_prob(decode(z), x)`.
    """
    call = lambda method: functools.partial(model.apply, variables, method=method)
    decode = call(model.decode)
    return LatentModel(call(model.encode), lambda x, z: log_prob(decode(z), x))


def gaussian_log_prob(x: Array, mean: Array, log_var: Array) -> Array:  # [..., D] each, broadcast -> [...]
    """log N(x; mean, diag exp(log_var)), summed over the last axis."""
    x, mean, log_var = map(at_least_float32, (x, mean, log_var))
    return -0.5 * jnp.sum(LOG_2PI + log_var + (x - mean) ** 2 * jnp.exp(-log_var), -1)


def standard_normal_kl(mean: Array, log_var: Array) -> Array:  # [..., L] each -> [...]
    """KL(N(mean, diag exp(log_var)) ‖ N(0, I)) (Kingma & Welling 2014, appendix B)."""
    mean, log_var = at_least_float32(mean), at_least_float32(log_var)
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_var) - log_var - 1, -1)


def log_mean_exp(x: Array) -> Array:  # [k, ...] -> [...]
    """log of the mean over the first axis of exp(x), without overflow."""
    return jax.nn.logsumexp(at_least_float32(x), 0) - jnp.log(len(x))


def log_weights(model: LatentModel, x: Array, key: Array, k: int) -> Array:  # x [B, ...] -> [k, B]
    """log p(x, z_i) − log q(z_i | x) for k samples z_i ~ q(z | x), differentiable through them.

    With layers above z, p and q are products over all layers: p(x | z) p(z | y) p(y) and q(z | x) q(y | z) for one more
    (Burda et al. 2016, equations 1 and 2).
    """
    return _log_weights(model, x, _posterior(model, x), key, jnp.arange(k))


def _posterior(model: LatentModel | Layer, x: Array) -> tuple[Array, Array]:
    mean, log_var = model.encode(x)
    return at_least_float32(mean), at_least_float32(log_var)


def _log_weights(model: LatentModel, x: Array, posterior: tuple[Array, Array], key: Array, samples: Array) -> Array:
    """Log weights [k, B] of the samples with indices `samples`, int [k]. A sample depends only on its index."""

    def draw(posterior: tuple[Array, Array], key: Array) -> tuple[Array, Array, Array]:  # of [B, L] or [k, B, L]
        """Samples z [k, B, L] of a Gaussian, their noise, and its log variance."""
        mean, log_var = posterior
        shape = mean.shape[-2:]
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, mean.dtype))(samples)
        return mean + jnp.exp(log_var / 2) * noise, noise, log_var

    z, noise, log_var = draw(posterior, key)
    found = at_least_float32(model.log_conditional(x, z))
    for height, layer in enumerate(model.above, 1):
        above = draw(_posterior(layer, z), jax.random.fold_in(key, 2**32 - height))  # no sample has such an index
        # log p(z | above) − log q(z | below), where z standardised by q is the noise
        log_q = -0.5 * jnp.sum(LOG_2PI + noise**2 + log_var, -1)
        found += gaussian_log_prob(z, *layer.decode(above[0])) - log_q
        z, noise, log_var = above
    # log N(z; 0, I) − log q(z | below): the constants cancel.
    return found + 0.5 * jnp.sum(noise**2 + log_var - z**2, -1)


def elbo(model: LatentModel, x: Array, key: Array, k: int = 1) -> Array:  # x [B, ...] -> [B]
    """The evidence lower bound E_q[log p(x | z)] − KL(q(z | x) ‖ p(z)); the first term is estimated with k samples.

    Kingma & Welling 2014, equation 7. Its expected value equals that of log_weights(...).mean(0); its variance is lower
    because the KL term is analytic. Raises InputError for a model with layers above z, whose KL term is not.
    """
    if model.above:
        raise InputError(
            f"elbo: {len(model.above) + 1} stochastic layers, expected 1, whose KL term is analytic; use the mean of "
            "log_weights"
        )
    mean, log_var = _posterior(model, x)
    z = mean + jnp.exp(log_var / 2) * jax.random.normal(key, (k, *mean.shape), mean.dtype)
    return at_least_float32(model.log_conditional(x, z)).mean(0) - standard_normal_kl(mean, log_var)


def importance_bound(model: LatentModel, x: Array, key: Array, k: int) -> Array:  # x [B, ...] -> [B]
    """A lower bound on log p(x) in expectation, non-decreasing in k: log 1/k Σ w_i.

    Burda et al. 2016, equation 8; log w_i are the `log_weights`.
    """
    return log_mean_exp(log_weights(model, x, key, k))


def log_likelihood(model: LatentModel, x: Array, key: Array, samples: int, chunk: int) -> Array:  # x [B, ...] -> [B]
    """`importance_bound` with many samples, drawn `chunk` at a time: memory grows with `chunk` only.

    The samples are the same whatever the chunk. Raises InputError where `chunk` does not divide `samples`.
    """
    if samples < 1 or chunk < 1 or samples % chunk:
        raise InputError(
            f"log_likelihood: {samples} samples in chunks of {chunk}, expected a multiple of the chunk; change one"
        )
    posterior = _posterior(model, x)

    def log_sum(i: Array) -> Array:  # [B], of the chunk with this index
        return jax.nn.logsumexp(_log_weights(model, x, posterior, key, i * chunk + jnp.arange(chunk)), 0)

    chunks = jnp.arange(samples // chunk)
    nothing = jnp.full(len(x), -jnp.inf, jax.eval_shape(log_sum, chunks[0]).dtype)
    total, _ = jax.lax.scan(lambda total, i: (jnp.logaddexp(total, log_sum(i)), None), nothing, chunks)
    return total - jnp.log(samples)


def active_units(mean: np.ndarray, square: np.ndarray) -> np.ndarray:  # [..., L] each -> int [...]
    """How many latent units carry information: Var_x(E_q[z | x]) > 0.01 (Burda et al. 2016, section 5.2).

    `mean` and `square` are the averages over the data of the posterior mean and of its square.
    """
    return (np.asarray(square, np.float64) - np.asarray(mean, np.float64) ** 2 > ACTIVE).sum(-1)
