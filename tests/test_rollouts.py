"""ftlab.classroom.rollouts: sampled tokens and the trainer's log-probs of them meet at the same place."""

import math
from types import SimpleNamespace

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlab.classroom.rollouts import collate, gap, sample, scored
from ftlab.serve import serve


def test_collate_puts_each_log_prob_where_per_token_logps_scores_its_token():
    """Answer 8 9 after prompt 5 6 7, answer 4 after prompt 5. Entry t scores token t + 1: 8 at t = 2, 4 at t = 0."""
    rollouts = collate([[5, 6, 7], [5]], [[(8, -0.5), (9, -1.5)], [(4, -2.0)]], pad_id=0)
    assert rollouts.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 4, 0, 0, 0]]
    assert rollouts.completion_mask.tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert rollouts.sampler_logps.tolist() == [[0, 0, -0.5, -1.5], [-2.0, 0, 0, 0]]


def test_ids_are_scored_on_the_device_of_the_model():
    class Elsewhere:
        device = torch.device("meta")

        def __call__(self, input_ids):
            raise LookupError(f"asked on {input_ids.device}")

    tokenizer = SimpleNamespace(pad_token_id=0, apply_chat_template=lambda *_, **__: {"input_ids": [[5, 6]]})
    with pytest.raises(LookupError, match="asked on meta"):
        scored(Elsewhere(), tokenizer, [[]], [[(4, -2.0)]])


def test_gap_by_hand():
    """Ratios 1.5 and 1 / 1.5 in one answer, 1.1 in the other: two of three tokens are outside, and no answer is."""
    rollouts = collate([[1], [1]], [[(2, -1.0), (3, -1.0)], [(2, -1.0)]], pad_id=0)
    ratio = torch.tensor([[1.5, 1 / 1.5], [1.1, 99.0]])  # 99 stands at padding
    row = gap(rollouts.sampler_logps + ratio.log(), rollouts)
    assert row["tokens outside"] == pytest.approx(2 / 3) and row["answers outside"] == 0
    assert row["largest"] == pytest.approx(math.log(1.5), abs=1e-6)
    assert row["mean |log ratio|"] == pytest.approx((2 * math.log(1.5) + math.log(1.1)) / 3, abs=1e-6)


def test_what_llama_cpp_samples_has_the_models_own_log_probs(llama, gguf):
    """The probabilities, one token after the other, by transformers; the draws are those of the seeds 0 and 1."""
    prompts = [[{"role": "user", "content": text}] for text in ("Where is order 618347?", "Hi")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    no_filter = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    with serve(gguf, n_ctx=256) as server, OpenAI(base_url=server.url, api_key="none") as client:
        drawn = [sample(client, prompts, 2, **no_filter) for _ in range(2)]
        raw = sample(client, prompts, 2, raw=True, **no_filter)
        cut = sample(client, prompts, 2, top_k=1)
        with pytest.raises(ValueError, match=r"prompt \d: got \d+ of 40 tokens"):  # random weights write random bytes
            sample(client, prompts, 40, **no_filter)
    first, again, before_filters = ([[token for token, _ in answer] for answer in each] for each in (*drawn, raw))
    assert first == again == before_filters and first[0] != first[1]
    assert {logp for answer in cut for _, logp in answer} == {0.0}  # of one token
    rollouts, logps, entropies = scored(model, tokenizer, prompts, drawn[0])
    for row, (prompt, answer) in enumerate(zip(prompts, drawn[0], strict=True)):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for token, logp in answer:
            with torch.no_grad():
                p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            assert logp == pytest.approx(p[token].log().item(), abs=0.01)  # llama.cpp rounds activations to 16 bits
            assert logps[row, len(ids) - 1].item() == pytest.approx(p[token].log().item(), abs=1e-4)
            assert entropies[row, len(ids) - 1].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
            ids.append(token)
    assert gap(logps, rollouts)["largest"] < 0.01
