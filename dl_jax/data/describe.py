"""Describes a prepared set: its splits, and the columns that `load` returns for its features."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.data import cached
from dl_jax.data.source import Prepared, brief, cache_entry, find, split_sizes


class Feature(NamedTuple):
    """Shape and dtype of one example of a column, as `load` returns it."""

    shape: tuple[int | None, ...]  # None for an axis whose length differs from example to example
    dtype: str  # NumPy's name, or "bytes" for text; "int32" for class labels

    @property
    def ragged(self) -> bool:
        """Whether examples differ only in the length of their first axis, so that `load` pads them."""
        return bool(self.shape) and self.shape[0] is None and None not in self.shape[1:]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an example of this shape is what was declared."""
        return len(shape) == len(self.shape) and all(
            want in (None, size) for want, size in zip(self.shape, shape, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Info:
    """The contents of a prepared set."""

    name: str  # with its config, if it has one
    version: str
    splits: Mapping[str, int]  # number of examples of each split
    features: Mapping[str, Feature]  # by column; nested names are joined by "/"
    classes: int | None  # number of classes; None if there is no class label, or several of which none is the target
    class_names: tuple[str, ...]  # names of these classes, () if there are none
    labels: Mapping[str, tuple[str, ...]]  # names of the classes of every column of class labels, by column
    rate: int | None  # samples a second of audio; None where the set's description states no rate, or several


def info(name: str, data_dir: str | None = None, cache_dir: str | None = None) -> Info:
    """The contents of the prepared set `name`, which are described once and kept in the cache folder.

    Raises InputError if the set is not prepared or is damaged, and Unavailable if the cache cannot be read at present.
    """
    found = find(name, data_dir, cache_dir)
    file = cache_entry(found, cache_dir) / "description.json"
    make = lambda: cached.write_sealed(file, dataclasses.asdict(_describe(found)))
    return _info_from_json(cached.get(file, lambda: cached.read_sealed(file), make))


def _info_from_json(fields: dict[str, Any]) -> Info:
    features = {name: Feature(tuple(shape), dtype) for name, (shape, dtype) in fields["features"].items()}
    labels = {name: tuple(names) for name, names in fields["labels"].items()}
    return Info(**{**fields, "features": features, "class_names": tuple(fields["class_names"]), "labels": labels})


def _describe(found: Prepared) -> Info:
    builder_info = open_builder(found).info
    labels = class_labels(builder_info.features)
    target = (builder_info.supervised_keys or ("", ""))[-1]
    label = labels.get(target) or labels.get("label") or (next(iter(labels.values())) if len(labels) == 1 else None)
    return Info(
        found.name,
        found.version,
        split_sizes(found),
        columns(builder_info.features),
        label.num_classes if label else None,
        tuple(label.names) if label else (),
        {name: tuple(each.names) for name, each in labels.items()},
        stated_rate(builder_info.description),
    )


def stated_rate(description: str) -> int | None:
    """The one rate, such as 8 kHz or 44100 Hz, that the description of a set states, in Hz; None for none or several.

    Audio that is read without TensorFlow is stored as a Tensor, which knows no rate.
    """
    found = re.findall(r"(?<![\w.,])(\d+(?:\.\d+)?)[ -]?(k?)Hz\b", description)
    rates = {float(number) * (1000 if kilo else 1) for number, kilo in found}
    return round(rates.pop()) if len(rates) == 1 else None


def columns(features: Any) -> dict[str, Feature]:
    """The columns that `load` returns for a set with these TFDS features."""
    labels = class_labels(features)

    def column(name: str, spec: Any) -> Feature:
        dtype = np.dtype(spec.np_dtype)
        return Feature(tuple(spec.shape), "bytes" if dtype.kind in "OSU" else "int32" if name in labels else dtype.name)

    return {name: column(name, spec) for name, spec in sorted(flat(features.get_tensor_info()).items())}


def class_labels(features: Any) -> dict[str, Any]:
    """The ClassLabel features by column, including those within sequences."""
    import tensorflow_datasets as tfds

    def leaf(feature: Any) -> Any:
        return leaf(feature.feature) if isinstance(feature, tfds.features.Sequence) else feature

    def nested(feature: Any) -> Any:
        inner = leaf(feature)
        return {k: nested(v) for k, v in inner.items()} if isinstance(inner, tfds.features.FeaturesDict) else inner

    return {name: f for name, f in flat(nested(features)).items() if isinstance(f, tfds.features.ClassLabel)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings: {"a": {"b": x}} becomes {"a/b": x}."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def open_builder(found: Prepared) -> Any:
    """The TFDS builder of a prepared set.

    Raises InputError where its description is damaged, needs TensorFlow, or names a class of features that is not
    TFDS's own, because TFDS would import the module of that class.
    """
    split_sizes(found)
    import tensorflow_datasets as tfds

    try:
        named = _classes(json.loads((found.folder / "features.json").read_text("utf-8")))
        foreign = [name for name in named if not name.startswith("tensorflow_datasets.")]
        if not foreign:
            return tfds.builder_from_directory(found.folder)
    except ImportError as e:
        raise InputError(
            f"data set {found.name} has a feature that TFDS reads only with TensorFlow ({brief(e)}), expected "
            "features such as Image, ClassLabel, Text or Tensor: store audio or video as a Tensor"
        ) from e
    except Exception as e:  # TFDS raises many kinds of exceptions for a description that it cannot read
        raise InputError(
            f"the description of data set {found.name} in {found.folder} is damaged ({type(e).__name__}: "
            f"{brief(e)}): copy dataset_info.json and features.json again, or delete the folder and prepare it again"
        ) from e
    raise InputError(
        f"data set {found.name} has a feature of class {foreign[0][:80]!r} in {found.folder / 'features.json'}, "
        "expected TFDS's own, as reading another runs its module: prepare the set with Image, ClassLabel, Text, Tensor "
        "and the like"
    )


def _classes(tree: Any) -> Iterator[str]:
    """The names of all classes that TFDS imports for a features.json, of nested features and JSON within JSON too."""
    if isinstance(tree, str) and tree.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):  # a text about the set
            yield from _classes(json.loads(tree))
    if isinstance(tree, list):
        for each in tree:
            yield from _classes(each)
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str):
                yield value
            yield from _classes(value)
