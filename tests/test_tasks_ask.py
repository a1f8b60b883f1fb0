"""ftlab.tasks.ask: queries against a plain Python filter over the CSV files; right, wrong, refused and harmless."""

import csv
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import script

from ftlab.rewards import TimeUp, in_time
from ftlab.tasks import ask
from ftlab.tasks.ask import QueryError, databases, is_right, observed, run_query, runs, scorer, show_table

FOLDER = Path(__file__).parents[1] / "data" / "ask"
INTS = {"id", "month", "total", "tip", "minutes", "stars"}

# --- The oracle: the CSV files, and Python's own filter, groups and sums ----------------------------------------------


def read(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {name: (int(text) if name in INTS else text) if text else None for name, text in line.items()}
            for line in csv.DictReader(file)
        ]


TABLES = [read(FOLDER / "databases" / f"orders_{number}.csv") for number in range(10)]
COMPARE = {
    "=": lambda a, b: a == b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
}
FUNCTION = {
    "AVG": lambda values: sum(values) / len(values) if values else None,
    "SUM": lambda values: sum(values) if values else None,
    "MIN": lambda values: min(values, default=None),
    "MAX": lambda values: max(values, default=None),
}
GROUPS = ["city", "plan", "cuisine", "status", "payment", "month"]
NUMBERS = ["total", "tip", "minutes", "stars"]
values_of = {name: sorted({order[name] for order in TABLES[0]}) for name in GROUPS}


@st.composite
def conditions(draw):
    """Up to three conditions: (SQL, what Python says of an order)."""
    drawn = []
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            name, sign = draw(st.sampled_from(GROUPS)), draw(st.sampled_from(["=", "<>"]))
            value = draw(st.sampled_from(values_of[name]))
        else:
            name, sign = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(["<", ">", "<=", ">=", "="]))
            value = draw(st.sampled_from({"total": [300, 1000, 1337], "tip": [0, 10, 50], "minutes": [20, 45],
                                          "stars": [2, 4, None]}[name]))  # fmt: skip
        drawn.append((name, sign, value))
    return drawn


def where(drawn) -> str:
    parts = [f"{n} IS NULL" if v is None else f"{n}{s}{v!r}" for n, s, v in drawn]
    return " WHERE " + " AND ".join(parts) if parts else ""


def kept(orders, drawn) -> list[dict]:
    def holds(order, name, sign, value):
        if value is None:
            return order[name] is None
        return order[name] is not None and COMPARE[sign](order[name], value)

    return [order for order in orders if all(holds(order, *condition) for condition in drawn)]


def measured(orders, function, name):
    return FUNCTION[function]([order[name] for order in orders if order[name] is not None])


def same(got: list[tuple], want: list[tuple]) -> bool:
    def plain(rows):
        return Counter(
            tuple(None if v is None else v if isinstance(v, str) else round(float(v), 4) for v in r) for r in rows
        )

    return plain(got) == plain(want)


tables = st.integers(0, 9)
functions = st.sampled_from(sorted(FUNCTION))


@settings(max_examples=80, deadline=None)
@given(conditions(), tables, functions, st.sampled_from(NUMBERS), st.sampled_from(GROUPS))
def test_counts_measures_and_groups_are_those_of_a_plain_filter(drawn, number, function, name, group):
    db, orders = databases()[number], kept(TABLES[number], drawn)
    assert run_query(f"SELECT COUNT(*) FROM orders{where(drawn)}", db) == [(len(orders),)]
    got = run_query(f"SELECT {function}({name}) FROM orders{where(drawn)}", db)
    assert same(got, [(measured(orders, function, name),)])
    by = defaultdict(list)
    for order in orders:
        by[order[group]].append(order)
    got = run_query(f"SELECT {group}, COUNT(*), {function}({name}) FROM orders{where(drawn)} GROUP BY {group}", db)
    assert same(got, [(value, len(each), measured(each, function, name)) for value, each in by.items()])


