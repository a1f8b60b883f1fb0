"""The libraries' own training step, on random weights and without a download: what `measure` watches."""

import contextlib

from ftlab.memory.architecture import Architecture
from ftlab.memory.predict import Memory
from ftlab.memory.setup import Plan, Setup, plan
from ftlab.memory.tracker import CudaRecorder, cuda_rules, tracker
from ftlab.pipeline.recipe import Recipe


def measure(architecture: Architecture, recipe: Recipe, setup: Setup | None = None, on: str = "fake") -> Memory:
    """The bytes that one step of SFT really holds: the libraries' own code on random weights, nothing is fetched.

    on="fake": every operator runs on tensors without data (FakeTensorMode), and each storage is counted from its birth
    to its death: an 8B model on a laptop, in seconds. on="cpu": the same with real data, for small models. Both follow
    the rules that PyTorch has for CUDA where the CPU's differ (tracker.cuda_rules). on="cuda": a real step; the peaks
    are those of `torch.cuda.max_memory_allocated`, with `reserved_bytes` beside them, and kinds are not told apart.

    The step is that of ftlab.pipeline.train: weights in the dtype that it loads, PEFT's adapters, TRL's loss (its
    chunked one, or full logits with its entropy), gradients clipped, then the optimizer, which has run before.

    Raises ValueError for an unknown `on`, for more than one GPU, and for methods other than "sft".
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    p = plan(architecture, recipe, setup)
    if on not in ("fake", "cpu", "cuda"):
        raise ValueError(f"on: got {on!r}, wanted 'fake', 'cpu' or 'cuda'")
    if recipe.method != "sft" or p.setup.gpus != 1:
        raise ValueError(f"only method 'sft' on 1 GPU is measured, got {recipe.method!r} on {p.setup.gpus}")
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


# --- the model, as train.py leaves it ---------------------------------------------------------------------------------


def skeleton(p: Plan):
    """The model on the meta device: dtypes, quantized layers, adapters, what is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    recipe, dtypes = p.recipe, {2: _half(p.recipe), 4: torch.float32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            p.a.config(), dtype=dtypes[p.held], attn_implementation=p.setup.attention
        )
        model.tie_weights()
        if p.quantized:
            _quantize(model, recipe.quantization)
            for name, parameter in model.named_parameters():  # prepare_model_for_kbit_training
                parameter.requires_grad = False
                if not name.endswith("proj.weight"):
                    parameter.data = parameter.data.to(torch.float32)
        if recipe.r:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=recipe.r,
                lora_alpha=recipe.lora_alpha,
                lora_dropout=recipe.lora_dropout,
                target_modules=list(recipe.target_modules),
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, config)
            for parameter in model.parameters():
                if parameter.requires_grad and p.quantized:  # SFTTrainer does this
                    parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    if recipe.gradient_checkpointing:
        if recipe.r:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if p.setup.loss == "chunked":
        from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _patch_chunked_ce_lm_head

        _patch_chunked_ce_lm_head(model.get_base_model() if recipe.r else model, _CHUNKED_LM_HEAD_CHUNK_SIZE)
    return model


def _quantize(model, quantization: str) -> None:
    """Replaces every linear layer but the head by bitsandbytes' own, as transformers does on loading."""
    import bitsandbytes as bnb
    import torch

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            shape = (layer.in_features, layer.out_features, layer.bias is not None)
            if quantization == "int8":
                new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            else:
                double = quantization == "nf4-double"
                new = bnb.nn.Linear4bit(
                    *shape, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4"
                )
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, new)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization != "int8"


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
    optimizer = _optimizer(p.recipe, trained)
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

    handle = (model.get_base_model() if p.recipe.r else model).model.register_forward_hook(decoded)
    recorder.start()
    recorder.enter("forward", "activations")
    if p.accumulates:  # those of the batches before
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            recorder.mark(parameter.grad, "gradients")
    ids = torch.zeros(p.rows, p.recipe.max_length, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    if p.setup.padded:
        mask[0, 0] = 0
    with torch.autocast(device, dtype=_half(p.recipe), enabled=p.amp):
        loss = _sft_loss(model, p.setup, ids, mask)
    recorder.enter("backward", "loss")
    loss.backward()
    del loss
    recorder.enter("step", "temporary")
    torch.nn.utils.clip_grad_norm_(trained, p.recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()


def _half(recipe: Recipe):
    import torch

    return torch.float16 if recipe.precision == "fp16" else torch.bfloat16


def _sft_loss(model, setup: Setup, ids, mask):
    """The loss as SFTTrainer computes it; with full logits also its copy in fp32 (accelerate) and its entropy (TRL)."""
    import torch

    if setup.loss == "fused":
        return _fused_loss(model, ids, mask)
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    if setup.loss == "full":
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
            rows = min(n, 1 << (-(-n // -(-V // d)) - 1).bit_length())
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


def _optimizer(recipe: Recipe, trained: list):
    import torch

    settings = {"lr": 1e-4, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw_torch":
        return torch.optim.AdamW(trained, **settings, foreach=True)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(trained, **settings, foreach=True)
    import bitsandbytes as bnb

    return bnb.optim.AdamW(trained, **settings, optim_bits=8, is_paged=recipe.optimizer.startswith("paged"))
