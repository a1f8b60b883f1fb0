"""RLHF or DPO from one SFT model, six seeds, equal tools: what does each gain, how far away, when?

    python experiments/rlhf/run.py             every run that records.jsonl lacks, on one thread
    python experiments/rlhf/run.py --plan      what is missing, seed by seed
    python experiments/rlhf/run.py --dry DIR   a tiny run of each arm's path, into DIR/records.jsonl

It can be stopped and goes on (experiments/runs.py says how). experiments/alignment asks the same
with unequal tools, five seeds at most and three checkpoints a run; its records stand as they are.

Every run of `micro` starts from data/replies_start, SFT on the old team's log. Labels come from the
gold rules (ftlab.tasks.replies), as annotators that never tire.

| arm | learns from | seeds | CPU hours, search among them |
|---|---|---|---|
| SFT model | nothing; at temperature 0.2 and as the best of six too | none | 0.03 |
| reward model | pairs of the SFT model's 2,400 judged replies | 6 | 0.6 |
| SFT on the best of 6 | the best of these six replies to each of 400 tickets | 6 | 0.4 |
| DPO, one round | the best of them against the worst | 6 | 0.45 |
| DPO, three rounds | the same in 3 rounds of 133 tickets, sampled and judged anew | 6 | 0.55 |
| PPO | the reward model | 6 | 1.25 |
| GRPO | the reward model | 6 | 0.8 |
| GRPO on gold | the gold rules, asked for each of 1,920 replies | 6 | 0.65 |
| longer wins | a reward model whose pairs prefer the longer reply; no cap | 6 | 0.75 to 1.2 |
| any length wins | PPO's and GRPO's reward model; no cap | 6 | 0.3 |
| 135M: SFT model, SFT on the best of 6, DPO | 60 tickets, one pass | 1 | 0.45 |

The CPU hours, 6.2 to 6.7 in all, are an estimate from a dry run on one thread of an AMD EPYC whose
two cores had ten other jobs. A step takes 0.65 s (SFT), 0.9 s (DPO), 5 s (PPO), 2.4 s (GRPO), 2.1 s
(GRPO on gold), 1.9 s (reward model); 2,400 replies take 33 s, a checkpoint 9 to 11 s, the end of a
run 35 s. Cut: a third beta, pairs in which the longer reply wins in half of the cases, checkpoints
at every second step, and tickets of the 135M (60 of 400).

Equal tools: no arm has `speed_up`. TRL 1.14 trains in all of them, fp32, one thread, LoRA r=16 on
all linear layers, AdamW; PPO is ftlab.scratch.ppo, since TRL has no PPO any more. Replies come from
ftlab's decoder in all arms, also inside GRPO. 60 steps each: of 16 rows (SFT), 8 pairs (DPO), 32
replies (PPO, GRPO: 4 prompts x 8; PPO: 32 prompts, two minibatches). SFT and DPO have TRL's linear
decay, in each round anew; PPO and GRPO a constant rate. A reward model is a classifier that begins
as the SFT model, 100 steps of 16 pairs, every weight trained. No reply of the SFT model has 96
tokens, the limit here. Without a cap a reply may fill the context, 512 tokens.

Settings: each arm tries three neighbouring rates with its first beta, the middle one being the best
of the old experiment, a fourth beyond the best where that is an edge, and a second beta at the best
rate: with seed 11, by the gold of two sampled replies to each of 182 validation tickets, at the
end. The reward model's rate is chosen in the same way, first, by accuracy on pairs of validation
tickets. SFT has no beta. The runs without a cap have given settings (3e-4, beta 0, as in the old
experiment): nobody wants to win with them. The 135M tries two rates for each method.

Distance: KL(policy || SFT model) in nats per answer. At each position of sampled replies the exact
KL over the vocabulary, summed over positions, mean over replies (`world.distance`). After each 3
steps up to 24, and after 30, 36, 48 and 60, one reply to each test and hand ticket is sampled at
temperature 1, which gives a checkpoint's gold, a value a ticket, and, from every second reply, its
KL. "At 1 nat" is the checkpoint nearest to it, if its KL is within a quarter of that; else that run
has no value. Nothing is interpolated. In the old experiment no arm moved by more than 0.11 nats a
step over its first 20 steps.

CPU seconds: sampling and judging replies, the reward model and the training, without measuring.
What arms of a seed share (2,400 replies, the reward model) is made once and paid for by each. "By
100 s" is the last checkpoint reached by then, the SFT model before the first; a run that is over
keeps its last. 100 s lie behind the end of SFT and DPO, 400 s behind that of GRPO.

Fixed before the first run:

- Six seeds, 0 to 5, paired by seed and by ticket, on data/replies/test.jsonl (180) and
  hand_test.jsonl (115), at the end: gold of four sampled replies (one without a cap) and of the
  greedy one.
- An arm is ahead if the crossed 95 % interval of the difference excludes zero on both sets; if on
  one, the sentence names it. Two are equivalent if it lies within 0.05 of zero on both.
- The main question: PPO and GRPO against DPO in one round, which has the same 2,400 labels, sampled
  and greedy, at the end. If of neither it is known whether it is ahead, behind or equivalent, the
  report begins with "Undecided", and lesson 04 asks what can be decided: GRPO on gold against GRPO,
  which is the price of the reward model, and each DPO against SFT on the best of 6.
- Beside it: all arms against SFT on the best of 6; three rounds of DPO against one; the same pairs
  at 1 and 2 nats, and by 100 and 400 seconds. At half a nat SFT is in reach.
- A sentence on a distance needs at least four seeds that both arms have there. If at this distance
  another setting of the search turns its sign, the sentence says so: settings are chosen by the
  gold at the end, and the search's own checkpoints (10, 20, 40, 60 steps) are kept for this.
- Length is hacked in "longer wins" if, against the SFT model and on both sets, words are more and
  gold is less, with cut replies read as kindly as can be (`kindly`: without a torn last sentence),
  while the reward model's score rises (95 % interval over seeds above 0). Beside it "any length
  wins" is read in the same way. That decides whether length is hacked by the bias or by PPO and
  GRPO on any learned reward.
- Power, by the half-widths of the old experiment's intervals, five seeds: from one round of DPO
  0.03 to 0.07 for GRPO and 0.09 for PPO in sampled replies, 0.04 to 0.2 in greedy ones; between
  GRPO on gold and GRPO 0.05 to 0.07 (and +0.11 to +0.12 was found), between DPO and SFT 0.03 to
  0.05. So the main question is likely to stay undecided for PPO and for greedy replies, and
  equivalence is out of reach there.
- Reward models' accuracy: on one draw of six replies of the SFT model to each held-out ticket, and
  at the end on each policy's own replies. Six are too few to say that it explains a seed's gain. A
  ticket whose six replies are all worth the same counts as 0.5; of 460 that were drawn none did.
- The 135M: one run a method, its intervals over tickets alone. No sentence on methods rests on it.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, rate, beta, seed, phase; `labels`; `seconds`, and of these `paid` for what is shared;
`checkpoints` (step, cpu_seconds, labels, kl, words, cut, gold a ticket, `proxy`, the reward model's
mean score); `end` (sampled, greedy, kindly and words a ticket, the share cut, twelve replies as
text with gold and score); `accuracy`, of a reward model, `accuracy_on_own`; `validation`, of the
search.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.rlhf import methods, rewards
from experiments.rlhf.world import (
    FULL,
    TINY,
    Clock,
    Size,
    distance,
    judged,
    mean,
    without_the_torn_end,
    world,
)
from experiments.runs import Job, append, cpu_clock, flags, stamp, work

FILE = Path(__file__).with_name("records.jsonl")
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEARCH_SEED, SEEDS, NO_SEED = 11, (0, 1, 2, 3, 4, 5), -1
QUESTIONS = ["replies/test", "replies/hand_test"]
SEARCH_DRAWS, START_DRAWS = 2, 12
COLD = 0.2
LOOKS = (*range(3, 25, 3), 30, 36, 48, 60)  # steps at which an arm is measured
SEARCH_LOOKS, LOOKS_UNCAPPED = (10, 20, 40, 60), (10, 20, 30, 40)
SHOWN = 12  # replies of the hand test that a record keeps as text


@dataclass(frozen=True)
class Arm:
    """An arm: how it trains, what it tries on the search seed, its seeds.

    rates: three neighbours on LADDER, the middle one the old experiment's best for this method;
    one that is given is not searched. betas: the first with each rate, the others with the best.
    reward: "gold", or which pairs a reward model learns from.
    """

    method: str
    rates: tuple
    betas: tuple = (None,)
    reward: str | None = None
    seeds: tuple = SEEDS
    model: str = "micro"
    capped: bool = True

    @property
    def is_searched(self) -> bool:
        return len(self.rates) * len(self.betas) > 1


ARMS = {
    "reward model": Arm("reward model", (1e-4, 3e-4, 1e-3), reward="pairs"),
    "SFT on the best of 6": Arm("sft", (3e-4, 1e-3, 3e-3)),
    "DPO, one round": Arm("dpo", (3e-4, 1e-3, 3e-3), (0.1, 0.3)),
    "DPO, three rounds": Arm("dpo rounds", (3e-4, 1e-3, 3e-3), (0.1, 0.3)),
    "PPO": Arm("ppo", (1e-4, 3e-4, 1e-3), (0.05, 0.2), "pairs"),
    "GRPO": Arm("grpo", (3e-5, 1e-4, 3e-4), (0.04, 0.2), "pairs"),
    "GRPO on gold": Arm("grpo", (3e-4, 1e-3, 3e-3), (0.04, 0.2), "gold"),
    "longer wins": Arm("grpo", (3e-4,), (0.0,), "longer", capped=False),
    "any length wins": Arm("grpo", (3e-4,), (0.0,), "pairs", capped=False),
    "135M, SFT on the best of 6": Arm("sft", (3e-4, 1e-3), seeds=(0,), model="135M"),
    "135M, DPO": Arm("dpo", (3e-5, 1e-4), (0.1,), seeds=(0,), model="135M"),
}
STARTS = {"SFT model": "micro", "135M, SFT model": "135M"}
CHOSEN = {
    "rate": f"searched with seed {SEARCH_SEED} on the validation tickets, for each arm; of the "
    "runs that test length, given in run.py",
    "beta": f"one of two, by the same tickets and seed {SEARCH_SEED}, at the best rate",
    "all else": "given in run.py",
}


# --- A run ----------------------------------------------------------------------------------------


class Run:
    """One arm, rate, beta and seed: a clock of its training, labels, checkpoints."""

    def __init__(
        self, arm: Arm, rate: float, beta: float | None, seed: int, phase: str, size: Size
    ):
        from transformers import set_seed

        self.arm, self.rate, self.beta, self.seed, self.phase = arm, rate, beta, seed, phase
        self.world = world(arm.model, size)
        self.length = size.length if arm.capped else self.world.room
        self.clock, self.checkpoints, self.parts = Clock(), [], {}
        self.labels, self.labels_a_step, self.scorer, self.reward_rate = 0, 0, None, None
        self.looks = self.looks_at(size)
        set_seed(seed)

    def looks_at(self, size: Size) -> tuple:
        """The steps at which the model is measured."""
        if self.phase == "search":
            return SEARCH_LOOKS
        return LOOKS if self.arm.capped else LOOKS_UNCAPPED

    def labelled(self) -> list[dict]:
        """The SFT model's judged replies of this seed, paid for."""
        self.clock.stop()
        rows, seconds = self.world.labelled(self.seed)
        self.labels += sum(len(row["golds"]) for row in rows)
        self.pay("replies", seconds)
        self.clock.go_on()
        return rows

    def reward_model(self):
        """This seed's reward model, paid for; from now on checkpoints have its score."""
        self.labelled()
        self.clock.stop()
        rate = self.reward_rate or self.rate
        model, seconds = rewards.trained(self.world, self.arm.reward, rate, self.seed)
        self.pay("reward model", seconds)
        self.scorer = model
        self.clock.go_on()
        return model

    def reward(self):
        """The reward model as TRL's reward function."""
        return rewards.function(self.world, self.reward_model())

    def pay(self, part: str, seconds: float) -> None:
        self.parts[part] = round(seconds, 1)
        self.clock.pay(seconds)

    def stepped(self, model, step: int) -> None:
        """Called after each step of the training."""
        self.labels += self.labels_a_step
        if step in self.looks:
            self.look(model, step)

    def look(self, model, step: int) -> None:
        """A checkpoint, measured while the clock stands."""
        if self.arm.model != "micro":
            return
        seconds, was = self.clock.stop(), model.training
        model.eval()
        point = {"step": step, "cpu_seconds": round(seconds, 1), "labels": self.labels}
        self.checkpoints.append(point | self.seen(model, step))
        model.train(was)
        self.clock.go_on()

    def seen(self, model, step: int) -> dict:
        """Gold of one sampled reply a ticket; of every second one KL and the proxy, its reward."""
        sets = ("validation",) if self.phase == "search" else ("test", "hand")
        drawn = {}
        for k, set_ in enumerate(sets):
            seed = 10_000 * (self.seed + 1) + 10 * step + k
            rows = self.world.sets[set_]
            drawn[set_] = judged(self.world, model, rows, 1, seed, length=self.length)
        whole = [row for part in drawn.values() for row in part]
        rows = whole[::2]  # reading takes longer than sampling
        found = {"kl": round(distance(self.world, model, rows, self.length), 4)} | shape(whole)
        found["gold"] = {set_: golds(part) for set_, part in drawn.items()}
        if self.scorer is not None:
            texts = [self.world.text(row, row["replies"][0]) for row in rows]
            found["proxy"] = mean(rewards.scores(self.world, self.scorer, texts))
        return found


