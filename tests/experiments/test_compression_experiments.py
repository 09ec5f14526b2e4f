"""What the compression experiments count, by hand, and which settings they refuse before they train."""

import contextlib
import dataclasses
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dl_jax.compress import codec, comparison, distill, measure, quantize, structure
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run, Settings
from dl_jax.models.vision.resnet import CifarResNet


def kernel(rows, columns, places):
    """float32 [rows, columns] with ones at `places` of its columns, one after the other."""
    flat = np.zeros(rows * columns, np.float32)
    flat[list(places)] = 1
    return flat.reshape(columns, rows).T


def test_ratios_of_deep_compression(load_experiment):
    module = load_experiment("compression/deep_compression")
    layers = {
        "Dense_0": {"kernel": kernel(50, 2, (0, 39, 99)), "bias": np.zeros(2, np.float32)},
        "Dense_1": {"kernel": kernel(2, 2, (3,)), "bias": np.zeros(2, np.float32)},
        "Dense_2": {"kernel": kernel(2, 2, (0, 1)), "bias": np.zeros(2, np.float32)},
    }
    assert module.ratio_pruned(layers) == 108 / 6
    # Distances reach 32: 1, 32 + 7, 32 + 28 in the first kernel, 4 in the second, 1, 1 and 2 to the end in the third.
    taken = 5 * (8 + 5) + (1 + 3) * (6 + 5) + (255 + 2 * 63) * 32
    assert module.ratio_quantised(layers, (8, 6, 6)) == pytest.approx(32 * 108 / taken)
    data = codec.encode(layers)
    assert module.ratio_file(layers, data) == 4 * (108 + 6) / len(data)


