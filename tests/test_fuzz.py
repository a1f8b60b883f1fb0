"""Damaged rows and answers: a Problem or the row, exactly as the slowest reader finds it; never a silent loss.

    pytest tests/test_fuzz.py                    a quick look at new damage each time
    FTLAB_FUZZ=20 pytest tests/test_fuzz.py      20 times as many examples

Whatever was found once stands here as an example of its own.
"""

import contextlib
import json
import math
import os
import re
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ftlab import data
from ftlab.paths import DATA
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
    "thumbs": {"prompt": "Q", "completion": [BOT], "label": False},
}
LINES = {
    kind: b"".join(json.dumps({**row, "n": n}, ensure_ascii=n % 2 == 0).encode() + b"\n" for n in range(4))
    for kind, row in ROWS.items()
}
IN_JSON = [
    b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\x1b", b"\x7f", b"\xc2\x85", b"\xef\xbf\xbd", b"\xed\xa0\x80", b"\r",
    b"\n\n", b"\\ud83d", b"\\ude00", b"\\u0000", b"\\u007f", b"\\ufeff", b"\\ufffd", b"\\/", b"<|im_end|>",
    b"[\\/INST]", b"</s>", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"0x10", b"true", b"null", b"'", b'"', b",",
    b"{", b"}", b"[]", b"\\", b"[" * 120 + b"]" * 120, b"[" * 3000, b'{"a":' * 120, b'"n": 1, ', b'"prompt": "x", ',
    b'"x": {"n": 1, "n": 1}, ', b'"x": NaN, ', b'"x": [-1e999], ', b'"x": ' + b"[" * 99 + b"]" * 99 + b", ",
    b'"x": ' + b"[" * 100 + b"]" * 100 + b", ", b'"label": {"up": true}, ',
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "micro" / "model")


DEPTH = 100  # brackets in each other, the row's own among them
TOKEN = re.compile(
    r'[ \t\n\r]*([][{},:]|"(?:[^"\\\0-\x1f]|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*"'
    r"|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null)"
)
ESCAPES = dict(zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True))


def strict(text: str):
    """The value of a text by the grammar of RFC 8259; no key twice, nothing infinite, no more than DEPTH brackets.

    Raises ValueError for anything else.
    """
    tokens, at = [], 0
    while text[at:].strip(" \t\n\r"):
        if not (found := TOKEN.match(text, at)):
            raise ValueError("no token")
        tokens.append(found[1])
        at = found.end()
    tokens.reverse()

    def take(*wanted: str) -> str:
        if not tokens or (wanted and tokens[-1] not in wanted):
            raise ValueError("another token")
        return tokens.pop()

    def string(token: str) -> str:
        if token[0] != '"':
            raise ValueError("no string")
        said = re.sub(r"\\(?:u(....)|(.))", lambda m: chr(int(m[1], 16)) if m[1] else ESCAPES[m[2]], token[1:-1])
        return said.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # two halves: one character

    def items(end: str, one) -> list:
        found = []
        while tokens[-1:] != [end] or found:
            found.append(one())
            if take(",", end) == end:
                return found
        take()
        return found

    def value(depth: int):
        token = take()
        if token in ("[", "{") and depth == DEPTH:
            raise ValueError("too deep")
        if token == "[":
            return items("]", lambda: value(depth + 1))
        if token == "{":
            pairs = items("}", lambda: (string(take()), take(":"), value(depth + 1)))
            if len({key for key, _, _ in pairs}) < len(pairs):
                raise ValueError("a key twice")
            return {key: inner for key, _, inner in pairs}
        if token[0] == '"':
            return string(token)
        if token in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[token]
        number = float(token) if set(token) & set(".eE") else int(token)  # of at most 4,300 digits, as Python has it
        if number in (math.inf, -math.inf):
            raise ValueError("infinite")
        return number

    found = value(0)
    if tokens:
        raise ValueError("more than one value")
    return found


MARKER = re.compile(r"<[|｜][^\s<>|｜]{1,40}[|｜]>|<(start|end)_of_turn>|</?s>|\[/?INST\]")


def says_something(text: object) -> bool:
    """Whether it is a text with a visible character, and with none that is lost, invisible or a template's."""
    if not isinstance(text, str) or MARKER.search(text) or {"\ufeff", "\ufffd"} & set(text):
        return False
    kinds = [unicodedata.category(c) for c in text if c not in "\t\n\r"]
    return any(kind[0] not in "CZ" for kind in kinds) and not {"Cc", "Cs"} & set(kinds)


