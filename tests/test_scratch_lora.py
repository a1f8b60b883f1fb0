"""ftlab.scratch.lora without a library: numbers worked by hand, the article's counts, and what must hold always."""

import re
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ftlab.scratch.lora import LoRALinear, add_lora, lora_state_dict


def set_to(parameter: nn.Parameter, rows: list) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(rows, dtype=parameter.dtype))


def by_hand(lora_alpha: float, bias: list | None = None) -> LoRALinear:
    """W0 = [[1, 2], [3, 4]], A = [[1, -1]], B = [[2], [3]], r 1."""
    base_layer = nn.Linear(2, 2, bias=bias is not None)
    set_to(base_layer.weight, [[1, 2], [3, 4]])
    if bias:
        set_to(base_layer.bias, bias)
    layer = LoRALinear(base_layer, r=1, lora_alpha=lora_alpha)
    set_to(layer.lora_A, [[1, -1]])
    set_to(layer.lora_B, [[2], [3]])
    return layer


def block(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = {"norm": nn.LayerNorm(6), "up_proj": nn.Linear(6, 10), "act": nn.SiLU(), "down_proj": nn.Linear(10, 6)}
    return nn.Sequential(OrderedDict(layers))


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """As after some steps: no adapter parameter is at its start any more."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_lora_by_hand():
    """lora_alpha 2, bias [.5, -.5], x = [1, 3]. W0 x = [7, 15]; A x = -2; B A x = [-4, -6]; times 2: [-8, -12].

    h = [7 - 8 + .5, 15 - 12 - .5] = [-.5, 2.5]. Of the loss h_1 + h_2: grad B = 2 * (A x) = -4 in both rows; grad A =
    2 * (2 + 3) * x = [10, 30]. Merging adds 2 * [[2, -2], [3, -3]].
    """
    layer = by_hand(2, bias=[0.5, -0.5])
    x = torch.tensor([1.0, 3.0])
    h = layer(x)
    assert h.tolist() == [-0.5, 2.5]
    h.sum().backward()
    assert layer.lora_B.grad.tolist() == [[-4], [-4]] and layer.lora_A.grad.tolist() == [[10, 30]]
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None
    assert layer.delta_weight().tolist() == [[4, -4], [6, -6]]


def test_without_the_scaling_it_is_another_result():
    """Claim C09: W + BA, as the article has it, is right only where lora_alpha = r. Here B A x = [-4, -6] is added."""
    assert by_hand(1)(torch.tensor([1.0, 3.0])).tolist() == [3, 9]


def test_scaling_by_hand():
    """lora_alpha 32 and r 16: 2; with rsLoRA 32 / sqrt(16) = 8, which is not the default."""
    plain, rslora = (nn.Sequential(OrderedDict(up_proj=nn.Linear(2, 2))) for _ in range(2))
    add_lora(plain, ["up_proj"], 16, 32)
    add_lora(rslora, ["up_proj"], 16, 32, lora_dropout=0.5, use_rslora=True)
    layers = [LoRALinear(nn.Linear(2, 2), 16, 32, 0.5), plain.up_proj, rslora.up_proj]
    assert [layer.scaling for layer in layers] == [2, 2, 8]
    assert [layer.lora_dropout.p for layer in layers] == [0.5, 0, 0.5]
    assert all(layer.lora_A.shape == (16, 2) and layer.lora_B.shape == (2, 16) for layer in layers)


def test_a_is_drawn_from_the_same_interval_for_every_r():
    """U(-1/sqrt(in), 1/sqrt(in)) has standard deviation 1/sqrt(3 in): in = 400 gives 0.05 and 0.02887."""
    torch.manual_seed(0)
    for r in (1, 4, 64):
        A = LoRALinear(nn.Linear(400, 3), r, 1).lora_A
        assert 0.049 < A.abs().max() <= 0.05
        assert A.std().item() == pytest.approx(0.02887, rel=0.1)  # r = 1 has 400 draws: 2.2% of standard error


# --- What must hold always --------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))  # in, out, r


def layer_and_x(shape: tuple[int, int, int], seed: int, lora_dropout: float = 0.0) -> tuple[LoRALinear, torch.Tensor]:
    torch.manual_seed(seed)
    inputs, outputs, r = shape
    return LoRALinear(nn.Linear(inputs, outputs), r, 2 * r, lora_dropout), torch.randn(4, inputs)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31), st.sampled_from([0.0, 0.5]))
def test_step_0_is_the_base_model_and_moves_only_b(shape, seed, lora_dropout):
    """Claim C06: the same bits, in training with dropout too; grad(A) = 0 since B = 0, and grad(B) is not 0."""
    layer, x = layer_and_x(shape, seed, lora_dropout)
    h = layer(x)
    assert torch.equal(h, layer.base_layer(x))
    h.square().sum().backward()
    assert not layer.lora_A.grad.any() and (lora_dropout or layer.lora_B.grad.any())
    assert layer.base_layer.weight.grad is None


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_merged_equals_unmerged(shape, seed):
    layer, x = layer_and_x(shape, seed)
    trained(layer, seed)
    W0, b = layer.base_layer.weight, layer.base_layer.bias
    assert_close(x @ (W0 + layer.delta_weight()).T + b, layer(x), rtol=1e-5, atol=2e-5)  # sums in another order


def test_the_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(3, 4).double(), 2, 3)
    nn.init.normal_(layer.lora_B)

    def forward(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert layer.lora_A.dtype == torch.float64
    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_B))


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone():
    layer = trained(LoRALinear(nn.Linear(50, 3), 2, 4, lora_dropout=0.5))
    x = torch.ones(1, 50)
    base, addition = layer.base_layer(x), x @ layer.delta_weight().T
    assert_close(layer.eval()(x), base + addition)
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, 0.5)  # half of x is 0, the other half 2
    torch.manual_seed(0)
    assert_close(layer.train()(x), base + kept @ layer.delta_weight().T)


def test_on_a_bf16_base_the_adapter_is_fp32_and_much_of_a_small_delta_is_lost_on_merging():
    """Claim C10. bf16 has 8 significant bits, so between 1 and 2 its numbers are 1/128 apart: 1 + .001 is 1 again."""
    base_layer = nn.Linear(1, 1, bias=False)
    set_to(base_layer.weight, [[1.0]])
    layer = LoRALinear(base_layer.to(torch.bfloat16), 1, 1)
    set_to(layer.lora_A, [[1.0]])
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {torch.float32}
    assert layer(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for delta, merged in ((0.001, 1.0), (0.005, 1.0078125)):  # 1 + 1/128, the next number there is
        set_to(layer.lora_B, [[delta]])
        assert (layer.base_layer.weight + layer.delta_weight()).bfloat16().item() == merged


# --- Into a model -----------------------------------------------------------------------------------------------------


def test_add_and_train():
    """Only the adapter moves; the merged model is the trained one."""
    model, x = block(), torch.randn(4, 6)
    assert add_lora(model, ["up_proj", "down_proj"], 2, 4) == ["up_proj", "down_proj"]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["up_proj.lora_A", "up_proj.lora_B", "down_proj.lora_A", "down_proj.lora_B"]
    before = block()(x).detach()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.up_proj.base_layer.weight, block().up_proj.weight)
    assert model(x).square().mean() < 0.5 * before.square().mean()
    merged = block()
    for name in ("up_proj", "down_proj"):
        merged.get_submodule(name).weight.data += model.get_submodule(name).delta_weight()
    assert_close(merged(x), model(x), rtol=1e-5, atol=2e-5)  # W + delta rounded before the product, not after


def test_a_second_call_with_other_settings_trains_the_adapters_of_both():
    model = block()
    add_lora(model, ["up_proj"], 2, 4)
    add_lora(model, ["down_proj"], 1, 4)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["up_proj.lora_A", "up_proj.lora_B", "down_proj.lora_A", "down_proj.lora_B"]


def test_layers_deep_in_a_model_and_their_names_in_the_state():
    """Names have dots: the last part is what target_modules means, the rest is where the layer is put."""
    model = nn.Sequential(OrderedDict(mlp=block(), head=block(1)))
    assert add_lora(model, ["up_proj"], 2, 4) == ["mlp.up_proj", "head.up_proj"]
    state = lora_state_dict(trained(model))
    parts = ("lora_A.weight", "lora_B.weight")
    assert state.keys() == {f"base_model.model.{part}.up_proj.{p}" for part in ("mlp", "head") for p in parts}
    assert not any(tensor.requires_grad for tensor in state.values())
    A = state["base_model.model.mlp.up_proj.lora_A.weight"]
    assert torch.equal(A, model.mlp.up_proj.lora_A)
    trained(model, seed=2)
    assert not torch.equal(A, model.mlp.up_proj.lora_A)  # a copy, not a view


def test_a_model_in_eval_mode_stays_in_eval_mode():
    """PEFT's new layers are in training mode whatever the model was: their dropout is on until model.eval()."""
    model = block().eval()
    add_lora(model, ["up_proj"], 2, 4, lora_dropout=0.5)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("targets", [["up_proj", "q_proj"], ["act"], [], "up_proj"])
def test_a_target_without_a_layer_is_refused_and_the_model_left_alone(targets):
    model = block()
    wanted = f"got {targets!r}, wanted a list, names of nn.Linear: ['down_proj', 'up_proj']"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        add_lora(model, targets, 2, 4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


# --- Counts -----------------------------------------------------------------------------------------------------------


def test_the_articles_example_of_one_matrix():
    """Claim C08: 4096 x 4096 = 16,777,216; r = 16 trains 16 * (4096 + 4096) = 131,072 of them, one in 128."""
    layer = LoRALinear(nn.Linear(4096, 4096, bias=False, device="meta"), 16, 32)
    assert layer.lora_A.numel() + layer.lora_B.numel() == 131_072 == layer.base_layer.weight.numel() // 128
    assert layer.lora_A.is_meta and layer.lora_B.is_meta  # where the base layer is


def test_a_layers_step_has_the_flops_of_the_cards_formula():
    """(2n^2 + 6nr) / 3n^2 of full fine-tuning, claim C20, as torch counts them."""

    def flops(layer: nn.Module, n: int) -> int:
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(3, n, requires_grad=True)).sum().backward()
        return counter.get_total_flops()

    for n, r in ((16, 1), (16, 4), (32, 8)):
        full, lora = nn.Linear(n, n, bias=False), LoRALinear(nn.Linear(n, n, bias=False), r, 1)
        assert flops(lora, n) / flops(full, n) == pytest.approx((2 * n**2 + 6 * n * r) / (3 * n**2))
