"""Prepares data sets with TFDS's builders or our own, in array_record format, which is read without TensorFlow."""

import functools
import importlib.util
import os
import re
from pathlib import Path

import numpy as np

from dl_jax.core.errors import InputError, nearest
from dl_jax.core.files import locked
from dl_jax.data import bundled, downloads
from dl_jax.data.bundled import Derived
from dl_jax.data.columns import load
from dl_jax.data.downloads import Downloaded
from dl_jax.data.source import (
    BUNDLED,
    DERIVED,
    DOWNLOADED,
    FORM,
    Prepared,
    brief,
    data_folder,
    find,
    lookup,
    preparable,
    require_name,
    split_sizes,
    tfds_names,
)


def prepare(name: str, data_dir: str | None = None) -> Prepared:
    """Downloads and prepares the set `name` in `data_dir`, unless it is already prepared, and returns where it is.

    It is one of TFDS's sets, of ours (`source.DOWNLOADED`), or made of a prepared set (`source.DERIVED`). Several
    processes may call it at once: one prepares the set while the others wait. Raises InputError where the set cannot be
    prepared: for a malformed or unknown name, for a set that needs TensorFlow where this is not installed, for one made
    of a set that is not prepared, and where the network, a download or the disk fails.
    """
    require_name(name)
    if name in BUNDLED:
        return find(name)
    if not FORM.fullmatch(name):
        raise InputError(
            f"data set {name!r}, expected a name such as mnist, glue/sst2 or mnist:3.0.1{nearest(name, preparable())}"
        )
    root = data_folder(data_dir)
    if "://" in os.fspath(root):
        raise InputError(
            f"cannot prepare {name} in {root}, expected a local folder; give one with --data-dir, then copy it with "
            f"`gcloud storage cp -r FOLDER/{name} {root}`"
        )
    lock_name = re.sub(r"\W", "_", name)
    with locked(root / f".{lock_name}.lock"):
        found = lookup(name, root)
        if not found:
            _download_and_prepare(name, root)
            found = lookup(name, root)
    if not found:
        raise InputError(
            f"TFDS prepared {name}, but no set of that name is in {root}: see `python -m dl_jax.data list` for its name"
        )
    split_sizes(found)  # raises where the set is in another format or damaged
    return found


def _download_and_prepare(name: str, root: Path) -> None:
    import tensorflow_datasets as tfds

    ours = _ours(name)
    try:
        if isinstance(ours, Derived):
            bundled.write(ours, ours.splits(functools.partial(_source, ours, root)), root)
        elif ours:
            downloads.prepare(ours, root)
        else:
            tfds.builder(name, data_dir=root, file_format="array_record").download_and_prepare()
    except InputError:
        raise
    except Exception as e:  # many kinds, raised by TFDS, the network or the disk
        raise InputError(_reason(name, root, e)) from e


def _source(each: Derived, root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the set that another is made of."""
    records = load(each.source, split, str(root), only=("image", "label"))
    return records["image"], records["label"]


def _ours(name: str) -> Downloaded | Derived | None:
    """The set of our own that has this name, or None. Raises InputError for a config or version that it lacks."""
    set_name, config, version = FORM.fullmatch(name).groups()  # pyright: ignore
    ours = {each.name: each for each in (*DOWNLOADED.values(), *DERIVED.values()) if _set_name(each) == set_name}
    found = ours.get(f"{set_name}/{config}" if config else set_name)
    if ours and (not found or version not in (None, found.version)):
        names = [*ours] if found is None and len(ours) > 1 else _with_version(found or next(iter(ours.values())))
        raise InputError(f"data set {name} is unknown, expected {' or '.join(names)}; use one of them")
    return found


def _set_name(each: Downloaded | Derived) -> str:
    return each.name.partition("/")[0]


def _with_version(each: Downloaded | Derived) -> list[str]:
    return [each.name, f"{each.name}:{each.version}"]


def _reason(name: str, root: Path, e: Exception) -> str:
    import tensorflow_datasets as tfds

    unknown = isinstance(e, tfds.core.DatasetNotFoundError)
    listed = name.partition("/")[0].partition(":")[0] in tfds_names()
    hidden = listed if unknown else "tensorflow" in str(e).lower()  # TFDS finds some sets only if TensorFlow is there
    if hidden and importlib.util.find_spec("tensorflow") is None:
        return (
            f"preparing {name} needs TensorFlow, expected it to be installed: pip install -e '.[prepare]', "
            "then repeat this command; training does not need it"
        )
    if unknown:
        return f"data set {name} is unknown to TFDS, expected one of its names{nearest(name, preparable())}"
    return f"TFDS could not prepare {name} in {root} ({type(e).__name__}: {brief(e)}): fix this, then try again"
