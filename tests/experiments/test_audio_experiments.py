"""experiments/audio/digits.py and scene.py: who is learned from, what is drawn, and what is refused."""

import dataclasses

import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.core.ragged import ragged
from dl_jax.harness.run import Run, Settings

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits(load_experiment):
    return load_experiment("audio/digits")


@pytest.fixture(scope="module")
def scene(load_experiment):
    return load_experiment("audio/scene")


def test_no_speaker_is_tested_that_was_learned_from(digits, monkeypatch):
    cfg = dataclasses.replace(digits.PRESETS["speakers"], dataset="tones", test_split="test[:60]")
    seen = []

    def accuracies(cfg, train, test, run):
        seen.append((set(train["speaker"]), set(test["speaker"]), len(train["label"])))
        assert len(train["audio"]) == len(train["label"])
        return {"log_mel": np.array([10.0, 20.0]) * len(seen)}

    monkeypatch.setattr(digits, "accuracies", accuracies)
    found = digits.main(cfg, Run(settings=Settings(seeds=(0, 1))))
    everyone = set(range(6))
    assert seen == [(everyone - {speaker}, {speaker}, 500) for speaker in range(6)]
    np.testing.assert_allclose(found["unheard/log_mel"], [35, 70])


def test_recordings_that_were_heard_wrong_are_shown_first(digits, monkeypatch):
    cfg = dataclasses.replace(digits.PRESETS["smoke"], shown=3)
    test = {"audio": ragged([RNG.normal(size=300 + 80 * i) for i in range(5)]), "label": np.array([3, 1, 4, 1, 5])}
    titles = [axes.get_title() for axes in digits.figure(cfg, test, np.array([3, 7, 4, 0, 5])).axes]
    assert titles == ["said 1, heard 7", "said 1, heard 0", "said 3, heard 3"]


@pytest.mark.parametrize("name", ["digits", "scene"])
@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(900), r"^wave 1 is silent, 900 samples of 0, expected a level "),
        (np.full(900, np.nan), r"^wave 1 has the value nan at sample 0, expected finite ones; "),
        (np.ones(150), r"^wave 1 has 1\d\d samples, expected \d+ or more, those of a frame of "),
    ],
)
def test_recordings_that_cannot_be_heard_are_refused(request, monkeypatch, name, wave, message):
    experiment = request.getfixturevalue(name)
    records = {
        "audio": ragged([np.ones(900, np.float32), wave.astype(np.float32)]),
        "label": np.array([0, 1]),
        "speaker": np.array([0, 1]),
    }
    monkeypatch.setattr(experiment.audio, "recordings", lambda *args: records)
    with pytest.raises(InputError, match=message) as error:
        experiment.main(experiment.PRESETS["smoke"], Run(settings=Settings(seeds=(0,))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["digits", "scene"])
def test_recordings_of_another_rate_are_refused(request, name):
    experiment = request.getfixturevalue(name)
    cfg = dataclasses.replace(experiment.PRESETS["smoke"], rate=16000)
    with pytest.raises(InputError, match=r"^the audio of data set tones is at 8000 Hz, expected 16000 Hz; "):
        experiment.main(cfg, Run(settings=Settings(seeds=(0,))))
