"""Checks that every model of the zoo must pass, found by walking `dl_jax.models`, then each model's own."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import models
from dl_jax.core.errors import InputError
from dl_jax.models.generative.gan import Discriminator, Generator
from dl_jax.models.vision import lenet
from dl_jax.models.vision.lenet import LeNet5, LeNet300, LeNetCaffe
from dl_jax.models.vision.mlp import MLP

FILES = [
    module.name
    for module in pkgutil.walk_packages(models.__path__, "dl_jax.models.")
    if not module.ispkg and module.name != "dl_jax.models.ops"
]
EXAMPLES = {
    f"{file.removeprefix('dl_jax.models.')}.{name}": example
    for file in FILES
    for name, example in importlib.import_module(file).examples().items()
}
zoo = pytest.mark.parametrize("name", EXAMPLES)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def initialised(model, inputs):
    return jax.jit(lambda: model.init(KEYS, **inputs, train=False))()


def predict(model, variables, inputs):
    return jax.jit(lambda variables, inputs: model.apply(variables, **inputs, train=False))(variables, inputs)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@zoo
def test_parameters_are_float32_whatever_it_computes_in(name):
    model, inputs = EXAMPLES[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        variables = initialised(model.clone(dtype=dtype), inputs)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@zoo
def test_half_precision_is_used_and_near(name):
    model, inputs = EXAMPLES[name]
    variables = initialised(model, inputs)
    full, half = (predict(model.clone(dtype=dtype), variables, inputs) for dtype in (jnp.float32, jnp.bfloat16))
    for one, other in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert one.dtype == other.dtype == jnp.float32
        assert (one != other).any()
        np.testing.assert_allclose(one, other, rtol=0.05, atol=0.05)


@zoo
def test_compiled_equals_eager(name):
    model, inputs = EXAMPLES[name]
    variables = model.init(KEYS, **inputs, train=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), variables, initialised(model, inputs))
    eager = model.apply(variables, **inputs, train=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), eager, predict(model, variables, inputs))


@zoo
def test_a_row_depends_on_itself_alone(name):
    model, inputs = EXAMPLES[name]
    variables = initialised(model, inputs)
    others = jax.tree.map(lambda x: x[::-1].copy(), inputs)
    mixed = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:]]), inputs, others)
    alone = jax.tree.map(lambda x: x[:1], inputs)
    output = predict(model, variables, inputs)
    for leaf, same, single in zip(
        *(jax.tree.leaves(o) for o in (output, predict(model, variables, mixed), predict(model, variables, alone))),
        strict=True,
    ):
        assert len(leaf) == len(jax.tree.leaves(inputs)[0])
        np.testing.assert_array_equal(leaf[0], same[0])
        np.testing.assert_allclose(leaf[:1], single, atol=1e-4)
        assert (leaf[1:] != leaf[0]).any()


@zoo
def test_gradients_are_finite_and_reach_every_parameter(name):
    model, inputs = EXAMPLES[name]
    variables = initialised(model, inputs)

    def loss(params):
        output = model.apply({**variables, "params": params}, **inputs, train=True, rngs=KEYS, mutable=True)[0]
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(output))

    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables["params"])):
        assert np.isfinite(gradient).all(), path
        assert gradient.any(), path


@zoo
def test_classifiers_give_one_logit_per_class(name):
    model, inputs = EXAMPLES[name]
    if not hasattr(model, "classes"):
        pytest.skip("not a classifier")
    assert predict(model, initialised(model, inputs), inputs).shape == (len(jax.tree.leaves(inputs)[0]), model.classes)


def test_input_dropout_hides_pixels_and_only_in_training():
    model, inputs = MLP(hidden=(), classes=1, input_dropout=0.25), {"image": np.ones((1, 50, 80, 1), np.float32)}
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((4000, 1)), "bias": jnp.zeros(1)}}}
    shown = model.apply(variables, **inputs, train=True, rngs={"dropout": jax.random.key(0)})
    assert abs(float(shown[0, 0]) - 4000) > 1  # a draw of 4,000 pixels, each kept with probability 3/4 at 4/3
    assert abs(float(shown[0, 0]) - 4000) < 5 * 4 / 3 * np.sqrt(4000 * 3 / 16)
    np.testing.assert_allclose(predict(model, variables, inputs), [[4000]])


def test_dropout_follows_its_key_and_only_in_training():
    model, inputs = MLP(hidden=(32,), dropout=0.5), {"image": np.ones((2, 4, 4, 1), np.float32)}
    variables = initialised(model, inputs)

    def train(key):
        return model.apply(variables, **inputs, train=True, rngs={"dropout": jax.random.key(key)})

    np.testing.assert_array_equal(train(0), train(0))
    assert (train(0) != train(1)).any()
    np.testing.assert_array_equal(
        predict(model, variables, inputs), predict(model.clone(dropout=0.0), variables, inputs)
    )


def test_mlp_against_numpy():
    model, inputs = EXAMPLES["mlp.MLP"]
    params = initialised(model, inputs)["params"]
    x = inputs["image"].reshape(3, -1).astype(np.float64)
    for layer in ("Dense_0", "Dense_1"):
        x = np.maximum(x @ params[layer]["kernel"] + params[layer]["bias"], 0)
    x = x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    np.testing.assert_allclose(predict(model, {"params": params}, inputs), x, atol=1e-5)


IMAGE = {"image": np.random.default_rng(1).random((2, 28, 28, 1), np.float32)}


def test_lenet5_has_the_papers_parameters():
    params = initialised(LeNet5(), IMAGE)["params"]
    counts = {"C1": 156, "S2": 12, "C3": 1_516, "S4": 32, "C5": 48_120, "F6": 10_164}
    assert {name: count(layer) for name, layer in params.items()} == counts
    assert count(params) == 60_000
    assert params["C3"]["kernel"].shape == (5, 5, 60)  # 60 connections of 25 weights


def test_the_connection_table():
    """Section II.B: six maps see 3 contiguous maps of S2, six 4 contiguous, three 4 discontinuous, one all."""
    contiguous = {size: [tuple(sorted((first + i) % 6 for i in range(size))) for first in range(6)] for size in (3, 4)}
    assert sorted(lenet.C3_INPUTS[:6]) == sorted(contiguous[3])
    assert sorted(lenet.C3_INPUTS[6:12]) == sorted(contiguous[4])
    assert all(len(maps) == 4 and maps not in contiguous[4] for maps in lenet.C3_INPUTS[12:15])
    assert lenet.C3_INPUTS[15] == (0, 1, 2, 3, 4, 5)
    sources = np.concatenate(lenet.C3_INPUTS)
    np.testing.assert_array_equal(np.bincount(sources), [10] * 6)  # every map of S2 feeds ten maps of C3


def test_lenet5_starts_as_the_paper_says():
    params = initialised(LeNet5(), IMAGE)["params"]
    kernels = {"C1": 25, "C5": 400, "F6": 120}
    for layer, fan_in in kernels.items():
        largest = abs(params[layer]["kernel"]).max() * fan_in
        assert 2.2 < largest <= 2.4
    largest = abs(params["C3"]["kernel"]).max((0, 1))
    fan_in = np.array([25 * len(maps) for maps in lenet.C3_INPUTS for _ in maps])
    assert (largest * fan_in <= 2.4).all()
    assert (largest * fan_in > 1.8).all()
    assert abs(params["S4"]["scale"]).max() <= 0.6


def lenet5_in_numpy(params, image):
    """LeNet-5 written out connection by connection, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def squash(x):
        return 1.7159 * np.tanh(2 / 3 * x)

    def correlate(map, kernel):
        height, width = (size - 4 for size in map.shape)
        return sum(kernel[i, j] * map[i : i + height, j : j + width] for i in range(5) for j in range(5))

    def subsample(maps, layer):
        sums = [m[::2, ::2] + m[1::2, ::2] + m[::2, 1::2] + m[1::2, 1::2] for m in maps]
        return [squash(layer["scale"][i] * s + layer["bias"][i]) for i, s in enumerate(sums)]

    x = np.full((32, 32), -0.1)
    x[2:-2, 2:-2] += 1.275 * image[..., 0]
    maps = [squash(correlate(x, params["C1"]["kernel"][:, :, 0, i]) + params["C1"]["bias"][i]) for i in range(6)]
    maps = subsample(maps, params["S2"])
    connection, c3 = 0, []
    for target, sources in enumerate(lenet.C3_INPUTS):
        total = params["C3"]["bias"][target]
        for source in sources:
            total = total + correlate(maps[source], params["C3"]["kernel"][:, :, connection])
            connection += 1
        c3.append(squash(total))
    x = np.stack(subsample(c3, params["S4"]), -1).reshape(-1)
    x = squash(x @ params["C5"]["kernel"] + params["C5"]["bias"])
    x = squash(x @ params["F6"]["kernel"] + params["F6"]["bias"])
    return [-((x - code) ** 2).sum() for code in lenet.digit_codes()]


