"""DPO, PPO, RLOO and GRPO on one task: what each gains, for how much KL, processor time and labels. On `micro`.

    python experiments/alignment/run.py            every run that records.jsonl lacks; it can be stopped and goes on
    python experiments/alignment/run.py table      arms, runs, CPU-hours, scores so far
    python experiments/alignment/run.py --plan     what is missing, seed by seed, and what it will take

Every run starts from data/replies_start: `micro` after SFT on the old team's log, whose likeliest reply leaves the
order number out. Labels come from the gold rules (ftlab.tasks.replies), as annotators that never tire.

| arm | learns from |
|---|---|
| temperature | nothing: the start, sampled at lower temperatures |
| best of n | nothing: the start, n samples, the best by gold; its KL is at most ln n - (n - 1) / n |
| sft best | SFT on the best of 6 of the start's answers to each of 400 tickets |
| sft chosen | SFT on the 400 replies that the pairs of data/replies prefer: what the DPO paper calls Preferred-FT |
| offline dpo | 400 pairs of data/replies, which the policy did not write |
| on-policy dpo | best against worst of 6 of the start's answers to each of 400 tickets |
| iterated dpo | the same in 3 rounds of 133 tickets, sampled anew; the reference is the round before |
| ppo, rloo, grpo | a reward model, trained on pairs from the same 6 answers to 400 tickets |
| grpo fast | the same reward model, at three times the rate that is best for grpo, which moves it about a nat at most |
| grpo gold | the gold rules as reward (what the DPO paper calls PPO-GT) |

All policies train LoRA, r=16 on all linear layers, AdamW, fp32, in TRL's trainers; PPO is ftlab.scratch.ppo. beta is
DPO's beta, the weight of k3 in GRPO's loss, and of k1 in the reward of RLOO and PPO. DPO and GRPO have three betas, the
other arms one. A step of PPO, RLOO and GRPO has 32 answers and one pass over them (PPO: in two minibatches). Rates are
searched with a seed of their own, at the middle beta, on tickets of skeletons that neither the log nor any arm trains
on ("validation": the rows of train.jsonl whose skeletons log.jsonl lacks). Each beta runs with three seeds, and the one
with the highest gold on validation with two more. Three times a run a checkpoint is measured there (five times where
rewards are hacked; also before the first step where there is a reward model): gold of an answer sampled at temperature
1, KL to the start (nats an answer, exact at each position), processor seconds, judged answers, and the reward model's
score (`proxy`). At the end of a final run the test tickets and the hand test follow, two samples each and the greedy
answer.

hacking: GRPO, beta 0, on two reward models. Both learn from 1,600 pairs of the 2,400 labelled answers. In one set the
better reply is always the longer one ("length"), in the other in half of the pairs ("balanced"). One rate, four seeds.

ablation: iterated DPO and GRPO on gold from two other starts, at the comparison's rates, three seeds: one that is
trained and asked without the line of triage ("no line"), one trained on good replies alone ("good replies"). What the
old experiment measured, greedy answers, stands beside the sampled ones in each record.

One line a run; ids.json says whose each value is, and `texts` are of the 20 tickets of the hand test with the lowest
ids. Processor time is that of one thread; measuring is left out. The runs of grpo fast came later, on
another processor that is as quick: 405 seconds a run, and 419 for the same steps of grpo (beta 0.04) before.
"""

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path

from experiments.runs import Job, cpu_clock, flags, stamp, work
from experiments.runs import read as records_of
from ftlab.paths import DATA

FILE = Path(__file__).with_name("records.jsonl")
START = DATA / "replies_start"
KEPT = Path("runs/alignment")  # what several runs use: it can be deleted
LADDER = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
SEARCH_SEED, SEEDS, FIRST = 11, (1, 2, 3, 4, 5), 3  # seeds of every beta; the best beta of an arm gets all
TICKETS, ANSWERS = 400, 6  # labelled for the offline arms: 2,400 answers
PROMPTS, GENERATIONS = 4, 8  # of one step of ppo, rloo and grpo
LENGTH = 64  # tokens of an answer, at most
CHECKPOINTS = {"comparison": 3, "hacking": 5, "ablation": 3, "thumbs": 1}  # thumbs: experiments/preference/run.py
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
STEPS = {"sft": 60, "dpo": 60, "reward": 100, "online": 60}  # grpo gold: 60 x 32 = 1,920 labels
ARM, RUN = ("experiment", "arm", "beta", "start", "reward"), ("rate", "seed", "phase")  # together: one record
TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
N = (1, 2, 4, 8, 16, 32)
QUESTIONS = ["replies/test", "replies/hand_test"]
HACK_PAIRS, GAP = 1600, 0.15  # GAP: by so much the chosen answer is worth more, at least