def test_a_convolutional_network_becomes_a_file_with_the_bits_of_each_layer(load_experiment, tmp_path):
    module = load_experiment("compression/deep_compression")
    whole, smoke = module.PRESETS["lenet5"], module.PRESETS["smoke"]
    config = dataclasses.replace(smoke, convolutional=True, kept=whole.kept, bits=whole.bits)
    with contextlib.closing(Run(epath.Path(tmp_path), Settings(seeds=(0,)))) as run:
        found = module.main(config, run)
    params = codec.decode((tmp_path / "lenet5_seed0.dlj").read_bytes())
    values = [len(np.setdiff1d(kernel, 0)) for kernel in module.kernels(params)]
    assert min(values[:2]) > 31  # 8 bits
    assert max(values[2:]) <= 31  # 5 bits
    weights = {500: 0.66, 25_000: 0.12, 400_000: 0.08, 5000: 0.19}  # of C1, C2 and the two dense layers
    left = sum(size - round((1 - share) * size) for size, share in weights.items())
    np.testing.assert_allclose(found["ratio/pruned"], 430_500 / left, rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed_weights_come_back_and_weigh_what_they_hold(load_experiment, bits):
    module = load_experiment("compression/quantize_lenet")
    params = {"kernel": np.random.default_rng(0).normal(size=(3, 40, 5)).astype(np.float32), "bias": np.ones((3, 5))}
    back, kilobytes = module.packed(params, bits)
    for seed in range(3):
        alone = {name: leaf[seed] for name, leaf in params.items()}
        np.testing.assert_array_equal(
            back["kernel"][seed], quantize.dequantize(quantize.quantize(alone, bits))["kernel"]
        )
    np.testing.assert_allclose(kilobytes, (40 * 5 * bits / 8 + 5 * 4 + 5 * 8) / 1000)  # values, scales, float64 biases


def test_the_convolutional_network_is_pruned_too(load_experiment):
    module = load_experiment("compression/prune_lenet")
    config = dataclasses.replace(module.PRESETS["smoke"], convolutional=True, kept=module.PRESETS["lenet5"].kept)
    found = module.main(config, Run(settings=Settings(seeds=(0, 1))))
    assert set(found) == {"test_error/lenet5", "test_error/lenet5_pruned", "rate/lenet5"}
    weights = {500: 0.66, 25_000: 0.12, 400_000: 0.08, 5000: 0.19}  # of C1, C2 and the two dense layers
    left = sum(size - round((1 - share) * size) for size, share in weights.items()) + 580  # no bias is pruned
    np.testing.assert_allclose(found["rate/lenet5"], 431_080 / left, rtol=1e-3)


class History:
    """A run that has reported these metrics."""

    def __init__(self, reported):
        self.reported = reported

    def history(self, name):
        return self.reported[name]


def test_each_ticket_stops_where_its_own_validation_loss_is_lowest(load_experiment):
    module = load_experiment("compression/lottery_ticket")
    loss = np.array([[3.0, 1.0], [1.0, 2.0], [2.0, np.nan], [1.5, 1.5]])
    accuracy = np.array([[10.0, 20.0], [30.0, 40.0]])  # measured where a loss was the lowest so far
    reported = {"validation_loss": (np.array([5, 10, 15, 20]), loss), "test_accuracy": (np.array([5, 10]), accuracy)}
    run = History({f"watch/{name}": values for name, values in reported.items()})
    found = module.stopped(run, "x")
    np.testing.assert_array_equal(found["early_stop/x"], [10, 5])
    np.testing.assert_array_equal(found["accuracy/x"], [30, 20])
    np.testing.assert_array_equal(module.lowest(run), [1, 1])
    assert module.lowest(Run()) == np.inf


def test_the_legend_of_the_tickets_covers_no_error_bar(load_experiment):
    module = load_experiment("compression/lottery_ticket")
    names = [f"{name}/{cell}" for name in ("early_stop", "accuracy") for cell in ("100.0", "21.1", "21.1_redrawn")]
    figure = module.ticket_figure(["100.0", "21.1"], {name: np.array([1.0, 9.0, 2.0]) for name in names})
    FigureCanvasAgg(figure).draw()  # places everything
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["original start", "redrawn start"]
    assert not [axes for axes in figure.axes if axes.get_tightbbox().overlaps(legend.get_window_extent())]
    assert not [axes for axes in figure.axes if axes.get_legend()]


def test_a_rewound_network_has_the_zeros_of_one_and_the_weights_of_the_other(load_experiment):
    module = load_experiment("compression/lottery_ticket")
    pruned, start = {"w": np.array([0.0, 3.0, 0.0])}, {"w": np.array([1.0, 2.0, 3.0])}
    np.testing.assert_array_equal(module.rewound(pruned, start)["w"], [0, 2, 0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prune_lenet", {"kept": (0.1, 0.2)}, "`kept` has 2 fractions for 3 kernels"),
        ("lottery_ticket", {"rounds": 40}, r"rounds is 40, but two of them leave 0.\d % of the weights, expected"),
        ("lottery_ticket", {"redrawn": (99,)}, r"redrawn is \(99,\), expected rounds from 0 to 1"),
        ("distill_mnist", {"batch_size": 1000}, "1 epochs of 120 digits make no batch of 1000"),
        ("distill_features", {"student_depth": 9}, r"depth is 9, expected 6 n \+ 2"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(load_experiment, name, change, message, monkeypatch):
    module = load_experiment(f"compression/{name}")
    monkeypatch.setattr(module, "fit", None)  # a step would fail
    config = module.PRESETS["smoke"].__class__(**{**vars(module.PRESETS["smoke"]), **change})
    with pytest.raises(InputError, match=message):
        module.main(config, Run())


def costs_of(module, **changes):
    """Costs of all files of a pipeline: 100 kB, 100 µs and 5 % errors, but for the files in `changes`.

    A change is (bytes, microseconds for one image and for 128, validation error, test error).
    """
    files = {}
    for name in module.ROWS:
        size, one, many, validation, test = changes.get(module.file_name(name).replace(".", "_"), (1e5, 100, 100, 5, 5))
        times = {1: measure.Latency(one / 1e6, 0), 128: measure.Latency(many / 1e6, 0)}
        latency = {} if name[1] == module.ENCODED else times
        files[name] = comparison.Cost(measure.Counts(1, 1), measure.Size(int(size), 1), validation, test, latency)
    return files


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({}, "teacher.onnx"),  # nothing is smaller
        ({"small_onnx": (5e4, 50, 50, 5.1, 9)}, "small.onnx"),  # chosen on validation images
        ({"small_onnx": (5e4, 50, 50, 5.3, 5)}, "teacher.onnx"),  # loses too much
        ({"small_onnx": (5e4, 50, 101, 5, 5)}, "teacher.onnx"),  # slower with 128 images
        ({"small_onnx": (2e5, 50, 50, 5, 5)}, "teacher.onnx"),  # larger
        ({"small_onnx": (5e4, 50, 50, 5, 5), "int8_onnx": (9e4, 40, 99, 5, 5)}, "int8.onnx"),  # the fastest on one
        ({"small_stablehlo": (9e4, 40, 40, 5, 5), "teacher_stablehlo": (1e5, 45, 45, 5, 5)}, "small.stablehlo"),
        ({"small_int8_dlj": (1e3, 1, 1, 5, 5)}, "teacher.onnx"),  # must be decoded first
    ],
)
def test_the_file_that_the_pipeline_recommends(load_experiment, changes, best):
    module = load_experiment("compression/pipeline")
    of = comparison.Comparison(module.TEACHER, [costs_of(module, **changes)] * 2)
    name = comparison.recommended(of, 0.2)
    assert module.file_name(name or (module.TEACHER, module.ONNX)) == best
    metrics = module.measured(of, name, 0.2)
    expected = changes.get(best.replace(".", "_"), (1e5, 100, 100, 5, 5))
    teacher = changes.get(f"teacher_{best.split('.')[1]}", (1e5, 100, 100, 5, 5))
    np.testing.assert_allclose(metrics["times_smaller/chosen"], teacher[0] / expected[0])
    np.testing.assert_allclose(metrics["times_faster/chosen"], min(teacher[1] / expected[1], teacher[2] / expected[2]))
    np.testing.assert_allclose(metrics["accuracy_to_spare/chosen"], 0.2 - (expected[4] - teacher[4]))


def test_the_speeds_of_files_in_words(load_experiment):
    """Of two seeds the median counts; what is within a twentieth is as fast."""
    module = load_experiment("compression/pipeline")
    each = {"small_onnx": (5e4, 40, 200, 5, 5), "int8_onnx": (5e4, 98, 96, 5, 5)}
    other = {**each, "small_onnx": (5e4, 50, 200, 5, 5)}
    of = comparison.Comparison(module.TEACHER, [costs_of(module, **changes) for changes in (each, other)])
    rest = f"{module.BASELINE} as fast, small {{}}, small int8 as fast"
    assert comparison.speeds(of, module.ONNX, 1) == "int8 as fast, " + rest.format("2.2 times faster")
    assert comparison.speeds(of, module.ONNX, 128) == "int8 as fast, " + rest.format("2.0 times SLOWER")


def test_the_pipelines_networks_are_those_of_its_flag_and_a_teacher_has_no_normalisation(load_experiment):
    module = load_experiment("compression/pipeline")
    assert set(module.MODELS) == set(get_args(get_type_hints(module.Config)["model"]))
    model, image = module.MODELS["resnet8"](10), np.zeros((1, 8, 8, 3), np.uint8)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(image.shape), train=False))
    teacher = module.folded(model.apply, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes),
                            {"image": image})  # fmt: skip
    assert set(teacher.variables) == {"params"}
    assert not [path for path in structure.groups(*teacher, image / 255, train=False).free if "norm" in path]


