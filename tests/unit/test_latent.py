"""Densities and bounds against float64, and the estimate of log p(x) on a model whose likelihood is known exactly."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.losses import latent
from dl_jax.losses.latent import LatentModel
from dl_jax.models.generative.vae import VAE

RNG = np.random.default_rng(0)
LATENTS, PIXELS, NOISE = 3, 5, 0.7


def test_bernoulli_against_float64():
    logits, x = RNG.normal(0, 4, (4, 3, 2, 5)), RNG.integers(0, 2, (3, 2, 5))
    p = 1 / (1 + np.exp(-logits))
    expected = np.log(np.where(x == 1, p, 1 - p)).sum((-1, -2))  # [4, 3]
    found = latent.bernoulli_log_prob(jnp.array(logits, jnp.float32), jnp.array(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bernoulli_sums_to_one():
    logits = jnp.array([0.3, -2.0, 5.0])
    every = jnp.array([[a, b, c] for a in (0.0, 1.0) for b in (0.0, 1.0) for c in (0.0, 1.0)])
    total = jnp.exp(latent.bernoulli_log_prob(jnp.tile(logits, (8, 1)), every)).sum()
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_bernoulli_of_a_grey_level_is_minus_the_cross_entropy():
    """The expectation over both binary values of a pixel, weighted by its grey level."""
    log_prob = lambda x: latent.bernoulli_log_prob(jnp.array([[0.8]]), jnp.array([[x]]))
    np.testing.assert_allclose(log_prob(0.3), 0.3 * log_prob(1.0) + 0.7 * log_prob(0.0), rtol=1e-6)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_bernoulli_of_large_logits_is_finite(logit):
    log_prob = lambda logits, x: latent.bernoulli_log_prob(logits, jnp.array([[x, x]])).sum()
    right = float(logit > 0)
    value, slope = jax.value_and_grad(log_prob)(jnp.full((1, 2), logit), right)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    assert log_prob(jnp.full((1, 2), logit), 1 - right) == -2e4


def test_bernoulli_slope_is_the_error():
    logits, x = jnp.array(RNG.normal(0, 3, (2, 3, 4)), jnp.float32), jnp.array(RNG.integers(0, 2, (3, 4)), jnp.float32)
    slope = jax.grad(lambda logits: latent.bernoulli_log_prob(logits, x).sum())(logits)
    np.testing.assert_allclose(slope, x - jax.nn.sigmoid(logits), atol=1e-6)


@pytest.mark.parametrize(("x", "range"), [(-0.01, "-0.01 to 0.5"), (255.0, "0.5 to 255"), (np.nan, "nan to nan")])
def test_pixels_outside_the_unit_interval(x, range):
    images = jnp.full((3, 4), 0.5).at[1, 2].set(x)
    with pytest.raises(InputError, match=f"values from {range}, expected numbers in \\[0, 1\\]; divide pixels by 255"):
        latent.bernoulli_log_prob(jnp.zeros((2, 3, 4)), images)
    compiled = jax.jit(latent.bernoulli_log_prob)(jnp.zeros((2, 3, 4)), images)
    np.testing.assert_array_equal(np.isnan(compiled), [[False, True, False]] * 2)


def test_gaussian_against_float64():
    x, mean, log_var = RNG.normal(size=(6, 4, 3)), RNG.normal(size=(4, 3)), RNG.normal(size=(4, 3))
    density = np.exp(-((x - mean) ** 2) / (2 * np.exp(log_var))) / np.sqrt(2 * np.pi * np.exp(log_var))
    found = latent.gaussian_log_prob(*(jnp.array(a, jnp.float32) for a in (x, mean, log_var)))
    np.testing.assert_allclose(found, np.log(density).sum(-1), rtol=1e-5)


def test_kl_against_quadrature():
    mean, log_var = np.array([0.4, -1.5]), np.array([0.9, -2.0])
    z = np.linspace(-15, 15, 100_001)[:, None]
    q = np.exp(-((z - mean) ** 2) / (2 * np.exp(log_var))) / np.sqrt(2 * np.pi * np.exp(log_var))
    log_p = -(z**2 + np.log(2 * np.pi)) / 2
    terms = np.where(q > 0, q * (np.log(np.maximum(q, 1e-300)) - log_p), 0)
    expected = (terms.sum(0) * (z[1] - z[0])).sum()
    found = latent.standard_normal_kl(jnp.array(mean, jnp.float32), jnp.array(log_var, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert latent.standard_normal_kl(jnp.zeros(3), jnp.zeros(3)) == 0


def test_log_mean_exp():
    x = np.array([[-1000.0, 90.0], [-1001.0, -90.0], [-1002.0, 88.0]])
    expected = [-1000 + np.log((1 + np.exp(-1) + np.exp(-2)) / 3), 90 + np.log((1 + np.exp(-180) + np.exp(-2)) / 3)]
    np.testing.assert_allclose(latent.log_mean_exp(jnp.array(x, jnp.float32)), expected, rtol=1e-6)
    assert latent.log_mean_exp(jnp.full((4, 1), -jnp.inf)) == -jnp.inf


class Linear:
    """x = W z + b + σ ε, so that x ~ N(b, W Wᵀ + σ² I), and z given x is Gaussian with covariance (I + WᵀW / σ²)⁻¹."""

    def __init__(self, weights: np.ndarray) -> None:
        self.weights, self.bias = weights, RNG.normal(size=PIXELS)
        self.precision = np.eye(LATENTS) + weights.T @ weights / NOISE**2
        self.x = RNG.normal(size=(4, LATENTS)) @ weights.T + self.bias + NOISE * RNG.normal(size=(4, PIXELS))

    def log_likelihood(self) -> np.ndarray:  # [4]
        covariance = self.weights @ self.weights.T + NOISE**2 * np.eye(PIXELS)
        d = self.x - self.bias
        quadratic = np.einsum("bi,ij,bj->b", d, np.linalg.inv(covariance), d)
        return -0.5 * (PIXELS * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] + quadratic)

    def posterior_mean(self) -> np.ndarray:  # [4, L]
        return np.linalg.solve(self.precision, self.weights.T @ (self.x - self.bias).T / NOISE**2).T

    def model(self, mean: np.ndarray, variance: np.ndarray) -> LatentModel:
        """With q(z | x) of this mean [4, L] and variance [L], which need not be right."""
        weights, bias, mean, log_var = (
            jnp.array(a, jnp.float32) for a in (self.weights, self.bias, mean, np.log(variance))
        )
        return LatentModel(
            encode=lambda x: (mean, jnp.broadcast_to(log_var, mean.shape)),
            log_conditional=lambda x, z: latent.gaussian_log_prob(
                x, z @ weights.T + bias, jnp.full(PIXELS, 2 * jnp.log(NOISE))
            ),
        )


ORTHOGONAL = np.linalg.qr(RNG.normal(size=(PIXELS, LATENTS)))[0] * [2.0, 1.0, 0.3]
EXACT, ROUGH = Linear(ORTHOGONAL), Linear(RNG.normal(size=(PIXELS, LATENTS)))
X = {linear: jnp.array(linear.x, jnp.float32) for linear in (EXACT, ROUGH)}


def rough() -> LatentModel:
    """An encoder q(z | x) with a wrong mean and variance, and without correlations."""
    return ROUGH.model(ROUGH.posterior_mean() + 0.1, 1.2 / np.diag(ROUGH.precision))


def test_with_the_true_posterior_one_sample_is_enough():
    """Orthogonal columns: the posterior's units are independent, q can be the posterior, and every weight is p(x)."""
    model = EXACT.model(EXACT.posterior_mean(), 1 / np.diag(EXACT.precision))
    for bound in (latent.elbo, latent.importance_bound):
        for k in (1, 7):
            tight = jax.jit(lambda key, bound=bound, k=k: bound(model, X[EXACT], key, k))(jax.random.key(0))
            spread = 5 if bound is latent.elbo else 1e-4  # log p(x | z) alone still depends on z
            np.testing.assert_allclose(tight, EXACT.log_likelihood(), atol=spread)
    weights = latent.log_weights(model, X[EXACT], jax.random.key(1), 50)
    np.testing.assert_allclose(weights, np.tile(EXACT.log_likelihood(), (50, 1)), atol=1e-4)


