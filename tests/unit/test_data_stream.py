"""Batches from disk are the batches from memory."""

import threading

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import streaming


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    for name, column in one.items():
        np.testing.assert_array_equal(column, other[name])


@pytest.mark.parametrize("rows", [slice(None), slice(32, 64)])
@pytest.mark.parametrize(("threads", "seeds"), [(1, 5), (3, (5, 6))])
def test_a_stream_gives_the_batches_of_columns_in_memory(cache, rows, threads, seeds):
    records = data.load("digits", "test", cache_dir=cache)
    memory = data.shuffled(records, 96, seeds)
    disk = data.streamed("digits", "test", 96, seeds, cache_dir=cache, threads=threads)
    for step in [0, 1, 2, 3, 4, 3, 10**6, 10**6 + 1, 0]:  # across epochs, back, far ahead, from the start again
        equal(disk(step, rows), memory(step, rows))


def test_a_batch_may_be_larger_than_the_set(cache):
    records = data.load("digits", "test[:10]", cache_dir=cache)
    equal(data.streamed("digits", "test[:10]", 32, 0, cache_dir=cache)(3), data.shuffled(records, 32, 0)(3))


def test_the_batches_ahead_are_begun(cache):
    """Asked for step 0, it decodes steps 0 to 2; the next call finds step 1 done and begins step 3."""
    begun, done = [], threading.Semaphore(0)

    def noted(rng, example):
        begun.append(threading.current_thread().name)
        done.release()
        return example

    stream = data.streamed("digits", "test", 8, 0, cache_dir=cache, transform=noted, threads=2)
    stream(0)
    assert all(done.acquire(timeout=60) for _ in range(24))
    assert len(begun) == 24
    stream(1)
    assert all(done.acquire(timeout=60) for _ in range(8))
    assert len(begun) == 32
    assert threading.current_thread().name not in begun


def cropped(rng: np.random.Generator, example):
    top = rng.integers(4)
    return {"image": example["image"][top : top + 5], "top": np.asarray(top)}


def test_a_transform_draws_from_the_examples_place_in_the_order(cache):
    whole = data.streamed("digits", "train", 12, 7, cache_dir=cache, transform=cropped)
    parts = [data.streamed("digits", "train", 12, 7, cache_dir=cache, transform=cropped, threads=2) for _ in range(2)]
    batch, halves = whole(3), (slice(0, 6), slice(6, 12))
    assert batch["image"].shape == (12, 5, 8, 1)
    assert len(set(batch["top"].tolist())) > 1
    equal(
        {k: np.concatenate([part(3, half)[k] for part, half in zip(parts, halves, strict=True)]) for k in batch}, batch
    )
    assert whole(4)["top"].tolist() != batch["top"].tolist()
    equal(whole(3), batch)


def test_what_fails_in_a_thread_reaches_the_caller(cache):
    def failing(rng, example):
        raise InputError("this transform does not like digits")

    stream = data.streamed("digits", "test", 8, 0, cache_dir=cache, transform=failing)
    for _ in range(2):
        with pytest.raises(InputError, match="does not like digits"):
            stream(0)


def test_bad_arguments_are_refused(cache):
    with pytest.raises(InputError, match="batch size 0"):
        data.streamed("digits", "test", 0, 0, cache_dir=cache)
    with pytest.raises(InputError, match="seed -1"):
        data.streamed("digits", "test", 4, -1, cache_dir=cache)
    with pytest.raises(InputError, match="is empty"):
        data.streamed("digits", "test[:0]", 4, 0, cache_dir=cache)


def test_steps_that_are_no_longer_wanted_are_dropped(cache):
    stream = data.streamed("digits", "test", 8, 0, cache_dir=cache)
    for step in (0, 500, 3):
        stream(step)
    assert isinstance(stream.read, streaming.Prefetched)
    assert sorted(stream.read._begun, key=min) == [range(32, 40), range(40, 48)]  # steps 4 and 5
    assert streaming._AHEAD == 2