def golds(rows: list[dict]) -> list[float]:
    """Each ticket's mean gold."""
    return [mean(row["golds"]) for row in rows]


def shape(rows: list[dict]) -> dict:
    """Words of a reply, mean, and the share that was cut."""
    words = [len(text.split()) for row in rows for text in row["replies"]]
    return {"words": mean(words), "cut": mean([cut for row in rows for cut in row["cut"]])}


# --- What a run leaves ----------------------------------------------------------------------------


def at_the_end(run: Run, model) -> dict:
    """Both held-out sets after the training, a value a ticket, and some replies as text."""
    model.eval()
    w, cheap = run.world, run.arm.model == "micro" and run.arm.capped
    draws = w.size.draws if cheap else 1
    found = {name: {} for name in ("sampled", "greedy", "kindly", "words", "cut")}
    own = {}
    for k, set_ in enumerate(("test", "hand")):
        seed = 10_000 * (run.seed + 1) + 5_000 + k
        drawn = judged(w, model, w.sets[set_], draws, seed, length=run.length)
        greedy = judged(w, model, w.sets[set_], 1, seed, 0.0, run.length)
        found["sampled"][set_], found["greedy"][set_] = golds(drawn), golds(greedy)
        found["kindly"][set_] = kindly(drawn)
        found["words"][set_] = [mean([len(t.split()) for t in row["replies"]]) for row in drawn]
        found["cut"][set_] = shape(drawn)["cut"]
        if run.scorer is not None and draws > 1:
            told = rewards.accuracy(w, run.scorer, drawn)
            own[set_] = told | {"right": mean(told["right"])}
    found["replies"] = texts(run, drawn)
    return {"end": found} | ({"accuracy_on_own": own} if own else {})


