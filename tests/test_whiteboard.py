"""ftlab.exercises.whiteboard: every problem against a formula of ftlab or a library, with many numbers; the board."""

import functools
import itertools
import math
import random
import re
from collections.abc import Iterator

import ipywidgets
import numpy as np
import pytest
import torch
from scipy.stats import norm
from shown import VIEW, Page, displayed, named, page_of, visible

from ftlab import memory
from ftlab.classroom import progress
from ftlab.classroom.quiz import Question
from ftlab.exercises import whiteboard
from ftlab.exercises.whiteboard import PROBLEMS
from ftlab.scratch import lora, losses, rl
from notebooks import CELLS, worked_out


def problem(name: str, seed: int) -> Question:
    return PROBLEMS[name](random.Random(seed))


SEEDS = range(25)


def given(text: str) -> list[float]:
    """The numbers of a problem's text, in their order."""
    return [float(found.replace(",", "")) for found in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text)]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- Oracles: from the text of a problem alone to its answer ----------------------------------------------------------


def adapter(text):
    return trained(*map(int, given(text)))


def trained(wide: int, tall: int, r: int) -> int:
    layer = lora.LoRALinear(torch.nn.Linear(wide, tall, bias=False, device="meta"), r=r, lora_alpha=r)
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


def grouped_query(text):
    model, layers, heads, kv, wide, r = map(int, given(text))
    return layers * (trained(model, heads * wide, r) + trained(model, kv * wide, r))


def step_flops(text):
    n, r = map(int, given(text))
    return (2 * n**2 + 6 * n * r) / (3 * n**2)


@functools.cache
def state_bytes() -> tuple[int, float]:
    """Bytes a parameter, in fp32 as the adapter and the master copy are, and of its moments, on a real optimizer."""
    weight = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moments = sum(s.nbytes for s in optimizer.state[weight].values() if s.numel() == 1000) / 1000
    return weight.element_size(), moments


def training_states(text):
    numbers, (size, moments) = given(text), state_bytes()
    lora_only = text.startswith("LoRA")
    base, trained = (numbers[1] * 1000, numbers[0]) if lora_only else (0, numbers[0] * 1000)
    each = size + moments + (size if lora_only else 2 + 2)  # fp32, or bf16 twice
    return (2 * base + each * trained) / 1000


def bits_a_weight(text):
    block = int(given(text)[0])
    return 4 + (8 / block + 32 / (256 * block) if "double" in text else 32 / block)


def quantized_weights(text):
    linear, bits, rows, width = given(text)
    assert abs(bits - 4.126953125) < 1e-4
    table = torch.empty(int(rows), int(width), dtype=torch.bfloat16, device="meta")
    return linear * 4.126953125 / 8 + 2 * table.nbytes / 1e9


def reward_model(text):
    chosen, rejected = given(text)
    return losses.reward_loss(tensor(chosen), tensor(rejected)).item()


def preference(text):
    *logps, beta = given(text)
    return losses.dpo_loss(*(tensor(value) for value in logps), beta=beta).item()


def odds_ratio(text):
    chosen, rejected, lam = given(text)
    return losses.orpo_loss(-tensor(chosen).log(), tensor(chosen).log(), tensor(rejected).log(), lam=lam).item()


def thumb(text):
    ratio, z0, beta = given(text)[0], *map(float, re.findall(r"= (\d+(?:\.\d+)?)[,.]", text))
    up = torch.tensor(["thumbs-up" in text])
    return losses.kto_loss(tensor(math.log(ratio)), tensor(0), up, tensor(z0), beta=beta).item()


def generalised_advantage(text):
    r1, r2, v1, v2, gamma, lam = given(text)
    return rl.gae(tensor(r1, r2)[None], tensor(v1, v2)[None], torch.ones(1, 2), gamma, lam)[0][0, 0].item()


def group_baseline(text):
    return 4 / 3 * rl.group_advantages(tensor(*given(text)), 4, "none")[0].item()


def clipped_loss(text):
    ratio, advantage, clip_eps = given(text)
    mask = torch.ones(1, 1)
    return rl.ppo_loss(tensor(math.log(ratio))[None], tensor(0)[None], tensor(advantage)[None], mask, clip_eps).item()


def rate_interval(text):
    """Half the central 95 % of a normal distribution with the spread of a mean of n zeros and ones."""
    share, n = given(text)[:2]
    ones = np.repeat([1.0, 0.0], [round(share * n / 100), n - round(share * n / 100)])
    return 100 * norm.interval(0.95, scale=ones.std() / math.sqrt(n))[1]


