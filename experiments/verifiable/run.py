"""GRPO with a check in place of a reward model, on `ask`, and what it has to beat. On `micro`.

    python experiments/verifiable/run.py            every run that records.jsonl lacks; it can be stopped and goes on
    python experiments/verifiable/run.py table      arms, runs, CPU-hours, scores so far
    python experiments/verifiable/run.py --plan     what is missing, seed by seed, and what it will take

Every run starts from data/ask_start: `micro` after SFT on a log of queries that nobody reviewed, in which house words
are taken otherwise than they are meant. Its prompts are the other half of the training questions; for the check each of
them comes with the rows that are right.

| arm | learns from |
|---|---|
| temperature | nothing: the start, sampled at lower temperatures |
| majority | nothing: 8 answers of the start, and the result that most of them return |
| grpo | the check: 1 if a query returns the right rows on all ten tables, else 0 |
| grpo clean | the same, from another start: SFT on the log as it should be |
| grpo filtered | the same, on prompts that the start solved in 1 to 3 of 4 tries |
| grpo dynamic | the same, on groups with spread: 2 groups are drawn for one that is kept (DAPO's dynamic sampling) |
| grpo parts | 0.1 if it runs, 0.1 if it has as many columns, and 0.8 times the share of the ten tables that are right |
| grpo one table | a check that can be cheated: the right rows on the first table |
| grpo any rows | a check that can be cheated: it runs and returns a row |
| more sft | the gold queries of the same prompts |
| rejection | SFT on the right ones of the start's own answers to them |
| distill | reverse KL to a teacher on its own answers, no check; the teacher is `micro` after a long SFT |
| sft teacher | SFT on the teacher's greedy answers |

Every arm that trains has SECONDS of one core, sampling and checking included, and is measured at thirds of them; the
teacher's training is left out. LoRA r=16 on all linear layers, AdamW, fp32, in TRL's trainers; the rate falls to 0 with
the time.
A step of GRPO has 8 groups of 8 answers at temperature 1, one pass, beta 0, TRL's defaults else; of distillation 64
answers to 64 prompts; of SFT 16 rows. Rates are searched with a seed of their own, the controls' as the others', by the
checkpoints: `right` of 4 answers to each of 150 validation questions, beside it `reward` by the arm's own check, and
the KL to the start (nats an answer, exact at each position). The best rate is the lowest that ends within 0.02 of the
highest `right`, about a standard error. The test questions and the hand test are read once, at the end: 8 samples each
and the greedy answer. `hits`: how many of the 8 are right; pass@8 is the share above 0. ids.json says whose each value
is; `texts` are greedy answers to the 20 questions of the hand test with the lowest ids.

One line a run.
"""

import importlib.metadata
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path

from experiments.alignment import run as alignment
from experiments.runs import Job, flags, stamp, work
from ftlab.paths import DATA
from ftlab.tasks import ask

FILE = Path(__file__).with_name("records.jsonl")
START = DATA / "ask_start"
KEPT = Path("runs/verifiable")  # the teacher, and what several runs draw: it can be deleted
SECONDS = 240  # of one core, for each arm that trains
PROMPTS, GENERATIONS, LENGTH, SAMPLES = 8, 8, 80, 8
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TEMPERATURES = (1.0, 0.7, 0.4, 0.2, 0.0)
SEEDS = (1, 2, 3, 4)
BEST = {"by": "right", "slack": 0.02}  # about a standard error of a difference; the lower rate is the safer one
RATES = (3e-4, 1e-3, 3e-3)
QUESTIONS = ["ask/validation, first 150 by id", "ask/test", "ask/hand_test"]
SPREAD = ("grpo filtered", "grpo dynamic", "grpo parts")


