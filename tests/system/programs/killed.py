"""Trains a small network undisturbed, then while killing it with SIGKILL; prints both digests.

    python killed.py FOLDER KILLS SEED

The run is cut into as many parts as there are kills, and each is at a random step of its part.
Imports once and forks for every attempt. One CPU: with more, a sum's order depends on which thread is first.
"""

import os

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import hashlib
import json
import random
import signal
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401  here and not in every child
import tensorboardX.summary  # noqa: F401
from etils import epath

from dl_jax import augment, data, losses, optim
from dl_jax.core.fit import Watch, fit
from dl_jax.core.step import init_state, make_step
from dl_jax.harness.run import Run, Settings

STEPS = 45
RECORDS = {
    "image": np.random.default_rng(0).random((96, 8, 8, 1), np.float32),
    "label": np.random.default_rng(1).integers(0, 4, 96).astype(np.int32),
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, *, train: bool):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(image))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(4)(x)


def loss(variables, batch, key):
    logits, new = Net().apply(variables, batch["image"], train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    return losses.cross_entropy(logits, batch["label"]).mean(), (new, {})


def train(folder: str, report) -> None:
    """Trains to the end and writes the digest of everything that the run remembers."""
    plateau = optax.contrib.reduce_on_plateau(0.5, patience=2, accumulation_size=3)
    tx = optax.chain(optax.adamw(optim.warmup_cosine(1e-2, STEPS)), plateau, optim.averaged(0.9))
    variables = jax.jit(lambda key: Net().init(key, RECORDS["image"][:1], train=False))(jax.random.key(0))
    state = init_state(jax.random.key(1), variables, tx)
    stream = data.shuffled(RECORDS, 16, seeds=2)
    run = Run(epath.Path(folder), Settings(checkpoint_every=4))
    state = fit(
        make_step(losses.with_batch(loss, augment.compose(augment.flip(), augment.noise(0.1))), tx),
        state,
        lambda step: (report(step), stream(step))[1],
        steps=STEPS,
        run=run,
        every=10,
        watch=Watch(15, lambda variables: {"error": np.float32(0.5)}),
        stop=optim.early_stopping("error", patience=100, mode="min"),
    )
    run.close()
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))):
        digest.update(np.asarray(leaf).tobytes())
    (epath.Path(folder) / "digest").write_text(digest.hexdigest())


def attempt(folder: str, kill_at: int | None) -> tuple[int, int]:
    """One process that trains; killed as soon as it asks for the batch of step `kill_at`. (first step, exit status)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(folder, lambda step: os.write(writer, bytes([step])))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    first = None
    with open(reader, "rb", buffering=0) as steps:
        while step := steps.read(1):
            first = step[0] if first is None else first
            if kill_at is not None and step[0] >= kill_at:
                os.kill(child, signal.SIGKILL)
                break
    return first or 0, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    undisturbed = attempt(f"{folder}/undisturbed", None)
    chance, part = random.Random(seed), (STEPS - 2) // kills
    steps = [2 + i * part + chance.randrange(part) for i in range(kills)]
    attempts = [attempt(f"{folder}/killed", step) for step in [*steps, None]]
    digests = [(epath.Path(folder) / name / "digest").read_text() for name in ("undisturbed", "killed")]
    print(json.dumps({"undisturbed": undisturbed, "steps": steps, "attempts": attempts, "digests": digests}))


if __name__ == "__main__":
    main()
