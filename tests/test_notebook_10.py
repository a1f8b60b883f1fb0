"""Notebook 10 knows no model and no task: its cells run with bases shaped like Llama 3 and Qwen3, a 4-bit one, a CSV.

Unsloth's cell: tests/peers.
"""

import csv
import json
import re
from pathlib import Path

from huggingface_hub import ModelCard

from ftlab.paths import DATA
from notebooks import changed, code_of

CONTROL = "def control(rows):\n    return lambda text: text.capitalize() + '.'\n"
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
    """The cells with every tenth row of tidy, four notes by hand and a tiny control, in a folder of their own."""
    code, task = dict(code), folder / "task"
    task.mkdir()
    for name, step in {"train": 10, "hand_test": 25}.items():
        lines = (DATA / "tidy" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (task / f"{name}.jsonl").write_text("\n".join(lines[::step]), encoding="utf-8")
    (task / "controls.py").write_text(CONTROL, encoding="utf-8")
    named = {"MODEL": repr(str(model)), "FILE": repr(str(task / "train.jsonl")), "LICENCE": "'llama3'"}
    return quicker(code | {"dial": replaced(code["dial"], **named | values)}, rate)


def quicker(code: dict[str, str], rate: float = 1e-3) -> dict[str, str]:
    """The cells with 16 rows to train on, answers of 8 tokens, and 6 held-out rows."""
    sizes = f"ROWS, BATCH, RATE, TOKENS, SEED = 16, 4, {rate}, 8, 5"
    return code | {
        "dial": re.sub(r"^ROWS, .* = .*$", sizes, code["dial"], flags=re.M),
        "evaluate": changed(code["evaluate"], {"held_out[:40]": "held_out[:6]"}),
        "card": code["card"].replace("q8_0", "f16"),  # random weights are nearly tied everywhere: 8 bits tip most
    }


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "notebooks" / "runs" / "your_own_data" / "merged" / "README.md")


def scores_on(card: ModelCard) -> list[str]:
    """The names of the scores that a card shows."""
    table = card.text.split("## Scores")[1].split("## Limits")[0]
    return re.findall(r"^\| ([^|]+) \| \d", table, re.M)


def test_every_cell_runs_with_a_llama_3_shaped_base_to_the_served_answer(llama, beside_data, tmp_path):
    code = smaller(cells(), llama, tmp_path, rate=1e-2)  # enough to tell the likeliest token from the next one
    code.pop("unsloth")
    printed = beside_data("\n".join(code.values()))
    traps = printed.split("template traps found:")[1].split("\n")[0]
    assert "double BOS" in traps and traps.count("', '") == 0  # Llama 3's template and its tokenizer both write it
    served = re.search(r"(\d+) of (\d+) served answers are the notebook's own", printed)
    assert int(served[1]) >= int(served[2]) - 1 > 3
    modelfile = (tmp_path / "notebooks" / "runs" / "your_own_data" / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<|eot_id|>"' in modelfile and "<|im_end|>" not in modelfile
    card = card_in(tmp_path)
    assert (card.data.base_model, card.data.license) == (llama.name, "llama3")
    assert scores_on(card) == ["tuned", "three examples", "base", "tuned, hand test", "rules, hand test"]
    assert "| seed | 5 |" in card.text and "| base in | float32 |" in card.text
    assert "English notes only." in card.text and "4 bits" not in card.text  # what is true of SmolLM2 alone


def orders(folder: Path) -> Path:
    """A CSV of another task: order lines of 40 customers, and what is to be read off them."""
    with (folder / "orders.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "completion", "group"])
        for i in range(160):
            table.writerow([f"{i % 7 + 1} of item {i}, net {i % 30}", f"qty={i % 7 + 1}", f"customer {i % 40}"])
    return folder / "orders.csv"


def test_a_card_of_another_task_on_a_thinking_base_shows_its_own_scores_and_licence(qwen, beside_data, tmp_path):
    """Three lines of the dial change, and MODEL: nothing of `tidy` and nothing of SmolLM2 is left on the card."""
    code = cells()
    scorer = "lambda answer, row: answer == row['completion'][0]['content']"
    lines = {"FILE": repr(str(orders(tmp_path))), "SYSTEM": "'Read the order.'", "MODEL": repr(str(qwen))}
    code["dial"] = replaced(code["dial"], **lines, **{"scorer, LIMITS": f"{scorer}, 'Order lines only.'"})
    code = quicker(code)
    code.pop("unsloth")
    printed = beside_data("\n".join(code.values()))
    assert "for the model card: {'base_model': 'qwen', 'license': 'mit'}" in printed
    card = card_in(tmp_path)
    assert (card.data.base_model, card.data.license) == ("qwen", "mit")
    assert scores_on(card) == ["tuned", "three examples", "base"]
    for word in ("hand test", "rules", "English", "4 bits", "SmolLM2", "apache"):
        assert word not in card.content, word
    assert "Order lines only." in card.text and "| rows | 16 |" in card.text and "| seed | 5 |" in card.text


def test_a_hand_test_of_another_task_and_a_base_without_a_licence_stop_the_notebook(llama, beside_data, tmp_path):
    """A file in tidy's folder, with another instruction: its hand test lies beside and must not be asked."""
    code = smaller(cells(), llama, tmp_path, LICENCE="None", SYSTEM="'Read the order.'")
    code["dial"] = replaced(code["dial"], FILE=repr(str(orders(tmp_path / "task"))))
    stops = """
for what in (lambda: export.base_of(MODEL, LICENCE), lambda: data.hand_test(FILE, rows, system=SYSTEM)):
    try:
        what()
    except ValueError as error:
        print("STOPPED", error)
"""
    printed = beside_data("\n".join([*(code[name] for name in ("imports", "dial", "report", "split")), stops]))
    no_licence, other_task = re.findall(r"^STOPPED (.*)$", printed, re.M)
    assert f"the licence of {llama.name} cannot be read" in no_licence and "licence=" in no_licence
    assert "Clean up this note." in other_task and "another task" in other_task


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
