"""Checks that every model of the zoo must pass, found by walking `dl_jax.models`, then each model's own."""

import functools
import importlib
import pkgutil
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import batch_norm, dense
from quick import jit, moved, shapes

from dl_jax import models
from dl_jax.compress import structure
from dl_jax.core.errors import InputError
from dl_jax.models.generative.gan import Discriminator, Generator
from dl_jax.models.vision import lenet
from dl_jax.models.vision.lenet import LeNet5, LeNet300, LeNetCaffe
from dl_jax.models.vision.mlp import MLP

FILES = [
    module.name
    for module in pkgutil.walk_packages(models.__path__, "dl_jax.models.")
    if not module.ispkg and module.name.count(".") == 3  # what lies directly in models/ are operations
]
EXAMPLES = {
    f"{file.removeprefix('dl_jax.models.')}.{name}": example
    for file in FILES
    for name, example in importlib.import_module(file).examples().items()
}
zoo = pytest.mark.parametrize("name", EXAMPLES)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Example(NamedTuple):
    """What all checks of a model share, so that each of these is traced and compiled once."""

    model: Any
    inputs: dict[str, Any]
    variables: Any  # as the model starts
    predict: Any  # (variables, inputs) -> outputs, compiled for the shapes of `inputs`
    output: Any  # of `variables` and `inputs`


@functools.cache
def example(name) -> Example:
    model, inputs = EXAMPLES[name]
    variables = jit(lambda: model.init(KEYS, **inputs, train=False))()
    predict = jit(lambda variables, inputs: model.apply(variables, **inputs, train=False))
    return Example(model, inputs, variables, predict, predict(variables, inputs))


def of_rows(name, output):
    """What has a row for each example. The parameters of a chain, which a tagger returns too, are shared by all."""
    return output[0] if name == "sequence.tagger.ChainTagger" else output


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@zoo
def test_parameters_are_float32_whatever_it_computes_in(name):
    model, inputs, variables, *_ = example(name)
    half = shapes(model.clone(dtype=jnp.bfloat16), **inputs, train=False)
    for tree in (variables, half):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, half)


@zoo
def test_an_image_with_other_channels_than_the_parameters_has_one_clear_line(name):
    model, inputs, variables, *_ = example(name)
    if "image" not in inputs:
        pytest.skip("takes no images")
    wrong = inputs | {"image": np.concatenate([inputs["image"]] * 2, -1)}
    with pytest.raises(InputError, match=r"^image with |^examples of shape |takes images of shape"):
        model.apply(variables, **wrong, train=False)


@zoo
def test_half_precision_is_used_in_every_product_and_near(name):
    model, inputs, variables, _, full = example(name)
    half = model.clone(dtype=jnp.bfloat16)
    lowered = jax.jit(lambda v, inputs: half.apply(v, **inputs, train=False)).lower(variables, inputs)
    products = re.findall(r"stablehlo\.(?:dot_general|convolution)\b.*: \(.*\) ->", lowered.as_text())
    assert products
    for product in products:
        assert "xf32>" not in product or "HIGHEST" in product  # which says that a copy of parameters has to be exact
    output = jax.device_get(lowered.compile()(variables, inputs))
    for one, other in zip(*(jax.tree.leaves(of_rows(name, each)) for each in (output, full)), strict=True):
        assert one.dtype == other.dtype == jnp.float32
        assert (one != other).any()
        np.testing.assert_allclose(one, other, rtol=0.05, atol=0.05)


@zoo
def test_a_row_depends_on_itself_alone(name):
    _, inputs, variables, predict, output = example(name)
    mixed = jax.tree.map(lambda x: np.concatenate([x[:1], x[::-1][1:]]), inputs)
    both = (jax.tree.leaves(of_rows(name, each)) for each in (output, predict(variables, mixed)))
    for leaf, same in zip(*both, strict=True):
        assert len(leaf) == len(jax.tree.leaves(inputs)[0])
        np.testing.assert_array_equal(leaf[0], same[0])
        assert (leaf[1:] != leaf[0]).any()


