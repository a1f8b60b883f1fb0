"""Notebook 03: the NF4 quantizer, the bytes of a QLoRA run, its trainer, and the merge."""

import contextlib
import functools
import logging
import tempfile
import warnings
from random import Random

from ftlab.exercises.core import AS_GIVEN, Exercise, Slip, same
from ftlab.exercises.differences import first_difference
from ftlab.exercises.gradients import mistakes
from ftlab.exercises.training import MICRO, ask_row, no_bars, sft, trainer_slip, training_slip, workplace

# --- 03.1: quantize a block -------------------------------------------------------------------------------------------


def my_quantize(block, levels):
    absmax = block.abs().max()
    distances = (block / absmax - levels[:, None]).abs()  # (levels, block)
    return distances.argmin(0), absmax


def _codes(values, levels):
    return (values - levels[:, None]).abs().argmin(0)


def _below(block, levels):
    import torch

    absmax = block.abs().max()
    return (torch.searchsorted(levels, block / absmax, right=True) - 1).clamp(min=0), absmax


def _evenly(block, levels):
    absmax = block.abs().max()
    return ((block / absmax + 1) / 2 * (len(levels) - 1)).round().int(), absmax


QUANTIZERS = {
    "absmax is the largest magnitude, and the largest weight may be a negative one": lambda block, levels: (
        _codes(block / block.max(), levels), block.max()),
    "divide by absmax first: the levels lie between -1 and 1": lambda block, levels: (
        _codes(block, levels), block.abs().max()),
    "a code is the number of a level, not the level itself": lambda block, levels: (
        levels[_codes(block / block.abs().max(), levels)], block.abs().max()),
    "that is the level below each weight; the nearest one may lie above": _below,
    "that rounds to evenly spaced levels: look up the nearest one of `levels`": _evenly,
    "codes come first, then absmax": lambda block, levels: my_quantize(block, levels)[::-1],
    "absmax is wanted, not 1 / absmax": lambda block, levels: (
        my_quantize(block, levels)[0], 1 / block.abs().max()),
    "absmax is missing: return codes and absmax": lambda block, levels: my_quantize(block, levels)[0],
}  # fmt: skip


def _block(rng: Random) -> tuple:
    """A block and levels, NF4's or others; no weight lies so near a threshold that rounding decides."""
    import torch

    from ftlab.scratch.quant import decision_thresholds, nf4_levels

    own = sorted([-1.0, 0.0, 1.0, *(rng.uniform(-1, 1) for _ in range(13))])
    levels = nf4_levels() if rng.random() < 0.5 else torch.tensor(own)
    block = torch.tensor([rng.gauss(0, rng.choice([0.02, 1.0, 5.0])) for _ in range(rng.choice([16, 32, 64]))])
    block = block[(block / block.abs().max() - decision_thresholds(levels)[:, None]).abs().amin(0) > 1e-4]
    largest = block.abs().argmax()
    block[largest] = -block[largest].abs() if rng.random() < 0.7 else block[largest].abs()
    return block, levels


def _same_block(got, wanted) -> bool:
    """Equal; an absmax of shape (1,), as bitsandbytes keeps it for one block, is right too."""
    pair = isinstance(got, list | tuple) and len(got) == 2
    return same((got[0], got[1][0]) if pair and getattr(got[1], "shape", None) == (1,) else got, wanted)


# --- 03.2: what a QLoRA run holds -------------------------------------------------------------------------------------


def my_bytes(linear, rest, lora):
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    return linear * bits / 8 + 2 * rest + 16 * lora


