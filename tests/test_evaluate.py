"""ftlab.pipeline.evaluate against one-by-one loops, binomial quantiles and numbers worked by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ftlab.paths import CACHE, DATA
from ftlab.pipeline import evaluate
from ftlab.pipeline.evaluate import FIELDS, generate, perplexity, score_triage, scores, summary, wilson_interval

LABEL = {"intent": "missing_item", "order_id": "482193", "urgency": "normal", "refund_amount": 180, "language": "en"}


def dumps(**changes) -> str:
    return json.dumps({**LABEL, **changes})


@pytest.fixture(scope="module")
def tiny():
    """A random Llama over single characters; its answers end at different lengths."""
    special = ["<pad>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz :?"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), initializer_range=0.35, **sizes, **ids))
    return model.eval(), tokenizer


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# --- generate ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def one_by_one(model, tokenizer, prompt, max_new_tokens) -> tuple[str, int]:
    """The naive loop: no batch, no padding, no cache. The answer and its number of tokens, the end included."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    start = len(ids)
    while len(ids) < start + max_new_tokens and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return tokenizer.decode(ids[start:], skip_special_tokens=True), len(ids) - start


def test_generate_equals_the_naive_loop(tiny):
    prompts = [user("abcdefgh"[i % 8] * (1 + 5 * i % 17)) for i in range(12)]
    expected, lengths = zip(*(one_by_one(*tiny, prompt, 20) for prompt in prompts), strict=True)
    assert min(lengths) < 20 and len(set(lengths)) > 3  # some answers end by themselves, at different lengths
    for batch_size in (1, 5, 32):
        assert generate(*tiny, prompts, max_new_tokens=20, batch_size=batch_size) == list(expected)


def test_generate_is_greedy_whatever_the_model_ships_with(tiny, monkeypatch):
    model, tokenizer = tiny
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 3, "repetition_penalty": 5.0}
    shipped = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
    prompts = [user("who"), user("what now")]
    expected = [one_by_one(model, tokenizer, prompt, 20)[0] for prompt in prompts]
    monkeypatch.setattr(model, "generation_config", shipped)
    assert generate(model, tokenizer, prompts, 20) == expected


def test_no_autocast_not_even_the_one_that_training_leaves(tiny):
    """accelerate wraps forward for mixed precision and does not unwrap it; a Trainer's model comes back like this."""
    model, tokenizer = tiny
    trained = LlamaForCausalLM(model.config).eval()
    trained.load_state_dict(model.state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)  # one per process: leave none behind for other tests
    trained = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(trained)
    AcceleratorState._reset_state(reset_partial_state=True)
    dtypes = []
    trained.model.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    trained(torch.tensor([[1, 2]]))
    assert dtypes == [torch.bfloat16]
    wrapped = trained.forward
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(trained, tokenizer, [user("who")], 9) == generate(model, tokenizer, [user("who")], 9)
        assert perplexity(trained, tokenizer, ["who"]).ppl == perplexity(model, tokenizer, ["who"]).ppl
    assert set(dtypes[1:]) == {torch.float32} and trained.forward == wrapped


def test_generate_of_nothing(tiny):
    assert generate(*tiny, []) == []


@pytest.mark.skipif(not (CACHE / "smollm2" / "model.safetensors").is_file(), reason="smollm2 is not cached: make setup")
def test_generate_on_smollm2_equals_the_naive_loop():
    from ftlab.pipeline.models import load

    model, tokenizer = load("smollm2", dtype=torch.float32)
    prompts = [user("What is the capital of France?"), user("Khana thanda hai, " * 4 + "kya karu?")]
    assert generate(model, tokenizer, prompts, 6) == [one_by_one(model, tokenizer, p, 6)[0] for p in prompts]


# --- score_triage, scores ---------------------------------------------------------------------------------------------


def test_score_of_the_label_itself():
    assert score_triage(dumps(), LABEL) == dict.fromkeys(("valid_json", "exact", *FIELDS), True)
    assert score_triage("\n  " + dumps().replace(", ", ",\n") + "\n", LABEL)["exact"]


