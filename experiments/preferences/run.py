"""ORPO, KTO, SPIN and DPO against SFT on the liked replies: at equal CPU seconds, and at equal
passes over the same thumbs.

    python experiments/preferences/run.py          every run that records.jsonl lacks, on one thread
    python experiments/preferences/run.py --plan   what is missing, seed by seed

It can be stopped and goes on (experiments/runs.py says how). experiments/preference asked this at
about equal seconds alone, with five seeds, and with `speed_up` in some arms; its records stand as
they are, and these are in a folder of their own.

The SFT model (`micro`, 3.5M, data/replies_start) writes six replies to each of a seed's 250
tickets. A reply gets a thumbs-up if its gold is at least 0.7 (the right action, and two of the
other properties missing at most), else a thumbs-down: about one in five is up. The 1,500 thumbs are
all that a method is told:

| method | reads | a step is | one pass is about |
|---|---|---|---|
| sft liked | the replies with a thumbs-up | 8 of them | 40 steps |
| orpo, dpo | pairs of a liked and a disliked reply to a ticket; each once | 8 pairs | 37 steps |
| kto | every thumb, both kinds with equal weight in sum | 16 thumbs | 93 steps |
| spin | liked replies, each against a new one of the model's own; two rounds | 8 pairs | 40 steps |

Two budgets. "one pass": each method reads once what it makes of the same thumbs. "equal seconds":
as many steps as fit into the CPU seconds that DPO takes for its pass, so that DPO's run is the same
in both. Seconds of a step are timed once, all methods in turns on one thread (the records "time"),
and SPIN's count the replies that it draws. Making and judging the thumbs is left out: all share it.

| arm | budget | seeds | CPU hours, search among them |
|---|---|---|---|
| sft liked | equal seconds | 6 | 0.18 |
| sft liked | one pass | 6 | 0.11 |
| orpo | equal seconds | 6 | 0.19 |
| orpo | one pass | 6 | 0.13 |
| orpo, reply | one pass | 6 | 0.19 |
| dpo | one pass, which is both | 6 | 0.19 |
| kto | equal seconds | 6 | 0.19 |
| kto | one pass | 6 | 0.45 |
| spin | equal seconds | 6 | 0.19 |
| spin | one pass | 6 | 0.18 |
| rare: kto | one pass | 6 | 0.40 |
| rare: kto, no weight | one pass | 6 | 0.40 |
| rare: sft liked | one pass | 6 | 0.08 |
| SFT model; temperature 0.2 | nothing is trained | 6 draws | 0.04 |
| thumbs, and the clock | | | 0.07 |

The CPU hours, 3.0 in all, are an estimate from a dry run on one thread of an AMD EPYC that had
other work: 0.34 s a step of SFT, 0.70 of ORPO, 0.93 of DPO, 1.11 of SPIN, 1.54 of KTO; 14 s beside
the training in a run of the search, 25 in a final one; four rates (SFT: six) and three more betas
an arm. A search that goes on takes up to 0.04 more for each value. Three hours were to be the most.
Cut from the bottom for that: 400 tickets a seed, DPO with rare thumbs, turned thumbs (the old
experiment has them), SFT on the liked replies and then DPO or KTO, SPIN and SFT on replies that
people wrote.

"rare": thumbs-up are left out until there is one for ten thumbs-down, about 1,300 thumbs with 120
up. KTO with its weight (10), without it, and SFT on these few liked replies, each for one pass.

Equal tools: TRL's own trainers, SFT, DPO (for SPIN too), KTO, and ORPO from trl.experimental. None
has `speed_up`, since ORPO's can't have it. ORPO's NLL is over prompt and reply, as in TRL; "orpo,
reply" has the paper's, over the reply alone. All: LoRA of rank 16, alpha 32, all linear layers,
AdamW, 3 steps of warm-up, linear decay, fp32 (bf16=False), one thread. SPIN merges its adapter
between the rounds and begins a new one.

Settings come from the validation tickets (182, of skeletons that neither the log nor any training
ticket has), seed 11: the mean gold of one sampled and one greedy reply to each. Each arm tries the
rates 3e-4, 1e-3, 3e-3 in each of its budgets and goes on while the best is at an edge. Then each
method tries beta (ORPO: lambda) 0.03 and 0.3 beside TRL's 0.1 at its best rate, going on in the
same way; once, at equal seconds, and its other arms take that beta. SFT has no beta and tries two
rates between, half a step away, in its place.

Fixed before the first run:

- Six seeds, 1 to 6, for every arm, paired by seed and by ticket, on data/replies/test.jsonl (180)
  and data/replies/hand_test.jsonl (115). A seed draws tickets, replies, adapter and order.
- Greedy replies decide, since a lower temperature gives sampled gold for nothing ("temperature
  0.2"). Sampled replies (temperature 1, two a ticket) stand beside them by the same rules.
- Main comparisons, in each budget: ORPO, DPO, KTO and SPIN against sft liked of the same budget.
  One is ahead, or behind, if the crossed 95 % interval of the difference excludes zero on both
  sets; on one of them, the sentence names it. It is equivalent if that interval lies within 0.05 of
  zero on both sets: half of what the least of gold's five properties is worth. Otherwise it is
  undecided. A method whose verdict differs between the budgets is told with both.
- "orpo, reply" against "orpo", one pass each, by the same rule.
- Does it gain? Each arm against the SFT model, by the same rule. KTO against DPO in each budget is
  reported and decides nothing.
- Rare: "rare: kto" against "rare: kto, no weight", and both against "rare: sft liked", by the same
  rule.
- What can be found: in the old experiment the intervals of such differences in greedy replies were
  0.03 to 0.065 wide on each side with five seeds; with six and the same spread 0.03 to 0.055. So a
  lead of 0.05 is found on a set about every second time, on both less often, and equivalence
  seldom: on the hand test hardly ever. "Undecided" is likely, and the report must say so.
- The intervals are not corrected for how many comparisons there are.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, budget, rate, beta, seed, phase ("time", "search", "final"), method, weighted, steps,
rows (that the method makes of the thumbs), passes over them, thumbs, liked, train_cpu_seconds (of
train(), and of SPIN's drawing), `curve` (what TRL logs, at most twelve times a training: loss,
rewards, logps of both sides, which are means a token in ORPO and sums elsewhere, KTO's kl),
validation, validation_sampled, validation_greedy, kl (nats per answer from the SFT model,
validation tickets), and of final runs `test` and `hand`: sampled and greedy gold of each ticket,
words and cut (the share cut off at 64 tokens) of both kinds, and the replies to 20 tickets of the
hand test.
"""

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
QUESTIONS = ["replies/test", "replies/hand_test", "replies/hand_test, first 20 by id"]


