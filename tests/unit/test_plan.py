"""Plans: slices, what is read of a compiled program against hand counts, and the bounds. None of it needs libtpu."""

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from dl_jax import classify, data
from dl_jax.core.devices import data_mesh, states_over
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.flops import flops
from dl_jax.core.step import State, make_step, per_seed, start
from dl_jax.core.target import Feed, Program, Target, abstract, planning
from dl_jax.harness.flags import Common, check_common
from dl_jax.harness.plan import hlo
from dl_jax.harness.plan.bounds import CALL, HOP, Bounds, bounds, seconds, worthwhile_batch
from dl_jax.harness.plan.chips import CHIPS, slice_of
from dl_jax.harness.plan.hlo import Collective
from dl_jax.harness.plan.make import devices_of, row_of
from dl_jax.harness.plan.show import Cost, Loop, Row, lines
from dl_jax.models.sequence.rnn import LSTM, Recurrent
from dl_jax.models.vision.mlp import MLP

ROOT = Path(__file__).parents[2]
BATCH = 32


def test_the_operations_of_a_step_of_an_mlp():
    """Forward, and backward twice as much, but for the gradient of the input: 784-300-10."""
    model = MLP((300,), classes=10)
    image = jnp.zeros((BATCH, 28, 28, 1))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    loss = lambda variables: model.apply(variables, image, train=False).sum()
    forward = 2 * BATCH * (784 * 300 + 300 * 10)
    assert flops(jax.make_jaxpr(loss)(variables)) == forward
    assert flops(jax.make_jaxpr(jax.grad(loss))(variables)) == 2 * forward + 2 * BATCH * 300 * 10


def test_the_operations_of_an_lstm_are_those_of_all_its_steps():
    steps, inputs, hidden = 7, 5, 16
    model = Recurrent(LSTM, hidden)
    x = jnp.zeros((BATCH, steps, inputs))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    found = flops(jax.make_jaxpr(lambda variables: model.apply(variables, x, train=False))(variables))
    assert found == 2 * BATCH * steps * (inputs + hidden) * 4 * hidden


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("stride", "padding", "taps"), [(1, "VALID", 24 * 5), (2, "SAME", 14 * 5 - 3)])
def test_the_operations_of_a_convolution_and_of_its_gradients(stride, padding, taps, seeds):
    """`taps`: the products along an axis of 28 pixels. With stride 2 and padding (1, 2), three fall on zeros."""
    x, kernel = jnp.zeros((seeds, BATCH, 28, 28, 3)), jnp.zeros((seeds, 5, 5, 3, 8))

    def one(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=layout).sum()

    count = seeds * 2 * BATCH * taps**2 * 3 * 8
    assert flops(jax.make_jaxpr(jax.vmap(one))(x, kernel)) == count
    assert flops(jax.make_jaxpr(jax.vmap(jax.grad(one, (0, 1))))(x, kernel)) == 3 * count


def test_loops_multiply_and_platforms_do_not_add_up():
    a = jnp.zeros((4, 4))
    many = lambda a: lax.scan(
        lambda c, _: (lax.scan(lambda d, _: (d @ a, None), c, None, length=3)[0], None), a, None, 5
    )
    assert flops(jax.make_jaxpr(many)(a)) == 15 * 2 * 4**3
    either = lambda a: lax.platform_dependent(a, cpu=lambda a: a @ a @ a @ a, default=lambda a: a @ a)
    assert flops(jax.make_jaxpr(either)(a)) == 2 * 4**3
    branches = lambda a: lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a, a)
    assert flops(jax.make_jaxpr(branches)(a)) == 2 * 2 * 4**3
    called = jax.jit(jax.checkpoint(lambda a: a @ a))
    assert flops(jax.make_jaxpr(called)(a)) == 2 * 4**3


