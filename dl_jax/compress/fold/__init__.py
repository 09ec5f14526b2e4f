"""Folds batch normalisation, and other constant scales and shifts, into the kernels beside them.

    left = fold.remaining(model.apply, variables, image, train=False)  # {layer: why it cannot be folded}
    apply, variables = fold.folded(model.apply, variables, image, train=False)

In evaluation, a normalisation with running statistics multiplies and shifts each channel by constants. After a dense
layer or a convolution y = x * K + b, this is s y + t = x * (s K) + (s b + t): another kernel and another bias (Jacob et
al. 2018, arXiv:1712.05877, section 3.2). Before one that does not pad, s folds into the channels that K takes.

Layers are found by the flow of data in the trace, not by names: a product of data and a parameter (dense, convolution,
depthwise, grouped or transposed), and a line of additions, multiplications and the like with values that depend on
variables and constants alone. A line ends where something else reads what is in it.
"""

from dl_jax.compress.fold.models import folded, remaining

__all__ = ["folded", "remaining"]
