"""Work folders, data and caches at gs:// addresses, against a bucket in memory (see programs/bucket.py)."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from etils import epath

from dl_jax import data
from dl_jax.core import bucket
from dl_jax.core.errors import InputError, Unavailable
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step
from dl_jax.data import bundled, columns, digits
from dl_jax.harness import Run, lease, workdir
from dl_jax.harness.checkpoint import files as checkpoint_files
from dl_jax.harness.checkpoint.store import Checkpoints, load
from dl_jax.harness.launch import launch
from dl_jax.harness.report import writers
from dl_jax.harness.report.writers import JsonLines, TensorBoard
from dl_jax.harness.watch.read import read

HERE = Path(__file__).parent
NAMES = iter(range(10**6))


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    """The server of the bucket gs://emulated, for this process and those that it starts."""
    spec = importlib.util.spec_from_file_location("bucket_server", HERE / "programs" / "bucket.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    server = program.serve("emulated")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(variable, f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # else TensorStore looks for an account
        bucket.client()
        yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def address(served, tmp_path, monkeypatch) -> epath.Path:
    """An address below which there is nothing. The cache folder of this machine is empty too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return epath.Path(f"gs://emulated/{next(NAMES)}")


def names(folder: epath.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: epath.Path) -> None:
    """Changes one bit in the middle of an object."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


# ----------------------------------------------------------------------------------------------------- the layer


def test_what_is_not_there_is_one_line(address):
    with pytest.raises(InputError, match=r"^--workdir gs://nobodys/run: there is no bucket nobodys, expected one"):
        bucket.require("gs://nobodys/run", "--workdir")
    names = ("runs*", "run?", "run[1]", "a#b", "100%", "a/../b", "..", "a\nb")  # one could remove objects of other runs
    for wrong in ("s3://emulated/run", "gs://", "gs:///run", "gs://UPPER/run", *(f"gs://emulated/{n}" for n in names)):
        with pytest.raises(InputError, match=r"^--workdir .*, expected a local folder or gs://BUCKET/NAME without any"):
            bucket.require(wrong, "--workdir")
    for right in ("", "/", "/a..b/.c/...", "/a b/\u00fc+(1)='@,:"):
        bucket.require(f"gs://emulated{right}", "--workdir")
    bucket.require("gs://emulated", "--workdir")
    bucket.require(os.fspath(address), "--workdir")


@contextlib.contextmanager
def away() -> Iterator[None]:
    """A context in which nobody answers, and gcsfs does not wait before it tries again."""

    async def at_once(seconds: float) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
        patch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=at_once))
        yield


def test_a_bucket_that_does_not_answer_is_unavailable_and_not_empty(address, monkeypatch):
    (address / "3" / "commit_success.txt").write_text("")
    monkeypatch.setattr("dl_jax.core.files.PAUSES", (0.0,))
    with away():
        with pytest.raises(Unavailable, match=r"^--workdir gs://emulated/run does not answer \(.*\); give the same"):
            bucket.require("gs://emulated/run", "--workdir")
        for look in (bucket.is_folder, bucket.listing, checkpoint_files.steps, lambda path: path.exists()):
            with pytest.raises(OSError, match=r"Connect|connect"):
                look(address)
        with pytest.raises(Unavailable, match=r"cannot be read .*, tried 2 times"):
            workdir.has_begun(address)
    assert workdir.has_begun(address) is False


