"""Notebook 07: its loss is that of ftlab.scratch.rl, which equals TRL's, its ring adds up, and its 8B run
is that of recipes/grpo.py."""

import json
import random
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from scripts import script

from ftlab.paths import DATA
from ftlab.scratch import rl
from notebooks import CELLS

LENGTH = 12
FAMILY = {  # arguments of the notebook's function; the loss of each token, and the reduction
    "GRPO": ({"reduction": "grpo"}, rl.grpo_loss, "grpo"),
    "Dr. GRPO": ({"reduction": "dr_grpo", "length": LENGTH}, rl.grpo_loss, "dr_grpo"),
    "DAPO": ({"eps_high": 0.28}, partial(rl.grpo_loss, epsilon_high=0.28), "dapo"),
    "lower end": ({"eps_low": 0.05}, partial(rl.grpo_loss, epsilon=0.05), "dapo"),
    "GSPO": (
        {"level": "sequence", "reduction": "grpo", "eps_low": 0.1, "eps_high": 0.15},
        partial(rl.gspo_loss, epsilon=0.1, epsilon_high=0.15),
        "grpo",
    ),
}


def defined(cell: str, name: str):
    """What a cell of the notebook defines, run without the rest of the notebook."""
    source = "".join(CELLS[f"07_verifiable_rewards#{cell}"]["source"])
    names = {"torch": torch, "rl": rl}
    exec(source.split("\n\n")[0], names)
    return names[name]


def rollouts(seed: int) -> tuple:
    """logps, old_logps, advantages, mask; the last answer is empty."""
    draw = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(6, 9, generator=draw)
    moved = old + 0.3 * torch.randn(6, 9, generator=draw)
    lengths = torch.tensor([9, 4, 1, 6, 2, 0])
    mask = (torch.arange(9) < lengths[:, None]).long()
    return moved, old, torch.randn(6, generator=draw), mask


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", FAMILY)
def test_value_and_gradient_are_those_of_scratch(name, seed):
    arguments, per_token, loss_type = FAMILY[name]
    logps, *rest = rollouts(seed)
    found = []
    for which in ("cell", "scratch"):
        new = logps.clone().requires_grad_()
        if which == "cell":
            value = defined("loss", "grpo_loss")(new, *rest, **arguments)
        else:
            value = rl.reduce_loss(per_token(new, *rest), rest[-1], loss_type, LENGTH)
        [gradient] = torch.autograd.grad(value, new)
        found.append((value.detach(), gradient))
    torch.testing.assert_close(*found)
    assert found[0][1].abs().sum() > 0


def test_each_step_of_a_trace_follows_from_the_one_before():
    question = defined("ring", "question")
    draw = random.Random(1)
    for rides in range(1, 7):
        text, stop, steps = question(draw, rides)
        at, said = 0, text.removeprefix("Rides:").partition(".")[0].split(",")
        assert len(said) == rides == len(steps.split(","))
        for ride, step in zip(said, steps.split(","), strict=True):
            at = (at + int(ride.split()[1])) % 10
            assert step == f"{ride}={at}"
        assert stop == str(at)


def test_the_8b_run_has_the_recipes_defaults_and_its_command_parses_to_the_same_settings(tmp_path):
    grpo = script("recipes/grpo.py")
    settings = defined("eight-b", "EIGHT_B")
    shared = settings.keys() & grpo.DEFAULTS.keys()
    assert len(shared) == 9 and {key: grpo.DEFAULTS[key] for key in shared} == {key: settings[key] for key in shared}

    says = "".join(CELLS["07_verifiable_rewards#eight-b-start"]["source"])
    [command] = re.findall(r"^python grpo\.py (.*?)```", says, re.DOTALL | re.MULTILINE)
    arguments = shlex.split(command.replace("\\\n", " "))
    recipe, args = grpo.parsed([*arguments, "--output_dir", str(tmp_path)])
    assert {key: getattr(args, key) for key in settings} == settings
    assert (recipe.lora_r, recipe.lora_alpha, args.reward_weights) == (16, 32, [1, 0])
    assert recipe.rewards[1] == "my_rewards:stricter" and args.generation_batch_size == 64


def test_the_filter_before_the_8b_run_reads_what_rejection_sampling_writes(tmp_path, monkeypatch):
    rejection_sampling = script("recipes/rejection_sampling.py")
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (DATA / "ask" / "train.jsonl").read_text("utf-8").splitlines()[:3]]
    hits = (0, 5, 8)
    drawn = [{"answers": ["a"] * 8, "scores": [1.0] * n + [0.0] * (8 - n)} for n in hits]
    rejection_sampling.replace(Path("prompts.jsonl"), rows)
    rejection_sampling.replace(Path("drawn.drawn.jsonl"), [{"k": 8}, *drawn])
    assert rejection_sampling.lines_of(Path("drawn.drawn.jsonl"))[1:] == drawn

    says = "".join(CELLS["07_verifiable_rewards#eight-b-start"]["source"])
    scorer, code = re.findall(r"```python\n(.*?)```", says, re.DOTALL)
    exec(code, {"json": json})
    assert rejection_sampling.lines_of(Path("useful.jsonl")) == [rows[1]]

    script("recipes/rewards.py")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "recipes")
    exec(scorer, mine := {})
    said = ("Six by seven. Answer: 42", "Answer: 41", "42 apples")
    assert [mine["score"](answer, {"answer": "42"}) for answer in said] == [1, 0, 0]
