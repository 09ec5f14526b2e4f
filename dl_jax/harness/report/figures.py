"""Figures of a run: confusion matrices, images tiled into one, and their encoding as PNG."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dl_jax.core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WRITABLE = 20  # with more classes than this, a cell is too small for its count


def confusion_figure(counts: Any, class_names: Sequence[str]) -> "Figure":
    """A confusion matrix as a figure, to be saved with `figure.savefig(path)`.

    `counts` [C, C] are numbers of examples, true class by predicted class. A cell's colour is its share of the true
    class; the diagonal is what was right. Raises InputError if the shapes do not agree.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    counts = np.asarray(counts)
    names, n = list(class_names), len(class_names)
    if counts.shape != (n, n):
        raise InputError(f"confusion counts of shape {counts.shape}, expected ({n}, {n}) for {n} class names")
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(3.0, 0.5 * n) if n <= WRITABLE else 10.0  # inches
    figure = Figure(figsize=(side + 2.2, side + 1.2), layout="compressed")
    axes = figure.add_subplot()
    shares = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shares, ax=axes, label="share of the true class", fraction=0.04)
    size = 9 if n <= WRITABLE else min(6.0, 500 / n)
    axes.set_xticks(range(n), names, rotation=0 if max(map(len, names)) <= 3 else 90, fontsize=size)
    axes.set_yticks(range(n), names, fontsize=size)
    total, right = counts.sum(), np.trace(counts)
    title = f"{right:.0f} of {total:.0f} right ({right / max(total, 1):.2%})"
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    for row, column in np.argwhere(counts > 0) if n <= WRITABLE else []:
        colour = "white" if share[row, column] > 0.5 else "black"
        text = f"{counts[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9 if len(text) <= 4 else 7)
    return figure


def curves_figure(
    curves: Mapping[str, tuple[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
) -> "Figure":
    """Lines with a legend. `curves` are, by label, x [n] and y [n], or [n, S]: the mean with a band from least to most.

    Raises InputError where x and y have not equal lengths, or no point is finite.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, (x, y) in curves.items():
        x, y = np.asarray(x), np.asarray(y, np.float64)
        if y.shape[:1] != x.shape:
            raise InputError(
                f"curve {label!r} has x of shape {x.shape} and y of shape {y.shape}, expected equal lengths"
            )
        if not np.isfinite(y).any():
            raise InputError(f"curve {label!r} has no finite number, expected one to draw; leave it out")
        y = y.reshape(len(y), -1)
        (line,) = axes.plot(x, y.mean(1), label=label)
        axes.fill_between(x, y.min(1), y.max(1), alpha=0.2, color=line.get_color())
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.legend()
    return figure


class Point(NamedTuple):
    """A point of `trade_figure`."""

    kind: str  # points of a kind have a colour
    shape: str  # points of a shape have a marker
    x: Sequence[float | None]  # its place in each panel; None where it is not drawn
    y: Any  # values [n], drawn as their mean with their standard deviation


def trade_figure(points: Sequence[Point], best: Point | None, *, xlabels: Sequence[str], ylabel: str) -> "Figure":
    """What is gained against what it costs: a panel with a logarithmic axis for each cost; `best` has a black edge."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(2 + 4 * len(xlabels), 4.5), layout="constrained")
    panels = figure.subplots(1, len(xlabels), sharey=True, squeeze=False)[0]
    colours = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(point.kind for point in points))}
    markers = dict(zip(dict.fromkeys(point.shape for point in points), "soD^vPX", strict=False))
    for i, axes in enumerate(panels):
        for point in points:
            axes.errorbar(
                [np.nan if point.x[i] is None else point.x[i]],
                [np.mean(point.y)],
                [np.std(point.y)],
                fmt=markers[point.shape],
                color=colours[point.kind],
                label=f"{point.kind}, {point.shape}",
                capsize=3,
                markersize=12 if point is best else 7,
                markeredgecolor="black" if point is best else colours[point.kind],
            )
        axes.set(xscale="log", xlabel=xlabels[i])
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    panels[0].set_ylabel(ylabel)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center")
    return figure


