"""Notebook 03: training and merging run on a CPU with a Llama-3-shaped base; what it shows of a recipe is there."""

import re

from scripts import script

from notebooks import CELLS, ROOT, changed, code_of

FENCED = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def test_training_and_merging_run_with_a_llama_3_shaped_base(llama, beside_data):
    code = code_of("03_qlora_memory")
    code["dial"] = re.sub(r"^(MODEL|SMALL) = .*$", rf"\1 = {str(llama)!r}", code["dial"], flags=re.M)
    code["dial"] = changed(code["dial"], {"40, 8, 3e-3": "6, 8, 1e-2"})
    assert code["merge"].count('["prompt"][:40], 40)') == 2
    code["merge"] = code["merge"].replace('["prompt"][:40], 40)', '["prompt"][:40], 8)')
    names = ("imports", "dial", "first", "load", "rows", "train", "prepare", "equal", "equal-gradients", "merge")
    printed = beside_data("\n".join(code[name] for name in names))
    assert "TRL's adapters are {torch.bfloat16}" in printed
    assert float(re.search(r"relative difference (\S+)$", printed, re.M)[1]) < 1e-4
    off = {name: float(most) for name, most in re.findall(r"^(.+): \d+ of 40 .* logits off by (\S+)", printed, re.M)}
    assert off["dequantized base"] < 1e-3 < 0.01 < min(off["original weights"], off["4-bit base"])
    assert re.search(r"^dequantized base: 40 of 40 answers the same", printed, re.M)


def test_the_lines_of_the_recipe_are_the_recipes():
    """The Python block stands in qlora_8b.py as it is; each command has a script and options that it knows."""
    blocks = FENCED.findall("".join(CELLS["03_qlora_memory#recipe"]["source"]))
    assert [kind for kind, _ in blocks] == ["python", "bash"]
    assert blocks[0][1] in (ROOT / "recipes" / "qlora_8b.py").read_text(encoding="utf-8")
    asked = [line.split() for line in blocks[1][1].replace("\\\n", " ").splitlines() if line.startswith("python")]
    scripts = ["qlora_8b.py", "qlora_8b.py", "evaluate.py", "merge.py", "evaluate.py"]  # scored before and after
    assert [line[:2] for line in asked] == [["python", name] for name in scripts]
    known = {"qlora_8b.py": set(script("recipes/qlora_8b.py").Recipe.__dataclass_fields__) | {"output_dir"}}
    for name in ("merge.py", "evaluate.py"):
        text = (ROOT / "recipes" / name).read_text(encoding="utf-8")
        known[name] = set(re.findall(r'add_argument\(\s*"--(\w+)"', text))
    for _, file, *words in asked:
        assert {word[2:] for word in words if word.startswith("--")} <= known[file]


def test_the_rungs_of_the_ladder_are_those_of_the_exercise():
    """In the list of the lesson, in that order, by the names that exercise 03.5 wants."""
    from ftlab.exercises import nb03

    text = "".join(CELLS["03_qlora_memory#ladder"]["source"])
    named = re.findall(r"^\d\. `([^`]+)`", text, re.M)
    assert ["fits", *named] == [*nb03.RUNGS, "larger card"]