def kindly(rows: list[dict]) -> list[float]:
    """Each ticket's gold, a cut reply read without its torn sentence where that is better."""
    found = []
    for row in rows:
        found.append(mean([without_the_torn_end(text, row) for text in row["replies"]]))
    return found


def texts(run: Run, rows: list[dict]) -> list[dict]:
    """The first replies to the tickets with the lowest ids, to be read."""
    found = []
    for row in sorted(rows, key=lambda row: row["id"])[:SHOWN]:
        one = {"id": row["id"], "reply": row["replies"][0], "gold": row["golds"][0]}
        one["cut"] = row["cut"][0]
        if run.scorer is not None:
            text = run.world.text(row, one["reply"])
            one["score"] = mean(rewards.scores(run.world, run.scorer, [text]))
        found.append(one)
    return found


def on_validation(run: Run, model) -> dict:
    """Of a search: gold of two sampled replies to each validation ticket."""
    model.eval()
    w = run.world
    drawn = judged(w, model, w.sets["validation"], SEARCH_DRAWS, 9, length=run.length)
    return {"validation": mean(golds(drawn))}


def of_reward_model(run: Run, model) -> dict:
    """Accuracy on pairs of the SFT model's replies: in a search on validation, else on both."""
    if run.phase == "search":
        told = rewards.accuracy(run.world, model, rewards.held_out(run.world, "validation"))
        return {"validation": mean(told["right"])}
    told = {}
    for set_ in ("test", "hand"):
        told[set_] = rewards.accuracy(run.world, model, rewards.held_out(run.world, set_))
    return {"accuracy": told}


