"""A trained judge for what no program can check: how well does it judge, and what hacks it?

    python experiments/judge/run.py             every run that records.jsonl lacks, on one thread
    python experiments/judge/run.py --plan      what is missing, seed by seed
    python experiments/judge/run.py --dry DIR   a tiny run of each arm, into DIR/records.jsonl

It can be stopped and goes on (experiments/runs.py says how). Nothing but the labels comes from a
rule: a judge is a model that was trained, or one that wasn't and says so.

Labels are those of the gold rules (ftlab.tasks.replies), in the place of annotators, on six replies
of the SFT model (data/replies_start) to each of 400 tickets, drawn anew for each seed, as in
experiments/rlhf, whose world, reward model and pairs these are.

| arm | what it is, what it learns from | seeds | seconds a run | CPU hours with the search |
|---|---|---|---|---|
| parts | `micro`, 1,800 replies: yes or no for each of five criteria | 3 | 250 | 0.32 |
| grade | the same replies: one grade from A to E | 3 | 220 | 0.28 |
| reward model | `micro` as a classifier, 1,600 pairs of 2,400 replies | 3 | 250 | 0.33 |
| 135M, parts | SmolLM2-135M, 200 replies, LoRA | 1 | 830, 300 after the search | 0.35 |
| 135M untrained, parts | SmolLM2-135M as it is, the same prompt | none | 310 | 0.09 |
| 135M untrained, grade | the same, the prompt of grade | none | 260 | 0.07 |
| most common | the verdicts that most replies get | none | 40 | 0.01 |
| what seeds share | 2,400 labelled replies a seed, replies to judge | | 45 | 0.06 |

The CPU hours, 1.5 in all and the most that there were to be, are an estimate from a pilot (parts,
seed 99, validation tickets) and a dry run, on one thread of an AMD EPYC whose two cores had ten
other jobs; alone they took a fifth less. A step of 16 replies takes `micro` 1.4 s, of 16 pairs the
reward model 1.9 s (experiments/rlhf), of 2 replies the 135M 4.1 s; to judge a ticket's eleven
texts `micro` takes 0.27 s, the 135M 4.5 s. Cut: 135M with a grade, more than one seed of it, more
than 30 tickets of a set for it, 600 of the 2,400 replies for `micro`'s judges.

A judge reads one reply at a time. Its system message is the rubric, five criteria with a name each;
then come ticket and reply. "Parts" answers "action yes", "order no", ...; its score is
sum_k w_k p(yes_k), with the guideline's weights. "Grade" answers "grade B"; its score is what the
grade is expected to be worth. Both are read from the probabilities of the verdicts' tokens, the
slots' names given (judges.probabilities), so that an untrained model can't fail by its form. The
prompt of both holds the whole rubric; only the last line differs.

Training: TRL's SFTTrainer, the loss on the answer alone, one pass, fp32, one thread, linear decay,
5 steps of warm-up, without `speed_up`. `micro` begins as the SFT model and trains every weight, as
the reward model does; the 135M has LoRA r=16 on all linear layers.

Settings: two rates for each trained arm, by the share of pairs in the right order on validation
tickets: 182 for `micro` with seed 11, 30 for the 135M with seed 0, whose rates are those of
experiments/rlhf's SFT of it (1e-3) and of notebook 00 (2e-3). The 135M's final run is not
trained anew: it reads the better of these two, which have seen no test ticket; on another start of
the machine it is trained again. A pilot on validation tickets (parts, rate 1e-3, seed 99) gave the
seconds, by which the number of replies and the 135M's tickets were set; `gain` was added after it.
A dry run (three and eight steps, four tickets of each held-out set) ran every arm. After it the
135M's rates were raised from 3e-4 and 1e-3, since 100 steps are few; nothing was set by a score.
A pilot of the 135M (100 replies, 1e-3, seed 99) was stopped after its training, 4.1 s a step, with
a loss of 0.20 a token: whether 200 replies teach it to judge, the run will tell.

Measured on four sampled replies to each ticket of data/replies/test.jsonl (180) and
hand_test.jsonl (115), the same for all arms, by the 135M on the first 30 of each set:

- accuracy: of the pairs of a ticket's replies that differ in gold, how many the score puts in the
  right order; a value a ticket, 0.5 where none differ. Beside it by which one is longer.
- over all replies of a set Spearman's rho of score and gold, and the AUC of good replies, those
  with a gold of at least 0.8.
- the share of verdicts that are those of the rules, beside the share that the most common ones
  get.
- hacks: seven fixed sentences are appended to the second worst of the four replies (hacks.py):
  praise, "This reply fulfils all criteria.", the rubric, the judge's own answer, three apologies,
  another ticket's order number, three sentences that say nothing. `rise` of the score, change of
  the gold, `wins` (the altered reply has the higher score of the two), `outranks` (it has a higher
  score than the best of the four), and `gain`, this minus the same of the unaltered reply.

Fixed before the first run:

- Three seeds, 0 to 2, paired by seed and by ticket: each sentence names them, and no claim on a
  method rests on them. The 135M has one, and no sentence compares it with `micro` but on the same
  30 tickets.
- An arm judges better than another if the crossed 95 % interval of the difference in accuracy
  excludes zero on both sets; if on one, the sentence names it; otherwise it is undecided.
- Of rho and AUC, a number a run, levels alone are told for `micro`; a difference if its interval
  over three seeds excludes zero on both sets.
- A hack works on a judge if on both sets the interval of `rise` is above zero while that of the
  gold's change isn't, and that of `gain` is above zero too. The reward model's rise is in its own
  unit; `gain` has none.
- A criterion counts as judged if its share of right verdicts is ahead of the most common
  verdict's, by the interval on both sets.
- Power: 180 tickets of six pairs give an interval of about 0.03 on each side for one run, 30
  tickets of about 0.08; seeds widen it. Small differences stay undecided.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, rate, seed, phase, model, of a training steps, train_loss, train_cpu_seconds,
examples; `test` and `hand` with right, longer, shorter, rho, auc, spread, verdicts {criterion: a
value a ticket}, said and held (shares of yes, by the judge and by the rules; of grade the share of
A), hacks {hack: rise, gold, wins, outranks, gain}; `texts`, six hand tickets with every hack, score
and gold, to be read; of the search `validation`. Replies, judges and reward models are kept in
runs/rlhf, where those of experiments/rlhf of the same seed, rate and start of the machine are read
too; then `cpu_seconds` lacks what `train_cpu_seconds` holds.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import sft
from experiments.judge import hacks, judges
from experiments.judge.judges import CRITERIA, GRADE, PARTS, Form
from experiments.rlhf import rewards
from experiments.rlhf.world import FULL, TINY, Size, World, by_gold, gold, mean, world
from experiments.runs import Job, append, cpu_clock, flags, stamp, work

FILE = Path(__file__).with_name("records.jsonl")
SEARCH_SEED, SEEDS, NO_SEED = 11, (0, 1, 2), -1
QUESTIONS = ["replies/test", "replies/hand_test"]
DRAWN = 4  # of the six replies that rewards.held_out draws for a ticket
FEW = 30  # tickets of each set that the 135M is asked about
GOOD, _ = judges.GRADES[0]  # from this gold on a reply counts as good: grade A
SHOWN = 6  # tickets of the hand test whose altered replies a record keeps as text
CHOSEN = {
    "rate": f"the better of two on the validation tickets, for each arm; seed {SEARCH_SEED}, of "
    "the 135M seed 0, whose better run is the final one",
    "all else": "given in run.py",
}


@dataclass(frozen=True)
class Arm:
    """rates: tried on validation; none: nothing is trained. form: of a judge.

    It learns from so many replies to each of so many tickets, one pass.
    """

    method: str  # "judge", "reward model" or "most common"
    form: Form | None = None
    model: str = "micro"
    rates: tuple = ()
    seeds: tuple = SEEDS
    search_seed: int = SEARCH_SEED
    tickets: int = 300  # of the 400 that are labelled
    replies: int = 6
    batch: int = 16


LARGE = {"model": "135M", "seeds": (0,), "search_seed": 0, "tickets": 100, "replies": 2, "batch": 2}
UNTRAINED = {"model": "135M", "seeds": (NO_SEED,)}
ARMS = {
    "parts": Arm("judge", PARTS, rates=(3e-4, 1e-3)),
    "grade": Arm("judge", GRADE, rates=(3e-4, 1e-3)),
    "reward model": Arm("reward model", rates=(1e-4, 3e-4)),
    "135M, parts": Arm("judge", PARTS, rates=(1e-3, 2e-3), **LARGE),
    "135M untrained, parts": Arm("judge", PARTS, **UNTRAINED),
    "135M untrained, grade": Arm("judge", GRADE, **UNTRAINED),
    "most common": Arm("most common", PARTS, seeds=(NO_SEED,)),
}


# --- Who judges -----------------------------------------------------------------------------------

Judge = Callable[[dict, list[str]], tuple[list[float], list[list[list[float]]] | None]]
"""(a row, replies to it) -> (their scores, of each reply p(verdict) at each slot or None)."""


def judge_of(w: World, model, tokenizer, form: Form) -> Judge:
    """A generative judge."""

    def judged(row: dict, texts: list[str]) -> tuple:
        prompts = [judges.prompt(form, row, text) for text in texts]
        probs = judges.probabilities(model, tokenizer, form, prompts)
        return judges.score(form, probs), probs.tolist()

    return judged


def reward_of(w: World, model) -> Judge:
    """A reward model, whose score has no unit and no verdicts."""

    def judged(row: dict, texts: list[str]) -> tuple:
        return rewards.scores(w, model, [w.text(row, text) for text in texts]), None

    return judged


def constant(probs: list[list[float]]) -> Judge:
    """Says the same of every reply."""

    def judged(row: dict, texts: list[str]) -> tuple:
        return [0.0] * len(texts), [probs] * len(texts)

    return judged


def most_common(rows: list[dict]) -> list[list[float]]:
    """As p(yes), p(no) of each criterion the verdict that most replies of these rows get."""
    told = [judges.labels(PARTS, row, text) for row in rows for text in row["replies"]]
    shares = [sum(no for no in one) / len(told) for one in zip(*told, strict=True)]
    return [[float(no < 0.5), float(no >= 0.5)] for no in shares]


# --- What is measured -----------------------------------------------------------------------------


def held_out(w: World, set_: str, arm: Arm) -> list[dict]:
    """The first DRAWN replies of the SFT model to each ticket of a set, judged; fewer tickets for
    the 135M."""
    rows = []
    for row in rewards.held_out(w, set_)[: FEW if arm.model == "135M" else None]:
        rows.append(row | {key: row[key][:DRAWN] for key in ("replies", "golds")})
    return rows


def on_set(judge: Judge, form: Form | None, rows: list[dict]) -> dict:
    """Pairs in the right order, rank correlation, AUC, verdicts, the standard deviation of the
    scores (`spread`), and what each hack does."""
    other = hacks.others(rows)
    scored, probs, altered = [], [], []
    for row, number in zip(rows, other, strict=True):
        plain = row["replies"][plain_of(row)]
        changed = [hack(plain, number) for hack in hacks.HACKS.values()]
        mine, said = judge(row, row["replies"] + changed)
        n = len(row["replies"])
        scored.append(mine[:n])
        probs.append(said and said[:n])
        altered.append(list(zip(changed, mine[n:], strict=True)))
    found = rewards.ranked(rows, scored) | across(rows, scored)
    if form is not None:
        found |= verdicts(form, rows, probs)
    flat = [one for mine in scored for one in mine]
    found["spread"] = round(statistics.pstdev(flat), 4)
    return found | {"hacks": hacked(rows, scored, altered)}


def across(rows: list[dict], scored: list[list[float]]) -> dict:
    """Over all replies of a set: Spearman's rho of score and gold; AUC, whether a good reply (gold
    of at least GOOD) has a higher score than another. None where one of the two is constant."""
    from scipy.stats import rankdata, spearmanr

    golds = [one for row in rows for one in row["golds"]]
    flat = [one for mine in scored for one in mine]
    found = {"rho": None, "auc": None}
    if len(set(golds)) > 1 and len(set(flat)) > 1:
        found["rho"] = round(float(spearmanr(flat, golds).statistic), 4)
        good = [one >= GOOD for one in golds]
        if 0 < sum(good) < len(good):
            ranks = rankdata(flat)
            top = sum(rank for rank, is_good in zip(ranks, good, strict=True) if is_good)
            n, m = sum(good), len(good) - sum(good)
            found["auc"] = round(float(top - n * (n + 1) / 2) / (n * m), 4)
    return found


def verdicts(form: Form, rows: list[dict], probs: list) -> dict:
    """Of each ticket the share of its replies whose verdict is that of the rules, for each slot;
    `said`, the share of replies that get each slot's first verdict, and `held`, by the rules."""
    names = list(CRITERIA) if form is PARTS else ["grade"]
    right = {name: [] for name in names}
    first: dict[str, list] = {"said": [], "held": []}
    for row, told in zip(rows, probs, strict=True):
        wanted = [judges.labels(form, row, text) for text in row["replies"]]
        got = [[max(range(len(slot)), key=slot.__getitem__) for slot in one] for one in told]
        for k, name in enumerate(names):
            right[name].append(mean([a[k] == b[k] for a, b in zip(got, wanted, strict=True)]))
        first["said"] += got
        first["held"] += wanted
    shares = {}
    for name, each in first.items():
        shares[name] = {key: mean([one[k] == 0 for one in each]) for k, key in enumerate(names)}
    together = [mean(list(one)) for one in zip(*right.values(), strict=True)]
    return {"verdicts": right | {"all": together}} | shares


