"""ftlab.scratch.lora without a library: numbers worked by hand, the article's counts, and what must hold always."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ftlab.scratch.lora import (
    DoRALinear,
    LoRALinear,
    add_lora,
    load_lora_state_dict,
    lora_state_dict,
)


def set_to(parameter: nn.Parameter, rows: list) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(rows, dtype=parameter.dtype))


def by_hand(kind: type, W0: list, A: list, B: list, lora_alpha: float, bias: list | None = None) -> LoRALinear:
    base_layer = nn.Linear(len(W0[0]), len(W0), bias=bias is not None)
    set_to(base_layer.weight, W0)
    if bias:
        set_to(base_layer.bias, bias)
    layer = kind(base_layer, r=len(A), lora_alpha=lora_alpha)
    set_to(layer.lora_A, A)
    set_to(layer.lora_B, B)
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
    """W0 = [[1, 2], [3, 4]], bias [.5, -.5], A = [[1, -1]], B = [[2], [3]], r 1, lora_alpha 2, x = [1, 3].

    W0 x = [7, 15]; A x = -2; B A x = [-4, -6]; times 2: [-8, -12]. h = [7 - 8 + .5, 15 - 12 - .5] = [-.5, 2.5].
    Of the loss h_1 + h_2: grad B = 2 * (A x) = -4 in both rows; grad A = 2 * (2 + 3) * x = [10, 30].
    Merged: [[1, 2], [3, 4]] + 2 * [[2, -2], [3, -3]] = [[5, -2], [9, -2]].
    """
    layer = by_hand(LoRALinear, [[1, 2], [3, 4]], [[1, -1]], [[2], [3]], lora_alpha=2, bias=[0.5, -0.5])
    x = torch.tensor([1.0, 3.0])
    h = layer(x)
    assert h.tolist() == [-0.5, 2.5]
    h.sum().backward()
    assert layer.lora_B.grad.tolist() == [[-4], [-4]] and layer.lora_A.grad.tolist() == [[10, 30]]
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None
    layer.merge()
    assert layer.base_layer.weight.tolist() == [[5, -2], [9, -2]] and layer(x).tolist() == [-0.5, 2.5]


def test_without_the_scaling_it_is_another_result():
    """Claim C09: W + BA, as the article has it, is right only where lora_alpha = r. Here B A x = [-4, -6] is added."""
    layer = by_hand(LoRALinear, [[1, 2], [3, 4]], [[1, -1]], [[2], [3]], lora_alpha=1)
    assert layer(torch.tensor([1.0, 3.0])).tolist() == [3, 9]


def test_dora_by_hand():
    """W0 = [3, 4], so m = 5. A = [1, -1], B = 1: V = [4, 3] of length 5, W' = [4, 3]; with m = 10, W' = [8, 6].

    Gradients at m = 5, x = [1, 0]: of m, V x / 5 = .8; of B, (m / 5) * A x = 1. With the norm not held constant the
    latter would be 5 d/db (3 + b) / sqrt((3 + b)^2 + (4 - b)^2) at b = 1, 5 * (1/5 - 4 * (4 - 3) / 125) = .84.
    """
    layer = by_hand(DoRALinear, [[3, 4]], [[1, -1]], [[1]], lora_alpha=1)
    assert layer.lora_magnitude_vector.tolist() == [5]
    layer(torch.tensor([1.0, 0.0])).sum().backward()
    assert_close(layer.lora_magnitude_vector.grad, torch.tensor([0.8]))
    assert_close(layer.lora_B.grad, torch.tensor([[1.0]]))
    assert_close(layer(torch.eye(2)), torch.tensor([[4.0], [3.0]]))
    set_to(layer.lora_magnitude_vector, [10])
    assert_close(layer(torch.eye(2)), torch.tensor([[8.0], [6.0]]))


def test_an_adapter_that_only_lengthens_a_row_changes_nothing_in_dora():
    """W0 = [3, 4], B A = [3, 4]: V = [6, 8] points the same way, so W' = 5 * [6, 8] / 10 = W0."""
    assert_close(by_hand(DoRALinear, [[3, 4]], [[3, 4]], [[1]], lora_alpha=1)(torch.eye(2)).T, torch.tensor([[3.0, 4]]))


