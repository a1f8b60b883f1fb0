"""Notebook 11 keeps what it promises: answers folded, the plan, the deck, the article's answers, links that lead."""

import re

import pytest
from shown import Page

from ftlab import exercises
from ftlab.classroom import cards, claims, flash, interview
from ftlab.exercises import whiteboard
from notebooks import CELLS, NOTEBOOKS, ROOT

NAME = "11_interview_prep"
ALL = cards.load()


def source(id: str) -> str:
    return "".join(CELLS[f"{NAME}#{id}"]["source"])


def pages(id: str, kind: str = "text/html") -> str:
    """All that a cell has put out: what a page without a kernel shows of it."""
    outputs = CELLS[f"{NAME}#{id}"]["outputs"]
    return "\n".join("".join(output.get("data", {}).get(kind, "")) for output in outputs)


def test_it_has_at_most_forty_cells_and_its_counts_are_right():
    assert len(NOTEBOOKS[NAME]) <= 40
    assert f"{len(ALL)} interview questions" in source("title")
    tasks = exercises.exercises()
    written = [card for card in ALL if card.code and "Debug" not in tasks[card.code].title]
    assert len(written) >= 20 and f"For {len(written)} cards there is code" in source("drill-says")
    assert f"{len(whiteboard.PROBLEMS)} kinds of sums" in source("board-says")
    nine = [claim for claim in claims.load() if claim.id.startswith("X")]
    assert len(nine) == 9 and f"{len(claims.load()) - len(nine)} statements" in source("article-says")


@pytest.mark.parametrize("id", ["sitting", "flash", "deck", "article", "drill", "mock"])
def test_answers_are_folded_until_they_are_asked_for(id):
    shown = pages(id)
    asked = [card for card in ALL if card.folded() in shown]
    assert asked and not any(part in Page(shown).open for part in ("30 seconds", "90 seconds", "Evidence"))


def test_the_plan_of_two_days_is_that_of_the_dial_and_of_the_drawing(file):
    """The dial is no date, which would be over some day."""
    assert not re.search(r"INTERVIEW = .*20\d\d", source("dial"))
    days = re.search(r"INTERVIEW = flash\.in_days\((\d+)\)", source("dial"))[1]
    plan = flash.plan(flash.in_days(int(days)), file=file)
    assert len(plan) == 4
    shown, drawn = pages("plan"), (ROOT / "data" / "pictures" / "interview.svg").read_text("utf-8")
    for row in plan.itertuples():
        assert f"{row.cards}</td>" in shown and f"{row.minutes}</td>" in shown
        again = f"{row.cards - row.new} again"
        assert all(part in drawn for part in [f"{row.new} new"] * bool(row.new) + [again] * (row.cards > row.new))


def test_each_question_of_the_article_is_answered_in_the_appendix():
    asked = [card for card in ALL if card.article]
    assert len(asked) == 7 and all(card.folded() in pages("article") for card in asked)
    ids = [cell["id"] for cell in NOTEBOOKS[NAME]]
    assert ids[-3:] == ["article-says", "article", "ledger"], "at the end"


def test_the_whole_deck_and_the_whole_ledger_are_there():
    assert all(card.folded() in pages("deck") for card in ALL)
    assert all(f"<b>{claim.id}</b>" in pages("ledger") for claim in claims.load())


def test_the_mock_interview_shows_a_finished_report():
    """Of the cards that the dial's seed and level give, with the sums of the marks in the cell."""
    report = Page(pages("mock-demo")).open
    assert (
        "16 of 24 points" in report and "lost on evidence" in report and "150 and 40 s, too long, to repeat" in report
    )
    assert report.count("of 8 points") == 3
    assert all(f"| {name} |" in source("mock-says") for name in interview.RUBRIC)


def test_the_whiteboard_shows_one_problem_of_each_kind_worked_out():
    assert pages("board").count("<details>") == len(whiteboard.PROBLEMS)


def test_the_exercises_start_red_and_the_drill_is_a_blank_page():
    for id in ("write-lora", "write-dpo", "write-trainer"):
        assert "not tried yet" in pages(id, "text/plain")
    drawn = next(card for card in ALL if card.folded() in pages("drill"))
    printed = "".join("".join(output.get("text", "")) for output in CELLS[f"{NAME}#drill"]["outputs"])
    assert exercises.stub(drawn.code) in printed


def test_the_cheat_sheet_is_that_of_the_cards():
    assert cards.cheat_sheet().data in pages("sheet")


def test_every_link_leads_to_a_cell_a_data_file_or_a_page_that_the_notebook_writes():
    text = "\n".join("".join(cell["source"]) for cell in NOTEBOOKS[NAME])
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    for id in (cell["id"] for cell in NOTEBOOKS[NAME] if cell["cell_type"] == "code"):
        found += re.findall(r'href="([^"]+)"', pages(id))
        found += re.findall(r"\]\(([^)\s]+)\)", pages(id, "text/markdown"))
    here = {link for link in found if not link.startswith("https://")} - {"runs/cheat_sheet.html"}
    cells = {link.replace(".ipynb#cell-id=", "#") for link in here}
    files = {link for link in cells if (ROOT / "notebooks" / link).is_file()}
    assert len(cells) > 100 and sorted(cells - set(CELLS) - files) == []
    assert "--sheet runs/cheat_sheet.html" in source("sheet") and "tools/" not in source("sheet")


def test_each_sentence_not_to_be_said_has_another_one_and_a_place():
    rows = re.findall(r"<summary>(“.+”)</summary>\n\n(.+) \*Show:\* (.+)\.\n", source("say"))
    assert len(rows) >= 12 and all(len(say) > 25 for _, say, _ in rows)
    shown = [place for *_, place in rows if "#cell-id=" in place]
    assert len(shown) >= len(rows) - 2, "all but two can be shown in a cell"
    assert {place[9:11] for place in shown} >= {f"{n:02d}" for n in range(1, 7)}


def test_nothing_of_somebodys_own_progress_is_in_it():
    counts = re.findall(r"<td>(\d+)</td>", pages("progress"))
    rows = [counts[i : i + 6] for i in range(0, len(counts), 6)]
    assert len(rows) == len(NOTEBOOKS), "a row a notebook"
    assert {(*row[:2], *row[3:5]) for row in rows} == {("0",) * 4}, "run it with FTLAB_PROGRESS on a new file"
