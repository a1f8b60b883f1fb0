"""White lists: the models, trainers, settings and adapters that ftlab.cpu was tested for; all else
is refused.

The names stand in allowed.json, so that a new field of a config, a new module type or another
release of TRL is on no list and therefore refused, until somebody has run tests/parity and added
it.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftlab.llama import base_model_of

LISTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
ATTENTION = (
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS",
)


class UnsupportedError(Exception):
    """The reason, in words, why something stands on no list."""


def found(name: str) -> Any:
    """The object of a full name such as "torch.nn.Linear"; None if this installation has none of
    that name.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


@functools.cache
def allowed_modules() -> frozenset[type]:
    """The exact types of all modules that a model may hold."""
    return frozenset(filter(None, map(found, LISTS["modules"])))


def name_of(thing: type) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


# --- The libraries --------------------------------------------------------------------------------


def check_versions() -> None:
    """Raises UnsupportedError for a release of TRL, transformers or PEFT that was not tested."""
    for package, tested in LISTS["versions"].items():
        version = str(getattr(importlib.import_module(package), "__version__", "unknown"))
        if not any(version == known or version.startswith(f"{known}.") for known in tested):
            raise UnsupportedError(
                f"{package} is {version}, and speed_up was tested with {', '.join(tested)}"
            )


def check_process() -> None:
    """Raises UnsupportedError if something in this process sees every module or every operation of
    torch.
    """
    if torch.nn.modules.module._has_any_global_hook():
        raise UnsupportedError("a hook for all modules is registered (torch.nn.modules.module)")
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise UnsupportedError(
            "a TorchFunctionMode or TorchDispatchMode is active, such as a default device"
        )
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise UnsupportedError("hooks for saved tensors are active (torch.autograd.graph)")
    if torch.get_default_dtype() != torch.float32:
        raise UnsupportedError(
            f"the default dtype is {torch.get_default_dtype()}, not torch.float32"
        )
    for kind in allowed_modules():
        for name in ("forward", "__call__"):
            if not is_library_code(getattr(kind, name)):
                raise UnsupportedError(f"{name_of(kind)}.{name} was replaced")
    for name in LISTS["functions"]:
        if not is_library_code(found(name)):
            raise UnsupportedError(f"{name} was replaced")


@functools.cache
def library_folders() -> tuple[str, ...]:
    """Where the code of the libraries is."""
    packages = map(importlib.import_module, ("torch", "transformers", "peft", "trl", "accelerate"))
    return tuple(f"{Path(package.__file__).parent}{os.sep}" for package in packages)


def is_library_code(function: Any) -> bool:
    """Whether a function, and each that it wraps, was written in a library's file or in C.

    functools.wraps copies names and module, but not where the code stands.
    """
    while function is not None:
        function = getattr(function, "__func__", function)
        called = function if hasattr(function, "__code__") else type(function).__call__
        if not inspect.isbuiltin(function):
            code = getattr(called, "__code__", None)
            if code is None or not code.co_filename.startswith(library_folders()):
                return False
        function = getattr(function, "__wrapped__", None)
    return True


# --- The model ------------------------------------------------------------------------------------


def check_architecture(model: nn.Module) -> None:
    """Raises UnsupportedError unless it is a LlamaForCausalLM, and no subclass of it, on a CPU."""
    base = base_model_of(model)
    if name_of(type(base)) not in LISTS["modules"] or not hasattr(base, "lm_head"):
        raise UnsupportedError(
            f"the model is a {type(base).__name__}, and speed_up is for LlamaForCausalLM"
        )
    if model.device.type != "cpu":
        raise UnsupportedError(f"the model is on {model.device.type!r}, not on the CPU")


def check_model(model: nn.Module) -> None:
    """Raises UnsupportedError unless it is a plain Llama, bare or with plain LoRA, without any hook
    or patch.
    """
    base = base_model_of(model)
    check_process()
    _check_config(base)
    for name, module in model.named_modules():
        _check_module(name, module, model)
    _check_places(base)
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            raise UnsupportedError(f"{name} is a {name_of(type(parameter))}, not a plain parameter")
        if any(getattr(parameter, hooks, None) for hooks in TENSOR_HOOKS):
            raise UnsupportedError(f"{name} has a hook on its gradient")


