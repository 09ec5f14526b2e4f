"""What a process spends its time on: steps, and apart from them all that is not training."""

import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.monitoring

from dl_jax.core import events

COMPILING = tuple(
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)  # JAX's events at the end of tracing, lowering and compiling


class Clock:
    """A context that counts the seconds of the main thread by what they were spent on.

    That is a phase of `core.events`, "compile", "waiting" for data or other processes, or "other": loading data,
    initialising, drawing.
    """

    def __enter__(self) -> "Clock":
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._phases, self._main = ["other"], threading.get_ident()
        self._began = self._since = time.perf_counter()
        self._compiled: list[tuple[float, float]] = []  # (begin, seconds) of compilations that no later one contains
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_listener(self._event)
        jax.monitoring.unregister_event_duration_listener(self._duration)

    def spent(self) -> dict[str, float]:
        """Seconds since the context was entered by what they were spent on, and "all" of them."""
        self._charge()
        return {"all": self._since - self._began, **self._spent}

    def _charge(self) -> None:
        now = time.perf_counter()
        self._spent[self._phases[-1]] += now - self._since
        self._since = now

    def _event(self, event: str, **details: Any) -> None:
        if event not in (events.BEGIN, events.END) or threading.get_ident() != self._main:
            return
        if event == events.BEGIN:
            self._charge()
            self._phases.append(details["phase"])
        else:
            self._charge()
            self._phases.pop()

    def _duration(self, event: str, duration_secs: float, **details: Any) -> None:
        if threading.get_ident() != self._main:
            return
        if event == events.WAITED:
            self._move("waiting", duration_secs)
        elif event in COMPILING:  # a function is traced within the tracing of another
            begin, inner = time.perf_counter() - duration_secs, 0.0
            while self._compiled and self._compiled[-1][0] >= begin:
                inner += self._compiled.pop()[1]
            self._compiled.append((begin, duration_secs))
            self._move("compile", duration_secs - inner)

    def _move(self, name: str, seconds: float) -> None:
        """Charges seconds of the phase under way to `name` instead."""
        self._spent[name] += seconds
        self._spent[self._phases[-1]] -= seconds


def goodput(spent: Mapping[str, float]) -> float:
    """The share of the time that was spent in steps, 0 to 1.

    A killed attempt counts until its last save. Steps that an attempt lost by an exception count as if they were kept.
    """
    return spent.get("steps", 0.0) / spent["all"] if spent.get("all") else 0.0


def memory() -> dict[str, int]:
    """The most memory in use so far, in bytes: of this process, and of its device where that counts it."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats() or {}
    return found | ({"device": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {})
