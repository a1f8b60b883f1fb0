"""`ask`: a question in English -> one SQLite query, which is right if it returns the rows of the gold query.

    is_right("SELECT COUNT(*) FROM orders WHERE minutes>45", gold)     # on ten differently filled tables

The check is a reward for reinforcement learning too. So whatever a model writes must be harmless, and one answer must
always get one verdict: the tables are read-only; a query may read `orders` and call functions that know no clock and no
chance and build no long strings; its steps, rows and lengths have limits. Tests: tests/test_tasks_ask.py.
"""

import csv
import html
import itertools
import json
import os
import re
import sqlite3
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ftlab.paths import DATA

SYSTEM = "Write one SQLite query."
FOLDER = DATA / "ask" / "databases"
NAMES = [f"orders_{number}.csv" for number in range(10)]
SCHEMA = (
    "orders(id INT, day TEXT, month INT, city TEXT, plan TEXT, cuisine TEXT, status TEXT, payment TEXT, "
    "total INT, tip INT, minutes INT, stars INT)"
)
COLUMNS = re.findall(r"(\w+) (INT|TEXT)", SCHEMA)

MAX_CHARS, MAX_SELECTS, MAX_ROWS = 500, 4, 2_000
MAX_STEPS = 500_000  # of SQLite's virtual machine; GROUP BY over 1,200 orders takes about 25,000
FUNCTIONS = [
    *("count", "sum", "total", "avg", "min", "max", "abs", "round", "coalesce", "ifnull", "nullif", "iif"),
    *("length", "lower", "upper", "trim", "ltrim", "rtrim", "substr", "substring", "instr", "like"),
]
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000,  # bytes of a string or a row
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4 * MAX_CHARS,
    sqlite3.SQLITE_LIMIT_COLUMN: 20,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
}
RIGHT, WRONG = "✓ right on all ten tables", "✗ wrong"
SHOWN = 8
MAX_SEEN = 10


class QueryError(ValueError):
    """Why a query does not run, in words for the person who wrote it."""


