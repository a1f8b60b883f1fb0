"""ftlab.memory: hand-worked numbers, estimate against measurement kind by kind, properties, and the published table."""

import dataclasses
import json
import shutil
import subprocess
import sys
import timeit
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.real_step import measure

from ftlab.classroom import results
from ftlab.memory import (
    KINDS,
    PHASES,
    Architecture,
    Gpu,
    architectures,
    estimate,
    fits,
    gpus,
    max_batch,
    max_length,
    roles,
    states,
)
from ftlab.memory.settings import Plan

MLP = ["gate_proj", "up_proj", "down_proj"]
ROOT = Path(__file__).resolve().parent.parent
ALL = architectures()
LLAMA2 = ALL["Llama-2-7B"]
TINY = Architecture("tiny", "llama", 64, 3, 4, 2, 16, 160, 1000, True)
TINY_QWEN3 = dataclasses.replace(TINY, model_type="qwen3", tie_word_embeddings=False)
TINY_QWEN2 = dataclasses.replace(TINY, model_type="qwen2")
TINY_GEMMA = dataclasses.replace(TINY, model_type="gemma3_text", num_hidden_layers=6, sliding_window=32)
SIZE = {"per_device_train_batch_size": 2, "max_length": 64, "gradient_checkpointing": False, "optim": "adamw_torch"}
FULL, LORA = SIZE, SIZE | {"r": 16}
NF4, INT8 = LORA | {"load_in_4bit": True}, LORA | {"load_in_8bit": True}
PREPARED = {"dtype": "float32"}  # by prepare_model_for_kbit_training
CHECKPOINTS = {"gradient_checkpointing": True}


# --- numbers worked by hand -------------------------------------------------------------------------------------------


def test_parameters_are_those_published():
    rows = json.loads((ROOT / "data" / "architectures" / "architectures.json").read_text(encoding="utf-8"))
    assert {row["name"]: row["total_params"] for row in rows} == {name: a.params for name, a in ALL.items()}


STATES = {  # GB: full, LoRA, QLoRA with double quantization
    "Llama-2-7B": (107.8, 14.12, 4.51),
    "Llama-2-13B": (208.3, 27.03, 8.20),
    "Llama-2-70B": (1103.6, 141.27, 39.68),
    "Llama-3-8B": (128.5, 16.73, 6.37),
    "Llama-3.2-1B": (19.8, 2.65, 1.21),
    "Qwen2.5-7B": (121.8, 15.88, 6.19),
    "Qwen3-0.6B": (9.5, 1.35, 0.70),
    "SmolLM2-135M": (2.2, 0.35, 0.19),
}


