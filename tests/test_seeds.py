"""A run that is seeded is seeded whole: `set_seed` draws the adapter, the config orders the rows."""

import ast
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from ftlab import model_path
from notebooks import NOTEBOOKS

ROOT = Path(__file__).parents[1]
CONFIG = re.compile(r"(SFT|DPO|KTO|GRPO|RLOO|ORPO|Reward|Distillation)Config|TrainingArguments")
FOLDERS = ("data", "experiments", "bench", "tools", "ftlab")
SCRIPTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def source_of(notebook: list[dict]) -> str:
    """The code of a notebook, what it writes into files too, without its magics."""
    cells = ["".join(cell["source"]) for cell in notebook if cell["cell_type"] == "code"]
    other = re.compile(r"%%writefile (?!.*\.py\n)")
    python = [code for code in cells if not other.match(code)]
    return "\n\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M) for code in python)


def called(node: ast.AST) -> str:
    """The last name of what a call calls."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def says_seed(node: ast.AST) -> bool:
    """Whether this is the key "seed" of a mapping, or seed=... of a call."""
    return getattr(node, "value", None) == "seed" or getattr(node, "arg", None) == "seed"


def with_seed(tree: ast.Module) -> set[str]:
    """Variables and functions that hold a mapping with a "seed": for `**COMMON`, `**run.arguments()`."""
    found = set()
    for node in ast.walk(tree):
        holds = any(says_seed(part) for part in ast.walk(node))
        if holds and isinstance(node, ast.FunctionDef):
            found.add(node.name)
        if holds and isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def unseeded(code: str, known: set[str] = frozenset()) -> list[str]:
    """The configs of trainers that have no seed although the code seeds: line and name of each."""
    tree = ast.parse(code)
    names, found = with_seed(tree) | known, []
    if not any(called(node) == "set_seed" for node in ast.walk(tree)):
        return []
    for node in ast.walk(tree):
        if not CONFIG.fullmatch(called(node)):
            continue
        unpacked = [keyword.value for keyword in node.keywords if keyword.arg is None]
        parts = [part for value in unpacked for part in ast.walk(value)]
        told = {getattr(part, "attr", getattr(part, "id", "")) for part in parts}
        if not any(keyword.arg == "seed" for keyword in node.keywords) and not told & names:
            found.append(f"line {node.lineno}: {called(node)}")
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_trainer_of_a_notebook_that_seeds_is_left_with_the_default_seed(name):
    assert unseeded(source_of(NOTEBOOKS[name])) == []


def test_no_trainer_of_a_script_that_seeds_is_left_with_the_default_seed():
    shared = with_seed(ast.parse((ROOT / "experiments/alignment/run.py").read_text(encoding="utf-8")))
    for path in SCRIPTS:
        found = unseeded(path.read_text(encoding="utf-8"), shared & {"arguments"})
        assert found == [], path.relative_to(ROOT)


def test_a_run_that_is_seeded_by_half_is_found():
    half = "set_seed(0)\nSFTTrainer(model, args=SFTConfig('runs', max_steps=3))"
    assert unseeded(half) == ["line 2: SFTConfig"]
    assert unseeded(half.replace("max_steps", "seed")) == []
    common = "COMMON = dict({}=1)\nset_seed(1)\nDPOConfig('runs', **COMMON)"
    assert unseeded(common.format("seed")) == []
    assert unseeded(common.format("beta")) == ["line 3: DPOConfig"]
    assert unseeded("SFTConfig('runs')") == []


def first_batch(tmp_path, outside: int, **config) -> list[list[int]]:
    """The ids of the first batch after set_seed(outside)."""
    micro = model_path("micro")
    rows = Dataset.from_list([{"prompt": f"Say {i}", "completion": f" {i}"} for i in range(64)])
    set_seed(outside)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(micro, dtype=torch.float32),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(micro),
        args=SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", **config),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    return next(iter(trainer.get_train_dataloader()))["input_ids"].tolist()


def test_set_seed_alone_leaves_the_order_of_the_rows_and_the_config_decides_it(tmp_path):
    """Why the rule holds: Trainer seeds again, with args.seed, before the rows are drawn."""
    assert first_batch(tmp_path, 0) == first_batch(tmp_path, 1)
    seeded = first_batch(tmp_path, 0, seed=0)
    assert seeded == first_batch(tmp_path, 1, seed=0) != first_batch(tmp_path, 0, seed=1)
