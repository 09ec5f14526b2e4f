"""An image classifier becomes a smaller and faster file; one table shows what each step saves and costs.

    python experiments/compression/pipeline.py
    python experiments/compression/pipeline.py --model lenet_caffe --dataset mnist --preset lenet_caffe

A network of `MODELS` is trained on any TFDS set of images of one size. Its normalisations are folded into its kernels:
this is the teacher. Then a share of the channels of every layer is removed, those of the smallest weights (Li et al.
2017, arXiv:1608.08710), and the small network is trained on the teacher's soft targets (Hinton et al. 2015,
arXiv:1503.02531), while a fraction of its weights becomes zero (Zhu & Gupta 2017, arXiv:1710.01878). Both networks are
exported as StableHLO for XLA and as ONNX for ONNX Runtime, and in 8-bit integers (Krishnamoorthi 2018,
arXiv:1806.08342) as ONNX, the small one also as an entropy-coded file (Han et al. 2016, arXiv:1510.00149). Weights use
7 of the 8 bits, so that all CPUs compute the same; so does the baseline, ONNX Runtime's own quantisation. Sizes, times
and accuracies are those of the files, opened again; parameters and zeros are counted before export.

The file that is recommended is chosen on validation images: the fastest of those that are smaller and faster than the
teacher's file of the same format and lose at most --max-loss points of accuracy. If its test error rises by more, or
if there is none, the run ends with status 3.

Expected of LeNet-300-100 with --dataset mnist --preset paper: the int8 file is 4 ± 0.25 times smaller than the
teacher's and 2.5 ± 0.5 times faster to call, with at most 0.2 points more errors. Of Caffe's LeNet-5 with --dataset
mnist --preset lenet_caffe: a float file 10 times smaller and 3 times faster, at the same cost. Of residual networks:
at most 0.5 points lost at 8 bits (--preset residual, digits), and an int8 file of ResNet-20 twice as fast as the
folded float file with 128 images (--preset resnet20, which trains for a moment only and says nothing about accuracy).
Without arguments, LeNet-300-100 learns the bundled digits, which takes less than three minutes on 2 CPU cores.

No hyper-parameter was chosen on test images. One's own network takes the place of `MODELS[...]`; docs/compress.py has
these steps for it in twenty lines.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import classify, data, losses, optim
from dl_jax.compress import codec, comparison, distill, fold, measure, prune, quantize, structure
from dl_jax.compress.comparison import Comparison, File, Images, Name
from dl_jax.core import seeds
from dl_jax.core.fit import fit
from dl_jax.core.step import Tree, init_states, make_step, per_seed, start
from dl_jax.export import onnx, record, stablehlo
from dl_jax.harness import (
    Claim,
    NonNegative,
    Point,
    Positive,
    Probability,
    Run,
    launch,
    markdown_rows,
    on_digits,
    print_rows,
    trade_figure,
)
from dl_jax.harness.machine import device
from dl_jax.harness.results.record import measured_cell
from dl_jax.models.vision.lenet import LeNet300, LeNetCaffe
from dl_jax.models.vision.mobilenet import SmallMobileNet
from dl_jax.models.vision.resnet import CifarResNet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    model: Literal["lenet300", "lenet_caffe", "mobilenet", "resnet8", "resnet20"] = "lenet300"  # of MODELS
    dataset: str = "mnist"  # TFDS name of a set of grey or colour images
    size: Positive[int] = 28  # side of the images in pixels, to which colour images are scaled
    train_split: str = "train[:90%]"  # TFDS split to learn from
    validation_split: str = "train[90%:]"  # TFDS split on which the file is chosen
    test_split: str = "test"  # TFDS split to test on
    steps: Positive[int] = 6000  # train steps of the teacher
    small_steps: Positive[int] = 6000  # train steps of the small network; weights become zero in the first half
    batch_size: Positive[int] = 100  # examples per step, over all devices
    learning_rate: Positive[float] = 0.1  # peak learning rate of the teacher
    small_rate: Positive[float] = 0.05  # peak learning rate of the small network
    momentum: Probability = 0.9  # momentum of SGD
    clip: Positive[float] = 1.0  # largest norm of the gradient
    cut: Probability = 0.5  # share of the channels that is removed; what is left of a layer is a multiple of 8
    sparsity: Probability = 0.8  # fraction of the small network's weights that becomes zero
    prune_every: Positive[int] = 100  # train steps between two prunings
    temperature: Positive[float] = 4.0  # temperature of the soft targets
    hard_weight: NonNegative[float] = 0.5  # weight of the hard-label cross-entropy in the loss (soft-target loss: 1)
    calibration: Positive[int] = 500  # training examples on which the ranges of the activations are calibrated
    rounds: Positive[int] = 200  # timed calls of each file, batch size and seed
    max_loss: NonNegative[float] = 0.2  # points of accuracy that the chosen file may lose


# By name: the network for a number of classes.
MODELS: Mapping[str, Callable[[int], Any]] = {
    "lenet300": lambda classes: LeNet300(classes=classes),
    "lenet_caffe": LeNetCaffe,
    "mobilenet": lambda classes: SmallMobileNet(classes=classes),
    "resnet8": lambda classes: CifarResNet(8, classes=classes),
    "resnet20": lambda classes: CifarResNet(20, classes=classes),
}
ON_DIGITS = Config(dataset="digits", steps=600, small_steps=900, batch_size=50, prune_every=10, max_loss=0.5)
PRESETS = {
    "paper": Config(),
    "lenet_caffe": Config(model="lenet_caffe", cut=0.75, sparsity=0.5),
    "residual": dataclasses.replace(ON_DIGITS, model="resnet8", sparsity=0.5, rounds=50),
    "resnet20": Config(model="resnet20", dataset="shapes", size=32, train_split="train[:1000]", steps=10,
                       small_steps=1, sparsity=0.0, rounds=20, max_loss=100.0),
    "quick": ON_DIGITS,
    "smoke": Config(dataset="digits", train_split="train[:64]", validation_split="train[64:104]",
                    test_split="test[:40]", steps=4, small_steps=4, batch_size=16, prune_every=2, calibration=32,
                    rounds=3),
}  # fmt: skip

WRITERS = "Files are chosen on a part of the training digits. The test digits are other people's, one is 0.3 points."
CALL = (
    "A call of ONNX Runtime took 11 µs for a model of one ReLU (on another machine), of 82 µs for the small file and "
    "226 µs for the teacher's. Without these the small file would be 3.0 times faster."
)
on_mnist = functools.partial(Claim, given={"dataset": "mnist", "model": "lenet300"})
factor = functools.partial(on_mnist, paper="Krishnamoorthi 2018", unit="x", better="higher")
caffe = functools.partial(Claim, paper="our bar", preset="lenet_caffe", given={"dataset": "mnist"})
bar = functools.partial(Claim, paper="our bar", seeds=1)
CLAIMS = (
    factor("times_smaller/int8", locator="abstract, size", claimed=4, tolerance=0.25,
           note="The whole file counts, with scales, biases and the graph."),
    factor("times_faster/int8/batch1", locator="abstract, CPU", claimed=2.5, tolerance=0.5,
           note="The paper has 2x to 3x on CPUs for convolutional networks; ours is dense, and runs in ONNX Runtime. "
           "It depends on the processor: the last one has no instruction for sums of 8-bit products (VNNI)."),
    on_mnist("error/int8", versus="error/teacher", paper="Han et al. 2016", locator="abstract, accuracy", claimed=0,
             tolerance=0.2, unit="points", note="The margin is ours."),
    caffe("times_smaller/small", locator="cut LeNet-5, size", at_least=10, unit="x"),
    *(
        caffe(f"times_faster/small/batch{batch}", locator=f"cut LeNet-5, {batch} images", at_least=3, unit="x",
              note=note)
        for batch, note in ((1, CALL), (128, ""))
    ),
    *(
        caffe(f"times_faster_xla/small/batch{batch}", locator=f"cut LeNet-5, {batch} images, XLA", at_least=1.05,
              unit="x")
        for batch in (1, 128)
    ),
    caffe("error/small", versus="error/teacher", locator="cut LeNet-5, accuracy", claimed=0, tolerance=0.2,
          unit="points"),
    bar("times_faster/int8/batch128", locator="ResNet-20, int8 against folded float", preset="resnet20", at_least=2,
        unit="x", seeds=3, note="It depends on the processor: the last one has no VNNI, and files by ONNX Runtime's "
        "own static quantisation were 1.6 times faster there."),
    bar("error/int8", versus="error/teacher", locator="residual network, accuracy", preset="residual", claimed=0,
        tolerance=0.5, unit="points", given={"dataset": "digits"}, seeds=5),
    *(
        bar(name, locator=f"the chosen file, preset {preset}", preset=preset, at_least=least, unit=unit, note=note)
        for preset, note in (("paper", ""), ("lenet_caffe", ""), ("residual", WRITERS), ("quick", WRITERS))
        for name, least, unit in (
            ("times_smaller/chosen", 1.05, "x"),
            ("times_faster/chosen", 1.05, "x"),
            ("accuracy_to_spare/chosen", 0, "points"),
        )
    ),
    on_digits("error/int8", at_most=6.3, unit="%", note="logistic regression: 10.0 %"),
    on_digits("times_smaller/encoded", at_least=24.9, unit="x", note="nothing compressed: 1"),
)  # fmt: skip
KEEPS = ("table.md", "costs.png", "files/seed*/*", "files/seed*/*.onnx.json")  # files in the run's folder
TEACHER, INT8, BASELINE, SMALL, SMALL_INT8 = "teacher", "int8", "int8 by ONNX Runtime", "small", "small int8"
XLA, ONNX, ENCODED = "StableHLO", "ONNX", "encoded"  # file formats: for XLA, for ONNX Runtime, compressed
SUFFIXES = {XLA: "stablehlo", ONNX: "onnx", ENCODED: "dlj"}
ROWS = (
    *((TEACHER, XLA), (TEACHER, ONNX), (INT8, ONNX), (BASELINE, ONNX)),
    *((SMALL, XLA), (SMALL, ONNX), (SMALL_INT8, ONNX), (SMALL_INT8, ENCODED)),
)
WEIGHT_BITS = 7  # stored in 8: with all 8, sums of two products saturate on x86 CPUs without VNNI
RECORDED = 1000  # validation images whose statistics stand in the record of a file
BATCHES = (1, 128)  # batch sizes of the calls that are timed


class Network(NamedTuple):
    """A function (variables, image float32 [B, H, W, C] in [0, 1]) -> logits [B, classes], and its variables."""

    apply: Callable[..., Any]
    variables: Tree


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    onnx.require()
    train, validation, test = (images(cfg, each) for each in (cfg.train_split, cfg.validation_split, cfg.test_split))
    described = data.info(cfg.dataset)
    classes = described.classes or 1 + int(train["label"].max())
    names = described.class_names or [str(i) for i in range(classes)]
    model = MODELS[cfg.model](classes)
    key_init, key, key_small = run.keys(3)  # [S] each
    tx = optim.clipped_sgd(cfg.learning_rate, cfg.steps, cfg.momentum, cfg.clip)
    states = start(model, tx, key_init, key, jnp.zeros((1, *train["image"].shape[1:])))
    step = per_seed(make_step(classify.loss(model.apply), tx), one_by_one=True)
    stream = data.shuffled(train, cfg.batch_size, run.seeds)
    trained = fit(step, states, stream, steps=cfg.steps, run=run / "teacher").variables

    found = []
    for seed, variables, own_key in zip(run.seeds, seeds.split(trained), key_small, strict=True):
        teacher = folded(model.apply, variables, train)
        small = smaller(cfg, teacher, train, own_key, seed, run / f"seed{seed}")
        with tempfile.TemporaryDirectory() as folder:
            files = written(Path(folder), teacher, small, inputs(train, cfg.calibration))
            found.append(comparison.costs(files, validation, test, BATCHES, cfg.rounds))
            for file in files.values():
                if file.runs:
                    some = [(inputs(validation, RECORDED),)]
                    record.write(file.path, file.predict, some, request=record.Image(), classes=names)
            for path in Path(folder).iterdir():
                (run / "files" / f"seed{seed}").keep(path.name, path.read_bytes())
    of = Comparison(TEACHER, found)
    best = comparison.recommended(of, cfg.max_loss)
    publish(run, of, best, cfg)
    return measured(of, best, cfg.max_loss)


def images(cfg: Config, split: str) -> Images:
    """The images of a split with their labels. Grey images keep their size, or are enlarged from 8x8."""
    described = data.info(cfg.dataset)
    shape = described.features["image"].shape if "image" in described.features else ()
    if shape[2:] == (1,):
        return data.grey_images(cfg.dataset, split, size=cfg.size, classes=described.classes or 10)
    return data.images(cfg.dataset, split, size=cfg.size)


def inputs(records: Images, n: int) -> np.ndarray:
    """The first `n` images as inputs of the exported files: float32 [n, H, W, C] in [0, 1]."""
    return np.asarray(classify.to_unit(records["image"][:n]))


def folded(apply: Callable[..., Any], variables: Tree, train: Images) -> Network:
    """A trained network with its normalisations in its kernels."""
    return Network(*fold.folded(apply, variables, inputs(train, 1), train=False))


def smaller(cfg: Config, teacher: Network, train: Images, key: jax.Array, seed: int, run: Run) -> Network:
    """The teacher without a share of its channels, trained on its soft targets; some of its weights are zero."""
    groups = structure.groups(*teacher, inputs(train, 1), train=False)
    plan = structure.lowest(groups, structure.l2(groups, teacher.variables), cfg.cut, multiple=8)
    apply, variables = structure.cut(*teacher, plan)
    answer = jax.jit(lambda image: teacher.apply(teacher.variables, classify.to_unit(image), train=False))
    taught = {**train, "teacher_logits": classify.outputs(answer, train["image"])}
    soft, hard = distill.loss(apply, cfg.temperature), classify.loss(apply)
    tx = optax.chain(
        optim.clipped_sgd(cfg.small_rate, cfg.small_steps, cfg.momentum, cfg.clip),
        prune.magnitude(prune.cubic(cfg.sparsity, 0, max(1, cfg.small_steps // 2)), cfg.prune_every),
    )
    step = per_seed(make_step(losses.weighted_sum({"soft": (1.0, soft), "hard": (cfg.hard_weight, hard)}), tx))
    alone = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)  # [...] -> [1, ...]
    stream = data.shuffled(taught, cfg.batch_size, (seed,)).later(cfg.steps)
    states = fit(step, init_states(key[None], alone(variables), tx), stream, steps=cfg.small_steps, run=run)
    return Network(apply, seeds.split(states.variables)[0])


def integers(network: Network, batches: Sequence[tuple[np.ndarray]]) -> tuple[Network, Network]:
    """Two networks with weights of `WEIGHT_BITS`: one rounds activations to 8 bits, the other computes in floats."""
    apply = functools.partial(network.apply, train=False)
    rounded, variables = quantize.after_training(apply, network.variables, batches, WEIGHT_BITS)
    weights = {name: tree for name, tree in variables.items() if name != quantize.RANGES}
    return Network(rounded, variables), Network(quantize.unpacked(apply), weights)


def written(folder: Path, teacher: Network, small: Network, images: np.ndarray) -> dict[Name, File]:
    """Writes all files and opens them again. The ranges of the activations are calibrated on `images`."""
    floats = {TEACHER: teacher, SMALL: small}
    networks = {
        (name, kind): Network(functools.partial(network.apply, train=False), network.variables)
        for name, network in floats.items()
        for kind in (XLA, ONNX)
    }
    batches = [(images[i : i + 100],) for i in range(0, len(images), 100)]
    networks[INT8, ONNX], _ = integers(teacher, batches)
    networks[SMALL_INT8, ONNX], networks[SMALL_INT8, ENCODED] = integers(small, batches)
    networks[BASELINE, ONNX] = networks[TEACHER, ONNX]

    def file(name: Name, network: Network) -> File:
        model, kind = name
        path, some = folder / file_name(name), [images[:8]]
        count = measure.counts(quantize.dequantize(network.variables["params"]))
        if kind == ENCODED:
            path.write_bytes(codec.encode(network.variables))
            predict = jax.jit(functools.partial(network.apply, codec.decode(path.read_bytes())))
            return File(path, predict, count, runs=False)
        if kind == XLA:
            stablehlo.export(*network, some, path)
            return File(path, stablehlo.load(path), count)
        if model == BASELINE:
            onnx.quantized(folder / file_name((TEACHER, ONNX)), batches, path)
        else:  # in integers a number between two others may be rounded to either
            onnx.export(*network, some, path, tolerance=0.1 if model in (INT8, SMALL_INT8) else 1e-4)
        return File(path, onnx.load(path, threads=1), count)

    return {name: file(name, networks[name]) for name in ROWS}


def measured(of: Comparison, best: Name | None, max_loss: float) -> dict[str, np.ndarray]:
    """The metrics of the run, one value per seed. Where no file is recommended, it is the teacher's own."""
    best = best or (TEACHER, ONNX)
    models = {"int8": INT8, "baseline": BASELINE, "small": SMALL, "small_int8": SMALL_INT8}
    files = {**{short: (model, ONNX) for short, model in models.items()}, "encoded": (SMALL_INT8, ENCODED)}
    faster = functools.partial(comparison.times_faster, of)
    return {
        "error/teacher": comparison.errors(of, (TEACHER, ONNX)),
        **{f"error/{short}": comparison.errors(of, name) for short, name in files.items()},
        **{f"times_smaller/{short}": comparison.times_smaller(of, name) for short, name in files.items()},
        **{
            f"times_faster/{short}/batch{batch}": faster((model, ONNX), batch)
            for short, model in models.items()
            for batch in BATCHES
        },
        **{f"times_faster_xla/small/batch{batch}": faster((SMALL, XLA), batch) for batch in BATCHES},
        "times_smaller/chosen": comparison.times_smaller(of, best),
        "times_faster/chosen": np.min([faster(best, batch) for batch in BATCHES], 0),
        "accuracy_to_spare/chosen": max_loss - comparison.points_lost(of, best),
    }


