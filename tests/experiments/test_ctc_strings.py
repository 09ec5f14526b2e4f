"""experiments/audio/ctc.py: strings of recordings and their letters, the loss, and what is written down."""

import contextlib
import dataclasses
import itertools
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from scipy.io import wavfile
from scipy.signal import resample_poly

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.core.ragged import ragged
from dl_jax.decode.ctc import lexicon
from dl_jax.harness.run import Run, Settings
from dl_jax.losses import ctc as loss

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


@pytest.fixture(scope="module")
def ctc(load_experiment):
    return load_experiment("audio/ctc")


class Fixed:
    """A network whose logits are its variables."""

    def apply(self, variables, frames, lengths, train, rngs=None, mutable=()):
        return (variables, {"batch_stats": {}}) if mutable else variables


def test_digits_are_spelt_and_read_again(ctc):
    letters = ragged([ctc.spelt([7, 0]), ctc.spelt([3])])
    assert ctc.sentences(np.asarray(letters), letters.lengths) == [["seven", "zero"], ["three"]]
    assert ctc.LETTERS[0] == ""
    assert not (letters.values == 0).any()


def test_a_string_has_the_frames_of_its_recordings_and_their_letters(ctc):
    cfg = dataclasses.replace(ctc.PRESETS["smoke"], digits=3)
    made = ctc.strings(cfg, "test", 5, 0)
    np.testing.assert_array_equal(made["length"], made["frames"].lengths)
    assert made["frames"].shape[2] == 40
    words = ctc.sentences(made["letters"], made["letters/length"])
    assert all(1 <= len(sentence) <= 3 and {*sentence} <= {*ctc.WORDS} for sentence in words)
    again = ctc.strings(cfg, "test", 5, 0)
    np.testing.assert_array_equal(made["frames"].values, again["frames"].values)


def test_the_loss_is_the_mean_over_strings(ctc):
    logits = jax.random.normal(jax.random.key(0), (2, 9, len(ctc.LETTERS)))
    letters = ragged([ctc.spelt([1]), ctc.spelt([6])])
    batch = {"frames": None, "length": np.array([9, 5]), "letters": np.asarray(letters),
             "letters/length": letters.lengths}  # fmt: skip
    value, (new, metrics) = ctc.writing_loss(Fixed(), logits, batch, jax.random.key(0))
    each = loss.negative_log_likelihood(logits, batch["length"], batch["letters"], batch["letters/length"])
    np.testing.assert_allclose(value, np.mean(each), rtol=1e-6)
    assert (new, metrics) == ({"batch_stats": {}}, {})


def test_the_lexicon_mends_a_letter(ctc):
    """The most probable path has a wrong letter, "fovr "; of the ten words the best is the right one."""
    path = [*"fovr "]
    logits = np.full((1, len(path), len(ctc.LETTERS)), -4.0, np.float32)
    for t, letter in enumerate(path):
        logits[0, t, ctc.LETTERS.index(letter)] = 4.0
    logits[0, 2, ctc.LETTERS.index("u")] = 3.0
    words = lexicon([ctc.spelt([number]).tolist() for number in range(10)], len(ctc.LETTERS))
    found = ctc.written(Fixed(), words, 8, jnp.asarray(logits), {"frames": None, "length": np.array([len(path)])})
    read = {way: ctc.sentences(*map(np.asarray, answer)) for way, answer in found.items()}
    assert read == {"greedy": [["fovr"]], "lexicon": [["four"]]}


@pytest.fixture(scope="module")
def trained(ctc, tmp_path_factory):
    """A folder in which the smoke preset has run with two seeds; what it learned, what it tested, and its variables."""
    folder, kept = tmp_path_factory.mktemp("guide"), {}
    cfg = dataclasses.replace(ctc.PRESETS["smoke"], hidden=ctc.Config().hidden)

    def spied(name, of):
        def spy(*args, **settings):
            kept[name] = of(*args, **settings)
            return kept[name]

        return spy

    def taken(name, of):
        def spy(records, *args):
            kept[name] = records
            return of(records, *args)

        return spy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctc, "fit", spied("states", ctc.fit))
        patch.setattr(ctc.data, "bucketed", taken("train", ctc.data.bucketed))
        patch.setattr(ctc.data, "buckets", taken("test", ctc.data.buckets))
        with contextlib.closing(Run(epath.Path(folder / "runs/ctc"), Settings(seeds=(0, 1)))) as run:
            ctc.main(cfg, run)
    return folder, cfg, kept


