"""experiments/learning/multi_task.py: overlaid digits, misspelt names, and which gradient reaches which layers."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import losses
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run
from dl_jax.metrics.transcription import edit_distance

RNG = np.random.default_rng(0)
LABELS = np.arange(200) % 10
IMAGES = RNG.integers(0, 256, (200, 28, 28, 1), np.uint8)
RECORDS = {"image": IMAGES, "label": LABELS}


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("learning/multi_task")


@pytest.fixture(scope="module")
def cfg(experiment):
    return dataclasses.replace(experiment.PRESETS["smoke"], width=5)


def network(experiment, cfg, method):
    """The network of a method with an encoder that compiles soon."""
    net = experiment.network(cfg, method)
    return net._replace(encoder=experiment.MLP((), net.encoder.classes))


def drawn(net, batch):
    """Parameters, which are drawn without compiling anything."""
    like = jax.eval_shape(lambda key: net.init(key, batch, train=True), jax.random.key(0))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape) / 5, jnp.float32), like)


def batch_of(experiment, method):
    draw = experiment.overlaid if "left" in experiment.ROUTES[method] else with_names(experiment)
    return {name: jnp.asarray(column[:8]) for name, column in draw(RECORDS, 0).items()}


def with_names(experiment, misspelt=0.3):
    return lambda records, seed: experiment.with_names(records, seed, misspelt)


def gradient(experiment, net, params, batch, balanced=False):
    loss = experiment.task_loss(net, balanced)
    return jax.jit(jax.grad(lambda p: loss({"params": p}, batch, jax.random.key(0))[0]))(params)


def test_the_digits_of_the_test_are_the_same_everywhere(experiment):
    """The result rests on them, and they are drawn and not stored."""
    pixels = (np.arange(20 * 28 * 28) % 251).astype(np.uint8).reshape(20, 28, 28, 1)
    found = experiment.overlaid({"image": pixels, "label": np.arange(20)}, experiment.TEST_SEED)
    assert found["right"].tolist() == [3, 10, 8, 8, 11, 11, 14, 4, 8, 3, 15, 15, 1, 8, 18, 8, 10, 15, 4, 4]
    assert zlib.crc32(found["image"].tobytes()) == 3733338548


def test_a_digit_lies_over_another_pixel_by_pixel(experiment):
    found = experiment.overlaid(RECORDS, 3)
    np.testing.assert_array_equal(found["left"], LABELS)
    partner = np.random.default_rng(3).integers(200, size=200)
    np.testing.assert_array_equal(found["right"], LABELS[partner])
    kept = [int((i + 0.5) * 36 / 28) for i in range(28)]
    for n in range(5):
        for i, row in enumerate(kept):
            for j, column in enumerate(kept):
                left = IMAGES[n, row, column, 0] if max(row, column) < 28 else 0
                over = min(row, column) >= 6 and max(row, column) < 34
                right = IMAGES[partner[n], row - 6, column - 6, 0] if over else 0
                assert found["image"][n, i, j, 0] == max(left, right)


@pytest.mark.parametrize("draw", ["overlaid", "with_names"])
def test_a_set_is_a_function_of_the_seed_and_of_its_own_split(experiment, draw):
    draw = experiment.overlaid if draw == "overlaid" else with_names(experiment)
    first, again, other = draw(RECORDS, 0), draw(RECORDS, 0), draw(RECORDS, 1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any((first[name] != other[name]).any() for name in first)
    even = {"image": IMAGES // 2 * 2, "label": LABELS // 2 * 2}  # a split without odd pixels and digits
    found = draw(even, 0)
    assert all((found[name] % 2 == 0).all() for name in found if name != "name")


def word(symbols):
    return "".join(chr(96 + symbol) for symbol in symbols if symbol)


def test_names_without_mistakes(experiment):
    found = experiment.spelt(np.arange(10), 0.0, np.random.default_rng(0))
    assert found.shape == (10, experiment.LETTERS)
    assert tuple(map(word, found)) == experiment.NAMES


def test_each_letter_is_misspelt_as_often_as_asked(experiment):
    """A mistake is one edit; of replacements 1 in 26 is by the same letter. Two mistakes in a name are rare here."""
    labels = np.repeat(np.arange(10), 1000)
    found = experiment.spelt(labels, 0.06, np.random.default_rng(0))
    names = [experiment.NAMES[label] for label in labels]
    edits = [edit_distance(word(symbols), name) for symbols, name in zip(found, names, strict=True)]
    letters = sum(map(len, names))
    assert sum(edits) / letters == pytest.approx(0.06 * (1 - 1 / 78), abs=0.004)


def test_a_misspelt_letter_is_lost_replaced_or_followed_by_another(experiment):
    labels = np.repeat(np.arange(10), 1000)
    found = experiment.spelt(labels, 1.0, np.random.default_rng(0))
    lengths, whole = (found > 0).sum(1), np.array([len(experiment.NAMES[label]) for label in labels])
    np.testing.assert_array_equal(found > 0, np.arange(experiment.LETTERS) < lengths[:, None])  # letters first
    assert found.max() == 26
    assert lengths.mean() == pytest.approx(whole.mean(), abs=0.05)  # as many letters are lost as added
    for length in (3, 4, 5):  # Σ of `length` draws of -1, 0 and 1, equally often
        assert (lengths - whole)[whole == length].var() == pytest.approx(length * 2 / 3, rel=0.06)


def test_names_have_the_labels_of_the_images_in_another_order(experiment):
    found = with_names(experiment, 0.0)(RECORDS, 0)
    assert [word(symbols) for symbols in found["name"]] == [experiment.NAMES[label] for label in found["names"]]
    np.testing.assert_array_equal(np.bincount(found["names"]), np.bincount(found["images"]))
    assert 0 < (found["names"] == found["images"]).mean() < 0.3


@pytest.mark.parametrize("case", ["between", "left is shorter", "right is shorter", "equal"])
def test_the_shortest_combination_by_brute_force(experiment, case):
    a, b = RNG.normal(size=(2, 6, 4)).astype(np.float32)
    a, b = {"between": (a, b), "left is shorter": (a, 3 * a + b / 9), "right is shorter": (3 * b + a / 9, b),
            "equal": (a, a)}[case]  # fmt: skip
    share = float(experiment.least_norm(jnp.asarray(a), jnp.asarray(b)))
    shares = np.linspace(0, 1, 10_001)
    squares = (a * a).sum() * shares**2 + 2 * (a * b).sum() * shares * (1 - shares) + (b * b).sum() * (1 - shares) ** 2
    if case != "equal":
        assert share == pytest.approx(shares[squares.argmin()], abs=1e-3)
    step = share * a + (1 - share) * b
    for slope in (a, b):  # it lowers both losses
        assert (slope * step).sum() >= (step**2).sum() * (1 - 1e-4)
    assert {"left is shorter": share == 1, "right is shorter": share == 0}.get(case, True)


def slopes(net, params, batch):
    """The gradient of each task's loss with respect to its encoder, its head and the code, written out."""
    found = {}
    for task, (encoder, head) in net.routes.items():
        image = batch["image"] / 255

        def nats(encoder_params, head_params, shift, task=task, image=image):
            code = jax.nn.relu(net.encoder.apply({"params": encoder_params}, image, train=True)) + shift
            logits = net.head.apply({"params": head_params}, code, train=True)
            return losses.cross_entropy(logits, batch[task]).mean()

        zeros = jnp.zeros((len(image), net.encoder.classes))
        given = params["encoder"][encoder], params["head"][head], zeros
        found[task] = jax.jit(jax.grad(nats, (0, 1, 2)))(*given)
    return found


