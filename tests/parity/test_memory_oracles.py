"""ftlab.memory against oracles that share no code with it: PyTorch's trackers, TRL's trainers, PEFT, bitsandbytes."""

import copy
import dataclasses

import pytest
import torch
from oracles.real_step import config_of, materialize, measure, skeleton, step
from oracles.tracker import cuda_rules, tracker

from ftlab.memory import Architecture, architectures, estimate
from ftlab.memory.settings import plan

TINY = Architecture("tiny", "llama", 64, 3, 4, 2, 16, 160, 1000, False)
WIDE = dataclasses.replace(TINY, num_hidden_layers=2, vocab_size=6000)
GEMMA = dataclasses.replace(TINY, model_type="gemma3_text", num_hidden_layers=6, sliding_window=32)
MOE = dataclasses.replace(
    WIDE, model_type="qwen3_moe", intermediate_size=48, vocab_size=1000, num_experts=8, num_experts_per_tok=2
)
OSS = dataclasses.replace(MOE, model_type="gpt_oss", sliding_window=32)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZE = {"per_device_train_batch_size": 2, "max_length": 64, "gradient_checkpointing": False, "optim": "adamw_torch"}
FP32 = SIZE | {"bf16": False}
CHECKPOINTS = {"gradient_checkpointing": True}


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

    p = plan(TINY, **FP32 | {"gradient_checkpointing": checkpointing, "loss_type": "nll"})

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


SHARDED = {"loss_type": "nll", "gpus": 4, "fsdp": True}


def sharded(architecture, mesh, **settings):
    """The plan, and the model with FSDP2 in accelerate's units: block, embedding, last norm with the head."""
    from torch.distributed.fsdp import fully_shard

    p = plan(architecture, **settings)
    model = skeleton(p)
    materialize(model, "cpu")
    inner = model if p.full else model.get_base_model()
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