ORDER = {"messages": "s?(ua)+", "prompt": "s?(ua)*u", "completion": "a", "chosen": "a", "rejected": "a"}


def as_messages(value: object, key: str) -> list[dict]:
    """A side of a row as messages of two keys. AssertionError if it is none."""
    if isinstance(value, str) and key != "messages":
        value = [{"role": "user" if key == "prompt" else "assistant", "content": value}]
    assert isinstance(value, list) and all(isinstance(each, dict) for each in value)
    made = [{"role": each.get("role"), "content": each.get("content")} for each in value]
    assert all(each["role"] in ("system", "user", "assistant") and says_something(each["content"]) for each in made)
    assert re.fullmatch(ORDER[key], "".join(each["role"][0] for each in made))
    return made


def naive_row(line: bytes, kind: str) -> dict | None:
    """The row on a line as the slowest reader sees it: the grammar, then the rules of the kind one by one."""
    try:
        row = strict(line.decode())
        assert isinstance(row, dict)
        sides = {key: as_messages(row[key], key) for key in data.KEYS[kind] if key != "label"}
        pair, thumb = {"prompt", "chosen", "rejected"} <= row.keys(), {"prompt", "completion", "label"} <= row.keys()
        assert kind != "prompt_completion" or not pair
        if kind == "thumbs":
            assert isinstance(row["label"], bool)
        elif thumb and not pair:  # a thumb down is no good answer; a label of another shape is something else
            assert isinstance(row["label"], dict | list)
        assert kind != "preference" or sides["chosen"] != sides["rejected"]
    except (ValueError, AssertionError, KeyError):
        return None
    return row | sides


def check_rows(content: bytes, kind: str, file: Path, tokenizer) -> None:
    """Every line that is not blank is one row, exactly if the slowest reader finds it, or one Problem; a row trains."""
    file.write_bytes(content)
    report = data.read_rows(file, kind)
    found = list(data.iter_rows(file, kind))
    numbers = [line for line, _ in found]
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:  # UTF-16, told at its first line
        assert numbers == [1] and report.good == 0
        return
    assert numbers == [n for n, line in enumerate(lines, 1) if line.decode("utf-8", "surrogateescape").strip()]
    assert report.problems == [row for _, row in found if isinstance(row, data.Problem)]
    assert all(len(str(problem)) < 1_000 and str(problem).encode() for problem in report.problems)
    for number, row in found:
        wanted = naive_row(lines[number - 1], kind)
        assert repr(row) == repr(wanted) if isinstance(row, dict) else wanted is None, row
        if isinstance(row, dict):
            with contextlib.suppress(ValueError):  # of an answer whose first token reaches into the prompt
                mask = data.show_mask(row, tokenizer)
                assert 0 < sum(mask.completion_mask) < len(mask.input_ids)


@given(content=st.binary(max_size=300), kind=st.sampled_from(list(ROWS)))
@example(content=b"\xef", kind="messages")
@fuzz(150)
def test_any_bytes_as_rows(content, kind, place, tokenizer):
    check_rows(content, kind, place / "any.jsonl", tokenizer)


@given(kind=st.sampled_from(list(ROWS)), ways=damage(*IN_JSON))
@fuzz(300)
def test_damaged_rows(kind, ways, place, tokenizer):
    check_rows(damaged(LINES[kind], ways), kind, place / "damaged.jsonl", tokenizer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON, ways=damage(*IN_JSON) | st.just([]), ascii=st.booleans())
@fuzz(300)
def test_the_slowest_reader_reads_what_pythons_reads(value, ways, ascii):
    """It measures the rows above. Python's reader also takes a key twice, what is infinite, and deeper brackets."""
    text = damaged(json.dumps({"x": value}, ensure_ascii=ascii).encode(), ways).decode("utf-8", "replace")
    keys, numbers = [], []
    try:
        read = json.loads(text, object_pairs_hook=lambda pairs: keys.append(pairs) or dict(pairs),
                          parse_float=lambda number: numbers.append(float(number)) or numbers[-1],
                          parse_constant=lambda name: numbers.append(math.inf))  # fmt: skip
    except (ValueError, RecursionError):
        read = ValueError
    if math.inf in map(abs, numbers) or any(len(dict(pairs)) < len(pairs) for pairs in keys):
        read = ValueError
    try:
        found = strict(text)
    except ValueError as refused:
        assert read is ValueError or str(refused) == "too deep"
    else:
        assert repr(found) == repr(read)


