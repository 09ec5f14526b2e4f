"""A network that learns the digits two at a time forgets the old classes, unless it rehearses a few stored digits.

van de Ven & Tolias 2019, "Three scenarios for continual learning" (arXiv:1904.07734), split MNIST.

    python experiments/learning/continual.py --dataset mnist --preset paper --seeds 5 --workdir runs/continual

Expected, of the mean test accuracy over the five contexts after the last: where the network is not told the context and
has to name the digit (class-incremental), 25 % or less with penalties on the weights and with distillation, and 88 % or
more with rehearsal; where it is told (task-incremental), near 99 % with both. Of the cells of the paper's table,
distillation in class-incremental learning is missed: no seed remembers a class before the last two. The run took 144
minutes, first on one core and then on two, with other work beside it.

A context is two digits, for which the network is trained before it comes to the next two. In the scenario `task` it
is told the context of a test image and chooses one of two digits, in `domain` it is not told and answers whether the
digit is odd, and in `class` it is not told and chooses one of the digits seen so far. The methods are:

- none: nothing against forgetting.
- ewc: elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796), a penalty on changes of weights by the
  Fisher information of the contexts before.
- si: synaptic intelligence (Zenke et al. 2017, arXiv:1703.04200), a penalty by what a weight contributed to lowering
  the loss, this penalty included.
- lwf: learning without forgetting (Li & Hoiem 2017, arXiv:1606.09282), distillation of the network as it was before the
  context, on the images of this context.
- replay: as many stored digits of the contexts before in each batch. `budget` digits are stored, as many of each class.
- joint: the images of all contexts so far, which no method should beat.

The weights of the penalties are those of the authors' later code for each scenario, with which the table's numbers
were not made: "Three types of incremental learning" (Nature Machine Intelligence 4, 2022;
https://github.com/GMvandeVen/continual-learning). The figures have the accuracy by context, after the last one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Loss, State, Tree, init_states, init_variables, make_step, per_seed
from dl_jax.harness import Claim, Distinct, Positive, Run, curves_figure, launch, on_digits
from dl_jax.models.vision.mlp import MLP

Scenario = Literal["task", "domain", "class"]
Method = Literal["none", "ewc", "si", "lwf", "replay", "joint"]
CLASSES = 10
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
METHODS: tuple[Method, ...] = get_args(Method)
Weights = tuple[Positive[float], Positive[float], Positive[float]]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to test on
    contexts: Positive[int] = 5  # contexts, into which the ten classes are divided in their order
    hidden: tuple[Positive[int], ...] = (400, 400)  # ReLU units of each hidden layer
    steps: Positive[int] = 2000  # train steps in each context
    batch_size: Positive[int] = 128  # images of the context per step, over all devices
    learning_rate: Positive[float] = 1e-3  # learning rate of Adam
    ewc: Weights = (1e5, 1e10, 1e9)  # of half the penalty by the Fisher information, in task, domain and class
    fisher: Positive[int] = 1000  # images of a context from which the Fisher information is estimated
    si: Weights = (10.0, 5e4, 5e3)  # of the penalty by contributions, in task, domain and class
    damping: Positive[float] = 0.1  # ξ, added to the squared change of a weight in a context
    temperature: Positive[float] = 2.0  # of the distillation
    budget: Positive[int] = 2000  # stored digits, over all classes
    scan_steps: Positive[int] = 20  # steps per call of the compiled program
    scenarios: Distinct[Scenario] = SCENARIOS  # the scenarios
    methods: Distinct[Method] = METHODS  # the methods


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", hidden=(100, 100), steps=200, fisher=100, budget=400, scenarios=("class",)),
    "smoke": Config(dataset="digits", train_split="train[:100]", test_split="test[:50]", contexts=2, hidden=(4,),
                    steps=2, batch_size=16, fisher=16, budget=20, scan_steps=2, scenarios=("class",),
                    methods=("ewc", "replay")),
}  # fmt: skip

PAPER = "van de Ven & Tolias 2019"
MNIST = {"dataset": "mnist", "contexts": 5}
table = functools.partial(Claim, paper=PAPER, unit="%", better="higher", given=MNIST)
headline = functools.partial(Claim, paper=PAPER, unit="%", given=MNIST)
RECALLED = (  # scenario/method, mean, and twice the standard error of a mean of 5 by that of the paper's 20 seeds, or 1
    ("task/none", 87.19, 3.8), ("domain/none", 59.21, 8.2), ("class/none", 19.90, 1.0),
    ("task/si", 99.09, 1.0), ("domain/si", 65.36, 6.3), ("class/si", 19.99, 1.0),
    ("task/lwf", 99.57, 1.0), ("domain/lwf", 71.50, 6.5),
    ("task/joint", 99.66, 1.0), ("domain/joint", 98.42, 1.0), ("class/joint", 97.94, 1.0),
)  # fmt: skip
WEIGHT = "The penalty's weight is that of the authors' later code, not of this table."
CLAIMS = (
    table("task/ewc", claimed=98.64, tolerance=1.5, locator="Table 4, split MNIST, EWC, task", note=WEIGHT),
    table("domain/ewc", claimed=63.95, tolerance=7.6, locator="Table 4, split MNIST, EWC, domain",
          note="Twice the standard error of a mean of 5, of which the paper's 20 seeds have 1.90. " + WEIGHT),
    table("class/ewc", claimed=20.01, tolerance=1.5, locator="Table 4, split MNIST, EWC, class", note=WEIGHT),
    *(table(metric, claimed=mean, tolerance=tolerance, locator="Table 4, split MNIST, " + metric, verified=False,
            note=WEIGHT if metric.endswith("/si") else "")
      for metric, mean, tolerance in RECALLED),
    table("class/lwf", claimed=23.85, tolerance=1.8, locator="Table 4, split MNIST, class/lwf", verified=False,
          note="In all seeds only the last two digits are right, as without distillation. The authors' code compares "
               "the old classes within the softmax of all, with 0 for the new ones; we compare them alone. A pilot as "
               "theirs is, one seed on validation digits, had 20.2 %: what else differs is not known."),
    *(headline(f"class/{name}", at_most=25.0, locator=f"that {name} forgets classes") for name in ("ewc", "si", "lwf")),
    headline("class/replay", at_least=88.0, locator="that rehearsal keeps classes",
             note="The paper's rehearsal is of generated digits, 90.79 %; of stored ones it has iCaRL, 94.57 %."),
    on_digits("class/replay", at_least=90.0, unit="%",
              note="without rehearsal: 20 %. Missed: five seeds had 89.3 ± 0.9 %, and joint training, which should "
                   "be the most that rehearsal reaches, 91.0 ± 0.7 %"),
)  # fmt: skip
KEEPS = ("*.png",)  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    if CLASSES % cfg.contexts:
        raise InputError(f"contexts is {cfg.contexts}, expected 1, 2, 5 or 10, which divide the {CLASSES} classes")
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    for records, split in ((train, cfg.train_split), (test, cfg.test_split)):
        require_classes(records["label"], cfg.contexts, split)
    stored = stored_rows(train["label"], cfg, run.seeds) if "replay" in cfg.methods else []
    model = MLP(cfg.hidden)
    key_init, key, key_test = run.keys(3)  # [S] each
    variables = init_variables(model, key_init, jnp.zeros((1, 28, 28, 1)))
    found, last = {}, cfg.contexts - 1
    for scenario in cfg.scenarios:
        methods = trainers(cfg, scenario, model.apply, key_test)
        questions = questions_of(scenario, test, last, cfg.contexts)
        test_of = evaluator(functools.partial(by_context, model.apply, cfg.contexts), questions, 1000, key_test)
        curves = {}
        for method in cfg.methods:
            trainer = methods[method]
            step = per_seed(make_step(trainer.loss, trainer.tx), one_by_one=True)
            states = init_states(key, {**variables, **trainer.extra(variables["params"])}, trainer.tx)
            for context in range(cfg.contexts):
                records = questions_of(scenario, train, context, cfg.contexts)
                old = [digits_of(rows, context, cfg) for rows in stored] if method == "replay" and context else []
                stream = batches(records, cfg.batch_size, context, run.seeds, old, joint=method == "joint")
                name = f"{scenario}_{method}_{context + 1}"
                states = fit(step, states, stream, steps=(context + 1) * cfg.steps, run=run / name, scan=cfg.scan_steps)
                states = trainer.keep(states, records, context) if context < last else states
            right = 100 * test_of({"params": states.params})["right"]  # [S, contexts]
            found[f"{scenario}/{method}"] = right.mean(-1)
            curves[method] = np.arange(1, cfg.contexts + 1), right.T
        run.figure(scenario, cfg.steps, functools.partial(
            curves_figure, curves, xlabel="context", ylabel="test accuracy after the last context (%)"))  # fmt: skip
    return found


def require_classes(labels: np.ndarray, contexts: int, split: str) -> None:
    """Raises InputError where no image is of a class."""
    there = np.bincount(labels, minlength=CLASSES)
    if not there.all():
        missing = int(there.argmin())
        of = f"class {missing}, of context {missing // (CLASSES // contexts) + 1} of {contexts}"
        raise InputError(f"{split} has no image of {of}; choose a larger split")


def questions_of(
    scenario: Scenario, records: Mapping[str, np.ndarray], context: int, contexts: int
) -> dict[str, np.ndarray]:
    """The question of the scenario: columns image, context int [N], target int [N], and allowed bool [N, CLASSES].

    `target` is the number of the right output, among those that are `allowed` in the training on `context`.
    """
    label, each, output = records["label"], CLASSES // contexts, np.arange(CLASSES)
    of = label // each
    match scenario:
        case "task":
            target, allowed = label, output // each == of[:, None]
        case "domain":
            target, allowed = label % each, output < each
        case "class":
            target, allowed = label, output < each * (context + 1)
    allowed = np.array(np.broadcast_to(allowed, (len(label), CLASSES)))
    return {"image": records["image"], "context": of, "target": target, "allowed": allowed}


def stored_rows(labels: np.ndarray, cfg: Config, seeds: tuple[int, ...]) -> list[np.ndarray]:
    """For each seed random rows of each class, [CLASSES, n], whose first ones are kept when more classes are stored."""
    if cfg.budget < CLASSES:
        raise InputError(f"budget is {cfg.budget}, expected {CLASSES} or more: at least a digit of each class")
    most = min(cfg.budget * cfg.contexts // CLASSES, int(np.bincount(labels, minlength=CLASSES).min()))
    return [data.few(labels, most, CLASSES, seed).reshape(CLASSES, most) for seed in seeds]


def digits_of(stored: np.ndarray, context: int, cfg: Config) -> np.ndarray:  # [CLASSES, n] -> [M], M <= budget
    """The rows that are stored when `context` begins: as many of each class before it."""
    seen = context * CLASSES // cfg.contexts
    return stored[:seen, : cfg.budget // seen].ravel()


def batches(
    records: Mapping[str, np.ndarray],
    batch_size: int,
    context: int,
    seeds: tuple[int, ...],
    old: Sequence[np.ndarray] = (),
    joint: bool = False,
) -> data.Stream:
    """Batches of the context, of all contexts up to it (`joint`), or of it and as many of `old` rows, for each seed.

    The column `weight`, whose mean is 1, gives each context the same part of the loss.
    """
    own = records["context"] <= context if joint else records["context"] == context
    streams, weight = [data.shuffled({"row": np.flatnonzero(own)}, batch_size, seeds)], np.ones(batch_size, np.float32)
    if old:
        of_seeds = [data.shuffled({"row": rows}, batch_size, seed) for rows, seed in zip(old, seeds, strict=True)]
        streams.append(data.per_seed(of_seeds))
        weight = np.concatenate([weight, weight * context]) * np.float32(2 / (context + 1))

    def read(step: int, rows: slice) -> data.Columns:
        index = np.concatenate([stream(step)["row"] for stream in streams], 1)  # [S, B]
        return {"index": index[:, rows], "weight": np.broadcast_to(weight, index.shape)[:, rows]}

    return data.Stream(len(weight), read, axis=1, records=records)


class Trainer(NamedTuple):
    """A method: what it minimises, and what it keeps of the contexts that are over."""

    loss: Loss
    tx: optax.GradientTransformation
    extra: Callable[[Tree], Tree] = lambda params: {}  # the collections that the loss reads, before the first context
    keep: Callable[[State, Mapping[str, np.ndarray], int], State] = lambda states, records, context: states


def trainers(cfg: Config, scenario: Scenario, apply: Callable[..., Any], key: Array) -> dict[Method, Trainer]:
    """Each method by its name."""
    ewc, si = (weights[SCENARIOS.index(scenario)] for weights in (cfg.ewc, cfg.si))
    label, adam = label_loss(apply), optax.adam(cfg.learning_rate)
    plain = Trainer(label, adam)
    return {
        "none": plain,
        "replay": plain,
        "joint": plain,
        "ewc": Trainer(anchored(label, ewc / 2), adam, no_anchor,
                       functools.partial(keep_fisher, apply, cfg.fisher, key)),
        "si": Trainer(anchored(label, si), with_work(adam), no_anchor, functools.partial(keep_work, cfg.damping)),
        "lwf": Trainer(distilled(apply, label, cfg.temperature), adam, functools.partial(no_teacher, cfg.contexts),
                       functools.partial(keep_teacher, cfg.contexts)),
    }  # fmt: skip


def logits_of(apply: Callable[..., Any], variables: Tree, batch: Batch) -> Array:  # -> [B, CLASSES]
    """Logits, which are so low that their probability is 0 where an output is not allowed."""
    logits = apply({"params": variables["params"]}, classify.to_unit(batch["image"]), train=True)
    return where_allowed(logits, batch["allowed"])


def where_allowed(logits: Array, allowed: Array) -> Array:  # [..., CLASSES] each
    return jnp.where(allowed, logits, -1e9)


def label_loss(apply: Callable[..., Any]) -> Loss:
    """Cross-entropy of the allowed outputs, the mean of its products with the batch's weights."""

    def loss(variables: Tree, batch: Batch, key: Array):
        nats = losses.cross_entropy(logits_of(apply, variables, batch), batch["target"])
        return (batch["weight"] * nats).mean(), ({}, {})

    return loss


