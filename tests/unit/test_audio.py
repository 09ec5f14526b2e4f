"""Audio as columns against plain references in float64, and what is refused."""

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.core.ragged import joined, ragged
from dl_jax.data import audio, describe, tones

RNG = np.random.default_rng(0)
WAVES = ragged([RNG.integers(-30_000, 30_000, n).astype(np.int16) for n in (530, 200, 211)])


def reference(wave, rate, bins, size, hop):
    """Log-mel energies of one wave [n], by the definitions, one frame and one frequency at a time."""
    transform = 2 ** int(np.ceil(np.log2(size)))
    window = np.sin(np.pi * np.arange(size) / size) ** 2
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    hertz = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, mel(rate / 2), bins + 2)]
    rows = []
    for start in range(0, len(wave) - size + 1, hop):
        x = np.zeros(transform)
        x[:size] = wave[start : start + size] * window
        row = []
        for low, middle, high in zip(hertz, hertz[1:], hertz[2:], strict=False):
            total = 0.0
            for k in range(transform // 2 + 1):
                f = k * rate / transform
                height = (f - low) / (middle - low) if f <= middle else (high - f) / (high - middle)
                if height > 0:
                    total += height * abs((x * np.exp(-2j * np.pi * k * np.arange(transform) / transform)).sum()) ** 2
            row.append(np.log(total + 1e-6))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("kind", [np.int16, np.float64])
def test_log_mel_energies_against_the_definition(kind):
    waves = WAVES if kind is np.int16 else WAVES.of(WAVES.values / 32768)
    found = audio.log_mel(waves, 8000, bins=12)
    assert found.lengths.tolist() == [5, 1, 1]  # (530 - 200) // 80 + 1
    assert found.dtype == np.float32
    for i, length in enumerate(WAVES.lengths):
        expected = reference(WAVES[i][:length] / 32768, 8000, 12, 200, 80)
        np.testing.assert_allclose(found[i][: found.lengths[i]], expected, rtol=0, atol=1e-4)


def test_log_mel_energies_of_many_frames_are_computed_in_parts(monkeypatch):
    whole = audio.log_mel(WAVES, 8000)
    monkeypatch.setattr(audio, "_AT_ONCE", 3)
    np.testing.assert_allclose(audio.log_mel(WAVES, 8000).values, whole.values, atol=1e-5)


def test_log_mel_energies_of_another_rate_and_frame():
    wave = RNG.uniform(-1, 1, 900)
    found = audio.log_mel(ragged([wave]), 11025, bins=7, seconds=0.02, hop=0.005)
    np.testing.assert_allclose(found.values, reference(wave, 11025, 7, 220, 55), atol=1e-4)


def test_a_tone_is_loudest_in_its_own_bin():
    for bin, frequency in enumerate(
        700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 12) / 2595) - 1)[1:-1]
    ):
        wave = np.sin(2 * np.pi * frequency * np.arange(400) / 8000)
        assert (audio.log_mel(ragged([wave]), 8000, bins=10).values.argmax(1) == bin).all()


def test_silence_is_finite_and_standardises_to_zeros():
    silence = ragged([np.zeros(400, np.int16), np.zeros(200, np.int16)])
    frames = audio.log_mel(silence, 8000)
    np.testing.assert_allclose(frames.values, np.log(1e-6), rtol=1e-5)
    assert not abs(audio.standardised(frames, *audio.moments(frames)).values).max() > 1e-4


