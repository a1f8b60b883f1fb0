"""How far the gold rules agree with labels that were given blind: data/replies/judged.jsonl.

    python experiments/gold_agreement/run.py     shares of equal verdicts, and Cohen's kappa

It writes records.jsonl: a line for each two of the three, with kappa and the verdict on each reply.

kappa = (p - q) / (1 - q): p is the share of equal verdicts, q what two labellers with the same
shares of yes would have by chance. Source: Cohen 1960, doi:10.1177/001316446002000104.
"""

import json
from pathlib import Path

from ftlab.paths import DATA
from ftlab.tasks import replies

FILE = Path(__file__).with_name("records.jsonl")
NAMES = ("readable", *replies.WEIGHTS)
COUPLES = (("first", "second"), ("first", "rules"), ("second", "rules"))


def judged() -> list[dict]:
    lines = (DATA / "replies" / "judged.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def verdicts() -> dict[str, list[dict[str, bool]]]:
    """The verdicts on each reply: of the `first` and the `second` labeller, and of the `rules`."""
    rows = judged()
    rules = []
    for row in rows:
        readable = replies.readable(row["reply"])
        rules.append({"readable": readable} | replies.score(row["reply"], row["label"]))
    labellers = {who: [row[who] for row in rows] for who in ("first", "second")}
    return labellers | {"rules": rules}


def agreement(one: list[bool], two: list[bool]) -> tuple[float, float]:
    """(share of equal verdicts, kappa) of two lists of yes and no."""
    n = len(one)
    same = sum(a == b for a, b in zip(one, two, strict=True)) / n
    yes = sum(one) / n, sum(two) / n
    chance = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
    return same, (same - chance) / (1 - chance)


def table() -> dict[str, dict[str, tuple[float, float]]]:
    """agreement of each two of the three, by property."""
    said, found = verdicts(), {}
    for name in NAMES:
        of = {who: [verdict[name] for verdict in said[who]] for who in said}
        found[name] = {f"{one}-{two}": agreement(of[one], of[two]) for one, two in COUPLES}
    return found


def records() -> list[dict]:
    """For each couple and property: by reply, whether the two say the same (1); and kappa."""
    ids, said, found = [row["id"] for row in judged()], verdicts(), []
    for one, two in COUPLES:
        same, kappa = {}, {}
        for name in NAMES:
            ours, theirs = ([verdict[name] for verdict in said[who]] for who in (one, two))
            equal = [int(a == b) for a, b in zip(ours, theirs, strict=True)]
            same[name] = dict(zip(ids, equal, strict=True))
            kappa[name] = round(agreement(ours, theirs)[1], 4)
        found.append({"couple": f"{one}-{two}", "same": same, "kappa": kappa})
    return found


def main() -> None:
    from experiments.runs import cpu_clock, replace, stamp

    began, found = cpu_clock(), records()
    about = {"cpu_seconds": round(cpu_clock() - began, 2)}
    of = ["data/replies/judged.jsonl"]
    about |= stamp("none: no model answers", of, {"labels": "given blind"})
    replace(FILE, [record | about for record in found])
    for name, couples in table().items():
        cells = [f"{who} {same:.2f}, kappa {kappa:.2f}" for who, (same, kappa) in couples.items()]
        print(f"{name:9}", *cells, sep="   ")


if __name__ == "__main__":
    main()
