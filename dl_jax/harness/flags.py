"""The command line of an experiment: the flags that all have, and those of its `Config`."""

import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro

from dl_jax.core.errors import BAD_INPUT, InputError

PRESET = tyro.conf.arg(help="Configuration that gives the flags below their defaults.")
# Flags that change what the processes do together.
AGREED = ("checkpoint_every", "on_nan", "restart", "fsdp", "cpu_devices")
WITH_VALUE = (
    *("--workdir", "--data-dir", "--cache-dir", "--coordinator", "--processes", "--process-id"),
    *("--join-within", "--grace", "--deadline", "--profile"),
)
ALONE = ("--cluster", "--no-cluster", "--debug", "--no-debug", "--restart", "--no-restart")


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
    cpu_devices: int | None = None
    """Devices into which a CPU's cores are divided, each of which trains on a part of a batch: two speed up an LSTM on
    two cores. The last bits of a result depend on the number [default: 1, or as XLA_FLAGS says]."""
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


def check_common(common: Common) -> None:
    """Raises InputError where a flag that every experiment has is out of its range."""
    wanted = {
        "--seeds": common.seeds,
        "--checkpoint-every": common.checkpoint_every,
        "--cpu-devices": common.cpu_devices,
        "--processes": common.processes,
    }
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
    of_a_run = {
        "--restart": common.restart,
        "--profile": common.profile,
        "--coordinator": common.coordinator,
        "--processes": common.processes,
        "--process-id": common.process_id,
        "--cluster": common.cluster,
    }
    for flag, given in of_a_run.items():
        if common.plan is not None and given is not None and given is not False:
            raise InputError(f"{flag} is given with --plan, expected one of them: a plan runs nothing; leave one out")


def set_folders(common: Common) -> None:
    """Sets the environment variables that `data` reads from the flags --data-dir and --cache-dir."""
    for variable, folder in {"TFDS_DATA_DIR": common.data_dir, "DL_JAX_CACHE_DIR": common.cache_dir}.items():
        if folder:
            os.environ[variable] = folder


def seeds_of(common: Common) -> tuple[int, ...]:
    return tuple(range(common.seed, common.seed + common.seeds))


def command(experiment: str, arguments: Sequence[str]) -> str:
    """The command without flags for folders and processes, so that it gives this result on any machine."""
    kept, skip = [], False
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if not skip and flag not in (*WITH_VALUE, *ALONE):
            kept.append(argument)
        skip = not skip and flag in WITH_VALUE and "=" not in argument
    return shlex.join(["python", f"experiments/{experiment}.py", *kept])
