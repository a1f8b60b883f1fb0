"""recipes/: each script from its command line to its end, on a CPU, and what it says of
bad input.

What is killed runs in a process of its own (forkserver). Nothing here needs the network.
"""

import ast
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest
from scripts import ROOT, script
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub

from ftlab import answers, statistics
from ftlab.memory import architectures
from ftlab.paths import DATA
from notebooks import CELLS

RECIPES = ROOT / "recipes"
NAMES = ("sft", "qlora_8b", "evaluate", "merge")
TRAINERS = ("sft", "qlora_8b")
MICRO, HELD_OUT = str(DATA / "micro" / "model"), DATA / "ask" / "validation.jsonl"
pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, *words) -> None:
    script(f"recipes/{name}.py").main([str(word) for word in words])


def train(name: str, folder: Path, *words) -> None:
    run(name, "--tiny", "--output_dir", folder, "--disable_tqdm", "true", *words)


def log_of(folder: Path, step: int = 6) -> list[dict]:
    state = folder / f"checkpoint-{step}" / "trainer_state.json"
    return json.loads(state.read_text())["log_history"]


def series(folder: Path, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in log_of(folder) if key in entry}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def write(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def chat(question: str, answer: str) -> dict:
    says = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    return dict(zip(("prompt", "completion"), says, strict=True))


@pytest.fixture(scope="module", params=TRAINERS)
def trained(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(request.param, folder)
    return request.param, folder


# --- Training -------------------------------------------------------------------------------------


def test_it_learns(trained):
    _, folder = trained
    loss, judged = series(folder, "loss"), series(folder, "eval_loss")
    assert loss[6] < loss[1] - 1 and judged[6] < judged[4] < judged[2]
    assert all(norm > 0 for norm in series(folder, "grad_norm").values())
    saved = weights(folder / "checkpoint-6")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}  # what Adam worked on


def test_evaluations_do_not_change_what_is_learned(trained, tmp_path):
    """A CPU with bf16: bitsandbytes repacks 4-bit weights in eval mode and loses the gradient."""
    name, whole = trained
    train(name, tmp_path, "--eval_steps", 1)
    assert len(series(tmp_path, "eval_loss")) == 2 * len(series(whole, "eval_loss"))
    assert series(tmp_path, "loss") == pytest.approx(series(whole, "loss"), rel=1e-6)
    assert series(tmp_path, "grad_norm") == pytest.approx(series(whole, "grad_norm"), rel=1e-5)


def test_the_record_says_what_ran_and_no_card_where_there_is_none(trained):
    name, folder = trained
    record = json.loads((folder / "adapter" / "record.json").read_text())
    judged = series(folder, "eval_loss")
    assert record["recipe"] == name and record["steps"] == 6 and record["seconds_a_step"] > 0
    assert record["best_eval_loss"] == judged[record["best_step"]] == min(judged.values())
    assert record["load_in_4bit"] == (name == "qlora_8b")
    if not torch.cuda.is_available():
        assert record["card"] is None and record["peak_allocated_gb"] is None


def run_and_die(name: str, folder: Path) -> None:
    """Kills itself as soon as the second checkpoint is whole, two steps before the end."""
    torch.set_num_threads(1)

    def watch() -> None:
        while True:
            try:
                json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
            except (OSError, ValueError):
                time.sleep(0.002)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    train(name, folder)


def test_killed_and_resumed_it_ends_as_the_run_that_nothing_happened_to(trained, apart, tmp_path):
    name, whole = trained
    folder = tmp_path / "run"
    assert apart(run_and_die, name, folder) == -signal.SIGKILL
    assert not (folder / "adapter").exists()
    written = (folder / "checkpoint-4" / "adapter_model.safetensors").stat().st_mtime_ns
    (folder / "checkpoint-5").mkdir()  # one that was still being written
    shutil.copy(folder / "checkpoint-4" / "adapter_model.safetensors", folder / "checkpoint-5")
    with pytest.raises(SystemExit, match="--resume"):
        train(name, folder)
    train(name, folder, "--resume", "--save_total_limit", 3)
    assert (folder / "checkpoint-4" / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert series(folder, "loss") == pytest.approx(series(whole, "loss"), rel=1e-6)
    for key, weight in weights(whole / "adapter").items():
        torch.testing.assert_close(weights(folder / "adapter")[key], weight)


def test_the_best_checkpoint_is_kept_and_not_the_last(tmp_path):
    """The rows to learn are noise; the validation rows are what the model says by itself."""
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    asked = ["What is 2 plus 2?", "Say hello.", "Count to three.", "Spell cat."]
    said = answers(model, tokenizer, [chat(question, "")["prompt"] for question in asked], 12)
    noise = write(tmp_path / "train.jsonl", [chat(question, "xq zv qj kw") for question in asked])
    own = write(tmp_path / "own.jsonl", list(map(chat, asked, said)))
    folder = tmp_path / "run"
    train("sft", folder, "--train_file", noise, "--validation_file", own, "--learning_rate", 0.01)
    judged = series(folder, "eval_loss")
    best = min(judged, key=judged.get)
    record = json.loads((folder / "adapter" / "record.json").read_text())
    assert record["best_step"] == best < 6
    assert same(weights(folder / "adapter"), weights(folder / f"checkpoint-{best}"))
    assert not same(weights(folder / "adapter"), weights(folder / "checkpoint-6"))


@pytest.mark.parametrize("name", TRAINERS)
def test_random_weights_measure_a_step_with_full_rows(name, tmp_path, capsys):
    train(name, tmp_path, "--random_weights", "tiny", "--max_length", 32)
    record = json.loads((tmp_path / "adapter" / "record.json").read_text())
    assert record["base"] == "tiny" and record["seconds_a_step"] > 0


def test_the_random_8b_has_as_many_weights_as_the_published_one():
    from transformers import LlamaConfig

    shapes = script("recipes/random_weights.py").SHAPES
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shapes["llama-3.1-8b"]))
    assert model.num_parameters() == architectures()["Llama-3.1-8B"].params