@settings(max_examples=80, deadline=None)
@given(conditions(), tables, st.sampled_from(["total", "tip", "minutes"]), st.booleans(), st.integers(1, 7))
def test_top_orders_and_top_groups_are_those_of_a_plain_sort(drawn, number, name, down, k):
    """Where values tie, any of the tied orders may stand there: the values decide."""
    db, orders = databases()[number], kept(TABLES[number], drawn)
    sql = f" FROM orders{where(drawn)}"
    got = run_query(f"SELECT id{sql} ORDER BY {name}{' DESC' * down} LIMIT {k}", db)
    value_of = {order["id"]: order[name] for order in orders}
    assert [value_of[i] for (i,) in got] == sorted(value_of.values(), reverse=down)[:k]
    count = Counter(order["city"] for order in orders)
    got = run_query(f"SELECT city{sql} GROUP BY city ORDER BY COUNT(*){' DESC' * down} LIMIT {k}", db)
    assert [count[city] for (city,) in got] == sorted(count.values(), reverse=down)[:k]


@settings(max_examples=20, deadline=None)
@given(conditions(), conditions(), st.sampled_from(["total", "tip", "minutes"]))
def test_an_answer_is_right_if_and_only_if_a_plain_filter_agrees_on_all_ten_tables(one, two, name):
    for columns, rows in (
        ("COUNT(*)", lambda orders: [(len(orders),)]),
        (f"id, {name}", lambda orders: [(order["id"], order[name]) for order in orders]),
    ):
        agree = all(same(rows(kept(orders, one)), rows(kept(orders, two))) for orders in TABLES)
        assert (
            is_right(f"SELECT {columns} FROM orders{where(one)}", f"SELECT {columns} FROM orders{where(two)}") == agree
        )


# --- Right and wrong --------------------------------------------------------------------------------------------------

LATE = "SELECT city, COUNT(*) FROM orders WHERE minutes>45 AND plan='gold' GROUP BY city"
SLOWEST = "SELECT city FROM orders GROUP BY city ORDER BY AVG(minutes) DESC LIMIT 3"
MEAN = "SELECT AVG(total) FROM orders WHERE payment='upi'"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("select city, count(*) from orders where plan = 'gold' and minutes >= 46 group by 1", LATE),
        ("SELECT COUNT(*), city FROM orders WHERE minutes>45 AND plan='gold' GROUP BY city", LATE),
        ("SELECT city, SUM(1.0) FROM orders WHERE minutes>45 AND plan='gold' GROUP BY city ORDER BY 2", LATE),
        (LATE + ";", LATE),
        ("\n " + LATE + " ; \n", LATE),
        ("SELECT SUM(total)*1.0/COUNT(*) FROM orders WHERE payment LIKE 'UPI'", MEAN),
        ("SELECT AVG(total)+1e-9 FROM orders WHERE payment='upi'", MEAN),
        ("SELECT ROUND(AVG(total), 4) FROM orders WHERE payment='upi'", MEAN),
        ("SELECT city FROM (SELECT city, AVG(minutes) m FROM orders GROUP BY city) ORDER BY m DESC LIMIT 3", SLOWEST),
        ("SELECT id FROM orders WHERE total<0", "SELECT id FROM orders WHERE total>9999"),
        ("SELECT city, plan, day, id FROM orders", "SELECT id, day, plan, city FROM orders"),  # four columns
    ],
)
def test_other_words_for_the_same_rows_are_right(answer, gold):
    assert is_right(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("SELECT city FROM orders WHERE minutes>45 AND plan='gold' GROUP BY city", LATE),
        ("SELECT city, COUNT(*), 1 FROM orders WHERE minutes>45 AND plan='gold' GROUP BY city", LATE),
        ("SELECT DISTINCT stars FROM orders WHERE stars=5", "SELECT stars FROM orders WHERE stars=5"),  # duplicates
        (SLOWEST.replace("DESC LIMIT", "LIMIT"), SLOWEST),
        (
            f"SELECT city FROM ({SLOWEST}) ORDER BY city DESC",
            SLOWEST,
        ),
        (f"SELECT city FROM ({SLOWEST}) ORDER BY city DESC", SLOWEST.replace("ORDER BY", "order  by")),
        ("SELECT city, plan, day, id, tip FROM orders", "SELECT tip, id, day, plan, city FROM orders"),  # five columns
        ("SELECT ROUND(AVG(total), 3) FROM orders", "SELECT AVG(total) FROM orders"),
        ("SELECT CAST(COUNT(*) AS TEXT) FROM orders", "SELECT COUNT(*) FROM orders"),
        ("SELECT NULL FROM orders", "SELECT 0 FROM orders"),
        ("SELECT SUM(tip) FROM orders WHERE id<0", "SELECT COUNT(*) FROM orders WHERE id<0"),  # NULL is not 0
        ("SELECT id FROM orders WHERE id<0", "SELECT COUNT(*) FROM orders WHERE id<0"),  # no row is not a row with 0
        (f"```sql\n{MEAN}\n```", MEAN),
        (f"Here you go: {MEAN}", MEAN),
        (f"{MEAN} AND", MEAN),
        (f"{MEAN}; {MEAN}", MEAN),
        ("", MEAN),
    ],
)
def test_other_rows_are_wrong(answer, gold):
    assert not is_right(answer, gold)
    assert is_right(gold, gold)