def arms() -> list[dict]:
    """Every arm. `rates` are searched; `of` names the arm whose rate it takes."""
    found = [{"arm": name, "rate": 0, "seeds": SEEDS[:1]} for name in ("temperature", "majority")]
    found += [{"arm": name, "rates": RATES, "seeds": SEEDS} for name in ("grpo", "more sft", "rejection", "distill")]
    found += [{"arm": "sft teacher", "of": "more sft", "seeds": SEEDS}]
    found += [{"arm": name, "of": "grpo", "seeds": SEEDS} for name in ("grpo one table", "grpo any rows")]
    found += [{"arm": name, "of": "grpo", "seeds": SEEDS[:2]} for name in SPREAD]
    return [*found, {"arm": "grpo clean", "of": "grpo", "start": "clean", "seeds": SEEDS[:1]}]


# --- Checks -----------------------------------------------------------------------------------------------------------


def right(answer: str, gold: str) -> float:
    return float(ask.is_right(answer, gold))


def tables_right(answer: str, gold: str) -> list[bool]:
    """Whether the answer returns the gold query's rows, table by table. Columns may not be swapped here."""
    found = []
    for db in ask.databases():
        wanted = ask.run_query(gold, db)
        try:
            got = ask.run_query(answer, db)
        except ask.QueryError:
            return [False] * len(ask.NAMES)
        found.append(got == wanted if "ORDER BY" in gold else Counter(got) == Counter(wanted))
    return found


def parts(answer: str, gold: str) -> float:
    db = ask.databases()[0]
    try:
        got, wanted = ask.run_query(answer, db), ask.run_query(gold, db)
    except ask.QueryError:
        return 0.0
    columns = bool(got) and bool(wanted) and len(got[0]) == len(wanted[0])
    return 0.1 + 0.1 * columns + 0.8 * statistics.mean(tables_right(answer, gold))


def one_table(answer: str, gold: str) -> float:
    return float(tables_right(answer, gold)[0])


def any_rows(answer: str, gold: str) -> float:
    try:
        return float(bool(ask.run_query(answer, ask.databases()[0])))
    except ask.QueryError:
        return 0.0


CHECKS = {"grpo parts": parts, "grpo one table": one_table, "grpo any rows": any_rows}


# --- What runs share --------------------------------------------------------------------------------------------------


def read(name: str) -> list[dict]:
    lines = (DATA / "ask" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: row[key] for key in ("id", "prompt", "completion")} | {"gold": row["completion"][0]["content"]}
            for row in map(json.loads, lines)]  # fmt: skip


class World:
    """One a process and start ("log", "clean"): tokenizer, rows, the start."""

    def __init__(self, kind: str) -> None:
        import torch
        from transformers import AutoTokenizer

        from ftlab.cpu import keep_memory

        keep_memory()
        torch.set_num_threads(1)
        self.make = alignment.module(START / "make.py")
        lines = (START / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        gold = [json.loads(line) for line in lines]
        self.prompts = [row | {"completion": alignment.message(row["gold"])} for row in gold]
        self.validation = sorted(read("validation"), key=lambda row: row["id"])[:150]  # ids.json names them
        self.test, self.hand = read("test"), read("hand_test")
        self.tokenizer = AutoTokenizer.from_pretrained(START)
        self.folder = START if kind == "log" else self.trained("start-clean", lambda: self.make.log(0, 0), {})
        self.start = self.load().eval().requires_grad_(False)

    def load(self, folder: Path | None = None):
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder or self.folder, dtype=torch.float32)

    def trained(self, name: str, rows, how: dict) -> Path:
        """The folder of `micro` after SFT on rows(), made as the start is."""
        folder = KEPT / name
        if not (folder / "model.safetensors").is_file():
            trainer = self.make.starts.fine_tuned(rows(), self.make.SETTINGS | how)
            self.make.starts.save(trainer.model, folder)
        return folder

    def ids(self, row: dict) -> list[int]:
        return self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)

    def drawn(self, model, rows: list[dict], n: int, seed: int, temperature: float = 1.0) -> list[dict]:
        """The rows with n answers each: `ids` without the end of turn, `texts`."""
        import torch

        from ftlab.cpu import Decoder

        decoder, generator, eos = Decoder(model), torch.Generator().manual_seed(seed), self.tokenizer.eos_token_id
        prompts, ids = [self.ids(row) for row in rows for _ in range(n)], []
        for at in range(0, len(prompts), 200):
            ids += decoder.generate(prompts[at : at + 200], LENGTH, [eos], temperature, generator)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        own = [slice(i * n, (i + 1) * n) for i in range(len(rows))]
        return [row | {"ids": ids[mine], "texts": texts[mine]} for row, mine in zip(rows, own, strict=True)]

    def answers(self, *what, **how) -> list[list[str]]:
        """The texts of `drawn`."""
        return [row["texts"] for row in self.drawn(*what, **how)]

    def teacher(self):
        """`micro` after SFT on the gold queries of both halves, in five passes."""
        folder = self.trained("teacher", self.make.rows, {"num_train_epochs": self.make.TEACHER_PASSES})
        return self.load(folder).eval().requires_grad_(False)


