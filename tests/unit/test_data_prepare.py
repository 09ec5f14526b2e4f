"""The commands that prepare and list data sets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dl_jax import data
from dl_jax.core.errors import InputError, Unavailable
from dl_jax.data import __main__ as commands
from dl_jax.data.prepare import prepare


class DlJaxWords(tfds.core.GeneratorBasedBuilder):
    """TFDS knows a builder by its class; this one needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    prepared = 0

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"word": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        type(self).prepared += 1
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate({"word": word} for word in ("one", "two", "three"))


class DlJaxImages(DlJaxWords):
    """Encoding an array as an image takes TensorFlow."""

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(2, 2, 1))})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self):
        yield 0, {"image": np.zeros((2, 2, 1), np.uint8)}


class DlJaxOffline(DlJaxWords):
    def _split_generators(self, dl_manager):
        raise ConnectionError("no route to host\nand more")


@pytest.fixture(autouse=True)
def quiet():
    tfds.disable_progress_bar()
    yield
    tfds.enable_progress_bar()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m dl_jax.data` within this process; gives (exit status, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dl_jax.data", *args])
        return (commands.main(), *capsys.readouterr())

    return run


def test_preparing_makes_a_set_that_loads(tmp_path):
    before = DlJaxWords.prepared
    found = prepare("dl_jax_words", str(tmp_path))
    assert found == prepare("dl_jax_words", str(tmp_path))
    assert DlJaxWords.prepared == before + 1  # the second time it was there
    description = found.folder / "dataset_info.json"
    words = data.load("dl_jax_words", "train", str(tmp_path), str(tmp_path / "cache"))["word"]
    assert sorted(words) == [b"one", b"three", b"two"]
    description.write_text(description.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="is stored as tfrecord"):
        prepare("dl_jax_words", str(tmp_path))


@pytest.mark.skipif(bool(__import__("importlib.util").util.find_spec("tensorflow")), reason="TensorFlow is installed")
@pytest.mark.parametrize("name", ["dl_jax_images", "glue/sst2"])
def test_missing_tensorflow_is_one_line_with_the_command(tmp_path, name):
    with pytest.raises(InputError, match=r"needs TensorFlow, .* pip install -e '\.\[prepare\]'") as error:
        prepare(name, str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_failing_download_is_one_line(tmp_path):
    with pytest.raises(
        InputError, match=r"TFDS could not prepare dl_jax_offline .*ConnectionError: no route to host and"
    ):
        prepare("dl_jax_offline", str(tmp_path))


def test_the_commands(command, tmp_path, monkeypatch):
    here = str(tmp_path / "tfds")
    assert command("prepare", "dl_jax_words", "--data-dir", here)[0] == 0
    monkeypatch.setenv("TFDS_DATA_DIR", here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    status, out, _ = command("list")
    configs = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine", "yacht")
    tables = ", ".join(f"uci_regression/{config}" for config in configs)
    assert (status, out) == (
        0,
        f"1 prepared in {here}; always available: digits, shapes, python_tokens, docstrings, moving_scans, tones, "
        "diabetes, ratings; "
        "beside TFDS's sets, `prepare` knows wnut17, rotten_tomatoes_mr, sick2014, multi30k, fsdd, "
        f"jsb_chorales, nottingham, {tables}, moving_digits\n"
        "dl_jax_words 1.0.0: train 3\n",
    )
    assert command("prepare", "dl_jax_words", "--data-dir", here)[:2] == (0, "dl_jax_words 1.0.0: train 3\n")
    assert command("prepare", "digits")[:2] == (0, "digits 1.0.0: train 1437, test 360\n")
    assert Path(tmp_path, "cache", "dl_jax", "tfds", "digits", "1.0.0").is_dir()


def test_what_may_be_better_later_exits_with_status_75(command, monkeypatch):
    def fails(name, data_dir):
        raise Unavailable("cannot read it in 3 attempts")

    monkeypatch.setattr(commands, "prepare", fails)
    assert command("prepare", "digits") == (75, "", "error: cannot read it in 3 attempts\n")


def test_an_unknown_set_exits_with_status_2(tmp_path):
    line = [sys.executable, "-m", "dl_jax.data", "prepare", "mnits", "--data-dir", str(tmp_path)]
    failed = subprocess.run(line, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: data set mnits is unknown to TFDS")
    assert "did you mean" in failed.stderr
    assert failed.stderr.count("\n") == 1
