"""What a field of a Config may hold: ends of ranges, NaN, nested tuples. The command line reads the plain types."""

import dataclasses
import math
from typing import Annotated

import pytest
import tyro

from dl_jax.core.errors import InputError
from dl_jax.harness.fields import Between, Distinct, Fraction, NonNegative, Positive, Probability, Some, check


@dataclasses.dataclass(frozen=True)
class Config:
    steps: Positive[int] = 1
    rate: Positive[float] = 0.1
    weight: NonNegative[float] = 0.0
    dropout: Probability = 0.0
    kept: Fraction = 1.0
    bits: Annotated[int, Between(2, 8)] = 8
    hidden: Some[Positive[int]] = (3,)
    rounds: Distinct[NonNegative[int]] = (0, 1)
    stages: Some[tuple[Positive[int], Positive[float]]] = ((1, 0.1),)
    pair: tuple[Fraction, Fraction] = (1.0, 0.5)
    name: str = "free"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"weight": 1e9, "dropout": 0.999, "kept": 1e-9, "bits": 2, "rate": math.inf},
        {"hidden": (1, 1), "stages": ((1, 0.1), (2, 1e-9))},
    ],
)
def test_what_is_allowed_passes(fields):
    check(Config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "--steps is 0, expected more than 0"),
        ({"rate": 0.0}, "--rate is 0.0, expected more than 0"),
        ({"rate": math.nan}, "--rate is nan, expected more than 0"),
        ({"weight": -1e-9}, "--weight is -1e-09, expected at least 0"),
        ({"dropout": 1.0}, "--dropout is 1.0, expected at least 0 and less than 1"),
        ({"dropout": -0.1}, "--dropout is -0.1, expected at least 0 and less than 1"),
        ({"kept": 0.0}, "--kept is 0.0, expected more than 0 and at most 1"),
        ({"bits": 1}, "--bits is 1, expected at least 2 and at most 8"),
        ({"bits": 9}, "--bits is 9, expected at least 2 and at most 8"),
        ({"hidden": ()}, "--hidden is (), expected 1 or more values"),
        ({"hidden": (3, 0)}, "--hidden is (3, 0), which holds 0, expected more than 0"),
        ({"rounds": (1, 1)}, "--rounds is (1, 1), expected each value once"),
        (
            {"stages": ((1, 0.1), (1, -0.1))},
            "--stages is ((1, 0.1), (1, -0.1)), which holds -0.1, expected more than 0",
        ),
        ({"pair": (1.0, 2.0)}, "--pair is (1.0, 2.0), which holds 2.0, expected more than 0 and at most 1"),
    ],
)
def test_what_is_not_is_one_line_with_the_flag_and_the_value(fields, message):
    with pytest.raises(InputError) as raised:
        check(Config(**fields))
    assert str(raised.value) == f"{message}; change it"


def test_the_command_line_reads_the_plain_types():
    flags = ["--steps", "7", "--dropout", "0.5", "--hidden", "3", "4", "--stages", "1", "0.1", "2", "0.2"]
    parsed = tyro.cli(Config, args=flags)
    assert parsed == Config(steps=7, dropout=0.5, hidden=(3, 4), stages=((1, 0.1), (2, 0.2)))
