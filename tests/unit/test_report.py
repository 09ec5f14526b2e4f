"""Sinks: JSON lines, TensorBoard, images, the progress bar and the final table."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from dl_jax.core.errors import InputError
from dl_jax.harness.report import terminal
from dl_jax.harness.report import writers as report
from dl_jax.harness.report.figures import (
    Point,
    confusion_figure,
    curves_figure,
    image_sheet,
    reliability_figure,
    rolls_figure,
    rows_figure,
    spectrograms_figure,
    trade_figure,
)
from dl_jax.harness.report.tables import markdown_rows
from dl_jax.harness.report.terminal import Progress, print_table
from dl_jax.harness.report.writers import JsonLines, TensorBoard
from dl_jax.harness.results.claims import Claim, judge, summary


class Terminal(io.StringIO):
    """What a terminal would be sent."""

    def isatty(self) -> bool:
        return True


def raising(code: int, words: str):
    def fail(*arguments):
        raise OSError(code, words)

    return fail


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def points(events, tag) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


# --- JSON lines --------------------------------------------------------------------------------------------------


def test_a_line_holds_numbers_and_one_value_for_each_seed(tmp_path):
    sink = JsonLines(tmp_path / "run" / "metrics.jsonl", 0)
    values = {"loss": np.float32(0.5), "error": np.array([0.25, np.nan]), "epoch": np.int32(3), "worst": -np.inf}
    sink.write(np.int64(100), values)
    (record,) = records(tmp_path / "run" / "metrics.jsonl")  # already there, before `close`
    sink.close()
    assert record.pop("time") > 1.6e9
    assert record == {"step": 100, "loss": 0.5, "error": [0.25, None], "epoch": 3, "worst": None}


def test_resuming_drops_repeated_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 100, "loss": 1}\n{"step": 200, "loss": 2}\n{"step": 300, "loss": 3}\n{"step": 100, "lo')
    sink = JsonLines(path, 200)
    assert [r["step"] for r in records(path)] == [100, 200]
    sink.write(300, {"loss": 4})
    sink.close()
    assert [r["loss"] for r in records(path)] == [1, 2, 4]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "torn", [b'{"step": 200', b'{"step": 200}', b'{"step": 200}\nnull\n[1]\n{"loss": 1}\n', b"\xff\n"]
)
def test_resuming_survives_any_torn_or_foreign_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 100, "loss": 1}\n'
    path.write_bytes(whole + torn)
    JsonLines(path, 200).close()
    assert path.read_bytes() == whole + (b'{"step": 200}\n' if torn.startswith(b'{"step": 200}\n') else b"")


def test_a_sound_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 100}\n')
    before = path.stat().st_ino
    JsonLines(path, 100).close()
    assert path.stat().st_ino == before


def test_sigkill_loses_no_written_line(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from dl_jax.harness.report.writers import JsonLines
        sink = JsonLines(sys.argv[1], 0)
        for step in range(1, 4): sink.write(step, {"loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    path = tmp_path / "metrics.jsonl"
    status = subprocess.run([sys.executable, "-c", script, str(path)], cwd=Path(__file__).parents[2]).returncode
    assert status == -9
    assert [r["step"] for r in records(path)] == [1, 2, 3]


@pytest.mark.parametrize("what", ["file", "folder", "torn", "emptied", "replaced"])
def test_the_next_line_mends_the_file(tmp_path, what):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonLines(path, 0)
    sink.write(1, {"loss": 1.0})
    match what:
        case "file":
            path.unlink()
        case "folder":
            shutil.rmtree(path.parent)
        case "torn" | "emptied":
            path.write_bytes(path.read_bytes()[:9] if what == "torn" else b"")
        case "replaced":
            path.write_text("something longer than the line that was there, by whoever it was, and by mistake\n")
    sink.write(2, {"loss": 2.0})
    assert [r["step"] for r in records(path)] == [1, 2]
    sink.close()
    assert os.listdir(path.parent) == ["metrics.jsonl"]


class Short(io.FileIO):
    """A file on a disk that has room for 9 more bytes."""

    def write(self, data, /) -> int:
        return super().write(data[:9])


def test_lines_of_a_time_without_room_are_written_later(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    sink.write(1, {"loss": 1.0})
    opened, fsync = Path.open, os.fsync
    short = lambda file, mode, **keywords: Short(file, mode) if mode == "ab" else opened(file, mode, **keywords)
    monkeypatch.setattr(Path, "open", short)
    monkeypatch.setattr(os, "fsync", raising(errno.ENOSPC, "No space left on device"))

    def write() -> None:
        sink.write(2, {})
        sink.write(3, {})
        sink.close()

    words = r"metrics\.jsonl cannot be written \(No space left on device\): its lines are in memory.*; the run goes on"
    with pytest.warns(UserWarning, match=words) as warned:
        write()
    assert len(warned) == 1
    assert path.read_bytes().endswith(b'\n{"step": ')
    monkeypatch.setattr(os, "fsync", fsync)
    sink.write(4, {})
    assert [r["step"] for r in records(path)] == [1, 2, 3, 4]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("kind", ["folder", "unreadable"])
def test_lines_that_cannot_be_read_are_set_aside(tmp_path, monkeypatch, kind):
    path = tmp_path / "metrics.jsonl"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_text('{"step": 1}\n')
        monkeypatch.setattr(type(epath.Path(path)), "read_bytes", raising(errno.EIO, "Input/output error"))

    def begin() -> JsonLines:
        assert report.read_lines(path, 1) == []
        return JsonLines(path, 1)

    with pytest.warns(UserWarning, match=r"metrics\.jsonl cannot be read .*; the run goes on") as warned:
        sink = begin()
    assert len(warned) == 1
    sink.write(2, {})
    sink.close()
    assert [r["step"] for r in records(path)] == [2]
    assert (tmp_path / "metrics.jsonl.unreadable").exists()


# --- TensorBoard -------------------------------------------------------------------------------------------------


def test_scalars_come_back_one_curve_for_each_seed_and_the_mean(tmp_path, accumulated):
    sink = TensorBoard(tmp_path, 0)
    sink.scalars(100, {"loss": np.float32(0.5), "error": np.array([1.0, 3.0])})
    sink.scalars(200, {"loss": np.nan, "error": np.array([2.0, 4.0])})
    sink.scalars(300, {"error": np.array([np.nan, 5.0])})
    sink.close()
    events = accumulated(tmp_path)
    assert set(events.Tags()["scalars"]) == {"loss", "error/seed0", "error/seed1", "error/mean"}
    assert points(events, "error/mean") == [(100, 2.0), (200, 3.0), (300, 5.0)]
    assert points(events, "error/seed0") == [(100, 1.0), (200, 2.0)]  # NaN is nothing to draw
    assert points(events, "error/seed1") == [(100, 3.0), (200, 4.0), (300, 5.0)]
    assert points(events, "loss") == [(100, 0.5)]


def test_steps_that_are_repeated_after_a_resume_are_hidden(tmp_path, accumulated):
    first = TensorBoard(tmp_path, 0)
    for step in (100, 200, 300):
        first.scalars(step, {"loss": 1.0})
    first.flush()  # and then it is killed
    second = TensorBoard(tmp_path, 200)  # within the same second
    second.scalars(250, {"loss": 2.0})
    second.close()
    assert points(accumulated(tmp_path), "loss") == [(100, 1.0), (200, 1.0), (250, 2.0)]
    first.close()


def test_hparams_leave_the_scalars_alone(tmp_path, accumulated):
    sink = TensorBoard(tmp_path, 0)
    sink.scalars(100, {"loss": 1.0})
    config = {"learning_rate": 1e-3, "steps": 10, "dataset": "digits", "augment": True, "hidden": (3, 4), "clip": None}
    sink.hparams(config, {"error": np.array([1.0, 2.0])})
    sink.scalars(200, {"loss": 2.0})
    sink.close()
    events = accumulated(tmp_path)
    assert points(events, "loss") == [(100, 1.0), (200, 2.0)]
    assert points(events, "measured/error") == [(0, 1.5)]
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    stored = HParamsPluginData.FromString(content).session_start_info.hparams
    assert stored["learning_rate"].number_value == 1e-3
    assert stored["augment"].bool_value is True
    assert (stored["dataset"].string_value, stored["hidden"].string_value) == ("digits", "(3, 4)")


def test_pictures_and_figures_come_back(tmp_path, accumulated):
    from PIL import Image

    sink = TensorBoard(tmp_path, 0)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    sink.image("samples", 5, images)
    sink.figure("confusion", 5, confusion_figure(np.eye(3), "abc"))
    sink.close()
    events = accumulated(tmp_path)
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (5, 17, 17)
    decoded = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(decoded[9:, 9:, 0], images[3, :, :, 0])
    assert events.Images("confusion")[0].width > 300


class Full:
    """tensorboardX's record writer on a full disk. `fails` is the method that notices."""

    def __init__(self, fails: str) -> None:
        self.fails = fails

    def write(self, data: bytes) -> None:
        self.act("write")

    def flush(self) -> None:
        self.act("flush")

    def close(self) -> None:
        self.act("close")

    def act(self, name: str) -> None:
        if name == self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["write", "flush", "close"])
