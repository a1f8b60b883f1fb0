"""TRL's trainer as the experiments on one CPU thread use it, what a run of it took, and its Job."""

import time
from typing import Any

from experiments.runs import Job, cpu_clock

WARMUP = 5  # steps
QUIET = {  # of any TRL config: on the CPU; nothing is saved, reported or drawn
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def trainer_of(model, tokenizer, rows: list[dict], *, rate: float, seed: int, lora: dict, **settings: Any) -> Any:
    """An SFTTrainer in fp32 on one thread, with a linear decay, that saves and prints nothing.

    lora: the arguments of LoraConfig; {} trains the weights that require a gradient. settings go to
    SFTConfig: batches of two rows and one pass, unless they say otherwise.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    set_seed(seed)
    usual = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "warmup_steps": WARMUP}
    trainer = SFTTrainer(
        model,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=SFTConfig(
            "runs/experiment",
            learning_rate=rate,
            seed=seed,
            logging_steps=1,
            bf16=False,
            **(QUIET | usual | settings),
        ),
        peft_config=LoraConfig(**lora) if lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def sped_up(trainer) -> None:
    """Gives a trainer `speed_up`; raises RuntimeError if that refuses, for all arms are to have it."""
    from ftlab import speed_up

    if not (fast := speed_up(trainer)):
        raise RuntimeError(f"speed_up refused: {fast.reason}; all arms with LoRA are to have it")


def step_clock():
    """A callback whose `seconds` are the CPU seconds of each optimizer step, over all its trainings."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(round(time.process_time() - self.began, 3))

    return Clock()


def trained(trainer) -> dict:
    """Trains, and what it took: steps, trained weights, train_loss (nats a token), CPU seconds.

    train_loss is the mean of the last ten steps.
    """
    began = cpu_clock()
    trainer.train()
    last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-10:]
    learned = [weight.numel() for weight in trainer.model.parameters() if weight.requires_grad]
    return {
        "steps": trainer.state.global_step,
        "trained": sum(learned),
        "train_loss": round(sum(last) / len(last), 4),
        "train_cpu_seconds": round(cpu_clock() - began, 1),
    }


def named(arm: str, rate: float, seed: int, phase: str) -> Job:
    """The run of an arm with a rate and a seed; phase is "search" or "final"."""
    name = {"arm": arm, "rate": rate, "seed": seed, "phase": phase}
    return Job((name,), (arm, rate, seed, phase))
