"""ftlab.evaluate: answers equal to transformers' own, intervals equal to scipy's, scores that refuse nonsense."""

import copy
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ftlab import answers, compare, evaluate, score
from ftlab import llama as llama_module
from ftlab.evaluate import Score, errors, plain_inference, wilson_interval

pytestmark = pytest.mark.usefixtures("one_thread")


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


PROMPTS = [chat("Hi"), chat("How many orders in May, and why?"), chat("a", "b", "c"), chat("What is 2 + 2? " * 6)]


@pytest.fixture(scope="module")
def pair(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny)


def by_generate(model, tokenizer, prompt) -> str:
    batch = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(new[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_generate_one_at_a_time_in_the_order_of_the_prompts(pair, batch_size):
    wanted = [by_generate(*pair, prompt) for prompt in PROMPTS]
    assert answers(*pair, PROMPTS, max_new_tokens=12, batch_size=batch_size) == wanted and len(set(wanted)) > 1


def test_tools_are_written_into_the_prompt_by_the_template(pair):
    model, tokenizer = pair[0], copy.deepcopy(pair[1])
    tokenizer.chat_template = "{{ tools | map(attribute='name') | join if tools }}{{ messages[0]['content'] }}"
    prompts = [chat(text) for text in ("Hi", "fHi", "gHi")]
    tools = [{"name": "f"}]
    assert answers(model, tokenizer, prompts[:1], 12, tools=tools) == answers(model, tokenizer, prompts[1:2], 12)
    assert answers(model, tokenizer, prompts[:1], 12) == [answers(model, tokenizer, prompts, 12)[0]]


def test_a_beginning_that_the_template_writes_is_not_written_twice(llama):
    pair = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(llama)
    assert answers(*pair, PROMPTS, 12) == [by_generate(*pair, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("llama", [True, False])
def test_a_tokenizer_without_a_pad_token_and_a_model_without_an_end_token_answer_the_same(pair, monkeypatch, llama):
    """As Llama 3's tokenizer, and a model whose config names no end; with the decoder of a Llama and without it."""
    model, tokenizer = copy.deepcopy(pair)
    wanted = answers(model, tokenizer, PROMPTS, 40)
    tokenizer.pad_token = None
    model.generation_config.eos_token_id = None
    monkeypatch.setattr("ftlab.cpu.covers", lambda _: llama)
    assert answers(model, tokenizer, PROMPTS, 40) == wanted


@pytest.fixture(scope="module")
def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
    return Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).eval()


@pytest.mark.parametrize(("end", "steps"), [(2, 8), (0, 1), ([2, 0], 1)])
def test_an_end_token_may_have_the_id_0(pair, qwen, end, steps):
    model, calls = copy.deepcopy(qwen), []

    def only_0(module, inputs, logits):
        calls.append(logits)
        return logits.index_fill(-1, torch.tensor([0]), 1e9)

    model.lm_head.register_forward_hook(only_0)
    model.generation_config.eos_token_id = end
    answers(model, pair[1], PROMPTS[:1], 8)
    assert len(calls) == steps


def test_a_model_that_is_no_llama_answers_through_generate(pair, qwen):
    other = copy.deepcopy(qwen)
    asked_for = {"repetition_penalty": 1.5, "num_beams": 4}  # Qwen's own files have the first: greedy is without it
    before = {name: getattr(other.generation_config, name) for name in asked_for}
    other.generation_config.update(**asked_for)
    got = answers(other, pair[1], PROMPTS, max_new_tokens=12)
    other.generation_config.update(**before)
    assert got == [by_generate(other, pair[1], prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["llama", "another"])
def test_sampled_answers_are_drawn_from_the_model(pair, qwen, kind, monkeypatch):
    """The first token of 3,000 answers to one prompt against the softmax at temperature 0.5, by a chi-square test."""
    torch.manual_seed(1)
    model, tokenizer = (pair[0] if kind == "llama" else qwen), pair[1]
    monkeypatch.setattr(model.generation_config, "top_k", 5)  # as some files have them: not asked for here
    monkeypatch.setattr(model.generation_config, "top_p", 0.5)
    ids = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        p = (model(ids).logits[0, -1] / 0.5).softmax(-1).double()
    # Tokens that decode to nothing or to the same text share a bin; so do all that are expected less than 5 times
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(p))]
    share = Counter()
    for text, chance in zip(texts, p.tolist(), strict=True):
        share[text] += chance
    said = Counter(answers(model, tokenizer, [PROMPTS[0]] * 3000, 1, 500, temperature=0.5))
    common = [text for text in share if share[text] * 3000 >= 5]
    got = [said[text] for text in common] + [3000 - sum(said[text] for text in common)]
    want = [share[text] * 3000 for text in common] + [3000 * (1 - sum(share[text] for text in common))]
    assert len(common) > 10 and stats.chisquare(got, want).pvalue > 1e-3
    state = torch.get_rng_state()
    first, again, other = (answers(model, tokenizer, PROMPTS, 12, temperature=1.0, seed=s) for s in (3, 3, 4))
    assert first == again != other and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [-1.0, -1e-9, float("nan")])
def test_a_temperature_that_makes_no_sense_is_refused(pair, temperature):
    with pytest.raises(ValueError, match=f"got temperature={temperature}, wanted 0"):
        answers(*pair, PROMPTS, 4, temperature=temperature)


def test_an_answer_that_could_never_end_is_refused(pair, monkeypatch):
    model, tokenizer = pair[0], copy.deepcopy(pair[1])
    tokenizer.eos_token = None
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        answers(model, tokenizer, PROMPTS, 4)


def test_a_prompt_without_tokens_is_refused_by_its_number(pair):
    model, tokenizer = pair[0], copy.deepcopy(pair[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="prompt 1: got no tokens"):
        answers(model, tokenizer, [chat("Hi"), chat("")], 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 900), max_size=40), st.integers(1, 9), st.integers(100, 4000))