def test_states_by_the_papers_accounting():
    """Llama-2-7B: 16 * 6,738,415,616 = 107.8 GB; 2 * 6.738e9 + 16 * 39,976,960 = 14.12 GB; the 6,476,005,376 weights of
    its linear layers at 4.126953125 bits are 3.341 GB, the other 262,410,240 at 16 bits 0.525, adapters 0.640: 4.51."""
    qlora = {"r": 16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    found = {name: [states(name, **how) / 1e9 for how in ({}, {"r": 16}, qlora)] for name in STATES}
    assert {name: (round(a, 1), round(b, 2), round(c, 2)) for name, (a, b, c) in found.items()} == STATES
    int8, nf4 = (states(LLAMA2, r=16, **bits) for bits in ({"load_in_8bit": True}, {"load_in_4bit": True}))
    rest = 2 * 262_410_240 + 16 * 39_976_960
    assert (int8, nf4) == (6_476_005_376 + rest, 6_476_005_376 * 4.5 / 8 + rest)


def test_what_is_held_by_hand_for_llama_2_7b():
    """6,476,005,376 linear weights, 262,410,240 others. NF4: half a byte each, and a byte per 64, four per 16,384 and
    1,088 bytes of tables per matrix (224 of them). The others are in 16 bits, as the papers count them, unless
    prepare_model_for_kbit_training makes them fp32: 1.05 GB for 0.52."""
    held = estimate(LLAMA2, **NF4, bnb_4bit_use_double_quant=True).moments["load"].kinds
    assert held["weights"] == 6_476_005_376 // 2 + 2 * 262_410_240
    assert estimate(LLAMA2, **NF4, **PREPARED).moments["load"].kinds["weights"] - held["weights"] == 2 * 262_410_240
    assert held["constants"] == 6_476_005_376 // 64 + 4 * (6_476_005_376 // 16_384) + 224 * 1_088
    assert held["adapters"] == 2 * 39_976_960  # bf16, by SFTTrainer
    assert held["optimizer"] == 4 * 39_976_960
    lora = estimate(LLAMA2, **LORA).moments["load"].kinds
    assert (lora["weights"], lora["adapters"]) == (2 * 6_738_415_616, 4 * 39_976_960)
    full = estimate(LLAMA2, **FULL).moments["step"].kinds
    assert full["weights"] + full["gradients"] + full["optimizer"] == 16 * 6_738_415_616
    assert full["temporary"] == 4 * 6_738_415_616  # AdamW over all tensors at once
    assert estimate(LLAMA2, **FULL | {"optim": "adamw_torch_fused"}).moments["step"].kinds["temporary"] == 0
    half = estimate(LLAMA2, **FULL, dtype="bfloat16").moments["step"].kinds
    assert half["weights"] + half["gradients"] + half["optimizer"] == 8 * 6_738_415_616  # the states are bf16 too


def test_a_block_of_llama_2_7b_by_hand():
    """LoRA, 1 x 1,024 tokens, per token: norms 2 * (4 * 4,096 + 4); inputs of the seven A's 2 * (6 * 4,096 + 11,008);
    q, k, v and the output 8 * 4,096, and 4 * 32; SwiGLU 6 * 11,008; A's outputs 2 * 7 * 16. Times 32 blocks, less the
    first norm, plus ids and mask (16 a token) and cos and sin (4 * 128 a token)."""
    token = 2 * (4 * 4096 + 4) + 2 * (6 * 4096 + 11008) + 8 * 4096 + 4 * 32 + 6 * 11008 + 2 * 7 * 16
    kept = 1024 * (32 * token - (4 * 4096 + 4) + 16 + 4 * 128)
    last_norm_and_output = 1024 * (4 * 4096 + 4 + 2 * 4096)
    one_row = LORA | {"per_device_train_batch_size": 1, "max_length": 1024}
    assert estimate(LLAMA2, **one_row).moments["forward"].kinds["activations"] == kept + last_norm_and_output


def test_roles_of_each_method():
    """C56 and C63: full fine-tuning with PPO holds 16 + 16 + 2 + 2 = 36 bytes per parameter, DPO 18, ORPO 16."""

    def bytes_per_parameter(method, lora=False):
        return sum(16 if role.trained else 2 for role in roles(method, lora) if not role.shared)

    assert [bytes_per_parameter(method) for method in ("ppo", "dpo", "kto", "orpo")] == [36, 18, 18, 16]
    assert len(roles("ppo", lora=False)) == 4
    assert [role.shared for role in roles("dpo", lora=True)] == [False, True]
    with pytest.raises(ValueError, match=r"method: got 'grpo', .*'ppo'"):
        roles("grpo", lora=True)


def test_a_reference_costs_nothing_with_lora_and_four_bytes_without():
    """TRL holds the reference in the policy's dtype; two bytes is the papers' accounting."""
    for how, expected in ((LORA, 0), (FULL, 4 * LLAMA2.params)):
        one, two = (estimate(LLAMA2, method=m, **how).moments["load"].total for m in ("orpo", "dpo"))
        assert two - one == expected


def test_the_experts_of_qwen3_30b_a3b_by_hand():
    """48 blocks of 128 experts of 3 * 2,048 * 768 numbers: 28,991,029,248 of 30,532,122,624. NF4 leaves them in 16
    bits, 58 of 61 GB, and prepare_model_for_kbit_training makes them fp32. A token meets 8 of 128: "A3B"."""
    moe = ALL["Qwen3-30B-A3B"]
    assert moe.expert_params == 48 * 128 * 3 * 2048 * 768 == 28_991_029_248
    assert moe.params - moe.expert_params * 120 // 128 == 3_353_032_704
    quantized = moe.linear_params // 2
    for more, size in (({}, 2), (PREPARED, 4)):
        weights = estimate("Qwen3-30B-A3B", **NF4, **more).moments["load"].kinds["weights"]
        assert weights == quantized + size * (30_532_122_624 - moe.linear_params) > size * 28_991_029_248


# --- against what the libraries hold ----------------------------------------------------------------------------------

CASES = {
    "lora": (TINY, LORA),
    "lora checkpointed": (TINY, LORA | CHECKPOINTS),
    "lora q and v, dropout": (TINY, LORA | {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}),
    "lora fp32": (TINY, LORA | {"bf16": False}),
    "lora on fp32 weights": (TINY, LORA | {"dtype": "float32"}),
    "lora eager": (TINY, LORA | {"attn_implementation": "eager"}),
    "lora padded": (TINY, LORA | {"padded": True}),
    "lora nll": (TINY, LORA | {"loss_type": "nll"}),
    "lora liger": (TINY, LORA | {"use_liger_kernel": True}),
    "lora qwen3": (TINY_QWEN3, LORA),
    "lora gemma3": (TINY_GEMMA, LORA),
    "full": (TINY, FULL),
    "full checkpointed, 8-bit": (TINY, FULL | CHECKPOINTS | {"optim": "adamw_8bit"}),
    "full fp32, sgd": (TINY, FULL | {"bf16": False, "optim": "sgd"}),
    "full accumulating": (TINY, FULL | {"gradient_accumulation_steps": 2}),
    "full bf16 weights": (TINY, FULL | {"dtype": "bfloat16"}),
    "full qwen3": (TINY_QWEN3, FULL),
    "full qwen2": (TINY_QWEN2, FULL),
    "nf4-double prepared": (TINY, NF4 | PREPARED | {"bnb_4bit_use_double_quant": True}),
    "nf4 prepared, checkpointed": (TINY, NF4 | PREPARED | CHECKPOINTS),
    "nf4": (TINY, NF4),
    "nf4 checkpointed": (TINY, NF4 | CHECKPOINTS),
    "int8 prepared": (TINY, INT8 | PREPARED),
    "int8 prepared, checkpointed": (TINY, INT8 | PREPARED | CHECKPOINTS),
    "int8": (TINY, INT8),
}


# Of these also what the forward pass leaves is exact, but for buffers, scalars, and Gemma's 1 + weight.
EXACT = ("lora", "full", "lora eager", "lora qwen3", "lora gemma3", "nf4", "nf4-double prepared", "full bf16 weights",
         "int8 prepared, checkpointed")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_estimate_against_real_tensors_phase_by_phase(case):
    """Real data on this CPU. What is held is exact; peaks within 5 %: at 128 tokens small things weigh much."""
    architecture, how = CASES[case]
    predicted, measured = estimate(architecture, **how).moments, measure(architecture, on="cpu", **how).moments
    for kind in ("weights", "constants", "adapters"):
        assert predicted["load"].kinds[kind] == measured["load"].kinds[kind], kind
    assert predicted["step"].kinds["gradients"] == measured["step"].kinds["gradients"]
    optimizer = measured["load"].kinds["optimizer"]
    assert predicted["load"].kinds["optimizer"] == pytest.approx(optimizer, abs=4 * 96)  # AdamW's step counters
    assert {phase: predicted[phase].total / measured[phase].total for phase in PHASES} == pytest.approx(
        dict.fromkeys(PHASES, 1), abs=0.05
    )
    if case in EXACT:
        assert predicted["backward"].where == "in the loss"
        left = measured["backward"].kinds["activations"]
        assert predicted["backward"].kinds["activations"] == pytest.approx(left, rel=1e-3, abs=8000)


def test_tensors_without_data_take_as_many_bytes_as_real_ones():
    for architecture, how in (CASES[case] for case in ("full", "nf4")):
        fake, real = measure(architecture, **how), measure(architecture, on="cpu", **how)
        assert {k: m.total for k, m in fake.moments.items()} == {k: m.total for k, m in real.moments.items()}


# --- properties -------------------------------------------------------------------------------------------------------

METHODS = [
    {},
    {"dtype": "bfloat16"},
    {"r": 8},
    {"r": 8, "load_in_8bit": True},
    {"r": 8, "load_in_4bit": True},
    {"r": 8, "load_in_4bit": True, **PREPARED},
    {"r": 8, "bf16": False},
    *({"r": r, "method": method} for r in (None, 8) for method in ("dpo", "kto", "orpo")),
]
LOSSES = st.sampled_from([{}, {"loss_type": "nll"}, {"use_liger_kernel": True}])


@st.composite
def some(draw):
    """An architecture and settings, of all kinds that go together."""
    a, how = draw(st.sampled_from(sorted(ALL.items())))[1], draw(st.sampled_from(METHODS))
    how = how | {"per_device_train_batch_size": draw(st.integers(2, 9)), "max_length": draw(st.integers(16, 3000))}
    if draw(st.booleans()):
        how["attn_implementation"] = "eager"
    if "method" not in how:
        how |= draw(LOSSES)
    if a.num_experts:
        how.pop("method", None)
    return a, how | ({} if a.num_experts else {"gpus": draw(st.sampled_from([1, 1, 4]))})


@settings(max_examples=40, deadline=None)
@given(some(), st.booleans())
def test_more_rows_or_longer_ones_never_take_less(case, checkpointing):
    architecture, how = case[0], case[1] | {"gradient_checkpointing": checkpointing}
    one = estimate(architecture, **how)
    for name in ("per_device_train_batch_size", "max_length"):
        other = estimate(architecture, **how | {name: how[name] + 1})
        assert all(other.moments[phase].total >= one.moments[phase].total for phase in PHASES)


@settings(max_examples=40, deadline=None)
@given(some())
def test_checkpointing_never_raises_the_peak(case):
    """By more than the 16-bit input of one block, and with eager attention its T x T mask: see the next test."""
    without, with_it = (estimate(case[0], **case[1], gradient_checkpointing=c) for c in (False, True))
    tokens = case[1]["per_device_train_batch_size"] * case[1]["max_length"]
    mask = tokens * case[1]["max_length"] if "attn_implementation" in case[1] else 0
    assert with_it.peak_bytes <= without.peak_bytes + 2 * (tokens * case[0].hidden_size + mask)


def test_checkpointing_can_cost_the_input_of_one_block():
    """Measured. 16-bit weights, trained in full: while the first block is computed again its 16-bit input is there,
    beside the fp32 copy that its norm keeps. Wide weights and 32 tokens put the peak there."""
    wide = dataclasses.replace(TINY, hidden_size=256, head_dim=64, intermediate_size=1024, vocab_size=200)
    how = FULL | {"max_length": 16, "dtype": "bfloat16", "optim": "adamw_torch_fused"}
    without, with_it = (measure(wide, **how | {"gradient_checkpointing": c}).peak_bytes for c in (False, True))
    assert 2 * 32 * 256 <= with_it - without < 2 * (2 * 32 * 256)
    assert estimate(wide, **how | CHECKPOINTS).peak_bytes == pytest.approx(with_it, rel=0.01)
    how |= {"max_length": 56, "attn_implementation": "eager"}
    without, with_it = (measure(wide, **how | {"gradient_checkpointing": c}).peak_bytes for c in (False, True))
    assert 0 <= with_it - without - 2 * (112 * 256 + 112 * 56) < 1000


def test_at_the_embedding_only_the_batch_is_left():
    """Measured. The last checkpoint has let go of the T x T masks; ids and mask take 16 bytes a token."""
    wide, how = dataclasses.replace(TINY, vocab_size=20_000), FULL | CHECKPOINTS | {"attn_implementation": "eager"}
    how |= {"per_device_train_batch_size": 1, "max_length": 16}
    predicted, measured = (f(wide, **how).moments["backward"] for f in (estimate, measure))
    assert predicted.where == "at the embedding"
    assert predicted.kinds["activations"] == 16 * 16
    assert measured.kinds["activations"] == pytest.approx(16 * 16, abs=64)  # and scalars


@settings(max_examples=40, deadline=None)
@given(some())
def test_every_kind_is_known_and_none_is_negative(case):
    memory = estimate(case[0], **case[1])
    assert tuple(memory.moments) == PHASES
    assert all(tuple(m.kinds) == KINDS and min(m.kinds.values()) >= 0 for m in memory.moments.values())
    assert memory.peak_bytes == memory.moments[memory.peak_phase].total


def test_an_estimate_takes_less_than_a_millisecond():
    """About 0.2 ms on a core of its own; the best of many, because a core is seldom that."""
    assert min(timeit.repeat(lambda: estimate(LLAMA2, **NF4), number=1, repeat=100)) < 1e-3


def test_sharding_divides_what_is_held_and_data_parallel_does_not():
    one = estimate(LLAMA2, **FULL).moments["step"].kinds
    for count in (2, 4, 8):
        fsdp = estimate(LLAMA2, **FULL, gpus=count, fsdp=True).moments["step"].kinds
        for kind in ("weights", "gradients", "optimizer", "temporary"):
            assert fsdp[kind] == pytest.approx(one[kind] / count, rel=1e-6)
        ddp = estimate(LLAMA2, **FULL, gpus=count).moments["step"].kinds
        assert ddp["temporary"] == one["temporary"] + one["gradients"]  # the buckets
        assert all(ddp[kind] == one[kind] for kind in ("weights", "gradients", "optimizer"))


def test_nf4_weights_are_not_sharded():
    """accelerate's FSDP leaves 4-bit weights whole, and bitsandbytes their constants; the rest is shared."""
    one, four = (estimate(LLAMA2, **NF4, gpus=g, fsdp=True).moments["load"].kinds for g in (1, 4))
    assert four["weights"] == 6_476_005_376 // 2 + 262_410_240 // 2
    assert four["constants"] == one["constants"]
    assert (four["adapters"], four["optimizer"]) == (one["adapters"] // 4, one["optimizer"] // 4)


def test_paged_states_do_not_count():
    """8-bit states of LLama-2-7B: two bytes a parameter; all tensors but the norms have 100,000 numbers or more."""
    plain, paged = (estimate(LLAMA2, **FULL | {"optim": o}) for o in ("adamw_8bit", "paged_adamw_8bit"))
    norms = 65 * 4096
    assert plain.peak_bytes - paged.peak_bytes == 2 * (LLAMA2.params - norms)
    plain, paged = (
        estimate(LLAMA2, **FULL | {"optim": o}, gpus=4, fsdp=True) for o in ("adamw_8bit", "paged_adamw_8bit")
    )
    assert plain.peak_bytes - paged.peak_bytes == 2 * (LLAMA2.params - norms) // 4


# --- will it fit? -----------------------------------------------------------------------------------------------------


def test_the_longest_and_the_largest_that_fit():
    how = LORA | CHECKPOINTS | {"per_device_train_batch_size": 1}
    length = max_length("RTX 4090", LLAMA2, **how)
    assert fits("RTX 4090", LLAMA2, **how | {"max_length": length})
    assert not fits("RTX 4090", LLAMA2, **how | {"max_length": length + 1})
    rows = max_batch(gpus()["RTX 4090"], "Llama-2-7B", **how | {"max_length": 512})
    assert fits("RTX 4090", LLAMA2, **how | {"max_length": 512, "per_device_train_batch_size": rows})
    assert not fits("RTX 4090", LLAMA2, **how | {"max_length": 512, "per_device_train_batch_size": rows + 1})
    nothing = Gpu("small", 2**30, 0.9)
    for method in ("sft", "kto"):  # kto wants two rows at the least
        each = LORA | {"method": method}
        assert max_length(nothing, LLAMA2, **each) == max_batch(nothing, LLAMA2, **each) == 0


def test_of_a_card_a_step_has_the_usable_share():
    peak = estimate(TINY, **LORA).peak_bytes
    cards = [Gpu("all of it", peak, 1.0), Gpu("half of it", 2 * peak, 0.5), Gpu("less", 2 * peak, 0.499)]
    assert [fits(card, TINY, **LORA) for card in cards] == [True, True, False]


def test_gpus_are_those_of_the_course():
    cards = gpus()
    assert {"T4", "L4", "RTX 3090", "RTX 4090", "RTX 5090", "A10", "A100-40GB", "A100-80GB"} < set(cards)
    assert {"H100-80GB", "H200", "MI300X", "Apple 64GB unified"} < set(cards)
    assert all(0.6 < card.usable < 1 for card in cards.values())
    assert cards["RTX 4090"].memory_bytes == 24 * 2**30


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "liger"}, r"loss_type: got 'liger', wanted one of None, 'chunked_nll', 'nll'"),
        ({"optim": "adam_torch"}, r"optim: got 'adam_torch', did you mean 'adamw_torch'\?"),
        ({"attn_implementation": "flash_attention_2"}, r"attn_implementation: got 'flash_attention_2', wanted one of"),
        ({"gpus": 0}, r"gpus: got 0, wanted a whole number above 0"),
        ({"max_length": True}, r"max_length: got True"),
        ({"r": 0}, r"r: got 0, wanted a whole number above 0"),
        ({"load_in_4bit": True, "load_in_8bit": True}, r"load_in_8bit: got True, wanted False beside load_in_4bit"),
        ({"load_in_4bit": "False"}, r"load_in_4bit: got 'False', wanted True or False"),
        ({"gradient_checkpointing": 1}, r"gradient_checkpointing: got 1, wanted True or False"),
        ({"lora_dropout": 7}, r"lora_dropout: got 7, wanted 0 to below 1"),
        ({"lora_dropout": "0.1"}, r"lora_dropout: got '0.1', wanted 0 to below 1"),
        ({"target_modules": None}, r"target_modules: got None, wanted one of 'q_proj', "),
        ({"use_liger_kernel": True, "loss_type": "chunked_nll"}, r"loss_type: got 'chunked_nll', wanted None or 'nll'"),
        ({"r": None, "lora_dropout": 0.1}, r"lora_dropout: got 0.1, wanted 0 without a rank r"),
        ({"r": None, "target_modules": ["q_proj"]}, r"r: got None, wanted a rank for the adapters on target_modules"),
        ({"r": None, "load_in_4bit": True}, r"r: got None, wanted a rank: quantized weights cannot be trained"),
        ({"method": "dpo", "loss_type": "nll"}, r"method: got 'dpo', wanted 'sft' for experts, a loss_type"),
        ({"load_in_4bit": True, "bf16": False}, r"bf16: got False, wanted True or None with 16-bit or quantized"),
        ({"bf16": False, "dtype": "bfloat16"}, r"bf16: got False, wanted True or None with 16-bit or quantized"),
        ({"load_in_8bit": True, "gpus": 2, "fsdp": True}, r"fsdp: got True, wanted False with experts or in int8"),
        ({"target_modules": ["c_attn"]}, r"target_modules: got 'c_attn', wanted one of 'q_proj', "),
        ({"architecture": "Llama3-8B"}, r"architecture: got 'Llama3-8B', did you mean 'Llama-3-8B'\?"),
        ({"architecture": 7}, r"architecture: got 7, wanted one of 'Llama-2-7B', "),
        ({"architecture": "Qwen3-30B-A3B", "target_modules": MLP}, r"target_modules: got 'gate_proj', .*'experts'"),
        ({"architecture": "Qwen3-30B-A3B", "method": "dpo"}, r"method: got 'dpo', wanted 'sft' for experts"),
    ],
)
def test_a_bad_setting_says_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        estimate(**{"architecture": TINY, "r": 16} | changes)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch_size'"):
        estimate(TINY, batch_size=4)


