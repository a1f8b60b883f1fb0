"""LoRA against QLoRA on *ask*, six seeds: what does a base in four bits cost, in quality and time?

    python experiments/qlora_ask/run.py          every run that records.jsonl lacks, on one thread
    python experiments/qlora_ask/run.py --plan   what is missing, seed by seed

It can be stopped and goes on (experiments/runs.py says how). experiments/qlora asks what each way
of merging leaves, after another recipe (450 rows), with three seeds and one held-out set; its
records stand as they are, and these are in a folder of their own.

| arm | base | seeds | CPU hours, search among them |
|---|---|---|---|
| LoRA | SmolLM2-135M-Instruct in fp32 | 6 | 1.0 to 1.1 |
| QLoRA | its 210 linear layers in NF4, double quantization, products in fp32 | 6 | 1.05 to 1.15 |
| untrained, untrained in NF4 | both bases without an adapter: the loss alone | none | 0.05 |
| the clock, in each seed's run | both in turns, five steps each | 6 | 0.15 |

The CPU hours, 2.3 to 2.5 in all, are an estimate from a dry run on one thread of an AMD EPYC that
had other work: a step takes 1.3 to 1.5 s (LoRA) and 1.3 to 1.6 s (QLoRA), an answer 0.31 s, the
loss of a question 0.21 s. A search of four rates is the higher figure.

Equal tools: both arms run TRL's and PEFT's own code, QLoRA on bitsandbytes' 4-bit layers. Neither
has `speed_up`, which refuses a 4-bit base. Rows, order, steps, batch and warm-up are those of the
arm 300 x 1 of experiments/ask_rows: 150 steps of 2 rows, linear decay, fp32 (bf16=False); rank 16,
alpha 32, all linear layers. The adapters are fp32 and begin with the same numbers in both arms of
a seed. TRL makes them bf16 on a 4-bit base, so both are rounded to bf16 once, before the first
step, and stay fp32 from then on, as in recipes/qlora_8b.py.

On a CPU with native bf16 bitsandbytes repacks a 4-bit layer for good when it is first used in eval
mode, and rounds its scales. So the layers are told not to (`support_avx512bf16_for_cpu`), and the
answers come from the dequantized base with the adapter on it: its loss and gradients are those of
the 4-bit layers (tests/parity/test_quant.py).

Learning rates: each arm tries the same three with seed 11, and a fourth beyond the best one where
that is the lowest or the highest. The most right answers on the first 100 rows of
data/ask/validation.jsonl win; of equals the lower loss on these rows.

Fixed before the first run:

- Six seeds, 0 to 5, paired by seed and by question, on data/ask/test.jsonl (300 questions) and
  data/ask/hand_test.jsonl (132).
- QLoRA is behind, or ahead, if the crossed 95 % interval of the difference in the share right
  excludes zero on both sets; on one of them, the sentence names it.
- The two are equivalent if that interval lies within 0.03 of zero on both sets. It is the same
  95 % interval, so each of the two one-sided tests has a level of 2.5 %. Usual is the 90 % interval
  (5 % each); one interval for both questions keeps the verdicts from contradicting each other, and
  it is the one that experiments/lab.py binds sentences to.
- Power, simulated for 300 and 132 questions and six seeds with the spread between questions of
  experiments/qlora (three seeds). If the true difference is 0, equivalence is found with a chance
  of less than 1 %, at 90 % too and even if seeds did not differ at all: 132 questions and six seeds
  are too few for a margin of 0.03. A true loss of 0.10 is found with a chance of 48 % if the
  differences of seeds have a standard deviation of 0.08, as they had there, and of 94 % at 0.03.
  So the likely verdict on the score is "undecided", and the report must say so.
- The loss of the right answers stands beside it. It has the same rule for behind and ahead, and no
  margin, since nobody knows how many nats a point of the score is worth.
- Seconds: CPU seconds of an optimizer step on one thread, both arms in turns in one process (five
  steps of one, five of the other, changing which begins), on the same batches. They speak for this
  CPU and for fp32; on a GPU the cost is another one.
- Nobody looks before the last seed: neither a report nor a sentence is written until then.

A record: arm, rate, seed, phase ("search" or "final"), steps, `trained` weights, `train_loss` (mean
of the last ten steps, in nats a token), `right` (one 0 or 1 a question of each set, greedy
answers), `loss` (of each question's right answer: mean over its tokens, in nats), `step_seconds`
(of the clock, a value a step), and of the search `validation`, the share right, and
`validation_loss`.
"""

import sys
import tempfile
from pathlib import Path

from experiments import sft
from experiments.ask_rows.run import (
    QUESTIONS,
    SEARCH_SEED,
    SEARCHED,
    drawn,
    on_test,
    on_validation,
    rates,
    tried,
)
from experiments.lora_ask.run import losses_on_test
from experiments.runs import Job, cpu_clock, flags, stamp, work

FILE = Path(__file__).with_name("records.jsonl")
ARMS = {"LoRA": False, "QLoRA": True}  # whether the base is in four bits
UNTRAINED = {"untrained": False, "untrained in NF4": True}
FIRST_RATES = (1e-3, 2e-3, 5e-3)
SEEDS, NO_SEED = (0, 1, 2, 3, 4, 5), -1
ROWS = 300
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ROUNDS, STEPS = 5, 5  # of the clock; the first round warms up and isn't kept
CHOSEN = {
    "rate": f"the best of three or four on the first {SEARCHED} rows of data/ask/validation.jsonl, "
    f"seed {SEARCH_SEED}, for each arm",
    "all else": "given in run.py",
}


