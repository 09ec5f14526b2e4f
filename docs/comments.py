"""Brings comments of signatures and fields, which say shapes and units, to the pages of the API (properdocs.yml)."""

import io
import re
import tokenize
from typing import Any

import griffe

PARAMETER = re.compile(r"\*{0,2}\w+:")  # at the beginning of a line of a signature


class Comments(griffe.Extension):
    """Adds to what a function's docstring says, and says what a field is, as the comments of the source do."""

    def on_function_instance(self, *, node: Any, func: griffe.Function, **_: Any) -> None:
        """The comments of a signature, below the docstring, each with the name of the parameter beside it."""
        if isinstance(node, griffe.ObjectNode) or not (lines := source(func)):
            return
        signature = lines[node.lineno - (func.lineno or node.lineno) :][: node.body[0].lineno - node.lineno]
        if found := commented(signature):
            text = func.docstring.value if func.docstring else ""
            named = [f"`{name[0]} {said}`" if (name := PARAMETER.match(code)) else f"`{said}`" for code, said in found]
            func.docstring = griffe.Docstring("\n\n".join([text, *named]), parent=func)

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """The comment of a field without a docstring."""
        if not attr.docstring and len(lines := source(attr)) == 1 and (found := commented(lines)):
            attr.docstring = griffe.Docstring(found[0][1], parent=attr)


def source(thing: griffe.Object) -> list[str]:
    """The lines of the source of a function or field."""
    if thing.lineno is None or thing.endlineno is None:
        return []
    return thing.lines_collection[thing.filepath][thing.lineno - 1 : thing.endlineno]  # type: ignore[index]


def commented(lines: list[str]) -> list[tuple[str, str]]:
    """(code, comment) of the lines that end with a comment, both stripped; lines that are a comment are left out."""
    tokens: list[tokenize.TokenInfo] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
            tokens.append(token)
    except (tokenize.TokenError, IndentationError):
        pass  # the source ends within a signature or a block
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    pairs = [(lines[each.start[0] - 1][: each.start[1]].strip(), each.string.lstrip("# ")) for each in comments]
    return [(code, comment) for code, comment in pairs if code]
