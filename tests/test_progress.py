"""ftlab.classroom.progress: nothing acknowledged is lost, by a kill, by two writers, or by a broken file."""

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest

from ftlab.classroom import progress
from ftlab.classroom.progress import ProgressError, record
from notebooks import CELLS, NOTEBOOKS

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


def test_what_is_recorded_is_what_is_read(file):
    assert progress.events(file=file) == [] and not file.exists()
    first = record("quiz", "02/lora", 0.5, {"answer": "B", "note": "₹ नमस्ते"}, NOON, file)
    second = record("card", "lora-what", 1, at=NOON + timedelta(minutes=1), file=file)
    assert progress.events(file=file) == [first, second]
    assert progress.events("card", file) == [second]
    assert first.detail == {"answer": "B", "note": "₹ नमस्ते"} and second.score == 1.0


def test_events_come_in_the_order_of_their_times_whatever_the_zone(file):
    india = timezone(timedelta(hours=5, minutes=30))
    record("card", "late", 1, at=NOON, file=file)
    record("card", "early", 1, at=datetime(2026, 11, 25, 17, 29, tzinfo=india), file=file)  # 11:59 UTC
    assert [event.item for event in progress.events(file=file)] == ["early", "late"]
    assert progress.table(file=file).loc[("card", "early"), "at"] == NOON - timedelta(minutes=1)


def test_events_of_one_moment_come_in_the_order_in_which_they_were_recorded(file):
    for item in "cab":
        record("card", item, 1, at=NOON, file=file)
    assert [event.item for event in progress.events(file=file)] == ["c", "a", "b"]


def test_the_last_answer_counts_by_its_time_and_not_the_best(file):
    """Recorded out of order, as by a notebook that waited for the lock: right at noon, then half right."""
    record("quiz", "q", 0.5, at=NOON + timedelta(hours=1), file=file)
    record("quiz", "q", 1, at=NOON, file=file)
    row = progress.table(file=file).loc[("quiz", "q")]
    assert (row["last"], row["best"], row["done"]) == (0.5, 1, False)
    assert row["at"] == NOON + timedelta(hours=1)


def test_without_a_time_it_is_now(file):
    before = datetime.now(UTC)
    assert before <= record("card", "x", 0, file=file).at <= datetime.now(UTC)


@pytest.mark.parametrize("score", [-0.1, -1e-9, 1.01, 1 + 1e-9, float("nan")])
def test_a_score_outside_0_to_1_is_refused(file, score):
    with pytest.raises(ValueError, match="score"):
        record("card", "x", score, file=file)
    assert not file.exists()


@pytest.mark.parametrize("score", [0, 1, 0.5])
def test_the_ends_of_the_scale_are_scores(file, score):
    assert record("card", "x", score, file=file).score == score == progress.events(file=file)[0].score


def test_a_time_without_a_zone_is_refused(file):
    with pytest.raises(ValueError, match="zone"):
        record("card", "x", 1, at=datetime(2026, 1, 1), file=file)
    assert not file.exists()


def test_table_and_summary_by_hand(file):
    """q1: wrong, then right: done. q2: right, then half: repeat. c1: wrong: repeat."""
    for minute, (kind, item, score) in enumerate(
        [("quiz", "q1", 0), ("quiz", "q2", 1), ("card", "c1", 0), ("quiz", "q1", 1), ("quiz", "q2", 0.5)]
    ):
        record(kind, item, score, at=NOON + timedelta(minutes=minute), file=file)
    items = progress.table(file=file)
    assert items[["times", "last", "best"]].to_dict("index") == {
        ("card", "c1"): {"times": 1, "last": 0, "best": 0},
        ("quiz", "q1"): {"times": 2, "last": 1, "best": 1},
        ("quiz", "q2"): {"times": 2, "last": 0.5, "best": 1},
    }
    assert items.loc[("quiz", "q1"), "at"] == NOON + timedelta(minutes=3)
    assert items["done"].to_dict() == {("card", "c1"): False, ("quiz", "q1"): True, ("quiz", "q2"): False}
    assert progress.summary(file).to_dict("index") == {
        "card": {"done": 0, "repeat": 1, "answers": 1},
        "quiz": {"done": 1, "repeat": 1, "answers": 4},
    }
    assert list(progress.table("card", file).index) == [("card", "c1")]


@pytest.mark.parametrize(("kind", "score", "done"), [
    ("interview", 0.75, True), ("interview", 0.74, False), ("card", 0.99, False), ("card", 1, True),
    ("quiz", 0.75, False), ("whiteboard", 0.5, False),
])  # fmt: skip
def test_from_which_score_on_an_item_is_done(file, kind, score, done):
    record(kind, "x", score, file=file)
    assert progress.table(file=file)["done"].tolist() == [done]
    assert progress.summary(file).loc[kind].to_dict() == {"done": int(done), "repeat": int(not done), "answers": 1}


