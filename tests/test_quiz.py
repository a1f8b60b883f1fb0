"""ftlab.classroom.quiz: files, grading and cards, driven over every question of data/quizzes, right and wrong."""

import collections
import dataclasses
import html
import itertools
import re
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import binomtest, chisquare, fisher_exact
from shown import VIEW, displayed, page_of, visible

from ftlab.classroom import progress, quiz
from ftlab.classroom.quiz import LETTERS, Question, controls, load
from ftlab.paths import DATA
from notebooks import CELLS, NOTEBOOKS

NAMES = sorted(path.stem for path in (DATA / "quizzes").glob("*.yaml"))
ALL = [(name, question) for name in NAMES for question in load(name)]
FILE = pytest.mark.parametrize("name", NAMES)
KINDS = ("single", "multiple", "numeric", "order")
EVIL = "<script>alert(1)</script> $x$"


def right_response(question: Question) -> str:
    return repr(question.answer) if question.kind == "numeric" else question.right


def wrong_responses(question: Question) -> list[str]:
    """Every other letter; every other set of letters; every swap of two steps; each typical slip, and just outside."""
    letters = LETTERS[: len(question.choices)]
    if question.kind == "numeric":
        outside = [question.answer * (1 + sign * 1.01 * question.tolerance) for sign in (1, -1)]
        return [repr(value) for value in [*(value for value, _ in question.wrong), *outside, -question.answer]]
    if question.kind == "order":
        pairs = itertools.combinations(range(len(letters)), 2)
        return [question.right.translate({ord(letters[i]): letters[j], ord(letters[j]): letters[i]}) for i, j in pairs]
    sizes = range(1, len(letters) + 1) if question.kind == "multiple" else [1]
    sets = ("".join(some) for size in sizes for some in itertools.combinations(letters, size))
    return [some for some in sets if some != "".join(sorted(question.right))]


def card_of(question: Question):
    return controls(question, lambda response, right: None, 1)


def said(question: Question, card, response: str) -> str:
    """What stands on the card once the response is entered and Check is clicked."""
    _, field, button, line, _ = card.children
    if question.kind == "multiple":
        for letter, checkbox in zip(LETTERS, field.children, strict=False):
            checkbox.value = letter in response
    else:
        field.value = response
    button.click()
    return line.value


