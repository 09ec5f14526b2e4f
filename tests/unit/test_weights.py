"""Weights from PyTorch and back, against what PyTorch computed once (see torch_weights.py), and against itself."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_weights
from torch_weights import GOLDEN, SIZES, drawn, images

from dl_jax.core.errors import InputError
from dl_jax.export import weights
from dl_jax.models.vision import resnet
from dl_jax.models.vision.mobilenet import MobileNetV2
from dl_jax.models.vision.resnet import CifarResNet

V2 = [count for _, _, count, _ in MobileNetV2().groups]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NETS = {
    "resnet20": (CifarResNet, weights.resnet((3, 3, 3), 2, "linear")),
    **{
        f"resnet{n}": (getattr(resnet, f"ResNet{n}"), weights.resnet(blocks, 2 if n < 50 else 3))
        for n, blocks in BLOCKS.items()
    },
    "mobilenet_v2": (MobileNetV2, weights.mobilenet_v2(V2)),
    "mobilenetv2_100": (MobileNetV2, weights.timm_mobilenet_v2(V2)),
}
SLOW = ("resnet34", "resnet50", "resnet101", "resnet152", "mobilenetv2_100")  # these take seconds to trace and compile
each_net = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SIZES])


@functools.cache
def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def zeros(model, size=32, channels=3):
    """Variables in the shapes that the model starts with."""
    image = jnp.zeros((1, size, size, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@functools.cache
def loaded(name):
    """The model, its variables with the drawn weights, the report, and the state dict itself."""
    kind, layers = NETS[name]
    state = drawn(golden(name)["keys"])
    return kind(), *weights.from_torch(state, zeros(kind()), layers), state


def assert_same(found, expected):
    """To a hundred-thousandth of the largest logit, or of one where all are smaller."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@each_net
def test_logits_are_those_of_pytorch(name):
    model, variables, _, _ = loaded(name)
    logits = jax.jit(lambda v, image: model.apply(v, image, train=False))(variables, images(SIZES[name]))
    assert_same(logits if model.classes == 10 else logits[:, :: torch_weights.EVERY], golden(name)["logits"])


@each_net
def test_every_key_comes_back_as_it_was_and_is_reported(name):
    _, variables, report, state = loaded(name)
    back = weights.to_torch(variables, NETS[name][1])
    assert back.keys() == state.keys()
    for key, array in state.items():
        assert back[key].dtype == array.dtype
        np.testing.assert_array_equal(back[key], array)
    assert {entry.key: entry.shape for entry in report} == {key: array.shape for key, array in state.items()}
    assert len({entry.leaf for entry in report if entry.leaf}) == len(jax.tree.leaves(variables))


def test_a_step_of_sgd_is_that_of_pytorch():
    """Batch normalisation, the gradient of every parameter, and the running averages."""
    model, variables, _, _ = loaded("resnet20")
    image = images(SIZES["resnet20"])

    def loss(params):
        logits, new = model.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(2), jnp.arange(2)].mean(), (logits, new)

    gradients, (logits, new) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert_same(logits, golden("resnet20")["train"])
    params = jax.tree.map(lambda p, g: p - torch_weights.LEARNING_RATE * g, variables["params"], gradients)
    after = weights.to_torch({"params": params, **new}, NETS["resnet20"][1])
    rows = {16: 2 * 32 * 32, 32: 2 * 16 * 16, 64: 2 * 8 * 8}  # that a map's statistics are of
    for key, expected in golden("resnet20")["updated"].items():
        if key.endswith("num_batches_tracked"):
            continue
        found = after[key].flatten()[:4]
        if key.endswith("running_var"):  # PyTorch's is divided by n - 1
            before, n = variables["batch_stats"], rows[after[key].size]
            old = weights.to_torch({"batch_stats": before}, NETS["resnet20"][1])[key][:4]
            found = 0.9 * old + (found - 0.9 * old) * n / (n - 1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=key)


