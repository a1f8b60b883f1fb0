"""What needs a CUDA GPU, in one command of at most 9 minutes: random weights, nothing is downloaded.

    make gpu                        every part; experiments/gpu/<part>.json
    python bench/gpu.py nf4 steps   these parts
    python bench/gpu.py --tiny --to runs/gpu    the same on tiny shapes, to try the command where no GPU is

    memory    peak bytes of a training step by torch.cuda.max_memory_allocated, beside ftlab.memory.estimate
    steps     seconds of a step of TRL's SFTTrainer (with and without gradient checkpointing, with Liger's kernels where
              they are installed), DPOTrainer and GRPOTrainer, LoRA r = 16; peak bytes; what speed_up says there
    nf4       bitsandbytes' kernels and ftlab.scratch.quant: the same codes, scales and weights
    answers   tokens a second of ftlab.answers, by batch size

Each case runs in a process of its own. A part has its share of the nine minutes; a case that would begin later is named
under "left_out".
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness

ROOT = Path(__file__).resolve().parent.parent
TO = ROOT / "experiments" / "gpu"
SECONDS = {"nf4": 40, "answers": 80, "steps": 180, "memory": 200}  # of a part
SIZE = {"per_device_train_batch_size": 2, "max_length": 1024, "gradient_checkpointing": True, "optim": "adamw_torch"}
QLORA = {"r": 16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
MEMORY = [  # (architecture, settings of ftlab.memory.estimate)
    ("Llama-3.2-1B", {}),
    ("Llama-3.2-1B", {"r": 16}),
    ("Llama-3.2-1B", {"r": 16, "gradient_checkpointing": False}),
    ("Llama-3.2-1B", {"r": 16, "gradient_checkpointing": False, "loss_type": "nll"}),
    ("Llama-3.2-1B", QLORA),
    ("Llama-3.2-1B", {"r": 16, "load_in_8bit": True}),
    ("Llama-3.2-1B", {"optim": "adamw_8bit"}),
    ("Qwen3-0.6B", {}),
    ("Llama-3-8B", QLORA),
    ("Llama-3-8B", QLORA | {"per_device_train_batch_size": 4, "max_length": 2048}),
    ("Llama-3-8B", {"r": 16}),
]
STEPS = {  # case -> trainer, what its config says beside SIZE
    "sft, checkpointing": ("sft", {"gradient_checkpointing": True}),
    "sft": ("sft", {}),
    "sft, nll": ("sft", {"loss_type": "nll"}),
    "sft, liger": ("sft", {"use_liger_kernel": True}),
    "dpo, checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "dpo": ("dpo", {}),
    "grpo": ("grpo", {}),
}
COUNTED = 6  # steps whose seconds count, after two that do not


# --- What each case does, in a process of its own ---------------------------------------------------------------------


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def random_llama(tiny: bool):
    """A Llama of Llama-3.2-1B's shape with random weights in bf16, and the tokenizer of data/micro."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "micro" / "model")
    width, mlp, layers, heads, kv, vocabulary = (
        (64, 128, 2, 4, 2, len(tokenizer)) if tiny else (2048, 8192, 16, 32, 8, 128256)
    )
    config = LlamaConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, tokenizer


