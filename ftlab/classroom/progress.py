"""What was answered so far: kept on this machine, in one file, and nowhere else.

    python -m ftlab.classroom.progress                   what is done, what to repeat
    python -m ftlab.classroom.progress --export my.jsonl
    python -m ftlab.classroom.progress --delete

In a notebook `progress.panel()` does the same with buttons.

Answers are only ever added, never changed: a log of events, from which everything else is worked out. So two open
notebooks cannot overwrite each other, and a crash loses at most the answer that was being given. The file is an SQLite
database, whose transactions are atomic: $FTLAB_PROGRESS, or ftlab/progress.sqlite in the folder for user data.
"""

import argparse
import contextlib
import html
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import ipywidgets
import pandas as pd

from ftlab.classroom import page

VERSION = 1  # of the table
ENOUGH = {"interview": 0.75}  # the score from which on an item of a kind is done; of the others only 1
WAIT_SECONDS = 30  # for another notebook that is writing
TABLE = """CREATE TABLE events (
    number INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, item TEXT NOT NULL, score REAL NOT NULL,
    detail TEXT NOT NULL)"""


class ProgressError(OSError):
    """The file cannot be read or written: says which, why, and what to do."""


@dataclass(frozen=True)
class Event:
    """One answer: when (UTC), to what kind of thing ("card", "quiz", ...), to which one, and how well, 0 to 1."""

    at: datetime
    kind: str
    item: str
    score: float
    detail: dict = field(default_factory=dict)


