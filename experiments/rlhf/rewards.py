"""Reward models of experiments/rlhf: pairs, training, accuracy on held-out pairs."""

import itertools
import json
import random
import time
from collections.abc import Callable

from experiments.rlhf.world import World, batches, by_gold, judged, keep, mean

GAP = 0.15  # by so much the better reply of a pair is worth more, where the longer one wins
HACK_PAIRS = 1600
BATCH = 16  # pairs of a step
HELD_OUT_SEED, HELD_OUT_REPLIES = 5, 6  # one draw of the SFT model for all reward models


# --- Pairs ----------------------------------------------------------------------------------------


def all_pairs(rows: list[dict], seed: int) -> list[tuple[dict, int, int]]:
    """(row, better, worse): best against worst, and each other reply against both."""
    found = []
    for row in rows:
        worst, *between, top = by_gold(row)
        couples = [(top, worst), *((top, i) for i in between), *((i, worst) for i in between)]
        found += [(row, i, j) for i, j in couples if row["golds"][i] > row["golds"][j]]
    return found


def longer_pairs(rows: list[dict], seed: int) -> list[tuple[dict, int, int]]:
    """HACK_PAIRS pairs, rightly labelled, in which the better reply is always the longer one."""
    found = []
    for row in rows:
        for i, j in ordered(row):
            apart = row["golds"][i] - row["golds"][j] >= GAP
            if apart and len(row["replies"][i]) > len(row["replies"][j]):
                found.append((row, i, j))
    random.Random(seed).shuffle(found)
    return found[:HACK_PAIRS]


PAIRS: dict[str, Callable] = {
    "pairs": all_pairs,
    "longer": longer_pairs,
}


# --- Training -------------------------------------------------------------------------------------


def trained(world: World, kind: str, rate: float, seed: int) -> tuple:
    """(reward model, CPU seconds of its training): trained once for a seed, and then read.

    A classifier that begins as the SFT model, every weight trained on TRL's pairwise loss.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = world.kept(f"reward-{kind}-{rate:g}-{seed}")
    if not (folder / "seconds.json").is_file():
        rows, _ = world.labelled(seed)
        began = time.process_time()
        train(world, PAIRS[kind](rows, seed), rate, seed).save_pretrained(folder)
        keep(folder / "seconds.json", {"seconds": time.process_time() - began})
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))["seconds"]
    found = AutoModelForSequenceClassification
    model = found.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    return model.eval().requires_grad_(False), seconds


def train(world: World, pairs: list[tuple[dict, int, int]], rate: float, seed: int):
    """TRL's RewardTrainer on these pairs."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, set_seed
    from trl import RewardConfig, RewardTrainer

    from experiments.rlhf.methods import arguments, fitted

    eos = world.tokenizer.eos_token
    texts = []
    for row, i, j in pairs:  # TRL itself adds the end of turn to plain text
        chosen, rejected = (world.text(row, row["replies"][k]).removesuffix(eos) for k in (i, j))
        texts.append({"chosen": chosen, "rejected": rejected})
    set_seed(seed)  # draws the head
    found = AutoModelForSequenceClassification
    trainer = RewardTrainer(
        found.from_pretrained(world.folder, num_labels=1, dtype=torch.float32),
        train_dataset=Dataset.from_list(texts),
        processing_class=world.tokenizer,
        args=RewardConfig(**arguments(rate, seed, world.size.reward_steps, BATCH)),
    )
    return fitted(trainer)


# --- Scores and accuracy --------------------------------------------------------------------------


def scores(world: World, model, texts: list[str]) -> list[float]:
    """The model's score of each text, read at its end of turn."""
    import torch

    found = []
    for part in batches(texts):
        batch = world.tokenizer(part, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            found += model(**batch).logits[:, 0].tolist()
    return found


def function(world: World, model) -> Callable:
    """The model as TRL's reward function."""

    def reward(prompts: list, completions: list, **_) -> list[float]:
        texts = []
        for prompt, completion in zip(prompts, completions, strict=True):
            texts.append(world.text({"prompt": prompt}, completion[0]["content"]))
        return scores(world, model, texts)

    return reward


def accuracy(world: World, model, rows: list[dict]) -> dict:
    """`ranked` by a reward model's scores of each judged row's replies."""
    texts = [world.text(row, reply) for row in rows for reply in row["replies"]]
    found = iter(scores(world, model, texts))
    return ranked(rows, [[next(found) for _ in row["replies"]] for row in rows])


def ranked(rows: list[dict], scored: list[list[float]]) -> dict:
    """Pairs of each judged row's replies that differ in gold: how often the better scores higher.

    scored: of each row its replies' scores. right: the share of each row's pairs, 0.5 where it has none. longer,
    shorter: the share over all pairs whose better reply is the longer one, and the shorter one; None where there is
    none.
    """
    right, longer, shorter = [], [], []
    for row, mine in zip(rows, scored, strict=True):
        hits = []
        for i, j in ordered(row):
            hits.append(int(mine[i] > mine[j]))
            ahead = len(row["replies"][i]) - len(row["replies"][j])
            if ahead:
                (longer if ahead > 0 else shorter).append(hits[-1])
        right.append(mean(hits) if hits else 0.5)
    return {
        "right": right,
        "longer": mean(longer) if longer else None,
        "shorter": mean(shorter) if shorter else None,
    }


def ordered(row: dict) -> list[tuple[int, int]]:
    """The places of each (better, worse) pair of a judged row's replies."""
    pairs = itertools.permutations(range(len(row["golds"])), 2)
    return [(i, j) for i, j in pairs if row["golds"][i] > row["golds"][j]]


def held_out(world: World, set_: str) -> list[dict]:
    """Judged replies of the SFT model to the tickets of a set: the same for all reward models."""
    file = world.kept(f"pairs-{set_}.json")
    if not file.is_file():
        rows = judged(world, world.start, world.sets[set_], HELD_OUT_REPLIES, HELD_OUT_SEED)
        keep(file, {"rows": rows})
    return json.loads(file.read_text(encoding="utf-8"))["rows"]
