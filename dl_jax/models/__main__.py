"""`python -m dl_jax.models` and `python -m dl_jax.models NAME`."""

import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dl_jax.core.errors import exit_status
from dl_jax.models import summary

WIDE = 200  # columns of what is not printed on a terminal


def show(
    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None, batch_size: int = 1
) -> None:
    """List the published models, or print the layers of one: shapes, parameters and operations.

    Operations are the multiplications and additions in matrix products and convolutions. Nothing is computed.

    Args:
        name: The model to print. Without it, all are listed.
        batch_size: Examples in a batch of the model's inputs.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(_listed() if name is None else _summary(name, batch_size))


def _listed() -> Table:
    models = sorted(summary.published().items())
    rows = [(name, _shapes(each.inputs), f"{each.parameters:,}") for name, each in models]
    return _table(("model", "inputs", "parameters"), rows, numbers=1)


def _summary(name: str, batch_size: int) -> Table:
    model, inputs, _ = summary.find(name)
    inputs = summary.with_batch(inputs, batch_size)
    layers = summary.layers(model, inputs)
    rows = [
        (each.path, each.kind, _outputs(each.outputs), f"{each.parameters:,}", f"{each.flops:,}") for each in layers
    ]
    total = [f"{sum(column):,}" for column in zip(*((each.parameters, each.flops) for each in layers), strict=True)]
    header = (name, type(model).__name__, _shapes(inputs), "parameters", "FLOPs")
    table = _table(header, rows, numbers=2)
    table.add_section()
    table.add_row("total", "", "", *total)
    return table


def _shapes(inputs: summary.Inputs) -> str:
    return ", ".join(f"{name} {summary.shape(each)}" for name, each in inputs.items())


def _outputs(calls: Sequence[str]) -> str:
    """The shapes that the calls returned; one for those that are alike."""
    shapes = "; ".join(dict.fromkeys(calls))
    return shapes if len(calls) < 2 else f"{shapes} ({len(calls)} calls)"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> Table:
    """A table whose last `numbers` columns are aligned to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(header):
        last = i >= len(header) - numbers
        table.add_column(Text(title), justify="right" if last else "left", no_wrap=last, overflow="fold")
    for row in rows:  # as Text: in a string, rich would read a shape in brackets as a style
        table.add_row(*map(Text, row))
    return table


def main() -> int:
    return exit_status(lambda: tyro.cli(show, prog="python -m dl_jax.models"))


if __name__ == "__main__":
    sys.exit(main())
