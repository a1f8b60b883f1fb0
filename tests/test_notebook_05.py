"""Notebook 05 knows no model: its cells train and merge a Llama-3-shaped base; what they serve is the base's file."""

import re

from notebooks import changed, code_of


def test_the_pipeline_runs_with_a_llama_3_shaped_base_from_training_to_the_card(llama, gguf, beside_data):
    names = ("imports", "dial", "template", "config", "train", "keep", "hand", "merge", "gguf", "parity", "card")
    code = {name: code_of("05_practical_pipeline")[name] for name in names}
    code["dial"] = re.sub(r"^MODEL = .*$", f"MODEL = {str(llama)!r}", code["dial"], flags=re.M)
    code["dial"] = re.sub(r"^BASE, .*$", 'BASE, LICENCE = "a/llama", "other"', code["dial"], flags=re.M)
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
    code["card"] = 'systems = {"zero-shot": live["hand"], "rules": live["hand"]}\n' + code["card"]
    printed = beside_data("\n".join(code.values()))
    assert "double BOS" in printed and "of 4 answers are the same after the merge" in printed
    assert "of 4 answers are the same, now in" in printed and "of 4 answers as before" in printed
    assert "Made from a/llama." in printed and "SHA-256" in printed
