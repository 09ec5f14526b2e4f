"""What users read: exceptions and warnings, checks that raise them, and output that never fails."""

import contextlib
import difflib
import io
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

BAD_INPUT, UNAVAILABLE = 2, 75  # exit statuses after InputError and Unavailable; 75 is EX_TEMPFAIL of sysexits.h

_warned: set[str] = set()  # what `warn_once` has said


class InputError(Exception):
    """A value that the user gave is wrong.

    The message is one line with the value, what was expected and what to do. `launch` prints it and exits with status
    2.
    """


class Unavailable(Exception):
    """Something could not be read or written after several attempts, or nothing went on; it may be better later.

    The message is one line with what was tried and why it failed. `launch` prints it and exits with status
    75, so that a supervisor may give the same command again.
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


def not_installed(what: str, error: ImportError, extra: str) -> InputError:
    """The error of `what`, which needs a package of an extra of dl_jax that could not be imported."""
    return InputError(f"{what} needs {error.name}, which is not installed; run: pip install -e '.[{extra}]'")


def one_line(text: object) -> str:
    """`text`, such as an exception's message, with every run of white space as one blank."""
    return " ".join(str(text).split())


def reason(error: BaseException) -> str:
    """Why `error` happened, in one line: the system's words where it has some."""
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__


def warn_once(what: str, error: BaseException, then: str) -> None:
    """Warns "`what` (the reason of `error`): `then`". Does nothing if this process has warned of `what` before."""
    if what not in _warned:
        _warned.add(what)
        warnings.warn(f"{what} ({reason(error)}): {then}", stacklevel=3)


@contextlib.contextmanager
def spared(what: str, lost: str, errors: type[Exception] | tuple[type[Exception], ...] = OSError) -> Iterator[None]:
    """A context for what a run can do without: its failure ends the body with a warning, and the run goes on.

    `what` says what fails, such as "curves.png cannot be written", and `lost` what is lost by it. There is one warning
    for each `what`. `errors` are the exceptions that count as a failure.
    """
    try:
        yield
    except errors as error:
        warn_once(what, error, f"{lost}; the run goes on")


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """A context in which to print never fails, whatever becomes of stdout and stderr.

    Their reader may be gone, their disk full, or they may be closed from the start. What cannot be written is lost,
    which is said once on the other of the two; the next write is tried again. A character that the encoding lacks is
    printed as a question mark. A stream that is not Python's own, such as one of a test, is left as it is.
    """
    _fill_standard_descriptors()
    with _lasting("stdout", sys.stderr), _lasting("stderr", sys.stdout):
        yield


def exit_status(command: Callable[[], int | None]) -> int:
    """Calls `command`, in whose output to print never fails, and returns its exit status, 0 for None.

    After InputError and Unavailable it is theirs, and their line is printed.
    """
    with lasting_output():
        try:
            return command() or 0
        except (InputError, Unavailable) as error:
            print(f"error: {error}", file=sys.stderr)
            return UNAVAILABLE if isinstance(error, Unavailable) else BAD_INPUT


def _fill_standard_descriptors() -> None:
    """Opens devnull for those of the descriptors 0 to 2 that are closed, so that no file gets such a number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


@contextlib.contextmanager
def _lasting(name: str, other: TextIO | None) -> Iterator[None]:
    """A context in which sys.`name` lasts. `other` is the stream that hears of a failure."""
    old = getattr(sys, name)
    descriptor = _descriptor(old)
    if old is None or getattr(old, "closed", False):
        with open(os.devnull, "w", encoding="utf-8", errors="replace") as nothing, _standing_in(name, nothing):
            yield
    elif descriptor is None:
        yield
    else:
        raw = _LastingFile(descriptor, name, _descriptor(other))
        with raw.sparing():
            old.flush()
        new = io.TextIOWrapper(
            raw,
            encoding=old.encoding,
            errors="replace" if old.errors in ("strict", "surrogateescape") else old.errors,
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
        try:
            with _standing_in(name, new):
                yield
        finally:
            with raw.sparing():
                if not new.closed:
                    new.flush()
                old.flush()  # a logger may have kept it
            if raw.failed:  # Python flushes the old stream when it exits; that would fail and change the exit status
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), descriptor)


@contextlib.contextmanager
def _standing_in(name: str, stream: TextIO) -> Iterator[None]:
    """A context in which sys.`name` is `stream`."""
    old = getattr(sys, name)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        setattr(sys, name, old)


def _descriptor(stream: TextIO | None) -> int | None:
    """The descriptor of a text stream such as Python opens, with a buffer or (python -u) without; None for another."""
    if type(stream) is not io.TextIOWrapper or stream.closed:
        return None
    match stream.buffer:
        case io.BufferedWriter(raw=io.FileIO() as file) | (io.FileIO() as file):
            return file.fileno()
    return None


class _LastingFile(io.FileIO):
    """The open file with this descriptor, without a buffer. A write to it never fails."""

    def __init__(self, descriptor: int, name: str, other: int | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = f"<{name}>"
        self.failed = False
        self._other = other

    def write(self, data: Any, /) -> int:
        """Writes all of `data`, and waits where that has to wait for the reader. What cannot be written is lost."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        with self.sparing():
            while rest:
                written = super().write(rest)
                if written is None:  # the descriptor does not block, and nothing fits
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        return size

    @contextlib.contextmanager
    def sparing(self) -> Iterator[None]:
        """A context that an OSError ends quietly; the first is told to the other stream."""
        try:
            yield
        except OSError as error:
            if not self.failed and self._other is not None:
                lost = "what is printed there is lost; the run goes on"
                told = f"warning: {self.name} cannot be written ({reason(error)}): {lost}\n"
                with contextlib.suppress(OSError):
                    os.write(self._other, told.encode())  # past the stream, which another thread may be using
            self.failed = True


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a message, "; did you mean ...?", with the known names nearest to `name`; "" if none is near."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
