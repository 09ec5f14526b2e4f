"""What users read: the exception for bad input, checks that raise it, and output that never fails."""

import difflib
import io
import sys
from collections.abc import Iterable, Mapping


class InputError(Exception):
    """A value that the user gave is wrong.

    The message is one line with the value, what was expected and what to do. `launch` prints it and exits with status
    2.
    """


class Unavailable(Exception):
    """Something could not be read or written after several attempts, or nothing went on; it may be better later.

    The message is one line with what was tried and why it failed. `launch` prints it and exits with status 75
    (EX_TEMPFAIL of sysexits.h), so that a supervisor may give the same command again.
    """


def require_positive(numbers: Mapping[str, float]) -> None:
    """Raises InputError unless all of `numbers`, {name of the setting: value}, are above 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise InputError(f"{name} is {value}, expected more than 0; give a larger one")


def require_probability(numbers: Mapping[str, float]) -> None:
    """Raises InputError unless all of `numbers`, {name of the setting: value}, are in [0, 1)."""
    for name, value in numbers.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}, expected a probability of at least 0 and less than 1; use 0 for none")


def one_line(text: object) -> str:
    """`text`, such as an exception's message, with every run of white space as one blank."""
    return " ".join(str(text).split())


def print_anything() -> None:
    """Makes stdout print a question mark for a character that its encoding lacks, instead of raising."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a message, "; did you mean ...?", with the known names nearest to `name`; "" if none is near."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
