"""`ask`: a question in English -> one SQLite query, which is right if it returns the rows of the gold query.

    is_right("SELECT COUNT(*) FROM orders WHERE minutes>45", gold)     # on ten differently filled tables

The check is a reward for reinforcement learning too. So whatever a model writes must be harmless, and one answer must
always get one verdict: the tables are read-only; a query may read `orders` and call functions that know no clock and no
chance and build no long strings; its steps, seconds, rows and lengths have limits. They lie inside SQLite, because an
alarm (SIGALRM) waits until a call into C is over. Tests: tests/test_tasks_ask.py.
"""

import csv
import html
import itertools
import json
import os
import re
import sqlite3
import threading
import time
from functools import lru_cache

from ftlab.paths import DATA

SYSTEM = "Write one SQLite query."
FOLDER = DATA / "ask" / "databases"
NAMES = [f"orders_{number}.csv" for number in range(10)]
SCHEMA = (
    "orders(id INT, day TEXT, month INT, city TEXT, plan TEXT, cuisine TEXT, status TEXT, payment TEXT, "
    "total INT, tip INT, minutes INT, stars INT)"
)
COLUMNS = re.findall(r"(\w+) (?:INT|TEXT)", SCHEMA)

MAX_CHARS, MAX_SELECTS, MAX_ROWS = 500, 4, 2_000
MAX_STEPS = 500_000  # of SQLite's virtual machine; GROUP BY over 1,200 orders takes about 25,000
MAX_SECONDS = 2.0  # of one answer on all tables together; the slowest gold query takes 2 ms
FUNCTIONS = [
    *("count", "sum", "total", "avg", "min", "max", "abs", "round", "coalesce", "ifnull", "nullif", "iif"),
    *("length", "lower", "upper", "trim", "ltrim", "rtrim", "substr", "substring", "instr", "like"),
]
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000,  # bytes of a string or a row
    sqlite3.SQLITE_LIMIT_COLUMN: 20,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
}


class QueryError(ValueError):
    """Why a query does not run, in words for the person who wrote it."""


def _may(action: int, one: str | None, two: str | None, *_) -> int:
    """SQLite's authorizer, asked when a query is compiled: SELECT, the columns of `orders`, FUNCTIONS, nothing else."""
    reads = action == sqlite3.SQLITE_SELECT or (action == sqlite3.SQLITE_READ and one == "orders")
    calls = action == sqlite3.SQLITE_FUNCTION and two.lower() in FUNCTIONS
    return sqlite3.SQLITE_OK if reads or calls else sqlite3.SQLITE_DENY


def databases() -> list[sqlite3.Connection]:
    """The ten tables of orders as read-only in-memory SQLite databases, loaded once in each thread of each process."""
    return databases_of(os.getpid(), threading.get_ident())


@lru_cache(maxsize=16)
def databases_of(process: int, thread: int) -> list[sqlite3.Connection]:
    """An empty field is NULL; SQLite makes 45 of "45" in an INT column. Nothing can be written once they are here."""
    found = []
    for name in NAMES:
        header, *lines = csv.reader((FOLDER / name).read_text(encoding="utf-8").splitlines())
        db = sqlite3.connect(":memory:", isolation_level=None)
        db.execute(f"CREATE TABLE {SCHEMA}")
        insert = f"INSERT INTO orders({','.join(header)}) VALUES ({','.join('?' * len(header))})"
        db.executemany(insert, [[text or None for text in line] for line in lines])
        db.executescript("PRAGMA temp_store=MEMORY; PRAGMA query_only=ON")
        for limit, value in LIMITS.items():
            db.setlimit(limit, value)
        db.set_authorizer(_may)
        found.append(db)
    return found


class _Limit:
    """SQLite asks `stops` after each 1,000 steps; `reason` says why it stopped.

    Steps alone stop nearly all endless queries, within milliseconds. But one step may compare a
    long text with a long set of characters (`trim`), and 500,000 of those take 11 s.
    """

    def __init__(self, until: float) -> None:
        self.until, self.steps, self.reason = until, 0, ""

    def stops(self) -> bool:
        self.steps += 1_000
        if self.steps > MAX_STEPS:
            self.reason = f"more than {MAX_STEPS:,} steps"
        elif time.monotonic() > self.until:
            self.reason = f"more than {MAX_SECONDS:g} s"
        return self.reason != ""


def run_query(sql: str, db: sqlite3.Connection, until: float | None = None) -> list[tuple]:
    """The rows that one SELECT returns on one of `databases()`; raises QueryError with the reason if it is refused.

    It must end at `until`, a value of time.monotonic(), or else within MAX_SECONDS.
    """
    return _run(sql, db, until)[1]