def test_what_trl_ignores_is_not_counted():
    """DPOTrainer disables dropout; Liger's loss replaces TRL's default, the chunked one."""
    assert estimate(TINY, r=16, method="dpo", lora_dropout=0.1) == estimate(TINY, r=16, method="dpo")
    assert estimate(TINY, use_liger_kernel=True) != estimate(TINY)


def test_a_misspelt_card_names_the_nearest():
    with pytest.raises(ValueError, match=r"gpu: got 'RTX4090', did you mean 'RTX 4090'\?"):
        fits("RTX4090", LLAMA2)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"on: got 'tpu', wanted 'fake', 'cpu' or 'cuda'"):
        measure(TINY, on="tpu")
    with pytest.raises(ValueError, match=r"only method 'sft' on 1 GPU is measured, got 'dpo' on 1"):
        measure(TINY, method="dpo")


# --- the libraries' names, and what it takes to import ----------------------------------------------------------------


def test_names_and_defaults_are_those_of_the_libraries():
    """But for ten names that stand in no config, five of them for loops that are not TRL's. r=None is full fine-tuning;
    bf16=None is TRL's True; vllm_gpu_memory_utilization=None is no vLLM on this card."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import GRPOConfig, SFTConfig

    theirs = {}
    for config in (BitsAndBytesConfig(), LoraConfig(), GRPOConfig(use_cpu=True), SFTConfig(use_cpu=True)):
        theirs |= {name: getattr(config, name) for name in vars(Plan) | Plan.__annotations__ if hasattr(config, name)}
    ours = {field.name: field.default for field in dataclasses.fields(Plan)[1:]}
    loops = {"autocast", "adapter_dtype", "shifted_logits", "keeps_outputs"}
    assert ours.keys() - theirs.keys() == {"method", "dtype", "attn_implementation", "padded", "gpus", "card"} | loops
    others = {"r": None, "target_modules": "all-linear", "loss_type": None, "fsdp": False, "bf16": None}
    others |= {"vllm_gpu_memory_utilization": None}
    shared = {name: value for name, value in ours.items() if name in theirs and name not in others}
    assert shared == {name: theirs[name] for name in shared}
    assert {name: ours[name] for name in others} == others


def test_it_needs_the_standard_library_and_two_folders_of_data(tmp_path):
    """As in the browser: the package's own files, no site-packages, nothing else of ftlab."""
    for path in ("ftlab/__init__.py", "ftlab/paths.py", "ftlab/memory", "data/architectures", "data/gpus"):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        (tmp_path / path).parent.mkdir(exist_ok=True)
        copy(ROOT / path, tmp_path / path)
    code = "from ftlab.memory import *; print(estimate('Llama-3-8B', r=16).peak_bytes, max_batch('T4', 'Qwen3-0.6B'))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert [*map(int, done.stdout.split())] == [estimate("Llama-3-8B", r=16).peak_bytes, max_batch("T4", "Qwen3-0.6B")]