def arms() -> list[dict]:
    """Every arm. `rates` are searched; else it runs at its `rate`, or at the best one of the comparison's arm."""

    def arm(name, beta=None, experiment="comparison", start="log", reward=None, **more):
        return {"experiment": experiment, "arm": name, "beta": beta, "start": start, "reward": reward} | more

    found = [arm("temperature", rate=0, seeds=SEEDS), arm("best of n", rate=0, seeds=SEEDS[:1])]
    found += [arm(name, rates=(3e-4, 1e-3, 3e-3)) for name in ("sft best", "sft chosen")]
    for name in ("offline dpo", "on-policy dpo", "iterated dpo"):
        found += [arm(name, beta, rates=(1e-4, 3e-4, 1e-3)) for beta in (0.03, 0.1, 0.3)]
    for name, betas in {"rloo": (0.05,), "ppo": (0.05,), "grpo": (0.0, 0.04, 0.2)}.items():
        found += [arm(name, beta, reward="learned", rates=(3e-4, 1e-3)) for beta in betas]
    found += [arm("grpo fast", 0.04, reward="learned", rate=3e-4, seeds=SEEDS)]
    found += [arm("grpo gold", 0.04, reward="gold", rates=(3e-4, 1e-3))]
    for reward in ("length", "balanced"):
        found += [arm("grpo", 0.0, "hacking", reward=reward, rate=3e-4, seeds=SEEDS[:4])]
    for start in ("no line", "good replies"):
        found += [arm("temperature", None, "ablation", start, rate=0, seeds=SEEDS[:1])]
        found += [arm("iterated dpo", 0.1, "ablation", start, seeds=SEEDS[:3])]
        found += [arm("grpo gold", 0.04, "ablation", start, "gold", seeds=SEEDS[:3])]
    return found


# --- Rows -------------------------------------------------------------------------------------------------------------


def module(path: Path):
    """The module in a file of data/."""
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def read(name: str) -> list[dict]:
    lines = (DATA / "replies" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def without_line(row: dict) -> dict:
    """The row, its prompt without the line of triage."""
    *system, user = row["prompt"]
    return row | {"prompt": [*system, user | {"content": user["content"].rpartition("\n")[0]}]}


class World:
    """What runs share: tokenizer, rows, the start ("log", "no line", "good replies"), labelled answers of each seed."""

    def __init__(self, kind: str = "log") -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ftlab.tasks import replies

        def pair(row: dict) -> dict:
            found = replies.as_pair(row)
            return without_line(found) if kind == "no line" else found

        torch.set_num_threads(1)
        seen = {row["skeleton"] for row in read("log")}
        self.train = [pair(row) for row in read("train") if row["skeleton"] in seen]
        self.validation = [pair(row) for row in read("train") if row["skeleton"] not in seen]
        self.test = [pair(row) | {"id": row["id"]} for row in read("test")]
        self.hand = [pair(row) | {"id": row["id"]} for row in read("hand_test")]
        self.folder = START if kind == "log" else self.trained_start(kind)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.load = lambda: AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.start = self.load().eval().requires_grad_(False)
        self.kind = kind

    def trained_start(self, kind: str) -> Path:
        """Made as data/replies_start is, on the log without the triage line, or on good replies alone."""
        folder = KEPT / f"start-{kind}"
        if not (folder / "model.safetensors").is_file():
            make = module(START / "make.py")
            if kind == "good replies":
                rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in self.train]
            else:
                rows = list(map(without_line, make.rows()))
            make.starts.save(make.starts.fine_tuned(rows, make.SETTINGS).model, folder)
        return folder

    def ids(self, row: dict) -> list[int]:
        return self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)

    def tickets(self, seed: int) -> list[dict]:
        """The TICKETS training rows of this seed."""
        return random.Random(seed).sample(self.train, TICKETS)

    def drawn(self, seed: int, clock: "Clock") -> list[dict]:
        """They with ANSWERS answers of the start each, and their gold: drawn once, paid for by each run."""
        path = KEPT / f"drawn-{self.kind}-{seed}.json"
        if not path.is_file():
            began = time.process_time()
            rows = judged(self, self.start, self.tickets(seed), ANSWERS, seed)
            keep(path, json.dumps({"seconds": time.process_time() - began, "rows": rows}).encode())
        found = json.loads(path.read_text(encoding="utf-8"))
        clock.pays(found["seconds"])
        return found["rows"]


