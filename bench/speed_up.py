"""What `speed_up(trainer)` saves: a LoRA step of SmolLM2 by TRL's SFTTrainer or DPOTrainer, with and without it.

    python bench/speed_up.py           forty minutes; twenty where the CPU has no bf16
    python bench/speed_up.py --old     a quarter of an hour: TRL, speed_up and f21bf8c alone, put beside the rest
    python bench/speed_up.py --tiny    two minutes: the model micro, few steps; prints, and leaves no record

In turns, each in a process of its own (`speed_up` tells malloc to keep freed memory, which would help the others), on
the same batches: rows of data/ask, 4 a step, or pairs of data/replies, 4 a step; LoRA r = 16 on all linear layers,
AdamW, two threads.

    defaults          gradient_checkpointing=True, as in TRL's configs
    no checkpointing  gradient_checkpointing=False
    speed_up          gradient_checkpointing=False, then speed_up(trainer)
    f21bf8c           the same with the speed_up of that commit, which checked less (its ftlab/cpu.py, from git; where
                      there is no such commit, as in a copy without history, it is left out)

And for SFT alone, what else there is on a CPU:

    torch.compile     TRL with torch_compile=True, without checkpointing; needs a C++ compiler
    plain             a loop over TRL's batches: the model's own loss, autocast, AdamW
    plain, tuned      the same with eager attention, and the head only where a token counts

Unsloth's CPU backend stands beside them in experiments/engines/run.py. Liger's kernels are Triton's, for GPUs alone.

Where the CPU multiplies bf16 all is measured twice, with bf16=True, as the configs say, and with False; elsewhere with
False alone: bf16 is emulated there, and takes many times as long (emulated_bf16_step_seconds: one SFT step of TRL
without checkpointing; null where the CPU has bf16).

seconds: from the end of a step to the end of the next one, batching included. The first round, in which torch.compile
and oneDNN compile and speed_up computes its first batch twice, and the first step of each turn are not counted.
clock: by the clock; cpu: of the process, all threads, which a busy machine changes less. ratio: over steps, another
trainer's seconds over speed_up's on the same rows. loss: of every step, nats a token or a pair, so that a reader sees
that all of them do the same work.

first_batch: how far the gradients of one batch are from TRL's, by parameter: ||ours - TRL's|| / ||TRL's||, lora_B
drawn, in fp32 and in bf16. rounding: the same of TRL's own from TRL's in fp32. In bf16 correct code differs by some
percent. That is rounding; it is reported here and judged nowhere. speed_up compares its first batch in fp32.

floor: the products that no LoRA step can avoid, at the shapes of our packed batches, each measured alone: each frozen
weight forward, and backward to its input (it has no gradient of its own), the thin LoRA products, the head at the
counted positions; after the last layer's attention, the counted positions only. DPO's reference, which TRL computes in
each step, is the forward products once more, without LoRA's. The rest of a step - attention, norms, rotations, SwiGLU,
the optimizer, Python - would take no time at all. share_of_floor: of a round's steps with speed_up, the share that
these products take, measured right after them on the same rows.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path

import harness
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, get_scheduler, set_seed
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ftlab.cpu import product_dtype, speed_up
from ftlab.llama import pack_with_shared_prefix
from ftlab.models import model_path
from ftlab.paths import DATA
from ftlab.tasks import replies

ROUNDS, STEPS, BATCH, THREADS, MOST_SECONDS, RANK = 5, 5, 4, 2, 400, 16
TINY_ROUNDS = 2
OLD = "f21bf8c"  # the last commit before speed_up checked the first batch and watched each step
RATE = {"sft": 2e-3, "dpo": 1e-4}
CONFIGS = {
    "defaults": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "speed_up": {"gradient_checkpointing": False},
    OLD: {"gradient_checkpointing": False},
    "torch.compile": {"gradient_checkpointing": False, "torch_compile": True},
}
LOOPS = {name: {"gradient_checkpointing": False, "loss_type": "nll"} for name in ("plain", "plain, tuned")}


class Clock(TrainerCallback):
    """At the beginning and the end of each step: the clock's seconds and this process's CPU seconds, all threads."""

    def __init__(self) -> None:
        self.begins, self.ends = [], []

    def on_step_begin(self, *arguments, **named) -> None:
        self.begins.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *arguments, **named) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def steps(self) -> list[dict[str, float]]:
        """Of the last turn, without its first step."""
        last = self.ends[-STEPS:]
        return [{"clock": after[0] - before[0], "cpu": after[1] - before[1]} for before, after in pairwise(last)]


def rows(method: str) -> Dataset:
    if method == "sft":
        return load_dataset("json", data_files=str(DATA / "ask" / "train.jsonl"), split="train[:400]")
    lines = (DATA / "replies" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    pairs = [replies.as_pair(json.loads(line)) for line in lines]
    return Dataset.from_list(pairs).select_columns(["prompt", "chosen", "rejected"])


@functools.cache
def old_source() -> str | None:
    """ftlab/cpu.py as it was in the commit OLD; None where git does not have it."""
    command = ["git", "-C", str(DATA.parent), "show", f"{OLD}:ftlab/cpu.py"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def old_speed_up(trainer: SFTTrainer | DPOTrainer) -> None:
    """speed_up of the commit OLD, its module imported under another name beside ftlab.cpu."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cpu_before.py"
        file.write_text(old_source(), "utf-8")
        spec = importlib.util.spec_from_file_location("cpu_before", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    module.speed_up(trainer)


def trainer_of(method: str, name: str, folder: str, clock: Clock, bf16: bool, tiny: bool) -> SFTTrainer | DPOTrainer:
    trainer_class, config_class = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[method]
    path = model_path("micro" if tiny else "smollm2")
    torch.manual_seed(0)  # lora_A is drawn in the trainer's __init__
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=config_class(
            folder, learning_rate=RATE[method], per_device_train_batch_size=BATCH, max_steps=STEPS, logging_steps=1,
            use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, bf16=bf16,
            **(CONFIGS | LOOPS)[name],
        ),
        train_dataset=rows(method),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        callbacks=[clock],
    )  # fmt: skip
    if name == OLD:
        old_speed_up(trainer)
    return trainer


