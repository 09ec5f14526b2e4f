"""Decoding to columns, and the cache. Damaged caches are in test_data_cached.py."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import bundled, digits
from dl_jax.data import cached as cached_module
from dl_jax.data import columns as columns_module


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def medley(tmp_path_factory) -> str:
    """A data folder with one set of two examples and a feature of every kind."""
    import tensorflow_datasets as tfds

    features = {
        "name": tfds.features.Text(),
        "pair": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        "big": tfds.features.Scalar(np.uint64),
        "wave": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="zlib"),
        "words": tfds.features.Sequence(tfds.features.Text()),
        "boxes": tfds.features.Sequence(
            {
                "corner": tfds.features.Tensor(shape=(2,), dtype=np.float32),
                "kind": tfds.features.ClassLabel(num_classes=3),
            }
        ),
    }

    class Medley(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "medley"
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            boxes = {"corner": [[1.0, 2.0], [3.0, 4.0]], "kind": [2, 1]}
            none = {"corner": [], "kind": []}
            yield 0, MEDLEY[0] | {"boxes": boxes}
            yield 1, MEDLEY[1] | {"boxes": none}

    root = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    Medley(data_dir=root, file_format="array_record").download_and_prepare()
    return str(root)


MEDLEY = (
    {
        "name": "first",
        "pair": np.array([0.5, 1.5], np.float32),
        "big": np.uint64(2**64 - 1),
        "wave": np.array([-3, 4, 5], np.int16),
        "words": ["one", "three"],
    },
    {
        "name": "2",
        "pair": np.array([-1, 0], np.float32),
        "big": np.uint64(7),
        "wave": np.array([9], np.int16),
        "words": [],
    },
)


def test_digits_prepare_themselves_and_keep_every_pixel(cache):
    from sklearn.datasets import load_digits

    source = load_digits()
    for split, rows in {"train": slice(0, 1437), "test": slice(1437, 1797)}.items():
        records = data.load("digits", split, cache_dir=cache)
        assert records["image"].shape == (rows.stop - rows.start, 8, 8, 1)
        assert (records["image"].dtype, records["label"].dtype) == (np.uint8, np.int32)
        ink = np.rint(records["image"].astype(np.float64) * 16 / 255)[..., 0]
        # TFDS keeps examples in an order of its own.
        ours = sorted(zip(ink.reshape(-1, 64).tolist(), records["label"].tolist(), strict=True))
        wanted = sorted(zip(source.data[rows].tolist(), source.target[rows].tolist(), strict=True))
        assert ours == wanted
    assert sorted(np.unique(records["image"]))[-1] == 255


def test_columns_equal_what_tfds_decodes(cache):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(bundled.prepared(digits.SET, Path(cache))).as_data_source("test[10:30]")
    records = data.load("digits", "test[10:30]", cache_dir=cache)
    np.testing.assert_array_equal(records["image"], np.stack([example["image"] for example in source]))
    np.testing.assert_array_equal(records["label"], [example["label"] for example in source])


def test_splits_are_tfds_splits(cache):
    train, test = (data.load("digits", split, cache_dir=cache)["image"] for split in ("train", "test"))
    load = lambda split: data.load("digits", split, cache_dir=cache)["image"]
    np.testing.assert_array_equal(load("train[:25%]"), train[:359])
    np.testing.assert_array_equal(load("train[1400:] + test[-3:]"), np.concatenate([train[1400:], test[-3:]]))


def test_info_describes_digits(cache):
    found = data.info("digits", cache_dir=cache)
    assert (found.name, found.version, found.splits) == ("digits", "1.0.0", {"train": 1437, "test": 360})
    assert found.features == {"image": data.Feature((8, 8, 1), "uint8"), "label": data.Feature((), "int32")}
    assert (found.classes, found.class_names) == (10, tuple("0123456789"))
    assert data.info("digits", cache_dir=cache) == found  # from the cache


def test_features_of_every_kind_become_columns(medley, cache):
    records = data.load("medley", "train", medley, cache)
    rows = np.argsort(records["name"])[::-1]  # "first" first
    found = {name: column[rows].tolist() for name, column in records.items()}
    assert found == {
        "name": [b"first", b"2"],
        "pair": [[0.5, 1.5], [-1, 0]],
        "big": [2**64 - 1, 7],
        "wave": [[-3, 4, 5], [9, 0, 0]],
        "wave/length": [3, 1],
        "words": [[b"one", b"three"], [b"", b""]],
        "words/length": [2, 0],
        "boxes/corner": [[[1, 2], [3, 4]], [[0, 0], [0, 0]]],
        "boxes/corner/length": [2, 0],
        "boxes/kind": [[2, 1], [0, 0]],
        "boxes/kind/length": [2, 0],
    }
    dtypes = {"pair": "float32", "big": "uint64", "wave": "int16", "boxes/kind": "int32", "boxes/corner": "float32"}
    assert {name: records[name].dtype.name for name in dtypes} == dtypes
    parts = [getattr(column, "values", column) for column in records.values()]
    assert not any(part.dtype.hasobject or part.flags.writeable for part in parts)
    assert isinstance(records["wave"], data.Ragged)
    assert records["wave"].values.tolist() == ([-3, 4, 5, 9] if rows[0] == 0 else [9, -3, 4, 5])


def test_info_describes_ragged_and_nested_features(medley, cache):
    found = data.info("medley:1.2.0", medley, cache)
    assert found.features == {
        "name": data.Feature((), "bytes"),
        "pair": data.Feature((2,), "float32"),
        "big": data.Feature((), "uint64"),
        "wave": data.Feature((None,), "int16"),
        "words": data.Feature((None,), "bytes"),
        "boxes/corner": data.Feature((None, 2), "float32"),
        "boxes/kind": data.Feature((None,), "int32"),
    }
    assert found.classes == 3  # the only class label
    assert found.version == "1.2.0"


def test_growing_columns_keep_what_they_have(monkeypatch, medley, cache, tmp_path):
    """Chunks of one example, the longer or the shorter first: text and ragged columns grow from one to the next."""
    whole = data.load("medley", "train", medley, cache)
    monkeypatch.setattr(columns_module, "CHUNK", 1)
    for split, order in {"train": slice(None), "train[1:]+train[:1]": slice(None, None, -1)}.items():
        for name, column in data.load("medley", split, medley, str(tmp_path)).items():
            np.testing.assert_array_equal(column, whole[name][order])


def test_a_sum_of_splits_decodes_only_what_was_not_decoded_before(monkeypatch, medley, tmp_path):
    """Its parts are the cached ones, also in another sum, and what it holds and notes does not depend on them."""
    decoded, decode = [], columns_module._decode
    monkeypatch.setattr(
        columns_module, "_decode", lambda records, *rest: decoded.append(records.split) or decode(records, *rest)
    )
    load = lambda split: data.load("medley", split, medley, str(tmp_path))
    first, rest, whole = load("train[:1]"), load("train[1:]"), load("train")
    decoded.clear()
    for split, parts in {"train[1:]+train[:1]": (rest, first), "train+train[:1]": (whole, first)}.items():
        both = load(split)
        assert both.keys() == whole.keys()
        for name, column in both.items():
            padded = [np.asarray(part[name]) for part in parts]
            assert column.dtype == whole[name].dtype
            start = 0
            for part in padded:
                found = column[start : start + len(part)]
                inside = (slice(None), *map(slice, part.shape[1:]))
                np.testing.assert_array_equal(found[inside], part)
                start += len(part)
            assert len(column) == start
    assert decoded == []
    load("train[:1]+train[:2]")
    assert decoded == ["train[:2]"]


def test_the_parts_of_a_sum_alone_are_kept(medley, tmp_path):
    both = data.load("medley", "train[:1]+train[1:]", medley, str(tmp_path))
    whole = data.load("medley", "train", medley, str(tmp_path))
    kept = [path.parent.name.rpartition("-")[0] for path in tmp_path.rglob("columns.json")]
    assert sorted(kept) == ["train", "train_1_", "train_1_"]
    for name, column in both.items():
        np.testing.assert_array_equal(column, whole[name])
        assert not (column.values if isinstance(column, data.Ragged) else column).flags.writeable


def test_a_sum_may_have_empty_parts_but_not_only_such(medley, tmp_path):
    load = lambda split: data.load("medley", split, medley, str(tmp_path))
    whole = load("train")
    for split in ("train[:0]+train", "train+train[1:1]", "train[:1]+train[:0]+train[1:]"):
        for name, column in load(split).items():
            np.testing.assert_array_equal(column, whole[name])
    with pytest.raises(InputError, match=r"^split 'train\[:0\]\+train\[:0\]' of medley is empty, expected some"):
        load("train[:0]+train[:0]")


def test_columns_are_on_disk_before_the_cache_has_its_name(monkeypatch, medley, tmp_path):
    """A machine that loses its power must not leave a whole name for half of the bytes."""
    told, rename, sync = [], Path.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: told.append("sync") or sync(file))
    monkeypatch.setattr(Path, "rename", lambda path, to: told.append("name") or rename(path, to))
    data.load("medley", "train", medley, str(tmp_path))
    (listing,) = tmp_path.rglob("columns.json")
    files = len([*listing.parent.iterdir()])
    assert told == ["sync"] * (files + 1) + ["name"]  # and the names of the digests in the folder


def test_who_waited_for_another_process_does_not_decode_again(monkeypatch, medley, tmp_path):
    @contextlib.contextmanager
    def after_another(path):
        with monkeypatch.context() as other:
            other.setattr(cached_module, "locked", locked)
            data.load("medley", "train", medley, str(tmp_path))
        monkeypatch.setattr(columns_module, "_decode", None)
        yield

    locked = cached_module.locked
    monkeypatch.setattr(cached_module, "locked", after_another)
    assert data.load("medley", "train", medley, str(tmp_path))


def test_a_second_load_maps_the_cache_without_decoding(monkeypatch, cache):
    before = data.load("digits", "train", cache_dir=cache)
    monkeypatch.setattr(columns_module, "Records", None)
    after = data.load("digits", "train", cache_dir=cache)
    np.testing.assert_array_equal(before["image"], after["image"])
    assert type(after["image"]) is np.ndarray
    assert list(before) == list(after)


def test_a_changed_set_is_decoded_again(medley, cache, tmp_path):
    data.load("medley", "train", medley, str(tmp_path))
    file = Path(medley, "medley", "1.2.0", "features.json")
    os.utime(file, ns=(0, 0))
    data.load("medley", "train", medley, str(tmp_path))
    assert len(list(Path(tmp_path, "columns", "medley").iterdir())) == 2


def test_what_a_killed_process_left_is_neither_read_nor_kept(tmp_path, medley):
    data.load("medley", "train", medley, str(tmp_path))
    (listing,) = tmp_path.glob("columns/medley/*/*/columns.json")
    leftover = listing.parent.with_name(listing.parent.name + ".x.tmp")
    listing.parent.rename(leftover)
    (leftover / "name.npy").write_bytes(b"half")
    assert sorted(data.load("medley", "train", medley, str(tmp_path))["name"]) == [b"2", b"first"]
    assert not leftover.exists()


def test_processes_that_start_at_once_agree(tmp_path):
    """None of them has prepared or decoded anything yet."""
    program = "import sys, zlib; from dl_jax import data; r = data.load('digits', 'train', cache_dir=sys.argv[1]); "
    program += "print(zlib.crc32(r['image'].tobytes()), zlib.crc32(r['label'].tobytes()))"
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    records = data.load("digits", "train", cache_dir=str(tmp_path))
    expected = f"{zlib.crc32(records['image'].tobytes())} {zlib.crc32(records['label'].tobytes())}\n"
    assert outputs == [(expected, "")] * 2  # and quietly


def test_loading_imports_neither_jax_nor_tensorflow(cache):
    data.load("digits", "train", cache_dir=cache)
    program = """
        import sys
        from dl_jax import data
        heavy = lambda: {"jax", "tensorflow", "grain", "tensorflow_datasets", "sklearn"} & set(sys.modules)
        data.load("digits", "train", cache_dir=sys.argv[1])  # from the cache
        print(sorted(heavy()))
        data.streamed("digits", "train", 4, 0, cache_dir=sys.argv[1])(0)  # decodes
        print(sorted(heavy()))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), cache]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["[]", "['tensorflow_datasets']"]


