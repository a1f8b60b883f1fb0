"""How often does recipes/gate.py let a candidate pass that is just as good, worse, or broken in one
kind of question? Real models' answers, resampled.

    python experiments/gate/run.py answers    asks the served adapter; about 15 minutes
    python experiments/gate/run.py            resamples; what records.jsonl lacks, about 10 minutes

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
| equal | at each question a coin decides which of the two models is the candidate: they disagree as the two do, and the expected difference is zero |
| another seed | the two as they are, in either order: the same method, trained again (shipped: production is F16, the candidate Q4_0) |
| 1 worse | equal; then right answers of the candidate become wrong by chance, so many that it loses 1 point in expectation |
| 5 worse | the same with 5 points |
| kind broken | equal; then all of the candidate's answers to one kind are wrong; the kind is drawn |
| 12, 24, 48 kinds | equal, the questions dealt out at random to so many kinds of one size |
| announced | no candidate: the chance that the gate prints for one that is just as good |

Every `equal` candidate that fails is a false alarm; every other one that passes is a miss, but for
`1 worse`, which a margin of 0.03 or 0.05 means to accept if it is shown.

Latency and the smoke set are the served adapter's, in every row of the table. It is asked twice in
F16, one question at a time, and for `latency` a coin decides at each question which pass is whose:
two models that are equally fast. The smoke set (smoke.jsonl, eight rows) isn't resampled: greedy
answers to the same rows come out the same, so it has one result for each of the two files.

What is held against what: the rate at which `equal` passes `quality` against the chance that the
gate announces, and against 80 % where it was given as many questions as it asks for; the rate for a
candidate that is worse by the whole margin (`5 worse` at 0.05) against 2.5 %; the rate at which
`equal` fails `kinds`, against 5 %. A rule of the gate that fails one of these is changed and run
again, and the records of the rule before stay: `gate` says which recipes folder was called.

A record: models, candidate, gate, resamples, `n` {set: {case: questions}}, `passed` {line: {set:
{case: verdicts}}}, `kinds` broken, and of `announced` the chance in percent. A case is `own_3`,
`own_5`, `asked_3` or `asked_5`: the number of questions, and the margin in points. Verdicts are a
bit each, as hexadecimal, in the order of the resamples (measures.py reads them).
"""

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
from pathlib import Path

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
            wanted = [(set_, again) for again in passes for set_ in (*SETS, "smoke")]
            files = {pair: ANSWERS / f"{kind}-{pair[0]}{pair[1]}.json" for pair in wanted}
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


if __name__ == "__main__":
    if sys.argv[1:] == ["answers"]:
        ask_all()
