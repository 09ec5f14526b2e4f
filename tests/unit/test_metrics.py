import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax import metrics
from dl_jax.core.errors import InputError

CLASSES = 4


def all_metrics(batch):
    logits, labels, mask = batch["logits"], batch["label"], batch["mask"]
    return {
        "accuracy": metrics.accuracy(logits, labels, mask),
        "error_rate": metrics.error_rate(logits, labels, mask),
        "top_2": metrics.top_k(logits, labels, mask, 2),
        "cross_entropy": metrics.cross_entropy(logits, labels, mask),
        "confusion": metrics.confusion_matrix(logits, labels, mask),
    }


COMPILED = jax.jit(all_metrics)  # once for each shape of a batch


def evaluated(batches, compute=COMPILED):
    """Σ sum / Σ weight over the batches."""
    pairs = [compute(batch) for batch in batches]
    add = lambda name, part: sum(np.asarray(each[name][part], np.float64) for each in pairs)
    return {name: add(name, 0) / add(name, 1) for name in pairs[0]}


def records(n, seed=0, tokens=()):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (n, *tokens, CLASSES)).astype(np.float32)  # few values, so that ties are common
    return logits, rng.integers(0, CLASSES, (n, *tokens))


def padded(logits, labels, size, filler):
    """Batches of `size`; the last one is filled up with rows that must not count."""
    for i in range(0, len(labels), size):
        n = len(labels[i : i + size])
        fill = [(0, size - n)] + [(0, 0)] * (labels.ndim - 1)
        yield {
            "logits": np.pad(logits[i : i + size], [*fill, (0, 0)], constant_values=filler),
            "label": np.pad(labels[i : i + size], fill),
            "mask": (np.arange(size) < n).astype(np.float32),
        }


def reference(logits, labels):
    """The reference in float64 loops, in which the first of equal logits counts as the larger."""
    confusion, top_2, nats = np.zeros((CLASSES, CLASSES)), 0, 0.0
    for row, label in zip(logits.reshape(-1, CLASSES).astype(np.float64), labels.ravel(), strict=True):
        order = sorted(range(CLASSES), key=lambda c, row=row: (-row[c], c))
        confusion[label, order[0]] += 1
        top_2 += label in order[:2]
        nats += np.log(np.exp(row).sum()) - row[label]
    n, right = labels.size, np.trace(confusion)
    return {
        "accuracy": right / n,
        "error_rate": (n - right) / n,
        "top_2": top_2 / n,
        "cross_entropy": nats / n,
        "confusion": confusion / n,
    }


@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 12), size=st.sampled_from([1, 3, 5, 16]), filler=st.sampled_from([0.0, 7.0, np.nan]))
def test_any_batch_size_and_padding_gives_the_same_exact_result(n, size, filler):
    logits, labels = records(n, seed=n)
    result, expected = evaluated(padded(logits, labels, size, filler)), reference(logits, labels)
    np.testing.assert_allclose(result.pop("cross_entropy"), expected.pop("cross_entropy"), rtol=1e-6)
    for name, value in expected.items():
        np.testing.assert_array_equal(result[name], value, err_msg=name)  # counts are exact
    np.testing.assert_array_equal(np.rint(result["confusion"] * n), expected["confusion"] * n)


def test_every_token_counts_once():
    logits, labels = records(7, tokens=(3,))
    result, expected = evaluated(padded(logits, labels, 4, 9.0)), reference(logits, labels)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


def test_a_mask_over_tokens_leaves_some_of_each_example_out():
    logits, labels = records(4, tokens=(5,))
    lengths = np.array([5, 1, 3, 2])
    mask = np.arange(5) < lengths[:, None]  # [B, T]
    batch = {"logits": jnp.asarray(logits), "label": jnp.asarray(labels), "mask": jnp.asarray(mask)}
    result, expected = evaluated([batch]), reference(logits[mask], labels[mask])
    assert float(metrics.accuracy(batch["logits"], batch["label"], batch["mask"])[1]) == lengths.sum()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


def test_seeds_are_a_leading_axis():
    logits, labels = np.stack([records(6, s)[0] for s in range(3)]), records(6)[1]
    per_seed = jax.jit(jax.vmap(all_metrics, in_axes=({"logits": 0, "label": None, "mask": None},)))
    batches = lambda logits: [{"logits": logits, "label": labels, "mask": np.array([1, 1, 1, 1, 1, 0], np.float32)}]
    together = evaluated(batches(logits), per_seed)
    assert together["confusion"].shape == (3, CLASSES, CLASSES)
    for seed in range(3):
        for name, value in evaluated(batches(logits[seed])).items():
            np.testing.assert_allclose(together[name][seed], value, rtol=1e-6, err_msg=name)


def test_reliability_against_a_loop_over_labels():
    logits, labels = np.random.default_rng(0).normal(0, 2, (40, 3)).astype(np.float32), np.arange(40) % 3
    logits[0], logits[1] = (99, 0, 0), np.nan  # a probability of 1, and padding
    mask = (np.arange(40) != 1).astype(np.float32)
    sums, weight = jax.jit(functools.partial(metrics.reliability, bins=3))(logits, labels, mask)
    expected = np.zeros((3, 3, 3))
    for row, label in zip(logits[mask > 0].astype(np.float64), labels[mask > 0], strict=True):
        for c, probability in enumerate(np.exp(row) / np.exp(row).sum()):
            expected[c, min(int(probability * 3), 2)] += 1, probability, c == label
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert weight.tolist() == [[[39]]]
    np.testing.assert_array_equal(sums[..., 0].sum(1), [39] * 3)  # every class has a probability
    with pytest.raises(InputError, match="bins is 0"):
        metrics.reliability(logits, labels, mask, bins=0)


