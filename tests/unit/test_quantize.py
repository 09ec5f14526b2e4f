"""Quantisation: grids and gradients against their equations, integers against floats, ranges against NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dl_jax.compress import quantize
from dl_jax.compress.quantize import Quantized, Range, calibrate, dequantize, fake, rounded, with_activations
from dl_jax.core.errors import InputError
from dl_jax.core.step import init_state, make_step, per_seed
from dl_jax.inspect import inputs, with_inputs
from dl_jax.losses import with_params
from dl_jax.models.sequence.rnn import GRU, LSTM, VANILLA, SequenceClassifier
from dl_jax.models.vision.lenet import LeNet5, LeNetCaffe
from dl_jax.models.vision.mlp import MLP

BITS = (1, 2, 3, 8)  # without a zero, the smallest grid, the smallest that does not divide a byte, the largest
every_bits = pytest.mark.parametrize("bits", BITS)


def weights(seed: int = 0, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape or (20, 6)).astype(np.float32)


def faked(w: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(fake(bits)({"kernel": w})["kernel"])


def in_float64(w: np.ndarray, bits: int) -> np.ndarray:
    """The reference: the definition, channel by channel."""
    out = np.empty(w.shape, np.float64)
    for c in range(w.shape[-1]):
        channel = w[..., c].astype(np.float64)
        if bits == 1:
            out[..., c] = np.where(channel < 0, -1, 1) * abs(channel).mean()
            continue
        end = 2 ** (bits - 1) - 1
        scale = abs(channel).max() / end or 1.0
        out[..., c] = np.clip(np.round(channel / scale), -end, end) * scale
    return out


@every_bits
@pytest.mark.parametrize("shape", [(20, 6), (5, 5, 3, 8), (7, 1), (9,)])
def test_weights_against_the_definition(bits, shape):
    np.testing.assert_allclose(faked(weights(1, *shape), bits), in_float64(weights(1, *shape), bits), rtol=1e-6)


@every_bits
def test_integers_give_the_same_bits_as_fake_compiled_or_not(bits):
    params = {"a": {"kernel": weights(2), "bias": weights(3, 6)}, "b": {"kernel": weights(4, 3, 3, 2, 5)}}
    stored = quantize.quantize(params, bits)
    back, simulated = dequantize(stored), fake(bits)(params)
    jax.tree.map(np.testing.assert_array_equal, back, simulated)
    assert back["a"]["bias"] is params["a"]["bias"]
    kernel = stored["a"]["kernel"]
    assert (kernel.values.dtype, kernel.scale.dtype, kernel.scale.shape) == (jnp.int8, jnp.float32, (1, 6))
    ends = {-1, 1} if bits == 1 else set(range(1 - 2 ** (bits - 1), 2 ** (bits - 1)))
    assert set(np.unique(kernel.values)) <= ends
    if bits > 1:  # a mean has no fixed order of summation
        jax.tree.map(np.testing.assert_array_equal, jax.jit(fake(bits))(params), simulated)


@every_bits
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_invariants(bits, data):
    elements = st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
    w = data.draw(arrays(np.float32, (3, 2, 4), elements=elements))
    q = faked(w, bits)
    np.testing.assert_allclose(faked(q, bits), q, rtol=1e-6)
    np.testing.assert_array_equal(faked(4 * w, bits), 4 * q)
    flat = w.reshape(-1, w.shape[-1])
    for c in range(w.shape[-1]):  # a channel does not know of the others
        np.testing.assert_array_equal(faked(w[..., c : c + 1], bits), q[..., c : c + 1])
    if bits > 1:
        np.testing.assert_array_equal(faked(-w, bits), -q)
        np.testing.assert_array_equal(q[w == 0], 0)
        scale = abs(flat).max(0) / (2 ** (bits - 1) - 1)
        assert (abs(q - w) <= scale * (0.5 + 1e-5)).all()
        np.testing.assert_allclose(abs(q).max(tuple(range(w.ndim - 1))), abs(flat).max(0), rtol=1e-6)


def test_a_channel_of_zeros_stays():
    w = weights(5)
    w[:, 2] = 0
    for bits in BITS:
        np.testing.assert_array_equal(faked(w, bits)[:, 2], 0)


def test_pruned_weights_stay_zero_and_more_bits_are_nearer():
    w = weights(6, 50, 10)
    w[::2] = 0
    assert (faked(w, 4)[::2] == 0).all()
    distances = [np.square(faked(w, bits) - w).sum() for bits in range(2, 9)]
    assert distances == sorted(distances, reverse=True)


@every_bits
def test_the_gradient_of_the_weights_is_that_at_the_rounded_ones(bits):
    """Straight through: d loss(fake(w)) / dw = loss'(fake(w))."""
    params, batch = {"kernel": weights(7), "bias": weights(8, 6)}, weights(9, 4, 20)

    def loss(variables, batch, key):
        p = variables["params"]
        return (jnp.tanh(batch @ p["kernel"] + p["bias"]) ** 3).sum(), ({}, {})

    gradient = lambda loss, p: jax.grad(lambda p: loss({"params": p}, batch, None)[0])(p)
    found = gradient(with_params(loss, fake(bits)), params)
    jax.tree.map(np.testing.assert_array_equal, found, gradient(loss, fake(bits)(params)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@every_bits
def test_parameters_of_every_float_type(bits, dtype):
    """The grid is that of the weights as they are, in float32 or better; the gradient has the parameter's type."""
    with jax.enable_x64(dtype == jnp.float64):
        w = jnp.asarray(weights(11), dtype)
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        stored, simulated = quantize.quantize({"kernel": w}, bits), fake(bits)({"kernel": w})["kernel"]
        assert stored["kernel"].scale.dtype == simulated.dtype == wide
        np.testing.assert_array_equal(dequantize(stored)["kernel"], simulated)
        np.testing.assert_array_equal(simulated, fake(bits)({"kernel": w.astype(wide)})["kernel"])
        if dtype == jnp.float64:
            np.testing.assert_allclose(simulated, in_float64(np.asarray(w), bits), rtol=1e-14)
        factor = jnp.asarray(weights(12), dtype)
        gradient = jax.jit(jax.grad(lambda w: (fake(bits)({"kernel": w})["kernel"] * factor).sum()))(w)
        assert gradient.dtype == dtype
        np.testing.assert_array_equal(gradient, factor)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_network_of_low_precision_trains_on_both_roundings(dtype):
    model = nn.Dense(4, dtype=dtype, param_dtype=dtype)
    x = jnp.asarray(weights(13, 8, 5), dtype)
    variables = model.init(jax.random.key(0), x)
    variables = {**variables, "ranges": calibrate(model.apply, variables, [x])}
    assert variables["ranges"][""].high.dtype == jnp.float32
    loss = with_params(with_activations(lambda v, x, key: ((model.apply(v, x) ** 2).mean(), ({}, {})), 8), fake(8))
    state = init_state(jax.random.key(0), variables, optax.sgd(0.1))
    after, metrics = jax.jit(make_step(loss, optax.sgd(0.1)))(state, x)
    jax.tree.map(lambda new, old: new.dtype == old.dtype or pytest.fail("another type"), after.params, state.params)
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(after.params["kernel"], state.params["kernel"])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@every_bits
def test_a_channel_with_a_weight_that_is_not_finite_is_nan(bits, wrong, compiled):
    """Wherever it stands: XLA's maxima on a CPU pass over some NaN, and the cast of one to int8 is a number."""
    w = np.tile(weights(16)[:, :1], 20)
    w[np.arange(20), np.arange(20)] = wrong
    w = np.concatenate([w, weights(17, 20, 1)], 1)
    found = (jax.jit(fake(bits)) if compiled else fake(bits))({"kernel": w})["kernel"]
    assert not np.isfinite(found[:, :20]).any()
    assert np.isfinite(found[:, 20]).all()


def test_where_chooses():
    params = {"kernel": weights(), "bias": weights(1, 6)}
    all_of_them = fake(2, where=lambda path, leaf: True)(params)
    assert not np.array_equal(all_of_them["kernel"], params["kernel"])
    with pytest.raises(InputError, match="chooses none"):
        fake(2)({"bias": params["bias"]})


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(20, 6), (3,), (0, 4)])
def test_packed_integers_come_back(bits, shape):
    end = 2 ** (bits - 1) - 1
    values = np.random.default_rng(10).integers(-end, end, shape, np.int8, endpoint=True)
    values = np.where(values < 0, -1, 1).astype(np.int8) if bits == 1 else values
    packed = quantize.pack(values, bits)
    assert packed.dtype == np.uint8
    assert packed.nbytes == -(-values.size * bits // 8)
    back = quantize.unpack(packed, bits, shape)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, values)


