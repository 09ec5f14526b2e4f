"""Folded models compute what the models compute, without their normalisations; what stays is told with its reason."""

import functools
import importlib
import pkgutil

import flax.core
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import classify, inspect, models
from dl_jax.compress import fold
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import named
from dl_jax.models.layers import Normalise

IMAGE = np.random.default_rng(0).random((2, 8, 8, 4), np.float32)


def drawn(model, *inputs, **settings):
    return scattered(jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **settings)))


def scattered(shapes, seed=0):
    """Variables drawn at random, statistics too, with variances and scales around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        around = 1 if path[-1].key in ("var", "scale") else 0
        return rng.uniform(around - 0.6, around + 0.6, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# Most of the time of these tests goes into optimising what runs once.
soon_compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def names(variables):
    return {*named(variables)}


class Stranger(nn.Module):
    """A normalisation after a kernel of each kind."""

    @nn.compact
    def __call__(self, x, train=True):  # [B, 8, 8, 4]
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(use_scale=False)(nn.Conv(6, (3, 3), 2, name="strided")(x)))
        x = nn.gelu(norm(epsilon=0.1)(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name="depthwise")(x)))
        x = nn.tanh(norm(use_bias=False)(nn.Conv(8, (3, 1), feature_group_count=2, use_bias=False, name="grouped")(x)))
        x = nn.relu(norm()(nn.ConvTranspose(5, (3, 3), (2, 2), transpose_kernel=True, name="transposed")(x)))
        x = norm(axis=1)(jnp.moveaxis(nn.ConvTranspose(4, (2, 2), use_bias=False, name="upward")(x), -1, 1))
        x = nn.relu(x).reshape(x.shape[0], 4, -1)
        x = nn.relu(norm()(nn.Conv(3, (3,), kernel_dilation=2, name="sequence")(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = norm(axis=(-2, -1))(nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=False, name="general")(x))
        x = nn.relu(x).reshape(x.shape[0], -1)
        x = nn.relu(norm(use_scale=False, use_bias=False)(nn.Dense(7, use_bias=False, name="dense")(x)))
        return nn.Dense(3, name="head")(x)


@functools.cache
def stranger():
    model = Stranger()
    variables = drawn(model, IMAGE, train=False)
    return model, variables, *fold.folded(model.apply, variables, IMAGE[:1], train=False)


@functools.cache
def expected():
    return soon_compiled(functools.partial(stranger()[0].apply, train=False))(stranger()[1], IMAGE)


def test_a_normalisation_after_each_kind_of_kernel():
    _, variables, apply, small = stranger()
    kernels = {name for name in names(variables) if name.endswith("kernel")}
    assert names(small) == kernels | {name.replace("kernel", "bias") for name in kernels}
    assert np.abs(expected()).max() > 0.1
    assert_same(soon_compiled(apply)(small, IMAGE), expected())


def test_a_folded_model_runs_as_in_evaluation_and_returns_what_is_left_of_its_collections():
    *_, apply, small = stranger()
    training = {"train": True, "rngs": {"dropout": jax.random.key(0)}}
    found, collections = soon_compiled(lambda v: apply(v, IMAGE, **training, mutable=["batch_stats"]))(small)
    assert_same(found, expected())
    assert collections == {}


def test_it_takes_any_batch_and_can_be_rewritten_again():
    *_, apply, small = stranger()
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *IMAGE.shape[1:]), IMAGE.dtype)
    exported = jax.export.export(jax.jit(lambda image: apply(small, image)))(shape)
    assert_same(exported.call(np.concatenate([IMAGE] * 3)), np.concatenate([expected()] * 3))
    assert_same(fold.folded(apply, small, IMAGE)[1], small, 0)


def test_a_stack_of_seeds():
    model, variables, apply, small = stranger()
    members = [variables, scattered(variables, 1)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    shrink = lambda variables: fold.folded(model.apply, variables, IMAGE, train=False)[1]
    folded = jax.vmap(shrink)(stack)
    assert_same(jax.tree.map(lambda leaf: leaf[0], folded), small)
    assert_same(soon_compiled(jax.vmap(apply, (0, None)))(folded, IMAGE)[0], expected())
    stack["batch_stats"]["BatchNorm_0"]["var"][1, 2] = -3
    with pytest.raises(InputError, match="gives NaN or infinite values, expected finite numbers"):
        jax.vmap(shrink)(stack)


class Plain(nn.Module):
    """A convolution with and one without normalisation."""

    norm: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), 2, use_bias=not self.norm, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x) if self.norm else x
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


@functools.cache
def plain():
    model = Plain(norm=True)
    variables = drawn(model, IMAGE, train=False)
    return model, variables, *fold.folded(functools.partial(model.apply, train=False), variables, IMAGE)


def test_outputs_of_layers_can_be_had_but_not_of_what_is_folded():
    model, variables, apply, small = plain()
    read = lambda apply, path: soon_compiled(lambda v: inspect.with_outputs(apply, path)(v, IMAGE, train=False))
    assert_same(read(apply, "norm")(small), read(model.apply, "norm")(variables))
    with pytest.raises(InputError, match="reads values in a folded layer, expected what `folded` saw"):
        read(apply, "conv")(small)


def test_gradients_and_fine_tuning():
    """A folded model trains as the one that never had a normalisation does."""
    *_, apply, small = plain()
    assert {*small} == {"params"}
    batch, key = {"image": IMAGE, "label": np.array([0, 2])}, jax.random.key(0)
    gradient = lambda apply: jax.grad(lambda v: classify.loss(apply)(v, batch, key)[0])
    found, expected = soon_compiled(lambda v: [gradient(f)(v) for f in (apply, Plain(norm=False).apply)])(small)
    assert_same(found, expected)


class Before(nn.Module):
    """Normalisations that only the kernel after them can take."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = Normalise((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))(x)
        x = nn.relu(norm()(nn.Conv(6, (3, 3), padding="VALID", use_bias=False, name="first")(x)))
        x = norm(name="grouped_norm")(x)
        x = nn.relu(nn.Conv(4, (2, 2), padding="VALID", feature_group_count=2, use_bias=False, name="grouped")(x))
        x = x * self.param("gain", nn.initializers.ones, (4,))
        x = nn.relu(nn.Conv(4, (3, 3), name="padded")(x))
        return nn.Dense(2, name="head")(norm(name="head_norm")(x))


