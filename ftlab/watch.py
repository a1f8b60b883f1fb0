"""Is a sped-up trainer still the one that was looked at? Asked at each step, in under a hundredth
of its time.

Looked at: the type, attributes, hooks, children and tensors of each module; frozen weights (their
version counter, their address and, where ftlab.cpu keeps a copy, one row of each a step, since
`p.data.mul_()` moves no counter); what is trained; merge state and active adapter; the settings;
methods and functions of the libraries.
"""

import importlib
from collections.abc import Iterator
from operator import is_not
from typing import Any

import torch
from torch import nn

from ftlab import allowed
from ftlab.llama import PackedLlama

SWITCHES = (
    "_disable_adapters",
    "_adapters_disabled",
)  # as for the reference; see Watch.adapter_change
CONFIG = ("_attn_implementation", "num_hidden_layers", "attention_dropout")


class Known:
    """One module as it was: its type, the values of its attributes, its children, parameters and
    buffers.
    """

    __slots__ = ("attributes", "children", "kind", "module", "name", "switches", "tensors")

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module, self.kind = name, module, type(module)
        self.attributes = dict(vars(module))
        has_switch = hasattr(module, "disable_adapters") or hasattr(module, "disable_adapter")
        self.switches = SWITCHES if has_switch else ()
        self.children = tuple(module._modules.values())
        self.tensors = (*module._parameters.values(), *module._buffers.values())

    def change(self) -> str:
        """What is no longer as it was, or ""."""
        module, now = self.module, self.module.__dict__
        attributes = self.attributes
        attributes["training"] = now["training"]  # train() and eval() alternate
        for switch in self.switches:
            if switch in now:
                attributes[switch] = now[switch]
            else:
                attributes.pop(switch, None)
        if type(module) is not self.kind:
            return f"{self.name} is a {type(module).__name__} now"
        if now != attributes:  # compares by identity first, so this is quick
            return f"{self.name} has another {' and '.join(self._changed(now))}"
        if now["_forward_hooks"] or now["_forward_pre_hooks"]:
            return f"{self.name} ({self.kind.__name__}) has a forward hook"
        if now["_backward_hooks"] or now["_backward_pre_hooks"]:
            return f"{self.name} ({self.kind.__name__}) has a backward hook"
        children, parameters, buffers = now["_modules"], now["_parameters"], now["_buffers"]
        if len(children) != len(self.children) or any(
            map(is_not, children.values(), self.children)
        ):
            return f"{self.name} has other modules in it ({', '.join(children)})"
        if not self.tensors and not parameters and not buffers:
            return ""
        tensors = (*parameters.values(), *buffers.values())
        if len(tensors) != len(self.tensors) or any(map(is_not, tensors, self.tensors)):
            return f"{self.name} has other parameters or buffers"
        return ""

    def _changed(self, now: dict) -> Iterator[str]:
        for key in now.keys() | self.attributes.keys():
            if key not in now or key not in self.attributes or now[key] is not self.attributes[key]:
                yield key