def test_a_long_decode_says_so_on_stderr(monkeypatch, capsys, tmp_path, medley):
    monkeypatch.setattr(columns_module, "_PATIENCE", -1.0)
    monkeypatch.setattr(columns_module, "CHUNK", 1)
    data.load("medley", "train", medley, str(tmp_path))
    assert capsys.readouterr() == ("", "decoding medley train: 2 examples, once\n")


@pytest.mark.parametrize("times", [1, 2])
def test_a_set_beyond_the_budget_is_refused(cache, times):
    for _ in range(times):  # also when it is in the cache
        with pytest.raises(InputError, match=r"digits test takes 0 MB or more .* read it with data.stream"):
            data.load("digits", "test", cache_dir=cache, budget=360 * 68 - 1)
    assert len(data.load("digits", "test", cache_dir=cache, budget=360 * 68)["label"]) == 360


@pytest.mark.data
def test_mnist_is_what_tfds_reads(tfds_dir, tmp_path):
    import tensorflow_datasets as tfds

    test = data.load("mnist", "test", tfds_dir, str(tmp_path))
    assert test["image"].shape == (10000, 28, 28, 1)
    assert test["image"].dtype == np.uint8
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # as published
    assert np.bincount(test["label"]).tolist() == counts
    assert data.info("mnist", tfds_dir, str(tmp_path)).classes == 10
    source = tfds.data_source("mnist", data_dir=tfds_dir, split="test")
    for i in (0, 1, 255, 256, 5555, 9999):
        np.testing.assert_array_equal(test["image"][i], source[i]["image"])
        assert test["label"][i] == source[i]["label"]
    assert json.dumps(data.info("mnist", tfds_dir, str(tmp_path)).splits) == '{"train": 60000, "test": 10000}'


