"""One task on the same rows through TRL, Unsloth, LLaMA-Factory and Axolotl, on a CPU (about ten minutes of one core).

    make stack
    python experiments/stack_peers/run.py [arm ...]

Adds a line to records.jsonl beside this file after each arm, and goes on when started again. SmolLM2-135M, LoRA r = 16
on all linear layers, fp32, seed 0, 4 rows a step, one thread: SFT on 48 rows of data/ask (8 steps), and DPO on 24
pairs made of them (6 steps; rejected is the next row's query). TRL and Unsloth run the learner's code, in a process of
their own; the others run what ftlab.dialects writes, in the environments that `make stack` makes, by their own command.

A line's part. runs: losses in nats/token (sft) or nats/pair (dpo) by step, processor seconds with the start-up, peak
resident MB.
"without the plugin" (twice): Axolotl without the line that sets the seed before lora_A is drawn. tokens: how many rows
have the ids and labels of the template, by each tool's own preprocessing. chat_template: what Axolotl's usual dataset
type leaves out of the loss. wrong_keys: what each tool says of a key that it does not know.
"""

import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

HERE = Path(__file__).parent
RESULT = Path(__file__).with_name("records.jsonl")
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "peers")]
import runner  # noqa: E402

from ftlab import dialects, model_path  # noqa: E402
from ftlab.paths import DATA  # noqa: E402

ARMS = [
    ("sft", "trl", ""),
    ("sft", "unsloth", ""),
    ("sft", "llamafactory", ""),
    ("sft", "axolotl", ""),
    ("sft", "axolotl", "without the plugin"),
    ("sft", "axolotl", "without it again"),
    ("dpo", "trl", ""),
    ("dpo", "llamafactory", ""),
    ("dpo", "axolotl", ""),
]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth", "axolotl", "llamafactory")
WRITERS = {"axolotl": dialects.write_axolotl, "llamafactory": dialects.write_llamafactory}


def rows_of(method: str) -> list[dict]:
    """The first rows of data/ask; for dpo with another row's query as the rejected one."""
    lines = (DATA / "ask" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:49]
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in map(json.loads, lines)]
    if method == "sft":
        return rows[:48]
    sides = itertools.pairwise(rows)
    return [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]} for a, b in sides][:24]