def rows_figure(rows: Mapping[str, Any]) -> "Figure":
    """Images [B, H, W] of each kind side by side; negative numbers are blue, 0 is white, and positive ones are red.

    Each image is scaled by its largest absolute value. Kinds without negative numbers are grey.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.1 * len(rows)), layout="constrained")
    grid: Any = figure.subplots(len(rows), 1, squeeze=False)
    for axes, (name, given) in zip(grid[:, 0], rows.items(), strict=True):
        images = np.asarray(given)
        scaled = images / np.maximum(abs(images).max((1, 2), keepdims=True), 1e-30)
        beside = np.concatenate(np.pad(scaled, ((0, 0), (1, 1), (2, 2))), 1)  # [H + 2, B (W + 4)]
        signed = beside.min() < 0
        axes.imshow(beside, cmap="RdBu_r" if signed else "Greys", vmin=-1 if signed else 0, vmax=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def boxes_figure(
    images: Any, boxes: Mapping[str, Sequence[Any]], labels: Mapping[str, Sequence[Any]], names: Sequence[str]
) -> "Figure":
    """Images [N, H, W, C] with boxes on them: a row for each kind of boxes, such as true ones and those found.

    Args:
      images: uint8, or floats in [0, 1]; C is 1 or 3.
      boxes: by kind, [M, 4] for each image, ymin, xmin, ymax and xmax as fractions of it; M may differ.
      labels: by kind, int [M] for each image.
      names: of the classes, each of which has a colour.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    colours = colormaps["hsv"](np.arange(len(names)) / len(names))
    white = 255 if np.asarray(images).dtype == np.uint8 else 1
    n, height, width, _ = np.shape(images)
    side = 12 / n
    figure = Figure(figsize=(12.5, (side * height / width + 0.1) * len(boxes) + 0.3), layout="constrained")
    grid: Any = figure.subplots(len(boxes), n, squeeze=False)
    for row, kind in zip(grid, boxes, strict=True):
        row[0].set_ylabel(kind)
        for axes, image, places, classes in zip(row, images, boxes[kind], labels[kind], strict=True):
            axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=white)
            axes.set(xticks=[], yticks=[])
            for (top, left, bottom, right), label in zip(np.asarray(places), classes, strict=True):
                corner = left * width - 0.5, top * height - 0.5
                sides = (right - left) * width, (bottom - top) * height
                axes.add_patch(Rectangle(corner, *sides, fill=False, linewidth=1, edgecolor=colours[label]))
    patches = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour) for colour in colours]
    figure.legend(patches, names, loc="outside lower center", ncols=min(len(names), 10), frameon=False)
    return figure


def spectrograms_figure(energies: Sequence[Any], titles: Sequence[str], seconds: float) -> "Figure":
    """Logarithms of energies [T, D] of several recordings, each with its title, on one scale of colours and of time.

    `seconds` is the time from one frame to the next. Raises InputError where there are none, or not as many titles.
    """
    from matplotlib.figure import Figure

    if not 0 < len(energies) == len(titles):
        raise InputError(f"{len(titles)} titles for {len(energies)} spectrograms, expected one or more, with one each")
    low, high = (of(np.concatenate([np.ravel(each) for each in energies])) for of in (np.min, np.max))
    columns = min(4, len(energies))
    rows = math.ceil(len(energies) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.0 * rows + 0.3), layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(energies) :]:
        axes.set_visible(False)
    for axes, each, title in zip(grid.flat, energies, titles, strict=False):
        steps, bins = np.shape(each)
        extent = (0, steps * seconds, 0, bins)
        axes.imshow(np.transpose(each), origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high)
        axes.set_title(title, fontsize=8)
    longest = max(len(each) for each in energies)
    grid[0, 0].set_xlim(0, longest * seconds)
    figure.supxlabel("seconds", fontsize=8)
    figure.supylabel("mel bin", fontsize=8)
    return figure


