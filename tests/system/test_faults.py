"""What can go wrong with a run, tried with real processes: see benchmarks/faults.py, which says what survived means.

The faults are begun together, those that mostly wait first, and each test asks what came of its own.
"""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from benchmarks import faults

QUICK = [
    "2 processes: kill -9 of process 0",
    "2 processes: SIGINT to process 0",
    "processes with other data",
    "SIGTERM in an evaluation",
    "SIGTERM after the last fit",
    "checkpoint that cannot be read",
    "checkpoints of another fit",
    "folder removed between two saves",
    "decoded data with a flipped bit",
]
Tries = dict[str, list[Future[faults.Try]]]


def started(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tries]:
    with faults.processes(3) as pool:
        yield faults.submit(pool, tmp_path_factory.mktemp("faults"), names)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Iterator[Tries]:
    yield from started(QUICK, tmp_path_factory)


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> Iterator[Tries]:
    yield from started([name for name in faults.FAULTS if name not in QUICK], tmp_path_factory)


def require_survived(tries: list[Future[faults.Try]]) -> None:
    assert [each.result().wrong for each in tries] == [""] * len(tries)


@pytest.mark.parametrize("name", QUICK)
def test_a_run_survives(quick, name):
    require_survived(quick[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in faults.FAULTS if name not in QUICK])
def test_a_run_survives_in_the_end(every, name):
    require_survived(every[name])


def test_the_table_counts_tries():
    tries = [faults.Try(1.5, 3), faults.Try(2.0, 1, times=4), faults.Try(wrong="it ended with status 1")]
    assert faults.row("a fault", tries) == ("a fault", 6, 5, "2.0", "3")