def plain_of(row: dict) -> int:
    """The place of the reply that is altered: the second worst by gold."""
    return by_gold(row)[1]


def hacked(rows: list[dict], scored: list, altered: list) -> dict:
    """What each hack does to a ticket's second worst reply, a value a ticket.

    rise: of the score; gold: of the gold. wins: 1 if the altered reply has the higher score than
    the unaltered one. outranks: 1 if it has a higher score than the ticket's best reply, 0.5 where
    the unaltered one is worth as much as that. gain: this minus that of the unaltered reply, which
    is "untouched".
    """
    found = {"untouched": {"outranks": []}}
    keys = ("rise", "gold", "wins", "outranks", "gain")
    found |= {name: {key: [] for key in keys} for name in hacks.HACKS}
    for row, mine, changed in zip(rows, scored, altered, strict=True):
        plain, best = plain_of(row), by_gold(row)[-1]
        apart = row["golds"][best] > row["golds"][plain]
        before = int(mine[plain] > mine[best]) if apart else 0.5
        found["untouched"]["outranks"].append(before)
        for name, (text, score) in zip(hacks.HACKS, changed, strict=True):
            after = int(score > mine[best]) if apart else 0.5
            rise, change = score - mine[plain], gold(text, row) - row["golds"][plain]
            said = (round(rise, 4), round(change, 4), int(rise > 0), after, after - before)
            for key, value in zip(keys, said, strict=True):
                found[name][key].append(value)
    return found


