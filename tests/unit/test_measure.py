"""What is measured of files, parameters and functions; the clock is a made-up one."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.compress import comparison, measure
from dl_jax.compress.measure import Counts, Size
from dl_jax.core.errors import InputError


def test_the_size_of_a_file(tmp_path):
    noise = np.random.default_rng(0).bytes(10_000)
    file = tmp_path / "model"
    file.write_bytes(noise)
    raw, packed = measure.size(file)
    assert raw == 10_000 < packed < 10_100  # noise does not shrink
    file.write_bytes(bytes(10_000))
    assert measure.size(file) == measure.size(str(file)) == Size(10_000, len(gzip.compress(bytes(10_000), 9, mtime=0)))
    assert measure.size(file).gzip < 100


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot measure .*model \(No such file"):
        measure.size(tmp_path / "model")


def test_parameters_and_nonzeros():
    params = {
        "kernel": jnp.array([[1.0, 0.0], [-0.0, jnp.nan]]),
        "bias": np.zeros(3),
        "int8": np.array([0, -7], "int8"),
    }
    assert measure.counts(params) == Counts(parameters=9, nonzeros=3)
    assert measure.counts({}) == Counts(0, 0)


class Clock:
    """Time passes only in calls of its functions."""

    def __init__(self, monkeypatch):
        self.now, self.called = 0.0, []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def function(self, name, seconds):
        left = iter(seconds)

        def call(*inputs):
            self.called.append((name, *inputs))
            self.now += next(left)
            return jnp.zeros(1)

        return call


def test_latencies_are_quantiles_of_the_timed_calls(monkeypatch):
    clock = Clock(monkeypatch)
    times = np.random.default_rng(0).permutation(21)  # median 10, 95th percentile 19
    first = lambda timed: [each for time in timed for each in (1e6, time)]  # before each call that is timed, one is not
    functions = {"a": clock.function("a", [1e6, *first(times)]), "b": clock.function("b", [1e6, *first([0.5] * 21)])}
    found = measure.latency(functions, rounds=21, warm_up=1)
    assert found == {"a": (10.0, 19.0), "b": (0.5, 0.5)}
    assert found["a"].p50 == 10.0
    assert found["a"].p95 == 19.0


def test_the_functions_take_turns_forwards_and_backwards(monkeypatch):
    clock = Clock(monkeypatch)
    measure.latency({n: clock.function(n, [1] * 8) for n in "abc"}, 3, "x", rounds=3, warm_up=2)
    assert {called[1:] for called in clock.called} == {(3, "x")}
    assert "".join(name for name, *_ in clock.called) == "aabbcc" + "aabbcc" + "ccbbaa" + "aabbcc"


def test_any_key_is_a_name():
    assert set(measure.latency({("int8", 1): lambda: 0, 2: lambda: 0}, rounds=1, warm_up=1)) == {("int8", 1), 2}


def test_a_call_ends_when_its_result_is_there(monkeypatch):
    clock, ready = Clock(monkeypatch), jax.block_until_ready

    def wait(result):
        clock.now += 100
        return ready(result)

    monkeypatch.setattr(jax, "block_until_ready", wait)
    assert measure.latency({"a": clock.function("a", [1, 1, 1])}, rounds=1, warm_up=1) == {"a": (101.0, 101.0)}


@pytest.mark.parametrize("counts", [{"rounds": 0}, {"warm_up": 0}])
def test_too_few_calls(counts):
    with pytest.raises(InputError, match="expected at least 1 of each"):
        measure.latency({"a": lambda: None}, **counts)


def test_nothing_to_measure():
    with pytest.raises(InputError, match="no function to measure"):
        measure.latency({}, np.zeros(3))


def test_the_costs_of_files(tmp_path):
    """One knows the label from the first pixel, the other says 1; the second cannot be run as it is."""
    image = np.zeros((5, 2, 2, 1), np.uint8)
    image[:, 0, 0, 0] = 255 * np.array([0, 1, 1, 0, 1])
    records = {"image": image, "label": np.array([0, 1, 1, 0, 1])}
    right = lambda images: np.stack([1 - images[:, 0, 0, 0], images[:, 0, 0, 0]], -1)
    one = lambda images: np.tile(np.float32([0, 1]), (len(images), 1))
    (tmp_path / "a").write_bytes(b"12345")
    files = {
        ("a", "x"): comparison.File(tmp_path / "a", right, measure.Counts(3, 2)),
        ("b", "y"): comparison.File(tmp_path / "a", one, measure.Counts(3, 2), runs=False),
    }
    some = {name: column[:2] for name, column in records.items()}
    found = comparison.costs(files, some, records, (1, 8), rounds=2)
    assert [(cost.validation_error, cost.error) for cost in found.values()] == [(0, 0), (50, 40)]
    assert [set(cost.latency) for cost in found.values()] == [{1, 8}, set()]
    assert found["a", "x"].size.raw == 5
    assert found["a", "x"].counts == (3, 2)
