"""An autoencoder that learns from known ratings alone completes the others better than the mean of each item does.

Sedhain, Menon, Sanner & Xie 2015, "AutoRec: Autoencoders meet collaborative filtering" (WWW), here the autoencoder of
items, on generated ratings in place of the paper's.

    python experiments/generative/recommend.py --preset paper --seeds 5 --workdir runs/recommend

Expected: the error of the autoencoder is two thirds of that of the means of the items, and at most 9.2 % above that of
least squares that know the planted rank. Five seeds took three minutes on two busy CPU cores.

The matrix of ratings has a rank that is known because it was planted (`dl_jax/data/ratings.py`). As in the paper a
seed holds a tenth of the known ratings out, at random, and the root mean square error (RMSE) of these is compared:

- item_means: the mean of the item's other ratings, and the mean of all for an item that has none.
- als: alternating least squares (Zhou et al. 2008) with the planted rank, which knows more than the autoencoder. Each
  of its steps solves for the users and for the items. Who has no rating gets factors of 0, which is the mean of all.
- autorec: the autoencoder, whose loss is the squared error of known ratings. For a user or an item without any it
  gives what its biases say.
- planted: the ratings before noise and rounding, which no method knows.

All guesses are cut to the interval of the ratings. `excess` is by how many per cent the error of the autoencoder is
above that of alternating least squares. The settings were chosen on the split `pilot`, another matrix. The figure
`ratings` shows 24 items by 180 users: what is above 3 is red, what is below blue.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, losses, optim
from dl_jax.core import seeds
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Metrics, State, Tree, holding, make_step, per_seed, plain_state, start
from dl_jax.core.stream import no_data
from dl_jax.data.ratings import LEAST, MIDDLE, MOST
from dl_jax.harness import Claim, Fraction, NonNegative, Positive, Probability, Run, launch, quick_bar, rows_figure
from dl_jax.models.generative.autorec import AutoRec


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "ratings"  # TFDS name of a set whose examples are items, with their ratings by all users
    split: str = "full"  # TFDS split
    held_out: Fraction = 0.1  # part of the known ratings that is not learned from
    hidden: Positive[int] = 50  # hidden units of the autoencoder
    dropout: Probability = 0.3  # probability that a rating is hidden from the autoencoder in training
    steps: Positive[int] = 3000  # train steps of the autoencoder
    batch_size: Positive[int] = 48  # items per step, over all devices
    learning_rate: Positive[float] = 3e-3  # peak learning rate of Adam
    l2: NonNegative[float] = 0.1  # half the weight of the squares of the autoencoder's kernels
    rank: Positive[int] = 4  # factors of alternating least squares
    als_steps: Positive[int] = 30  # times that it solves for all users and all items
    als_l2: Positive[float] = 1.5  # weight of the squares of a factor, where a rating has 1


PRESETS = {
    "paper": Config(),
    "quick": Config(steps=1000),
    "smoke": Config(hidden=4, steps=2, batch_size=16, rank=2, als_steps=2),
}

PILOTS = "Pilots of one seed on each of three other matrices: "
ours = functools.partial(Claim, paper="our bar", given={"dataset": "ratings"})
CLAIMS = (
    ours("rmse/autorec", versus="rmse/item_means", locator="the autoencoder against the mean of each item",
         note=PILOTS + "0.722 ± 0.006 against 1.064 ± 0.008."),
    ours("excess", at_most=9.2, unit="%", locator="the error above that of least squares with the planted rank",
         note=PILOTS + "7.2 ± 1.0 %. The mean of each item: 58 %."),
    quick_bar("ratings", "rmse/autorec", at_most=0.735, unit="ratings", note="the mean of each item: 1.064"),
)  # fmt: skip
KEEPS = ("ratings.png",)  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    records = data.load(cfg.dataset, cfg.split)
    require_ratings(cfg.dataset, records)
    ratings = records["rating"]  # uint8 [I, U], 0 where unknown
    if cfg.rank > min(ratings.shape):
        raise InputError(f"rank is {cfg.rank} for ratings {ratings.shape}, expected no more than their sides; lower it")
    known, unseen = zip(*(divided(ratings, cfg.held_out, seed) for seed in run.seeds), strict=True)  # [I, U] each
    guesses = {
        "item_means": [item_means(each) for each in known],
        "als": als(cfg, run, known),
        "autorec": autorec(cfg, run, known),
        "planted": [records["planted"]] * len(known),
    }
    found = {name: np.array([rmse(*each) for each in zip(given, unseen, strict=True)])
             for name, given in guesses.items()}  # fmt: skip
    first = {"known": np.where(known[0] > 0, known[0], MIDDLE)} | {name: each[0] for name, each in guesses.items()}
    corner = lambda each: np.broadcast_to(each - np.float32(MIDDLE), ratings.shape)[None, :24, :180]
    run.figure("ratings", cfg.steps, lambda: rows_figure({name: corner(each) for name, each in first.items()}))
    return {f"rmse/{name}": each for name, each in found.items()} | {
        "excess": 100 * (found["autorec"] / found["als"] - 1)
    }


def require_ratings(name: str, records: data.Columns) -> None:
    """Raises InputError for a set without ratings, 0 where unknown, and the numbers behind them."""
    shapes = {column: np.shape(records.get(column, ())) for column in ("rating", "planted")}
    if len(shapes["rating"]) != 2 or shapes["planted"] != shapes["rating"]:
        raise InputError(
            f"data set {name} has no ratings of items by users with the numbers behind them, expected the columns "
            "'rating' and 'planted', [users] each; choose another --dataset"
        )
    ratings = records["rating"]
    if ratings.dtype != np.uint8 or not np.isin(ratings, [0, *range(LEAST, MOST + 1)]).all():
        raise InputError(
            f"the ratings of data set {name} are {ratings.dtype} from {ratings.min()} to {ratings.max()}, expected "
            f"uint8 from {LEAST} to {MOST}, and 0 where unknown; rescale them"
        )


def divided(ratings: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The ratings [I, U] without a random part of those that are known, and this part alone; 0 elsewhere.

    Raises InputError where one of the two is empty.
    """
    places = np.flatnonzero(ratings)
    some = np.random.default_rng(seed).permutation(places)[: round(share * len(places))]
    if not 0 < len(some) < len(places):
        raise InputError(
            f"{len(some)} of {len(places)} known ratings to hold out, expected some and not all; set --held-out"
        )
    out = np.zeros_like(ratings)
    out.flat[some] = ratings.flat[some]
    return ratings - out, out


