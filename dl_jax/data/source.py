"""Finds prepared TFDS sets, without importing TFDS.

A set is named as in TFDS, `name[/config][:version]`: `mnist`, `glue/sst2`, `mnist:3.0.1`. The config may be left out
where only one is prepared. Without a version the newest prepared version is taken.
"""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from dl_jax.core import bucket
from dl_jax.core.errors import InputError, nearest, one_line
from dl_jax.core.files import absolute, cache_folder, patiently
from dl_jax.data import (
    audio_sets,
    bundled,
    copies,
    diabetes,
    digits,
    moving_digits,
    music_sets,
    python_code,
    shapes,
    tabular_sets,
    text_sets,
    tones,
)
from dl_jax.data.cached import attempted

FORM = re.compile(r"(?P<set>\w+)(?:/(?P<config>[^/:]+))?(?::(?P<version>[\d.]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_RECORDS = re.compile(r"-\d{5,}-of-\d{5,}")  # in the names of record files
BUNDLED = {
    each.name: each
    for each in (
        digits.SET,
        shapes.SET,
        python_code.TOKENS,
        python_code.DOCSTRINGS,
        moving_digits.SCANS,
        tones.SET,
        diabetes.SET,
    )
}
DOWNLOADED = {
    each.name: each
    for each in (
        text_sets.WNUT17,
        text_sets.ROTTEN_TOMATOES,
        text_sets.SICK,
        text_sets.MULTI30K,
        audio_sets.FSDD,
        music_sets.JSB_CHORALES,
        music_sets.NOTTINGHAM,
        *tabular_sets.UCI_REGRESSION,
    )
}
DERIVED = {moving_digits.OF_MNIST.name: moving_digits.OF_MNIST}
_LAYOUT = 5  # version of the cache; increase it when decoding or what is kept changes
_LONGEST_NAME, _LONGEST_SPLIT, _LONGEST_PATH = 200, 1000, 3000  # bytes; a file system takes 255 and 4096


class Prepared(NamedTuple):
    """A prepared set: its name, its version and the folder of its record files.

    If the set is in a bucket, `origin` is its `epath` path there, and `folder` has its description, and those of its
    record files that were needed so far.
    """

    name: str  # with its config, if it has one
    version: str
    folder: Path
    origin: Any = None


def data_folder(data_dir: str | None = None) -> Any:
    """The folder of prepared sets, `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets, as a `pathlib` path.

    Of an address gs://... it is the `epath` path. Only `prepare` writes to it. Raises InputError for other URLs, for a
    bucket that is not there and for what cannot be the name of a folder; Unavailable where a bucket does not answer.
    """
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in folder:
        from etils import epath

        bucket.require(folder, "--data-dir")
        return epath.Path(folder)
    _require_folder(folder, "--data-dir")
    return Path(absolute(folder))


def _cache(cache_dir: str | None) -> Path:
    _require_folder(cache_dir or "", "--cache-dir")  # with a NUL it has no absolute form
    folder = cache_folder(cache_dir)
    _require_folder(str(folder), "--cache-dir")
    return folder


def _require_folder(folder: str, flag: str) -> None:
    parts = [len(os.fsencode(part)) for part in (folder, *folder.split("/"))]
    if "\0" in folder or parts[0] > _LONGEST_PATH or max(parts[1:]) > 255:
        raise InputError(
            f"folder {_shown(folder)} of {len(folder)} characters, expected at most {_LONGEST_PATH}, 255 between two "
            f"slashes, and no NUL; name another with {flag}"
        )


def require_name(name: str) -> None:
    """Raises InputError unless `name` is short and printable, so that it fits into paths and messages of one line."""
    if not _is_line(name, _LONGEST_NAME):
        raise InputError(
            f"data set {_shown(name)} of {len(name)} characters, expected at most {_LONGEST_NAME}, all printable: "
            "`python -m dl_jax.data list` lists the prepared sets"
        )


def normal_split(split: str) -> str:
    """`split` without white space. Raises InputError where it is very long or not printable."""
    split = "".join(split.split())
    if not _is_line(split, _LONGEST_SPLIT):
        raise InputError(
            f"split {_shown(split)} of {len(split)} characters, expected at most {_LONGEST_SPLIT}, all printable, such "
            "as train[:90%]; load its parts one by one"
        )
    return split


def _is_line(text: str, most: int) -> bool:
    return text.isprintable() and len(text.encode()) <= most


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def find(name: str, data_dir: str | None = None, cache_dir: str | None = None) -> Prepared:
    """The prepared set called `name`. Raises InputError, without network access for a local folder, if there is none.

    Of a set in a bucket the description is copied to the cache folder. Raises Unavailable where it cannot be read.
    """
    require_name(name)
    if name in BUNDLED:
        return Prepared(name, BUNDLED[name].version, bundled.prepared(BUNDLED[name], _cache(cache_dir)))
    root = data_folder(data_dir)
    found = lookup(name, root)
    if not found:
        raise InputError(_absent(name, root, data_dir))
    return _nearby(found, _cache(cache_dir)) if "://" in os.fspath(root) else found


def _nearby(found: Prepared, cache: Path) -> Prepared:
    """The set whose folder is an address, with its folder of copies, which differs where the files in the bucket do."""
    entries = patiently(lambda: bucket.listing(found.folder), str(found.folder))
    files = sorted((entry.name, entry.size, entry.crc32c) for entry in entries if not entry.folder)
    place = cache / "copies" / found.name / f"{found.version}-{_digest(files)}"
    copies.fetch(found.folder, [name for name, *_ in files if not _RECORDS.search(name)], place)
    return Prepared(found.name, found.version, place, origin=found.folder)


def lookup(name: str, root: Any) -> Prepared | None:
    """The prepared set called `name` in the data folder `root`, or None if there is none.

    Raises InputError for a name with several prepared configs, and for a version that is not prepared.
    """
    parts = FORM.fullmatch(name)
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
    """All prepared sets in the data folder, sorted by name, each in its newest version."""
    folders = _subfolders(data_folder(data_dir))
    found = {name: versions[-1] for folder in folders for name, versions in _versions_by_name(folder).items()}
    return [Prepared(name, folder.name, folder) for name, folder in sorted(found.items())]


def split_sizes(found: Prepared) -> dict[str, int]:
    """The number of examples in each split, from the description in the folder of the set.

    Raises InputError where the description is damaged, and for a set that is not in array_record format. Raises
    Unavailable where it cannot be read at present.
    """
    file = found.folder / "dataset_info.json"
    try:
        description = json.loads(attempted(file.read_bytes, file))
        sizes = {split["name"]: sum(map(int, split["shardLengths"])) for split in description["splits"]}
        file_format = description.get("fileFormat", "tfrecord")
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{file} is missing or damaged ({type(e).__name__}: {brief(e)}), expected TFDS's description of "
            f"{found.name}: copy it again, or delete its folder and prepare the set again"
        ) from e
    if file_format != "array_record":
        raise InputError(
            f"data set {found.name} in {found.folder} is stored as {file_format}, expected array_record, which is read "
            f"without TensorFlow: prepare it into another folder with `{_command(found.name)} --data-dir FOLDER`"
        )
    return sizes


