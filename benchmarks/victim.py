"""An experiment that is small, goes on for as long as it is told, and fails in the way that it is told.

`faults.py` runs it like any experiment: `VICTIM_FAULT=hang:1:25 python benchmarks/victim.py --workdir runs/victim`
hangs in process 1 when this asks for the batch of step 25 of the second of its two fits. A fault is no part of the
config, so that the same command without it resumes the run.
"""

import ctypes
import dataclasses
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax import data, losses
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import init_state, make_step, per_seed
from dl_jax.harness import Run, launch

FOREVER = 10_000  # seconds
RECORDS = {
    "x": np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32),
    "label": np.random.default_rng(1).integers(0, 3, 64).astype(np.int32),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Two fits of a linear classifier."""

    steps: int = 40  # of each fit
    batch_size: int = 16  # examples in a step
    learning_rate: float = 0.05  # of Adam
    pause: float = 0.0  # seconds before each step
    watch_every: int = 10  # steps
    report_every: int = 7  # steps


PRESETS = {"quick": Config()}


def fault() -> tuple[str, int, int]:
    """(what, process, step) of $VICTIM_FAULT, such as "hang:1:25"."""
    what, process, step = (os.environ.get("VICTIM_FAULT") or "none:0:0").split(":")
    return what, int(process), int(step)


def strike(what: str) -> None:
    if what == "raise":
        raise RuntimeError("a bug in one process")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "hang":
        time.sleep(FOREVER)
    if what == "hold":  # Python's lock
        ctypes.PyDLL(None).sleep(FOREVER)


def loss(variables, batch, key):
    logits = batch["x"] @ variables["params"]["w"] + 0.1 * jax.random.normal(key, (len(batch["x"]), 3))
    return losses.cross_entropy(logits, batch["label"]).mean(), ({}, {})


def train(cfg: Config, run: Run, what: str, at: int) -> np.ndarray:
    """The weights [S, 5, 3] after one fit, in which a fault strikes at step `at`."""
    stream = data.shuffled(RECORDS, cfg.batch_size, run.seeds)
    tx = optax.adam(cfg.learning_rate * (2 if what == "diverge" else 1))

    def read(step: int, rows: slice) -> dict[str, np.ndarray]:
        if step == at:
            strike(what)
        time.sleep(cfg.pause)
        return stream.read(step, rows)

    def measure(variables):
        if what == "hang-evaluation":
            time.sleep(FOREVER)
        return {"norm": np.abs(variables["params"]["w"].addressable_data(0)).mean((1, 2))}

    state = jax.vmap(lambda key: init_state(key, {"params": {"w": jnp.zeros((5, 3))}}, tx))(run.keys(1)[0])
    state = fit(
        per_seed(make_step(loss, tx)),
        state,
        dataclasses.replace(stream, read=read),
        steps=cfg.steps,
        run=run,
        every=cfg.report_every,
        watch=Watch(cfg.watch_every, measure),
    )
    return np.asarray(state.params["w"].addressable_data(0))


def main(cfg: Config, run: Run) -> dict[str, np.ndarray]:
    what, process, at = fault()
    mine = process == jax.process_index()
    if what == "slow-data" and mine:
        time.sleep(FOREVER)
    found = [train(cfg, run / name, what if mine and name == "b" else "none", at) for name in "ab"]
    if what == "slow-end" and mine:
        time.sleep(FOREVER)
    return {f"sum/{name}": w.sum((1, 2)) for name, w in zip("ab", found, strict=True)}


if __name__ == "__main__":
    launch(main, PRESETS, ())