def linear(variables, image, train):
    """A normalised linear layer: [B, ...] -> [B, 3]."""
    statistics, x = variables["batch_stats"]["norm"], image.reshape(len(image), -1)
    return (x @ variables["params"]["layer"]["kernel"] - statistics["mean"]) * statistics["var"] ** -0.5


def linear_variables(rng):
    """Variables of `linear` for two seeds and images of 28 x 28 pixels."""
    statistics = {"mean": np.float32(rng.normal(size=(2, 3))), "var": np.float32(1 + rng.random((2, 3)))}
    kernel = np.float32(rng.normal(size=(2, 784, 3)))
    return {"params": {"layer": {"kernel": kernel}}, "batch_stats": {"norm": statistics}}


def seed_of(tree, seed):
    """The leaves of one seed of a tree [S, ...]."""
    return jax.tree.map(lambda leaf: leaf[seed], tree)


def test_errors_and_differing_images_of_the_integer_network(load_experiment):
    module = load_experiment("compression/integer_only")
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0], [0.0, 1.0]], np.float32)
    assert module.error(logits, np.array([1, 1, 0, 0])) == 50
    other = logits.copy()
    assert module.differing(logits, other) == 0
    other[0, 1], other[3] = np.nextafter(other[0, 1], np.float32(9)), np.nan
    assert module.differing(logits, other) == 2
    floats = logits + np.float32([0.5, -0.5])
    np.testing.assert_allclose(module.distance(logits, floats), 100 * 0.5 / floats.std(), rtol=1e-6)


