"""Sequences as they are: columns of rows that differ in length, and their batches by length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax import data, metrics
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector, evaluator
from dl_jax.core.fit import fit
from dl_jax.core.recorder import Recorder
from dl_jax.core.step import init_states, make_step, per_seed
from dl_jax.core.stream import epoch
from dl_jax.data.buckets import turns

quick = settings(deadline=None, max_examples=40)
lengths_of = st.lists(st.integers(0, 7), min_size=1, max_size=12)


def rows_of(lengths, width=()) -> list[np.ndarray]:
    """Rows of these lengths whose numbers, from 1 on, occur once."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.int32).reshape(n, *[1] * len(width)) + np.ones(width, np.int32)
            for n, end in zip(lengths, ends, strict=True)]  # fmt: skip


def dense(rows, width) -> np.ndarray:
    out = np.zeros((len(rows), width, *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


@quick
@given(lengths_of, st.sampled_from([(), (2,), (2, 3)]), st.data())
def test_a_ragged_column_reads_like_a_padded_array(lengths, inner, draw):
    rows = rows_of(lengths, inner)
    column, n = data.ragged(rows), len(lengths)
    expected = dense(rows, max(1, *lengths))
    assert (column.shape, column.ndim, column.dtype) == (expected.shape, expected.ndim, expected.dtype)
    assert column.lengths.tolist() == lengths
    np.testing.assert_array_equal(np.asarray(column), expected)
    some = np.array(draw.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=5)))
    for index in (0, -1, slice(1, None), slice(None, None, -1), some, some[None], some >= 0 if len(some) == n else 0):
        np.testing.assert_array_equal(column[index], expected[index])
    np.testing.assert_array_equal(column.take(some)[:], expected[some])
    np.testing.assert_array_equal(column.padded(9)[:], dense(rows, 9))
    np.testing.assert_array_equal(column.of(-column.values)[:], -expected)
    np.testing.assert_array_equal(data.joined(column.values, lengths)[:], expected)


def test_texts_are_padded_with_empty_ones():
    column = data.ragged([np.array([b"a", b"bcd"]), np.array([], np.bytes_), np.array([b"ef"])])
    assert column[:].tolist() == [[b"a", b"bcd"], [b"", b""], [b"ef", b""]]
    assert data.ragged([[], []]).shape == (2, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: data.ragged([]), "rows of shapes none, expected one row or more"),
        (lambda: data.ragged([np.zeros((2, 3)), np.zeros((2, 4))]), r"rows of shapes \(2, 3\), \(2, 4\), expected"),
        (lambda: data.ragged([3, 4]), r"rows of shapes \(\), expected"),
        (lambda: data.joined(np.zeros(3), [1, 1]), "lengths that add up to 2, expected 3"),
        (lambda: data.joined(np.zeros(1), [2, -1]), "lengths that add up to 1, expected 1"),
        (lambda: data.ragged([[1, 2]]).padded(1), "a row of length 2, expected at most 1; raise the width"),
        (lambda: data.ragged([[1, 2]]).of(np.zeros(3)), "3 values for rows of 2"),
    ],
)
def test_what_is_no_ragged_column(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()


def records_of(lengths) -> dict:
    token = data.ragged(rows_of(lengths))
    return {"token": token, "length": token.lengths, "row": np.arange(len(lengths))}


def test_streams_and_passes_pad_what_they_read():
    records = records_of([1, 4, 2, 3])
    batch = data.shuffled(records, 3, (0, 1))(5)
    np.testing.assert_array_equal(batch["token"], np.asarray(records["token"])[batch["row"]])
    assert batch["token"].shape == (2, 3, 4)
    last = [*epoch(records, 3)][-1]
    np.testing.assert_array_equal(last["token"], np.asarray(records["token"])[[3, 3, 3]])
    assert last["mask"].tolist() == [1, 0, 0]


def test_buckets_hold_every_row_once_padded_to_its_boundary():
    lengths = [1, 4, 2, 3, 8, 4, 7]
    records = records_of(lengths)
    parts = data.buckets(records, "length", (2, 4, 5, 8))
    assert [part["row"].tolist() for part in parts] == [[0, 2], [1, 3, 5], [4, 6]]
    assert [part["token"].shape for part in parts] == [(2, 2), (3, 4), (2, 8)]
    whole = np.asarray(records["token"].padded(8))
    for part in parts:
        width = part["token"].width
        np.testing.assert_array_equal(part["token"][:], whole[part["row"], :width])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": "size"}, "length is 'size', expected one of the columns token, length, row"),
        ({"length": "token"}, r"column 'token' is int32 \(3, 5\), expected a whole number for each row"),
        ({"boundaries": ()}, r"boundaries are \[\], expected lengths that increase"),
        ({"boundaries": (4, 4)}, r"boundaries are \[4, 4\]"),
        ({"boundaries": (2.5, 9)}, r"boundaries are \[2.5, 9\]"),
        ({"boundaries": (True, 9)}, r"boundaries are \[True, 9\]"),
        ({"boundaries": (0, 9)}, r"boundaries are \[0, 9\]"),
        ({"boundaries": (2, 4)}, "length of row 2 is 5, expected 1 to 4, the last boundary"),
        ({"batch_size": 0}, "batch size 0"),
        ({"together": 0}, "together is 0, expected 1 or more steps"),
        ({"seeds": ()}, "streams of batch sizes"),
        ({"seeds": -1}, "seed -1"),
    ],
)
def test_what_cannot_be_bucketed(change, message):
    given = {"length": "length", "boundaries": (4, 8), "batch_size": 2, "seeds": 0}
    with pytest.raises(InputError, match=message):
        data.bucketed(records_of([1, 2, 5]), **{**given, **change})


