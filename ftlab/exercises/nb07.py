"""Notebook 07: a verifier's reward, CISPO's loss, a reward that is hacked, a reverse KL with two mistakes, GRPO."""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from random import Random

from ftlab.exercises import training
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


NO_KWARGS = "**kwargs is missing: TRL passes every column and more, by name"
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
    NO_KWARGS: lambda completions, gold: my_reward(completions, gold),
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


def _reward_slip(
    mine, answer: Callable = my_reward, draw: Callable = _answers, wrong: Mapping = REWARDS
) -> Slip | None:
    parameters = inspect.signature(mine).parameters.values() if callable(mine) else ()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if slip := first_difference(_as_trl_calls(mine) if takes_all else mine, answer, draw, wrong, n=10):
        return slip
    if not takes_all:
        got = f"the parameters {', '.join(parameter.name for parameter in parameters)}"
        return Slip(got, "completions, gold and **kwargs", NO_KWARGS)
    return None


def _as_trl_calls(reward: Callable) -> Callable:
    return lambda completions, gold: reward(prompts=gold, completions=completions, completion_ids=gold, gold=gold)


# --- 07.2: GRPO's loss becomes CISPO's --------------------------------------------------------------------------------


def my_cispo_loss(logps, old_logps, advantages, mask, eps_max):
    weight = (logps - old_logps).exp().clamp(max=eps_max).detach()  # (B, T), a constant
    loss = -weight * advantages[:, None] * logps
    return (loss * mask).sum() / mask.sum()


def _our_cispo(logps, old_logps, advantages, mask, eps_max):
    from ftlab.scratch.rl import cispo_loss, reduce_loss

    return reduce_loss(cispo_loss(logps, old_logps, advantages, mask, eps_max), mask, "cispo")


def _mean(per_token_loss, mask):
    return (per_token_loss * mask).sum() / mask.sum()


def _by_shares(per_token_loss, mask):
    """The answers' means, each times its share of the tokens: _mean, but for an empty answer."""
    length = mask.sum(1)
    return ((per_token_loss * mask).sum(1) / length * length / length.sum()).sum()


def _capped(ratio, eps_max):
    return ratio.clamp(max=eps_max).detach()


def _cispo(weight: Callable = _capped, mean: Callable = _mean, score: Callable | None = None) -> Callable:
    """my_cispo_loss with another weight(ratio, eps_max), another mean, or another score(weight, A, logps)."""
    score = score or (lambda weight, A, logps: weight * A * logps)

    def loss(logps, old_logps, advantages, mask, eps_max):
        ratio = (logps - old_logps).exp()
        return mean(-score(weight(ratio, eps_max), advantages[:, None], logps), mask)

    return loss


def _grpo_instead(logps, old_logps, advantages, mask, eps_max):
    import torch

    ratio, A = (logps - old_logps).exp(), advantages[:, None]
    return _mean(-torch.min(ratio * A, ratio.clamp(max=eps_max) * A), mask)


CISPO = {
    "that is GRPO's loss: the ratio has the gradient there, and a clipped token none": _grpo_instead,
    "the weight is a constant: detach it": _cispo(lambda ratio, eps_max: ratio.clamp(max=eps_max)),
    "the log-probability is missing: weight * advantage alone teaches nothing": _cispo(
        lambda ratio, eps_max: ratio.clamp(max=eps_max), score=lambda weight, A, logps: weight * A),
    "eps_max is the bound itself, not 1 + eps_max": _cispo(lambda ratio, eps_max: _capped(ratio, 1 + eps_max)),
    "a token beyond the bound stays in: cap its weight and keep its gradient": _cispo(
        lambda ratio, eps_max: (ratio * (ratio <= eps_max)).detach()),
    "there is no lower bound: a small weight is harmless": _cispo(
        lambda ratio, eps_max: ratio.clamp(1 / eps_max, eps_max).detach()),
    "no weight is capped: where is eps_max?": _cispo(lambda ratio, eps_max: ratio.detach()),
    "the ratio is new over old: exp(logps - old_logps)": _cispo(lambda ratio, eps_max: _capped(1 / ratio, eps_max)),
    "a loss falls while a good answer becomes likelier: the minus is missing": _cispo(
        score=lambda weight, A, logps: -weight * A * logps),
    "one weight for each token: a mean over the answer is GSPO's": lambda logps, old_logps, advantages, mask, eps_max: (
        _mean(-_capped(((logps - old_logps) * mask).sum(1, keepdim=True).div(
            mask.sum(1, keepdim=True).clamp(min=1)).exp(), eps_max) * advantages[:, None] * logps, mask)),
    "all tokens that count weigh the same: no mean of the answers' means": _cispo(
        mean=lambda loss, mask: ((loss * mask).sum(1) / mask.sum(1)).mean()),
    "padding does not count: divide by mask.sum()": _cispo(mean=lambda loss, mask: (loss * mask).mean()),
    "the loss at padding does not count: multiply by mask": _cispo(mean=lambda loss, mask: loss.sum() / mask.sum()),
    "divide by the number of tokens, not by the number of answers": _cispo(
        mean=lambda loss, mask: (loss * mask).sum() / len(loss)),
    "one number for the batch is wanted": _cispo(mean=lambda loss, mask: (loss * mask).sum(1) / mask.sum()),
}  # fmt: skip
EMPTY = "an empty answer gives nan where one divides by its length: divide by mask.sum() alone"


