"""Every formulation equals the operation that it stands for, in values and derivatives: brute force, and XLA's."""

import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from jax.test_util import check_grads
from quick import jit

from dl_jax.core.errors import InputError
from dl_jax.models import layers, ops, products

LAYOUT = ("NHWC", "HWIO", "NHWC")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def value_and_gradients(convolve):
    """Gives the output and both gradients for a random cotangent."""

    def run(image, kernel):
        output, pullback = jax.vjp(convolve, image, kernel)
        return output, *pullback(jnp.asarray(draw(*output.shape, seed=2)))

    return run


def brute_force(image, kernel, strides, padding, dilation):
    """The same three by the definition, tap by tap and in float64."""
    sides, taps = image.shape[1:-1], kernel.shape[:-2]
    windows = [(k - 1) * step + 1 for k, step in zip(taps, dilation, strict=True)]
    if padding == "VALID":
        padding = [(0, 0)] * len(sides)
    elif padding == "SAME":
        rows = zip(sides, windows, strides, strict=True)
        totals = [max((-(-side // stride) - 1) * stride + window - side, 0) for side, window, stride in rows]
        padding = [(total // 2, total - total // 2) for total in totals]
    wide = [side + sum(pads) for side, pads in zip(sides, padding, strict=True)]
    rows = zip(wide, windows, strides, strict=True)
    size = [max((side - window) // stride + 1, 0) for side, window, stride in rows]
    output = np.zeros((len(image), *size, kernel.shape[-1]))
    cotangent = draw(*output.shape, seed=2).astype(np.float64)
    d_image, d_kernel = np.zeros(image.shape), np.zeros(kernel.shape)
    for place in itertools.product(*map(range, size)):
        for tap in itertools.product(*map(range, taps)):
            rows = zip(place, tap, strides, dilation, padding, strict=True)
            pixel = tuple(p * stride + t * step - pads[0] for p, t, stride, step, pads in rows)
            if all(0 <= at < side for at, side in zip(pixel, sides, strict=True)):
                seen, change = image[:, *pixel].astype(np.float64), cotangent[:, *place]
                output[:, *place] += seen @ kernel[tap]
                d_kernel[tap] += seen.T @ change
                d_image[:, *pixel] += change @ kernel[tap].T
    return output, d_image, d_kernel


def assert_close(actual, expected):
    """Compares arrays to 1e-5 of their largest number."""
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(abs(other).max(initial=1e-3)))


def assert_equals_brute_force(image, kernel, strides, padding, dilation, layout):
    arguments = (strides, padding, None, dilation, layout)
    found = jit(value_and_gradients(lambda x, w: ops.conv_general_dilated(x, w, *arguments)))(image, kernel)
    assert_close(found, brute_force(image, kernel, strides, padding, dilation or (1,) * len(strides)))


CONFIGURATIONS = {  # image, kernel, strides, padding, dilation
    "C1 of LeNet-5": ((3, 32, 32, 1), (5, 5, 1, 6), (1, 1), "VALID", None),
    "C3 of LeNet-5": ((3, 14, 14, 6), (5, 5, 6, 16), (1, 1), "VALID", None),
    "second of LeNetCaffe": ((2, 12, 12, 20), (5, 5, 20, 50), (1, 1), "VALID", (1, 1)),
    "colour stem": ((2, 17, 16, 3), (3, 3, 3, 8), (1, 1), "SAME", None),
    "strided stem": ((2, 23, 30, 3), (7, 7, 3, 4), (2, 2), "SAME", None),
    "strides differ": ((2, 12, 10, 2), (5, 3, 2, 5), (2, 1), "VALID", None),
    "dilated": ((2, 13, 12, 4), (2, 4, 4, 3), (1, 2), ((1, 2), (0, 3)), (2, 3)),
    "cropped": ((2, 9, 9, 2), (3, 3, 2, 3), (1, 1), ((-1, 0), (1, -2)), None),
    "pointwise": ((2, 5, 5, 1), (1, 1, 1, 4), (1, 1), "SAME", None),
    "pointwise, padded and strided": ((2, 6, 5, 3), (1, 1, 3, 4), (2, 3), ((1, 0), (-1, 2)), None),
    "many channels": ((2, 6, 6, 12), (3, 3, 12, 5), (1, 1), "SAME", None),
    "many channels, cropped": ((2, 7, 6, 12), (3, 2, 12, 5), (1, 1), ((-1, 4), (2, -1)), None),
    "many channels, strided": ((2, 7, 6, 12), (3, 3, 12, 5), (2, 2), "SAME", None),
    "one channel, many maps": ((2, 9, 8, 1), (3, 3, 1, 32), (1, 2), "SAME", None),
    "one channel, too many maps": ((2, 9, 8, 1), (5, 5, 1, 20), (1, 1), "VALID", None),
    "nothing comes out": ((2, 4, 4, 1), (5, 5, 1, 2), (1, 1), "VALID", None),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_convolution_equals_brute_force(name):
    image, kernel, *arguments = CONFIGURATIONS[name]
    assert_equals_brute_force(draw(*image), draw(*kernel, seed=1), *arguments, LAYOUT)


ANY = {  # of a convolution of images
    "size": st.tuples(st.integers(1, 11), st.integers(1, 11)),
    "taps": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    "strides": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 3)),
    "padding": st.sampled_from(["SAME", "VALID"]) | st.tuples(*[st.tuples(st.integers(-1, 3), st.integers(0, 3))] * 2),
}


@settings(deadline=None, max_examples=12, derandomize=True)
@given(**ANY)
def test_any_depthwise_convolution_equals_brute_force(size, taps, strides, dilation, padding):
    """It is a convolution whose kernel is zero between different channels."""
    channels = 3
    image, kernel = draw(2, *size, channels), draw(*taps, 1, channels, seed=1)
    settings = {"rhs_dilation": dilation, "dimension_numbers": LAYOUT, "feature_group_count": channels}
    convolve = lambda x, w: ops.conv_general_dilated(x, w, strides, padding, **settings)
    expected = brute_force(image, kernel * np.eye(channels, dtype=np.float32), strides, padding, dilation)
    output, d_image, d_kernel = expected
    own = d_kernel[:, :, np.arange(channels), np.arange(channels)][:, :, None]
    assert_close(jit(value_and_gradients(convolve))(image, kernel), (output, d_image, own))


@pytest.mark.parametrize("batch", [1, 17, 24])
def test_a_depthwise_gradient_is_the_sum_over_all_groups_of_images(batch):
    image, kernel = draw(batch, 4, 3, 2), draw(3, 3, 1, 2, seed=1)
    settings = {"dimension_numbers": LAYOUT, "feature_group_count": 2}
    own, xla = (
        jit(value_and_gradients(functools.partial(convolve, window_strides=(2, 1), padding="SAME", **settings)))
        for convolve in (ops.conv_general_dilated, lax.conv_general_dilated)
    )
    assert_close(own(image, kernel), xla(image, kernel))


def test_a_dense_layer_of_more_axes_equals_flax_and_contracts_one_axis():
    x = draw(3, 4, 5)
    own, flax = (Dense(2) for Dense in (layers.dense, nn.Dense))
    kernel = own.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, kernel) == jax.tree.map(jnp.shape, flax.init(jax.random.key(0), x))
    gradient = lambda model: jax.jit(jax.grad(lambda v, x: jnp.sin(model.apply(v, x)).sum(), (0, 1)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradient(own)(kernel, x),
        gradient(flax)(kernel, x),
    )
    contracted = re.findall(r"contracting_dims = \[(.*?)\]", gradient(own).lower(kernel, x).as_text())
    assert len(contracted) >= 3
    assert {len(axes.split(",")) for axes in contracted} == {1}


SEQUENCES = ("NWC", "WIO", "NWC")


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    size=st.integers(1, 14),
    taps=st.integers(1, 4),
    more=st.integers(-3, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.sampled_from(["SAME", "VALID"]) | st.tuples(st.tuples(st.integers(-1, 6), st.integers(-1, 3))),
)
def test_any_convolution_of_sequences_equals_brute_force(size, taps, more, stride, dilation, padding):
    channels = max(1, taps + more)
    sequence, kernel = draw(2, size, channels), draw(taps, channels, 3, seed=1)
    assert_equals_brute_force(sequence, kernel, (stride,), padding, (dilation,), SEQUENCES)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(maps=st.tuples(st.integers(1, 4), st.integers(1, 9)), **ANY)
def test_any_convolution_equals_brute_force(size, taps, maps, strides, dilation, padding):
    image, kernel = draw(2, *size, maps[0]), draw(*taps, *maps, seed=1)
    assert_equals_brute_force(image, kernel, strides, padding, dilation, LAYOUT)


@pytest.mark.parametrize("name", ["colour stem", "dilated"])
def test_brute_force_equals_xla(name):
    image, kernel, strides, padding, dilation = CONFIGURATIONS[name]
    image, kernel = draw(*image), draw(*kernel, seed=1)
    convolve = lambda x, w: lax.conv_general_dilated(
        x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=LAYOUT
    )
    found = jit(value_and_gradients(convolve))(image, kernel)
    assert_close(found, brute_force(image, kernel, strides, padding, dilation or (1, 1)))


def same(image, kernel):
    return ops.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


# Channels and maps for each form: few channels, many, and a single one.
channels_and_maps = pytest.mark.parametrize(("channels", "maps"), [(2, 4), (10, 2), (1, 16)])


@channels_and_maps
def test_convolution_against_finite_differences(channels, maps):
    arguments = draw(2, 4, 3, channels), draw(3, 3, channels, maps, seed=1)
    check_grads(jax.jit(same), arguments, order=2, modes=("fwd", "rev"), rtol=5e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("image", "kernel", "more"),
    [
        ((6, 6, 2), (3, 3, 2, 4), {}),
        ((6, 6, 10), (3, 3, 10, 2), {}),
        ((6, 6, 1), (3, 3, 1, 16), {}),
        ((5, 6, 3), (3, 3, 3, 4), {"window_strides": (2, 1), "rhs_dilation": (1, 2)}),
        ((5, 6, 3), (3, 3, 1, 3), {"window_strides": (2, 2), "feature_group_count": 3}),
        ((5, 6, 3), (3, 2, 1, 3), {"rhs_dilation": (2, 1), "feature_group_count": 3}),
        ((5, 6, 3), (1, 1, 3, 4), {"window_strides": (2, 2)}),
        ((9, 7), (3, 7, 4), {"window_strides": (1,), "rhs_dilation": (2,), "dimension_numbers": SEQUENCES}),
        ((21, 1), (8, 1, 4), {"window_strides": (4,), "dimension_numbers": SEQUENCES}),
    ],
)
def test_vmapped_convolution_equals_one_by_one(image, kernel, more):
    images, kernels = draw(3, 2, *image), draw(3, *kernel, seed=1)
    given = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT, **more}
    run = value_and_gradients(lambda x, w: ops.conv_general_dilated(x, w, **given))
    alone = jit(run)
    members = [alone(image, kernel) for image, kernel in zip(images, kernels, strict=True)]
    assert_close(jit(jax.vmap(run))(images, kernels), jax.tree.map(lambda *rows: np.stack(rows), *members))


@channels_and_maps
def test_scanned_convolution_equals_one_by_one(channels, maps):
    images, kernel = draw(3, 2, 6, 6, channels), draw(3, 3, channels, maps, seed=1)
    gradient = jax.grad(lambda w, x: (same(x, w) ** 2).sum())
    total = jit(lambda: lax.scan(lambda sum, x: (sum + gradient(kernel, x), None), 0 * kernel, images)[0])()
    alone = jit(gradient)
    assert_close(total, sum(alone(kernel, image) for image in images))


def forward_and_backward(image, kernel):
    return jax.vjp(same, image, kernel)[1](same(image, kernel))


IMAGES = jnp.ones((2, 6, 6, 2)), jnp.ones((3, 3, 2, 4))
DEEP = jnp.ones((2, 6, 6, 32)), jnp.ones((3, 3, 32, 4))  # more channels than taps


def causal(sequence, kernel):
    return ops.conv_general_dilated(sequence, kernel, (1,), ((4, 0),), rhs_dilation=(2,), dimension_numbers=SEQUENCES)


def causal_forward_and_backward(sequence, kernel):
    return jax.vjp(causal, sequence, kernel)[1](causal(sequence, kernel))


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    size=st.tuples(st.integers(5, 11), st.integers(5, 11)),
    taps=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    maps=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    padding=st.tuples(*[st.tuples(st.integers(-1, 3), st.integers(1, 3))] * 2),
)
def test_any_convolution_of_blocks_equals_brute_force(size, taps, maps, padding):
    image, kernel = draw(2, *size, maps[0]), draw(*taps, *maps, seed=1)
    sides = zip(size, padding, taps, strict=True)
    window = products.Window(tuple(n + sum(pads) - k + 1 for n, pads, k in sides), (1, 1), padding, (1, 1), None)
    blocks = lambda x, w: products.block_convolution(x, w, window)
    assert_close(jit(value_and_gradients(blocks))(image, kernel), brute_force(image, kernel, (1, 1), padding, (1, 1)))


def test_vmapped_convolution_of_blocks_equals_xla():
    images, kernels = draw(3, 2, 9, 8, 1), draw(3, 5, 5, 1, 4, seed=1)
    blocks = lambda x, w: products.block_convolution(
        x, w, products.Window((5, 4), (1, 1), ((0, 0), (0, 0)), (1, 1), None)
    )
    xla = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=LAYOUT)
    found, expected = (jit(jax.vmap(value_and_gradients(form)))(images, kernels) for form in (blocks, xla))
    assert_close(found, expected)


@pytest.mark.parametrize(("shape", "axis"), [((5, 9, 4), 1), ((7, 3), -1), ((2, 6, 5, 3), 2), ((4, 1), 1)])
def test_the_gradient_of_a_maximum_is_found_after_a_normalisation(shape, axis):
    """The program may compute what it normalises twice, and rounds it otherwise the second time."""
    x, outer = draw(*shape), draw(*np.delete(shape, axis), seed=1)

    def loss(x, maximum):
        y = (x - x.mean(0)) * lax.rsqrt(x.var(0) + 1e-5) * 1.3
        return (jnp.tanh(maximum(y)) * outer).sum()

    with jax.enable_x64(True):
        expected = jax.grad(loss)(x.astype(np.float64), lambda y: y.max(axis))
    found = jit(jax.grad(functools.partial(loss, maximum=lambda y: ops.max_over(y, axis))))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_the_first_of_equal_maxima_has_the_gradient():
    x = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -jnp.inf], [2.0, jnp.nan, 5.0]])
    value, back = jax.vjp(lambda x: ops.max_over(x, 1), x)
    np.testing.assert_array_equal(value, [3, -np.inf, np.nan])
    np.testing.assert_array_equal(back(jnp.array([2.0, 3.0, 4.0]))[0], [[0, 2, 0], [3, 0, 0], [0, 4, 0]])
    check_grads(functools.partial(ops.max_over, axis=0), (draw(4, 3),), order=2, modes=("fwd", "rev"))


