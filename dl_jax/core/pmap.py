"""An adapter to `jax.pmap`, for code whose arrays have a leading device axis."""

import jax
import optax

from dl_jax.core.devices import DATA
from dl_jax.core.step import Array, Batch, Loss, Metrics, State, Step, Tree, make_step


@jax.custom_vjp
def _averaged(params: Tree) -> Tree:
    """The identity, whose gradient is the mean of the devices' gradients."""
    return params


_averaged.defvjp(lambda params: (params, None), lambda _, grads: (jax.lax.pmean(grads, DATA),))


def pmapped(loss: Loss, tx: optax.GradientTransformation) -> Step:
    """`make_step(loss, tx)` under `jax.pmap`: a step for states [D, ...] and batches [D, B / D, ...] on D devices.

    The metrics are [D]. The argument is a loss because gradients have to be averaged over the devices before the
    optimiser sees them; so is the loss that `make_step` gives to the optimiser. Each device uses its own state.key and
    normalises its own rows; running statistics are averaged over devices.
    """
    averaged = lambda variables, *rest: loss({**variables, "params": _averaged(variables["params"])}, *rest)
    inner = optax.with_extra_args_support(tx)

    def update(updates: Tree, state: Tree, params: Tree | None = None, **given: Array) -> tuple[Tree, Tree]:
        return inner.update(updates, state, params, **jax.lax.pmean(given, DATA))

    step = make_step(averaged, optax.GradientTransformationExtraArgs(tx.init, update))

    def on_device(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = step(state, batch)
        extra, metrics = jax.lax.pmean((state.extra, metrics), DATA)
        return state._replace(extra=extra), metrics

    return jax.pmap(on_device, axis_name=DATA)
