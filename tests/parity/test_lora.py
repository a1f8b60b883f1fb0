"""ftlab.scratch.lora against PEFT: forward, gradients, an optimizer step, merging, adapter files.

PEFT's flags that are not at their defaults are named where they are set: use_rslora, lora_dropout. Everything else is
PEFT's default: init_lora_weights=True, bias="none", autocast_adapter_dtype=True.
"""

import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from ftlab.scratch.lora import LoRALinear, add_lora, lora_state_dict

TARGETS = ["up_proj", "down_proj"]


def peft_of(model: nn.Module, r: int, lora_alpha: float, targets=TARGETS, **flags) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets, **flags))


@st.composite
def cases(draw):
    inputs, inner, outputs, r = (draw(st.integers(1, 9)) for _ in range(4))
    lora_alpha, seed = draw(st.sampled_from([0.5, 1, 8, 32])), draw(st.integers(0, 2**31))
    flags = {"use_rslora": draw(st.booleans()), "lora_dropout": draw(st.sampled_from([0.0, 0.3]))}
    return inputs, inner, outputs, r, lora_alpha, flags, draw(st.booleans()), seed


def pair(case, dtype=torch.float32) -> tuple[nn.Module, PeftModel, torch.Tensor]:
    """Our model and PEFT's: the same base, the same adapter, moved away from its start; and an input for both."""
    inputs, inner, outputs, r, lora_alpha, flags, bias, seed = case
    torch.manual_seed(seed)
    layers = {"up_proj": nn.Linear(inputs, inner, bias=bias), "act": nn.SiLU(), "down_proj": nn.Linear(inner, outputs)}
    ours = nn.Sequential(OrderedDict(layers)).to(dtype)
    theirs = peft_of(copy.deepcopy(ours), r, lora_alpha, **flags)
    assert add_lora(ours, TARGETS, r, lora_alpha, **flags) == TARGETS
    move(theirs, seed)
    load(ours, get_peft_model_state_dict(theirs))
    return ours, theirs, torch.randn(3, inputs, dtype=dtype)


def move(model: nn.Module, seed: int) -> None:
    """lora_B off 0, by as much as the weights are large."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.uniform_(parameter, -0.5, 0.5)


def load(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """An adapter of PEFT into our layers: every tensor, and no other."""
    own = {f"base_model.model.{name}.weight": p for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == state.keys()
    for name, parameter in own.items():
        parameter.data.copy_(state[name])


def forward_and_gradients_agree(ours: nn.Module, theirs: PeftModel, x: torch.Tensor) -> None:
    """In evaluation and in training, there with the same dropout masks: both draw one for x, layer after layer."""
    assert_close(ours.eval()(x), theirs.eval()(x))
    losses = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        losses.append(model(x).square().mean())
        losses[-1].backward()
    assert_close(*losses)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    wanted = get_peft_model_state_dict(theirs, state_dict=wanted)  # under the names of an adapter file
    got = {f"base_model.model.{name}.weight": p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()  # nothing but the adapter has a gradient
    for name, gradient in got.items():
        assert_close(gradient, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=40, deadline=None)
@given(cases())
def test_forward_and_gradients(case):
    """With lora_alpha / r, and with use_rslora=True; with and without lora_dropout."""
    ours, theirs, x = pair(case)
    assert ours.down_proj.scaling == theirs.base_model.model.down_proj.scaling["default"]
    forward_and_gradients_agree(ours, theirs, x)


@settings(max_examples=15, deadline=None)
@given(cases())
def test_one_adamw_step_leads_to_the_same_adapter_and_leaves_the_base(case):
    """In float64: Adam divides a gradient by its size, so one that is 0 but for fp32's rounding steps at random."""
    ours, theirs, x = pair(case, torch.float64)
    start, W0 = lora_state_dict(ours), ours.up_proj.base_layer.weight.clone()
    forward_and_gradients_agree(ours, theirs, x)
    for model in (ours, theirs):
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01).step()
    wanted = get_peft_model_state_dict(theirs)
    for name, tensor in lora_state_dict(ours).items():
        assert_close(tensor, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.equal(tensor, start[name])
    assert torch.equal(ours.up_proj.base_layer.weight, W0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_merging_gives_pefts_weights(dtype, case):
    """W0 + delta, rounded once to W0's dtype."""
    ours, theirs, _ = pair(case, dtype)
    theirs.merge_adapter()
    for name in TARGETS:
        layer = ours.get_submodule(name)
        merged = (layer.base_layer.weight + layer.delta_weight()).to(dtype)
        assert_close(merged, theirs.base_model.model.get_submodule(name).base_layer.weight)


def test_the_first_a_is_drawn_as_peft_draws_it():
    base_layer = nn.Linear(7, 5)
    theirs = peft_of(nn.Sequential(OrderedDict(up_proj=base_layer)), 3, 6, ["up_proj"]).base_model.model.up_proj
    torch.manual_seed(3)
    theirs.reset_lora_parameters("default", init_lora_weights=True)
    torch.manual_seed(3)
    ours = LoRALinear(base_layer, 3, 6)
    assert torch.equal(ours.lora_A, theirs.lora_A["default"].weight) and not ours.lora_B.any()


def test_on_a_bf16_base_the_adapter_is_fp32_and_step_0_is_the_base_model():
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(up_proj=nn.Linear(16, 16))).to(torch.bfloat16)
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    ours, theirs = copy.deepcopy(base), peft_of(copy.deepcopy(base), 4, 8, ["up_proj"])
    add_lora(ours, ["up_proj"], 4, 8)
    kinds = [{p.dtype for p in model.parameters() if p.requires_grad} for model in (ours, theirs)]
    assert kinds == [{torch.float32}] * 2
    assert torch.equal(ours(x), base(x)) and torch.equal(theirs(x), base(x))


# --- A transformers model ---------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


def test_adapters_go_both_ways_and_through_pefts_file(tmp_path):
    targets, ids = ["q_proj", "v_proj", "down_proj"], torch.arange(12).view(2, 6)
    ours, theirs, back = llama(), *(peft_of(llama(), 3, 6, targets).eval() for _ in range(2))
    assert len(add_lora(ours, targets, 3, 6)) == 6
    move(theirs, seed=1)
    theirs.save_pretrained(tmp_path)
    load(ours, load_file(tmp_path / "adapter_model.safetensors"))
    wanted = theirs(ids).logits
    assert not torch.allclose(wanted, llama()(ids).logits, atol=1e-3)
    assert_close(ours(ids).logits, wanted)
    mine, peft_state = lora_state_dict(ours), get_peft_model_state_dict(theirs)
    assert mine.keys() == peft_state.keys() and all(torch.equal(mine[name], peft_state[name]) for name in mine)
    result = set_peft_model_state_dict(back, mine)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
    assert torch.equal(back(ids).logits, wanted)