def test_the_integer_network_has_the_weights_and_ranges_of_the_folded_one(load_experiment):
    """Of each seed: kernel / sqrt(var) in steps of its channel's largest / 127, and the range of the images."""
    module, rng = load_experiment("compression/integer_only"), np.random.default_rng(0)
    variables, images = linear_variables(rng), np.float32(rng.random((5, 28, 28, 1)))
    apply, small = module.quantised(linear, variables, images)
    kernel = variables["params"]["layer"]["kernel"] / np.sqrt(variables["batch_stats"]["norm"]["var"])[:, None]
    found = small["params"]["layer"]["kernel"]
    np.testing.assert_allclose(found.scale, abs(kernel).max(1, keepdims=True) / 127, rtol=1e-5)
    np.testing.assert_allclose(found.values, kernel / found.scale, atol=0.5001)
    for end, least in zip(small["ranges"]["layer"], (images.min(), images.max()), strict=True):
        np.testing.assert_array_equal(end, [least] * 2)
    read = lambda variables: apply({"params": quantize.dequantize(variables["params"])}, images)
    expected = linear(seed_of(variables, 1), images, False)
    np.testing.assert_allclose(read(seed_of(small, 1)), expected, atol=0.02 * abs(expected).max())


def test_what_training_regains_of_the_error_that_rounding_adds(load_experiment):
    module = load_experiment("compression/quantize_sweep")
    reference, rounded, trained = np.array([1.0, 1, 1, 1]), np.array([5.0, 3, 1, 0.5]), np.array([2.0, 4, 0.5, 0.1])
    np.testing.assert_allclose(module.regained(reference, rounded, trained), [75, -50, 0, 0])


def test_the_network_of_the_sweep_is_folded_seed_by_seed(load_experiment):
    module, rng = load_experiment("compression/quantize_sweep"), np.random.default_rng(0)
    variables, image = linear_variables(rng), np.float32(rng.random((2, 28, 28, 1)))
    apply, folded = module.folded(linear, variables)
    assert folded.keys() == {"params"}
    for seed in range(2):
        expected = linear(seed_of(variables, seed), image, False)
        np.testing.assert_allclose(apply(seed_of(folded, seed), image), expected, rtol=1e-4, atol=1e-4)