@pytest.mark.parametrize("r", [None, 8])
def test_a_rank_holds_its_share_of_weights_gradients_and_states(r, four_gpus):
    """Every dimension divides by four, so the shares are exact."""
    settings = FP32 | SHARDED | {"r": r}
    _, model = sharded(TINY, four_gpus, **settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.zeros(2, 64, dtype=torch.long)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    held = estimate(TINY, **settings).moments["step"].kinds
    assert local_bytes(model.parameters()) == held["weights"] + held["adapters"]
    assert local_bytes(parameter.grad for parameter in trained) == held["gradients"]
    assert local_bytes(s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")) == held["optimizer"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_peak_of_a_rank_is_that_of_pytorchs_fsdp_tracker(tied, checkpointing, four_gpus):
    """FSDPMemTracker sees what is gathered, and the gradients on their way to their owners. fp32, full fine-tuning."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    big = dataclasses.replace(WIDE, hidden_size=128, head_dim=32, intermediate_size=384, tie_word_embeddings=tied)
    settings = FP32 | SHARDED | {"gradient_checkpointing": checkpointing}
    p, model = sharded(big, four_gpus, **settings)
    watcher = FSDPMemTracker(model)
    with watcher:
        step(model, p, "cpu", Silent())
    measured = watcher.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert estimate(big, **settings).peak_bytes == pytest.approx(measured, rel=0.05)


# --- TRL's own trainers -----------------------------------------------------------------------------------------------


def trainer_of(p, folder):
    """TRL's trainer of the plan's method, one step, on rows of max_length tokens that all count.

    Non-default flags: no saving, a frozen copy as the reference of full fine-tuning (TRL's own would be loaded in fp32
    too); sft gets a ready data set.
    """
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.experimental import orpo

    rows, T = p.per_device_train_batch_size, p.T
    words = Tokenizer(models.WordLevel({str(i): i for i in range(p.a.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    dtype = {2: torch.bfloat16, 4: torch.float32}[p.R]
    model = AutoModelForCausalLM.from_config(config_of(p.a), dtype=dtype, attn_implementation="sdpa")
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
    }[p.method]
    arguments = config(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=p.per_device_train_batch_size,
        max_length=T,
        gradient_checkpointing=p.checkpointed,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        optim=p.optim,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **({"dataset_kwargs": {"skip_prepare_dataset": True}} if p.method == "sft" else {}),
    )
    adapter = None if p.full else LoraConfig(r=p.r, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = {}
    if p.method in ("dpo", "kto") and p.full:
        reference["ref_model"] = copy.deepcopy(model).eval().requires_grad_(False)
    return made(
        model=model,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2"),
        train_dataset=Dataset.from_list(data),
        args=arguments,
        peft_config=adapter,
        **reference,
    )


def peak_of(trainer, p):
    """The most bytes that live at once in a step after the first, by CUDA's autocast list."""
    watcher = tracker(p)
    with watcher, cuda_rules("cpu"):
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            for parameter in model.parameters() if model is not None else ():
                watcher.mark(parameter, "weights")
        optimizer = trainer.create_optimizer()  # with its states
        for parameter in filter(lambda one: one.requires_grad, trainer.model.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        trainer.train()
    return max(moment.total for moment in watcher.moments.values())


HOW = {"lora": {"r": 16}, "checkpointed": {"r": 16} | CHECKPOINTS, "full": {}}


@pytest.mark.parametrize("how", HOW)
def test_sft_trainer_itself_holds_what_measure_says(how, tmp_path):
    """A step of TRL's SFTTrainer, bf16 autocast, everything counted; within the bytes of labels and log entries."""
    settings = SIZE | {"per_device_train_batch_size": 2, "max_length": 256} | HOW[how]
    p = plan(TINY, **settings)
    peak = peak_of(trainer_of(p, tmp_path), p)
    assert peak == pytest.approx(measure(TINY, on="cpu", **settings).peak_bytes, rel=3e-3)
    assert estimate(TINY, **settings).peak_bytes == pytest.approx(peak, rel=1e-2)


@pytest.mark.parametrize(
    ("method", "how"),
    [("dpo", "checkpointed"), *((m, how) for m in ("dpo", "kto", "orpo") for how in ("lora", "full"))],
)
def test_the_trainers_of_preferences_hold_what_is_predicted(method, how, tmp_path):
    """The policy, its reference, and the logits of both: a vocabulary of 6,000 at a width of 64 makes them the peak."""
    settings = SIZE | {"method": method, "max_length": 96} | HOW[how]
    p = plan(WIDE, **settings)
    assert estimate(WIDE, **settings).peak_bytes == pytest.approx(peak_of(trainer_of(p, tmp_path), p), rel=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", [{"r": 16}, {}], ids=["lora", "full"])
@pytest.mark.parametrize("shape", [TINY, WIDE], ids=["tiny", "wide"])
def test_grpo_trainer_holds_what_is_predicted(shape, how, checkpointing, tmp_path):
    """TRL's GRPOTrainer makes 4 answers of 95 tokens to a prompt of one, then learns. Non-default flags: use_vllm=False
    and min_new_tokens, so that every row is as long as is predicted; bf16 autocast on a CPU."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    rows, T = 4, 96
    settings = SIZE | how | {"method": "grpo", "per_device_train_batch_size": rows, "max_length": T}
    settings["gradient_checkpointing"] = checkpointing
    p = plan(shape, **settings)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(shape.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    dtype = {2: torch.bfloat16, 4: torch.float32}[p.R]
    adapter = None if p.full else LoraConfig(r=p.r, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype, attn_implementation="sdpa"),
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": "5"}] * rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2"),
        peft_config=adapter,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=rows,
            num_generations=rows,
            max_completion_length=T - 1,
            generation_kwargs={"min_new_tokens": T - 1},
            gradient_checkpointing=checkpointing,
            bf16=True,
            use_cpu=True,
            use_vllm=False,
            report_to="none",
            save_strategy="no",
            optim=p.optim,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
    )
    assert estimate(shape, **settings).peak_bytes == pytest.approx(peak_of(trainer, p), rel=3e-3)


# --- autograd, bitsandbytes, transformers, PEFT -----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("r", [None, 8])
def test_activations_are_what_autograd_says_it_saves(r, attention):
    """Storages seen by saved_tensors_hooks in the decoder's forward pass, parameters left out, each counted once."""
    settings = FP32 | {"r": r, "attn_implementation": attention}
    p = plan(TINY, **settings)
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
    predicted = estimate(TINY, **settings).moments["forward"].kinds["activations"] - output.nbytes
    assert total == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("double", [False, True])
def test_constants_are_those_of_bitsandbytes(double):
    """Every matrix of a real block, quantized for good: packed weights, absmax, code, and the second level's."""
    import bitsandbytes.functional as bnb

    one = dataclasses.replace(TINY, num_hidden_layers=1)
    packed_bytes = constants = 0
    for n_in, n_out in one.linears.values():
        packed, state = bnb.quantize_4bit(
            torch.randn(n_out, n_in), blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        packed_bytes += packed.nbytes
        constants += state.absmax.nbytes + state.code.nbytes
        constants += state.state2.absmax.nbytes + state.state2.code.nbytes if double else 0
    assert packed_bytes == one.linear_params // 2
    loaded = estimate(one, r=8, load_in_4bit=True, bnb_4bit_use_double_quant=double).moments["load"]
    assert constants == loaded.kinds["constants"]


@pytest.mark.parametrize("name", architectures())
def test_parameters_and_adapters_are_those_of_transformers_and_peft(name):
    """The library's own model on the meta device, one and two blocks of it, the rest in proportion; "all-linear"."""
    whole = architectures()[name]
    counts = {}
    for depth in (1, 2):
        a = dataclasses.replace(whole, num_hidden_layers=depth)
        model = skeleton(plan(a, r=16))
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        counts[depth] = [sum(size for size, trained in sizes if trained == wanted) for wanted in (False, True)]
    found = [one + (two - one) * (whole.num_hidden_layers - 1) for one, two in zip(*counts.values(), strict=True)]
    assert found == [whole.params, whole.lora_params(16)]


# --- a mixture of experts, for good -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a random Qwen3 MoE in bf16."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("moe")
    AutoModelForCausalLM.from_config(config_of(MOE), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4)


def test_loading_in_4_bits_leaves_the_experts_as_they_are(saved):
    """bitsandbytes replaces nn.Linear; experts are fused 3D parameters. The bytes are those of the estimate."""
    from peft import prepare_model_for_kbit_training

    model = loaded(saved)
    kinds = {name.split(".", 3)[-1]: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["self_attn.q_proj.weight"] == torch.uint8
    assert kinds["mlp.experts.gate_up_proj"] == kinds["mlp.experts.down_proj"] == torch.bfloat16
    held = sum(parameter.nbytes for parameter in model.parameters())
    nf4 = {"r": 8, "load_in_4bit": True, "target_modules": ATTENTION}
    assert held == estimate(MOE, **nf4).moments["load"].kinds["weights"]
    prepared = sum(parameter.nbytes for parameter in prepare_model_for_kbit_training(model).parameters())
    assert prepared == estimate(MOE, **nf4, dtype="float32").moments["load"].kinds["weights"]  # the experts too


def test_sft_trainer_leaves_a_quantized_model_in_16_bits(saved, tmp_path):
    """It makes the adapters bf16, and does not call prepare_model_for_kbit_training."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(MOE.vocab_size)}, unk_token="0"))
    trainer = trl.SFTTrainer(
        loaded(saved),
        args=trl.SFTConfig(str(tmp_path), use_cpu=True, dataset_kwargs={"skip_prepare_dataset": True}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2"),
        train_dataset=Dataset.from_list([{"input_ids": [5] * 8, "labels": [5] * 8}]),
        peft_config=LoraConfig(r=8, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    )
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16, torch.uint8}


BLOCKS = {
    "gemma": (GEMMA, {}),
    "experts": (MOE, {"target_modules": ATTENTION}),
    "adapted experts": (MOE, {}),
    "gpt_oss": (OSS, {}),
}


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [(kind, c) for kind in BLOCKS for c in (False, True) if c or kind != "gemma"]
)
def test_other_blocks_on_real_tensors(kind, checkpointing):
    """On this CPU, LoRA. Rows of 256 tokens: beside the weights it is blocks that count.

    Gemma's without checkpointing is in tests/test_memory.py.
    """
    architecture, more = BLOCKS[kind]
    settings = SIZE | {"r": 8, "max_length": 256, "gradient_checkpointing": checkpointing} | more
    measured = measure(architecture, on="cpu", **settings)
    assert estimate(architecture, **settings).peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)
