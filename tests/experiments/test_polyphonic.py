"""experiments/music/polyphonic.py: the likelihood of frames, their masks, and where the test loss is read."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import evaluator
from dl_jax.core.ragged import ragged
from dl_jax.harness.checkpoint import store
from dl_jax.harness.run import Run, Settings

NOTES = np.random.default_rng(0).integers(0, 2, (3, 5, 4)).astype(np.uint8)
BATCH = {"notes": NOTES, "length": np.array([5, 2, 4], np.int32)}
WEIGHTS = np.random.default_rng(1).standard_normal((4, 4))
SEEDS = (3, 4)


@pytest.fixture(scope="module")
def polyphonic(load_experiment):
    return load_experiment("music/polyphonic")


@pytest.fixture(scope="module")
def run_seeds(polyphonic):
    """seeds -> (what the experiment measured, its run): a recurrent network and the TCN, watched at every step."""
    smoke = polyphonic.PRESETS["smoke"]
    config = dataclasses.replace(smoke, steps=6, watch_every=1, patience=6, rnn_learning_rate=0.3, nets=("rnn", "tcn"))

    def main(*seeds, directory=None, **fields):
        run = Run(directory, Settings(seeds=seeds))
        return polyphonic.main(dataclasses.replace(config, **fields), run), run

    return main


@pytest.fixture(scope="module")
def together(run_seeds, tmp_path_factory):
    found, run = run_seeds(*SEEDS, directory=epath.Path(tmp_path_factory.mktemp("run")))
    run.close()
    return found, run


def linear(variables, frames, train, rngs=None):
    """A network whose logits of the next frame depend only on the current frame."""
    return frames @ jnp.asarray(variables, jnp.float32)


def nll_of_row(row):
    """The reference: the likelihood frame by frame and key by key, in float64."""
    total = 0.0
    for t in range(BATCH["length"][row] - 1):
        p = 1 / (1 + np.exp(-(NOTES[row, t].astype(np.float64) @ WEIGHTS)))
        total -= np.log(np.where(NOTES[row, t + 1], p, 1 - p)).sum()
    return total


def test_the_test_loss_is_per_predicted_frame_and_summed_over_keys(polyphonic):
    batch = {**BATCH, "mask": np.array([1, 1, 0], np.float32)}  # the third row is padding of the batch
    total, count = polyphonic.prediction_nll(linear, WEIGHTS, batch, None)["nll"]
    assert count == 4 + 1
    np.testing.assert_allclose(total, nll_of_row(0) + nll_of_row(1), rtol=1e-5)


def test_the_train_loss_is_the_sum_over_a_sequence(polyphonic):
    value, (_, measured) = polyphonic.prediction_loss(linear, WEIGHTS, BATCH, None)
    total = sum(nll_of_row(row) for row in range(3))
    np.testing.assert_allclose(value, total / 3, rtol=1e-5)
    np.testing.assert_allclose(measured["nll"], total / (4 + 1 + 3), rtol=1e-5)


def test_forget_gates_start_with_their_bias_in_every_layer(polyphonic):
    nets = polyphonic.networks(dataclasses.replace(polyphonic.Config(), lstm_hidden=3, forget_bias=7.0), 5)
    variables = jax.jit(lambda: nets["lstm"].init(jax.random.key(0), jnp.zeros((1, 2, 5)), train=False))()
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    biases = [leaf for path, leaf in leaves if jax.tree_util.keystr(path).endswith("['input']['bias']")]
    assert [(np.asarray(bias)[3:6] == 7).all() for bias in biases] == [True, True]


def test_what_a_seed_gives_does_not_depend_on_those_beside_it(run_seeds, together):
    others, _ = run_seeds(SEEDS[1], 5)
    for name, values in together[0].items():
        np.testing.assert_allclose(values[1], others[name][0], rtol=1e-5)
        assert values[0] != values[1]


def test_the_test_loss_is_read_where_the_validation_loss_was_lowest(together):
    found, run = together
    for name in ("rnn", "tcn"):
        steps, valid = (run / name).history("watch/valid_nll")
        _, test = (run / name).history("watch/test_nll")
        np.testing.assert_array_equal(steps, np.arange(1, 7))
        for i in range(len(SEEDS)):
            assert found[f"test_nll/{name}"][i] == test[valid[:, i].argmin(), i]


def test_the_best_variables_of_the_first_seed_are_drawn_also_when_nothing_is_left_to_train(
    polyphonic, run_seeds, together, monkeypatch
):
    run = together[1]
    drawn, draw, folder = [], polyphonic.rolls_figure, run.directory / "rnn"
    monkeypatch.setattr(polyphonic, "rolls_figure", lambda rolls: (drawn.append(rolls), draw(rolls))[1])
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "rolls.png").unlink()
    found, again = run_seeds(*SEEDS, directory=run.directory, nets=("rnn",))
    again.close()
    assert (folder / "metrics.jsonl").read_text() == lines  # nothing was trained
    assert (folder / "rolls.png").exists()
    np.testing.assert_array_equal(found["test_nll/rnn"], together[0]["test_nll/rnn"])

    steps, valid = (run / "rnn").history("watch/valid_nll")
    best = steps[valid[:, 0].argmin()]
    assert best < steps[-1]
    saved = store.load(str(folder / "checkpoints"), int(best))[1]["state"]
    params = jax.tree.map(lambda leaf: leaf[0], saved["params"])
    piece = polyphonic.piano_rolls("digits", "test[:1]")["notes"][0]
    net = polyphonic.networks(polyphonic.PRESETS["smoke"], 8)["rnn"]
    logits = net.apply({"params": params}, piece[None, :-1].astype(np.float32), train=False)
    (rolls,) = drawn
    np.testing.assert_array_equal(rolls["notes"], piece)
    assert np.isnan(rolls["probability"][0]).all()
    np.testing.assert_allclose(rolls["probability"][1:], 1 / (1 + np.exp(-np.asarray(logits[0]))), rtol=1e-4)


def test_buckets_change_no_loss(polyphonic):
    """A piece weighs what it weighs in a batch that is padded to the longest."""
    pieces = {"notes": ragged([NOTES[i, :n] for i, n in enumerate(BATCH["length"])]), "length": BATCH["length"]}
    measure, keys = functools.partial(polyphonic.prediction_nll, linear), jax.random.split(jax.random.key(0), 1)
    losses = [
        evaluator(measure, data.buckets(pieces, "length", widths), 2, keys)(WEIGHTS[None])["nll"]
        for widths in ((5,), (2, 4, 5))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_networks_are_chosen_by_name(polyphonic):
    cfg = dataclasses.replace(polyphonic.PRESETS["smoke"], nets=("rnn",), boundaries=(4,))
    assert polyphonic.main(cfg, Run(settings=Settings(seeds=(0,)))).keys() == {"test_nll/rnn"}


def test_images_are_read_row_by_row(polyphonic):
    rolls = polyphonic.piano_rolls("digits", "test[:3]")
    assert rolls["notes"].shape == (3, 8, 8)
    assert set(np.unique(rolls["notes"])) == {0, 1}
    np.testing.assert_array_equal(rolls["length"], [8, 8, 8])


def test_another_kind_of_set_is_refused(polyphonic, monkeypatch):
    monkeypatch.setattr(polyphonic.data, "load", lambda *args: {"text": np.zeros(3)})
    with pytest.raises(InputError, match="news has the columns text, expected 'notes'"):
        polyphonic.piano_rolls("news", "train")


@pytest.mark.data
def test_chorales_are_padded_with_silence(polyphonic, tfds_dir):
    if not Path(tfds_dir, "jsb_chorales").is_dir():
        pytest.skip("TFDS_DATA_DIR holds no prepared jsb_chorales")
    rolls = {name: np.asarray(column) for name, column in polyphonic.piano_rolls("jsb_chorales", "test").items()}
    assert rolls["notes"].shape == (77, 160, 88)
    assert set(np.unique(rolls["notes"])) == {0, 1}
    after = np.arange(160) >= rolls["length"][:, None]
    assert not rolls["notes"][after].any()
    assert rolls["notes"][~after].any(-1).mean() > 0.99


@pytest.mark.parametrize(
    ("notes", "length", "message"),
    [
        (np.zeros((2, 3, 89), np.uint8), [3, 3], r"has notes of shape \(2, 3, 89\), expected .* 88 keys"),
        (np.full((2, 3, 88), 60, np.uint8), [3, 3], r"has notes of shape \(2, 3, 88\) with 60, expected 0 and 1"),
        (np.full((2, 3, 88), 0.5), [3, 3], r"has notes of shape \(2, 3, 88\) with 0.5, expected 0 and 1"),
        (np.full((2, 3, 88), np.nan), [3, 3], r"has notes of shape \(2, 3, 88\) with nan, expected 0 and 1"),
        (ragged([-np.eye(88, dtype=np.int8)]), [88], r"has notes of shape \(1, 88, 88\) with -1, expected 0 and 1"),
        (np.zeros((2, 3), np.uint8), [3, 3], r"has notes of shape \(2, 3\)"),
        (np.zeros((2, 3, 88), np.uint8), [3, 1], "piece 1 of music train has length 1, expected two frames or more"),
        (np.zeros((2, 0, 88), np.uint8), None, "piece 0 of music train has length 0, expected two frames or more"),
    ],
)
def test_notes_outside_the_keyboard_and_pieces_without_a_frame_to_predict_are_refused(
    polyphonic, monkeypatch, notes, length, message
):
    records = {"notes": notes} | ({} if length is None else {"notes/length": np.array(length)})
    monkeypatch.setattr(polyphonic.data, "load", lambda *args: records)
    with pytest.raises(InputError, match=message) as error:
        polyphonic.piano_rolls("music", "train")
    assert "\n" not in str(error.value)