def _run(sql: str, db: sqlite3.Connection, until: float | None = None) -> tuple[list[str], list[tuple]]:
    """The names of the columns, and the rows of exactly one SELECT of the table orders, within all limits."""
    if not re.match(r"\s*select\b", sql, re.IGNORECASE):
        raise QueryError(f"not a query: wanted SELECT ..., got {sql[:20]!r}")
    if len(sql) > MAX_CHARS or len(re.findall(r"\bselect\b", sql, re.IGNORECASE)) > MAX_SELECTS:
        raise QueryError(f"too long: more than {MAX_CHARS} characters or {MAX_SELECTS} SELECTs")
    limit = _Limit(time.monotonic() + MAX_SECONDS if until is None else until)
    db.set_progress_handler(limit.stops, 1_000)
    try:
        cursor = db.execute(sql)
        rows = cursor.fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
        if str(error) == "interrupted" and not limit.reason:  # SQLite dropped what a signal raised
            raise KeyboardInterrupt from None
        raise QueryError(limit.reason or str(error)) from None
    finally:
        db.set_progress_handler(None, 0)
    if len(rows) > MAX_ROWS:
        raise QueryError(f"more than {MAX_ROWS:,} rows")
    return [column[0] for column in cursor.description], rows


def query_in(answer: str) -> str:
    """What of a chat answer one would run: the SQL in its first code fence, else all of it."""
    fence = re.search(r"```(?:sql\w*)?\s*(.*?)\s*(?:```|$)", answer, re.DOTALL | re.IGNORECASE)
    return fence[1] if fence else answer.strip()


def runs(answer: str) -> bool:
    """Whether the answer is a query that runs, right or wrong."""
    return not observed(answer).startswith("error: ")


def observed(query: str, table: int = 0) -> str:
    """What a tool tells a model: ten rows of a table as JSON, [["Pune", 40.87]], or "error: " and the reason."""
    try:
        rows = run_query(query, databases()[table])
    except QueryError as error:
        return f"error: {error}"
    shown = [[round(v, 2) if isinstance(v, float) else v for v in row] for row in rows[:10]]
    return json.dumps(shown, default=repr)  # of a blob


def _arranged(rows: list[tuple], gold: str) -> list[tuple]:
    """Rows, floats with 4 places: as they come if the gold query says ORDER BY, else NULL, numbers, texts, blobs."""
    rows = [tuple(round(v, 4) if isinstance(v, float) else v for v in row) for row in rows]
    if re.search(r"\border\s+by\b", gold, re.IGNORECASE):
        return rows
    rank = {type(None): 0, int: 1, float: 1, str: 2, bytes: 3}
    return sorted(rows, key=lambda row: [(rank[type(v)], 0 if v is None else v) for v in row])


@lru_cache(maxsize=50_000)
def _wanted(gold: str, number: int) -> list[tuple]:
    """The gold query's rows on one table, ready to compare."""
    return _arranged(run_query(gold, databases()[number]), gold)


def is_right(answer: str, gold: str) -> bool:
    """Whether the answer is bare SQL that returns the rows of the gold query on all ten tables.

    Duplicates count, and the order of rows if the gold query says ORDER BY. Up to four columns may be swapped, the same
    way on each table. Floats are compared to 4 places; 3 equals 3.0. An answer that needs more than MAX_SECONDS for the
    ten tables together is wrong. Raises QueryError if the gold query does not run.
    """
    left = MAX_SECONDS
    swaps = None  # of the answer's columns, that fit so far
    for number, db in enumerate(databases()):
        wanted = _wanted(gold, number)
        start = time.monotonic()
        try:
            got = run_query(answer, db, start + left)
        except QueryError:
            return False
        left -= time.monotonic() - start
        if list(map(len, got)) != list(map(len, wanted)):
            return False
        if got:
            columns = range(len(got[0]))
            swaps = swaps or (list(itertools.permutations(columns)) if len(columns) <= 4 else [columns])
            swaps = [swap for swap in swaps if _arranged([tuple(row[i] for i in swap) for row in got], gold) == wanted]
            if not swaps:
                return False
    return True


def scorer(answer: str, row: dict) -> bool:
    """`is_right` for a row of data/ask, whose completion is the gold query."""
    return is_right(answer, row["completion"][0]["content"])


def show_table(sql: str, gold: str | None = None):
    """The query with its rows on the first table in HTML, marked right or wrong if a gold query is given."""
    import pandas as pd
    from IPython.display import HTML

    right = gold is not None and is_right(sql, gold)
    verdict = "" if gold is None else "✓ right on all ten tables" if right else "✗ wrong"
    colour = "#009E73" if right else "#D55E00" if gold is not None else "#7F7F7F"
    try:
        columns, rows = _run(sql, databases()[0])
    except QueryError as error:
        below, colour = html.escape(f"does not run: {error}"), "#D55E00"
    else:
        shown = pd.DataFrame(rows[:8], columns=columns, dtype=object).fillna("NULL")
        below = shown.to_html(index=False, border=0, justify="left", float_format="{:,.2f}".format)
        below += f"and {len(rows) - 8} more" if len(rows) > 8 else "" if rows else "no rows"
        if verdict == "✗ wrong" and _arranged(rows, gold) == _wanted(gold, 0):
            verdict = "✗ wrong: the same rows here, but not on all ten tables"
    return HTML(
        f"<div style='border-left:4px solid {colour};padding:2px 12px;margin:6px 0'>"
        f"<code style='background:none;color:inherit'>{html.escape(sql)}</code><br>{below} "
        f"<b style='color:{colour}'>{verdict}</b></div>"
    )
