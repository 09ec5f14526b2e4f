"""k-means and mixtures of Gaussians, as steps that go over the whole set, and the soft assignments of deep clustering.

Points are float32 [N, D]. A step of `kmeans` or `mixture` is an epoch: give it to `fit` with `core.step.holding`, the
stream `core.stream.no_data`, and a state from `core.step.plain_state`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError, require_positive
from dl_jax.core.step import Array, Batch, Metrics, State


def squares(x: Array, centres: Array) -> Array:  # [N, D], [..., K, D] -> [..., N, K]
    """The squared Euclidean distances of all points from all centres."""
    middle = x.mean(0)  # far from 0, the difference of the squares would lose what it has in common
    x, centres = x - middle, centres - middle
    products = jnp.einsum("nd,...kd->...nk", x, centres, precision="highest")
    return jnp.maximum((x**2).sum(-1)[:, None] - 2 * products + (centres**2).sum(-1)[..., None, :], 0)


def spread(x: np.ndarray, clusters: int, key: Array, restarts: int = 1) -> Array:  # [N, D] -> [restarts, K, D]
    """Centres to begin with: points that are drawn one after the other (k-means++, Arthur & Vassilvitskii 2007).

    The first is any point, and each of the others one with a probability in proportion to the squared distance from the
    nearest centre so far. Raises InputError for no clusters or more than points, for no restarts, and for points that
    are not finite.
    """
    if not 1 <= clusters <= len(x):
        raise InputError(
            f"clusters is {clusters}, expected 1 to {len(x)}, the number of points; change it, or give more points"
        )
    require_positive({"restarts": restarts})
    _require_finite(x)
    return _spread(jnp.asarray(x), clusters, restarts, key)


def _require_finite(x: np.ndarray) -> None:  # [N, D]
    for point, feature in np.argwhere(~np.isfinite(x))[:1]:
        raise InputError(
            f"feature {feature} of point {point} is {x[point, feature]}, expected a finite number; leave it out"
        )


@jax.jit(static_argnums=(1, 2))
def _spread(x: Array, clusters: int, restarts: int, key: Array) -> Array:
    keys = jax.random.split(key, restarts)
    first = x[jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(x)))(keys)]  # [R, D]

    def add(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        new, nearest = carry  # [R, D], [R, N]
        nearest = jnp.minimum(nearest, squares(x, new[:, None])[..., 0])
        draw = lambda key, weight: jax.random.categorical(jax.random.fold_in(key, i), jnp.log(weight))
        return (x[jax.vmap(draw)(keys, nearest)], nearest), new

    begin = first, jnp.full((len(keys), len(x)), jnp.inf)
    (last, _), others = jax.lax.scan(add, begin, jnp.arange(1, clusters))
    return jnp.concatenate([others, last[None]]).swapaxes(0, 1)


def kmeans(x: Array, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One pass of Lloyd's algorithm for all restarts: `state.params` are centres [R, K, D], no more than points.

    A centre becomes the mean of the points that are nearest to it. A centre without points becomes a point instead:
    the one that is farthest from its own centre, the second one for a second such cluster, and so on. The metric
    `inertia` is the mean squared distance from the centres before the pass, of the best restart.
    """
    centres = state.params
    clusters = centres.shape[-2]
    from_centres = squares(x, centres)  # [R, N, K]
    nearest, own = from_centres.min(-1), jax.nn.one_hot(from_centres.argmin(-1), clusters)
    count = own.sum(-2)  # [R, K]
    means = jnp.einsum("rnk,nd->rkd", own, x, precision="highest") / jnp.maximum(count, 1)[..., None]
    farthest = x[jax.lax.top_k(nearest, clusters)[1]]  # [R, K, D]
    rank = jnp.maximum(jnp.cumsum(count == 0, -1) - 1, 0)  # of a cluster among the empty ones
    moved = jnp.take_along_axis(farthest, rank[..., None], -2)
    new = jnp.where(count[..., None] > 0, means, moved)
    return state._replace(step=state.step + 1, params=new), {"inertia": nearest.mean(-1).min()}


@jax.jit
def best(x: Array, centres: Array) -> tuple[Array, Array]:  # [N, D], [R, K, D] -> [K, D], int [N]
    """The centres of the restart with the least mean squared distance, and the cluster of each point."""
    from_centres = squares(x, centres)
    i = from_centres.min(-1).mean(-1).argmin()
    return centres[i], from_centres[i].argmin(-1)


