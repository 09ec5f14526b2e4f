"""The bundled set `ratings`: what 600 users think of 300 items, 1 to 5, of which a fifth is known; it is generated.

A rating is the sum of 3, an offset of the item, the products of three tastes of the user with three traits of the item,
and noise, rounded to an integer from 1 to 5. Before the noise the matrix without its 3 has rank 4. Which ratings are
known is drawn independently of all else.

An example is an item. Its columns are `item`, its number; `rating`, uint8 [600], which is 0 where it is not known; and
`planted`, float32 [600], the sum without the noise. The splits `full` and `pilot` are two matrices of the same kind.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError, require_positive
from dl_jax.data.bundled import Bundled

USERS, ITEMS, RANK, NOISE, KNOWN = 600, 300, 4, 0.6, 0.2
MIDDLE, LEAST, MOST = 3, 1, 5  # ratings


def planted(users: int, items: int, rank: int, noise: float, known: float, seed: int) -> dict[str, np.ndarray]:
    """Ratings uint8 [items, users], 0 where they are not known, and the numbers behind them, float32 [items, users].

    Args:
      users: the number of users.
      items: the number of items.
      rank: the rank of the matrix without its mean: one for the items' offsets, the others for tastes and traits.
      noise: the standard deviation of the noise, in ratings.
      known: the probability that a rating is known.
      seed: of all random numbers.

    A user or an item may have no known rating. Raises InputError for a number of users or items below 1, a rank below 1
    or above one of these, negative noise, and a probability outside [0, 1].
    """
    require_positive({"users": users, "items": items})
    if not 1 <= rank <= min(users, items):
        raise InputError(
            f"rank is {rank} for {users} users and {items} items, expected 1 to the smaller number of them"
        )
    if not (noise >= 0 and 0 <= known <= 1):
        raise InputError(f"noise is {noise} and known {known}, expected 0 or more and a probability")
    rng = np.random.default_rng(seed)
    offsets, traits = 0.5 * rng.normal(size=(items, 1)), rng.normal(size=(items, rank - 1))
    tastes = rng.normal(size=(users, rank - 1)) / np.sqrt(max(rank - 1, 1))
    behind = MIDDLE + offsets + traits @ tastes.T  # [items, users]
    ratings = np.clip(np.rint(behind + noise * rng.normal(size=behind.shape)), LEAST, MOST)
    hidden = rng.random(behind.shape) >= known
    return {"rating": np.where(hidden, 0, ratings).astype(np.uint8), "planted": behind.astype(np.float32)}


def features() -> Mapping[str, Any]:
    import tensorflow_datasets as tfds

    return {
        "item": tfds.features.Scalar(np.int32),
        "rating": tfds.features.Tensor(shape=(USERS,), dtype=np.uint8, encoding="zlib"),
        "planted": tfds.features.Tensor(shape=(USERS,), dtype=np.float32, encoding="zlib"),
    }


def splits() -> dict[str, Iterable[Mapping[str, Any]]]:
    """The examples of each split, which has a seed of its own."""

    def examples(seed: int) -> list[Mapping[str, Any]]:
        given = planted(USERS, ITEMS, RANK, NOISE, KNOWN, seed)
        return [{"item": i, "rating": given["rating"][i], "planted": given["planted"][i]} for i in range(ITEMS)]

    return {split: examples(seed) for seed, split in enumerate(("full", "pilot"))}


SET = Bundled("ratings", "1.0.0", "Generated ratings of items by users", features, splits)
