"""The cost of splitting a step: the same steps on 1, 2, 4 and 8 simulated devices, which share the processor.

    python benchmarks/scaling.py            ten minutes on 2 quiet cores
    python benchmarks/scaling.py --quick    to see that it runs; its ratios mean little

The global batch, and so the work, is the same for any number of devices, and they have the same cores, so n devices
would take as long as one if the split were free. A ratio above 1 is what the split costs: copies of the state and of
the gradient, smaller products, more calls. It is measured with `fit` on a stream, in interleaved rounds, for a small
and a large net, split over rows, over rows with the state split too (`--fsdp`), and over seeds.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))  # the processes of the contestants import this module

from benchmarks.contest import Block, compete, ratio
from dl_jax import classify, data
from dl_jax.core.fit import fit
from dl_jax.core.recorder import Recorder
from dl_jax.core.step import make_step, per_seed, start
from dl_jax.harness.machine import git_state, processor, versions
from dl_jax.models.vision.mlp import MLP

DEVICES = (1, 2, 4, 8)
SEEDS = 8
GOAL = 1.05  # for the large net
NETS: dict[str, tuple[tuple[int, ...], int, int]] = {  # hidden layers, images of a step, steps of a round
    "small: 784-300-100-10, 128 images": ((300, 100), 128, 200),
    "large: 784-2048-2048-10, 4096 images": ((2048, 2048), 4096, 2),
}


class Sharded(Recorder):
    fsdp = True


def block(hidden: tuple[int, ...], batch_size: int, devices: int, seeds: int, sharded: bool) -> Block:
    """A block of steps of `fit` on that many simulated devices."""
    jax.config.update("jax_num_cpu_devices", devices)
    random = np.random.default_rng(0)
    records = {
        "image": random.integers(0, 256, (20_000, 28, 28, 1), np.uint8),
        "label": random.integers(0, 10, 20_000).astype(np.int32),
    }
    model, tx = MLP(hidden), optax.sgd(0.01, 0.9)
    apply: Callable[..., Any] = model.apply
    keys = jax.vmap(jax.random.key)(np.arange(seeds))
    state = start(model, tx, keys, keys, jnp.zeros((1, 28, 28, 1)))
    step = per_seed(make_step(classify.loss(apply), tx), one_by_one=True)
    stream, run = data.shuffled(records, batch_size, range(seeds)), Sharded() if sharded else Recorder()

    def steps(n: int) -> None:
        nonlocal state
        done = int(np.max(np.asarray(state.step)))
        state = jax.block_until_ready(fit(step, state, stream, steps=done + n, every=n, run=run))

    steps(2)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run few and short rounds")
    quick = parser.parse_args().quick
    code, used = git_state(Path(__file__).parent), versions()
    print(f"{os.cpu_count()} cores of {processor()}, load average {os.getloadavg()[0]:.1f} before the start")
    print(f"commit {code['commit']}{'' if code['clean'] else ' with uncommitted changes'}")
    print(", ".join(f"{name} {version}" for name, version in used.items()) + "\n")
    print(f"{'':<58}" + "".join(f"{f'{n} devices':>11}" for n in DEVICES[1:]))
    for net, (hidden, batch_size, steps) in NETS.items():
        for split, seeds, sharded in (("rows", 1, False), ("rows, --fsdp", 1, True), (f"{SEEDS} seeds", SEEDS, False)):
            per_step = max(1, batch_size // seeds)
            contestants = {str(n): functools.partial(block, hidden, per_step, n, seeds, sharded) for n in DEVICES}
            times = compete(contestants, max(1, steps // 10) if quick else steps, 2 if quick else 9)
            shown = "".join(f"{ratio(times[str(n)], times['1']):>11.2f}" for n in DEVICES[1:])
            alone = 1e3 * float(np.median(times["1"].seconds))
            print(f"{f'{net}, {split}':<50} {alone:7.1f}{shown}", flush=True)
    print(f"\nThe first number is the time of a step on one device in ms. Goal for the large net: at most {GOAL}.")


if __name__ == "__main__":
    main()
