"""Small files to serve: a linear classifier of images as ONNX, written in milliseconds, and models without a file."""

import contextlib
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import uvicorn

from dl_jax.export import Input, onnx, record
from dl_jax.export.record import Record, Validation
from dl_jax.serve import runtime
from dl_jax.serve.__main__ import Flags, settings
from dl_jax.serve.app import Service, app
from dl_jax.serve.runtime import Model, Predict

CLASSES = ("left", "right", "neither")
SIDE = 8


def weights(seed: int = 0) -> np.ndarray:  # [64, 3]
    return np.random.default_rng(seed).normal(size=(SIDE * SIDE, len(CLASSES))).astype(np.float32)


def images(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((n, SIDE, SIDE, 1), np.float32)


def content(kernel: np.ndarray, batch: int | str = "batch") -> bytes:
    """An ONNX file of images [B, 8, 8, 1] @ kernel, as `export.onnx` writes it."""
    import onnx as library

    kind = library.TensorProto.FLOAT
    described = library.helper.make_tensor_value_info
    constants = [
        library.numpy_helper.from_array(kernel, "kernel"),
        library.numpy_helper.from_array(np.array([-1, SIDE * SIDE], np.int64), "shape"),
    ]
    nodes = [
        library.helper.make_node("Reshape", ["image", "shape"], ["flat"]),
        library.helper.make_node("MatMul", ["flat", "kernel"], ["logits"]),
    ]
    takes = [described("image", kind, [batch, SIDE, SIDE, 1])]
    gives = [described("logits", kind, [batch, kernel.shape[1]])]
    graph = library.helper.make_graph(nodes, "linear", takes, gives, constants)
    model = library.helper.make_model(graph, opset_imports=[library.helper.make_opsetid("", 17)], ir_version=9)
    data = model.SerializeToString()
    return onnx._entry(data) + data


def exported(path: Path, seed: int = 0) -> np.ndarray:
    """Writes a file with its record to `path`, and returns its kernel."""
    kernel = weights(seed)
    path.write_bytes(content(kernel))
    record.write(path, onnx.load(path, 1), [(images(20),)], request=record.Image(), classes=CLASSES)
    return kernel


def model(
    predict: Predict,
    shape: tuple[int, ...] = (SIDE, SIDE, 1),
    dtype: str = "float32",
    request: record.Request | None = None,
    classes: tuple[str, ...] = CLASSES,
) -> Model:
    """A model without a file, of one input [B, *shape] and one output [B, 3]."""
    shares = tuple(1 / len(classes) for _ in classes)
    return Model(
        Record(
            "onnx",
            0,
            "0" * 64,
            (Input((None, *shape), dtype),),
            (Input((None, 3), "float32"),),
            request or record.Image(),
            classes,
            Validation(100, 0.5, 0.25, shares, 0.5 if classes else None),
        ),
        predict,
        (),
    )


def png(pixels: np.ndarray) -> bytes:  # uint8 [H, W] or [H, W, 3]
    """Written by the standard alone (PNG, 2nd edition), so that a reader is not tested with its own writer."""
    height, width = pixels.shape[:2]
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@contextlib.contextmanager
def listening(served: Path | Model, token: str | None = None) -> Iterator[int]:
    """The port of a server of a file, or of a model without one, in a thread of this process."""
    found = served if isinstance(served, Model) else runtime.opened(served, 32, 1)
    service = Service(found, settings(Flags("none" if isinstance(served, Model) else str(served)), token), print)
    config = uvicorn.Config(app(service), log_config=None, ws="none", lifespan="on", access_log=False)
    server, place = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([place],))
    thread.start()
    try:
        yield place.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
