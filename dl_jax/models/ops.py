"""Convolution and pooling, computed as matrix products and slices on CPUs and as XLA's own operations elsewhere.

XLA's CPU backend is slow at convolutions of few channels, at the gradients of any convolution inside `lax.scan`
(jax-ml/jax#12868), and at grouped convolutions, which a vmapped convolution becomes. Its matrix products are fast in
all of these cases. Its TPU backend takes minutes to compile the gradients of convolutions of few channels.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dl_jax.core.errors import require_positive
from dl_jax.models import products

VECTOR = 16  # numbers that a CPU multiplies at once: multiply-adds pay where the maps are a multiple
FEW = (6, 16)  # most input channels and maps for blocks of pixels on a TPU; with 20 maps they would be slower


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """`lax.conv_general_dilated` with the same arguments and result, for `nn.Conv(conv_general_dilated=...)`.

    On a CPU, a plain convolution of images (NHWC, HWIO) or sequences (NWC, WIO) is computed by the fastest of these
    forms, as measured for each kind of shape alone, under `jax.vmap` over kernels, and in a loop:

    - with kernels of one pixel, a matrix product;
    - depthwise, a sum of shifted products;
    - with one input channel, up to 3 x 3 taps and a multiple of 16 maps, multiply-adds, whose gradients are banded
      matrix products;
    - with at most as many input channels as the kernel has taps, or with strides or dilation, a banded matrix product;
    - with more, XLA's convolution in a form that uses all cores, also for the gradient of the image; the gradient of
      the kernel is a banded matrix product;
    - for sequences with more channels than taps, a matrix product with patches; with fewer, as for images of one row.

    On a TPU, an image convolution of few channels and maps (FEW) without strides and dilation becomes a convolution of
    blocks of pixels. A train step with its gradients then compiles in seconds instead of minutes. What comes before a
    strided convolution of more than one pixel is not fused with it there: libtpu 0.0.42 overflows its stack when it
    compiles a batch normalisation of 56 x 56 pixels and 128 maps into one for a v6e.

    Every other convolution, and every convolution on another platform, is lowered unchanged. A non-finite input may
    spread to its neighbours in its image.
    """
    convolve = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
    )
    shape = jax.eval_shape(convolve, lhs, rhs).shape
    layout = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}.get(lhs.ndim)
    few_channels = rhs.shape[-2] <= math.prod(rhs.shape[:-2])
    depthwise = lhs.ndim == 4 and rhs.shape[-2] == 1 < feature_group_count == lhs.shape[-1] == rhs.shape[-1]
    if (
        layout is None
        or dimension_numbers is None
        or lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        != lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout)
        or (feature_group_count != 1 and not depthwise)
        or any(dilation != 1 for dilation in lhs_dilation or ())
        or 0 in shape
    ):
        return convolve(lhs, rhs)
    dilation = tuple(rhs_dilation or (1,) * (lhs.ndim - 2))
    if isinstance(padding, str):
        spans = [(taps - 1) * step + 1 for taps, step in zip(rhs.shape[:-2], dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], spans, window_strides, padding)
    simple = {*window_strides, *dilation} == {1}
    window = products.Window(
        shape[1:-1], tuple(window_strides), tuple((low, high) for low, high in padding), dilation, precision
    )
    banded, shifted = (
        functools.partial(form, window=window) for form in (products.banded_product, products.shifted_products)
    )
    if lhs.ndim == 3 and few_channels:
        on_cpu = products.bilinear(*[functools.partial(products.one_row, products.banded_product, window=window)] * 3)
    elif lhs.ndim == 3:
        on_cpu = functools.partial(products.patch_product, window=window)
    elif depthwise:
        undilated = set(dilation) == {1}
        of_image = (
            functools.partial(products.of_image, products.shifted_products, window=window) if undilated else shifted
        )
        on_cpu = products.bilinear(shifted, of_image, functools.partial(products.in_groups, shifted))
    elif rhs.shape[:2] == (1, 1):
        on_cpu = functools.partial(products.pixel_product, window=window)
    elif rhs.shape[2] == 1 and rhs.shape[3] % VECTOR == 0 and max(rhs.shape[:2]) <= 3:
        on_cpu = products.bilinear(shifted, banded, banded)
    elif few_channels or not simple:
        on_cpu = products.bilinear(banded, banded, banded)
    else:
        long = functools.partial(products.longer, window=window)
        on_cpu = products.bilinear(long, functools.partial(products.of_image, products.longer, window=window), banded)
    on_tpu = convolve
    if lhs.ndim == 4 and not depthwise and rhs.shape[2] <= FEW[0] and rhs.shape[3] <= FEW[1] and simple:
        on_tpu = functools.partial(products.block_convolution, window=window)
    elif lhs.ndim == 4 and max(window_strides) > 1 and math.prod(rhs.shape[:2]) > 1:
        on_tpu = lambda image, kernel: convolve(lax.optimization_barrier(image), kernel)
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, tpu=on_tpu, default=convolve)


def dense_product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None) -> jax.Array:
    """`products.matrix_product`, with the signature that `nn.Dense(dot_general=)` asks for."""
    return products.matrix_product(x, kernel, precision)


def max_pool(image: jax.Array, window: int, stride: int | None = None, padding: int = 0) -> jax.Array:
    """The maximum over square windows, by default next to each other: [B, H, W, C] -> [B, H', W', C].

    H' is (H + 2 * padding - window) // stride + 1: rows and columns that fill no window are left out. Equal maxima
    share the gradient. On a CPU, the gradient of `nn.max_pool`, a select-and-scatter, takes 3 to 6 times longer.
    Raises InputError for a window or a stride below 1.
    """
    stride = window if stride is None else stride
    require_positive({"window": window, "stride": stride})
    if padding:
        lowest = -jnp.inf if jnp.issubdtype(image.dtype, jnp.floating) else jnp.iinfo(image.dtype).min
        edges = ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0))
        image = lax.pad(image, jnp.asarray(lowest, image.dtype), edges)
    return _max_pool(window, stride, image)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _max_pool(window: int, stride: int, image: jax.Array) -> jax.Array:
    """Maxima of slices on a CPU, XLA's own windows elsewhere and in exported files; the gradient is that of slices."""
    sides, strides = (1, window, window, 1), (1, stride, stride, 1)
    lowest = -jnp.inf if jnp.issubdtype(image.dtype, jnp.floating) else jnp.iinfo(image.dtype).min
    return lax.platform_dependent(
        image,
        cpu=functools.partial(_pool, jnp.maximum, window=window, stride=stride),
        default=lambda image: lax.reduce_window(image, image.dtype.type(lowest), lax.max, sides, strides, "VALID"),
    )


