"""Checkpoints: exact round trips, damage, kills, full disks, other devices, retention, and the format of release 1.

`python tests/unit/test_checkpoint.py` writes golden/checkpoint-v1 anew; do so only for a new schema, in a new folder.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dl_jax.core import files as core_files
from dl_jax.core import leaves
from dl_jax.core.errors import InputError, Unavailable
from dl_jax.harness.checkpoint import files as checkpoint_files
from dl_jax.harness.checkpoint import store
from dl_jax.harness.checkpoint.store import Checkpoints, best_step, load

GOLDEN = Path(__file__).parent / "golden" / "checkpoint-v1"
ROOT = Path(__file__).parents[2]


class State(NamedTuple):
    step: Any
    params: Any
    extra: Any
    opt_state: Any
    key: Any


def state(step: int) -> State:
    """A state whose every number follows from `step`."""
    fill = lambda *shape: jnp.asarray(np.random.default_rng([step, *shape]).normal(size=shape), jnp.float32)
    params = {"Dense_0": {"kernel": fill(20, 15), "bias": fill(15)}, "Dense_1": {"kernel": fill(15, 3)}}
    tx = optax.chain(optax.clip(1.0), optax.adam(1e-3))  # holds EmptyStates
    _, opt_state = tx.update(params, tx.init(params))
    extra = {"ema": params["Dense_0"]["bias"].astype(jnp.bfloat16), "mask": fill(7) > 0, "none": None, "empty": {}}
    return State(jnp.asarray(step, jnp.int32), params, extra, opt_state, jax.random.fold_in(jax.random.key(1), step))


def same(a: Any, b: Any) -> None:
    """Structure, types and bits agree."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        raw = lambda v: np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v)
        assert raw(x).tobytes() == raw(y).tobytes()


@contextlib.contextmanager
def opened(directory: Path, **options: Any) -> Iterator[Checkpoints]:
    with contextlib.closing(Checkpoints(str(directory), **options)) as checkpoints:
        yield checkpoints


def write(directory: Path, *steps: int, **options: Any) -> None:
    with opened(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))


