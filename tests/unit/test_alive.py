"""What a process spends its time on, when it hangs, what its processes differ in, and the trace of some steps."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dl_jax.core import events
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import State
from dl_jax.harness import alive as alive_module
from dl_jax.harness import guardian
from dl_jax.harness.alive import Alive
from dl_jax.harness.clock import COMPILING, Clock, goodput, memory
from dl_jax.harness.peers import differing, flat
from dl_jax.harness.profile import Profile
from dl_jax.harness.run import Preempted


def doing(seconds: float) -> None:
    time.sleep(seconds)


# -------------------------------------------------------------------------------------------------------------- clock


def test_every_second_is_counted_once():
    with Clock() as clock:
        doing(0.05)
        with events.phase("steps"):
            doing(0.1)
            with events.phase("evaluation"):
                doing(0.05)
                with events.phase("evaluation"):  # an evaluator within the measurement of a fit
                    doing(0.05)
            doing(0.1)
            events.waited(0.15)
        spent = clock.spent()
    everything = spent.pop("all")
    assert sum(spent.values()) == pytest.approx(everything, abs=1e-6)
    expected = {"other": 0.05, "steps": 0.05, "evaluation": 0.1, "waiting": 0.15}
    for name, seconds in expected.items():
        assert seconds <= spent[name] + 0.001 < seconds + 0.1, spent  # sleeping takes longer, never less
    assert goodput({"all": 4.0, "steps": 3.0}) == 0.75
    assert goodput({}) == 0.0


def test_compilations_within_each_other_are_counted_once():
    with Clock() as clock:
        began = time.perf_counter()
        inner = jax.jit(lambda x: jnp.sort(x) * 3)
        jax.block_until_ready(jax.jit(lambda x: inner(x) + jnp.cumsum(inner(x + 1)))(jnp.arange(7.0)))
        took = time.perf_counter() - began
        spent = clock.spent()
    assert 0 < spent["compile"] <= took
    assert spent["other"] >= -1e-6
    with Clock() as clock:
        doing(0.05)
        jax.monitoring.record_event_duration_secs(COMPILING[0], 0.02)  # of a function within
        doing(0.05)
        jax.monitoring.record_event_duration_secs(COMPILING[0], 0.1)  # another
        assert clock.spent()["compile"] == pytest.approx(0.1, abs=1e-6)


@pytest.fixture
def heard():
    """The events of this package, in order."""
    names = []
    listen = lambda event, **details: event.startswith("/dl_jax/") and names.append(details.get("phase") or event[8:])
    jax.monitoring.register_event_listener(listen)
    yield names
    jax.monitoring.unregister_event_listener(listen)


def test_a_fit_and_an_evaluation_tell_of_every_step_and_batch(heard):
    records = {"x": np.ones((10, 2), np.float32)}
    mean = lambda variables, batch, key: {"x": (batch["x"].sum(), batch["mask"].sum())}
    measure = evaluator(mean, records, 4, jax.random.split(jax.random.key(0), 1))
    step = lambda state, batch: (state._replace(step=state.step + 1), {"loss": batch["x"].sum()})
    state = State(jnp.int32(0), {"w": jnp.zeros((1, 2))}, {}, (), jax.random.key(0))
    fit(step, state, lambda i: {"x": np.ones(2, np.float32)}, steps=4, every=2, watch=Watch(4, measure))
    steps, evaluation = ["progress"] * 2, ["evaluation", "evaluation", *["progress"] * 3, "evaluation", "evaluation"]
    assert heard == ["steps", *steps, *steps, *evaluation, "steps"]  # each phase with its end


def test_a_phase_that_fails_ends():
    with Clock() as clock:
        with pytest.raises(RuntimeError), events.phase("steps"):
            raise RuntimeError
        doing(0.05)
        assert clock.spent()["other"] > 0.04


def test_memory_is_that_of_this_process():
    hoard = bytearray(300 << 20)
    assert memory()["host"] > len(hoard)


# ----------------------------------------------------------------------------------------------------------- deadline


@pytest.fixture
def limits(monkeypatch):
    """Makes the thread look often, and ends of the process exceptions of the test."""
    monkeypatch.setattr(alive_module, "TICK", 0.02)
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(alive_module.faulthandler, "dump_traceback", lambda file: None)
    return ends


def quiet(alive, ends, seconds=2.0):
    until = time.monotonic() + seconds
    while not ends and time.monotonic() < until:
        time.sleep(0.01)
    return ends[:1]


def two_steps() -> None:
    for _ in range(4):
        events.progress()


def test_a_fit_that_makes_no_step_within_the_deadline_is_ended(limits, capfd):
    with Alive(grace=30, deadline=0.3, peers=None, signals=False) as alive, events.phase("steps"):
        two_steps()
        assert quiet(alive, limits) == [75]
    assert "error: nothing went on in steps for 0 s, where 0 s are the limit" in capfd.readouterr().err


def test_what_goes_on_or_is_no_fit_is_not_ended(limits):
    with Alive(grace=30, deadline=0.3, peers=None, signals=False) as alive:
        assert quiet(alive, limits, 0.6) == []  # loading data, drawing
        with events.phase("steps"):
            two_steps()
            for _ in range(6):
                doing(0.1)
                events.progress()
            with events.phase("save"):
                assert quiet(alive, limits, 0.6) == []
            jax.monitoring.record_event_duration_secs(alive_module.LOWERED, 0.1)  # it compiles now
            assert quiet(alive, limits, 0.6) == []


def test_a_deadline_shorter_than_a_step_is_one_line():
    with Alive(grace=30, deadline=0.05, peers=None, signals=False), events.phase("steps"):
        two_steps()
        doing(0.1)
        with pytest.raises(
            InputError, match=r"--deadline 0.05 is shorter than a step, which took 0.1.* s; give several"
        ):
            events.progress()


def test_a_deadline_shorter_than_a_step_is_no_hang(limits):
    """The first steps are measured before a deadline ends a run that is slow and healthy."""
    with Alive(grace=30, deadline=0.1, peers=None, signals=False), events.phase("steps"):
        events.progress()
        doing(0.5)
        with pytest.raises(InputError, match=r"--deadline 0.1 is shorter than a step, which took 0.5"):
            events.progress()
    assert limits == []


def test_a_process_that_was_suspended_has_taken_no_longer(limits):
    with Alive(grace=30, deadline=1, peers=None, signals=False) as alive, events.phase("steps"):
        two_steps()
        alive._since -= 1000  # as the clock shows it after a suspension, in which the thread counted nothing
        events.progress()
        assert alive._longest["steps"] < 1
        assert quiet(alive, limits, 0.2) == []


class Deaf:
    """Processes of which the first cannot be reached."""

    process, count = 1, 2

    def news(self):
        raise RuntimeError("UNAVAILABLE")

    def ask_to_end(self):
        raise RuntimeError("UNAVAILABLE")

    def tell_end(self, status, why):
        raise RuntimeError("UNAVAILABLE")


def test_a_process_that_cannot_reach_the_first_ends(limits, monkeypatch, capfd):
    monkeypatch.setattr(alive_module, "HEARTBEAT", 0.2)
    with Alive(grace=30, deadline=None, peers=Deaf(), signals=False) as alive:
        assert quiet(alive, limits) == [75]
    assert "error: process 0 has ended or cannot be reached" in capfd.readouterr().err


def test_a_signal_ends_also_who_cannot_tell_it(limits):
    with Alive(grace=0.2, deadline=None, peers=Deaf(), signals=True) as alive, events.phase("steps"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert quiet(alive, limits) == [143]


def test_a_thread_that_fails_ends_the_process(limits, monkeypatch, capfd):
    with Alive(grace=30, deadline=None, peers=None, signals=False) as alive:
        monkeypatch.setattr(alive, "_limit", lambda: 1 / 0)
        assert quiet(alive, limits) == [1]
    assert "error: the thread that bounds this process failed (ZeroDivisionError" in capfd.readouterr().err


def test_the_default_deadline_follows_from_the_time_of_a_step(limits, monkeypatch):
    monkeypatch.setattr(alive_module, "SHORTEST", 0.1)
    with Alive(grace=30, deadline=None, peers=None, signals=False) as alive, events.phase("steps"):
        assert alive._limit() == alive_module.SLOWEST  # nothing to compare with
        two_steps()
        doing(0.02)
        events.progress()
        assert alive._limit() >= 50 * 0.02
        with events.phase("evaluation"):
            assert alive._limit() == alive_module.SLOWEST
            doing(0.03)
        with events.phase("evaluation"):
            assert alive._limit() >= 50 * 0.03
        monkeypatch.setattr(alive_module, "STEPS", 10)
        assert quiet(alive, limits, 10) == [75]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_a_fit_ends_at_once_and_within_one_after_the_step(number):
    before = signal.getsignal(number)
    with Alive(grace=30, deadline=None, peers=None, signals=True) as alive, events.phase("steps"):
        assert not alive.preempted(1)
        os.kill(os.getpid(), number)
        assert alive.preempted(2)
    with pytest.raises(Preempted), Alive(grace=30, deadline=None, peers=None, signals=True):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_what_does_not_end_within_the_grace_period_is_ended(limits, capfd):
    with Alive(grace=0.2, deadline=None, peers=None, signals=True) as alive, events.phase("steps"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert quiet(alive, limits) == [143]
    assert "error: asked to end, and it was not done within --grace 0.2 s" in capfd.readouterr().err


PARENT = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-S", sys.argv[1], "0.5"], stdin=subprocess.PIPE)
for _ in range(5):
    os.write(child.stdin.fileno(), b".")
    time.sleep(0.2)
if sys.argv[2] == "frozen":
    os.kill(os.getpid(), signal.SIGSTOP)
child.stdin.close()
print(child.wait(5))
"""


