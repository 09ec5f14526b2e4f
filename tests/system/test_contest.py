"""What the benchmarks' contest reports. Apart from the networks, because a contestant imports the file it is from."""

import time

import numpy as np

from benchmarks.contest import compete


def hoard():
    held = np.ones(16 << 20, np.float32)  # 64 MiB

    def block(n):
        assert held.size

    return block


def test_memory_is_what_a_contestant_adds_to_its_imports():
    mine = np.ones(256 << 20, np.uint8)  # a child's maximum in getrusage would begin with these
    times = compete({"hoard": hoard}, steps=3, rounds=2)["hoard"]
    assert mine.size
    assert times.seconds.shape == (2,)
    assert 60 < times.peak_mib < 72


def slow():
    return lambda n: time.sleep(0.05 * n)


def test_a_slow_contestant_makes_fewer_steps():
    began = time.perf_counter()
    times = compete({"slow": slow}, steps=1000, rounds=2, most_seconds=0.2)["slow"]
    assert time.perf_counter() - began < 30
    np.testing.assert_allclose(times.seconds, 0.05, rtol=0.3)
