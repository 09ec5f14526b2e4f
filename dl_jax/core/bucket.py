"""Google Cloud Storage: what a bucket does not do as a folder does, for addresses gs://BUCKET/NAME.

`etils.epath` gives such an address the methods of a path, by way of gcsfs; Orbax, TFDS and JAX's compilation cache use
it too. A bucket has no folders, only names with slashes. An object is written whole or not at all, and not appended to;
a folder is renamed object by object; there are no locks, but an object can be replaced on condition of what it is.
"""

import functools
import logging
import os
import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from dl_jax.core.errors import InputError, Unavailable, one_line, reason

# Not every name that a bucket takes: of its clients some expand * ? [ ], and others read # % and .. as parts of a URL.
ADDRESS = re.compile(r"gs://([a-z0-9][-_.a-z0-9]{1,220}[a-z0-9])(?!.*/\.\.(?:/|$))(?:/[^][*?#%\x00-\x1f\x7f]*)?")
CLIENTS = ("gcsfs", "fsspec", "google", "aiohttp", "requests")  # packages whose exceptions say that a bucket failed
PATIENCE = 10.0  # seconds for one request of `swap` and `look`
BUSY = (408, 429)  # HTTP's codes below 500 for what may be better later
FORBIDDEN = ("Forbidden", "PERMISSION_DENIED", "UNAUTHENTICATED")  # gcsfs's word for it, and TensorStore's codes


@functools.cache
def client() -> Any:
    """gcsfs's file system. All of this process that uses gs:// addresses has its settings.

    Raises InputError where gcsfs is not installed.
    """
    os.environ["EPATH_USE_TF"] = "false"  # epath prefers TensorFlow where it is installed
    # One protocol, HTTP, for buckets of all kinds; else gcsfs asks for the kind of each, with other permissions.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec.config
        import gcsfs
    except ImportError as error:
        raise InputError(
            f"gs:// needs a package ({reason(error)}), expected gcsfs to be installed: pip install -e '.[tpu]'"
        ) from error
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # others write there too
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its errors arrive as exceptions too
    return gcsfs.GCSFileSystem()


def require(address: str, flag: str) -> None:
    """Raises InputError unless `address`, given with `flag`, is one in a bucket that is there and may be listed.

    Raises Unavailable where the bucket does not answer.
    """
    found = ADDRESS.fullmatch(address)
    if not found:
        raise InputError(
            f"{flag} {one_line(address)}, expected a local folder or gs://BUCKET/NAME without any of * ? [ ] # % and "
            "..; give one of them"
        )
    try:
        client().call(
            "GET", "b/{}/o", found[1], maxResults=1, timeout=3 * PATIENCE
        )  # the first asks for an account too
    except FileNotFoundError as error:
        raise InputError(
            f"{flag} {address}: there is no bucket {found[1]}, expected one that exists; create it with "
            f"`gcloud storage buckets create gs://{found[1]}`, or name another"
        ) from error
    except InputError:
        raise
    except Exception as error:
        raise refusal(f"{flag} {address}", error) from error


def refusal(what: str, error: Exception) -> InputError | Unavailable:
    """What to raise for a failed access to the address `what`: InputError where the bucket has refused it."""
    code = getattr(error, "code", None)  # of gcsfs's HttpError
    refused = isinstance(code, int) and 400 <= code < 500 and code not in BUSY
    if refused or str(error).startswith(FORBIDDEN) or getattr(error, "retryable", True) is False:
        return InputError(
            f"{what} may not be used ({reason(error)}), expected an account that may list, read and write it; log in "
            "with `gcloud auth application-default login`, or name another"
        )
    return Unavailable(f"{what} does not answer ({reason(error)}); give the same command again when it does")


def is_failure(error: Exception) -> bool:
    """Whether `error` is one of a bucket's client, which has kinds of its own besides OSError."""
    return type(error).__module__.partition(".")[0] in CLIENTS


def is_folder(path: Any) -> bool:
    """Whether there are objects below an address. Raises the client's error where it cannot tell."""
    try:
        return client().info(os.fspath(path))["type"] == "directory"
    except FileNotFoundError:
        return False


class Entry(NamedTuple):
    """What is directly below an address: an object, or a folder, of which the bucket knows the name alone."""

    name: str
    folder: bool
    size: int  # bytes
    crc32c: str  # the bucket's digest of it, in base64


def listing(path: Any) -> list[Entry]:
    """What is directly below an address. Raises the client's errors."""
    own = _name(path)
    try:
        found = client().ls(own, detail=True)
    except FileNotFoundError:  # there is no empty folder
        return []
    return [
        Entry(PurePosixPath(each["name"]).name, each["type"] == "directory", int(each["size"]), each.get("crc32c", ""))
        for each in found
        if each["name"].rstrip("/") != own  # an object may stand for the folder itself
    ]


def move(old: Any, new: Any) -> None:
    """Renames the object or folder at the address `old`.

    All is copied before something is removed. The objects directly in a folder, such as the mark of a complete
    checkpoint, are copied last and removed first: at each moment, where they are, the rest is.
    """
    source, target = _name(old), _name(new)
    found = sorted(client().find(source), key=lambda name: name.count("/"), reverse=True)
    marks = [name for name in found if "/" not in name.removeprefix(source).lstrip("/")]
    inner = [name for name in found if name not in marks]
    for names in filter(None, (inner, marks)):
        client().copy(names, [target + name.removeprefix(source) for name in names])
    for names in filter(None, (marks, inner)):
        client().rm(names)


def look(address: Any) -> tuple[bytes, int] | None:
    """The content of an object and its generation, a number that differs after each write; None if there is none."""
    bucket, _, key = _name(address).partition("/")
    try:
        headers, content = client().call("GET", "b/{}/o/{}", bucket, key, alt="media", timeout=PATIENCE)
    except FileNotFoundError:
        return None
    return content, int(headers["X-Goog-Generation"])


def swap(address: Any, content: bytes | None, generation: int) -> int:
    """Writes an object, or removes it for None, if it is of this generation; 0 is that of an object that is not there.

    Returns the new generation. This is one operation of the bucket, whoever else uses it. Raises FileExistsError or
    FileNotFoundError where the object is of another generation, and the client's errors.
    """
    bucket, _, key = _name(address).partition("/")
    condition: dict[str, Any] = {"ifGenerationMatch": generation, "timeout": PATIENCE}
    uploads = client().base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o"
    try:
        if content is None:
            client().call("DELETE", "b/{}/o/{}", bucket, key, **condition)
            return 0
        written = client().call(
            "POST", uploads, bucket, uploadType="media", name=key, data=content, json_out=True, **condition
        )
        return int(written["generation"])
    except Exception as error:
        if getattr(error, "code", None) == 412:  # of an older gcsfs; a newer one raises FileExistsError itself
            raise FileExistsError(os.fspath(address)) from error
        raise


def _name(address: Any) -> str:
    return os.fspath(address).removeprefix("gs://").rstrip("/")
