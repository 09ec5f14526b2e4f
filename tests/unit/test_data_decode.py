"""What becomes of a record: images of every mode, shapes and numbers against the declared features, texts."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import text

RAMP = np.linspace(0, 65535, 12).round().astype(np.uint16).reshape(3, 4)  # 0 ... 65535
RGB = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
features = tfds.features


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., str]:
    """A data folder with a set `made` of these features and examples."""

    def prepare(declared: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
        class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = "made"
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(declared))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(examples)

        tfds.disable_progress_bar()
        Made(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return str(tmp_path)

    return prepare


@pytest.fixture
def redeclared(prepared, tmp_path) -> Callable[..., str]:
    """As `prepared`, but then the set says that its features are others: what was stored no longer fits."""

    def prepare(stored: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], declared: Mapping[str, Any]) -> str:
        folder = prepared(stored, examples)
        features.FeaturesDict(declared).save_config(tmp_path / "made" / "1.0.0")
        return folder

    return prepare


def loaded(folder: str, split: str = "train") -> dict[str, np.ndarray]:
    return dict(data.load("made", split, folder, str(Path(folder, "cache"))))


def refusal(folder: str) -> str:
    with pytest.raises(InputError) as error:
        loaded(folder)
    line = str(error.value)
    assert "\n" not in line
    assert "of made 'train'" in line
    assert "made-train.array_record-00000-of-00001" in line
    return line


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(pixels: np.ndarray) -> bytes:  # uint16 [H, W, C], which Pillow cannot write for C above 1
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    h, w, c = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[c]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, mode: str) -> bytes:
    return encoded(PIL.Image.frombytes(mode, pixels.shape[::-1], pixels.tobytes()), "TIFF")


def with_palette(alpha: bytes | None = None) -> bytes:
    """Indices 0 to 3 of four colours, the first of them transparent."""
    image = PIL.Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 4)
    image.putpalette(PALETTE.tobytes())  # turns it into mode P
    return encoded(image, **({} if alpha is None else {"transparency": alpha}))


PALETTE = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30], [7, 7, 7]], np.uint8)
COLOURS = PALETTE[np.arange(12).reshape(3, 4) % 4]  # [3, 4, 3]
WIDE = RAMP[..., None] - np.arange(4, dtype=np.uint16) * 3  # 16 bits of four channels
CMYK = np.random.default_rng(1).integers(0, 256, (3, 4, 4), np.uint8)
CLEAR = np.array([0, 128, 255, 255], np.uint8)[np.arange(12).reshape(3, 4) % 4]


def luminance(image: np.ndarray) -> np.ndarray:  # [..., 3] -> [...]
    return image @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "within"])
@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        pytest.param(encoded(PIL.Image.fromarray(RAMP)), RAMP >> 8, id="grey of 16 bits"),
        pytest.param(b"P5 4 3 65535\n" + RAMP.astype(">u2").tobytes(), RAMP >> 8, id="mode I of 16 bits"),
        pytest.param(tiff(RAMP, "I;16"), RAMP >> 8, id="I;16"),
        pytest.param(tiff(RAMP.astype(">u2"), "I;16B"), RAMP >> 8, id="I;16B"),
        pytest.param(png16(RAMP[..., None]), np.repeat((RAMP >> 8)[..., None], 3, -1), id="grey of 16 bits as colour"),
        pytest.param(png16(WIDE[..., :2]), WIDE[..., 0] >> 8, id="grey of 16 bits, alpha dropped"),
        pytest.param(png16(WIDE[..., :3]), WIDE[..., :3] >> 8, id="colour of 16 bits"),
        pytest.param(png16(WIDE), WIDE >> 8, id="colour of 16 bits with alpha"),
        pytest.param(encoded(PIL.Image.fromarray(RGB)), np.dstack([RGB, np.full((3, 4), 255)]), id="opaque"),
        pytest.param(encoded(PIL.Image.fromarray(np.dstack([RGB, CLEAR]))), RGB, id="alpha dropped"),
        pytest.param(encoded(PIL.Image.fromarray(np.dstack([RGB[..., 0], CLEAR]))), RGB[..., 0], id="grey and alpha"),
        pytest.param(encoded(PIL.Image.fromarray(RAMP > 9999)), 255 * (RAMP > 9999), id="one bit"),
        pytest.param(with_palette(), COLOURS, id="palette"),
        pytest.param(with_palette(bytes([0, 128, 255, 255])), COLOURS, id="palette, transparency dropped"),
        pytest.param(
            with_palette(bytes([0, 128, 255, 255])), np.dstack([COLOURS, CLEAR]), id="palette with transparency"
        ),
        pytest.param(
            encoded(PIL.Image.frombytes("CMYK", (4, 3), CMYK.tobytes()), "TIFF"),
            (255 - CMYK[..., :3].astype(int)) * (255 - CMYK[..., 3:].astype(int)) / 255,
            id="CMYK",
        ),
        pytest.param(encoded(PIL.Image.fromarray(RGB)), luminance(RGB), id="luminance"),
        pytest.param(with_palette(bytes([0])), luminance(COLOURS), id="luminance of a palette"),
    ],
)
def test_images_of_every_mode(prepared, stored, expected, beside):
    """Also beside a feature that TFDS decodes, and within others, where its own decoding would take the lower bits."""
    expected = np.asarray(expected).reshape(3, 4, -1)
    image = features.Image(shape=(3, 4, expected.shape[-1]))
    declared, example = {"image": image}, {"image": stored}
    if beside:
        declared |= {"more": {"frames": features.Sequence(image)}}
        example |= {"more": {"frames": [stored, stored]}}
    records = loaded(prepared(declared, [example]))
    images = [records["image"][0], *(records["more/frames"][0] if beside else ())]
    assert len(images) == (3 if beside else 1)
    for found in images:
        assert found.dtype == np.uint8
        assert abs(found.astype(int) - expected).max() <= (0 if np.issubdtype(expected.dtype, np.integer) else 1)


@pytest.mark.parametrize(
    "image",
    [PIL.Image.fromarray(RAMP.astype(np.int32)), PIL.Image.fromarray(RAMP.astype(np.float32))],
    ids=["I", "F"],
)
def test_pixels_of_32_bits_are_refused(prepared, image):
    line = refusal(prepared({"image": features.Image(shape=(3, 4, 1))}, [{"image": encoded(image, "TIFF")}]))
    assert f"an image of Pillow's mode {image.mode}, 32 bits a pixel, expected 8 or 16" in line


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "within"])
@pytest.mark.parametrize(
    "stored",
    [encoded(PIL.Image.fromarray(RAMP)), tiff(RAMP, "I;16"), tiff(RAMP.astype(">u2"), "I;16B"), png16(RAMP[..., None])],
    ids=["PNG", "I;16", "I;16B", "PNG by hand"],
)
@pytest.mark.parametrize("channels", [1, None])
def test_all_16_bits_of_a_feature_that_declares_them(prepared, stored, channels, beside):
    image = features.Image(shape=(3, 4, channels), dtype=np.uint16)
    more = {"more": {"frames": features.Sequence(image)}} if beside else {}
    records = loaded(
        prepared({"image": image, **more}, [{"image": stored, **({"more": {"frames": [stored]}} if beside else {})}])
    )
    for found in (records["image"][0], *(records["more/frames"][0] if beside else ())):
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, RAMP[..., None])


@pytest.mark.parametrize(("stored", "mode"), [(RGB, "RGB"), (RGB[..., 0], "L")], ids=["colour", "8 bits"])
def test_other_images_are_no_grey_of_16_bits(prepared, stored, mode):
    example = {"image": encoded(PIL.Image.fromarray(stored))}
    line = refusal(prepared({"image": features.Image(shape=(3, 4, None), dtype=np.uint16)}, [example]))
    assert f"an image of Pillow's mode {mode} in a feature of uint16, expected grey of 16 bits; declare uint8" in line


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        pytest.param(encoded(PIL.Image.fromarray(RAMP)), RAMP >> 8, id="grey of 16 bits"),
        pytest.param(encoded(PIL.Image.fromarray(RGB[..., 0])), RGB[..., 0], id="grey"),
        pytest.param(encoded(PIL.Image.fromarray(RAMP > 9999)), 255 * (RAMP > 9999), id="one bit"),
        pytest.param(
            encoded(PIL.Image.fromarray(np.dstack([RGB[..., 0], CLEAR]))), np.dstack([RGB[..., 0], CLEAR]), id="LA"
        ),
        pytest.param(encoded(PIL.Image.fromarray(RGB)), RGB, id="RGB"),
        pytest.param(encoded(PIL.Image.fromarray(np.dstack([RGB, CLEAR]))), np.dstack([RGB, CLEAR]), id="RGBA"),
        pytest.param(png16(WIDE), WIDE >> 8, id="colour of 16 bits with alpha"),
        pytest.param(with_palette(), COLOURS, id="palette"),
        pytest.param(with_palette(bytes([0, 128, 255, 255])), np.dstack([COLOURS, CLEAR]), id="clear palette"),
    ],
)
def test_an_image_has_its_own_channels_where_none_are_declared(prepared, stored, expected):
    records = loaded(prepared({"image": features.Image(shape=(None, None, None))}, [{"image": stored}]))
    assert records["image"].dtype == np.uint8
    np.testing.assert_array_equal(records["image"][0], expected.reshape(3, 4, -1))


GREY = encoded(PIL.Image.fromarray(np.zeros((9, 8), np.uint8)))


@pytest.mark.parametrize("beside", [{}, {"words": features.Sequence(features.Text())}], ids=["ours", "TFDS's"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (None, 9, 1), (8, None, 3)])
def test_an_image_of_another_shape_is_refused(prepared, shape, beside):
    """TFDS stores bytes as they come, whatever the feature declares."""
    right = encoded(PIL.Image.fromarray(np.zeros([size or 9 for size in shape[:2]], np.uint8)))
    examples = [{"image": each, **dict.fromkeys(beside, ("a",))} for each in (right, GREY)]
    line = refusal(prepared({"image": features.Image(shape=shape), **beside}, examples))
    assert f"'image' has shape (9, 8, {shape[-1]}), expected {shape}" in line


def test_images_of_any_size_need_no_declared_one(prepared):
    records = loaded(prepared({"image": features.Image(shape=(None, None, 1))}, [{"image": GREY}]))
    assert records["image"].shape == (1, 9, 8, 1)


def test_an_animation_is_not_taken_for_its_first_image(prepared):
    frames = [PIL.Image.fromarray(np.full((4, 4), shade, np.uint8)) for shade in (0, 255)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    line = refusal(prepared({"image": features.Image(shape=(None, 4, 4, 3))}, [{"image": gif}]))
    assert "'image' has shape (4, 4, 3), expected (None, 4, 4, 3)" in line


TENSOR = features.Tensor


@pytest.mark.parametrize("beside", [{}, {"words": features.Sequence(features.Text())}], ids=["ours", "TFDS's"])
@pytest.mark.parametrize(
    ("stored", "declared"),
    [
        (TENSOR(shape=(3,), dtype=np.float32), TENSOR(shape=(2,), dtype=np.float32)),
        (TENSOR(shape=(2, 3), dtype=np.int32), TENSOR(shape=(2, 2), dtype=np.int32)),
        (TENSOR(shape=(2,), dtype=np.int64), features.Scalar(np.int64)),
        (TENSOR(shape=(2,), dtype=np.int64), features.ClassLabel(num_classes=3)),
        (TENSOR(shape=(3,), dtype=np.int64), features.Sequence(features.Scalar(np.int64), length=2)),
        (TENSOR(shape=(3,), dtype=np.int16), features.Sequence(TENSOR(shape=(2,), dtype=np.int16))),
        (TENSOR(shape=(2,), dtype=np.float32), features.Text()),
        (features.Text(), TENSOR(shape=(2,), dtype=np.float32)),
    ],
    ids=lambda feature: type(feature).__name__,
)
def test_values_that_do_not_fit_the_declared_shape(redeclared, stored, declared, beside):
    value = "text" if isinstance(stored, features.Text) else np.ones(stored.shape, stored.np_dtype)
    example = {"value": value, **dict.fromkeys(beside, ("a",))}
    line = refusal(redeclared({"value": stored, **beside}, [example], {"value": declared, **beside}))
    assert "cannot be decoded to its declared features" in line


def test_numbers_that_do_not_fit_the_declared_type(redeclared):
    fractions, declared = {"value": TENSOR(shape=(2,), dtype=np.float32)}, {"value": TENSOR(shape=(2,), dtype=np.int32)}
    line = refusal(redeclared(fractions, [{"value": np.float32([0.5, 1])}], declared))
    assert "'value' is stored as float_list, expected int64_list of int32" in line


def test_numbers_beyond_the_declared_type(redeclared):
    large, declared = {"value": TENSOR(shape=(2,), dtype=np.int32)}, {"value": TENSOR(shape=(2,), dtype=np.uint8)}
    line = refusal(redeclared(large, [{"value": np.int32([255, 256])}], declared))
    assert "'value' holds 256, which is no uint8" in line


@pytest.mark.parametrize(
    ("feature", "value"),
    [(features.Text(), b"ends\0"), (features.Text(), b"\0"), (features.Sequence(features.Text()), [b"a", b"b\0\0"])],
    ids=["Text", "NUL", "Sequence"],
)
def test_a_text_that_a_column_would_cut_is_refused(prepared, feature, value):
    folder = prepared({"text": feature}, [{"text": value}])
    assert "of 'text' ends in a NUL" in refusal(folder)
    with pytest.raises(InputError, match="of 'text' ends in a NUL"):
        data.streamed("made", "train", 1, 0, data_dir=folder)(0)


def test_texts_keep_every_byte(prepared, monkeypatch, tmp_path):
    texts = [b"\0begins", b"in\0side", b"", "ü".encode(), bytes(range(1, 256))]
    folder = prepared({"text": features.Text()}, [{"text": each} for each in texts])
    assert sorted(loaded(folder)["text"].tolist()) == sorted(texts)
    monkeypatch.setenv("TFDS_DATA_DIR", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = sorted(bytes(text.load("made", "train")).split(b"\n"))
    assert lines == sorted(b"\n".join(texts).split(b"\n"))


def test_several_texts_in_one_record_are_no_text(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", prepared({"text": features.Sequence(features.Text())}, [{"text": ["a", "b"]}]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"text \(\|S1 \(1, 2\)\).*expected bytes in column 'text', one text a record"):
        text.load("made", "train")
