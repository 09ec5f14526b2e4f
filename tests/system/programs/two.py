"""One of several processes that train the same small network; process 0 prints what came out.

python two.py COORDINATOR PROCESSES PROCESS_ID DEVICES FOLDER [STEP_TO_FAIL_AT]
"""

import sys

import jax

coordinator, processes, process_id, devices, folder = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
fail_at, steps, pause = [*map(float, sys.argv[6:]), *(-1, 12, 0)[len(sys.argv) - 6 :]]
jax.config.update("jax_num_cpu_devices", devices)

from dl_jax.core import devices

if processes > 1:
    devices.initialize(coordinator, processes, process_id)

import json
import time

import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dl_jax import data, losses
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step
from dl_jax.harness.launch import leave, preemption
from dl_jax.harness.run import PREEMPTED, Preempted, Run, Settings

RECORDS = {
    "x": np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32),
    "label": np.random.default_rng(1).integers(0, 3, 64).astype(np.int32),
}


def loss(variables, batch, key):
    logits = batch["x"] @ variables["params"]["w"] + 0.1 * jax.random.normal(key, (len(batch["x"]), 3))
    return losses.cross_entropy(logits, batch["label"]).mean(), ({}, {})


mesh = devices.data_mesh(jax.devices()[::2] + jax.devices()[1::2])  # as scattered as a TPU slice lists them
tx = optax.adam(0.05)
state = devices.replicated(init_state(jax.random.key(0), {"params": {"w": jnp.zeros((5, 3))}}, tx), mesh)
rows = devices.process_rows(16, mesh)
stream = devices.placed(data.batches(RECORDS, 16, seed=3, rows=rows), mesh)


def batches(step):
    if step == fail_at and process_id == 1:
        raise RuntimeError("a bug in one process")
    time.sleep(pause)
    return stream(step)


run = Run(epath.Path(folder), Settings(checkpoint_every=5, preempted=preemption(processes > 1)))
try:
    state = fit(make_step(loss, tx), state, batches, steps=int(steps), run=run, every=4)
except Preempted:
    leave(PREEMPTED, processes > 1)
except RuntimeError as error:
    print(error, file=sys.stderr, flush=True)
    leave(1, processes > 1)
run.close()
if jax.process_index() == 0:
    print(json.dumps(np.asarray(state.params["w"].addressable_data(0)).tolist()), flush=True)
leave(0, processes > 1)
