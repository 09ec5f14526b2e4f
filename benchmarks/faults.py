"""Tries what can go wrong with a run, with real processes, and prints which of it the run survives.

    python benchmarks/faults.py                          all faults, some ten minutes on 2 cores
    python benchmarks/faults.py --only "kill -9" hang    those with such a name
    python benchmarks/faults.py --write                  also puts the table into docs/scale.md

The run is that of victim.py: two fits, a checkpoint every 8 steps, and one core for each process, as with several
threads the order of a sum, and with it the last bit, may vary. The processes are forked from one that has imported JAX
but not used it, which saves the seconds of the imports. A fault is survived if all of this holds:

- Within the promised time every process has ended, guardians included, with the promised status: 45 seconds after the
  fault, --grace seconds after a signal, and 10 seconds after the deadline of a hang. A process that has lost another
  one ends with 75, or with SIGABRT where JAX or Gloo find it out first.
- The same command, given again, goes on in each fit from the newest complete checkpoint, after a signal from the very
  step at which it ended, and ends with status 0. Then result.json has the measured values, and metrics.jsonl the lines,
  of a run of as many processes that was left alone: all that they hold but the times, bit by bit.
- What has to be refused ends with status 2, and what cannot be read with 75. Each process says so in one line that
  begins with "error:", and shows no traceback. Every file in the folder is as it was, except for attempts.json, which
  lists the attempt; nothing is added but an empty TensorBoard file of a fit that was complete before the refused one.

"Ended after" is the time from the fault to the end of the last process; "steps lost" are the steps that were begun
before the fault and begun again after it. Both are the most of all tries.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import victim
from dl_jax import data
from dl_jax.data import digits
from dl_jax.harness import launch
from dl_jax.harness.machine import git_state, processor, versions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
MARKS = ("<!-- faults: begin -->\n", "<!-- faults: end -->\n")
STEPS, EVERY, AT = 40, 8, 25  # of a fit; between checkpoints; the step of a fault
FLAGS = ("--seeds", "2", "--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--pause", "0.02")
WITHIN, GRACE = 45.0, 30.0  # seconds
PATIENCE = 120.0  # seconds for what is not measured
TIMES = ("time", "steps_per_second", "data_wait")
IMPORTED = ["benchmarks.faults", "orbax.checkpoint", "tensorboardX.summary", "tensorstore"]
TEMPORARY = ".orbax-checkpoint-tmp"
Statuses = Sequence[Collection[int]]  # for each process, those that are as promised
SUCCESS, CRASHED, REFUSED, AGAIN, ASKED, KILLED = ((status,) for status in (0, 1, 2, 75, 143, -signal.SIGKILL))
GONE = (75, -signal.SIGABRT)  # another process has gone: JAX may end this one before it can itself


class Try(NamedTuple):
    """What came of trying a fault once, or as often as `times` says."""

    seconds: float | None = None
    lost: int | None = None
    times: int = 1
    wrong: str = ""  # why it was not survived


class NotSurvived(Exception):
    """Says what is not as promised."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotSurvived(otherwise)