def words(text: str) -> str:
    """The letters and digits of Markdown or HTML, so that both can be compared."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"</?[a-z]+[^>]*>", "", html.unescape(text)).lower())


# --- Every question ---------------------------------------------------------------------------------------------------


@FILE
def test_right_is_right_and_each_wrong_way_is_wrong_and_explained(name):
    for question in load(name):
        verdict, why = question.grade(right_response(question))
        assert verdict is True and all(one in why for one in question.whys)
        assert wrong_responses(question)
        for response in wrong_responses(question):
            verdict, why = question.grade(response)
            assert verdict is False and len(why) > 20, (question.id, response)
        for value, why in question.wrong:
            assert question.grade(repr(value)) == (False, why), "another wrong number lies within the tolerance"


@FILE
def test_a_card_says_what_grade_says_and_has_the_solution_after_a_wrong_answer(name):
    for question in load(name):
        card = card_of(question)
        text, field, button, line, proof = card.children
        assert all(words(why) not in words(text.value + line.value) for why in question.whys if len(why) > 30)
        button.click()
        assert "Choose or type an answer first" in line.value
        for response in (wrong_responses(question)[0], right_response(question)):
            verdict, why = question.grade(response)
            shown = said(question, card, response)
            assert ("<b>Right.</b>" in shown, "<b>Not yet.</b>" in shown) == (verdict, not verdict)
            assert words(why) in words(shown) and ("<details>" in shown) is not verdict, response
            page = html.unescape(page_of(card))
            assert not re.search(r"https?:|//|<(script|img|link|iframe|style)", page), "nothing from another host"
            for formulas in (question.text, why):
                assert formulas.count("$") % 2 == 0 and all(one in page for one in re.findall(r"\$[^$]+\$", formulas))
        assert question.proof.partition("#")[2] in proof.outputs[0]["data"]["text/html"]
        if question.kind in ("single", "multiple"):
            labels = [label for label, _ in field.options] if question.kind == "single" else [
                box.description for box in field.children]  # fmt: skip
            options = [words(letter + choice) for letter, choice in zip(LETTERS, question.choices, strict=False)]
            assert options and list(map(words, labels)) == options, "an option is a label that can be clicked"


@FILE
def test_markdown_alone_is_a_whole_question_with_its_answers(name):
    for question in load(name):
        text = question.markdown(7)
        assert text.startswith(f"**7.** {question.text}")
        shown, typed, folded = re.split(r"<details(.*)><summary>Solution</summary>", text)
        for letter, choice in zip(LETTERS, question.choices, strict=False):
            assert f"- **{letter}** {choice}" in shown
        for why in [*question.whys, *(why for _, why in question.wrong)]:
            assert why in folded and why not in shown
        notebook, _, cell = question.proof.partition("#")
        assert (f"({notebook}.ipynb#cell-id={cell})" if cell else "(11_interview_prep.ipynb#cell-id=ledger)") in folded
        wanted = {"numeric": right_response(question), "order": question.right}.get(question.kind)
        assert re.findall(r'data-(?:answer|order)="(.*?)"', typed) == ([wanted] if wanted else [])
        assert not re.search(r"https?:|//|<(script|img|link|iframe|style)", text)


def test_the_style_fetches_nothing():
    assert not re.search(r"https?:|//|url\(|@import", quiz.STYLE)


# --- Every file -------------------------------------------------------------------------------------------------------


@FILE
def test_a_file_is_a_quiz_of_its_notebook(name):
    """6 to 8 questions, some to choose and some to compute, each proven by a cell that there is or by a claim."""
    questions = load(name)
    assert 6 <= len(questions) <= 8
    kinds = collections.Counter(q.kind for q in questions)
    assert kinds["single"] >= 3 and kinds["numeric"] >= 1
    assert name in NOTEBOOKS
    for question in questions:
        assert question.proof in CELLS or re.fullmatch(r"C\d\d|X\d", question.proof), (question.id, question.proof)


def test_every_notebook_has_a_quiz_and_the_last_one_asks_across_all():
    assert set(NAMES) == set(NOTEBOOKS)
    asked = {question.proof.partition("#")[0] for question in load("11_interview_prep")}
    assert {f"{n:02d}" for n in (*range(1, 7), 8, 9)} == {notebook[:2] for notebook in asked}


@FILE
def test_a_file_gives_no_answer_away(name):
    for question in load(name):
        if question.kind == "order":
            assert question.right != "".join(sorted(question.right)), "the steps stand in the right order already"
        if question.kind == "multiple":
            assert len(question.right) < len(question.choices)
        if question.kind == "numeric":
            assert len(question.wrong) >= 2
        assert not any("$" in choice for choice in question.choices), "a label that can be clicked shows no formulas"


@pytest.mark.parametrize("path", [path for of in ("quizzes", "cards", "claims") for path in (DATA / of).glob("*.yaml")])
def test_no_key_stands_twice(path):
    """YAML keeps the last of two equal keys and says nothing."""
    nodes = [yaml.compose(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), node.start_mark
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def test_the_readme_counts_the_questions():
    readme = (DATA / "quizzes" / "README.md").read_text(encoding="utf-8")
    rows = {name: [int(n) for n in cells.split("|") if n.strip()] for name, cells in
            re.findall(r"^\| `(\w+)\.yaml` \|([\d |]+)\|$", readme, re.M)}  # fmt: skip
    kinds = {name: collections.Counter(q.kind for q in load(name)) for name in NAMES}
    assert rows == {name: [sum(k.values()), *(k[kind] for kind in KINDS)] for name, k in kinds.items()}


# --- What can be guessed ----------------------------------------------------------------------------------------------

REASON = re.compile(r"\b(because|since|so that)\b|, (as|for|so)\b", re.IGNORECASE)
NOISE = 0.05  # a figure must not differ from chance with a smaller p-value,
BOUND = 0.12  # nor, however few the questions are, by more than this share
SINGLES = [question for _, question in ALL if question.kind == "single"]
MULTIPLES = [question for _, question in ALL if question.kind == "multiple"]


def unreasoned(choices: tuple[str, ...]) -> list[str]:
    """The options that give no reason; all, where each one gives one."""
    return [choice for choice in choices if not REASON.search(choice)] or list(choices)


def of_length(extreme, choices) -> list[str]:
    return [choice for choice in choices if len(choice) == extreme(map(len, choices))]


STRATEGIES = {  # the options among which somebody who knows nothing would draw one
    "take the longest": lambda choices: of_length(max, choices),
    "take the shortest": lambda choices: of_length(min, choices),
    "drop reasons": unreasoned,
    "drop reasons, take the shortest": lambda choices: of_length(min, unreasoned(choices)),
    "drop reasons, take the longest": lambda choices: of_length(max, unreasoned(choices)),
}


def success(strategy, questions: list[Question]) -> float:
    """How many single choices the strategy gets right on average."""
    drawn = [(strategy(q.choices), q.choices[LETTERS.index(q.right)]) for q in questions]
    return sum((right in some) / len(some) for some, right in drawn)


def reasoned(questions: list[Question]) -> list[list[int]]:
    """How many options give a reason and how many give none: [of the right ones, of the wrong ones]."""
    counts = [[0, 0], [0, 0]]
    for question in questions:
        for letter, choice in zip(LETTERS, question.choices, strict=False):
            counts[letter not in question.right][not REASON.search(choice)] += 1
    return counts


def right_ones_longer(questions: list[Question]) -> int:
    """In how many multiple choices the right options are longer on average than the wrong ones."""
    means = []
    for question in questions:
        sides = [[], []]
        for letter, choice in zip(LETTERS, question.choices, strict=False):
            sides[letter not in question.right].append(len(choice))
        means.append([sum(side) / len(side) for side in sides])
    return sum(right > wrong for right, wrong in means)


CHANCE = sum(1 / len(question.choices) for question in SINGLES) / len(SINGLES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_without_knowledge_is_no_better_and_no_worse_than_chance(name):
    right = success(STRATEGIES[name], SINGLES)
    assert binomtest(round(right), len(SINGLES), CHANCE).pvalue > NOISE, f"{right:.1f} of {len(SINGLES)}"
    assert abs(right / len(SINGLES) - CHANCE) <= BOUND


# The careful option: two parts, a comma, a hedge. Somebody who knows nothing takes the one with most of it.
HEDGES = (
    r"\b(may|might|can|could|likely|usually|often|undecided|about|little|not shown|depends|at most|"
    r"unless|only if|so far)\b"
)
CUES = {
    "and": r"\band\b",
    "comma": ",",
    "hedge": HEDGES,
    "absolute": r"\b(always|never|all|none|every|no|nothing|only|must|cannot)\b",
    "denial": r"^(nothing|none|no|neither|not|never)\b",
    "number": r"\d",
}


def with_most(cues: list[str], choices: tuple[str, ...], sign: int = 1) -> list[str]:
    """The options with the most (the fewest, with sign -1) of the cues, each counted once."""
    counts = []
    for choice in choices:
        found = [bool(re.search(CUES[cue], choice, re.IGNORECASE)) for cue in cues]
        counts.append(sign * sum(found))
    return [choice for choice, count in zip(choices, counts, strict=True) if count == max(counts)]


def cue_hits(cues: list[str], questions: list[Question], sign: int = 1) -> tuple[int, float]:
    """How many single choices the cues decide, and which share of them they get right."""
    decided = [q for q in questions if len(with_most(cues, q.choices, sign)) < len(q.choices)]
    right = success(lambda choices: with_most(cues, choices, sign), decided)
    return len(decided), right / max(1, len(decided))


@pytest.mark.parametrize("sign", [1, -1], ids=["most", "fewest"])
@pytest.mark.parametrize("cues", [*([cue] for cue in CUES), ["and", "comma", "hedge"]], ids="+".join)
def test_no_cue_that_decides_twelve_questions_is_right_in_more_than_35_percent(cues, sign):
    decided, share = cue_hits(cues, SINGLES, sign)
    assert decided < 12 or share <= 0.35, f"{share:.0%} of {decided}"


def test_a_cue_is_found():
    bad = [Question("q", "single", "t", "C01", ("one", "two, and little more", "all", "no"), "B")] * 12
    for cue in ("and", "comma", "hedge"):
        assert cue_hits([cue], bad) == (12, 1) and cue_hits([cue], bad, -1) == (12, 0)


def shared_words(text: str, *others: str) -> int:
    """How many words of four letters or more a text shares with each of the others, summed."""
    words = set(re.findall(r"\w{4,}", text.lower()))
    return sum(len(words & set(re.findall(r"\w{4,}", other.lower()))) for other in others)


def count(pattern: str):
    """The trait of an option that contains a pattern: how often."""
    return lambda option, question: len(re.findall(pattern, option, re.IGNORECASE))


# How an option is written, as a number. What it says of the subject does not count.
TRAITS = {
    "letters": lambda option, question: len(option),
    "words": lambda option, question: len(option.split()),
    "letters per word": lambda option, question: len(option) / len(option.split()),
    "digits": count(r"\d"),
    "capitals": lambda option, question: sum(map(str.isupper, option)),
    "stops": count(r"[,;:.]"),
    "and": count(r"\band\b"),
    "hedges": count(HEDGES),
    "absolutes": count(CUES["absolute"]),
    "reasons": count(REASON.pattern),
    "negations": count(r"\b(not|no|nobody|none|nothing|never|neither|nor|without)\b|n't"),
    "contrast": count(r"\b(but|not)\b"),
    "relative clauses": count(r"\b(which|that|who|whose|where)\b"),
    "pronouns": count(r"\b(it|its|they|their|them)\b"),
    "opening article": count(r"^(the|a|an)\b"),
    "small numbers in words": count(r"\b(one|two|once|half)\b"),
    "past": count(r"\b(was|were|had|did|has|have)\b"),
    "comparatives": count(r"\b(more|less|better|worse|larger|smaller|longer|higher|lower)\b"),
    "words of the question": lambda option, question: shared_words(option, question.text),
    "words of other options": lambda option, question: shared_words(
        option, *(other for other in question.choices if other != option)
    ),
}


def trait_hits(trait, questions: list[Question], sign: int = 1) -> tuple[int, float]:
    """How many single choices a trait decides, and the share right if one takes the most of it.

    With sign -1 one takes the least of it. Of several options alike, one is drawn.
    """
    decided, right = 0, 0.0
    for question in questions:
        values = [sign * trait(choice, question) for choice in question.choices]
        best = [letter for letter, value in zip(LETTERS, values, strict=False) if value == max(values)]
        if len(best) < len(values):
            decided += 1
            right += (question.right in best) / len(best)
    return decided, right / max(1, decided)


@pytest.mark.parametrize("sign", [1, -1], ids=["most", "least"])
@pytest.mark.parametrize("name", TRAITS)
def test_how_an_option_is_written_does_not_tell_whether_it_is_right(name, sign):
    decided, share = trait_hits(TRAITS[name], SINGLES, sign)
    assert decided < 12 or share <= 0.35, f"{share:.0%} of {decided}"


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TRAITS)), st.sampled_from([1, -1]), st.sampled_from(SINGLES))
def test_if_every_option_is_the_key_once_a_trait_is_at_chance(name, sign, question):
    keyed = [dataclasses.replace(question, right=letter) for letter in LETTERS[: len(question.choices)]]
    decided, share = trait_hits(TRAITS[name], keyed, sign)
    assert decided in (0, len(keyed)) and share == pytest.approx(1 / len(keyed) if decided else 0)


@pytest.mark.parametrize("name, choices", {
    "letters": ("short", "a long one", "short"),
    "letters per word": ("a b c", "abracadabra", "a b"),
    "contrast": ("this", "this but not that", "that"),
    "pronouns": ("rounding", "it rounds its sum", "sums"),
    "opening article": ("rounding", "A rounding", "sums"),
    "small numbers in words": ("rows", "one row", "all rows"),
    "words of the question": ("rows", "the losses", "seeds"),
    "words of other options": ("short rows", "long rows", "long runs"),
}.items())  # fmt: skip
def test_a_trait_of_the_right_option_is_found(name, choices):
    bad = [Question("q", "single", "Which losses?", "C01", choices, "B")] * 12
    assert trait_hits(TRAITS[name], bad) == (12, 1) and trait_hits(TRAITS[name], bad, -1) == (12, 0)


def standardized_traits(question: Question) -> np.ndarray:
    """The traits of a question's options, (options, traits), of mean 0 and deviation 1, or 0."""
    rows = []
    for choice in question.choices:
        rows.append([float(trait(choice, question)) for trait in TRAITS.values()])
    centred = np.array(rows) - np.mean(rows, axis=0)
    return centred / np.maximum(np.std(rows, axis=0), 1e-9)


