"""The processor's cores that this process may use."""

import os


def usable() -> int:
    """How many cores this process may use: fewer than the machine has where it is pinned to some, as in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
