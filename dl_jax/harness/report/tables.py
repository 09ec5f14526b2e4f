"""Tables of an experiment's own, with sentences below them: for people at a terminal, and as Markdown."""

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Sequence[str]]


def print_rows(header: Sequence[str], rows: Rows, sentences: Sequence[str], texts: int = 1) -> None:
    """Prints a table to stdout. The first `texts` columns are aligned to the left, the other ones to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print("", _table(header, rows, texts, SIMPLE_HEAD), "", *sentences, sep="\n")


def markdown_rows(header: Sequence[str], rows: Rows, sentences: Sequence[str], texts: int = 1) -> str:
    """The same as Markdown, each sentence a paragraph."""
    from rich.box import MARKDOWN
    from rich.console import Console

    wide = Console(file=io.StringIO(), width=1000)
    with wide.capture() as text:
        wide.print(_table(header, rows, texts, MARKDOWN))
    lines = [line.rstrip() for line in text.get().strip().splitlines()]
    return "\n".join([*lines, *(f"\n{sentence}" for sentence in sentences), ""])


def _table(header: Sequence[str], rows: Rows, texts: int, box: Any) -> "Table":
    from rich.box import MARKDOWN
    from rich.table import Table

    table = Table(*header[:texts], box=box, padding=0, show_edge=box is MARKDOWN)
    for name in header[texts:]:
        table.add_column(name, justify="right")
    for cells in rows:
        table.add_row(*cells)
    return table
