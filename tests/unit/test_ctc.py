"""CTC against sums over all paths in float64, and against PyTorch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax.core.errors import InputError
from dl_jax.losses import ctc

B, T, K, N = 5, 5, 3, 3
LENGTHS = np.array([5, 4, 3, 1, 5], np.int32)
LABELS = np.array([[1, 2, 1], [2, 2, 9], [1, 1, -4], [2, 0, 0], [7, 7, 7]], np.int32)  # with anything in the padding
LABEL_LENGTHS = np.array([3, 2, 2, 1, 0], np.int32)
LOGITS = np.random.default_rng(0).normal(0, 2, (B, T, K)).astype(np.float32)


def collapse(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def labellings(logits, blank):  # [T, K] -> {labels: probability}
    log_p, found = log_softmax(logits), {}
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        labels = collapse(path, blank)
        found[labels] = found.get(labels, 0.0) + np.exp(sum(log_p[t, k] for t, k in enumerate(path)))
    return found


def enumerated(logits, lengths, labels, label_lengths, blank):
    nats = lambda b: (
        -np.log(labellings(logits[b, : lengths[b]], blank).get(tuple(map(int, labels[b, : label_lengths[b]])), 0.0))
    )
    with np.errstate(divide="ignore"):
        return np.array([nats(b) for b in range(len(logits))])


GIVEN = (LOGITS, LENGTHS, LABELS, LABEL_LENGTHS)
compiled = jax.jit(ctc.negative_log_likelihood, static_argnums=4)


@pytest.mark.parametrize("blank", [0, 2])
def test_sums_over_all_paths(blank):
    labels = np.where(LABELS == 2, 0, LABELS) if blank == 2 else LABELS
    given = LOGITS, LENGTHS, labels, LABEL_LENGTHS
    fits = ctc.frames_needed(labels, LABEL_LENGTHS) <= LENGTHS
    found, expected = compiled(*given, blank), enumerated(*given, blank)
    np.testing.assert_array_equal(np.isfinite(expected), fits)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    if fits.all():
        np.testing.assert_allclose(ctc.negative_log_likelihood(*given, blank), expected, rtol=1e-5)


def test_the_probabilities_of_all_labellings_sum_to_1():
    every = [labels for n in range(4) for labels in itertools.product((1, 2), repeat=n)]
    labels = np.array([[*each, 0, 0, 0][:3] for each in every])
    logits = np.broadcast_to(LOGITS[:1, :3], (len(every), 3, K))
    nats = compiled(logits, np.full(len(every), 3), labels, np.array([*map(len, every)]), 0)
    np.testing.assert_allclose(np.exp(-np.asarray(nats)).sum(), 1, rtol=1e-6)


def test_gradients_are_those_of_the_sum_over_all_paths_and_none_in_the_padding():
    total = lambda logits, fixed=None: ctc.negative_log_likelihood(logits, *GIVEN[1:]).sum()
    found = np.asarray(jax.jit(jax.grad(total))(LOGITS))
    eps = 1e-5
    for b, t, k in np.ndindex(B, T, K):
        if t >= LENGTHS[b]:
            assert found[b, t, k] == 0
            continue
        moved = [enumerated(*(x[b : b + 1] for x in (LOGITS + step * at(b, t, k), *GIVEN[1:])), 0)
                 for step in (eps, -eps)]  # fmt: skip
        np.testing.assert_allclose(found[b, t, k], (moved[0] - moved[1])[0] / (2 * eps), atol=2e-6)


def at(*place):
    one = np.zeros((B, T, K))
    one[place] = 1
    return one


def case(seed, batch=4, steps=40, classes=12, width=15):
    rng = np.random.default_rng(seed)
    labels, label_lengths = rng.integers(1, classes, (batch, width)), rng.integers(0, width + 1, batch)
    lengths = np.minimum(np.asarray(ctc.frames_needed(labels, label_lengths)) + rng.integers(1, 20, batch), steps)
    return rng.normal(0, 3, (batch, steps, classes)).astype(np.float32), lengths, labels, label_lengths


@pytest.mark.parametrize("seed", range(3))
def test_pytorch(seed):
    torch = pytest.importorskip("torch")
    logits, lengths, labels, label_lengths = case(seed)
    theirs = torch.tensor(logits, requires_grad=True)
    log_p = theirs.log_softmax(-1).transpose(0, 1)
    nats = torch.nn.functional.ctc_loss(
        log_p, *map(torch.tensor, (labels, lengths, label_lengths)), reduction="none", blank=0
    )
    nats.sum().backward()
    loss = lambda logits: ctc.negative_log_likelihood(logits, lengths, labels, label_lengths)
    found, grads = jax.jit(lambda x: (loss(x), jax.grad(lambda x: loss(x).sum())(x)))(logits)
    np.testing.assert_allclose(found, nats.detach().numpy(), rtol=2e-5)
    np.testing.assert_allclose(grads, theirs.grad.numpy(), atol=3e-5)


def test_what_stands_in_the_padding_has_no_effect():
    spoilt = np.where(np.arange(T)[:, None] < LENGTHS[:, None, None], LOGITS, np.nan)
    labels = np.where(np.arange(N) < LABEL_LENGTHS[:, None], LABELS, 1)
    both = jax.jit(jax.value_and_grad(lambda logits, labels: ctc.negative_log_likelihood(
        logits, LENGTHS, labels, LABEL_LENGTHS).sum()))  # fmt: skip
    for one, other in zip(jax.tree.leaves(both(LOGITS, LABELS)), jax.tree.leaves(both(spoilt, labels)), strict=True):
        np.testing.assert_array_equal(one, other)
    wider = np.pad(LOGITS, ((0, 0), (0, 2), (0, 0))), LENGTHS, np.pad(LABELS, ((0, 0), (0, 2))), LABEL_LENGTHS
    np.testing.assert_allclose(compiled(*wider, 0), compiled(*GIVEN, 0), rtol=1e-6)


def test_labels_that_do_not_fit_are_refused_or_infinite_where_traced():
    lengths = np.array([5, 3, 2, 1, 5])  # of the third, 1 1 needs a blank between
    np.testing.assert_array_equal(ctc.frames_needed(LABELS, LABEL_LENGTHS), [3, 3, 3, 1, 0])
    with pytest.raises(InputError, match="sequence 2 has 2 frames, expected 3 or more, one for each label") as error:
        ctc.negative_log_likelihood(LOGITS, lengths, LABELS, LABEL_LENGTHS)
    assert "\n" not in str(error.value)
    nats = jax.jit(lambda logits, n: ctc.negative_log_likelihood(logits, n, LABELS, LABEL_LENGTHS))
    np.testing.assert_array_equal(np.isinf(nats(LOGITS, lengths)), [False, False, True, False, False])
    jacobian = jax.jit(jax.jacrev(nats))(LOGITS, lengths)
    assert np.isfinite(jacobian).all()
    assert not np.asarray(jacobian)[2].any()
    without_frames = nats(LOGITS, np.zeros(5, int))
    np.testing.assert_array_equal(without_frames, [np.inf] * 4 + [0])  # the last has no labels


def test_forbidden_classes():
    logits = LOGITS.copy()
    logits[:, :, 2] = -np.inf
    found = compiled(logits, *GIVEN[1:], 0)
    grads = jax.grad(lambda x: jnp.where(jnp.isinf(nats := compiled(x, *GIVEN[1:], 0)), 0, nats).sum())(logits)
    np.testing.assert_allclose(found, enumerated(logits, *GIVEN[1:], 0), rtol=1e-5)
    np.testing.assert_array_equal(np.isinf(found), [True, True, False, True, False])
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("change", [{1: np.nan}, {1: np.inf}, dict.fromkeys(range(K), -np.inf)])
def test_frames_without_probabilities_are_nan(change):
    """Also where the loss of such a sequence would be impossible, and only where the frame is valid."""
    logits = LOGITS.copy()
    for k, value in change.items():
        logits[[0, 3], 0, k] = value
        logits[1, 4, k] = value  # in the padding
    of = lambda logits: compiled(logits, *GIVEN[1:], 0)
    found, grads = jax.jit(lambda x: (of(x), jax.grad(lambda x: jnp.nansum(of(x)))(x)))(logits)
    np.testing.assert_array_equal(np.isnan(found), [True, False, False, True, False])
    np.testing.assert_array_equal(found[1:3], of(LOGITS)[1:3])
    assert np.isfinite(grads).all()


def test_classes_that_are_none_are_nan():
    for wrong in (0, 3, -1, 2**31 - 1):
        labels = LABELS.copy()
        labels[1, 0] = wrong
        nats = np.asarray(compiled(LOGITS, LENGTHS, labels, LABEL_LENGTHS, 0))
        np.testing.assert_array_equal(np.isnan(nats), [False, True, False, False, False])
    for length in (-1, 4):
        nats = np.asarray(compiled(LOGITS, LENGTHS, LABELS, np.array([3, length, 2, 1, 0]), 0))
        np.testing.assert_array_equal(np.isnan(nats), [False, True, False, False, False])


def test_no_loss_is_negative_where_optax_rounds_below_0():
    logits, one = jnp.array([[[0.0, 17.0], [0.0, 17.0]]]), jnp.ones(1, int)
    assert optax.ctc_loss(logits, jnp.zeros((1, 2)), one[None], jnp.zeros((1, 1)))[0] < 0  # optax issue 1771
    loss = lambda logits: ctc.negative_log_likelihood(logits, 2 * one, one[None], one)[0]
    value, grads = jax.value_and_grad(loss)(logits)
    assert value == 0
    assert np.isfinite(grads).all()
    p = 1 / (1 + np.exp(10))  # of the blank; the loss is -log(1 - p^2), and has few digits left
    grads = jax.grad(loss)(logits * 10 / 17)
    np.testing.assert_allclose(grads[0, :, 0], [p * p * (1 - p) / (1 - p * p)] * 2, rtol=0.05)


def test_losses_far_above_what_optax_takes_as_impossible():
    """The only path has −2e5 nats, where Optax's own −1e5 for what is impossible would win."""
    logits = np.zeros((1, 4, 3), np.float32)
    logits[:, :, 0] = 5e4
    found = compiled(logits, np.array([4]), np.array([[1, 2, 1, 2]]), np.array([4]), 0)
    np.testing.assert_allclose(found, [2e5], rtol=1e-6)


