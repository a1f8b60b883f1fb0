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
    """The same for one value and for the values of a property."""
    for compare in (
        lambda: check.close(got, wanted, **rtol),
        lambda: check.property(lambda: got, lambda: wanted, tuple, **rtol),
    ):
        with nullcontext() if right else pytest.raises(AssertionError):
            compare()


def test_the_smallest_differences():
    check.close(0.1, 0.1, rtol=0, atol=0)
    check.close(1e-5, 0.0, atol=1e-4)
    with pytest.raises(AssertionError):
        check.close(2**24 + 1, 2**24, rtol=0, atol=0.5)  # in float32 they are equal


def test_equal(capsys):
    check.equal(["NF4", 4], ["NF4", 4])
    check.equal(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert capsys.readouterr().out == "right: ['NF4', 4]\nright: 2 values\n"
    with pytest.raises(AssertionError, match=r"got True, wanted False. Which one\?"):
        check.equal(True, False, hint="Which one?")
    with pytest.raises(AssertionError):
        check.equal(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_property_catches_a_right_value_by_a_wrong_road(capsys):
    def draw():
        return torch.randint(1, 9, ()).item(), torch.randn(3)

    check.property(lambda n, x: n * x, lambda n, x: x * n, draw, trials=7)
    check.property(lambda n, x: n * x, lambda n, x: x * n, draw)
    assert capsys.readouterr().out == "right: 7 fresh inputs\nright: 50 fresh inputs\n"
    with pytest.raises(AssertionError, match=r"fresh input 1, \(\d, tensor.*got .*, wanted .*Did you multiply\?"):
        check.property(lambda n, x: n + x, lambda n, x: n * x, draw, hint="Did you multiply?")
    with pytest.raises(AssertionError, match=r"fresh input \d+, \(2\): got 4.0, wanted 8.0"):  # x² = x³ for 1 only
        check.property(lambda x: x**2, lambda x: x**3, lambda: (torch.randint(1, 3, ()).item(),))
    with pytest.raises(AssertionError, match=r"got \[(.*)\], wanted \1"):  # another shape, the same number
        check.property(lambda x: x.view(1), lambda x: x, lambda: (torch.randn(()),))


def test_property_draws_the_same_inputs_and_leaves_torch_alone():
    drawn = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        check.property(lambda x: x, lambda x: x, lambda: (drawn.append(x := torch.randn(())) or x,), trials=4)
    assert drawn[:4] == drawn[4:] and len({x.item() for x in drawn}) == 4
    after = torch.rand(1)
    assert torch.equal(after, torch.rand(1, generator=torch.Generator().manual_seed(4)))
