"""Notebook 10 knows no model and no task: the dial changes, and its cells run to the card.

Three files of strangers, bases shaped like Llama 3 and like a Qwen3 that thinks, a 4-bit one, and
what is printed for bad input. Unsloth's cell: tests/peers.
"""

import ast
import csv
import http.server
import json
import random
import re
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from scripts import ROOT, script

from notebooks import CELLS, NOTEBOOKS, changed, code_of

TEACHING = {"colab", "exercise-1", "exercise-2", "exercise-3", "exercise-4", "quiz", "unsloth", "unsloth-train"}
TEACHING |= {"sizes", "turns"}
SMALL = {
    "SEALED": "None",
    "CONTEXT, THOUGHT": "1024, 16",
    "ROWS, PASSES": "16, 2",
    "MICRO, ACCUMULATE": "2, 2",
    "RANK, ALPHA, RATE": "16, 32, 1e-2",  # enough to tell the likeliest token from the next one
    "SEED": "5",
    "CHOOSE, TEST": "6, 6",
}


def cells() -> dict[str, str]:
    """Code by cell id, without what teaches and asks."""
    code = code_of("10_your_own_data")
    return {name: source for name, source in code.items() if name not in TEACHING}


def turned(code: dict[str, str], **values: str) -> dict[str, str]:
    """The cells with other values on the dial, NAME=value; nothing else is changed."""
    values = {name.replace("__", ", "): value for name, value in values.items()}
    code, done = dict(code), set()
    for cell in ("dial", "dial-run"):
        lines = code[cell].splitlines()
        for node in reversed(ast.parse(code[cell]).body):
            if isinstance(node, ast.Assign):
                name = ast.unparse(node.targets[0]).strip("()")
                if name in values:
                    done.add(name)
                    lines[node.lineno - 1 : node.end_lineno] = [f"{name} = {values[name]}"]
        code[cell] = "\n".join(lines)
    assert done == set(values)
    return code


def small(code: dict[str, str], base: Path, file: Path, **values: str) -> dict[str, str]:
    """The cells with this base and file, a few rows and short runs."""
    sizes = {name.replace(", ", "__"): value for name, value in SMALL.items()}
    code = turned(code, MODEL=repr(str(base)), FILE=repr(str(file)), **sizes | values)
    exact = changed(code["serve"], {'"q8_0")': '"f16")'})  # random weights are nearly tied: 8 bits tip most
    return code | {"serve": exact}


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "notebooks" / "runs" / "your_own_data" / "merged" / "README.md")


def scores_on(card: ModelCard) -> list[str]:
    """The names of the scores that a card shows."""
    table = card.text.split("## Scores")[1].split("## Limits")[0]
    return re.findall(r"^\| ([^|]+) \| \d", table, re.M)


# --- Three files of strangers ---------------------------------------------------------------------


def tickets(folder: Path) -> Path:
    """Classes, as Excel writes them in Europe: semicolons, a BOM, quotes, a column more."""
    file, rng = folder / "Tickets 2026.csv", random.Random(0)
    kinds = {"late": "where is it", "broken": "it came in pieces", "praise": "well done; thanks"}
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        table = csv.writer(opened, delimiter=";")
        table.writerow(["Nr", "Kunde", "Text", "label"])
        for number in range(160):
            kind = rng.choice(list(kinds))
            text = f'Order {number}, "{kinds[kind]}"\nsaid {rng.choice("abcdef")}{number}'
            table.writerow([number, f"customer {number % 40}", text, kind])
    return file


