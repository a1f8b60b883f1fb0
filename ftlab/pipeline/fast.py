"""Trainers of old recipes with `fast: true`: TRL's SFTTrainer through `ftlab.cpu.speed_up`, and a DPO trainer.

Both run the layers of ftlab.cpu, whose docstring says what saves time. DPO adds: a pair's prompt is read once, by both
answers; the reference is the same layers without adapters. Loss and gradients are TRL's up to the order of rounding
(tests/parity/test_fast.py).
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftlab.cpu import PACKED, ROUND_TO, FusedLlama, Head, common_prefix, keep_memory, product_dtype, speed_up

if TYPE_CHECKING:
    from trl import DPOTrainer, SFTTrainer

LONG = 512  # plain TRL: beyond, eager attention's T x T weights in every layer cost more than they save


def fast_sft_trainer(**arguments) -> "SFTTrainer":
    """TRL's SFTTrainer, sped up. Raises ValueError for a model that the layers are not for."""
    from trl import SFTTrainer

    check(arguments["model"])
    trainer = SFTTrainer(**arguments)
    speed_up(trainer)
    return trainer


def fast_dpo_trainer(**arguments) -> "DPOTrainer":
    """TRL's DPOTrainer, loss "sigmoid", with packed pairs and fused layers; the reference is the base of the adapters.

    With precompute_ref_log_probs TRL calls compute_ref_log_probs here too, once for each row, before it trains. Raises
    ValueError for a model that the layers are not for.
    """
    from trl import DPOTrainer

    check(arguments["model"])
    keep_memory()
    if arguments["args"].optim == "adamw_torch":
        arguments["args"].optim = "adamw_torch_fused"

    class FastDPOTrainer(DPOTrainer):
        @functools.cached_property  # TRL needs it before its own __init__ is through
        def fused(self) -> FusedLlama:
            return FusedLlama(self.model, product_dtype(self.args.bf16))

        def compute_ref_log_probs(self, model, inputs):
            """Log-probabilities (B,), (B,) of the chosen and the rejected answers, adapters off."""
            with torch.no_grad(), self.model.disable_adapter():
                logps, _, _ = Head.apply(self._hidden(inputs), self.fused.head_weight, inputs["targets"])
                return _answers(inputs, logps).chunk(2)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Mean of -log sigmoid(beta * margin) over the pairs, in nats; logs what TRL logs."""
            hidden, head = self._hidden(inputs), self.fused.head_weight
            logps, entropy, is_argmax = Head.apply(hidden, head, inputs["targets"])
            mean_logit = hidden.detach().float() @ head.mean(0, dtype=torch.float32)
            summed = _answers(inputs, logps)
            if not self.precompute_ref_logps:
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.compute_ref_log_probs(model, inputs)
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            chosen, rejected = (self.beta * (summed - reference)).chunk(2)
            loss = -nn.functional.logsigmoid(chosen - rejected).mean()
            of_chosen = inputs["answer"] < len(chosen)
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, values in {
                "entropy": entropy,
                "logits/chosen": mean_logit[of_chosen],
                "logits/rejected": mean_logit[~of_chosen],
                "mean_token_accuracy": is_argmax[of_chosen],
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (chosen > rejected).float(),
                "rewards/margins": chosen - rejected,
                "logps/chosen": summed[: len(chosen)],
                "logps/rejected": summed[len(chosen) :],
            }.items():
                metrics[name].append(values.mean().item())
            if self.model.training:
                self._total_train_tokens += inputs["lengths"].sum().item()
            metrics["num_tokens"] = [self._total_train_tokens]
            return (loss, {}) if return_outputs else loss

        def _hidden(self, inputs) -> Tensor:
            return self.fused(inputs["logits_to_keep"], **{name: inputs[name] for name in PACKED})

    def _answers(inputs, logps: Tensor) -> Tensor:
        """(K,) -> (2 B,): summed over each answer, chosen ones first."""
        return logps.new_zeros(inputs["lengths"].numel()).index_add(0, inputs["answer"], logps)

    return FastDPOTrainer(data_collator=pack_pairs, **arguments)


def check(model: nn.Module) -> None:
    """Raises ValueError for a model that is no Llama on a CPU, or for several processes; the rest Recipe refuses."""
    from ftlab.pipeline.train import processes

    if (count := processes()[1]) > 1:  # its layers go around DistributedDataParallel, and each would learn for itself
        raise ValueError(f"fast: true is for one process, this is one of {count}: leave `fast` out to train with all")
    kind, device = model.config.model_type, model.device.type
    if kind != "llama" or device != "cpu":
        raise ValueError(
            f"fast: true is for models of type 'llama' on the CPU, this is {kind!r} on {device!r}. Leave `fast` out to "
            f"train with plain TRL; on a GPU, Unsloth is the fast engine."
        )


def pack_pairs(rows: list[dict]) -> dict[str, Tensor]:
    """Pairs of prompt_ids, chosen_ids and rejected_ids as one sequence of N tokens, as in `ftlab.cpu.pack`.

    After the segment that all answers begin with, a pair has three: what its two answers begin with (the prompt, and
    perhaps more), the rest of the chosen one and the rest of the rejected one, which does not see the chosen one's.
    Last tokens, after which nothing is asked, are left out. For the K tokens of all answers, chosen ones first:
    logits_to_keep (K,), the positions before them, targets (K,), their ids, and answer (K,), in [0, 2 B). lengths
    (B, 2), of prompt and answer; and TRL's ref_chosen_logps, ref_rejected_logps (B,) if the rows have them.
    """
    pairs = [[row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")] for row in rows]
    shared = common_prefix([whole[:-1] for pair in pairs for whole in pair])
    ids, positions, cu_seqlens, paths = list(pairs[0][0][:shared]), list(range(shared)), [0, shared], [[0]]
    kept = {"chosen_ids": [], "rejected_ids": []}
    for row, pair in zip(rows, pairs, strict=True):
        common = common_prefix([whole[:-1] for whole in pair])
        prompt = [0, len(paths)]
        ids += pair[0][shared:common]
        positions += range(shared, common)
        cu_seqlens.append(len(ids))
        paths += [prompt, [*prompt, len(paths) + 1], [*prompt, len(paths) + 2]]
        before = [*range(shared), *range(cu_seqlens[-2], cu_seqlens[-1])]
        for side, whole in zip(kept, pair, strict=True):
            ids += whole[common:-1]
            positions += range(common, len(whole) - 1)
            cu_seqlens.append(len(ids))
            kept[side] += [*before, *range(cu_seqlens[-2], cu_seqlens[-1])][len(row["prompt_ids"]) - 1 :]
    answers = [row[side] for side in kept for row in rows]
    padding = -len(ids) % ROUND_TO
    cu_seqlens[-1] += padding
    batch = {
        "lengths": torch.tensor([[len(whole) for whole in pair] for pair in pairs]),
        "cu_seqlens": torch.tensor(cu_seqlens),
        "paths": paths,
        "input_ids": torch.tensor([ids + [0] * padding]),
        "position_ids": torch.tensor([positions + [0] * padding]),
        "logits_to_keep": torch.tensor(kept["chosen_ids"] + kept["rejected_ids"]),
        "targets": torch.tensor([token for answer in answers for token in answer]),
        "answer": torch.tensor([i for i, answer in enumerate(answers) for _ in answer]),
    }
    known = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows[0]]
    return batch | {name: torch.tensor([row[name] for row in rows]) for name in known}
