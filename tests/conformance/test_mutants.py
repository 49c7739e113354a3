"""Every check of the kit fails on a method with just that fault, and says so in words."""


import pytest

from hfgen.testing import adapters
from tests.fixtures.mutants import adapters as mutants


def test_every_check_has_a_mutant():
    assert set(mutants.MUTANTS) == set(adapters.CHECKS)


@pytest.mark.parametrize("check", adapters.CHECKS)
def test_the_check_finds_its_mutant(check):
    config_cls, words = mutants.MUTANTS[check]
    with pytest.raises(Exception, match=words):
        adapters.CHECKS[check](adapters.AdapterCase(config_cls))
