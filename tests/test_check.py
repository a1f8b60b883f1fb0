"""ftlab.classroom.check: what is right passes and says so; what is wrong fails with got, wanted and the hint."""

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
        (4.5, 4.126953125, r"got 4.5, wanted 4.12695. Did you"),
        (float("nan"), 1.0, "got nan, wanted 1. Did you"),
        (1.0, float("nan"), "got 1, wanted nan"),
        (torch.ones(2), torch.ones(3), r"got shape \(2,\), wanted \(3,\). Did you"),
        (1.0, [1.0], r"got shape \(\), wanted \(1,\)"),
        ([[1, 2], [3, 9]], [[1, 2], [3, 4]], r"1 of 4 values differ; the first at \[1, 1\]: got 9, wanted 4. Did you"),
    ],
)
def test_what_is_not_close_fails_and_says_how(value, wanted, message):
    with pytest.raises(AssertionError, match=message):
        check.close(value, wanted, hint="Did you count the constants?")


def test_tolerances():
    check.close(101.0, 100.0, rtol=0.02)
    with pytest.raises(AssertionError):
        check.close(101.0, 100.0)
    with pytest.raises(AssertionError):
        check.close(1e-5, 0.0)
    check.close(1e-5, 0.0, atol=1e-4)


def test_equal(capsys):
    check.equal("NF4", "NF4")
    check.equal(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert capsys.readouterr().out == "right: 'NF4'\nright: 2 values\n"
    with pytest.raises(AssertionError, match=r"got True, wanted False. Which one\?"):
        check.equal(True, False, hint="Which one?")
    with pytest.raises(AssertionError):
        check.equal(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_shape(capsys):
    check.shape(torch.zeros(3, 4), (3, 4))
    assert capsys.readouterr().out == "right: shape (3, 4)\n"
    with pytest.raises(AssertionError, match=r"got shape \(3, 4\), wanted \(4, 3\). Transposed\?"):
        check.shape(torch.zeros(3, 4), (4, 3), hint="Transposed?")
