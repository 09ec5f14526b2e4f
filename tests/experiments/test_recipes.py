"""The recipes of the image classifiers do not stand at the edge of stability: they survive twice their learning rates.

Each quick preset trains on a part of the training set, at its own peak learning rates and at twice these, and is judged
on another part of it. The error at twice the rates is at most 1.5 times the error at the recipe's own, plus two images.
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
    "compression/pipeline": ("error/teacher", "error/pruned"),
    "compression/prune_lenet": ("test_error/lenet300", "test_error/lenet300_pruned"),
    "compression/quantize_lenet": ("error/float", "error/qat8"),
}
SPLITS = {"digits": ("train[:80%]", "train[80%:]", 287), "mnist": ("train[:1150]", "train[59000:]", 1000)}


@pytest.mark.slow
@pytest.mark.parametrize("dataset", SPLITS)
@pytest.mark.parametrize("name", [name for name in METRICS if (FOLDER / f"{name}.py").exists()])
def test_twice_the_learning_rate_is_survived(load_experiment, request, name, dataset):
    if dataset == "mnist":
        request.getfixturevalue("tfds_dir")
    module = load_experiment(name)
    train, test, n = SPLITS[dataset]
    recipe = dataclasses.replace(module.PRESETS["quick"], dataset=dataset, train_split=train, test_split=test)
    rates = {field: value for field, value in vars(recipe).items() if field.endswith("_rate")}
    assert rates
    found = []
    for factor in (1, 2):
        cfg = dataclasses.replace(recipe, **{field: factor * value for field, value in rates.items()})
        measured = module.main(cfg, Run(settings=Settings(seeds=(0, 1))))
        found.append(np.array([np.mean(measured[metric]) for metric in METRICS[name]]))
    image = 1 if METRICS[name][0].startswith("errors") else 100 / n  # errors are counted, or in per cent
    assert (found[1] <= 1.5 * found[0] + 2 * image).all(), (found[0].tolist(), found[1].tolist())
