"""`python -m dl_jax.watch WORKDIR` draws a run, and `python -m dl_jax.watch WORKDIR OTHER` compares two."""

import contextlib
import itertools
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from dl_jax.core.errors import BAD_INPUT, InputError, exit_status, reason
from dl_jax.core.files import absolute, write_whole
from dl_jax.harness.report.tables import print_rows
from dl_jax.harness.report.terminal import print_table
from dl_jax.harness.watch.draw import axes_of, last_values, text_plot
from dl_jax.harness.watch.facts import compared, fit_rows, measured, sentences, summary
from dl_jax.harness.watch.page import page, page_of_two
from dl_jax.harness.watch.read import Curve, Watched, chosen, read

REDRAW_EVERY = 5.0  # seconds
HEIGHT = 6  # lines of a plot
NARROWEST, GAP = 38, 2  # columns of a plot at least, and between two
MOST = 4  # plots beside each other
WIDE = 120  # columns of what is not printed on a terminal


def watch(
    workdir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR")],
    other: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[OTHER]")] = None,
    html: str | None = None,
    only: str = "*",
    follow: bool = False,
) -> int:
    """Draw the curves of a run, which may be going on, with its claims and verdicts, or compare it with another run.

    Args:
        workdir: Folder or gs:// address of a run, as it was given as --workdir.
        other: Folder of another run: every difference of the two is named.
        html: File to write the same to, as one page that needs no server.
        only: Pattern of the curves to draw, such as "*/loss" or "distorted/*".
        follow: Draw the fit that reported last anew every few seconds until the run has a result, or until Ctrl-C.
    """
    if follow and (other or not sys.stdout.isatty()):
        what = "a second run" if other else "an output that is no terminal"
        raise InputError(f"--follow is given with {what}, expected one run and a terminal; leave one out")
    if follow:
        _follow(workdir, only)
    runs = [chosen(read(each), only) for each in (workdir, other) if each]
    if len(runs) == 1:
        _show(runs[0])
        text = page(runs[0], time.time()) if html else ""
    else:
        _compare(*runs)
        text = page_of_two(*runs) if html else ""
    if html:
        _write(html, text)
    damaged = [sentence for run in runs for sentence in run.damaged]
    for sentence in damaged:
        print(f"error: {sentence}", file=sys.stderr)
    return BAD_INPUT if damaged else 0


def main() -> int:
    return exit_status(lambda: tyro.cli(watch, prog="python -m dl_jax.watch"))


def _show(run: Watched) -> None:
    """Prints the curves, the fits, the claims and what the run is, which is last as a terminal shows the end."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
    print("\n".join(curves_text(run, width)))
    print_rows(*fit_rows(run), [])
    if run.result:
        print_table(run.result)
    print("\n".join(f"{name:10}{text}" for name, text in summary(run, time.time())))


def _compare(one: Watched, other: Watched) -> None:
    topics = compared(one, other)
    rows = [(topic.name, *row) for topic in topics for row in topic.rows]
    if rows:
        print_rows(("", "differs", one.workdir, other.workdir), rows, [], texts=4)
    print("\n".join(sentences(topics)))
    print_rows(*measured(one, other), [])


def _follow(workdir: str, only: str) -> None:
    """Draws the fit that reported last until the run has a result or Ctrl-C is pressed."""
    from rich.live import Live
    from rich.text import Text

    with contextlib.suppress(KeyboardInterrupt), Live(screen=True, auto_refresh=False) as live:
        while (run := chosen(read(workdir), only)).result is None:
            last = sorted(run.fits, key=lambda fit: run.fits[fit].reported)[-1:]
            current = run._replace(fits={fit: run.fits[fit] for fit in last})
            head = [f"{name}: {text}" for name, text in summary(run, time.time()) if name in ("run", "state")]
            steps = [f"{fit or 'train'} is at step {run.fits[fit].step}; Ctrl-C ends" for fit in last]
            lines = [*head, *steps, "", *curves_text(current, live.console.width)]
            live.update(Text("\n".join(lines), no_wrap=True), refresh=True)
            time.sleep(REDRAW_EVERY)


def curves_text(run: Watched, width: int) -> list[str]:
    """Lines of at most `width` characters with a plot for each curve, side by side where there is room."""
    columns = min(MOST, max(1, (width + GAP) // (NARROWEST + GAP)))
    each = (width + GAP) // columns - GAP
    lines = ["─ the mean, ░ from the least to the greatest of the values, whose number is in parentheses", ""]
    for fit, found in run.fits.items():
        lines.append(f"── {fit or 'train'} ".ljust(width, "─"))
        blocks = [_block(metric, curve, each) for metric, curve in found.curves.items()]
        for start in range(0, len(blocks), columns):
            joined = itertools.zip_longest(*blocks[start : start + columns], fillvalue="")
            lines += [(" " * GAP).join(f"{line:{each}}" for line in beside).rstrip() for beside in joined]
            lines.append("")
    return lines


def _block(metric: str, curve: Curve, width: int) -> list[str]:
    """The lines of one plot."""
    axes, plot = axes_of([curve]), text_plot(curve, width, HEIGHT)
    title = [
        f"{metric} (logarithmic)" if axes and axes.log else metric,
        last_values(curve) + ("" if plot else f" at step {curve.steps[-1]}"),
    ]
    return [line[:width] for line in (*title, *plot)]


def _write(html: str, text: str) -> None:
    """Raises InputError where the file cannot be written."""
    try:
        write_whole(Path(absolute(html)), text.encode())
    except OSError as error:
        raise InputError(
            f"--html {html} cannot be written ({reason(error)}); name a file in a folder of yours"
        ) from error
