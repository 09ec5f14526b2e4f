"""The body of a request as arrays, within limits."""

import io
import json
import struct
import wave
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError, reason
from dl_jax.export import Input, check
from dl_jax.export.record import Audio, Image, Record, Text

JSON = "application/json"
TYPES: Mapping[str, tuple[str, ...]] = {  # beside JSON, by the kind of the request; the first is the one to use
    "image": ("image/png",),
    "audio": ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"),
    "text": ("text/plain",),
    "arrays": (),
}
MAX_PIXELS = 4_000_000  # of an image, before it is scaled: some 50 MB while it is decoded


class Unsupported(InputError):
    """A content type that the file has no use for."""


class TooLarge(InputError):
    """What exceeds a limit."""


def decoded(body: bytes, content_type: str, record: Record, largest: int) -> list[np.ndarray]:
    """The inputs of the file, [B, ...] each with 1 to `largest` rows.

    `content_type` is the header's value. An image is scaled until it covers the file's size and cropped at its centre;
    the channels of a recording are averaged; a text is one row of ids. Raises Unsupported for another type, TooLarge
    for too many rows or pixels, and InputError for what is not as the file takes it.
    """
    kind, types = content_type.partition(";")[0].strip().lower(), TYPES[record.request.KIND]
    if kind == JSON:
        arrays = _arrays(body, record)
    elif kind not in types:
        expected = " or ".join([*types[:1], JSON])
        raise Unsupported(f"content type {kind[:80] or 'none'!r}, expected {expected}; set the header Content-Type")
    elif isinstance(record.request, Audio):
        arrays = [_recording(body, record.request.rate, record.inputs[0].shape[1] or 0)[None]]
    elif isinstance(record.request, Text):
        arrays = [_ids(body, record.request, record.inputs[0].shape[1] or 0)[None]]
    else:
        _, height, width, channels = (size or 0 for size in record.inputs[0].shape)
        arrays = [_pixels(body, height, width, channels)[None]]
    if len(arrays[0]) > largest:
        raise TooLarge(f"{len(arrays[0])} rows, expected at most {largest} in a request; send several requests")
    return arrays


def _arrays(body: bytes, record: Record) -> list[np.ndarray]:
    """{"inputs": rows}, or for several inputs {"inputs": [rows of the first, ...]}."""
    try:
        content = json.loads(body, parse_constant=_no_number)
    except RecursionError as e:
        raise InputError("the JSON is nested too deeply, expected an object with the key inputs") from e
    except ValueError as e:  # also of the decoder of UTF-8, and for integers of thousands of digits
        raise InputError(f"the body is no JSON ({reason(e)[:120]}), expected an object with the key inputs") from e
    expected = [Input((None, *each.shape[1:]), each.dtype) for each in record.inputs]
    if not isinstance(content, dict) or set(content) != {"inputs"}:
        raise InputError('the JSON is no object with the one key inputs; send {"inputs": [first row, second row, ...]}')
    if body.count(b'"') != 2:  # those of the key; NumPy would make every item as wide as the longest text
        raise InputError(f"inputs have texts, expected {_listed(expected)}; give numbers alone")
    given = content["inputs"] if len(expected) > 1 else [content["inputs"]]
    if not isinstance(given, list) or len(given) != len(expected):
        raise InputError(f"inputs is no list of {len(expected)} arrays; send one for each of {_listed(expected)}")
    arrays = [_array(each, want) for each, want in zip(given, expected, strict=True)]
    check(expected, arrays)
    if len({len(each) for each in arrays}) != 1:
        raise InputError("inputs have different numbers of rows, expected one number; pair them up again")
    if within := _range(record):
        low, high = within
        if not low <= arrays[0].min(initial=low) <= arrays[0].max(initial=low) <= high:
            raise InputError(f"inputs have values outside [{low:g}, {high:g}], expected only those; scale them")
    return arrays


def _range(record: Record) -> tuple[float, float] | None:
    """What the values of the first input are within; None for any."""
    match record.request:
        case Image():
            return 0, 1
        case Audio():
            return -1, 1
        case Text(words=words):
            return 0, Text.FIRST + len(words) - 1
        case _:
            return None


