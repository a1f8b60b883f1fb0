"""Values other than the default for each field of TRL's four configs, and what becomes of them with
`speed_up`.

A verdict is [word, reason]:

    equal          losses, gradients, logs and weights are those of TRL under the same setting;
                   in bf16, which rounds each code otherwise, the first gradient within a fifth
    refused        by speed_up, with its reason, and then they are TRL's too
    TRL refuses    TRL, transformers or accelerate raise, with speed_up called or not: their message

GRPO's answers are judged apart: where the head is so sharp that sampling is greedy, TRL and
speed_up have to sample and score the same batch. Whether a distribution is the same cannot be seen
there, so a setting of DRAWING has to be refused.
"""

import dataclasses
import re
from typing import Any

import torch
from peft import LoraConfig
from speed_up_runs import (
    KINDS,
    Run,
    add_noise,
    batches_of_trl,
    build,
    dataset,
    difference,
    far_apart,
    rows_of,
    run,
    tiny_llama,
)

from ftlab import cpu

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
COMPILED = {"torch_compile_backend": "eager"}  # without a C++ compiler
# Settings that no number of a short run can judge as equal: they change how answers are drawn.
DRAWING = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
    "use_vllm", "use_transformers_continuous_batching", "use_transformers_paged",
}  # fmt: skip

