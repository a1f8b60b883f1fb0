"""Old recipes with `fast: true` against TRL's trainer and PEFT's layers: same loss, same gradients, same adapter."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_cpu import ROWS

from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import _check_fast, sft_trainer, train


def recipe(model, **changes) -> Recipe:
    return Recipe(
        **{"model": str(model), "batch_size": 4, "max_steps": 4, "precision": "fp32", "warmup_steps": 0} | changes
    )


def loss_and_gradients(trainer, rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """One training step's, before the optimizer, with lora_B moved away from 0 (at 0, lora_A has no gradient)."""
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    return loss.item(), {name: w.grad for name, w in trainer.model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_loss_and_gradients_equal_trl_and_peft_in_fp32(tiny, tmp_path, rows):
    plain = sft_trainer(recipe(tiny), ROWS, None, tmp_path)
    quick = sft_trainer(recipe(tiny, fast=True), ROWS, None, tmp_path)
    (loss, gradients), (quick_loss, quick_gradients) = (loss_and_gradients(t, rows) for t in (plain, quick))
    assert quick_loss == pytest.approx(loss, rel=1e-6)
    assert quick_gradients.keys() == gradients.keys() and len(gradients) == 2 * 2 * 7  # A and B, 2 layers, 7 in each
    for name, gradient in gradients.items():
        torch.testing.assert_close(quick_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_on_the_real_model_in_bf16_it_is_as_near_to_fp32_as_autocast_is(tmp_path):
    """bf16 has 8 bits: both ways of computing are off, and must be off by about as much (norm over all gradients)."""
    runs = {}
    for name, changes in {
        "fp32": {},
        "trl": {"precision": "bf16"},
        "fast": {"precision": "bf16", "fast": True},
    }.items():
        trainer = sft_trainer(recipe("smollm2", **changes), ROWS, None, tmp_path)
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "trl"):
            runs[name] = loss_and_gradients(trainer, 4)
    truth, flat = runs["fp32"], {name: torch.cat([g.flatten() for g in run[1].values()]) for name, run in runs.items()}
    off = {name: ((flat[name] - flat["fp32"]).norm() / flat["fp32"].norm()).item() for name in ("trl", "fast")}
    assert off["fast"] < 1.2 * off["trl"], off
    assert abs(runs["fast"][0] - truth[0]) < 0.01 * truth[0]


def test_a_whole_run_ends_in_the_same_adapter(tiny, tmp_path):
    """Four optimizer steps of two accumulated batches, in fp32; evaluation too."""
    changes = {"batch_size": 2, "gradient_accumulation_steps": 2, "eval_steps": 2, "eval_file": "x", "logging_steps": 1}
    runs = [train(recipe(tiny, fast=f, **changes), ROWS, ROWS[:3], tmp_path / str(f)) for f in (False, True)]
    adapters = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in runs]
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, rtol=1e-3, atol=2e-5, msg=name)
    for key in ("loss", "eval_loss", "grad_norm"):
        assert runs[1].series(key)[1] == pytest.approx(runs[0].series(key)[1], rel=1e-4), key


def test_a_model_that_is_no_llama_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match="of type 'llama' on the CPU, this is 'gpt2'"):
        _check_fast(GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1)))


def test_a_run_cut_off_goes_on_to_the_same_bits(tiny, tmp_path):
    asked, file = recipe(tiny, fast=True, batch_size=2, save_steps=2, logging_steps=1), "adapter_model.safetensors"
    whole = (train(asked, ROWS, folder=tmp_path).folder / "adapter" / file).read_bytes()
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / name)
    seen = []
    again = train(asked, ROWS, folder=tmp_path, on_log=lambda record: seen.append(record["step"]))
    assert seen[0] == 3 and (again.folder / "adapter" / file).read_bytes() == whole


def test_several_processes_are_refused(tiny, monkeypatch):
    from ftlab.pipeline.models import load

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="fast: true is for one process, this is one of 2"):
        _check_fast(load(tiny)[0])
