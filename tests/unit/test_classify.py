"""The loss and the test metrics of classifiers, and trees of several seeds."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax import classify, losses
from dl_jax.compress import distill, quantize
from dl_jax.core import seeds
from dl_jax.core.errors import InputError
from dl_jax.core.step import init_state, make_step

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1), np.uint8)
BATCH = {"image": IMAGE, "label": np.array([0, 1, 2, 0, 1, 2])}
VARIABLES = {"params": {"w": np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)}}


def apply(variables, image, train, rngs=None):
    assert image.dtype == jnp.float32
    assert (rngs is not None) == train
    return image.reshape(len(image), -1) @ variables["params"]["w"]


LOGITS = (IMAGE.reshape(6, 4) / np.float32(255)) @ VARIABLES["params"]["w"]


def test_grey_levels_become_fractions_and_floats_stay():
    found = classify.to_unit(np.array([0, 51, 255], np.uint8))
    np.testing.assert_allclose(found, [0, 0.2, 1], rtol=1e-6)
    np.testing.assert_array_equal(classify.to_unit(found), found)
    batch = classify.unit(jax.random.key(0), BATCH)
    np.testing.assert_allclose(batch["image"], IMAGE / 255, rtol=1e-6)
    assert batch["label"] is BATCH["label"]


def test_the_loss_is_the_mean_cross_entropy():
    found, (collections, metrics) = classify.loss(apply)(VARIABLES, BATCH, jax.random.key(0))
    np.testing.assert_allclose(found, losses.cross_entropy(LOGITS, BATCH["label"]).mean(), rtol=1e-6)
    assert collections == {}
    np.testing.assert_allclose(metrics["error"], (LOGITS.argmax(1) != BATCH["label"]).mean())


def test_the_evaluation_counts_each_example_once():
    masked = {**BATCH, "mask": np.array([1, 1, 1, 1, 0, 0], np.float32)}
    found = classify.evaluation(apply)(VARIABLES, masked, jax.random.key(0))
    kept = LOGITS[:4], BATCH["label"][:4]
    np.testing.assert_allclose(found["error"], ((kept[0].argmax(1) != kept[1]).sum(), 4))
    np.testing.assert_allclose(found["nats"], (losses.cross_entropy(*kept).sum(), 4), rtol=1e-5)


def test_logits_with_something_beside_them_are_refused():
    pair = lambda variables, image, train, rngs=None: (apply(variables, image, train, rngs), image)
    message = "^`apply` returns a tuple, expected an array, such as logits .*; wrap it in a function that returns"
    masked = {**BATCH, "mask": np.ones(6, np.float32)}
    with pytest.raises(InputError, match=message):
        classify.loss(pair)(VARIABLES, BATCH, jax.random.key(0))
    with pytest.raises(InputError, match=message):
        classify.evaluation(pair)(VARIABLES, masked, jax.random.key(0))
    with pytest.raises(InputError, match=message):
        classify.outputs(lambda image: pair(VARIABLES, classify.to_unit(image), False), IMAGE)


def test_outputs_are_those_of_all_pictures_in_order():
    images = np.arange(2500.0).reshape(2500, 1, 1, 1)
    sizes = []

    def predict(some):
        sizes.append(len(some))
        return 2 * some[:, 0, 0]

    np.testing.assert_array_equal(classify.outputs(predict, images), 2 * images[:, 0, 0])
    assert sizes == [1000, 1000, 500]


def test_seeds_come_apart_and_together():
    tree = {"a": jnp.arange(6.0).reshape(3, 2), "b": {"c": jnp.arange(3)}}
    parts = seeds.split(tree)
    assert [part["b"]["c"] for part in parts] == [0, 1, 2]
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(parts))
    jax.tree.map(np.testing.assert_array_equal, seeds.stack(parts), tree)


class Normed(nn.Module):
    """BatchNorm, dropout and a linear layer."""

    @nn.compact
    def __call__(self, image, *, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(image.reshape(len(image), -1))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def followed(temperature=4.0):
    """The loss of a student, on a batch that has the teacher's logits."""
    teacher = np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32)
    return lambda apply: losses.with_batch(
        distill.loss(apply, temperature), lambda key, batch: {**batch, "teacher_logits": teacher}
    )


