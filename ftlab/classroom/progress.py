"""What was answered so far: kept on this machine, in one file, and nowhere else.

    python -m ftlab.classroom.progress                   what is done, what to repeat
    python -m ftlab.classroom.progress --export my.jsonl
    python -m ftlab.classroom.progress --delete

Answers are only ever added, never changed: a log of events, from which everything else is worked out. So two open
notebooks cannot overwrite each other, and a crash loses at most the answer that was being given. The file is an SQLite
database, whose transactions are atomic: $FTLAB_PROGRESS, or ftlab/progress.sqlite in the folder for user data.
"""

import argparse
import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

VERSION = 1  # of the table
WAIT_SECONDS = 30  # for another notebook that is writing
TABLE = """CREATE TABLE IF NOT EXISTS events (
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
    row = (event.at.isoformat(), kind, item, event.score, json.dumps(event.detail, ensure_ascii=False))
    with _database(file) as database:
        database.execute("INSERT INTO events (at, kind, item, score, detail) VALUES (?, ?, ?, ?, ?)", row)
    return event


def events(kind: str | None = None, file: Path | None = None) -> list[Event]:
    """All answers, or those of one kind, in the order in which they were given.

    Raises ProgressError if the file cannot be read; no file means no answers.
    """
    if not Path(file or default_file()).exists():
        return []
    with _database(file) as database:
        rows = database.execute("SELECT at, kind, item, score, detail FROM events ORDER BY at, number").fetchall()
    found = [Event(datetime.fromisoformat(at), *rest, json.loads(detail)) for at, *rest, detail in rows]
    return [event for event in found if kind in (None, event.kind)]


def table(kind: str | None = None, file: Path | None = None) -> pd.DataFrame:
    """One row an item, by kind and name: times answered, the last score, the best one, when last."""
    names = ["kind", "item", "score", "at"]
    frame = pd.DataFrame([[getattr(event, name) for name in names] for event in events(kind, file)], columns=names)
    grouped = frame.groupby(["kind", "item"])
    return grouped.agg(times=("score", "size"), last=("score", "last"), best=("score", "max"), at=("at", "last"))


def summary(file: Path | None = None) -> pd.DataFrame:
    """One row a kind: items done (last answer right), to repeat (last answer not wholly right), and answers in all."""
    items = table(file=file).reset_index()
    items["done"] = items["last"] == 1
    grouped = items.groupby("kind")
    sums = grouped.agg(done=("done", "sum"), items=("done", "size"), answers=("times", "sum"))
    return sums.assign(repeat=sums["items"] - sums["done"])[["done", "repeat", "answers"]]


def export(target: Path, file: Path | None = None) -> int:
    """Writes all answers to a new file, one JSON object a line; returns their number.

    Raises FileExistsError rather than overwrite a file.
    """
    found = events(file=file)
    with Path(target).open("x", encoding="utf-8") as stream:
        for event in found:
            stream.write(json.dumps({**vars(event), "at": event.at.isoformat()}, ensure_ascii=False) + "\n")
    return len(found)


def delete(file: Path | None = None) -> int:
    """Deletes all answers for good; returns their number. Raises ProgressError for a file that holds something else."""
    path = Path(file or default_file())
    if not path.exists():
        return 0
    with _database(path) as database:  # not by removing the file: another notebook may be writing to it
        count = database.execute("DELETE FROM events").rowcount
    with contextlib.closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as database:
        database.execute("VACUUM")  # or the old answers could still be read in the free pages
    return count


@contextlib.contextmanager
def _database(file: Path | None) -> Iterator[sqlite3.Connection]:
    """The database, in one transaction: all that is done in it, or nothing."""
    path = Path(file or default_file())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as database, database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise ProgressError(f"{path} was made by a newer ftlab (format {version}, this one reads {VERSION})")
            if version < VERSION:
                database.execute("BEGIN IMMEDIATE")  # two notebooks may be the first at the same time
                database.execute(TABLE)
                database.execute(f"PRAGMA user_version = {VERSION}")
            yield database
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, ProgressError):
            raise
        advice = "choose another file with FTLAB_PROGRESS, or move this one away"
        raise ProgressError(f"{path}: progress cannot be kept ({error}): {advice}") from error


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
        print(items[items["last"] < 1][["times", "last"]].to_string())


if __name__ == "__main__":
    main()
