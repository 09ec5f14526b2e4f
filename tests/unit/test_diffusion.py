"""The forward process against the chain of its steps, and the reverse step against Gauss' formula by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import diffusion
from dl_jax.core.errors import InputError

RNG = np.random.default_rng(0)
SCHEDULE = diffusion.cosine(6)
BETA = np.asarray(SCHEDULE.beta, np.float64)
TIMES = np.arange(1, 7)


def test_the_schedule_is_the_squared_cosine():
    angle = lambda t, steps: (t / steps + 0.008) / 1.008 * np.pi / 2
    schedule = diffusion.cosine(100)
    t = np.arange(101)
    expected = np.cos(angle(t, 100)) ** 2 / np.cos(angle(0, 100)) ** 2
    np.testing.assert_allclose(schedule.left[:-1], expected[:-1], rtol=1e-4)
    np.testing.assert_allclose(schedule.left[-1], 0.001 * expected[-2], rtol=1e-4)  # β is 0.999 at most
    # 1 - 0.999 in float32 is right to 6e-5.
    np.testing.assert_allclose(schedule.left, np.cumprod(1 - np.asarray(schedule.beta, np.float64)), rtol=1e-4)
    assert schedule.steps == 100
    assert schedule.beta[0] == 0
    assert (np.diff(schedule.beta[:-1]) > 0).all()
    with pytest.raises(InputError, match="steps is 0, expected more than 0"):
        diffusion.cosine(0)


def test_a_noised_image_has_the_distribution_of_the_chain():
    """Mean and variance of x_t given x_0, by composing q(x_t | x_t-1) one step at a time."""
    image, mean, variance = 0.7, 0.7, 0.0
    at = lambda t, noise: float(diffusion.noised(SCHEDULE, *map(jnp.array, ([image], [t], [noise])))[0])
    for t in TIMES:
        mean, variance = np.sqrt(1 - BETA[t]) * mean, (1 - BETA[t]) * variance + BETA[t]
        np.testing.assert_allclose(at(t, 0.0), mean, atol=1e-6)
        np.testing.assert_allclose((at(t, 1.0) - at(t, 0.0)) ** 2, variance, rtol=1e-5)
    assert at(0, 5.0) == pytest.approx(image)


def test_denoised_is_the_inverse_of_noised():
    image, noise = RNG.uniform(-1, 1, (6, 2, 3)), RNG.normal(size=(6, 2, 3))
    image, noise = jnp.float32(image), jnp.float32(noise)
    x = diffusion.noised(SCHEDULE, image, TIMES, noise)
    v = diffusion.velocity(SCHEDULE, image, TIMES, noise)
    np.testing.assert_allclose(diffusion.denoised(SCHEDULE, x, TIMES, v), image, atol=1e-6)


def test_the_velocity_is_the_slope_of_a_turn_from_the_image_to_the_noise():
    """With sqrt(ᾱ_t) = cos φ, x_t = cos(φ) x_0 + sin(φ) ε, and v is its derivative by φ (appendix D)."""
    image, noise = RNG.uniform(-1, 1, (6, 2)), RNG.normal(size=(6, 2))
    phi = np.arccos(np.sqrt(np.cumprod(1 - BETA)[1:]))[:, None]
    turn = lambda phi: np.cos(phi) * image + np.sin(phi) * noise
    slope = (turn(phi + 1e-5) - turn(phi - 1e-5)) / 2e-5
    found = diffusion.velocity(SCHEDULE, jnp.float32(image), TIMES, jnp.float32(noise))
    np.testing.assert_allclose(found, slope, atol=1e-4)


def test_the_posterior_by_brute_force():
    """q(x_t-1 | x_t, x_0) is proportional to q(x_t | x_t-1) q(x_t-1 | x_0): its moments on a fine grid, for t > 1."""
    grid = np.linspace(-8, 8, 200_001)
    normal = lambda x, mean, variance: np.exp(-((x - mean) ** 2) / (2 * variance))
    image, x = RNG.uniform(-1, 1, 6), RNG.normal(size=6)
    mean, variance = diffusion.posterior(SCHEDULE, jnp.float32(image), jnp.float32(x), TIMES)
    for i, t in enumerate(TIMES):
        if t == 1:  # x_0 is known
            np.testing.assert_allclose((mean[i], variance[i]), (image[i], 0), atol=1e-6)
            continue
        left = np.prod(1 - BETA[:t])
        density = normal(x[i], np.sqrt(1 - BETA[t]) * grid, BETA[t]) * normal(grid, np.sqrt(left) * image[i], 1 - left)
        density /= density.sum()
        expected = (density * grid).sum()
        np.testing.assert_allclose(mean[i], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance[i], (density * (grid - expected) ** 2).sum(), rtol=1e-4)


def test_the_loss_is_the_error_of_the_velocity():
    """A network that knows the image finds v; one that answers 0 errs by the variance of v, ᾱ_t + (1 - ᾱ_t) / 3."""
    image = jnp.float32(RNG.uniform(-1, 1, (4000, 3)))
    left = lambda t: SCHEDULE.left[t][:, None]
    knows = lambda x, t: (jnp.sqrt(left(t)) * x - image) / jnp.sqrt(1 - left(t))
    found = jax.jit(lambda key: diffusion.loss(SCHEDULE, knows, image, key))(jax.random.key(0))
    np.testing.assert_allclose(found, 0, atol=1e-6)
    nothing = diffusion.loss(SCHEDULE, lambda x, t: jnp.zeros_like(x), image, jax.random.key(0))
    assert nothing.shape == (4000,)
    kept = np.cumprod(1 - BETA)[1:].mean()
    np.testing.assert_allclose(nothing.mean(), kept + (1 - kept) / 3, atol=0.03)
    times = []
    diffusion.loss(SCHEDULE, lambda x, t: times.extend(np.asarray(t)) or x, image, jax.random.key(1))
    np.testing.assert_allclose(np.bincount(times, minlength=7) / 4000, [0, *[1 / 6] * 6], atol=0.02)


def test_the_reverse_process_of_a_normal_distribution():
    """x_0 ~ N(0.2, 0.1²), for which the best guess of x_0 given x_t is known: the moments of x_t-1 follow from x_t's.

    Each step draws from the product of q(x_t | x_t-1) and q(x_t-1 | x_0) at that guess, as Gauss' formula has it.
    """
    schedule, mean, spread = diffusion.cosine(20), 0.2, 0.1
    beta = np.asarray(schedule.beta, np.float64)
    left = np.cumprod(1 - beta)

    def predict(x, t):
        left = schedule.left[t][:, None]
        guess = mean + spread**2 * jnp.sqrt(left) * (x - jnp.sqrt(left) * mean) / (left * spread**2 + 1 - left)
        return (jnp.sqrt(left) * x - guess) / jnp.sqrt(1 - left)

    at, variance = 0.0, 1.0  # of x_T
    for t in range(20, 0, -1):
        slope = spread**2 * np.sqrt(left[t]) / (spread**2 * left[t] + 1 - left[t])  # of the guess, linear in x_t
        offset = mean * (1 - left[t]) / (spread**2 * left[t] + 1 - left[t])
        if t == 1:
            at, variance = slope * at + offset, slope**2 * variance
            break
        precision = (1 - beta[t]) / beta[t] + 1 / (1 - left[t - 1])
        of_x = np.sqrt(1 - beta[t]) / beta[t] / precision
        of_guess = np.sqrt(left[t - 1]) / (1 - left[t - 1]) / precision
        at = (of_x + of_guess * slope) * at + of_guess * offset
        variance = (of_x + of_guess * slope) ** 2 * variance + 1 / precision
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn, way = jax.jit(lambda keys: diffusion.sample(schedule, predict, keys, (1,)))(keys)
    np.testing.assert_allclose((drawn.mean(), drawn.std()), (at, np.sqrt(variance)), atol=0.002)
    assert way.shape == (21, 20_000, 1)
    np.testing.assert_array_equal(way[-1], drawn)
    np.testing.assert_allclose((way[0].mean(), way[0].std()), (0, 1), atol=0.02)


def test_a_sample_depends_on_its_own_key_alone():
    predict = lambda x, t: 0.3 * x + t[:, None] / 10
    keys = jax.random.split(jax.random.key(0), 3)
    together, _ = diffusion.sample(SCHEDULE, predict, keys, (2,))
    alone, _ = diffusion.sample(SCHEDULE, predict, keys[1:2], (2,))
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5)
    assert len(np.unique(together)) == 6


def test_the_image_that_is_seen_is_clipped():
    x, t = jnp.full((1, 2), 3.0), jnp.array([3])
    found = diffusion.reversed_step(SCHEDULE, lambda x, t: jnp.full_like(x, -9), x, t, jnp.zeros_like(x))
    expected, _ = diffusion.posterior(SCHEDULE, jnp.ones_like(x), x, t)
    np.testing.assert_allclose(found, expected)
