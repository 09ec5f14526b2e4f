"""What an experiment needs of the machinery that launches and records it."""

from dl_jax.harness.fields import Between, Distinct, Fraction, NonNegative, Positive, Probability, Some
from dl_jax.harness.launch import launch
from dl_jax.harness.report.figures import (
    Point,
    boxes_figure,
    confusion_figure,
    curves_figure,
    reliability_figure,
    rolls_figure,
    rows_figure,
    spectrograms_figure,
    trade_figure,
)
from dl_jax.harness.report.tables import markdown_rows, print_rows
from dl_jax.harness.results.claims import Claim, on_digits, on_shapes, quick_bar
from dl_jax.harness.run import Run

__all__ = [
    "Between",
    "Claim",
    "Distinct",
    "Fraction",
    "NonNegative",
    "Point",
    "Positive",
    "Probability",
    "Run",
    "Some",
    "boxes_figure",
    "confusion_figure",
    "curves_figure",
    "launch",
    "markdown_rows",
    "on_digits",
    "on_shapes",
    "print_rows",
    "quick_bar",
    "reliability_figure",
    "rolls_figure",
    "rows_figure",
    "spectrograms_figure",
    "trade_figure",
]
