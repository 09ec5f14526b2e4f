"""Copies on this machine's disk of what is in a bucket: record files are opened and columns are mapped by path."""

import base64
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dl_jax.core import bucket
from dl_jax.core.errors import InputError, Unavailable
from dl_jax.core.files import MISSING, locked, patiently

_BLOCK = 32 << 20  # bytes read at a time


def fetch(origin: Any, names: Iterable[str], folder: Path) -> None:
    """Copies the files `names` in `origin`, the `epath` path of an address, to `folder`, but for those that are there.

    One process copies while others wait. Raises InputError for a file that is missing, and where the disk cannot be
    written; Unavailable where the bucket cannot be read.
    """
    absent = [name for name in dict.fromkeys(names) if not (folder / name).is_file()]
    if not absent:
        return
    with locked(folder.with_name(f"{folder.name}.lock")):
        folder.mkdir(exist_ok=True)
        absent = [name for name in absent if not (folder / name).is_file()]
        sizes = [_described(origin / name)["size"] for name in absent]
        if sum(sizes) > _BLOCK:
            print(f"copying {sum(sizes) / 1e6:,.0f} MB from {origin} to {folder}, once", file=sys.stderr)
        for name in absent:
            download(origin / name, folder / name)


def download(source: Any, file: Path) -> None:
    """Copies the object at the `epath` path `source` to `file`, and compares it with the bucket's digest of it.

    The file is complete and on disk, or not there. Raises InputError where there is no such object, Unavailable where
    it cannot be read or has changed meanwhile, and OSError where the file cannot be written.
    """
    import google_crc32c  # comes with gcsfs

    address, described, crc = os.fspath(source), _described(source), 0
    size = described["size"]
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.new")
    try:
        with open(partial, "wb") as opened:
            for start in range(0, size, _BLOCK):
                read = lambda start=start: bucket.client().cat_file(address, start, min(start + _BLOCK, size))
                block = patiently(read, address)
                crc = google_crc32c.extend(crc, block)
                opened.write(block)
            opened.flush()
            os.fsync(opened.fileno())
        if base64.b64encode(crc.to_bytes(4, "big")).decode() != described["crc32c"]:
            raise Unavailable(f"{address} has changed while it was copied; give the same command again")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _described(source: Any) -> dict[str, Any]:
    """The bucket's description of an object."""
    try:
        return patiently(lambda: bucket.client().info(os.fspath(source)), os.fspath(source))
    except MISSING as error:
        raise InputError(
            f"{source} is missing, expected a file of the data set: copy it there, or prepare the set again"
        ) from error
