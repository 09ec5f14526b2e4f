"""Every file in experiments/ runs its smoke preset and says what it claims. A deleted file deletes its tests."""

import importlib.util
import inspect
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from dl_jax.claims import obstacle
from dl_jax.run import Run, Settings

FOLDER = Path(__file__).parents[1] / "experiments"
SCRIPTS = sorted(FOLDER.rglob("*.py"))


def module(path: Path):
    name = "experiment_" + "_".join(path.relative_to(FOLDER).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # where inspect looks for the source
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(params=SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def experiment(request):
    return module(request.param)


def test_smoke(experiment):
    seeds = (0, 1)
    measured = experiment.main(experiment.PRESETS["smoke"], Run(settings=Settings(seeds=seeds)))
    assert measured
    for name, values in measured.items():
        assert np.shape(values) == (len(seeds),), name
        assert all(math.isfinite(value) for value in values), name


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
