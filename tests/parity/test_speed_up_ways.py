"""Ways to change a model, an adapter, a trainer or a batch before, under and after `speed_up`, each
run twice.

Once by TRL alone and once with `speed_up` called. Loss, gradients, logs, weights and random state
must be equal, or `speed_up` must have refused or stepped aside, with a reason that names the thing,
and then they must be equal too; or it raised SpeedUpError. Nothing may go wrong in silence. A way
also has to bite: TRL's own run must be another than without it, else nothing would be tested;
`bites=False` stands at those that change no number.

The table is filled by the decorator `way`: at which moments (see speed_up_runs.MOMENTS), for which
trainers, and words of which one has to stand in the reason.
"""

import contextlib
import copy
import functools
import importlib.metadata
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import peft
import pytest
import torch
import transformers
import trl
from datasets import disable_progress_bars
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from speed_up_runs import (
    KINDS,
    add_noise,
    build,
    difference,
    far_apart,
    nothing,
    rows_of,
    run,
    tiny_llama,
    tokenizer,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.trainer_pt_utils import LabelSmoother
from trl import SFTTrainer

from ftlab import answers, cpu
from ftlab.callbacks import LiveCurve

pytestmark = pytest.mark.usefixtures("one_thread")
disable_progress_bars()
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Way:
    """A change, the moment, the kind of trainer, the words that its reason may have, and whether
    TRL's numbers change.
    """

    change: Callable
    moment: str
    kind: str
    words: tuple[str, ...]
    bites: bool

    def __str__(self) -> str:
        return f"{self.change.__name__}, {self.moment}, {self.kind}"


WAYS: list[Way] = []
WHOLE = ("first step", "trained")  # runs of three steps and an evaluation; others take two steps


def way(moments: str, words: str, kinds: str = "SFT", bites: bool = True, name: str = ""):
    """Puts the function into WAYS. moments: "built, sped up"; words: "hook, forward"."""

    def add(change: Callable) -> Callable:
        for kind in kinds.split():
            for moment in moments.split(", "):
                WAYS.append(Way(change, moment, kind, tuple(words.split(", ")), bites))
        return change

    return add


# --- Where things are -----------------------------------------------------------------------------


def base(trainer) -> LlamaForCausalLM:
    return trainer.model.get_base_model()


def block(trainer) -> LlamaDecoderLayer:
    return base(trainer).model.layers[0]


def adapted(trainer) -> list[LoraLinear]:
    return [module for module in trainer.model.modules() if isinstance(module, LoraLinear)]


def swapped(undo: ExitStack, owner, name: str, value) -> None:
    """Another attribute until the run has ended."""
    undo.enter_context(mock.patch.object(owner, name, value))


def grown(output):
    """1.5 times a module's output, whatever its shape."""
    if isinstance(output, tuple):
        return (grown(output[0]), *output[1:])
    if isinstance(output, torch.Tensor):
        return 1.5 * output
    if getattr(output, "loss", None) is not None:
        output.loss = 1.5 * output.loss
    elif getattr(output, "last_hidden_state", None) is not None:
        output.last_hidden_state = 1.5 * output.last_hidden_state
    return output


def grows(function: Callable) -> Callable:
    """The function, its result times 1.5."""

    @functools.wraps(function)
    def wrapped(*arguments, **named):
        return grown(function(*arguments, **named))

    return wrapped


# --- Hooks ----------------------------------------------------------------------------------------

HOOKED = {  # one module of each kind
    "the PEFT model": lambda t: t.model,
    "the Llama": base,
    "the trunk": lambda t: base(t).model,
    "a block": block,
    "an attention": lambda t: block(t).self_attn,
    "an MLP": lambda t: block(t).mlp,
    "an activation": lambda t: block(t).mlp.act_fn,
    "a norm": lambda t: block(t).input_layernorm,
    "the last norm": lambda t: base(t).model.norm,
    "the rotation": lambda t: base(t).model.rotary_emb,
    "the embedding": lambda t: base(t).model.embed_tokens,
    "a LoRA layer": lambda t: block(t).mlp.down_proj,
    "its base layer": lambda t: block(t).mlp.down_proj.base_layer,
    "its lora_A": lambda t: block(t).mlp.down_proj.lora_A["default"],
    "its dropout": lambda t: block(t).mlp.down_proj.lora_dropout["default"],
}


def _hook_on(which: str) -> Callable:
    def forward_hook(trainer, undo):
        HOOKED[which](trainer).register_forward_hook(lambda module, inputs, output: grown(output))

    forward_hook.__name__ = f"forward_hook on {which}"
    return forward_hook


for which in HOOKED:
    way("built", "hook")(_hook_on(which))
for which in ("the PEFT model", "an MLP", "the rotation", "its lora_A"):
    way("sped up, first step, trained", "hook")(_hook_on(which))
for kind in ("DPO", "KTO", "GRPO"):
    way("built, first step", "hook", kind)(_hook_on("an MLP"))


@way("built, first step", "hook")
def forward_pre_hook(trainer, undo):
    block(trainer).mlp.register_forward_pre_hook(lambda module, inputs: grown(inputs))


@way("built", "hook")
def forward_pre_hook_with_keywords(trainer, undo):
    def fewer(module, inputs, named):
        return inputs, named | {"hidden_states": 0.5 * named["hidden_states"]}

    block(trainer).self_attn.register_forward_pre_hook(fewer, with_kwargs=True)


@way("built, first step", "hook")
def full_backward_hook(trainer, undo):
    block(trainer).mlp.register_full_backward_hook(lambda module, to_input, to_output: grown(to_input))


@way("built", "hook")
def full_backward_pre_hook(trainer, undo):
    block(trainer).mlp.register_full_backward_pre_hook(lambda module, to_output: grown(to_output))


@way("built, sped up, first step", "hook")
def global_forward_hook(trainer, undo):
    def mlps(module, inputs, output):
        return grown(output) if isinstance(module, LlamaMLP) else None

    undo.callback(torch.nn.modules.module.register_module_forward_hook(mlps).remove)


@way("built, first step", "hook")
def global_forward_pre_hook(trainer, undo):
    def mlps(module, inputs):
        return grown(inputs) if isinstance(module, LlamaMLP) else None

    undo.callback(torch.nn.modules.module.register_module_forward_pre_hook(mlps).remove)


@way("built, first step", "hook")
def global_backward_hook(trainer, undo):
    def mlps(module, to_input, to_output):
        return grown(to_input) if isinstance(module, LlamaMLP) else None

    undo.callback(torch.nn.modules.module.register_module_full_backward_hook(mlps).remove)


@way("built, first step", "hook")
def hook_on_the_gradient_of_lora_a(trainer, undo):
    adapted(trainer)[0].lora_A["default"].weight.register_hook(lambda gradient: 2 * gradient)


@way("built, first step", "hook, trained")
def hook_on_the_gradient_of_the_embedding_that_is_trained(trainer, undo):
    base(trainer).model.embed_tokens.weight.requires_grad_(True)
    base(trainer).model.embed_tokens.weight.register_hook(lambda gradient: 2 * gradient)


@way("built, sped up", "hook")
def optimizer_step_in_the_backward_pass(trainer, undo):
    """A hook after accumulation that takes a step: taking a gradient twice would be two steps."""

    def step(weight):
        weight.data.sub_(weight.grad, alpha=0.1)

    for layer in adapted(trainer):
        layer.lora_B["default"].weight.register_post_accumulate_grad_hook(step)


@way("built, sped up", "hook, saved")
def hooks_on_saved_tensors(trainer, undo):
    """What is saved for the backward pass comes back 1.1 times as large."""
    undo.enter_context(
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: 1.1 * x if x.is_floating_point() else x)
    )