def test_calibration_error_by_hand():
    """Probabilities of 0.2 that are never right and of 0.9 that always are; for the other class, turned round."""
    of_class = lambda right: [[0.5, 0.1, 0.5 * right[0]], [0.5, 0.45, 0.5 * right[1]]]
    found = metrics.calibration_error(np.array([[of_class((0, 1)), of_class((1, 0))]]))
    np.testing.assert_allclose(found, [((0.1 + 0.05) + (0.4 + 0.45)) / 2])


def test_frequent_and_true_probabilities_are_calibrated():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20_000, 4))
    labels = (logits + draw.gumbel(size=logits.shape)).argmax(1)  # as probable as softmax says
    found = [np.divide(*metrics.reliability(scale * logits, labels, np.ones(20_000))) for scale in (1, 3)]
    right, sure = map(metrics.calibration_error, found)
    assert right < 0.01 < 0.1 < sure


def test_masked_weighs_elements():
    total, weight = metrics.masked(jnp.array([[1.0, 2.0], [3.0, jnp.inf]]), jnp.array([[0.5, 2.0], [1.0, 0.0]]))
    assert (float(total), float(weight)) == (7.5, 3.5)


def test_masked_sums_low_precision_in_float32():
    ones = jnp.ones(1001, jnp.bfloat16)  # bfloat16 has no 1001
    assert [float(x) for x in metrics.masked(ones, ones)] == [1001.0, 1001.0]


def test_identities():
    logits, labels = (jnp.asarray(x) for x in records(50))
    mask = jnp.ones(50)
    accuracy, n = metrics.accuracy(logits, labels, mask)
    assert float(accuracy + metrics.error_rate(logits, labels, mask)[0]) == float(n) == 50
    assert float(metrics.top_k(logits, labels, mask, 1)[0]) == float(accuracy)
    assert float(metrics.top_k(logits, labels, mask, CLASSES)[0]) == 50
    counts, weight = metrics.confusion_matrix(logits, labels, mask)
    assert float(counts.sum()) == float(weight[0, 0]) == 50
    assert float(jnp.trace(counts)) == float(accuracy)
    np.testing.assert_array_equal(counts.sum(1), np.bincount(labels, minlength=CLASSES))


def test_perplexity():
    uniform = metrics.cross_entropy(jnp.zeros((3, 8)), jnp.array([0, 5, 7]), jnp.ones(3))
    np.testing.assert_allclose(metrics.perplexity(float(uniform[0] / uniform[1])), 8, rtol=1e-6)
    np.testing.assert_array_equal(metrics.perplexity(np.array([0.0, 1e6, np.nan])), [1, np.inf, np.nan])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.masked(jnp.zeros((4, 2)), jnp.ones(2)), "mask (2,) for values (4, 2)"),
        (lambda: metrics.masked(jnp.zeros(4), jnp.ones((4, 2))), "mask (4, 2) for values (4,)"),
        (lambda: metrics.accuracy(jnp.zeros((4, 3)), jnp.zeros((4, 3), int), jnp.ones(4)), "expected (4,)"),
        (lambda: metrics.error_rate(jnp.zeros((4, 3)), jnp.zeros(4), jnp.ones(4)), "float32"),
        (lambda: metrics.confusion_matrix(jnp.zeros((4, 3)), jnp.zeros(3, int), jnp.ones(4)), "labels (3,)"),
        (lambda: metrics.confusion_matrix(jnp.zeros((4, 3)), jnp.zeros(4, int), jnp.ones(3)), "mask (3,)"),
        (lambda: metrics.top_k(jnp.zeros((4, 3)), jnp.zeros(4, int), jnp.ones(4), 4), "k is 4"),
        (lambda: metrics.top_k(jnp.zeros((4, 3)), jnp.zeros(4, int), jnp.ones(4), 0), "k is 0"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
def test_labels_of_small_integer_types_count_once(dtype):
    """A one-hot of 300 classes wraps in uint8, so that 44 would also count as 300."""
    labels = np.array([0, 44, 127], dtype)
    logits = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    logits[0, 0] = logits[1, 300 - 256] = 9
    counts, total = metrics.confusion_matrix(logits, labels, jnp.ones(3))
    expected = np.zeros((300, 300))
    np.add.at(expected, (labels.astype(int), logits.argmax(1)), 1)
    np.testing.assert_array_equal(counts, expected)
    assert float(total[0, 0]) == 3
    right = float((logits.argmax(1) == labels.astype(int)).sum())
    assert float(metrics.accuracy(logits, labels, jnp.ones(3))[0]) == right
    assert float(metrics.error_rate(logits, labels, jnp.ones(3))[0]) == 3 - right
    ranks = (logits > np.take_along_axis(logits, labels.astype(int)[:, None], 1)).sum(1)
    assert float(metrics.top_k(logits, labels, jnp.ones(3), 200)[0]) == (ranks < 200).sum()


def test_masked_keeps_float64():
    with jax.enable_x64(True):
        values, mask = jnp.full(10, 0.1), jnp.full(10, 0.1)
        for found, expected in zip(metrics.masked(values, mask), (0.1, 1.0), strict=True):
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, expected, rtol=1e-14)
