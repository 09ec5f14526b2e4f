"""Ensembles of five networks that predict a mean and a variance reach the paper's errors on UCI's sets for regression.

Lakshminarayanan, Pritzel & Blundell 2017, "Simple and scalable predictive uncertainty estimation using deep ensembles",
Table 1.

    python experiments/tabular/ensembles_uci.py --preset paper --seeds 1 --workdir runs/uci
    python experiments/tabular/ensembles_uci.py --preset protein --seeds 1 --workdir runs/uci-protein

Expected: root mean squared error (RMSE) and negative log likelihood (NLL) of each set within the spread that the paper
prints behind ±, in ten and five minutes on a core that did other work too. Our goal, declared before the run: seven or
more of the nine errors, and as many likelihoods as there are within it.

All networks of a set, five for each of the 20 splits (5 of protein), are one fit: they are the seed axis of its state,
so that they are one compiled program, and a metric has one value per split and seed. Each has a hidden layer and learns
for 40 epochs to give the target a high likelihood, at the inputs and at adversarial ones, which are moved by a
hundredth of each feature's range in the direction in which the likelihood falls. An ensemble predicts the Gaussian with
the mean and variance of the mixture of its members.

The paper says that Adam's learning rate was 0.1, which does not give its numbers: in a pilot the error on boston was
six times as large. Here each split chooses among five rates. One network for each rate learns from four fifths of the
split's training part, and the lowest NLL on the other fifth decides; the five members then learn from all of the
training part. The metric `rate` is what was chosen. Nothing else differs from the paper but the rows left over by full
batches, which here begin the next epoch.

The figure `coverage` shows how many test targets are within the central intervals of some probability.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, losses, splits
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Metrics, State, Tree, holding, make_step, start
from dl_jax.harness import Between, Claim, Distinct, Fraction, NonNegative, Positive, Run, curves_figure, launch
from dl_jax.models.vision.mlp import MLP

TABLE = {  # RMSE and NLL of the paper's ensembles, each with the spread that it prints
    "boston": (3.28, 1.00, 2.41, 0.25),
    "concrete": (6.03, 0.58, 3.06, 0.18),
    "energy": (2.09, 0.29, 1.38, 0.22),
    "kin8nm": (0.09, 0.00, -1.20, 0.02),
    "naval": (0.00, 0.00, -5.63, 0.05),
    "power": (4.11, 0.17, 2.79, 0.04),
    "protein": (4.71, 0.06, 2.83, 0.02),
    "wine": (0.64, 0.04, 0.94, 0.12),
    "yacht": (1.58, 0.48, 1.18, 0.21),
}
SMALLER = tuple(f"uci_regression/{name}" for name in TABLE if name != "protein")


@dataclasses.dataclass(frozen=True)
class Config:
    datasets: Distinct[str] = SMALLER  # TFDS names of sets with the columns x, y and test_in_splits
    splits: Positive[int] = 20  # splits of each set into a training and a test part; its first ones
    members: Positive[int] = 5  # networks of an ensemble
    hidden: Positive[int] = 50  # units of the hidden layer
    epochs: Positive[int] = 40  # passes over the training part
    batch_size: Positive[int] = 100  # rows per step and network
    rates: Distinct[Annotated[float, Between(low=0, open_low=True)]] = (0.001, 0.003, 0.01, 0.03, 0.1)  # to choose from
    held_out: Fraction = 0.2  # share of the training part on which the learning rate is chosen
    epsilon: NonNegative[float] = 0.01  # by how much adversarial inputs move, as a share of each feature's range


PRESETS = {
    "paper": Config(),
    "protein": Config(datasets=("uci_regression/protein",), splits=5, hidden=100),
    "quick": Config(datasets=("diabetes",)),
    "smoke": Config(datasets=("diabetes",), splits=2, members=2, hidden=8, epochs=1, rates=(0.003, 0.01)),
}  # fmt: skip

PILOTS = "in pilots on the training rows of the first split, in four parts,"
NOTES = {  # of the claims that were missed
    "rmse/kin8nm": "The paper prints two digits; we do not know what makes ours better.",
    "nll/kin8nm": f"The adversarial inputs are the reason: {PILOTS} the NLL after 20 epochs is -1.15 with them and "
    "-1.20 without.",
    "rmse/naval": f"The adversarial inputs are a reason: {PILOTS} the error after 10 epochs is 0.0095 with them and "
    "0.0051 without. We suspect that a hundredth of each feature's range is more than what tells targets apart, as the "
    "features nearly determine each other.",
    "nll/naval": "See its error: a mean NLL of -5.63 needs errors of a tenth of ours.",
    "nll/yacht": f"The intervals are far too wide, as the figure shows. We do not know why; {PILOTS} the NLL without "
    "adversarial inputs is no better.",
    "nll/protein": "We do not know why; the error is the paper's.",
}
PRINTED = 0.005  # half a unit of the last digit of the table, where the spread is below it
table_claims = [
    Claim(
        f"{metric}/{name}",
        paper="Lakshminarayanan et al. 2017",
        locator=f"Table 1, {name}, {metric.upper()} of deep ensembles",
        claimed=value,
        tolerance=max(spread, PRINTED),
        unit="nats" if metric == "nll" else "",
        preset="protein" if name == "protein" else "paper",
        note=NOTES.get(f"{metric}/{name}", ""),
    )
    for name, (rmse, rmse_spread, nll, nll_spread) in TABLE.items()
    for metric, value, spread in (("rmse", rmse, rmse_spread), ("nll", nll, nll_spread))
]
CLAIMS = (
    *table_claims,
    Claim(
        "nll/diabetes",
        paper="our bar",
        locator="bundled diabetes",
        at_most=5.45,
        unit="nats",
        preset="quick",
        note="linear regression with one variance: 5.452 nats",
    ),
)
KEEPS = ("coverage.png",)  # files in the run's folder


def repeats(cfg: Config, seeds: Sequence[int]) -> int:
    """A metric has a value for each seed and split."""
    return cfg.splits * len(seeds)


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    tables = splits.tables(cfg.datasets, cfg.splits)
    for name, table in tables.items():
        require(cfg, name, table)
    found, curves = {}, {}
    for name, table in tables.items():
        rmse, nll, rate, z = ensembles(cfg, run / name, table)
        found |= {f"rmse/{name}": rmse, f"nll/{name}": nll, f"rate/{name}": rate}
        curves[name] = coverage(z)
    run.figure("coverage", 0, lambda: curves_figure(
        {**curves, "expected": (SHARES, SHARES)}, xlabel="probability of the interval",
        ylabel="share of the test targets in it"))  # fmt: skip
    return found


def require(cfg: Config, name: str, table: data.Regression) -> None:
    """Raises InputError for a split with too few rows to hold some out, before any training."""
    for k, test in enumerate(table.test):
        if (~test).sum() < 2 / cfg.held_out:
            raise InputError(
                f"split {k} of {name} has {(~test).sum()} training rows, expected {2 / cfg.held_out:g} or more, so "
                "that some can be held out; raise --held-out or choose another set"
            )


def ensembles(cfg: Config, run: Run, table: data.Regression) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """RMSE, NLL in nats and learning rate of the ensemble of each seed and split, [S · K] each, and (y − μ) / σ."""
    test, seeds, networks = table.test, len(run.seeds), networks_of(cfg)
    learnt, held = zip(
        *(data.held_out(rows, cfg.held_out, k) for k, rows in enumerate(~test)), strict=True
    )  # K times [N]
    choices = np.array(cfg.rates, np.float32)  # [R]
    rates = np.tile(choices, (seeds, cfg.splits, 1))  # [S, K, R]
    mean, variance, y, _ = predicted(cfg, run / "rates", networks, table, np.stack(learnt), rates)  # [S, K, R, N] each
    scores = over(losses_of(mean, variance, y), np.stack(held)[:, None])  # [S, K, R]
    best = choices[np.where(np.isfinite(scores), scores, np.inf).argmin(-1)]  # [S, K]
    rates = np.repeat(best[..., None], cfg.members, -1)  # [S, K, M]
    mean, variance, y, deviation = predicted(cfg, run / "members", networks, table, ~test, rates)
    mean, variance, y = mean.mean(2), variance.mean(2) + mean.var(2), y[:, :, 0]  # [S, K, N], of the mixture
    rmse = np.sqrt(over((y - mean) ** 2, test)) * deviation
    nll = over(losses_of(mean, variance, y), test) + np.log(deviation)
    z = ((y - mean) / np.sqrt(variance))[np.broadcast_to(test, y.shape)]
    return rmse.ravel(), nll.ravel(), best.ravel(), z


def predicted(
    cfg: Config, run: Run, networks: "Networks", table: data.Regression, train: np.ndarray, rates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means, variances and targets [S, K, n, N] of all rows by networks at these rates [S, K, n], and σ of y [K].

    All networks are trained together, each split's on its rows `train`, bool [K, N] with as many rows for each split.
    Means, variances and targets are in units of the standard deviation of the split's training targets, which comes
    last.
    """
    of_split, n = [scale(table, rows) for rows in train], rates.shape[-1]
    keys = (splits.numbered(key, rates[0].size) for key in run.keys(2))  # [L] each
    states = start(networks.model, networks.tx, *keys, np.zeros((1, table.x.shape[1]), np.float32))
    hyperparams = {**states.opt_state.hyperparams, "learning_rate": rates.ravel()}
    extra = {"scale": splits.by_network(of_split, n, len(rates))}
    states = states._replace(extra=extra, opt_state=states.opt_state._replace(hyperparams=hyperparams))
    states = fit(
        holding(networks.step, {"x": table.x, "y": table.y}),
        states,
        splits.orders(train, n, cfg.batch_size, run.seeds),
        steps=max(1, round(cfg.epochs * int(train[0].sum()) / cfg.batch_size)),
        run=run,
    )
    mean, variance = networks.predict(states.variables, {"x": table.x})  # [L, N] each
    centre, deviation = (np.array([each[name] for each in of_split]) for name in ("y_mean", "y_deviation"))  # [K]
    y = (table.y - centre[:, None, None]) / deviation[:, None, None]  # [K, 1, N]
    shape = (*rates.shape, len(table.y))
    wide = lambda values: np.asarray(values, np.float64).reshape(shape)
    return wide(mean), wide(variance), np.broadcast_to(y.astype(np.float64), shape), deviation