def depthwise_forward_and_backward(image, kernel):
    settings = {"dimension_numbers": LAYOUT, "feature_group_count": image.shape[-1]}
    convolve = lambda x, w: ops.conv_general_dilated(x, w, (2, 2), "SAME", **settings)
    return jax.vjp(convolve, image, kernel)[1](convolve(image, kernel))


lowered_as_products = [
    (forward_and_backward, IMAGES),
    (forward_and_backward, (jnp.ones((2, 6, 6, 1)), jnp.ones((3, 3, 1, 16)))),
    (forward_and_backward, (jnp.ones((2, 6, 6, 8)), jnp.ones((1, 1, 8, 4)))),
    (depthwise_forward_and_backward, (jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 1, 4)))),
    (causal_forward_and_backward, (jnp.ones((2, 9, 4)), jnp.ones((3, 4, 5)))),
    (causal_forward_and_backward, (jnp.ones((2, 9, 1)), jnp.ones((3, 1, 5)))),
]


def lowered(platform, function, arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("function", "arguments"), [*lowered_as_products, (forward_and_backward, DEEP)])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_convolutions(platform, function, arguments):
    text = lowered(platform, function, arguments)
    assert text.count("stablehlo.convolution") == 3  # forward, and one for each gradient
    few = function is forward_and_backward and arguments[1].shape[2] <= ops.FEW[0] and arguments[1].shape[:2] == (3, 3)
    blocks = platform == "tpu" and few  # products with constants lay the kernel out
    assert ("dot_general" in text) == blocks


