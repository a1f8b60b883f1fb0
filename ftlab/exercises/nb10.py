"""Notebook 10: your own data, split, scored and chosen by."""

import json
import random
import re
from random import Random

from ftlab.exercises import training
from ftlab.exercises.core import Exercise, Slip, same, shown
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


def my_fields(answer, row):
    import json

    wanted = json.loads(row["completion"][0]["content"])
    try:
        got = json.loads(answer)
    except ValueError:
        return 0.0
    if not isinstance(got, dict):
        return 0.0
    right = sum(name in got and got[name] == value for name, value in wanted.items())
    return right / len(got.keys() | wanted.keys())


def _objects(answer: str, row: dict) -> tuple[dict, dict]:
    """What the answer and the row hold; {} for an answer that holds no object."""
    wanted = json.loads(row["completion"][0]["content"])
    try:
        got = json.loads(answer)
    except ValueError:
        return {}, wanted
    return (got if isinstance(got, dict) else {}), wanted


def _share(right: float, of: float) -> float:
    return right / max(of, 1)


def _right(got: dict, wanted: dict) -> int:
    return sum(name in got and got[name] == value for name, value in wanted.items())


def _over_the_rows_fields(answer, row):
    got, wanted = _objects(answer, row)
    return _share(_right(got, wanted), len(wanted))


def _over_the_answers_fields(answer, row):
    got, wanted = _objects(answer, row)
    return _share(_right(got, wanted), len(got))


def _over_the_longer(answer, row):
    got, wanted = _objects(answer, row)
    return _share(_right(got, wanted), max(len(got), len(wanted)))


def _names_alone(answer, row):
    got, wanted = _objects(answer, row)
    return _share(len(got.keys() & wanted.keys()), len(got.keys() | wanted.keys()))


def _values_anywhere(answer, row):
    got, wanted = _objects(answer, row)
    return _share(sum(value in got.values() for value in wanted.values()), len(got.keys() | wanted.keys()))


def _as_texts(answer, row):
    got, wanted = _objects(answer, row)
    right = sum(name in got and str(got[name]) == str(value) for name, value in wanted.items())
    return _share(right, len(got.keys() | wanted.keys()))


def _all_or_nothing(answer, row):
    got, wanted = _objects(answer, row)
    return float(got == wanted)


def _in_the_order_given(answer, row):
    got, wanted = _objects(answer, row)
    right = sum(one == other for one, other in zip(got.items(), wanted.items(), strict=False))
    return _share(right, len(got.keys() | wanted.keys()))


def _number_right(answer, row):
    return _right(*_objects(answer, row))


def _whole_row(answer, row):
    return my_fields(row["completion"][0]["content"], row)


FIELDS = {
    "a field too many costs nothing: divide by the names that either of the two has": _over_the_rows_fields,
    "a missing field costs nothing: divide by the names that either of the two has": _over_the_answers_fields,
    "the longer of the two is not all names: one wrong name and one missing make two": _over_the_longer,
    "names are compared without their values": _names_alone,
    "a value under another name is wrong": _values_anywhere,
    'values are compared as texts: 2 and "2" are two values in JSON': _as_texts,
    "all or nothing: a share is wanted": _all_or_nothing,
    "fields are compared by their place: a JSON object has no order": _in_the_order_given,
    "it is the number of right fields: divide": _number_right,
    "the right answer is scored, and not the model's": _whole_row,
}


def _answer_and_row(rng: Random) -> tuple[str, dict]:
    names = rng.sample(["item", "qty", "price", "city", "gift", "note", "day"], rng.randint(2, 5))
    wanted = {name: rng.choice([rng.randint(2, 9), f"{rng.randint(2, 9)}", "Pune", "late", None]) for name in names}
    got = dict(wanted)
    if rng.random() < 0.4:
        got.pop(rng.choice(names))
    if rng.random() < 0.4:
        got[rng.choice(["colour", "size"])] = rng.choice(["red", 3])
    if got and rng.random() < 0.5:
        name = rng.choice([name for name in got if isinstance(got[name], int)] or list(got))
        got[name] = str(got[name]) if isinstance(got[name], int) else rng.randint(2, 9)
    if len(got) > 1 and rng.random() < 0.3:
        one, other = rng.sample(list(got), 2)
        got[one], got[other] = got[other], got[one]
    got = dict(rng.sample(list(got.items()), len(got)))
    text = rng.choice([json.dumps(got)] * 8 + [json.dumps(got)[:-1], "It is late.", "[2, 3]", "7", ""])
    return text, _row(json.dumps(wanted))