@pytest.mark.parametrize("loss", [classify.loss, followed()], ids=["classify", "distill"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "rounded"])
def test_a_step_keeps_the_running_statistics_of_batchnorm(loss, wrapped):
    """momentum · before + (1 − momentum) · those of the batch, twice; other collections stay."""
    model, tx = Normed(), optax.sgd(0.1)
    variables = model.init(jax.random.key(0), classify.to_unit(IMAGE), train=False)
    variables["ranges"] = {"Dense_0": quantize.Range(jnp.float32(-3), jnp.float32(3))}
    function = quantize.with_activations(model.apply, 8) if wrapped else model.apply
    state = init_state(jax.random.key(1), variables, tx)
    step = jax.jit(make_step(loss(function), tx))
    x = (IMAGE.reshape(6, 4) / 255.0).astype(np.float64)
    mean, var = np.zeros(4), np.ones(4)
    for _ in range(2):
        state, metrics = step(state, BATCH)
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    found = state.extra["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["var"], var, rtol=1e-5)
    assert state.extra.keys() == {"batch_stats", "ranges"}
    jax.tree.map(np.testing.assert_array_equal, state.extra["ranges"], variables["ranges"])
    assert np.isfinite(metrics["loss"])

    before = jax.tree.map(np.array, state.variables)
    masked = {**BATCH, "mask": np.ones(6, np.float32)}
    evaluated = classify.evaluation(model.apply)(state.variables, masked, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.variables, before)
    kernel, bias = (np.asarray(state.params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    scale, shift = (np.asarray(state.params["BatchNorm_0"][name], np.float64) for name in ("scale", "bias"))
    logits = ((x - mean) / np.sqrt(var + 1e-5) * scale + shift) @ kernel + bias
    np.testing.assert_allclose(evaluated["nats"][0], losses.cross_entropy(logits, BATCH["label"]).sum(), rtol=1e-4)


@pytest.mark.parametrize("rest", [{}, {"batch_stats": {"x": np.zeros(2)}}], ids=["params", "collections"])
def test_a_pure_function_needs_no_argument_mutable(rest):
    given = {**VARIABLES, **rest}
    found, (collections, _) = classify.loss(apply)(given, BATCH, jax.random.key(0))
    np.testing.assert_allclose(found, losses.cross_entropy(LOGITS, BATCH["label"]).mean(), rtol=1e-6)
    assert collections == {}
    rounded = quantize.with_activations(apply, 8)  # its signature is that of the function inside
    assert not classify._takes_mutable(rounded)
    assert classify._takes_mutable(quantize.with_activations(Normed().apply, 8))
    assert classify._takes_mutable(lambda variables, *args, **settings: None)


def test_two_terms_move_the_running_statistics_once():
    """0.9 · before + 0.1 · those of the batch, as one term does, though both terms run the network."""
    model, tx = Normed(), optax.sgd(0.1)
    variables = model.init(jax.random.key(0), classify.to_unit(IMAGE), train=False)
    terms = {"hard": (0.5, classify.loss(model.apply)), "soft": (0.5, followed(2.0)(model.apply))}
    before = init_state(jax.random.key(1), variables, tx)
    state, _ = jax.jit(make_step(losses.weighted_sum(terms), tx))(before, BATCH)
    alone, _ = jax.jit(make_step(classify.loss(model.apply), tx))(before, BATCH)
    found = state.extra["batch_stats"]["BatchNorm_0"]
    x = IMAGE.reshape(6, 4) / 255.0
    np.testing.assert_allclose(found["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * x.var(0), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.extra, alone.extra)


@pytest.mark.parametrize("static", ["train", ("train", "mutable")], ids=["train", "mutable"])
def test_a_jitted_apply_keeps_the_running_statistics(static):
    model = Normed()
    variables = model.init(jax.random.key(0), classify.to_unit(IMAGE), train=False)
    jitted = jax.jit(model.apply, static_argnames=static)
    found, plain = (classify.loss(f)(variables, BATCH, jax.random.key(0)) for f in (jitted, model.apply))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, plain)
    mean = found[1][0]["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * IMAGE.reshape(6, 4).mean(0) / 255, rtol=1e-5)


class Sowing(nn.Module):
    """BatchNorm, and two collections that hold more or others each time."""

    @nn.compact
    def __call__(self, image, *, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(image.reshape(len(image), -1))
        self.sow("losses", "size", jnp.abs(x).mean())
        last = self.variable("kept", "last", lambda: jnp.zeros(()))
        if train:
            last.value = x
        return nn.Dense(3)(x)


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "FrozenDict"])
def test_collections_that_change_their_form_are_left_out(wrap):
    """So a step returns a state like the one that it takes, and several steps make a scan."""
    model, tx = Sowing(), optax.sgd(0.1)
    variables = model.init(jax.random.key(0), classify.to_unit(IMAGE), train=False)
    variables = {name: wrap(tree) for name, tree in variables.items()}
    assert set(variables) == {"params", "batch_stats", "losses", "kept"}
    step, state = make_step(classify.loss(model.apply), tx), init_state(jax.random.key(1), variables, tx)
    after, _ = jax.lax.scan(lambda state, _: step(state, BATCH), state, length=2)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    unchanged = {name: after.extra[name] for name in ("losses", "kept")}
    jax.tree.map(np.testing.assert_array_equal, unchanged, {name: variables[name] for name in unchanged})
    mean = after.extra["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, (1 - 0.99**2) * IMAGE.reshape(6, 4).mean(0) / 255, rtol=1e-4)


@pytest.mark.parametrize("n", [2, 6])
def test_a_function_that_ignores_its_settings_gives_logits_alone(n):
    """Two rows of logits are no pair of logits and collections."""
    ignoring = lambda variables, image, **settings: apply(variables, image, True, {})
    batch = {name: column[:n] for name, column in BATCH.items()}
    given = {**VARIABLES, "batch_stats": {"x": np.zeros(2)}}
    found, (collections, _) = classify.loss(ignoring)(given, batch, jax.random.key(0))
    np.testing.assert_allclose(found, losses.cross_entropy(LOGITS[:n], batch["label"]).mean(), rtol=1e-6)
    assert collections == {}


@pytest.mark.parametrize("loss", [classify.loss, followed()], ids=["classify", "distill"])
def test_an_apply_that_keeps_mutable_to_itself_is_refused(loss):
    model = Normed()
    variables = model.init(jax.random.key(0), classify.to_unit(IMAGE), train=False)
    fixed = lambda variables, image, train, rngs: model.apply(variables, image, train=train, rngs=rngs)
    with pytest.raises(
        InputError, match=r"none of its collections batch_stats, .* let `apply` take \*\*kwargs"
    ) as error:
        loss(fixed)(variables, BATCH, jax.random.key(0))
    assert "\n" not in str(error.value)

    def broken(variables, image, train, rngs):
        raise KeyError("of its own")

    with pytest.raises(KeyError, match="of its own"):
        loss(broken)(variables, BATCH, jax.random.key(0))


def test_labels_may_be_probabilities():
    soft = np.random.default_rng(3).dirichlet(np.ones(3), 6).astype(np.float32)
    found, (_, metrics) = classify.loss(apply)(VARIABLES, {**BATCH, "label": soft}, jax.random.key(0))
    log_p = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(found, -(soft * log_p).sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], (LOGITS.argmax(1) != soft.argmax(1)).mean())


def test_label_smoothing_and_mixtures_compose_with_the_loss():
    """Zhang et al. 2018 (arXiv:1710.09412): a convex combination of two examples and of their labels."""

    def mixup(key, batch):
        other = jax.tree.map(lambda column: column[::-1], dict(batch))
        return jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, dict(batch), other)

    unit = lambda key, batch: classify.unit(key, batch)
    loss = losses.with_batch(classify.loss(apply), mixup)
    loss = losses.with_batch(losses.label_smoothing(loss, 3, 0.1), unit)
    value, (_, metrics) = jax.jit(loss)(VARIABLES, BATCH, jax.random.key(0))
    image = IMAGE.reshape(6, 4) / 255
    smooth = np.eye(3)[BATCH["label"]] * 0.9 + 0.1 / 3
    mixed, targets = (0.7 * part + 0.3 * part[::-1] for part in (image, smooth))
    logits = mixed @ VARIABLES["params"]["w"]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(value, -(targets * log_p).sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], (logits.argmax(1) != targets.argmax(1)).mean())


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (np.zeros(6, bool), "labels are bool, expected integers"),
        (np.zeros(6, np.float32), r"targets \(6,\), expected equal shapes"),
        (np.zeros((6, 2), np.float32), r"targets \(6, 2\), expected equal shapes"),
        (np.zeros((6, 3), int), r"labels \(6, 3\) for logits \(6, 3\)"),
    ],
)
def test_labels_that_fit_no_logits(label, words):
    with pytest.raises(InputError, match=words):
        classify.loss(apply)(VARIABLES, {**BATCH, "label": label}, jax.random.key(0))
