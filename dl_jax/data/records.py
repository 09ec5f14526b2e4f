"""Reads and decodes single examples of a prepared set, without TensorFlow."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError, nearest
from dl_jax.data.describe import Feature, columns, flat, open_builder
from dl_jax.data.source import Prepared

Example = dict[str, np.ndarray]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels


class Records:
    """The decoded examples of one split, in TFDS's order, with random access. Threads may share it."""

    def __init__(self, found: Prepared, split: str) -> None:
        """Raises InputError for a split that is malformed, unknown or empty, and for a missing record file."""
        import tensorflow_datasets as tfds

        builder = open_builder(found)
        self.name, self.split = found.name, split
        self.features: dict[str, Feature] = columns(builder.info.features)
        self._decode = _decoder(builder.info.features, self.features)
        self._files = _record_files(builder.info, found, split)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._source = builder.as_data_source(split, deserialize_method=raw)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """The examples at `indices`. Raises InputError, naming the file, where a record is damaged."""
        try:
            records = self._source.__getitems__(list(indices))
        except RuntimeError as e:
            raise InputError(
                f"record file {self._damaged(indices)} is truncated or damaged ({e}), expected the file that TFDS "
                "wrote: copy it again, or delete its folder and prepare the set again"
            ) from e
        return [self._decoded(i, record) for i, record in zip(indices, records, strict=True)]

    def _decoded(self, i: int, record: bytes) -> Example:
        try:
            return self._decode(record)
        except (OSError, ValueError, TypeError, IndexError) as e:  # what Pillow, NumPy and TFDS raise
            raise InputError(
                f"example {i} of {self.name} {self.split!r} cannot be decoded to its declared features "
                f"({type(e).__name__}: {e}): prepare the set again, or leave this example out"
            ) from e

    def _damaged(self, indices: Sequence[int]) -> str:
        """The file of the first of these records that cannot be read."""
        ends = np.cumsum([take for _, take in self._files])
        for i in indices:
            try:
                self._source[i]
            except RuntimeError:
                return self._files[int(np.searchsorted(ends, i, side="right"))][0]
        return " or ".join(file for file, _ in self._files)


def _record_files(info: Any, found: Prepared, split: str) -> list[tuple[str, int]]:
    """The record files of a split, each with the number of examples taken from it."""
    try:
        instructions = info.splits[split].file_instructions
    except (ValueError, KeyError, NotImplementedError) as e:
        raise InputError(_bad_split(found.name, split, list(info.splits), e)) from e
    files = [(str(i.filename), i.take) for i in instructions]
    if not files or any(take < 1 for _, take in files):
        sizes = ", ".join(f"{name} {s.num_examples}" for name, s in info.splits.items())
        raise InputError(f"split {split!r} of {found.name} is empty, expected some of its examples ({sizes}): widen it")
    for file, _ in files:
        if not (found.folder / file).is_file():
            raise InputError(
                f"record file {found.folder / file} is missing: copy it here, or delete the folder and prepare "
                f"{found.name} again"
            )
    return files


def _bad_split(name: str, split: str, known: list[str], e: Exception) -> str:
    wanted = f"expected {', '.join(known)}, a slice such as {known[0]}[:90%], or several joined by +"
    parts = [part.partition("[")[0].strip() for part in split.split("+")]
    unknown = [part for part in parts if part.isidentifier() and part not in (*known, "all")]
    if unknown:
        return f"data set {name} has no split {unknown[0]!r}, {wanted}{nearest(unknown[0], known)}"
    reason = " ".join(str(e).splitlines()[-1].split())
    return f"split {split!r} of {name} is malformed ({reason}), {wanted}"


def stack(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Examples to columns [B, ...]. Raises InputError where their shapes differ."""
    return {name: _stack_column(name, [example[name] for example in examples]) for name in examples[0]}


def _stack_column(name: str, values: list[np.ndarray]) -> np.ndarray:
    shapes = sorted({np.shape(value) for value in values})
    if len(shapes) > 1:
        raise InputError(
            f"column {name!r} has examples of shapes {shapes[0]} and {shapes[-1]}, expected one shape: use "
            "`data.stream` with a transform that crops, pads or resizes"
        )
    return np.stack(values)


def _decoder(features: Any, specs: dict[str, Feature]) -> Callable[[bytes], Example]:
    """record -> example, every value an array."""
    connectors = dict(features.items())
    parsers = {name: _parser(connectors.get(name), spec) for name, spec in specs.items()}
    if all(parsers.values()):
        return _by_parsers(parsers)

    def decode(record: bytes) -> Example:
        example = flat(features.deserialize_example_np(record))
        return {name: _array(example[name], spec) for name, spec in specs.items()}

    return decode


def _array(value: Any, spec: Feature) -> np.ndarray:
    array = np.asarray(value, np.bytes_ if spec.dtype == "bytes" else spec.dtype)
    # An empty list has lost its other axes.
    return array.reshape(-1, *(size or 0 for size in spec.shape[1:])) if spec.ragged else array


# TFDS's own decoding takes twice as long for the features of which most sets consist.


def _by_parsers(parsers: Mapping[str, Any]) -> Callable[[bytes], Example]:
    from tensorflow_datasets.proto import tf_example_pb2

    def decode(record: bytes) -> Example:
        example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]  (generated)
        fields = example.features.feature
        return {name: parse(fields[name]) for name, parse in parsers.items()}

    return decode


def _parser(feature: Any, spec: Feature) -> Callable[[Any], np.ndarray] | None:
    """Field of a record -> array; None for a feature that is left to TFDS."""
    import tensorflow_datasets as tfds

    if type(feature) is tfds.features.Text:
        return lambda field: np.asarray(field.bytes_list.value[0])
    if type(feature) is tfds.features.Image and spec.dtype == "uint8" and (channels := spec.shape[-1]) in _MODES:
        return lambda field: _pixels(field.bytes_list.value[0], channels)
    plain = type(feature) in (tfds.features.ClassLabel, tfds.features.Scalar, tfds.features.Tensor)
    stored = np.dtype(feature.get_serialized_info().np_dtype) if plain else np.dtype(object)
    if stored.kind in "biuf" and stored != np.uint64 and None not in spec.shape:  # uint64 is stored as int64
        return lambda field: _numbers(field, spec)
    return None


def _numbers(field: Any, spec: Feature) -> np.ndarray:
    values = np.array(field.int64_list.value or field.float_list.value, spec.dtype)
    return values.reshape([size or 0 for size in spec.shape])


def _pixels(encoded: bytes, channels: int) -> np.ndarray:
    import PIL.Image

    mode = _MODES[channels]
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array.reshape(*array.shape[:2], channels)
