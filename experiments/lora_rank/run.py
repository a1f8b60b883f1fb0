"""What rank, alpha, target modules and the learning rate do to learning and forgetting, on `micro`, four seeds an arm.

    python experiments/lora_rank/run.py            every run that records.jsonl lacks; it can be stopped and goes on
    python experiments/lora_rank/run.py codes      only this task
    python experiments/lora_rank/run.py --plan     what is missing, seed by seed, and what it will take

| task | rows | steps x rows | score: exactly right |
|---|---|---|---|
| orders | short tickets; the answer is the order's six digits, or none | 200 x 8 | tickets of other sentences |
| codes | shelves with a random code of 8 digits: nothing but memory can tell them | 400 x 32 | the same codes |
| few | 32 of the tickets, over and over | 200 x 8 | tickets of other sentences |

Everything trains in TRL's SFTTrainer, embeddings and norms frozen in every arm, full fine-tuning included: AdamW, no
weight decay, 5 steps of warm-up, then linear to 0, fp32. An arm's rates are searched on the ladder, a factor of about 3
apart, with a seed of its own and the *validation* score, until a rate that is no better lies on either side of the
best. Then seeds 1 to 4 (another A, another order of the rows, other codes) run at the best rate, and the test score
counts. codes has no unseen rows: its search is scored on codes that another seed drew.

One line a run: task, arm, r, lora_alpha, scaling, targets, dropout, rate, seed, phase ("search" or "final"), the score
on validation and test, the mean training loss of the last ten steps; of orders the loss on 60 passages of Python's
manual (`manual`, nats a token: micro has read them); of the final runs the share of 106 everyday questions that the
model still answers (`facts`: micro knew all of them); versions. `python experiments/lora_rank/run.py table` prints the
arms and their hours.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

from experiments.runs import Job, flags, read, stamp, work
from ftlab.paths import DATA

FILE = Path(__file__).with_name("records.jsonl")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LADDER = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
SEARCH_SEED, SEEDS = 11, (1, 2, 3, 4)
STEPS = {"orders": 200, "codes": 400, "few": 200}
CODES = 256
QUESTIONS = ["data/triage/validation.jsonl and test.jsonl, tickets of at most 96 tokens; codes: those of the training",
             "data/general/text.jsonl", "data/general/facts.jsonl"]  # fmt: skip
CHOSEN = {
    "rate": f"searched for each arm with seed {SEARCH_SEED} by its score on validation (codes: by other codes), until "
    "a rate that is no better lies on either side",
    "all else": "given in run.py",
}


def arms() -> list[dict]:
    """Every arm. At r=16 the three habits for alpha have the same scale, so one arm stands for all of them.

    On micro r = 45 on attention and r = 28 on the MLP are the same number of weights, 322,560.
    """

    def arm(name, r, alpha, targets="all-linear", rslora=False, dropout=0.0, task="orders"):
        scaling = r and alpha / (r**0.5 if rslora else r)
        return {"task": task, "arm": name, "r": r, "lora_alpha": alpha, "scaling": scaling, "targets": targets,
                "rslora": rslora, "dropout": dropout}  # fmt: skip

    found = [arm("full", 0, 0)]
    found += [arm(f"r={r}", r, 32) for r in (1, 4, 16, 64)]
    found += [arm(f"r={r}, alpha=2r", r, 2 * r) for r in (1, 64)]
    found += [arm(f"r={r}, rsLoRA", r, 8, rslora=True) for r in (1, 64)]
    found += [arm("attention, r=45", 45, 90, ATTENTION), arm("MLP, r=28", 28, 56, MLP)]
    found += [arm("full", 0, 0, task="codes"), *(arm(f"r={r}", r, 32, task="codes") for r in (1, 4, 16, 64))]
    found += [arm("attention, r=45", 45, 90, ATTENTION, task="codes"), arm("MLP, r=28", 28, 56, MLP, task="codes")]
    found += [arm("r=64", 64, 32, task="few"), arm("r=64, dropout=0.1", 64, 32, dropout=0.1, task="few")]
    return found


def first_rates(arm: dict) -> list[float]:
    return [1e-4, 3e-4, 1e-3] if arm["r"] == 0 else [1e-3, 3e-3, 1e-2]


def rows_of(task: str, seed: int, tokenizer) -> tuple:
    """(training rows, validation rows, test rows) as lists of prompt and completion."""
    import random

    def row(question: str, answer: str) -> dict:
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }

    def short(each: dict) -> bool:
        ids = tokenizer.apply_chat_template(each["prompt"] + each["completion"], return_dict=False)
        return len(ids) <= 96

    if task == "codes":
        draw = random.Random(seed)
        shelves = draw.sample(range(1000), CODES)
        codes = [row(f"Code of shelf {shelf:03d}?", f"{draw.randrange(10**8):08d}") for shelf in shelves]
        return codes, codes, codes
    splits = []
    for split in ("train", "validation", "test"):
        lines = (DATA / "triage" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        tickets = [row(t["ticket"], t["label"]["order_id"] or "none") for t in map(json.loads, lines)]
        splits.append(list(filter(short, tickets)))
    if task == "few":
        splits[0] = splits[0][::25][:32]
    return tuple(splits)


def run(arm: dict, rate: float, seed: int, phase: str) -> dict:
    """Trains micro once and returns the record."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    from ftlab import answers, model_path, score, speed_up
    from ftlab.tasks import handbook

    torch.set_num_threads(1)
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(model_path("micro"))
    model = AutoModelForCausalLM.from_pretrained(model_path("micro"), dtype=torch.float32)
    train, validation, test = rows_of(arm["task"], seed, tokenizer)
    config = None
    if arm["r"]:
        config = LoraConfig(r=arm["r"], lora_alpha=arm["lora_alpha"], lora_dropout=arm["dropout"],
                            use_rslora=arm["rslora"], target_modules=arm["targets"])  # fmt: skip
    else:
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.requires_grad_(True)
    set_seed(seed)
    trainer = SFTTrainer(
        model,
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        args=SFTConfig(
            f"runs/lora_rank/{os.getpid()}",
            learning_rate=rate,
            max_steps=STEPS[arm["task"]],
            per_device_train_batch_size=32 if arm["task"] == "codes" else 8,
            warmup_steps=5,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            seed=seed,
            logging_steps=10,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        peft_config=config,
    )
    if config:
        speed_up(trainer)
    trainer.train()
    model = trainer.model.eval()

    def right(rows: list[dict]) -> float:
        given = answers(model, tokenizer, [each["prompt"] for each in rows], max_new_tokens=10)
        return round(score(given, rows, lambda said, each: said.strip() == each["completion"][0]["content"]).mean, 4)

    record = arm | {"rate": rate, "seed": seed, "phase": phase}
    record |= {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    record |= {"train_loss": [h["loss"] for h in trainer.state.log_history if "loss" in h][-1]}
    record |= {"validation": right(validation)}
    if arm["task"] == "orders":
        record |= {"manual": manual_loss(model, tokenizer)}
    if phase == "final":
        lines = (DATA / "general" / "facts.jsonl").read_text(encoding="utf-8").splitlines()
        facts = list(map(json.loads, lines))
        chats = [[{"role": "user", "content": fact["question"]}] for fact in facts]
        record |= {
            "test": right(test) if test is not validation else record["validation"],
            "facts": round(score(answers(model, tokenizer, chats, max_new_tokens=12), facts, handbook.scorer).mean, 4),
        }
    packages = ("torch", "transformers", "peft", "trl")
    record |= {"versions": {name: importlib.metadata.version(name) for name in packages}}
    return record | {"cpu_seconds": round(time.process_time() - start, 1)}


def manual_loss(model, tokenizer) -> float:
    """Mean nats a token on the passages of data/general/text.jsonl, their first 256 tokens."""
    import torch

    lines = (DATA / "general" / "text.jsonl").read_text(encoding="utf-8").splitlines()
    nats = tokens = 0
    for line in lines:
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:256]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.numel() - 1)
        tokens += ids.numel() - 1
    return round(nats / tokens, 4)


