"""ftlab.memory against oracles that share no code with it: MemTracker, autograd's own list, PEFT, bitsandbytes."""

import dataclasses

import pytest
import torch

from ftlab.memory import (
    Architecture,
    Setup,
    _constant_bytes,
    _cuda_rules,
    _materialize,
    _plan,
    _skeleton,
    _step,
    _tracker,
    architectures,
    estimate,
    measure,
)
from ftlab.pipeline.recipe import Recipe

TINY = Architecture("tiny", "llama", 64, 3, 4, 2, 16, 160, 1000, False, False, False)
BASE = Recipe(precision="fp32", batch_size=2, max_length=64)


class Silent:
    """A recorder that records nothing."""

    def enter(self, phase, kind):
        pass

    def mark(self, tensor, kind):
        pass

    def start(self):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_our_tracker_sees_the_same_peak_as_pytorchs(checkpointing):
    """torch.distributed._tools.mem_tracker.MemTracker, on the same step; ours adds kinds and phases.

    Full fine-tuning only: MemTracker puts hooks on the outputs of all modules, which fails on those of frozen ones.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    recipe, setup = BASE.replace(r=0, gradient_checkpointing=checkpointing), Setup(loss="full")
    plan = _plan(TINY, recipe, setup)

    def peak(tracker):
        model = _skeleton(TINY, recipe, setup, plan)
        _materialize(model, "cpu")
        if isinstance(tracker, MemTracker):
            tracker.track_external(model)
            with tracker:
                _step(model, recipe, setup, plan, "cpu", Silent())
            return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        with tracker:
            for tensor in (*model.parameters(), *model.buffers()):
                tracker.mark(tensor, "weights")
            _step(model, recipe, setup, plan, "cpu", tracker)
        return max(moment.total for moment in tracker.moments.values())

    assert peak(_tracker(plan)) == pytest.approx(peak(MemTracker()), rel=2e-3)


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"r": 0}], ids=["lora", "checkpointed", "full"]
)
def test_sft_trainer_itself_holds_what_measure_says(changes, tmp_path):
    """Two steps of TRL's SFTTrainer, bf16 autocast, everything counted; within the bytes of labels and log entries.

    Non-default flags: a ready data set (all rows max_length long, all tokens counted), no saving, CUDA's autocast list.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    recipe = Recipe(precision="bf16", batch_size=4, max_length=512).replace(**changes)
    plan = _plan(TINY, recipe, Setup())
    dtype = {2: torch.bfloat16, 4: torch.float32}[plan.held]
    model = AutoModelForCausalLM.from_config(TINY.config(), dtype=dtype, attn_implementation="sdpa")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(1000)}, unk_token="0"))
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        max_length=512,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        optim="adamw_torch",
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=16, target_modules=list(recipe.target_modules), task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2"),
        train_dataset=Dataset.from_list([{"input_ids": [5] * 512, "labels": [5] * 512}] * 8),
        args=arguments,
        peft_config=adapter if recipe.r else None,
    )
    tracker = _tracker(plan)
    with tracker, _cuda_rules("cpu"):
        for parameter in trainer.model.parameters():
            tracker.mark(parameter, "weights")
        trainer.train()
    peak = max(moment.total for moment in tracker.moments.values())
    assert peak == pytest.approx(measure(TINY, recipe, on="cpu").peak_bytes, rel=3e-3)
    assert estimate(TINY, recipe).peak_bytes == pytest.approx(peak, rel=1e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("r", [0, 8])
def test_activations_are_what_autograd_says_it_saves(r, attention):
    """Storages seen by saved_tensors_hooks in the decoder's forward pass, parameters left out, each counted once."""
    recipe, setup = BASE.replace(r=r), Setup(attention=attention)
    model = _skeleton(TINY, recipe, setup, _plan(TINY, recipe, setup))
    _materialize(model, "cpu")
    decoder = (model.get_base_model() if r else model).model
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    total = sum(storage.nbytes() for storage in saved.values() if storage.data_ptr() != output.data_ptr())
    predicted = estimate(TINY, recipe, setup).moments["forward"].kinds["activations"] - output.nbytes
    assert total == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_constants_are_those_of_bitsandbytes(quantization):
    """Every matrix of a real block, quantized for good: packed weights, absmax, code, and the second level's."""
    import bitsandbytes.functional as bnb

    one = dataclasses.replace(TINY, num_hidden_layers=1)
    recipe = Recipe(quantization=quantization)
    packed_bytes = constants = 0
    for n_in, n_out in one.linears.values():
        double = quantization == "nf4-double"
        packed, state = bnb.quantize_4bit(
            torch.randn(n_out, n_in), blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        packed_bytes += packed.nbytes
        constants += state.absmax.nbytes + state.code.nbytes
        constants += state.state2.absmax.nbytes + state.state2.code.nbytes if double else 0
    assert packed_bytes == one.linear_params // 2
    assert constants == _constant_bytes(_plan(one, recipe, Setup()))


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B"])
def test_parameters_and_adapters_are_those_of_transformers_and_peft(name):
    recipe, setup = Recipe(precision="bf16"), Setup()
    model = _skeleton(architectures()[name], recipe, setup, _plan(architectures()[name], recipe, setup))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (frozen, trained) == (architectures()[name].params, architectures()[name].lora_params(16))
    assert Architecture.from_config(model.config, name) == architectures()[name]
