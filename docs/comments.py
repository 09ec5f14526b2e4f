"""Brings comments of signatures and fields, which say shapes and units, to the pages of the API (properdocs.yml)."""

import io
import tokenize
from typing import Any

import griffe


class Comments(griffe.Extension):
    """Adds to what a function's docstring says, and says what a field is, as the comments of the source do."""

    def on_function_instance(self, *, node: Any, func: griffe.Function, **_: Any) -> None:
        """The lines of a signature that have a comment, below the docstring."""
        if isinstance(node, griffe.ObjectNode) or not (lines := source(func)):
            return
        signature = lines[node.lineno - (func.lineno or node.lineno) :][: node.body[0].lineno - node.lineno]
        if found := commented(signature):
            text = func.docstring.value if func.docstring else ""
            block = "\n".join(found)
            func.docstring = griffe.Docstring(f"{text}\n\n```python\n{block}\n```", parent=func)

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """The comment of a field without a docstring."""
        if not attr.docstring and len(lines := source(attr)) == 1 and (found := commented(lines)):
            comment = found[0].rpartition("#")[2].strip()
            attr.docstring = griffe.Docstring(comment, parent=attr)


def source(thing: griffe.Object) -> list[str]:
    """The lines of the source of a function or field."""
    if thing.lineno is None or thing.endlineno is None:
        return []
    return thing.lines_collection[thing.filepath][thing.lineno - 1 : thing.endlineno]  # type: ignore[index]


def commented(lines: list[str]) -> list[str]:
    """Those of the lines that end with a comment, without their indentation; lines that are a comment are left out."""
    tokens: list[tokenize.TokenInfo] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
            tokens.append(token)
    except (tokenize.TokenError, IndentationError):
        pass  # the source ends within a signature or a block
    rows = [token.start[0] for token in tokens if token.type == tokenize.COMMENT]
    return [text for row in rows if not (text := lines[row - 1].strip()).startswith("#")]
