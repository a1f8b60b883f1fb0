"""Every exercise: the stub is not tried yet, right answers are right, each wrong one is rejected in its own words."""

import ast
import inspect
import itertools
import json
import math
import os
import random
import re
import statistics
import time
import zlib
from difflib import SequenceMatcher
from functools import partial

import exercise_snapshot
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from solved import solved, stubs
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, softplus
from transformers import AutoModelForCausalLM

import ftlab.exercises as ex
from ftlab import memory
from ftlab.classroom import progress
from ftlab.evaluate import Score, answers, compare, score
from ftlab.exercises import (
    check,
    core,
    hint,
    nb00,
    nb01,
    nb02,
    nb03,
    nb04,
    nb04_preferences,
    nb05,
    nb06,
    nb07,
    nb08,
    nb09,
    nb10,
    solution,
    stub,
    training,
)
from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same, shown
from ftlab.exercises.differences import first_difference
from ftlab.llama import Decoder
from ftlab.paths import EXPERIMENTS
from ftlab.scratch.lora import LoRALinear
from ftlab.tasks import ask, tidy
from notebooks import CELLS

ALL = ex.exercises()
TRAINS = {q for q, exercise in ALL.items() if exercise.seconds >= 300}  # or asks a large model
WRONG = [(q, words) for q, exercise in ALL.items() for words in exercise.wrong]
CODE = ["".join(cell["source"]) for cell in CELLS.values() if cell["cell_type"] == "code"]
STUBS = [source for source in CODE if stubs(source)]
SHIPPED = [(q, name, ast.unparse(node)) for source in STUBS for q, name, node in stubs(source)]
IMPORTED = """import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
"""  # above the stubs of the notebooks


@pytest.fixture(autouse=True)
def _own_progress(file, monkeypatch):
    monkeypatch.setenv("FTLAB_PROGRESS", str(file))


def run(source: str, name: str = "mine", file: str = "<cell>"):
    """What the source binds to `name`, as in a cell of a notebook."""
    import linecache

    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), namespace := {"check": lambda *_: None})
    return namespace[name]


def name_in(blank_page: str) -> str:
    """The name that a stub's last line checks."""
    return blank_page.rpartition(", ")[2].removesuffix(")")


def solve(q: str):
    """What the solution's source binds when it is run alone."""
    return run(ex.find(q).source, name_in(stub(q)) if q in ALL else "my_r", f"<solution {q}>")


def shown_well(feedback) -> str:
    """The text of a block, which is short and holds no traceback, in HTML too."""
    text, page = repr(feedback), feedback._repr_html_()
    assert "Traceback" not in text + page and 'File "' not in text + page and "site-packages" not in text + page
    assert page.count("<div") == page.count("</div>") and len(text) < 1500 and "red" not in page.split("<b>")[0]
    return text


# --- All exercises ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", ALL)
def test_an_exercise_is_whole(q):
    exercise = ALL[q]
    assert exercise.title and len(exercise.hints) == 3 and len(exercise.wrong) >= 2
    assert exercise.difficulty in (1, 2, 3) and 3 <= exercise.minutes <= 30
    assert len({hint[:40] for hint in exercise.hints}) == len(exercise.hints)
    ast.parse(exercise.source)
    assert exercise.source.strip().splitlines()[-1] in repr(solution(q))


@pytest.mark.parametrize("q", ALL)
def test_the_stub_is_not_tried_yet_and_a_body_without_return_is_named(q):
    blank_page = stub(q)
    assert len(blank_page.splitlines()) < 12 and max(map(len, blank_page.splitlines())) <= 100
    text = shown_well(check(q, run(blank_page, name_in(blank_page))))
    assert text.startswith("not tried yet\n") and ALL[q].title in text
    assert f"difficulty {ALL[q].difficulty} of 3, about {ALL[q].minutes} minutes" in text
    if blank_page.startswith("def"):
        forgotten = run(blank_page.replace("...", "forgotten = 1 + 1"), name_in(blank_page))
        assert shown_well(check(q, forgotten)) == "not yet\n  your function returns None: is `return` missing?"


@pytest.mark.parametrize(("q", "name", "source"), SHIPPED, ids=[q for q, *_ in SHIPPED])
def test_a_cell_as_it_stands_in_its_notebook_is_not_stored(q, name, source):
    feedback = check(q, run(IMPORTED + source, name))
    shown_well(feedback)
    assert feedback.state == "not tried yet"
    assert stub(q).endswith(f'\ncheck("{q}", {name})') and progress.events() == []


def test_every_exercise_stands_in_a_notebook():
    assert {q for q, *_ in SHIPPED} == ALL.keys()


@pytest.mark.parametrize("source", STUBS, ids=[stubs(source)[0][0] for source in STUBS])
def test_make_test_long_puts_each_solution_in_the_place_of_its_stub(source):
    made = solved(source)
    assert [found[:2] for found in stubs(made)] == [found[:2] for found in stubs(source)]
    assert all(ALL[q].source.strip() in made for q, *_ in stubs(source))


@pytest.mark.parametrize("q", ALL)
def test_the_solution_is_right(q):
    assert shown_well(check(q, solve(q))).startswith("right")


@pytest.mark.parametrize(("q", "words"), WRONG)
def test_each_wrong_answer_is_rejected_in_its_words(q, words, monkeypatch):
    """What a check trains is trained for at most two steps here, with FTLAB_FUZZ=2 for as many as in a notebook."""
    if int(os.environ.get("FTLAB_FUZZ", "1")) == 1:
        train = training.train_quietly
        monkeypatch.setattr(training, "train_quietly", lambda trainer, steps: train(trainer, min(steps, 2)))
    feedback = check(q, ALL[q].wrong[words])
    assert feedback.state == ("not tried yet" if words == AS_GIVEN else "not yet") and words in shown_well(feedback)


def test_each_wrong_answer_is_stored_with_what_is_said_of_it():
    assert exercise_snapshot.stored().keys() == set(WRONG)


@pytest.mark.parametrize("q", [q for q in ALL if q not in TRAINS])
def test_what_is_said_of_a_wrong_answer_is_what_is_stored(q):
    """After a change on purpose: read tests/exercise_snapshot.py's list, then let it --write."""
    stored = exercise_snapshot.stored()
    for words in ALL[q].wrong:
        said = exercise_snapshot.says(q, words)
        assert exercise_snapshot.plain(said) == exercise_snapshot.plain(stored[q, words])


@pytest.mark.parametrize("q", [q for q, exercise in ALL.items() if callable(exercise.solution)])
def test_nonsense_is_not_yet(q):
    """What raises, takes no arguments, or returns another type is one short block each, and soon."""

    def raises(*_):
        raise KeyError("cat")

    start, cheap = time.process_time(), (lambda *_: "x", lambda *_: [[1, 2], 3], None, [1], int)
    text = shown_well(check(q, raises))
    assert text.startswith("not yet") and "KeyError: 'cat'" in text and 'of raises: raise KeyError("cat")' in text
    for nonsense in (lambda: 1, lambda *_: object(), 7, *(cheap if q not in TRAINS else ())):
        feedback = check(q, nonsense)
        assert feedback.state == "not yet" or AS_GIVEN in repr(feedback), (nonsense, feedback)
        shown_well(feedback)
    assert time.process_time() - start < 20


def test_the_bare_instruction_is_worth_what_01_2_says():
    rows, _, _, alone = nb01.tidy_notes()
    values = score(
        answers(*nb01.base_model(), [row["prompt"] for row in rows[21:22]], 64), rows[21:22], tidy.scorer
    ).values
    assert len(alone) == len(rows) and values.tolist() == pytest.approx(alone[21:22], abs=1e-4)


# --- Other right answers ----------------------------------------------------------------------------------------------


