"""Weights in safetensors files: our variables, and those of PyTorch networks. `pip install -e '.[export]'`.

    save_variables("net.safetensors", variables)  # params/conv/kernel, ...; every type is kept
    variables = load_variables("net.safetensors")

Such a file, beside the code of the network, outlives an exported program. It can be read in any language.

For PyTorch's networks, a `Layers` map names each layer twice: with the prefix that PyTorch gives its keys, and with the
path of our module. The tensors of a layer follow from the leaves of our module: a kernel [kh, kw, C, D] is PyTorch's
weight [D, C, kh, kw], a dense one [C, D] is its [D, C], and batch normalisation has weight, bias, running_mean and
running_var. Its num_batches_tracked, which PyTorch uses only without a momentum, is accepted and is written as zero.

    model = ResNet50(classes=10)
    variables = model.init(jax.random.key(0), image, train=False)
    layers = resnet(model.blocks, 3)
    variables, report = from_torch(load("resnet50.safetensors"), variables, layers, new_classes=True)
    save("ours.safetensors", to_torch(variables, layers))
"""

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError, nearest, not_installed, reason
from dl_jax.export import read, write

Path = tuple[str, ...]  # of a module in our variables
State = dict[str, np.ndarray]  # PyTorch's: key -> array

NAMES = {  # (our collection, our leaf) -> the last part of PyTorch's key
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
COUNTER = "num_batches_tracked"
DIGEST = "dl_jax.crc32"  # an entry of a file's metadata
TYPES = {  # safetensors' name -> NumPy's type
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
    "C64": np.dtype(np.complex64),
}


class Layers(NamedTuple):
    """The layers of a network: the prefix of PyTorch's keys -> the path of our module."""

    paths: Mapping[str, Path]
    first: str  # the convolution that takes the image, by its prefix
    classifier: str


class Entry(NamedTuple):
    """What became of one key: a line of the report."""

    key: str  # PyTorch's
    leaf: str  # ours, its path with slashes; "" for a counter
    shape: tuple[int, ...]  # PyTorch's
    how: str

    def __str__(self) -> str:
        return f"{self.key} {list(self.shape)} -> {self.leaf or '-'}: {self.how}"


def resnet(blocks: Sequence[int], convolutions: int, classifier: str = "fc") -> Layers:
    """The layers of torchvision's and timm's ResNets, which have the same keys, and of our `ResNet`.

    `blocks` are the numbers of blocks of the stages, and `convolutions` those of a block: 2, or 3 in a bottleneck. With
    `classifier="linear"` they are those of github.com/akamaster/pytorch_resnet_cifar10 and of our `CifarResNet`.
    """
    paths: dict[str, Path] = {"conv1": ("stem_conv",), "bn1": ("stem_norm",)}
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            theirs, ours = f"layer{stage}.{i}", f"stage{stage}_block{i}"
            for n in range(1, convolutions + 1):
                paths |= {f"{theirs}.conv{n}": (ours, f"conv{n}"), f"{theirs}.bn{n}": (ours, f"norm{n}")}
            paths[f"{theirs}.downsample.0"] = (ours, "conv_shortcut")
            paths[f"{theirs}.downsample.1"] = (ours, "norm_shortcut")
    return Layers({**paths, classifier: ("head",)}, "conv1", classifier)


def mobilenet_v2(blocks: Sequence[int]) -> Layers:
    """The layers of torchvision's `mobilenet_v2` and of our `MobileNetV2`, from the number of blocks of each group."""
    names = [f"group{group}_block{i}" for group, count in enumerate(blocks) for i in range(count)]
    last = f"features.{len(names) + 1}"
    paths: dict[str, Path] = {"features.0.0": ("stem_conv",), "features.0.1": ("stem_norm",)}
    for place, ours in enumerate(names, 1):
        theirs, skipped = f"features.{place}.conv", int(place == 1)  # the first block has no expansion
        if not skipped:
            paths |= {f"{theirs}.0.0": (ours, "expand_conv"), f"{theirs}.0.1": (ours, "expand_norm")}
        depthwise, project = f"{theirs}.{1 - skipped}", 2 - skipped
        paths |= {f"{depthwise}.0": (ours, "depthwise_conv"), f"{depthwise}.1": (ours, "depthwise_norm")}
        paths[f"{theirs}.{project}"] = (ours, "project_conv")
        paths[f"{theirs}.{project + 1}"] = (ours, "project_norm")
    paths |= {f"{last}.0": ("last_conv",), f"{last}.1": ("last_norm",), "classifier.1": ("head",)}
    return Layers(paths, "features.0.0", "classifier.1")


def timm_mobilenet_v2(blocks: Sequence[int]) -> Layers:
    """The layers of timm's `mobilenetv2_100` and its like, and of our `MobileNetV2`."""
    paths: dict[str, Path] = {"conv_stem": ("stem_conv",), "bn1": ("stem_norm",)}
    for group, count in enumerate(blocks):
        for i in range(count):
            parts = ("expand", "depthwise", "project") if group else ("depthwise", "project")
            convolutions = ("conv_pw", "conv_dw", "conv_pwl") if group else ("conv_dw", "conv_pw")
            for n, (part, convolution) in enumerate(zip(parts, convolutions, strict=True), 1):
                theirs, ours = f"blocks.{group}.{i}", f"group{group}_block{i}"
                paths |= {f"{theirs}.{convolution}": (ours, f"{part}_conv"), f"{theirs}.bn{n}": (ours, f"{part}_norm")}
    paths |= {"conv_head": ("last_conv",), "bn2": ("last_norm",), "classifier": ("head",)}
    return Layers(paths, "conv_stem", "classifier")


def load(path: str | os.PathLike[str]) -> State:
    """The arrays of a safetensors file.

    Raises InputError where it cannot be read, is none, holds numbers of a type that NumPy lacks, or is damaged. The
    last is noticed in files of `save` and `save_variables`, which hold a digest, and in others where it is a matter of
    their form.
    """
    _safetensors()
    data = read(path)
    import safetensors

    try:
        tensors = safetensors.deserialize(data)
        state = {k: np.frombuffer(v["data"], TYPES[v["dtype"]]).reshape(v["shape"]) for k, v in tensors}
        length = int.from_bytes(data[:8], "little")
        digest = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get(DIGEST)
    except Exception as e:  # safetensors has its own class of errors
        raise InputError(f"{path} is not a safetensors file of NumPy's types ({reason(e)}); save it as float32") from e
    if digest not in (None, _digest(state)):
        raise InputError(f"{path} is damaged: its checksum does not match; copy it again or save the weights again")
    return state


def save(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a safetensors file, which is replaced if it exists. Raises InputError where this fails."""
    arrays = {key: np.asarray(array, order="C") for key, array in state.items()}
    write(path, _safetensors().save(arrays, metadata={DIGEST: _digest(arrays)}))


def save_variables(path: str | os.PathLike[str], variables: Any) -> None:
    """Writes variables to a safetensors file, which is replaced if it exists; a leaf is named by its path with slashes.

    Raises InputError where the variables are anything but dicts of arrays, by strings without a slash, and where the
    file cannot be written.
    """
    state = {}
    for path_, leaf in jax.tree_util.tree_leaves_with_path(variables):
        keys = [key for entry in path_ if isinstance(key := getattr(entry, "key", None), str) and "/" not in key]
        if not keys or len(keys) < len(path_):
            raise InputError(
                f"the variables have a leaf at {jax.tree_util.keystr(path_) or 'their top'}, expected dicts by strings "
                "without a slash; dequantise the weights, or name them in a dict"
            )
        state["/".join(keys)] = np.asarray(leaf)
    save(path, state)


def load_variables(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The variables that `save_variables` wrote, as dicts of NumPy arrays. Raises InputError as `load` does."""
    variables: dict[str, Any] = {}
    for name, array in load(path).items():
        *keys, last = name.split("/")
        tree = variables
        for key in keys:
            tree = tree.setdefault(key, {})
        tree[last] = array
    return variables


def _digest(state: Mapping[str, np.ndarray]) -> str:
    """The CRC-32 of names, types, shapes and numbers."""
    digest = 0
    for key in sorted(state):
        digest = zlib.crc32(f"{key} {state[key].dtype.name} {state[key].shape} ".encode(), digest)
        digest = zlib.crc32(state[key].tobytes(), digest)
    return f"{digest:08x}"


def from_torch(
    state: Mapping[str, np.ndarray],
    variables: Any,
    layers: Layers,
    *,
    new_classes: bool = False,
    new_channels: bool = False,
) -> tuple[Any, tuple[Entry, ...]]:
    """Our variables with the weights of a PyTorch state dict, and a report with an entry for each key.

    Args:
      state: PyTorch's arrays of any float type by their keys; they become float32.
      variables: those that our model starts with, which give the shapes that are expected.
      layers: which of their layers is which of ours.
      new_classes: keep the classifier of `variables`, so that the model may have other classes than the state dict.
      new_channels: fit the first convolution, of three channels, to another number as timm does. For one channel,
        kernels are summed over the channels; for others they are repeated and divided by how much their sum grows.

    Raises InputError for a key that is missing, unknown or has another shape or no float type, for a counter that is no
    scalar, and for a number beyond float32. With `new_classes` the classifier may differ in its first axis alone.
    Nothing is left as it was in `variables`, but for the classifier on request.
    """
    leaves = _leaves(variables, layers)
    counters = {f"{key.removesuffix('running_mean')}{COUNTER}" for key in leaves if key.endswith(".running_mean")}
    for key in state:
        if key not in leaves and key not in counters:
            raise InputError(
                f"key {key}: found shape {list(np.shape(state[key]))}, expected no such key{nearest(key, leaves)}; "
                "take the weights of the network that the model is"
            )
        if key in counters and np.shape(state[key]):
            raise InputError(
                f"key {key}: found shape {list(np.shape(state[key]))}, expected [], a counter; take the weights as "
                "PyTorch saved them"
            )
    found, report = {}, []
    for key, (path, leaf) in leaves.items():
        layer, name = key.rpartition(".")[0], jax.tree_util.keystr(path, simple=True, separator="/")
        expected = _to_torch(leaf).shape
        if key not in state:
            raise InputError(
                f"key {key}: found none, expected shape {list(expected)}; take the weights of the network that the "
                "model is"
            )
        array, how = np.asarray(state[key]), "as it is" if leaf.ndim == 1 else "transposed"
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"key {key}: found {array.dtype}, expected a float type; dequantise the weights")
        array = _single(key, array)
        shape = array.shape
        if new_classes and layer == layers.classifier and len(shape) == len(expected) and shape[1:] == expected[1:]:
            array, how = _to_torch(leaf), "initialised anew"
        elif new_channels and key == f"{layers.first}.weight" and shape[1:2] == (3,) and shape != expected:
            array, how = _with_channels(array, expected[1]), f"transposed, with {expected[1]} channels"
        if array.shape != expected:
            raise InputError(
                f"key {key}: found shape {list(shape)}, expected {list(expected)}; take the weights of the network "
                "that the model is, or ask for new_classes or new_channels"
            )
        found[path] = _from_torch(array)
        report.append(Entry(key, name, shape, how))
    report += [Entry(key, "", np.shape(state[key]), "not used") for key in sorted(counters & state.keys())]
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path], variables), tuple(report)


