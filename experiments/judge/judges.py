"""A generative judge: what it is asked, what it answers, how it learns, the score read from it.

It reads one reply at a time. Its prompt holds a rubric, the ticket and the reply; its answer has a
verdict for each of the rubric's criteria ("action yes", "order no", ...), or one grade. The score
is read from the probabilities of these verdicts, which is how G-Eval weighs its scores; no rule of
ours has a part in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments import sft
from experiments.rlhf.world import LORA, keep
from ftlab.tasks import replies

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.rlhf.world import World

CRITERIA = {  # the guideline of data/replies in short: a name in the rubric for each property
    "action": ("action", "it does what the ticket calls for"),
    "order_id": ("order", "it names the ticket's order number, or asks for a missing one"),
    "polite": ("polite", "it has an apology or thanks"),
    "short": ("short", "whole sentences, at most 45 words"),
    "fair": ("fair", "it blames nobody and promises no gifts"),
}
RUBRIC = "\n".join(f"{name}: {text}" for name, text in CRITERIA.values())
SYSTEM = f"You judge a support team's reply to a ticket by five criteria.\n{RUBRIC}"
GRADES = ((0.8, 0.87), (0.6, 0.66), (0.4, 0.47), (1e-6, 0.21), (0.0, 0.0))
"""Of each grade, A first: the least gold that earns it, and what it is worth, the mean gold of the
SFT model's replies that earn it (2,400 replies, seed 11)."""


@dataclass(frozen=True)
class Form:
    """What a judge is asked for. slots: what stands before each verdict; says: the verdicts.

    weights: of each slot. worth: of each verdict. A reply's score is
    sum_k weights[k] sum_v p_k(v) worth[v], from 0 to 1.
    """

    asks: str
    slots: tuple[str, ...]
    says: tuple[str, ...]
    weights: tuple[float, ...]
    worth: tuple[float, ...]

    def answer(self, verdicts: list[int]) -> str:
        """The answer that gives these verdicts, places in `says`, one a slot."""
        pairs = zip(self.slots, verdicts, strict=True)
        return "".join(slot + self.says[verdict] for slot, verdict in pairs)


PARTS = Form(
    asks="Answer yes or no for each criterion.",
    slots=tuple("\n" * (k > 0) + name for k, (name, _) in enumerate(CRITERIA.values())),
    says=(" yes", " no"),
    weights=tuple(replies.WEIGHTS[key] for key in CRITERIA),
    worth=(1.0, 0.0),
)
GRADE = Form(
    asks="Give one grade from A (best) to E (worst).",
    slots=("grade",),
    says=tuple(f" {letter}" for letter in "ABCDE"),
    weights=(1.0,),
    worth=tuple(worth for _, worth in GRADES),
)


# --- What it is asked and what it should answer ---------------------------------------------------


def prompt(form: Form, row: dict, reply: str) -> list[dict]:
    """The messages that a judge reads: the rubric, then ticket and reply. row: of world.tickets."""
    ticket = row["prompt"][-1]["content"]
    said = f"Ticket: {ticket}\nReply: {reply}\n{form.asks}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}]


def labels(form: Form, row: dict, reply: str) -> list[int]:
    """The verdicts that the gold rules give, as an annotator would: places in form.says."""
    if form is PARTS:
        held = replies.score(reply, row["ticket_label"])
        return [0 if held[key] else 1 for key in CRITERIA]
    gold = replies.gold_reward(reply, row["ticket_label"])
    return [next(i for i, (least, _) in enumerate(GRADES) if gold >= least)]


def examples(form: Form, rows: list[dict], n: int) -> list[dict]:
    """Prompt and completion for the first n replies of each judged row."""
    found = []
    for row in rows:
        for reply in row["replies"][:n]:
            said = form.answer(labels(form, row, reply))
            completion = [{"role": "assistant", "content": said}]
            found.append({"prompt": prompt(form, row, reply), "completion": completion})
    return found


# --- Training -------------------------------------------------------------------------------------


