"""What the benchmarks' contest reports. Apart from the networks, because a contestant imports the file it is from."""

import time

import numpy as np

from benchmarks.contest import compete, ratio


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


def quick():
    return lambda n: time.sleep(0.01 * n)


def test_a_slow_contestant_takes_part_in_fewer_rounds():
    times = compete({"slow": slow, "quick": quick}, steps=4, rounds=6, most_seconds=0.9)
    assert times["slow"].seconds.shape == (4,)
    assert times["quick"].seconds.shape == (6,)
    np.testing.assert_allclose(times["slow"].seconds, 0.05, rtol=0.3)
    assert ratio(times["slow"], times["quick"]) > 2