class Contestant:
    """A trainer that stays in the process of its turns."""

    held = None

    def __init__(self, method: str, name: str, bf16: bool, tiny: bool = False) -> None:
        torch.set_num_threads(THREADS)
        disable_progress_bars()
        logging.disable_progress_bar()
        self.name, self.bf16, self.clock, self.folder = name, bf16, Clock(), tempfile.TemporaryDirectory()
        self.trainer = trainer_of(method, name, self.folder.name, self.clock, bf16, tiny)
        self.quick = speed_up(self.trainer) if name == "speed_up" else None

    def turn(self, i: int) -> dict:
        """Trains STEPS steps on the rows that i decides: their losses and seconds, and after the first turn the floor
        of speed_up's."""
        set_seed(i)  # other rows in each round, the same for all
        if self.name in LOOPS:
            losses = loop(self.trainer, self.clock, tuned=self.name == "plain, tuned")
        else:
            self.trainer.train()
            losses = [record["loss"] for record in self.trainer.state.log_history if "loss" in record]
        if self.quick is not None and not self.quick:
            raise RuntimeError(f"nothing to measure: speed_up left these steps to TRL, {self.quick.reason}")
        result = {"losses": losses, "steps": self.clock.steps()}
        if i and self.name == "speed_up":
            set_seed(i)
            result["floor"] = floor(self.trainer, torch.bfloat16 if self.bf16 else torch.float32)
        return result


def turn(method: str, name: str, bf16: bool, tiny: bool, i: int) -> dict:
    """In the contestant's process."""
    Contestant.held = Contestant.held or Contestant(method, name, bf16, tiny)
    return Contestant.held.turn(i)


def emulated_step() -> dict[str, float]:
    """One SFT step in bf16 where the CPU has none."""
    one = Contestant("sft", "no checkpointing", bf16=True)
    one.trainer.args.max_steps = 1
    one.trainer.train()
    clock, cpu = (end - begin for begin, end in zip(one.clock.begins[0], one.clock.ends[0], strict=True))
    return {"clock": clock, "cpu": cpu}


def loop(trainer: SFTTrainer, clock: Clock, tuned: bool) -> list[float]:
    model, losses = trainer.model.train(), []
    if tuned:
        model.get_base_model().set_attn_implementation("eager")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE["sft"], weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, 0, STEPS)
    for batch in islice(trainer.get_train_dataloader(), STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16):
            loss = counted_loss(model.get_base_model(), batch) if tuned else model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.on_step_end()
    return losses