def _check_config(base: nn.Module) -> None:
    config = base.config
    odd = config.hidden_act != "silu" or config.attention_bias or config.mlp_bias
    if odd or config.attention_dropout:
        raise UnsupportedError("its layers have biases, dropout or another activation than SiLU")
    for name in ("final_logit_softcapping", "logit_scale", "output_multiplier"):
        if getattr(config, name, None) is not None:  # TRL reads them from any model's config
            raise UnsupportedError(f"its config says {name}={getattr(config, name)!r}")
    rope = config.rope_parameters.get("rope_type")
    if rope not in LISTS["rope"]:
        raise UnsupportedError(
            f"its rotation is {rope!r}, which may depend on the length; known: {LISTS['rope']}"
        )
    attention = config._attn_implementation
    if attention not in LISTS["attention"]:
        raise UnsupportedError(
            f"its attention is {attention!r}; known: {', '.join(LISTS['attention'])}"
        )
    if not all(map(is_library_code, attention_functions(attention))):
        raise UnsupportedError(f"its attention {attention!r} or the mask of it was replaced")
    if config.num_hidden_layers != len(base.model.layers):
        layers = len(base.model.layers)
        raise UnsupportedError(
            f"its config says {config.num_hidden_layers} layers, and it has {layers}"
        )


def attention_functions(name: str) -> tuple[Any, ...]:
    """The functions that transformers calls for an attention of this name: itself and its mask."""
    return tuple(found(table).get(name) for table in ATTENTION)


def _check_module(name: str, module: nn.Module, model: nn.Module) -> None:
    kind = type(module)
    where = name or "the model itself"
    if kind not in allowed_modules():
        raise UnsupportedError(
            f"{where} is a {name_of(kind)}: its layers are quantized, replaced, or others than the "
            "seven linear ones of each block are trained"
        )
    for hooks in HOOKS:
        if vars(module).get(hooks):
            raise UnsupportedError(f"{where} ({kind.__name__}) has a hook ({hooks})")
    if vars(module).get("_compiled_call_impl") is not None:
        raise UnsupportedError(f"{where} ({kind.__name__}) is compiled")
    for attribute in vars(module):
        if callable(getattr(kind, attribute, None)) and not _is_known_patch(
            module, attribute, model
        ):
            raise UnsupportedError(
                f"the method {attribute} of {where} ({kind.__name__}) was replaced"
            )
    if kind is nn.Linear and module.bias is not None:
        raise UnsupportedError(f"{where} has a bias")
    if kind is nn.Embedding and (module.max_norm or module.scale_grad_by_freq or module.sparse):
        raise UnsupportedError(f"{where} changes its rows or gradients (max_norm, sparse, ...)")
    if kind.__name__ == "LlamaAttention" and module.scaling != module.head_dim**-0.5:
        raise UnsupportedError(f"{where} scales its scores by {module.scaling}")
    if kind.__name__ == "LlamaAttention" and not (
        module.is_causal and not module.attention_dropout
    ):
        raise UnsupportedError(f"{where} isn't causal or has dropout")
    if hasattr(module, "gradient_checkpointing") and module.gradient_checkpointing:
        raise UnsupportedError(
            "gradient checkpointing is on (gradient_checkpointing=False turns it off)"
        )


def _check_places(base: nn.Module) -> None:
    """Raises UnsupportedError unless each module stands where a Llama has one of its type, LoRA at
    the seven linear ones.
    """
    for path, parent in base.named_modules():
        places = LISTS["places"].get(name_of(type(parent)), {})
        for name, child in parent.named_children():
            kinds = places.get(name, places.get("*"))
            if kinds and name_of(type(child)) not in kinds:
                raise UnsupportedError(
                    f"{path}.{name}".strip(".")
                    + f" is a {name_of(type(child))}: some layers are replaced, or others "
                    "than the seven linear ones of each block are trained"
                )


def _is_known_patch(module: nn.Module, attribute: str, model: nn.Module) -> bool:
    """Whether a method on the instance is the one that TRL or accelerate put there."""
    if attribute != "forward" or not is_library_code(vars(module)["forward"]):
        return False
    own = type(module).forward
    original = vars(module).get("_original_forward")
    if module is model and original is not None:  # accelerate's autocast, as it trains in bf16
        return getattr(original, "__func__", original) is own
    function = getattr(vars(module)["forward"], "__func__", None)
    original = inspect.getclosurevars(function).nonlocals.get("original_forward")  # TRL's
    return getattr(original, "__func__", None) is own