BYTES = {
    "the constants are missing: 8 bits for 64 weights, and 32 bits for 256 of those": lambda linear, rest, lora: (
        linear * 4 / 8 + 2 * rest + 16 * lora),
    "that is without double quantization: the constants take 8 bits here": lambda linear, rest, lora: (
        linear * 4.5 / 8 + 2 * rest + 16 * lora),
    "the second constants are missing: 32 bits for 256 blocks of 64": lambda linear, rest, lora: (
        linear * 4.125 / 8 + 2 * rest + 16 * lora),
    "these are bits: 8 of them make a byte": lambda linear, rest, lora: (
        linear * (4 + 8 / 64 + 32 / (64 * 256)) + 16 * rest + 128 * lora),
    "embedding, head and norms stay in 16 bits": lambda linear, rest, lora: (
        (linear + rest) * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 16 * lora),
    "the adapter has gradients and Adam's states too: 16 bytes for each of its numbers": lambda linear, rest, lora: (
        linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * rest + 2 * lora),
    "the adapter is missing": lambda linear, rest, lora: linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * rest,
    "frozen weights have no gradient and no Adam states": lambda linear, rest, lora: 16 * (linear + rest + lora),
}  # fmt: skip


def _sizes(rng: Random) -> tuple[int, int, int]:
    return rng.randrange(10**8, 10**11), rng.randrange(10**7, 10**9), rng.randrange(10**6, 10**9)


# --- 03.3: train ------------------------------------------------------------------------------------------------------


def my_qlora(folder, rows):
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
        args=SFTConfig(
            "runs/exercise", learning_rate=3e-3, per_device_train_batch_size=4, bf16=False, use_cpu=True
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip


def _qlora(nf4: dict | None, lora: dict, **changed):
    """my_qlora with some arguments changed; None: not quantized."""

    def build(folder, rows):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantized = {} if nf4 is None else {"quantization_config": BitsAndBytesConfig(**four | nf4)}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantized)
        config = {"learning_rate": 3e-3, "bf16": False} | changed
        return sft(model, AutoTokenizer.from_pretrained(folder), rows, lora, **config)

    return build


QLORAS = {
    "the base is not in 4 bits: give from_pretrained a quantization_config": _qlora(None, {}),
    'bitsandbytes takes FP4 unless you say bnb_4bit_quant_type="nf4"': _qlora({"bnb_4bit_quant_type": "fp4"}, {}),
    "the constants are kept in fp32: bnb_4bit_use_double_quant=True": _qlora({"bnb_4bit_use_double_quant": False}, {}),
    'some linear layers have no LoRA: target_modules="all-linear"': _qlora(
        {}, {"target_modules": ["q_proj", "v_proj"]}
    ),
    "modules_to_save trains whole layers beside LoRA": _qlora({}, {"modules_to_save": ["embed_tokens"]}),
    "the rate is too low for so small a model and 20 steps: section 3 has 3e-3": _qlora({}, {}, learning_rate=2e-5),
    "the rate is too high": _qlora({}, {}, learning_rate=1.0),
    "return the trainer itself; the check calls train()": lambda folder, rows: my_qlora(folder, rows).model,
}


def _qlora_slip(mine) -> Slip | None:
    from datasets import Dataset
    from transformers import AutoTokenizer

    words = dict(zip(("plain", "fp4", "double", "linear", "save", "low", "high", "train"), QLORAS, strict=True))
    rng = Random()
    rows, held_out = (Dataset.from_list([ask_row(rng) for _ in range(n)]) for n in (32, 8))
    with workplace():
        trainer = mine(MICRO, rows)
        model = getattr(trainer, "model", None)
        modules = model.named_modules() if getattr(model, "is_loaded_in_4bit", False) else ()
        four_bit = {name: module for name, module in modules if hasattr(module, "quant_state")}
        linear = [name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in four_bit]
        if slip := trainer_slip(trainer, linear, words):
            return slip
        states = [module.weight.quant_state for module in four_bit.values()]
        if not states:
            return Slip("a base that is not quantized", "a base in 4 bits", words["plain"])
        if (kind := states[0].quant_type) != "nf4":
            return Slip(kind, "nf4", words["fp4"])
        if not all(state.nested for state in states):
            return Slip("constants in fp32", "constants in 8 bits", words["double"])
        for module in four_bit.values():  # else some CPUs repack a layer at its first answer, and it cannot be trained
            module.support_avx512bf16_for_cpu = False
        if model.device.type == "cpu":  # bf16 takes many times as long on a CPU without units for it
            for p in model.parameters():
                p.data = p.data.float() if p.requires_grad else p.data
        before = [module.weight.data.clone() for module in four_bit.values()]
        slip = training_slip(trainer, AutoTokenizer.from_pretrained(MICRO), held_out, 20, 2e-2, words)
    if any((old != module.weight.data).any() for old, module in zip(before, four_bit.values(), strict=True)):
        return Slip("other 4-bit weights than before", "the base as it was", "something besides LoRA is trained")
    return slip


