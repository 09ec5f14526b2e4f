"""An ensemble of five networks is better calibrated than one of them on digits that are turned.

After Lakshminarayanan, Pritzel & Blundell 2017, "Simple and scalable predictive uncertainty estimation using deep
ensembles", and Ovadia et al. 2019, "Can you trust your model's uncertainty? Evaluating predictive uncertainty under
dataset shift", which turn MNIST's test digits. Neither has a number in a table, so that only the order is claimed.

    python experiments/vision/rotated.py --dataset mnist --preset paper --seeds 5 --workdir runs/rotated

Expected, in ten minutes on a busy core: over digits that are turned by 15° to 90°, the calibration error of the
ensemble is lower than the mean of those of its members. The networks learn from upright digits only. The members of all
ensembles are the seed axis of one fit; an ensemble gives each class the mean probability of its members.

`calibration_error` is how far the probability of a class is from how often it is right, averaged over bins and classes
(`metrics.calibration_error`), `error` the share of wrong answers, and `disagreement` the share of pairs of members that
give an image different labels. All are means over the angles, and those of `member` over the members. The figures show
them against the angle.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, metrics, optim
from dl_jax.core.evaluate import collector
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, make_step, per_seed, start
from dl_jax.harness import Between, Claim, Distinct, Positive, Run, Some, curves_figure, launch
from dl_jax.models.vision.mlp import MLP


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mnist"  # TFDS name of a set of ten classes of 28x28 or 8x8 grey images
    train_split: str = "train"  # TFDS split to learn from
    test_split: str = "test"  # TFDS split to turn and test on
    members: Annotated[int, Between(low=2)] = 5  # networks of an ensemble
    hidden: Some[Positive[int]] = (200, 200, 200)  # units of each hidden layer
    steps: Positive[int] = 1000  # train steps of each network
    batch_size: Positive[int] = 100  # images per step and network
    learning_rate: Positive[float] = 1e-3  # peak learning rate of Adam
    angles: Distinct[Annotated[float, Between(-180, 180)]] = (15, 30, 45, 60, 75, 90)  # turns, in degrees


PRESETS = {
    "paper": Config(),
    "quick": Config(dataset="digits", hidden=(50, 50), steps=300),
    "smoke": Config(dataset="digits", test_split="test[:40]", members=2, hidden=(8,), steps=2, batch_size=16,
                    angles=(45.0,)),
}  # fmt: skip

CLAIMS = (
    Claim("calibration_error/ensemble", versus="calibration_error/member", paper="our order",
          locator="after Ovadia et al. 2019, Figure 1, MNIST turned", given={"dataset": "mnist"}),
)  # fmt: skip
KEEPS = ("calibration.png", "answers.png")  # files in the run's folder


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    train, test = (data.grey_images(cfg.dataset, split) for split in (cfg.train_split, cfg.test_split))
    model, tx = MLP(cfg.hidden), optax.adam(optim.warmup_cosine(cfg.learning_rate, cfg.steps))
    keys = (jax.vmap(lambda key: jax.random.split(key, cfg.members))(each).ravel() for each in run.keys(2))
    order = [seed * cfg.members + member for seed in run.seeds for member in range(cfg.members)]
    states = fit(
        per_seed(make_step(classify.loss(model.apply), tx)),
        start(model, tx, *keys, jnp.zeros((1, 28, 28, 1))),
        data.shuffled(train, cfg.batch_size, order),
        steps=cfg.steps,
        run=run / "members",
    )
    answer = lambda variables, batch: jax.nn.softmax(
        jnp.asarray(model.apply(variables, classify.to_unit(batch["image"]), train=False))
    )
    collect, found = collector(answer, 1000), []
    for angle in (0.0, *cfg.angles):
        probability = collect(states.variables, {"image": turned(test["image"], angle)})  # [S · M, N, 10]
        found.append(judged(probability.reshape(len(run.seeds), cfg.members, *probability.shape[1:]), test["label"]))
    by_angle = {name: np.stack([each[name] for each in found]) for name in found[0]}  # [angles, S] each
    draw(cfg, run, by_angle)
    return {name: values[1:].mean(0) for name, values in by_angle.items()}


def turned(images: np.ndarray, angle: float) -> np.ndarray:  # uint8 [N, H, W, 1] -> [N, H, W, 1]
    """The images turned counter-clockwise around their centres, by Pillow's bilinear filter; what is outside is 0."""
    import PIL.Image

    turn = lambda image: PIL.Image.fromarray(image[..., 0]).rotate(angle, PIL.Image.Resampling.BILINEAR)
    return np.stack([np.asarray(turn(image)) for image in images])[..., None]


def judged(probability: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:  # [S, M, N, C], int [N] -> [S] each
    """What is measured of the ensembles, and the mean over the members of each."""
    both = {"ensemble": probability.mean(1, keepdims=True), "member": probability}  # [S, 1, N, C], [S, M, N, C]
    answers = probability.argmax(-1)  # [S, M, N]
    pairs = list(itertools.combinations(range(answers.shape[1]), 2))
    differ = [(answers[:, a] != answers[:, b]).mean(-1) for a, b in pairs]
    return {
        **{f"calibration_error/{name}": calibration(p, labels).mean(1) for name, p in both.items()},
        **{f"error/{name}": (p.argmax(-1) != labels).mean((1, 2)) for name, p in both.items()},
        "disagreement": np.mean(differ, 0),
    }


def calibration(probability: np.ndarray, labels: np.ndarray) -> np.ndarray:  # [S, M, N, C], int [N] -> [S, M]
    return metrics.calibration_error(np.asarray(reliability(probability, labels)))


@jax.jit
def reliability(probability: Array, labels: Array) -> Any:  # [S, M, N, C], int [N] -> [S, M, C, bins, 3]
    def of_network(p: Array) -> Array:
        total, weight = metrics.reliability(jnp.log(p), labels, jnp.ones(len(labels)))
        return total / weight

    return jax.lax.map(lambda members: jax.lax.map(of_network, members), probability)


def draw(cfg: Config, run: Run, by_angle: Mapping[str, np.ndarray]) -> None:
    angles = np.array([0.0, *cfg.angles])
    chosen = lambda names: {name.replace("_", " "): (angles, by_angle[name]) for name in names}
    figure = lambda names, ylabel: lambda: curves_figure(chosen(names), xlabel="turned by (degrees)", ylabel=ylabel)
    run.figure("calibration", cfg.steps, figure([n for n in by_angle if n.startswith("cal")], "calibration error"))
    run.figure("answers", cfg.steps, figure(["error/ensemble", "error/member", "disagreement"], "share of the images"))


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