def judged(world: World, model, rows: list[dict], n: int, seed: int, temperature: float = 1.0) -> list[dict]:
    """The rows with n answers each (`answers`, `ids`) and what they are worth (`golds`)."""
    import torch

    from ftlab.cpu import Decoder
    from ftlab.tasks.replies import gold_reward

    decoder, generator, eos = Decoder(model), torch.Generator().manual_seed(seed), world.tokenizer.eos_token_id
    prompts = [world.ids(row) for row in rows for _ in range(n)]
    ids = []
    for at in range(0, len(prompts), 64):
        ids += decoder.generate(prompts[at : at + 64], LENGTH, [eos], temperature, generator)
    texts = world.tokenizer.batch_decode(ids, skip_special_tokens=True)
    found = []
    for i, row in enumerate(rows):
        mine = slice(i * n, (i + 1) * n)
        golds = [gold_reward(text, row["ticket_label"]) for text in texts[mine]]
        found.append(row | {"answers": texts[mine], "ids": ids[mine], "golds": golds})
    return found


def kl_to_start(world: World, model, rows: list[dict], temperature: float = 1.0, length: int = LENGTH) -> float:
    """KL(policy || start) of the answers of `judged` rows, summed over positions, mean over answers, nats.

    The policy is the model at this temperature, the start is always at 1.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    eos, total, number = world.tokenizer.eos_token_id, 0.0, 0
    texts = [(world.ids(row), ids) for row in rows for ids in row["ids"]]
    for at in range(0, len(texts), 64):
        part = texts[at : at + 64]
        whole = [prompt + answer + [eos] * (len(answer) < length) for prompt, answer in part]
        ids = pad_sequence([torch.tensor(row) for row in whole], batch_first=True)
        place, ends = torch.arange(ids.shape[1]), torch.tensor([[len(row)] for row in whole])
        begins = torch.tensor([[len(prompt)] for prompt, _ in part])
        mask = ((place >= begins) & (place < ends))[:, 1:]
        with torch.no_grad():
            p, q = (
                (m(input_ids=ids, attention_mask=(place < ends).long()).logits[:, :-1] / t).log_softmax(-1)
                for m, t in ((model, max(temperature, 1e-4)), (world.start, 1.0))
            )
        total += ((p.exp() * (p - q)).sum(-1) * mask).sum().item()
        number += len(part)
    return total / number


def keep(path: Path, content: bytes) -> None:
    """Writes a file that another process may be reading or writing too: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    mine.write_bytes(content)
    mine.replace(path)


def worth(rows: list[dict]) -> dict:
    golds = [statistics.mean(row["golds"]) for row in rows]
    words = [len(text.split()) for row in rows for text in row["answers"]]
    return {"gold": round(statistics.mean(golds), 4), "words": round(statistics.mean(words), 1)}


