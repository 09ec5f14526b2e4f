"""Draws curves: as text with braille dots for a terminal, and as SVG, which is written as text.

A line is the mean of the values of a metric, mostly one for each seed; what is shaded reaches from the least to the
greatest. Values that are not finite are left out. Several reports that fall into one column are drawn as their mean and
the least and greatest of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import NamedTuple

import numpy as np

from dl_jax.core.errors import one_line
from dl_jax.harness.watch.read import Curve

LABEL = 9  # characters of a number beside a plot of text
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a braille character, [4, 2]
SPREAD = (
    100  # an axis is logarithmic where all values are positive and the greatest is more than so many times the least
)

# All lengths are in pixels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 356, 200, 58, 332, 26, 176
STYLES = (("#0067a8", "none"), ("#b45f00", "4 3"))  # colour and dashes, as a curve may lie on the other


class Axes(NamedTuple):
    """The range of a plot. `low` and `high` are log10 of the values where `log` is True."""

    first: int  # steps
    last: int
    low: float
    high: float
    log: bool


class Band(NamedTuple):
    """Where a curve lies in a plot whose sides have the length 1; y grows upwards."""

    columns: np.ndarray  # int [m], of those with a value
    low: np.ndarray  # float64 [m]
    mean: np.ndarray
    high: np.ndarray


def axes_of(curves: Iterable[Curve]) -> Axes | None:
    """Axes on which all finite values have a place; None where there are not two steps with one."""
    finite = list(map(_finite, curves))
    steps = np.concatenate([curve.steps for curve in finite])
    values = np.concatenate([curve.values.ravel() for curve in finite])
    values = values[np.isfinite(values)]
    if len(np.unique(steps)) < 2:
        return None
    low, high = values.min(), values.max()
    log = bool(low > 0 and high > SPREAD * low)
    low, high = (math.log10(low), math.log10(high)) if log else (float(low), float(high))
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return Axes(int(steps.min()), int(steps.max()), low, high, log)


def band_of(curve: Curve, axes: Axes, columns: int) -> Band:
    """The curve in a plot of so many columns."""
    steps, values = _finite(curve)
    at = np.rint((steps - axes.first) / (axes.last - axes.first) * (columns - 1)).astype(int)
    found = np.unique(at)

    def place(reduce: Callable[[np.ndarray], np.floating]) -> np.ndarray:
        numbers = np.array([reduce(values[at == column]) for column in found])
        return ((np.log10(numbers) if axes.log else numbers) - axes.low) / (axes.high - axes.low)

    return Band(found, place(np.nanmin), place(np.nanmean), place(np.nanmax))


def text_plot(curve: Curve, width: int, height: int) -> list[str]:
    """The curve in `height` lines of `width` characters, and one with the steps; nothing for less than two steps."""
    axes = axes_of([curve])
    if axes is None:
        return []
    across = width - LABEL - 1
    low, mean, high = _rows(band_of(curve, axes, 2 * across), 2 * across, 4 * height)
    dots = _dots(mean, 4 * height)
    top, bottom = high.reshape(-1, 2).min(1) // 4, low.reshape(-1, 2).max(1) // 4  # [across], the lines that it spans
    line = np.arange(height)[:, None]
    shaded = (top <= line) & (line <= bottom)  # [height, across]
    labels = [_number(axes, axes.high), *[""] * (height - 2), _number(axes, axes.low)]
    lines = [f"{label:>{LABEL}} {''.join(map(_cell, *row))}" for label, *row in zip(labels, dots, shaded, strict=True)]
    return [*lines, f"{'':{LABEL}} {axes.first}{f'step {axes.last}':>{across - len(str(axes.first))}}"]


def _rows(band: Band, columns: int, rows: int) -> list[np.ndarray]:
    """The rows [columns] of dots, from the top, at which the band is low, mean and high; linear between its columns."""
    places = [np.interp(np.arange(columns), band.columns, each) for each in band[1:]]
    return [np.rint((1 - each) * (rows - 1)).astype(int) for each in places]


def _dots(line: np.ndarray, rows: int) -> np.ndarray:
    """Braille dots, int [rows / 4, columns / 2], of a line at the row line[c] in column c, without gaps."""
    cells = np.zeros((rows // 4, len(line) // 2), int)
    for column, (before, row) in enumerate(zip([line[0], *line], line, strict=False)):
        for dot in range(min(before, row), max(before, row) + 1):
            cells[dot // 4, column // 2] |= DOTS[dot % 4, column % 2]
    return cells


def _cell(dots: int, shaded: bool) -> str:
    return chr(0x2800 + dots) if dots else "░" if shaded else " "


def svg_plot(title: str, curves: Mapping[str, Curve]) -> str:
    """An SVG element with the curves, at most two, on the same axes; nothing where there are less than two steps."""
    axes = axes_of(curves.values())
    if axes is None:
        return ""
    name = escape(one_line(f"{title} (logarithmic)" if axes.log else title))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f"<title>{name}</title>",
        f'<text x="{LEFT}" y="16" font-size="12">{name}</text>',
    ]
    for tick in ticks(axes.low, axes.high, whole=axes.log):
        y = BOTTOM - (tick - axes.low) / (axes.high - axes.low) * (BOTTOM - TOP)
        parts.append(f'<path d="M{LEFT},{y:.1f} H{RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_number(axes, tick, 6)}</text>')
    for tick in ticks(axes.first, axes.last):
        x = LEFT + (tick - axes.first) / (axes.last - axes.first) * (RIGHT - LEFT)
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for (colour, dashes), curve in zip(STYLES, curves.values(), strict=False):
        band = band_of(curve, axes, RIGHT - LEFT)
        low, mean, high = (
            [f"{LEFT + x},{BOTTOM - y * (BOTTOM - TOP):.1f}" for x, y in zip(band.columns, places, strict=True)]
            for places in band[1:]
        )
        parts.append(f'<polygon points="{" ".join([*high, *reversed(low)])}" fill="{colour}" fill-opacity="0.2"/>')
        line = f'fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dashes}"'
        x, y = mean[-1].split(",")
        parts.append(f'<polyline points="{" ".join(mean)}" {line}/><circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
    frame = f'<path d="M{LEFT},{TOP} V{BOTTOM} H{RIGHT}" fill="none" stroke="#555555"/>'
    return "\n".join([*parts, frame, "</svg>"])


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round numbers from `low` to `high`; whole ones if `whole`, of which there may be only two."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    step = next(unit * each for each in (5, 2, 1, 0.5, 0.2) if len(_multiples(low, high, unit * each)) >= 3)
    return _multiples(low, high, max(1.0, round(step)) if whole else step)


def _multiples(low: float, high: float, step: float) -> list[float]:
    slack = 1e-9 * (high - low)
    numbers = range(math.ceil((low - slack) / step), math.floor((high + slack) / step) + 1)
    return [float(f"{number * step:.12g}") for number in numbers]


def last_values(curve: Curve) -> str:
    """The mean of the last values, with their range and number if there are several: "0.021 [0.019, 0.025] (5)"."""
    n, last = curve.values.shape[1], curve.values[-1]
    last = last[np.isfinite(last)]
    if not len(last):
        return "not finite"
    lost = f", {n - len(last)} not finite" if len(last) < n else ""
    return f"{last.mean():.4g}" + (f" [{last.min():.4g}, {last.max():.4g}] ({n}{lost})" if n > 1 else "")


def _finite(curve: Curve) -> Curve:
    """The curve without the steps at which no value is finite; other values that are not finite become NaN."""
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    kept = ~np.isnan(values).all(1)
    return Curve(curve.steps[kept], values[kept])


def _number(axes: Axes, place: float, digits: int = 4) -> str:
    return f"{10**place if axes.log else place:.{digits}g}"
