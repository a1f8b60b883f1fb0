"""Notebook 05 knows no model: its cells train and merge a Llama-3-shaped base; what they serve is the base's file."""

import ast
import re

from scripts import script

from notebooks import CELLS, changed, code_of


def test_the_pipeline_runs_with_a_llama_3_shaped_base_from_training_to_the_card(llama, gguf, beside_data):
    names = ("imports", "dial", "template", "config", "train", "keep", "hand", "merge", "gguf", "parity", "card")
    code = {name: code_of("05_practical_pipeline")[name] for name in names}
    code["dial"] = re.sub(r"^MODEL = .*$", f"MODEL = {str(llama)!r}", code["dial"], flags=re.M)
    code["dial"] = re.sub(r"^LICENCE = .*$", 'LICENCE = "other"', code["dial"], flags=re.M)
    code["dial"] = re.sub(r"^ROWS, .*$", "ROWS, BATCH, RATE = 8, 4, 1e-3", code["dial"], flags=re.M)
    code["dial"] += (
        "\ntokenizer = AutoTokenizer.from_pretrained(MODEL)"
        '\nhand = load_dataset("json", data_files="../data/ask/hand_test.jsonl", split="train[:4]")'
        '\ntests, report = {"hand": hand, "test": hand}, data.read_rows("../data/ask/train.jsonl")'
    )
    code["keep"] = code["keep"].replace(", some)", ", some, 8)")
    code["hand"] = changed(code["hand"], {'rows["prompt"])': 'rows["prompt"], 8)'})
    code["merge"] = changed(code["merge"], {'few["prompt"])': 'few["prompt"], 8)', "range(36)": "range(4)"})
    code["gguf"] = changed(code["gguf"], {"max_tokens=80": "max_tokens=8"})
    code["parity"] = f"export.to_gguf = lambda *_: Path({str(gguf)!r})\n{code['parity']}"  # notebook 10's test converts
    code["card"] = 'systems = {"zero-shot": live["hand"], "rules": live["hand"]}\n' + code["card"].replace(
        "[:1300]", ""
    )
    printed = beside_data("\n".join(code.values()))
    assert "double BOS" in printed and "of 4 answers are the same after the merge" in printed
    assert "of 4 answers are the same, now in" in printed and "of 4 answers as before" in printed
    assert f"Made from {llama.name}." in printed and "weights with SHA-256" in printed
    assert "licence: other" in printed.replace("license", "licence") and "rounded to 4 bits" not in printed


def test_the_8b_run_has_the_settings_of_the_recipe():
    says = "".join(CELLS["05_practical_pipeline#set-8b"]["source"])
    [code] = re.findall(r"```python\n(.*?)```", says, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    of = {ast.unparse(call.func): {one.arg: one.value for one in call.keywords} for call in calls}
    told = {key: ast.literal_eval(value) for key, value in of["SFTConfig"].items()}
    recipe = script("recipes/qlora_8b.py").DEFAULTS
    shared = told.keys() & recipe.keys() - {"bf16"}  # there True where the card has it
    assert len(shared) == 13 and {key: told[key] for key in shared} == {key: recipe[key] for key in shared}
    assert told.keys() - shared == {"gradient_checkpointing", "bf16"}
    assert {key: ast.literal_eval(of["LoraConfig"][key]) for key in of["LoraConfig"]} == {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
    }
