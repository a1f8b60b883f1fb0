"""How often does recipes/gate.py let a candidate pass that is just as good, worse, or broken in one
kind of question? Real models' answers, resampled.

    python experiments/gate/run.py answers          asks the served adapter; 10 CPU-minutes
    python experiments/gate/run.py                  resamples: what records.jsonl lacks; about 8
    python experiments/gate/run.py before FOLDER    the same with the gate of another recipes folder

Written before the first run. The gate is called as it is: its own check_quality, check_kinds,
check_latency and check_smoke on every resample, and its main() through files as evaluate.py writes
them on the first resamples of every arm, where both have to say the same.

Whose answers (production and candidate are two of one row; seeds in any order):

| models | what they are | right of test, hand | where |
|---|---|---|---|
| 135M | six seeds of LoRA on 300 rows of `ask`, seen once | 0.43, 0.42 | experiments/ask_rows |
| 3.5M | six seeds of a small model on 600 rows, three passes | 0.66, 0.53 | experiments/poison |
| shipped | data/ask_adapter, served by llama.cpp in F16 and in Q4_0 | asked here | answers/ |

A resample draws questions with replacement within each kind, so that each kind keeps its share, and
two different models of one row of the table. As many questions as the test has (300, hand 132), or
as many as the gate asks for: the median of the numbers that it prints, over the resamples of
`equal` at the test's own size, for a margin of 0.03 and for one of 0.05. 2,000 resamples each, all
with the margins 0.03 and 0.05, on both sets. The candidates:

| candidate | how it is made |
|---|---|
| equal | a coin a question says which of the two is the candidate: expected difference 0 |
| another seed | the two as they are, in either order: the same method, trained again |
| 1 worse | equal; then right answers become wrong by chance: 1 point in expectation |
| 5 worse | the same with 5 points |
| kind broken | equal; then all of the candidate's answers to one kind are wrong; the kind is drawn |
| 48 kinds (`before`: 12, 24) | equal, dealt out at random to so many kinds of one size |
| announced | no candidate: the chance that the gate prints for one that is just as good |

So `equal` disagrees with production as often as two real models do. In `another seed` of shipped,
production is F16 and the candidate Q4_0. Every `equal` candidate that fails is a false alarm; every
other one that passes is a miss, but for `1 worse`, which both margins mean to accept if it is shown
to be no worse than that.

Latency and the smoke set are the served adapter's, in every row of the table. It is asked twice in
F16, one question at a time, and for `latency` a coin decides at each question which pass is whose:
two models that are equally fast. The smoke set (smoke.jsonl, eight rows) isn't resampled: greedy
answers to the same rows come out the same, so it has one result for each of the two files.

What is held against what: the rate at which `equal` passes `quality` against the chance that the
gate announces, and against 80 % where it was given as many questions as it asks for; the rate for a
candidate that is worse by the whole margin (`5 worse` at 0.05) against 2.5 %; the rate at which
`equal` fails `kinds`, against 5 % (with --few_ok). A rule of the gate that fails one of these is
changed and run again, and the records of the rule before stay: `gate` says which recipes folder was
called.

Added when the first rules' records were there (`before`; their recipes folder is that of commit
a24150e, with intervals.py's exact test counted in one pass): equal candidates failed `latency` too,
so that line is held against 5 % as well. Where two models hardly differ, the gate asked for fewer
questions than any candidate can pass with. `kinds`, `latency` and the number of questions were
changed, and all is run again as `now`. Where the gate asks for as many questions as before, the
resamples are the same.

A record: models, candidate, gate, resamples, `n` {set: {case: questions}}, `passed` {line: {set:
{case: verdicts}}}, `kinds` broken, and of `announced` the chance in percent. A case is `own_3`,
`own_5`, `asked_3` or `asked_5`: the number of questions, and the margin in points. Verdicts are a
bit each, as hexadecimal, in the order of the resamples (measures.py reads them).
"""

import contextlib
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import lab
from experiments.runs import add, cpu_clock, read, stamp

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILE, ANSWERS, SMOKE = HERE / "records.jsonl", HERE / "answers", HERE / "smoke.jsonl"
SETS = {"test": "test", "hand": "hand_test"}


# --- The served adapter's answers -----------------------------------------------------------------


def recipe(name: str, folder: Path = ROOT / "recipes"):
    """A script of recipes/ as a module, with what lies beside it."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == folder:
            del sys.modules[name]  # another folder's scripts import their own
    return module


def gguf_of(kind: str, folder: Path) -> Path:
    """data/ask_adapter, merged, as a GGUF file."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import export, model_path
    from ftlab.paths import DATA

    merged = folder / "merged"
    if not merged.is_dir():
        base = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)
        tuned = PeftModel.from_pretrained(base, DATA / "ask_adapter").merge_and_unload()
        tuned.to(torch.bfloat16).save_pretrained(merged)
        AutoTokenizer.from_pretrained(model_path("smollm2")).save_pretrained(merged)
    return export.to_gguf(merged, folder / f"{kind}.gguf", kind)


