"""The CRF against enumeration of all paths in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dl_jax.core.errors import InputError
from dl_jax.losses import crf
from dl_jax.losses.crf import Chain

B, T, K = 6, 5, 3
LENGTHS = np.array([5, 1, 3, 2, 4, 5], np.int32)
INF = np.inf


def everything(scores, tags, chain, lengths):
    def total(scores, chain):
        nll = crf.negative_log_likelihood(scores, tags, chain, lengths)
        return nll.sum(), nll

    grads, nll = jax.grad(total, (0, 1), has_aux=True)(scores, chain)
    return {
        "log_z": crf.log_partition(scores, chain, lengths),
        "score": crf.path_score(scores, tags, chain, lengths),
        "nll": nll,
        "grads": grads,
        "marginals": crf.marginals(scores, chain, lengths),
        "viterbi": crf.viterbi(scores, chain, lengths),
    }


COMPILED = jax.jit(everything)  # one shape for most cases
OF_SEEDS = jax.jit(jax.vmap(everything))


def enumerated(scores, tags, chain, lengths):
    """The same from all paths. The gradients are expected counts less those of the path `tags`."""
    scores, start, step, end = (np.asarray(x, np.float64) for x in (scores, *chain))
    batch, steps, k = scores.shape
    marginals, counts = np.zeros((batch, steps, k)), Chain(np.zeros(k), np.zeros((k, k)), np.zeros(k))
    of_tags, log_z, score, best, best_score = np.zeros_like(marginals), *np.zeros((2, batch)), [], np.zeros(batch)
    for b, n in enumerate(lengths):
        paths = list(itertools.product(range(k), repeat=int(n)))
        total = lambda path, b=b, n=n: (
            start[path[0]]
            + sum(scores[b, t, y] for t, y in enumerate(path))
            + sum(step[i, j] for i, j in itertools.pairwise(path))
            + end[path[n - 1]]
        )
        all_scores = np.array([total(path) for path in paths])
        log_z[b] = all_scores.max() + np.log(np.exp(all_scores - all_scores.max()).sum())
        score[b] = total([int(y) for y in tags[b, :n]])
        best.append(paths[all_scores.argmax()])
        best_score[b] = all_scores.max()
        given = [([int(y) for y in tags[b, :n]], -1.0)]
        for path, weight in [*zip(paths, np.exp(all_scores - log_z[b]), strict=True), *given]:
            counts.start[path[0]] += weight
            counts.end[path[-1]] += weight
            for t, y in enumerate(path):
                (marginals if weight >= 0 else of_tags)[b, t, y] += weight
            for i, j in itertools.pairwise(path):
                counts.step[i, j] += weight
    return {
        "log_z": log_z,
        "score": score,
        "nll": log_z - score,
        "grads": (marginals + of_tags, counts),
        "marginals": marginals,
        "viterbi": (best, best_score),
    }


def drawn(seed, scale=1.0, step=1.0, batch=B, steps=T, k=K):
    rng = np.random.default_rng(seed)
    scores = scale * rng.normal(size=(batch, steps, k))
    chain = Chain(scale * rng.normal(size=k), step * rng.normal(size=(k, k)), scale * rng.normal(size=k))
    return scores.astype(np.float32), rng.integers(0, k, (batch, steps)), jax.tree.map(np.float32, chain)


def assert_equal(found, expected, lengths=LENGTHS, rtol=1e-5, atol=2e-6):
    found = jax.device_get(found)
    for name in ("log_z", "score"):
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, err_msg=name, atol=1e-5)
    # What float32 rounds in scores of this size stays in the difference.
    large = max(1.0, np.abs(expected["log_z"][np.isfinite(expected["log_z"])]).max())
    np.testing.assert_allclose(found["nll"], expected["nll"], rtol=rtol, atol=1e-6 * large)
    for got, want in zip(jax.tree.leaves(found["grads"]), jax.tree.leaves(expected["grads"]), strict=True):
        np.testing.assert_allclose(got, want, atol=atol * large**0.5 * 3)
    np.testing.assert_allclose(found["marginals"], expected["marginals"], atol=atol * large**0.5)
    tags, score = found["viterbi"]
    np.testing.assert_allclose(score, expected["viterbi"][1], rtol=rtol, atol=1e-5)
    for row, path, n in zip(tags, expected["viterbi"][0], lengths, strict=True):
        assert tuple(row[:n]) == path
        assert not row[n:].any()


@pytest.mark.parametrize("seed", range(3))
def test_all_paths(seed):
    case = drawn(seed)
    assert_equal(COMPILED(*case, LENGTHS), enumerated(*case, LENGTHS))


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 3, 1)])
def test_one_step_one_tag_and_a_batch_of_one(shape):
    batch, steps, k = shape
    case, lengths = drawn(7, batch=batch, steps=steps, k=k), np.full(batch, steps)
    expected = enumerated(*case, lengths)
    np.testing.assert_allclose(jax.jit(crf.negative_log_likelihood)(*case, lengths), expected["nll"], atol=1e-6)
    tags, score = jax.jit(crf.viterbi)(case[0], case[2], lengths)
    np.testing.assert_array_equal(tags, expected["viterbi"][0])
    np.testing.assert_allclose(score, expected["viterbi"][1], rtol=1e-6)


def test_gradients_in_float64():
    scores, tags, chain = jax.tree.map(lambda x: x.astype(np.result_type(x, np.int8)), drawn(3))
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
        found = COMPILED(wide(scores), jnp.asarray(tags), wide(chain), LENGTHS)
        assert {leaf.dtype for leaf in jax.tree.leaves((found["grads"], found["nll"]))} == {np.dtype(np.float64)}
        assert_equal(found, enumerated(scores, tags, chain, LENGTHS), rtol=1e-13, atol=1e-14)


def test_second_derivatives():
    """The covariance of the indicators of tags: the Hessian of log Z is the Jacobian of the marginals."""
    scores, _, chain = drawn(4, batch=1)
    posterior = lambda scores: crf.marginals(scores, chain, jnp.array([4]))
    hessian = jax.jit(jax.jacfwd(posterior))(scores).reshape(T * K, T * K)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-6)
    p = enumerated(scores, np.zeros((1, T), int), chain, [4])["marginals"].ravel()
    np.testing.assert_allclose(np.diag(hessian), p * (1 - p), atol=1e-6)


FORBIDDEN = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0]], bool)


@pytest.mark.parametrize("never", [-INF, -1e9, -1e4])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_forbidden_transitions(never, scale):
    scores, tags, chain = drawn(5, scale)
    step = np.where(FORBIDDEN, chain.step, never).astype(np.float32)
    chain = Chain(np.array([0.5, never, 1], np.float32), step, np.array([1, 2, never], np.float32))
    scores[0, 2, 0] = never  # of a single tag too
    tags = np.array(
        [[0, 1, 2, 0, 0], [0, 2, 1, 1, 0], [0, 0, 1, 2, 0], [2, 0, 1, 1, 1], [2, 0, 0, 1, 2], [0, 1, 1, 1, 1]]
    )
    found = COMPILED(scores, tags, chain, LENGTHS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert_equal(found, enumerated(scores, tags, chain, LENGTHS))
    for row, n in zip(found["viterbi"][0], LENGTHS, strict=True):
        assert row[0] != 1
        assert row[n - 1] != 2
        assert FORBIDDEN[row[: n - 1], row[1:n]].all()


@pytest.mark.parametrize("step", [1e3, 1e4])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_transitions_of_thousands(step, scale):
    for seed in range(3):
        case = drawn(seed, scale, step)
        assert_equal(COMPILED(*case, LENGTHS), enumerated(*case, LENGTHS))


def far_apart():
    """The transition to tag 1 that counts is by e^-300 smaller than the largest, in a row that is by e^-200 smaller."""
    scores, tags, _ = drawn(6)
    step = np.array([[0, -500, -INF], [-INF, -0.5, -INF], [300, -200, 1]], np.float32)
    return scores, tags * 0, Chain(np.array([0, -INF, -200], np.float32), step, np.array([-9999, 0, -9999], np.float32))


def test_products_that_underflow_are_replaced():
    scores, tags, chain = far_apart()
    lengths = np.array([5, 2, 3, 2, 4, 5])
    prepared = crf._checked("", jnp.asarray(scores), chain, lengths)
    terms, exact = crf._forward(crf._by_products, *prepared)
    assert not exact
    tags = np.array([[0, 0, 1, 1, 1]] * B)
    expected = enumerated(scores, tags, chain, lengths)
    assert not np.allclose(terms.sum(1), expected["log_z"], rtol=1e-3)  # the products alone would be wrong
    assert_equal(COMPILED(scores, tags, chain, lengths), expected, lengths)
    one = drawn(0)
    assert crf._forward(crf._by_products, *crf._checked("", one[0], one[2], LENGTHS))[1]


def test_tags_that_are_unreachable_by_right_need_no_other_recursion():
    """From left to right, and a tag to which no transition leads."""
    scores, tags, chain = drawn(0)
    for step in (np.triu(np.ones((K, K))), np.arange(K) != np.full((K, 1), 1)):
        narrow = Chain(np.array([0, -INF, -INF]), np.where(step, chain.step, -INF), chain.end)
        terms, exact = crf._forward(crf._by_products, *crf._checked("", scores, narrow, LENGTHS))
        assert exact
        np.testing.assert_allclose(terms.sum(1), enumerated(scores, tags, narrow, LENGTHS)["log_z"], rtol=1e-5)


def test_seeds_are_an_axis_and_keep_the_branch():
    """One seed needs log-sum-exp, which makes all of them use it."""
    cases = [drawn(0), drawn(1), (far_apart()[0], drawn(0)[1], far_apart()[2])]
    lengths = np.stack([LENGTHS, LENGTHS[::-1], np.full(B, 5)])
    for chosen in ((0, 1, 0), (0, 1, 2)):
        given = [(*cases[i], lengths[i]) for i in chosen]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *given)
        found = OF_SEEDS(*stacked)
        for seed, case in enumerate(given):
            assert_equal(jax.tree.map(lambda leaf, seed=seed: leaf[seed], found), enumerated(*case), case[-1])
    traced = str(jax.make_jaxpr(OF_SEEDS)(*stacked))
    assert "cond[" in traced


def test_what_stands_in_the_padding_has_no_effect():
    scores, tags, chain = drawn(2)
    expected = jax.device_get(COMPILED(scores, tags, chain, LENGTHS))
    padding = np.arange(T) >= LENGTHS[:, None]
    for number, tag in ((np.nan, -1), (INF, 99), (-INF, K)):
        spoilt = np.where(padding[..., None], np.float32(number), scores), np.where(padding, tag, tags)
        found = jax.device_get(COMPILED(*spoilt, chain, LENGTHS))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not expected["grads"][0][padding].any()
    assert not expected["marginals"][padding].any()
    np.testing.assert_allclose(expected["marginals"].sum(-1), ~padding, atol=1e-6)


def test_a_likely_path_keeps_its_digits():
    """log Z and the score are 600,000 here, and differ by less than a float32 of that size can hold."""
    rng = np.random.default_rng(0)
    scores, tags = rng.normal(size=(1, 600, 3)).astype(np.float32), rng.integers(0, 3, (1, 600))
    scores[0, np.arange(600), tags[0]] += 1000
    scores[0, 300, tags[0, 300]] -= 997
    chain, lengths = drawn(0)[2], np.array([600])
    nll = jax.jit(crf.negative_log_likelihood)
    with jax.enable_x64(True):
        expected = float(nll(scores.astype(np.float64), tags, chain, lengths)[0])
    assert 0 < expected < 1
    np.testing.assert_allclose(nll(scores, tags, chain, lengths), [expected], rtol=1e-3)


def test_low_precision_is_computed_in_float32():
    scores, tags, chain = drawn(1)
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (scores, chain))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    nll = jax.jit(crf.negative_log_likelihood)
    found, expected = (nll(s, tags.astype(np.uint8), c, LENGTHS.astype(np.int8)) for s, c in (low, wide))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_rows_over_eight_devices():
    scores, tags, chain = drawn(0, batch=8)
    lengths = np.array([5, 1, 3, 2, 4, 5, 5, 2], np.int32)
    rows = NamedSharding(Mesh(np.array(jax.devices()[:8]), "d"), PartitionSpec("d"))
    scores_on, tags_on, lengths_on = jax.device_put((scores, tags, lengths), rows)
    found = jax.jit(jax.grad(lambda *given: crf.negative_log_likelihood(*given).sum(), (0, 2)))
    expected = enumerated(scores, tags, chain, lengths)["grads"]
    for got, want in zip(
        jax.tree.leaves(found(scores_on, tags_on, chain, lengths_on)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_sequence_without_a_path():
    scores, tags, chain = drawn(0)
    closed = chain._replace(step=np.full((K, K), -INF, np.float32))
    for function in (crf.log_partition, crf.marginals, crf.viterbi):
        with pytest.raises(InputError, match="sequence 0 of the batch has no path"):
            function(scores, closed, LENGTHS)
    masked = np.where((np.arange(B) == 2)[:, None, None], -INF, scores)
    with pytest.raises(InputError, match="sequence 2 of the batch has no path"):
        crf.negative_log_likelihood(masked, tags, chain, LENGTHS)
    found = jax.device_get(COMPILED(scores, tags, closed, LENGTHS))
    alone = LENGTHS == 1
    for name, value in (("log_z", -INF), ("nll", np.nan)):
        np.testing.assert_array_equal(found[name][~alone], value)
        assert np.isfinite(found[name][alone]).all()
    valid = np.arange(T) < LENGTHS[:, None]
    np.testing.assert_array_equal(np.isnan(found["marginals"]).any(-1), valid & ~alone[:, None])
    assert np.isnan(found["grads"][0][~alone, 0]).all()
    np.testing.assert_array_equal(found["viterbi"][0][~alone], -1)
    np.testing.assert_array_equal(found["viterbi"][1][~alone], -INF)
    assert found["viterbi"][0][alone][0, 0] == (scores[1, 0] + chain.start + chain.end).argmax()


def test_a_forbidden_path_is_infinitely_unlikely():
    scores, tags, chain = drawn(0)
    chain.step[tags[0, 0], tags[0, 1]] = -INF
    found = COMPILED(scores, tags, chain, LENGTHS)
    assert found["nll"][0] == INF
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["grads"]))


@pytest.mark.parametrize("tag", [-1, K, 99])
def test_an_unknown_tag_gives_nan(tag):
    scores, tags, chain = drawn(0)
    tags[2, 1] = tag
    for name in ("score", "nll"):
        np.testing.assert_array_equal(np.isnan(COMPILED(scores, tags, chain, LENGTHS)[name]), np.arange(B) == 2)


# Which transitions are allowed

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_bio_transitions_by_enumeration():
    """A sequence is allowed if every I continues an entity of its type."""
    allowed = crf.bio_transitions(NAMES)
    assert {part.dtype for part in allowed} == {np.dtype(bool)}
    for n in (1, 2, 3, 4):
        for path in itertools.product(range(5), repeat=n):
            named = ["O", *(NAMES[y] for y in path)]
            right = all(b[0] != "I" or a in (f"B{b[1:]}", b) for a, b in itertools.pairwise(named))
            steps = all(allowed.step[i, j] for i, j in itertools.pairwise(path))
            assert right == bool(allowed.start[path[0]] and steps and allowed.end[path[-1]]), named


def test_viterbi_never_takes_what_is_forbidden():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(64, 12, 5)).astype(np.float32)
    chain = Chain(np.zeros(5, np.float32), rng.normal(size=(5, 5)).astype(np.float32), np.zeros(5, np.float32))
    lengths = rng.integers(1, 13, 64)
    allowed = crf.bio_transitions(NAMES)
    wrong = lambda tags: sum(
        not (allowed.start[row[0]] and allowed.step[row[: n - 1], row[1:n]].all())
        for row, n in zip(np.asarray(tags), lengths, strict=True)
    )
    viterbi = jax.jit(crf.viterbi)
    assert wrong(viterbi(scores, chain, lengths)[0]) > 10
    assert wrong(viterbi(scores, crf.forbidding(chain, allowed), lengths)[0]) == 0


def test_forbidden_scores_get_no_gradient():
    scores, _, chain = drawn(0)
    allowed = Chain(np.array([True, True, False]), FORBIDDEN, np.array([False, True, True]))
    loss = lambda chain: crf.log_partition(scores, crf.forbidding(chain, allowed), LENGTHS + 1 - (LENGTHS == 5)).sum()
    grads = jax.jit(jax.grad(loss))(chain)
    for grad, yes in zip(grads, allowed, strict=True):
        assert not grad[~yes].any()
        assert (grad[yes] > 0).all()
    seeds = crf.forbidding(jax.tree.map(lambda x: np.stack([x, x]), chain), allowed)
    assert [part.shape for part in seeds] == [(2, 3), (2, 3, 3), (2, 3)]


def never(**parts):
    return Chain(*(np.ones(s, bool) for s in ((3,), (3, 3), (3,))))._replace(**parts)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, y, c: crf.log_partition(s[0], c, LENGTHS), "scores are (5, 3), expected (B, T, K)"),
        (lambda s, y, c: crf.log_partition(s[:, :0], c, LENGTHS), "scores are (6, 0, 3)"),
        (lambda s, y, c: crf.viterbi(s, c._replace(step=c.end), LENGTHS), "the chain has (3,), (3,), (3,), expected"),
        (lambda s, y, c: crf.marginals(s, c, LENGTHS[:2]), "lengths are int32 (2,)"),
        (lambda s, y, c: crf.log_partition(s, c, LENGTHS + 1), "length 6, expected 1 to 5"),
        (lambda s, y, c: crf.path_score(s, y[:, :4], c, LENGTHS), "path_score: labels (6, 4)"),
        (lambda s, y, c: crf.negative_log_likelihood(s, y * 1.0, c, LENGTHS), "labels are float64"),
        (lambda s, y, c: crf.forbidding(c, never(step=np.ones(3, bool))), "step is allowed by bool (3,)"),
        (lambda s, y, c: crf.forbidding(c, never(end=np.ones(3))), "end is allowed by float64 (3,)"),
        (lambda s, y, c: crf.forbidding(c, never(start=np.zeros(3, bool))), "allow more"),
        (
            lambda s, y, c: crf.forbidding(c._replace(step=np.zeros((3, 2))), never(step=np.ones((3, 2), bool))),
            "step is allowed by bool (3, 2), scored by (3, 2), expected bools (3, 3)",
        ),
        (lambda s, y, c: crf.forbidding(c, never(start=[True] * 4)), "start is allowed by bool (4,), scored by (3,)"),
        (
            lambda s, y, c: crf.forbidding(
                c, Chain(np.array([True, False, False]), np.eye(3, dtype=bool), np.array([False, True, True]))
            ),
            "no tag that may be the last",
        ),
        (lambda s, y, c: crf.bio_transitions(["O", "PER"]), "a class is named 'PER'"),
        (lambda s, y, c: crf.bio_transitions(["O", "B-"]), "a class is named 'B-'"),
        (lambda s, y, c: crf.bio_transitions(["O", "I-PER"]), "'I-PER' without 'B-PER'"),
        (lambda s, y, c: crf.bio_transitions(["O", "O"]), "expected different names"),
        (lambda s, y, c: crf.bio_transitions([]), "expected different names"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError) as error:
        call(*drawn(0))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
