"""The record of an exported file: what a program that predicts with the file has to know of it, as JSON beside it.

    record.write("net.onnx", onnx.load("net.onnx"), batches, request=record.Image(), classes=("cat", "dog"))

writes `net.onnx.json`: size and SHA-256 of the file, the arrays that it takes and gives, how an image, a recording or a
text becomes such an array, the names of the classes, and statistics of validation data, which tell later whether
the inputs and answers of a program in use are still like these. It needs no JAX.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dl_jax.core.errors import InputError, reason
from dl_jax.core.files import sealed, unsealed
from dl_jax.export import Input, read
from dl_jax.export import write as write_file

SCHEMA = 1
FORMATS = {".onnx": "onnx", ".tflite": "litert", ".stablehlo": "stablehlo"}
INK = 0.2  # values above it are strokes, where an image is a drawing on black


@dataclasses.dataclass(frozen=True)
class Image:
    """The input is images [B, H, W, C], float32 in [0, 1]: an image that is cropped and scaled, over 255."""

    KIND: ClassVar = "image"
    filled: float = 1.0  # the share of the side that a drawing on black takes, the median over examples


@dataclasses.dataclass(frozen=True)
class Audio:
    """The input is waves [B, samples], float32 in [-1, 1]; a shorter recording is padded with zeros."""

    KIND: ClassVar = "audio"
    rate: int  # samples a second


@dataclasses.dataclass(frozen=True)
class Text:
    """The input is ids of words [B, T], int32: 0 is padding, 1 another word, and `words` begin at 2."""

    KIND: ClassVar = "text"
    words: tuple[str, ...]
    lower: bool = True  # whether a text is converted to lower case before it is split at white space

    PADDING: ClassVar = 0
    UNKNOWN: ClassVar = 1
    FIRST: ClassVar = 2


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The inputs are arrays of any meaning."""

    KIND: ClassVar = "arrays"


Request = Image | Audio | Text | Arrays
REQUESTS: Mapping[str, type[Request]] = {each.KIND: each for each in (Image, Audio, Text, Arrays)}
RANKS = {Image: (4, "float32"), Audio: (2, "float32"), Text: (2, "int32")}  # axes and type of the only input


class Validation(NamedTuple):
    """Statistics of the validation data, as the file answered it."""

    examples: int
    mean: float  # of the inputs' values (see `moments`)
    std: float  # their standard deviation
    answers: tuple[float, ...]  # by class: the share of the examples that were answered by it; () without classes
    confidence: float | None  # the mean probability of the answers


class Record(NamedTuple):
    """What a file is."""

    format: str  # of FORMATS
    bytes: int
    sha256: str
    inputs: tuple[Input, ...]
    outputs: tuple[Input, ...]
    request: Request
    classes: tuple[str, ...]  # whose logits [B, classes] are the first output; () where it is something else
    validation: Validation


def path_of(path: str | os.PathLike[str]) -> Path:
    """Where the record of the file `path` is: beside it, with `.json` after its name."""
    return Path(f"{os.fspath(path)}.json")