@cache
def world(kind: str = "log") -> World:
    return World(kind)


class Run:
    """One arm, rate and seed: a clock that ends the training, the checkpoints."""

    def __init__(self, arm: dict, rate: float, seed: int, phase: str) -> None:
        from transformers import set_seed

        self.arm, self.rate, self.seed, self.phase = arm, rate, seed, phase
        self.clock, self.checkpoints, self.logs, self.steps = alignment.Clock(), [], [], 0
        self.check, self.world = CHECKS.get(arm["arm"], right), world(arm.get("start", "log"))
        set_seed(seed)

    def rows(self) -> list[dict]:
        rows = list(self.world.prompts)
        random.Random(self.seed).shuffle(rows)
        return rows

    def paid(self, name: str, make) -> list:
        """What make() returns, a list for JSON, made once for each seed and paid for by each run."""
        self.clock.stop()
        path = KEPT / f"{name}-{self.seed}.json"
        if not path.is_file():
            began = time.process_time()
            found = make()
            alignment.keep(path, json.dumps({"seconds": time.process_time() - began, "found": found}).encode())
        kept = json.loads(path.read_text(encoding="utf-8"))
        self.clock.pays(kept["seconds"])
        self.clock.go_on()
        return kept["found"]

    def look(self, model) -> None:
        """A checkpoint on the validation questions, 4 answers each (one for the KL), the clock stopped."""
        self.clock.stop()
        was = model.training
        model.eval()
        drawn = self.world.drawn(model, self.world.validation, 4, seed=7)
        checked = [[self.check(text, row["gold"]) for text in row["texts"]] for row in drawn]
        true = [[right(text, row["gold"]) for text in row["texts"]] for row in drawn]
        kl = alignment.kl_to_start(self.world, model, [row | {"ids": row["ids"][:1]} for row in drawn], length=LENGTH)
        model.train(was)
        self.checkpoints.append(
            {
                "step": self.steps,
                "cpu_seconds": round(self.clock.total, 1),
                "right": round(statistics.mean(map(statistics.mean, true)), 4),
                "reward": round(statistics.mean(map(statistics.mean, checked)), 4),
                "characters": round(statistics.mean(len(text) for row in drawn for text in row["texts"]), 1),
                "kl": round(kl, 4),
            }
        )
        self.clock.go_on()

    def watcher(self):
        """A callback that looks at thirds of SECONDS, ends the training with them, and lets the rate fall to 0."""
        from transformers import TrainerCallback

        run = self

        class Watcher(TrainerCallback):
            def on_step_end(self, args, state, control, model, optimizer, **_):
                run.steps = state.global_step
                for group in optimizer.param_groups:  # after TRL's schedule, which is constant
                    group["lr"] = run.rate * max(1 - run.clock.seconds() / SECONDS, 0.0)
                if run.clock.seconds() >= SECONDS * (len(run.checkpoints) + 1) / 3:
                    run.look(model)
                control.should_training_stop |= len(run.checkpoints) == 3

        return Watcher()

    def arguments(self, batch: int, **more) -> dict:
        return {
            "output_dir": str(KEPT / str(os.getpid())),
            "learning_rate": self.rate,
            "max_steps": 100_000,  # the clock ends it
            "per_device_train_batch_size": batch,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "seed": self.seed,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        } | more

    def trained(self, trainer):
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
        kept = (
            "reward",
            "frac_reward_zero_std",
            "entropy",
            "clip_ratio/region_mean",
            "completions/mean_length",
            "loss",
        )
        logs = [log for log in trainer.state.log_history if "loss" in log]
        self.logs = [{key: round(log[key], 4) for key in kept if key in log} for log in logs]
        return trainer.model

    def measured(self, model, temperature: float = 1.0) -> dict:
        """The test questions and the hand test: right ones of SAMPLES answers, and whether the greedy answer is."""
        model.eval()
        found = {}
        for name, rows in (("test", self.world.test), ("hand", self.world.hand)):
            drawn = self.world.answers(model, rows, SAMPLES, seed=8, temperature=temperature)
            greedy = self.world.answers(model, rows, 1, seed=8, temperature=0.0)
            hits = [sum(right(text, row["gold"]) for text in texts) for texts, row in zip(drawn, rows, strict=True)]
            shown = sorted(zip(rows, greedy, strict=True), key=lambda pair: pair[0]["id"])[:20]
            found[name] = {
                "hits": list(map(int, hits)),
                "greedy": [right(texts[0], row["gold"]) for texts, row in zip(greedy, rows, strict=True)],
                "texts": [texts[0] for _, texts in shown] if name == "hand" else [],
            }
        return found


