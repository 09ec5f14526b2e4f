"""Texts as ids, and their windows: in order, for truncated back-propagation, and from anywhere."""

import itertools
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_jax.core.errors import InputError
from dl_jax.data import text

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**64)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(0, 60))  # rows, length, characters to spare


def numbered(n: int) -> np.ndarray:
    """A text whose ids say where they stand."""
    return np.arange(n)


def a_pass(batch_size: int, length: int, spare: int) -> tuple[np.ndarray, int]:
    """A text that is long enough, and the number of windows in a stretch of it."""
    n = batch_size * length + 1 + spare
    return numbered(n), (n - 1) // batch_size // length


@quick
@given(shapes, seeds)
def test_rows_read_on_and_a_pass_shows_every_window_once(shape, seed):
    batch_size, length, _ = shape
    ids, count = a_pass(*shape)
    stream = text.windows(ids, batch_size, length, seed)
    batches = [stream(step) for step in range(2 * count + 1)]
    stretch = (len(ids) - 1) // batch_size
    for before, after in itertools.pairwise(batches):
        goes_on = after["token"][:, 0] == before["target"][:, -1]
        np.testing.assert_array_equal(after["first"], ~goes_on if count > 1 else np.ones(batch_size, bool))
    for batch in batches:
        np.testing.assert_array_equal(batch["target"], batch["token"] + 1)
        np.testing.assert_array_equal(np.diff(batch["token"]), 1)  # contiguous
        np.testing.assert_array_equal(batch["token"][:, 0] // stretch, np.arange(batch_size))  # within its stretch
    assert batches[0]["first"].all()
    for start in (0, 3 * count):
        seen = np.concatenate([stream(step)["token"] for step in range(start, start + count)], 1)  # [B, count T]
        for row, tokens in enumerate(seen):
            np.testing.assert_array_equal(np.sort(tokens), row * stretch + np.arange(count * length))


@quick
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), seeds, st.integers(0, 10**9))
def test_processes_side_by_side_hold_what_one_process_holds(processes, rows, length, seed, step):
    ids = numbered(200)
    whole = text.windows(ids, processes * rows, length, seed)(step)
    parts = [
        text.windows(ids, processes * rows, length, seed)(step, slice(p * rows, (p + 1) * rows))
        for p in range(processes)
    ]
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_a_window_depends_on_seed_and_step_alone():
    one, other = (text.windows(numbered(300), 4, 5, seeds=3) for _ in range(2))
    forwards = [one(step)["token"] for step in range(30)]
    backwards = [other(step)["token"] for step in reversed(range(30))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert not np.array_equal(one(0)["token"], text.windows(numbered(300), 4, 5, seeds=4)(0)["token"])
    starts = one(0)["token"][:, 0] % ((300 - 1) // 4)
    assert len(set(starts)) > 1  # a row's beginning is its own


def test_windows_by_hand():
    """Two rows of a text of 13: stretches 0..5 and 6..11, three windows of two each."""
    stream = text.windows(numbered(13), 2, 2, seeds=0)
    starts = stream(0)["token"][:, 0] - [0, 6]
    for step in range(7):
        window = (starts // 2 + step) % 3
        expected = np.array([[0, 1], [6, 7]]) + 2 * window[:, None]
        batch = stream(step)
        np.testing.assert_array_equal(batch["token"], expected)
        np.testing.assert_array_equal(batch["first"], (window == 0) | (step == 0))
    assert (batch["token"].dtype, batch["target"].dtype, batch["first"].dtype) == (np.int32, np.int32, bool)


def test_seeds_are_stacked_like_any_stream():
    ids = text.encode("to be, or not to be: that is the question")
    batch = text.windows(ids, 2, 4, (0, 1, 2))(5)
    assert {name: column.shape for name, column in batch.items()} == {
        "token": (3, 2, 4),
        "target": (3, 2, 4),
        "first": (3, 2),
    }


@quick
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 20), seeds, st.integers(0, 10**9))
def test_random_windows_lie_anywhere_and_depend_on_seed_and_step_alone(batch_size, length, spare, seed, step):
    ids = numbered(length + spare)
    batch = text.random_windows(ids, batch_size, length, seed)(step)
    assert batch["token"].shape == batch["target"].shape == (batch_size, length)
    assert (batch["token"].dtype, batch["target"].dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(batch["target"], batch["token"] + 1)
    np.testing.assert_array_equal(np.diff(batch["token"]), 1)  # contiguous
    assert batch["token"].min() >= 0
    assert batch["target"].max() < len(ids)
    again = text.random_windows(ids, batch_size, length, seed)
    parts = [again(step, slice(row, row + 1))["token"] for row in reversed(range(batch_size))][::-1]
    np.testing.assert_array_equal(np.concatenate(parts), batch["token"])


def test_random_windows_begin_at_every_place_equally_often():
    stream = text.random_windows(numbered(8), 100, 3, seeds=0)  # 5 places, of which the last window reaches the end
    starts = np.concatenate([stream(step)["token"][:, 0] for step in range(100)])
    counts = np.bincount(starts)
    assert len(counts) == 5
    assert (abs(counts - 2000) < 5 * np.sqrt(10_000 * 0.2 * 0.8)).all()


def test_each_seed_draws_its_own_random_windows():
    batch = text.random_windows(numbered(500), 4, 5, (0, 1))(3)
    assert batch["token"].shape == (2, 4, 5)
    for seed in (0, 1):
        alone = text.random_windows(numbered(500), 4, 5, seed)(3)
        np.testing.assert_array_equal(batch["token"][seed], alone["token"])
    assert not np.array_equal(*batch["token"])
    assert not np.array_equal(alone["token"], text.random_windows(numbered(500), 4, 5, 1)(4)["token"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((numbered(5), 2, 5, 0), "a text of 5 characters is too short for a window of 5, expected at least 6"),
        ((numbered(0), 2, 1, (0, 1)), "a text of 0 characters is too short"),
        ((numbered(9), 0, 5, 0), "batch size 0"),
        ((numbered(9), 2, 0, 0), "a window of 0 characters"),
        ((numbered(9), 2, 5, -1), "seed -1"),
    ],
)
def test_bad_random_windows_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        text.random_windows(*arguments)


@quick
@given(st.integers(2, 60), st.integers(1, 70))
def test_reading_predicts_every_character_but_the_first_once(n, length):
    windows = text.reading(numbered(n), length)
    counted = windows["mask"] == 1
    np.testing.assert_array_equal(windows["target"][counted], np.arange(1, n))
    np.testing.assert_array_equal(windows["token"][counted], np.arange(n - 1))
    assert windows["mask"].sum() == n - 1
    assert windows["token"].shape == windows["target"].shape == (-(-(n - 1) // length), 1, length)
    assert windows["first"].ravel().tolist() == [True] + [False] * (len(windows["token"]) - 1)
    assert windows["target"].max() < n  # padding is of the text, so that its loss is finite


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((numbered(0), 1, 1, 0), "a text of 0 characters is too short for 1 rows of 1, expected at least 2"),
        ((numbered(20), 4, 5, 0), "a text of 20 characters is too short for 4 rows of 5, expected at least 21"),
        ((numbered(50), 0, 5, 0), "batch size 0"),
        ((numbered(50), 4, 0, 0), "a window of 0 characters"),
        ((numbered(50), 4, -1, 0), "a window of -1 characters"),
        ((numbered(50), 4, 5, -1), "seed -1"),
    ],
)
def test_bad_windows_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        text.windows(*arguments)


def test_the_shortest_text_will_do():
    batch = text.windows(numbered(21), 4, 5, seeds=0)(17)
    np.testing.assert_array_equal(batch["token"], np.arange(20).reshape(4, 5))
    assert batch["first"].all()


@pytest.mark.parametrize(
    ("n", "length", "message"), [(0, 3, "0 characters, expected 2"), (1, 3, "1 char"), (5, 0, "0")]
)
def test_bad_readings_are_refused(n, length, message):
    with pytest.raises(InputError, match=message):
        text.reading(numbered(n), length)


def test_text_to_ids_and_back():
    assert text.encode("Ay, é").tolist() == [65, 121, 44, 32, 195, 169]
    assert text.decode(text.encode("Ay, é\n漢")) == "Ay, é\n漢"
    assert text.decode(np.array([65, 255, 66])) == "A\ufffdB"
    assert text.encode("é").max() < text.VOCABULARY


def test_the_standard_library_is_split_by_position():
    parts = {split: text.load(text.STANDARD_LIBRARY, split) for split in ("train", "validation", "test")}
    assert [len(ids) for ids in parts.values()] == [800_000, 100_000, 100_000]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    whole = b"".join(file.read_bytes() for file in files)[: text.SIZE]
    assert b"".join(bytes(ids) for ids in parts.values()) == whole
    for split, ids in parts.items():
        assert ids.dtype == np.uint8
        assert "def " in text.decode(ids), split


def test_a_short_standard_library_is_split_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "b.py").write_text("fghij")
    (tmp_path / "a.py").write_text("abcde")
    parts = [text.decode(text.load(text.STANDARD_LIBRARY, split)) for split in ("train", "validation", "test")]
    assert parts == ["abcdefgh", "i", "j"]


def test_an_unknown_split_of_the_standard_library_is_refused():
    with pytest.raises(InputError, match="no split 'valid', expected train, validation, test; did you mean validation"):
        text.load(text.STANDARD_LIBRARY, "valid")


def test_a_python_without_source_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="this Python has no source text in"):
        text.load(text.STANDARD_LIBRARY, "train")