def test_int4_is_two_to_a_byte_the_first_one_high():
    packed = quantize.pack(np.array([-7, 7, 0, 1, 3], np.int8), 4)
    np.testing.assert_array_equal(packed, [0x0E, 0x78, 0xA0])


def test_values_and_bytes_that_do_not_fit():
    with pytest.raises(InputError, match="values from -8 to 0, expected those of `quantize` with 4 bits"):
        quantize.pack(np.array([-8, 0], np.int8), 4)
    with pytest.raises(InputError, match="values from -1 to 0, expected those of `quantize` with 1 bits"):
        quantize.pack(np.array([-1, 0], np.int8), 1)
    with pytest.raises(InputError, match=r"\(3,\) bytes for 7 values of 4 bits"):
        quantize.unpack(np.zeros(3, np.uint8), 4, (7,))


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5])
@pytest.mark.parametrize(
    "use",
    [
        fake,
        lambda bits: quantize.quantize({"kernel": weights()}, bits),
        lambda bits: with_activations(print, bits),
        lambda bits: rounded(jnp.zeros(3), Range(jnp.float32(0), jnp.float32(1)), bits),
        lambda bits: quantize.pack(np.zeros(3, np.int8), bits),
        lambda bits: quantize.unpack(np.zeros(3, np.uint8), bits, (3,)),
    ],
)
def test_bits_outside_1_to_8(use, bits):
    with pytest.raises(InputError, match=f"bits is {bits}, expected a whole number from 1 to 8"):
        use(bits)


