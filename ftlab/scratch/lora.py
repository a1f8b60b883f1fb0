"""LoRA by hand: a frozen linear layer plus a trainable product of two thin matrices.

    h = W0 x + scaling * B A x          W0 (out, in) frozen · A (r, in) · B (out, r) · scaling = lora_alpha / r

`add_lora` puts the layers in, `merge` adds one to its weight; adapters are saved and loaded under PEFT's names.
Outputs, gradients and merged weights equal PEFT's: tests/parity/test_lora.py.

Sources: LoRA, Hu et al. 2021, arXiv:2106.09685, Eq. 3. rsLoRA, Kalajdzievski 2023, arXiv:2312.03732. DoRA, Liu et al.
2024, arXiv:2402.09353, Eq. 5.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """What LoRALinear and DoRALinear share: the frozen base layer, and merging into it and out of it again.

    Raises TypeError if base_layer is no nn.Linear, ValueError for r < 1, lora_alpha <= 0, lora_dropout outside [0, 1).
    """

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float) -> None:
        super().__init__()
        _check(base_layer, r, lora_alpha, lora_dropout)
        self.base_layer = base_layer.requires_grad_(False)
        self._kept_weight: Tensor | None = None  # W0, while base_layer.weight holds the merged weight

    @property
    def base_weight(self) -> Tensor:
        """W0, (out, in), merged or not. Raises TypeError if it is stored in a quantized form."""
        weight = self.base_layer.weight if self._kept_weight is None else self._kept_weight
        if not weight.is_floating_point():
            raise TypeError(
                f"the base weight is stored as {weight.dtype}, a floating dtype is wanted: a quantized base must be "
                f"dequantized first, and storing W0 + delta in 4 bits again rounds most of a small delta away"
            )
        return weight

    @property
    def merged(self) -> bool:
        return self._kept_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Writes W0 + delta_weight() into base_layer, rounded once to its dtype. Raises RuntimeError if merged already.

        Keeps W0 until `unmerge`, which therefore gives it back bit by bit. PEFT keeps nothing and subtracts delta
        again: the W0 it gives back is off by rounding, and wrong if the adapter changed in between.
        """
        if self.merged:
            raise RuntimeError("merged already, and merging again would add the adapter twice: unmerge() first")
        merged = self.base_weight + self.delta_weight()
        self._kept_weight = self.base_weight.clone()
        self.base_layer.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives base_layer its W0 back, exactly. Raises RuntimeError if nothing is merged."""
        if not self.merged:
            raise RuntimeError("not merged, so there is nothing to take out: merge() first")
        self.base_layer.weight.copy_(self._kept_weight)
        self._kept_weight = None


class LoRALinear(Adapter):
    """h = W0 x + scaling * B A dropout(x), with W0 = base_layer.weight frozen; the bias, if any, is base_layer's.

    The paper draws A from a Gaussian; its authors' code, PEFT and this class draw it from U(-1/sqrt(in), 1/sqrt(in)),
    which does not depend on r. B starts at 0, so step 0 is the base model, and there grad(A) = 0 while grad(B) is not.
    scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. On a bf16 base A and B are fp32, as in PEFT.
    """

    def __init__(
        self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, lora_dropout)
        W0, dtype = base_layer.weight, torch.promote_types(base_layer.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(W0.new_empty(r, base_layer.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(W0.new_zeros(base_layer.out_features, r, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # = U(-1/sqrt(in), 1/sqrt(in))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base_layer(x)
        if self.merged:
            return h
        x = self.lora_dropout(x.to(self.lora_A.dtype))
        addition = x @ self.lora_A.T @ self.lora_B.T  # (..., in) -> (..., r) -> (..., out)
        return (h + self.scaling * addition).to(h.dtype)

    def delta_weight(self) -> Tensor:
        """What merging adds to W0, (out, in): scaling * B A, of rank r at most."""
        return self.scaling * (self.lora_B @ self.lora_A)


class DoRALinear(LoRALinear):
    """LoRA for the direction of each row of the weight, and a trained length: W' = m V / ||V||, V = W0 + scaling * B A.

    m is `lora_magnitude_vector` (out,), at first the length of W0's rows, so step 0 is the base model. The paper calls
    the norm column-wise, since its W is (in, out), says its author (nbasyl/DoRA, issue 1); nn.Linear's is (out, in).
    ||V|| counts as a constant in the backward pass (paper, section 4.3; so does PEFT's use_dora=True): cheaper, but not
    the exact gradient. Dropout acts on all that the adapter adds, (W' - W0) dropout(x). A row of zeros in W0 has no
    direction and gives nan, as in PEFT.
    """

    def __init__(
        self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)
        self.lora_magnitude_vector = nn.Parameter(self.base_weight.to(self.lora_A.dtype).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.base_layer(x)
        if self.merged:
            return h
        x = self.lora_dropout(x.to(self.lora_A.dtype))
        return (h + x @ self.delta_weight().T).to(h.dtype)

    def delta_weight(self) -> Tensor:
        """What merging adds to W0, (out, in): W' - W0, of any rank."""
        V = self.base_weight + super().delta_weight()
        return (self.lora_magnitude_vector / V.norm(dim=1).detach())[:, None] * V - self.base_weight


def _check(base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout: float) -> None:
    if not isinstance(base_layer, nn.Linear):
        raise TypeError(
            f"base_layer is a {type(base_layer).__name__}, an nn.Linear is wanted: GPT-2's Conv1D, for one, stores its "
            f"weight as (in, out)"
        )
    if r < 1:
        raise ValueError(f"r is {r}, at least 1 is wanted: r = 0 adds nothing; for full fine-tuning leave LoRA out")
    if lora_alpha <= 0:
        raise ValueError(f"lora_alpha is {lora_alpha}, more than 0 is wanted: at 0 no gradient reaches A or B")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora_dropout}, a probability in [0, 1) is wanted: 0.05, not 5")


# --- Into a model, and the adapter as a file --------------------------------------------------------------------------


def add_lora(
    model: nn.Module,
    target_modules: Iterable[str],
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> list[str]:
    """The names of the linear layers that now carry LoRA: those whose last name part is in target_modules.

    Changes the model in place and freezes all of it but the adapters. PEFT ignores a target that names nothing as long
    as another one does; here each must name a layer. Raises ValueError for that, for a second adapter, and for a layer
    whose weight another module uses too: merging into a tied lm_head would change the input embeddings.
    """
    if isinstance(target_modules, str):
        raise TypeError(f"target_modules is the string {target_modules!r}, a list is wanted: [{target_modules!r}]")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model carries LoRA already: start from a fresh model")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known, wanted = {name.rpartition(".")[2] for name in linears}, set(target_modules)
    if not wanted or wanted - known:
        raise ValueError(
            f"target_modules: {sorted(wanted - known)} of {sorted(wanted)} name no nn.Linear of this model; "
            f"its linear layers are called {sorted(known)}"
        )
    targets = [name for name in linears if name.rpartition(".")[2] in wanted]
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if tied := [name for name in targets if uses[id(linears[name].weight)] > 1]:
        raise ValueError(
            f"{tied} share their weight with another module (tie_word_embeddings?): leave them out or untie"
        )
    layer = DoRALinear if use_dora else LoRALinear
    adapted = {name: layer(linears[name], r, lora_alpha, lora_dropout, use_rslora) for name in targets}
    model.requires_grad_(False)
    for name, module in adapted.items():
        _replace(model, name, module.train(linears[name].training))  # a model in eval mode stays in it
    return targets


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter under the names of PEFT's get_peft_model_state_dict; r, alpha and targets are not in it."""
    return {name: parameter.detach().clone() for name, parameter in _adapter(model).items()}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies an adapter of ours or of PEFT into the model's LoRA layers: all of it, or nothing.

    The scaling is not in the state: give add_lora the r, lora_alpha and use_rslora of adapter_config.json. A wrong
    lora_alpha changes every output and raises nothing. Raises ValueError for names or shapes that do not fit.
    """
    own = _adapter(model)
    if missing_or_extra := own.keys() ^ state.keys():
        raise ValueError(
            f"the state lacks {sorted(own.keys() - state.keys())[:3]} and has {sorted(state.keys() - own.keys())[:3]} "
            f"too many ({len(missing_or_extra)} in all): other target_modules, use_dora, or another model class?"
        )
    for name, parameter in own.items():
        if state[name].shape != parameter.shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)} in the state and {tuple(parameter.shape)} in the model: "
                f"another r, or another base model?"
            )
    if any(isinstance(module, LoRALinear) and module.merged for module in model.modules()):
        raise RuntimeError("a layer is merged, so the new adapter would have no effect there: unmerge() it first")
    for name, parameter in own.items():
        parameter.copy_(state[name])


def _adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's adapter parameters under PEFT's names."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            for kind, parameter in module.named_parameters(recurse=False):
                suffix = ".weight" if kind in ("lora_A", "lora_B") else ""
                found[f"base_model.model.{name}.{kind}{suffix}"] = parameter
    if not found:
        raise ValueError("this model carries no LoRA layer: add_lora was not called, or the adapter is merged into it")
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
