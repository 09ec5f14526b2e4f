"""What the experiment files say about themselves, read from their source: nothing is imported or run."""

import ast
import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from dl_jax.core.errors import InputError
from dl_jax.harness.results.claims import Claim


class Entry(NamedTuple):
    """An experiment's file."""

    name: str  # "vision/lenet"
    path: Path
    title: str  # the first line of its docstring
    claims: tuple[Claim, ...] | None  # None where the file computes them


def catalogue(directory: str | PurePath) -> dict[str, Entry]:
    """{name: entry} of every experiment below `directory`, in order of name; names that start with "_" are left out.

    Raises InputError if there is no such directory, or a file is no Python, has no docstring or makes a wrong claim.
    """
    root = Path(directory)
    if not root.is_dir():
        raise InputError(f"there is no {root}; run this at the root of the repository")
    files = [file for file in root.rglob("*.py") if not any(p.startswith("_") for p in file.relative_to(root).parts)]
    entries = [_entry(file, file.relative_to(root).with_suffix("").as_posix()) for file in files]
    return {entry.name: entry for entry in sorted(entries)}


def _entry(file: Path, name: str) -> Entry:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as e:
        raise InputError(f"{file}:{e.lineno}: {e.msg}; an experiment must be Python") from None
    docstring = ast.get_docstring(tree)
    if not docstring:
        raise InputError(f"{file} has no docstring; expected one whose first line says what is claimed")
    return Entry(name, file, docstring.splitlines()[0].strip(), _claims(tree, file))


def _claims(tree: ast.Module, file: Path) -> tuple[Claim, ...] | None:
    """The claims of a module whose CLAIMS is a display of Claim(...) with literal arguments or none; else None."""
    constants: dict[str, ast.expr] = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                constants[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                constants[name] = value
    try:
        match constants.get("CLAIMS"):
            case None:
                return ()
            case ast.Tuple(elts=calls) | ast.List(elts=calls):
                arguments = [_arguments(call, constants) for call in calls]
            case _:
                return None
    except ValueError:  # not literal
        return None
    try:
        return tuple(Claim(**kwargs) for kwargs in arguments)
    except (TypeError, InputError) as e:
        raise InputError(f"{file}: CLAIMS: {e}") from None


def _arguments(call: ast.expr, constants: Mapping[str, ast.expr]) -> dict[str, Any]:
    """{field: value} of the expression `Claim(...)`. Raises ValueError if it is anything else or not literal."""
    match call:
        case ast.Call(func=ast.Name(id="Claim") | ast.Attribute(attr="Claim")):
            names = [field.name for field in dataclasses.fields(Claim)]
            values = [*zip(names, call.args, strict=False), *((k.arg, k.value) for k in call.keywords)]
            return {str(name): ast.literal_eval(_Inline(constants).visit(value)) for name, value in values}
    raise ValueError


class _Inline(ast.NodeTransformer):
    """Replaces the name of a module's constant by its value, and an f-string by its text."""

    def __init__(self, constants: Mapping[str, ast.expr]) -> None:
        self._constants = constants

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = self._constants.get(node.id)
        others = {name: each for name, each in self._constants.items() if name != node.id}  # no constant holds itself
        return node if value is None else _Inline(others).visit(value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        return ast.Constant("".join(self._text(part) for part in node.values))

    def _text(self, part: ast.expr) -> str:
        match part:
            case ast.Constant(value=str(text)):
                return text
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return str(ast.literal_eval(self.visit(value)))
        raise ValueError