HEADER = ("model", "file", "params", "nonzero", "kB", "gzip", *(f"µs for {b}" for b in BATCHES), "accuracy, %")


def rows(of: Comparison) -> Iterator[tuple[str, ...]]:
    """The rows of the table: counts and sizes as means over seeds, p50 and p95 as medians, accuracy ± std."""
    for name in ROWS:
        each = [files[name] for files in of.costs]
        count, size = np.mean([cost.counts for cost in each], 0), np.mean([cost.size for cost in each], 0) / 1000
        times = [1e6 * np.median([cost.latency[b] for cost in each], 0) for b in BATCHES if b in each[0].latency]
        cells = [" / ".join(f"{t:.0f}" for t in pair) for pair in times] or ["–"] * len(BATCHES)
        accuracy, _, _ = measured_cell(100 - comparison.errors(of, name)).partition(" (")
        yield (*name, *(f"{x:,.0f}" for x in (*count, *size)), *cells, accuracy)


def remarks(of: Comparison, best: Name | None, cfg: Config) -> Iterator[str]:
    """The sentences below the table."""
    yield (
        f"Accuracy is on the test set, ± std over {len(of.costs)} seeds. Times are microseconds per call on "
        f"{' or '.join(map(str, BATCHES))} images, p50 / p95; all files are called in turn, twice each, and the second "
        f"call is timed. StableHLO runs in XLA on {device()}, ONNX in ONNX Runtime on one CPU thread. The encoded file "
        "must be decoded before it can run and is not timed."
    )
    yield (
        f"Small: {cfg.cut:.0%} of the channels are gone, and {cfg.sparsity:.0%} of the weights that are left are zero. "
        "Zeros are stored and multiplied like other numbers: they make no file faster, and only the encoded one "
        "smaller. Int8: weights and activations are rounded, and ONNX Runtime multiplies integers."
    )
    for kind, runtime in {XLA: "XLA", ONNX: "ONNX Runtime"}.items():
        for batch in BATCHES:
            speeds = comparison.speeds(of, kind, batch)
            yield f"{runtime}, batch size {batch}, against the float32 teacher on this device: {speeds}."
    if not best:
        yield f"Chosen: none. No file is smaller and faster and loses at most {cfg.max_loss:g} points in validation."
        return
    gains = " and ".join(f"{np.median(comparison.times_faster(of, best, batch)):.1f}" for batch in BATCHES)
    yield (
        f"Chosen: {file_name(best)}, {comparison.times_smaller(of, best).mean():.1f} times smaller and {gains} times "
        f"faster than the teacher's, for {comparison.points_lost(of, best).mean():+.2f} points of test error."
    )


