"""ftlab.classroom.quiz: schema, grading and widgets, driven over every question of data/quizzes, right and wrong."""

import collections
import copy
import html
import itertools
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ftlab.classroom import progress, quiz
from ftlab.classroom.quiz import LETTERS, Question, QuizError, controls, load
from ftlab.paths import DATA
from notebooks import CELLS, NOTEBOOKS

NAMES = sorted(path.stem for path in (DATA / "quizzes").glob("*.yaml"))
ALL = [(name, question) for name in NAMES for question in load(name)]
EACH = pytest.mark.parametrize("question", [pytest.param(q, id=f"{name}-{q.id}") for name, q in ALL])
FILE = pytest.mark.parametrize("name", NAMES)
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


def said(question: Question, box, response: str) -> str:
    """What stands below the controls once the response is entered and Check is clicked."""
    (*_, field, button), line = box.children[0].children, box.children[1]
    if question.kind == "multiple":
        for checkbox in field.children:
            checkbox.value = checkbox.description in response
    else:
        field.value = response
    button.click()
    return line.value


def words(text: str) -> str:
    """The letters and digits of Markdown or HTML, so that both can be compared."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"</?[a-z]+[^>]*>", "", html.unescape(text)).lower())


# --- Every question ---------------------------------------------------------------------------------------------------


@EACH
def test_right_is_right_and_each_wrong_way_is_wrong_and_explained(question):
    verdict, why = question.grade(right_response(question))
    assert verdict is True and all(one in why for one in question.whys)
    wrong = wrong_responses(question)
    assert wrong
    for response in wrong:
        verdict, why = question.grade(response)
        assert verdict is False and len(why) > 20, response
    for value, why in question.wrong:
        assert question.grade(repr(value)) == (False, why), "another wrong number lies within the tolerance"


@EACH
def test_the_widgets_say_what_grade_says(question):
    box = controls(question)
    (*_, button), line = box.children[0].children, box.children[1]
    button.click()
    assert "Choose or type an answer first" in line.value and "Not yet." in line.value
    for response in [*wrong_responses(question), right_response(question)]:
        verdict, why = question.grade(response)
        shown = said(question, box, response)
        assert ("<b>Right.</b>" in shown, "<b>Not yet.</b>" in shown) == (verdict, not verdict)
        assert words(why) in words(shown), response


@EACH
def test_markdown_alone_is_a_whole_question_with_its_answers(question):
    text = question.markdown(7)
    assert text.startswith(f"**7.** {question.text}")
    shown, folded = text.split("<details><summary>Solution</summary>")
    for letter, choice in zip(LETTERS, question.choices, strict=False):
        assert f"- **{letter}** {choice}" in shown
    for why in [*question.whys, *(why for _, why in question.wrong)]:
        assert why in folded and why not in shown
    notebook, _, cell = question.proof.partition("#")
    proof = f"[{notebook[:2]} {cell}]({notebook}.ipynb#cell-id={cell})"
    if not cell:
        proof = f"[{question.proof}](11_interview_prep.ipynb#cell-id=ledger)"
    assert folded.endswith(f"\n\nProof: {proof}\n\n</details>")


@EACH
def test_latex_survives_markdown(question):
    for text in [question.text, *question.choices, *question.whys, *(why for _, why in question.wrong)]:
        assert text.count("$") % 2 == 0
        for formula in re.findall(r"\$[^$]+\$", text):
            assert formula in html.unescape(quiz._as_html(text))


@EACH
def test_nothing_comes_from_another_host(question):
    box = controls(question)
    for page in (question.markdown(1), said(question, box, right_response(question))):
        assert not re.search(r"https?:|//|<(script|img|link|iframe|style)", page)


# --- Every file -------------------------------------------------------------------------------------------------------


@FILE
def test_a_file_is_a_quiz_of_its_notebook(name):
    """At least 5 questions, some to choose and some to compute, each proven by a cell that there is or by a claim."""
    questions = load(name)
    assert len(questions) >= 5
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
def test_neither_letter_nor_length_gives_the_answer_away(name):
    singles = [q for q in load(name) if q.kind == "single"]
    assert max(collections.Counter(q.right for q in singles).values()) <= len(singles) / 2
    longest = [q for q in singles if len(max(q.choices, key=len)) == len(q.choices[LETTERS.index(q.right)])]
    assert len(longest) <= len(singles) / 2, [q.id for q in longest]
    for question in load(name):
        if question.kind == "order":
            assert question.right != "".join(sorted(question.right)), "the steps stand in the right order already"
        if question.kind == "multiple":
            assert len(question.right) < len(question.choices)
        if question.kind == "numeric":
            assert len(question.wrong) >= 2


@FILE
def test_no_key_stands_twice(name):
    """YAML keeps the last of two equal keys and says nothing."""
    nodes = [yaml.compose((DATA / "quizzes" / f"{name}.yaml").read_text(encoding="utf-8"))]
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
    assert rows == {name: [sum(k.values()), *(k[kind] for kind in quiz.KEYS)] for name, k in kinds.items()}


# --- Grading ----------------------------------------------------------------------------------------------------------


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
        letters = [c for c in response.upper() if c.isalpha()]
        same_set = question.kind != "order" and sorted(letters) == sorted(question.right)
        assert same_set or "".join(letters) == question.right


NUMBER = Question("n", "numeric", "t", "C01", whys=("because",), answer=131072.0, unit="MB", wrong=((65536.0, "half"),))


@pytest.mark.parametrize("response", ["131072", " 131,072 ", "131_072", "1.31072e5", "131072 MB", "131072MB", "132382"])
def test_a_number_may_be_written_in_several_ways(response):
    assert NUMBER.grade(response) == (True, "because")


@pytest.mark.parametrize("response, words", [
    ("132383", "Not within 1 %"), ("nan", "Not within"), ("inf", "Not within"), ("65536", "half"), ("", "Not a number"),
    ("12 GB", "Not a number: write it like 1,234.5 or 1.2e6, in MB"), ("131072 / 2", "Not a number"),
])  # fmt: skip
def test_a_wrong_number_is_told_what_is_wrong(response, words):
    verdict, why = NUMBER.grade(response)
    assert not verdict and words in why
    assert "131" not in why and "131" not in NUMBER.markdown(1).split("<details>")[0], "the answer is not given away"


def test_letters_are_read_with_commas_and_in_lower_case():
    several = Question("q", "multiple", "t", "C01", ("a", "b", "c"), "AC", ("x", "y", "z"))
    assert several.grade("c, a")[0] and not several.grade("a")[0]
    assert several.grade("ad") == several.grade("1 2") == (False, "Wanted letters from A to C.")
    one = Question("q", "single", "t", "C01", ("a", "b", "c"), "B", ("x", "y", "z"))
    assert one.grade("a") == (False, "- **A** is wrong: x")
    assert one.grade(" b ") == (True, "- **A** is wrong: x\n- **B** is right: y\n- **C** is wrong: z")
    assert not one.grade("ab")[0] and not one.grade("bb")[0]


def test_order_says_where_it_goes_wrong_first():
    order = Question("q", "order", "t", "C01", ("a", "b", "c"), "CAB", ("why",))
    assert order.grade("C A B") == (True, "why")
    assert order.grade("CBA") == (False, "B does not stand in place 2; what is before it is right. why")
    assert order.grade("ABC") == (False, "A does not stand in place 1. why")
    assert order.grade("CAA") == (False, "Wanted each of A, B, C once, got CAA. why")


# --- The schema -------------------------------------------------------------------------------------------------------

OPTIONS = [{"text": f"option {i}", "why": f"why {i}"} for i in range(3)]
MORE = [OPTIONS[0] | {"right": True}, *OPTIONS[1:]]
COMMON = {"text": "t", "proof": "C01"}
SINGLE = COMMON | {"id": "s", "kind": "single", "options": MORE}
NUMERIC = COMMON | {"id": "n", "kind": "numeric", "answer": 4.5, "why": "w", "wrong": [{"value": 4, "why": "w"}]}
ORDER = COMMON | {"id": "o", "kind": "order", "steps": ["a", "b", "c"], "why": "w"}


def write(folder: Path, *entries: object) -> Path:
    (folder / "q.yaml").write_text(yaml.safe_dump(list(entries), allow_unicode=True), encoding="utf-8")
    return folder


def test_the_entries_that_the_faults_start_from_are_good(tmp_path):
    multiple = SINGLE | {"id": "m", "kind": "multiple", "options": [o | {"right": True} for o in OPTIONS]}
    questions = load("q", write(tmp_path, SINGLE, multiple, NUMERIC | {"unit": "bits", "tolerance": 0.1}, ORDER))
    assert [q.kind for q in questions] == list(quiz.KEYS)
    assert questions[1].right == "ABC" and questions[2].tolerance == 0.1 and questions[2].wrong == ((4.0, "w"),)
    single, order = questions[0], questions[3]
    assert single.choices[LETTERS.index(single.right)] == "option 0"
    assert [order.choices[LETTERS.index(letter)] for letter in order.right] == ["a", "b", "c"]
    assert repr(load("q", tmp_path)) == repr(questions), "the same shuffle each time"


FAULTS = [
    ("no mapping", 3, r"a mapping .* got 3"),
    ("no kind", {k: v for k, v in SINGLE.items() if k != "kind"}, "a kind of .* got None"),
    ("unknown kind", SINGLE | {"kind": "essay"}, "got 'essay'"),
    ("kind is a list", SINGLE | {"kind": ["single"]}, "a kind of"),
    ("key missing", {k: v for k, v in ORDER.items() if k != "proof"}, r"the keys .*'proof'.*; got"),
    ("key too many", ORDER | {"hint": "x"}, "got .*'hint'"),
    ("key is a number", ORDER | {5: "x"}, "got .*'5'"),
    ("key of another kind", SINGLE | {"answer": 4}, "got .*'answer'"),
    ("text is empty", SINGLE | {"text": " "}, "text in id, text and proof"),
    ("id is a number", SINGLE | {"id": 5}, "text in id, text and proof"),
    ("why is empty", ORDER | {"why": ""}, "text in why"),
    ("options too few", SINGLE | {"options": MORE[:2]}, "3 to 8 steps or options"),
    ("options no list", SINGLE | {"options": {"A": "x"}}, "3 to 8 steps or options"),
    ("options too many", SINGLE | {"options": MORE * 3}, "3 to 8 steps or options"),
    ("option no mapping", SINGLE | {"options": [*MORE, "x"]}, "text, why, perhaps right: true; got 'x'"),
    ("option without why", SINGLE | {"options": [*MORE, {"text": "x"}]}, "text, why, perhaps right"),
    ("option with a strange key", SINGLE | {"options": [*MORE, OPTIONS[0] | {"rigth": True}]}, "rigth"),
    ("right is a word", SINGLE | {"options": [*MORE, OPTIONS[0] | {"right": "yes"}]}, "right: true"),
    ("why of an option empty", SINGLE | {"options": [*MORE, {"text": "x", "why": " "}]}, "text in text and why"),
    ("text of an option a number", SINGLE | {"options": [*MORE, {"text": 4, "why": "x"}]}, "text in text and why"),
    ("none right", SINGLE | {"options": OPTIONS}, "one right option, .* got 0"),
    ("none right of multiple", SINGLE | {"kind": "multiple", "options": OPTIONS}, "got 0"),
    ("two right of single", SINGLE | {"options": [o | {"right": True} for o in OPTIONS]}, "one right option, .* got 3"),
    ("answer is text", NUMERIC | {"answer": "4.5 bits"}, r"numbers, got \['4.5 bits'"),
    ("answer is 2.4e5, which YAML takes for text", NUMERIC | {"answer": "2.4e5"}, "numbers, got"),
    ("answer is true", NUMERIC | {"answer": True}, "numbers, got"),
    ("answer is no number", NUMERIC | {"answer": float("nan")}, "numbers, got"),
    ("answer has no end", NUMERIC | {"answer": float("inf")}, "numbers, got"),
    ("answer is too large", NUMERIC | {"answer": 10**400}, "numbers, got"),
    ("tolerance is text", NUMERIC | {"tolerance": "1 %"}, "numbers, got"),
    ("tolerance is 0", NUMERIC | {"tolerance": 0}, "a tolerance between 0 and 1, got 0"),
    ("unit is a number", NUMERIC | {"unit": 8}, "text in unit, got 8"),
    ("wrong is a mapping", NUMERIC | {"wrong": {"4": "w"}}, "wrong as a list of value and why"),
    ("wrong holds numbers", NUMERIC | {"wrong": [4]}, "wrong as a list of value and why"),
    ("wrong without why", NUMERIC | {"wrong": [{"value": 4}]}, "wrong as a list of value and why"),
    ("wrong with an empty why", NUMERIC | {"wrong": [{"value": 4, "why": ""}]}, "wrong as a list of value and why"),
    ("wrong is right", NUMERIC | {"wrong": [{"value": 4.51, "why": "w"}]}, r"outside the tolerance, got \[4.51\]"),
    ("steps too few", ORDER | {"steps": ["a", "b"]}, "3 to 8 steps or options"),
    ("a step twice", ORDER | {"steps": ["a", "b", "a"]}, "steps that are text and differ"),
    ("a step is a mapping", ORDER | {"steps": ["a", "b", {"c": 1}]}, "steps that are text and differ"),
]  # fmt: skip


@pytest.mark.parametrize("entry, cause", [pytest.param(entry, cause, id=name) for name, entry, cause in FAULTS])
def test_a_fault_is_named_with_file_question_and_cause(tmp_path, entry, cause):
    before = copy.deepcopy(entry)
    good = SINGLE | {"id": "good"}
    with pytest.raises(QuizError, match=rf"^q.yaml, question 2.*: wanted .*{cause}"):
        load("q", write(tmp_path, good, entry))
    assert str(entry) == str(before)


def test_faults_of_a_whole_file(tmp_path):
    with pytest.raises(QuizError, match=r"^q.yaml: the id 's' stands twice"):
        load("q", write(tmp_path, SINGLE, NUMERIC, SINGLE))
    (tmp_path / "q.yaml").write_text("- id: [", encoding="utf-8")
    with pytest.raises(QuizError, match=r"(?s)^q.yaml: not valid YAML: .*line 1"):
        load("q", tmp_path)
    (tmp_path / "q.yaml").write_text("id: s", encoding="utf-8")
    with pytest.raises(QuizError, match=r"^q.yaml: got dict, wanted a list"):
        load("q", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no quiz 'r': there are \['q'\]"):
        load("r", tmp_path)


# --- In the notebook --------------------------------------------------------------------------------------------------


def test_latex_and_markup_in_one_line():
    text = r"**A** is wrong: $a_1 * b_2 * c_3 < \begin{pmatrix}1 & 2\\ 3 & 4\end{pmatrix}$ and *not* `x`"
    page = quiz._as_html(text)
    assert r"$a_1 * b_2 * c_3 < \begin{pmatrix}1 & 2\\ 3 & 4\end{pmatrix}$" in html.unescape(page)
    assert "<em>not</em>" in page and "<code>x</code>" in page and "<strong>A</strong>" in page


@EACH
def test_what_is_typed_never_becomes_markup(question):
    if question.kind in ("numeric", "order"):
        assert "<script" not in said(question, controls(question), EVIL)


@pytest.fixture
def shown(monkeypatch):
    """What `show` displays, as it comes."""
    found = []
    monkeypatch.setattr(quiz, "display", lambda what, raw=False: found.append(what))
    return found


def test_show_gives_each_question_as_text_and_as_controls(shown, file):
    quiz.show("02_lora_math", file=file)
    questions = load("02_lora_math")
    keys, first, last = shown.pop(0), shown.pop(0), shown.pop()
    view = "application/vnd.jupyter.widget-view+json"
    assert view in keys and keys["text/plain"] == "", "where nothing can be pressed, nothing is said of keys"
    assert first[view] == last[view], "what is left stands above and below"
    assert [text.data for text in shown[::2]] == [q.markdown(i) for i, q in enumerate(questions, 1)]
    for bundle in shown[1::2]:
        assert view in bundle, "live where widgets run"
        assert "VBox" not in bundle["text/plain"], "and readable where they do not"
    assert progress.events(file=file) == [], "to be shown is not to be answered"


# --- Progress ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, file, monkeypatch):
    """A quiz of three questions, shown: what is left, as it changes, and the controls of each question."""
    folder = write(tmp_path, SINGLE, NUMERIC, ORDER)
    made = []
    monkeypatch.setattr(quiz, "_live", lambda widget, plain: made.append(widget))
    monkeypatch.setattr(quiz, "display", lambda what: None)
    quiz.show("q", folder, file)
    keys, left, *boxes, again = made
    assert left is again and "With the keyboard: Tab" in keys.value
    return left, load("q", folder), boxes


def test_each_checked_answer_is_stored_and_the_quiz_says_what_is_left(asked, file, tmp_path):
    left, (single, numeric, order), boxes = asked
    assert left.value == "<b>0 of 3 right.</b> Not answered yet: all."
    said(single, boxes[0], single.right)
    assert left.value == "<b>1 of 3 right.</b> Not answered yet: 2, 3."
    said(numeric, boxes[1], " 4 ")
    assert left.value == "<b>1 of 3 right.</b> To repeat: 2. Not answered yet: 3."
    said(order, boxes[2], order.right)
    said(numeric, boxes[1], "4.5")
    assert left.value == "<b>3 of 3 right.</b>"
    said(single, boxes[0], wrong_responses(single)[0])
    assert left.value == "<b>2 of 3 right.</b> To repeat: 1."
    assert [(e.kind, e.item, e.score, e.detail["answer"]) for e in progress.events(file=file)] == [
        ("quiz", "q/s", 1, single.right), ("quiz", "q/n", 0, "4"), ("quiz", "q/o", 1, order.right),
        ("quiz", "q/n", 1, "4.5"), ("quiz", "q/s", 0, wrong_responses(single)[0]),
    ]  # fmt: skip
    assert quiz.standing("q", tmp_path, file) == {"right": [2, 3], "repeat": [1], "open": []}


def test_nothing_chosen_is_no_answer(asked, file):
    _, (_, numeric, _), boxes = asked
    boxes[0].children[0].children[-1].click()
    for blank in ("", "   "):
        assert "Choose or type an answer first" in said(numeric, boxes[1], blank)
    assert progress.events(file=file) == []


@pytest.mark.parametrize(("numbers", "words"), [
    ([3], "3"), ([1, 2], "1, 2"), ([1, 2, 3], "1 to 3"), ([1, 3, 4, 5, 6, 9, 10], "1, 3 to 6, 9, 10"),
])  # fmt: skip
def test_numbers_in_a_row_are_said_in_short(numbers, words):
    assert quiz._in_words(numbers) == words


def test_all_wrong_is_all_to_repeat(asked):
    left, questions, boxes = asked
    for question, box in zip(questions, boxes, strict=True):
        said(question, box, wrong_responses(question)[0])
    assert left.value == "<b>0 of 3 right.</b> To repeat: all."


def test_an_answer_that_cannot_be_stored_is_still_checked(asked, file):
    _, (single, *_), boxes = asked
    file.parent.mkdir(exist_ok=True)
    file.write_text("a diary <b>")
    shown = said(single, boxes[0], single.right)
    assert "<b>Right.</b>" in shown and "<b>Not stored.</b>" in shown and "FTLAB_PROGRESS" in shown


def test_a_quiz_is_shown_where_progress_cannot_be_read(shown, file):
    file.parent.mkdir()
    file.write_text("a diary")
    quiz.show("02_lora_math", file=file)
    assert len(shown) > 2 * len(load("02_lora_math"))
    assert "<b>Nothing is stored.</b>" in quiz._left("02_lora_math", quiz.FOLDER, file)


def test_standing_is_of_this_quiz_and_of_what_was_answered_last(tmp_path, file):
    write(tmp_path, SINGLE, NUMERIC, ORDER)
    for kind, item, score in (("quiz", "other/s", 1), ("card", "q/o", 1), ("quiz", "q/n", 1), ("quiz", "q/n", 0),
                              ("quiz", "q/gone", 0)):  # fmt: skip
        progress.record(kind, item, score, file=file)
    assert quiz.standing("q", tmp_path, file) == {"right": [], "repeat": [2], "open": [1, 3]}
    assert quiz.overview(tmp_path, file).to_dict("index") == {"q": {"right": 0, "repeat": 1, "open": 2}}


def test_the_overview_has_a_row_for_each_notebook(file):
    table = quiz.overview(file=file)
    assert list(table.index) == NAMES and table["open"].tolist() == [len(load(name)) for name in NAMES]
    assert (table[["right", "repeat"]] == 0).all(axis=None)


def test_a_proof_is_a_cell_of_the_quizs_notebook_unless_it_names_another_or_a_claim(tmp_path):
    given = {"a": "lora-10", "b": "03_qlora_memory#parity", "c": "C20", "d": "X3", "e": "Cell"}
    questions = load("q", write(tmp_path, *(ORDER | {"id": id, "proof": proof} for id, proof in given.items())))
    assert [q.proof for q in questions] == ["q#lora-10", "03_qlora_memory#parity", "C20", "X3", "q#Cell"]
