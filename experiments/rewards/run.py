"""What RL on a check, rejection sampling and larger teachers gain in equal CPU seconds, and what
each of them forgets; and on a task of a few steps, whether thinking out loud and RL on it help.

    python experiments/rewards/run.py                 every run that records.jsonl lacks
    python experiments/rewards/run.py --plan          what is missing, seed by seed
    python experiments/rewards/run.py try FOLDER      each arm once, small, into FOLDER

It can be stopped and goes on (experiments/runs.py says how). One thread, fp32.
experiments/verifiable asks the first question from a start that had learned wrong queries, with
four seeds, and with `speed_up` in all arms but one; its records stand as they are.

**On `ask`** (arms.py, models.py). The start is `micro`, 3.5M weights, after SFT of all of them on
the clean half of the log (3,750 gold queries) mixed with 1,250 exercises that it could do before,
so that there is something to forget. It has seen them twice, or three times if after two passes
fewer than 0.3 of its sampled answers to the validation questions are right. (Three clean passes
left GRPO a gain of 0.03 and 0.06 in a hundred steps, one run of experiments/verifiable, which is
little to find an equal gain in; after one pass 0.09 are right, too few for a check to pay.) Prompts
are the other half of the training questions.

| arm | learns from | seeds | CPU hours: search, seeds |
|---|---|---|---|
| grpo | the check: 1 if a query returns the right rows on ten tables, else 0 | 6 | 0.19, 0.44 |
| rejection | the start's own answers that pass the check, 4 tries a prompt | 6 | 0.19, 0.44 |
| more sft | the gold queries of the prompts | 6 | 0.19, 0.44 |
| distill | reverse KL to the larger teacher on its own answers (on policy) | 6 | 0.19, 0.44 |
| sft larger | the same teacher's greedy answers (off policy), unchecked | 6 | 0.19, 0.44 |
| sft 135M | 1,200 greedy answers of the 135M (off policy), unchecked | 6 | 0.19, 0.44 |
| start, larger, 135M | made once; the 135M's answers | none | 0.12 to 0.29, 0.25, 0.28 |

**On the ring** (ring.py): ten stops, three to six rides from stop 0.

| arm | learns from | seeds | CPU hours: search, seeds |
|---|---|---|---|
| ring grpo | the answer, right or wrong; begins after 100 traces | 6 | 0.12, 0.21 |
| ring rejection | its own right answers in four rounds; the same start | 6 | 0.12, 0.21 |
| ring traces | 400 questions with a trace and the answer; begins with `micro` | 3 | 0.12, 0.11 |
| ring shuffled traces | the same rows, each with the trace of another question | 3 | 0.12, 0.11 |
| ring answers | the same rows, the answer alone | 3 | 0.12, 0.11 |
| ring start | 100 traces; made once | none | 0.04 |

The CPU hours are 5.8 in all, at most 6.2 if every search tries a fourth rate and the start takes a
third pass: an estimate from a dry run on one thread of an AMD EPYC that had much other work. A
step of GRPO took 3.5 to 4 s there, of distillation 4.9 s, of SFT 0.9 s, a look 9 s, the answers to
both tests 33 s.

Cut to six hours, from the bottom: the 135M as the student (more SFT, rejection sampling, GRPO, one
seed each: an hour and more, by an estimate, for some 20 steps of GRPO), SFT on the ring's hundred
traces again, several starts, TRL's trainer for unlike tokenizers with the 135M as a teacher on
policy, three of six seeds of SFT on the ring, rewards for length and form.

Equal cost, equal tools: every arm on `ask` has SECONDS of one core, its sampling and checking among
them, measuring not; every arm on the ring RING_SECONDS. No arm on `ask` has `speed_up`, which
doesn't know TRL's DistillationTrainer; all draw their answers with ftlab's decoder. On the ring
GRPO and rejection sampling both have `speed_up`; the three arms of SFT, which train all weights,
have none. The training of the teachers is in nobody's seconds, and neither are the 135M's answers:
both are recorded, and "sft 135M" is called what it is, SFT on answers that somebody else has paid
for.

The larger teacher is `micro` with eight layers in place of four, the new ones adding nothing at
first (6.4M weights), after two passes over the gold queries of both halves. So it knows those of
the prompts, as the check does that runs them, and as more SFT does. The 135M is SmolLM2 after 1,500
rows of the clean log: it has seen no gold query that the start hasn't. It shares no vocabulary with
`micro`, so TRL's DistillationTrainer refuses it.

A step: GRPO 8 prompts x 8 answers at temperature 1, beta 0, TRL's defaults else; distillation 64
prompts, an answer each; SFT 16 rows, again and again until the seconds are over. LoRA of rank 16,
alpha 32, all linear layers, AdamW. The rate rises over the first 5 % of the training time and falls
to 0 with it. Rejection sampling and "sft larger" draw for 40 % of the seconds, then train.

Rates: each arm tries three with seed 11, and a fourth beyond the best one where that is the lowest
or the highest; the lowest within 0.02 of the best share right on validation is taken. On `ask`
that is `right` of two answers to each of the 300 questions of data/ask/validation.jsonl, on the
ring the greedy answer to 200 questions of its own.

Fixed before the first run:

- Six seeds, 1 to 6, paired by seed and by question, on data/ask/test.jsonl (300 questions) and
  data/ask/hand_test.jsonl (132). The metrics are pass@1 of eight answers at temperature 1, and the
  greedy answer; pass@8 is reported. An arm is ahead if the crossed 95 % interval of the difference
  excludes zero on both sets; if on one of them, the sentence names it; otherwise it is undecided.
  "No difference" in gains is not claimed, so there is no margin for it.
- Main questions: does each arm gain on the start? GRPO against rejection sampling; rejection
  sampling against distillation; distillation against SFT on the same teacher's answers; more SFT
  against each of these. SFT on the 135M's answers against rejection sampling is reported with the
  seconds that its answers took.
- Forgetting is asked if the start has at least half of the 200 old exercises right. At equal gain:
  the level is what GRPO has on validation at its last look, seed by seed. Of each other arm the
  first look that reaches it counts, and the look just before it, so that nothing is interpolated.
  An arm forgets more than GRPO, or less, if the interval of the difference excludes zero at both
  looks; as much, if it lies within 0.05 of zero at both; otherwise it is undecided. A seed whose
  run never reaches the level is left out, and the sentence says how many did. Beside it: the KL to
  the start at these looks, nats an answer, and the old exercises at the end.
- The larger teacher teaches if it is ahead of the start on both sets, in greedy answers; otherwise
  "distill" and "sft larger" say nothing about larger teachers, and the report says so.
- The ring: traces help if "ring traces" is ahead of "ring answers", and it is what they say that
  helps if it is ahead of "ring shuffled traces" too, on the set of three to six rides. Longer ones
  are reported and decide nothing of this. Three seeds, and called so. GRPO against rejection
  sampling by the same rule, six seeds.
- The ring's seconds, its rows and the start's hundred traces are a pilot's, with other questions.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: task, arm, rate, seed, phase ("models", "search" or "final"), `began_with` (a digest of
the weights: all arms of a task have the same), `checkpoints` (step, cpu_seconds, and on `ask`
`right` on validation, `kl`, `old`: one 0 or 1 an exercise), `logs` of every fifth step
(`completions/clipped_ratio` among them), `rows`, `asked`, `train_cpu_seconds`; of the search
`validation`; of a final run on `ask`, for test and hand, `hits` (of 8 answers), `greedy` and 20
greedy answers as text; on the ring, for ring and longer, `right`, `trace` (every step right),
characters, 12 answers as text, and `follows` (1 if the answer follows a stop that was changed in a
right trace). Models: `made_cpu_seconds`, and the same scores.
"""

