"""The libraries' own training step, on random weights and without a download: what `measure` watches.

`measure` is the independent answer to ftlab.memory.estimate. It takes from ftlab only what is asked for: the shape, the
checked settings and the dtypes in which the libraries load (settings.Plan).
"""

import contextlib
import dataclasses
import math

from oracles.tracker import CudaRecorder, cuda_rules, tracker

from ftlab.memory import Architecture, Memory
from ftlab.memory.settings import Plan, plan


def measure(architecture, on: str = "fake", **settings) -> Memory:
    """The bytes that one step of SFT really holds: the libraries' own code on random weights, nothing is fetched.

    architecture and settings are those of ftlab.memory.estimate.

    on="fake": every operator runs on tensors without data (FakeTensorMode), and each storage is counted from its birth
    to its death: an 8B model on a laptop, in seconds. on="cpu": the same with real data, for small models. Both follow
    the rules that PyTorch has for CUDA where the CPU's differ (tracker.cuda_rules). on="cuda": a real step; the peaks
    are those of `torch.cuda.max_memory_allocated`, and kinds are not told apart.

    The step is SFTTrainer's: weights in the dtype in which they are loaded, PEFT's adapters, TRL's loss (its chunked
    one, or all logits with their entropy), gradients clipped, then the optimizer, which has run before.

    Raises ValueError for an unknown `on`, for more than one GPU, and for methods other than "sft".
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    p = plan(architecture, **settings)
    if on not in ("fake", "cpu", "cuda"):
        raise ValueError(f"on: got {on!r}, wanted 'fake', 'cpu' or 'cuda'")
    if p.method != "sft" or p.gpus != 1:
        raise ValueError(f"only method 'sft' on 1 GPU is measured, got {p.method!r} on {p.gpus}")
    fake = FakeTensorMode(allow_non_fake_inputs=True) if on == "fake" else contextlib.nullcontext()
    device = "cuda" if on == "cuda" else "cpu"
    model = skeleton(p)
    with fake:
        constants = materialize(model, device)
    if on == "cuda":
        recorder = CudaRecorder()
        step(model, p, device, recorder)
        return recorder.finish()
    recorder = tracker(p)
    with fake, recorder, cuda_rules(on):
        for name, parameter in model.named_parameters():
            recorder.mark(parameter, "adapters" if "lora_" in name else "weights")
        for tensor in constants:
            recorder.mark(tensor, "constants")
        step(model, p, device, recorder)
    return Memory(recorder.moments)


# --- the model, as SFTTrainer leaves it -------------------------------------------------------------------------------


def config_of(a: Architecture):
    """The transformers config of this shape."""
    from transformers import AutoConfig

    fields = {key: value for key, value in dataclasses.asdict(a).items() if value is not None and key != "name"}
    if a.model_type == "qwen3_moe":
        fields["moe_intermediate_size"] = fields["intermediate_size"]
    if a.model_type == "mistral":
        fields["sliding_window"] = a.sliding_window  # the class has one by default
    return AutoConfig.for_model(**fields)


def skeleton(p: Plan):
    """The model on the meta device: dtypes, quantized layers, adapters, what is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {2: torch.bfloat16, 4: torch.float32}[p.R]
    with torch.device("meta"):
        config = config_of(p.a)
        config.output_router_logits = p.a.num_experts is not None  # SFTTrainer, for its router_aux_loss_coef
        kernel = "eager" if p.eager else "sdpa"
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
        model.tie_weights()
        if p.quantized:
            _quantize(model, p)
        if not p.full:
            from peft import LoraConfig, get_peft_model

            names = "all-linear" if p.target_modules == "all-linear" else list(p.target_modules)
            lora = LoraConfig(r=p.r, lora_dropout=p.lora_dropout, target_modules=names, task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
            for parameter in model.parameters():
                if parameter.requires_grad and p.adapter == 2:  # SFTTrainer does this to those of a quantized model
                    parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    if p.checkpointed:
        if not p.full:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if p.loss == "chunked_nll":
        from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _patch_chunked_ce_lm_head

        _patch_chunked_ce_lm_head(model if p.full else model.get_base_model(), _CHUNKED_LM_HEAD_CHUNK_SIZE)
    return model


def _quantize(model, p: Plan) -> None:
    """Replaces every linear layer but the head by bitsandbytes' own, as transformers does on loading."""
    import bitsandbytes as bnb
    import torch

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            shape = (layer.in_features, layer.out_features, layer.bias is not None)
            if p.int8:
                new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            else:
                double = p.bnb_4bit_use_double_quant
                new = bnb.nn.Linear4bit(
                    *shape, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4"
                )
            if new.bias is not None:
                new.bias.data = new.bias.data.to(layer.bias.dtype)
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, new)
    model.requires_grad_(False)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = p.int8, not p.int8


