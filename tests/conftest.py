"""Shared fixtures, how many processes share the suite, and the environment, which is set before JAX is imported.

That is 8 simulated devices, a compilation cache, and programs compiled without most of XLA's optimisations: nearly all
that a test computes is computed once, and to optimise it takes two to nine times as long as to compile it plainly.
"""

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_FLAGS", EIGHT_DEVICES)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest

MOST_WORKERS = 8  # the longest file is an eighth of the suite

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" in config.option.markexpr:  # slow tests train for longer than they compile
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        if importlib.metadata.version("jaxlib").startswith("0.10.") and os.environ["XLA_FLAGS"] == EIGHT_DEVICES:
            # XLA's older emitter compiles a small program in two thirds of the time; a later XLA has it no more.
            older = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
            os.environ["XLA_FLAGS"] = f"{EIGHT_DEVICES} {older}"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` stands for: a worker for each processor, but not more than files, and none for a single file.

    A worker takes seconds to start and a gigabyte to live, and in this very process a debugger and prints work.
    """
    files = {Path(argument.partition("::")[0]) for argument in config.args}
    most = len(files) if all(file.suffix == ".py" for file in files) else MOST_WORKERS
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, most)
    return workers if workers > 1 else 0


@pytest.fixture
def tfds_dir() -> str:
    """The folder of prepared TFDS sets; the test is skipped, visibly, where there is none."""
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not Path(folder, "mnist").is_dir():
        pytest.skip("TFDS_DATA_DIR holds no prepared mnist")
    return folder


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """The seconds that each compilation of this test has taken so far."""
    import jax

    found: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def accumulated() -> Callable[[Path], Any]:
    """What TensorBoard reads from the event files in a folder."""

    def read(folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not our code
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()

    return read


@pytest.fixture(scope="session")
def load_experiment() -> Callable[[str], ModuleType]:
    """The module of an experiment by its name, "text/char_lm"."""

    def load(name: str) -> ModuleType:
        unique = "experiment_" + name.replace("/", "_")
        spec = importlib.util.spec_from_file_location(unique, ROOT / "experiments" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and inspect look
        spec.loader.exec_module(module)
        return module

    return load