def changed(**changes):
    """ResNet-20's state dict with other arrays; None takes one away."""
    state = {**drawn(golden("resnet20")["keys"]), **{key.replace("__", "."): v for key, v in changes.items()}}
    return {key: array for key, array in state.items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn1__weight": None}, r"key bn1\.weight: found none, expected shape \[16\]"),
        (
            {"linear__wieght": np.ones(3)},
            r"linear\.wieght: found shape \[3\], expected no such key; did you mean linear",
        ),
        ({"linear__weight": np.ones((64, 10), "f")}, r"linear\.weight: found shape \[64, 10\], expected \[10, 64\]"),
        (
            {"conv1__weight": np.ones((16, 1, 3, 3), "f")},
            r"conv1\.weight: found shape \[16, 1, 3, 3\], expected \[16, 3",
        ),
        ({"conv1__weight": np.ones((16, 3, 3, 3), "i1")}, r"conv1\.weight: found int8, expected a float type"),
        ({"bn1__num_batches_tracked": np.zeros(3)}, r"bn1\.num_batches_tracked: found shape \[3\], expected \[\]"),
        ({"bn1__bias": np.full(16, -1e300)}, r"bn1\.bias: found -1e\+300, expected numbers up to 3\.4e\+38"),
        ({"fc__num_batches_tracked": np.zeros(())}, r"fc\.num_batches_tracked: found shape \[\], expected no such key"),
        (
            {"layer1__0__downsample__0__weight": np.ones((16, 16, 1, 1))},
            r"downsample\.0\.weight: .* expected no such key",
        ),
    ],
)
def test_a_wrong_key_is_refused(changes, message):
    with pytest.raises(InputError, match=message) as raised:
        weights.from_torch(changed(**changes), zeros(CifarResNet()), NETS["resnet20"][1])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "classifier",
    [
        {"linear__weight": np.ones((10, 99), "f")},
        {"linear__weight": np.ones(10, "f")},
        {"linear__bias": np.ones((10, 1), "f")},
        {"linear__bias": np.ones((), "f")},
    ],
)
def test_a_classifier_of_other_features_is_refused_with_new_classes_too(classifier):
    ((key, array),) = classifier.items()
    name, found = key.replace("__", r"\."), str(list(array.shape)).replace("[", r"\[")
    with pytest.raises(InputError, match=rf"key {name}: found shape {found}, expected \[7"):
        weights.from_torch(changed(**classifier), zeros(CifarResNet(classes=7)), NETS["resnet20"][1], new_classes=True)


def test_the_map_of_another_model_is_refused():
    with pytest.raises(InputError, match=r"leaf batch_stats/stage1_block0/norm3/mean: found no key"):
        weights.to_torch(zeros(resnet.ResNet50()), weights.resnet(BLOCKS[50], 2))


def test_counters_may_be_missing_and_half_precision_becomes_single():
    state = {key: array.astype(np.float16) for key, array in changed().items() if "num_batches" not in key}
    variables, report = weights.from_torch(state, zeros(CifarResNet()), NETS["resnet20"][1])
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], state["linear.bias"].astype(np.float32))
    assert len(report) == len(state)


def test_other_classes_on_request_alone():
    layers, start = NETS["resnet20"][1], zeros(CifarResNet(classes=7))
    start["params"]["head"]["kernel"] += 0.5
    with pytest.raises(InputError, match=r"linear\.bias: found shape \[10\], expected \[7\]; .* new_classes"):
        weights.from_torch(changed(), start, layers)
    variables, report = weights.from_torch(changed(), start, layers, new_classes=True)
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], start["params"]["head"]["kernel"])
    assert variables["params"]["stem_norm"]["scale"].all()
    anew = [str(entry) for entry in report if entry.how == "initialised anew"]
    assert anew == [
        "linear.bias [10] -> params/head/bias: initialised anew",
        "linear.weight [10, 64] -> params/head/kernel: initialised anew",
    ]