def test_batches_hold_every_row_once_within_rows_and_tokens(lengths, most_rows, most_tokens):
    batches = evaluate._batches(lengths, most_rows, most_tokens)
    assert sorted(i for batch in batches for i in batch) == [*range(len(lengths))]
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) <= most_rows and (len(batch) * longest <= most_tokens or len(batch) == 1)
    lengths_in_order = [lengths[i] for batch in batches for i in batch]
    assert lengths_in_order == sorted(lengths, reverse=True)


def test_keys_and_values_of_a_batch_stay_within_the_limit(pair, monkeypatch):
    """micro's shape: 2 x layers x kv_heads x head_dim numbers of 4 bytes a token."""
    shapes, cache = [], llama_module.Decoder._cache

    def watched(self, batch, length):
        made = cache(self, batch, length)
        shapes.append(made.nbytes)
        return made

    monkeypatch.setattr(llama_module.Decoder, "_cache", watched)
    whole = answers(*pair, PROMPTS * 6, 12)
    (size,), limit = shapes, shapes[0] / 3
    shapes.clear()
    assert answers(*pair, PROMPTS * 6, 12, cache_bytes=limit) == whole
    assert len(shapes) > 2 and max(shapes) <= limit < size


def test_a_long_wait_is_counted_and_leaves_no_line(pair, monkeypatch):
    said = []
    monkeypatch.setattr(evaluate._Line, "show", lambda self, text: said.append(text))
    answers(*pair, PROMPTS, 4)
    assert said == []
    answers(*pair, PROMPTS, 4, batch_size=1)
    counts = [text.split(" of ")[0] for text in said[:-1]]
    assert counts == ["1", "2", "3", "4"] and all("about" in text for text in said[:-1]) and said[-1] == ""


def hooked(model):
    def half(module, args, output):
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

    model.model.layers[0].register_forward_hook(half)


def patched(model):
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 0.5 * forward(x)


def without_repeats(model):
    model.generation_config.no_repeat_ngram_size = 1


def suppressed(model):
    model.generation_config.suppress_tokens = [*range(5, 500)]


def doubled(model):
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


