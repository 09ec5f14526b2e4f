"""The zoo compiles many tiny nets: without optimisations, and with the seconds that each model took at the end."""

import collections
import re
from collections.abc import Iterator
from typing import Any

import jax
import pytest


@pytest.fixture(autouse=True)
def no_optimisations() -> Iterator[None]:
    """They cost a net of a few hundred parameters more than they save it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the checks of the whole zoo took for each model, so that a new one's cost is seen."""
    seconds: collections.Counter[str] = collections.Counter()
    for report in [report for reports in terminalreporter.stats.values() for report in reports]:
        found = re.search(r"test_models\.py::\w+\[(\w+\.\w+\.\w+)\]$", getattr(report, "nodeid", ""))
        if found and hasattr(report, "duration"):  # others were not run
            seconds[found[1]] += report.duration
    if seconds:
        terminalreporter.section("seconds of each model")
    for model, total in seconds.most_common():
        terminalreporter.line(f"{total:6.2f}  {model}")
