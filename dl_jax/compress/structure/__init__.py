"""Structural pruning: removes channels, units and heads of any model, so that it becomes smaller and faster.

    found = structure.groups(model.apply, variables, image, train=False)      # print(structure.explain(found))
    scores = structure.l2(found, variables)
    plan = structure.lowest(found, scores, 0.5, multiple=8)                   # {path: {axis: the indices that go}}
    apply, variables = structure.cut(model.apply, variables, plan)
    opt_state = structure.shrunk(opt_state, plan)

Which coordinates of which parameters have to go together is found in the trace of a call, and the smaller model runs
that trace at its own shapes. It therefore works for any function of variables, also with widths written into its code.
What cannot be followed stays, with a reason.
"""

from dl_jax.compress.structure.channels import (
    Channel,
    Groups,
    Place,
    Plan,
    cut,
    explain,
    groups,
    removing,
    shrunk,
    zeroed,
)
from dl_jax.compress.structure.choose import (
    l1,
    l2,
    lowest,
    norm_scale,
    operations,
    parameters,
    random,
    seconds,
    taylor,
    within,
)

__all__ = [
    "Channel",
    "Groups",
    "Place",
    "Plan",
    "cut",
    "explain",
    "groups",
    "l1",
    "l2",
    "lowest",
    "norm_scale",
    "operations",
    "parameters",
    "random",
    "removing",
    "seconds",
    "shrunk",
    "taylor",
    "within",
    "zeroed",
]
