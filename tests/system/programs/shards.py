"""Runs of a small experiment, each on one or several processes forked from this one, as imports take most of a start.

Reads a line of JSON {"processes", "devices" (of each), "address" (of process 0), "end" (a step, or null), "notes" (a
folder), "flags"} for each run, and prints the exit statuses of its processes when all have ended. Process 0 sends
itself SIGTERM when it reads the batch of step `end`. Each process writes what it holds of a state that it saves or has
restored to NOTES/<saved or restored>-STEP.PROCESS.npz, by "path|part", and what it prints to NOTES/said.PROCESS.
"""

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401  here and not in every child
import PIL.Image  # noqa: F401
import tensorboardX.summary  # noqa: F401
import tensorstore  # noqa: F401

from dl_jax import data, losses, metrics
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import Watch, fit
from dl_jax.core.leaves import box_of, named, stored_values
from dl_jax.core.step import init_state, make_step, per_seed
from dl_jax.harness import Run, launch
from dl_jax.harness.alive import TICK

RECORDS = {
    "x": np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32),
    "label": np.random.default_rng(1).integers(0, 160, 64).astype(np.int32),
}


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 12
    batch_size: int = 16


def error_of(variables, batch):
    return losses.cross_entropy(batch["x"] @ variables["params"]["w"] + variables["params"]["b"], batch["label"])


def main(cfg: Config, run: Run) -> dict[str, np.ndarray]:
    tx, (keys, evaluating) = optax.adam(1e-3), run.keys(2)
    params = {"w": jnp.zeros((256, 160)), "b": jnp.zeros(160)}  # w is large enough to be split
    state = jax.jit(jax.vmap(lambda key: init_state(key, {"params": params}, tx)))(keys)
    loss = lambda variables, batch, key: (error_of(variables, batch).mean(), ({}, {}))
    error = lambda variables, batch, key: {"error": metrics.masked(error_of(variables, batch), batch["mask"])}
    measure = evaluator(error, RECORDS, 24, evaluating)  # 64 rows: the last batch is padded
    on_fewer = evaluator(error, RECORDS, 9, evaluating)  # of two processes with two devices each, on one each

    def measured(variables):
        found = measure(variables)
        run.images(0, lambda: {"biases": np.asarray(variables["params"]["b"]).reshape(-1, 10, 16, 1)})
        return {**found, "mean": found["error"].mean()}

    stream = data.shuffled(RECORDS, cfg.batch_size, seeds=run.seeds)
    told = dataclasses.replace(stream, read=lambda step, rows: (ending(step), stream.read(step, rows))[1])
    witness(run)
    watch = Watch(4, measured, best=("mean", "min"))
    state = fit(per_seed(make_step(loss, tx)), state, told, steps=cfg.steps, run=run, every=4, watch=watch)
    assert np.isfinite(np.asarray(state.params["b"])).all()
    return on_fewer(state.variables)


def ending(step: int) -> None:
    if step == ORDER["end"]:
        if jax.process_index() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2 * TICK)  # meanwhile all processes hear of it


def witness(run: Any) -> None:
    """Has a run write what this process holds of the states that it saves and restores."""
    start, save = run.start, run.save

    def started(snapshot, *given):
        found = start(snapshot, *given)
        if found is not snapshot:
            note("restored", found)
        return found

    def saved(step, snapshot, measured):
        note("saved", snapshot)
        save(step, snapshot, measured)

    run.start, run.save = started, saved


def note(event: str, snapshot: Any) -> None:
    held: dict[str, np.ndarray] = {}
    for path, leaf in named(snapshot.state).items():
        values = stored_values(leaf)
        assert isinstance(values, jax.Array)
        for shard in values.addressable_shards:
            held[f"{path}|{json.dumps(box_of(shard.index, values.shape))}"] = np.asarray(shard.data)
    step = max(int(values.max()) for name, values in held.items() if name.startswith("step|"))
    np.savez(Path(ORDER["notes"], f"{event}-{step}.{jax.process_index()}.npz"), **held)


def run(order: dict[str, Any], process: int) -> None:
    """Is process `process` of a run. Does not return."""
    jax.config.update("jax_num_cpu_devices", order["devices"])
    sys.argv = [__file__, *order["flags"]]
    if order["processes"] > 1:
        sys.argv += ["--coordinator", order["address"], "--processes", str(order["processes"])]
        sys.argv += ["--process-id", str(process)]
    said = os.open(Path(order["notes"], f"said.{process}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        launch(main, {"quick": Config()}, [])
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    for line in sys.stdin:
        ORDER = json.loads(line)
        os.makedirs(ORDER["notes"], exist_ok=True)
        children = []
        for process in range(ORDER["processes"]):
            children.append(os.fork())
            if children[-1] == 0:
                run(ORDER, process)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
