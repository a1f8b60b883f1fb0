"""recipes/rejection_sampling.py and recipes/distill.py: rows that are drawn and then trained, the distribution they are
drawn from, a student that comes nearer to its teacher, kills, and what both say of bad input.
"""

import io
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from scripts import script
from test_recipes import MICRO, chat, line_of, run, running, same, series, train, warnings_in, weights, write
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlab.paths import DATA

pytestmark = pytest.mark.usefixtures("one_thread", "clean_imports")
TINY_ROWS = [json.loads(line) for line in (DATA / "ask" / "train.jsonl").read_text().splitlines()[:12]]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def draw(out: Path, *words) -> tuple[list[dict], list[dict], dict]:
    """(the rows, what was drawn, the record)."""
    run("rejection_sampling", "--tiny", "--out", out, *words)
    return read(out)


def read(out: Path) -> tuple[list[dict], list[dict], dict]:
    return lines(out), lines(out.with_suffix(".drawn.jsonl"))[1:], json.loads(out.with_suffix(".json").read_text())


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    """A module beside which one works: its functions can be named as scorers."""
    text = """
import re
def short(answer, row): return len(answer) < 40
def graded(answer, row): return min(len(answer), 50) / 50
def letters(answer, row): return min(len(answer), 200) / 200
def never(answer, row): return 0
def seven(answer, row): return 7
def nothing(answer, row): return None
def nan(answer, row): return float("nan")
def in_list(answer, row): return answer.strip() in row["accept"]
"""
    (tmp_path / "my_scorers.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "rows.jsonl"
    draw(out)
    return out


# --- Rejection sampling: what is kept -------------------------------------------------------------


def test_the_rows_hold_answers_that_passed_and_sft_learns_them(scorers, tmp_path):
    write(tmp_path / "rows.jsonl", [{**row, "completion": chat("", "SELECT 1")["completion"]} for row in TINY_ROWS])
    words = ["--file", tmp_path / "rows.jsonl", "--scorer", "my_scorers:short", "--keep", 2]
    rows, found, record = draw(tmp_path / "out.jsonl", *words)
    passing = [
        {a for a, cut in zip(each["answers"], each["cut"], strict=True) if len(a) < 40 and a.strip() and not cut}
        for each in found
    ]
    assert len(found) == 12 and all(len(each["answers"]) == 4 for each in found)
    assert {len(some) for some in passing} >= {1, 2}  # some prompts have fewer than are wanted
    kept = {}
    for row in rows:
        kept.setdefault(row["id"], []).append(row["completion"][0]["content"])
    for row, some in zip(TINY_ROWS, passing, strict=True):
        own = kept.get(row["id"], [])
        assert len(own) == len({text.strip() for text in own}) == min(2, len({text.strip() for text in some}))
        assert set(own) <= some
    assert all(row["prompt"] in [each["prompt"] for each in TINY_ROWS] and "kind" in row for row in rows)
    assert record["kept"] == len(rows)

    folder = tmp_path / "run"
    words = ["--train_file", tmp_path / "out.jsonl", "--validation_file", tmp_path / "out.jsonl", "--max_rows", 8]
    train("sft", folder, *words)
    losses = series(folder, "eval_loss")
    assert losses[6] < losses[2]  # it learns what was drawn


def told(answers: list[str], scores: list[float], cut: list[bool] | None = None) -> dict:
    return {
        "answers": answers,
        "scores": scores,
        "cut": cut or [False] * len(answers),
        "tokens": [2] * len(answers),
        "seconds": 0.5,
    }


def asked(**other) -> SimpleNamespace:
    usual = {"at_least": 1.0, "keep": 2, "take": "shortest", "reasoning": False, "gap": 0.0}
    return SimpleNamespace(**(usual | other))


CHOICES = {  # answers, scores, cut, what is asked, what is kept
    "shortest": (["aaa", "bb", "c"], [1, 1, 1], None, {}, ["c", "bb"]),
    "first": (["aaa", "bb", "c"], [1, 1, 1], None, {"take": "first"}, ["aaa", "bb"]),
    "wrong": (["aaa", "bb", "c"], [1, 1, 0], None, {}, ["bb", "aaa"]),
    "cut": (["aaa", "bb", "c"], [1, 1, 1], [False, False, True], {}, ["bb", "aaa"]),
    "empty": (["aaa", " ", ""], [1, 1, 1], None, {}, ["aaa"]),
    "twice": (["aa", "b", " aa\n", "aa"], [1, 1, 1, 1], None, {"take": "first"}, ["aa", "b"]),
    "the first of two that are one": ([" aa\n", "aa"], [1, 1], None, {"take": "first"}, [" aa\n"]),
    "graded": (["aaa", "bb", "c"], [0.9, 0.8, 0.79], None, {"at_least": 0.8}, ["bb", "aaa"]),
    "best": (["aaa", "bb", "c"], [0.9, 0.95, 0.8], None, {"at_least": 0.85, "take": "best"}, ["bb", "aaa"]),
    "no threshold": (["aaa", "bb", "c"], [-9, 2, -3], None, {"at_least": None, "take": "best"}, ["bb", "c"]),
    "none": (["aaa"], [0.5], None, {}, []),
    "reasoning is cut": (["<think>long</think>\n\na"], [1], None, {}, ["a"]),
    "reasoning is kept": (["<think>x</think>\na"], [1], None, {"reasoning": True}, ["<think>x</think>\na"]),
    "one answer, two thoughts": (["<think>x</think>a", "<think>y</think>a"], [1, 1], None, {}, ["a"]),
    "reasoning that never ends": (["<think>a"], [1], None, {"reasoning": True}, []),
}


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("messages", [True, False])
def test_what_is_kept_of_a_prompt(case, messages):
    answers, scores, cut, how, wanted = CHOICES[case]
    row = chat("q", "gold") | {"kind": "k"} if messages else {"prompt": "q", "completion": "gold", "kind": "k"}
    rows = script("recipes/rejection_sampling.py").chosen([row], [told(answers, scores, cut)], asked(**how))
    said = [row["completion"][0]["content"] if messages else row["completion"] for row in rows]
    assert said == wanted
    assert all((each["prompt"], each["kind"]) == (row["prompt"], "k") for each in rows)
    if messages:
        assert all(each["completion"][0]["role"] == "assistant" for each in rows)


PAIRS = {  # answers, scores, cut, what is asked, the answers of the pair
    "best over worst": (["a", "bb", "c"], [0.5, 0.9, 0.2], None, {}, ("bb", "c")),
    "by right and wrong": (["a", "bb", "c"], [0, 1, 0], None, {}, ("bb", "a")),
    "of equal scores the first, whatever its length": (["aa", "a", "b", "bb"], [1, 1, 0, 0], None, {}, ("aa", "b")),
    "all alike": (["a", "b"], [1, 1], None, {}, None),
    "one answer": (["a"], [1], None, {}, None),
    "too near": (["a", "b"], [0.6, 0.2], None, {"gap": 0.5}, None),
    "just far enough": (["a", "b"], [0.7, 0.4], None, {"gap": 0.3}, ("a", "b")),
    "the best is cut": (["a", "b", "c"], [1, 0.5, 0], [True, False, False], {}, ("b", "c")),
    "the worst is cut": (["a", "b", "c"], [1, 0.5, 0], [False, False, True], {}, ("a", "b")),
    "the best and the worst are empty": (["", "b", "c", " "], [1, 0.5, 0.4, 0], None, {}, ("b", "c")),
    "none is whole": (["a", ""], [1, 0], [True, False], {}, None),
    "one text, two scores": (["a", " a"], [1, 0], None, {}, None),  # a judge that isn't sure
    "reasoning is cut": (["<think>x</think>a", "<think>y</think>b"], [1, 0], None, {}, ("a", "b")),
    "reasoning is kept": (["<think>x</think>a", "b"], [1, 0], None, {"reasoning": True}, ("<think>x</think>a", "b")),
    "reasoning that never ends": (["<think>a", "b"], [1, 0], None, {"reasoning": True}, None),
    "no threshold": (["a", "b"], [-3.5, -9], None, {"at_least": 1.0}, ("a", "b")),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("messages", [True, False])
def test_the_pair_of_a_prompt(case, messages, tmp_path):
    """As dpo.py reads it: the gold completion is no part of it."""
    answers, scores, cut, how, wanted = PAIRS[case]
    row = chat("q", "gold") | {"group": 7} if messages else {"prompt": "q", "completion": "gold", "group": 7}
    pairs = script("recipes/rejection_sampling.py").pairs_of([row], [told(answers, scores, cut)], asked(**how))
    if wanted is None:
        assert pairs == []
        return
    (pair,) = script("recipes/preferences.py").read_pairs(write(tmp_path / "pairs.jsonl", pairs))
    said = [pair[side][0]["content"] if messages else pair[side] for side in ("chosen", "rejected")]
    assert tuple(said) == wanted and (pair["prompt"], pair["group"]) == (row["prompt"], 7)
    assert pair["score_chosen"] > pair["score_rejected"] and "completion" not in pair


def test_a_round_of_dpo_draws_from_its_adapter_and_begins_at_it(tiny_run, scorers, tmp_path, capsys):
    """Answers of the adapter, pairs by a scorer, and DPO from the adapter, which is the reference, too."""
    first = tiny_run("dpo") / "adapter"
    file = write(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"], "kind": "k"} for row in TINY_ROWS])
    words = ["--adapter", first, "--file", file, "--scorer", "my_scorers:letters"]
    _, found, record = draw(tmp_path / "drawn.jsonl", *words, "--pairs", tmp_path / "pairs.jsonl", "--gap", 0.05)
    pairs = lines(tmp_path / "pairs.jsonl")
    assert len(pairs) == record["pairs"] > 3 and record["asked"]["gap"] == 0.05
    by_prompt = {json.dumps(row["prompt"]): each for row, each in zip(TINY_ROWS, found, strict=True)}
    for pair in pairs:
        each = by_prompt[json.dumps(pair["prompt"])]
        whole = [n for n, cut in enumerate(each["cut"]) if not cut and each["answers"][n].strip()]
        scores = [each["scores"][n] for n in whole]
        assert (pair["score_chosen"], pair["score_rejected"]) == (max(scores), min(scores))
        assert max(scores) - min(scores) >= 0.05
        assert pair["chosen"][0]["content"] == each["answers"][whole[scores.index(max(scores))]]
    assert record["chosen_is_longer"] == len(pairs)  # this scorer counts letters
    assert f"longer one in {len(pairs)} of them" in capsys.readouterr().out

    both = ["--train_file", tmp_path / "pairs.jsonl", "--validation_file", tmp_path / "pairs.jsonl"]
    train("dpo", tmp_path / "run", *both, "--adapter", first, "--max_steps", 2, "--gradient_accumulation_steps", 1)
    ended = json.loads((tmp_path / "run" / "adapter" / "record.json").read_text())
    assert ended["reference"] == str(first) and ended["start"]["rewards/margins"] == 0


def test_pairs_are_chosen_again_without_drawing_and_none_is_said(drawn, scorers, tmp_path, monkeypatch):
    rows = [chat(f"Say {word}", "x") for word in "ab"]
    module, out = script("recipes/rejection_sampling.py"), tmp_path / "rows.jsonl"
    for file in drawn.parent.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no model is loaded
    line = line_of("rejection_sampling", "--tiny", "--out", out, "--pairs", tmp_path / "pairs.jsonl")
    assert "no pair" in line and "rows.drawn.jsonl" in line and lines(tmp_path / "pairs.jsonl") == []  # all score 1
    assert len(lines(out)) == len(lines(drawn)) and module.pairs_of(rows, [told([], [])] * 2, asked()) == []

    (tmp_path / "mine.jsonl").write_text("mine\n")
    words = ["--tiny", "--out", tmp_path / "new.jsonl", "--pairs"]
    assert "mine.jsonl is there" in line_of("rejection_sampling", *words, tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "mine\n"


# --- A reward model as the scorer -----------------------------------------------------------------


def test_a_reward_model_scores_what_is_drawn(tiny_run, tmp_path, monkeypatch, capsys):
    adapter = tmp_path / "scorer"
    shutil.copytree(tiny_run("reward_model") / "adapter", adapter)
    out = tmp_path / "rows.jsonl"
    words = ["--scorer", adapter, "--limit", 4, "--pairs", tmp_path / "pairs.jsonl", "--temperature", 2]
    rows, found, record = draw(out, *words)
    module = script("recipes/reward_model.py")
    model, tokenizer = module.load_scorer(adapter)
    for row, each in zip(TINY_ROWS, found, strict=False):
        turns = [[{"role": "assistant", "content": text}] for text in each["answers"]]
        by_hand = [module.scores(model, tokenizer, [row | {"completion": turn}])[0] for turn in turns]
        assert each["scores"] == pytest.approx(by_hand, abs=1e-5) and len(set(each["scores"])) > 1
        whole = [n for n, cut in enumerate(each["cut"]) if not cut and each["answers"][n].strip()]
        best = max(whole, key=lambda n: each["scores"][n])
        kept = [other["completion"][0]["content"] for other in rows if other["id"] == row["id"]]
        assert kept == [each["answers"][best]]  # the best of k, whatever its number
    pairs = lines(tmp_path / "pairs.jsonl")
    assert pairs and all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    assert (record["asked"]["at_least"], record["asked"]["take"]) == (None, "best")
    assert any(not 0 <= score <= 1 for each in found for score in each["scores"])
    printed = capsys.readouterr().out
    assert "answers are whole" in printed
    assert record["warnings"] == warnings_in(printed) == script("recipes/common.py").length_warnings(adapter)

    halves = {name: weight / 2 for name, weight in weights(adapter).items()}
    save_file(halves, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert "scorer_weights" in line_of("rejection_sampling", "--tiny", "--out", out, *words)


def test_an_adapter_that_writes_answers_is_no_scorer(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # it stops before a model is loaded
    words = ["--tiny", "--out", tmp_path / "rows.jsonl", "--scorer"]
    assert "writes answers" in line_of("rejection_sampling", *words, teacher)
    assert "adapter_config.json" in line_of("rejection_sampling", *words, tmp_path)


def test_the_counts_by_hand(capsys):
    module = script("recipes/rejection_sampling.py")
    found = [
        told(["a", "b"], [1, 1]),
        told(["a", "b"], [1, 0]),
        told(["a", "b"], [0, 0]),
        told(["a", ""], [1, 1], [True, False]),  # cut, and empty: neither is right
    ]
    summary = module.summary(found, [{}, {}], asked())
    assert summary["share_right"] == 3 / 8 and summary["answers"] == 8 and summary["prompts"] == 4
    assert (summary["prompts_none_right"], summary["prompts_all_right"], summary["cut"]) == (2, 1, 1)
    assert summary["tokens"] == 16 and summary["seconds"] == 2 and summary["kept"] == 2
    low, high = summary["interval"]
    assert low < 3 / 8 < high
    found[0]["tokens"] = [None, None]
    assert module.summary(found, [{}], asked())["tokens"] is None


def test_a_prompts_answers_count_as_one():
    """100 prompts, each with ten equal answers: as wide as an interval over 100."""
    module = script("recipes/rejection_sampling.py")
    found = [told(["a"] * 10, [number % 2] * 10) for number in range(100)]
    low, high = module.summary(found, [], asked())["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)


def test_what_is_printed_is_what_is_recorded(scorers, tmp_path, capsys):
    words = [
        "--scorer",
        "my_scorers:short",
        "--file",
        write(tmp_path / "rows.jsonl", [chat("Say hello.", "hello"), chat("Count.", "1")]),
    ]
    _, found, record = draw(tmp_path / "out.jsonl", *words)
    printed = capsys.readouterr().out
    right = [[score == 1 and not cut for score, cut in zip(each["scores"], each["cut"], strict=True)] for each in found]
    assert record["share_right"] == sum(map(sum, right)) / 8
    assert f"{record['share_right']:.3f} [" in printed and "of 8 answers are right" in printed
    assert f"{record['tokens']} tokens in" in printed and "only 2 prompts" in printed
    assert record["tokens"] == sum(sum(each["tokens"]) for each in found)
    assert record["recipe"] == "rejection_sampling" and record["asked"]["temperature"] == 1.0


def test_tokens_count_the_end_and_a_cut_answer_has_none(tmp_path):
    """Of drawn answers, and of four whose tokens are written by hand: an end, none, at once, a second one."""
    _, found, _ = draw(tmp_path / "out.jsonl", "--max_new_tokens", 12, "--limit", 8)
    tokenizer, exact = AutoTokenizer.from_pretrained(MICRO), []
    cuts = [cut for each in found for cut in each["cut"]]
    assert 0 < sum(cuts) < len(cuts)
    for each in found:
        for text, tokens, cut in zip(each["answers"], each["tokens"], each["cut"], strict=True):
            if cut:
                assert tokens == 12
            else:  # drawn tokens need not be the tokenizer's own, which are fewer then
                own = len(tokenizer(text, add_special_tokens=False)["input_ids"])
                assert own <= tokens - 1 <= 11
                exact.append(own == tokens - 1)
    assert sum(exact) > 0.7 * len(exact)

    end, pad, word = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer("a")["input_ids"][-1]
    new = torch.tensor([[word, word, end, pad], [word] * 4, [end, pad, pad, pad], [end, word, end, pad]])

    def generate(input_ids, **how):
        return torch.cat([input_ids, new], 1)

    model = SimpleNamespace(device="cpu", generate=generate)
    how = SimpleNamespace(eos_token_id=[end])
    _, tokens, cut, _ = script("recipes/answers.py").written(model, tokenizer, ["q"] * 4, how)
    assert tokens == [3, 4, 1, 1] and cut == [False, True, False, False]


# --- The distribution that is drawn from ----------------------------------------------------------


START = "The list"  # a text, and short: it is read 1,500 times


def first_tokens(folder: Path | str, out: Path, *words) -> Counter:
    """How often each text came first, of 1,500 answers to one prompt."""
    file = write(out.with_name("one.jsonl"), [{"prompt": START, "completion": "hello"}])
    words = ["--model", folder, "--file", file, "--max_new_tokens", 1, *words]
    with pytest.raises(SystemExit, match="no row is kept"):  # each is cut behind its first token
        draw(out, "--k", 1500, *words)
    return Counter(lines(out.with_suffix(".drawn.jsonl"))[1]["answers"])


def next_probabilities(temperature: float) -> list[tuple[str, float]]:
    """The text and the probability of every token, from a forward of our own."""
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    ids = tokenizer(START, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)(ids).logits[0, -1]
    shares = (logits / temperature).softmax(-1).tolist()
    return [(tokenizer.decode([token], skip_special_tokens=True), share) for token, share in enumerate(shares)]


def by_text(tokens: list[tuple[str, float]]) -> Counter:
    found = Counter()
    for text, share in tokens:
        found[text] += share
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_answers_are_drawn_from_the_models_own_distribution(temperature, tmp_path):
    """Whatever the model's file asks for: here one token of the likeliest, with penalties."""
    shutil.copytree(MICRO, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    own = json.loads(file.read_text()) | {"do_sample": True, "top_k": 2, "temperature": 0.1, "repetition_penalty": 3.0}
    file.write_text(json.dumps(own))
    drawn = first_tokens(tmp_path / "model", tmp_path / "out.jsonl", "--temperature", temperature)
    wanted = by_text(next_probabilities(temperature))
    distance = sum(abs(drawn[text] / 1500 - wanted[text]) for text in wanted) / 2
    tail = sum(share for text, share in wanted.items() if text not in dict(wanted.most_common(50)))
    assert distance < 0.1 + tail  # total variation; rare tokens are hit by chance
    for text, share in wanted.most_common(5):
        assert drawn[text] / 1500 == pytest.approx(share, abs=4 * (share * (1 - share) / 1500) ** 0.5)
    if temperature == 3:
        outside = sum(count for text, count in drawn.items() if text not in dict(wanted.most_common(50)))
        assert outside / 1500 == pytest.approx(tail, abs=0.06) and tail > 0.1  # not the library's top_k of 50


def test_top_p_leaves_only_the_nucleus(tmp_path):
    """The likeliest tokens that have 0.3 together, and their shares among themselves."""
    drawn = first_tokens(MICRO, tmp_path / "out.jsonl", "--temperature", 3, "--top_p", 0.3)
    tokens, nucleus = sorted(next_probabilities(3), key=lambda pair: -pair[1]), []
    while sum(share for _, share in nucleus) < 0.3:
        nucleus.append(tokens[len(nucleus)])
    wanted, mass = by_text(nucleus), sum(share for _, share in nucleus)
    assert set(drawn) <= set(wanted) and len(nucleus) > 10
    for text, share in wanted.most_common(5):
        share /= mass
        assert drawn[text] / 1500 == pytest.approx(share, abs=4 * (share * (1 - share) / 1500) ** 0.5)


def test_greedy_answers_do_not_take_the_models_own_penalties(tmp_path):
    """evaluate.py: generate() fills what a GenerationConfig leaves open from the model's file."""
    shutil.copytree(MICRO, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    own = {"do_sample": True, "repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "min_new_tokens": 6}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    words = ["--tiny", "--limit", 6, "--max_new_tokens", 24]
    run("evaluate", *words, "--out", tmp_path / "a.json")
    run("evaluate", *words, "--model", tmp_path / "model", "--out", tmp_path / "b.json")
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["answers"] for name in "ab")
    assert ours == theirs


def test_a_seed_repeats_its_answers_and_another_draws_others(drawn, tmp_path):
    _, found, _ = draw(tmp_path / "same.jsonl", "--limit", 4)
    before = read(drawn)[1][:4]  # one batch
    assert [each["answers"] for each in found] == [each["answers"] for each in before]
    _, other, _ = draw(tmp_path / "other.jsonl", "--limit", 4, "--seed", 1)
    pairs = [
        (a, b)
        for each, one in zip(other, before, strict=True)
        for a, b in zip(each["answers"], one["answers"], strict=True)
    ]
    assert sum(a != b for a, b in pairs) > len(pairs) / 2
    assert all(len(set(each["answers"])) > 1 for each in found)  # k draws, and not one draw k times


# --- Kills and other settings ---------------------------------------------------------------------


def draw_and_die(out: Path) -> None:
    """Kills itself as soon as the second batch of three is in the journal."""
    torch.set_num_threads(1)
    journal = out.with_suffix(".drawn.jsonl")

    def watch() -> None:
        while not journal.is_file() or journal.read_bytes().count(b"\n") < 9:  # settings and 8 prompts
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    run("rejection_sampling", "--tiny", "--out", out)


@pytest.fixture(scope="module")
def killed(apart, tmp_path_factory) -> Path:
    """The folder that a killed run has left."""
    out = tmp_path_factory.mktemp("killed") / "rows.jsonl"
    assert apart(draw_and_die, out) == -signal.SIGKILL
    assert not out.with_suffix(".json").exists()
    return out.parent


@pytest.mark.parametrize("torn", [False, True])
def test_killed_and_resumed_the_rows_are_those_of_a_run_that_nothing_happened_to(torn, drawn, killed, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "rows.jsonl"
    journal = out.with_suffix(".drawn.jsonl")
    done = lines(journal)[1:9]
    if torn:  # killed while a batch was being written, and while a row was
        whole = journal.read_text().splitlines()[:9]
        journal.write_text("\n".join([*whole, whole[-1], whole[-1][:40]]))
        out.write_text(out.read_text()[:-30])
    rows, found, record = draw(out)
    assert found[: len(done)] == done  # nothing is drawn again
    wanted_rows, wanted, wanted_record = read(drawn)
    assert rows == wanted_rows
    assert [each["answers"] for each in found] == [each["answers"] for each in wanted]
    timed = {"seconds", "asked"}
    assert {k: v for k, v in record.items() if k not in timed} == {
        k: v for k, v in wanted_record.items() if k not in timed
    }
    assert record["seconds"] == pytest.approx(sum(each["seconds"] for each in found))


OTHER = {
    "k": ["--k", 5],
    "temperature": ["--temperature", 0.5],
    "seed": ["--seed", 1],
    "max_new_tokens": ["--max_new_tokens", 8],
    "rows": ["--limit", 11],
    "scorer": ["--scorer", "my_scorers:short"],
    "system": ["--system", "system.txt"],
    "model": ["--model", "other"],
}


@pytest.mark.parametrize("key", OTHER)
def test_other_settings_in_the_same_file_are_refused(key, drawn, scorers, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.")
    if key == "model":
        shutil.copytree(MICRO, tmp_path / "other")
    for file in drawn.parent.iterdir():
        shutil.copy(file, tmp_path)
    kept = {file.name: file.read_bytes() for file in drawn.parent.iterdir()}
    words = ["--tiny", "--out", tmp_path / "rows.jsonl", *OTHER[key]]
    if key == "scorer":
        words += ["--file", write(tmp_path / "plain.jsonl", [{"prompt": row["prompt"]} for row in TINY_ROWS])]
    line = line_of("rejection_sampling", *words)
    assert f"{key} " in line and "name a new --out" in line
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


def test_an_adapter_that_was_trained_anew_is_another_one(teacher, tmp_path):
    """Another training leaves other numbers in the same file."""
    adapter = tmp_path / "adapter"
    shutil.copytree(teacher, adapter)
    words = ["--adapter", adapter, "--limit", 2, "--max_new_tokens", 4]
    run_it = ["--tiny", "--out", tmp_path / "rows.jsonl", *words]
    with pytest.raises(SystemExit):
        run("rejection_sampling", *run_it)  # each is cut: no row
    halves = {name: weight / 2 for name, weight in weights(adapter).items()}
    save_file(halves, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert "adapter_weights" in line_of("rejection_sampling", *run_it)


def test_what_only_chooses_may_change_and_draws_nothing(drawn, tmp_path, monkeypatch):
    for file in drawn.parent.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no model is loaded
    before = (tmp_path / "rows.drawn.jsonl").read_bytes()
    more, found, record = draw(tmp_path / "rows.jsonl", "--keep", 3, "--take", "first")
    assert len(more) > len(lines(drawn)) and record["asked"]["keep"] == 3
    assert (tmp_path / "rows.drawn.jsonl").read_bytes() == before
    texts = [row["completion"][0]["content"] for row in more if row["id"] == TINY_ROWS[0]["id"]]
    assert texts == list(dict.fromkeys(text for text in found[0]["answers"] if text.strip()))[:3]


# --- From a server --------------------------------------------------------------------------------


class Drawn(BaseHTTPRequestHandler):
    """Answers with the question's last word and the seed's parity; breaks at a question as long as it shall."""

    asked: ClassVar[list[dict]] = []
    breaks: ClassVar[bool] = False
    counts: ClassVar[bool] = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        question = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        words = f"{question.split()[-1]} {body['seed'] % 2}"
        choice = {
            "text": words,
            "message": {"content": words},
            "finish_reason": "length" if "long" in question else "stop",
        }
        reply = {"choices": [choice]} | (
            {"usage": {"completion_tokens": 3, "prompt_tokens": 1, "total_tokens": 4}} if self.counts else {}
        )
        self.send_response(404 if self.breaks and "five" in question else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    Drawn.asked.clear()
    with running(Drawn) as server:
        yield server.url


def served(endpoint: str, out: Path, rows: list[dict], *words) -> list:
    file = write(out.with_name("asked.jsonl"), rows)
    words = ["--batch_size", 2, "--max_new_tokens", 9, *words]
    return ["--endpoint", endpoint, "--model", "teacher", "--file", file, "--out", out, "--k", 4, *words]


WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.mark.parametrize("messages", [True, False])
def test_a_server_is_asked_once_for_each_answer_with_seeds_that_differ(messages, endpoint, tmp_path):
    rows = [
        chat(f"Say {word}", f"{word} 1") if messages else {"prompt": f"Say {word}", "completion": f"{word} 1"}
        for word in WORDS
    ]
    out = tmp_path / "rows.jsonl"
    run("rejection_sampling", *served(endpoint, out, rows, "--temperature", 0.7, "--top_p", 0.9))
    kept, found, record = read(out)
    said = [row["completion"][0]["content"] if messages else row["completion"] for row in kept]
    assert said == [f"{word} 1" for word in WORDS]  # right is the completion, word for word
    assert record["share_right"] == 0.5 and record["tokens"] == 3 * 24 and record["prompts_none_right"] == 0
    assert all(
        Counter(each["answers"]) == {f"{word} 0": 2, f"{word} 1": 2} for word, each in zip(WORDS, found, strict=True)
    )
    assert len(Drawn.asked) == len({each["seed"] for each in Drawn.asked}) == 24
    assert {each["path"] for each in Drawn.asked} == {"/v1/chat/completions" if messages else "/v1/completions"}
    how = {(each["temperature"], each["top_p"], each["max_tokens"], each["model"]) for each in Drawn.asked}
    assert how == {(0.7, 0.9, 9, "teacher")}


def test_what_a_server_has_cut_is_not_kept_and_unknown_tokens_are_said(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Drawn, "counts", False)
    rows = [{"prompt": "Say one"}, {"prompt": "Say long"}]
    run("rejection_sampling", *served(endpoint, tmp_path / "rows.jsonl", rows, "--scorer", "all"))
    kept, _, record = read(tmp_path / "rows.jsonl")
    assert [row["completion"] for row in kept] == ["one 0"] and record["cut"] == 4
    assert record["tokens"] is None
    printed = capsys.readouterr().out
    assert "4 answers were cut at max_new_tokens=9" in printed and "an unknown number of tokens" in printed


def test_options_that_a_server_refuses_are_left_out_in_every_batch_after(endpoint, tmp_path, monkeypatch, capsys):
    """Three batches of two prompts, four answers each; the first batch alone hears the refusals."""
    send = Drawn.do_POST

    def refuse(self):
        size = int(self.headers["Content-Length"])
        raw = self.rfile.read(size)
        body = json.loads(raw)
        wrong = next((name for name in ("max_tokens", "top_p", "temperature") if name in body), None)
        self.rfile = io.BytesIO(raw)
        if wrong is None:
            return send(self)
        said = {"message": f"Unsupported parameter: '{wrong}'", "param": wrong, "code": "unsupported_parameter"}
        refusals.append(wrong)
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"error": said}).encode())

    refusals = []
    monkeypatch.setattr(Drawn, "do_POST", refuse)
    rows = [chat(f"Say {word}", f"{word} 1") for word in WORDS]
    run("rejection_sampling", *served(endpoint, tmp_path / "rows.jsonl", rows, "--temperature", 0.7))
    kept, _, record = read(tmp_path / "rows.jsonl")
    assert len(kept) == 6 and len(Drawn.asked) == 24 and len(refusals) <= 3 * 8
    assert [each["option"] for each in record["warnings"]] == ["max_tokens", "top_p", "temperature"]
    assert record["warnings"] == warnings_in(capsys.readouterr().out)
    assert {each["max_completion_tokens"] for each in Drawn.asked} == {9}
    run("rejection_sampling", *served(endpoint, tmp_path / "rows.jsonl", rows, "--temperature", 0.7, "--keep", 2))
    assert read(tmp_path / "rows.jsonl")[2]["warnings"] == record["warnings"]  # nothing is drawn, and still known


def test_a_server_that_fails_loses_nothing_and_is_gone_on_with(endpoint, tmp_path, monkeypatch):
    rows, out = [chat(f"Say {word}", f"{word} 1") for word in WORDS], tmp_path / "rows.jsonl"
    monkeypatch.setattr(Drawn, "breaks", True)
    assert "404" in line_of("rejection_sampling", *served(endpoint, out, rows))
    assert len(lines(out)) == 4 and len(lines(out.with_suffix(".drawn.jsonl"))) == 5  # two batches of three
    monkeypatch.setattr(Drawn, "breaks", False)
    Drawn.asked.clear()
    run("rejection_sampling", *served(endpoint, out, rows))
    kept, found, _ = read(out)
    assert len(Drawn.asked) == 8 and len(found) == len(kept) == 6


def test_the_system_message_is_for_drawing_and_the_rows_keep_their_own(endpoint, tmp_path):
    row = {"prompt": [{"role": "system", "content": "old"}, {"role": "user", "content": "Say one"}]}
    (tmp_path / "system.txt").write_text("Think hard.\n")
    words = served(endpoint, tmp_path / "rows.jsonl", [row], "--scorer", "all", "--system", tmp_path / "system.txt")
    run("rejection_sampling", *words)
    said = [(turn["role"], turn["content"]) for turn in Drawn.asked[0]["messages"]]
    assert said == [("system", "Think hard."), ("user", "Say one")]
    assert lines(tmp_path / "rows.jsonl")[0]["prompt"] == row["prompt"]


def test_a_teacher_is_shown_examples_and_the_rows_keep_their_own_prompt(endpoint, tmp_path, monkeypatch):
    """The prompt that has passed, as evaluate.py asks it; other examples are other answers."""
    rows = [{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in WORDS[:2]]
    shots = write(tmp_path / "good.jsonl", [chat(f"Shot {number}", str(number)) for number in range(9)])
    how = ["--scorer", "all", "--examples", shots, 2, "--examples_seed"]
    run("rejection_sampling", *served(endpoint, tmp_path / "rows.jsonl", rows, *how, 1))
    module = script("recipes/evaluate.py")
    options = SimpleNamespace(examples=[shots, "2"], examples_seed=1, file="x")
    wanted = module.asked_as(rows[0]["prompt"], None, module.examples_of(options, rows, None))
    turns = [[(turn["role"], turn["content"]) for turn in each["messages"]] for each in Drawn.asked]
    assert [(turn["role"], turn["content"]) for turn in wanted] in turns and len(wanted) == 5
    assert [row["prompt"] for row in lines(tmp_path / "rows.jsonl")] == [row["prompt"] for row in rows]
    other = served(endpoint, tmp_path / "rows.jsonl", rows, *how, 2)
    assert "was drawn with examples" in line_of("rejection_sampling", *other)
    leak = served(endpoint, tmp_path / "new.jsonl", [chat("Shot 0", "0")], "--examples", shots, 9)
    assert "holds a question of" in line_of("rejection_sampling", *leak)


def test_prompts_of_the_test_file_are_not_drawn_for(endpoint, tmp_path):
    """Whatever the system message, the case and the spaces; other prompts are none of its."""
    rows = [chat(f"Say {word}", f"{word} 1") for word in WORDS]
    system = {"role": "system", "content": "Be brief."}
    held = {"prompt": [system, {"role": "user", "content": " say  THREE"}]}
    test = write(tmp_path / "test.jsonl", [held])
    words = [*served(endpoint, tmp_path / "rows.jsonl", rows), "--test", test]
    line = line_of("rejection_sampling", *words)
    assert "1 of 6 prompts stand in" in line and "in line 3" in line and Drawn.asked == []
    write(test, [{"prompt": [{"role": "user", "content": "Say seven"}]}])
    run("rejection_sampling", *words)
    assert len(lines(tmp_path / "rows.jsonl")) == 6


def test_reasoning_that_the_template_opens_is_whole_in_the_journal(tmp_path):
    template = (Path(MICRO) / "chat_template.jinja").read_text() + "<think>\n"
    (tmp_path / "open.jinja").write_text(template)
    words = ["--tiny", "--out", tmp_path / "rows.jsonl", "--limit", 2, "--chat_template", tmp_path / "open.jinja"]
    assert "no row is kept" in line_of("rejection_sampling", *words)  # micro never closes it
    found = lines(tmp_path / "rows.drawn.jsonl")[1:]
    assert all(text.startswith("<think>\n") for each in found for text in each["answers"])


# --- Bad input ------------------------------------------------------------------------------------


def test_a_scorer_that_says_no_number_is_named(scorers, tmp_path):
    words = ["--tiny", "--out", tmp_path / "rows.jsonl", "--limit", 2]
    for name, got in {"seven": "7", "nothing": "None", "nan": "nan"}.items():
        line = line_of("rejection_sampling", *words, "--scorer", f"my_scorers:{name}")
        assert f"my_scorers:{name}" in line and got in line and "from 0 to 1" in line
    assert "no_such" in line_of("rejection_sampling", *words, "--scorer", "my_scorers:no_such")


def test_a_scorer_that_fails_the_rows_own_completions_is_refused_before_anything_is_drawn(
    scorers, tmp_path, monkeypatch
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    words = ["--tiny", "--out", tmp_path / "rows.jsonl"]
    assert "own completions" in line_of("rejection_sampling", *words, "--scorer", "my_scorers:never")
    assert list(tmp_path.glob("rows*")) == []


def test_nothing_kept_is_said_and_the_answers_are_there_to_read(scorers, tmp_path, capsys):
    file = write(tmp_path / "plain.jsonl", [{"prompt": row["prompt"]} for row in TINY_ROWS[:2]])
    line = line_of(
        "rejection_sampling", "--tiny", "--out", tmp_path / "rows.jsonl", "--file", file, "--scorer", "my_scorers:never"
    )
    assert "no row is kept of 8 answers" in line and "rows.drawn.jsonl" in line
    rows, found, record = read(tmp_path / "rows.jsonl")
    assert rows == [] and len(found) == 2 and record["share_right"] == 0 and record["prompts_none_right"] == 2


def test_columns_of_ones_own_are_the_gold(scorers, endpoint, tmp_path):
    rows = [{"prompt": f"Say {word}", "accept": [f"{word} 0"]} for word in WORDS]
    run("rejection_sampling", *served(endpoint, tmp_path / "rows.jsonl", rows, "--scorer", "my_scorers:in_list"))
    assert [row["completion"] for row in lines(tmp_path / "rows.jsonl")] == [f"{word} 0" for word in WORDS]


def test_what_is_missing_or_in_the_way_of_drawing_is_said(tmp_path, capsys):
    words = ["--model", MICRO, "--out", tmp_path / "rows.jsonl"]
    file = write(tmp_path / "plain.jsonl", [{"prompt": "q"}])
    assert "wanted prompt and completion" in line_of("rejection_sampling", *words, "--file", file)
    mixed = write(tmp_path / "mixed.jsonl", [{"prompt": "q"}, chat("q", "a")])
    assert "line 2" in line_of("rejection_sampling", *words, "--file", mixed, "--scorer", "all")
    assert "no file" in line_of("rejection_sampling", *words, "--file", tmp_path / "none.jsonl")
    (tmp_path / "rows.jsonl").write_text("mine\n")
    assert "name another" in line_of("rejection_sampling", "--tiny", *words)
    assert (tmp_path / "rows.jsonl").read_text() == "mine\n"
    (tmp_path / "other.drawn.jsonl").write_text("not JSON\n")
    assert "no JSON" in line_of("rejection_sampling", "--tiny", "--out", tmp_path / "other.jsonl")
    bad = {
        "--k": (["--keep", 3, "--k", 2], "--keep 3"),
        "--out": (["--out", "rows.json"], ".jsonl"),
        "--temperature": (["--temperature", 0], "--temperature"),
        "--gap": (["--gap", -1], "--gap -1.0"),
        "--pairs": (["--pairs", tmp_path / "x.jsonl"], "a file of its own"),
        "--pairs, the journal": (["--pairs", tmp_path / "x.drawn.jsonl"], "a file of its own"),
        "--pairs, no lines": (["--pairs", "pairs.json"], "--pairs pairs.json: wanted a file that ends in .jsonl"),
        "--limit": (["--limit", -1], "--limit"),
    }
    for some, told in bad.values():
        with pytest.raises(SystemExit):
            run("rejection_sampling", "--tiny", "--out", tmp_path / "x.jsonl", *some)
        assert told in capsys.readouterr().err.splitlines()[-1]


# --- Distillation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tiny_run) -> Path:
    """An adapter that has seen a few queries."""
    return tiny_run("sft") / "adapter"


def distil(folder: Path, teacher: Path, *words) -> dict:
    train("distill", folder, "--teacher", teacher, *words)
    return json.loads((folder / "adapter" / "record.json").read_text())


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "run"
    distil(folder, teacher)
    return folder


SHORT = ["--max_steps", 1, "--eval_steps", 1, "--save_steps", 1]


def before(folder: Path) -> float:
    return json.loads((folder / "adapter" / "record.json").read_text())["eval_loss_before"]


def logps(model, tokenizer, rows: list[dict]) -> list[torch.Tensor]:
    """Of every token of the vocabulary before each token of the row's own completion."""
    found = []
    for row in rows:
        head = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        count = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        ids = tokenizer(head + row["completion"][0]["content"], add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            found.append(model(ids).logits[0, count - 1 :].log_softmax(-1))
    return found


def test_the_student_comes_nearer_to_its_teacher_on_answers_of_others_too(teacher, student, capsys):
    """KL to the teacher over held-out gold answers, which neither trained on, with a forward of our own."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    rows = [json.loads(line) for line in (DATA / "ask" / "validation.jsonl").read_text().splitlines()[50:70]]
    known = []
    for adapter in (teacher, student / "adapter", None):
        model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
        known.append(logps(PeftModel.from_pretrained(model, adapter) if adapter else model, tokenizer, rows))
    theirs, after, before = map(torch.cat, known)
    near, far = (kl_div(theirs, each, log_target=True, reduction="batchmean") for each in (after, before))
    assert near < 0.5 * far
    record = json.loads((student / "adapter" / "record.json").read_text())
    judged = series(student, "eval_loss")
    assert judged[0] == record["eval_loss_before"] > 2 * record["best_eval_loss"]
    assert record["best_eval_loss"] == judged[record["best_step"]] == min(judged.values())
    saved = weights(student / f"checkpoint-{record['best_step']}")
    assert same(weights(student / "adapter"), saved)


def test_the_divergence_is_trls_name_for_it(teacher, tmp_path):
    """Before the first step: student = base, its own greedy answers, reverse and forward KL by hand."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    row = TINY_ROWS[0]
    head = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(head, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
    with torch.no_grad():
        ours = model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        theirs = PeftModel.from_pretrained(model, teacher)(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    wanted = {1.0: (ours.exp() * (ours - theirs)).sum(-1).mean(), 0.0: (theirs.exp() * (theirs - ours)).sum(-1).mean()}
    file = write(tmp_path / "one.jsonl", [row])
    for beta, value in wanted.items():
        words = ["--train_file", file, "--validation_file", file, "--beta", beta, *SHORT]
        words += ["--generation_kwargs", '{"do_sample": false}']
        words += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1]
        record = distil(tmp_path / f"run-{beta}", teacher, *words)
        assert record["beta"] == beta
        assert record["eval_loss_before"] == pytest.approx(value.item(), rel=1e-3)
        assert series_of(tmp_path / f"run-{beta}", 1, "loss")[1] == pytest.approx(value.item(), rel=1e-3)


def series_of(folder: Path, step: int, key: str) -> dict[int, float]:
    log = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in log if key in entry}


def test_evaluations_do_not_change_what_is_distilled(teacher, student, tmp_path):
    """They draw answers too, with numbers of their own: without them the training is the same."""
    distil(tmp_path, teacher, "--eval_strategy", "no", "--load_best_model_at_end", "false")
    assert series(tmp_path, "eval_loss") == {} and series(student, "eval_loss").keys() == {0, 2, 4, 6}
    assert series(tmp_path, "loss") == pytest.approx(series(student, "loss"), rel=1e-5)


def test_evaluations_draw_the_same_numbers_wherever_the_training_is():
    """Two evaluations differ by the model alone, and the training's own numbers go on as if there were none."""

    class Trainer:
        args = SimpleNamespace(seed=3)

        def evaluate(self):
            return torch.rand(4)

    class Judged(script("recipes/common.py").Draws, Trainer):
        pass

    torch.manual_seed(0)
    wanted = torch.rand(4)
    torch.manual_seed(0)
    first = Judged().evaluate()
    assert torch.equal(torch.rand(4), wanted)
    assert torch.equal(Judged().evaluate(), first)


def test_stopped_and_resumed_the_student_is_the_same(teacher, student, tmp_path):
    """From the checkpoint that a stop would have left; a real kill is in test_recipes.py."""
    folder = tmp_path / "run"
    shutil.copytree(student / "checkpoint-4", folder / "checkpoint-4")
    with pytest.raises(SystemExit, match="--resume"):
        distil(folder, teacher)
    record = distil(folder, teacher, "--resume")
    assert series(folder, "loss") == pytest.approx(series(student, "loss"), rel=1e-5)
    assert record["eval_loss_before"] == series(student, "eval_loss")[0]
    for key, weight in weights(student / "adapter").items():
        torch.testing.assert_close(weights(folder / "adapter")[key], weight)


def test_a_teacher_in_4_bits_grades_with_rounded_weights(teacher, student, tmp_path):
    record = distil(tmp_path, teacher, "--teacher_in_4bit", "true", *SHORT, "--warmup_steps", 0)
    assert record["teacher_in_4bit"] and not record["load_in_4bit"]  # the student's base isn't
    assert record["eval_loss_before"] == pytest.approx(before(student), rel=0.3)
    assert record["eval_loss_before"] != before(student)
    assert record["best_eval_loss"] < record["eval_loss_before"]


@pytest.fixture(scope="module")
def merged(teacher, tmp_path_factory) -> Path:
    """The teacher as a model of its own."""
    folder = tmp_path_factory.mktemp("merged") / "teacher"
    run("merge", "--adapter", teacher, "--out", folder, "--rows", 4)
    return folder


def resized(whole: Path, folder: Path, rows: int) -> Path:
    """A model with an embedding of so many rows."""
    shutil.copytree(whole, folder)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    known = model.config.vocab_size
    model.resize_token_embeddings(rows)
    model.get_input_embeddings().weight.data[known:] = 1.0  # if they counted, one would see it
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantized", [False, True])
def test_a_padded_embedding_grades_the_same_and_another_template_is_said(quantized, merged, student, tmp_path, capsys):
    padded = resized(merged, tmp_path / "padded", 2112)
    (padded / "chat_template.jinja").write_text((Path(MICRO) / "chat_template.jinja").read_text() + "<think>\n")
    words = ["--teacher_in_4bit", "true"] if quantized else []
    record = distil(tmp_path / "run", padded, *SHORT, *words)
    assert record["eval_loss_before"] == pytest.approx(before(student), rel=0.3 if quantized else 1e-4)
    warning = warnings_in(capsys.readouterr().out)[0]
    assert warning["warning"] == "other_template" and warning["read"].endswith("assistant\n")
    assert record["warnings"][0] == warning


def test_a_narrower_embedding_is_refused(merged, tmp_path):
    narrow = resized(merged, tmp_path / "narrow", 2040)
    line = line_of("distill", "--tiny", "--teacher", narrow, "--output_dir", tmp_path / "run")
    assert "2048" in line and "2040" in line and "rejection_sampling.py" in line


def test_another_vocabulary_is_refused_and_another_way_named(tmp_path):
    """As many tokens, two of them with each other's number: TRL would compare them without a word."""
    shutil.copytree(MICRO, tmp_path / "teacher")
    spec = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    one, other = [word for word in vocab if word.isalpha()][300:302]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(spec))
    line = line_of("distill", "--tiny", "--teacher", tmp_path / "teacher", "--output_dir", tmp_path / "run")
    assert "differ in 2 tokens" in line and one in line and other in line
    assert "rejection_sampling.py --scorer all" in line and "gold" in line
    assert not (tmp_path / "run").exists()


def test_answers_that_are_cut_are_said(teacher, tmp_path, capsys):
    record = distil(tmp_path / "run", teacher, *SHORT, "--max_completion_length", 1)
    printed = {each["warning"]: each for each in warnings_in(capsys.readouterr().out)}
    assert printed["often_cut"] == {"warning": "often_cut", "share": record["cut"], "max_completion_length": 1}
    assert record["cut"] > 0.5 and record["warnings"] == list(printed.values())


@pytest.mark.parametrize(
    ("losses", "cuts", "names"),
    [
        ([0.5, 0.6, 0.4], [0.0, 0.1], []),
        ([0.5, 0.6, 0.5], [0.0, 0.1], ["no_better_than_the_start"]),
        ([0.5, 0.4], [0.1, 0.3], ["often_cut"]),
        ([0.5, 0.9], [1.0], ["no_better_than_the_start", "often_cut"]),
        ([], [], []),  # nothing was judged or logged
    ],
)
def test_a_program_can_read_that_a_distillation_did_nothing(losses, cuts, names, capsys):
    log = [{"step": 2 * number, "eval_loss": loss} for number, loss in enumerate(losses)]
    log += [{"step": number + 1, "completions/clipped_ratio": cut} for number, cut in enumerate(cuts)]
    before, cut, warnings = script("recipes/distill.py").report(log, 1.0, 24)
    assert [each["warning"] for each in warnings] == names
    assert warnings_in(capsys.readouterr().out) == warnings
    assert before == (losses[0] if losses else None)
    assert cut == (pytest.approx(sum(cuts) / len(cuts)) if cuts else None)


def test_the_students_adapter_is_evaluated_and_merged_as_any_other(student, tmp_path):
    run("evaluate", "--tiny", "--limit", 6, "--adapter", student / "adapter", "--out", tmp_path / "a.json")
    run("merge", "--adapter", student / "adapter", "--out", tmp_path / "merged", "--rows", 4)
    run("evaluate", "--tiny", "--limit", 6, "--model", tmp_path / "merged", "--out", tmp_path / "b.json")
    adapter, merged = (json.loads((tmp_path / f"{name}.json").read_text())["answers"] for name in "ab")
    assert adapter == merged


def test_what_is_missing_for_a_distillation_is_said(teacher, student, tmp_path):
    to = ["--tiny", "--output_dir", tmp_path / "run"]
    assert "give --teacher" in line_of("distill", *to)
    assert "no/such-teacher" in line_of("distill", *to, "--teacher", "no/such-teacher")
    assert "no/such-model" in line_of("distill", *to, "--teacher", teacher, "--model", "no/such-model")
    file = write(tmp_path / "rows.jsonl", [{"messages": []}])
    assert "wanted prompt" in line_of("distill", *to, "--teacher", teacher, "--train_file", file)
    assert "no whole checkpoint" in line_of("distill", *to, "--teacher", teacher, "--resume")
    assert "add --resume" in line_of("distill", "--tiny", "--output_dir", student, "--teacher", teacher)
