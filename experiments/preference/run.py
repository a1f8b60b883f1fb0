"""ORPO, KTO, SPIN and DPO from the same thumbs, with the controls that could have won. On `micro`, in TRL's trainers.

    python experiments/preference/run.py           every run that records.jsonl lacks; it can be stopped and goes on
    python experiments/preference/run.py table     arms, runs, CPU-hours, scores so far
    python experiments/preference/run.py --plan    what is missing, seed by seed, and what it will take

The start, the tickets, the gold rules and the tests are those of experiments/alignment/run.py, and so are the 2,400
answers of the start to 400 tickets. Each answer has one thumb: up if its gold is at least UP (the right action,
and two of the other properties missing at most), else down. That is all that any arm is told about them.

| arm | learns from |
|---|---|
| more sft | the old team's log again: no thumb at all |
| sft up | SFT on the answers with a thumb up |
| dpo, orpo | pairs of an answer with a thumb up and one with a thumb down to the same ticket, two a ticket at most |
| kto | the thumbs one by one |
| sft human | SFT on the file's good replies to 400 tickets: no thumb at all |
| spin | DPO's loss in two rounds of 200 of these tickets: the good reply against the model's own, no thumb at all |

LoRA r=16 on all linear layers, AdamW, fp32, 16 sequences a step (DPO, ORPO, SPIN: 8 pairs). beta is 0.3 for DPO and
SPIN, 0.5 for KTO; ORPO has the paper's loss, lambda 0.5. KTO has the weight that makes both kinds of thumbs count the
same ("weighted"). A step costs more where there is a reference, or a second answer to each prompt, as in KTO. So each
arm has as many STEPS as plain TRL takes in about SECONDS of one core, SPIN's sampling included ("time": seconds a step,
measured). Drawing and judging the 2,400 answers is left out: the arms with thumbs share it. SFT, DPO and SPIN then run
with speed_up, which changes the time and not the result. Rates are searched with a seed of their own on the validation
tickets, then five seeds run; three of more sft and sft human, of all with noise, and of sft up with few ups.

noise: each thumb is turned with a chance of 0.2 or 0.4 before pairs are made, at the same rates.
few ups: thumbs up are left out until there is one for ten down; kto with its weight and without.
"""

import functools
import random
import sys
import time
from pathlib import Path

from experiments.alignment import run as alignment
from experiments.runs import Job, cpu_clock, flags, stamp, work

FILE = Path(__file__).with_name("records.jsonl")
UP = 0.7
TEN = 10  # thumbs down for each thumb up, in "few ups"
SECONDS = 50
STEPS = {"more sft": 60, "sft up": 64, "sft human": 64, "dpo": 48, "orpo": 64, "kto": 30, "spin": 40}
BETA = {"dpo": 0.3, "kto": 0.5, "spin": 0.3, "orpo": 0.5}
TIMED = 10  # steps whose processor time is taken, after two that warm up
RATES = (3e-4, 1e-3)
ROUNDS = 2  # of SPIN
ARM = ("data", "arm", "noise", "weighted")  # with alignment.RUN: one record


def arms() -> list[dict]:
    """Every arm. `rates`: they are searched; else `of` names the arm whose rate it takes."""

    def arm(name, data="all", noise=0.0, weighted=True, **more):
        keys = {"data": data, "arm": name, "noise": noise, "weighted": name == "kto" and weighted}
        return {"experiment": "thumbs"} | keys | more

    three = alignment.SEEDS[:3]
    found = [arm(name, rates=RATES) for name in ("sft up", "dpo", "orpo", "kto", "spin")]
    found += [arm(name, rates=RATES, seeds=three) for name in ("more sft", "sft human")]
    found += [arm(name, noise=p, of=name, seeds=three) for p in (0.4, 0.2) for name in ("dpo", "kto", "sft up")]
    found += [arm("kto", "few ups", weighted=False, of="kto"), arm("sft up", "few ups", of="sft up", seeds=three)]
    return [*found, *(arm(name, "few ups", of=name) for name in ("dpo", "kto"))]


# --- Rows -------------------------------------------------------------------------------------------------------------