def write(
    path: str | os.PathLike[str],
    predict: Callable[..., Any],
    batches: Iterable[Sequence[Any]],
    *,
    request: Request | None = None,
    classes: Sequence[str] = (),
    batch: int | None = None,
) -> Record:
    """Writes the record of the exported file `path` beside it, and returns it.

    Args:
      path: a file of ONNX, LiteRT or StableHLO, whose name ends in .onnx, .tflite or .stablehlo.
      predict: the function in the file, as `load` of its format opens it.
      batches: validation data, the inputs of one call each.
      request: how a request becomes an input; by default it consists of arrays.
      classes: the names of the classes, where the first output is their logits [B, classes].
      batch: the only batch size that the file takes; by default it takes any.

    Raises InputError for a file of another name, for no validation data, where the input is not such as `request` says,
    where the first output is not logits of these classes, and where a file cannot be read or written.
    """
    path, request = Path(path), request or Arrays()
    if path.suffix not in FORMATS:
        raise InputError(f"{path} is none of the files that have a record, expected {', '.join(FORMATS)}; rename it")
    batches = [tuple(np.asarray(each) for each in inputs) for inputs in batches]
    if not batches or not all(map(len, batches)):
        raise InputError("the validation data is empty, expected at least one batch; give some hundred examples")
    outputs = [leaves(predict(*inputs)) for inputs in batches]
    first = np.concatenate([each[0] for each in outputs])
    inputs = [np.concatenate(each) for each in zip(*batches, strict=True)]
    described = lambda arrays: tuple(Input((batch, *each.shape[1:]), each.dtype.name) for each in arrays)
    _require_fitting(request, described(inputs))
    if classes and first.shape[1:] != (len(classes),):
        raise InputError(
            f"the file gives {first.shape}, expected logits [B, {len(classes)}] for {len(classes)} classes; name all"
        )
    if isinstance(request, Image):
        request = Image(filled(inputs[0]))
    content = read(path)
    found = Record(
        FORMATS[path.suffix],
        len(content),
        hashlib.sha256(content).hexdigest(),
        described(batches[0]),
        described(outputs[0]),
        request,
        tuple(map(str, classes)),
        _validation(request, inputs[0], first if classes else None),
    )
    write_file(path_of(path), json.dumps(sealed(_as_json(found)), indent=1).encode())
    return found


def load(path: str | os.PathLike[str]) -> Record:
    """The record of the file `path`.

    Raises InputError where there is none, where it is damaged or of another layout, and where it contradicts itself.
    """
    place = path_of(path)
    if not place.exists():
        raise InputError(
            f"{path} has no record {place.name} beside it; copy it too, or write it by export.record.write"
        )
    try:
        found = unsealed(read(place))
    except ValueError as e:
        raise InputError(f"{place} is damaged ({e}); copy it again, or write it anew by export.record") from e
    if found.get("schema") != SCHEMA:
        raise InputError(f"{place} has layout {found.get('schema')}, expected {SCHEMA}; write it anew by export.record")
    try:
        record = _from_json(found)
        _require_fitting(record.request, record.inputs)
        _require_classes(record)
    except InputError as e:
        raise InputError(f"{place} is wrong: {e}") from e
    except Exception as e:  # what another program wrote takes any form
        raise InputError(f"{place} is no record ({type(e).__name__}: {reason(e)}); write it by export.record") from e
    return record


def require_same(record: Record, content: bytes, path: str | os.PathLike[str]) -> None:
    """Raises InputError where `content` is not that of the file whose record this is."""
    if len(content) != record.bytes:
        raise InputError(
            f"{path} has {len(content)} bytes, expected {record.bytes} as its record says: it was not exported by "
            "dl_jax, or is damaged; copy both files again"
        )
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise InputError(
            f"{path} is damaged: its SHA-256 is not {record.sha256[:12]}..., as its record says; copy both files again"
        )


def leaves(outputs: Any) -> list[np.ndarray]:
    """The arrays of an array, or of tuples, lists and dicts of them, in JAX's order: dicts by their sorted keys."""
    if isinstance(outputs, Mapping):
        return [leaf for key in sorted(outputs) for leaf in leaves(outputs[key])]
    if isinstance(outputs, tuple | list):
        return [leaf for each in outputs for leaf in leaves(each)]
    return [np.asarray(outputs)]


