"""Benchmarks of train steps: `fit` against the step alone, the input pipeline against the step, JAX against PyTorch.

    python benchmarks/train_step.py            some twenty minutes on 2 cores; with PyTorch if torch is installed
    python benchmarks/train_step.py --quick    a minute, to see that it runs; its ratios mean little
    python benchmarks/train_step.py Tagger     this network against PyTorch, and nothing else; several may be named,
                                               also other comparisons: RBM, PPO, Opacus, table, seeds, disk, ...

It times, on the networks of problems.py:

- `fit` and a minimal loop around the same compiled step, for the MLP and LeNet-5;
- LeNet-5 with `fit` on shuffled batches of memory-mapped images, and these batches without a step;
- five seeds of LeNet-5 in one step, computed one after the other on a CPU, and one seed;
- a hundred networks of a table's splits, as in experiments/tabular/ensembles_uci.py, in one step, and one of them;
- the work of the host for a step of LeNet-300-100 on 1,024 images, with ten steps per call and the data set on the
  device: computing indices, placing, dispatching and fetching, for a step that computes nothing;
- every network with `fit`, and its twin in PyTorch, eager and compiled, with fused optimisers; the faster of the two
  PyTorch variants is reported, with its memory; DP-SGD's twin computes the gradients of all examples by torch.func;
- where Opacus is installed, DP-SGD by its ghost clipping, which like ours computes the gradient of a kernel for no
  single example, and which is not compiled;
- a step of a restricted Boltzmann machine of 500 hidden units by persistent contrastive divergence on 100 images, and
  scikit-learn's; ours also binarises the images and reports its metrics;
- an iteration of proximal policy optimisation (PPO) on 512 frames of CartPole with `fit`, and with a Python loop over
  CartPole in NumPy, which asks the same policy for each action and learns by the same compiled updates;
- the start of an experiment until the end of its first step, and the initialisation of ResNet-50;
- XLA's convolution of many channels, and ours, which rests on how XLA chooses its kernel: below 1 the choice is lost.

Each row is a ratio measured in one run with interleaved contestants. Times per step are medians of wall clock times, so
run it on an idle machine. Memory is host memory: the peak of a process minus its memory after the imports. XLA compiles
in that process and is counted; the C++ compiler that PyTorch calls is not.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.neural_network import BernoulliRBM

sys.path.insert(0, str(Path(__file__).parents[1]))  # the processes of the contestants import this module

from benchmarks.cart_pole import CartPoles
from benchmarks.contest import Block, Contestant, Times, compete, ratio
from benchmarks.problems import BATCH, PROBLEMS, images
from dl_jax import data, losses, rbm
from dl_jax.control import environments, ppo
from dl_jax.core import devices
from dl_jax.core.fit import fit
from dl_jax.core.step import Batch, State, Step, init_states, init_variables, make_step, per_seed
from dl_jax.core.stream import no_data
from dl_jax.harness.machine import device, git_state, processor, versions
from dl_jax.models import ops
from dl_jax.models.vision.lenet import LeNet300
from dl_jax.models.vision.mlp import MLP
from dl_jax.models.vision.resnet import ResNet50

SEEDS = 5
NETWORKS, ROWS, NUMBERS, UNITS = 100, 100, 13, 50  # of a table: networks, and the batch, inputs and units of each
LARGE_IMAGE = jnp.zeros((1, 224, 224, 3))
MOST_SECONDS = 60  # for all blocks of a contestant
CHAINS, HIDDEN = 100, 500  # images in a batch of the restricted Boltzmann machine, as many as chains; hidden units
EPISODES = 4  # that PPO plays at a time
EPOCH = 468  # steps of an epoch of MNIST's 60,000 digits


def with_fit(name: str, batches=None) -> Block:
    """A block of steps driven by `fit`, as in an experiment."""
    step, state = PROBLEMS[name].step()
    if not batches and jax.default_backend() == "cpu":
        resident = jax.device_put(PROBLEMS[name].batch())
        batches = lambda i: resident
    elif not batches:  # an accelerator makes many steps in a call, on a set that is resident
        column = PROBLEMS[name].batch()
        batches = data.shuffled(
            {key: np.repeat(value, 8, 0) for key, value in column.items()}, rows_of(column), seeds=0
        )

    return fitted(step, state, batches)


def fitted(step: Step, state: State, batches: data.Stream | Callable[[int], Batch]) -> Block:
    """A block of steps with `fit`, also of the states of several seeds."""

    def block(n: int) -> None:
        nonlocal state
        state = jax.block_until_ready(fit(step, state, batches, steps=int(np.max(state.step)) + n))

    block(5)
    return block


def rows_of(batch: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(batch.values())))


def bare(name: str) -> Block:
    """A block of the same compiled steps in a minimal loop."""
    step, state = PROBLEMS[name].step()
    step, batch = jax.jit(step, donate_argnums=0), jax.device_put(PROBLEMS[name].batch())

    def block(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    block(5)
    return block


def from_disk() -> Block:
    """A block of `fit` on shuffled batches of 60,000 memory-mapped uint8 images, which are scaled in the step."""
    return with_fit("LeNet-5", stream())


def stream() -> data.Stream:
    """Shuffled batches of `memory_mapped` columns."""
    return data.shuffled(memory_mapped(), BATCH, seeds=0)


def five_seeds() -> Block:
    """A block of steps of five LeNet-5s, each on a batch of its own."""
    step, state = PROBLEMS["LeNet-5"].step()
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * SEEDS), state)
    resident = jax.device_put(
        {name: np.stack([column] * SEEDS) for name, column in PROBLEMS["LeNet-5"].batch().items()}
    )
    return fitted(per_seed(step, one_by_one=True), states, lambda i: resident)


def of_table(networks: int) -> Block:
    """A block of steps of so many networks that predict a mean and a variance, each from rows of its own."""
    model, tx = MLP((UNITS,), classes=2), optax.adam(0.01)
    keys = jax.vmap(jax.random.key)(np.arange(networks))
    states = init_states(keys, init_variables(model, keys, jnp.zeros((1, NUMBERS))), tx)
    x = np.random.default_rng(0).random((networks, ROWS, NUMBERS), np.float32)
    resident = jax.device_put({"x": x, "y": x.sum(-1)})

    def loss(variables, batch, key):
        mean, raw = jnp.moveaxis(jnp.asarray(model.apply(variables, batch["x"], train=True)), -1, 0)
        return losses.gaussian_nll(mean, jax.nn.softplus(raw) + 1e-6, batch["y"]).mean(), ({}, {})

    return fitted(per_seed(make_step(loss, tx)), states, lambda i: resident)


def host_milliseconds() -> float:
    """The time of the host in milliseconds per step of a `fit` whose compiled step computes nothing.

    It is the time of a long fit minus that of a short one, divided by the difference in steps.
    """
    model, keys = LeNet300(), jax.vmap(jax.random.key)(np.arange(1))
    variables = init_variables(model, keys, jnp.zeros((1, 28, 28, 1)))
    states = init_states(keys, variables, optax.sgd(0.1, 0.9))
    batches = data.shuffled(memory_mapped(), 1024, seeds=(0,))
    seen = lambda state, batch: (state._replace(step=state.step + 1), {"seen": batch["label"].mean(dtype=jnp.float32)})
    step = per_seed(seen)

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(fit(step, states, batches, steps=steps, scan=10))
        return time.perf_counter() - began

    seconds(100)
    return 1e3 * float(np.median([(seconds(2100) - seconds(100)) / 2000 for _ in range(5)]))


def memory_mapped() -> dict[str, np.ndarray]:
    """Random columns of the shapes and types of MNIST, memory-mapped as by `data.load`."""
    with tempfile.TemporaryDirectory() as folder:  # on Linux a deleted file stays mapped
        np.save(f"{folder}/image.npy", np.random.default_rng(0).integers(0, 256, (60_000, 28, 28, 1), np.uint8))
        return {"image": np.load(f"{folder}/image.npy", mmap_mode="r"), "label": np.zeros(60_000, np.int32)}


def pipeline_alone() -> Block:
    """A block that places batches on the device, without a step."""
    batches, done = stream(), 0
    rows = devices.rows_over(devices.data_mesh(), seeds=False)

    def block(n: int) -> None:
        nonlocal done
        jax.block_until_ready([devices.place(batches(step), rows, (BATCH,)) for step in range(done, done + n)][-1])
        done += n

    block(5)
    return block


def boltzmann() -> Block:
    """A block of steps of persistent contrastive divergence with `fit`."""
    tx, resident = optax.sgd(0.01), jax.device_put({"image": images(CHAINS)["image"]})
    state = rbm.start(np.zeros(28 * 28), HIDDEN, tx, jax.random.key(0), CHAINS)
    return fitted(rbm.contrastive_divergence(tx), state, lambda i: resident)


def boltzmann_of_sklearn() -> Block:
    """A block of the same steps by scikit-learn, in float32 as well."""
    machine, rows = BernoulliRBM(HIDDEN, learning_rate=0.01, batch_size=CHAINS), images(CHAINS)["image"]
    rows = rows.reshape(CHAINS, -1)

    def block(n: int) -> None:
        for _ in range(n):
            machine.partial_fit(rows)

    block(5)
    return block


def cart_pole_agent() -> tuple[ppo.Agent, optax.GradientTransformation, State]:
    """Networks of the usual size, their optimiser, and the state to begin with."""
    agent, init = ppo.networks(environments.cart_pole(), 64)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(2.5e-4, eps=1e-5))
    key_init, key = jax.random.split(jax.random.key(0))
    begin = jax.jit(lambda: ppo.start(environments.cart_pole(), tx, EPISODES, init(key_init), key))
    return agent, tx, begin()


def policy_optimisation() -> Block:
    """A block of iterations of PPO with `fit`, with CartPole inside the step."""
    agent, tx, state = cart_pole_agent()
    return fitted(ppo.step(environments.cart_pole(), agent, tx, ppo.Rule()), state, no_data)


def policy_optimisation_in_a_loop() -> Block:
    """A block of the same iterations with a loop over CartPole in NumPy."""
    agent, tx, state = cart_pole_agent()
    rule, poles = ppo.Rule(), CartPoles(EPISODES, 0)
    key, params, opt_state, done = state.key, state.params, state.opt_state, 0
    choose = jax.jit(lambda params, keys, t, seen: jax.random.categorical(keys[t], agent.logits(params, seen)))
    improve = jax.jit(
        lambda params, opt_state, seen, keys: ppo.improved(agent, tx, rule, params, opt_state, seen, keys[rule.rollout])
    )
    keys = jax.jit(lambda key, i: jax.random.split(jax.random.fold_in(key, i), rule.rollout + 1))

    def block(n: int) -> None:
        nonlocal params, opt_state, done
        for _ in range(n):
            each = keys(key, done)
            seen = [poles.step(np.asarray(choose(params, each, t, poles.state))) for t in range(rule.rollout)]
            rollout = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
            params, opt_state, _ = jax.block_until_ready(improve(params, opt_state, rollout, each))
            done += 1

    block(5)
    return block


def first_step_seconds() -> float:
    """The seconds from starting Python to the end of the first step of experiments/vision/lenet.py.

    This is the median of three runs, after one that fills the compilation cache.
    """
    script = Path(__file__).parents[1] / "experiments" / "vision" / "lenet.py"
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        command = [sys.executable, str(script), "--preset", "smoke", "--seeds", "1"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            next(line for line in process.stderr if " 1/" in line)  # progress appears with the first step
            seconds.append(time.perf_counter() - began)
            process.stderr.read()
    return float(np.median(seconds[1:]))  # the first run may have compiled


def initialising_seconds() -> float:
    """The seconds that it takes to compile and run the initialisation of ResNet-50."""
    began = time.perf_counter()
    jax.block_until_ready(init_variables(ResNet50(), jax.random.split(jax.random.key(0), 1), LARGE_IMAGE))
    return time.perf_counter() - began


def longer() -> float:
    """The time of XLA's own convolution divided by that of ours, which is XLA's with a row more, on all cores."""
    image, kernel = jnp.ones((BATCH, 14, 14, 32)), jnp.ones((3, 3, 32, 64))
    settings = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    xla, ours = (
        jax.jit(functools.partial(convolve, **settings)).lower(image, kernel).compile()
        for convolve in (jax.lax.conv_general_dilated, ops.conv_general_dilated)
    )

    def seconds(form: Callable[..., jax.Array]) -> float:
        began = time.perf_counter()
        jax.block_until_ready([form(image, kernel) for _ in range(5)])
        return time.perf_counter() - began

    return float(np.median([seconds(xla) / seconds(ours) for _ in range(12)]))


def fits(networks: Iterable[str]) -> dict[str, Contestant]:
    """`fit` on each of these networks, by name."""
    return {f"{name} fit": functools.partial(with_fit, name) for name in networks}


def of_torch(networks: Iterable[str]) -> dict[str, Contestant]:
    """The contestants of PyTorch for these networks, by name."""
    from benchmarks import torch_nets

    return {
        f"{name} torch {kind}": functools.partial(torch_nets.train_block, name, kind == "compiled")
        for name in networks
        for kind in ("eager", "compiled")
    }


class Row(NamedTuple):
    """A row of the printed table."""

    what: str
    measured: str
    goal: str
    memory: str = ""  # peak memory in MiB, of PyTorch and of ours


class Comparison(NamedTuple):
    """Contestants by name, of which none is a network's twin, and the row of the table that compares them."""

    entrants: dict[str, Contestant]
    row: Callable[[Mapping[str, Times]], Row]


