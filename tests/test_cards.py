"""ftlab.classroom.cards and data/cards: the schema, and that what a card says is shown by the cells that it names."""

import collections
import copy
import csv
import html
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from spoken import COURSE, seconds, table, words
from spoken import said as whole_answer

from ftlab.classroom import cards, claims, page
from ftlab.classroom.cards import KINDS, LEVELS, TOPICS, Card, CardError
from ftlab.exercises import nb00, nb01, nb02, nb03, nb04, nb05, nb06, nb07, nb08, nb09, nb10
from ftlab.paths import DATA
from notebooks import CELLS, ROOT, told, worked_out

ALL = cards.load()
EACH = pytest.mark.parametrize("card", [pytest.param(card, id=card.id) for card in ALL])
CLAIMS = {claim.id: claim for claim in claims.load()}
MODULES = (nb00, nb01, nb02, nb03, nb04, nb05, nb06, nb07, nb08, nb09, nb10)
EXERCISES = {id: exercise for module in MODULES for id, exercise in module.EXERCISES.items()}


def said(proof: str) -> str:
    """All that a proof says: a claim's verdict, what a data file tells, a cell's source and outputs without tags."""
    if "#" not in proof:
        return CLAIMS[proof].correct if proof in CLAIMS else told(proof)
    if proof not in CELLS:
        return ""  # test_its_evidence_exists says so
    cell = CELLS[proof]
    texts = ["".join(cell["source"])]
    for output in cell.get("outputs", []):
        pages = {kind: "".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")}
        pages["text/html"] = re.sub(r"<style.*?</style>|<[^>]+>", " ", pages.get("text/html", ""), flags=re.S)
        texts += ["".join(output.get("text", "")), *pages.values()]
    return html.unescape("\n".join(texts))


HAND = Card(
    "lora-x", "lora", "mid", "arithmetic", "How many for `A`?", "Twice r.", "One half is A.\nThe other is B.",
    (("And `C`?", "None."), ("Why?", "So.")), (("four", "No."), ("five", "Never.")), "It was 6.",
    ("02_lora_math#count", "C08", "data/gpus/gpus.json"),
    source=("arXiv:2106.09685, Table 6: 73.4", "data/results/rlvr_runs.yaml: 240"),
    by_hand=("2 x 3 = 6; numbers", "1 < 2"), sheet="2 r", article="FAQ 1", asked="Once, https://example.org",
    core=True, code="02.1",
)  # fmt: skip


def spoken(card: Card) -> str:
    """What a card states as true: not its question, and not what a weak answer says."""
    return "\n".join([whole_answer(card), card.sheet, *(why for _, why in card.weak)])


# --- Arithmetic by hand -----------------------------------------------------------------------------------------------


def holds(line: str) -> bool:
    """Whether an equation "expression = number; remark" is right to the last digit of the number."""
    left, right = line.partition(";")[0].split("=")
    number = re.fullmatch(r"\s*(-?[\d,]+(?:\.(\d+))?(?:e(-?\d+))?)\s*(%?)\s*", right)
    unit = 10.0 ** (int(number[3] or 0) - len(number[2] or "")) / (100 if number[4] else 1)
    wanted = float(number[1].replace(",", "")) / (100 if number[4] else 1)
    return abs(worked_out(left) - wanted) <= 0.5001 * unit


def test_the_checker_of_sums_finds_a_wrong_one():
    assert holds("4 + 32 / 64 = 4.5") and holds("1,000 x 2 ^ 3 = 8,000; remark") and holds("1 / 3 = 33 %")
    assert holds("-ln(sigmoid(0)) = 0.693") and holds("2 ^ -24 = 6.0e-8")
    assert not holds("4 + 32 / 64 = 4.6") and not holds("-ln(sigmoid(0)) = 0.694") and not holds("1 / 3 = 34 %")


@pytest.mark.parametrize(("id", "line"), [(card.id, line) for card in ALL for line in card.by_hand])
def test_each_sum_is_right(id, line):
    assert holds(line)


# --- Numbers ----------------------------------------------------------------------------------------------------------

NAME = re.compile(r"\b[A-Za-z][\w.]*(?:-\w+)*-\d[\w.]*|\b\d+(?:\.\d+)?[BM]\b|\b[A-Z]+\d[\w]*|\b[A-Za-z]+\d+\b")
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)")


