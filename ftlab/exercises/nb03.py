"""Notebook 03: the NF4 quantizer, the bytes of a QLoRA run, its trainer, and the merge."""

import contextlib
import functools
import logging
import tempfile
import warnings
from collections.abc import Callable
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


# --- 03.2: double quantization, there and back ------------------------------------------------------------------------


def my_store(weights, levels, levels8, block, group):
    import torch

    def nearest(values, table):
        return (values[..., None] - table).abs().argmin(-1)

    blocks = weights.view(-1, block)
    absmax = blocks.abs().amax(1)  # one a block
    codes = nearest(blocks / absmax[:, None], levels).flatten()
    packed = 16 * codes[::2] + codes[1::2]

    mean = absmax.mean()
    groups = (absmax - mean).view(-1, group)
    absmax2 = groups.abs().amax(1)  # one a group
    constants = nearest(groups / absmax2[:, None], levels8).flatten()

    codes = torch.stack([packed // 16, packed % 16], 1).view(-1, block)
    absmax = (levels8[constants].view(-1, group) * absmax2[:, None]).flatten() + mean
    read = (levels[codes] * absmax[:, None]).flatten()
    return {"packed": packed, "constants": constants, "absmax2": absmax2, "mean": mean, "read": read}


def _store(
    pack: Callable | None = None,
    mean: Callable | None = None,
    largest: Callable | None = None,
    code8: Callable | None = None,
    measure: str = "true",
    read: str = "stored",
    **changed: Callable,
) -> Callable:
    """my_store with one thing done in another way; changed: of what is returned, from all there is."""

    def answer(weights, levels, levels8, block, group):
        import torch

        blocks = weights.view(-1, block)
        absmax = blocks.abs().amax(1)
        center = (mean or (lambda all_, _: all_.mean().expand_as(all_)))(absmax, group)
        groups = (absmax - center).view(-1, group)
        absmax2 = (largest or (lambda each: each.abs().amax(1)))(groups)
        scaled = groups / absmax2[:, None]
        constants = (code8 or _codes8)(scaled, levels8).flatten()
        back = (levels8[constants.clamp(0, 255)].view(-1, group) * absmax2[:, None]).flatten()
        stored = back + center
        by = absmax if measure == "true" else stored
        codes = _codes((blocks / by[:, None]).flatten(), levels)
        packed = (pack or (lambda each: 16 * each[::2] + each[1::2]))(codes)
        scales = {"true": absmax, "without the mean": back, "none": torch.ones_like(back)}
        scale = scales.get(read, stored)
        swapped = codes.view(-1, 2).flip(1).flatten() if read == "swapped" else codes
        values = (levels[swapped].view(-1, block) * scale[:, None]).flatten()
        found = {"packed": packed, "constants": constants, "absmax2": absmax2, "mean": center[0], "read": values}
        return found | {name: change(found, levels8) for name, change in changed.items()}

    return answer


def _codes8(scaled, levels8):
    return (scaled[..., None] - levels8).abs().argmin(-1)


def _halves(codes):
    half = len(codes) // 2
    return 16 * codes[:half] + codes[half:]


def _mean_of_group(absmax, group):
    return absmax.view(-1, group).mean(1).repeat_interleave(group)


def _one_for_all(groups):
    return groups.abs().max().expand(len(groups))


STORES = {
    "the first code of a pair is the byte's high half: 16 times the first, plus the second": _store(
        pack=lambda codes: codes[::2] + 16 * codes[1::2]
    ),
    "that is one code a byte: two neighbours share one": _store(pack=lambda codes: codes),
    "neighbours share a byte, not the first and the second half of the weights": _store(pack=_halves),
    "take the mean off first: the constants are all positive, and half of `levels8` is negative": _store(
        mean=lambda absmax, group: 0 * absmax
    ),
    "one mean for all constants, not one a group": _store(mean=_mean_of_group),
    "one absmax2 a group, not one for all constants": _store(largest=_one_for_all),
    "absmax2 is the largest magnitude, and the constant furthest from the mean may lie below it": _store(
        largest=lambda groups: groups.amax(1)
    ),
    "that is the range of a group; absmax2 is its largest magnitude": _store(
        largest=lambda groups: groups.amax(1) - groups.amin(1)
    ),
    "that rounds to evenly spaced steps: look up the nearest one of `levels8`": _store(
        code8=lambda scaled, levels8: ((scaled + 1) / 2 * 255).round().long()
    ),
    "that is the level below each constant; the nearest one may lie above": _store(
        code8=lambda scaled, levels8: ((scaled[..., None] >= levels8).sum(-1) - 1).clamp(min=0)
    ),
    "a constant's code is the number of a level, not the level itself": _store(
        constants=lambda found, levels8: levels8[found["constants"]]
    ),
    "the weights are divided by the true absmax; what is stored of it is for the way back": _store(measure="stored"),
    "the way back has only what is stored: read the constants from their codes": _store(read="true"),
    "the mean is missing on the way back": _store(read="without the mean"),
    "these are levels: on the way back multiply by the block's constant": _store(read="none"),
    "on the way back the two codes of a byte come out in the wrong order": _store(read="swapped"),
}


def _to_store(rng: Random) -> tuple:
    """Weights, NF4's levels or others, the 8-bit levels, block and group; nothing lies near a threshold."""
    import torch

    from ftlab.scratch.quant import decision_thresholds, dynamic_levels, nf4_levels

    own = sorted([-1.0, 0.0, 1.0, *(rng.uniform(-1, 1) for _ in range(13))])
    levels = nf4_levels() if rng.random() < 0.5 else torch.tensor(own)
    levels8, block, group = dynamic_levels(), rng.choice([4, 8, 16]), rng.choice([2, 4, 8])

    def clear(values, table, least):
        return (values[..., None] - decision_thresholds(table)).abs().min() > least

    while True:
        size = [rng.uniform(0.5, 3) for _ in range(group * rng.choice([2, 3]))]
        weights = torch.tensor([[rng.gauss(0, each) for _ in range(block)] for each in size])
        absmax = weights.abs().amax(1)
        groups = (absmax - absmax.mean()).view(-1, group)
        scaled = groups / groups.abs().amax(1, keepdim=True)
        quotients = weights / absmax[:, None]
        # bf16 and the order of a sum may move a quotient by so much
        if scaled.abs().min() > 0.02 and clear(scaled, levels8, 1e-5) and clear(quotients, levels, 1e-5):
            return weights.flatten(), levels, levels8, block, group


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
    "the rate is too low for so small a model and 20 steps: this notebook has 3e-3": _qlora({}, {}, learning_rate=2e-5),
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


def _single_constants(_):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


MERGERS = {
    AS_GIVEN: _merger(_default, dequantize=False),
    "the sum is rounded to 4 bits again: dequantize the base before the adapter goes on": _merger(dequantize=False),
    "the adapter was not trained on the original weights: load the base with bnb_config": _merger(lambda _: None),
    "this is another 4-bit base than in training: use the bnb_config that is handed in": _merger(_default),
    "the adapter is still apart: merge_and_unload()": _merger(merge=False),
    "the adapter is not in it": _merger(adapter=False),
    "this base has other constants than in training: use the bnb_config that is handed in": _merger(_single_constants),
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
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    found = {"4-bit": "Linear4bit" in kinds, "adapter apart": hasattr(model, "peft_config")}
    return found | {"16 bits": half, "logits": logits}


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


def _merge_slip(mine) -> Slip | str | None:
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
        if _rounded(got, wanted):
            most = (got["logits"] - wanted["logits"]).abs().max().item()
            return f"merged in 16 bits, which rounds the sums: the logits moved by up to {most:.2f}"
        for words, slip in MERGERS.items():
            made[words] = _made_by(slip)
    likely = next((words for words, other in made.items() if _alike(got, other) or _rounded(got, other)), "")
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


def _rounded(got: dict, other: dict) -> bool:
    """Is this, but for the rounding to 16 bits, the other model?

    The right merge in bf16 has logits that are off by 0.7 % of their length, where constants that were not quantized
    would hide (0.4 %). All other mistakes are off by 6 % and more.
    """
    if not got["16 bits"] or got["4-bit"] or got["adapter apart"]:
        return False
    ours, theirs = got["logits"], other["logits"]
    return ours.shape == theirs.shape and ((ours - theirs).norm() < 0.02 * theirs.norm()).item()


# --- 03.5: the ladder out of "CUDA out of memory" ---------------------------------------------------------------------


def my_remedy(model, card, step):
    from ftlab import memory

    def fits(settings):
        return memory.verdict(card, model, **settings) == "fits"

    def climbed(settings):  # back up: fewer and longer passes
        while settings["gradient_accumulation_steps"] > 1:
            more = dict(settings)
            more["per_device_train_batch_size"] *= 2
            more["gradient_accumulation_steps"] //= 2
            if not fits(more):
                break
            settings = more
        return settings

    rows = step["per_device_train_batch_size"] * step["gradient_accumulation_steps"]
    rungs = {
        "bf16": {"dtype": "bfloat16"},
        "checkpointing": {"gradient_checkpointing": True},
        "one row": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows},
        "4 bits": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        "paged": {"optim": "paged_adamw_8bit"},
        "half": {"max_length": step["max_length"] // 2},
    }
    now = dict(step)  # a copy: the caller's settings stay as they are
    if fits(now):
        return "fits", now
    for name, change in rungs.items():
        now.update(change)
        if fits(now):
            return name, climbed(now)
    return "larger card", now


RUNGS = ("fits", "bf16", "checkpointing", "one row", "4 bits", "paged", "half")


def _rung(name: str, step: dict) -> dict:
    """What a rung changes in a step."""
    rows = step["per_device_train_batch_size"] * step["gradient_accumulation_steps"]
    return {
        "fits": {},
        "bf16": {"dtype": "bfloat16"},
        "checkpointing": {"gradient_checkpointing": True},
        "one row": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows},
        "4 bits": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        "paged": {"optim": "paged_adamw_8bit"},
        "half": {"max_length": step["max_length"] // 2},
    }[name]


def _doubled(step: dict) -> dict | None:
    """Twice the rows in half the passes; None where one pass has all rows of the step."""
    rows, passes = step["per_device_train_batch_size"], step["gradient_accumulation_steps"]
    if passes < 2:
        return None
    return step | {"per_device_train_batch_size": 2 * rows, "gradient_accumulation_steps": passes // 2}


def _rows_doubled(step: dict) -> dict | None:
    """Twice the rows in as many passes, a mistake: the step then has more rows."""
    more = _doubled(step)
    return more and more | {"gradient_accumulation_steps": step["gradient_accumulation_steps"]}


def _ladder(
    order: tuple[str, ...] = RUNGS,
    fits: Callable | None = None,
    builds: bool = True,
    rung: Callable = _rung,
    longer: Callable = _doubled,
    climbs: int = 20,
    too_far: bool = False,
    answer: Callable = lambda name, step: (name, step),
    last: str = "larger card",
) -> Callable:
    """my_remedy with one thing done in another way. climbs: how often the rows may double."""

    def remedy(model, card, step):
        from ftlab import memory

        decides = fits or (lambda *of, **how: memory.verdict(*of, **how) == "fits")

        def climbed(now):
            for _ in range(climbs):
                more = longer(now)
                if more is None:
                    break
                if not decides(card, model, **more):
                    return more if too_far else now
                now = more
            return now

        now = dict(step)
        for name in order:
            if not builds:
                now = dict(step)
            now.update(rung(name, step))
            if decides(card, model, **now):
                return answer(name, now if name == "fits" else climbed(now))
        return answer(last, now)

    return remedy


def _not_too_large(card, model, **step) -> bool:
    from ftlab import memory

    return memory.fits(card, model, **step)


def _as_sold(card, model, **step) -> bool:
    from ftlab import memory

    return memory.estimate(model, **step).peak_bytes <= memory.gpus()[card].memory_bytes


def _rows_only(name: str, step: dict) -> dict:
    change = _rung(name, step)
    change.pop("gradient_accumulation_steps", None)
    return change


def _rows_not_multiplied(name: str, step: dict) -> dict:
    change = _rung(name, step)
    if "gradient_accumulation_steps" in change:
        change["gradient_accumulation_steps"] = step["per_device_train_batch_size"]
    return change


def _single(name: str, step: dict) -> dict:
    change = _rung(name, step)
    change.pop("bnb_4bit_use_double_quant", None)
    return change


def _moved(name: str, place: int) -> tuple[str, ...]:
    rest = [each for each in RUNGS if each != name]
    return (*rest[:place], name, *rest[place:])


REMEDIES = {
    '"may fit" is not "fits": beside the tensors there must be room for what the allocator reserves': _ladder(
        fits=_not_too_large
    ),
    "a step can't have all of a card's memory: ask memory.verdict": _ladder(fits=_as_sold),
    "the rungs build on each other: keep what the ones before have changed": _ladder(builds=False),
    "one row a pass, and as many more passes: gradient_accumulation_steps keeps the rows a step": _ladder(
        rung=_rows_only
    ),
    "the rows a step are rows a pass times the passes that accumulate already": _ladder(rung=_rows_not_multiplied),
    "the step may fit as it is: then nothing has to change": _ladder(order=RUNGS[1:]),
    "the dtype comes first: it costs nothing": _ladder(order=_moved("bf16", 5)),
    "4 bits come late: they cost time, and perhaps quality": _ladder(order=_moved("4 bits", 1)),
    "shorter rows come last: they change what is learned": _ladder(order=_moved("half", 1)),
    "one row a pass comes after checkpointing, whose cost is smaller and known": _ladder(order=_moved("one row", 2)),
    "a paged 8-bit optimizer comes after 4 bits: an adapter's states are small, so it saves little": _ladder(
        order=_moved("paged", 2)
    ),
    "climb back: while it still fits, twice the rows of a pass and half the passes": _ladder(climbs=0),
    "climb back until it stops fitting, not once": _ladder(climbs=1),
    "that is one step too far back: the last rows that still fit": _ladder(too_far=True),
    "half the passes when the rows of a pass double: a step keeps its rows": _ladder(longer=_rows_doubled),
    "without double quantization: bnb_4bit_use_double_quant=True": _ladder(rung=_single),
    "half the length does not fit either: what is left is a larger card": _ladder(last="half"),
    "the name comes first, then the settings": _ladder(answer=lambda name, step: (step, name)),
    "the settings are missing: return the name and the settings": _ladder(answer=lambda name, step: name),
}


def _goes_one_way(model: str, card: str, name: str, now: dict) -> bool:
    """Whether no longer pass fits again beyond the first that doesn't: one pass alone needs no room to accumulate.

    Then a climb, step by step, and a try of each size end at the same rows.
    """
    from ftlab import memory

    more = None if name in ("fits", "larger card") else _doubled(now)
    while more:
        if memory.verdict(card, model, **more) == "fits":
            return False
        more = _doubled(more)
    return True


def _too_large(rng: Random) -> tuple:
    """A model, a card and a step, so that each rung is about as often the answer."""
    wanted, drawn = rng.choice([*RUNGS, "larger card"]), None
    for _ in range(60):
        model = rng.choice(["Llama-3.2-3B", "Llama-3.1-8B", "Qwen3-8B", "Qwen3-32B", "Llama-3.3-70B"])
        step = {
            "r": rng.choice([16, 64, 128]),
            "per_device_train_batch_size": rng.choice([1, 2, 4, 8]),
            "gradient_accumulation_steps": rng.choice([1, 2, 4]),
            "max_length": rng.choice([512, 1024, 2048, 4096, 8192]),
            "gradient_checkpointing": rng.random() < 0.5,
            "dtype": rng.choice(["bfloat16", "float32"]),
        }
        card = rng.choice(["L4", "RTX 4090", "RTX 5090", "A100-40GB", "A100-80GB", "H200"])
        name, now = my_remedy(model, card, step)
        if drawn and name != wanted:
            continue
        if _goes_one_way(model, card, name, now):
            drawn = model, card, step
            if name == wanted:
                break
    return drawn


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
        "Store weights with double quantization, and read them back",
        lambda mine: first_difference(mine, my_store, _to_store, STORES),
        (
            "Four steps: codes and absmax of each block, as in 03.1; two codes in a byte; the same once more for the "
            "constants, less their mean, with `levels8` and groups; and the way back from what is stored alone.",
            "weights.view(-1, block) has a block a row. packed is 16 * codes[::2] + codes[1::2], and back packed // 16 "
            "and packed % 16. Of the constants take absmax.mean() off, then (absmax - mean).view(-1, group).",
            "nearest = lambda values, table: (values[..., None] - table).abs().argmin(-1) does for both tables. Back: "
            "levels8[constants].view(-1, group) * absmax2[:, None] + mean gives a constant for each block.",
        ),
        my_store,
        STORES,
        difficulty=3,
        minutes=25,
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
    "03.5": Exercise(
        "Read a peak and name the remedy: the first rung of the ladder at which a step fits",
        lambda mine: first_difference(mine, my_remedy, _too_large, REMEDIES, n=150),
        (
            "Go down the ladder, one rung after the other. At each ask memory.verdict(card, model, **step): is the "
            'answer "fits"?',
            "A dict of name -> what that rung changes, in the order of the list. Take a copy of the "
            "settings, now = dict(step), and now.update(change) builds on the rungs before.",
            "for name, change in rungs.items(): now.update(change), and stop where "
            'memory.verdict(card, model, **now) is "fits". Then try twice the rows of a pass and half '
            "the passes, as long as that fits too and there are passes to halve.",
        ),
        my_remedy,
        REMEDIES,
        difficulty=2,
        minutes=15,
    ),
}