@pytest.mark.parametrize("shape", [(1, 8), (4, 2), (8, 1)])
def test_operations_are_those_of_all_seeds_however_they_are_split(shape):
    model = MLP((300,), classes=10)
    image = jnp.zeros((BATCH, 28, 28, 1))
    states = jax.eval_shape(
        lambda keys: start(model, optax.sgd(0.1), keys, keys, image), jax.random.split(jax.random.key(0), 8)
    )
    step = per_seed(make_step(classify.loss(model.apply), optax.sgd(0.1)))
    batch = {"image": jnp.zeros((8, *image.shape)), "label": jnp.zeros((8, BATCH), jnp.int32)}
    axes = (jax.sharding.AxisType.Auto,) * 2
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(shape, ("seed", "data"), axis_types=axes)):
        found = flops(jax.make_jaxpr(step)(states, batch))
    forward = 2 * BATCH * (784 * 300 + 300 * 10)
    assert found == 8 * (2 * forward + 2 * BATCH * 300 * 10)


def compiled(function, *args) -> str:
    return jax.jit(function).lower(*args).compile().as_text()


def test_the_bytes_of_a_product_count_as_often_as_its_loop_runs():
    def moved(n: int) -> float:
        a, b = jnp.zeros((n, 64, 128)), jnp.zeros((128, 64))
        return hlo.read(compiled(lambda a, b: lax.map(lambda a: a @ b, a), a, b), 1).bytes

    left, right, result = 4 * 64 * 128, 4 * 128 * 64, 4 * 64 * 64
    product = left + right + result
    sliced, updated, made = 2 * left, 2 * result, 2 * result  # all results are zeros first, and are copied once
    assert (moved(9) - moved(5)) / 4 == pytest.approx(product + sliced + updated + made, abs=100)  # and counters


# As libtpu writes it: a loop over 10 steps that reads 1 of 10 rows of `data`, and whose state is in fast memory.
LOOP = """HloModule jit_step, is_scheduled=true

%region_add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_slice (param_0: f32[10,1000], param_1: s32[]) -> f32[1000] {
  %param_0 = f32[10,1000]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %row = f32[1,1000]{1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,1000}
  ROOT %flat = f32[1000]{0:T(1024)S(1)} reshape(%row)
}

%body (state: (s32[], f32[1000], f32[10,1000])) -> (s32[], f32[1000], f32[10,1000]) {
  %state = (s32[]{:T(128)}, f32[1000]{0:T(1024)S(1)}, /*index=2*/f32[10,1000]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %w = f32[1000]{0:T(1024)S(1)} get-tuple-element(%state), index=1
  %data = f32[10,1000]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %row = f32[1000]{0:T(1024)S(1)} fusion(%data, %i), kind=kLoop, calls=%fused_slice
  %both = (f32[1000]{0:T(1024)S(1)}, f32[10]{0:T(128)S(1)}) all-reduce(%row, %w), replica_groups=mesh['x'=2,'y'=8] {'y'}
  %sent = f32[1000]{0:T(1024)S(1)} get-tuple-element(%both), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, f32[1000]{0:T(1024)S(1)}, f32[10,1000]{1,0:T(8,128)}) tuple(%next, %sent, %data)
}

%condition (state.1: (s32[], f32[1000], f32[10,1000])) -> pred[] {
  %bound = s32[]{:T(128)} constant(10)
  %state.1 = (s32[]{:T(128)}, f32[1000]{0:T(1024)S(1)}, f32[10,1000]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (w.1: f32[1000], data.1: f32[10,1000]) -> f32[1000] {
  %w.1 = f32[1000]{0:T(1024)} parameter(0)
  %data.1 = f32[10,1000]{1,0:T(8,128)} parameter(1)
  %start = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0:T(1024)}, u32[]{:S(2)}) copy-start(%w.1)
  %fast = f32[1000]{0:T(1024)S(1)} copy-done(%start)
  %zero.1 = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, f32[1000]{0:T(1024)S(1)}, f32[10,1000]{1,0:T(8,128)}) tuple(%zero.1, %fast, %data.1)
  %loop = (s32[], f32[1000]{0:T(1024)S(1)}, f32[10,1000]{1,0}) while(%first), condition=%condition, body=%body
  %told = () custom-call(%zero.1), custom_call_target="xla_ffi_python_cpu_callback", api_version=API_VERSION_TYPED_FFI
  ROOT %last = f32[1000]{0:T(1024)} copy(%fast)
}
"""


