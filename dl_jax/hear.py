"""Classifiers of recordings: the columns, the loss and the answers that experiments on them have in common.

`apply` is a module's: (variables, waves float32 [B, N] or frames float32 [B, T, D], lengths int [B], train, rngs) ->
logits [B, classes]. Batches have the column `wave` or `frames`, `length`, the number of samples or frames, and `label`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dl_jax import classify
from dl_jax.core.errors import InputError
from dl_jax.core.evaluate import collector
from dl_jax.core.ragged import Ragged, joined
from dl_jax.core.step import Array, Batch, Loss, Tree
from dl_jax.core.stream import Columns
from dl_jax.data import audio
from dl_jax.data.buckets import buckets

BINS, FRAME, HOP = 64, 0.064, 0.016  # of the spectra of the linear model: mel bins, and seconds
STRENGTH = 0.1  # of the linear model: the inverse of its L2 penalty, scikit-learn's C


def taken(records: Mapping[str, Any], rows: np.ndarray) -> Columns:  # int [R]
    """The rows `rows` of all columns; those that are ragged stay so."""
    return {name: column.take(rows) if isinstance(column, Ragged) else column[rows] for name, column in records.items()}


def at_speeds(records: Mapping[str, Any], speeds: Sequence[float]) -> Columns:
    """Recordings, and their labels, once at each speed: at 1.1, ten per cent shorter and higher in pitch.

    The speeds are rounded to hundredths (Ko, Peddinti, Povey & Khudanpur 2015, "Audio augmentation for speech
    recognition", Interspeech). Raises InputError where there is no speed, for speeds that are infinite or
    rounded to less than 0.01, and as `audio.to_unit` does.
    """
    for wrong in [speed for speed in speeds if not 0.005 < speed < np.inf][:1]:
        raise InputError(f"speed {wrong}, expected a number of at least 0.01, such as 1.1 for ten per cent faster")
    if not len(speeds):
        raise InputError("there are no speeds, expected one or more; give (1.0,) for the recordings as they are")
    each = [audio.resample(records["audio"], round(100 * speed), 100) for speed in speeds]
    waves = joined(np.concatenate([wave.values for wave in each]), np.concatenate([wave.lengths for wave in each]))
    return {"audio": waves, "label": np.tile(records["label"], len(speeds))}


def waves(records: Mapping[str, Any]) -> Columns:
    """The columns `wave`, at equal levels, `length` and `label` of recordings. Raises InputError as `levelled` does."""
    wave = audio.levelled(records["audio"])
    return {"wave": wave, "length": wave.lengths, "label": records["label"]}


def frames(records: Mapping[str, Any], rate: int) -> Columns:
    """The columns `frames`, log-mel energies at equal levels, `length` and `label` of recordings.

    Raises InputError as `levelled` and `log_mel` do.
    """
    found = audio.log_mel(audio.levelled(records["audio"]), rate)
    return {"frames": found, "length": found.lengths, "label": records["label"]}


def loss(apply: Callable[..., Any], column: str) -> Loss:
    """`classify.loss` of batches whose inputs are batch[column], with their lengths."""
    return lambda variables, batch, key: classify.loss(_with_lengths(apply, batch))(
        variables, {**batch, "image": batch[column]}, key
    )


def answers(
    apply: Callable[..., Any], column: str, records: Mapping[str, Any], boundaries: Sequence[int]
) -> Callable[[Tree], np.ndarray]:
    """Returns a function: variables [S, ...] -> the most probable labels, int [S, N], of all `records`, in their order.

    The records are read in buckets that end at `boundaries` (`data.buckets`, which says what raises InputError).
    """
    inputs = {name: records[name] for name in (column, "length")}
    parts = buckets({**inputs, "row": np.arange(len(records["length"]))}, "length", boundaries)
    order = np.argsort(np.concatenate([part["row"] for part in parts]))

    def likeliest(variables: Tree, batch: Batch) -> Array:
        found = _with_lengths(apply, batch)(variables, batch[column], train=False)
        return classify.as_logits(found).argmax(-1)

    collect = collector(likeliest, 50)
    return lambda variables: np.concatenate([collect(variables, part) for part in parts], 1)[:, order]


def linear_accuracy(train: Mapping[str, Any], test: Mapping[str, Any], rate: int, sections: int) -> float:
    """The accuracy, in per cent, of a logistic regression on log-mel spectra: a test of how much a network adds.

    The spectra are means over `sections` sections of a recording, at equal levels. Raises InputError for fewer than two
    classes to learn, for no recordings to test on, and as `frames` and `audio.sections` do.
    """
    classes = len(np.unique(train["label"]))
    if classes < 2 or not len(test["label"]):
        raise InputError(
            f"{len(train['label'])} recordings of {classes} classes to learn from and {len(test['label'])} to test on, "
            "expected those of two classes or more, and one or more to test on; choose other splits, or a set with "
            "more speakers where one of them is held out"
        )
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
    regression.fit(spectra(train, rate, sections), train["label"])
    return 100 * regression.score(spectra(test, rate, sections), test["label"])


def spectra(records: Mapping[str, Any], rate: int, sections: int) -> np.ndarray:  # -> float32 [N, sections · BINS]
    """Log-mel energies of recordings at equal levels, averaged over each of their sections."""
    energies = audio.log_mel(audio.levelled(records["audio"]), rate, BINS, FRAME, HOP)
    return audio.sections(energies, sections).reshape(len(energies), -1)


def _with_lengths(apply: Callable[..., Any], batch: Batch) -> Callable[..., Any]:
    """`apply` as a function of variables and inputs, as `classify` calls it."""
    return lambda variables, values, **settings: apply(variables, values, batch["length"], **settings)