def materialize(model, device: str) -> list:
    """Gives every meta tensor of the model memory (tied ones once), and returns the quantization constants."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    made, constants = {}, []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:  # `old` is kept too: its id must not be given to another
                    if key == "weight" and isinstance(module, Linear4bit):
                        made[id(old)] = old, _nf4_weight(module, old, device, constants)
                    elif key == "weight" and isinstance(module, Linear8bitLt):
                        made[id(old)] = old, _int8_weight(module, old, device, constants)
                    else:
                        new = torch.zeros(old.shape, dtype=old.dtype, device=device)
                        new = new.normal_(std=0.02) if old.is_floating_point() else new
                        parameter = isinstance(old, torch.nn.Parameter)
                        made[id(old)] = old, torch.nn.Parameter(new, old.requires_grad) if parameter else new
                table[key] = made[id(old)][1]
    return constants


def _nf4_weight(module, old, device: str, constants: list):
    """Zeros, with bitsandbytes' state of a weight that has been quantized in blocks of 64."""
    import torch
    from bitsandbytes.functional import QuantState

    shape, double = torch.Size((module.out_features, module.in_features)), old.compress_statistics
    weight = torch.nn.Parameter(
        torch.zeros((shape.numel() + 1) // 2, 1, dtype=torch.uint8, device=device), requires_grad=False
    )
    blocks, code = -(-shape.numel() // 64), torch.ones(16, device=device)
    absmax = torch.ones(blocks, dtype=torch.uint8 if double else torch.float32, device=device)
    constants += [absmax, code]
    offset = second = None
    if double:
        second_absmax, second_code = torch.ones(-(-blocks // 256), device=device), torch.ones(256, device=device)
        constants += [second_absmax, second_code]
        second = QuantState(second_absmax, code=second_code, blocksize=256, dtype=torch.float32)
        offset = torch.zeros((), device=device)
    weight.quant_state = QuantState(absmax, shape, code, 64, "nf4", torch.bfloat16, offset=offset, state2=second)
    module.quant_state, module.compute_type_is_set = weight.quant_state, True
    return weight


def _int8_weight(module, old, device: str, constants: list):
    """Zeros, with the constant of each row where bitsandbytes keeps it: in the layer's state."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(old.shape, dtype=torch.int8, device=device), requires_grad=False)
    weight.CB = weight.SCB = None
    module.state.CB, module.state.SCB = weight.data, torch.ones(module.out_features, device=device)
    constants.append(module.state.SCB)
    return weight


# --- the step ---------------------------------------------------------------------------------------------------------


def step(model, p: Plan, device: str, recorder) -> None:
    """One training step after the first (optimizer state exists), telling the recorder which phase it is in."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recorder.enter("load", "optimizer")
    optimizer = _optimizer(p, trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
        recorder.mark(parameter.grad, "gradients")
        parameter.register_post_accumulate_grad_hook(lambda one: recorder.mark(one.grad, "gradients"))
    optimizer.step()
    optimizer.zero_grad()

    def decoded(module, arguments, output):
        """From here to the loss and back to this tensor's gradient, what is made belongs to the loss."""
        recorder.enter("forward", "loss")
        output.last_hidden_state.register_hook(lambda gradient: recorder.enter("backward", "temporary"))

    handle = (model if p.full else model.get_base_model()).model.register_forward_hook(decoded)
    recorder.start()
    recorder.enter("forward", "activations")
    if p.accumulates:  # those of the batches before
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            recorder.mark(parameter.grad, "gradients")
    ids = torch.zeros(p.rows, p.T, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    if p.padded:
        mask[0, 0] = 0
    with torch.autocast(device, dtype=torch.bfloat16, enabled=p.amp):
        loss = _sft_loss(model, p, ids, mask)
    recorder.enter("backward", "loss")
    loss.backward()
    outputs = getattr(loss, "kept", None)  # still named in the step of a loop of one's own
    del loss
    recorder.enter("step", "temporary")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    del outputs
    handle.remove()


def _sft_loss(model, p: Plan, ids, mask):
    """The loss as SFTTrainer computes it; with full logits also its copy in fp32 (accelerate) and its entropy (TRL)."""
    import torch

    if p.loss == "liger":
        return _fused_loss(model, ids, mask)
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    if p.amp and p.loss == "all_logits":
        outputs.logits = outputs.logits.float()  # accelerate's convert_outputs_to_fp32
    if p.keeps_outputs:
        outputs.loss.kept = outputs.logits  # by a name, in a loop of one's own
    if p.loss == "nll":
        from trl.trainer.utils import entropy_from_logits

        outputs.logits = outputs.logits.float()  # accelerate's convert_outputs_to_fp32
        with torch.no_grad():
            logits = outputs.logits[..., :-1, :]
            entropy_from_logits(logits)
            logits.argmax(dim=-1)
    return outputs.loss


def _fused_loss(model, ids, mask):
    """The allocations of Liger's fused linear cross-entropy, without its numbers: Liger itself needs Triton.

    Its kernel writes the gradient over the logits, chunk by chunk, already in the forward pass.
    """
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            (n, d), V = hidden.shape, weight.shape[0]
            chunk = math.ceil(n / math.ceil(V / d))  # as in Liger's fused_linear_cross_entropy_forward
            rows = min(n, 2 ** math.ceil(math.log2(chunk)))
            ctx.gradients = torch.zeros_like(hidden), torch.zeros_like(weight) if weight.requires_grad else None
            for start in range(0, n, rows):
                logits = hidden[start : start + rows] @ weight.t()
                ctx.gradients[0][start : start + rows] = logits.mul_(0) @ weight
            return hidden.new_zeros((), dtype=torch.float32)

        @staticmethod
        def backward(ctx, gradient):
            gradients, ctx.gradients = ctx.gradients, None
            return gradients

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return Fused.apply(hidden.view(-1, hidden.shape[-1]), inner.lm_head.weight)


def _optimizer(p: Plan, trained: list):
    """As transformers' Trainer makes it for p.optim; torch's AdamW takes its foreach path on CUDA by itself."""
    import torch

    settings, optim = {"lr": 1e-4, "weight_decay": 0.0}, p.optim
    if optim.startswith("adamw_torch"):
        return torch.optim.AdamW(trained, **settings, **{"fused" if "fused" in optim else "foreach": True})
    if optim == "sgd":
        return torch.optim.SGD(trained, **settings, foreach=True)
    import bitsandbytes as bnb

    return bnb.optim.AdamW(trained, **settings, optim_bits=8, is_paged="paged" in optim)