def test_events_that_cannot_be_written_end_no_run(tmp_path, monkeypatch, fails):
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter", lambda path: Path(path).touch() or Full(fails))

    def write() -> None:
        sink = TensorBoard(tmp_path, 0)
        for _ in range(2):
            sink.scalars(1, {"loss": 1.0})
            sink.flush()
        sink.close()
        sink.close()

    words = r"TensorBoard's events in .* cannot be written \(No space left on device\): .*; the run goes on"
    with pytest.warns(UserWarning, match=words) as warned:
        write()
    assert len(warned) == 1


def test_a_folder_that_cannot_be_made_gets_no_events(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        sink = TensorBoard(tmp_path / "file", 0)
    sink.hparams({"a": 1}, {"loss": 1.0})
    sink.close()


def test_after_a_folder_is_deleted_the_curves_go_on_in_a_new_one(tmp_path, accumulated):
    folder = tmp_path / "run"
    sink = TensorBoard(folder, 0)
    sink.scalars(1, {"loss": 1.0})
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="was deleted: its events are lost; the run goes on in a new file"):
        sink.flush()
    sink.scalars(2, {"loss": 2.0})
    sink.close()
    assert points(accumulated(folder), "loss") == [(2, 2.0)]


# --- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "shape"), [(1, (8, 6)), (3, (17, 13)), (5, (17, 20))])
def test_a_sheet_is_a_grid_with_white_lines(n, shape):
    images = np.linspace(-0.5, 1.2, n * 8 * 6 * 3).reshape(n, 8, 6, 3)
    sheet = image_sheet(images)
    assert sheet.shape == (*shape, 3)
    np.testing.assert_array_equal(sheet[:8, :6], np.round(255 * np.clip(images[0], 0, 1)))
    if n > 1:
        assert (sheet[:, 6] == 255).all()
        assert (sheet[8] == 255).all()


