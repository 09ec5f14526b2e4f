"""experiments/music/polyphonic.py: the likelihood of frames, their masks, and seeds as lanes."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run, Settings


@pytest.fixture(scope="module")
def polyphonic(load_experiment):
    return load_experiment("music/polyphonic")


NOTES = np.random.default_rng(0).integers(0, 2, (3, 5, 4)).astype(np.uint8)
BATCH = {"notes": NOTES, "length": np.array([5, 2, 4], np.int32), "mask": np.array([1, 1, 0], np.float32)}
WEIGHTS = np.random.default_rng(1).standard_normal((4, 4))


def linear(variables, frames, train, rngs=None):
    """The next frame's logits from this one alone."""
    return frames @ jnp.asarray(variables, jnp.float32)


def nll_of_row(row):
    """Frame by frame and key by key, in float64."""
    total = 0.0
    for t in range(BATCH["length"][row] - 1):
        p = 1 / (1 + np.exp(-(NOTES[row, t].astype(np.float64) @ WEIGHTS)))
        total -= np.log(np.where(NOTES[row, t + 1], p, 1 - p)).sum()
    return total


def test_the_test_loss_is_per_predicted_frame_and_summed_over_keys(polyphonic):
    total, count = polyphonic.examined(linear, WEIGHTS, BATCH, None)["nll"]
    assert count == 4 + 1  # the third row is padding of the batch
    np.testing.assert_allclose(total, nll_of_row(0) + nll_of_row(1), rtol=1e-5)


def test_the_train_loss_is_the_sum_over_a_sequence(polyphonic):
    value, (_, measured) = polyphonic.prediction_loss(linear, WEIGHTS, BATCH, None)
    total = sum(nll_of_row(row) for row in range(3))
    np.testing.assert_allclose(value, total / 3, rtol=1e-5)
    np.testing.assert_allclose(measured["nll"], total / (4 + 1 + 3), rtol=1e-5)


def test_a_lane_is_a_run_of_its_own(polyphonic):
    config = dataclasses.replace(polyphonic.PRESETS["smoke"], steps=6, watch_every=2)
    together = polyphonic.main(config, Run(settings=Settings(seeds=(3, 4))))
    alone = polyphonic.main(config, Run(settings=Settings(seeds=(4,))))
    for name, values in together.items():
        np.testing.assert_allclose(values[1], alone[name][0], rtol=1e-5)
        assert values[0] != values[1]


def test_the_test_loss_is_read_where_the_validation_loss_was_lowest(polyphonic):
    config = dataclasses.replace(polyphonic.PRESETS["smoke"], steps=8, watch_every=1, patience=8)
    run = Run(settings=Settings(seeds=(0, 1)))
    found = polyphonic.main(config, run)
    steps, valid = (run / "gru").history("valid_nll")
    _, test = (run / "gru").history("test_nll")
    np.testing.assert_array_equal(steps, np.arange(1, 9))
    for lane in range(2):
        assert found["test_nll/gru"][lane] == test[valid[:, lane].argmin(), lane]


def test_pictures_are_read_row_by_row(polyphonic):
    rolls = polyphonic.piano_rolls("digits", "test[:3]", None, None)
    assert rolls["notes"].shape == (3, 8, 8)
    assert set(np.unique(rolls["notes"])) == {0, 1}
    np.testing.assert_array_equal(rolls["length"], [8, 8, 8])


def test_another_kind_of_set_is_refused(polyphonic, monkeypatch):
    monkeypatch.setattr(polyphonic.data, "load", lambda *args: {"text": np.zeros(3)})
    with pytest.raises(InputError, match="news has the columns text, expected 'notes'"):
        polyphonic.piano_rolls("news", "train", None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tcn_taps": 0}, "taps is 0"), ({"clip": 0.0}, "clip is 0"), ({"layers": 0}, "layers is 0")],
)
def test_what_cannot_work_is_refused_before_any_training(polyphonic, change, message, monkeypatch):
    monkeypatch.setattr(polyphonic, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        polyphonic.main(dataclasses.replace(polyphonic.PRESETS["smoke"], **change), Run())


@pytest.mark.data
def test_chorales_are_padded_with_silence(polyphonic, tfds_dir):
    if not Path(tfds_dir, "jsb_chorales").is_dir():
        pytest.skip("TFDS_DATA_DIR holds no prepared jsb_chorales")
    rolls = polyphonic.piano_rolls("jsb_chorales", "test", tfds_dir, None)
    assert rolls["notes"].shape == (77, 160, 88)
    assert set(np.unique(rolls["notes"])) == {0, 1}
    after = np.arange(160) >= rolls["length"][:, None]
    assert not rolls["notes"][after].any()
    assert rolls["notes"][~after].any(-1).mean() > 0.99