# --- Code that is replaced ------------------------------------------------------------------------

CLASSES = {
    "LlamaMLP": LlamaMLP, "LlamaAttention": LlamaAttention, "LlamaDecoderLayer": LlamaDecoderLayer,
    "LlamaRMSNorm": LlamaRMSNorm, "LlamaRotaryEmbedding": LlamaRotaryEmbedding,
    "LlamaModel": LlamaModel, "LoraLinear": LoraLinear, "nn.Linear": nn.Linear,
}  # fmt: skip


def _class_patched(name: str) -> Callable:
    def forward_of_class_replaced(trainer, undo):
        swapped(undo, CLASSES[name], "forward", grows(CLASSES[name].forward))

    forward_of_class_replaced.__name__ = f"forward of {name} replaced on the class"
    return forward_of_class_replaced


for name in CLASSES:
    words = "forward, patched, replaced, " + name
    way("built" if name != "LlamaMLP" else "built, sped up, first step, trained", words)(_class_patched(name))
way("built", "forward, LlamaMLP", "DPO GRPO")(_class_patched("LlamaMLP"))


@way("built, first step", "call, patched, replaced, LlamaMLP")
def call_of_a_class_replaced(trainer, undo):
    """nn.Module's __call__, in a class that has none of its own."""
    LlamaMLP.__call__ = grows(nn.Module.__call__)
    undo.callback(lambda: delattr(LlamaMLP, "__call__"))


@way("built, first step", "rotary, apply_rotary_pos_emb, patched, replaced, modeling_llama")
def rotation_function_of_the_module_replaced(trainer, undo):
    def turned(q, k, cos, sin, *others, **named):
        return q * cos.unsqueeze(1), k

    swapped(undo, modeling_llama, "apply_rotary_pos_emb", turned)


@way("built, sped up", "sdpa, attention, scaled_dot_product")
def attention_function_of_torch_replaced(trainer, undo):
    functional = torch.nn.functional
    swapped(
        undo,
        functional,
        "scaled_dot_product_attention",
        grows(functional.scaled_dot_product_attention),
    )


@way("built, first step", "attention, sdpa")
def attention_function_under_the_same_name(trainer, undo):
    old = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = grows(old)
    undo.callback(lambda: ALL_ATTENTION_FUNCTIONS.__setitem__("sdpa", old))


@way("built, first step", "mask, sdpa, attention")
def mask_function_under_the_same_name(trainer, undo):
    """One that lets every token see all others."""
    old = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def sees_all(*arguments, **named):
        mask = old(*arguments, **named | {"allow_is_causal_skip": False})
        return torch.ones_like(mask)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = sees_all
    undo.callback(lambda: ALL_MASK_ATTENTION_FUNCTIONS.__setitem__("sdpa", old))


