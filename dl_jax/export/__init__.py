"""Exports a model and its parameters to one file, which predicts for any batch size, or for one.

Each format exports a pure function `apply(variables, *inputs)`, such as
`lambda variables, image: model.apply(variables, image, train=False)`. The example inputs are arrays whose first axis is
the batch; the file then takes inputs with their other axes and their types. It is checked when it is written, when it
is opened, and when it is called.

Neither this file nor what opens ONNX files imports JAX, which a process that only predicts can do without.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dl_jax.core.errors import InputError


class Input(NamedTuple):
    """Shape and dtype of an array that an exported model takes."""

    shape: tuple[int | None, ...]  # None for the batch axis, where it may have any length
    dtype: str  # NumPy's name

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('batch' if size is None else str(size) for size in self.shape)}]"

    def fits(self, array: Any) -> bool:
        """Whether `array` has this dtype and shape, with a batch of one or more."""
        shape = np.shape(array)
        return (
            getattr(array, "dtype", None) == self.dtype
            and len(shape) == len(self.shape)
            and all(size == want or (want is None and size > 0) for size, want in zip(shape, self.shape, strict=True))
        )


def check(expected: Sequence[Input], inputs: Sequence[Any]) -> None:
    """Raises InputError where `inputs` are not arrays of the expected shapes and types with one batch size."""
    if len(inputs) != len(expected):
        raise InputError(f"{len(inputs)} inputs, expected {len(expected)}: {', '.join(map(str, expected))}")
    for place, (each, want) in enumerate(zip(inputs, expected, strict=True)):
        if not want.fits(each):
            found = Input(np.shape(each), str(getattr(each, "dtype", type(each).__name__)))
            raise InputError(f"input {place} is {found}, expected {want}; reshape or convert it")
    sizes = {each.shape[0] for each, want in zip(inputs, expected, strict=True) if want.shape[:1] == (None,)}
    if len(sizes) > 1:
        raise InputError(
            f"inputs with batches of {' and '.join(map(str, sizes))}, expected one size; pair them up again"
        )


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. Raises InputError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"cannot read {path} ({e.strerror or e}); export a model to it first") from e


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically. Raises InputError where it cannot be written."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as e:
        raise InputError(
            f"cannot write {path} ({e.strerror or e}); name a file in a folder that you may write to"
        ) from e
