"""Convolution and pooling, computed as matrix products and slices on CPUs and as XLA's own operations elsewhere.

XLA's CPU backend is slow at convolutions of few channels, at the gradients of any convolution inside `lax.scan`
(jax-ml/jax#12868), and at grouped convolutions, which a vmapped convolution becomes. Its matrix products are fast in
all of these cases. Its TPU backend takes minutes to compile the gradients of convolutions of few channels.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dl_jax.core.errors import require_positive

VECTOR = 16  # numbers that a CPU multiplies at once: multiply-adds pay where the maps are a multiple
FEW = (6, 16)  # most input channels and maps for blocks of pixels on a TPU; with 20 maps they would be slower
GROUP = 16  # most images whose depthwise weight gradient is computed at a time: 4 to 64 are about as fast
COPY = 150  # time to copy a number into a tile, in multiply-adds; the speed changes little around this value


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
    - for sequences with more channels than taps, a matrix product with patches.

    On a TPU, an image convolution of few channels and maps (FEW) without strides and dilation becomes a convolution of
    blocks of pixels. A train step with its gradients then compiles in seconds instead of minutes.

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
    few_channels = rhs.shape[-2] <= math.prod(rhs.shape[:-2])  # patches of such sequences cost more time than they save
    depthwise = lhs.ndim == 4 and rhs.shape[-2] == 1 < feature_group_count == lhs.shape[-1] == rhs.shape[-1]
    if (
        layout is None
        or dimension_numbers is None
        or lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        != lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout)
        or (feature_group_count != 1 and not depthwise)
        or any(dilation != 1 for dilation in lhs_dilation or ())
        or (few_channels and lhs.ndim == 3)
        or 0 in shape
    ):
        return convolve(lhs, rhs)
    dilation = tuple(rhs_dilation or (1,) * (lhs.ndim - 2))
    if isinstance(padding, str):
        spans = [(taps - 1) * step + 1 for taps, step in zip(rhs.shape[:-2], dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], spans, window_strides, padding)
    simple = {*window_strides, *dilation} == {1}
    window = Window(
        shape[1:-1], tuple(window_strides), tuple((low, high) for low, high in padding), dilation, precision
    )
    banded, shifted = (functools.partial(form, window=window) for form in (_banded_product, _shifted_products))
    if lhs.ndim == 3:
        on_cpu = functools.partial(_patch_product, window=window)
    elif depthwise:
        undilated = set(dilation) == {1}
        of_image = functools.partial(_of_image, _shifted_products, window=window) if undilated else shifted
        on_cpu = _bilinear(shifted, of_image, functools.partial(_in_groups, shifted))
    elif rhs.shape[:2] == (1, 1):
        on_cpu = functools.partial(_pixel_product, window=window)
    elif rhs.shape[2] == 1 and rhs.shape[3] % VECTOR == 0 and max(rhs.shape[:2]) <= 3:
        on_cpu = _bilinear(shifted, banded, banded)
    elif few_channels or not simple:
        on_cpu = _bilinear(banded, banded, banded)
    else:
        long = functools.partial(_longer, window=window)
        on_cpu = _bilinear(long, functools.partial(_of_image, _longer, window=window), banded)
    if lhs.ndim == 4 and not depthwise and rhs.shape[2] <= FEW[0] and rhs.shape[3] <= FEW[1] and simple:
        blocks = functools.partial(_block_convolution, window=window)
        return lax.platform_dependent(lhs, rhs, cpu=on_cpu, tpu=blocks, default=convolve)
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=convolve)


def matrix_product(x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """The product [..., D] of x [..., C] and a kernel [C, D], as one of two matrices.

    For x of more axes, XLA's CPU would write a transposed copy of the result's gradient.
    """
    rows = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=precision)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def dense_product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None) -> jax.Array:
    """`matrix_product`, with the signature that `nn.Dense(dot_general=)` asks for."""
    return matrix_product(x, kernel, precision)


Padding = Sequence[tuple[int, int]]  # before and after, for each spatial axis


class Window(NamedTuple):
    """What a convolution does along its spatial axes: one for sequences, rows and columns for images."""

    size: tuple[int, ...]  # of the result: T', or H' and W'
    strides: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]  # of the kernel
    precision: Any  # of the products


Convolution = Callable[[jax.Array, jax.Array], jax.Array]  # (image [B, H, W, C], kernel) -> [B, H', W', D]


def _bilinear(forward: Convolution, of_image: Convolution, of_kernel: Convolution) -> Convolution:
    """`forward`, with the derivatives of two other forms of the same convolution.

    Reverse-mode differentiation transposes these. What `of_kernel` makes of the image, such as patches, is computed in
    the backward pass, where it would otherwise be kept from the forward pass on.
    """

    @jax.custom_jvp
    def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return forward(image, kernel)

    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (image, kernel), (d_image, d_kernel) = primals, tangents
        is_zero = lambda tangent: isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        terms = [] if is_zero(d_image) else [of_image(d_image, kernel)]
        terms += [] if is_zero(d_kernel) else [jax.checkpoint(of_kernel, prevent_cse=False)(image, d_kernel)]
        return convolve(image, kernel), functools.reduce(operator.add, terms)

    convolve.defjvp(derivative, symbolic_zeros=True)
    return convolve


def _longer(
    image: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, C, D]
    window: Window,
) -> jax.Array:
    """A convolution without strides and dilation, [B, H', W', D], as the first rows of a longer result.

    Where the result is longer than the image, XLA takes a kernel of Eigen's, which uses all cores, instead of one that
    uses one core.
    """
    (low, high), columns = window.padding
    more = max(0, image.shape[1] + 1 - window.size[0])
    result = _convolution(image, kernel, ((low, high + more), columns), window.precision)
    return result[:, : window.size[0]]


def _convolution(image: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    """XLA's convolution of images without strides and dilation."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, (1, 1), padding, dimension_numbers=layout, precision=precision)


