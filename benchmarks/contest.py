"""Times several programs, called contestants, against each other, each in its own process and in interleaved rounds.

Other load on the machine then affects all contestants alike, and the median over rounds of the ratio of times is more
robust than a ratio of mean times. All run with the same allocator setting (`machine.keep_freed_memory`), which helps
PyTorch as well.
"""

import multiprocessing
import re
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dl_jax.harness.machine import keep_freed_memory

Block = Callable[[int], None]  # runs n steps and returns when they are done
Contestant = Callable[[], Block]  # prepares and warms up; defined in a module that imports all it needs at its top


class Times(NamedTuple):
    """The measurements of one contestant."""

    seconds: np.ndarray  # seconds per step in each round [R]
    peak_mib: float  # peak memory in MiB, above the memory after the imports


def serve(contestant: Contestant, pipe: Connection) -> None:
    """The main function of a contestant's process: prepares, then times a block for each number of steps received."""
    keep_freed_memory()
    held = mebibytes("VmRSS")  # includes the module of `contestant`, which was imported to unpickle it
    block = contestant()
    pipe.send(None)
    while (steps := pipe.recv()) is not None:
        began = time.perf_counter()
        block(steps)
        pipe.send(time.perf_counter() - began)
    pipe.send(mebibytes("VmHWM") - held)


def mebibytes(field: str) -> float:
    """The memory of this process in MiB, now ("VmRSS") or at its peak ("VmHWM"), as in proc(5); Linux only.

    getrusage(2) cannot be used, as its maximum includes the memory of the parent process.
    """
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def compete(
    contestants: Mapping[str, Contestant], steps: int, rounds: int, most_seconds: float = float("inf")
) -> dict[str, Times]:
    """Times all contestants in `rounds` rounds of `steps` steps each; the order is reversed in every other round.

    A contestant that would take longer than `most_seconds` in all takes part in the first rounds only, three or more.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes, own_rounds = {}, {}, {}
    for name, contestant in contestants.items():
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=serve, args=(contestant, theirs), daemon=True)
        processes[name].start()
        theirs.close()
        pipes[name].recv()  # waits until it is prepared: compiling several at once would be no faster and no fairer
        pipes[name].send(1)
        own_rounds[name] = max(3, int(min(rounds, most_seconds / (steps * pipes[name].recv()))))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name in [name for name in contestants if i < own_rounds[name]][:: 1 if i % 2 == 0 else -1]:
            pipes[name].send(steps)
            seconds[name].append(pipes[name].recv() / steps)
    times = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        times[name] = Times(np.array(seconds[name]), pipe.recv())
        processes[name].join()
    return times


def ratio(slow: Times, fast: Times) -> float:
    """How many times faster `fast` is than `slow`: the median over the rounds of both of the ratio of times."""
    both = min(slow.seconds.size, fast.seconds.size)
    return float(np.median(slow.seconds[:both] / fast.seconds[:both]))