def test_scaling_by_hand():
    """lora_alpha 32 and r 16: 2; with rsLoRA 32 / sqrt(16) = 8, which is not the default, and of either kind."""
    for use_dora, kind in ((False, LoRALinear), (True, DoRALinear)):
        model = nn.Sequential(OrderedDict(up_proj=nn.Linear(2, 2)))
        add_lora(model, ["up_proj"], 16, 32, 0.5, use_rslora=True, use_dora=use_dora)
        layers = [kind(nn.Linear(2, 2), 16, 32, 0.5), model.up_proj]
        assert [layer.scaling for layer in layers] == [2, 8] and all(type(layer) is kind for layer in layers)
        assert all(layer.lora_A.shape == (16, 2) and layer.lora_dropout.p == 0.5 for layer in layers)
    model = nn.Sequential(OrderedDict(up_proj=nn.Linear(2, 2)))
    add_lora(model, ["up_proj"], 16, 32)
    assert type(model.up_proj) is LoRALinear and model.up_proj.scaling == 2 and model.up_proj.lora_dropout.p == 0


def test_a_is_drawn_from_the_same_interval_for_every_r():
    """U(-1/sqrt(in), 1/sqrt(in)) has standard deviation 1/sqrt(3 in): in = 400 gives 0.05 and 0.02887."""
    torch.manual_seed(0)
    for r in (1, 4, 64):
        A = LoRALinear(nn.Linear(400, 3), r, 1).lora_A
        assert 0.049 < A.abs().max() <= 0.05
        assert A.std().item() == pytest.approx(0.02887, rel=0.1)  # r = 1 has 400 draws: 2.2% of standard error


# --- What must hold always --------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))  # in, out, r
kinds = st.sampled_from([LoRALinear, DoRALinear])


def layer_and_x(kind: type, shape: tuple[int, int, int], seed: int, lora_dropout: float = 0.0):
    torch.manual_seed(seed)
    inputs, outputs, r = shape
    return kind(nn.Linear(inputs, outputs), r, 2 * r, lora_dropout), torch.randn(4, inputs)


@settings(max_examples=60, deadline=None)
@given(kinds, shapes, st.integers(0, 2**31), st.sampled_from([0.0, 0.5]))
def test_step_0_is_the_base_model_and_moves_only_b(kind, shape, seed, lora_dropout):
    """Claim C06: the same bits, in training with dropout too; grad(A) = 0 since B = 0, and grad(B) is not 0."""
    layer, x = layer_and_x(kind, shape, seed, lora_dropout)
    h = layer(x)
    assert torch.equal(h, layer.base_layer(x))
    h.square().sum().backward()
    assert not layer.lora_A.grad.any() and (lora_dropout or layer.lora_B.grad.any())
    assert layer.base_layer.weight.grad is None


@settings(max_examples=60, deadline=None)
@given(kinds, shapes, st.integers(0, 2**31))
def test_merged_equals_unmerged_and_unmerge_gives_the_same_bits_back(kind, shape, seed):
    layer, x = layer_and_x(kind, shape, seed)
    W0, b = layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
    trained(layer, seed)
    h, delta = layer(x), layer.delta_weight()
    assert_close(x @ (W0 + delta).T + b, h, rtol=1e-5, atol=2e-5)  # sums in another order, and h of size 100
    layer.merge()
    assert_close(layer(x), h, rtol=1e-5, atol=2e-5)
    assert torch.equal(layer.base_weight, W0) and torch.equal(layer.delta_weight(), delta)
    trained(layer, seed + 1)  # an adapter that changes while merged must not spoil W0
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, W0)


def test_the_gradients_of_lora_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(3, 4).double(), 2, 3)
    nn.init.normal_(layer.lora_B)

    def forward(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert layer.lora_A.dtype == torch.float64
    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_dropout_acts_on_the_adapter_alone_and_in_training_alone(kind):
    """In DoRA on all that the adapter adds, (W' - W0) dropout(x)."""
    layer = trained(kind(nn.Linear(50, 3), 2, 4, lora_dropout=0.5))
    x = torch.ones(1, 50)
    base, addition = layer.base_layer(x), x @ layer.delta_weight().T
    assert_close(layer.eval()(x), base + addition)
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, 0.5)  # half of x is 0, the other half 2
    torch.manual_seed(0)
    assert_close(layer.train()(x), base + kept @ layer.delta_weight().T)


