"""The data sets that a run has read: whoever reads a set names it here, and a run asks for the names.

A run's checkpoints and its processes compare what they have read. Outside of `recorded` nothing is kept.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from dl_jax.core.errors import InputError

_read: ContextVar[dict[str, str] | None] = ContextVar("read", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, str]]:
    """A context that gives {name: fingerprint} of what has been read in it so far."""
    record: dict[str, str] = {}
    token = _read.set(record)
    try:
        yield record
    finally:
        _read.reset(token)


def note(name: str, fingerprint: str) -> None:
    """Notes that `name`, such as "mnist train", was read, and what it held: its version and a digest.

    The fingerprint must not depend on the machine. Raises InputError where the same name was read with another one.
    """
    record = _read.get()
    if record is None:
        return
    if record.setdefault(name, fingerprint) != fingerprint:
        raise InputError(
            f"data set {name} is now {fingerprint}, expected {record[name]}, which this run has read before; run it "
            "again, and leave the data set as it is meanwhile"
        )