def test_a_swap_of_columns_must_be_the_same_on_each_table():
    """In table 0 with 640 orders the answer's columns come in the gold's order, in every other table swapped."""
    gold = "SELECT COUNT(*), MAX(id) FROM orders"
    twisted = "SELECT iif(COUNT(*)=640, COUNT(*), MAX(id)), iif(COUNT(*)=640, MAX(id), COUNT(*)) FROM orders"
    assert is_right("SELECT MAX(id), COUNT(*) FROM orders", gold)
    assert not is_right(twisted, gold)


def test_plain_functions_may_be_called():
    calls = "total(tip) abs(tip) round(tip) coalesce(stars,0) ifnull(stars,0) nullif(tip,0) iif(tip,1,0) length(city) "
    calls += "lower(city) upper(city) trim(city) ltrim(city) rtrim(city) substr(day,6,2) substring(day,6) instr(day,6)"
    assert [call for call in calls.split() if not runs(f"SELECT {call} FROM orders LIMIT 5")] == []


@pytest.mark.parametrize("answer", ["SELECT {}", "SELECT COUNT(*) FROM orders WHERE total>1000{}"])
def test_what_holds_on_some_tables_only_is_wrong(answer):
    """A constant is right on table 0, `>` for `>=` where no such order costs exactly 1,000."""
    exact = [{order["city"] for order in orders if order["total"] == 1000 and order["month"] == 3} for orders in TABLES]
    city = next(c for c in values_of["city"] if 0 < sum(c in cities for cities in exact) < 10)
    more = f" AND city='{city}' AND month=3"
    gold = f"SELECT COUNT(*) FROM orders WHERE total>=1000{more}"
    wanted = [run_query(gold, db) for db in databases()]
    answer = answer.format(more if "total" in answer else wanted[0][0][0])
    agree = [run_query(answer, db) == rows for db, rows in zip(databases(), wanted, strict=True)]
    assert any(agree) and not all(agree)
    assert not is_right(answer, gold)


def test_a_dropped_condition_or_another_value_almost_never_passes():
    """Each gold query of the hand test, wrong in one place. At most one in a hundred may pass on all ten tables."""
    tried = passed = 0
    for row in map(json.loads, (FOLDER / "hand_test.jsonl").read_text(encoding="utf-8").splitlines()):
        gold = row["completion"][0]["content"]
        wrong = set()
        for value in re.findall(r"'(\w+)'", gold):
            others = next(values for values in values_of.values() if value in values)
            wrong |= {gold.replace(f"'{value}'", f"'{other}'") for other in others if other != value}
        if found := re.search(r" WHERE (.*?)(?= GROUP| ORDER|$)", gold):
            parts = found[1].split(" AND ")
            for i in range(len(parts)):
                rest = " AND ".join(parts[:i] + parts[i + 1 :])
                wrong.add(gold.replace(found[0], f" WHERE {rest}" if rest else ""))
        tried += len(wrong)
        passed += sum(is_right(answer, gold) for answer in wrong)
    assert tried > 500
    assert passed <= tried / 100


def test_a_broken_gold_query_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(QueryError, match="no such column: plann"):
        is_right("SELECT 1", "SELECT plann FROM orders")


