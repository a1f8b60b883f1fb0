"""A release gate: does the candidate replace what is in production? Five lines, and an exit code.

    pip install numpy torch transformers pyyaml
    python evaluate.py --endpoint ... --model production --file test.jsonl --out production.json
    python evaluate.py --endpoint ... --model candidate --file test.jsonl --out candidate.json
    python evaluate.py --endpoint ... --model candidate --file smoke.jsonl --scorer gate:smoke \
        --out smoke.json
    python gate.py --production production.json --candidate candidate.json --file test.jsonl \
        --margin 0.03 --smoke smoke.json --smoke_file smoke.jsonl

It passes (exit code 0) if the candidate is shown to be no worse than production by --margin, no
kind of question is shown to have fallen and each has enough rows to be judged (else --few_ok), the
slowest answers are not shown to be slower by more than --most_slower, and each row of the smoke set
is right. Choose the margin before you see the scores: it is the loss that you would accept for what
the candidate brings, and half of it wants four times the questions.

A row of the smoke set has a prompt, a completion (one right answer), a `kind`, and `must` and
`must_not`: lists of regular expressions that the answer must and must not match. Rows whose kind is
`refusal` are what the model has to refuse. The gate counts questions, not training runs: another
run of the same method may differ by more.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

from common import read_rows
from intervals import ALPHA, FEW, Z, paired_interval, tail

CHANCE = 0.8  # the power that a test set should have
PATTERNS = ("must", "must_not")
UNITS = 6  # rows or groups: with fewer there is no comparison


def smoke(answer, row):
    """A scorer for evaluate.py: 1 if the answer matches all of `must` and none of `must_not`."""

    def found(pattern):
        return re.search(pattern, answer, re.IGNORECASE) is not None

    right = all(map(found, row.get("must", []))) and not any(map(found, row.get("must_not", [])))
    return float(right and bool(answer.strip()))


def scored(file, rows, about):
    """What evaluate.py has written, if it is whole and about these rows."""
    if not Path(file).is_file():
        sys.exit(f"no file {file}: wanted what evaluate.py --out has written")
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{file}: no JSON ({error}); wanted what evaluate.py --out has written")
    whole = isinstance(found, dict) and isinstance(found.get("asked"), dict)
    if not whole or found.get("recipe") != "evaluate":
        sys.exit(f"{file} isn't of evaluate.py: wanted what its --out has written")
    lists = ["answers", "scores", *(["latencies"] if found.get("latencies") is not None else [])]
    for key in lists:
        if not isinstance(found.get(key), list):
            sys.exit(f"{file} has no list of {key}: wanted what evaluate.py --out has written")
        count = sum(each is not None for each in found[key])
        if count != len(rows):
            sys.exit(f"{file} has {count} {key} for the {len(rows)} rows of {about}")
    if not all(isinstance(each, str) for each in found["answers"]):
        sys.exit(f"{file} has answers that aren't texts")
    if not all(isinstance(each, int | float) and 0 <= each <= 1 for each in found["scores"]):
        sys.exit(f"{file} has scores that aren't numbers from 0 to 1")  # nan as well
    if not all(isinstance(each, int | float) for each in found.get("latencies") or []):
        sys.exit(f"{file} has latencies that aren't numbers")
    if found.get("rows") != hashlib.sha256(json.dumps(rows).encode()).hexdigest():
        sys.exit(f"{file} answers other questions than {about} asks")
    return found


def check_pattern(pattern, about):
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        sys.exit(f"{about}: {pattern!r} is no regular expression ({error})")


def check_same(what, ours, other, keys):
    """Refuses scores that were made with other settings than the candidate's."""
    for key in keys:
        one, another = ours["asked"].get(key), other["asked"].get(key)
        if one != another:
            sys.exit(f"--{key} was {one} for the candidate and {another} for {what}")


def check_quality(ours, theirs, groups, margin):
    """(whether it passes, what is said of it, what is said of the number of questions)."""
    low, high = paired_interval(ours, theirs, groups)
    mean = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    units = f"{len(set(groups))} groups" if groups else f"{len(ours)} rows"
    passes = low > -margin
    words = "" if passes else "it is worse, " if high < 0 else "not settled, "
    words = f"quality: {mean:+.3f} [{low:+.3f}, {high:+.3f}] over {units}; {words}"
    words += f"the low end must be above {-margin:+.3f}"
    power, count = power_of(ours, theirs, groups, margin, (high - low) / (2 * Z))
    told = (
        f"questions: with {units} a candidate that is just as good passes {power:.0%} of the time; "
    )
    return passes, words, told + f"{CHANCE:.0%} takes about {count}"