def probabilities(logits: np.ndarray) -> np.ndarray:  # [B, classes]
    """Softmax, in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def moments(request: Request, inputs: np.ndarray) -> np.ndarray:  # [B, ...] -> float64 [B, 2]
    """For each example the mean of its values and of their squares.

    Of a text the values are 1 for a word that is not known and 0 for one that is; padding has none.
    """
    flat = inputs.reshape(len(inputs), -1)
    if not isinstance(request, Text):
        values = flat.astype(np.float64)
        return np.stack([values.mean(1), (values**2).mean(1)], 1) if values.size else np.zeros((len(flat), 2))
    unknown = (flat == Text.UNKNOWN).sum(1) / np.maximum(1, (flat != Text.PADDING).sum(1))
    return np.stack([unknown, unknown], 1)


def mean_and_std(moments: np.ndarray) -> tuple[float, float]:  # [B, 2]
    """Of all examples, from the `moments` of each."""
    mean, square = moments.mean(0)
    return float(mean), float(np.sqrt(max(0.0, square - mean**2)))


def filled(images: np.ndarray) -> float:  # [B, H, W, C]
    """The share of the side that strokes on black take, the larger one of height and width; the median over images."""
    ink = images.max(-1) > INK
    spans = [_span(ink.any(axis)) for axis in (2, 1)]  # [B] each
    return float(np.median(np.maximum(*spans)))


def _span(ink: np.ndarray) -> np.ndarray:  # [B, n] -> [B]
    """The share of the axis from the first True to the last."""
    return np.where(ink.any(1), 1 - (ink.argmax(1) + ink[:, ::-1].argmax(1)) / ink.shape[1], 0)


def _require_fitting(request: Request, inputs: Sequence[Input]) -> None:
    if not inputs:
        raise InputError("the file takes nothing, expected an input; export another function")
    if isinstance(request, Arrays):
        return
    rank, dtype = RANKS[type(request)]
    if len(inputs) != 1 or len(inputs[0].shape) != rank or inputs[0].dtype != dtype:
        found = ", ".join(map(str, inputs))
        raise InputError(
            f"the file takes {found}, expected one {dtype} array of {rank} axes for requests of kind {request.KIND}; "
            "leave out `request`"
        )


def _require_classes(record: Record) -> None:
    """Raises InputError where the first output has not a logit for each class, or a type is none of NumPy's."""
    for each in (*record.inputs, *record.outputs):
        np.dtype(each.dtype)
    if record.classes and record.outputs[0].shape[1:] != (n := len(record.classes),):
        raise InputError(f"the first output is {record.outputs[0]}, expected logits of {n} classes; name all")
    if len(record.validation.answers) != len(record.classes):
        raise InputError(f"it has shares of {len(record.validation.answers)} classes, expected {len(record.classes)}")


def _validation(request: Request, inputs: np.ndarray, logits: np.ndarray | None) -> Validation:
    mean, std = mean_and_std(moments(request, inputs))
    if logits is None:
        return Validation(len(inputs), mean, std, (), None)
    shares = np.bincount(logits.argmax(1), minlength=logits.shape[1]) / len(logits)
    confidence = float(probabilities(logits).max(1).mean())
    return Validation(len(inputs), mean, std, tuple(shares.tolist()), confidence)


def _as_json(record: Record) -> dict[str, Any]:
    described = lambda inputs: [{"shape": list(each.shape), "dtype": each.dtype} for each in inputs]
    request = {"kind": record.request.KIND, **dataclasses.asdict(record.request)}
    return {
        "schema": SCHEMA,
        **record._asdict(),
        "inputs": described(record.inputs),
        "outputs": described(record.outputs),
        "request": {key: list(value) if isinstance(value, tuple) else value for key, value in request.items()},
        "classes": list(record.classes),
        "validation": {**record.validation._asdict(), "answers": list(record.validation.answers)},
    }


def _from_json(found: Mapping[str, Any]) -> Record:
    described = lambda inputs: tuple(Input(tuple(each["shape"]), each["dtype"]) for each in inputs)
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in found["request"].items()}
    validation = {**found["validation"], "answers": tuple(found["validation"]["answers"])}
    return Record(
        **{name: found[name] for name in ("format", "bytes", "sha256")},
        inputs=described(found["inputs"]),
        outputs=described(found["outputs"]),
        request=REQUESTS[fields.pop("kind")](**fields),
        classes=tuple(found["classes"]),
        validation=Validation(**validation),
    )
