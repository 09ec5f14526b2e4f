"""docs/results.svg: every answered claim, what was measured against what was claimed, in one chart.

The SVG is written as text, so that it has the same bytes whatever versions are installed.
"""

import math
from collections.abc import Mapping, Sequence, Set
from html import escape
from typing import Literal, NamedTuple

import numpy as np

from dl_jax.core.errors import one_line
from dl_jax.harness.results.answers import Answer
from dl_jax.harness.results.claims import MISSED, Claim, Verdict, cells_won, gain, interval, level, summary
from dl_jax.harness.results.record import claimed_cells, level_cell

Kind = Literal["value", "ordering", "bar", "count"]

# All lengths are in pixels of a chart that is WIDTH wide.
WIDTH, LEFT, RIGHT = 900, 346, 626  # the names end before LEFT, the plot lies between, the numbers follow RIGHT
ROW, GROUP, LETTER = 17, 25, 6.9  # heights of a row and of an experiment's name; the widest a letter is on average
LIMIT = 5  # what lies further from the claim is drawn at the edge, with an arrow

_SYMBOLS: Mapping[Verdict, tuple[str, str]] = {  # colour and path, so that colour alone never tells them apart
    "reproduced": ("#007a5a", "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z"),
    "better than claimed": ("#0067a8", "M0,-5.5 5.5,0 0,5.5 -5.5,0z"),
    "ordering only": ("#b45f00", "M0,-5 5.5,4.5 -5.5,4.5z"),
    "not reproduced": ("#c0262d", "M-5,-3 -3,-5 0,-2 3,-5 5,-3 2,0 5,3 3,5 0,2 -3,5 -5,3 -2,0z"),
}
_UNITS: Mapping[Kind, str] = {
    "value": "Numbers: distance from the claimed number, divided by its tolerance.",
    "ordering": "Orderings (A better than B): mean difference, divided by the half-width of its 95 % interval.",
    "bar": "Bars: distance from the bar, divided by the standard deviation over the seeds.",
    "count": "Cells: how many more differences exclude 0 than the claim asks for.",
}


class Place(NamedTuple):
    """Where a measurement stands against its claim, in units of `kind`; more is better."""

    kind: Kind
    at: float  # minus infinity if a value is not finite
    ends: tuple[float, float] | None  # of the 95 % confidence interval
    accepted: tuple[float, float]  # where `at` lies if the claim is reproduced


def chart(answers: Mapping[str, Sequence[Answer]]) -> str:
    """An SVG file with one row for each of `answers`, by experiment; experiments without an answer are left out."""
    groups = {name: rows for name, rows in answers.items() if rows}
    every = [answer for rows in groups.values() for answer in rows]
    missed = sum(answer.verdict in MISSED for answer in every)
    kinds = {place(answer.claim, answer.values).kind for answer in every}
    title = f"{len(every)} claims, measured against claimed: {len(every) - missed} met, {missed} missed"
    units, words = [text for kind, text in _UNITS.items() if kind in kinds], {answer.verdict for answer in every}
    head, y = _head(title, units, words)
    axis, parts = y, []
    for name, rows in groups.items():
        parts.append(_text(12, y + 18, name, LEFT, 'font-weight="bold"'))
        y += GROUP
        for answer in rows:
            parts.append(_row(answer, y))
            y += ROW
    height = y + 30
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="Helvetica, Arial, sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *head,
            *parts,
            *_axis(axis, y),
            "</svg>\n",
        ]
    )


def label(claim: Claim) -> str:
    """What the row of a claim is called."""
    return claim.quantity if claim.preset == "paper" else f"{claim.quantity} ({claim.preset})"


def place(claim: Claim, values: np.ndarray) -> Place:
    """Where `values`, the `quantity` of `claim`, stand; one side of the claim is always the better one, the right."""
    if claim.cells:
        return Place("count", cells_won(claim, values) - (claim.at_least or 0), None, (0, math.inf))
    bar = claim.at_most if claim.at_least is None else claim.at_least
    kind: Kind = "value" if claim.claimed is not None else "ordering" if bar is None else "bar"
    target = claim.claimed if claim.claimed is not None else bar or 0.0
    accepted = {"value": (-1.0, 1.0), "ordering": (1.0, math.inf), "bar": (0.0, math.inf)}[kind]
    if not np.isfinite(values).all():
        return Place(kind, -math.inf, None, accepted)
    low, high = interval(values)
    unit = {"value": claim.tolerance, "ordering": (high - low) / 2, "bar": summary(values)["std"] or 0.0}[kind]
    at, *ends = (_units(claim, each, target, unit) for each in (level(claim, values), low, high))
    if claim.versus and claim.claimed is not None:
        accepted = _accepted_difference(claim, abs(ends[1] - ends[0]) / 2)
    return Place(kind, at, None if claim.worst or len(values) < 2 else (min(ends), max(ends)), accepted)


def _accepted_difference(claim: Claim, half: float) -> tuple[float, float]:
    """`Place.accepted` of a paired difference of claimed size, whose interval reaches `half` tolerances to both sides.

    For "no loss" the worse end of the interval must lie within the tolerance. For any other size, the interval must
    exclude 0 on the claimed side.
    """
    if claim.claimed == 0:
        return min(half - 1, 1), 1
    zero = _units(claim, 0, claim.claimed or 0, claim.tolerance)
    return (min(max(-1, zero + half), 1), 1) if zero < 0 else (-1, max(min(1, zero - half), -1))