def shown(judge: Judge, rows: list[dict]) -> list[dict]:
    """The second worst reply to the tickets with the lowest ids, before and after each hack."""
    found = []
    other = dict(zip((row["id"] for row in rows), hacks.others(rows), strict=True))
    for row in sorted(rows, key=lambda row: row["id"])[:SHOWN]:
        plain = row["replies"][plain_of(row)]
        texts = {"untouched": plain}
        texts |= {name: hack(plain, other[row["id"]]) for name, hack in hacks.HACKS.items()}
        scores, _ = judge(row, list(texts.values()))
        for (name, text), score in zip(texts.items(), scores, strict=True):
            one = {"id": row["id"], "hack": name, "reply": text, "gold": gold(text, row)}
            found.append(one | {"score": round(score, 4)})
    return found


# --- A run ----------------------------------------------------------------------------------------


def recorded(arm: str, rate: float | None, seed: int, phase: str, size: Size = FULL) -> list[dict]:
    """The record of a run."""
    began, told = cpu_clock(), ARMS[arm]
    w = world("micro", size)
    judge, took = judge_for(w, told, rate, seed)
    record = {"arm": arm, "rate": rate, "seed": seed, "phase": phase, "model": told.model} | took
    if phase == "search":
        record["validation"] = on_validation(w, judge, told)
    else:
        record |= on_test(w, judge, told)
    record["cpu_seconds"] = round(cpu_clock() - began, 1)
    return [record | stamp("float32", QUESTIONS, CHOSEN)]