def test_a_bucket_that_takes_a_question_and_is_silent_is_unavailable(served, monkeypatch):
    monkeypatch.setattr(bucket, "PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"^--workdir gs://emulated/run does not answer \(FSTimeoutError\)"):
            bucket.require("gs://emulated/run", "--workdir")
        assert time.monotonic() - began < 5


def test_what_fails_to_be_read_is_tried_again(address, monkeypatch):
    from gcsfs.retry import HttpError

    (address / "config.json").write_text("[3]")
    read, answers = type(address).read_bytes, [HttpError({"code": 503, "message": "busy"})]
    monkeypatch.setattr(type(address), "read_bytes", lambda path: fails(answers.pop()) if answers else read(path))
    monkeypatch.setattr("dl_jax.core.files.PAUSES", (0.0,))
    assert workdir.read_json(address / "config.json") == [3]
    answers += [HttpError({"code": 503, "message": "busy"})] * 2
    with pytest.raises(Unavailable, match=r"config\.json cannot be read \(busy, 503\), tried 2 times"):
        workdir.read_json(address / "config.json")


def fails(error: Exception) -> Any:
    raise error


def test_an_object_in_the_place_of_a_folder_is_not_in_it(address, monkeypatch):
    found = {"type": "file", "size": 0, "crc32c": "AAAAAA=="}
    own = os.fspath(address).removeprefix("gs://")
    monkeypatch.setattr(
        bucket.client(), "ls", lambda *_, detail: [{**found, "name": n} for n in (f"{own}/", f"{own}/a")]
    )
    assert bucket.listing(address) == [bucket.Entry("a", False, 0, "AAAAAA==")]


@pytest.mark.parametrize(
    ("code", "kind"), [(401, InputError), (403, InputError), (429, Unavailable), (503, Unavailable)]
)
def test_a_refusal_is_bad_input_and_a_failure_is_not(code, kind):
    from gcsfs.retry import HttpError

    error = OSError("Forbidden: b/x\nno") if code == 403 else HttpError({"code": code, "message": "no"})
    found = bucket.refusal("--data-dir gs://x", error)
    assert type(found) is kind
    assert str(found).startswith("--data-dir gs://x ")
    assert "\n" not in str(found)
    assert bucket.is_failure(HttpError())
    assert not bucket.is_failure(ValueError())


def test_without_gcsfs_the_message_names_the_extra(served, monkeypatch):
    bucket.client.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "gcsfs", None)
            with pytest.raises(InputError, match=r"expected gcsfs to be installed: pip install -e '\.\[tpu\]'"):
                bucket.require("gs://emulated/run", "--workdir")
    finally:
        bucket.client.cache_clear()
        bucket.client()


def test_an_object_is_swapped_by_its_generation(address):
    file = address / "object"
    assert bucket.look(file) is None
    first = bucket.swap(file, b"a", 0)
    with pytest.raises(FileExistsError):
        bucket.swap(file, b"b", 0)
    second = bucket.swap(file, b"c", first)
    for content in (b"d", None):
        with pytest.raises(FileExistsError):
            bucket.swap(file, content, first)
    assert bucket.look(file) == (b"c", second)
    bucket.swap(file, None, second)
    assert bucket.look(file) is None


def test_a_folder_that_is_marked_is_whole_whenever_a_rename_ends(address, monkeypatch):
    whole = {"mark", "state/a", "state/b/c"}
    client, calls = bucket.client(), {"left": 0}

    def counted(original):
        def call(*arguments):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise KeyboardInterrupt
            return original(*arguments)

        return call

    copy, remove = counted(client.copy), counted(client.rm)
    for steps in range(5):
        folder = address / str(steps)
        for name in whole:
            (folder / "old" / name).write_text(name)
        calls["left"] = steps
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(client, "copy", copy)
            patch.setattr(client, "rm", remove)
            bucket.move(folder / "old", folder / "new")
        there = {side: {name for name in whole if (folder / side / name).exists()} for side in ("old", "new")}
        marked = [side for side in there if "mark" in there[side]]
        assert marked, steps
        assert all(there[side] == whole for side in marked), steps
    assert there == {"old": set(), "new": whole}
    assert all((folder / "new" / name).read_text() == name for name in whole)


# ----------------------------------------------------------------------------------------------------- the lease


@pytest.fixture
def hasty(monkeypatch):
    for name, seconds in {"RENEWED": 0.05, "LOST": 0.4, "FREE": 0.6, "TICK": 0.02}.items():
        monkeypatch.setattr(lease, name, seconds)