@way("arguments, built, sped up, first step", "attention, mine, attn")
def attention_function_of_ones_own(*where):
    undo = where[-1]
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        undo.callback(functions._global_mapping.pop, "mine")
    ALL_ATTENTION_FUNCTIONS.register("mine", grows(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    ALL_MASK_ATTENTION_FUNCTIONS.register("mine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_llama() if len(where) == 1 else base(where[0])
    model.set_attn_implementation("mine")
    return {"model": model} if len(where) == 1 else None


@way("built, first step", "attention, eager, attn", bites=False)
def eager_attention(trainer, undo):
    base(trainer).set_attn_implementation("eager")


@way("built", "attention, flex, attn", bites=False)
def attention_of_one_layer_is_not_causal_by_name_only(trainer, undo):
    """With a padding mask sdpa does not read it, so nothing changes; speed_up may not read it
    either.
    """
    block(trainer).self_attn.is_causal = False


@way("built, first step", "function, silu, mode")
def function_mode(trainer, undo):
    class Louder(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **named or {})
            return 1.5 * result if function is torch.nn.functional.linear else result

    undo.enter_context(Louder())


@way("built, sped up", "dispatch, mode")
def dispatch_mode(trainer, undo):
    class Louder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **named or {})
            return 1.5 * result if function is torch.ops.aten.rsqrt.default else result

    undo.enter_context(Louder())


METHODS = {
    "the PEFT model": lambda t: t.model,
    "the Llama": base,
    "the trunk": lambda t: base(t).model,
    "an attention": lambda t: block(t).self_attn,
    "an MLP": lambda t: block(t).mlp,
    "a norm": lambda t: block(t).post_attention_layernorm,
    "the rotation": lambda t: base(t).model.rotary_emb,
    "a LoRA layer": lambda t: block(t).mlp.up_proj,
    "its lora_B": lambda t: block(t).mlp.up_proj.lora_B["default"],
}


def _method_patched(which: str) -> Callable:
    def method_patched(trainer, undo):
        module = METHODS[which](trainer)
        module.forward = grows(module.forward)

    method_patched.__name__ = f"forward of {which} patched on the instance"
    return method_patched


for which in METHODS:
    way("built", "forward, patched, instance, method")(_method_patched(which))
for which in ("the PEFT model", "the Llama", "an MLP", "its lora_B"):
    moments = "sped up, first step" + (", trained" if which != "its lora_B" else "")
    way(moments, "forward, patched, instance, method")(_method_patched(which))
way("first step", "forward, patched, instance, method", "DPO KTO GRPO")(_method_patched("an attention"))


@way("arguments", "forward, patched, instance, method")
def forward_wrapped_before_the_trainer_is_made(undo):
    model = tiny_llama()
    model.model.forward = grows(model.model.forward)
    return {"model": model}


@way("built, first step", "compiled, patched, instance, _compiled_call_impl")
def compiled_call_of_an_instance(trainer, undo):
    """What module.compile() sets: nn.Module.__call__ prefers it to forward."""
    mlp = block(trainer).mlp
    mlp._compiled_call_impl = grows(mlp.forward)


class LouderMLP(LlamaMLP):
    def forward(self, x):
        return 1.5 * super().forward(x)


@way("built, sped up, first step", "LouderMLP")
def class_of_an_instance_changed(trainer, undo):
    block(trainer).mlp.__class__ = LouderMLP


@way("arguments", "LouderMLP")
def subclass_of_a_block(undo):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.__class__ = LouderMLP
    return {"model": model}


@way("arguments", "QuietLlama")
def subclass_of_the_model(undo):
    class QuietLlama(LlamaForCausalLM):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output.loss = None if output.loss is None else 0.5 * output.loss
            return output

    return {"model": tiny_llama(QuietLlama), "loss_type": "nll"}


class Around(nn.Module):
    """A wrapper with the attributes of what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **named):
        return grown(self.inner(*arguments, **named))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@way("built, first step", "Around, modules")
def wrapper_around_an_mlp(trainer, undo):
    block(trainer).mlp = Around(block(trainer).mlp)


@way("built, first step", "Around, modules")
def wrapper_around_a_lora_layer(trainer, undo):
    block(trainer).mlp.up_proj = Around(block(trainer).mlp.up_proj)


@way("built, first step", "act, GELU, activation, silu")
def another_activation_in_one_block(trainer, undo):
    block(trainer).mlp.act_fn = nn.GELU()


@way("built, first step", "Dropout, act, module")
def dropout_after_the_activation(trainer, undo):
    block(trainer).mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))


# --- Attributes of modules ------------------------------------------------------------------------


@way("built, first step", "scaling, attention, scales")
def scaling_of_one_attention(trainer, undo):
    base(trainer).model.layers[1].self_attn.scaling *= 2


@way("built, first step", "eps, norm")
def epsilon_of_one_norm(trainer, undo):
    base(trainer).model.layers[1].post_attention_layernorm.variance_epsilon = 1.0


@way("built, first step", "dropout, attention")
def attention_dropout_of_one_layer(trainer, undo):
    block(trainer).self_attn.attention_dropout = 0.5


@way("arguments", "dropout, attention")
def attention_dropout_in_the_config(undo):
    return {"model": tiny_llama(attention_dropout=0.5)}


@way("built, first step", "rot, inv_freq, buffer")
def frequencies_of_the_rotation(trainer, undo):
    base(trainer).model.rotary_emb.inv_freq.mul_(0.5)


@way("built, first step", "rot, scaling")
def scaling_of_the_rotation(trainer, undo):
    base(trainer).model.rotary_emb.attention_scaling = 0.5


@way("built, first step", "rot, rope, dynamic, yarn", bites=False)
def rope_parameters_of_the_config_changed(trainer, undo):
    base(trainer).config.rope_parameters = {"rope_type": "default", "rope_theta": 10.0}


@way("arguments", "rot, rope, dynamic", bites=False)
def dynamic_rotation(undo):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    return {"model": tiny_llama(rope_parameters=rope, max_position_embeddings=8)}


@way("arguments", "rot, rope, llama3, yarn", bites=True)
def rotation_of_llama_3(undo):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8, "rope_theta": 100.0}
    return {"model": tiny_llama(rope_parameters=rope, max_position_embeddings=64)}


@way("built, first step", "layers, num_hidden_layers, config")
def fewer_layers_by_the_config(trainer, undo):
    """The trunk reads config.num_hidden_layers in each call."""
    base(trainer).config.num_hidden_layers = 1


@way("built, first step", "layer, modules")
def layers_in_another_order(trainer, undo):
    trunk = base(trainer).model
    trunk.layers = nn.ModuleList([trunk.layers[1], trunk.layers[0]])


@way("built, first step", "layer, modules")
def one_layer_used_twice(trainer, undo):
    layers = base(trainer).model.layers
    layers[1].mlp = layers[0].mlp


@way("arguments", "softcap, config")
def soft_cap_in_the_config(undo):
    """TRL's chunked loss reads it from any config."""
    model = tiny_llama()
    model.config.final_logit_softcapping = 2.0
    return {"model": model}


@way("arguments", "scale, config")
def logit_scale_in_the_config(undo):
    model = tiny_llama()
    model.config.logit_scale = 0.25
    return {"model": model}


@way("built, first step", "embed, max_norm")
def longest_row_of_the_embedding(trainer, undo):
    """nn.Embedding shortens the rows that it looks up, in place."""
    base(trainer).model.embed_tokens.max_norm = 0.5


@way("built, first step", "bias, lm_head, head")
def bias_of_the_head(trainer, undo):
    base(trainer).lm_head.bias = nn.Parameter(torch.randn(2048, generator=torch.manual_seed(4)), False)


@way("built, first step", "bias, parameters")
def bias_of_a_projection(trainer, undo):
    layer = block(trainer).mlp.up_proj.base_layer
    layer.bias = nn.Parameter(torch.ones(layer.out_features), requires_grad=False)


@way("arguments", "bias")
def biases_of_the_config(undo):
    torch.manual_seed(5)
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    for name, weight in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(weight.data, std=0.5)
    return {"model": model}


@way("built, first step", "parametriz")
def parametrization_of_a_base_weight(trainer, undo):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(block(trainer).mlp.up_proj.base_layer, "weight", Double())


@way("built, first step", "parametriz")
def parametrization_of_lora_a(trainer, undo):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    matrix = block(trainer).mlp.up_proj.lora_A["default"]
    parametrize.register_parametrization(matrix, "weight", Double())


@way("built", "parametriz")
def weight_norm_of_lora_b(trainer, undo):
    parametrizations.weight_norm(block(trainer).mlp.up_proj.lora_B["default"])


@way("built", "hook, prun", bites=True)
def pruned_base_weight(trainer, undo):
    prune.l1_unstructured(block(trainer).mlp.up_proj.base_layer, "weight", amount=0.5)


class LoudTensor(torch.Tensor):
    """Its products with linear are twice as large."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        result = super().__torch_function__(function, types, arguments, named or {})
        plain = result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
        return 2 * plain if function is torch.nn.functional.linear else plain


@way("built, first step", "LoudTensor, tensor, parameter")
def weight_that_is_a_subclass_of_tensor(trainer, undo):
    layer = block(trainer).mlp.up_proj.base_layer
    layer._parameters["weight"] = layer.weight.detach().as_subclass(LoudTensor)


# --- Weights --------------------------------------------------------------------------------------


@way("sped up, first step, trained", "weight, frozen, changed")
def frozen_weight_multiplied_under_data(trainer, undo):
    """Without a trace in its version counter."""
    base(trainer).model.layers[1].mlp.gate_proj.base_layer.weight.data.mul_(1.5)


@way("sped up, first step", "weight, frozen, changed")
def one_number_of_a_frozen_weight(trainer, undo):
    base(trainer).model.layers[1].self_attn.v_proj.base_layer.weight.data[5, 7] += 5


@way("sped up, first step, trained", "weight, frozen, changed")
def one_number_of_the_head_and_the_embedding(trainer, undo):
    base(trainer).lm_head.weight.data[tokenizer().eos_token_id, 3] += 5


@way("sped up, first step", "weight, frozen, changed", "DPO GRPO")
def frozen_weight_multiplied_under_data_in_place(trainer, undo):
    base(trainer).model.layers[0].self_attn.o_proj.base_layer.weight.data.mul_(1.5)


@way("sped up, first step", "weight, frozen, changed")
def frozen_weight_with_other_data(trainer, undo):
    weight = block(trainer).mlp.down_proj.base_layer.weight
    weight.data = 1.5 * weight.data


@way("sped up, first step", "weight, frozen, changed, parameter")
def frozen_weight_replaced(trainer, undo):
    layer = block(trainer).self_attn.k_proj.base_layer
    layer.weight = nn.Parameter(1.5 * layer.weight.data, requires_grad=False)


@way("sped up, first step", "weight, norm, frozen, changed, parameter")
def weight_of_a_norm_replaced(trainer, undo):
    norm = base(trainer).model.norm
    norm.weight = nn.Parameter(1.5 * norm.weight.data, requires_grad=False)


@way("sped up, first step", "weight, norm, frozen, changed")
def weight_of_a_norm_multiplied(trainer, undo):
    block(trainer).input_layernorm.weight.data.mul_(1.5)


@way("sped up, first step", "weight, tied, head, parameter, changed")
def head_untied_later(trainer, undo):
    head = base(trainer).lm_head
    head.weight = nn.Parameter(1.5 * head.weight.data, requires_grad=False)


@way("arguments", "tied, head")
def head_of_its_own(undo):
    return {"model": tiny_llama(tie_word_embeddings=False)}


@way("sped up, first step", "lora_A, parameter, adapter, weight")
def lora_a_replaced(trainer, undo):
    layer = adapted(trainer)[2]
    layer.lora_A["default"].weight = nn.Parameter(-layer.lora_A["default"].weight.data)


@way("sped up, first step, trained", "lora_B, adapter", bites=True)
def lora_b_multiplied(trainer, undo):
    adapted(trainer)[2].lora_B["default"].weight.data.mul_(-2)


@way("built, first step", "lora_A, shared, tied, parameter, module")
def lora_a_shared_by_two_layers(trainer, undo):
    q, k = block(trainer).self_attn.q_proj, block(trainer).self_attn.k_proj
    k.lora_A["default"].weight = q.lora_A["default"].weight


@way("built, sped up, first step", "norm, requires_grad, frozen, trained")
def norm_unfrozen(trainer, undo):
    base(trainer).model.norm.weight.requires_grad_(True)


@way("built, first step", "requires_grad, frozen, trained")
def base_weight_unfrozen(trainer, undo):
    block(trainer).mlp.up_proj.base_layer.weight.requires_grad_(True)


@way("built, sped up", "requires_grad, frozen, trained", "DPO GRPO")
def embedding_unfrozen(trainer, undo):
    base(trainer).model.embed_tokens.weight.requires_grad_(True)


@way("built, first step", "requires_grad, frozen, trained, lora")
def lora_a_frozen(trainer, undo):
    for layer in adapted(trainer):
        layer.lora_A["default"].weight.requires_grad_(False)


@way("built, first step", "bfloat16, dtype, buffers, changed", bites=True)
def base_in_bf16(trainer, undo):
    base(trainer).model.to(torch.bfloat16)


@way("built, sped up", "float64, double, dtype", bites=False)
def all_in_double(trainer, undo):
    trainer.model.double()


@way("built, first step", "float16, half, dtype, changed")
def base_in_half(trainer, undo):
    block(trainer).mlp.half()


@way("arguments", "bfloat16, dtype")
def loaded_in_bf16(undo):
    return {"model": tiny_llama().to(torch.bfloat16)}


@way("built, sped up, trained", "embed, vocab, weight, head, parameter", bites=False)
def more_tokens(trainer, undo):
    torch.manual_seed(6)
    base(trainer).resize_token_embeddings(2056, mean_resizing=False)


# --- The adapter ----------------------------------------------------------------------------------


@way("sped up, first step, trained", "merge", bites=False)
def adapter_merged(trainer, undo):
    trainer.model.merge_adapter()


@way("built", "merge", bites=True)
def adapter_merged_before(trainer, undo):
    trainer.model.merge_adapter()


@way("sped up, first step, trained", "merge, weight", bites=False)
def adapter_merged_and_unmerged(trainer, undo):
    trainer.model.merge_adapter()
    trainer.model.unmerge_adapter()


@way("sped up, first step, trained", "merge", "DPO KTO GRPO", bites=False)
def adapter_merged_under_another_trainer(trainer, undo):
    trainer.model.merge_adapter()


@way("sped up, first step", "merge, weight", bites=True)
def one_layer_merged(trainer, undo):
    block(trainer).mlp.down_proj.merge()


@way("built, sped up, first step", "adapter, disabled, frozen")
def adapter_disabled(trainer, undo):
    trainer.model.base_model.disable_adapter_layers()


@way("built, sped up, trained", "disabled, adapter")
def adapter_disabled_in_a_context(trainer, undo):
    undo.enter_context(trainer.model.disable_adapter())


@way("built, first step", "disabled, adapter, frozen")
def one_layer_disabled(trainer, undo):
    block(trainer).mlp.up_proj.enable_adapters(False)


@way("built, first step", "scaling")
def scale_of_one_layer(trainer, undo):
    block(trainer).mlp.up_proj.set_scale("default", 3.0)


@way("sped up, first step, trained", "scaling")
def scale_of_all_layers(trainer, undo):
    for layer in adapted(trainer):
        layer.scale_layer(0.5)


@way("built, first step", "adapter, second", bites=False)
def second_adapter(trainer, undo):
    trainer.model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))


@way("built, sped up, first step, trained", "adapter, second, active")
def second_adapter_set(trainer, undo):
    trainer.model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    add_noise(trainer.model)
    trainer.model.set_adapter("second")
    trainer.model.base_model.set_requires_grad("default")


@way("built, sped up", "adapter, second, active")
def both_adapters_active(trainer, undo):
    trainer.model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    add_noise(trainer.model)
    trainer.model.base_model.set_adapter(["default", "second"])


@way("sped up, trained", "adapter, default")
def adapter_deleted(trainer, undo):
    trainer.model.delete_adapter("default")


@way("built, first step", "adapter, active")
def no_adapter_active(trainer, undo):
    for layer in adapted(trainer):
        layer._active_adapter = []


@way("built, sped up, first step", "dropout")
def lora_dropout_set_later(trainer, undo):
    for layer in adapted(trainer):
        layer.lora_dropout["default"] = nn.Dropout(0.5)


@way("arguments", "dropout", "SFT DPO KTO GRPO")
def lora_dropout(undo):
    return {"lora": LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear")}


LORAS = {
    "DoRA": ({"use_dora": True}, "dora, plain"),
    "rsLoRA": ({"use_rslora": True}, "rslora"),
    "bias": ({"bias": "lora_only"}, "bias, plain, trained"),
    "lora_bias": ({"lora_bias": True}, "bias, plain"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 3}}, "scaling, alpha"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, "rank, scaling"),
    "modules_to_save": (
        {"modules_to_save": ["norm"]},
        "modules_to_save, saved, trained, norm, module",
    ),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, "token, trained, module"),
    "the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "embed, module"),
    "attention alone": ({"target_modules": ["q_proj", "v_proj"]}, "module"),
    "one layer": ({"layers_to_transform": [1]}, "layer"),
    "layer replication": ({"layer_replication": [[0, 2], [0, 2]]}, "layer, replication"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora"),
    "target_parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
        "parameter, plain, module",
    ),
}


def _lora(name: str) -> Callable:
    def kind_of_lora(undo):
        asked = {"r": 4, "lora_alpha": 12, "target_modules": list(PROJECTIONS)} | LORAS[name][0]
        return {"lora": LoraConfig(**asked)}

    kind_of_lora.__name__ = f"LoRA with {name}"
    return kind_of_lora


for name in LORAS:
    way("arguments", LORAS[name][1], bites=name != "bias")(_lora(name))  # a Llama has no biases


@way("built, sped up", "variant, dora, adapter, plain, module")
def one_layer_becomes_dora(trainer, undo):
    """Its matrices are what they were; a magnitude is put beside them."""
    from peft.tuners.lora.variants import DoraLinearVariant

    layer = block(trainer).mlp.up_proj
    layer.lora_variant["default"] = DoraLinearVariant()
    DoraLinearVariant.init(layer, "default")
    layer.lora_magnitude_vector["default"].weight.data.mul_(1.5)


@way("arguments", "adapter, PeftModel, peft, model")
def lora_put_in_by_transformers(undo):
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=list(PROJECTIONS)))
    return {"model": model, "more": {"peft_config": None}}


@way("arguments", "adapter")
def adapter_with_another_name(undo):
    lora = LoraConfig(r=4, lora_alpha=2, target_modules="all-linear")
    return {"model": get_peft_model(tiny_llama(), lora, "mine"), "more": {"peft_config": None}}


@way("arguments", "IA3, plain, method, adapter")
def another_method_of_peft(undo):
    return {"lora": peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])}


@way("arguments", "prompt, plain, method, adapter, virtual")
def prompt_tuning(undo):
    return {"lora": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}


# --- The trainer ----------------------------------------------------------------------------------


@way("built, sped up, first step", "compute_loss", "SFT DPO KTO GRPO")
def loss_patched_on_the_instance(trainer, undo):
    trainer.compute_loss = grows(trainer.compute_loss)


@way("built, first step", "_compute_loss, compute_loss", "DPO KTO GRPO")
def inner_loss_patched_on_the_instance(trainer, undo):
    trainer._compute_loss = grows(trainer._compute_loss)


@way("built, sped up", "compute_loss, replaced, patched")
def loss_of_the_class_patched(trainer, undo):
    swapped(undo, SFTTrainer, "compute_loss", grows(SFTTrainer.compute_loss))


@way("arguments", "compute_loss, MySFT, method")
def subclass_with_a_loss(undo):
    class MySFT(SFTTrainer):
        def compute_loss(self, *arguments, **named):
            return grown(super().compute_loss(*arguments, **named))

    return {"trainer": MySFT}


@way("arguments", "training_step, MySFT, method")
def subclass_with_a_step(undo):
    class MySFT(SFTTrainer):
        def training_step(self, model, inputs, *others, **named):
            inputs["labels"][:, :20] = inputs["input_ids"][:, :20]
            return super().training_step(model, inputs, *others, **named)

    return {"trainer": MySFT}


@way("arguments", "_prepare_inputs, MySFT, method")
def subclass_that_prepares_inputs(undo):
    class MySFT(SFTTrainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return inputs | {"position_ids": 3 * torch.arange(inputs["input_ids"].shape[1])[None]}

    return {"trainer": MySFT}


@way("arguments", "_get_num_items_in_batch, MySFT, method")
def subclass_that_counts_otherwise(undo):
    class MySFT(SFTTrainer):
        def _get_num_items_in_batch(self, batch_samples, device):
            return 2 * super()._get_num_items_in_batch(batch_samples, device)

    return {"trainer": MySFT}


@way("sped up, first step", "_prepare_inputs, patched, method, instance")
def inputs_prepared_by_an_instance(trainer, undo):
    old = trainer._prepare_inputs

    def shorter(inputs):
        return {name: value[:, :-2] for name, value in old(inputs).items()}

    trainer._prepare_inputs = shorter


@way("built, sped up, first step", "label_smooth")
def label_smoother(trainer, undo):
    trainer.label_smoother = LabelSmoother(epsilon=0.3)


@way("built, first step", "loss_func, compute_loss")
def loss_function_given(trainer, undo):
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss * 2


@way("sped up, first step", "loss_type, dft, args")
def loss_type_of_the_config_later(trainer, undo):
    trainer.args.loss_type = "nll"


@way("built, sped up, first step", "neftune", bites=True)
def neftune(trainer, undo):
    trainer.args.neftune_noise_alpha = trainer.neftune_noise_alpha = 30.0
    if trainer.state.global_step:
        trainer.neftune_hook_handle = None
        trainer._activate_neftune(trainer.model)


@way("built, first step", "accepts, kwargs, num_items", bites=False)
def items_of_the_step_not_given(trainer, undo):
    trainer.model_accepts_loss_kwargs = False


@way("sped up, trained", "model", bites=True)
def another_model_of_the_trainer(trainer, undo):
    other = build("SFT", tiny_llama(seed=9)).model
    trainer.model = trainer.model_wrapped = other


@way("sped up", "copy, deepcopied, trainer, model", bites=False)
def deep_copy_of_the_trainer(trainer, undo):
    """The copy has a model of its own; what was bound to the old one must not train that."""
    other = copy.deepcopy(trainer)
    for weight in trainer.model.parameters():
        weight.data.zero_()
    return other


@way("sped up", "copy, trainer", bites=False)
def shallow_copy_of_the_trainer(trainer, undo):
    other = copy.copy(trainer)
    other.model = other.model_wrapped = copy.deepcopy(trainer.model)
    for weight in trainer.model.parameters():
        weight.data.zero_()
    return other


@way("built", "already, fast", bites=False)
def speed_up_called_twice(trainer, undo):
    with contextlib.suppress(cpu.SpeedUpError):
        cpu.speed_up(trainer)


@way("built, sped up, first step", "checkpoint, hook", bites=False)
def gradient_checkpointing_later(trainer, undo):
    trainer.model.enable_input_require_grads()
    base(trainer).gradient_checkpointing_enable({"use_reentrant": False})


@way("built, sped up", "liger", bites=False)
def liger_of_the_config_later(trainer, undo):
    trainer.args.average_tokens_across_devices = False


@way("sped up, first step", "ref, reference", "DPO KTO")
def reference_model_given_later(trainer, undo):
    trainer.ref_model = tiny_llama(seed=8).requires_grad_(False)


@way("built, first step", "beta", "DPO KTO GRPO", bites=True)
def beta_later(trainer, undo):
    trainer.beta = 2.0


@way("built, first step", "label_smoothing, loss", "DPO")
def smoothed_labels_later(trainer, undo):
    trainer.loss_types, trainer.label_smoothing = ["robust"], 0.3


@way("built, first step", "loss_type", "DPO")
def another_loss_of_dpo_later(trainer, undo):
    trainer.loss_types = ["ipo"]


@way("built, first step", "weighting", "DPO")
def weighting_later(trainer, undo):
    trainer.use_weighting = True


@way("sped up, first step", "liger", "DPO KTO", bites=False)
def liger_of_the_trainer_later(trainer, undo):
    """speed_up may use the name for itself; the user sets it back."""
    trainer.use_liger_kernel = False


@way("built, first step", "temperature", "GRPO")
def temperature_later(trainer, undo):
    trainer.temperature = 0.5


@way("built, sped up, first step", "entropy", "GRPO")
def entropy_coef_later(trainer, undo):
    trainer.entropy_coef, trainer._entropy_bonus_enabled = 0.5, True


@way("arguments", "entropy", "GRPO")
def entropy_coef(undo):
    return {"entropy_coef": 0.3}


@way("arguments", "entropy", "GRPO", bites=True)
def adaptive_entropy(undo):
    return {"use_adaptive_entropy": True, "entropy_target": 20.0, "entropy_coef": 0.3}


@way("arguments", "quantile, entropy", "GRPO")
def high_entropy_tokens_alone(undo):
    return {"top_entropy_quantile": 0.4}


@way("built, first step", "quantile, entropy", "GRPO")
def high_entropy_tokens_alone_later(trainer, undo):
    trainer.top_entropy_quantile = 0.4


@way("arguments", "tool, environment, response", "GRPO", bites=False)
def tools_given(undo):
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: one number.
            b: another.

        Returns:
            The sum.
        """
        return a + b

    return {"more": {"tools": [add]}}


def _subclass_with_log_probs(kind: str) -> Callable:
    def subclass_with_log_probs(undo):
        """The method that speed_up replaces is another already."""

        class Mine(KINDS[kind][0]):
            def _get_per_token_logps_and_entropies(self, *arguments, **named):
                return grown(super()._get_per_token_logps_and_entropies(*arguments, **named))

            def _compute_loss(self, *arguments, **named):
                return grown(super()._compute_loss(*arguments, **named))

        return {"trainer": Mine}

    return subclass_with_log_probs


for kind in ("DPO", "KTO", "GRPO"):
    way("arguments", "logps, _compute_loss, method, Mine", kind)(_subclass_with_log_probs(kind))


@way("built, sped up", "autocast")
def autocast_around(trainer, undo):
    undo.enter_context(torch.autocast("cpu", torch.bfloat16))


@way("built, sped up", "dtype, float64", bites=False)
def default_dtype(trainer, undo):
    torch.set_default_dtype(torch.float64)
    undo.callback(torch.set_default_dtype, torch.float32)


@way("sped up", "inference, grad", bites=False)
def inference_mode_around(trainer, undo):
    undo.enter_context(torch.inference_mode())


@way("sped up", "grad", bites=False)
def no_gradients_around(trainer, undo):
    undo.enter_context(torch.no_grad())


@way("built, sped up", "determin", bites=False)
def deterministic_algorithms(trainer, undo):
    torch.use_deterministic_algorithms(True)
    undo.callback(torch.use_deterministic_algorithms, False)


@way("built, first step", "eval, train, mode", bites=False)
def blocks_in_evaluation_mode(trainer, undo):
    block(trainer).eval()


# --- Batches --------------------------------------------------------------------------------------


def _collated(edit: Callable) -> Callable:
    """A change of the trainer's collator that edits its batches."""

    def another_collator(trainer, undo):
        old = trainer.data_collator

        def collate(examples):
            batch = old(examples)
            return batch | edit(batch)

        trainer.data_collator = collate

    another_collator.__name__ = f"collator: {edit.__name__.replace('_', ' ')}"
    return another_collator


def holes_in_the_attention_mask(batch) -> dict:
    """Tokens in the middle that nobody sees: the positions of those behind them stay."""
    mask = batch["attention_mask"].clone()
    mask[:, 5:9] = 0
    return {"attention_mask": mask}


def left_padding(batch) -> dict:
    rows = {name: value.clone() for name, value in batch.items()}
    for i, mask in enumerate(batch["attention_mask"]):
        shift = int((mask == 0).sum())
        for name in rows:
            rows[name][i] = batch[name][i].roll(shift)
    return rows


def other_positions(batch) -> dict:
    return {"position_ids": 3 * torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape)}


def positions_that_begin_again(batch) -> dict:
    """As in a packed row: position 0 in the middle."""
    positions = torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape).clone()
    positions[:, 10:] -= 10
    return {"position_ids": positions}


