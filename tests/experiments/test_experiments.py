"""Every file in experiments/ runs its smoke preset and says what it claims. A deleted file deletes its tests."""

import contextlib
import dataclasses
import inspect
import math
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import pytest
from etils import epath

from dl_jax.core.errors import InputError
from dl_jax.harness.fields import Between, check
from dl_jax.harness.results.claims import obstacle
from dl_jax.harness.run import Run, Settings

FOLDER = Path(__file__).parents[2] / "experiments"
SCRIPTS = sorted(FOLDER.rglob("*.py"))


@pytest.fixture(params=SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def experiment(request, load_experiment):
    return load_experiment(str(request.param.relative_to(FOLDER).with_suffix("")))


OWN = ("metrics.jsonl", "events.out.tfevents.*", "checkpoints/**/*")  # what every fit writes


def test_smoke(experiment, tmp_path):
    seeds = (0, 1)
    # Random bits by XLA's own generator, which compiles sooner: no number is judged here.
    cfg = experiment.PRESETS["smoke"]
    with jax.default_prng_impl("rbg"), contextlib.closing(Run(epath.Path(tmp_path), Settings(seeds=seeds))) as run:
        measured = experiment.main(cfg, run)
    assert measured
    for name, values in measured.items():
        assert np.shape(values) == (repeats(experiment, cfg, seeds),), name
        assert all(math.isfinite(value) for value in values), name
    kept = {pattern: files(tmp_path, pattern) for pattern in getattr(experiment, "KEEPS", ())}
    assert [pattern for pattern, found in kept.items() if not found] == []
    own = set().union(*(files(tmp_path, f"**/{pattern}") for pattern in OWN))
    assert files(tmp_path, "**/*") - own == set().union(*kept.values())


def repeats(experiment: Any, cfg: Any, seeds: Sequence[int]) -> int:
    """How many values a metric has: one per seed, or what the experiment's `repeats(cfg, seeds)` says."""
    return experiment.repeats(cfg, seeds) if hasattr(experiment, "repeats") else len(seeds)


def files(folder: Path, pattern: str) -> set[Path]:
    return {path for path in folder.glob(pattern) if path.is_file()}


def test_an_experiment_may_have_a_value_for_each_split():
    splits = types.SimpleNamespace(repeats=lambda cfg, seeds: len(cfg.splits) * len(seeds))
    assert repeats(splits, types.SimpleNamespace(splits=(0, 1, 2)), (0,)) == 3
    assert repeats(types.SimpleNamespace(), None, (0, 1)) == 2


def test_it_says_what_it_claims_and_how_to_run_it(experiment):
    path = Path(experiment.__file__).relative_to(FOLDER.parent)
    assert f"python {path}" in inspect.getdoc(experiment)
    assert {"paper", "quick", "smoke"} <= set(experiment.PRESETS)
    assert experiment.CLAIMS
    for claim in experiment.CLAIMS:
        config = vars(experiment.PRESETS[claim.preset])
        assert obstacle(claim, claim.seeds, preset=claim.preset, config={**config, **claim.given}) == ""
        assert set(claim.given) <= set(config)


def test_every_field_is_explained(experiment):
    source = inspect.getsource(experiment.Config).splitlines()
    fields = [line for line in source if ": " in line and "=" in line and not line.strip().startswith("#")]
    assert len(fields) == len(vars(experiment.PRESETS["paper"]))
    assert [line for line in fields if "  # " not in line] == []


def test_fields_say_what_they_may_hold_and_are_checked(experiment):
    """Every count has a range, as most other numbers have; outside it a field is refused in one line with its flag."""
    good, hints = experiment.PRESETS["paper"], get_type_hints(experiment.Config, include_extras=True)
    check(good)
    for name, hint in hints.items():
        ranges = [note for note in notes_of(hint) if isinstance(note, Between)]
        assert ranges or not is_count(getattr(good, name)), name
        for wrong in outside(ranges, getattr(good, name)):
            with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} is "):
                check(dataclasses.replace(good, **{name: wrong}))


def test_parts_of_an_experiment_are_named_once(experiment):
    """Each is a fit in a folder of its own: a second one of a name would end the run after the first."""
    for name, hint in get_type_hints(experiment.Config, include_extras=True).items():
        several = get_origin(strip(hint)) is tuple and get_origin(strip(get_args(strip(hint))[0])) is Literal
        if several:
            default = getattr(experiment.PRESETS["paper"], name)
            with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} is .*each value once"):
                check(dataclasses.replace(experiment.PRESETS["paper"], **{name: (*default, default[0])}))


def strip(hint):
    """The type without what it is annotated with."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def notes_of(hint) -> list:
    """All that the types within `hint` are annotated with."""
    own = list(get_args(hint)[1:]) if get_origin(hint) is Annotated else []
    return own + [note for inner in get_args(hint) if inner is not Ellipsis for note in notes_of(inner)]


def is_count(value) -> bool:
    return any(map(is_count, value)) if isinstance(value, tuple) else type(value) is int


def outside(ranges: list[Between], value) -> list:
    """Values of the shape of `value` in which every number is below, or above, all of `ranges`."""
    fill = lambda value, number: tuple(fill(v, number) for v in value) if isinstance(value, tuple) else number
    low, high = min((r.low for r in ranges), default=-math.inf), max((r.high for r in ranges), default=math.inf)
    return [fill(value, math.nan)] * bool(ranges) + [
        fill(value, end) for end in (low - 1, high + 1) if abs(end) < math.inf
    ]


def test_loading_an_experiment_starts_no_device():
    """`--cpu-devices` and a run of several processes set JAX up after the file is loaded."""
    program = """
import importlib.util, pathlib, sys
from jax._src import xla_bridge
for i, path in enumerate(sorted(pathlib.Path("experiments").rglob("*.py"))):
    spec = importlib.util.spec_from_file_location(f"experiment_{i}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if xla_bridge.backends_are_initialized():
        sys.exit(f"{path} starts JAX's devices where it is loaded; make the array in a function, or with NumPy")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
