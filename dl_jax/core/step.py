"""State, the train step and its combinators. Nothing here knows a model, a data set or a method.

Four kinds of function, each closed under composition:

    loss   (variables, batch, key) -> (scalar, (collections, metrics))
    tx     optax.GradientTransformation
    step   (state, batch) -> (state, metrics)
    batch  (key, batch) -> batch
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any
Array = jax.Array
Batch = Mapping[str, Any]  # every leaf is [B, ...]
Metrics = Mapping[str, Array]  # scalars, or [S] under per_seed
Loss = Callable[[Tree, Batch, Array], tuple[Array, tuple[Tree, Metrics]]]


class State(NamedTuple):
    """All that a run must remember. Arrays only: it can be jitted, vmapped, donated, sharded and saved as it is."""

    step: Array  # int32 [], or [S] under per_seed
    params: Tree
    extra: Tree  # collections that no gradient trains: {"batch_stats": ...}, an EMA, codebooks
    opt_state: Tree
    key: Array  # typed PRNG key, never advanced: a step's key is fold_in(key, step)

    @property
    def variables(self) -> Tree:
        return {"params": self.params, **self.extra}


Step = Callable[[State, Batch], tuple[State, Metrics]]


class ArgumentError(ValueError):
    """Numbers that do not fit together: steps, intervals, the size of a batch and its parts."""


def init_state(key: Array, variables: Tree, tx: optax.GradientTransformation) -> State:
    """A state at step 0 from what `module.init` returned."""
    extra = {name: value for name, value in variables.items() if name != "params"}
    opt_state = jax.jit(tx.init)(variables["params"])  # one program, where eager zeros are one for each shape
    return State(jnp.zeros([], jnp.int32), variables["params"], extra, opt_state, key)


def make_step(loss: Loss, tx: optax.GradientTransformation, microbatches: int = 1) -> Step:
    """The usual step: one gradient of `loss`, one update by `tx`.

    The step's key is `fold_in(state.key, state.step)`, so nothing depends on history. With `microbatches` = k the
    gradient is the mean over k parts of the batch, one after the other: k times less memory for activations.
    """
    if microbatches < 1:
        raise ArgumentError(f"microbatches is {microbatches}, expected 1 or more; 1 takes the batch whole")
    gradient = _accumulated(_gradient(loss), microbatches) if microbatches > 1 else _gradient(loss)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (value, (extra, metrics)), grads = gradient(state.params, state.extra, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = State(state.step + 1, params, {**state.extra, **extra}, opt_state, state.key)
        return state, {**metrics, "loss": value, "grad_norm": optax.tree.norm(grads)}

    return step


def _gradient(loss: Loss):
    """(params, extra, batch, key) -> ((value, (extra, metrics)), grads)."""
    return jax.value_and_grad(lambda params, extra, *rest: loss({"params": params, **extra}, *rest), has_aux=True)


def _accumulated(gradient, k: int):
    """The mean of `gradient` over k interleaved parts of the batch; `extra` passes from part to part."""

    def accumulate(params, extra, batch, key):
        rows = {len(x) for x in jax.tree.leaves(batch)}
        if any(n % k for n in rows):
            raise ArgumentError(
                f"a batch of {max(rows)} rows cannot be split into {k} microbatches, expected a multiple"
            )
        # Part i holds rows i, i + k, ...: every device keeps its share of every part.
        parts = jax.tree.map(lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), batch)  # [k, B / k, ...]

        def part(extra, i_batch):
            i, batch = i_batch
            (value, (new, metrics)), grads = gradient(params, extra, batch, jax.random.fold_in(key, i))
            return {**extra, **new}, (value, metrics, grads)

        def add(carry, i_batch):
            extra, result = part(carry[0], i_batch)
            return (extra, jax.tree.map(jnp.add, carry[1], result)), None

        first = part(extra, (0, jax.tree.map(lambda x: x[0], parts)))
        rest = (jnp.arange(1, k), jax.tree.map(lambda x: x[1:], parts))
        (extra, total), _ = jax.lax.scan(add, first, rest)
        value, metrics, grads = jax.tree.map(lambda x: x / k, total)
        return (value, (extra, metrics)), grads

    return accumulate


def per_seed(step: Step) -> Step:
    """Trains a stack of states [S, ...] on a stack of batches [S, B, ...]: one lane a seed, its data order its own."""
    return jax.vmap(step)


def scanned(step: Step, k: int) -> Step:
    """Runs k steps in one call on stacked batches [k, B, ...]; its metrics are the means over the k steps."""

    def steps(state: State, batches: Batch) -> tuple[State, Metrics]:
        state, metrics = jax.lax.scan(step, state, batches, length=k)
        return state, jax.tree.map(lambda m: m.mean(0), metrics)

    return steps


def gathered(step: Step, records: Batch) -> Step:
    """A step on batches {"index": int [...]} that reads its rows from `records` [N, ...], resident on the device.

    Goes outermost: the records must reach the compiled step as an argument, not as a constant.
    """
    return jax.tree_util.Partial(functools.partial(_gather_and_step, step), records)


def _gather_and_step(step: Step, records: Batch, state: State, batch: Batch) -> tuple[State, Metrics]:
    return step(state, {name: column[batch["index"]] for name, column in records.items()})