def thumbs(run: alignment.Run) -> list[dict]:
    """The labelled answers as {prompt, completion, label, ticket}, shuffled, after noise or after ups were left out."""
    arm, draw = run.arm, random.Random(run.seed)
    run.clock.stop()
    rows = run.world.drawn(run.seed, alignment.Clock())
    run.clock.go_on()
    found = [
        {"prompt": row["prompt"], "completion": alignment.message(text), "label": gold >= UP, "ticket": ticket}
        for ticket, row in enumerate(rows)
        for text, gold in zip(row["answers"], row["golds"], strict=True)
    ]
    for row in found:
        row["label"] ^= draw.random() < arm["noise"]
    draw.shuffle(found)
    if arm["data"] == "few ups":
        downs = [row for row in found if not row["label"]]
        found = downs + [row for row in found if row["label"]][: len(downs) // TEN]
        draw.shuffle(found)
    run.labels = len(found)
    return found


def pairs(rows: list[dict]) -> list[dict]:
    """Up to two pairs a ticket, each of an up and a down that no other pair has."""
    tickets: dict[int, tuple[list, list]] = {}
    for row in rows:
        tickets.setdefault(row["ticket"], ([], []))[not row["label"]].append(row)
    return [
        {"prompt": up["prompt"], "chosen": up["completion"], "rejected": down["completion"]}
        for ups, downs in tickets.values()
        for up, down in list(zip(ups, downs, strict=False))[:2]
    ]


# --- Trainers ---------------------------------------------------------------------------------------------------------


def stopwatch(run: alignment.Run):
    """A callback that leaves the processor seconds of a step, from the third on, in run.seconds_a_step."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                self.began = time.process_time()
            elif state.global_step > 2:
                run.seconds_a_step = (time.process_time() - self.began) / (state.global_step - 2)

    return Stopwatch()


def fitted(run: alignment.Run, trainer_class, config_class, model, rows: list[dict], steps: int, **config):
    """The PEFT model of one of TRL's trainers, trained for so many steps."""
    from datasets import Dataset
    from trl import DPOTrainer, SFTTrainer

    from ftlab import speed_up

    trainer = trainer_class(
        model,
        train_dataset=Dataset.from_list([{k: v for k, v in row.items() if k != "ticket"} for row in rows]),
        processing_class=run.world.tokenizer,
        args=config_class(**run.arguments(steps, 8 if "chosen" in rows[0] else 16, **config)),
        peft_config=alignment.lora(),
        callbacks=[stopwatch(run)],
    )
    if trainer_class in (SFTTrainer, DPOTrainer) and run.phase != "time":
        speed_up(trainer)
    trainer.train()
    return trainer.model


def sft(run: alignment.Run, steps: int):
    from trl import SFTConfig, SFTTrainer

    from ftlab.tasks import replies

    if run.arm["arm"] == "sft up":
        rows = [{key: row[key] for key in ("prompt", "completion")} for row in thumbs(run) if row["label"]]
    elif run.arm["arm"] == "sft human":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in run.world.tickets(run.seed)]
    else:
        log = alignment.read("log")
        rows = [{"prompt": replies.prompt(row), "completion": alignment.message(row["reply"])} for row in log]
    return fitted(run, SFTTrainer, SFTConfig, run.world.load(), rows, steps)


def dpo(run: alignment.Run, steps: int):
    from trl import DPOConfig, DPOTrainer

    return fitted(run, DPOTrainer, DPOConfig, run.world.load(), pairs(thumbs(run)), steps, beta=BETA["dpo"])


