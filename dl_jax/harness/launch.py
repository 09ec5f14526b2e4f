"""Runs an experiment from its command line: every experiment's file ends with `launch(main, PRESETS, CLAIMS)`."""

import contextlib
import dataclasses
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from dl_jax.core.errors import BAD_INPUT, UNAVAILABLE, InputError, Unavailable, lasting_output, one_line, spared
from dl_jax.core.files import failures
from dl_jax.core.inputs import recorded
from dl_jax.core.recorder import NonFiniteError
from dl_jax.harness.alive import Alive, end_all
from dl_jax.harness.clock import Clock, goodput, memory
from dl_jax.harness.fields import check
from dl_jax.harness.flags import AGREED, Common, check_common, command, parse, seeds_of, set_folders
from dl_jax.harness.identity import differences, read_by_both
from dl_jax.harness.machine import (
    cache_programs,
    device,
    git_state,
    initialize,
    keep_freed_memory,
    versions,
)
from dl_jax.harness.peers import Peers, says_gone
from dl_jax.harness.plan.chips import slice_of
from dl_jax.harness.plan.make import make
from dl_jax.harness.profile import Profile
from dl_jax.harness.report.terminal import print_table
from dl_jax.harness.report.writers import TensorBoard
from dl_jax.harness.results.claims import MISSED, Claim, judge, summary
from dl_jax.harness.run import PREEMPTED, Preempted, Run, Settings, alone
from dl_jax.harness.workdir import attempt, read_json, work_directory, write_json

Main = Callable[[Any, Run], Mapping[str, np.ndarray]]


class Experiment(NamedTuple):
    """The arguments that an experiment's file passes to `launch`."""

    main: Main
    presets: Mapping[str, Any]
    claims: Sequence[Claim]

    @property
    def script(self) -> Path:
        return Path(inspect.getfile(self.main)).resolve()


CLAIM_MISSED = 3  # an exit status


def launch(main: Main, presets: Mapping[str, Any], claims: Sequence[Claim]) -> None:
    """Parses the command line, calls `main(config, run)`, prints the table of results, writes result.json and exits.

    The exit status is 0 after success, 1 after a crash, 2 for bad input and for a NaN or infinity that ends the
    training (NonFiniteError), and 3 where a claim that applies to this run was missed. It is 75 where the same command
    may succeed later: a file could not be read, nothing went on, or another process has gone. It is 143 where SIGTERM
    or Ctrl-C has asked the run to end; with --workdir its state is saved first. One process without --workdir catches
    neither signal.
    """
    with lasting_output():
        preset, config, common = parse(sys.argv[1:], presets, inspect.getdoc(inspect.getmodule(main)) or "")
        peers, orderly, why = None, True, ""
        try:
            check(config)
            check_common(common)
            keep_freed_memory()
            set_folders(common)
            if common.cpu_devices is not None:  # before anything asks JAX for a device
                jax.config.update("jax_num_cpu_devices", common.cpu_devices)
            if common.plan is not None:
                sys.exit(plan(Experiment(main, presets, claims), preset, config, common))
            peers = Peers() if join_processes(common) else None
            cache_programs()
            signals = bool(common.workdir or peers)
            with Alive(grace=common.grace, deadline=common.deadline, peers=peers, signals=signals) as alive:
                status = run_experiment(Experiment(main, presets, claims), preset, config, common, alive, peers)
                if peers:
                    peers.meet()  # process 0 may have more to write
        except (InputError, NonFiniteError, Unavailable) as error:
            if common.debug:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            status, orderly, why = UNAVAILABLE if isinstance(error, Unavailable) else BAD_INPUT, False, str(error)
        except Preempted as end:
            status, orderly = PREEMPTED, end.together
        except Exception as error:
            traceback.print_exc()
            status, orderly, why = 1, False, one_line(f"{type(error).__name__}: {error}")
            if peers and isinstance(error, jax.errors.JaxRuntimeError) and says_gone(error):
                status, why = UNAVAILABLE, f"another process cannot be reached: {why[:200]}"
                print(f"error: {why}", file=sys.stderr)
        leave(status, peers, orderly, why, at_once=status == PREEMPTED and main.__module__ == "__main__")


def leave(status: int, peers: Peers | None, orderly: bool, why: str, *, at_once: bool = False) -> None:
    """Ends the process. A process of several that ends alone tells the others why, which would wait for it.

    With `at_once` Python frees nothing, which may take it a minute after a compilation that was cut off.
    """
    if peers and orderly:
        jax.distributed.shutdown()
    elif peers:
        end_all(peers, status, why)
    if at_once or (peers and not orderly):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    sys.exit(status)


