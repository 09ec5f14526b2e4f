"""Weight sharing: all weights of a layer take a few values, which are found by k-means and then trained.

Han, Mao & Dally 2016, "Deep compression" (arXiv:1510.00149), section 3.

    codebooks, clusters = share.cluster(params, values=63)         # 63 values and zero: an index has 6 bits
    loss = losses.with_params(loss, share.expanded(clusters))      # the codebooks are the parameters of this loss
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Where, at_least_float32, chosen, is_kernel
from dl_jax.core.step import Array, Tree

ROUNDS = 1000  # largest number of iterations of k-means; a layer takes some dozens


class Shared(NamedTuple):
    """Parameters with shared weights, as two trees of the structure of the parameters.

    A leaf whose weights are not shared is in `codebooks` unchanged, and is None in `clusters`.
    """

    codebooks: Tree  # float [K], the values of a leaf, ascending
    clusters: Tree  # int32, of the leaf's shape: k for codebook value k - 1, or 0 for a weight that is and stays zero


def cluster(params: Tree, values: int | Sequence[int], where: Where = is_kernel) -> Shared:
    """Replaces the non-zero weights of each chosen leaf by at most `values` different values, by k-means.

    Each leaf has its own values. `values` is one number for all leaves, or one for each, sorted by path. The
    computation runs on the host. Raises InputError where one is not in 1 to 256 or their number is another than that of
    the leaves, where `where` chooses no parameter, and where a weight is not finite.
    """
    yes = chosen(params, where)
    leaves, structure = jax.tree.flatten(yes)
    counts = tuple(values) if isinstance(values, Sequence) else (values,) * sum(leaves)
    if len(counts) != sum(leaves):
        raise InputError(f"share: values has {len(counts)} numbers, expected one for each of the {sum(leaves)} leaves")
    for count in counts:
        if count not in range(1, 257):
            raise InputError(f"share: values is {count}, expected 1 to 256 in a layer; 63 and zero take 6 bits")
    of_leaf, host = iter(counts), jax.tree.map(np.asarray, params)
    most = jax.tree.unflatten(structure, [next(of_leaf) if share else 0 for share in leaves])  # 0: not shared
    codebooks = jax.tree.map(lambda w, count: k_means(w[w != 0], count) if count else w, host, most)
    clusters = jax.tree.map(lambda w, share, book: _clusters(w, book) if share else None, host, yes, codebooks)
    return Shared(codebooks, clusters)


def expanded(clusters: Tree) -> Callable[[Tree], Tree]:
    """The function codebooks -> params. The gradient of a value is the sum over its cluster (equation 3)."""

    def expand(values: Array, assigned: Any) -> Array:
        if assigned is None:
            return values
        wide = at_least_float32(values)  # its gradient is the sum
        return jnp.concatenate([jnp.zeros_like(wide[:1]), wide])[assigned].astype(values.dtype)

    return lambda codebooks: jax.tree.map(expand, codebooks, clusters)


def k_means(weights: np.ndarray, k: int) -> np.ndarray:  # [n], in any order -> [k] of the same type, ascending
    """The k cluster centres of `weights` by Lloyd's algorithm, run until no weight changes its cluster.

    Centres start evenly spaced from the smallest weight to the largest: the paper's "linear initialisation", which
    represents the few large weights well. A centre without weights stays where it is. For no weights all centres are 0.
    Raises InputError where a weight is not finite.
    """
    if not weights.size:
        return np.zeros(k, weights.dtype)
    if not np.isfinite(weights).all():
        raise InputError("share: a weight is NaN or infinite, expected finite weights; train without divergence first")
    ordered = np.sort(weights.astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    values, edges = np.linspace(ordered[0], ordered[-1], k), np.zeros(0, np.int64)
    for _ in range(ROUNDS):
        before, edges = edges, np.concatenate([[0], np.searchsorted(ordered, _borders(values)), [ordered.size]])
        if np.array_equal(before, edges):
            break
        counts = np.diff(edges)
        values = np.where(counts, np.diff(sums[edges]) / np.maximum(counts, 1), values)
    return values.astype(weights.dtype)


def _clusters(weights: np.ndarray, values: np.ndarray) -> np.ndarray:  # [...], ascending [k] -> int32 [...]
    nearest = np.searchsorted(_borders(values), weights)
    return np.where(weights == 0, 0, nearest + 1).astype(np.int32)


def _borders(values: np.ndarray) -> np.ndarray:  # ascending [k] -> [k - 1]
    """The points halfway between neighbouring values, in float32 or better."""
    values = at_least_float32(values)
    return (values[:-1] + values[1:]) / 2