def on_disk(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------------------------------------------- round trips


def test_a_state_comes_back_bit_for_bit(tmp_path):
    assert Checkpoints(str(tmp_path / "new" / "checkpoints")).restore(state(0)) is None
    write(tmp_path, 3, 7)
    with opened(tmp_path) as checkpoints:
        step, found, _ = checkpoints.restore(state(0))
        assert step == 7
        same(found, state(7))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
        same(checkpoints.restore(abstract)[1], state(7))
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
        same(checkpoints.restore(bare)[1], state(7))


def test_a_mode_that_is_neither_min_nor_max(tmp_path):
    with pytest.raises(InputError, match=r"^best is \('error', 'minimum'\), expected .* 'min' or 'max'"):
        Checkpoints(str(tmp_path), best=("error", "minimum"))  # type: ignore[arg-type]


EMPTY = np.zeros((0, 3), np.float32)


@pytest.mark.parametrize(("tree", "plain"), [({}, {}), ({"a": None, "b": []}, {}), ({"nothing": EMPTY},) * 2])
def test_a_tree_without_a_filled_leaf_is_saved_and_restored(tmp_path, tree, plain):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        step, found, _ = checkpoints.restore(tree)
    assert step == 1
    same(found, tree)
    same(load(str(tmp_path))[1], plain)


DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn"]
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
KEYS = st.text("ab./%~ é0", min_size=1, max_size=4)
ARRAYS = st.builds(lambda shape, dtype, kind: (shape, dtype, kind), SHAPES, st.sampled_from(DTYPES), st.booleans())
TREES = st.recursive(
    ARRAYS.map(lambda a: ("array", *a)),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.just(None),
        st.builds(lambda a, b: optax.ScaleByScheduleState((a, b)), inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=15, deadline=None)
@given(drawn=TREES, seed=st.integers(0, 9))
def test_any_tree_of_arrays_comes_back(tmp_path_factory, drawn, seed):
    rng = np.random.default_rng(seed)

    def build(node):
        _, shape, dtype, on_device = node
        values = rng.integers(0, 2**8, size=(*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
        values = (values[..., 0] % 2 == 0) if dtype == "bool" else values.view(np.dtype(dtype))[..., 0]
        return jnp.asarray(values) if on_device else values

    is_array = lambda node: isinstance(node, tuple) and node[:1] == ("array",)
    tree = {"tree": jax.tree.map(build, drawn, is_leaf=is_array)}
    like = jax.tree.map(lambda x: jnp.zeros_like(x) if isinstance(x, jax.Array) else np.zeros_like(x), tree)
    with opened(tmp_path_factory.mktemp("tree")) as checkpoints:
        checkpoints.save(seed, tree)
        step, found, _ = checkpoints.restore(like)
    assert step == seed
    same(found, jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), tree))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_typed_keys_keep_their_implementation(tmp_path, implementation):
    tree = {"one": jax.random.key(5, impl=implementation), "many": jax.random.split(jax.random.key(6), (2, 3))}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        _, found, _ = checkpoints.restore(jax.eval_shape(lambda: tree))
        same(found, tree)
        assert jax.random.key_impl(found["one"]) == implementation
        other = {**tree, "one": jax.random.key(5, impl="unsafe_rbg")}
        with pytest.raises(InputError, match=rf"one: checkpoint key<{implementation}> \(\d,\), model key<unsafe_rbg> "):
            checkpoints.restore(other)


def test_donated_and_overwritten_buffers_do_not_reach_the_disk(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with opened(tmp_path, keep=9) as checkpoints:
        for step in range(9):
            tree = {"device": jnp.full((256, 512), step, jnp.float32), "host": np.full(1000, step)}
            checkpoints.save(step, tree)
            tree["device"] = overwrite(tree["device"])
            tree["host"] += 1
    for step in range(9):
        _, found = load(str(tmp_path), step)
        assert (found["device"] == step).all()
        assert (found["host"] == step).all()


def test_load_needs_no_model_and_writes_nothing(tmp_path):
    write(tmp_path, 3, 7)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    step, found = load(str(tmp_path))
    assert step == 7
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    expected = state(7)
    same(found["params"], jax.tree.map(np.asarray, expected.params))
    same(found["opt_state"]["1"]["0"]["mu"], jax.tree.map(np.asarray, expected.opt_state[1][0].mu))
    assert set(found) == {"step", "params", "extra", "opt_state", "key"}
    assert set(found["extra"]) == {"ema", "mask"}
    np.testing.assert_array_equal(found["key"], jax.random.key_data(expected.key))
    assert load(str(tmp_path), 3)[1]["step"] == 3
    with pytest.raises(InputError, match=rf"{tmp_path} has no checkpoint 5; it has \[7, 3\]"):
        load(str(tmp_path), 5)
    with pytest.raises(InputError, match=r"no valid checkpoint in .*nowhere \(there is none at all\)"):
        load(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_leaf_that_is_no_array_is_named(tmp_path):
    with opened(tmp_path) as checkpoints, pytest.raises(TypeError, match="leaf a/0 is a float"):
        checkpoints.save(1, {"a": [0.5]})


# --------------------------------------------------------------------------------------------------- other devices


def on_mesh(count: int, *axes: str | None) -> NamedSharding:
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    return NamedSharding(mesh, PartitionSpec(*axes))


def test_a_state_of_eight_devices_is_restored_on_two_and_on_one(tmp_path):
    rows, keys = np.arange(64, dtype=np.float32).reshape(16, 4), jax.random.split(jax.random.key(0), 8)

    def tree(count, fill):
        return {
            "rows": jax.device_put(rows * fill, on_mesh(count, "data")),
            "columns": jax.device_put(rows * fill, on_mesh(count, None)),
            "keys": jax.device_put(keys, on_mesh(count, "data")),
            "host": rows * fill,
        }

    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, tree(8, 1))
        for count in (2, 1, 4):
            like = tree(count, 0)
            _, found, _ = checkpoints.restore(like)
            same(found, tree(count, 1))
            assert all(found[name].sharding == like[name].sharding for name in ("rows", "columns", "keys"))


def test_copies_on_many_devices_are_sliced_only_where_it_is_worth_a_program(tmp_path, compilations):
    """Each device writes a part of a large array, which takes a program for each shape; one writes a small array."""
    numbers = np.arange(8 * checkpoint_files.WORTH_SLICING // 4, dtype=np.int32)
    with opened(tmp_path) as checkpoints:
        for step, rows, sliced in ((1, numbers[:800], False), (2, numbers, True)):
            tree = {"copied": jax.device_put(rows.reshape(8, -1), on_mesh(8, None))}
            jax.block_until_ready(tree)
            compilations.clear()
            checkpoints.save(step, tree)
            checkpoints.wait()
            assert bool(compilations) == sliced
            _, found, _ = checkpoints.restore(tree)
            same(found, tree)


def test_restored_leaves_are_as_free_to_move_as_the_model_s(tmp_path):
    free, bound = jnp.ones(3), jax.device_put(jnp.ones(3), jax.devices()[5])
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"free": free, "bound": bound})
        _, found, _ = checkpoints.restore({"free": free, "bound": bound})
    assert not found["free"].committed
    assert found["bound"].committed
    assert found["bound"].devices() == {jax.devices()[5]}


# ---------------------------------------------------------------------------------------------------------- shards

SPLITS = [  # devices, and over which axes of a mesh [2, devices / 2] the two axes of an array are split
    (8, None, None),
    (8, "b", None),
    (8, None, "b"),
    (8, "a", "b"),
    (8, ("a", "b"), None),
    (4, "b", "a"),
    (2, "a", None),
]


def split_over(count: int, *axes: Any) -> NamedSharding:
    mesh = jax.make_mesh((2, count // 2), ("a", "b"), (AxisType.Auto,) * 2, devices=jax.devices()[:count])
    return NamedSharding(mesh, PartitionSpec(*axes))


def laid(split: tuple[Any, ...], fill: int = 1) -> dict[str, jax.Array]:
    """A large array, one of few numbers, one without any, and keys."""
    sharding = split_over(*split)
    large = np.random.default_rng(0).integers(0, 2**32, (64, 512), np.uint32)
    tree = {"large": large, "small": (large[:8, :8] % 99).astype(np.float16), "none": large[:, :0], "bare": large[0, 0]}
    lies = {name: sharding if array.ndim == 2 else split_over(split[0]) for name, array in tree.items()}
    keys = jax.random.split(jax.random.key(0), 8)
    placed = {name: jax.device_put(array * fill, lies[name]) for name, array in tree.items()}
    return {**placed, "keys": jax.device_put(keys, split_over(split[0], split[1]))}


def test_a_state_is_restored_with_another_sharding(tmp_path):
    trees, models = [laid(split) for split in SPLITS], [laid(split, 0) for split in SPLITS]
    for i, saved in enumerate(trees):
        with opened(tmp_path / str(i)) as checkpoints:
            checkpoints.save(1, saved)
            for tree, like in zip(trees, models, strict=True):
                _, found, _ = checkpoints.restore(like)
                same(found, tree)
                assert all(found[name].sharding == leaf.sharding for name, leaf in like.items())
        same(load(str(tmp_path / str(i)))[1]["large"], np.asarray(saved["large"]))


def test_each_shard_has_a_digest(tmp_path):
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jax.device_put(values, split_over(4, "b", "a")), "y": jnp.ones(3)})
    meta = checkpoint_files.metas(epath.Path(tmp_path))[1]
    crcs = [zlib.crc32(values[i : i + 4, j : j + 4].tobytes()) for i in (0, 4) for j in (0, 4)]
    assert meta["blocks"] == {"x": [[4, 4], crcs]}
    assert meta["leaves"] == {
        "x": [None, [8, 8], "float32"],
        "y": [zlib.crc32(np.ones(3, np.float32).tobytes()), [3], "float32"],
    }
    assert meta["schema"] == 1


def test_a_split_leaf_without_digests_is_restored(tmp_path):
    """As it was saved before there was a digest for each shard."""
    tree = laid(SPLITS[3])
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
    path = tmp_path / "1" / "meta" / "metadata"
    meta = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("blocks", "crc32")}
    path.write_text(json.dumps(checkpoint_files.sealed(meta)))
    with opened(tmp_path) as checkpoints:
        same(checkpoints.restore(laid(SPLITS[1], 0))[1], laid(SPLITS[1]))
        checkpoints.save(1, laid(SPLITS[3]))  # is written again, now with digests
        checkpoints.wait()
    assert checkpoint_files.metas(epath.Path(tmp_path))[1]["blocks"].keys() == {"large", "small", "keys"}


def test_a_flipped_bit_in_a_shard_is_seen_by_whoever_needs_the_shard(tmp_path):
    values = np.asarray(laid(SPLITS[0])["large"])  # too random to compress
    with opened(tmp_path) as checkpoints:
        for step in (3, 7):
            checkpoints.save(step, laid(SPLITS[3]))
    shard = values[32:, 128:256].tobytes()
    (path,) = [p for p in (tmp_path / "7").rglob("*") if p.is_file() and shard[:64] in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(shard[:64]) + 5000] ^= 1
    path.write_bytes(data)
    root = epath.Path(tmp_path)
    meta = checkpoint_files.read_meta(root, 7)
    wanted = {name: {tuple((0, n) for n in leaf[1])} for name, leaf in meta["leaves"].items()}
    for box, damaged in [
        (((0, 32), (0, 512)), False),
        (((32, 64), (0, 128)), False),
        (((32, 64), (256, 512)), False),
        (((32, 33), (255, 256)), True),
        (((31, 33), (120, 130)), True),
        (((0, 64), (0, 512)), True),
    ]:
        if damaged:
            with pytest.raises(checkpoint_files.Damaged, match=r"^large does not match its digest"):
                checkpoint_files.read_parts(root, meta, {**wanted, "large": {box}})
        else:
            found = checkpoint_files.read_parts(root, meta, {**wanted, "large": {box}})["large"][box]
            np.testing.assert_array_equal(found, values[tuple(slice(*each) for each in box)])
    with opened(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="/7: large does not match its digest"):
            step, found, _ = checkpoints.restore(laid(SPLITS[2], 0))
        assert step == 3
        same(found, laid(SPLITS[2]))


def test_only_the_blocks_that_a_process_needs_are_read_and_each_once(tmp_path, monkeypatch):
    values, reads, real = np.arange(4096).reshape(64, 64), [], tensorstore.open

    class Watched(NamedTuple):
        store: Any

        def result(self):
            return self if hasattr(self.store, "domain") else Watched(self.store.result())

        def __getitem__(self, index):
            return Watched(self.store[index])

        def read(self):
            reads.append(tuple((i.inclusive_min, i.exclusive_max) for i in self.store.domain))
            return self.store.read()

    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jax.device_put(values, split_over(8, "b", "a"))})  # blocks [16, 32]
    monkeypatch.setattr(tensorstore, "open", lambda *given, **options: Watched(real(*given, **options)))
    root = epath.Path(tmp_path)
    meta = checkpoint_files.read_meta(root, 1)
    quarter, across = ((32, 48), (0, 64)), ((10, 20), (5, 6))
    found = checkpoint_files.read_parts(root, meta, {"x": {quarter, across}})["x"]
    np.testing.assert_array_equal(found[quarter], values[32:48])
    np.testing.assert_array_equal(found[across], values[10:20, 5:6])
    assert sorted(reads) == [((0, 16), (0, 32)), ((16, 32), (0, 32)), ((32, 48), (0, 32)), ((32, 48), (32, 64))]


