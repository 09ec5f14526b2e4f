"""What a run can do without: output, files and locks that fail or are damaged while it goes on."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath

from dl_jax.core import files
from dl_jax.core.errors import InputError, Unavailable, lasting_output, spared
from dl_jax.core.files import locked, write_whole
from dl_jax.harness import workdir

ROOT = Path(__file__).parents[2]


# --- stdout and stderr -------------------------------------------------------------------------------------------


def program(body: str) -> list[str]:
    """A Python program that runs `body` within `lasting_output`."""
    head = "import os, sys\nfrom dl_jax.core.errors import lasting_output\nwith lasting_output():\n"
    return [sys.executable, "-c", head + textwrap.indent(textwrap.dedent(body), "    ")]


@pytest.fixture(autouse=True)
def buffered(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


TALK = """
for i in range(2000):
    print("to stdout", i)
    print("to stderr", i, file=sys.stderr)
sys.exit(3)
"""


@contextlib.contextmanager
def gone(kind: str) -> Iterator[int]:
    """A descriptor that cannot be written."""
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe() if kind == "pipe" else os.openpty()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("kind", ["pipe", "terminal", "full"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("unbuffered", [(), ("-u",)])
def test_an_output_that_is_gone_ends_nothing_and_the_other_says_so_once(kind, name, unbuffered):
    other = "stderr" if name == "stdout" else "stdout"
    executable, *arguments = program(TALK)
    with gone(kind) as descriptor:
        streams = {name: descriptor, other: subprocess.PIPE}
        done = subprocess.run([executable, *unbuffered, *arguments], cwd=ROOT, text=True, **streams)
    lines = getattr(done, other).splitlines()
    reason = os.strerror({"pipe": errno.EPIPE, "terminal": errno.EIO, "full": errno.ENOSPC}[kind])
    assert done.returncode == 3
    assert [line for line in lines if not line.startswith("to ")] == [
        f"warning: <{name}> cannot be written ({reason}): what is printed there is lost; the run goes on"
    ]
    assert len(lines) == 2001


@pytest.mark.parametrize("kind", ["pipe", "full"])
def test_both_outputs_may_be_gone(kind):
    with gone(kind) as out, gone(kind) as err:
        assert subprocess.run(program(TALK), cwd=ROOT, stdout=out, stderr=err).returncode == 3


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_an_output_that_is_closed_from_the_start_ends_nothing(closed, tmp_path):
    body = f"""
    descriptor = os.open({str(tmp_path / "file")!r}, os.O_CREAT | os.O_WRONLY)
    assert descriptor > 2, descriptor
    """
    command = ["sh", "-c", f'"$@" {closed}', "sh", *program(textwrap.dedent(body) + TALK)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == (0 if ">&-" in closed.split() else 2000)
    assert len(done.stderr.splitlines()) == (0 if "2>&-" in closed else 2000)


def test_what_another_has_written_to_the_old_streams_changes_no_status():
    with gone("pipe") as out, gone("pipe") as err:
        body = """
        import logging
        logging.basicConfig(stream=sys.__stderr__)
        logging.warning("x")
        sys.__stdout__.write("x")
        print("x")
        """
        assert subprocess.run(program(body), cwd=ROOT, stdout=out, stderr=err).returncode == 0


def test_a_traceback_comes_through_and_what_follows_is_as_before():
    body = """
    assert sys.stdout is not sys.__stdout__
    import atexit
    atexit.register(lambda: print(sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__))
    print("first")
    raise RuntimeError("a bug")
    """
    done = subprocess.run(program(body), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "first\nTrue True\n")
    assert done.stderr.endswith("RuntimeError: a bug\n")


def test_a_descriptor_that_does_not_block_gets_all_in_the_end():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    body = "print('x' * 300_000)"
    with subprocess.Popen(program(body), cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        time.sleep(0.3)  # the pipe is full meanwhile
        with open(reader) as stream:
            assert stream.read() == "x" * 300_000 + "\n"
        assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_a_disk_that_has_room_again_gets_what_is_printed_then(tmp_path):
    body = """
    import resource
    print("first", flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    print("second", flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("third", flush=True)
    """
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(program(body), cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stderr.count("<stdout> cannot be written (File too large)") == 1
    assert (tmp_path / "log").read_text() == "first\nsethird\n"


def test_a_stream_keeps_its_nature():
    body = r"""
    out, old = sys.stdout, sys.__stdout__
    for stream in (out, old):
        print(stream.isatty(), stream.fileno(), stream.encoding, stream.line_buffering, stream.name, file=sys.stderr)
    print("\N{GREEK SMALL LETTER OMEGA}")
    """
    master, terminal = os.openpty()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program(body), cwd=ROOT, stdout=terminal, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(terminal)
    assert done.stderr == "True 1 ascii True <stdout>\n" * 2
    assert os.read(master, 100) == b"?\r\n"
    os.close(master)


def test_a_stream_that_is_not_pythons_own_is_left_as_it_is(capsys):
    before = sys.stdout, sys.stderr
    with lasting_output():
        assert (sys.stdout, sys.stderr) == before
        print("x")
    assert capsys.readouterr().out == "x\n"


# --- what is spared ----------------------------------------------------------------------------------------------


def test_a_failure_is_spared_with_one_warning_for_each_thing(tmp_path):
    def fail(*names: str) -> None:
        for name in names:
            with spared(f"{tmp_path / name} cannot be written", "it is lost"):
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.warns(UserWarning, match="the run goes on") as warned:
        fail("a", "a", "b")
    expected = "{} cannot be written (No space left on device): it is lost; the run goes on"
    assert [str(each.message) for each in warned] == [expected.format(tmp_path / name) for name in ("a", "b")]


def test_a_bug_is_not_spared():
    with pytest.raises(ValueError, match="bug"), spared("x", "y"):
        raise ValueError("a bug")


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Path, epath.Path])
def test_a_file_is_written_whole_in_a_folder_that_was_missing(tmp_path, kind):
    file = kind(tmp_path / "a" / "b" / "file")
    for content in (b"one", b"", b"two"):
        write_whole(file, content)
        assert file.read_bytes() == content
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


def test_the_file_is_on_the_disk_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda at: (done.append(os.path.isdir(f"/proc/self/fd/{at}")), fsync(at)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("renamed"), replace(self, to))[1])
    write_whole(tmp_path / "file", b"content")
    assert done == [False, "renamed", True]


@pytest.mark.parametrize("code", files.UNSUPPORTED)
def test_a_file_system_that_cannot_sync_keeps_the_file(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", raising(code))
    write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_whole(file, b"old")
    monkeypatch.setattr(os, "fsync", raising(errno.ENOSPC))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_whole(file, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_several_may_write_the_same_file(tmp_path):
    failed = []

    def write(content: bytes) -> None:
        try:
            for _ in range(20):
                write_whole(tmp_path / "file", content)
        except Exception as error:
            failed.append(error)

    contents = [bytes([i]) * 10_000 for i in range(4)]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() in contents


# --- locks -------------------------------------------------------------------------------------------------------


def raising(code: int):
    def function(*arguments):
        raise OSError(code, os.strerror(code))

    return function


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(file: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        yield process


@pytest.mark.parametrize("code", files.UNSUPPORTED)
def test_a_file_system_without_locks_needs_none(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", raising(code))

    def both() -> None:
        for name in ("a.lock", "b.lock"):
            with locked(tmp_path / name):
                pass

    words = rf"cannot be locked \({os.strerror(code)}\)"
    alone = pytest.warns(UserWarning, match=rf"{words}: make sure that no other run uses it; the run goes on")
    with alone, workdir.locked(epath.Path(tmp_path), str(tmp_path)):
        assert os.listdir(tmp_path) == [".lock"]
    with pytest.warns(UserWarning, match=rf"{words}: another process may do the same work") as warned:
        both()
    assert len(warned) == 1


def test_a_lock_that_is_held_elsewhere(tmp_path):
    with held_by_another(tmp_path / ".lock") as other:
        refused = pytest.raises(InputError, match="is in use by another process; wait for it, or choose another")
        with refused, workdir.locked(epath.Path(tmp_path), str(tmp_path)):
            pass
        threading.Timer(0.2, other.kill).start()
        began = time.monotonic()
        with locked(tmp_path / ".lock"):  # waits until it is free; a kill leaves no lock
            assert time.monotonic() - began > 0.1
    with workdir.locked(epath.Path(tmp_path), str(tmp_path)):
        pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_lock_that_cannot_be_opened_is_bad_input(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "open", raising(code))
    reason = os.strerror(code)
    refused = pytest.raises(InputError, match=rf"^--workdir W cannot be locked \({reason}\); choose a folder of yours$")
    with refused, workdir.locked(epath.Path(tmp_path), "W"):
        pass
    refused = pytest.raises(InputError, match=rf"^cannot write in .* \({reason}\): expected a folder with free space")
    with refused, locked(tmp_path / "a.lock"):
        pass


def test_what_the_body_raises_is_not_taken_for_the_lock(tmp_path):
    with pytest.raises(BlockingIOError, match="the body"), workdir.locked(epath.Path(tmp_path), "W"):
        raise BlockingIOError("the body")


# --- the folder of a run -----------------------------------------------------------------------------------------

WHOLE = json.dumps([{"commit": "a", "clean": True, "seconds": 1.0}]).encode()


@pytest.fixture(params=["empty", "half", "another", "folder"])
def damaged(request, tmp_path) -> epath.Path:
    file = tmp_path / "attempts.json"
    contents = {"empty": b"", "half": WHOLE[: len(WHOLE) // 2], "another": b"\xff"}
    if request.param == "folder":
        file.mkdir()
    else:
        file.write_bytes(contents[request.param])
    return epath.Path(file)


def test_damaged_attempts_are_one_that_is_unknown(damaged):
    with pytest.warns(UserWarning, match=r"attempts\.json is damaged: .* the result will not count as clean"):
        assert workdir.earlier_attempts(damaged) == [{"commit": None, "clean": False, "seconds": None}]


@pytest.mark.parametrize("read", [workdir.earlier_attempts, workdir.read_json])
def test_what_cannot_be_read_is_not_damaged(tmp_path, monkeypatch, read):
    file = epath.Path(tmp_path / "attempts.json")
    file.write_bytes(WHOLE)
    monkeypatch.setattr(files, "PAUSES", (0.01,))
    monkeypatch.setattr(type(file), "read_bytes", raising(errno.EIO))
    with pytest.raises(Unavailable, match=r"attempts\.json cannot be read .*, tried 2 times"):
        read(file)


def test_damaged_json_is_as_none(damaged, tmp_path):
    assert workdir.read_json(damaged) is None
    assert workdir.read_json(epath.Path(tmp_path / "missing")) is None


def test_attempts_come_back(tmp_path):
    file = epath.Path(tmp_path / "run" / "attempts.json")
    assert workdir.earlier_attempts(file) == []
    workdir.write_json(file, json.loads(WHOLE))
    assert workdir.earlier_attempts(file) == workdir.read_json(file) == json.loads(WHOLE)