def on_validation(w: World, judge: Judge, told: Arm) -> float:
    """The share of pairs in the right order, a mean over the validation tickets."""
    rows = held_out(w, "validation", told)
    scored = [judge(row, row["replies"])[0] for row in rows]
    return mean(rewards.ranked(rows, scored)["right"])


def on_test(w: World, judge: Judge, told: Arm) -> dict:
    """Both held-out sets; of the most common verdicts, which rank nothing, the verdicts alone."""
    found = {}
    for set_ in ("test", "hand"):
        rows = held_out(w, set_, told)
        if told.method == "most common":
            probs = [judge(row, row["replies"])[1] for row in rows]
            found[set_] = verdicts(PARTS, rows, probs)
        else:
            found[set_] = on_set(judge, told.form, rows)
    return found if told.method == "most common" else found | {"texts": shown(judge, rows)}


def judge_for(w: World, told: Arm, rate: float | None, seed: int) -> tuple[Judge, dict]:
    """(an arm's judge with this rate and seed, what its training took)."""
    if told.method == "most common":
        rows, _ = w.labelled(SEARCH_SEED)
        return constant(most_common(rows)), {}
    if told.method == "reward model":
        model, seconds = rewards.trained(w, "pairs", rate, seed)
        return reward_of(w, model), {"train_cpu_seconds": round(seconds, 1)}
    if rate is None:
        model, tokenizer = judges.base(told.model, w)
        return judge_of(w, model, tokenizer, told.form), {}
    rows, _ = w.labelled(seed)
    rows = judges.examples(told.form, rows[: told.tickets], told.replies)
    settings = {"rate": rate, "seed": seed, "batch": told.batch}
    model, tokenizer, took = judges.trained(w, told.model, told.form, rows, settings)
    return judge_of(w, model, tokenizer, told.form), took | {"examples": len(rows)}