def test_only_the_columns_that_are_named(medley, cache, monkeypatch):
    whole = data.load("medley", "train", medley, cache)
    some = data.load("medley", "train", medley, cache, only=("words", "pair", "wave"))
    assert list(some) == ["pair", "wave", "words", "wave/length", "words/length"]
    for name, column in some.items():
        np.testing.assert_array_equal(column, whole[name])
        assert column.dtype == whole[name].dtype
    monkeypatch.setattr(columns_module, "Records", None)  # kept, whatever the order
    assert data.load("medley", "train", medley, cache, only=["wave", "words", "pair"])["words"].values.dtype == "S5"
    assert list(data.load("digits", "test", cache_dir=cache)) == ["image", "label"]


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (("words", "pear"), "data set medley has no column 'pear', expected .*pair.*did you mean pair"),
        ((), r"only is \(\), expected the names of columns of medley"),
        ("words", "only is 'words', expected the names of columns of medley, such as"),
        (("words/length",), "has no column 'words/length'"),
    ],
)
@pytest.mark.parametrize("read", [data.load, functools.partial(data.streamed, batch_size=2, seeds=0)])
def test_columns_that_are_not_there(read, only, message, medley, cache):
    with pytest.raises(InputError, match=message):
        read("medley", "train", data_dir=medley, cache_dir=cache, only=only)


