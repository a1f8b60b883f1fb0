"""ORPO, KTO, SPIN and DPO from the same thumbs, with the controls that could have won. On `micro`, in TRL's trainers.

    python data/results/preference.py           every run that preference.jsonl lacks; it can be stopped and goes on
    python data/results/preference.py table     arms, runs, CPU-hours, scores so far

The start, the tickets, the gold rules, the checkpoints and the tests are those of data/results/alignment.py: 2,400
answers of the start to 400 tickets. Each answer has one thumb: up if its gold is at least 0.7 (the right action, and
one small fault at most), else down. That is all that any arm is told about them.

| arm | learns from |
|---|---|
| more sft | another pass over the old team's log: no thumb at all |
| sft up | SFT on the answers with a thumb up |
| dpo, orpo | pairs of an answer with a thumb up and one with a thumb down to the same ticket, two a ticket at most |
| kto | the thumbs one by one |
| spin | DPO's loss in two rounds: the file's good replies against the model's own, no thumb at all |

LoRA r=16, AdamW, fp32, 16 sequences a step, a constant rate after 5 steps, plain TRL without speed_up. Every run stops
after SECONDS of processor time of one thread, sampling for SPIN included, drawing the answers left out (all but SPIN
and more sft use them). beta is 0.1 (ORPO: lambda 0.5). Rates are searched with a seed of their own on the validation
tickets, then five seeds run.

noise: each thumb is turned with the chance p before pairs are made; dpo, kto and sft up at their rates, three seeds.
imbalance: thumbs up are left out until there is one for ten down; kto as it is, and with the weight that makes both
sides count the same. alone: one answer a ticket, so that no pair can be made.
"""

import json
import random
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import alignment

FILE = Path(__file__).with_suffix(".jsonl")
UP = 0.7
SECONDS = 60
BETA = {"dpo": 0.1, "kto": 0.1, "spin": 0.1, "orpo": 0.5}
RATES = (3e-4, 1e-3, 3e-3)
NOISE = (0.1, 0.2, 0.3, 0.4)


def arms() -> list[dict]:
    """Every arm. `rates`: they are searched; else `of` names the arm whose rate it takes."""

    def arm(name, experiment="comparison", **more):
        return {"experiment": experiment, "arm": name, "noise": 0.0, "weighted": False} | more

    found = [arm(name, rates=RATES) for name in ("more sft", "sft up", "dpo", "orpo", "kto", "spin")]
    found += [arm(name, "noise", noise=p, of=name, seeds=(1, 2, 3)) for p in NOISE for name in ("dpo", "kto", "sft up")]
    found += [arm("kto", "imbalance", weighted=weighted, of="kto", seeds=(1, 2, 3)) for weighted in (False, True)]
    found += [arm(name, "imbalance", of=name, seeds=(1, 2, 3)) for name in ("dpo", "sft up")]
    return found + [arm(name, "alone", of=name, seeds=(1, 2, 3)) for name in ("kto", "sft up")]


# --- Rows -------------------------------------------------------------------------------------------------------------