def ask_all() -> None:
    """answers/NAME.json: what evaluate.py writes for each file of questions, each model and pass."""
    from ftlab.serve import serve

    evaluate = recipe("evaluate")
    sys.path.insert(0, str(ROOT / "recipes"))  # for --scorer gate:smoke
    with tempfile.TemporaryDirectory() as scratch:
        for kind, passes in (("f16", ("", "-again")), ("q4_0", ("",))):
            wanted = [*itertools.product(SETS, passes), ("smoke", "")]
            files = {pair: ANSWERS / f"{kind}-{''.join(pair)}.json" for pair in wanted}
            left = {pair: file for pair, file in files.items() if not file.is_file()}
            if not left:
                continue
            with serve(gguf_of(kind, Path(scratch)), n_ctx=512, parallel=1) as server:
                for (set_, _), file in left.items():
                    rows = SMOKE if set_ == "smoke" else ROOT / "data/ask" / f"{SETS[set_]}.jsonl"
                    scorer = "gate:smoke" if set_ == "smoke" else "ftlab.tasks.ask:scorer"
                    words = ["--endpoint", server.url, "--model", "model", "--file", str(rows)]
                    words += ["--batch_size", "1", "--max_new_tokens", "96", "--scorer", scorer]
                    evaluate.main([*words, "--out", str(file)])
                    told = json.loads(file.read_text("utf-8"))
                    for key in ("endpoint", "file", "out"):  # of this machine
                        del told["asked"][key]
                    file.write_text(json.dumps(told))


# --- Resamples ------------------------------------------------------------------------------------

RESAMPLES, CHECKED = 2000, 5  # of each, and how many of them go through the gate's files as well
MARGINS = {"3": 0.03, "5": 0.05}
CASES = ("own_3", "own_5", "asked_3", "asked_5")
CANDIDATES = ("equal", "another seed", "1 worse", "5 worse", "kind broken")
MANY = (12, 24, 48)  # kinds
RUNS = {"135M": ("ask_rows", {"arm": "300 x 1"}), "3.5M": ("poison", {"arm": "clean"})}
MODELS = (*RUNS, "shipped")
LINES = ("quality", "kinds", "latency", "all")


@dataclass(frozen=True)
class Pool:
    """What there is to draw from on one held-out set: of n questions, whether each model is right
    (models, n), their kinds (n,), and the seconds of two passes (2, n) and of Q4_0 (n,)."""

    right: np.ndarray
    kinds: np.ndarray
    seconds: np.ndarray
    rounded: np.ndarray


@dataclass(frozen=True)
class Draw:
    """One resample: scores of the candidate and of production, kinds, and the seconds of both."""

    ours: list[float]
    theirs: list[float]
    kinds: list
    seconds: tuple[list[float], list[float]]


def answered(name: str) -> dict:
    return json.loads((ANSWERS / f"{name}.json").read_text("utf-8"))


def rows_of(set_: str) -> list[dict]:
    lines = (ROOT / "data/ask" / f"{SETS[set_]}.jsonl").read_text("utf-8").splitlines()
    return list(map(json.loads, lines))


def pool_of(models: str, set_: str) -> Pool:
    first, again = answered(f"f16-{set_}"), answered(f"f16-{set_}-again")
    rounded = first
    if models in RUNS:
        experiment, where = RUNS[models]
        records = lab.read_records(ROOT / "experiments" / experiment / "records.jsonl")
        records = [r for r in records if lab.matches(r, where | {"phase": "final"})]
        right = [record["right"][set_] for record in records]
    else:
        rounded = answered(f"q4_0-{set_}")
        right = [first["scores"], rounded["scores"]]
    return Pool(
        np.array(right, float),
        np.array([row["kind"] for row in rows_of(set_)]),
        np.array([first["latencies"], again["latencies"]]),
        np.array(rounded["latencies"]),
    )


