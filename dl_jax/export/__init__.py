"""Models as files that predict by themselves: parameters inside, any batch size, checked when opened and when called.

Each format exports `apply(variables, *inputs)`, a pure function such as
`lambda variables, image: model.apply(variables, image, train=False)`, from example inputs: arrays whose first axis is
the batch. Their other axes and their types are what the file takes from then on.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from dl_jax.errors import InputError


class Input(NamedTuple):
    """One array that a model takes."""

    shape: tuple[int | None, ...]  # None for the batch
    dtype: str  # numpy's name

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('batch' if size is None else str(size) for size in self.shape)}]"

    def fits(self, array: Any) -> bool:
        shape = np.shape(array)
        return (
            getattr(array, "dtype", None) == self.dtype
            and len(shape) == len(self.shape)
            and all(size == want or (want is None and size > 0) for size, want in zip(shape, self.shape, strict=True))
        )


def baked(apply: Callable[..., Any], variables: Any) -> Callable[..., Any]:
    """`apply` with `variables`, JAX's or NumPy's, as constants."""
    variables = jax.tree.map(jnp.asarray, variables)
    return lambda *inputs: apply(variables, *inputs)


def symbolic(inputs: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and types of the example `inputs` as JAX sees them, one symbol for the batch size of all.

    Raises InputError unless all have a first axis of one length.
    """
    rows = {np.shape(each)[:1] for each in inputs}
    if len(rows) != 1 or rows <= {(), (0,)}:
        shapes = ", ".join(str(np.shape(each)) for each in inputs) or "none"
        raise InputError(f"example inputs of shape {shapes}: expected arrays with the same batch as their first axis")
    (batch,) = jax.export.symbolic_shape("batch")
    return tuple(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in map(jax.typeof, inputs))


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
    """Writes the whole file or nothing. Raises InputError where it cannot be written."""
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
