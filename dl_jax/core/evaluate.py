"""Evaluation over a data set in memory, in which every example counts once, whatever the batch size."""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dl_jax.core import events
from dl_jax.core.devices import fetched, own, place, put, rows_over, states_over
from dl_jax.core.errors import InputError
from dl_jax.core.program import calls_in_flight
from dl_jax.core.recorder import Measurements
from dl_jax.core.step import Array, Batch, Tree, over_seeds
from dl_jax.core.stream import count, epoch
from dl_jax.core.target import Program, abstract, mesh_of, planned, unknown

Records = Mapping[str, Any]  # the columns of a data set, [N, ...]


def evaluator(
    metrics: Callable[[Tree, Batch, Array], Mapping[str, tuple[Array, Array]]],
    records: Records | Sequence[Records],
    batch_size: int,
    keys: Array,
) -> Callable[[Tree], Measurements]:
    """Returns a function that evaluates variables [S, ...] on all of `records` and gives {name: mean [S, ...]}.

    Args:
      metrics: a function `(variables, batch, key) -> {name: (sum, weight)}` for the variables of one seed and a batch
        of `stream.epoch`, whose column `mask` float32 [B] is 0 for padding.
      records: the columns of the data set, [N, ...], or a list of parts of it, such as `data.buckets`, whose batches
        differ in their shapes.
      batch_size: the number of rows on all devices; as many devices as divide it take part.
      keys: typed PRNG keys [S]. Batch i of seed s uses `fold_in(keys[s], i)`; the parts are counted through.

    The mean of a metric is Σ sum / Σ weight over all batches, and NaN where Σ weight is 0. The seeds are computed one
    after the other. Raises InputError as `stream.epoch` does, and for a list without parts.
    """
    parts = [records] if isinstance(records, Mapping) else list(records)
    if not parts:
        raise InputError("no records, expected at least one part of a data set; choose a split that is not empty")
    for part in parts:
        epoch(part, batch_size)

    def by_seed(given: tuple[Tree, Array], shared: tuple[Batch, Array]) -> Mapping[str, tuple[Array, Array]]:
        batch, i = shared
        return jax.lax.map(lambda one: metrics(one[0], batch, jax.random.fold_in(one[1], i)), given)

    @functools.partial(jax.jit, static_argnums=0)
    def measure(mesh: Mesh, variables: Tree, batch: Batch, keys: Array, i: Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return over_seeds(by_seed)((variables, keys), (batch, i))

    @events.phase("evaluation")
    def evaluate(variables: Tree) -> Measurements:
        total: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        mesh = mesh_of(batch_size, len(keys))
        target = planned()
        if target:
            traced = measure.trace(mesh, *_shapes(variables, parts[-1], batch_size, mesh), keys, np.int32(0))
            target.take(Program("evaluation", traced, mesh, None))
            return {name: value for name, (value, _) in unknown(traced.out_info).items()}
        variables, batches = _on(mesh, variables), _placed(parts, batch_size, mesh)
        found = (measure(mesh, variables, batch, keys, np.int32(i)) for i, batch in enumerate(batches))
        for pairs in _results(found, calls_in_flight(mesh)):
            for name, pair in pairs.items():
                value, weight = (np.asarray(x, np.float64) for x in pair)
                value_before, weight_before = total.get(name, (0.0, 0.0))
                total[name] = (value_before + value, weight_before + weight)
        with np.errstate(invalid="ignore"):  # 0 / 0
            return {name: np.asarray(value / weight) for name, (value, weight) in total.items()}

    return evaluate


def collector(predict: Callable[[Tree, Batch], Tree], batch_size: int) -> Callable[[Tree, Records], Tree]:
    """Returns a function `(variables, records) -> predictions for all records`, which is compiled once for each shape.

    The predictions are a tree of NumPy arrays [S, N, ...], on every process, for variables [S, ...] and the columns
    [N, ...] of a data set. Use it for a teacher's logits, and for metrics that are not sums over examples, such as F1,
    BLEU or a rank correlation. With `data.buckets` call it for each bucket; keep it for what is evaluated again.

    Args:
      predict: for one seed, a function `(variables, batch) -> tree of arrays [B, ...]`, on a batch of `stream.epoch`.
        Predictions for padding are removed.
      batch_size: the number of rows on all devices.

    The function that is returned raises InputError as `stream.epoch` does.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def answer(mesh: Mesh, variables: Tree, batch: Batch) -> Tree:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            by_seed = lambda variables, batch: jax.lax.map(lambda one: predict(one, batch), variables)
            return over_seeds(by_seed)(variables, batch)

    @events.phase("evaluation")
    def collect(variables: Tree, records: Records) -> Tree:
        mesh = mesh_of(batch_size, len(jax.tree.leaves(variables)[0]))
        target = planned()
        if target:
            traced = answer.trace(mesh, *_shapes(variables, records, batch_size, mesh))
            target.take(Program("predictions", traced, mesh, None))
            rows = lambda s: jax.ShapeDtypeStruct((s.shape[0], count(records), *s.shape[2:]), s.dtype)
            return unknown(jax.tree.map(rows, traced.out_info))
        variables = _on(mesh, variables)
        calls = (answer(mesh, variables, batch) for batch in _placed([records], batch_size, mesh))
        found = list(_results(calls, calls_in_flight(mesh)))
        return jax.tree.map(lambda *parts: np.concatenate(parts, 1)[:, : count(records)], *found)

    return collect


def _shapes(variables: Tree, records: Records, batch_size: int, mesh: Mesh) -> tuple[Tree, Tree]:
    """The variables and a batch as a plan has them: shapes with shardings."""
    batch, rows = next(iter(epoch(records, batch_size))), rows_over(mesh, seeds=False)
    over = states_over(variables, mesh, len(jax.tree.leaves(variables)[0]))
    return abstract(variables, over), abstract(batch, dict.fromkeys(batch, rows))


def _placed(parts: Sequence[Records], batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    rows = own(mesh, batch_size).rows
    batches = (batch for part in parts for batch in epoch(part, batch_size, rows))
    return (place(batch, rows_over(mesh, seeds=False), (batch_size,)) for batch in batches)


def _on(mesh: Mesh, variables: Tree) -> Tree:
    """`variables` on the devices of the batches. A fit with another batch size may have left them on other devices."""
    devices = set(mesh.devices.flat)
    there = all(isinstance(x, jax.Array) and x.sharding.device_set == devices for x in jax.tree.leaves(variables))
    seeds = len(jax.tree.leaves(variables)[0])
    return variables if there else put(variables, states_over(variables, mesh, seeds))


def _results(calls: Iterator[Any], at_a_time: int) -> Iterator[Any]:
    """Yields the results of asynchronous calls, on the host, with at most `at_a_time` of them under way."""
    pending: collections.deque[Any] = collections.deque()
    for call in calls:
        pending.append(call)
        if len(pending) == at_a_time:
            yield _fetched(pending.popleft())
    while pending:
        yield _fetched(pending.popleft())


def _fetched(call: Any) -> Any:
    result = fetched(call)
    events.progress()
    return result