class Process:
    """A process that runs victim.py, forked from this one, or `fresh` from a new Python."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path, fresh: bool, core: int):
        self.output, self.status, self.ended = output, 0, 0.0
        self.pid = os.fork()
        if not self.pid:
            _become(arguments, environment, output, fresh, core)

    def gone(self) -> bool:
        if not self.ended:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status, self.ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return bool(self.ended)

    def signal(self, number: int) -> None:
        if not self.gone():
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def _become(arguments: Sequence[str], environment: Mapping[str, str], output: Path, fresh: bool, core: int) -> NoReturn:
    status = 1
    try:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
        os.environ.update(environment)
        sys.argv = [str(ROOT / "benchmarks" / "victim.py"), *arguments]
        with open(output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if fresh:
            _close_pipes()
            os.execv(sys.executable, [sys.executable, *sys.argv])
        launch(victim.main, victim.PRESETS, ())
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _close_pipes() -> None:
    """Makes stdout and stderr pipes that nobody reads."""
    for descriptor in (1, 2):
        reader, writer = os.pipe()
        os.dup2(writer, descriptor)
        os.close(reader)


class Case:
    """A run of `count` processes in a folder of its own. Each attempt has files for what its processes did and said."""

    def __init__(self, root: Path, folder: Path, count: int = 1, flags: Sequence[str] = ()) -> None:
        self.root, self.folder, self.count, self.flags = root, folder, count, flags
        self.run, self.attempts = folder / "run", 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(
        self, fault: str = "", last: Sequence[str] = (), *, fresh: bool = False, start: int | None = None
    ) -> list[Process]:
        """Starts the first `start` processes, by default all. The last one has the flags `last` too."""
        self.attempts += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        processes = []
        for i in range(self.count if start is None else start):
            together = ("--coordinator", address, "--processes", str(self.count), "--process-id", str(i))
            arguments = ["--workdir", str(self.run), *FLAGS, *self.flags, *(together if self.count > 1 else ())]
            environment = {
                "DL_JAX_CACHE_DIR": str(self.root / "cache"),
                "XLA_FLAGS": "",
                "VICTIM_FAULT": fault,
                "VICTIM_LOG": str(self.log(i)),
            }
            self.log(i).touch()
            extra = last if i == self.count - 1 else ()
            output = Path(f"{self.log(i)}.said")
            processes.append(Process([*arguments, *extra], environment, output, fresh, os.getpid() + i))
        return processes

    def log(self, process: int = 0) -> Path:
        return self.folder / f"attempt-{self.attempts}.{process}"

    def done(self, process: int = 0) -> list[str]:
        """What a process has done in this attempt: "a 3" for step 3 of the first fit, and "struck"."""
        return self.log(process).read_text().splitlines()

    def saved(self) -> dict[str, int]:
        """The step of the newest checkpoint of each fit that is not complete, 0 where there is none."""
        newest = {name: max(checkpoints(self.run, name), default=0) for name in "ab"}
        return {name: step for name, step in newest.items() if step < STEPS}

    def begins(self) -> list[dict[str, int]]:
        """For each process, the first step of each fit in this attempt."""
        steps = [[line.split() for line in self.done(i) if " " in line] for i in range(self.count)]
        return [{name: int(step) for name, step in reversed(each)} for each in steps]


def checkpoints(run: Path, name: str) -> list[int]:
    folder = run / name / "checkpoints"
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []


def wait_until(holds: Callable[[], bool], what: str, processes: Sequence[Process], seconds: float = PATIENCE) -> None:
    """Waits, and kills the processes where it was in vain."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            for process in processes:
                process.signal(signal.SIGKILL)
            raise NotSurvived(f"{what} has not come within {seconds:g} s")
        time.sleep(0.01)


def end(case: Case, processes: Sequence[Process], since: float, within: float, promised: Statuses) -> float:
    """The seconds from `since` to the end of the last process. They have to end so, with statuses as promised."""
    wait_until(lambda: all(p.gone() for p in processes), "the end", processes, PATIENCE + within)
    seconds = max(process.ended for process in processes) - since
    statuses = [process.status for process in processes]
    said = "; ".join(process.said()[-300:] for process in processes)
    as_promised = all(status in allowed for status, allowed in zip(statuses, promised, strict=True))
    require(as_promised, f"statuses {statuses}: {said}")
    require(seconds <= within, f"ended after {seconds:.1f} s: {said}")
    wait_until(lambda: not left(case), "the end of a guardian", (), 3)
    return seconds