# --- The two bases --------------------------------------------------------------------------------


def base(four_bits: bool) -> tuple:
    """(model, tokenizer): SmolLM2 in fp32, or its linear layers in NF4 with double quantization."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from ftlab import model_path

    folder = model_path("smollm2")
    how = {"dtype": torch.float32}
    if four_bits:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # no repacking in eval mode
    return model, AutoTokenizer.from_pretrained(folder)


def answering(four_bits: bool, adapter: Path | None):
    """The base of an arm, spelled out in fp32, with an adapter from a folder or without one."""
    from peft import PeftModel

    model, _ = base(four_bits)
    if four_bits:
        model = model.dequantize()
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


# --- A run ----------------------------------------------------------------------------------------


def trainer_of(four_bits: bool, rows: list[dict], rate: float, seed: int, **settings):
    """TRL's trainer of an arm, without `speed_up`; settings go to SFTConfig."""
    model, tokenizer = base(four_bits)
    trainer = sft.trainer_of(model, tokenizer, rows, rate=rate, seed=seed, lora=LORA, **settings)
    same_start(trainer.model)
    return trainer


def same_start(model) -> None:
    """Rounds the adapter to bf16 and keeps it in fp32, whatever TRL has made of it."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16().float()


def train(four_bits: bool, rate: float, seed: int, folder: Path) -> dict:
    """What the training of an arm took; the adapter goes into the folder."""
    trainer = trainer_of(four_bits, drawn(seed, ROWS), rate, seed)
    spent = sft.trained(trainer)
    trainer.model.save_pretrained(folder)
    return spent


def measured(arm: str, rate: float, seed: int, phase: str) -> dict:
    """A run of an arm and what it scores, with its CPU seconds."""
    began = cpu_clock()
    with tempfile.TemporaryDirectory() as folder:
        spent = train(ARMS[arm], rate, seed, Path(folder))
        model = answering(ARMS[arm], Path(folder))
    _, tokenizer = base(False)
    if phase == "search":
        found = on_validation(model, tokenizer)
    else:
        found = on_test(model, tokenizer) | losses_on_test(model, tokenizer)
    record = {"arm": arm, "rate": rate, "seed": seed, "phase": phase, **spent, **found}
    return record | {"cpu_seconds": round(cpu_clock() - began, 1)}


# --- The clock ------------------------------------------------------------------------------------


def step_seconds(best: dict[str, float], seed: int) -> dict[str, list[float]]:
    """{arm: CPU seconds of each optimizer step}, both arms in turns on the same batches.

    A round is STEPS steps of each arm; which arm begins changes from round to round.
    """
    rows, trainers, clocks = drawn(seed, ROWS), {}, {}
    for arm, rate in best.items():
        trainers[arm] = trainer_of(ARMS[arm], rows, rate, seed, max_steps=STEPS)
        clocks[arm] = sft.step_clock()
        trainers[arm].add_callback(clocks[arm])
    for number in range(ROUNDS):
        for arm in list(trainers)[:: -1 if number % 2 else 1]:
            trainers[arm].train()
    return {arm: clock.seconds[STEPS:] for arm, clock in clocks.items()}


# --- Which runs -----------------------------------------------------------------------------------


def recorded(phase: str, best: dict[str, float], seed: int) -> list[dict]:
    """The records of a run: of the search one arm's, of a seed both arms', or both bases'."""
    import torch

    torch.set_num_threads(1)
    if phase == "untrained":
        records = [untrained(arm) for arm in UNTRAINED]
    else:
        records = [measured(arm, rate, seed, phase) for arm, rate in best.items()]
    if phase == "final":
        began = cpu_clock()
        seconds = step_seconds(best, seed)
        each = (cpu_clock() - began) / len(best)
        for record in records:
            record["step_seconds"] = seconds[record["arm"]]
            record["cpu_seconds"] = round(record["cpu_seconds"] + each, 1)
    return [record | stamp("float32", QUESTIONS, CHOSEN) for record in records]


def untrained(arm: str) -> dict:
    """The loss of the right answers before any training."""
    began = cpu_clock()
    found = losses_on_test(answering(UNTRAINED[arm], None), base(False)[1])
    record = {"arm": arm, "seed": NO_SEED, "phase": "final", **found}
    return record | {"cpu_seconds": round(cpu_clock() - began, 1)}


def jobs(records: list[dict]) -> list[Job]:
    """Every run, as far as the search has come; both arms of a seed are one run."""
    found, best = [], {}
    for arm in ARMS:
        scores = tried(arm, records)
        wanted = rates(FIRST_RATES, scores)
        for rate in wanted:
            name = {"arm": arm, "rate": rate, "seed": SEARCH_SEED, "phase": "search"}
            found.append(Job((name,), ("search", {arm: rate}, SEARCH_SEED)))
        if set(wanted) <= scores.keys():
            best[arm] = max(scores, key=scores.get)
    names = tuple({"arm": arm, "seed": NO_SEED, "phase": "final"} for arm in UNTRAINED)
    found.append(Job(names, ("untrained", {}, NO_SEED)))
    if best.keys() == ARMS.keys():
        found += [both(best, seed) for seed in SEEDS]
    return found


def both(best: dict[str, float], seed: int) -> Job:
    """The run of a seed: both arms at their rates, and the clock."""
    names = []
    for arm, rate in best.items():
        names.append({"arm": arm, "rate": rate, "seed": seed, "phase": "final"})
    return Job(tuple(names), ("final", best, seed))


if __name__ == "__main__":
    work(FILE, jobs, recorded, **flags(sys.argv[1:])[1])