def counted_loss(model, batch: dict) -> torch.Tensor:
    """The logits of the positions with a label only."""
    labels = batch["labels"][:, 1:]
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
    counted = labels != -100
    return cross_entropy(model.lm_head(hidden[counted]).float(), labels[counted])


def first_batch(method: str, bf16: bool, tiny: bool) -> dict[str, float]:
    """Of one batch, by parameter: ||g - TRL's|| / ||TRL's||, the median and the most, g with speed_up; and the same of
    TRL's gradients from TRL's in fp32, which is what the dtype alone does.
    """
    found = {}
    for name, dtype in (("fp32", False), ("no checkpointing", bf16), ("speed_up", bf16)):
        one = Contestant(method, "no checkpointing" if name == "fp32" else name, dtype, tiny)
        found[name] = gradients_of(one.trainer, dtype)
    off = {f"ours, {k}": v for k, v in apart(found["speed_up"], found["no checkpointing"]).items()}
    rounding = apart(found["no checkpointing"], found["fp32"])
    return {"method": method, "bf16": bf16, **off, **{f"rounding, {k}": v for k, v in rounding.items()}}


def gradients_of(trainer: SFTTrainer | DPOTrainer, bf16: bool) -> dict[str, torch.Tensor]:
    """Of the first batch of the rows, with lora_B drawn: at 0 it hides lora_A."""
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.02)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # as train() has it
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items).backward()
    return {n: w.grad for n, w in trainer.model.named_parameters() if w.grad is not None}


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The median and the most, over parameters, of ||ours - theirs|| / ||theirs||."""
    off = [float((ours[name] - grad).norm() / grad.norm()) for name, grad in theirs.items() if grad.norm() > 0]
    return {"median": statistics.median(off), "max": max(off)}


def measured(method: str, bf16: bool, tiny: bool = False, old: bool = False) -> dict:
    names = [*CONFIGS, *LOOPS] if method == "sft" else [name for name in CONFIGS if name != "torch.compile"]
    names = ["no checkpointing", "speed_up", OLD] if old else names
    left_out = {"torch.compile"} if tiny else set()
    left_out |= {OLD} if old_source() is None else set()
    names, rounds = [name for name in names if name not in left_out], TINY_ROUNDS if tiny else ROUNDS
    floors, shares, start = [], [], time.perf_counter()
    seconds, losses = {name: [] for name in names}, {name: [] for name in names}
    with ExitStack() as stack:
        own = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in names}
        for i, name in harness.in_turns(names, rounds):
            begins = i and {len(each) for each in losses.values()} == {i}
            if begins and i == 1:
                start = time.perf_counter()  # torch.compile has compiled
            elif begins and time.perf_counter() - start > MOST_SECONDS * len(names) / 3 * (i - 1) / i:
                break  # the machine is busy: fewer rounds
            done = own[name].submit(turn, method, name, bf16, tiny, i).result()
            losses[name].append(done["losses"])
            if i:
                seconds[name] += done["steps"]
            if "floor" in done:
                floors.append(done["floor"])
                shares.append(floors[-1]["seconds"] / statistics.mean(one["clock"] for one in done["steps"]))
    ratios = {
        name: {kind: harness.spread([a[kind] / b[kind] for a, b in paired]) for kind in ("clock", "cpu")}
        for name in seconds
        if name != "speed_up" and (paired := list(zip(seconds[name], seconds["speed_up"], strict=True)))
    }
    result = {
        "method": method,
        "bf16": bf16,
        "threads": THREADS,
        "ratio": ratios,
        "step_seconds": {
            name: {kind: harness.spread([one[kind] for one in each]) for kind in ("clock", "cpu")}
            for name, each in seconds.items()
        },
        "loss": losses,
        "runs": seconds,
        "floor": floors,
        "share_of_floor": harness.spread(shares),
    }
    tell(result)
    return result


def tell(result: dict) -> None:
    for name, each in result["step_seconds"].items():
        times = [f"{result['ratio'][name][kind]['median']:.2f}" for kind in ("clock", "cpu") if name in result["ratio"]]
        clock, cpu = each["clock"]["median"], each["cpu"]["median"]
        print(f"{name:18} {clock:6.2f} s a step, {cpu:6.2f} CPU seconds;  times speed_up's: {' '.join(times)}")
    print(f"of the floor: {result['share_of_floor']['median']:.0%}")


def floor(trainer: SFTTrainer | DPOTrainer, dtype: torch.dtype) -> dict:
    """Seconds and FLOPs of the products that a step on the trainer's batches, packed, cannot avoid."""
    batches = list(islice(trainer.get_train_dataloader(), 1, STEPS))  # as Clock.steps
    n, counted = (round(statistics.mean(each)) for each in zip(*map(sizes, batches), strict=True))
    parts = products(trainer.model.config, n, counted)
    if isinstance(trainer, DPOTrainer):
        parts += products(trainer.model.config, n, counted, trained=False)
    return {
        "tokens_packed": n,
        "tokens_counted": counted,
        "seconds": sum(times * seconds_of(m, k, n, dtype) for m, k, n, times in parts),
        "flops": sum(2 * m * k * n * times for m, k, n, times in parts),
    }