def _row(answer: str) -> dict:
    prompt = [{"role": "system", "content": "Read the order."}, {"role": "user", "content": "two soaps to Pune"}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}


# --- 10.3: train, three times, and look at the test once --------------------------------------------------------------


def my_choice(make_trainer, rates, test):
    trainers = {}
    for rate in rates:
        trainer = make_trainer(rate)
        trainer.train()
        trainers[rate] = trainer
    losses = {rate: trainer.evaluate()["eval_loss"] for rate, trainer in trainers.items()}
    best = min(losses, key=losses.get)
    return best, trainers[best].evaluate(test)["eval_loss"]


def _trained(make_trainer, rates) -> dict:
    trainers = {rate: make_trainer(rate) for rate in rates}
    for trainer in trainers.values():
        trainer.train()
    return trainers


def _loss(trainer, rows=None) -> float:
    return (trainer.evaluate() if rows is None else trainer.evaluate(rows))["eval_loss"]


def _without_training(make_trainer, rates, test):
    losses = {rate: _loss(make_trainer(rate)) for rate in rates}
    best = min(losses, key=losses.get)
    return best, _loss(make_trainer(best), test)


def _the_worst(make_trainer, rates, test):
    trainers = _trained(make_trainer, rates)
    losses = {rate: _loss(trainer) for rate, trainer in trainers.items()}
    worst = max(losses, key=losses.get)
    return worst, _loss(trainers[worst], test)


def _chosen_by_the_test(make_trainer, rates, test):
    losses = {rate: _loss(trainer, test) for rate, trainer in _trained(make_trainer, rates).items()}
    best = min(losses, key=losses.get)
    return best, losses[best]


def _test_of_each(make_trainer, rates, test):
    trainers = _trained(make_trainer, rates)
    losses = {rate: _loss(trainer) for rate, trainer in trainers.items()}
    tested = {rate: _loss(trainer, test) for rate, trainer in trainers.items()}
    best = min(losses, key=losses.get)
    return best, tested[best]


def _the_validation_loss(make_trainer, rates, test):
    losses = {rate: _loss(trainer) for rate, trainer in _trained(make_trainer, rates).items()}
    best = min(losses, key=losses.get)
    return best, losses[best]


def _the_rate_alone(make_trainer, rates, test):
    losses = {rate: _loss(trainer) for rate, trainer in _trained(make_trainer, rates).items()}
    return min(losses, key=losses.get)


def _one_trainer(make_trainer, rates, test):
    trainer, losses = make_trainer(rates[0]), {}
    for rate in rates:
        trainer.args.learning_rate = rate
        trainer.train()
        losses[rate] = _loss(trainer)
    return min(losses, key=losses.get), _loss(trainer, test)


def _by_training_loss(make_trainer, rates, test):
    trainers = {rate: make_trainer(rate) for rate in rates}
    losses = {rate: trainer.train().training_loss for rate, trainer in trainers.items()}
    best = min(losses, key=losses.get)
    return best, _loss(trainers[best], test)


def _an_untrained_one_is_tested(make_trainer, rates, test):
    losses = {rate: _loss(trainer) for rate, trainer in _trained(make_trainer, rates).items()}
    best = min(losses, key=losses.get)
    return best, _loss(make_trainer(best), test)


