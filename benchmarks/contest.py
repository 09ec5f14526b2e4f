"""Contestants take turns: each lives in a process of its own and is timed in interleaved rounds.

Load of the machine then hits all of them alike, and the median over rounds of a ratio is robust where a mean of times
is not. All run with the same allocator setting (`host.keep_freed_memory`), which helps PyTorch as well.
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

Block = Callable[[int], None]  # does n steps and returns when they are done
Contestant = Callable[[], Block]  # prepares and warms up; a function of a module that imports all it needs at its top


class Times(NamedTuple):
    seconds: np.ndarray  # per step, one for each round [R]
    peak_mib: float  # of memory, above what the process held after its imports


def serve(contestant: Contestant, pipe: Connection) -> None:
    """The life of a contestant: prepares, then times a block of steps whenever asked."""
    keep_freed_memory()
    held = mebibytes("VmRSS")  # with the module of `contestant`, which came with it
    block = contestant()
    pipe.send(None)
    while (steps := pipe.recv()) is not None:
        began = time.perf_counter()
        block(steps)
        pipe.send(time.perf_counter() - began)
    pipe.send(mebibytes("VmHWM") - held)


def mebibytes(field: str) -> float:
    """Of memory that this process holds now ("VmRSS") or has held at most ("VmHWM"): proc(5), so on Linux.

    Not getrusage(2), whose maximum starts from what the parent held.
    """
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def compete(contestants: Mapping[str, Contestant], steps: int, rounds: int) -> dict[str, Times]:
    """Every contestant's seconds per step in `rounds` rounds of `steps` steps each, forwards and backwards in turn."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for name, contestant in contestants.items():
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=serve, args=(contestant, theirs), daemon=True)
        processes[name].start()
        theirs.close()
        pipes[name].recv()  # one prepares at a time: compiling beside another would be no fairer and no faster
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name in list(contestants)[:: 1 if i % 2 == 0 else -1]:
            pipes[name].send(steps)
            seconds[name].append(pipes[name].recv() / steps)
    times = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        times[name] = Times(np.array(seconds[name]), pipe.recv())
        processes[name].join()
    return times


def ratio(slow: Times, fast: Times) -> float:
    """How many times faster `fast` is: the median over rounds of the ratio of times."""
    return float(np.median(slow.seconds / fast.seconds))