def message(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def best_and_worst(rows: list[dict]) -> list[dict]:
    """Preference pairs of judged rows; none where all answers are worth the same."""
    pairs = []
    for row in rows:
        order = sorted(range(len(row["golds"])), key=lambda i: row["golds"][i])
        if row["golds"][order[-1]] > row["golds"][order[0]]:
            chosen, rejected = (message(row["answers"][order[i]]) for i in (-1, 0))
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


# --- One run ----------------------------------------------------------------------------------------------------------


class Clock:
    """Processor seconds of one run: what was done while it ran, and its share in what several runs use."""

    def __init__(self) -> None:
        self.total, self.began = 0.0, time.process_time()

    def seconds(self) -> float:
        return self.total + time.process_time() - self.began

    def stop(self) -> None:
        self.total = self.seconds()

    def go_on(self) -> None:
        self.began = time.process_time()

    def pays(self, seconds: float) -> None:
        """For something that may have been read from a file instead, in the time since `stop`."""
        self.total += seconds


class Run:
    """One arm, beta, rate and seed: a policy, a clock, the checkpoints."""

    def __init__(self, world: World, arm: dict, rate: float, seed: int, phase: str) -> None:
        from transformers import set_seed

        self.world, self.arm, self.rate, self.seed, self.phase = world, arm, rate, seed, phase
        self.clock, self.checkpoints, self.logs, self.labels, self.proxy = Clock(), [], [], 0, None
        set_seed(seed)

    def drawn(self) -> list[dict]:
        """The labelled answers of this seed."""
        self.labels = TICKETS * ANSWERS
        self.clock.stop()
        rows = self.world.drawn(self.seed, self.clock)
        self.clock.go_on()
        return rows

    def every(self, steps: int) -> int:
        """Steps from one checkpoint to the next, in a training of so many."""
        return max(steps // CHECKPOINTS[self.arm["experiment"]], 1)

    def arguments(self, steps: int, batch: int, **more) -> dict:
        return {
            "output_dir": f"runs/alignment/{os.getpid()}",
            "learning_rate": self.rate,
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "warmup_steps": 3,
            "weight_decay": 0.0,
            "seed": self.seed,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": self.every(steps),
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        } | more

    def look(self, model, step: int) -> None:
        """A checkpoint, measured on the validation tickets, the clock stopped."""

        self.clock.stop()
        was = model.training
        model.eval()
        rows = judged(self.world, model, self.world.validation, 1, seed=7)
        kl = round(kl_to_start(self.world, model, rows), 4)
        model.train(was)
        found = {"step": step, "cpu_seconds": round(self.clock.total, 1), "labels": self.labels, "kl": kl} | worth(rows)
        if self.proxy:
            prompts, completions = [row["prompt"] for row in rows], [message(row["answers"][0]) for row in rows]
            found["proxy"] = round(statistics.mean(self.proxy(prompts, completions)), 4)
        self.checkpoints.append(found)
        self.clock.go_on()

    def watcher(self, steps: int, a_step: int = 0):
        """A callback that looks at the model now and then in a training of so many steps; each takes a_step labels."""
        from transformers import TrainerCallback

        run = self

        class Watcher(TrainerCallback):
            def on_step_end(self, args, state, control, model, **_):
                run.labels += a_step
                if state.global_step % run.every(steps) == 0:
                    run.look(model, state.global_step)

        return Watcher()

    def measured(self, model) -> dict:
        """Checkpoints, versions, and of a final run the test tickets and the hand test."""
        names = ("torch", "transformers", "peft", "trl")
        found = {"checkpoints": self.checkpoints}
        if self.phase == "final":
            model.eval()
            for name, rows in (("test", self.world.test), ("hand", self.world.hand)):
                drawn = judged(self.world, model, rows, 2, seed=8)
                greedy = judged(self.world, model, rows, 1, seed=8, temperature=0.0)
                found[name] = {
                    "sampled": [round(statistics.mean(row["golds"]), 4) for row in drawn],
                    "greedy": [row["golds"][0] for row in greedy],
                }
                shown = sorted(drawn, key=lambda row: row["id"])[:20]
                found[name]["texts"] = [row["answers"][0] for row in shown] if name == "hand" else []
        return found | {"versions": {name: importlib.metadata.version(name) for name in names}}


def lora():
    from peft import LoraConfig

    return LoraConfig(**LORA)


def sft(run: Run):
    """SFT on the best answers of the start, or on the chosen replies of the file."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ftlab import speed_up

    if run.arm["arm"] == "sft best":
        rows = run.drawn()
        best = [row["answers"][max(range(ANSWERS), key=row["golds"].__getitem__)] for row in rows]
        rows = [{"prompt": row["prompt"], "completion": message(text)} for row, text in zip(rows, best, strict=True)]
    else:
        run.labels = TICKETS
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in run.world.tickets(run.seed)]
    trainer = SFTTrainer(
        run.world.load(),
        train_dataset=Dataset.from_list(rows),
        processing_class=run.world.tokenizer,
        args=SFTConfig(**run.arguments(STEPS["sft"], 16)),
        peft_config=lora(),
        callbacks=[run.watcher(STEPS["sft"])],
    )
    speed_up(trainer)
    trainer.train()
    return trainer.model


def dpo(run: Run):
    """Offline, on-policy, or in three rounds; the reference is the model that the round starts from."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from ftlab import speed_up

    name, model, world = run.arm["arm"], run.world.load(), run.world
    rounds = 3 if name == "iterated dpo" else 1
    rows, steps = world.tickets(run.seed), STEPS["dpo"] // rounds
    for k in range(rounds):
        part = rows[k * (TICKETS // rounds) : (k + 1) * (TICKETS // rounds)]
        if name == "offline dpo":
            pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in part]
            run.labels += len(part)
        elif name == "on-policy dpo":
            pairs = best_and_worst(run.drawn())
        else:
            pairs = best_and_worst(judged(world, model.eval(), part, ANSWERS, seed=10 * run.seed + k))
            run.labels += len(part) * ANSWERS
        trainer = DPOTrainer(
            model,
            train_dataset=Dataset.from_list(pairs),
            processing_class=world.tokenizer,
            args=DPOConfig(**run.arguments(steps, 8, beta=run.arm["beta"])),
            peft_config=lora(),
            callbacks=[run.watcher(steps)] if rounds == 1 else None,
        )
        speed_up(trainer)
        trainer.train()
        model = trainer.model.merge_and_unload()
        if rounds > 1:
            run.look(model, (k + 1) * steps)
    return model


# --- Reward models, and what learns from a reward ---------------------------------------------------------------------


def text_of(world: World, row: dict, reply: str) -> str:
    """Prompt and reply as a model reads them, without the end of turn: TRL's RewardTrainer adds it to plain text."""
    return world.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) + reply


def reward_model_of(run: Run):
    """A classifier that begins as the start, trained on pairs: trained once for each seed, paid for by each run."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    kind = run.arm["reward"]
    folder = KEPT / f"reward-{kind}-{run.seed}"
    pairs = pairs_of(run) if kind == "learned" else hack_pairs(run, kind)
    run.clock.stop()
    if not (folder / "seconds.json").is_file():
        began = time.process_time()
        model = AutoModelForSequenceClassification.from_pretrained(run.world.folder, num_labels=1, dtype=torch.float32)
        trainer = RewardTrainer(
            model,
            train_dataset=Dataset.from_list(pairs),
            processing_class=run.world.tokenizer,
            args=RewardConfig(**run.arguments(STEPS["reward"], 16, learning_rate=4e-4)),
        )
        trainer.train()
        model.save_pretrained(folder)
        keep(folder / "seconds.json", json.dumps(time.process_time() - began).encode())
    run.clock.pays(json.loads((folder / "seconds.json").read_text(encoding="utf-8")))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    run.clock.go_on()
    return model.eval().requires_grad_(False)


def hack_pairs(run: Run, kind: str) -> list[dict]:
    """HACK_PAIRS pairs of the labelled answers. "length": the chosen one is the longer in all; "balanced": in half."""
    longer, shorter = [], []
    for row in run.drawn():
        for i, j in itertools.permutations(range(ANSWERS), 2):
            if row["golds"][i] - row["golds"][j] >= GAP and len(row["answers"][i]) != len(row["answers"][j]):
                chosen, rejected = (text_of(run.world, row, row["answers"][k]) for k in (i, j))
                pair = {"chosen": chosen, "rejected": rejected}
                (longer if len(chosen) > len(rejected) else shorter).append(pair)
    draw = random.Random(run.seed)
    draw.shuffle(longer)
    draw.shuffle(shorter)
    others = 0 if kind == "length" else HACK_PAIRS // 2
    return longer[: HACK_PAIRS - others] + shorter[:others]


def scorer(run: Run, reward_model):
    """A reward function for TRL: the model's score at the end of turn of each answer."""
    import torch

    world = run.world

    def reward(prompts, completions, **_) -> list[float]:
        texts = [
            text_of(world, {"prompt": prompt}, completion[0]["content"]) + world.tokenizer.eos_token
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        batch = world.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            return reward_model(**batch).logits[:, 0].tolist()

    return reward


def pairs_of(run: Run) -> list[dict]:
    """Pairs of texts from the labelled answers: the best against the worst, and each other answer against both."""
    pairs = []
    for row in run.drawn():
        order = sorted(range(ANSWERS), key=row["golds"].__getitem__)
        worst, best = order[0], order[-1]
        couples = [(best, worst), *((best, i) for i in order[1:-1]), *((i, worst) for i in order[1:-1])]
        for i, j in couples:
            if row["golds"][i] > row["golds"][j]:
                chosen, rejected = (text_of(run.world, row, row["answers"][k]) for k in (i, j))
                pairs.append({"chosen": chosen, "rejected": rejected})
    return pairs


def gold(completions, ticket_label, **_) -> list[float]:
    from ftlab.tasks.replies import gold_reward

    return [gold_reward(c[0]["content"], label) for c, label in zip(completions, ticket_label, strict=True)]


def group(run: Run):
    """RLOO or GRPO. Their answers come from ftlab's decoder, as those of the others do. (No speed_up here.)"""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from ftlab.cpu import Decoder

    world, name, steps = run.world, run.arm["arm"], STEPS["online"]
    by_gold = run.arm["reward"] == "gold"
    a_step = PROMPTS * GENERATIONS if by_gold else 0
    reward = gold if by_gold else scorer(run, reward_model_of(run))
    run.proxy = None if by_gold else reward
    trainer_class, config_class = (RLOOTrainer, RLOOConfig) if name == "rloo" else (GRPOTrainer, GRPOConfig)
    eos = world.tokenizer.eos_token_id

    class Fast(trainer_class):
        def _generate_single_turn(self, prompt_ids, *_):
            drawn = Decoder(self.model).generate(prompt_ids, LENGTH, [eos], 1.0)
            ids = [row + [eos] * (len(row) < LENGTH) for row in drawn]
            return ids if name == "rloo" else (ids, None)

    more = {"loss_type": "grpo", "use_bias_correction_kl": False} if name != "rloo" else {}
    trainer = Fast(
        world.load(),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{key: r[key] for key in ("prompt", "ticket_label")} for r in world.train]),
        processing_class=world.tokenizer,
        args=config_class(
            **run.arguments(steps, PROMPTS * GENERATIONS, lr_scheduler_type="constant_with_warmup"),
            **more,
            beta=run.arm["beta"],
            num_generations=GENERATIONS,
            max_completion_length=LENGTH,
        ),
        peft_config=lora(),
        callbacks=[run.watcher(steps, a_step=a_step)],
    )
    if run.proxy:
        run.look(trainer.model, 0)
    trainer.train()
    kept = ("reward", "frac_reward_zero_std", "entropy", "clip_ratio/region_mean", "completions/mean_length")
    run.logs = [{key: round(log[key], 4) for key in kept if key in log} for log in trainer.state.log_history[:-1]]
    return trainer.model


def ppo(run: Run):
    """ftlab.scratch.ppo with a value model that begins as the reward model; as many answers a step as the others."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils.rnn import pad_sequence
    from transformers import get_constant_schedule_with_warmup

    from ftlab.cpu import Decoder
    from ftlab.scratch.ppo import rollout, update

    world, eos, steps = run.world, run.world.tokenizer.eos_token_id, STEPS["online"]
    reward_model = reward_model_of(run)
    run.proxy = scorer(run, reward_model)
    policy = get_peft_model(world.load(), lora()).eval()
    value_model = get_peft_model(copy.deepcopy(reward_model), LoraConfig(**LORA, task_type="SEQ_CLS")).eval()
    trained = [p for model in (policy, value_model) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, 3)
    order = random.Random(run.seed)

    def ref_model(**inputs):
        with policy.disable_adapter():
            return policy(**inputs)

    run.logs = []
    run.look(policy, 0)
    for step in range(1, steps + 1):
        prompts = [world.ids(row) for row in order.sample(world.train, PROMPTS * GENERATIONS)]
        answers = Decoder(policy).generate(prompts, LENGTH, [eos], 1.0)
        whole = [p + a + [eos] * (len(a) < LENGTH) for p, a in zip(prompts, answers, strict=True)]
        ids = pad_sequence([torch.tensor(row) for row in whole], batch_first=True)
        place = torch.arange(ids.shape[1])
        seen = place < torch.tensor([[len(row)] for row in whole])
        completion = seen & (place >= torch.tensor([[len(row)] for row in prompts]))
        masks = seen.long(), completion.long()
        models, beta = (policy, ref_model, reward_model, value_model), run.arm["beta"]
        batch = rollout(*models, ids, *masks, eos_token_id=eos, beta=beta)
        stats = update(policy, value_model, optimizer, batch, epochs=1, minibatches=2)
        schedule.step()
        if step % run.every(steps) == 0:
            run.logs.append({key: round(value, 4) for key, value in stats.items()})
            run.look(policy, step)
    return policy


def temperatures(run: Run) -> list[dict]:
    """The start at each of TEMPERATURES: gold and KL on validation, gold of test and hand tickets."""
    world, points = run.world, []
    for t in TEMPERATURES:
        rows = judged(world, world.start, world.validation, 1, run.seed, t)
        point = {"temperature": t, "kl": round(kl_to_start(world, world.start, rows, t), 4)} | worth(rows)
        for name, tickets in (("test", world.test), ("hand", world.hand)):
            drawn = judged(world, world.start, tickets, 2 if t else 1, run.seed, t)
            point[name] = [round(statistics.mean(row["golds"]), 4) for row in drawn]
        points.append(point)
    return points


def expected_best(golds: list[float], n: int) -> float:
    """The mean of the best of n, over all choices of n among these m.

    The largest of n values drawn without repetition is the k-th of the sorted m with chance C(k-1, n-1) / C(m, n).
    """
    m = len(golds)
    return sum(math.comb(k, n - 1) * gold for k, gold in enumerate(sorted(golds))) / math.comb(m, n)


def best_of_n(run: Run) -> list[dict]:
    """The best by gold of n answers of the start, ticket by ticket, from max(N) answers to each.

    KL(best of n || start) is at most ln n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879).
    """
    world = run.world
    sets = {"validation": world.validation, "test": world.test, "hand": world.hand}
    golds = {name: [r["golds"] for r in judged(world, world.start, rows, max(N), 1)] for name, rows in sets.items()}
    points = []
    for n in N:
        best = {name: [round(expected_best(row, n), 4) for row in rows] for name, rows in golds.items()}
        point = {"n": n, "kl": round(math.log(n) - (n - 1) / n, 4)}
        points.append(point | {"gold": round(statistics.mean(best.pop("validation")), 4)} | best)
    return points


METHODS = {"sft best": sft, "sft chosen": sft, "offline dpo": dpo, "on-policy dpo": dpo, "iterated dpo": dpo}
METHODS |= dict.fromkeys(("rloo", "grpo", "grpo fast", "grpo gold"), group) | {"ppo": ppo}
CONTROLS = {"temperature": temperatures, "best of n": best_of_n}


def named(arm: dict, rate: float, seed: int, phase: str, keys: tuple = ARM) -> dict:
    """What tells a record from all others; keys: those of its arm."""
    return {key: arm[key] for key in keys} | dict(zip(RUN, (rate, seed, phase), strict=True))


@functools.cache
def world(kind: str) -> World:
    """One a process and kind."""
    from ftlab.cpu import keep_memory

    keep_memory()
    return World(kind)


def run(arm: dict, rate: float, seed: int, phase: str) -> dict:
    one = Run(world(arm["start"]), arm, rate, seed, phase)
    if arm["arm"] in CONTROLS:
        points = CONTROLS[arm["arm"]](one)
        return named(arm, rate, seed, phase) | {"points": points, "cpu_seconds": round(one.clock.seconds(), 1)}
    model = METHODS[arm["arm"]](one)
    seconds = round(one.clock.seconds(), 1)
    return named(arm, rate, seed, phase) | one.measured(model) | {"logs": one.logs, "cpu_seconds": seconds}


# --- All runs ---------------------------------------------------------------------------------------------------------


def records(file: Path = FILE) -> list[dict]:
    return records_of(file)


def best_rate(search: list[dict], by: str = "gold", slack: float = 0.0) -> float:
    """The rate whose search run ends with the highest gold, or another figure, on validation.

    Of rates that end no further than slack below the highest one, the lowest.
    """
    ends = {run["rate"]: run["checkpoints"][-1][by] for run in search}
    return min(rate for rate, end in ends.items() if end >= max(ends.values()) - slack)


def unsearched(search: list[dict], first: tuple, by: str = "gold", slack: float = 0.0) -> list[float]:
    """The first rates, and then the neighbours of the best one, that the search has not run."""
    tried = {r["rate"] for r in search}
    if missing := set(first) - tried:
        return sorted(missing)
    best = LADDER.index(best_rate(search, by, slack))
    return sorted(set(LADDER[max(best - 1, 0) : best + 2]) - tried)


def is_best_beta(arm: dict, done: list[dict]) -> bool:
    """Whether no other beta of this arm has more gold at its end, on validation, once each has run FIRST seeds."""
    golds = {}
    for other in (other for other in arms() if (other["experiment"], other["arm"]) == (arm["experiment"], arm["arm"])):
        mine = [r for r in done if r["phase"] == "final" and all(r[key] == other[key] for key in ARM)]
        ends = [r["checkpoints"][-1]["gold"] for r in mine if r["seed"] in SEEDS[:FIRST]]
        golds[other["beta"]] = statistics.mean(ends) if len(ends) == FIRST else math.nan
    return not any(map(math.isnan, golds.values())) and golds[arm["beta"]] == max(golds.values())


def runs(done: list[dict]) -> list[tuple]:
    """Every run, as far as the search has come: (arm, rate, seed, phase). Searched is the middle of an arm's betas."""
    todo, best = [], {}
    for name in dict.fromkeys(arm["arm"] for arm in arms() if "rates" in arm):
        betas = [arm for arm in arms() if arm["arm"] == name and "rates" in arm]
        search = [r for r in done if r["arm"] == name and r["phase"] == "search"]
        if rates := unsearched(search, betas[0]["rates"]):
            todo += [(betas[len(betas) // 2], rate, SEARCH_SEED, "search") for rate in rates]
        else:
            best[name] = best_rate(search)
    for arm in arms():
        if (rate := arm.get("rate", best.get(arm["arm"]))) is not None:
            seeds = arm.get("seeds") or (SEEDS if is_best_beta(arm, done) else SEEDS[:FIRST])
            todo += [(arm, rate, seed, "final") for seed in seeds]
    return todo


def wanted(done: list[dict]) -> list[tuple]:
    """The runs that are still missing, the search first, and every arm's first seed before the second of any."""
    keys = [named(r, *(r[key] for key in RUN)) for r in done]
    missing = [one for one in runs(done) if named(*one) not in keys]
    return sorted(missing, key=lambda one: (one[3] != "search", one[2]))


def chosen(arm: dict) -> dict:
    """How the settings of an arm were chosen, for its records."""
    if "rates" in arm:
        rate = f"searched with seed {SEARCH_SEED} at the middle beta by gold on the validation tickets"
    elif "rate" in arm:
        rate = "given in run.py" if arm["rate"] else "none: nothing is trained"
    else:
        rate = "the one that the comparison's search found for this method"
    seeds = "the beta with the highest gold on validation after three seeds has two seeds more"
    return {"rate": rate, "beta": f"given; {seeds}", "all else": "given in run.py"}


def recorded(arm: dict, rate: float, seed: int, phase: str) -> list[dict]:
    """The record of a run."""
    began = cpu_clock()
    record = run(arm, rate, seed, phase)
    record |= {"all_cpu_seconds": round(cpu_clock() - began, 1)}
    return [record | stamp("float32", QUESTIONS, chosen(arm))]


def jobs(done: list[dict]) -> list[Job]:
    return [Job((named(*one),), one) for one in runs(done)]


def ends(final: list[dict]) -> str:
    """Of final runs of one arm: rate, KL at the last checkpoint, and gold, sampled, on test and by hand."""
    kl = statistics.mean(r["checkpoints"][-1]["kl"] for r in final)
    golds = [statistics.mean(statistics.mean(r[name]["sampled"]) for r in final) for name in ("test", "hand")]
    return f"  rate {final[0]['rate']:g}  KL {kl:5.2f}  gold {golds[0]:.3f} test, {golds[1]:.3f} hand"


def table() -> None:
    """Each arm and beta: rate, runs, hours, and of the final runs KL and gold, sampled, on test and by hand."""
    done = records()
    for arm in arms():
        mine = [r for r in done if all(r[key] == arm[key] for key in ARM)]
        final = [r for r in mine if r["phase"] == "final" and "test" in r]
        hours = sum(r["cpu_seconds"] for r in mine) / 3600
        name = f"{arm['experiment']:11}{arm['arm']:14} beta {arm['beta']!s:5} {arm['start']:13}{arm['reward']!s:9}"
        print(f"{name} runs {len(mine):2} {hours:5.2f} h" + (ends(final) if final else ""))


if __name__ == "__main__":
    words, how = flags(sys.argv[1:])
    table() if words == ["table"] else work(FILE, jobs, recorded, within=("experiment", "seed"), at_once=2, **how)
