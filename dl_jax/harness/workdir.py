"""The folder of a run. One run at a time may use it, its processes share it, and no other run may continue in it."""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from dl_jax.core.errors import InputError, one_line, reason
from dl_jax.core.files import absolute, lock, write_whole

DEEPEST = 3  # maximum nesting of child runs: cell / seed and one more


@contextlib.contextmanager
def work_directory(workdir: str | None, identity: dict, script: Path, distributed: bool) -> Iterator[epath.Path | None]:
    """A context that holds the folder of this run, so that no other run uses it. Raises InputError where it cannot."""
    if workdir is None:
        yield None
        return
    directory = epath.Path(absolute(workdir))
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            require_writable(directory, workdir)
            if "://" not in workdir:
                held.enter_context(locked(directory, workdir))
        if distributed:
            require_shared(directory)
        if jax.process_index() == 0:
            claim_directory(directory, identity, script)
        yield directory


@contextlib.contextmanager
def attempt(directory: epath.Path | None, code: Mapping[str, Any]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Records in attempts.json the commit that runs in this folder and, at the end, for how many seconds it ran.

    Yields a function that returns all attempts so far, with this one last. `seconds` is None for a killed attempt.
    """
    began = time.perf_counter()
    file = directory / "attempts.json" if directory and jax.process_index() == 0 else None
    earlier = earlier_attempts(file) if file else []

    def so_far(seconds: float | None) -> list[dict[str, Any]]:
        return [*earlier, {**code, "seconds": seconds}]

    def now() -> list[dict[str, Any]]:
        return so_far(round(time.perf_counter() - began, 1))

    try:
        if file:
            write_json(file, so_far(None))
        yield now
    finally:
        if file:
            write_json(file, now())


def earlier_attempts(file: epath.Path) -> list[dict[str, Any]]:
    """The attempts in attempts.json.

    A file that is damaged or cannot be read counts as one attempt of an unknown commit, which is not clean.
    """
    try:
        found = json.loads(file.read_bytes()) if file.exists() else []
    except Exception:  # a bucket's client has errors of its own
        found = None
    if isinstance(found, list) and all(map(_is_attempt, found)):
        return found
    words = f"{file} is damaged: the commits of earlier attempts are unknown, so the result will not count as clean"
    warnings.warn(words, stacklevel=2)
    return [{"commit": None, "clean": False, "seconds": None}]


def _is_attempt(found: Any) -> bool:
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    return (
        isinstance(found, dict)
        and {"commit", "clean", "seconds"} <= found.keys()
        and isinstance(found["clean"], bool)
        and (found["seconds"] is None or number(found["seconds"]))
    )


def read_json(file: epath.Path) -> Any:
    """The content of a JSON file; None where it is missing or damaged, or cannot be read."""
    try:
        return json.loads(file.read_bytes())
    except Exception:  # a bucket's client has errors of its own
        return None


def write_json(file: epath.Path, content: Any) -> None:
    """Writes `content` as JSON. A kill leaves the old file or the new one."""
    write_whole(file, json.dumps(content, indent=2).encode() + b"\n")


def require_writable(directory: epath.Path, workdir: str) -> None:
    """Creates the folder. Raises InputError where it cannot be created or written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").write_text("")
        (directory / ".writable").unlink()
    except ImportError as error:
        raise InputError(f"--workdir {workdir} needs a package ({error}); pip install gcsfs for gs://") from error
    except Exception as error:  # a bucket's client has errors of its own
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"--workdir {workdir} cannot be written ({reason}); choose a folder of yours") from error


@contextlib.contextmanager
def locked(directory: epath.Path, workdir: str) -> Iterator[None]:
    """A context that holds the folder's lock, which the system releases when the process ends.

    Raises InputError where another process holds it, or the file of the lock cannot be opened.
    """
    what = f"--workdir {workdir} cannot be locked"
    with contextlib.ExitStack() as held:
        try:
            alone = "make sure that no other run uses it; the run goes on"
            held.enter_context(lock(directory / ".lock", what, alone, wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"--workdir {workdir} is in use by another process; wait for it, or choose another"
            ) from error
        except OSError as error:
            raise InputError(f"{what} ({reason(error)}); choose a folder of yours") from error
        yield


def claim_directory(directory: epath.Path, identity: dict, script: Path) -> None:
    """Writes config.json and copies the experiment's file.

    Raises InputError where the folder holds a run with another config, preset or seeds.
    """
    config = directory / "config.json"
    wanted = json.loads(json.dumps(identity))
    if has_begun(directory):
        differing = differences(read_config(config), wanted)
        if differing:
            raise InputError(
                f"--workdir {directory} holds another run: {'; '.join(differing)}; use those values, or another folder"
            )
        return
    (directory / "attempts.json").unlink(missing_ok=True)  # left by a run that ended before its first fit
    (directory / script.name).write_bytes(script.read_bytes())
    write_json(config, wanted)


def has_begun(directory: epath.Path) -> bool:
    """Whether the folder holds the record of a fit. If not, another run may use it, as nothing is lost."""
    return any(any(directory.glob("*/" * depth + "metrics.jsonl")) for depth in range(DEEPEST + 1))


def read_config(config: epath.Path) -> dict[str, Any]:
    """The content of config.json. Raises InputError where it cannot be read."""
    try:
        return json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{config} is missing or damaged ({error}), expected the run's config; restore it or use another folder"
        ) from error


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A phrase for each field that differs, such as "batch_size is 128 in the folder, 64 in this command"."""
    lines = []
    for key in sorted({*found, *wanted}):
        there, here = found.get(key, "not set"), wanted.get(key, "not set")
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += differences(there, here)
        elif there != here:
            lines.append(f"{key} is {there} in the folder, {here} in this command")
    return lines


def require_shared(directory: epath.Path) -> None:
    """Raises InputError unless every process sees the same folder."""
    from jax.experimental import multihost_utils

    token = int(multihost_utils.broadcast_one_to_all(np.int32(int.from_bytes(os.urandom(3)))))
    if jax.process_index() == 0:
        (directory / f".shared-{token}").write_text("")
    multihost_utils.sync_global_devices("shared folder")
    seen = multihost_utils.process_allgather(np.array((directory / f".shared-{token}").exists()))
    if jax.process_index() == 0:
        (directory / f".shared-{token}").unlink()
    if not seen.all():
        raise InputError(
            f"--workdir {directory} is not shared: processes {np.flatnonzero(~seen).tolist()} of {len(seen)} do not "
            "see what process 0 writes there; use a network folder or gs://"
        )