def learned_weights(options: np.ndarray, right: np.ndarray, decay: float) -> np.ndarray:
    """The weights of a softmax over the traits that make right options likeliest, with decay."""
    weights = np.zeros(options.shape[2])
    for _ in range(400):
        missed = right - softmax(options @ weights, axis=1)
        gradient = np.einsum("qo,qot->t", missed, options) / len(options)
        weights += 0.5 * (gradient - decay * weights)
    return weights


def learned_share(questions: list[Question], decay: float) -> float:
    """The share right, if for each question the weights are learned from all the others."""
    options = np.array([standardized_traits(question) for question in questions])
    letters = LETTERS[: options.shape[1]]
    right = np.array([[float(letter == q.right) for letter in letters] for q in questions])
    hits = 0.0
    for held_out in range(len(questions)):
        others = np.arange(len(questions)) != held_out
        weights = learned_weights(options[others], right[others], decay)
        hits += right[held_out, np.argmax(options[held_out] @ weights)]
    return hits / len(questions)


@pytest.mark.parametrize("decay", [1.0, 0.3, 0.1])
def test_a_mix_of_traits_learned_from_the_other_questions_does_not_find_the_right_option(decay):
    share = learned_share(SINGLES, decay)
    assert share <= 0.35, f"{share:.0%}"


