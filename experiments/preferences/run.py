"""DOC"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.preferences import methods
from experiments.runs import Job, cpu_clock, flags, stamp, work

FILE = Path(__file__).with_name("records.jsonl")
SEARCH_SEED, SEEDS = 11, (1, 2, 3, 4, 5, 6)
PASS, SECONDS = "one pass", "equal seconds"
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
BETWEEN = (2e-5, 5e-5, 2e-4, 5e-4, 2e-3, 5e-3)  # of SFT, which has no beta to search
FIRST_RATES = (3e-4, 1e-3, 3e-3)
BETAS, BETA, FIRST_BETAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 0.1, (0.03, 0.1, 0.3)
MARGIN = 0.05  # of gold
QUESTIONS = ["replies/test", "replies/hand_test", "replies/hand_test, first 20 by id"]


@dataclass(frozen=True)
class Arm:
    """A method of methods.py. beta_of: the arm and budget whose beta it takes."""

    method: str
    budgets: tuple = (SECONDS, PASS)
    rare: bool = False
    weighted: bool = False
    beta_of: tuple | None = None


ARMS = {
    "sft liked": Arm("sft"),
    "orpo": Arm("orpo"),
    "dpo": Arm("dpo", (PASS,)),
    "kto": Arm("kto", weighted=True),
    "spin": Arm("spin"),
    "rare: sft liked": Arm("sft", (PASS,), rare=True),
    "rare: dpo": Arm("dpo", (PASS,), rare=True, beta_of=("dpo", PASS)),
    "rare: kto": Arm("kto", (PASS,), rare=True, weighted=True, beta_of=("kto", SECONDS)),
    "rare: kto, no weight": Arm("kto", (PASS,), rare=True, beta_of=("kto", SECONDS)),
}
TIMED = ("sft", "dpo", "orpo", "kto", "spin")
UNTRAINED = {"SFT model": 1.0, "temperature 0.2": 0.2}
CHOSEN = {
    "rate": f"the best of a ladder on the validation tickets, seed {SEARCH_SEED}, for each arm and "
    "budget",
    "beta": f"the best of a ladder on the same tickets, seed {SEARCH_SEED}, once for each method",
    "all else": "given in run.py",
}


# --- A run ----------------------------------------------------------------------------------------


def recorded(kind: str, *arguments, limit: int | None = None) -> list[dict]:
    """The records of a run. limit: of a dry run, so many tickets and questions, and few steps."""
    import torch

    torch.set_num_threads(1)
    began = cpu_clock()
    records = {"time": timed, "untrained": untrained, "train": train}[kind](*arguments, limit=limit)
    each = round((cpu_clock() - began) / len(records), 1)
    return [r | {"cpu_seconds": each} | stamp("float32", QUESTIONS, CHOSEN) for r in records]


def world():
    """What runs share (experiments/alignment): tokenizer, tickets, the SFT model."""
    from experiments.alignment.run import world

    return world("log")


def timed(limit: int | None) -> list[dict]:
    """What a step of each method takes, all in turns."""
    here = world()
    found = methods.thumbs(methods.drawn(here, SEARCH_SEED, limit), SEARCH_SEED)
    seconds = methods.step_seconds(here, found, SEARCH_SEED, limit)
    return [
        name_of_time(method)
        | {"step_seconds": seconds[method], "seconds_a_step": methods.cost_of(seconds[method])}
        for method in TIMED
    ]


def untrained(seed: int, limit: int | None) -> list[dict]:
    """The SFT model as it is, and at a lower temperature."""
    here = world()
    records = []
    for arm, temperature in UNTRAINED.items():
        found = methods.on_test(here, here.start, seed, temperature, limit)
        records.append(name_of_untrained(arm, seed) | {"temperature": temperature} | found)
    return records


def train(name: dict, cost: dict[str, float], limit: int | None) -> list[dict]:
    """The record of a trained model. name: what tells the run from all others."""
    here, arm, seed = world(), ARMS[name["arm"]], name["seed"]
    found = methods.thumbs(methods.drawn(here, seed, limit), seed, arm.rare)
    steps = methods.pass_steps(arm.method, found)
    if name["budget"] == SECONDS:
        steps = methods.seconds_steps(arm.method, found, cost)
    if limit:
        steps = methods.ROUNDS
    setting = methods.Setting(arm.method, name["rate"], name["beta"], seed, arm.weighted)
    model, told = methods.trained(here, found, setting, steps)
    record = name | {"method": arm.method, "weighted": arm.weighted} | told
    record |= {"thumbs": len(found), "liked": len(methods.liked(found))}
    record |= methods.on_validation(here, model, seed, limit)
    if name["phase"] == "final":
        record |= methods.on_test(here, model, seed, limit=limit)
    return [record]


# --- Which runs -----------------------------------------------------------------------------------


def name_of_time(method: str) -> dict:
    return {"arm": method, "seed": SEARCH_SEED, "phase": "time"}


def name_of_untrained(arm: str, seed: int) -> dict:
    return {"arm": arm, "seed": seed, "phase": "final"}


def name_of(arm: str, budget: str, rate: float, beta: float | None, seed: int, phase: str) -> dict:
    name = {"arm": arm, "budget": budget, "rate": rate, "beta": beta}
    return name | {"seed": seed, "phase": phase}


def costs(records: list[dict]) -> dict[str, float]:
    """{method: CPU seconds a step}, as timed; {} before that."""
    return {r["arm"]: r["seconds_a_step"] for r in records if r["phase"] == "time"}


def tried(arm: str, budget: str, records: list[dict]) -> dict[tuple, float]:
    """{(rate, beta): gold on the validation tickets} of an arm's search so far."""
    found = {}
    for record in records:
        if (record["phase"], record["arm"], record.get("budget")) == ("search", arm, budget):
            found[record["rate"], record["beta"]] = record["validation"]
    return found