def test_every_gold_query_runs_on_the_largest_table_and_those_of_the_hand_test_are_right_on_all_ten():
    largest = max(range(10), key=lambda number: len(TABLES[number]))
    for name in ("train", "more", "validation", "test", "hand_test"):
        rows = [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert rows and all(row["prompt"][0] == {"role": "system", "content": ask.SYSTEM} for row in rows)
        for gold, row in {row["completion"][0]["content"]: row for row in rows}.items():
            assert scorer(gold, row) if name == "hand_test" else run_query(gold, databases()[largest]) is not None


# --- Harmless ---------------------------------------------------------------------------------------------------------

NESTED = "SELECT total x FROM orders"
for _ in range(12):
    NESTED = f"SELECT x||x x FROM ({NESTED})"
ATTACKS = {
    "": "not a query",
    "   \n": "not a query",
    "SELECT": "incomplete input",
    "DROP TABLE orders": "not a query",
    "DELETE FROM orders": "not a query",
    "UPDATE orders SET tip=0": "not a query",
    "INSERT INTO orders(id) VALUES (1)": "not a query",
    "CREATE TABLE x AS SELECT * FROM orders": "not a query",
    "ATTACH 'stolen.db' AS x": "not a query",
    "PRAGMA query_only=OFF": "not a query",
    "VACUUM INTO 'stolen.db'": "not a query",
    "EXPLAIN SELECT 1": "not a query",
    "/* hi */ DROP TABLE orders": "not a query",
    "ＳＥＬＥＣＴ 1": "not a query",
    "SELECTED": "not a query",
    "SELECT 1; DROP TABLE orders": "one statement at a time",
    "SELECT 1; -- \nDROP TABLE orders": "one statement at a time",
    "SELECT 1 INTO x": "syntax error",
    "SELECT * FROM sqlite_master": "prohibited",
    "SELECT * FROM pragma_table_info('orders')": "prohibited",
    "SELECT * FROM json_each('[1]')": "prohibited",
    "SELECT * FROM customers": "no such table: customers",
    "SELECT plann FROM orders": "no such column: plann",
    "SELECT load_extension('x')": "load_extension",
    "SELECT randomblob(1000000000)": "randomblob",
    "SELECT zeroblob(1000000000)": "zeroblob",
    "SELECT printf('%1000000000d', 1)": "printf",
    "SELECT replace(city, 'a', 'b') FROM orders": "replace",
    "SELECT group_concat(city) FROM orders": "group_concat",
    "SELECT random()": "random",
    "SELECT date('now')": "date",
    "SELECT current_timestamp": "current_timestamp",
    "SELECT x FROM (WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM r) SELECT x FROM r)": "not authorized",
    "SELECT x FROM (WITH r(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM r) SELECT x FROM r)": "not authorized",
    "SELECT COUNT(*) FROM orders a, orders b, orders c, orders d, orders e": "more than 500,000 steps",
    "SELECT COUNT(*) FROM " + ", ".join(f"orders a{i}" for i in range(40)): "more than 500,000 steps",
    "SELECT a.id FROM orders a, orders b ORDER BY a.total+b.total": "more than 500,000 steps",
    "SELECT a.id FROM orders a, orders b": "more than 2,000 rows",
    "SELECT *, * FROM orders": "too many columns",
    "SELECT " + "+".join("1" * 200): "maximum depth",
    NESTED: "or 4 SELECTs",
    "SELECT "
    + "||".join(["'" + "y" * 90 + "'"] * 4)
    + "||a.x FROM (SELECT "
    + "||".join(["city"] * 5)
    + " x FROM orders) a": None,
    "SELECT x||x||x||x||x||x||x||x FROM (SELECT '" + "y" * 200 + "'||id x FROM orders)": "too big",
    "SELECT 1" + " " * 10**7: "too long",
    "SELECT " * 10**6: "too long",
    "a" * 10**7: "not a query",
    "SELECT '\0'": "null character",
    "SELECT\0 1": "null character",
    "SELECT '\ud800'": "surrogates",
    "SELECT ?": "bindings",
    "SELECT abs(-9223372036854775808)": "overflow",
    "SELECT COUNT(*) FROM orders WHERE '" + "a" * 300 + "' LIKE '" + "%a" * 20 + "%b'": None,
    "SELECT COUNT(*) FROM orders WHERE 'a' LIKE '" + "%a" * 40 + "'": "too complex",
}


@pytest.fixture(scope="module")
def before():
    return [run_query("SELECT * FROM orders", db) for db in databases()]


@pytest.mark.parametrize(
    ("sql", "reason"), ATTACKS.items(), ids=lambda value: None if value is None else value[:40] or "empty"
)
def test_an_attack_is_refused_with_its_reason_and_changes_nothing(sql, reason, before, tmp_path, monkeypatch):
    """Bounded by SQLite's own count of steps, so no clock is read here."""
    monkeypatch.chdir(tmp_path)
    db = databases()[2]
    if reason is None:  # costly to look at, but harmless
        run_query(sql, db)
    else:
        with pytest.raises(QueryError, match=reason) as caught:
            run_query(sql, db)
        assert len(str(caught.value)) < 400
        assert not runs(sql)
        assert not is_right(sql, "SELECT COUNT(*) FROM orders")
    assert [run_query("SELECT * FROM orders", each) for each in databases()] == before
    assert list(tmp_path.iterdir()) == []


WORDS = [
    *("SELECT", "COUNT(*)", "FROM", "orders", "WHERE", "(", ")", ",", "*", ";", "--", "'", '"', "city", "total"),
    *(">", "=", "45", "AND", "GROUP", "BY", "ORDER", "LIMIT", "NULL", "9e999", "-1", "x'00'"),
]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=15).map(" ".join), st.booleans())
def test_whatever_is_written_ends_in_a_verdict(answer, prefixed):
    answer = "SELECT " * prefixed + answer
    assert is_right(answer, "SELECT COUNT(*) FROM orders WHERE minutes>45") in (True, False)
    assert show_table(answer).data


