"""The cache folder, locks between processes, and files written whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dl_jax.core.errors import InputError


def cache_folder(cache_dir: str | None = None) -> Path:
    """`cache_dir`, else $DL_JAX_CACHE_DIR, else $XDG_CACHE_HOME/dl_jax, else ~/.cache/dl_jax.

    It may be deleted at any time.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(absolute(cache_dir or os.environ.get("DL_JAX_CACHE_DIR") or base / "dl_jax"))


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute form of a path; ~ is the home folder. An address such as gs://bucket/run stays as it is."""
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def write_whole(file: Any, data: bytes) -> None:
    """Writes the file at a `pathlib` or `epath` path, all of it or nothing."""
    new = file.with_name(f"{file.name}.new")
    new.write_bytes(data)
    new.replace(file)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds the lock `file`; a process that finds it held waits. Raises InputError where the body cannot write."""
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