@pytest.mark.parametrize("change", [hooked, patched, without_repeats, suppressed, doubled])
def test_a_changed_model_answers_as_its_own_generate(pair, change):
    """A steering hook, a patched method, a generation_config that asks for more: not the quick decoder's business."""
    model = copy.deepcopy(pair[0])
    before = answers(model, pair[1], PROMPTS, 12)
    change(model)
    got = answers(model, pair[1], PROMPTS, 12)
    assert got == [by_generate(model, pair[1], prompt) for prompt in PROMPTS] and got != before


def test_training_mode_and_autocast_are_given_back(pair):
    model, _ = pair
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16), plain_inference(model):
        assert not model.training and not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        assert model.lm_head(torch.ones(1, 64)).dtype == torch.float32
    assert model.training and torch.is_grad_enabled()
    model.eval()


def test_each_layer_gets_its_own_mode_back(pair):
    model = copy.deepcopy(pair[0]).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with plain_inference(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_4_bit_layers_can_be_trained_on_after_an_answer(llama):
    """Where a CPU has bf16, bitsandbytes packs 4-bit weights anew in eval mode: no gradient comes through them then."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, quantization_config=four)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(5, 25)[None]

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.requires_grad]

    before = [gradient.clone() for gradient in gradients()]
    packs = "support_avx512bf16_for_cpu"
    own = {name: getattr(layer, packs) for name, layer in model.named_modules() if hasattr(layer, packs)}
    with plain_inference(model):
        said = model(ids).logits
    assert own and own == {name: getattr(model.get_submodule(name), packs) for name in own}  # given back
    torch.testing.assert_close(gradients(), before)
    torch.testing.assert_close(said.clone(), model(ids).logits.detach())
    assert min(gradient.abs().max() for gradient in before) > 0


def test_not_even_the_autocast_that_training_leaves(pair, qwen):
    """accelerate wraps forward for mixed precision and does not unwrap it; a trainer's model comes back like this."""
    trained, dtypes = copy.deepcopy(qwen), []
    AcceleratorState._reset_state(reset_partial_state=True)  # one per process: leave none behind for other tests
    trained = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(trained)
    AcceleratorState._reset_state(reset_partial_state=True)
    trained.model.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    trained(torch.tensor([[1, 2]]))
    assert dtypes == [torch.bfloat16]
    wrapped = trained.forward
    assert answers(trained, pair[1], PROMPTS, 6) == answers(qwen, pair[1], PROMPTS, 6)
    assert set(dtypes[1:]) == {torch.float32} and trained.forward == wrapped


def test_no_prompts_have_no_answers(pair, qwen):
    assert answers(*pair, []) == answers(qwen, pair[1], []) == []


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_proportion_is_scipys(case):
    wanted = stats.binomtest(*case).proportion_ci(0.95, method="wilson")
    assert wilson_interval(*case) == pytest.approx(tuple(wanted), abs=1e-6)


def test_a_score_of_right_and_wrong_and_a_score_of_shares():
    rows = [{"gold": i} for i in range(10)]
    yes_no = score(list("0123456xyz"), rows, lambda answer, row: answer == str(row["gold"]))
    assert (
        yes_no.mean == 0.7 and (yes_no.low, yes_no.high) == wilson_interval(7, 10) and "7 of 10 right" in repr(yes_no)
    )
    shares = score(list("0123456789"), rows, lambda answer, row: row["gold"] / 10)
    wanted = stats.ttest_1samp(shares.values, 0).confidence_interval()
    assert (shares.low, shares.high) == pytest.approx(tuple(wanted))
    assert "mean of 10" in repr(shares) and shares.answers[3] == "3"


@pytest.mark.parametrize(
    ("said", "scorer", "message"),
    [
        (["a"], lambda a, r: 1, "argument 2 is longer"),
        (["a", "b"], lambda a, r: 3 if a == "b" else 0, r"gave \[3.\]"),
        (["a", "b"], lambda a, r: -1 if a == "b" else 0, r"gave \[-1.\]"),
        (["a", "b"], lambda a, r: float("nan"), r"gave \[nan nan\]"),
        (["a", "b"], lambda a, r: None, r"gave \[nan nan\]"),
        (["a", "b"], lambda a, r: "b", "could not convert"),
    ],
)
def test_a_score_that_makes_no_sense_is_refused(said, scorer, message):
    with pytest.raises(ValueError, match=message):
        score(said, [{}, {}], scorer)
    with pytest.raises(ValueError, match="got no values"):
        score([], [], scorer)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=5, max_size=80))