def cache_entry(found: Prepared, cache_dir: str | None = None) -> Path:
    """The cache folder for data derived from the set. It changes with the name, size or time of any file of the set."""
    if found.origin is not None:
        return _cache(cache_dir) / "columns" / found.name / found.folder.name
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in os.scandir(found.folder) if f.is_file())
    return _cache(cache_dir) / "columns" / found.name / f"{found.version}-{_digest(files)}"


def _digest(files: list[Any]) -> str:
    return hashlib.sha256(repr((_LAYOUT, files)).encode()).hexdigest()[:16]


def tfds_names() -> set[str]:
    """The names of nearly all data sets that TFDS can prepare, from its files, as TFDS's own list needs TensorFlow."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    packages = {folder.name for folder in (package / "datasets").iterdir()}
    checksums = {file.stem for file in (package / "url_checksums").iterdir()}
    modules = {file.stem for file in package.glob("*/*/*.py") if file.stem == file.parent.name}
    return {name for name in packages | checksums | modules if not name.startswith("_")}


def preparable() -> set[str]:
    """The names of nearly all data sets that `prepare` can prepare: TFDS's and our own."""
    return tfds_names() | {*DOWNLOADED, *DERIVED}


def _absent(name: str, root: Any, data_dir: str | None) -> str:
    if name.partition("/")[0].partition(":")[0] in {each.partition("/")[0] for each in preparable()}:
        command = _command(name) + (f" --data-dir {data_dir}" if data_dir else "")
        if "://" in os.fspath(root):
            command = f"{_command(name)} --data-dir FOLDER` and `gcloud storage cp -r FOLDER/{name} {root}"
        return (
            f"data set {name} is not prepared in {root}: prepare it with `{command}`, or use --dataset digits, which "
            "needs no preparation"
        )
    here = [found.name for found in prepared(str(root))]
    return (
        f"data set {name} is neither prepared in {root} nor known to TFDS: `python -m dl_jax.data list` lists the "
        f"prepared sets, and --dataset digits is always available{nearest(name, {*here, *preparable(), *BUNDLED})}"
    )


def _command(name: str) -> str:
    return f"python -m dl_jax.data prepare {name}"


def brief(e: BaseException) -> str:
    """The message of an exception on one line of at most 200 characters, to quote within another message."""
    return one_line(e)[:200]


def _subfolders(folder: Any) -> list[Any]:
    if "://" in os.fspath(folder):
        entries = patiently(lambda: bucket.listing(folder), str(folder))
        return sorted(folder / entry.name for entry in entries if entry.folder)
    return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def _versions(folder: Any) -> list[Any]:
    """The version folders in `folder`, oldest first."""
    versions = [child for child in _subfolders(folder) if _VERSION.fullmatch(child.name)]
    return sorted(versions, key=lambda child: tuple(map(int, child.name.split("."))))


def _versions_by_name(folder: Any) -> dict[str, list[Any]]:
    """The version folders of one data set, oldest first, by its name or by name/config."""
    found = {folder.name: _versions(folder)}
    if not found[folder.name]:
        found = {f"{folder.name}/{config.name}": _versions(config) for config in _subfolders(folder)}
    return {name: versions for name, versions in found.items() if versions}
