"""Draw answers from a model, keep those that a scorer passes, and write rows that sft.py trains on.

    pip install "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*" numpy openai
    python rejection_sampling.py --model BASE --file train.jsonl --scorer my_module:my_function \
        --k 8 --keep 1 --take shortest --out drawn.jsonl
    python rejection_sampling.py --adapter runs/sft/adapter --file train.jsonl ...      # round two
    python rejection_sampling.py ... --pairs pairs.jsonl --out drawn.jsonl    # and rows for dpo.py
    vllm serve NAME --host 127.0.0.1 --generation-config vllm    # else the model's own top_k counts
    python rejection_sampling.py --endpoint http://127.0.0.1:8000/v1 --model NAME ...
    python rejection_sampling.py --endpoint ... --model TEACHER --scorer all \
        --system best_prompt.txt --examples good.jsonl 5 --test test.jsonl ...        # distillation
    python rejection_sampling.py --tiny --out runs/tiny.jsonl                # seconds on a CPU
    python sft.py --train_file drawn.jsonl --validation_file validation.jsonl

--scorer takes a score(answer, row), as evaluate.py's: without it an answer is right if it is the
row's completion, word for word. `all` passes each, so a better model's answers become the rows.
An answer that is empty, or cut at --max_new_tokens, is never kept: it would teach not to end.

--pairs writes one pair a prompt, too: the best answer is chosen and the worst is rejected, if their
scores differ, by --gap at least. Of equal scores the answer that was drawn first counts, on both
sides, because a rule about length would be learned. Cut and empty answers are in no pair.
--scorer may name the adapter's folder of reward_model.py, which wants trl and, in 16 bits, 2 bytes
more a parameter. Its zero is arbitrary, so no threshold makes an answer right: every whole answer
passes, --take is `best`, and what counts is the best of k, or the pair.

Each answer goes into drawn.drawn.jsonl as soon as it has its score. Start the same line again after
a stop: it goes on behind the last prompt and ends as if nothing had happened. Settings that would
draw other answers are refused there. --keep, --take, --at_least, --reasoning, --pairs and --gap may
change, since they choose among the answers that are there. Rows of train.jsonl only: what is drawn
is learned, and --test FILE refuses those whose prompt stands in that file. --system and --examples
(see evaluate.py) are for drawing alone: the rows keep their own prompts.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from functools import cache, partial
from operator import itemgetter
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from answers import answer_of, asked_as, refused_before, replies, settings, written
from common import (
    DTYPE,
    base_of,
    function_of,
    length_warnings,
    load,
    loading,
    now,
    read_rows,
    said,
    write_record,
)
from evaluate import add_examples, examples_of, scorer_of
from intervals import FEW, interval

DATA = Path(__file__).resolve().parents[1] / "data"
TINY = {
    "model": str(DATA / "micro" / "model"),
    "file": str(DATA / "ask" / "train.jsonl"),
    "scorer": "all",  # a base that has never seen this task gets none right
    "limit": 12,
    "k": 4,
    "batch_size": 4,
    "max_new_tokens": 48,
}
ROUNDED = 1e-9  # 0.7 - 0.4 is a little less than 0.3
FIRST = 8  # rows whose own completions try the scorer


def passes_all(answer, row):
    return 1.0


def is_learned(scorer):
    return scorer is not None and Path(scorer).is_dir()


def learned(adapter):
    """score(answer, row) of a reward model, which is loaded for the first answer."""
    base_of(adapter, "SEQ_CLS")  # refused here, and not behind the first batch
    names = [f"reward_model:{name}" for name in ("load_scorer", "scores")]
    load_scorer, scores = [function_of(name, "--scorer") for name in names]
    loaded = cache(load_scorer)

    def reward(answer, row):
        turn = [{"role": "assistant", "content": answer}]
        completion = answer if isinstance(row["prompt"], str) else turn
        return scores(*loaded(adapter), [{"prompt": row["prompt"], "completion": completion}])[0]

    return reward


def score_of(score, name, answer, row):
    """The score of an answer, from 0 to 1; a reward model's is any number."""
    got = score(answer, row)
    try:
        found = float(got)
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) if is_learned(name) else 0 <= found <= 1):  # nan never is
        where = "" if is_learned(name) else " from 0 to 1"
        sys.exit(f"--scorer {name}: got {got!r}, wanted a number{where}")
    return found


