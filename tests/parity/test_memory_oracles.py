"""ftlab.memory against oracles that share no code with it: PyTorch's trackers, TRL's trainers, PEFT, bitsandbytes."""

import copy
import dataclasses

import pytest
import torch

from ftlab.memory import Architecture, Setup, architectures, estimate, measure
from ftlab.memory.held import constant_bytes
from ftlab.memory.real_step import materialize, skeleton, step
from ftlab.memory.setup import plan
from ftlab.memory.tracker import cuda_rules, tracker
from ftlab.pipeline.recipe import Recipe

TINY = Architecture("tiny", "llama", 64, 3, 4, 2, 16, 160, 1000, False, False, False)
WIDE = dataclasses.replace(TINY, vocab_size=6000)
BASE = Recipe(precision="fp32", batch_size=2, max_length=64)


class Silent:
    """A recorder that records nothing."""

    def enter(self, phase, kind):
        pass

    def mark(self, tensor, kind):
        pass

    def start(self):
        pass


# --- PyTorch's own trackers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_our_tracker_sees_the_same_peak_as_pytorchs(checkpointing):
    """torch.distributed._tools.mem_tracker.MemTracker, on the same step; ours adds kinds and phases.

    Full fine-tuning only: MemTracker puts hooks on the outputs of all modules, which fails on those of frozen ones.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    p = plan(TINY, BASE.replace(r=0, gradient_checkpointing=checkpointing), Setup(loss="full"))

    def peak(watcher):
        model = skeleton(p)
        materialize(model, "cpu")
        if isinstance(watcher, MemTracker):
            watcher.track_external(model)
            with watcher:
                step(model, p, "cpu", Silent())
            return watcher.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        with watcher:
            for tensor in (*model.parameters(), *model.buffers()):
                watcher.mark(tensor, "weights")
            step(model, p, "cpu", watcher)
        return max(moment.total for moment in watcher.moments.values())

    assert peak(tracker(p)) == pytest.approx(peak(MemTracker()), rel=2e-3)


@pytest.fixture
def four_gpus():
    """A process group of four ranks of which this is the first; the others, and the network, are pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (4,))
    torch.distributed.destroy_process_group()


def sharded(architecture, recipe, mesh):
    """The plan, and the model with FSDP2 in accelerate's units: block, embedding, last norm with the head."""
    from torch.distributed.fsdp import fully_shard

    p = plan(architecture, recipe, Setup(loss="full", gpus=4, sharding="fsdp"))
    model = skeleton(p)
    materialize(model, "cpu")
    inner = model.get_base_model() if recipe.r else model
    for block in inner.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    tail = [inner.model.norm, inner.lm_head]
    if architecture.tie_word_embeddings:
        tail.insert(1, inner.model.embed_tokens)
    else:
        fully_shard(inner.model.embed_tokens, mesh=mesh, reshard_after_forward=True)
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    return p, fully_shard(model, mesh=mesh)


def local_bytes(tensors):
    return sum(tensor.to_local().nbytes for tensor in tensors)


@pytest.mark.parametrize("r", [0, 8])
def test_a_rank_holds_its_share_of_weights_gradients_and_states(r, four_gpus):
    """Every dimension divides by four, so the shares are exact."""
    p, model = sharded(TINY, BASE.replace(r=r), four_gpus)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.zeros(2, 64, dtype=torch.long)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    held = estimate(TINY, p.recipe, p.setup).moments["step"].kinds
    assert local_bytes(model.parameters()) == held["weights"] + held["adapters"]
    assert local_bytes(parameter.grad for parameter in trained) == held["gradients"]
    assert local_bytes(s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")) == held["optimizer"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_peak_of_a_rank_is_that_of_pytorchs_fsdp_tracker(tied, checkpointing, four_gpus):
    """FSDPMemTracker sees what is gathered, and the gradients on their way to their owners. fp32, full fine-tuning."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    big = dataclasses.replace(WIDE, hidden_size=128, head_dim=32, intermediate_size=384, tie_word_embeddings=tied)
    p, model = sharded(big, BASE.replace(r=0, gradient_checkpointing=checkpointing), four_gpus)
    watcher = FSDPMemTracker(model)
    with watcher:
        step(model, p, "cpu", Silent())
    measured = watcher.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert estimate(big, p.recipe, p.setup).peak_bytes == pytest.approx(measured, rel=0.05)


# --- TRL's own trainers -----------------------------------------------------------------------------------------------


def trainer_of(architecture, recipe, folder):
    """TRL's trainer of the recipe's method, two steps, on rows of max_length tokens that all count.

    Non-default flags: no saving, a frozen copy as the reference of full fine-tuning (as ftlab.pipeline.align makes it;
    TRL's own would be loaded in fp32 too); sft gets a ready data set.
    """
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.experimental import orpo

    rows, T = 2 * recipe.batch_size, recipe.max_length
    words = Tokenizer(models.WordLevel({str(i): i for i in range(architecture.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    dtype = {2: torch.bfloat16, 4: torch.float32}[plan(architecture, recipe).held]
    model = AutoModelForCausalLM.from_config(architecture.config(), dtype=dtype, attn_implementation="sdpa")
    answer = "5 " * (T - 1)
    pair = {"prompt": "5", "chosen": answer, "rejected": answer}
    made, config, data = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, [{"input_ids": [5] * T, "labels": [5] * T}] * rows),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, [pair] * rows),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, [pair] * rows),
        "kto": (
            trl.KTOTrainer,
            trl.KTOConfig,
            [{"prompt": "5", "completion": answer, "label": i % 2 == 0} for i in range(rows)],
        ),
    }[recipe.method]
    arguments = config(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=recipe.batch_size,
        max_length=T,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        optim="adamw_torch",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **({"dataset_kwargs": {"skip_prepare_dataset": True}} if recipe.method == "sft" else {}),
    )
    adapter = LoraConfig(r=recipe.r, target_modules=list(recipe.target_modules), task_type="CAUSAL_LM")
    reference = {}
    if recipe.method in ("dpo", "kto") and not recipe.r:
        reference["ref_model"] = copy.deepcopy(model).eval().requires_grad_(False)
    return made(
        model=model,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2"),
        train_dataset=Dataset.from_list(data),
        args=arguments,
        peft_config=adapter if recipe.r else None,
        **reference,
    )


def peak_of(trainer, p):
    """The most bytes that live at once while it trains, by CUDA's autocast list."""
    watcher = tracker(p)
    with watcher, cuda_rules("cpu"):
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            for parameter in model.parameters() if model is not None else ():
                watcher.mark(parameter, "weights")
        trainer.train()
    return max(moment.total for moment in watcher.moments.values())


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"r": 0}], ids=["lora", "checkpointed", "full"]
)
def test_sft_trainer_itself_holds_what_measure_says(changes, tmp_path):
    """Two steps of TRL's SFTTrainer, bf16 autocast, everything counted; within the bytes of labels and log entries."""
    recipe = Recipe(precision="bf16", batch_size=4, max_length=512).replace(**changes)
    peak = peak_of(trainer_of(TINY, recipe, tmp_path), plan(TINY, recipe))
    assert peak == pytest.approx(measure(TINY, recipe, on="cpu").peak_bytes, rel=3e-3)
    assert estimate(TINY, recipe).peak_bytes == pytest.approx(peak, rel=1e-2)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"r": 0}], ids=["lora", "ckpt", "full"])
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_the_trainers_of_preferences_hold_what_is_predicted(method, changes, tmp_path):
    """The policy, its reference, and the logits of both: a vocabulary of 6,000 at a width of 64 makes them the peak."""
    recipe = Recipe(method=method, precision="bf16", batch_size=4, max_length=256).replace(**changes)
    peak = peak_of(trainer_of(WIDE, recipe, tmp_path), plan(WIDE, recipe))
    assert estimate(WIDE, recipe).peak_bytes == pytest.approx(peak, rel=1e-2)


