"""Notebook 10 knows no model: its cells run with a Llama-3-shaped base and a 4-bit one; Unsloth's: tests/peers."""

import json
import re
from pathlib import Path

from ftlab.paths import DATA
from notebooks import changed, code_of

FEWER_WORDS = """
from io import StringIO
from symspellpy import SymSpell
def first_words(self, path, *places, load=SymSpell.load_dictionary):
    return load(self, StringIO("\\n".join(path.read_text("utf-8").split("\\n")[:5_000])), *places)
SymSpell.load_dictionary = first_words
"""
TEACHING = ("colab", "exercise-1", "exercise-2", "exercise-3", "quiz")


def cells() -> dict[str, str]:
    """Code by cell id, without what teaches and asks."""
    return {name: source for name, source in code_of("10_your_own_data").items() if name not in TEACHING}


def replaced(source: str, **values: str) -> str:
    """The dial with other values: NAME = value."""
    for name, value in values.items():
        source, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.M)
        assert count == 1, name
    return source


def smaller(code: dict[str, str], model: Path, folder: Path, rate: float = 1e-3, **values: str) -> dict[str, str]:
    """The cells with every tenth row, short answers, and of the rules' dictionary the most frequent words."""
    code, few = dict(code), folder / "few.jsonl"
    lines = (DATA / "tidy" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join(lines[::10]), encoding="utf-8")
    code["dial"] = replaced(code["dial"], MODEL=repr(str(model)), FILE=repr(str(few)), **values)
    code["dial"] = re.sub(r"^ROWS, .* = .*$", f"ROWS, BATCH, RATE, TOKENS = 16, 4, {rate}, 8", code["dial"], flags=re.M)
    code["evaluate"] = changed(code["evaluate"], {"held_out[:40]": "held_out[:6]"})
    all_rows = {f'read_rows("{name}")': most for name, most in {"hand_test": 4, "train": 200}.items()}
    code["rules"] = changed(code["rules"], {every: f"{every}[:{most}]" for every, most in all_rows.items()})
    code["rules"] = FEWER_WORDS + code["rules"]
    return code


def test_every_cell_runs_with_a_llama_3_shaped_base_to_the_served_answer(llama, beside_data, tmp_path):
    code = smaller(cells(), llama, tmp_path, rate=1e-2)  # enough to tell the likeliest token from the next one
    code.pop("unsloth")
    code["card"] = code["card"].replace("q8_0", "f16")  # random weights are nearly tied everywhere: 8 bits tip most
    printed = beside_data("\n".join(code.values()))
    traps = printed.split("template traps found:")[1].split("\n")[0]
    assert "double BOS" in traps and traps.count("', '") == 0  # Llama 3's template and its tokenizer both write it
    served = re.search(r"(\d+) of (\d+) served answers are the notebook's own", printed)
    assert int(served[1]) >= int(served[2]) - 1 > 3
    modelfile = (tmp_path / "notebooks" / "runs" / "your_own_data" / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<|eot_id|>"' in modelfile and "<|im_end|>" not in modelfile


def test_of_chats_each_answer_becomes_a_row(llama, beside_data, tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    lines = [json.dumps({"messages": turns, "group": f"customer {i}"}) for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    code = cells()
    code["dial"] = replaced(code["dial"], MODEL=repr(str(llama)), FILE=repr(str(tmp_path / "chats.jsonl")))
    last = "[len(row['prompt']) for row in rows if row['completion'][0]['content'] == 'd']"
    told = f"print('FOUND', len(training) + len(held_out), set({last}), {last}.count(4))"
    printed = beside_data("\n".join([*(code[name] for name in ("imports", "dial", "report", "split")), told]))
    assert "80 good rows (messages), 0 bad" in printed
    assert "FOUND 80 {4} 40" in printed  # the system message is the first of four


def test_a_4_bit_base_is_trained_and_merged_into_its_dequantized_weights(llama, beside_data, tmp_path):
    nf4 = "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.float32)"
    code = smaller(cells(), llama, tmp_path, BNB=nf4)
    kept = ("imports", "dial", "report", "split", "model", "train", "evaluate", "export")
    proof = """
batch = tokenizer.apply_chat_template(asked[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
with evaluate.plain_inference(trainer.model):  # without the autocast that the trainer leaves around it
    apart = trainer.model(**batch).logits.float()
with torch.inference_mode():
    together = AutoModelForCausalLM.from_pretrained(RUNS / "merged", dtype=torch.float32).eval()(**batch).logits
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    wrong = PeftModel.from_pretrained(plain, RUNS / "adapter").merge_and_unload().eval()(**batch).logits
print("DIFFERENCES", (apart - together).abs().max().item(), (apart - wrong).abs().max().item())
"""
    printed = beside_data("\n".join([*(code[name] for name in kept), proof]))
    right, wrong = map(float, re.search(r"DIFFERENCES (\S+) (\S+)", printed).groups())
    assert right < 1e-3 and wrong > 10 * right