@given(
    grid=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=3), chosen=st.randoms(use_true_random=False)
)
def test_blocks_are_numbered_in_c_order(grid, chosen):
    block, shape = tuple(size for _, size in grid), tuple(count * size for count, size in grid)
    places = np.arange(np.prod([count for count, _ in grid], dtype=int)).reshape([count for count, _ in grid])
    number = np.kron(places, np.ones(block, int)) if grid else places
    box = tuple(sorted(chosen.sample(range(n + 1), 2)) for n in shape)
    blocks = list(leaves.blocks_in(tuple((start, stop) for start, stop in box), block))
    found = [leaves.number_of(each, shape, block) for each in blocks]
    assert found == sorted(set(number[tuple(slice(*each) for each in box)].ravel().tolist()))


def test_what_the_processes_of_a_run_tell_each_other():
    words = lambda held: json.dumps({"w": held})
    assert store._merged([words([[2, 7], [0, 5]]), words([[1, 6], [2, 7]])]) == ({"w": [5, 6, 7]}, "")
    assert store._merged([words([[0, 5]]), words([[0, 4]])]) == ({}, "block 0 of w on process 1 and on one before it")
    valid, other = store.Outcome(meta=1), store.Outcome(meta=2)
    damaged, lost = store.Outcome(1, "Damaged", "w"), store.Outcome(None, "Damaged", "metadata is missing")
    busy, foreign = store.Outcome(1, "Unavailable", "busy"), store.Outcome(1, "InputError", "foreign")
    for outcomes, failure, why in [
        ([valid, valid], "", ""),
        ([valid, damaged, valid], "Damaged", "w"),
        ([lost, lost], "Damaged", "metadata is missing"),
        ([lost, valid], "Damaged", "metadata is missing"),
        ([damaged, busy], "Unavailable", "busy"),
        ([busy, foreign], "InputError", "foreign"),
        ([valid, lost], "InputError", "process 1 cannot read a/1 as process 0 does (metadata is missing); give a"),
        ([valid, other], "InputError", "process 1 cannot read a/1 as process 0 does (another file); give a"),
    ]:
        found = store._worst(outcomes, "a/1")
        assert found[0] == failure
        assert found[1].startswith(why)


