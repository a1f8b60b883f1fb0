"""Prompt, retrieve, write rules, or fine-tune? The table of data/decide, and the same as a form.

decision_helper() shows the six questions to click. In code:

>>> decide(test="yes", changes="form", rules="no", output="text", prompt="weak", examples="many")["do"]
'Fine-tune'
"""

import html

import ipywidgets
import yaml

from ftlab.classroom import page
from ftlab.paths import DATA

TABLE = yaml.safe_load((DATA / "decide" / "decide.yaml").read_text(encoding="utf-8"))


def decide(**given: str) -> dict:
    """The first row of the table that fits: {"do", "when", "why", "evidence"}.

    Raises ValueError if a question is not answered, or with an answer that it does not have.
    """
    for name, question in TABLE["questions"].items():
        if given.get(name) not in question["options"]:
            raise ValueError(f"got {name}={given.get(name)!r}, wanted one of {list(question['options'])}")
    return next(row for row in TABLE["answers"] if all(given[name] == want for name, want in row["when"].items()))


def as_html(row: dict) -> str:
    """A row as a block with links to the cells that it rests on."""
    links = ", ".join(map(page.link, row["evidence"]))
    return (
        f'<div style="border-left:4px solid #0072B2;padding-left:0.8em"><b role="status">{html.escape(row["do"])}.</b> '
        f"{html.escape(row['why'])} ({links})</div>"
    )


class DecisionHelper:
    """The questions as a form; what fits stands below and changes with every answer."""

    def __init__(self) -> None:
        self.fields = {
            name: ipywidgets.Dropdown(
                options=[(label, value) for value, label in question["options"].items()],
                description=question["ask"],
                style={"description_width": "21em"},
                layout={"width": "46em", "max_width": "98%"},
            )
            for name, question in TABLE["questions"].items()
        }
        self._said = ipywidgets.Output()
        self._form = ipywidgets.VBox([*self.fields.values(), self._said])
        for field in self.fields.values():
            field.observe(self._update, "value")
        self._update()

    def _update(self, _=None) -> None:
        self.row = decide(**{name: field.value for name, field in self.fields.items()})
        page.fill(self._said, as_html(self.row))

    def _repr_mimebundle_(self, **_) -> dict:
        """The form, and where no kernel runs the whole table."""
        rows = "".join(
            f"<li>{html.escape(_when(row['when']))}: <b>{html.escape(row['do'])}</b></li>" for row in TABLE["answers"]
        )
        return page.view(self._form, f"<p>The first line that fits is the answer.</p><ol>{rows}</ol>")


def decision_helper() -> DecisionHelper:
    """The six questions as a form. Without it: decide(...)."""
    return DecisionHelper()


def _when(conditions: dict[str, str]) -> str:
    asked = TABLE["questions"]
    return "; ".join(f"{asked[name]['ask']} {asked[name]['options'][want]}" for name, want in conditions.items()) or (
        "in all other cases"
    )
