"""Augmentations of recordings: what they hide, how loud their noise is, and that padding stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import augment
from dl_jax.core.errors import InputError

KEY = jax.random.key(0)
LENGTH = np.array([30, 1, 17, 24] * 50, np.int32)
FRAMES = np.random.default_rng(0).normal(size=(200, 30, 12)).astype(np.float32)
BATCH = {"frames": FRAMES, "length": LENGTH, "label": np.arange(200)}
WAVE = np.random.default_rng(1).normal(size=(200, 600)).astype(np.float32) * np.logspace(-30, 0, 200)[:, None]
WAVES = {"wave": WAVE.astype(np.float32), "length": 20 * LENGTH}


def hidden(times, longest, bands, widest, most=1.0, key=KEY):
    """Which frames [B, T] and features [B, D] of FRAMES are hidden. Everything else has to be as it was."""
    new = jax.device_get(jax.jit(augment.spec_augment(times, longest, bands, widest, most))(key, BATCH))
    np.testing.assert_array_equal(new["label"], BATCH["label"])
    valid = np.arange(30) < LENGTH[:, None]
    np.testing.assert_array_equal(new["frames"][~valid], FRAMES[~valid])
    zero = (new["frames"] == 0) & valid[..., None]
    rows = zero.all(2)
    columns = (zero | ~valid[..., None]).all(1) & (~rows & valid).any(1)[:, None]
    np.testing.assert_array_equal(zero, (rows[..., None] | columns[:, None]) & valid[..., None])
    np.testing.assert_array_equal(new["frames"][~zero], FRAMES[~zero])
    return rows, columns


def test_one_stretch_and_one_band_are_whole_and_of_any_size_and_place():
    rows, columns = hidden(1, 6, 1, 3)
    for covered, most in ((rows, 6), (columns, 3)):
        counts = covered.sum(1)
        assert set(counts[LENGTH > 6]) == set(range(most + 1))  # each size is drawn
        edges = np.diff(np.pad(covered, ((0, 0), (1, 1))).astype(int), axis=1)
        assert ((edges == 1).sum(1) == (counts > 0)).all()  # in one piece
    for covered in (rows[LENGTH == 30], columns[LENGTH > 1]):
        assert covered.any(0).all()  # also the first and the last
    assert set(rows[LENGTH == 1][:, 0]) == {False, True}
    assert len({row.tobytes() for row in rows}) > 20  # each example has its own draw


def test_sizes_and_places_are_uniform():
    hide = jax.jit(augment.spec_augment(1, 3, 0, 0))
    drawn = [np.asarray(hide(jax.random.key(i), BATCH)["frames"]) == 0 for i in range(8)]
    counts = np.concatenate([each.all(2)[LENGTH == 30].sum(1) for each in drawn])
    share = np.bincount(counts, minlength=4) / len(counts)  # of 400 draws: a standard error of 0.022
    np.testing.assert_allclose(share, 0.25, atol=0.08)
    rows = np.concatenate([each.all(2)[LENGTH == 17] for each in drawn])
    middles = (rows * np.arange(30)).sum(1)[rows.any(1)] / rows.sum(1)[rows.any(1)]
    assert abs(middles.mean() - 8) < 1  # of some 300 draws: a standard error of 0.3


def test_a_stretch_covers_a_part_of_the_recording_at_most():
    rows, _ = hidden(1, 30, 0, 0, most=0.2)
    counts = rows.sum(1)
    assert [counts[n == LENGTH].max() for n in (30, 24, 17, 1)] == [6, 4, 3, 0]
    rows, _ = hidden(1, 30, 0, 0, most=0.7)
    assert rows.sum(1)[LENGTH == 30].max() == 21
    rows, columns = hidden(2, 30, 1, 3, most=0)
    assert not rows.any()
    assert columns.any()


def test_without_stretches_and_bands_nothing_changes():
    for sizes in ((0, 5, 0, 5), (2, 0, 2, 0)):
        rows, columns = hidden(*sizes)
        assert not rows.any()
        assert not columns.any()
    rows, columns = hidden(0, 0, 1, 99)  # as many as there are
    assert columns.sum(1).max() == 11  # what hides all of them counts as frames
    assert rows.any()


def test_noise_has_the_power_that_was_asked_for():
    for low, high in ((20, 20), (-3, 9)):
        new = jax.device_get(jax.jit(augment.white_noise((low, high)))(KEY, WAVES))
        ratios = []
        for old, wave, n in zip(WAVES["wave"], new["wave"], WAVES["length"], strict=True):
            np.testing.assert_array_equal(wave[n:], old[n:])
            added = wave[:n].astype(np.float64) - old[:n]
            ratios.append(10 * np.log10((old[:n].astype(np.float64) ** 2).mean() / (added**2).mean()))
        ratios = np.array(ratios)[LENGTH > 1]
        assert low - 2 < ratios.min() < low + 1
        assert high - 1 < ratios.max() < high + 2
        assert ratios.mean() == pytest.approx((low + high) / 2, abs=1)
        assert len(np.unique(ratios)) == len(ratios)


def test_silence_stays_silent_and_has_a_gradient():
    batch = {"wave": jnp.zeros((2, 9)).at[1, 3].set(0.5), "length": np.array([9, 4])}
    new = augment.white_noise((0, 10))(KEY, batch)["wave"]
    assert not new[0].any()
    assert (new[1, :4] != batch["wave"][1, :4]).all()
    assert not new[1, 4:].any()
    change = jax.grad(lambda wave: augment.white_noise((0, 10))(KEY, {**batch, "wave": wave})["wave"].sum())
    assert np.isfinite(change(batch["wave"])).all()


def test_what_is_not_finite_stays_in_its_row():
    wave = np.ones((2, 5), np.float32)
    wave[0, 2] = np.nan
    new = augment.white_noise((0, 0))(KEY, {"wave": wave, "length": np.array([4, 5])})["wave"]
    assert np.isnan(new[0, :4]).all()
    assert np.isfinite(new[0, 4:]).all()
    assert np.isfinite(new[1]).all()


@pytest.mark.parametrize("made", [augment.spec_augment(1, 5, 1, 3), augment.white_noise((0, 5))])
def test_draws_belong_to_key_and_example_and_seeds_are_independent(made):
    column = "frames" if "spec" in made.__qualname__ else "wave"
    batch = {column: (FRAMES if column == "frames" else FRAMES[..., 0])[:8], "length": LENGTH[:8]}
    one = jax.jit(made)
    np.testing.assert_array_equal(one(KEY, batch)[column], one(KEY, batch)[column])
    keys = jax.random.split(KEY, 2)
    both = jax.vmap(made, (0, None))(keys, batch)[column]
    for i in range(2):
        np.testing.assert_allclose(both[i], one(keys[i], batch)[column], rtol=1e-6, atol=1e-6)
    assert (both[0] != both[1]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.spec_augment(-1, 5, 1, 3), "times=-1: expected a number of .* of 0 or more"),
        (lambda: augment.spec_augment(1, 2.5, 1, 3), "longest=2.5"),
        (lambda: augment.spec_augment(1, 5, 1, 3, 1.5), r"\(0, most\)=\(0, 1.5\).*`most` in \[0, 1\]"),
        (lambda: augment.spec_augment(1, 5, 1, 3, np.nan), r"\(0, most\)="),
        (lambda: augment.white_noise((5, 0)), r"decibels=\(5, 0\)"),
        (lambda: augment.white_noise((0, np.inf)), r"decibels=\(0, inf\)"),
        (lambda: augment.white_noise((0, 1))(KEY, BATCH), "columns frames, length, label, expected wave and length"),
        (lambda: augment.spec_augment(1, 5, 1, 3)(KEY, {"frames": FRAMES}), "expected frames and length; rename them"),
        (lambda: augment.white_noise((0, 1))(KEY, {**WAVES, "wave": WAVES["wave"].astype(np.float16)}),
         r"wave \(200, 600\) of float16: this augmentation expects float32 \[B, N\]"),
        (lambda: augment.spec_augment(1, 5, 1, 3)(KEY, {**BATCH, "frames": FRAMES[..., 0]}),
         r"frames \(200, 30\) of float32: this augmentation expects float32 \[B, T, D\]"),
        (lambda: augment.spec_augment(1, 5, 1, 3)(KEY, {**BATCH, "length": LENGTH + 1}), "length 31, expected 1 to 30"),
        (lambda: augment.white_noise((0, 1))(KEY, {**WAVES, "length": LENGTH[:3]}), r"lengths are int32 \(3,\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
