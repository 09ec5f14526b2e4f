"""The train state, the train step, and functions from step to step. Nothing here depends on a model or data set.

Four kinds of function, each of which can be composed with others of its kind:

    loss   (variables, batch, key) -> (scalar, (collections, metrics))
    tx     optax.GradientTransformation
    step   (state, batch) -> (state, metrics)
    batch  (key, batch) -> batch

A metric of a step is a mean, or a pair (sum, weight) if there may be nothing to average in a step, for example because
no episode ended. The mean of a pair over several steps is Σ sum / Σ weight. It is NaN for a seed whose Σ weight is 0,
and `fit` does not report the pair if this holds for every seed.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32, is_real

Tree = Any
Array = jax.Array
Batch = Mapping[str, Any]  # every leaf is [B, ...]
Metric = Array | tuple[Array, Array]  # a mean, or (sum, weight); scalars, or [S] under per_seed
Metrics = Mapping[str, Metric]
Loss = Callable[[Tree, Batch, Array], tuple[Array, tuple[Tree, Metrics]]]

SEED = "seed"  # the axis of a mesh over which seeds are split


class State(NamedTuple):
    """The complete state of a training: a tree of arrays that can be jitted, vmapped, donated, sharded and saved."""

    step: Array  # int32 [], or [S] under per_seed
    params: Tree
    extra: Tree  # collections that no gradient trains, a dict of arrays each: {"batch_stats": {...}}, an EMA, codebooks
    opt_state: Tree
    key: Array  # typed PRNG key, never advanced: a step's key is fold_in(key, step)

    @property
    def variables(self) -> Tree:
        """What `module.apply` and losses take: {"params": params, **extra}.

        Raises InputError where `extra` is no dict of collections: Flax takes no bare array.
        """
        return _variables(self.params, self.extra)


def require_collections(extra: Tree) -> None:
    """Raises InputError where `extra` is no dict."""
    if not isinstance(extra, Mapping):
        kind = "an array" if hasattr(extra, "shape") else f"a {type(extra).__name__}"
        raise InputError(f"extra is {kind}, expected a dict of collections such as {{'batch_stats': ...}}, or {{}}")


def _variables(params: Tree, extra: Tree) -> Tree:
    require_collections(extra)
    for name, collection in extra.items():
        if hasattr(collection, "shape"):
            raise InputError(
                f"extra[{name!r}] is an array, expected a collection, which is a dict of arrays; put it into one: "
                f"{{{name!r}: {{'value': ...}}}}"
            )
    return {"params": params, **extra}


Step = Callable[[State, Batch], tuple[State, Metrics]]


def init_state(key: Array, variables: Tree, tx: optax.GradientTransformation) -> State:
    """The state of one seed at step 0. `variables` is the result of `module.init`."""
    extra = {name: value for name, value in variables.items() if name != "params"}
    opt_state = jax.jit(tx.init)(variables["params"])  # one program, where eager zeros are one for each shape
    return State(jnp.zeros([], jnp.int32), variables["params"], extra, opt_state, key)


@functools.partial(jax.jit, static_argnames="tx")  # compiled once for all the fits that share an optimiser
def init_states(keys: Array, variables: Tree, tx: optax.GradientTransformation) -> State:
    """The states of S seeds at step 0. `keys` are [S]; every leaf of `variables` and of the result is [S, ...]."""
    return jax.vmap(lambda key, variables: init_state(key, variables, tx))(keys, variables)


def plain_state(key: Array, params: Tree) -> State:
    """The state at step 0 of a step without an optimiser, of one seed, or with keys [S] of S seeds."""
    return State(jnp.zeros(key.shape, jnp.int32), params, {}, (), key)


def init_variables(model: Any, keys: Array, *inputs: Any) -> Tree:
    """The initial variables of S seeds, `model.init(key, *inputs, train=False)` for each of `keys` [S].

    Every leaf is [S, ...]. `inputs` are examples of the model's inputs, such as `jnp.zeros((1, 28, 28, 1))`; only their
    shapes and types matter.
    """
    # Sequential over seeds: same result as vmap, half the compile time.
    return jax.jit(lambda keys: jax.lax.map(lambda key: model.init(key, *inputs, train=False), keys))(keys)


def start(model: Any, tx: optax.GradientTransformation, key_init: Array, key: Array, *inputs: Any) -> State:
    """The states of S seeds at step 0 for a Flax model. Every leaf is [S, ...].

    The keys `key_init` [S] draw the initial parameters, the keys `key` [S] all random numbers during training. `inputs`
    are as in `init_variables`.
    """
    return init_states(key, init_variables(model, key_init, *inputs), tx)


def make_step(loss: Loss, tx: optax.GradientTransformation, microbatches: int = 1) -> Step:
    """The usual step: one gradient of `loss`, one update by `tx`.

    Its metrics are those of `loss`, and "loss" and "grad_norm", the gradient's Euclidean norm. The step's key is
    `fold_in(state.key, state.step)`, so a resumed run draws the same numbers.

    With `microbatches` = k the gradient is the mean over k parts of the batch, computed one after the other, which
    takes k times less memory for activations. Part i uses `fold_in(key, i)` of the step's key. Every part sees the
    collections as they were before the step, and their new values are averaged over the parts, so that running
    statistics move once per step. BatchNorm still normalises each part by itself. The running mean equals that of the
    whole batch; the running variance is the average within-part variance, without the variance between the parts'
    means.

    An optimiser that takes extra arguments, such as a chain with `optax.contrib.reduce_on_plateau`, is given the loss
    of the whole batch as `value`.

    Raises InputError where k is below 1 and, when called, where it does not divide the batch or `loss` returns a metric
    of one of these two names.
    """
    if microbatches < 1:
        raise InputError(f"microbatches is {microbatches}, expected 1 or more; 1 takes the batch whole")
    gradient = _accumulated(_gradient(loss), microbatches) if microbatches > 1 else _gradient(loss)
    update = optax.with_extra_args_support(tx).update

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (value, (extra, metrics)), grads = gradient(state.params, state.extra, batch, key)
        for name in metrics.keys() & {"loss", "grad_norm"}:
            raise InputError(f"the loss returns a metric {name!r}, which the step adds itself; give it another name")
        updates, opt_state = update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        state = State(state.step + 1, params, {**state.extra, **extra}, opt_state, state.key)
        norm = optax.tree.norm(jax.tree.map(at_least_float32, grads))
        return state, {**metrics, "loss": value, "grad_norm": norm}

    return step


def _gradient(loss: Loss):
    """(params, extra, batch, key) -> ((value, (extra, metrics)), grads)."""
    return jax.value_and_grad(lambda params, extra, *rest: loss(_variables(params, extra), *rest), has_aux=True)


def _accumulated(gradient, k: int):
    """The mean of `gradient` over k interleaved parts of the batch, which is added up in float32 or better."""

    def accumulate(params, extra, batch, key):
        rows = {len(x) for x in jax.tree.leaves(batch)}
        if any(n % k for n in rows):
            raise InputError(
                f"a batch of {max(rows)} rows cannot be split into {k} microbatches, expected a multiple; change the "
                "batch size or microbatches"
            )
        # Part i holds rows i, i + k, ...: every device keeps its share of every part.
        parts = jax.tree.map(lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), batch)  # [k, B / k, ...]
        part = lambda i, rows: gradient(params, extra, rows, jax.random.fold_in(key, i))
        (value, (new, metrics)), grads = first = part(0, jax.tree.map(lambda x: x[0], parts))
        wide = jax.tree.map(at_least_float32, (value, metrics, grads))
        wide_new = jax.tree.map(lambda x: at_least_float32(x) if is_real(x) else x, new)

        def add(total, i_rows):
            # Counters and keys among the collections are the last part's.
            plus = lambda so_far, x: so_far + x.astype(so_far.dtype) if is_real(so_far) else x
            return jax.tree.map(plus, total, part(*i_rows)), None

        total = ((wide[0], (wide_new, wide[1])), wide[2])
        rest = (jnp.arange(1, k), jax.tree.map(lambda x: x[1:], parts))
        ((value, (new, metrics)), grads), _ = jax.lax.scan(add, total, rest)
        mean = lambda total, like: (total / k).astype(like.dtype) if is_real(like) else total
        (_, (like_new, _)), like_grads = first
        metrics = {name: m if isinstance(m, tuple) else m / k for name, m in metrics.items()}
        return (value / k, (jax.tree.map(mean, new, like_new), metrics)), jax.tree.map(mean, grads, like_grads)

    return accumulate


def per_seed(step: Step, one_by_one: bool = False) -> Step:
    """A step for S seeds: it takes states [S, ...] and batches [S, B, ...] and trains each seed on its own data.

    By default all seeds are computed together with `jax.vmap`. With `one_by_one`, a CPU computes one seed after the
    other with `jax.lax.map`. That needs the activations of one seed only. It can also be faster: for convolutions,
    which vmap turns into grouped convolutions, and for models that are large enough to use all cores. For small
    convolutional networks either way may win, so measure both. Inside such a loop, XLA's CPU backend is slow at
    gradients of convolutions that `models.ops` does not write as matrix products. Accelerators use `jax.vmap` in both
    cases.

    Where `fit` splits the seeds over devices, each device computes its own without communication.

    The result raises InputError where the leading axes of states and batches are not one number, that of the seeds.
    """
    if one_by_one:
        step = jax.jit(step, inline=True)  # traced once for both
    side_by_side = jax.vmap(step)
    in_turn = lambda states, batches: jax.lax.map(lambda both: step(*both), (states, batches))

    def mapped(both: tuple[State, Batch], _: None) -> tuple[State, Metrics]:
        if not one_by_one:
            return side_by_side(*both)
        if len(jax.tree.leaves(both)[0]) == 1:  # the only seed of a device
            return jax.tree.map(lambda x: x[None], step(*jax.tree.map(lambda x: x[0], both)))
        return jax.lax.platform_dependent(*both, cpu=in_turn, default=side_by_side)

    def of_seeds(states: State, batches: Batch) -> tuple[State, Metrics]:
        counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((states, batches))}
        if len(counts) > 1:
            found = " and ".join(sorted(str(*count) if count else "no axis" for count in counts))
            raise InputError(
                f"states and batches of {found} seeds, expected one number in all leaves, [S, ...]; give "
                "data.shuffled the seeds as a tuple, (0,) for one seed"
            )
        return over_seeds(mapped)((states, batches), None)

    return of_seeds


def over_seeds(function: Callable[[Tree, Tree], Tree]) -> Callable[[Tree, Tree], Tree]:
    """`function(by_seed, shared)`, computed by every device for its own seeds where a mesh splits them.

    Every leaf of `by_seed` and of the result is [S, ...]; `shared` is the same for all seeds. The mesh is that of the
    context, as `jax.sharding.use_abstract_mesh` sets it.
    """

    def split(by_seed: Tree, shared: Tree) -> Tree:
        if jax.sharding.get_abstract_mesh().shape.get(SEED, 1) == 1:
            return function(by_seed, shared)
        specs = PartitionSpec(SEED), PartitionSpec()

        def own(by_seed: Tree, shared: Tree) -> Tree:
            # The partitioner fails at a result that depends on no number of a seed, such as the weight of a mean: tie
            # all results to one.
            least = min(jax.tree.leaves(by_seed), key=lambda leaf: (not is_real(leaf), leaf.size))
            return jax.lax.optimization_barrier((function(by_seed, shared), least))[0]

        return jax.shard_map(own, in_specs=specs, out_specs=specs[0], axis_names={SEED}, check_vma=False)(
            by_seed, shared
        )

    return split


def holding(step: Callable[[Tree, State, Batch], tuple[State, Metrics]], tree: Tree) -> Step:
    """The step `(state, batch) -> step(tree, state, batch)`, where `tree` is for example a teacher's parameters.

    `fit` passes `tree` to the compiled program as an argument, whereas an array that a function captures is compiled
    into it as a constant. For this, `holding` has to be the outermost of the functions that make the step.
    """
    return jax.tree_util.Partial(step, tree)