def test_the_curves_of_the_sweep(load_experiment):
    module = load_experiment("compression/quantize_sweep")
    found = {f"error/{kind}{bits}": np.array([bits, 10.0]) for kind in ("ptq", "qat", "lsq") for bits in (4, 2)}
    curves = module.curves(found | {"error/float": np.array([1.0, 2.0])}, (2, 4))
    assert len(curves) == 4
    np.testing.assert_array_equal(curves["rounded after training"][1], [[2, 10], [4, 10]])
    np.testing.assert_array_equal(curves["floating point"][1], [[1, 2], [1, 2]])


def test_kernels_of_binary_networks_learn_at_the_rates_of_kernels_of_glorots_size(load_experiment):
    """Of f(w) = g(h w), h² = 1.5 / (in + out), the scaled gradient moves h w by what the gradient of g says."""
    module = load_experiment("compression/binary_connect")
    tx, h = module.by_glorot(), np.sqrt(1.5 / (3 + 5))
    slope = np.arange(15, dtype=np.float32).reshape(3, 5)  # of g
    gradients = {"Dense_0": {"kernel": h * slope, "bias": np.ones(5, np.float32)}}
    scaled, _ = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(h * scaled["Dense_0"]["kernel"], slope, rtol=1e-6)
    np.testing.assert_array_equal(scaled["Dense_0"]["bias"], 1)


def test_the_hinge_loss_of_a_network_and_its_error(load_experiment):
    module = load_experiment("compression/binary_connect")
    loss = module.hinge_loss(lambda variables, image, train, rngs: variables["params"])
    logits, labels = np.array([[2.0, -0.5], [0.5, 0.0]], np.float32), np.array([0, 1])
    value, (collections, metrics) = loss({"params": logits}, {"image": np.zeros((2, 8, 8, 1)), "label": labels}, None)
    np.testing.assert_allclose(value, (0.5**2 + (1.5**2 + 1)) / 2)
    assert (collections, metrics) == ({}, {"error": 0.5})


def test_weights_of_one_are_counted_exactly(load_experiment):
    module = load_experiment("compression/binary_connect")
    kernel = np.array([[[1, -1], [0.5, 1]], [[-1, -1], [np.nextafter(np.float32(1), np.float32(0)), 0]]], np.float32)
    params = {"a": {"kernel": kernel, "bias": np.ones((2, 7))}, "b": {"kernel": np.array([[[1, -1]], [[0, 0]]])}}
    np.testing.assert_allclose(module.ones(params), [100 * 5 / 6, 100 * 2 / 6])
    drawn = module.within_one(jax.random.key(0), (2, 300, 40))
    assert abs(drawn).max() <= 1
    assert abs(drawn).mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(module.ones(quantize.binary()({"kernel": drawn})), [100, 100])


def test_values_of_ternary_and_binary_kernels(load_experiment):
    module = load_experiment("compression/ternary")
    kernel = jax.random.normal(jax.random.key(0), (2, 30, 4))  # of two seeds
    params = {"a": {"kernel": kernel, "bias": kernel}, "b": {"kernel": kernel[:, :1, :2]}}
    np.testing.assert_array_equal(module.values(params), [120, 120])
    found = {name: jax.vmap(module.ROUNDINGS[name])(params) for name in module.ROUNDINGS}
    np.testing.assert_array_equal(module.values(found["real"]), [120, 120])
    np.testing.assert_array_equal(module.values(found["ternary"]), [3, 3])
    np.testing.assert_array_equal(module.values(found["binary"]), [2, 2])
    scale = np.abs(np.asarray(kernel, np.float64)).mean((1, 2))  # of each seed, for the whole kernel
    np.testing.assert_allclose(np.abs(found["binary"]["a"]["kernel"]).max((1, 2)), scale, rtol=1e-6)


