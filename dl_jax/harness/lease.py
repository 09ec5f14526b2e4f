"""A lease: what takes the place of a lock for a folder in a bucket, which has none.

The run that uses a folder renews the object `.lease` in it, by writing it anew. A bucket gives each write of an object
a new generation, and writes on condition that the generation is still a given one; therefore of several runs that take
a lease one succeeds, and a run learns at its next renewal that another has taken it. What is compared is whether the
generation has changed within a span of a process's own clock, never the clocks of two machines.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dl_jax.core.bucket import look, swap
from dl_jax.core.errors import reason, spared

NAME = ".lease"
RENEWED = 10.0  # seconds between renewals
LOST = 40.0  # seconds without a renewal that succeeded, after which the holder tries once more and gives up
FREE = 60.0  # seconds without a renewal that is seen, after which another takes the lease; LOST and a request are less
TICK = 2.0  # seconds between looks at a lease that another holds


@contextlib.contextmanager
def leased(folder: Any, lost: Callable[[str], object]) -> Iterator[None]:
    """A context that holds the lease of `folder`, the `epath` path of an address.

    Where there is a lease it is watched until it changes, or for a minute, after which it is taken over. Raises
    BlockingIOError where another process renews it, and the errors of the bucket's client. Where the lease is lost, a
    thread calls `lost` with the reason; it has to end the process before that writes anything else.
    """
    file, owner = folder / NAME, secrets.token_hex(8)
    content = json.dumps({"owner": owner, "host": socket.gethostname(), "pid": os.getpid()}).encode()
    held, over = [_take(file, content)], threading.Event()

    def renew() -> None:
        renewed, pause = time.monotonic(), RENEWED
        while not over.wait(pause):
            began = time.monotonic()
            try:
                held[0] = _written(file, content, held[0])
                renewed, pause = began, RENEWED
            except BlockingIOError as error:
                lost(f"the lease {file} is lost to {error.strerror}; this process ends, and what was saved is kept")
                return
            except Exception as error:  # of the bucket's client
                spent = time.monotonic() - renewed
                if spent > LOST:
                    lost(
                        f"the lease {file} could not be renewed for {spent:.0f} s ({reason(error)}), and another "
                        "process may take it; give the same command again"
                    )
                    return
                pause = min(RENEWED, LOST - spent)  # so that the last attempt ends before FREE

    thread = threading.Thread(target=renew, name="dl_jax-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with (
            spared(f"{file} cannot be removed", f"the next run waits {FREE:g} s for it", Exception),
            contextlib.suppress(FileExistsError, FileNotFoundError),  # another has taken it
        ):
            swap(file, None, held[0])


def _take(file: Any, content: bytes) -> int:
    """Writes the lease as soon as nobody holds it, and returns its generation. Raises BlockingIOError."""
    found = look(file)
    if found is None:
        return _written(file, content, 0)
    print(f"{file} is held by {_holder(found[0])}; waiting up to {FREE:g} s for a sign of life", file=sys.stderr)
    began = time.monotonic()
    while time.monotonic() - began < FREE:
        time.sleep(TICK)
        now = look(file)
        if now is None:
            return _written(file, content, 0)
        if now[1] != found[1]:
            raise BlockingIOError(0, _holder(now[0]))
    return _written(file, content, found[1])


def _written(file: Any, content: bytes, generation: int) -> int:
    """Writes the lease if it is of this generation, and returns the new one. Raises BlockingIOError."""
    try:
        return swap(file, content, generation)
    except (FileExistsError, FileNotFoundError) as error:
        found = look(file)
        if found and found[0] == content:  # an earlier request has succeeded, and its answer was lost
            return found[1]
        raise BlockingIOError(0, _holder(found[0]) if found else "nobody, as it was removed") from error


def _holder(content: bytes) -> str:
    try:
        found = json.loads(content)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"