def test_what_a_tpus_program_does_is_read_of_its_text():
    found = hlo.read(LOOP, 16)
    counters = 10 * (4 + 4 + 4 + 1 + 4 + 4)  # the operands of a slice, an addition and a comparison
    assert found.bytes == pytest.approx(4 * 1000 + 10 * 4 * 1000 + 4 * 1000, abs=2 * counters)
    assert found.collectives == [Collective("all-reduce", 4 * 1010, 2, 8, 10.0)]
    assert found.callbacks == 1


def test_a_loop_that_does_not_count_up_to_a_constant_counts_once():
    once = LOOP.replace("direction=LT", "direction=NE")
    assert [each.times for each in hlo.read(once, 16).collectives] == [1]
    assert [
        each.times
        for each in hlo.read(once.replace("body=%body", 'body=%body, known_trip_count":{"n":"7"}'), 16).collectives
    ] == [7]


def test_of_a_condition_the_branch_that_moves_most_counts():
    big = jnp.zeros((1000, 1000))
    text = compiled(lambda p, x: lax.cond(p, lambda x: x * 2 + x.T, lambda x: x, x), True, big)
    swapped = re.sub(r"branch_computations=\{(%[\w.]+), (%[\w.]+)\}", r"branch_computations={\2, \1}", text)
    assert swapped != text
    assert hlo.read(text, 1).bytes == hlo.read(swapped, 1).bytes >= 2 * 4e6


# As libtpu writes asynchronous operations: as starts and ends, and as three fusions of one channel.
ASYNCHRONOUS = """HloModule jit_step, input_output_alias={ {0}: (1, {}, may-alias) }, num_partitions=16

%fused_start (p.0: f32[1000]) -> f32[4000] {
  %p.0 = f32[1000]{0:T(1024)S(1)} parameter(0)
  ROOT %g.0 = f32[4000]{0:T(1024)S(1)} all-gather(%p.0), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
}

%fused_end (p.1: f32[1000]) -> f32[4000] {
  %p.1 = f32[1000]{0:T(1024)S(1)} parameter(0)
  ROOT %g.1 = f32[4000]{0:T(1024)S(1)} all-gather(%p.1), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
}

%all-reduce-scatter.3 (p.2: f32[4000]) -> f32[1000] {
  %p.2 = f32[4000]{0:T(1024)S(1)} parameter(0)
  %s.2 = f32[4000]{0:T(1024)S(1)} all-reduce(%p.2), channel_id=8, replica_groups=[4,4]<=[16]
  ROOT %r.2 = f32[1000]{0:T(1024)S(1)} slice(%s.2), slice={[0:1000]}
}

ENTRY %main (a: f32[1000], b: f32[500]) -> f32[500] {
  %a = f32[1000]{0:T(1024)S(1)} parameter(0)
  %b = f32[500]{0:T(512)S(1)} parameter(1)
  %gather.s = f32[4000]{0:T(1024)S(1)} fusion(%a), kind=kCustom, calls=%fused_start
  %gather.e = f32[4000]{0:T(1024)S(1)} fusion(%a), kind=kCustom, calls=%fused_end
  %kept = f32[1000]{0:T(1024)S(1)} fusion(%gather.e), kind=kCustom, calls=%all-reduce-scatter.3
  %sum.s = f32[1000]{0:T(1024)S(1)} all-reduce-start(%kept), channel_id=1, replica_groups={}
  %sum.d = f32[1000]{0:T(1024)S(1)} all-reduce-done(%sum.s)
  %all.s = (f32[1000]{0:S(1)}, f32[4000]{0}) all-gather-start(%sum.d), channel_id=1, replica_groups={}
  %all.d = f32[4000]{0:T(1024)} all-gather-done(%all.s)
  %turn.s = (f32[500]{0:S(1)}, f32[500]{0:S(1)}) collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}
  ROOT %turn.d = f32[500]{0:T(512)S(1)} collective-permute-done(%turn.s)
}
"""