def recorded(
    arm: str,
    rate: float | None,
    beta: float | None,
    seed: int,
    phase: str,
    reward_rate: float | None = None,
    size: Size = FULL,
) -> list[dict]:
    """The record of a run. reward_rate: of the reward model, as its search found it."""
    began = cpu_clock()
    name = {"arm": arm, "rate": rate, "beta": beta, "seed": seed, "phase": phase}
    if arm in STARTS:
        found = of_start(STARTS[arm], size)
    else:
        found = trained(ARMS[arm], rate, beta, seed, phase, reward_rate, size)
    record = name | found | {"cpu_seconds": round(cpu_clock() - began, 1)}
    return [record | stamp("float32", QUESTIONS, CHOSEN)]


def trained(arm: Arm, rate, beta, seed, phase, reward_rate, size: Size) -> dict:
    """What a run of an arm gave and took."""
    run = Run(arm, rate, beta, seed, phase, size)
    run.reward_rate = reward_rate
    model = methods.METHODS[arm.method](run)
    seconds = run.clock.stop()
    found = {"model": arm.model, "reward": arm.reward, "labels": run.labels}
    found |= {"seconds": round(seconds, 1), "paid": run.parts, "checkpoints": run.checkpoints}
    if arm.method == "reward model":
        return found | of_reward_model(run, model)
    if arm.reward == "longer":
        found |= of_reward_model(run, run.scorer)
    return found | (on_validation(run, model) if phase == "search" else at_the_end(run, model))