@zoo
def test_one_row_known_when_traced_and_seeds_as_an_axis(name):
    """A batch of one, whose values the model sees in Python, under `vmap` over two sets of variables."""
    model, inputs, variables, predict, output = example(name)
    alone = jax.tree.map(lambda x: x[:1], inputs)
    others = jax.tree.map(lambda leaf: np.float32(0.7) * leaf, variables)
    members = jax.tree.map(lambda *leaves: np.stack(leaves), variables, others)
    found = jit(jax.vmap(lambda variables: model.apply(variables, **alone, train=False)))(members)
    rows = (jax.tree.leaves(of_rows(name, each)) for each in (found, output, predict(others, inputs)))
    for leaf, *expected in zip(*rows, strict=True):
        for member, whole in zip(leaf, expected, strict=True):
            assert member.shape == whole[:1].shape
            np.testing.assert_allclose(member, whole[:1], atol=1e-4)


@zoo
def test_training_reaches_every_parameter_with_finite_gradients(name):
    model, inputs, variables, _, still = example(name)

    def loss(params):
        output = model.apply({**variables, "params": params}, **inputs, train=True, rngs=KEYS, mutable=True)[0]
        return sum(((leaf + 0.1) ** 2).sum() for leaf in jax.tree.leaves(output)), output  # outputs may start at 0

    gradients, output = jit(jax.grad(loss, has_aux=True))(variables["params"])
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert gradient.any(), path
    if any(getattr(model, rate, 0) for rate in ("dropout", "input_dropout")):
        pairs = zip(*(jax.tree.leaves(of_rows(name, each)) for each in (output, still)), strict=True)
        moved = [abs(a - b).max() / abs(b).max() for a, b in pairs]
        assert max(moved) > 1e-3


WHOLE = {"sequence.rnn.RNN", "sequence.rnn.GRU"}  # every unit of these is an output


@zoo
def test_channels_whose_parameters_are_zero_can_be_cut(name):
    """Every second one of each group. Where weights are divided by their norm, it must not be exactly 0."""
    model, inputs, variables, predict, _ = example(name)
    carries = name.startswith("sequence.rnn")  # its last state, which is left out here
    logits = lambda output: output[0] if carries and isinstance(output, tuple) else of_rows(name, output)
    apply = lambda variables, **inputs: logits(model.apply(variables, **inputs, train=False))
    variables = moved(variables, 0.3)
    found = structure.groups(apply, variables, **inputs)
    plan = structure.removing(channel for channels in found.free.values() for channel in channels[1::2])
    assert (name in WHOLE) == (not plan)
    if not plan:
        return
    zeros = jax.tree.map(lambda leaf: leaf + np.float32(1e-12), structure.zeroed(variables, plan))
    small, smaller = structure.cut(apply, variables, plan)
    output = jit(lambda variables, inputs: small(variables, **inputs))(smaller, inputs)
    for one, other in zip(*map(jax.tree.leaves, (output, logits(predict(zeros, inputs)))), strict=True):
        assert np.ptp(other, 0).any()
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * abs(other).max())


@zoo
def test_classifiers_give_one_logit_per_class(name):
    """Of an example or, if it is labelled point by point, of each of its points; a detector's are its heat."""
    model, inputs, *_, output = example(name)
    if not hasattr(model, "classes"):
        pytest.skip("not a classifier")
    logits = output["heat"] if isinstance(output, dict) else output
    assert (len(logits), logits.shape[-1]) == (len(jax.tree.leaves(inputs)[0]), model.classes)


def test_input_dropout_hides_pixels_and_only_in_training():
    model, image = MLP(hidden=(), classes=1, input_dropout=0.25), np.ones((1, 50, 80, 1), np.float32)
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((4000, 1)), "bias": jnp.zeros(1)}}}
    shown, whole = jit(
        lambda v: [model.apply(v, image, train=train, rngs={"dropout": jax.random.key(0)}) for train in (True, False)]
    )(variables)
    assert abs(float(shown[0, 0]) - 4000) > 1  # a draw of 4,000 pixels, each kept with probability 3/4 at 4/3
    assert abs(float(shown[0, 0]) - 4000) < 5 * 4 / 3 * np.sqrt(4000 * 3 / 16)
    np.testing.assert_allclose(whole, [[4000]])