def check_dtypes(model: nn.Module, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises UnsupportedError for a parameter of another dtype."""
    for name, parameter in model.named_parameters():
        if parameter.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise UnsupportedError(f"{name} is {parameter.dtype}, and wanted is {wanted}")


# --- The adapter ----------------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> list[nn.Module]:
    """PEFT's LoRA layers in the order of the model."""
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "active_adapters")]


def check_adapter_kind(model: nn.Module) -> None:
    """Raises UnsupportedError unless every adapter of the model, active or not, is plain LoRA."""
    rules = LISTS["lora"]
    for config in getattr(model, "peft_config", {}).values():
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise UnsupportedError(
                f"its adapter is not plain LoRA (another method: {config.peft_type})"
            )
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name in rules["any"]:
                continue
            if field.name not in rules["default"]:
                raise UnsupportedError(
                    f"LoraConfig has a field that speed_up does not know: {field.name}"
                )
            if value != default_of(field) and value:
                raise UnsupportedError(
                    f"its adapter is not plain LoRA: LoraConfig says {field.name}={value!r}"
                )
    for layer in lora_layers(model):
        if getattr(layer, "lora_variant", None) or any(layer.lora_bias.values()):
            raise UnsupportedError(
                "its adapter is not plain LoRA (another method, DoRA, aLoRA, lora_bias, ...)"
            )