def records() -> list[dict]:
    return read(FILE)


def runs(arm: dict, done: list[dict]) -> list[tuple[float, int, str]]:
    """Every run of this arm, as far as the search has come: (rate, seed, phase), the final seeds once it is over."""
    mine = [r for r in done if (r["task"], r["arm"]) == (arm["task"], arm["arm"])]
    tried = {r["rate"] for r in mine if r["phase"] == "search"}
    rates = sorted({r["rate"] for r in mine} | set(first_rates(arm)))
    final = []
    if set(rates) <= tried:
        best = best_rate(mine)
        at = LADDER.index(best)
        around = [rate for rate in LADDER[max(at - 1, 0) : at + 2] if rate not in rates]
        rates += around
        final = [] if around else [(best, seed, "final") for seed in SEEDS]
    return [(rate, SEARCH_SEED, "search") for rate in rates] + final


def wanted(arm: dict, done: list[dict]) -> list[tuple[float, int, str]]:
    """The runs that this arm still lacks."""
    mine = [r for r in done if (r["task"], r["arm"]) == (arm["task"], arm["arm"])]
    found = {(r["rate"], r["seed"], r["phase"]) for r in mine}
    return [one for one in runs(arm, done) if one not in found]


def best_rate(runs: list[dict]) -> float:
    """The rate with the highest validation score in the search; of equals the one with the lower training loss."""
    search = [r for r in runs if r["phase"] == "search"]
    return max(search, key=lambda r: (r["validation"], -r["train_loss"]))["rate"]


def recorded(arm: dict, rate: float, seed: int, phase: str) -> list[dict]:
    """The record of a run."""
    return [run(arm, rate, seed, phase) | stamp("float32", QUESTIONS, CHOSEN)]


def jobs(tasks: list[str], done: list[dict]) -> list[Job]:
    """Every run, or those of the named tasks, as far as the search has come."""
    found = []
    for arm in arms():
        if tasks and arm["task"] not in tasks:
            continue
        for rate, seed, phase in runs(arm, done):
            name = {"task": arm["task"], "arm": arm["arm"], "rate": rate, "seed": seed, "phase": phase}
            found.append(Job((name,), (arm, rate, seed, phase)))
    return found


def table() -> None:
    """Arms, best rate, mean score of the final seeds, CPU-hours so far."""
    done = records()
    for arm in arms():
        mine = [r for r in done if (r["task"], r["arm"]) == (arm["task"], arm["arm"])]
        final = [r["test"] for r in mine if r["phase"] == "final"]
        hours = sum(r["cpu_seconds"] for r in mine) / 3600
        rate = best_rate(mine) if mine else None
        mean = f"{sum(final) / len(final):.3f}" if final else "-"
        print(f"{arm['task']:7}{arm['arm']:20} rate {rate}  runs {len(mine):3}  final {mean}  {hours:.2f} h")


if __name__ == "__main__":
    words, how = flags(sys.argv[1:])
    if words == ["table"]:
        table()
    else:
        work(FILE, lambda done: jobs(words, done), recorded, within=("task", "seed"), at_once=2, **how)