def numbers(text: str) -> list[str]:
    """The numbers in a text, without their signs."""
    return [found.strip(",") for found in NUMBER.findall(text)]


def checked(number: str) -> bool:
    """Measured or computed, by its looks: two significant digits and a point, or three digits; no year, 2^n or 10^n."""
    digits = number.replace(",", "")
    if "e" in digits:
        return True
    if "." not in digits:
        year = re.fullmatch(r"(19|20)\d\d", number)
        round_one = re.fullmatch("10+", digits) or int(digits) & (int(digits) - 1) == 0
        return len(digits) >= 3 and not year and not round_one
    return len(digits.replace(".", "").lstrip("0")) >= 2


def supported(number: str, evidence: list[float]) -> bool:
    """Whether a number of the evidence rounds to this one: as it stands, a share in percent, a large one in M or G."""
    wanted, places = float(number.replace(",", "")), len(number.partition("e")[0].partition(".")[2])
    close = 0.5001 * 10.0 ** (int(number.partition("e")[2] or 0) - places)

    def forms(x: float) -> list[float]:
        return [x, *([100 * x] if x <= 1 else []), *([x / 1e6, x / 1e9] if x >= 1e6 else [])]

    return any(abs(form - wanted) <= close for x in evidence for form in forms(x))


def stale(card: Card) -> list[str]:
    """The numbers that are said and that no source and no sum has; those of the evidence that no proof shows."""
    known = "\n".join([*card.source, *card.by_hand, card.question])
    shown = "\n".join(map(said, card.proof))

    def missing(text: str, evidence: str) -> list[str]:
        there = [float(found.replace(",", "")) for found in numbers(evidence)]
        stated = numbers(NAME.sub(" ", re.sub(r"PENDING\([^)]*\)", " ", text)))
        return [number for number in stated if checked(number) and not supported(number, there)]

    return missing(spoken(card), known) + missing(card.evidence, shown)


@EACH
def test_each_number_has_a_source_a_sum_or_a_cell(card):
    assert stale(card) == []


def test_a_stale_number_is_found():
    assert stale(HAND) == [] == stale(Card(**{**vars(HAND), "short": "It is 73.4, then 240."}))
    for name, value in {"short": "It is 73.5.", "long": "73.5", "sheet": "73.5", "weak": (("x", "73.5"),)}.items():
        assert stale(Card(**{**vars(HAND), name: value})) == ["73.5"]
    assert stale(Card(**{**vars(HAND), "short": "99.2"})) == ["99.2"], "a cell is no source of what is said"
    assert stale(Card(**{**vars(HAND), "evidence": "99.2 and 73.4"})) == ["73.4"], "and a paper is no evidence"


def test_which_numbers_are_held_against_the_evidence():
    """Not: names, years, round numbers, small whole ones. All cards together say many that are."""
    assert [number for number in numbers("0.59, 512 or 384, 1,000 or 1,024, 2026, 7, 0.5, 6e-8, C20, 7B, x2") if
            checked(number)] == ["0.59", "384", "6e-8"]  # fmt: skip
    assert sum(checked(number) for card in ALL for number in numbers(NAME.sub(" ", spoken(card)))) > 250


def test_what_supports_a_number():
    assert supported("0.59", [0.593]) and supported("59.3", [0.593]) and supported("6.74", [6_738_415_616])
    assert supported("40.0", [39_976_960]) and not supported("0.59", [0.583]) and not supported("0.590", [0.593])
    assert not supported("593", [5.93]) and not supported("0.4", [400_000])


# --- Every card -------------------------------------------------------------------------------------------------------


@EACH
def test_its_evidence_exists(card):
    named = [proof for proof in card.proof if proof not in CELLS and proof not in CLAIMS]
    assert [proof for proof in named if not (proof.startswith("data/") and (ROOT / proof).is_file())] == []
    assert any("#" in proof for proof in card.proof), "wanted at least one cell that can be run"


