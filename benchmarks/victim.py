"""An experiment that is small, goes on for as long as it is told, and fails in the way that it is told.

`faults.py` runs it like any experiment: `VICTIM_FAULT=hang:1:25 python benchmarks/victim.py --workdir runs/victim`
hangs in process 1 when this asks for the batch of step 25 of the second of its two fits. A fault is no part of the
config, so that the same command without it resumes the run. What it does is noted in the file $VICTIM_LOG.
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
IN_A_STEP = ("raise", "kill", "freeze", "hang", "hold")  # of the faults
SPLIT = "train[:64]"
UNROLLED = 5000  # iterations, which XLA compiles for half a minute


@dataclasses.dataclass(frozen=True)
class Config:
    """Two fits of a linear classifier of the digits."""

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


def note(words: str) -> None:
    """Adds a line to the file $VICTIM_LOG."""
    with open(os.environ.get("VICTIM_LOG", os.devnull), "a") as file:
        file.write(f"{words}\n")


def strike(what: str) -> None:
    note("struck")
    if what == "raise":
        raise RuntimeError("a bug in one process")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what in ("hang", "hang-evaluation", "slow-data", "slow-end"):
        time.sleep(FOREVER)
    if what == "slow-evaluation":
        time.sleep(3)
    if what == "hold":  # Python's lock
        ctypes.PyDLL(None).sleep(FOREVER)
    if what == "compile":
        body = lambda x, _: (jnp.sin(x) @ x + jnp.cos(x).sum(), None)
        jax.jit(lambda x: jax.lax.scan(body, x, None, UNROLLED, unroll=UNROLLED)[0])(jnp.ones((8, 8)))


def loss(variables, batch, key):
    logits = batch["image"].reshape(-1, 64) / 255 @ variables["params"]["w"]
    logits += 0.1 * jax.random.normal(key, logits.shape)
    return losses.cross_entropy(logits, batch["label"]).mean(), ({}, {})


def train(cfg: Config, run: Run, keys: jax.Array, what: str, at: int) -> np.ndarray:
    """The weights [S, 64, 10] after one fit, in which a fault strikes at step `at`."""
    stream = data.shuffled(data.load("digits", SPLIT), cfg.batch_size, run.seeds)
    tx = optax.adam(cfg.learning_rate * (2 if what == "diverge" else 1))

    def read(step: int, rows: slice) -> dict[str, np.ndarray]:
        if step == at and what in IN_A_STEP:
            strike(what)
        time.sleep(cfg.pause)
        return stream.read(step, rows)

    stepped = run.stepped

    def noted(step: int) -> bool:  # a batch is read ahead of its step
        note(f"{run.name} {step - 1}")
        return stepped(step)

    run.stepped = noted

    def measure(variables):
        if what.endswith("-evaluation"):
            strike(what)
        return {"norm": np.abs(variables["params"]["w"].addressable_data(0)).mean((1, 2))}

    state = jax.vmap(lambda key: init_state(key, {"params": {"w": jnp.zeros((64, 10))}}, tx))(keys)
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
    what = what if process == jax.process_index() else "none"
    if what in ("slow-data", "compile"):
        strike(what)
    found = [
        train(cfg, run / name, keys, what if name == "b" else "none", at)
        for name, keys in zip("ab", run.keys(2), strict=True)
    ]
    if what == "slow-end":
        strike(what)
    return {f"mean/{name}": np.abs(w).mean((1, 2)) for name, w in zip("ab", found, strict=True)}


if __name__ == "__main__":
    launch(main, PRESETS, ())