@pytest.mark.parametrize("method", ["uniform", "mgda"])
def test_the_shared_encoder_moves_along_the_weighted_sum(experiment, cfg, method):
    net, batch = network(experiment, cfg, method), batch_of(experiment, method)
    params = drawn(net, batch)
    each = slopes(net, params, batch)
    share = experiment.least_norm(each["left"][2], each["right"][2])
    assert 0 < share < 1
    weights = (share, 1 - share) if method == "mgda" else (1, 1)
    found = gradient(experiment, net, params, batch, balanced=method == "mgda")
    expected = jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, each["left"][0], each["right"][0])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found["encoder"]["both"], expected)
    for task in net.routes:
        jax.tree.map(close, found["head"][task], each[task][1])  # heads learn from their own losses


def test_layers_that_are_not_shared_do_not_know_of_the_other_task(experiment, cfg):
    """Of two networks in one state each has the gradient that it has alone; a shared head has the sum."""
    batch = batch_of(experiment, "apart")
    other = {**batch, "name": batch["name"][::-1], "names": batch["names"][::-1] * 0}
    for method in ("apart", "together"):
        net = network(experiment, cfg, method)
        params = drawn(net, batch)
        found, changed = (gradient(experiment, net, params, each) for each in (batch, other))
        jax.tree.map(np.testing.assert_array_equal, found["encoder"]["images"], changed["encoder"]["images"])
        head = found["head"][net.routes["images"][1]], changed["head"][net.routes["images"][1]]
        same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *head)))
        assert same == (method == "apart")


def test_networks_of_all_methods_begin_alike(experiment, cfg):
    begin = lambda method: network(experiment, cfg, method).init(jax.random.key(0), batch, train=True)["params"]
    batch = batch_of(experiment, "single")
    starts = {method: begin(method) for method in ("single", "uniform", "mgda")}
    jax.tree.map(np.testing.assert_array_equal, starts["uniform"], starts["mgda"])
    jax.tree.map(np.testing.assert_array_equal, starts["single"]["head"], starts["mgda"]["head"])
    first = starts["single"]["encoder"]["left"], starts["mgda"]["encoder"]["both"]
    jax.tree.map(np.testing.assert_array_equal, *first)
    kernels = [starts["single"]["encoder"][task]["Dense_0"]["kernel"] for task in ("left", "right")]
    assert (kernels[0] != kernels[1]).any()


def test_the_encoder_is_the_authors_with_one_more_layer(experiment):
    """Convolutions of 5x5 to 10 and 20 maps and dense layers of 50 units, as in `multi_lenet.py`, and the code's."""
    encoder, image = experiment.network(experiment.Config(), "mgda").encoder, jnp.zeros((1, 28, 28, 1))
    params = jax.eval_shape(lambda key: encoder.init(key, image, train=True), jax.random.key(0))["params"]
    authors = 26 * 10 + (25 * 10 + 1) * 20 + (320 + 1) * 50
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == authors + 51 * 50


@pytest.mark.parametrize("split", ["train_split", "test_split"])
def test_one_image_is_refused_before_any_training(experiment, cfg, monkeypatch, split):
    monkeypatch.setattr(experiment, "fit", lambda *args, **options: pytest.fail("a network was trained"))
    with pytest.raises(InputError, match=r"^train\[:1\] has one image, expected two or more, to overlay them; choose"):
        experiment.main(dataclasses.replace(cfg, **{split: "train[:1]"}), Run())
