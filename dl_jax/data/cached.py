"""What is kept in the cache folder: files with digests, which are checked whenever a file is read, and made anew.

A missing or damaged file costs the time to make it again. A failure to read is not damage: it is tried again, and then
ends the program, with the file left as it is.
"""

import contextlib
import functools
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dl_jax.core import files
from dl_jax.core.errors import InputError
from dl_jax.core.files import MISSING, locked, patiently, sealed, unsealed, write_whole

T = TypeVar("T")
Digests = Mapping[str, list[int]]  # size and CRC-32 by the name of a file

_BLOCK = 1 << 20  # bytes read at a time


class DamagedError(ValueError):
    """Raised for a file that is not what was written."""


def get(place: Path, read: Callable[[], T | None], make: Callable[[], None]) -> T:
    """What `read()` gives of the file or folder `place`, which `make()` writes first if it is missing or damaged.

    It is missing where `read` returns None, and damaged where `read` raises DamagedError, of which a warning tells. One
    process makes it while others wait. Raises InputError where it cannot be written, and what `read` and `make` raise.
    """
    with contextlib.suppress(DamagedError):
        if (found := read()) is not None:
            return found
    with locked(place.with_suffix(".lock")):
        try:
            found = read()  # another process may have been first
        except DamagedError as e:
            warnings.warn(f"{place} in the cache is damaged ({e}); it is made anew", stacklevel=3)
            found = None
        if found is None:
            make()
            with contextlib.suppress(DamagedError):
                found = read()
    if found is None:
        raise InputError(f"the cache in {place} cannot be read back, expected what was just written: delete it")
    return found


def attempted(read: Callable[[], T], file: Path) -> T:
    """What `read()` gives, which reads `file`. Raises DamagedError where there is no such file, and Unavailable."""
    try:
        return patiently(read, str(file))
    except MISSING as e:
        raise DamagedError(f"{file.name} is missing") from e


def exists(file: Path) -> bool:
    """Whether the file or folder is there. Raises Unavailable where the system cannot tell."""
    return patiently(lambda: files.exists(file), str(file))


def digests(folder: Path) -> Digests:
    """The digests of all files in `folder`."""
    return {file.name: _digest(file) for file in sorted(folder.iterdir())}


def require_whole(folder: Path, expected: Digests) -> None:
    """Raises DamagedError unless the files in `folder` have the digests that they had."""
    for name, digest in expected.items():
        file = folder / name
        if attempted(functools.partial(_digest, file), file) != digest:
            raise DamagedError(f"{name} does not match its digest")


def _digest(file: Path) -> list[int]:
    """Size and CRC-32. Reads instead of mapping, as the failure to read a map kills the process."""
    size = crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def read_sealed(file: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote, or None where the file is missing. Raises DamagedError and Unavailable."""
    if not exists(file):
        return None
    try:
        return unsealed(attempted(file.read_bytes, file))
    except DamagedError:
        raise
    except ValueError as e:
        raise DamagedError(f"{file.name}: {e}") from e


def write_sealed(file: Path, content: Mapping[str, Any]) -> None:
    """Writes `content`, which JSON can represent, with its digest. Its name stands for the whole, on disk."""
    write_whole(file, json.dumps(sealed(content)).encode())


def write_array(file: Path, array: np.ndarray) -> None:
    """Writes `array` as a .npy file, and waits until it is on disk."""
    with open(file, "wb") as opened:
        np.save(opened, array, allow_pickle=False)
        opened.flush()
        os.fsync(opened.fileno())


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
