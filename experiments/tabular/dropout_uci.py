"""Networks with dropout, averaged over masks in the test, beside their author's numbers on UCI's sets for regression.

Gal & Ghahramani 2016, "Dropout as a Bayesian approximation: representing model uncertainty in deep learning"
(arXiv:1506.02142), Table 1. The numbers are those of the author's own run of 2018, in the README of his repository
(github.com/yaringal/DropoutUncertaintyExps). The paper's hyper-parameters, he says, were chosen on rows on which other
splits test.

    python experiments/tabular/dropout_uci.py --preset paper --seeds 1 --workdir runs/dropout

Expected: root mean squared error (RMSE) and negative log likelihood (NLL) of each set within two of the author's
standard errors over the splits, which are the same here. This holds for both numbers of boston, wine and yacht, and for
no other set: there the RMSE is 4 to 50 % above the author's, naval's more. The run took an hour on a core that had much
other work. A metric has one value per split and seed.

The network has one hidden layer. Inputs and hidden units are dropped with the same probability, in the test too, where
1000 masks give the mean and a likelihood: that of a mixture of as many Gaussians with the precision τ. For each split,
four dropout rates and three precisions, which are the author's, are tried on a fifth of its training rows by networks
that learn from the others; the best pair by NLL is taken for a network that learns from all of them.

Some things are not the author's. He trains for 4,000 epochs, also the larger sets; here a network takes at most 5,000
steps, which are 1,400 epochs of boston and 60 of naval. τ decides how strongly weights decay, so that he trains anew
for each τ; as the decay is below 3e-6 for all of his sets, here one training with the middle τ serves all three. He
tests with 10,000 masks, one for each row, and chooses on the last fifth of the training rows; here all rows have the
same 1,000, and the fifth is drawn at random."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, splits
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Tree, holding, make_step, start
from dl_jax.harness import Between, Claim, Distinct, Fraction, Positive, Run, launch
from dl_jax.models.vision.mlp import MLP

TABLE = {  # the author's RMSE and log likelihood, each with its standard error
    "boston": (2.90, 0.18, -2.40, 0.04),
    "concrete": (4.82, 0.16, -2.93, 0.02),
    "energy": (0.54, 0.01, -1.21, 0.01),
    "kin8nm": (0.08, 0.00, 1.14, 0.01),
    "naval": (0.00, 0.00, 4.45, 0.00),
    "power": (4.01, 0.04, -2.80, 0.01),
    "protein": (4.27, 0.02, -2.87, 0.00),
    "wine": (0.62, 0.01, -0.93, 0.01),
    "yacht": (0.67, 0.05, -1.25, 0.02),
}
TAUS = {  # precisions to choose from, in units of the target; the author's, but for diabetes
    "boston": (0.1, 0.15, 0.2),
    "concrete": (0.025, 0.05, 0.075),
    "energy": (0.25, 0.5, 0.75),
    "kin8nm": (150.0, 200.0, 250.0),
    "naval": (30000.0, 40000.0, 50000.0),
    "power": (0.05, 0.1, 0.15),
    "protein": (0.025, 0.05, 0.075),
    "wine": (2.5, 3.0, 3.5),
    "yacht": (0.25, 0.5, 0.75),
    "diabetes": (0.0002, 0.0003, 0.0004),
}
SMALLER = tuple(f"uci_regression/{name}" for name in TABLE if name != "protein")
LENGTH_SCALE = 0.01  # of the prior of the weights


@dataclasses.dataclass(frozen=True)
class Config:
    datasets: Distinct[str] = SMALLER  # TFDS names of sets with the columns x, y and test_in_splits
    splits: Positive[int] = 20  # splits of each set into a training and a test part; its first ones
    hidden: Positive[int] = 50  # units of the hidden layer
    epochs: Positive[int] = 4000  # passes over the training part
    most_steps: Positive[int] = 5000  # the train steps of a network are at most so many
    batch_size: Positive[int] = 128  # rows per step and network
    learning_rate: Positive[float] = 1e-3  # of Adam
    rates: Distinct[Annotated[float, Between(0, 1, open_high=True)]] = (0.005, 0.01, 0.05, 0.1)  # probabilities to drop
    held_out: Fraction = 0.2  # share of the training part on which rate and precision are chosen
    masks: Positive[int] = 1000  # of dropout in the test
    held_out_masks: Positive[int] = 100  # where rate and precision are chosen


PRESETS = {
    "paper": Config(),
    "protein": Config(datasets=("uci_regression/protein",), splits=5, hidden=100, epochs=2000, most_steps=640_000),
    "quick": Config(datasets=("diabetes",), epochs=100),
    "smoke": Config(datasets=("diabetes",), splits=2, hidden=8, epochs=1, rates=(0.05,), masks=3, held_out_masks=3),
}  # fmt: skip

PRINTED = 0.005  # half a unit of the last digit of the table
SHORT = (
    "A network takes at most 5,000 steps here and 12,000 to 330,000 in the author's run. We suspect that this is the "
    "reason where it is missed, and have not tried more steps."
)
table_claims = [
    Claim(
        f"{metric}/{name}",
        paper="Gal & Ghahramani 2016",
        locator=f"the author's README of 2018, {name}, {where}",
        claimed=value,
        tolerance=max(2 * error, PRINTED),
        unit="nats" if metric == "nll" else "",
        preset="protein" if name == "protein" else "paper",
        note="" if name == "protein" else SHORT,
    )
    for name, (rmse, rmse_error, likelihood, likelihood_error) in TABLE.items()
    for metric, value, error, where in (
        ("rmse", rmse, rmse_error, "RMSE"),
        ("nll", -likelihood, likelihood_error, "log likelihood"),
    )
]
CLAIMS = (
    *table_claims,
    Claim("rmse/diabetes", paper="our bar", locator="bundled diabetes", at_most=55.8, preset="quick",
          note="linear regression: 56.0"),
)  # fmt: skip


def repeats(cfg: Config, seeds: Sequence[int]) -> int:
    """A metric has a value for each seed and split."""
    return cfg.splits * len(seeds)


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    tables, found = splits.tables(cfg.datasets, cfg.splits), {}
    require_precisions(tables)
    for name, table in tables.items():
        rmse, nll, rate, tau = averaged(cfg, run / name, table, np.array(TAUS[name]))
        found |= {f"rmse/{name}": rmse, f"nll/{name}": nll, f"rate/{name}": rate, f"tau/{name}": tau}
    return found


def require_precisions(names: Iterable[str]) -> None:
    """Raises InputError for a set without precisions to choose from, before any training."""
    for name in names:
        if name not in TAUS:
            raise InputError(f"data set {name}, expected one of {', '.join(TAUS)}: no precisions are known for another")


def averaged(
    cfg: Config, run: Run, table: data.Regression, taus: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """RMSE, NLL in nats, dropout rate and precision of each seed and split, [S · K] each."""
    test, rates = table.test, np.array(cfg.rates, np.float32)
    learnt, held = map(
        np.stack, zip(*(data.held_out(~each, cfg.held_out, k) for k, each in enumerate(test)), strict=True)
    )
    tried = np.tile(rates, (len(run.seeds), cfg.splits, 1))  # [S, K, R]
    outputs, y = predicted(cfg, run / "rates", table, learnt, held, tried, taus, cfg.held_out_masks)
    scores = np.stack([nats(outputs, y, tau) for tau in taus], -1).reshape(*tried.shape[:2], -1)  # [S, K, R · τ]
    rate, tau = np.divmod(scores.argmin(-1), len(taus))  # [S, K] each
    outputs, y = predicted(cfg, run / "all", table, ~test, test, rates[rate][..., None], taus, cfg.masks)
    rmse = np.sqrt(np.mean((outputs.mean(-2) - y) ** 2, -1))[..., 0]
    nll = np.stack([nats(outputs, y, each)[..., 0] for each in taus], -1)  # [S, K, τ]
    nll = np.take_along_axis(nll, tau[..., None], -1)[..., 0]
    return rmse.ravel(), nll.ravel(), rates[rate].ravel(), taus[tau].ravel()


def predicted(
    cfg: Config,
    run: Run,
    table: data.Regression,
    train: np.ndarray,
    test: np.ndarray,
    rates: np.ndarray,
    taus: np.ndarray,
    masks: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [S, K, n, T, M] of networks with dropout at these rates [S, K, n], and targets [K, 1, M].

    All networks are trained together, each split's on its rows `train`, and give their outputs for its rows `test`,
    both bool [K, N] with as many rows for each split, with T masks.
    """
    mine = functools.partial(splits.by_network, networks=rates.shape[-1], seeds=len(rates))
    decay = LENGTH_SCALE**2 * (1 - rates.ravel()) / (2 * mine(train.sum(1)) * np.median(taus))
    extra = {
        "scale": mine([splits.scale(table, rows) for rows in train]),  # [L, ...]
        "prior": {"rate": rates.ravel(), "decay": decay.astype(np.float32)},
    }
    *keys, key_test = (splits.numbered(key, rates[0].size) for key in run.keys(3))  # [L] each
    states = start(
        network(cfg.hidden), optax.adam(cfg.learning_rate), *keys, np.zeros((1, table.x.shape[1]), np.float32)
    )
    steps = min(cfg.most_steps, max(1, round(cfg.epochs * train[0].sum() / cfg.batch_size)))
    states = fit(
        holding(step_of(cfg.learning_rate), {"x": table.x, "y": table.y}),
        states._replace(extra=extra),
        splits.orders(train, rates.shape[-1], cfg.batch_size, run.seeds),
        steps=steps,
        run=run,
    )
    x, y = (np.stack([column[rows] for rows in test]) for column in (table.x, table.y))  # [K, M, D], [K, M]
    outputs = sampled(states.params, states.extra, key_test, mine(x), masks)  # [L, T, M]
    return np.asarray(outputs, np.float64).reshape(*rates.shape, masks, -1), y[:, None].astype(np.float64)


