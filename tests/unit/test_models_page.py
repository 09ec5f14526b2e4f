"""The tables of docs/models.md are what is computed."""

import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dl_jax.models import __main__ as command

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `jax\.nn\.(\w+)` \| ([\[(])(\S+), (\S+)\) \| (\S+) \| (\S+) \|$", PAGE, re.M)


GRID = np.linspace(-30, 30, 600_001).astype(np.float32)


def number(text):
    return float(text.replace("∞", "inf"))


def computed(name):
    """(values, derivatives) on a grid, and the derivative at 0."""
    function = getattr(jax.nn, name)
    both = jax.jit(lambda x: (function(x), jax.vmap(jax.grad(function))(x), jax.grad(function)(0.0)))
    return jax.device_get(both(GRID))


def test_the_page_has_the_seven_activations():
    names = ["sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "silu"]
    assert [row[0] for row in ROWS] == names


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_ranges_and_derivatives_of_activations(row):
    name, closed, low, high, at_zero, largest = row
    values, slopes, slope = computed(name)
    for stated, end in ((number(low), values.min()), (number(high), values.max())):
        if math.isinf(stated):  # it grows without bound: by a slope at the end of the grid
            assert abs(end) > 0.009 * 30
        else:
            assert end == pytest.approx(stated, abs=5e-5)
    # An end that is reached is reached well inside the grid; sigmoid, tanh and ELU only round to theirs far out.
    near = values[abs(GRID) < 4]
    assert (closed == "[") == (not math.isinf(number(low)) and near.min() == values.min())
    assert float(slope) == pytest.approx(number(at_zero), abs=5e-5)
    assert slopes.max() == pytest.approx(number(largest), abs=5e-5)


def test_the_example_of_a_summary(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models", "ConvNet"])
    assert command.main() == 0
    example = re.search(r"^\$ python -m dl_jax\.models ConvNet\n(.*?)^```", PAGE, re.M | re.S)
    assert example
    words = lambda text: [line.split() for line in text.splitlines() if line.strip()]
    assert words(example[1]) == words(capsys.readouterr().out)
