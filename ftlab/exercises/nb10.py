"""Notebook 10: your own data, split and scored."""

import random
from collections import Counter
from random import Random

from ftlab.exercises import training
from ftlab.exercises.core import Exercise, Slip, shown
from ftlab.exercises.differences import first_difference
from ftlab.exercises.learner import nodes_of

CHECKSUMS = {"crc32", "adler32", "md5", "sha1", "sha256", "blake2b"}

# --- 10.1: a split by group -------------------------------------------------------------------------------------------


def my_split(rows):
    from zlib import crc32

    held_out = {group for group in {row["group"] for row in rows} if crc32(group.encode()) % 5 == 0}
    return [row for row in rows if row["group"] not in held_out], [row for row in rows if row["group"] in held_out]


def _by_row(rows):
    rows = Random(0).sample(rows, len(rows))
    return rows[len(rows) // 5 :], rows[: len(rows) // 5]


def _unseeded(rows):
    groups = {row["group"] for row in rows}
    held_out = set(Random().sample(sorted(groups), len(groups) // 5))
    return [row for row in rows if row["group"] not in held_out], [row for row in rows if row["group"] in held_out]


def _half(rows):
    held_out = set(Random(0).sample(groups := sorted({row["group"] for row in rows}), len(groups) // 2))
    return [row for row in rows if row["group"] not in held_out], [row for row in rows if row["group"] in held_out]


def _by_hash(rows):
    return [row for row in rows if hash(row["group"]) % 5], [row for row in rows if not hash(row["group"]) % 5]


def _unsorted(rows):
    groups = list({row["group"] for row in rows})
    Random(0).shuffle(groups)
    held_out = set(groups[: len(groups) // 5])
    return [row for row in rows if row["group"] not in held_out], [row for row in rows if row["group"] in held_out]


def _one_of_each(rows):
    train, test = my_split(rows)
    return list({row["group"]: row for row in train}.values()), list({row["group"]: row for row in test}.values())


SPLITS = {
    "a group is on both sides: draw groups, not rows": _by_row,
    "nothing is held out": lambda rows: (rows, []),
    "two calls give two splits: seed a generator of your own": _unseeded,
    "about a fifth of the rows is to be held out": _half,
    "hash() of a string changes each time Python starts": _by_hash,
    "so does the order of a set: sort the groups": _unsorted,
    "rows are lost": _one_of_each,
    "the sides are swapped: train comes first": lambda rows: my_split(rows)[::-1],
    "a test row is in train too": lambda rows: (rows, my_split(rows)[1]),
}


class _Name(str):
    """A group's name. Its hash changes with `start`, as that of a string does each time Python starts."""

    start = 0

    def __hash__(self) -> int:
        return hash((_Name.start, str.__hash__(self)))

    def __str__(self) -> str:
        return self


def _goes_by_hashes(mine, rows: list[dict], test: list[dict]) -> bool:
    """Does the split of the rows, with this test side, change when the hashes of the groups' names do?"""
    renamed = [row | {"group": _Name(row["group"])} for row in rows]
    try:
        pair = mine(list(renamed))
        _Name.start += 1
        changed = mine(list(renamed)) != pair
        if changed or all(pair):
            return changed
    except KeyError:
        pass
    # numpy has made plain strings of the names, which no _Name equals in a set: take other strings in the same order
    if any(getattr(node, "attr", getattr(node, "id", "")) in CHECKSUMS for node in nodes_of(mine)):
        return False  # it would be another one
    other = mine([row | {"group": "a " + row["group"]} for row in rows])[1]
    return [row["text"] for row in other] != [row["text"] for row in test]


def _split_slip(mine) -> Slip | None:
    keys = ("both", "nothing", "seed", "fifth", "hash", "set", "lost", "swapped", "too")
    words, rng, shares = dict(zip(keys, SPLITS, strict=True)), Random(), []
    for _ in range(20):
        names = [f"skeleton-{rng.randrange(10**6)}" for _ in range(100)]
        rows = [{"group": name, "text": f"{name} {i}"} for name in names for i in range(rng.randint(1, 6))]
        rng.shuffle(rows)
        pair = mine(list(rows))
        two = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(side, list) for side in pair)
        if not (two and all(isinstance(row, dict) for side in pair for row in side)):
            return Slip(shown(pair), "two lists of rows: train, test")
        train, test = pair
        groups = [{row["group"] for row in side} for side in pair]
        of = f"{len(train)} + {len(test)} rows of {len(rows)}"
        if not test:
            return Slip(of, "about a fifth in test", words["nothing"])
        if len(train) + len(test) > len(rows):
            return Slip(of, "each row once", words["too"])
        if len(train) + len(test) < len(rows):
            return Slip(of, "each row once", words["lost"])
        if sorted(row["text"] for row in train + test) != sorted(row["text"] for row in rows):
            return Slip("a row twice, and another not at all", "each row once", words["lost"])
        if both := groups[0] & groups[1]:
            return Slip(f"{len(both)} groups on both sides, {min(both)!r} for one", "none", words["both"])
        random.seed(rng.random())
        if mine(list(rows)) != pair:
            return Slip("another split on the second call", "the same split for the same rows", words["seed"])
        if _goes_by_hashes(mine, rows, test):
            return Slip("a split by hashes", "the same split tomorrow", f"{words['hash']}; {words['set']}")
        shares.append(len(test) / len(rows))
    share = sum(shares) / len(shares)  # a single split by a checksum may hold out 8 % or 34 %
    if not 0.14 < share < 0.29:
        return Slip(f"{share:.0%} held out", "about 20 %", words["swapped" if share > 0.66 else "fifth"])
    return None


# --- 10.2: a score of your own ----------------------------------------------------------------------------------------


def my_scorer(answer, row):
    from collections import Counter

    said, gold = answer.split(), row["completion"][0]["content"].split()
    right = (Counter(said) & Counter(gold)).total()
    return right / max(len(said), len(gold))


def _gold(row) -> list[str]:
    return row["completion"][0]["content"].split()


SCORERS = {
    "extra words cost nothing: divide by the longer of the two": lambda answer, row: (
        (Counter(answer.split()) & Counter(_gold(row))).total() / len(_gold(row))
    ),
    "missing words cost nothing: divide by the longer of the two": lambda answer, row: (
        (Counter(answer.split()) & Counter(_gold(row))).total() / max(len(answer.split()), 1)
    ),
    "a word said twice is counted twice although the right answer has it once": lambda answer, row: (
        sum(word in _gold(row) for word in answer.split()) / max(len(answer.split()), len(_gold(row)))
    ),
    "all or nothing: a share is wanted": lambda answer, row: float(answer.split() == _gold(row)),
    "letters are compared, not words": lambda answer, row: (
        (Counter(answer) & Counter(row["completion"][0]["content"])).total()
        / max(len(answer), len(row["completion"][0]["content"]))
    ),
    "the answer is compared with the question": lambda answer, row: my_scorer(
        answer, {"completion": row["prompt"][-1:]}
    ),
    "capitals count here: The and the are two words": lambda answer, row: my_scorer(
        answer.lower(), {"completion": [{"content": " ".join(_gold(row)).lower()}]}
    ),
    "it is the number of right words: divide": lambda answer, row: (
        Counter(answer.split()) & Counter(_gold(row))
    ).total(),
}


def _answer_and_row(rng: Random) -> tuple[str, dict]:
    gold = rng.choices(["The", "the", "rider", "left", "box", "at", "gate", "7."], k=rng.randint(3, 8))
    more = rng.choices(["the", "bag", "Rider", "gate"], k=rng.randrange(5))
    kept = [word for word in gold if rng.random() < 0.8]
    said = [word.capitalize() if rng.random() < 0.2 else word for word in kept] + more
    note = [word.lower() for word in gold if rng.random() < 0.7]
    prompt = [{"role": "system", "content": "Clean up this note."}, {"role": "user", "content": " ".join(note)}]
    return " ".join(said), {"prompt": prompt, "completion": [{"role": "assistant", "content": " ".join(gold)}]}


# --- 10.3: train, three times -----------------------------------------------------------------------------------------


def my_best_rate(make_trainer, rates):
    losses = {}
    for rate in rates:
        trainer = make_trainer(rate)
        trainer.train()
        losses[rate] = trainer.evaluate()["eval_loss"]
    return min(losses, key=losses.get)


def _without_training(make_trainer, rates):
    losses = {rate: make_trainer(rate).evaluate()["eval_loss"] for rate in rates}
    return min(losses, key=losses.get)


def _losses(make_trainer, rates) -> dict[float, float]:
    trainers = {rate: make_trainer(rate) for rate in rates}
    return {rate: trainer.train() and trainer.evaluate()["eval_loss"] for rate, trainer in trainers.items()}


def _the_worst(make_trainer, rates):
    losses = _losses(make_trainer, rates)
    return max(losses, key=losses.get)


def _the_loss(make_trainer, rates):
    return min(_losses(make_trainer, rates).values())


def _one_trainer(make_trainer, rates):
    trainer, losses = make_trainer(rates[0]), {}
    for rate in rates:
        trainer.args.learning_rate = rate
        trainer.train()
        losses[rate] = trainer.evaluate()["eval_loss"]
    return min(losses, key=losses.get)


def _by_training_loss(make_trainer, rates):
    losses = {rate: make_trainer(rate).train().training_loss for rate in rates}
    return min(losses, key=losses.get)


SWEEPS = {
    "nothing was trained: call trainer.train() before evaluate()": _without_training,
    "that is the rate with the highest loss: min, not max": _the_worst,
    "the loss is returned: the rate is wanted": _the_loss,
    "one trainer goes on through all the rates: make a fresh one for each": _one_trainer,
    'the held-out loss after training decides: trainer.evaluate()["eval_loss"] after train()': _by_training_loss,
    "the highest rate is not the best one": lambda make_trainer, rates: max(rates),
    "the lowest rate is not the best one": lambda make_trainer, rates: min(rates),
}


def _sweep_slip(mine) -> Slip | None:
    """Three real runs on the small model. Rates of 1e-6 and 3 are so bad that the middle one always wins."""
    words = dict(zip(("untrained", "worst", "loss", "one", "training", "high", "low"), SWEEPS, strict=True))
    rates, made = Random().sample([1e-6, 4e-3, 3.0], 3), []
    with training.workplace():

        def make_trainer(rate):
            made.append(trainer := _small_trainer(rate))
            return trainer

        got = mine(make_trainer, list(rates))
        steps = [trainer.state.global_step for trainer in made]
        held_out = [any("eval_loss" in record for record in trainer.state.log_history) for trainer in made]
    if len(made) == 1:
        return Slip("one trainer for all the rates", "a fresh one for each", words["one"])
    if not made and got in (max(rates), min(rates)):
        return Slip(shown(got), "a choice after training", words["high" if got == max(rates) else "low"])
    if not any(steps):
        return Slip(shown(got), "a choice after training", words["untrained"])
    if not any(held_out):
        return Slip("a choice without the held-out rows", "by the held-out loss", words["training"])
    if got not in rates:
        return Slip(shown(got), f"one of {rates}", words["loss"])
    if got != 4e-3:
        likely = words["worst"] if len(made) == 3 else words["high" if got > 1 else "low"]
        return Slip(f"{got:g}", "the rate with the lowest held-out loss", likely)
    return None


def _small_trainer(rate: float):
    """An SFTTrainer of three steps on the small model, not started."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers import trainer as hf_trainer
    from trl import SFTConfig, SFTTrainer

    rows = [_answer_and_row(Random(number))[1] for number in range(16)]
    tokenizer, model = training.micro()
    usual, hf_trainer.DEFAULT_PROGRESS_CALLBACK = hf_trainer.DEFAULT_PROGRESS_CALLBACK, TrainerCallback
    try:
        return SFTTrainer(
            model,
            train_dataset=Dataset.from_list(rows[:12]),
            eval_dataset=Dataset.from_list(rows[12:]),
            processing_class=tokenizer,
            args=SFTConfig(
                "sweep",
                learning_rate=rate,
                max_steps=3,
                per_device_train_batch_size=4,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                seed=0,
            ),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
    finally:
        hf_trainer.DEFAULT_PROGRESS_CALLBACK = usual


EXERCISES = {
    "10.1": Exercise(
        "Split rows into train and test so that no group is on both sides",
        _split_slip,
        (
            "Decide for groups, not for rows. A group goes to one side with all its rows.",
            "A checksum of the group's name decides, as in the notebook. Then no group moves when other groups come.",
            'A row belongs to test if zlib.crc32(row["group"].encode()) % 5 == 0, else to train. That holds out about '
            "a fifth.",
        ),
        my_split,
        SPLITS,
        difficulty=2,
        minutes=10,
    ),
    "10.2": Exercise(
        "Score an answer by the share of its words that are right",
        lambda mine: first_difference(mine, my_scorer, _answer_and_row, SCORERS),
        (
            'The right answer is row["completion"][0]["content"]. Make words of both texts with .split(). Which '
            "words do both have?",
            "(Counter(said) & Counter(gold)).total() counts them, each as often as in both. Divide by the number of "
            "words of the longer text.",
            "With said and gold as the two lists of words: (Counter(said) & Counter(gold)).total() / max(len(said), "
            "len(gold)).",
        ),
        my_scorer,
        SCORERS,
        difficulty=1,
        minutes=10,
    ),
    "10.3": Exercise(
        "Find the best learning rate by training",
        _sweep_slip,
        (
            "For each rate: make a trainer, train it, and ask it for its loss on the held-out rows. Which rate had "
            "the lowest?",
            'trainer.train(), then trainer.evaluate()["eval_loss"]. Keep the losses in a dict from rate to loss.',
            'In the loop losses[rate] = trainer.evaluate()["eval_loss"]. At the end min(losses, key=losses.get) is '
            "the rate.",
        ),
        my_best_rate,
        SWEEPS,
        seconds=600,
        difficulty=1,
        minutes=10,
    ),
}
