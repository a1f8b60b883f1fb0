"""Thumbs, what each method makes of them, and TRL's trainers, all without `speed_up`."""

import functools
import itertools
import json
import math
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import sft
from experiments.alignment.run import World, judged, keep, kl_to_start, lora, message
from experiments.runs import cpu_clock

KEPT = Path("runs/preferences")  # the labelled replies of each seed: it can be deleted
TICKETS, ANSWERS, UP = 250, 6, 0.7  # six replies a ticket; a thumbs-up from this gold on
TEN = 10  # thumbs-down for each thumbs-up, where these are rare
BATCH, THUMBS = 8, 16  # replies or pairs a step; thumbs a step of KTO
ROUNDS = 2  # of SPIN
WARMUP, LOGGED = 3, 12  # steps; entries of a curve, at most
TIMED, TIMED_ROUNDS = 6, 3  # steps of each method in turns, the first turn left out
SHOWN = 20  # tickets of the hand test whose replies a record keeps
CURVE = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
    "logps/rejected", "kl", "nll_loss", "log_odds_chosen",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a run is trained with. beta: ORPO's lambda; None for SFT. limit: see `run.recorded`."""

    method: str
    rate: float
    beta: float | None
    seed: int
    weighted: bool = False
    limit: int | None = None


# --- Thumbs ---------------------------------------------------------------------------------------


def drawn(world: World, seed: int, limit: int | None = None) -> list[dict]:
    """A seed's tickets with six replies of the SFT model each and their gold, drawn once."""
    if limit:
        return judged(world, world.start, world.train[:limit], ANSWERS, seed)
    file = KEPT / f"drawn-{seed}.json"
    if not file.is_file():
        tickets = random.Random(seed).sample(world.train, TICKETS)
        rows = judged(world, world.start, tickets, ANSWERS, seed)
        keep(file, json.dumps(rows).encode())
    return json.loads(file.read_text(encoding="utf-8"))


