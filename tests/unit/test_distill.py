"""Distillation: the loss against its equation, and the bias rule against counting."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax import classify, inspect, losses
from dl_jax.compress import distill
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_soft_is_the_scaled_cross_entropy_at_that_temperature(temperature):
    student, teacher = logits(0, 4, 3, 5), logits(1, 4, 3, 5)
    s, t = student.astype(np.float64) / temperature, teacher.astype(np.float64) / temperature
    expected = -(temperature**2) * (softmax(t) * np.log(softmax(s))).sum(-1)
    np.testing.assert_allclose(distill.soft(student, teacher, temperature), expected, rtol=1e-5)


def test_the_gradient_is_t_times_the_difference_of_probabilities_and_none_reaches_the_teacher():
    student, teacher = logits(0, 6, 10), logits(1, 6, 10)
    total = lambda s, t: distill.soft(s, t, 4.0).sum()
    to_student, to_teacher = jax.grad(total, argnums=(0, 1))(student, teacher)
    np.testing.assert_allclose(to_student, 4 * (softmax(student / 4) - softmax(teacher / 4)), atol=1e-5)
    assert not np.any(to_teacher)


def test_at_high_temperature_logits_are_matched_and_the_gradient_does_not_vanish():
    """Equation 4: (s - t) / C for logits of zero mean."""
    student, teacher = (x - x.mean(-1, keepdims=True) for x in (logits(0, 6, 10), logits(1, 6, 10)))
    gradient = jax.grad(lambda s: distill.soft(s, teacher, 1000.0).sum())(student)
    np.testing.assert_allclose(gradient, (student - teacher) / 10, atol=0.02)


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = jnp.asarray(logits(0, 6, 10), jnp.bfloat16), jnp.asarray(logits(1, 6, 10), jnp.bfloat16)
    found = distill.soft(student, teacher, 2.0)
    assert found.dtype == jnp.float32
    wide = distill.soft(student.astype(jnp.float32), teacher.astype(jnp.float32), 2.0)
    np.testing.assert_allclose(found, wide, rtol=1e-2)


def test_a_network_that_returns_more_than_logits_is_refused_in_one_line():
    apply = lambda variables, image, train, rngs: (image.mean((1, 2)), image)
    batch = {"image": np.zeros((2, 4, 4, 3), np.float32), "teacher_logits": logits(0, 2, 3)}
    with pytest.raises(InputError, match="`apply` returns a tuple, expected an array"):
        distill.loss(apply, 4.0)({"params": {}}, batch, jax.random.key(0))


def test_a_single_class_is_refused_because_its_probability_never_changes():
    with pytest.raises(InputError, match=r"logits of shape \(4, 1\), expected two classes or more"):
        distill.soft(logits(0, 4, 1), logits(1, 4, 1), 1.0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 20.0])
def test_logits_near_the_end_of_their_type_are_divided_in_float32(dtype, temperature):
    """6e4 / 0.5 is no float16."""
    student, teacher = (jnp.asarray([[6e4, 0.0, x]], dtype) for x in (5e4, 5.9e4))
    s, t = (np.asarray(x, np.float64) / temperature for x in (student, teacher))
    log_p = s - s.max() - np.log(np.exp(s - s.max()).sum())
    expected = -(temperature**2) * (softmax(t) * log_p).sum(-1)
    np.testing.assert_allclose(distill.soft(student, teacher, temperature), expected, rtol=1e-3)


def test_float64_logits_stay():
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(logits(i, 4, 5), jnp.float64) for i in (0, 1))
        found = distill.soft(student, teacher, 3.0)
        expected = -9 * (softmax(teacher / 3) * np.log(softmax(np.asarray(student) / 3))).sum(-1)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_margins_of_float16_logits_are_finite():
    outputs, group = np.array([[-6e4, 6e4], [4e4, -4e4]], np.float16), np.array([False, True])
    np.testing.assert_array_equal(distill.margins(outputs, group), [-12e4, 8e4])
    assert distill.matched_bias(outputs, group, 0.5) == pytest.approx(-2e4)
    assert distill.fewest_errors(outputs, group, np.array([1, 0])) == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(InputError, match=r"temperature is .*expected a positive"):
        distill.soft(logits(0, 2, 3), logits(1, 2, 3), temperature)


def test_a_teacher_and_a_student_that_disagree_on_classes():
    with pytest.raises(InputError, match="student has 3 classes and the teacher 4"):
        distill.soft(logits(0, 2, 3), logits(1, 2, 4), 1.0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), frequency=st.floats(0.01, 0.99), inside=st.integers(1, 4))
def test_the_bias_makes_the_group_as_frequent_as_asked(seed, frequency, inside):
    outputs, group = logits(seed, 500, 5), np.arange(5) < inside
    bias = distill.matched_bias(outputs, group, frequency)
    predicted = group[(outputs + bias * group).argmax(1)].mean()
    assert abs(predicted - frequency) <= 2 / 500


@pytest.mark.parametrize(("group", "frequency"), [([0, 0, 0], 0.5), ([1, 1, 1], 0.5), ([1, 0, 0], 1.5)])
def test_a_bias_that_cannot_be_matched(group, frequency):
    with pytest.raises(InputError, match=r"matched_bias: .*expected"):
        distill.matched_bias(logits(0, 9, 3), np.array(group, bool), frequency)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), inside=st.integers(1, 4))
def test_the_fewest_errors_are_those_of_the_best_of_all_biases(seed, inside):
    outputs, group = np.round(logits(seed, 40, 5)).astype(np.float64), np.arange(5) < inside  # with equal margins
    labels = np.random.default_rng(seed).integers(0, 5, 40)
    turns = np.unique(distill.margins(outputs, group))
    between = [turns[0] - 1, *(turns[1:] + turns[:-1]) / 2, turns[-1] + 1]
    brute = min(int(((outputs + bias * group).argmax(1) != labels).sum()) for bias in between)
    assert distill.fewest_errors(outputs, group, labels) == brute


def test_the_loss_follows_the_teacher_alone():
    apply = lambda variables, image, train, rngs: image.reshape(len(image), -1) @ variables["params"]["w"]
    batch = {"image": np.full((4, 2, 2, 1), 51, np.uint8), "teacher_logits": logits(1, 4, 3)}
    found, (collections, metrics) = distill.loss(apply, 4.0)(
        {"params": {"w": logits(2, 4, 3)}}, batch, jax.random.key(0)
    )
    student = np.full((4, 4), 0.2, np.float32) @ logits(2, 4, 3)
    np.testing.assert_allclose(found, distill.soft(student, batch["teacher_logits"], 4.0).mean(), rtol=1e-5)
    assert collections == metrics == {}


def test_a_wrong_temperature_is_found_before_any_training():
    with pytest.raises(InputError, match=r"temperature is 0\.0, expected a positive"):
        distill.loss(lambda *given, **settings: None, 0.0)


def test_the_student_without_threes_is_shown_none(load_experiment, monkeypatch):
    """Its transfer set holds no 3, whatever the teacher says; the other students see every digit. Nobody learns."""
    module, shown = load_experiment("compression/distill_mnist"), {}

    def untrained(step, states, stream, *, steps, run):
        batches = [stream(i) for i in range(2 * 120 // 16)]  # two passes and more
        shown[run.name] = {name: np.concatenate([batch[name][0] for batch in batches]) for name in batches[0]}
        return states

    monkeypatch.setattr(module, "fit", untrained)
    found = module.main(module.PRESETS["smoke"], Run())
    assert set(shown["no_three"]["label"]) == {0, 1, 2, 4, 5, 6, 7, 8, 9}
    assert set(shown["sevens_eights"]["label"]) == {7, 8}
    assert set(shown["plain"]["label"]) == set(shown["distilled"]["label"]) == set(range(10))
    pairs = lambda name: {(x.tobytes(), y.tobytes()) for x, y in zip(shown[name]["image"], said(name), strict=True)}
    said = lambda name: shown[name]["teacher_logits"]
    assert pairs("no_three") < pairs("distilled")  # each image with what the teacher said of it
    assert (found["errors/no_three/bias_tuned_on_test"] <= found["errors/no_three/bias"]).all()


def test_a_hint_is_half_the_squared_distance_from_a_linear_function():
    student, teacher = logits(0, 3, 2, 2, 4), logits(1, 3, 2, 2, 5)
    regressor = {"kernel": logits(2, 4, 5), "bias": logits(3, 5)}
    expected = [
        0.5 * sum((teacher[b, i, j, d] - regressor["bias"][d] - student[b, i, j] @ regressor["kernel"][:, d]) ** 2
                  for i in range(2) for j in range(2) for d in range(5))
        for b in range(3)
    ]  # fmt: skip
    np.testing.assert_allclose(distill.hint(student, teacher, regressor), expected, rtol=1e-5)
    gradient = jax.grad(lambda teacher: distill.hint(student, teacher, regressor).sum())(teacher)
    assert not gradient.any()


def test_attention_is_where_a_layer_is_active_whatever_its_size_and_channels():
    student, teacher = logits(0, 3, 2, 4, 5), logits(1, 3, 2, 4, 7)
    q = [np.einsum("bijc->bij", np.float64(x) ** 2).reshape(3, 8) for x in (student, teacher)]
    q = [each / np.sqrt((each**2).sum(1, keepdims=True)) for each in q]
    np.testing.assert_allclose(distill.attention(student), q[0], rtol=1e-5)
    np.testing.assert_allclose(
        distill.attention_distance(student, teacher), 0.5 * np.sqrt(((q[0] - q[1]) ** 2).sum(1)), rtol=1e-5
    )
    twice = np.concatenate([3 * student[..., ::-1], 4 * student], -1)  # the same map, 25 times
    np.testing.assert_allclose(distill.attention_distance(student, twice), 0, atol=1e-6)
    gradients = jax.jit(jax.grad(lambda *x: distill.attention_distance(*x).sum(), argnums=(0, 1)))
    to_student, to_teacher = map(np.asarray, gradients(student, teacher))
    assert to_student.all()
    assert not to_teacher.any()


def test_silent_and_equal_layers_have_finite_gradients():
    values = np.float32([0, 0, 1, 1]), np.float32([0, 1, 0, 1])  # of the student and of the teacher
    student, teacher = (x[:, None, None, None] * np.ones((1, 2, 2, 3), np.float32) for x in values)
    gradient = jax.jit(jax.grad(lambda x: distill.attention_distance(x, teacher).sum()))(student)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(jax.jit(distill.attention_distance)(student, teacher), [0, 0.5, 0.5, 0], atol=1e-6)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, image, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Conv(self.width, (3, 3), name="conv")(image))
        x = nn.relu(nn.Conv(self.width, (3, 3), 2, name="second")(nn.relu(x)))
        return nn.Dense(3)(x.mean((1, 2)))


def pair_of_nets():
    image = np.random.default_rng(0).random((4, 6, 6, 1), np.float32)
    nets = [inspect.with_outputs(Net(width).apply, "norm", "second") for width in (2, 5)]
    init = lambda width: jax.jit(lambda: Net(width).init(jax.random.key(0), image, train=False))()
    variables = [init(width) for width in (2, 5)]
    features = jax.jit(lambda v: nets[1](v, image, train=False))(variables[1])[1]
    return nets[0], variables[0], {"image": image, "label": np.array([0, 1, 2, 0]), "teacher_features": features}


def test_losses_of_layers_take_a_model_that_returns_them():
    student, variables, batch = pair_of_nets()
    regressors = distill.regressors(jax.random.key(1), [(2, 5), (2, 5)])
    assert [tree["kernel"].shape for tree in regressors] == [(2, 5), (2, 5)]
    params = {**variables["params"], distill.REGRESSORS: regressors}
    hard = losses.with_params(classify.loss(Net(2).apply), distill.without_regressors)
    terms = {"hints": distill.hints(student), "attention": distill.attention_transfer(student), "hard": hard}
    total = losses.weighted_sum({name: (1.0, term) for name, term in terms.items()})
    both = jax.jit(
        lambda params: jax.grad(total, has_aux=True)({**variables, "params": params}, batch, jax.random.key(0))
    )
    gradients, (collections, metrics) = both(params)
    run = jax.jit(lambda variables: student(variables, batch["image"], train=True, mutable=["batch_stats"]))
    (_, found), changed = run(variables)
    pairs = list(zip(found, batch["teacher_features"], strict=True))
    expected = sum(distill.hint(*pair, tree).mean() for pair, tree in zip(pairs, regressors, strict=True))
    np.testing.assert_allclose(metrics["hints"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["attention"], sum(distill.attention_distance(*pair).mean() for pair in pairs), rtol=1e-5
    )
    for tree in gradients["params"][distill.REGRESSORS]:
        assert tree["kernel"].all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), collections, changed)


def test_layers_that_do_not_fit_have_one_clear_line():
    student, variables, batch = pair_of_nets()
    run = lambda loss, **changes: loss(variables, {**batch, **changes}, jax.random.key(0))
    first, second = batch["teacher_features"]
    with pytest.raises(InputError, match="attention_transfer: numbers of layers are student 2, teacher 1; expected"):
        run(distill.attention_transfer(student), teacher_features=(first,))
    with pytest.raises(InputError, match="hints: numbers of layers are student 2, teacher 2, regressors 0; expected"):
        run(distill.hints(student))
    with pytest.raises(InputError, match=r"student's layer is \(4, 6, 6, 2\) and the teacher's \(4, 3, 3, 5\)"):
        run(distill.attention_transfer(student), teacher_features=(second, first))
    with pytest.raises(InputError, match=r"the student's layer is .* and the regressor \(3, 5\), expected equal"):
        distill.hint(np.ones((4, 2)), np.ones((4, 5)), {"kernel": np.ones((3, 5)), "bias": np.ones(5)})
    with pytest.raises(InputError, match=r"`apply` returns a .*, expected \(logits, features\)"):
        run(distill.attention_transfer(Net(2).apply))
    with pytest.raises(InputError, match="no module 'norms' was called, expected the path of one"):
        inspect.with_outputs(Net(2).apply, "norms")(variables, batch["image"], train=False)