def file_name(name: Name) -> str:
    return f"{name[0].replace(' ', '_')}.{SUFFIXES[name[1]]}"


def costs_figure(of: Comparison, best: Name | None) -> "Figure":
    """Accuracy against the time of a call on one image, and against bytes."""

    def point(name: Name) -> Point:
        each = [files[name] for files in of.costs]
        seconds = [cost.latency[1].p50 for cost in each if cost.latency]
        time = 1e6 * float(np.median(seconds)) if seconds else None
        kilobytes = float(np.mean([cost.size.raw / 1000 for cost in each]))
        return Point(*name, (time, kilobytes), 100 - comparison.errors(of, name))

    points = {name: point(name) for name in ROWS}
    figure = trade_figure(
        list(points.values()),
        points[best] if best else None,
        xlabels=("microseconds for one image", "kilobytes"),
        ylabel="test accuracy (%)",
    )
    figure.suptitle(f"chosen, with a black edge: {file_name(best)}" if best else "no file was chosen")
    return figure


def publish(run: Run, of: Comparison, best: Name | None, cfg: Config) -> None:
    """Prints the table and the remarks, and writes both to table.md in the run's folder, beside the figure."""
    run.figure("costs", cfg.steps, lambda: costs_figure(of, best))
    report = HEADER, list(rows(of)), list(remarks(of, best, cfg))
    run.keep("table.md", markdown_rows(*report, texts=2))
    if jax.process_index() == 0:
        print_rows(*report, texts=2)


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