def compared(what: str, goal: str, entrants: dict[str, Contestant], digits: int = 2, times: float = 1) -> Comparison:
    """The ratio of the first to the second contestant, multiplied by `times`."""
    first, second = entrants
    measured = lambda found: f"{times * ratio(found[first], found[second]):.{digits}f}"
    return Comparison(entrants, lambda found: Row(what, measured(found), goal))


def comparisons(torch: bool) -> dict[str, Comparison]:
    """The comparisons with other things than twins, by the names that select them; with PyTorch's only if `torch`."""
    bare_lenet = {"LeNet-5 bare": functools.partial(bare, "LeNet-5")}
    return {
        **{
            f"loop of {name}": compared(
                f"fit / bare step, {name}", "<= 1.03",
                fits([name]) | {f"{name} bare": functools.partial(bare, name)}, 3)
            for name in ("MLP", "LeNet-5")
        },
        "disk": compared(
            f"epoch of LeNet-5 from disk / {EPOCH} bare steps", "<= 1.1",
            {"LeNet-5 fit from disk": from_disk} | bare_lenet, 3),
        "pipeline": compared(
            "examples/s of the pipeline / of the LeNet-5 step", "> 1",
            bare_lenet | {"pipeline alone": pipeline_alone}, 1),
        "seeds": compared(
            f"{SEEDS} seeds of LeNet-5 at once / {SEEDS} runs", "<= 1.05",
            {"LeNet-5 five seeds": five_seeds} | fits(["LeNet-5"]), 3, 1 / SEEDS),
        "RBM": compared(
            "RBM, persistent CD: scikit-learn / fit", ">= 1.5",
            {"RBM scikit-learn": boltzmann_of_sklearn, "RBM fit": boltzmann}),
        "PPO": compared(
            "PPO, frames/s: fit / loop over NumPy's CartPole", ">= 2",
            {"PPO NumPy's CartPole": policy_optimisation_in_a_loop, "PPO fit": policy_optimisation}),
        "table": compared(
            f"{NETWORKS} networks of a table at once / {NETWORKS} runs", "<= 0.5",
            {"all table networks": functools.partial(of_table, NETWORKS),
             "one table network": functools.partial(of_table, 1)}, 3, 1 / NETWORKS),
        **(against_opacus() if torch and importlib.util.find_spec("opacus") else {}),
    }  # fmt: skip