def test_a_difference_is_paired_turns_its_sign_and_counts_both_ways(pairs):
    a, b = (Score.of([pair[side] for pair in pairs]) for side in (0, 1))
    there, back = compare(a, b), compare(b, a)
    assert there.mean == pytest.approx(a.mean - b.mean) and there.mean == pytest.approx(-back.mean)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low)) and there.low <= there.mean <= there.high
    assert (there.better, there.worse) == (sum(x > y for x, y in pairs), sum(x < y for x, y in pairs))


def test_a_score_is_found_among_others():
    scores = [Score.of([1, 0]) for _ in range(3)]
    assert scores.index(scores[2]) == 2 and len(set(scores)) == 3


def test_a_paired_difference_shows_what_the_two_intervals_hide():
    """50 and 62 of 100, all of the first among the second: their own intervals overlap, the difference leaves out 0."""
    a, b = Score.of([1] * 62 + [0] * 38), Score.of([1] * 50 + [0] * 50)
    assert a.low < b.high and compare(a, b).low > 0 and "a difference" in repr(compare(a, b))
    assert "a difference" in repr(compare(b, a)) and "undecided" in repr(compare(a, a))
    with pytest.raises(ValueError, match=r"\[1, 100\] rows"):
        compare(a, Score.of([1]))


@pytest.mark.parametrize("n", [3, 8, 20])
@pytest.mark.parametrize("differ", [0.1, 0.4, 0.9])
def test_two_equal_models_are_seldom_called_different(n, differ):
    """The chance of it, summed over all counts of rows on which one is better: 5 % at most, of few rows too."""
    alarms = 0.0
    for better, worse in itertools.product(range(n + 1), repeat=2):
        if (same := n - better - worse) >= 0:
            a, b = ([*x, *[0] * same] for x in ([1] * better + [0] * worse, [0] * better + [1] * worse))
            found = compare(Score.of(a), Score.of(b))
            chance = stats.multinomial.pmf([better, worse, same], n, [differ / 2, differ / 2, 1 - differ])
            alarms += chance * (found.low > 0 or found.high < 0)
    assert alarms <= 0.05 and compare(Score.of([1, 1, 1]), Score.of([0, 0, 0])).low <= 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_interval_of_a_paired_difference_is_walds_with_half_a_row_more_in_each_cell(pairs):
    """Agresti and Min's: the 2 x 2 table of both verdicts, 0.5 added to its four cells, then variance over n."""
    cells = np.array([0.5 + pairs.count(cell) for cell in itertools.product((True, False), repeat=2)])
    gap, shares = np.array([0, 1, -1, 0]), cells / cells.sum()
    sd = math.sqrt((shares @ gap**2 - (shares @ gap) ** 2) / cells.sum())
    found = compare(*(Score.of([pair[side] for pair in pairs]) for side in (0, 1)))
    z = stats.norm.ppf(0.975)
    low, high = max(shares @ gap - z * sd, -1), min(shares @ gap + z * sd, 1)
    if stats.binomtest(pairs.count((True, False)), max(sum(x != y for x, y in pairs), 1)).pvalue >= 0.05:
        low, high = min(low, 0), max(high, 0)  # McNemar's exact test sees nothing
    assert (found.low, found.high) == pytest.approx((low, high))


def test_errors_show_the_worst_answers_with_their_gold_and_escape_what_a_model_wrote():
    rows = [{"prompt": chat(f"q{i}"), "completion": [{"content": f"gold{i}"}]} for i in range(3)]
    shown = errors(score(["gold0", "<b>", "bad"], rows, lambda a, r: a == r["completion"][0]["content"]), rows, most=6)
    assert "gold1" in repr(shown) and "gold2" in repr(shown) and "gold0" not in repr(shown)
    worst = errors(Score.of([0.5, 0, 0.2], ["half", "none", "some"]), rows, most=2)
    assert [got for _, got, _ in worst] == ["none", "some"]
    assert "&lt;b&gt;" in shown._repr_html_() and "<b>" not in shown._repr_html_()
