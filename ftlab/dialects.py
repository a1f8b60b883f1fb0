"""TRL's and PEFT's config objects in other tools' words: Axolotl, LLaMA-Factory, OpenAI's fine-tuning jobs.

    args, lora = SFTConfig("runs/ask", ...), LoraConfig(...)     # or a DPOConfig
    write_axolotl(args, lora, MODEL, rows, folder)         cd folder; PYTHONPATH=. axolotl train axolotl.yaml
    write_llamafactory(args, lora, MODEL, rows, folder)    cd folder; llamafactory-cli train llamafactory.yaml
    write_openai(args, MODEL, rows, folder)                upload train.jsonl, then jobs.create(**openai_job(args, ...))

Rows are TRL's: {prompt, completion} or {prompt, chosen, rejected}, lists of messages. A folder is whole: configuration,
rows, links to a model on this machine. The table data/stack/dialects.yaml says which field becomes which key, and what
else is written so that the same run results. A field that you changed and that has no key is a ValueError, unless
the table has a reason. Both tools hold frozen weights in the precision of the products: with bf16=True load yours with
dtype=torch.bfloat16. That ids, masks and losses are equal: tests/peers, experiments/stack_peers/run.py.
"""

import copy
import dataclasses
import difflib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from ftlab.paths import DATA

KEYS_FILE = DATA / "stack" / "axolotl_keys.json"
TABLE = yaml.safe_load((DATA / "stack" / "dialects.yaml").read_text(encoding="utf-8"))
TOOLS = ("Axolotl", "LLaMA-Factory", "OpenAI")


def to_keys(tool: str, args, lora=None) -> dict:
    """{the tool's key: value} by the table. ValueError: unknown tool, wrong lora, what cannot be told."""
    if tool not in TOOLS or bool(lora) == (tool == "OpenAI"):
        raise ValueError(f"got {tool!r}, lora={lora!r:.10}, wanted one of {TOOLS}, all but OpenAI with a LoraConfig")
    written, excused = TABLE["written"][tool], TABLE["not_told"]["everywhere"] | TABLE["not_told"][tool]
    parts = ["always", "dpo" if _is_dpo(args) else "sft"] + (["lora"] if lora else [])
    found = {key: copy.deepcopy(value) for part in parts for key, value in written[part].items()}
    start = type(args)("start", use_cpu=args.use_cpu, bf16=args.bf16, fp16=args.fp16)
    for config, default in [(args, start)] + ([(lora, type(lora)())] if lora else []):
        for field in (each.name for each in dataclasses.fields(config)):
            value, key = getattr(config, field), TABLE["fields"].get(field, [None] * 3)[TOOLS.index(tool)]
            if key and value is not None:
                found[key] = sorted(value) if isinstance(value, set) else getattr(value, "value", value)  # of an enum
            elif value != (wanted := getattr(default, field)) and field not in excused:
                why = f"{tool} cannot be told None" if key else f"{tool} has no key for it here"
                raise ValueError(f"{field}: got {value!r}, wanted {wanted!r}, for {why}")
    names, alpha = (lora.target_modules, lora.lora_alpha) if lora else ("all-linear", 1)
    if not names or (isinstance(names, str) and names != "all-linear") or alpha % 1:
        raise ValueError(f"target_modules, lora_alpha: got {names!r}, {alpha}, wanted names, a whole number")
    return found


def openai_job(args, model: str, training_file: str) -> dict:
    """The body of a job: `client.fine_tuning.jobs.create(**body)`. model: one of OpenAI's; training_file: its id there.

    It can be told so little that another run results: nothing of LoRA, and see the table. Raises ValueError for steps.
    """
    settings = to_keys("OpenAI", args)
    if args.num_train_epochs % 1:
        raise ValueError(f"num_train_epochs: got {args.num_train_epochs}: OpenAI counts whole epochs")
    settings["n_epochs"] = int(args.num_train_epochs)
    settings["batch_size"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    body = {"model": model, "training_file": training_file, "seed": settings.pop("seed")}
    kind = "dpo" if _is_dpo(args) else "supervised"
    return body | {"method": {"type": kind, kind: {"hyperparameters": settings}}}


def unknown_keys(config: dict) -> list[str]:
    """The keys that Axolotl 0.19's own models would drop without a word, each with the nearest one that they know."""
    known = json.loads(KEYS_FILE.read_text(encoding="utf-8"))["keys"]
    rows = known["datasets " + {"kto": "kto", None: "sft"}.get(config.get("rl"), "dpo")]
    parts = [("", config, known[""])]
    parts += [(f"datasets[{i}].", row, rows) for i, row in enumerate(config.get("datasets") or [])]
    parts += [(f"{key}.", value, known[key]) for key, value in config.items() if key in known and type(value) is dict]
    found = []
    for where, settings, names in parts:
        for key in [key for key in settings if key not in names]:
            near = difflib.get_close_matches(str(key), names, n=1)
            found.append(f"{where}{key}" + (f" (did you mean {near[0]}?)" if near else ""))
    return found


def write_axolotl(args, lora, model: str, rows: list[dict], folder: str | Path) -> Path:
    """The path of Axolotl 0.19's axolotl.yaml, beside it rows, model and plugin.

    Raises ValueError for no lora, what it cannot be told or would read as something else, a row that does not fit.
    """
    if args.warmup_steps == 1 or args.warmup_steps % 1:
        raise ValueError(f"warmup_steps: got {args.warmup_steps}, wanted 0, 2 or more: of 1 Axolotl makes 2")
    config = {"base_model": _base(model), **to_keys("Axolotl", args, lora)}
    if args.max_steps < 0:
        del config["max_steps"]
    del config["save_strategy" if args.save_strategy == "steps" else "save_steps"]  # save_steps would win
    if lora.target_modules == "all-linear":
        config["lora_target_linear"] = bool(config.pop("lora_target_modules"))

    def line(row: dict, tokenizer, ids: list[int]) -> dict:
        if _is_dpo(args):
            return row
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        texts = (prompt, whole.removeprefix(prompt))
        if [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]] != ids:
            raise ValueError("prompt and completion become other tokens apart than together")
        return {"segments": [{"label": i == 1, "text": text} for i, text in enumerate(texts)]}

    path = _write(config, args, model, rows, line, Path(folder) / "axolotl.yaml")
    shutil.rmtree(path.parent / "axolotl_prepared", ignore_errors=True)  # its key: the files' names
    shutil.copy(DATA / "stack" / "seed_first.py", path.parent)
    return path