def base(name: str, world: World) -> tuple:
    """(model, tokenizer) in fp32: "micro" is the SFT model, as of a reward model; or SmolLM2."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import model_path

    folder = world.folder if name == "micro" else model_path("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def trained(world: World, name: str, form: Form, rows: list[dict], told: dict) -> tuple:
    """(judge, tokenizer, what its training took): SFT on these rows by TRL, kept and then read.

    told: rate, seed, batch. Of `micro` every weight is trained, of the 135M an adapter, merged
    after. A judge of the same model, form, rate and seed is read from where it was kept.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind = "parts" if form is PARTS else "grade"
    folder = world.kept(f"judge-{name}-{kind}-{told['rate']:g}-{told['seed']}")
    model, tokenizer = base(name, world)
    if not (folder / "took.json").is_file():
        lora = {} if name == "micro" else LORA
        settings = {"rate": told["rate"], "seed": told["seed"], "lora": lora}
        batch = told["batch"]
        trainer = sft.trainer_of(model, tokenizer, rows, **settings, per_device_train_batch_size=batch)
        took = sft.trained(trainer)
        trainer.model.save_pretrained(folder)
        keep(folder / "took.json", took)
        model, _ = base(name, world)
    took = json.loads((folder / "took.json").read_text(encoding="utf-8"))
    if name == "micro":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.eval().requires_grad_(False), tokenizer, took


# --- The score ------------------------------------------------------------------------------------


def probabilities(model, tokenizer, form: Form, prompts: list[list[dict]]) -> Tensor:
    """(n, slots, verdicts): p(verdict) at each slot, which sum to 1 over the form's verdicts.

    The slots' text is given, so that an untrained model answers in the form too; each slot is read
    after the likeliest verdicts before it. What all prompts begin with (the rubric, and the ticket
    if it is one) is computed once.
    """
    import torch

    template = tokenizer.apply_chat_template
    ids = [template(one, add_generation_prompt=True, return_dict=False) for one in prompts]
    slots = [tokenizer(slot, add_special_tokens=False).input_ids for slot in form.slots]
    says = torch.tensor(single_tokens(tokenizer, form.says))
    shared = common(ids)
    rests = [one[shared:] + slots[0] for one in ids]
    longest, n = max(map(len, rests)), len(ids)
    step = torch.tensor([[0] * (longest - len(rest)) + rest for rest in rests])  # padded in front
    read = torch.tensor([[0] * (longest - len(rest)) + [1] * len(rest) for rest in rests])
    mask = torch.cat([torch.ones(n, shared, dtype=torch.long), read], 1)
    found = []
    with torch.inference_mode():
        begin = torch.tensor([ids[0][:shared]])
        cache = model(input_ids=begin, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(n)
        for k in range(len(slots)):
            place = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            told = {"attention_mask": mask, "position_ids": place}
            told |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            logits = model(input_ids=step, **told).logits[:, -1, says]
            found.append(logits.softmax(-1))
            if k + 1 < len(slots):
                verdict = says[logits.argmax(-1)][:, None]
                step = torch.cat([verdict, torch.tensor([slots[k + 1]] * n)], 1)
                mask = torch.cat([mask, torch.ones_like(step)], 1)
    return torch.stack(found, 1)


def single_tokens(tokenizer, words: tuple[str, ...]) -> list[int]:
    """The token of each word. Raises ValueError for a word that has several."""
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    if any(len(one) != 1 for one in ids):
        got = {word: len(one) for word, one in zip(words, ids, strict=True)}
        raise ValueError(f"got words of so many tokens: {got}, wanted one each. Another tokenizer?")
    return [one[0] for one in ids]


def common(ids: list[list[int]]) -> int:
    """How many tokens all of them begin with; at least one is left to each of them."""
    first, last = min(ids), max(ids)
    pairs = enumerate(zip(first, last, strict=False))
    differ = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
    return min(differ, min(map(len, ids)) - 1)


def score(form: Form, probs: Tensor) -> list[float]:
    """Of each reply sum_k weights[k] sum_v p_k(v) worth[v]. probs: (n, slots, verdicts)."""
    import torch

    worth = probs.double() @ torch.tensor(form.worth, dtype=torch.double)  # (n, slots)
    return (worth @ torch.tensor(form.weights, dtype=torch.double)).tolist()
