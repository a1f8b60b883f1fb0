"""ftlab.classroom.clock: medians of calls that take turns, and the arithmetic of a product."""

import time

import pytest
import torch

from ftlab.classroom.clock import flops, in_turns


def test_calls_take_turns_and_the_median_counts():
    seen = []

    def call(name: str, seconds: float):
        return lambda: (seen.append(name), time.sleep(seconds if len(seen) > 2 else 0.2))

    ms = in_turns({"long": call("long", 0.02), "short": call("short", 0.005)}, repeats=3)
    assert seen == ["long", "short"] * 4  # one round more than counts: the first, slow one is left out
    assert 20 <= ms["long"] < 200 and 5 <= ms["short"] < ms["long"]


def test_the_arithmetic_of_a_product_by_hand():
    """(3, 4) @ (4, 5): 60 multiplications and 60 additions; backward, two products of the same size."""
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert flops(lambda: a @ b) == 120
    assert flops(lambda: (a @ b).sum().backward()) == pytest.approx(360)