def _of_image(form: Callable[..., jax.Array], image: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """A convolution with an undilated kernel, written as the transpose of what its gradient is to be.

    The gradient is then computed by `form`, too, from the kernel turned round. With strides, zeros are put between the
    pixels of the result's gradient.
    """
    turned = kernel[::-1, ::-1]
    turned = turned.swapaxes(2, 3) if image.shape[-1] == kernel.shape[2] else turned  # not of a depthwise one
    spread = [(size - 1) * stride + 1 for size, stride in zip(window.size, window.strides, strict=True)]
    lows = [taps - 1 - low for taps, (low, _) in zip(kernel.shape[:2], window.padding, strict=True)]
    sides = zip(image.shape[1:3], kernel.shape[:2], spread, lows, strict=True)
    padding = tuple((low, size + taps - 1 - long - low) for size, taps, long, low in sides)
    simple = Window(image.shape[1:3], (1, 1), padding, (1, 1), window.precision)
    between = ((0, 0, 0), *((0, 0, stride - 1) for stride in window.strides), (0, 0, 0))

    def back(output: jax.Array) -> jax.Array:  # [B, H', W', D] -> [B, H, W, C]
        return form(lax.pad(output, jnp.zeros((), output.dtype), between), turned, simple)

    output = jax.ShapeDtypeStruct((len(image), *window.size, kernel.shape[3]), image.dtype)
    return jax.linear_transpose(back, output)(image)[0]


def _in_groups(form: Convolution, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same for a group of images after the other, so that what the weight gradient needs stays in the cache.

    A group has an image from each part of the batch, since the parts may lie on different devices.
    """
    size = max(n for n in range(1, GROUP + 1) if len(image) % n == 0)
    of_group = jax.checkpoint(form, prevent_cse=False)
    groups = image.reshape(size, -1, *image.shape[1:]).swapaxes(0, 1)
    result = lax.scan(lambda _, group: (None, of_group(group, kernel)), None, groups)[1].swapaxes(0, 1)
    return result.reshape(len(image), *result.shape[2:])


def _pixel_product(
    image: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [1, 1, C, D]
    window: Window,
) -> jax.Array:
    """A convolution with kernels of one pixel as a matrix product: [B, H', W', D]."""
    return matrix_product(_tap(image, (0, 0), window), kernel[0, 0], window.precision)


def _shifted_products(
    image: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, 1, D], where C is 1 or D
    window: Window,
) -> jax.Array:
    """A depthwise convolution, or one of a single channel, as a sum over the kernel's taps: [B, H', W', D]."""
    taps = np.ndindex(*kernel.shape[:2])
    products = [_tap(image, tap, window) * kernel[*tap, 0] for tap in taps]
    return functools.reduce(operator.add, products)


def _padded(image: jax.Array, padding: Padding) -> jax.Array:
    """`image` [B, ..., C] with zeros around its spatial axes, or without what a negative padding cuts off."""
    return lax.pad(
        image, jnp.zeros((), image.dtype), ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
    )


def _tap(image: jax.Array, tap: tuple[int, ...], window: Window) -> jax.Array:
    """The pixels [B, H', W', C] that meet a tap of the kernel."""
    image = _padded(image, window.padding)
    top, left = (i * step for i, step in zip(tap, window.dilation, strict=True))
    (height, width), (down, right) = window.size, window.strides
    return image[:, top : top + (height - 1) * down + 1 : down, left : left + (width - 1) * right + 1 : right]


def _block_convolution(
    image: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, C, D]
    window: Window,
) -> jax.Array:
    """A convolution of images as one of blocks of n neighbouring pixels of a row: [B, H', W', D].

    A block is a pixel of n * C channels, and n outputs are one of n * D maps. In the weight gradient the window is as
    large as the output, which makes it slow to compile; with blocks it is n times narrower. The wider channels fill
    more of the matrix unit, but the kernel gets zeros that are multiplied.
    """
    kh, kw, channels, maps = kernel.shape
    n, width, (rows, (left, right)) = 4 if channels == 1 else 2, window.size[1], window.padding
    outputs, taps = math.ceil(width / n), math.ceil((kw - 1) / n) + 1  # in blocks
    blocks = outputs + taps - 1
    overhang = blocks * n - image.shape[2] - left - right  # pixels of the last block beyond the image
    image = _padded(image, (rows, (left, right + overhang)))

    place = np.zeros((kw, taps * n, n), kernel.dtype)  # 1 where a tap of an output falls on a pixel
    for tap, output in np.ndindex(kw, n):
        place[tap, output + tap, output] = 1
    wide = jnp.einsum("ijcd,jwo->iwcod", kernel, place, precision="highest")
    wide = wide.reshape(kh, taps, n * channels, n * maps)
    image = image.reshape(*image.shape[:2], blocks, n * channels)
    product = _convolution(image, wide, ((0, 0), (0, 0)), window.precision)
    return product.reshape(*product.shape[:2], outputs * n, maps)[:, :, :width]


def _patch_product(
    sequence: jax.Array,  # [B, T, C]
    kernel: jax.Array,  # [k, C, D]
    window: Window,
) -> jax.Array:
    """A convolution of sequences as one matrix product of patches and kernel: [B, T', D].

    The patch of an output is the k inputs [k C] that it depends on.
    """
    sequence, (size,), (stride,), (step,) = (
        _padded(sequence, window.padding),
        window.size,
        window.strides,
        window.dilation,
    )
    reach = (size - 1) * stride + 1
    firsts = [tap * step for tap in range(len(kernel))]
    patches = jnp.concatenate([sequence[:, first : first + reach : stride] for first in firsts], -1)  # [B, T', k C]
    return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), precision=window.precision)