def test_lenet5_against_numpy():
    params = jax.tree.map(lambda leaf: 3 * leaf + 0.1, initialised(LeNet5(), IMAGE)["params"])
    expected = [lenet5_in_numpy(params, image) for image in IMAGE["image"]]
    np.testing.assert_allclose(predict(LeNet5(), {"params": params}, IMAGE), expected, rtol=1e-5)


def test_lenet5_takes_the_border_or_adds_it():
    params = initialised(LeNet5(), IMAGE)
    wide = {"image": np.pad(IMAGE["image"], ((0, 0), (2, 2), (2, 2), (0, 0)))}
    np.testing.assert_array_equal(predict(LeNet5(), params, wide), predict(LeNet5(), params, IMAGE))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (LeNet5(classes=47), (28, 28, 1), "not 47 classes; use LeNetCaffe"),
        (LeNet5(), (8, 8, 1), r"not \(8, 8, 1\); resize"),
        (LeNet5(), (32, 32, 3), r"not \(32, 32, 3\); resize"),
    ],
)
def test_lenet5_refuses_what_the_paper_does_not_define(model, shape, message):
    with pytest.raises(InputError, match=message):
        model.init(jax.random.key(0), np.zeros((1, *shape), np.float32), train=False)


@pytest.mark.parametrize("hidden", [(0,), (16, -8)])
@pytest.mark.parametrize("model", [MLP, Discriminator, Generator])
def test_a_layer_without_units_is_refused(model, hidden):
    with pytest.raises(InputError, match=f"hidden is {min(hidden)}, expected more than 0"):
        model(hidden).init(jax.random.key(0), np.zeros((1, 4), np.float32), train=False)