# --- 03.4: debug this, the merge --------------------------------------------------------------------------------------


def my_merge(base, adapter, bnb_config):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=bnb_config, dtype=torch.float32)
    return PeftModel.from_pretrained(model.dequantize(), adapter).merge_and_unload()


def _merger(config=None, dequantize: bool = True, adapter: bool = True, merge: bool = True, dtype: str = "float32"):
    """my_merge with one thing changed. config: a function of the right one."""

    def build(base, folder, bnb_config):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        chosen = config(bnb_config) if config else bnb_config
        kind = {} if chosen is None else {"quantization_config": chosen}
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), **kind)
        model = model.dequantize() if dequantize and chosen is not None else model
        model = PeftModel.from_pretrained(model, folder) if adapter else model
        return model.merge_and_unload() if merge and adapter else model

    return build


def _default(_):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True)


MERGERS = {
    AS_GIVEN: _merger(_default, dequantize=False),
    "the sum is rounded to 4 bits again: dequantize the base before the adapter goes on": _merger(dequantize=False),
    "the adapter was not trained on the original weights: load the base with bnb_config": _merger(lambda _: None),
    "this is another 4-bit base than in training: use the bnb_config that is handed in": _merger(_default),
    "the adapter is still apart: merge_and_unload()": _merger(merge=False),
    "the adapter is not in it": _merger(adapter=False),
    "merged in bf16, which rounds the sum a little: keep dtype=torch.float32 here": _merger(dtype="bfloat16"),
}