def settings(method: str, steps: int = 0):
    """(args, lora) of the run. save_steps: so that the peers leave their log."""
    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    config, rate, steps = (SFTConfig, 1e-3, steps or 8) if method == "sft" else (DPOConfig, 1e-4, steps or 6)
    args = config(
        "runs", learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=2, max_steps=steps, save_steps=steps,
        per_device_train_batch_size=4, seed=0, logging_steps=1, report_to="none", disable_tqdm=True,
        gradient_checkpointing=False, bf16=False, use_cpu=True,
    )  # fmt: skip
    return args, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def ours(method: str, tool: str, name: str = "smollm2", steps: int = 0) -> dict:
    """The learner's run, in this process: its log."""
    if tool == "unsloth":
        from unsloth import FastLanguageModel  # before transformers and trl
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DPOTrainer, SFTTrainer

    (args, lora), model = settings(method, steps), model_path(name)
    if tool == "unsloth":
        model, tokenizer = FastLanguageModel.from_pretrained(model, dtype=torch.float32, load_in_4bit=False)
        shape = {"r": lora.r, "lora_alpha": lora.lora_alpha, "use_gradient_checkpointing": False}
        model, lora = FastLanguageModel.get_peft_model(model, random_state=args.seed, **shape), None
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        set_seed(args.seed)  # before lora_A is drawn
    trainer = {"sft": SFTTrainer, "dpo": DPOTrainer}[method](
        model, args=args, train_dataset=Dataset.from_list(rows_of(method)), processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    return runner.logged(trainer.state.log_history)


def run_arm(method: str, tool: str, variant: str, folder: Path) -> dict:
    if tool in ("trl", "unsloth"):
        command = [sys.executable, str(Path(__file__).resolve()), "--ours", method, tool, "log.json"]
        extra = {"PYTHONPATH": str(DATA.parent), "UNSLOTH_AUTO_INSTALL": "0", "UNSLOTH_DISABLE_STATISTICS": "1"}
        used = runner.measured(command, folder, {**os.environ, **runner.QUIET, **extra})
        run = {**json.loads((folder / "log.json").read_text(encoding="utf-8")), **used}
    else:
        config = WRITERS[tool](*settings(method), model_path("smollm2"), rows_of(method), folder)
        if variant:
            change(config, plugins=None)
        run = runner.train(config)
    return {"method": method, "tool": tool, "variant": variant, **run, "load": round(os.getloadavg()[0], 2)}


def change(config: Path, **keys: object) -> None:
    """Keys of a YAML file changed; with None, taken out."""
    said = yaml.safe_load(config.read_text(encoding="utf-8")) | keys
    said = {key: value for key, value in said.items() if value is not None}
    config.write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")


def compare_tokens(method: str, tool: str, folder: Path) -> dict:
    """How many rows have the ids and labels of the template, by the tool's own preprocessing."""
    from transformers import AutoTokenizer

    tokenizer, rows = AutoTokenizer.from_pretrained(model_path("smollm2")), rows_of(method)
    theirs = runner.ask(tool, "tokens", WRITERS[tool](*settings(method), model_path("smollm2"), rows, folder))
    wanted = [runner.wanted_row(row, tokenizer) for row in rows]
    equal = sum(a == runner.peer_row(b) for a, b in zip(wanted, theirs, strict=True))
    return {"method": method, "tool": tool, "rows": len(rows), "equal": equal}


def chat_template_labels(folder: Path) -> dict:
    """What Axolotl's usual dataset type leaves out of the loss that the template's rows count."""
    from transformers import AutoTokenizer

    tokenizer, rows = AutoTokenizer.from_pretrained(model_path("smollm2")), rows_of("sft")
    config = dialects.write_axolotl(*settings("sft"), model_path("smollm2"), rows, folder)
    change(config, datasets=[{"path": "chat.jsonl", "ds_type": "json", "split": "train", "type": "chat_template"}])
    chats = [json.dumps({"messages": row["prompt"] + row["completion"]}) + "\n" for row in rows]
    (folder / "chat.jsonl").write_text("".join(chats), encoding="utf-8")
    theirs = runner.ask("axolotl", "tokens", config)
    wanted = [runner.wanted_row(row, tokenizer)[0] for row in rows]
    pairs = list(zip(wanted, theirs, strict=True))
    left_out = [
        tokenizer.decode([i])
        for (_, labels), their in pairs
        for i, label in zip(labels, their["labels"], strict=True)
        if i != label == -100
    ]
    return {
        "tool": "axolotl",
        "rows": len(rows),
        "same_ids": sum(ids == their["input_ids"] for (ids, _), their in pairs),
        "counted_by_us": sum(label != -100 for _, labels in wanted for label in labels),
        "counted_by_them": sum(label != -100 for their in theirs for label in their["labels"]),
        "left_out": sorted(set(left_out)),
    }


def wrong_key(tool: str, folder: Path) -> dict:
    """What a tool says of one key that is the other's."""
    names = ("num_epochs", "num_train_epochs")
    right, wrong = names if tool == "axolotl" else reversed(names)
    args, lora = settings("sft")
    config = WRITERS[tool](args, lora, model_path("smollm2"), rows_of("sft"), folder / tool)
    change(config, **{wrong: args.num_train_epochs, right: None})
    try:
        kept = runner.ask(tool, "validate", config)
        says = f"accepted; {right} = {kept[right]}, {wrong} {'kept' if wrong in kept else 'gone'}"
    except RuntimeError as error:
        says = str(error).strip().splitlines()[-1]
    return {"tool": tool, "written": {wrong: args.num_train_epochs}, "says": says}


def versions(python: str) -> dict:
    """The versions of PACKAGES in an environment."""
    code = (
        "import importlib.metadata as m, json\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{name: found[name] for name in {PACKAGES} if name in found}}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def environment(tool: str) -> dict:
    """The day, the machine, and the versions in the environment of a tool; Unsloth's is ours."""
    from experiments.runs import stamp

    python = runner.python_of(tool) if tool in WRITERS else sys.executable
    found = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "versions": versions(str(python)),
    }
    stamped = stamp("float32", ["data/ask/train.jsonl, the first 49 rows"], {"settings": "given in run.py"})
    stamped |= {"versions": {"python": found["python"], **found["versions"]}, "threads": 1}
    return {"measured": time.strftime("%Y-%m-%d"), "environment": found, **stamped}


def jobs() -> list[tuple[str, tuple, Callable]]:
    """(part, what, how it is measured) of every line that there should be."""
    found = [("runs", arm, run_arm) for arm in ARMS]
    for method in ("sft", "dpo"):
        found += [("tokens", (method, tool), compare_tokens) for tool in WRITERS]
    found += [("chat_template", (), chat_template_labels)]
    return found + [("wrong_keys", (tool,), wrong_key) for tool in WRITERS]


def key(record: dict) -> tuple:
    """What a record is of, as `jobs` says it."""
    fields = {
        "runs": ("method", "tool", "variant"),
        "tokens": ("method", "tool"),
        "chat_template": (),
        "wrong_keys": ("tool",),
    }
    return (record["part"], *(record[field] for field in fields[record["part"]]))


def main() -> None:
    from experiments.runs import add, read

    os.environ["OMP_NUM_THREADS"] = "1"
    done = {key(record) for record in read(RESULT)}
    for part, what, measure in jobs():
        if (part, *what) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measure(*what, Path(folder))
        record = {"part": part, **found, **environment(found["tool"])}
        add(RESULT, record)
        print(found, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        method, tool, file = sys.argv[2:]
        Path(file).write_text(json.dumps(ours(method, tool)), encoding="utf-8")
    else:
        main()
