"""Writers of metrics: JSON lines, and TensorBoard event files.

Values are scalars, or [S] with one number per seed. Paths are local or `gs://`. Objects in a bucket cannot be appended
to, so such a file grows in memory or in a local temporary folder, and is uploaded as a whole every half minute and at
`flush` and `close`. If the process is killed, the lines since the last upload are lost. Call `flush` before a
checkpoint is saved, so that a run that resumes from it has all lines up to that step.

No method raises OSError, nor an error of a bucket's client: a run goes on without its files, with one warning.
"""

import contextlib
import json
import math
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from dl_jax.core.errors import spared, warn_once
from dl_jax.core.files import exists, failures, move, write_whole
from dl_jax.harness.report.figures import figure_png, sheet_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYNC_EVERY = 30.0  # seconds between uploads, and between flushes of TensorBoard's buffer


def _due(since: float) -> bool:
    return time.monotonic() - since >= SYNC_EVERY


class JsonLines:
    """One JSON object a line: {"step": 100, "time": seconds since 1970, "loss": 0.3, "error": [0.1, 0.2], ...}.

    Values that are not finite are null. First, lines of steps after `resume_step`, which the run will repeat, and a
    line that a kill has left incomplete are removed. A file that cannot be read is renamed to `NAME.unreadable`.

    All lines are also in memory. The next write mends a file that was deleted or is incomplete because a write failed.
    """

    def __init__(self, path: epath.PathLike, resume_step: int) -> None:
        self._path = epath.Path(path)
        old = _content(self._path)
        if old is None:
            with spared(f"{self._path} cannot be renamed", "it will be replaced", failures(self._path)):
                move(self._path, self._path.with_name(f"{self._path.name}.unreadable"))
        self._lines = bytearray().join(_kept(old or b"", resume_step))
        self._written = len(self._lines) if self._lines == old else 0  # bytes that the file holds
        self._synced = time.monotonic()
        self.flush()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": int(step), "time": round(time.time(), 3), **{k: _json(v) for k, v in values.items()}}
        self._lines += json.dumps(record, allow_nan=False).encode() + b"\n"
        if "://" not in os.fspath(self._path) or _due(self._synced):
            self.flush()

    def flush(self) -> None:
        self._synced = time.monotonic()
        lost = "its lines are in memory, and lost if no later write succeeds"
        with spared(f"{self._path} cannot be written", lost, failures(self._path)):
            if "://" in os.fspath(self._path):
                write_whole(self._path, bytes(self._lines))
            else:
                _extend(Path(self._path), self._lines, self._written)
            self._written = len(self._lines)

    def close(self) -> None:
        self.flush()


def _extend(file: Path, content: bytearray, written: int) -> None:
    """Makes `file` hold `content`, whose first `written` bytes it should hold already; if not, it is written anew.

    What is appended is one write, of which a kill may leave a part.
    """
    if exists(file) and file.stat().st_size == written:
        with file.open("ab", buffering=0) as stream:
            if stream.write(content[written:]) == len(content) - written:
                return
    write_whole(file, bytes(content))


def _content(path: epath.Path) -> bytes | None:
    """What the file holds, b"" if there is none, or None, with a warning, where it cannot be read."""
    with spared(f"{path} cannot be read", "the lines of earlier attempts are lost to this one", failures(path)):
        return path.read_bytes() if exists(path) else b""
    return None


def read_lines(path: epath.PathLike, resume_step: int) -> list[dict[str, Any]]:
    """The records in the file of a `JsonLines`, of steps up to `resume_step`.

    There are none, with a warning, where the file cannot be read.
    """
    return [json.loads(line) for line in _kept(_content(epath.Path(path)) or b"", resume_step)]


def _kept(content: bytes, resume_step: int) -> list[bytes]:
    return [line for line in content.splitlines(keepends=True) if _belongs(line, resume_step)]


