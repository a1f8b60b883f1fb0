"""How each arm of experiments/rlhf trains, in TRL's trainers; PPO in ftlab.scratch.ppo."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import sft as plain
from experiments.rlhf.world import LORA, Size, by_gold, gold, judged, message, read

if TYPE_CHECKING:
    from experiments.rlhf.run import Run

WARMUP = 3  # steps
SFT_BATCH, DPO_BATCH = 16, 8  # on micro; the 135M has 2 and 2
START_RATE = 1e-3  # of the 135M's SFT on the log, as in notebook 00
PPO_MINIBATCHES = 2


def lora(run: Run):
    """The settings of a new adapter, which will be drawn with the run's seed.

    What came before has drawn more or fewer random numbers, as replies or a reward model of this
    seed were there already or not.
    """
    from peft import LoraConfig
    from transformers import set_seed

    set_seed(run.seed)
    return LoraConfig(**LORA)


def arguments(rate: float, seed: int, steps: int, batch: int, **more) -> dict:
    """What all of TRL's configs are given: fp32, AdamW without weight decay, nothing saved."""
    return (
        {
            "output_dir": "runs/rlhf/trainer",
            "learning_rate": rate,
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "warmup_steps": WARMUP,
            "weight_decay": 0.0,
            "seed": seed,
            "bf16": False,
            "logging_steps": 5,
        }
        | plain.QUIET
        | more
    )


def fitted(trainer):
    """The trainer's model after its training, of which nothing is printed."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def watcher(run: Run, first: int = 0):
    """A callback that shows the run each step of a training that begins after `first` steps."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            run.stepped(model, first + state.global_step)

    return Watcher()


def batch_of(run: Run, on_micro: int) -> int:
    """Rows or pairs of a step."""
    return on_micro if run.world.model == "micro" else 2


