"""What the compression experiments count, by hand, and which settings they refuse before they train."""

import dataclasses

import jax
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dl_jax.compress import codec, distill, quantize
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
    taken = (5 + 1 + 3) * (6 + 5) + 3 * 63 * 32
    assert module.ratio_quantised(layers, 6) == pytest.approx(32 * 108 / taken)
    data = codec.encode(layers)
    assert module.ratio_file(layers, data) == 4 * (108 + 6) / len(data)


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