def within_kinds(kinds: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """n places with replacement, each kind as often as its share says (largest remainders)."""
    names, counts = np.unique(kinds, return_counts=True)
    exact = counts * n / len(kinds)
    wanted = np.floor(exact).astype(int)
    wanted[np.argsort(wanted - exact, kind="stable")[: n - wanted.sum()]] += 1
    places = [random.choice(np.flatnonzero(kinds == name), size) for name, size in zip(names, wanted, strict=True)]
    return random.permutation(np.concatenate(places))


def draw(pool: Pool, candidate: str, n: int, random: np.random.Generator) -> Draw:
    """A resample of n questions; see the table of candidates above."""
    places = within_kinds(pool.kinds, n, random)
    kinds = pool.kinds[places]
    one, two = random.choice(len(pool.right), 2, replace=False)
    coins, passes = random.random((2, n)) < 0.5
    if candidate == "another seed":
        if len(pool.right) == 2:  # shipped: production is F16, the candidate Q4_0
            one, two = 0, 1
        coins[:] = False
    ours = np.where(coins, *pool.right[[one, two]][:, places])
    theirs = np.where(coins, *pool.right[[two, one]][:, places])
    if candidate in ("1 worse", "5 worse"):
        share = pool.right[[one, two]].mean()
        lost = random.random(n) < int(candidate[0]) / 100 / share
        ours = np.where(lost, 0.0, ours)
    if candidate == "kind broken":
        ours = np.where(kinds == random.choice(np.unique(pool.kinds)), 0.0, ours)
    if candidate.endswith(" kinds"):
        kinds = np.arange(n) % int(candidate.split()[0])  # the places are in random order
    seconds = pool.seconds[:, places]
    mine, other = np.where(passes, *seconds), np.where(passes, *seconds[::-1])
    if candidate == "another seed" and len(pool.right) == 2:
        mine, other = pool.rounded[places], seconds[0]
    return Draw(ours.tolist(), theirs.tolist(), kinds.tolist(), (mine.tolist(), other.tolist()))


def verdicts(gate, usual, drawn: Draw, margin: float, smoked: bool, lines: tuple) -> tuple:
    """({line: whether it passes}, what is said of the number of questions). usual: main's options."""
    found, told = {}, None
    given = (drawn.ours, drawn.theirs, None, drawn.kinds, usual.most_lost)
    found["kinds"], _ = gate.check_kinds(*given, *[True] * has_few_ok(gate))
    if lines == LINES:
        found["quality"], _, told = gate.check_quality(drawn.ours, drawn.theirs, None, margin)
        mine, other = ({"latencies": one, "asked": {"batch_size": 1}} for one in drawn.seconds)
        found["latency"], _ = gate.check_latency(mine, other, usual.most_slower)
        found["all"] = all(found.values()) and smoked
    return found, told


FILES = ("production", "candidate", "file", "smoke", "smoke_file")


def words_of(files: dict, margin: float) -> list[str]:
    return [
        *(word for name in FILES for word in (f"--{name}", str(files[name]))),
        *("--margin", str(margin)),
    ]


def has_few_ok(gate) -> bool:
    """The first rules hadn't: they passed kinds that are too small to judge."""
    return "few_ok" in inspect.signature(gate.check_kinds).parameters


def through_files(gate, drawn: Draw, margin: float, smoke: str, folder: Path) -> set[str]:
    """The lines that main() fails, given files as evaluate.py writes them."""
    rows = [{"prompt": f"Question {i}", "completion": "yes", "kind": kind} for i, kind in enumerate(drawn.kinds)]
    files = {name: folder / f"{name}.json" for name in FILES}
    files |= {"smoke": ANSWERS / f"{smoke}-smoke.json", "smoke_file": SMOKE}
    files["file"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = answered(f"{smoke}-smoke")
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    asked = written["asked"] | {"scorer": None}
    sides = {"candidate": (drawn.ours, 0), "production": (drawn.theirs, 1)}
    for name, (scores, side) in sides.items():
        of = {"scores": scores, "latencies": drawn.seconds[side], "asked": asked}
        of |= {"answers": ["yes" if score else "no" for score in scores], "rows": digest}
        files[name].write_text(json.dumps(written | of))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            gate.main(words_of(files, margin) + ["--few_ok"] * has_few_ok(gate))
            code = 0
        except SystemExit as stopped:
            code = stopped.code
    lines = printed.getvalue().splitlines()
    failed = {line.split()[1].rstrip(":") for line in lines if line.startswith("FAIL")}
    if code != bool(failed) or len(lines) != 5:
        raise RuntimeError(f"main() ended with {code} and said {lines}")
    return failed


def asked_for(told: str) -> int:
    return int(told.rpartition("about ")[2])


def power_of(told: str) -> int:
    """The chance in percent that the gate prints for a candidate that is just as good."""
    return int(told.partition("passes ")[2].partition("%")[0])


def generator(*names) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(str(name).encode()) for name in names])