def by_context(apply: Callable[..., Any], contexts: int, variables: Tree, batch: Batch, key: Array):
    """The share of right answers in each context: [contexts]."""
    right = logits_of(apply, variables, batch).argmax(-1) == batch["target"]
    own = jax.nn.one_hot(batch["context"], contexts) * batch["mask"][:, None]  # [B, contexts]
    return {"right": (right @ own, own.sum(0))}


def no_anchor(params: Tree) -> Tree:
    return {"anchor": {"weight": jax.tree.map(jnp.zeros_like, params), "at": params}}


def anchored(loss: Loss, strength: float) -> Loss:
    """`loss` + strength Σ weight (θ − at)², with both from the collection `anchor`."""

    def total(variables: Tree, batch: Batch, key: Array):
        value, aux = loss(variables, batch, key)
        anchor = variables["anchor"]
        square = lambda weight, at, now: (weight * (now - at) ** 2).sum()
        each = jax.tree.map(square, anchor["weight"], anchor["at"], variables["params"])
        return value + strength * sum(jax.tree.leaves(each)), aux

    return total


def keep_fisher(
    apply: Callable[..., Any], n: int, key: Array, states: State, records: Mapping[str, np.ndarray], context: int
) -> State:
    """Adds the Fisher information of the context, on n of its images, to the anchor (Kirkpatrick et al., equation 3).

    Penalties F₁ (θ − θ₁)² and F₂ (θ − θ₂)² are one with the weight F₁ + F₂ around their weighted mean, but for a number
    that does not depend on θ.
    """
    own = data.rows(records, np.flatnonzero(records["context"] == context)[:n])
    leaves, structure = jax.tree.flatten(states.params)
    squares_of = evaluator(functools.partial(fisher, apply), own, min(len(own["target"]), 20), key)
    squares = squares_of({"params": states.params})
    new = structure.unflatten([np.float32(squares[str(i)]) for i in range(len(leaves))])
    anchor = states.extra["anchor"]
    weight = jax.tree.map(jnp.add, anchor["weight"], new)
    mean = lambda w, at, new, now: jnp.where(w > 0, at + new / jnp.where(w > 0, w, 1) * (now - at), now)
    at = jax.tree.map(mean, weight, anchor["at"], new, states.params)
    return states._replace(extra={**states.extra, "anchor": {"weight": weight, "at": at}})


