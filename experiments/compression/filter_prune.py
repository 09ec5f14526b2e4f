"""Whole filters are cut out of ResNets, with the savings of the paper to the decimal place that it gives.

Li, Kadav, Durdanovic, Samet & Graf 2017, "Pruning filters for efficient ConvNets" (arXiv:1608.08710), section 4.2 and
Table 1, ResNet-56 and ResNet-110 on CIFAR-10.

    python experiments/compression/filter_prune.py --preset paper --seeds 1 --workdir runs/filters

Expected: 10.4 % and 27.6 % of the multiply-adds of ResNet-56 go, and 15.9 % and 38.6 % of those of ResNet-110, within
0.1 points. Nothing is trained: the savings follow from how many filters go, whichever they are. The accuracies of the
paper are not run, and its numbers here are from memory. It takes a minute on a CPU core.

In each residual block only the first convolution loses filters, as its maps meet no shortcut; some sensitive layers
lose none. Multiply-adds with the zeros of a padding count here, as they do in the paper.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.compress import structure
from dl_jax.core import equations
from dl_jax.harness import Between, Claim, Positive, Run, Some, launch
from dl_jax.models.vision.resnet import CifarResNet


@dataclasses.dataclass(frozen=True)
class Config:
    depths: Some[Annotated[int, Between(low=8)]] = (56, 110)  # layers of the networks, 6 n + 2
    pixels: Annotated[int, Between(low=4)] = 32  # height and width of an image
    channels: Positive[int] = 3  # of an image


PRESETS = {
    "paper": Config(),
    "quick": Config(depths=(56,)),
    "smoke": Config(depths=(8,), pixels=8),
}


class Recipe(NamedTuple):
    """The filters that go: a share of every stage's, but of none of some layers. The stem is layer 1."""

    shares: tuple[float, float, float]
    skipped: tuple[int, ...] = ()


RECIPES = {
    (56, "A"): Recipe((0.1, 0.1, 0.1), (16, 20, 38, 54)),
    (56, "B"): Recipe((0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)),
    (110, "A"): Recipe((0.5, 0.0, 0.0), (36,)),
    (110, "B"): Recipe((0.5, 0.4, 0.3), (36, 38, 74)),
    (8, "A"): Recipe((0.5, 0.5, 0.5)),  # ours, for the preset smoke
}
# What the paper says goes of the multiply-adds and of the parameters, in %.
CUTS = {"56-A": (10.4, 9.4), "56-B": (27.6, 13.7), "110-A": (15.9, 2.3), "110-B": (38.6, 32.4)}

claim = functools.partial(
    Claim, paper="Li et al. 2017", tolerance=0.1, unit="%", better="higher", seeds=1, verified=False
)
CLAIMS = tuple(
    claim(f"{quantity}_cut/{name}", locator=f"Table 1, ResNet-{name}", claimed=claimed)
    for name, cuts in CUTS.items()
    for quantity, claimed in zip(("multiply_adds", "parameters"), cuts, strict=True)
)


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    image = jax.ShapeDtypeStruct((1, cfg.pixels, cfg.pixels, cfg.channels), jnp.float32)
    found = {}
    for depth in cfg.depths:
        net = CifarResNet(depth)
        apply = functools.partial(net.apply, train=False)
        variables = jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), image)
        groups = structure.groups(apply, variables, image)
        parameters = structure.parameters(variables)
        for (of, name), recipe in RECIPES.items():
            if of != depth:
                continue
            plan = structure.lowest(groups, structure.random(groups, 0), shares(recipe, depth, variables))
            small, smaller = structure.cut(apply, variables, plan)
            products = multiply_adds(apply, variables, image), multiply_adds(small, smaller, image)
            found[f"multiply_adds_cut/{depth}-{name}"] = 100 * (1 - products[1] / products[0])
            found[f"parameters_cut/{depth}-{name}"] = 100 * (1 - parameters(plan) / parameters({}))
    return {name: np.full(len(run.seeds), value) for name, value in found.items()}


def shares(recipe: Recipe, depth: int, variables: Any) -> dict[str, float]:
    """{group: the share of its filters that goes}; of what is left, the paper drops the fraction."""
    blocks, found = (depth - 2) // 6, {}
    for stage, share in enumerate(recipe.shares):
        for block in range(blocks):
            layer = 2 + 2 * (stage * blocks + block)
            path = f"stage{stage + 1}_block{block}"
            maps = variables["params"][path]["conv1"]["kernel"].shape[-1]
            if layer not in recipe.skipped:
                found[f"params/{path}/conv1/kernel:3"] = 1 - math.floor(maps * (1 - share)) / maps
    return found


def multiply_adds(apply: Any, variables: Any, image: Any) -> int:
    """The multiply-adds of all convolutions and products of matrices, with those that meet a padding."""
    total = 0
    for equation in equations.trace(apply, variables, image).jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):  # kernels [..., C, D]
            total += equation.outvars[0].aval.size * math.prod(equation.invars[1].aval.shape[:-1])
    return total


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