def test_dropout_follows_its_key_and_only_in_training():
    model, inputs, variables, _, still = example("vision.mlp.MLP")
    train = jit(lambda key: model.apply(variables, **inputs, train=True, rngs={"dropout": key}))
    np.testing.assert_array_equal(train(jax.random.key(0)), train(jax.random.key(0)))
    assert (train(jax.random.key(0)) != train(jax.random.key(1))).any()
    never = jit(lambda: model.clone(dropout=0.0).apply(variables, **inputs, train=True))()
    np.testing.assert_allclose(never, still, atol=1e-6)


def test_mlp_against_numpy():
    _, inputs, variables, predict, _ = example("vision.mlp.MLP")
    params = moved(variables["params"], 0.1)
    x = inputs["image"].reshape(3, -1).astype(np.float64)
    for layer in ("Dense_0", "Dense_1"):
        x = np.maximum(x @ params[layer]["kernel"] + params[layer]["bias"], 0)
    x = x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    np.testing.assert_allclose(predict({"params": params}, inputs), x, atol=1e-5)


def test_deep_mlp_against_numpy():
    """BatchNorm stands before the activations and on the logits; only the second layer is as wide as what it gets."""
    _, inputs, variables, predict, _ = example("vision.mlp.DeepMLP")
    params, stats = moved(variables["params"], 0.1), moved(variables["batch_stats"], 0.1)
    assert params["Dense_0"].keys() == params["Dense_2"].keys() == {"kernel"}
    x = inputs["image"].reshape(3, -1).astype(np.float64)
    for i, residual in enumerate((0, 1)):
        y = batch_norm(x @ params[f"Dense_{i}"]["kernel"], params[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"])
        y = 1 / (1 + np.exp(-y))
        x = x + y if residual else y
    x = batch_norm(x @ params["Dense_2"]["kernel"], params["BatchNorm_2"], stats["BatchNorm_2"])
    found = predict({"params": params, "batch_stats": stats}, inputs)
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_mlp_draws_every_kernel_by_its_initialiser():
    model = MLP((3, 3), kernel_init=nn.initializers.constant(0.5))
    params = jit(lambda key: model.init(key, np.zeros((1, 2, 2, 1), np.float32), train=False))(KEYS["params"])["params"]
    assert all((layer["kernel"] == 0.5).all() for layer in params.values())


def test_lenet5_has_the_papers_parameters():
    params = example("vision.lenet.LeNet5").variables["params"]
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
    params = example("vision.lenet.LeNet5").variables["params"]
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
    _, inputs, variables, predict, _ = example("vision.lenet.LeNet5")
    params = moved(jax.tree.map(lambda leaf: 2 * leaf, variables["params"]), 0.05)  # no unit is saturated
    expected = [lenet5_in_numpy(params, image) for image in inputs["image"]]
    np.testing.assert_allclose(predict({"params": params}, inputs), expected, rtol=1e-5)


def test_lenet5_takes_the_border_or_adds_it():
    _, inputs, variables, predict, output = example("vision.lenet.LeNet5")
    wide = np.pad(inputs["image"], ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_array_equal(predict(variables, {"image": wide}), output)


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
        shapes(model, np.zeros((1, *shape), np.float32), train=False)


@pytest.mark.parametrize("hidden", [(0,), (16, -8)])
@pytest.mark.parametrize("model", [MLP, Discriminator, Generator])
def test_a_layer_without_units_is_refused(model, hidden):
    with pytest.raises(InputError, match=f"hidden is {min(hidden)}, expected more than 0"):
        shapes(model(hidden), np.zeros((1, 4), np.float32), train=False)


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
    penalties, labels, j = np.array([[1.0, 3.0, 2.0], [90.0, 80.0, 85.0]], np.float32), np.array([0, 1]), 1.5
    expected = [y[d] + np.log(np.exp(-j) + np.exp(-y).sum()) for y, d in zip(penalties, labels, strict=True)]

    def loss(logits):
        each = lenet.map_loss(logits, labels, j)
        return each.sum(), each

    gradient, found = jit(jax.grad(loss, has_aux=True))(-penalties)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    posterior = np.exp(-penalties) / (np.exp(-j) + np.exp(-penalties).sum(1, keepdims=True))
    np.testing.assert_allclose(gradient, posterior - np.eye(3)[labels], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_map_loss_of_labels_of_small_integers_and_outside_the_classes(dtype):
    logits = -np.random.default_rng(0).random((3, 200)).astype(np.float32)
    labels = np.array([0, 99, 255], np.uint8).astype(dtype)  # 255 is -1 in int8, and no class in either
    found = jit(lambda logits: lenet.map_loss(logits, labels, 1.0))(logits)
    known = np.log(np.exp(-1) + np.exp(logits[:2]).sum(1)) - logits[[0, 1], [0, 99]]
    np.testing.assert_allclose(found[:2], known, rtol=1e-5)
    assert np.isnan(found[2])


def test_map_loss_of_other_labels_and_in_low_precision():
    logits = jnp.asarray([[-1.0, -3.0], [-2.0, -0.5]], jnp.bfloat16)
    assert lenet.map_loss(logits, jnp.array([0, 1]), 1.0).dtype == jnp.float32
    for labels in (jnp.zeros((2, 2)), jnp.zeros(2)):
        with pytest.raises(InputError, match=r"map_loss: labels"):
            lenet.map_loss(logits, labels, 1.0)


def test_map_loss_without_rubbish_is_cross_entropy():
    logits, labels = np.array([[1.0, 3.0, 2.0]], np.float32), np.array([2])
    cross_entropy = np.log(np.exp(logits).sum()) - logits[0, 2]
    found = jit(lambda logits: lenet.map_loss(logits, labels, 1e9))(logits)
    np.testing.assert_allclose(found, [cross_entropy], rtol=1e-6)


def test_parameter_counts_of_the_pruning_nets():
    image = np.zeros((1, 28, 28, 1), np.float32)
    assert count(shapes(LeNet300(), image, train=False)) == 266_610
    caffe = shapes(LeNetCaffe(), image, train=False)["params"]
    assert count(caffe) == 431_080
    assert sum(layer["kernel"].size for layer in caffe.values()) == 430_500


def test_caffe_variant_starts_as_caffes_xavier():
    for layer in example("vision.lenet.LeNetCaffe").variables["params"].values():
        largest = np.sqrt(3 / np.prod(layer["kernel"].shape[:-1]))
        assert 0.95 * largest < abs(layer["kernel"]).max() <= largest
        assert not layer["bias"].any()


def test_caffe_variant_against_numpy():
    """There is no ReLU before that of the first dense layer."""
    _, inputs, variables, predict, _ = example("vision.lenet.LeNetCaffe")
    params, x = moved(variables["params"], 0.02), inputs["image"].astype(np.float64)
    for name in ("Conv_0", "Conv_1"):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), (1, 2))  # [B, H, W, C, 5, 5]
        x = np.einsum("bhwcij,ijcd->bhwd", windows, params[name]["kernel"], optimize=True) + params[name]["bias"]
        x = np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], 0)
    x = np.maximum(x.reshape(len(x), -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
    x = x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(predict({"params": params}, inputs), x, rtol=1e-5, atol=1e-5)


def test_normalised_lenet_against_numpy():
    """BatchNorm stands before each ReLU, and the layers before it have no bias."""
    _, inputs, variables, predict, _ = example("vision.lenet.NormalisedLeNet")
    params, stats = moved(variables["params"], 0.1), moved(variables["batch_stats"], 0.1)
    norm = lambda x, i: np.maximum(batch_norm(x, params[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"]), 0)
    assert all(params[name].keys() == {"kernel"} for name in ("Conv_0", "Conv_1", "Dense_0"))
    x = inputs["image"].astype(np.float64)
    for i in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), (1, 2))  # [B, H, W, C, 5, 5]
        x = norm(np.einsum("bhwcij,ijcd->bhwd", windows, params[f"Conv_{i}"]["kernel"], optimize=True), i)
        x = np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], 0)
    x = dense(norm(x.reshape(len(x), -1) @ params["Dense_0"]["kernel"], 2), params["Dense_1"])
    np.testing.assert_allclose(predict({"params": params, "batch_stats": stats}, inputs), x, rtol=1e-5, atol=1e-5)


def test_lenet5_trains_on_an_accelerator_with_plain_convolutions():
    _, inputs, variables, *_ = example("vision.lenet.LeNet5")
    gradient = jax.jit(jax.grad(lambda v, x: LeNet5().apply(v, x, train=True).sum()))
    text = gradient.trace(variables, inputs["image"]).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 5  # C1 and C3 forward, their kernels' gradients, C3's input's