def test_bits_may_be_numpys():
    quantize.require_bits(np.int64(4))


SMALL = MLP(hidden=(12, 8))
IMAGE = np.random.default_rng(0).random((6, 28, 28, 1), np.float32)


def built(model, example=IMAGE):
    """Variables and apply. The weights are drawn with NumPy: to compile an initialisation would take longer."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: (rng.normal(size=leaf.shape) / np.sqrt(max(10, leaf.size // leaf.shape[-1]))).astype(np.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), example)
    return jax.tree.map(draw, shapes), lambda variables, image: model.apply(variables, image, train=False)


def test_layers_are_found_under_the_names_of_their_parameters():
    for model in (LeNet5(), LeNetCaffe(), SMALL):
        variables, apply = built(model)
        found = jax.eval_shape(inputs(apply), variables, IMAGE)
        assert set(found) == {name for name, layer in variables["params"].items() if "kernel" in layer}


def test_the_inputs_of_the_last_layer_give_the_logits():
    variables, apply = built(SMALL)
    (x,), last = jax.jit(inputs(apply))(variables, IMAGE)["Dense_2"], variables["params"]["Dense_2"]
    np.testing.assert_allclose(x @ last["kernel"] + last["bias"], apply(variables, IMAGE), rtol=1e-6)


def test_inputs_may_be_changed_and_the_model_is_left_alone():
    variables, apply = built(SMALL)
    before = apply(variables, IMAGE)
    np.testing.assert_array_equal(with_inputs(apply, lambda path, x: x)(variables, IMAGE), before)
    doubled = with_inputs(apply, lambda path, x: 2 * x if path == "Dense_0" else x)(variables, IMAGE)
    np.testing.assert_allclose(doubled, apply(variables, 2 * IMAGE), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(apply(variables, IMAGE), before)


def test_layers_of_a_model_that_was_compiled_before_are_found():
    variables, apply = built(SMALL)
    compiled = jax.jit(apply)
    compiled(variables, IMAGE)
    doubled = with_inputs(compiled, lambda path, x: 2 * x if path == "Dense_0" else x)(variables, IMAGE)
    np.testing.assert_allclose(doubled, apply(variables, 2 * IMAGE), rtol=1e-5, atol=1e-6)


def test_a_model_without_layers():
    with pytest.raises(InputError, match="found no layer that has a kernel, expected at least one"):
        inputs(lambda variables, x: x * variables["params"]["scale"])({"params": {"scale": 2.0}}, IMAGE)
    with pytest.raises(InputError, match="has no layer with a kernel, expected at least one"):
        calibrate(lambda variables, x: x * variables["params"]["scale"], {"params": {"scale": 2.0}}, [IMAGE])


def test_ranges_are_those_of_all_batches():
    variables, apply = built(SMALL)
    ranges = calibrate(apply, variables, [IMAGE[:2], 3 * IMAGE[2:], IMAGE[:1]])
    found = inputs(apply)(variables, np.concatenate([IMAGE[:2], 3 * IMAGE[2:]]))
    assert set(ranges) == set(found)
    for path, (x,) in found.items():
        np.testing.assert_allclose(ranges[path].low, x.min(), rtol=1e-5)
        np.testing.assert_allclose(ranges[path].high, x.max(), rtol=1e-5)


def test_ranges_of_a_stack_of_seeds():
    model = SMALL
    variables, apply = built(model)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf, leaf**2]), variables)
    batches = [IMAGE[:3], IMAGE[3:]]
    together = jax.vmap(lambda variables: calibrate(apply, variables, batches))(stacked)
    alone = calibrate(apply, jax.tree.map(lambda leaf: leaf[1], stacked), batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5), together, alone)


def test_an_empty_calibration_set():
    variables, apply = built(SMALL)
    with pytest.raises(InputError, match="calibrate: no batches, expected at least one"):
        calibrate(apply, variables, [])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_have_no_range(wrong):
    variables, apply = built(SMALL)
    for place in range(0, IMAGE.size, 500):  # wherever it stands
        images = IMAGE.copy()
        images.flat[place] = wrong
        with pytest.raises(InputError, match=r"the values at layer 'Dense_0' range from .* to .*, expected finite"):
            calibrate(apply, variables, [IMAGE, images, IMAGE])


class Pair(nn.Module):
    """Two layers that run in the reverse order of their names."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="decoder")(nn.Dense(3, name="encoder")(x))


