"""A judge compares two models' answers: blind, pair by pair and in both orders.

    pip install "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*" numpy openai
    python evaluate.py --adapter runs/b/adapter --file test.jsonl --out tuned.json
    python evaluate.py --model BASE --file test.jsonl --out base.json
    python judge.py --agreement people.jsonl --rubric rubric.txt --model JUDGE \
        --endpoint http://127.0.0.1:8000/v1 --out agreement.json        # first: can it judge?
    python judge.py --answers tuned.json base.json --file test.jsonl --rubric rubric.txt \
        --endpoint http://127.0.0.1:8000/v1 --model JUDGE --out judged.json
    python judge.py --tiny --out runs/tiny/agreement.json               # seconds on a CPU

The judge reads the rubric, the prompt and two answers called A and B, never a model's name. A
server's judge may write first and ends with a line "Verdict: A", "Verdict: B" or "Verdict: tie".
Of a judge that is loaded here (no --endpoint, or --adapter) the most likely of the three is taken
right behind "Verdict:", so that it can't fail by its form, and can't reason either.

Each prompt is asked twice, with the answers the other way round. A model wins it if both verdicts
name its answer, and loses it if both name the other's. All else counts one half: two ties, one tie,
or the same letter twice, which means that the order has decided. So a prompt is one unit, and the
interval is that of paired prompts (intervals.py); rows with a `group` count by group.

Read three numbers beside the win rate. How often did the order decide (position bias)? What is the
win rate where our answer is the longer one, and where it is the shorter one (length bias)? And with
--agreement FILE, rows of {"prompt": ..., "chosen": ..., "rejected": ...} that people judged: does
the judge take what they took, in both orders, also where the better answer is the shorter one?
Cohen's kappa there is over all verdicts; people's choice stands first in half of them.

A judge can be talked to by what it reads, and it often likes its own model's answers best (WARNING
"judges_itself"). Another judge, or another rubric, may decide otherwise: the interval speaks of
other prompts of the same kind, with this judge. After a stop start the same line again: verdicts
lie in NAME.verdicts.jsonl beside --out.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from answers import ask, refused_before, settings
from common import DTYPE, base_of, load, loading, now, read_rows, said, text_of, warn, write_record
from gate import scored
from intervals import FEW, interval, paired_interval
from preferences import read_pairs, tiny_pairs
from rejection_sampling import append, drawn_before, file_digest, replace

DATA = Path(__file__).resolve().parents[1] / "data"
TINY = {
    "model": str(DATA / "micro" / "model"),
    "file": str(DATA / "ask" / "validation.jsonl"),  # as evaluate.py --tiny
    "limit": 24,
    "batch_size": 8,
}
TINY_RUBRIC = "Take the reply that solves the customer's problem, names the order and is polite.\n"
VERDICTS = ("A", "B", "tie")
ASKED = (
    "Which answer is better by the rubric? Their order and their length count for nothing. You may "
    'think first. End with one line: "Verdict: A", "Verdict: B" or "Verdict: tie".'
)
FOUND = re.compile(r"verdict\W*:\W*(?:answer\W*)?(A|B|tie)\b", re.IGNORECASE)
MOST_UNREAD = 0.1  # of the verdicts: with more the numbers would be about the rest
UNITS = 6  # prompts or groups: with fewer there is no comparison


def shown(prompt):
    """A prompt as the judge reads it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def question(rubric, prompt, a, b):
    """The messages for one verdict. The marks hold a tag that an answer can't know beforehand."""
    tag = hashlib.sha256(json.dumps([prompt, a, b]).encode()).hexdigest()[:8]
    parts = {"Prompt": shown(prompt), "Answer A": a, "Answer B": b}
    middle = [f"[{name} {tag}]\n{text}\n[end {tag}]" for name, text in parts.items()]
    return [{"role": "user", "content": "\n\n".join([rubric.strip(), *middle, ASKED])}]


def verdict_of(text):
    """What the last "Verdict: ..." names, None without one."""
    found = FOUND.findall(text)
    return next((each for each in VERDICTS if found and each.lower() == found[-1].lower()), None)


def ask_server(asked, prompts, warnings):
    """(verdicts, texts) of a judge that is served."""
    limits = len(prompts), asked.max_new_tokens
    texts, _, _ = ask(asked.endpoint, asked.model, prompts, *limits, warnings)
    return [verdict_of(text) for text in texts], texts


def next_tokens(text, tokenizer):
    """The token with which each verdict begins, right behind the text."""
    before, found = tokenizer(text, add_special_tokens=False)["input_ids"], []
    for verdict in VERDICTS:
        ids = tokenizer(f"{text} {verdict}", add_special_tokens=False)["input_ids"]
        same = 0
        while same < len(before) and before[same] == ids[same]:
            same += 1
        found.append(ids[same])
    if len(set(found)) < len(VERDICTS):
        sys.exit("this tokenizer begins two of the verdicts alike: serve the judge, --endpoint")
    return found


