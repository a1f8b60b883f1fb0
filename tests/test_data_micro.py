"""data/micro: the committed model loads, speaks ChatML, ends its turns, copies, and is what its README says."""

import copy
import json
import math
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[1] / "data" / "micro"
MODEL = FOLDER / "model"


@pytest.fixture(scope="module")
def micro():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def tokenizer(micro):
    return micro[1]


@pytest.fixture(scope="module")
def corpus(make):
    return make.read_corpus()


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((MODEL / "training.json").read_text(encoding="utf-8"))


def test_the_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "training.json",
    } == set(sizes)
    assert max(sizes.values()) <= 8_000_000


def test_architecture(micro):
    model, tokenizer = micro
    config = model.config
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert config.max_position_embeddings == tokenizer.model_max_length == 512
    assert config.vocab_size == len(tokenizer) == 2048
    # by hand: embedding 2048·256; a layer q, o 2·256·256, k, v 2·256·128, ffn 3·256·704, two norms 2·256; a last norm
    by_hand = 2048 * 256 + 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256) + 256
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 3_475_712
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_special_tokens(micro):
    model, tokenizer = micro
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.unk_token_id == 0
    for config in (tokenizer, model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert tokenizer("no token is added")["input_ids"][0] > 2 and tokenizer("")["input_ids"] == []


def test_chat_template_is_chatml_without_a_default_system_message(tokenizer):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    wanted = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == wanted
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert wanted.startswith(prompt) and prompt.endswith("<|im_start|>assistant\n")
    chat.insert(0, {"role": "system", "content": "Be short."})
    wanted = "<|im_start|>system\nBe short.<|im_end|>\n" + wanted
    assert tokenizer.apply_chat_template(chat, tokenize=False) == wanted


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))  # all that a file can hold: no lone surrogates
def test_tokenizer_gives_back_any_unicode_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=100, deadline=None)
@given(st.text("0123456789", min_size=1))
def test_every_digit_is_a_token(tokenizer, digits):
    assert len(tokenizer(digits)["input_ids"]) == len(digits)


def test_tokenizer_regenerates_to_the_committed_bytes(make, tmp_path):
    make.make_tokenizer(make.read_corpus(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), f"{name}: run python data/micro/make.py"


def test_held_out_texts_share_no_group_with_training(make, corpus):
    skeleton = {row["ticket"]: row["skeleton"] for row in make.rows("triage/train.jsonl")}
    groups = [{skeleton[text] for text in texts["tickets"]} for texts in (corpus.train, corpus.held_out)]
    assert groups[1] and not groups[0] & groups[1]
    for source, texts in corpus.held_out.items():
        assert len(texts) >= 3 and not set(texts) & set(corpus.train[source])


def test_no_label_and_no_other_split_is_in_the_training_texts(make, corpus):
    seen = "\n".join(text for texts in corpus.train.values() for text in texts) + "\n".join(map(str, corpus.known))
    assert '"intent"' not in seen and "late_delivery" not in seen
    for split in ("validation", "test", "hand_test"):
        for row in make.rows(f"triage/{split}.jsonl"):
            assert row["ticket"] not in seen, row["id"]
    for row in make.rows("handbook/questions.jsonl"):
        if row["split"] == "test":
            assert row["question"] not in seen, row["id"]


def test_only_answers_and_their_ends_count_in_a_chat(make, tokenizer, corpus):
    for ids, counts in islice(make.chat_documents(make.Chats(corpus, 1), tokenizer), 50):
        learned = tokenizer.decode([token for token, count in zip(ids, counts, strict=True) if count])
        turns = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", tokenizer.decode(ids), re.DOTALL)
        assert turns and learned == "".join(turns)


def test_padding_does_not_change_the_loss(make, micro):
    model = copy.deepcopy(micro[0])
    rng = random.Random(0)
    documents = [([rng.randrange(3, 2048) for _ in range(n)], [True] * n) for n in (5, 9, 30)]
    alone = [make.loss_of(model, [document]).item() * (len(document[0]) - 1) for document in documents]
    together = make.loss_of(model, documents).item()
    assert together == pytest.approx(sum(alone) / sum(len(ids) - 1 for ids, _ in documents), rel=1e-5)


def test_batches_keep_to_their_size_and_lose_no_document(make):
    rng = random.Random(0)
    documents = [([number] * rng.randint(1, 90), [True] * 1) for number in range(125)]  # 1000 // 8 a round
    round_ = []
    for batch in make.batches(iter(documents), 1000, rng):
        assert len(batch) * max(len(ids) for ids, _ in batch) <= 1000
        round_ += [ids[0] for ids, _ in batch]
        if len(round_) == len(documents):
            break
    assert sorted(round_) == list(range(125))


def test_held_out_perplexity_is_the_recorded_one_and_better_than_counting_tokens(make, micro, corpus, results):
    """The oracle is a unigram model: token frequencies of all training texts, add one."""
    tokenizer = micro[1]
    counts = Counter(i for texts in corpus.train.values() for text in texts for i in make.text_ids(tokenizer, text))
    total = counts.total() + len(tokenizer)
    for source, (nats, tokens, _) in make.held_out_loss(*micro, corpus).items():
        perplexity = math.exp(nats / tokens)
        assert perplexity == pytest.approx(results["held_out"][source]["perplexity"], rel=0.02)
        ids = [i for text in corpus.held_out[source] for i in make.text_ids(tokenizer, text)[1:]]
        unigram = math.exp(-sum(math.log((counts[i] + 1) / total) for i in ids) / len(ids))
        assert perplexity < unigram / 2, (source, perplexity, unigram)


def test_it_ends_its_turns_and_copies_from_the_prompt(make, micro, corpus):
    chats = make.Chats(corpus, "test")
    for exercise, least in ((chats.number, 0.8), (chats.word, 0.7), (chats.find_number, 0.8), (chats.talk, 0.9)):
        turns = [exercise() for _ in range(40)]
        got = make.answers(*micro, [question for question, _ in turns])
        right = sum(g == answer for g, (_, answer) in zip(got, turns, strict=True))
        assert right >= least * len(turns), (exercise.__name__, list(zip(got, turns, strict=True))[:5])
        assert sum(not answer.endswith("...") for answer in got) >= 0.95 * len(got)


def test_readme_holds_the_numbers_of_the_training_run(make, results):
    assert make.readme(results) == (FOLDER / "README.md").read_text(encoding="utf-8"), "run python data/micro/make.py"
    assert results["steps"] == make.STEPS and results["parameters"] == 3_475_712
