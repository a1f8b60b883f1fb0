"""How the arms of experiments/rewards train: TRL's trainers, one clock, looks at the model.

No arm has `speed_up`, since it doesn't know TRL's DistillationTrainer. All that sample do so with
the same decoder (`ftlab.cpu.Decoder`), in place of transformers' generate.
"""

import os
import statistics
from collections.abc import Callable
from functools import cache

from experiments import sft as plain
from experiments.alignment.run import Clock, message
from experiments.rewards import models
from experiments.rewards.models import LENGTH, SIZE, right

PROMPTS, GENERATIONS = 8, 8  # of a GRPO step; distillation reads as many answers
ROWS = 16  # of an SFT step
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LOOKS = (1 / 12, 1 / 6, 1 / 3, 2 / 3, 1.0)  # shares of the training time
LOOKED = 2  # answers to each validation question
KL_EVERY = 4  # of the validation questions: an answer to each of them is enough for the KL
TRIES = 4  # answers to a prompt, of which rejection sampling keeps the right ones
SHARE = 0.4  # of the time, for rows that an arm has to draw before it trains
WARMUP = 0.05  # of the training time
LOGGED = (
    "reward",
    "frac_reward_zero_std",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "loss",
    "grad_norm",
)


class Timed:
    """A run's CPU seconds, and the callback that ends the training with them.

    Measuring stops the clock. seconds: what an arm has, its sampling and checking among it.
    looks: shares of the training time at which `look` is called.
    """

    def __init__(self, seconds: float, rate: float, looks: tuple, look: Callable) -> None:
        self.clock, self.limit, self.rate = Clock(), seconds, rate
        self.due, self.look, self.began, self.steps = list(looks), look, None, 0

    def share(self) -> float:
        """The share of the training time that is over; 0 before the first step."""
        if self.began is None:
            self.began = self.clock.seconds()
        return (self.clock.seconds() - self.began) / max(self.limit - self.began, 1e-9)

    def rate_now(self) -> float:
        """The learning rate: up over WARMUP of the training time, then down to 0 with it."""
        share = self.share()
        return self.rate * max(0.0, min(share / WARMUP + 0.02, 1.0, (1 - share) / (1 - WARMUP)))

    def after_step(self, model) -> None:
        """Looks at the model if a share is due; several that are due at once are one look."""
        share = self.share()
        if self.due and share >= self.due[0]:
            self.due = [one for one in self.due if one > share]
            self.clock.stop()
            self.look(model)
            self.clock.go_on()

    def callback(self):
        from transformers import TrainerCallback

        timed = self

        class Watcher(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                timed.share()

            def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
                for group in optimizer.param_groups:
                    group["lr"] = timed.rate_now()

            def on_step_end(self, args, state, control, model=None, **_):
                timed.steps = state.global_step
                timed.after_step(model)
                control.should_training_stop |= not timed.due

        return Watcher()


class Run:
    """One run of an arm: its clock, the looks, the trainer's arguments."""

    def __init__(self, arm: str, rate: float, seed: int, seconds: float, looks: tuple) -> None:
        from transformers import set_seed

        self.arm, self.rate, self.seed = arm, rate, seed
        self.world, self.checkpoints, self.logs, self.about = models.world(), [], [], {}
        self.validation = models.asked("validation")
        set_seed(seed)
        self.time = Timed(seconds, rate, looks, self.look)

    def rows(self) -> list[dict]:
        return models.shuffled(models.prompts(), self.seed)

    def look(self, model) -> None:
        """A checkpoint on the validation questions, and on what the start could do before."""
        was = model.training
        model.eval()
        drawn = self.world.drawn(model, self.validation, LOOKED, seed=7)
        good = [right(text, row["gold"]) for row in drawn for text in row["texts"]]
        self.checkpoints.append(
            {
                "step": self.time.steps,
                "cpu_seconds": round(self.time.clock.total, 1),
                "right": round(statistics.mean(good), 4),
                "kl": round(self.world.kl(model, drawn[::KL_EVERY]), 4),
                "old": self.world.old_right(model),
            }
        )
        model.train(was)

    def arguments(self, batch: int, **more) -> dict:
        return (
            {
                "output_dir": str(SIZE.folder / str(os.getpid())),
                "learning_rate": self.rate,
                "max_steps": 100_000,  # the clock ends it
                "per_device_train_batch_size": batch,
                "lr_scheduler_type": "constant",
                "weight_decay": 0.0,
                "seed": self.seed,
                "bf16": False,
                "logging_steps": 5,
            }
            | plain.QUIET
            | more
        )

    def trained(self, trainer):
        """The model after train(); the logs are kept."""
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        self.logs = [{key: round(log[key], 4) for key in LOGGED if key in log} for log in logs]
        return trainer.model

    def answered(self, model, prompt_ids: list[list[int]]) -> list[list[int]]:
        """An answer to each prompt with its end of turn, as TRL's trainers want them."""
        from ftlab.cpu import Decoder

        eos = self.world.tokenizer.eos_token_id
        return Decoder(model).generate(prompt_ids, LENGTH, [eos], 1.0, keep_eos=True)


# --- GRPO -----------------------------------------------------------------------------------------


def grpo(run: Run):
    """The model after GRPO on the check: 1 if a query returns the right rows, else 0."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, gold, **_) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [float(right(text, one)) for text, one in zip(texts, gold, strict=True)]

    class Sampled(GRPOTrainer):
        """Draws its answers with the decoder that all arms have."""

        def _generate_single_turn(self, prompt_ids, *_, **__):
            return run.answered(self.model, prompt_ids), None

    rows = [{key: row[key] for key in ("prompt", "gold")} for row in run.rows()]
    trainer = Sampled(
        run.world.load(),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=run.world.tokenizer,
        args=GRPOConfig(
            **run.arguments(PROMPTS * GENERATIONS),
            num_generations=GENERATIONS,
            max_completion_length=LENGTH,
            beta=0.0,
        ),
        peft_config=LoraConfig(**LORA),
        callbacks=[run.time.callback()],
    )
    return run.trained(trainer)


# --- SFT on four kinds of rows --------------------------------------------------------------------


def sft(run: Run, rows: list[dict]):
    """The model after SFT on rows {prompt, completion}, again and again until the time is over.

    Raises ValueError if there is no row.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    if not rows:
        text = f"{run.arm}: got no rows, want some right answers of the model to {run.about}"
        raise ValueError(f"{text}. Does the model that draws them know the task?")
    run.about["rows"] = len(rows)
    trainer = SFTTrainer(
        run.world.load(),
        train_dataset=Dataset.from_list(rows),
        processing_class=run.world.tokenizer,
        args=SFTConfig(**run.arguments(ROWS)),
        peft_config=LoraConfig(**LORA),
        callbacks=[run.time.callback()],
    )
    return run.trained(trainer)


def more_sft(run: Run):
    """SFT on the gold queries of the prompts."""
    return sft(run, [{key: row[key] for key in ("prompt", "completion")} for row in run.rows()])


def drawn_rows(run: Run, draw: Callable, at_once: int) -> list[dict]:
    """What draw() makes of at_once prompts at a time, until SHARE of the time is over."""
    found, asked, rows = [], 0, run.rows()
    while asked < len(rows) and run.time.clock.seconds() < SHARE * run.time.limit:
        found += draw(rows[asked : asked + at_once], run.seed * 10_000 + asked)
        asked += at_once
    run.about["asked"] = min(asked, len(rows))
    return found


def rejection(run: Run):
    """SFT on the start's own answers that pass the check, each different one once."""

    def own_right(rows: list[dict], seed: int) -> list[dict]:
        found = []
        for row in run.world.drawn(run.world.start, rows, TRIES, seed):
            good = dict.fromkeys(text for text in row["texts"] if right(text, row["gold"]))
            found += [{"prompt": row["prompt"], "completion": message(text)} for text in good]
        return found

    return sft(run, drawn_rows(run, own_right, 50))


@cache
def larger_teacher():
    return models.loaded(models.larger_folder()[0]).eval().requires_grad_(False)


def from_larger(run: Run):
    """SFT on the larger teacher's greedy answers, right or wrong: nobody checks them."""
    run.time.clock.stop()
    teacher = larger_teacher()
    run.time.clock.go_on()

    def taught(rows: list[dict], seed: int) -> list[dict]:
        drawn = run.world.drawn(teacher, rows, 1, seed, temperature=0.0)
        return [{"prompt": row["prompt"], "completion": message(row["texts"][0])} for row in drawn]

    return sft(run, drawn_rows(run, taught, 100))


def from_135m(run: Run):
    """SFT on the 135M's greedy answers, which are there before the clock starts."""
    run.time.clock.stop()
    given = models.teacher_answers()
    run.about |= {"teacher_seconds": given["seconds"], "teacher_right": round(given["right"], 4)}
    run.time.clock.go_on()
    return sft(run, models.shuffled(given["rows"], run.seed))


# --- On-policy distillation -----------------------------------------------------------------------


def distill(run: Run):
    """The model after reverse KL to the larger teacher on its own answers; no check, no gold."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DistillationConfig, DistillationTrainer

    run.time.clock.stop()
    teacher = larger_teacher()
    run.time.clock.go_on()

    class Sampled(DistillationTrainer):
        """Draws its answers with the decoder that all arms have."""

        def _generate_single_turn(self, prompt_ids, *_, **__):
            return run.answered(self.model, prompt_ids)

    trainer = Sampled(
        run.world.load(),
        teacher_model=teacher,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in run.rows()]),
        processing_class=run.world.tokenizer,
        args=DistillationConfig(
            **run.arguments(PROMPTS * GENERATIONS), max_completion_length=LENGTH, beta=1.0
        ),
        peft_config=LoraConfig(**LORA),
        callbacks=[run.time.callback()],
    )
    return run.trained(trainer)


METHODS = {
    "grpo": grpo,
    "rejection": rejection,
    "more sft": more_sft,
    "distill": distill,
    "sft larger": from_larger,
    "sft 135M": from_135m,
}
