"""DPO through TRL: a Recipe becomes a DPOTrainer, after every row has been checked.

The reference is the model that the run starts from: with LoRA the same weights with the adapter switched off, else a
frozen copy. `ftlab.pipeline.train.train` runs what is built here. A row that does not fit `max_length` is an error
here: TRL would cut it.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.pipeline import data
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import base_model, lora_config, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import DPOTrainer

Row = data.Row
WANTED = {"sft": "{prompt, completion}", "dpo": "{prompt, chosen, rejected}"}


def check_kind(recipe: Recipe, train_rows: list[Row], eval_rows: list[Row]) -> None:
    """Raises ValueError, naming the row, for rows that are not of the method's kind; needs no tokenizer and no TRL."""
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        for i, row in enumerate(rows):
            if fault := _kind_fault(recipe.method, row):
                raise ValueError(f"{name} row {i}: {fault}")


def _kind_fault(method: str, row: Row) -> str:
    sides, thumb = {"chosen", "rejected"} & row.keys(), isinstance(row.get("label"), bool)
    kind = "a pair" if sides else "a thumbs row" if thumb else f"a row with {sorted(row)}"
    wanted = f"got {kind}, but {method} learns from {WANTED[method]}"
    if method == "sft":
        return "" if {"prompt", "completion"} <= row.keys() and not thumb else wanted
    if sides != {"chosen", "rejected"}:
        return wanted
    said = "got strings, wanted lists of messages: TRL templates no string"
    return data.row_fault(row, "preference") or ("" if isinstance(row["prompt"], list) else said)


def _check_lengths(recipe: Recipe, name: str, rows: list[Row], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ValueError, naming the row, if it does not fit max_length, or its two sides become the same tokens."""
    for i, row in enumerate(rows):
        keys = ("chosen", "rejected")
        sides = [data.render({"prompt": row["prompt"], "completion": row[key]}, tokenizer) for key in keys]
        for key, side in zip(keys, sides, strict=True):
            if (length := len(side.input_ids)) > recipe.max_length:
                raise ValueError(
                    f"{name} row {i}: prompt and {key} are {length} tokens ({sum(side.completion_mask)} of them the "
                    f"answer), more than max_length = {recipe.max_length}: its end, or all of it, would be cut off"
                )
        if sides[0].input_ids == sides[1].input_ids:
            raise ValueError(f"{name} row {i}: chosen and rejected become the same tokens: the pair prefers nothing")


def trainer(recipe: Recipe, train_rows: list[Row], eval_rows: list[Row] | None, folder: Path) -> "DPOTrainer":
    """TRL's DPOTrainer for a recipe, its rows checked with the model's tokenizer.

    Left to itself TRL would load the reference of full fine-tuning anew from `config._name_or_path`, with another
    attention kernel, and the loss would not begin at ln 2 exactly.

    Raises ValueError for a row that does not fit.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import EarlyStoppingCallback, set_seed
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()  # of tokenizing
    set_seed(recipe.seed)  # before lora_A is drawn
    model, tokenizer = base_model(recipe)
    eval_rows = eval_rows if recipe.eval_steps and eval_rows else []
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        _check_lengths(recipe, name, rows, tokenizer)
    datasets = [
        Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
        for rows in (train_rows, eval_rows)
    ]
    stops_early = recipe.early_stop_patience > 0
    return DPOTrainer(
        model=model,
        ref_model=None if recipe.r else copy.deepcopy(model).eval().requires_grad_(False),
        processing_class=tokenizer,
        train_dataset=datasets[0],
        eval_dataset=datasets[1] if eval_rows else None,
        peft_config=lora_config(recipe),
        args=DPOConfig(
            **training_arguments(recipe, folder, evaluates=bool(eval_rows)),
            beta=recipe.beta,
            max_length=recipe.max_length,
            train_sampling_strategy="random",
        ),
        callbacks=[EarlyStoppingCallback(recipe.early_stop_patience)] if stops_early else None,
    )
