"""The Decoder of ftlab.cpu against transformers' generate: the same tokens, logits and, sampled, distribution."""

from collections import Counter
from itertools import product, takewhile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ftlab import llama
from ftlab.cpu import covers
from ftlab.llama import Decoder

PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 9], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [5, 6, 7]]
STOP = 3


pytestmark = pytest.mark.usefixtures("one_thread")


def random_llama(vocab_size: int, **more) -> LlamaForCausalLM:
    """With grouped queries; its weights are large, so that answers vary and no two logits are tied."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": True}
    special = {"bos_token_id": 1, "eos_token_id": STOP, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape, **heads, **special, **more)).eval()


@pytest.fixture
def model():
    return random_llama(64)


@pytest.fixture
def adapted(model):
    """The same with LoRA on every linear layer, B random, so that the adapter changes the answers."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False))
    return model.eval()


def transformers_answer(model, prompt, max_new_tokens=12):
    """What generate gives for one prompt, alone and without padding, up to the end token."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    return new[: new.index(STOP)] if STOP in new else new


@pytest.mark.parametrize(
    "prompts", [PROMPTS, PROMPTS[:1], [[9, 8], [7, 8, 9]], [[4], [4]]], ids=["", "one", "apart", "equal"]
)
def test_the_answers_are_those_of_generate(model, prompts):
    got = Decoder(model).generate(prompts, 12, [STOP])
    assert got == [transformers_answer(model, prompt) for prompt in prompts]


def test_an_answer_ends_at_the_stop_token_and_others_go_on(model):
    long = Decoder(model).generate(PROMPTS, 12, [])
    stop = long[0][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in long]
    assert Decoder(model).generate(PROMPTS, 12, [stop]) == cut and len({len(row) for row in cut}) > 1


def test_adapters_count_when_they_are_on(adapted):
    assert covers(adapted)

    def both():
        got = Decoder(adapted).generate(PROMPTS[:2], 12, [STOP])
        assert got == [transformers_answer(adapted, prompt) for prompt in PROMPTS[:2]]
        return got

    on = both()
    with adapted.disable_adapter():
        off = both()
    adapted.add_adapter("other", adapted.peft_config["default"])
    adapted.set_adapter("other")
    other = both()
    adapted.merge_adapter(["other"])
    assert both() == other and on != off != other != on


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_the_logits_after_a_prompt_are_those_of_the_model(adapted, prompts):
    decoder, cache = Decoder(adapted), torch.empty(3, 2, len(prompts), 2, 12, 16)
    with torch.no_grad():
        got = decoder.prefill(prompts, decoder.rotary_emb(12), cache) @ decoder.lm_head.T
        wanted = torch.stack([adapted(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_bf16_model_answers_as_its_weights_in_fp32(model, monkeypatch):
    """Where the CPU does not multiply bf16; where it does, near-ties may fall the other way."""
    monkeypatch.setattr(llama, "product_dtype", lambda bf16: torch.float32)
    half = Decoder(model.bfloat16()).generate(PROMPTS, 10, [2])
    assert half == Decoder(model.float()).generate(PROMPTS, 10, [2])


def test_an_adapter_is_added_to_bf16_weights_in_fp32(adapted, monkeypatch):
    """Rounded to bf16, the sum of weight and adapter would be another model's."""
    monkeypatch.setattr(llama, "product_dtype", lambda bf16: torch.float32)
    for name, weight in adapted.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()
    decoder, cache = Decoder(adapted), torch.empty(3, 2, len(PROMPTS), 2, 12, 16)
    adapted.float()  # the decoder has a copy
    with torch.no_grad():
        got = decoder.prefill(PROMPTS, decoder.rotary_emb(12), cache) @ decoder.lm_head.T
        wanted = torch.stack([adapted(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_it_does_not_cover_it_does_not_claim(model):
    assert covers(model)
    assert not covers(get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])))
    model.config.attention_bias = True
    assert not covers(model)


ROTATIONS = {  # of models made for 16 positions: the longest prompt and its answer have 23
    "linear": {},
    "yarn": {"original_max_position_embeddings": 16},
    "llama3": {"original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {},
    "longrope": {"original_max_position_embeddings": 16, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_rotation_that_depends_on_the_length_is_left_to_generate(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **ROTATIONS[kind]}
    model = random_llama(64, max_position_embeddings=16, rope_parameters=rope)
    assert covers(model) == (kind not in ("dynamic", "longrope"))
    if covers(model):
        wanted = [transformers_answer(model, prompt) for prompt in PROMPTS]
        assert Decoder(model).generate(PROMPTS, 12, [STOP]) == wanted


# --- Sampled answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [[], [0, 2, 4]])
def test_what_it_draws_is_distributed_as_softmax_of_the_logits_over_the_temperature(stop):
    """Two tokens out of five, 2,000 times: chi-square over the 25 answers, whose probabilities are enumerated.

    Answers that `stop` ends are one each. Where most of them end at once, the others go on in a smaller batch. With 24
    degrees of freedom 51 is passed once in a thousand seeds; the same draws are far from another temperature's.
    """
    model, n, prompt = random_llama(5), 2000, [1, 2, 3]
    seeded = torch.Generator().manual_seed(0)
    drawn = Decoder(model).generate([prompt] * n, 2, stop, temperature=3.0, generator=seeded)
    counts = Counter(map(tuple, drawn))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, token] for token in range(5)])).logits[:, 2:].double()

    def chi_square(temperature: float) -> float:
        p, expected = (logits / temperature).softmax(-1), Counter()
        for pair in product(range(5), repeat=2):  # P(first) P(second | first)
            said = tuple(takewhile(lambda token: token not in stop, pair))
            expected[said] += n * (p[0, 0, pair[0]] * p[pair[0], 1, pair[1]]).item()
        assert min(expected.values()) > 5 and counts.keys() <= expected.keys()
        return sum((counts[said] - e) ** 2 / e for said, e in expected.items())

    assert chi_square(3.0) < 51 and chi_square(2.2) > 75 and chi_square(5.0) > 75


def test_the_generator_alone_decides(model):
    decoder, state = Decoder(model), torch.get_rng_state()
    a, again, b = (
        decoder.generate(PROMPTS, 12, [], temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert a == again != b and torch.equal(torch.get_rng_state(), state)
    assert decoder.generate(PROMPTS, 12, []) == decoder.generate(PROMPTS, 12, [], temperature=1e-4)  # greedy
