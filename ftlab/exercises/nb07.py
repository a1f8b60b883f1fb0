"""Notebook 07: a verifier's reward, the group advantage, DAPO's reduction, a reverse KL with two mistakes, GRPO."""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from random import Random

from ftlab.exercises import nb04, training
from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same
from ftlab.exercises.differences import first_difference
from ftlab.exercises.gradients import mistakes
from ftlab.paths import DATA
from ftlab.tasks import ask

# --- 07.1: the reward -------------------------------------------------------------------------------------------------


def my_reward(completions, gold, **kwargs):
    from ftlab.tasks.ask import is_right

    texts = [completion[0]["content"] for completion in completions]  # a completion is a list of messages
    return [1.0 if is_right(text, query) else 0.0 for text, query in zip(texts, gold, strict=True)]


def _scored(score: Callable[[str, str], float], then: Callable | None = None) -> Callable:
    """A reward by score(text, gold query), with `then` done to the list."""

    def reward(completions, gold, **kwargs):
        scores = [float(score(c[0]["content"], query)) for c, query in zip(completions, gold, strict=True)]
        return then(scores) if then else scores

    return reward


def _same_on_one(text: str, query: str) -> bool:
    db = ask.databases()[0]
    return ask.runs(text) and ask.run_query(text, db) == ask.run_query(query, db)


REWARDS = {
    "a completion is a list of messages: its text is completion[0]['content']": lambda completions, gold, **_: (
        my_reward([[{"content": str(completion)}] for completion in completions], gold)),
    "two different queries can both be right: run them with is_right": _scored(lambda text, query: text == query),
    "a query that runs is not right yet: is_right compares its rows": _scored(lambda text, query: ask.runs(text)),
    "on one table a wrong query can have the right rows: is_right takes all ten": _scored(_same_on_one),
    "one reward for each completion is wanted, not one for the batch": _scored(
        ask.is_right, lambda scores: sum(scores) / len(scores)),
    "each completion has a gold query of its own, at the same place": lambda completions, gold, **kwargs: my_reward(
        completions, [gold[0]] * len(gold)),
    "a wrong answer gets 0.0": _scored(ask.is_right, lambda scores: [2 * x - 1 for x in scores]),
    "**kwargs is missing: TRL passes every column and more, by name": lambda completions, gold: my_reward(
        completions, gold),
}  # fmt: skip


def _answers(rng: Random) -> tuple:
    """Completions and gold queries of two prompts: a right query in other words, and four that are wrong."""
    completions, gold = [], []
    queries = [
        f"SELECT COUNT(*) FROM orders WHERE city='{city}' AND total>{rng.randrange(300, 700)}"
        for city in rng.sample(["Pune", "Kochi", "Delhi", "Mumbai"], 2)
    ]
    for query, foreign in zip(queries, queries[::-1], strict=True):  # foreign: right for the other prompt
        lucky = f"SELECT {ask.run_query(query, ask.databases()[0])[0][0]}"  # right on the first table alone
        other = query.replace("COUNT(*)", "count( * )").replace("FROM", " from")
        texts = [rng.choice([query, other]), query.replace(">", "<"), query.replace("city", "town"), lucky, foreign]
        completions += [[{"role": "assistant", "content": text}] for text in rng.sample(texts, 5)]
        gold += [query] * 5
    return completions, gold


def _reward_slip(mine) -> Slip | None:
    parameters = inspect.signature(mine).parameters.values() if callable(mine) else ()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if slip := first_difference(_as_trl_calls(mine) if takes_all else mine, my_reward, _answers, REWARDS, n=10):
        return slip
    if not takes_all:
        got = f"the parameters {', '.join(parameter.name for parameter in parameters)}"
        missing = "**kwargs is missing: TRL passes every column and more, by name"
        return Slip(got, "completions, gold and **kwargs", missing)
    return None


def _as_trl_calls(reward: Callable) -> Callable:
    return lambda completions, gold: reward(prompts=gold, completions=completions, completion_ids=gold, gold=gold)


# --- 07.3: DAPO's reduction -------------------------------------------------------------------------------------------


def my_dapo(per_token_loss, mask):
    return (per_token_loss * mask).sum() / mask.sum()


def _our_dapo(per_token_loss, mask):
    from ftlab.scratch.rl import reduce_loss

    return reduce_loss(per_token_loss, mask, "dapo")


