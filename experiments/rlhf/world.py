"""What all arms of experiments/rlhf share: tickets, the SFT model, judged replies, distance, clock.

Every reply that is sampled here, in training or in measuring, comes from `ftlab.llama.Decoder`, in
all arms alike. What trains is TRL's own code.
"""

import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments.runs import boot
from ftlab.paths import DATA

KEPT = Path("runs/rlhf")  # what several runs of a seed use; it can be deleted
CONTEXT = 512  # tokens, of micro
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TOGETHER = 64  # replies that are sampled or read at once


@dataclass(frozen=True)
class Size:
    """How much of everything: FULL is the experiment, TINY runs each path once."""

    name: str = "full"
    tickets: int = 400  # whose replies are labelled before the training
    replies: int = 6  # to each of them
    steps: int = 60  # of every arm; a step of PPO and GRPO has prompts x group replies
    steps_uncapped: int = 40  # of the runs without a cap, whose replies may be long
    reward_steps: int = 100
    prompts: int = 4
    group: int = 8
    length: int = 96  # tokens of a reply, at most; the runs without a cap have the context's rest
    draws: int = 4  # replies to each held-out ticket at the end
    held_out: int | None = None  # tickets of each held-out set; None: all
    start_rows: int = 450  # of the log, for the SFT model of the 135M
    few: int = 60  # tickets that the 135M is labelled on, and asked of each held-out set


FULL = Size()
TINY = Size(
    "tiny",
    tickets=8,
    steps=3,
    steps_uncapped=3,
    reward_steps=3,
    prompts=2,
    group=4,
    length=64,
    draws=1,
    held_out=4,
    start_rows=40,
    few=8,
)


# --- Tickets --------------------------------------------------------------------------------------