def against_opacus() -> dict[str, Comparison]:
    """The comparison with Opacus, which must be installed."""
    from benchmarks import opacus_net

    what, goal = "DP-SGD: Opacus's ghost clipping / fit", ">= 1.0"
    return {
        "Opacus": Comparison(
            {"DP-SGD Opacus": opacus_net.train_block} | fits(["DP-SGD"]),
            lambda found: row_of_rivals(what, goal, found["DP-SGD Opacus"], found["DP-SGD fit"]),
        )
    }


def row_of_rivals(what: str, goal: str, theirs: Times, ours: Times) -> Row:
    """How many times as long a step of PyTorch takes as ours, and the memory of both."""
    return Row(what, f"{ratio(theirs, ours):.2f}", goal, f"{theirs.peak_mib:.0f} / {ours.peak_mib:.0f}")


def rows_against_torch(times: dict[str, Times], networks: Iterable[str]) -> list[Row]:
    """The rows of the table for these networks and their twins."""
    table = []
    for name in networks:
        ours, rivals = times[f"{name} fit"], [times[f"{name} torch {kind}"] for kind in ("eager", "compiled")]
        best = min(rivals, key=lambda t: np.median(t.seconds))
        table.append(row_of_rivals(f"{name}: faster PyTorch / fit", PROBLEMS[name].goal, best, ours))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run few and short rounds, without PyTorch")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a network, or a comparison: measure only these")
    args = parser.parse_args()
    quick = args.quick
    torch = importlib.util.find_spec("torch") is not None and not quick
    own = comparisons(torch)
    names = args.names or [*PROBLEMS, *own]
    if unknown := {*names} - PROBLEMS.keys() - own.keys():
        quoted = lambda names: ", ".join(map(repr, names))
        parser.error(f"there is no {quoted(sorted(unknown))}, expected some of {quoted([*PROBLEMS, *own])}")
    networks, chosen = [name for name in names if name in PROBLEMS], [own[name] for name in names if name in own]
    if args.names and networks and not torch:
        parser.error("there is no PyTorch to compare networks with; install torch, and leave --quick out")
    print(f"{os.cpu_count()} cores of {processor()}, load average {os.getloadavg()[0]:.1f} before the start")
    print(f"steps on {device()}")
    code, used = git_state(Path(__file__).parent), versions()
    rivals = [name for name in ("torch", "opacus") if torch and importlib.util.find_spec(name)]
    used |= {name: importlib.metadata.version(name) for name in rivals}
    print(f"commit {code['commit']}{'' if code['clean'] else ' with uncommitted changes'}")
    print(", ".join(f"{name} {version}" for name, version in used.items()) + "\n")
    entrants = fits(networks)
    for each in chosen:
        entrants |= each.entrants
    entrants |= of_torch(networks) if torch else {}
    times = compete(entrants, *((5, 2) if quick else (50, 9)), most_seconds=MOST_SECONDS)
    for name, (seconds, peak) in times.items():
        print(f"{name:<26} {1e3 * np.median(seconds):8.2f} ms/step {peak:6.0f} MiB at most")
    table = [each.row(times) for each in chosen]
    table += rows_against_torch(times, networks) if torch else []
    if not args.names:
        table.append(Row("host's ms per step, 10 in a call", f"{host_milliseconds():.3f}", "<= 0.1"))
        table.append(Row("seconds from start to first step", f"{first_step_seconds():.2f}", "<= 2.5"))
        table.append(Row("seconds to initialise ResNet-50", f"{initialising_seconds():.2f}", "<= 5"))
        table.append(Row("XLA's convolution / ours with a row more", f"{longer():.2f}", ">= 1.1"))
    print(f"\n{'':<48} {'measured':>8}   {'goal':<8} {'peak MiB, PyTorch / ours' if torch else ''}".rstrip())
    for what, measured, goal, memory in table:
        print(f"{what:<48} {measured:>8}   {goal:<8} {memory}".rstrip())
    if not torch:
        print("no rows against PyTorch: " + ("left out by --quick" if quick else "torch is not installed"))


if __name__ == "__main__":
    main()