def never(why: str) -> None:
    raise AssertionError(why)


def test_a_folder_whose_lease_is_renewed_is_refused(address, hasty, capsys):
    with lease.leased(address, never):
        began = time.monotonic()
        with pytest.raises(BlockingIOError) as refused, lease.leased(address, never):
            pass
        assert time.monotonic() - began < lease.FREE
        with pytest.raises(InputError, match=rf"is in use by another process, process {os.getpid()} on .*; wait for"):
            workdir.leased(address, "gs://x", never).__enter__()
    assert refused.value.strerror == f"process {os.getpid()} on {os.uname().nodename}"
    assert "waiting up to 0.6 s for a sign of life" in capsys.readouterr().err
    assert bucket.look(address / lease.NAME) is None


def test_a_lease_that_is_not_renewed_is_taken_over(address, hasty):
    bucket.swap(address / lease.NAME, b"of a process that was killed", 0)
    began = time.monotonic()
    with lease.leased(address, never):
        assert lease.FREE <= time.monotonic() - began < lease.FREE + 2
        found = bucket.look(address / lease.NAME)
        assert found
        assert json.loads(found[0])["pid"] == os.getpid()


def test_a_lease_is_released_after_an_error(address):
    with pytest.raises(ValueError, match="of the body"), lease.leased(address, never):
        raise ValueError("of the body")
    assert bucket.look(address / lease.NAME) is None


@pytest.mark.parametrize("left", [False, True], ids=["free", "left by the dead"])
def test_one_of_many_takes_a_lease(address, left):
    found = bucket.swap(address / lease.NAME, b"dead", 0) if left else 0
    ready = threading.Barrier(6)

    def take(owner: int) -> int | None:
        ready.wait()
        try:
            lease._written(address / lease.NAME, b"%d" % owner, found)
        except BlockingIOError:
            return None
        return owner

    with ThreadPoolExecutor(6) as pool:
        holders = [owner for owner in pool.map(take, range(6)) if owner is not None]
    assert len(holders) == 1
    assert bucket.look(address / lease.NAME)[0] == b"%d" % holders[0]  # type: ignore[index]


def test_a_run_hears_that_its_lease_is_lost_and_leaves_that_of_another(address, hasty):
    told, heard = [], threading.Event()
    with lease.leased(address, lambda why: (told.append(why), heard.set())):
        (address / lease.NAME).write_text('{"host": "there", "pid": 7}')
        assert heard.wait(10)
    assert told[0].startswith(f"the lease {address}/.lease is lost to process 7 on there")
    assert bucket.look(address / lease.NAME)[0] == b'{"host": "there", "pid": 7}'  # type: ignore[index]


def test_a_run_gives_up_a_lease_that_it_cannot_renew(address, hasty, monkeypatch):
    told, heard = [], threading.Event()
    monkeypatch.setattr(lease, "RENEWED", 0.7 * lease.LOST)

    def hold() -> None:
        with lease.leased(address, lambda why: (told.append(why), heard.set())):
            monkeypatch.setattr(lease, "swap", lambda *_: fails(OSError("no route to host")))
            began = time.monotonic()
            assert heard.wait(10)
            assert lease.LOST - lease.RENEWED < time.monotonic() - began < lease.LOST + lease.RENEWED / 2

    with pytest.warns(UserWarning, match=r"cannot be removed \(no route to host\): the next run waits 0.6 s"):
        hold()
    assert "could not be renewed" in told[0]
    assert "(no route to host)" in told[0]


def test_an_answer_that_is_lost_loses_no_lease(address, hasty, monkeypatch):
    answers = []

    def unheard(*arguments):
        answers.append(bucket.swap(*arguments))
        raise FileExistsError  # what a second request says after the first

    with monkeypatch.context() as patch:
        patch.setattr(lease, "swap", unheard)
        assert lease._take(address / lease.NAME, b"ours") == answers[0]


# --------------------------------------------------------------------------------------------------- checkpoints


