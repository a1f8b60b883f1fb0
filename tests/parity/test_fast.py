"""Old recipes with `fast: true` against TRL's trainers and PEFT's layers: same loss, same gradients, same adapter."""

import math
import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cpu import ROWS
from test_cpu_dpo import PAIRS

from ftlab.pipeline import align, fast
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import sft_trainer, train


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
        fast.check(GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1)))


def test_a_run_cut_off_goes_on_to_the_same_bits(tiny, tmp_path):
    asked, file = recipe(tiny, fast=True, batch_size=2, save_steps=2, logging_steps=1), "adapter_model.safetensors"
    whole = (train(asked, ROWS, folder=tmp_path).folder / "adapter" / file).read_bytes()
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / name)
    seen = []
    again = train(asked, ROWS, folder=tmp_path, on_log=lambda record: seen.append(record["step"]))
    assert seen[0] == 3 and (again.folder / "adapter" / file).read_bytes() == whole


# --- DPO --------------------------------------------------------------------------------------------------------------


def dpo_trainer(model, tmp_path, pairs=PAIRS, **changes):
    return align.trainer(recipe(model, method="dpo", beta=0.3, **changes), pairs, None, tmp_path, [])


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_dpo_loss_gradients_and_what_is_logged_equal_trl_in_fp32(tiny, tmp_path, rows, precomputed):
    """One pass over the rows, where the reference is asked at each step, and two, where TRL asks it before training."""
    steps = {"max_steps": 2 if precomputed else 1}
    plain, quick = (dpo_trainer(tiny, tmp_path, fast=fast, **steps) for fast in (False, True))
    assert quick.precompute_ref_logps == precomputed and not plain.precompute_ref_logps
    (loss, gradients), (quick_loss, quick_gradients) = (loss_and_gradients(t, rows) for t in (plain, quick))
    assert quick_loss == pytest.approx(loss, rel=3e-6) and abs(loss - math.log(2)) > 1e-3
    assert quick_gradients.keys() == gradients.keys() and len(gradients) == 2 * 2 * 7  # A and B, 2 layers, 7 in each
    for name, gradient in gradients.items():
        torch.testing.assert_close(quick_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    logged, quick_logged = plain._metrics["train"], quick._metrics["train"]
    assert quick_logged.keys() == logged.keys() >= {"rewards/margins", "logps/chosen", "entropy", "num_tokens"}
    for name, values in logged.items():
        assert quick_logged[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


def test_dpo_begins_at_ln_2_also_in_bf16(tmp_path):
    """The reference is computed as the policy is, so that what bf16 rounds away cancels to the last bit."""
    quick = dpo_trainer("smollm2", tmp_path, fast=True, precision="bf16", max_steps=1)
    batch = quick.data_collator([quick.train_dataset[i] for i in range(4)])
    assert quick.compute_loss(quick.model.train(), batch).item() == pytest.approx(math.log(2), abs=1e-7)
    assert quick._metrics["train"]["rewards/margins"] == [0.0]


def test_a_whole_dpo_run_ends_in_the_same_adapter(tiny, tmp_path):
    """Four optimizer steps of two accumulated batches, in fp32, over two passes; evaluation too, in uneven batches."""
    changes = {"method": "dpo", "batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 1}
    changes |= {"eval_steps": 2, "eval_file": "x", "learning_rate": 1e-3}
    runs = [train(recipe(tiny, fast=f, **changes), PAIRS, PAIRS[:3], tmp_path / str(f)) for f in (False, True)]
    adapters = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in runs]
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, rtol=1e-3, atol=2e-5, msg=name)
    assert {key for record in runs[0].log for key in record} == {key for record in runs[1].log for key in record}
    for key in ("loss", "eval_loss", "grad_norm", "rewards/margins", "eval_rewards/margins", "eval_logps/rejected"):
        assert runs[1].series(key)[1] == pytest.approx(runs[0].series(key)[1], rel=1e-3, abs=1e-5), key


tokens = st.lists(st.integers(1, 3), max_size=5)


@settings(max_examples=200, deadline=None)
@given(tokens, st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=4))
def test_in_packed_pairs_each_answer_sees_exactly_its_own_row(first, pairs):
    """Each asked token's context, along the path that attention takes: its row's beginning, in order."""
    rows = [
        {"prompt_ids": [9, *first, *prompt], "chosen_ids": [*chosen, 7], "rejected_ids": [*rejected, 8]}
        for prompt, chosen, rejected in pairs
    ]
    batch = fast.pack_pairs(rows)
    ids, positions = (batch[name][0].tolist() for name in ("input_ids", "position_ids"))
    assert len(ids) % fast.ROUND_TO == 0
    segments = [range(*ends) for ends in pairwise(batch["cu_seqlens"].tolist())]
    seen = {}
    for path in batch["paths"]:
        along = [i for segment in path for i in segments[segment]]
        seen |= {i: along[: along.index(i) + 1] for i in segments[path[-1]]}
    got = []
    for at, target in zip(batch["logits_to_keep"].tolist(), batch["targets"].tolist(), strict=True):
        assert [positions[key] for key in seen[at]] == list(range(len(seen[at])))
        got.append(([ids[key] for key in seen[at]], target))
    answers = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    assert got == [(prompt + answer[:i], answer[i]) for prompt, answer in answers for i in range(len(answer))]
    assert batch["answer"].tolist() == [n for n, (_, answer) in enumerate(answers) for _ in answer]
    assert batch["lengths"].tolist() == [
        [len(row["prompt_ids"] + row[side]) for side in ("chosen_ids", "rejected_ids")] for row in rows
    ]


@pytest.mark.parametrize("max_steps", [2, 4], ids=["asked", "precomputed"])
def test_a_dpo_run_cut_off_goes_on_to_the_same_bits(tiny, tmp_path, max_steps):
    asked = recipe(tiny, method="dpo", fast=True, batch_size=2, max_steps=max_steps, save_steps=max_steps // 2)
    asked, file = asked.replace(logging_steps=1, schedule="constant"), "adapter_model.safetensors"
    whole = (train(asked, PAIRS, folder=tmp_path).folder / "adapter" / file).read_bytes()
    for name in (f"checkpoint-{max_steps}", "adapter"):
        shutil.rmtree(tmp_path / name)
    seen = []
    again = train(asked, PAIRS, folder=tmp_path, on_log=lambda record: seen.append(record["step"]))
    assert seen[0] == max_steps // 2 + 1 and (again.folder / "adapter" / file).read_bytes() == whole


def test_several_processes_are_refused(tiny, monkeypatch):
    from ftlab.pipeline.models import load

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="fast: true is for one process, this is one of 2"):
        fast.check(load(tiny)[0])
