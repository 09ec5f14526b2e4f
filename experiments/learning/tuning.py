"""Successive halving finds as good a learning rate, weight decay and momentum as a full search, in 30 % of its steps.

Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization" (arXiv:1502.07943),
with the rungs of Li et al. 2018, "Hyperband" (arXiv:1603.06560); Bergstra & Bengio 2012, "Random search for
hyper-parameter optimization" (JMLR 13).

    python experiments/learning/tuning.py --dataset mnist --preset paper --seeds 5 --workdir runs/tuning

It needs `pip install -e '.[tune]'`. Expected: the error of the winner on validation data is at most 0.2 points above
that of the full search. It was the same network in four of five seeds, and was claimed to be in all. Random search
with as many steps had an error of 6.1 % in the test where halving had 5.1. The structure that Optuna found was better
than one layer of 32 units in four of five seeds, so that this order is missed too. The run took two to three minutes
of a core of a Xeon.

A seed draws 27 random points of learning rate, weight decay and momentum. The full search trains a network for each for
2,700 steps. Halving compares all after 390 steps, goes on with nine, and after 1,170 with three. The networks are the
seed axis of one state, whose optimiser has hyper-parameters of its own for each (`optax.inject_hyperparams`): all
networks of all seeds are one compiled step. Those of a seed have the same initial weights and batches, so halving's
networks are the full search's, stopped early. A third search, `random`, is the first eight points, fully trained, which
takes about as many steps as halving.

A choice that changes the shapes of arrays needs a program of its own: Optuna's TPE sampler tries numbers of layers and
units, with the seeds' points that halving has found and the mean error of the seeds. The study is the file
`structures.journal` in the run's folder. A run that is killed goes on with the trials that it would have had.

All choices are made on validation data. The winners of the searches see the test split once, at the end. The figure
`search` shows the full search, and which networks went on.

Two rules are simulated. The best of 60 random trials is among the best twentieth of all points with a probability of
1 - 0.95^60 = 95.4 %. And random search misses the best value by less than a grid of as many points if one or two of
three dimensions matter, but by more if all three do.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, search
from dl_jax.core.devices import fetched
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, State, Step, Tree, make_step, per_seed, start
from dl_jax.harness import Claim, Positive, Probability, Run, launch, on_digits
from dl_jax.models.vision.mlp import MLP

if TYPE_CHECKING:
    import optuna


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train[:50000]"  # TFDS split to learn from
    validation_split: str = "train[50000:]"  # TFDS split on which all choices are made
    test_split: str = "test"  # TFDS split to test the winners on, once
    networks: Positive[int] = 27  # random points of a seed, a network for each
    eta: Positive[int] = 3  # networks of which one goes on at a rung
    first: Positive[int] = 390  # steps before the first rung
    steps: Positive[int] = 2700  # train steps of a network that nothing ends
    learning_rate: tuple[Positive[float], Positive[float]] = (1e-5, 1.0)  # of AdamW, lowest and highest, logarithmic
    weight_decay: tuple[Positive[float], Positive[float]] = (1e-4, 1.0)  # of AdamW, lowest and highest, logarithmic
    b1: tuple[Probability, Probability] = (0.0, 0.99)  # momentum of AdamW, lowest and highest
    hidden: Positive[int] = 32  # units of the hidden layer
    batch_size: Positive[int] = 32  # images per step and network
    trials: Positive[int] = 12  # structures that Optuna tries
    layers: tuple[Positive[int], Positive[int]] = (1, 3)  # hidden layers of a structure, fewest and most
    width: tuple[Positive[int], Positive[int]] = (16, 64)  # units of each, fewest and most
    searches: Positive[int] = 20_000  # simulated ones


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", train_split="train[:80%]", validation_split="train[80%:]", first=120, steps=1080,
                    trials=4),
    "smoke": Config(dataset="digits", train_split="train[:64]", validation_split="train[64:96]",
                    test_split="test[:40]", networks=2, eta=2, first=1, steps=2, hidden=4, batch_size=16, trials=1,
                    layers=(1, 1), width=(4, 4), searches=100),
}  # fmt: skip

PILOTS = "Five pilot seeds on the last 10,000 training images: "
ours = functools.partial(Claim, paper="our bar")
mnist = functools.partial(ours, given={"dataset": "mnist"})
CLAIMS = (
    mnist("validation_error/halving", versus="validation_error/full", claimed=0, tolerance=0.2, unit="%",
          locator="successive halving loses nothing to the full search",
          note=PILOTS + "the same winner in each. 0.2 points are 20 of 10,000 images."),
    mnist("same_winner", at_least=1, locator="the winner of successive halving is that of the full search",
          note="Declared after the first run. It is so in four of five seeds. In the fifth its winner was 0.02 points "
               "worse on validation data, two images of 10,000, and 0.19 points better in the test."),
    mnist("steps_share", at_most=100 / 3, unit="%", locator="steps of halving, of those of the full search"),
    mnist("test_error/halving", versus="test_error/full", claimed=0, tolerance=0.4, unit="%",
          locator="the winners in the test", note="They are 40 of 10,000 images."),
    mnist("test_error/structure", versus="test_error/halving", unit="%",
          locator="layers and units by Optuna against one layer of 32 units",
          note="Four seeds have 0.6 to 1.7 points less, and one has 0.8 more. The structure is chosen by the mean "
               "error of the seeds, with learning rates that were found for 32 units; we suspect that one seed's does "
               "not suit 63, and have not tried it. A pilot with 28x28 pixels, three seeds and four trials, on "
               "validation data: -0.8 points."),
    ours("best_of_60/simulated", claimed=95.39, tolerance=0.2, better="higher", unit="%",
         locator="the best of 60 trials is in the top 5 %, simulated",
         note="By calculation it is 1 - 0.95^60. The tolerance is three standard errors of 100,000 searches."),
    *(Claim(f"regret/{better}_{k}", versus=f"regret/{worse}_{k}", paper="Bergstra & Bengio 2012",
            locator=f"Figure 1, the order with {k} of 3 dimensions that matter, 64 points")
      for better, worse, k in (("random", "grid", 1), ("random", "grid", 2))),
    ours("regret/grid_3", versus="regret/random_3", locator="the order where all of 3 dimensions matter"),
    on_digits("test_error/halving", at_most=10.0, unit="%",
              note="logistic regression: 10.0 %; five seeds of the searches had 9.8 ± 0.8 %"),
)  # fmt: skip
KEEPS = ("search.png", "structures.journal")  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    ranges, schedule = space(cfg), search.rungs(cfg.networks, cfg.eta, cfg.first, cfg.steps)
    search.require_points({**ranges, "layers": search.Range(*cfg.layers), "width": search.Range(*cfg.width)})
    study = search.study(journal(run), "structures", {**dataclasses.asdict(cfg), "seeds": run.seeds})
    drawn = [search.drawn(ranges, cfg.networks, seed) for seed in run.seeds]
    points = {name: np.stack([each[name] for each in drawn]) for name in ranges}  # [S, n] each
    task, hidden = task_of(cfg, run), (cfg.hidden,)

    begin = started(task, hidden, points)
    full = trained(task, hidden, begin, cfg.steps, run / "full")
    scores = errors(task, hidden, full, task.validation)  # [S, n]
    halves = halved(task, hidden, begin, schedule, run / "halving")
    equal = search.steps_taken(schedule) // cfg.steps  # networks that a random search trains in the steps of halving
    chosen = {  # [S, 1] each
        "full": search.best(scores, 1),
        "random": search.best(scores[:, :equal], 1),
        "halving": halves[-1].numbers[:, :1],
    }
    structure, larger = structured(cfg, task, study, taken(points, chosen["halving"]), run)
    winners: dict[str, tuple[tuple[int, ...], State]] = {
        **{name: (hidden, rows(task, full, chosen[name])) for name in ("full", "random")},
        "halving": (hidden, halves[-1].states),
        "structure": (structure, larger),
    }
    run.figure("search", cfg.steps, lambda: scatter(points["learning_rate"], scores, halves))
    same = lambda value: np.full(len(run.seeds), float(value))
    return {
        **{f"{split}_error/{name}": errors(task, layers, states, records)[:, 0]
           for name, (layers, states) in winners.items()
           for split, records in (("validation", task.validation), ("test", task.test))},
        "same_winner": (chosen["halving"] == chosen["full"])[:, 0].astype(float),
        "steps_share": same(100 * search.steps_taken(schedule) / (cfg.networks * cfg.steps)),
        "layers": same(len(structure)),
        "units": same(sum(structure)),
        **simulated(cfg.searches, run.seeds),
    }  # fmt: skip


def space(cfg: Config) -> dict[str, search.Range]:
    """What a network of the seed axis has of its own."""
    return {
        "learning_rate": search.Range(*cfg.learning_rate, log=True),
        "weight_decay": search.Range(*cfg.weight_decay, log=True),
        "b1": search.Range(*cfg.b1),
    }


def journal(run: Run) -> Path | None:
    """The file of the structures. Raises InputError for an address: Optuna appends to a file of this machine."""
    if run.directory and "://" in str(run.directory):
        raise InputError(f"--workdir is {run.directory}, expected a folder of this machine, for Optuna's journal")
    return Path(run.directory) / "structures.journal" if run.directory else None


class Task(NamedTuple):
    """What all networks of a seed share: the order of batches and the random keys, so also the initial weights."""

    learn: list[data.Stream]  # of each seed
    validation: data.Columns
    test: data.Columns
    keys: tuple[Array, Array]  # [S] each, of the initial weights and of the training


def task_of(cfg: Config, run: Run) -> Task:
    train, validation, test = (
        pooled(data.grey_images(cfg.dataset, split))
        for split in (cfg.train_split, cfg.validation_split, cfg.test_split)
    )
    key_init, key = run.keys(2)
    return Task([data.shuffled(train, cfg.batch_size, seed) for seed in run.seeds], validation, test, (key_init, key))


def pooled(records: data.Columns) -> data.Columns:
    """Images [N, 28, 28, 1] as float32 [N, 14, 14, 1] in [0, 1], means of 2x2 pixels."""
    means = records["image"].reshape(-1, 14, 2, 14, 2, 1).mean((2, 4), dtype=np.float32)
    return {**records, "image": means / np.float32(255)}


class Parts(NamedTuple):
    """What the networks of a structure have in common. Each is compiled once for each number of networks."""

    model: MLP
    tx: optax.GradientTransformation  # whose hyper-parameters are in its state
    step: Step
    labels: Callable[[Tree, data.Columns], Any]


@functools.cache
def parts(hidden: tuple[int, ...]) -> Parts:
    """The parts of networks with these hidden layers."""
    model, tx = MLP(hidden), optax.inject_hyperparams(optax.adamw)(learning_rate=1.0)
    apply: Any = model.apply
    labels = collector(lambda variables, batch: apply(variables, batch["image"], train=False).argmax(-1), 1000)
    return Parts(model, tx, per_seed(make_step(classify.loss(model.apply), tx)), labels)


def started(task: Task, hidden: tuple[int, ...], points: Mapping[str, np.ndarray]) -> State:
    """Networks of all seeds at step 0, [S · n, ...], with these hyper-parameters, [S, n] each."""
    model, tx, *_ = parts(hidden)
    n = points["learning_rate"].shape[1]
    states = start(model, tx, *(jnp.repeat(key, n) for key in task.keys), jnp.zeros((1, 14, 14, 1)))
    own = {name: jnp.asarray(each.ravel()) for name, each in points.items()}
    hyperparams = {**states.opt_state.hyperparams, **own}
    return states._replace(opt_state=states.opt_state._replace(hyperparams=hyperparams))


def trained(task: Task, hidden: tuple[int, ...], states: State, steps: int, run: Run) -> State:
    """The networks [S · n, ...] after so many steps, counted from step 0."""
    n = len(states.step) // len(task.learn)
    stream = data.per_seed([each for each in task.learn for _ in range(n)])
    return fit(parts(hidden).step, states, stream, steps=steps, run=run)


def errors(task: Task, hidden: tuple[int, ...], states: State, records: data.Columns) -> np.ndarray:  # -> [S, n]
    """The errors of the networks [S · n, ...] in per cent."""
    labels = parts(hidden).labels(states.variables, records)  # [S · n, N]
    return 100 * (labels != records["label"]).mean(1).reshape(len(task.learn), -1)


def rows(task: Task, states: State, numbers: np.ndarray) -> State:  # [S · n, ...], int [S, k] -> [S · k, ...]
    """The networks with these numbers, of each seed."""
    seeds, k = numbers.shape
    flat = (numbers + len(states.step) // seeds * np.arange(seeds)[:, None]).ravel()
    host = fetched(states._replace(key=()))  # the next fit may lie on other devices
    return jax.tree.map(lambda leaf: leaf[flat], host)._replace(key=jnp.repeat(task.keys[1], k))


def taken(points: Mapping[str, np.ndarray], numbers: np.ndarray) -> dict[str, np.ndarray]:  # [S, n], [S, k] -> [S, k]
    """The points with these numbers, of each seed."""
    return {name: np.take_along_axis(each, numbers, 1) for name, each in points.items()}


class Survivors(NamedTuple):
    """The networks that a rung lets go on, or, after the last one, the winner; the best comes first."""

    numbers: np.ndarray  # int [S, k], of all networks of a seed
    states: State  # [S · k, ...]


def halved(
    task: Task, hidden: tuple[int, ...], states: State, schedule: tuple[search.Rung, ...], run: Run
) -> list[Survivors]:
    """Successive halving of networks [S · n, ...], by their errors on validation data: who goes on after each rung."""
    numbers, found = np.tile(np.arange(schedule[0].networks), (len(task.learn), 1)), []
    for i, (rung, left) in enumerate(zip(schedule, [each.networks for each in schedule[1:]] + [1], strict=True)):
        states = trained(task, hidden, states, rung.steps, run / f"rung{i}")
        going = search.best(errors(task, hidden, states, task.validation), left)  # [S, left]
        numbers, states = np.take_along_axis(numbers, going, 1), rows(task, states, going)
        found.append(Survivors(numbers, states))
    return found


def structured(
    cfg: Config, task: Task, study: "optuna.Study", points: Mapping[str, np.ndarray], run: Run
) -> tuple[tuple[int, ...], State]:
    """The hidden layers with the lowest mean error on validation data, and their networks [S, ...].

    Each seed has its own hyper-parameters, [S, 1] each.
    """

    @functools.cache
    def attempt(i: int, hidden: tuple[int, ...]) -> State:
        return trained(task, hidden, started(task, hidden, points), cfg.steps, run / f"structure{i}")

    def objective(trial: "optuna.Trial", i: int) -> float:
        layers = trial.suggest_int("layers", *cfg.layers)
        hidden = tuple(trial.suggest_int(f"width{j}", *cfg.width, log=True) for j in range(layers))
        return float(errors(task, hidden, attempt(i, hidden), task.validation).mean())

    trials = search.minimise(study, objective, cfg.trials, run.seeds[0])
    i = int(search.best(np.array([each.value for each in trials]), 1)[0])
    hidden = tuple(trials[i].params[f"width{j}"] for j in range(trials[i].params["layers"]))
    return hidden, attempt(i, hidden)


TRIALS, TOP = 60, 0.05  # of the rule that one of so many random trials is among the best twentieth
DIMENSIONS, EACH = 3, 4  # of the synthetic search, and the numbers that its grid has for each


def simulated(searches: int, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """How often the rule of 60 trials holds, in per cent, and what random search and a grid miss the best value by."""
    each = [simulated_once(searches, np.random.default_rng(seed)) for seed in seeds]
    return {name: np.array([one[name] for one in each]) for name in each[0]}


def simulated_once(searches: int, rng: np.random.Generator) -> dict[str, float]:
    """The mean over so many searches.

    In the second part the loss is the squared distance from the best point, which is drawn uniformly, over the first k
    of three dimensions: the others do not matter, which the searches do not know. Both try 64 points.
    """
    found = {"best_of_60/simulated": 100 * float((rng.random((searches, TRIALS)).min(1) < TOP).mean())}
    best = rng.random((searches, 1, DIMENSIONS))
    axis = (np.arange(EACH) + 0.5) / EACH
    grid = np.stack(np.meshgrid(*[axis] * DIMENSIONS), -1).reshape(-1, DIMENSIONS)  # [64, 3]
    tried = {"random": rng.random((searches, len(grid), DIMENSIONS)), "grid": grid}
    for name, points in tried.items():
        losses = np.cumsum((points - best) ** 2, -1).min(1).mean(0)  # [3], for k = 1, 2, 3
        found |= {f"regret/{name}_{k + 1}": float(loss) for k, loss in enumerate(losses)}
    return found


def scatter(rates: np.ndarray, scores: np.ndarray, halves: list[Survivors]):  # [S, n] each
    """Error against learning rate of the full search, of all seeds, and how far halving took each network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates.ravel(), scores.ravel(), ".", color="0.7", label="all networks, fully trained")
    for i, each in enumerate(halves):
        at = [np.take_along_axis(values, each.numbers, 1).ravel() for values in (rates, scores)]
        winner = i == len(halves) - 1
        axes.plot(*at, "*" if winner else "o", fillstyle="full" if winner else "none", markersize=5 + 3 * i,
                  label="winner of halving" if winner else f"goes on after rung {i + 1}")  # fmt: skip
    axes.plot(*(np.take_along_axis(values, search.best(scores, 1), 1).ravel() for values in (rates, scores)), "kx",
              label="winner of the full search")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation error (%)")
    axes.legend()
    return figure


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
