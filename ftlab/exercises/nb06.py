"""Notebook 06: ORPO's loss, the KTO loss, SPIN's loop with two mistakes, a KTO trainer of one's own."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Any

from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same
from ftlab.exercises.differences import first_difference
from ftlab.exercises.gradients import mistakes
from ftlab.exercises.training import (
    PREFERENCE_WORDS,
    preference_mistakes,
    preference_slip,
    replies_row,
    sft,
    trainer_of,
)

# --- 06.1: ORPO's loss ------------------------------------------------------------------------------------------------


def my_orpo_loss(policy_chosen_mean_logps, policy_rejected_mean_logps, lam):
    import torch
    from torch.nn.functional import logsigmoid

    def log_odds(x):
        return x - torch.log(-torch.expm1(x))  # 1 - exp(x) is 0 in float32 where p is nearly 1

    odds_term = -logsigmoid(log_odds(policy_chosen_mean_logps) - log_odds(policy_rejected_mean_logps))
    return -policy_chosen_mean_logps + lam * odds_term


def _odds(compare: Callable | None = None, of: Callable | None = None, then: Callable | None = None) -> Callable:
    """my_orpo_loss with another odds of(x), another compare(odds of chosen, odds of rejected), or an end of its own."""

    def loss(chosen, rejected, lam):
        from torch.nn.functional import logsigmoid

        both = [of(x) if of else x.exp() / (1 - x.exp()) for x in (chosen, rejected)]
        ratio = compare(*both) if compare else (both[0] / both[1]).log()
        return -chosen + lam * (then(ratio) if then else -logsigmoid(ratio))

    return loss


def _whole(sum_of: Callable) -> Callable:
    """my_orpo_loss put together otherwise: sum_of(NLL, odds term, lambda, NLL of the rejected answer)."""

    def loss(chosen, rejected, lam):
        return sum_of(-chosen, my_orpo_loss(chosen, rejected, 1.0) + chosen, lam, -rejected)

    return loss


ODDS = {
    "that is the ratio of the probabilities; the odds are p / (1 - p)": _odds(of=lambda x: x.exp()),
    "chosen and rejected are swapped in the odds": _odds(lambda chosen, rejected: (rejected / chosen).log()),
    "the odds are p / (1 - p), not p / (1 + p)": _odds(of=lambda x: x.exp() / (1 + x.exp())),
    "the arguments are log-probs: p is exp of them": _odds(of=lambda x: x / (1 - x)),
    "the sigmoid is missing: -log sigmoid(log of the ratio)": _odds(then=lambda ratio: -ratio),
    "the logarithm of the ratio is missing before the sigmoid": _odds(lambda chosen, rejected: chosen / rejected),
    "the logarithm after the sigmoid is missing": _odds(then=lambda ratio: (-ratio).sigmoid()),
    "the minus before the logarithm is missing": _odds(then=lambda ratio: ratio.sigmoid().log()),
    "lambda is missing": _whole(lambda nll, term, lam, other: nll + term),
    "lambda belongs to the odds term alone": _whole(lambda nll, term, lam, other: lam * (nll + term)),
    "lambda stands before the odds term, not before the NLL": _whole(lambda nll, term, lam, other: lam * nll + term),
    "that is the odds term alone: the NLL of the chosen answer is missing": _whole(
        lambda nll, term, lam, other: lam * term),
    "the NLL is minus the mean log-prob": _whole(lambda nll, term, lam, other: -nll + lam * term),
    "the NLL is that of the chosen answer, not of the rejected one": _whole(
        lambda nll, term, lam, other: other + lam * term),
    "the NLL is that of the chosen answer alone: nothing teaches the rejected one": _whole(
        lambda nll, term, lam, other: nll + other + lam * term),
    "one number per pair is wanted: the caller averages": _whole(
        lambda nll, term, lam, other: (nll + lam * term).mean()),
}  # fmt: skip
NEARLY_1 = (
    "near p = 1 the difference 1 - p is rounded to 0: torch.log(-torch.expm1(x)) alone stays finite "
    "(torch.where lets through the nan of the side that it doesn't take)"
)
BOTH = ("policy_chosen_mean_logps", "policy_rejected_mean_logps")


def _mean_logps(rng: Random) -> tuple:
    import torch

    sides = (torch.tensor([-rng.uniform(0.05, 3) for _ in range(4)]) for _ in range(2))
    return *sides, rng.choice([0.1, 0.25, 0.5, 2.0])


def _nearly_certain(rng: Random) -> tuple:
    """Answers that the policy knows by heart: in float32 their probability is 1."""
    import torch

    sure, unsure = -rng.uniform(1e-9, 1e-8), -rng.uniform(0.05, 3)
    return torch.tensor([sure, unsure, sure]), torch.tensor([unsure, sure, sure]), 0.5


# --- 06.2: the KTO loss -----------------------------------------------------------------------------------------------


def my_kto_loss(policy_logps, ref_logps, desirable, z0, beta):
    import torch

    distance = beta * (policy_logps - ref_logps - z0)  # how far the answer's reward lies above the reference point
    return torch.where(desirable, 1 - distance.sigmoid(), 1 - (-distance).sigmoid())


def _kto(distance: Callable | None = None, sides: Callable | None = None, then: Callable | None = None) -> Callable:
    """my_kto_loss with another distance(policy, ref, z0, beta), other sides, or with `then` done to its losses."""

    def loss(policy_logps, ref_logps, desirable, z0, beta):
        import torch

        far = (distance or (lambda pi, ref, z0, beta: beta * (pi - ref - z0)))(policy_logps, ref_logps, z0, beta)
        signed = far * torch.where(sides(desirable) if sides else desirable, 1, -1)
        return then(signed) if then else 1 - signed.sigmoid()

    return loss


KTO = {
    "z0 is missing": _kto(lambda pi, ref, z0, beta: beta * (pi - ref)),
    "z0 is added: take it off": _kto(lambda pi, ref, z0, beta: beta * (pi - ref + z0)),
    "beta belongs to z0 too": _kto(lambda pi, ref, z0, beta: beta * (pi - ref) - z0),
    "the reference is missing": _kto(lambda pi, ref, z0, beta: beta * (pi - z0)),
    "beta is missing": _kto(lambda pi, ref, z0, beta: pi - ref - z0),
    "a thumbs-down turns the sign": _kto(sides=lambda desirable: desirable | ~desirable),
    "that is the value, or up and down are swapped: a thumbs-up costs 1 - sigmoid": _kto(
        then=lambda signed: signed.sigmoid()),
    "that is DPO's -log sigmoid; KTO has 1 - sigmoid": _kto(then=lambda signed: -signed.sigmoid().log()),
    "one loss per answer is wanted: the caller averages": _kto(then=lambda signed: (1 - signed.sigmoid()).mean()),
    "the sigmoid is missing": _kto(then=lambda signed: 1 - signed),
}  # fmt: skip
OVERFLOW = "far from z0 exp overflows, and the gradient is nan: torch.sigmoid, not 1 / (1 + exp)"


def _thumbs(rng: Random) -> tuple:
    import torch

    ref = [-rng.uniform(10, 40) for _ in range(6)]
    policy = [x + rng.uniform(-6, 6) for x in ref]
    desirable = rng.sample([True, True, False, False, rng.random() < 0.5, rng.random() < 0.5], 6)
    z0 = torch.tensor(rng.choice([0.0, rng.uniform(0.5, 4)]))
    return torch.tensor(policy), torch.tensor(ref), torch.tensor(desirable), z0, rng.choice([0.1, 0.3, 0.5])


def _far_from_z0(rng: Random) -> tuple:
    import torch

    ref = torch.tensor([-rng.uniform(10, 40) for _ in range(4)])
    far = torch.tensor([1.0, -1.0, 1.0, -1.0]) * rng.uniform(400, 800)
    return ref + far, ref, torch.tensor([True, True, False, False]), torch.tensor(0.0), 0.5


# --- 06.3: debug this -------------------------------------------------------------------------------------------------


def my_spin(model, rows, rounds, answer, train):
    for _ in range(rounds):
        own = answer(model, [row["prompt"] for row in rows])  # the model of the round before writes them
        pairs = []
        for row, text in zip(rows, own, strict=True):
            rejected = [{"role": "assistant", "content": text}]
            if rejected != row["chosen"]:  # two equal sides teach nothing
                pairs.append({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": rejected})
        model = train(model, pairs)
    return model


def _spin(
    once: bool = False, equal: bool = False, swapped: bool = False, again: bool = False, more: int = 0, back=None
) -> Callable:
    """my_spin with something changed."""

    def spin(model, rows, rounds, answer, train):
        start, prompts = model, [row["prompt"] for row in rows]
        for _ in range(rounds + more):
            own = answer(start if once else model, prompts)
            sides = [(row["chosen"], [{"role": "assistant", "content": text}])
                     for row, text in zip(rows, own, strict=True)]  # fmt: skip
            kept = [(p, *(pair[::-1] if swapped else pair)) for p, pair in zip(prompts, sides, strict=True)
                    if equal or pair[0] != pair[1]]  # fmt: skip
            pairs = [dict(zip(("prompt", "chosen", "rejected"), each, strict=True)) for each in kept]
            model = train(start if again else model, pairs)
        return start if back else model

    return spin


SPIN = {
    AS_GIVEN: _spin(once=True, equal=True),
    "every round needs fresh answers, by the model of the round before": _spin(once=True),
    "an answer that equals the human one gives a pair of two equal sides: leave it out": _spin(equal=True),
    "chosen is the human answer, rejected the model's own": _spin(swapped=True),
    "a round goes on from the model of the round before, not from the start": _spin(again=True),
    "one round too many": _spin(more=1),
    "one round too few": _spin(more=-1),
    "return the model of the last round": _spin(back=True),
}


def _game(rng: Random) -> tuple:
    """A start, rows with human answers, rounds. What a model answers is decided by `_answer`."""
    words = ["late", "cold", "double", "missing", "wrong", "rude"]
    rows = []
    for word in rng.sample(words, 4):
        ticket = f"{word} order {rng.randrange(10**5, 10**6)}"
        human = [{"role": "assistant", "content": f"Sorry. We look into it: {ticket}."}]
        rows.append({"prompt": [{"role": "user", "content": ticket}], "chosen": human})
    return f"start {rng.randrange(100)}", rows, rng.choice([2, 3])


def _spin_slip(mine) -> Slip | None:
    def played(spin: Callable) -> Callable:
        def play(start, rows, rounds):
            trained = []

            def answer(model, prompts):
                human = {row["prompt"][-1]["content"]: row["chosen"][0]["content"] for row in rows}
                asked = [prompt[-1]["content"] for prompt in prompts]
                first = rows[0]["prompt"][-1]["content"]  # its answer is the model's own, so each round has a pair
                same = [text != first and Random(f"{model} {text}").random() < 0.3 for text in asked]
                return [human[text] if s else f"{model} on {text}" for text, s in zip(asked, same, strict=True)]

            def train(model, pairs):
                trained.append({"from": model, "pairs": copy.deepcopy(pairs)})
                return f"{start}, round {len(trained)}"

            returned = spin(start, rows, rounds, answer, train)
            return {"rounds": len(trained), "trained": trained, "returned": returned}

        return play

    slips = {words: played(slip) for words, slip in SPIN.items()}
    return first_difference(played(mine), played(my_spin), _game, slips, n=12)


# --- 06.4: you train --------------------------------------------------------------------------------------------------


def my_trainer(model, tokenizer, rows, up):
    import random

    from datasets import Dataset
    from peft import LoraConfig
    from trl import KTOConfig, KTOTrainer

    thumbs = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}], "label": gold >= up}
        for row in rows
        for text, gold in zip(row["answers"], row["golds"], strict=True)
    ]
    random.Random(0).shuffle(thumbs)  # or the neighbour's answer, which makes z0, belongs to the same ticket
    ups = sum(row["label"] for row in thumbs)
    return KTOTrainer(
        model,
        train_dataset=Dataset.from_list(thumbs),
        processing_class=tokenizer,
        args=KTOConfig(
            "runs/exercise",
            beta=0.5,
            learning_rate=1e-3,
            per_device_train_batch_size=16,
            desirable_weight=(len(thumbs) - ups) / ups,
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )


def _labelled(rows, label: Callable, shuffled: bool = True, pick: Callable = lambda golds: range(len(golds))) -> list:
    """Thumbs of the answers that pick(golds) names, up where label(gold)."""
    found = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["answers"][i]}],
         "label": label(row["golds"][i])}
        for row in rows for i in pick(row["golds"])
    ]  # fmt: skip
    return Random(0).sample(found, len(found)) if shuffled else found


def _kto_trainer(
    label: Callable = lambda gold, up: gold >= up,
    lora: Mapping | None = {},
    weights: Callable | None = None,
    how: Mapping = {},
    **changed,
) -> Callable:
    """my_trainer with something changed; `how` goes to _labelled."""

    def build(model, tokenizer, rows, up):
        from datasets import Dataset

        thumbs = _labelled(rows, partial(label, up=up), **how)
        ups = sum(row["label"] for row in thumbs)
        ratio = (len(thumbs) - ups) / ups
        settings = {"beta": 0.5, "learning_rate": 1e-3, "per_device_train_batch_size": 16}
        settings |= weights(ratio) if weights else {"desirable_weight": ratio}
        return trainer_of("KTO", model, tokenizer, Dataset.from_list(thumbs), lora, **settings | changed)

    return build


def _sft(model, tokenizer, rows, up):
    from datasets import Dataset

    ups = [row for row in _labelled(rows, lambda gold: gold >= up) if row.pop("label")]
    return sft(model, tokenizer, Dataset.from_list(ups), {})


TRAINERS = {
    "train": _sft,
    "beta": _kto_trainer(beta=0.1),
    "some": _kto_trainer(how={"pick": lambda golds: (golds.index(max(golds)), golds.index(min(golds)))}),
    "strict": _kto_trainer(label=lambda gold, up: gold > up),
    "turned": _kto_trainer(label=lambda gold, up: gold < up),
    "side by side": _kto_trainer(how={"shuffled": False}),
    "no weight": _kto_trainer(weights=lambda ratio: {}),
    "upside down": _kto_trainer(weights=lambda ratio: {"undesirable_weight": ratio}),
    "size": _kto_trainer(weights=lambda ratio: {"desirable_weight": ratio**0.5}),
    **preference_mistakes(_kto_trainer),
}
WORDS = {
    "train": "a KTOTrainer learns from thumbs of both kinds; SFT on the good answers is another method",
    "beta": "beta is 0.5 here",
    "some": "every answer is a row: KTO needs no pairs, so none is left out",
    "strict": "a gold of exactly `up` is a thumbs-up",
    "turned": "label says True for a thumbs-up",
    "side by side": "shuffle the thumbs: TRL takes z0 from the neighbour's answer, which must belong to another ticket",
    "no weight": "one kind is rarer: give it a weight, so that weight times number is equal on both sides",
    "upside down": "the weight belongs to the other side: the rarer kind gets the larger one",
    "size": "the right side, another size: the rarer kind gets (number of the other) / (its own number)",
    **PREFERENCE_WORDS,
}


def _trainer_slip(mine) -> Slip | None:
    rng = Random()
    rows = [replies_row(rng) for _ in range(48)]
    up = rng.choice([0.5, 0.75])  # a gold that occurs; with 0.5 the thumbs-down are rarer
    read = partial(_thumbs_slip, wanted=_labelled(rows, lambda gold: gold >= up), up=up)
    return preference_slip(lambda *loaded: mine(*loaded, rows, up), "KTO", 0.5, read, WORDS)


def _thumbs_slip(trainer, tokenizer, wanted: list[dict[str, Any]], up: float) -> Slip | None:
    """What is wrong with the thumbs that the trainer has read, their order, or their weights."""
    data, config = trainer.train_dataset, trainer.args
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in data["completion_ids"]]
    got = sorted(zip(texts, data["label"], strict=True))
    right = sorted((row["completion"][0]["content"], row["label"]) for row in wanted)
    if len(got) != len(right):
        return Slip(f"{len(got)} thumbs", f"{len(right)}: one per answer", WORDS["some"])
    if got == sorted((text, not label) for text, label in right):
        return Slip("a thumbs-down for the good answers", "a thumbs-up", WORDS["turned"])
    if got != right:
        ups, wanted_ups = (sum(label for _, label in each) for each in (got, right))
        if ups == wanted_ups:
            return Slip("thumbs on the wrong answers", "each answer with its own gold", "zip answers with golds")
        return Slip(f"{ups} thumbs-up", f"{wanted_ups} with a gold of at least {up:g}", WORDS["strict"])
    prompts, size = data["prompt_ids"], config.per_device_train_batch_size
    places = [i for i in range(len(prompts)) if i % size]
    beside = sum(prompts[i] == prompts[i - 1] for i in places) / max(len(places), 1)
    if beside > 0.15:
        return Slip(f"{beside:.0%} of the neighbours belong to the same ticket", "few of them", WORDS["side by side"])
    ups = sum(data["label"])
    weight = config.desirable_weight * ups, config.undesirable_weight * (len(texts) - ups)
    if not 0 < 0.98 * weight[1] <= weight[0] <= 1.36 * weight[1]:
        helps = (config.desirable_weight > config.undesirable_weight) == (ups < len(texts) - ups)
        alone = same(config.desirable_weight, config.undesirable_weight)
        said = f"weight x number: {weight[0]:.0f} up, {weight[1]:.0f} down"
        likely = WORDS["no weight" if alone else "size" if helps else "upside down"]
        return Slip(said, "equal, or up to 4/3 for up", likely)
    return None


EXERCISES = {
    "06.1": Exercise(
        "Write ORPO's loss",
        partial(
            first_difference,
            answer=my_orpo_loss,
            draw=_mean_logps,
            wrong=ODDS,
            by=BOTH,
            edges={NEARLY_1: _nearly_certain},
        ),
        (
            "Two parts: SFT on the chosen answer, and lambda times a term that compares the odds of the two answers. "
            "The probability per token is p = exp(mean log-prob), and its odds are p / (1 - p).",
            "The NLL is minus the chosen mean log-prob. The logarithm of the odds is x - log(1 - exp(x)), with x the "
            "mean log-prob, and the odds term is -log sigmoid(log-odds of chosen - log-odds of rejected). "
            "torch.expm1(x) is exp(x) - 1 and keeps its digits where exp(x) is rounded to 1.",
            "def log_odds(x): return x - torch.log(-torch.expm1(x)). Return -policy_chosen_mean_logps - lam * "
            "torch.nn.functional.logsigmoid(log_odds(policy_chosen_mean_logps) - "
            "log_odds(policy_rejected_mean_logps)).",
        ),
        my_orpo_loss,
        ODDS | {NEARLY_1: _odds()} | mistakes(my_orpo_loss, BOTH, BOTH),
        seconds=60,
        difficulty=2,
        minutes=10,
    ),
    "06.2": Exercise(
        "Write the KTO loss",
        partial(
            first_difference,
            answer=my_kto_loss,
            draw=_thumbs,
            wrong=KTO,
            by=["policy_logps"],
            edges={OVERFLOW: _far_from_z0},
        ),
        (
            "How far does an answer's reward lie above z0? A thumbs-up costs little if it is far above, a thumbs-down "
            "if it is far below.",
            "distance = beta * (policy_logps - ref_logps - z0). A thumbs-up costs 1 - sigmoid(distance), a thumbs-down "
            "1 - sigmoid(-distance).",
            "torch.where(desirable, 1 - distance.sigmoid(), 1 - (-distance).sigmoid()) gives one loss per answer. "
            "Take no mean.",
        ),
        my_kto_loss,
        KTO
        | {OVERFLOW: _kto(then=lambda signed: 1 / (1 + signed.exp()))}
        | mistakes(my_kto_loss, ["policy_logps"], ["policy_logps", "z0"]),
        seconds=60,
        difficulty=1,
        minutes=10,
    ),
    "06.3": Exercise(
        "Debug this: SPIN's loop",
        _spin_slip,
        (
            "Follow the variable `own`. Whose answers are the rejected ones in round 2? And what does a pair teach "
            "whose two sides are equal?",
            "Ask the model of the round before in each round, inside the loop. Leave out each pair whose rejected "
            "side equals its chosen side.",
            'In the loop: own = answer(model, [row["prompt"] for row in rows]), then the pairs. Keep those with '
            'pair["rejected"] != pair["chosen"]. Then model = train(model, pairs).',
        ),
        my_spin,
        SPIN,
        seconds=60,
        difficulty=2,
        minutes=15,
    ),
    "06.4": Exercise(
        "Train with KTO on thumbs of your own making",
        _trainer_slip,
        (
            "Every answer becomes one row: prompt, completion, and label, True for a thumbs-up. Which kind is rarer, "
            "and by what factor?",
            'A row is {"prompt": messages, "completion": [{"role": "assistant", "content": text}], "label": gold >= '
            "up}. Shuffle the rows before Dataset.from_list. Count both kinds, ups and downs: with desirable_weight "
            "= downs / ups they count the same.",
            'KTOConfig("runs/exercise", beta=0.5, learning_rate=1e-3, per_device_train_batch_size=16, '
            "desirable_weight=downs / ups, use_cpu=True) and LoraConfig(r=16, lora_alpha=32, "
            'target_modules="all-linear"). On a GPU leave use_cpu out.',
        ),
        my_trainer,
        {WORDS[name]: build for name, build in TRAINERS.items()},
        seconds=600,
        difficulty=3,
        minutes=25,
    ),
}
