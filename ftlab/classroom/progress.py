"""What was answered so far: one SQLite file on this machine, to which answers are only ever added.

Two open notebooks cannot overwrite each other, and a crash loses at most the answer that was being given. The file is
$FTLAB_PROGRESS, or ftlab/progress.sqlite in the folder for user data; whoever deletes it begins anew.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

TABLE = """CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, item TEXT NOT NULL, score REAL NOT NULL,
    detail TEXT NOT NULL)"""
ENOUGH = {"interview": 0.75}  # the lowest score that counts as done, by kind; 1 for all others


class ProgressError(OSError):
    """The file cannot be read or written: says which, why, and what to do."""


class Event(NamedTuple):
    """One answer: when (UTC), to what kind of thing ("card", "quiz", ...), to which one, and how well, 0 to 1."""

    at: datetime
    kind: str
    item: str
    score: float
    detail: dict


def default_file() -> Path:
    """Where progress is kept unless a function is told otherwise."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get("FTLAB_PROGRESS") or Path(data) / "ftlab" / "progress.sqlite").expanduser()


@contextlib.contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, in one transaction: all that is done in it, or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and 0 < path.stat().st_size < 512:  # less than SQLite's smallest page: it would begin anew
            raise sqlite3.DatabaseError("it is cut off")
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as database, database:
            database.execute(TABLE)
            yield database
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:
        advice = "choose another file with FTLAB_PROGRESS, or move this one away"
        raise ProgressError(f"{path}: progress cannot be kept ({error}): {advice}") from error


def record(kind: str, item: str, score: float, detail: dict | None = None, at: datetime | None = None,
           file: Path | None = None) -> Event:  # fmt: skip
    """Adds an answer, given now unless `at` says when, and returns it; it is on disk when the function returns."""
    event = Event((at or datetime.now(UTC)).astimezone(UTC), kind, item, float(score), detail or {})
    row = (event.at.isoformat(), kind, item, event.score, json.dumps(event.detail))
    with _database(file or default_file()) as database:
        database.execute("INSERT INTO events (at, kind, item, score, detail) VALUES (?, ?, ?, ?, ?)", row)
    return event


def events(kind: str | None = None, file: Path | None = None) -> list[Event]:
    """All answers, or those of one kind, in the order in which they were given; no file means no answers."""
    if not (path := file or default_file()).exists():
        return []
    with _database(path) as database:
        rows = database.execute("SELECT at, kind, item, score, detail FROM events ORDER BY at, number")
        found = [Event(datetime.fromisoformat(at), *row, json.loads(detail)) for at, *row, detail in rows]
    return [event for event in found if kind in (None, event.kind)]


def states(kind: str, items: Iterable[str], file: Path | None = None) -> dict[str, str]:
    """What each of these items is by its last answer: "done", "repeat", or "open" if there was none."""
    last, done = {event.item: event.score for event in events(kind, file)}, ENOUGH.get(kind, 1)
    return {item: ("done" if last[item] >= done else "repeat") if item in last else "open" for item in items}
