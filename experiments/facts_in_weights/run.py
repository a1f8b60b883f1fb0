"""Facts in the weights against facts that are looked up: how many passes, and what do they cost?

    python experiments/facts_in_weights/run.py             what records.jsonl lacks, on one thread
    python experiments/facts_in_weights/run.py --plan      what is missing, seed by seed
    python experiments/facts_in_weights/run.py --dry DIR   a tiny run of each path into DIR

It can be stopped and goes on (experiments/runs.py says how). experiments/methods asks this with a
model that had learned a third of its facts, and with everyday facts that were chosen because the
model knew them; its records stand as they are.

SmolLM2-135M-Instruct learns 36 facts of data/handbook, a company that does not exist, from one
question each (`handbook.prompt`, no page in it). Then it is asked them as they were trained, in the
two other wordings that data/handbook has, and the other way round (reversed.jsonl here, written
for this: from the answer to what it stands for); 36 facts of the same handbook that it was not
taught; and 143 everyday questions.

| arm | what | seeds | CPU hours, search among them |
|---|---|---|---|
| trained, pass 1, 2, 4, 8, 16 | LoRA on the 36 questions, measured on its way | 6 | 0.72 to 0.75 |
| pass 0 | the model before training | none | 0.03 |
| pass 0, short answers | the same, shown three short answers: everyday questions | none | 0.02 |
| retrieval | the model reads the three passages that BM25 finds | none | 0.06 |
| search alone | the sentence that BM25 puts first, no model | none | 0.00 |

The CPU hours, 0.85 in all, are an estimate from a dry run on one thread of an AMD EPYC that had
other work: 1.2 s a step, 20 s for the 180 questions at each checkpoint, 40 s for the everyday
questions (55 with three short answers before each), 5 s to load the model.
Cut from the bottom: a model that is trained to read what the search finds (0.5; it stands in
experiments/methods with three seeds), training on two of the three wordings (0.7), the pages as
training text (1.5), `micro`, which was pretrained on this handbook.

LoRA of rank 16, alpha 32, all linear layers, four rows a step, nine steps a pass, AdamW, five steps
of warm-up and then a constant rate, so that a checkpoint is what a run of so many passes gives.
fp32 (bf16=False), one thread, TRL's SFTTrainer with `speed_up`. Replies are greedy, 24 tokens at
most (retrieval: 64); one counts if the answer or an accepted form stands in it as whole words.

Harm and change of form: a model that now answers everything in three words has not forgotten. So
each everyday question is measured in two ways (experiments/knowledge.py): `right`, the reply holds
the answer; `recognized`, and its `margin` in nats, where the model writes nothing and the answer's
probability is compared with those of three other questions' answers. "pass 0, short answers" says
what a short form costs a model that was not trained.

Settings: the rate is the best of 5e-4, 1e-3, 2e-3 and a fourth beyond the best where that is an
edge, with seed 11, on 36 *other* facts (`validation`): trained for eight passes on their questions,
scored on their first other wording. Of equals the lower rate. Retrieval is that of
experiments/methods, three passages and at most 64 tokens for a reply; it was not searched here.

Fixed before the first run:

- Six seeds, 0 to 5; a seed draws the adapter and the order of the rows. The facts are the same in
  all, so that intervals are crossed, over seeds and questions.
- Main question: asked in other words than it was trained on, is the model after 16 passes ahead of
  search alone, and of retrieval? By the crossed 95 % interval of the difference, on `second` and on
  `third`, which are the two held-out sets of this question. If on one, the sentence names it. The
  wording that was trained says how many passes it takes, no more.
- Known: the first checkpoint whose mean on the trained wording is at least 0.9.
- Reversed and untrained facts: the model at 16 passes against pass 0 and against search alone, by
  the same rule.
- Harm: `recognized` at 16 passes against pass 0. Harm is shown if the interval lies below zero, and
  excluded if it lies within 0.05 of zero; else it is undecided. `margin` is reported beside it. The
  fall of `right` is named a change of form as far as harm is excluded, and not otherwise.
- Power: 36 facts and six seeds give half-widths of about 0.13 to 0.17 between two ways of answering
  that fail on different facts, so a lead of 0.15 is found about every second time, on each of two
  sets less often. Of `recognized`, 143 questions near the ceiling, about 0.03 to 0.05.
- No passes but these; nothing is chosen on the facts that are reported.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, rate, seed, phase. Of a training `checkpoints`: pass, cpu_seconds of the training so
far, `right` (one 0 or 1 a question of `taught`, `second`, `third`, `reversed`, `untrained`), and at
passes 4 and 16 `everyday` (right, words, query, recognized, margin a question, twelve replies);
`replies`, to the taught questions at the end. Of the others `right` and `everyday` themselves. Of
the search `validation`.
"""

import json
import sys
from pathlib import Path

from experiments import knowledge, sft
from experiments.runs import Job, cpu_clock, dry, flags, stamp, work