def hours(text):
    """A clock that counts seconds, an epoch at a time."""
    rows, tokens, epochs, speed = given(text)
    seconds = 0.0
    for _ in range(int(epochs)):
        seconds += rows * tokens / speed
    return seconds / 3600


def break_even(text):
    """The number of calls whose savings reach the cost, by bisection."""
    cost, saved, price = given(text)
    low, high = 0.0, 1e9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if middle * saved * price / 1e6 >= cost else (middle, high)
    return low


def sharded_states(text):
    """Bytes counted part by part: weights 2, gradients 2, master 4, moments 4 and 4; ZeRO's table 1 of what is cut."""
    billions, stage, cards = (float(found) for found in re.findall(r"(?<=of )[\d.]+|(?<=ZeRO-)\d|\d+(?= cards)", text))
    cut_from = {"weights": 3, "gradients": 2, "master": 1, "first moment": 1, "second moment": 1}
    size = {"weights": 2, "gradients": 2, "master": 4, "first moment": 4, "second moment": 4}
    return sum(size[part] * billions / (cards if stage >= cut_from[part] else 1) for part in size)


def harmonic(text):
    """From single tickets, as an F1 is counted."""
    right, invented, missed = map(int, given(text)[:3])
    wanted = [True] * right + [False] * invented + [True] * missed
    found = [True] * right + [True] * invented + [False] * missed
    both = sum(w and f for w, f in zip(wanted, found, strict=True))
    return 2 * both / (sum(wanted) + sum(found))


ORACLES = dict(zip(PROBLEMS, (
    adapter, grouped_query, step_flops, training_states, bits_a_weight, quantized_weights, reward_model, preference,
    odds_ratio, thumb, generalised_advantage, group_baseline, clipped_loss, rate_interval, hours, break_even,
    sharded_states, harmonic,
), strict=True))  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_answer_is_the_formulas(name):
    for seed in SEEDS:
        question = problem(name, seed)
        assert question.answer == pytest.approx(ORACLES[name](question.text), rel=1e-4), question.text


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_working_ends_in_a_number_that_is_graded_right_and_slips_are_not(name):
    for seed in SEEDS:
        question = problem(name, seed)
        last = given(question.whys[0].replace("(-", "( -"))[-1]
        assert question.grade(repr(last))[0], (question.whys, question.answer)
        assert question.wrong
        for value, _ in question.wrong:
            verdict, said = question.grade(repr(value))
            assert not verdict and said in [other for _, other in question.wrong]


def equations(why: str) -> Iterator[tuple[str, float, str]]:
    """(left side, its value, right side) of the equations in a working, but for those with letters in them."""

    def arithmetic(side: str) -> str:
        side = re.sub(r"\bln (sigmoid\(.*\)|[\d.]+)", r"ln(\1)", side)
        return re.sub(r"\b(?!(?:ln|sqrt|sigmoid|min|x)\b)[A-Za-z]{2,}\b|\.$|,$", "", side.replace("A call", "")).strip()

    for part in re.split(r"; |: |, (?=[A-Za-z])", why):
        for left, right in itertools.pairwise(map(arithmetic, part.split(" = "))):
            if left and not re.search(r"\b[nrPR]\b", left):
                yield left, worked_out(left), right


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_step_of_the_working_is_right(name):
    """Left side worked out, to the last digit of the right side (rounded numbers in between may move it by one)."""
    for seed in SEEDS:
        question, last = problem(name, seed), math.nan
        for left, value, right in equations(question.whys[0]):
            last = worked_out(right)
            decimals = re.findall(r"\d(?:\.(\d+))?", right)[-1]
            assert abs(value - last) <= min(1.01 * 10.0 ** -len(decimals), 0.01 * abs(value)), (left, right)
        assert last == pytest.approx(question.answer, rel=5e-3)


