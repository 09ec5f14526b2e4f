"""Paths, the cache folder, locks between processes, files written completely or not at all, and JSON with a digest.

Functions that take a `pathlib` or `epath` path do what their name says in a bucket too (see `bucket`).
"""

import contextlib
import errno
import json
import os
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dl_jax.core import bucket
from dl_jax.core.errors import InputError, Unavailable, reason, warn_once

T = TypeVar("T")

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts to read

UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)


def cache_folder(cache_dir: str | None = None) -> Path:
    """The cache folder: `cache_dir`, else $DL_JAX_CACHE_DIR, else $XDG_CACHE_HOME/dl_jax, else ~/.cache/dl_jax.

    An address is passed over: see `cache_address`. Users may delete the folder at any time.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    named = cache_dir or os.environ.get("DL_JAX_CACHE_DIR") or ""
    return Path(absolute(base / "dl_jax" if not named or "://" in named else named))


def cache_address(cache_dir: str | None = None) -> Any:
    """The `epath` path of the cache that machines share, if `cache_dir`, else $DL_JAX_CACHE_DIR, is one in a bucket.

    None if it is not. Raises InputError where there is no such bucket, and Unavailable where it does not answer.
    """
    named = cache_dir or os.environ.get("DL_JAX_CACHE_DIR") or ""
    if "://" not in named:
        return None
    from etils import epath

    bucket.require(named, "--cache-dir")
    return epath.Path(named)


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute form of a path; ~ is the home folder. An address such as gs://bucket/run stays as it is."""
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def failures(path: str | os.PathLike[str]) -> type[Exception]:
    """What a failed access to `path` raises: OSError, but for an address any exception, as each client has its own."""
    return Exception if "://" in os.fspath(path) else OSError


def write_whole(file: Any, data: bytes) -> None:
    """Writes `data` to the file at a `pathlib` or `epath` path, whose folder is created if it is missing.

    A kill, a loss of power or a failure leaves the old file or the new one. Threads and processes may write the same
    file at the same time; one of them is the last.
    """
    if "://" in os.fspath(file):
        file.write_bytes(data)  # an object is written whole or not at all, and needs no folder
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{secrets.token_hex(4)}.new")
    try:
        with new.open("wb") as stream:
            stream.write(data)
            stream.flush()
            _sync(stream.fileno())
        new.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        _sync(folder)
    finally:
        os.close(folder)


def _sync(descriptor: int) -> None:
    """Waits until the file is on the disk, if the file system can tell."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def exists(path: Any) -> bool:
    """Whether a file or folder is at a `pathlib` or `epath` path. Raises the system's error where it cannot tell.

    `path.exists()` would say no. At an address its client decides.
    """
    if "://" in os.fspath(path):
        return path.exists()
    try:
        path.stat()
    except MISSING:
        return False
    return True


def is_folder(path: Any) -> bool:
    """Whether a folder is at a `pathlib` or `epath` path. Raises the system's error as `exists` does."""
    if "://" in os.fspath(path):
        return bucket.is_folder(path)
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except MISSING:
        return False


def children(folder: Any) -> list[Any]:
    """What is in the folder at a `pathlib` or `epath` path. Raises the system's or the client's error."""
    if "://" in os.fspath(folder):
        return [folder / entry.name for entry in bucket.listing(folder)]
    return list(folder.iterdir())


def move(old: Any, new: Any) -> None:
    """Renames the file or folder at a `pathlib` or `epath` path; in a bucket, object by object (see `bucket.move`)."""
    if "://" in os.fspath(old):
        bucket.move(old, new)
    else:
        old.replace(new)


def patiently(read: Callable[[], T], what: str) -> T:
    """What `read()` gives. Where the system or a bucket fails it is tried again, with growing pauses.

    Raises Unavailable, in which `what` is named, where every attempt failed; and what is in `MISSING` at once.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except MISSING:
            raise
        except Exception as error:
            if not (isinstance(error, OSError) or bucket.is_failure(error)):
                raise
            if pause is None:
                raise Unavailable(
                    f"{what} cannot be read ({reason(error)}), tried {len(PAUSES) + 1} times in {sum(PAUSES):g} s; "
                    "nothing was changed: give the same command again when it can be read"
                ) from error
            time.sleep(pause)
    raise AssertionError


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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        without = "another process may do the same work at the same time; the run goes on without the lock"
        with lock(file, f"{file.parent} cannot be locked", without, wait=True):
            yield
    except OSError as e:
        raise InputError(
            f"cannot write in {file.parent} ({reason(e)}): expected a folder with free space that you may write to; "
            "name another with --cache-dir, or --data-dir when preparing"
        ) from e


@contextlib.contextmanager
def lock(file: str | os.PathLike[str], what: str, without: str, *, wait: bool) -> Iterator[None]:
    """A context that holds the lock `file`, which the system releases when the process ends, also if it is killed.

    Where another process holds it, it waits, or raises BlockingIOError if `wait` is False. A file system that has no
    locks gives a warning, `what` (the reason): `without`, and the body runs without the lock.
    """
    import fcntl

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise BlockingIOError(error.errno, "another process holds the lock") from error
            if error.errno not in UNSUPPORTED:
                raise
            warn_once(what, error, without)
        yield
    finally:
        os.close(descriptor)
