"""Digits that are turned, and what is measured of ensembles on them, by hand."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def rotated(load_experiment):
    return load_experiment("vision/rotated")


def test_turns(rotated):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    np.testing.assert_array_equal(rotated.turned(images, 0.0), images)
    np.testing.assert_array_equal(rotated.turned(images, 90.0), np.rot90(images, axes=(1, 2)))
    np.testing.assert_array_equal(rotated.turned(images, 180.0), images[:, ::-1, ::-1])


def test_what_is_measured_of_two_members(rotated):
    """Two seeds: members that are sure and agree, and two of which one is wrong about the second image."""
    sure, other = np.eye(2), np.array([[1.0, 0.0], [1.0, 0.0]])
    found = rotated.judged(np.stack([[sure, sure], [sure, other]]), np.array([0, 1]))
    assert found["disagreement"].tolist() == [0, 0.5]
    assert found["error/member"].tolist() == [0, 0.25]
    assert found["error/ensemble"].tolist() == [0, 0.5]  # of equal probabilities the first class is the answer
    np.testing.assert_allclose(found["calibration_error/member"], [0, (0 + 0.5) / 2], atol=1e-6)
    # The ensemble gives the second image 1/2 for both classes: in the bin of 1/2, one of each is right about half.
    np.testing.assert_allclose(found["calibration_error/ensemble"], [0, 0.25], atol=1e-6)
