"""ftlab.classroom.check: what is right passes and says so; what is wrong fails with got, wanted and the hint."""

from contextlib import nullcontext

import pytest
import torch

from ftlab.classroom import check


def test_what_is_close_is_right(capsys):
    check.close(4.1269531, 4.126953125)
    check.close([1, 2.00001], torch.tensor([1.0, 2.0]))
    check.close(torch.tensor([3.0], requires_grad=True), torch.tensor([3.0]))
    assert capsys.readouterr().out == ("right: 4.12695\nright: 2 values of shape (2,)\nright: 1 values of shape (1,)\n")


@pytest.mark.parametrize(
    ("value", "wanted", "message"),
    [
        (4.5, 4.126953125, "got 4.5, wanted 4.12695"),
        (float("nan"), 1.0, "got nan, wanted 1"),
        (1.0, float("nan"), "got 1, wanted nan"),
        (torch.ones(2), torch.ones(3), "got shape (2,), wanted (3,)"),
        (1.0, [1.0], "got shape (), wanted (1,)"),
        ([[1, 2], [3, 9]], [[1, 7], [3, 4]], "2 of 4 values differ; the first at [0, 1]: got 2, wanted 7"),
    ],
)
def test_what_is_not_close_fails_and_says_how(value, wanted, message):
    for hint in ("", "Did you count the constants?"):
        with pytest.raises(AssertionError) as failed:
            check.close(value, wanted, hint=hint)
        assert str(failed.value) == f"{message}. {hint}".rstrip()


TOLERANCES = [  # got, wanted, rtol and atol, right
    (1.00005, 1.0, {}, True), (1.0002, 1.0, {}, False), (-1.00005, -1.0, {}, True), (-1.0002, -1.0, {}, False),
    (0.5, 1.0, {}, False), (9e-7, 0.0, {}, True), (1.5e-6, 0.0, {}, False), (101.0, 100.0, {"rtol": 0.02}, True),
    (100.0, 50.0, {"rtol": 0.6}, False),  # a share of what is wanted
]  # fmt: skip


@pytest.mark.parametrize(("got", "wanted", "rtol", "right"), TOLERANCES)
def test_how_far_is_close(got, wanted, rtol, right):
    with nullcontext() if right else pytest.raises(AssertionError):
        check.close(got, wanted, **rtol)


def test_the_smallest_differences():
    check.close(0.1, 0.1, rtol=0, atol=0)
    check.close(1e-5, 0.0, atol=1e-4)
    with pytest.raises(AssertionError):
        check.close(2**24 + 1, 2**24, rtol=0, atol=0.5)  # in float32 they are equal
