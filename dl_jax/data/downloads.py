"""Sets that TFDS lacks: downloaded, parsed, checked and prepared as TFDS sets, without TensorFlow.

The files are small, so they are read into memory with the standard library, and nothing is written before all examples
are right. TFDS's download manager, which needs no TensorFlow for http either, knows no mirrors, and what it has once
downloaded it takes again at the next attempt, also a damaged file whose checksum nobody has published.

The check is a digest of the examples of every split, not of the files. The examples are what users get: a file from a
mirror, in another archive or with other line ends gives the same digest, and any other content is refused. The digests
were computed from sets that had been prepared before. The files of wnut17, recreated from these, have the SHA-256 that
is published for them. The downloads themselves were not run: no network was there.
"""

import functools
import gzip
import hashlib
import http.client
import io
import json
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dl_jax.core.errors import InputError, one_line
from dl_jax.data import builder
from dl_jax.data.builder import Example, Key

Splits = Mapping[str, list[tuple[Key, Example]]]

PAUSES = (1.0, 4.0)  # seconds between attempts to download
PATIENCE = 60.0  # seconds without a byte after which an attempt has failed


class Tensor(NamedTuple):
    """The kind of a feature that is an array, stored compressed."""

    shape: tuple[int | None, ...]  # None for an axis whose length differs from example to example
    dtype: Any  # NumPy's


class Downloaded(NamedTuple):
    """A set that is made of downloaded files."""

    name: str
    version: str  # increase it when an example changes
    description: str
    homepage: str
    licence: str
    citation: str
    features: Mapping[str, Any]  # `str`, class names, a NumPy type, a `Tensor`, or a list of one of these: a sequence
    files: Mapping[str, tuple[str, ...]]  # addresses of each, tried in turn; #MEMBER is a file of an archive
    parse: Callable[[Mapping[str, Any]], Splits]  # the contents of the files to the examples of each split
    digests: Mapping[str, str]  # of the examples of each split
    target: tuple[str, str] | None = None  # the input and what is to be predicted, where the set has one of each
    encoding: str | None = "utf-8"  # of the files that `parse` gets as texts; None where it gets bytes
    in_order: bool = False  # whether TFDS stores the examples as they come, not in the order of their keys


def prepare(each: Downloaded, root: Path) -> None:
    """Downloads the set and prepares it in the data folder `root`.

    Raises InputError where no address of a file answers, where a file is damaged or lacks what the parser expects, and
    where the examples are not those that the set had when its digests were written down. Then nothing is written.
    """
    opened = functools.cache(_opened)  # several files may be in one archive
    splits = each.parse({file: _content(each, file, opened) for file in each.files})
    for split, examples in splits.items():
        if digest(examples) != each.digests[split]:
            raise InputError(
                f"the split {split} of {each.name} has {len(examples)} examples with the digest {digest(examples)}, "
                f"expected {each.digests[split]}: its files have changed at {each.homepage} or were damaged on the "
                "way, and nothing was prepared; try again, or report it if the digest stays the same"
            )
    described = {
        "description": each.description,
        "homepage": each.homepage,
        "license": each.licence,
        "citation": each.citation,
        "supervised_keys": each.target,
        "disable_shuffling": each.in_order,
    }
    features = {name: _feature(kind) for name, kind in each.features.items()}
    builder.write(root, each.name, each.version, features, splits, **described)


def digest(examples: Iterable[tuple[Key, Example]]) -> str:
    """SHA-256 of the examples of a split with their keys, in hexadecimal, whatever the order in which they come.

    The keys decide in which order TFDS stores the examples. Class labels are names, numbers are as in the source, and
    in the place of an array stand its type, its shape and the SHA-256 of its values.
    """
    lines = sorted(json.dumps([str(key), example], sort_keys=True, default=_array) for key, example in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _array(array: np.ndarray) -> list[Any]:
    stored = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return [array.dtype.name, array.shape, hashlib.sha256(stored.tobytes()).hexdigest()]


def _feature(kind: Any) -> Any:
    """TFDS's feature of a kind of `Downloaded.features`."""
    import tensorflow_datasets as tfds

    match kind:
        case [element] if isinstance(kind, list):
            return tfds.features.Sequence(_feature(element))
        case Tensor(shape, dtype):
            return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="zlib")
        case tuple():
            return tfds.features.ClassLabel(names=list(kind))
        case _ if kind is str:
            return tfds.features.Text()
    return tfds.features.Tensor(shape=(), dtype=kind)


def _content(each: Downloaded, file: str, opened: Callable[[str], Callable[[str], bytes]]) -> str | bytes:
    """A file, decoded if it is a text, from the first of its addresses that has it.

    Raises InputError where none has.
    """
    failures = []
    for address in each.files[file]:
        place, _, member = address.partition("#")
        try:
            content = opened(place)(member)
            return content if each.encoding is None else content.decode(each.encoding)
        except Exception as e:  # many kinds, of the network, of archives and of the encoding
            failures.append(f"{address} ({type(e).__name__}: {one_line(e)[:200]})")
    raise InputError(
        f"cannot download the file {file} of {each.name} from {' or '.join(failures)}: expected a network connection "
        "and an undamaged file; try again later, or prepare the set where there is one and copy its folder"
    )


def _opened(address: str) -> Callable[[str], bytes]:
    """What is at the address, as a function that reads a member of it if it is an archive, which its end tells."""
    data = _download(address)
    if address.endswith(".zip"):
        return zipfile.ZipFile(io.BytesIO(data)).read
    if address.endswith(".tar.gz"):
        return functools.partial(_of_tar, data)
    content = gzip.decompress(data) if address.endswith(".gz") else data
    return lambda _: content


def _of_tar(data: bytes, member: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        file = archive.extractfile(member)
        if file is None:
            raise KeyError(f"{member} is no file")
        return file.read()


def _download(address: str) -> bytes:
    """What is at the address. Attempts that fail are repeated, unless the server says that it has no such file."""
    request = urllib.request.Request(address, headers={"User-Agent": "dl_jax"})
    for pause in (*PAUSES, None):
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.read()
        except (OSError, http.client.HTTPException) as e:
            lasting = isinstance(e, urllib.error.HTTPError) and e.code < 500
            if pause is None or lasting:
                raise
            time.sleep(pause)
    raise AssertionError