def test_frames_are_standardised_by_what_is_learned(ctc, trained):
    _, cfg, kept = trained
    frames = kept["train"]["frames"].values.astype(np.float64)
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(frames.std(0), 1, atol=1e-4)
    learned = ctc.strings(cfg, cfg.train_split, cfg.train_strings, 0)["frames"].values
    tested = ctc.strings(cfg, cfg.test_split, cfg.test_strings, 1)["frames"].values
    expected = (tested - learned.mean(0, np.float64)) / learned.std(0, np.float64)
    np.testing.assert_allclose(kept["test"]["frames"].values, expected, atol=1e-3)


def test_the_guides_program_transcribes_a_wav_file(ctc, trained, monkeypatch, capsys):
    """It writes down what the experiment's first network does, of a recording at twice the rate."""
    folder, cfg, kept = trained
    wave = resample_poly(data.load("tones", "test[:1]")["audio"][0] / 32768, 2, 1)  # int16 [n] -> float [2 n]
    wavfile.write(folder / "digits.wav", 2 * cfg.rate, np.round(wave * 32000).astype(np.int16))
    (program,) = [each for each in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if "digits.wav" in each]
    (folder / "program.py").write_text(program)
    monkeypatch.chdir(folder)
    found = runpy.run_path("program.py")

    learned = ctc.strings(cfg, cfg.train_split, cfg.train_strings, 0)["frames"].values
    heard = ragged([resample_poly(np.round(wave * 32000) / 32768, 1, 2)])
    frames = (ctc.audio.log_mel(heard, cfg.rate).values - learned.mean(0)) / learned.std(0)
    variables = jax.tree.map(lambda leaf: np.asarray(leaf[0]), kept["states"].variables)
    model = ctc.TDNN(len(ctc.LETTERS), cfg.hidden)
    logits = np.asarray(jax.jit(lambda: model.apply(variables, frames[None], train=False))())
    np.testing.assert_allclose(found["logits"], logits, atol=1e-2)
    classes = [k for k, _ in itertools.groupby(logits[0].argmax(-1)) if k != 0]
    assert len(set(classes)) > 1
    assert capsys.readouterr().out.splitlines()[-1] == "".join(ctc.LETTERS[k] for k in classes)


def test_a_recording_that_is_too_short_for_its_letters_is_refused(ctc, monkeypatch):
    wave = ragged([np.ones(280, np.float32)])  # 2 frames
    one = {"audio": wave, "label": np.array([3]), "speaker": np.array([0])}
    monkeypatch.setattr(ctc.audio, "recordings", lambda *args: one)
    with pytest.raises(InputError, match=r"^string 0 of tones test has 2 frames, expected 7 or more for its letters; "):
        ctc.strings(dataclasses.replace(ctc.PRESETS["smoke"], digits=1), "test", 1, 0)


def test_another_kind_of_label_is_refused(ctc, monkeypatch):
    one = {"audio": ragged([np.ones(800, np.float32)]), "label": np.array([10]), "speaker": np.array([0])}
    monkeypatch.setattr(ctc.audio, "recordings", lambda *args: one)
    with pytest.raises(InputError, match=r"^tones has labels from 10 to 10, expected the digits 0 to 9; "):
        ctc.strings(ctc.PRESETS["smoke"], "test", 1, 0)


def test_a_silent_recording_is_refused(ctc, monkeypatch):
    waves = ragged([np.ones(900, np.float32), np.zeros(900, np.float32)])
    two = {"audio": waves, "label": np.array([3, 4]), "speaker": np.array([0, 1])}
    monkeypatch.setattr(ctc.audio, "recordings", lambda *args: two)
    with pytest.raises(InputError, match=r"^wave 1 is silent, 900 samples of 0, expected a level .*; leave it out$"):
        ctc.strings(ctc.PRESETS["smoke"], "test", 1, 0)


def test_labels_that_are_words_are_refused(ctc, monkeypatch):
    one = {"audio": ragged([np.ones(800, np.float32)]), "label": np.array([b"three"]), "speaker": np.array([0])}
    monkeypatch.setattr(ctc.audio, "recordings", lambda *args: one)
    with pytest.raises(InputError, match=r"^labels of .*S5, expected whole numbers; number them"):
        ctc.strings(ctc.PRESETS["smoke"], "test", 1, 0)