import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.alignment.run import SEARCH_SEED
from experiments.rewards import arms, models, ring
from experiments.runs import Job, append, cpu_clock, flags, show, stamp, work
from ftlab.paths import DATA

FILE = Path(__file__).with_name("records.jsonl")
SECONDS, RING_SECONDS = 180, 120
SEEDS, THREE = (1, 2, 3, 4, 5, 6), (1, 2, 3)
SAMPLES = 8  # answers to each question of a held-out set
SLACK = 0.02  # about a standard error of the search; the lower rate is the safer one
QUESTIONS = ["ask/test", "ask/hand_test"]
SHOWN = 20  # greedy answers to each set that a record keeps as text


@dataclass(frozen=True)
class Arm:
    """The CPU seconds of a run, the rates that its search tries first, the seeds after it."""

    method: Callable
    seconds: float = SECONDS
    rates: tuple = (3e-4, 1e-3, 3e-3)
    seeds: tuple = SEEDS

    @property
    def factor(self) -> float:
        """How far beyond the best rate a fourth one lies, where that is the first or the last."""
        return 2.0 if self.rates[1] / self.rates[0] < 2.5 else 10 / 3


OF_ASK = {name: Arm(method) for name, method in arms.METHODS.items()}
OF_RING = {
    "ring grpo": Arm(ring.grpo, RING_SECONDS),
    "ring rejection": Arm(ring.rejection, RING_SECONDS),
    "ring traces": Arm(ring.supervised, RING_SECONDS, (7.5e-4, 1.5e-3, 3e-3), THREE),
    "ring shuffled traces": Arm(ring.supervised, RING_SECONDS, (7.5e-4, 1.5e-3, 3e-3), THREE),
    "ring answers": Arm(ring.supervised, RING_SECONDS, (7.5e-4, 1.5e-3, 3e-3), THREE),
}
ARMS = OF_ASK | OF_RING
MODELS = ("start", "larger", "135M", "ring start")  # made once, before the search
BEGIN = dict.fromkeys(("start", *OF_ASK), "start")  # the kept model that an arm begins with
BEGIN |= dict.fromkeys(("ring start", "ring grpo", "ring rejection"), "ring-start")