REDUCTIONS = {
    "that is GRPO's, the mean of the answers' means: a token of a long answer weighs less": lambda loss, mask: (
        (loss * mask).sum(1) / mask.sum(1)).mean(),
    "padding does not count: divide by mask.sum()": lambda loss, mask: (loss * mask).mean(),
    "the loss at padding does not count: multiply by mask": lambda loss, mask: loss.sum() / mask.sum(),
    "that is the sum divided by the number of answers: divide by the number of tokens": lambda loss, mask: (
        (loss * mask).sum() / len(loss)),
    "divide by the tokens that count, not by the length of the longest answer": lambda loss, mask: (
        (loss * mask).sum() / (len(loss) * mask.sum(1).max())),
    "one number for the batch is wanted": lambda loss, mask: (loss * mask).sum(1) / mask.sum(),
}  # fmt: skip
EMPTY = "an empty answer gives nan where one divides by its length: divide by mask.sum() alone"


def _by_shares(per_token_loss, mask):
    """The answers' means, each times its share of the tokens: my_dapo, but for an empty answer."""
    length = mask.sum(1)
    return ((per_token_loss * mask).sum(1) / length * length / length.sum()).sum()


def _losses(rng: Random) -> tuple:
    import torch

    B, T = rng.randint(2, 4), rng.randint(6, 9)
    spans = [sorted(rng.sample(range(T), 2)) for _ in range(B)]  # prompt before, padding behind
    loss = torch.tensor([[rng.uniform(-1, 2) for _ in range(T)] for _ in range(B)])
    return loss, torch.tensor([[int(begin <= t < end) for t in range(T)] for begin, end in spans])


def _losses_with_an_empty_answer(rng: Random) -> tuple:
    loss, mask = _losses(rng)
    mask[0] = 0
    return loss, mask


# --- 07.4: debug this -------------------------------------------------------------------------------------------------


def my_reverse_kl(student_logits, teacher_logits, mask):
    student = student_logits.log_softmax(-1)  # (B, T, V)
    teacher = teacher_logits.detach().log_softmax(-1)
    kl = (student.exp() * (student - teacher)).sum(-1)  # (B, T): weighted with the student's probabilities
    return (kl * mask).sum() / mask.sum()


def _kl(each: Callable, mean: Callable = my_dapo, constant: bool = True) -> Callable:
    """my_reverse_kl with another each(student, teacher) of log-probs, another mean, or a teacher that is trained."""

    def loss(student_logits, teacher_logits, mask):
        fixed = teacher_logits.detach() if constant else teacher_logits
        return mean(each(student_logits.log_softmax(-1), fixed.log_softmax(-1)), mask)

    return loss


def _from(p, q):
    return (p.exp() * (p - q)).sum(-1)


IMPOSSIBLE = "a token of probability 0 gives 0 * -inf, which is nan: log_softmax, not log(softmax)"
KL = {
    AS_GIVEN: _kl(lambda s, t: _from(t, s), lambda kl, mask: kl.mean()),
    "that is the forward KL: in the reverse KL the student's probabilities are the weights": _kl(
        lambda s, t: _from(t, s)),
    "prompt and padding do not count: multiply by mask": _kl(_from, lambda kl, mask: kl.mean()),
    "divide by the number of positions that count": _kl(_from, lambda kl, mask: (kl * mask).mean()),
    "all counted tokens weigh the same: no mean of the answers' means": _kl(
        _from, lambda kl, mask: ((kl * mask).sum(1) / mask.sum(1)).mean()),
    "with the student's weights the difference is log p_student - log p_teacher": _kl(lambda s, t: -_from(s, t)),
    "the student's probabilities need their gradient: no detach on them": _kl(
        lambda s, t: (s.exp().detach() * (s - t)).sum(-1)),
    "the teacher is fixed: detach its logits": _kl(_from, constant=False),
}  # fmt: skip


def _from_softmax(student_logits, teacher_logits, mask):
    """my_reverse_kl with the logarithms of softmax."""
    p, q = student_logits.softmax(-1), teacher_logits.detach().softmax(-1)
    return my_dapo((p * (p.log() - q.log())).sum(-1), mask)


def _two_models(rng: Random) -> tuple:
    import torch

    loss, mask = _losses(rng)
    torch_rng = torch.Generator().manual_seed(rng.randrange(2**31))
    return *(2 * torch.randn(*loss.shape, 5, generator=torch_rng) for _ in range(2)), mask


def _impossible_tokens(rng: Random) -> tuple:
    """Two models that give some tokens a probability of 0 in float32."""
    student, teacher, mask = _two_models(rng)
    return 200 * student, 200 * teacher, mask