def default_file() -> Path:
    """Where progress is kept unless a function is told otherwise."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get("FTLAB_PROGRESS") or Path(data) / "ftlab" / "progress.sqlite").expanduser()


def record(
    kind: str,
    item: str,
    score: float,
    detail: Mapping | None = None,
    at: datetime | None = None,
    file: Path | None = None,
) -> Event:
    """Adds an answer, given now unless `at` says when, and returns it; it is on disk when the function returns.

    detail: what else is to be kept, as JSON can hold it.
    Raises ValueError for a score outside 0 to 1 or a time without zone; ProgressError if the file cannot be written.
    """
    at = at or datetime.now(UTC)
    if not 0 <= score <= 1 or at.tzinfo is None:
        raise ValueError(f"got score {score}, at {at}: wanted a score from 0 to 1 and a time with its zone")
    event = Event(at.astimezone(UTC), kind, item, float(score), dict(detail or {}))
    row = (event.at.isoformat(), kind, item, event.score, json.dumps(event.detail))
    with _database(file) as database:
        database.execute("INSERT INTO events (at, kind, item, score, detail) VALUES (?, ?, ?, ?, ?)", row)
    return event


def events(kind: str | None = None, file: Path | None = None) -> list[Event]:
    """All answers, or those of one kind, in the order in which they were given.

    Raises ProgressError if the file cannot be read, or not all of it; no file means no answers.
    """
    if _is_missing(Path(file or default_file())):
        return []
    with _database(file) as database:
        [checked] = database.execute("PRAGMA quick_check(1)").fetchone()
        if checked != "ok":  # without asking, answers on a page that was lost would only be missing
            raise sqlite3.DatabaseError(checked)
        rows = database.execute("SELECT number, at, kind, item, score, detail FROM events ORDER BY at, number")
        found = [_event(*row) for row in rows]
    return [event for event in found if kind in (None, event.kind)]


def _event(number: int, at: str, kind: str, item: str, score: float, detail: str) -> Event:
    """The answer in a row of the file. Raises sqlite3.DataError if `record` cannot have written it."""
    try:
        event = Event(datetime.fromisoformat(at), kind, item, score, json.loads(detail))
        texts = isinstance(kind, str) and isinstance(item, str) and isinstance(detail, str)
        good = texts and 0 <= score <= 1 and event.at.tzinfo is not None and isinstance(event.detail, dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise sqlite3.DataError(f"answer {number} is damaged: {error}") from error
    if not good:
        raise sqlite3.DataError(f"answer {number} is damaged: {event}")
    return event


def table(kind: str | None = None, file: Path | None = None) -> pd.DataFrame:
    """One row an item, by kind and name: times answered, the last score, the best one, when last; done, by the last."""
    names = ["kind", "item", "score", "at"]
    frame = pd.DataFrame([[getattr(event, name) for name in names] for event in events(kind, file)], columns=names)
    grouped = frame.groupby(["kind", "item"])
    items = grouped.agg(times=("score", "size"), last=("score", "last"), best=("score", "max"), at=("at", "last"))
    return items.assign(done=items["last"] >= [ENOUGH.get(kind, 1) for kind, _ in items.index])


def summary(file: Path | None = None) -> pd.DataFrame:
    """One row a kind: items done (the last answer was right), to repeat (it was not), and answers in all."""
    grouped = table(file=file).groupby("kind")
    sums = grouped.agg(done=("done", "sum"), items=("done", "size"), answers=("times", "sum"))
    return sums.assign(repeat=sums["items"] - sums["done"])[["done", "repeat", "answers"]]


def export(target: Path, file: Path | None = None) -> int:
    """Writes all answers to a new file, one JSON object a line; returns their number.

    Raises FileExistsError rather than overwrite a file.
    """
    found = events(file=file)
    # Half a character, as a browser may send it, has no UTF-8; backslashreplace writes it as JSON's own \ud83d.
    with Path(target).open("x", encoding="utf-8", errors="backslashreplace") as stream:
        for event in found:
            stream.write(json.dumps({**vars(event), "at": event.at.isoformat()}, ensure_ascii=False) + "\n")
    return len(found)


def delete(file: Path | None = None) -> int:
    """Deletes all answers for good; returns their number. Raises ProgressError for a file that holds something else."""
    path = Path(file or default_file())
    if _is_missing(path):
        return 0
    with _database(path) as database:  # not by removing the file: another notebook may be writing to it
        count = database.execute("DELETE FROM events").rowcount
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as database:
            database.execute("VACUUM")  # or the old answers could still be read in the free pages
    except sqlite3.Error as error:
        left = f"the {count} answers are deleted, but can still be found in the file's free pages"
        raise ProgressError(f"{path}: {left} ({error}): delete once more, later") from error
    return count


@contextlib.contextmanager
def _database(file: Path | None) -> Iterator[sqlite3.Connection]:
    """The database, in one transaction: all that is done in it, or nothing."""
    path = Path(file or default_file())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and 0 < path.stat().st_size < 512:  # less than SQLite's smallest page: it would begin anew
            raise sqlite3.DatabaseError("it is cut off")
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as database, database:
            if _version(database) < VERSION:
                database.execute("BEGIN IMMEDIATE")  # two notebooks may be the first at the same time
            version = _version(database)
            if version > VERSION:
                raise ProgressError(f"{path} was made by a newer ftlab (format {version}, this one reads {VERSION})")
            if version < VERSION:
                if database.execute("SELECT 1 FROM sqlite_master").fetchone():
                    raise sqlite3.DatabaseError("it is the database of another program")
                database.execute(TABLE)
                database.execute(f"PRAGMA user_version = {VERSION}")
            yield database
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last: SQLite's message quotes broken bytes
        if isinstance(error, ProgressError):
            raise
        raise _cannot_keep(path, error) from error


def _cannot_keep(path: Path, error: Exception) -> ProgressError:
    advice = "choose another file with FTLAB_PROGRESS, or move this one away"
    return ProgressError(f"{path}: progress cannot be kept ({error}): {advice}")


def _is_missing(path: Path) -> bool:
    """Whether there is no such file. Raises ProgressError if that cannot be told: no permission, too long a name."""
    try:
        return not path.exists()
    except OSError as error:
        raise _cannot_keep(path, error) from error


def _version(database: sqlite3.Connection) -> int:
    return database.execute("PRAGMA user_version").fetchone()[0]


def panel(file: Path | None = None) -> "Panel":
    """What is done and what to repeat, with buttons to look again, to export and to delete. Without: summary, table."""
    return Panel(file)


WHERE = {  # to repeat an item of this kind; a quiz's item begins with its notebook
    "card": "11_interview_prep#flash", "interview": "11_interview_prep#mock", "whiteboard": "11_interview_prep#board",
}  # fmt: skip


class Panel:
    """Made by `panel`. `look`, `export` and `delete` do what the buttons do."""

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._page, self._said = file, ipywidgets.Output(), ipywidgets.Output()
        self.target = ipywidgets.Text(value="my_progress.jsonl", description="export to")
        self.sure = ipywidgets.Checkbox(description="yes, all of it", indent=False, layout={"width": "auto"})
        look = page.button("Look again", self.look, self._said, "primary")
        export = page.button("Export", self.export, self._said)
        delete = page.button("Delete", self.delete, self._said, "danger")
        rows = [ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in
                ([look], [self.target, export], [delete, self.sure])]  # fmt: skip
        self._widget = ipywidgets.VBox([self._page, *rows, self._said])
        self.look()

    def look(self) -> None:
        """Shows what is in the file now."""
        items = table(file=self._file)
        again = items[~items["done"]].index
        lines = "".join(f"<li>{html.escape(item)} ({kind}, {_place(kind, item)})</li>" for kind, item in again)
        shown = summary(self._file).to_html() if len(items) else "<p>Nothing is answered yet.</p>"
        if lines:
            shown += f'<p>To repeat:</p><ul style="max-height: 20em; overflow: auto" tabindex="0">{lines}</ul>'
        page.fill(self._page, shown)
        self._said.outputs = ()

    def export(self) -> None:
        """Writes all answers to the file that is named, beside the notebook."""
        count = export(Path(self.target.value), self._file)
        page.fill(self._said, f'<p role="status">{count} answers written to {html.escape(self.target.value)}.</p>')

    def delete(self) -> None:
        """Deletes all answers for good. Raises ValueError unless `sure` is ticked."""
        if not self.sure.value:
            raise ValueError("Tick the box first: nothing brings them back.")
        count = delete(self._file)
        self.sure.value = False
        self.look()
        page.fill(self._said, f'<p role="status">{count} answers deleted.</p>')

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live panel; where there is no kernel nothing of it: what was answered is nobody else's business."""
        still = "(Where the notebook runs, it says here what is done and what to repeat.)"
        return {**self._widget._repr_mimebundle_(**kwargs), "text/html": f"<p>{still}</p>", "text/plain": still}


def _place(kind: str, item: str) -> str:
    return page.link(WHERE.get(kind) or f"{item.partition('/')[0]}#quiz")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ftlab.classroom.progress", description="Your progress.")
    parser.add_argument("--export", metavar="FILE", type=Path, help="write all answers to a new file, JSON lines")
    parser.add_argument("--delete", action="store_true", help="delete all answers, after a question")
    chosen = parser.parse_args(arguments)
    print(default_file())
    if chosen.export:
        print(f"{export(chosen.export)} answers written to {chosen.export}")
    elif chosen.delete:
        if input("Delete all answers for good? Type yes: ").strip().lower() == "yes":
            print(f"{delete()} answers deleted")
        else:
            print("nothing deleted")
    elif (kinds := summary()).empty:
        print("nothing answered yet")
    else:
        items = table()
        print(kinds.to_string(), "\n\nto repeat:")
        print(items[~items["done"]][["times", "last"]].to_string())


if __name__ == "__main__":
    main()