def _may(action: int, one: str | None, two: str | None, *_) -> int:
    """SQLite's authorizer, asked when a query is compiled: SELECT, the columns of `orders`, FUNCTIONS, nothing else."""
    allowed = (
        action == sqlite3.SQLITE_SELECT
        or (action == sqlite3.SQLITE_READ and one == "orders")
        or (action == sqlite3.SQLITE_FUNCTION and two.lower() in FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _load(path: Path) -> sqlite3.Connection:
    """One CSV as a locked in-memory database. An empty field is NULL; SQLite makes 45 of "45" in an INT column."""
    header, *lines = csv.reader(path.read_text(encoding="utf-8").splitlines())
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute(f"CREATE TABLE {SCHEMA}")
    insert = f"INSERT INTO orders({','.join(header)}) VALUES ({','.join('?' * len(header))})"
    db.executemany(insert, [[text or None for text in line] for line in lines])
    db.execute("PRAGMA temp_store=MEMORY")
    db.execute("PRAGMA query_only=ON")
    for limit, value in LIMITS.items():
        db.setlimit(limit, value)
    db.set_authorizer(_may)
    return db


_here = threading.local()


def databases() -> list[sqlite3.Connection]:
    """The ten tables of orders as read-only in-memory SQLite databases, loaded once in each thread of each process."""
    if getattr(_here, "pid", None) != os.getpid():  # SQLite's connections must not be used after a fork
        _here.dbs, _here.pid = [_load(FOLDER / name) for name in NAMES], os.getpid()
    return list(_here.dbs)


def run_query(sql: str, db: sqlite3.Connection) -> list[tuple]:
    """The rows that one SELECT returns on one of `databases()`; raises QueryError with the reason if it is refused."""
    return _run(sql, db)[1]


def _run(sql: str, db: sqlite3.Connection) -> tuple[list[str], list[tuple]]:
    """The names of the columns, and the rows of exactly one SELECT of the table orders, within all limits."""
    if not re.match(r"\s*select\b", sql, re.IGNORECASE):
        raise QueryError(f"not a query: wanted SELECT ..., got {sql[:20]!r}")
    if len(sql) > MAX_CHARS:
        raise QueryError(f"too long: {len(sql):,} characters, at most {MAX_CHARS} are read")
    if len(re.findall(r"\bselect\b", sql, re.IGNORECASE)) > MAX_SELECTS:
        raise QueryError(f"more than {MAX_SELECTS} SELECTs")
    thousands = itertools.count(1)
    db.set_progress_handler(lambda: next(thousands) * 1_000 > MAX_STEPS, 1_000)
    try:
        cursor = db.execute(sql)
        rows = cursor.fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
        reason = str(error)
        if reason == "interrupted":
            reason = f"more than {MAX_STEPS:,} steps: it joins or loops over too many orders"
        if "not authorized" in reason or "prohibited" in reason:
            reason += f": a query may read the table orders and call {', '.join(sorted(FUNCTIONS))}"
        raise QueryError(reason) from None
    finally:
        db.set_progress_handler(None, 0)
    if len(rows) > MAX_ROWS:
        raise QueryError(f"more than {MAX_ROWS:,} rows")
    return [column[0] for column in cursor.description], rows


def runs(answer: str) -> bool:
    """Whether the answer is a query that runs, right or wrong."""
    try:
        return run_query(answer, databases()[0]) is not None
    except QueryError:
        return False


def observed(query: str, table: int = 0) -> str:
    """What a tool tells a model: the first MAX_SEEN rows on one of the ten tables as JSON, or "error: " and the reason.

    Floats have two places: [["Pune", 40.87], ["Delhi", 38.2]].
    """
    try:
        rows = run_query(query, databases()[table])
    except QueryError as error:
        return f"error: {error}"
    shown = [[round(v, 2) if isinstance(v, float) else v for v in row] for row in rows[:MAX_SEEN]]
    return json.dumps(shown, default=repr)  # of a blob


# --- Right or wrong ---------------------------------------------------------------------------------------------------


def _arranged(rows: list[tuple], gold: str) -> tuple[tuple, ...]:
    """Rows ready to compare: as they come if the gold query says ORDER BY, else NULL, numbers, texts, blobs."""
    if re.search(r"\border\s+by\b", gold, re.IGNORECASE):
        return tuple(rows)
    rank = {type(None): 0, int: 1, float: 1, str: 2, bytes: 3}
    return tuple(sorted(rows, key=lambda row: [(rank[type(v)], 0 if v is None else v) for v in row]))


def _rounded(rows: list[tuple]) -> list[tuple]:
    """Rows with floats rounded to 4 places."""
    return [tuple(round(v, 4) if isinstance(v, float) else v for v in row) for row in rows]


@lru_cache(maxsize=50_000)
def _wanted(gold: str, number: int) -> tuple[tuple, ...]:
    """The gold query's rows on one table, ready to compare."""
    try:
        return _arranged(_rounded(run_query(gold, databases()[number])), gold)
    except QueryError as error:
        raise ValueError(f"the gold query does not run, so its row of data is broken: {gold!r}: {error}") from None


def is_right(answer: str, gold: str) -> bool:
    """Whether the answer returns the rows of the gold query on all ten tables.

    Duplicates count. The order of rows counts only if the gold query says ORDER BY. Columns may be swapped, the same
    way on each table (beyond four columns they may not). Floats are compared after rounding to 4 places; 3 equals 3.0.
    A semicolon at the end is fine, a code fence is not: bare SQL is the format. An answer that does not run is wrong.

    Raises ValueError if the gold query itself does not run.
    """
    swaps = None  # of the answer's columns, that fit so far
    for number, db in enumerate(databases()):
        wanted = _wanted(gold, number)
        try:
            got = _rounded(run_query(answer, db))
        except QueryError:
            return False
        if len(got) != len(wanted) or (got and len(got[0]) != len(wanted[0])):
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


# --- For a notebook's page --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A query with its rows or the reason why it does not run; without a gold query the verdict is empty."""

    sql: str
    columns: list[str]
    rows: list[tuple] = field(repr=False)
    error: str
    verdict: str

    def _repr_html_(self) -> str:
        import pandas as pd

        shown = pd.DataFrame(self.rows[:SHOWN], columns=self.columns, dtype=object).fillna("NULL")
        table = shown.to_html(index=False, border=0, justify="left", float_format="{:,.2f}".format)
        more = f"and {len(self.rows) - SHOWN} more" if len(self.rows) > SHOWN else "" if self.rows else "no rows"
        below = html.escape(f"does not run: {self.error}") if self.error else table + more
        colour = "#009E73" if self.verdict == RIGHT else "#D55E00" if self.verdict or self.error else "#7F7F7F"
        return (
            f"<div style='border-left:4px solid {colour};padding:2px 12px;margin:6px 0'>"
            f"<code style='background:none;color:inherit'>{html.escape(self.sql)}</code><br>{below} "
            f"<b style='color:{colour}'>{html.escape(self.verdict)}</b></div>"
        )


def show_table(sql: str, gold: str | None = None) -> Table:
    """The query with its rows on the first table, marked right or wrong if a gold query is given."""
    columns, rows, error, verdict = [], [], "", ""
    try:
        columns, rows = _run(sql, databases()[0])
    except QueryError as reason:
        error = str(reason)
    if gold is not None:
        verdict = RIGHT if is_right(sql, gold) else WRONG
        if verdict == WRONG and not error and _arranged(_rounded(rows), gold) == _wanted(gold, 0):
            verdict = f"{WRONG}: the same rows here, but not on all ten tables"
    return Table(sql, columns, rows, error, verdict)
