"""Sets that TFDS lacks: their parsers, and downloads from a server of the test's own."""

import gzip
import hashlib
import http.server
import io
import itertools
import json
import sys
import tarfile
import threading
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.core.stream import Columns
from dl_jax.data import audio_sets, downloads, music_sets, source, tabular_sets, text_sets
from dl_jax.data.builder import Example, Key
from dl_jax.data.prepare import prepare

SETS = list(source.DOWNLOADED.values())


class Server:
    """Serves `files`, {path: content or exceptional status}, and counts the requests for each path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | list[int | bytes]] = {}
        self.asked: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                content = server.files.get(self.path, [404])
                answer = content.pop(0) if isinstance(content, list) and len(content) > 1 else content
                answer = answer[0] if isinstance(answer, list) else answer
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                torn = answer.endswith(b"TORN")
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer) + 100 * torn))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def tar(**files: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"rt-polaritydata/rt-polarity.{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


# The parsers


def test_tagged_sentences():
    text = (
        '\n@a\tO\n"\tO\n\u2028\tB-product\n\x85x\tI-product\n'  # no other end of a line is one
        "\t\n\n \t\nEmpire State\tB-location\r\n\r\n&lt;\tO"  # blank lines of all kinds, a blank within
    )
    assert text_sets.tagged({"dev": text, "test": "a\tI-person\n\n"}) == {
        "dev": [
            (0, {"tokens": ["@a", '"', "\u2028", "\x85x"], "ner": ["O", "O", "B-product", "I-product"]}),
            (1, {"tokens": ["Empire State"], "ner": ["B-location"]}),
            (2, {"tokens": ["&lt;"], "ner": ["O"]}),
        ],
        "test": [(0, {"tokens": ["a"], "ner": ["I-person"]})],
    }


def test_reviews_in_latin_1_and_their_splits():
    lines = [f" sentence\x85 {i} . \n" for i in range(21)]
    splits = text_sets.reviews({"neg": "".join(lines[:10]), "pos": "".join(lines).replace("\n", "\r\n")})
    assert {split: [key for key, _ in examples] for split, examples in splits.items()} == {
        "train": [*(f"neg{i}" for i in range(8)), *(f"pos{i}" for i in (*range(8), *range(10, 18), 20))],
        "validation": ["neg8", "pos8", "pos18"],
        "test": ["neg9", "pos9", "pos19"],
    }
    assert splits["test"][0] == ("neg9", {"text": "sentence\x85 9 .", "label": "negative"})
    assert splits["test"][2] == ("pos19", {"text": "sentence\x85 19 .", "label": "positive"})


HEADER = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"


def test_pairs_of_sentences():
    text = HEADER + '7\tA "dog" runs \tNo dog runs\t3.665\tCONTRADICTION\r\n9999\tA\tB\t5\tENTAILMENT\n'
    first = {"sentence_A": 'A "dog" runs ', "sentence_B": "No dog runs", "label": "CONTRADICTION"}
    second = {"sentence_A": "A", "sentence_B": "B", "label": "ENTAILMENT"}
    assert text_sets.pairs({"train": text, "test": HEADER}) == {
        "train": [
            (7, {"pair_ID": 7, "relatedness_score": 3.665, **first}),
            (9999, {"pair_ID": 9999, "relatedness_score": 5.0, **second}),
        ],
        "test": [],
    }


def test_translations():
    files = {"en": 'Two "men".\nA\tman \n', "de": " Zwei Männer.\r\nEin\xa0Mann\n", "fr": "Deux\u2028hommes.\nUn homme"}
    splits = text_sets.translations({f"test.{language}": text for language, text in files.items()})
    assert splits == {
        "test": [
            (0, {"en": 'Two "men".', "de": "Zwei Männer.", "fr": "Deux\u2028hommes."}),
            (1, {"en": "A\tman", "de": "Ein\xa0Mann", "fr": "Un homme"}),
        ]
    }


def wav(samples: np.ndarray, channels: int = 1, rate: int = 8000) -> bytes:
    """A WAV file of these samples, int16 or uint8."""
    file = io.BytesIO()
    with wave.open(file, "wb") as audio:
        audio.setnchannels(channels)
        audio.setsampwidth(samples.itemsize)
        audio.setframerate(rate)
        audio.writeframes(samples.tobytes())
    return file.getvalue()


def test_spoken_digits():
    first, second = np.array([-32768, 0, 32767], np.int16), np.array([5], np.int16)
    splits = audio_sets.digits({"7_theo_4.wav": wav(first), "0_george_5.wav": wav(second)})
    assert {split: [key for key, _ in examples] for split, examples in splits.items()} == {
        "train": ["0_george_5.wav"],
        "test": ["7_theo_4.wav"],
    }
    example = dict(splits["test"][0][1])
    np.testing.assert_array_equal(example.pop("audio"), first)
    assert example == {"audio/filename": "7_theo_4.wav", "label": "7", "speaker": "theo"}
    with pytest.raises(InputError, match=r"the file 0_nobody_0.wav is unknown, expected names such as 0_george_0.wav"):
        audio_sets.digits({"0_nobody_0.wav": wav(first)})


SAMPLES = np.arange(6, dtype=np.int16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "is no WAV file"),
        (wav(SAMPLES)[:30], "is no WAV file"),
        (wav(SAMPLES, channels=2), "has 2 channels of 16 bits at 8000 Hz and 12 bytes, expected 1 channel of 16 bits"),
        (wav(SAMPLES, rate=44100), "has 1 channels of 16 bits at 44100 Hz"),
        (wav(SAMPLES.astype(np.uint8)), "has 1 channels of 8 bits"),
        (wav(SAMPLES)[:-2], ".*and 10 bytes, expected .* and 6 samples"),
    ],
)
def test_a_damaged_recording_is_one_line_that_names_the_file(content, message):
    with pytest.raises(InputError, match=f"the file 0_theo_0.wav {message}") as error:
        audio_sets.digits({"0_theo_0.wav": content})
    assert "\n" not in str(error.value)


def test_spoken_digits_are_downloaded_from_an_archive_that_is_opened_once(server, monkeypatch, tmp_path):
    files = {f"{d}_{s}_{i}.wav": wav(SAMPLES[: 1 + d]) for d in range(6) for s in ("theo", "lucas") for i in (0, 5)}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(f"fsdd/{name}", content)
    server.files["/fsdd.zip"] = archive.getvalue()
    each = audio_sets.FSDD._replace(
        files={name: (f"{server.address}/fsdd.zip#fsdd/{name}",) for name in files},
        digests={split: downloads.digest(examples) for split, examples in audio_sets.digits(files).items()},
    )
    monkeypatch.setitem(source.DOWNLOADED, "fsdd", each)
    prepare("fsdd", str(tmp_path))
    assert server.asked == ["/fsdd.zip"]
    assert data.info("fsdd", str(tmp_path), str(tmp_path / "cache")).rate == 8000
    test = data.load("fsdd", "test", str(tmp_path), str(tmp_path / "cache"))
    for row, digit in zip(test["audio"], test["label"], strict=True):
        assert row.tolist() == [*range(1 + digit), *[0] * (5 - digit)]


def mat(**splits: Any) -> bytes:
    """A file of MATLAB's in which each split is a cell array of pieces."""
    from scipy.io import savemat

    file, cells = io.BytesIO(), {}
    for name, pieces in splits.items():
        cells[name] = np.empty((1, len(pieces)), object)
        for i, piece in enumerate(pieces):
            cells[name][0, i] = piece
    savemat(file, cells)
    return file.getvalue()