def test_a_mix_of_traits_is_learned_where_there_is_one():
    """The right option is the longest in half of them, and else the only one with a digit."""
    choices = ("a row", "a row or some rows of it", "a seed", "a rate")
    long = Question("q", "single", "t", "C01", choices, "B")
    digit = Question("q", "single", "t", "C01", ("a row", "a seed", "a rate", "4 rows"), "D")
    assert learned_share([long, digit] * 8, 0.1) == 1


def test_right_and_wrong_options_give_reasons_as_often():
    """In each kind by itself, as multiple choices have more right options and fewer reasons."""
    for questions in (SINGLES, MULTIPLES):
        counts = reasoned(questions)
        assert fisher_exact(counts).pvalue > NOISE, counts
        right, wrong = (given / (given + none) for given, none in counts)
        assert abs(right - wrong) <= BOUND
    assert min(given for given, _ in reasoned(SINGLES)) > 0


def test_letters_are_even():
    letters = collections.Counter(question.right for question in SINGLES)
    assert chisquare([letters[letter] for letter in "ABCD"]).pvalue > NOISE
    assert max(letters.values()) / len(SINGLES) <= CHANCE + BOUND
    for name in NAMES:
        of_file = collections.Counter(q.right for q in load(name) if q.kind == "single")
        assert max(of_file.values()) <= of_file.total() / 2, (name, of_file)


