"""Damaged files for every reader: the documented error or all of the good records, never a crash, never a silent loss.

    pytest tests/test_fuzz.py                    a quick look at new damage each time
    FTLAB_FUZZ=20 pytest tests/test_fuzz.py      20 times as many examples

Whatever was found once stands here as an example of its own.
"""

import contextlib
import json
import math
import os
import re
import sqlite3
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ftlab import data
from ftlab.classroom import cards, progress
from ftlab.paths import DATA
from ftlab.reading import read_yaml
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
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\0",
        b"\x1b",
        b"\x7f",
        b"\xc2\x85",
        b"\xef\xbf\xbd",
        b"\xed\xa0\x80",
        b"\r",
        b"\n\n",
    ),
    *(
        b"\\ud83d",
        b"\\ude00",
        b"\\u0000",
        b"\\u007f",
        b"\\ufeff",
        b"\\ufffd",
        b"\\/",
        b"<|im_end|>",
        b"[\\/INST]",
        b"</s>",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"0x10",
        b"true",
        b"null",
        b"'",
        b'"',
        b",",
        b"{",
        b"}",
        b"[]",
        b"\\",
    ),
    *(
        b"[" * 120 + b"]" * 120,
        b"[" * 3000,
        b'{"a":' * 120,
        b'"n": 1, ',
        b'"prompt": "x", ',
        b'"x": {"n": 1, "n": 1}, ',
        b'"x": NaN, ',
        b'"x": [-1e999], ',
        b'"x": ' + b"[" * 99 + b"]" * 99 + b", ",
        b'"x": ' + b"[" * 100 + b"]" * 100 + b", ",
        b'"label": {"up": true}, ',
    ),
]


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


# --- YAML -------------------------------------------------------------------------------------------------------------

IN_YAML = [
    *(
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"<<: {r: 3}\n",
        b"!!python/object/apply:os.system [ls]",
        b"!!python/name:os.system ",
    ),
    *(b"!!int ", b"!!float ", b"!!bool ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!null ", b"!!str ", b"!x "),
    *(b".nan", b"-.inf", b"1e999", b"2024-99-99", b"0b_", b"0x" + b"f" * 4000, b"9" * 5000, b"1:60:60", b"~", b"yes"),
    *(
        b'"\\ud800"',
        b'"\\UFFFFFFFF"',
        b"\xef\xbb\xbf",
        b"\0",
        b"\xe9",
        b"\t",
        b"---\n",
        b"...\n",
        b"%YAML 9.9\n",
        b"? ",
    ),
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b"[" * 2000,
        b": ",
        b"- ",
        b"|\n",
        b">\n",
        b"'",
        b'"',
        b"#",
        b"r: 8\n",
        b"why: x\n",
        b"\r",
    ),
]
BOMB = b"".join(
    [b"- &b0 [l, l, l, l, l, l, l, l, l, l]\n"]
    + [b"- &b%d [%s]\n" % (n, b", ".join([b"*b%d" % (n - 1)] * 10)) for n in range(1, 8)]
)


class FileError(ValueError):
    """What a reader raises here."""


def check_yaml(content: bytes, file: Path) -> None:
    """What PyYAML has for it, or the error asked for, in a readable length."""
    file.write_bytes(content)
    try:
        value = read_yaml(file, FileError)
    except FileError as error:
        assert file.name in str(error) and len(str(error)) < 4_000
    else:
        assert repr(value) == repr(yaml.safe_load(content))


@given(content=st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"a: !!timestamp soon")
@example(content=b"{{r: 1} }")  # found by atheris: a mapping as a key
@example(content=b"<<: &a {r: 4, seed: 1}\nseed: 2\n")  # a merge is not a key that stands twice
@fuzz(150)
def test_any_bytes_as_yaml(content, place):
    check_yaml(content, place / "any.yaml")


NOT_YAML = {
    "not UTF-8": b"model: caf\xe9",
    "no such month": b"seed: 2024-99-99",
    "no digits": b"seed: 0b_",
    "5,000 digits": b"seed: " + b"9" * 5000,
    "brackets": b"[" * 1000,
    "no timestamp": b"seed: !!timestamp soon",
    "no bool": b"fast: !!bool maybe",
    "no int": b'seed: !!int ""',
    "no float": b"epochs: !!float many",
    "no offset": b"seed: 2001-01-01T00:00:00+99:99",
    "no character": b'model: "\\UFFFFFFFF"',
    "half a character": b'model: "\\ud800"',
    "a Python name": b"model: !!python/name:os.system",
    "a Python call": b"model: !!python/object/apply:os.system [ls]",
    "a key twice": b"r: 8\nseed: 1\nr: 16\n",
    "a key twice, quoted": b"{r: 8, 'r': 16}",
}