def test_the_lock_holds_without_run_query_too():
    for sql in ("DROP TABLE orders", "DELETE FROM orders", "ATTACH ':memory:' AS x", "PRAGMA query_only=OFF"):
        with pytest.raises(ask.sqlite3.DatabaseError):
            databases()[0].execute(sql)


def test_a_query_that_was_stopped_does_not_spoil_the_next(before):
    db = databases()[2]
    for _ in range(3):
        with pytest.raises(QueryError):
            run_query("SELECT COUNT(*) FROM orders a, orders b, orders c", db)
        assert run_query("SELECT * FROM orders", db) == before[2]


# --- Seconds ----------------------------------------------------------------------------------------------------------

LONG = f"x||x||x||x||x x, y FROM (SELECT '{'b' * 150}'||substr(a.id, 9) x, '{'a' * 77}b'||substr(b.id, 9) y"
SLOW = f"SELECT COUNT(rtrim(x, y)) FROM (SELECT {LONG} FROM orders a, orders b) LIMIT 900), orders c"


def seconds_of(function, *arguments):
    """What the function returns or raises, and its seconds."""
    start = time.monotonic()
    try:
        found = function(*arguments)
    except (QueryError, TimeUp) as error:
        found = error
    return found, time.monotonic() - start


def test_an_endless_query_whose_steps_are_slow_ends_within_the_limit_and_the_next_one_runs():
    """500,000 steps of SLOW take 10 s. The clock only finds what hangs."""
    found, seconds = seconds_of(run_query, SLOW, databases()[2])
    assert "more than 2 s" in str(found) and seconds < ask.MAX_SECONDS + 1
    assert run_query("SELECT COUNT(*) FROM orders", databases()[2]) == [(len(TABLES[2]),)]


def test_in_a_thread_an_endless_answer_is_wrong_within_the_limit_for_all_ten_tables():
    with ThreadPoolExecutor(1) as pool:
        verdict, seconds = pool.submit(seconds_of, is_right, SLOW, MEAN).result()
        assert verdict is False and seconds < ask.MAX_SECONDS + 1
        assert pool.submit(is_right, MEAN, MEAN).result()


def test_the_ten_tables_share_one_limit(monkeypatch):
    """With a clock that moves by 0.1 s at each look, a table takes less than a second, and ten take more than two."""
    sql = "SELECT COUNT(*) FROM orders WHERE city LIKE '%u%' AND minutes>45"
    assert is_right(sql, sql)
    ticks = itertools.count()
    monkeypatch.setattr(ask.time, "monotonic", lambda: next(ticks) / 10)
    assert all(run_query(sql, db) for db in databases())
    assert not is_right(sql, sql)


