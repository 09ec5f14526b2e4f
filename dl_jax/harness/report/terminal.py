"""The progress bar and the final table of a run, on a terminal and as plain text in a file."""

import atexit
import contextlib
import io
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from dl_jax.core.errors import spared
from dl_jax.harness.results.claims import VERDICTS
from dl_jax.harness.results.record import Result, Row, table_rows

if TYPE_CHECKING:
    from rich import progress
    from rich.table import Table

REDRAW_EVERY = 0.25  # seconds, on a terminal; drawing takes milliseconds
LINE_EVERY = 10.0  # seconds, elsewhere
SHORTEST_BAR = 6  # characters
SEPARATOR = " · "
MARKS = 40  # draws over which the speed is measured on a terminal

_COLOURS: dict[str, str] = dict(zip(VERDICTS, ("green", "cyan", "yellow", "bold red", "dim", "dim"), strict=True))


class Progress:
    """Shows the progress of a fit: a bar on a terminal, elsewhere a line at the start, every 10 s and at the end.

    `update` may be called after every step; it redraws only when that is due. The speed is that of the last seconds and
    leaves out the time before the first update, in which the step is compiled. Close a bar before making the next one.
    Nothing is raised where `file`, by default stderr, is closed or cannot be written.
    """

    def __init__(
        self, label: str, start: int, total: int, examples_per_step: int | None = None, file: TextIO | None = None
    ) -> None:
        self._label, self._total, self._examples = label, total, examples_per_step
        self._step, self._values = start, {}
        self._file = sys.stderr if file is None else file
        self._bar: progress.Progress | None = None
        with self._spared():
            if self._file and self._file.isatty():
                self._bar = _bar(label, start, total, self._file)
        self._every = REDRAW_EVERY if self._bar else LINE_EVERY
        self._due = -math.inf
        self._marks: deque[tuple[float, int]] = deque(maxlen=MARKS if self._bar else 2)  # (time, step) of drawings
        self._first: tuple[float, int] | None = None
        self._now = 0.0
        if self._bar:
            atexit.register(self.close)  # the bar hides the cursor

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Reports that `step` steps are done. `values` are new metrics, scalars or [S], if there are any."""
        self._step, self._now = step, time.monotonic()
        if values:
            self._values = {**self._values, **values}
        if self._now >= self._due:
            self._due = self._now + self._every
            self._marks.append((self._now, step))
            self._first = self._first or self._marks[0]
            with self._spared():
                self._draw(*self._marks[0], ends=False)

    def close(self) -> None:
        """Draws the last state with the mean speed of the fit. A second call does nothing."""
        if self._first:
            with self._spared():
                self._draw(*self._first, ends=True)
            self._first = None
        if self._bar:
            with self._spared():
                self._bar.stop()
            atexit.unregister(self.close)

    def _spared(self) -> contextlib.AbstractContextManager[None]:
        """A context for drawing, which a closed file (ValueError) or a failed write ends."""
        what = f"the progress of {self._label!r} cannot be shown"
        return spared(what, "it stays unseen", (OSError, ValueError))

    def _draw(self, since: float, since_step: int, ends: bool) -> None:
        parts = self._parts(self._now - since, self._step - since_step, ends)
        if self._bar:
            room = self._bar.console.width - len(self._label) - len("  ") - SHORTEST_BAR
            for name in ("examples", "speed", "metrics"):  # on a narrow terminal these are left out first
                if len(SEPARATOR.join(parts.values())) > room:
                    parts.pop(name, None)
            text = SEPARATOR.join(parts.values())
            self._bar.update(self._bar.task_ids[0], completed=self._step, text=text, refresh=True)
        elif self._file:
            print(f"{self._label} {SEPARATOR.join(parts.values())}".lstrip(), file=self._file, flush=True)

    def _parts(self, seconds: float, steps: int, ends: bool) -> dict[str, str]:
        parts = {"step": f"{self._step}/{self._total}"}
        speed = steps / seconds if seconds > 0 and steps > 0 else None
        if speed:
            parts["speed"] = f"{_short(speed)} steps/s"
        names = ["loss"] if "loss" in self._values else list(self._values)[:2]
        if names:
            means = [np.asarray(self._values[name], np.float64).mean() for name in names]
            parts["metrics"] = SEPARATOR.join(f"{n} {mean:.4g}" for n, mean in zip(names, means, strict=True))
        if speed and self._examples:
            parts["examples"] = f"{_short(speed * self._examples)} examples/s"
        if ends:
            parts["time"] = f"in {duration(seconds)}"
        elif speed:
            parts["time"] = f"{duration((self._total - self._step) / speed)} left"
        return parts


def _bar(label: str, start: int, total: int, file: TextIO) -> "progress.Progress":
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=None),
        progress.TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=file),
        auto_refresh=False,  # no thread: it is drawn by `update`
        expand=True,
        redirect_stdout=bool(sys.stdout and sys.stdout.isatty()),  # what is printed meanwhile goes above the bar
    )
    bar.add_task(label, total=total, completed=start, text="starting")
    bar.start()
    return bar


def _short(x: float) -> str:
    """Three digits: 0.512, 31.4, 312, 3.12k, 39.7k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if x >= 0.9995 * size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def duration(seconds: float) -> str:
    """Minutes and seconds, "12:34", or with hours, "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_table(result: Result, file: TextIO | None = None) -> None:
    """Prints a table of what was claimed, what was measured, and the verdicts.

    On a terminal it is coloured and fits the width; elsewhere it is plain text with one line for each row.
    """
    from rich.console import Console

    out = sys.stdout if file is None else file
    header, rows = table_rows(result)
    if out.isatty():
        console = Console(file=out)
        console.print(_narrow_table(rows, console.width))
        return
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False)
    with console.capture() as text:
        console.print(_table(header, rows))
    encoding = out.encoding or "utf-8"
    lines = (line.rstrip().encode(encoding, "replace").decode(encoding) for line in text.get().splitlines())
    print("\n".join(lines), file=out, flush=True)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=SIMPLE_HEAD, pad_edge=False)
    for *cells, word in rows:
        table.add_row(*map(Text, cells), Text(word, style=_COLOURS.get(word.split(":")[0], "")))
    return table


def _narrow_table(rows: Sequence[Row], width: int) -> "Table":
    """A table for 80 columns: the paper is below the metric, and the tolerance below the claimed number."""
    stacked = [
        (f"{metric}\n{paper}".rstrip(), f"{claimed.replace(' (', chr(10) + '(')}\n{tolerance}".rstrip(), measured, word)
        for metric, paper, claimed, measured, tolerance, word in rows
    ]
    table = _table(("metric", "claimed", "measured ± std (n)", "verdict"), stacked)
    longest = max((len(line) for row in stacked for line in row[0].splitlines()), default=0)
    table.columns[0].width, table.columns[0].overflow = min(longest, max(width - 58, 16)), "fold"
    table.columns[2].no_wrap = True
    table.show_lines = True
    return table