def _units(claim: Claim, found: float, target: float, unit: float) -> float:
    """How far `found` lies on the better side of `target`; infinite where `unit` is 0 and they differ."""
    if math.isclose(found, target, rel_tol=1e-9):
        return 0.0
    distance = gain(claim, found - target)
    return distance / unit if unit else math.copysign(math.inf, distance)


def _head(title: str, units: Sequence[str], words: Set[str]) -> tuple[list[str], int]:
    """The lines above the rows with a legend of the verdicts `words`, and where they end."""
    lines = [
        "Each row is one claim: the mean over seeds with its 95 % confidence interval. Right is better.",
        "A mark in the shaded part of its row is reproduced. An arrow marks a value beyond the scale.",
        *units,
    ]
    parts = [_text(12, 26, title, WIDTH - 24, 'font-size="16" font-weight="bold"')]
    parts += [_text(12, 46 + 16 * i, line, WIDTH - 24, 'fill="#444444"') for i, line in enumerate(lines)]
    y = 46 + 16 * len(lines) + 6
    for i, (word, (colour, path)) in enumerate(each for each in _SYMBOLS.items() if each[0] in words):
        x = 20 + 170 * i
        parts.append(f'<path d="{path}" transform="translate({x},{y - 4})" fill="{colour}"/>')
        parts.append(_text(x + 12, y, word, 150, f'fill="{colour}"'))
    return parts, y + 26


def _axis(top: int, bottom: int) -> list[str]:
    ticks = range(-LIMIT + 1, LIMIT, 2)
    lines = [
        f'<path d="M{_x(0):.1f},{top} V{bottom}" stroke="#555555" fill="none"/>',
        f'<path d="M{LEFT},{top} H{RIGHT} M{LEFT},{bottom} H{RIGHT}" stroke="#bbbbbb" fill="none"/>',
    ]
    for y in (top - 4, bottom + 14):
        lines += [_text(_x(tick), y, f"{tick:+d}" if tick else "0", 40, 'text-anchor="middle"') for tick in ticks]
        lines.append(_text(LEFT, y, "worse", 50, 'text-anchor="end" fill="#444444"'))
        lines.append(_text(RIGHT, y, "better", 50, 'fill="#444444"'))
    return lines


def _row(answer: Answer, top: int) -> str:
    claim, word = answer.claim, answer.verdict
    at = place(claim, answer.values)
    missed, (colour, path) = word in MISSED, _SYMBOLS[word]
    y, x = top + ROW / 2, _x(at.at)
    start, end = map(_x, at.accepted)
    ink = colour if missed else "#222222"
    name = label(claim)
    parts = [
        f"<g>\n<title>{escape(one_line(f'{name}: {word}'))}</title>",
        *([f'<rect x="0" y="{top}" width="{WIDTH}" height="{ROW}" fill="#fdecec"/>'] if missed else []),
        f'<rect class="accepted" x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="{ROW}" fill="#dcebe4"/>',
        _text(LEFT - 18, y + 4, name, LEFT - 24, f'text-anchor="end" fill="{ink}"'),
    ]
    if at.ends:
        low, high = map(_x, at.ends)
        bar = f"M{low:.1f},{y:.1f} H{high:.1f}"
        parts.append(f'<path class="interval" d="{bar}" stroke="{colour}" stroke-width="1.5" fill="none"/>')
    parts.append(f'<path class="mark" d="{path}" transform="translate({x:.1f},{y:.1f})" fill="{colour}"/>')
    if abs(at.at) > LIMIT:
        side = math.copysign(1, at.at)
        far = f"{at.at:+.1f}" if np.isfinite(answer.values).all() else "not finite"
        tip = f"M{x + 7 * side:.1f},{y - 4:.1f} l{5 * side:.0f},4 l{-5 * side:.0f},4z"
        anchor = f'text-anchor="{"end" if side > 0 else "start"}" fill="{colour}"'
        parts.append(f'<path class="arrow" d="{tip}" fill="{colour}"/>')
        parts.append(_text(x - 9 * side, y + 4, far, 100, anchor))
    if missed:
        said = f"measured {level_cell(claim, answer.values)}, claimed {claimed_cells(claim)[2]}"
        parts.append(_text(RIGHT + 16, y + 4, said, WIDTH - RIGHT - 20, f'fill="{ink}"'))
    return "\n".join([*parts, "</g>"])


def _x(units: float) -> float:
    middle = (LEFT + RIGHT) / 2
    return middle + (RIGHT - middle) * min(max(units / LIMIT, -1), 1)


def _text(x: float, y: float, text: str, width: float, attributes: str) -> str:
    """Text on one line, squeezed where it could be wider than `width`."""
    line = one_line(text)
    squeezed = f' textLength="{width:.0f}" lengthAdjust="spacingAndGlyphs"' if LETTER * len(line) > width else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}{squeezed}>{escape(line)}</text>'
