"""The models of experiments/rewards: what all arms begin with, the teachers, and what they answer.

They are made once, into runs/rewards, and read from there by every run; whoever deletes the folder
has them made again (20 minutes of one core).
"""

import copy
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments import sft
from experiments.alignment.run import kl_to_start, message, module
from experiments.ask_rows.run import rows_of
from ftlab.paths import DATA
from ftlab.tasks import ask

LENGTH = 80  # tokens of an answer
REHEARSED = 1250  # rows of what `micro` can do, beside the 3,750 of the clean log
RATE, BATCH = 1e-3, 16  # of the start and the larger teacher: those of data/ask_start
ENOUGH = 0.3  # share right on validation, sampled, of the start
LARGER = 8  # layers; `micro` has 4
TEACHER_RATE = 1.5e-3  # of the 135M: that of data/ask_adapter
TEACHER_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
OLD = ("number", "word", "text", "code", "ends", "compare", "find_number", "talk")
TOGETHER = 200  # prompts that are answered at once


@dataclass
class Size:
    """How much is trained and asked; `run.py try` shrinks it, so that each arm runs in seconds."""

    folder: Path = Path("runs/rewards")
    questions: int | None = None  # of each held-out set; None is all
    old_each: int = 25  # new exercises of each kind of OLD: 200 in all
    passes: tuple = (2, 3)  # over the rows of the start
    larger_passes: float = 2  # over those of the larger teacher, which are twice as many
    teacher_rows: int = 1500  # of the 135M
    taught: int = 1200  # its answers
    ring: int = 200  # questions of each set of the ring
    ring_start_seconds: float = 110


SIZE = Size()


def micro():
    """`micro` in fp32."""
    from ftlab import model_path

    return loaded(Path(model_path("micro")))


def loaded(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@cache
def tokenizer():
    from transformers import AutoTokenizer

    from ftlab import model_path

    return AutoTokenizer.from_pretrained(model_path("micro"))


# --- Rows -----------------------------------------------------------------------------------------


def clean_log() -> list[dict]:
    """The first half of the training questions with their gold queries: {prompt, completion}."""
    return module(DATA / "ask_start" / "make.py").log(0, 0)


def prompts() -> list[dict]:
    """The other half: {prompt, gold, completion}, of which an arm reads what it is to know."""
    lines = (DATA / "ask_start" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row | {"completion": message(row["gold"])} for row in rows]


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def asked(name: str) -> list[dict]:
    """Rows of a file of data/ask: {prompt, gold}."""
    rows = rows_of(name)[: SIZE.questions]
    return [{"prompt": row["prompt"], "gold": row["completion"][0]["content"]} for row in rows]


@cache
def exercises():
    """The script that made `micro`, and with it the exercises that `micro` was trained on."""
    script = module(DATA / "micro" / "make.py")
    return script, script.read_corpus()


def rehearsal() -> list[dict]:
    """What `micro` could do before it saw a query: single turns, drawn as its own training was."""
    script, corpus = exercises()
    chats = script.Chats(corpus, "rehearsal")
    return [turn(*chats.turn()) for _ in range(REHEARSED)]


@cache
def old_tasks() -> list[dict]:
    """New exercises of each kind of OLD, none in the rehearsal: {prompt, completion, kind}."""
    script, corpus = exercises()
    chats = script.Chats(corpus, "held out")
    seen = {row["prompt"][0]["content"] for row in rehearsal()}
    found = []
    for kind in OLD:
        rows = []
        while len(rows) < SIZE.old_each:
            row = turn(*getattr(chats, kind)()) | {"kind": kind}
            if kind == "talk" or row["prompt"][0]["content"] not in seen:
                rows.append(row)
        found += rows
    return found


def turn(question: str, answer: str) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "completion": message(answer)}


# --- The start, and the teachers ------------------------------------------------------------------


