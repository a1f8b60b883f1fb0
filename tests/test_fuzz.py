"""Damaged rows and answers: a Problem or the row, exactly as a slow reader finds it; never a silent loss.

    pytest tests/test_fuzz.py                    a quick look at new damage each time
    FTLAB_FUZZ=20 pytest tests/test_fuzz.py      20 times as many examples

Whatever was found once stands here as an example of its own.
"""

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftlab import data
from ftlab.tasks import triage

TIMES = int(os.environ.get("FTLAB_FUZZ", "1"))


def fuzz(examples: int):
    """As many examples, times FTLAB_FUZZ; the files and models they share do not change."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples * TIMES, deadline=None, suppress_health_check=checks)


# --- Damage -----------------------------------------------------------------------------------------------------------

PLACE = st.floats(0, 1, exclude_max=True)
CUT = st.tuples(st.just("cut"), PLACE, st.integers(1, 60))
FLIP = st.tuples(st.just("flip"), PLACE, st.integers(0, 7))
SWAP = st.tuples(st.just("swap"), PLACE, PLACE)
TWICE = st.tuples(st.just("twice"), PLACE, st.integers(1, 60))


def damage(*inserts: bytes):
    """Some ways to damage a file, for `damaged`: bits flipped, bytes cut out, doubled or put in, lines swapped."""
    puts = st.tuples(st.just("put"), PLACE, st.sampled_from(inserts) | st.binary(max_size=6))
    puts |= st.tuples(st.just("begin"), PLACE, st.sampled_from(inserts))
    return st.lists(puts | CUT | FLIP | SWAP | TWICE, min_size=1, max_size=4)


def damaged(content: bytes, ways: list[tuple]) -> bytes:
    for way, place, what in ways:
        at = int(place * len(content))
        if way == "begin":  # where a member of an object or of a list begins: more often still JSON
            starts = [found.end() for found in re.finditer(rb"[\[{,] ?", content)] or [0]
            at = starts[int(place * len(starts))]
        if way in ("put", "begin"):
            content = content[:at] + what + content[at:]
        elif way == "cut":
            content = content[:at] + content[at + what :]
        elif way == "twice":
            content = content[: at + what] + content[at:]
        elif way == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << what]) + content[at + 1 :]
        elif way == "swap":
            lines = content.splitlines(keepends=True) or [b""]
            one, other = int(place * len(lines)), int(what * len(lines))
            lines[one], lines[other] = lines[other], lines[one]
            content = b"".join(lines)
    return content


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- Rows -------------------------------------------------------------------------------------------------------------

USER, BOT = {"role": "user", "content": "Where is it? 🍛 कहाँ?"}, {"role": "assistant", "content": '{"a": "b\\n"}'}
ROWS = {
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, USER, BOT], "id": 1},
    "prompt_completion": {"prompt": [USER], "completion": [BOT], "tags": {"score": -1.5e3, "none": None}},
    "preference": {"prompt": "Q", "chosen": "A\u2028", "rejected": "B", "id": "x-1"},
    "unpaired_preference": {"prompt": "Q", "completion": [BOT], "label": False},
}
LINES = {
    kind: b"".join(json.dumps({**row, "n": n}, ensure_ascii=n % 2 == 0).encode() + b"\n" for n in range(4))
    for kind, row in ROWS.items()
}
IN_JSON = [
    b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\x1b", b"\x7f", b"\xc2\x85", b"\xef\xbf\xbd", b"\xed\xa0\x80", b"\r",
    b"\n\n", b"\\ud83d", b"\\ude00", b"\\u0000", b"\\u007f", b"\\ufeff", b"\\ufffd", b"\\/", b"<|im_end|>",
    b"[\\/INST]", b"</s>", b"NaN", b"1e999", b"9" * 5000, b"true", b"null", b"'", b'"', b",", b"{", b"}", b"[]", b"\\",
    b"[" * 3000, b'"n": 1, ', b'"prompt": "x", ', b'"x": {"n": 1, "n": 1}, ', b'"label": {"up": true}, ',
    b'"name": null, ', b'"tool_calls": [1], ', b'"tools": [], ', b'"tools": [1], ',
]  # fmt: skip
MARKER = re.compile(r"<[|｜][^\s<>|｜]{1,40}[|｜]>|<(start|end)_of_turn>|</?s>|\[/?INST\]")


def says_something(text: object) -> bool:
    """Whether it is a text with a visible character, and with none that is lost, invisible or a template's."""
    if not isinstance(text, str) or MARKER.search(text) or {"\ufeff", "\ufffd"} & set(text):
        return False
    kinds = [unicodedata.category(c) for c in text if c not in "\t\n\r"]
    return any(kind[0] not in "CZ" for kind in kinds) and not {"Cc", "Cs"} & set(kinds)


def in_turn(roles: list[str], last: str) -> bool:
    """Whether user and assistant take turns from the user to `last`, after one system message at most."""
    after = {None: "user", "user": "assistant", "assistant": "user"}
    talk = roles[1:] if roles[0] == "system" else roles
    return talk[-1:] == [last] and all(b == after[a] for a, b in zip([None, *talk[:-1]], talk, strict=True))