@FILE
@pytest.mark.parametrize("extreme", ["longest", "shortest"])
def test_within_a_file_length_is_right_in_half_of_the_single_choices_at_most(name, extreme):
    singles = [q for q in load(name) if q.kind == "single"]
    assert success(STRATEGIES[f"take the {extreme}"], singles) <= len(singles) / 2


def test_multiple_choices_have_one_to_four_right_options_that_length_does_not_betray():
    counts = collections.Counter(len(question.right) for question in MULTIPLES)
    assert set(counts) == {1, 2, 3, 4} and max(counts.values()) <= len(MULTIPLES) / 2
    assert binomtest(right_ones_longer(MULTIPLES), len(MULTIPLES)).pvalue > NOISE


def test_the_figures_find_what_they_are_for():
    """Thirty questions whose right option is the longest and the only one without a reason, always A."""
    bad = [Question("q", "single", "t", "C01", ("the long one", "b, as c", "since d", "d, so e"), "A")] * 30
    for name in ("take the longest", "drop reasons", "drop reasons, take the shortest"):
        assert success(STRATEGIES[name], bad) == 30
    assert success(STRATEGIES["take the shortest"], bad) == 0 and fisher_exact(reasoned(bad)).pvalue < 1e-9
    assert right_ones_longer(bad) == 30