rng = np.random.default_rng(0)
PIECES = [(rng.random((steps, 88)) < 0.1).astype(float) for steps in (3, 1, 4, 3, 3, 2, 2)]
MUSIC = mat(traindata=PIECES[:4], validdata=PIECES[4:5], testdata=PIECES[5:])


def test_piano_rolls_in_the_order_of_the_file():
    splits = music_sets.piano_rolls({"mat": MUSIC})
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 4, "validation": 1, "test": 2}
    assert [key for key, _ in splits["train"]] == [0, 1, 2, 3]
    for (_, example), piece in zip(itertools.chain(*splits.values()), PIECES, strict=True):
        assert example["notes"].dtype == np.uint8
        np.testing.assert_array_equal(example["notes"], piece)


def test_piano_rolls_are_downloaded_and_keep_their_order(server, monkeypatch, tmp_path):
    server.files["/JSB_Chorales.mat"] = MUSIC
    splits = music_sets.piano_rolls({"mat": MUSIC})
    each = music_sets.JSB_CHORALES._replace(
        files={"mat": (f"{server.address}/JSB_Chorales.mat",)},
        digests={split: downloads.digest(examples) for split, examples in splits.items()},
    )
    monkeypatch.setitem(source.DOWNLOADED, "jsb_chorales", each)
    prepare("jsb_chorales", str(tmp_path))
    train = data.load("jsb_chorales", "train", str(tmp_path), str(tmp_path / "cache"))
    assert train["notes/length"].tolist() == [3, 1, 4, 3]
    for row, length, piece in zip(np.asarray(train["notes"]), train["notes/length"], PIECES[:4], strict=True):
        np.testing.assert_array_equal(row[:length], piece)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "cannot be read, expected a file of MATLAB's"),
        (MUSIC[:400], "cannot be read|has nothing"),
        (mat(traindata=PIECES, testdata=PIECES), "has nothing as validdata, expected a cell array of pieces"),
        (
            mat(traindata=[PIECES[0], np.zeros((0, 88))]),
            r"has \(0, 88\) for piece 1 of train, expected one step or more",
        ),
        (mat(traindata=[np.zeros((3, 89)), PIECES[0]]), r"has \(3, 89\) for piece 0 of train, .* of 88 keys"),
        (mat(traindata=[PIECES[0], 2 * PIECES[0]]), "has other values than 0 and 1 in piece 1 of train"),
        (mat(traindata=[PIECES[0], np.full((2, 88), np.nan)]), "has other values than 0 and 1 in piece 1"),
        (mat(traindata=[PIECES[0], 21 + PIECES[1]]), "has other values than 0 and 1 in piece 1"),  # numbers of keys
    ],
)
def test_damaged_piano_rolls_are_one_line_that_names_the_piece(content, message):
    with pytest.raises(InputError, match=f"the file of piano rolls {message}") as error:
        music_sets.piano_rolls({"mat": content})
    assert "\n" not in str(error.value)


