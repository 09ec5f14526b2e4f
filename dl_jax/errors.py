"""Bad input: one clear line for a person, never a traceback."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the value, what was expected and what to do about it. `launch` prints it and
    exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to append to a message: the known names nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