def test_tpu_gets_blocks_for_few_channels_only():
    def gets_blocks(kernel, strides=(1, 1), dilation=(1, 1)):
        convolve = lambda x, w: ops.conv_general_dilated(x, w, strides, "SAME", None, dilation, LAYOUT)
        return "dot_general" in lowered("tpu", convolve, (jnp.ones((2, 9, 9, kernel[2])), jnp.ones(kernel)))

    assert gets_blocks((5, 5, 1, 6))
    assert gets_blocks((5, 5, 6, 16))
    assert not gets_blocks((5, 5, 1, 20))
    assert not gets_blocks((5, 5, 20, 50))
    assert not gets_blocks((3, 3, 3, 64))
    assert not gets_blocks((5, 5, 1, 6), strides=(2, 2))
    assert not gets_blocks((5, 5, 1, 6), dilation=(1, 2))


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_tpu_alone_fuses_nothing_with_a_strided_convolution_of_several_pixels(platform):
    def is_apart(size, stride):
        convolve = lambda x, w: ops.conv_general_dilated(2 * x, w, (stride, stride), "SAME", None, None, LAYOUT)
        return "optimization_barrier" in lowered(platform, convolve, (jnp.ones((1, 8, 8, 20)), jnp.ones(size)))

    assert is_apart((3, 3, 20, 20), 2) == (platform == "tpu")
    assert not is_apart((3, 3, 20, 20), 1)
    assert not is_apart((1, 1, 20, 20), 2)


