"""Files of every release are read by this tree: those in tests/golden, and those that it would write itself."""

import contextlib
import re
import shutil
from pathlib import Path

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.compress import codec
from dl_jax.export import record
from dl_jax.harness.checkpoint.store import Checkpoints, best_step, load
from dl_jax.serve import runtime

RELEASES = sorted(path for path in (Path(__file__).parents[1] / "golden").glob("*") if path.is_dir())
NOW = "this tree"


@pytest.fixture(scope="module", params=[NOW, *(path.name for path in RELEASES)])
def folder(request, tmp_path_factory) -> Path:
    """A copy of a release's files, which a reader may lock."""
    target = tmp_path_factory.mktemp("golden") / "files"
    if request.param == NOW:
        golden_files.write(target)
    else:
        shutil.copytree(RELEASES[0].parent / request.param, target)
    return target


def test_the_checkpoint_is_restored(folder):
    expected = golden_files.state()
    with contextlib.closing(Checkpoints(str(folder / "checkpoint"))) as checkpoints:
        step, found, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, expected))
    assert step == best_step(str(folder / "checkpoint")) == golden_files.STEP
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(
        load(str(folder / "checkpoint"))[1]["params"]["kernel"], golden_files.PARAMS["kernel"]
    )


@pytest.mark.parametrize("suffix", golden_files.FORMATS)
def test_exported_files_predict_and_may_be_served(folder, suffix):
    file = folder / f"dense.{suffix}"
    np.testing.assert_array_equal(golden_files.FORMATS[suffix].load(file)(golden_files.INPUTS), golden_files.OUTPUTS)
    model = runtime.opened(str(file), 4, 1)
    assert model.record == record.load(file)
    assert model.record.classes == golden_files.CLASSES
    [found] = model.predict([golden_files.INPUTS])
    np.testing.assert_array_equal(found, golden_files.OUTPUTS)


def test_the_compressed_model_is_decoded(folder):
    found = codec.decode((folder / "dense.dlj").read_bytes())
    assert found.keys() == golden_files.PARAMS.keys()
    for name, expected in golden_files.PARAMS.items():
        np.testing.assert_array_equal(found[name], expected, strict=True)


def test_the_files_are_small_and_name_no_file_of_a_machine(folder):
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert sum(map(len, contents)) < 100_000
    assert not [found for content in contents for found in re.findall(rb"[\w/.-]+\.py\b", content)]