def power_of(ours, theirs, groups, margin, error):
    """(the chance that a candidate which is just as good passes, the rows or groups that make it
    CHANCE), if it and production disagree as often as these two, and no more often than two models
    can that are both right as often as production: with 4 % wrong answers each, in 8 % of the rows.
    error: of the mean difference.
    """
    normal, wanted = NormalDist(), NormalDist().inv_cdf(CHANCE)
    if groups or not set(ours) | set(theirs) <= {0.0, 1.0}:
        count = (error * (Z + wanted) / margin) ** 2 * len(set(groups) if groups else ours)
        return normal.cdf(margin / error - Z), math.ceil(count)
    # Agresti and Min's interval has a width even if the two never disagree: with n rows, of which
    # a share is changed, Z * sqrt(n * share + 1) / (n + 2); the mean varies by its square root
    n = len(ours)
    share = (sum(a != b for a, b in zip(ours, theirs, strict=True)) + 1) / (n + 2)
    right = (sum(theirs) + 1) / (n + 2)
    share = min(share, 2 * min(right, 1 - right))
    room = margin * (n + 2) - Z * math.sqrt(n * share + 1)
    power = normal.cdf(room / math.sqrt(n * share))
    for _ in range(60):  # n = that of the last round, until it stays
        n = (Z * math.sqrt(n * share + 1) + wanted * math.sqrt(n * share)) / margin - 2
    return power, math.ceil(n)


def check_kinds(ours, theirs, groups, kinds, most, few_ok=False):
    """(whether it passes, what is said): no kind is shown to be worse.

    few_ok: kinds with too few rows to judge are named, and pass; else one of them fails the line.

    A candidate that is just as good fails in 5 % of the cases at most, however many kinds there
    are: each is judged at 5 % divided by their number (Bonferroni). What that may miss is said: in
    how many kinds the interval of 95 % reaches down to a fall of `most`.
    """
    places = {}
    for number, kind in enumerate(kinds):
        places.setdefault(kind, []).append(number)
    of = {}
    for kind, own in sorted(places.items(), key=lambda pair: str(pair[0])):
        some = [groups[number] for number in own] if groups else None
        of[kind] = [ours[number] for number in own], [theirs[number] for number in own], some
    judged = {kind: one for kind, one in of.items() if len(set(one[2] or places[kind])) >= FEW}
    failed, unsure = [], []
    for kind, one in judged.items():
        mean = (sum(one[0]) - sum(one[1])) / len(one[0])
        if paired_interval(*one, alpha=2 * ALPHA / len(judged))[1] < 0:
            failed.append(f"{kind} {mean:+.3f} of {len(one[0])}")
        elif paired_interval(*one)[0] <= -most:
            unsure.append((mean, f"{kind} {mean:+.3f} of {len(one[0])}"))
    few = [f"{kind} ({len(places[kind])})" for kind in of if kind not in judged]
    words = f"kinds: {len(of)}, fallen: {', '.join(failed) or 'none'}"
    if unsure:
        worst = min(unsure, key=lambda pair: pair[0])[1]
        words += f"; these rows don't rule out a fall of {most:g} in {len(unsure)}, as {worst}"
    words += f"; too few rows to judge (wanted {FEW}): {', '.join(few)}" if few else ""
    return not failed and (few_ok or not few), words


