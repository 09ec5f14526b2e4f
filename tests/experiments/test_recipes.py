"""The recipes of the image classifiers do not stand at the edge of stability: they survive twice their learning rates.

Each quick preset, or after a colon another one, shortened, trains on a part of the training set, at its own peak
learning rates and at twice these, and is judged on another part of it. The error at its own rates is below 20 %, so
that something was learned. At twice the rates it is at most 1.5 times as large, plus two images.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dl_jax.harness.run import Run, Settings

FOLDER = Path(__file__).parents[2] / "experiments"
METRICS = {
    "vision/lenet": ("test_error/plain", "test_error/distorted"),
    "compression/deep_compression": ("test_error/reference", "test_error/decoded"),
    "compression/distill_mnist": ("errors/teacher", "errors/plain", "errors/distilled"),
    "compression/pipeline": ("error/teacher", "error/small"),
    "compression/prune_lenet": ("test_error/lenet300", "test_error/lenet300_pruned"),
    "compression/prune_lenet:lenet5": ("test_error/lenet5", "test_error/lenet5_pruned"),
    "compression/quantize_lenet": ("error/float", "error/qat8"),
}
SHORTER = {"compression/prune_lenet:lenet5": {"steps": 200, "rounds": 1, "round_steps": 100}}
SPLITS = {"digits": ("train[:80%]", "train[80%:]", 287), "mnist": ("train[:1150]", "train[59000:]", 1000)}


@pytest.mark.slow
@pytest.mark.parametrize("dataset", SPLITS)
@pytest.mark.parametrize("recipe", METRICS)
def test_twice_the_learning_rate_is_survived(load_experiment, request, recipe, dataset):
    name, _, preset = recipe.partition(":")
    if not (FOLDER / f"{name}.py").exists():
        pytest.skip(f"there is no experiments/{name}.py: delete its lines in METRICS, or write its new name there")
    if dataset == "mnist":
        request.getfixturevalue("tfds_dir")
    module = load_experiment(name)
    train, test, n = SPLITS[dataset]
    own = dataclasses.replace(module.PRESETS[preset or "quick"], **SHORTER.get(recipe, {}))
    own = dataclasses.replace(own, dataset=dataset, train_split=train, test_split=test)
    rates = {field: value for field, value in vars(own).items() if field.endswith("_rate")}
    assert rates
    found = []
    for factor in (1, 2):
        cfg = dataclasses.replace(own, **{field: factor * value for field, value in rates.items()})
        measured = module.main(cfg, Run(settings=Settings(seeds=(0, 1))))
        found.append(np.array([np.mean(measured[metric]) for metric in METRICS[recipe]]))
    counted = METRICS[recipe][0].startswith("errors")  # or in per cent
    whole, image = (n, 1) if counted else (100, 100 / n)
    assert (found[0] < 0.2 * whole).all(), found[0].tolist()
    assert (found[1] <= 1.5 * found[0] + 2 * image).all(), (found[0].tolist(), found[1].tolist())