def _banded_product(
    image: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, C, D]
    window: Window,
) -> jax.Array:
    """A convolution of images as one matrix product with a banded matrix: [B, H', W', D].

    A tile holds the pixels that some neighbouring outputs of one row depend on: kh rows of `columns` pixels. Its
    product with a band matrix [kh * columns * C, outputs * D], in which the kernel is repeated, gives all of these
    outputs. The band also has zeros that are multiplied, but a wide product runs at full speed, and far fewer numbers
    are copied than with one patch per output.
    """
    (height, width), strides, (above, (left, right)), dilation, precision = window
    (kh, kw, channels, maps), batch = kernel.shape, image.shape[0]

    def pixels(outputs: int) -> int:
        return (outputs - 1) * strides[1] + (kw - 1) * dilation[1] + 1

    def cost(outputs: int) -> int:
        return math.ceil(width / outputs) * pixels(outputs) * (outputs * maps + COPY)

    outputs = min(range(1, width + 1), key=cost)
    columns, tiles = pixels(outputs), math.ceil(width / outputs)
    lefts = [tile * outputs * strides[1] for tile in range(tiles)]
    overhang = lefts[-1] + columns - image.shape[2] - left - right  # pixels of the last tile beyond the image
    image = _padded(image, (above, (left, right + overhang)))
    rows = jnp.stack([image[:, :, first : first + columns] for first in lefts], 2).reshape(*image.shape[:2], tiles, -1)
    reach = (height - 1) * strides[0] + 1
    tops = [tap * dilation[0] for tap in range(kh)]
    patches = jnp.stack([rows[:, top : top + reach : strides[0]] for top in tops], 3)  # [B, H', tiles, kh, columns * C]

    place = np.zeros((kw, columns, outputs), kernel.dtype)  # 1 where a tap of an output falls on a column
    for tap in range(kw):
        for output in range(outputs):
            place[tap, output * strides[1] + tap * dilation[1], output] = 1
    band = jnp.einsum("ijcd,jwo->iwcod", kernel, place, precision="highest")
    product = jnp.matmul(
        patches.reshape(batch * height * tiles, kh * columns * channels),
        band.reshape(kh * columns * channels, outputs * maps),
        precision=precision,
    )
    return product.reshape(batch, height, tiles * outputs, maps)[:, :, :width]


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
    return _pool(jnp.maximum, image, window, stride)


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
