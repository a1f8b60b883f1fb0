"""The Decoder of ftlab.cpu against transformers' generate: the same tokens, the same logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ftlab.cpu import Decoder, covers

PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 9], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [5, 6, 7]]
STOP = 3


@pytest.fixture
def model():
    """A random Llama with grouped queries; its weights are large, so that answers vary and no two logits are tied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=STOP,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


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
    got = Decoder(model).answer(prompts, 12, [STOP])
    assert got == [transformers_answer(model, prompt) for prompt in prompts]


def test_an_answer_ends_at_the_stop_token_and_others_go_on(model):
    long = Decoder(model).answer(PROMPTS, 12, [])
    stop = long[0][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in long]
    assert Decoder(model).answer(PROMPTS, 12, [stop]) == cut and len({len(row) for row in cut}) > 1


def test_adapters_count_when_they_are_on(adapted):
    assert covers(adapted)

    def both():
        got = Decoder(adapted).answer(PROMPTS, 12, [STOP])
        assert got == [transformers_answer(adapted, prompt) for prompt in PROMPTS]
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
    decoder = Decoder(adapted)
    got = decoder._read(prompts, decoder.rotation(torch.arange(12)[None]), torch.empty(3, 2, len(prompts), 2, 12, 16))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(
            got[row], adapted(input_ids=torch.tensor([prompt])).logits[0, -1], rtol=1e-5, atol=1e-5
        )


def test_what_it_does_not_cover_it_does_not_claim(model):
    assert covers(model)
    assert not covers(get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])))
    model.config.attention_bias = True
    assert not covers(model)
