"""What classifiers of recordings have in common: columns, the loss, the answers, and the linear model beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import hear
from dl_jax.core.errors import InputError
from dl_jax.core.ragged import ragged
from dl_jax.data import audio
from dl_jax.models.sequence.mel_cnn import MelCNN
from dl_jax.models.sequence.wave_cnn import WaveCNN

RNG = np.random.default_rng(0)
LENGTHS = (700, 520, 900, 640, 1200)
RECORDINGS = {
    "audio": ragged([RNG.uniform(-0.3, 0.3, n).astype(np.float32) for n in LENGTHS]),
    "label": np.array([0, 2, 1, 1, 0], np.int32),
}
KEY = jax.random.key(0)


def test_rows_that_are_taken_stay_ragged():
    found = hear.taken(RECORDINGS, np.array([4, 1]))
    assert found["audio"].lengths.tolist() == [1200, 520]
    np.testing.assert_array_equal(found["audio"].values[1200:], RECORDINGS["audio"][1][:520])
    assert found["label"].tolist() == [0, 2]


def test_a_tone_at_another_speed_has_another_pitch_and_length():
    tone = lambda hertz, n: np.sin(2 * np.pi * hertz * np.arange(n) / 8000)
    found = hear.at_speeds({"audio": ragged([tone(500, 1600)]), "label": np.array([7])}, (0.8, 1.0, 1.25))
    assert found["audio"].lengths.tolist() == [2000, 1600, 1280]
    assert found["label"].tolist() == [7, 7, 7]
    for i, (speed, n) in enumerate(((0.8, 2000), (1.0, 1600), (1.25, 1280))):
        inner = slice(50, n - 50)  # without the ends, beyond which the filter sees zeros
        np.testing.assert_allclose(found["audio"][i][inner], tone(500 * speed, n)[inner], atol=0.01)


def test_waves_and_frames_do_not_depend_on_the_level():
    factors = np.repeat([0.01, 1, 3, 0.5, 2], RECORDINGS["audio"].lengths)
    louder = {**RECORDINGS, "audio": RECORDINGS["audio"].of((RECORDINGS["audio"].values * factors).astype(np.float32))}
    for column, of in (("wave", hear.waves), ("frames", lambda records: hear.frames(records, 8000))):
        found, expected = of(louder), of(RECORDINGS)
        np.testing.assert_allclose(found[column].values, expected[column].values, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found["length"], found[column].lengths)
        assert found["label"] is RECORDINGS["label"]
    assert found["length"].tolist() == [(n - 200) // 80 + 1 for n in LENGTHS]
    np.testing.assert_allclose(hear.spectra(louder, 8000, 2), hear.spectra(RECORDINGS, 8000, 2), atol=1e-4)


@pytest.mark.parametrize("speed", [0, -1.1, 0.004, np.inf, np.nan])
def test_what_is_no_speed_is_refused(speed):
    with pytest.raises(InputError, match=rf"^speed {speed}, expected a number of at least 0.01, such as 1.1 ") as error:
        hear.at_speeds(RECORDINGS, (1.0, speed))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="there are no speeds, expected one or more; "):
        hear.at_speeds(RECORDINGS, ())


NETWORKS = {
    "wave": (WaveCNN(3, (4,), taps=8, dropout=0.5), hear.waves(RECORDINGS)),
    "frames": (MelCNN(3, (4,), dropout=0.5), hear.frames(RECORDINGS, 8000)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """The column, the module, the records, and the variables of two seeds."""
    model, records = NETWORKS[request.param]
    one = records[request.param][:1]
    variables = jax.vmap(lambda key: model.init(key, one, train=False))(jax.random.split(KEY, 2))
    return request.param, model, records, variables


def test_the_loss_is_that_of_the_network_with_its_lengths(network):
    column, model, records, variables = network
    first = jax.tree.map(lambda leaf: leaf[0], variables)
    batch = {name: jnp.asarray(records[name][:]) for name in records}
    value, (new, metrics) = jax.jit(hear.loss(model.apply, column))(first, batch, KEY)
    logits, expected = model.apply(
        first, batch[column], batch["length"], train=True, rngs={"dropout": KEY}, mutable=["batch_stats"]
    )
    right = jax.nn.log_softmax(logits)[np.arange(5), records["label"]]
    np.testing.assert_allclose(value, -right.mean(), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), new, dict(expected))
    np.testing.assert_allclose(metrics["error"], (logits.argmax(-1) != records["label"]).mean())


@pytest.mark.parametrize("count", [0, 2])
def test_answers_are_in_the_order_of_the_records_whatever_the_buckets(network, count):
    """Each is that of the recording alone, without padding."""
    column, model, records, variables = network
    lengths = np.sort(records["length"])
    find = hear.answers(model.apply, column, records, (*lengths[1 : 1 + count], lengths[-1]))
    scattered = jax.tree.map(lambda leaf: leaf + RNG.normal(0, 1, leaf.shape).astype(np.float32) ** 2, variables)
    found = find(scattered)
    assert found.shape == (2, 5)
    for seed, answers in enumerate(found):
        of_seed = jax.tree.map(lambda leaf, seed=seed: leaf[seed], scattered)
        for row, answer in enumerate(answers):
            alone = records[column][row][None, : records["length"][row]]
            assert answer == model.apply(of_seed, alone, train=False).argmax()


def test_an_apply_that_returns_more_than_logits_is_refused():
    pair = lambda variables, wave, length, **settings: (wave, length)
    find = hear.answers(pair, "wave", NETWORKS["wave"][1], (1200,))
    with pytest.raises(InputError, match=r"^`apply` returns a tuple, expected an array, such as logits"):
        find({"params": np.zeros(1)})


def test_spectra_are_means_of_log_mel_energies_over_sections():
    found = hear.spectra(RECORDINGS, 8000, 2)
    assert found.shape == (5, 2 * hear.BINS)
    wave = RECORDINGS["audio"][4][:1200] / np.sqrt((RECORDINGS["audio"][4][:1200].astype(float) ** 2).mean())
    frames = audio.log_mel(ragged([wave]), 8000, hear.BINS, hear.FRAME, hear.HOP).values
    assert len(frames) == 6  # (1200 - 512) // 128 + 1
    np.testing.assert_allclose(found[4], [*frames[:3].mean(0), *frames[3:].mean(0)], atol=1e-4)


def test_the_linear_model_tells_tones_apart_and_nothing_from_chance():
    hertz = RNG.choice([400.0, 1500.0], 60)
    waves = [np.sin(2 * np.pi * f * np.arange(900) / 8000) + RNG.normal(0, 1, 900) for f in hertz]
    tones = {"audio": ragged(waves), "label": (hertz > 1000).astype(int)}
    train, test = (hear.taken(tones, rows) for rows in (np.arange(40), np.arange(40, 60)))
    assert hear.linear_accuracy(train, test, 8000, 2) == 100
    wrong = {**test, "label": 1 - test["label"]}
    assert hear.linear_accuracy(train, wrong, 8000, 2) == 0


@pytest.mark.parametrize(
    ("learned", "tested", "message"),
    [
        ([], [0], "^0 recordings of 0 classes to learn from and 1 to test on, expected those of two classes or more, "),
        ([2, 3], [0], "^2 recordings of 1 classes to learn from and 1 to test on, expected those of two"),
        ([1, 2], [], "^2 recordings of 2 classes to learn from and 0 to test on, expected"),
    ],
)
def test_a_linear_model_without_anything_to_learn_or_to_test_is_refused(learned, tested, message):
    train, test = (hear.taken(RECORDINGS, np.array(rows, int)) for rows in (learned, tested))
    with pytest.raises(InputError, match=message) as error:
        hear.linear_accuracy(train, test, 8000, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        ([np.ones(900), np.zeros(900)], r"^wave 1 is silent, 900 samples of 0, expected a level .*; leave it out$"),
        ([np.ones(900), np.full(900, np.nan)], "^wave 1 has the value nan at sample 0, expected finite ones in f"),
        ([np.ones(900), np.ones(199)], r"^wave 1 has 199 samples, expected \d+ or more, those of a frame of .*; leave"),
    ],
)
def test_recordings_of_which_no_frames_can_be_made(wave, message):
    records = {"audio": ragged(wave), "label": np.array([0, 1])}
    for of in (lambda: hear.frames(records, 8000), lambda: hear.spectra(records, 8000, 2)):
        with pytest.raises(InputError, match=message) as error:
            of()
        assert "\n" not in str(error.value)