def test_students_of_features_differ_in_their_losses_alone(load_experiment, monkeypatch):
    """All of them start at the same weights, see the same images, and hear of the same teacher."""
    module, seen = load_experiment("compression/distill_features"), {}

    def untrained(step, states, stream, *, steps, run):
        batches = [stream(i) for i in range(3)]
        seen[run.name] = step.args[0], batches, distill.without_regressors(states.params), states.extra
        assert (distill.REGRESSORS in states.params) == (run.name == "hints")
        return states

    monkeypatch.setattr(module, "fit", untrained)
    monkeypatch.setattr(module, "evaluator", lambda *given: lambda variables: {"error": np.zeros(2)})
    config = dataclasses.replace(module.PRESETS["smoke"], students=module.Config().students)
    found = module.main(config, Run(settings=Settings(seeds=(0, 1))))
    _, _, *start = seen.pop("teacher")
    assert {f"error/{name}" for name in seen} | {"error/teacher"} == set(found)
    for taught_by, *others in seen.values():
        jax.tree.map(np.testing.assert_array_equal, taught_by, {"params": start[0], **start[1]})
        jax.tree.map(np.testing.assert_array_equal, others, list(seen["alone"][1:]))


def test_the_loss_of_each_student_by_hand(load_experiment):
    module = load_experiment("compression/distill_features")
    cfg = dataclasses.replace(module.PRESETS["smoke"], soft_weight=0.7, hint_weight=0.2, attention_weight=3.0)
    rng = np.random.default_rng(0)
    image, label = rng.random((3, 8, 8, 1), np.float32), np.array([1, 7, 7])
    small, large = CifarResNet(8, width=2), CifarResNet(14, width=3)
    init = lambda net: jax.jit(lambda: net.init(jax.random.key(1), image, train=False))()
    own, teacher = init(small), init(large)
    regressor = {"kernel": rng.normal(size=(4, 6)).astype(np.float32), "bias": rng.normal(size=6).astype(np.float32)}
    answers, maps = outputs(small, own, image, (0, 0, 0), train=True)
    taught, wanted = outputs(large, teacher, image, (1, 1, 1), train=False)

    log_p = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    attention = lambda x: (q := (x**2).sum(-1).reshape(3, -1)) / np.sqrt((q**2).sum(1, keepdims=True))
    distance = lambda s, t: 0.5 * np.sqrt(((attention(s) - attention(t)) ** 2).sum(1)).mean()
    labels = -log_p(answers)[range(3), label].mean()
    soft = -16 * (np.exp(log_p(taught / 4)) * log_p(answers / 4)).sum(-1).mean()
    hint = 0.5 * ((wanted[1] - maps[1] @ regressor["kernel"] - regressor["bias"]) ** 2).sum((1, 2, 3)).mean()
    attended = sum(distance(s, t) for s, t in zip(maps, wanted, strict=True))
    expected = {
        "alone": labels,
        "soft": 0.3 * labels + 0.7 * soft,
        "hints": labels + 0.2 * hint,
        "attention": labels + 3 * attended,
        "soft_attention": 0.3 * labels + 0.7 * soft + 3 * attended,
    }
    batch = {"image": image, "label": label, "teacher": teacher}
    regressors = {"hints": {distill.REGRESSORS: [regressor]}}

    def found(student, weights):
        loss = module.student_loss(small, large, cfg.temperature, weights)
        variables = {**own, "params": own["params"] | regressors.get(student, {})}
        return loss(variables, batch, jax.random.key(2))[0]

    values = jax.jit(lambda: {name: found(name, weights) for name, weights in module.cells(cfg).items()})()
    assert values == pytest.approx(expected, rel=1e-4)


def outputs(net, variables, image, last, train):
    """The logits and the outputs of the block `last` of each stage, float64, as Flax captures them."""
    run = jax.jit(lambda: net.apply(variables, image, train=train, capture_intermediates=True, mutable=True))
    logits, seen = run()
    blocks = [seen["intermediates"][f"stage{stage}_block{i}"]["__call__"][0] for stage, i in enumerate(last, 1)]
    return np.float64(logits), [np.float64(block) for block in blocks]