def mask_of_four_dimensions(batch) -> dict:
    """Each token sees the three before it."""
    rows, length = batch["input_ids"].shape
    seen = torch.ones(length, length).tril().triu(-3).bool()
    return {"attention_mask": seen.expand(rows, 1, length, length)}


def no_label_at_all(batch) -> dict:
    return {"labels": torch.full_like(batch["labels"], -100)}


def labels_at_padding(batch) -> dict:
    """The padding token is asked for behind the end."""
    labels = batch["labels"].clone()
    labels[batch["attention_mask"] == 0] = 7
    return {"labels": labels}


def labels_that_are_other_tokens(batch) -> dict:
    labels = batch["labels"]
    return {"labels": torch.where(labels == -100, labels, (labels + 1) % 2000)}


def row_of_padding_alone(batch) -> dict:
    mask, labels = batch["attention_mask"].clone(), batch["labels"].clone()
    mask[0], labels[0] = 0, -100
    return {"attention_mask": mask, "labels": labels}


def shifted_labels_beside(batch) -> dict:
    """TRL takes them for shifted already, and ignores labels."""
    shifted = torch.nn.functional.pad(batch["labels"][:, 2:], (0, 2), value=-100)
    return {"shift_labels": shifted}


def scaled_embeddings(batch) -> dict:
    """transformers prefers inputs_embeds to nothing: it refuses both."""
    return {"inputs_embeds": torch.ones(*batch["input_ids"].shape, 32)}