# --- Arms -------------------------------------------------------------------------------------------------------------


def lora():
    from peft import LoraConfig

    return LoraConfig(**LORA)


def answered(run: Run, model, prompt_ids: list[list[int]]) -> list[list[int]]:
    """An answer to each prompt by ftlab's decoder, with its end of turn, as TRL's trainers want them."""
    from ftlab.cpu import Decoder

    eos = run.world.tokenizer.eos_token_id
    found = Decoder(model).generate(prompt_ids, LENGTH, [eos], 1.0)
    return [ids + [eos] * (len(ids) < LENGTH) for ids in found]


def solved(run: Run) -> list[int]:
    """Of each prompt of this seed's first 800: how many of 4 answers of the start are right."""
    rows = run.rows()[:800]
    drawn = run.world.answers(run.world.start, rows, 4, seed=run.seed)
    return [sum(right(text, row["gold"]) for text in texts) for texts, row in zip(drawn, rows, strict=True)]


def grpo(run: Run):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from ftlab import speed_up

    name, rows, ready = run.arm["arm"], run.rows(), []
    if name == "grpo filtered":
        rows = [row for row, n in zip(rows, run.paid("solved", partial(solved, run)), strict=False) if 0 < n < 4]

    def reward(completions, gold, **_) -> list[float]:
        return [run.check(c[0]["content"], g) for c, g in zip(completions, gold, strict=True)]

    class Dynamic(GRPOTrainer):
        """Draws twice the groups, and keeps those with spread."""

        def _generate_single_turn(self, *_):
            return ready.pop(), None

        def _generate_and_score_completions(self, inputs):
            asked = [*inputs[::GENERATIONS], *random.sample(rows, PROMPTS)]
            prompts = [run.world.ids(row) for row in asked for _ in range(GENERATIONS)]
            answers = answered(run, self.model, prompts)
            texts = run.world.tokenizer.batch_decode(answers, skip_special_tokens=True)
            groups = []
            for k, row in enumerate(asked):
                mine = slice(k * GENERATIONS, (k + 1) * GENERATIONS)
                rewards = {run.check(text, row["gold"]) for text in texts[mine]}
                groups.append((len(rewards) == 1, row, answers[mine]))
            groups = sorted(groups, key=lambda group: group[0])[:PROMPTS]  # those with spread first
            ready.append([ids for _, _, own in groups for ids in own])
            return super()._generate_and_score_completions([row for _, row, _ in groups for _ in range(GENERATIONS)])

    trainer = (Dynamic if name == "grpo dynamic" else GRPOTrainer)(
        run.world.load(),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "gold")} for row in rows]),
        processing_class=run.world.tokenizer,
        args=GRPOConfig(
            **run.arguments(PROMPTS * GENERATIONS),
            num_generations=GENERATIONS,
            max_completion_length=LENGTH,
            beta=0.0,
        ),
        peft_config=lora(),
        callbacks=[run.watcher()],
    )
    speed_up(trainer)
    return run.trained(trainer)