def test_export_is_all_of_it_and_overwrites_nothing(file, tmp_path):
    event = record("quiz", "q1", 1, {"answer": "ünïcode"}, NOON, file)
    target = tmp_path / "mine.jsonl"
    assert progress.export(target, file) == 1
    assert "ünïcode" in target.read_text(encoding="utf-8"), "to be read by people"
    row = json.loads(target.read_text(encoding="utf-8"))
    assert row == {"at": NOON.isoformat(), "kind": "quiz", "item": "q1", "score": 1.0, "detail": event.detail}
    with pytest.raises(FileExistsError):
        progress.export(target, file)


def test_delete_leaves_no_trace_of_the_answers(file):
    assert progress.delete(file) == 0 and not file.exists()
    record("quiz", "a-secret-answer", 1, {"long": "x" * 200_000}, file=file)
    assert b"a-secret-answer" in file.read_bytes()
    assert progress.delete(file) == 1
    assert progress.events(file=file) == [] and b"a-secret-answer" not in file.read_bytes()
    assert file.stat().st_size < 20_000, "not even the empty pages are left"
    assert progress.delete(file) == 0
    record("quiz", "another", 1, file=file)
    assert len(progress.events(file=file)) == 1


# --- Two notebooks, and crashes ---------------------------------------------------------------------------------------


def write_many(file, name, count):
    for number in range(count):
        record("card", f"{name}-{number}", 1, file=file)