def rolls_figure(rolls: Mapping[str, Any]) -> "Figure":
    """Piano rolls [T, K] of each kind, of values in [0, 1] over time, one below the other on the same axes.

    Shown are the keys from the lowest to the highest that has a 1 in the first roll, all where there is none. NaN is
    left white. Raises InputError where the shapes differ.
    """
    from matplotlib.figure import Figure

    shapes = {name: np.shape(roll) for name, roll in rolls.items()}
    if len({*shapes.values()}) != 1:
        raise InputError(f"piano rolls of shapes {shapes}, expected one or more of one shape; cut the longer ones")
    first = np.asarray(next(iter(rolls.values())))
    sounding = np.flatnonzero((first == 1).any(0))
    low, high = (sounding[0], sounding[-1]) if len(sounding) else (0, first.shape[1] - 1)
    figure = Figure(figsize=(8, 2.4 * len(rolls)), layout="constrained")
    panels: Any = figure.subplots(len(rolls), 1, sharex=True, squeeze=False)[:, 0]
    extent = (-0.5, len(first) - 0.5, low - 0.5, high + 0.5)
    for axes, (name, roll) in zip(panels, rolls.items(), strict=True):
        shown = np.asarray(roll, np.float64)[:, low : high + 1].T
        axes.imshow(shown, cmap="Greys", vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent)
        axes.set(title=name, ylabel="key")
    figure.colorbar(panels[0].images[0], ax=panels.tolist(), fraction=0.03)
    panels[-1].set_xlabel("frame")
    return figure


def reliability_figure(found: Mapping[str, Any], class_names: Sequence[str]) -> "Figure":
    """A panel for each class: how frequent it is among what gets a probability of it; on the diagonal both are equal.

    `found` are, by label, the quotients [C, bins, 3] of `metrics.reliability`. Bins without examples are left out.
    Raises InputError for another number of classes than of names.
    """
    from matplotlib.figure import Figure

    columns = min(5, len(class_names))
    rows = -(-len(class_names) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.2 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for label, given in found.items():
        counted = np.asarray(given, np.float64)
        if len(counted) != len(class_names):
            raise InputError(f"{label!r} has {len(counted)} classes and {len(class_names)} names; give a name for each")
        for axes, each in zip(panels, counted, strict=False):
            each = each[each[:, 0] > 0]
            axes.plot(each[:, 1] / each[:, 0], each[:, 2] / each[:, 0], ".-", label=label, linewidth=1)
    for axes, name in zip(panels, class_names, strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
        axes.set(title=name, xlim=(0, 1), ylim=(0, 1))
    for axes in panels[len(class_names) :]:
        axes.set_visible(False)
    figure.supxlabel("probability of the class")
    figure.supylabel("how often it is right")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(found))
    return figure


def image_sheet(images: Any) -> np.ndarray:
    """`images` [N, H, W, C] tiled into one image, uint8 [rows * (H + 1) - 1, columns * (W + 1) - 1, 3].

    C is 1 or 3; values are uint8 or floats in [0, 1] (what lies outside is clipped). Raises InputError otherwise.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise InputError(f"images of shape {images.shape}, expected [N, H, W, C] with C of 1 or 3")
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"images of dtype {images.dtype}, expected uint8 or floats in [0, 1]")
        images = np.round(255 * np.clip(np.nan_to_num(images), 0, 1)).astype(np.uint8)
    n, height, width, _ = images.shape
    columns = min(n, max(1, round(math.sqrt(n * height / width))))  # about square
    rows = math.ceil(n / columns)
    sheet = np.full((rows, height + 1, columns, width + 1, 3), 255, np.uint8)
    for i, image in enumerate(images):
        sheet[i // columns, :height, i % columns, :width] = image
    return sheet.reshape(rows * (height + 1), columns * (width + 1), 3)[:-1, :-1]


def sheet_png(images: Any) -> bytes:
    """`image_sheet(images)` as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image_sheet(images)).save(stream, "PNG")
    return stream.getvalue()


def figure_png(figure: "Figure") -> bytes:
    """A Matplotlib figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