def _array(rows: Any, want: Input) -> np.ndarray:
    try:
        found = np.asarray(rows)
    except (ValueError, OverflowError, RecursionError) as e:
        raise InputError(f"inputs are no array, expected {want}; give rows of equal length") from e
    dtype = np.dtype(want.dtype)
    kinds = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}.get(dtype.kind, "")
    if found.dtype.kind not in kinds:
        raise InputError(f"inputs are no numbers such as {want} has; give numbers of this type")
    with np.errstate(over="ignore", invalid="ignore"):
        converted = found.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(converted).all():
        raise InputError(f"inputs have numbers beyond {want.dtype}, expected finite ones; scale them")
    if dtype.kind in "iu" and (converted != found).any():
        raise InputError(f"inputs have numbers beyond {want.dtype}, expected those that it can hold")
    return converted


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _listed(inputs: Sequence[Input]) -> str:
    return ", ".join(map(str, inputs))


def _pixels(body: bytes, height: int, width: int, channels: int) -> np.ndarray:  # -> float32 [H, W, C] in [0, 1]
    import PIL.Image

    if channels not in (1, 3):
        raise Unsupported(f"images of {channels} channels cannot be PNG, expected {JSON}; send arrays")
    if body[:8] != b"\x89PNG\r\n\x1a\n" or body[12:16] != b"IHDR" or len(body) < 24:
        raise InputError("the body is no PNG; convert the image")
    columns, rows = struct.unpack(">II", body[16:24])
    if columns * rows > MAX_PIXELS:
        raise TooLarge(f"an image of {columns}x{rows} pixels, expected at most {MAX_PIXELS}; scale it down")
    try:
        with PIL.Image.open(io.BytesIO(body), formats=["PNG"]) as file:
            file.load()
            image = _eight_bits(file)
            if image.has_transparency_data:  # on black
                black = PIL.Image.new("RGBA", image.size, (0, 0, 0, 255))
                image = PIL.Image.alpha_composite(black, image.convert("RGBA"))
            image = image.convert("L" if channels == 1 else "RGB")
    except Exception as e:  # damage takes any form
        raise InputError("the PNG cannot be read; save it again") from e
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if max(size) > MAX_PIXELS // max(height, width):
        raise InputError(f"an image of {columns}x{rows} pixels is too narrow, expected about {width}x{height}; crop it")
    image = image.resize(size, PIL.Image.Resampling.BILINEAR) if size != image.size else image
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32)
    return (pixels / np.float32(255)).reshape(height, width, channels)


def _eight_bits(image: Any) -> Any:
    """An image of 16 bits, which Pillow would clip, as one of 8."""
    import PIL.Image

    if not image.mode.startswith("I"):
        return image
    return PIL.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _recording(body: bytes, rate: int, samples: int) -> np.ndarray:  # -> float32 [samples] in [-1, 1]
    try:
        with wave.open(io.BytesIO(body)) as file:
            found = file.getframerate(), file.getsampwidth(), file.getnchannels()
            frames = file.readframes(file.getnframes())
    except Exception as e:  # damage takes any form
        raise InputError(f"the body is no WAV file of PCM ({reason(e)[:120]}); convert the recording") from e
    if found[:2] != (rate, 2):
        raise InputError(
            f"a recording of {8 * found[1]} bits at {found[0]} Hz, expected 16 bits at {rate} Hz; convert it"
        )
    whole = len(frames) // (2 * found[2]) * found[2]
    values = np.frombuffer(frames, "<i2", whole).reshape(-1, found[2]).mean(1) / 32768
    if not 1 <= len(values) <= samples:
        raise InputError(f"a recording of {len(values)} samples, expected 1 to {samples} at {rate} Hz; cut it")
    return np.pad(values, (0, samples - len(values))).astype(np.float32)


def _ids(body: bytes, request: Text, length: int) -> np.ndarray:  # -> int32 [T]
    try:
        text = body.decode()
    except UnicodeDecodeError as e:
        raise InputError("the text is not UTF-8; convert it") from e
    words = (text.lower() if request.lower else text).split()
    if not 1 <= len(words) <= length:
        raise InputError(f"a text of {len(words)} words, expected 1 to {length} between blanks; cut it")
    numbers = {word: i for i, word in enumerate(request.words, Text.FIRST)}
    ids = [numbers.get(word, Text.UNKNOWN) for word in words]
    return np.array(ids + [Text.PADDING] * (length - len(ids)), np.int32)
