"""Where activations are rounded, and on which ranges; over which axes the scales of weights run."""

import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import inspect
from dl_jax.compress import codec, quantize
from dl_jax.compress.quantize import Range, calibrate, rounded, with_activations
from dl_jax.compress.quantize.points import points
from dl_jax.core.errors import InputError

X = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
SEQUENCE = X[:, 0]  # [B, T, D]


def drawn(model, *args, **kwargs):
    """Variables of random numbers: to compile an initialisation would take longer."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *args)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / np.sqrt(max(1, leaf.size // leaf.shape[-1]))
    return jax.tree.map(draw, shapes)


class Residual(nn.Module):
    """Pooling between layers, one value for a layer and a sum, and a mean behind a sum."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="stem")(x)), (2, 2), (2, 2))
        y = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        x = nn.relu(x + nn.Conv(4, (3, 3), name="second")(y))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def test_the_points_of_a_residual_network():
    variables = drawn(Residual(), X)
    found = points(inspect.opened(Residual().apply, variables, X))
    assert [name for _, name in found.operands.values()] == ["stem"]
    assert set(found.values.values()) == {"first", "second", "head", "second:output", "second:sum"}
    ranges = calibrate(Residual().apply, variables, [X])

    def by_hand(variables, x):
        p, at = variables["params"], lambda name, x: rounded(x, ranges[name], 8)
        conv = lambda name, x: nn.Conv(4, (3, 3)).apply({"params": p[name]}, x)
        x = at("first", nn.max_pool(nn.relu(conv("stem", at("stem", x))), (2, 2), (2, 2)))
        y = at("second", nn.relu(conv("first", x)))
        x = at("second:sum", nn.relu(x + at("second:output", conv("second", y))))
        return at("head", x.mean((1, 2))) @ p["head"]["kernel"] + p["head"]["bias"]

    found = jax.jit(with_activations(Residual().apply, 8))({**variables, "ranges": ranges}, X)
    np.testing.assert_allclose(found, jax.jit(by_hand)(variables, X), atol=1e-5)
    exact = jax.jit(Residual().apply)(variables, X)
    assert 0 < abs(found - exact).max() < 0.05 * abs(exact).max()


