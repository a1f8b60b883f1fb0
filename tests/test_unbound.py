"""tools/unbound.py: Markdown is cut into the sentences that a reader sees, and those that compare
and are bound to nothing are listed. All sentences here are made up.
"""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import script

unbound = script("tools/unbound.py")


def cut(markdown: str) -> list[str]:
    return [sentence.text for sentence in unbound.sentences(markdown)]


# --- Sentences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "whole",
    [
        "It fell by 0.5 and then by 1,200.5 tokens.",
        "Some tools, e.g. TRL, are older, i.e. slower.",
        "Compare DPO vs. PPO in Fig. 3 of Smith et al. 2023.",
        "See Eq. 7 and No. 4 of the list.",
        "J. Smith wrote it.",
        "Run `a. B` and `model.generate(x). Then`.",
        "See [the notes, e.g. Theirs](a.md#b.C) and https://a.io/B.C?d=1. for more.",
        "The value is $p(x. Y) = 0.5$ here.",
        "Version 1.2.3 of trl 1.14 has it.",
    ],
)
def test_a_full_stop_inside_a_sentence_ends_nothing(whole):
    assert len(cut(whole)) == 1
    assert len(cut(f"{whole} Next comes another.")) == 2


@pytest.mark.parametrize(
    ("markdown", "wanted"),
    [
        ("One is here. Two is there! Is three? Yes.", 4),
        ('He said "it works." Then it broke.', 2),
        ("**It works.** Then it broke.", 2),
        ("It is done (at last.) Then it broke.", 2),
        ("The answer is no. Ask again.", 2),
        ("It has rows etc. Then it stops.", 2),
        ("`micro` is small. `smollm2` is real.", 2),
        ("# A heading\nText below it", 2),
        ("- first item\n- second item\n2. third item", 3),
        ("a line\nthat goes on\n\nanother paragraph", 2),
    ],
)
def test_sentences_end_where_a_reader_ends_them(markdown, wanted):
    assert len(cut(markdown)) == wanted


def test_tables_code_pictures_and_comments_are_left_out():
    markdown = """Before it.

| method | better |
|---|---|
| DPO | 0.5 |

```python
a = "DPO is better. GRPO is worse."
```

$$x = 1. Y$$

![PPO is better. It is.](a.svg) <!-- KTO is better. --> After it, <b>in bold</b>."""
    assert cut(markdown) == ["Before it.", "After it, in bold."]


def test_a_link_is_what_one_reads_and_its_target_is_kept():
    [sentence] = unbound.sentences("See **the [paper](https://a.io/x_(y)) of** 2023 and `f(x)`.")
    assert sentence.text == "See the paper of 2023 and `f(x)`."
    assert sentence.links == ("https://a.io/x_(y)",) and sentence.atoms == ("`f(x)`",)


WORD = st.text(st.characters(codec="ascii", categories=("Ll",)), min_size=4, max_size=9)
NUMBER = st.decimals(-999, 999, places=2).map(str)
CODE = st.sampled_from(["`a.b. C`", "$p. Q$", "[w](x.md)", "**bold**"])
MADE = st.lists(st.one_of(WORD, NUMBER, CODE), min_size=1, max_size=8).map(" ".join)
SENTENCE = st.tuples(WORD.map(str.capitalize), MADE, st.sampled_from(".!?")).map(
    lambda parts: f"{parts[0]} {parts[1]}{parts[2]}"
)


@settings(max_examples=200, deadline=None)
@given(st.lists(SENTENCE, min_size=1, max_size=6), st.sampled_from([" ", "\n", "\n\n", "\n- "]))
def test_whatever_is_joined_is_cut_again(made, between):
    found = cut(between.join(made))
    assert found == [unbound.plain(sentence) for sentence in made]


# --- What compares --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "DPO gains more than PPO.",
        "The tuned model was worse by 0.05.",
        "It answers twice as many: 80 of 100.",
        "QLoRA and LoRA can't be told apart.",
        "Rehearsal helps.",
        "GRPO beats rejection sampling here.",
        "It ran 3 times as fast.",
        "Rank 1 forgot the most.",
    ],
)
def test_a_sentence_that_compares_is_a_candidate(text):
    [sentence] = unbound.sentences(text)
    assert unbound.verdict(sentence, (), ()) == unbound.CANDIDATE


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("DPO needs pairs of answers.", unbound.SILENT),
        ("At most 4 rows fit, at least 2.", unbound.SILENT),
        ("This is better known.", unbound.SILENT),
        ("Is DPO better than PPO?", "asks"),
        ("**Predict** which of DPO and PPO gains more.", "asks"),
        ("DPO is better in [a paper](https://arxiv.org/abs/1).", "quotes"),
        ("DPO is better (arXiv:2404.10719, Table 3).", "quotes"),
        ("Xu et al. found PPO better than DPO.", "quotes"),
        ('"LoRA is 2 times as fast."', "quotes"),
        ("The model with more reward has $p = e^{r}/Z$.", "computes"),
        ("A larger rank of 8 is called the rank of LoRA.", "defines"),
    ],
)
def test_what_claims_no_measurement_is_put_aside_with_its_reason(text, wanted):
    [sentence] = unbound.sentences(text)
    assert unbound.verdict(sentence, (), ()) == wanted


def test_a_setting_is_no_formula():
    [sentence] = unbound.sentences("With $r = 8$ and `rate = 0.1` LoRA gains more than DPO.")
    assert unbound.verdict(sentence, (), ()) == unbound.CANDIDATE


def test_an_arm_counts_where_no_method_is_known():
    [sentence] = unbound.sentences("After an hour the tall tree is ahead.")
    assert unbound.verdict(sentence, (), ()) == unbound.SILENT
    assert unbound.verdict(sentence, (), {"tall tree"}) == unbound.CANDIDATE
    assert unbound.verdict(sentence, (), {"all tree"}) == unbound.SILENT