@dataclass(frozen=True)
class Arm:
    """A method of methods.py. beta_of: the arm and budget whose beta it takes."""

    method: str
    budgets: tuple = (SECONDS, PASS)  # its beta is searched in the first
    rare: bool = False
    weighted: bool = False
    beta_of: tuple | None = None


ARMS = {
    "sft liked": Arm("sft"),
    "orpo": Arm("orpo"),
    "orpo, reply": Arm("orpo reply", (PASS,)),
    "dpo": Arm("dpo", (PASS,)),
    "kto": Arm("kto", weighted=True),
    "spin": Arm("spin"),
    "rare: sft liked": Arm("sft", (PASS,), rare=True),
    "rare: kto": Arm("kto", (PASS,), rare=True, weighted=True, beta_of=("kto", SECONDS)),
    "rare: kto, no weight": Arm("kto", (PASS,), rare=True, beta_of=("kto", SECONDS)),
}
TIMED = ("sft", "dpo", "orpo", "kto", "spin")
UNTRAINED = {"SFT model": 1.0, "temperature 0.2": 0.2}
WHERE = f"on the validation tickets, seed {SEARCH_SEED}"
CHOSEN = {
    "rate": f"the best of a ladder {WHERE}, for each arm and budget",
    "beta": f"the best of a ladder {WHERE}, once for each method",
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
    records = []
    for method in TIMED:
        each = {"step_seconds": seconds[method], "seconds_a_step": methods.cost_of(seconds[method])}
        records.append(name_of_time(method) | each)
    return records


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
    """What a search tries: the first ones, then the next beyond the best while that is an edge."""
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