def test_other_channels_on_request_alone():
    layers, kernel = NETS["resnet20"][1], changed()["conv1.weight"]
    with pytest.raises(InputError, match=r"conv1\.weight: found shape \[16, 3, 3, 3\], expected \[16, 1, 3, 3\]"):
        weights.from_torch(changed(), zeros(CifarResNet(), channels=1), layers)
    expected = {  # a grey image as one channel gives what it gives in three; the others keep the sum of repeated ones
        1: kernel[:, :1] + kernel[:, 1:2] + kernel[:, 2:],
        2: kernel[:, [0, 1]] * 1.5,
        3: kernel,
        5: kernel[:, [0, 1, 2, 0, 1]] * 0.6,
    }
    for channels, by_hand in expected.items():
        start = zeros(CifarResNet(), channels=channels)
        variables, report = weights.from_torch(changed(), start, layers, new_channels=True)
        found = variables["params"]["stem_conv"]["kernel"]
        np.testing.assert_allclose(found, by_hand.transpose(2, 3, 1, 0), rtol=1e-6)
        (how,) = (entry.how for entry in report if entry.key == "conv1.weight")
        assert how == ("transposed" if channels == 3 else f"transposed, with {channels} channels")


def test_files(tmp_path):
    state = changed()
    weights.save(tmp_path / "ours.safetensors", state)
    found = weights.load(tmp_path / "ours.safetensors")
    assert found.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(found[key], array)
    with pytest.raises(InputError, match=r"cannot read .*none\.safetensors"):
        weights.load(tmp_path / "none.safetensors")
    content = (tmp_path / "ours.safetensors").read_bytes()
    for wrong in (b"", b"PK\x03\x04", content[:-1]):
        (tmp_path / "wrong.safetensors").write_bytes(wrong)
        with pytest.raises(InputError, match=r"wrong\.safetensors is not a safetensors file"):
            weights.load(tmp_path / "wrong.safetensors")


def test_our_variables_come_back_by_name_with_their_types(tmp_path):
    path = tmp_path / "net.safetensors"
    variables = {
        "params": {"dense": {"kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "bias": jnp.float32(2)}},
        "state": {"seen": np.array([True, False]), "codes": np.arange(-2, 2, dtype=np.int8), "f": np.float64([0.1])},
    }
    weights.save_variables(path, variables)
    found = weights.load_variables(path)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs), strict=True)
    assert set(weights.load(path)) == {
        "params/dense/kernel",
        "params/dense/bias",
        "state/seen",
        "state/codes",
        "state/f",
    }
    whole = path.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little"), len(whole)):  # the numbers
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(InputError, match=r"is damaged: its checksum does not match; copy it again"):
            weights.load_variables(path)


@pytest.mark.parametrize("wrong", [np.ones(2), {"a": [np.ones(2)]}, {"a/b": np.ones(2)}])
def test_variables_without_a_plain_name_are_refused(wrong, tmp_path):
    with pytest.raises(InputError, match=r"the variables have a leaf at .*, expected dicts by strings without a slash"):
        weights.save_variables(tmp_path / "net.safetensors", wrong)
    assert not list(tmp_path.iterdir())


@each_net
def test_against_pytorch_itself(name):
    """A state dict that we wrote fits PyTorch's network with every key, and both compute the same."""
    for package in (
        "torch",
        *(["timm"] if name == "mobilenetv2_100" else ["torchvision"] if name != "resnet20" else []),
    ):
        pytest.importorskip(package, reason=f"{package}, to compare with, is not installed", exc_type=ImportError)
    model, variables, _, _ = loaded(name)
    image = np.random.default_rng(2).standard_normal((2, SIZES[name], SIZES[name], 3), np.float32)
    expected = torch_weights.logits_of(torch_weights.network(name), weights.to_torch(variables, NETS[name][1]), image)
    assert_same(jax.jit(lambda v, image: model.apply(v, image, train=False))(variables, image), expected)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(InputError, match=r"a file of weights needs safetensors.*, .* run: pip install"):
        weights.save(tmp_path / "ours.safetensors", {})