# --- Grading ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([q for _, q in ALL]), st.text() | st.text("ABCDEFGHabc, ") | st.floats().map(repr))
@example(ALL[0][1], "nan")
@example(ALL[0][1], "-inf")
@example(ALL[0][1], "9" * 5000)
@example(ALL[0][1], EVIL)
@example(ALL[0][1], "\ud800")
def test_grade_takes_any_text(question, response):
    verdict, why = question.grade(response)
    assert isinstance(verdict, bool) and why.strip()
    assert EVIL not in why
    if verdict and question.kind != "numeric":
        letters = [c for c in response.upper() if c in LETTERS[: len(question.choices)]]
        same_set = question.kind != "order" and sorted(letters) == sorted(question.right)
        assert same_set or "".join(letters) == question.right


NUMBER = Question("n", "numeric", "t", "C01", whys=("because",), answer=131072.0, unit="MB", wrong=((65536.0, "half"),))


@pytest.mark.parametrize(
    "response",
    ["131072", " 131,072 ", "131_072", "1.31072e5", "131072 MB", "131072MB", "132382", "131072,0", "131,072.0"],
)
def test_a_number_may_be_written_in_several_ways(response):
    assert NUMBER.grade(response) == (True, "because")


@pytest.mark.parametrize("response, words", [
    ("132383", "Not within 1 %"), ("nan", "Not within"), ("inf", "Not within"), ("65536", "half"), ("", "Not a number"),
    ("12 GB", "Not a number: write it like 0.69, 1,234.5 or 1.2e6, in MB"), ("131072 / 2", "Not a number"),
    ("131.072,0", "Not a number"), ("1,31072", "Not within"), ("13,1072", "Not within"), ("65,536", "half"),
])  # fmt: skip
def test_a_wrong_number_is_told_what_is_wrong(response, words):
    verdict, why = NUMBER.grade(response)
    assert not verdict and words in why
    assert "131" not in why and "131" not in NUMBER.markdown(1).split("<details")[0], "the answer is not given away"


def test_letters_are_read_with_commas_and_in_lower_case():
    several = Question("q", "multiple", "t", "C01", ("a", "b", "c"), "AC", ("x", "y", "z"))
    assert several.grade("c, a")[0] and not several.grade("a")[0]
    assert several.grade("1 2") == (False, "Wanted letters from A to C.")
    one = Question("q", "single", "t", "C01", ("a", "b", "c"), "B", ("x", "y", "z"))
    assert one.grade("a") == (False, "- **A** is wrong: x")
    assert one.grade(" b ") == (True, "- **A** is wrong: x\n- **B** is right: y\n- **C** is wrong: z")
    assert not one.grade("ab")[0] and not one.grade("bb")[0]


def test_order_says_where_it_goes_wrong_first():
    order = Question("q", "order", "t", "C01", ("a", "b", "c"), "CAB", ("why",))
    assert order.grade("C A B") == (True, "why")
    assert order.grade("CBA") == (False, "B does not stand in place 2. why")
    assert order.grade("ABC") == (False, "A does not stand in place 1. why")
    assert order.grade("CAA") == (False, "Wanted letters from A to C.")


# --- Files ------------------------------------------------------------------------------------------------------------

OPTIONS = [{"text": f"option {i}", "why": f"why {i}"} for i in range(3)]
COMMON = {"text": "t", "proof": "C01"}
SINGLE = COMMON | {"id": "s", "kind": "single", "options": [OPTIONS[0] | {"right": True}, *OPTIONS[1:]]}
NUMERIC = COMMON | {"id": "n", "kind": "numeric", "answer": 4.5, "why": "w", "wrong": [{"value": 4, "why": "w"}]}
ORDER = COMMON | {"id": "o", "kind": "order", "steps": ["a", "b", "c"], "why": "w"}


def write(folder: Path, *entries: object) -> Path:
    (folder / "q.yaml").write_text(yaml.safe_dump(list(entries), allow_unicode=True), encoding="utf-8")
    return folder