def write_llamafactory(args, lora, model: str, rows: list[dict], folder: str | Path) -> Path:
    """The path of LLaMA-Factory 0.9.5's llamafactory.yaml, beside it data set and model. Errors as above."""
    config = {"model_name_or_path": _base(model), **to_keys("LLaMA-Factory", args, lora)}
    config["disable_gradient_checkpointing"] = not args.gradient_checkpointing
    config["lora_target"] = "all" if lora.target_modules == "all-linear" else ",".join(config["lora_target"])
    sides = ("chosen", "rejected") if _is_dpo(args) else ()
    tags = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
    info = {"file_name": "train.jsonl", "formatting": "sharegpt", "ranking": bool(sides), "tags": tags}
    info["columns"] = {name: name for name in ("messages", *sides)}

    def line(row: dict, *_) -> dict:
        return {"messages": row["prompt"] + row.get("completion", [])} | {side: row[side][0] for side in sides}

    path = _write(config, args, model, rows, line, Path(folder) / "llamafactory.yaml")
    (path.parent / "dataset_info.json").write_text(json.dumps({"train": info}, indent=2) + "\n", encoding="utf-8")
    return path


def _base(model: str) -> str:
    return "model" if Path(model).is_dir() else model  # a link beside the file: no path of one machine stands in it


def write_openai(args, model: str, rows: list[dict], folder: str | Path) -> Path:
    """train.jsonl's path. model: whose tokenizer counts the tokens of a row. Raises ValueError as above."""

    def line(row: dict, *_) -> dict:
        if not _is_dpo(args):
            read = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in row["prompt"]]  # else they count too
            return {"messages": read + row["completion"]}
        asked = {"messages": row["prompt"], "tools": [], "parallel_tool_calls": True}
        return {"input": asked, "preferred_output": row["chosen"], "non_preferred_output": row["rejected"]}

    return _write(None, args, model, rows, line, Path(folder) / "train.jsonl")


def _write(config: dict | None, args, model: str, rows: list[dict], line: Callable, path: Path) -> Path:
    """The path, the config in it; beside it line(row, tokenizer, ids) of each row in train.jsonl, and the model."""
    from transformers import AutoTokenizer

    tokenizer, lines = AutoTokenizer.from_pretrained(model), []
    keys = ("prompt", "chosen", "rejected") if _is_dpo(args) else ("prompt", "completion")
    for i, row in enumerate(rows):
        if missing := [key for key in keys if not row.get(key)]:
            raise ValueError(f"row {i}: {missing[0]} is missing or empty")
        each = [tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False) for side in keys[1:]]
        if (longest := max(map(len, each))) > (args.max_length or longest):
            raise ValueError(f"row {i}: {longest} tokens, max_length is {args.max_length}: each tool cuts in its way")
        lines.append(json.dumps(line({key: row[key] for key in keys}, tokenizer, each[0]), ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    if config:
        if Path(model).is_dir():  # first: it may refuse
            dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
            _link(Path(model).resolve(), path.parent / "model", dtype)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (path.parent / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


def _link(source: Path, folder: Path, dtype: str) -> None:
    """Links to a model's files. Its config.json names the dtype: by that LLaMA-Factory 0.9.5 holds the weights."""
    folder.mkdir(exist_ok=True)
    links = [file for file in folder.iterdir() if file.is_symlink()]
    if source == folder.resolve() or len(list(folder.iterdir())) > len(links) + bool(links):  # our config.json is none
        raise ValueError(f"{folder} holds files of its own, which links would replace: write into another folder")
    for file in [*links, folder / "config.json"]:  # of an earlier run, perhaps of another model
        file.unlink(missing_ok=True)
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_dpo(args) -> bool:
    """Whether the run is DPO's. Raises ValueError for a config of another trainer than SFT's and DPO's."""
    from trl import DPOConfig, SFTConfig

    if not isinstance(args, SFTConfig | DPOConfig):
        raise ValueError(f"got a {type(args).__name__}, wanted an SFTConfig or a DPOConfig")
    return isinstance(args, DPOConfig)