def test_digit_codes():
    codes = lenet.digit_codes()
    assert codes.shape == (10, 84)
    assert set(codes.flat) == {-1, 1}
    differing = (codes[:, None] != codes).sum(-1)
    assert differing[~np.eye(10, dtype=bool)].min() >= 5
    one = codes[1].reshape(12, 7)
    np.testing.assert_array_equal(one[9], [-1, 1, 1, 1, 1, 1, 1])  # the foot of the 1
    np.testing.assert_array_equal(one[3:9], [[-1, -1, -1, 1, 1, -1, -1]] * 6)  # its stem


def test_map_loss_against_the_equation():
    penalties, labels, j = np.array([[1.0, 3.0, 2.0], [90.0, 80.0, 85.0]]), np.array([0, 1]), 1.5
    expected = [y[d] + np.log(np.exp(-j) + np.exp(-y).sum()) for y, d in zip(penalties, labels, strict=True)]
    np.testing.assert_allclose(lenet.map_loss(jnp.array(-penalties), jnp.array(labels), j), expected, rtol=1e-5)
    gradient = jax.grad(lambda logits: lenet.map_loss(logits, jnp.array(labels), j).sum())(jnp.array(-penalties))
    posterior = np.exp(-penalties) / (np.exp(-j) + np.exp(-penalties).sum(1, keepdims=True))
    np.testing.assert_allclose(gradient, posterior - np.eye(3)[labels], atol=1e-6)


def test_map_loss_without_rubbish_is_cross_entropy():
    logits, labels = jnp.array([[1.0, 3.0, 2.0]]), jnp.array([2])
    cross_entropy = -jax.nn.log_softmax(logits)[0, 2]
    np.testing.assert_allclose(lenet.map_loss(logits, labels, 1e9), [cross_entropy], rtol=1e-6)


def test_parameter_counts_of_the_pruning_nets():
    assert count(initialised(LeNet300(), IMAGE)) == 266_610
    caffe = initialised(LeNetCaffe(), IMAGE)["params"]
    assert count(caffe) == 431_080
    assert sum(layer["kernel"].size for layer in caffe.values()) == 430_500


def test_caffe_variant_is_linear_before_its_dense_layers():
    """ReLU only after the first dense layer: where its units are all on, the net is linear along a ray but for max."""
    params = initialised(LeNetCaffe(), IMAGE)["params"]
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"] + 1e3
    zero, one, two = (
        predict(LeNetCaffe(), {"params": params}, {"image": scale * IMAGE["image"]}) for scale in (0.0, 1.0, 2.0)
    )
    np.testing.assert_allclose(two - one, one - zero, atol=1e-2)
    assert (abs(one - zero) > 0.1).any()


def test_lenet5_trains_on_an_accelerator_with_plain_convolutions():
    variables = initialised(LeNet5(), IMAGE)
    gradient = jax.jit(jax.grad(lambda v, x: LeNet5().apply(v, x, train=True).sum()))
    text = gradient.trace(variables, IMAGE["image"]).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 5  # C1 and C3 forward, their kernels' gradients, C3's input's