# --- What is measured of a model ------------------------------------------------------------------


def on_test(model) -> dict:
    """Both held-out sets: right ones of SAMPLES answers, and whether the greedy answer is right."""
    model.eval()
    world, found = models.world(), {}
    for set_, file in (("test", "test"), ("hand", "hand_test")):
        rows = models.asked(file)
        drawn = world.drawn(model, rows, SAMPLES, seed=8)
        greedy = world.drawn(model, rows, 1, seed=8, temperature=0.0)
        hits = [sum(models.right(text, row["gold"]) for text in row["texts"]) for row in drawn]
        said = [row["texts"][0] for row in greedy]
        verdicts = [models.right(text, row["gold"]) for text, row in zip(said, rows, strict=True)]
        found[set_] = {"hits": hits, "greedy": verdicts}
        shown = zip(rows[:SHOWN], said[:SHOWN], strict=True)
        found[set_]["texts"] = [[row["prompt"][-1]["content"], text] for row, text in shown]
    return found


def on_ring(model) -> dict:
    """The two held-out sets of the ring, and whether answers follow a changed trace."""
    model.eval()
    sets = ring.held_out()
    found = {set_: ring.measured(model, sets[set_]) for set_ in ("ring", "longer")}
    return found | {"follows": ring.follows(model, sets["ring"])}


# --- A run ----------------------------------------------------------------------------------------


def trained(arm: str, rate: float, seed: int, phase: str, seconds: float) -> dict:
    """What a run of an arm leaves: of the search one look at validation, else all there is."""
    told, is_ring = ARMS[arm], arm in OF_RING
    if is_ring:
        run = ring.RingRun(arm, rate, seed, seconds)
    else:
        looks = arms.LOOKS if phase == "final" else (1.0,)
        run = arms.Run(arm, rate, seed, seconds, looks)
    model = told.method(run)
    found = {"checkpoints": run.checkpoints, "logs": run.logs}
    found |= {"train_cpu_seconds": run.checkpoints[-1]["cpu_seconds"], **run.about}
    if phase == "final":
        return found | (on_ring(model) if is_ring else on_test(model))
    if is_ring:
        right = ring.measured(model.eval(), ring.held_out()["validation"])["right"]
        return found | {"validation": statistics.mean(right)}
    return found | {"validation": run.checkpoints[-1]["right"]}


def made(name: str) -> dict:
    """What a model that is made once took, and what it answers."""
    if name == "135M":
        return of_135m()
    if name == "ring start":
        folder, seconds = ring.start_folder()
        return {"made_cpu_seconds": seconds} | on_ring(models.loaded(folder))
    folder, seconds = models.start_folder() if name == "start" else models.larger_folder()
    model = models.loaded(folder).eval()
    run = arms.Run(name, 0.0, 0, 0.0, ())
    run.time.clock.stop()
    run.look(model)
    weights = sum(weight.numel() for weight in model.parameters())
    found = {"made_cpu_seconds": seconds, "weights": weights, "checkpoints": run.checkpoints}
    return found | on_test(model)


def of_135m() -> dict:
    """The 135M's training, its answers to the prompts, and its greedy answers to both sets."""
    from ftlab import answers

    model, tokenizer, seconds = models.teacher_135m()
    given = models.teacher_answers()
    found = {"made_cpu_seconds": seconds, "teacher_right": given["right"]}
    found |= {"teacher_seconds": given["seconds"], "answers": len(given["rows"])}
    for set_, file in (("test", "test"), ("hand", "hand_test")):
        rows = models.asked(file)
        said = answers(model, tokenizer, [row["prompt"] for row in rows], models.LENGTH)
        verdicts = [models.right(text, row["gold"]) for text, row in zip(said, rows, strict=True)]
        found[set_] = {"greedy": verdicts}
    return found


