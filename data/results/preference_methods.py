"""DPO, ORPO, KTO and SPIN on `micro` and data/replies: the same pairs, seeds and metric; imbalance, and label noise.

    python data/results/preference_methods.py        every run that preference_methods.json lacks (40 minutes, one core)
    python data/results/preference_methods.py 6      at most six of them

A seed draws 160 pairs of at most 112 tokens a side, and their order; every method of that seed gets these and no other.
`sft`, micro trained for three passes on the 160 chosen replies, is where sft+, dpo, kto, orpo and spin start; one more
pass follows. `orpo, one stage` starts from the pretrained micro and makes all four passes on pairs. spin makes three
passes, one an iteration, each against its own greedy answers, and needs no rejected reply. kto reads the 320 single
replies with a thumb each. All through ftlab.pipeline.train and align, so through TRL: full fine-tuning, AdamW, 8 pairs
or 16 thumbs a step, 5 steps of warm-up, then linear to 0, beta 0.1, bf16 products on fp32 weights.

Learning rates: three for each method, a factor of about 3 apart, by seed 0, the gold reward of greedy answers to 100
tickets of 36 training skeletons that no seed ever trains on (spin: after one iteration). Seeds 1 to 4 are reported at
the best of them, on the 180 tickets of test.jsonl (other skeletons): the gold reward of each greedy answer, whether the
chosen reply of each pair is likelier than the rejected one (summed log-probs), and the loss on the chosen replies.

"dpo, rate 3e-5" is dpo at one rate less than the one that its search chose, added after the first seed's test.

"thumbs 1:1", "1:10", "10:1" (down : up): kto on 160 thumbs, one of each pair, at kto's rate; "weighted" makes the two
classes weigh the same, the lower end of Eq. 8 in the KTO paper. "dpo, noise p" swaps the sides of a share p of the
pairs, "kto, noise p" turns a share p of the thumbs; noise 0 is dpo and kto. Seconds are processor time of one thread.
"""

import functools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
RUNS = Path(tempfile.gettempdir()) / "preference_methods"  # models; each run there is kept until you remove it
SEEDS = [1, 2, 3, 4]
PAIRS, LONGEST = 160, 112
SFT = {"method": "sft", "learning_rate": 1e-3, "epochs": 3}
RATES = {
    "sft+": [1e-4, 3e-4, 1e-3],
    "dpo": [1e-5, 3e-5, 1e-4],
    "kto": [1e-5, 3e-5, 1e-4],
    "spin": [1e-5, 3e-5, 1e-4],
    "orpo": [1e-4, 3e-4, 1e-3],
    "orpo, one stage": [3e-4, 1e-3, 3e-3],
}
UPS = {"thumbs 1:1": 80, "thumbs 1:10": 145, "thumbs 10:1": 15}  # of 160
NOISE = [0.1, 0.2, 0.3, 0.4]


def arms() -> list[dict]:
    """One dict a reported arm: name, the method whose rate it takes, and what is different."""
    found = [{"name": name, "rate_of": name} for name in RATES]
    found += [{"name": "dpo, rate 3e-5", "rate_of": "dpo", "rate": 3e-5}]
    found += [{"name": name, "rate_of": "kto", "ups": ups} for name, ups in list(UPS.items())[:2]]
    found += [{"name": "thumbs 1:10, weighted", "rate_of": "kto", "ups": 145, "undesirable_weight": 145 / 15}]
    found += [
        {"name": f"{m}, noise {p}", "rate_of": m, "noise": p} for p in (0.4, 0.2, 0.3, 0.1) for m in ("dpo", "kto")
    ]
    found += [{"name": "thumbs 10:1", "rate_of": "kto", "ups": 15}]
    found += [{"name": "thumbs 10:1, weighted", "rate_of": "kto", "ups": 15, "desirable_weight": 145 / 15}]
    return found


# --- Rows -------------------------------------------------------------------------------------------------------------