@torch.inference_mode()
def ask_here(model, tokenizer, prompts):
    """(verdicts, log-probabilities of A, B and tie) of a judge that is loaded here."""
    how = settings(
        model,
        tokenizer,
        do_sample=False,
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    texts = [text_of(prompt, tokenizer) + "Verdict:" for prompt in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    width, most = batch["input_ids"].shape[1], model.config.get_text_config()
    if width >= getattr(most, "max_position_embeddings", width + 1):
        sys.exit(f"a prompt for the judge has {width} tokens, more than it was made for")
    logits = model.generate(**batch.to(model.device), generation_config=how).logits[0].float()
    logps = logits.log_softmax(-1)[:, next_tokens(texts[0], tokenizer)].tolist()
    return [VERDICTS[max(range(3), key=row.__getitem__)] for row in logps], logps


def outcome(verdicts):
    """Of one prompt, for the answer that stood first at first: both verdicts, in the two orders."""
    first, second = verdicts
    if (first, second) == ("A", "B"):
        return "won"
    if (first, second) == ("B", "A"):
        return "lost"
    if None in verdicts:
        return "unread"
    if first == second:
        return "tie" if first == "tie" else "order"
    return "half"  # one tie


def rate(outcomes, groups=None):
    """{prompts, rate, interval}: wins, and half of what was neither won nor lost.

    rate = 1/2 + (won - lost) / 2n, so its interval is that of a paired difference, halved.
    """
    if not outcomes:
        return {"prompts": 0, "rate": None, "interval": None}
    won, lost = ([float(each == name) for each in outcomes] for name in ("won", "lost"))
    low, high = paired_interval(won, lost, groups)
    mean = (sum(won) - sum(lost)) / len(outcomes)
    bounds = [0.5 + low / 2, 0.5 + high / 2]
    return {"prompts": len(outcomes), "rate": 0.5 + mean / 2, "interval": bounds}


def share(values, groups=None):
    """{count, of, share, interval} of booleans."""
    if not values:
        return {"count": 0, "of": 0, "share": None, "interval": None}
    numbers = [float(value) for value in values]
    mean = sum(numbers) / len(numbers)
    bounds = list(interval(numbers, groups))
    return {"count": sum(values), "of": len(values), "share": mean, "interval": bounds}


def part(places, values, groups):
    """rate() of some of the prompts."""
    own = [groups[place] for place in places] if groups else None
    return rate([values[place] for place in places], own)


def by_length(pairs, values, groups, names):
    """rate() where the first answer has more characters, fewer, and as many."""
    gaps = [len(one) - len(other) for _, one, other in pairs]
    signs = (lambda gap: gap > 0, lambda gap: gap < 0, lambda gap: gap == 0)
    return {
        name: part([place for place, gap in enumerate(gaps) if sign(gap)], values, groups)
        for name, sign in zip(names, signs, strict=True)
    }


def position(verdicts, outcomes, groups):
    """How often the order decided, and how often the first answer was named."""
    decided = [each == "order" for each in outcomes]
    named = [each for pair in verdicts for each in pair if each in ("A", "B")]
    return {
        "order_decided": share(decided, groups),
        "first_named": sum(each == "A" for each in named) / len(named) if named else None,
    }


def kappa(verdicts):
    """Cohen's kappa of judge and people over all verdicts: (p - chance) / (1 - chance).

    People took A in the first order and B in the second, so half of their labels is A, and none is
    a tie; the chance of agreeing is half of the judge's verdicts that are A or B.
    """
    all_of = [each for pair in verdicts for each in pair]
    right = sum((one == "A") + (other == "B") for one, other in verdicts) / len(all_of)
    chance = 0.5 * sum(each in ("A", "B") for each in all_of) / len(all_of)
    return (right - chance) / (1 - chance)


def say(name, found):
    if found.get("prompts", found.get("of")):
        low, high = found["interval"]
        value, count = found.get("rate", found.get("share")), found.get("prompts", found.get("of"))
        print(f"{name}: {value:.3f} [{low:.3f}, {high:.3f}] of {count} prompts")


def compared(pairs, verdicts, groups):
    """The win rate of the first model, and what it depends on."""
    outcomes = [outcome(each) for each in verdicts]
    counts = {name: outcomes.count(name) for name in ("won", "lost", "tie", "half", "order")}
    alike = [place for place, (_, one, other) in enumerate(pairs) if one == other]
    asked = [place for place in range(len(pairs)) if place not in set(alike)]
    own = [groups[place] for place in asked] if groups else None
    longer = ("ours is longer", "ours is shorter", "equally long")
    found = {"win_rate": rate(outcomes, groups), **counts, "equal_answers": len(alike)}
    found |= position([verdicts[p] for p in asked], [outcomes[p] for p in asked], own)
    found["by_length"] = by_length(pairs, outcomes, groups, longer)
    low, high = found["win_rate"]["interval"]
    say("win rate", found["win_rate"])
    settled = low > 0.5 or high < 0.5
    print(f"  {counts['won']} won, {counts['lost']} lost, the rest counts half: {counts['tie']} "
          f"ties in both orders, {counts['half']} in one, {counts['order']} where the order decided"
          f". The interval {'excludes' if settled else 'includes'} one half"
          f"{'' if settled else ', so these prompts do not settle it'}.")  # fmt: skip
    for name, each in found["by_length"].items():
        say(f"win rate, {name}", each)
    return found


def agreed(pairs, verdicts, groups):
    """How often the judge takes what people took: `chosen` stands first in the first order."""
    outcomes = [outcome(each) for each in verdicts]
    longer = ("chosen is longer", "chosen is shorter", "equally long")
    found = {"agreement": rate(outcomes, groups), "kappa": kappa(verdicts)}
    found["chosen_first"] = share([one == "A" for one, _ in verdicts], groups)
    found["chosen_second"] = share([other == "B" for _, other in verdicts], groups)
    found |= position(verdicts, outcomes, groups)
    found["by_length"] = by_length(pairs, outcomes, groups, longer)
    say("agreement with people, both orders", found["agreement"])
    print(f"Cohen's kappa over all verdicts: {found['kappa']:.3f}")
    say("verdicts for their choice, shown first", found["chosen_first"])
    say("verdicts for their choice, shown second", found["chosen_second"])
    for name, each in found["by_length"].items():
        say(f"agreement, {name}", each)
    return found


def read(asked, tokenizer):
    """(pairs of (prompt, one answer, the other), groups, the models' names, what they are of)."""
    if asked.agreement:
        rows = read_pairs(asked.agreement, None, asked.limit)
        pairs = [(row["prompt"], said(row["chosen"]), said(row["rejected"])) for row in rows]
        names = []
    else:
        rows = read_rows(asked.file, None, asked.limit)
        ours, theirs = [scored(file, rows, asked.file) for file in asked.answers]
        prompts = [row["prompt"] for row in rows]
        pairs = list(zip(prompts, ours["answers"], theirs["answers"], strict=True))
        names = [ours["model"], theirs["model"]]
    groups = [row["group"] for row in rows] if all("group" in row for row in rows) else None
    units = len(set(groups)) if groups else len(rows)
    if units < UNITS:
        sys.exit(f"{units} {'groups' if groups else 'prompts'} are too few to compare two answers")
    if tokenizer and tokenizer.chat_template is None:
        sys.exit(f"{asked.model} has no chat template: a judge is a chat model")
    return pairs, groups, names


def parsed(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="the judge: a name on the hub, a folder, or the server's")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--adapter", help="a judge of one's own; its base is loaded as in training")
    parser.add_argument("--endpoint", help="ask a server, for instance http://HOST:PORT/v1")
    parser.add_argument("--rubric", help="a text file: what makes an answer better")
    parser.add_argument(
        "--answers", nargs=2, metavar=("OURS", "THEIRS"), help="evaluate.py's --out"
    )
    parser.add_argument("--file", help="the rows that both have answered")
    parser.add_argument("--agreement", help="instead: pairs that people judged")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at once, asked twice")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="of a server's judge")
    parser.add_argument("--out", required=True, help="a JSON file: rates, verdicts, what ran")
    parser.add_argument("--tiny", action="store_true")
    if "--tiny" in arguments:
        parser.set_defaults(**TINY)
    asked = parser.parse_args(arguments)
    if asked.tiny:
        asked.rubric = asked.rubric or tiny_file(asked.out)
        if not (asked.answers or asked.agreement):
            asked.agreement = tiny_pairs(Path(asked.out).parent)[0]
    if bool(asked.answers) == bool(asked.agreement):
        parser.error("give --answers OURS THEIRS with --file, or --agreement FILE")
    if asked.answers and not asked.file:
        parser.error("--answers: give --file too, the rows that they answer")
    if not (asked.model or asked.adapter) or (asked.endpoint and asked.adapter):
        parser.error("give the judge: --model, with --endpoint or without, or --adapter")
    if not asked.rubric or not Path(asked.rubric).is_file():
        parser.error(f"--rubric {asked.rubric}: wanted a text file that says what is better")
    if min(asked.batch_size, asked.max_new_tokens, asked.limit or 1) < 1:
        parser.error("--batch_size, --max_new_tokens and --limit want 1 at least")
    if Path(asked.out).suffix != ".json":
        parser.error(f"--out {asked.out}: wanted a file that ends in .json")
    return asked


def tiny_file(out):
    """For --tiny: a rubric beside --out."""
    file = Path(out).parent / "rubric.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(TINY_RUBRIC, encoding="utf-8")
    return str(file)


def judging(asked, name, revision, rubric, pairs):
    """What decides the verdicts: a run with something else of it needs another --out."""
    words = json.dumps([rubric, ASKED, pairs])
    found = {"judge": name, "revision": revision, "adapter": asked.adapter}
    found |= {"endpoint": bool(asked.endpoint), "max_new_tokens": asked.max_new_tokens}
    if asked.adapter:
        found["adapter_weights"] = file_digest(Path(asked.adapter, "adapter_model.safetensors"))
    return found | {"rubric_and_pairs": hashlib.sha256(words.encode()).hexdigest()}


def check_read(verdicts, lines, asked):
    """Refuses verdicts of which too many have no readable end, and says how many count half."""
    every = [each for pair in verdicts for each in pair]
    unread = every.count(None)
    if not unread:
        return []
    texts = [text for line in lines for v, text in zip(*line.values(), strict=True) if v is None]
    example = " ".join(texts[0].split())[-100:]
    if unread > MOST_UNREAD * len(every):
        sys.exit(
            f"{unread} of {len(every)} verdicts can't be read, one ends {example!r}: was it cut at "
            f"--max_new_tokens {asked.max_new_tokens}? For a new try name a new --out"
        )
    return [warn("unread", verdicts=unread, of=len(every), one_ends=example)]


def main(arguments=None):
    asked = parsed(sys.argv[1:] if arguments is None else arguments)
    name, revision, how, tokenizer = asked.model, asked.revision, {"dtype": DTYPE}, None
    if asked.adapter:
        name, revision, how = base_of(asked.adapter)
    if not asked.endpoint:
        with loading(name, revision):
            tokenizer = AutoTokenizer.from_pretrained(asked.adapter or name, revision=revision)
    rubric = Path(asked.rubric).read_text(encoding="utf-8")
    if not rubric.strip():
        sys.exit(f"{asked.rubric} is empty: what makes an answer better?")
    pairs, groups, models = read(asked, tokenizer)
    warnings = []
    if (asked.adapter or name) in models:
        warnings.append(warn("judges_itself", judge=asked.adapter or name))

    out = Path(asked.out)
    journal = out.with_suffix(".verdicts.jsonl")
    wanted = judging(asked, name, revision, rubric, pairs)
    open_ = [place for place, (_, one, other) in enumerate(pairs) if one != other]
    lines = drawn_before(journal, wanted, len(open_), asked.batch_size)
    warnings += refused_before(out) if lines else []
    replace(journal, [wanted, *lines])
    if not asked.endpoint and len(lines) < len(open_):
        with loading(name, revision):
            model = load(name, revision, how)
        if asked.adapter:
            model = PeftModel.from_pretrained(model, asked.adapter)
        model = model.eval()
    begin = now()
    for start in range(len(lines), len(open_), asked.batch_size):
        batch = [pairs[place] for place in open_[start : start + asked.batch_size]]
        prompts = []
        for prompt, one, other in batch:
            prompts += [question(rubric, prompt, one, other), question(rubric, prompt, other, one)]
        if asked.endpoint:
            verdicts, texts = ask_server(asked, prompts, warnings)
        else:
            verdicts, texts = ask_here(model, tokenizer, prompts)
        places = range(0, len(prompts), 2)
        new = [{"verdicts": verdicts[n : n + 2], "texts": texts[n : n + 2]} for n in places]
        append(journal, new)
        lines += new
        print(f"{len(lines)} of {len(open_)} prompts", file=sys.stderr)

    warnings += check_read([line["verdicts"] for line in lines], lines, asked)
    verdicts = [("tie", "tie")] * len(pairs)  # of equal answers, which nobody was asked about
    for place, line in zip(open_, lines, strict=True):
        verdicts[place] = tuple(line["verdicts"])
    found = (agreed if asked.agreement else compared)(pairs, verdicts, groups)
    say("the order decided", found["order_decided"])
    if found["first_named"] is not None:
        print(f"of the verdicts that name an answer {found['first_named']:.0%} name the first one")
    if groups and len(set(groups)) < FEW:
        print(f"only {len(set(groups))} groups: the intervals are too narrow; collect more groups")
    write_record(
        out,
        recipe=Path(__file__).stem,
        asked={key: value for key, value in vars(asked).items() if value is not None},
        models=models,
        seconds=now() - begin,
        warnings=warnings,
        **found,
        verdicts=verdicts,
    )


if __name__ == "__main__":
    main()
