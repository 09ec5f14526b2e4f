"""Compressed networks against those of other tools: the same trained weights, images and further training.

    pip install torch torch-pruning onnxscript
    python benchmarks/compressed.py --dataset mnist    on a quiet machine
    python benchmarks/compressed.py --quick            to see that it runs, on the bundled digits

Caffe's LeNet-5, a residual network and a small MobileNet are trained. Each is then compressed in two ways. In 8 bits,
after training: by `compress.quantize` with BatchNorm folded, by ONNX Runtime's static quantisation of our float file,
and by torch.ao on a PyTorch network with the same weights. And cut: half of the channels of every layer, those of the
smallest weights, by `compress.structure` and by Torch-Pruning; both are trained further on the same batches at the same
learning rates. Accuracy is the mean over seeds on the test set. Of the first seed's files, all are called in turn,
twice each, and the median time of the second call is given. Files of PyTorch's own hold the weights without the code. A
tool that is not installed, or that fails, has a line that says so. For calls on one thread, run it on one core, with
`taskset -c 0` before the command.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

from dl_jax import classify, data
from dl_jax.compress import fold, measure, quantize, structure
from dl_jax.core.fit import fit
from dl_jax.core.step import Tree, init_state, make_step
from dl_jax.core.stream import Stream
from dl_jax.export import onnx, stablehlo
from dl_jax.harness import print_rows
from dl_jax.harness.machine import device, git_state, processor, versions
from dl_jax.models.vision.lenet import LeNetCaffe
from dl_jax.models.vision.mobilenet import SmallMobileNet
from dl_jax.models.vision.resnet import CifarResNet

NETWORKS: Mapping[str, Any] = {
    "LeNet-Caffe": LeNetCaffe(),
    "ResNet-8": CifarResNet(8),
    "small MobileNet": SmallMobileNet(),
}
PEERS = ("torch", "torch-pruning", "onnxscript")
RATE, FURTHER, MOMENTUM = 0.05, 0.02, 0.9  # peak learning rates of training and of training further
WEIGHT_BITS, CALIBRATION, CUT = 7, 500, 0.5
BATCHES = (1, 128)  # images in the calls that are timed
Name = tuple[str, str]  # what was done, and by what it was made and is run
Images = Mapping[str, np.ndarray]


class Entry(NamedTuple):
    """A network that was written to a file and opened again."""

    size: int  # bytes of the file
    parameters: int
    predict: Callable[[np.ndarray], Any]  # images float32 [B, 28, 28, 1] -> logits [B, 10]


class Setting(NamedTuple):
    """How long everything takes."""

    steps: int
    further: int  # steps after a cut
    seeds: int
    rounds: int  # timed calls of each


def ours(name: str, train: Images, seed: int, setting: Setting, folder: Path) -> tuple[Tree, dict[Name, Entry]]:
    """The trained variables of a network, and our files of it."""
    model, stream = NETWORKS[name], data.shuffled(train, 100, seed)
    image, calibration = scaled(train, 1), scaled(train, CALIBRATION)
    variables = jax.jit(lambda key: model.init(key, image, train=False))(jax.random.key(seed))
    variables = trained(model.apply, variables, stream, RATE, setting.steps)
    groups = structure.groups(model.apply, variables, image, train=False)
    plan = structure.lowest(groups, structure.l2(groups, variables), CUT)
    small, smaller = structure.cut(model.apply, variables, plan)
    smaller = trained(small, smaller, stream.later(setting.steps), FURTHER, setting.further)

    found: dict[Name, Entry] = {}
    for what, given, learnt in (("float", model.apply, variables), ("cut", small, smaller)):
        apply, tree = fold.folded(given, learnt, image, train=False)
        predict = lambda variables, image, apply=apply: apply(variables, image, train=False)
        parameters = measure.counts(tree["params"]).parameters
        rounded, integers = quantize.after_training(predict, tree, [(calibration,)], WEIGHT_BITS)
        paths = folder / f"{what}.onnx", folder / f"{what}.stablehlo", folder / f"{what}-int8.onnx"
        onnx.export(predict, tree, [calibration[:8]], paths[0], tolerance=1e-4)
        stablehlo.export(predict, tree, [calibration[:8]], paths[1])
        onnx.export(rounded, integers, [calibration[:8]], paths[2], tolerance=0.2)
        in_integers = "int8" if what == "float" else f"{what}, int8"
        for key, path, opened in (
            ((what, "dl_jax, ONNX Runtime"), paths[0], onnx.load),
            ((what, "dl_jax, XLA"), paths[1], stablehlo.load),
            ((in_integers, "dl_jax, ONNX Runtime"), paths[2], onnx.load),
        ):
            found[key] = Entry(path.stat().st_size, parameters, opened(path))
    onnx.quantized(folder / "float.onnx", [[calibration]], path := folder / "static.onnx")
    parameters = found["float", "dl_jax, ONNX Runtime"].parameters
    found["int8", "ONNX Runtime's static"] = Entry(path.stat().st_size, parameters, onnx.load(path))
    return variables, found


def trained(apply: Callable[..., Any], variables: Tree, stream: Stream, rate: float, steps: int) -> Tree:
    tx = optax.sgd(optax.cosine_decay_schedule(rate, steps), MOMENTUM)
    state = init_state(jax.random.key(0), variables, tx)
    return fit(make_step(classify.loss(apply), tx), state, stream, steps=steps).variables


def scaled(records: Images, n: int | None = None) -> np.ndarray:
    """The first `n` images, float32 [n, 28, 28, 1] in [0, 1]."""
    return np.array(classify.to_unit(records["image"][:n]))  # a copy, as PyTorch takes no array that is read-only


def theirs(
    name: str, variables: Tree, train: Images, seed: int, setting: Setting, folder: Path, compiled: bool
) -> tuple[dict[Name, Entry], list[str]]:
    """PyTorch's networks with our weights, and what failed. `compiled` ones take a minute each."""
    from benchmarks import torch_compression

    calibration, failed, found = scaled(train, CALIBRATION), [], {}
    model = torch_compression.twin(name, jax.device_get(variables))
    stream = data.shuffled(train, 100, seed).later(setting.steps)
    batches = (stream(step) for step in range(setting.further))
    rate = optax.cosine_decay_schedule(FURTHER, setting.further)
    rates = (float(jnp.asarray(rate(step))) for step in range(setting.further))
    models = {"float": model}
    try:
        small = torch_compression.cut(model, calibration, CUT)
    except Exception as e:
        failed.append(f"Torch-Pruning cannot cut {name}: {type(e).__name__}: {e}")
    else:
        models["cut"] = torch_compression.trained(small, batches, rates, MOMENTUM)
    for what, each in models.items():
        parameters, size = sum(p.numel() for p in each.parameters()), torch_compression.saved_bytes(each)
        tool = "PyTorch" if what == "float" else "Torch-Pruning"
        found[what, f"{tool}, eager"] = Entry(size, parameters, torch_compression.predictor(each))
        if compiled:
            found[what, f"{tool}, compiled"] = Entry(size, parameters, torch_compression.predictor(each, True))
        torch_compression.export(each, calibration, path := folder / f"torch-{what}.onnx")
        run = onnx.load(path)
        predict = lambda image, run=run: run(image.transpose(0, 3, 1, 2))
        found[what, f"{tool}, ONNX Runtime"] = Entry(path.stat().st_size, parameters, predict)
        integers = torch_compression.in_integers(each, calibration)
        in_integers = ("int8", "torch.ao") if what == "float" else (f"{what}, int8", "Torch-Pruning, torch.ao")
        size, predict = torch_compression.saved_bytes(integers), torch_compression.predictor(integers)
        found[in_integers] = Entry(size, parameters, predict)
    return found, failed