def recorded(
    arm: str, rate: float | None, seed: int, phase: str, seconds: float = 0.0
) -> list[dict]:
    """The record of a run. seconds: of a shorter one, to try the script."""
    import torch

    torch.set_num_threads(1)
    began = cpu_clock()
    record = {"task": task(arm), "arm": arm, "rate": rate, "seed": seed, "phase": phase}
    if arm in MODELS:
        record |= made(arm)
    else:
        record |= trained(arm, rate, seed, phase, seconds or ARMS[arm].seconds)
    if arm in BEGIN:
        record["began_with"] = models.digest(BEGIN[arm])
    record["cpu_seconds"] = round(cpu_clock() - began, 1)
    return [record | stamp("float32", QUESTIONS, chosen(arm))]


def chosen(arm: str) -> dict:
    """How the settings of an arm were chosen, for its records."""
    if arm in MODELS:
        return {"all": "given in models.py and ring.py"}
    where = "200 questions of the ring" if arm in OF_RING else "data/ask/validation.jsonl"
    rate = f"the lowest within {SLACK} of the best on {where}, seed {SEARCH_SEED}"
    return {"rate": rate, "steps": f"those of {ARMS[arm].seconds} CPU seconds", "else": "run.py"}


# --- Which runs -----------------------------------------------------------------------------------


def tried(arm: str, records: list[dict]) -> dict[float, float]:
    """{rate: share right on validation} of an arm's search so far."""
    found = {}
    for record in records:
        if (record["arm"], record["phase"]) == (arm, "search"):
            found[record["rate"]] = record["validation"]
    return found


def best(scores: dict[float, float]) -> float:
    """The lowest rate that ends within SLACK of the highest share right."""
    highest = max(scores.values())
    return min(rate for rate, share in scores.items() if share >= highest - SLACK)


def rates(arm: str, scores: dict[float, float]) -> list[float]:
    """What a search tries: three rates, then one beyond the best where that is an edge."""
    first, factor = ARMS[arm].rates, ARMS[arm].factor
    if not set(first) <= scores.keys():
        return list(first)
    found = best({rate: scores[rate] for rate in first})
    if found == first[0]:
        return [*first, float(f"{found / factor:.1g}")]
    if found == first[-1]:
        return [*first, float(f"{found * factor:.1g}")]
    return list(first)


def task(arm: str) -> str:
    """Arms of one task are compared; what is left of a seed on another machine is run again."""
    return "ring" if arm.startswith("ring ") else "ask"


def job(arm: str, rate: float | None, seed: int, phase: str) -> Job:
    name = {"task": task(arm), "arm": arm, "rate": rate, "seed": seed, "phase": phase}
    return Job((name,), (arm, rate, seed, phase))


def jobs(records: list[dict]) -> list[Job]:
    """Every run, as far as the search has come: models first, then the search, then the seeds."""
    found = [job(name, None, 0, "models") for name in MODELS]
    for arm in ARMS:
        found += jobs_of(arm, tried(arm, records))
    return found


def jobs_of(arm: str, scores: dict[float, float]) -> list[Job]:
    """The search of an arm, and its seeds once that is over."""
    wanted = rates(arm, scores)
    found = [job(arm, rate, SEARCH_SEED, "search") for rate in wanted]
    if set(wanted) <= scores.keys():
        found += [job(arm, best(scores), seed, "final") for seed in ARMS[arm].seeds]
    return found


# --- To try the script ----------------------------------------------------------------------------


def attempt(folder: Path, names: list[str], seconds: float = 6.0) -> None:
    """Runs arms once, small, into a folder of its own: models, then a final run of each arm.

    names: the arms; all of them if there is none. data/ask_start stands in for the start, since
    rejection sampling needs a model that has some answers right.
    """
    vars(models.SIZE).update(folder=folder, questions=8, old_each=1, passes=(0.01,))
    vars(models.SIZE).update(larger_passes=0.01, teacher_rows=8, taught=8, ring=8)
    vars(models.SIZE).update(ring_start_seconds=30.0)
    if not (folder / "start").is_dir():
        shutil.copytree(DATA / "ask_start", folder / "start")
        models.write(folder / "start.json", {"seconds": 0.0})
    for arm in names or [*MODELS, *ARMS]:
        if arm in MODELS:
            [record] = recorded(arm, None, 0, "models")
        else:
            [record] = recorded(arm, ARMS[arm].rates[1], 1, "final", seconds)
        append(folder / "records.jsonl", record)
        show(record)


if __name__ == "__main__":
    words, asked = flags(sys.argv[1:])
    if words[:1] == ["try"]:
        attempt(Path(words[1]), words[2:])
    else:
        work(FILE, jobs, recorded, within=("seed", "task"), **asked)
