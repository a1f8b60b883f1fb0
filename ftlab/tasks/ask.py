"""`ask`: a question in English -> one SQLite query, which is right if running it returns the rows of the gold query.

    is_right("SELECT COUNT(*) FROM orders WHERE minutes>45", gold)     # on ten differently filled tables

The check is a reward for reinforcement learning too, so whatever a model writes must be harmless, and an answer must
always get the same verdict: the tables are read-only, only SELECTs of `orders` and functions without a clock, chance or
long strings are allowed, and steps, rows and lengths have limits.
"""

import csv
import itertools
import os
import re
import sqlite3
import threading
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

MAX_CHARS = 500  # the longest query in data/ask has less than half
MAX_SELECTS = 4
MAX_STEPS = 500_000  # of SQLite's virtual machine; a GROUP BY over 1,200 orders takes about 25,000
MAX_ROWS = 2_000
FUNCTIONS = frozenset(
    ("count", "sum", "total", "avg", "min", "max", "abs", "round", "coalesce", "ifnull", "nullif", "iif")
    + ("length", "lower", "upper", "trim", "ltrim", "rtrim", "substr", "substring", "instr", "like")
)
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000,  # bytes of a string or a row
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4 * MAX_CHARS,
    sqlite3.SQLITE_LIMIT_COLUMN: 20,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: MAX_SELECTS,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 10_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 8,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
}


class QueryError(ValueError):
    """Why a query does not run, in words for the person who wrote it."""


