"""data/cards: the schema, and that what a card says is shown by what it names; ftlab.classroom.cards on all of them."""

import collections
import csv
import html
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import ipywidgets
import pytest
import yaml
from shown import VIEW, Page, displayed, named, page_of
from spoken import COURSE, seconds, table, whole_answer, words

from ftlab.classroom import cards, claims
from ftlab.classroom.cards import LEVELS, TOPICS, Card
from ftlab.exercises import exercises
from ftlab.paths import DATA
from notebooks import CELLS, ROOT, told, worked_out

RAW = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (DATA / "cards").glob("*.yaml")}
ALL = list(cards.load())
EACH = pytest.mark.parametrize("card", [pytest.param(card, id=card.id) for card in ALL])
CLAIMS = {claim.id: claim for claim in claims.load()}
EXERCISES = exercises()

# --- The schema -------------------------------------------------------------------------------------------------------

MUST = {"id", "level", "kind", "question", "short", "long", "follow_ups", "weak", "evidence", "proof"}
KINDS = ("concept", "arithmetic", "debugging", "design", "trade-off")
MAY = {"core", "asked", "source", "by_hand", "sample_sizes", "code", "sheet", "article"}
SOURCE = re.compile(r"(arXiv:\d{4}\.\d{5}|https://\S+|(?:data|experiments)/[\w./]+)([,:;] .+)?", re.DOTALL)
PROOF = re.compile(r"\d\d_\w+#[\w-]+|[CX]\d+|(data|experiments)/[\w./-]+")


def faults(card: dict) -> list[str]:
    """Where an entry does not follow the schema of data/cards/README.md."""

    def are_texts(values: list) -> bool:
        return all(isinstance(value, str) and value.strip() for value in values)

    def are_pairs(key: str, *names: str) -> bool:
        pairs = card[key]
        return len(pairs) >= 2 and all([*pair] == [*names] and are_texts(pair.values()) for pair in pairs)

    if not MUST <= card.keys() <= MUST | MAY:
        return [f"the keys {card.keys() ^ MUST}"]
    lists = [card[key] for key in ("source", "by_hand", "proof") if key in card]
    rules = {
        "texts": are_texts([value for value in card.values() if not isinstance(value, list | bool)]),
        "lists of texts": all(isinstance(one, list) and one and are_texts(one) for one in lists),
        "level and kind": card["level"] in LEVELS and card["kind"] in KINDS,
        "core": card.get("core", True) is True,
        "how often": "https://" in card.get("asked", "https://"),
        "follow-ups": are_pairs("follow_ups", "ask", "answer"),
        "weak answers": are_pairs("weak", "says", "why"),
        "a sum": "by_hand" in card or card["kind"] != "arithmetic",
        "sources": all(SOURCE.fullmatch(str(line).strip()) for line in card.get("source", [])),
        "proofs": all(PROOF.fullmatch(str(line)) for line in card["proof"]),
        "code": card.get("code") in [None, *EXERCISES],
        "article": re.fullmatch(r"interview question [1-5]|FAQ [12]|", card.get("article", "")),
    }
    return [name for name, holds in rules.items() if not holds]


@pytest.mark.parametrize("topic", RAW)
def test_a_file_follows_the_schema(topic):
    assert {card.get("id"): found for card in RAW[topic] if (found := faults(card))} == {}


@pytest.mark.parametrize(("change", "fault"), [
    ({"hint": "x"}, "the keys"), ({"long": "  "}, "texts"), ({"code": 4.2}, "texts"), ({"core": "yes"}, "core"),
    ({"level": "principal"}, "level"), ({"source": ["a paper"]}, "sources"), ({"proof": []}, "lists"),
    ({"proof": ["C20, and more"]}, "proofs"), ({"by_hand": [1]}, "lists"), ({"code": "99.1"}, "code"),
    ({"asked": "often"}, "how often"), ({"article": "FAQ 3"}, "article"),
    ({"weak": 2 * [{"why": "x", "says": "y"}]}, "weak"), ({"follow_ups": [{"ask": "x", "answer": "y"}]}, "follow"),
])  # fmt: skip
def test_the_schema_refuses(change, fault):
    good = {"level": "mid", "kind": "concept", "proof": ["C20"], "weak": 2 * [{"says": "x", "why": "y"}]}
    good |= {"follow_ups": 2 * [{"ask": "x", "answer": "y"}], **dict.fromkeys(MUST - good.keys() - {"follow_ups"}, "x")}
    assert faults(good) == [] and faults(good | {"kind": "arithmetic"}) == ["a sum"]
    assert [one for one in faults(good | change) if one.startswith(fault)]


