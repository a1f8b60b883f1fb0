"""Rows for training: bad ones named, strings made into messages, three parts by group, duplicates, the loss mask.

report = read_rows("rows.jsonl")          # or .csv, .tsv, .parquet; in a notebook the report shows itself
trainer = SFTTrainer(model, train_dataset=report.dataset(), ...)
parts = split_by_group(report.rows)       # .training, .validation, .test
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import html
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

Row = dict[str, Any]
# Han, Hiragana, Katakana, Thai, Lao, Tibetan, Burmese, Khmer: scripts that write no spaces between words
SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
Twin = tuple[int, int, float]  # text number i says what text number j says; Jaccard index of their word pairs, 1: equal
KEYS = {  # kind of rows -> its keys. A prompt or an answer is a string or messages; `report.rows` keeps other keys too
    "preference": ("prompt", "chosen", "rejected"),  # DPOTrainer
    "unpaired_preference": ("prompt", "completion", "label"),  # KTOTrainer; label: true or false
    "prompt_completion": ("prompt", "completion"),  # SFTTrainer
    "messages": ("messages",),  # SFTTrainer, in a row for each assistant turn
}
FOREIGN = {  # what rows of others have -> (how one calls it, what to do with it), for a row of none of these kinds
    ("conversations",): (
        "ShareGPT's column",
        'roles = {"human": "user", "gpt": "assistant"}; row = {"messages": [{"role": roles.get(t["from"], t["from"]), '
        '"content": t["value"]} for t in row["conversations"]]}',
    ),
    ("instruction", "output"): (
        "Alpaca's columns",
        'asked = [row["instruction"], row.get("input")]; '
        'row = {"prompt": "\\n\\n".join(filter(None, asked)), "completion": row["output"]}',
    ),
    ("chosen", "rejected"): (
        "a pair without a prompt",
        "add a column `prompt`, or write both as messages whose first ones are the same; DPOTrainer takes strings "
        'as they are, load_dataset("json", data_files=...), but cuts the prompt off where they first differ',
    ),
    ("text",): (
        "text that is no prompt and answer",
        'to learn to answer, row = {"prompt": ..., "completion": ...}; to learn every token of it, SFTTrainer takes '
        'it as it is, load_dataset("json", data_files=...)',
    ),
    ("prompt",): (
        "a prompt without an answer",
        'is the answer in another column? row = {"prompt": row["prompt"], "completion": row["THAT COLUMN"]}; rows '
        'without one are for GRPOTrainer, load_dataset("json", data_files=...)',
    ),
}
ROLE_ORDER = {  # by the first letters of the roles
    "prompt": ("s?(ua)*u", "system (or not), then user and assistant in turn, user last"),
    "messages": ("s?(ua)+", "system (or not), then user and assistant in turn, assistant last"),
    "answer": ("a", "one assistant message: the loss would learn the user's turns too"),
}
FORM = '{"role": system/user/assistant, "content": text} (ShareGPT has other names; rows with tools go to load_dataset)'
TEXT_FAULTS = {  # cause -> (what one finds, why it harms)
    "odd character": (
        "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff\ufffd]",
        "binary or terminal data, or a wrong decoding (save the source as UTF-8), and the model learns it"),
    "chat marker": (
        r"<[|｜][^\s<>|｜]{1,40}[|｜]>|<(?:start|end)_of_turn>|<\|[a-z_]{1,40}>|<[a-z_]{1,40}\|>|</?s>|<(?:bos|eos)>|<</?SYS>>|"
        r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]",
        "to the tokenizer a real turn boundary; only the template may write it"),
}  # fmt: skip


@dataclass(eq=False)
class Problem(Exception):  # noqa: N818 - of a row: a report lists them, nobody sees one raised
    """Why a row cannot be used. Lines count from 1; in CSV it is the row's last one, in Parquet the row's number."""

    cause: str
    place: str  # "column 12" or "prompt[0].content"
    detail: str  # what was got, what was wanted
    line: int = 0  # filled in by read_rows

    def __str__(self) -> str:
        return f"line {self.line}{self.place and f', {self.place}'}: {self.detail[:400]}"


@dataclass
class Report:
    """Good rows, of a conversation one an answer; their kind, a key of KEYS or None; a Problem for each bad one.

    notes: what is no fault of a row, and worth knowing; only where `columns` were named.
    """

    name: str
    kind: str | None
    rows: list[Row]
    problems: list[Problem]
    notes: list[str] = field(default_factory=list)

    def dataset(self):
        """A datasets.Dataset of the good rows with the keys that TRL reads.

        Raises ValueError if no row is good, or if all labels are the same, on which KTO trains without a word.
        """
        from datasets import Dataset

        if not self.rows:
            raise ValueError(f"no good row: {self!r}")
        if self.kind == "unpaired_preference" and len(labels := {row["label"] for row in self.rows}) == 1:
            raise ValueError(f"all {len(self.rows):,} labels are {labels.pop()}: KTO needs both kinds, SFT good ones")
        keys = KEYS["prompt_completion" if self.kind == "messages" else self.kind]
        return Dataset.from_list([{key: row[key] for key in keys} for row in self.rows])

    def __repr__(self) -> str:
        head = f"{self.name}: {len(self.rows):,} good rows ({self.kind or 'no known kind'}), {len(self.problems):,} bad"
        first = {problem.cause: problem for problem in reversed(self.problems)}
        counts = Counter(problem.cause for problem in self.problems).most_common()
        lines = [f"{count:>6,}  {cause:<24} first: {first[cause]}" for cause, count in counts]
        return "\n".join([head, *lines, *(f"        {note}" for note in self.notes)])


def read_rows(
    path: str | Path,
    system: str | None = None,
    columns: Mapping[str, str | Sequence[str] | None] | None = None,
) -> Report:
    """The Report of a .jsonl, .csv, .tsv or .parquet file (.json: one object a line); its kind is that of most rows.

    A string becomes one user or assistant message, since TRL trains on bare strings without any chat template. Of a
    pair of conversations without a prompt, this is what both begin with.
    `system` is put before each prompt without a system message.

    columns: a key of KEYS or "group" -> the file's own name for it, if they differ. A number or an object becomes text
    (JSON); several columns become lines "name: value" of a prompt, or an answer in JSON. Other columns stay in the row,
    but for those whose names mean something here. Without a group, or where its cell is empty, a row is its own group.
    Blanks around names and texts are dropped, blank rows too, and a CSV file that isn't UTF-8 is read as Windows-1252;
    the notes say so.

    Raises FileNotFoundError; ValueError for another format, a column twice, or one that `columns` names and the file
    lacks.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if (suffix := path.suffix.lower()) not in readers:
        raise ValueError(f"{path.name}: got the suffix {suffix!r}, wanted {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(_no_file(path))
    notes = []
    if columns:
        encoding = {"encoding": _encoding(path, notes)} if readers[suffix] is _csv else {}
        found, more = _renamed(path.name, list(readers[suffix](path, **encoding)), columns)
        notes += more
    else:
        found = list(readers[suffix](path))
        if readers[suffix] is _csv:
            found = [(line, _with_label(row)) for line, row in found]
    found = [(line, _with_prompt(row) if isinstance(row, dict) else row) for line, row in found]
    kinds = Counter(filter(None, (_kind(row) for _, row in found if isinstance(row, dict))))
    report = Report(path.name, max(kinds, key=kinds.get, default=None), [], [], notes)
    for line, row in found:
        try:
            report.rows += _checked(row, report.kind, system)
        except Problem as problem:
            problem.line = line
            report.problems.append(problem)
    if columns:
        report.notes += _about_answers(report.rows)
    return report


def _no_file(path: Path) -> str:
    """Where one looked, and what lies there."""
    if not path.parent.is_dir():
        return f"no file {path}: there is no folder {path.parent}, seen from {Path.cwd()}"
    there = sorted(file.name for file in path.parent.iterdir() if file.is_file())
    near = difflib.get_close_matches(path.name, there, 3, cutoff=0.5) or there[:5]
    return f"no file {path}, seen from {Path.cwd()}; there is {', '.join(near) or 'nothing'} in its folder"


# --- Columns of another name --------------------------------------------------------------------------------------

MEANT = {key for kind in KEYS.values() for key in kind} | {"group", "tools", "chat_template_kwargs"}


def _renamed(
    name: str, found: list[tuple[int, Row | Problem]], columns: Mapping[str, Any]
) -> tuple[list[tuple[int, Row | Problem]], list[str]]:
    """The rows under our names, and notes: what was trimmed, columns that are not used, how many rows have no group."""
    found, columns, notes = _trimmed(name, found, columns)
    have = list(dict.fromkeys(key for _, row in found if isinstance(row, dict) for key in row))
    used = _named_columns(name, have, columns)
    made, alone = [], 0
    for line, row in found:
        if isinstance(row, dict):
            row, grouped = _with_our_names(row, columns, line)
            alone += not grouped
        made.append((line, row))
    if unused := [column for column in have if column not in used]:
        notes.append(f"columns that are not used: {', '.join(unused)}")
    if columns.get("group") is None:
        notes.append("no column of groups: each row is taken to be independent of all others")
    elif alone:
        notes.append(f"rows without a group, each taken as its own: {alone:,}")
    return made, notes


def _trimmed(
    name: str, found: list[tuple[int, Row | Problem]], columns: Mapping[str, Any]
) -> tuple[list[tuple[int, Row | Problem]], dict[str, Any], list[str]]:
    """Rows and columns without blanks around names and texts, no blank row; notes. ValueError for a name twice."""
    names = list(dict.fromkeys(key for _, row in found if isinstance(row, dict) for key in row))
    bare = {key: str(key).strip() for key in names}
    if len(set(bare.values())) < len(names):
        raise ValueError(f"{name}: got the columns {names}, wanted each name once, blanks around it aside")
    kept, notes = [], []
    for line, row in found:
        if isinstance(row, dict):
            row = {bare[key]: value.strip() if isinstance(value, str) else value for key, value in row.items()}
            if not any(value not in (None, "") for value in row.values()):
                continue
        kept.append((line, row))
    if padded := [key for key in names if key != bare[key]]:
        notes.append(f"blanks around a column's name dropped: {', '.join(map(repr, padded))}")
    if blank := len(found) - len(kept):
        notes.append(f"blank rows skipped: {blank:,}")
    asked = {}
    for ours, theirs in columns.items():
        asked[ours] = theirs.strip() if isinstance(theirs, str) else theirs and [one.strip() for one in theirs]
    return kept, asked, notes


def _named_columns(name: str, have: list[str], columns: Mapping[str, Any]) -> set[str]:
    """The columns that are used. Raises ValueError for one that the file lacks, and for a key that means nothing."""
    if strange := sorted(set(columns) - MEANT):
        raise ValueError(f"columns: got the key {strange[0]!r}, wanted prompt and completion (or messages), and group")
    used = set()
    for ours, theirs in columns.items():
        for column in [theirs] if isinstance(theirs, str) else theirs or []:
            if have and column not in have:
                raise ValueError(
                    f"{name}: got the columns {have}, wanted {column!r} for {ours}{_why(column, have, ours)}"
                )
            used.add(column)
    return used


def _why(column: str, have: list[str], ours: str) -> str:
    """The likeliest reason why a column is not there."""
    if near := difflib.get_close_matches(column.lower(), [one.lower().strip() for one in have], 1, cutoff=0.75):
        meant = next(one for one in have if one.lower().strip() == near[0])
        return f": do you mean {meant!r}?"
    if len(have) == 1:
        return ": is the one column several, parted by something else than a comma, semicolon, tab or |?"
    if ours == "group":
        return (
            ": which rows belong together (one customer, one document)? Name that column, or give "
            '{"group": None} if every row is independent of the others'
        )
    return f": name your own columns, as in {{{ours!r}: {have[-1]!r}}}"


def _with_our_names(row: Row, columns: Mapping[str, Any], line: int) -> tuple[Row, bool]:
    """The row with our names for what `columns` names, and whether it has a group."""
    made = {key: value for key, value in row.items() if key not in MEANT}
    for ours, theirs in columns.items():
        if ours != "group":
            made[ours] = _text_of(row, theirs, ours)
    group = _text_of(row, columns.get("group") or [], "group").strip()
    made["group"] = group or f"row {line}"
    return made, bool(group)


def _text_of(row: Row, theirs: str | Sequence[str], ours: str) -> Any:
    """One column's value, several as lines (a prompt, a group) or as JSON (an answer); messages as they are."""
    if isinstance(theirs, str):
        value = row.get(theirs)
        if value is None and ours == "group":
            return ""
        if isinstance(value, str) or value is None or _are_messages(value):
            return value if ours != "group" else str(value)
        if isinstance(value, float) and value != value:  # the empty cell of a Parquet file
            return "" if ours == "group" else None
        return json.dumps(value, ensure_ascii=False, default=str)
    values = {column: row.get(column) for column in theirs}
    if ours == "completion":
        return json.dumps(values, ensure_ascii=False, default=str) if any(values.values()) else None
    return "\n".join(f"{column}: {value}" for column, value in values.items() if value not in (None, ""))


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _with_label(row: Row | Problem) -> Row | Problem:
    """A row of a CSV file, whose label is a word, with true or false in its place."""
    if isinstance(row, dict) and row.get("label"):
        row["label"] = {"true": True, "false": False}.get(row["label"].strip().lower(), row["label"])
    return row


def _about_answers(rows: list[Row]) -> list[str]:
    """Notes on answers that repeat: one for all rows, a few classes, two for one prompt."""
    said = Counter(row["completion"][-1]["content"] for row in rows if "completion" in row)
    if len(rows) < 2 or not said:
        return []
    (most, times), notes = said.most_common(1)[0], []
    if len(said) == 1:
        notes.append(
            f"every answer is {short(most)}: there is nothing to learn, and any test would be passed by saying it"
        )
    elif len(said) <= max(2, len(rows) // 10):
        notes.append(f"{len(said)} different answers; {short(most)} is right in {times / len(rows):.0%} of the rows")
    spellings: dict[str, list[str]] = {}
    for answer in said:
        spellings.setdefault(answer.casefold(), []).append(answer)
    if alike := [f"{short(one)} ({said[one]})" for same in spellings.values() for one in same if len(same) > 1]:
        notes.append(f"answers that differ in capitals alone: {', '.join(alike[:6])}; write each one way")
    asked: dict[str, set[str]] = {}
    for row in rows:
        asked.setdefault(json.dumps(row["prompt"]), set()).add(row["completion"][-1]["content"])
    if repeats := len(rows) - sum(map(len, asked.values())):
        notes.append(f"rows that repeat another word for word: {repeats:,}")
    if disputed := sum(len(answers) > 1 for answers in asked.values()):
        notes.append(f"prompts that stand there with two different answers: {disputed:,}")
    return notes


def _jsonl(path: Path) -> list[tuple[int, Row | Problem]]:
    if path.suffix.lower() == ".json" and re.match(r"\s*(\[|\{\s*\n)", path.read_text("utf-8-sig", "replace")):
        raise ValueError(f"{path.name}: got an array or JSON of many lines, wanted one object a line: json.dumps(row)")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        return [(line, _parsed(text.rstrip(" \t\r\n"))) for line, text in enumerate(file, start=1) if text.strip()]


def _parsed(text: str) -> Row | Problem:
    """The object on a line, or what is wrong with it and the mistake that most often leads to it."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        rest, cause = text[error.pos :], "invalid JSON"
        why = "two rows on one line, or a Python dict written with str()? Use json.dumps"
        if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
            why = "is the file in UTF-16, as PowerShell writes it? Wanted UTF-8"
        if not rest or error.msg.startswith("Unterminated"):
            cause, why = "row cut off", "was the writer stopped? A line break inside a text is written \\n"
        return Problem(cause, f"column {error.colno}", f"{error.msg}, got {short(rest)}; {why}")
    except (ValueError, RecursionError) as error:  # a number of 4,301 digits, thousands of brackets
        return Problem("invalid JSON", "", str(error))
    return row if isinstance(row, dict) else Problem("not an object", "", f"got {short(row)}, wanted {{...}}")


def _encoding(path: Path, notes: list[str]) -> str:
    """UTF-8, or Windows-1252 where no byte above 127 makes sense in UTF-8; a note says so."""
    raw = path.read_bytes()
    text = raw.decode("utf-8-sig", "surrogateescape")
    odd = re.findall("[\udc80-\udcff]", text)
    if not odd or re.search("[\x80-\ud7ff\ue000-\U0010ffff]", text):
        return "utf-8-sig"
    try:
        raw.decode("cp1252")
    except UnicodeDecodeError:
        return "utf-8-sig"
    first = bytes([ord(odd[0]) - 0xDC00]).decode("cp1252")
    notes.append(
        f"not UTF-8: read as Windows-1252, as Excel writes it ({len(odd):,} letters, the first {first!r}); if they "
        'look wrong, save the file as "CSV UTF-8"'
    )
    return "cp1252"


def _csv(path: Path, encoding: str = "utf-8-sig") -> Iterator[tuple[int, Row | Problem]]:
    limit = csv.field_size_limit(2**31 - 1)  # of a cell, in the whole process; else 128 kB
    try:
        yield from _csv_rows(path, encoding)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, encoding: str) -> Iterator[tuple[int, Row | Problem]]:
    """The rows, up to a quote that is never closed or a cell that goes on after it: then where does a row begin?"""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f'{path.name}: got UTF-16, as Excel writes "Unicode Text"; wanted UTF-8 ("CSV UTF-8")')
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
        delimiter = _delimiter(file.readline(), path.suffix.lower())
        file.seek(0)
        quoting = csv.QUOTE_NONE if delimiter == "\t" and _without_quotes(file) else csv.QUOTE_MINIMAL
        file.seek(0)
        lines, done = csv.DictReader(file, delimiter=delimiter, strict=True, quoting=quoting), 0
        try:
            if len(set(names := lines.fieldnames or ())) < len(names):
                raise ValueError(f"{path.name}: got the columns {names}, wanted each name once")
            for row in lines:
                if None in row:
                    row = Problem("too many cells", "", f"got {short(row[None])}: quote a text with {delimiter!r}")
                yield (done := lines.line_num), row
        except csv.Error as error:
            why = f"{error}: a quote in a text is written twice. Lines after it, not read: {sum(1 for _ in file):,}"
            yield lines.reader.line_num, Problem("broken CSV", f"row after line {done}", why)


def _without_quotes(lines: Iterable[str]) -> bool:
    """Whether a table with tabs was written without quoting: a line a row, and a cell that only begins with a quote."""
    table = [line.rstrip("\r\n").split("\t") for line in lines if line.strip()]
    as_it_is = any(cell[:1] == '"' and (len(cell) == 1 or cell[-1] != '"') for cells in table for cell in cells)
    return as_it_is and len({len(cells) for cells in table}) == 1


def _delimiter(header: str, suffix: str) -> str:
    """What parts the names of the first line into most columns; in a .tsv file the tab, if there is one."""
    if suffix == ".tsv" and "\t" in header:
        return "\t"
    return max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet

    return enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)


def _kind(row: Row) -> str | None:
    """The first kind of KEYS whose keys the row has."""
    return next((kind for kind, keys in KEYS.items() if row.keys() >= set(keys)), None)


def _checked(row: Row | Problem, kind: str | None, system: str | None) -> list[Row]:
    """The row of this kind with messages for strings, a conversation cut at its answers. Raises the first Problem."""
    if isinstance(row, Problem):
        raise row
    own, keys = _kind(row), KEYS[kind or "prompt_completion"]
    if own is None:
        raise _of_no_kind(row, keys)
    if own != kind:
        raise Problem("another kind of row", "", f"got {short(list(row))}, wanted {' and '.join(keys)}, as most rows")
    if lost := [key for key in ("tools", "chat_template_kwargs") if row.get(key)]:
        raise Problem("unknown key", lost[0], f"got {short(row[lost[0]])}, lost here: such rows go to load_dataset")
    if kind == "unpaired_preference" and not isinstance(row["label"], bool):
        raise Problem("label is not true or false", "label", f"got {short(row['label'])}; SFT wants no column `label`")
    made = row | {key: _messages(row[key], key) for key in keys if key != "label"}
    if system and made[keys[0]][0]["role"] != "system":
        made[keys[0]] = [{"role": "system", "content": system}, *made[keys[0]]]
    if kind == "preference" and made["chosen"] == made["rejected"]:
        raise Problem("chosen equals rejected", "rejected", "the pair prefers nothing: was one text copied twice?")
    if kind != "messages":
        return [made]
    talk = made.pop("messages")
    return [made | {"prompt": talk[:k], "completion": [m]} for k, m in enumerate(talk) if m["role"] == "assistant"]


def _of_no_kind(row: Row, keys: Sequence[str]) -> Problem:
    """What a row without the columns of any kind is, and how it becomes one of ours."""
    columns, known = list(row), {key for kind in KEYS.values() for key in kind}
    wanted = f"got {short(columns)}, wanted {' and '.join(keys)}"
    for column in set(columns) - known:
        if meant := difflib.get_close_matches(str(column), known - row.keys(), 1, cutoff=0.75):
            return Problem("missing key", "", f"{wanted}; is {column!r} a misspelt {meant[0]!r}?")
    for theirs, (name, remedy) in FOREIGN.items():
        if row.keys() >= set(theirs):
            return Problem(name, "", f"got {short(columns)}, {name}: {remedy}")
    return Problem("missing key", "", f"{wanted}: rename your columns, or is one misspelt?")


def _with_prompt(row: Row) -> Row:
    """A pair of conversations with its prompt: the messages that both begin with, as TRL's extract_prompt takes it.

    A prompt that is given too must be the last of them. Any other row stays as it is.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return row
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    last = chosen[shared - 1] if shared else None
    if not isinstance(last, dict) or row.get("prompt", last.get("content")) != last.get("content"):
        return row
    return row | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _messages(value: Any, key: str) -> list[Row]:
    """The messages of one side of a row, made of a string or checked."""
    if isinstance(value, str) and key != "messages":
        value = [{"role": "user" if key == "prompt" else "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise Problem(f"no {key}", key, f"got {short(value)}, wanted text or messages")
    made = [_message(message, f"{key}[{i}]") for i, message in enumerate(value)]
    order, words = ROLE_ORDER.get(key, ROLE_ORDER["answer"])
    roles = [message["role"] for message in made]
    if not re.fullmatch(order, "".join(role[0] for role in roles)):
        raise Problem("wrong role order", key, f"got {short(roles)}, wanted {words}")
    return made


def _message(message: Any, place: str) -> Row:
    said = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    role, text = said.pop("role", None), said.pop("content", None)
    if role and said:
        raise Problem("unknown key", place, f"got {short(list(said))} too, wanted {FORM}")
    if role not in ("system", "user", "assistant") or not isinstance(text, str):
        raise Problem("no message", place, f"got {short(message)}, wanted {FORM}")
    if not any(c.isprintable() and not c.isspace() for c in text):
        raise Problem(f"empty {role} message", f"{place}.content", f"got {short(text)}: was it never filled?")
    for cause, (pattern, why) in TEXT_FAULTS.items():
        if found := re.search(pattern, text):
            around = text[max(0, found.start() - 12) : found.end() + 8]
            raise Problem(cause, f"{place}.content", f"got {around!r}: {why}")
    return {"role": role, "content": text}


# --- Three parts --------------------------------------------------------------------------------------------------

SIDES = ("training", "validation", "test")
FEW_GROUPS, FEW_ROWS = 5, 6
LONG_ANSWER = 5  # words


@dataclass
class Parts:
    """Rows to train on, to choose with, and to be scored on once; notes on what the split had to do.

    dealt: how the groups came to their parts. longest_row and longest_answer count tokens of
    training and validation, an answer with its end mark: 0 before `within`.
    """

    training: list[Row]
    validation: list[Row]
    test: list[Row]
    notes: list[str] = field(default_factory=list)
    longest_row: int = 0
    longest_answer: int = 0
    dealt: str = ""

    def __repr__(self) -> str:
        lines = []
        for side in SIDES:
            rows = getattr(self, side)
            groups = len({row["group"] for row in rows})
            lines.append(f"{side:10} {len(rows):>6,} rows of {groups:,} group{'s' * (groups != 1)}")
        if self.dealt:
            lines.append(self.dealt)
        if self.longest_row:
            lines.append(f"the longest row has {self.longest_row:,} tokens, the longest answer {self.longest_answer:,}")
        return "\n".join([*lines, *(f"           {note}" for note in self.notes)])

    def within(self, tokenizer, most: int) -> Parts:
        """The same parts without rows of more than `most` tokens, and the longest lengths.

        Training would cut longer rows. The lengths are of training and validation: no setting is
        read off the test. Its notes say what was left out, and nothing of the split. Raises
        ValueError if a side has no row left.
        """
        kept, left_out, lengths = {}, [], []
        for side in SIDES:
            counts = [_token_counts(row, tokenizer) for row in getattr(self, side)]
            pairs = list(zip(getattr(self, side), counts, strict=True))
            kept[side] = [row for row, (whole, _) in pairs if whole <= most]
            left_out += [whole for _, (whole, _) in pairs if whole > most]
            if side != "test":
                lengths += [count for _, count in pairs if count[0] <= most]
            if not kept[side]:
                raise ValueError(
                    f"got {len(pairs)} {side} rows, none of at most {most:,} tokens (the shortest "
                    f"has {min(whole for whole, _ in counts):,}): allow more, if the base can read "
                    "more, or cut the texts"
                )
        notes = []
        if left_out:
            notes.append(
                f"{len(left_out):,} rows of more than {most:,} tokens left out (the longest has "
                f"{max(left_out):,}): training would cut off their answers"
            )
        row, answer = max(whole for whole, _ in lengths), max(answer for _, answer in lengths)
        return Parts(**kept, notes=notes, longest_row=row, longest_answer=answer)


def _token_counts(row: Row, tokenizer) -> tuple[int, int]:
    """(tokens of the row, of its answer with what the template writes around it)."""
    start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    return len(whole), len(whole) - len(start)


def split_by_group(rows: Sequence[Row], held_out: float = 0.15, manifest: str | Path | None = None) -> Parts:
    """The rows in three Parts, no group in two of them; `held_out` is the share of validation, and of test.

    manifest: a JSON file, written here, with the part of each group. A group that stands in it
    keeps its part, whatever else the file holds by now. Other groups are dealt by a checksum of
    their names; if that leaves validation or test with less than half or more than one and a half
    times its share, the new ones are dealt by size, the largest first, each to the side that lacks
    most rows. `dealt` says which of the two was done. Fewer than three groups are split by row, and
    rows without a group go by their prompts.

    A validation row whose prompt nearly repeats a training prompt is left out, and a test row that
    repeats either. But a row of a new group that repeats a validation or test row of a group in the
    manifest goes itself. Long answers that training has too are counted and stay. Each of these is
    said in the notes. The rows of a side are shuffled, so its first rows are a random sample of it.

    Raises ValueError for rows without "group", fewer than three rows, a side that is left without
    any (with a manifest too: groups that are in it don't move), or a file that is no manifest.
    """
    if len(rows) < 3:
        raise ValueError(f"got {len(rows)} rows, wanted at least three: one to train on, one to choose, one to test")
    if any("group" not in row for row in rows):
        raise ValueError("got rows without a group, wanted one in each: read_rows(..., columns=...) gives it")
    groups = _by(lambda row: str(row["group"]), rows)
    notes = []
    if len(groups) < len(SIDES):
        notes.append(
            f"{len(groups)} group{'s' * (len(groups) > 1)}, too few for three parts: split by row, so the score is "
            "about more rows of the same kind and not about a new group"
        )
        names = _by(_name_of_row, rows)
    else:
        names = _by(lambda row: _name_of(row, groups), rows)
        if len(groups) == len(rows):
            notes.append("each row is a group: split by row")
    sizes = {name: len(members) for name, members in names.items()}
    before = _read_manifest(manifest)
    _check_names(names, before, manifest)
    old = {name: side for name, side in before.items() if name in sizes}
    side_of, how = _dealt(sizes, old, held_out)
    sides = {side: [] for side in SIDES}
    for name, members in names.items():
        sides[side_of[name]] += members
    if empty := [side for side in SIDES if not sides[side]]:
        raise ValueError(
            f"got {len(sizes)} different groups (or prompts), {len(old)} of them dealt before, and "
            f"none is left for {empty[0]}: wanted one for each part. Is it the file's manifest?"
        )
    if old and not _near(side_of, sizes, held_out):
        notes.append("the parts are far from their shares: groups dealt before don't move")
    _write_manifest(manifest, before | side_of)
    sides = {side: random.Random(0).sample(of, len(of)) for side, of in sides.items()}
    notes += _about_groups(sides, groups, len(rows))
    kept = f"; kept in {Path(manifest).name}" if manifest else ""
    dealt_before = {id(row) for name in old for row in names[name]}
    made = _without_twins(_without_repeats_of_old(sides, dealt_before, notes), notes)
    notes += _about_long_answers(made)
    return Parts(**made, notes=notes, dealt=f"dealt {how}{kept}")


def _by(key: Callable[[Row], str], rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _name_of(row: Row, groups: Mapping[str, list[Row]]) -> str:
    """The group; of a row that `read_rows` made its own group, one that doesn't change with its line."""
    group = str(row["group"])
    alone = len(groups[group]) == 1 and re.fullmatch(r"row \d+", group)
    return _name_of_row(row) if alone else group


def _name_of_row(row: Row) -> str:
    digest = hashlib.sha256(_prompt_text(row).encode("utf-8", "surrogatepass"))
    return f"prompt {digest.hexdigest()[:12]}"


def _read_manifest(file: str | Path | None) -> dict[str, str]:
    """The part of each group that was dealt before, {} without a file."""
    if file is None or not Path(file).is_file():
        return {}
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(found.values()) <= set(SIDES):
        raise ValueError(
            f"{file}: got no manifest of a split, wanted one JSON object, a group's name -> "
            f"{', '.join(SIDES)}. Was it edited? A new one would move rows between test and training"
        )
    return found


def _check_names(names: Mapping[str, list[Row]], before: Mapping[str, str], manifest: str | Path | None) -> None:
    """Raises ValueError if rows that were dealt one by one are now dealt as groups, or reversed."""
    for name, members in names.items():
        for row in members:
            others = {str(row["group"]), _name_of_row(row)} - {name}
            if found := others & before.keys():
                raise ValueError(
                    f"{manifest}: the rows of {name!r} were dealt as {found.pop()!r} before, so some "
                    "would move between training and test. Did the column of groups change? Split "
                    "with a new manifest, and take new rows for the test"
                )


def _write_manifest(file: str | Path | None, side_of: Mapping[str, str]) -> None:
    if file is None:
        return
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(side_of, indent=1, ensure_ascii=False), encoding="utf-8")
    part.replace(file)


def _dealt(sizes: Mapping[str, int], old: Mapping[str, str], held_out: float) -> tuple[dict[str, str], str]:
    """The side of each group, old ones as before, and how the others were dealt."""
    side_of = _by_checksum(sizes, held_out) | old
    how = "by a checksum of each group's name"
    if len(old) < len(sizes) and not _near(side_of, sizes, held_out):
        side_of = _by_size(sizes, old, held_out)
        how = "by size, since a checksum left uneven parts"
    if not old:
        return side_of, how
    new = len(sizes) - len(old)
    return side_of, f"before: {len(old):,} groups" + (f"; {new:,} new ones {how}" if new else "")


def _checksum(name: str) -> float:
    """From 0 to 1, the same each time."""
    digest = hashlib.sha256(f"0 {name}".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def _by_checksum(sizes: Mapping[str, int], held_out: float) -> dict[str, str]:
    """The side of each group: the lowest checksums are test, the next validation."""
    side_of = {}
    for name in sizes:
        place = _checksum(name)
        side_of[name] = "test" if place < held_out else "validation" if place < 2 * held_out else "training"
    return side_of


def _by_size(sizes: Mapping[str, int], old: Mapping[str, str], held_out: float) -> dict[str, str]:
    """The side of each group, the largest new one first, to the side that lacks most rows; none stays empty."""
    total, side_of = sum(sizes.values()), dict(old)
    lacks = {"training": (1 - 2 * held_out) * total, "validation": held_out * total, "test": held_out * total}
    for name, side in old.items():
        lacks[side] -= sizes[name]
    in_order = sorted(sizes.keys() - old.keys(), key=lambda name: (-sizes[name], _checksum(name)))
    for done, name in enumerate(in_order):
        empty = [side for side in SIDES if side not in side_of.values()]
        choice = empty if len(in_order) - done <= len(empty) else SIDES
        side_of[name] = max(choice or SIDES, key=lacks.get)
        lacks[side_of[name]] -= sizes[name]
    return side_of


def _near(side_of: Mapping[str, str], sizes: Mapping[str, int], held_out: float) -> bool:
    """Whether validation and test have between half and one and a half times their share of the rows."""
    wanted = held_out * sum(sizes.values())
    for side in ("validation", "test"):
        got = sum(size for name, size in sizes.items() if side_of[name] == side)
        if not 0.5 * wanted <= got <= 1.5 * wanted:
            return False
    return True


def _about_groups(sides: Mapping[str, list[Row]], groups: Mapping[str, list[Row]], total: int) -> list[str]:
    """Notes on a group with most of the rows, and on a test of few groups or few rows."""
    notes = []
    largest = max(groups, key=lambda name: len(groups[name]))
    if len(groups) >= len(SIDES) and len(groups[largest]) > total / 2:
        notes.append(
            f"group {short(largest)} has {len(groups[largest]) / total:.0%} of the rows; all of them are trained on"
        )
    tested = len({row["group"] for row in sides["test"]})
    if len(SIDES) <= len(groups) < total and tested < FEW_GROUPS:
        notes.append(f"groups in the test: {tested}; others may differ by more than its interval says")
    if len(sides["test"]) < FEW_ROWS:
        notes.append(f"rows in the test: {len(sides['test'])}, too few to tell two models apart; collect more")
    return notes


def _without_repeats_of_old(
    sides: Mapping[str, list[Row]], dealt_before: set[int], notes: list[str]
) -> dict[str, list[Row]]:
    """The sides without new rows that nearly repeat an old row of a later side; a note counts them.

    dealt_before: the ids of the rows whose groups stood in the manifest. What was tested last month
    is tested again, so that two scores can be compared.
    """
    made = dict(sides)
    for place, side in enumerate(SIDES[:-1]):
        later = [row for after in SIDES[place + 1 :] for row in sides[after] if id(row) in dealt_before]
        new = [row for row in sides[side] if id(row) not in dealt_before]
        twins = leakage([_prompt_text(row) for row in later], [_prompt_text(row) for row in new])
        if twins:
            repeats = {id(new[number]) for number, _, _ in twins}
            made[side] = [row for row in sides[side] if id(row) not in repeats]
            notes.append(
                f"{len(repeats):,} new {side} rows left out: they nearly repeat a row that was held out before"
            )
    return made


def _about_long_answers(sides: Mapping[str, list[Row]]) -> list[str]:
    """A note on held-out rows whose answer, of five words or more, is that of a training row."""
    known = _long_answers(sides["training"])
    held_out = [row for side in SIDES[1:] for row in sides[side]]
    shared = sum(_answer(row) in known for row in held_out)
    if not shared:
        return []
    return [
        f"{shared:,} of {len(held_out):,} held-out rows have an answer of five words or more that training has too: "
        "set phrases, or one text in two groups?"
    ]


def _answer(row: Row) -> str:
    return row["completion"][-1]["content"]


def _long_answers(rows: Iterable[Row]) -> set[str]:
    """The answers of five words or more; shorter ones, such as classes, may well be the same in two rows."""
    return {answer for answer in map(_answer, rows) if len(answer.split()) >= LONG_ANSWER}


def _without_twins(sides: Mapping[str, list[Row]], notes: list[str]) -> dict[str, list[Row]]:
    """The sides without held-out rows whose prompt nearly repeats one of a side before; a note says how many."""
    made, before = {"training": sides["training"]}, [_prompt_text(row) for row in sides["training"]]
    for side in ("validation", "test"):
        texts = [_prompt_text(row) for row in sides[side]]
        repeats = {number for number, _, _ in leakage(before, texts)}
        made[side] = [row for number, row in enumerate(sides[side]) if number not in repeats]
        before += texts
        if repeats:
            notes.append(f"{len(repeats):,} {side} rows left out: they nearly repeat a prompt of a part before")
        if not made[side]:
            raise ValueError(
                f"every {side} row nearly repeats a training row (the first: {short(texts[0])}): were they made from "
                "one template? Then name the template, or the source, as the group"
            )
    return made


def _prompt_text(row: Row) -> str:
    return "\n".join(message["content"] for message in row["prompt"] if message["role"] != "system")


def unseen(rows: Sequence[Row], shown: Sequence[Row]) -> list[Row]:
    """The rows that repeat no shown row: neither its prompt, nearly, nor its answer of five words or more.

    Two notes of one sentence differ in every typo and have one answer, so who has read the first
    has read both.
    """
    twins = leakage(list(map(_prompt_text, shown)), list(map(_prompt_text, rows)))
    repeats = {number for number, _, _ in twins}
    known = _long_answers(shown)
    return [row for number, row in enumerate(rows) if number not in repeats and _answer(row) not in known]


def fingerprint(rows: Sequence[Row]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the rows' prompts and answers, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        both = json.dumps([row["prompt"], row["completion"]], sort_keys=True)
        digest.update(both.encode())
    return digest.hexdigest()[:12]


# --- Reasoning ------------------------------------------------------------------------------------------------------

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")


def answer_of(text: str) -> str:
    """What follows the reasoning; "" if the reasoning never ends, and the text itself if there is none."""
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after.lstrip()
    return "" if "<think>" in text else text


def settle_thinking(tokenizer, rows: Sequence[Row]) -> str:
    """Switches the thinking off in a template that has the switch, if no row reasons, and says what was done.

    A line at the template's start sets enable_thinking to false, so training, answers, the saved model and its server
    agree: the prompt ends with the empty reasoning, and an answer is the answer alone.
    """
    template = tokenizer.chat_template
    reasoned = sum("<think>" in EMPTY_THOUGHT.sub("", row["completion"][-1]["content"]) for row in rows)
    if reasoned == len(rows):
        return "every row reasons before its answer, so the model learns to"
    if reasoned:
        return f"{reasoned:,} of {len(rows):,} rows reason, so the model learns to do either: is that meant?"
    if not isinstance(template, str) or "enable_thinking" not in template:
        return "no row reasons, and the template has no switch for it"
    if not template.startswith(OFF):
        tokenizer.chat_template = OFF + template
    return "no row reasons, so thinking is switched off in the template"


OFF = "{%- set enable_thinking = false -%}\n"


# --- Duplicates -----------------------------------------------------------------------------------------------------


def leakage(train_texts: Sequence[str], test_texts: Sequence[str], threshold: float = 0.85) -> list[Twin]:
    """A Twin for each test text that a train text repeats: the first number counts in test, the second in train."""
    found = near_duplicates([*train_texts, *test_texts], threshold, n := len(train_texts))
    return [(i - n, of, similarity) for i, of, similarity in found if i >= n]


def near_duplicates(texts: Sequence[str], threshold: float = 0.85, known: int | None = None) -> list[Twin]:
    """One Twin per text that nearly repeats an earlier text (or, with `known`, one of the first `known`).

    It names the most similar. Without `known` a repeat counts as no earlier text: drop these, and each stands once.
    Compared are pairs of neighbouring words, without case, punctuation and extra spaces; in a script that writes no
    spaces (Chinese, Japanese, Thai, ...) every two neighbouring characters are a word. MinHash finds the candidates
    (of pairs at the threshold it misses one in a thousand), and each is then counted exactly.
    """
    from datasketch import MinHash, MinHashLSH

    r = max((r for r in range(1, 65) if (1 - threshold**r) ** (128 // r) < 1e-3), default=1)  # rows of a band
    near, blank = MinHashLSH(threshold, num_perm=128, params=(128 // r, r)), MinHash(128)
    seen, found = {}, []
    for i, text in enumerate(texts):
        pairs, sketch = _word_pairs(text), blank.copy()
        sketch.update_batch([pair.encode("utf-8", "surrogatepass") for pair in pairs])
        alike = [(len(pairs & seen[j]) / len(pairs | seen[j]), -j) for j in near.query(sketch)]
        similarity, j = max(alike, default=(0, 0))
        if similarity >= threshold:
            found.append((i, -j, similarity))
        if similarity < (threshold if known is None else 1) and (known is None or i < known):  # of equals the first
            seen[i] = pairs
            near.insert(i, sketch)
    return found


def _word_pairs(text: str) -> set[str]:
    """Each two neighbouring words of a text; of one word, that word."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if re.search(f"[{SPACELESS}]", text):
        between = f"[^\\w\\s{SPACELESS}]+"  # punctuation
        text = re.sub(f"(?<=[{SPACELESS}]){between}|{between}(?=[{SPACELESS}])", " ", text)
        text = re.sub(f"[{SPACELESS}]+", _characters_as_words, text)
    words = [word.strip(".,;:!?\"'()[]{}*_-…") or word for word in text.split()]
    return {" ".join(words[k : k + 2]) for k in range(max(1, len(words) - 1))}


def _characters_as_words(run: re.Match) -> str:
    """The overlapping pairs of its characters, as Lucene's CJKBigramFilter makes words: "abc" -> " ab bc "."""
    run = run.group()
    pairs = [run[k : k + 2] for k in range(max(1, len(run) - 1))]
    return f" {' '.join(pairs)} "


@dataclass(frozen=True)
class Mask:
    """A row as the model sees it: its ids, and 1 for each that counts in the loss."""

    input_ids: list[int]
    completion_mask: list[int]
    pieces: list[tuple[str, int]]  # the text of a token, or of several that make one character, and whether it counts

    @classmethod
    def of(cls, input_ids: Sequence[int], mask: Sequence[int], tokenizer) -> Mask:
        """The view of ids and their mask, wherever they come from: a trainer's row, a template's assistant_masks."""
        pieces, start, before = [], 0, []
        for end, (_, bit) in enumerate(zip(input_ids, mask, strict=True), start=1):
            text = tokenizer.decode([*before, *input_ids[start:end]]).removeprefix(tokenizer.decode(before))
            if not text.endswith("\ufffd") or end - start > 4 or end == len(mask):  # a character, or the ids' end
                pieces.append((text, bit))
                before, start = list(input_ids[start:end]), end  # alone, the next would lose its space in Llama 2's
        return cls(list(input_ids), list(mask), pieces)

    def __repr__(self) -> str:
        return f"{sum(self.completion_mask)} of {len(self.input_ids)} tokens count in the loss"

    def _repr_html_(self) -> str:
        tags = ('<span style="opacity:0.65">', "</span>"), ('<mark style="background:#9fe0cd;color:#111">', "</mark>")
        parts = [(*tags[bit], html.escape(piece).replace("\n", "↵"), piece.count("\n")) for piece, bit in self.pieces]
        text = "".join(f"{start}{said}{end}{'<br>' * breaks}" for start, end, said, breaks in parts)
        return f'<b>{self}</b><div style="font-family:monospace;white-space:pre-wrap">{text}</div>'


def show_mask(row: Row, tokenizer) -> Mask:
    """A prompt and an answer, messages, in the chat template; what counts in the loss is marked: answer, end of turn.

    Equals the labels of TRL's SFTTrainer: tests/test_data.py. Of a pair, `chosen` is shown.
    Raises ValueError where TRL only warns: a prompt whose ids do not begin the whole.
    """
    prompt, answer = row["prompt"], row["chosen" if "chosen" in row else "completion"]
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(prompt + answer, return_dict=False)
    if ids[: len(start)] != start:
        raise ValueError("no mask is right: what stands before an answer is not the prompt with the generation prompt")
    return Mask.of(ids, [0] * len(start) + [1] * (len(ids) - len(start)), tokenizer)


def check_template(tokenizer) -> list[str]:
    """The traps of a tokenizer and its template that spoil training without a word, and their remedies; [] if none."""
    prompt, answer = [{"role": "user", "content": "What is six times seven?"}], "Forty-two."
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    after = text.rpartition(answer)[2] if answer in text else ""
    ends = [i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    between = text[len(start) :].partition(answer)[0] if text.startswith(start) and answer in text else ""
    return [trap for is_there, trap in [
        (bos is not None and tokenizer(text)["input_ids"][:2] == [bos, bos],
         f"double BOS: template and tokenizer write {tokenizer.bos_token}; tokenize with add_special_tokens=False"),
        (pad is None, "no pad token: TRL takes the end token instead; set pad_token to a token that no text uses"),
        (pad is not None and pad in (eos, *ends),
         f"pad is the end token ({tokenizer.pad_token!r}): masking it by id masks the end of turn; set an unused one"),
        (not ends, f"no end of turn: after the answer comes {after!r}; let the template write eos_token there"),
        (ends and eos not in ends,
         f"the end of turn is not eos: {tokenizer.convert_ids_to_tokens(ends)} ends a turn; set eos_token to it"),
        (not text.startswith(start),
         f"generation prompt differs from training: asked with ...{start[-30:]!r}, trained on "
         f"...{text[max(0, len(start) - 30) :][:42]!r}; let add_generation_prompt write what stands before an answer"),
        (between,
         f"thinking: before an answer the template writes {between!r}, which is not in the prompt: a model trained on "
         "rows without reasoning writes it too. Set enable_thinking=False in training and in use, and score what "
         "comes after it"),
    ] if is_there]  # fmt: skip
