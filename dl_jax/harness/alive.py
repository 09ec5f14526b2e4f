"""Ends a process that should end and does not by itself: after a signal, after a hang, and after the end of another.

A thread listens, because Python's signal handlers do not run while the main thread compiles or waits:

- SIGTERM and SIGINT ask the run to end. A fit saves after the step under way, at the same step on all processes, and
  what is not in a fit ends at once. What has not ended within the grace period is ended, with what was saved before.
- A fit or an evaluation that makes no step within the deadline hangs, and is ended.
- When another process of the run has failed or was ended, this one could only wait for it, and ends too.
"""

import contextlib
import faulthandler
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import jax.monitoring

from dl_jax.core import events
from dl_jax.core.errors import UNAVAILABLE, InputError, Unavailable, one_line
from dl_jax.harness import guardian
from dl_jax.harness.machine import HEARTBEAT
from dl_jax.harness.peers import Peers
from dl_jax.harness.run import PREEMPTED, Preempted

TICK = 0.5  # seconds
SHORTEST = 300.0  # seconds, of a deadline that is not given
STEPS = 50  # a deadline that is not given is at least so many of the longest step, or batch of an evaluation
FIRST = 30.0  # seconds added to a given deadline for the first steps or batches, for tracing and for measuring them
SLOWEST = 3600.0  # seconds, for what has no step to compare it with: compiling, saving, waiting for processes
MEASURED = 2  # steps without a check of the deadline, in which to see whether it is shorter than a step
SHOW_CURSOR = "\x1b[?25h\n"  # a progress bar hides it
SILENCE = 20.0  # seconds after which a process of several that cannot run its threads is killed
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # JAX's event, after which it compiles