def test_a_damaged_checkpoint_in_a_bucket_is_skipped_and_renamed(address):
    tree = lambda step: {"w": jnp.arange(5000, dtype=jnp.float32) * step, "n": np.int32(step)}
    with contextlib.closing(Checkpoints(str(address))) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step), note={"at": step})
    found = load(str(address))
    assert found[0] == 2
    np.testing.assert_array_equal(found[1]["w"], tree(2)["w"])
    (data_file,) = bucket.client().find(f"{address}/2/state/d")
    flip(epath.Path(f"gs://{data_file}"))
    with contextlib.closing(Checkpoints(str(address))) as checkpoints:
        with pytest.warns(UserWarning, match=rf"skipped the damaged checkpoint {address}/2"):
            step, restored, note = checkpoints.restore(tree(0))  # type: ignore[misc]
        assert (step, note) == (1, {"at": 1})
        np.testing.assert_array_equal(restored["w"], tree(1)["w"])
        checkpoints.save(2, tree(2))
        checkpoints.save(2, tree(2), {"error": 0.5})  # replaces it
    assert names(address) == ["1", "2", "damaged-2"]
    assert checkpoint_files.metas(address)[2]["metrics"] == {"error": 0.5}


def test_a_save_to_a_bucket_that_does_not_answer_may_succeed_later(address):
    with contextlib.closing(Checkpoints(str(address))) as checkpoints:
        with away(), pytest.raises(OSError, match="Connect") as silent:
            (address / "2" / "state").write_text("")
        found = checkpoints._failure(2, silent.value)
        assert isinstance(found, Unavailable)
        assert str(found).startswith(f"checkpoint {address}/2 was not written (Connect call failed")
        assert isinstance(checkpoints._failure(2, ValueError("UNAVAILABLE: Error writing")), Unavailable)
        assert isinstance(checkpoints._failure(2, ValueError("PERMISSION_DENIED: Error writing")), InputError)


def test_a_step_counts_once_it_is_marked(address):
    for name in ("3/commit_success.txt", "7/state", "damaged-9/commit_success.txt", "replaced-5/commit_success.txt"):
        (address / name).write_text("")
    assert checkpoint_files.steps(address) == [3]
    checkpoint_files.tidy(address)
    assert names(address) == ["3", "5", "damaged-9"]
    location = checkpoint_files._location(epath.Path("gs://bucket/3/state"), "params/b%2Fc")
    base = tensorstore.Spec(location).to_json()["kvstore"]["base"]
    assert base == {"driver": "gcs", "bucket": "bucket", "path": "3/state/"}


# ------------------------------------------------------------------------------------------------------- reports


