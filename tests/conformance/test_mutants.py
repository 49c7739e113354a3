"""Every check of the kit fails on a method with just that fault, and says so in words."""

import pytest

from hfgen.testing import adapters, callbacks, quantizers, trainers
from tests.fixtures.mutants import adapters as adapter_mutants
from tests.fixtures.mutants import callbacks as callback_mutants
from tests.fixtures.mutants import quantizers as quantizer_mutants
from tests.fixtures.mutants import trainers as trainer_mutants


def test_every_check_has_a_mutant():
    assert set(adapter_mutants.MUTANTS) == set(adapters.CHECKS)
    assert set(callback_mutants.MUTANTS) == set(callbacks.CHECKS)
    assert set(quantizer_mutants.MUTANTS) == set(quantizers.CHECKS)
    assert set(trainer_mutants.MUTANTS) == set(trainers.CHECKS)


@pytest.mark.parametrize("check", adapters.CHECKS)
def test_the_check_finds_its_mutant_adapter(check):
    config_cls, words = adapter_mutants.MUTANTS[check]
    with pytest.raises(Exception, match=words):
        adapters.CHECKS[check](adapters.AdapterCase(config_cls))


@pytest.mark.parametrize("check", callbacks.CHECKS)
def test_the_check_finds_its_mutant_callback(check):
    callback_cls, card, words = callback_mutants.MUTANTS[check]
    with pytest.raises(Exception, match=words):
        callbacks.CHECKS[check](callbacks.CallbackCase(callback_cls, card))


@pytest.mark.parametrize("check", callbacks.CHECKS)
def test_the_check_passes_a_healthy_callback(check):
    """With hooks, a tensor in its state and a model with dropout."""
    callbacks.CHECKS[check](callbacks.CallbackCase(*callback_mutants.HEALTHY))


@pytest.mark.parametrize("check", trainers.CHECKS)
def test_the_check_finds_its_mutant_trainer(check):
    trainer_cls, card, words = trainer_mutants.MUTANTS[check]
    with pytest.raises(AssertionError, match=words):
        trainers.CHECKS[check](trainers.TrainerCase(trainer_cls, card))


@pytest.mark.parametrize("check", quantizers.CHECKS)
def test_the_check_finds_its_mutant_quantizer(check):
    config_cls, words = quantizer_mutants.MUTANTS[check]
    with pytest.raises(Exception, match=words):
        quantizers.CHECKS[check](quantizers.QuantizerCase(config_cls))