def test_random_weights_have_bytes_of_their_own():
    """Weights that shared their bytes would make the peak look far too small."""
    module = script("recipes/random_weights.py")
    model, _ = module.random_base("tiny", dtype=torch.float32, device_map={"": "cpu"})
    stored = [weight.untyped_storage() for weight in model.parameters()]
    held = sum({each.data_ptr(): each.nbytes() for each in stored}.values())
    assert held >= 4 * model.num_parameters()


def test_the_two_trainings_differ_in_nothing_but_the_base():
    sft, qlora = (script(f"recipes/{name}.py") for name in TRAINERS)
    apart = {"output_dir"}
    assert sft.TINY == qlora.TINY and sft.DEFAULTS.keys() == qlora.DEFAULTS.keys()
    assert {key for key in sft.DEFAULTS if sft.DEFAULTS[key] != qlora.DEFAULTS[key]} == apart


# --- Merging and evaluating -----------------------------------------------------------------------


def test_the_merged_model_answers_as_the_adapter_did(trained, tmp_path, capsys):
    _, folder = trained
    run("evaluate", "--tiny", "--adapter", folder / "adapter", "--out", tmp_path / "tuned.json")
    run("merge", "--adapter", folder / "adapter", "--out", tmp_path / "merged")
    run("evaluate", "--tiny", "--model", tmp_path / "merged", "--out", tmp_path / "merged.json",
        "--against", tmp_path / "tuned.json")  # fmt: skip
    run("evaluate", "--tiny", "--out", tmp_path / "base.json")
    files = [tmp_path / f"{name}.json" for name in ("tuned", "merged", "base")]
    tuned, merged, base = [json.loads(file.read_text())["answers"] for file in files]
    assert merged == tuned != base
    assert "0 rows better, 0 worse. The interval includes zero" in capsys.readouterr().out
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in stored.values())  # no 4-bit codes


