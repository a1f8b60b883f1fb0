"""Read 50 to 100 answers yourself: approve or reject one at a time, each verdict saved at once.

    review(items, "review.jsonl")      a widget: prompt, answer, reference; four buttons; a comment
    results("review.jsonl")            the verdicts as a table

The file holds one JSON object a line: {"id", "answer", "verdict", "comment"}. The answer stands in it, so that verdicts
on one model's answers are never counted for another's.
"""

import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd

from ftlab.classroom import page

KEYS = ("id", "answer", "verdict", "comment")
VERDICTS = ("approve", "reject")


def review(items: Sequence[dict[str, Any]], file: str | Path, title: str = "") -> "Review":
    """The widget for items {"id", "prompt", "answer"} and, where there is one to compare with, "reference".

    A prompt is a string or a list of messages, an id a string or an integer. If `file` holds verdicts already, the
    review goes on at the first item without one.

    Raises ValueError, and leaves the file as it is, if it is not a review or one of other answers.
    """
    return Review(items, file, title)


def results(file: str | Path) -> pd.DataFrame:
    """The saved verdicts, one row each in the order given: id, answer, verdict ("approve" or "reject"), comment."""
    return pd.DataFrame(_read(Path(file)), columns=KEYS)


class Review:
    """A review in progress; `rate` does what the buttons do. Made by `review`."""

    def __init__(self, items: Sequence[dict[str, Any]], file: str | Path, title: str):
        self._items, self._file, self._title = {item["id"]: item for item in items}, Path(file), title
        if not 0 < len(self._items) == len(items):
            raise ValueError(f"got {len(items)} items and {len(self._items)} different ids, wanted one each")
        self._ids, self._rated = list(self._items), self._load()
        self._head, self._body, self._failed = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.Output()
        self._comment = ipywidgets.Text(
            description="comment",
            placeholder="saved with the verdict",
            style={"description_width": "auto"},
            layout={"width": "98%", "max_width": "44em"},
        )
        keys = ipywidgets.Label(
            "With the keyboard: Tab to a button, Space to press it; the next answer comes by itself."
        )
        self._buttons = [
            page.button("Approve", lambda: self._rate_shown("approve"), self._failed, "success"),
            page.button("Reject", lambda: self._rate_shown("reject"), self._failed, "danger"),
            page.button("Skip", lambda: self._show(self._unrated(self._at + 1)), self._failed),
            page.button("Back", lambda: self._show(max(self._at - 1, 0)), self._failed),
        ]
        row = ipywidgets.HBox(self._buttons, layout={"flex_flow": "row wrap"})
        self._widget = ipywidgets.VBox([keys, self._head, self._body, self._comment, row, self._failed])
        self._show(self._unrated(0))

    def rate(self, id: str | int, verdict: str, comment: str = "") -> str:
        """Saves the verdict on an item, in the place of an earlier one, shows the next item, and returns the counts."""
        if id not in self._items or verdict not in VERDICTS:
            raise ValueError(f"got {id!r}, {verdict!r}, wanted one of the {len(self._ids)} ids, {VERDICTS}")
        row = {"id": id, "answer": self._items[id]["answer"], "verdict": verdict, "comment": comment}
        rated = {**self._load(), id: row}  # read again: another notebook may have rated meanwhile
        _write(self._file, rated.values())
        self._rated = rated
        self._show(self._unrated(self._ids.index(id) + 1))
        return self.counts

    @property
    def counts(self) -> str:
        """How many are approved so far, and the 95% Wilson interval of that rate."""
        n, approved = len(self._rated), sum(row["verdict"] == "approve" for row in self._rated.values())
        if n == 0:
            return "nothing rated yet"
        from scipy.stats import binomtest

        low, high = binomtest(approved, n).proportion_ci(0.95, method="wilson")
        return f"{approved} of {n} approved: {approved / n:.2f}, 95% interval {low:.2f} to {high:.2f}"

    def _repr_mimebundle_(self, **_) -> dict[str, Any]:
        """The live widget and, for GitHub, nbconvert and whatever else has no kernel, a still picture of it."""
        plain = f"Review of {len(self._ids)} answers: {self.counts}"
        return page.view(self._widget, self._head.value + self._body.value, plain)

    def _load(self) -> dict[str | int, dict[str, Any]]:
        """The saved verdicts by id; ValueError if one of them is about another answer than the one shown here."""
        rated = {row["id"]: row for row in _read(self._file)} if self._file.exists() else {}
        for id, row in rated.items():
            if id not in self._items or row["answer"] != self._items[id]["answer"]:
                raise ValueError(f"{self._file} is a review of other answers (see id {id!r}): choose another file name")
        return rated

    def _unrated(self, start: int) -> int:
        """The place of the first item without a verdict, searched from `start` on and around; if none, their number."""
        n = len(self._ids)
        places = ((start + i) % n for i in range(n))
        return next((at for at in places if self._ids[at] not in self._rated), n)

    def _show(self, at: int) -> None:
        self._at, n, self._failed.outputs = at, len(self._ids), ()
        item = self._items[self._ids[at]] if at < n else {}
        saved = self._rated.get(item.get("id"), {})
        place = f"{at + 1} of {n}" if item else f"all {n} rated"
        head = [self._title, place, saved.get("verdict"), self.counts]
        self._head.value = f"<p role='status'><b>{html.escape(' · '.join(filter(None, head)))}</b></p>"
        shown = {key: item[key] for key in ("prompt", "answer", "reference") if item.get(key) is not None}
        self._body.value = "".join(_section(key, text) for key, text in shown.items())
        self._comment.value = saved.get("comment", "")
        for button in self._buttons[:2]:
            button.disabled = not item

    def _rate_shown(self, verdict: str) -> None:
        self.rate(self._ids[self._at], verdict, self._comment.value)


def _section(name: str, text: str | list[dict[str, str]]) -> str:
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in text)
    font = "inherit" if name == "prompt" else "monospace"  # an answer and its reference: aligned
    frame = "border-left:3px solid #888;padding-left:8px;margin:0 0 10px"
    style = f"white-space:pre-wrap;line-height:1.4;font-family:{font};{frame}"
    return f"<div style='font-weight:600'>{name}</div><div style='{style}'>{html.escape(text)}</div>"


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows of a review file; ValueError, with the line, if one is none."""
    rows: list[dict[str, Any]] = []
    try:
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                if not isinstance(row, dict) or set(row) != set(KEYS) or row["verdict"] not in VERDICTS:
                    raise ValueError(f"wanted the keys {KEYS}, verdict one of {VERDICTS}")
                if not isinstance(row["id"], str | int) or not isinstance(row["comment"], str):
                    raise ValueError("wanted a string or an integer as id and a string as comment")
                rows.append(row)
    except (ValueError, RecursionError) as error:
        where = f"{file}, line {len(rows) + 1}"
        raise ValueError(f"{where}: no saved verdict ({error}); choose another file name, or mend the line") from error
    return rows


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Puts the rows in the place of the file in one step: killed at any moment, it leaves the old or the new file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + ".new")
    new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(new, file)