def test_into_the_kernel_after_it_where_that_does_not_pad():
    model = Before()
    variables = drawn(model, IMAGE)
    apply, small = fold.folded(model.apply, variables, IMAGE)
    layers = ("first", "grouped", "padded", "head")
    assert names(small) == {f"params/{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")}
    assert_same(soon_compiled(apply)(small, IMAGE), soon_compiled(model.apply)(variables, IMAGE))
    constants = jax.make_jaxpr(apply)(small, IMAGE).jaxpr.eqns
    assert not {"sub", "div", "mul", "rsqrt"} & {equation.primitive.name for equation in constants}


class Kept(nn.Module):
    """Normalisations that cannot be folded, and one that can."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm(name="folded")(nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)))
        x = nn.Conv(4, (3, 3), name="padded")(norm(name="before_padding")(x))
        x = nn.relu(norm(name="read_twice")(x) + x)
        twice = nn.Dense(4, name="twice")
        x = twice(nn.relu(norm(name="shared")(twice(x))))
        x = norm(axis=1, name="rows")(nn.Dense(4, name="dense")(x))
        x = nn.relu(norm(name="computed")(nn.WeightNorm(nn.Dense(4))(nn.relu(x))))
        layer = nn.scan(Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)
        x, _ = layer(name="layers")(x, None)
        return nn.Dense(3)(nn.relu(norm(name="after_mean")(nn.relu(x).mean((1, 2)))))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))), None


def test_what_is_left_is_told_with_the_reason():
    model = Kept()
    variables = drawn(model, IMAGE)
    apply, small = fold.folded(model.apply, variables, IMAGE)
    found = fold.remaining(model.apply, variables, IMAGE)
    assert names(small) == {name for name in names(variables) if "/folded/" not in name} | {"params/conv/bias"}
    assert_same(soon_compiled(apply)(small, IMAGE), soon_compiled(model.apply)(variables, IMAGE))
    assert found == {
        "before_padding": "the convolution after it pads with zeros, which would have to be shifted as well",
        "read_twice": "what it normalises is read by something else as well",
        "shared": "twice/kernel, the kernel before it, is used more than once",
        "rows": "its values vary along other axes than the channels of the kernel before it",
        "computed": "the kernel before it is computed from Dense_0/kernel, WeightNorm_0/Dense_0/kernel/scale",
        "layers/BatchNorm_0": "the operation 'scan' reads it",
        "after_mean": "it follows no kernel, and no kernel alone takes its result",
    }


def pairs_of_the_zoo():
    """Models with statistics; their inputs by name."""
    for module in pkgutil.walk_packages(models.__path__, "dl_jax.models."):
        if not module.ispkg and module.name.count(".") == 3:
            for name, (model, inputs) in importlib.import_module(module.name).examples().items():
                shapes = jax.eval_shape(lambda m=model, i=inputs: m.init(jax.random.key(0), **i, train=False))
                if "batch_stats" in shapes:
                    yield name, model, inputs, shapes


def test_every_model_of_the_zoo():
    found = {}
    for name, model, inputs, shapes in pairs_of_the_zoo():
        variables, inputs = scattered(shapes), [*inputs.values()]
        apply, small = fold.folded(model.apply, variables, *inputs, train=False)
        found[name] = fold.remaining(model.apply, variables, *inputs, train=False)
        assert {*small} == {"params"}
        assert not any("norm" in path.lower() for path in names(small))
        both = soon_compiled(lambda v, w: (apply(w, *inputs), model.apply(v, *inputs, train=False)))  # noqa: B023
        assert_same(*both(variables, small))
    assert {*found} >= {
        "PointNet",
        "HeatMapDetector",
        "DeepMLP",
        "NormalisedLeNet",
        "MobileNetV1",
        "MobileNetV2",
        "CifarResNet",
        "ResNet",
        "Xception",
    }
    assert not any(found.values())


def own(variables, image):  # a model without Flax
    params, (mean, variance) = variables["params"], variables["running"]
    x = jnp.einsum("bhwc,dc->dbhw", image, params["layers"][0]["weights"])
    x = (x - mean[:, None, None, None]) / jnp.sqrt(variance + 1e-3)[:, None, None, None]
    x = jax.nn.relu(params["layers"][0]["gain"].reshape(-1, 1, 1, 1) * x + params["shift"])
    return x.mean((2, 3)).T @ params["layers"][1]


def test_a_model_without_flax_in_other_containers():
    rng = np.random.default_rng(0)
    weights, gain, last = (rng.normal(size=shape).astype(np.float32) for shape in [(5, 4), (5,), (5, 3)])
    variables = {
        "params": {"layers": [flax.core.freeze({"weights": weights, "gain": gain}), last], "shift": np.float32(0.3)},
        "running": (np.float32([0.1, 0.2, 0.3, 0.4, 0.5]), np.float32([1, 2, 3, 4, 5])),
    }
    apply, small = fold.folded(own, variables, IMAGE)
    assert names(small) == {"params/layers/0/weights", "params/layers/0/bias", "params/layers/1"}
    scale = gain / np.sqrt(np.float32([1, 2, 3, 4, 5]) + 1e-3)
    np.testing.assert_allclose(small["params"]["layers"][0]["weights"], weights * scale[:, None], rtol=1e-5)
    shift = 0.3 - scale * [0.1, 0.2, 0.3, 0.4, 0.5]
    np.testing.assert_allclose(small["params"]["layers"][0]["bias"], shift, rtol=1e-5, atol=1e-6)
    assert_same(apply(flax.core.freeze(small), IMAGE), own(variables, IMAGE))


def test_half_precision_stays_half_precision():
    model = nn.Sequential([nn.Conv(4, (3, 3), dtype=jnp.bfloat16), nn.BatchNorm(True, dtype=jnp.bfloat16)])
    variables = drawn(model, IMAGE)
    apply, small = fold.folded(model.apply, variables, IMAGE)
    assert names(small) == {"params/layers_0/kernel", "params/layers_0/bias"}
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype("float32")}
    assert_same(soon_compiled(apply)(small, IMAGE), soon_compiled(model.apply)(variables, IMAGE), 0.03)


def test_a_folded_model_takes_other_types_and_computes_in_those_that_it_was_folded_with():
    _, _, apply, small = plain()
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    again = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halves)
    np.testing.assert_array_equal(soon_compiled(apply)(halves, IMAGE), soon_compiled(apply)(again, IMAGE))


def test_a_bias_with_another_use_is_not_replaced():
    def apply(variables, x):
        layer = variables["params"]["layer"]
        return jax.nn.relu((x @ layer["kernel"]) * variables["stats"]["layer"]["scale"]) + layer["bias"]

    kernel, ones = np.eye(4, dtype=np.float32), np.ones(4, np.float32)
    variables = {"params": {"layer": {"kernel": kernel, "bias": ones}}, "stats": {"layer": {"scale": ones}}}
    _, small = fold.folded(apply, variables, IMAGE)
    assert names(small) == names(variables)
    (why,) = fold.remaining(apply, variables, IMAGE).values()
    assert why.startswith("the kernel before it has no place for a bias")


class BesideBias(nn.Module):
    """A bare kernel beside a module that is called bias."""

    @nn.compact
    def __call__(self, x):
        x = x @ self.param("kernel", nn.initializers.normal(1.0), (4, 4))
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        return nn.Dense(4, name="bias")(x)


def test_a_module_that_is_called_bias_is_not_replaced():
    variables = drawn(BesideBias(), IMAGE)
    apply, small = fold.folded(BesideBias().apply, variables, IMAGE)
    assert names(small) == names(variables)
    assert_same(apply(small, IMAGE), BesideBias().apply(variables, IMAGE))
    (why,) = fold.remaining(BesideBias().apply, variables, IMAGE).values()
    assert why.startswith("the kernel before it has no place for a bias: `bias` beside it is a module")


class Counting(nn.Module):
    """A normalisation that counts its calls, layers with a spectral norm, a fixed kernel, a cache, and a print."""

    @nn.compact
    def __call__(self, x, train=False):
        count = self.variable("batch_stats", "count", lambda: jnp.zeros((), jnp.int32))
        fixed = self.variable("frozen", "kernel", lambda: jnp.ones((4, 4)))
        self.variable("cache", "last", lambda: jnp.zeros(4))
        if train:
            count.value += 1
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="dense")(x)))
        jax.debug.callback(lambda x: None, x)
        x = x @ fixed.value + nn.relu(x @ fixed.value)
        return nn.SpectralNorm(nn.Dense(4, name="spectral"), name="factor")(x, update_stats=train)


def test_what_is_left_are_statistics_neither_counters_nor_kernels():
    model = Counting()
    variables = drawn(model, IMAGE)
    apply, small = fold.folded(model.apply, variables, IMAGE)
    assert names(variables) - names(small) == {"params/norm/bias", "params/norm/scale"} | {
        f"batch_stats/norm/{each}" for each in ("mean", "var")
    }
    assert_same(apply(small, IMAGE), model.apply(variables, IMAGE))
    unread = "this call reads none of its statistics; give the settings of evaluation, such as train=False"
    found = fold.remaining(model.apply, variables, IMAGE)
    assert found == {"factor": "a kernel is computed from it", "": unread}
    training = lambda *args: model.apply(*args, train=True, mutable=True)[0]
    assert fold.remaining(training, variables, IMAGE) == {**found, "norm": unread}


def test_a_layer_with_nothing_to_fold_stays_as_it_is():
    variables = {"params": {"layer": {"w": np.eye(4, dtype=np.float32), "b": np.ones(4, np.float32)}}}
    apply, same = fold.folded(lambda v, x: x @ v["params"]["layer"]["w"] + v["params"]["layer"]["b"], variables, IMAGE)
    assert names(same) == names(variables)
    np.testing.assert_array_equal(apply(same, IMAGE), IMAGE + 1)


def test_bad_input_has_one_clear_line():
    model, variables, apply, small = plain()
    changed = lambda leaf, value: jax.tree_util.tree_map_with_path(
        lambda path, each: np.full_like(each, value) if path[-1].key == leaf else each, variables
    )
    found = lambda variables: fold.folded(model.apply, variables, IMAGE, train=False)
    with pytest.raises(InputError, match=r"^batch_stats/norm/mean has NaN or infinite values, expected finite"):
        found(changed("mean", np.nan))
    with pytest.raises(InputError, match=r"^folding .*batch_stats/norm/var.* look for a negative variance"):
        found(changed("var", -0.5))
    with pytest.raises(InputError, match=r"^the variables have batch_stats/norm/mean, expected those that `folded`"):
        apply(variables, IMAGE)
    with pytest.raises(InputError, match=r"^the variables lack params/conv/bias, expected those that `folded`"):
        apply({"params": {**small["params"], "conv": {"kernel": small["params"]["conv"]["kernel"]}}}, IMAGE)
    narrow = jax.tree.map(lambda leaf: leaf[..., :2], small)
    with pytest.raises(InputError, match=r"^params/conv/bias has shape \(2,\), expected \(\d+,\) as in the variables"):
        apply(narrow, IMAGE)
    unsettled, _ = fold.folded(
        lambda v, x, train=False: model.apply(v, x, train=train, mutable=train), variables, IMAGE
    )
    with pytest.raises(InputError, match=r"^with these arguments the model normalises by its batch"):
        unsettled(small, IMAGE, train=True)
    unread = fold.remaining(lambda v, x: model.apply(v, x, train=True, mutable=True)[0], variables, IMAGE)
    assert unread["norm"].startswith("this call reads none of its statistics; give the settings of evaluation")


def test_nothing_of_a_normalisation_is_left_in_exported_files(tmp_path):
    onnx = pytest.importorskip("onnx")
    from dl_jax.export import onnx as to_onnx
    from dl_jax.export import stablehlo

    model, variables, apply, small = plain()
    bare = functools.partial(Plain(norm=False).apply, train=False)
    kinds = {}
    for each in (apply, bare):
        to_onnx.export(each, small, [IMAGE], tmp_path / "model.onnx")
        kinds[each] = sorted(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds[apply] == kinds[bare]
    assert not {*kinds[bare]} & {"Sub", "Mul", "Sqrt", "BatchNormalization"}  # Div is that of the mean
    stablehlo.export(apply, small, [IMAGE], tmp_path / "folded.hlo")
    expected = jax.jit(functools.partial(model.apply, train=False))(variables, IMAGE)
    assert_same(stablehlo.load(tmp_path / "folded.hlo")(IMAGE), expected)


class TwoKernels(nn.Module):
    """One module with two kernels, between which a new bias could not be told apart."""

    @nn.compact
    def __call__(self, x, *, train):
        for name in ("one", "two"):
            x = x @ self.param(name, nn.initializers.normal(1.0), (x.shape[-1], 5))
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return x


def test_kernels_that_would_share_a_new_bias_stay():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    variables = drawn(TwoKernels(), x, train=False)
    apply, new = fold.folded(TwoKernels().apply, variables, x, train=False)
    np.testing.assert_allclose(apply(new, x), TwoKernels().apply(variables, x, train=False), rtol=1e-5)
    assert set(fold.remaining(TwoKernels().apply, variables, x, train=False)) == {"BatchNorm_0", "BatchNorm_1"}