def test_moments_are_of_frames_and_not_of_padding():
    features = ragged([RNG.normal(3, 2, (n, 4)) for n in (1, 7, 30)])
    mean, std = audio.moments(features)
    np.testing.assert_allclose(mean, features.values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, features.values.std(0), rtol=1e-5)
    new = audio.standardised(features, mean, std)
    np.testing.assert_allclose(new.values.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(new.values.std(0), 1, atol=1e-6)
    assert not new[0][1:].any()
    with pytest.raises(InputError, match="no frames, expected those of one recording"):
        audio.moments(joined(np.zeros((0, 4)), [0]))


def test_levels():
    waves = WAVES.of(WAVES.values * np.repeat([1.0, 1e-12, 1e-3], WAVES.lengths) * 1e-5)
    found = audio.levelled(waves)
    assert found.dtype == np.float32
    for i, n in enumerate(found.lengths):
        np.testing.assert_allclose((found[i][:n].astype(float) ** 2).mean(), 1, rtol=1e-5)
        np.testing.assert_allclose(found[i], audio.levelled(WAVES)[i], rtol=1e-5)


def test_resampling_keeps_a_tone_and_removes_what_would_alias():
    t = np.arange(4410) / 44100
    low, high = np.sin(2 * np.pi * 500 * t), np.sin(2 * np.pi * 7500 * t)  # 7500 Hz would be 500 Hz at 8 kHz
    found = audio.resample(ragged([low, high, low[:1]]), 44100, 8000)
    assert found.lengths.tolist() == [800, 800, 1]
    inner = slice(50, -50)  # without the ends, before and after which the filter sees zeros
    np.testing.assert_allclose(found[0][inner], np.sin(2 * np.pi * 500 * np.arange(800) / 8000)[inner], atol=0.01)
    assert abs(found[1][inner]).max() < 0.01
    np.testing.assert_array_equal(audio.resample(WAVES, 8000, 8000).values, WAVES.values / np.float32(32768))


def test_sections_are_means_of_equal_parts():
    features = ragged([RNG.normal(size=(n, 2)) for n in (6, 1, 3, 8)])
    found = audio.sections(features, 3)
    np.testing.assert_allclose(found[0], features[0][:6].reshape(3, 2, 2).mean(1), rtol=1e-5)
    np.testing.assert_allclose(found[1], np.repeat(features[1][:1], 3, 0), rtol=1e-5)
    np.testing.assert_allclose(found[2], features[2][:3], rtol=1e-5)
    np.testing.assert_allclose(found[3], [features[3][a:b].mean(0) for a, b in ((0, 2), (2, 5), (5, 8))], rtol=1e-5)
    with pytest.raises(InputError, match="recording 0 has no frames"):
        audio.sections(joined(np.zeros((0, 2)), [0]), 3)


def test_strings_are_recordings_of_one_speaker_after_each_other():
    n, speaker, label = 9, np.arange(9) % 3, np.arange(9)
    wave = ragged([np.full(5 + i, 10 * i, np.int16) for i in range(n)])
    found = audio.strings(wave, label, speaker, 40, 4, seed=1)
    assert set(found["transcript"].lengths) == {1, 2, 3, 4}
    assert set(found["speaker"]) == {0, 1, 2}
    for i in range(40):
        labels = found["transcript"][i][: found["transcript"].lengths[i]]
        assert set(speaker[labels]) == {found["speaker"][i]}
        expected = np.concatenate([wave[label][: 5 + label] for label in labels])
        np.testing.assert_array_equal(found["wave"][i][: found["wave"].lengths[i]], expected)
    again = audio.strings(wave, label, speaker, 40, 4, seed=1)
    np.testing.assert_array_equal(found["wave"].values, again["wave"].values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: audio.log_mel(ragged([np.zeros(300), np.zeros(199)]), 8000), "wave 1 has 199 samples, expected 200"),
        (lambda: audio.log_mel(ragged([np.zeros(300)]), 8000, bins=90), r"mel bin \d+ of 90 lies between"),
        (lambda: audio.log_mel(WAVES, 8000, bins=0), "the number of mel bins is 0"),
        (lambda: audio.log_mel(WAVES, 8000, seconds=0), "the samples of a frame is 0"),
        (lambda: audio.log_mel(WAVES, 8000, hop=0), "the samples from one frame to the next is 0"),
        (lambda: audio.log_mel(WAVES.of(WAVES.values.astype(np.int32)), 8000), "waves of int32"),
        (lambda: audio.to_unit(ragged([np.zeros((3, 2))])), r"waves of float64 \(1, 3, 2\), expected int16 or floats"),
        (lambda: audio.to_unit(ragged([[0.0, 1.0], [0.0], [1.0, np.nan]])), "wave 2 has the value nan at sample 1"),
        (lambda: audio.to_unit(ragged([[0.0, 1e300]])), r"wave 0 has the value 1e\+300 at sample 1, .* in float32; "),
        (lambda: audio.levelled(ragged([[-np.inf], [1.0]])), "wave 0 has the value -inf at sample 0"),
        (lambda: audio.levelled(ragged([[1.0], [0.0, 0.0]])), "wave 1 is silent, 2 samples of 0, expected a level"),
        (lambda: audio.levelled(ragged([[], [1.0]])), "wave 0 is silent, 0 samples of 0, expected a level"),
        (lambda: audio.resample(WAVES, 8000, 0), "the new rate is 0"),
        (lambda: audio.resample(ragged([[np.nan]]), 8000, 4000), "wave 0 has the value nan"),
        (lambda: audio.strings(WAVES, np.zeros(2), np.zeros(3), 1, 1, 0), "2 labels and 3 speakers of 3 waves"),
        (lambda: audio.strings(WAVES, np.zeros(3, int), np.zeros(3, int), 0, 1, 0), "the number of strings is 0"),
        (lambda: audio.strings(WAVES, np.array([*"abc"]), np.zeros(3, int), 1, 1, 0), "labels of <U1, expected"),
        (lambda: audio.strings(WAVES, np.zeros(3, int), np.array([*"abc"]), 1, 1, 0), "speakers of <U1, expected"),
        (lambda: audio.sections(WAVES, 0), "the number of sections is 0"),
    ],
)
def test_what_cannot_be_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# Sets


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("Spoken digits at 8 kHz", 8000),
        ("8 kHz mono, 1 s of 8000 Hz", 8000),
        ("at 44.1kHz.", 44100),
        ("16-kHz audio of 3,000 people", 16000),
        ("resampled from 44.1 kHz to 8 kHz", None),
        ("8 khz, 3 MHz, v8 Hz2", None),
        ("", None),
    ],
)
def test_the_rate_that_a_description_states(text, rate):
    assert describe.stated_rate(text) == rate