def thumbs(rows: list[dict], seed: int, rare: bool = False) -> list[dict]:
    """One row a reply: prompt, completion, label (the thumb), ticket, ticket_label; shuffled.

    rare: thumbs-up are left out until there is one for ten thumbs-down.
    """
    found = [
        {
            "prompt": row["prompt"],
            "completion": message(text),
            "label": gold >= UP,
            "ticket": ticket,
            "ticket_label": row["ticket_label"],
        }
        for ticket, row in enumerate(rows)
        for text, gold in zip(row["answers"], row["golds"], strict=True)
    ]
    draw = random.Random(seed)
    draw.shuffle(found)
    if rare:
        downs = [row for row in found if not row["label"]]
        found = liked(found)[: len(downs) // TEN] + downs
        draw.shuffle(found)
    return found


def liked(found: list[dict]) -> list[dict]:
    """The replies with a thumbs-up."""
    return [row for row in found if row["label"]]


def pairs(found: list[dict]) -> list[dict]:
    """Pairs of a liked and a disliked reply to the same ticket; no reply stands in two of them."""
    tickets: dict[int, tuple[list, list]] = {}
    for row in found:
        ups, downs = tickets.setdefault(row["ticket"], ([], []))
        (ups if row["label"] else downs).append(row)
    return [
        {"prompt": up["prompt"], "chosen": up["completion"], "rejected": down["completion"]}
        for ups, downs in tickets.values()
        for up, down in zip(ups, downs, strict=False)
    ]


def rows_for(method: str, found: list[dict]) -> list[dict]:
    """What a method reads of these thumbs."""
    if method in ("dpo", "orpo", "orpo reply"):
        return pairs(found)
    return found if method == "kto" else liked(found)


def weight(found: list[dict]) -> float:
    """The weight of a thumbs-up with which both kinds count the same in sum: KTO, Eq. 8."""
    ups = len(liked(found))
    return (len(found) - ups) / ups


# --- How many steps -------------------------------------------------------------------------------


def pass_steps(method: str, found: list[dict]) -> int:
    """Steps of one pass over these thumbs: each is read once at most.

    KTO leaves out a last batch that isn't full, since it can't train on a batch of one.
    """
    rows = rows_for(method, found)
    if method == "kto":
        return len(rows) // THUMBS
    if method == "spin":
        return sum(math.ceil(len(part) / BATCH) for part in halves(rows))
    return math.ceil(len(rows) / BATCH)


def seconds_steps(method: str, found: list[dict], cost: dict[str, float]) -> int:
    """Steps in the CPU seconds that DPO takes for one pass; cost: seconds a step of each method."""
    seconds = pass_steps("dpo", found) * cost["dpo"]
    at_once = ROUNDS if method == "spin" else 1
    return at_once * max(round(seconds / cost[method] / at_once), 1)


def halves(rows: list[dict]) -> list[list[dict]]:
    """The rows of SPIN's rounds: as many in each, or one more in the first."""
    size = math.ceil(len(rows) / ROUNDS)
    return [rows[i * size : (i + 1) * size] for i in range(ROUNDS)]


# --- TRL's trainers -------------------------------------------------------------------------------


def classes(method: str) -> tuple:
    """(trainer, its config) of TRL: SPIN is DPO's loss against replies of its own."""
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    if method == "orpo reply":
        return orpo_of_the_paper()
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    if method == "sft":
        return SFTTrainer, SFTConfig
    return (KTOTrainer, KTOConfig) if method == "kto" else (DPOTrainer, DPOConfig)


def orpo_of_the_paper() -> tuple:
    """TRL's ORPO with the paper's NLL: -log p(y|x) / |y| of the liked reply, mean over pairs.

    TRL's own NLL is a mean over the tokens of prompt and reply (Hong et al. 2024, Eq. 6).
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class ReplyORPO(ORPOTrainer):
        def concatenated_forward(self, model, batch):
            chosen, *others = super().concatenated_forward(model, batch)
            others[3] = -chosen.mean()  # log p a token of each liked reply
            return chosen, *others

    return ReplyORPO, ORPOConfig


COLUMNS = ("prompt", "completion", "label", "chosen", "rejected")


def trainer_of(world: World, model, rows: list[dict], setting: Setting, steps: int) -> Any:
    """One of TRL's trainers in fp32 with a linear decay; weights of KTO come from these rows."""
    from datasets import Dataset
    from transformers import PrinterCallback

    kind, config = classes(setting.method)
    columns = [name for name in COLUMNS if name in rows[0]]
    more = {} if setting.beta is None else {"beta": setting.beta}
    if setting.method == "kto":
        more["desirable_weight"] = weight(rows) if setting.weighted else 1.0
    if setting.method == "sft":
        columns = ["prompt", "completion"]
    trainer = kind(
        model,
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
        processing_class=world.tokenizer,
        args=config(
            output_dir="runs/preferences/trainer",
            learning_rate=setting.rate,
            max_steps=steps,
            per_device_train_batch_size=THUMBS if setting.method == "kto" else BATCH,
            warmup_steps=WARMUP,
            weight_decay=0.0,
            seed=setting.seed,
            bf16=False,
            logging_steps=math.ceil(steps / LOGGED),
            **(sft.QUIET | more),
        ),
        peft_config=lora(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fitted(world: World, model, rows: list[dict], setting: Setting, steps: int) -> tuple:
    """(the PEFT model, its curve, CPU seconds of train()) after so many steps."""
    trainer = trainer_of(world, model, rows, setting, steps)
    began = cpu_clock()
    trainer.train()
    return trainer.model.eval(), curve(trainer.state.log_history), cpu_clock() - began


def curve(history: list[dict]) -> list[dict]:
    """What moved: of each log the values of CURVE that it has; None where a value isn't finite."""
    found = []
    for log in history:
        if "loss" not in log:
            continue
        entry = {"step": log["step"]}
        for name in CURVE:
            if name in log:
                value = float(log[name])
                entry[name] = round(value, 4) if math.isfinite(value) else None
        found.append(entry)
    return found


def trained(world: World, found: list[dict], setting: Setting, steps: int) -> tuple:
    """(model, what to record of its training) of a method on these thumbs."""
    rows = rows_for(setting.method, found)
    if setting.method == "spin":
        model, logs, seconds = spin(world, rows, setting, steps)
    else:
        model, logs, seconds = fitted(world, world.load(), rows, setting, steps)
    told = {"steps": steps, "rows": len(rows), "curve": logs}
    told["passes"] = round(steps / pass_steps(setting.method, found), 3)
    return model, told | {"train_cpu_seconds": round(seconds, 1)}


def spin(world: World, rows: list[dict], setting: Setting, steps: int) -> tuple:
    """SPIN: liked replies against the model's own; the model of the round before is the reference.

    Each round draws one reply to each of its prompts and trains on these pairs once. The seconds
    are those of drawing and training.
    """
    model, logs, seconds, done = world.load(), [], 0.0, 0
    for number, part in enumerate(halves(taken(rows, steps))):
        began = cpu_clock()
        own = judged(world, model.eval(), part, 1, 1000 * setting.seed + number)
        seconds += cpu_clock() - began
        against = [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": message(row["answers"][0]),
            }
            for row in own
        ]
        size = math.ceil(len(part) / BATCH)
        model, log, spent = fitted(world, model, against, setting, size)
        logs += [entry | {"step": done + entry["step"], "round": number + 1} for entry in log]
        seconds, done = seconds + spent, done + size
        if number < ROUNDS - 1:
            model = model.merge_and_unload()
    return model, logs, seconds


def taken(rows: list[dict], steps: int) -> list[dict]:
    """The rows that so many steps of SPIN read: from the first on, again and again if need be."""
    if steps == sum(math.ceil(len(part) / BATCH) for part in halves(rows)):
        return rows
    return list(itertools.islice(itertools.cycle(rows), steps * BATCH))


def step_seconds(world: World, found: list[dict], seed: int, limit: int | None = None) -> dict:
    """{method: CPU seconds of its steps} of plain TRL, the methods in turns, and of SPIN's replies.

    SPIN's step is DPO's and drawing the replies that it reads.
    """
    betas = {"sft": None, "dpo": 0.1, "orpo": 0.1, "kto": 0.1}
    trainers, clocks = {}, {}
    for method, beta in betas.items():
        setting = Setting(method, 3e-4, beta, seed)
        rows = rows_for(method, found)
        trainers[method] = trainer_of(world, world.load(), rows, setting, TIMED)
        clocks[method] = sft.step_clock()
        trainers[method].add_callback(clocks[method])
    for number in range(TIMED_ROUNDS if limit is None else 2):
        for method in list(trainers)[:: -1 if number % 2 else 1]:
            trainers[method].train()
    seconds = {method: clock.seconds[TIMED:] for method, clock in clocks.items()}
    began, asked = time.process_time(), liked(found)[: 8 * BATCH]
    judged(world, world.start, asked, 1, seed)
    drawing = BATCH * (time.process_time() - began) / len(asked)
    seconds["spin"] = [round(each + drawing, 3) for each in seconds["dpo"]]
    return seconds


def cost_of(seconds: list[float]) -> float:
    """Seconds a step: each batch at its quickest, the mean over the batches.

    seconds: of TIMED batches, in their order, once a turn.
    """
    quickest = [min(seconds[batch::TIMED]) for batch in range(TIMED)]
    return round(statistics.mean(quickest), 4)


# --- What a model is worth ------------------------------------------------------------------------


def on_validation(world: World, model, seed: int, limit: int | None = None) -> dict:
    """What the search looks at: the mean gold of one sampled and one greedy reply to each ticket.

    kl: KL(policy || SFT model) of the sampled ones, nats per answer, exact at each position.
    """
    rows = world.validation[:limit]
    sampled = judged(world, model, rows, 1, 1000 * seed + 7)
    greedy = judged(world, model, rows, 1, 1000 * seed + 7, temperature=0.0)
    golds = [statistics.mean(row["golds"][0] for row in each) for each in (sampled, greedy)]
    return {
        "validation": round(statistics.mean(golds), 4),
        "validation_sampled": round(golds[0], 4),
        "validation_greedy": round(golds[1], 4),
        "kl": round(kl_to_start(world, model, sampled), 4),
    }


def on_test(world: World, model, seed: int, temperature: float = 1.0, limit=None) -> dict:
    """Gold of each ticket of both held-out sets: the mean of two sampled replies, a greedy reply.

    words: their mean number; cut: the share that LENGTH tokens have cut off.
    """
    found = {}
    for place, (name, rows) in enumerate((("test", world.test), ("hand", world.hand))):
        draw = functools.partial(judged, world, model, rows[:limit], seed=1000 * seed + 8 + place)
        sampled, greedy = draw(2, temperature=temperature), draw(1, temperature=0.0)
        found[name] = {
            "sampled": [round(statistics.mean(row["golds"]), 4) for row in sampled],
            "greedy": [row["golds"][0] for row in greedy],
            "words": [words(sampled), words(greedy)],
            "cut": [cut(sampled), cut(greedy)],
        }
        if name == "hand":
            found[name] |= {"texts": texts(sampled), "greedy_texts": texts(greedy)}
    return found


def words(rows: list[dict]) -> float:
    """The mean number of words of the replies."""
    said = [len(text.split()) for row in rows for text in row["answers"]]
    return round(statistics.mean(said), 1)


def cut(rows: list[dict]) -> float:
    """The share of replies that end only because no further token was allowed."""
    from experiments.alignment.run import LENGTH

    said = [len(ids) >= LENGTH for row in rows for ids in row["ids"]]
    return round(sum(said) / len(said), 4)


def texts(rows: list[dict]) -> list[str]:
    """The first reply to each of the tickets with the lowest ids."""
    first = sorted(rows, key=lambda row: row["id"])[:SHOWN]
    return [row["answers"][0] for row in first]
