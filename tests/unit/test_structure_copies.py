"""Which leaves of a tree a plan of structural pruning changes: of nested lists, states of optimisers, and averages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from dl_jax.compress import structure
from dl_jax.core.errors import InputError

GONE = np.arange(2)


class Layer(NamedTuple):
    w: Any
    head: Any = None


class Moments(NamedTuple):
    mu: Any


def widths(tree):
    """{path: length of the first axis}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape[0]
        for path, leaf in jax.tree.leaves_with_path(tree)
        if leaf.ndim
    }


def mapped(*names):
    return {name: {0: GONE} for name in names}


def ones(*names):
    return {name: np.ones(5) for name in names}


# variables without collections: a tree, and the paths of the plan that are to be the only ones that change
PLAIN = {
    "dicts in a list": ([ones("w", "b"), ones("w", "b")], ["0/w", "0/b", "1/w"]),
    "tuples in a list": ([(np.ones(5), np.ones(5)), (np.ones(5), np.ones(5))], ["0/0", "0/1", "1/0"]),
    "a list in a list": ([np.ones(5), (np.ones(5), np.ones(5))], ["0"]),
    "a dict in a dict": ({**ones("w", "b"), "head": ones("w", "b")}, ["w", "b"]),
    "a list in a dict": ({**ones("w"), "blocks": [ones("w")]}, ["w"]),
    "attributes": (Layer(np.ones(5), Layer(np.ones(5))), ["w"]),
    "attributes in params": ({"params": Layer(np.ones(5), Layer(np.ones(5)))}, ["params/w"]),
    "a list in params": (
        {"params": {**ones("w"), "blocks": [ones("w"), ones("b")]}},
        ["params/w", "params/blocks/1/b"],
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_only_the_leaves_of_the_plan_change(name):
    """Of variables, of these in a tuple, and of moments; no other leaf of the same last name does."""
    tree, gone = PLAIN[name]
    plan = mapped(*gone)
    expected = {path: 3 if path in gone else 5 for path in widths(tree)}
    assert widths(structure.shrunk(tree, plan)) == expected
    changed = {path for path, leaf in jax.tree.leaves_with_path(structure.zeroed(tree, plan)) if (leaf == 0).any()}
    assert len(changed) == len(gone)
    moments = structure.shrunk(Moments(tree), plan)
    assert widths(moments) == {f"mu/{path}": n for path, n in expected.items()}
    both = widths(structure.shrunk((tree, [Moments(tree)]), plan))
    assert both == {f"{root}/{path}": n for path, n in expected.items() for root in ("0", "1/0/mu")}


def test_lists_of_layers_are_cut():
    """The last layer's bias has the name of the first one's, and here its length as well."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    variables = [{"w": draw(3, 8), "b": draw(8)}, {"w": draw(8, 8), "b": draw(8)}]

    def apply(v, x):
        return jnp.tanh(x @ v[0]["w"] + v[0]["b"]) @ v[1]["w"] + v[1]["b"]

    x = draw(2, 3)
    plan = structure.removing(structure.groups(apply, variables, x).free["0/w:1"][:3])
    small, smaller = structure.cut(apply, variables, plan)
    assert smaller[1]["b"].shape == (8,)
    np.testing.assert_allclose(small(smaller, x), apply(structure.zeroed(variables, plan), x), rtol=0, atol=1e-5)


PARAMS = {"a": ones("kernel"), "b": {"a": ones("kernel")}}
PLAN = mapped("params/a/kernel", "batch_stats/norm/mean")


def test_copies_of_collections_shrink_with_them():
    """Bare parameters, moments of these and of all variables, averages, and a state that has them as fields."""
    variables = {"params": PARAMS, "batch_stats": {"norm": ones("mean", "var")}}
    expected = {"a/kernel": 3, "b/a/kernel": 5}
    named = {f"params/{path}": n for path, n in expected.items()}
    assert widths(structure.shrunk(PARAMS, PLAN)) == expected
    assert widths(structure.shrunk({"params": PARAMS}, PLAN)) == named
    assert widths(structure.shrunk(variables["batch_stats"], PLAN)) == {"norm/mean": 3, "norm/var": 5}
    for params, paths in ((PARAMS, expected), ({"params": PARAMS}, named)):
        found = widths(structure.shrunk(optax.adam(0.1).init(params), PLAN))
        assert found == {f"0/{moment}/{path}": n for path, n in paths.items() for moment in ("mu", "nu")}
    averages = structure.shrunk({"ema": variables, "step": np.zeros(5)}, PLAN)
    assert widths(averages["ema"]) == widths(structure.shrunk(variables, PLAN))
    assert averages["step"].shape == (5,)
    state = TrainState.create(apply_fn=nn.relu, params=PARAMS, tx=optax.sgd(0.1, momentum=0.9))
    state = structure.shrunk(state, PLAN)
    assert widths(state.params) == widths(state.opt_state[0].trace) == expected


def test_moments_of_some_parameters_shrink():
    labels = {"a": {"kernel": "one"}, "b": {"a": {"kernel": "other"}}}
    tx = optax.multi_transform({"one": optax.adam(0.1), "other": optax.adam(0.2)}, labels)
    found = widths(structure.shrunk(tx.init(PARAMS), PLAN))
    assert {path.partition("/mu/")[2]: n for path, n in found.items() if "/mu/" in path} == {
        "a/kernel": 3,
        "b/a/kernel": 5,
    }


def test_a_leaf_that_may_be_one_of_two_variables_is_refused():
    plan = {"params/a": {0: np.array([0])}, "stats/a": {0: np.array([1])}}
    with pytest.raises(
        InputError, match=r"^a may be that of params or stats, .* pass the collections with their names"
    ):
        structure.shrunk(ones("a"), plan)
    assert widths(structure.shrunk(ones("a"), mapped("params/a", "stats/a"))) == {"a": 3}
    some = Moments([np.ones(5), None])  # the moment of 0, and none of 1
    with pytest.raises(InputError, match=r"^mu/0 may be 0 of the plan or a part of something else, expected a tree"):
        structure.shrunk(some, mapped("0", "1"))
