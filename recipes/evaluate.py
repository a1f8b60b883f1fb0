"""Score a model, an adapter or a server on held-out rows, with intervals, and compare two of them.

    pip install "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*" numpy openai
    python evaluate.py --model BASE --file test.jsonl --out base.json \
        --system best_prompt.txt --examples train.jsonl 5 --examples_seed 3
    python evaluate.py --adapter runs/sft/adapter --file test.jsonl --out tuned.json \
        --against base.json
    python evaluate.py --endpoint http://127.0.0.1:8000/v1 --model NAME --file test.jsonl ...
    python evaluate.py --tiny --out runs/tiny.json                   # seconds on a CPU

Answers are greedy, and what stands before </think> is cut from them. --scorer my_module:my_function
takes a score(answer, row) of yours, from 0 to 1; without it an answer is right if it is the row's
completion, word for word. Rows with a `group` (a customer, a document) are drawn by group.

--examples takes the first rows of its file, or with --examples_seed as many drawn ones. The score
depends on which, so try ten seeds on the validation rows and ask the test rows with the best one:
README.md has the loop.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer

from answers import answer_of, ask, asked_as, generate
from common import (
    DTYPE,
    base_of,
    function_of,
    load,
    loading,
    now,
    read_rows,
    said,
    write_record,
)
from intervals import FEW, interval, paired_interval

DATA = Path(__file__).resolve().parents[1] / "data"
TINY = {
    "model": str(DATA / "micro" / "model"),
    "file": str(DATA / "ask" / "validation.jsonl"),
    "limit": 24,
    "max_new_tokens": 48,
}


def exact_match(answer, row):
    return answer.strip() == answer_of(said(row["completion"])).strip()


def scorer_of(name):
    return exact_match if name is None else function_of(name, "--scorer")


def examples_of(asked, rows, tokenizer):
    """The answered rows of --examples FILE N: the first, or those that --examples_seed draws."""
    if not asked.examples:
        if asked.examples_seed is not None:
            sys.exit("--examples_seed draws from --examples FILE N: give it, too")
        return []
    file, count = asked.examples
    found = read_rows(file, tokenizer)
    if not count.isdigit() or int(count) > len(found):
        sys.exit(f"--examples: got {count}, wanted a number of {file}'s {len(found)} rows")
    if asked.examples_seed is not None:
        found = random.Random(asked.examples_seed).sample(found, int(count))
    found = found[: int(count)]
    if any(row["prompt"] == example["prompt"] for row in rows for example in found):
        sys.exit(
            f"{file} holds a question of {asked.file}, whose answer it would show: take examples "
            "from training rows that aren't asked"
        )
    if found and type(found[0]["prompt"]) is not type(rows[0]["prompt"]):
        sys.exit(f"{file} and {asked.file}: one has messages and the other texts")
    return found


def add_examples(parser):
    parser.add_argument("--examples", nargs=2, metavar=("FILE", "N"), help="N answered rows before")
    parser.add_argument("--examples_seed", type=int, help="draw them; else the first of the file")


def compare(scores, groups, digest, against):
    if not Path(against).is_file():
        sys.exit(f"no file {against}: --against takes what --out has written")
    other = json.loads(Path(against).read_text())
    if other["rows"] != digest:
        sys.exit(f"{against} is of other rows: only the same ones can be compared pair by pair")
    units = f"{len(set(groups))} groups" if groups else f"{len(scores)} rows"
    if len(set(groups) if groups else scores) < 6:
        sys.exit(f"{units} are too few to compare two models")
    low, high = paired_interval(scores, other["scores"], groups)
    pairs = list(zip(scores, other["scores"], strict=True))
    mean = sum(a - b for a, b in pairs) / len(pairs)
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    settled = low > 0 or high < 0
    print(
        f"against {against}: {mean:+.3f} [{low:+.3f}, {high:+.3f}] over {units}, {better} rows "
        f"better, {worse} worse. The interval {'excludes' if settled else 'includes'} zero"
        f"{'' if settled else ', so these rows do not settle it'}."
    )


def parsed(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a name on the hub, a folder, or the server's name for it")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--adapter", help="a folder; its base is loaded as it was in training")
    parser.add_argument("--endpoint", help="ask a server instead, for instance http://HOST:PORT/v1")
    parser.add_argument("--file", help="JSON lines with prompt and completion")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--system", help="a text file: in the place of the rows' system message")
    add_examples(parser)
    parser.add_argument("--chat_template", help="a Jinja file; an adapter brings its own")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--scorer", help="module:function, called with (answer, row)")
    parser.add_argument("--out", required=True, help="a JSON file: scores, answers, what ran")
    parser.add_argument("--against", help="what --out wrote for another model on these rows")
    parser.add_argument("--tiny", action="store_true")
    if "--tiny" in arguments:
        parser.set_defaults(**TINY)
    asked = parser.parse_args(arguments)
    if not asked.file or not (asked.model or asked.adapter):
        parser.error("give --file, and --model or --adapter")
    if asked.endpoint and (asked.adapter or asked.chat_template):
        parser.error("a server has its own model and template: give --endpoint and --model only")
    return asked


def main(arguments=None):
    asked = parsed(sys.argv[1:] if arguments is None else arguments)
    score = scorer_of(asked.scorer)
    name, revision, how = asked.model, asked.revision, {"dtype": DTYPE}
    if asked.adapter:
        name, revision, how = base_of(asked.adapter)
    tokenizer = None
    if not asked.endpoint:
        with loading(name, revision):
            tokenizer = AutoTokenizer.from_pretrained(asked.adapter or name, revision=revision)
    if asked.chat_template:
        tokenizer.chat_template = Path(asked.chat_template).read_text(encoding="utf-8")
    rows = read_rows(asked.file, tokenizer, asked.limit)
    examples = examples_of(asked, rows, tokenizer)
    system = Path(asked.system).read_text(encoding="utf-8").strip() if asked.system else None
    prompts = [asked_as(row["prompt"], system, examples) for row in rows]

    begin = now()
    limits, latencies, warnings = (asked.batch_size, asked.max_new_tokens), None, []
    if asked.endpoint:
        answers, cut, latencies = ask(asked.endpoint, name, prompts, *limits, warnings)
    else:
        with loading(name, revision):
            model = load(name, revision, how)
        if asked.adapter:
            model = PeftModel.from_pretrained(model, asked.adapter)
        begin = now()
        answers, cut = generate(model.eval(), tokenizer, prompts, *limits)
    seconds = now() - begin

    scores = [float(score(answer, row)) for answer, row in zip(answers, rows, strict=True)]
    groups = [row["group"] for row in rows] if all("group" in row for row in rows) else None
    mean, (low, high) = sum(scores) / len(scores), interval(scores, groups)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    write_record(
        asked.out,
        recipe=Path(__file__).stem,
        model=asked.adapter or name,
        asked={key: value for key, value in vars(asked).items() if value is not None},
        seconds=seconds,
        latencies=latencies,  # of a server, for gate.py
        mean=mean,
        interval=[low, high],
        cut=cut,
        warnings=warnings,
        rows=digest,
        groups=groups,
        scores=scores,
        answers=answers,
    )
    for row, answer in list(zip(rows, answers, strict=True))[:3]:
        print(f"{said(row['completion'])!r}\n  -> {answer!r}")
    print(f"{mean:.3f} [{low:.3f}, {high:.3f}], the mean of {len(scores)} rows, {seconds:.0f} s")
    if groups and len(set(groups)) < FEW:
        print(f"only {len(set(groups))} groups: the intervals are too narrow; collect more groups")
    if cut:
        print(f"{cut} answers were cut at max_new_tokens={asked.max_new_tokens}")
    if asked.against:
        compare(scores, groups, digest, asked.against)


if __name__ == "__main__":
    main()