def thumbs(run: alignment.Run) -> list[dict]:
    """The labelled answers as {prompt, completion, label, ticket}, shuffled, after noise, imbalance or choosing."""
    arm, draw = run.arm, random.Random(run.seed)
    found = [
        {"prompt": row["prompt"], "completion": alignment.message(text), "label": gold >= UP, "ticket": ticket}
        for ticket, row in enumerate(run.drawn(free=True))
        for text, gold in zip(row["answers"], row["golds"], strict=True)
    ]
    for row in found:
        row["label"] ^= draw.random() < arm["noise"]
    draw.shuffle(found)
    if arm["experiment"] == "alone":
        found = list({row["ticket"]: row for row in found}.values())
    if arm["experiment"] == "imbalance":
        ups = [row for row in found if row["label"]][: sum(not row["label"] for row in found) // 10]
        found = [row for row in found if not row["label"]] + ups
        draw.shuffle(found)
    run.labels = len(found)
    return found


def pairs(run: alignment.Run) -> list[dict]:
    """Up to two pairs a ticket, each of an up and a down that no other pair has."""
    tickets: dict[int, tuple[list, list]] = {}
    for row in thumbs(run):
        tickets.setdefault(row["ticket"], ([], []))[not row["label"]].append(row)
    return [
        {"prompt": up["prompt"], "chosen": up["completion"], "rejected": down["completion"]}
        for ups, downs in tickets.values()
        for up, down in list(zip(ups, downs, strict=False))[:2]
    ]


# --- Trainers ---------------------------------------------------------------------------------------------------------


def watcher(run: alignment.Run, until: float):
    """Looks at a third, two thirds and all of SECONDS, and stops the training at `until` seconds."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            seconds = run.clock.seconds()
            if seconds >= SECONDS * (len(run.checkpoints) + 1) / 3:
                run.look(model, state.global_step)
            control.should_training_stop = seconds >= until

    return Watcher()


def fitted(run: alignment.Run, trainer_class, config_class, model, rows: list[dict], until: float = SECONDS, **config):
    """The trained PEFT model of one of TRL's trainers."""
    from datasets import Dataset

    batch = 8 if "chosen" in rows[0] else 16
    trainer = trainer_class(
        model,
        train_dataset=Dataset.from_list([{k: v for k, v in row.items() if k != "ticket"} for row in rows]),
        processing_class=run.world.tokenizer,
        args=config_class(
            **run.arguments(100_000, batch, warmup_steps=5, lr_scheduler_type="constant_with_warmup"), **config
        ),
        peft_config=alignment.lora(),
        callbacks=[watcher(run, until)],
    )
    trainer.train()
    return trainer.model


def sft(run: alignment.Run):
    from trl import SFTConfig, SFTTrainer

    if run.arm["arm"] == "sft up":
        rows = [{key: row[key] for key in ("prompt", "completion")} for row in thumbs(run) if row["label"]]
    else:
        from ftlab.tasks import replies

        log = alignment.read("log")
        rows = [{"prompt": replies.prompt(row), "completion": alignment.message(row["reply"])} for row in log]
    return fitted(run, SFTTrainer, SFTConfig, run.world.load(), rows)


def dpo(run: alignment.Run):
    from trl import DPOConfig, DPOTrainer

    return fitted(run, DPOTrainer, DPOConfig, run.world.load(), pairs(run), beta=BETA["dpo"])


def orpo(run: alignment.Run):
    from trl import DPOConfig, DPOTrainer

    from ftlab.scratch import orpo

    class ORPOTrainer(DPOTrainer):
        compute_loss = orpo.compute_loss

    return fitted(run, ORPOTrainer, DPOConfig, run.world.load(), pairs(run), beta=BETA["orpo"])


def kto(run: alignment.Run):
    """weighted: the rarer side's weight makes the sums of both sides' weights equal."""
    from trl import KTOConfig, KTOTrainer

    rows = thumbs(run)
    ups = sum(row["label"] for row in rows)
    weight = (len(rows) - ups) / ups if run.arm["weighted"] else 1.0
    return fitted(run, KTOTrainer, KTOConfig, run.world.load(), rows, beta=BETA["kto"], desirable_weight=weight)


def spin(run: alignment.Run):
    """Two rounds; the model of the round before writes the rejected answers and is the reference."""
    from trl import DPOConfig, DPOTrainer

    model, tickets = run.world.load(), run.world.tickets(run.seed)
    for k in (1, 2):
        own = alignment.judged(run.world, model.eval(), tickets, 1, seed=10 * run.seed + k)
        rows = [
            {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": alignment.message(row["answers"][0])}
            for row in own
        ]
        trained = fitted(run, DPOTrainer, DPOConfig, model, rows, until=SECONDS * k / 2, beta=BETA["spin"])
        model = trained.merge_and_unload()
    return model


METHODS = {"more sft": sft, "sft up": sft, "dpo": dpo, "orpo": orpo, "kto": kto, "spin": spin}
ARM, RUN = ("experiment", "arm", "noise", "weighted"), ("rate", "seed", "phase")


def named(arm: dict, rate: float, seed: int, phase: str) -> dict:
    return {key: arm[key] for key in ARM} | dict(zip(RUN, (rate, seed, phase), strict=True))


def run(arm: dict, rate: float, seed: int, phase: str) -> dict:
    one = alignment.Run(alignment.world("log"), arm, rate, seed, phase)
    model = METHODS[arm["arm"]](one)
    seconds = round(one.clock.seconds(), 1)
    return named(arm, rate, seed, phase) | one.measured(model) | {"cpu_seconds": seconds}


# --- All runs ---------------------------------------------------------------------------------------------------------


def records() -> list[dict]:
    return list(map(json.loads, FILE.read_text(encoding="utf-8").splitlines())) if FILE.is_file() else []


def wanted(done: list[dict]) -> list[tuple]:
    """The runs that are still missing: (arm, rate, seed, phase)."""
    keys = [named(r, *(r[key] for key in RUN)) for r in done]
    todo, best = [], {}
    for arm in arms():
        if "rates" in arm:
            mine = [r for r in done if r["arm"] == arm["arm"] and r["phase"] == "search"]
            rates = alignment.unsearched(mine, arm["rates"])
            if rates:
                todo += [(arm, rate, alignment.SEARCH_SEED, "search") for rate in rates]
                continue
            best[arm["arm"]] = alignment.best_rate(mine)
        rate = best.get(arm.get("of", arm["arm"]))
        todo += [(arm, rate, seed, "final") for seed in arm.get("seeds", alignment.SEEDS) if rate]
    return [one for one in todo if named(*one) not in keys]


def main() -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        while todo := wanted(records()):
            for future in as_completed(pool.submit(run, *one) for one in todo):
                record = future.result()
                with FILE.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                last = record["checkpoints"][-1]
                print(*named(record, *(record[key] for key in RUN)).values(), last["gold"], last["kl"], flush=True)


def table() -> None:
    """Each arm: runs, hours, and of the final runs KL and gold, sampled, on test and by hand."""
    done = records()
    for arm in arms():
        mine = [r for r in done if all(r[key] == arm[key] for key in ARM)]
        final = [r for r in mine if r["phase"] == "final"]
        hours = sum(r["cpu_seconds"] for r in mine) / 3600
        weight = "weighted" if arm["weighted"] else ""
        line = f"{arm['experiment']:11}{arm['arm']:9} {arm['noise']:3} {weight:9} runs {len(mine):2} {hours:5.2f} h"
        if final:
            kl = statistics.mean(r["test"]["kl"] for r in final)
            golds = [statistics.mean(statistics.mean(r[name]["sampled"]) for r in final) for name in ("test", "hand")]
            line += f"  rate {final[0]['rate']:g}  KL {kl:5.2f}  gold {golds[0]:.3f} test, {golds[1]:.3f} hand"
        print(line)


if __name__ == "__main__":
    table() if sys.argv[1:] == ["table"] else main()