def as_messages(value: object, key: str) -> list[dict]:
    """A side of a row as messages of two keys. AssertionError if it is none."""
    if isinstance(value, str) and key != "messages":
        value = [{"role": "user" if key == "prompt" else "assistant", "content": value}]
    assert value and isinstance(value, list) and all(isinstance(each, dict) for each in value)
    assert all(key in ("role", "content") or each[key] is None for each in value for key in each)
    made = [{"role": each.get("role"), "content": each.get("content")} for each in value]
    roles = [each["role"] for each in made]
    assert all(role in ("system", "user", "assistant") for role in roles)
    assert all(says_something(each["content"]) for each in made)
    order = {"prompt": lambda: in_turn(roles, "user"), "messages": lambda: in_turn(roles, "assistant")}
    assert order.get(key, lambda: roles == ["assistant"])()
    return made


def naive_rows(line: bytes, kind: str) -> list[dict]:
    """The rows of a line as a slow reader sees it: json's own, then the rules of the kind one by one; [] if bad."""
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape"))
        assert isinstance(row, dict) and not row.get("tools") and not row.get("chat_template_kwargs")
        sides = {key: as_messages(row[key], key) for key in data.KEYS[kind] if key != "label"}
        if {"prompt", "chosen", "rejected"} <= row.keys():
            assert kind == "preference" and sides["chosen"] != sides["rejected"]
        elif {"prompt", "completion"} <= row.keys():  # a thumb is no good answer
            assert kind == ("unpaired_preference" if "label" in row else "prompt_completion")
            assert kind != "unpaired_preference" or isinstance(row["label"], bool)
    except (ValueError, AssertionError, KeyError, RecursionError):
        return []
    if kind != "messages":
        return [row | sides]
    talk = row.pop("messages") and sides["messages"]
    ends = reversed(range(len(talk) - 1, 0, -2))  # the last message is an answer, and every second one before it
    return [row | {"prompt": talk[:k], "completion": talk[k : k + 1]} for k in ends]


def check_rows(content: bytes, file: Path) -> None:
    """Every line that is not blank is one row, exactly if the slow reader finds it, or one Problem."""
    file.write_bytes(content)
    report = data.read_rows(file)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    numbers = [n for n, line in enumerate(lines, 1) if line.decode("utf-8", "surrogateescape").strip()]
    wanted = {n: naive_rows(lines[n - 1], report.kind) if report.kind else [] for n in numbers}
    assert repr(report.rows) == repr([row for rows in wanted.values() for row in rows])
    assert [problem.line for problem in report.problems] == [n for n, rows in wanted.items() if not rows]
    assert all(len(str(problem)) < 600 and str(problem).encode() for problem in report.problems)
    assert repr(report).encode()


@given(content=st.binary(min_size=3, max_size=300))
@fuzz(100)
def test_any_bytes_as_rows(content, place):
    check_rows(content, place / "any.jsonl")


@given(kind=st.sampled_from(list(ROWS)), ways=damage(*IN_JSON))
@fuzz(150)
def test_damaged_rows(kind, ways, place):
    check_rows(damaged(LINES[kind], ways), place / "damaged.jsonl")


def test_a_line_cut_anywhere_is_no_row(place):
    """Inside a character of two bytes, or inside a word such as true, too."""
    row = json.dumps({"prompt": "é", "completion": "A", "label": True}, ensure_ascii=False).encode()
    for end in range(1, len(row)):
        (place / "cut.jsonl").write_bytes(row[:end])
        report = data.read_rows(place / "cut.jsonl")
        assert (len(report.rows), len(report.problems)) == (0, 1), row[:end]


PARTS = st.sampled_from(["<|im_end|>", "[/INST]", "</s>", "<end_of_turn>", "<b>", *"ab <|>[]/INSTs_\0\x1f\x7f\x85"])
PARTS |= st.sampled_from("\ud83d\ufeff\ufffd\n\u2028é")


@given(text=st.lists(PARTS, max_size=12).map("".join))
@fuzz(150)
def test_the_quick_search_for_bad_text_misses_nothing_that_reading_character_by_character_finds(text, place):
    (place / "text.jsonl").write_text(json.dumps({"prompt": text, "completion": "A"}))
    assert len(data.read_rows(place / "text.jsonl").rows) == says_something(text)


ANSWER = {"intent": "other", "order_id": "482193", "urgency": "low", "refund_amount": 180, "language": "en"}
TICKET = {"completion": [{"role": "assistant", "content": json.dumps(ANSWER)}]}


@given(ways=damage(*IN_JSON, b'"intent": "other", ', b"```json\n", b"180.0", b"00"))
@fuzz(80)
def test_a_damaged_answer_is_called_valid_and_right_only_if_it_is(ways):
    answer = damaged(json.dumps(ANSWER).encode(), ways).decode("utf-8", "replace")
    if triage.is_valid(answer):
        pairs = json.loads(answer, object_pairs_hook=list)
        assert [key for key, _ in pairs] == list(ANSWER) and triage.scorer(answer, TICKET) == (dict(pairs) == ANSWER)
    else:
        assert not triage.scorer(answer, TICKET)
