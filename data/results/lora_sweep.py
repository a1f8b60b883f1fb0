"""What rank, target modules, lora_alpha and lora_dropout do to learning and to forgetting, on `micro`, over four seeds.

    python data/results/lora_sweep.py        every arm that lora_sweep.json lacks (25 minutes on two cores)
    python data/results/lora_sweep.py 6      at most six of them

Three tasks of 8 rows (codes: 32) a step, AdamW, no weight decay, 5 steps of warm-up, then linear to 0, fp32:

    triage  60 steps on short tickets (no system message); loss on the answers of held-out tickets (other skeletons)
    small   the same on 32 tickets only, over and over
    codes   160 steps on 128 random order numbers, each with a random code of 8 digits; loss on the same codes, since
            nothing but memory can tell them: chance is ln 10 = 2.303 nats/digit

An arm's learning rate is the best of at least three, a factor of about 3 apart, with a worse one on either side, by
seed 0 (triage, small: on validation; codes: on the codes). Seeds 1 to 4, which draw A, the order of the data and the
codes anew, are then reported at that rate, on test. "text" and "facts" are the losses on 16 passages and on the answers
to 106 easy questions that micro was pretrained on: what the arm forgot. The "gentle" arms have no search: they are the
five shapes again at a fixed rate below their best one. Two arms run at a time, with one thread each.
"""

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LADDER = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
FIRST = {"full": [3e-4, 1e-3, 3e-3]}  # where the search starts; all LoRA arms: [1e-3, 3e-3, 1e-2]
SEEDS = [1, 2, 3, 4]
STEPS = {"triage": 60, "small": 60, "codes": 160}


def arms() -> list[dict]:
    """One dict an arm. r = 45 on attention and r = 28 on the MLP are the same number of parameters on micro."""
    shapes = [
        {"name": "full"},
        *({"name": f"r={r}", "r": r, "target_modules": ATTENTION + MLP} for r in (1, 4, 16, 64)),
        {"name": "attention, r=45", "r": 45, "target_modules": ATTENTION},
        {"name": "MLP, r=28", "r": 28, "target_modules": MLP},
    ]
    r16 = {"r": 16, "target_modules": ATTENTION + MLP}
    r64 = {"r": 64, "target_modules": ATTENTION + MLP}
    more = [
        {"task": "triage", "name": "r=16, alpha=8", **r16, "lora_alpha": 8},
        {"task": "triage", "name": "r=16, alpha=128", **r16, "lora_alpha": 128},
        {"task": "triage", "name": "r=16, dropout=0.1", **r16, "lora_dropout": 0.1},
        {"task": "small", "name": "r=64", **r64},
        {"task": "small", "name": "r=64, dropout=0.1", **r64, "lora_dropout": 0.1},
    ]
    found = [{"task": task, **shape} for task in ("triage", "codes") for shape in shapes] + more
    gentle = zip(shapes[:5], (3e-4, 1e-2, 3e-3, 1e-3, 1e-3), strict=True)
    found += [{"task": "triage", **shape, "name": f"{shape['name']}, gentle", "fixed": rate} for shape, rate in gentle]
    return [
        {"r": 0, "target_modules": [], "lora_alpha": 2 * arm.get("r", 0), "lora_dropout": 0.0} | arm for arm in found
    ]