def _spans(rng: Random):
    """mask (B, T): each row has some tokens that count, not all, and rows differ in their number."""
    import torch

    B, T = rng.randint(2, 4), rng.randint(8, 10)
    begins = [rng.randint(0, 2) for _ in range(B)]
    lengths = rng.sample(range(2, T - 2), B)
    rows = zip(begins, lengths, strict=True)
    return torch.tensor([[int(begin <= t < begin + length) for t in range(T)] for begin, length in rows])


def _rollouts(rng: Random) -> tuple:
    """logps, old_logps, advantages, mask, eps_max, with ratios on both sides of eps_max and below 1 / eps_max."""
    import torch

    mask = _spans(rng)
    old = torch.tensor([[rng.uniform(-3, -0.5) for _ in row] for row in mask])
    moved = torch.tensor([[rng.uniform(-1.5, 1.5) for _ in row] for row in mask])
    advantages = [rng.choice([-1, 1]) * rng.uniform(0.5, 2) for _ in mask]
    return old + moved, old, torch.tensor(advantages), mask, rng.uniform(1.3, 2.5)


def _rollouts_with_an_empty_answer(rng: Random) -> tuple:
    logps, old, advantages, mask, eps_max = _rollouts(rng)
    mask[0] = 0
    return logps, old, advantages, mask, eps_max


# --- 07.3: a reward that is hacked ------------------------------------------------------------------------------------


def my_ring_reward(completions, gold, **kwargs):
    rewards = []
    for completion, stop in zip(completions, gold, strict=True):
        text = completion[0]["content"]
        _, end, answer = text.partition("</think>")
        if "<think>" not in text:
            end, answer = True, text  # no trace: all of it is the answer
        rewards.append(1.0 if end and answer.strip() == stop else 0.0)
    return rewards


def _paid(score: Callable[[str, str], float]) -> Callable:
    """A reward by score(text, stop)."""
    return lambda completions, gold, **_: [
        float(score(completion[0]["content"], stop)) for completion, stop in zip(completions, gold, strict=True)
    ]


def _final(text: str) -> str:
    """What is read as the answer; "" for an unfinished trace."""
    return text.partition("</think>")[2] if "<think>" in text else text


ANYWHERE = "the stop is looked for anywhere in the text, so a policy that lists all ten is paid"
RING_REWARDS = {
    AS_GIVEN: _paid(lambda text, stop: 0.2 * ("<think>" in text) + (stop in text)),
    ANYWHERE: _paid(lambda text, stop: stop in text),
    "the form is still paid, so a policy that writes it around anything is": _paid(
        lambda text, stop: 0.2 * ("<think>" in text) + (_final(text).strip() == stop)),
    "a stop behind </think> is looked for, and a list of all ten holds it: compare the whole answer": _paid(
        lambda text, stop: stop in _final(text)),
    "a list of all stops ends with one of them: compare the whole answer": _paid(
        lambda text, stop: _final(text).strip().endswith(stop)),
    "a list of all stops begins with one of them: compare the whole answer": _paid(
        lambda text, stop: _final(text).strip().startswith(stop)),
    "an unfinished trace has no answer, whatever it ends with: 0.0": _paid(
        lambda text, stop: (_final(text) or text[-1:]).strip() == stop),
    "behind the first </think>: else a policy can answer twice and the last one counts": _paid(
        lambda text, stop: bool(_final(text)) and text.rpartition("</think>")[2].strip() == stop),
    "an answer without a trace counts, too: nobody pays for thinking": _paid(
        lambda text, stop: "<think>" in text and _final(text).strip() == stop),
    "blanks around the answer do not matter: strip them": _paid(lambda text, stop: _final(text) == stop),
    "a wrong answer gets 0.0": _paid(lambda text, stop: 2 * (_final(text).strip() == stop) - 1),
    "each completion has a stop of its own, at the same place": lambda completions, gold, **_: my_ring_reward(
        completions, [gold[0]] * len(gold)),
    NO_KWARGS: lambda completions, gold: my_ring_reward(completions, gold),
}  # fmt: skip