def gain_by_hand(answer, note, clean):
    """Of the words that were missing, those that came; difflib itself, and no words_right."""
    want = clean.split()

    def right(text):
        blocks = SequenceMatcher(None, text.split(), want, autojunk=False).get_matching_blocks()
        return sum(block.size for block in blocks) / max(len(text.split()), len(want))

    missing = 1.0 - right(note)
    return 1.0 - (1.0 - right(answer)) / missing if missing > 1e-12 else None


def format_by_oneof(reasons):
    """Other words of JSON Schema for the same objects, and strict, as OpenAI's own API wants it."""
    fields = {
        "reason": {"type": "string", "oneOf": [{"const": reason} for reason in reasons]},
        "order_id": {"type": ["string", "null"], "pattern": r"^\d{6}$", "maxLength": 6},
        "quote": {"type": "string", "minLength": 0, "maxLength": 80},
    }
    schema = {"type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def reader_by_recursion(question, passages, limit):
    """The same prompt from the best passage downwards, with an instruction of its own."""

    def taken(rest, room, seen):
        if not rest or ((words := len(rest[0]["text"].split())) > room and rest[0] not in seen):
            return []
        head = [] if rest[0] in seen else [rest[0]]
        return head + taken(rest[1:], room - words * len(head), seen + head)

    pages = ["[{page}] {text}".format(**one) for one in taken(passages, limit, [])]
    if pages:
        user = "\n\n".join([*pages, f"Question: {question}"])
        return [{"role": "system", "content": "Read."}, {"role": "user", "content": user}]


def a_split_by_numpy(rows):
    groups = sorted({row["group"] for row in rows})
    held_out = set(np.random.default_rng(0).choice(groups, len(groups) // 5, replace=False).tolist())
    return [row for row in rows if row["group"] not in held_out], [row for row in rows if row["group"] in held_out]


def a_split_of_a_dict_by_numpy(rows):
    by_group = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    names = np.random.default_rng(0).permutation(sorted(by_group)).tolist()
    n = len(names) // 5
    return tuple([row for name in side for row in by_group[name]] for side in (names[n:], names[:n]))


def a_split_by_a_checksum_of_numpys_groups(rows):
    held = {name for name in np.unique([row["group"] for row in rows]) if zlib.crc32(name.encode()) % 5 == 0}
    return [row for row in rows if row["group"] not in held], [row for row in rows if row["group"] in held]


def absmax_of_shape_1(block, levels):
    return nb03.my_quantize(block, levels)[0], block.abs().amax(0, keepdim=True)


def stored_block_by_block(weights, levels, levels8, block, group):
    """03.2 without a matrix: by loops, in other dtypes."""
    cut = [weights[i : i + block] for i in range(0, len(weights), block)]
    absmax = [part.abs().max() for part in cut]
    codes = [int((x / most - levels).abs().argmin()) for part, most in zip(cut, absmax, strict=True) for x in part]
    packed = [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]
    mean = sum(absmax) / len(absmax)
    left = [most - mean for most in absmax]
    absmax2 = [max(abs(x) for x in left[i : i + group]) for i in range(0, len(left), group)]
    constants = [int((x / absmax2[i // group] - levels8).abs().argmin()) for i, x in enumerate(left)]
    again = [levels8[code] * absmax2[i // group] + mean for i, code in enumerate(constants)]
    read = torch.stack([levels[code] * again[i // block] for i, code in enumerate(codes)])
    found = {"packed": torch.tensor(packed, dtype=torch.uint8), "constants": torch.tensor(constants, dtype=torch.uint8)}
    return found | {"absmax2": torch.stack(absmax2), "mean": mean, "read": read}


def down_the_ladder_by_ifs(model, card, step):
    """03.5 with a list that grows, the verdict by hand, and every way to cut the rows tried."""
    from ftlab import memory

    def fits(settings):
        total = memory.gpus()[card].memory_bytes
        peak = memory.estimate(model, card=total, **settings).peak_bytes
        return peak * memory.margin()["ratio"] <= memory.gpus()[card].usable_bytes

    def cut(rows):  # into so many passes that each has `rows`
        return {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": rows_a_step // rows,
        }

    rows_a_step = step["per_device_train_batch_size"] * step["gradient_accumulation_steps"]
    if fits(step):
        return ["fits", dict(step)]
    changes = [("bf16", {"dtype": "bfloat16"})]
    changes.append(("checkpointing", {"gradient_checkpointing": True}))
    changes.append(("one row", cut(1)))
    changes.append(("4 bits", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}))
    changes.append(("paged", {"optim": "paged_adamw_8bit"}))
    changes.append(("half", {"max_length": step["max_length"] // 2}))
    for last in range(1, len(changes) + 1):
        now = dict(step)
        for _, change in changes[:last]:
            now.update(change)
        if fits(now):
            sizes = [rows for rows in (1, 2, 4, 8, 16, 32) if rows <= rows_a_step]
            return [changes[last - 1][0], now | cut(max(n for n in sizes if fits(now | cut(n))))]
    return ["larger card", now]


def reinforce_token_by_token(logps, rewards, baseline, mask):
    """Each token with its answer's advantage, then a sum over all of them."""
    advantages = rewards.clone()
    advantages -= baseline.detach() if torch.is_tensor(baseline) else baseline
    return -sum(logps[i, t] * advantages[i] for i, t in mask.nonzero().tolist()) / len(rewards)


def reinforce_in_float64(logps, rewards, baseline, mask):
    with torch.no_grad():
        advantages = rewards.double() - baseline
    return torch.einsum("b,bt,bt->", advantages, logps.double(), mask.double()) / -len(mask)


def reinforce_as_ppo_s_first_step(logps, rewards, baseline, mask):
    """The gradient is that of -A * ratio at ratio 1; the value is put right."""
    advantages, log_prob = (rewards - baseline).detach(), logps.masked_fill(mask == 0, 0).sum(1)
    ratio = (log_prob - log_prob.detach()).exp()
    return -(advantages * (ratio - 1 + log_prob.detach())).mean()


def gae_by_the_sum(rewards, values, mask, gamma, lam):
    """The double sum of Schulman et al. 2015, Eq. 16, in plain numbers."""
    found = []
    for r, v, m in zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True):
        n, v = sum(m), [*v[: sum(m)], 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        found.append([sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)])
        found[-1] += [0.0] * (len(m) - n)
    advantages = torch.tensor(found)
    return advantages, (advantages + values) * mask


def gae_row_by_row(rewards, values, mask, gamma, lam):
    """As a weighted mean of returns: the return is r + gamma * ((1 - lam) * next value + lam * next return)."""
    returns = torch.zeros_like(values)
    for b in range(len(mask)):
        after, value = 0.0, 0.0
        for t in reversed(range(int(mask[b].sum()))):
            after = rewards[b, t] + gamma * ((1 - lam) * value + lam * after)
            returns[b, t], value = after, values[b, t]
    return [(returns - values).where(mask.bool(), 0), returns]


def ppo_by_selection(logps, old_logps, advantages, mask, clip_eps=0.2):
    kept = mask.bool()
    ratio, A = torch.exp(logps[kept] - old_logps[kept]), advantages[kept]
    bound = torch.where(A > 0, (1 + clip_eps) * A, (1 - clip_eps) * A)  # the PPO-clip form of OpenAI's Spinning Up
    return -torch.minimum(ratio * A, bound).mean()


def grpo_answer_by_answer(logps, old_logps, ref_logps, advantages, mask, clip_eps, beta):
    total = 0 * logps.sum()
    for row in zip(logps, old_logps, ref_logps, advantages, mask, strict=True):
        now, old, ref, advantage, counts = row
        if counts.any():
            now, old, ref = now[counts > 0], old[counts > 0], ref[counts > 0]
            ratio = (now - old).exp()
            objective = torch.stack([ratio, ratio.clip(1 - clip_eps, 1 + clip_eps)]) * advantage
            total = total + (beta * (torch.expm1(ref - now) - ref + now) - objective.amin(0)).mean()
    return total / len(mask)


def grpo_by_hand_made_clips(logps, old_logps, ref_logps, advantages, mask, clip_eps, beta):
    """The case of each sign by itself, in float64."""
    now, old, ref, A = (x.double() for x in (logps, old_logps, ref_logps, advantages[:, None].expand_as(logps)))
    ratio = (now - old).exp()
    gain = torch.where(A > 0, A * ratio.clamp(max=1 + clip_eps), A * ratio.clamp(min=1 - clip_eps))
    kl = (ref - now).exp() - (ref - now) - 1
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return (weights * (beta * kl - gain)).sum()


def advantages_in_a_loop(rewards, num_generations):
    found, rewards = [], rewards.tolist()
    for i in range(0, len(rewards), num_generations):
        group = rewards[i : i + num_generations]
        found += [(reward - statistics.mean(group)) / (statistics.stdev(group) + 1e-4) for reward in group]
    return found


def advantages_in_float64(rewards, num_generations):
    return nb04.my_group_advantages(rewards.double(), num_generations)


def the_first_of_the_best(golds, order):
    return golds.index(max(golds)), golds.index(min(golds))


def generates(call):
    """nb05.my_answer, with generate called by call(model, ids)."""

    def answer(model, tokenizer, messages):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        return tokenizer.decode(call(model, ids)[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


def a_loop_that_ends_without_pairs(model, rows, rounds, answer, train):
    for _ in range(rounds):
        own = [answer(model, [row["prompt"]])[0] for row in rows]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": [{"role": "assistant", "content": text}]}
            for row, text in zip(rows, own, strict=True)
            if row["chosen"][0]["content"] != text
        ]
        if not pairs:
            break
        model = train(model, pairs)
    return model


def one_list_for_all_rounds(model, rows, rounds, answer, train):
    pairs = []

    def keep(model, new):
        pairs.clear()
        pairs.extend(new)
        return train(model, pairs)

    return nb06.my_spin(model, rows, rounds, answer, keep)


def the_last_key_first(config, top, inner):
    return nb08.my_dropped_keys(config, top, inner)[::-1]


def a_split_by_sorted_groups(rows):
    groups = sorted({row["group"] for row in rows})
    random.Random(0).shuffle(groups)
    held_out = groups[: len(groups) // 5]
    return [row for row in rows if row["group"] not in held_out], [row for row in rows if row["group"] in held_out]


def a_reward_of_named_columns(*, completions, gold, **kwargs):
    return nb07.my_reward(completions, gold)


def softplus_dpo(pi_w, pi_l, ref_w, ref_l, beta):
    return softplus(beta * (pi_l - pi_w) - beta * (ref_l - ref_w))


def dpo_pair_by_pair(pi_w, pi_l, ref_w, ref_l, beta):
    return [softplus_dpo(*pair, beta) for pair in zip(pi_w, pi_l, ref_w, ref_l, strict=True)]


def logps_by_cross_entropy(logits, input_ids, completion_mask):
    each, targets = logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    losses = cross_entropy(each, targets, reduction="none")
    return -losses.view(len(logits), -1).where(completion_mask[:, 1:].bool(), 0).sum(1)


def odds_in_float64(chosen, rejected, lam):
    ratio = [x.double().exp() / (1 - x.double().exp()) for x in (chosen, rejected)]
    return -chosen - lam * torch.log(ratio[0] / (ratio[0] + ratio[1]))


def odds_clamped(chosen, rejected, lam):
    """Finite near 1, though not exact there: p is at most 1 - 1e-7."""
    p, q = (x.exp().clamp(max=1 - 1e-7) for x in (chosen, rejected))
    return -chosen + lam * softplus((q / (1 - q)).log() - (p / (1 - p)).log())


def kto_by_signs(policy_logps, ref_logps, desirable, z0, beta):
    signs = 2 * desirable.float() - 1
    return torch.sigmoid(-signs * beta * (policy_logps - ref_logps - z0))


def cispo_by_selection(logps, old_logps, advantages, mask, eps_max):
    """Token by token; the weight is a number without a gradient."""
    losses = []
    for b, t in mask.nonzero().tolist():
        weight = min(math.exp(logps[b, t].item() - old_logps[b, t].item()), eps_max)
        losses.append(-weight * advantages[b] * logps[b, t])
    return torch.stack(losses).mean()


def the_stop_by_a_pattern(completions, gold, **kwargs):
    pattern = re.compile(r"(?:[^<]*<think>[^<]*</think>)?([^<]*)")
    found = [pattern.fullmatch(completion[0]["content"]) for completion in completions]
    return [float(bool(one) and one[1].strip() == stop) for one, stop in zip(found, gold, strict=True)]


def kl_by_torch(student_logits, teacher_logits, mask):
    with torch.no_grad():
        teacher = teacher_logits.log_softmax(-1)
    student = student_logits.log_softmax(-1)
    return kl_div(teacher, student, log_target=True, reduction="none").sum(-1)[mask.bool()].mean()


def ddp_loss_by_shares(token_losses, counts):
    return torch.dot(token_losses, torch.full_like(token_losses, len(counts) / sum(counts)))


def raises_an_error_of_its_own(say, tools, messages, most=4):
    class NoAnswerError(RuntimeError):
        pass

    talk = [*messages]
    for _ in range(most):
        talk += [reply := say(talk)]
        calls = reply.get("tool_calls", ())
        if not calls:
            return talk
        for call in calls:
            name = call["function"]["name"]
            content = f"Error: {name} is not one of {list(tools)}"
            if name in tools:
                try:
                    content = tools[name](**json.loads(call["function"]["arguments"]))
                except (TypeError, json.JSONDecodeError):
                    content = "Error: wanted JSON with a query"
            said = {"role": "tool", "name": name, "content": content}
            talk.append(said | {"tool_call_id": call["id"]})
    raise NoAnswerError


def saves_and_asks(load, say=None):
    """nb00.my_save_and_ask, with the adapter loaded by load(base, folder) and asked by say."""

    def answer(model, tokenizer, base, folder, question):
        model.save_pretrained(folder)
        messages = nb00._messages(question)
        if say:
            return say(load(base, folder), tokenizer, messages)
        how = {"add_generation_prompt": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template([messages], **how)
        output = load(base, folder).generate(**inputs, max_new_tokens=80)
        new = output[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)[0]

    return answer


def by_its_own_config(base, folder):
    return AutoPeftModelForCausalLM.from_pretrained(folder)


def merged_when_loaded(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def by_transformers(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(folder)
    return model


def asked_through_ftlab(model, tokenizer, messages):
    return answers(model, tokenizer, [messages])[0]


def saves_with_the_tokenizer(model, tokenizer, base, folder, question):
    tokenizer.save_pretrained(folder)
    return nb00.my_save_and_ask(model, tokenizer, base, folder, question)


RIGHT = [  # number, answer, how often it is checked: the inputs are fresh each time
    ("00.1", saves_and_asks(by_its_own_config), 1),
    ("00.1", saves_and_asks(merged_when_loaded), 1),
    ("00.1", saves_and_asks(by_transformers), 1),
    ("00.1", saves_and_asks(merged_when_loaded, asked_through_ftlab), 1),
    ("00.1", saves_with_the_tokenizer, 1),
    ("01.1", gain_by_hand, 3),
    ("01.3", format_by_oneof, 3),
    ("01.4", reader_by_recursion, 3),
    ("03.1", absmax_of_shape_1, 1),
    ("03.2", stored_block_by_block, 2),
    ("03.4", nb03._merger(dtype="bfloat16"), 1),
    ("03.5", down_the_ladder_by_ifs, 2),
    ("04.1", reinforce_token_by_token, 10),
    ("04.1", reinforce_in_float64, 10),
    ("04.1", reinforce_as_ppo_s_first_step, 10),
    ("04.2", gae_by_the_sum, 10),
    ("04.2", gae_row_by_row, 10),
    ("04.3", ppo_by_selection, 10),
    ("04.4", advantages_in_a_loop, 10),
    ("04.4", advantages_in_float64, 10),
    ("04.5", grpo_answer_by_answer, 10),
    ("04.5", grpo_by_hand_made_clips, 10),
    ("04.6", logps_by_cross_entropy, 3),
    ("04.7", softplus_dpo, 3),
    ("04.7", dpo_pair_by_pair, 3),
    ("06.1", odds_in_float64, 3),
    ("06.1", odds_clamped, 3),
    ("06.2", kto_by_signs, 3),
    ("07.2", cispo_by_selection, 3),
    ("07.3", the_stop_by_a_pattern, 3),
    ("07.4", kl_by_torch, 3),
    ("08.4", raises_an_error_of_its_own, 3),
    ("09.2", ddp_loss_by_shares, 3),
    ("09.3", nb09.MY_CONFIG.split('"""')[1].replace("'no'", "bf16"), 1),
    ("04.8", nb04_preferences.dpo_trainer(partial(training.preference_pairs, pick=the_first_of_the_best)), 4),
    ("05.5", generates(lambda model, ids: model.generate(ids, max_new_tokens=16, do_sample=False)), 1),
    ("05.5", generates(lambda model, ids: model.generate(inputs=ids, max_new_tokens=16, do_sample=False)), 1),
    ("06.3", a_loop_that_ends_without_pairs, 20),
    ("06.3", one_list_for_all_rounds, 3),
    ("07.1", a_reward_of_named_columns, 1),
    ("08.2", the_last_key_first, 1),
    ("10.1", a_split_by_sorted_groups, 10),
    ("10.1", a_split_by_numpy, 10),
    ("10.1", a_split_of_a_dict_by_numpy, 10),
    ("10.1", a_split_by_a_checksum_of_numpys_groups, 10),
]


@pytest.mark.parametrize(("q", "answer", "times"), RIGHT, ids=[f"{q}-{k}" for k, (q, *_) in enumerate(RIGHT)])
def test_an_answer_unlike_the_solution_is_right_too(q, answer, times, monkeypatch):
    monkeypatch.setattr(training, "train_quietly", lambda *_: None)  # what is built counts here
    monkeypatch.setattr(training, "log_ratio_gap", lambda *_: 2.0)
    for _ in range(times):
        assert shown_well(check(q, answer)).startswith("right")


def test_an_interval_without_draws_is_right_and_said_to_be_one():
    def formula(a, b, n_boot=2000, seed=0):
        differences = [x - y for x, y in zip(a, b, strict=True)]
        mean, error = statistics.mean(differences), statistics.stdev(differences) / len(a) ** 0.5
        return mean, mean - 1.96 * error, mean + 1.96 * error

    feedback = check("05.3", formula)
    assert feedback.right and nb05.FORMULA in shown_well(feedback)
    assert nb05.FORMULA not in repr(check("05.3", nb05.my_paired_interval))


def by_scipy(method):
    def interval(a, b, n_boot=2000, seed=0):
        from scipy import stats

        differences, rng = np.array(a) - np.array(b), np.random.default_rng(seed)
        found = stats.bootstrap([differences], np.mean, n_resamples=n_boot, method=method, rng=rng)
        return differences.mean(), *found.confidence_interval

    return interval


def student(a, b, n_boot=2000, seed=0):
    from scipy import stats

    differences = np.array(a) - np.array(b)
    return [differences.mean(), *stats.ttest_1samp(differences, 0).confidence_interval()]


def by_a_thousand_draws(a, b, n_boot=2000, seed=0):
    differences, rng = [x - y for x, y in zip(a, b, strict=True)], random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(differences, k=len(a))) for _ in range(1000))
    return statistics.fmean(differences), means[25], means[974]


def by_weights(a, b, n_boot=2000, seed=0):
    """The Bayesian bootstrap."""
    differences = np.array(a) - np.array(b)
    means = np.random.default_rng(seed).dirichlet(np.ones(len(a)), n_boot) @ differences
    return differences.mean(), *np.quantile(means, [0.025, 0.975])


INTERVALS = {
    "percentile": by_scipy("percentile"),
    "basic": by_scipy("basic"),
    "BCa": by_scipy("BCa"),
    "Student": student,
    "1,000 draws": by_a_thousand_draws,
    "Bayesian": by_weights,
}


@pytest.mark.parametrize("kind", INTERVALS)
def test_any_right_interval_is_right(kind):
    for _ in range(4):
        assert check("05.3", INTERVALS[kind]).right


def drawn_without_end(a: list, b: list) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of all draws of differences of -1, 0 and 1: their exact distribution."""
    differences, of_sums = np.subtract(a, b), np.ones(1)
    for _ in a:
        of_sums = np.convolve(of_sums, [(differences == value).mean() for value in (-1, 0, 1)])
    low, high = np.searchsorted(of_sums.cumsum(), [0.025, 0.975]) - len(a)
    return low / len(a), high / len(a)


def test_the_draws_and_the_formula_of_compare_agree_once_both_have_one_question_more_on_either_side():
    """All 105 pairs of runs in experiments/ask. Means move in steps of a question, so bounds differ by one or so."""
    lines = (EXPERIMENTS / "ask" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = list(itertools.combinations([json.loads(line)["right"] for line in lines], 2))
    assert len(pairs) == 105
    apart = []
    for a, b in pairs:
        exact, formula = drawn_without_end(a, b), compare(Score.of(a), Score.of(b))
        _, *drawn = nb05.my_paired_interval(a, b, 20_000)
        assert np.abs(np.subtract(drawn, exact)).max() < 1.01 / len(a)  # the Monte Carlo error, at most one step
        more = drawn_without_end([*a, 1, 0], [*b, 0, 1])
        assert np.abs(np.subtract(more, (formula.low, formula.high))).max() < 1.25 / len(a)
        assert abs(formula.low + formula.high) <= abs(sum(exact)) + 1e-12  # its middle is nearer to 0
        apart.append(np.abs(np.subtract(exact, (formula.low, formula.high))).max())
    assert 0.01 < max(apart) < 0.02  # as the solution says


@pytest.mark.parametrize("z", [1.64, 2.33])
def test_an_interval_of_another_level_is_not_right(z):
    def formula(a, b, n_boot=2000, seed=0):
        differences = np.array(a) - np.array(b)
        reach = z * differences.std(ddof=1) / len(a) ** 0.5
        return differences.mean(), differences.mean() - reach, differences.mean() + reach

    for _ in range(4):
        assert not check("05.3", formula).right


def test_the_rows_may_be_shuffled(monkeypatch):
    monkeypatch.setattr(nb05, "training_slip", lambda *_: None)  # what is built counts here

    def shuffled(*given):
        trainer = solve("05.4")(*given)
        trainer.train_dataset = trainer.train_dataset.shuffle()
        return trainer

    assert check("05.4", shuffled).right


@pytest.mark.parametrize("cleaned", [0, 1, 40])
def test_a_prompt_must_do_more_than_an_untouched_note(cleaned, monkeypatch):
    """In SmolLM2's place: what repeats the notes, but for the first so many, which it cleans up."""
    rows = nb01.tidy_notes()[0]

    def answered(model, tokenizer, prompts, *_, **__):
        texts = [prompt[-1]["content"] for prompt in prompts]
        for i, row in enumerate(rows[:cleaned]):
            texts[i] = row["completion"][0]["content"]
        return texts

    monkeypatch.setattr("ftlab.evaluate.answers", answered)
    monkeypatch.setattr(nb01, "base_model", lambda: (None, None))
    feedback = check("01.2", nb01.my_prompt)
    assert feedback.right == (cleaned > 0) and "untouched" in shown_well(feedback)
    assert ("the model repeats the note" in repr(feedback)) == (cleaned == 0)


# --- Other wrong answers ----------------------------------------------------------------------------------------------


def forgets_to_subtract(answer, note, clean):
    before = tidy.words_right(note, clean)
    return None if before == 1 else tidy.words_right(answer, clean) / (1 - before)


def cuts_the_schema_off(reasons):
    """One bracket too early: the keys stand outside of "properties"."""
    told = nb01.my_format(reasons)
    told["json_schema"]["schema"]["properties"] = {}
    return told


def asks_with_an_empty_page(question, passages, limit):
    return nb01.my_reader(question, passages, limit) or [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": f"Question: {question}"},
    ]


def stacks_rows_at_equal_ranks(A1, B1, scaling1, A2, B2, scaling2, use_rslora):
    A, B, lora_alpha = nb02.my_sum(A1, B1, scaling1, A2, B2, scaling2, use_rslora)
    return A, torch.cat([scaling1 * B1, scaling2 * B2]) if len(A1) == len(A2) else B, lora_alpha


def the_sum_at_full_rank(A1, B1, scaling1, A2, B2, scaling2, use_rslora):
    import torch

    r = A1.shape[1]
    return torch.eye(r), scaling1 * B1 @ A1 + scaling2 * B2 @ A2, r**0.5 if use_rslora else r


def loads_with_another_error(model, state):
    try:
        return nb02.my_load(model, state)
    except ValueError as error:
        raise KeyError("lora_A") from error


def copies_into_a_name(model, state):
    copied = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    nb02.my_load(model, state)
    for name, weight in model.named_parameters():
        weight.data = copied[name]
    return model


def takes_an_answer_by_the_system(row):
    if len(row.get("completion") or []) == 1 and row["completion"][0]["role"] == "system":
        row = {**row, "completion": [{**row["completion"][0], "role": "assistant"}]}
    return nb05.my_check(row)


def knows_an_opening_by_its_last_two_ids(input_ids, opening, end):
    mask, inside = [], False
    for t, token in enumerate(input_ids):
        mask.append(int(inside))
        inside = (inside and token != end) or (t > 0 and input_ids[t - 1 : t + 1] == opening[-2:])
    return mask


class ForRowsAlone(nn.Module):
    """The layer's forward pass for inputs (N, in), and with a bias."""

    def __init__(self, base_layer, r, lora_alpha=16, lora_dropout=0.0):
        super().__init__()
        self.base_layer, self.scaling = base_layer.requires_grad_(False), lora_alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, base_layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.lora_dropout = nn.Dropout(lora_dropout)

    def forward(self, x):
        return self.base_layer(x) + self.scaling * (self.lora_B @ (self.lora_A @ self.lora_dropout(x).T)).T


def lora_of_ones(*arguments):
    layer = LoRALinear(*arguments)
    nn.init.ones_(layer.lora_A)
    return layer


def lora_of(made, applied):
    """The layer with A and B as made(weight); applied(x, what was made) is the product with one of them."""

    def build(*arguments):
        layer = LoRALinear(*arguments)
        for name in ("lora_A", "lora_B"):
            weight = getattr(layer, name).detach()
            delattr(layer, name)
            setattr(layer, name, made(weight))
        layer.forward = lambda x: (
            layer.base_layer(x) + layer.scaling * applied(applied(layer.lora_dropout(x), layer.lora_A), layer.lora_B)
        )
        return layer

    return build


def as_linear(weight):
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data = weight
    return linear


lora_of_tensors = lora_of(lambda weight: weight.clone().requires_grad_(), lambda x, A: x @ A.T)
lora_of_linears = lora_of(as_linear, lambda x, A: A(x))
lora_transposed = lora_of(lambda weight: nn.Parameter(weight.T.clone()), lambda x, A: x @ A)


def answers_without_generate(model, tokenizer, messages):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (new,) = Decoder(model).generate([ids], 16, tokenizer.eos_token_id)
    return tokenizer.decode(new, skip_special_tokens=True)


def counts_the_tensors(model, state):
    own = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    if len(state) != len(own):
        raise ValueError("another number of tensors")
    for name, weight in own.items():
        weight.data.copy_(state[f"base_model.model.{name}.weight"])
    return model


def demands_a_system_message(row):
    roles = [message["role"] for message in row.get("prompt") or []]
    return nb05.my_check(row) or (None if roles == ["system", "user"] else "no system message")


def by_position(answers, golds, **kwargs):
    return nb07.my_reward(answers, golds, **kwargs)


def right_for_any_prompt(completions, gold, **kwargs):
    return [float(any(ask.is_right(c[0]["content"], query) for query in gold)) for c in completions]


def names_of_groups(rows):
    return [sorted({row["group"] for row in side}) for side in nb10.my_split(rows)]


def an_unsorted_split_by_numpy(rows):
    groups = list({row["group"] for row in rows})
    kept = set(np.random.default_rng(0).permutation(groups)[len(groups) // 5 :].tolist())
    return [row for row in rows if row["group"] in kept], [row for row in rows if row["group"] not in kept]


def one_row_twice(rows):
    train, test = nb10.my_split(rows)
    return [*train[1:], train[-1]], test


def without_a_gradient(token_losses, counts):
    return nb09.my_loss(token_losses, counts).item()


def stops_with_a_key_error(say, tools, messages, most=4):
    reply = say(messages)
    return reply["calls"]


def saves_the_tokenizer_alone(model, tokenizer, base, folder, question):
    tokenizer.save_pretrained(folder)
    return nb00._without_adapter(model, tokenizer, base, "elsewhere", question)


def puts_it_onto_a_fresh_adapter(model, tokenizer, base, folder, question):
    model.save_pretrained(folder)
    fresh = AutoModelForCausalLM.from_pretrained(base)
    fresh = get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM"))
    return nb00._answer(PeftModel.from_pretrained(fresh, folder), tokenizer, question)


def switches_the_adapter_off(model, tokenizer, base, folder, question):
    loaded = nb00._loaded(model, base, folder)
    with loaded.disable_adapter():
        return nb00._answer(loaded, tokenizer, question)


OTHER_WRONG = [  # number, answer, a word of what is said
    ("00.1", saves_the_tokenizer_alone, "these files aren't an adapter"),
    ("00.1", puts_it_onto_a_fresh_adapter, "load a fresh base first"),
    ("00.1", switches_the_adapter_off, "this is the base model's answer"),
    ("01.1", forgets_to_subtract, "wanted"),
    ("01.3", cuts_the_schema_off, "wanted"),
    ("01.4", asks_with_an_empty_page, "nobody asks the model to guess"),
    ("02.1", lora_of_tensors, "the parameters {}"),
    ("02.1", lora_of_linears, "the parameters {'lora_A.weight': (1, 3), 'lora_B.weight': (2, 1)}"),
    ("02.1", lora_transposed, "the parameters {'lora_A': (3, 1), 'lora_B': (1, 2)}"),
    ("02.1", ForRowsAlone, "RuntimeError"),
    ("02.1", lora_of_ones, "random numbers"),
    ("02.2", lambda *inputs: nb02.my_sum(*inputs)[:2], "not A, B and lora_alpha"),
    ("02.2", stacks_rows_at_equal_ranks, "B's columns must be A's rows"),
    ("02.4", counts_the_tensors, "under another name"),
    ("05.1", demands_a_system_message, "a good row is refused"),
    ("05.5", answers_without_generate, "model.generate was not called"),
    ("07.1", by_position, "golds"),
    ("07.1", right_for_any_prompt, "wanted"),
    ("09.2", without_a_gradient, "without a gradient"),
    ("08.4", stops_with_a_key_error, "line 3 of stops_with_a_key_error: return reply"),
    ("09.3", nb09.MY_CONFIG.split('"""')[1].replace("'no'", "fp16"), "mixed_precision was right"),
    ("09.3", {"num_machines": 2}, "the text of a YAML file"),
    ("09.3", nb09.MY_CONFIG.split('"""')[1] + "fsdp_offload_params: true\n", "refuses a key"),
    ("10.1", one_row_twice, "each row once"),
    ("10.1", an_unsorted_split_by_numpy, "sort the groups"),
    ("10.1", names_of_groups, "two lists of rows"),
    ("02.2", the_sum_at_full_rank, "rows of A"),
    ("02.3", nb02.trainer(lora={"rank_pattern": {"down_proj": 30}}), "over the budget"),
    ("02.4", loads_with_another_error, "KeyError"),
    ("02.4", copies_into_a_name, "copy each tensor"),
    ("05.1", takes_an_answer_by_the_system, "the system passes"),
    ("08.3", knows_an_opening_by_its_last_two_ids, "got"),
]


@pytest.mark.parametrize(
    ("q", "answer", "words"), OTHER_WRONG, ids=[f"{q}-{k}" for k, (q, *_) in enumerate(OTHER_WRONG)]
)
def test_a_wrong_answer_that_is_easily_taken_for_right_is_not(q, answer, words):
    for _ in range(5):
        feedback = check(q, answer)
        assert feedback.state == "not yet" and words in shown_well(feedback), feedback


def test_a_layer_that_adds_in_another_order_is_right():
    """x (B A)^T for (x A^T) B^T: equal on paper. Where an output nearly cancels, float32 lets the two
    differ by more than the check allows, which it did at 6 of these 60 seeds with float32 inputs.
    """

    def forward(layer, x):
        merged = layer.scaling * layer.lora_B @ layer.lora_A
        return layer.lora_dropout(x) @ merged.T + layer.base_layer(x)

    for seed in range(60):
        with exercise_snapshot.same_draws(seed):
            assert nb02._layer_slip(nb02._layer(forward)) is None, seed


def an_8b(**changes):
    return lambda: nb02.my_settings() | changes


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DEFENDED = [  # what else can be set for the job of 02.5, and a word of the remark
    ({}, "46 hours"),
    ({"r": 20}, "a little below the rank rule"),  # by hand: 20 x 2,621,440 = 52.4 million, half is 50
    ({"r": 128, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, "hours"),
    ({"target_modules": ["gate_proj", "up_proj", "down_proj"]}, "Without attention"),
    ({"target_modules": r".*\.(self_attn|mlp)\..*_proj"}, "hours"),
    ({"lora_alpha": 64, "learning_rate": 5e-5}, "as strong as alpha 32 at 0.0001"),
    ({"lora_alpha": 128, "learning_rate": 2e-4}, "try weaker ones"),
    ({"warmup_steps": 0}, "No warm-up"),
    ({"warmup_steps": 1_000}, "hours"),
    ({"num_train_epochs": 0.5}, "100,000 rows"),
    ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "noisy"),
]
MALFORMED = [
    ("a class", "nine keys"),
    ([], "the list []"),
    ({}, "no r"),
    (nb02.my_settings() | {"r": 64.0}, "r=64.0"),
    (nb02.my_settings() | {"r": True}, "r=True"),
    (nb02.my_settings() | {"lora_alpha": 0}, "lora_alpha=0"),
    (nb02.my_settings() | {"learning_rate": float("nan")}, "learning_rate=nan"),
    (nb02.my_settings() | {"learning_rate": "1e-4"}, "learning_rate='1e-4'"),
    (nb02.my_settings() | {"warmup_steps": -1}, "0 or more"),
    (nb02.my_settings() | {"load_in_4bit": 1}, "True or False"),
    (nb02.my_settings() | {"target_modules": "("}, "adapters on []"),
    (nb02.my_settings() | {"target_modules": None}, "adapters on []"),
    (nb02.my_settings() | {"target_modules": ATTENTION, "r": 512}, "won't make up"),
    (nb02.my_settings() | {"r": 19}, "49.8 million"),
]


@pytest.mark.parametrize(("changes", "words"), DEFENDED)
def test_settings_of_an_8b_that_can_be_defended_are_right(changes, words):
    feedback = check("02.5", an_8b(**changes))
    assert feedback.right and words in shown_well(feedback), feedback


@pytest.mark.parametrize(("settings", "words"), MALFORMED)
def test_settings_of_an_8b_that_cannot_be_read_or_store_too_little_are_named(settings, words):
    feedback = check("02.5", lambda: settings)
    assert feedback.state == "not yet" and words in shown_well(feedback), feedback


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("r", [64, 128])
def test_a_pass_of_an_8b_is_refused_exactly_if_the_memory_calculator_says_so(rows, r):
    settings = {"r": r, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 32 // rows}
    step = memory.estimate(
        "Llama-3.1-8B", max_length=2_000, padded=rows > 1, load_in_4bit=True, bnb_4bit_use_double_quant=True, **settings
    )
    fits = step.peak_bytes <= 0.85 * 16 * 2**30
    feedback = check("02.5", an_8b(**settings))
    assert feedback.right == (fits and rows > 1), feedback
    assert ("out of memory" in repr(feedback)) == (not fits)


def test_a_pair_too_far_apart_for_log_sigmoid_is_named():
    def log_of_sigmoid(*inputs):
        return -torch.log(torch.sigmoid(nb04_preferences._right_gap(*inputs)))

    pair = (*(torch.tensor([logp]) for logp in (-100.0, -5.0, -5.0, -5.0)), 1.0)  # sigmoid(-95) is 0, exp(-95) is not
    slip = first_difference(log_of_sigmoid, nb04_preferences.my_dpo_loss, lambda rng: pair, nb04_preferences.LOSSES)
    assert slip.got == "[inf] (shape (1,))" and "logsigmoid instead of log(sigmoid)" in slip.likely


# --- Losses of 04 against what is not code of the course --------------------------------------------------------------

EXAMPLES = [  # the worked examples of the cells, and what is worked out by hand
    ("04.1", ([[-1.0, -2], [-1, -4]], [1.0, 0], 0.5, [[1, 1], [1, 0]]), 0.5),
    ("04.2", ([[0.0, 1, 9]], [[0.5, 0.8, 9]], [[1, 1, 0]], 0.9, 0.5), ([[0.31, 0.2, 0]], [[0.81, 1, 0]])),
    ("04.3", (np.log([[0.5, 1.5, 1]]), np.zeros((1, 3)), np.ones((1, 3)), [[1, 1, 0]], 0.2), -0.85),
    ("04.4", ([1.0, 2, 3, 6], 4), [-0.926, -0.463, 0, 1.389]),
    (
        "04.5",
        (*np.log([[[0.3, 0.5, 0.9]], [[0.2, 0.5, 0.1]], [[0.3, 0.25, 0.1]]]), [1.0], [[1, 1, 0]], 0.2, 0.1),
        -1.0903,
    ),
    ("04.7", ([-10.0], [-14.0], [-12.0], [-13.0], 0.1), [0.5544]),
]


@pytest.mark.parametrize(("q", "inputs", "wanted"), EXAMPLES, ids=[q for q, *_ in EXAMPLES])
def test_the_worked_example_of_a_cell_is_right(q, inputs, wanted):
    found = ALL[q].solution(*(torch.tensor(x) if isinstance(x, list | np.ndarray) else x for x in inputs))
    assert same(found, wanted, rtol=0, atol=6e-4)


def two_tokens(theta):
    """The log-prob of every answer of two of three tokens, (9, 2): the second one's depends on the first."""
    first = theta[0].log_softmax(0)
    second = theta[1:].log_softmax(1)
    return torch.stack([torch.stack([first[a], second[a, b]]) for a in range(3) for b in range(3)])


@pytest.mark.parametrize("length", [2, 1])
def test_reinforce_is_unbiased_with_any_baseline(length):
    """By enumeration: over all answers, the mean gradient is minus that of the expected reward. Answers of one token
    have garbage in the second place.
    """
    torch.manual_seed(0)
    theta = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, int(length == 2)]])
    rewards = torch.randn(9, dtype=torch.float64)
    rewards = rewards if length == 2 else rewards[::3].repeat_interleave(3)  # of the first token alone
    logps = two_tokens(theta)
    (exact,) = torch.autograd.grad(logps.sum(1).exp() @ rewards, theta)
    for baseline in (0.0, 3.5, torch.tensor([-2.0], dtype=torch.float64)):
        mean = torch.zeros_like(theta)
        for i, probability in enumerate(logps.detach().sum(1).exp()):
            loss = nb04.my_reinforce_loss(two_tokens(theta)[i : i + 1], rewards[i : i + 1], baseline, mask)
            mean += probability * torch.autograd.grad(loss, theta)[0]
        torch.testing.assert_close(mean, -exact)


def test_gae_is_that_of_the_course_and_an_empty_answer_gives_zeros():
    from ftlab.scratch.rl import gae

    for seed in range(20):
        rewards, values, mask, gamma, lam = nb04._critic(random.Random(seed))
        kept = mask.sum(1) > 0
        ours = nb04.my_gae(rewards, values, mask, gamma, lam)
        for mine, theirs in zip(ours, gae(rewards[kept], values[kept], mask[kept], gamma, lam), strict=True):
            torch.testing.assert_close(mine[kept], theirs)
            assert not mine[~kept].any() and not mine[mask == 0].any()


@pytest.mark.parametrize("seed", range(5))
def test_on_the_first_step_ppo_and_grpo_have_reinforces_gradient(seed):
    """With the ratio at 1 and no KL: per answer of n tokens GRPO's is 1 / n of REINFORCE's."""
    logps, _, _, mask = nb04._rollout(random.Random(seed))
    logps, lengths = logps.requires_grad_(), mask.sum(1)
    A = torch.linspace(-1, 2, len(logps))
    old = logps.detach()

    def slope(loss):
        return torch.autograd.grad(loss, logps)[0]

    per_answer = slope(nb04.my_reinforce_loss(logps, A, 0.0, mask))
    grpo = slope(nb04.my_grpo_loss(logps, old, old, A, mask, 0.2, 0.3))  # k3's gradient is 0 at the reference
    torch.testing.assert_close(grpo * lengths[:, None], per_answer)
    ppo = slope(nb04.my_ppo_loss(logps, old, A[:, None].expand_as(logps), mask))
    torch.testing.assert_close(ppo * mask.sum(), per_answer * len(logps))


DRAWS = {
    "04.1": nb04._samples,
    "04.2": nb04._critic,
    "04.3": nb04._tokens,
    "04.5": nb04._answers,
}


@pytest.mark.parametrize("q", DRAWS)
def test_masks_have_several_lengths_padding_and_often_an_empty_answer(q):
    at = list(inspect.signature(ALL[q].solution).parameters).index("mask")
    rng, lengths = random.Random(0), []
    for _ in range(200):
        mask = DRAWS[q](rng)[at]
        lengths.append(mask.sum(1).tolist())
        assert (mask.diff(dim=1) <= 0).all() and (mask == 0).any()  # padding on the right
    assert 60 < sum(0 in each for each in lengths) < 140
    assert {0, 1, 2, 3, 4, 5} == {n for each in lengths for n in each}


TELLS = {  # exercise -> wrong answers that few inputs tell apart from the right one
    "04.1": nb04.REINFORCE,
    "04.2": nb04.GAE,
    "04.3": nb04.PPO,
    "04.5": nb04.GRPO,
}


@pytest.mark.parametrize("q", TELLS)
def test_no_wrong_answer_passes_by_luck(q):
    """Each is caught by more than a quarter of the inputs, and a check draws 50: 0.75^50 is 6e-7."""
    right, by = ALL[q].solution, [] if q == "04.2" else ["logps"]
    fixed = ["baseline"] if q == "04.1" else []
    named = nb04._named if q == "04.2" else lambda function: function
    equal = partial(same, atol=1e-5) if q == "04.2" else nb04._same_or_nan
    for words, slip in TELLS[q].items():
        caught = inputs = 0
        while caught < 13:
            draw = lambda rng, seed=inputs: DRAWS[q](random.Random(seed))  # noqa: E731
            found = first_difference(named(slip), named(right), draw, n=1, equal=equal, by=by, fixed=fixed)
            caught, inputs = caught + (found is not None), inputs + 1
            assert inputs < 48, f"{words}: {caught} of {inputs}"


# --- The manner -------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """Exercises "99.1" and "99.2": the double of x."""

    def twice(x):
        return 2 * x

    def put(verify=None, solution=twice, **rest) -> None:
        verify = verify or (lambda mine: first_difference(mine, twice, lambda rng: (rng.random(),)))
        exercise = Exercise("Double x", verify, ("Add.", "x + x."), solution, difficulty=1, minutes=2, **rest)
        monkeypatch.setattr(ex, "exercises", lambda *_: {"99.1": exercise, "99.2": exercise})

    put()
    return put


@pytest.mark.parametrize(
    "source",
    [
        "def mine(x): ...",
        "def mine(x):\n    ...  # your line",
        'def mine(x):\n    """Two x."""\n    ...',
        "def mine(x):\n    double = ...\n    return double",
        "def mine(x):\n    return ...",
        "mine = lambda x: ...",
        "class mine:\n    def __init__(self):\n        self.x = 1\n    def forward(self, x):\n        ...",
        "mine = ...",
    ],
)
def test_dots_that_stand_for_code_are_not_tried_yet(toy, source):
    assert check("99.1", run(source)).state == "not tried yet"


def test_dots_in_an_index_are_code(toy):
    tail = run("import torch\ndef mine(x):\n    return (torch.tensor([[x]]) * 2)[..., 0].item()")
    assert check("99.1", tail).right


def test_what_a_function_raises_is_told_with_its_line(toy):
    source = "def helper(x):\n    return x.upper()\n\ndef mine(x):\n    y = x + 1\n    return helper(y)"
    text = shown_well(check("99.1", run(source)))
    assert "AttributeError: 'float' object has no attribute 'upper'" in text
    assert "in: line 2 of helper: return x.upper()" in text
    library = "import json\ndef mine(x):\n    # three\n    return json.loads('{')"
    assert "line 3 of mine: return json.loads" in shown_well(check("99.1", run(library)))
    decorated = "import torch\n@torch.no_grad()\ndef mine(x):\n    return x.upper()"
    assert "in: line 3 of mine: return x.upper()" in shown_well(check("99.1", run(decorated)))


@pytest.mark.parametrize(
    "source",
    [
        "def mine(x):\n    while True:\n        x = -x",
        "def mine(x):\n    while True:\n        try:\n            x = -x\n        except Exception:\n            pass",
        "def mine(x):\n    while x != 0.5:\n        pass\n    return x",  # ends at first, and not while it is named
    ],
)
def test_an_endless_loop_ends(toy, source):
    alike = {"it is x": lambda x: x, "it is x again": lambda x: 1 * x}
    draws = iter([0.5])
    draw = lambda rng: (next(draws, rng.random()),)  # noqa: E731
    toy(lambda mine: first_difference(mine, lambda x: 2 * x, draw, alike), seconds=0.3)
    text = shown_well(check("99.1", run(source)))
    assert "TimeUp: no answer after 0.3 s: is there an endless loop?" in text and "of mine:" in text


LEAVE = ["raise SystemExit", "import sys\n    sys.exit(3)", "exit()", "quit(1)"]


@pytest.mark.parametrize("source", LEAVE)
def test_leaving_python_is_told_as_an_error(toy, source):
    text = shown_well(check("99.1", run(f"def mine(x):\n    {source}")))
    assert text.startswith("not yet") and "SystemExit" in text and "of mine: " in text
    late = f"n = [0]\ndef mine(x):\n    n[0] += 1\n    if n[0] < 2: return x\n    {source}"
    known, draw = {"it is x": lambda x: x}, lambda rng: (rng.random(),)
    toy(lambda mine: first_difference(mine, lambda x: 2 * x, draw, known))
    assert check("99.1", run(late)).state == "not yet"


class Unreadable:
    def __repr__(self):
        raise SystemError("no text")


ODD = {
    "sparse": lambda: torch.ones(4).to_sparse(),
    "sparse that learns": lambda: torch.ones(4).to_sparse().requires_grad_(),
    "csr": lambda: torch.ones(4, 4).to_sparse_csr(),
    "meta": lambda: torch.ones(4, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "no text": Unreadable,
    "a list without text": lambda: [Unreadable()],
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of tensors that torch calls beta or deprecated
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "q", ["03.1", "04.1", "04.2", "04.3", "04.4", "04.5", "04.7", "06.2", "07.2", "07.3", "07.4", "09.2"]
)
def test_whatever_is_returned_there_is_a_feedback(q, kind):
    value = ODD[kind]()
    assert shown_well(check(q, lambda *_: value)).startswith("not yet")


def test_the_verdict_is_an_enum_and_the_heading_a_text(toy):
    verdict, said = ex.Verdict, [check("99.1", f) for f in (..., lambda x: x, lambda x: 2 * x)]
    assert [each.verdict for each in said] == [verdict.NOT_TRIED, verdict.NOT_YET, verdict.RIGHT]
    assert [each.right for each in said] == [False, False, True]
    assert said[2].state == "right, 50 calls"
    for other in (hint("99.1"), solution("99.1"), check("88.1", 1)):
        assert other.verdict is verdict.NONE and not other.right


def test_some_none_is_shown_as_such(toy):
    text = repr(check("99.1", run("def mine(x):\n    if x > 2:\n        return 2 * x")))
    assert "got: None" in text


def test_a_defect_of_the_check_is_raised_and_a_learners_odd_value_is_not(toy):
    toy(verify=run("def mine(_):\n    return 1 / 0", file="<the check>"))
    with pytest.raises(ZeroDivisionError):
        check("99.1", lambda x: x)
    toy(verify=run("def mine(f):\n    return len(f(3)) and None", file="<the check>"))
    assert "the check met TypeError: object of type 'int' has no len()" in repr(check("99.1", lambda x: x))


def test_values_classes_and_objects_pass_too(toy):
    toy(lambda r: None if r == 16 else Slip(shown(r), "16", "is it alpha?"), "my_r = 16")
    assert check("99.1", 16).state == "right" and solve("99.1") == 16
    assert repr(check("99.1", 32)) == "not yet\n  got: 32\n  wanted: 16\n  likely: is it alpha?"
    source = "class mine:\n    def size(self):\n        return self.no"
    toy(lambda made: made().size() and None, run(source.replace("self.no", "1")))
    assert "line 2 of size: return self.no" in repr(check("99.1", run(source)))


def test_attempts_are_stored_and_those_that_were_right_at_last_are_done(toy):
    assert check("99.1", ...).state == "not tried yet" and progress.events() == []
    assert "done" not in repr(check("99.1", lambda x: x)) + repr(check("99.1", 5))
    assert repr(check("99.1", lambda x: 2 * x)).endswith("\n  done: 1 of 2 exercises of notebook 99")
    assert repr(check("99.2", lambda x: x + x)).endswith("\n  done: 2 of 2 exercises of notebook 99")
    check("99.1", lambda x: x**2)
    assert repr(check("99.2", lambda x: x + x)).endswith("\n  done: 1 of 2 exercises of notebook 99")
    stored = [(event.item, event.score) for event in progress.events("exercise")]
    assert stored == [("99.1", 0), ("99.1", 0), ("99.1", 1), ("99.2", 1), ("99.1", 0), ("99.2", 1)]


def test_what_cannot_be_stored_is_judged(toy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FTLAB_PROGRESS", str(tmp_path / "file" / "progress.sqlite"))
    for function, state in ((lambda x: 2 * x, "right, 50 calls"), (lambda x: x, "not yet")):
        feedback = check("99.1", function)
        (label, why) = feedback.lines[-1]
        assert feedback.state == state and label == "not stored" and str(tmp_path) in why


def test_a_debug_exercise_as_it_was_given_is_not_stored(toy):
    toy(lambda mine: Slip("1", "2", AS_GIVEN))
    assert AS_GIVEN in repr(check("99.1", lambda x: x)) and progress.events() == []


def test_hints_are_a_ladder(toy):
    ex.hints_given.pop("99.1", None)
    said = [shown_well(hint("99.1")) for _ in range(3)]
    assert said[0] == "hint 1 of 2\n  Add." and said[1].startswith("hint 2 of 2\n  x + x.") and said[1] == said[2]
    assert 'solution("99.1")' in said[1]


def test_the_solution_is_folded(toy):
    page = solution("99.1")._repr_html_()
    assert page.index("<details>") < page.index("return 2 * x") < page.index("</details>")


def test_an_unknown_exercise_names_those_there_are():
    for say in (solution, hint, lambda q: check(q, 1)):
        assert "no exercise '00.99'" in repr(say("00.99")) and "00.1" in repr(say("00.99"))
        assert "no exercise 5" in repr(say(5))


# --- Comparing --------------------------------------------------------------------------------------------------------


def test_same():
    import numpy as np
    import torch

    equal = [
        (1, 1.0), (2.00001, 2), (True, 1), ([1, 2.0], (1, 2)), (torch.tensor([1.0, 2]), [1, 2]), (None, None),
        (np.float64(0.5), torch.tensor(0.5, requires_grad=True)), ({"a": [1]}, {"a": [1.0]}),
        ("a", "a"), (float("inf"), float("inf")),
        (torch.tensor([True, False]), [1, 0]), (torch.tensor([1.5], dtype=torch.bfloat16), [1.5]),
    ]  # fmt: skip
    other = [
        (1, 2), (1, "1"), ("a", ["a"]), (None, 0), (float("nan"), float("nan")), ([1], [1, 2]), ({"a": 1}, {"b": 1}),
        (torch.ones(2, 1), torch.ones(1, 2)), (torch.ones(1), 1), (object(), 1), ("1.0", 1.0),
        (float("-inf"), float("inf")),
        (-float("inf"), 1.0), (None, 1.5), ([None], [1.5]), (2.001, 2.0),
    ]  # fmt: skip
    assert all(same(*pair) for pair in equal), [pair for pair in equal if not same(*pair)]
    assert not any(same(*pair) for pair in other), [pair for pair in other if same(*pair)]


def test_shapes_and_long_lists_are_told_apart_where_they_differ():
    import torch

    assert core.contrast(torch.ones(2, 3), torch.ones(3, 2)) == ("shape (2, 3)", "shape (3, 2)")
    a = list(range(200))
    assert core.contrast(a, [*a[:150], -1, *a[151:]]) == ("[150]: 150", "[150]: -1")
    assert core.contrast({"b": a}, {"b": a[1:]}) == ("['b']: 200 items", "['b']: 199 items")
    assert core.contrast("3", 3) == ("'3' (str)", "3 (int)")
    assert len(shown("x" * 9999)) < 260 and shown([0.1 + 0.2]) == "[0.3]"


def test_fresh_inputs_differ_each_time_and_stay_untouched():
    seen = []

    def mine(x):
        seen.append(x[0])
        x.clear()
        return 0

    for _ in range(2):
        assert first_difference(mine, lambda x: 0, lambda rng: ([rng.random()],)) is None
    assert len(set(seen)) == 100
