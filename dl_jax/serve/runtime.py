"""An exported file and its record as one function of any number of rows."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.export import Input, read, record
from dl_jax.export.record import Record

Predict = Callable[[Sequence[np.ndarray]], list[np.ndarray]]  # rows of each input -> rows of each output
Stamp = tuple[tuple[int, int, int] | None, ...]


class Model(NamedTuple):
    """A file that is ready to predict."""

    record: Record
    predict: Predict
    stamp: Stamp  # of the file, before it was read

    @property
    def version(self) -> str:
        """What tells files apart: the first digits of the SHA-256."""
        return self.record.sha256[:12]


def opened(path: str | os.PathLike[str], largest: int, threads: int) -> Model:
    """The file `path`, which has predicted once for each of the batch sizes that it is to be called with.

    Args:
      path: a file that was exported, with its record beside it.
      largest: the largest number of rows of a call.
      threads: how many threads of ONNX Runtime predict.

    Raises InputError where the file or its record is missing, damaged or not ours, where its runtime is not installed,
    and where it does not give what its record says.
    """
    before, content, found = stamp(path), read(path), record.load(path)
    record.require_same(found, content, path)
    predict = sized(_runtime(found.format, content, path, threads), sizes(found, largest))
    for rows in sizes(found, largest) or (1, largest):
        _require_outputs(found, predict([_zeros(each, rows) for each in found.inputs]), rows, path)
    return Model(found, predict, before)


def taken_over(old: Model, path: str | os.PathLike[str], largest: int, threads: int) -> Model:
    """The file that has taken the place of the one of `old`.

    Raises InputError as `opened` does, and where requests for the old file would not be requests for the new one.
    """
    new = opened(path, largest, threads)
    found, expected = (_takes(model.record) for model in (new, old))
    if found != expected:
        raise InputError(f"{path} takes {found}, expected {expected} as before; serve it by a process of its own")
    return new


def _takes(found: Record) -> str:
    """What a request has to be."""
    inputs = ", ".join(str(each._replace(shape=(None, *each.shape[1:]))) for each in found.inputs)
    rate = f" at {found.request.rate} Hz" if isinstance(found.request, record.Audio) else ""
    return f"{found.request.KIND} {inputs}{rate}"


def stamp(path: str | os.PathLike[str]) -> Stamp:
    """What changes when the file or its record is replaced or written to."""

    def of(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    return of(path), of(record.path_of(path))


def sizes(found: Record, largest: int) -> tuple[int, ...]:
    """The batch sizes that the file is called with; () for any.

    XLA compiles a program for each size, so that a StableHLO file is called with powers of two only.
    """
    fixed = found.inputs[0].shape[0]
    if fixed is not None:
        return (fixed,)
    if found.format != "stablehlo":
        return ()
    return tuple(2**i for i in range(1 + (largest - 1).bit_length()))


def sized(function: Callable[..., Any], sizes: Sequence[int]) -> Predict:
    """`function` for any number of rows, where it takes `sizes` only: the last row is repeated, and its answer cut off.

    More rows than the largest size are several calls. Without `sizes` the rows go to one call as they are.
    """
    if not sizes:
        return lambda inputs: record.leaves(function(*inputs))

    def predict(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows, parts = len(inputs[0]), []
        for start in range(0, rows, max(sizes)):
            part = [each[start : start + max(sizes)] for each in inputs]
            n = len(part[0])
            size = min(size for size in sizes if size >= n)
            padded = [np.concatenate([each, np.repeat(each[-1:], size - n, 0)]) for each in part]
            parts.append([each[:n] for each in record.leaves(function(*padded))])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    return predict


def _runtime(format: str, content: bytes, path: str | os.PathLike[str], threads: int) -> Callable[..., Any]:
    if format == "onnx":
        from dl_jax.export import onnx

        return onnx.opened(content, path, threads)
    if format == "litert":
        from dl_jax.export import litert

        return litert.opened(content, path)
    if format == "stablehlo":
        from dl_jax.export import stablehlo

        return stablehlo.opened(content, path)
    raise InputError(f"{path} has the format {format!r}, expected onnx, litert or stablehlo; export the model again")


def _zeros(each: Input, rows: int) -> np.ndarray:
    return np.zeros((rows, *(size or 1 for size in each.shape[1:])), each.dtype)


def _require_outputs(found: Record, outputs: Sequence[np.ndarray], rows: int, path: str | os.PathLike[str]) -> None:
    given = [Input(each.shape, each.dtype.name) for each in outputs]
    expected = [Input((rows, *each.shape[1:]), each.dtype) for each in found.outputs]
    if given != expected:
        raise InputError(
            f"{path} gives {', '.join(map(str, given))}, expected {', '.join(map(str, expected))} as its record says; "
            "write the record anew by export.record"
        )
