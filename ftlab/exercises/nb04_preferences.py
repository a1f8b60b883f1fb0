"""Notebook 04 from 04.6 on: a log-probability with two mistakes, the DPO loss, a DPO trainer of one's own."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from random import Random

from ftlab.exercises.core import AS_GIVEN, Exercise, Slip
from ftlab.exercises.differences import first_difference
from ftlab.exercises.gradients import mistakes
from ftlab.exercises.training import (
    PREFERENCE_WORDS,
    preference_mistakes,
    preference_pairs,
    preference_slip,
    replies_row,
    sft,
    trainer_of,
)

# --- 04.6: debug this -------------------------------------------------------------------------------------------------


def my_answer_logps(logits, input_ids, completion_mask):
    logps = logits[:, :-1].log_softmax(-1)  # the logits at t score the token at t + 1
    token_logps = logps.gather(2, input_ids[:, 1:, None]).squeeze(2)
    return (token_logps * completion_mask[:, 1:]).sum(1)


def _summed(shift: bool = True, mask: Callable = lambda m: m[:, 1:], mean: bool = False, logs: bool = True) -> Callable:
    """my_answer_logps with something changed."""

    def logps_of(logits, input_ids, completion_mask):
        x = logits.log_softmax(-1) if logs else logits
        x, ids = (x[:, :-1], input_ids[:, 1:]) if shift else (x, input_ids)
        counted = mask(completion_mask)
        total = (x.gather(2, ids[:, :, None]).squeeze(2) * counted).sum(1)
        return total / counted.sum(1) if mean else total

    return logps_of


LOGPS = {
    AS_GIVEN: _summed(shift=False, mask=lambda m: m, mean=True),
    "the logits at position t score the token at t + 1: shift one against the other": _summed(
        shift=False, mask=lambda m: m),
    "DPO's log-prob is of the whole answer: the sum, not the mean": _summed(mean=True),
    "the mask lies over the tokens: completion_mask[:, 1:]": _summed(mask=lambda m: m[:, :-1]),
    "the prompt counts too": _summed(mask=lambda m: 0 * m[:, 1:] + 1),
    "logits are no log-probs yet: log_softmax": _summed(logs=False),
    "one number an answer is wanted": lambda *inputs: my_answer_logps(*inputs).sum(),
}  # fmt: skip
EMPTY = "an empty answer has the log-prob 0: a division by its length gives nan"


def _by_length(logits, input_ids, completion_mask):
    """The mean times the length: my_answer_logps, but for an answer without tokens."""
    length = completion_mask[:, 1:].sum(1)
    return my_answer_logps(logits, input_ids, completion_mask) / length * length


def _scored(rng: Random) -> tuple:
    import torch

    torch_rng = torch.Generator().manual_seed(rng.randrange(2**31))
    rows, long, words = rng.randint(2, 3), rng.randint(6, 9), 7
    logits = 2 * torch.randn(rows, long, words, generator=torch_rng)
    mask = torch.zeros(rows, long, dtype=torch.long)
    for row in mask:
        begin = rng.randint(1, 3)
        row[begin : begin + rng.randint(2, long - begin - 1)] = 1  # prompt before, padding behind
    return logits, torch.randint(words, (rows, long), generator=torch_rng), mask


def _with_an_empty_answer(rng: Random) -> tuple:
    logits, input_ids, mask = _scored(rng)
    mask[0] = 0
    return logits, input_ids, mask


# --- 04.7: the DPO loss -----------------------------------------------------------------------------------------------


def my_dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    from torch.nn.functional import logsigmoid

    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    return -logsigmoid(chosen_rewards - rejected_rewards)


def _dpo(gap: Callable, then: Callable | None = None) -> Callable:
    """my_dpo_loss with another gap(pi_w, pi_l, ref_w, ref_l, beta), or with `then` done to its losses."""

    def loss(pi_w, pi_l, ref_w, ref_l, beta):
        from torch.nn.functional import logsigmoid

        losses = -logsigmoid(gap(pi_w, pi_l, ref_w, ref_l, beta))
        return then(losses) if then else losses

    return loss


def _right_gap(pi_w, pi_l, ref_w, ref_l, beta):
    return beta * ((pi_w - ref_w) - (pi_l - ref_l))


FAR_APART = "a pair far apart comes out as inf: logsigmoid instead of log(sigmoid)"
LOSSES = {
    "the reference is missing": _dpo(lambda pi_w, pi_l, ref_w, ref_l, beta: beta * (pi_w - pi_l)),
    "beta is missing": _dpo(lambda pi_w, pi_l, ref_w, ref_l, beta: pi_w - ref_w - pi_l + ref_l),
    "chosen and rejected are swapped": _dpo(lambda *x: -_right_gap(*x)),
    "the reference's gap is added: take it off": _dpo(
        lambda pi_w, pi_l, ref_w, ref_l, beta: beta * (pi_w - pi_l + ref_w - ref_l)),
    "the rejected answer is missing": _dpo(lambda pi_w, pi_l, ref_w, ref_l, beta: beta * (pi_w - ref_w)),
    "beta belongs to the policy and to the reference": _dpo(
        lambda pi_w, pi_l, ref_w, ref_l, beta: beta * (pi_w - pi_l) - (ref_w - ref_l)),
    "the minus before the logarithm is missing": _dpo(_right_gap, lambda losses: -losses),
    "the logarithm is missing": _dpo(_right_gap, lambda losses: 1 - (-losses).exp()),
    "one loss a pair is wanted: the caller averages": _dpo(_right_gap, lambda losses: losses.mean()),
    FAR_APART: lambda *x: -_right_gap(*x).sigmoid().log(),
}  # fmt: skip
POLICY = ("policy_chosen_logps", "policy_rejected_logps")  # the reference is fixed


def _logps(rng: Random) -> tuple:
    import torch

    far = rng.choice([1, 1, 40])  # some pairs are so far apart that sigmoid is 0 in float32
    four = [torch.tensor([-rng.uniform(5, 60) * far for _ in range(4)]) for _ in range(4)]
    return *four, rng.choice([0.05, 0.1, 0.3, 0.5])


def _far_apart(rng: Random) -> tuple:
    """A pair whose sigmoid is 0 in float32, and one whose sigmoid is 1."""
    import torch

    near, far = -rng.uniform(5, 60), -rng.uniform(2000, 3000)
    policy = torch.tensor([far, near]), torch.tensor([near, far])
    return *policy, torch.tensor([near, near]), torch.tensor([near, near]), 0.5


# --- 04.8: you train --------------------------------------------------------------------------------------------------


def my_trainer(model, tokenizer, rows, margin):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    def message(text):
        return [{"role": "assistant", "content": text}]

    pairs = []
    for row in rows:
        order = sorted(range(len(row["golds"])), key=lambda i: row["golds"][i])
        worst, best = order[0], order[-1]
        if row["golds"][best] - row["golds"][worst] >= margin:
            chosen, rejected = message(row["answers"][best]), message(row["answers"][worst])
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return DPOTrainer(
        model,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        args=DPOConfig(
            "runs/exercise",
            beta=0.1,
            learning_rate=1e-3,
            per_device_train_batch_size=8,
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )


def dpo_trainer(pairs: Callable = preference_pairs, lora: Mapping | None = {}, **changed):
    """my_trainer with something changed."""

    def build(model, tokenizer, rows, margin):
        from datasets import Dataset

        settings = {"beta": 0.1, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
        return trainer_of("DPO", model, tokenizer, Dataset.from_list(pairs(rows, margin)), lora, **settings | changed)

    return build


def _sft(model, tokenizer, rows, margin):
    from datasets import Dataset

    best = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preference_pairs(rows, margin)]
    return sft(model, tokenizer, Dataset.from_list(best), {})


TRAINERS = {
    "train": _sft,
    "beta": dpo_trainer(beta=0.5),
    "all": dpo_trainer(partial(preference_pairs, keep=lambda gap, margin: True)),
    "strict": dpo_trainer(partial(preference_pairs, keep=lambda gap, margin: gap > margin + 0.01)),
    "swapped": dpo_trainer(partial(preference_pairs, pick=lambda golds, order: (order[0], order[-1]))),
    "first": dpo_trainer(partial(preference_pairs, pick=lambda golds, order: (0, len(golds) - 1))),
    "again": dpo_trainer(lambda rows, margin: (pairs := preference_pairs(rows, margin))[:1] * len(pairs)),
    **preference_mistakes(dpo_trainer),
}
WORDS = {
    "train": "a DPOTrainer learns from pairs; SFT on the best answers is another method",
    "beta": "beta is 0.1 here",
    "all": "at most one pair a row, and none where best and worst are closer than margin",
    "strict": "a gap of exactly `margin` is enough",
    "swapped": "chosen and rejected are swapped",
    "first": "chosen is the answer with the highest gold, rejected the one with the lowest",
    "again": "each row gives a pair of its own: some pairs are there too often, others are missing",
    **PREFERENCE_WORDS,
}


def _trainer_slip(mine) -> Slip | None:
    rng = Random()
    rows = [replies_row(rng) for _ in range(48)]
    for row in rows:
        row["golds"] = [gold + i / 64 for i, gold in enumerate(row["golds"])]  # no ties: one best answer, one worst
    gaps = sorted({max(row["golds"]) - min(row["golds"]) for row in rows})
    margin = rng.choice([gap for gap in gaps[1:] if gap <= 0.75])  # a gap that occurs, and many are wider
    read = partial(_pairs_slip, wanted=preference_pairs(rows, margin), margin=margin)
    return preference_slip(lambda *loaded: mine(*loaded, rows, margin), "DPO", 0.1, read, WORDS)


def _pairs_slip(trainer, tokenizer, wanted: list[dict], margin: float) -> Slip | None:
    """What is wrong with the pairs that the trainer has read."""

    def text(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    data = trainer.train_dataset
    got = sorted((text(row["chosen_ids"]), text(row["rejected_ids"])) for row in data)
    right = sorted((pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in wanted)
    if len(got) != len(right):
        words = WORDS["all" if len(got) > len(right) else "strict"]
        return Slip(f"{len(got)} pairs", f"{len(right)}, at a margin of {margin:g}", words)
    if got == sorted((rejected, chosen) for chosen, rejected in right):
        return Slip("the worst answer as the chosen one", "the best one", WORDS["swapped"])
    if got != right:
        chosen, rejected = pair = min(Counter(got) - Counter(right), key=right.count)
        said = f"{chosen!r} over {rejected!r}"
        if pair in right:
            return Slip(f"{said}, {got.count(pair)} times", f"{right.count(pair)} times", WORDS["again"])
        return Slip(said, "the best over the worst of each row", WORDS["first"])
    return None


EXERCISES = {
    "04.6": Exercise(
        "Debug this: the log-probability of an answer",
        partial(
            first_difference,
            answer=my_answer_logps,
            draw=_scored,
            wrong=LOGPS,
            by=["logits"],
            edges={EMPTY: _with_an_empty_answer},
        ),
        (
            "Two questions. Which token do the logits at position 0 score, token 0 or token 1? Is the "
            "log-probability of an answer a sum or a mean?",
            "The logits at position t score token t + 1, so shift one against the other. The mask belongs to the "
            "tokens. DPO takes the sum.",
            "logits[:, :-1] goes with input_ids[:, 1:] and with completion_mask[:, 1:]. Then .sum(1), and no "
            "division.",
        ),
        my_answer_logps,
        LOGPS | {EMPTY: _by_length} | mistakes(my_answer_logps, ["logits"], ["logits", "completion_mask"]),
        seconds=60,
        difficulty=2,
        minutes=10,
    ),
    "04.7": Exercise(
        "Write the DPO loss",
        partial(
            first_difference,
            answer=my_dpo_loss,
            draw=_logps,
            wrong=LOSSES,
            by=POLICY,
            edges={FAR_APART: _far_apart},
        ),
        (
            "First the implicit reward of each answer: beta times (policy - reference).",
            "The loss of a pair is -log sigmoid(reward of the chosen answer - reward of the rejected answer).",
            "chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps), and rejected_rewards in the same way. "
            "Return -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards). It stays finite where "
            "sigmoid rounds to 0.",
        ),
        my_dpo_loss,
        LOSSES | mistakes(my_dpo_loss, POLICY, ["policy_chosen_logps", "ref_rejected_logps"]),
        seconds=60,
        difficulty=1,
        minutes=10,
    ),
    "04.8": Exercise(
        "Train with DPO on pairs of your own making",
        _trainer_slip,
        (
            "Sort each row's answers by gold. The last is chosen, the first rejected, if they are at least `margin` "
            "apart.",
            'A pair is {"prompt": messages, "chosen": messages, "rejected": messages}. Wrap each text as [{"role": '
            '"assistant", "content": text}]. Dataset.from_list takes the list of pairs.',
            'DPOConfig("runs/exercise", beta=0.1, learning_rate=1e-3, per_device_train_batch_size=8, use_cpu=True) '
            'and LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"). On a GPU leave use_cpu out.',
        ),
        my_trainer,
        {WORDS[name]: build for name, build in TRAINERS.items()},
        seconds=600,
        difficulty=3,
        minutes=20,
    ),
}  # fmt: skip