TABLE = {  # as numpy.savetxt writes it, and as people do
    "data.txt": "  0.1 2e0\t-3 \n1.000000000000000056e-01 5 6\n\n0.1 7 0.30000001192092896\n",
    "index_features.txt": "2\n0\n",
    "index_target.txt": "1.000000000000000000e+00\n",
    "index_test_0.txt": "2.000000000000000000e+00\n0\n",
    "index_test_1.txt": "1\n",
}


def test_a_table_with_its_splits():
    examples = tabular_sets.table(TABLE)["full"]
    assert [key for key, _ in examples] == [example["row"] for _, example in examples] == [0, 1, 2]
    assert [example["x"].tolist() for _, example in examples] == np.float32([[-3, 0.1], [6, 0.1], [0.3, 0.1]]).tolist()
    assert [example["y"].item() for _, example in examples] == [2, 5, 7]
    assert [example["test_in_splits"].tolist() for _, example in examples] == [[1, 0], [0, 1], [1, 0]]
    dtypes = {name: np.asarray(value).dtype.name for name, value in examples[0][1].items()}
    assert dtypes == {"x": "float32", "y": "float32", "row": "int64", "test_in_splits": "uint8"}


def test_a_table_is_downloaded_as_a_config(server, monkeypatch, tmp_path):
    server.files |= {f"/{name}": text.encode() for name, text in TABLE.items()}
    each = source.DOWNLOADED["uci_regression/yacht"]
    each = each._replace(
        files={name: (f"{server.address}/{name}",) for name in TABLE},
        features={**each.features, "x": downloads.Tensor((2,), np.float32),
                  "test_in_splits": downloads.Tensor((2,), np.uint8)},
        digests={"full": downloads.digest(tabular_sets.table(TABLE)["full"])},
    )  # fmt: skip
    monkeypatch.setitem(source.DOWNLOADED, "uci_regression/yacht", each)
    found = prepare("uci_regression/yacht:1.0.0", str(tmp_path))
    assert found.folder == tmp_path / "uci_regression" / "yacht" / "1.0.0"
    full = data.load("uci_regression", "full", str(tmp_path), str(tmp_path / "cache"))  # the only config
    np.testing.assert_array_equal(full["x"], np.float32([[-3, 0.1], [6, 0.1], [0.3, 0.1]]))
    assert {name: full[name].tolist() for name in ("y", "row")} == {"y": [2, 5, 7], "row": [0, 1, 2]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "uci_regression",
            "expected uci_regression/boston or uci_regression/concrete or .* or uci_regression/yacht; use",
        ),
        ("uci_regression/year", "expected uci_regression/boston or"),
        ("uci_regression/wine:2.0.0", "expected uci_regression/wine or uci_regression/wine:1.0.0; use"),
    ],
)
def test_a_config_is_needed_where_there_are_several(name, message, tmp_path):
    with pytest.raises(InputError, match=f"data set {name} is unknown, {message}"):
        prepare(name, str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.txt": "1 2 3\n4 5\n"}, "data.txt has the row '4 5', expected 3 numbers with spaces between"),
        ({"data.txt": "1 2 3\n4 5 x\n"}, "data.txt has the row '4 5 x'"),
        ({"data.txt": "<html>"}, "data.txt has the row '<html>'"),
        ({"data.txt": ""}, "data.txt is empty, expected rows of numbers"),
        ({"data.txt": "1 2 3\n4 inf 6\n"}, "data.txt has something in row 1 that is not finite, expected numbers"),
        ({"data.txt": "1 2 3\n# 4 5 6\n"}, "data.txt has the row '# 4 5 6', expected 3 numbers"),
        ({"index_features.txt": "0\n3\n"}, "index_features.txt has 3, expected columns of the table, 0 to 2"),
        ({"index_features.txt": ""}, "index_features.txt is empty, expected columns of the table, 0 to 2"),
        ({"index_features.txt": "0.5\n"}, "index_features.txt has 0.5, expected columns"),
        ({"index_target.txt": "1\n2\n"}, "index_target.txt has 2 numbers, expected one"),
        ({"index_test_1.txt": "-1\n"}, "index_test_1.txt has -1, expected rows of the table, 0 to 2"),
        ({"index_test_0.txt": "nan\n"}, "index_test_0.txt has nan, expected rows"),
    ],
)
def test_a_damaged_table_is_one_line_that_names_the_file(change, message):
    with pytest.raises(InputError, match=f"the file {message}") as error:
        tabular_sets.table({**TABLE, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parse", "files", "message"),
    [
        (
            text_sets.tagged,
            {"dev": "a\tO\nb O\n"},
            r"line 2 of the file dev is 'b O', expected a token, a tab and one of O",
        ),
        (text_sets.tagged, {"dev": "a\tO\n\nb\tB-place"}, r"line 3 of the file dev is 'b\\tB-place', expected a token"),
        (text_sets.tagged, {"dev": "\tO\n"}, r"line 1 of the file dev is '\\tO'"),
        (text_sets.tagged, {"dev": "a\tO\tO\n"}, "line 1"),
        (text_sets.tagged, {"dev": "<html>" + "x" * 999}, "line 1 of the file dev is '<html>x{74}', expected"),
        (text_sets.reviews, {"neg": "a\n", "pos": "a\n \nb\n"}, "line 2 of the file pos is ' ', expected a sentence"),
        (text_sets.reviews, {"neg": "", "pos": "a\n"}, "line 1 of the file neg is ''"),
        (
            text_sets.pairs,
            {"test": "1\tA\tB\t3\tNEUTRAL\n"},
            "line 1 of the file test is .* expected the columns pair_ID",
        ),
        (
            text_sets.pairs,
            {"test": HEADER + "1\tA\tB\t3\n"},
            r"line 2 of the file test is '1\\tA\\tB\\t3', expected a number",
        ),
        (text_sets.pairs, {"test": HEADER + "1\tA\tB\tthree\tNEUTRAL\n"}, "line 2"),
        (text_sets.pairs, {"test": HEADER + "1\tA\tB\tnan\tNEUTRAL\n"}, "line 2 .* expected a score of 1 to 5"),
        (text_sets.pairs, {"test": HEADER + "1\tA\tB\t5.1\tNEUTRAL\n"}, "line 2 .* expected a score of 1 to 5"),
        (text_sets.pairs, {"test": HEADER + "1\tA\tB\t3\tneutral\n"}, "one of CONTRADICTION, NEUTRAL, ENTAILMENT"),
        (
            text_sets.translations,
            {"val.en": "a\n\nb\n", "val.de": "a\n", "val.fr": "a\n"},
            "line 2 of the file val.en is ''",
        ),
        (
            text_sets.translations,
            {"val.en": "a\nb\n", "val.de": "a\n", "val.fr": "a\nb\n"},
            "val.en with 2 lines, val.de with 1 lines, val.fr with 2 lines do not correspond",
        ),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_line(parse, files, message):
    with pytest.raises(InputError, match=message) as error:
        parse(files)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


# Digests


def test_a_digest_is_of_examples_and_keys_in_any_order():
    one, two = (1, {"text": "a\n", "label": "x"}), (10, {"label": "y", "text": 'é"'})
    digest = downloads.digest([one, two])
    assert digest == downloads.digest([two, ("1", {"label": "x", "text": "a\n"})])
    lines = ['["1", {"label": "x", "text": "a\\n"}]', '["10", {"label": "y", "text": "\\u00e9\\""}]']
    assert digest == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    kept = downloads.digest([(1, {"x": array})])
    assert kept == downloads.digest([(1, {"x": np.asfortranarray(array.astype(">i2"))})])
    assert kept not in [downloads.digest([(1, {"x": x})]) for x in (array + 1, array.T, array.astype(np.int32))]
    for other in ([one], [one, two, two], [(2, one[1]), two], [one, (10, {"text": 'e"', "label": "y"})]):
        assert downloads.digest(other) != digest


@pytest.mark.parametrize("each", SETS, ids=lambda each: each.name)
def test_what_is_known_of_a_set_is_complete(each):
    assert all(len(digest) == 64 for digest in each.digests.values())
    assert all(address.startswith("https://") for addresses in each.files.values() for address in addresses)
    assert each.target is None or set(each.target) <= set(each.features)
    assert all(each[:6])
    with pytest.raises(InputError, match=f"`python -m dl_jax.data prepare {each.name} --data-dir nowhere`"):
        source.find(each.name, "nowhere")


# Downloads


def reviews_at(address: str, *mirrors: str) -> downloads.Downloaded:
    archives = (f"{address}/rt.tar.gz", *mirrors)
    names = {file: tuple(f"{each}#rt-polaritydata/rt-polarity.{file}" for each in archives) for file in ("neg", "pos")}
    digests = {split: downloads.digest(examples) for split, examples in text_sets.reviews(TEXTS).items()}
    return text_sets.ROTTEN_TOMATOES._replace(files=names, digests=digests)


TEXTS = {"neg": "".join(f"bad \x96 {i} \n" for i in range(20)), "pos": "".join(f"café {i} \n" for i in range(10))}
ARCHIVE = tar(**{name: text.encode("latin-1") for name, text in TEXTS.items()})


def test_a_set_is_downloaded_and_prepared_without_tensorflow(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(source.DOWNLOADED, "rotten_tomatoes_mr", reviews_at(server.address))
    server.files["/rt.tar.gz"] = ARCHIVE
    found = prepare("rotten_tomatoes_mr:1.0.0", str(tmp_path))
    assert (found, server.asked) == (prepare("rotten_tomatoes_mr", str(tmp_path)), ["/rt.tar.gz"])
    assert source.split_sizes(found) == {"train": 24, "validation": 3, "test": 3}
    train = data.load("rotten_tomatoes_mr", "train", str(tmp_path), str(tmp_path / "cache"))
    expected = [(example["text"].encode(), example["label"]) for _, example in text_sets.reviews(TEXTS)["train"]]
    names = np.array(["negative", "positive"])
    assert sorted(zip(train["text"], names[train["label"]], strict=True)) == sorted(expected)
    described = json.loads((found.folder / "dataset_info.json").read_text())
    assert described["redistributionInfo"]["license"] == "none stated"
    assert "Pang" in described["citation"]
    assert capsys.readouterr() == ("", "")
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["rotten_tomatoes_mr:2.0.0", "rotten_tomatoes_mr/small"])
def test_another_version_or_config_is_refused(name, tmp_path):
    with pytest.raises(
        InputError, match=f"data set {name} is unknown, expected rotten_tomatoes_mr or rotten_tomatoes_mr:1"
    ):
        prepare(name, str(tmp_path))


@pytest.mark.parametrize("name", ["wnut18", "wnut1!"])
@pytest.mark.parametrize("find", [prepare, source.find])
def test_a_misspelt_name_gets_a_hint(name, find, tmp_path):
    with pytest.raises(InputError, match=r"; did you mean wnut17\?"):
        find(name, str(tmp_path))


def test_other_examples_are_refused_and_nothing_is_written(server, monkeypatch, tmp_path):
    monkeypatch.setitem(source.DOWNLOADED, "rotten_tomatoes_mr", reviews_at(server.address))
    server.files["/rt.tar.gz"] = tar(neg=TEXTS["neg"].encode("latin-1"), pos=TEXTS["pos"].encode("latin-1")[:-8])
    with pytest.raises(
        InputError, match="the split test of rotten_tomatoes_mr has 2 examples with the digest"
    ) as error:
        prepare("rotten_tomatoes_mr", str(tmp_path))
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [".rotten_tomatoes_mr.lock"]
    server.files["/rt.tar.gz"] = ARCHIVE  # the next attempt starts anew
    assert source.split_sizes(prepare("rotten_tomatoes_mr", str(tmp_path)))["test"] == 3


@pytest.mark.parametrize(
    ("answer", "asked", "reason"),
    [
        ([503, 500, ARCHIVE], 3, ""),
        ([ARCHIVE[:99] + b"TORN", ARCHIVE], 2, ""),
        ([404], 1, "HTTPError: HTTP Error 404: Not Found"),
        ([503], 3, "HTTPError: HTTP Error 503"),
        ([ARCHIVE[:99] + b"TORN"], 3, "IncompleteRead"),
        (ARCHIVE[:99], 1, "EOFError|ReadError"),
        (b"<html>please log in</html>", 1, "ReadError"),
        (tar(), 1, "KeyError"),
    ],
    ids=("errors", "torn once", "absent", "always an error", "always torn", "cut", "a page", "no such member"),
)
def test_attempts(server, tmp_path, answer, asked, reason):
    server.files["/rt.tar.gz"] = list(answer) if isinstance(answer, list) else answer
    missing = f"{server.address}/elsewhere.tar.gz"
    each = reviews_at(server.address)
    if not reason:
        downloads.prepare(each, tmp_path)
        assert server.asked == ["/rt.tar.gz"] * asked
        return
    with pytest.raises(InputError, match=f"cannot download the file ... of rotten_tomatoes_mr .*({reason})") as error:
        downloads.prepare(each, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    downloads.prepare(reviews_at(server.address, missing, f"file://{kept(tmp_path)}"), tmp_path)  # a mirror has it


def kept(folder: Path) -> Path:
    file = folder / "mirror.tar.gz"
    file.write_bytes(ARCHIVE)
    return file


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "PAUSES", (0.0,))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(source.DOWNLOADED, "rotten_tomatoes_mr", reviews_at("http://127.0.0.1:9"))
    with pytest.raises(InputError, match=r"from http://127.0.0.1:9/.* \(URLError: .*refused.*\): expected a network"):
        prepare("rotten_tomatoes_mr", str(tmp_path))


def test_files_of_all_kinds_and_their_encoding(server):
    text = "naïve\n"
    server.files |= {
        "/a.txt": text.encode(),
        "/a.gz": gzip.compress(text.encode()),
        "/a.zip": zipped("inner.txt", text.encode()),
        "/b.txt": text.encode("latin-1"),
    }
    each = text_sets.WNUT17._replace(
        files={
            "a": ("/a.txt",),
            "b": ("/a.gz",),
            "c": ("/a.zip#inner.txt",),
            "d": ("/b.txt", "/a.txt"),
            "e": ("/b.txt",),
        }
    )
    each = each._replace(files={name: tuple(server.address + end for end in ends) for name, ends in each.files.items()})
    for file in "abcd":
        assert downloads._content(each, file, downloads._opened) == text
    with pytest.raises(InputError, match="UnicodeDecodeError"):
        downloads._content(each, "e", downloads._opened)


# The prepared sets


def keys(name: str, split: str, columns: Columns, size: int) -> list[Key]:
    """The keys of the examples of a split, in the order in which TFDS stores them."""
    from tensorflow_datasets.core import hashing

    fate = {8: "validation", 9: "test"}
    known: dict[str, list[Key]] = {
        "rotten_tomatoes_mr": [
            f"{c}{i}" for c in ("neg", "pos") for i in range(5331) if fate.get(i % 10, "train") == split
        ],
        "sick2014": [int(pair) for pair in columns.get("pair_ID", [])],
        "fsdd": [file.decode() for file in columns.get("audio/filename", [])],
    }
    if source.DOWNLOADED[name].in_order:
        return [*range(size)]
    return sorted(known.get(name, range(size)), key=hashing.Hasher(split).hash_key)


def plain(value: Any, kind: Any) -> Any:
    """A value that was loaded, as the parser gave it."""
    if isinstance(kind, tuple):
        return kind[value]
    return value.decode() if kind is str else int(value) if kind is np.int32 else float(str(value))


def values(columns: Columns, name: str, kind: Any) -> list[Any]:
    """A column that was loaded, as the parser gave it."""
    if isinstance(kind, downloads.Tensor) and None not in kind.shape:
        return list(columns[name])
    if isinstance(kind, downloads.Tensor):
        lengths = columns[f"{name}/length"]
        return [row[:length] for row, length in zip(columns[name], lengths, strict=True)]
    if isinstance(kind, list):
        flat = (plain(value, kind[0]) for value in columns[name].values.tolist())
        return [list(itertools.islice(flat, length)) for length in columns[f"{name}/length"]]
    return [plain(value, kind) for value in columns[name]]


def examples_of(each: downloads.Downloaded, split: str, data_dir: str, cache: Path) -> list[tuple[Key, Example]]:
    """The examples of a prepared split with their keys, in the order in which they are stored."""
    columns = data.load(each.name, split, data_dir, str(cache))
    listed = {name: values(columns, name, kind) for name, kind in each.features.items()}
    examples = [dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True)]
    return list(zip(keys(each.name, split, columns, len(examples)), examples, strict=True))


@pytest.fixture
def prepared_dir(tfds_dir, each) -> str:
    if not Path(tfds_dir, each.name, each.version).is_dir():
        pytest.skip(f"TFDS_DATA_DIR holds no prepared {each.name}")
    return tfds_dir


@pytest.mark.data
@pytest.mark.parametrize("each", SETS, ids=lambda each: each.name)
def test_the_prepared_set_has_the_expected_digests(each, prepared_dir, tmp_path):
    found = {split: downloads.digest(examples_of(each, split, prepared_dir, tmp_path)) for split in each.digests}
    assert found == each.digests


# As listed, with their sizes, for the files at GitHub in Hugging Face's dataset_infos.json of wnut_17.
PUBLISHED = {
    "train": "731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5",
    "dev": "e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8",
    "test": "2aa79b764e56ec9264a1b30fdd9b70195bd00ff400b62edd8f399d5f13c178f0",
}
AS_IN_2010 = 2394  # sentences of `train` that are followed by a tab


@pytest.mark.data
@pytest.mark.parametrize("each", [text_sets.WNUT17], ids=lambda each: each.name)
def test_the_published_files_give_the_prepared_records_in_their_order(each, prepared_dir, server, tmp_path):
    for split, published in PUBLISHED.items():
        examples = sorted(examples_of(each, split, prepared_dir, tmp_path / "cache"), key=lambda pair: int(pair[0]))
        rows = ["".join(f"{t}\t{tag}\n" for t, tag in zip(e["tokens"], e["ner"], strict=True)) for _, e in examples]
        tabs = AS_IN_2010 if split == "train" else 0
        content = "".join(row + ("\t\n" if i < tabs else "\n") for i, row in enumerate(rows)).encode()
        assert hashlib.sha256(content).hexdigest() == published
        server.files[f"/{split}"] = content
    downloads.prepare(each._replace(files={s: (f"{server.address}/{s}",) for s in PUBLISHED}), tmp_path)
    here, there = (Path(folder, each.name, each.version) for folder in (tmp_path, prepared_dir))
    for file in ("features.json", "ner.labels.txt"):
        assert (here / file).read_text() == (there / file).read_text()
    for split in PUBLISHED:
        ours, theirs = (
            examples_of(each, split, folder, tmp_path / "cache") for folder in (str(tmp_path), prepared_dir)
        )
        assert ours == theirs


@pytest.mark.data
@pytest.mark.parametrize("each", tabular_sets.UCI_REGRESSION[::8], ids=lambda each: each.name)
def test_files_recreated_from_the_prepared_set_are_parsed_as_it(each, prepared_dir, tmp_path):
    columns = data.load(each.name, "full", prepared_dir, str(tmp_path))
    features = columns["x"].shape[1]
    rows = np.concatenate([columns["x"], columns["y"][:, None]], 1)
    files = {
        "data.txt": "\n".join(" ".join(map(str, row)) for row in rows),
        "index_features.txt": "\n".join(map(str, range(features))),
        "index_target.txt": f"{features}\n",
    }
    for k, test in enumerate(columns["test_in_splits"].T):
        files[f"index_test_{k}.txt"] = "\n".join(map(str, np.flatnonzero(test)))
    assert sorted(files) == sorted(each.files)
    assert downloads.digest(tabular_sets.table(files)["full"]) == each.digests["full"]