def accuracy(entry: Entry, test: Images) -> float:
    """Per cent."""
    return 100 * float((classify.outputs(entry.predict, scaled(test)).argmax(1) == test["label"]).mean())


ORDER = ("float", "int8", "cut", "cut, int8")
HEADER = ("network", "made and run by", "kB", "params", *(f"µs for {b}" for b in BATCHES), "accuracy, %")


def rows(
    entries: Mapping[Name, Entry], times: Mapping[int, Mapping[Name, float]], accuracies: Mapping[Name, Sequence[float]]
) -> Iterator[tuple[str, ...]]:
    for name in sorted(entries, key=lambda name: ORDER.index(name[0])):
        entry, cells = entries[name], [f"{times[batch][name]:,.0f}" for batch in BATCHES]
        share = f"{np.mean(accuracies[name]):.2f}"
        yield (*name, f"{entry.size / 1000:,.1f}", f"{entry.parameters:,}", *cells, share)


def comparisons(entries: Mapping[Name, Entry], times: Mapping[int, Mapping[Name, float]]) -> Iterator[str]:
    """Our fastest file of each kind against the fastest of the others."""
    for what in ORDER:
        own = [name for name in entries if name[0] == what and name[1].startswith("dl_jax")]
        other = [name for name in entries if name[0] == what and name not in own]
        for batch in BATCHES if other else ():
            mine, best = (min(names, key=times[batch].__getitem__) for names in (own, other))
            ratio = times[batch][best] / times[batch][mine]
            yield f"{what}, batch size {batch}: {mine[1]} is {ratio:.2f} times as fast as {best[1]}."


