"""One HTML file of a run or of two, which needs no server, no script and no other file."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from dl_jax.harness.results.record import table_rows
from dl_jax.harness.watch.draw import STYLES, last_values, svg_plot
from dl_jax.harness.watch.facts import compared, fit_rows, measured, sentences, summary
from dl_jax.harness.watch.read import Curve, Watched, content, curve_name

LARGEST = 300_000  # bytes of an image that is put into the page

_HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: Helvetica, Arial, sans-serif; font-size: 14px; margin: 2em; color: #222222; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ text-align: left; vertical-align: top; padding: 3px 12px 3px 0; border-bottom: 1px solid #dddddd; }}
figure {{ display: inline-block; margin: 0 1em 1em 0; vertical-align: top; }}
.curve {{ width: 356px; }}
figcaption {{ font-size: 11px; color: #555555; text-align: center; }}
img {{ max-width: 100%; }}
.missed, .damaged {{ color: #c0262d; font-weight: bold; }}
.met {{ color: #007a5a; }}
</style>
</head>
<body>
<h1>{title}</h1>
"""
_WORDS = {  # classes of verdicts
    **dict.fromkeys(("reproduced", "better than claimed"), "met"),
    **dict.fromkeys(("ordering only", "not reproduced"), "missed"),
}
_READING = (
    "A line is the mean of a metric's values, mostly one for each seed, whose number is in parentheses; the shaded "
    "part reaches from the least to the greatest."
)


def page(run: Watched, now: float) -> str:
    """The page of a run. `now` is the time in seconds since 1970."""
    parts = [_head(run.identity["experiment"], [run]), _table((), summary(run, now))]
    if run.result:
        parts += ["<h2>Claims</h2>", _table(*table_rows(run.result))]
    parts += ["<h2>Fits</h2>", _table(*fit_rows(run)), f"<p>{_READING}</p>"]
    for fit, found in run.fits.items():
        parts.append(f"<h3>{escape(fit or 'train')}</h3>")
        parts += [_figure(metric, {run.workdir: curve}) for metric, curve in found.curves.items()]
    parts += ["<h2>Figures</h2>"] if run.images else []
    parts += [_image(name, content(file)) for name, file in run.images.items()]
    return "\n".join([*parts, "</body>\n</html>\n"])


def page_of_two(one: Watched, other: Watched) -> str:
    """The page of two runs: their differences, what they measured, and the curves that both have on the same axes."""
    topics = compared(one, other)
    rows = [(topic.name, *row) for topic in topics for row in topic.rows]
    parts = [
        _head("Two runs", [one, other]),
        _table(("", "differs", one.workdir, other.workdir), rows) if rows else "",
        *(f"<p>{escape(sentence)}</p>" for sentence in sentences(topics)),
        "<h2>Measured</h2>",
        _table(*measured(one, other)),
        "<h2>Curves</h2>",
        f"<p>{_READING}</p>",
        *(
            f'<p style="color: {colour}">■ {escape(run.workdir)}</p>'
            for (colour, _), run in zip(STYLES, (one, other), strict=True)
        ),
    ]
    for fit, found in one.fits.items():
        others = other.fits[fit].curves if fit in other.fits else {}
        for metric, curve in found.curves.items():
            if metric in others:
                parts.append(_figure(curve_name(fit, metric), {"first": curve, "second": others[metric]}))
    return "\n".join([*parts, "</body>\n</html>\n"])


def _head(title: str, runs: Sequence[Watched]) -> str:
    damaged = [f'<p class="damaged">{escape(sentence)}</p>' for run in runs for sentence in run.damaged]
    return "\n".join([_HEAD.format(title=escape(title)), *damaged])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = ["<tr>", *(f"<th>{escape(cell)}</th>" for cell in header), "</tr>"] if header else []
    body = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    return "\n".join(["<table>", *head, *body, "</table>"])


def _cell(text: str) -> str:
    word = _WORDS.get(text)
    return f'<td class="{word}">{text}</td>' if word else f"<td>{escape(text)}</td>"


def _figure(title: str, curves: Mapping[str, Curve]) -> str:
    said = "; ".join(f"{last_values(curve)} at step {curve.steps[-1]}" for curve in curves.values())
    plot = svg_plot(title, curves)
    caption = escape(said if plot else f"{title}: {said}")
    return f'<figure class="curve">{plot}<figcaption>{caption}</figcaption></figure>'


def _image(name: str, png: bytes) -> str:
    if len(png) > LARGEST:
        return f"<p>{escape(name)} has {len(png) // 1000} kB and is left in the folder.</p>"
    data = base64.b64encode(png).decode()
    caption = f"<figcaption>{escape(name)}</figcaption>"
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(name)}">{caption}</figure>'
