"""Types for the fields of a `Config` that restrict their values, and `check`, which checks a config against them.

    @dataclasses.dataclass(frozen=True)
    class Config:
        momentum: Probability = 0.9  # of SGD
        hidden: tuple[Positive[int], ...] = (300, 100)  # units of each layer
        bits: Annotated[int, Between(2, 8)] = 8  # of a weight

For a type checker these are the plain types `float`, `int` and `tuple`. `launch` calls `check` before any work.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from dl_jax.core.errors import InputError

Number = TypeVar("Number", int, float)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Between:
    """A number from `low` to `high`; with `open_low` or `open_high` the bound itself is excluded."""

    low: float = -float("inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def problem(self, value: Any) -> str:
        """What is expected, in words, if `value` violates it, as NaN always does; else ""."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if above and below:
            return ""
        ends = []
        if self.low > -float("inf"):
            ends.append(f"more than {self.low:g}" if self.open_low else f"at least {self.low:g}")
        if self.high < float("inf"):
            ends.append(f"less than {self.high:g}" if self.open_high else f"at most {self.high:g}")
        return " and ".join(ends)


@dataclasses.dataclass(frozen=True)
class Length:
    """A tuple of at least `fewest` items; if `distinct`, items must differ."""

    fewest: int = 1
    distinct: bool = False

    def problem(self, value: Any) -> str:
        """What is expected, in words, if `value` violates it; else ""."""
        if len(value) < self.fewest:
            return f"{self.fewest} or more values"
        return "each value once" if self.distinct and len(set(value)) < len(value) else ""


Positive = Annotated[Number, Between(low=0, open_low=True)]  # in (0, inf]
NonNegative = Annotated[Number, Between(low=0)]  # in [0, inf]
Probability = Annotated[float, Between(0, 1, open_high=True)]  # in [0, 1): at 1, dropout would drop everything
Fraction = Annotated[float, Between(0, 1, open_low=True)]  # in (0, 1]: 0 would leave nothing
Some = Annotated[tuple[T, ...], Length()]  # one value or more
Distinct = Annotated[tuple[T, ...], Length(distinct=True)]  # one value or more, all different


def check(config: Any) -> None:
    """Raises InputError, with the name of the flag, for a field with a value that its type does not allow."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for found, expected in _problems(value, hint):
            shown = f"{value!r}" if found is value else f"{value!r}, which holds {found!r}"
            raise InputError(f"--{name.replace('_', '-')} is {shown}, expected {expected}; change it")


def _problems(value: Any, hint: Any) -> Iterator[tuple[Any, str]]:
    """(invalid value, what is expected) for `value` and, if it is a tuple, for its items."""
    if get_origin(hint) is Annotated:
        plain, *notes = get_args(hint)
        for note in notes:
            if isinstance(note, Between | Length) and (expected := note.problem(value)):
                yield value, expected
        yield from _problems(value, plain)
    elif get_origin(hint) is tuple:
        items = get_args(hint)
        each = [items[0]] * len(value) if items[-1] is Ellipsis else items
        for item, its_hint in zip(value, each, strict=True):
            yield from _problems(item, its_hint)