@pytest.mark.parametrize("wrong", [np.zeros((8, 8, 1)), np.zeros((2, 8, 8, 4)), np.zeros((2, 8, 8, 1), np.int32)])
def test_a_sheet_of_something_else_is_refused(wrong):
    with pytest.raises(InputError, match=r"expected .*\[N, H, W, C\]|expected uint8"):
        image_sheet(wrong)


def test_curves_have_their_mean_and_their_range_over_seeds():
    y = np.array([[1.0, 3.0], [2.0, 8.0]])
    figure = curves_figure(
        {"a": ([0, 10], y), "b": ([0, 5, 10], [3, 2, 1])}, xlabel="steps", ylabel="error", log_y=True
    )
    (axes,) = figure.axes
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[0, 2], [10, 5]])
    np.testing.assert_array_equal(second.get_ydata(), [3, 2, 1])
    corners = axes.collections[0].get_paths()[0].vertices
    assert {(10.0, 2.0), (10.0, 8.0), (0.0, 1.0), (0.0, 3.0)} <= set(map(tuple, corners))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("steps", "error", "log")


@pytest.mark.parametrize(("y", "said"), [([1.0], "expected equal lengths"), ([np.nan, np.inf], "no finite number")])
def test_what_is_no_curve_is_refused(y, said):
    with pytest.raises(InputError, match=f"curve 'a' .*{said}"):
        curves_figure({"a": ([0, 1], y)}, xlabel="", ylabel="")