def test_a_file_becomes_questions_that_are_shuffled_in_the_same_way_each_time(tmp_path):
    multiple = SINGLE | {"id": "m", "kind": "multiple", "options": [o | {"right": True} for o in OPTIONS]}
    questions = load("q", write(tmp_path, SINGLE, multiple, NUMERIC | {"unit": "bits", "tolerance": 0.1}, ORDER))
    single, multiple, numeric, order = questions
    assert multiple.right == "ABC" and (numeric.tolerance, numeric.unit, numeric.wrong) == (0.1, "bits", ((4, "w"),))
    assert single.choices[LETTERS.index(single.right)] == "option 0"
    assert [order.choices[LETTERS.index(letter)] for letter in order.right] == ["a", "b", "c"]
    assert repr(load("q", tmp_path)) == repr(questions)
    with pytest.raises(FileNotFoundError, match=r"r\.yaml"):
        load("r", tmp_path)


KEYS = {  # kind -> (keys it must have, keys it may have), besides id, kind, text, proof
    "single": ({"options"}, set()),
    "multiple": ({"options"}, set()),
    "numeric": ({"answer", "why", "wrong"}, {"tolerance", "unit"}),
    "order": ({"steps", "why"}, set()),
}


def faults(entries: list[dict]) -> list[str]:
    """Where the entries of a file do not follow the schema of data/quizzes/README.md."""
    ids = [entry["id"] for entry in entries]
    found = [f"{id} twice" for id in set(ids) if ids.count(id) > 1]
    for entry in entries:
        must, may = KEYS[entry["kind"]]
        texts = [entry[key] for key in ("id", "text", "proof")] + [entry.get("why", "-"), entry.get("unit", "-")]
        numbers = [entry.get("answer", 0), entry.get("tolerance", 0.5)]
        for option in entry.get("options", []):
            texts += [option["text"], option["why"]]
            if set(option) - {"text", "why"} not in (set(), {"right"}) or option.get("right", True) is not True:
                found.append(f"{entry['id']}: {option}")
        for slip in entry.get("wrong", []):
            texts.append(slip["why"])
            numbers.append(slip["value"])
        right = sum("right" in option for option in entry.get("options", []))
        items = entry.get("options", entry.get("steps", "123"))
        for holds, what in (
            (must <= set(entry) - {"id", "kind", "text", "proof"} <= must | may, "keys"),
            (all(isinstance(text, str) and text.strip() for text in texts + entry.get("steps", [])), "a text"),
            (all(type(number) in (int, float) for number in numbers), "a number"),
            (0 < entry.get("tolerance", 0.5) < 1, "the tolerance"),
            (right == 1 if entry["kind"] == "single" else right >= (entry["kind"] == "multiple"), "right options"),
            (3 <= len(items) <= 8 and len(set(map(str, items))) == len(items), "options or steps"),
        ):
            if not holds:
                found.append(f"{entry['id']}: {what}")
    return found