class Between(nn.Module):
    """Two layers with something between them that does not commute with rounding."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="a")(x)
        return nn.Dense(2, name="b")(nn.gelu(nn.relu6(x))), x


def test_what_lies_between_layers_is_rounded_to_8_bits_if_it_has_a_range():
    variables = drawn(Between(), SEQUENCE)
    ranges = calibrate(Between().apply, variables, [SEQUENCE])
    assert set(ranges) == {"a", "b", "a:output"}
    assert ranges["a:output"].low < 0  # the value itself is a result too, so the point comes before the ReLU
    seen = jax.jit(with_activations(Between().apply, 2))({**variables, "ranges": ranges}, SEQUENCE)[1]
    assert 4 < len(np.unique(seen)) <= 256
    old = {name: ranges[name] for name in "ab"}  # as before points lay between layers
    seen = jax.jit(with_activations(Between().apply, 2))({**variables, "ranges": old}, SEQUENCE)[1]
    dense = variables["params"]["a"]
    np.testing.assert_allclose(seen, rounded(SEQUENCE, ranges["a"], 2) @ dense["kernel"] + dense["bias"], atol=1e-5)
    del old["b"]
    with pytest.raises(InputError, match="layer 'b' has no range, expected one of a; calibrate this very model"):
        with_activations(Between().apply, 2)({**variables, "ranges": old}, SEQUENCE)


def test_a_recurrent_network_of_flax_is_calibrated_and_rounded_in_every_step():
    model = nn.RNN(nn.SimpleCell(4))
    variables = drawn(model, SEQUENCE)
    ranges = calibrate(model.apply, variables, [SEQUENCE[:4], SEQUENCE[4:]])
    assert set(ranges) == {"cell/i", "cell/h"}
    np.testing.assert_allclose(ranges["cell/i"], (SEQUENCE.min(), SEQUENCE.max()))
    found = jax.jit(with_activations(model.apply, 3))({**variables, "ranges": ranges}, SEQUENCE)
    p, h = variables["params"]["cell"], jnp.zeros((6, 4))
    for t in range(SEQUENCE.shape[1]):
        x, h = rounded(SEQUENCE[:, t], ranges["cell/i"], 3), rounded(h, ranges["cell/h"], 3)
        h = jnp.tanh(x @ p["i"]["kernel"] + p["i"]["bias"] + h @ p["h"]["kernel"])
        np.testing.assert_allclose(found[:, t], h, atol=1e-5)


def test_a_rounded_model_is_exported_for_any_batch_size():
    variables = drawn(Residual(), X)
    variables |= {"ranges": calibrate(Residual().apply, variables, [X])}
    apply = functools.partial(with_activations(Residual().apply, 8), variables)
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(apply))(jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32))
    np.testing.assert_allclose(exported.call(X[:3]), jax.jit(apply)(X[:3]), atol=1e-5)


def dense(variables, x):
    return x @ variables["params"]["Dense_0"]["kernel"]


DENSE = {"params": {"Dense_0": {"kernel": np.ones((1, 2), np.float32)}}}


def test_percentiles_leave_out_the_tails():
    x = np.random.default_rng(2).normal(size=(4000, 1)).astype(np.float32)
    x[0], x[2500] = -50, 60
    batches = [x[:2000], x[2000:]]
    whole = calibrate(dense, DENSE, iter(batches))["Dense_0"]
    assert whole == Range(-50, 60)
    found = calibrate(dense, DENSE, iter(batches), quantize.percentile(99))["Dense_0"]
    np.testing.assert_allclose(found, np.percentile(x, [0.5, 99.5]), atol=110 / 2048)
    np.testing.assert_allclose(calibrate(dense, DENSE, batches, quantize.percentile(100))["Dense_0"], whole, rtol=1e-5)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), DENSE)
    seeds = jax.vmap(lambda v: calibrate(dense, v, batches, quantize.percentile(99)))(stacked)["Dense_0"]
    np.testing.assert_allclose(seeds.high, found.high)
    with pytest.raises(InputError, match="percentile: 0 per cent of the values, expected more than 0"):
        quantize.percentile(0)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_least_error_is_found(bits):
    x = np.random.default_rng(3).laplace(size=(20_000, 1)).astype(np.float32)
    whole = calibrate(dense, DENSE, [x])["Dense_0"]
    best = calibrate(dense, DENSE, [x], quantize.least_error(bits))["Dense_0"]
    error = lambda bounds: float(((rounded(x, bounds, bits) - x) ** 2).mean())
    shares = [Range(s * whole.low, s * whole.high) for s in np.linspace(0.05, 1, 20)]
    assert error(best) <= 1.02 * min(map(error, shares))
    assert error(best) < 0.9 * error(whole)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 6)
        x = nn.MultiHeadDotProductAttention(2)(embed(tokens))
        x = nn.RNN(nn.OptimizedLSTMCell(4))(x)
        return nn.DenseGeneral((2, 3), axis=(-2, -1))(x), nn.ConvTranspose(5, (3,))(x)


def test_the_axes_of_outputs_are_read_from_the_products():
    tokens = np.zeros((2, 5), np.int32)
    variables = drawn(Heads(), tokens)
    where, axes = quantize.layer_weights(Heads().apply, variables, tokens)
    found = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): axes(path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if quantize.is_weight(path, leaf)
    }
    chosen = jax.tree_util.tree_map_with_path(where, variables["params"])
    assert not chosen.pop("Embed_0")["embedding"]
    assert all(yes == (path[-1].key == "kernel") for path, yes in jax.tree_util.tree_leaves_with_path(chosen))
    attention, cell = "MultiHeadDotProductAttention_0/", "OptimizedLSTMCell_0/"
    assert found == {
        **dict.fromkeys([attention + name for name in ("query", "key", "value")], (1, 2)),
        attention + "out": (2,),
        **dict.fromkeys([f"{cell}{kind}{gate}" for kind in "ih" for gate in "ifgo"], (1,)),
        "Embed_0": (1,),
        "DenseGeneral_0": (2, 3),
        "ConvTranspose_0": (2,),
    }
    query = variables["params"]["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    of_query = lambda path, leaf: (1, 2)
    stored, simulated = quantize.quantize({"kernel": query}, 8, axes=of_query), quantize.fake(8, axes=of_query)
    scale = abs(query).max(0, keepdims=True) / 127
    np.testing.assert_allclose(stored["kernel"].scale, scale, rtol=1e-6)
    np.testing.assert_allclose(simulated({"kernel": query})["kernel"], np.round(query / scale) * scale, rtol=1e-5)


def test_layers_in_a_loop_have_a_scale_for_each_output_of_each():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + jnp.tanh(nn.Dense(3, use_bias=False)(x)), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()
    apply = lambda variables, x: stack.apply(variables, x, None)[0]
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    variables = jax.jit(lambda: stack.init(jax.random.key(0), x, None))()
    where, axes = quantize.layer_weights(apply, variables, x)
    kernel = quantize.quantize(variables["params"], 8, where, axes)["Dense_0"]["kernel"]
    assert kernel.scale.shape == (4, 1, 3)
    run, integers = quantize.after_training(apply, variables, [(x,)], 8)
    np.testing.assert_allclose(run(integers, x), apply(variables, x), atol=0.05)


def test_weights_of_any_name_are_those_that_layers_multiply_with():
    """One has a name of its own, one is computed from two, one is a table that answers with itself, none is a norm."""

    def apply(variables, tokens):
        params, table = variables["params"], variables["params"]["table"]
        x = table[tokens] * params["kernel"]
        x = jnp.einsum("btc,dc->btd", x, params["w"])
        x = x @ (params["direction"] / jnp.linalg.norm(params["direction"], axis=0) * params["size"])
        return (x @ variables["fixed"]["w"] @ table.T) @ params["last"]

    shapes = {"table": (5, 3), "kernel": (3,), "w": (4, 3), "direction": (4, 6), "size": (6,), "last": (5,)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    variables = {"params": params, "fixed": {"w": np.ones((6, 3), np.float32)}}
    where, axes = quantize.layer_weights(apply, variables, np.zeros((2, 7), np.int32))
    stored = quantize.quantize(params, 8, where, axes)
    assert {name: each.scale.shape for name, each in stored.items() if quantize.is_quantized(each)} == {
        "table": (5, 1),
        "w": (4, 1),
        "direction": (1, 1),
        "last": (1,),
    }
    with pytest.raises(InputError, match=r"^the call multiplies with no parameter, expected at least one layer"):
        quantize.layer_weights(lambda variables, x: x * variables["params"]["kernel"], variables, np.ones(3))


def test_what_the_codec_gives_back_is_dequantised():
    params = {"Dense_0": {"kernel": np.float32([[1, -2], [3, 0.5]]), "bias": np.zeros(2, np.float32)}}
    stored = jax.device_get(quantize.quantize(params, 4))
    back = codec.decode(codec.encode(stored))
    assert type(back["Dense_0"]["kernel"]) is dict
    jax.tree.map(np.testing.assert_array_equal, quantize.dequantize(back), quantize.dequantize(stored))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(wrong):
    params = {"Dense_0": {"kernel": np.float32([[1, wrong], [3, 0.5]])}}
    with pytest.raises(InputError, match="weight Dense_0/kernel has 1 values that are not finite, expected none; look"):
        quantize.quantize(params, 8)


class TwoKernels(nn.Module):
    """A module that multiplies with two kernels of its own."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        first, second = self.param("kernel", init, (3, 4)), self.param("kernel_2", init, (4, 2))
        return 100 * jnp.tanh(x @ first) @ second


