"""Makes ppo.safetensors: one whole update of TRL 1.12's PPOTrainer, recorded from inside its own train().

Made with trl 1.12.0, transformers 5.17.0 and torch 2.13.0 on a CPU, in fp32, one thread:

    OMP_NUM_THREADS=1 python tests/golden/make_ppo.py

TRL removed its PPO after 1.12, so this runs only where trl is at most 1.12, and the file can be made again only in an
environment of its own with trl==1.12.0. The repository's tests read the file and never run this script. All weights are
in it, so that nothing depends on a random generator of another version.

    policy/ ref_model/ reward_model/ value_model/     weights before the update, by their names in the state dict
    trained_policy/ trained_value_model/              the same after the update
    input_ids (B, T)                                  query_responses: prompts padded on the left, answers on the right
    attention_mask, completion_mask (B, T)            by pad_token_id; the answer begins at context_length
    old_logps, ref_logps (B, L)                       logprobs, ref_logprobs of the L sampled tokens; 1 behind an answer
    values, rewards, advantages, returns (B, L)       0 behind an answer; all but advantages have one position more
    scores (B,)
    minibatches (S, b)                                micro_batch_inds: the rows of each of the S optimizer steps
    policy_losses, value_losses (S,)                  pg_loss, vf_loss before that step

Its metadata, one JSON object under the key `about`: versions, the models' config, the trainer's settings, the
optimizer's as the trainer made it, context_length, and the means that the trainer logged.

TRL's flags that are not at their defaults stand in SETTINGS. temperature=0.7, kl_coef=0.05, kl_estimator="k1",
gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, num_ppo_epochs=4, whiten_rewards=False are.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1")

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

FILE = Path(__file__).with_name("ppo.safetensors")
CONFIG = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SETTINGS = {
    "per_device_train_batch_size": 8,
    "num_mini_batches": 2,
    "total_episodes": 8,  # one batch, so one update: 4 epochs of 2 minibatches
    "response_length": 8,
    "stop_token": "eos",
    "learning_rate": 0.01,  # large, so that ratios and values leave their ranges
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "adam_epsilon": 1e-5,  # with 1e-8 a gradient that is nothing but round-off would be a step of full size
    "num_sample_generations": 0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
}
PROMPTS = [[1, 5, 9], [1, 7, 8, 9, 10, 11], [1, 12], [1, 20, 21, 22, 23], [1, 6, 6], [1, 15, 4, 13], [1, 3], [1, 18, 4]]
# what the loop in PPOTrainer.train calls them: what they are called here
BATCH = {"query_responses": "input_ids", "logprobs": "old_logps", "ref_logprobs": "ref_logps"}
BATCH |= {name: name for name in ("values", "scores", "rewards", "advantages", "returns")}
STEPS = {"micro_batch_inds": "minibatches", "pg_loss": "policy_losses", "vf_loss": "value_losses"}
LOGGED = ("objective/kl", "objective/scores", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg")
CHECKED = ("padding_mask", "padding_mask_p1", "ratio", "vpred")


def tokenizer() -> PreTrainedTokenizerFast:
    """24 words, <pad> is 0, <s> 1 and </s> 2; the trainer only needs its padding and its special tokens."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, CONFIG["vocab_size"]))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def make_models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    policy, ref_model = (LlamaForCausalLM(LlamaConfig(**CONFIG)) for _ in range(2))
    reward_model, value_model = (LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1)) for _ in range(2))
    policy.lm_head.weight.data[2] *= 3  # so that some answers end within 8 tokens
    ref_model.load_state_dict(policy.state_dict())
    with torch.no_grad():
        for parameter in ref_model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape)  # a KL that is not 0
    return {"policy": policy, "ref_model": ref_model, "reward_model": reward_model, "value_model": value_model}


def weights(made: dict[str, torch.nn.Module], prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{model}/{name}": tensor.detach().clone()
        for model, module in made.items()
        for name, tensor in module.state_dict().items()
    }