def test_seeds_half_precision_and_a_batch_of_one():
    both = jnp.stack([LOGITS, LOGITS[::-1]])
    of = lambda logits: ctc.negative_log_likelihood(logits, *GIVEN[1:])
    np.testing.assert_allclose(jax.jit(jax.vmap(of))(both), [compiled(x, *GIVEN[1:], 0) for x in both], rtol=1e-6)
    half = LOGITS.astype(jnp.bfloat16)
    found = compiled(half, *GIVEN[1:], 0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, compiled(half.astype(np.float32), *GIVEN[1:], 0), rtol=1e-6)
    one = compiled(*(x[:1] for x in GIVEN), 0)
    np.testing.assert_allclose(one, compiled(*GIVEN, 0)[:1], rtol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        found = ctc.negative_log_likelihood(LOGITS.astype(np.float64), *GIVEN[1:])
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, enumerated(*GIVEN, 0), rtol=1e-12)


def test_matrix_products_are_exact_on_every_device():
    text = str(jax.make_jaxpr(lambda x: ctc.negative_log_likelihood(x, *GIVEN[1:]))(LOGITS))
    assert "Precision.HIGHEST" in text
    assert "precision=None" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: LOGITS[0]}, r"logits are \(5, 3\), expected \(B, T, K\)"),
        ({0: LOGITS[:, :0]}, r"logits are \(5, 0, 3\), expected .* with T and K at least 1"),
        ({1: np.array([5, 4, 3, 0, 5])}, "a sequence has length 0, expected 1 to 5, the steps of the batch"),
        ({1: np.array([5, 4, 3, 6, 5])}, "a sequence has length 6, expected 1 to 5"),
        ({2: LABELS[:4]}, r"labels are int32 \(4, 3\) and their lengths int32 \(5,\), expected whole numbers \(5, N\)"),
        ({2: LABELS[:, :0]}, r"labels are int32 \(5, 0\) .* with N at least 1"),
        ({2: LABELS.astype(float)}, r"labels are float64"),
        ({3: LABEL_LENGTHS.astype(bool)}, r"their lengths bool \(5,\), expected whole"),
        ({3: np.array([3, 2, 2, 1, -1])}, "a label length is -1, expected 0 to 3, the width of the labels"),
        ({3: np.array([3, 2, 2, 1, 4])}, "a label length is 4, expected 0 to 3"),
        ({4: 3}, r"blank is 3, expected a class in \[0, 3\)"),
        ({4: -1}, "blank is -1"),
    ],
)
def test_bad_input_is_one_line(change, message):
    given = [*GIVEN, 0]
    for place, value in change.items():
        given[place] = value
    with pytest.raises(InputError, match=message) as error:
        ctc.negative_log_likelihood(*given)
    assert "\n" not in str(error.value)
