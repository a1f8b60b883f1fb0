"""The learner's own code through TRL, through Unsloth's CPU backend and with `speed_up`: losses, speed, memory.

    python experiments/engines/run.py        every run that records.jsonl lacks (about five minutes of one core)
    python experiments/engines/run.py 3      at most three of them

SmolLM2 with LoRA (r = 16 on all linear layers, no dropout), fp32, AdamW at 1e-3, 4 rows of data/ask a step, seed 0.
Each run is `run` below, in a process of its own with one thread, so that the engines cannot patch each other. Three
repetitions, the order of the engines turned by one each time: the first of 24 steps, the others of 8, each row seen
once. tokens: of the rendered rows, without padding.

loss: of every step, nats/token. step_cpu_seconds: processor time of each step from the second on, which other work on
the machine changes less than the clock. cpu_seconds: of the whole process, imports and loading too. peak_mb: high-water
mark of its resident memory (ru_maxrss). load: of the machine, the mean number of running threads over the last minute.
"""

import itertools
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

FILE = Path(__file__).with_name("records.jsonl")
ENGINES = ("TRL", "Unsloth", "speed_up")
STEPS = (24, 8, 8)  # of the repetitions
BATCH = 4
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth")


def jobs() -> list[tuple[str, int]]:
    """(engine, repetition), in the order in which they run."""
    return [(name, i) for i in range(len(STEPS)) for name in ENGINES[i:] + ENGINES[:i]]


def run(name: str, steps: int) -> dict:
    """Trains once, in this process, which must be a fresh one, and returns what that left."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "UNSLOTH_AUTO_INSTALL": "0"}
    if name == "Unsloth":
        os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp()}
        from unsloth import FastLanguageModel  # before transformers and trl
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from ftlab import model_path, speed_up
    from ftlab.paths import DATA

    torch.set_num_threads(1)
    MODEL, ends = model_path("smollm2"), []
    rows = str(DATA / "ask" / "train.jsonl")
    train = load_dataset("json", data_files=rows, split=f"train[:{steps * BATCH}]").select_columns(
        ["prompt", "completion"]
    )
    args = SFTConfig(
        tempfile.mkdtemp(), learning_rate=1e-3, per_device_train_batch_size=BATCH, num_train_epochs=1, seed=0,
        logging_steps=1, save_strategy="no", report_to="none", gradient_checkpointing=False, bf16=False, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    if name == "Unsloth":
        model, tokenizer = FastLanguageModel.from_pretrained(MODEL, dtype=torch.float32, load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=0
        )
        lora = None
    else:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
            AutoTokenizer.from_pretrained(MODEL),
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        set_seed(0)  # before lora_A is drawn

    class Clock(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                ends.append(time.process_time())

    trainer = SFTTrainer(
        model, args=args, train_dataset=train, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()]
    )
    if name == "speed_up":
        speed_up(trainer)
    trainer.train()
    log, used = (
        [record for record in trainer.state.log_history if "loss" in record],
        resource.getrusage(resource.RUSAGE_SELF),
    )
    return {
        "name": name,
        "tokens": sum(map(len, trainer.train_dataset["input_ids"])),
        "loss": [record["loss"] for record in log],
        "grad_norm": [record["grad_norm"] for record in log],
        "step_cpu_seconds": [round(b - a, 3) for a, b in itertools.pairwise(ends)],
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_mb": round(used.ru_maxrss * 1024 / 1e6),
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    from experiments.runs import add, read, stamp

    rows = [f"data/ask/train.jsonl, the first {max(STEPS) * BATCH} rows"]
    done = {(one["name"], one["repetition"]) for one in read(FILE)}
    about = {
        "measured": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
    }
    about |= stamp("float32", rows, {"settings": "given in run.py"}, PACKAGES) | {"threads": 1}
    for name, i in [job for job in jobs() if job not in done][: int((sys.argv[1:] or [99])[0])]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a process that ends with its run
            one = {"repetition": i, **pool.submit(run, name, STEPS[i]).result(), **about}
        add(FILE, one)
        print(name, i, one["cpu_seconds"], "s,", one["peak_mb"], "MB, last loss", one["loss"][-1], flush=True)


if __name__ == "__main__":
    main()