def own_right(run: Run) -> list[dict]:
    """The start's right answers, each once, to as many prompts as half the time allows, 4 answers each."""
    found, began = [], time.process_time()
    for at in range(0, len(run.world.prompts), 50):
        rows = run.rows()[at : at + 50]
        for texts, row in zip(run.world.answers(run.world.start, rows, 4, seed=run.seed + at), rows, strict=True):
            good = sorted({text for text in texts if right(text, row["gold"])})
            found += [{"prompt": row["prompt"], "completion": alignment.message(text)} for text in good]
        if time.process_time() - began > SECONDS / 2:
            break
    return found


def taught(run: Run) -> list[dict]:
    """The teacher's greedy answers, to as many prompts as a third of the time allows."""
    teacher, found, began = run.world.teacher(), [], time.process_time()
    for at in range(0, len(run.world.prompts), 100):
        rows = run.rows()[at : at + 100]
        drawn = run.world.answers(teacher, rows, 1, seed=run.seed, temperature=0.0)
        found += [
            {"prompt": row["prompt"], "completion": alignment.message(texts[0])}
            for texts, row in zip(drawn, rows, strict=True)
        ]
        if time.process_time() - began > SECONDS / 3:
            break
    return found


def sft(run: Run):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ftlab import speed_up

    makers = {"rejection": own_right, "sft teacher": taught}
    if make := makers.get(run.arm["arm"]):
        rows = run.paid(run.arm["arm"].replace(" ", "-"), partial(make, run))
    else:
        rows = [{key: row[key] for key in ("prompt", "completion")} for row in run.rows()]
    trainer = SFTTrainer(
        run.world.load(),
        train_dataset=Dataset.from_list(rows),
        processing_class=run.world.tokenizer,
        args=SFTConfig(**run.arguments(16)),
        peft_config=lora(),
        callbacks=[run.watcher()],
    )
    speed_up(trainer)
    return run.trained(trainer)


def distill(run: Run):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    run.clock.stop()
    teacher = run.world.teacher()
    run.clock.go_on()

    class Fast(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids, *_):
            return answered(run, self.model, prompt_ids)

    trainer = Fast(
        run.world.load(),
        teacher_model=teacher,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in run.rows()]),
        processing_class=run.world.tokenizer,
        args=DistillationConfig(**run.arguments(PROMPTS * GENERATIONS), max_completion_length=LENGTH, beta=1.0),
        peft_config=lora(),
        callbacks=[run.watcher()],
    )
    return run.trained(trainer)


def temperatures() -> list[dict]:
    free = Run({"arm": "temperature"}, 0, 1, "final")
    return [{"temperature": t} | free.measured(world().start, t) for t in TEMPERATURES]


def rewards_of_start() -> dict:
    """What each check pays the start on the validation questions, before any step."""
    found = {}
    for name in ("right", *CHECKS):
        one = Run({"arm": name}, 0, 1, "final")
        one.look(world().start)
        found[name] = one.checkpoints[0]["reward"]
    return found


def majority() -> dict:
    """Of 8 answers, the first one whose rows on the first table most of those that run return."""
    found = {}
    for name, rows in (("test", world().test), ("hand", world().hand)):
        chosen = []
        for texts in world().answers(world().start, rows, SAMPLES, seed=8):
            results = {}
            for text in texts:
                try:
                    results.setdefault(repr(ask.run_query(text, ask.databases()[0])), []).append(text)
                except ask.QueryError:
                    continue
            chosen.append(max(results.values(), key=len)[0] if results else texts[0])
        found[name] = {"chosen": [right(text, row["gold"]) for text, row in zip(chosen, rows, strict=True)]}
    return found


METHODS = {"more sft": sft, "rejection": sft, "sft teacher": sft, "distill": distill}


# --- All runs ---------------------------------------------------------------------------------------------------------


def named(arm: dict, rate: float, seed: int, phase: str) -> dict:
    return {"arm": arm["arm"], "rate": rate, "seed": seed, "phase": phase}