def test_two_notebooks_write_at_once_and_nothing_is_lost(file):
    """Both also make the file at the same time."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(file, name, 40)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = [event.item for event in progress.events(file=file)]
    assert sorted(found) == sorted(f"{name}-{number}" for name in "ab" for number in range(40))


def test_killed_at_any_moment_all_acknowledged_answers_are_there(file):
    """A writer prints each answer once it is recorded; killed, at most the one in flight may be missing."""
    code = "import sys; from ftlab.classroom.progress import record\nfor i in range(10**6):\n"
    code += "    record('card', str(i), 1, file=sys.argv[1]); print(i, flush=True)"
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "0\n"
        time.sleep(0.1)
        writer.send_signal(signal.SIGKILL)
        acknowledged = [0, *map(int, (line for line in writer.stdout.read().split("\n")[:-1]))]
        writer.wait()
        found = [int(event.item) for event in progress.events(file=file)]
        assert found in (acknowledged, [*acknowledged, len(acknowledged)])
        assert progress.delete(file) == len(found)
    with sqlite3.connect(file) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_transaction_that_fails_midway_leaves_nothing(file):
    record("card", "before", 1, file=file)
    with pytest.raises(ProgressError), progress._database(file) as database:
        database.execute("INSERT INTO events (at, kind, item, score, detail) VALUES ('', '', 'half', 1, '')")
        database.execute("no such statement")
    assert [event.item for event in progress.events(file=file)] == ["before"]


# --- Files that are no progress ---------------------------------------------------------------------------------------


def test_a_file_of_something_else_is_refused_and_left_alone(file):
    file.parent.mkdir()
    file.write_text("my diary, nothing to do with it\n" * 100)
    actions = (lambda: record("card", "x", 1, file=file), lambda: progress.events(file=file))
    for action in (*actions, lambda: progress.delete(file)):
        with pytest.raises(ProgressError, match="FTLAB_PROGRESS"):
            action()
    assert file.read_text() == "my diary, nothing to do with it\n" * 100


def test_a_database_of_another_program_is_refused_and_left_alone(file):
    file.parent.mkdir()
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE events (what TEXT)")
        database.execute("INSERT INTO events VALUES ('a wedding')")
    for action in (lambda: record("card", "x", 1, file=file), lambda: progress.delete(file)):
        with pytest.raises(ProgressError, match=r"another program.*FTLAB_PROGRESS"):
            action()
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT * FROM events").fetchall() == [("a wedding",)]


def test_the_format_is_marked_in_the_file_and_the_next_one_is_too_new(file):
    record("card", "x", 1, file=file)
    with sqlite3.connect(file) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (progress.VERSION,) == (1,)
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(ProgressError, match="format 2, this one reads 1"):
        progress.events(file=file)


def test_a_file_of_a_newer_version_is_refused_and_not_deleted(file):
    record("card", "x", 1, file=file)
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 99")
    for action in (lambda: record("card", "y", 1, file=file), lambda: progress.delete(file)):
        with pytest.raises(ProgressError, match="newer"):
            action()
    assert file.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "flat").write_text("a file, not a folder")
    with pytest.raises(ProgressError, match="flat"):
        record("card", "x", 1, file=tmp_path / "flat" / "progress.sqlite")


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLAB_PROGRESS", str(tmp_path / "mine.sqlite"))
    return tmp_path


def test_the_file_is_the_users_data_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("FTLAB_PROGRESS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert progress.default_file() == tmp_path / "ftlab" / "progress.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert progress.default_file() == tmp_path / ".local" / "share" / "ftlab" / "progress.sqlite"


def test_one_command_sees_exports_and_deletes(home, capsys, monkeypatch):
    progress.main([])
    assert capsys.readouterr().out == f"{home / 'mine.sqlite'}\nnothing answered yet\n"
    record("quiz", "03/nf4", 0)
    record("quiz", "03/bits", 1)
    progress.main([])
    shown, again = capsys.readouterr().out.split("to repeat:")
    assert "quiz     1       1        2" in shown and "03/nf4" in again and "03/bits" not in again
    progress.main(["--export", str(home / "out.jsonl")])
    assert "2 answers written" in capsys.readouterr().out and len((home / "out.jsonl").read_text().splitlines()) == 2
    for reply, left in (("no", 2), ("y", 2), ("", 2), ("yesterday", 2), (" Yes ", 0)):
        monkeypatch.setattr("builtins.input", lambda _, reply=reply: reply)
        progress.main(["--delete"])
        assert len(progress.events()) == left


def test_as_a_module_it_runs(home):
    record("card", "x", 1)
    command = [sys.executable, "-m", "ftlab.classroom.progress"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert "card" in done.stdout and done.stderr == ""


# --- In the notebook --------------------------------------------------------------------------------------------------


def shown(output) -> str:
    return output.outputs[0]["data"]["text/html"]


@pytest.fixture
def panel(file, monkeypatch):
    record("quiz", "02_lora_math/<b>", 0, file=file)
    record("quiz", "02_lora_math/fine", 1, file=file)
    record("card", "lora-what", 0.5, file=file)
    monkeypatch.chdir(file.parent)
    return progress.panel(file)


def test_the_panel_says_what_is_done_and_where_to_repeat_the_rest(panel, file):
    page = shown(panel._page)
    assert "<td>1</td>\n      <td>1</td>\n      <td>2</td>" in page, "quiz: 1 done, 1 to repeat, 2 answers"
    assert "<li>02_lora_math/&lt;b&gt; (quiz, " in page and 'href="02_lora_math.ipynb#cell-id=quiz"' in page
    assert "<li>lora-what (card, " in page and 'href="11_interview_prep.ipynb#cell-id=flash"' in page
    assert "02_lora_math/fine" not in page
    record("card", "lora-what", 1, file=file)
    record("quiz", "02_lora_math/<b>", 1, file=file)
    panel.look()
    assert "To repeat" not in shown(panel._page)


def test_what_is_to_be_repeated_is_found_in_a_cell_that_there_is():
    cells = {**progress.WHERE, **{name: f"{name}#quiz" for name in NOTEBOOKS}}
    assert set(cells.values()) <= set(CELLS)


def button(panel, name):
    (found,) = [one for row in panel._widget.children[1:4] for one in row.children if one.description == name]
    return found


def test_the_panel_exports_beside_the_notebook_and_never_twice(panel, file):
    button(panel, "Export").click()
    assert "3 answers written to my_progress.jsonl" in shown(panel._said)
    assert len((file.parent / "my_progress.jsonl").read_text().splitlines()) == 3
    button(panel, "Export").click()
    assert "Not done." in shown(panel._said) and "exists" in shown(panel._said)
    panel.target.value = "again.jsonl"
    button(panel, "Export").click()
    assert (file.parent / "again.jsonl").exists()
    button(panel, "Look again").click()
    assert panel._said.outputs == ()


def test_the_panel_deletes_only_what_is_ticked(panel, file):
    button(panel, "Delete").click()
    assert "Tick the box first" in shown(panel._said) and len(progress.events(file=file)) == 3
    panel.sure.value = True
    button(panel, "Delete").click()
    assert "3 answers deleted." in shown(panel._said) and progress.events(file=file) == []
    assert panel.sure.value is False and "Nothing is answered yet." in shown(panel._page)


def test_without_a_kernel_nobodys_answers_are_shown(panel):
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "lora" not in bundle["text/html"] + bundle["text/plain"]