SWEEPS = {
    "nothing was trained: call trainer.train() before evaluate()": _without_training,
    "that is the rate with the highest loss: min, not max": _the_worst,
    "the test rows chose: choose by evaluate() on validation, and ask the test once": _chosen_by_the_test,
    "the test was asked for each rate: only the chosen one may see it": _test_of_each,
    "the second value is the loss on the test rows: evaluate(test)": _the_validation_loss,
    "two values are wanted: the rate, and its loss on the test rows": _the_rate_alone,
    "one trainer goes on through all the rates: make a fresh one for each": _one_trainer,
    "the loss on validation after training decides, not the one of training": _by_training_loss,
    "a fresh trainer was tested: keep the one that was trained": _an_untrained_one_is_tested,
    "the highest rate is not the best one": lambda make_trainer, rates, test: (max(rates), 0.0),
    "the lowest rate is not the best one": lambda make_trainer, rates, test: (min(rates), 0.0),
}


class _Looks:
    """Which trainers were asked for their loss on which rows."""

    def __init__(self, test) -> None:
        self.test, self.made, self.tested, self.losses = test, [], [], {}

    def watch(self, trainer):
        evaluate = trainer.evaluate
        self.made.append(trainer)

        def watched(eval_dataset=None, *rest, **more):
            found = evaluate(eval_dataset, *rest, **more)
            if eval_dataset is self.test:
                self.tested.append(trainer)
                self.losses[id(trainer)] = found["eval_loss"]
            return found

        trainer.evaluate = watched
        return trainer


def _sweep_slip(mine) -> Slip | None:
    """Three real runs on the small model. Rates of 1e-6 and 3 are so bad that the middle one always wins."""
    keys = ["untrained", "worst", "chosen", "each", "validation", "alone", "one", "training", "fresh", "high", "low"]
    words = dict(zip(keys, SWEEPS, strict=True))
    rates = Random().sample([1e-6, 4e-3, 3.0], 3)
    with training.workplace():
        looks = _Looks(_small_trainer(4e-3, on=slice(16, 20)).eval_dataset)
        got = mine(lambda rate: looks.watch(_small_trainer(rate)), list(rates), looks.test)
    made, tested = looks.made, looks.tested
    pair = isinstance(got, list | tuple) and len(got) == 2
    best = got[0] if pair else got
    steps = [trainer.state.global_step for trainer in made]
    own = [any("eval_loss" in record for record in trainer.state.log_history) for trainer in made]
    if len(made) == 1:
        return Slip("one trainer for all the rates", "a fresh one for each", words["one"])
    if not made and best in (max(rates), min(rates)):
        return Slip(shown(got), "a choice after training", words["high" if best == max(rates) else "low"])
    if not any(steps):
        return Slip(shown(got), "a choice after training", words["untrained"])
    if not pair:
        return Slip(shown(got), "(rate, loss on the test rows)", words["alone"])
    if len(tested) > 1:
        chosen = sum(_evaluations(trainer) for trainer in made) == len(tested)
        return Slip(f"the test asked {len(tested)} times", "once", words["chosen" if chosen else "each"])
    if not any(own) or sum(_evaluations(trainer) for trainer in made) <= len(tested):
        return Slip("a choice without the validation rows", "by their loss", words["training"])
    if best not in rates:
        return Slip(shown(best), f"one of {rates}", words["alone"])
    if best != 4e-3:
        likely = words["worst"] if len(made) >= 3 else words["high" if best > 1 else "low"]
        return Slip(f"{best:g}", "the rate with the lowest loss on validation", likely)
    if not tested:
        return Slip("the test was never asked", "once, by the chosen one", words["validation"])
    if not tested[0].state.global_step:
        return Slip("an untrained model's loss", "that of the chosen one", words["fresh"])
    if not same(got[1], looks.losses[id(tested[0])]):
        return Slip(shown(got[1]), shown(looks.losses[id(tested[0])]), words["validation"])
    return None


def _evaluations(trainer) -> int:
    return sum("eval_loss" in record for record in trainer.state.log_history)