@EACH
def test_it_can_be_said_in_its_time(card):
    """At 140 words a minute, numbers and formulas read out: 35 and 110 seconds at the most."""
    assert words(card.short) >= 25 and seconds(card.short) <= 35
    assert words(card.long) >= 100 and seconds(card.long) <= 110
    assert all(seconds(answer) <= 35 for _, answer in card.follow_ups)
    assert len(card.follow_ups) >= 2 and len(card.weak) >= 2


def test_how_long_a_text_takes():
    counted = {"h = W0 x": 5, "0.67": 4, "16,777,216": 10, "in 2026": 4, "99 %": 3, "8B": 2, "-log sigmoid(b x)": 5}
    assert {text: words(text) for text in counted} == counted
    assert words("a pre-trained `p.dtype`") == 5 and words("2e-4") == 4 and seconds("word " * 140) == 60


@EACH
def test_what_is_said_names_no_course_run(card):
    assert COURSE.findall(whole_answer(card)) == []


def test_a_course_run_is_found():
    for text in ("Here it was 3.", "In our sweep", "we measured", "notebook 04", "02_lora_math", "on this course"):
        assert COURSE.search(text.lower()), text
    assert not COURSE.search("Where the reward is, courses of another hour, used there.")


@EACH
def test_a_weak_answer_has_a_reason_and_the_evidence_is_one_sentence_or_two(card):
    assert all(words(why) >= 6 and why.strip().endswith((".", "?")) for _, why in card.weak)
    assert 5 <= len(card.evidence.split()) <= 70


@EACH
def test_its_code_is_an_exercise(card):
    assert not card.code or card.code in EXERCISES


def test_the_core_is_25_over_all_topics_and_20_cards_are_written_as_code():
    core = collections.Counter(card.topic for card in ALL if card.core)
    assert sum(core.values()) == 25 and set(core) == set(TOPICS) and max(core.values()) <= 5
    assert len({card.code for card in ALL if card.code}) >= 20


def test_most_cards_have_a_published_source():
    assert sum(bool(card.source) for card in ALL) >= 0.9 * len(ALL)
    print(table(ALL))


def false_in(text: str) -> list[str]:
    """The claims of whose `never` patterns one is found in the text."""
    return [id for id, claim in CLAIMS.items() if any(re.search(bad, text, re.IGNORECASE) for bad, _ in claim.never)]


@EACH
def test_it_states_nothing_that_the_ledger_calls_wrong(card):
    assert false_in(spoken(card)) == []


def test_a_false_answer_would_be_found():
    """Each part that is spoken, with a false sentence in it; what a weak answer says does not count."""
    false = "LoRA trains two to five times as fast."
    assert "C20" in false_in(false)
    parts = {"short": false, "long": false, "sheet": false, "follow_ups": (("Why?", false),), "weak": (("x", false),)}
    for name, value in parts.items():
        assert "C20" in false_in(spoken(Card(**{**vars(HAND), name: value})))
    for name, value in {"weak": ((false, "No."),), "question": false}.items():
        assert false_in(spoken(Card(**{**vars(HAND), name: value}))) == []


