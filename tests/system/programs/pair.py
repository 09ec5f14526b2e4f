"""One of two processes with two devices each. They join once, and then do one thing after the other:

    python pair.py COORDINATOR PROCESS_ID FOLDER EXPERIMENT...

trains a small network in FOLDER/trained, fits without data in FOLDER/doubled, runs the smoke preset of each EXPERIMENT
in a folder of its name, and trains again, in FOLDER/told, until it is told to end. What an experiment prints goes to
FOLDER/<its name>.<process>. With no experiment process 1 fails at step 3 of the first training.
"""

import sys

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # before anything asks for a device

import contextlib
import dataclasses
import json
import runpy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dl_jax import data, losses
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step, plain_state
from dl_jax.core.stream import no_data
from dl_jax.harness import machine
from dl_jax.harness.alive import Alive
from dl_jax.harness.launch import leave
from dl_jax.harness.machine import initialize
from dl_jax.harness.peers import Peers
from dl_jax.harness.run import PREEMPTED, Preempted, Run, Settings

ROOT = Path(__file__).parents[3]
RECORDS = {
    "x": np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32),
    "label": np.random.default_rng(1).integers(0, 3, 64).astype(np.int32),
}


def loss(variables, batch, key):
    logits = batch["x"] @ variables["params"]["w"] + 0.1 * jax.random.normal(key, (len(batch["x"]), 3))
    return losses.cross_entropy(logits, batch["label"]).mean(), ({}, {})


def train(folder: Path, steps: int, peers: Peers | None, before: Callable[[int], None] = lambda step: None) -> list:
    """The weights after `steps` on all devices; `before` is called with the number of each step."""
    tx = optax.adam(0.05)
    state = init_state(jax.random.key(0), {"params": {"w": jnp.zeros((5, 3))}}, tx)
    stream = data.shuffled(RECORDS, 16, seeds=3)
    told = dataclasses.replace(stream, read=lambda step, rows: (before(step), stream.read(step, rows))[1])
    with (
        Alive(grace=30, deadline=None, peers=peers, signals=peers is not None) as alive,
        contextlib.closing(Run(epath.Path(folder), Settings(checkpoint_every=5, preempted=alive.preempted))) as run,
    ):
        state = fit(make_step(loss, tx), state, told, steps=steps, run=run, every=4)
    return np.asarray(state.params["w"].addressable_data(0)).tolist()


def doubled(folder: Path) -> list:
    """What a step without data makes of two numbers in three steps, after which the state is saved."""
    step = lambda state, batch: (state._replace(step=state.step + 1, params=2 * state.params), {})
    with contextlib.closing(Run(epath.Path(folder), Settings())) as run:
        state = fit(step, plain_state(jax.random.key(0), jnp.arange(2.0)), no_data, steps=3, run=run)
    return np.asarray(state.params).tolist()


def experiment(name: str, folder: Path, address: str, process: int) -> None:
    """As from its command line, but that this process has joined the other before and does not leave it."""
    script = str(ROOT / "experiments" / f"{name}.py")
    sys.argv = [script, "--preset", "smoke", "--seeds", "2", "--workdir", str(folder / name)]
    sys.argv += ["--coordinator", address, "--processes", "2", "--process-id", str(process)]
    said = folder / f"{name}.{process}"
    said.parent.mkdir(parents=True, exist_ok=True)
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def main(address: str, process: int, folder: Path, experiments: Sequence[str]) -> None:
    initialize(address, 2, process)
    peers = Peers()

    def fail(step: int) -> None:
        if process == 1 and step == 3 and not experiments:
            raise RuntimeError("a bug in one process")

    try:
        weights = train(folder / "trained", 12, peers, fail)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        leave(1, peers, False, str(error))
    (folder / f"weights.{process}").write_text(json.dumps(weights))
    (folder / f"doubled.{process}").write_text(json.dumps(doubled(folder / "doubled")))
    joined, jax.distributed.initialize = jax.distributed.initialize, lambda *given, **options: None
    free, machine._require_free = machine._require_free, lambda coordinator: None  # the port is ours
    left, jax.distributed.shutdown = jax.distributed.shutdown, lambda: None
    for name in experiments:
        experiment(name, folder, address, process)
    jax.distributed.initialize, jax.distributed.shutdown, machine._require_free = joined, left, free
    try:
        train(folder / "told", 30_000, peers, lambda step: time.sleep(0.01))
    except Preempted:
        leave(PREEMPTED, peers, True, "")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