# --- Files ----------------------------------------------------------------------------------------


def repository(folder, cells=(), statements=(), **files):
    """A repository with a notebook of Markdown cells, an experiment, and other files."""
    notebook = {"cells": [{"cell_type": kind, "id": id, "source": s} for kind, id, s in cells]}
    told = {"arms": {"the tall one": {}}, "statements": list(statements)}
    written = {"notebooks/01_a.ipynb": json.dumps(notebook), "README.md": "# Nothing"}
    written |= {"experiments/made/statements.yaml": yaml.safe_dump(told), **files}
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


def listed(root) -> list[tuple[str, str]]:
    """(cell, sentence) of every candidate of a repository."""
    known = unbound.statements(root)
    return [
        (part, sentence.text)
        for file in unbound.files(root)
        for part, sentence, found in unbound.judged(file, root, known)
        if found == unbound.CANDIDATE
    ]


CLAIMS = st.lists(
    st.tuples(
        st.sampled_from(["DPO", "**GRPO**", "LoRA of rank 8", "The [SFT](a.md) model", "`micro`"]),
        st.sampled_from(["gains more than", "beats", "is worse than", "costs less than"]),
        st.sampled_from(["PPO", "*KTO*", "the tall one", "rules, e.g. ours"]),
        st.integers(0, 10**6),
    ).map(lambda parts: f"{parts[0]} {parts[1]} {parts[2]} by {parts[3]}."),
    min_size=1,
    max_size=5,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(CLAIMS, st.data())
def test_a_sentence_that_becomes_a_statement_disappears_from_the_list(
    tmp_path_factory,
    claims,
    data,
):
    root = tmp_path_factory.mktemp("repository")
    cells = [("markdown", "says", " ".join(claims))]
    every = listed(repository(root, cells))
    assert every == [("says", unbound.plain(claim)) for claim in claims]
    chosen = data.draw(st.lists(st.sampled_from(claims), min_size=1, unique=True))
    place = ["notebooks/01_a.ipynb#says"]
    statements = [{"id": str(i), "says": says, "in": place} for i, says in enumerate(chosen)]
    left = listed(repository(root, cells, statements))
    assert left == [("says", unbound.plain(one)) for one in claims if one not in chosen]
    elsewhere = [{**one, "in": ["notebooks/01_a.ipynb#other"]} for one in statements]
    assert listed(repository(root, cells, elsewhere)) == every, "quoted in another cell"


def test_a_statement_of_two_sentences_binds_both_and_one_of_a_half_binds_only_that():
    both = "DPO gains more than PPO. KTO gains less than DPO."
    for sentence in unbound.sentences(both):
        assert unbound.verdict(sentence, [both], ()) == unbound.BOUND
    [half] = unbound.sentences("DPO gains more than PPO, and KTO loses 3 points.")
    assert unbound.verdict(half, ["DPO gains more than PPO"], ()) == unbound.CANDIDATE
    [rest] = unbound.sentences("In short: DPO gains more than PPO, as you saw.")
    assert unbound.verdict(rest, ["DPO gains more than PPO"], ()) == unbound.BOUND


def test_cards_quizzes_and_the_readme_are_read_without_what_is_meant_to_be_wrong(tmp_path):
    card = {"id": "c", "question": "Why?", "short": "DPO beats PPO.", "source": ["KTO beats PPO."]}
    card["weak"] = [{"says": "PPO beats KTO.", "why": "KTO beats ORPO."}]
    card["follow_ups"] = [{"ask": "Why?", "answer": "SFT beats DPO."}]
    options = [{"text": "GRPO beats PPO.", "right": True, "why": "RLOO beats PPO."}]
    options += [{"text": "PPO beats GRPO.", "why": "SFT beats PPO."}]
    question = {"id": "q", "kind": "single", "text": "Which?", "options": options}
    number = {"id": "n", "text": "How?", "wrong": [{"value": 1, "why": "SPIN beats PPO."}]}
    root = repository(
        tmp_path,
        **{
            "data/cards/a.yaml": yaml.safe_dump([card]),
            "data/quizzes/a.yaml": yaml.safe_dump([question, number]),
            "README.md": "# A\n\nLoRA beats QLoRA.\n",
        },
    )
    cards = [("c", f"{claim}.") for claim in ("DPO beats PPO", "SFT beats DPO", "KTO beats ORPO")]
    said = [("q", f"{claim} beats PPO.") for claim in ("GRPO", "RLOO", "SFT")]
    said.append(("n", "SPIN beats PPO."))
    assert sorted(listed(root)) == sorted([*cards, *said, ("", "LoRA beats QLoRA.")])
    bound = [{"id": "s", "says": "DPO beats PPO.", "in": ["data/cards/a.yaml#c"]}]
    bound += [{"id": "t", "says": "LoRA beats QLoRA.", "in": ["README.md"]}]
    left = listed(repository(tmp_path, statements=bound, **{"README.md": "LoRA beats QLoRA."}))
    assert sorted(left) == sorted([*cards[1:], *said])


def test_what_sets_an_exercise_is_put_aside_and_what_stands_before_it_is_not(tmp_path):
    text = "DPO beats PPO.\n\n## Exercise\n\nGive the loss in which DPO beats KTO."
    above = [("markdown", "a", text), ("code", "x", 'def f():\n    ...\n\ncheck("01.1", f)')]
    assert listed(repository(tmp_path, above)) == [("a", "DPO beats PPO.")]
    apart = [("markdown", "a", text), ("code", "x", "print(1)")]
    assert len(listed(repository(tmp_path, apart))) == 2