@pytest.mark.parametrize("depth", [98, 99, 100, 101, 500, 980])
def test_where_too_deep_begins_does_not_depend_on_the_callers_stack(depth, place):
    """The row is itself a bracket. Without a limit of its own, Python's, which a deep stack reaches sooner, decided."""
    (place / "deep.jsonl").write_bytes(LINES["preference"][:-4] + b'3, "x": ' + b"[" * depth + b"]" * depth + b"}\n")

    def causes(frames: int) -> list[str]:
        if frames:
            return causes(frames - 1)
        return [problem.cause for problem in data.read_rows(place / "deep.jsonl", "preference").problems]

    assert causes(0) == causes(600) == (["nested too deeply"] if depth > 99 else [])


def test_a_line_cut_anywhere_is_no_row(place):
    """Inside a character of two bytes, or inside a word such as true, too."""
    row = json.dumps({"prompt": "é", "completion": "A", "label": True}, ensure_ascii=False).encode()
    for end in range(1, len(row)):
        (place / "cut.jsonl").write_bytes(row[:end])
        report = data.read_rows(place / "cut.jsonl", "thumbs")
        assert (report.good, len(report.problems)) == (0, 1), row[:end]


def test_a_line_without_an_end_is_not_read_into_memory(place):
    file = place / "endless.jsonl"
    with file.open("wb") as stream:
        stream.write(LINES["preference"] + b"x" * 3 * data.LINE_LIMIT + b"\n" + LINES["preference"])
    tracemalloc.start()
    report = data.read_rows(file)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.good == 4 and [(p.line, p.cause) for p in report.problems] == [(5, "line too long")]
    assert peak_bytes < 2.5 * data.LINE_LIMIT


def test_a_problem_stays_readable_however_long_its_line_is(place):
    nest = [1] * 6
    for _ in range(6):
        nest = [nest] * 6
    rows = [{"messages": nest}, {"messages": [{"k" * 9_000: {"j" * 9_000: "x"}}]}, {"messages": "Q" * 9_000}]
    (place / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = data.read_rows(place / "long.jsonl", "messages").problems
    assert [problem.cause for problem in problems] == ["no message", "no message", "wrong type"]
    assert all(len(str(problem)) < 1_000 for problem in problems)


PARTS = st.sampled_from(["<|im_end|>", "[/INST]", "</s>", "<end_of_turn>", "<b>", *"ab <|>[]/INSTs_\0\x1f\x7f\x85"])
PARTS |= st.sampled_from("\ud83d\ufeff\ufffd\n\u2028é")


@given(text=st.lists(PARTS, max_size=12).map("".join))
@fuzz(300)
def test_the_quick_search_for_bad_text_misses_nothing_that_reading_character_by_character_finds(text, place):
    (place / "text.jsonl").write_text(json.dumps({"prompt": text, "completion": "A"}))
    assert data.read_rows(place / "text.jsonl", "prompt_completion").good == says_something(text)


ANSWER = {"intent": "other", "order_id": "482193", "urgency": "low", "refund_amount": 180, "language": "en"}
TICKET = {"completion": [{"role": "assistant", "content": json.dumps(ANSWER)}]}


@given(ways=damage(*IN_JSON, b'"intent": "other", ', b"```json\n", b"180.0", b"00"))
@fuzz(150)
def test_a_damaged_answer_is_called_valid_and_right_only_if_it_is(ways):
    answer = damaged(json.dumps(ANSWER).encode(), ways).decode("utf-8", "replace")
    right = triage.fields_right(answer, TICKET)
    assert list(right) == list(ANSWER) and all(type(value) is bool for value in right.values())
    if triage.is_valid(answer):
        pairs = json.loads(answer, object_pairs_hook=list)
        assert [key for key, _ in pairs] == list(ANSWER) and triage.scorer(answer, TICKET) == (dict(pairs) == ANSWER)
    else:
        assert not triage.scorer(answer, TICKET)