def test_the_boundaries_of_a_set_end_at_its_longest():
    lengths = np.array([3, 9, 1])
    assert data.widths((4, 8, 16), lengths, np.array([2])) == (4, 8, 9)
    assert data.widths((4, 9), lengths) == (4, 9)
    assert data.widths((), lengths, np.zeros(0, int)) == (9,)
    with pytest.raises(InputError, match="there are no lengths above 0"):
        data.widths((4,), np.zeros(0, int))


def test_an_empty_sequence_and_a_longer_partner_are_named():
    with pytest.raises(InputError, match="length of row 1 is 0, expected 1 to 4"):
        data.buckets(records_of([1, 0]), "length", (4,))
    pairs = {**records_of([1, 2]), "other": data.ragged([[1, 2, 3], [1]])}
    with pytest.raises(InputError, match="column 'other' has a row of length 3 in the bucket of up to 2"):
        data.buckets(pairs, "length", (2, 4))


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 40))
def test_buckets_take_turns_in_proportion_to_their_size(sizes, rows):
    turn, passes = turns(sizes, rows), 4
    count = sum(passes * size // rows for size in sizes)
    taken = [turn(t) for t in range(count)]
    for bucket, size in enumerate(sizes):
        assert [before for found, before in taken if found == bucket] == list(range(passes * size // rows))
    assert [turn(t) for t in reversed(range(count))][::-1] == taken  # any turn by itself
    turn(10**9)


@quick
@given(lengths_of.map(lambda lengths: [1 + n for n in lengths]), st.integers(1, 5), st.integers(1, 3))
def test_every_example_comes_once_in_a_pass_of_its_bucket(lengths, batch_size, together):
    records = records_of(lengths)
    stream = data.bucketed(records, "length", (3, 5, 8), batch_size, (3, 4), together)
    steps = 6 * together * -(-len(lengths) // batch_size) + 6 * together
    batches = [stream(step) for step in range(steps)]
    for part in data.buckets(records, "length", (3, 5, 8)):
        own = [b for b in batches if b["token"].shape[-1] == part["token"].width]
        for seed in range(2):
            seen = [row for batch in own for row in batch["row"][seed]]
            n = len(part["row"])
            for start in range(0, len(seen) - n + 1, n):
                assert sorted(seen[start : start + n]) == part["row"].tolist()
    for i in range(0, steps, together):  # turns keep their shape
        assert len({b["token"].shape for b in batches[i : i + together]}) == 1
    for step in (steps - 1, 0):  # a step by itself, and for the rows of a process
        again = stream(step, slice(1, None))
        assert all(np.array_equal(again[name], batches[step][name][:, 1:]) for name in again)


def test_seeds_share_the_bucket_and_not_the_rows():
    records = records_of([1 + i % 8 for i in range(64)])
    one, other = (data.bucketed(records, "length", (2, 4, 6, 8), 4, seed) for seed in (0, 1))
    both = data.bucketed(records, "length", (2, 4, 6, 8), 4, (0, 1))
    for step in range(40):
        a, b = one(step), other(step)
        assert a["token"].shape == b["token"].shape
        np.testing.assert_array_equal(both(step)["row"], [a["row"], b["row"]])
    assert not np.array_equal(one(0)["row"], other(0)["row"])
    assert both.widest is not None
    assert both.widest(slice(None))["token"].shape == (2, 4, 8)
    assert both.later(3)(2)["row"].tolist() == both(5)["row"].tolist()


def nats(variables, batch, key=None):
    """The mean of (w - token)² over what is no padding, and its sum and number."""
    there = jnp.arange(batch["token"].shape[1]) < batch["length"][:, None]
    total, number = metrics.masked((variables["params"]["w"] - batch["token"] / 8) ** 2, there)
    return total / number, ({}, {"nats": (total, number)})


TX = optax.sgd(0.1, 0.9)
STEP = per_seed(make_step(nats, TX))


def states():
    return init_states(jax.random.split(jax.random.key(0), 2), {"params": {"w": jnp.zeros((2, 1))}}, TX)


class Log(Recorder):
    def __init__(self):
        super().__init__()
        self.rows = []

    def report(self, step, metrics):
        self.rows.append((step, {name: np.asarray(value) for name, value in metrics.items()}))


def test_a_fit_on_buckets_and_one_that_goes_on_in_the_middle():
    records = records_of([1 + i % 8 for i in range(40)])
    stream = data.bucketed(records, "length", (2, 4, 8), 8, (0, 1), together=4)
    fitted = functools.partial(fit, STEP, stream=stream, every=4)
    one, four = Log(), Log()
    expected = fitted(states(), steps=24, run=one)
    half = fitted(states(), steps=8)
    np.testing.assert_array_equal(fitted(half, steps=24).params["w"], expected.params["w"])
    np.testing.assert_allclose(fitted(states(), steps=24, scan=4, run=four).params["w"], expected.params["w"], 1e-6)
    assert [step for step, _ in four.rows] == [step for step, _ in one.rows]
    w = np.zeros((2, 1))
    trace = np.zeros((2, 1))
    for step in range(24):  # the same by hand
        batch = stream(step)
        there = np.arange(batch["token"].shape[-1]) < batch["length"][..., None]
        slope = (2 * (w[..., None] - batch["token"] / 8) * there).sum((1, 2)) / there.sum((1, 2))
        trace = 0.9 * trace + slope[:, None]
        w = w - 0.1 * trace
    np.testing.assert_allclose(expected.params["w"], w, 1e-5)
    with pytest.raises(InputError, match="scan is 8, expected a divisor of 4, the steps with batches of one shape"):
        fitted(states(), steps=24, every=8, scan=8)
    with pytest.raises(InputError, match="goes on at step 8 with 3 steps in a call"):
        fit(STEP, half, data.bucketed(records, "length", (2, 4, 8), 8, (0, 1), together=3), steps=24, every=3, scan=3)
    with pytest.raises(InputError, match="begins at step 6 of the stream, expected a multiple of 4"):
        stream.later(6)


def test_a_set_of_sequences_is_kept_on_the_device_for_scans():
    stream = data.shuffled(records_of([1, 5, 3, 2]), 2, (0, 1))
    one, four = (fit(STEP, states(), stream, steps=8, every=4, scan=scan).params["w"] for scan in (1, 4))
    np.testing.assert_allclose(one, four, 1e-6)


def test_an_evaluation_by_buckets_is_that_of_the_whole():
    records = records_of([1 + i % 8 for i in range(21)])
    parts = data.buckets(records, "length", (2, 4, 8))
    keys = jax.random.split(jax.random.key(0), 2)
    variables = {"params": {"w": jnp.array([[0.3], [1.0]])}}

    def measured(variables, batch, key):
        there = (jnp.arange(batch["token"].shape[1]) < batch["length"][:, None]) * batch["mask"][:, None]
        return {"nats": metrics.masked((variables["params"]["w"] - batch["token"]) ** 2, there)}

    whole, by_parts = (evaluator(measured, each, 4, keys)(variables)["nats"] for each in (records, parts))
    np.testing.assert_allclose(by_parts, whole, 1e-6)
    tokens = np.concatenate(rows_of([1 + i % 8 for i in range(21)]))
    np.testing.assert_allclose(whole, [((w - tokens) ** 2).mean() for w in (0.3, 1)], 1e-6)
    products = collector(lambda variables, batch: batch["token"] * variables["params"]["w"], 4)
    found = [products(variables, p) for p in parts]
    assert [each.shape for each in found] == [(2, len(p["row"]), p["token"].width) for p in parts]
    with pytest.raises(InputError, match="no records, expected at least one part"):
        evaluator(measured, [], 4, keys)