def test_tones():
    described = data.info("tones")
    assert (described.rate, described.classes, described.splits) == (8000, 10, {"train": 600, "test": 240})
    records = audio.recordings("tones", "test", 8000, ("audio", "label", "speaker"))
    assert np.bincount(records["label"] * 6 + records["speaker"]).tolist() == [4] * 60
    assert records["audio"].dtype == np.float32
    assert 0.1 <= abs(records["audio"][:]).max(1).min() <= abs(records["audio"].values).max() <= 0.9
    assert 1200 <= records["audio/length"].min() <= records["audio/length"].max() <= 3600


def test_a_tone_has_the_two_frequencies_of_its_key():
    for label in range(10):
        wave = np.concatenate([tones.tone(np.random.default_rng(take), label, 0) / 3e4 for take in range(12)])
        spectrum = abs(np.fft.rfft(wave))
        frequency = np.arange(len(spectrum)) * tones.RATE / len(wave)
        power = lambda f, spectrum=spectrum, frequency=frequency: (spectrum[abs(frequency / f - 1) < 0.015] ** 2).mean()
        keys = {key: [power(0.97 * f) for f in pair] for key, pair in tones.KEYS.items()}
        assert max(keys, key=lambda key: min(keys[key])) == str(label)


def test_audio_of_another_rate_and_sets_without_audio_are_refused(monkeypatch):
    with pytest.raises(InputError, match="the audio of data set tones is at 8000 Hz, expected 16000 Hz; choose"):
        audio.recordings("tones", "test", 16000)
    with pytest.raises(InputError, match="data set digits has the columns image, label, expected audio, label"):
        audio.recordings("digits", "test", 8000)
    unknown = lambda name: data.info("tones").__class__(**{**vars(data.info("tones")), "rate": None})
    monkeypatch.setattr(audio, "info", unknown)
    with pytest.raises(InputError, match="at a rate that its description does not state, expected 8000 Hz"):
        audio.recordings("tones", "test", 8000)


@pytest.mark.parametrize("value", [1.0, -1.0, 1.125, -3000.0])
def test_recordings_of_floats_are_within_their_full_scale(monkeypatch, value):
    waves = ragged([np.zeros(3, np.float32), np.array([0, value], np.float32)])
    monkeypatch.setattr(audio, "load", lambda name, split, only: {"audio": waves, "label": np.zeros(2, int)})
    if abs(value) <= 1:
        np.testing.assert_array_equal(audio.recordings("tones", "test", 8000)["audio"].values, waves.values)
        return
    message = rf"^data set tones: wave 1 has the value {value} at sample 1, expected \[-1, 1\]; prepare it anew with"
    with pytest.raises(InputError, match=message) as error:
        audio.recordings("tones", "test", 8000)
    assert "\n" not in str(error.value)


@pytest.mark.data
@pytest.mark.parametrize("name", ["fsdd", "audio_scene3", "speech_music_silence"])
def test_the_rate_of_sets_that_were_prepared_before(tfds_dir, name):
    assert data.info(name).rate == 8000
