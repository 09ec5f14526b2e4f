"""Files that several processes may want to write at once."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dl_jax.core.errors import InputError


def cache_folder(cache_dir: str | None = None) -> Path:
    """`cache_dir`, else $XDG_CACHE_HOME/dl_jax, else ~/.cache/dl_jax. It may be deleted at any time."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(cache_dir or base / "dl_jax").expanduser().absolute()


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