@pytest.mark.parametrize("r", [0, 8])
def test_an_update_of_ppo_holds_what_is_predicted(r):
    """The four models in fp32, and a micro-batch as TRL's PPO trains on it: its wrapper, its forward, its order."""
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo.ppo_trainer import PolicyAndValueWrapper, forward
    from trl.trainer.utils import selective_log_softmax

    recipe = BASE.replace(method="ppo", reward_model="its folder", max_completion_length=63, r=r)
    p = plan(TINY, recipe, Setup(loss="full"))
    policy = skeleton(p)
    materialize(policy, "cpu")
    config = TINY.config()
    config.num_labels, config.pad_token_id = 1, 2
    reward, value = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))
    frozen = [reward.requires_grad_(False)] + ([] if r else [copy.deepcopy(policy).requires_grad_(False)])
    models = PolicyAndValueWrapper(policy, value)
    trained = [parameter for parameter in models.parameters() if parameter.requires_grad]
    watcher = tracker(p)
    with watcher, cuda_rules("cpu"):
        for model in (models, *frozen):
            for parameter in model.parameters():
                watcher.mark(parameter, "weights")
        optimizer = torch.optim.AdamW(trained, foreach=True)
        ids, old = torch.full((2, 64), 5), torch.zeros(2, 63)
        for _ in range(2):
            output, values = forward(models, ids, 2)
            logits = output.logits[:, :-1]
            logits /= 1 + 1e-7  # the temperature
            ratio = torch.exp(selective_log_softmax(logits, ids[:, 1:]) - old)
            loss = ratio.clamp(0.8, 1.2).mean() + torch.square(values[:, :-1].squeeze(-1) - old).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch.logsumexp(logits, dim=-1) - torch.sum(logits.softmax(dim=-1) * logits, dim=-1)
            del output, values, logits, ratio, loss
    peak = max(moment.total for moment in watcher.moments.values())
    assert estimate(TINY, recipe).peak_bytes == pytest.approx(peak, rel=1e-2)


# --- autograd, bitsandbytes, transformers, PEFT -----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("r", [0, 8])
def test_activations_are_what_autograd_says_it_saves(r, attention):
    """Storages seen by saved_tensors_hooks in the decoder's forward pass, parameters left out, each counted once."""
    p = plan(TINY, BASE.replace(r=r), Setup(attention=attention))
    model = skeleton(p)
    materialize(model, "cpu")
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
    predicted = estimate(TINY, p.recipe, p.setup).moments["forward"].kinds["activations"] - output.nbytes
    assert total == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_constants_are_those_of_bitsandbytes(quantization):
    """Every matrix of a real block, quantized for good: packed weights, absmax, code, and the second level's."""
    import bitsandbytes.functional as bnb

    one = dataclasses.replace(TINY, num_hidden_layers=1)
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
    assert constants == constant_bytes(plan(one, Recipe(quantization=quantization)))


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B"])
def test_parameters_and_adapters_are_those_of_transformers_and_peft(name):
    model = skeleton(plan(architectures()[name], Recipe(precision="bf16")))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (frozen, trained) == (architectures()[name].params, architectures()[name].lora_params(16))
    assert Architecture.from_config(model.config, name) == architectures()[name]