def every_row_twice(batch) -> dict:
    return {name: torch.cat([value, value]) for name, value in batch.items()}


def no_attention_mask(batch) -> dict:
    return {"attention_mask": torch.ones_like(batch["attention_mask"])}


def floats_as_mask(batch) -> dict:
    return {"attention_mask": batch["attention_mask"].float()}


def router_logits(batch) -> dict:
    return {"output_hidden_states": True}


SFT_BATCHES = (
    (holes_in_the_attention_mask, True), (left_padding, False), (other_positions, True),
    (positions_that_begin_again, True), (mask_of_four_dimensions, True), (no_label_at_all, True),
    (labels_at_padding, True), (labels_that_are_other_tokens, True), (row_of_padding_alone, True),
    (shifted_labels_beside, True), (scaled_embeddings, True), (every_row_twice, True),
    (no_attention_mask, False), (floats_as_mask, False), (router_logits, False),
)  # fmt: skip
for edit, bites in SFT_BATCHES:
    words = "collator, batch, inputs, " + ", ".join(edit.__name__.split("_"))
    way("sped up", words, bites=bites)(_collated(edit))
for edit in (holes_in_the_attention_mask, labels_that_are_other_tokens):
    way("built, trained", "collator, batch, inputs, mask")(_collated(edit))