def sealed_tickets(folder: Path) -> Path:
    """Tickets of two customers that no other file knows; the second repeats a ticket of `tickets`."""
    file = folder / "sealed.csv"
    old = tickets(folder).read_text(encoding="utf-8-sig").split("\n1;")[0].split("\n0;")[1]
    lines = ["Nr;Kunde;Text;label", "1;new customer;my rider never rang the bell;late"]
    lines.append("0;" + old.replace("customer 0", "another new one"))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def invoices(folder: Path) -> Path:
    """Fields: an object in each line, numbers in it, no groups."""
    file, rng = folder / "invoices.jsonl", random.Random(1)
    rows = []
    for number in range(120):
        fields = {"item": f"item {number}", "qty": rng.randint(1, 9), "gift": rng.random() < 0.5}
        text = f"{fields['qty']} of {fields['item']} for {rng.randint(2, 90)}, ref {number * 7}"
        rows.append({"raw": text, "parsed": fields, "label": "x", "page": number})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def drafts(folder: Path) -> Path:
    """Rewriting: tabs, few documents, and two columns that make the prompt."""
    file, rng = folder / "drafts.tsv", random.Random(2)
    lines = ["document\ttone\tdraft\tfinal"]
    for number in range(90):
        words = " ".join(
            rng.sample(["the", "parcel", "rider", "came", "late", "to", "our", "gate", "again", "today"], 6)
        )
        lines.append(f"report {number % 5}\tpolite\t{words} {number}\t{words.capitalize()} {number}.")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def rival():
    """(address of a server that answers "late" to everything, what it was asked)"""
    asked = []

    class Late(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": "<think>hm</think>late"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: the test prints what it found."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Late) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()


def test_classes_with_a_base_shaped_like_llama_3_and_a_rival_behind_an_api(llama, rival, beside_data, tmp_path):
    address, questions = rival
    code = small(
        cells(),
        llama,
        tickets(tmp_path),
        COLUMNS="{'prompt': 'Text', 'completion': 'label', 'group': 'Kunde'}",
        SYSTEM="'Sort the ticket.'",
        GUIDE="'Answer late, broken or praise.'",
        SCORER="yours.same",
        CONTROLS="{'most frequent': yours.majority, 'nearest row': yours.nearest}",
        LIMITS="'Tickets only.'",
        SEALED=repr(str(sealed_tickets(tmp_path))),
        LICENCE="'llama3'",
        RIVAL=f"(OpenAI(base_url={address!r}, api_key='-'), 'big-one')",
    )
    freed = """
held = [one for one in gc.get_objects() if isinstance(one, torch.nn.Module) and hasattr(one, "peft_config")]
print("STILL IN MEMORY:", len(held), [name for name in ("trainer", "model") if name in globals()])
"""
    code["free"] += freed
    printed = beside_data("\n".join(code.values()))
    assert "STILL IN MEMORY: 0 []" in printed
    assert len(questions) == 12  # six rows to choose by, six of the test
    assert all(set(question) == {"model", "messages"} for question in questions)  # its own defaults
    assert [turn["role"] for turn in questions[0]["messages"]] == ["system", *["user", "assistant"] * 3, "user"]
    assert re.search(r"big-one +\d\.\d.* 0 cut", printed) and "served against big-one:" in printed
    assert re.search(r"^[+-]\d\.\d{3}  customer \d+, \d rows", printed, re.M)
    assert "160 good rows (prompt_completion), 0 bad" in printed and "not used: Nr" in printed
    assert "3 different answers" in printed
    assert "double BOS" in printed  # Llama 3's template and its tokenizer both write it
    assert "6 of 6 answers are as before" in printed
    assert "a first look at these 6 rows" in printed and "by the rule you ship:" in printed
    runs = tmp_path / "notebooks" / "runs" / "your_own_data"
    (sealed,) = map(json.loads, (runs / "test.jsonl").read_text().splitlines())  # without the repeat
    assert sealed["group"] == "new customer" and "test.jsonl: the sealed file" in printed
    card = card_in(tmp_path)
    assert (card.data.base_model, card.data.license) == (llama.name, "llama3")
    first, prompt, *others = scores_on(card)
    assert first == "tuned, served in q8_0" and f"| {prompt} | " in card.text.split("## Scores")[0]
    assert prompt in ("base", "longer prompt", "prompt + examples", "prompt + others")
    assert others == ["big-one", "most frequent", "nearest row"]
    assert re.search(r"\| rows \| 16 \(SHA-256 [0-9a-f]{12}\) \|", card.text)
    assert "| seed | 5 |" in card.text and "| base in | float32 |" in card.text
    assert re.search(r"\| revision of the base \| weights with SHA-256 [0-9a-f]{12} \|", card.text)
    assert card.text.split("## Limits\n\n")[1].rstrip() == "Tickets only."
    for fact in (
        "| rows a step | 4 |",
        "| alpha | 32 |",
        "| system prompt | Sort the ticket. |",
        "| scorer | same |",
        "| served against ",
    ):
        assert fact in card.text, fact
    assert re.search(r"\| test \| 6 rows of \d groups \(SHA-256 [0-9a-f]{12}\) \|", card.text)
    assert re.search(r"\| steps \| 8, step \d kept, the best on validation \|", card.text)
    for word in ("note", "rules", "English", "4 bits", "SmolLM2", "apache"):
        assert word not in card.content, word