def _small_trainer(rate: float, on: slice = slice(12, 16)):
    """An SFTTrainer of three steps on the small model, not started, with these rows to evaluate on."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers import trainer as hf_trainer
    from trl import SFTConfig, SFTTrainer

    rows = [_answer_and_row(Random(number))[1] for number in range(20)]
    tokenizer, model = training.micro()
    usual, hf_trainer.DEFAULT_PROGRESS_CALLBACK = hf_trainer.DEFAULT_PROGRESS_CALLBACK, TrainerCallback
    try:
        return SFTTrainer(
            model,
            train_dataset=Dataset.from_list(rows[:12]),
            eval_dataset=Dataset.from_list(rows[on]),
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


# --- 10.4: what the scorer may read -----------------------------------------------------------------------------------


def my_answer(text):
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def _first_end(text):
    return text.partition("</think>")[2].strip() if "</think>" in text else my_answer(text)


def _reasoning(text):
    if "</think>" in text:
        return text.rpartition("</think>")[0].removeprefix("<think>").strip()
    return my_answer(text)


def _unfinished(text):
    return text.rpartition("</think>")[2].removeprefix("<think>").strip()


def _lost_without(text):
    return text.rpartition("</think>")[2].strip() if "</think>" in text else ""


def _by_both_marks(text):
    without = re.sub("<think>.*?</think>", "", text, flags=re.DOTALL)
    return "" if "<think>" in without else without.strip()


def _on_one_line(text):
    without = re.sub("<think>.*</think>", "", text)
    return "" if "<think>" in text and "</think>" not in text else without.strip()


THOUGHTS = {
    "the text came back with its reasoning": lambda text: text.strip(),
    "that is the reasoning: what follows it is wanted": _reasoning,
    "there may be two thoughts: the last </think> counts": _first_end,
    "a thought that never ends is no answer": _unfinished,
    "a text without reasoning is the answer itself": _lost_without,
    "the <think> may stand in the prompt: then the text has only </think>": _by_both_marks,
    "reasoning has line breaks: in a pattern . does not match them without re.DOTALL": _on_one_line,
    "blanks and line breaks around the answer are left": lambda text: (
        text.rpartition("</think>")[2] if "</think>" in text else "" if "<think>" in text else text
    ),
}


def _written(rng: Random) -> tuple[str]:
    answer = rng.choice(["late", '{"qty": 2}', "It came on Monday.", "lost\nor late"])
    thought = rng.choice(["", "\n", "\nIt took 9 days.\nSo it is late.\n", "one line"])
    forms = [
        answer,
        f"{answer}\n",
        f"<think>{thought}</think>\n\n{answer}",
        f"<think>{thought}</think>{answer} ",
        f"{thought}</think>\n\n{answer}",
        f"<think>{thought}</think>\nno, <think>\nagain\n</think>\n{answer}",
        f"<think>\nIt may be {answer}",
    ]
    return (rng.choice(forms),)


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
        "Score an answer in JSON by the share of its fields that are right",
        lambda mine: first_difference(mine, my_fields, _answer_and_row, FIELDS, n=200),
        (
            "Make dicts of both texts with json.loads. What does it raise for an answer that is no JSON, and what is "
            "such an answer worth? And one that is JSON, but a list?",
            "Count the names of the right answer that the other dict has too, with an equal value.",
            "Divide by the number of names that either of them has: len(got.keys() | wanted.keys()).",
        ),
        my_fields,
        FIELDS,
        difficulty=1,
        minutes=10,
    ),
    "10.3": Exercise(
        "Choose a learning rate on validation, and look at the test once",
        _sweep_slip,
        (
            "For each rate: make a trainer, train it, keep it, and ask it for its loss on validation with "
            'trainer.evaluate()["eval_loss"]. Which rate had the lowest?',
            "Keep the trainers in a dict from rate to trainer, and the losses in another.",
            'With best = min(losses, key=losses.get): return best, trainers[best].evaluate(test)["eval_loss"].',
        ),
        my_choice,
        SWEEPS,
        seconds=600,
        difficulty=2,
        minutes=15,
    ),
    "10.4": Exercise(
        "Cut the reasoning off what a model has written",
        lambda mine: first_difference(mine, my_answer, _written, THOUGHTS, n=200),
        (
            "The answer follows the last </think>. str.rpartition cuts a text at the last place of a mark.",
            "Without a </think> there are two cases: a model that never thought, and one cut off while it did.",
            'In the second case "<think>" stands in the text, and "" is the answer.',
        ),
        my_answer,
        THOUGHTS,
        difficulty=1,
        minutes=5,
    ),
}