class Mixture(NamedTuple):
    """The parameters of a mixture of Gaussians with full covariances."""

    weight: Array  # [K], which add up to 1
    mean: Array  # [K, D]
    covariance: Array  # [K, D, D]


RIDGE = 1e-6  # of the mean variance of the features, added to the variances so that no Gaussian shrinks to a point


def from_clusters(x: np.ndarray, clusters: np.ndarray, number: int) -> Mixture:  # [N, D], int [N]
    """The mixture to begin with: the share, mean and covariance of each of `number` clusters.

    Raises InputError for a feature that is the same for all points, or not finite, and where `clusters` are not one of
    0 to number − 1 for each point. All of this is checked on the host: call it outside of jit.
    """
    _require_finite(x)
    clusters = np.asarray(clusters)
    if clusters.shape != x.shape[:1] or clusters.dtype.kind not in "iu":
        raise InputError(f"clusters are {clusters.dtype} {clusters.shape}, expected int ({len(x)},), one of each point")
    for point in np.flatnonzero((clusters < 0) | (clusters >= number))[:1]:
        raise InputError(
            f"point {point} is in cluster {clusters[point]}, expected one of 0 to {number - 1}; give another number"
        )
    width = np.ptp(x, axis=0)
    for feature in np.flatnonzero(width <= 1e-6 * width.max())[:1]:
        raise InputError(
            f"feature {feature} of all points is {x[0, feature]:g} up to rounding, expected different numbers: a "
            "Gaussian has no density along it; leave it out"
        )
    return _maximised(jnp.asarray(x), np.eye(number, dtype=np.float32)[clusters])


def mixture(x: Array, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One iteration of EM, where `state.params` are a `Mixture` (Dempster, Laird & Rubin 1977).

    The metric `log_likelihood` is the mean log density of the points in nats, before the iteration. A component to
    which no point belongs keeps a share of almost 0.
    """
    joint = log_joint(state.params, x)
    params = _maximised(x, jax.nn.softmax(joint, -1))
    return state._replace(step=state.step + 1, params=params), {
        "log_likelihood": jax.nn.logsumexp(joint, -1).mean(),
    }


def log_joint(params: Mixture, x: Array) -> Array:  # [N, D] -> [N, K]
    """log of the share of each component times its density, of each point."""
    factor = jnp.linalg.cholesky(params.covariance)  # [K, D, D]

    def one(weight: Array, mean: Array, factor: Array) -> Array:
        standard = jax.scipy.linalg.solve_triangular(factor, (x - mean).T, lower=True)  # [D, N]
        volume = jnp.log(jnp.diagonal(factor)).sum()
        return jnp.log(weight) - 0.5 * ((standard**2).sum(0) + len(mean) * jnp.log(2 * jnp.pi)) - volume

    return jax.vmap(one, out_axes=-1)(params.weight, params.mean, factor)


@jax.jit
def _maximised(x: Array, share: Array) -> Mixture:  # [N, D], [N, K]
    """The mixture with the highest likelihood where point n belongs to component k by `share`[n, k]."""
    count = share.sum(0) + 1e-6  # [K]
    mean = jnp.einsum("nk,nd->kd", share, x, precision="highest") / count[:, None]

    def covariance(share: Array, mean: Array, count: Array) -> Array:
        away = x - mean
        return jnp.matmul((share[:, None] * away).T, away, precision="highest") / count

    ridge = RIDGE * jnp.diag(x.var(0))
    return Mixture(count / count.sum(), mean, jax.vmap(covariance, (1, 0, 0))(share, mean, count) + ridge)


def soft(z: Array, centres: Array) -> Array:  # [N, D], [K, D] -> [N, K]
    """The soft assignment of Xie et al. 2016, equation 1: Student's t with one degree of freedom, normalised."""
    kernel = 1 / (1 + squares(z, centres))
    return kernel / kernel.sum(-1, keepdims=True)


def sharpened(q: Array) -> Array:  # [N, K]
    """The target distribution of Xie et al. 2016, equation 3: q² divided by the cluster's frequency, normalised."""
    weight = q**2 / q.sum(0)
    return weight / weight.sum(-1, keepdims=True)
