"""The order of examples, batches and epochs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data.batches import generator, order

quick = settings(deadline=None, max_examples=40)
sizes, batch_sizes, seeds = st.integers(1, 50), st.integers(1, 70), st.integers(0, 2**64)


def records(n: int) -> dict[str, np.ndarray]:
    return {"index": np.arange(n), "image": np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1)}


@quick
@given(sizes, batch_sizes, seeds)
def test_each_epoch_is_a_permutation_whatever_the_batch_size(n, batch_size, seed):
    stream = data.shuffled({"index": np.arange(n)}, batch_size, seed)
    steps = -(-3 * n // batch_size)  # three epochs at least; a batch may be larger than the set
    seen = np.concatenate([stream(step)["index"] for step in range(steps)])
    assert len(stream(0)["index"]) == batch_size
    for start in (0, n, 2 * n):
        assert sorted(seen[start : start + n]) == list(range(n))


@quick
@given(sizes, st.integers(1, 6), st.integers(1, 8), seeds, st.integers(0, 1000))
def test_processes_side_by_side_hold_what_one_process_holds(n, processes, rows, seed, step):
    size = processes * rows
    stream = data.shuffled(records(n), size, seed)
    whole = stream(step)
    parts = [stream(step, slice(p * rows, (p + 1) * rows))["image"] for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(parts), whole["image"])
    np.testing.assert_array_equal(whole["image"], records(n)["image"][whole["index"]])


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = (data.shuffled(records(10), 4, 3) for _ in range(2))
    forwards = [one(step)["index"] for step in range(20)]
    backwards = [other(step)["index"] for step in reversed(range(20))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert not np.array_equal(one(0)["index"], data.shuffled(records(10), 4, 4)(0)["index"])
    first, second = (order(10, 3)(10 * e, 10 * e + 10) for e in range(2))
    assert not np.array_equal(first, second)


def test_batches_are_copies():
    columns = records(4)
    data.shuffled(columns, 4, 0)(0)["image"][:] = 0
    np.testing.assert_array_equal(columns["image"], records(4)["image"])


def test_any_step_is_reached_at_once(monkeypatch):
    """A step draws the permutations of the epochs it touches, and no others."""
    drawn = []
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda source: drawn.append(source.spawn_key) or draw(source))
    stream = data.shuffled({"index": np.arange(100)}, 30, 0)
    stream(10**15)  # positions from 3e16, a multiple of 100
    stream(10**15 + 3)  # across the border to the next epoch
    assert drawn == [(0, 3 * 10**14), (0, 3 * 10**14 + 1)]


def test_the_order_does_not_change_with_versions():
    """Resuming under a newer NumPy must continue the same order."""
    np.testing.assert_array_equal(order(8, seed=7)(0, 16), [6, 2, 3, 0, 4, 5, 1, 7, 4, 7, 3, 2, 6, 0, 1, 5])


def test_the_generator_of_an_example_is_its_own():
    draws = [generator(seed, position).random() for seed in (0, 1) for position in (0, 1, 10**12)]
    assert len(set(draws)) == len(draws)
    assert generator(1, 10**12).random() == draws[-1]


@quick
@given(sizes, st.integers(1, 4), st.integers(1, 20))
def test_an_epoch_holds_every_example_once_and_pads_the_last_batch(n, processes, rows):
    size = processes * rows
    parts = [data.epoch(records(n), size, slice(p * rows, (p + 1) * rows)) for p in range(processes)]
    assert {len(part) for part in parts} == {-(-n // size)}
    batches = [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*parts, strict=True)]
    assert all(batch["mask"].shape == (size,) and batch["mask"].dtype == np.float32 for batch in batches)
    mask = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < n)
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index[:n], np.arange(n))
    np.testing.assert_array_equal(index[n:], n - 1)


def test_an_epoch_may_be_iterated_again():
    epoch = data.epoch(records(5), 2)
    assert [b["index"].tolist() for b in epoch] == [b["index"].tolist() for b in epoch] == [[0, 1], [2, 3], [4, 4]]


def test_several_seeds_are_stacked_each_in_its_own_order():
    columns, seeds = records(10), (5, 6, 7)
    alone = [data.shuffled(columns, 4, seed) for seed in seeds]
    for stream in (data.shuffled(columns, 4, seeds), data.per_seed(alone)):
        batch = stream(2, slice(1, 3))
        assert (stream.axis, stream.batch_size) == (1, 4)
        assert stream.records is columns  # one copy on the device serves all seeds
        assert batch["image"].shape == (3, 2, 2, 2, 1)
        for place, one in enumerate(alone):
            np.testing.assert_array_equal(batch["index"][place], one(2)["index"][1:3])


def test_each_seed_may_have_its_own_set():
    sets = [{"x": np.arange(8)}, {"x": 100 + np.arange(8)}]
    stream = data.per_seed([data.shuffled(each, 8, 0) for each in sets])
    assert stream.records is None
    np.testing.assert_array_equal(stream(0)["x"][1], stream(0)["x"][0] + 100)
    np.testing.assert_array_equal(stream.read(3, slice(2, 4))["x"], stream(3)["x"][:, 2:4])


@pytest.mark.parametrize("sizes", [(), (2, 4)])
def test_streams_that_make_no_batch_are_refused(sizes):
    with pytest.raises(InputError, match="streams of batch sizes"):
        data.per_seed([data.shuffled(records(8), size, 0) for size in sizes])


@pytest.mark.parametrize("make", [data.epoch, lambda *given: data.shuffled(*given, 0)])
@pytest.mark.parametrize(
    ("columns", "batch_size", "message"),
    [
        (records(3), 0, "batch size 0"),
        (records(3), -4, "batch size -4"),
        (records(0), 4, "no records"),
        ({}, 4, "no records"),
        ({"a": np.zeros(3), "b": np.zeros(4)}, 4, "different lengths {'a': 3, 'b': 4}"),
    ],
)
def test_bad_batches_are_refused(make, columns, batch_size, message):
    with pytest.raises(InputError, match=message):
        make(columns, batch_size)


def test_rows_outside_the_batch_are_refused():
    with pytest.raises(InputError, match="rows 4:8"):
        data.epoch(records(3), 4, slice(4, 8))


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed -1"):
        data.shuffled(records(3), 2, -1)


def test_a_column_called_mask_is_refused():
    with pytest.raises(InputError, match="column 'mask'"):
        data.epoch({"mask": np.zeros(3)}, 2)


def test_a_later_stream_goes_on_where_another_ended():
    stream = data.shuffled({"index": np.arange(10)}, 4, 0)
    later = stream.later(3)
    for step in range(4):
        np.testing.assert_array_equal(later(step)["index"], stream(3 + step)["index"])


@pytest.mark.parametrize("kept", [np.array([2, 0, 2]), np.array([True, False, True, False]), slice(1, 3)])
def test_rows_of_all_columns(kept):
    columns = {"x": np.arange(8).reshape(4, 2), "words": data.ragged([np.arange(i) for i in (1, 2, 0, 3)])}
    found = data.rows(columns, kept)
    assert list(found) == ["x", "words"]
    np.testing.assert_array_equal(found["x"], columns["x"][kept])
    np.testing.assert_array_equal(found["words"], columns["words"][:][kept])


def test_few_labels_are_those_of_a_seed():
    labels = np.repeat(np.arange(5), [40, 30, 20, 30, 40])
    drawn = [data.few(labels, 20, 5, seed) for seed in (0, 0, 1)]
    for rows in drawn:
        assert len(set(rows)) == 100
        assert np.bincount(labels[rows]).tolist() == [20] * 5
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert {*drawn[0]} != {*drawn[2]}
    with pytest.raises(InputError, match="21 labels of each class, expected at most 20"):
        data.few(labels, 21, 5, 0)
    with pytest.raises(InputError, match="1 labels of each class, expected at most 0"):
        data.few(labels, 1, 6, 0)