def test_an_alarm_that_rings_within_a_query_is_not_taken_for_its_error(monkeypatch):
    """SQLite drops what is raised while it asks whether to stop."""
    monkeypatch.setattr(ask, "MAX_SECONDS", 60)
    found, seconds = seconds_of(in_time, TimeUp(0.2), run_query, SLOW, databases()[2])
    assert isinstance(found, TimeUp) and seconds < 1.2
    assert run_query("SELECT COUNT(*) FROM orders", databases()[2]) == [(len(TABLES[2]),)]


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_databases_are_loaded_once_in_each_thread():
    first = databases()
    assert all(a is b for a, b in zip(first, databases(), strict=True))
    seen = []

    def elsewhere():
        seen.extend([databases()[0] is first[0], is_right(MEAN, MEAN)])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_loads_its_own(monkeypatch):
    first = databases()
    monkeypatch.setattr(ask.os, "getpid", lambda: -1)
    assert databases()[0] is not first[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "databases", tmp_path / "databases")
    monkeypatch.setattr(ask, "FOLDER", tmp_path / "databases")
    ask.databases_of.cache_clear()
    yield tmp_path / "databases"
    ask.databases_of.cache_clear()


def test_a_file_with_other_columns_or_a_broken_line_is_refused(folder):
    names = ",".join(TABLES[0][0])
    for text in ("id,sum\n1,2\n", f"{names}\n1001,2026-01-01,1,Pune\n"):
        (folder / "orders_3.csv").write_text(text)
        with pytest.raises(ask.sqlite3.Error):
            databases()


def test_the_tables_are_made_again_byte_for_byte(tmp_path):
    script("data/ask/make_databases.py").write(tmp_path)
    committed = sorted((FOLDER / "databases").iterdir())
    assert [path.name for path in committed] == [f"orders_{number}.csv" for number in range(10)]
    for path in committed:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), (
            f"{path.name} is not what make_databases.py makes"
        )


@pytest.mark.parametrize("number", range(10))
def test_a_table_is_as_the_readme_says(number):
    orders = TABLES[number]
    n = len(orders)
    assert 350 <= n <= 1200
    assert [order["id"] for order in orders] == list(range(1001, 1001 + n))
    for order in orders:
        assert re.fullmatch(rf"2026-0{order['month']}-[0-3]\d", order["day"]) and 1 <= order["month"] <= 6
        assert 90 <= order["total"] <= 1600 and 0 <= order["tip"] <= 300 and 12 <= order["minutes"] <= 75
        assert order["stars"] is None or 1 <= order["stars"] <= 5
    assert {name: {order[name] for order in orders} for name in GROUPS} == {
        "city": {"Pune", "Delhi", "Mumbai", "Chennai", "Kochi", "Jaipur"},
        "plan": {"free", "gold", "office"},
        "cuisine": {"thai", "pizza", "biryani", "dosa", "burger", "sushi", "chaat"},
        "status": {"done", "cancelled", "refunded"},
        "payment": {"card", "cash", "upi"},
        "month": {1, 2, 3, 4, 5, 6},
    }
    assert Counter(order["status"] for order in orders).most_common(1)[0][0] == "done"
    assert 0.25 < sum(order["tip"] == 0 for order in orders) / n < 0.75
    assert 0.1 < sum(order["stars"] is None for order in orders) / n < 0.4
    assert 0.15 < sum(order["total"] >= 1000 for order in orders) / n < 0.5
    uneven = Counter(order["total"] for order in orders if order["total"] % 50)
    assert max(uneven.values()) == 1
    assert sum(order["total"] == 1000 for order in orders) >= 3 and sum(order["minutes"] == 45 for order in orders) >= 5


def test_the_tables_answer_alike_on_nothing_that_is_asked_often():
    for sql in (
        "SELECT city FROM orders GROUP BY city ORDER BY COUNT(*) DESC LIMIT 1",
        "SELECT plan FROM orders WHERE status='done' GROUP BY plan ORDER BY SUM(total) DESC LIMIT 1",
        "SELECT cuisine FROM orders GROUP BY cuisine ORDER BY AVG(stars) DESC LIMIT 1",
        "SELECT month FROM orders WHERE minutes>45 GROUP BY month ORDER BY COUNT(*) DESC LIMIT 1",
    ):
        assert len({tuple(run_query(sql, db)) for db in databases()}) >= 3


