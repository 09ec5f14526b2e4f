"""experiments/audio/digits.py and scene.py: what is learned and from whom, what is drawn, and what is refused."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.core.ragged import ragged
from dl_jax.harness.fields import check
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

    def accuracies(cfg, ways, train, test, run):
        seen.append((set(train["speaker"]), set(test["speaker"]), len(train["label"])))
        assert len(train["audio"]) == len(train["label"])
        return {"log_mel": np.array([10.0, 20.0]) * len(seen)}

    monkeypatch.setattr(digits, "accuracies", accuracies)
    found = digits.main(cfg, Run(settings=Settings(seeds=(0, 1))))
    everyone = set(range(6))
    assert seen == [(everyone - {speaker}, {speaker}, 500) for speaker in range(6)]
    np.testing.assert_allclose(found["unheard/log_mel"], [35, 70])


RECORDINGS = {
    "audio": ragged([RNG.uniform(-0.3, 0.3, n).astype(np.float32) for n in (2000, 2500, 3000)]),
    "label": np.array([0, 0, 1]),
    "speaker": np.array([0, 0, 0]),
}


def untrained(experiment, monkeypatch, heard=None):
    """The experiment learns nothing, but keeps what it would have learned with, and answers `heard`, [S, N]."""
    kept = types.SimpleNamespace()
    monkeypatch.setattr(experiment.audio, "recordings", lambda *args: RECORDINGS)
    monkeypatch.setattr(experiment.hear, "loss", lambda apply, column: lambda variables, batch, key: batch[column])
    monkeypatch.setattr(experiment.hear, "linear_accuracy", lambda *args: 50.0)
    monkeypatch.setattr(experiment.hear, "answers", lambda *args: lambda variables: heard)
    monkeypatch.setattr(experiment, "start", lambda *args: None)
    monkeypatch.setattr(experiment, "make_step", lambda loss, tx: loss)
    monkeypatch.setattr(experiment, "per_seed", lambda loss, one_by_one: loss)

    def fit(loss, state, stream, **settings):
        kept.loss = loss
        return types.SimpleNamespace(variables=None)

    def take(name):
        return lambda records, *args: setattr(kept, "records", records)

    monkeypatch.setattr(experiment, "fit", fit)
    for name in ("bucketed", "shuffled"):
        monkeypatch.setattr(experiment.data, name, take(name))
    return kept


@pytest.mark.parametrize("name", ["digits", "scene"])
def test_waveforms_are_learned_with_noise(request, monkeypatch, name):
    experiment = request.getfixturevalue(name)
    cfg = dataclasses.replace(experiment.PRESETS["quick"], noise=(10.0, 20.0))
    kept = untrained(experiment, monkeypatch, heard=np.zeros((1, 3), int))
    if name == "digits":
        cfg = dataclasses.replace(cfg, networks=("waveform",))
    experiment.main(cfg, Run(settings=Settings(seeds=(0,))))
    wave = np.sin(np.arange(4000, dtype=np.float32))[None].repeat(3, 0)
    seen = kept.loss(None, {"wave": wave, "length": np.array([4000, 4000, 4000])}, jax.random.key(0))
    decibels = 10 * np.log10((wave**2).mean(1) / ((seen - wave) ** 2).mean(1))
    assert (decibels > 9.5).all()
    assert (decibels < 20.5).all()


def test_digits_are_learned_at_each_speed(digits, monkeypatch):
    kept = untrained(digits, monkeypatch, heard=np.zeros((1, 3), int))
    cfg = dataclasses.replace(digits.Config(), dataset="tones", networks=("waveform",), speeds=(0.5, 1.0))
    digits.main(cfg, Run(settings=Settings(seeds=(0,))))
    assert kept.records["length"].tolist() == [4000, 5000, 6000, 2000, 2500, 3000]
    assert kept.records["label"].tolist() == [0, 0, 1, 0, 0, 1]


class Drawing(Run):
    """A run without a folder that draws nevertheless."""

    def figure(self, name, step, draw):
        draw()


def test_the_confusion_of_scenes_has_a_row_for_each_true_class(scene, monkeypatch):
    """Of two seeds, both hear the second recording, of class 0, as class 2."""
    untrained(scene, monkeypatch, heard=np.array([[0, 2, 1], [0, 2, 0]]))
    drawn = []
    monkeypatch.setattr(scene, "confusion_figure", lambda counts, names: drawn.append(counts))
    found = scene.main(scene.PRESETS["quick"], Drawing(settings=Settings(seeds=(0, 1))))
    expected = np.zeros((10, 10), int)
    expected[0, 0], expected[0, 2], expected[1, 1], expected[1, 0] = 2, 2, 1, 1
    np.testing.assert_array_equal(drawn[0], expected)
    np.testing.assert_allclose(found["accuracy/waveform"], [200 / 3, 100 / 3])


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
        (np.full(900, np.nan), r"^wave 1 has the value nan at sample 0, expected finite ones in float32; "),
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


def test_an_only_speaker_cannot_be_held_out(digits, monkeypatch):
    monkeypatch.setattr(digits.audio, "recordings", lambda *args: RECORDINGS)
    cfg = dataclasses.replace(digits.PRESETS["speakers"], dataset="tones")
    with pytest.raises(InputError, match=r"^0 recordings of 0 classes to learn from and 3 to test on, .*more sp"):
        digits.main(cfg, Run(settings=Settings(seeds=(0,))))


@pytest.mark.parametrize("name", ["digits", "scene"])
def test_noise_from_a_higher_to_a_lower_level_is_refused_before_anything_is_read(request, monkeypatch, name):
    experiment = request.getfixturevalue(name)
    monkeypatch.setattr(experiment.audio, "recordings", lambda *args: pytest.fail("recordings were read"))
    cfg = dataclasses.replace(experiment.PRESETS["smoke"], noise=(40.0, 10.0))
    with pytest.raises(InputError, match=r"^decibels=\(40.0, 10.0\): expected an interval \(low, high\) with low <= "):
        experiment.main(cfg, Run(settings=Settings(seeds=(0,))))


@pytest.mark.parametrize(
    "change",
    [{"speeds": (1.0, 0.001)}, {"speeds": (np.inf,)}, {"seconds": (0.001,)}, {"seconds": (np.inf,)},
     {"noise": (0.0, np.inf)}],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_by_their_flag(digits, change):
    (name,) = change
    with pytest.raises(InputError, match=f"^--{name} is .*, expected at least .* and at most ") as error:
        check(dataclasses.replace(digits.PRESETS["smoke"], **change))
    assert "\n" not in str(error.value)