def test_each_topic_has_its_file_and_all_of_it_is_loaded():
    assert RAW.keys() == TOPICS.keys()
    assert [card.id for card in ALL] == [card["id"] for topic in TOPICS for card in RAW[topic]]
    assert len({card.id for card in ALL}) == len(ALL) == len({re.sub(r"\W+", " ", c.question.lower()) for c in ALL})
    for card, raw in zip(ALL, (raw for topic in TOPICS for raw in RAW[topic]), strict=True):
        assert all(getattr(card, key) == raw[key] for key in raw)


def test_what_the_deck_is_made_of():
    """Each topic, level and kind has its share; 25 cards to know first, of all topics; the article's seven once."""
    for name, values, least in (("topic", TOPICS, 6), ("level", LEVELS, 10), ("kind", KINDS, 5)):
        counts = collections.Counter(getattr(card, name) for card in ALL)
        assert all(counts[value] >= least for value in values), counts
    core = collections.Counter(card.topic for card in ALL if card.core)
    assert core.total() == 25 and set(core) == set(TOPICS) and max(core.values()) <= 5
    assert len({card.code for card in ALL if card.code}) >= 20 and sum(bool(c.source) for c in ALL) >= 0.9 * len(ALL)
    asked = sorted(card.article for card in ALL if card.article)
    assert asked == ["FAQ 1", "FAQ 2", *(f"interview question {n}" for n in range(1, 6))]


def test_all_cards_are_mixed_the_core_first_and_no_two_neighbours_of_one_topic():
    mixed = cards.mixed(ALL)
    assert sorted(card.id for card in mixed) == sorted(card.id for card in ALL)
    assert [card.core for card in mixed] == 25 * [True] + (len(ALL) - 25) * [False]
    assert all(one.topic != other.topic for one, other in itertools.pairwise(mixed))
    assert [card.id for card in cards.mixed(2 * [HAND])] == 2 * [HAND.id], "unless there is but one"


def test_the_readme_counts_the_cards():
    readme = (DATA / "cards" / "README.md").read_text(encoding="utf-8")
    counted = [line for line in table(ALL).splitlines() if line.startswith("| `")]
    assert len(counted) == len(TOPICS) and all(line in readme for line in counted)


# --- What a card says -------------------------------------------------------------------------------------------------

HAND = Card(
    id="lora-x", topic="lora", level="mid", kind="arithmetic", question="How many for `A`?", short="Twice r.",
    long="One half is A.\nThe other is B.",
    follow_ups=[{"ask": "And `C`?", "answer": "None."}, {"ask": "Why?", "answer": "So."}],
    weak=[{"says": "four", "why": "No."}, {"says": "five", "why": "Never."}],
    evidence="It was 6.", proof=["02_lora_math#count", "C08", "data/gpus/gpus.json"],
    source=("arXiv:2106.09685, Table 6: 73.4", "data/published/rlvr_runs.yaml: 240"),
    by_hand=("2 x 3 = 6; numbers", "1 < 2"), sheet="2 r", article="FAQ 1", asked="Once, https://example.org",
    core=True, code="02.1",
)  # fmt: skip


def changed(**parts) -> Card:
    return Card(**vars(HAND) | parts)


def stated(card: Card) -> str:
    """What a card states as true: not its question, and not what a weak answer says."""
    return "\n".join([whole_answer(card), card.sheet, *(pair["why"] for pair in card.weak)])


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


@EACH
def test_each_sum_is_right(card):
    assert [line for line in card.by_hand if not holds(line)] == []


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