def one_memory(architecture: str, settings: dict, tiny: bool) -> dict:
    """The peak of a real step, and the estimate of it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from oracles.real_step import measure

    from ftlab.memory import architectures, estimate

    shape, settings = architectures()[architecture], SIZE | settings
    if tiny:
        import dataclasses

        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 16}
        shape = dataclasses.replace(shape, num_attention_heads=4, num_key_value_heads=2, **small)
        settings |= {"max_length": 32}
    predicted, on = estimate(shape, **settings), device()
    peak = measure(shape, on=on, **settings).peak_bytes
    ratio = round(predicted.peak_bytes / peak, 4)
    return {"settings": settings, "measured_bytes": peak, "estimated_bytes": predicted.peak_bytes, "ratio": ratio}


def one_step(kind: str, changes: dict, tiny: bool) -> dict:
    """Seconds of a step, by the clock between the ends of two, and the peak bytes of the run."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from ftlab import speed_up
    from ftlab.cpu import LOGPS

    class Clock(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012  of the one run of this process

        def on_step_end(self, args, state, control, **_):
            if device() == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    words, (model, tokenizer) = 40 if tiny else 700, random_llama(tiny)
    question = [{"role": "user", "content": "late orders in Pune " * (words // 4)}]
    answers = [[{"role": "assistant", "content": text * (words // 8)}] for text in ("they are few ", "ask me again ")]
    rows = {
        "sft": {"prompt": question, "completion": answers[0]},
        "dpo": {"prompt": question, "chosen": answers[0], "rejected": answers[1]},
        "grpo": {"prompt": question},
    }[kind]
    steps, batch = COUNTED + 2, 4
    asked = {
        "max_steps": steps, "per_device_train_batch_size": batch, "gradient_checkpointing": False, "bf16": True,
        "use_cpu": device() == "cpu", "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    if kind == "grpo":
        asked |= {"num_generations": batch, "max_completion_length": 8 if tiny else 128}
    else:
        asked |= {"max_length": 64 if tiny else 1024}
    trainers = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}
    config, trainer = trainers[kind]
    with tempfile.TemporaryDirectory() as folder:
        rewards = {"reward_funcs": lambda completions, **_: [float(len(str(c))) for c in completions]}
        made = trainer(
            model, args=config(folder, **asked | changes), processing_class=tokenizer,
            train_dataset=Dataset.from_list([rows] * steps * batch), callbacks=[Clock()],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            **(rewards if kind == "grpo" else {}),
        )  # fmt: skip
        if device() == "cuda":
            speed_up(made)  # says in a line why it leaves the trainer as it is
            torch.cuda.reset_peak_memory_stats()
        made.train()
    taken = [b - a for a, b in zip(Clock.ends[1:], Clock.ends[2:], strict=False)]
    peak = torch.cuda.max_memory_allocated() if device() == "cuda" else harness.peak_bytes()
    kept = "compute_loss" not in vars(made) and LOGPS not in vars(made)
    return {"seconds": harness.spread(taken), "peak_bytes": peak, "config": changes, "speed_up_left_it_plain": kept}


def one_nf4(rows: int, columns: int, double: bool, tiny: bool) -> dict:
    """The same random weight quantized by bitsandbytes on this device and by ours on the CPU: what differs."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from ftlab.scratch.quant import dequantize_nf4, quantize_nf4

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    on = weight.to(device())
    packed, state = quantize_4bit(on, blocksize=64, quant_type="nf4", compress_statistics=double)
    theirs = dequantize_4bit(packed, state).cpu()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        dequantize_4bit(packed, state)
        if device() == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    result = {"shape": [rows, columns], "double_quant": double, "dequantize_seconds": statistics.median(seconds)}
    if not double:
        ours = dequantize_nf4(*quantize_nf4(weight), weight.shape)
        result |= {"weights_equal": bool(torch.equal(ours, theirs)), "largest_gap": (ours - theirs).abs().max().item()}
    return result | {"mean_error": (theirs - weight).abs().mean().item()}


def one_answers(batch: int, tiny: bool) -> dict:
    """Tokens a second of greedy answers, the first run not counted."""
    import torch

    from ftlab import answers

    model, tokenizer = random_llama(tiny)
    model.generation_config.eos_token_id = model.config.vocab_size  # an id that no token has: no answer ends early
    length = 8 if tiny else 128
    prompts = [[{"role": "user", "content": f"How many late orders in month {i % 6 + 1}?"}] for i in range(batch)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        answers(model, tokenizer, prompts, max_new_tokens=length, batch_size=batch)
        if device() == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:])
    return {"batch": batch, "new_tokens": length, "seconds": best, "tokens_per_second": batch * length / best}


# --- The parts --------------------------------------------------------------------------------------------------------


def cases(part: str, tiny: bool) -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, arguments) of each case of a part."""
    if part == "memory":
        for architecture, settings in MEMORY[:2] if tiny else MEMORY:
            yield f"{architecture} {json.dumps(settings)}", one_memory, (architecture, settings)
    elif part == "steps":
        for name, (kind, changes) in STEPS.items():
            yield name, one_step, (kind, changes)
    elif part == "nf4":
        for rows, columns in [(64, 128)] if tiny else [(4096, 4096), (4096, 14336)]:
            for double in (False,) if tiny else (False, True):
                yield f"{rows} x {columns}, double {double}", one_nf4, (rows, columns, double)
    else:
        for batch in (4,) if tiny else (1, 8, 64):
            yield f"batch {batch}", one_answers, (batch,)


def run(part: str, tiny: bool, to: Path, machine: dict) -> dict:
    """Every case of a part, as far as its time goes, written to <to>/<part>.json; a case that fails says how."""
    begun, found, left_out = time.monotonic(), {}, []
    for name, function, arguments in cases(part, tiny):
        if not tiny and time.monotonic() - begun > SECONDS[part]:
            left_out.append(name)
            continue
        try:
            found[name] = harness.alone(function, *arguments, tiny)
        except Exception as error:  # one case less; the others count
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        print(part, name, json.dumps(found[name])[:160], flush=True)
    result = {**machine, "tiny": tiny, "cases": found, "left_out": left_out}
    to.mkdir(parents=True, exist_ok=True)
    (to / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def card() -> dict | None:
    """The GPU's name and bytes; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(SECONDS), help=f"of {', '.join(SECONDS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the command where no GPU is")
    parser.add_argument("--to", type=Path, help="folder of the results; needed with --tiny")
    asked = parser.parse_args(arguments)
    if wrong := set(asked.parts) - set(SECONDS):
        parser.error(f"got {', '.join(sorted(wrong))}, wanted some of {', '.join(SECONDS)}")
    if asked.tiny and not asked.to:
        parser.error("--tiny leaves nothing in experiments/gpu: name a folder with --to")
    machine = {"environment": harness.environment(), "card": harness.alone(card)}
    if not asked.tiny and machine["card"] is None:
        raise SystemExit("no CUDA GPU here. To try the command: python bench/gpu.py --tiny --to runs/gpu")
    begun = time.monotonic()
    results = [run(part, asked.tiny, asked.to or TO, machine) for part in asked.parts]
    failed = [name for result in results for name, case in result["cases"].items() if "failed" in case]
    print(f"{time.monotonic() - begun:.0f} s; {len(failed)} cases failed {failed}")


if __name__ == "__main__":
    main()