def test_confusion_figure_shows_counts_and_shares():
    figure = confusion_figure(np.array([[8, 2], [0, 0]]), ["cat", "dog"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["8", "2"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2], [0, 0]])
    assert axes.get_title() == "8 of 10 right (80.00%)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    with pytest.raises(InputError, match=r"shape \(2, 2\), expected \(3, 3\)"):
        confusion_figure(np.eye(2), "abc")


# --- progress ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; advance it by `clock.now += seconds`."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(terminal.time, "monotonic", lambda: Clock.now)
    return Clock


def test_plain_lines_first_every_ten_seconds_and_last(clock):
    out = io.StringIO()
    bar = Progress("lenet", 0, 1000, 128, file=out)
    for step in range(1, 601):
        bar.update(step, {"loss": np.array([1.0, 2.0])} if step % 100 == 0 else None)
        clock.now += 0.0625
    bar.close()
    bar.close()
    assert out.getvalue().splitlines() == [
        "lenet 1/1000",
        "lenet 161/1000 · 16 steps/s · loss 1.5 · 2.05k examples/s · 0:52 left",
        "lenet 321/1000 · 16 steps/s · loss 1.5 · 2.05k examples/s · 0:42 left",
        "lenet 481/1000 · 16 steps/s · loss 1.5 · 2.05k examples/s · 0:32 left",
        "lenet 600/1000 · 16 steps/s · loss 1.5 · 2.05k examples/s · in 0:37",
    ]


def test_the_last_seconds_give_the_speed_and_a_resumed_run_does_not_count_old_steps(clock):
    out = io.StringIO()
    bar = Progress("", 5000, 9000, file=out)
    for step, seconds in ((5001, 0.0), (5011, 10.0), (6011, 10.0)):
        clock.now += seconds
        bar.update(step, {"g": 1.0, "d": 2.0, "e": 3.0})
    assert out.getvalue().splitlines() == [
        "5001/9000 · g 1 · d 2",
        "5011/9000 · 1 steps/s · g 1 · d 2 · 1:06:29 left",
        "6011/9000 · 100 steps/s · g 1 · d 2 · 0:30 left",
    ]


@pytest.mark.parametrize("loss", [np.nan, np.inf, np.array([np.nan, 1.0]), np.float32(1e-30)])
def test_no_value_breaks_the_text(clock, loss):
    for out in (io.StringIO(), Terminal()):
        bar = Progress("[odd] label", 0, 2, 0, file=out)
        bar.update(1, {"loss": loss})
        clock.now += 100
        bar.update(2, {"loss": loss})
        bar.close()
        assert "[odd] label" in out.getvalue()
        assert f"loss {np.mean(loss):.4g}" in out.getvalue()


