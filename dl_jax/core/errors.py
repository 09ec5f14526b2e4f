"""Bad input: one clear line for a person, never a traceback."""

import difflib
from collections.abc import Iterable, Mapping


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the value, what was expected and what to do about it. `launch` prints it and
    exits with status 2.
    """


def require_positive(numbers: Mapping[str, float]) -> None:
    """Raises InputError for a number, by the name of its setting, that is not above 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise InputError(f"{name} is {value}, expected more than 0; give a larger one")


def require_probability(numbers: Mapping[str, float]) -> None:
    """Raises InputError for a number, by the name of its setting, outside [0, 1)."""
    for name, value in numbers.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}, expected a probability of at least 0 and less than 1")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to append to a message: the known names nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
