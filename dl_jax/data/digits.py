"""The bundled set `digits`: scikit-learn's 1,797 scans of 8x8 pixels as a TFDS set.

The scans are the test part of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998). The
ink of a pixel, 0 to 16, is stored as ink x 255 / 16, rounded half up; `round(pixel x 16 / 255)` gives the ink back.
The last 360 scans in scikit-learn's order are the split `test`, the other 1,437 are `train`. The digits of a writer are
next to each other in this order, so that few writers are in both splits; after shuffling most writers would be.
"""

import importlib.util
from pathlib import Path

import numpy as np

from dl_jax.data.bundled import image_set

TEST = 360


def scans() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8, 1] and labels uint8 [1797], in scikit-learn's order."""
    # Reads the file directly: scikit-learn's own loader gives the same numbers, but importing it takes two seconds.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", np.uint16, delimiter=",")
    ink, label = table[:, :-1], table[:, -1].astype(np.uint8)
    return ((ink * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8, 1), label


def splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each split."""
    images, labels = scans()
    return {"train": (images[:-TEST], labels[:-TEST]), "test": (images[-TEST:], labels[-TEST:])}


SET = image_set(
    "digits", "1.0.0", "scikit-learn's 8x8 scans of handwritten digits", tuple("0123456789"), (8, 8, 1), splits
)
