"""Reads and decodes single examples of a prepared set, without TensorFlow."""

import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError, nearest
from dl_jax.data import copies
from dl_jax.data.cached import attempted
from dl_jax.data.describe import Feature, columns, flat, open_builder
from dl_jax.data.source import Prepared, brief, normal_split

Example = dict[str, np.ndarray]
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels


class EmptySplit(InputError):
    """A split without examples."""


class Records:
    """The decoded examples of one split, in TFDS's order, with random access. Threads may share it."""

    def __init__(self, found: Prepared, split: str, only: Sequence[str] | None = None) -> None:
        """The columns `only`, or all of them.

        Raises InputError for a split that is malformed, unknown or empty, for an unknown column or none, and for a
        missing record file.
        """
        import tensorflow_datasets as tfds

        split = normal_split(split)
        builder = open_builder(found)
        self.found, self.name, self.split = found, found.name, split
        self.features: dict[str, Feature] = _chosen(found.name, columns(builder.info.features), only)
        self._decode = _decoder(builder.info.features, self.features)
        self._files = _record_files(builder.info, found, split)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._source = builder.as_data_source(split, deserialize_method=raw)

    @property
    def fingerprint(self) -> str:
        """The set's version, and a digest of what its files say of the split: the same wherever they are copied.

        Of the description only the splits count. Another preparation of the same records may differ in the rest of it,
        such as the module of the builder or the text that describes the set.
        """
        splits, features = (
            json.loads(attempted(file.read_bytes, file))
            for file in (self.found.folder / "dataset_info.json", self.found.folder / "features.json")
        )
        sizes = [(Path(file).name, Path(file).stat().st_size) for file, _ in self._files]
        content = json.dumps([splits["splits"], features, sizes], sort_keys=True)
        return f"{self.found.version} {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """The examples at `indices`.

        Raises InputError, naming the file, where a record is damaged or does not hold what its features declare.
        """
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
            example = self._decode(record)
            for name, spec in self.features.items():
                if not spec.fits(example[name].shape):
                    raise ValueError(f"{name!r} has shape {example[name].shape}, expected {spec.shape}")
            return example
        except Exception as e:  # Pillow, NumPy, protobuf and TFDS raise a dozen kinds
            raise InputError(
                f"example {i} of {self.name} {self.split!r} cannot be decoded to its declared features "
                f"({type(e).__name__}: {brief(e)}) from {self._file(i)}: prepare the set again, or leave this "
                "example out"
            ) from e

    def _file(self, i: int) -> str:
        """The record file of example i."""
        return self._files[int(np.searchsorted(np.cumsum([take for _, take in self._files]), i, side="right"))][0]

    def _damaged(self, indices: Sequence[int]) -> str:
        """The file of the first of these records that cannot be read."""
        for i in indices:
            try:
                self._source[i]
            except RuntimeError:
                return self._file(i)
        return " or ".join(file for file, _ in self._files)


def _chosen(name: str, features: dict[str, Feature], only: Sequence[str] | None) -> dict[str, Feature]:
    if only is None:
        return features
    if isinstance(only, str) or not only:
        raise InputError(f"only is {only!r}, expected the names of columns of {name}, such as {tuple(features)[:1]}")
    for column in only:
        if column not in features:
            known = ", ".join(features)
            raise InputError(f"data set {name} has no column {column!r}, expected {known}{nearest(column, features)}")
    return {column: feature for column, feature in features.items() if column in only}


def _record_files(info: Any, found: Prepared, split: str) -> list[tuple[str, int]]:
    """The paths of the record files of a split, each with the number of examples taken from it."""
    try:
        instructions = info.splits[split].file_instructions
    except (ValueError, KeyError, NotImplementedError) as e:
        raise InputError(_bad_split(found.name, split, list(info.splits), e)) from e
    if found.origin is not None:
        copies.fetch(found.origin, [Path(i.filename).name for i in instructions], found.folder)
    files = [(str(found.folder / i.filename), i.take) for i in instructions]
    if not files or any(take < 1 for _, take in files):
        sizes = ", ".join(f"{name} {s.num_examples}" for name, s in info.splits.items())
        raise EmptySplit(f"split {split!r} of {found.name} is empty, expected some of its examples ({sizes}): widen it")
    for file, _ in files:
        if not Path(file).is_file():
            raise InputError(
                f"record file {file} is missing: copy it here, or delete the folder and prepare {found.name} again"
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
    require_one_shape(name, {np.shape(value) for value in values})
    return np.stack(values)


def require_one_shape(name: str, shapes: Collection[tuple[int, ...]]) -> None:
    """Raises InputError where the examples of a column have several shapes."""
    if len(shapes) > 1:
        raise InputError(
            f"column {name!r} has examples of shapes {min(shapes)} and {max(shapes)}, expected one shape: use "
            "`data.streamed` with a transform that crops, pads or resizes"
        )


def _decoder(features: Any, specs: dict[str, Feature]) -> Callable[[bytes], Example]:
    """record -> example, every value an array."""
    connectors = dict(features.items())
    parsers = {name: _parser(connectors.get(name), spec) for name, spec in specs.items()}
    if all(parsers.values()):
        return _by_parsers(parsers)
    _decode_images(features)

    def decode(record: bytes) -> Example:
        example = flat(features.deserialize_example_np(record))
        return {name: _array(name, example[name], spec) for name, spec in specs.items()}

    return decode


def _array(name: str, value: Any, spec: Feature) -> np.ndarray:
    array = _texts(name, value) if spec.dtype == "bytes" else np.asarray(value, spec.dtype)
    if array.size or array.ndim == len(spec.shape):
        return array
    return array.reshape([size or 0 for size in spec.shape])  # an empty list has lost its other axes


def _texts(name: str, value: Any) -> np.ndarray:
    """Bytes as NumPy holds them, which drops NULs at their end."""
    array = np.asarray(value, np.bytes_)
    for text in np.asarray(value, object).ravel():
        if text.endswith(b"\0"):
            raise ValueError(
                f"the text {text[-20:]!r} of {name!r} ends in a NUL, which a column of texts would lose; declare a "
                "Tensor of uint8"
            )
    return array


# TFDS's own decoding takes twice as long for the features of which most sets consist.


def _by_parsers(parsers: Mapping[str, Any]) -> Callable[[bytes], Example]:
    from tensorflow_datasets.proto import tf_example_pb2

    def decode(record: bytes) -> Example:
        example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]  (generated)
        fields = example.features.feature
        return {name: parse(name, fields[name]) for name, parse in parsers.items()}

    return decode


def _parser(feature: Any, spec: Feature) -> Callable[[str, Any], np.ndarray] | None:
    """(name, field of a record) -> array; None for a feature that is left to TFDS."""
    import tensorflow_datasets as tfds

    if type(feature) is tfds.features.Text:
        return lambda name, field: _texts(name, _one(name, field))
    if decode := _image_decoder(feature):
        return lambda name, field: decode(_one(name, field))
    if type(feature) is tfds.features.Sequence and len(spec.shape) == 1:
        if type(feature.feature) is tfds.features.Text:
            return lambda name, field: _texts(name, list(field.bytes_list.value))
        return _number_parser(feature.feature, spec)
    return _number_parser(feature, spec) if None not in spec.shape else None


def _number_parser(feature: Any, spec: Feature) -> Callable[[str, Any], np.ndarray] | None:
    """The parser of numbers that are stored as they are; None for a feature that is left to TFDS."""
    import tensorflow_datasets as tfds

    plain = type(feature) in (tfds.features.ClassLabel, tfds.features.Scalar, tfds.features.Tensor)
    stored = np.dtype(feature.get_serialized_info().np_dtype) if plain else np.dtype(object)
    if stored.kind in "biuf" and stored != np.uint64:  # uint64 is stored as int64
        return lambda name, field: _numbers(name, field, spec)
    return None


def _one(name: str, field: Any) -> bytes:
    values = field.bytes_list.value
    if len(values) != 1:
        raise ValueError(f"{name!r} holds {len(values)} values of bytes, expected 1")
    return values[0]


def _numbers(name: str, field: Any, spec: Feature) -> np.ndarray:
    stored, declared = field.WhichOneof("kind"), "float_list" if np.dtype(spec.dtype).kind == "f" else "int64_list"
    if stored not in (declared, None):  # None: of no value at all
        raise ValueError(f"{name!r} is stored as {stored}, expected {declared} of {spec.dtype}")
    values = getattr(field, declared).value
    shape = (len(values),) if spec.shape == (None,) else [size or 0 for size in spec.shape]
    if len(values) != math.prod(shape):
        raise ValueError(f"{name!r} holds {len(values)} values, expected those of shape {spec.shape}")
    wide = np.array(values, np.float64 if declared == "float_list" else np.int64)
    array = wide.astype(spec.dtype)
    if declared == "int64_list" and (array != wide).any():
        raise ValueError(f"{name!r} holds {wide[array != wide][0]}, which is no {spec.dtype}")
    return array.reshape(shape)


def _pixels(encoded: bytes, channels: int | None) -> np.ndarray:  # -> uint8 [H, W, channels]
    """Decodes an image to uint8 as TensorFlow does, with these channels, or with its own for None.

    16-bit samples are shifted right by 8, palettes and CMYK become RGB, and RGB becomes grey for one channel. Alpha is
    dropped unless the feature has an alpha channel; a missing alpha is 255. Raises ValueError for samples of more than
    16 bits and for floats, because their range is unknown.
    """
    import PIL.Image

    with PIL.Image.open(io.BytesIO(encoded)) as image:
        if _is_wide(image):
            pixels = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"an image of Pillow's mode {image.mode}, 32 bits a pixel, expected 8 or 16")
        elif image.mode == "P":  # by way of RGBA, as Pillow warns of a palette's transparency otherwise
            pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
        else:
            pixels = image
        mode = _MODES[channels] if channels else _own_mode(pixels.mode)
        array = np.asarray(pixels if pixels.mode == mode else pixels.convert(mode))
    return array.reshape(*array.shape[:2], -1)


def _own_mode(mode: str) -> str:
    """That of `_MODES` which has the channels of an image of this mode."""
    return "L" if mode == "1" else mode if mode in _MODES.values() else "RGB"


def _is_wide(image: Any) -> bool:
    """Whether an image of Pillow's is a grey one of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _wide_pixels(encoded: bytes) -> np.ndarray:  # -> uint16 [H, W, 1]
    """A grey image of 16 bits as it is. Raises ValueError for another: Pillow reads 8 bits of each channel of it."""
    import PIL.Image

    with PIL.Image.open(io.BytesIO(encoded)) as image:
        if not _is_wide(image):
            raise ValueError(
                f"an image of Pillow's mode {image.mode} in a feature of uint16, expected grey of 16 bits; declare "
                "uint8, or a Tensor of uint16"
            )
        return np.asarray(image).astype(np.uint16)[..., None]


def _decode_images(feature: Any) -> None:
    """Makes TFDS decode the images in `feature` by our decoders.

    Without TensorFlow, TFDS keeps the lower 8 bits of 16-bit samples.
    """
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        for each in feature.values():
            _decode_images(each)
    elif isinstance(feature, tfds.features.Sequence | tfds.features.Dataset):
        _decode_images(feature.feature)
    elif decode := _image_decoder(feature):
        feature.decode_example_np = decode


def _image_decoder(feature: Any) -> Callable[[bytes], np.ndarray] | None:
    """The decoder of a feature of images; None for other features, and for images of floats or of 16-bit colour."""
    import tensorflow_datasets as tfds

    if not isinstance(feature, tfds.features.Image):
        return None
    shape: Any = feature.shape
    channels = shape[-1]
    if feature.np_dtype == np.uint16 and channels in (None, 1):
        return _wide_pixels
    if feature.np_dtype == np.uint8 and channels in (None, *_MODES):
        return functools.partial(_pixels, channels=channels)
    return None