def sizes(gate, pool: Pool, models: str, set_: str, resamples: int) -> dict[str, list[int]]:
    """{case: what the gate asks for at the test's own size}, a number a resample of `equal`."""
    random, found = generator(models, set_, "sizes"), {"asked_3": [], "asked_5": []}
    for _ in range(resamples):
        drawn = draw(pool, "equal", len(pool.kinds), random)
        for case, counts in found.items():
            margin = MARGINS[case[-1]]
            counts.append(asked_for(gate.check_quality(drawn.ours, drawn.theirs, None, margin)[2]))
    return found


def as_hex(bits: list[bool]) -> str:
    return np.packbits(np.array(bits, bool)).tobytes().hex()


def passed(gate, pools: dict, models: str, candidate: str, n: dict, resamples: int) -> tuple:
    """(passed, announced) of one arm: {line: {set: {case: verdicts}}}, {set: {case: percents}}.

    Of an arm that is about kinds alone, that line.
    """
    smoke = "q4_0" if (models, candidate) == ("shipped", "another seed") else "f16"
    smoked = gate.check_smoke(answered(f"{smoke}-smoke"), gate.read_rows(SMOKE))[0]
    lines = ("kinds",) if candidate.endswith("kinds") else LINES
    found = {line: {set_: {} for set_ in SETS} for line in lines}
    announced = {set_: {} for set_ in SETS}
    usual = gate.parsed(words_of(dict.fromkeys(FILES, "-"), 0.5))
    for set_, case in itertools.product(SETS, CASES):
        # one margin or the other, at one size: the same resamples
        random = generator(models, candidate, set_, n[set_][case])
        margin, bits, percents = MARGINS[case[-1]], {line: [] for line in lines}, []
        for number in range(resamples):
            drawn = draw(pools[set_], candidate, n[set_][case], random)
            said, told = verdicts(gate, usual, drawn, margin, smoked, lines)
            if number < CHECKED and lines == LINES:
                same(gate, drawn, margin, smoke, said, smoked)
            if told:
                percents.append(power_of(told))
            for line in lines:
                bits[line].append(said[line])
        for line in lines:
            found[line][set_][case] = as_hex(bits[line])
        announced[set_][case] = bytes(percents).hex()
    return found, announced


def same(gate, drawn: Draw, margin: float, smoke: str, lines: dict, smoked: bool) -> None:
    """Raises RuntimeError unless main() says the same of a resample, through files."""
    with tempfile.TemporaryDirectory() as folder:
        failed = through_files(gate, drawn, margin, smoke, Path(folder))
    wanted = {line for line in ("quality", "kinds", "latency") if not lines[line]}
    wanted |= set() if smoked else {"smoke"}
    if failed != wanted:
        raise RuntimeError(f"main() fails {failed}, its functions {wanted}")


def arms_of(name: str) -> list[str]:
    """The candidates of a gate: of an earlier one those that a change is held against."""
    if name == "now":
        return [*CANDIDATES, f"{max(MANY)} kinds"]
    return ["equal", "kind broken", *(f"{many} kinds" for many in MANY)]


def resample(gate, name: str, models: str, resamples: int, done: list[dict]) -> Iterator[dict]:
    """The records of a row of models that are not there."""
    arms = arms_of(name)
    there = {r["candidate"] for r in done if (r["gate"], r["models"]) == (name, models)}
    arms = [arm for arm in arms if arm not in there]
    if not arms:
        return
    pools = {set_: pool_of(models, set_) for set_ in SETS}
    asked = {set_: sizes(gate, pools[set_], models, set_, resamples) for set_ in SETS}
    n = {
        set_: {
            case: len(pools[set_].kinds) if case[:3] == "own" else int(np.median(asked[set_][case])) for case in CASES
        }
        for set_ in SETS
    }
    for arm in arms:
        began = cpu_clock()
        bits, announced = passed(gate, pools, models, arm, n, resamples)
        record = {"gate": name, "models": models, "candidate": arm, "resamples": resamples}
        record |= {"n": n, "passed": bits}
        if arm == "equal":
            spread = {
                set_: {case: np.percentile(counts, [10, 50, 90]).tolist() for case, counts in asked[set_].items()}
                for set_ in SETS
            }
            record |= {"announced": announced, "asks_for": spread}
        record["cpu_seconds"] = round(cpu_clock() - began, 1)
        yield record | stamp(
            "none: stored verdicts",
            ["ask/test", "ask/hand_test"],
            {"all": "given in run.py"},
            ("numpy",),
        )


def main(words: list[str]) -> None:
    """Words: `answers`; or the gate's name in the records and the recipes folder that it is in."""
    if words == ["answers"]:
        ask_all()
        return
    name, folder = words or ("now", ROOT / "recipes")
    gate = recipe("gate", Path(folder))
    for models in MODELS:
        for record in resample(gate, name, models, RESAMPLES, read(FILE)):
            add(FILE, record)
            print(record["models"], record["candidate"], record["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