def test_sequences_come_from_disk_as_from_memory(medley, cache):
    for only in (None, ("words", "wave", "boxes/corner")):
        records = data.load("medley", "train", medley, cache, only=only)
        memory = data.shuffled(records, 3, (1, 2))
        disk = data.streamed("medley", "train", 3, (1, 2), data_dir=medley, cache_dir=cache, only=only)
        for step in (0, 1, 7):
            one, other = memory(step), disk(step)
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
                assert one[name].shape == other[name].shape


@pytest.mark.data
def test_a_treebank_is_read_in_seconds_and_kept_in_little_room(tfds_dir, tmp_path):
    import tensorflow_datasets as tfds

    name = "universal_dependencies/en_ewt"
    dev = data.load(name, "dev", tfds_dir, str(tmp_path), only=("tokens", "upos"))
    text = sum(map(len, dev["tokens"].values.tolist()))
    kept = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert kept < 3 * text
    source = tfds.data_source(name, data_dir=tfds_dir, split="dev")
    for i in (0, 1, 1000, 2000):
        words, length = source[i]["tokens"], dev["tokens/length"][i]
        assert dev["tokens"][i][: length + 1].tolist() == [*words, b""][: dev["tokens"].width]
        np.testing.assert_array_equal(dev["upos"][i][:length], source[i]["upos"])