# ----------------------------------------------------------------------------------------------- what does not fit


def test_another_architecture_names_the_leaves_and_deletes_nothing(tmp_path):
    write(tmp_path, 2)
    other = state(2)
    other.params["Dense_0"]["kernel"] = jnp.zeros((20, 10))
    other.params["new.name"] = jnp.zeros(1)
    other.extra["ema"] = other.extra["ema"].astype(jnp.float32)
    del other.params["Dense_1"]
    with opened(tmp_path) as checkpoints:
        with pytest.raises(InputError) as error:
            checkpoints.restore(other)
        assert str(error.value) == (
            f"checkpoint {tmp_path}/2 does not fit this model (4 differences): "
            "extra/ema: checkpoint bfloat16 (15,), model float32 (15,); "
            "params/Dense_0/kernel: checkpoint (20, 15), model (20, 10); "
            "params/Dense_1/kernel: in the checkpoint, not in the model; "
            "params/new.name: in the model, not in the checkpoint; "
            "use another --workdir or the config and seeds it was written with"
        )
        del other.params["Dense_0"]
        with pytest.raises(InputError, match=r"\(5 differences\): .*; \.\.\.; use another"):
            checkpoints.restore(other)
        same(checkpoints.restore(state(0))[1], state(2))


def test_a_newer_schema_is_refused_not_skipped(tmp_path):
    write(tmp_path, 1, 2)
    path = tmp_path / "2" / "meta" / "metadata"
    meta = {**json.loads(path.read_text()), "schema": 2}
    path.write_text(json.dumps(checkpoint_files.sealed({k: v for k, v in meta.items() if k != "crc32"})))
    with opened(tmp_path) as checkpoints, pytest.raises(InputError, match="2 has schema 2, and this dl_jax reads 1"):
        checkpoints.restore(state(0))


# --------------------------------------------------------------------------------------------- what stays, the best


@pytest.mark.parametrize(
    ("end", "values", "kept", "best"),
    [
        ("max", [0.1, 0.9, 0.5, 0.2], ["2", "3", "4"], 2),
        ("min", [0.3, 0.1, 0.2, 0.1], ["3", "4"], 4),  # the newest of equals
        ("max", [0.1, float("nan"), 0.0, 0.0], ["1", "3", "4"], 1),
        ("max", [0.1, float("inf"), 0.0, 0.2], ["3", "4"], 4),
        ("min", [float("nan")] * 4, ["3", "4"], None),
    ],
)
def test_the_latest_and_the_best_stay(tmp_path, end, values, kept, best):
    for steps in ([1, 2], [3, 4]):  # two writers: the second learns from disk
        with opened(tmp_path, best=("score", end)) as checkpoints:
            for step in steps:
                checkpoints.save(step, {"x": jnp.ones(2) * step}, {"score": values[step - 1], "other": 1.0})
    assert on_disk(tmp_path) == kept
    assert best_step(str(tmp_path)) == best
    assert load(str(tmp_path))[0] == 4


