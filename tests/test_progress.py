"""ftlab.classroom.progress: nothing acknowledged is lost, by a kill, by two writers, or by a broken file."""

import contextlib
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ftlab.classroom import progress
from ftlab.classroom.progress import ProgressError, record

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
ONE_FOLDER = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(said=st.text(alphabet=st.characters(), max_size=20))
@example(said="\ud83d")  # half an emoji, from a browser
@ONE_FOLDER
def test_what_is_recorded_is_what_is_read(said, tmp_path):
    file = tmp_path / "new" / "typed.sqlite"
    before = datetime.now(UTC)
    event = record("quiz", "q", 0.5, {"answer": said}, file=file)
    assert before <= event.at <= datetime.now(UTC) and (event.kind, event.item, event.score) == ("quiz", "q", 0.5)
    assert progress.events(file=file)[-1] == progress.events("quiz", file)[-1] == event
    assert progress.events("card", file) == []


ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(minutes * MINUTE))
TIMES = st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 2), timezones=ZONES)
TIMES |= st.sampled_from([NOON, NOON + timedelta(microseconds=1)])


@given(times=st.lists(TIMES, min_size=1, max_size=6))
@example(times=[NOON, NOON, NOON])
@ONE_FOLDER
def test_answers_come_in_the_order_of_their_times_then_as_they_were_recorded(times, tmp_path):
    """Whatever the zone. Out of order as by a notebook that waited; the last one counts by its time, not the best."""
    file = tmp_path / "times.sqlite"
    file.unlink(missing_ok=True)
    for number, at in enumerate(times):
        record("card", str(9 - number), 1, at=at, file=file)
        record("quiz", "q", number % 2, at=at, file=file)
    by_time = sorted(range(len(times)), key=lambda number: times[number])
    assert [event.item for event in progress.events("card", file)] == [str(9 - number) for number in by_time]
    last = progress.events("quiz", file)[-1]
    assert (last.score, last.at) == (by_time[-1] % 2, times[by_time[-1]])
    assert progress.states("quiz", ["q"], file) == {"q": "done" if by_time[-1] % 2 else "repeat"}


def test_a_look_makes_no_file(file):
    assert progress.events(file=file) == [] and progress.states("card", ["x"], file) == {"x": "open"}
    assert not file.exists()


def test_what_is_done_to_repeat_and_open_by_hand(file):
    """02/a: wrong, then right: done. 02/b: right, then half: repeat. 03/c: wrong: repeat. 02/d: never answered."""
    answers = [("quiz", "02/a", 0), ("quiz", "02/b", 1), ("card", "c1", 0), ("quiz", "02/a", 1), ("quiz", "02/b", 0.5)]
    for minute, (kind, item, score) in enumerate([*answers, ("quiz", "03/c", 0), ("quiz", "03/gone", 1)]):
        record(kind, item, score, at=NOON + minute * MINUTE, file=file)
    assert progress.states("quiz", ["02/a", "02/b", "02/d", "03/c"], file) == {
        "02/a": "done", "02/b": "repeat", "02/d": "open", "03/c": "repeat",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "score", "done"), [
    ("interview", 0.75, True), ("interview", 0.74, False), ("card", 0.99, False), ("card", 1, True),
    ("quiz", 0.75, False), ("whiteboard", 0.5, False),
])  # fmt: skip
def test_from_which_score_on_an_item_is_done(file, kind, score, done):
    record(kind, "x", score, file=file)
    assert progress.states(kind, ["x"], file) == {"x": "done" if done else "repeat"}


# --- Two notebooks, and crashes ---------------------------------------------------------------------------------------


def writer(file, name: str, count: int) -> subprocess.Popen:
    """A process that prints the number of each answer once it is recorded. It starts when it can read a line."""
    code = "import pathlib, sys; from ftlab.classroom.progress import record; input()\n"
    code += "for i in range(int(sys.argv[3])):\n"
    code += "    record('card', sys.argv[2] + str(i), 1, file=pathlib.Path(sys.argv[1])); print(i, flush=True)"
    command = [sys.executable, "-c", code, str(file), name, str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_notebooks_write_at_once_and_nothing_is_lost_and_one_may_be_killed(file):
    """Both make the file at the same time. Of the one that is killed at most the answer in flight may be missing."""
    writers = [writer(file, "a", 25), writer(file, "b", 10**6)]
    for each in writers:
        each.stdin.write("\n")
        each.stdin.flush()
    whole, killed = writers
    assert whole.stdout.read().split() == [str(number) for number in range(25)] and whole.wait() == 0
    first = killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    acknowledged = [first, *killed.stdout.readlines()]
    acknowledged = [line.strip() for line in acknowledged if line.endswith("\n")]
    assert killed.wait() == -signal.SIGKILL
    found = [event.item for event in progress.events(file=file)]
    assert [item for item in found if item[0] == "a"] == [f"a{number}" for number in range(25)]
    of_killed = [item[1:] for item in found if item[0] == "b"]
    assert of_killed in (acknowledged, [*acknowledged, str(len(acknowledged))])
    with contextlib.closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- Files that are no progress ---------------------------------------------------------------------------------------


def is_refused_and_left_alone(file) -> None:
    before = file.read_bytes()
    for action in (lambda: record("card", "x", 1, file=file), lambda: progress.events(file=file)):
        with pytest.raises(ProgressError, match="FTLAB_PROGRESS") as refused:
            action()
        assert str(file) in str(refused.value) and file.read_bytes() == before


@given(left=st.integers(1, 20_000))
@example(left=1)
@ONE_FOLDER
def test_a_file_that_was_cut_off_is_refused_and_left_alone(left, tmp_path):
    file = tmp_path / "cut.sqlite"
    record("quiz", "x", 1, {"answer": "x" * 20_000}, file=file)
    file.write_bytes(file.read_bytes()[:left])
    is_refused_and_left_alone(file)
    file.unlink()


def test_a_diary_and_the_database_of_another_program_are_refused_and_left_alone(file):
    file.parent.mkdir()
    file.write_text("my diary, nothing to do with it\n" * 100)
    is_refused_and_left_alone(file)
    file.unlink()
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE events (what TEXT)")
        database.execute("INSERT INTO events VALUES ('a wedding')")
    is_refused_and_left_alone(file)


def test_an_answer_that_cannot_be_read_is_an_error_and_not_passed_over(file):
    for at, detail in (("soon", "{}"), (NOON.isoformat(), "{")):
        record("card", "good", 1, file=file)
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            database.execute("UPDATE events SET at = ?, detail = ? WHERE number = 1", (at, detail))
        with pytest.raises(ProgressError, match="FTLAB_PROGRESS"):
            progress.events(file=file)
        file.unlink()


@pytest.mark.parametrize("name", ["flat/progress.sqlite", "x" * 300])
def test_a_name_that_no_file_can_have_is_an_error(tmp_path, name):
    (tmp_path / "flat").write_text("a file, not a folder")
    with pytest.raises(ProgressError, match="FTLAB_PROGRESS"):
        record("card", "x", 1, file=tmp_path / name)


# --- The file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_the_users_data_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("FTLAB_PROGRESS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert progress.default_file() == tmp_path / "ftlab" / "progress.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert progress.default_file() == tmp_path / ".local" / "share" / "ftlab" / "progress.sqlite"


def test_an_empty_file_is_a_new_one(file):
    file.parent.mkdir()
    file.touch()
    assert progress.events(file=file) == []
    assert [record("card", "x", 1, file=file)] == progress.events(file=file)