class Shared(nn.Module):
    """A layer that is called twice, on values of different sizes."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3, name="layer")
        return layer(100 * jnp.tanh(layer(x)))


class Module(nn.Module):
    of: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.of(name="inner")(x)


@pytest.mark.parametrize(("model", "name"), [(Module(TwoKernels), "inner"), (Shared(), "layer")])
def test_each_product_has_a_range_of_its_own(model, name):
    variables = drawn(model, SEQUENCE)
    ranges = calibrate(model.apply, variables, [SEQUENCE])
    own = {path: each for path, each in ranges.items() if ":" not in path}
    assert set(own) == {name, f"{name}#2"}
    np.testing.assert_allclose([own[name].low, own[name].high], [SEQUENCE.min(), SEQUENCE.max()])
    assert own[f"{name}#2"].high - own[f"{name}#2"].low != own[name].high - own[name].low
    found = jax.jit(with_activations(model.apply, 8))({**variables, "ranges": ranges}, SEQUENCE)
    exact = model.apply(variables, SEQUENCE)
    assert 0 < abs(found - exact).max() < 0.03 * abs(exact).max()


class Sums(nn.Module):
    """Two sums after the same layer."""

    @nn.compact
    def __call__(self, x):
        a, b = nn.Dense(4, name="a")(x), nn.Dense(4, name="b")(x)
        first = nn.relu(a + b)
        return nn.Dense(2, name="head")(jnp.tanh(first + b) + jnp.tanh(first))


def test_sums_after_the_same_layer_have_ranges_of_their_own():
    found = points(inspect.opened(Sums().apply, drawn(Sums(), SEQUENCE), SEQUENCE))
    names = [*found.values.values(), *(name for _, name in found.operands.values())]
    assert len(names) == len(set(names))
    assert {"b:sum", "b#2:sum"} <= set(names)


def test_a_module_whose_name_looks_like_a_number_is_not_mistaken_for_a_second_call():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="layer")
            return nn.Dense(3, name="layer#2")(jnp.tanh(layer(jnp.tanh(layer(x)))))

    ranges = calibrate(Named().apply, drawn(Named(), SEQUENCE), [SEQUENCE])
    assert {path for path in ranges if ":" not in path} == {"layer", "layer#2", "layer#3"}


def test_a_trained_model_in_integers_is_the_steps_one_by_one():
    variables = drawn(Residual(), X)
    apply, integers = quantize.after_training(Residual().apply, variables, [(X[:3],), (X[3:],)], 7)
    ranges = calibrate(lambda v, batch: Residual().apply(v, batch["x"]), variables, [{"x": X[:3]}, {"x": X[3:]}])
    params = quantize.fake(7)(variables["params"])
    expected = jax.jit(with_activations(Residual().apply, 8))({"params": params, "ranges": ranges}, X)
    np.testing.assert_array_equal(jax.jit(apply)(integers, X), expected)
    assert {leaf.dtype for path, leaf in jax.tree.leaves_with_path(integers) if "values" in str(path)} == {
        np.dtype("int8")
    }
    np.testing.assert_array_equal(jax.jit(apply)(codec.decode(codec.encode(integers)), X), expected)
    with pytest.raises(InputError, match="no batches"):
        quantize.after_training(Residual().apply, variables, [], 7)
    with pytest.raises(InputError, match=r"^a batch is of type ndarray, expected a tuple of the inputs of a call"):
        quantize.after_training(Residual().apply, variables, [X], 7)
