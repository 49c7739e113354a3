"""The integer program against brute force; its refusals."""

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfgen.kit.allocation import FLOOR, allocate


def brute(costs, sizes, average_bits):
    """(least cost, all choices that have it within 1e-9)."""
    budget = math.floor(average_bits * sum(sizes.values()) * (1 + 1e-12))
    names = list(costs)
    choices = [
        (math.fsum(max(costs[n][b], FLOOR) for n, b in zip(names, bits, strict=True)), bits)
        for bits in itertools.product(*[costs[n] for n in names])
        if sum(b * sizes[n] for n, b in zip(names, bits, strict=True)) <= budget
    ]
    return min(choices, default=(None, None))[0]


# Few values, so that ties are common; and any size of number.
VALUES = st.sampled_from([-1.0, 0.0, 1e-6, 1e-4, 0.25, 0.5, 1.0]) | st.floats(-1e-3, 1e3)


@st.composite
def problems(draw):
    layers = draw(st.integers(1, 8))
    levels = draw(st.integers(3, 5 if layers < 7 else 3))
    widths = sorted(draw(st.permutations([2, 3, 4, 5, 6, 8]))[:levels])
    names = [f"layer.{i}" for i in range(layers)]
    sizes = {n: draw(st.sampled_from([1, 7, 64 * 64, 64 * 192, 4096 * 11008])) for n in names}
    costs = {n: {b: draw(VALUES) for b in widths} for n in names}
    average = draw(st.floats(widths[0] * 0.9, widths[-1] * 1.05))
    return costs, sizes, average


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_brute_force(problem):
    costs, sizes, average = problem
    want = brute(costs, sizes, average)
    if want is None:
        with pytest.raises(ValueError, match="take at least"):
            allocate(costs, sizes, average)
        return
    found = allocate(costs, sizes, average)
    assert sum(found[n] * sizes[n] for n in sizes) <= average * sum(sizes.values()) * (1 + 1e-12)
    assert math.fsum(max(costs[n][b], FLOOR) for n, b in found.items()) == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_greedy_by_ratio_is_not_enough():
    """The best ratio of gain to bits goes first in a greedy choice, and then the large gain does not fit."""
    costs = {"a": {2: 1.1, 3: 0.0}, "b": {2: 10.0, 3: 0.0}}
    assert allocate(costs, {"a": 1, "b": 10}, 2 + 10 / 11) == {"a": 2, "b": 3}


def test_negative_costs_are_noise():
    """As they stand, the two negative costs would win 2 bits; clamped to 1e-6 they are no better than the others."""
    costs = {"a": {2: -5.0, 4: -9.0}, "b": {2: 0.5, 4: 0.0}}
    assert allocate(costs, {"a": 1, "b": 1}, 3.0) == {"a": 2, "b": 4}


def test_a_dear_width_does_not_blunt_the_others():
    """A cost of 1e12 beside differences of 1e-5, below the solver's tolerance relative to it."""
    costs = {"a": {2: 1e12, 3: 3e-5, 4: 1e-5}, "b": {2: 1e12, 3: 2e-5, 4: 1e-5}}
    assert allocate(costs, {"a": 1, "b": 1}, 3.5) == {"a": 4, "b": 3}


def test_a_large_model_takes_seconds():
    names = [f"l{i}" for i in range(600)]
    costs = {n: {b: (1 + i % 13) * 4.0**-b for b in (2, 3, 4, 8)} for i, n in enumerate(names)}
    sizes = {n: (4096 * 4096, 4096 * 11008)[i % 2] for i, n in enumerate(names)}
    start = time.monotonic()
    found = allocate(costs, sizes, 3.25)
    assert time.monotonic() - start < 20
    assert 3.24 < sum(found[n] * sizes[n] for n in names) / sum(sizes.values()) <= 3.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"average_bits": 1.9}, "average_bits is 1.9, but .* at least 2 bits a weight; give that or more, or offer"),
        ({"average_bits": float("nan")}, "average_bits is nan; give a finite number"),
        ({"sizes": {"a": 1}}, r"costs has 2 layers and sizes 1 \(b\); give both the same"),
        ({"costs": {}, "sizes": {}}, "costs has 0 layers"),
        ({"costs": {"a": {2: float("inf")}, "b": {2: 1.0}}}, "the cost of 'a' at 2 bits is inf; leave that width out"),
        ({"costs": {"a": {}, "b": {2: 1.0}}}, "layer 'a' has 0 widths"),
    ],
)
def test_refusals(change, words):
    given_ = {"costs": {"a": {2: 1.0, 4: 0.0}, "b": {2: 1.0}}, "sizes": {"a": 3, "b": 1}, "average_bits": 3.0}
    with pytest.raises(ValueError, match=words):
        allocate(**(given_ | change))
    with pytest.raises(TypeError, match="average_bits is '3'"):
        allocate(**(given_ | {"average_bits": "3"}))