def kept(name: str, make: Callable) -> tuple[Path, float]:
    """(folder of a model, CPU seconds that it took to make): made by make() at the first call."""
    folder, beside = SIZE.folder / name, SIZE.folder / f"{name}.json"
    if not beside.is_file():
        began = time.process_time()
        model = make()
        seconds = round(time.process_time() - began, 1)
        model.save_pretrained(folder)
        write(beside, {"seconds": seconds})
    return folder, json.loads(beside.read_text(encoding="utf-8"))["seconds"]


def digest(name: str) -> str:
    """The first 12 letters of the SHA-256 of a kept model's weights."""
    weights = (SIZE.folder / name / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()[:12]


def write(path: Path, content: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    mine.write_text(json.dumps(content), encoding="utf-8")
    mine.replace(path)


def fine_tuned(model, rows: list[dict], passes: float):
    """The model after SFT of all its weights, as data/ask_start was made."""
    trainer = sft.trainer_of(
        model,
        tokenizer(),
        rows,
        rate=RATE,
        seed=42,
        lora={},
        num_train_epochs=passes,
        per_device_train_batch_size=BATCH,
    )
    trainer.train()
    return trainer.model


def start_folder() -> tuple[Path, float]:
    """(folder, seconds) of the start of all arms: `micro` after the clean log and the rehearsal.

    It has the first number of passes after which ENOUGH of its answers are right on validation, or
    the last number: a check that hardly ever pays teaches nothing.
    """
    rows = shuffled(clean_log() + rehearsal(), 1)

    def make():
        for passes in SIZE.passes:
            model = fine_tuned(micro(), rows, passes)
            if sampled_right(model.eval()) >= ENOUGH:
                break
        return model

    return kept("start", make)


def larger_folder() -> tuple[Path, float]:
    """(folder, seconds) of the larger teacher with micro's tokenizer.

    It has learned the gold queries of both halves: those of the prompts too, which the check of
    GRPO and of rejection sampling knows, and which more SFT reads.
    """

    def make():
        gold = [{key: row[key] for key in ("prompt", "completion")} for row in prompts()]
        rows = shuffled(clean_log() + gold, 1)
        return fine_tuned(deepened(micro(), LARGER), rows, SIZE.larger_passes)

    return kept("larger", make)


def deepened(model, layers: int):
    """A Llama of so many layers that computes what this one does, until it is trained.

    Each layer is followed by copies of itself whose two outputs are 0, so that they add nothing
    (block expansion, LLaMA Pro, arXiv:2401.02415). Raises ValueError if layers isn't a multiple of
    the model's own number.
    """
    import torch
    from torch import nn

    before = model.config.num_hidden_layers
    if layers % before:
        raise ValueError(
            f"got layers={layers}, want a multiple of {before}, the model's own number"
        )
    found, blocks = copy.deepcopy(model), []
    for layer in found.model.layers:
        blocks.append(layer)
        for _ in range(layers // before - 1):
            twin = copy.deepcopy(layer)
            with torch.no_grad():
                twin.self_attn.o_proj.weight.zero_()
                twin.mlp.down_proj.weight.zero_()
            blocks.append(twin)
    for at, block in enumerate(blocks):
        block.self_attn.layer_idx = at  # where its keys and values lie in the cache
    found.model.layers = nn.ModuleList(blocks)
    found.config.num_hidden_layers = layers
    if getattr(found.config, "layer_types", None):
        found.config.layer_types = [found.config.layer_types[0]] * layers
    return found


def teacher_135m() -> tuple:
    """(model, tokenizer, CPU seconds): SmolLM2 after SFT on rows of the clean log, once.

    It has seen no gold query that the start hasn't. It is no arm, so it may have `speed_up`.
    """
    from peft import PeftModel

    from experiments.ask.run import base

    def make():
        model, its_tokenizer = base()
        trainer = sft.trainer_of(
            model,
            its_tokenizer,
            shuffled(clean_log(), 2)[: SIZE.teacher_rows],
            rate=TEACHER_RATE,
            seed=0,
            lora=TEACHER_LORA,
            per_device_train_batch_size=4,
        )
        sft.sped_up(trainer)
        trainer.train()
        return trainer.model

    folder, seconds = kept("135M", make)
    model, its_tokenizer = base()
    return PeftModel.from_pretrained(model, folder).eval(), its_tokenizer, seconds


def teacher_answers() -> dict:
    """The 135M's greedy answers to some prompts, the same for all seeds: {rows, seconds, right}.

    rows: {prompt, completion}; seconds: of CPU, for the answers alone; right: their share that is
    right, which no arm reads.
    """
    from ftlab import answers

    path = SIZE.folder / "answers-135M.json"
    if not path.is_file():
        model, its_tokenizer, _ = teacher_135m()
        rows = shuffled(prompts(), 3)[: SIZE.taught]
        began = time.process_time()
        said = answers(model, its_tokenizer, [row["prompt"] for row in rows], LENGTH)
        seconds = round(time.process_time() - began, 1)
        found = []
        for row, text in zip(rows, said, strict=True):
            found.append({"prompt": row["prompt"], "completion": message(text)})
        good = sum(right(text, row["gold"]) for row, text in zip(rows, said, strict=True))
        write(path, {"rows": found, "seconds": seconds, "right": good / len(rows)})
    return json.loads(path.read_text(encoding="utf-8"))


# --- Answers --------------------------------------------------------------------------------------


def right(answer: str, gold: str) -> int:
    """1 if the query returns the gold query's rows on all ten tables."""
    return int(ask.is_right(answer, gold))


def prompt_ids(row: dict) -> list[int]:
    chat = row["prompt"]
    return tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def drawn(
    model, rows: Sequence[dict], n: int, seed: int, temperature: float = 1.0, length: int = LENGTH
) -> list[dict]:
    """The rows with n answers each: `ids` without the end of turn, and `texts`."""
    import torch

    from ftlab.cpu import Decoder

    decoder, eos = Decoder(model), tokenizer().eos_token_id
    generator = torch.Generator().manual_seed(seed)
    asked_ids = [prompt_ids(row) for row in rows for _ in range(n)]
    ids = []
    for at in range(0, len(asked_ids), TOGETHER):
        part = asked_ids[at : at + TOGETHER]
        ids += decoder.generate(part, length, [eos], temperature, generator)
    texts = tokenizer().batch_decode(ids, skip_special_tokens=True)
    found = []
    for i, row in enumerate(rows):
        mine = slice(i * n, (i + 1) * n)
        found.append(row | {"ids": ids[mine], "texts": texts[mine]})
    return found


def sampled_right(model, seed: int = 7) -> float:
    """The share right of two answers to each validation question, at temperature 1."""
    rows = drawn(model, asked("validation"), 2, seed)
    good = [right(text, row["gold"]) for row in rows for text in row["texts"]]
    return sum(good) / len(good)


class World:
    """What every run of a process shares: tokenizer and start. `kl_to_start` reads it too."""

    def __init__(self, folder: Path) -> None:
        from ftlab.cpu import keep_memory

        keep_memory()
        self.folder, self.tokenizer = folder, tokenizer()
        self.start = loaded(folder).eval().requires_grad_(False)

    def load(self):
        return loaded(self.folder)

    def ids(self, row: dict) -> list[int]:
        return prompt_ids(row)

    def drawn(self, *what, **how) -> list[dict]:
        """The same as `drawn` of this file."""
        return drawn(*what, **how)

    def kl(self, model, drawn: list[dict]) -> float:
        """KL to the start in nats an answer, of the first answer of each row."""
        first = [row | {"ids": row["ids"][:1]} for row in drawn]
        return kl_to_start(self, model, first, length=LENGTH)

    def old_right(self, model) -> list[int]:
        """1 for each exercise of `old_tasks` whose greedy answer is the wanted one."""
        rows = old_tasks()
        drawn = self.drawn(model, rows, 1, seed=0, temperature=0.0)
        wanted = [row["completion"][0]["content"] for row in rows]
        said = [row["texts"][0].strip() for row in drawn]
        return [int(a == b) for a, b in zip(said, wanted, strict=True)]


@cache
def world() -> World:
    return World(start_folder()[0])