HERE = Path(__file__).parent
FILE = HERE / "records.jsonl"
SEARCH_SEED, SEEDS, NO_SEED = 11, (0, 1, 2, 3, 4, 5), -1
LADDER = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
FIRST_RATES = (5e-4, 1e-3, 2e-3)
PASSES, SEARCH_PASSES = (1, 2, 4, 8, 16), 8
EVERYDAY_AT = (4, 16)
BATCH, TOKENS, PASSAGES = 4, 24, 3
ROOM = 64  # tokens of a reply to found pages, as in experiments/methods
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRAINED = "trained"
FIXED = ("pass 0", "pass 0, short answers", "retrieval", "search alone")
QUESTIONS = ["facts_in_weights/taught", "facts_in_weights/untrained", knowledge.QUESTIONS]
CHOSEN = {
    "rate": f"the best of three or four with seed {SEARCH_SEED}, on 36 other facts, by their first "
    "other wording after eight passes",
    "passages": "three, as in experiments/methods",
    "all else": "given in run.py",
}


# --- Facts ----------------------------------------------------------------------------------------


def reversed_rows() -> list[dict]:
    """The reversed questions: id of the fact, question, answer, accept."""
    lines = (HERE / "reversed.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def taught() -> list[dict]:
    """The facts that are trained: the train questions of data/handbook that have a reversed one."""
    ids = [row["id"] for row in reversed_rows()]
    by_id = {row["id"]: row for row in knowledge.rows_of("handbook/questions")}
    return [by_id[id_] for id_ in ids]


def untrained() -> list[dict]:
    """As many test questions of data/handbook, each of another page: facts that are not trained."""
    rows = [row for row in knowledge.rows_of("handbook/questions") if row["split"] == "test"]
    return rows[: len(taught())]


def validation() -> list[dict]:
    """As many other train questions: the first of each page that is not taught."""
    ids, found = {row["id"] for row in taught()}, {}
    for row in knowledge.rows_of("handbook/questions"):
        if row["split"] == "train" and row["id"] not in ids:
            found.setdefault(row["page"], row)
    return list(found.values())[: len(ids)]


def reworded(rows: list[dict], number: int) -> list[dict]:
    """The rows with another wording of their question: 0 or 1."""
    return [row | {"question": row["paraphrases"][number]} for row in rows]


def sets() -> dict[str, list[dict]]:
    """What is asked of every arm."""
    rows = taught()
    found = {"taught": rows, "second": reworded(rows, 0), "third": reworded(rows, 1)}
    return found | {"reversed": reversed_rows(), "untrained": untrained()}


def as_training(rows: list[dict]) -> list[dict]:
    """Rows for SFTTrainer: the question alone, the answer."""
    from ftlab.tasks import handbook

    found = []
    for row in rows:
        answer = [{"role": "assistant", "content": row["answer"]}]
        found.append({"prompt": handbook.prompt(row["question"]), "completion": answer})
    return found


# --- Asking ---------------------------------------------------------------------------------------


def scored(said: list[str], rows: list[dict]) -> list[int]:
    from ftlab.tasks import handbook

    return [int(handbook.scorer(*pair)) for pair in zip(said, rows, strict=True)]


def say(model, tokenizer, rows: list[dict], found: list[list[str]] | None = None) -> list[str]:
    """Greedy replies to the questions; found: the passages that stand before each."""
    from ftlab import answers
    from ftlab.tasks import handbook

    texts = found or [[]] * len(rows)
    chats = [
        handbook.prompt(row["question"], these) for row, these in zip(rows, texts, strict=True)
    ]
    if found:
        return answers(model, tokenizer, chats, ROOM, batch_size=16)
    return answers(model, tokenizer, chats, TOKENS)


def right(model, tokenizer, limit: int | None = None) -> dict:
    """{set: a 0 or 1 a question} of a model that is asked without pages."""
    asked = {name: rows[:limit] for name, rows in sets().items()}
    return {name: scored(say(model, tokenizer, rows), rows) for name, rows in asked.items()}


def looked_up(arm: str, limit: int | None = None) -> dict:
    """The same of the model that reads what BM25 finds, or of the sentence that BM25 puts first."""
    from experiments.ask.run import base
    from experiments.methods import run as methods

    asked = {name: rows[:limit] for name, rows in sets().items()}
    if arm == "search alone":
        said = {
            n: [methods.best_sentence(r["question"]) for r in rows] for n, rows in asked.items()
        }
    else:
        search, pages = methods.index("facts").search, methods.pages()
        model, tokenizer = base()
        said = {}
        for name, rows in asked.items():
            hits = [[pages[i] for i in search(row["question"], PASSAGES)] for row in rows]
            said[name] = say(model, tokenizer, rows, hits)
    return {name: scored(said[name], rows) for name, rows in asked.items()}


# --- A run ----------------------------------------------------------------------------------------


def fixed(arm: str, limit: int | None) -> dict:
    """What an arm that is not trained scores."""
    from experiments.ask.run import base

    if arm in ("retrieval", "search alone"):
        return {"right": looked_up(arm, limit)}
    model, tokenizer = base()
    rows = knowledge.everyday()[:limit]
    if arm == "pass 0, short answers":
        return {"everyday": knowledge.measured(model, tokenizer, rows, knowledge.short_answers())}
    found = {"right": right(model, tokenizer, limit)}
    return found | {"everyday": knowledge.measured(model, tokenizer, rows)}


def trained(rate: float, seed: int, phase: str, limit: int | None) -> dict:
    """What a training scores: in a search at its end, else at each of PASSES."""
    from experiments.ask.run import base

    rows = (validation() if phase == "search" else taught())[:limit]
    model, tokenizer = base()
    passes = SEARCH_PASSES if phase == "search" else PASSES[-1]
    trainer = sft.trainer_of(
        model,
        tokenizer,
        as_training(rows),
        rate=rate,
        seed=seed,
        lora=LORA,
        per_device_train_batch_size=BATCH,
        num_train_epochs=2 if limit else passes,
        lr_scheduler_type="constant_with_warmup",
    )
    sft.sped_up(trainer)
    looks = None if phase == "search" else looking(tokenizer, limit)
    if looks:
        trainer.add_callback(looks)
    found = sft.trained(trainer)
    if phase == "search":
        other = reworded(rows, 0)
        verdicts = scored(say(trainer.model, tokenizer, other), other)
        return found | {"validation": round(sum(verdicts) / len(verdicts), 4)}
    found["train_cpu_seconds"] = looks.points[-1]["cpu_seconds"]
    said = say(trainer.model, tokenizer, rows)
    return found | {"checkpoints": looks.points, "replies": said}


def looking(tokenizer, limit: int | None):
    """A callback whose `points` are the checkpoints; its clock stands while it measures."""
    from transformers import TrainerCallback

    class Looks(TrainerCallback):
        def __init__(self):
            self.points, self.measuring = [], 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.began = cpu_clock()

        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            began, done = cpu_clock(), round(state.epoch)
            if done in PASSES:
                point = {"pass": done, "cpu_seconds": round(began - self.began - self.measuring, 1)}
                point["right"] = right(model, tokenizer, limit)
                if done in EVERYDAY_AT or limit:
                    asked = knowledge.everyday()[:limit]
                    point["everyday"] = knowledge.measured(model, tokenizer, asked)
                self.points.append(point)
            self.measuring += cpu_clock() - began

    return Looks()


def recorded(
    arm: str, rate: float | None, seed: int, phase: str, limit: int | None = None
) -> list[dict]:
    """The record of a run. limit: of a dry run, so many facts and questions, and two passes."""
    import torch

    torch.set_num_threads(1)
    began = cpu_clock()
    found = trained(rate, seed, phase, limit) if arm == TRAINED else fixed(arm, limit)
    record = {"arm": arm, "rate": rate, "seed": seed, "phase": phase} | found
    record |= {"cpu_seconds": round(cpu_clock() - began, 1)}
    return [record | stamp("float32", QUESTIONS, CHOSEN)]


# --- Which runs -----------------------------------------------------------------------------------


def tried(records: list[dict]) -> dict[float, float]:
    """{rate: share right on the validation facts} of the search so far."""
    return {r["rate"]: r["validation"] for r in records if r["phase"] == "search"}


def rates(scores: dict[float, float]) -> list[float]:
    """What the search tries: the first ones, and one beyond the best if it is an edge."""
    if not set(FIRST_RATES) <= scores.keys():
        return list(FIRST_RATES)
    at = LADDER.index(best_of(FIRST_RATES, scores))
    near = {FIRST_RATES[0]: LADDER[at - 1], FIRST_RATES[-1]: LADDER[at + 1]}
    return [*FIRST_RATES, *([near[LADDER[at]]] if LADDER[at] in near else [])]


def best_of(values, scores: dict[float, float]) -> float:
    """The rate with the highest score; of equals the lowest one."""
    return max(sorted(values), key=scores.get)


def jobs(records: list[dict]) -> list[Job]:
    """Every run, as far as the search has come."""
    found = [sft.named(arm, None, NO_SEED, "final") for arm in FIXED]
    scores = tried(records)
    wanted = rates(scores)
    found += [sft.named(TRAINED, rate, SEARCH_SEED, "search") for rate in wanted]
    if set(wanted) <= scores.keys():
        best = best_of(wanted, scores)
        found += [sft.named(TRAINED, best, seed, "final") for seed in SEEDS]
    return found


def small() -> list[tuple]:
    """A run of each path, for a dry run."""
    runs = [(arm, None, NO_SEED, "final") for arm in FIXED]
    runs += [(TRAINED, 1e-3, 0, phase) for phase in ("search", "final")]
    return runs


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dry"]:
        dry(Path(sys.argv[2]), small(), lambda run: recorded(*run, limit=8))
    else:
        work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])