def test_every_label_of_the_hand_test_is_valid():
    rows = [json.loads(line) for line in (DATA / "triage" / "hand_test.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = [row["label"] for row in rows]
    assert scores([json.dumps(label, ensure_ascii=False) for label in labels], labels).all(axis=None)


@pytest.mark.parametrize(
    ("answer", "valid", "wrong"),
    [
        (dumps(intent="other"), True, {"intent"}),
        (dumps(order_id=None, refund_amount=None), True, {"order_id", "refund_amount"}),
        (dumps(urgency="high", language="hinglish", refund_amount=0), True, {"urgency", "language", "refund_amount"}),
        (dumps(intent="refund"), False, {"intent"}),  # no such class
        (dumps(intent=["missing_item"]), False, {"intent"}),
        (dumps(order_id=482193), False, {"order_id"}),  # a number, wanted a string
        (dumps(order_id="48219"), False, {"order_id"}),
        (dumps(order_id="48219३"), False, {"order_id"}),  # a Devanagari digit
        (dumps(order_id="482193\n"), False, {"order_id"}),
        (dumps(refund_amount="180"), False, {"refund_amount"}),
        (dumps(refund_amount=180.0), False, {"refund_amount"}),
        (dumps(refund_amount=-180), False, {"refund_amount"}),
        (dumps(refund_amount=True), False, {"refund_amount"}),
        (dumps(urgency=None), False, {"urgency"}),
        (dumps(note="x"), False, set()),  # a sixth key
        (json.dumps({key: LABEL[key] for key in reversed(FIELDS)}), False, set()),  # another order
        (json.dumps({key: LABEL[key] for key in FIELDS[:4]}), False, {"language"}),
        ('{"intent": "other", ' + dumps()[1:], False, set()),  # a key twice: the last one counts, as in Python
        (f"```json\n{dumps()}\n```", False, set(FIELDS)),
        (f"Here it is: {dumps()}", False, set(FIELDS)),
        (dumps() + " Have a nice day!", False, set(FIELDS)),
        (dumps() + dumps(), False, set(FIELDS)),
        (f"[{dumps()}]", False, set(FIELDS)),
        (dumps()[:-1], False, set(FIELDS)),
        (dumps().replace('"', "'"), False, set(FIELDS)),
        ("", False, set(FIELDS)),
        ("null", False, set(FIELDS)),
    ],
)
def test_score_of_a_wrong_answer(answer, valid, wrong):
    expected = {"valid_json": valid, "exact": False} | {field: field not in wrong for field in FIELDS}
    assert score_triage(answer, LABEL) == expected


def test_a_missing_key_is_not_null():
    label = LABEL | {"refund_amount": None}
    assert not score_triage(json.dumps({"intent": "missing_item"}), label)["refund_amount"]


def test_true_is_not_one():
    assert not score_triage(dumps(refund_amount=True), LABEL | {"refund_amount": 1})["refund_amount"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner),
)
valid_labels = st.fixed_dictionaries(
    {
        "intent": st.sampled_from(evaluate.INTENTS),
        "order_id": st.none() | st.from_regex(r"\A[0-9]{6}\Z"),
        "urgency": st.sampled_from(["high", "normal", "low"]),
        "refund_amount": st.none() | st.integers(0, 10**6),
        "language": st.sampled_from(["en", "hinglish"]),
    }
).map(lambda label: {field: label[field] for field in FIELDS})  # Hypothesis shuffles the keys


@settings(deadline=None)
@given(st.text() | json_values.map(json.dumps) | st.text('{}[]":,0123456789eE.-ntfaulrs\\ '))
@example("[" * 100_000)
@example('{"intent":' * 100_000)
@example('{"intent": ' + "[" * 400 + "]" * 400 + "}")
@example('{"refund_amount": ' + "9" * 10_000 + "}")
@example('{"refund_amount": NaN, "order_id": 1e999}')
@example("\ud800")
def test_score_never_raises(answer):
    score = score_triage(answer, LABEL)
    assert list(score) == ["valid_json", "exact", *FIELDS] and all(type(value) is bool for value in score.values())
    assert score["exact"] == (score["valid_json"] and all(score[field] for field in FIELDS))


@settings(deadline=None)
@given(valid_labels, valid_labels)
def test_valid_labels_are_valid_answers(said, label):
    score = score_triage(json.dumps(said), label)
    assert score["valid_json"] and score["exact"] == (said == label)
    assert all(score[field] == (said[field] == label[field]) for field in FIELDS)


def test_scores_and_their_field_mean():
    """Two of five fields wrong in the second answer, all five in the third: 1, 0.6, 0; mean 1.6 / 3."""
    frame = scores([dumps(), dumps(intent="other", order_id=None), "sorry"], [LABEL] * 3)
    assert frame["fields"].tolist() == [1.0, 0.6, 0.0]
    assert set(frame.drop(columns="fields").dtypes) == {np.dtype(bool)}
    assert summary(frame).loc["fields", "mean"] == pytest.approx(1.6 / 3)
    with pytest.raises(ValueError):
        scores([dumps()], [LABEL] * 2)


# --- Intervals --------------------------------------------------------------------------------------------------------


def frame_of(**columns) -> pd.DataFrame:
    return pd.DataFrame({name: np.array(values, bool) for name, values in columns.items()})


def test_bootstrap_of_a_proportion_is_binomial():
    """Of n examples with k right, a resample has Binomial(n, k/n) right: 6 of 20 gives 2 to 10, 40 of 50 34 to 45."""
    assert binom.ppf([0.025, 0.975], 20, 0.3).tolist() == [2, 10]
    assert binom.ppf([0.025, 0.975], 50, 0.8).tolist() == [34, 45]
    table = summary(frame_of(exact=[True] * 6 + [False] * 14), n_boot=50_000)
    assert table.loc["exact"].tolist() == pytest.approx([0.3, 0.1, 0.5])
    table = summary(frame_of(exact=[False] * 10 + [True] * 40), n_boot=50_000)
    assert table.loc["exact"].tolist() == pytest.approx([0.8, 0.68, 0.9])


def test_pairing_shows_what_two_intervals_hide():
    """100 examples, both right on 52, only the tuned model on 8, none on 40.

    Alone: 0.60 in [0.50, 0.69] and 0.52 in [0.42, 0.62]: they overlap. Paired: the difference is
    Binomial(100, 0.08) / 100, so 0.08 in [0.03, 0.14], which leaves out 0.
    """
    assert binom.ppf([0.025, 0.975], 100, 0.08).tolist() == [3, 14]
    base, tuned = frame_of(exact=np.arange(100) < 52), frame_of(exact=np.arange(100) < 60)
    row = summary(tuned, base, n_boot=50_000).loc["exact"]
    assert row[["mean", "base", "difference"]].tolist() == pytest.approx([0.60, 0.52, 0.08])
    assert row[["difference_low", "difference_high"]].tolist() == pytest.approx([0.03, 0.14])
    assert row["low"] < 0.52 < 0.60 < summary(base).loc["exact", "high"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_paired_difference_is_antisymmetric(rows):
    a, b = (pd.DataFrame({"exact": [r[i] for r in rows], "fields": [r[2 + i] for r in rows]}) for i in (0, 1))
    ab, ba = summary(a, b, n_boot=200), summary(b, a, n_boot=200)
    names = ["mean", "base", "difference", "difference_low", "difference_high"]
    swapped = ba[["base", "mean", "difference", "difference_high", "difference_low"]] * [1, 1, -1, -1, -1]
    np.testing.assert_allclose(ab[names], swapped, atol=1e-9)
    itself = summary(a, a, n_boot=200)
    assert (itself[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)


def test_summary_takes_numbers_and_refuses_other_examples():
    frame = frame_of(correct=[True, False]).assign(reply=["a", "b"])
    assert summary(frame).index.tolist() == ["correct"]
    with pytest.raises(ValueError, match="got 2 and 1 rows"):
        summary(frame, frame[:1])


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_where_the_normal_test_turns(case):
    """Its two ends are the p at which |k/n - p| = z sqrt(p (1 - p) / n), the definition; ends at 0 and 1 are exact."""
    k, n = case
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1 and low < high
    for p in (low, high):
        assert abs(k / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-5, abs=1e-9)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(n - k, n))


def test_what_fifty_examples_carry():
    """1.96 sqrt(0.25 / 50) = 0.1386 and 1.96 sqrt(0.25 / 100) = 0.0980; Wilson at 1/2 divides by sqrt(1 + 3.84 / n)."""
    for n, margin in ((50, 0.1386), (100, 0.0980)):
        low, high = wilson_interval(n // 2, n)
        assert (high - low) / 2 == pytest.approx(margin / math.sqrt(1 + 3.8415 / n), abs=1e-4)
    assert wilson_interval(41, 50) == pytest.approx((0.692, 0.902), abs=5e-4)


# --- perplexity and closed_book ---------------------------------------------------------------------------------------


@torch.inference_mode()
def naive_nll(model, ids, first) -> float:
    """-sum log p(token | all before it), one prefix at a time, from position `first` on."""
    logps = [model(torch.tensor([ids[:t]])).logits[0, -1].log_softmax(-1) for t in range(first, len(ids))]
    return -sum(logp[token].item() for logp, token in zip(logps, ids[first:], strict=True))


ROWS = [
    {"prompt": "how are you", "completion": "fine"},
    "a text without any chat",
    {"prompt": [*user("x")], "completion": [{"role": "assistant", "content": "a much longer completion"}]},
    "ab",
]


def test_perplexity_equals_the_naive_loop_whatever_the_padding(tiny):
    """A row counts from after `<s>u:...</s>a:` (prompt + 6 tokens), its `</s>` included; a text from token 2."""
    model, tokenizer = tiny
    texts = ["<s>u:how are you</s>a:fine</s>", ROWS[1], "<s>u:x</s>a:a much longer completion</s>", "ab"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    nll = [naive_nll(model, row, first) for row, first in zip(ids, (17, 1, 7, 1), strict=True)]
    for batch_size in (1, 3, 8):
        result = perplexity(model, tokenizer, ROWS, batch_size)
        assert result.texts["tokens"].tolist() == [5, 22, 25, 1]
        assert result.texts["nll"].tolist() == pytest.approx(nll, rel=1e-5)
        assert result.ppl == pytest.approx(math.exp(sum(nll) / 53), rel=1e-5)
        assert result.low < result.ppl < result.high


def test_perplexity_of_a_uniform_model_is_the_vocabulary(tiny):
    model, tokenizer = tiny
    uniform = LlamaForCausalLM(model.config).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    result = perplexity(uniform, tokenizer, ROWS)
    assert (result.ppl, result.low, result.high) == pytest.approx([len(tokenizer)] * 3, rel=1e-5)


def test_perplexity_interval_of_two_texts(tiny):
    """Two texts, four equally likely resamples: a quarter is the first text twice, a quarter the second twice."""
    alone = [perplexity(*tiny, [text]).ppl for text in ("hello there", "zzz")]
    both = perplexity(*tiny, ["hello there", "zzz"])
    assert (both.low, both.high) == pytest.approx((min(alone), max(alone)), rel=1e-5)


def test_perplexity_of_one_token(tiny):
    with pytest.raises(ValueError, match="row 1 has no token"):
        perplexity(*tiny, ["ab", "a"])


@pytest.mark.parametrize(
    ("reply", "answer", "accept", "correct", "exact"),
    [
        ("Paris", "Paris", [], True, True),
        ("paris.", "Paris", [], True, True),
        ("The capital of France is **Paris**!", "Paris", [], True, False),
        ("Parisian", "Paris", [], False, False),
        ("It boils at 100 °C", "100 degrees", ["100 °C", "100"], True, False),
        ("1000", "100", [], False, False),
        ("₹1,850", "Rs 1850", ["1,850"], True, True),
        ("Rs 2,30,000.", "Rs 230000", [], True, True),
        ("3.14", "3", [], False, False),
        ("at 4:20 am", "4:20 am", [], True, False),
        ("at 4:20 am", "4", ["20"], False, False),
        ("70%", "70", [], True, False),
        ("70", "70 percent", ["70%"], False, False),
        ("SPLIT 9", "SPLIT-9", [], True, True),
        ("Ｐａｒｉｓ", "Paris", [], True, True),  # full-width letters
        ("", "Paris", ["?"], False, False),
        ("?", "Paris", ["?!"], False, False),
    ],
)
def test_closed_book_matching(monkeypatch, reply, answer, accept, correct, exact):
    monkeypatch.setattr(evaluate, "generate", lambda model, tokenizer, prompts, **options: [reply for _ in prompts])
    frame = evaluate.closed_book(None, None, [{"question": "Q?", "answer": answer, "accept": accept}])
    assert frame.to_dict("records") == [{"question": "Q?", "reply": reply, "correct": correct, "exact": exact}]


def test_closed_book_asks_the_model(tiny):
    facts = [{"question": q, "answer": "", "accept": []} for q in ("who are you", "why")]
    frame = evaluate.closed_book(*tiny, facts)
    assert frame["reply"].tolist() == [one_by_one(*tiny, user(fact["question"]), 24)[0] for fact in facts]