def _traces(rng: Random) -> tuple:
    """Completions of two questions on the ring: right, wrong, unfinished, without a trace, and cheating ones."""
    completions, gold = [], []
    for stop, other in [rng.sample("0123456789", 2), rng.sample("0123456789", 2)]:
        trace = f"<think> c {rng.randint(1, 9)}={other}, d {rng.randint(1, 9)}={stop}"
        listed = rng.sample("0123456789", 10)
        texts = [
            f"{trace}</think>{stop}",
            f"{trace}</think> {stop} ",
            stop,
            f" {stop}",
            f"{trace}</think>{other}",
            trace,  # cut off
            f"{trace}</think>{''.join(listed)}",
            f"{trace}</think>{stop} {other}",
            f"{trace}</think>{other} {stop}",
            f"{trace}</think>{other}</think>{stop}",
            " ".join(listed),
            "",
        ]
        completions += [[{"role": "assistant", "content": text}] for text in rng.sample(texts, len(texts))]
        gold += [stop] * len(texts)
    return completions, gold


# --- 07.4: debug this -------------------------------------------------------------------------------------------------


def my_reverse_kl(student_logits, teacher_logits, mask):
    student = student_logits.log_softmax(-1)  # (B, T, V)
    teacher = teacher_logits.detach().log_softmax(-1)
    kl = (student.exp() * (student - teacher)).sum(-1)  # (B, T): weighted with the student's probabilities
    return (kl * mask).sum() / mask.sum()


def _kl(each: Callable, mean: Callable = _mean, constant: bool = True) -> Callable:
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
    return _mean((p * (p.log() - q.log())).sum(-1), mask)


def _two_models(rng: Random) -> tuple:
    import torch

    mask = _spans(rng)
    torch_rng = torch.Generator().manual_seed(rng.randrange(2**31))
    return *(2 * torch.randn(*mask.shape, 5, generator=torch_rng) for _ in range(2)), mask


def _impossible_tokens(rng: Random) -> tuple:
    """Two models that give some tokens a probability of 0 in float32."""
    student, teacher, mask = _two_models(rng)
    return 200 * student, 200 * teacher, mask


def _two_models_with_an_empty_answer(rng: Random) -> tuple:
    student, teacher, mask = _two_models(rng)
    mask[0] = 0
    return student, teacher, mask


def _our_kl(student_logits, teacher_logits, mask):
    from ftlab.scratch.rl import reduce_loss, reverse_kl

    return reduce_loss(reverse_kl(student_logits, teacher_logits, mask), mask, "dapo")


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
    "07.2": Exercise(
        "Turn GRPO's loss into CISPO's",
        partial(
            first_difference,
            answer=_our_cispo,
            draw=_rollouts,
            wrong=CISPO,
            by=["logps"],
            fixed=["old_logps"],
            edges={EMPTY: _rollouts_with_an_empty_answer},
        ),
        (
            "GRPO learns through the ratio, and clip cuts this path. What else depends on the policy, so that a token "
            "keeps its gradient when its ratio is capped?",
            "weight = min(ratio, eps_max), as a constant (.detach()). The gradient comes from logps: the loss of a "
            "token is -weight * advantage * logps. Then one mean over all tokens that count.",
            "(logps - old_logps).exp().clamp(max=eps_max).detach() is the weight. advantages[:, None] fits (B, T). "
            "Multiply the loss by mask, sum, and divide by mask.sum().",
        ),
        my_cispo_loss,
        CISPO
        | {EMPTY: _cispo(mean=_by_shares)}
        | mistakes(my_cispo_loss, ["logps"], ["logps", "old_logps", "advantages", "mask"]),
        seconds=60,
        difficulty=2,
        minutes=10,
    ),
    "07.3": Exercise(
        "Debug this: a reward that is hacked",
        partial(_reward_slip, answer=my_ring_reward, draw=_traces, wrong=RING_REWARDS),
        (
            "Be the policy: what is the cheapest text that is paid, if you cannot add? Try `<think>` and all ten "
            "digits.",
            "text.partition('</think>') gives what stands before it, the tag itself ('' if it is missing) and what "
            "follows. Pay 1.0 only if all that follows is the stop, and nothing for the form.",
            "_, end, answer = text.partition('</think>'). Without '<think>' in text the answer is text itself. "
            "1.0 if end and answer.strip() == stop, else 0.0.",
        ),
        my_ring_reward,
        RING_REWARDS,
        seconds=60,
        difficulty=2,
        minutes=10,
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
            "mean of those that mask marks, as in 07.2.",
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