# Field: its values, each alone or, in a dict, with what it needs. `values` makes all others.
VALUES: dict[str, list[Any]] = {
    "output_dir": [{"output_dir": "OUTPUT/elsewhere"}],
    "num_train_epochs": [{"num_train_epochs": 1.0, "max_steps": -1}],
    "max_steps": [2],
    "lr_scheduler_type": ["constant", "cosine", "reduce_lr_on_plateau"],
    "lr_scheduler_kwargs": [
        {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine_with_restarts"}
    ],
    "optim": ["sgd", "adamw_torch", "adafactor", "galore_adamw"],
    "optim_args": [{"optim_args": "momentum=0.5", "optim": "sgd"}],
    "optim_target_modules": ["all-linear"],
    "max_grad_norm": [0.1, 0.0],
    "label_smoothing_factor": [0.1],  # SFT: below
    "bf16": [True],
    "fp16": [True],
    "bf16_full_eval": [{"bf16_full_eval": True} | EVALUATED],
    "fp16_full_eval": [{"fp16_full_eval": True} | EVALUATED],
    "tf32": [True],
    "gradient_checkpointing_kwargs": [
        {"use_reentrant": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "gradient_checkpointing": True},
    ],
    "torch_compile": [{"torch_compile": True} | COMPILED],
    "torch_compile_backend": ["eager"],
    "torch_compile_mode": [{"torch_compile_mode": "default"} | COMPILED],
    "liger_kernel_config": [{"liger_kernel_config": {"rope": True}}],
    "neftune_noise_alpha": [5.0],
    "torch_empty_cache_steps": [1],
    "logging_strategy": ["epoch", "no"],
    "logging_steps": [2, 0.5],
    "include_num_input_tokens_seen": ["all", "non_padding"],
    "log_level": ["warning"],
    "log_level_replica": ["error"],
    "report_to": ["tensorboard", "all"],
    "run_name": ["mine"],
    "project": ["mine"],
    "trackio_space_id": ["me/mine"],
    "trackio_bucket_id": ["me/mine"],
    "trackio_static_space_id": ["me/mine", False],
    "eval_strategy": ["epoch", {"eval_strategy": "steps", "eval_steps": 1}],
    "eval_steps": [EVALUATED | {"eval_steps": 1}],
    "eval_delay": [EVALUATED | {"eval_delay": 1}],
    "per_device_eval_batch_size": [EVALUATED | {"per_device_eval_batch_size": 4}],
    "prediction_loss_only": [EVALUATED | {"prediction_loss_only": True}],
    "eval_on_start": [EVALUATED | {"eval_on_start": True}],
    "eval_do_concat_batches": [EVALUATED | {"eval_do_concat_batches": False}],
    "eval_use_gather_object": [EVALUATED | {"eval_use_gather_object": True}],
    "eval_accumulation_steps": [EVALUATED | {"eval_accumulation_steps": 1}],
    "include_for_metrics": [["loss"], ["inputs"]],
    "batch_eval_metrics": [EVALUATED | {"batch_eval_metrics": True}],
    "save_strategy": ["steps", "epoch", "best"],
    "save_steps": [{"save_steps": 1, "save_strategy": "steps"}],
    "save_total_limit": [{"save_total_limit": 1, "save_strategy": "steps", "save_steps": 1}],
    "save_only_model": [{"save_only_model": True, "save_strategy": "steps", "save_steps": 2}],
    "load_best_model_at_end": [
        EVALUATED | {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
    ],
    "metric_for_best_model": ["eval_loss"],
    "greater_is_better": [True],
    "hub_token": ["none"],
    "hub_private_repo": [True],
    "hub_model_id": ["me/mine"],
    "hub_strategy": ["end"],
    "hub_revision": ["other"],
    "full_determinism": [True],
    "data_seed": [7],
    "use_cpu": [False],
    "accelerator_config": [{"accelerator_config": {"split_batches": True}}],
    "parallelism_config": ["ParallelismConfig"],
    "dataloader_drop_last": [{"dataloader_drop_last": True, "per_device_eval_batch_size": 2}],
    "dataloader_num_workers": [1],
    "dataloader_persistent_workers": [
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    ],
    "dataloader_prefetch_factor": [{"dataloader_prefetch_factor": 3, "dataloader_num_workers": 1}],
    "dataloader_multiprocessing_context": [
        {"dataloader_multiprocessing_context": "fork", "dataloader_num_workers": 1}
    ],
    "remove_unused_columns": [False, True],
    "label_names": [["labels"], ["others"]],
    "train_sampling_strategy": ["sequential", "group_by_length", "random", "batch_by_length"],
    "length_column_name": ["size"],
    "ddp_backend": ["gloo"],
    "ddp_timeout": [60],
    "ddp_bucket_cap_mb": [10],
    "fsdp": ["full_shard"],
    "fsdp_config": [{"fsdp_config": {"min_num_params": 1}}],
    "deepspeed": [{"deepspeed": {"zero_optimization": {"stage": 2}}}],
    "debug": ["underflow_overflow"],
    "resume_from_checkpoint": ["nowhere"],
    "local_rank": [0],
    "skip_memory_metrics": [False],
    # TRL's
    "model_init_kwargs": [{"model_init_kwargs": {"revision": "main"}}],
    "router_aux_loss_coef": [0.1, 0.0],
    "chat_template_path": ["CHAT_TEMPLATE"],
    "dataset_text_field": ["body"],
    "dataset_kwargs": [
        {"dataset_kwargs": {"add_special_tokens": False}},
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
    ],
    "dataset_num_proc": [1],
    "eos_token": ["</s>", "<|im_end|>"],
    "pad_token": ["<pad>", "<|im_end|>"],
    "max_length": [28, 40, None],
    "truncation_mode": ["keep_end"],
    "packing": [True],
    "packing_strategy": ["wrapped", "bfd_split", {"packing_strategy": "wrapped", "packing": True}],
    "eval_packing": [True, False],
    "pad_to_multiple_of": [16],
    "completion_only_loss": [True, False],
    "loss_type": [],  # of each trainer: below
    "precompute_ref_batch_size": [
        {"precompute_ref_batch_size": 1, "precompute_ref_log_probs": True}
    ],
    "loss_weights": [[0.5], {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}],
    "ld_alpha": [0.5],
    "f_divergence_type": [
        "forward_kl", "js_divergence", "alpha_divergence",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
    ],
    "label_smoothing": [0.1],
    "beta": [0.7],
    "f_alpha_divergence_coef": [
        {"f_alpha_divergence_coef": 0.2, "f_divergence_type": "alpha_divergence"}
    ],
    "discopop_tau": [{"discopop_tau": 0.5, "loss_type": ["discopop"]}],
    "num_generations": [2],
    "num_generations_eval": [2],
    "max_completion_length": [5],
    "generation_batch_size": [16],
    "steps_per_generation": [2],
    "temperature": [0.5],
    "top_p": [0.7],
    "top_k": [3],
    "min_p": [0.2],
    "repetition_penalty": [1.5],
    "generation_kwargs": [
        {"generation_kwargs": {"no_repeat_ngram_size": 1}},
        {"generation_kwargs": {"suppress_tokens": [5]}},
    ],
    "chat_template_kwargs": [{"chat_template_kwargs": {"enable_thinking": False}}],
    "cache_implementation": ["static", "offloaded"],
    "vllm_mode": ["server", {"vllm_mode": "server", "use_vllm": True}],
    "vllm_model_impl": ["transformers"],
    "vllm_structured_outputs_regex": ["a+"],
    "vllm_server_base_url": ["http://localhost:1"],
    "vllm_server_host": ["localhost"],
    "vllm_max_model_length": [64],
    "num_iterations": [20],
    "epsilon": [0.01],
    "delta": [1.05],
    "epsilon_high": [0.3],
    "importance_sampling_level": ["sequence", "sequence_token"],
    "reward_weights": [[0.5]],
    "multi_objective_aggregation": ["normalize_then_sum"],
    "scale_rewards": ["batch", "none"],
    "top_entropy_quantile": [0.4, {"top_entropy_quantile": 0.4, "entropy_coef": 0.3}],
    "entropy_coef": [0.3, -0.3],
    "use_adaptive_entropy": [
        True, {"use_adaptive_entropy": True, "entropy_target": 20.0, "entropy_coef": 0.3}
    ],
    "max_tool_calling_iterations": [2],
    "vllm_importance_sampling_mode": ["token_truncate", "sequence_truncate", "token_mask"],
    "vllm_importance_sampling_clip_min": [0.5],
    "vllm_importance_sampling_cap": [2.0],
    "off_policy_mask_threshold": [0.001],
    "log_completions_hub_repo": ["me/mine"],
    "num_completions_to_print": [1],
    "transformers_continuous_batching_config": [
        {"transformers_continuous_batching_config": {"max_batch_tokens": 64}}
    ],
    "log_completions": [{"log_completions": True, "num_completions_to_print": 0}],
    "mask_truncated_completions": [True],
    "assistant_only_loss": [True],
    "padding_free": [True, {"padding_free": True, "max_length": None}],
    "sync_ref_model": [True, {"sync_ref_model": True, "beta": 0.2}],
    "use_weighting": [True],
    "enable_jit_checkpoint": [False],
}  # fmt: skip
SAPO = {"loss_type": "sapo"}
VESPO = {"loss_type": "vespo"}
OF_KIND: dict[tuple[str, str], list[Any]] = {
    ("SFT", "loss_type"): ["nll", "chunked_nll", "dft"],
    ("SFT", "label_smoothing_factor"): [0.1, {"label_smoothing_factor": 0.1, "loss_type": "nll"}],
    ("DPO", "loss_type"): [
        ["hinge"], ["ipo"], ["nca_pair"], ["bco_pair"], ["sppo_hard"], ["apo_zero"], ["apo_down"],
        ["aot"], ["aot_unpaired"], ["discopop"], ["sft"], ["sigmoid_norm"], ["exo_pair"],
        ["robust"],
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["exo_pair"], "label_smoothing": 0.1}, ["sigmoid", "sft"],
    ],
    ("KTO", "loss_type"): ["apo_zero_unpaired"],
    ("GRPO", "loss_type"): [
        "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo",
        {"loss_type": "cispo", "epsilon_high": 5.0},
    ],
    ("GRPO", "per_device_train_batch_size"): [4],
    ("GRPO", "load_best_model_at_end"): [  # the best of one, as evaluation draws answers
        EVALUATED
        | {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
        | {"max_steps": 2}
    ],
    ("GRPO", "num_train_epochs"): [{"num_train_epochs": 0.005, "max_steps": -1}],
    ("GRPO", "beta"): [0.3],
    ("GRPO", "sapo_temperature_neg"): [SAPO | {"sapo_temperature_neg": 2.0}],
    ("GRPO", "sapo_temperature_pos"): [SAPO | {"sapo_temperature_pos": 2.0}],
    ("GRPO", "vespo_k_pos"): [VESPO | {"vespo_k_pos": 1.0}],
    ("GRPO", "vespo_k_neg"): [VESPO | {"vespo_k_neg": 1.0}],
    ("GRPO", "vespo_lambda_pos"): [VESPO | {"vespo_lambda_pos": 1.0}],
    ("GRPO", "vespo_lambda_neg"): [VESPO | {"vespo_lambda_neg": 1.0}],
    ("GRPO", "use_bias_correction_kl"): [{"use_bias_correction_kl": False, "beta": 0.3}],
    ("GRPO", "max_length"): [40],
}  # fmt: skip


def values(kind: str, field: dataclasses.Field) -> list[dict]:
    """What a config is given for a field, once a value; raises KeyError for a field of a new
    type.
    """
    listed = OF_KIND.get((kind, field.name), VALUES.get(field.name))
    if listed is None:
        listed = [_another(field)]
    return [v if isinstance(v, dict) and field.name in v else {field.name: v} for v in listed]


def _another(field: dataclasses.Field) -> Any:
    """A value that is not the default, by the default's type or the type that is written."""
    default, written = field.default, str(field.type)
    if isinstance(default, bool) or (default is None and "bool" in written):
        return not default
    if isinstance(default, int) and "int" in written:
        return default + 1 if default >= 0 else 1
    if isinstance(default, int | float):
        return 0.5 * default if default else 0.1
    if default is None and "int" in written:
        return 2
    if default is None and "float" in written:
        return 0.5
    raise KeyError(f"{field.name} ({written}) has no value in VALUES: say one that is not {default!r}")


def key(changes: dict) -> str:
    """As a keyword argument, "beta=0.3, loss_type='grpo'"."""
    return ", ".join(f"{name}={value!r}" for name, value in changes.items())


def prepared(kind: str, changes: dict) -> dict:
    """The changes as arguments of `build`."""
    made = dict(changes)
    if changes.get("parallelism_config"):
        from accelerate.parallelism_config import ParallelismConfig

        made["parallelism_config"] = ParallelismConfig(cp_size=2)
    if changes.get("chat_template_path"):
        from ftlab.paths import DATA

        made["chat_template_path"] = str(DATA / "micro" / "model")
    if changes.get("output_dir"):
        from speed_up_runs import _folder

        made["output_dir"] = _folder().name + "/elsewhere"
    if any(name.startswith(("eval_", "load_best", "do_eval")) for name in changes):
        made["more"] = {"eval_dataset": dataset(kind)}
    unprepared = (changes.get("dataset_kwargs") or {}).get("skip_prepare_dataset")
    if kind == "SFT" and not unprepared and any(name in TOKENIZED for name in changes):
        made["rows"] = rows_of("SFT")  # else they are tokenized already
    return made


TOKENIZED = {
    "chat_template_path", "dataset_text_field", "dataset_kwargs", "eos_token", "max_length",
    "truncation_mode", "packing", "eval_packing", "packing_strategy", "completion_only_loss",
    "assistant_only_loss", "dataset_num_proc", "shuffle_dataset", "pad_token", "model_init_kwargs",
}  # fmt: skip


def verdict(kind: str, changes: dict) -> list[str]:
    """["equal" | "refused" | "TRL refuses", reason], by running; raises AssertionError for anything
    else.
    """
    told = key(changes)
    try:
        made = prepared(kind, changes)
        scored = {"scored": batches_of_trl(**made)} if kind == "GRPO" else {}
        wanted = run(kind, **made | scored)
    except Exception as error:  # in the batch that GRPO samples
        scored, wanted = {}, Run(error=error)
    got = run(kind, quick=True, **made | scored)
    if wanted.error is not None:
        raised = type(got.error) is type(wanted.error)
        assert raised or got.warned, f"{kind} {told}: TRL {wanted.error!r}, sped up {got.error!r}"
        return ["TRL refuses", shortened(f"{type(wanted.error).__name__}: {wanted.error}")]
    assert got.error is None, f"{kind} {told}: TRL trains, sped up: {got.error!r}"
    rounded = any(changes.get(name) for name in ("bf16", "bf16_full_eval", "fp16_full_eval"))
    if rounded and not got.warned:
        differs = far_apart(wanted, got)
    else:
        differs = difference(wanted, got, kind, quick=not got.warned)
    assert not differs, f"{kind} {told}: {differs}"
    if got.warned:
        assert not got.result and got.result.reason, f"{kind} {told}: warned, and yet true"
        return ["refused", shortened(got.result.reason)]
    assert got.result, f"{kind} {told}: false without a warning"
    if kind == "GRPO":
        assert not DRAWING & changes.keys(), f"{told} changes how answers are drawn"
        differs = drawn_otherwise(made)
        assert not differs, f"{kind} {told}: {differs}"
    return ["equal", ""]


def shortened(text: str) -> str:
    """Its first 160 characters, without what is another on each machine."""
    text = re.sub(r"/\S*", "PATH", re.sub(r"0x[0-9a-f]+", "ADDRESS", " ".join(text.split())))
    return text[:160]


def drawn_otherwise(made: dict) -> str:
    """What is another in the batch that TRL's GRPOTrainer samples and scores, sped up; "" if
    nothing is.

    The head is sharp, so that whatever random number is drawn the likeliest token is.
    """
    batches = []
    for quick in (False, True):
        sharp = tiny_llama(tie_word_embeddings=False)
        sharp.lm_head.weight.data.mul_(300)
        lora = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")
        trainer = build("GRPO", sharp, lora, scored=[{}], **made)
        add_noise(trainer.model)
        if quick:
            assert cpu.speed_up(trainer)
        torch.manual_seed(2)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.model.train()
        rows = next(iter(trainer.get_train_dataloader()))
        batches.append(trainer._generate_and_score_completions(rows))  # before they are shuffled
    wanted, got = batches
    if wanted.keys() != got.keys():
        return f"batches hold {sorted(wanted.keys() ^ got.keys())} or not"
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            if value.shape != got[name].shape:
                return f"{name} has the shape {tuple(got[name].shape)}, not {tuple(value.shape)}"
            if not torch.allclose(value.float(), got[name].float(), rtol=1e-3, atol=1e-2):
                return f"{name} differs where nothing is left to chance"
    return ""


def fields(kind: str) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(KINDS[kind][1]) if field.init]
