"""The bundled sets of tokens and docstrings: what each token is, and of what each docstring is."""

import collections

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import python_code

SOURCE = '''
import os.path as p  # a comment
class Shape(Base):
    """A shape of many corners. It is drawn.

    More."""
    def area(self, scale=1.5):
        """The area it covers, in pixels"""
        return self.corners[0].size(scale, exact=True) + round(-2)

def open_all(names):
    """Opens all the files."""
    x = "a" if names else None
def short():
    """Two words"""
'''


def test_tokens_are_tagged_by_what_they_are_in_their_line():
    found = [list(zip(*line, strict=True)) for line in python_code.lines(SOURCE)]
    said = [" ".join(f"{text}/{tag}" for text, tag in line) for line in found]
    assert said[0] == "import/keyword os/module ./separator path/module as/keyword p/module"
    assert said[1] == "class/keyword Shape/class (/bracket Base/variable )/bracket :/separator"
    assert said[2] == (
        "def/keyword area/function (/bracket self/variable ,/separator scale/argument =/operator 1.5/number )/bracket "
        ":/separator"
    )
    assert said[3] == (
        "return/keyword self/variable ./separator corners/attribute [/bracket 0/number ]/bracket ./separator "
        "size/method (/bracket scale/variable ,/separator exact/argument =/operator True/keyword )/bracket +/operator "
        "round/call (/bracket -/operator 2/number )/bracket"
    )
    assert said[5] == 'x/variable =/operator "a"/string if/keyword names/variable else/keyword None/keyword'
    assert {tag for line in found for _, tag in line} <= {*python_code.TAGS}


def test_docstrings_are_cut_after_their_first_sentence():
    assert list(python_code.docstrings(SOURCE)) == [
        ("A shape of many corners.", "It is drawn. More.", "class"),
        ("The area it covers, in pixels", "", "method"),
        ("Opens all the files.", "", "function"),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def examples(part):
    """The examples of a split, to compare them with those of another one."""
    rows = lambda c: [tuple(row) for row in np.split(c.values, c.offsets[1:-1])] if isinstance(c, data.Ragged) else c
    return zip(*(rows(column) for column in part.values()), strict=True)


@pytest.mark.parametrize("name", ["python_tokens", "docstrings"])
def test_they_are_sets_like_others_and_their_splits_share_nothing(name, cache):
    described = data.info(name, cache_dir=cache)
    parts = {split: data.load(name, split, cache_dir=cache) for split in described.splits}
    assert described.splits.keys() == {"train", "validation", "test"}
    assert described.splits["train"] > 4 * described.splits["test"] > 100
    train, validation, test = (set(examples(part)) for part in parts.values())
    assert not (train & validation) | (validation & test) | (train & test)


def test_a_token_alone_does_not_tell_all(cache):
    """What a token is depends on its neighbours: the most frequent tag of each token errs more than a tagger has to."""
    train, test = (data.load("python_tokens", split, cache_dir=cache) for split in ("train", "test"))
    tags: dict = collections.defaultdict(collections.Counter)
    for token, tag in zip(train["tokens"].values.tolist(), train["tags"].values.tolist(), strict=True):
        tags[token][tag] += 1
    guess = [tags[token].most_common(1)[0][0] if token in tags else 1 for token in test["tokens"].values.tolist()]
    assert 0.8 < np.mean(guess == test["tags"].values) < 0.95
    assert set(np.unique(train["tags"].values)) == set(range(len(python_code.TAGS)))


def test_a_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(python_code.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"this Python has no source text in .*, expected its standard library"):
        next(python_code.sources("*.py", 100))