def test_asynchronous_operations_count_once_with_their_results():
    found = hlo.read(ASYNCHRONOUS, 16)
    assert [each[:4] for each in found.collectives] == [
        ("all-gather", 16000, 1, 4),
        ("reduce-scatter", 4000, 1, 4),
        ("all-reduce", 4000, 1, 16),
        ("all-gather", 16000, 1, 16),
        ("collective-permute", 2000, 1, 2),
    ]
    assert found.bytes == 16000  # the only array that is not in fast memory
    assert found.in_place == 2000


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("[8,2]<=[2,8]T(1,0)", 2),
        ("{}", 16),
        ("mesh['seed'=2,'data'=8] {'data'}", 8),
        ("mesh['seed'=2,'data'=8] {'seed','data'}", 16),
        ("mesh['seed'=2,'data'=8] {'data':(2)4}", 4),
    ],
)
def test_who_takes_part_is_read_in_every_notation(groups, devices):
    text = LOOP.replace("mesh['x'=2,'y'=8] {'y'}", groups)
    assert [each.devices for each in hlo.read(text, 16).collectives] == [devices]


def test_collectives_of_a_program_on_eight_devices():
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(np.ones((16, 4), np.float32), NamedSharding(mesh, PartitionSpec("data")))
    found = hlo.read(
        compiled(lambda x: lax.scan(lambda c, _: (c + (x * c).sum(0), None), x[0], None, length=3)[0], x), 8
    )
    inside = [each for each in found.collectives if each.times == 3]
    assert [(each.kind, each.devices) for each in inside] == [("all-reduce", 8)]


@pytest.mark.parametrize(
    ("name", "chips"),
    [("v5e:1x1", 1), ("v5e:4x4", 16), ("v6e:16x16", 256), ("v4:2x2x1", 4), ("v5p:16x16x16", 4096), ("h100:8", 8)],
)
def test_slices(name, chips):
    assert slice_of(name).chips == chips


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:4x4", r"^--plan v9:4x4, expected a slice such as v5e:4x4; the chips are v4, v5e, v5p, v6e, h100$"),
        ("v5e", r"^--plan v5e, expected v5e: and one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16$"),
        ("v5e:3x5", r"^--plan v5e:3x5, expected v5e: and one of 1x1, "),
        ("v4:32x32x32", r"^--plan v4:32x32x32, expected v4: and one of 2x2x1, .*4x4x4, .*16x16x16"),
        ("", r"^--plan , expected a slice such as v5e:4x4"),
    ],
)
def test_a_slice_that_does_not_exist_is_answered_with_those_that_do(name, said):
    with pytest.raises(InputError, match=said):
        slice_of(name)


def test_the_time_of_an_all_reduce():
    """16 chips of v5e in a plane without wrap-around: each link sends 50 GB/s, and the far corner is 6 hops away."""
    where, size = slice_of("v5e:4x4"), 1e8
    one = lambda kind, n=16: seconds(Collective(kind, size, 1, n, 1), where)
    assert one("all-reduce") == pytest.approx(2 * 15 / 16 * size / (2 * 50e9) + 2 * 6 * HOP)
    assert one("all-reduce") == pytest.approx(
        one("all-gather") + seconds(Collective("reduce-scatter", size / 16, 1, 16, 1), where)
    )
    assert one("all-reduce", 4) == pytest.approx(2 * 3 / 4 * size / 50e9 + 2 * 3 * HOP)  # along one axis
    assert one("all-reduce", 1) == 0
    torus = lambda n, name="v5e:16x16": seconds(Collective("all-reduce", size, 1, n, 1), slice_of(name))
    assert torus(256) == pytest.approx(2 * 255 / 256 * size / (4 * 50e9) + 2 * 16 * HOP)
    assert torus(128) == pytest.approx(2 * 127 / 128 * size / (3 * 50e9) + 2 * (8 + 7) * HOP)  # 16 joined, and 8 not
    assert torus(128, "v5e:8x16") == torus(128)
    assert torus(16) == pytest.approx(2 * 15 / 16 * size / (2 * 50e9) + 2 * 8 * HOP)
    assert torus(255) == pytest.approx(torus(256), rel=1e-3)
    cube = 2 * 63 / 64 * size / (6 * 100e9) + 2 * 6 * HOP
    assert torus(64, "v5p:4x4x4") == pytest.approx(cube)
    assert torus(8, "v5p:2x2x2") == pytest.approx(2 * 7 / 8 * size / (3 * 100e9) + 2 * 3 * HOP)