def test_the_estimate_converges_to_the_likelihood():
    estimate = jax.jit(lambda key: latent.log_likelihood(rough(), X[ROUGH], key, 100_000, 10_000))
    np.testing.assert_allclose(estimate(jax.random.key(0)), ROUGH.log_likelihood(), atol=0.02)
    few = jax.jit(lambda key: latent.log_likelihood(rough(), X[ROUGH], key, 10, 10))
    assert abs(few(jax.random.key(0)) - ROUGH.log_likelihood()).max() > 0.02


def means(bound, k: int, draws: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """The bound's expectation and its standard error [4], from independent draws."""
    values = jax.jit(jax.vmap(lambda key: bound(rough(), X[ROUGH], key, k)))(jax.random.split(jax.random.key(k), draws))
    return np.asarray(values.mean(0), np.float64), np.asarray(values.std(0) / draws**0.5, np.float64)


def test_the_elbo_misses_the_likelihood_by_the_divergence_to_the_posterior():
    variance = 1.2 / np.diag(ROUGH.precision)
    off = np.full(LATENTS, 0.1)
    divergence = 0.5 * (
        np.trace(ROUGH.precision @ np.diag(variance)) + off @ ROUGH.precision @ off - LATENTS
        - np.log(variance).sum() - np.linalg.slogdet(ROUGH.precision)[1]
    )  # fmt: skip
    expected = ROUGH.log_likelihood() - divergence
    assert divergence > 0.1
    for bound in (latent.elbo, latent.importance_bound):  # with one sample both have this expectation
        mean, error = means(bound, 1)
        np.testing.assert_array_less(abs(mean - expected), 5 * error)
    assert (means(latent.elbo, 1)[1] != means(latent.importance_bound, 1)[1]).all()


def test_the_bound_rises_with_k_and_stays_below():
    found = [means(latent.importance_bound, k) for k in (1, 5, 50)]
    for (low, low_error), (high, high_error) in itertools.pairwise(found):
        np.testing.assert_array_less(low + 3 * (low_error + high_error), high)
    mean, error = found[-1]
    np.testing.assert_array_less(mean, ROUGH.log_likelihood() + 3 * error)


IMPORTANCE_BOUND = jax.jit(lambda key: latent.importance_bound(rough(), X[ROUGH], key, 210))
LOG_WEIGHTS = jax.jit(lambda key: latent.log_weights(rough(), X[ROUGH], key, 210))


@pytest.mark.parametrize("chunk", [1, 30])
def test_chunks_change_nothing(chunk):
    key = jax.random.key(3)
    found = jax.jit(lambda key: latent.log_likelihood(rough(), X[ROUGH], key, 210, chunk))(key)
    np.testing.assert_allclose(found, IMPORTANCE_BOUND(key), rtol=1e-6)
    logs = np.asarray(LOG_WEIGHTS(key), np.float64)
    np.testing.assert_allclose(found, np.log(np.exp(logs).mean(0)), rtol=2e-6)


def test_chunks_bound_the_memory():
    def bytes_of(samples: int, chunk: int) -> int:
        estimate = partial(latent.log_likelihood, rough(), samples=samples, chunk=chunk)
        memory = jax.jit(estimate).lower(X[ROUGH], jax.random.key(0)).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    few, many, whole = bytes_of(200, 100), bytes_of(20_000, 100), bytes_of(20_000, 20_000)
    assert many < 1.1 * few
    assert whole > 50 * many


@pytest.mark.parametrize(("samples", "chunk"), [(10, 3), (0, 1), (10, 0), (5, 10)])
def test_chunks_that_do_not_fit(samples, chunk):
    with pytest.raises(InputError, match=f"{samples} samples in chunks of {chunk}, expected a multiple"):
        latent.log_likelihood(rough(), X[ROUGH], jax.random.key(0), samples, chunk)


def test_gradients_reach_the_recognition_model():
    @jax.jit
    def bound(shift):
        model = ROUGH.model(ROUGH.posterior_mean(), 1 / np.diag(ROUGH.precision))
        moved = LatentModel(lambda x: (model.encode(x)[0] + shift, model.encode(x)[1]), model.log_conditional)
        return latent.importance_bound(moved, X[ROUGH], jax.random.key(0), 5).sum()

    slope = jax.grad(bound)(0.3)
    np.testing.assert_allclose(slope, (bound(0.31) - bound(0.29)) / 0.02, rtol=0.02)


def test_active_units():
    """Unit 0 moves with the data, unit 1 is far from zero but stays, unit 2 moves too little."""
    means = np.stack([RNG.normal(0, 0.2, 1000), np.full(1000, 3.0), RNG.normal(0, 0.05, 1000)], -1)  # [N, L]
    assert latent.active_units(means.mean(0), (means**2).mean(0)) == 1
    seeds = np.stack([means, 3 * means])  # [S, N, L]
    np.testing.assert_array_equal(latent.active_units(seeds.mean(1), (seeds**2).mean(1)), [1, 2])


def posterior(dtype, n: int = 64) -> tuple[jax.Array, jax.Array]:  # [2, n] each
    return tuple(jnp.asarray(np.random.default_rng(i).normal(0, 0.1, (2, n)), dtype) for i in (0, 1))


DENSITIES = {
    "gaussian_log_prob": lambda mean, log_var: latent.gaussian_log_prob(log_var, mean, log_var),
    "standard_normal_kl": latent.standard_normal_kl,
    "log_mean_exp": lambda mean, log_var: latent.log_mean_exp(jnp.tile(mean, (300, 1))),
    "bernoulli_log_prob": lambda mean, log_var: latent.bernoulli_log_prob(mean, jnp.abs(log_var)),
}
BOUNDS = {
    "log_weights": lambda model, x: latent.log_weights(model, x, jax.random.key(0), 4),
    "elbo": lambda model, x: latent.elbo(model, x, jax.random.key(0), 4),
    "importance_bound": lambda model, x: latent.importance_bound(model, x, jax.random.key(0), 4),
    "log_likelihood": lambda model, x: latent.log_likelihood(model, x, jax.random.key(0), 4, 2),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", DENSITIES)
def test_densities_of_low_precision_outputs_are_reckoned_in_float32(name, dtype):
    given = posterior(dtype)
    found = jax.jit(DENSITIES[name])(*given)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, DENSITIES[name](*(part.astype(jnp.float32) for part in given)), rtol=1e-6)


def test_the_kl_of_a_bfloat16_network_against_float64():
    mean, log_var = (np.asarray(x, np.float64) for x in posterior(jnp.bfloat16))
    expected = 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum(-1)
    np.testing.assert_allclose(latent.standard_normal_kl(*posterior(jnp.bfloat16)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_a_low_precision_network_are_those_of_its_outputs_in_float32(name):
    """The recognition model's outputs and log p(x | z) are rounded, and nothing else: no noise, product or sum."""
    x = jnp.asarray(RNG.random((2, 64)), jnp.float32)

    def model(cast):
        encode = lambda x: tuple(cast(part) for part in posterior(jnp.bfloat16))
        rounded = lambda x, z: latent.gaussian_log_prob(x, z, jnp.zeros(64)).astype(jnp.bfloat16)
        return LatentModel(encode, lambda x, z: cast(rounded(x, z)))

    found = BOUNDS[name](model(lambda part: part), x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, BOUNDS[name](model(lambda part: part.astype(jnp.float32)), x), rtol=1e-6)


def test_float64_stays():
    with jax.enable_x64(True):
        given = posterior(jnp.float64)
        for density in DENSITIES.values():
            assert jax.eval_shape(density, *given).dtype == jnp.float64
        kl = 0.5 * sum(np.asarray(part).sum(-1) for part in (given[0] ** 2, np.exp(given[1]) - given[1] - 1))
        np.testing.assert_allclose(latent.standard_normal_kl(*given), kl, rtol=1e-13)
        wide = LatentModel(lambda x: given, lambda x, z: latent.gaussian_log_prob(x, z, jnp.zeros(64)))
        mixed = wide._replace(encode=lambda x: posterior(jnp.float32))  # a scan must not stumble over its types
        for bound, model in itertools.product(BOUNDS.values(), (wide, mixed)):
            assert jax.eval_shape(partial(bound, model), given[0]).dtype == jnp.float64


class TwoLayers:
    """A pixel x in {0, 1} from z, and z from y, both numbers; q is not the posterior. p(x) is known by quadrature."""

    grid = np.linspace(-9, 9, 721)

    def normal(self, x, mean, log_var):
        return np.exp(-((x - mean) ** 2) / (2 * np.exp(log_var))) / np.sqrt(2 * np.pi * np.exp(log_var))

    def likelihood(self) -> np.ndarray:  # [2], of x = 0 and 1
        z, y = self.grid[:, None], self.grid[None]
        joint = self.normal(y, 0, 0) * self.normal(z, np.sin(y), -0.6 + 0.2 * y)
        on = 1 / (1 + np.exp(-(3 * z - 1)))
        return np.array([(joint * p).sum() for p in (1 - on, on)]) * (self.grid[1] - self.grid[0]) ** 2

    def model(self) -> LatentModel:
        return LatentModel(
            encode=lambda x: (0.8 * x - 0.3, jnp.full_like(x, 0.4)),
            log_conditional=lambda x, z: latent.bernoulli_log_prob(3 * z - 1, x),
            above=(latent.Layer(lambda z: (0.5 * z, -0.2 + 0 * z), lambda y: (jnp.sin(y), -0.6 + 0.2 * y)),),
        )


def test_two_layers_weights_average_to_the_likelihood_by_quadrature():
    """E_q[w] = p(x), whatever q is; and the estimate of log p(x) is their mean."""
    two, x = TwoLayers(), jnp.array([[0.0], [1.0]])
    found = jax.jit(lambda key: jnp.exp(latent.log_weights(two.model(), x, key, 200_000)))(jax.random.key(0))
    mean, error = np.asarray(found).mean(0), np.asarray(found).std(0) / np.sqrt(len(found))
    assert error.max() < 0.004
    np.testing.assert_allclose(two.likelihood().sum(), 1, rtol=1e-6)
    assert (abs(mean - two.likelihood()) < 4 * error).all()
    estimate = jax.jit(lambda key: latent.log_likelihood(two.model(), x, key, 200_000, 50_000))(jax.random.key(0))
    np.testing.assert_allclose(estimate, np.log(mean), rtol=1e-4)


def test_two_layers_weight_of_a_sample_is_its_densities():
    """log p(x | z) p(z | y) p(y) − log q(z | x) q(y | z), at the samples that were drawn."""
    two, x, seen = TwoLayers(), jnp.array([[0.0], [1.0]]), {}
    model, (layer,) = two.model(), two.model().above
    see = lambda name, value, result: seen.update({name: np.asarray(value, np.float64)}) or result
    watched = model._replace(
        log_conditional=lambda x, z: see("z", z, model.log_conditional(x, z)),
        above=(layer._replace(decode=lambda y: see("y", y, layer.decode(y))),),
    )
    found = latent.log_weights(watched, x, jax.random.key(1), 5)  # [5, 2]
    z, y, pixel = seen["z"][..., 0], seen["y"][..., 0], np.array([0.0, 1.0])
    on = 1 / (1 + np.exp(-(3 * z - 1)))
    p = np.where(pixel == 1, on, 1 - on) * two.normal(z, np.sin(y), -0.6 + 0.2 * y) * two.normal(y, 0, 0)
    q = two.normal(z, 0.8 * pixel - 0.3, 0.4) * two.normal(y, 0.5 * z, -0.2)
    np.testing.assert_allclose(found, np.log(p / q), rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.stack([z, y]))) == 20


def test_elbo_of_two_layers():
    with pytest.raises(InputError, match="elbo: 2 stochastic layers, expected 1, whose KL term is analytic; use the"):
        latent.elbo(TwoLayers().model(), jnp.zeros((1, 1)), jax.random.key(0))


def test_the_latent_model_of_networks():
    """Its encoder and its density are those of the networks, by default of the pixels' logits."""
    model = VAE(latents=3, hidden=(4,), shape=(2, 5, 1))
    x = jnp.asarray(RNG.random((6, 2, 5, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * RNG.normal(size=leaf.shape).astype(np.float32), variables)
    z = jnp.asarray(RNG.normal(size=(2, 6, 3)), jnp.float32)
    logits, mean, log_var = model.apply(variables, x, train=False)
    found = latent.of_networks(model, variables)
    np.testing.assert_array_equal(found.encode(x), (mean, log_var))
    decoded = np.float64(model.apply(variables, z, method=model.decode))
    np.testing.assert_array_equal(model.apply(variables, mean, method=model.decode), logits)
    expected = (x * decoded - np.log1p(np.exp(decoded))).sum((2, 3, 4))
    np.testing.assert_allclose(found.log_conditional(x, z), expected, rtol=1e-5)
    other = latent.of_networks(model, variables, lambda decoded, x: (decoded - 2 * x).sum((2, 3, 4)))
    np.testing.assert_allclose(other.log_conditional(x, z), (decoded - 2 * x).sum((2, 3, 4)), rtol=1e-4, atol=1e-5)
    assert found.above == ()