class Watch:
    """Knows a trainer, its model and its settings; `change()` says what is another by now, "" if
    nothing is.
    """

    def __init__(self, trainer: Any, kind: type, lists: dict, llama: PackedLlama) -> None:
        self.trainer, self.kind, self.lists = trainer, kind, lists
        self.model, self.args, self.trainer_type = trainer.model, trainer.args, type(trainer)
        self.settings = [(name, value) for name, value, _ in allowed.settings(self.args, lists)]
        self.overridden = set(allowed.overridden(trainer, kind))
        self.modules = [Known(name or "the model", m) for name, m in self.model.named_modules()]
        self.lora = allowed.lora_layers(self.model)
        (self.adapter,) = {name for layer in self.lora for name in layer.lora_A}
        self.trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        frozen = [(n, p) for n, p in self.model.named_parameters() if not p.requires_grad]
        frozen += self.model.named_buffers()
        self.frozen = [(name, p, p._version, p.data_ptr()) for name, p in frozen]
        self.copies = list(llama.copies())
        self.names = {id(p): name for name, p in frozen}
        self.functions = list(_functions(self.trainer_type))
        self.base_config = self.model.get_base_model().config
        self.config = [(name, getattr(self.base_config, name)) for name in CONFIG]
        self.attention = self._attention()
        self.steps = 0

    def change(self, may_be_off: bool = False) -> str:
        """The first change found, in words, or "". may_be_off: see `adapter_change`."""
        try:
            return (
                self._trainer_change()
                or self._process_change()
                or self.adapter_change(may_be_off)
                or next(filter(None, (known.change() for known in self.modules)), "")
                or self._weight_change()
            )
        except (RuntimeError, ValueError, AttributeError, KeyError) as error:
            return f"it cannot be compared with what it was: {type(error).__name__}: {error}"

    def _trainer_change(self) -> str:
        trainer = self.trainer
        if trainer.model is not self.model:
            return "trainer.model is another model"
        if trainer.args is not self.args:
            return "trainer.args is another object"
        for name, value in self.settings:
            now = getattr(self.args, name)
            if now is not value and now != value:
                return f"{type(self.args).__name__} says {name}={now!r}, and said {value!r}"
        if type(trainer) is not self.trainer_type:
            return f"the trainer is a {type(trainer).__name__} now"
        if new := set(allowed.overridden(trainer, self.kind)) - self.overridden:
            return f"the trainer's method {min(new)} was replaced"
        return allowed.attribute_reason(trainer, self.lists)

    def _process_change(self) -> str:
        for owner, name, value in self.functions:
            if getattr(owner, name, None) is not value:
                return f"{getattr(owner, '__name__', owner)}.{name} was replaced"
        if any(map(is_not, self._attention(), self.attention)):
            return "the attention function of its config was replaced"
        for name, value in self.config:
            if (now := getattr(self.base_config, name)) != value:
                return f"the model's config says {name}={now!r}, and said {value!r}"
        if torch.nn.modules.module._has_any_global_hook():
            return "a hook for all modules is registered"
        if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
            return "a TorchFunctionMode or TorchDispatchMode is active"
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return "hooks for saved tensors are active (torch.autograd.graph)"
        if torch.get_default_dtype() != torch.float32:
            return f"the default dtype is {torch.get_default_dtype()}"
        return ""

    def _attention(self) -> tuple[Any, ...]:
        return allowed.attention_functions(self.base_config._attn_implementation)

    def adapter_change(self, may_be_off: bool = False) -> str:
        """What is wrong with the adapter; may_be_off: where TRL computes the reference, on all
        layers alike.
        """
        first = self.lora[0].scaling[self.adapter]
        off = self.lora[0].disable_adapters
        if off and not may_be_off:
            return "its adapter is switched off"
        for layer in self.lora:
            if layer.merged_adapters:
                return "its adapter is merged"
            if layer.disable_adapters != off:
                return "its adapter is switched off in some layers"
            if list(layer.active_adapters) != [self.adapter]:
                return f"its active adapter is {layer.active_adapters}, and was {self.adapter!r}"
            if len(layer.scaling) != 1:
                return f"it has {len(layer.scaling)} adapters"
            if layer.scaling[self.adapter] != first:
                return "its LoRA layers have different scalings"
            if layer.lora_variant:
                return "its adapter is no longer plain LoRA"
        return ""

    def _weight_change(self) -> str:
        for name, p, version, address in self.frozen:
            if p._version != version or p.data_ptr() != address:
                return f"the frozen weight {name} was changed"
        for name, p in self.trained:
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                return f"{name} has a hook on its gradient"
        if torch.is_grad_enabled():
            for name, p in self.trained:
                if not p.requires_grad:
                    return f"{name} is frozen, and was trained"
            for name, p, *_ in self.frozen:
                if p.requires_grad:
                    return f"{name} is trained, and was frozen"
        return self._copy_change()

    def _copy_change(self) -> str:
        """Compares one row of each kept copy with the weight, another row at each step."""
        self.steps += 1
        for kept, begin, p in self._copied():
            row = self.steps % len(p)
            if not torch.equal(kept[begin + row], p.detach()[row].to(kept.dtype)):
                return f"the frozen weight {self.names[id(p)]} was changed"
        return ""

    def whole_copy_change(self) -> str:
        """Compares each kept copy with the weight, every number: not for each step."""
        for kept, begin, p in self._copied():
            if not torch.equal(kept[begin : begin + len(p)], p.detach().to(kept.dtype)):
                return f"the frozen weight {self.names[id(p)]} was changed under .data"
        return ""

    def _copied(self) -> Iterator[tuple[torch.Tensor, int, nn.Parameter]]:
        """(kept copy, the row where the parameter begins in it, the parameter)."""
        for kept, parameters in self.copies:
            begin = 0
            for p in parameters:
                yield kept, begin, p
                begin += len(p)


def _functions(trainer_type: type) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, value) of the methods and functions that the model's forward and the loss go
    through.
    """
    for kind in allowed.allowed_modules():
        for name in ("forward", "__call__"):
            yield kind, name, getattr(kind, name)
    for name in (
        "compute_loss",
        "_compute_loss",
        "_get_per_token_logps_and_entropies",
        "training_step",
    ):
        yield trainer_type, name, getattr(trainer_type, name, None)
    for full_name in allowed.LISTS["functions"]:
        module, _, name = full_name.rpartition(".")
        module = importlib.import_module(module)
        yield module, name, getattr(module, name, None)
