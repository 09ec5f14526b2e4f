"""Sets of small images that are always there: prepared offline as TFDS sets when they are first used."""

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dl_jax.data import cached


class Bundled(NamedTuple):
    """A bundled set of images, grey or of three channels, with class labels."""

    name: str
    version: str  # increase it when an image changes
    description: str
    class_names: tuple[str, ...]
    splits: Callable[[], Mapping[str, tuple[np.ndarray, np.ndarray]]]  # uint8 [N, H, W, C] and labels [N] of each


def prepared(each: Bundled, cache: Path) -> Path:
    """The folder of the prepared set below the folder `cache`. Prepares a missing or damaged set in seconds."""
    folder = cache / "tfds" / each.name / each.version
    return cached.get(folder.parent, lambda: _read(folder), lambda: _make(each, folder))


def _read(folder: Path) -> Path | None:
    """`folder`, or None if it is not prepared. Raises DamagedError unless its files are what was written."""
    listing = cached.read_sealed(_listing(folder))
    if listing is None:
        return None
    cached.require_whole(folder, listing["files"])
    return folder


def _make(each: Bundled, folder: Path) -> None:
    cached.remove(folder)
    _prepare(each, folder.parents[1])
    cached.write_sealed(_listing(folder), {"files": cached.digests(folder)})


def _listing(folder: Path) -> Path:
    """The file of the digests, beside the set's folder, as all files within belong to TFDS."""
    return folder.parent.with_suffix(".json")


def _prepare(each: Bundled, root: Path) -> None:
    import PIL.Image
    import tensorflow_datasets as tfds

    def png(image: np.ndarray) -> bytes:  # TFDS needs TensorFlow to encode arrays, but not to store encoded images
        file = io.BytesIO()
        PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
        return file.getvalue()

    splits = each.splits()
    shape = next(iter(splits.values()))[0].shape[1:]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = each.name
        VERSION = tfds.core.Version(each.version)

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(names=each.class_names),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=each.description,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(*columns) for name, columns in splits.items()}

        def _generate_examples(self, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": png(image), "label": int(label)}

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download on stdout, though there is none
            Builder(data_dir=root, file_format="array_record").download_and_prepare()
    finally:
        tfds.enable_progress_bar()
