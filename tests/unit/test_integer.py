"""A network in integers against its simulation in real numbers, bit for bit, and its multipliers against exact ones."""

import functools
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.compress import integer, quantize
from dl_jax.compress.integer import fixed
from dl_jax.core.errors import InputError
from dl_jax.models.vision import mobilenet

IMAGE = np.random.default_rng(0).random((16, 16, 16, 2), np.float32)


class LeNet(nn.Module):
    """LeNet-5's layers, narrow, with ReLU."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.max_pool(nn.relu(nn.Conv(4, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(12)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(3)(x)


class Shift(nn.Module):
    """What is left of a batch normalisation that is folded into the kernel before it."""

    @nn.compact
    def __call__(self, x):
        return x + self.param("bias", nn.initializers.zeros, x.shape[-1:])


def lenet(monkeypatch):
    return LeNet()


def mobile(monkeypatch):
    """Expansions, depthwise convolutions, a sum of two activations, ReLU6 and a mean over the pixels."""
    monkeypatch.setattr(mobilenet.layers, "batch_norm", lambda train, *, dtype, name: Shift(name=name))
    return mobilenet.MobileNetV2(groups=((1, 8, 1, 1), (2, 8, 2, 1)), last=12, classes=5, dropout=0.0)


def quantized(model, bits=8, image=IMAGE):
    rng = np.random.default_rng(1)
    normal = lambda leaf: rng.normal(size=leaf.shape) * (1.5 / np.sqrt(max(4, leaf.size // leaf.shape[-1])))
    draw = lambda leaf: np.float32(rng.random(leaf.shape) if leaf.ndim == 1 else normal(leaf))
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    variables, apply = jax.tree.map(draw, shapes), functools.partial(model.apply, train=False)
    for _, kernel in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if kernel.ndim > 1:
            kernel[..., 0] = 0  # as a pruned channel; what is left of it is its bias
    ranges = quantize.calibrate(apply, variables, [image[:8]])
    integers = jax.device_get(jax.jit(lambda params: quantize.quantize(params, bits))(variables["params"]))
    return apply, {**variables, "params": integers, "ranges": jax.device_get(ranges)}


@functools.cache
def lenet_quantized(bits=8):
    return quantized(LeNet(), bits)


@pytest.mark.parametrize(("build", "bits"), [(lenet, 8), (lenet, 3), (mobile, 8)])
def test_integers_equal_their_simulation_bit_for_bit(build, bits, monkeypatch):
    apply, variables = lenet_quantized(bits) if build is lenet else quantized(build(monkeypatch), bits)
    found = jax.jit(integer.integer_only(apply, variables, bits))(IMAGE)
    np.testing.assert_array_equal(found, integer.simulated(apply, variables, bits)(IMAGE))
    assert len(np.unique(found)) > 30


def test_integers_are_near_the_rounding_of_training():
    """What differs is the rounding of biases and of multipliers."""
    apply, variables = lenet_quantized()
    real = {**variables, "params": quantize.dequantize(variables["params"])}
    rounded = jax.jit(quantize.with_activations(apply, 8))(real, IMAGE)
    found = jax.jit(integer.integer_only(apply, variables))(IMAGE)
    assert abs(found - rounded).mean() < 0.002 * abs(rounded).max()


@pytest.mark.parametrize(("tiny", "bias"), [(1e-3, 0.5), (1e-5, 0.5), (1e-8, -0.5), (1e-30, 0.5), (1.0, 1e6)])
def test_a_bias_that_is_large_beside_the_weights_of_its_channel_is_kept(tiny, bias):
    """Whole steps of such weights would be more than an int32 holds; sums lose their last bits instead."""
    x, draw = np.random.default_rng(2).random((40, 8), np.float32), np.random.default_rng(3)
    model = Two()
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)["params"]
    params["Dense_0"]["kernel"][:, 3] *= tiny
    params["Dense_0"]["bias"][3] = bias
    apply, variables = functools.partial(model.apply, train=False), {"params": params}
    ranges = quantize.calibrate(apply, variables, [x])
    variables = jax.device_get({"params": quantize.quantize(params, 8), "ranges": ranges})
    found = jax.jit(integer.integer_only(apply, variables))(x)
    np.testing.assert_array_equal(found, integer.simulated(apply, variables)(x))
    real = {**variables, "params": quantize.dequantize(variables["params"])}
    rounded = jax.jit(quantize.with_activations(apply, 8))(real, x)
    steps = abs(found - rounded) / abs(rounded).max()
    assert steps.max() < 0.02
    assert steps.mean() < 0.002


def test_from_the_first_layer_to_the_last_there_are_integers_only():
    apply, variables = lenet_quantized()
    jaxpr = jax.make_jaxpr(integer.integer_only(apply, variables))(IMAGE)
    operations = [(e.primitive.name, [v.aval.dtype for v in e.invars], e.outvars[0].aval.dtype) for e in flat(jaxpr)]
    products = [i for i, (name, *_) in enumerate(operations) if name in ("dot_general", "conv_general_dilated")]
    assert [operations[i][1:] for i in products] == [([jnp.int8, jnp.int8], jnp.int32)] * 4
    for _, before, after in operations[products[0] : products[-1] + 1]:
        assert {np.dtype(each).kind for each in (*before, after)} <= {"i", "b"}
    assert max(np.dtype(after).itemsize for _, _, after in operations) == 4


def flat(closed):
    for equation in closed.jaxpr.eqns:
        bodies = [each for each in equation.params.values() if hasattr(each, "jaxpr")]
        yield from (e for body in bodies for e in flat(body)) if bodies else [equation]


def test_multipliers_are_those_of_the_fixed_point_numbers():
    """floor(v m 2^(left − n) + 1/2), in whole numbers of any size, and m to 15 bits."""
    rng = np.random.default_rng(3)
    numbers = np.concatenate([2.0 ** rng.uniform(-31, 3, 60), [1, 0.25, 0.5, 2**-17, 1 - 2**-40]])
    values = np.concatenate(
        [rng.integers(-(2**30), 2**30, 200), rng.integers(-300, 300, 200), [0, 2**31 - 1, 1 - 2**31]]
    )
    by = fixed.as_multiplier(numbers)
    for number, m, n, left in zip(numbers, *by, strict=True):
        exact = Fraction(int(m)) / 2 ** int(n - left)
        assert abs(float(exact / Fraction(number)) - 1) <= 2**-15
        # Sums that would leave int32 when they are shifted are limited, and leave any grid all the same.
        kept = (abs(values) < 2 ** (31 - int(left))) | (left == 0)
        found = fixed.multiplied(jnp.asarray(values, jnp.int32), fixed.Multiplier(m, n, left))
        expected = [(exact * int(v) + Fraction(1, 2)).__floor__() for v in values]
        np.testing.assert_array_equal(np.asarray(found)[kept], np.array(expected)[kept])
        assert (abs(np.asarray(found)[~kept]) > 256).all()
    assert int(fixed.multiplied(jnp.int32(1000), fixed.as_multiplier(np.float64(2.0**-50)))) == 0


def test_a_dense_layer_by_hand():
    """Jacob et al., equations 4 to 7, in NumPy's integers."""
    apply, variables = quantized(Two(), image=IMAGE[:, 0, 0])
    x, ranges = IMAGE[:, 0, 0], variables["ranges"]
    grid = lambda r: ((max(float(r.high), 0) - min(float(r.low), 0)) / 255, min(float(r.low), 0))
    (scale, low), (scale1, low1) = grid(ranges["Dense_0"]), grid(ranges["Dense_1"])
    first, second = (variables["params"][name] for name in ("Dense_0", "Dense_1"))
    q = np.clip(np.round(x / scale) + np.round(-low / scale), 0, 255).astype(np.int64) - int(np.round(-low / scale))
    scales = lambda layer: np.where((k := np.float64(layer["kernel"].scale[0])) > 0, k, k[k > 0].min())
    s = scale * scales(first)
    sums = np.maximum(q @ np.int64(first["kernel"].values) + np.round(first["bias"] / s).astype(np.int64), 0)
    q = np.clip(np.floor(sums * s / scale1 + 0.5), 0, 255).astype(np.int64)
    assert low1 == 0
    s = scale1 * scales(second)
    expected = (q @ np.int64(second["kernel"].values) + np.round(second["bias"] / s)) * s
    found = jax.jit(integer.integer_only(apply, variables))(x)
    step = s * np.abs(np.asarray(second["kernel"].values, np.int64)).sum(0)
    assert (abs(found - expected) <= step.max()).all()  # multipliers of 15 bits may round a sum to its neighbour
    assert np.mean(np.isclose(found, expected, rtol=1e-5)) > 0.9


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.RNN(nn.SimpleCell(3))(x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return nn.Dense(2)(nn.relu(x))


def test_what_has_no_integers_is_said():
    x = IMAGE[:, 0, 0]
    apply, variables = quantized(Two(), image=x)
    run = lambda apply, variables: jax.eval_shape(integer.integer_only(apply, variables), x)
    with pytest.raises(InputError, match="bits is 9, expected"):
        integer.integer_only(apply, variables, 9)
    with pytest.raises(InputError, match="bits is 0, expected"):
        integer.simulated(apply, variables, 0)
    with pytest.raises(InputError, match="no collection 'ranges', expected one; call"):
        run(apply, {"params": variables["params"]})
    with pytest.raises(InputError, match="layer 'Dense_1' has no range, expected one of Dense_0; calibrate this model"):
        run(apply, {**variables, "ranges": {"Dense_0": variables["ranges"]["Dense_0"]}})
    real = quantize.dequantize(variables["params"])
    with pytest.raises(InputError, match="weights of layer 'Dense_0' are not integers with one scale for each output"):
        run(
            apply,
            {
                **variables,
                "params": {
                    **real,
                    "Dense_0": {**real["Dense_0"], "kernel": IMAGE[0, 0, :2, :1] + real["Dense_0"]["kernel"]},
                },
            },
        )
    apply, variables = quantized(Recurrent(), image=x[None])
    with pytest.raises(InputError, match=r"layer 'SimpleCell_0/.' is in a loop, expected feed-forward layers"):
        integer.integer_only(apply, variables)(x[None])
    apply, variables = quantized(Normed(), image=x)
    with pytest.raises(InputError, match=r"sub of int8 .* has no integer form, expected layers, .*; fold batch"):
        run(apply, variables)


def test_a_layer_of_one_output_may_lose_its_axis():
    class One(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.relu(nn.Dense(6)(x))
            return nn.Dense(1)(x)[:, 0]

    apply, variables = quantized(One(), image=np.random.default_rng(0).random((9, 5), np.float32))
    x = np.random.default_rng(4).random((7, 5), np.float32)
    found = jax.jit(integer.integer_only(apply, variables))(x)
    assert found.shape == (7,)
    np.testing.assert_array_equal(found, integer.simulated(apply, variables)(x))


def test_layers_of_half_precision_are_refused():
    image = np.random.default_rng(0).random((9, 5), np.float32)

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.relu(nn.Dense(6, dtype=jnp.bfloat16)(x))
            return nn.Dense(3, dtype=jnp.bfloat16)(x)

    apply, variables = quantized(Half(), image=image)
    with pytest.raises(InputError, match=r"^layer '.*' computes in bfloat16, expected float32"):
        integer.integer_only(apply, variables)(image)
