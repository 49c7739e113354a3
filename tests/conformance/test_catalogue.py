"""The kit over everything this distribution installs (the same tests a stranger runs with --pyargs hfgen.testing)."""

from hfgen.testing.test_conformance import pytest_generate_tests, test_conformance

__all__ = ["pytest_generate_tests", "test_conformance"]