def check_scorer(score, name, rows, at_least):
    """Refuses a scorer that passes none of the rows' own completions, before anything is drawn."""
    gold = [row for row in rows[:FIRST] if "completion" in row and at_least is not None]
    scores = [score_of(score, name, answer_of(said(row["completion"])), row) for row in gold]
    if gold and max(scores) < at_least:
        sys.exit(
            f"--scorer {name}: the rows' own completions get at most {max(scores)}, and --at_least "
            f"is {at_least}. If they are no right answers, leave them out of the file"
        )


def file_digest(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else None


def words_of(prompt):
    """What a prompt asks, without its system message, case and spaces."""
    if not isinstance(prompt, str):
        prompt = " ".join(str(turn["content"]) for turn in prompt if turn["role"] != "system")
    return " ".join(prompt.casefold().split())


def check_leak(rows, file, test):
    """Refuses rows that stand in the test file, too: what is drawn is learned."""
    known = {words_of(row["prompt"]) for row in read_rows(test, columns=("prompt",))}
    lines = [number for number, row in enumerate(rows, 1) if words_of(row["prompt"]) in known]
    if lines:
        sys.exit(
            f"{file}: {len(lines)} of {len(rows)} prompts stand in {test}, too, the first one in "
            f"line {lines[0]}: what is drawn is learned, so take them out"
        )


def drawing(asked, name, revision, rows, system, examples):
    """What decides which answers are drawn and how they score."""
    found = {key: getattr(asked, key) for key in ("k", "temperature", "top_p", "max_new_tokens")}
    found |= {"batch_size": asked.batch_size, "seed": asked.seed, "scorer": asked.scorer}
    found |= {"model": name, "revision": revision, "adapter": asked.adapter, "system": system}
    found["endpoint"] = bool(asked.endpoint)  # its port may change
    if asked.adapter:
        found["adapter_weights"] = file_digest(Path(asked.adapter, "adapter_model.safetensors"))
    if examples:
        found["examples"] = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    if is_learned(asked.scorer):
        weights = Path(asked.scorer, "adapter_model.safetensors")
        found["scorer_weights"] = file_digest(weights)
    if asked.chat_template:
        found["chat_template"] = file_digest(asked.chat_template)
    return found | {"rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}


def lines_of(file):
    """The whole lines of a file that an earlier run has left, perhaps killed while it wrote."""
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        sys.exit(f"{file}: no JSON ({error}); somebody has changed it: name a new --out")


def drawn_before(file, wanted, most, batch_size):
    """What an earlier run has drawn, in whole batches, because a batch is drawn with one seed."""
    lines = lines_of(file)
    if lines and lines[0] != wanted:
        other = [key for key in wanted if lines[0].get(key) != wanted[key]]
        words = ", ".join(f"{key} {lines[0].get(key)!r}, now {wanted[key]!r}" for key in other)
        sys.exit(f"{file} was drawn with {words or 'other settings'}: name a new --out")
    found = lines[1:]
    return found if len(found) == most else found[: len(found) // batch_size * batch_size]


def replace(file, lines):
    """Writes a file anew. A kill leaves the old one or the new one."""
    half = file.with_suffix(".half")
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_text("")
    append(half, lines)
    half.replace(file)


def append(file, lines):
    with file.open("a", encoding="utf-8") as to:
        to.writelines(json.dumps(line) + "\n" for line in lines)
        to.flush()
        os.fsync(to.fileno())


@torch.inference_mode()
def draw_here(model, tokenizer, asked, prompts, seed):
    """k answers to each prompt: [(texts, tokens, which are cut)]."""
    torch.manual_seed(seed)
    how = settings(
        model,
        tokenizer,
        do_sample=True,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=0,  # the library's default draws from 50 tokens
        num_return_sequences=asked.k,
        max_new_tokens=asked.max_new_tokens,
    )
    texts, tokens, cut, opened = written(model, tokenizer, prompts, how)
    found = []
    for number, begun in enumerate(opened):
        own = slice(number * asked.k, (number + 1) * asked.k)
        whole = ["<think>\n" + text if begun else text for text in texts[own]]
        found.append((whole, tokens[own], cut[own]))
    return found


def draw_there(name, asked, warnings, prompts, seed):
    """The same from a server. Not every one knows `n`, so each answer is asked for by itself."""
    how = {"model": name, "max_tokens": asked.max_new_tokens, "top_p": asked.top_p}
    how["temperature"] = asked.temperature
    each = [prompt for prompt in prompts for _ in range(asked.k)]
    requests = [{"prompt": prompt, "seed": seed + n, **how} for n, prompt in enumerate(each)]
    found = replies(asked.endpoint, requests, len(requests), warnings)
    own = [found[start : start + asked.k] for start in range(0, len(found), asked.k)]
    return [tuple(map(list, zip(*some, strict=True)))[:3] for some in own]


def right(drawn, at_least):
    """Which of a prompt's answers have passed, have ended, and say something."""
    told = zip(drawn["answers"], drawn["scores"], drawn["cut"], strict=True)
    return [
        (at_least is None or score >= at_least) and not cut and bool(answer_of(answer).strip())
        for answer, score, cut in told
    ]


def scored(rows, answers, score, name, seconds):
    """What the journal says of each prompt."""
    found = []
    for row, (texts, tokens, cut) in zip(rows, answers, strict=True):
        scores = [score_of(score, name, answer_of(text), row) for text in texts]
        line = {"answers": texts, "scores": scores, "tokens": tokens, "cut": cut}
        found.append(line | {"seconds": seconds / len(rows)})
    return found


def passed(drawn, asked, at_least):
    """(text, score) of a prompt's answers that are right, as they were drawn."""
    told = zip(drawn["answers"], drawn["scores"], right(drawn, at_least), strict=True)
    return [
        (text if asked.reasoning else answer_of(text), score)
        for text, score, passes in told
        if passes
    ]


def turn_of(text, row):
    """The text as the row's prompt is: a text, or a list of one message."""
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]


def chosen(rows, drawn, asked):
    """The rows for training: at most `keep` a prompt, no two with the same words."""
    order = {"shortest": lambda pair: len(pair[0]), "best": lambda pair: -pair[1]}.get(asked.take)
    found = []
    for row, each in zip(rows, drawn, strict=False):
        told, different = passed(each, asked, asked.at_least), {}
        for text, _ in sorted(told, key=order) if order else told:
            different.setdefault(text.strip(), text)
        texts = list(different.values())[: asked.keep]
        found += [row | {"completion": turn_of(text, row)} for text in texts]
    return found


def pairs_of(rows, drawn, asked):
    """The rows for dpo.py, at most one a prompt: see the top. Other columns of the row stay."""
    found = []
    for row, each in zip(rows, drawn, strict=True):
        whole = passed(each, asked, None) or [("", 0.0)]
        best, worst = max(whole, key=itemgetter(1)), min(whole, key=itemgetter(1))
        gap = best[1] - worst[1]
        if gap > 0 and gap >= asked.gap - ROUNDED and best[0].strip() != worst[0].strip():
            pair = {key: value for key, value in row.items() if key != "completion"}
            pair |= {"chosen": turn_of(best[0], row), "rejected": turn_of(worst[0], row)}
            found.append(pair | {"score_chosen": best[1], "score_rejected": worst[1]})
    return found


def parsed(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a name on the hub, a folder, or the server's name for it")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--adapter", help="a folder; its base is loaded as it was in training")
    parser.add_argument("--endpoint", help="ask a server instead, for instance http://HOST:PORT/v1")
    parser.add_argument("--file", help="JSON lines with prompt, and what the scorer needs")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--system", help="a text file, for drawing only: the rows keep their own")
    add_examples(parser)
    parser.add_argument("--test", help="a file whose prompts --file must not have")
    parser.add_argument("--chat_template", help="a Jinja file; an adapter brings its own")
    parser.add_argument("--scorer", help="module:function of (answer, row), all, or a reward model")
    parser.add_argument("--at_least", type=float, help="the score that passes, 1 by default")
    parser.add_argument("--k", type=int, default=8, help="answers drawn a prompt")
    parser.add_argument("--keep", type=int, default=1, help="at most so many rows a prompt")
    parser.add_argument("--take", choices=["shortest", "first", "best"], help="of those that pass")
    parser.add_argument("--pairs", help="a .jsonl file: the rows for dpo.py, best over worst")
    parser.add_argument("--gap", type=float, default=0.0, help="of the two scores, at least")
    parser.add_argument("--reasoning", action="store_true", help="keep what stands in <think>")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at once, k answers each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="a .jsonl file: the rows for sft.py")
    parser.add_argument("--tiny", action="store_true")
    if "--tiny" in arguments:
        parser.set_defaults(**TINY)
    asked = parser.parse_args(arguments)
    if not asked.file or not (asked.model or asked.adapter):
        parser.error("give --file, and --model or --adapter")
    if asked.endpoint and (asked.adapter or asked.chat_template):
        parser.error("a server has its own model and template: give --endpoint and --model only")
    for option, file in (("--out", asked.out), ("--pairs", asked.pairs)):
        if file and Path(file).suffix != ".jsonl":
            parser.error(f"{option} {file}: wanted a file that ends in .jsonl")
    if asked.pairs and asked.pairs in (asked.out, str(Path(asked.out).with_suffix(".drawn.jsonl"))):
        parser.error(f"--pairs {asked.pairs}: wanted a file of its own")
    if asked.gap < 0:
        parser.error(f"--gap {asked.gap}: wanted 0 or more")
    if not is_learned(asked.scorer) and asked.at_least is None:
        asked.at_least = 1.0
    asked.take = asked.take or ("best" if is_learned(asked.scorer) else "shortest")
    if not 1 <= asked.keep <= asked.k:
        parser.error(f"--keep {asked.keep}: wanted 1 to --k, which is {asked.k}")
    if min(asked.batch_size, asked.max_new_tokens, asked.limit or 1) < 1:
        parser.error("--batch_size, --max_new_tokens and --limit want 1 at least")
    if asked.temperature <= 0 or not 0 < asked.top_p <= 1:
        parser.error("--temperature wants more than 0 (at 0 all k answers are one), --top_p 0 to 1")
    return asked


def summary(drawn, kept, asked):
    """What is printed and recorded of all answers."""
    passed = [right(each, asked.at_least) for each in drawn]
    scores = [float(passes) for each in passed for passes in each]
    prompts = [number for number, each in enumerate(passed) for _ in each]
    tokens = [count for each in drawn for count in each["tokens"]]
    return {
        "prompts": len(drawn),
        "answers": len(scores),
        "share_right": sum(scores) / len(scores),
        "interval": interval(scores, prompts),  # a prompt's answers count as one
        "prompts_none_right": sum(not any(each) for each in passed),
        "prompts_all_right": sum(all(each) for each in passed),
        "cut": sum(sum(each["cut"]) for each in drawn),
        "kept": len(kept),
        "tokens": None if None in tokens else sum(tokens),  # a server may not count
        "seconds": sum(each["seconds"] for each in drawn),
    }


def tell(found, asked, journal):
    low, high = found["interval"]
    word = "whole" if asked.at_least is None else "right"
    print(
        f"{found['share_right']:.3f} [{low:.3f}, {high:.3f}] of {found['answers']} answers are "
        f"{word}. Of {found['prompts']} prompts {found['prompts_none_right']} have no {word} "
        f"answer, {found['prompts_all_right']} only {word} ones"
    )
    if found["prompts"] < FEW:
        print(f"only {found['prompts']} prompts: the interval is too narrow")
    if found["cut"]:
        print(f"{found['cut']} answers were cut at max_new_tokens={asked.max_new_tokens}")
    tokens = "an unknown number of" if found["tokens"] is None else found["tokens"]
    print(f"{tokens} tokens in {found['seconds']:.0f} s. {found['kept']} rows are in {asked.out}")
    if asked.pairs:
        print(
            f"{found['pairs']} pairs are in {asked.pairs}. The chosen answer is the longer one in "
            f"{found['chosen_is_longer']} of them: if that is most of them, DPO learns length"
        )
    if asked.pairs and not found["pairs"]:
        sys.exit(
            f"no pair: of no prompt two whole answers differ by --gap {asked.gap}, or at all; read "
            f"some in {journal}, then try a larger --k or prompts that are solved sometimes"
        )
    if not (found["kept"] or asked.pairs):
        sys.exit(
            f"no row is kept of {found['answers']} answers: read some in {journal}, then try a "
            "larger --k or easier rows"
        )


def main(arguments=None):
    asked = parsed(sys.argv[1:] if arguments is None else arguments)
    warnings = []
    if is_learned(asked.scorer):
        score, warnings = learned(asked.scorer), length_warnings(asked.scorer)
    else:
        score = passes_all if asked.scorer == "all" else scorer_of(asked.scorer)
    out, journal = Path(asked.out), Path(asked.out).with_suffix(".drawn.jsonl")
    for file in (asked.out, asked.pairs):
        if file and Path(file).exists() and not journal.exists():
            sys.exit(
                f"{file} is there, and {journal}, which says how it was drawn, is not: name another"
            )
    name, revision, how = asked.model, asked.revision, {"dtype": DTYPE}
    if asked.adapter:
        name, revision, how = base_of(asked.adapter)
    tokenizer = None
    if not asked.endpoint:
        with loading(name, revision):
            tokenizer = AutoTokenizer.from_pretrained(asked.adapter or name, revision=revision)
    if asked.chat_template:
        tokenizer.chat_template = Path(asked.chat_template).read_text(encoding="utf-8")
    needed = ("prompt",) if asked.scorer else ("prompt", "completion")
    rows = read_rows(asked.file, tokenizer, asked.limit, needed)
    asked.scorer = asked.scorer or score.__name__
    check_scorer(score, asked.scorer, rows, asked.at_least)
    system = Path(asked.system).read_text(encoding="utf-8").strip() if asked.system else None
    if asked.test:
        check_leak(rows, asked.file, asked.test)
    examples = examples_of(asked, rows, tokenizer)
    prompts = [row["prompt"] for row in rows]
    if system or examples:
        prompts = [asked_as(prompt, system, examples) for prompt in prompts]

    wanted = drawing(asked, name, revision, rows, system, examples)
    drawn = drawn_before(journal, wanted, len(rows), asked.batch_size)
    record = out.with_suffix(".json")
    warnings += refused_before(record) if drawn else []
    replace(journal, [wanted, *drawn])
    kept = chosen(rows, drawn, asked)
    replace(out, kept)
    if asked.endpoint:
        draw = partial(draw_there, name, asked, warnings)
    elif len(drawn) < len(rows):
        with loading(name, revision):
            model = load(name, revision, how)
        if asked.adapter:
            model = PeftModel.from_pretrained(model, asked.adapter)
        draw = partial(draw_here, model.eval(), tokenizer, asked)

    for start in range(len(drawn), len(rows), asked.batch_size):
        batch = slice(start, start + asked.batch_size)
        begin = now()
        answers = draw(prompts[batch], asked.seed * 1_000_003 + start * asked.k)
        new = scored(rows[batch], answers, score, asked.scorer, now() - begin)
        append(journal, new)
        more = chosen(rows[batch], new, asked)
        append(out, more)
        drawn += new
        kept += more
        print(f"{len(drawn)} of {len(rows)} prompts, {len(kept)} rows kept", file=sys.stderr)

    found = summary(drawn, kept, asked)
    if asked.pairs:
        pairs = pairs_of(rows, drawn, asked)
        replace(Path(asked.pairs), pairs)
        longer = sum(len(said(pair["chosen"])) > len(said(pair["rejected"])) for pair in pairs)
        found |= {"pairs": len(pairs), "chosen_is_longer": longer}
    keys = ("at_least", "keep", "take", "reasoning", "gap")
    asked_for = wanted | {key: getattr(asked, key) for key in keys}
    write_record(record, recipe=Path(__file__).stem, asked=asked_for, warnings=warnings, **found)
    tell(found, asked, journal)


if __name__ == "__main__":
    main()
