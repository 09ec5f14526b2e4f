"""Writers of metrics: JSON lines, and TensorBoard event files.

Values are scalars, or [S] with one number per seed. Paths are local or `gs://`. Objects in a bucket cannot be appended
to, so such a file grows in a local temporary folder and is uploaded as a whole every half minute and at `flush` and
`close`. If the process is killed, the lines since the last upload are lost. Call `flush` before a checkpoint is saved,
so that a run that resumes from it has all lines up to that step.
"""

import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from dl_jax.harness.report.figures import figure_png, sheet_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYNC_EVERY = 30.0  # seconds between uploads, and between flushes of TensorBoard's buffer


class _Place:
    """The local path of a file: its own path, or one in a temporary folder from which it is uploaded to a bucket."""

    def __init__(self, path: epath.Path) -> None:
        self._bucket = path if "://" in os.fspath(path) else None
        self._folder = tempfile.TemporaryDirectory() if self._bucket else None
        self.local = Path(self._folder.name if self._folder else path.parent, path.name)
        self._synced = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._synced >= SYNC_EVERY

    def upload(self) -> None:
        if self._bucket:
            self._bucket.write_bytes(self.local.read_bytes())
        self._synced = time.monotonic()

    def close(self) -> None:
        self.upload()
        if self._folder:
            self._folder.cleanup()


class JsonLines:
    """One JSON object a line: {"step": 100, "time": seconds since 1970, "loss": 0.3, "error": [0.1, 0.2], ...}.

    Values that are not finite are null. First, lines of steps after `resume_step`, which the run will repeat, and a
    line that a kill has left incomplete are removed.
    """

    def __init__(self, path: epath.PathLike, resume_step: int) -> None:
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._place = _Place(path)
        old = path.read_bytes() if path.exists() else b""
        kept = b"".join(_kept(old, resume_step))
        local = self._place.local
        if kept != old or not local.exists():
            new = local.with_name(local.name + ".new")
            new.write_bytes(kept)
            new.replace(local)  # all or nothing
            self._place.upload()
        self._file = local.open("ab", buffering=0)  # a line is one write: a kill tears at most the last

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": int(step), "time": round(time.time(), 3), **{k: _json(v) for k, v in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        if self._place.due():
            self.flush()

    def flush(self) -> None:
        self._place.upload()

    def close(self) -> None:
        self._file.close()
        self._place.close()


def read_lines(path: epath.PathLike, resume_step: int) -> list[dict[str, Any]]:
    """The records in the file of a `JsonLines`, of steps up to `resume_step`."""
    path = epath.Path(path)
    return [json.loads(line) for line in _kept(path.read_bytes(), resume_step)] if path.exists() else []


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

    `seeds` [S] name the curves of values [S].
    """

    # Events go straight to tensorboardX's record writer: the queue of its SummaryWriter cannot be flushed, and a second
    # SummaryWriter (or its add_hparams) within one second opens a file of the same name and destroys the first.

    def __init__(self, directory: epath.PathLike, resume_step: int, seeds: Sequence[int] = ()) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        self._seeds = seeds
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2

        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()  # files are read in order of their names
        self._place = _Place(directory / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}")
        self._writer = RecordWriter(str(self._place.local))
        self._add(file_version="brain.Event:2")
        log = self._events.SessionLog
        self._add(step=resume_step + 1, session_log=log(status=log.START))

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
        self._writer.flush()
        self._place.upload()

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()
        self._place.close()

    def _summary(self, step: int, values: list[dict[str, Any]]) -> None:
        self._add(step, summary=self._summaries.Summary(value=values))

    def _add(self, step: int | None = None, **content: Any) -> None:
        """Writes an event with `content`: a summary, a session log or the file's version."""
        self._writer.write(self._events.Event(wall_time=time.time(), step=step, **content).SerializeToString())
        if self._place.due():
            self.flush()
