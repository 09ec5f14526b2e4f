"""`jax.pmap`, for code that keeps a leading device axis."""

import jax
import optax

from dl_jax.core.devices import AXIS
from dl_jax.core.step import Batch, Loss, Metrics, State, Step, Tree, make_step


@jax.custom_vjp
def _averaged(params: Tree) -> Tree:
    """The identity, whose gradient is the mean of the devices' gradients."""
    return params


_averaged.defvjp(lambda params: (params, None), lambda _, grads: (jax.lax.pmean(grads, AXIS),))


def pmapped(loss: Loss, tx: optax.GradientTransformation) -> Step:
    """`make_step(loss, tx)` under `jax.pmap`, for code that keeps a leading device axis.

    State and batch are [D, ...] and [D, B / D, ...], the metrics are [D]. Takes the loss, not a step, because the mean
    goes inside the gradient. Losses that draw randomness or take batch statistics see one device's rows.
    """
    averaged = lambda variables, *rest: loss({**variables, "params": _averaged(variables["params"])}, *rest)
    step = make_step(averaged, tx)

    def on_device(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = step(state, batch)
        extra, metrics = jax.lax.pmean((state.extra, metrics), AXIS)
        return state._replace(extra=extra), metrics

    return jax.pmap(on_device, axis_name=AXIS)