def test_bounds_are_times_of_a_step_and_the_longest_binds():
    where = slice_of("v5e:4x4")
    found = bounds(
        where, flops=197e12, moved=819e9 / 2, sent=[Collective("all-reduce", 1e8, 1, 16, 10)], steps=10, reading=4
    )
    assert found[:2] == pytest.approx((0.1, 0.05))
    assert found.ici == pytest.approx(2 * 15 / 16 * 1e8 / 100e9 + 12e-6)
    assert found[3:] == pytest.approx((CALL / 10, 0.4))
    assert (found.binding, found.steps_per_second) == ("input", 2.5)


def test_from_which_batch_chips_are_worth_it():
    least = Bounds(mxu=1e-6, hbm=1e-6, ici=7.7e-6, host=1e-6, input=0)
    assert worthwhile_batch(least, 100, 16) == 784  # 770 rows, of which 16 chips take equal parts
    assert worthwhile_batch(least._replace(mxu=0), 100, 16) is None


def test_each_chip_has_the_published_balance():
    """Operations per byte of memory, from the sources named in `chips`."""
    assert {kind: round(chip.flops / chip.hbm_rate) for kind, chip in CHIPS.items()} == {
        "v4": 229,
        "v5e": 241,
        "v5p": 166,
        "v6e": 560,
        "h100": 148,
    }


def row_on_cpus(program: Program) -> tuple[Row, Cost, Loop]:
    """What is read of a program that is compiled for the eight simulated devices."""
    row = row_of(program, program.traced.lower(lowering_platforms=("cpu",)), slice_of("v5e:2x4"), hosts=1)
    assert row.cost
    assert row.loop
    return row, row.cost, row.loop


def row_of_a_fit(stream, seeds: int) -> tuple[Row, Cost, Loop]:
    """The row of a fit of an MLP 784-300-10."""
    model, keys, tx = MLP((300,), classes=10), jax.random.split(jax.random.key(0), seeds), optax.adam(1e-3)
    state, step = start(model, tx, keys, keys, jnp.zeros((1, 28, 28, 1))), make_step(classify.loss(model.apply), tx)
    programs: list[Program] = []
    with planning(Target(jax.devices(), 1e9, programs.append)):
        assert fit(per_seed(step), state, stream, steps=10, every=10) is state
    return row_on_cpus(*programs)


def hand_count(rows: int) -> float:
    return 2 * (2 * rows * (784 * 300 + 300 * 10)) + 2 * rows * 300 * 10


SAMPLES = {"image": np.zeros((64, 28, 28, 1), np.float32), "label": np.zeros(64, np.int32)}
PARAMS = 784 * 300 + 300 + 300 * 10 + 10


