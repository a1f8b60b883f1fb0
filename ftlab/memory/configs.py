"""The same estimate from the configuration objects of a training cell."""

from dataclasses import fields
from typing import Any

from ftlab.memory.predict import Memory, estimate
from ftlab.memory.settings import Settings

METHODS = {"SFTConfig": "sft", "DPOConfig": "dpo", "KTOConfig": "kto", "ORPOConfig": "orpo"}
READ = {field.name for field in fields(Settings)} - {"loss_type", "fsdp"}
# Fields that change the memory in a way that is not counted: they must be off, or have the value that stands here.
OFF = (
    "packing padding_free activation_offloading precompute_ref_log_probs sync_ref_model deepspeed torch_compile"
    " auto_find_batch_size neftune_noise_alpha label_smoothing_factor optim_args optim_target_modules use_dora"
    " lora_bias modules_to_save target_parameters trainable_token_indices layers_to_transform rank_pattern"
    " layer_replication exclude_modules llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload"
    " llm_int8_has_fp16_weight"
)
FIXED = {"peft_type": "LORA", "bias": "none", "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}


def of(architecture: Any, args: Any, peft_config: Any = None, quantization_config: Any = None, **more: Any) -> Memory:
    """The estimate for the objects of a training cell: SFTConfig (DPOConfig, ...), LoraConfig, BitsAndBytesConfig.

    more: settings of `estimate` that stand in none of them, or replace what does: dtype, attn_implementation, padded,
    gpus. args.model_init_kwargs are read. Evaluation and generation are not counted.

    Raises ValueError for a field that changes the memory and is not counted, and what `estimate` raises.
    """
    method = next((METHODS[kind.__name__] for kind in type(args).__mro__ if kind.__name__ in METHODS), None)
    if method is None:
        raise ValueError(f"args: got {type(args).__name__}, wanted one of {', '.join(METHODS)}")
    settings = {"method": method}
    for name, config in ("args", args), ("peft_config", peft_config), ("quantization_config", quantization_config):
        in_8_bit = getattr(config, "load_in_8bit", False)
        for field, value in (dict.fromkeys(OFF.split(), False) | FIXED).items():
            got = _plain(getattr(config, field, value))
            if (got or False) != value and not (in_8_bit and field.startswith("bnb_4bit")):
                raise ValueError(f"{field} of {name}: got {got!r}, wanted {value!r}: another one is not counted")
        settings |= {field: _plain(getattr(config, field)) for field in READ if hasattr(config, field)}
    start = dict(args.model_init_kwargs or {})
    settings |= {key: _plain(start[key]) for key in ("dtype", "attn_implementation") if key in start}
    if args.fsdp:
        settings["fsdp"] = True
        if args.fsdp_config.get("cpu_offload") or not args.fsdp_config.get("reshard_after_forward", True):
            raise ValueError("fsdp_config: got cpu_offload or no reshard_after_forward: that is not counted")
    if method == "sft":
        settings["loss_type"] = None if args.use_liger_kernel else args.loss_type
    elif getattr(args, "disable_dropout", True):
        settings.pop("lora_dropout", None)
    if peft_config is not None and peft_config.target_modules is None:
        settings["target_modules"] = ("q_proj", "v_proj")  # PEFT's own choice for these models
    return estimate(architecture, **settings | more)


def _plain(value: Any) -> Any:
    """torch.bfloat16 -> "bfloat16", an enum -> its value."""
    text = str(value)
    return text.removeprefix("torch.") if text.startswith("torch.") else getattr(value, "value", value)
