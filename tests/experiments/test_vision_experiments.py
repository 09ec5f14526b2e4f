"""What the vision experiments measure, by hand, and which settings they refuse before they train."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dl_jax import optim
from dl_jax.core.errors import InputError
from dl_jax.core.step import init_state, make_step
from dl_jax.harness import Run
from dl_jax.harness.run import Settings
from dl_jax.models.vision.mlp import MLP


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("imagenet_resnet", {"test_size": 10}, "test_size is 10, expected 16 or more"),
        ("cifar_resnet", {"triangle": False, "warmup": 1}, "warmup is 1, expected less than half of the 2 steps"),
        ("cifar_resnet", {"depth": 9}, r"depth is 9, expected 6 n \+ 2"),
        ("transfer", {"labels": (2, 100_000)}, "100000 labels of each class, expected at most"),
        ("regularisation", {"held_out": 0.0}, "0 of 64 images are 0, expected 1 to 63 to hold out"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(load_experiment, name, change, message, monkeypatch):
    module = load_experiment(f"vision/{name}")
    monkeypatch.setattr(module, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        module.main(dataclasses.replace(module.PRESETS["smoke"], **change), Run())


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_layers_that_scale_the_signal_scale_its_mean_square_by_the_square(load_experiment, scale):
    depth, model = load_experiment("vision/depth"), MLP((4, 4, 4))
    image = np.full((3, 2, 2, 1), 255, np.uint8)
    variables = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), image, train=False))
    for i in range(3):
        variables["params"][f"Dense_{i}"]["kernel"] = scale * jnp.eye(4)
    seeds = jax.tree.map(lambda leaf: leaf[None], variables)
    np.testing.assert_allclose(depth.signal_ratio(model, seeds, {"image": image}), [scale**2], rtol=1e-6)


def test_multiply_adds_by_hand(load_experiment):
    """Products with padding are not counted: a kernel has 3 n - 2 along n pixels, with a stride of 2 3 n / 2 - 1."""
    separable = load_experiment("vision/separable")
    cfg, counts = separable.Config(), []
    for kind in (False, True):
        net = separable.MobileNetV1(cfg.stem, cfg.blocks, classes=10, separable=kind)
        init = lambda net=net: net.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
        counts.append(separable.multiply_adds(net, jax.eval_shape(init)))
    maps = [16, *(maps for maps, _ in cfg.blocks)]
    taps, pixels = [82, 41, 40, 20, 19], [28, 14, 14, 7, 7]  # along one axis
    blocks = list(zip(taps, pixels, maps, maps[1:], strict=False))
    ends = 82**2 * 16 + 128 * 10
    assert counts[0] == ends + sum(t**2 * c * d for t, _, c, d in blocks)
    assert counts[1] == ends + sum(t**2 * c + n**2 * c * d for t, n, c, d in blocks)
    assert counts[0] / counts[1] == pytest.approx(6.99, abs=0.005)


@pytest.fixture(scope="module")
def long_tail(load_experiment):
    return load_experiment("vision/long_tail")


def test_a_tail_of_classes(long_tail):
    labels = np.tile(np.arange(10), 100)
    rows = long_tail.tail(labels, 100.0)
    assert np.bincount(labels[rows]).tolist() == [100, 59, 35, 21, 12, 7, 4, 2, 1, 1]
    assert sorted(set(rows)) == rows.tolist()
    assert long_tail.tail(labels, 1.0).tolist() == list(range(1000))
    learnt = labels[rows][long_tail.balanced(labels[rows])]
    assert np.bincount(learnt).tolist() == [100] * 10
    for imbalance in (100.1, 1e9):
        with pytest.raises(InputError, match="the rarest class has 100 images, of which none would be left"):
            long_tail.tail(labels, imbalance)


def test_the_losses_of_the_methods_by_hand(long_tail):
    counts, logits, labels = np.array([6, 3, 1]), jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]]), jnp.array([0, 2])
    found = {name: np.asarray(of(logits, labels)) for name, of in long_tail.per_label(counts, gamma=0.0).items()}
    shares, e = counts / 10, np.exp(np.asarray(logits, np.float64))
    p, q = (x[[0, 1], [0, 2]] / x.sum(1) for x in (e, e * shares))
    for name, expected in {
        "cross_entropy": -np.log(p),
        "class_weights": -np.log(p) / (3 * shares[[0, 2]]),
        "focal": -np.log(p),
        "adjusted": -np.log(q),
        "sampling": -np.log(p),
    }.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    weight = [long_tail.per_label(counts, 0.0)["class_weights"](jnp.zeros((3, 3)), jnp.arange(3)) @ shares]
    np.testing.assert_allclose(weight, np.log(3), rtol=1e-6)  # the weights are 1 on average


def test_errors_of_classes_by_hand(long_tail):
    confusion = np.array([[[0.2, 0.2], [0.0, 0.6]], [[0.4, 0.0], [0.45, 0.15]]])
    np.testing.assert_allclose(long_tail.class_errors(confusion), [[50, 0], [0, 75]], atol=1e-12)
    with pytest.raises(InputError, match="no image of class 1, expected all classes"):
        long_tail.class_errors(np.array([[[0.5, 0.5], [0, 0]]]))


@pytest.fixture(scope="module")
def transfer(load_experiment):
    return load_experiment("vision/transfer")


def test_the_halves_of_the_digits(transfer):
    records = {"image": np.arange(20), "label": np.tile(np.arange(10), 2)}
    for first in (0, 5):
        found = transfer.half(records, first)
        assert found["label"].tolist() == [0, 1, 2, 3, 4] * 2
        assert (found["image"] % 10).tolist() == [*range(first, first + 5)] * 2
    with pytest.raises(InputError, match="no image of the classes 5 to 9, expected some of each"):
        transfer.half({"image": np.arange(3), "label": np.arange(3)}, 5)


def test_each_network_starts_from_its_own_variables_and_trains_its_own_layers(transfer, monkeypatch, tmp_path):
    """Nothing is trained: a fit adds 1 to the parameters, and shows where it began and what the optimiser changes."""
    began, changed = {}, {}

    def fit(tx, states, stream, *, steps, run):
        update = jax.jit(jax.vmap(tx.update))(jax.tree.map(jnp.ones_like, states.params), states.opt_state)[0]
        began[run.name] = states.params
        changed[run.name] = {name: bool(each["kernel"].any()) for name, each in update.items()}
        return states._replace(params=jax.tree.map(lambda leaf: leaf + 1, states.params))

    monkeypatch.setattr(transfer, "fit", fit)
    monkeypatch.setattr(transfer, "make_step", lambda loss, tx: tx)
    monkeypatch.setattr(transfer, "per_seed", lambda tx, one_by_one: tx)
    monkeypatch.setattr(transfer, "evaluator", lambda *_: lambda variables: {"error": np.zeros(2)})
    with contextlib.closing(Run(epath.Path(tmp_path), Settings(seeds=(0, 1)))) as run:
        transfer.main(transfer.PRESETS["smoke"], run)
    source, scratch, tuned, frozen = (began[name] for name in ("source", "scratch_2", "fine_tuned_2", "frozen_2"))
    jax.tree.map(np.testing.assert_array_equal, scratch, source)
    jax.tree.map(np.testing.assert_array_equal, tuned, frozen)
    for name, layer in tuned.items():
        if name != transfer.HEAD:
            np.testing.assert_array_equal(layer["kernel"], source[name]["kernel"] + 1)
    assert (tuned[transfer.HEAD]["kernel"] != source[transfer.HEAD]["kernel"]).all()
    assert all(changed["scratch_2"].values())
    assert all(changed["fine_tuned_2"].values())
    assert changed["frozen_2"] == {name: name == transfer.HEAD for name in source}


def test_all_but_the_last_layer_is_kept_and_frozen(transfer):
    model = transfer.LeNetCaffe(5)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False))
    old, fresh = (jax.tree.map(lambda leaf, i=i: np.full(leaf.shape, i), shapes) for i in (0, 1))
    params = transfer.with_head(old, fresh)["params"]
    layers = {"Conv_0": 0, "Conv_1": 0, "Dense_0": 0, "Dense_1": 1}
    assert {name: {*np.unique(leaf["kernel"]), *np.unique(leaf["bias"])} for name, leaf in params.items()} == {
        name: {i} for name, i in layers.items()
    }
    frozen = jax.tree_util.tree_map_with_path(transfer.below_head, params)
    assert {name: (each["kernel"], each["bias"]) for name, each in frozen.items()} == {
        name: (not i, not i) for name, i in layers.items()
    }


def test_early_stopping_takes_each_seeds_value_at_its_lowest_error(load_experiment):
    errors = np.array([[3.0, 1.0], [1.0, np.nan], [2.0, 4.0]])
    values = np.array([[10, 20], [30, 40], [50, 60]])
    assert load_experiment("vision/regularisation").of_lowest(errors, values).tolist() == [30, 20]


def test_the_cells_of_augmentation_see_what_their_names_say(load_experiment):
    augmentation = load_experiment("vision/augmentation")
    see = augmentation.distortions(augmentation.PRESETS["paper"])
    batch = {"image": np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8), "label": np.arange(3)}
    seen = {name: np.asarray(of(jax.random.key(0), batch)["image"]) for name, of in see.items()}
    np.testing.assert_allclose(seen["plain"], batch["image"] / 255, rtol=1e-6)
    # White images turn black only where something comes in from outside, which elastic fields keep within some pixels.
    white = {**batch, "image": np.full((3, 28, 28, 1), 255, np.uint8)}
    corners = lambda of: of(jax.random.key(0), white)["image"][:, ::27, ::27].min()
    assert corners(see["plain"]) == 1
    assert corners(see["affine"]) < 0.5
    for a, b in (("plain", "affine"), ("plain", "elastic"), ("affine", "elastic")):
        assert abs(seen[a] - seen[b]).mean() > 0.05


@pytest.fixture(scope="module")
def features(load_experiment):
    return load_experiment("vision/features")


@pytest.fixture(scope="module")
def convnets(features):
    """Two sets of random variables of a small network, and the network."""
    model, rng = features.ConvNet((2, 2, 2, 2, 2), (3, 3)), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), features.IMAGE, train=False))
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)
    return model, *(jax.tree.map(draw, shapes) for _ in range(2))


def test_layers_are_randomised_from_the_last_one_on(features, convnets):
    _, mine, other = convnets
    assert {*features.LAYERS} == {*mine["params"]}
    for n in range(9):
        found = features.randomised(mine, other, n)["params"]
        for i, name in enumerate(features.LAYERS):
            assert found[name] is (other if i < n else mine)["params"][name]


def test_the_path_error_is_that_of_the_sum(features, convnets):
    model, variables, _ = convnets
    images = np.random.default_rng(1).integers(0, 256, (3, 28, 28, 1), np.uint8)
    errors = {n: features.path_error(model, n, variables, {"image": images}) for n in (1, 40)}
    unit = jnp.asarray(images / np.float32(255))
    logits = lambda image: model.apply(variables, image, train=False)
    of = lambda image: jnp.take_along_axis(logits(image), logits(unit).argmax(-1)[:, None], 1)[:, 0]
    rise = of(unit) - of(jnp.zeros_like(unit))
    one = (unit * jax.grad(lambda image: of(image).sum())(unit / 2)).sum((1, 2, 3))  # the path has one step
    np.testing.assert_allclose(errors[1], abs(one - rise) / abs(rise), rtol=1e-3)
    assert (errors[40] < 0.2).all()
    assert errors[40].max() < errors[1].max()


def test_all_kinds_of_maps_have_a_place_for_each_pixel(features, convnets):
    model, variables, _ = convnets
    cfg = dataclasses.replace(features.PRESETS["paper"], path=2, climb=1)
    of = lambda images, key: features.maps(model, cfg, variables, images, key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "MAPS", (2,))  # of the last convolution of this small network
        found = jax.eval_shape(of, jnp.zeros((3, 28, 28, 1)), jax.random.key(0))
    places = {name: 10 if name == "climb" else 3 for name in ("image", *features.KINDS)}
    assert {name: each.shape for name, each in found.items()} == {name: (n, 28, 28) for name, n in places.items()}


def test_ranks_of_the_same_network_agree(features, convnets, monkeypatch):
    model, variables, other = convnets
    seeds = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
    images = np.random.default_rng(2).integers(0, 256, (2, 28, 28, 1), np.uint8)
    monkeypatch.setattr(features, "LAYERS", features.LAYERS[:2])
    monkeypatch.setattr(features, "randomised", lambda mine, new, n: mine if n == 1 else new)
    found = features.rank_correlations(model, seeds(variables), seeds(other), images)
    for ranks in found.values():
        assert ranks.shape == (2, 1)
        assert ranks[0, 0] == pytest.approx(1)
        assert abs(ranks[1, 0]) < 0.9


@pytest.fixture(scope="module")
def points(load_experiment):
    return load_experiment("vision/points")


def test_solids_are_turned_anew_at_each_step(points, monkeypatch):
    class Learned(Exception):
        pass

    def step(loss, tx):
        raise Learned(loss)

    monkeypatch.setattr(points, "solid_loss", lambda model, see, variables, batch, key: batch["points"])
    monkeypatch.setattr(points, "make_step", step)
    with pytest.raises(Learned) as found:
        points.main(points.PRESETS["smoke"], Run())
    (loss,), solids = found.value.args, points.solids(2, 3, 0.0, 0)
    once, again = (loss({}, {"points": jnp.asarray(solids["points"])}, jax.random.key(seed)) for seed in (0, 1))
    assert not np.allclose(once, solids["points"], atol=0.1)
    assert not np.allclose(once, again, atol=0.1)


def test_solids_are_as_described(points):
    given = points.solids(80, 50, 0.0, 3)
    assert np.bincount(given["label"]).tolist() == [10] * 8
    np.testing.assert_allclose(given["points"].mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(given["points"], axis=-1).max(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(points.solids(80, 50, 0.0, 3)["points"], given["points"])
    assert not np.array_equal(points.solids(80, 50, 0.0, 4)["points"], given["points"])


def test_the_points_of_solids_lie_on_their_surfaces(points):
    u, v = np.random.default_rng(0).random((2, 500))
    found = {name: np.stack(surface(u, v), -1) for name, surface in points.SOLIDS.items()}
    radius = {name: np.hypot(x[:, 0], x[:, 1]) for name, x in found.items()}
    height = {name: x[:, 2] for name, x in found.items()}
    np.testing.assert_allclose(np.linalg.norm(found["ball"], axis=1), 1)
    np.testing.assert_allclose(abs(found["cube"]).max(1), 0.8)
    lid = abs(abs(height["cylinder"]) - 1) < 1e-9
    assert 0.4 < lid.mean() < 0.6
    np.testing.assert_allclose(radius["cylinder"][~lid], 1)
    side = height["cone"] > -1
    np.testing.assert_allclose((1 - height["cone"][side]) / 2, radius["cone"][side])
    np.testing.assert_allclose((radius["torus"] - 0.7) ** 2 + height["torus"] ** 2, 0.09)
    # A face of the tetrahedron is opposite a corner c, on the plane x · c = -1 · 0.81.
    np.testing.assert_allclose((found["tetrahedron"] @ points.TETRAHEDRON.T).min(1), -0.81)
    np.testing.assert_allclose(abs(height["lens"]), 0.4 * (1 - radius["lens"] ** 2), atol=1e-12)
    np.testing.assert_allclose(radius["bowl"] ** 2 + (0.5 - height["bowl"]) ** 2, 1)


def test_turns_keep_distances_and_are_even(points):
    batch = {"points": jnp.asarray(np.random.default_rng(1).normal(size=(2000, 4, 3)), jnp.float32)}
    found = points.turned(jax.random.key(0), batch)["points"]
    norms = lambda x: np.einsum("npi,nqi->npq", x, x)
    np.testing.assert_allclose(norms(found), norms(batch["points"]), atol=2e-4)
    turns = points.rotations(np.random.default_rng(2).normal(size=(4000, 4)))
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    assert abs(turns.mean(0)).max() < 0.05


def test_points_are_sorted_by_their_first_coordinate(points):
    given = np.random.default_rng(0).normal(size=(2, 5, 3))
    expected = np.stack([row[np.argsort(row[:, 0])] for row in given])
    np.testing.assert_allclose(points.ordered(jnp.asarray(given)), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def segment(load_experiment):
    return load_experiment("vision/segment")


def test_digits_are_inside(segment):
    digits = {"image": np.full((1, 8, 8, 1), 255, np.uint8), "label": np.zeros(1, int)}
    found = segment.scenes(digits, 4, 0)
    assert found["inside"].max() == 1
    assert ((found["inside"].sum((1, 2)) >= 64) & (found["inside"].sum((1, 2)) <= 3 * 64)).all()


def test_the_overlap_by_hand(segment, monkeypatch):
    assert segment.iou(np.array([1, 1, 0, 0]), np.array([0, 1, 1, 0])) == pytest.approx(1 / 3)
    assert segment.iou(np.zeros(3), np.zeros(3)) == 1
    found, inside = np.random.default_rng(0).integers(0, 2, (2, 3, 4, 4))
    monkeypatch.setattr(segment, "predicted", lambda model, variables, image: image[..., 0] == 1)
    batch = {"image": jnp.asarray(found)[..., None], "inside": jnp.asarray(inside), "mask": jnp.array([1.0, 0.0, 1.0])}
    both, either = segment.overlap(None, None, batch, None)["iou"]
    assert both / either == pytest.approx(segment.iou(found[::2], inside[::2]))
    records = {
        "image": np.array([10, 100, 104, 200], np.uint8).reshape(1, 2, 2, 1),
        "inside": np.array([[[0, 0], [1, 1]]]),
    }
    assert segment.best_threshold(records) == 100


@pytest.fixture(scope="module")
def regularisation(load_experiment):
    return load_experiment("vision/regularisation")


def test_the_images_held_out_are_the_last_ones(regularisation):
    images = {"image": np.arange(6), "label": np.arange(6)}
    first, last = regularisation.divided(images, 1 / 3)
    assert (first["image"].tolist(), last["label"].tolist()) == ([0, 1, 2, 3], [4, 5])
    for share in (0, 0.99):
        with pytest.raises(InputError, match=rf"{share} of 6 images are [06], expected 1 to 5 to hold out"):
            regularisation.divided(images, share)


def test_weights_that_are_zero_by_hand(regularisation):
    kernels = np.array([[[0.0, 1.0], [2.0, 0.0]], [[1e-30, 1.0], [2.0, 0.0]]])  # of two seeds
    params = {"a": {"kernel": kernels, "bias": np.zeros((2, 9))}, "b": {"kernel": np.ones((2, 4, 1))}}
    np.testing.assert_allclose(regularisation.zeros(params), [25, 12.5])


def test_the_learning_rate_of_all_methods_is_one_schedule(regularisation, monkeypatch):
    built, schedule = [], optim.warmup_cosine
    monkeypatch.setattr(optim, "warmup_cosine", lambda *given: built.append(given) or schedule(*given))
    cfg = dataclasses.replace(regularisation.PRESETS["smoke"], methods=("proximal",))
    regularisation.main(cfg, Run())
    assert built == [(cfg.learning_rate, cfg.steps)]


def test_the_penalty_of_the_proximal_operator_is_that_of_the_gradient(regularisation):
    """In a direction that is always the same: SGD with momentum ends where the penalised slope is 0."""
    cfg = dataclasses.replace(
        regularisation.PRESETS["smoke"], learning_rate=0.1, l1=0.3, l2=0.5, momentum=0.5, steps=400, clip=100.0
    )
    slope = lambda variables, batch, key: ((variables["params"]["kernel"] * batch).sum(), ({}, {}))
    found = {}
    for name in ("l2_l1", "proximal"):
        method = regularisation.methods(cfg)[name]
        step = jax.jit(make_step(method.penalised(slope), method.tx))
        state = init_state(jax.random.key(0), {"params": {"kernel": jnp.full((3, 1), 0.1)}}, method.tx)
        for _ in range(cfg.steps):
            state, _ = step(state, jnp.array([[-1.0], [0.1], [0.5]]))
        found[name] = np.asarray(state.params["kernel"])[:, 0]
    expected = np.array([(1.0 - 0.3) / 0.5, 0.0, -(0.5 - 0.3) / 0.5])
    np.testing.assert_allclose(found["proximal"], expected, rtol=1e-3)
    assert found["proximal"][1] == 0
    np.testing.assert_allclose(found["l2_l1"], expected, atol=0.03)
