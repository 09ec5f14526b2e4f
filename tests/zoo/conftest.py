"""At the end, the seconds that the checks of the whole zoo took for each model."""

import collections
import re
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the seconds that the checks of all models took for each model, so that the cost of a new one is seen."""
    seconds: collections.Counter[str] = collections.Counter()
    for report in [report for reports in terminalreporter.stats.values() for report in reports]:
        found = re.search(r"test_models\.py::\w+\[(\w+\.\w+\.\w+)\]$", getattr(report, "nodeid", ""))
        if found and hasattr(report, "duration"):  # others were not run
            seconds[found[1]] += report.duration
    if seconds:
        terminalreporter.section("seconds of each model")
    for model, total in seconds.most_common():
        terminalreporter.line(f"{total:6.2f}  {model}")
