"""Paths, the cache folder, locks between processes, files written completely or not at all, and JSON with a digest."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dl_jax.core.errors import InputError


def cache_folder(cache_dir: str | None = None) -> Path:
    """The cache folder: `cache_dir`, else $DL_JAX_CACHE_DIR, else $XDG_CACHE_HOME/dl_jax, else ~/.cache/dl_jax.

    Users may delete it at any time.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(absolute(cache_dir or os.environ.get("DL_JAX_CACHE_DIR") or base / "dl_jax"))


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute form of a path; ~ is the home folder. An address such as gs://bucket/run stays as it is."""
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def write_whole(file: Any, data: bytes) -> None:
    """Writes `data` to the file at a `pathlib` or `epath` path. A kill leaves the old file or the new one."""
    new = file.with_name(f"{file.name}.new")
    new.write_bytes(data)
    new.replace(file)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, which JSON can represent, with a digest of itself as `crc32`."""
    return {**content, "crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def unsealed(data: bytes) -> dict[str, Any]:
    """What was `sealed`, from its JSON, without the digest. Raises ValueError where it is damaged."""
    try:
        found = json.loads(data)
        content = {key: value for key, value in found.items() if key != "crc32"}
        agrees = found == sealed(content)
    except Exception as error:  # damage takes any form
        raise ValueError(f"it is no JSON object ({type(error).__name__})") from error
    if not agrees:
        raise ValueError("it does not match its digest")
    return content


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """A context that holds the lock `file` and waits while another process holds it.

    Raises InputError where the body cannot write to the disk.
    """
    import filelock

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file):
            yield
    except OSError as e:
        raise InputError(
            f"cannot write in {file.parent} ({e.strerror or e}): expected a folder with free space that you may write "
            "to; name another with --cache-dir, or --data-dir when preparing"
        ) from e
