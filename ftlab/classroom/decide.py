"""Prompt, retrieve, write rules, or fine-tune? The table of data/decide, and the same as a form."""

import ipywidgets

from ftlab.classroom import page
from ftlab.classroom.show import POLICY
from ftlab.paths import DATA

TABLE = page.read(DATA / "decide" / "decide.yaml")
QUESTIONS = TABLE["questions"]


def decide(**given: str) -> dict:
    """The first row of the table that fits an answer to each question: {"do", "when", "why", "evidence"}."""
    return next(row for row in TABLE["answers"] if all(given[name] == want for name, want in row["when"].items()))


def decision_helper() -> page.Live:
    """The questions as a form, and what fits; where no kernel runs, the whole table."""

    def draw(**given: str) -> str:
        row = decide(**given)
        bar, links = f"border-left: 4px solid {POLICY}; padding-left: 0.8em", ", ".join(map(page.link, row["evidence"]))
        return f'<div style="{bar}"><b role="status">{row["do"]}.</b> {page.prose(row["why"])} ({links})</div>'

    wide, fields = {"style": {"description_width": "21em"}, "layout": {"width": "46em", "max_width": "98%"}}, {}
    for name, question in QUESTIONS.items():
        options = [(label, value) for value, label in question["options"].items()]
        fields[name] = ipywidgets.Dropdown(options=options, description=question["ask"], **wide)
    rows = ""
    for row in TABLE["answers"]:
        asked = (f"{QUESTIONS[name]['ask']} {QUESTIONS[name]['options'][want]}" for name, want in row["when"].items())
        rows += f"<li>{page.prose('; '.join(asked) or 'in all other cases')}: <b>{row['do']}</b></li>"
    still = f"<p>The first line that fits is what to try first.</p><ol>{rows}</ol>"
    return page.panel("A form with seven questions", draw, fields, still)