@functools.cache
def _trained() -> tuple:
    """(TemporaryDirectory with an adapter on micro's NF4 base, the config, token ids, the logits before any merge)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(MICRO, quantization_config=nf4, dtype=torch.float32)
    lora = get_peft_model(
        model.dequantize(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    folder = tempfile.TemporaryDirectory(prefix="merge-")  # goes when Python ends
    lora.save_pretrained(folder.name)
    ids = torch.randint(3, 2000, (4, 12))
    return folder, nf4, ids, _what_it_is(lora, ids)


def _what_it_is(model, ids) -> dict | str:
    """The logits, and whether a plain model without adapter and 4-bit layers gives them."""
    import torch

    if not hasattr(model, "named_modules"):
        return f"a {type(model).__name__}"
    kinds = {type(module).__name__ for module in model.modules()}
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids.to(next(model.parameters()).device)).logits.float().cpu()
    return {"4-bit": "Linear4bit" in kinds, "adapter apart": hasattr(model, "peft_config"), "logits": logits}


@contextlib.contextmanager
def _quiet():
    """Without bars, PEFT's warning of a merge in 4 bits and the note on dequantizing: mistakes are made on purpose."""
    logger = logging.getLogger("transformers.integrations.bitsandbytes")
    level = logger.level
    with no_bars(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _merge_slip(mine) -> Slip | None:
    made = {}
    with _quiet():
        folder, nf4, ids, wanted = _trained()
        model = mine(MICRO, folder.name, nf4)
        got = _what_it_is(model, ids)
        if isinstance(got, str):
            return Slip(got, "a merged model", "")
        wanted = wanted | {"adapter apart": False}
        if _alike(got, wanted):
            return None
        for words, slip in MERGERS.items():
            made[words] = _made_by(slip)
    likely = next((words for words, other in made.items() if _alike(got, other)), "")
    same_shape = got["logits"].shape == wanted["logits"].shape
    apart = (got["logits"] - wanted["logits"]).abs().max().item() if same_shape else float("inf")
    said = [f"{name}: {got[name]}" for name in ("4-bit", "adapter apart") if got[name] != wanted[name]]
    said.append(f"logits up to {apart:.3f} away from those before the merge")
    return Slip(", ".join(said), "a plain model with the logits of the 4-bit model and its adapter", likely)


@functools.cache
def _made_by(slip) -> dict:
    folder, nf4, ids, _ = _trained()
    return _what_it_is(slip(MICRO, folder.name, nf4), ids)


def _alike(a: dict, b: dict) -> bool:
    return all(a[name] == b[name] for name in ("4-bit", "adapter apart")) and same(a["logits"], b["logits"], 1e-3, 1e-3)


EXERCISES = {
    "03.1": Exercise(
        "Quantize one block: the code of each weight, and the block's absmax",
        lambda mine: first_difference(mine, my_quantize, _block, QUANTIZERS, equal=_same_block),
        (
            "First absmax, the largest magnitude in the block. Divide the block by it. Which level is nearest to "
            "each weight now?",
            "Compute the distance of each weight to each level. The code is the number of the nearest level: argmin.",
            "distances = (block / absmax - levels[:, None]).abs() has a row for each level. distances.argmin(0) "
            "gives the codes.",
        ),
        my_quantize,
        QUANTIZERS | mistakes(my_quantize, [], ["block", "levels"]),
        difficulty=2,
        minutes=10,
    ),
    "03.2": Exercise(
        "Count the bytes that a QLoRA run holds all the time",
        lambda mine: first_difference(mine, my_bytes, _sizes, BYTES),
        (
            "Three terms: the linear layers in NF4, the rest in 16 bits, the adapter with all that training needs.",
            "With double quantization a weight takes 4 bits. 64 weights share a constant of 8 bits, and 256 such "
            "constants share one of 32 bits. The rest takes 2 bytes a weight, the adapter 16.",
            "The first term is linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8, in bytes. Add 2 * rest and 16 * lora.",
        ),
        my_bytes,
        BYTES,
        difficulty=1,
        minutes=10,
    ),
    "03.3": Exercise(
        "A QLoRA trainer. The check trains it for 20 steps on the small model",
        _qlora_slip,
        (
            "The base is quantized when it is loaded: BitsAndBytesConfig goes into from_pretrained. LoRA comes on "
            "top: LoraConfig goes into SFTTrainer.",
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), as '
            'quantization_config. load_in_4bit=True alone gives FP4. LoraConfig has target_modules="all-linear".',
            "AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32) and "
            'SFTConfig("runs/exercise", learning_rate=3e-3, per_device_train_batch_size=4, bf16=False, '
            "use_cpu=True). On a GPU leave the last two out.",
        ),
        my_qlora,
        QLORAS,
        seconds=600,
        difficulty=2,
        minutes=15,
    ),
    "03.4": Exercise(
        "Debug this: the merged model answers differently",
        _merge_slip,
        (
            "Is the base that is loaded here the base of the training? And what do 4-bit layers do to the sum of "
            "base and adapter?",
            "BitsAndBytesConfig(load_in_4bit=True) means FP4 without double quantization: use bnb_config. A merge "
            "into 4-bit layers rounds the sum: model.dequantize() gives plain layers with the same values.",
            "model = AutoModelForCausalLM.from_pretrained(base, quantization_config=bnb_config, "
            "dtype=torch.float32). Then PeftModel.from_pretrained(model.dequantize(), adapter).merge_and_unload().",
        ),
        my_merge,
        MERGERS,
        seconds=300,
        difficulty=2,
        minutes=15,
    ),
}
