"""One recipe on the same rows through TRL, Axolotl and LLaMA-Factory, on a CPU (about half an hour on two busy cores).

    make stack
    python data/results/stack_peers.py [arm ...]

Writes stack_peers.json beside this file after each arm, and goes on from it when started again. SmolLM2-135M, LoRA r =
16 on all linear layers, fp32, seed 0: SFT on 48 tickets, DPO on 40 pairs of replies, 4 rows a step, one thread. Each
arm is a process of its own, started by the tool's own command; ours is `python -m ftlab.pipeline.train`.

Axolotl draws lora_A before the seed is set, so that no two runs of one configuration are equal; write_axolotl's plugin
sets it earlier. Two runs "without the plugin" show what happens else.

Also recorded: whether each tool's token ids and labels are ours, what Axolotl's `type: chat_template` would have
counted in the loss, and what each tool says of a key that it does not know.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from ftlab.paths import DATA
from ftlab.pipeline import data, stack
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.serve import environment

RESULT = Path(__file__).with_suffix(".json")
BASE = Recipe(batch_size=4, warmup_steps=2, logging_steps=1, precision="fp32")
RECIPES = {
    "sft": BASE.replace(max_steps=8, learning_rate=1e-3),
    "dpo": BASE.replace(method="dpo", max_steps=6, learning_rate=1e-4),
}
ARMS = [
    ("sft", "trl", ""),
    ("sft", "llamafactory", ""),
    ("sft", "axolotl", ""),
    ("sft", "axolotl", "without the plugin"),
    ("sft", "axolotl", "without it again"),
    ("dpo", "trl", ""),
    ("dpo", "llamafactory", ""),
    ("dpo", "axolotl", ""),
]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "axolotl", "llamafactory")


def rows_of(method: str) -> list[dict]:
    """The first rows of the training split, with the keys that the method reads."""
    if method == "sft":
        rows, keys = data.triage_rows(DATA / "triage" / "train.jsonl")[:48], ("prompt", "completion")
    else:
        rows, keys = data.reply_pairs(DATA / "replies" / "train.jsonl")[:40], ("prompt", "chosen", "rejected")
    return [{key: row[key] for key in keys} for row in rows]


def write(method: str, tool: str, folder: Path) -> Path:
    """The tool's files for the method in the folder."""
    writer = {"axolotl": stack.write_axolotl, "llamafactory": stack.write_llamafactory}[tool]
    return writer(RECIPES[method], rows_of(method), folder)


def run_ours(method: str, folder: Path) -> stack.PeerRun:
    """Our run in a process of its own, measured as the others are."""
    rows = "".join(json.dumps(row) + "\n" for row in rows_of(method))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    recipe = RECIPES[method].replace(train_file=str(folder / "rows.jsonl")).to_yaml(folder / "recipe.yaml")
    command = [sys.executable, "-m", "ftlab.pipeline.train", str(recipe), "--folder", str(folder / "run")]
    seconds, peak_bytes = stack.measure("our run", command, folder)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return stack.PeerRun(log, seconds, peak_bytes)


def run_arm(method: str, tool: str, variant: str, folder: Path) -> dict:
    """Losses in nats/token (sft) or nats/pair (dpo) by step, seconds with the start-up, peak bytes."""
    if tool == "trl":
        run = run_ours(method, folder)
    else:
        config = write(method, tool, folder)
        if variant:
            settings = yaml.safe_load(config.read_text(encoding="utf-8"))
            del settings["plugins"]
            config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        run = stack.train_peer(config)
    return {
        "method": method,
        "tool": tool,
        "variant": variant,
        "loss": run.series("loss")[1],
        "grad_norm": run.series("grad_norm")[1],
        "seconds": run.seconds,
        "peak_bytes": run.peak_bytes,
        "load": os.getloadavg()[0],
    }


