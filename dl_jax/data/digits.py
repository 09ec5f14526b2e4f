"""The bundled set `digits`: scikit-learn's 1,797 scans of 8x8 pixels as a TFDS set, prepared offline when it is used.

The scans are the test part of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998). The
ink of a pixel, 0 to 16, is stored as ink x 255 / 16, rounded half up; `round(pixel x 16 / 255)` gives the ink back.
The last 360 scans in scikit-learn's order are the split `test`, the other 1,437 are `train`. The digits of a writer are
next to each other in this order, so that few writers are in both splits; after shuffling most writers would be.
"""

import contextlib
import importlib.util
import io
from pathlib import Path

import numpy as np

from dl_jax.data import cached

NAME, VERSION, TEST = "digits", "1.0.0", 360


def scans() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8, 1] and labels uint8 [1797], in scikit-learn's order."""
    # Reads the file directly: scikit-learn's own loader gives the same numbers, but importing it takes two seconds.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", np.uint16, delimiter=",")
    ink, label = table[:, :-1], table[:, -1].astype(np.uint8)
    return ((ink * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8, 1), label


def prepared(cache: Path) -> Path:
    """The folder of the prepared set below the folder `cache`. Prepares a missing or damaged set, in about a second."""
    folder = cache / "tfds" / NAME / VERSION
    return cached.get(folder.parent, lambda: _read(folder), lambda: _make(folder))


def _read(folder: Path) -> Path | None:
    """`folder`, or None if it is not prepared. Raises DamagedError unless its files are what was written."""
    listing = cached.read_sealed(_listing(folder))
    if listing is None:
        return None
    cached.require_whole(folder, listing["files"])
    return folder


def _make(folder: Path) -> None:
    cached.remove(folder)
    _prepare(folder.parents[1])
    cached.write_sealed(_listing(folder), {"files": cached.digests(folder)})


def _listing(folder: Path) -> Path:
    """The file of the digests, beside the set's folder, as all files within belong to TFDS."""
    return folder.parent.with_suffix(".json")


def _prepare(root: Path) -> None:
    import PIL.Image
    import tensorflow_datasets as tfds

    def png(image: np.ndarray) -> bytes:  # TFDS needs TensorFlow to encode arrays, but not to store encoded images
        file = io.BytesIO()
        PIL.Image.fromarray(image[..., 0]).save(file, "PNG")
        return file.getvalue()

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = NAME
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="scikit-learn's 8x8 scans of handwritten digits",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            images, labels = scans()
            return {
                "train": self._generate_examples(images[:-TEST], labels[:-TEST]),
                "test": self._generate_examples(images[-TEST:], labels[-TEST:]),
            }

        def _generate_examples(self, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": png(image), "label": int(label)}

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download on stdout, though there is none
            Digits(data_dir=root, file_format="array_record").download_and_prepare()
    finally:
        tfds.enable_progress_bar()