@functools.cache
def pairs_of(seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """(the seed's 160 pairs, 100 for validation, 180 for the test); no two of the three share a ticket skeleton."""
    from ftlab.paths import DATA
    from ftlab.pipeline import data
    from ftlab.pipeline.models import load

    tokenizer = load("micro")[1]

    def tokens(pair: dict, side: str) -> int:
        return len(data.render({"prompt": pair["prompt"], "completion": pair[side]}, tokenizer).input_ids)

    pairs, test = (data.reply_pairs(DATA / "replies" / f"{name}.jsonl") for name in ("train", "test"))
    held_out = set(sorted({pair["skeleton"] for pair in pairs})[::5])
    validation = [pair for pair in pairs if pair["skeleton"] in held_out][:100]
    rest = [pair for pair in pairs if pair["skeleton"] not in held_out]
    short = [pair for pair in rest if max(tokens(pair, "chosen"), tokens(pair, "rejected")) <= LONGEST]
    return random.Random(seed).sample(short, PAIRS), validation, test


def rows_for(arm: dict, pairs: list[dict], seed: int) -> list[dict]:
    """The rows that the arm's method learns from, with its noise and its share of thumbs up."""
    from ftlab.pipeline import data

    draw, method = random.Random(seed), arm["rate_of"]
    if method in ("sft+", "spin"):
        return answers_of(pairs)
    if method == "kto":
        rows = data.thumbs_from_pairs(pairs)
        if "ups" in arm:  # pairs[i] gives its chosen reply for i < ups, else its rejected one
            rows = rows[: 2 * arm["ups"] : 2] + rows[2 * arm["ups"] + 1 :: 2]
        turned = set(draw.sample(range(len(rows)), round(arm.get("noise", 0) * len(rows))))
        return [{**row, "label": row["label"] != (i in turned)} for i, row in enumerate(rows)]
    turned = set(draw.sample(range(len(pairs)), round(arm.get("noise", 0) * len(pairs))))
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    return [swapped[i] if i in turned else pair for i, pair in enumerate(pairs)]


def answers_of(pairs: list[dict]) -> list[dict]:
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]


# --- One run ----------------------------------------------------------------------------------------------------------


def recipe_for(method: str, learning_rate: float, seed: int, **more):
    from ftlab.pipeline.recipe import Recipe

    settings = {"model": "micro", "r": 0, "epochs": 1, "batch_size": 8, "max_length": 320, "precision": "bf16"}
    settings |= {"schedule": "linear", "save_steps": 10_000, "logging_steps": 5}
    return Recipe(**{**settings, "method": method, "learning_rate": learning_rate, "seed": seed, **more})


def start_of(seed: int, pairs: list[dict]) -> tuple[str, float]:
    """The folder of the seed's SFT model, trained if it is not there, and the processor seconds that it took."""
    from ftlab.pipeline.train import train

    folder, begin = RUNS / f"sft-{seed}", time.process_time()
    if not (folder / "seconds.json").is_file():
        train(recipe_for(**SFT, seed=seed), answers_of(pairs), folder=folder, on_log=lambda record: None)
        (folder / "seconds.json").write_text(json.dumps(round(time.process_time() - begin, 1)))
    return str(folder / "model"), json.loads((folder / "seconds.json").read_text())


def run(arm: dict, learning_rate: float, seed: int, split: str) -> dict:
    """Trains one arm once and measures it on the validation or test pairs."""
    from ftlab.pipeline import align
    from ftlab.pipeline.models import load
    from ftlab.pipeline.train import train

    pairs, validation, test = pairs_of(seed)
    on = {"validation": validation, "test": test}[split]
    start, sft_seconds = start_of(seed, pairs)
    found = {"name": arm["name"], "seed": seed, "learning_rate": learning_rate}
    if arm["name"] == "sft":
        return {**found, "seconds": sft_seconds, "steps": 60, **measure(load(start)[0], on)}
    method, rows = arm["rate_of"], rows_for(arm, pairs, seed)
    weights = {key: arm[key] for key in ("desirable_weight", "undesirable_weight") if key in arm}
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if method == "spin":
            rounds, recipe = 3 if split == "test" else 1, recipe_for("dpo", learning_rate, seed, model=start)
            runs = align.spin(recipe, rows, rounds, folder, max_new_tokens=64, on_log=lambda record: None)
            found["played"] = [
                len((Path(folder) / f"iteration-{t}" / "pairs.jsonl").read_text("utf-8").splitlines())
                for t in range(len(runs))
            ]
        else:
            more = {"epochs": 4} if method == "orpo, one stage" else {"model": start}
            more |= {"batch_size": 16} if method == "kto" else {}
            recipe = recipe_for(method.split(",")[0].strip("+"), learning_rate, seed, **more, **weights)
            runs = [train(recipe, rows, folder=folder, on_log=lambda record: None)]
    seconds = round(time.process_time() - begin, 1)
    if method == "spin":
        found["iterations"] = [measure(one.model, on) for one in runs[:-1]]
    steps = sum(one.log[-1]["step"] for one in runs)
    return {**found, "seconds": seconds, "steps": steps, **measure(runs[-1].model, on)}