def test_a_closed_writer_leaves_no_thread_of_its_own(tmp_path):
    before = set(threading.enumerate())
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)})
        own = [thread for thread in set(threading.enumerate()) - before if "ThreadPoolExecutor" in thread.name]
    assert own
    assert not any(thread.is_alive() for thread in own)


def test_without_a_criterion_only_the_latest_stay(tmp_path):
    with opened(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.ones(2)}, {"score": 1.0})
    assert on_disk(tmp_path) == ["3"]
    assert best_step(str(tmp_path)) is None
    assert best_step(str(tmp_path / "nowhere")) is None


def test_a_save_of_a_step_that_is_there(tmp_path):
    one, other = {"x": jnp.zeros(3)}, {"x": jnp.ones(3)}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, one, {"score": 1.0})
        checkpoints.wait()
        written = (tmp_path / "5" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
        checkpoints.save(5, one)  # says nothing new
        checkpoints.wait()
        assert (tmp_path / "5" / "_CHECKPOINT_METADATA").stat().st_mtime_ns == written
        checkpoints.save(5, one, {"score": 2.0})
        checkpoints.wait()
        assert json.loads((tmp_path / "5" / "meta" / "metadata").read_text())["metrics"] == {"score": 2.0}
        checkpoints.save(5, other)
        checkpoints.wait()
        assert on_disk(tmp_path) == ["5"]
        assert load(str(tmp_path))[1]["x"].all()
    with opened(tmp_path) as checkpoints:
        for step in (4, 5):
            with pytest.raises(InputError, match=rf"holds step 5, and a save of step {step} must be newer"):
                checkpoints.save(step, one)
        checkpoints.restore(one)
        checkpoints.save(5, one)
    assert not load(str(tmp_path), 5)[1]["x"].any()


def test_an_interrupted_replacement_is_undone(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "5").rename(tmp_path / "replaced-5")
    with opened(tmp_path) as checkpoints:
        same(checkpoints.restore(state(0))[1], state(5))
    shutil.copytree(tmp_path / "5", tmp_path / "replaced-5")
    write(tmp_path, 6)
    assert on_disk(tmp_path) == ["5", "6"]


# --------------------------------------------------------------------------------------------------------- damage


def damages(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Ways to spoil a file: what to write in its place, None to remove it."""
    data = path.read_bytes()
    yield "removed", None
    yield "halved", data[: len(data) // 2]
    yield "zeroed", bytes(len(data))
    yield "emptied", b""
    for position in (0, len(data) // 3, 2 * len(data) // 3, len(data) - 1):
        yield f"flipped at {position}", data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


def check_damage(directory: Path, portion: slice) -> None:
    """Every case ends in the current checkpoint or the older one, with the right numbers, by both ways to read."""
    write(directory, 3, 7)
    files = sorted(path for path in (directory / "7").rglob("*") if path.is_file())
    expected = {step: (state(step), load(str(directory), step)[1]) for step in (3, 7)}
    cases = [(path, *case) for path in files for case in damages(path)]
    assert len(cases) > 80
    fallen = set()
    for path, name, data in cases[portion]:
        original = path.read_bytes()
        path.unlink() if data is None else path.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step, found, _ = Checkpoints(str(directory)).restore(state(0))
            loaded_step, loaded = load(str(directory))
        path.write_bytes(original)
        case = f"{path.relative_to(directory)} {name}"
        assert step == loaded_step, case
        same((found, loaded), expected[step])
        told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        assert len(told) == (2 if step == 3 else 0), case
        assert all(f"{directory}/7" in line and "\n" not in line for line in told), case
        fallen |= {path.parent.name} if step == 3 else set()
    assert fallen >= {"meta", "state", "d"}


def test_damage_never_gives_wrong_numbers(tmp_path):
    check_damage(tmp_path, slice(None, None, 5))


@pytest.mark.slow
def test_damage_of_every_file(tmp_path):
    check_damage(tmp_path, slice(None))


def test_a_silent_flip_in_the_array_data_is_seen(tmp_path):
    """The case that Orbax does not notice: the numbers themselves, in the one file that holds them."""
    write(tmp_path, 3, 7)
    values = np.random.default_rng(0).integers(0, 255, 100_000, np.uint8)  # too random to compress
    with opened(tmp_path) as checkpoints:
        checkpoints.restore(state(0))
        checkpoints.save(8, {"values": jnp.asarray(values)})
    (path,) = [p for p in (tmp_path / "8").rglob("*") if p.is_file() and p.stat().st_size > 90_000]
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"no valid checkpoint in .* \(8: values does not match its digest\)"):
        load(str(tmp_path), 8)


def test_a_metric_that_was_changed_on_disk_is_not_believed(tmp_path):
    """The file is still JSON and all arrays are valid: only its own digest tells."""
    write(tmp_path, 3, 7)
    path = tmp_path / "7" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": {"score": 9.0}}))
    with pytest.warns(UserWarning, match=rf"{tmp_path}/7: its metadata are damaged, it does not match its digest"):
        assert load(str(tmp_path))[0] == 3


def test_a_step_that_is_empty_or_another_s_copy_is_skipped(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "9").mkdir()
    shutil.copytree(tmp_path / "3", tmp_path / "8")
    with opened(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="skipped the damaged checkpoint") as caught:
            step, found, _ = checkpoints.restore(state(0))
        assert step == 3
        same(found, state(3))
    assert [str(w.message).split(":")[0] for w in caught] == [
        f"skipped the damaged checkpoint {tmp_path}/{step}" for step in (9, 8)
    ]
    assert "it holds step 3" in str(caught[1].message)


def test_a_run_that_fell_back_saves_over_what_was_damaged(tmp_path):
    write(tmp_path, 10, 20, 30, keep=3)
    for step in (20, 30):
        (tmp_path / str(step) / "state" / "manifest.ocdbt").unlink()
    (tmp_path / "40").mkdir()
    with opened(tmp_path, keep=3) as checkpoints:
        with pytest.warns(UserWarning, match="damaged"):
            assert checkpoints.restore(state(0))[0] == 10
        assert on_disk(tmp_path) == ["10", "20", "30", "40"]  # untouched until there is something newer
        (tmp_path / "40").rmdir()  # by hand, meanwhile
        checkpoints.save(20, state(21))
        checkpoints.wait()
        assert on_disk(tmp_path) == ["10", "20", "damaged-20", "damaged-30"]
        step, found, _ = checkpoints.restore(state(0))
        assert step == 20
        same(found, state(21))
        checkpoints.save(30, state(30))
    assert load(str(tmp_path))[0] == 30


def test_when_all_are_damaged_no_run_begins_beside_them_and_nothing_is_renamed(tmp_path):
    write(tmp_path, 10, 20)
    for step in ("10", "20"):
        (tmp_path / step / "meta" / "metadata").unlink()
    with (
        opened(tmp_path) as checkpoints,
        pytest.warns(UserWarning, match="0: metadata is missing"),
        pytest.raises(InputError, match=r"all 2 checkpoints in .* are damaged.* or give --restart"),
    ):
        checkpoints.restore(state(0))
    assert on_disk(tmp_path) == ["10", "20"]


def test_what_is_set_aside_is_never_overwritten(tmp_path):
    for _ in range(3):
        write(tmp_path, 10, 20)
        (tmp_path / "20" / "meta" / "metadata").write_text("torn")
        with opened(tmp_path) as checkpoints:
            with pytest.warns(UserWarning, match="20: its metadata are damaged"):
                checkpoints.restore(state(0))
            checkpoints.save(30, state(30))
        for step in ("10", "30"):
            shutil.rmtree(tmp_path / step)
    assert on_disk(tmp_path) == ["damaged-20", "damaged-20-2", "damaged-20-3"]


# --------------------------------------------------------------------------------------------------------- unreadable


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(core_files, "PAUSES", (0.01, 0.01))


def unreadable(path: Path) -> None:
    """Puts in place of a file one that every reader is refused with EIO, also one of another language."""
    path.rename(path.with_name(f"{path.name}.aside"))
    path.symlink_to("/proc/self/mem")  # nothing is mapped at its beginning


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("part", ["meta/metadata", "state/manifest.ocdbt", "state/d"])
def test_a_part_that_cannot_be_read_is_no_damage(tmp_path, no_pauses, part):
    write(tmp_path, 10, 20)
    place = tmp_path / "20" / part
    unreadable(next(place.iterdir()) if place.is_dir() else place)
    before = on_disk(tmp_path)
    with (
        opened(tmp_path) as checkpoints,
        pytest.raises(Unavailable, match=r"20 cannot be read \(Input/output error\), tried 3 times"),
    ):
        checkpoints.restore(state(0))
    assert on_disk(tmp_path) == before == ["10", "20"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files")])
def test_a_part_that_can_be_read_later_is_restored(tmp_path, no_pauses, monkeypatch, error):
    write(tmp_path, 10, 20)
    refusals, read_bytes = [error, error], type(epath.Path(tmp_path)).read_bytes

    def refused_twice(path):
        if refusals and path.name == "metadata":
            raise refusals.pop()
        return read_bytes(path)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", refused_twice)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(state(0))[0] == 20


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED"])
def test_a_bucket_that_does_not_answer_is_no_damage(tmp_path, no_pauses, monkeypatch, code):
    write(tmp_path, 10)

    def away(*given, **options):
        raise ValueError(f"{code}: Error reading the bucket")

    monkeypatch.setattr(tensorstore, "open", away)
    with opened(tmp_path) as checkpoints, pytest.raises(Unavailable, match=rf"10 cannot be read \({code}"):
        checkpoints.restore(state(0))
    assert on_disk(tmp_path) == ["10"]


@pytest.mark.parametrize("times", [1, 10**9])
def test_a_step_of_which_nothing_can_be_told_is_not_missing(tmp_path, no_pauses, monkeypatch, times):
    write(tmp_path, 10, 20)
    stat, refusals = os.stat, iter(range(times))

    def refuse(path, *given, **options):
        if os.fspath(path).endswith("/20") and next(refusals, None) is not None:
            raise OSError(errno.EIO, "Input/output error")
        return stat(path, *given, **options)

    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(os, "stat", refuse)
        if times == 1:
            assert checkpoints.restore(state(0))[0] == 20
        else:
            with pytest.raises(Unavailable, match="Input/output error"):
                checkpoints.restore(state(0))
        monkeypatch.undo()


def test_arrays_that_cannot_be_read_once_are_no_damage(tmp_path, monkeypatch):
    write(tmp_path, 10, 20)
    read, refusals = tensorstore.open, iter(range(1))

    def refuse_once(*given, **options):
        if next(refusals, None) is not None:
            raise ValueError("UNKNOWN: Input/output error")
        return read(*given, **options)

    monkeypatch.setattr(tensorstore, "open", refuse_once)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(state(0))[0] == 20


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, no_pauses, monkeypatch):
    write(tmp_path, 10)
    with opened(tmp_path) as checkpoints:

        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(type(epath.Path(tmp_path)), "iterdir", refuse)
        with pytest.raises(Unavailable, match="Permission denied"):
            checkpoints.restore(state(0))


# ---------------------------------------------------------------------------------------------------------- ownership


def test_a_checkpoint_knows_its_owner_and_its_note(tmp_path):
    mine = {"experiment": "a", "config": {"rate": 0.1}, "run": "teacher", "data": {"mnist train": "3.0.1 17"}}
    with contextlib.closing(Checkpoints(str(tmp_path), owner=lambda: mine)) as checkpoints:
        checkpoints.save(1, state(1), note={"totals": [0.1, 1 / 3]})
    for read in ({**mine["data"], "mnist test": "3.0.1 4"}, {}):  # a set may be read later
        with contextlib.closing(
            Checkpoints(str(tmp_path), owner=lambda read=read: {**mine, "data": read})
        ) as checkpoints:
            assert checkpoints.restore(state(0))[2] == {"totals": [0.1, 1 / 3]}
    for other, words in (
        ({**mine, "run": "student"}, "run is teacher in the checkpoint, student in this command"),
        ({**mine, "config": {"rate": 0.2}}, "rate is 0.1 in the checkpoint, 0.2 in this command"),
        ({**mine, "data": {"mnist train": "2.0.0 17"}}, "mnist train is 3.0.1 17 in the checkpoint, 2.0.0 17 in this"),
    ):
        with (
            contextlib.closing(Checkpoints(str(tmp_path), owner=lambda other=other: other)) as checkpoints,
            pytest.raises(InputError, match=words),
        ):
            checkpoints.restore(state(0))


def test_each_save_compares_the_digests_of_the_leaves(tmp_path):
    seen = []
    with contextlib.closing(Checkpoints(str(tmp_path), agree=seen.append)) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)})
        checkpoints.save(2, {"x": jnp.ones(2)})
        checkpoints.save(3, {"x": jnp.zeros(2)})
    assert seen[0] == seen[1] != seen[2]
    assert seen[0].keys() == {"x"}


# ------------------------------------------------------------------------------------------------ kills, full disks

TRAINERS = """
import os, sys
import jax, jax.numpy as jnp, orbax.checkpoint, tensorstore
from dl_jax.harness.checkpoint.store import Checkpoints

def train():
    checkpoints = Checkpoints(sys.argv[1])
    like = {"step": jnp.int32(0), "x": jnp.zeros((200, 1000), jnp.int32)}
    found = checkpoints.restore(like)
    step = found[0] if found else 0
    while True:
        step += 1
        tree = {"step": jnp.int32(step), "x": (jnp.arange(200_000, dtype=jnp.int32) * step).reshape(200, 1000)}
        checkpoints.save(step, tree)
        print(os.getpid(), step, flush=True)

for _ in sys.stdin:  # one trainer a line; forked, as imports take the most of a start, before JAX has any threads
    trainer = os.fork()
    if trainer == 0:
        train()
    os.waitpid(trainer, 0)
    print("ended", flush=True)
"""


def kill_and_check(directory: Path, kills: int) -> None:
    """Kills trainers that save all the time, each going on where the one before was killed."""
    rng, step = random.Random(0), 0
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}  # a kill would leave half a program there
    command = [sys.executable, "-W", "error", "-c", TRAINERS, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment, text=True) as trainers:
        for _ in range(kills):
            trainers.stdin.write("go on\n")
            trainers.stdin.flush()
            for _ in range(rng.randint(1, 4)):
                trainer, announced = map(int, trainers.stdout.readline().split())
            time.sleep(rng.uniform(0, 0.15))
            os.kill(trainer, signal.SIGKILL)
            while (line := trainers.stdout.readline()) != "ended\n":
                announced = int(line.split()[1])
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a kill leaves nothing that looks like a checkpoint
                before, (step, found) = step, load(str(directory))
            assert before <= step
            assert announced - 1 <= step <= announced + 1  # lost at most: the save under way
            assert found["step"] == step
            np.testing.assert_array_equal(found["x"].ravel(), np.arange(200_000, dtype=np.int32) * np.int32(step))
        trainers.stdin.close()
        assert trainers.stderr.read() == ""
    assert trainers.returncode == 0


def test_kill_9_during_saves(tmp_path):
    kill_and_check(tmp_path, 3)
    shutil.copytree(tmp_path / on_disk(tmp_path)[0], tmp_path / "99.orbax-checkpoint-tmp")
    with opened(tmp_path):
        assert all(name.isdecimal() for name in on_disk(tmp_path))


@pytest.mark.slow
def test_many_kills_during_saves(tmp_path):
    kill_and_check(tmp_path, 20)


@contextlib.contextmanager
def small_disk(directory: Path, size: str) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None or os.getuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_and_a_read_only_one(tmp_path, capfd):
    rng = np.random.default_rng(0)
    tree = lambda count: {"x": jnp.asarray(rng.integers(0, 2**31, count, np.int32))}
    with small_disk(tmp_path, "2m"):
        with opened(tmp_path) as checkpoints:
            checkpoints.save(1, tree(1000))
            checkpoints.save(2, tree(1_000_000))
            with pytest.raises(InputError) as error:
                checkpoints.save(3, tree(1000))
            assert str(error.value) == (
                f"checkpoint {tmp_path}/2 was not written (disk full); make room there or use another --workdir"
            )
            assert on_disk(tmp_path) == ["1"]
            checkpoints.save(3, tree(1000))  # the writer survives, and has room again
        assert load(str(tmp_path))[0] == 3
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        assert load(str(tmp_path))[0] == 3
        with pytest.raises(InputError, match=rf"^{tmp_path} cannot be written \(Read-only file system\); choose"):
            Checkpoints(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_failed_write_is_told_by_wait_and_harms_nothing(tmp_path, monkeypatch):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.wait()

        def fail():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoints._writer, "wait_until_finished", fail)
        checkpoints._unfinished = checkpoints._finisher.submit(checkpoints._finish, 2)
        with pytest.raises(InputError, match=rf"^checkpoint {tmp_path}/2 was not written \(disk full\); make room"):
            checkpoints.wait()
        monkeypatch.undo()
        monkeypatch.setattr(checkpoints._writer, "save", lambda *_, **__: fail())
        with pytest.raises(InputError, match=rf"^checkpoint {tmp_path}/2 was not written \(disk full\); make room"):
            checkpoints.save(2, state(2))
        monkeypatch.undo()
        checkpoints.save(3, state(3))
    assert on_disk(tmp_path) == ["1", "3"]


def test_a_save_beside_a_process_that_has_gone_may_succeed_later(tmp_path, monkeypatch):
    gone = TimeoutError("Timed out while waiting for async_commit_complete barrier.")
    gone.__cause__ = RuntimeError("INTERNAL: Barrier failed because: UNAVAILABLE: Task 1 heartbeat timeout")
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.wait()
        for error in (gone, ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")):
            assert isinstance(checkpoints._failure(2, error), InputError)
            monkeypatch.setattr(checkpoints._peers, "count", 2)
            found = checkpoints._failure(2, error)
            monkeypatch.undo()
            assert isinstance(found, Unavailable)
            assert str(found).startswith(f"checkpoint {tmp_path}/2 was not written, as another process has gone (")


def test_a_path_that_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=rf"^{path} cannot be written \(.*\); choose another --workdir$"):
            Checkpoints(str(path))


# ------------------------------------------------------------------------------------------- paths, log, old files


def test_paths_are_absolute_but_addresses_stay(tmp_path, monkeypatch):
    assert checkpoint_files.absolute("gs://bucket/run").as_posix() == "gs://bucket/run"
    monkeypatch.chdir(tmp_path)
    with opened(Path("runs/x")) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)})
        with pytest.raises(InputError, match=r"^checkpoint runs/x/1 does not fit"):
            checkpoints.restore({"y": jnp.ones(2)})
    assert load("runs/x")[0] == 1


def test_saving_and_restoring_say_nothing(tmp_path, capfd, caplog):
    with caplog.at_level("INFO"):
        write(tmp_path, 1, 2)
        with opened(tmp_path) as checkpoints:
            checkpoints.restore(state(0))
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if "orbax" in record.pathname] == []


def test_the_checkpoint_of_release_1_is_restored(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    with opened(tmp_path / "golden") as checkpoints:
        step, found, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, golden()))
    assert step == 3
    same(found, golden())
    assert best_step(str(GOLDEN)) == 3
    assert load(str(GOLDEN))[1]["params"]["kernel"].tolist() == [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 50_000


def golden() -> State:
    params = {"kernel": jnp.arange(6.0).reshape(2, 3) / 2, "bias": jnp.arange(3).astype(jnp.bfloat16)}
    extra = {"a.b/c": jnp.array([True, False]), "none": jnp.zeros((0, 4)), "steps": jnp.array([1, -2], jnp.int32)}
    keys = jax.random.wrap_key_data(jnp.arange(4, dtype=jnp.uint32).reshape(2, 2), impl="threefry2x32")
    return State(jnp.asarray(3, jnp.int32), params, extra, optax.adam(0.1).init(params), keys)


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with opened(GOLDEN, best=("error", "min")) as writer:
        writer.save(3, golden(), {"error": 0.25})
    for note in GOLDEN.rglob("commit_success.txt"):
        note.unlink()  # it names the folder it was written to, and no reader needs it on a local disk
