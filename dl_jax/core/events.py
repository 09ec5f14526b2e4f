"""What a process is doing, for whoever listens: phases, signs of progress, and waiting for data.

They are events of `jax.monitoring`, on which JAX reports its own compilations. Without a listener one costs less than a
microsecond.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import jax.monitoring

Phase = Literal["steps", "evaluation", "restore", "save", "waiting"]  # waiting: for other processes

BEGIN, END, PROGRESS, WAITED = (f"/dl_jax/{name}" for name in ("begin", "end", "progress", "waited"))


@contextlib.contextmanager
def phase(name: Phase) -> Iterator[None]:
    """A context, or decorator, for what belongs to a phase. Within another phase it interrupts that one."""
    jax.monitoring.record_event(BEGIN, phase=name)
    try:
        yield
    finally:
        jax.monitoring.record_event(END, phase=name)


def progress() -> None:
    """Tells that a step or a batch of an evaluation has been done."""
    jax.monitoring.record_event(PROGRESS)


def waited(seconds: float) -> None:
    """Tells that, in the phase under way, this many seconds were spent in waiting for data."""
    jax.monitoring.record_event_duration_secs(WAITED, seconds)
