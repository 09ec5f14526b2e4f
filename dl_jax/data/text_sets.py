"""Four sets of texts that TFDS lacks, and that `python -m dl_jax.data prepare` downloads.

For each there is its parser, a pure function of texts, and then what is known of its source as plain data. The keys of
the examples decide their order (see `downloads.digest`).
"""

import itertools
from collections.abc import Mapping

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.data.builder import Example, Key
from dl_jax.data.downloads import Downloaded, Splits

_GITHUB = "https://raw.githubusercontent.com"


def _lines(text: str) -> list[str]:
    """The lines of a text. Only a line feed ends one: sentences hold characters that `str.splitlines` splits at."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _damaged(file: str, number: int, line: str, expected: str) -> InputError:
    return InputError(
        f"line {number} of the file {file} is {line[:80]!r}, expected {expected}: the file was damaged on the way or "
        "has changed at its source; try again, or report it if the line stays the same"
    )


# WNUT-17: named entities

ENTITIES = ("corporation", "creative-work", "group", "location", "person", "product")
TAGS = ("O", *(f"{place}-{entity}" for entity in ENTITIES for place in "BI"))


def tagged(files: Mapping[str, str]) -> Splits:
    """Sentences with BIO2 tags, from files of lines "TOKEN<tab>TAG". A line of white space ends a sentence."""
    return {split: _sentences(split, text) for split, text in files.items()}


def _sentences(file: str, text: str) -> list[tuple[Key, Example]]:
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(_lines(text), 1):
        token, _, tag = line.partition("\t")
        if not line.strip():
            sentences.append([])
        elif not token or tag not in TAGS:
            raise _damaged(file, number, line, f"a token, a tab and one of {', '.join(TAGS)}")
        else:
            sentences[-1].append((token, tag))
    whole = [zip(*sentence, strict=True) for sentence in sentences if sentence]
    return [(key, {"tokens": list(tokens), "ner": list(tags)}) for key, (tokens, tags) in enumerate(whole)]


_WNUT = f"{_GITHUB}/leondz/emerging_entities_17/a12ed2349a0b1916b6389a4ecc2e2ddb737e51f8"
_WNUT_HOME = "https://noisy-text.github.io/2017/files"
WNUT17 = Downloaded(
    name="wnut17",
    version="1.0.0",
    description="Rare and emerging named entities in posts of Twitter, Reddit, YouTube and StackExchange.",
    homepage="https://noisy-text.github.io/2017/emerging-rare-entities.html",
    licence="CC BY 4.0",
    citation="L. Derczynski, E. Nichols, M. van Erp and N. Limsopatham, Results of the WNUT2017 shared task on novel "
    "and emerging entity recognition, W-NUT 2017",
    features={"tokens": [str], "ner": [TAGS]},
    files={
        "train": (f"{_WNUT}/wnut17train.conll", f"{_WNUT_HOME}/wnut17train.conll"),
        "dev": (f"{_WNUT}/emerging.dev.conll", f"{_WNUT_HOME}/emerging.dev.conll"),
        "test": (f"{_WNUT}/emerging.test.annotated", f"{_WNUT_HOME}/emerging.test.annotated"),
    },
    parse=tagged,
    digests={
        "train": "2284a1a37ecaf011a187e66a226f3d18de7209a9a26f4f0f5aefe96e2688fc01",
        "dev": "c8eef4b8d7c6db6a4b0abda2c486f599879448612ed3480633da15e3060eae6c",
        "test": "139fd5ba9a54f697836026e530931e44f235482d8d998fe3bbc7c38c9ec149b9",
    },
)


# MR: sentiment


def reviews(files: Mapping[str, str]) -> Splits:
    """Sentences of film reviews, from a file with one in each line for either class, without splits.

    Of ten lines in a row of each file the ninth goes to `validation` and the tenth to `test`.
    """
    splits: dict[str, list[tuple[Key, Example]]] = {"train": [], "validation": [], "test": []}
    for file, label in (("neg", "negative"), ("pos", "positive")):
        for i, line in enumerate(_lines(files[file])):
            text = line.strip()
            if not text:
                raise _damaged(file, i + 1, line, "a sentence")
            split = {8: "validation", 9: "test"}.get(i % 10, "train")
            splits[split].append((f"{file}{i}", {"text": text, "label": label}))
    return splits


_MR = (
    "https://www.cs.cornell.edu/people/pabo/movie-review-data/rt-polaritydata.tar.gz",
    "https://storage.googleapis.com/seldon-datasets/sentence_polarity_v1/rt-polaritydata.tar.gz",
)
ROTTEN_TOMATOES = Downloaded(
    name="rotten_tomatoes_mr",
    version="1.0.0",
    description="Positive and negative sentences of film reviews: sentence polarity v1.0, known as MR, in splits "
    "of ours.",
    homepage="https://www.cs.cornell.edu/people/pabo/movie-review-data/",
    licence="none stated",
    citation="B. Pang and L. Lee, Seeing stars: exploiting class relationships for sentiment categorization with "
    "respect to rating scales, ACL 2005",
    features={"text": str, "label": ("negative", "positive")},
    files={
        "neg": tuple(f"{archive}#rt-polaritydata/rt-polarity.neg" for archive in _MR),
        "pos": tuple(f"{archive}#rt-polaritydata/rt-polarity.pos" for archive in _MR),
    },
    parse=reviews,
    digests={
        "train": "74ab3ee649699434d16f03b11a7d075cf03e6cd788d973e84d5c783c2bb546f7",
        "validation": "e0c8cc136969e1fedfdc20e9015a19fdba535ce80620f7da6609a0512a9d1708",
        "test": "c309299a1c5c27533493c8a7a81ce13a0993d6ce98e916b3665d5e971bed004d",
    },
    target=("text", "label"),
    encoding="latin-1",
)


# SICK: relatedness and entailment of two sentences

COLUMNS = ("pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")
JUDGMENTS = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")


def pairs(files: Mapping[str, str]) -> Splits:
    """Pairs of sentences, from files of tab-separated columns with a header. Blanks around sentences are kept."""
    return {split: _pairs(split, text) for split, text in files.items()}


def _pairs(file: str, text: str) -> list[tuple[Key, Example]]:
    header, *rows = _lines(text)
    if tuple(header.split("\t")) != COLUMNS:
        raise _damaged(file, 1, header, f"the columns {', '.join(COLUMNS)}, with tabs between them")
    return [_pair(file, number, row) for number, row in enumerate(rows, 2)]


def _pair(file: str, number: int, row: str) -> tuple[Key, Example]:
    try:
        key, first, second, score, judgment = row.split("\t")
        pair, relatedness = int(key), float(score)
    except ValueError:
        raise _damaged(
            file, number, row, "a number, two sentences, a score and a judgment, with tabs between"
        ) from None
    if not 1 <= relatedness <= 5 or judgment not in JUDGMENTS:
        raise _damaged(file, number, row, f"a score of 1 to 5 and one of {', '.join(JUDGMENTS)} at its end")
    example = {"sentence_A": first, "sentence_B": second, "relatedness_score": relatedness, "label": judgment}
    return pair, {"pair_ID": pair, **example}


_SICK = f"{_GITHUB}/brmson/dataset-sts/47a67a26bcabc6248161fd0ae4f556c44155e628/data/sts/sick2014"
_SICK_HOME = "https://alt.qcri.org/semeval2014/task1/data/uploads"
SICK = Downloaded(
    name="sick2014",
    version="1.0.0",
    description="Pairs of sentences, how related they are from 1 to 5, and whether one entails or contradicts the "
    "other: task 1 of SemEval-2014, with its splits train, trial (here `validation`) and test.",
    homepage="https://alt.qcri.org/semeval2014/task1/",
    licence="CC BY-NC-SA 3.0",
    citation="M. Marelli, S. Menini, M. Baroni, L. Bentivogli, R. Bernardi and R. Zamparelli, A SICK cure for the "
    "evaluation of compositional distributional semantic models, LREC 2014",
    features={
        "pair_ID": np.int32,
        "sentence_A": str,
        "sentence_B": str,
        "relatedness_score": np.float32,
        "label": JUDGMENTS,
    },
    files={
        "train": (f"{_SICK}/SICK_train.txt", f"{_SICK_HOME}/sick_train.zip#SICK_train.txt"),
        "validation": (f"{_SICK}/SICK_trial.txt", f"{_SICK_HOME}/sick_trial.zip#SICK_trial.txt"),
        "test": (
            f"{_SICK}/SICK_test_annotated.txt",
            f"{_SICK_HOME}/sick_test_annotated.zip#SICK_test_annotated.txt",
        ),
    },
    parse=pairs,
    digests={
        "train": "ccb920d47ad95d8dcd3b1eada498405e35bac662f30c94cbc36231d96a41a13d",
        "validation": "a3f8abeeefe1caddaa5f4749683be5628fda84dece80649df8cb827b79a02675",
        "test": "79a1d4912b8b7e78ee20606ac8a6c45d96972bbdb20ba1c65c9472bdbd992840",
    },
)


# Multi30k: translation

LANGUAGES = ("en", "de", "fr")


def translations(files: Mapping[str, str]) -> Splits:
    """Sentences in three languages, from files "SPLIT.LANGUAGE" whose lines correspond."""
    splits = dict.fromkeys(file.partition(".")[0] for file in files)
    return {split: _translations({each: f"{split}.{each}" for each in LANGUAGES}, files) for split in splits}


def _translations(names: Mapping[str, str], files: Mapping[str, str]) -> list[tuple[Key, Example]]:
    columns = {language: [line.strip() for line in _lines(files[file])] for language, file in names.items()}
    for language, lines in columns.items():
        if "" in lines:
            raise _damaged(names[language], lines.index("") + 1, "", "a sentence")
    counts = {names[language]: len(lines) for language, lines in columns.items()}
    if len(set(counts.values())) > 1:
        raise InputError(
            f"the files {', '.join(f'{file} with {n} lines' for file, n in counts.items())} do not correspond, "
            "expected as many lines in each: a file was damaged on the way or has changed at its source; try again"
        )
    rows = zip(*columns.values(), strict=True)
    return [(key, dict(zip(columns, row, strict=True))) for key, row in enumerate(rows)]


# The repository has had two versions of train.en.gz. The digests are those of the first, which is at this commit.
_MULTI30K = f"{_GITHUB}/multi30k/dataset/c9be912dc05a3ebf9ae5bb5f7f58c1791cda43ab/data/task1/raw"
MULTI30K = Downloaded(
    name="multi30k",
    version="1.0.0",
    description="Captions of Flickr images in English with their translations into German and French: task 1 of the "
    "multimodal translation task, untokenised, and its test set of 2016.",
    homepage="https://github.com/multi30k/dataset",
    licence="none stated",
    citation="D. Elliott, S. Frank, K. Sima'an and L. Specia, Multi30K: multilingual English-German image "
    "descriptions, VL 2016; D. Elliott, S. Frank, L. Barrault, F. Bougares and L. Specia, Findings of the second "
    "shared task on multimodal machine translation and multilingual image description, WMT 2017",
    features=dict.fromkeys(LANGUAGES, str),
    files={
        f"{split}.{language}": (f"{_MULTI30K}/{file}.{language}.gz",)
        for (split, file), language in itertools.product(
            (("train", "train"), ("validation", "val"), ("test", "test_2016_flickr")), LANGUAGES
        )
    },
    parse=translations,
    digests={
        "train": "b13ee208710e99ec855e524b11cb452faa3da2e5004ae8f0cf983107b009a46e",
        "validation": "0343fd2e92a0702463dcf3d05a6095ca2188edccca215f1b97d278289c04154d",
        "test": "991b4708705220af190f6f269aa20ce74e7214d3255ed79187ce5fa1434d2afb",
    },
    target=("en", "de"),
)
