"""Marks for single cases of a test."""

from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)
"""A case that `make test` leaves out: it shows again what a quicker one shows."""