def _belongs(line: bytes, resume_step: int) -> bool:
    """Whether `line` is complete and of a step that the run will not repeat."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= resume_step
    except (ValueError, KeyError, TypeError):
        return False


def _json(value: Any) -> Any:
    """A number or an array as JSON, null where it is not finite."""
    array = np.asarray(value)
    if array.ndim:
        return [_json(item) for item in array]
    if array.dtype.kind in "biu":
        return array.item()
    number = float(array)
    return number if math.isfinite(number) else None


class TensorBoard:
    """An event file in `directory`. Events of an earlier attempt at steps after `resume_step` are hidden.

    `seeds` [S] name the curves of values [S]. After a failure nothing more is written, as what follows a torn event
    cannot be read. If the file has been deleted, its events are lost, as they are not kept in memory, and the curves go
    on in a new one. An upload that fails is tried again.
    """

    # Events go straight to tensorboardX's record writer: the queue of its SummaryWriter cannot be flushed, and a second
    # SummaryWriter (or its add_hparams) within one second opens a file of the same name and destroys the first.

    def __init__(self, directory: epath.PathLike, resume_step: int, seeds: Sequence[int] = ()) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        self._directory = epath.Path(directory)
        self._resume_step = resume_step
        self._seeds = seeds
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # from which the file is uploaded to a bucket
        self._writer: Any = None  # where nothing more is written
        self._synced = time.monotonic()
        with self._stopping():
            if "://" in os.fspath(self._directory):
                self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            self._open()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a point to the curve of each name.

        Values [S] have a curve for each seed, such as `name/seed0`, and one for their mean, `name/mean`. NaN is left
        out.
        """
        curves: dict[str, float] = {}
        for name, value in values.items():
            array = np.asarray(value, np.float64)
            if array.ndim:
                names = self._seeds if len(self._seeds) == array.size else range(array.size)
                curves |= {f"{name}/seed{i}": item for i, item in zip(names, array.ravel().tolist(), strict=True)}
            known = array[~np.isnan(array)]
            curves[f"{name}/mean" if array.ndim else name] = float(known.mean()) if known.size else math.nan
        tagged = [{"tag": name, "simple_value": value} for name, value in curves.items() if not math.isnan(value)]
        self._summary(step, tagged)

    def hparams(self, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """The run's row in the HPARAMS tab: its `config`, and `metrics` as `measured/name` (the mean for [S])."""
        from tensorboardX.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in config.items()}
        measured = {f"measured/{k}": np.asarray(v, np.float64).mean() for k, v in metrics.items()}
        for summary in hparams(plain, measured):
            self._add(summary=summary)
        self.scalars(0, measured)

    def image(self, name: str, step: int, images: Any) -> None:
        """`images` [N, H, W, C], uint8 or floats in [0, 1], on one sheet. Raises InputError for any other."""
        self.png(name, step, sheet_png(images))

    def figure(self, name: str, step: int, figure: "Figure") -> None:
        """A Matplotlib figure."""
        self.png(name, step, figure_png(figure))

    def png(self, name: str, step: int, png: bytes) -> None:
        """The content of a PNG file."""
        width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))  # the PNG's header
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png}
        self._summary(step, [{"tag": name, "image": image}])

    def flush(self) -> None:
        self._synced = time.monotonic()
        if self._writer is None:
            return
        with self._stopping():
            if not exists(self._file):
                self._writer.close()
                lost = "its events are lost; the run goes on in a new file"
                warnings.warn(f"{self._file} was deleted: {lost}", stacklevel=2)
                self._open()
            self._writer.flush()
        if self._writer and self._folder:
            target = self._directory / self._file.name
            with spared(f"{target} cannot be uploaded", "its events are lost if no later upload succeeds", Exception):
                write_whole(target, self._file.read_bytes())

    def close(self) -> None:
        self.flush()
        with self._stopping():
            if self._writer:
                self._writer.close()
        self._writer = None
        if self._folder:
            self._folder.cleanup()

    def _open(self) -> None:
        """Begins a file."""
        from tensorboardX.record_writer import RecordWriter

        folder = Path(self._folder.name if self._folder else self._directory)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()  # files are read in order of their names
        self._file = folder / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._writer = RecordWriter(str(self._file))
        self._put(file_version="brain.Event:2")
        log = self._events.SessionLog
        self._put(step=self._resume_step + 1, session_log=log(status=log.START))

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """A context that an OSError ends with a warning, after which nothing more is written."""
        try:
            yield
        except OSError as error:
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                if writer:
                    writer.close()
            what = f"TensorBoard's events in {self._directory} cannot be written"
            warn_once(what, error, "its curves end here; the run goes on")

    def _summary(self, step: int, values: list[dict[str, Any]]) -> None:
        self._add(step, summary=self._summaries.Summary(value=values))

    def _add(self, step: int | None = None, **content: Any) -> None:
        """Writes an event with `content`: a summary, a session log or the file's version."""
        with self._stopping():
            if self._writer:
                self._put(step, **content)
        if _due(self._synced):
            self.flush()

    def _put(self, step: int | None = None, **content: Any) -> None:
        event = self._events.Event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())
