"""papers/*.toml: the cells of papers' tables that no experiment attempts, and where each number was read."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from dl_jax.core.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a paper."""

    locator: str  # where in the paper, as a claim would say it: "Table 1, Seq. MNIST, LSTM"
    quantity: str  # what is measured, e.g. "test accuracy"
    number: float
    unit: str
    verified: bool  # False: the number is from memory and is printed as "unverified"
    read_in: str  # where the number was read, e.g. "the paper"
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Paper:
    """A file of papers/."""

    path: Path
    paper: str  # as claims name it: "Bai et al. 2018"
    title: str
    authors: str
    year: int
    url: str
    cells: tuple[Cell, ...]


_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "[[cell]]"}
_PAPER = {"paper": str, "title": str, "authors": str, "year": int, "url": str, "cell": list}
_CELL = {field.name: field.type for field in dataclasses.fields(Cell)}


def papers(directory: str | PurePath) -> list[Paper]:
    """What stands in `directory`/*.toml, in order of their names.

    Raises InputError that names the file and the key if one is unknown, missing, of the wrong type, or there twice.
    """
    return [_paper(path) for path in sorted(Path(directory).glob("*.toml"))]


def _paper(path: Path) -> Paper:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: {e}; expected a TOML file") from None
    _check(table, _PAPER, (), f"{path}: ")
    cells = [_cell(each, f"{path}: cell.{i}") for i, each in enumerate(table.pop("cell"))]
    seen: set[tuple[str, str]] = set()
    for i, cell in enumerate(cells):
        if (cell.locator, cell.unit) in seen:
            raise InputError(f"{path}: cell.{i}.locator {cell.locator!r} is there twice, expected once for each unit")
        seen.add((cell.locator, cell.unit))
    return Paper(path=path, cells=tuple(cells), **table)


def _cell(table: Any, where: str) -> Cell:
    if not isinstance(table, dict):
        raise InputError(f"{where} is {table!r}, expected a table, [[cell]]")
    _check(table, _CELL, ("note",), f"{where}.")
    return Cell(**table)


def _check(table: Mapping[str, Any], kinds: Mapping[str, Any], optional: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in kinds:
            raise InputError(f"{where}{key} is no key here{nearest(key, kinds)}; expected {', '.join(kinds)}")
    for key, kind in kinds.items():
        if key not in table and key not in optional:
            raise InputError(f"{where}{key} is missing, expected {_NAMES[kind]}")
        if key in table and type(table[key]) not in ((int, float) if kind is float else (kind,)):
            raise InputError(f"{where}{key} is {table[key]!r}, expected {_NAMES[kind]}")
