"""Every experiment is planned for a TPU slice that is not there. Needs libtpu: `pip install -e '.[test,tpu]'`."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dl_jax.core.flops import flops
from dl_jax.harness.plan import hlo
from dl_jax.harness.plan.chips import slice_of
from dl_jax.harness.plan.make import devices_of
from dl_jax.models.sequence.rnn import SequenceTagger

ROOT = Path(__file__).parents[2]
LIBTPU = importlib.util.find_spec("libtpu") is not None
EVERY = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "experiments").rglob("*.py"))
FEW = ("experiments/compression/prune_lenet.py", "experiments/generative/vae_mnist.py", "experiments/vision/lenet.py")
# Batch normalisation sums statistics over the rows in every layer, forward and backward.
NORMALISED = {
    *("degradation", "cifar_resnet", "imagenet_resnet", "separable", "depth"),
    *("points", "detect", "distill_features", "ternary"),
}
# A chain asks all rows whether its sums are exact, and sums its gradient in a branch and a loop; a table that is used
# at both ends of a network is summed for each; the sizes of Poisson samples are, once for all steps of a call; and MGDA
# sums the gradients of a code over all rows before it knows the weights of the tasks.
SUMS = {"tag": 4, "char_transformer": 2, "private": 2, "multi_task": 2}
# Of a table that is larger than the vectors read from it, XLA gathers these and sums the gradient on every device; in
# the LSTM's loop it does so 800 times a step. The step of the mean teacher crashes libtpu's compiler.
KNOWN = {
    "experiments/text/classify.py": "XLA gathers words' gradients",
    "experiments/learning/semi_supervised.py": "libtpu 0.0.42 ends in FusedSpatialMajorConvolution",
}
pytestmark = [pytest.mark.plan, pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed")]


def failing(script: str) -> list:
    return [pytest.mark.xfail(strict=True, reason=KNOWN[script])] if script in KNOWN else []


def plan(script: str, folder: Path, *flags: str) -> list[dict]:
    command = [sys.executable, script, "--preset", "quick", "--plan", "v5e:4x4", "--workdir", str(folder), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return json.loads((folder / "plan.json").read_text())["programs"]


def sent(program: dict) -> list[tuple[str, float]]:
    """(kind, how often in a step) of the collective operations."""
    return [(each["kind"], each["times"] / program["loop"]["steps"]) for each in program["cost"]["collectives"]]


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=[] if s in FEW else [pytest.mark.slow, *failing(s)]) for s in EVERY],
)
def test_an_experiment_as_it_is_compiles_to_one_all_reduce_in_place(script, tmp_path):
    fits = [each for each in plan(script, tmp_path) if each["loop"]]
    assert fits
    for each in fits:
        assert each["refused"] is None
        assert each["compile_seconds"] < 60
        assert each["cost"]["callbacks"] == 0
        assert each["loop"]["in_place"] > 0.999
        many = each["mesh"][1] > 1 and each["loop"]["batch_size"]  # every chip computes all of what is no stream's
        assert {kind for kind, _ in sent(each)} == {"all-reduce"} if many else sent(each) == [], each["name"]
        assert all(times <= 1 for _, times in sent(each))
        few = len(sent(each)) <= SUMS.get(Path(script).stem, 1)
        assert few or Path(script).stem in NORMALISED, (each["name"], sent(each))


def test_seeds_over_chips_need_no_collective(tmp_path):
    fits = [each for each in plan(FEW[0], tmp_path, "--seeds", "16") if each["loop"]]
    assert [each["mesh"] for each in fits] == [[16, 1]] * len(fits)
    assert all(sent(each) == [] for each in fits)


def test_a_batch_that_the_slice_cannot_split_is_planned_on_fewer_chips(tmp_path):
    fits = [each for each in plan(FEW[0], tmp_path, "--batch-size", "60", "--seeds", "1") if each["loop"]]
    assert [(each["mesh"], each["refused"]) for each in fits] == [([1, 4], None)] * len(fits)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--plan", "v5e:5x5"], "error: --plan v5e:5x5, expected v5e: and one of 1x1, 2x2, "),
        (["--plan", "v5e:4x4", "--batch-size", "0"], "--batch-size is 0, expected more than 0"),
        (["--plan", "v5e:4x4", "--fsdp"], "error: --fsdp finds nothing to split over 8 devices: "),
    ],
)
def test_bad_input_is_a_line(flags, said):
    command = [sys.executable, "experiments/text/char_lm.py", "--preset", "smoke", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5e:2x4", "v5p:4x4x4", "v6e:16x16"])
def test_slices_are_known_to_libtpu(name, tmp_path):
    command = [sys.executable, FEW[0], "--preset", "smoke", "--batch-size", "4096", "--plan", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def counted(function, *shapes: tuple[int, ...]) -> tuple[float, float]:
    """(operations, bytes) of a function of float32 arrays on one chip of a slice."""
    chip = devices_of(slice_of("v5e:2x2"))[0]
    where = SingleDeviceSharding(chip)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for shape in shapes]
    traced = jax.jit(function).trace(*given)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    return flops(traced.jaxpr), hlo.read(text, 1).bytes


def test_layers_of_rows_behind_other_axes_gather_nothing():
    seeds, batch, steps, width = 2, 8, 5, 16
    chips = devices_of(slice_of("v5e:2x2"))
    mesh = Mesh(chips, ("data",))
    like = lambda tree, *spec: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))),
        tree,
    )
    model = SequenceTagger(3, hidden=8, bidirectional=True)

    def loss(variables, x):
        return model.apply(variables, x, train=True)[0].sum()

    x = jax.ShapeDtypeStruct((seeds, batch, steps, width), jnp.float32)
    keys = jax.random.split(jax.random.key(0), seeds)
    variables = jax.eval_shape(jax.vmap(lambda key, x: model.init(key, x, train=False)), keys, x)
    gradient = jax.jit(jax.vmap(jax.grad(loss)), out_shardings=NamedSharding(mesh, PartitionSpec()))
    traced = gradient.trace(like(variables), like(x, None, "data"))
    found = hlo.read(traced.lower(lowering_platforms=("tpu",)).compile().as_text(), 4).collectives
    assert [(each.kind, each.times) for each in found] == [("all-reduce", 1)]


def size(*shapes: tuple[int, ...]) -> int:
    return sum(4 * math.prod(shape) for shape in shapes)


def test_an_mlps_arrays_are_moved_once_and_what_is_between_stays_in_fast_memory():
    shapes = (1024, 784), (784, 2048), (2048, 1024)
    operations, moved = counted(lambda x, a, b: jnp.maximum(x @ a, 0) @ b, *shapes)
    assert operations == 2 * 1024 * 784 * 2048 + 2 * 1024 * 2048 * 1024
    assert moved == pytest.approx(size(*shapes, (1024, 1024)), rel=0.01)


def test_the_weights_of_an_lstm_are_read_once_for_all_steps():
    steps, batch, hidden = 64, 512, 1024

    def lstm(x, w, u):
        def step(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(x @ w + h @ u, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zeros = jnp.zeros((batch, hidden))
        return jax.lax.scan(step, (zeros, zeros), x)[0][0]

    shapes = (steps, batch, hidden), (hidden, 4 * hidden), (hidden, 4 * hidden)
    operations, moved = counted(lstm, *shapes)
    assert operations == steps * 2 * batch * hidden * 8 * hidden
    assert moved == pytest.approx(size(*shapes, (batch, hidden)), rel=0.01)


def test_a_convolutions_result_is_moved_twice_more_for_its_layout():
    image, kernel = (256, 56, 56, 128), (3, 3, 128, 128)
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=layout)
    operations, moved = counted(convolve, image, kernel)
    assert operations == 2 * 256 * 128 * 128 * (3 * 56 - 2) ** 2  # the taps over the padding do not count
    assert moved == pytest.approx(size(image, kernel, image) + 2 * size(image), rel=0.01)