def test_the_row_of_a_fit_that_splits_its_rows():
    row, cost, loop = row_of_a_fit(data.shuffled(SAMPLES, 40, [0]), 1)
    assert (row.mesh, row.uneven, row.refused) == ((1, 8), False, None)
    assert cost.flops == hand_count(40 // 8)
    assert {each.kind for each in cost.collectives} == {"all-reduce"}
    assert sum(each.bytes for each in cost.collectives) == pytest.approx(4 * PARAMS, abs=100)  # and the metrics
    assert cost.memory["arguments"] == pytest.approx(4 * (3 * PARAMS + 5 * 785), abs=100)  # and counters
    assert loop[:3] == (1, 40, 1.0)
    assert (loop.worthwhile_batch or 1) % 8 == 0


def test_the_row_of_a_fit_that_splits_its_seeds():
    row, cost, loop = row_of_a_fit(data.shuffled(SAMPLES, 40, range(8)), 8)
    assert row.mesh == (8, 1)
    assert (cost.flops, cost.collectives, loop.in_place) == (hand_count(40), [], 1.0)


def test_every_device_computes_all_of_the_batches_of_a_plain_function():
    batch = {name: column[None, :40] for name, column in SAMPLES.items()}
    row, cost, loop = row_of_a_fit(lambda i: batch, 1)
    assert row.mesh == (1, 8)
    assert cost.flops == hand_count(40)
    assert (loop.batch_size, loop.worthwhile_batch) == (None, None)


def test_what_is_not_updated_in_place_is_seen():
    mesh = data_mesh()
    params = {"kept": jnp.zeros(3000), "other": jnp.zeros(1000)}
    state = State(jnp.int32(0), params, {}, (), jax.random.key(0))
    state = abstract(state, states_over(state, mesh, None))
    narrow = lambda params: {"kept": params["kept"] + 1, "other": params["other"].astype(jnp.int16)}
    advance = jax.jit(lambda s: s._replace(step=s.step + 1, params=narrow(s.params)), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX says the same
        _, _, loop = row_on_cpus(Program("fit", advance.trace(state), mesh, Feed(1, None, 0.0, state)))
    assert loop.in_place == 3003 / 4003  # with the step and the key


def test_a_plan_of_an_unknown_slice_ends_with_status_2():
    command = [sys.executable, "experiments/vision/lenet.py", "--preset", "smoke", "--plan", "v5e:9x9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: --plan v5e:9x9, expected v5e: and one of [\dx, ]*16x16\n", done.stderr)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h100:8", "cuda")])
def test_without_the_compiler_the_extra_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=rf"^--plan {name} needs .*, which is not installed; pip install -e '.\[{extra}\]'$"
    ):
        devices_of(slice_of(name))


def test_the_text_of_a_row():
    least = Bounds(mxu=1e-7, hbm=2e-5, ici=3e-5, host=1.5e-5, input=1e-5)
    sent = [Collective("all-reduce", 5e6, 8, 16, 50), Collective("all-gather", 1e6, 1, 4, 100)]
    cost = Cost(
        {"arguments": 14_000_000, "program": 2_000_000},
        flops=50 * 22.5e6,
        bytes=50 * 9.67e6,
        collectives=sent,
        callbacks=0,
    )
    loop = Loop(steps=50, batch_size=64, in_place=1.0, bounds=least, worthwhile_batch=19_200)
    row = Row("dense", (1, 12), uneven=True, compile_seconds=2.4, cost=cost, loop=loop)
    assert (
        "\n".join(lines(row, slice_of("v5e:4x4")))
        == """
dense: 1 x 12 (seeds x rows) on 12 of 16 chips, 4 stand idle, 50 steps a call; compiled in 2 s
  as a run    it is refused: the batch has no equal part for each host; change --batch-size or --seeds
  memory      16.0 of 16,911 MB a chip (0.1%): arguments 14.0, program 2.0
  a step      22.5 MFLOP and 9.67 MB a chip; 1 all-reduce of 5.00 MB over 16 chips; 2 all-gather of 2.00 MB over 4 chips
  otherwise   100.0% of the state updated in place, no callbacks of the host
  at least    MXU 0.1, HBM 20.0, ICI 30.0, host loop 15.0, input 10.0 us -> ICI binds, at most 33,333 steps/s
  worth it    from a batch of 19,200 rows (here 64)"""
    )
    assert "NVLink binds" in "\n".join(lines(row, slice_of("h100:8")))
    refused = row._replace(refused="out of memory", cost=None, loop=None, uneven=False)
    assert list(lines(refused, slice_of("v5e:4x4")))[1:] == ["  refused     out of memory"]
    evaluation = list(lines(row._replace(loop=None), slice_of("v5e:4x4")))
    assert evaluation[-2].startswith("  a batch     1,125.0 MFLOP and 483.50 MB a chip; 50 all-reduce of 250.00 MB")


@pytest.mark.parametrize(
    "flags",
    [
        {"cluster": True},
        {"process_id": 0},
        {"processes": 2},
        {"coordinator": "a:1"},
        {"restart": True},
        {"profile": "1..2"},
    ],
)
def test_a_plan_refuses_what_belongs_to_a_run(flags):
    check_common(Common(plan="v5e:4x4", workdir="runs/a"))
    with pytest.raises(InputError, match=rf"^--{next(iter(flags)).replace('_', '-')} is given with --plan, "):
        check_common(Common(plan="v5e:4x4", workdir="runs/a", **flags))