@EACH
def test_markup_is_closed_and_nothing_comes_from_another_host(card):
    texts = [card.question, spoken(card), card.evidence, *(one for one, _ in card.weak + card.follow_ups)]
    assert all(text.count("`") % 2 == 0 and not re.search(r"https?:|\$|\*\*|[–—]", text) for text in texts)
    text = card.folded()
    assert text.count('<a href="https://') == sum(not line.startswith("data/") for line in card.source)
    assert not re.search(r"<(script|img|link|iframe|style)| src=", text)
    for tag in ("details", "div", "ul", "li", "b", "code", "small"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>")


def test_a_card_by_hand():
    """The page of one card, written out: where the parts stand, what is code, what is a link, what is escaped."""
    look = '<div style="margin: 0.5em 0"><b>'
    items = '<ul style="margin: 0; padding-left: 1.2em">'
    a = '<a style="white-space: nowrap" href="'
    answer = (
        '<div style="border-left: 4px solid #0072B2; padding-left: 0.8em; line-height: 1.5">'
        f"{look}30 seconds</b><br>Twice r.</div>"
        f"{look}90 seconds</b><br>One half is A.<br><br>The other is B.</div>"
        f"{look}By hand</b><br><code>2 x 3 = 6</code> numbers<br><code>1 &lt; 2</code> </div>"
        f'{look}Source</b><br><a href="https://arxiv.org/abs/2106.09685">arXiv:2106.09685</a>, Table 6: 73.4<br>'
        f'{a}../data/results/rlvr_runs.yaml">data/results/rlvr_runs.yaml</a>: 240</div>'
        f"{look}Asked next</b><br>{items}<li><b>And <code>C</code>?</b> None.</li><li><b>Why?</b> So.</li></ul></div>"
        f"{look}A weak answer</b><br>{items}<li><b>four</b> No.</li><li><b>five</b> Never.</li></ul></div>"
        f"{look}How often</b><br>Once, https://example.org</div>"
        f"{look}Write it</b><br><code>check(&quot;02.1&quot;, ...)</code> in its notebook</div>"
        f'{look}Evidence</b><br>It was 6. {a}02_lora_math.ipynb#cell-id=count">02 count</a> · '
        f'{a}11_interview_prep.ipynb#cell-id=ledger">C08</a> · {a}../data/gpus/gpus.json">data/gpus/gpus.json</a>'
        "</div></div>"
    )
    tags = "<small>mid · arithmetic · core · the article, FAQ 1</small>"
    assert HAND.answer() == answer
    assert HAND.folded() == f"<details><summary>How many for <code>A</code>? {tags}</summary>{answer}</details>"
    assert HAND.opened() == f"<p><b>How many for <code>A</code>?</b> {tags}</p>{answer}"
    assert HAND.posed("3 new") == (
        '<p><small>3 new · LoRA · mid · arithmetic</small></p><p role="status"><b>How many for <code>A</code>?</b></p>'
    )
    plain = Card(**{**vars(HAND), "by_hand": (), "article": "", "core": False, "code": "", "source": (), "asked": ""})
    assert not re.search("By hand|Source|How often|Write it", plain.answer())
    assert "<small>mid · arithmetic</small>" in plain.folded()


# --- All cards --------------------------------------------------------------------------------------------------------


def test_the_articles_questions_are_there_and_sixty_more():
    asked = collections.Counter(card.article for card in ALL)
    assert {name for name in asked if name} == {*(f"interview question {i}" for i in range(1, 6)), "FAQ 1", "FAQ 2"}
    assert all(count == 1 for name, count in asked.items() if name) and asked[""] >= 60


def test_every_topic_level_and_kind_has_its_share():
    for name, values, least in (("topic", TOPICS, 6), ("level", LEVELS, 10), ("kind", KINDS, 5)):
        counts = collections.Counter(getattr(card, name) for card in ALL)
        assert all(counts[value] >= least for value in values), counts


def test_no_question_stands_twice():
    asked = [re.sub(r"\W+", " ", card.question.lower()) for card in ALL]
    assert len(set(asked)) == len(asked)


# --- The schema -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with a small valid card for each topic."""
    for topic in TOPICS:
        card = {
            "id": f"{topic}-1", "level": "mid", "kind": "concept", "question": "Why?", "short": "So.",
            "long": " So it is.\n", "follow_ups": [{"ask": "And?", "answer": "Yes."}],
            "weak": [{"says": "No.", "why": "So."}], "evidence": "Seen.", "proof": ["C20", "02_lora_math#count"],
        }  # fmt: skip
        (tmp_path / f"{topic}.yaml").write_text(yaml.safe_dump([card]), encoding="utf-8")
    return tmp_path


def test_a_small_valid_folder_loads(folder):
    loaded = cards.load(folder)
    assert [card.topic for card in loaded] == list(TOPICS)
    assert loaded[0].follow_ups == (("And?", "Yes."),) and loaded[0].by_hand == () and loaded[0].sheet == ""
    assert loaded[0].long == "So it is." and loaded[0].weak == (("No.", "So."),) and loaded[0].core is False


WRONG = {
    "no mapping": ("a text", "a mapping"),
    "no id": ({"id": None}, "text in id"),
    "missing": ({"short": ...}, "the keys"),
    "unknown key": ({"hint": "x"}, "the keys"),
    "empty text": ({"long": "  "}, "text in long"),
    "level": ({"level": "principal"}, "a level of"),
    "kind": ({"kind": "riddle"}, "a kind of"),
    "no sum": ({"kind": "arithmetic"}, "the sum in by_hand"),
    "weak as text": ({"weak": "x"}, "weak of says and why"),
    "weak without a reason": ({"weak": [{"says": "x"}]}, "weak of says and why"),
    "empty list": ({"source": []}, "texts as a list in source"),
    "source": ({"source": ["a paper"]}, "source by arXiv"),
    "core": ({"core": "yes"}, "true or false in core"),
    "code": ({"code": "DPO"}, "an exercise like"),
    "asked": ({"asked": "often"}, "the source of how often"),
    "number in a list": ({"by_hand": [1]}, "texts as a list in by_hand"),
    "follow-up without answer": ({"follow_ups": [{"ask": "And?"}]}, "follow_ups of ask and answer"),
    "follow-up of numbers": ({"follow_ups": [{"ask": "And?", "answer": 1}]}, "follow_ups of ask and answer"),
    "proof": ({"proof": ["lora-10"]}, "proof by cells"),
    "no proof": ({"proof": []}, "texts as a list in proof"),
    "proof as text": ({"proof": "C20"}, "texts as a list in proof"),
    "a claim with more to it": ({"proof": ["C20, and more"]}, "proof by cells"),
    "a file that is no data": ({"proof": ["tests/README.md"]}, "proof by cells"),
    "follow-ups as a number": ({"follow_ups": 2}, "follow_ups of ask and answer"),
    "follow-up with more": ({"follow_ups": [{"ask": "a", "answer": "b", "why": "c"}]}, "follow_ups of ask and answer"),
    "article": ({"article": " "}, "text in article"),
    "sheet": ({"sheet": 3}, "text in sheet"),
}


@pytest.mark.parametrize("change, wanted", WRONG.values(), ids=WRONG)
def test_a_wrong_card_is_named_with_its_fault(folder, change, wanted):
    path = folder / "dpo.yaml"
    card = yaml.safe_load(path.read_text())[0]
    wrong = copy.deepcopy(card) | change if isinstance(change, dict) else change
    if isinstance(wrong, dict):
        wrong = {key: value for key, value in wrong.items() if value is not ...}
    path.write_text(yaml.safe_dump([card | {"id": "fine"}, wrong]))
    with pytest.raises(CardError, match=rf"dpo\.yaml, card 2.*{wanted}"):
        cards.load(folder)


def test_files_and_ids_are_checked(folder):
    (folder / "cooking.yaml").write_text("[]")
    with pytest.raises(CardError, match="cooking"):
        cards.load(folder)
    (folder / "cooking.yaml").unlink()
    (folder / "lora.yaml").write_text((folder / "why.yaml").read_text())
    with pytest.raises(CardError, match=f"^{folder.name}: the id 'why-1' stands twice"):
        cards.load(folder)
    (folder / "why.yaml").write_text("a: b")
    with pytest.raises(CardError, match="got dict, wanted a list of cards"):
        cards.load(folder)
    (folder / "why.yaml").unlink()
    with pytest.raises(CardError, match="why"):
        cards.load(folder)


# --- Choosing and showing ---------------------------------------------------------------------------------------------


def test_choose_by_each_property_and_by_words():
    for name, value in (("topic", "dpo"), ("level", "staff"), ("kind", "design")):
        chosen = cards.choose(ALL, **{name: value})
        assert chosen == [card for card in ALL if getattr(card, name) == value] != []
        with pytest.raises(ValueError, match=name):
            cards.choose(ALL, **{name: "cooking"})
    found = cards.choose(ALL, text="MERGE 4-bit")
    assert "qlora-merge" in [card.id for card in found] and len(found) < len(ALL) / 2
    assert cards.choose(ALL) == ALL and cards.choose(ALL, text="zzz") == [] == cards.choose(ALL, text="merge zzz")
    both = [HAND, Card(**{**vars(HAND), "id": "dpo-y", "topic": "dpo", "level": "staff", "kind": "design"})]
    assert cards.choose(both, "dpo", "staff", "design") == both[1:] and cards.choose(both, "lora", "staff") == []
    for word in ("LORA-X", "how many", "twice", "other", "faq"):  # id, question, short, long, article
        assert HAND in cards.choose(both, text=word)


def test_the_table_is_the_same_choice():
    table = cards.table(topic="lora", level="senior", kind="debugging", text="adapter")
    assert list(table.index) == [card.id for card in cards.choose(ALL, "lora", "senior", "debugging", "adapter")] != []
    assert list(table.columns) == ["topic", "level", "kind", "question", "short"]
    assert cards.table().loc["lora-rank", "question"].startswith("How do you choose")


def test_a_card_is_shown_open_and_as_plain_text(monkeypatch):
    shown = []
    monkeypatch.setattr(cards, "display", lambda bundle, raw: shown.append((bundle, raw)))
    cards.show("dpo-beta", "lora-what")
    by_id = {card.id: card for card in ALL}
    assert [bundle["text/html"] for bundle, _ in shown] == [by_id[id].opened() for id in ("dpo-beta", "lora-what")]
    assert all(
        raw is True and "<" not in re.sub("<[|]?[a-z_]+[|]?>", "", bundle["text/plain"]) for bundle, raw in shown
    )
    assert "h = W0 x + (alpha / r) B A x" in shown[1][0]["text/plain"]
    with pytest.raises(KeyError, match="lora-who"):
        cards.show("lora-what", "lora-who")
    assert len(shown) == 2, "nothing is shown of a list with a mistake in it"


def test_the_deck_lists_what_is_chosen():
    deck = cards.deck()
    assert deck.shown == ALL
    row, shown = deck._widget.children
    assert row.children == (deck.topic, deck.level, deck.kind, deck.text) and shown is deck._list
    deck.topic.value, deck.kind.value, deck.text.value = "qlora", "debugging", "NF4"
    assert deck.shown == cards.choose(ALL, "qlora", None, "debugging", "NF4") != []
    text = deck._list.outputs[0]["data"]["text/html"]
    assert f"{len(deck.shown)} of {len(ALL)} cards" in text and 'role="status"' in text
    assert 'overflow: auto" tabindex="0"' in text, "it can be scrolled with the keyboard"
    assert all(page.prose(card.question) in text for card in deck.shown)
    assert text.count("<details>") == len(deck.shown)
    deck.topic.value, deck.kind.value, deck.text.value, deck.level.value = "", "", "", "junior"
    assert deck.shown == cards.choose(ALL, level="junior")


def test_the_choices_say_how_many_there_are_and_begin_with_all():
    deck = cards.deck()
    for control, name, everything in ((deck.topic, "topic", "every topic"), (deck.level, "level", "every level"),
                                      (deck.kind, "kind", "every kind")):  # fmt: skip
        (first, all_of_it), *others = control.options
        assert (first, all_of_it, control.value) == (everything, "", "")
        counted = {value: int(re.search(r"\((\d+)\)$", label)[1]) for label, value in others}
        assert counted == collections.Counter(getattr(card, name) for card in ALL)
    assert deck.topic.options[2] == (f"LoRA ({len(cards.choose(ALL, 'lora'))})", "lora")


def test_without_a_kernel_every_card_can_be_read():
    """Whatever the controls have narrowed."""
    deck = cards.deck()
    deck.topic.value, deck.text.value = "dpo", "beta"
    bundle = deck._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    for card in ALL:
        assert card.folded() in bundle["text/html"]
    folded = re.findall(r"<details><summary><b>(.*?)</b>: (\d+) cards</summary>", bundle["text/html"])
    assert folded == [(title, str(len(cards.choose(ALL, topic)))) for topic, title in TOPICS.items()]


def test_text_from_the_files_is_escaped():
    evil = "<script>alert(1)</script> & `a < b`"
    card = Card(
        "x", "dpo", "mid", "concept", evil, evil, f"{evil}\n{evil}", ((evil, evil),), ((evil, evil),), evil, ("C20",),
        (f"arXiv:2106.09685, {evil}",), ("1 = 1",),
    )  # fmt: skip
    text = card.folded() + card.posed(where="1 of 2")
    assert "<script" not in text and "<code>a &lt; b</code>" in text and "&amp;" in text
    assert "<script" in page.bundle(text)["text/plain"], "plain text is plain again"


def test_a_button_that_fails_says_why():
    import ipywidgets

    def fail() -> None:
        raise OSError("the disk is full <b>")

    output = ipywidgets.Output()
    page.button("Do", fail, output).click()
    assert "the disk is full &lt;b&gt;" in output.outputs[0]["data"]["text/html"]


# --- The cheat sheet --------------------------------------------------------------------------------------------------


def test_the_cheat_sheet_is_the_cards_lines_by_topic(tmp_path):
    shown = cards.cheat_sheet(tmp_path / "sheet.html").data
    lines = [card.sheet for card in ALL if card.sheet]
    assert len(lines) >= 40 and all(len(line.split()) <= 25 for line in lines)
    places = [shown.index(page.prose(line)) for line in lines]
    assert places == sorted(places)
    printed = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert cards.cheat_sheet().data == shown and re.findall(r"<b>(.*?)</b></div><ul", shown) == list(TOPICS.values())
    assert re.fullmatch(r'<!doctype html>\n<html lang="en">.*<h1>.*</h1>.*</html>\n', printed, flags=re.DOTALL)
    assert shown in printed and not re.search(r"https?:|<(script|img|link)", printed)


@pytest.mark.skipif(not shutil.which("chromium"), reason="NOT TESTED: no chromium here, so nobody counted the pages")
def test_the_cheat_sheet_prints_on_one_page(tmp_path):
    cards.cheat_sheet(tmp_path / "sheet.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
               f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={tmp_path / 'sheet.pdf'}"]  # fmt: skip
    subprocess.run([*command, f"file://{tmp_path / 'sheet.html'}"], check=True, capture_output=True, timeout=60)
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "sheet.pdf").read_bytes())) == 1