def of_start(model: str, size: Size) -> dict:
    """The SFT model: its replies at temperature 1, at COLD, greedy, and the best of six by gold."""
    w = world(model, size)
    draws = START_DRAWS if model == "micro" else 1
    names = ("sampled", "greedy", "kindly", "words", "cold", "best_of_6")
    found: dict[str, dict] = {name: {} for name in names}
    for k, set_ in enumerate(("test", "hand")):
        drawn = judged(w, w.start, w.sets[set_], draws, 90 + k)
        found["sampled"][set_], found["kindly"][set_] = golds(drawn), kindly(drawn)
        found["words"][set_] = [mean([len(t.split()) for t in row["replies"]]) for row in drawn]
        found["greedy"][set_] = golds(judged(w, w.start, w.sets[set_], 1, 90 + k, 0.0))
        if model == "micro":
            found["cold"][set_] = golds(judged(w, w.start, w.sets[set_], 4, 90 + k, COLD))
            found["best_of_6"][set_] = best_of(drawn, 6)
    return {"model": model, "end": found}


def best_of(rows: list[dict], n: int) -> list[float]:
    """Of each ticket the mean gold of the best of n, over its replies cut into groups of n."""
    found = []
    for row in rows:
        firsts = range(0, len(row["golds"]) - n + 1, n)
        found.append(mean([max(row["golds"][first : first + n]) for first in firsts]))
    return found