def test_an_adapter_of_another_base_is_not_merged_unseen(trained, tmp_path):
    """An adapter whose B is zero changes nothing: somebody took the wrong folder."""
    from safetensors.torch import save_file

    _, folder = trained
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    zeros = {k: w * ("lora_B" not in k) for k, w in weights(folder / "adapter").items()}
    save_file(zeros, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="changes nothing"):
        run("merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_answers_are_those_of_the_course_whatever_the_batch(batch_size, tmp_path):
    out = tmp_path / "base.json"
    run("evaluate", "--tiny", "--batch_size", batch_size, "--out", out)
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()[:24]]
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    prompts = [row["prompt"] for row in rows]
    wanted = answers(model, AutoTokenizer.from_pretrained(MICRO), prompts, 48)
    assert json.loads(out.read_text())["answers"] == wanted


def test_the_scorer_is_yours_and_the_default_wants_the_completion(tmp_path, monkeypatch):
    module = "def length(answer, row):\n    return min(len(answer), 100) / 100\n"
    (tmp_path / "my_scores.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    run("evaluate", "--tiny", "--out", tmp_path / "a.json", "--scorer", "my_scores:length")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["scores"] == [min(len(answer), 100) / 100 for answer in found["answers"]]
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    exact = script("recipes/evaluate.py").exact_match
    assert exact(" 4 \n", chat("2 + 2?", "4")) and not exact("5", chat("2 + 2?", "4"))


# --- Intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 31, 400])
def test_the_interval_of_a_share_is_wilsons(n):
    interval = script("recipes/evaluate.py").interval
    for right in {0, 1, n // 3, n}:
        wanted = binomtest(right, n).proportion_ci(method="wilson")
        got = interval([1.0] * right + [0.0] * (n - right))
        assert got == pytest.approx((wanted.low, wanted.high), abs=1e-4)


@pytest.mark.parametrize("n", [6, 24, 132])
def test_the_paired_interval_of_zeros_and_ones_is_the_courses(n):
    """All ways of being better and worse: the one of ftlab, which has tests of its own."""
    paired = script("recipes/evaluate.py").paired_interval
    for better, worse in itertools.product(range(6), range(6)):
        if better + worse > n:
            continue
        same = n - better - worse
        ours = [1.0] * better + [0.0] * worse + [1.0] * same
        theirs = [0.0] * better + [1.0] * worse + [1.0] * same
        wanted = statistics.agresti_min_interval(better, worse, n)
        assert paired(ours, theirs) == pytest.approx(wanted, abs=1e-4)


def test_the_interval_of_other_scores_is_students_for_many_rows():
    module, random = script("recipes/evaluate.py"), np.random.default_rng(3)
    ours, theirs = random.uniform(0.2, 1, 300), random.uniform(0, 0.9, 300)
    _, low, high = statistics.student_interval(ours - theirs)
    assert module.paired_interval(list(ours), list(theirs)) == pytest.approx((low, high), abs=4e-3)
    _, low, high = statistics.student_interval(ours)
    assert module.interval(list(ours)) == pytest.approx((low, high), abs=4e-3)


# --- Bad input ------------------------------------------------------------------------------------


def line_of(name: str, *words) -> str:
    """The one line with which it stops."""
    with pytest.raises(SystemExit) as stopped:
        run(name, *words)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


def gated(*args, **kwargs):
    raise hub.GatedRepoError("401 Client Error", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("name", [*TRAINERS, "evaluate"])
def test_a_gated_model_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", gated)  # transformers' own words come from there
    where = "--out" if name == "evaluate" else "--output_dir"
    line = line_of(name, "--tiny", "--model", "some/gated", where, tmp_path / "run")
    assert "some/gated is gated" in line and "hf auth login" in line
    assert "https://huggingface.co/some/gated" in line


@pytest.mark.parametrize("name", [*TRAINERS, "evaluate"])
@pytest.mark.parametrize("model", ["no/such-model", "/no/such/folder", str(DATA / "ask")])
def test_a_model_that_is_not_there_is_named(name, model, tmp_path):
    where = "--out" if name == "evaluate" else "--output_dir"
    assert model in line_of(name, "--tiny", "--model", model, where, tmp_path / "run")


BAD_ROWS = {
    "other columns": ('{"question": "q", "answer": "a"}', ["line 1", "question, answer", "prompt"]),
    "messages": ('{"messages": []}', ["line 1", "messages", "every token"]),
    "no JSON": ("prompt,completion", ["line 1", "no JSON"]),
    "a list": ("[1]", ["line 1", "list"]),
    "mixed": ('{"prompt": "q", "completion": []}', ["line 1", "two texts or two lists"]),
    "empty": ("", ["empty"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named_with_their_line(case, tmp_path):
    text, told = BAD_ROWS[case]
    (tmp_path / "bad.jsonl").write_text(text)
    given = {"train_file": ("sft", "--output_dir"), "file": ("evaluate", "--out")}
    for option, (name, where) in given.items():
        bad = [f"--{option}", tmp_path / "bad.jsonl"]
        line = line_of(name, "--tiny", *bad, where, tmp_path / "to")
        assert "bad.jsonl" in line and all(words in line for words in told)


def test_messages_for_a_model_without_a_template_are_refused(tmp_path):
    shutil.copytree(MICRO, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    words = ["--tiny", "--model", tmp_path / "base", "--output_dir", tmp_path / "run"]
    assert "chat template" in line_of("sft", *words)


def test_what_is_missing_or_in_the_way_is_said(trained, tmp_path):
    _, folder = trained
    adapter = folder / "adapter"
    assert "no file" in line_of("sft", "--model", MICRO, "--output_dir", tmp_path / "run")
    assert "no whole checkpoint" in line_of("sft", "--tiny", "--resume", "--output_dir", tmp_path)
    odd = ["--random_weights", "llama-9", "--output_dir", tmp_path / "run"]
    assert "llama-3.1-8b" in line_of("qlora_8b", *odd)
    assert "adapter_config.json" in line_of("merge", "--adapter", tmp_path, "--out", tmp_path / "m")
    assert "is there already" in line_of("merge", "--adapter", adapter, "--out", tmp_path)
    shutil.copytree(adapter, tmp_path / "foreign")
    (tmp_path / "foreign" / "record.json").unlink()
    foreign = ["--adapter", tmp_path / "foreign", "--out", tmp_path / "out"]
    assert "record.json" in line_of("merge", *foreign)
    assert "record.json" in line_of("evaluate", "--tiny", *foreign)
    wrong = ["--out", tmp_path / "a.json", "--scorer", "no_such_module:f"]
    assert "no_such_module" in line_of("evaluate", "--tiny", *wrong)


def test_scores_of_other_rows_are_not_compared(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    run("evaluate", "--tiny", "--limit", 6, "--max_new_tokens", 2, "--out", first)
    words = ["--tiny", "--limit", 7, "--max_new_tokens", 2, "--out", second, "--against", first]
    assert "other rows" in line_of("evaluate", *words)


# --- The page and the house -----------------------------------------------------------------------


def on_a_gpu(name: str, records: Path) -> str:
    """What the page must say of a recipe: the newest of its records that names a card."""
    found = [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))]
    found = [record for record in found if record["recipe"] == name and record["card"]]
    if not found:
        return "not yet run on a GPU"
    newest = max(found, key=lambda record: record["date"])
    return f"run on {newest['card']}, {newest['date']}"


def told(page: str) -> dict[str, str]:
    """The last column of the page's table, by recipe."""
    return dict(re.findall(r"^\| \[`(\w+)\.py`\].*\| ([^|]+) \|$", page, re.MULTILINE))


def test_the_page_says_of_each_recipe_whether_it_ran_on_a_gpu():
    page = told((RECIPES / "README.md").read_text(encoding="utf-8"))
    assert page == {name: on_a_gpu(name, RECIPES / "records") for name in NAMES}


def test_a_record_changes_what_the_page_must_say(tmp_path):
    common = script("recipes/common.py")
    common.write_record(tmp_path / "cpu.json", recipe="sft")
    if not torch.cuda.is_available():
        assert on_a_gpu("sft", tmp_path) == "not yet run on a GPU"  # a run on a CPU is none
    for number, date in enumerate(("2026-11-02", "2027-01-05")):
        record = {"recipe": "sft", "card": f"Card {number}", "date": date}
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    assert on_a_gpu("sft", tmp_path) == "run on Card 1, 2027-01-05"
    assert on_a_gpu("merge", tmp_path) == "not yet run on a GPU"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.py")), ids=lambda file: file.name)
def test_a_recipe_needs_neither_ftlab_nor_wide_screens(file):
    text = file.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    beside = {other.stem for other in RECIPES.glob("*.py")}
    libraries = {name.split(".")[0] for name in names} - beside - set(sys.stdlib_module_names)
    known = {
        "torch",
        "numpy",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "tokenizers",
        "yaml",
    }
    assert libraries <= known
    assert max(map(len, text.splitlines())) <= 100


# --- What lessons show of them --------------------------------------------------------------------

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(cells: dict[str, dict]) -> list[tuple[str, str, str]]:
    """(cell, language, text) of each fenced block in the prose."""
    prose = {name: cell for name, cell in cells.items() if cell["cell_type"] == "markdown"}
    found = []
    for name, cell in prose.items():
        for language, text in FENCED.findall("".join(cell["source"])):
            found.append((name, language, text))
    return found


def strange_lines(cells: dict[str, dict]) -> list[str]:
    """Blocks that begin with "# recipes/NAME.py" and whose lines don't stand in it one after the other."""
    found = []
    for name, _, text in blocks_of(cells):
        head, _, lines = text.partition("\n")
        file = head.removeprefix("# ")
        if file.startswith("recipes/") and lines not in (ROOT / file).read_text(encoding="utf-8"):
            found.append(f"{name}: {file}")
    return found


def strange_options(cells: dict[str, dict]) -> list[str]:
    """Options of `python sft.py --option` and its like that the recipe doesn't know."""
    found = []
    for name, _, text in blocks_of(cells):
        for line in text.replace("\\\n", " ").splitlines():
            command = re.search(rf"python (?:recipes/)?({'|'.join(TRAINERS)})\.py(.*)", line)
            if command:
                recipe = script(f"recipes/{command[1]}.py")
                known = {
                    *recipe.Recipe.__dataclass_fields__,
                    *recipe.SFTConfig.__dataclass_fields__,
                    "config",  # TrlParser's: a file with any of these
                }
                options = re.findall(r"--(\w+)", command[2])
                found += [f"{name}: --{option}" for option in options if option not in known]
    return found


def test_lessons_show_a_recipes_lines_as_they_are():
    assert strange_lines(CELLS) == [] and strange_options(CELLS) == []
    assert any(text.startswith("# recipes/sft.py") for _, _, text in blocks_of(CELLS))


def test_a_changed_line_and_an_unknown_option_are_found():
    def cell(text):
        return {"a": {"cell_type": "markdown", "source": [text]}}

    line = '    "max_length": 1024,\n'
    assert strange_lines(cell(f"```python\n# recipes/sft.py\n{line}```")) == []
    changed = line.replace("1024", "2048")
    assert strange_lines(cell(f"```python\n# recipes/sft.py\n{changed}```")) == ["a: recipes/sft.py"]
    command = "```bash\npython sft.py --max_length 9 \\\n    --no_such 3\n```"
    assert strange_options(cell(command)) == ["a: --no_such"]
