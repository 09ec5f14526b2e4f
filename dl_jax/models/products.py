"""The forms of a convolution among which `ops.conv_general_dilated` chooses: most are products of matrices."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GROUP = 16  # most images whose depthwise weight gradient is computed at a time: 4 to 64 are about as fast
COPY = 150  # time to copy a number into a tile, in multiply-adds; the speed changes little around this value


def matrix_product(x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """The product [..., D] of x [..., C] and a kernel [C, D].

    On a CPU it is one of two matrices: XLA would write a transposed copy of the gradient of a result of more axes.
    Elsewhere x keeps its axes, because rows of matrices that are split over devices along any axis but the first would
    be gathered on all of them.
    """
    product = functools.partial(jnp.matmul, precision=precision)
    if x.ndim <= 2:
        return product(x, kernel)

    def of_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = product(x.reshape(-1, x.shape[-1]), kernel)
        return rows.reshape(*x.shape[:-1], kernel.shape[-1])

    return lax.platform_dependent(x, kernel, cpu=of_rows, default=product)


Padding = Sequence[tuple[int, int]]  # before and after, for each spatial axis


class Window(NamedTuple):
    """What a convolution does along its spatial axes: one for sequences, rows and columns for images."""

    size: tuple[int, ...]  # of the result: T', or H' and W'
    strides: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]  # of the kernel
    precision: Any  # of the products


Convolution = Callable[[jax.Array, jax.Array], jax.Array]  # (image [B, H, W, C], kernel) -> [B, H', W', D]


def bilinear(forward: Convolution, of_image: Convolution, of_kernel: Convolution) -> Convolution:
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


def longer(
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


def of_image(form: Callable[..., jax.Array], image: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
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


def in_groups(form: Convolution, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same for a group of images after the other, so that what the weight gradient needs stays in the cache.

    A group has an image from each part of the batch, since the parts may lie on different devices.
    """
    size = max(n for n in range(1, GROUP + 1) if len(image) % n == 0)
    of_group = jax.checkpoint(form, prevent_cse=False)
    groups = image.reshape(size, -1, *image.shape[1:]).swapaxes(0, 1)
    result = lax.scan(lambda _, group: (None, of_group(group, kernel)), None, groups)[1].swapaxes(0, 1)
    return result.reshape(len(image), *result.shape[2:])


def pixel_product(
    image: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [1, 1, C, D]
    window: Window,
) -> jax.Array:
    """A convolution with kernels of one pixel as a matrix product: [B, H', W', D]."""
    return matrix_product(_tap(image, (0, 0), window), kernel[0, 0], window.precision)


def shifted_products(
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


def block_convolution(
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

    wide = _band(kernel, taps * n, n)
    wide = wide.reshape(kh, taps, n * channels, n * maps)
    image = image.reshape(*image.shape[:2], blocks, n * channels)
    product = _convolution(image, wide, ((0, 0), (0, 0)), window.precision)
    return product.reshape(*product.shape[:2], outputs * n, maps)[:, :, :width]


def patch_product(
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


def one_row(
    form: Callable[..., jax.Array],
    sequence: jax.Array,  # [B, T, C]
    kernel: jax.Array,  # [k, C, D]
    window: Window,
) -> jax.Array:
    """A convolution of sequences, [B, T', D], by a form of a convolution of images: each is an image of one row."""
    (size,), (stride,), (padding,), (dilation,), precision = window
    rows = Window((1, size), (1, stride), ((0, 0), padding), (1, dilation), precision)
    return form(sequence[:, None], kernel[None], rows)[:, 0]


def banded_product(
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
    columns, tiles, step = pixels(outputs), math.ceil(width / outputs), outputs * strides[1]
    # A tile begins `step` pixels after the one before it, and reaches over the beginnings of the next `pieces` - 1.
    pieces = math.ceil(columns / step)
    overhang = (tiles + pieces - 1) * step - image.shape[2] - left - right  # pixels beyond the image
    image = _padded(image, (above, (left, right + overhang)))
    shape = (*image.shape[:2], tiles, step * channels)
    parts = [image[:, :, first * step : (first + tiles) * step].reshape(shape) for first in range(pieces)]
    parts[-1] = parts[-1][..., : (columns - (pieces - 1) * step) * channels]
    rows = jnp.concatenate(parts, 3)  # [B, H, tiles, columns * C]
    reach = (height - 1) * strides[0] + 1
    tops = [tap * dilation[0] for tap in range(kh)]
    patches = jnp.stack([rows[:, top : top + reach : strides[0]] for top in tops], 3)  # [B, H', tiles, kh, columns * C]

    band = _band(kernel, columns, outputs, strides[1], dilation[1])
    product = jnp.matmul(
        patches.reshape(batch * height * tiles, kh * columns * channels),
        band.reshape(kh * columns * channels, outputs * maps),
        precision=precision,
    )
    return product.reshape(batch, height, tiles * outputs, maps)[:, :, :width]


def _band(kernel: jax.Array, columns: int, outputs: int, stride: int = 1, dilation: int = 1) -> jax.Array:
    """A kernel [kh, kw, C, D] repeated for neighbouring outputs of a row: [kh, columns, C, outputs, D]."""
    place = np.zeros((kernel.shape[1], columns, outputs), kernel.dtype)  # 1 where a tap of an output falls on a column
    for tap, output in np.ndindex(kernel.shape[1], outputs):
        place[tap, output * stride + tap * dilation, output] = 1
    return jnp.einsum("ijcd,jwo->iwcod", kernel, place, precision="highest")