@_max_pool.defjvp
def _max_of_slices(
    window: int, stride: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(functools.partial(_pool, jnp.maximum, window=window, stride=stride), primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def max_over(x: jax.Array, axis: int) -> jax.Array:
    """`x.max(axis)`, whose gradient goes to the first of the largest values.

    JAX's own gradient looks for the values that equal the maximum. XLA may compute the values anew for that, rounded
    otherwise than the maximum was, and then finds none: the gradient is lost. It was seen on a CPU after a
    normalisation, without most of XLA's optimisations.
    """
    return x.max(axis)


@max_over.defjvp
def _max_at_one_place(axis: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    axis %= x.ndim
    first = jnp.expand_dims(lax.argmax(x, axis, jnp.int32), axis)
    places = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return max_over(x, axis), jnp.where(places == first, tangent, 0).sum(axis)


def sum_pool(image: jax.Array, window: int) -> jax.Array:
    """The sum over non-overlapping square windows: [B, H, W, C] -> [B, H // window, W // window, C].

    Rows and columns that fill no window are left out. A TPU gets XLA's own windows.
    """
    return lax.platform_dependent(
        image,
        tpu=functools.partial(_window_sum, window=window),
        default=functools.partial(_slice_sum, window),
    )


def _window_sum(image: jax.Array, window: int) -> jax.Array:
    sides = (1, window, window, 1)
    return lax.reduce_window(image, image.dtype.type(0), lax.add, sides, sides, "VALID")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _slice_sum(window: int, image: jax.Array) -> jax.Array:
    """Sums of slices, which are faster than sums over axes; the gradient of those is faster: it repeats pixels."""
    return _pool(operator.add, image, window, window)


@_slice_sum.defjvp
def _axis_sum(window: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (image,), (tangent,) = primals, tangents
    batch, height, width, channels = image.shape
    rows, columns = height // window, width // window
    tangent = tangent[:, : rows * window, : columns * window]
    blocks = tangent.reshape(batch, rows, window, columns, window, channels)
    return _slice_sum(window, image), blocks.sum((2, 4))


def _pool(combine: Callable[[Any, Any], Any], image: jax.Array, window: int, stride: int) -> jax.Array:
    for axis in (1, 2):
        n = max(0, (image.shape[axis] - window) // stride + 1)
        reach = (n - 1) * stride + 1 if n else 0
        # Slices: indexing becomes a gather where the batch size is unknown, as in an exported file.
        starts = range(window) if n else [0]
        taps = [lax.slice_in_dim(image, i, i + reach, stride, axis) for i in starts]
        image = functools.reduce(combine, taps)
    return image