@pytest.mark.parametrize(("what", "status", "out"), [("frozen", -signal.SIGKILL, ""), ("ends", 0, "0\n")])
def test_a_guardian_kills_who_is_silent_and_ends_with_who_ends(what, status, out):
    command = [sys.executable, "-c", PARENT, guardian.__file__, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (status, out), done.stderr
    assert ("was silent for 0.5 s and is killed" in done.stderr) == (what == "frozen")


# -------------------------------------------------------------------------------------------------------------- peers


def test_what_differs_is_named_with_its_process():
    same = {"config": {"rate": 0.1, "steps": 3}, "data": {"mnist train": "3.0.1 17"}}
    other = {"config": {"rate": 0.2, "steps": 3}, "data": {}}
    assert differing([flat(same), flat(same), flat(other), flat(other)]) == (
        "config rate is 0.1 on process 0 and 0.2 on process 2 (and 1 more); "
        "data mnist train is 3.0.1 17 on process 0 and not set on process 2 (and 1 more)"
    )


# ------------------------------------------------------------------------------------------------------------ profile


def test_a_trace_is_of_the_steps_that_were_named(tmp_path):
    profile = Profile("3..4", epath.Path(tmp_path))
    step = jax.jit(lambda x: x + 1)
    x = jnp.zeros(3)
    profile.begin(0)
    for i in range(1, 9):
        x = step(x)
        profile.stepped(i)
        assert (profile._folder is not None) == (2 <= i < 6)  # until the steps before the call have ended
    profile.end()
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


def test_a_call_of_many_steps_that_jumps_over_those_named_is_followed_by_one_that_is_traced(tmp_path):
    profile = Profile("10..15", epath.Path(tmp_path))
    profile.begin(0)
    for i, traced in ((100, True), (200, True), (300, True), (400, False), (500, False)):
        profile.stepped(i)
        assert (profile._folder is not None) == traced
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_stops_no_run(tmp_path):
    (tmp_path / "profile").write_text("a file")
    profile = Profile("1..1", epath.Path(tmp_path))
    profile.begin(0)
    with pytest.warns(UserWarning, match=r"the trace cannot be written to .*/profile .*: it is lost; the run goes on"):
        profile.end()


def test_a_trace_of_steps_that_no_fit_takes_is_warned_of(tmp_path):
    profile = Profile("30..40", epath.Path(tmp_path))
    profile.begin(0)
    profile.stepped(1)
    with pytest.warns(UserWarning, match="no fit took the steps 30 to 40"):
        profile.end()


@pytest.mark.parametrize("steps", ["10", "15..10", "0..3", "a..b", "3..", "-1..4", ""])
def test_steps_to_profile_that_are_no_range_are_one_line(steps, tmp_path):
    with pytest.raises(InputError, match=r"expected the first and the last step, such as 10\.\.15"):
        Profile(steps, epath.Path(tmp_path))
