"""Damage in the cache is found and mended, a failure to read is neither, and what was read is noted."""

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dl_jax import data
from dl_jax.core.errors import InputError, Unavailable
from dl_jax.core.inputs import recorded
from dl_jax.data import bundled, cached, digits, text
from dl_jax.data import columns as columns_module

SPLIT = "test[:8]"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A cache folder with the prepared digits, to copy."""
    folder = tmp_path_factory.mktemp("cache")
    bundled.prepared(digits.SET, folder)
    return folder


@pytest.fixture
def cache(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "cache"))


def load(cache: Path) -> dict[str, np.ndarray]:
    """The columns, copied from the files."""
    return {name: column.copy() for name, column in data.load("digits", SPLIT, cache_dir=str(cache)).items()}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def folder_of_columns(cache: Path) -> Path:
    (listing,) = cache.glob("columns/*/*/*/columns.json")
    return listing.parent


def flips(content: bytes, most: int) -> list[bytes]:
    """`content` with one bit flipped: in most of its first bytes, where a header is, and in drawn places."""
    rng = np.random.default_rng(len(content))
    places = sorted({*range(0, min(len(content), 128), 7), *rng.integers(0, len(content), most).tolist()})
    return [
        content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :] for place in places
    ]


def damages(content: bytes, most: int) -> list[bytes | None]:
    return [None, b"", content[: len(content) // 2], content + b"\0", bytes(len(content)), *flips(content, most)]


def damage(file: Path, content: bytes | None) -> None:
    file.unlink() if content is None else file.write_bytes(content)


def test_every_damage_of_columns_is_told_and_mended(cache):
    whole = load(cache)
    folder = folder_of_columns(cache)
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["columns.json", "image.npy", "label.npy"]
    for name in names:
        for content in damages((folder / name).read_bytes(), 20):
            damage(folder / name, content)
            with pytest.warns(UserWarning, match=r"^[^\n]*$") as told:
                assert equal(load(cache), whole)
            (warning,) = told
            assert str(warning.message).startswith(f"{folder} in the cache is damaged ({name}")
    assert sorted(file.name for file in folder.iterdir()) == names
    assert equal(load(cache), whole)  # silently


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_for_a_folder_and_a_folder_for_a_file_are_mended(cache, kind):
    whole = load(cache)
    folder = folder_of_columns(cache)
    if kind == "file":
        shutil.rmtree(folder)
        folder.write_text("")
    else:
        (folder / "label.npy").unlink()
        (folder / "label.npy").mkdir()
    with pytest.warns(UserWarning, match="is damaged"):
        assert equal(load(cache), whole)


def test_every_damage_of_a_description_is_told_and_mended(cache):
    whole = data.info("digits", cache_dir=str(cache))
    (file,) = cache.glob("columns/*/*/description.json")
    for content in damages(file.read_bytes(), 60)[1:]:
        damage(file, content)
        with pytest.warns(UserWarning, match=r"description\.json in the cache is damaged"):
            assert data.info("digits", cache_dir=str(cache)) == whole
    file.unlink()
    assert data.info("digits", cache_dir=str(cache)) == whole


def test_damaged_digits_are_prepared_anew(cache):
    """A flipped bit in its description could drop an example, or add a class."""
    whole, info = load(cache), data.info("digits", cache_dir=str(cache))
    files = list((cache / "tfds" / "digits" / "1.0.0").iterdir())
    assert {"dataset_info.json", "features.json"} < {file.name for file in files}
    for file in (*files, cache / "tfds" / "digits-1.0.0.json"):
        content = file.read_bytes()
        middle = len(content) // 2
        damage(file, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.warns(UserWarning, match="digits in the cache is damaged"):
            assert equal(load(cache), whole)
        assert data.info("digits", cache_dir=str(cache)) == info
    (cache / "tfds" / "digits-1.0.0.json").unlink()  # a kill before it was written, or an older release
    assert equal(load(cache), whole)


def test_two_versions_lie_side_by_side(cache):
    """As those of a set that is made of the standard library of two Pythons."""
    later = digits.SET._replace(version="1.0.1")
    folders = [bundled.prepared(each, cache) for each in (digits.SET, later, digits.SET, later)]  # without a warning
    assert [folder.name for folder in folders] == ["1.0.0", "1.0.1"] * 2
    assert len({(folder / "features.json").stat().st_ino for folder in folders}) == 2
    assert all((folder / "dataset_info.json").exists() for folder in folders)


def failing(function: Callable[..., Any], code: int, times: int) -> Callable[..., Any]:
    """`function`, of which the first calls fail."""
    calls = itertools.count()

    def call(*args, **options):
        if next(calls) < times:
            raise OSError(code, os.strerror(code))
        return function(*args, **options)

    return call


READS = [(cached, "open"), (Path, "read_bytes"), (np, "load"), (Path, "stat")]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize(("owner", "name"), READS)
def test_a_failure_to_read_is_no_damage(monkeypatch, cache, owner, name, code):
    whole = load(cache)
    contents = lambda: {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
    found = contents()
    function, pauses = getattr(owner, name, open), []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, failing(function, code, 10**9), raising=False)
        with pytest.raises(
            Unavailable, match=r"^/.* cannot be read \(.*\), tried 5 times in 7.5 s; nothing was changed"
        ) as error:
            load(cache)
    assert "\n" not in str(error.value)
    assert pauses == [0.5, 1.0, 2.0, 4.0]
    assert all(found[file] == content for file, content in contents().items())
    assert found.keys() == contents().keys()
    monkeypatch.setattr(owner, name, failing(function, code, 2), raising=False)
    assert equal(load(cache), whole)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 0.5, 1.0]


def test_a_description_that_cannot_be_read_is_no_damage(monkeypatch, cache):
    data.info("digits", cache_dir=str(cache))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes, errno.EIO, 10**9))
    with pytest.raises(Unavailable):
        data.info("digits", cache_dir=str(cache))


def test_a_set_that_cannot_be_read_is_no_damage(monkeypatch, tmp_path):
    root = tiny(tmp_path / "tfds", [1, 2])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes, errno.EIO, 10**9))
    with pytest.raises(Unavailable, match=r"dataset_info\.json cannot be read"):
        data.load("tiny", "train", root, str(tmp_path / "cache"))


# What was read


def tiny(root: Path, labels: list[int], version: str = "1.0.0") -> str:
    """The data folder `root` with a set `tiny` of these labels, prepared."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tfds.core.Version(version)

        def _info(self):
            features = {"label": tfds.features.ClassLabel(num_classes=10), "x": tfds.features.Scalar(np.float32)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate({"label": label, "x": i / 3} for i, label in enumerate(labels))

    tfds.disable_progress_bar()
    Tiny(data_dir=root, file_format="array_record").download_and_prepare()
    tfds.enable_progress_bar()
    return str(root)


def noted(read: Callable[..., Any], *args: Any, **options: Any) -> dict[str, str]:
    with recorded() as record:
        read(*args, **options)
    return dict(record)


def test_the_columns_that_were_loaded_are_noted(tmp_path):
    def columns(folder: str, labels: list[int], version: str = "1.0.0") -> dict[str, str]:
        root, cache = tiny(tmp_path / folder, labels, version), str(tmp_path / f"{folder}-cache")
        first = noted(data.load, "tiny", " train[:2] + train[2:]", root, cache)
        assert noted(data.load, "tiny", "train[:2]+train[2:]", root, cache) == first  # from the cache
        return first

    found = columns("a", [1, 2, 3, 4])
    assert list(found) == ["tiny train[:2]+train[2:]"]
    assert found["tiny train[:2]+train[2:]"].startswith("1.0.0 ")
    assert columns("b", [1, 2, 3, 4]) == found  # prepared and decoded anew
    assert columns("c", [1, 2, 3, 5]).keys() == found.keys()
    assert columns("d", [1, 2, 3, 5]) != found
    (later,) = columns("e", [1, 2, 3, 4], "1.1.0").values()
    assert found == {"tiny train[:2]+train[2:]": later.replace("1.1.0", "1.0.0")}


def test_the_digest_of_columns_stays():
    """A run that is resumed by a later release knows its data again."""
    columns = {"label": np.array([3, 1], np.int32), "a": np.array([[b"x", b"yz"]])}
    assert columns_module._digest(columns) == columns_module._digest(dict(reversed(columns.items())))
    for name, other in [
        ("label", np.array([3, 2], np.int32)),
        ("label", np.array([3, 1], np.uint32)),
        ("label", np.array([[3, 1]], np.int32)),
    ]:
        assert columns_module._digest(columns | {name: other}) != columns_module._digest(columns)
    assert columns_module._digest(columns) == "3d7c20cc49af362d"


def test_a_set_that_changes_within_a_run_ends_it(tmp_path):
    root, cache = tiny(tmp_path / "tfds", [1, 2]), str(tmp_path / "cache")
    with recorded():
        data.load("tiny", "train", root, cache)
        data.load("tiny", "train", root, cache)
        tiny(tmp_path / "tfds", [1, 2], "1.1.0")
        with pytest.raises(InputError, match=r"^data set tiny train is now 1\.1\.0 .*, expected 1\.0\.0 "):
            data.load("tiny", "train", root, cache)


def test_the_records_that_are_streamed_are_noted(tmp_path):
    root = tiny(tmp_path / "a", [1, 2, 3, 4])
    streamed = lambda root: noted(data.streamed, "tiny", " train ", 2, (0, 1), data_dir=str(root))
    found = streamed(root)
    assert list(found) == ["tiny train as records"]
    assert found["tiny train as records"].startswith("1.0.0 ")
    with recorded() as record:  # the same records in two ways are no contradiction
        data.load("tiny", "train", root, str(tmp_path / "cache"))
        data.streamed("tiny", "train", 2, 0, data_dir=root)
    assert len(record) == 2

    def changed(folder: str, file: str, edit: Callable[[str], str]) -> dict[str, str]:
        copy = shutil.copytree(root, tmp_path / folder)
        path = copy / "tiny" / "1.0.0" / file
        path.write_text(edit(path.read_text()))
        return streamed(copy)

    info = lambda **fields: lambda text: json.dumps(json.loads(text) | fields)
    described = info(description="another", moduleName="elsewhere", citation="x", downloadSize="5")
    assert changed("b", "dataset_info.json", described) == found
    assert changed("c", "features.json", lambda text: text.replace('"10"', '"11"')) != found
    splits = json.loads((tmp_path / "a" / "tiny" / "1.0.0" / "dataset_info.json").read_text())["splits"]
    assert changed("d", "dataset_info.json", info(splits=[splits[0] | {"numBytes": "7"}])) != found
    assert streamed(tiny(tmp_path / "e", [1, 2, 3, 4])) == found
    assert streamed(tiny(tmp_path / "f", [1, 2, 3, 4], "1.1.0")) != found
    copy = shutil.copytree(root, tmp_path / "g")
    (file,) = copy.rglob("*.array_record*")
    with open(file, "ab") as longer:
        longer.write(b"\0")
    assert streamed(copy) != found


def test_a_text_is_noted():
    found = [noted(text.load, text.STANDARD_LIBRARY, split) for split in ("train", "train", "test")]
    assert found[0] == found[1]
    assert list(found[0] | found[2]) == ["standard_library train", "standard_library test"]
    assert len({*found[0].values(), *found[2].values()}) == 2