@pytest.mark.parametrize(("function", "arguments"), lowered_as_products)
def test_cpu_gets_no_convolution_even_vmapped(function, arguments):
    assert "stablehlo.convolution" not in lowered("cpu", function, arguments)
    members = [jnp.stack([leaf, leaf]) for leaf in arguments]
    assert "stablehlo.convolution" not in lowered("cpu", jax.vmap(function), members)


def test_cpu_gets_convolutions_of_many_channels_in_the_one_layout_that_is_fast_in_loops():
    text = lowered("cpu", forward_and_backward, DEEP)
    found = re.findall(r"stablehlo\.convolution.*dim_numbers = (.*?), window", text)
    assert found == ["[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"] * 2  # forward, and the gradient of the image


def test_one_export_serves_all_platforms():
    image, kernel = draw(2, 6, 6, 2), draw(3, 3, 2, 4, seed=1)
    exported = jax.export.export(jax.jit(same), platforms=("cpu", "tpu"))(image, kernel)
    assert "stablehlo.convolution" in exported.mlir_module()
    assert_close(jit(exported.call)(image, kernel), brute_force(image, kernel, (1, 1), "SAME", (1, 1))[0])


@pytest.mark.parametrize(
    ("image", "kernel", "arguments"),
    [
        ((2, 6, 6, 4), (3, 3, 2, 4), {"dimension_numbers": LAYOUT, "feature_group_count": 2}),
        ((2, 6, 6, 4), (3, 3, 1, 8), {"dimension_numbers": LAYOUT, "feature_group_count": 4}),
        ((2, 6, 6, 2), (3, 3, 2, 4), {"dimension_numbers": LAYOUT, "lhs_dilation": (2, 2)}),
        ((2, 6, 4), (3, 1, 4), {"dimension_numbers": SEQUENCES, "feature_group_count": 4}),
        ((2, 4, 6), (5, 4, 3), {"dimension_numbers": ("NCW", "OIW", "NCW")}),
        ((2, 4, 4, 4, 9), (2, 2, 2, 9, 3), {"dimension_numbers": ("NWHDC", "WHDIO", "NWHDC")}),
        ((2, 2, 6, 6), (4, 2, 3, 3), {}),  # the default layout, NCHW
        ((2, 2, 6, 6), (4, 2, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    ],
)
def test_other_convolutions_are_left_alone(image, kernel, arguments):
    def run(convolve):
        dimensions = len(image) - 2
        return lambda x, w: convolve(x, w, (1,) * dimensions, ((1, 1),) * dimensions, **arguments)

    ours = jax.make_jaxpr(run(ops.conv_general_dilated))(jnp.ones(image), jnp.ones(kernel))
    assert str(ours) == str(jax.make_jaxpr(run(lax.conv_general_dilated))(jnp.ones(image), jnp.ones(kernel)))


@pytest.mark.parametrize("fields", [{}, {"strides": 2, "padding": 2}, {"padding": "CIRCULAR"}, {"kernel_dilation": 2}])
def test_it_goes_into_a_flax_convolution(fields):
    image, params = draw(2, 9, 8, 3), {"kernel": draw(3, 3, 3, 4, seed=1), "bias": draw(4, seed=2)}
    plain = nn.Conv(4, (3, 3), **fields)
    ours = nn.Conv(4, (3, 3), conv_general_dilated=ops.conv_general_dilated, **fields)
    assert_close(*jit(lambda params: [net.apply({"params": params}, image) for net in (ours, plain)])(params))


def test_half_precision_stays_half_precision():
    image, kernel = draw(2, 6, 6, 2), draw(3, 3, 2, 4, seed=1)
    half = jit(same)(image.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    exact, *_ = brute_force(
        *(leaf.astype(jnp.bfloat16).astype(np.float32) for leaf in (image, kernel)), (1, 1), "SAME", (1, 1)
    )
    np.testing.assert_allclose(half.astype(np.float32), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("shape", "window"), [((2, 8, 6, 3), 2), ((2, 7, 5, 1), 2), ((2, 9, 10, 4), 3), ((1, 4, 4, 2), 1)]
)
def test_pools_equal_flax(shape, window):
    sides = (window, window)
    pools = (
        lambda x: (ops.max_pool(x, window), ops.sum_pool(x, window)),
        lambda x: (nn.max_pool(x, sides, sides), nn.avg_pool(x, sides, sides) * window**2),
    )

    def run(image):
        for pool in pools:
            output, pullback = jax.vjp(pool, image)
            basis = [tuple(draw(*leaf.shape, seed=3) * (i == j) for j, leaf in enumerate(output)) for i in range(2)]
            yield output, [pullback(cotangent) for cotangent in basis]  # of the maximum alone, then of the sum

    assert_close(*jit(lambda image: list(run(image)))(draw(*shape)))


@pytest.mark.parametrize(("shape", "window"), [((2, 8, 6, 3), 2), ((2, 9, 10, 4), 3)])
def test_a_sum_over_windows_equals_one_of_slices(shape, window):
    assert "reduce_window" in lowered("tpu", lambda x: ops.sum_pool(x, window), (jnp.ones(shape),))
    forms = ops._window_sum, ops.sum_pool
    run = lambda form, image, like: (form(image, window), jax.grad(lambda x: (form(x, window) ** 2).sum())(like))
    assert_close(*jit(lambda *images: [run(form, *images) for form in forms])(draw(*shape), draw(*shape, seed=1)))


@pytest.mark.parametrize(
    ("shape", "window", "stride", "padding"),
    [((2, 8, 7, 3), 3, 2, 1), ((2, 6, 9, 2), 2, 1, 0), ((1, 9, 9, 2), 2, 3, 1), ((2, 5, 5, 1), 5, 2, 2)],
)
def test_overlapping_maxima_equal_flax(shape, window, stride, padding):
    image = draw(*shape)
    sides = (window,) * 2, (stride,) * 2, ((padding,) * 2,) * 2
    forms = lambda x: ops.max_pool(x, window, stride, padding), lambda x: nn.max_pool(x, *sides)
    run = lambda form, x: (form(x), jax.grad(lambda x: (form(x) ** 2).sum())(x))
    assert_close(*jit(lambda image: [run(form, image) for form in forms])(image))


def test_a_window_larger_than_the_image_gives_nothing():
    assert ops.max_pool(jnp.zeros((2, 3, 5, 1)), 4).shape == (2, 0, 1, 1)
    assert ops.sum_pool(jnp.zeros((2, 3, 5, 1)), 4).shape == (2, 0, 1, 1)


def test_an_overlapping_maximum_vmapped_equals_one_by_one_and_finite_differences():
    run = lambda x: ops.max_pool(x, 3, 2, 1)
    images = draw(3, 2, 5, 4, 2)
    assert_close(jit(jax.vmap(jax.grad(lambda x: (run(x) ** 2).sum())))(images), np.stack([
        jit(jax.grad(lambda x: (run(x) ** 2).sum()))(image) for image in images]))  # fmt: skip
    check_grads(jit(run), (images[0],), order=2, modes=("fwd", "rev"), rtol=5e-2, atol=1e-2, eps=1e-3)


@pytest.mark.parametrize("sizes", [(2, 0), (0, 1)])
def test_a_window_or_a_stride_of_nothing_is_refused(sizes):
    with pytest.raises(InputError, match=r"(stride|window) is 0"):
        ops.max_pool(jnp.zeros((1, 4, 4, 1)), *sizes)


def test_equal_maxima_share_the_gradient():
    gradient = jit(jax.grad(lambda x: ops.max_pool(x, 2).sum()))(np.zeros((1, 2, 2, 1), np.float32))
    np.testing.assert_array_equal(gradient, np.full((1, 2, 2, 1), 0.25))


STEP_FOR_A_SLICE = """
import resource

resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # seconds of processors, so that a busy machine changes nothing

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dl_jax import classify, losses, optim
from dl_jax.core.step import make_step, per_seed, start
from dl_jax.models.vision.lenet import LeNet5, map_loss

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
model, tx = LeNet5(), optim.clipped_sgd(0.01, 100, 0.9, 5.0, 0.05)


def loss(variables, batch, key):
    return map_loss(model.apply(variables, batch["image"], train=True), batch["label"], 10.0).mean(), ({}, {})


def placed(tree, *axes):
    put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
    return jax.tree.map(put, tree)


step = per_seed(make_step(losses.with_batch(loss, classify.unit), tx), one_by_one=True)
keys = jax.random.split(jax.random.key(0), 1)
state = jax.eval_shape(lambda keys: start(model, tx, keys, keys, jnp.zeros((1, 28, 28, 1))), keys)
image, label = np.broadcast_to(np.uint8(0), (1, 16384, 28, 28, 1)), np.broadcast_to(np.int32(0), (1, 16384))
batch = placed({"image": image, "label": label}, None, "data")
jax.jit(step).trace(placed(state), batch).lower(lowering_platforms=("tpu",)).compile()
"""


@pytest.mark.plan
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_train_step_of_lenet5_compiles_within_a_minute_for_a_slice():
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may be compiling too
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    command = [sys.executable, "-c", STEP_FOR_A_SLICE]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
