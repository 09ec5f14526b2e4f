"""Differential privacy: steps with clipped and noisy gradients, what they cost, and an attack to compare that with.

`private_step` is DP-SGD (Abadi et al. 2016, "Deep learning with differential privacy", arXiv:1607.00133) for any loss:
each example's gradient is clipped to a norm, and noise is added to their sum. Its batches are those of `data.poisson`.
With `epsilon` or `noise_for`, which need the package dp-accounting (extra `private`), the parameters of all steps
together are (ε, δ)-differentially private for sets that differ by one record more or less; the number of records and
the sampling rate are public. Three things are not covered: the metrics of a run, what is chosen by looking at other
runs, and somebody who knows the seed, from which samples and noise can be drawn again.

Norms of gradients are exact, and computed without the gradients where a parameter is the kernel of one matrix product
or convolution: of a kernel whose input is x and whose output has the gradient δ it is ‖xᵀδ‖, which for one row is
‖x‖ ‖δ‖ (Goodfellow 2015, "Efficient per-example gradient computations", arXiv:1510.01799).
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax.core.equations import evaluate
from dl_jax.core.errors import InputError, not_installed, require_positive
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array, Batch, Loss, Metric, Metrics, State, Step, Tree
from dl_jax.inspect import LAYER_PRIMITIVES, computed, opened

MOST_NOISE = 1000.0  # the largest noise multiplier that `noise_for` tries
LEAST_NOISE = 2.0**-4  # and the smallest


def private_step(loss: Loss, tx: optax.GradientTransformation, *, clip: float, noise: float, batch_size: int) -> Step:
    """The step of DP-SGD (Algorithm 1): tx of (Σ_i min(1, C / ‖g_i‖) g_i + N(0, σ²C²)) / B.

    Its metrics are those of `loss`, "loss", and "clipped", the share of examples whose gradient is longer than C. An
    empty batch has none. tx is given the gradient alone, and not the value of the loss.

    Args:
      loss: the loss of a batch with one example, such as `classify.loss(model.apply)`. Every example gets a key of its
        own. It may change no collection, and a product with a gradient of its own making (`jax.custom_vjp`) is
        differentiated as the product.
      tx: what takes the noisy gradient for the gradient.
      clip: C, the largest norm of an example's gradient.
      noise: σ, the noise multiplier.
      batch_size: B, the examples of a batch on average.

    Raises InputError unless C and B are positive and σ is at least 0, and when called for a batch without a column
    `mask` and a loss that changes a collection, such as batch statistics.
    """
    require_positive({"clip": clip, "batch_size": batch_size})
    if not noise >= 0:
        raise InputError(f"noise is {noise}, expected a multiplier of at least 0; `noise_for` gives that of an epsilon")
    gradient = clipped_sum(loss, clip)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key, key_noise = jax.random.split(jax.random.fold_in(state.key, state.step))
        found = gradient(state.params, state.extra, batch, key)
        leaves, structure = jax.tree.flatten(found.total)
        keys = jax.random.split(key_noise, len(leaves))
        noisy = [
            (total + noise * clip * jax.random.normal(key, total.shape, total.dtype)) / batch_size
            for key, total in zip(keys, leaves, strict=True)
        ]
        updates, opt_state = tx.update(jax.tree.unflatten(structure, noisy), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        each = {**found.metrics, "loss": found.values, "clipped": (found.norms > clip).astype(jnp.float32)}
        metrics = {name: _masked(batch["mask"], metric) for name, metric in each.items()}
        return State(state.step + 1, params, state.extra, opt_state, state.key), metrics

    return step


def _masked(mask: Array, metric: Metric) -> tuple[Array, Array]:  # of each example, [B]
    value, weight = metric if isinstance(metric, tuple) else (metric, jnp.ones_like(mask))
    return (mask * value).sum(), (mask * weight).sum()


class Clipped(NamedTuple):
    """Gradients of a batch of B examples."""

    total: Tree  # Σ_i mask_i min(1, C / ‖g_i‖) g_i
    norms: Array  # ‖g_i‖ [B]
    values: Array  # of the loss [B]
    metrics: Mapping[str, Metric]  # [B] each


def clipped_sum(loss: Loss, clip: float) -> Callable[[Tree, Tree, Batch, Array], Clipped]:
    """The sum of clipped gradients, as a function of (params, extra, batch, key).

    One pass forward and two backward: the first gives norms, the second the sum. Parameters that are not the kernel of
    one product, such as biases, scales and tables of embeddings, are followed for each example, [B, ...]; so are the
    kernels of recurrent layers, of grouped convolutions and those that are used twice. It raises what `private_step`
    raises when called.
    """

    def of_batch(params: Tree, extra: Tree, batch: Batch, key: Array) -> Clipped:
        if "mask" not in batch:
            raise InputError("the batch has no column 'mask', expected that of `data.poisson`; take its batches")
        mask, rows = batch["mask"], {name: column for name, column in batch.items() if name != "mask"}
        keys = jax.random.split(key, len(mask))
        example = jax.tree.map(lambda column: column[0], rows)
        called = opened(lambda params, *rest: _alone(loss, params, *rest), params, extra, example, keys[0])
        jaxpr, leaves = called.jaxpr.jaxpr, jax.tree.leaves(params)
        products = _products(jaxpr, len(leaves))
        others = sorted(set(range(len(leaves))) - {each.leaf for each in products.values()})

        def shifted(leaves: Sequence[Array], shifts: Any, extra: Tree, row: Tree, key: Array) -> Any:
            """Value of one example, if shifts are added to outputs of products and to other leaves; their inputs."""
            of_outputs, of_leaves = shifts
            inputs: list[Array] = []

            def operation(equation: Any, values: list[Any]) -> Sequence[Any]:
                outputs = computed(equation, values)
                if (product := products.get(equation.outvars[0])) is None:
                    return outputs
                inputs.append(values[1 - product.operand])
                return [outputs[0] + of_outputs[len(inputs) - 1]]

            moved = dict(zip(others, of_leaves, strict=True))
            leaves = [leaf + moved[i] if i in moved else leaf for i, leaf in enumerate(leaves)]
            outputs = evaluate(called.jaxpr, [*leaves, *jax.tree.leaves((extra, row, key))], operation)
            value, metrics = called.result(outputs)
            return value, (inputs, metrics)

        zeros = lambda like: jnp.zeros((len(mask), *like.shape), like.dtype)
        shifts = [zeros(out.aval) for out in products], [zeros(leaves[i]) for i in others]
        each = jax.vmap(shifted, (None, 0, None, 0, 0))
        function = lambda leaves, shifts: each(leaves, shifts, extra, rows, keys)
        values, pull, (inputs, metrics) = jax.vjp(function, leaves, shifts, has_aux=True)
        of_outputs, of_leaves = pull(jnp.ones_like(values))[1]
        squares = sum(_squares(leaf) for leaf in of_leaves)
        for product, x, error in zip(products.values(), inputs, of_outputs, strict=True):
            squares += jax.vmap(product.square)(at_least_float32(x), at_least_float32(error))
        norms = jnp.sqrt(squares)
        weights = mask * jnp.minimum(1, clip / jnp.maximum(norms, 1e-30))
        total = jax.tree.unflatten(jax.tree.structure(params), pull(weights.astype(values.dtype))[0])
        return Clipped(total, norms, values, metrics)

    return of_batch


def _alone(loss: Loss, params: Tree, extra: Tree, row: Tree, key: Array) -> tuple[Array, Mapping[str, Metric]]:
    """Value and metrics of one example."""
    value, (changed, metrics) = loss({"params": params, **extra}, jax.tree.map(lambda x: x[None], row), key)
    if jax.tree.leaves(changed):
        raise InputError(
            f"the loss changes the collection {next(iter(changed))!r}, expected none: what examples leave there has no "
            "noise; take a network without one, such as batch statistics"
        )
    return value, metrics


def _squares(gradients: Array) -> Array:  # [B, ...] -> [B]
    return (at_least_float32(gradients) ** 2).reshape(len(gradients), -1).sum(-1)


class _Product(NamedTuple):
    """An equation y = x W of a trace, or a convolution, whose kernel W is a leaf of the parameters."""

    equation: Any
    operand: int  # which input of the equation is the kernel
    leaf: int  # its number

    def square(self, x: Array, error: Array) -> Array:
        """‖xᵀ error‖² from the input and the gradient of the output of one example.

        Products of rows with each other, (a aᵀ) · (d dᵀ), would be less work for few rows, but they cancel: a norm that
        is too small by rounding lets an example's gradient exceed the bound.
        """
        a, d = self.rows(x, error)  # [T, K], [T, N]
        if len(a) == 1:
            return (a**2).sum() * (d**2).sum()
        return ((a.T @ d) ** 2).sum()

    def rows(self, x: Array, error: Array) -> tuple[Array, Array]:
        """x [T, K] and error [T, N], where the gradient of the kernel is their product, its axes aside."""
        params = self.equation.params
        if self.equation.primitive.name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            kernel = self.equation.invars[1].aval.shape
            window = tuple(kernel[axis] for axis in numbers.rhs_spec[2:])
            names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
            patches = jax.lax.conv_general_dilated_patches(
                x, window, **{name: params[name] for name in names}, dimension_numbers=numbers
            )
            last = lambda y: jnp.moveaxis(y, numbers.out_spec[1], -1)
            return _matrix(last(patches)), _matrix(last(error))
        contracted = params["dimension_numbers"][0][1 - self.operand]
        free = [axis for axis in range(x.ndim) if axis not in contracted]
        count = math.prod(x.shape[axis] for axis in free)  # T
        a = x.transpose(*free, *contracted).reshape(count, -1)
        return a, error.reshape(count, -1) if self.operand == 1 else error.reshape(-1, count).T


def _matrix(x: Array) -> Array:  # [..., K] -> [T, K]
    return x.reshape(-1, x.shape[-1])


def _products(jaxpr: Any, leaves: int) -> dict[Any, _Product]:
    """The products of a trace whose kernel is one of its first inputs and used nowhere else, by their output."""
    atoms = [atom for equation in jaxpr.eqns for atom in equation.invars if not isinstance(atom, jex.Literal)]
    uses = collections.Counter([*atoms, *(atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal))])
    numbers = {variable: i for i, variable in enumerate(jaxpr.invars[:leaves]) if uses[variable] == 1}
    found: dict[Any, _Product] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in LAYER_PRIMITIVES:
            for operand in _kernels(equation):
                atom = equation.invars[operand]
                if not isinstance(atom, jex.Literal) and atom in numbers:
                    found[equation.outvars[0]] = _Product(equation, operand, numbers[atom])
    return found


def _kernels(equation: Any) -> tuple[int, ...]:
    """Which inputs of a product or convolution can be a kernel."""
    params = equation.params
    if equation.primitive.name == "dot_general":
        return () if params["dimension_numbers"][1][0] else (0, 1)
    return (1,) if params["batch_group_count"] == params["feature_group_count"] == 1 else ()


class Releases(NamedTuple):
    """What a run publishes of its records: Gaussian mechanisms on all of them, and `steps` on Poisson samples."""

    rate: float  # q, the probability that a record is in a sample
    steps: int
    on_all: tuple[float, ...] = ()  # noise multipliers of the mechanisms on all records, such as `principal_axes`
    overflow: float = 0.0  # a bound on the probability that a sample has no place in a batch (`data.overflow`)


def epsilon(noise: float, releases: Releases, delta: float) -> float:
    """The ε of (ε, δ)-differential privacy after the steps of DP-SGD with this noise multiplier and what went before.

    It is an upper bound by the distribution of the privacy loss (package dp-accounting). A run that ends because a
    sample overflows differs from one with room for all samples with probability p = `overflow` · steps at most, for
    which (1 + e^ε) p of δ are set aside (Chua et al. 2024, arXiv:2411.04205, has it for samples that are cut). The
    result is infinite where they take all of δ.

    Raises InputError for noise, a rate, steps or a δ outside of their ranges, and where the package is not installed.
    """
    require_positive({"noise": noise, "rate": releases.rate, "steps": releases.steps})
    if not releases.rate <= 1:
        raise InputError(f"the sampling rate is {releases.rate:g}, expected at most 1; lower the batch size")
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta:g}, expected more than 0 and less than 1; 1e-5 is customary")
    dp, accountant = _accountant()
    gaussian = [dp.GaussianDpEvent(each) for each in releases.on_all]
    sampled = dp.PoissonSampledDpEvent(releases.rate, dp.GaussianDpEvent(noise))
    accountant.compose(dp.ComposedDpEvent([*gaussian, dp.SelfComposedDpEvent(sampled, releases.steps)]))
    most = accountant.get_epsilon(delta) + 1  # what it may grow to
    left = delta - (1 + np.exp(min(most, 700.0))) * releases.steps * releases.overflow
    found = accountant.get_epsilon(left) if left > 0 else math.inf
    return float(found) if found <= most else math.inf


def noise_for(target: float, releases: Releases, delta: float) -> float:
    """A noise multiplier with which the releases are (ε, δ)-differentially private for ε = `target`.

    It is the smallest up to half a per cent, and 1/16 at least. Raises InputError for an ε that none up to 1,000
    reaches, and as `epsilon` does.
    """
    require_positive({"epsilon": target})
    spent = lambda noise: epsilon(noise, releases, delta)
    if math.isinf(least := spent(MOST_NOISE)) and releases.overflow:
        raise InputError(
            f"a batch overflows in one of {releases.steps} steps with a probability of up to "
            f"{releases.steps * releases.overflow:.1e}, expected far less than delta, {delta:g}; raise the capacity"
        )
    if least > target:
        raise InputError(
            f"epsilon is {target:g}, expected at least {least:.3g}, which noise of {MOST_NOISE:g} times the clip norm "
            "gives, with what is published beside the steps; raise it"
        )
    high = 1.0
    while spent(high) > target:
        high *= 2
    while high > LEAST_NOISE and spent(high / 2) <= target:
        high /= 2
    low = high / 2
    for _ in range(8 if high > LEAST_NOISE else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= target else (middle, high)
    return high


def _accountant() -> tuple[Any, Any]:
    """The package dp-accounting, and an accountant of its. Raises InputError where it is not installed."""
    try:
        import dp_accounting
        from dp_accounting import pld
    except ModuleNotFoundError as error:
        raise not_installed("an accountant", error, "private") from error
    return dp_accounting, pld.PLDAccountant(value_discretization_interval=1e-3)


def normalised(x: Any) -> Any:  # [N, ...] -> [N, D], of NumPy or JAX
    """Each example as a row of Euclidean norm 1, or 0 where all its numbers are 0."""
    flat = x.reshape(len(x), -1)
    return flat / (((flat**2).sum(-1, keepdims=True)) ** 0.5 + 1e-12)


def second_moments(x: np.ndarray) -> np.ndarray:  # [N, ...] -> [D, D]
    """XᵀX of the `normalised` X of N examples. With one example more or less it differs by xxᵀ, whose norm is 1."""
    rows = normalised(np.asarray(x, np.float32))
    return rows.T @ rows


def principal_axes(moments: np.ndarray, most: int, noise: float, seed: int | Sequence[int]) -> np.ndarray:
    """Private principal axes float32 [D, most] of `second_moments` (arXiv:1607.00133, section 4).

    They are eigenvectors of XᵀX + E, where the symmetric E has Gaussian entries of deviation `noise`, drawn from the
    seed, one number or several: a Gaussian mechanism with this noise multiplier. Raises InputError for noise that is
    not positive, and for fewer or more axes than there are.
    """
    require_positive({"noise": noise})
    features = len(moments)
    if not 1 <= most <= features:
        raise InputError(f"{most} principal axes of {features} features, expected 1 to {features}; change the number")
    upper = np.triu(noise * np.random.default_rng(seed).standard_normal((features, features)))
    _, vectors = np.linalg.eigh(moments + upper + np.triu(upper, 1).T)  # the smallest first
    return vectors[:, ::-1][:, :most].astype(np.float32)


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates [n + 1] of all thresholds on a score [M] and [K] that is high for members."""
    levels = np.unique(np.concatenate([members, others]))[::-1]
    rate = lambda scores: np.searchsorted(np.sort(-scores), -levels, side="right") / len(scores)
    return (np.concatenate([[0.0], rate(others)]), np.concatenate([[0.0], rate(members)]))


def area(curve: tuple[np.ndarray, np.ndarray]) -> float:
    """The area below a curve of `roc`; one half is what a guess has."""
    false, true = curve
    return float(np.trapezoid(true, false))


def most_true_positives(false: np.ndarray, epsilon: float, delta: float) -> np.ndarray:
    """The true positive rate that no attack on (ε, δ)-differential privacy exceeds at a false positive rate.

    Both TPR ≤ e^ε FPR + δ and 1 − FPR ≤ e^ε (1 − TPR) + δ hold (Kairouz et al. 2015, arXiv:1311.0776, theorem 2.1).
    """
    return np.clip(np.minimum(np.exp(epsilon) * false + delta, 1 - np.exp(-epsilon) * (1 - delta - false)), 0, 1)


def most_advantage(epsilon: float, delta: float) -> float:
    """The largest TPR − FPR of any attack: (e^ε − 1 + 2δ) / (e^ε + 1), where both bounds of the rate meet."""
    odds = np.exp(-epsilon)
    return float(1 - 2 * (1 - delta) * odds / (1 + odds))