def run_experiment(
    experiment: Experiment, preset: str, config: Any, common: Common, alive: Alive, peers: Peers | None
) -> int:
    """Runs `main`, records what it measured, and returns the exit status."""
    script = experiment.script
    code, fields = git_state(script.parent), dataclasses.asdict(config)
    seeds = seeds_of(common)
    identity = {"experiment": name_of(script), "preset": preset, "config": fields, "seeds": list(seeds)}
    same = {**identity, **code, "versions": versions(), "flags": {flag: getattr(common, flag) for flag in AGREED}}
    if peers:
        peers.agree({**same, "--workdir": "given" if common.workdir else "not given"})
    with (
        Clock() as clock,
        recorded() as read,
        work_directory(
            common.workdir, identity, script, peers and peers.meet, common.restart, alive.give_up
        ) as directory,
        attempt(
            directory, {**code, "versions": same["versions"], "device": device(), "data": read}, clock.spent
        ) as so_far,
    ):
        settings = Settings(
            seeds=seeds,
            skip_nonfinite=common.on_nan == "skip",
            fsdp=common.fsdp,
            checkpoint_every=common.checkpoint_every,
            batch_size=fields.get("batch_size"),
            preempted=alive.preempted,
            identity=identity,
            read=read,
            agree=peers.agree if peers else alone,
            usage=lambda: {"goodput": goodput(clock.spent()), **{f"memory/{k}": v for k, v in memory().items()}},
            saved=so_far,
            profile=Profile(common.profile, directory) if common.profile and directory else None,
        )
        with contextlib.closing(Run(directory, settings)) as run:
            found = experiment.main(config, run)
        if settings.profile:
            settings.profile.end()
        measured = {name: np.asarray(values, float).ravel().tolist() for name, values in found.items()}
        attempts = so_far()
        ran = described(preset, config, experiment.presets[preset], experiment.claims)
        record = {
            **identity,
            "preset": ran,
            "command": command(identity["experiment"], sys.argv[1:]),
            "commit": code["commit"],
            "clean": all(each["clean"] for each in attempts),
            "dataset": fields.get("dataset"),
            "data": dict(read),
            "measured": {name: summary(values) for name, values in measured.items()},
            "claims": judge(experiment.claims, measured, preset=ran, config=fields),
            "device": device(),
            "versions": versions(),
            "wall_seconds": round(sum(each["seconds"] or 0 for each in attempts), 1),
            "goodput": round(goodput(total(attempts)), 3),
            "memory": memory(),
            "attempts": attempts,
        }
        if peers:
            peers.agree({"data": dict(read)})
        if jax.process_index() == 0:
            print_table(record)
            if directory:
                keep(record, directory)
    return CLAIM_MISSED if any(claim["verdict"] in MISSED for claim in record["claims"]) else 0


def plan(experiment: Experiment, preset: str, config: Any, common: Common) -> int:
    """Plans the experiment for a slice instead of running it, and returns the exit status."""
    where = slice_of(common.plan or "")
    settings = Settings(seeds=seeds_of(common), skip_nonfinite=common.on_nan == "skip", fsdp=common.fsdp)
    facts = {
        "experiment": name_of(experiment.script),
        "preset": preset,
        "config": dataclasses.asdict(config),
        "seeds": list(settings.seeds),
        "command": command(name_of(experiment.script), sys.argv[1:]),
        **git_state(experiment.script.parent),
        "versions": versions(),
    }
    return 0 if make(lambda: experiment.main(config, Run(None, settings)), where, common.workdir, facts) else 1


def total(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The seconds of all attempts by what they were spent on."""
    names = {name for each in attempts for name in each.get("spent", {})}
    return {name: sum(each.get("spent", {}).get(name, 0.0) for each in attempts) for name in sorted(names)}


def keep(record: Mapping[str, Any], directory: epath.Path) -> None:
    """Writes result.json and the run's row in TensorBoard's table of hyper-parameters.

    A result.json with the same measurements stays as it is: if the command of a finished run is given again, no step is
    taken, and the record is that of the attempt that measured.
    """
    result = directory / "result.json"
    before = read_json(result)  # None where it is damaged: it is then written anew
    if isinstance(before, dict) and before.get("measured") == record["measured"]:
        return
    if isinstance(before, dict) and isinstance(before.get("data"), dict):
        there, here = (each["data"] for each in read_by_both(before, record))
        if found := differences(there, here, "in result.json", "now"):
            raise InputError(f"{result} is of other data: {'; '.join(found)}; use that data, or give --restart")
    with spared(f"{result} cannot be written", "the record of this run is lost", failures(result)):
        write_json(result, record)
    with contextlib.closing(TensorBoard(directory, 0)) as board:
        board.hparams(record["config"], {name: stats["mean"] for name, stats in record["measured"].items()})


def described(preset: str, config: Any, default: Any, claims: Sequence[Claim]) -> str:
    """The preset's name and the fields that flags have changed, except the fields in `given` of a claim."""
    given = {name for claim in claims for name in claim.given}
    changed = [name for name, value in vars(default).items() if name not in given and value != getattr(config, name)]
    return f"{preset}, changed: {', '.join(changed)}" if changed else preset


def name_of(script: Path) -> str:
    """The experiment's name: "vision/lenet" for .../experiments/vision/lenet.py."""
    parts = script.with_suffix("").parts
    return "/".join(parts[parts.index("experiments") + 1 :] if "experiments" in parts else parts[-1:])


def join_processes(common: Common) -> bool:
    """Starts jax.distributed if flags or environment variables ask for it, and returns whether they do."""
    coordinator = common.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = common.processes if common.processes is not None else environment_int("JAX_NUM_PROCESSES")
    process_id = common.process_id if common.process_id is not None else environment_int("JAX_PROCESS_ID")
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if common.cluster:
        initialize(None, None, None, common.join_within)
        return True
    if len(missing) == len(given) or processes == 1:
        return False
    if missing:
        raise InputError(f"a run of several processes needs {', '.join(given)}; missing: {', '.join(missing)}")
    initialize(coordinator, processes, process_id, common.join_within)
    return True


def environment_int(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise InputError(f"{name}={value}, expected a whole number; correct or unset it")
    return None if value is None else int(value)