def holes_in_the_mask_of_pairs(batch) -> dict:
    mask = batch["attention_mask"].clone()
    mask[:, 5:9] = 0
    return {"attention_mask": mask}


def completions_that_begin_later(batch) -> dict:
    mask = batch["completion_mask"].clone()
    first = mask.argmax(-1)
    mask[torch.arange(len(mask)), first] = 0
    return {"completion_mask": mask}


for edit in (holes_in_the_mask_of_pairs, completions_that_begin_later):
    way("sped up", "collator, batch, inputs, mask", "DPO")(_collated(edit))


@way("trained", "adapter_names, collator, batch, inputs")
def rows_of_other_adapters(trainer, undo):
    """PEFT lets each row of a batch name its adapter, in evaluation."""
    old = trainer.data_collator
    trainer.data_collator = lambda rows: old(rows) | {"adapter_names": ["__base__"] * len(rows)}


@way("built, sped up", "collator", bites=False)
def collator_made_by_hand(trainer, undo):
    inner = trainer.data_collator
    trainer.data_collator = lambda examples: inner(examples)


@way("sped up, first step", "collator, pad", bites=False)
def collator_pads_to_more(trainer, undo):
    trainer.data_collator.pad_to_multiple_of = 32


@way("built, sped up", "collator, completion")
def collator_labels_the_prompt(trainer, undo):
    """Rows without labels of their own: the collator makes them."""
    trainer.train_dataset = trainer.train_dataset.remove_columns(
        [name for name in trainer.train_dataset.column_names if name != "input_ids"]
    )


