"""Sets that are computed, not downloaded. Bundled ones are prepared offline as TFDS sets when they are first used."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dl_jax.data import builder, cached


class Bundled(NamedTuple):
    """A bundled set. Its features and examples are made when it is prepared."""

    name: str
    version: str  # increase it when an example changes
    description: str
    features: Callable[[], Mapping[str, Any]]  # TFDS's, by name
    splits: Callable[[], Mapping[str, Iterable[Mapping[str, Any]]]]  # the examples of each split
    target: tuple[str, str] | None = None  # the input and the class label, where the set has one of each


class Derived(NamedTuple):
    """A set that is made of another set of images with labels, when `python -m dl_jax.data prepare` is called."""

    name: str
    version: str  # increase it when an example changes
    description: str
    features: Callable[[], Mapping[str, Any]]  # TFDS's, by name
    source: str  # the name of the other set
    splits: Callable[[Callable[[str], tuple[np.ndarray, np.ndarray]]], Mapping[str, Iterable[Mapping[str, Any]]]]
    """The examples of each split, from a function that gives the source's images and labels of a split."""
    target: tuple[str, str] | None = None  # the input and the class label, where the set has one of each


def image_set(
    name: str,
    version: str,
    description: str,
    class_names: tuple[str, ...],
    shape: tuple[int, int, int],
    splits: Callable[[], Mapping[str, tuple[np.ndarray, np.ndarray]]],
) -> Bundled:
    """A bundled set of images of a `shape` [H, W, C] with class labels.

    `splits()` gives uint8 [N, H, W, C] and labels [N] of each split.
    """

    def features() -> Mapping[str, Any]:
        import tensorflow_datasets as tfds

        return {
            "image": tfds.features.Image(shape=shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(class_names)),
        }

    def examples() -> Mapping[str, Iterable[Mapping[str, Any]]]:
        rows = lambda images, labels: zip(images, labels, strict=True)
        return {
            split: [{"image": _png(image), "label": int(label)} for image, label in rows(*columns)]
            for split, columns in splits().items()
        }

    return Bundled(name, version, description, features, examples, ("image", "label"))


def _png(image: np.ndarray) -> bytes:  # TFDS needs TensorFlow to encode arrays, but not to store encoded images
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


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
    write(each, each.splits(), folder.parents[1])
    cached.write_sealed(_listing(folder), {"files": cached.digests(folder)})


def write(each: Bundled | Derived, splits: Mapping[str, Iterable[Mapping[str, Any]]], root: Path) -> None:
    """Prepares the set of these examples in the data folder `root`."""
    keyed = {split: enumerate(examples) for split, examples in splits.items()}
    described = {"description": each.description, "supervised_keys": each.target}
    builder.write(root, each.name, each.version, each.features(), keyed, **described)


def _listing(folder: Path) -> Path:
    """The file of a version's digests, beside the set's folder, as all files within belong to TFDS."""
    return folder.parents[1] / f"{folder.parent.name}-{folder.name}.json"