SLIPS = [  # name, seed, what its text gives, [(a slip's number worked out by hand, a word of what it is told)]
    ("LoRA parameters", 0, "8,192 to 14,336 with r = 4",
     [("4 x 8192", "A alone"), ("4 x 8192 x 14336", "out times r")]),
    ("grouped-query attention", 0, "4,096 wide and has 16 layers, 32 query heads and 8 key-value heads of 128.*r = 16",
     [("16 x 16 x 2 x (4096 + 4096)", "not square"), ("16 x (4096 + 4096) + 16 x (4096 + 1024)", "one layer")]),
    ("FLOPs of a LoRA step", 0, "8,192 need with r = 256", [("2 x 256 / 8192", "trained"), ("2 / 3", "the limit")]),
    ("training states", 0, "LoRA with 200 million .* of 13.02 billion",
     [("16 x 13.02", "full"), ("16 x 0.2", "must be in memory"), ("2 x (13.02 + 0.2)", "moments are missing")]),
    ("training states", 5, "Full fine-tuning of 70.55 billion",
     [("2 x 70.55", "weights alone"), ("12 x 70.55", "master copy"), ("8 x 70.55", "two moments")]),
    ("bits a weight", 0, "blocks of 64 with one fp32", [("4", "constants are missing"), ("4 + 8 / 64", "of 8 bits")]),
    ("bits a weight", 2, "blocks of 32, .*double-quantized",
     [("4 + 32 / 32", "without"), ("4", "constants are missing")]),
    ("quantized weights", 0, "7.7 billion .*128,256 x 4,096",
     [("7.7 x 4.127 / 8 + 2 x 0.525336576 x 4.127 / 8", "not quantized"), ("7.7 x 4.127 / 8", "head are missing"),
      ("7.7 x 4.127 / 8 + 2 x 0.525336576", "two tables")]),
    ("reward model loss", 0, "chosen answer 1.5, the rejected one 1.3",
     [("ln(1 + exp(0.2))", "wrong way round"), ("1 / (1 + exp(-0.2))", "the chance")]),
    ("DPO loss", 0, "policy -20 and -17, reference -20 and -21. .* beta = 0.05",
     [("ln(1 + exp(0.15))", "reference"), ("ln(1 + exp(4))", "beta"), ("ln(1 + exp(-0.2))", "sign")]),
    ("ORPO loss", 0, "chosen 0.8, rejected 0.4",
     [("ln(1 / 0.8) + ln(7 / 6)", "lambda"), ("0.1 x ln(7 / 6)", "NLL"), ("ln(1 / 0.8) + 0.1 x ln(1.5)", "for odds")]),
    ("KTO loss", 0, "9 times .* z0 = 0.5, .* thumbs-down",
     [("1 / (1 + 9 x exp(-0.5))", "opposite label"), ("9 / 10", "z0"), ("1 / (1 + exp(-8.5))", "the logarithm")]),
    ("KTO loss", 2, "2 times .* z0 = 0.5, .* thumbs-up",
     [("2 / (2 + exp(0.5))", "opposite label"), ("1 / 3", "z0"), ("1 / (1 + exp(1.5))", "the logarithm")]),
    ("GAE", 0, "0.8 and 0.8, values 0.4 and 0.3; gamma = 1, lambda = 0.9",
     [("0.8 + 0.3 - 0.4", "alone"), ("0.7 + 0.5", "lambda"), ("0.8 - 0.4 + 0.9 x 0.5", "next token")]),
    ("RLOO", 0, "6, 6, 0, 4", [("6 - 16 / 4", "all four"), ("-8 / 3", "sign")]),
    ("PPO's clip", 2, "ratio 0.4 and the advantage -2", [("0.4 x 2", "other one"), ("-1.6", "minus the objective")]),
    ("interval of a rate", 0, "90 % of 400",
     [("100 x 0.3 / 20", "one standard error"), ("2 x 1.96 x 1.5", "whole width"), ("1.96 x 0.015", "a share"),
      ("196 x 0.09 / 400", "root")]),
    ("training hours", 0, "10,000 rows of 500 tokens, 2 epochs, 3,726",
     [("5000000 / 3726 / 3600", "one epoch"), ("10000000 / 3726 / 60", "minutes"), ("10000000 / 3726", "seconds")]),
    ("break-even", 0, "costs 50. It saves 900 .* at 0.1 a million",
     [("50 / 90", "million"), ("50 / 0.1 x 10^6", "tokens")]),
    ("sharded states", 1, "8.03 billion .* ZeRO-2 on 2", [("16 x 8.03", "data parallel"), ("16 x 8.03 / 2", "ZeRO-3")]),
    ("sharded states", 5, "13.02 billion .* ZeRO-3 on 8", [("16 x 13.02", "data parallel")]),
    ("F1", 0, "69 values are found, 25 are invented, 29",
     [("69 / 94", "precision"), ("69 / 98", "recall"), ("69 / 123", "in full")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "seed", "given", "slips"), SLIPS)
def test_slips_by_hand(name, seed, given, slips):
    question = problem(name, seed)
    assert re.search(given, question.text), "another problem than the one that was worked out"
    assert [value for value, _ in question.wrong] == pytest.approx([worked_out(sum) for sum, _ in slips])
    for (_, why), (_, word) in zip(question.wrong, slips, strict=True):
        assert word in why


def test_slips_of_every_kind_are_worked_out():
    assert {name for name, *_ in SLIPS} == set(PROBLEMS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_numbers_are_fresh_and_a_seed_repeats_them(name):
    assert problem(name, 5) == problem(name, 5)
    assert len({problem(name, seed).text for seed in SEEDS}) >= 6


@pytest.mark.parametrize("name", PROBLEMS)
def test_rare_numbers_too_have_an_answer_apart_from_the_slips(name):
    """An answer of 0 would leave nothing to divide an error by, and two minus signs in a row are not read."""
    for question in (problem(name, seed) for seed in range(200)):
        assert math.isfinite(question.answer) and question.answer != 0
        assert all(abs(value / question.answer - 1) > 0.01 for value, _ in question.wrong), "more than what is right"
        assert "- -" not in question.whys[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_its_cell_exists(name):
    assert problem(name, 0).proof in CELLS


def test_the_states_agree_with_the_calculator():
    """ftlab.memory's own accounting of a real architecture, within what the rounding of its size allows."""
    rng = random.Random(0)
    shown = [whiteboard.training_states(rng) for _ in range(200)]
    full = next(q.answer for q in shown if q.text.startswith("Full") and "8.03" in q.text)
    assert full == pytest.approx(memory.states("Llama-3-8B") / 1e9, rel=1e-3)
    with_40 = next(q.answer for q in shown if "LoRA with 40 million" in q.text and "8.03" in q.text)
    assert with_40 == pytest.approx(memory.states("Llama-3-8B", r=16) / 1e9, rel=3e-3)  # 41.9 million


# --- The board --------------------------------------------------------------------------------------------------------


def asked(board: dict) -> str:
    """The text of the problem that stands on the board, without its number."""
    question = next(one.value for one in visible(board) if isinstance(one, ipywidgets.HTMLMath))
    return Page(question).text.strip().partition(". ")[2]


def answered(board: dict, answer: str) -> None:
    named(board, ipywidgets.Text)["Answer:"].value = answer
    named(board)["Check"].click()


def test_each_kind_can_be_chosen_is_checked_and_stored_under_its_name(file):
    board = displayed(whiteboard.board, 1, file)
    kind = named(board, ipywidgets.Dropdown)["problem"]
    assert [value for _, value in kind.options] == ["", *PROBLEMS] and kind.value == ""
    for name in PROBLEMS:
        kind.value = name
        right = float(ORACLES[name](asked(board)))
        for answer, says in ((1.5 * right, "Not yet."), (right, "Right.")):
            answered(board, repr(answer))
            assert says in page_of(board)
    stored = [(event.item, event.score) for event in progress.events("whiteboard", file)]
    assert stored == [(name, score) for name in PROBLEMS for score in (0, 1)]


def test_new_numbers_come_at_a_click_and_a_seed_repeats_them(file):
    def run(seed: int) -> list[str]:
        board, texts = displayed(whiteboard.board, seed, file), []
        for _ in range(4):
            texts.append(asked(board))
            named(board)["New numbers"].click()
        return texts

    assert run(5) == run(5) != run(6) and len(set(run(5))) == 4
    assert progress.events(file=file) == [], "what was only looked at is not answered"


def test_all_kinds_come_by_chance_and_are_stored_under_their_names(monkeypatch, file):
    made = {name: Question("x", "numeric", name, "C01", whys=("w",), answer=1.0) for name in PROBLEMS}
    monkeypatch.setattr(whiteboard, "PROBLEMS", {name: lambda rng, name=name: made[name] for name in made})
    board, met = displayed(whiteboard.board, 0, file), []
    for _ in range(40):
        met.append(asked(board))
        answered(board, "1")
        named(board)["New numbers"].click()
    assert [event.item for event in progress.events(file=file)] == met and len(set(met)) > 12


def test_without_a_kernel_one_problem_of_each_kind_can_be_read_its_working_folded(file):
    bundle = displayed(whiteboard.board, None, file)
    page = Page(bundle["text/html"])
    assert VIEW in bundle and f"{len(PROBLEMS)} kinds" in bundle["text/plain"]
    for name in PROBLEMS:
        shown = problem(name, 0)
        assert shown.text in page.open and shown.whys[0] in page.text and shown.whys[0] not in page.open