class Editing(TrainerCallback):
    """Replaces the collator of the trainer's batches when training begins."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **_) -> None:
        inner = train_dataloader.collate_fn

        def edited(rows):
            batch = inner(rows)
            return batch | labels_that_are_other_tokens(batch)

        getattr(train_dataloader, "base_dataloader", train_dataloader).collate_fn = edited


@way("built, sped up", "callback, Editing, collat")
def callback_that_edits_the_batches(trainer, undo):
    trainer.add_callback(Editing())


class Disturbing(TrainerCallback):
    """Changes the model at the beginning of the second step."""

    def on_step_begin(self, args, state, control, model=None, **_) -> None:
        if state.global_step == 1:
            model.get_base_model().model.layers[0].mlp.act_fn = nn.ReLU()


@way("built, sped up", "callback, Disturbing, act, module")
def callback_that_edits_the_model(trainer, undo):
    trainer.add_callback(Disturbing())


class Clipping(TrainerCallback):
    """Halves gradients before the optimizer sees them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(0.5)


@way("built, sped up", "callback, Clipping")
def callback_that_edits_gradients(trainer, undo):
    trainer.add_callback(Clipping())


# --- Other versions -------------------------------------------------------------------------------


def _version(module) -> Callable:
    def other_version(trainer, undo):
        real = importlib.metadata.version
        name = module.__name__
        swapped(undo, module, "__version__", "99.1.0")
        swapped(undo, importlib.metadata, "version", lambda n: "99.1.0" if n == name else real(n))

    other_version.__name__ = f"another version of {module.__name__}"
    return other_version


for module in (trl, transformers, peft):
    way("built", f"{module.__name__}", bites=False)(_version(module))
way("built", "trl", "DPO KTO GRPO", bites=False)(_version(trl))


def _without_method(kind: str) -> Callable:
    def trl_without_the_private_method(trainer, undo):
        """As after a release that gives it another name."""
        cls, name = KINDS[kind][0], "_get_per_token_logps_and_entropies"
        if hasattr(cls, name):
            undo.callback(setattr, cls, name, getattr(cls, name))
            delattr(cls, name)

    return trl_without_the_private_method


for kind in ("DPO", "KTO", "GRPO"):
    way("built", "logps, method, trl, version", kind, bites=False)(_without_method(kind))


# --- Each way is taken as TRL takes it, or refused ------------------------------------------------


