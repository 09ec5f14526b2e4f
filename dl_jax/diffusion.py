"""Denoising diffusion: the noise schedule, the forward process, the loss and the reverse process.

Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239). The chain x_0, ..., x_T begins
at an image with values in [-1, 1] and adds noise in each step: q(x_t | x_t-1) = N(sqrt(1 - β_t) x_t-1, β_t I). A time t
is 1 to T, as in the paper, and time 0 is the image.

Networks do not predict the noise ε of x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε, but v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0
(Salimans and Ho 2022, "Progressive Distillation", arXiv:2202.00512, section 4 and appendix D). A network of the noise
has to copy its input at late times, and an error of the noise says little there of the image.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import require_positive
from dl_jax.core.step import Array

Predict = Callable[[Array, Array], Array]  # x_t [B, ...] and t int [B] -> the predicted v [B, ...]


class Schedule(NamedTuple):
    """How much noise each step adds, and how much of the image is left; both are for the times 0 to T, float32 [T + 1].

    At time 0 they are 0 and 1.
    """

    beta: Array  # β_t, the variance of the noise that step t adds
    left: Array  # ᾱ_t = Π_s≤t (1 - β_s), the part of the variance of x_t that is the image's

    @property
    def steps(self) -> int:
        """T."""
        return len(self.beta) - 1


def cosine(steps: int) -> Schedule:
    """The schedule in which ᾱ_t is a squared cosine, up to β = 0.999 (Nichol and Dhariwal 2021, equation 17).

    The paper's own is linear in t, and made for 1,000 steps. Raises InputError for `steps` < 1.
    """
    require_positive({"steps": steps})
    curve = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.concatenate([[0], np.minimum(1 - curve[1:] / curve[:-1], 0.999)])
    return Schedule(*(jnp.asarray(values, jnp.float32) for values in (beta, np.cumprod(1 - beta))))


def noised(schedule: Schedule, image: Array, t: Array, noise: Array) -> Array:  # [B, ...], int [B], [B, ...]
    """A draw of q(x_t | x_0), of this standard normal noise (equation 4)."""
    left = _of(schedule.left, t, image)
    return jnp.sqrt(left) * image + jnp.sqrt(1 - left) * noise


def velocity(schedule: Schedule, image: Array, t: Array, noise: Array) -> Array:  # [B, ...], int [B], [B, ...]
    """v of an image, a time and this noise: what a network is to predict."""
    left = _of(schedule.left, t, image)
    return jnp.sqrt(left) * noise - jnp.sqrt(1 - left) * image


def denoised(schedule: Schedule, x: Array, t: Array, v: Array) -> Array:  # [B, ...], int [B], [B, ...]
    """x_0 of x_t and its v."""
    left = _of(schedule.left, t, x)
    return jnp.sqrt(left) * x - jnp.sqrt(1 - left) * v


def posterior(schedule: Schedule, image: Array, x: Array, t: Array) -> tuple[Array, Array]:
    """The mean [B, ...] and the variance [B, 1, ...] of q(x_t-1 | x_t, x_0), for t of 1 or more (equations 6 and 7)."""
    beta, left, before = (_of(v, i, x) for v, i in ((schedule.beta, t), (schedule.left, t), (schedule.left, t - 1)))
    mean = jnp.sqrt(before) * beta / (1 - left) * image + jnp.sqrt(1 - beta) * (1 - before) / (1 - left) * x
    return mean, (1 - before) / (1 - left) * beta


def loss(schedule: Schedule, predict: Predict, image: Array, key: Array) -> Array:  # [B, ...] -> [B]
    """The mean squared error of the predicted v at a random time of each image.

    It is the squared error of the image, with the weight 1 / (1 - ᾱ_t) (Salimans and Ho, section 4, "SNR + 1").
    """
    key_t, key_noise = jax.random.split(key)
    t = jax.random.randint(key_t, image.shape[:1], 1, schedule.steps + 1)
    noise = jax.random.normal(key_noise, image.shape)
    error = predict(noised(schedule, image, t, noise), t) - velocity(schedule, image, t, noise)
    return (error**2).reshape(len(image), -1).mean(-1)


def reversed_step(schedule: Schedule, predict: Predict, x: Array, t: Array, noise: Array) -> Array:
    """x_t-1 [B, ...] of x_t, t int [B] and standard normal noise.

    It is drawn from the posterior of the image that the network sees in x_t, clipped to [-1, 1] (algorithm 2).
    """
    image = jnp.clip(denoised(schedule, x, t, predict(x, t)), -1, 1)
    mean, variance = posterior(schedule, image, x, t)
    return mean + jnp.sqrt(variance) * noise


def sample(schedule: Schedule, predict: Predict, keys: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Images [B, *shape] from noise by the reverse process, and the way there, x_T to x_0: [T + 1, B, *shape].

    Each is a function of its own key of `keys` [B] alone. Under jit, a way that is not used is not kept.
    """

    def noise(t: Array) -> Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)

    def back(x: Array, t: Array) -> tuple[Array, Array]:
        x = reversed_step(schedule, predict, x, jnp.full(len(keys), t), noise(t))
        return x, x

    first = noise(jnp.int32(0))  # no step has this time
    last, way = jax.lax.scan(back, first, jnp.arange(schedule.steps, 0, -1))
    return last, jnp.concatenate([first[None], way])


def _of(values: Array, t: Array, like: Array) -> Array:  # [T + 1], int [B], [B, ...] -> [B, 1, ...]
    return values[t].reshape(-1, *[1] * (like.ndim - 1))
