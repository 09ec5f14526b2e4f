"""What the benchmarks' contest reports. Apart from the networks, because a contestant imports the file it is from."""

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