def read(name: str) -> list[dict]:
    """The rows of data/replies/NAME.jsonl."""
    lines = (DATA / "replies" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tickets(size: Size) -> dict[str, list[dict]]:
    """{set: rows with prompt, chosen, rejected, ticket_label, id}.

    "train": the rows of train.jsonl whose skeletons the log has too; "validation": the others,
    which nothing trains on; "test" and "hand" as they are, or a prefix of `size.held_out`.
    """
    from ftlab.tasks.replies import as_pair

    seen = {row["skeleton"] for row in read("log")}
    found: dict[str, list[dict]] = {"train": [], "validation": []}
    for row in read("train"):
        found["train" if row["skeleton"] in seen else "validation"].append(as_pair(row))
    found["validation"] = found["validation"][: size.held_out]
    for set_, file in (("test", "test"), ("hand", "hand_test")):
        rows = [as_pair(row) | {"id": row["id"]} for row in read(file)]
        found[set_] = rows[: size.held_out]
    return found


# --- The model that all arms begin from -----------------------------------------------------------


class World:
    """The SFT model ("micro" or "135M"), its tokenizer, tickets, and what runs of a seed share."""

    def __init__(self, model: str, size: Size) -> None:
        import torch
        from transformers import AutoTokenizer

        torch.set_num_threads(1)
        self.model, self.size = model, size
        self.folder = DATA / "replies_start" if model == "micro" else self.kept("start-135M")
        if model != "micro" and not (self.folder / "model.safetensors").is_file():
            from experiments.rlhf.methods import train_start

            train_start(self.folder, size)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.sets = tickets(size)
        if model != "micro":
            for set_ in ("validation", "test", "hand"):
                self.sets[set_] = self.sets[set_][: size.few]
        self.start = self.load().eval().requires_grad_(False)

    def load(self):
        """The SFT model anew, in fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def kept(self, name: str) -> Path:
        """Where runs of one start of the machine keep what they share."""
        return KEPT / boot() / f"{self.size.name}-{name}"

    def ids(self, row: dict) -> list[int]:
        """The prompt's tokens."""
        template = self.tokenizer.apply_chat_template
        return template(row["prompt"], add_generation_prompt=True, return_dict=False)

    def text(self, row: dict, reply: str) -> str:
        """Prompt, reply and end of turn, as a reward model reads them."""
        template = self.tokenizer.apply_chat_template
        prompt = template(row["prompt"], add_generation_prompt=True, tokenize=False)
        return prompt + reply + self.tokenizer.eos_token

    @property
    def room(self) -> int:
        """Tokens that the context leaves behind the longest prompt: no reply is cut before."""
        rows = [row for set_ in self.sets.values() for row in set_]
        return CONTEXT - max(len(self.ids(row)) for row in rows)

    def labelled(self, seed: int) -> tuple[list[dict], float]:
        """(`judged` replies of the SFT model to this seed's tickets, CPU seconds that they took).

        Drawn once for a seed; each run that uses them pays for them.
        """
        number = self.size.tickets if self.model == "micro" else self.size.few
        file = self.kept(f"{self.model}-labelled-{seed}.json")
        if not file.is_file():
            began = time.process_time()
            rows = random.Random(seed).sample(self.sets["train"], number)
            rows = judged(self, self.start, rows, self.size.replies, seed)
            keep(file, {"rows": rows, "seconds": time.process_time() - began})
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["rows"], found["seconds"]


@cache
def world(model: str, size: Size) -> World:
    """One a process."""
    from ftlab.cpu import keep_memory

    keep_memory()
    return World(model, size)


def keep(file: Path, what: dict) -> None:
    """Writes a file that another process may be reading: whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = file.with_name(f"{file.name}.{os.getpid()}")
    mine.write_text(json.dumps(what), encoding="utf-8")
    mine.replace(file)


# --- Replies --------------------------------------------------------------------------------------


def judged(
    world: World,
    model,
    rows: list[dict],
    n: int,
    seed: int,
    temperature: float = 1.0,
    length: int | None = None,
) -> list[dict]:
    """The rows with n replies each: `replies`, their `ids`, what they are worth (`golds`), `cut`.

    cut: 1 where a reply reached `length` tokens without an end of turn.
    """
    import torch

    from ftlab.llama import Decoder

    length = length or world.size.length
    decoder, generator = Decoder(model), torch.Generator().manual_seed(seed)
    prompts = [world.ids(row) for row in rows for _ in range(n)]
    ids = []
    for part in batches(prompts):
        ids += decoder.generate(part, length, world.tokenizer.eos_token_id, temperature, generator)
    texts = world.tokenizer.batch_decode(ids, skip_special_tokens=True)
    found = []
    for i, row in enumerate(rows):
        mine = slice(i * n, (i + 1) * n)
        more = {"replies": texts[mine], "ids": ids[mine]}
        more["golds"] = [gold(text, row) for text in texts[mine]]
        more["cut"] = [int(len(tokens) >= length) for tokens in ids[mine]]
        found.append(row | more)
    return found


def gold(reply: str, row: dict) -> float:
    """What a reply is worth by the rules, 0 to 1."""
    from ftlab.tasks.replies import gold_reward

    return gold_reward(reply, row["ticket_label"])


def without_the_torn_end(reply: str, row: dict) -> float:
    """The gold of a reply, or of the same without its last sentence where that one has no end.

    The higher of the two: a reply that was cut is read as kindly as can be.
    """
    from ftlab.tasks.replies import sentences

    whole = sentences(reply.strip())
    if reply.rstrip().endswith((".", "!", "?")) or len(whole) < 2:
        return gold(reply, row)
    return max(gold(reply, row), gold(" ".join(whole[:-1]), row))


def batches(rows: list) -> Iterator[list]:
    """TOGETHER of them at a time."""
    for first in range(0, len(rows), TOGETHER):
        yield rows[first : first + TOGETHER]


def message(text: str) -> list[dict]:
    """The text as a turn of the assistant."""
    return [{"role": "assistant", "content": text}]


def by_gold(row: dict) -> list[int]:
    """The places of a judged row's replies, the worst first; of equals the earlier first."""
    return sorted(range(len(row["golds"])), key=row["golds"].__getitem__)


# --- Distance from the SFT model ------------------------------------------------------------------


def distance(world: World, model, rows: list[dict], length: int | None = None) -> float:
    """KL(policy || SFT model) in nats per answer, over `judged` replies sampled at temperature 1.

    sum_t sum_v p(v | x, y_<t) (log p(v | x, y_<t) - log q(v | x, y_<t)): at each position of a
    sampled reply the exact KL over the vocabulary, summed over positions, the end of turn among
    them, mean over replies. It has the expectation of k1, the mean of log p(y) - log q(y), and less
    noise.
    """
    length = length or world.size.length
    pairs = [(world.ids(row), ids) for row in rows for ids in row["ids"]]
    total = 0.0
    for part in batches(pairs):
        total += _summed(world, model, part, length)
    return total / len(pairs)


def _summed(world: World, model, pairs: list[tuple[list[int], list[int]]], length: int) -> float:
    """The KL of (prompt, reply) pairs, summed over positions and pairs."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    eos = world.tokenizer.eos_token_id
    whole = [prompt + ids + [eos] * (len(ids) < length) for prompt, ids in pairs]
    ids = pad_sequence([torch.tensor(row) for row in whole], batch_first=True)  # (B, T)
    place = torch.arange(ids.shape[1])
    ends = torch.tensor([[len(row)] for row in whole])
    begins = torch.tensor([[len(prompt)] for prompt, _ in pairs])
    mask = ((place >= begins) & (place < ends))[:, 1:]  # (B, T-1)
    logps = []
    with torch.inference_mode():
        for one in (model, world.start):
            out = one(input_ids=ids, attention_mask=(place < ends).long()).logits[:, :-1]
            logps.append(out[mask].log_softmax(-1))  # (N, V), N positions of replies
    p, q = logps
    return (p.exp() * (p - q)).sum().item()


# --- Seconds --------------------------------------------------------------------------------------


class Clock:
    """CPU seconds of one run: those in which it ran, and those of what several runs share."""

    def __init__(self) -> None:
        self.spent, self.began = 0.0, time.process_time()

    def stop(self) -> float:
        """Seconds so far; what comes now is not counted until `go_on`."""
        self.spent += time.process_time() - self.began
        return self.spent

    def go_on(self) -> None:
        self.began = time.process_time()

    def pay(self, seconds: float) -> None:
        """For something that was read from a file, or made while the clock stood."""
        self.spent += seconds


def mean(values: list) -> float:
    return round(statistics.mean(values), 4)