# --- Which runs -----------------------------------------------------------------------------------


def tried(arm: str, records: list[dict]) -> dict[tuple, float]:
    """{(rate, beta): gold on validation} of an arm's search so far; of a reward model accuracy."""
    mine = [r for r in records if (r["arm"], r["phase"]) == (arm, "search")]
    return {(r["rate"], r["beta"]): r["validation"] for r in mine}


def settings(told: Arm, scores: dict[tuple, float]) -> list[tuple]:
    """The (rate, beta) that an arm's search tries, as far as `scores` lets say.

    Its rates with its first beta, one rate beyond the best where that is an edge, and its other
    betas with the best rate.
    """
    first = told.betas[0]
    found = [(rate, first) for rate in told.rates]
    if not set(found) <= scores.keys():
        return found
    best, _ = max(found, key=scores.get)
    at = LADDER.index(best)
    if best in (told.rates[0], told.rates[-1]) and told.model == "micro":
        found.append((LADDER[at - 1 if best == told.rates[0] else at + 1], first))
    if not set(found) <= scores.keys():
        return found
    best, _ = max(found, key=scores.get)
    return found + [(best, beta) for beta in told.betas[1:]]


def chosen(arm: str, records: list[dict]) -> tuple | None:
    """An arm's (rate, beta): given, or with the most gold on validation; None: not searched yet."""
    told = ARMS[arm]
    if not told.is_searched:
        return told.rates[0], told.betas[0]
    scores = tried(arm, records)
    wanted = settings(told, scores)
    return max(wanted, key=scores.get) if set(wanted) <= scores.keys() else None


def job(arm: str, setting: tuple, seed: int, phase: str, reward_rate: float | None = None) -> Job:
    """A run. reward_rate is told to the arms that learn from a reward model."""
    rate, beta = setting
    name = {"arm": arm, "rate": rate, "beta": beta, "seed": seed, "phase": phase}
    return Job((name,), (arm, rate, beta, seed, phase, reward_rate))


def jobs(records: list[dict]) -> list[Job]:
    """Every run, as far as the search has come: the reward model's, and then all other arms'."""
    found = [job(arm, (None, None), NO_SEED, "final") for arm in STARTS]
    of_rewards = chosen("reward model", records)
    reward_rate = of_rewards[0] if of_rewards else None
    for arm, told in ARMS.items():
        learns = told.reward in rewards.PAIRS and told.method != "reward model"
        if learns and reward_rate is None:
            continue
        mine = reward_rate if learns else None
        if told.is_searched:
            wanted = settings(told, tried(arm, records))
            found += [job(arm, one, SEARCH_SEED, "search", mine) for one in wanted]
        if best := chosen(arm, records):
            found += [job(arm, best, seed, "final", mine) for seed in told.seeds]
    return found


def dry(folder: Path, arms: list[str]) -> None:
    """A tiny run of each of these arms' paths into FOLDER/records.jsonl; prints its CPU seconds."""
    for arm in arms or (*STARTS, *ARMS):
        told = ARMS.get(arm)
        setting = (told.rates[0], told.betas[0]) if told else (None, None)
        for phase in ("search", "final") if told and told.is_searched else ("final",):
            (record,) = recorded(arm, *setting, 0, phase, 1e-4, TINY)
            append(folder / "records.jsonl", record)
            print(f"{record['cpu_seconds']:7.1f} s  {phase:7} {arm}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dry"]:
        dry(Path(sys.argv[2]), sys.argv[3:])
    else:
        work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])