def records(file: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_are_uploaded_whole(address, monkeypatch):
    there = address / "metrics.jsonl"
    sink = JsonLines(there, 0)
    sink.write(1, {"loss": 1.0})
    assert there.read_text() == ""  # not yet due
    sink.flush()
    assert [r["step"] for r in records(there)] == [1]
    monkeypatch.setattr(writers, "SYNC_EVERY", 0.0)
    sink.write(2, {"loss": 1.0})
    assert [r["step"] for r in records(there)] == [1, 2]
    sink.close()
    resumed = JsonLines(there, 1)
    assert [r["step"] for r in records(there)] == [1]
    resumed.write(2, {"loss": 3.0})
    resumed.close()
    assert [r["loss"] for r in records(there)] == [1.0, 3.0]


def test_a_bucket_that_fails_ends_no_run(address, monkeypatch):
    monkeypatch.setattr(writers, "SYNC_EVERY", 0.0)
    lines, board = JsonLines(address / "metrics.jsonl", 0), TensorBoard(address, 0)

    def write() -> None:
        for step in (1, 2):
            lines.write(step, {"loss": 1.0})
            board.scalars(step, {"loss": 1.0})

    with monkeypatch.context() as patch:
        patch.setattr(type(address), "write_bytes", lambda *_: fails(RuntimeError("503 from the\nbucket")))
        with pytest.warns(UserWarning, match=r"\(503 from the bucket\)") as warned:
            write()
    assert len(warned) == 2
    lines.close()
    board.close()
    assert [r["step"] for r in records(address / "metrics.jsonl")] == [1, 2]


def test_events_are_uploaded(address, accumulated, tmp_path):
    def uploaded() -> list[tuple[int, float]]:
        for path in address.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return [(event.step, event.value) for event in accumulated(tmp_path).Scalars("loss")]

    sink = TensorBoard(address, 0)
    sink.scalars(1, {"loss": 1.0})
    sink.flush()
    assert uploaded() == [(1, 1.0)]
    sink.scalars(2, {"loss": 2.0})
    sink.close()
    assert uploaded() == [(1, 1.0), (2, 2.0)]


# ---------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A data folder with the set `scans`."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(bundled.prepared(digits.SET, root / "cache"), root / "tfds" / "scans" / "1.0.0")
    return root / "tfds"


@pytest.fixture
def remote(local, address) -> str:
    """The address of a copy of that folder."""
    for file in local.rglob("*"):
        if file.is_file():
            (address / "tfds" / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())
    return str(address / "tfds")


def equal(a: data.Columns, b: data.Columns) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_data_in_a_bucket_are_those_of_a_folder(local, remote, tmp_path, monkeypatch, capsys):
    equal(data.load("scans", "test[:9]", remote), data.load("scans", "test[:9]", str(local)))
    copied = sorted(file.name for file in (tmp_path / "cache/dl_jax/copies").rglob("*.array_record*"))
    assert copied == ["digits-test.array_record-00000-of-00001"], "other splits stay where they are"
    here, there = (data.streamed("scans", "train", 8, (0, 1), data_dir=where) for where in (str(local), remote))
    equal(here(3), there(3))
    assert data.info("scans", remote) == data.info("scans", str(local))
    monkeypatch.setattr("dl_jax.data.copies.download", lambda *files: never("it is copied once"))
    data.load("scans", "test[:12]", remote)
    assert capsys.readouterr().err == ""


def test_what_is_wrong_with_data_in_a_bucket_is_one_line(remote, monkeypatch):
    said = lambda error: str(error.value)
    with pytest.raises(InputError, match=r"^--data-dir gs://nobodys/tfds: there is no bucket nobodys"):
        data.load("scans", "test", "gs://nobodys/tfds")
    with pytest.raises(InputError, match=r"mnist is not prepared in gs://.* `gcloud storage cp -r FOLDER/mnist gs://"):
        data.load("mnist", "test", remote)
    shard = epath.Path(remote) / "scans/1.0.0/digits-test.array_record-00000-of-00001"
    content = shard.read_bytes()
    client = bucket.client()
    with monkeypatch.context() as patch:
        patch.setattr(client, "cat_file", lambda path, start, stop: bytes(stop - start))
        with pytest.raises(Unavailable, match=r"has changed while it was copied") as error:
            data.load("scans", "test", remote)
        assert "\n" not in said(error)
    shard.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"truncated or damaged"):
        data.load("scans", "test", remote)
    shard.unlink()
    with pytest.raises(InputError, match=rf"^{shard} is missing, expected a file of the data set") as error:
        data.load("scans", "test", remote)
    assert "\n" not in said(error)
    shard.write_bytes(content)
    assert len(data.load("scans", "test", remote)["label"]) == digits.TEST