def test_without_an_update_nothing_is_printed():
    out = io.StringIO()
    Progress("lenet", 100, 100, file=out).close()
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_that_moves_between_reports(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    bar = Progress("lenet", 0, 1000, 128, file=out)
    bar.update(1, {"loss": 0.25})
    clock.now += 0.1
    drawn = len(out.getvalue())
    bar.update(50)
    assert len(out.getvalue()) == drawn  # not yet due
    clock.now += 0.4
    bar.update(101)
    seen = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", out.getvalue()[drawn:])
    assert "101/1000 · 200 steps/s · loss 0.25 · 25.6k examples/s · 0:04 left" in seen
    bar.close()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(("columns", "shown", "left_out"), [(70, "steps/s", "examples/s"), (45, "loss", "steps/s")])
def test_a_narrow_terminal_leaves_out_the_least_telling(clock, monkeypatch, columns, shown, left_out):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    bar = Progress("lenet/seed0", 0, 1000, 128, file=out)
    bar.update(1, {"loss": 0.25})
    clock.now += 1
    bar.update(101)
    bar.close()
    assert shown in out.getvalue()
    assert left_out not in out.getvalue()
    assert "left" in out.getvalue()


class Gone(Terminal):
    """A terminal that is closed after a while."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_is_gone_ends_no_run(clock, monkeypatch, terminal):
    monkeypatch.setattr(Gone, "isatty", lambda self: terminal)
    out = Gone()
    bar = Progress(f"gone {terminal}", 0, 1000, file=out)
    bar.update(1)
    out.gone = True

    def go_on() -> None:
        for step in (2, 3):
            clock.now += 60
            bar.update(step)
        bar.close()

    with pytest.warns(UserWarning, match=r"cannot be shown \(Input/output error\)") as warned:
        go_on()
    assert len(warned) == 1


def test_without_stderr_or_with_a_closed_one_nothing_is_shown(monkeypatch, capsys):
    def show(label: str) -> None:
        bar = Progress(label, 0, 10)
        bar.update(1)
        bar.close()

    monkeypatch.setattr(sys, "stderr", None)
    show("no stderr")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with pytest.warns(UserWarning, match="cannot be shown"):
        show("closed stderr")
    assert capsys.readouterr().out == ""


# --- the final table ---------------------------------------------------------------------------------------------

CLAIMS = (
    Claim("error", "Doe 2020", "Table 1", 1.0, 0.2, "%", given={"dataset": "mnist"}),
    Claim("error", "Roe 2021", "Table 2", 3.0, 0.2, "%", verified=False),
    Claim("error", "Poe 2022", "Table 3", 1.0, 0.2, "%", preset="quick"),
    Claim("error/imagenet", "Poe 2022", "Table 4", 20.0, 0.2, "%"),
)


def result(config=None, preset="paper") -> dict:
    measured = {"error": [1.0, 1.1, 0.9, 1.05, 0.95], "seconds": [7.0, 8.0, 9.0, 8.0, 8.0]}
    config = config or {"dataset": "mnist"}
    return {
        "measured": {name: summary(values) for name, values in measured.items()},
        "claims": judge(CLAIMS, measured, preset=preset, config=config),
        "preset": preset,
        "config": config,
    }


def test_the_table_in_a_file_is_plain_and_never_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    print_table(result(), out)
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.getvalue().splitlines()]
    assert lines[1:] == [
        ["metric", "paper", "claimed", "measured ± std (n)", "tolerance", "verdict"],
        ["─" * len(out.getvalue().splitlines()[2].strip())],
        ["error", "Doe 2020, Table 1", "1 %", "1.000 ± 0.079 (5)", "± 0.2", "reproduced"],
        ["error", "Roe 2021, Table 2", "3 % (unverified)", "1.000 ± 0.079 (5)", "± 0.2", "better than claimed"],
        ["error", "Poe 2022, Table 3", "1 %", "± 0.2", "not applicable: needs preset quick"],
        ["error/imagenet", "Poe 2022, Table 4", "20 %", "± 0.2", "not run"],
        ["seconds", "8.00 ± 0.71 (5)"],
        [""],
    ]
    assert "\x1b" not in out.getvalue()


def test_a_number_that_answers_no_claim_stands_in_its_own_row():
    out = io.StringIO()
    print_table(result({"dataset": "digits"}, "smoke"), out)
    rows = [line for line in out.getvalue().splitlines() if line.startswith(" error ")]
    assert [("1.000 ± 0.079 (5)" in row, "not applicable" in row) for row in rows] == [(False, True)] * 3 + [
        (True, False)
    ]


def test_the_table_fits_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    print_table(result(), out)
    plain = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", out.getvalue())
    assert max(map(len, plain.splitlines())) <= 80
    for words in ("1.000 ± 0.079 (5)", "Doe 2020, Table 1", "reproduced", "(unverified)", "needs preset quick"):
        assert words.split()[0] in plain
    assert "1.000 ± 0.079 (5)" in plain


def test_an_ascii_stream_still_gets_the_table():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_table(result(), out)
    assert b"1.000 ? 0.079 (5)" in raw.getvalue()


def test_a_table_of_an_experiment_in_markdown():
    found = markdown_rows(
        ("name", "file", "kB"), [("a", "x", "1,000"), ("b", "y", "7")], ["First.", "Second."], texts=2
    )
    table, first, second = found.split("\n\n")
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [head, *rows] == [["name", "file", "kB"], ["a", "x", "1,000"], ["b", "y", "7"]]
    assert table.splitlines()[-1] == "|b   |y   |    7|"  # numbers are aligned to the right
    assert (first, second) == ("First.", "Second.\n")


def test_a_figure_of_trades_draws_each_point_where_it_has_a_cost():
    points = [Point("a", "ONNX", (10.0, 100.0), [1.0, 3.0]), Point("b", "encoded", (None, 5.0), [4.0, 4.0])]
    figure = trade_figure(points, points[0], xlabels=("time", "bytes"), ylabel="accuracy")
    left, right = figure.axes
    places = lambda axes: [(each.lines[0].get_xdata()[0], each.lines[0].get_ydata()[0]) for each in axes.containers]
    np.testing.assert_array_equal(places(right), [(100, 2), (5, 4)])
    np.testing.assert_array_equal(places(left), [(10, 2), (np.nan, 4)])
    edges = [each.lines[0].get_markeredgecolor() for each in right.containers]
    assert edges[0] == "black" != edges[1]


def test_a_figure_of_images_has_a_row_for_each_kind():
    figure = rows_figure({"a": 4 * np.eye(3)[None].repeat(4, 0), "b": np.full((4, 2, 2), -3.0)})
    assert [axes.get_ylabel() for axes in figure.axes] == ["a", "b"]
    drawn = [axes.images[0] for axes in figure.axes]
    assert [each.get_clim() for each in drawn] == [(0, 1), (-1, 1)]
    np.testing.assert_array_equal(drawn[0].get_array(), np.tile(np.pad(np.eye(3), ((1, 1), (2, 2))), (1, 4)))
    np.testing.assert_array_equal(drawn[1].get_array(), np.tile(np.pad(-np.ones((2, 2)), ((1, 1), (2, 2))), (1, 4)))


def test_reliability_has_a_panel_for_each_class():
    counted = np.zeros((7, 2, 3))
    counted[:, 1] = 0.5, 0.4, 0.3
    figure = reliability_figure({"plain": counted, "other": counted}, list("abcdefg"))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list("abcdefg")
    *lines, diagonal = shown[3].lines
    assert [line.get_label() for line in lines] == ["plain", "other"]
    np.testing.assert_allclose([line.get_xydata() for line in lines], [[(0.8, 0.6)]] * 2)  # the empty bin is left out
    np.testing.assert_array_equal(diagonal.get_xydata(), [(0, 0), (1, 1)])
    with pytest.raises(InputError, match=r"^'plain' has 7 classes and 2 names; give a name for each"):
        reliability_figure({"plain": counted}, ["a", "b"])


def test_spectrograms_share_their_colours_and_their_time():
    given = [np.arange(6.0).reshape(3, 2), np.full((5, 2), -4.0), *np.zeros((3, 1, 2))]
    figure = spectrograms_figure(given, list("abcde"), seconds=0.5)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list("abcde")
    assert {axes.images[0].get_clim() for axes in shown} == {(-4, 5)}
    assert {axes.get_xlim() for axes in shown} == {(0, 2.5)}
    np.testing.assert_array_equal(shown[0].images[0].get_array(), given[0].T)
    assert shown[0].images[0].get_extent() == [0, 1.5, 0, 2]  # the first bin at the bottom
    for titles, count in (([], 0), (["a"], 2)):
        with pytest.raises(InputError, match=f"^{len(titles)} titles for {count} spectrograms, expected one or more"):
            spectrograms_figure(given[:count], titles, seconds=0.5)


def test_piano_rolls_share_their_keys_and_their_time():
    notes = np.zeros((4, 9), np.uint8)
    notes[0, 2] = notes[3, 5] = 1
    predicted = np.linspace(0, 1, 36).reshape(4, 9)
    predicted[0] = np.nan
    figure = rolls_figure({"notes": notes, "probability": predicted})
    above, below = figure.axes[:2]
    assert [axes.get_title() for axes in (above, below)] == ["notes", "probability"]
    for axes, roll in ((above, notes), (below, predicted)):
        np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), np.nan), roll[:, 2:6].T)
        assert axes.images[0].get_extent() == [-0.5, 3.5, 1.5, 5.5]  # the lowest key at the bottom
        assert axes.images[0].origin == "lower"
        assert axes.images[0].get_clim() == (0, 1)
    silent = rolls_figure({"notes": 0 * notes}).axes[0].images[0]
    assert silent.get_array().shape == (9, 4)
    with pytest.raises(InputError, match=r"^piano rolls of shapes .*, expected one or more of one shape; cut"):
        rolls_figure({"notes": notes, "probability": predicted[1:]})