def test_fields_with_a_base_that_thinks_and_rows_that_do_not(qwen, beside_data, tmp_path):
    code = small(
        cells(),
        qwen,
        invoices(tmp_path),
        COLUMNS="{'prompt': 'raw', 'completion': 'parsed', 'group': None}",
        SYSTEM="'Read the invoice.'",
        GUIDE="'Give item, qty and gift as JSON.'",
        SCORER="yours.fields_right",
        CONTROLS="{'nearest row': yours.nearest}",
        LIMITS="'Invoices only.'",
        RANK__ALPHA__RATE="4, 8, 1e-2",
    )
    told = """
from trl import SFTConfig, TrlParser
import sys
recipes = Path("../data").resolve().parent / "recipes"
sys.path.insert(0, str(recipes))
recipe = runpy.run_path(str(recipes / "sft.py"))
parser = TrlParser((recipe["Recipe"], SFTConfig))
parser.set_defaults_with_config(**recipe["DEFAULTS"])
known, args = parser.parse_args_and_config(["--config", str(RUNS / "dial.json")])
template = Path(args.chat_template_path).read_text(encoding="utf-8")
print("RECIPE", known.model == MODEL, args.learning_rate == RATE, args.num_train_epochs == PASSES, args.seed == SEED,
      args.max_length == parts.longest_row, template == tokenizer.chat_template, Path(known.train_file).is_file(),
      (known.lora_r, known.lora_alpha) == (4, 8))
sys.path.insert(0, str(recipes.parent))
rival = runpy.run_path(str(recipes / "evaluate.py"))
shell = dict(pair.split("=", 1) for pair in shlex.split((RUNS / "dial.sh").read_text()))
question = ["--model", shell["BASE"], *shlex.split(shell["TEST"]), *shlex.split(shell["PROMPT"]), "--out", "x.json"]
told, way = rival["parsed"](question), WAYS[best_way]
reads = rival["scorer_of"](told.scorer)
same = Path(shell["DIAL"]).samefile(RUNS / "dial.json")
print("SHELL", Path(told.file).is_file(), Path(told.system).is_file(), same, reads is SCORER,
      told.max_new_tokens == way.get("most", TOKENS), (told.chat_template is None) == ("reader" in way))
print("SERVED", json.dumps(served.answers), args.eval_steps == 0.2, args.gradient_accumulation_steps == ACCUMULATE)
print("TEMPLATE", "enable_thinking = false" in AutoTokenizer.from_pretrained(RUNS / "merged").chat_template)
"""
    learned = "tokenizer.decode([i for i in trainer.train_dataset[0]['labels'] if i != -100])"
    code["train"] += f"\nprint('TRAINED ON', {learned})"
    printed = beside_data("\n".join([*code.values(), told]))
    assert "thinking is switched off in the template" in printed and "split by row" in printed
    assert "template traps:\n  none" in printed
    trained = re.search(r"TRAINED ON (.*)", printed)[1]
    assert trained.startswith('{"item"') and "think" not in trained
    assert "TEMPLATE True" in printed
    assert re.search(r"SHELL (True ?){6}$", printed, re.M)
    assert re.search(r"prompt, thinking +\d\.\d", printed)  # the base may think before the training
    assert "RECIPE True True True True True True True True" in printed
    assert not any("think>" in text for text in json.loads(re.search(r"SERVED (.*) True True", printed)[1]))
    card = card_in(tmp_path)
    assert (card.data.base_model, card.data.license) == ("qwen", "mit")
    assert scores_on(card)[0] == "tuned, served in q8_0" and scores_on(card)[-1] == "nearest row"


