"""The command line of an experiment: every experiment's file ends with `launch(main, PRESETS, CLAIMS)`."""

import contextlib
import dataclasses
import inspect
import itertools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from etils import epath

from dl_jax.core.errors import BAD_INPUT, UNAVAILABLE, InputError, Unavailable, lasting_output, one_line, spared
from dl_jax.core.files import failures
from dl_jax.core.inputs import recorded
from dl_jax.core.recorder import NonFiniteError
from dl_jax.harness.alive import Alive, end_all
from dl_jax.harness.clock import Clock, goodput, memory
from dl_jax.harness.fields import check
from dl_jax.harness.identity import differences, read_by_both
from dl_jax.harness.machine import (
    cache_programs,
    device,
    git_state,
    initialize,
    keep_freed_memory,
    versions,
)
from dl_jax.harness.peers import Peers
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
GONE = ("Gloo", "NCCL", "Connection", "UNAVAILABLE", "coordination")  # in JAX's words where another process has ended
PRESET = tyro.conf.arg(help="Configuration that gives the flags below their defaults.")


@dataclasses.dataclass(frozen=True)
class Common:
    """The flags that every experiment has."""

    workdir: str | None = None
    """Folder or gs:// address for checkpoints and results. Repeating the command resumes the run."""
    data_dir: str | None = None
    """Folder or gs:// address of prepared TFDS sets [default: $TFDS_DATA_DIR, then TFDS's own]."""
    cache_dir: str | None = None
    """Folder or gs:// address for decoded data and compiled programs [default: $DL_JAX_CACHE_DIR, then
    $XDG_CACHE_HOME/dl_jax]."""
    seeds: int = 5
    """Number of seeds."""
    seed: int = 0
    """First seed; the run uses seed, seed + 1, ..."""
    checkpoint_every: int = 1000
    """Steps between checkpoints (needs --workdir)."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a NaN or infinite metric: stop, or (skip) discard the update of that step and go on; 10 in a row: stop."""
    fsdp: bool = False
    """Split large parameters and their optimiser state over the devices that share a batch, to save memory."""
    restart: bool = False
    """Begin at step 0 in a folder that holds a run; what is there is moved to a subfolder before-restart."""
    grace: float = 30.0
    """Seconds after SIGTERM or Ctrl-C within which the run saves and ends."""
    deadline: float | None = None
    """Seconds without a step, or without a batch of an evaluation, after which the run is taken to hang and ends; a
    measurement without batches counts as one [default: 300, or 50 times the longest so far]."""
    profile: str | None = None
    """Steps FIRST..LAST of which to write a trace, in the first fit that comes to them (needs --workdir)."""
    plan: str | None = None
    """Instead of running, compile for a TPU slice such as v5e:4x4, which need not be there, and print what a step
    costs on it, the rate that it allows, and what limits that."""
    coordinator: str | None = None
    """Address host:port of process 0, for runs of several processes [default: $JAX_COORDINATOR_ADDRESS]."""
    processes: int | None = None
    """Number of processes [default: $JAX_NUM_PROCESSES]."""
    process_id: int | None = None
    """Index of this process, from 0 [default: $JAX_PROCESS_ID]."""
    join_within: float = 300.0
    """Seconds to wait at the start until all processes have come."""
    cluster: bool = False
    """Read --coordinator, --processes and --process-id from the cluster (TPU pod, SLURM, Open MPI, Kubernetes)."""
    debug: bool = False
    """Show the traceback of bad input."""


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
            if peers and isinstance(error, jax.errors.JaxRuntimeError) and any(word in why for word in GONE):
                status, why = UNAVAILABLE, f"another process cannot be reached: {why[:200]}"
                print(f"error: {why}", file=sys.stderr)
        leave(status, peers, orderly, why, at_once=status == PREEMPTED and main.__module__ == "__main__")


