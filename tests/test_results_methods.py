"""experiments/methods/run.py: what its arms ask, which rows they see, and that its controls answer as they should."""

import json
import math
import re

import numpy as np
import pytest
import torch
from scripts import script
from transformers import LlamaConfig, LlamaForCausalLM

from ftlab.classroom.results import difference
from ftlab.tasks import ask, handbook, tidy, triage

methods = script("experiments/methods/run.py")
RUNS = [json.loads(line) for line in methods.FILE.read_text(encoding="utf-8").splitlines()]


def test_the_docstring_names_every_arm_and_every_task():
    named = set(re.findall(r"^\| ([\w -]+?(?: \+ \w+)?) \|", methods.__doc__, re.M)) - {"arm", "task"}
    assert named >= {"facts", "ask", "tidy", "triage", "zero-shot", "few-shot", "retrieval", "constrained", "rules"}
    assert named >= {"fine-tuning", "fine-tuning + retrieval"}
    assert all(f"**{task}**" in methods.__doc__ for task in [*methods.FIRST, "size"])


def test_every_run_is_wanted_once():
    runs = methods.runs()
    assert len(set(runs)) == len(runs)
    assert {seed for task, arm, seed in runs if arm == "fine-tuning"} == {0, 1, 2}


@pytest.mark.parametrize("task", ["facts", "ask", "tidy", "triage"])
def test_a_prompt_ends_with_the_question_and_never_shows_its_answer(task):
    rows = methods.test_rows(task)
    for arm in ("zero-shot", "few-shot", "retrieval"):
        chats = methods.prompts(task, arm)
        for row, chat in zip(rows, chats, strict=True):
            assert row["prompt"][-1]["content"] in chat[-1]["content"] and chat[-1]["role"] == "user"
            roles = [message["role"] for message in chat]
            assert roles == ["system", *["user", "assistant"] * ((len(chat) - 2) // 2), "user"]
        shots = (len(chats[0]) - 2) // 2
        assert shots == {"zero-shot": 0, "few-shot": methods.SHOTS}.get(arm, 0 if task == "facts" else methods.NEAREST)
    inputs = {row["prompt"][-1]["content"] for row in methods.train_rows(task)}
    assert not inputs & {row["prompt"][-1]["content"] for row in rows}


def test_the_nearest_example_comes_last():
    chat = methods.prompts("tidy", "retrieval")[0]
    nearest = methods.index("tidy").search(chat[-1]["content"], 1)[0]
    assert chat[-3]["content"] == methods.train_rows("tidy")[nearest]["prompt"][-1]["content"]


def test_examples_of_a_smaller_set_come_from_its_rows():
    allowed = {row["prompt"][-1]["content"] for row in methods.train_rows("tidy")[:32]}
    for chat in methods.prompts("tidy", "retrieval", of=32):
        assert {message["content"] for message in chat[1:-1] if message["role"] == "user"} <= allowed


def test_a_trained_model_is_asked_with_the_instruction_of_its_training():
    for task in ("ask", "tidy", "triage"):
        chat = methods.prompts(task, "zero-shot", trained=True)[0]
        assert chat[0] == methods.train_rows(task)[0]["prompt"][0] != methods.prompts(task, "zero-shot")[0][0]


def test_the_reader_always_sees_the_passage_that_holds_the_answer():
    rows = methods.reader_rows()
    assert len(rows) == 150 and all(row["evidence"] in row["prompt"][-1]["content"] for row in rows)
    assert all(row["prompt"][-1]["content"].endswith(row["question"]) for row in rows)


def test_no_test_answer_is_taught():
    taught = {row.get("question") for row in methods.closed_book()}
    assert not taught & {row["question"] for row in methods.test_rows("facts")}
    assert len(methods.closed_book()) == methods.TRAINED["facts"]


def test_the_search_without_a_model_gives_one_sentence_of_one_page():
    said = methods.best_sentence("Up to what amount may an agent in the first four weeks approve a refund alone?")
    assert "Rs 280" in said and len(said) < 250
    assert methods.best_sentence("xyzzy") == ""


@pytest.mark.parametrize("task", ["facts", "ask", "tidy", "triage"])
def test_the_right_answers_score_one_and_empty_ones_nothing(task):
    rows = methods.test_rows(task)
    scorer = {"facts": handbook, "ask": ask, "tidy": tidy, "triage": triage}[task].scorer
    assert all(scorer(row["completion"][-1]["content"], row) == 1 for row in rows)
    assert not any(scorer("", row) for row in rows)


# --- The grammar and the schema ---------------------------------------------------------------------------------------


def pattern(gbnf: str, rule: str = "root") -> str:
    """A GBNF grammar that is not recursive, one rule a line, as a regular expression: rules are put in for their names.

    llama.cpp's own engine cannot be asked without a model.
    """
    body = re.search(rf"^{rule} ::= (.*)$", gbnf, re.M)[1]
    parts = re.findall(r'"([^"]*)"|([a-z]+)|(\[[^]]*\]|\{[^}]*\}|\S)', body)  # a literal, a name, anything else
    return "".join(
        {"(": "(?:"}.get(other, other) or f"(?:{pattern(gbnf, name) if name else re.escape(literal)})"
        for literal, name, other in parts
    )


def test_a_grammar_becomes_a_regular_expression():
    gbnf = """
root ::= "a" (", " word){0,2} end?
word ::= [b-d]+ | "("
end ::= "." | " ok"? "?"
"""
    accepts = re.compile(pattern(gbnf)).fullmatch
    assert all(map(accepts, ["a", "a.", "a?", "a ok?", "a, b", "a, (, dcb?"]))
    assert not any(map(accepts, ["", "aa", "a, ", "a, b, b, b", "a, e", "a.?", "axb", "a ?"]))


def test_the_grammar_lets_every_right_query_pass_and_nothing_else():
    accepts = re.compile(pattern(methods.GRAMMAR)).fullmatch
    gold = [row["completion"][0]["content"] for row in methods.test_rows("ask")]
    assert len(gold) == 132 and [query for query in gold if not accepts(query)] == []
    assert all(accepts(f"SELECT {name} FROM orders") for name in re.findall(r"(\w+) (?:INT|TEXT)", ask.SCHEMA))
    wrong = [
        "",
        "banana",
        "SELECT id FROM orders; DROP TABLE orders",
        "select id from orders",
        "SELECT price FROM orders",
        "SELECT id FROM users",
        "SELECT id FROM orders WHERE city=Pune",
        "SELECT id FROM orders WHERE total='300'",
        "SELECT id FROM orders LIMIT 1 WHERE tip=0",
    ]
    assert [query for query in wrong if accepts(query)] == []


def test_the_schema_of_triage_lets_every_right_label_pass_and_no_wrong_one():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(triage.SCHEMA)
    accepts = jsonschema.Draft202012Validator(triage.SCHEMA).is_valid
    gold = [json.loads(row["completion"][0]["content"]) for row in methods.test_rows("triage")]
    assert len(gold) == 150 and all(map(accepts, gold))
    label = gold[0]
    wrong = [
        *({name: value for name, value in label.items() if name != missing} for missing in triage.FIELDS),
        label | {"city": "Pune"},
        label | {"intent": "refund"},
        label | {"urgency": None},
        label | {"language": "hindi"},
        *(label | {"order_id": number} for number in ("61834", "6183470", "RR-618347", 618347)),
        *(label | {"refund_amount": amount} for amount in (-1, 0.5, "60", True)),
    ]
    assert not any(map(accepts, wrong))


# --- Answers and perplexity -------------------------------------------------------------------------------------------


def test_a_trained_model_of_facts_has_the_lower_limit(monkeypatch):
    limits = []
    monkeypatch.setattr("ftlab.answers", lambda model, tokenizer, chats, n, **_: limits.append(n) or [""] * len(chats))
    monkeypatch.setattr(methods, "trained", lambda *_, **__: (None, {}))
    monkeypatch.setattr(methods, "tokenizer", lambda: None)
    monkeypatch.setattr(methods, "cost", lambda *_: {})
    for arm in ("fine-tuning", "fine-tuning + retrieval"):
        methods.on_pages(arm, 0)
    assert set(limits) == {methods.SHORT} and methods.TOKENS["facts"] > methods.SHORT
    limits.clear()
    for task in methods.TOKENS:
        methods.asked(None, task, methods.prompts(task, "zero-shot"))
    assert limits == list(methods.TOKENS.values())


def test_the_docstring_says_how_long_the_answers_of_a_trained_model_of_facts_are():
    runs = [run for run in RUNS if run["task"] == "facts" and "fine-tuning" in run["arm"]]
    mean = sum(run["answer_tokens"] for run in runs) / len(runs)
    assert f"have {mean:.0f} tokens on average" in methods.__doc__


@pytest.fixture
def llama(monkeypatch):
    """A random Llama whose tokens are the letters a to z."""
    monkeypatch.setattr(methods, "tokenizer", lambda: lambda text: {"input_ids": [ord(letter) - 97 for letter in text]})
    torch.manual_seed(0)
    shape = {"vocab_size": 26, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, initializer_range=0.5)).eval()


def test_perplexity_is_that_of_a_loop_over_tokens(llama):
    """Each letter after the first is predicted from those before it, in float64; a long text counts for its length."""
    texts = ["abc", "thequickbrownfox", "z"]
    got = methods.perplexity(llama, texts)
    losses = []
    with torch.inference_mode():
        for text in texts:
            for t in range(1, len(text)):
                ids = torch.tensor([[ord(letter) - 97 for letter in text[:t]]])
                logps = llama.double()(input_ids=ids).logits[0, -1].log_softmax(-1)
                losses.append(-logps[ord(text[t]) - 97].item())
    assert len(losses) == 17 and got == pytest.approx(math.exp(sum(losses) / 17), rel=1e-4, abs=1e-3)  # 3 decimals


def test_the_perplexity_of_guessing_is_the_size_of_the_vocabulary(llama):
    torch.nn.init.zeros_(llama.lm_head.weight)
    assert methods.perplexity(llama, ["abc", "hello"]) == 26


# --- The stored runs, and what notebook 01 reads off them -------------------------------------------------------------


def values(task: str, arm: str) -> np.ndarray:
    """(seeds, examples)"""
    return np.array([run["values"] for run in RUNS if (run["task"], run["arm"]) == (task, arm)])


def family(task: str, arm: str) -> str:
    """On facts, all that answers from pages that were found is retrieval."""
    if task == "facts" and arm in ("rules", "fine-tuning + retrieval"):
        return "retrieval"
    return arm.split(" +")[0] if arm in ("retrieval", "rules") or "fine-tuning" in arm else "prompting"


def test_no_run_is_stored_twice():
    names = [(run["task"], run["arm"], run["seed"]) for run in RUNS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("task", "best", "other"), [
    ("facts", "fine-tuning + retrieval", "fine-tuning"), ("ask", "rules", "fine-tuning"),
    ("tidy", "fine-tuning", "rules"), ("triage", "rules", "fine-tuning + retrieval"),
])  # fmt: skip
def test_the_pairs_of_notebook_01_are_the_best_arm_and_the_best_of_another_family(task, best, other):
    arms = {run["arm"] for run in RUNS if run["task"] == task}
    assert len(arms) == (6 if task in ("facts", "tidy") else 7)  # these two have no constrained decoding
    for arm in arms:
        seeds = 3 if "fine-tuning" in arm else 1
        assert values(task, arm).shape == (seeds, len(methods.test_rows(task)))
    ranked = sorted(arms, key=lambda arm: -values(task, arm).mean())
    assert ranked[0] == best and next(arm for arm in ranked if family(task, arm) != family(task, best)) == other
    mean, low, high = difference(values(task, best) - values(task, other))
    assert 0 < low < mean < high