def compare_tokens(method: str, tool: str, folder: Path) -> dict:
    """How many rows have the ids and labels that `data.render` gives, by the tool's own preprocessing."""
    from transformers import AutoTokenizer

    from ftlab.pipeline.models import resolve

    tokenizer, rows = AutoTokenizer.from_pretrained(resolve("smollm2")), rows_of(method)
    theirs = stack.ask_peer(tool, "tokens", write(method, tool, folder))
    equal = sum(wanted == stack.peer_row(got) for wanted, got in zip(
        (stack.wanted_row(row, tokenizer) for row in rows), theirs, strict=True))  # fmt: skip
    return {"method": method, "tool": tool, "rows": len(rows), "equal": equal}


def chat_template_labels(folder: Path) -> dict:
    """What Axolotl's usual dataset type leaves out of the loss that ours counts, over the 48 tickets."""
    from transformers import AutoTokenizer

    from ftlab.pipeline.models import resolve

    tokenizer, rows = AutoTokenizer.from_pretrained(resolve("smollm2")), rows_of("sft")
    config = stack.axolotl(RECIPES["sft"])
    config["datasets"] = [{"path": "chat.jsonl", "ds_type": "json", "split": "train", "type": "chat_template"}]
    file = write("sft", "axolotl", folder)
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    chats = [json.dumps({"messages": row["prompt"] + row["completion"]}) + "\n" for row in rows]
    (folder / "chat.jsonl").write_text("".join(chats), encoding="utf-8")
    theirs = stack.ask_peer("axolotl", "tokens", file)
    ours = [data.render(row, tokenizer) for row in rows]
    left_out = [
        tokenizer.decode([i])
        for mine, their in zip(ours, theirs, strict=True)
        for i, bit, label in zip(mine.input_ids, mine.completion_mask, their["labels"], strict=True)
        if bit and label == -100
    ]
    return {
        "same_ids": sum(mine.input_ids == their["input_ids"] for mine, their in zip(ours, theirs, strict=True)),
        "rows": len(rows),
        "counted_by_us": sum(sum(mine.completion_mask) for mine in ours),
        "counted_by_them": sum(label != -100 for their in theirs for label in their["labels"]),
        "left_out": sorted(set(left_out)),
    }


def wrong_keys(folder: Path) -> list[dict]:
    """What each tool says of one key that is the other's."""
    found, names = [], ("num_epochs", "num_train_epochs")
    for tool, right, key in (("axolotl", *names), ("llamafactory", *reversed(names))):
        config = write("sft", tool, folder / tool)
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        settings[key] = settings.pop(right)
        config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        try:
            kept = stack.ask_peer(tool, "validate", config)
            says = f"accepted; {right} = {kept[right]}, {key} {'kept' if key in kept else 'gone'}"
        except RuntimeError as error:
            says = str(error).strip().splitlines()[-1]
        found.append({"tool": tool, "written": {key: settings[key]}, "says": says})
    return found


def versions(python: str) -> dict:
    """The versions of PACKAGES in an environment."""
    code = (
        "import importlib.metadata as m, json\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{name: found[name] for name in {PACKAGES} if name in found}}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"runs": [], "tokens": []}
    pythons = {"trl": sys.executable, **{name: str(environment(name)) for name in ("axolotl", "llamafactory")}}
    result["environment"] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": 1,
        "machine": platform.machine(),
        "versions": {name: versions(python) for name, python in pythons.items()},
    }

    def save() -> None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for arm in ARMS:
        if arm not in [(run["method"], run["tool"], run["variant"]) for run in result["runs"]]:
            with tempfile.TemporaryDirectory() as folder:
                result["runs"].append(run_arm(*arm, Path(folder)))
            print(result["runs"][-1], flush=True)
            save()
    for method in RECIPES:
        for tool in ("axolotl", "llamafactory"):
            if (method, tool) not in [(one["method"], one["tool"]) for one in result["tokens"]]:
                with tempfile.TemporaryDirectory() as folder:
                    result["tokens"].append(compare_tokens(method, tool, Path(folder)))
                print(result["tokens"][-1], flush=True)
                save()
    for name, ask in (("chat_template", chat_template_labels), ("wrong_keys", wrong_keys)):
        if name not in result:
            with tempfile.TemporaryDirectory() as folder:
                result[name] = ask(Path(folder))
            print(result[name], flush=True)
            save()


if __name__ == "__main__":
    main()
