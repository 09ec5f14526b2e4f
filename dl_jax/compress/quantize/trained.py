"""A trained model in integers: its ranges, its weights and its rounding, in one call."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dl_jax.compress.quantize.activations import RANGES, calibrate, with_activations
from dl_jax.compress.quantize.axes import layer_weights
from dl_jax.compress.quantize.weights import dequantize, quantize
from dl_jax.core.errors import InputError
from dl_jax.core.step import Tree

Apply = Callable[..., Any]


def after_training(
    apply: Apply, variables: Tree, batches: Iterable[Sequence[Any]], bits: int
) -> tuple[Apply, dict[str, Any]]:
    """The model with weights of `bits` bits and activations of 8: a function of its variables, which are integers.

    The ranges of the activations are those over `batches`, the inputs of one call `apply(variables, *inputs)` each. The
    weights are those that layers multiply with, each output channel on its own grid. The tables of embeddings, which
    none multiplies with, stay as they are: `quantize(params, bits, is_weight)` rounds them as well. Raises InputError
    for inputs that are no tuple or list, and as `calibrate`, `layer_weights` and `quantize` do.
    """
    named = [{"inputs": _inputs(each)} for each in batches]
    ranges = calibrate(lambda variables, batch: apply(variables, *batch["inputs"]), variables, named)
    params = quantize(variables["params"], bits, *layer_weights(apply, variables, *named[0]["inputs"]))
    return unpacked(with_activations(apply, 8)), {**variables, "params": params, RANGES: ranges}


def _inputs(given: Any) -> tuple[Any, ...]:
    if not isinstance(given, tuple | list):
        raise InputError(
            f"a batch is of type {type(given).__name__}, expected a tuple of the inputs of a call; give [(image,), ...]"
        )
    return tuple(given)


def unpacked(apply: Apply) -> Apply:
    """`apply` for variables whose weights are stored as integers; it computes in floats."""
    return lambda variables, *inputs: apply(dequantize(variables), *inputs)
