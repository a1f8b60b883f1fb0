"""LoRA by hand: a frozen linear layer plus a trainable product of two thin matrices.

    h = W0 x + scaling * B A x          W0 (out, in) frozen · A (r, in) · B (out, r) · scaling = lora_alpha / r

`add_lora` puts the layers into a model, `lora_state_dict` is the adapter as PEFT saves it.
Outputs, gradients and merged weights equal PEFT's: tests/parity/test_lora.py.

Sources: LoRA, Hu et al. 2021, arXiv:2106.09685, Eq. 3. rsLoRA, Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """h = W0 x + scaling * B A dropout(x), with W0 = base_layer.weight frozen; the bias, if any, is base_layer's.

    The paper draws A from a Gaussian; its authors' code, PEFT and this class draw it from U(-1/sqrt(in), 1/sqrt(in)),
    which does not depend on r. B starts at 0, so step 0 is the base model, and there grad(A) = 0 while grad(B) is not.
    scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. On a bf16 base A and B are fp32, as in PEFT.
    """

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0,
                 use_rslora: bool = False) -> None:  # fmt: skip
        super().__init__()
        W0, dtype = base_layer.weight, torch.promote_types(base_layer.weight.dtype, torch.float32)
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(W0.new_empty(r, base_layer.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(W0.new_zeros(base_layer.out_features, r, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # = U(-1/sqrt(in), 1/sqrt(in))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base_layer(x)
        x = self.lora_dropout(x.to(self.lora_A.dtype))
        addition = x @ self.lora_A.T @ self.lora_B.T  # (..., in) -> (..., r) -> (..., out)
        return (h + self.scaling * addition).to(h.dtype)

    def delta_weight(self) -> Tensor:
        """What merging adds to W0, (out, in): scaling * B A, of rank r at most.

        W0 + delta in W0's dtype is the merged weight: one layer again, as quick as the base. The sum is rounded to that
        dtype, so that in bf16 much of a small delta is lost, and in 4 bits nearly all of it.
        """
        return self.scaling * (self.lora_B @ self.lora_A)


def add_lora(model: nn.Module, target_modules: Iterable[str], r: int, lora_alpha: float, **options: float) -> list[str]:
    """The names of the linear layers that now carry LoRA: those whose last name part is in target_modules.

    options are those of LoRALinear. Changes the model in place and freezes all of it but the adapters. PEFT ignores a
    target that names nothing as long as another one does; here each must name a layer, or it is a ValueError.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known, wanted = {name.rpartition(".")[2] for name in linears}, set(target_modules)
    if not wanted or wanted - known:
        raise ValueError(f"target_modules: got {target_modules!r}, wanted a list, names of nn.Linear: {sorted(known)}")
    targets = [name for name in linears if name.rpartition(".")[2] in wanted]
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(("lora_A", "lora_B")))  # those of an earlier call go on learning
    for name in targets:
        layer = LoRALinear(linears[name], r, lora_alpha, **options)
        model.set_submodule(name, layer.train(linears[name].training))  # a model in eval mode stays in it
    return targets


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter under the names of PEFT's get_peft_model_state_dict; r, alpha and targets are not in it.

    The scaling is not in it either: under another lora_alpha it is another adapter, and nothing raises.
    """
    own = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("lora_A", "lora_B")}
    return {f"base_model.model.{name}.weight": p.detach().clone() for name, p in own.items()}