@pytest.mark.parametrize("name", NOT_YAML)
def test_what_is_no_yaml_is_the_error_asked_for_in_few_words(name, place):
    (place / "no.yaml").write_bytes(NOT_YAML[name])
    with pytest.raises(FileError, match=r"^no.yaml: not valid YAML") as refused:
        read_yaml(place / "no.yaml", FileError)
    assert len(str(refused.value)) < 2_000


CARDS = b"""\
- id: lora-x
  level: junior
  kind: arithmetic
  question: How many?
  short: 128 times `fewer`.
  long: One.
  by_hand: [2 x 3 = 6; remark]
  follow_ups: [{ask: Why?, answer: So.}]
  weak: [{says: none, why: It is two.}]
  evidence: Seen.
  source: ["arXiv:2106.09685, Table 6"]
  proof: [02_lora_math#count, C20]
- {id: lora-y, level: mid, kind: concept, question: Q?, short: A., long: B., follow_ups: [], weak: [],
   evidence: E., proof: [C1], sheet: s, core: true, code: '04.2', asked: 'often, https://example.org'}
"""


@pytest.fixture(scope="module")
def deck(place) -> Path:
    """A folder with an empty file for each topic."""
    (place / "deck").mkdir()
    for topic in cards.TOPICS:
        (place / "deck" / f"{topic}.yaml").write_text("[]")
    return place / "deck"


@given(ways=damage(*IN_YAML))
@example(ways=[("put", 0.0, BOMB)])
@example(ways=[("put", 0.0, b"- id: &a [*a]\n")])
@fuzz(100)
def test_damaged_cards(ways, deck):
    content = damaged(CARDS, ways)
    (deck / "lora.yaml").write_bytes(content)
    try:
        found = cards.load(deck)
    except cards.CardError as error:
        assert len(str(error)) < 2_000
        return
    assert len(found) == len(yaml.safe_load(content)), "a card is missing"
    for card in found:
        (card.folded() + card.opened() + card.posed("1 of 2")).encode()


# --- Progress ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(place) -> tuple[Path, bytes, list]:
    """A progress file of five pages, its bytes and its answers."""
    file = place / "progress.sqlite"
    for number in range(60):
        progress.record(
            "quiz" if number % 2 else "card", f"item-{number}", 1, {"answer": "x" * (7 * number % 300)}, file=file
        )
    return file, file.read_bytes(), progress.events(file=file)


PAGE = st.sampled_from([512, 4096])
in_pages = st.one_of(
    st.tuples(st.just("end"), PLACE, st.none()),
    st.tuples(st.just("zero"), PLACE, PAGE),
    st.tuples(st.just("pages"), PLACE, PLACE),
    st.tuples(st.just("noise"), PLACE, st.binary(min_size=1, max_size=200)),
    FLIP,
)


def damaged_pages(content: bytes, ways: list[tuple]) -> bytes:
    for way, place, what in ways:
        at = int(place * len(content))
        if way == "end":
            content = content[: max(at, 1)]
        elif way == "zero":
            at -= at % what
            content = content[:at] + bytes(min(what, len(content) - at)) + content[at + what :]
        elif way == "noise":
            content = content[:at] + what[: len(content) - at] + content[at + len(what) :]
        elif way == "pages" and len(content) % 4096 == 0:
            pages = [content[start : start + 4096] for start in range(0, len(content), 4096)]
            one, other = int(place * len(pages)), int(what * len(pages))
            pages[one], pages[other] = pages[other], pages[one]
            content = b"".join(pages)
        elif way == "flip":
            content = damaged(content, [(way, place, what)])
    return content