def _may(action: int, one: str | None, two: str | None, *_) -> int:
    """SQLite's authorizer: SELECT, the columns of `orders` and FUNCTIONS; all else is refused when it is compiled."""
    allowed = (
        action == sqlite3.SQLITE_SELECT
        or (action == sqlite3.SQLITE_READ and one == "orders")
        or (action == sqlite3.SQLITE_FUNCTION and two.lower() in FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _load(path: Path) -> sqlite3.Connection:
    """One CSV as a locked in-memory database."""
    remedy = "run `python data/ask/make_databases.py`"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        if header != [name for name, _ in COLUMNS]:
            raise ValueError(f"its first line is {header}")
        rows = [tuple(_value(text, kind) for text, (_, kind) in zip(line, COLUMNS, strict=True)) for line in lines]
        if not rows:
            raise ValueError("it has no orders")
    except FileNotFoundError:
        raise FileNotFoundError(f"no table of orders at {path}: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no table of orders ({error}); wanted {SCHEMA}: {remedy}") from None
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute(f"CREATE TABLE {SCHEMA}")
    db.execute("BEGIN")
    db.executemany(f"INSERT INTO orders VALUES ({','.join('?' * len(COLUMNS))})", rows)
    db.execute("COMMIT")
    db.execute("PRAGMA temp_store=MEMORY")
    db.execute("PRAGMA query_only=ON")
    for limit, value in LIMITS.items():
        db.setlimit(limit, value)
    db.set_authorizer(_may)
    return db


def _value(text: str, kind: str) -> int | str | None:
    return None if text == "" else int(text) if kind == "INT" else text


_here = threading.local()


def databases() -> list[sqlite3.Connection]:
    """The ten tables of orders as read-only in-memory SQLite databases, loaded once in each thread of each process.

    Raises FileNotFoundError if a CSV is missing and ValueError if it is no table of orders.
    """
    if getattr(_here, "pid", None) != os.getpid():
        _here.dbs, _here.pid = [_load(FOLDER / name) for name in NAMES], os.getpid()
    return list(_here.dbs)


def _run(sql: str, db: sqlite3.Connection) -> tuple[list[str], list[tuple]]:
    """Column names and rows of a query; see `run_query`."""
    if not re.match(r"\s*select\b", sql, re.IGNORECASE):
        raise QueryError(f"not a query: it starts with {sql[:20]!r}, not with SELECT" if sql.strip() else "no query")
    if len(sql) > MAX_CHARS:
        raise QueryError(f"too long: {len(sql):,} characters, at most {MAX_CHARS} are read")
    if len(re.findall(r"\bselect\b", sql, re.IGNORECASE)) > MAX_SELECTS:
        raise QueryError(f"too many SELECTs, at most {MAX_SELECTS} are run")
    thousands = itertools.count(1)
    db.set_progress_handler(lambda: next(thousands) * 1_000 > MAX_STEPS, 1_000)
    try:
        cursor = db.execute(sql)
        rows = cursor.fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError) as error:
        raise QueryError(_in_words(str(error))) from None
    finally:
        db.set_progress_handler(None, 0)
    if len(rows) > MAX_ROWS:
        raise QueryError(f"more than {MAX_ROWS:,} rows")
    return [column[0] for column in cursor.description], rows


def _in_words(error: str) -> str:
    if error == "interrupted":
        return f"takes more than {MAX_STEPS:,} steps"
    if "not authorized" in error or "prohibited" in error:
        return f"not allowed, only the table orders may be read and only with plain functions ({error})"
    return error


def run_query(sql: str, db: sqlite3.Connection) -> list[tuple]:
    """The rows that one SELECT returns on one of `databases()`.

    Raises QueryError with the reason, if the text is not exactly one SELECT of the table orders ("not a query: ...",
    "no such column: plann") or breaks a limit (MAX_CHARS, MAX_SELECTS, MAX_STEPS, MAX_ROWS).
    """
    return _run(sql, db)[1]


def _plain(rows: list[tuple]) -> list[tuple]:
    """Rows with floats rounded to 4 places; 3 and 3.0 are equal in Python as they are."""
    return [tuple(round(v, 4) if isinstance(v, float) else v for v in row) for row in rows]


def _sorted(rows: list[tuple]) -> list[tuple]:
    """Rows in one fixed order: NULL, numbers, texts, blobs."""
    rank = {type(None): 0, int: 1, float: 1, str: 2, bytes: 3}
    return sorted(rows, key=lambda row: [(rank[type(v)], 0 if v is None else v) for v in row])


@lru_cache(maxsize=50_000)
def _gold(gold: str, number: int) -> tuple[tuple, ...]:
    """The rows of a gold query on one table, sorted unless their order counts."""
    try:
        rows = _plain(run_query(gold, databases()[number]))
    except QueryError as error:
        raise ValueError(f"the gold query does not run, its row in the data is broken: {gold!r}: {error}") from None
    return tuple(rows if _ordered(gold) else _sorted(rows))


def _ordered(gold: str) -> bool:
    return re.search(r"\border\s+by\b", gold, re.IGNORECASE) is not None


def is_right(answer: str, gold: str) -> bool:
    """Whether the answer returns the rows of the gold query on all ten tables.

    Duplicates count. The order of rows counts only if the gold query says ORDER BY. Columns may be swapped, the same
    way on each table (beyond four columns they may not). Floats are compared after rounding to 4 places, and 3 equals 3.0.
    A semicolon at the end is fine, a code fence is not: bare SQL is the format. An answer that does not run is wrong.

    Raises ValueError if the gold query itself does not run.
    """
    swaps = None
    for number, db in enumerate(databases()):
        want = _gold(gold, number)
        try:
            got = _plain(run_query(answer, db))
        except QueryError:
            return False
        if len(got) != len(want) or (want and len(got[0]) != len(want[0])):
            return False
        if not want:
            continue
        if swaps is None:
            width = range(len(want[0]))
            swaps = list(itertools.permutations(width)) if len(width) <= 4 else [tuple(width)]
        arrange = list if _ordered(gold) else _sorted
        swaps = [s for s in swaps if tuple(arrange([tuple(row[i] for i in s) for row in got])) == want]
        if not swaps:
            return False
    return True


def runs(answer: str) -> bool:
    """Whether the answer is a query that runs, right or wrong."""
    try:
        run_query(answer, databases()[0])
    except QueryError:
        return False
    return True


def scorer(answer: str, row: dict) -> bool:
    """`is_right` for a row of data/ask, whose completion is the gold query."""
    return is_right(answer, row["completion"][0]["content"])