# --- the published table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "least"), [("known", 80), ("drawn", 40)])
def test_the_published_errors_meet_the_targets_and_are_of_this_code(table, least):
    """Median within 2 %, worst within 8 %, none under by more than 3 %."""
    lines = results.records("memory_error")
    (ours,) = [line["summary"]["ours"] for line in lines if line["part"] == table]
    rows = [line for line in lines if line["part"] == f"{table} row"]
    assert ours["configurations"] == len(rows) >= least
    assert ours["median_absolute_percent"] <= 2 and ours["worst_absolute_percent"] <= 8
    assert ours["lowest_percent"] >= -3
    for row in rows:
        architecture = Architecture(**row["shape"]) if "shape" in row else row["architecture"]
        assert estimate(architecture, **row["settings"]).peak_bytes == row["estimated_bytes"]


# --- Counts of the ledger ---------------------------------------------------------------------------------------------

COUNTS = {  # the ledger's section 6: q and v with r 8, attention with r 16, all linear layers with r 16 and with r 64
    "Llama-2-7B": (4_194_304, 16_777_216, 39_976_960, 159_907_840),
    "Llama-2-70B": (16_384_000, 65_536_000, 207_093_760, 828_375_040),
    "Llama-3-8B": (3_407_872, 13_631_488, 41_943_040, 167_772_160),
    "Llama-3.2-1B": (851_968, 3_407_872, 11_272_192, 45_088_768),
    "Qwen2.5-7B": (2_523_136, 10_092_544, 40_370_176, 161_480_704),
    "Qwen3-0.6B": (1_146_880, 4_587_520, 10_092_544, 40_370_176),
    "SmolLM2-135M": (460_800, 1_843_200, 4_884_480, 19_537_920),
}


def test_adapter_counts_are_the_ledgers():
    """Llama-2-7B, all: 32 * r * (4 * 8,192 + 3 * 15,104) = 2,498,560 r; q and v only: 32 * r * 2 * 8,192."""
    few, attention = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
    settings_of_the_table = ((8, few), (16, attention), (16, "all-linear"), (64, "all-linear"))
    found = {name: tuple(ALL[name].lora_params(*setting) for setting in settings_of_the_table) for name in COUNTS}
    assert found == COUNTS