def test_a_model_in_eval_mode_stays_in_eval_mode():
    """PEFT's new layers are in training mode whatever the model was: their dropout is on until model.eval()."""
    model = block().eval()
    add_lora(model, ["up_proj"], 2, 4, lora_dropout=0.5)
    assert not any(module.training for module in model.modules())


def test_in_bf16_much_of_a_small_delta_is_lost_on_merging():
    """Claim C10. bf16 has 8 significant bits, so between 1 and 2 its numbers are 1/128 apart: 1 + .001 is 1 again."""
    base_layer = nn.Linear(1, 1, bias=False)
    set_to(base_layer.weight, [[1.0]])
    layer = LoRALinear(base_layer.to(torch.bfloat16), 1, 1)
    set_to(layer.lora_A, [[1.0]])
    set_to(layer.lora_B, [[0.001]])
    assert layer.lora_A.dtype == torch.float32 and layer(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.merge()
    assert layer.base_layer.weight.item() == 1.0
    layer.unmerge()
    set_to(layer.lora_B, [[0.005]])
    layer.merge()
    assert layer.base_layer.weight.item() == 1.0078125  # 1 + 1/128, the next number there is


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_on_a_bf16_base_the_adapter_is_fp32_and_what_comes_out_bf16(kind):
    """The first magnitudes are norms in fp32: of [1, 2^-5] 1.000488, in bf16 1. So step 0 is the base model."""
    base_layer = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    set_to(base_layer.weight, [[1.0, 2**-5]])
    layer, x = kind(base_layer, 1, 1), torch.tensor([[1.0, 0.5], [3.0, -2.0]], dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16 and torch.equal(layer(x), base_layer(x))
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    if kind is DoRALinear:
        assert_close(layer.lora_magnitude_vector.detach(), torch.tensor([(1 + 2**-10) ** 0.5]))


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_merging_needs_no_frozen_base(kind):
    """As after model.requires_grad_(True): no gradient is wanted of writing into the weight."""
    layer = trained(kind(nn.Linear(3, 2), 1, 1))
    layer.base_layer.requires_grad_(True)
    W0 = layer.base_layer.weight.detach().clone()
    layer.merge()
    assert not torch.equal(layer.base_layer.weight, W0)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, W0)


# --- The verbs --------------------------------------------------------------------------------------------------------


def test_add_train_merge():
    """Plain linear layers before and after; only the adapter moves; the merged model is the trained one."""
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
    after = model(x)
    assert after.square().mean() < 0.5 * before.square().mean()
    model.down_proj.merge()
    model.up_proj.merge()
    assert_close(model(x), after, rtol=1e-5, atol=2e-5)  # W + delta rounded before the product, not after


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_deep_in_a_model(use_dora):
    """Names have dots: the last part is what target_modules means, the rest is where the layer is put."""
    model, x = nn.Sequential(OrderedDict(mlp=block(), head=block(1))), torch.randn(4, 6)
    assert add_lora(model, ["up_proj"], 2, 4, use_dora=use_dora) == ["mlp.up_proj", "head.up_proj"]
    with pytest.raises(ValueError, match="carries LoRA already"):
        add_lora(model, ["down_proj"], 2, 4)
    state = lora_state_dict(trained(model))
    parts = ["lora_A.weight", "lora_B.weight"] + use_dora * ["lora_magnitude_vector"]
    assert state.keys() == {f"base_model.model.{part}.up_proj.{p}" for part in ("mlp", "head") for p in parts}
    assert not any(tensor.requires_grad for tensor in state.values())
    after = model(x)
    model.head.up_proj.merge()
    with pytest.raises(RuntimeError, match="a layer is merged"):
        load_lora_state_dict(model, state)
    model.mlp.up_proj.merge()
    assert_close(model(x), after, rtol=1e-5, atol=2e-5)  # W + delta rounded before the product, not after


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_goes_from_one_model_to_another(use_dora):
    source, target, x = block(), block(), torch.randn(4, 6)
    for model in (source, target):
        add_lora(model, ["up_proj", "down_proj"], 2, 4, use_dora=use_dora)
    state = lora_state_dict(trained(source))
    load_lora_state_dict(target, state)
    assert torch.equal(source(x), target(x))
    assert state.keys() >= {"base_model.model.up_proj.lora_A.weight", "base_model.model.down_proj.lora_B.weight"}
    kept = state["base_model.model.up_proj.lora_A.weight"].clone()
    trained(source, seed=2)
    assert torch.equal(state["base_model.model.up_proj.lora_A.weight"], kept)  # a copy, not a view


def test_a_wrong_alpha_loads_without_a_word():
    """The state holds no scaling: the same adapter under lora_alpha 8 instead of 4 adds twice as much."""
    models = [block(), block()]
    for model, lora_alpha in zip(models, (4, 8), strict=True):
        add_lora(model, ["down_proj"], 2, lora_alpha)
    load_lora_state_dict(models[1], lora_state_dict(trained(models[0])))
    assert_close(models[1].down_proj.delta_weight(), 2 * models[0].down_proj.delta_weight())


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


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r is 0, at least 1"),
        ({"lora_alpha": 0}, "lora_alpha is 0, more than 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, a probability"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1, a probability"),
        ({"target_modules": ["up_proj", "q_proj"]}, r"\['q_proj'\] of .* called \['down_proj', 'up_proj'\]"),
        ({"target_modules": ["act"]}, r"\['act'\] of \['act'\] name no nn.Linear"),
        ({"target_modules": []}, "name no nn.Linear"),
    ],
)
def test_add_lora_refuses_and_leaves_the_model_alone(changes, message):
    model = block()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"target_modules": ["up_proj"], "r": 2, "lora_alpha": 4} | changes)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_what_else_add_lora_refuses():
    with pytest.raises(TypeError, match="is the string 'up_proj', a list is wanted"):
        add_lora(block(), "up_proj", 2, 4)
    model = block()
    add_lora(model, ["up_proj"], 2, 4)
    with pytest.raises(ValueError, match="carries LoRA already"):
        add_lora(model, ["down_proj"], 2, 4)
    tied = nn.Sequential(OrderedDict(embed_tokens=nn.Embedding(5, 4), lm_head=nn.Linear(4, 5, bias=False)))
    tied.lm_head.weight = tied.embed_tokens.weight
    with pytest.raises(ValueError, match=r"\['lm_head'\] share their weight"):
        add_lora(tied, ["lm_head"], 2, 4)
    with pytest.raises(TypeError, match=r"base_layer is a Embedding, an nn\.Linear is wanted"):
        LoRALinear(tied.embed_tokens, 2, 4)


