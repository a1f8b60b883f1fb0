"""TRL as an oracle: a trainer, the batch that it collates itself, and the gradients of its loss.

TRL's losses can only be reached through a trainer. `ask` builds one that is silent, in fp32 and on the CPU; every other
flag is the caller's to name.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def ask(
    trainer_class: type, config_class: type, rows: Sequence[dict], tokenizer: Any, *models: nn.Module, **flags: Any
):
    """(trainer, batch): TRL's trainer on these rows, and its first batch, which holds all of them.

    models: the policy, and the reference where the method has one, in eval mode as the trainer leaves them. Besides
    `flags`, what `quiet` sets is not at TRL's defaults.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        arguments = config_class(**quiet(folder, len(rows)), **flags)
        data = Dataset.from_list([dict(row) for row in rows])
        trainer = trainer_class(*models, args=arguments, train_dataset=data, processing_class=tokenizer)
        return trainer, own_batch(trainer)


def quiet(folder: str | Path, rows: int) -> dict[str, Any]:
    """The arguments of a TRL config that keep its trainer in fp32, on the CPU and silent; rows a batch."""
    settings = {"output_dir": str(folder), "per_device_train_batch_size": rows, "use_cpu": True, "bf16": False}
    return {**settings, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}


def own_batch(trainer: Any) -> dict:
    """The trainer's own first batch, collated by it; the model in eval mode."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    return batch


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss by each parameter that is trained."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values(), retain_graph=True), strict=True))
