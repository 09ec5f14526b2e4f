"""The machine: settings that make runs faster, and its description for the record of a run."""

import ctypes
import importlib.metadata
import math
import os
import platform
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax

import dl_jax
from dl_jax.core.errors import UNAVAILABLE, InputError, Unavailable, reason
from dl_jax.core.files import cache_address, cache_folder

HEARTBEAT = 25  # seconds without one, after which JAX takes a process for dead


def cache_programs() -> None:
    """Caches compiled programs on disk or in a bucket, small ones too, which makes a second start seconds faster.

    Raises InputError for a bucket that is not there, and Unavailable where it does not answer.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str((cache_address() or cache_folder()) / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_freed_memory() -> None:
    """Stops glibc from returning the memory of large temporaries to the kernel at each step.

    This makes steps on a CPU up to 1.9 times faster. It has to be called before the first large allocation. The four
    settings are M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX of mallopt(3).
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20), (-8, 1)):
            mallopt(option, value)


def git_state(folder: Path) -> dict[str, Any]:
    """{"commit", "clean"} of the repository of `folder`: clean means without uncommitted changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": False}


def device() -> str:
    """The devices in words: "8 x TPU v4", "1 x cpu (2 cores of Intel(R) Xeon(R) Processor @ 2.50GHz)"."""
    kind, n = jax.devices()[0].device_kind, jax.device_count()
    return f"{n} x {kind}" + (f" ({os.cpu_count()} cores of {processor()})" if kind == "cpu" else "")


def processor() -> str:
    """The name of the CPU, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    ours = {"python": platform.python_version(), "dl_jax": dl_jax.__version__}
    return {**ours, **{name: importlib.metadata.version(name) for name in packages}}


def initialize(coordinator: str | None, processes: int | None, process_id: int | None, seconds: float = 300) -> None:
    """Joins the other processes of a distributed run, for which it waits that many seconds.

    If the first three arguments are None, they are asked of the cluster (TPU pod, SLURM, Open MPI, Kubernetes). When a
    process dies, the others end within 45 seconds; with JAX's defaults this takes minutes. Where a process does not
    come, this one ends with status 75. Raises InputError where no cluster is found, or the arguments are not valid.
    """
    jax.config.update("jax_enable_preemption_service", False)  # its handler of SIGTERM would take the place of ours
    options: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": 30}
    if process_id == 0 and coordinator:
        _require_free(coordinator)
    bound = threading.Timer(seconds, _give_up, (seconds,))  # JAX would end the process with a dump of its stack
    bound.daemon = True
    bound.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, initialization_timeout=math.ceil(seconds) + 60, **options
        )
    except ValueError as error:
        raise InputError(
            f"cannot join a run of several processes ({reason(error)}); give --coordinator, --processes and "
            "--process-id"
        ) from error
    finally:
        bound.cancel()


def _require_free(coordinator: str) -> None:
    """Raises Unavailable where another program has the port of `coordinator`, host:port; JAX would crash."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a run that has just ended is free
        try:
            probe.bind(("", int(coordinator.rpartition(":")[2])))
        except OSError as error:
            raise Unavailable(
                f"the port of --coordinator {coordinator} cannot be had ({reason(error)}); wait, or choose another"
            ) from error
        except ValueError as error:
            raise InputError(f"--coordinator {coordinator}, expected host:port; give the port of process 0") from error


def _give_up(seconds: float) -> None:
    words = f"not all processes of this run came within --join-within {seconds:g} s; start all of them, or give more"
    os.write(2, f"error: {words}\n".encode())
    os._exit(UNAVAILABLE)