@FILE
def test_a_file_follows_the_schema(name):
    assert faults(yaml.safe_load((DATA / "quizzes" / f"{name}.yaml").read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("entry", [
    SINGLE | {"hint": "x"}, SINGLE | {"text": " "}, SINGLE | {"options": OPTIONS}, SINGLE | {"answer": 4},
    SINGLE | {"options": [o | {"right": True} for o in OPTIONS]}, SINGLE | {"options": SINGLE["options"][:2]},
    SINGLE | {"options": [*SINGLE["options"], OPTIONS[0] | {"rigth": True}]}, NUMERIC | {"answer": "2.4e5"},
    NUMERIC | {"answer": True}, NUMERIC | {"tolerance": 0}, ORDER | {"steps": ["a", "b", "a"]}, ORDER | {"why": ""},
])  # fmt: skip
def test_the_schema_refuses(entry):
    assert faults([SINGLE | {"id": "good"}]) == [] != faults([entry])


# --- In the notebook --------------------------------------------------------------------------------------------------


def test_latex_and_markup_in_one_line():
    formula = r"$a_1 * b_2 * c_3 < \begin{pmatrix}1 & 2\\ 3 & 4\end{pmatrix}$"
    page = page_of(card_of(Question("q", "order", f"{formula} and *not* `x`, **A**", "C01", ("a", "b", "c"), "CAB")))
    assert formula in html.unescape(page)
    assert "<em>not</em>" in page and "<code>x</code>" in page and "<strong>A</strong>" in page


def test_what_is_typed_never_becomes_markup():
    for kind in ("numeric", "order"):
        question = next(q for _, q in ALL if q.kind == kind)
        assert "<script" not in said(question, card_of(question), EVIL)


def test_show_gives_one_output_with_cards_where_widgets_run_and_markdown_elsewhere(file):
    bundle, questions = displayed(quiz.show, "02_lora_math", file=file), load("02_lora_math")
    assert VIEW in bundle, "live where widgets run"
    assert bundle["text/markdown"] == "\n\n".join(q.markdown(i) for i, q in enumerate(questions, 1))
    assert "8 questions" in bundle["text/plain"], "and readable where they do not"
    assert progress.events(file=file) == [], "to be shown is not to be answered"


# --- Progress ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, file):
    """A quiz of three questions, shown: the whole of it, the questions, and their cards."""
    shown = displayed(quiz.show, "q", write(tmp_path, SINGLE, NUMERIC, ORDER), file)
    return shown, load("q", tmp_path), [one for one in visible(shown)[0].children if isinstance(one, ipywidgets.VBox)]


def left(shown) -> str:
    """What the quiz says is left, the same above and below the cards."""
    above, below = re.findall(r"<b>(\d+ of \d+ right\..*)", page_of(shown))
    assert above == below
    return above.replace("</b>", "")


def test_each_checked_answer_is_stored_and_the_quiz_says_what_is_left(asked, file):
    shown, (single, numeric, order), cards = asked
    assert left(shown) == "0 of 3 right. To do: 1, 2, 3."
    wrong = wrong_responses(single)[0]
    for question, card, response, says in (
        (single, cards[0], single.right, "1 of 3 right. To do: 2, 3."),
        (numeric, cards[1], " 4 ", "1 of 3 right. To do: 2, 3."),
        (order, cards[2], order.right, "2 of 3 right. To do: 2."),
        (numeric, cards[1], "4.5", "3 of 3 right. "),
        (single, cards[0], wrong, "2 of 3 right. To do: 1."),
    ):
        said(question, card, response)
        assert left(shown) == says
    assert [(e.kind, e.item, e.score, e.detail["answer"]) for e in progress.events(file=file)] == [
        ("quiz", "q/s", 1, single.right), ("quiz", "q/n", 0, "4"), ("quiz", "q/o", 1, order.right),
        ("quiz", "q/n", 1, "4.5"), ("quiz", "q/s", 0, wrong),
    ]  # fmt: skip


def test_what_is_left_is_of_this_quiz_and_of_what_was_answered_last(tmp_path, file):
    for kind, item, score in (("quiz", "other/s", 1), ("card", "q/o", 1), ("quiz", "q/n", 1), ("quiz", "q/n", 0),
                              ("quiz", "q/gone", 0)):  # fmt: skip
        progress.record(kind, item, score, file=file)
    shown = displayed(quiz.show, "q", write(tmp_path, SINGLE, NUMERIC, ORDER), file)
    assert left(shown) == "0 of 3 right. To do: 1, 2, 3."


def test_nothing_chosen_is_no_answer(asked, file):
    _, (_, numeric, _), cards = asked
    cards[0].children[2].click()
    for blank in ("", "   "):
        assert "Choose or type an answer first" in said(numeric, cards[1], blank)
    assert progress.events(file=file) == []


def test_an_answer_that_cannot_be_stored_is_still_checked(asked, file, tmp_path):
    _, (single, *_), cards = asked
    file.parent.mkdir(exist_ok=True)
    file.write_text("a diary <b>")
    page = said(single, cards[0], single.right)
    assert "<b>Right.</b>" in page and "<b>Not stored.</b>" in page and "FTLAB_PROGRESS" in page
    with pytest.raises(progress.ProgressError, match="FTLAB_PROGRESS"):
        displayed(quiz.show, "q", tmp_path, file)


def test_all_questions_are_known_to_the_progress():
    assert quiz.items() == [f"{name}/{question.id}" for name, question in ALL]


def test_a_proof_is_a_cell_of_the_quizs_notebook_unless_it_names_another_or_a_claim(tmp_path):
    given = {"a": "lora-10", "b": "03_qlora_memory#parity", "c": "C20", "d": "X3", "e": "Cell"}
    questions = load("q", write(tmp_path, *(ORDER | {"id": id, "proof": proof} for id, proof in given.items())))
    assert [q.proof for q in questions] == ["q#lora-10", "03_qlora_memory#parity", "C20", "X3", "q#Cell"]