def left(case: Case) -> list[str]:
    """The processes that were started by those of the case."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [environment.parent.name] if f"{case.folder}/".encode() in environment.read_bytes() else []
    return found


def content(run: Path) -> dict[str, Any]:
    """The measured values of a run and the lines of its metrics, without times."""
    lines = {file.parent.name: file.read_text().splitlines() for file in sorted(run.glob("[ab]/metrics.jsonl"))}
    curves = {
        name: [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in each]
        for name, each in lines.items()
    }
    return {"measured": json.loads((run / "result.json").read_text())["measured"], "curves": curves}


def undisturbed(root: Path, count: int) -> dict[str, Any]:
    """The content of a run that was left alone. Waits for it."""
    file = root / f"undisturbed-{count}.json"
    wait_until(file.exists, file.name, (), 5 * PATIENCE)
    return json.loads(file.read_text())


def repeat(case: Case, *begins: Mapping[str, int]) -> None:
    """The same command has to begin each fit at the steps of one of `begins`, and to end as if nothing had happened."""
    finish(case, case.start())
    require(any(all(each == wanted for each in case.begins()) for wanted in begins), f"began at {case.begins()}")


def finish(case: Case, processes: Sequence[Process]) -> None:
    end(case, processes, time.monotonic(), PATIENCE, [SUCCESS] * case.count)
    require(content(case.run) == undisturbed(case.root, case.count), "the values are not those of an undisturbed run")


def resume(case: Case) -> int:
    """Gives the same command again. The number of steps that the last attempt and this one have begun."""
    before = [{line for line in case.done(i) if " " in line} for i in range(case.count)]
    repeat(case, case.saved())
    return max(len(each & {*case.done(i)}) for i, each in enumerate(before))


# Each of the following tries one fault in a new folder, below that of all tries.


def leave_alone(root: Path, folder: Path, count: int) -> Try:
    """Makes the run with which the others are compared."""
    case = Case(root, folder, count)
    end(case, case.start(), time.monotonic(), PATIENCE, [SUCCESS] * count)
    require(all(each == {"a": 0, "b": 0} for each in case.begins()), f"began at {case.begins()}")
    (folder / "content").write_text(json.dumps(content(case.run)))
    (folder / "content").rename(root / f"undisturbed-{count}.json")  # others wait for it
    case.run.rename(root / f"finished-{count}")
    return Try()


def cut_off(root: Path, folder: Path) -> Try:
    """Makes a run that has ended in the middle of its second fit, with two complete checkpoints of it."""
    case = Case(root, folder)
    processes = case.start()
    wait_until(lambda: f"b {AT}" in case.done(), "a step", processes)
    processes[0].signal(signal.SIGTERM)
    end(case, processes, time.monotonic(), PATIENCE, [ASKED])
    case.run.rename(root / "cut-off")
    return Try()


def compare(root: Path, folder: Path, count: int) -> Try:
    """The values of several processes against those of one."""
    alone, together = (json.dumps(undisturbed(root, n), sort_keys=True) for n in (1, count))
    numbers = [np.array(numbers_in(json.loads(each))) for each in (alone, together)]
    require(numbers[0].shape == numbers[1].shape, "other lines")
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=0, atol=1e-6)
    return Try()


def numbers_in(tree: Any) -> list[float]:
    if isinstance(tree, Mapping | list):
        return [n for each in (tree.values() if isinstance(tree, Mapping) else tree) for n in numbers_in(each)]
    return [float(tree)] if isinstance(tree, int | float) else []


def struck(root: Path, folder: Path, what: str, who: int, statuses: Statuses, within: float = WITHIN) -> Try:
    """A fault that strikes in process `who`; before a hang, with a deadline of three seconds."""
    case = Case(root, folder, len(statuses), ("--deadline", "3") if what.startswith("hang") else ())
    processes = case.start(f"{what}:{who}:{AT}")
    wait_until(lambda: "struck" in case.done(who), "the fault", processes)
    seconds = end(case, processes, time.monotonic(), within, statuses)
    return Try(seconds, resume(case))


def killed(root: Path, folder: Path, count: int, who: int) -> Try:
    """SIGKILL from outside."""
    case = Case(root, folder, count)
    processes = case.start()
    wait_until(lambda: f"b {AT}" in case.done(who), f"step {AT}", processes)
    processes[who].signal(signal.SIGKILL)
    promised = [KILLED if i == who else GONE for i in range(count)]
    seconds = end(case, processes, time.monotonic(), WITHIN, promised)
    return Try(seconds, resume(case))


def asked(
    root: Path, folder: Path, count: int, number: int, who: Sequence[int], fault: str = "", grace: float = GRACE
) -> Try:
    """A signal that asks the run to end: to the processes `who`, in a step or where a fault holds the last of them."""
    case = Case(root, folder, count, ("--grace", f"{grace:g}"))
    processes = case.start(f"{fault}:{who[-1]}:{AT}" if fault else "")
    place = "struck" if fault else f"b {AT}"
    wait_until(lambda: place in case.done(who[-1]), place, processes)
    time.sleep(5 if fault == "compile" else 0.3 if fault else 0)  # what has struck is under way; this is traced first
    for each in who:
        processes[each].signal(number)
    seconds = end(case, processes, time.monotonic(), grace, [ASKED] * count)
    lost = resume(case)
    require(lost == 0 or fault == "hang-evaluation", f"{lost} steps were begun that were not saved")
    return Try(seconds, lost)


def killed_often(root: Path, folder: Path, times: int) -> Try:
    """SIGKILL at random moments of a run, one in each part of it."""
    case, lost, part = Case(root, folder), 0, 2 * STEPS // times
    for i in range(times):
        saved, before, at = case.saved(), {*case.done()} if i else set(), i * part + random.randrange(part)
        processes = case.start()
        wait_until(lambda place=f"{'ab'[at // STEPS]} {at % STEPS}": place in case.done(), "a step", processes)
        time.sleep(random.random() * 0.02)
        processes[0].signal(signal.SIGKILL)
        end(case, processes, time.monotonic(), WITHIN, [KILLED])
        require(all(saved[name] == step for name, step in case.begins()[0].items()), f"began at {case.begins()}")
        lost = max(lost, len(before & {*case.done()}))
    return Try(0, max(lost, resume(case)), times)


def killed_in_save(root: Path, folder: Path, times: int) -> Try:
    """SIGKILL during a save, before the folder of the checkpoint has its final name."""
    case, lost, found = Case(root, folder), 0, 0
    unfinished = lambda: [*case.run.glob(f"[ab]/checkpoints/*{TEMPORARY}*")]
    while found < times:
        old = unfinished()
        processes = case.start()
        wait_until(lambda old=old: bool({*unfinished()} - {*old}), "a save", processes, 20)
        time.sleep(random.random() * 0.03)
        processes[0].signal(signal.SIGKILL)
        end(case, processes, time.monotonic(), WITHIN, [KILLED])
        found += bool(unfinished())
    return Try(0, max(lost, resume(case)), times)


def refused(
    root: Path,
    folder: Path,
    status: Collection[int],
    last: Sequence[str] = (),
    *,
    count: int = 1,
    damage: Callable[[Path], None] = lambda run: None,
    mend: Callable[[Path], None] | None = None,
    of: str = "cut-off",
) -> Try:
    """A command that has to be refused, in a copy of a run that was damaged; `mend` undoes the damage."""
    case = Case(root, folder, count)
    copied(root, of, case)
    damage(case.run)
    before = files(case.run)
    began = time.monotonic()
    seconds = end(case, processes := case.start(last=last), began, WITHIN, [status] * count)
    one_error(processes)
    after = files(case.run)
    changed = [name for name in before if after.get(name) != before[name]]
    added = [name for name in after.keys() - before.keys() if not name.startswith("a/events")]
    require(not changed and not added, f"changed {changed}, added {added}")
    if mend:
        mend(case.run)
        resume(case)
    return Try(seconds)


def differ(root: Path, folder: Path, *last: str) -> Try:
    """Two processes of which the last has other flags."""
    if "--cache-dir" in last:
        last = ("--cache-dir", str(root / "other-cache"))
    return refused(root, folder, REFUSED, last, count=2, of="finished-2")


def diverge(root: Path, folder: Path) -> Try:
    """Two processes whose parameters differ; the first save finds it."""
    case = Case(root, folder, 2)
    processes = case.start("diverge:1:0")
    wait_until(lambda: f"b {EVERY - 1}" in case.done(1), "a save", processes)
    seconds = end(case, processes, time.monotonic(), WITHIN, [REFUSED, REFUSED])
    one_error(processes)
    require(not checkpoints(case.run, "b"), "saved")
    return Try(seconds, resume(case))


def absent(root: Path, folder: Path) -> Try:
    """A process that never comes."""
    case = Case(root, folder, 2, ("--join-within", "5"))
    processes = case.start(start=1)
    seconds = end(case, processes, time.monotonic(), WITHIN, [AGAIN])
    one_error(processes)
    require(not case.run.exists(), "the folder was made")
    return Try(seconds)


def copied(root: Path, of: str, case: Case) -> None:
    wait_until((root / of).exists, of, (), 5 * PATIENCE)
    shutil.copytree(root / of, case.run)


def files(run: Path) -> dict[str, bytes]:
    """The content of each file, but for the list of attempts. Of a link, its target."""
    paths = [path for path in run.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(run)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in paths
        if path.name != "attempts.json"
    }


def one_error(processes: Sequence[Process]) -> None:
    for process in processes:
        said = process.said()
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        require(len(errors) == 1 and "Traceback" not in said, f"said {said[-500:]}")


def newest_files(run: Path) -> list[Path]:
    """The files of the newest checkpoint of a run that was cut off."""
    folder = run / "b" / "checkpoints" / str(max(checkpoints(run, "b")))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(file: Path, where: float) -> None:
    """Flips one bit, at 0 (the first byte) to 1 (the last)."""
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def remove_tree(folder: Path) -> None:
    """Removes a folder in which others write."""
    shutil.rmtree(folder.rename(folder.with_name("removed")), ignore_errors=True)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def damaged(root: Path, folder: Path, damage: Callable[[Path], None]) -> Try:
    """Damages each file of the newest checkpoint in turn. The run goes on from it or from the one before."""
    wait_until((root / "cut-off").exists, "a run", (), 5 * PATIENCE)
    names = [file.relative_to(root / "cut-off") for file in newest_files(root / "cut-off")]
    for i, name in enumerate(names):
        case = Case(root, folder / str(i))
        copied(root, "cut-off", case)
        newest, before = sorted(checkpoints(case.run, "b"), reverse=True)[:2]
        damage(case.run / name)
        repeat(case, {"b": newest}, {"b": before})
    return Try(times=len(names))


def damage_all(run: Path) -> None:
    for file in run.glob("b/checkpoints/*/meta/metadata"):
        empty(file)


def make_unreadable(run: Path) -> None:
    """Reading this link gives an input/output error."""
    file = next(each for each in newest_files(run) if each.name == "metadata")
    file.rename(file.with_name("kept"))
    file.symlink_to("/proc/self/mem")


def make_readable(run: Path) -> None:
    kept = next(run.glob("b/checkpoints/*/meta/kept"))
    kept.rename(kept.with_name("metadata"))


def swap_fits(run: Path) -> None:
    shutil.rmtree(run / "b" / "checkpoints")
    shutil.copytree(run / "a" / "checkpoints", run / "b" / "checkpoints")


def foreign_config(run: Path) -> None:
    (run / "config.json").write_text('{"learning_rate": 1}')


def unheard(root: Path, folder: Path) -> Try:
    """A new Python whose stdout and stderr are pipes that nobody reads."""
    case = Case(root, folder)
    finish(case, case.start(fresh=True))
    return Try()


def without(root: Path, folder: Path, what: str, remove: Callable[[Path], None]) -> Try:
    """Files are removed or emptied during the run, which goes on; and the same command finds it complete.

    If all are removed, the first fit, which had ended, is lost with them and is made anew.
    """
    case = Case(root, folder)
    processes = case.start()
    whole = lambda: 3 * EVERY in checkpoints(case.run, "b") and f"b {AT}" in case.done()  # no save is under way
    wait_until(whole, "a step", processes)
    for path in [*case.run.glob(what)] if what else [case.run]:
        remove(path)
    finish(case, processes)
    repeat(case, {} if what else {"a": 0})
    return Try()


def emptied(root: Path, folder: Path, of: str, name: str) -> Try:
    """A file that is empty when the command is given again."""
    case = Case(root, folder)
    copied(root, of, case)
    empty(case.run / name)
    repeat(case, case.saved())
    return Try()


def damaged_cache(root: Path, folder: Path) -> Try:
    """A flipped bit in the decoded data."""
    wait_until((root / "other-cache" / "complete").exists, "the data set", (), PATIENCE)
    case = Case(root, folder, 1, ("--cache-dir", str(folder / "cache")))
    shutil.copytree(root / "cache" / "tfds", folder / "cache" / "tfds")
    shutil.copytree(root / "cache" / "columns", folder / "cache" / "columns")
    flip(next(folder.glob("cache/columns/**/image.npy")), 0.5)
    finish(case, processes := case.start())
    require("image.npy does not match its digest" in processes[0].said(), "the flipped bit was not found")
    return Try()


def prepare_data(root: Path, folder: Path) -> Try:
    """Prepares the data sets in a process of its own, as the library that reads records has threads."""
    child = multiprocessing.get_context("fork").Process(target=_prepare, args=(root,))
    child.start()
    child.join()
    require(child.exitcode == 0, "the data set cannot be prepared")
    (root / "other-cache" / "complete").touch()
    return Try()


def _prepare(root: Path) -> None:
    """Prepares the data set, and one of the same name and version with other labels."""
    images, labels = digits.scans()
    data.load("digits", victim.SPLIT, cache_dir=str(root / "cache"))
    with mock.patch.object(digits, "scans", return_value=(images, labels[::-1])):
        data.load("digits", victim.SPLIT, cache_dir=str(root / "other-cache"))


class Trial(NamedTuple):
    """Calls `function(root, folder, *arguments, **named)` with the folder of all trials and a new one."""

    function: Callable[..., Try]
    arguments: tuple[Any, ...]
    named: dict[str, Any]


def trials(function: Callable[..., Try], *arguments: Any, **named: Any) -> list[Trial]:
    return [Trial(function, arguments, named)]


# What the others need, and then, of the faults, what mostly waits comes first.
PREPARED: dict[str, list[Trial]] = {
    "data": trials(prepare_data),
    **{f"undisturbed, {count} processes": trials(leave_alone, count) for count in (1, 2, 4)},
    "cut off": trials(cut_off),
}
FAULTS: dict[str, list[Trial]] = {
    "2 processes: SIGSTOP of process 0": trials(struck, "freeze", 0, (KILLED, GONE)),
    "2 processes: SIGSTOP of process 1": trials(struck, "freeze", 1, (GONE, KILLED)),
    "2 processes: one hangs with Python's lock": trials(struck, "hold", 1, (GONE, KILLED)),
    "2 processes: one hangs in an evaluation": trials(struck, "hang-evaluation", 1, (AGAIN, AGAIN), 43),
    "4 processes: kill -9 of process 3": trials(killed, 4, 3),
    "2 processes: kill -9 of process 1": trials(killed, 2, 1),
    "4 processes: kill -9 of process 0": trials(killed, 4, 0),
    "2 processes: kill -9 of process 0": trials(killed, 2, 0),
    "2 processes: one hangs in a step": trials(struck, "hang", 1, (AGAIN, AGAIN), 13),
    "2 processes: exception in process 0": trials(struck, "raise", 0, (CRASHED, CRASHED)),
    "2 processes: exception in process 1": trials(struck, "raise", 1, (CRASHED, CRASHED)),
    **{
        f"2 processes: {name} to process {i}": trials(asked, 2, number, (i,))
        for name, number in {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.items()
        for i in (0, 1)
    },
    "2 processes: SIGTERM to both": trials(asked, 2, signal.SIGTERM, (0, 1)),
    "4 processes: SIGTERM to process 2": trials(asked, 4, signal.SIGTERM, (2,)),
    "2 processes against 1, to 1e-6": trials(compare, 2),
    "4 processes against 1, to 1e-6": trials(compare, 4),
    "kill -9 at a random moment": trials(killed_often, 10),
    "kill -9 during a save": trials(killed_in_save, 5) * 4,
    "SIGTERM in a step": trials(asked, 1, signal.SIGTERM, (0,)),
    "SIGTERM in an evaluation": trials(asked, 1, signal.SIGTERM, (0,), "slow-evaluation"),
    "SIGTERM in an evaluation that hangs": trials(asked, 1, signal.SIGTERM, (0,), "hang-evaluation", 3),
    "SIGTERM while data are prepared": trials(asked, 1, signal.SIGTERM, (0,), "slow-data"),
    "SIGTERM in a compilation of half a minute": trials(asked, 1, signal.SIGTERM, (0,), "compile", 3),
    "SIGTERM after the last fit": trials(asked, 1, signal.SIGTERM, (0,), "slow-end"),
    "processes with another --learning-rate": trials(differ, "--learning-rate", "0.1"),
    "processes with other --seeds": trials(differ, "--seeds", "3"),
    "processes with other --steps": trials(differ, "--steps", "41"),
    "processes with other data": trials(differ, "--cache-dir"),
    "processes with other parameters": trials(diverge),
    "a process that never comes": trials(absent),
    "checkpoint: a file is cut in half": trials(damaged, halve),
    "checkpoint: a file is empty": trials(damaged, empty),
    "checkpoint: a file is removed": trials(damaged, Path.unlink),
    "checkpoint: a flipped bit": [
        Trial(damaged, (functools.partial(flip, where=where),), {}) for where in (0.1, 0.5, 0.9)
    ],
    "all checkpoints damaged": trials(refused, REFUSED, damage=damage_all),
    "checkpoint that cannot be read": trials(refused, AGAIN, damage=make_unreadable, mend=make_readable),
    "checkpoints of another fit": trials(refused, REFUSED, damage=swap_fits),
    "config.json of another program": trials(refused, REFUSED, damage=foreign_config),
    "other seeds in a finished folder": trials(refused, REFUSED, ("--seed", "7", "--seeds", "1"), of="finished-1"),
    "stdout and stderr that nobody reads": trials(unheard),
    "folder removed between two saves": trials(without, "", remove_tree),
    "metrics.jsonl removed during the run": trials(without, "b/metrics.jsonl", Path.unlink),
    "metrics.jsonl emptied during the run": trials(without, "b/metrics.jsonl", empty),
    "TensorBoard's file removed during the run": trials(without, "b/events*", Path.unlink),
    "TensorBoard's file emptied during the run": trials(without, "b/events*", empty),
    "an empty result.json": trials(emptied, "finished-1", "result.json"),
    "an empty attempts.json": trials(emptied, "cut-off", "attempts.json"),
    "an empty config.json": trials(emptied, "cut-off", "config.json"),
    "decoded data with a flipped bit": trials(damaged_cache),
}


def attempt(trial: Trial, root: Path, folder: Path) -> Try:
    """What came of a trial; it may fail in any way."""
    try:
        return trial.function(root, folder, *trial.arguments, **trial.named)
    except Exception as error:
        return Try(wrong=" ".join(f"{type(error).__name__}: {error}".split()))


@contextlib.contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that try faults, forked from one that has imported what a run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with ProcessPoolExecutor(workers, context) as pool:
        yield pool


def submit(pool: ProcessPoolExecutor, root: Path, names: Iterable[str]) -> dict[str, list[Future[Try]]]:
    """Begins to try the faults of these names in the folder `root`. The result also has what they need."""
    known = {**PREPARED, **FAULTS}
    return {
        name: [pool.submit(attempt, trial, root, root / f"{name}-{i}") for i, trial in enumerate(known[name])]
        for name in [*PREPARED, *names]
    }


class Row(NamedTuple):
    """A row of the table."""

    fault: str
    tried: int
    survived: int
    seconds: str
    lost: str


def row(fault: str, tries: Sequence[Try]) -> Row:
    seconds = [each.seconds for each in tries if each.seconds is not None]
    lost = [each.lost for each in tries if each.lost is not None]
    return Row(
        fault,
        sum(each.times for each in tries),
        sum(each.times for each in tries if not each.wrong),
        f"{max(seconds):.1f}" if seconds else "",
        str(max(lost)) if lost else "",
    )


def told(name: str, found: Try) -> Try:
    """Prints what came of a fault, while others are tried."""
    print(f"{name}: {found.wrong or 'survived'}", file=sys.stderr, flush=True)
    return found


def report(done: Mapping[str, Sequence[Try]]) -> str:
    """The heading and the table."""
    used, code = versions(), git_state(ROOT)
    lines = [
        f"On {len(os.sched_getaffinity(0))} cores of {processor()}, Python {used['python']}, JAX {used['jax']}, commit "
        f"{code['commit']}{'' if code['clean'] else ' with uncommitted changes'}:",
        "",
        "| fault | tried | survived | ended after (s) | steps lost |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(map(str, row(fault, tries)))} |" for fault, tries in done.items()),
    ]
    return "\n".join(lines) + "\n"


def write(table: str) -> None:
    """Puts the table between the marks of the page."""
    page = PAGE.read_text()
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}{table}{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="try the faults whose names contain one of these")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    names = [name for name in FAULTS if any(part in name for part in arguments.only)]
    with tempfile.TemporaryDirectory() as root, processes(1 + 2 * len(os.sched_getaffinity(0))) as pool:
        tries = submit(pool, Path(root), names)
        done = {name: [told(name, each.result()) for each in tries[name]] for name in tries}
    table = report({name: done[name] for name in names})
    print(table, end="")
    if arguments.write:
        write(table)
    sys.exit(any(each.wrong for found in done.values() for each in found))


if __name__ == "__main__":
    sys.modules["benchmarks.faults"] = sys.modules["__main__"]
    main()
