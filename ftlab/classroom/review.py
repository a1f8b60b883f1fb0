"""Read 50 to 100 answers yourself: approve or reject one at a time, each verdict saved at once.

    review(items, file, title)                                        # Approve, Reject
    review(items, file, title, ["condition", "column", "unclear"])    # error analysis: what is wrong

The file gets one JSON object a verdict: {"id", "answer", "verdict", "comment"}; of several on one item the last counts.
The answer stands in it, so that verdicts on one model's answers are never counted for another's.
"""

import contextlib
import html
import json
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

import ipywidgets

from ftlab.classroom import page
from ftlab.evaluate import wilson_interval

VERDICTS = "Approve", "Reject"


def review(items: Sequence[dict[str, str]], file: Path, title: str, verdicts: Sequence[str] = VERDICTS) -> page.Steps:
    """The widget for items {"id", "prompt", "answer", "reference"}, from the first that has no verdict in `file` on.

    verdicts: a button each. With other ones than Approve and Reject, it counts how many items have each.
    """
    if clash := {"Skip", "Back"} & set(verdicts):
        raise ValueError(f"got the verdict {clash.pop()!r}, wanted other words: Skip and Back are there already")
    comment = ipywidgets.Text(description="comment", layout={"width": "98%", "max_width": "44em"})
    n = len(items)

    def steps() -> Generator:
        saved, at, pressed = _saved(items, file), -1, "Skip"
        while True:
            left = (i for i in [*range(at + 1, n), *range(n)] if items[i]["id"] not in saved)
            at = max(at - 1, 0) if pressed == "Back" else next(left, n)
            item = items[at] if at < n else {}
            row = saved.get(item.get("id"), {})
            comment.value = row.get("comment", "")
            place = f"{at + 1} of {n}" if item else f"all {n} rated"
            head = " · ".join(filter(None, [title, place, row.get("verdict"), _counts(saved, verdicts)]))
            pressed = yield _page(head, item), [*(verdicts if item else ()), "Skip", "Back"]
            saved = _saved(items, file)  # read again: another notebook may have rated meanwhile
            if pressed in verdicts:
                row = {"id": item["id"], "answer": item["answer"], "verdict": pressed.lower(), "comment": comment.value}
                file.parent.mkdir(parents=True, exist_ok=True)
                lines, part = [file.read_text("utf-8").rstrip("\n")] if file.exists() else [], file.with_suffix(".part")
                part.write_text("\n".join([*filter(None, lines), json.dumps(row), ""]), encoding="utf-8")
                part.replace(file)  # a full disk costs this verdict, and not the file
                saved[row["id"]] = row

    return page.Steps(f"Review of {n} answers", steps, extra=[comment])


def _saved(items: Sequence[dict[str, str]], file: Path) -> dict[str, dict[str, str]]:
    """The last verdict on each item, by its id; ValueError for a line that is none on one of these answers."""
    rows, answers = {}, {item["id"]: item["answer"] for item in items}
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else (), 1):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["answer"] == answers[row["id"]] and row["verdict"]:
                rows[row["id"]] = row
                continue
        raise ValueError(f"{file}, line {number}: not on one of these answers; choose another file name")
    return rows


def _counts(saved: dict[str, dict[str, str]], verdicts: Sequence[str]) -> str:
    """How many are approved so far, and the 95% Wilson interval of that rate; of other verdicts, how many have each."""
    if not saved:
        return "nothing rated yet"
    n, counts = len(saved), Counter(row["verdict"] for row in saved.values())
    if tuple(verdicts) != VERDICTS:
        return f"{n} rated: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    approved = counts["approve"]
    low, high = wilson_interval(approved, n)
    return f"{approved} of {n} approved: {approved / n:.2f}, 95% interval {low:.2f} to {high:.2f}"


def _page(head: str, item: dict[str, str]) -> str:
    shown, look = f'<p role="status"><b>{html.escape(head)}</b></p>', "border-left: 3px solid #888; padding-left: 8px"
    for name in ("prompt", "answer", "reference") if item else ():
        shown += f'<b>{name}</b><pre style="white-space: pre-wrap; {look}">{html.escape(item[name])}</pre>'
    return shown
