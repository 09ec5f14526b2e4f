"""NUTS finds the posterior of the eight schools as posteriordb has it; mean-field variational inference does not.

The data are those of Rubin 1981, "Estimation in parallel randomized experiments", Table 1: by how much coaching raised
the scores in eight schools, and the standard errors. The model is the non-centred one of posteriordb
(github.com/stan-dev/posteriordb, eight_schools-eight_schools_noncentered):

    effect_j ~ N(θ_j, error_j²),  θ_j = μ + τ z_j,  z_j ~ N(0, 1),  μ ~ N(0, 5²),  τ ~ half-Cauchy(5)

    python experiments/learning/eight_schools.py --preset paper --seeds 5 --workdir runs/eight_schools

It needs `pip install -e '.[bayes]'`. Expected, in four minutes on a busy core: the posterior means of μ, τ and all θ
by NUTS (Hoffman & Gelman 2014), with NumPyro, are in every seed within three standard errors of posteriordb's. These
are the Monte-Carlo standard errors of both sides combined: the deviation of the draws, divided by the root of their
effective number. Mean-field variational inference has a smaller mean of τ than NUTS: its Gaussian factors, one for each
unconstrained variable, cannot be as wide for log τ as the posterior is.

NUTS is NumPyro's own loop. Variational inference is a loss of ours: with `potential`, which NumPyro makes of the model,
it is minus the evidence lower bound up to a constant, and `fit` minimises it. The metric `divergences` counts the draws
after which NUTS left the energy's level, `r_hat` is the largest of all variables, and the figure `posterior` shows τ
against θ of the first school.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax.core.errors import not_installed
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Tree, init_states, make_step, per_seed
from dl_jax.core.stream import no_data
from dl_jax.harness import Between, Claim, Positive, Probability, Run, launch

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)  # points of the test
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)
REFERENCE = {  # posteriordb's means and their Monte-Carlo standard errors
    "mu": (4.41052, 0.03304),
    "tau": (3.60206, 0.03186),
    "theta1": (6.15050, 0.05574),
    "theta2": (4.93958, 0.04623),
    "theta3": (3.90591, 0.05423),
    "theta4": (4.79602, 0.04749),
    "theta5": (3.61444, 0.04615),
    "theta6": (4.05115, 0.04852),
    "theta7": (6.31717, 0.04988),
    "theta8": (4.88400, 0.05425),
}


@dataclasses.dataclass(frozen=True)
class Config:
    chains: Positive[int] = 4  # of NUTS, for each seed
    warmup: Positive[int] = 2000  # draws of a chain while step size and mass are adapted
    draws: Annotated[int, Between(low=4)] = 10_000  # of a chain after that
    accept: Probability = 0.95  # the acceptance probability to which the step size is adapted
    vi_steps: Positive[int] = 5000  # steps of variational inference
    vi_samples: Positive[int] = 10  # draws in each step, of which the bound is the mean
    learning_rate: Positive[float] = 0.01  # of Adam
    vi_draws: Positive[int] = 40_000  # of the variational posterior, to compare with


PRESETS = {
    "paper": Config(),
    "quick": Config(warmup=500, draws=1000, vi_steps=1000, vi_draws=4000),
    "smoke": Config(chains=2, warmup=20, draws=20, vi_steps=2, vi_samples=2, vi_draws=4),
}

within = functools.partial(Claim, paper="posteriordb", at_most=3, worst=True, unit="standard errors")
CLAIMS = (
    *(within(f"distance/{name}", locator=f"eight_schools_noncentered, mean of {name}") for name in REFERENCE),
    Claim("tau/vi", versus="tau/nuts", paper="our order", locator="mean-field variational inference below NUTS"),
    *(within(f"distance/{name}", locator=f"eight_schools_noncentered, mean of {name}", preset="quick")
      for name in ("mu", "tau")),
)  # fmt: skip
KEEPS = ("posterior.png",)  # files in the run's folder

Draws = Mapping[str, np.ndarray]  # of each name of REFERENCE [S, chains, draws]


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    of, keys = posterior(), run.keys(4)  # [S] each
    nuts, divergences = by_nuts(cfg, of, keys[0])
    approximate = by_vi(cfg, run / "vi", of, *keys[1:])
    run.figure("posterior", 0, lambda: clouds({"NUTS": nuts, "variational inference": approximate}))
    found = [judged({name: each[seed] for name, each in nuts.items()}) for seed in range(len(run.seeds))]
    return {
        **{f"distance/{name}": np.array([distance[name] for distance, _ in found]) for name in REFERENCE},
        **{f"{name}/nuts": nuts[name].mean((1, 2)) for name in ("mu", "tau")},
        **{f"{name}/vi": approximate[name].mean((1, 2)) for name in ("mu", "tau")},
        "r_hat": np.array([r_hat for _, r_hat in found]),
        "divergences": divergences.astype(float),
    }


class Posterior(NamedTuple):
    """What NumPyro makes of a model."""

    potential: Callable[[Tree], Array]  # minus the log joint density of unconstrained variables
    constrained: Callable[[Tree], Tree]  # from unconstrained variables to those of the model
    shapes: Mapping[str, tuple[int, ...]]  # of the unconstrained variables


def posterior() -> Posterior:
    """The eight schools. Raises InputError where NumPyro is not installed."""
    try:
        import numpyro
        from numpyro import distributions as dist
        from numpyro.infer.util import constrain_fn, potential_energy
    except ModuleNotFoundError as error:
        raise not_installed("the model of the schools", error, "bayes") from error

    def schools() -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([len(EFFECTS)]))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("effect", dist.Normal(theta, ERRORS), obs=EFFECTS)

    potential: Any = functools.partial(potential_energy, schools, (), {})
    return Posterior(
        potential=potential,
        constrained=functools.partial(constrain_fn, schools, (), {}, return_deterministic=True),
        shapes={"mu": (), "tau": (), "z": EFFECTS.shape},
    )


def by_nuts(cfg: Config, of: Posterior, keys: Array) -> tuple[Draws, np.ndarray]:
    """Draws by NUTS, and the number of divergent ones [S]. The chains of all seeds [S] advance together."""
    from numpyro.infer import MCMC, NUTS

    mcmc = MCMC(
        NUTS(potential_fn=of.potential, target_accept_prob=cfg.accept),
        num_warmup=cfg.warmup,
        num_samples=cfg.draws,
        num_chains=len(keys) * cfg.chains,
        chain_method="vectorized",
        progress_bar=False,
    )

    @jax.jit  # one program, where NumPyro alone would compile its steps one by one
    def run(keys: Array) -> tuple[Tree, Array]:
        each = jax.vmap(lambda key: jax.random.split(key, cfg.chains))(keys).ravel()  # [S · chains]
        begin = jax.vmap(lambda key: dict(zip(of.shapes, uniform(key, of.shapes.values()), strict=True)))(each)
        mcmc.run(each, init_params=begin, extra_fields=("diverging",))
        shaped = lambda x: x.reshape(len(keys), cfg.chains, *x.shape[1:])
        free = jax.tree.map(shaped, mcmc.get_samples(group_by_chain=True))  # [S, chains, draws, ...]
        divergences = shaped(mcmc.get_extra_fields(group_by_chain=True)["diverging"]).sum((1, 2))
        return jax.vmap(jax.vmap(jax.vmap(of.constrained)))(free), divergences

    found, divergences = jax.tree.map(np.asarray, run(keys))
    return named(found), divergences


def uniform(key: Array, shapes: Iterable[tuple[int, ...]]) -> list[Array]:
    """Unconstrained variables between −2 and 2, where chains begin, as Stan's do."""
    return [jax.random.uniform(jax.random.fold_in(key, i), each, minval=-2, maxval=2) for i, each in enumerate(shapes)]