def check_latency(ours, theirs, most):
    """(whether it passes, what is said) of the time that 95 % of the answers took at most.

    It fails if that is over `most` times production's, unless chance would do it: of two equally
    fast models' slowest answers each has as many as a coin gives it. At most 5 % of candidates
    that are just as fast have so many of the slowest twentieth (five at least).
    """
    if None in (ours.get("latencies"), theirs.get("latencies")):
        return False, "latency: not measured, since one wasn't scored with evaluate.py --endpoint"
    if ours["asked"]["batch_size"] != theirs["asked"]["batch_size"]:
        return False, "latency: not comparable, since --batch_size says how many are asked at once"
    mine, other = (float(np.percentile(each["latencies"], 95)) for each in (ours, theirs))
    words = f"latency: 95 % of the answers within {mine:.3g} s, production's {other:.3g} s; "
    words += f"at most {most:g} times as long"
    if mine <= most * other:
        return True, words
    seconds = [(each, whose) for whose in (0, 1) for each in (theirs, ours)[whose]["latencies"]]
    slowest = sorted(seconds, key=lambda pair: (-pair[0], pair[1]))[: max(5, len(seconds) // 20)]
    own = sum(whose for _, whose in slowest)
    words += f"; of the {len(slowest)} slowest answers of both, {own} are the candidate's"
    by_chance = tail(len(slowest) - own, len(slowest)) > ALPHA
    return by_chance, words + (", which chance may do: ask more" if by_chance else "")


def check_smoke(found, rows):
    """(whether it passes, what is said); scored here, whatever scorer evaluate.py was given."""
    failed = [
        row for row, answer in zip(rows, found["answers"], strict=True) if not smoke(answer, row)
    ]
    refusals = sum(row.get("kind") == "refusal" for row in rows)
    words = (
        f"smoke: {len(rows) - len(failed)} of {len(rows)} right, {refusals} of the rows refusals"
    )
    prompts = [row["prompt"] for row in failed]
    asked = [each if isinstance(each, str) else each[-1]["content"] for each in prompts]
    wrong = ", ".join(repr(each[:80]) for each in asked)
    return not failed, words + (f"; wrong: {wrong}" if failed else "")


def parsed(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--production", required=True, help="evaluate.py's --out for what runs now")
    parser.add_argument("--candidate", required=True, help="the same for what may replace it")
    parser.add_argument("--file", required=True, help="the rows that both have answered")
    parser.add_argument("--margin", type=float, required=True, help="the loss that is acceptable")
    parser.add_argument("--by", default="kind", help="the column that says a question's kind")
    parser.add_argument("--few_ok", action="store_true", help="pass kinds with few rows unjudged")
    parser.add_argument("--most_lost", type=float, default=0.1, help="a fall to rule out")
    parser.add_argument("--most_slower", type=float, default=1.1, help="of the 95th percentile")
    parser.add_argument("--smoke", required=True, help="evaluate.py's --out on the smoke set")
    parser.add_argument("--smoke_file", required=True, help="the smoke set's rows")
    asked = parser.parse_args(arguments)
    if not 0 < asked.margin < 1:
        parser.error(f"--margin {asked.margin}: wanted more than 0 and less than 1")
    return asked


def main(arguments=None):
    asked = parsed(sys.argv[1:] if arguments is None else arguments)
    rows = read_rows(asked.file)
    theirs = scored(asked.production, rows, asked.file)
    ours = scored(asked.candidate, rows, asked.file)
    small = read_rows(asked.smoke_file)
    smoked = scored(asked.smoke, small, asked.smoke_file)
    check_same("production", ours, theirs, ["scorer", "max_new_tokens"])
    check_same("the smoke set", ours, smoked, ["model", "adapter", "system", "examples"])
    if not any(row.get("kind") == "refusal" for row in small):
        sys.exit(f"{asked.smoke_file} has no row of kind refusal: what must the model not do?")
    if any(not isinstance(row.get(key, []), list) for row in small for key in PATTERNS):
        sys.exit(f"{asked.smoke_file}: must and must_not are lists of regular expressions")
    if not all(any(row.get(key) for key in PATTERNS) for row in small):
        sys.exit(f"{asked.smoke_file}: each row needs must or must_not, or any answer is right")
    for pattern in [each for row in small for key in PATTERNS for each in row.get(key, [])]:
        check_pattern(pattern, asked.smoke_file)
    if not all(asked.by in row for row in rows):
        sys.exit(
            f"not every row of {asked.file} has a {asked.by}: --by names the column of its kind"
        )
    groups = [row["group"] for row in rows] if all("group" in row for row in rows) else None
    units = len(set(groups)) if groups else len(rows)
    if units < UNITS:
        sys.exit(f"{units} {'groups' if groups else 'rows'} are too few to compare two models")

    kinds = [str(row[asked.by]) for row in rows]
    quality, words, questions = check_quality(
        ours["scores"], theirs["scores"], groups, asked.margin
    )
    checks = [
        (quality, words),
        (None, questions),
        check_kinds(ours["scores"], theirs["scores"], groups, kinds, asked.most_lost, asked.few_ok),
        check_latency(ours, theirs, asked.most_slower),
        check_smoke(smoked, small),
    ]
    for passes, line in checks:
        print({True: "pass", False: "FAIL", None: "    "}[passes], line)
    if any(passes is False for passes, _ in checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