def check_adapter(model: nn.Module) -> None:
    """Raises UnsupportedError unless there is one plain adapter: active, switched on, not merged,
    one scaling, trained.
    """
    check_adapter_kind(model)
    layers = lora_layers(model)
    names = {name for layer in layers for name in layer.lora_A}
    if names and not hasattr(model, "get_base_model"):
        raise UnsupportedError("its adapter has no PEFT model around it (peft_config gives one)")
    if len(names) != 1:
        raise UnsupportedError(
            f"the model has {len(names)} LoRA adapters, and speed_up is for one (give peft_config)"
        )
    if any(layer.merged for layer in layers):
        raise UnsupportedError("its adapter is merged")
    if any(layer.disable_adapters for layer in layers):
        raise UnsupportedError("its adapter is switched off (disable_adapter)")
    if any(set(layer.active_adapters) != names for layer in layers):
        raise UnsupportedError(f"its adapter {names} is not the active one")
    if len({scaling for layer in layers for scaling in layer.scaling.values()}) > 1:
        raise UnsupportedError("its LoRA layers have different scalings")
    if any(layer.fan_in_fan_out for layer in layers):
        raise UnsupportedError("a LoRA layer says fan_in_fan_out")
    trained = {
        id(p)
        for layer in layers
        for part in (layer.lora_A, layer.lora_B)
        for p in part.parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (id(parameter) in trained):
            state = "trained" if parameter.requires_grad else "frozen"
            raise UnsupportedError(
                f"speed_up is for a frozen base and a trained adapter, and {name} is {state}"
            )


# --- The trainer ----------------------------------------------------------------------------------


def trainer_kind(trainer: Any) -> tuple[type, dict]:
    """The class of TRL that a trainer is of, and its lists. Raises UnsupportedError for any other
    trainer.
    """
    for name, lists in LISTS["trainers"].items():
        kind = found(f"{lists['module']}.{name}")
        if kind is not None and isinstance(trainer, kind):
            return kind, lists
    name = type(trainer).__name__
    raise UnsupportedError(
        f"it is a {name}, and speed_up is for TRL's SFT, DPO, KTO and GRPO trainers"
    )


def default_of(field: dataclasses.Field) -> Any:
    """A dataclass field's default value; None without one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def settings(args: Any, lists: dict) -> Iterator[tuple[str, Any, str]]:
    """(name, value, what is wrong with it or "") of each field of a config that must have certain
    values.
    """
    rules = [LISTS["arguments"], lists]
    free = {name for rule in rules for name in rule["any"]}
    default = {name for rule in rules for name in rule["default"]}
    listed = {name: values for rule in rules for name, values in rule["values"].items()}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in free:
            continue
        if field.name in listed:
            values = value if isinstance(value, list) else [value]
            good = all(_is_listed(one, listed[field.name]) for one in values)
            yield field.name, value, "" if good else f"{field.name}={value!r}"
        elif field.name in default:
            good = value == default_of(field) or not (value or default_of(field))
            yield field.name, value, "" if good else f"{field.name}={value!r}"
        else:
            yield (
                field.name,
                value,
                f"{field.name}={value!r}, a setting that speed_up does not know",
            )


def _is_listed(value: Any, values: list) -> bool:
    value = getattr(value, "value", value)  # of an Enum
    return any(value == known and type(value) is type(known) for known in values)


def check_settings(args: Any, lists: dict) -> None:
    """Raises UnsupportedError with every field of a trainer's config that stands on no list with
    its value.
    """
    if type(args).__name__ != lists["config"]:
        raise UnsupportedError(
            f"its config is a {type(args).__name__}, not TRL's {lists['config']}"
        )
    if wrong := [text for _, _, text in settings(args, lists) if text]:
        raise UnsupportedError(f"{type(args).__name__} says {', '.join(wrong)}")


def check_trainer(trainer: Any, kind: type, lists: dict) -> None:
    """Raises UnsupportedError for plug-ins, overridden methods and devices that are not on the
    lists.
    """
    args = trainer.args
    if args.device.type != "cpu":
        raise UnsupportedError(f"it trains on {args.device.type!r}, not on the CPU")
    if args.world_size > 1:
        raise UnsupportedError(
            f"this is one of {args.world_size} processes, and speed_up is for one"
        )
    for name in overridden(trainer, kind):
        if name in ("compute_loss", "_compute_loss"):
            raise UnsupportedError(f"it has a loss that is not TRL's ({name})")
        if name not in lists["overrides"]:
            raise UnsupportedError(f"its method {name} is not TRL's")
    if reason := attribute_reason(trainer, lists):
        raise UnsupportedError(reason)
    if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
        raise UnsupportedError("its model calls tools")
    collator = trainer.data_collator
    collator = collator if inspect.isfunction(collator) else type(collator)
    if name_of(collator) not in lists["collators"]:
        raise UnsupportedError(f"its data collator is not TRL's: {name_of(collator)}")
    for callback in trainer.callback_handler.callbacks:
        _check_callback(callback)


def attribute_reason(trainer: Any, lists: dict) -> str:
    """What an attribute of the trainer that enters its loss has that it must not have, or ""."""
    words = {
        "ref_model": "its reference is not the model with its adapter off",
        "compute_loss_func": "it has a loss that is not TRL's (compute_loss_func)",
        "compute_metrics": "compute_metrics needs all logits",
        "preprocess_logits_for_metrics": "preprocess_logits_for_metrics needs all logits",
    }
    for name, wanted in lists["attributes"].items():
        value = getattr(trainer, name, None)
        if name == "compute_loss_func" and isinstance(value, str):  # GRPOTrainer's is a text
            continue
        if type(value) is not type(wanted) or value != wanted:
            text = f"trainer.{name} is {value!r}, and wanted is {wanted!r}"
            return words.get(name, text)
    return ""


def overridden(trainer: Any, kind: type) -> Iterator[str]:
    """Names of TRL's methods that a subclass or the trainer itself replaces."""
    for base in type(trainer).__mro__:
        if base is kind:
            break
        yield from (name for name in vars(base) if hasattr(kind, name) and not _is_special(name))
    for name, value in vars(trainer).items():
        if callable(getattr(kind, name, None)) and not _is_ours(value):
            yield name


def _is_ours(method: Any) -> bool:
    """Whether ftlab.cpu put it there."""
    return type(getattr(method, "__self__", None)).__module__ == "ftlab.cpu"


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _check_callback(callback: Any) -> None:
    """A callback may be anybody's: it does not get the batch, and each step looks at all that it
    can reach.

    But only between the events that are known; an event of another release might come with the
    batch.
    """
    events = {name for name in dir(callback) if name.startswith("on_")}
    if unknown := sorted(events - set(LISTS["callback_events"])):
        raise UnsupportedError(
            f"its callback {type(callback).__name__} listens to {unknown[0]}, an unknown event"
        )


# --- Answers --------------------------------------------------------------------------------------


def check_generation(config: Any) -> None:
    """Raises UnsupportedError if a generation_config asks for more than greedy answers or plain
    draws.
    """
    fresh = type(config)()
    for name, value in vars(config).items():
        asked = not name.startswith("_") and name not in LISTS["generation"]["any"]
        if asked and value != getattr(fresh, name, None):
            raise UnsupportedError(f"generation_config says {name}={value!r}")