def steps_of(run: Run, rows: list, batch: int) -> int:
    """Steps of an arm: given for micro, one pass over the rows for the 135M."""
    size = run.world.size
    return size.steps if run.world.model == "micro" else max(len(rows) // batch, 1)


# --- The SFT model of the 135M --------------------------------------------------------------------


def train_start(folder: Path, size: Size) -> None:
    """SmolLM2 after SFT on the log's first rows, LoRA merged, into the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import model_path
    from ftlab.tasks import replies

    source = model_path("smollm2")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    log = read("log")[: size.start_rows]
    rows = [{"prompt": replies.prompt(r), "completion": message(r["reply"])} for r in log]
    trainer = plain.trainer_of(model, tokenizer, rows, rate=START_RATE, seed=0, lora=LORA)
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- SFT and DPO on own replies -------------------------------------------------------------------


def best(row: dict) -> dict:
    """A judged row's best reply as a demonstration; of equals the one drawn last."""
    text = row["replies"][by_gold(row)[-1]]
    return {"prompt": row["prompt"], "completion": message(text)}


def best_and_worst(rows: list[dict]) -> list[dict]:
    """A pair of each judged row; none where all its replies are worth the same."""
    pairs = []
    for row in rows:
        order = by_gold(row)
        if row["golds"][order[-1]] > row["golds"][order[0]]:
            chosen, rejected = (message(row["replies"][i]) for i in (order[-1], order[0]))
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def sft(run: Run):
    """SFT on the best of n of the SFT model's replies (rejection sampling)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [best(row) for row in run.labelled()]
    batch = batch_of(run, SFT_BATCH)
    trainer = SFTTrainer(
        run.world.load(),
        train_dataset=Dataset.from_list(rows),
        processing_class=run.world.tokenizer,
        args=SFTConfig(**arguments(run.rate, run.seed, steps_of(run, rows, batch), batch)),
        peft_config=lora(run),
        callbacks=[watcher(run)],
    )
    return fitted(trainer)


def dpo(run: Run):
    """DPO on the best against the worst of n own replies, in one round."""
    return one_round(run, run.world.load(), best_and_worst(run.labelled()))


def dpo_rounds(run: Run, rounds: int = 3):
    """The same in rounds: each samples anew, and its reference is the model it begins from.

    The adapter is merged after a round and the next one is put on the merged model, so TRL, which
    takes the model without its adapter as the reference, takes the model of the round before.
    """
    size, model = run.world.size, run.world.load()
    rows = random.Random(run.seed).sample(run.world.sets["train"], size.tickets)
    part = size.tickets // rounds
    for k in range(rounds):
        mine = rows[k * part : (k + 1) * part]
        drawn = judged(run.world, model.eval(), mine, size.replies, 1_000 + 10 * run.seed + k)
        run.labels += len(mine) * size.replies
        steps = size.steps // rounds
        model = one_round(run, model, best_and_worst(drawn), steps, k * steps).merge_and_unload()
    return model


def one_round(run: Run, model, pairs: list[dict], steps: int | None = None, first: int = 0):
    """DPO on these pairs; the reference is the model that it begins from."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    if not pairs:
        wanted = "got no pair, wanted tickets whose replies differ in gold"
        raise ValueError(f"{wanted}. Does the model write nothing that the rules can read?")
    batch = batch_of(run, DPO_BATCH)
    steps = steps or steps_of(run, pairs, batch)
    trainer = DPOTrainer(
        model,
        train_dataset=Dataset.from_list(pairs),
        processing_class=run.world.tokenizer,
        args=DPOConfig(**arguments(run.rate, run.seed, steps, batch, beta=run.beta)),
        peft_config=lora(run),
        callbacks=[watcher(run, first)],
    )
    return fitted(trainer)


# --- GRPO and PPO ---------------------------------------------------------------------------------


def gold_reward(completions: list, ticket_label: list[dict], **_) -> list[float]:
    """The rules as TRL's reward function."""
    pairs = zip(completions, ticket_label, strict=True)
    return [gold(completion[0]["content"], {"ticket_label": label}) for completion, label in pairs]


def grpo(run: Run):
    """GRPO on a reward model, or on the rules: TRL's trainer, with replies from our decoder."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from ftlab.llama import Decoder

    world, size = run.world, run.world.size
    by_rules = run.arm.reward == "gold"
    reward = gold_reward if by_rules else run.reward()
    steps = size.steps if run.arm.capped else size.steps_uncapped
    run.labels_a_step = size.prompts * size.group if by_rules else 0
    eos, length = world.tokenizer.eos_token_id, run.length

    class Sampling(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *_):
            return Decoder(self.model).generate(prompt_ids, length, eos, 1.0, keep_eos=True), None

    rows = [{key: row[key] for key in ("prompt", "ticket_label")} for row in world.sets["train"]]
    trainer = Sampling(
        world.load(),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=world.tokenizer,
        args=GRPOConfig(
            **arguments(run.rate, run.seed, steps, size.prompts * size.group),
            lr_scheduler_type="constant_with_warmup",
            loss_type="grpo",
            use_bias_correction_kl=False,
            beta=run.beta,
            num_generations=size.group,
            max_completion_length=length,
        ),
        peft_config=lora(run),
        callbacks=[watcher(run)],
    )
    run.look(trainer.model, 0)
    return fitted(trainer)


def ppo(run: Run):
    """ftlab.scratch.ppo; the value model begins as the reward model, with an adapter of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import get_constant_schedule_with_warmup

    from ftlab.scratch.ppo import rollout, update

    world, reward_model = run.world, run.reward_model()
    policy = get_peft_model(world.load(), lora(run)).eval()
    critic = LoraConfig(**LORA, task_type="SEQ_CLS")
    value_model = get_peft_model(copy.deepcopy(reward_model), critic).eval()
    both = (*policy.parameters(), *value_model.parameters())
    trained = [weight for weight in both if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, WARMUP)

    def reference(**inputs):
        with policy.disable_adapter():
            return policy(**inputs)

    run.look(policy, 0)
    for step, prompts in enumerate(ppo_prompts(run), 1):
        ids, masks = sampled(run, policy, prompts)
        models = (policy, reference, reward_model, value_model)
        eos = world.tokenizer.eos_token_id
        batch = rollout(*models, ids, *masks, eos_token_id=eos, beta=run.beta)
        update(policy, value_model, optimizer, batch, epochs=1, minibatches=PPO_MINIBATCHES)
        schedule.step()
        run.stepped(policy, step)
    return policy


def ppo_prompts(run: Run) -> Iterator[list[list[int]]]:
    """The prompts of each step: as many replies as a step of GRPO has, each to another ticket."""
    size, draw = run.world.size, random.Random(run.seed)
    for _ in range(size.steps):
        rows = draw.sample(run.world.sets["train"], size.prompts * size.group)
        yield [run.world.ids(row) for row in rows]


def sampled(run: Run, policy, prompts: list[list[int]]) -> tuple:
    """(ids (B, T), (attention mask, completion mask)) of the policy's replies, padded behind."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from ftlab.llama import Decoder

    eos = run.world.tokenizer.eos_token_id
    answers = Decoder(policy).generate(prompts, run.length, eos, 1.0, keep_eos=True)
    pairs = list(zip(prompts, answers, strict=True))
    ids = pad_sequence([torch.tensor(p + a) for p, a in pairs], batch_first=True)
    place = torch.arange(ids.shape[1])
    seen = place < torch.tensor([[len(p) + len(a)] for p, a in pairs])
    completion = seen & (place >= torch.tensor([[len(p)] for p, _ in pairs]))
    return ids, (seen.long(), completion.long())


def reward_model(run: Run):
    """The run of a reward model itself: nothing but its training and its accuracy."""
    return run.reward_model()


METHODS: dict[str, Callable] = {
    "reward model": reward_model,
    "sft": sft,
    "dpo": dpo,
    "dpo rounds": dpo_rounds,
    "ppo": ppo,
    "grpo": grpo,
}
