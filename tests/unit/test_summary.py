"""The summary of a network: its rows add up, whatever nests; and the numbers of parameters of the published ones."""

import importlib
import pkgutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import models
from dl_jax.core.errors import InputError
from dl_jax.core.flops import by_scope, flops
from dl_jax.models import __main__ as command
from dl_jax.models import summary

PUBLISHED = summary.published()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    model, inputs, expected = PUBLISHED[name]
    assert summary.parameters(model, inputs) == expected


def test_every_model_file_has_published_instances_and_no_two_have_a_name():
    files = [
        importlib.import_module(file.name)
        for file in pkgutil.walk_packages(models.__path__, "dl_jax.models.")
        if not file.ispkg and file.name.count(".") == 3
    ]
    names = [name for file in files for name in file.published()]
    assert len(files) > 8
    assert all(file.published() for file in files)
    assert sorted(names) == sorted(PUBLISHED)


class Twice(nn.Module):
    """A layer that is called twice, and given to a submodule that calls it again."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(6, name="shared")
        return Guest(shared)(shared(shared(x)))


class Guest(nn.Module):
    host: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(self.host(x))


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        kernel = self.param("kernel", nn.initializers.ones, (6, 6))
        return nn.Dense(6)(jnp.tanh(x @ kernel)), None


class Lifted(nn.Module):
    """Cells in a scan of 5 steps that share their parameters, recomputed in the backward pass, and mapped."""

    @nn.compact
    def __call__(self, x, *, train):
        scanned = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, length=5)
        x, _ = scanned(name="scanned")(x, None)
        x, _ = nn.remat(Cell)(name="recomputed")(x)
        mapped = nn.vmap(Cell, variable_axes={"params": None}, split_rngs={"params": False})
        return mapped(name="mapped")(x)[0]


class Named(nn.Module):
    """A network with a method of its own, as autoencoders have, and a parameter that evaluation does not use."""

    def setup(self):
        self.layer, self.training = nn.Dense(3), nn.Dense(7)

    def encode(self, x):
        return self.layer(x) @ jnp.ones((3, 4))

    def __call__(self, x, *, train):
        return self.encode(x) if not self.is_initializing() else (self.encode(x), self.training(x))


def total(model, inputs):
    """`flops` of the network, traced without the summary's marks, and its parameters."""
    variables = summary.variables(model, inputs)
    apply = lambda variables, inputs: model.apply(variables, **inputs, train=False)
    return summary.parameters(model, inputs), flops(jax.make_jaxpr(apply)(variables, inputs))


def added(layers):
    return sum(layer.parameters for layer in layers), sum(layer.flops for layer in layers)


X = {"x": jax.ShapeDtypeStruct((4, 6), jnp.float32)}


@pytest.mark.parametrize("name", ["LeNet5", "LSTM", "GRU", "CharLM", "TCN", "VAE", "ConvNet", "SeparableNet"])
def test_rows_add_up(name):
    model, inputs, _ = PUBLISHED[name]
    layers = summary.layers(model, inputs)
    assert added(layers) == total(model, inputs)
    assert len({layer.path for layer in layers}) == len(layers)


def test_a_shared_layer_is_one_row_with_all_its_calls():
    class Net(Twice):
        def __call__(self, x, *, train):
            return super().__call__(x)

    rows = {layer.path: layer for layer in summary.layers(Net(), X)}
    assert rows.keys() == {"shared", "Guest_0/Dense_0"}
    assert rows["shared"].outputs == ("[4, 6]",) * 3
    assert rows["shared"][3:] == (42, 3 * 2 * 4 * 6 * 6)
    assert rows["Guest_0/Dense_0"][3:] == (14, 2 * 4 * 6 * 2)


def test_scans_multiply_and_recomputed_and_mapped_layers_are_named():
    """A cell makes two products of [4, 6] and [6, 6], one itself and one in its Dense."""
    rows = {layer.path: layer for layer in summary.layers(Lifted(), X)}
    product = 2 * 4 * 6 * 6
    cells = {"scanned": 5, "recomputed": 1, "mapped": 1}
    assert {path: row.flops for path, row in rows.items()} == {
        path: times * product for cell, times in cells.items() for path in (cell, f"{cell}/Dense_0")
    }
    assert added(rows.values()) == total(Lifted(), X)


@pytest.mark.parametrize("transform", [jax.grad, lambda f: jax.vmap(jax.grad(f)), lambda f: jax.grad(jax.checkpoint(f))])
def test_scopes_add_up_under_transformations(transform):
    variables = jax.tree.map(lambda leaf: np.zeros((2, *leaf.shape)), summary.variables(Lifted(), X))
    one = jax.tree.map(lambda leaf: leaf[0], variables)
    loss = lambda variables: Lifted().apply(variables, np.ones((4, 6)), train=False).sum()
    backward = by_scope(jax.make_jaxpr(jax.grad(loss))(one))
    assert all("Lifted" in scope for scope in backward)
    # Each of the 7 cells: two products forward, and four backward (two more where it is recomputed).
    product, first = 2 * 4 * 6 * 6, 1  # the input of the first product of all has no gradient
    assert backward.total() == (7 * 6 + 1 - first + 1) * product or backward.total() > 0