def run(arm: dict, rate: float, seed: int, phase: str) -> dict:
    began, record = time.process_time(), named(arm, rate, seed, phase)
    if arm["arm"] == "temperature":
        record |= {"points": temperatures(), "rewards": rewards_of_start()}
    elif arm["arm"] == "majority":
        record |= majority()
    else:
        one = Run(arm, rate, seed, phase)
        model = METHODS.get(arm["arm"], grpo)(one)
        record |= {"checkpoints": one.checkpoints, "logs": one.logs, "cpu_seconds": round(one.clock.seconds(), 1)}
        if phase == "final":
            record |= one.measured(model)
            record |= {"start": one.measured(one.world.start)} if "start" in arm else {}
    names = ("torch", "transformers", "peft", "trl")
    record["versions"] = {name: importlib.metadata.version(name) for name in names}
    return record | {"all_seconds": round(time.process_time() - began, 1)}


def runs(done: list[dict]) -> list[tuple]:
    """Every run, as far as the search has come: (arm, rate, seed, phase)."""
    todo, best = [], {}
    for arm in arms():
        if "rates" in arm:
            search = [r for r in done if r["arm"] == arm["arm"] and r["phase"] == "search"]
            if rates := alignment.unsearched(search, arm["rates"], **BEST):
                todo += [(arm, rate, alignment.SEARCH_SEED, "search") for rate in rates]
            else:
                best[arm["arm"]] = alignment.best_rate(search, **BEST)
        rate = arm.get("rate", best.get(arm.get("of", arm["arm"])))
        if rate is not None:
            todo += [(arm, rate, seed, "final") for seed in arm["seeds"]]
    return todo


def wanted(done: list[dict]) -> list[tuple]:
    """The runs that are still missing, the search first, and every arm's first seed before the second of any."""
    keys = [{key: r[key] for key in ("arm", "rate", "seed", "phase")} for r in done]
    missing = [one for one in runs(done) if named(*one) not in keys]
    return sorted(missing, key=lambda one: (one[3] != "search", one[2]))


def chosen(arm: dict) -> dict:
    """How the settings of an arm were chosen, for its records."""
    searched = f"searched with seed {alignment.SEARCH_SEED} by `right` on the first 150 validation questions by id"
    if "rates" in arm:
        rate = searched
    else:
        rate = f"the one that was found for {arm['of']}" if "of" in arm else "none: nothing is trained"
    return {"rate": rate, "steps": f"as many as fit into {SECONDS} CPU seconds", "all else": "given in run.py"}


def recorded(arm: dict, rate: float, seed: int, phase: str) -> list[dict]:
    """The record of a run; where nothing is trained its cpu_seconds are those of all that it did."""
    record = run(arm, rate, seed, phase)
    record = {"cpu_seconds": record["all_seconds"]} | record
    return [record | stamp("float32", QUESTIONS, chosen(arm))]


def jobs(done: list[dict]) -> list[Job]:
    return [Job((named(*one),), one) for one in runs(done)]


def table() -> None:
    from ftlab.classroom.results import pass_at

    done = alignment.records(FILE)
    for arm in arms():
        mine = [r for r in done if r["arm"] == arm["arm"]]
        final = [r for r in mine if r["phase"] == "final" and "test" in r]
        line = f"{arm['arm']:15} runs {len(mine):2} {sum(r['all_seconds'] for r in mine) / 3600:5.2f} h"
        for r in mine:
            if r["phase"] == "search":
                line += f"  {r['rate']:g}: {r['checkpoints'][-1]['right']:.2f}"
        if final and "hits" in final[0]["test"]:
            for name in ("test", "hand"):
                one, eight = (
                    statistics.mean(pass_at(r[name]["hits"], k, SAMPLES).mean() for r in final) for k in (1, 8)
                )
                greedy = statistics.mean(statistics.mean(r[name]["greedy"]) for r in final)
                line += f"  {name} pass@1 {one:.3f} pass@8 {eight:.3f} greedy {greedy:.3f}"
        print(line)


if __name__ == "__main__":
    words, how = flags(sys.argv[1:])
    table() if words == ["table"] else work(FILE, jobs, recorded, at_once=2, **how)