class Alive:
    """A context in which this process ends within bounded time. It is entered on the main thread.

    `grace` and `deadline` are in seconds; without a deadline it follows from the time of a step. With `signals` SIGTERM
    and SIGINT are caught.
    """

    def __init__(self, *, grace: float, deadline: float | None, peers: Peers | None, signals: bool) -> None:
        self._grace, self._deadline, self._peers, self._signals = grace, deadline, peers, signals
        self._phases: list[str] = []
        self._advanced: list[int] = []  # steps that each phase under way has made
        self._compiling = False
        self._longest: dict[str, float] = {}  # seconds without an event that a step of a phase has taken, by phase
        self._since = time.monotonic()  # of the last event
        self._heard = 0  # events; the thread counts the seconds without one
        self._idle = 0.0
        self._main = threading.get_ident()
        self._calls, self._stop_at, self._lock = 0, None, threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> "Alive":
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        if self._signals:
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._handlers = {n: signal.signal(n, self._asked) for n in (signal.SIGTERM, signal.SIGINT)}
        self._guardian = _guardian() if self._peers else None
        self._threads = [threading.Thread(target=self._watch, name="dl_jax-alive", daemon=True)]
        if self._guardian:
            beat = threading.Thread(target=self._beat, args=(self._guardian,), name="dl_jax-beat", daemon=True)
            self._threads.append(beat)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._signals:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        for thread in self._threads:
            thread.join()
        if self._guardian:
            assert self._guardian.stdin
            with contextlib.suppress(OSError):
                self._guardian.stdin.close()
            self._guardian.wait()
        for end in self._pipe:
            os.close(end)
        jax.monitoring.unregister_event_listener(self._event)
        jax.monitoring.unregister_event_duration_listener(self._duration)

    def preempted(self, step: int) -> bool:
        """Whether to save and end after this step; the same on every process. It is called after each step."""
        with self._lock:
            self._calls += 1
            return self._stop_at is not None and self._calls >= self._stop_at

    def give_up(self, why: str) -> NoReturn:
        """Ends the process at once, from any thread, as one that may be tried again, and tells the others."""
        self._end(UNAVAILABLE, why)

    def _asked(self, number: int, frame: Any) -> None:
        """The handler of a signal: runs on the main thread, between two instructions of Python."""
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if "steps" not in self._phases:
            raise Preempted  # nothing to save
        if not self._peers:
            self._stop_at = 0

    def _event(self, event: str, **details: Any) -> None:
        if threading.get_ident() != self._main:
            return
        seconds = self._new()
        if event == events.BEGIN:
            self._phases.append(details["phase"])
            self._advanced.append(0)
        elif event == events.PROGRESS and self._phases:
            self._step(seconds)
        elif event == events.END:
            if self._phases[-1] == "evaluation":
                self._took(seconds)  # it may have no batches
            self._phases.pop()
            self._advanced.pop()

    def _duration(self, event: str, duration_secs: float, **details: Any) -> None:
        if threading.get_ident() == self._main:
            self._new()
            self._compiling = event == LOWERED

    def _new(self) -> float:
        """Counts an event, and returns the seconds since the last one, without those for which all was suspended."""
        now = time.monotonic()
        seconds, self._since = min(now - self._since, self._idle + 2 * TICK), now
        self._heard += 1
        self._compiling = False
        return seconds

    def _step(self, seconds: float) -> None:
        if self._advanced[-1]:
            self._took(seconds)
            if self._deadline is not None and seconds > self._deadline:
                what = "batch of an evaluation" if self._phases[-1] == "evaluation" else "step"
                raise InputError(
                    f"--deadline {self._deadline:g} is shorter than a {what}, which took {seconds:.2g} s; give several "
                    "times that, or leave the flag out"
                )
        self._advanced[-1] += 1

    def _took(self, seconds: float) -> None:
        phase = self._phases[-1]
        self._longest[phase] = max(self._longest.get(phase, 0.0), seconds)

    def _limit(self) -> float:
        """How long the main thread may do what it does without an event, in seconds."""
        phases, advanced = self._phases[-1:], self._advanced[-1:]
        if not phases:
            return math.inf
        if self._compiling or phases[0] not in ("steps", "evaluation"):
            return max(SLOWEST, self._deadline or 0)
        if self._deadline is not None:
            return self._deadline if advanced > [MEASURED] else self._deadline + FIRST
        longest = self._longest.get(phases[0])
        return SLOWEST if longest is None else max(SHORTEST, STEPS * longest)

    def _watch(self) -> None:
        try:
            self._listen()
        except Exception as error:  # without this thread nothing would end the process
            self._end(1, f"the thread that bounds this process failed ({type(error).__name__}: {one_line(error)})")

    def _listen(self) -> None:
        """The thread. It counts ticks instead of reading a clock, so that a suspended process may go on."""
        before, asked, heard, deaf = time.monotonic(), math.nan, 0, 0.0  # seconds since it was asked, or heard no news
        while not self._over.is_set():
            ready = select.select([self._pipe[0]], [], [], TICK)[0]
            now = time.monotonic()
            tick, before = min(now - before, 2 * TICK), now
            self._idle = self._idle + tick if self._heard == heard else 0.0
            heard, asked = self._heard, asked + tick
            told = set(os.read(self._pipe[0], 4096)) if ready else set()
            if told & {signal.SIGTERM, signal.SIGINT} and math.isnan(asked):
                asked = 0.0
                if self._peers:
                    with contextlib.suppress(RuntimeError):  # its own fit may still save
                        self._peers.ask_to_end()
            if self._peers:
                try:
                    asked, deaf = 0.0 if self._hear(self._peers) and math.isnan(asked) else asked, 0.0
                except RuntimeError:
                    deaf += tick
                if deaf > HEARTBEAT:
                    self._leave(UNAVAILABLE, "process 0 has ended or cannot be reached")
            if asked >= max(self._grace - 4 * TICK, self._grace / 2):
                self._end(PREEMPTED, f"asked to end, and it was not done within --grace {self._grace:g} s")
            limit = self._limit()
            if self._idle > limit and self._heard == heard:
                faulthandler.dump_traceback(2)
                what = (self._phases or ["nothing"])[-1]
                self._end(
                    UNAVAILABLE,
                    f"nothing went on in {what} for {self._idle:.0f} s, where {limit:.0f} s are the limit (see "
                    "--deadline); the process ends, and with --workdir the same command resumes what was saved",
                )

    def _hear(self, peers: Peers) -> bool:
        """Whether a process was asked to end; then agrees with the others on a step. Ends after the end of another.

        Raises RuntimeError where process 0 cannot be reached.
        """
        asked, end = peers.news()
        if end:
            if end.status == UNAVAILABLE:
                faulthandler.dump_traceback(2)  # the process that hangs may be this one
            self._leave(end.status, f"process {end.process} has ended: {end.why or 'it was asked to'}")
        if asked and self._stop_at is None:
            with self._lock:  # no step is counted meanwhile
                try:
                    calls = peers.exchange("asked", str(self._calls), self._grace)
                except Unavailable as error:
                    self._end(PREEMPTED, str(error))
                self._stop_at = 1 + max(map(int, calls))
        return asked

    def _beat(self, guardian: "subprocess.Popen[bytes]") -> None:
        """A thread of its own, because the other may wait for a process that is frozen."""
        assert guardian.stdin
        with contextlib.suppress(OSError):
            while not self._over.wait(TICK):
                os.write(guardian.stdin.fileno(), b".")

    def _end(self, status: int, why: str) -> NoReturn:
        """Ends the process, and tells the others."""
        end_all(self._peers, status, why)
        self._leave(status, why)

    def _leave(self, status: int, why: str) -> NoReturn:
        with contextlib.suppress(OSError):
            os.write(2, f"{SHOW_CURSOR if os.isatty(2) else ''}error: {why}\n".encode())
        os._exit(status)


def end_all(peers: Peers | None, status: int, why: str) -> None:
    """Tells the other processes that this one ends. Process 0, from which they hear it, waits until they have."""
    if peers:
        with contextlib.suppress(RuntimeError):
            peers.tell_end(status, why)
            time.sleep(2 * TICK if peers.process == 0 else 0)


def _guardian() -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-I", "-S", str(Path(guardian.__file__)), str(SILENCE)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
