"""Poisson samples: every record by itself, a function of the step, and never shortened."""

import numpy as np
import pytest
import scipy.stats

from dl_jax import data
from dl_jax.core.errors import InputError

RECORDS = {"x": np.arange(40)}


def test_every_record_is_drawn_with_the_rate_and_independently_of_the_others():
    stream = data.poisson(RECORDS, 10, 0)
    seen = np.zeros((4000, 40))
    for step in range(len(seen)):
        batch = stream(step)
        drawn = batch["x"][batch["mask"] > 0]
        assert len(set(drawn)) == len(drawn)
        seen[step, drawn] = 1
    np.testing.assert_allclose(seen.mean(0), 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 4000))
    correlations = np.corrcoef(seen.T)[~np.eye(40, dtype=bool)]
    np.testing.assert_allclose(correlations, 0, atol=5 / np.sqrt(4000))
    sizes = seen.sum(1)  # binomial: shuffled batches would all have ten
    np.testing.assert_allclose(sizes.var(), 40 * 0.25 * 0.75, rtol=0.15)


def test_a_batch_depends_on_seed_and_step_alone_and_rows_are_its_parts():
    stream = data.poisson(RECORDS, 10, (0, 1))
    whole = stream(3)
    assert whole["x"].shape == whole["mask"].shape == (2, stream.batch_size)
    assert (whole["x"][0] != whole["x"][1]).any()
    assert (stream(4)["x"] != whole["x"]).any()
    again, part = data.poisson(RECORDS, 10, 1)(3), stream(3, slice(4, 8))
    for name in ("x", "mask"):
        np.testing.assert_array_equal(again[name], whole[name][1])
        np.testing.assert_array_equal(part[name], whole[name][:, 4:8])


def test_a_sample_that_exceeds_the_capacity_is_refused_and_never_shortened():
    free, tight = data.poisson(RECORDS, 10, 0), data.poisson(RECORDS, 10, 0, capacity=12)
    sizes = [int(free(step)["mask"].sum()) for step in range(50)]
    assert min(sizes) < 12 < max(sizes)
    for step, size in enumerate(sizes):
        if size <= 12:
            assert tight(step)["mask"].sum() == size
        else:
            with pytest.raises(InputError, match=f"step {step} of seed 0 draws {size} records, expected at most 12"):
                tight(step)


@pytest.mark.parametrize(("n", "batch_size"), [(60_000, 600), (60_000, 2400), (1000, 100), (40, 10), (5, 5)])
def test_the_capacity_is_hardly_ever_exceeded(n, batch_size):
    """The bound holds, and is not so loose that a tenth of the capacity would be saved."""
    rows = data.capacity_for(n, batch_size)
    exact = lambda rows: scipy.stats.binom.sf(rows, n, batch_size / n)
    assert exact(rows) <= data.overflow(n, batch_size, rows) <= 1e-12
    assert rows == n or exact(0.9 * rows) > 1e-12
    for some in (batch_size, int(1.1 * batch_size), n - 1, n):
        assert exact(some) <= data.overflow(n, batch_size, some)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 50}, "50 of 40 records on average are a sampling rate of 1.25, expected at most 1"),
        ({"batch_size": 0}, "batch size 0: expected 1 or more"),
        ({"seeds": -1}, "seed -1: expected 0 or more"),
        ({"capacity": 9}, "capacity is 9, expected 10 or more, the records of a batch on average"),
        ({"records": {"mask": np.ones(20)}}, "the records have a column 'mask', expected none"),
    ],
)
def test_bad_input_is_a_line(given, message):
    with pytest.raises(InputError, match=message):
        data.poisson(**{"records": RECORDS, "batch_size": 10, "seeds": 0, **given})