def test_a_set_without_text_is_refused():
    with pytest.raises(InputError, match=r"digits has the columns .*image.*, expected bytes in column 'text'"):
        text.load("digits", "train")


@pytest.mark.data
def test_tiny_shakespeare(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("DL_JAX_CACHE_DIR", str(tmp_path))
    parts = [text.load("tiny_shakespeare", split) for split in ("train", "validation", "test")]
    assert [len(ids) for ids in parts] == [1_003_854, 55_770, 55_770]  # 90, 5 and 5 % of 1,115,394 characters
    assert text.decode(parts[0]).startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n")
    assert [len(set(ids.tolist())) for ids in parts] == [65, 60, 60]


@pytest.mark.parametrize("ids", [[65, 256], [-1, 65], [321]])
def test_ids_that_are_no_bytes_are_not_taken_modulo_256(ids):
    with pytest.raises(InputError, match=f"ids from {min(ids)} to {max(ids)}, expected bytes, 0 to 255"):
        text.decode(np.array(ids))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16])
def test_a_text_comes_back_from_ids_of_any_type(dtype):
    assert text.decode(text.encode("Zürich\0").astype(dtype)) == "Zürich\0"
    assert text.decode(np.array([], dtype)) == ""


def test_windows_of_bytes_are_those_of_wide_ids():
    ids = np.arange(100, dtype=np.uint8) + 150
    batch, wide = (text.windows(each, 3, 4, 0)(2) for each in (ids, ids.astype(np.int64)))
    for name in batch:
        np.testing.assert_array_equal(batch[name], wide[name])
    assert batch["token"].dtype == np.int32