def measure(model, pairs: list[dict]) -> dict:
    """gold: of each greedy answer; prefers: 1 where the chosen reply is likelier; nll: of the chosen, nats/token."""
    from ftlab.pipeline import gold
    from ftlab.pipeline.evaluate import generate, perplexity
    from ftlab.pipeline.models import load

    tokenizer = load("micro")[1]
    answers = generate(model, tokenizer, [pair["prompt"] for pair in pairs], max_new_tokens=64, batch_size=64)
    labels = [pair["ticket_label"] for pair in pairs]
    scores = [gold.score_reply(*both) for both in zip(answers, labels, strict=True)]
    sides = {
        side: perplexity(model, tokenizer, [{"prompt": p["prompt"], "completion": p[side]} for p in pairs], 16).texts
        for side in ("chosen", "rejected")
    }
    return {
        "gold": [gold.gold_reward(*both) for both in zip(answers, labels, strict=True)],
        "properties": {name: sum(score[name] for score in scores) / len(scores) for name in gold.PROPERTIES},
        "prefers": (sides["chosen"]["nll"] < sides["rejected"]["nll"]).astype(int).tolist(),
        "nll": sides["chosen"]["nll"].sum() / sides["chosen"]["tokens"].sum(),
    }


# --- All runs ---------------------------------------------------------------------------------------------------------


def best_rate(search: list[dict], method: str) -> float:
    """The rate with the highest mean gold reward on validation; the lower one of equals."""
    tried = {one["learning_rate"]: sum(one["gold"]) for one in search if one["name"] == method}
    return max(sorted(tried), key=tried.get)


def wanted(result: dict) -> list[tuple]:
    """(part of the result, arm, rate or None, seed) of every run that is still to make, in order."""
    done = {(part, r["name"], r["seed"], r["learning_rate"] if part == "search" else None)
            for part in ("search", "runs") for r in result[part]}  # fmt: skip
    sft = {"name": "sft", "rate_of": "sft", "rate": SFT["learning_rate"]}
    jobs = [("runs", sft, None, seed) for seed in SEEDS] + [("search", sft, SFT["learning_rate"], 0)]
    jobs += [("search", {"name": m, "rate_of": m}, rate, 0) for m, rates in RATES.items() for rate in rates]
    jobs += [("runs", arm, None, seed) for arm in arms() for seed in SEEDS]
    return [job for job in jobs if (job[0], job[1]["name"], job[3], job[2]) not in done]


def main() -> None:
    import torch
    from lines import write

    from ftlab.pipeline import fast
    from ftlab.pipeline.train import environment

    torch.set_num_threads(1)
    fast.keep_memory()
    result = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"search": [], "runs": []}
    result = {"environment": environment(), **result}
    for part, arm, rate, seed in wanted(result)[: int((sys.argv[1:] or [999])[0])]:
        if rate is None:
            rate = arm.get("rate") or best_rate(result["search"], arm["rate_of"])
        one = run(arm, rate, seed, "test" if part == "runs" else "validation")
        result[part].append(one)
        write(FILE, result)
        mean = {key: round(sum(one[key]) / len(one[key]), 3) for key in ("gold", "prefers")}
        print(part, one["name"], rate, seed, mean, round(one["nll"], 3), one["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