def item_means(known: np.ndarray) -> np.ndarray:  # uint8 [I, U] -> [I, 1]
    """The mean rating of each item; that of all for an item without any."""
    count, total = (known > 0).sum(1), known.sum(1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), total.sum() / count.sum())[:, None]


def rmse(guess: Any, unseen: np.ndarray) -> float:  # broadcast to [I, U], uint8 [I, U]
    """The root mean square error of the guesses, cut to the interval of ratings, where `unseen` has one."""
    errors = np.clip(np.asarray(guess, np.float64), LEAST, MOST) - unseen
    return float(np.sqrt((errors[unseen > 0] ** 2).mean()))


def autorec(cfg: Config, run: Run, known: tuple[np.ndarray, ...]) -> list[np.ndarray]:  # -> [I, U] for each seed
    """The guesses of the autoencoder."""
    model, tx = AutoRec(cfg.hidden, dropout=cfg.dropout), optax.adam(optim.warmup_cosine(cfg.learning_rate, cfg.steps))
    key_init, key = run.keys(2)  # [S] each
    stream = data.per_seed(
        [data.shuffled({"rating": each}, cfg.batch_size, seed) for each, seed in zip(known, run.seeds, strict=True)]
    )
    step = per_seed(make_step(losses.l2(functools.partial(observed_loss, model), cfg.l2), tx))
    states = start(model, tx, key_init, key, jnp.zeros((1, known[0].shape[1])))
    states = fit(step, states, stream, steps=cfg.steps, run=run / "autorec")
    guess = jax.jit(lambda params, rating: model.apply({"params": params}, rating, train=False))
    return [np.asarray(guess(*each)) for each in zip(seeds.split(states.params), known, strict=True)]


def observed_loss(model: AutoRec, variables: Tree, batch: Batch, key: Array):
    """The sum of the squared errors of an item's known ratings (equation 1), on average over the items of a batch."""
    rating = batch["rating"]  # uint8 [B, U]
    guess: Any = model.apply(variables, rating, train=True, rngs={"dropout": key})
    return jnp.where(rating > 0, (guess - rating) ** 2, 0).sum(-1).mean(), ({}, {})


def als(cfg: Config, run: Run, known: tuple[np.ndarray, ...]) -> list[np.ndarray]:  # -> [I, U] for each seed
    """The guesses of alternating least squares."""
    (key,) = run.keys(1)  # [S]
    first = jax.vmap(lambda key: jax.random.normal(key, (len(known[0]), cfg.rank)))(key)  # factors of the items
    step = holding(jax.vmap(functools.partial(solved, cfg.als_l2)), np.stack(known))
    states = fit(step, plain_state(key, first), no_data, steps=cfg.als_steps, run=run / "als")
    guess = jax.jit(lambda item, known: middle(known) + item @ users(cfg.als_l2, known, item).T)
    return [np.asarray(guess(*each)) for each in zip(seeds.split(states.params), known, strict=True)]


def solved(l2: float, known: Array, state: State, batch: Batch) -> tuple[State, Metrics]:
    """A step of alternating least squares: the best factors of the users, then those of the items, the parameters."""
    user = users(l2, known, state.params)
    item = ridge(known > 0, rest(known), user, l2)
    squares = jnp.where(known > 0, (rest(known) - item @ user.T) ** 2, 0).sum() / (known > 0).sum()
    return state._replace(step=state.step + 1, params=item), {"squared_error": squares}


def users(l2: float, known: Array, item: Array) -> Array:  # [I, U], [I, K] -> [U, K]
    """The best factors of the users."""
    return ridge((known > 0).T, rest(known).T, item, l2)


def rest(known: Array) -> Array:  # [I, U]
    """The known ratings without their mean; 0 elsewhere."""
    return jnp.where(known > 0, known - middle(known), 0)


def middle(ratings: Any) -> Any:
    """The mean of the known ratings."""
    return ratings.sum(dtype=np.float32) / (ratings > 0).sum()


def ridge(there: Array, wanted: Array, factors: Array, l2: float) -> Array:  # [N, M] twice, [M, K] -> [N, K]
    """Of each row the x that is least in Σ_m there_m (wanted_m − x · factors_m)² + l2 ‖x‖²; 0 for a row without any."""
    squares = jnp.einsum("nm,mk,ml->nkl", there.astype(wanted.dtype), factors, factors)
    root = jax.scipy.linalg.cho_factor(squares + l2 * jnp.eye(factors.shape[1]))
    return jax.scipy.linalg.cho_solve(root, (wanted @ factors)[..., None])[..., 0]


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