def to_torch(variables: Any, layers: Layers) -> State:
    """The state dict of our variables, float32, as `load_state_dict` takes it with `strict=True`."""
    leaves = _leaves(variables, layers)
    state = {key: _to_torch(leaf) for key, (_, leaf) in leaves.items()}
    means = [key for key in leaves if key.endswith(".running_mean")]
    return state | {f"{key.removesuffix('running_mean')}{COUNTER}": np.zeros((), np.int64) for key in means}


def _leaves(variables: Any, layers: Layers) -> dict[str, tuple[Any, Any]]:
    """PyTorch's key -> (path, leaf) of our `variables`. Raises InputError for a leaf of a layer without a name."""
    prefixes = {path: prefix for prefix, path in layers.paths.items()}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        collection, *module, name = (entry.key for entry in path)
        prefix = prefixes.get(tuple(module))
        if prefix is None or (collection, name) not in NAMES:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"leaf {where}: found no key for it in the map, expected one; give the map of this model")
        found[f"{prefix}.{NAMES[collection, name]}"] = path, leaf
    return found


def _to_torch(leaf: Any) -> np.ndarray:
    """[kh, kw, C, D] -> [D, C, kh, kw]; [C, D] -> [D, C]."""
    array = np.asarray(leaf, np.float32)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(array: np.ndarray) -> np.ndarray:
    """The inverse of `_to_torch`."""
    array = np.asarray(array, np.float32)
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)


def _single(key: str, array: np.ndarray) -> np.ndarray:
    """As float32. Raises InputError for a finite number that is too large for it."""
    with np.errstate(over="ignore"):
        single = array.astype(np.float32, copy=False)
    (beyond,) = np.nonzero(np.isinf(single).ravel() & ~np.isinf(array).ravel())
    if beyond.size:
        raise InputError(
            f"key {key}: found {array.ravel()[beyond[0]]}, expected numbers up to {np.finfo(np.float32).max:.2g}, the "
            "largest of float32; take weights that were trained in it"
        )
    return single


def _with_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A kernel [D, 3, kh, kw] for another number of channels, [D, channels, kh, kw]."""
    kernel = kernel.astype(np.float32)
    if channels == 1:
        return kernel.sum(1, keepdims=True)
    repeated = np.tile(kernel, (1, math.ceil(channels / 3), 1, 1))[:, :channels]
    return repeated * np.float32(3 / channels)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as e:
        raise not_installed("a file of weights", e, "export") from e
    return safetensors.numpy