def test_layers_that_are_not_finite_are_named_in_the_order_in_which_they_run():
    x = np.ones((2, 4), np.float32)
    variables = Pair().init(jax.random.key(0), x)
    assert type(calibrate(Pair().apply, variables, [x])) is dict
    message = (
        "the values at layer 'encoder' range from nan to nan, then at layer 'decoder'{} range from nan to nan, exp"
    )
    with pytest.raises(InputError, match=message.format("")):
        calibrate(Pair().apply, variables, [x, np.nan * x])
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), variables)
    with pytest.raises(InputError, match=message.format(" of seed 0")):
        jax.vmap(lambda variables: calibrate(Pair().apply, variables, [np.nan * x]))(stacked)


def test_a_batch_without_rows_has_no_range():
    variables, apply = built(SMALL)
    with pytest.raises(InputError, match=r"calibrate: batch 1 has an array \(0, .*\), expected 1 row or more; leave"):
        calibrate(apply, variables, [IMAGE, IMAGE[:0]])


def test_a_seed_that_has_diverged_is_named():
    """Under vmap each seed's values are unknown, and those of all are not."""
    variables, apply = built(SMALL)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf, leaf]), variables)
    stacked["params"]["Dense_1"]["kernel"][2, 0, 0] = np.nan
    of_one = lambda variables: calibrate(apply, variables, [IMAGE])
    with pytest.raises(InputError, match=r"layer 'Dense_2' of seed 2 range from nan to nan, expected finite numbers"):
        jax.vmap(of_one)(stacked)
    with pytest.raises(InputError, match="layer 'Dense_2' of seed 2"):
        jax.vmap(jax.vmap(of_one))(jax.tree.map(lambda leaf: leaf[None], stacked))
    compiled = jax.jit(jax.vmap(of_one))(stacked)  # where nothing is known, nothing plausible comes out
    rounded_by_seed = jax.vmap(lambda v, ranges: with_activations(apply, 8)({**v, "ranges": ranges}, IMAGE))
    found = rounded_by_seed(jax.tree.map(lambda leaf: np.nan_to_num(leaf), stacked), compiled)
    assert np.isfinite(found[:2]).all()
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize(
    ("low", "high"), [(np.nan, 1), (-1, np.nan), (np.nan, np.nan), (-np.inf, 1), (-1, np.inf), (-np.inf, np.inf)]
)
def test_a_range_that_is_not_finite_gives_nan(low, high):
    assert np.isnan(rounded(jnp.linspace(-1, 1, 9), bounds(low, high), 8)).all()


