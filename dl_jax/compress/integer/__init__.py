"""A quantised network in integer arithmetic alone: Jacob et al. 2018, arXiv:1712.05877, section 2.

Activations and weights are int8, sums int32, and what rescales a sum to the integers of the next layer is a fixed-point
multiplier m · 2^-n: a multiplication and a shift. `integer_only` derives this from the trace of a model; `simulated`
computes the same in real numbers, and the two are equal bit for bit. Real numbers are left in two places: the input is
rounded to integers, and the integers of the result are multiplied by their scale.
"""

from dl_jax.compress.integer.integers import integer_only
from dl_jax.compress.integer.reals import simulated

__all__ = ["integer_only", "simulated"]
