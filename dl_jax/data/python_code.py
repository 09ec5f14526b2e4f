"""The bundled sets `python_tokens` and `docstrings`: texts that are always there, from Python's own standard library.

They are made for smoke runs, tests and a newcomer's first run of experiments on words. They differ a little from one
version of Python to the next, whose number is theirs.
"""

import ast
import io
import itertools
import keyword
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dl_jax.core.errors import InputError
from dl_jax.data.bundled import Bundled

TOKEN_SIZE, DOCSTRING_SIZE = 400_000, 12_000_000  # characters of source text that are read for the two sets, at most
_SHORTEST, _LONGEST, _WIDEST = 3, 40, 30  # tokens of a line, and characters of a token
_WORDS = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}  # folders that are left out

TAGS = (
    *("keyword", "variable", "function", "class", "method", "attribute", "call", "argument", "module"),
    *("number", "string", "operator", "bracket", "separator"),
)
KINDS = ("class", "function", "method")


def sources(pattern: str, most: int) -> Iterator[str]:
    """The source texts of the standard library's modules, in the order of their names, up to `most` characters."""
    folder, size = Path(sysconfig.get_path("stdlib")), 0
    files = [file for file in sorted(folder.glob(pattern)) if not _OTHERS & {*file.relative_to(folder).parts}]
    if not files:
        raise InputError(
            f"this Python has no source text in {folder}, expected its standard library; choose another set"
        )
    for file in files:
        source = file.read_text("utf-8", "replace")
        size += len(source)
        if size > most:
            return
        yield source


def lines(source: str) -> Iterator[tuple[list[str], list[str]]]:
    """The tokens of each logical line, without comments, and their tags."""
    line: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            texts = [each.string for each in line]
            whole = all(each.type in _WORDS for each in line)  # no part of an f-string
            if whole and _SHORTEST <= len(line) <= _LONGEST and max(map(len, texts)) <= _WIDEST:
                yield texts, list(_tags(line))
            line = []
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            line.append(token)


def _tags(line: list[tokenize.TokenInfo]) -> Iterator[str]:
    texts = ["", *(token.string for token in line), ""]
    depth, imports = 0, texts[1] in ("import", "from")
    for token, before, text, after in zip(line, texts, texts[1:], texts[2:], strict=False):
        depth += (text in "([{") - (text in ")]}") if token.type == tokenize.OP else 0
        if token.type == tokenize.NUMBER:
            yield "number"
        elif token.type == tokenize.STRING:
            yield "string"
        elif token.type == tokenize.OP:
            yield "bracket" if text in "()[]{}" else "separator" if text in ",:;." else "operator"
        else:
            yield _name(before, text, after, depth > 0, imports)


def _name(before: str, text: str, after: str, within: bool, imports: bool) -> str:
    """The tag of a name between two tokens, `within` brackets or not, in a line that `imports` or not."""
    if keyword.iskeyword(text):
        return "keyword"
    if before in ("def", "class"):
        return "function" if before == "def" else "class"
    if imports:
        return "module"
    if before == ".":
        return "method" if after == "(" else "attribute"
    if after == "(":
        return "call"
    return "argument" if within and after == "=" else "variable"


def docstrings(source: str) -> Iterator[tuple[str, str, str]]:
    """The first sentence of each docstring of a class, function or method, the text after it, and the kind."""

    def nodes(tree: ast.AST, inside: bool) -> Iterator[tuple[str, str]]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                is_class = isinstance(node, ast.ClassDef)
                yield "class" if is_class else "method" if inside else "function", ast.get_docstring(node) or ""
                yield from nodes(node, is_class)

    for kind, text in nodes(ast.parse(source), False):
        first, stop, rest = " ".join(text.split()).partition(". ")
        if len(first.split()) >= _SHORTEST:
            yield first + stop.strip(), rest, kind


def _splits(examples: Callable[[], Iterable[dict[str, Any]]]) -> Callable[[], Mapping[str, list[dict[str, Any]]]]:
    """Eight of ten examples to learn from, then one for validation and one for testing; equal ones are left out."""

    def splits() -> Mapping[str, list[dict[str, Any]]]:
        every = list({repr(example): example for example in examples()}.values())
        train = [example for i, example in enumerate(every) if i % 10 < 8]
        return {"train": train, "validation": every[8::10], "test": every[9::10]}

    return splits


def _token_examples() -> Iterator[dict[str, Any]]:
    for tokens, tags in itertools.chain.from_iterable(map(lines, sources("[a-z]*.py", TOKEN_SIZE))):
        yield {"tokens": tokens, "tags": tags}


def _token_features() -> dict[str, Any]:
    import tensorflow_datasets as tfds

    tag = tfds.features.ClassLabel(names=list(TAGS))
    return {"tokens": tfds.features.Sequence(tfds.features.Text()), "tags": tfds.features.Sequence(tag)}


def _docstring_examples() -> Iterator[dict[str, Any]]:
    for summary, text, kind in itertools.chain.from_iterable(map(docstrings, sources("**/*.py", DOCSTRING_SIZE))):
        yield {"summary": summary, "text": text, "label": kind}


def _docstring_features() -> dict[str, Any]:
    import tensorflow_datasets as tfds

    text = tfds.features.Text
    return {"summary": text(), "text": text(), "label": tfds.features.ClassLabel(names=list(KINDS))}


VERSION = ".".join(map(str, sys.version_info[:3]))
TOKENS = Bundled(
    "python_tokens",
    VERSION,
    "Lines of the standard library's source, as tokens with what each of them is",
    _token_features,
    _splits(_token_examples),
)
DOCSTRINGS = Bundled(
    "docstrings",
    VERSION,
    "Docstrings of the standard library: the first sentence, the text after it, and of what it is",
    _docstring_features,
    _splits(_docstring_examples),
)
