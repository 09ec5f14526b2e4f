"""What the compression experiments count, by hand, and which settings they refuse before they train."""

import dataclasses

import jax
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dl_jax.compress import codec, quantize
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run, Settings


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
    ],
)
def test_what_cannot_work_is_refused_before_any_training(load_experiment, name, change, message, monkeypatch):
    module = load_experiment(f"compression/{name}")
    monkeypatch.setattr(module, "fit", None)  # a step would fail
    config = module.PRESETS["smoke"].__class__(**{**vars(module.PRESETS["smoke"]), **change})
    with pytest.raises(InputError, match=message):
        module.main(config, Run())


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