def climbed(first: tuple, ladder: tuple, scores: dict[float, float]) -> list[float]:
    """What a search tries: the first ones, then the next beyond the best while that is at an edge."""
    wanted = list(first)
    while set(wanted) <= scores.keys():
        at = ladder.index(best_of(wanted, scores))
        around = ladder[max(at - 1, 0) : at + 2]
        beyond = [value for value in around if value not in wanted]
        if not beyond:
            break
        wanted += beyond
    return wanted


def best_of(values: list[float], scores: dict[float, float]) -> float:
    """The value with the highest score; of equals the lowest one."""
    return max(sorted(values), key=lambda value: scores[value])


def search(arm: str, budget: str, records: list[dict]) -> tuple[list[tuple], tuple | None]:
    """(every (rate, beta) that an arm's search tries, as far as it has come; the best, or None)."""
    told, scores = ARMS[arm], tried(arm, budget, records)
    start = beta_at_first(arm, budget, records)
    if start == "unknown":
        return [], None
    of_rates = {rate: score for (rate, beta), score in scores.items() if beta == start}
    rates = climbed(FIRST_RATES, LADDER, of_rates)
    wanted = [(rate, start) for rate in rates]
    if not set(rates) <= of_rates.keys():
        return wanted, None
    rate = best_of(rates, of_rates)
    if told.method == "sft":
        wanted += [(near, None) for near in between(rate)]
    elif searches_beta(arm, budget):
        of_betas = {beta: score for (one, beta), score in scores.items() if one == rate}
        betas = climbed(FIRST_BETAS, BETAS, of_betas)
        wanted += [(rate, beta) for beta in betas if beta != start]
    if not set(wanted) <= scores.keys():
        return wanted, None
    return wanted, max(wanted, key=scores.get)


def between(rate: float) -> list[float]:
    """The rates of BETWEEN beside this one: half a step of the ladder away."""
    return [other for other in BETWEEN if rate / 2.1 < other < rate * 2.1]


def searches_beta(arm: str, budget: str) -> bool:
    """Whether beta is searched here: once a method, at its first budget."""
    told = ARMS[arm]
    return told.method != "sft" and told.beta_of is None and budget == told.budgets[0]


def beta_at_first(arm: str, budget: str, records: list[dict]) -> float | str | None:
    """The beta at which rates are searched: None for SFT, "unknown" before it has been found."""
    told = ARMS[arm]
    if told.method == "sft":
        return None
    if searches_beta(arm, budget):
        return BETA
    best = search(*(told.beta_of or (arm, told.budgets[0])), records)[1]
    return best[1] if best else "unknown"


def jobs(records: list[dict]) -> list[Job]:
    """Every run, as far as the search has come."""
    found = [Job(tuple(name_of_time(method) for method in TIMED), ("time",))]
    for seed in SEEDS:
        names = tuple(name_of_untrained(arm, seed) for arm in UNTRAINED)
        found.append(Job(names, ("untrained", seed)))
    cost = costs(records)
    if not cost:
        return found
    for arm, told in ARMS.items():
        for budget in told.budgets:
            found += runs_of(arm, budget, records, cost)
    return found


def runs_of(arm: str, budget: str, records: list[dict], cost: dict[str, float]) -> list[Job]:
    """The search of an arm in a budget, and its final runs once that is over."""
    wanted, best = search(arm, budget, records)
    names = [name_of(arm, budget, *setting, SEARCH_SEED, "search") for setting in wanted]
    if best:
        names += [name_of(arm, budget, *best, seed, "final") for seed in SEEDS]
    return [Job((name,), ("train", name, cost)) for name in names]


if __name__ == "__main__":
    work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])