def run(arm: dict, learning_rate: float, seed: int) -> dict:
    """Trains micro once; returns the losses in nats/token: train (last 10 steps), validation, test, text, facts."""
    import torch

    from ftlab.pipeline.models import load
    from ftlab.scratch.lora import add_lora

    start = time.process_time()
    torch.manual_seed(seed)
    model, tokenizer = load("micro")
    train, held_out = rows_of(arm["task"], tokenizer, seed)
    if arm["r"]:
        add_lora(model, arm["target_modules"], arm["r"], arm["lora_alpha"], arm["lora_dropout"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    steps, size = STEPS[arm["task"]], 32 if arm["task"] == "codes" else 8
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 5, (steps - s) / (steps - 5)))
    order = torch.cat([torch.randperm(len(train)) for _ in range(1 + steps * size // len(train))])
    losses = []
    model.train()
    for batch in order[: steps * size].view(steps, size):
        nll, counted = loss(model, [train[i] for i in batch])
        (nll / counted).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(nll.item() / counted)
    model.eval()
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "train": sum(losses[-10:]) / 10,
        **{name: mean_loss(model, rows) for name, rows in held_out.items()},
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(time.process_time() - start, 1),
    }


def rows_of(task: str, tokenizer, seed: int) -> tuple[list, dict[str, list]]:
    """Training rows and the held-out sets, each row (input_ids, completion_mask)."""
    import torch

    from ftlab.paths import DATA
    from ftlab.pipeline import data

    def read(file: str) -> list[dict]:
        return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]

    def chat(question: list, answer: list) -> tuple[list[int], list[int]]:
        rendered = data.render({"prompt": question, "completion": answer}, tokenizer)
        return rendered.input_ids, rendered.completion_mask

    def short_tickets(split: str, longest: int) -> list:
        rows = data.triage_rows(DATA / "triage" / f"{split}.jsonl")
        return [row for row in (chat(r["prompt"][1:], r["completion"]) for r in rows) if len(row[0]) <= longest]

    facts = [({"role": "user", "content": f["question"]}, f["answer"]) for f in read("general/facts.jsonl")]
    texts = [tokenizer(row["text"])["input_ids"][:256] for row in read("general/text.jsonl")[:16]]
    held_out = {
        "text": [(ids, [0] + [1] * (len(ids) - 1)) for ids in texts],
        "facts": [chat([question], [{"role": "assistant", "content": answer}]) for question, answer in facts],
    }
    if task == "codes":
        draw = torch.Generator().manual_seed(seed)
        numbers = torch.randperm(1000, generator=draw)[:128].tolist()
        codes = torch.randint(10**8, (128,), generator=draw).tolist()
        texts = [(tokenizer(f"Order {n:03d} is {c:08d}")["input_ids"], 8) for n, c in zip(numbers, codes, strict=True)]
        train = [(ids, [0] * (len(ids) - n) + [1] * n) for ids, n in texts]
        return train, held_out | {"validation": train}
    train = short_tickets("train", 96)[:: 1 if task == "triage" else 25]
    return train[:32] if task == "small" else train, held_out | {
        n: short_tickets(n, 128) for n in ("validation", "test")
    }


def loss(model, rows: list):
    """Summed cross-entropy over the counted tokens, and their number. Padding on the right, which no token sees."""
    import torch

    ids, mask = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[k]) for row in rows], batch_first=True) for k in (0, 1)
    )
    counted = mask[:, 1:].bool()  # entry t scores token t + 1
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][counted]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][counted], reduction="sum"), len(hidden)


def mean_loss(model, rows: list) -> float:
    """Nats per counted token over all rows."""
    import torch

    rows = sorted(rows, key=lambda row: len(row[0]))
    with torch.inference_mode():
        sums = [loss(model, rows[i : i + 16]) for i in range(0, len(rows), 16)]
    return (sum(nll for nll, _ in sums) / sum(counted for _, counted in sums)).item()


def measure(arm: dict) -> dict:
    """The arm with the runs of its search (seed 0), the best rate, and the runs of seeds 1 to 4 at it."""
    import torch

    from ftlab.pipeline import fast

    torch.set_num_threads(1)
    fast.keep_memory()
    wanted, tried, best = list(FIRST.get(arm["name"], [1e-3, 3e-3, 1e-2])), {}, arm.get("fixed")
    while wanted and "fixed" not in arm:
        tried |= {rate: run(arm, rate, 0) for rate in wanted}
        best = min(tried, key=lambda rate: tried[rate]["validation"])
        at = LADDER.index(best)
        wanted = [rate for rate in LADDER[max(at - 1, 0) : at + 2] if rate not in tried]
    runs = [run(arm, best, seed) for seed in SEEDS]
    return {**arm, "best_rate": best, "search": [tried[rate] for rate in sorted(tried)], "runs": runs}


def main() -> None:
    from ftlab.pipeline.models import load
    from ftlab.pipeline.train import environment

    result = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"arms": []}
    done = {(arm["task"], arm["name"]) for arm in result["arms"]}
    missing = [arm for arm in arms() if (arm["task"], arm["name"]) not in done]
    if "base" not in result:
        model, tokenizer = load("micro")
        result = {
            "environment": environment(),
            "base": {t: {n: mean_loss(model, rows) for n, rows in rows_of(t, tokenizer, 1)[1].items()} for t in STEPS},
            "arms": [],
        }
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for future in as_completed(pool.submit(measure, arm) for arm in missing[: int((sys.argv[1:] or [99])[0])]):
            result["arms"].append(future.result())
            FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            arm = result["arms"][-1]
            shown = [round(run.get("test", run["validation"]), 3) for run in arm["runs"]]
            print(arm["task"], arm["name"], arm["best_rate"], shown, arm["runs"][0]["seconds"], "s a run", flush=True)


if __name__ == "__main__":
    main()
