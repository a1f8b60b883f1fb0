"""ORPO with TRL's own plumbing: a `compute_loss` for a subclass of its DPOTrainer.

    class ORPOTrainer(DPOTrainer):
        compute_loss = orpo.compute_loss      # DPOConfig's beta is the paper's lambda

ORPO needs no reference, so the pairs are all that it takes from DPOTrainer. With LoRA there is no second model anyway;
in full fine-tuning `trainer.ref_model = None` before train() drops the copy. TRL's own ORPOTrainer is experimental.
"""

from typing import Any

from torch import Tensor, nn

from ftlab.scratch.logps import masked_mean, mean_logps, per_token_logps
from ftlab.scratch.losses import orpo_loss


def compute_loss(trainer: Any, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                 num_items_in_batch=None) -> Tensor | tuple[Tensor, Any]:  # fmt: skip
    """orpo_loss, mean over the pairs, in nats, of a batch of DPOTrainer: B chosen rows, then B rejected ones, (2B, T).

    As in TRL, the NLL is that of prompt and completion, over all tokens of the chosen rows; in the paper, Eq. 6, it is
    that of the completion. Loss and gradients equal trl.experimental.orpo's: tests/parity/test_orpo.py.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    outputs = model(input_ids=ids, attention_mask=mask)
    logps = per_token_logps(outputs.logits, ids)  # (2B, T-1)
    chosen, rejected = mean_logps(logps, inputs["completion_mask"]).chunk(2)  # (B,) each
    nll = -masked_mean(logps[: len(chosen)], mask[: len(chosen), 1:])
    loss = orpo_loss(nll.expand_as(chosen), chosen, rejected, trainer.beta).mean()
    return (loss, outputs) if return_outputs else loss