@functools.cache
def plain(kind: str, change: Callable = nothing, moment: str = "first step"):
    """A run of TRL alone: it does not know whether speed_up would have been called before the
    change or after it.
    """
    return run(kind, change, moment, whole=moment in WHOLE)


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_changed_it_is_sped_up_and_equal(kind):
    """Else all below could be refused. Random numbers are drawn as without it, so what follows
    draws the same.
    """
    quick = run(kind, quick=True)
    assert quick.error is None and quick.result and not quick.warned, (quick.error, quick.warned)
    assert difference(plain(kind), quick, kind) == ""
    assert torch.equal(plain(kind).random_state, quick.random_state)
    frozen = [name for name in quick.weights if "lora" not in name]
    assert all(torch.equal(quick.weights[n], plain(kind).weights[n]) for n in frozen)
    assert len(quick.gradients) == 3 and all(quick.gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_it_is_fast_too(kind):
    """TRL's default: accelerate wraps an autocast around the model's forward, which is no patch."""
    wanted, got = (run(kind, quick=quick, bf16=True) for quick in (False, True))
    assert got.error is None and got.result and not got.warned, (got.error, got.warned)
    assert far_apart(wanted, got) == ""


def test_there_are_many_ways_and_each_has_a_name():
    names = {one.change.__name__ for one in WAYS}
    assert len(names) >= 60 and len({str(one) for one in WAYS}) == len(WAYS)
    assert {one.moment for one in WAYS} == {
        "arguments",
        "built",
        "sped up",
        "first step",
        "trained",
    }


@pytest.mark.parametrize("one", WAYS, ids=str)
def test_a_way_is_taken_as_trl_takes_it_or_refused(one):
    moment = "built" if one.moment == "sped up" else one.moment
    wanted = plain(one.kind, one.change, moment)
    if one.bites:
        unchanged = plain(one.kind, nothing, moment)
        changed = wanted.error or difference(unchanged, wanted, one.kind, quick=False)
        assert changed, "this way changes nothing, so it tests nothing"
    got = run(one.kind, one.change, one.moment, quick=True, whole=one.moment in WHOLE)
    assert verdict(one, wanted, got) in ("equal", "refused", "raised", "TRL refuses")


def verdict(one: Way, wanted, got) -> str:
    """What became of a way with speed_up; fails where it is none of what is allowed."""
    if isinstance(got.error, cpu.SpeedUpError):
        measured = got.error.difference is not None
        assert measured or named(one, got.error.reason), f"raised with the reason {got.error.reason!r}"
        return "raised"
    for reason in got.warned:
        assert named(one, reason), f"refused with the reason {reason!r}, wanted one of {one.words}"
    if got.result is not None:
        assert got.result or got.result.reason in got.warned, f"unsaid: {got.result.reason}"
    assert got.touched == "", f"refused, and yet these are others: {got.touched}"
    if wanted.error is not None:
        assert type(got.error) is type(wanted.error), f"TRL: {wanted.error!r}; sped up: {got.error!r}"
        return "TRL refuses"
    assert got.error is None, repr(got.error)
    differs = difference(wanted, got, one.kind, quick=got.applied)
    assert not differs, ("silent: " if not got.warned else "stepped aside, and yet: ") + differs
    return "refused" if got.warned else "equal"


def named(one: Way, reason: str) -> bool:
    return any(word.lower() in reason.lower() for word in one.words)


# --- Nothing to refuse ----------------------------------------------------------------------------


def _harmless() -> dict[str, dict]:
    rslora = LoraConfig(r=4, use_rslora=True, target_modules="all-linear")
    return {
        "the course's curve": {"more": {"callbacks": [LiveCurve()]}},
        "accumulation": {"gradient_accumulation_steps": 2},
        "rsLoRA": {"lora": rslora},
        "attention alone": {"lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
        "one layer": {"lora": LoraConfig(r=3, target_modules=["up_proj"], layers_to_transform=[1])},
        "an untied head": {"model": tiny_llama(tie_word_embeddings=False)},
        "one row": {"rows": rows_of("SFT")[:1]},
    }


@pytest.mark.parametrize("name", _harmless())
def test_what_is_ordinary_stays_fast(name):
    wanted, got = (run("SFT", nothing, quick=quick, **_harmless()[name]) for quick in (False, True))
    assert got.result and not got.warned and got.error is None, (got.warned, got.error)
    assert difference(wanted, got, "SFT") == ""


def test_a_loss_of_another_model_is_that_models():
    """compute_loss gets the model: it need not be the trainer's."""
    other = build("SFT", tiny_llama(seed=9)).model
    losses = []
    for quick in (False, True):
        trainer = build("SFT")
        if quick:
            cpu.speed_up(trainer)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        try:
            losses.append(trainer.compute_loss(other, dict(batch), num_items_in_batch=3).item())
        except cpu.SpeedUpError as error:
            assert "model" in error.reason
            return
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- Answers --------------------------------------------------------------------------------------


PROMPTS = [[{"role": "user", "content": text}] for text in ("hi", "2 + 2?", "Where is my order?")]
LENGTH = 12


def generated(model) -> list[str]:
    """By model.generate, one prompt at a time: greedily, with what generation_config asks for
    besides.
    """
    texts, model = [], model.eval()
    for prompt in PROMPTS:
        text = tokenizer().apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer()(text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False,
                num_beams=1, repetition_penalty=1.0, pad_token_id=0,
            )  # fmt: skip
        texts.append(tokenizer().decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def lora_model(**changes):
    asked = {"r": 4, "lora_alpha": 12, "target_modules": list(PROJECTIONS)} | changes
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(**asked))
    add_noise(model)
    return model.eval()


@dataclass
class Holder:
    """A trainer to those of the changes above that only look at its model."""

    model: nn.Module


NOT_OF_THE_MODEL = (
    "trainer", "collator", "callback", "step", "loss", "label", "version", "gradient", "neftune",
    "twice", "checkpoint", "items", "liger", "saved", "backward", "autocast", "default_dtype",
    "bf16",  # rounds the one and the other otherwise
    "longest_row",  # changes the tied head as rows are read, and answers are read longest first
)  # fmt: skip
ANSWER_WAYS = {
    one.change.__name__: one.change
    for one in WAYS
    if (one.moment, one.kind) == ("built", "SFT") and not any(word in one.change.__name__ for word in NOT_OF_THE_MODEL)
}


@pytest.mark.parametrize("name", ANSWER_WAYS)
def test_answers_of_a_changed_model_are_those_of_generate(name):
    """One at a time: in a batch a changed mask sees the padding."""
    outcomes = []
    for ask in (generated, lambda model: answers(model, tokenizer(), PROMPTS, LENGTH, 1)):
        with ExitStack() as undo:
            holder = Holder(lora_model())
            ANSWER_WAYS[name](holder, undo)
            outcomes.append(outcome(ask, holder.model))
    assert outcomes[0] == outcomes[1]


def outcome(ask: Callable, model) -> list[str] | type:
    """The texts, or the type of what was raised."""
    try:
        return ask(model)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", [*LORAS, "dropout"])
def test_answers_with_another_adapter_are_those_of_generate(name):
    model = lora_model(**(LORAS[name][0] if name != "dropout" else {"lora_dropout": 0.5}))
    assert answers(model, tokenizer(), PROMPTS, LENGTH) == generated(model)


ASKED = {
    "no_repeat_ngram_size": 2, "suppress_tokens": [*range(900)],
    "begin_suppress_tokens": [*range(1500)], "bad_words_ids": [[i] for i in range(3, 600)],
    "min_new_tokens": 12, "min_length": 60, "forced_eos_token_id": 5, "forced_bos_token_id": 7,
    "exponential_decay_length_penalty": (1, 3.0), "sequence_bias": [[[9], 50.0]],
    "renormalize_logits": True, "remove_invalid_values": True, "encoder_repetition_penalty": 5.0,
    "eos_token_id": [2, 11, 13], "stop_strings": ["a"], "guidance_scale": 3.0, "temperature": 0.3,
    "top_k": 2, "do_sample": True, "repetition_penalty": 3.0, "num_beams": 3, "max_time": 60.0,
    "cache_implementation": "static", "use_cache": False, "max_length": 3,
    "encoder_no_repeat_ngram_size": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_answers_obey_what_generation_config_asks_for(name):
    """As on the path of other models: greedy, one beam and no repetition penalty; all else as it
    says.
    """
    model = lora_model()
    setattr(model.generation_config, name, ASKED[name])
    setattr(model.get_base_model().generation_config, name, ASKED[name])
    got = outcome(lambda model: answers(model, tokenizer(), PROMPTS, LENGTH), model)
    assert got == outcome(generated, model)


def test_answers_change_when_the_model_does():
    """A decoder that is kept from one call to the next would not see it."""
    model = lora_model()
    before = answers(model, tokenizer(), PROMPTS, LENGTH)
    model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.data.mul_(-3)
    after = answers(model, tokenizer(), PROMPTS, LENGTH)
    assert after == generated(model) != before


@pytest.mark.parametrize("quick", [False, True])
def test_answers_after_training_are_those_of_generate(quick):
    """What speed_up leaves on a model must neither bend its answers nor be taken for a change of
    the user's.
    """
    trainer = build("SFT")
    if quick:
        assert cpu.speed_up(trainer)
    trainer.train()
    assert answers(trainer.model, tokenizer(), PROMPTS, LENGTH) == generated(trainer.model)