def network(hidden: int) -> MLP:
    return MLP((hidden,), classes=1, kernel_init=jax.nn.initializers.glorot_uniform())


@functools.cache
def step_of(learning_rate: float):
    """The step of all networks, whose batch names the rows, int [L, B], of a table of inputs and targets."""
    return splits.of_rows(make_step(loss, optax.adam(learning_rate)))


def loss(variables: Tree, batch: Batch, key: Array):
    """The squared error of the standardised target with a mask for each row, plus the decay of the kernels."""
    scale, prior, params = variables["scale"], variables["prior"], variables["params"]
    kept = masks_of(key, prior["rate"], params, len(batch["x"]))
    output = outputs_of(params, scale, kept, batch["x"])
    error = ((output - (batch["y"] - scale["y_mean"]) / scale["y_deviation"]) ** 2).mean()
    squares = sum(jnp.sum(layer["kernel"] ** 2) for layer in params.values())
    return error + prior["decay"] * squares, ({}, {"squared_error": error})


def masks_of(key: Array, rate: Array, params: Tree, *rows: int) -> tuple[Array, Array]:  # -> [*rows, D], [*rows, H]
    """By what inputs and hidden units are multiplied: 0 for those that are dropped, 1 / (1 − rate) for the others."""
    widths = params["Dense_0"]["kernel"].shape
    kept = (jax.random.bernoulli(k, 1 - rate, (*rows, n)) for k, n in zip(jax.random.split(key), widths, strict=True))
    first, second = (each / (1 - rate) for each in kept)
    return first, second