def test_merging_twice_and_unmerging_nothing_are_refused():
    layer = trained(LoRALinear(nn.Linear(3, 2), 1, 1))
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    merged = layer.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="would add the adapter twice"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, merged)
    with pytest.raises(ValueError, match="carries no LoRA layer"):
        lora_state_dict(block())


def test_a_quantized_base_is_not_merged_into():
    layer = LoRALinear(nn.Linear(2, 2), 1, 1)
    layer.base_layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"stored as torch.uint8.*dequantized first"):
        layer.merge()
    assert not layer.merged


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded():
    model, other, narrow = block(), block(), block()
    add_lora(model, ["up_proj", "down_proj"], 2, 4)
    add_lora(other, ["up_proj"], 2, 4)
    add_lora(narrow, ["up_proj", "down_proj"], 1, 4)
    before = lora_state_dict(model)
    with pytest.raises(ValueError, match=r"lacks \['base_model.model.down_proj.lora_A.weight'"):
        load_lora_state_dict(model, lora_state_dict(other))
    with pytest.raises(ValueError, match=r"too many \(2 in all\)"):
        load_lora_state_dict(other, before)
    with pytest.raises(ValueError, match=r"lora_A.weight is \(1, 6\) in the state and \(2, 6\) in the model"):
        load_lora_state_dict(model, lora_state_dict(trained(narrow)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state_dict(model).items())
    model.up_proj.merge()
    with pytest.raises(RuntimeError, match="a layer is merged"):
        load_lora_state_dict(model, before)
