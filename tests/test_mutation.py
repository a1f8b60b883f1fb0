"""bench/mutation.py: the five ways of being wrong are among its mutants, it tells them from the original, and its
published results are of the code that stands here, with nothing that survived.
"""

import json
import subprocess
import sys

import pytest
from scripts import ROOT, script


@pytest.fixture(scope="module")
def mutation():
    return script("bench/mutation.py")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("losses.dpo_loss", "chosen_rewards = policy_chosen_logps - ref_chosen_logps"),  # a scale
        ("losses.reward_loss", "return logsigmoid(chosen_rewards - rejected_rewards)"),  # a sign
        (
            "logps.sequence_logps",
            "return per_token_logps.where(~next_token_mask(per_token_logps, completion_mask), 0).sum(1)",
        ),
        ("logps.per_token_logps", "return logps.gather(2, input_ids[:, 0:, None]).squeeze(2)"),  # a shift
        ("rl.whiten", "without if (n := mask.sum()) < 2:"),
        ("logps.entropy", "return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).mean(-1)"),  # no sum
        ("rl.group_advantages", "return (groups / divisors[scale_rewards]).view(-1)"),
        ("rl.gae", "without @torch.no_grad()"),
    ],
)
def test_the_usual_mistakes_are_among_the_mutants(mutation, name, wrong):
    some = mutation.by_function([name.split(".")[0]])[name]
    assert wrong in [mutant.after for mutant in some]
    assert len({mutant.code for mutant in some}) == len(some)


def test_the_original_passes_and_a_mutant_fails_hangs_or_crashes():
    """Four forks of another process, each with one test: logps as it is, without the shift, in a loop, and aborting."""
    code = """
import ast, mutation
mutation.prepare("test_scratch_logps.py")
text = ast.unparse(mutation.source("logps"))
for changed in (text, text.replace("logits[:, :-1]", "logits[:, 1:]"), "while True: pass", "import os; os.abort()"):
    seconds = 1 if "while True" in changed else 60
    print(mutation.verdict("logps", ast.parse(changed), "test_scratch_logps.py::test_by_hand", seconds))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["passes", "fails", "hangs", "crashes"], done.stderr


def test_the_published_results_are_of_this_code_and_nothing_survived(mutation):
    """If this fails after a change in ftlab/scratch: python bench/mutation.py <module>.<function>."""
    published = json.loads((ROOT / "bench" / "results" / "mutation.json").read_text("utf-8"))["functions"]
    now = mutation.by_function(list(mutation.TESTS))
    assert {name: one["digest"] for name, one in published.items()} == {n: mutation.digest(m) for n, m in now.items()}
    assert not mutation.faults(published) and mutation.EQUIVALENT.keys() <= now.keys()
