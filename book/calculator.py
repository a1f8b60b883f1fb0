"""What the page of the memory calculator asks of `ftlab.memory`: run by Pyodide in the browser, and once by the build.

JSON in, JSON out: `controls()` says what can be chosen, `report(chosen)` what a training step then needs.
"""

import json

from ftlab import memory

TRAINED = {
    "QLoRA, NF4 + double quantization": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "QLoRA, NF4": {"load_in_4bit": True},
    "LoRA, int8 base": {"load_in_8bit": True},
    "LoRA, 16-bit base": {},
    "full fine-tuning": None,
}
STACKS = "the stack's own"
OPTIMIZERS = (STACKS, "adamw_torch_fused", "adamw_8bit", "sgd")
METHODS = (STACKS, "sft", "dpo", "kto", "orpo", "grpo", "ppo")
VLLM = "vllm_gpu_memory_utilization"
FIRST = {  # as the page opens
    "architecture": "Llama-3-8B", "gpu": "RTX 4090", "trained": next(iter(TRAINED)), "r": 16, "rows": 1,
    "tokens": 2048, "preset": next(iter(memory.presets())), "method": STACKS, "optim": STACKS, "share": 30,
    "checkpointing": True, "gpus": 1, "fsdp": False,
}  # fmt: skip


def controls() -> str:
    """The lists of the page, and what is chosen at first."""
    lists = {
        "architecture": list(memory.architectures()),
        "gpu": list(memory.gpus()),
        "trained": list(TRAINED),
        "preset": list(memory.presets()),
        "method": METHODS,
        "optim": OPTIMIZERS,
        "tokens": [2**k for k in range(7, 18)],
    }
    return json.dumps({"lists": lists, "first": FIRST})


def settings(chosen: dict) -> dict:
    """The keyword arguments of `memory.estimate`; what is at its default is left out."""
    base = TRAINED[chosen["trained"]]
    lora = {} if base is None else {"r": chosen["r"], **base}
    optional = {"preset": (FIRST["preset"], chosen["preset"]), "method": (STACKS, chosen["method"]),
                "optim": (STACKS, chosen["optim"]), "gradient_checkpointing": (True, chosen["checkpointing"]),
                "gpus": (1, chosen["gpus"]), "fsdp": (False, chosen["fsdp"])}  # fmt: skip
    rest = {name: value for name, (default, value) in optional.items() if value != default}
    if VLLM in memory.presets()[chosen["preset"]]["settings"]:
        rest[VLLM] = chosen["share"] / 100
    return lora | {"per_device_train_batch_size": chosen["rows"], "max_length": chosen["tokens"]} | rest


def report(chosen: str) -> str:
    """Bytes by phase and kind, which cards hold them, the longest rows and the largest batch; or what is wrong."""
    chosen = json.loads(chosen)
    try:
        keywords = settings(chosen)
        here = keywords | ({"card": chosen["gpu"]} if VLLM in keywords else {})  # vLLM takes a share of this card
        architecture, card = chosen["architecture"], memory.gpus()[chosen["gpu"]]
        predicted = memory.estimate(architecture, **here)
        answer = {
            "phases": {phase: moment.kinds for phase, moment in predicted.moments.items()},
            "peak": predicted.peak_bytes,
            "peak_phase": predicted.peak_phase,
            "verdict": card.verdict(predicted.peak_bytes),
            "margin": memory.margin(),
            "says": memory.presets()[chosen["preset"]]["says"],
            "cards": {name: on(name, architecture, keywords) for name in memory.gpus()},
            "usable": card.usable_bytes,
            "longest": memory.max_length(chosen["gpu"], architecture, **keywords),
            "largest": memory.max_batch(chosen["gpu"], architecture, **keywords),
            "code": line(architecture, here),
        }
    except ValueError as error:
        answer = {"wrong": str(error)}
    return json.dumps(answer)


def on(gpu: str, architecture: str, keywords: dict) -> str:
    """The verdict on a card; a share of it in which vLLM cannot hold the model is none."""
    try:
        return memory.verdict(gpu, architecture, **keywords)
    except ValueError:
        return "does not fit"


def line(architecture: str, keywords: dict) -> str:
    """The call that gives the same number in Python."""
    arguments = [f'"{architecture}"', *(f"{name}={value!r}" for name, value in keywords.items())]
    return f"memory.estimate({', '.join(arguments)}).peak_bytes"
