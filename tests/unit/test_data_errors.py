"""Sets that are not there, or damaged: one line that names what is wrong and what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import bundled, digits
from dl_jax.data.__main__ import main
from dl_jax.data.prepare import prepare
from dl_jax.data.source import find, prepared, tfds_names


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """The version folder of the prepared digits."""
    return bundled.prepared(digits.SET, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def root(valid, tmp_path, monkeypatch) -> Path:
    """A data folder, the default one, with the sets `scans`, of two versions, and `pair`, of two configs."""
    root = tmp_path / "tfds"
    for place in ("scans/1.0.0", "scans/1.10.0", "pair/left/1.0.0", "pair/right/1.0.0", "alone/only/2.0.0"):
        shutil.copytree(valid, root / place)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def message(name: str, split: str = "test", **where) -> str:
    with pytest.raises(InputError) as error:
        data.load(name, split, **where)
    text = str(error.value)
    assert "\n" not in text
    return text


def shard(root: Path, split: str = "test") -> Path:
    return root / "scans" / "1.10.0" / f"digits-{split}.array_record-00000-of-00001"


def test_the_newest_version_of_a_set_is_found(root):
    assert find("scans") == ("scans", "1.10.0", root / "scans" / "1.10.0", None)
    assert find("scans:1.0.0").version == "1.0.0"
    assert find("alone") == find("alone/only") == ("alone/only", "2.0.0", root / "alone" / "only" / "2.0.0", None)
    assert [found.name for found in prepared()] == ["alone/only", "pair/left", "pair/right", "scans"]
    assert len(data.load("scans", "test")["label"]) == 360
    assert data.info("pair/left").name == "pair/left"


def test_the_data_folder_is_only_read(root):
    before = sorted(root.rglob("*"))
    for path in (shard(root).parent, root):
        path.chmod(0o555)
    data.load("scans", "test[:10]")
    data.info("scans")
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "glue/sst2", "spoken_digit", "imagenet2012"])
def test_a_set_that_is_not_prepared_names_the_ways_out(root, name):
    text = message(name, data_dir=str(root))
    assert text.startswith(f"data set {name} is not prepared in {root}: ")
    assert f"`python -m dl_jax.data prepare {name} --data-dir {root}`" in text
    assert "--dataset digits" in text
    assert f"`python -m dl_jax.data prepare {name}`" in message(name)


@pytest.mark.parametrize(
    ("name", "near"), [("mnits", "mnist"), ("scan_s", "scans"), ("cifar-10", "cifar10"), ("digit", "digits")]
)
def test_an_unknown_name_names_the_nearest(root, name, near):
    text = message(name)
    assert f"data set {name} is neither prepared in {root} nor known to TFDS" in text
    assert near in text.partition("did you mean")[2]


@pytest.mark.parametrize("name", ["", "..", "/etc", "a b", "../scans", "scans/1.0.0/x"])
def test_names_do_not_leave_the_data_folder(root, name):
    assert "neither prepared in" in message(name)


def test_an_absent_set_fails_at_once_and_imports_nothing_heavy(tmp_path):
    program = "import sys, time; from dl_jax import data; from dl_jax.core import errors; began = time.process_time()\n"
    program += "try: data.load('mnist', 'train', sys.argv[1])\nexcept errors.InputError: pass\n"
    program += "print(time.process_time() - began, 'tensorflow_datasets' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, imported = run.stdout.split()
    assert float(seconds) < 1
    assert imported == "False"


def test_names_that_tfds_can_prepare_are_known():
    assert {"mnist", "cifar10", "wiki_dialog", "tiny_shakespeare", "gtzan"} <= tfds_names()


def test_ambiguous_configs_and_absent_versions_are_listed(root):
    assert "expected one of pair/left, pair/right" in message("pair")
    assert "version 3.0.0, expected 1.0.0 or 1.10.0" in message("scans:3.0.0")


def test_other_addresses_are_no_data_folder(root):
    for address in ("s3://bucket/tfds", "gs://", "https://host/tfds"):
        assert f"--data-dir {address}, expected a local folder or gs://BUCKET/NAME" in message(
            "scans", data_dir=address
        )


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("validation", "data set scans has no split 'validation', expected train, test, a slice"),
        (
            "trian[:10]",
            "has no split 'trian', expected train, test, a slice such as train[:90%], or several joined by +",
        ),
        ("trian", "did you mean train?"),
        ("train[:0]", "split 'train[:0]' of scans is empty, expected some of its examples (train 1437, test 360)"),
        ("test[9:3]", "split 'test[9:3]' of scans is empty"),
        ("train[", "split 'train[' of scans is malformed"),
        ("", "split '' of scans is malformed"),
        ("train[:200%]", "split 'train[:200%]' of scans is malformed (When unit=%"),
        ("train[2000:]", "incompatible with 1437 examples"),
        ("train+", "split 'train+' of scans is malformed"),
    ],
)
def test_a_split_that_is_not_there_or_empty_or_malformed(root, split, expected):
    assert expected in message("scans", split)


@pytest.mark.parametrize("keep", [0.5, 0.99, 0.0])
def test_a_truncated_record_file_is_named(root, keep):
    file = shard(root)
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    text = message("scans")
    assert text.startswith(f"record file {file} is truncated or damaged")
    assert message("scans", "train[-9:]+test").startswith(f"record file {file}")
    assert len(data.load("scans", "train")["label"]) == 1437  # the other file is valid
    with pytest.raises(InputError, match=f"record file {file} is truncated"):
        data.streamed("scans", "test", 4, 0)(0)


def test_a_flipped_byte_is_noticed(root):
    file = shard(root)
    content = bytearray(file.read_bytes())
    content[70_000] ^= 255
    file.write_bytes(content)
    assert message("scans").startswith(f"record file {file} is truncated or damaged (Corrupted")


def test_a_missing_record_file_is_named(root):
    shard(root).unlink()
    assert message("scans").startswith(f"record file {shard(root)} is missing")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"splits": [{"name": "train"}]}'])
def test_a_damaged_description_is_named(root, content):
    file = root / "scans" / "1.10.0" / "dataset_info.json"
    file.unlink() if content is None else file.write_text(content)
    assert message("scans").startswith(f"{file} is missing or damaged")
    with pytest.raises(InputError, match="is missing or damaged"):
        data.info("scans")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"pythonClassName": "tensorflow_datasets.os"}'])
def test_damaged_features_are_named(root, content):
    file = root / "scans" / "1.10.0" / "features.json"
    file.unlink() if content is None else file.write_text(content)
    text = message("scans")
    assert text.startswith(f"the description of data set scans in {file.parent} is damaged")
    assert "features.json" in text


LEGACY = {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
OURS = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


@pytest.mark.parametrize(
    "features",
    [
        {"pythonClassName": "intruder.X", "text": {}},
        {"python_class_name": "intruder.X", "text": {}},
        {"type": "intruder.X", "content": {}},
        {"pythonClassName": OURS, "featuresDict": {"features": {"x": {"pythonClassName": "intruder.X", "text": {}}}}},
        {"pythonClassName": OURS, "jsonFeature": {"json": '{"x": {"type": "intruder.X", "content": {}}}'}},
        LEGACY | {"content": {"x": {"type": "intruder.X", "content": {}}}},
        LEGACY
        | {
            "content": ' {"features": {"type": {"pythonClassName": "intruder.X", "text": {}}}}',
            "proto_cls": "tensorflow_datasets.FeaturesDict",
        },
        {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "sequence": {"feature": {"pythonClassName": "intruder.X", "text": {}}, "length": "-1"},
        },
    ],
)
def test_features_of_other_modules_are_not_imported(root, tmp_path, monkeypatch, features):
    (tmp_path / "intruder.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    file = root / "scans" / "1.10.0" / "features.json"
    file.write_text(json.dumps(features))
    with pytest.raises((InputError, ValueError)):
        tfds.builder_from_directory(file.parent)
    assert (tmp_path / "mark").exists()  # TFDS imports it
    (tmp_path / "mark").unlink()
    sys.modules.pop("intruder")
    expected = f"data set scans has a feature of class 'intruder.X' in {file}, expected TFDS's own"
    assert message("scans").startswith(expected)
    for read in (lambda: data.info("scans"), lambda: data.streamed("scans", "test", 4, 0)):
        with pytest.raises(InputError, match="expected TFDS's own"):
            read()
    assert not (tmp_path / "mark").exists()


def test_a_description_may_look_like_json(root):
    file = root / "scans" / "1.10.0" / "features.json"
    features = json.loads(file.read_text())
    file.write_text(json.dumps(features | {"description": "{as TFDS wrote it}"}))
    assert len(data.load("scans", "test")["label"]) == 360


ODD = ["x" * 300, "x/" + "y" * 300, "a\0b", "a\nb", "\ud800", "é" * 150]


@pytest.mark.parametrize("name", [*ODD, "", "..", "a/b/c", "/", "a" * 200])
def test_odd_names_are_one_line(root, name):
    for use in (
        lambda: data.load(name, "test"),
        lambda: data.info(name),
        lambda: data.streamed(name, "test", 4, 0),
        lambda: prepare(name, str(root)),
    ):
        with pytest.raises(InputError) as error:
            use()
        text = str(error.value)
        assert text.startswith("data set ")
        assert text.isprintable()
        assert len(text) < 1000
        if name in ODD:
            assert f"of {len(name)} characters, expected at most 200, all printable" in text


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "a/b/c", ".."])
def test_odd_names_are_one_line_of_the_command(root, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dl_jax.data", "prepare", name])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: data set ")


@pytest.mark.parametrize("split", ["train[" + "1" * 5000, "+".join(["train"] * 1000), "train\0"])
def test_splits_that_are_very_long_or_not_printable(root, split):
    assert f"of {len(split)} characters, expected at most 1000, all printable" in message("scans", split)
    with pytest.raises(InputError, match="characters, expected at most 1000"):
        data.streamed("scans", split, 4, 0)


def test_a_split_may_have_white_space(root):
    assert len(data.load("scans", "test[:2]\n + test[4:6] ")["label"]) == 4
    (labels,) = (data.streamed("scans", "test[:2]\n + test[4:6] ", 4, 0)(0)["label"],)
    assert len(labels) == 4


@pytest.mark.parametrize("folder", ["/tmp/" + "x" * 300, "/x" * 2000, "a\0b", "~\0"])
def test_folders_that_cannot_be(root, folder):
    for use in (
        lambda: data.load("scans", "test", data_dir=folder),
        lambda: data.load("scans", "test", cache_dir=folder),
        lambda: data.load("digits", "test", cache_dir=folder),
        lambda: data.info("scans", cache_dir=folder),
        lambda: prepare("scans", folder),
        lambda: prepared(folder),
    ):
        with pytest.raises(
            InputError, match=r"^folder '.* of \d+ characters, expected at most 3000, .* with --(data|cache)-dir$"
        ):
            use()


def test_another_record_format_is_refused(root):
    file = root / "scans" / "1.10.0" / "dataset_info.json"
    file.write_text(file.read_text().replace('"array_record"', '"tfrecord"'))
    assert "is stored as tfrecord, expected array_record" in message("scans")


def test_a_feature_that_needs_tensorflow_is_refused(root):
    file = root / "scans" / "1.10.0" / "features.json"
    connector = "tensorflow_datasets.core.features.audio_feature.Audio"
    label = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
    file.write_text(
        file.read_text()
        .replace(label, connector)
        .replace('"classLabel"', '"audio"')
        .replace("numClasses", "sampleRate")
    )
    assert "has a feature that TFDS reads only with TensorFlow" in message("scans")


def test_images_that_are_none_are_refused(root):
    """The records are undamaged, but do not hold what the features declare."""
    file = root / "scans" / "1.10.0" / "features.json"
    text = file.read_text().replace('"label"', '"number"')
    file.write_text(text)
    assert message("scans").startswith("example 0 of scans 'test' cannot be decoded to its declared features")


def test_examples_of_different_shapes_make_no_column(root):
    with pytest.raises(InputError, match=r"column 'image' has examples of shapes \(1, 8, 1\) and \(8, 8, 1\)"):
        data.streamed("scans", "test", 64, 0, transform=halved)(0)


def halved(rng, example):
    return {"image": example["image"][: 8 if rng.random() < 0.5 else 1]}


def test_a_cache_that_cannot_be_written_is_named(root, tmp_path):
    (tmp_path / "file").write_text("")
    text = message("scans", cache_dir=str(tmp_path / "file"))
    assert text.startswith(f"cannot write in {tmp_path / 'file'}")
    assert "--cache-dir" in text
