"""Files of a release that later ones have to read: a checkpoint, exported files with their records, a compressed model.

`python tests/unit/golden_files.py FOLDER` writes them; `.ci/release.py prepare` does so to tests/golden/VERSION.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax.compress import codec
from dl_jax.core.step import State
from dl_jax.export import onnx, record, stablehlo
from dl_jax.harness.checkpoint.store import Checkpoints

FORMATS = {"onnx": onnx, "stablehlo": stablehlo}
CLASSES = ("low", "middle", "high")
STEP = 3
METRICS = {"error": 0.25}
PARAMS = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 4, "bias": np.asarray([1, -1, 0.5], np.float32)}
INPUTS = np.asarray([[1, 2], [3, -4], [0, 0]], np.float32)
OUTPUTS = np.asarray([[2.5, 1.25, 3.5], [0, 0, 0], [1, 0, 0.5]], np.float32)  # relu(x W + b), by hand


def state() -> State:
    """What the checkpoint holds: leaves of several types."""
    params = {**jax.tree.map(jnp.asarray, PARAMS), "half": jnp.arange(3).astype(jnp.bfloat16)}
    extra = {"a.b/c": jnp.array([True, False]), "none": jnp.zeros((0, 4)), "steps": jnp.array([1, -2], jnp.int32)}
    keys = jax.random.wrap_key_data(jnp.arange(4, dtype=jnp.uint32).reshape(2, 2), impl="threefry2x32")
    return State(jnp.asarray(STEP, jnp.int32), params, extra, optax.adam(0.1).init(params), keys)


def dense(params: Any, x: jax.Array) -> jax.Array:  # [B, 2] -> [B, 3]
    return jax.nn.relu(x @ params["kernel"] + params["bias"])


def write(folder: Path) -> None:
    """Writes all files to `folder`, which must not exist."""
    folder.mkdir(parents=True)
    with contextlib.closing(Checkpoints(str(folder / "checkpoint"), best=("error", "min"))) as checkpoints:
        checkpoints.save(STEP, state(), METRICS)
    for note in folder.rglob("commit_success.txt"):
        note.unlink()  # it names the folder it was written to, and no reader needs it on a local disk
    for suffix, format in FORMATS.items():
        file = folder / f"dense.{suffix}"
        format.export(dense, PARAMS, [INPUTS], file)
        record.write(file, format.load(file), [(INPUTS,)], classes=CLASSES)
    (folder / "dense.dlj").write_bytes(codec.encode(PARAMS))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
