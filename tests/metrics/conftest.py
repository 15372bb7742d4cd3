"""What holds for the tests of every metric."""

import warnings

import pytest


@pytest.fixture
def no_warnings():
    """Degenerate input is answered with a defined value, not with a warning on every evaluation."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
