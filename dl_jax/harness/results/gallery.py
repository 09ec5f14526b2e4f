"""The gallery of the documentation's site: a figure, the claim, the verdicts and the command of every experiment."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dl_jax.harness.results.answers import Section
from dl_jax.harness.results.chart import chart
from dl_jax.harness.results.claims import VERDICTS
from dl_jax.harness.results.page import PAGE, captions, commands, escaped, link

GALLERY = Path("docs/gallery.md")

_INTRO = """\
# Gallery

Every experiment with its claim, the command that measured it, and what came of it. The figure is one that the run drew,
or else the experiment's part of the chart of all claims: a mark in the shaded part of its row is as claimed, a mark
right of it is better, and a red cross is a miss. The numbers, and the reasons for the misses, are in
[Results](results.md).
"""


def gallery(found: Sequence[Section]) -> dict[Path, str]:
    """{path: text} of the page, in Markdown, and of the charts of those experiments in `found` that drew no figure.

    Links are relative to the folder of PAGE, in which GALLERY is too.
    """
    charts = {
        _chart(each): chart({each.entry.name: each.answers}) for each in found if each.answers and not each.figures
    }
    return {GALLERY: "\n".join([_INTRO, *map(_card, found)]), **charts}


def _card(section: Section) -> str:
    name = section.entry.name
    number_of = Counter[str](answer.verdict for answer in section.answers)
    number_of["not run"] += len(section.unanswered)
    counts = [f"{number_of[word]} {word}" for word in VERDICTS if number_of[word]]
    verdicts = ", ".join(counts) or "it makes no claim"
    parts = [f"## {name}\n\n{escaped(section.entry.title)}\n", f"```sh\n{chr(10).join(commands(section))}\n```\n"]
    parts.append(f"**Claims:** {verdicts} ([the numbers](results.md#{name.replace('/', '')}))\n")
    if section.figures:
        [(figure, caption), *_] = captions(section)
        parts.append(f"![{caption}]({link(figure)})\n")
    elif section.answers:
        parts.append(f"![what was measured against what was claimed]({link(_chart(section))})\n")
    return "\n".join(parts)


def _chart(section: Section) -> Path:
    return PAGE.parent / "gallery" / f"{section.entry.name.replace('/', '-')}.svg"