def sizes(batch: dict) -> tuple[int, int]:
    """Tokens of a batch as it is packed, and those of them whose next token counts."""
    ids, read, pairs = batch["input_ids"], batch["attention_mask"].bool(), "completion_mask" in batch
    counted = batch["completion_mask"] if pairs else batch["labels"] != -100
    if pairs:  # the last token of an answer is asked for, and not read
        ids, read = ids[:, :-1], read[:, 1:]
    rows = [row[seen].tolist() for row, seen in zip(ids, read, strict=True)]
    keys = [*range(len(rows) // 2)] * 2 if pairs else None
    return len(pack_with_shared_prefix(rows, keys)[0]), int(counted[:, 1:].sum())


def products(config, n: int, counted: int, trained: bool = True) -> list[tuple[int, int, int, int]]:
    """(m, k, n, times) of each product (m, k) @ (k, n) of a pass over n tokens: of the trained model, forward and
    backward, or of the frozen one, forward.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    linear = [(width, width, 1), (width, 2 * inner, 2), (inner, width, 1)]  # in, out, LoRA layers side by side
    # After the last layer's attention only the counted tokens matter; below the first layer nothing is learned.
    stacks = [(n, width, qkv, 3, layers, layers - 1)]
    stacks += [(m, *one, times, times) for m, times in ((n, layers - 1), (counted, 1)) for one in linear]
    parts = []
    for m, in_, out, stacked, times, to_input in stacks:
        thin = RANK * stacked
        parts += [(m, in_, out, times)]
        if trained:
            parts += [(m, in_, thin, times), (m, thin, out, times)]
            parts += [(m, out, thin, times), (thin, m, in_, times), (out, m, thin, times)]  # gradients of A and B
            parts += [(m, out, in_, to_input), (m, thin, in_, to_input)]  # backward to the input
    backward = [(counted, config.vocab_size, width, 1)] if trained else []
    return [*parts, (counted, width, config.vocab_size, 1), *backward]


def seconds_of(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    """Of (m, k) @ (k, n): the median of five tries, each the mean of five in a row."""
    a, b, out = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).T, torch.empty(m, n, dtype=dtype)
    tries = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b, out=out)
        tries.append((time.perf_counter() - start) / 5)
    return statistics.median(tries)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the model micro, few steps, no record")
    parser.add_argument("--old", action="store_true", help="TRL, speed_up and f21bf8c alone")
    said = parser.parse_args(arguments)
    tiny = said.tiny
    native = product_dtype(bf16=True) == torch.bfloat16
    cases = [(method, bf16) for bf16 in ([True, False] if native else [False]) for method in ("sft", "dpo")]
    batches = []
    for case in cases:
        batches.append(harness.alone(first_batch, *case, tiny))
        print(batches[-1])
    if said.old:
        steps = [measured(*case, tiny, old=True) for case in cases]
        found = {"environment": harness.environment(), "first_batch": batches, "steps": steps}
        kept = json.loads((harness.RESULTS / "speed_up.json").read_text("utf-8"))
        text = json.dumps(kept | {"against_f21bf8c": found}, indent=1, ensure_ascii=False) + "\n"
        (harness.RESULTS / "speed_up.json").write_text(text, "utf-8")
        return
    emulated = None if native or tiny else harness.alone(emulated_step)
    steps = [measured(*case, tiny) for case in cases]
    if not tiny:
        found = {"emulated_bf16_step_seconds": emulated, "first_batch": batches, "steps": steps}
        harness.write("speed_up", found)


if __name__ == "__main__":
    main()
