"""What do four bits cost SmolLM2 on `ask`, and what does each way of merging? QLoRA beside notebook 05's LoRA run.

    python experiments/qlora/run.py          what is missing of three seeds, about ten minutes a seed on one core
    python experiments/qlora/run.py --plan   what that is, seed by seed

Each seed trains notebook 05's recipe on the NF4 base (double quantization), saves the adapter, and answers the 132
questions of ask/hand_test.jsonl in five ways. An arm adds a line to records.jsonl, with one 0 or 1 a question. The
control is the arm "live" of ask.jsonl: the same recipe, rows and seeds on the base that was not rounded.

| arm | what |
|---|---|
| base | the NF4 base without an adapter, once |
| unmerged | the NF4 base and the adapter: what was trained |
| dequantized | the adapter merged into the dequantized base, in bf16: the right way |
| original | the adapter merged into the weights as they were before they were rounded |
| requantized | PEFT's merge_and_unload on the 4-bit model, which rounds the sum to NF4 again |

`loss` is the mean loss of the right answers of 60 rows of validation.jsonl (the lowest ids), in nats per token.
`kept` (of the arm "requantized") is the share of each layer's update that its merge into NF4 keeps, `ratio` the
update's length over the weight's: lowest, median and highest of the 210 layers.

To train in minutes on a CPU, the NF4 base is spelled out in fp32 (`model.dequantize()`): loss and gradients are those
of bitsandbytes' 4-bit layers (tests/parity/test_quant.py). The adapters are fp32, where TRL would have made them bf16.
"""

import json
import sys
import time
from pathlib import Path

from experiments.runs import Job, boot, cpu_clock, flags, stamp, versions, work
from ftlab.paths import DATA

HERE = Path(__file__).parent
FILE = HERE / "records.jsonl"
SEEDS = (0, 1, 2)
ARMS = ("unmerged", "dequantized", "original", "requantized")
QUESTIONS = ["ask/hand_test", "ask/validation, first 60 by id"]
CHOSEN = {
    "rate, batch, rank, rows": "notebook 05's recipe: on data/ask/validation.jsonl, for the base that is not rounded"
}


def load(quantized: bool):
    """SmolLM2 in fp32, or with its linear layers in NF4 with double quantization."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ftlab import model_path

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    config = {"quantization_config": nf4} if quantized else {}
    return AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32, **config)


def train(seed: int, folder: Path) -> dict:
    """Notebook 05's run on the dequantized NF4 base; the adapter goes into the folder."""
    from datasets import load_dataset

    from experiments.ask import run as ask

    rows = load_dataset("json", data_files=str(DATA / "ask" / "train.jsonl"), split=f"train[:{ask.ROWS}]")
    plain_base = ask.base

    def rounded_base():
        _, tokenizer = plain_base()
        return load(quantized=True).dequantize(), tokenizer

    ask.base = rounded_base
    try:
        model, _, spent = ask.tuned_model(rows, seed)
    finally:
        ask.base = plain_base
    model.save_pretrained(folder)
    return spent


def merged(arm: str, adapter: Path):
    """(the model of an arm, spelled out in fp32; what there is to say about its layers)."""
    import torch
    from peft import PeftModel

    if arm == "unmerged":
        return PeftModel.from_pretrained(load(quantized=True).dequantize(), adapter), {}
    if arm == "dequantized":
        model = PeftModel.from_pretrained(load(quantized=True).dequantize(), adapter).merge_and_unload(safe_merge=True)
        return model.to(torch.bfloat16).float(), {}
    if arm == "original":
        return PeftModel.from_pretrained(load(quantized=False), adapter).merge_and_unload(safe_merge=True), {}
    before = load(quantized=True).dequantize()
    deltas = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in PeftModel.from_pretrained(before, adapter).named_modules()
        if hasattr(layer, "get_delta_weight") and getattr(layer, "lora_A", None)
    }
    before = load(quantized=True).dequantize()
    model = PeftModel.from_pretrained(load(quantized=True), adapter).merge_and_unload().dequantize()
    ratio, kept = [], []
    for name, delta in deltas.items():
        weight = before.get_submodule(name).weight.detach()
        survived = model.get_submodule(name).weight.detach() - weight
        ratio.append((delta.norm() / weight.norm()).item())
        kept.append(((survived * delta).sum() / delta.norm() ** 2).item())
    return model, {"ratio": three(ratio), "kept": three(kept)}


def three(values: list[float]) -> list[float]:
    values = sorted(values)
    return [round(values[i], 4) for i in (0, len(values) // 2, -1)]


def measure(arm: str, seed: int, model, **extra) -> dict:
    from datasets import load_dataset

    from experiments.ask import run as ask
    from ftlab import answers
    from ftlab.exercises.training import loss
    from ftlab.tasks.ask import runs, scorer

    _, tokenizer = ask.base()
    test = load_dataset("json", data_files=str(DATA / "ask" / "hand_test.jsonl"), split="train")
    held_out = load_dataset("json", data_files=str(DATA / "ask" / "validation.jsonl"), split="train")
    held_out = held_out.sort("id").select(range(60))  # ids.json names them
    start = time.perf_counter()
    said = answers(model, tokenizer, test["prompt"])
    right = [int(scorer(answer, row)) for answer, row in zip(said, test, strict=True)]
    return {
        "arm": arm,
        "rows": ask.ROWS if seed >= 0 else 0,
        "seed": seed,
        "mean": round(sum(right) / len(right), 4),
        "valid": round(sum(map(runs, said)) / len(said), 4),
        "loss": round(loss(model, tokenizer, held_out), 4),
        "right": right,
        "seconds": round(time.perf_counter() - start, 1),
        **extra,
        "environment": ask.environment(),
    }


def adapter(seed: int) -> tuple[Path, dict]:
    """(the folder of this seed's adapter, what its training took): trained once a machine, for all arms."""
    folder = Path("runs") / f"qlora-{seed}-{boot()}"
    took = folder / "took.json"
    said = json.loads(took.read_text(encoding="utf-8")) if took.is_file() else {}
    if said.get("versions") != versions():
        said = {"versions": versions(), "spent": train(seed, folder)}
        took.write_text(json.dumps(said), encoding="utf-8")
    return folder, said["spent"]


def recorded(arm: str, seed: int) -> list[dict]:
    """The record of an arm; the first one of a seed pays for the training."""
    began = cpu_clock()
    if arm == "base":
        record = measure(arm, seed, load(quantized=True).dequantize())
    else:
        folder, spent = adapter(seed)
        model, extra = merged(arm, folder)
        record = measure(arm, seed, model, **extra, **(spent if arm == "unmerged" else {}))
    return [record | {"cpu_seconds": round(cpu_clock() - began, 1)} | stamp("float32", QUESTIONS, CHOSEN)]


def jobs(records: list[dict]) -> list[Job]:
    """Every arm of every seed; the base has none, which is seed -1."""
    runs = [("base", -1), *((arm, seed) for seed in SEEDS for arm in ARMS)]
    return [Job(({"arm": arm, "seed": seed},), (arm, seed)) for arm, seed in runs]


if __name__ == "__main__":
    work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])