@given(ways=st.lists(in_pages, min_size=1, max_size=3))
@example(ways=[("end", 0.0, None)])  # one byte was left, and the file taken for a new one
@example(ways=[("pages", 0.3, 0.9)])  # both pages are sound, and half of the answers were silently missing
@fuzz(400)
def test_a_damaged_progress_file_is_an_error_or_holds_all_answers_and_is_left_as_it_is(ways, kept):
    """The bytes inside an answer have no checksum: a flipped bit may change one answer, and never hide another."""
    file, whole, answers = kept
    content = damaged_pages(whole, ways)
    file.write_bytes(content)
    file.with_name("progress.sqlite-journal").unlink(missing_ok=True)
    try:
        found = progress.events(file=file)
    except progress.ProgressError as error:
        assert file.name in str(error) and file.read_bytes() == content
    else:
        assert len(found) == len(answers)
        if len(ways) == 1 and ways[0][0] != "noise":
            assert sum(event not in found for event in answers) <= 1


WRONG_ROWS = {
    "time": ("soon", "card", "x", 1.0, "{}"),
    "zone": ("2026-11-25T12:00:00", "card", "x", 1.0, "{}"),
    "kind": ("2026-11-25T12:00:00+00:00", b"\xff", "x", 1.0, "{}"),
    "item": ("2026-11-25T12:00:00+00:00", "card", b"x", 1.0, "{}"),
    "score": ("2026-11-25T12:00:00+00:00", "card", "x", 1.5, "{}"),
    "score as text": ("2026-11-25T12:00:00+00:00", "card", "x", "much", "{}"),
    "detail": ("2026-11-25T12:00:00+00:00", "card", "x", 1.0, "{"),
    "detail that is a list": ("2026-11-25T12:00:00+00:00", "card", "x", 1.0, "[]"),
    "detail that is deep": ("2026-11-25T12:00:00+00:00", "card", "x", 1.0, "[" * 100_000),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_an_answer_that_cannot_have_been_recorded_is_an_error_with_its_number_and_stays(name, file):
    progress.record("card", "good", 1, file=file)
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("INSERT INTO events (at, kind, item, score, detail) VALUES (?, ?, ?, ?, ?)", WRONG_ROWS[name])
    before = file.read_bytes()
    with pytest.raises(progress.ProgressError, match=r"answer 2 is damaged.*FTLAB_PROGRESS"):
        progress.events(file=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("lock", ["BEGIN EXCLUSIVE", "BEGIN IMMEDIATE"])
def test_a_file_that_somebody_holds_is_an_error_and_nothing_is_lost(lock, file, monkeypatch):
    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.05)
    progress.record("card", "before", 1, file=file)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute(lock)
        for action in (lambda: progress.record("card", "x", 1, file=file), lambda: progress.delete(file)):
            with pytest.raises(progress.ProgressError, match="locked"):
                action()
        other.execute("ROLLBACK")
    progress.record("card", "after", 1, file=file)
    assert [event.item for event in progress.events(file=file)] == ["before", "after"]


def test_a_disk_that_is_full_when_the_deleted_answers_are_wiped_is_an_error_that_says_so(file, monkeypatch):
    progress.record("card", "x", 1, file=file)

    class Full(sqlite3.Connection):
        def execute(self, statement, *parameters):
            if statement == "VACUUM":
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *parameters)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Full, **kwargs))
    with pytest.raises(
        progress.ProgressError, match=r"the 1 answers are deleted, but .*disk is full.*delete once more"
    ):
        progress.delete(file)
    monkeypatch.undo()
    assert progress.delete(file) == 0 and progress.events(file=file) == []


def test_a_name_that_no_file_can_have_is_an_error(tmp_path):
    for action in (progress.events, progress.delete):
        with pytest.raises(progress.ProgressError, match="FTLAB_PROGRESS"):
            action(file=tmp_path / ("x" * 300))


def test_an_empty_file_is_a_new_one(file):
    """What SQLite leaves of a first answer that was killed before it was on disk."""
    file.parent.mkdir()
    file.write_bytes(b"")
    assert progress.events(file=file) == []
    progress.record("card", "x", 1, file=file)
    assert len(progress.events(file=file)) == 1


@given(said=st.text(alphabet=st.characters(), max_size=20))
@example(said="\ud83d")  # half an emoji, from a browser
@fuzz(30)
def test_whatever_is_typed_is_kept_and_exported(said, place):
    file, target = place / "typed.sqlite", place / "typed.jsonl"
    target.unlink(missing_ok=True)
    event = progress.record("quiz", "q", 0, {"answer": said}, file=file)
    assert progress.events(file=file)[-1] == event
    count = progress.export(target, file)
    lines = target.read_bytes().decode().split("\n")
    assert len(lines) == count + 1 and json.loads(lines[-2])["detail"] == {"answer": said}