def outputs_of(params: Tree, scale: Tree, masks: tuple[Array, Array], x: Array) -> Array:  # [B, D] -> [B]
    """Outputs for a target that is standardised. The masks are of each row, [B, ...], or the same [...] for all."""
    x = (x - scale["x_mean"]) / scale["x_deviation"] * masks[0]
    hidden = jax.nn.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]) * masks[1]
    return (hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])[:, 0]


@functools.partial(jax.jit, static_argnums=4)
def sampled(params: Tree, extra: Tree, keys: Array, x: Array, masks: int) -> Array:  # x [L, M, D] -> [L, T, M]
    """The outputs of each network for its rows with T masks, in the unit of the target."""

    def of_network(given: tuple[Tree, Tree, Array, Array]) -> Array:
        params, extra, key, x = given
        scale = extra["scale"]
        once = lambda key: outputs_of(params, scale, masks_of(key, extra["prior"]["rate"], params), x)
        outputs = jax.lax.map(once, jax.random.split(key, masks))
        return outputs * scale["y_deviation"] + scale["y_mean"]

    return jax.lax.map(of_network, (params, extra, keys, x))


def nats(outputs: np.ndarray, y: np.ndarray, tau: float) -> np.ndarray:  # [..., T, M], [..., M] -> [...]
    """Minus the log of the density of N(output, 1 / τ), averaged over masks before the log, over rows after it."""
    exponents = -0.5 * tau * (y[..., None, :] - outputs) ** 2
    most = exponents.max(-2, keepdims=True)
    log_mean = np.log(np.exp(exponents - most).mean(-2)) + most[..., 0, :]
    return -np.mean(log_mean + 0.5 * np.log(tau / (2 * np.pi)), -1)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