def by_vi(cfg: Config, run: Run, of: Posterior, key_init: Array, key: Array, key_draws: Array) -> Draws:
    """Draws [S, 1, n] of the Gaussian with independent unconstrained variables that has the largest bound."""
    tx = optax.adam(cfg.learning_rate)
    filled = lambda value: {name: np.full((len(key), *shape), value, np.float32) for name, shape in of.shapes.items()}
    params = {"mean": filled(0), "log_deviation": filled(-1)}
    step = per_seed(make_step(functools.partial(loss, of.potential, cfg.vi_samples), tx))
    states = fit(step, init_states(key, {"params": params}, tx), no_data, steps=cfg.vi_steps, run=run)
    drawn = jax.jit(jax.vmap(lambda params, key: jax.vmap(of.constrained)(draws(params, key, cfg.vi_draws))))
    return named(jax.tree.map(lambda x: np.asarray(x)[:, None], drawn(states.params, key_draws)))


def loss(potential: Callable[[Tree], Array], samples: int, variables: Tree, batch: Batch, key: Array):
    """Minus the evidence lower bound, up to a constant: the mean potential of draws, minus their entropy."""
    params = variables["params"]
    energy = jax.vmap(potential)(draws(params, key, samples)).mean()
    entropy = jnp.sum(jnp.array([leaf.sum() for leaf in jax.tree.leaves(params["log_deviation"])]))
    return energy - entropy, ({}, {})


def draws(params: Tree, key: Array, n: int) -> Tree:
    """n draws of independent Gaussians, [n, ...] for each leaf, by the reparametrisation mean + deviation · ε."""
    leaves, structure = jax.tree.flatten(params["mean"])
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return jax.tree.map(
        lambda key, mean, log_deviation: mean + jnp.exp(log_deviation) * jax.random.normal(key, (n, *mean.shape)),
        keys, params["mean"], params["log_deviation"],
    )  # fmt: skip


def named(found: Mapping[str, np.ndarray]) -> Draws:  # theta [..., 8]
    """μ, τ and each θ by its name."""
    thetas = {f"theta{i + 1}": found["theta"][..., i] for i in range(len(EFFECTS))}
    return {"mu": found["mu"], "tau": found["tau"], **thetas}


def judged(chains: Draws) -> tuple[dict[str, float], float]:  # [chains, draws] each
    """How many combined standard errors each mean is from posteriordb's, and the largest R̂."""
    from numpyro.diagnostics import summary

    distance, r_hat = {}, 0.0
    of = summary({name: np.asarray(each, np.float64) for name, each in chains.items()}, group_by_chain=True)
    for name, (mean, error) in REFERENCE.items():
        own = of[name]["std"] / np.sqrt(of[name]["n_eff"])
        distance[name] = float(abs(of[name]["mean"] - mean) / np.hypot(own, error))
        r_hat = max(r_hat, float(of[name]["r_hat"]))
    return distance, r_hat


def clouds(found: Mapping[str, Draws], most: int = 4000):
    """τ against θ of the first school, draws of the first seed, one panel for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, len(found), sharex=True, sharey=True)
    for axes, (method, each) in zip(panels, found.items(), strict=True):
        theta, tau = (each[name][0].ravel() for name in ("theta1", "tau"))
        shown = slice(None, None, -(-len(tau) // most))
        axes.plot(theta[shown], tau[shown], ".", markersize=2, alpha=0.4)
        axes.set(title=method, xlabel="effect in school 1, θ₁", yscale="log")
    panels[0].set(ylabel="deviation between schools, τ")
    return figure


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