def test_integer_inputs_are_rounded_as_numbers():
    """Within half a step; as integers again they would lose their fractions."""
    x = jnp.arange(0, 256, 5, dtype=jnp.uint8)
    found = rounded(x, bounds(-3, 255), 8)
    assert found.dtype == jnp.float32
    assert abs(found - x.astype(jnp.float32)).max() <= 258 / 255 / 2 * 1.01


class Named(nn.Module):
    """A layer given its input by name, behind another argument of its own."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(inputs=nn.Einsum((4, 5))(einsum_str="ab,bc->ac", inputs=x))


def test_inputs_given_by_name_are_met():
    x = weights(14, 2, 4)
    variables = jax.device_get(Named().init(jax.random.key(0), x))
    found = inputs(Named().apply)(variables, x)
    np.testing.assert_array_equal(found["Einsum_0"][0], x)
    kernel = variables["params"]["Einsum_0"]["kernel"]
    np.testing.assert_allclose(found["Dense_0"][0], x @ kernel, rtol=1e-5)
    doubled = with_inputs(Named().apply, lambda path, x: 2 * x if path == "Einsum_0" else x)(variables, x)
    np.testing.assert_allclose(doubled, Named().apply(variables, 2 * x), rtol=1e-5)


def bounds(low: float, high: float) -> Range:
    return Range(jnp.float32(low), jnp.float32(high))


@functools.cache
def rounding(bits):
    """(x [500], bounds) -> the rounded x, and the gradient of their sum weighted by 0, 1, 2, ..."""

    def f(x, bounds):
        values = rounded(x, bounds, bits)
        return (jnp.arange(500) * values).sum(), values

    return jax.jit(lambda x, bounds: jax.grad(f, has_aux=True)(x, bounds)[::-1])


@every_bits
@pytest.mark.parametrize(("low", "high"), [(0, 6), (-1, 3), (-2.5, 0), (1, 2), (-5, -3)])
def test_activations_against_the_definition(bits, low, high):
    x = np.random.default_rng(1).normal(0, 4, 500).astype(np.float32)
    a, b = min(low, 0), max(high, 0)
    scale = (b - a) / (2**bits - 1)
    zero = round(-a / scale)
    q = np.clip(np.round(x / scale) + zero, 0, 2**bits - 1)
    values, gradient = rounding(bits)(x, bounds(low, high))
    np.testing.assert_allclose(values, (q - zero) * scale, rtol=1e-5, atol=1e-6)
    assert len(np.unique(values)) <= 2**bits
    clipped = (x < values.min() - scale) | (x > values.max() + scale)
    inside = (x >= values.min()) & (x <= values.max())
    np.testing.assert_array_equal(gradient[clipped], 0)
    np.testing.assert_array_equal(gradient[inside], np.arange(500)[inside])
    assert clipped.any()
    assert float(rounded(jnp.float32(0), bounds(low, high), bits)) == 0


def test_activations_keep_their_type_and_an_input_of_zeros():
    half = rounded(jnp.asarray([0.3, 9.0], jnp.bfloat16), bounds(0, 6), 8)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded(jnp.zeros(3), bounds(0, 0), 8), 0)
    inside = np.linspace(-1, 3, 99, dtype=np.float32)
    error = abs(rounded(inside, bounds(-1, 3), 8) - inside).max()
    assert error <= 4 / 255 * 0.502
    once = rounded(inside, bounds(-1, 3), 5)
    np.testing.assert_allclose(rounded(once, bounds(-1, 3), 5), once)


def test_a_dense_layer_in_integers_is_the_simulated_one():
    """Equation 7 of Jacob et al.: all products and sums are of integers, one multiplication rescales them."""
    model = MLP(hidden=(), classes=6)
    variables, apply = built(model)
    ranges = calibrate(apply, variables, [IMAGE])
    params = fake(8)(variables["params"])
    simulated = with_activations(apply, 8)({"params": params, "ranges": ranges}, IMAGE)

    stored: Quantized = quantize.quantize(variables["params"], 8)["Dense_0"]["kernel"]
    low, high = min(float(ranges["Dense_0"].low), 0), float(ranges["Dense_0"].high)
    scale = np.float32((high - low) / 255)
    zero = round(-low / scale)
    q = np.clip(np.round(IMAGE.reshape(6, -1) / scale) + zero, 0, 255).astype(np.uint8)
    sums = (q.astype(np.int32) - zero) @ np.asarray(stored.values, np.int32)
    expected = sums * scale * stored.scale + params["Dense_0"]["bias"]
    np.testing.assert_allclose(simulated, expected, rtol=1e-4, atol=1e-5)


def test_training_sees_both_roundings_and_no_gradient_for_the_ranges():
    variables, apply = built(SMALL)
    ranges = jax.tree.map(lambda x: x / 2, calibrate(apply, variables, [IMAGE]))

    def loss(variables, batch, key):
        return (apply(variables, batch) ** 2).mean(), ({}, {})

    both = with_params(with_activations(loss, 3), fake(4))
    quantized = {**variables, "ranges": ranges}
    value, gradient = jax.jit(jax.value_and_grad(lambda v: both(v, IMAGE, None)[0]))(quantized)

    x, params = IMAGE.reshape(6, -1), fake(4)(variables["params"])
    for i in range(3):
        layer = params[f"Dense_{i}"]
        x = rounded(x, ranges[f"Dense_{i}"], 3) @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    np.testing.assert_allclose(value, (x**2).mean(), rtol=1e-5)
    assert not np.isclose(value, loss(variables, IMAGE, None)[0], rtol=1e-4)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["params"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["ranges"]))


def test_each_seed_trains_on_its_own_ranges():
    model = MLP(hidden=(8,))
    images = IMAGE[:, ::4, ::4]
    apply = lambda variables, image: model.apply(variables, image, train=False)
    loss = with_params(with_activations(lambda v, batch, key: ((apply(v, batch) ** 2).mean(), ({}, {})), 4), fake(2))
    keys, tx = jnp.stack([jax.random.key(0), jax.random.key(1)]), optax.sgd(0.1)
    start = jax.jit(jax.vmap(lambda key: model.init(key, images, train=False)))(keys)
    ranges = jax.vmap(lambda variables: calibrate(apply, variables, [images]))(start)
    states = jax.jit(jax.vmap(lambda key, v: init_state(key, v, tx)))(keys, {**start, "ranges": ranges})
    step = make_step(loss, tx)
    together, _ = jax.jit(per_seed(step))(states, np.stack([images, images]))
    alone, _ = jax.jit(step)(jax.tree.map(lambda leaf: leaf[1], states), images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6), together.params, alone.params)
    jax.tree.map(np.testing.assert_array_equal, together.extra["ranges"], ranges)


def test_eight_bits_are_near_the_model():
    variables, apply = built(LeNetCaffe())
    ranges = calibrate(apply, variables, [IMAGE])
    stored = {"params": dequantize(quantize.quantize(variables["params"], 8)), "ranges": ranges}
    found, exact = jax.jit(with_activations(apply, 8))(stored, IMAGE), jax.jit(apply)(variables, IMAGE)
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_ranges_that_are_missing_or_of_another_model():
    variables, apply = built(SMALL)
    with pytest.raises(InputError, match="no collection 'ranges', expected one; call `calibrate`"):
        with_activations(apply, 8)(variables, IMAGE)
    other, other_apply = built(MLP(hidden=(5,)))
    ranges = calibrate(other_apply, other, [IMAGE])
    with pytest.raises(InputError, match="layer 'Dense_2' has no range, expected one of Dense_0, Dense_1; calibrate"):
        with_activations(apply, 8)({**variables, "ranges": ranges}, IMAGE)


TOKENS = np.random.default_rng(0).integers(0, 7, (3, 6), np.int32)


def classifier(cell):
    model = SequenceClassifier(7, classes=3, embedding=4, hidden=5, layers=2, cell=cell)
    return built(model, TOKENS)


@pytest.mark.parametrize("cell", [VANILLA, LSTM, GRU], ids=["VANILLA", "LSTM", "GRU"])
def test_of_a_recurrent_layer_both_kernels_are_rounded_and_both_inputs_are_met(cell):
    variables, apply = classifier(cell)
    found = jax.eval_shape(inputs(apply), variables, TOKENS)
    assert {path: [x.shape for x in xs] for path, xs in found.items()} == {
        "Recurrent_0/forward_0/input": [(6, 3, 4)],
        "Recurrent_0/forward_0": [(6, 3, 5)],
        "Recurrent_0/forward_1/input": [(6, 3, 5)],
        "Recurrent_0/forward_1": [(6, 3, 5)],
        "Dense_0": [(3, 5)],
    }
    params, exact = fake(2)(variables["params"]), variables["params"]
    for layer in ("forward_0", "forward_1"):
        ours, theirs = params["Recurrent_0"][layer], exact["Recurrent_0"][layer]
        for mine, exactly in ((ours, theirs), (ours["input"], theirs["input"])):
            np.testing.assert_array_equal(mine["kernel"], faked(exactly["kernel"], 2))
            assert "bias" not in mine or mine["bias"] is exactly["bias"]
    assert params["Embed_0"]["embedding"] is exact["Embed_0"]["embedding"]


def test_a_recurrent_layers_input_is_rounded_to_its_range():
    variables, apply = classifier(LSTM)
    ranges = calibrate(apply, variables, [TOKENS])
    seen = jax.jit(with_activations(inputs(apply), 2))({**variables, "ranges": ranges}, TOKENS)
    embedded = variables["params"]["Embed_0"]["embedding"][TOKENS.T]  # [T, B, D]
    path = "Recurrent_0/forward_0/input"
    np.testing.assert_array_equal(seen[path][0], rounded(embedded, ranges[path], 2))