def test_decoded_data_are_shared_over_a_bucket(remote, address, tmp_path, monkeypatch):
    shared = str(address / "cache")
    decode = columns._decode
    first = data.load("scans", "test", remote, shared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    monkeypatch.setattr(columns, "_decode", lambda *arguments: never("it is decoded already"))
    equal(data.load("scans", "test", remote, shared), first)
    monkeypatch.setattr(columns, "_decode", decode)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a third"))
    (labels,) = [name for name in bucket.client().find(shared) if name.endswith("label.npy")]
    flip(epath.Path(f"gs://{labels}"))
    with pytest.warns(UserWarning, match=r"label\.npy does not match its digest.*it is made anew"):
        equal(data.load("scans", "test", remote, shared), first)
    with pytest.raises(InputError, match=r"^--cache-dir gs://nobodys/cache: there is no bucket nobodys"):
        data.load("scans", "test", remote, "gs://nobodys/cache")


# ------------------------------------------------------------------------------------------------------ the loop


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 12


def main(cfg: Config, run: Run):
    def loss(variables, batch, key):
        error = variables["params"]["w"] * batch["x"] - jax.random.normal(key, batch["x"].shape)
        return jnp.mean(error**2), ({}, {})

    def batches(step: int):
        if step == ELSEWHERE["crash"]:
            raise RuntimeError("a crash")
        return {"x": np.random.default_rng(step).normal(size=8).astype("f4")}

    tx = optax.adam(0.1)
    state = init_state(run.keys(1)[0][0], {"params": {"w": jnp.zeros(())}}, tx)
    state = fit(make_step(loss, tx), state, batches, steps=cfg.steps, run=run / "fit", every=2)
    run.keep("w.txt", str(state.params["w"]))
    return {"w": np.array([state.params["w"]])}


ELSEWHERE = {"crash": -1}  # the step at which it crashes, which is not part of the config


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the experiment with these flags; gives (exit status, stderr)."""

    def run(*flags: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["experiment.py", "--seeds", "1", "--checkpoint-every", "6", *flags])
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            launch(main, {"quick": Config()}, ())
        signal.signal(signal.SIGTERM, before)
        return ended.value.code, capsys.readouterr().err

    return run


def kept(folder: epath.Path) -> dict[str, Any]:
    """What a run has measured and saved, without times."""
    clocked = ("time", "steps_per_second", "data_wait")
    lines = [{k: v for k, v in r.items() if k not in clocked} for r in records(folder / "fit" / "metrics.jsonl")]
    step, tree = load(str(folder / "fit" / "checkpoints"))
    state = jax.tree.map(lambda array: (str(array.dtype), array.tobytes()), tree)
    measured = json.loads((folder / "result.json").read_text())["measured"]
    return {"step": step, "state": state, "lines": lines, "measured": measured, "w": (folder / "w.txt").read_text()}


def test_a_run_in_a_bucket_resumes_and_is_that_of_a_folder(call, address, tmp_path, monkeypatch):
    here = epath.Path(tmp_path / "run")
    assert call("--workdir", str(here))[0] == 0
    monkeypatch.setitem(ELSEWHERE, "crash", 8)
    status, err = call("--workdir", str(address))
    assert (status, "RuntimeError: a crash" in err) == (1, True)
    assert checkpoint_files.steps(address / "fit" / "checkpoints") == [6]
    assert ".lease" not in names(address)
    monkeypatch.setitem(ELSEWHERE, "crash", -1)
    assert call("--workdir", str(address))[0] == 0
    assert kept(address) == kept(here)
    assert len(json.loads((address / "attempts.json").read_text())) == 2
    assert set(names(address)) >= {"config.json", "result.json", "w.txt", "test_bucket.py"}
    watched, beside = read(str(address)), read(str(here))
    assert (watched.damaged, list(watched.fits)) == ([], ["fit"])
    assert watched.script == beside.script
    for metric, curve in beside.fits["fit"].curves.items():
        np.testing.assert_array_equal(watched.fits["fit"].curves[metric].values, curve.values)

    assert call("--workdir", str(address), "--restart")[0] == 0
    assert kept(address / "before-restart") == kept(here) == kept(address)
    assert lease.NAME not in names(address / "before-restart")
    status, err = call("--workdir", str(address), "--steps", "13")
    assert (status, err.count("\n")) == (2, 1)
    assert "holds another run: steps is 12 in the folder, 13 in this command" in err


def test_a_run_is_refused_while_another_has_its_folder(call, address, hasty):
    with lease.leased(address, never):
        status, err = call("--workdir", str(address))
    assert status == 2
    assert f"error: --workdir {address} is in use by another process, process {os.getpid()} on " in err
    assert bucket.listing(address) == []


@pytest.mark.parametrize("flag", ["--workdir", "--cache-dir"])
def test_a_bucket_that_is_not_there_is_bad_input(call, served, monkeypatch, flag):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("DL_JAX_CACHE_DIR", "")
    status, err = call(flag, "gs://nobodys/run")
    assert status == 2
    assert err.startswith(f"error: {flag} gs://nobodys/run: there is no bucket nobodys, expected one that exists")
    with away():
        status, err = call(flag, "gs://emulated/run")
    assert status == 75
    assert err.splitlines()[-1].startswith(f"error: {flag} gs://emulated/run does not answer")


# ----------------------------------------------------------------------------------------------------- processes

LENET = HERE.parents[1] / "experiments" / "vision" / "lenet.py"
FLAGS = ("--preset", "smoke", "--seeds", "1", "--steps", "40", "--distorted-steps", "40", "--checkpoint-every", "5")


def started(folder: Any, said: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """A process of the experiment that writes its stderr to `said`."""
    pin = lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    command: Sequence[str] = [sys.executable, str(LENET), *FLAGS, *flags, "--workdir", str(folder)]
    with said.open("wb") as stderr:
        return subprocess.Popen(command, env={**os.environ, "XLA_FLAGS": ""}, stderr=stderr, preexec_fn=pin)


def wait_for_checkpoint(folder: epath.Path) -> None:
    deadline = time.monotonic() + 120
    while not checkpoint_files.steps(folder / "plain" / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
def test_an_experiment_that_is_killed_ends_with_the_numbers_of_a_folder(address, tmp_path):
    here = epath.Path(tmp_path / "run")
    assert started(here, tmp_path / "first").wait() == 0
    killed = started(address, tmp_path / "second")
    wait_for_checkpoint(address)
    killed.kill()
    killed.wait()
    assert lease.NAME in names(address), "it was still running"
    began = time.monotonic()
    assert started(address, tmp_path / "third").wait() == 0
    assert time.monotonic() - began > lease.FREE
    results = [json.loads((folder / "result.json").read_text()) for folder in (here, address)]
    assert results[0]["measured"] == results[1]["measured"]
    for cell in ("plain", "distorted"):
        trees = [load(str(folder / cell / "checkpoints")) for folder in (here, address)]
        assert trees[0][0] == trees[1][0]
        jax.tree.map(np.testing.assert_array_equal, trees[0][1], trees[1][1])


@pytest.mark.slow
def test_two_processes_wait_for_a_lease_that_was_left(address, tmp_path):
    """JAX's own waiting between processes ends after half a minute."""
    bucket.swap(address / lease.NAME, b"of a process that was killed", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = ("--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", "2", "--process-id")
    processes = [started(address, tmp_path / f"process{i}", *together, str(i)) for i in (0, 1)]
    assert [process.wait(180) for process in processes] == [0, 0]
    assert checkpoint_files.steps(address / "plain" / "checkpoints")[0] == 40


@pytest.mark.slow
def test_a_run_whose_lease_is_taken_ends_and_leaves_the_folder_to_the_other(address, tmp_path):
    run = started(address, tmp_path / "first", "--steps", "1000000")
    wait_for_checkpoint(address)
    assert started(address, tmp_path / "second", "--steps", "1000000").wait(120) == 2
    assert "is in use by another process, process" in (tmp_path / "second").read_text()
    (address / lease.NAME).write_text('{"host": "there", "pid": 7}')
    assert run.wait(60) == 75
    assert f"error: the lease {address}/.lease is lost to process 7 on there" in (tmp_path / "first").read_text()
    assert (address / lease.NAME).read_text() == '{"host": "there", "pid": 7}'
