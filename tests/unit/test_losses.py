import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from dl_jax import losses
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import chosen, is_kernel
from dl_jax.core.step import init_state, make_step

KEY = jax.random.key(0)


def numeric_gradient(f, x, eps=1e-6):
    """Central differences of the scalar function `f`."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = eps
        gradient[i] = (float(f(jnp.asarray(x + step))) - float(f(jnp.asarray(x - step)))) / (2 * eps)
    return gradient


def reference_log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Per-example losses


@pytest.mark.parametrize(
    ("error", "delta", "value"),
    [
        (0.5, 1, 0.125),
        (-0.5, 1, 0.125),
        (3, 1, 2.5),
        (-3, 1, 2.5),
        (2, 2, 2.0),
        (-5, 2, 8.0),
        (0, 1, 0),
        (1, 0.25, 0.21875),
    ],
)
def test_huber_by_hand(error, delta, value):  # e²/2, then delta |e| - delta²/2
    np.testing.assert_allclose(losses.huber(jnp.array([error + 7.0]), jnp.array([7.0]), delta), [value], rtol=1e-6)


@pytest.mark.parametrize("delta", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_huber_is_continuous_with_its_slope_at_delta(delta, side):
    with jax.enable_x64(True):
        value_and_slope = jax.value_and_grad(lambda e: losses.huber(e[None], jnp.zeros(1), delta)[0])
        inside, slope_inside = value_and_slope(jnp.float64(side * delta * (1 - 1e-9)))
        outside, slope_outside = value_and_slope(jnp.float64(side * delta * (1 + 1e-9)))
        np.testing.assert_allclose([inside, outside], delta**2 / 2, rtol=1e-8)
        np.testing.assert_allclose([slope_inside, slope_outside], side * delta, rtol=1e-8)
        far = [value_and_slope(jnp.float64(side * m * delta)) for m in (2, 10)]
        np.testing.assert_allclose([slope for _, slope in far], side * delta)
        np.testing.assert_allclose([value for value, _ in far], [1.5 * delta**2, 9.5 * delta**2])


def test_squared_error_averages_over_each_example():
    predictions, targets = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 4.0], [3.0, 1.0]])
    np.testing.assert_allclose(losses.squared_error(predictions, targets), [2.0, 5.0])
    np.testing.assert_allclose(losses.squared_error(predictions[:, 0], targets[:, 0]), [0.0, 9.0])


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([1, 0])), [-np.log(0.75), np.log(2)], rtol=1e-6)
    soft = losses.soft_cross_entropy(logits, jnp.array([[0.5, 0.5], [0.0, 1.0]]))
    np.testing.assert_allclose(soft, [-(np.log(0.25) + np.log(0.75)) / 2, np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (3, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e4])  # at 1e4 a softmax without the shift overflows
def test_cross_entropies_match_float64(rng, shape, scale):
    logits, labels = rng.normal(size=(*shape, 6)) * scale, rng.integers(0, 6, shape)
    targets = rng.dirichlet(np.ones(6), shape)
    log_p = reference_log_softmax(logits.astype(np.float32).astype(np.float64))
    hard = losses.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    soft = losses.soft_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.float32))
    assert hard.shape == soft.shape == shape
    np.testing.assert_allclose(hard, -np.take_along_axis(log_p, labels[..., None], -1)[..., 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(soft, -(targets * log_p).sum(-1), rtol=1e-5)


def test_squared_hinge_by_hand_and_in_float64(rng):
    """(1 - y)² for the label where y < 1, plus (1 + y)² for every other class where y > -1 (Tang 2013)."""
    logits = jnp.array([[0.5, -2.0, 0.0], [1.5, 2.0, -1.0]])
    np.testing.assert_allclose(losses.squared_hinge(logits, jnp.array([0, 2])), [0.25 + 1, 2.5**2 + 3**2 + 2**2])
    logits, labels = rng.normal(size=(3, 4, 6)) * 2, rng.integers(0, 6, (3, 4))
    own = np.arange(6) == labels[..., None]
    expected = np.where(own, np.where(logits < 1, 1 - logits, 0), np.where(logits > -1, 1 + logits, 0)) ** 2
    found = losses.squared_hinge(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(found, expected.sum(-1), rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_focal_loss_is_its_equation(rng, gamma):
    """−(1 − p)^gamma log p (Lin et al. 2017, equation 4), with its gradient in float64."""
    logits, labels = rng.normal(size=(3, 4, 6)) * 3, rng.integers(0, 6, (3, 4))
    with jax.enable_x64(True):
        of = lambda logits: losses.focal(logits, jnp.asarray(labels), gamma)
        p = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), labels[..., None], -1)[..., 0]
        np.testing.assert_allclose(of(jnp.asarray(logits)), -((1 - p) ** gamma) * np.log(p), rtol=1e-10)
        gradient = jax.grad(lambda x: of(x).sum())(jnp.asarray(logits))
        np.testing.assert_allclose(gradient, numeric_gradient(lambda x: of(x).sum(), logits), atol=1e-6)


def test_the_focal_loss_of_a_sure_network_has_a_gradient():
    logits = jnp.array([[90.0, 0.0], [0.0, 90.0]])
    for gamma in (0.0, 0.3, 1.0, 2.0):
        value, gradient = jax.value_and_grad(lambda x, g=gamma: losses.focal(x, jnp.array([0, 0]), g).sum())(logits)
        np.testing.assert_allclose(value, 90, rtol=1e-6)
        np.testing.assert_allclose(gradient, [[0, 0], [-1, 1]], atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
@pytest.mark.parametrize("noise", [0, 1, 5])
def test_negative_sampling_is_its_equation(rng, shape, noise):
    """log σ(s) + Σ log σ(-s_i), negated, in float64 (Mikolov et al. 2013, arXiv:1310.4546, equation 4)."""
    positive, negative = rng.normal(size=shape) * 3, rng.normal(size=(*shape, noise)) * 3
    sigma = lambda x: 1 / (1 + np.exp(-x))
    expected = -np.log(sigma(positive)) - sum(np.log(sigma(-negative[..., i])) for i in range(noise))
    found = losses.negative_sampling(jnp.asarray(positive, jnp.float32), jnp.asarray(negative, jnp.float32))
    assert found.shape == shape
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_negative_sampling_of_large_scores_is_finite_and_has_a_slope():
    value = jax.value_and_grad(lambda s: losses.negative_sampling(s, s[:, None]).sum())
    np.testing.assert_allclose(value(jnp.array([1e4]))[0], 1e4)
    np.testing.assert_allclose(value(jnp.array([-1e4]))[1], [-1.0])
    assert losses.negative_sampling(jnp.ones(1, jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32
    assert np.isnan(losses.negative_sampling(jnp.array([jnp.nan]), jnp.zeros((1, 1)))).all()


def test_negative_sampling_is_least_at_the_shifted_mutual_information(rng):
    """Over all pairs of a joint distribution, with the noise in expectation (Levy & Goldberg 2014, section 3.1)."""
    joint, noise, count = rng.dirichlet(np.ones(12)).reshape(3, 4), rng.dirichlet(np.ones(4)), 5
    words = joint.sum(1, keepdims=True)
    best = np.log(joint / (words * count * noise))

    def expected_loss(scores):  # [3, 4]
        positive = losses.negative_sampling(scores, jnp.zeros((3, 4, 0)))
        negative = losses.negative_sampling(scores, scores[..., None]) - positive
        return (joint * positive + words * count * noise * negative).sum()

    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(expected_loss)(jnp.asarray(best)), 0, atol=1e-12)


@pytest.mark.parametrize(("positive", "negative"), [((3,), (3,)), ((3,), (2, 5)), ((3, 1), (3, 5)), ((), ())])
def test_negative_sampling_wants_scores_of_noise_for_each_score(positive, negative):
    with pytest.raises(InputError, match="negative_sampling: scores of noise"):
        losses.negative_sampling(jnp.zeros(positive), jnp.zeros(negative))


def test_soft_cross_entropy_of_an_impossible_class_with_target_0():
    logits, targets = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([[0.5, 0.5, 0.0]])
    np.testing.assert_allclose(losses.soft_cross_entropy(logits, targets), [np.log(2)], rtol=1e-6)


def test_gaussian_nll_is_scipys():
    mean, deviation, targets = np.random.default_rng(0).random((3, 5, 2)) + 0.5
    expected = -scipy.stats.norm.logpdf(targets, mean, deviation).mean(1)
    np.testing.assert_allclose(
        losses.gaussian_nll(*map(jnp.asarray, (mean, deviation**2, targets))), expected, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["squared_error", "huber", "cross_entropy", "soft_cross_entropy", "squared_hinge"])
def test_gradients_match_finite_differences(rng, name):
    x = rng.normal(size=(3, 4)) * 2
    labels = rng.integers(0, 4, 3)
    second = {"cross_entropy": labels, "squared_hinge": labels, "soft_cross_entropy": rng.dirichlet(np.ones(4), 3)}
    with jax.enable_x64(True):
        targets = jnp.asarray(second.get(name, rng.normal(size=(3, 4))))
        f = lambda x: getattr(losses, name)(x, targets).sum()
        np.testing.assert_allclose(jax.grad(f)(jnp.asarray(x)), numeric_gradient(f, x), atol=1e-7)


@pytest.mark.parametrize("name", ["squared_error", "huber", "cross_entropy", "soft_cross_entropy", "squared_hinge"])
def test_bfloat16_outputs_are_lossed_in_float32(rng, name):
    outputs = jnp.asarray(rng.normal(size=(2, 300)), jnp.bfloat16)
    targets = (
        jnp.array([3, 299])
        if name in ("cross_entropy", "squared_hinge")
        else jnp.asarray(rng.dirichlet(np.ones(300), 2), jnp.float32)
    )
    loss = getattr(losses, name)
    assert loss(outputs, targets).dtype == jnp.float32
    np.testing.assert_array_equal(loss(outputs, targets), loss(outputs.astype(jnp.float32), targets))


def test_integer_targets_do_not_wrap():  # uint8 arithmetic would
    np.testing.assert_allclose(losses.squared_error(jnp.array([0.0]), jnp.array([255], jnp.uint8)), [255.0**2])


@pytest.mark.parametrize("label", [-1, -3, 3, 100])
def test_a_label_outside_the_classes_gives_nan(label):
    labels = jnp.array([0, label])
    logits = jnp.zeros((2, 3))
    for loss in (losses.cross_entropy, losses.squared_hinge, functools.partial(losses.focal, gamma=2.0)):
        value = loss(logits, labels)
        assert np.isfinite(value[0])
        assert np.isnan(value[1])
    assert np.isnan(losses.smooth_labels(labels, 3, 0.1)[1]).all()


SMALL_INTEGERS = [*itertools.product((np.uint8, np.int8), (128, 200, 256, 300)), (np.int16, 300), (np.uint32, 300)]


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_labels_of_small_integer_types_are_compared_with_the_class_count_as_it_is(rng, array):
    """256 is 0 in uint8, and 200 is -56 in int8. Type after type in one test: each would be compiled anew."""
    for dtype, classes in SMALL_INTEGERS:
        last = min(classes, int(np.iinfo(dtype).max) + 1) - 1
        labels = np.array([0, last // 2, last], dtype)
        logits = rng.normal(size=(3, classes)).astype(np.float32)
        expected = -reference_log_softmax(logits.astype(np.float64))[np.arange(3), labels.astype(int)]
        found = losses.cross_entropy(array(logits), array(labels))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{dtype} {classes}")
        smooth = np.eye(classes)[labels.astype(int)] * 0.9 + 0.1 / classes
        np.testing.assert_allclose(losses.smooth_labels(array(labels), classes, 0.1), smooth, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "outside", "classes"),
    [(np.int8, -1, 128), (np.int8, -1, 255), (np.int8, -128, 128), (np.int8, 127, 127), (np.uint8, 255, 255)],
)
def test_a_label_outside_the_classes_gives_nan_in_small_types_too(dtype, outside, classes):
    labels = jnp.array([0, outside], dtype)
    for value in (losses.cross_entropy(jnp.zeros((2, classes)), labels), losses.smooth_labels(labels, classes, 0.1)):
        assert np.isfinite(value[0]).all()
        assert np.isnan(value[1]).all()


def test_low_precision_losses_are_added_and_weighed_in_float32():
    """Their sum is no float16."""
    term = lambda variables, batch, key: (jnp.float16(1000), ({}, {}))
    assert losses.weighted_sum({"a": (100.0, term)})({}, {}, KEY)[0] == 1e5
    params = {"kernel": jnp.full(300, 20, jnp.float16)}
    assert losses.elastic_net(term, 1.0, 2.0)({"params": params}, {}, KEY)[0] == 1000 + 300 * 20 + 300 * 20**2


def test_smooth_labels():
    targets = losses.smooth_labels(jnp.array([1, 3]), 4, 0.2)
    np.testing.assert_allclose(targets, [[0.05, 0.85, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]], rtol=1e-6)
    np.testing.assert_array_equal(losses.smooth_labels(jnp.array([[1, 0]]), 2, 0.0), [[[0, 1], [1, 0]]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.squared_error(jnp.zeros((3, 1)), jnp.zeros(3)), "(3, 1)"),
        (lambda: losses.huber(jnp.zeros(3), jnp.zeros((3, 1))), "(3, 1)"),
        (lambda: losses.gaussian_nll(jnp.zeros(3), jnp.ones(3), jnp.zeros((3, 1))), "(3, 1)"),
        (lambda: losses.gaussian_nll(jnp.zeros(3), jnp.ones((3, 1)), jnp.zeros(3)), "(3, 1)"),
        (lambda: losses.huber(jnp.zeros(3), jnp.zeros(3), 0.0), "delta is 0.0"),
        (lambda: losses.huber(jnp.zeros(3), jnp.zeros(3), float("nan")), "delta is nan"),
        (lambda: losses.cross_entropy(jnp.zeros((3, 2)), jnp.zeros((3, 1), int)), "expected (3,)"),
        (lambda: losses.cross_entropy(jnp.zeros((3, 2)), jnp.zeros(3)), "float32"),
        (lambda: losses.squared_hinge(jnp.zeros((3, 2)), jnp.zeros((3, 1), int)), "expected (3,)"),
        (lambda: losses.focal(jnp.zeros((3, 2)), jnp.zeros((3, 1), int), 2.0), "expected (3,)"),
        (lambda: losses.focal(jnp.zeros((3, 1)), jnp.zeros(3, int), 2.0), "have 1 classes, expected two or more"),
        (lambda: losses.focal(jnp.zeros((3, 2)), jnp.zeros(3, int), -1.0), "gamma is -1.0, expected 0 or more"),
        (lambda: losses.soft_cross_entropy(jnp.zeros((3, 2)), jnp.zeros(3)), "(3, 2)"),
        (lambda: losses.smooth_labels(jnp.zeros(3, int), 2, 1.0), "smoothing is 1.0"),
        (lambda: losses.smooth_labels(jnp.zeros(3), 2, 0.1), "float32"),
        (lambda: losses.smooth_labels(jnp.zeros(3, bool), 2, 0.1), "bool, expected integers of any size; convert"),
        (lambda: losses.cross_entropy(jnp.zeros((3, 2)), jnp.zeros(3, bool)), "bool, expected integers of any size"),
        (lambda: losses.weighted_sum({}), "no terms"),
        (lambda: losses.l2(fit_line, -0.1), "l2 weight is -0.1"),
        (lambda: losses.l1(fit_line, float("nan")), "l1 weight is nan"),
        (lambda: losses.l2(fit_line, 0.1, lambda path, leaf: False)(LINE, DATA, KEY), "dense/bias, dense/kernel"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# loss -> loss, on a small linear model: prediction = x @ kernel + bias

LINE = {
    "params": {"dense": {"kernel": jnp.array([[1.0], [-2.0], [0.0]]), "bias": jnp.array([5.0])}},
    "count": {"n": 1.0},
}
DATA = {
    "x": jnp.arange(12.0).reshape(4, 3) / 10,
    "y": jnp.array([1.0, 0.0, 2.0, 1.0]),
    "label": jnp.array([0, 2, 1, 1]),
}


def fit_line(variables, batch, key):
    """Mean squared error; counts its calls in the collection "count"; the metric "noise" reveals the key."""
    dense = variables["params"]["dense"]
    predictions = (batch["x"] @ dense["kernel"] + dense["bias"])[:, 0]
    collections = {"count": {"n": variables["count"]["n"] + 1}}
    return losses.squared_error(predictions, batch["y"]).mean(), (collections, {"noise": jax.random.uniform(key)})


def halve_kernel(params):
    return {"dense": {**params["dense"], "kernel": params["dense"]["kernel"] / 2}}


def jitter(key, batch):
    return {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)}


def test_with_params_evaluates_at_f_and_differentiates_through_it():
    halved = losses.with_params(fit_line, halve_kernel)
    at_half = {**LINE, "params": halve_kernel(LINE["params"])}
    gradient = jax.grad(lambda v, loss: loss(v, DATA, KEY)[0])
    np.testing.assert_allclose(halved(LINE, DATA, KEY)[0], fit_line(at_half, DATA, KEY)[0])
    through, direct = (g["params"]["dense"] for g in (gradient(LINE, halved), gradient(at_half, fit_line)))
    np.testing.assert_allclose(through["kernel"], direct["kernel"] / 2, rtol=1e-6)
    np.testing.assert_allclose(through["bias"], direct["bias"], rtol=1e-6)


def test_with_batch_augments_with_a_key_of_its_own():
    keys = []

    def record(key, batch):
        keys.append(key)
        return jitter(key, batch)

    value, (_, metrics) = losses.with_batch(fit_line, record)(LINE, DATA, KEY)
    assert value == fit_line(LINE, jitter(keys[0], DATA), KEY)[0]
    assert metrics["noise"] != jax.random.uniform(keys[0])  # independent keys
    assert metrics["noise"] != jax.random.uniform(KEY)
    assert value == losses.with_batch(fit_line, jitter)(LINE, DATA, KEY)[0]  # deterministic by key
    assert value != losses.with_batch(fit_line, jitter)(LINE, DATA, jax.random.key(1))[0]


def test_weighted_sum():
    term = lambda scale: lambda variables, batch, key: (scale * fit_line(variables, batch, key)[0], ({}, {}))
    plain = fit_line(LINE, DATA, KEY)[0]
    total, (collections, metrics) = losses.weighted_sum(
        {"line": (0.5, fit_line), "triple": (2.0, term(3.0)), "again": (0.0, fit_line)}
    )(LINE, DATA, KEY)
    np.testing.assert_allclose(total, 6.5 * plain, rtol=1e-6)
    np.testing.assert_allclose(
        [metrics["line"], metrics["triple"], metrics["again"]], [plain, 3 * plain, plain], rtol=1e-6
    )
    assert set(metrics) == {"line", "triple", "again", "line/noise", "again/noise"}
    assert metrics["line/noise"] != metrics["again/noise"]  # each term has its own key
    assert collections["count"]["n"] == 2.0  # both counting terms counted from 1, and their mean is taken


def test_weighted_sum_takes_means_of_real_leaves_and_the_last_of_others():
    def term(real, whole, **others):
        return 1.0, lambda variables, batch, key: (
            jnp.float32(1),
            ({"a": {"real": real, "whole": whole}, **others}, {}),
        )

    terms = {"x": term(jnp.float32(1), jnp.int32(3)), "y": term(jnp.float32(4), jnp.int32(7), b={"only": 5.0})}
    _, (collections, _) = losses.weighted_sum(terms)({}, {}, KEY)
    assert collections == {"a": {"real": 2.5, "whole": 7}, "b": {"only": 5.0}}
    assert collections["a"]["whole"].dtype == jnp.int32


def test_label_smoothing_gives_the_loss_probabilities():
    seen = []

    def loss(variables, batch, key):
        seen.append(batch["label"])
        return losses.soft_cross_entropy(batch["x"], batch["label"]).mean(), ({}, {})

    losses.label_smoothing(loss, 3, 0.3)(LINE, DATA, KEY)
    np.testing.assert_allclose(seen[0], np.eye(3)[[0, 2, 1, 1]] * 0.7 + 0.1, rtol=1e-6)
    unsmoothed = losses.label_smoothing(loss, 3, 0.0)(LINE, DATA, KEY)[0]
    np.testing.assert_allclose(unsmoothed, losses.cross_entropy(DATA["x"], DATA["label"]).mean(), rtol=1e-6)


def test_penalties_by_hand_and_their_gradients():
    plain, bare = jax.value_and_grad(lambda p: fit_line({**LINE, "params": p}, DATA, KEY)[0])(LINE["params"])
    kernel = np.array([[1.0], [-2.0], [0.0]])
    cases = {  # the bias is left alone; the slope of |w| at 0 is 0
        losses.l2(fit_line, 0.1): (0.1 * 5 / 2, 0.1 * kernel),
        losses.l1(fit_line, 0.1): (0.1 * 3, 0.1 * np.sign(kernel)),
        losses.elastic_net(fit_line, l1=0.2, l2=0.1): (0.2 * 3 + 0.1 * 5 / 2, 0.2 * np.sign(kernel) + 0.1 * kernel),
        losses.elastic_net(fit_line, 0, 0): (0, 0 * kernel),
    }
    for loss, (penalty, slope) in cases.items():
        value, gradient = jax.value_and_grad(lambda p, loss=loss: loss({**LINE, "params": p}, DATA, KEY)[0])(
            LINE["params"]
        )
        np.testing.assert_allclose(value, plain + penalty, rtol=1e-6)
        np.testing.assert_allclose(gradient["dense"]["kernel"], bare["dense"]["kernel"] + slope, rtol=1e-5)
        np.testing.assert_allclose(gradient["dense"]["bias"], bare["dense"]["bias"], rtol=1e-6)
        assert loss(LINE, DATA, KEY)[1] == fit_line(LINE, DATA, KEY)[1]  # collections and metrics pass through


def test_penalties_on_what_the_predicate_chooses():
    is_bias = lambda path, leaf: not is_kernel(path, leaf)
    value = losses.l1(fit_line, 1.0, is_bias)(LINE, DATA, KEY)[0]
    np.testing.assert_allclose(value, fit_line(LINE, DATA, KEY)[0] + 5.0, rtol=1e-6)


def test_chosen_is_a_mask_for_optax():
    params = {
        "a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
        "layers": [jnp.ones(1)],
    }
    mask = chosen(params, is_kernel)
    assert mask == {"a": {"kernel": True, "bias": False}, "norm": {"scale": False}, "layers": [False]}
    tx = optax.adamw(1.0, weight_decay=0.5, mask=lambda params: chosen(params, is_kernel))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert jax.tree.map(lambda u: bool((u != 0).all()), updates) == mask


WRAPPERS = {
    "with_params": lambda loss: losses.with_params(loss, halve_kernel),
    "with_batch": lambda loss: losses.with_batch(loss, jitter),
    "weighted_sum": lambda loss: losses.weighted_sum({"a": (0.5, loss), "b": (0.5, loss)}),
    "elastic_net": lambda loss: losses.elastic_net(loss, 0.01, 0.01),
}


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(WRAPPERS, WRAPPERS)))
def test_closed_under_composition(outer, inner):
    loss = WRAPPERS[outer](WRAPPERS[inner](fit_line))
    value, (collections, metrics) = jax.eval_shape(loss, LINE, DATA, KEY)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    assert collections["count"]["n"].shape == ()
    assert all(metric.shape == () for metric in metrics.values())


def test_a_composed_loss_trains():
    loss = losses.l2(losses.with_batch(losses.weighted_sum({"line": (1.0, fit_line)}), lambda key, batch: batch), 1e-3)
    tx = optax.sgd(0.1)
    step, state = jax.jit(make_step(loss, tx)), init_state(KEY, LINE, tx)
    history = []
    for _ in range(20):
        state, metrics = step(state, DATA)
        history.append(float(metrics["loss"]))
    assert history[-1] < history[0] / 10
    assert state.extra["count"]["n"] == 21
