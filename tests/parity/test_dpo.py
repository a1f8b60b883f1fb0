"""ftlab.scratch.logps and dpo_loss against TRL's DPOTrainer: the loss, every gradient, and the metrics it logs.

A tiny random Llama with the course's own tokenizer; the trainer tokenizes, collates and computes; ours takes the same
batch. Flags that are not at TRL's defaults, in all tests that build a trainer (`oracles.trainers.quiet`): bf16=False
(TRL trains in bf16 unless told not to), gradient_checkpointing=False, report_to="none", use_cpu=True,
disable_tqdm=True, the batch size.
DPOTrainer's own flags stay at their defaults: beta=0.1, loss_type="sigmoid", f_divergence_type="reverse_kl".
"""

import copy
import functools
import math

import pytest
import torch
from datasets import Dataset
from oracles.trainers import ask, gradients, own_batch, quiet
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from ftlab.models import model_path
from ftlab.scratch.logps import entropy, mean_logps, per_token_logps, sequence_logps
from ftlab.scratch.losses import dpo_loss

PAIRS = [
    {"prompt": "Where is my order 4821?", "chosen": " It left the kitchen at noon.", "rejected": " No idea."},
    {"prompt": "The dal was cold.", "chosen": " Sorry.", "rejected": " Then eat it faster, dear customer, please."},
    {"prompt": "Cancel, please, I ordered twice", "chosen": " Done, you get 240 rupees back.", "rejected": " No"},
]
SHAPE = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
CONFIG = {**SHAPE, **HEADS, **SPECIAL}


@functools.cache
def tokenizer():
    """The course's own, of 2,048 tokens: <|im_end|> is 2, padding 0."""
    return AutoTokenizer.from_pretrained(model_path("micro"))


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def agree(ours: nn.Module, our_loss: torch.Tensor, theirs: nn.Module, their_loss: torch.Tensor) -> None:
    """The two losses are equal, and so are their gradients on every parameter; none of these is zero throughout."""
    assert_close(our_loss, their_loss)
    mine, wanted = gradients(ours, our_loss), gradients(theirs, their_loss)
    assert mine.keys() == wanted.keys() and all(gradient.any() for gradient in wanted.values())
    for name in wanted:
        assert_close(mine[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def logps_of(model: nn.Module, batch: dict) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return sequence_logps(per_token_logps(logits, batch["input_ids"]), batch["completion_mask"])


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_loss_gradients_and_metrics(beta):
    """beta=0.7 is the one flag more that is not at its default."""
    policy, ref_model = llama(0), llama(1)
    ours, ref = copy.deepcopy(policy), copy.deepcopy(ref_model)
    trainer, batch = ask(DPOTrainer, DPOConfig, PAIRS, tokenizer(), policy, ref_model, beta=beta)
    lengths = batch["completion_mask"].sum(1)
    assert batch["input_ids"].shape[0] == 2 * len(PAIRS) and len(lengths.unique()) > 2
    their_loss = trainer.compute_loss(trainer.model, batch)

    policy_chosen, policy_rejected = logps_of(ours, batch).chunk(2)  # the batch is all chosen rows, then all rejected
    with torch.no_grad():
        ref_chosen, ref_rejected = logps_of(ref, batch).chunk(2)
    agree(ours, dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta).mean(), policy, their_loss)

    chosen = beta * (policy_chosen - ref_chosen)
    rejected = beta * (policy_rejected - ref_rejected)
    logged = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    assert logged["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert logged["rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4)
    assert logged["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    assert logged["rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())
    assert logged["logps/chosen"] == pytest.approx(policy_chosen.mean().item(), rel=1e-4)
    logits = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    doubts = mean_logps(entropy(logits), batch["completion_mask"]) * lengths  # the sum over each completion
    assert logged["entropy"] == pytest.approx((doubts.sum() / lengths.sum()).item(), rel=1e-4)


def adapter_trainer(policy, folder, **more) -> DPOTrainer:
    """ref_model=None, and a policy with an adapter, or peft_config, with which the trainer makes one."""
    arguments, rows = DPOConfig(**quiet(folder, len(PAIRS))), Dataset.from_list(PAIRS)
    trainer = DPOTrainer(policy, args=arguments, train_dataset=rows, processing_class=tokenizer(), **more)
    assert trainer.ref_model is None
    return trainer


def test_with_a_new_adapter_the_reference_is_the_base_model(tmp_path):
    """peft_config given: TRL switches the adapter off for the reference. Equal to a separate copy of the base model.

    init_lora_weights=False, so that the adapter changes something from the start.
    """
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ref = llama(0)
    trainer = adapter_trainer(llama(0), tmp_path, peft_config=lora)
    batch, ours = own_batch(trainer), copy.deepcopy(trainer.model)
    with torch.no_grad():
        refs = logps_of(ref, batch).chunk(2)
        with ours.disable_adapter():
            assert torch.equal(torch.cat(refs), logps_of(ours, batch))
    loss = dpo_loss(*logps_of(ours, batch).chunk(2), *refs).mean()
    assert abs(loss.item() - math.log(2)) > 0.01
    agree(ours, loss, trainer.model, trainer.compute_loss(trainer.model, batch))


def test_with_an_adapter_given_the_reference_is_that_adapter_at_the_start(tmp_path):
    """A PeftModel given: TRL keeps a copy of its adapter as the reference. So the first loss is ln 2."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = adapter_trainer(get_peft_model(llama(0), lora), tmp_path)
    assert_close(trainer.compute_loss(trainer.model, own_batch(trainer)), torch.tensor(math.log(2)))


def test_log_probs_and_entropy_are_those_of_trls_helpers():
    """selective_log_softmax and entropy_from_logits, which all of TRL's trainers share, on logits shifted by hand."""
    logits = 3 * torch.randn(3, 6, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(1))
    assert_close(per_token_logps(logits, ids), selective_log_softmax(logits[:, :-1], ids[:, 1:]))
    assert_close(entropy(logits), entropy_from_logits(logits[:, :-1]))


def test_in_bf16_trl_rounds_log_probs_and_ours_does_not():
    logits = torch.randn(2, 9, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.randint(2048, (2, 9), generator=torch.Generator().manual_seed(1))
    exact = per_token_logps(logits.double(), ids)
    theirs = selective_log_softmax(logits[:, :-1], ids[:, 1:])
    assert theirs.dtype == torch.bfloat16 and (theirs - exact).abs().max() > 0.01
    assert_close(per_token_logps(logits, ids).double(), exact, rtol=0, atol=1e-5)