def compare(name: str, train: Images, test: Images, setting: Setting, peers: bool, compiled: bool) -> None:
    """Prints the table of one network."""
    accuracies: dict[Name, list[float]] = {}
    first: dict[Name, Entry] = {}
    failed: list[str] = []
    for seed in range(setting.seeds):
        with tempfile.TemporaryDirectory() as folder:
            variables, entries = ours(name, train, seed, setting, Path(folder))
            if peers:
                more, failed = theirs(name, variables, train, seed, setting, Path(folder), compiled and seed == 0)
                entries |= more
        for key, entry in entries.items():
            accuracies.setdefault(key, []).append(accuracy(entry, test))
        first = first or entries
    functions = {key: entry.predict for key, entry in first.items()}
    times = {}
    for batch in BATCHES:
        found = measure.latency(functions, scaled(test, batch), rounds=setting.rounds)
        times[batch] = {key: 1e6 * latency.p50 for key, latency in found.items()}
    print(f"{name}, seeds: {setting.seeds}")
    print_rows(HEADER, list(rows(first, times, accuracies)), [*comparisons(first, times), *failed, ""], texts=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one network, few steps and calls")
    parser.add_argument("--dataset", default="digits", help="grey images of 28x28 or 8x8 pixels in ten classes")
    quick, dataset = (given := parser.parse_args()).quick, given.dataset
    setting = Setting(20, 10, 1, 5) if quick else Setting(1200, 600, 3, 100)
    missing = [name for name in PEERS if importlib.util.find_spec(name.replace("-", "_")) is None]
    code, used = git_state(Path(__file__).parent), versions()
    used |= {name: importlib.metadata.version(name) for name in ("onnxruntime", *PEERS) if name not in missing}
    print(f"{os.cpu_count()} cores of {processor()}, load average {os.getloadavg()[0]:.1f} before the start")
    print(f"XLA on {device()}, everything else on the CPU")
    print(f"commit {code['commit'][:12]}{'' if code['clean'] else ' with uncommitted changes'}")
    print(", ".join(f"{name} {version}" for name, version in used.items()))
    train, test = (data.grey_images(dataset, split) for split in ("train", "test"))
    print(f"{dataset}: {len(train['label'])} images to learn from\n")
    for name in list(NETWORKS)[:1] if quick else NETWORKS:
        compare(name, train, test, setting, not missing, not quick)
    if missing:
        print(f"no rows of PyTorch's tools: {', '.join(missing)} not installed; pip install {' '.join(missing)}")


if __name__ == "__main__":
    main()
