"""The bundled set `diabetes`: how far the disease of 442 patients progressed within a year (Efron et al. 2004).

Age, sex, body mass index, blood pressure and six values of the blood, as scikit-learn has them, not standardised. The
columns are those of `uci_regression`: `x`, `y`, `row` and `test_in_splits`, which says which of 20 random splits test
on a patient. Each tests on a tenth of them.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dl_jax.data.bundled import Bundled

SPLITS = 20
INPUTS = 10


def patients() -> tuple[np.ndarray, np.ndarray]:
    """What is known of each patient, float32 [442, 10], and the progression, float32 [442], in scikit-learn's order."""
    # Reads the files directly: importing scikit-learn's own loader takes two seconds.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "data"
    read = lambda name: np.loadtxt(folder / name).astype(np.float32)
    return read("diabetes_data_raw.csv.gz"), read("diabetes_target.csv.gz")


def features() -> Mapping[str, Any]:
    import tensorflow_datasets as tfds

    tensor = lambda shape, dtype: tfds.features.Tensor(shape=shape, dtype=dtype)
    numbers = {"x": tensor((INPUTS,), np.float32), "y": tensor((), np.float32), "row": tensor((), np.int32)}
    return {**numbers, "test_in_splits": tensor((SPLITS,), np.uint8)}


def splits() -> dict[str, Iterable[Mapping[str, Any]]]:
    """All patients as the split `full`, with the splits that test on them."""
    x, y = patients()
    test = np.zeros((len(y), SPLITS), np.uint8)
    for k in range(SPLITS):
        test[np.random.default_rng(k).permutation(len(y))[: round(len(y) / 10)], k] = 1
    return {"full": [{"x": x[i], "y": y[i], "row": i, "test_in_splits": test[i]} for i in range(len(y))]}


SET = Bundled(
    "diabetes",
    "1.0.0",
    "The progression of diabetes in 442 patients, from ten measurements, with 20 random splits",
    features,
    splits,
    ("x", "y"),
)