def check_common(common: Common) -> None:
    """Raises InputError where a flag that every experiment has is out of its range."""
    wanted = {"--seeds": common.seeds, "--checkpoint-every": common.checkpoint_every, "--processes": common.processes}
    for flag, value in wanted.items():
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}, expected 1 or more; give a positive number")
    for flag, seconds in {
        "--grace": common.grace,
        "--deadline": common.deadline,
        "--join-within": common.join_within,
    }.items():
        if seconds is not None and not 0 < seconds < 1e9:
            raise InputError(f"{flag} {seconds:g}, expected more than 0 seconds; give a positive number")
    if not common.workdir:
        for flag, given in {"--restart": common.restart, "--profile": common.profile}.items():
            if given:
                raise InputError(f"{flag} is given without --workdir, expected both; name the folder of the run")


def set_folders(common: Common) -> None:
    """Sets the environment variables that `data` reads from the flags --data-dir and --cache-dir."""
    for variable, folder in {"TFDS_DATA_DIR": common.data_dir, "DL_JAX_CACHE_DIR": common.cache_dir}.items():
        if folder:
            os.environ[variable] = folder


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


def parse(arguments: Sequence[str], presets: Mapping[str, Any], description: str) -> tuple[str, Any, Common]:
    """(preset name, its Config with the flags applied, the common flags)."""
    name = preset_of(arguments, presets)
    default = presets[name]
    Arguments = dataclasses.make_dataclass(
        "Arguments",
        [
            ("preset", Annotated[Literal[tuple(presets)], PRESET], dataclasses.field(default=name)),  # type: ignore[valid-type]
            ("common", tyro.conf.OmitArgPrefixes[Common], dataclasses.field(default=Common())),
            ("config", tyro.conf.OmitArgPrefixes[type(default)], dataclasses.field(default=default)),
        ],
        frozen=True,
    )
    parsed: Any = tyro.cli(Arguments, args=list(arguments), description=description)
    if parsed.preset != name:
        print("error: --preset is given twice, expected once; remove one", file=sys.stderr)
        raise SystemExit(BAD_INPUT)
    return parsed.preset, parsed.config, parsed.common


def preset_of(arguments: Sequence[str], presets: Mapping[str, Any]) -> str:
    """The preset named in the arguments, else 'quick'.

    It gives the other flags their defaults, so it is looked up before they are parsed.
    """
    given = [b for a, b in itertools.pairwise([*arguments, ""]) if a == "--preset"]
    given += [a.removeprefix("--preset=") for a in arguments if a.startswith("--preset=")]
    return given[-1] if given and given[-1] in presets else "quick"


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
        attempt(directory, code, clock.spent) as so_far,
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
    for flag, given in {
        "--restart": common.restart,
        "--profile": common.profile,
        "--coordinator": common.coordinator,
        "--processes": common.processes,
        "--process-id": common.process_id,
        "--cluster": common.cluster,
    }.items():
        if given is not None and given is not False:
            raise InputError(f"{flag} is given with --plan, expected one of them: a plan runs nothing; leave one out")
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


def seeds_of(common: Common) -> tuple[int, ...]:
    return tuple(range(common.seed, common.seed + common.seeds))


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


AGREED = ("checkpoint_every", "on_nan", "restart", "fsdp")  # flags that change what the processes do together
WITH_VALUE = (
    *("--workdir", "--data-dir", "--cache-dir", "--coordinator", "--processes", "--process-id"),
    *("--join-within", "--grace", "--deadline", "--profile"),
)
ALONE = ("--cluster", "--no-cluster", "--debug", "--no-debug", "--restart", "--no-restart")


def command(experiment: str, arguments: Sequence[str]) -> str:
    """The command without flags for folders and processes, so that it gives this result on any machine."""
    kept, skip = [], False
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if not skip and flag not in (*WITH_VALUE, *ALONE):
            kept.append(argument)
        skip = not skip and flag in WITH_VALUE and "=" not in argument
    return shlex.join(["python", f"experiments/{experiment}.py", *kept])


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