class Networks(NamedTuple):
    """What the networks of a set have in common. They are compiled once for both fits."""

    model: MLP
    tx: optax.GradientTransformation  # whose learning rate is in its state
    step: Callable[[Tree, State, Batch], tuple[State, Metrics]]
    predict: Callable[[Tree, Mapping[str, np.ndarray]], Any]


def networks_of(cfg: Config) -> Networks:
    model, tx = network(cfg.hidden), optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
    predict = lambda variables, batch: gaussian(model, variables["params"], inputs(variables["scale"], batch["x"]))
    step = splits.of_rows(make_step(functools.partial(loss, model, cfg.epsilon), tx))
    return Networks(model, tx, step, collector(predict, 1000))


def network(hidden: int) -> MLP:
    """One hidden layer and two outputs, with kernels as Torch draws them: uniform within ±1 / √fan-in."""
    init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return MLP((hidden,), classes=2, kernel_init=init)


def scale(table: data.Regression, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and deviation of inputs and target in these rows, and the range of each input in units of its deviation."""
    found = splits.scale(table, rows)
    return {**found, "x_range": np.ptp(table.x[rows], 0) / found["x_deviation"]}


def inputs(scale: Tree, x: Array) -> Array:  # [B, D] -> [B, D]
    return (x - scale["x_mean"]) / scale["x_deviation"]


def gaussian(model: MLP, params: Tree, x: Array) -> tuple[Array, Array]:  # [B, D] -> [B], [B]
    """The mean and the variance of the target, both as if it were standardised."""
    outputs: Any = model.apply({"params": params}, x, train=True)
    return outputs[:, 0], jax.nn.softplus(outputs[:, 1]) + 1e-6


def loss(model: MLP, epsilon: float, variables: Tree, batch: Batch, key: Array):
    """The NLL at the inputs plus that at adversarial ones (Algorithm 1)."""
    scale, params = variables["scale"], variables["params"]
    x, y = inputs(scale, batch["x"]), (batch["y"] - scale["y_mean"]) / scale["y_deviation"]
    nll = lambda x: losses.gaussian_nll(*gaussian(model, params, x), y).mean()
    value, slope = jax.value_and_grad(nll)(x)
    moved = x + epsilon * scale["x_range"] * jnp.sign(jax.lax.stop_gradient(slope))
    return value + nll(moved), ({}, {"nll": value})


def losses_of(mean: np.ndarray, variance: np.ndarray, y: np.ndarray) -> np.ndarray:  # [...] three times -> [...]
    """The NLL of each target by itself."""
    flat = jax.jit(losses.gaussian_nll)(mean.ravel(), variance.ravel(), y.ravel())
    return np.asarray(flat, np.float64).reshape(y.shape)


def over(values: np.ndarray, rows: np.ndarray) -> np.ndarray:  # [..., N], bool [..., N] -> [...]
    """The mean of the values in these rows."""
    return (values * rows).sum(-1) / rows.sum(-1)


SHARES = np.linspace(0, 1, 41)[1:-1]


def coverage(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n], (y − μ) / σ -> probabilities, shares
    """Which share of the targets is within the central interval of each probability."""
    half_width = np.asarray(jax.jit(jax.scipy.special.ndtri)((1 + SHARES) / 2))
    return SHARES, (np.abs(z)[:, None] <= half_width).mean(0)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
