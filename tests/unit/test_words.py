"""Retired words and docstring sections do not come back into the sources and the documentation."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("dl_jax", "experiments", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

RETIRED = {
    **dict.fromkeys(("picture", "pictures"), "image, or figure for a plot"),
    **dict.fromkeys(("exam", "exams", "examine", "examines", "examined", "examining"), "evaluation, evaluate"),
    **dict.fromkeys(("lane", "lanes"), "seed, or seed axis"),
    **dict.fromkeys(("sound", "unsound"), "valid (audio is audio)"),
    "hopeless": "MAX_NONFINITE_IN_A_ROW",
}
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # words of prose, and of identifiers such as per_seed, SEED_AXIS and SeedAxis
SECTION = re.compile(r'\s*(?:""")?(Raises|Returns):')


def retired_words(text: str) -> Iterator[str]:
    """'LINE: what to write' for each retired word in code, comments, strings and prose."""
    for number, line in enumerate(text.splitlines(), 1):
        for word in WORD.findall(line):
            if word.lower() in RETIRED:
                yield f"{number}: {word!r} is retired, write {RETIRED[word.lower()]}"


def sections(source: str) -> Iterator[str]:
    """'LINE: what to write' for each section of a docstring that should be a sentence."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                for number, line in enumerate(lines, node.lineno):
                    if found := SECTION.match(line):
                        verb = found[1]
                        yield f"{number}: the docstring has a section {verb!r}, write a sentence, '{verb} ...'"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1  # one per lane", ["1: 'lane' is retired, write seed, or seed axis"]),
        ("\ndef laneState(): ...", ["2: 'lane' is retired, write seed, or seed axis"]),
        ("LANE_AXIS = class_of(SoundState)", ["1: 'LANE' is", "1: 'Sound' is"]),
        ("an example of a plane whose sounding examples", []),
        ("Exams with Pictures", ["1: 'Exams' is", "1: 'Pictures' is"]),
    ],
)
def test_words_are_found_in_prose_and_in_names(text, found):
    assert [message[: len(start)] for message, start in zip(retired_words(text), found, strict=True)] == found


def test_sections_are_found_in_docstrings_alone():
    source = '''
def f(x):
    """Doubles.

    Args:
      x: a number.
    Returns:
      A number.
    """
    return "Raises: nothing"


class C:
    """Raises InputError."""

    a = 1
    """A field.

    Raises: InputError.
    """
'''
    assert [message.split(":")[0] for message in sections(source)] == ["7", "19"]


def found_in(paths: list[Path], search: Callable[[str], Iterator[str]]) -> str:
    """One line 'FILE:LINE: what to write' for each place."""
    files = [(path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in paths]
    return "\n".join(f"{name}:{place}" for name, text in files for place in search(text))


def test_no_retired_words():
    places = found_in([*SOURCES, *PAGES], retired_words)
    assert not places, f"\n{places}"


def test_docstrings_are_prose():
    """`Args:` may explain arguments; what a function returns and raises are sentences."""
    places = found_in(SOURCES, sections)
    assert not places, f"\n{places}"


def test_the_guide_has_each_experiment_with_a_step_of_its_own_as_an_example():
    guide = (ROOT / "docs" / "guide.md").read_text()
    section = guide.partition("\n## Other kinds of steps\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`experiments/([a-z]+/\w+)\.py`", section))
    there = {
        str(path.relative_to(ROOT / "experiments").with_suffix("")) for path in SOURCES if "experiments" in path.parts
    }
    assert named <= there
    assert {name for name in there if name.startswith(("generative/", "learning/", "tabular/"))} <= named