def test_a_text_rewritten_from_few_documents(llama, beside_data, tmp_path):
    code = small(
        cells(),
        llama,
        drafts(tmp_path),
        COLUMNS="{'prompt': ['tone', 'draft'], 'completion': 'final', 'group': 'document'}",
        SYSTEM="''",
        GUIDE="'Make it polite.'",
        CONTROLS="{'unchanged': yours.unchanged}",
        LICENCE="'llama3'",
    )
    for cell in ("export", "serve", "test", "test-plot", "card"):
        code.pop(cell)
    printed = beside_data("\n".join(code.values()))
    assert "user: tone: polite\ndraft: " in printed
    assert "dealt by size" in printed and "groups in the test: 1" in printed
    assert "tuned against" in printed
    runs = tmp_path / "notebooks" / "runs" / "your_own_data"
    sides = {side: (runs / f"{side}.jsonl").read_text().splitlines() for side in ("test", "train", "validation")}
    assert [len(rows) for rows in sides.values()] == [12, 16, 18]  # test without what was answered
    assert "no clean second look" in printed


def python_in(cell: str) -> str:
    """The block of Python that a cell of prose shows."""
    return re.search(r"```python\n(.*?)```", "".join(CELLS[f"10_your_own_data#{cell}"]["source"]), re.S)[1]


def names_set(code: str) -> set[str]:
    """The names that the top level of a program assigns."""
    targets = [target for node in ast.parse(code).body if isinstance(node, ast.Assign) for target in node.targets]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def test_the_dial_that_is_shown_for_the_mails_is_a_whole_one_and_runs_to_its_bar(llama, beside_data, tmp_path):
    code, shown = cells(), python_in("dial-mails")
    assert names_set(shown) == names_set(code["dial"])
    said = {
        "Billing": "the invoice is wrong",
        "Supplies": "send sugar",
        "Breakdown": "it leaks",
        "Card reader": "no card",
    }
    mails = ["Nr;Customer;Message ;Team"]
    for number in range(120):
        team = list(said)[number % 4]
        mails.append(f"{number};customer {number % 30};{said[team]}, machine {number * 7};{team}")
    code = small(code | {"dial": shown}, llama, Path("runs/mails.csv"), LICENCE="'llama3'")
    code["imports"] += "\nPath('runs').mkdir()\nPath('runs/mails.csv').write_text(" + repr("\n".join(mails)) + ")"
    kept = ("imports", "dial", "dial-run", "report", "split", "model", "lengths", "base", "asked", "rules")
    printed = beside_data("\n".join(code[name] for name in kept))
    assert "mails.csv: 120 good rows (prompt_completion), 0 bad" in printed
    bar = dict(re.findall(r"^(\S.*?) +(\d\.\d{3}) \[.*\(\d of 6 right\)", printed, re.M))
    assert set(bar) == {
        "base",
        "longer prompt",
        "prompt + examples",
        "prompt + others",
        "most frequent",
        "nearest mail",
    }
    assert bar["nearest mail"] == "1.000"  # each team has words of its own


def test_the_lines_for_an_8b_change_nothing_but_the_dial():
    assert names_set(python_in("work-says")) <= names_set(cells()["dial-run"])


# --- Bases ----------------------------------------------------------------------------------------


