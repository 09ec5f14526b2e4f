"""The cost of a compressed model: bytes on disk, number of parameters, latency."""

import gzip
import os
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError

Tree = Any
Name = TypeVar("Name", bound=Hashable)


class Size(NamedTuple):
    """The size of a file in bytes."""

    raw: int  # on disk
    gzip: int  # after gzip at level 9, without a time stamp, so that equal files have equal sizes


class Counts(NamedTuple):
    """How many numbers a tree of arrays holds."""

    parameters: int
    nonzeros: int


class Latency(NamedTuple):
    """The 50th and 95th percentile of the time of a call, in seconds."""

    p50: float
    p95: float


def size(path: str | os.PathLike[str]) -> Size:
    """The size of the file `path`. Raises InputError where it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"cannot measure {path} ({e.strerror or e}): expected a file; write it first") from e
    return Size(len(data), len(gzip.compress(data, compresslevel=9, mtime=0)))


def counts(params: Tree) -> Counts:
    """Counts all numbers in `params`, and those that are not exactly zero. NaN counts as non-zero."""
    leaves = jax.tree.leaves(params)
    return Counts(sum(np.size(leaf) for leaf in leaves), sum(int(jnp.count_nonzero(leaf)) for leaf in leaves))


def latency(
    functions: Mapping[Name, Callable[..., Any]], *inputs: Any, rounds: int = 100, warm_up: int = 10
) -> dict[Name, Latency]:
    """The latency of each of `functions` when called as `function(*inputs)`, by name.

    All functions are called on the same inputs. A call ends when its results are ready. Each function is called
    `warm_up` times first, which also compiles it, and is then timed `rounds` times; with fewer than 20 rounds p95 is
    close to the maximum. Each round calls all functions, in alternating order, so that other load on the machine
    affects all of them alike. It calls each twice and times the second call: the first one pays for what the function
    before it left behind, such as threads that still wait for work. Pass JAX functions jitted. With NumPy inputs the
    time includes the copy to the device, as in serving.

    Raises InputError where there are no functions, or where `rounds` or `warm_up` is below 1.
    """
    if not functions:
        raise InputError("there is no function to measure; expected at least one")
    if rounds < 1 or warm_up < 1:
        raise InputError(f"rounds is {rounds} and warm_up is {warm_up}, expected at least 1 of each")
    for function in functions.values():
        for _ in range(warm_up):
            jax.block_until_ready(function(*inputs))
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            jax.block_until_ready(functions[name](*inputs))
            start = time.perf_counter()
            jax.block_until_ready(functions[name](*inputs))
            seconds[name].append(time.perf_counter() - start)
    return {name: Latency(*map(float, np.quantile(each, (0.5, 0.95)))) for name, each in seconds.items()}