# --- The README -------------------------------------------------------------------------------------------------------


def test_the_readme_counts_the_cards():
    readme = (DATA / "cards" / "README.md").read_text(encoding="utf-8")
    for topic in TOPICS:
        mine = cards.choose(ALL, topic)
        levels = " | ".join(str(sum(card.level == level for card in mine)) for level in LEVELS)
        assert f"| `{topic}.yaml` | {len(mine)} | {levels} |" in readme


# --- Anki -------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The open tags at the end of a text, and the links in it."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)
        self.links += [value for name, value in attrs if name == "href"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_deck_for_anki_keeps_to_the_rules_of_its_format(tmp_path):
    """docs.ankiweb.net/importing/text-files.html: headers, then a line a note with as many fields as columns."""
    text = cards.anki(tmp_path / "deck.txt").read_text("utf-8")
    headers = dict(line[1:].split(":", 1) for line in text.splitlines() if line.startswith("#"))
    assert headers["separator"] == "tab" and headers["html"] == "true"
    assert (headers["guid column"], headers["tags column"]) == ("1", "4")
    body = text.splitlines()[len(headers) :]
    notes = list(csv.reader(body, delimiter="\t"))
    every = cards.load()
    assert len(body) == len(notes) == len(every) and {len(note) for note in notes} == {4}
    for (guid, question, answer, tags), card in zip(notes, every, strict=True):
        assert guid == card.id and tags.split() == [card.topic, card.level, card.kind, *["core"] * card.core]
        assert html.unescape(re.sub("<[^>]+>", "", question)).split()[0] in card.question.replace("`", "").replace(
            "*", ""
        )
        read = Tags()
        read.feed(answer)
        assert read.open == [] and all(link.startswith("https://") for link in read.links)
        assert not any(sign in question + answer for sign in "\t\r\n")


def test_the_deck_is_written_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "ftlab.classroom.cards", "--anki", str(tmp_path / "deck.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Import" in done.stdout and (tmp_path / "deck.txt").is_file()