def fisher(apply: Callable[..., Any], variables: Tree, batch: Batch, key: Array) -> dict[str, tuple[Array, Array]]:
    """The mean of Σ_y p(y) (d log p(y) / d θ)², over the network's answers y, for each leaf of the parameters."""

    def square(image: Array, allowed: Array) -> Tree:
        one = {"image": image[None], "allowed": allowed[None]}
        score = lambda params: jax.nn.log_softmax(logits_of(apply, {"params": params}, one)[0])
        p = jnp.exp(score(variables["params"]))  # [CLASSES]
        return jax.tree.map(lambda each: jnp.tensordot(p, each**2, 1), jax.jacrev(score)(variables["params"]))

    squares = jax.tree.leaves(jax.vmap(square)(batch["image"], batch["allowed"]))  # [B, ...] each
    weight = lambda leaf: batch["mask"].sum().reshape([1] * (leaf.ndim - 1))
    return {str(i): (jnp.tensordot(batch["mask"], leaf, 1), weight(leaf)) for i, leaf in enumerate(squares)}


class Work(NamedTuple):
    """The state of an optimiser, and what each parameter has contributed to lowering the loss."""

    work: Tree
    inner: Any


def with_work(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, which adds up −gradient · update of each parameter (Zenke et al. 2017, equation 3)."""

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Work]:
        moves, inner = tx.update(updates, state.inner, params)
        return moves, Work(jax.tree.map(lambda w, g, u: w - g * u, state.work, updates, moves), inner)

    return optax.GradientTransformation(
        lambda params: Work(jax.tree.map(jnp.zeros_like, params), tx.init(params)), update
    )


def keep_work(damping: float, states: State, records: Mapping[str, np.ndarray], context: int) -> State:
    """Adds work / ((θ − at)² + ξ) to the anchor's weight, and moves the anchor to θ (equations 4 and 5)."""
    anchor, (work, inner) = states.extra["anchor"], states.opt_state
    add = lambda weight, work, now, at: weight + work / ((now - at) ** 2 + damping)
    weight = jax.tree.map(add, anchor["weight"], work, states.params, anchor["at"])
    extra = {**states.extra, "anchor": {"weight": weight, "at": states.params}}
    return states._replace(extra=extra, opt_state=Work(jax.tree.map(jnp.zeros_like, work), inner))


def no_teacher(contexts: int, params: Tree) -> Tree:
    seeds = len(jax.tree.leaves(params)[0])
    return {"teacher": {"params": params, "part": jnp.zeros((seeds, contexts)),
                        "outputs": jnp.ones((seeds, contexts, CLASSES), bool)}}  # fmt: skip


def keep_teacher(contexts: int, states: State, records: Mapping[str, np.ndarray], context: int) -> State:
    """The network is the teacher of the next context, for each group of outputs that were chosen from.

    The contexts before have as much weight as each has in the next one's batch, 1 / (context + 2).
    """
    groups = np.unique(records["allowed"][records["context"] <= context], axis=0)  # [G, CLASSES]
    part = np.zeros(contexts, np.float32)
    part[: len(groups)] = (context + 1) / (context + 2) / len(groups)
    outputs = np.ones((contexts, CLASSES), bool)
    outputs[: len(groups)] = groups
    for_seeds = lambda x: jnp.broadcast_to(x, (len(jax.tree.leaves(states.params)[0]), *x.shape))
    teacher = {"params": states.params, "part": for_seeds(part), "outputs": for_seeds(outputs)}
    return states._replace(extra={**states.extra, "teacher": teacher})


def distilled(apply: Callable[..., Any], label: Loss, temperature: float) -> Loss:
    """(1 − Σ part) `label` + Σ part · T² cross-entropy to the teacher at temperature T, over its groups of outputs."""

    def loss(variables: Tree, batch: Batch, key: Array):
        value, aux = label(variables, batch, key)
        teacher, image = variables["teacher"], classify.to_unit(batch["image"])
        mine, its = (apply({"params": each["params"]}, image, train=True) for each in (variables, teacher))

        def distance(outputs: Array) -> Array:
            target = jax.nn.softmax(where_allowed(its, outputs) / temperature)
            return temperature**2 * losses.soft_cross_entropy(where_allowed(mine, outputs) / temperature, target).mean()

        return (1 - teacher["part"].sum()) * value + teacher["part"] @ jax.vmap(distance)(teacher["outputs"]), aux

    return loss


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
