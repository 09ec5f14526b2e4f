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
import numpy as np
from jax import lax

FEW = (6, 16)  # most input channels and maps for blocks of pixels on a TPU; with 20 maps they would be slower
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

    On a CPU, a plain image convolution (NHWC, HWIO) becomes a banded matrix product. A forward and backward pass is
    then 1.1 to 3 times faster if there are no more input channels than the kernel has taps, and 0.9 to 1.5 times as
    fast if there are more. A plain convolution of sequences (NWC, WIO) with more input channels than taps becomes a
    matrix product with patches. This is 1.3 to 2.7 times faster when vmapped over kernels, 20 times faster inside a
    scan, and 0.6 to 1.7 times as fast otherwise.

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
    if (
        layout is None
        or dimension_numbers is None
        or lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        != lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout)
        or feature_group_count != 1
        or any(dilation != 1 for dilation in lhs_dilation or ())
        or (few_channels and lhs.ndim == 3)
        or 0 in shape
    ):
        return convolve(lhs, rhs)
    dilation = tuple(rhs_dilation or (1,) * (lhs.ndim - 2))
    if isinstance(padding, str):
        window = [(taps - 1) * step + 1 for taps, step in zip(rhs.shape[:-2], dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], window, window_strides, padding)
    products = functools.partial(
        _banded_product if lhs.ndim == 4 else _patch_product,
        size=shape[1:-1],
        strides=window_strides,
        padding=padding,
        dilation=dilation,
        precision=precision,
    )
    if lhs.ndim == 4 and rhs.shape[2] <= FEW[0] and rhs.shape[3] <= FEW[1] and {*window_strides, *dilation} == {1}:
        blocks = functools.partial(_block_convolution, width=shape[2], padding=padding, precision=precision)
        return lax.platform_dependent(lhs, rhs, cpu=products, tpu=blocks, default=convolve)
    return lax.platform_dependent(lhs, rhs, cpu=products, default=convolve)


def _block_convolution(
    image: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, C, D]
    *,
    width: int,  # W'
    padding: Sequence[tuple[int, int]],
    precision: Any,
) -> jax.Array:
    """A convolution of images as one of blocks of n neighbouring pixels of a row: [B, H', W', D].

    A block is a pixel of n * C channels, and n outputs are one of n * D maps. In the weight gradient the window is as
    large as the output, which makes it slow to compile; with blocks it is n times narrower. The wider channels fill
    more of the matrix unit, but the kernel gets zeros that are multiplied.
    """
    kh, kw, channels, maps = kernel.shape
    n = 4 if channels == 1 else 2
    outputs, taps = math.ceil(width / n), math.ceil((kw - 1) / n) + 1  # in blocks
    blocks = outputs + taps - 1
    overhang = blocks * n - image.shape[2] - sum(padding[1])  # pixels of the last block beyond the image
    edges = ((0, 0, 0), (*padding[0], 0), (padding[1][0], padding[1][1] + overhang, 0), (0, 0, 0))
    image = lax.pad(image, jnp.zeros((), image.dtype), edges)

    place = np.zeros((kw, taps * n, n), kernel.dtype)  # 1 where a tap of an output falls on a pixel
    for tap, output in np.ndindex(kw, n):
        place[tap, output + tap, output] = 1
    wide = jnp.einsum("ijcd,jwo->iwcod", kernel, place, precision="highest")
    product = lax.conv_general_dilated(
        image.reshape(*image.shape[:2], blocks, n * channels),
        wide.reshape(kh, taps, n * channels, n * maps),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
    return product.reshape(*product.shape[:2], outputs * n, maps)[:, :, :width]


def _patch_product(
    sequence: jax.Array,  # [B, T, C]
    kernel: jax.Array,  # [k, C, D]
    *,
    size: Sequence[int],  # T'
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    precision: Any,
) -> jax.Array:
    """A convolution of sequences as one matrix product of patches and kernel: [B, T', D].

    The patch of an output is the k inputs [k C] that it depends on.
    """
    sequence = lax.pad(sequence, jnp.zeros((), sequence.dtype), ((0, 0, 0), (*padding[0], 0), (0, 0, 0)))
    reach = (size[0] - 1) * strides[0] + 1
    firsts = [tap * dilation[0] for tap in range(len(kernel))]
    patches = jnp.concatenate([sequence[:, first : first + reach : strides[0]] for first in firsts], -1)  # [B, T', k C]
    return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), precision=precision)


def _banded_product(
    image: jax.Array,  # [B, H, W, C]
    kernel: jax.Array,  # [kh, kw, C, D]
    *,
    size: Sequence[int],  # H', W'
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    precision: Any,
) -> jax.Array:
    """A convolution of images as one matrix product with a banded matrix: [B, H', W', D].

    A tile holds the pixels that some neighbouring outputs of one row depend on: kh rows of `columns` pixels. Its
    product with a band matrix [kh * columns * C, outputs * D], in which the kernel is repeated, gives all of these
    outputs. The band also has zeros that are multiplied, but a wide product runs at full speed, and far fewer numbers
    are copied than with one patch per output.
    """
    (height, width), (kh, kw, channels, maps), batch = size, kernel.shape, image.shape[0]

    def pixels(outputs: int) -> int:
        return (outputs - 1) * strides[1] + (kw - 1) * dilation[1] + 1

    def cost(outputs: int) -> int:
        return math.ceil(width / outputs) * pixels(outputs) * (outputs * maps + COPY)

    outputs = min(range(1, width + 1), key=cost)
    columns, tiles = pixels(outputs), math.ceil(width / outputs)
    lefts = [tile * outputs * strides[1] for tile in range(tiles)]
    overhang = lefts[-1] + columns - image.shape[2] - sum(padding[1])  # pixels of the last tile beyond the image
    edges = ((0, 0, 0), (*padding[0], 0), (padding[1][0], padding[1][1] + overhang, 0), (0, 0, 0))
    image = lax.pad(image, jnp.zeros((), image.dtype), edges)
    rows = jnp.stack([image[:, :, left : left + columns] for left in lefts], 2).reshape(*image.shape[:2], tiles, -1)
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


def max_pool(image: jax.Array, window: int) -> jax.Array:
    """The maximum over non-overlapping square windows: [B, H, W, C] -> [B, H // window, W // window, C].

    Rows and columns that fill no window are left out, and equal maxima share the gradient. The gradient of
    `nn.max_pool` is a select-and-scatter, which takes a CPU 3 to 6 times longer.
    """
    return _pool(jnp.maximum, image, window)


def sum_pool(image: jax.Array, window: int) -> jax.Array:
    """The sum over non-overlapping square windows: [B, H, W, C] -> [B, H // window, W // window, C].

    Rows and columns that fill no window are left out. A TPU gets XLA's own windows: the gradient of slices is a sum of
    padded images, which costs it more than the convolutions of LeNet-5.
    """
    slices = functools.partial(_pool, operator.add, window=window)
    return lax.platform_dependent(image, tpu=functools.partial(_window_sum, window=window), default=slices)


def _window_sum(image: jax.Array, window: int) -> jax.Array:
    sides = (1, window, window, 1)
    return lax.reduce_window(image, image.dtype.type(0), lax.add, sides, sides, "VALID")


def _pool(combine: Callable[[Any, Any], Any], image: jax.Array, window: int) -> jax.Array:
    for axis in (1, 2):
        end = image.shape[axis] // window * window
        # Slices: indexing becomes a gather where the batch size is unknown, as in an exported file.
        taps = [lax.slice_in_dim(image, min(i, end), end, window, axis) for i in range(window)]
        image = functools.reduce(combine, taps)
    return image