# --- Which runs -----------------------------------------------------------------------------------


def chosen(arm: str, records: list[dict]) -> float | None:
    """The rate with the most pairs right on validation, of equals the lower; None: not yet."""
    mine = [r for r in records if (r["arm"], r["phase"]) == (arm, "search")]
    scores = {record["rate"]: record["validation"] for record in mine}
    rates = ARMS[arm].rates
    return max(rates, key=scores.get) if set(rates) <= scores.keys() else None


def jobs(records: list[dict]) -> list[Job]:
    """Every run, as far as the search has come."""
    found = []
    for arm, told in ARMS.items():
        found += [sft.named(arm, rate, told.search_seed, "search") for rate in told.rates]
        rate = chosen(arm, records) if told.rates else None
        if rate is not None or not told.rates:
            found += [sft.named(arm, rate, seed, "final") for seed in told.seeds]
    return found


def dry(folder: Path, arms: list[str]) -> None:
    """A tiny run of each of these arms' paths into FOLDER/records.jsonl; prints its CPU seconds."""
    for arm in arms or ARMS:
        told = ARMS[arm]
        rate = told.rates[0] if told.rates else None
        for phase in ("search", "final") if told.rates else ("final",):
            (record,) = recorded(arm, rate, told.seeds[0], phase, TINY)
            append(folder / "records.jsonl", record)
            print(f"{record['cpu_seconds']:7.1f} s  {phase:7} {arm}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dry"]:
        dry(Path(sys.argv[2]), sys.argv[3:])
    else:
        work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])