def _two_models_with_an_empty_answer(rng: Random) -> tuple:
    student, teacher, mask = _two_models(rng)
    mask[0] = 0
    return student, teacher, mask


def _our_kl(student_logits, teacher_logits, mask):
    from ftlab.scratch.rl import reverse_kl

    return _our_dapo(reverse_kl(student_logits, teacher_logits, mask), mask)


# --- 07.5: you train --------------------------------------------------------------------------------------------------


def my_grpo_trainer(model, tokenizer, rows):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from ftlab.exercises.nb07 import my_reward as right  # of section 2

    return GRPOTrainer(
        model,
        reward_funcs=right,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=GRPOConfig(
            "runs/exercise",
            learning_rate=1e-3,
            per_device_train_batch_size=32,  # answers: 4 prompts x 8
            num_generations=8,
            max_completion_length=80,
            scale_rewards="none",
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )


def _grpo(reward: Callable = my_reward, lora: Mapping | None = {}, columns: tuple = ("prompt", "gold"), **changed):
    """my_grpo_trainer with something changed."""

    def build(model, tokenizer, rows):
        from datasets import Dataset
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer

        rest = {"learning_rate": 1e-3, "per_device_train_batch_size": 32}
        settings = {name: wanted for name, (wanted, *_) in SETTINGS.items()} | rest | changed
        shape = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        return GRPOTrainer(
            model,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
            processing_class=tokenizer,
            args=GRPOConfig("runs", use_cpu=True, **settings),
            peft_config=None if lora is None else LoraConfig(**shape | lora),
        )

    return build


SETTINGS = {  # what GRPOConfig should hold, a mistake, and what to say of it
    "num_generations": (8, 4, "a group has 8 answers"),
    "max_completion_length": (80, 256, "an answer has 80 tokens at most; TRL's default is 256"),
    "temperature": (1.0, 0.7, "the answers are drawn at temperature 1, so from the policy itself"),
    "beta": (0.0, 0.04, "beta is 0 here: no KL, and no reference model"),
    "loss_type": ("dapo", "grpo", "loss_type stays TRL's default: every token weighs the same"),
    "scale_rewards": ("none", "group", "TRL's default divides by the group's standard deviation: switch that off"),
}
WORDS = {
    "train": "a GRPOTrainer learns from answers of the model's own; SFT on the gold queries is another method",
    **training.PREFERENCE_WORDS,
    "peft": "peft_config is missing, so every weight is trained",
    "gold": "the reward needs the column gold: TRL passes on the columns of train_dataset",
    "size": "per_device_train_batch_size counts answers: 4 prompts x 8",
    "reward": "the reward is `right` of section 2, which your 07.1 does too",
    "shape": "LoRA has r=16 and lora_alpha=32 here; PEFT's own lora_alpha is 8",
}
TRAINERS = {
    **{WORDS[name]: build for name, build in training.preference_mistakes(_grpo).items()},
    WORDS["gold"]: _grpo(columns=("prompt",)),
    WORDS["size"]: _grpo(per_device_train_batch_size=8),
    WORDS["reward"]: _grpo(_scored(lambda text, query: ask.runs(text))),
    WORDS["shape"]: _grpo(lora={"lora_alpha": 8}),
    **{words: _grpo(**{name: mistake}) for name, (_, mistake, words) in SETTINGS.items()},
}


def _grpo_slip(mine) -> Slip | None:
    from torch import nn

    lines = (DATA / "ask" / "more.jsonl").read_text(encoding="utf-8").splitlines()
    found = map(json.loads, Random().sample(lines, 64))
    rows = [{"prompt": row["prompt"], "gold": row["completion"][0]["content"]} for row in found]
    tokenizer, model = training.micro(str(DATA / "ask_start"))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    with training.workplace():
        trainer = mine(model, tokenizer, rows)
        if slip := training.trainer_slip(trainer, linear, WORDS, "GRPOTrainer") or _settings_slip(trainer):
            return slip
        training.train_quietly(trainer, 1)
    return None


def _settings_slip(trainer) -> Slip | None:
    """What is wrong with the trainer's settings, its data, its reward."""
    args = trainer.args
    for name, (wanted, _, words) in SETTINGS.items():
        if not same(got := getattr(args, name), wanted):
            return Slip(f"{name} = {got!r}", repr(wanted), words)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if (step, args.generation_batch_size) != (32, 32):
        return Slip(f"{step} answers a step", "32", WORDS["size"])
    if not same(rate := args.learning_rate, 1e-3):
        return Slip(f"a rate of {rate:g}", "0.001", WORDS["low" if rate < 1e-3 else "high"])
    lora = trainer.model.peft_config["default"]
    if (lora.r, lora.lora_alpha) != (16, 32):
        return Slip(f"r = {lora.r}, lora_alpha = {lora.lora_alpha}", "r = 16, lora_alpha = 32", WORDS["shape"])
    if "gold" not in trainer.train_dataset.column_names:
        return Slip(f"the columns {trainer.train_dataset.column_names}", "prompt and gold", WORDS["gold"])
    if (n := len(trainer.reward_funcs)) != 1:
        return Slip(f"{n} rewards", "one", WORDS["reward"])
    slip = first_difference(_as_trl_calls(trainer.reward_funcs[0]), my_reward, _answers, n=3)
    return slip and Slip(slip.got, slip.wanted, WORDS["reward"], slip.given)


EXERCISES = {
    "07.1": Exercise(
        "Write the reward of a verifier",
        _reward_slip,
        (
            "Each completion has its gold query at the same place in the other list. Where in a completion does its "
            "text stand?",
            "completion[0]['content'] is the text. zip(completions, gold) gives the pairs. ask.is_right(text, "
            "query) gives True or False.",
            "[float(ask.is_right(completion[0]['content'], query)) for completion, query in zip(completions, gold)]. "
            "Leave **kwargs in the signature.",
        ),
        my_reward,
        REWARDS,
        seconds=60,
        difficulty=2,
        minutes=10,
    ),
    "07.2": nb04.EXERCISES["04.4"],  # the same function, now on the rewards of a check
    "07.3": Exercise(
        "Write DAPO's reduction",
        partial(
            first_difference,
            answer=_our_dapo,
            draw=_losses,
            wrong=REDUCTIONS,
            by=["per_token_loss"],
            edges={EMPTY: _losses_with_an_empty_answer},
        ),
        (
            "Every token that counts weighs the same, in a short answer and in a long one. How many are there in the "
            "batch?",
            "mask.sum() is their number. Sum the losses that count over the whole batch, and divide once.",
            "per_token_loss * mask is 0 where nothing counts. Sum it, and divide by mask.sum().",
        ),
        my_dapo,
        {
            **REDUCTIONS,
            EMPTY: _by_shares,
            **mistakes(my_dapo, ["per_token_loss"], ["per_token_loss", "mask"]),
        },
        seconds=60,
        difficulty=1,
        minutes=5,
    ),
    "07.4": Exercise(
        "Debug this: the reverse KL of on-policy distillation",
        partial(
            first_difference,
            answer=_our_kl,
            draw=_two_models,
            wrong=KL,
            by=["student_logits"],
            fixed=["teacher_logits"],
            edges={IMPOSSIBLE: _impossible_tokens, EMPTY: _two_models_with_an_empty_answer},
        ),
        (
            "Two questions. The reverse KL is an average over the student's tokens: whose probabilities are the "
            "weights here? And where is mask used?",
            "Over the vocabulary: the sum of p_student * (log p_student - log p_teacher). Over the positions: the "
            "mean of those that mask marks, as in 07.3.",
            "student.exp() * (student - teacher), then .sum(-1). After that (kl * mask).sum() / mask.sum().",
        ),
        my_reverse_kl,
        KL
        | {IMPOSSIBLE: _from_softmax, EMPTY: _kl(_from, _by_shares)}
        | mistakes(my_reverse_kl, ["student_logits"], ["student_logits", "teacher_logits"]),
        seconds=60,
        difficulty=2,
        minutes=10,
    ),
    "07.5": Exercise(
        "Train with GRPO and your reward",
        _grpo_slip,
        (
            "It is the trainer of section 2 with other numbers. TRL counts answers in a batch, not prompts. How many "
            "are 4 prompts with 8 answers each?",
            "GRPOTrainer(model, reward_funcs=right, train_dataset=Dataset.from_list(rows), "
            "processing_class=tokenizer, args=GRPOConfig(...), peft_config=LoraConfig(...)). The batch is 32, "
            "num_generations is 8.",
            'GRPOConfig("runs/exercise", learning_rate=1e-3, per_device_train_batch_size=32, num_generations=8, '
            'max_completion_length=80, scale_rewards="none", gradient_checkpointing=False, use_cpu=True) and '
            'LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"). Temperature 1, beta 0 and dapo are TRL\'s '
            "defaults. On a GPU leave use_cpu out.",
        ),
        my_grpo_trainer,
        TRAINERS,
        seconds=600,
        difficulty=2,
        minutes=15,
    ),
}