# --- For a tool call -------------------------------------------------------------------------------------------------


def test_what_a_tool_says_is_json_with_few_rows_and_short_floats_or_the_reason():
    late = [sum(o["minutes"] > 45 for o in table) for table in TABLES]
    asked = "SELECT COUNT(*) FROM orders WHERE minutes>45"
    assert [json.loads(observed(asked, i)) for i in range(len(TABLES))] == [[[n]] for n in late]
    ((city, mean), *_) = json.loads(observed("SELECT city, AVG(minutes) FROM orders GROUP BY city ORDER BY city"))
    waits = [o["minutes"] for o in TABLES[0] if o["city"] == city]
    assert city == min(o["city"] for o in TABLES[0]) and mean == round(sum(waits) / len(waits), 2)
    assert json.loads(observed("SELECT id FROM orders ORDER BY id")) == [[o["id"]] for o in TABLES[0][:10]]
    assert observed("SELECT citty FROM orders") == "error: no such column: citty"
    assert observed("DROP TABLE orders").startswith("error: not a query")
    assert json.loads(observed("SELECT x'00'")) == [[repr(b"\0")]]


# --- The notebook's page ----------------------------------------------------------------------------------------------


def test_show_table_shows_the_rows_and_how_many_more():
    table = show_table("SELECT id, stars FROM orders WHERE stars IS NULL AND total<600 ORDER BY id")
    want = [(o["id"], o["stars"]) for o in TABLES[0] if o["stars"] is None and o["total"] < 600]
    page = table.data
    assert "<th>id</th>" in page and "<th>stars</th>" in page
    assert all(str(i) in page for i, _ in want[:8]) and str(want[8][0]) not in page
    assert f"and {len(want) - 8} more" in page and "NULL" in page and "right" not in page and "wrong" not in page


def test_show_table_says_right_wrong_and_why_it_does_not_run():
    right, wrong, broken = (show_table(sql, LATE).data for sql in (LATE, MEAN, "SELECT plann FROM orders"))
    assert "✓" in right and "#009E73" in right and "#D55E00" not in right
    assert "✗" in wrong and "#D55E00" in wrong and "#009E73" not in wrong
    assert "no such column: plann" in broken and "#D55E00" in broken and "✗" in broken
    assert "no rows" in show_table("SELECT id FROM orders WHERE id<0").data
    assert "1,234.50" in show_table("SELECT 1234.5, NULL").data


def test_show_table_says_that_a_wrong_query_is_right_on_this_table():
    count = len(kept(TABLES[0], [("city", "=", "Pune")]))
    page = show_table(f"SELECT {count}", "SELECT COUNT(*) FROM orders WHERE city='Pune'").data
    assert "✗" in page and "not on all ten" in page


def test_show_table_escapes_what_a_model_writes():
    page = show_table("SELECT '<script>alert(1)</script>' \"<b>\"").data
    assert "<script>" not in page and "<b>'" not in page and "<th><b>" not in page
    assert "<img" not in show_table("<img src=x onerror=alert(1)>").data


# --- A query in a chat answer -----------------------------------------------------------------------------------------

SQL = "SELECT city\nFROM orders\nWHERE tip>0;"


@pytest.mark.parametrize(
    "answer",
    [
        SQL,
        f"  {SQL}\n",
        f"Here it is:\n\n```sql\n{SQL}\n```\n\nIt lists cities.",
        f"```\n{SQL}\n```",
        f"```SQL\n{SQL}\n```\nor\n```sql\nSELECT 1\n```",
        f"```sqlite\n{SQL}\n```",
        f"Cut off:\n```sql\n{SQL}",
    ],
)
def test_the_query_in_an_answer_is_what_stands_in_its_first_fence_or_all_of_it(answer):
    assert ask.query_in(answer) == SQL


def test_the_columns_are_those_of_the_tables():
    header = (FOLDER / "databases" / "orders_0.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.split(",") == ask.COLUMNS
