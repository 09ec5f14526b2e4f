"""Finds prepared TFDS sets and says what is in them. TFDS itself is imported once per set, to describe it.

A name is TFDS's `name[/config][:version]`: `mnist`, `glue/sst2`, `mnist:3.0.1`. A set with one prepared config may be
called without it; the newest prepared version counts.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dl_jax.data import digits
from dl_jax.data.files import cache_folder, locked
from dl_jax.errors import InputError, nearest

_NAME = re.compile(r"(?P<set>\w+)(?:/(?P<config>[^/:]+))?(?::(?P<version>[\d.]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_LAYOUT = 1  # of the cache; raise it when decoding changes


class Prepared(NamedTuple):
    name: str  # with its config, if it has one
    version: str
    folder: Path


class Feature(NamedTuple):
    """One column as `load` gives it, without the leading N."""

    shape: tuple[int | None, ...]  # None: differs from example to example
    dtype: str  # NumPy's name; "bytes" for text; class labels are int32

    @property
    def ragged(self) -> bool:
        """Whether examples differ in their length alone, so that padding makes a column of them."""
        return bool(self.shape) and self.shape[0] is None and None not in self.shape[1:]


@dataclasses.dataclass(frozen=True)
class Info:
    """What a prepared set holds."""

    name: str  # with its config, if it has one
    version: str
    splits: Mapping[str, int]  # number of examples
    features: Mapping[str, Feature]  # nested names are joined by "/"
    classes: int | None  # of the set's label; None if it has no class label, or several and none is the target
    class_names: tuple[str, ...]


def data_folder(data_dir: str | None = None) -> Path:
    """`data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets. It is only read, except when preparing."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in folder:
        raise InputError(
            f"data folder {folder}: expected a local or mounted folder; copy the set here, or mount the bucket"
        )
    return Path(folder).expanduser().absolute()


def find(name: str, data_dir: str | None = None, cache_dir: str | None = None) -> Prepared:
    """The prepared set called `name`. Raises InputError, at once and offline, if there is none."""
    if name == digits.NAME:
        return Prepared(name, digits.VERSION, digits.prepared(cache_folder(cache_dir)))
    root = data_folder(data_dir)
    found = lookup(name, root)
    if not found:
        raise InputError(_absent(name, root, data_dir))
    return found


def lookup(name: str, root: Path) -> Prepared | None:
    """The prepared set called `name` in the data folder `root`. Raises InputError for an ambiguous name."""
    parts = _NAME.fullmatch(name)
    if not parts:
        return None
    found = _versions_by_name(root / parts["set"])
    if parts["config"]:
        found = {full: folders for full, folders in found.items() if full == f"{parts['set']}/{parts['config']}"}
    if len(found) > 1:
        raise InputError(f"data set {name} has several prepared configs in {root}, expected one of {', '.join(found)}")
    for full, folders in found.items():
        wanted = [folder for folder in folders if parts["version"] in (None, folder.name)]
        if not wanted:
            there = " or ".join(folder.name for folder in folders)
            raise InputError(f"data set {full} is not in {root} in version {parts['version']}, expected {there}")
        return Prepared(full, wanted[-1].name, wanted[-1])
    return None


def prepared(data_dir: str | None = None) -> list[Prepared]:
    """Every prepared set in the data folder, in its newest version, by name."""
    folders = _subfolders(data_folder(data_dir))
    found = {name: versions[-1] for folder in folders for name, versions in _versions_by_name(folder).items()}
    return [Prepared(name, folder.name, folder) for name, folder in sorted(found.items())]


def split_sizes(found: Prepared) -> dict[str, int]:
    """Number of examples in each split, from the set's own description. Raises InputError where that is damaged."""
    file = found.folder / "dataset_info.json"
    try:
        description = json.loads(file.read_text())
        sizes = {split["name"]: sum(map(int, split["shardLengths"])) for split in description["splits"]}
        file_format = description.get("fileFormat", "tfrecord")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{file} is missing or damaged ({type(e).__name__}: {_line(e)}), expected TFDS's description of "
            f"{found.name}: copy it again, or delete its folder and prepare the set again"
        ) from e
    if file_format != "array_record":
        raise InputError(
            f"data set {found.name} in {found.folder} is stored as {file_format}, expected array_record, which is read "
            f"without TensorFlow: prepare it into another folder with `{_command(found.name)} --data-dir FOLDER`"
        )
    return sizes


def open_builder(found: Prepared) -> Any:
    """TFDS's builder of a prepared set. Raises InputError where its description is damaged or needs TensorFlow."""
    split_sizes(found)
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(found.folder)
    except ImportError as e:
        raise InputError(
            f"data set {found.name} has a feature that TFDS reads only with TensorFlow ({_line(e)}), expected features "
            "such as Image, ClassLabel, Text or Tensor: store sound or film as a Tensor"
        ) from e
    except Exception as e:  # TFDS raises a dozen kinds for a description it cannot read
        raise InputError(
            f"the description of data set {found.name} in {found.folder} is damaged ({type(e).__name__}: {_line(e)}): "
            "copy dataset_info.json and features.json again, or delete the folder and prepare the set again"
        ) from e


def cache_entry(found: Prepared, cache_dir: str | None = None) -> Path:
    """Where what is derived from the set is kept. A change in any file of the set gives another place."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in os.scandir(found.folder) if f.is_file())
    fingerprint = hashlib.sha256(repr((_LAYOUT, files)).encode()).hexdigest()[:16]
    return cache_folder(cache_dir) / "columns" / found.name / f"{found.version}-{fingerprint}"


def info(name: str, data_dir: str | None = None, cache_dir: str | None = None) -> Info:
    """What the prepared set `name` holds. Raises InputError if it is not prepared or damaged."""
    found = find(name, data_dir, cache_dir)
    file = cache_entry(found, cache_dir) / "info.json"
    try:
        return _info_from_json(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # not described yet
        described = _describe(found)
    with locked(file.with_suffix(".lock")):
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(described)))
        partial.replace(file)
    return described


def _info_from_json(fields: dict[str, Any]) -> Info:
    features = {name: Feature(tuple(shape), dtype) for name, (shape, dtype) in fields["features"].items()}
    return Info(**{**fields, "features": features, "class_names": tuple(fields["class_names"])})


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
    )


def columns(features: Any) -> dict[str, Feature]:
    """The columns of a set with these TFDS features."""
    labels = class_labels(features)

    def column(name: str, spec: Any) -> Feature:
        dtype = np.dtype(spec.np_dtype)
        return Feature(tuple(spec.shape), "bytes" if dtype.kind in "OSU" else "int32" if name in labels else dtype.name)

    return {name: column(name, spec) for name, spec in sorted(flat(features.get_tensor_info()).items())}


def class_labels(features: Any) -> dict[str, Any]:
    """The ClassLabel features by column, also those within sequences."""
    import tensorflow_datasets as tfds

    def leaf(feature: Any) -> Any:
        return leaf(feature.feature) if isinstance(feature, tfds.features.Sequence) else feature

    def nested(feature: Any) -> Any:
        inner = leaf(feature)
        return {k: nested(v) for k, v in inner.items()} if isinstance(inner, tfds.features.FeaturesDict) else inner

    return {name: f for name, f in flat(nested(features)).items() if isinstance(f, tfds.features.ClassLabel)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} to {"a/b": x}."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def tfds_names() -> set[str]:
    """Names of data sets that TFDS can prepare, nearly all, read off its files: its own list needs TensorFlow."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    packages = {folder.name for folder in (package / "datasets").iterdir()}
    checksums = {file.stem for file in (package / "url_checksums").iterdir()}
    modules = {file.stem for file in package.glob("*/*/*.py") if file.stem == file.parent.name}
    return {name for name in packages | checksums | modules if not name.startswith("_")}


def _absent(name: str, root: Path, data_dir: str | None) -> str:
    if name.partition("/")[0].partition(":")[0] in tfds_names():
        command = _command(name) + (f" --data-dir {data_dir}" if data_dir else "")
        return (
            f"data set {name} is not prepared in {root}: prepare it with `{command}`, or use --dataset digits, which "
            "needs no preparation"
        )
    here = [found.name for found in prepared(str(root))]
    return (
        f"data set {name} is neither prepared in {root} nor known to TFDS: `python -m dl_jax.data list` shows those "
        f"that are there, and --dataset digits always is{nearest(name, {*here, *tfds_names(), digits.NAME})}"
    )


def _command(name: str) -> str:
    return f"python -m dl_jax.data prepare {name}"


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def _versions(folder: Path) -> list[Path]:
    """The version folders within, oldest first."""
    versions = [child for child in _subfolders(folder) if _VERSION.fullmatch(child.name)]
    return sorted(versions, key=lambda child: tuple(map(int, child.name.split("."))))


def _versions_by_name(folder: Path) -> dict[str, list[Path]]:
    """The versions of one data set's folder, by its name or name/config."""
    found = {folder.name: _versions(folder)}
    if not found[folder.name]:
        found = {f"{folder.name}/{config.name}": _versions(config) for config in _subfolders(folder)}
    return {name: versions for name, versions in found.items() if versions}