def test_rows_with_reasoning_teach_it_and_the_scorer_sees_the_answer(qwen, beside_data, tmp_path):
    file = tmp_path / "reasons.jsonl"
    thought = "<think>\nIt took {0} days.\n</think>\n\nlate"
    rows = [{"q": f"Order {i}?", "a": thought.format(i), "who": i % 20} for i in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code = small(
        cells(),
        qwen,
        file,
        COLUMNS="{'prompt': 'q', 'completion': 'a', 'group': 'who'}",
        SCORER="yours.same",
        CONTROLS="{'most frequent': yours.majority}",
    )
    told = """
print("TRAINED ON", repr(tokenizer.decode([i for i in trainer.train_dataset[0]["labels"] if i != -100])))
print("RIGHT", scored.__name__, SCORER("<think>\\nhm\\n</think>\\n\\nlate", choose[0]), TOKENS > 12)
"""
    kept = (
        "imports",
        "dial",
        "dial-run",
        "report",
        "split",
        "model",
        "lengths",
        "base",
        "generate",
        "asked",
        "rules",
        "options",
        "train",
    )
    printed = beside_data("\n".join([*(code[name] for name in kept), told]))
    assert "every row reasons" in printed and "  thinking: before an answer" in printed
    assert re.search(r"TRAINED ON '<think>\\nIt took \d+ days.\\n</think>\\n\\nlate<\|im_end\|>", printed)
    assert "RIGHT scored 1.0 True" in printed
    assert re.search(r"most frequent +1\.000", printed)  # what a row answers, without its reasoning


def test_a_4_bit_base_is_trained_and_merged_into_its_dequantized_weights(llama, beside_data, tmp_path):
    nf4 = "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.float32)"
    code = small(
        cells(),
        llama,
        tickets(tmp_path),
        COLUMNS="{'prompt': 'Text', 'completion': 'label', 'group': 'Kunde'}",
        SCORER="yours.same",
        CONTROLS="{}",
        LICENCE="'llama3'",
        BNB=nf4,
    )
    kept = (
        "imports",
        "dial",
        "dial-run",
        "report",
        "split",
        "model",
        "lengths",
        "base",
        "asked",
        "rules",
        "options",
        "train",
        "evaluate",
    )
    before = """
batch = tokenizer.apply_chat_template(yours.prompts_of(choose)[0], add_generation_prompt=True, return_tensors="pt",
                                      return_dict=True)
with evaluate.plain_inference(trainer.model):  # without the autocast that the trainer leaves around it
    apart = trainer.model(**batch).logits.float()
"""
    proof = """
with torch.inference_mode():
    together = AutoModelForCausalLM.from_pretrained(RUNS / "merged", dtype=torch.float32).eval()(**batch).logits
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    wrong = PeftModel.from_pretrained(plain, RUNS / "adapter").merge_and_unload().eval()(**batch).logits
print("DIFFERENCES", (apart - together).abs().max().item(), (apart - wrong).abs().max().item())
"""
    printed = beside_data("\n".join([*(code[name] for name in kept), before, code["free"], code["export"], proof]))
    right, wrong = map(float, re.search(r"DIFFERENCES (\S+) (\S+)", printed).groups())
    assert right < 1e-3 and wrong > 10 * right


# --- Bad input: what is printed -------------------------------------------------------------------

GOOD = [{"text": f"order {i} number {i * 7}", "label": "ab"[i % 2], "who": f"c{i % 30}"} for i in range(120)]
LETTER = " ".join(f"word{k}" for k in range(40))
NAMES = {"prompt": "text", "completion": "label", "group": "who"}


def with_twins() -> list[dict]:
    return [*GOOD, *({"text": LETTER, "label": "a", "who": f"c{i}"} for i in range(30))]


def long_rows() -> list[dict]:
    def text(i: int) -> str:
        return " ".join(f"w{i}x{k}" for k in range(40)) if i % 4 == 0 else GOOD[i]["text"]

    return [row | {"text": text(i)} for i, row in enumerate(GOOD)]


BAD = {  # case -> (name of the file, rows or bytes, what the dial says, words of what is printed or raised)
    "no file": (
        "tickets.csv",
        None,
        {},
        ["no file", "tickets.csv", "seen from", "tickets_2026.csv"],
    ),
    "an empty file": ("t.csv", b"", {}, ["0 good rows", "got 0 rows, wanted at least three"]),
    "a delimiter that nobody has": (
        "t.csv",
        b"text^label^who\na^b^c\n",
        {},
        ["got the columns ['text^label^who']", "wanted 'text' for prompt", "parted by"],
    ),
    "Excel's Unicode text": (
        "t.csv",
        "text\tlabel\twho\na\tb\tc\n".encode("utf-16"),
        {},
        ["got UTF-16", "wanted UTF-8"],
    ),
    "a column `label` besides": (
        "t.jsonl",
        [row | {"answer": "x" + row["label"]} for row in GOOD],
        {"COLUMNS": NAMES | {"completion": "answer"}},
        ["120 good rows (prompt_completion), 0 bad", "not used: label", "the longest row has"],
    ),
    "no column of groups": (
        "t.jsonl",
        GOOD,
        {"COLUMNS": NAMES | {"group": "customer"}},
        ["wanted 'customer' for group", "belong together", '"group": None'],
    ),
    "an empty answer": (
        "t.jsonl",
        [row | {"label": "" if i == 4 else row["label"]} for i, row in enumerate(GOOD)],
        {},
        ["119 good rows", "empty assistant message", "line 5", "the longest row has"],
    ),
    "rows longer than the context": (
        "t.jsonl",
        long_rows(),
        {"CONTEXT": 80},
        [
            "rows of more than 80 tokens left out",
            "training would cut off their answers",
            "the longest row has",
        ],
    ),
    "all rows longer than the context": (
        "t.jsonl",
        GOOD,
        {"CONTEXT": 8},
        ["none of at most 8 tokens", "allow more"],
    ),
    "one class only": (
        "t.jsonl",
        [row | {"label": "a"} for row in GOOD],
        {},
        ["every answer is 'a'", "nothing to learn"],
    ),
    "twelve rows": (
        "t.jsonl",
        GOOD[:12],
        {},
        ["rows in the test:", "too few to tell two models apart"],
    ),
    "two rows": ("t.jsonl", GOOD[:2], {}, ["got 2 rows, wanted at least three"]),
    "duplicates across groups": (
        "t.jsonl",
        with_twins(),
        {},
        ["rows left out: they nearly repeat a prompt of a part before", "the longest row has"],
    ),
    "one group with most rows": (
        "t.jsonl",
        [row | {"who": "big" if i % 10 else row["who"]} for i, row in enumerate(GOOD)],
        {},
        ["group 'big' has", "all of them are trained on", "the longest row has"],
    ),
    "a base that thinks": (
        "t.jsonl",
        GOOD,
        {"MODEL": "qwen"},
        [
            "no row reasons, so thinking is switched off",
            "template traps:\n  none",
            "the longest row has",
        ],
    ),
    "a base that thinks and rows of which some do": (
        "t.jsonl",
        [row | {"label": "<think>hm</think>b" if i % 2 else "a"} for i, row in enumerate(GOOD)],
        {"MODEL": "qwen"},
        [
            "60 of 120 rows reason",
            "is that meant?",
            "thinking: before an answer the template writes",
        ],
    ),
    "a gated base": (
        "t.jsonl",
        GOOD,
        {"MODEL": "some/gated"},
        ["some/gated is gated", "https://huggingface.co/some/gated", "hf auth login"],
    ),
    "a base that is not there": (
        "t.jsonl",
        GOOD,
        {"MODEL": "nowhere/at-all"},
        ["cannot load nowhere/at-all", "misspelt", "network"],
    ),
    "a base without a licence": (
        "t.jsonl",
        GOOD,
        {"LICENCE": None},
        ["the licence of llama cannot be read", "licence="],
    ),
}

EACH = """
from transformers.utils import hub
import contextlib, io, types
real = hub.hf_hub_download

def asked(repo, *args, **kwargs):
    if repo == "some/gated":
        raise hub.GatedRepoError("401 Client Error", response=types.SimpleNamespace(headers={}, request=None))
    return real(repo, *args, **kwargs)

hub.hf_hub_download = asked
for name, values in json.load(open(CASES)).items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            exec(DIAL, globals())
            (RUNS / "splits.json").unlink(missing_ok=True)  # of the case before
            globals().update(values)
            for source in SOURCES:
                exec(source, globals())
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    print("CASE", json.dumps([name, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def told(llama, qwen, start, tmp_path_factory) -> dict[str, str]:
    """What the cells up to the training print for each bad input, by case; one process for all."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "data").symlink_to(ROOT / "data")
    before = folder / "notebooks" / "runs" / "your_own_data" / "adapter"
    before.mkdir(parents=True)
    (before / "of_yesterday").write_text("kept")
    cases, files = {}, {}
    for number, (case, (name, rows, values, _)) in enumerate(BAD.items()):
        place = folder / f"case {number}"
        place.mkdir()
        file = place / name
        if rows is None:
            (place / "tickets_2026.csv").write_text("text,label\n")
        elif isinstance(rows, bytes):
            file.write_bytes(rows)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files |= {path: path.read_bytes() for path in place.iterdir()}
        base = {"qwen": str(qwen)}.get(values.get("MODEL"), values.get("MODEL", str(llama)))
        usual = {"COLUMNS": NAMES, "SYSTEM": "Sort it.", "LICENCE": "llama3"}
        cases[case] = usual | values | {"FILE": str(file), "MODEL": base}
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    code = cells()
    dial = code["dial"] + "\n" + code["dial-run"]
    sources = [code[name] for name in ("report", "split", "model", "lengths")]
    run = [
        code["imports"],
        f"CASES, DIAL, SOURCES = {str(folder / 'cases.json')!r}, {dial!r}, {sources!r}",
        EACH,
    ]
    printed = in_folder("\n".join(run), folder, start)
    found = dict(json.loads(line) for line in re.findall(r"^CASE (.*)$", printed, re.M))
    assert all(path.read_bytes() == bytes_ for path, bytes_ in files.items())
    assert (before / "of_yesterday").read_text() == "kept"
    return found


def in_folder(code: str, folder: Path, start) -> str:
    from scripts import run_cells

    (folder / "notebooks" / "cells.py").write_text(code, "utf-8")
    said = [folder / name for name in ("printed", "errors")]
    process = start(run_cells, folder / "notebooks", said)
    process.join()
    assert process.exitcode == 0, said[1].read_text("utf-8")[-3000:]
    return said[0].read_text("utf-8")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_training_and_nothing_is_lost(told, case):
    for words in BAD[case][3]:
        assert words in told[case], told[case]


def test_twelve_rows_run_to_a_comparison_that_says_they_are_too_few(llama, beside_data, tmp_path):
    file = tmp_path / "twelve.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GOOD[:12]), encoding="utf-8")
    code = small(
        cells(),
        llama,
        file,
        COLUMNS=repr(NAMES),
        SCORER="yours.same",
        CONTROLS="{'most frequent': yours.majority}",
        LICENCE="'llama3'",
    )
    for cell in ("generate", "free", "export", "serve", "test", "test-plot", "card"):
        code.pop(cell)
    printed = beside_data("\n".join(code.values()))
    assert re.search(r"rows in the test: \d+, too few", printed)
    assert "rows are too few to tell" in printed.split("on validation:")[1]


# --- What the text says ---------------------------------------------------------------------------


def test_the_commands_of_the_recipes_name_options_that_they_have():
    text = "\n".join("".join(cell["source"]) for cell in NOTEBOOKS["10_your_own_data"])
    lines = re.findall(r"^python recipes/(\w+)\.py (.*)$", text, re.M)
    assert {name for name, _ in lines} >= {"sft", "evaluate", "merge"}
    lines += [("evaluate", words) for words in re.findall(r'^[A-Z]="(--.*?)"', text, re.M)]
    for name, words in lines:
        source = (ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8")
        known = source + (ROOT / "recipes" / "common.py").read_text(encoding="utf-8")
        for option in re.findall(r"--(\w+)", words):
            assert re.search(rf"\b{option}\b", known), f"{name}: --{option}"
        assert script(f"recipes/{name}.py").main
