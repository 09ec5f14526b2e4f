"""The summary of a network: its rows add up, whatever nests; and the numbers of parameters of the published ones."""

import importlib
import pkgutil
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import models
from dl_jax.core.flops import by_scope, flops
from dl_jax.models import __main__ as command
from dl_jax.models import summary

PUBLISHED = summary.published()


# Those take seconds to trace, and a smaller one of the same class is checked always.
DEEP = ("ResNet32", "ResNet44", "ResNet56", "ResNet110", "ResNet34", "ResNet101", "ResNet152", "MobileNetV2_140")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in DEEP)) for n in PUBLISHED])
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
    assert all(name.isidentifier() for name in names)  # typed on the command line as one word


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


@pytest.mark.parametrize(
    "name", ["LeNet5", "LSTM", "GRU", "CharLM", "TCN", "VAE", "ConvNet", "SmallMobileNet", "CharGPT", "RNNsearch"]
)
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


@pytest.mark.parametrize("seeds", [None, 3])
def test_scopes_of_a_gradient_are_those_of_the_layers(seeds):
    """A cell makes two products and four in its gradient; one of them is computed again where it is recomputed."""
    shapes = summary.variables(Lifted(), X)
    loss = lambda variables: Lifted().apply(variables, np.ones((4, 6), np.float32), train=False).sum()
    gradient = jax.grad(loss)
    if seeds:
        gradient = jax.vmap(gradient)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype), shapes)
    found = by_scope(jax.make_jaxpr(gradient)(shapes))
    product, cells = (seeds or 1) * 2 * 4 * 6 * 6, ("scanned", "recomputed", "mapped")
    assert {cell: sum(n for scope, n in found.items() if cell in scope) for cell in cells} == {
        "scanned": 5 * 6 * product,
        "recomputed": 7 * product,
        "mapped": 6 * product,
    }


def run(monkeypatch, capsys, *arguments):
    """(exit status, output, errors) of the command."""
    monkeypatch.setattr(sys, "argv", ["models", *arguments])
    status = command.main()
    return status, *capsys.readouterr()


def test_the_command_lists_all_models(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys)
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert status == 0
    assert ["LeNet5", "image", "[1,", "28,", "28,", "1]", "60,000"] in rows
    assert {row[0] for row in rows} >= PUBLISHED.keys()


def test_the_command_prints_the_layers_and_their_totals(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "LeNet300", "--batch-size", "2")
    assert status == 0
    assert [line.split() for line in out.splitlines() if line.strip() and "─" not in line] == [
        ["LeNet300", "MLP", "image", "[2,", "28,", "28,", "1]", "parameters", "FLOPs"],
        ["Dense_0", "Dense", "[2,", "300]", "235,500", "940,800"],
        ["Dense_1", "Dense", "[2,", "100]", "30,100", "120,000"],
        ["Dense_2", "Dense", "[2,", "10]", "1,010", "4,000"],
        ["total", "266,610", "1,064,800"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["LeNet"], "there is no model 'LeNet', expected one of AttentionClassifier, AutoRec, ChainTagger, "),
        (["LeNet5", "--batch-size", "0"], "the batch size is 0, expected 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, arguments, message):
    status, out, errors = run(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_a_summary_compiles_nothing(compilations):
    """The batch size is one that no other test has, so that an operation would have to be compiled."""
    model, inputs, _ = PUBLISHED["SmallMobileNet"]
    assert summary.layers(model, summary.with_batch(inputs, 23))
    assert not compilations
    jnp.ones((23, 28, 28, 1))
    assert compilations