def orpo(run: alignment.Run, steps: int):
    """The loss of the paper. TRL's own, trl.experimental.orpo, also takes the NLL of the prompt."""
    from trl import DPOConfig, DPOTrainer

    from ftlab.scratch.logps import mean_logps, per_token_logps
    from ftlab.scratch.losses import orpo_loss

    class ORPOTrainer(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            each = per_token_logps(logits, inputs["input_ids"])
            chosen, rejected = mean_logps(each, inputs["completion_mask"]).chunk(2)
            return orpo_loss(-chosen, chosen, rejected, lam=self.beta).mean()

    return fitted(run, ORPOTrainer, DPOConfig, run.world.load(), pairs(thumbs(run)), steps, beta=BETA["orpo"])


def kto(run: alignment.Run, steps: int):
    """weighted: the rarer side's weight makes the sums of both sides' weights equal."""
    from trl import KTOConfig, KTOTrainer

    rows = thumbs(run)
    ups = sum(row["label"] for row in rows)
    weight = (len(rows) - ups) / ups if run.arm["weighted"] else 1.0
    return fitted(run, KTOTrainer, KTOConfig, run.world.load(), rows, steps, beta=BETA["kto"], desirable_weight=weight)


def spin(run: alignment.Run, steps: int):
    """The model of the round before writes the rejected answers and is the reference."""
    from trl import DPOConfig, DPOTrainer

    model, tickets = run.world.load(), run.world.tickets(run.seed)
    asked = len(tickets) // ROUNDS
    for k in range(ROUNDS):
        began = time.process_time()
        own = alignment.judged(run.world, model.eval(), tickets[k * asked : (k + 1) * asked], 1, 10 * run.seed + k)
        run.sampling += time.process_time() - began
        rows = [
            {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": alignment.message(row["answers"][0])}
            for row in own
        ]
        rounds = 1 if run.phase == "time" else ROUNDS
        model = fitted(run, DPOTrainer, DPOConfig, model, rows, steps // rounds, beta=BETA["spin"]).merge_and_unload()
    return model


METHODS = {"more sft": sft, "sft up": sft, "sft human": sft, "dpo": dpo, "orpo": orpo, "kto": kto, "spin": spin}


named = functools.partial(alignment.named, keys=ARM)


def run(arm: dict, rate: float, seed: int, phase: str) -> dict:
    """One record. Phase "time": the processor seconds of plain TRL's steps, and of SPIN's sampling."""
    one, steps = alignment.Run(alignment.world("log"), arm, rate, seed, phase), STEPS[arm["arm"]]
    one.sampling = 0.0
    model = METHODS[arm["arm"]](one, TIMED + 2 if phase == "time" else steps)
    key = named(arm, rate, seed, phase)
    if phase == "time":
        return key | {"seconds_a_step": round(one.seconds_a_step, 3), "seconds_of_sampling": round(one.sampling, 1)}
    seconds = round(one.clock.seconds(), 1)
    one.look(model, steps)
    return key | one.measured(model) | {"cpu_seconds": seconds}


# --- All runs ---------------------------------------------------------------------------------------------------------


def runs(done: list[dict]) -> list[tuple]:
    """Every run, as far as the search has come: (arm, rate, seed, phase)."""
    todo, best = [], {}
    for arm in arms():
        if "rates" in arm:
            todo.append((arm, RATES[0], alignment.SEARCH_SEED, "time"))
            mine = [r for r in done if r["arm"] == arm["arm"] and r["phase"] == "search"]
            if rates := alignment.unsearched(mine, arm["rates"]):
                todo += [(arm, rate, alignment.SEARCH_SEED, "search") for rate in rates]
                continue
            best[arm["arm"]] = alignment.best_rate(mine)
        if rate := best.get(arm.get("of", arm["arm"])):
            todo += [(arm, rate, seed, "final") for seed in arm.get("seeds", alignment.SEEDS)]
    return todo


def wanted(done: list[dict]) -> list[tuple]:
    """The runs that are still missing, the search first, and every arm's first seed before the second of any."""
    keys = [named(r, *(r[key] for key in alignment.RUN)) for r in done]
    missing = [one for one in runs(done) if named(*one) not in keys]
    return sorted(missing, key=lambda one: (one[3] == "final", one[2]))


def chosen(arm: dict) -> dict:
    """How the settings of an arm were chosen, for its records."""
    searched = f"searched with seed {alignment.SEARCH_SEED} by gold on the validation tickets"
    rate = searched if "rates" in arm else f"the one that was found for {arm['of']} with all thumbs"
    steps = f"as many as plain TRL takes in about {SECONDS} CPU seconds, as timed"
    return {"rate": rate, "steps": steps, "all else": "given in run.py"}


def recorded(arm: dict, rate: float, seed: int, phase: str) -> list[dict]:
    """The record of a run; of the phase "time" its cpu_seconds are those of all that it did."""
    began = cpu_clock()
    record = run(arm, rate, seed, phase)
    spent = {"all_cpu_seconds": round(cpu_clock() - began, 1)}
    record = {"cpu_seconds": spent["all_cpu_seconds"]} | record | spent
    return [record | stamp("float32", alignment.QUESTIONS, chosen(arm))]


def jobs(done: list[dict]) -> list[Job]:
    return [Job((named(*one),), one) for one in runs(done)]


def table() -> None:
    """Each arm: runs, hours, and of the final runs KL and gold, sampled, on test and by hand."""
    done = alignment.records(FILE)
    for arm in arms():
        mine = [r for r in done if all(r[key] == arm[key] for key in ARM)]
        final = [r for r in mine if r["phase"] == "final"]
        hours = sum(r.get("cpu_seconds", 0) for r in mine) / 3600
        how = "weighted" if arm["weighted"] else ""
        line = f"{arm['data']:8}{arm['arm']:10} noise {arm['noise']} {how:9} runs {len(mine):2} {hours:5.2f} h"
        print(line + (alignment.ends(final) if final else ""))


if __name__ == "__main__":
    words, how = flags(sys.argv[1:])
    table() if words == ["table"] else work(FILE, jobs, recorded, at_once=2, **how)
