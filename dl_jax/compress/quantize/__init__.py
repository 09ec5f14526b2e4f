"""Quantisation to 1 to 8 bits: weights symmetric per output channel, activations on calibrated ranges.

    after training    {**variables, "params": dequantize(quantize(params, 8)), "ranges": calibrate(apply, ...)}
    in training       with_params(with_activations(loss, 8), fake(4)), with the ranges among the state's `extra`
    evaluation        with_activations(metric, 8)

`fake` and `with_activations` compute in floating point what integers would: x ≈ scale · (q − zero), with zero = 0 for
weights (Jacob et al. 2018, arXiv:1712.05877, sections 2.1 and 3; Krishnamoorthi 2018, arXiv:1806.08342, section 2).
`compress.integer` computes in integers. In training, `learned` finds the step sizes, and `binary` and `ternary` leave
two or three values of a weight.
"""

from dl_jax.compress.quantize.activations import (
    RANGES,
    Observer,
    Range,
    calibrate,
    least_error,
    percentile,
    rounded,
    with_activations,
)
from dl_jax.compress.quantize.axes import LayerWeights, layer_weights
from dl_jax.compress.quantize.binary import binary, stochastic_binary, ternary, with_stochastic_binary, within_one
from dl_jax.compress.quantize.learned import activation_steps, learned, learned_activations, stored, with_steps
from dl_jax.compress.quantize.trained import after_training, unpacked
from dl_jax.compress.quantize.weights import (
    Axes,
    Quantized,
    dequantize,
    fake,
    is_quantized,
    is_weight,
    last_axis,
    pack,
    quantize,
    require_bits,
    unpack,
)

__all__ = [
    "RANGES",
    "Axes",
    "LayerWeights",
    "Observer",
    "Quantized",
    "Range",
    "activation_steps",
    "after_training",
    "binary",
    "calibrate",
    "dequantize",
    "fake",
    "is_quantized",
    "is_weight",
    "last_axis",
    "layer_weights",
    "learned",
    "learned_activations",
    "least_error",
    "pack",
    "percentile",
    "quantize",
    "require_bits",
    "rounded",
    "stochastic_binary",
    "stored",
    "ternary",
    "unpack",
    "unpacked",
    "with_activations",
    "with_steps",
    "with_stochastic_binary",
    "within_one",
]