def shows(proof: str) -> str:
    """All that a proof says: a claim's verdict, what a data file tells, a cell's source and outputs without tags."""
    if "#" not in proof:
        return CLAIMS[proof].correct if proof in CLAIMS else told(proof)
    texts = ["".join(CELLS[proof]["source"])]
    for output in CELLS[proof].get("outputs", []):
        pages = {kind: "".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")}
        pages["text/html"] = re.sub(r"<style.*?</style>|<[^>]+>", " ", pages.get("text/html", ""), flags=re.S)
        texts += ["".join(output.get("text", "")), *pages.values()]
    return html.unescape("\n".join(texts))


def stale(card: Card) -> list[str]:
    """The numbers that are said and that no source and no sum has; those of the evidence that no proof shows."""

    def missing(text: str, evidence: list[str]) -> list[str]:
        there = [float(found.replace(",", "")) for found in numbers("\n".join(evidence))]
        return [one for one in numbers(NAME.sub(" ", text)) if checked(one) and not supported(one, there)]

    known = [*card.source, *card.by_hand, card.question]
    return missing(stated(card), known) + missing(card.evidence, list(map(shows, card.proof)))


@EACH
def test_its_proofs_exist_and_each_number_has_a_source_a_sum_or_a_cell(card):
    known = [proof in CELLS or proof in CLAIMS or (ROOT / proof).is_file() for proof in card.proof]
    assert all(known), card.proof
    assert any("#" in proof for proof in card.proof), "wanted at least one cell that can be run"
    assert stale(card) == []


def test_a_stale_number_is_found():
    assert stale(HAND) == [] == stale(changed(short="It is 73.4, then 240."))
    for name, value in {
        "short": "It is 73.5.",
        "long": "73.5",
        "sheet": "73.5",
        "weak": [{"says": "x", "why": "73.5"}],
    }.items():
        assert stale(changed(**{name: value})) == ["73.5"]
    assert stale(changed(short="99.2")) == ["99.2"], "a cell is no source of what is said"
    assert stale(changed(evidence="99.2 and 73.4")) == ["73.4"], "and a paper is no evidence"


def test_which_numbers_are_held_against_the_evidence_and_what_supports_them():
    """Not: names, years, round numbers, small whole ones. All cards together say many that are."""
    assert [number for number in numbers("0.59, 512 or 384, 1,000 or 1,024, 2026, 7, 0.5, 6e-8, C20, 7B, x2") if
            checked(number)] == ["0.59", "384", "6e-8"]  # fmt: skip
    assert sum(checked(number) for card in ALL for number in numbers(NAME.sub(" ", stated(card)))) > 250
    assert supported("0.59", [0.593]) and supported("59.3", [0.593]) and supported("6.74", [6_738_415_616])
    assert supported("40.0", [39_976_960]) and not supported("0.59", [0.583]) and not supported("0.590", [0.593])
    assert not supported("593", [5.93]) and not supported("0.4", [400_000])


@EACH
def test_it_can_be_said_in_its_time_and_a_weak_answer_has_a_reason(card):
    """At 140 words a minute, numbers and formulas read out: 35 and 110 seconds at the most."""
    assert words(card.short) >= 25 and seconds(card.short) <= 35
    assert words(card.long) >= 100 and seconds(card.long) <= 110
    assert all(seconds(pair["answer"]) <= 35 for pair in card.follow_ups)
    assert all(words(pair["why"]) >= 6 and pair["why"].strip().endswith((".", "?")) for pair in card.weak)
    assert 5 <= len(card.evidence.split()) <= 70


def test_how_long_a_text_takes():
    counted = {"h = W0 x": 5, "0.67": 4, "16,777,216": 10, "in 2026": 4, "99 %": 3, "8B": 2, "-log sigmoid(b x)": 5}
    assert {text: words(text) for text in counted} == counted
    assert words("a pre-trained `p.dtype`") == 5 and words("2e-4") == 4 and seconds("word " * 140) == 60


def false_in(text: str) -> list[str]:
    """The claims of whose `never` patterns one is found in the text."""
    return [
        id for id, claim in CLAIMS.items() if any(re.search(one["pattern"], text, re.IGNORECASE) for one in claim.never)
    ]


@EACH
def test_it_says_nothing_of_a_course_run_and_nothing_that_the_ledger_calls_wrong(card):
    assert COURSE.findall(whole_answer(card)) == [] == false_in(stated(card))
    texts = [
        card.question,
        stated(card),
        card.evidence,
        *(next(iter(pair.values())) for pair in card.weak + card.follow_ups),
    ]
    assert all(text.count("`") % 2 == 0 and not re.search(r"https?:|\$|\*\*|[–—]", text) for text in texts)


def test_a_course_run_and_a_false_answer_would_be_found():
    """In each part that is spoken; what a weak answer says does not count."""
    for text in ("Here it was 3.", "In our sweep", "we measured", "notebook 04", "02_lora_math", "on this course"):
        assert COURSE.search(text.lower()), text
    assert not COURSE.search("Where the reward is, courses of another hour, used there.")
    false = "LoRA trains two to five times as fast."
    parts = {"short": false, "long": false, "sheet": false}
    parts |= {"follow_ups": [{"ask": "Why?", "answer": false}], "weak": [{"says": "x", "why": false}]}
    assert all("C20" in false_in(stated(changed(**{name: value}))) for name, value in parts.items())
    assert false_in(stated(changed(weak=[{"says": false, "why": "No."}], question=false))) == []


# --- What is shown of it ----------------------------------------------------------------------------------------------


def bare(text: str) -> str:
    """A text without its blanks and marks of code."""
    return re.sub(r"[`\s]", "", text)


@EACH
def test_the_question_stands_open_and_all_of_its_answer_is_folded(card):
    folded, parts = Page(card.folded()), [card.short, card.long, card.evidence, *card.by_hand, *card.source]
    parts += [text for pair in card.follow_ups + card.weak for text in pair.values()]
    assert bare(card.question) in bare(folded.open) and len(folded.open) < len(card.question) + 60
    assert all(bare(text.replace(";", "")) in bare(folded.text.replace(";", "")) for text in parts)
    away = [link for link in folded.links if link.startswith("https://")]
    assert len(away) == sum(not line.startswith(("data/", "experiments/")) for line in card.source)
    assert len(folded.links) == len(card.source) + len(card.proof)


def test_a_card_by_hand():
    """What is there only on some cards, where its links lead, and what stands in a session."""
    page, plain = Page(HAND.folded()), Page(changed(by_hand=(), source=(), asked="", code="", core=False).folded())
    assert page.links == [
        "https://arxiv.org/abs/2106.09685", "../data/published/rlvr_runs.yaml", "02_lora_math.ipynb#cell-id=count",
        "11_interview_prep.ipynb#cell-id=ledger", "../data/gpus/gpus.json",
    ]  # fmt: skip
    assert "core" in page.open and "core" not in plain.open
    for part in ("2 x 3 = 6", "Once, https:", "02.1 in notebook 02"):
        assert part in page.text and part not in plain.text
    assert Page(HAND.posed("3 new")).text.startswith("3 new · LoRA · mid · arithmetic")
    assert "Twice" not in HAND.posed("3 new") and 'role="status"' in HAND.posed("3 new")


def test_text_from_the_files_is_escaped():
    """The question is read twice; then both answers, two pairs, two sources, a sum, how often, the evidence."""
    evil = "<script>alert(1)</script> & `a < b`"
    parts = dict.fromkeys(("question", "short", "long", "evidence", "asked"), evil)
    parts |= {key: [{"a": evil, "b": evil}] for key in ("follow_ups", "weak")} | {"by_hand": (f"1; {evil}",)}
    card = changed(**parts, source=(f"arXiv:2106.09685, {evil}", f"https://x.org, {evil}"))
    assert bare(Page(card.folded() + card.posed("1 of 2")).text).count(bare(evil)) == 2 + 2 + 4 + 2 + 1 + 1 + 1


def test_cards_are_shown_by_their_ids_or_not_at_all():
    by_id = {card.id: card for card in ALL}
    shown = displayed(cards.show, "dpo-beta", "lora-what").data
    assert shown == by_id["dpo-beta"].folded() + by_id["lora-what"].folded()
    with pytest.raises(KeyError, match="lora-who"):
        displayed(cards.show, "lora-what", "lora-who")


def test_the_deck_lists_what_has_all_words_and_all_of_it_folded_without_a_kernel():
    deck, folded = cards.deck(), {card.id: card.folded() for card in ALL}
    every, field = page_of(deck), named(deck, ipywidgets.Text)["search"]
    assert all(card in every for card in folded.values()) and f"{len(ALL)} of {len(ALL)} cards" in every
    assert 'tabindex="0"' in every and 'role="status"' in every
    bundle = deck._repr_mimebundle_()
    assert VIEW in bundle and bundle["text/html"] == deck.shown
    topics = Page(every).open
    assert all(title in topics for title in TOPICS.values()) and ALL[0].question not in topics

    def found(words: str) -> set[str]:
        field.value = words
        shown = {id for id, card in folded.items() if card in page_of(deck)}
        assert f"{len(shown)} of {len(ALL)} cards" in page_of(deck)
        return shown

    for name, value in (("topic", "dpo"), ("level", "staff"), ("kind", "design")):
        assert {card.id for card in ALL if getattr(card, name) == value} <= found(value) < folded.keys()
    assert "qlora-merge" in found("MERGE 4-bit") and len(found("MERGE 4-bit")) < len(ALL) / 2
    assert Page(page_of(deck)).open.count("?") >= len(found("MERGE 4-bit")), "what was searched for stands open"
    assert found("merge zzz") == set() and found("") == folded.keys()


# --- The cheat sheet, and Anki ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder with what the tool writes."""
    folder = tmp_path_factory.mktemp("deck")
    asked = ["deck.py", "--anki", f"{folder}/deck.txt", "--sheet", f"{folder}/sheet.html"]
    with mock.patch.object(sys, "argv", asked):
        runpy.run_path(f"{ROOT}/tools/deck.py", run_name="__main__")
    return folder


def run_as_module(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    """python -m ftlab.classroom.cards, as with an installed package: the repository's tools are not in sight."""
    command = [sys.executable, "-m", "ftlab.classroom.cards", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "UNSLOTH_AUTO_INSTALL": "0"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_package_itself_writes_deck_and_sheet_or_says_why_not(written, tmp_path):
    done = run_as_module("--anki", "deck.txt", "--sheet", "sheet.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("deck.txt", "sheet.html"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    for arguments, said in (((), "--anki FILE"), (("--anki", "no/deck.txt"), "no/deck.txt"), (("--deck",), "--deck")):
        done = run_as_module(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_cheat_sheet_is_the_cards_lines_by_topic(written):
    shown = cards.cheat_sheet().data
    lines = [card.sheet for card in ALL if card.sheet]
    assert len(lines) >= 40 and all(len(line.split()) <= 25 for line in lines)
    by_topic = [[title, *(card.sheet for card in ALL if card.topic == topic)] for topic, title in TOPICS.items()]
    assert bare(Page(shown).text) == bare("".join(line for lines in by_topic for line in lines))
    printed = (written / "sheet.html").read_text(encoding="utf-8")
    assert shown in printed and not re.search(r"https?:|<(script|img|link)", printed)


@pytest.mark.skipif(not shutil.which("chromium"), reason="NOT TESTED: no chromium here, so nobody counted the pages")
def test_the_cheat_sheet_prints_on_one_page(written, tmp_path):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
               f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={tmp_path / 'sheet.pdf'}"]  # fmt: skip
    subprocess.run([*command, f"file://{written / 'sheet.html'}"], check=True, capture_output=True, timeout=60)
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "sheet.pdf").read_bytes())) == 1


def test_the_deck_for_anki_keeps_to_the_rules_of_its_format(written):
    """docs.ankiweb.net/importing/text-files.html: headers, then a line a note with as many fields as columns."""
    lines = (written / "deck.txt").read_text("utf-8").splitlines()
    headers = dict(line[1:].split(":", 1) for line in lines if line.startswith("#"))
    assert headers["separator"] == "tab" and headers["html"] == "true"
    assert (headers["guid column"], headers["tags column"]) == ("1", "4")
    notes = list(csv.reader(lines[len(headers) :], delimiter="\t"))
    assert len(notes) == len(lines) - len(headers)
    for (guid, question, answer, tags), card in zip(notes, cards.mixed(ALL), strict=True):
        page = Page(answer)
        assert guid == card.id and tags.split() == [card.topic, card.level, card.kind, *["core"] * card.core]
        assert bare(Page(question).text) == bare(card.question) and bare(card.short) in bare(page.open)
        assert all(link.startswith("https://") for link in page.links), "the course is not on the phone"