def train_watched(trainer: PPOTrainer) -> list[dict]:
    """Runs trainer.train(), and returns its loop's local variables as they are before each backward pass."""
    steps, backward = [], trainer.accelerator.backward

    def look_first(loss: torch.Tensor, **options) -> None:
        loop = sys._getframe(1).f_locals
        names = (*BATCH, *STEPS, *CHECKED)
        steps.append({name: torch.as_tensor(loop[name]).detach().clone() for name in names})
        steps[-1]["context_length"] = loop["context_length"]
        backward(loss, **options)

    trainer.accelerator.backward = look_first
    trainer.train()
    return steps


def check(steps: list[dict]) -> None:
    """The record holds what it is for. Raises AssertionError if not: then try another seed."""
    first = steps[0]
    answers = first["query_responses"][:, first["context_length"] :]
    lengths, ended = (answers != 0).sum(1), (answers == 2).any(1)
    assert len(lengths.unique()) > 2 and 2 <= ended.sum() <= 6, (lengths, ended)
    assert (lengths[ended] < answers.shape[1]).all() and (lengths[~ended] == answers.shape[1]).all(), lengths
    real = ~first["padding_mask"]
    ratios = torch.cat([step["ratio"][real[step["micro_batch_inds"]]] for step in steps])
    assert (ratios > 1.2).any() and (ratios < 0.8).any() and ((ratios - 1).abs() < 0.2).any(), ratios
    longer = ~first["padding_mask_p1"]
    moved = [(s["vpred"] - s["values"][i]).abs()[longer[i]] for s in steps for i in [s["micro_batch_inds"]]]
    assert (torch.cat(moved) > 0.2).any() and (torch.cat(moved) < 0.2).any(), moved
    assert all(torch.equal(step["advantages"], first["advantages"]) for step in steps) and len(steps) == 8


def main() -> None:
    torch.set_num_threads(1)
    transformers.set_seed(0)  # also numpy's, which shuffles the minibatches
    made = make_models()
    record = weights(made)
    rows = Dataset.from_list([{"input_ids": prompt} for prompt in PROMPTS])
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            PPOConfig(folder, **SETTINGS),
            tokenizer(),
            made["policy"],
            made["ref_model"],
            made["reward_model"],
            rows,
            made["value_model"],
            eval_dataset=rows,
        )
        steps = train_watched(trainer)
    check(steps)
    first = steps[0]
    record |= {name: first[theirs] for theirs, name in BATCH.items()}
    record["attention_mask"] = (record["input_ids"] != CONFIG["pad_token_id"]).long()
    record["completion_mask"] = record["attention_mask"].clone()
    record["completion_mask"][:, : first["context_length"]] = 0
    record |= {name: torch.stack([step[theirs] for step in steps]) for theirs, name in STEPS.items()}
    record |= weights({name: made[name] for name in ("policy", "value_model")}, prefix="trained_")

    optimizer = trainer.optimizer.optimizer
    groups = [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups]
    used = {key: groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert all({**group, **used} == group for group in groups)
    (logged,) = [row for row in trainer.state.log_history if "objective/kl" in row]
    names = ("temperature", "kl_coef", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "num_ppo_epochs")
    logged = {name: float(logged[name]) for name in LOGGED}
    about = {
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "model_config": CONFIG,
        "settings": {**SETTINGS, **{name: getattr(trainer.args, name) for name in names}},
        "optimizer": {"class": type(optimizer).__name__, **used},
        "logged": logged,
        "context_length": first["context_length"],
    }
    record = {name: tensor.contiguous() for name, tensor in record.items()}
    save_file(record, FILE, metadata={"about": json.dumps(about)})  # several keys would come in any order
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(record)} tensors")
    print(json.dumps(about, indent=1))
    print(record["input_ids"], record["scores"], record["policy_losses"], record["value_losses"], sep="\n")


if __name__ == "__main__":
    main()
