"""Training data: read it, report every bad row, drop duplicates, render it with its loss mask.

A row is a plain dict of one of three kinds; extra keys such as id or tags are kept:

    chat                {"messages": [{"role": ..., "content": ...}, ...]}
    prompt_completion   {"prompt": ..., "completion": ...}
    preference          {"prompt": ..., "chosen": ..., "rejected": ...}

A prompt, completion, chosen or rejected is a string or a list of messages; one row does not mix the two.
Roles are system (first, optional), user and assistant in turn; an answer is one assistant message.
"""

from __future__ import annotations

import codecs
import html
import json
import math
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice, takewhile
from mmap import ACCESS_READ, mmap
from pathlib import Path
from reprlib import repr as short
from types import UnionType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Messages = list[dict[str, str]]

KEYS = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
}
ROLES = ("system", "user", "assistant")
TRIAGE_SYSTEM = "Triage the ticket. Answer with one JSON object."
REPLY_SYSTEM = "Reply to the customer in English."


# --- Reading and validating -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Why one line of a file is no row: `cause` in words that can be counted, `where` and `detail` for this line."""

    file: str
    line: int  # from 1
    where: str  # "byte 12", "column 12" (in characters) or "messages[1].role"
    cause: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.cause}{self.where and f' at {self.where}'}: {self.detail}"


@dataclass(frozen=True)
class Report:
    """The good rows of a file, the line of each, and one Problem for each bad line."""

    file: str
    rows: list[Row]
    lines: list[int]
    problems: list[Problem]


class _RowError(Exception):
    """A row's fault, with the last three fields of Problem as its args; a place or a detail is never endless."""

    def __init__(self, where: str, cause: str, detail: str) -> None:
        where, detail = (text if len(text) <= 400 else f"{text[:397]}..." for text in (where, detail))
        super().__init__(where, cause, detail)


def read_jsonl(path: str | Path, kind: str, max_line_bytes: int = 1_000_000) -> Report:
    """The Report of a JSON Lines file: each line is either a good row of this kind or the line of one Problem.

    Only the first fault of a line is told. Accepted: CRLF line ends, a UTF-8 byte order mark at the start, a last line
    without a line break, one blank line at the end. A longer line than `max_line_bytes` is never held in memory.
    A UTF-16 file is one Problem, at line 1.

    Raises FileNotFoundError or IsADirectoryError for the path and ValueError for the kind, never for what a row holds.
    A file that is larger than memory: `scan`.
    """
    report = Report(Path(path).name, [], [], [])
    for line, found in scan(path, kind, max_line_bytes):
        if isinstance(found, Problem):
            report.problems.append(found)
        else:
            report.rows.append(found)
            report.lines.append(line)
    return report


def scan(path: str | Path, kind: str, max_line_bytes: int = 1_000_000) -> Iterator[tuple[int, Row | Problem]]:
    """(line, row or Problem) of each line, one at a time: `read_jsonl` in the memory of one line, and raising the same.

    So a file that is larger than memory goes from disk to disk (bench/rows.py measures each step):

        rows = Rows(path, kind)
        repeats = {duplicate.row for duplicate in duplicates(rows, text)}
        tokens = on_disk(tokenize((row for i, row in enumerate(rows) if i not in repeats), tokenizer), "tokens.arrow")
    """
    return ((line, found) for line, _, found in _scan(path, partial(_check, kind=_known(kind)), max_line_bytes))


def _known(kind: str) -> str:
    if kind not in KEYS:
        raise ValueError(f"got kind={kind!r}, wanted one of {', '.join(KEYS)}")
    return kind


def _scan(path: str | Path, check: Callable[[Row], None], limit: int) -> Iterator[tuple[int, int, Row | Problem]]:
    """(line, where it begins in the file, row or Problem), with any check.

    What is wrong with the path is raised here, not at the first line.
    """
    path = Path(path)
    if limit < 1:
        raise ValueError(f"got max_line_bytes={limit}, wanted 1 or more")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; wanted one .jsonl file, such as one of {_names(path)}")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; its folder holds {_names(path.parent)}")
    return _found(path, check, limit)


def _found(path: Path, check: Callable[[Row], None], limit: int) -> Iterator[tuple[int, int, Row | Problem]]:
    utf16, blank = False, None
    with path.open("rb") as file:
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.read(3)
        end = file.tell()
        for line, raw, size in _lines(file, limit):
            begin, end = end, end + size
            if blank:
                yield blank
                blank = None
            try:
                if line == 1 and (utf16 := bool(_UTF16.match(raw))):
                    raise _RowError("", "UTF-16 file", "the whole file is UTF-16 (Windows?); save it again as UTF-8")
                if utf16 and b"\0" in raw:
                    continue  # told once, at line 1; UTF-8 lines that were appended later are still read
                row = _parse(raw, size, limit)
                check(row)
            except _RowError as bad:
                problem = line, begin, Problem(path.name, line, *bad.args)
                if bad.args == _BLANK:
                    blank = problem  # told if a line follows: one blank line at the end of a file harms nobody
                else:
                    yield problem
            else:
                yield line, begin, row


class Rows(Sequence):
    """The good rows of a JSON Lines file, each read from the mapped file when it is asked for: 8 bytes a row in memory.

    `problems` holds a Problem for each bad line. The file must stay as it is. Raises what `read_jsonl` raises.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        self.problems, self._begins = [], array("Q")
        for _, begin, found in _scan(path, partial(_check, kind=_known(kind)), limit=1_000_000):
            if isinstance(found, Problem):
                self.problems.append(found)
            else:
                self._begins.append(begin)
        if self._begins:
            with open(path, "rb") as file:
                self._file = mmap(file.fileno(), 0, access=ACCESS_READ)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        begin = self._begins[i]
        end = self._file.find(b"\n", begin)
        return json.loads(self._file[begin : end if end > 0 else None].decode())


_UTF16 = re.compile(rb'(\xff\xfe)?[{\[]\0[\s"]\0|(\xfe\xff)?\0[{\[]\0[\s"]')
_BLANK = ("", "blank line", "wanted one JSON object per line")
_CONTROL = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")


def _names(folder: Path) -> str:
    """What a folder holds, in a few words."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"


def _lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes, int]]:
    """Number, first bytes and size of each line. `raw` is complete for lines up to `limit`, plus a line break."""
    line = 0
    while raw := file.readline(limit + 2):
        line, size, tail = line + 1, len(raw), raw
        while not tail.endswith(b"\n") and (tail := file.readline(1 << 16)):
            size += len(tail)
        yield line, raw, size


def _parse(raw: bytes, size: int, limit: int) -> Row:
    """The JSON object on one line. Raises _RowError with the place and the likely cause."""
    if size > len(raw) or len(raw.rstrip(b"\r\n")) > limit:
        raise _RowError("", "line too long", f"{size:,} bytes, wanted at most {limit:,}: are its line breaks missing?")
    if not raw.strip():
        raise _RowError(*_BLANK)
    if control := _CONTROL.search(raw):
        cause = "NUL byte" if control[0] == b"\0" else "control character"
        detail = f"0x{control[0].hex()} in the text: a crash while writing, terminal output, or binary data?"
        raise _RowError(f"byte {control.start() + 1}", cause, detail)
    cut = not raw.endswith(b"\n")
    try:
        text = raw.decode()
        if text.startswith("\ufeff"):
            raise _RowError(
                "column 1", "byte order mark", "U+FEFF in mid-file: were files joined that each began with one?"
            )
        row = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        if cut and error.reason == "unexpected end of data":
            raise _RowError(*_TRUNCATED) from None
        around = raw[max(0, error.start - 12) : error.start + 8].decode("cp1252", "replace")
        detail = f"0x{raw[error.start]:02X} is not UTF-8; if it was saved as Windows-1252, this reads {around!r}"
        raise _RowError(f"byte {error.start + 1}", "not UTF-8", detail) from None
    except json.JSONDecodeError as error:
        ends_early = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        if cut and text.lstrip().startswith("{") and (ends_early or not text.rstrip().endswith("}")):
            raise _RowError(*_TRUNCATED) from None
        rest = text[error.pos :].rstrip()
        detail = f"{error.msg}, got {short(rest) if rest else 'nothing'}; {_likely_json_cause(text, error, ends_early)}"
        raise _RowError(f"column {error.colno}", "invalid JSON", detail) from None
    except RecursionError:
        raise _RowError(*_TOO_DEEP) from None
    except ValueError:  # what Python says to an integer of more than 4,300 digits
        raise _RowError("", "number too long", "over 4,300 digits; is it a text without its quotes?") from None
    if not isinstance(row, dict):
        hint = {list: "is this a .json file in one piece? Write one object per line", str: "was the row encoded twice?"}
        raise _RowError(
            "", "not an object", f"got {short(row)}, wanted {{...}}; {hint.get(type(row), 'is this a row?')}"
        )
    return row


_TOO_DEEP = ("", "nested too deeply", "over 100 brackets inside each other, wanted a flat row")
_TRUNCATED = ("", "truncated last line", "the file ends in the middle of a row: was a download or its writer cut off?")


def _likely_json_cause(text: str, error: json.JSONDecodeError, ends_early: bool) -> str:
    """The mistake that most often gives this JSON error."""
    if ends_early:
        return "is one row spread over several lines? A line break inside a string is written \\n"
    if text[error.pos :].startswith(("'", "True", "False", "None")):
        return "is this a Python dict written with str()? Use json.dumps"
    if error.msg == "Extra data":
        return "are two rows on one line?"
    return "was it edited by hand? Use json.dumps"


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """The object of these pairs. json alone would keep the last of two equal keys and say nothing."""
    row = dict(pairs)
    if len(row) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RowError("", "duplicate key", f"got {short(key)} twice in one object: which value is meant?")
    return row


def _finite(text: str) -> float:
    """The number, for json's parse_float and parse_constant: NaN, Infinity and 1e999 are refused."""
    if not math.isfinite(value := float(text)):
        raise _RowError(
            "", "NaN or Infinity", f"got {text[:20]}, which JSON does not have; write null or leave the key out"
        )
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)


def _check(row: Row, kind: str) -> None:
    """Nothing for a good row of this kind. Raises _RowError for the first fault."""
    for key in KEYS[kind]:
        if key not in row:
            wanted = ", ".join(KEYS[kind])
            raise _RowError(key, "missing key", f"got the keys {short(list(row))}, wanted {wanted}: is one misspelt?")
    if _SUSPECT.search("\n".join(_texts(row))):
        for where, text in _strings(row):
            if found := _TEXT_FAULTS.search(text):
                cause, detail = _WHY[found.lastgroup]
                raise _RowError(where, cause, f"{short(text[max(0, found.start() - 10) : found.end() + 10])}: {detail}")
    for key in KEYS[kind]:
        value = row[key]
        if not isinstance(value, str) or key == "messages":
            _check_messages(value, key)
        elif not _shows(value):
            raise _not_shown(value, key, key)
    if len({type(row[key]) for key in KEYS[kind]}) > 1:
        raise _RowError("", "wrong type", "got strings and message lists in one row; TRL looks at one field for all")
    if kind == "preference" and row["chosen"] == row["rejected"]:
        raise _RowError("rejected", "chosen equals rejected", "the pair prefers nothing: was one text copied twice?")


_WHY = {
    "surrogate": ("lone surrogate", "half a character, which no file can store: was an emoji cut in two?"),
    "replacement": ("replacement character", "U+FFFD: a wrong decoding lost a character here; read the source again"),
    "bom": ("byte order mark", "U+FEFF is invisible and still becomes a token; remove it"),
    "nul": ("NUL byte", "U+0000 in the text: binary data, or a fixed-width field?"),
    "control": ("control character", "invisible, but a token: from a terminal, or Windows-1252 read as Latin-1?"),
    "marker": ("chat marker", "to the tokenizer a real turn boundary; only the template may write it"),
}
_TEXT_FAULTS = re.compile(
    "(?P<surrogate>[\ud800-\udfff])|(?P<replacement>\ufffd)|(?P<bom>\ufeff)|(?P<nul>\0)"
    "|(?P<control>[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f])"
    r"|(?P<marker><[|\uff5c][^\s<>|\uff5c]{1,40}[|\uff5c]>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]|<</?SYS>>)"
)


# A character of every match above and few others: almost all rows are done with one quick search for it.
_SUSPECT = re.compile("[<[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffd]")


def _texts(row: Row) -> list[str]:
    """Every string inside a row, keys included. Raises _RowError for brackets more than 100 deep."""
    texts, level = [], [row]
    for _ in range(100):
        inner = []
        for value in level:
            if isinstance(value, str):
                texts.append(value)
            elif isinstance(value, dict):
                texts += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if not inner:
            return texts
        level = inner
    raise _RowError(*_TOO_DEEP)


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Each string inside a JSON value with its path, keys included."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _strings(item, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            path = f"{where}.{key}".lstrip(".") if key.isidentifier() else f"{where}[{short(key)}]"
            yield path, key
            yield from _strings(item, path)


def _shows(text: Any) -> bool:
    """Whether this is a string that shows something on paper."""
    if isinstance(text, str):
        for c in text:
            if c.isprintable() and not c.isspace():
                return True
    return False


def _not_shown(text: Any, where: str, name: str) -> _RowError:
    if not isinstance(text, str):
        return _RowError(where, "wrong type", f"got {short(text)}, wanted a string")
    return _RowError(where, f"empty {name}", f"got {short(text)}: a failed export, or a field that was never filled?")


def _check_messages(messages: Any, key: str) -> None:
    """Raises _RowError unless these are messages whose roles alternate and begin and end as `key` needs."""
    if not isinstance(messages, list):
        raise _RowError(
            key, "wrong type", f"got {short(messages)}, wanted a {'' if key == 'messages' else 'string or '}list"
        )
    if not messages:
        raise _RowError(key, "no messages", "got an empty list: did a filter remove every turn?")
    for i, message in enumerate(messages):
        where = f"{key}[{i}]"
        if not isinstance(message, dict):
            raise _RowError(where, "wrong type", f'got {short(message)}, wanted {{"role": ..., "content": ...}}')
        for name in ("role", "content"):
            if name not in message:
                raise _RowError(f"{where}.{name}", "missing key", f"got {short(message)}: ShareGPT's from and value?")
        if message["role"] not in ROLES:
            hint = f"wanted {', '.join(ROLES)} (ShareGPT's human is user, its gpt is assistant)"
            raise _RowError(f"{where}.role", "unknown role", f"got {short(message['role'])}, {hint}")
        if not _shows(message["content"]):
            raise _not_shown(message["content"], f"{where}.content", f"{message['role']} message")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" and key in ("messages", "prompt") else roles
    if key not in ("messages", "prompt"):
        good, wanted = roles == ["assistant"], "one assistant message (the loss would also learn user turns)"
    else:
        end = "assistant" if key == "messages" else "user"
        alternating = turns == [("user", "assistant")[i % 2] for i in range(len(turns))]
        good, wanted = alternating and turns[-1:] == [end], f"[system,] user, assistant in turn, {end} last"
    if not good:
        raise _RowError(key, "wrong role order", f"got {short(roles)}, wanted {wanted}")


# --- Duplicates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duplicate:
    """Row number `row` says the same as row number `of`; `similarity` is their Jaccard index over word pairs."""

    row: int
    of: int
    kind: str  # "exact" (same words) or "near"
    similarity: float


def deduplicate(
    rows: Sequence[Row], text: Callable[[Row], str], threshold: float = 0.85
) -> tuple[list[Row], list[Duplicate]]:
    """The rows that repeat no earlier kept row, and a Duplicate for each other row, numbered as in `rows`.

    "Exact" ignores case, white space, the punctuation around words and Unicode's compatibility forms. "Near" is a
    Jaccard index of at least `threshold` over pairs of neighbouring words: one changed word out of n leaves
    (n - 3) / (n + 1), which passes 0.85 from 26 words on. MinHash only proposes; each candidate is counted exactly.
    Give `text` what must not repeat, usually the prompt: two answers to one question are worth a look.
    """
    dropped = duplicates(rows, text, threshold)
    repeats = {duplicate.row for duplicate in dropped}
    return [row for i, row in enumerate(rows) if i not in repeats], dropped


def duplicates(rows: Sequence[Row], text: Callable[[Row], str], threshold: float = 0.85) -> list[Duplicate]:
    """What `deduplicate` drops. It holds no row, so Rows stay on disk."""
    index, dropped = _Index(rows, text, threshold), []
    for i in index.suspects():
        if found := index.similar(i):
            dropped.append(Duplicate(i, *found[0]))
        else:
            index.add(i)
    return dropped


_PERMUTATIONS = 128


class _Index:
    """Which rows say nearly the same, by MinHash: similar(i) searches among the rows that were given to add().

    A row's 128 hashes are cut into bands of r, and rows that share a band are candidates: a pair of similarity s with
    probability 1 - (1 - s^r)^b, for b bands. r is the largest that misses a pair at the threshold less than once in a
    thousand; false candidates cost little, as each is counted exactly. All that is kept of a row is one number of 8
    bytes a band (144 bytes at 0.85), and more only where another row has the same.
    """

    def __init__(self, rows: Sequence[Row], text: Callable[[Row], str], threshold: float) -> None:
        import numpy as np

        if not 0.1 <= threshold <= 1:
            raise ValueError(f"got threshold={threshold}, wanted a Jaccard index from 0.1 to 1")
        self.threshold = threshold
        self._words = lru_cache(10_000)(lambda i: _words(text(rows[i])))  # so that twins are not read again and again
        self._bands = _bands(rows, text, threshold)  # (rows, b)
        self._shared = np.zeros(self._bands.shape, bool)  # whether another row has the same number there
        for band, shared in zip(self._bands.T, self._shared.T, strict=True):
            order = band.argsort()
            same = band[order[1:]] == band[order[:-1]]
            shared[order[1:][same]] = shared[order[:-1][same]] = True
        self._added = defaultdict(list)  # (band, its number) -> rows

    def suspects(self) -> Iterator[int]:
        """The rows that share a band with another one: only these can be similar to any."""
        yield from map(int, self._shared.any(axis=1).nonzero()[0])

    def _keys(self, i: int) -> list[tuple[int, int]]:
        return [(band, int(self._bands[i, band])) for band in map(int, self._shared[i].nonzero()[0])]

    def add(self, i: int) -> None:
        for key in self._keys(i):
            self._added[key].append(i)

    def similar(self, i: int) -> list[tuple[int, str, float]]:
        """(row, exact or near, similarity) of each added row at or above the threshold, the most similar first."""
        found, (words, pairs) = [], self._words(i)
        for j in {j for key in self._keys(i) for j in self._added[key]}:
            others, other_pairs = self._words(j)
            similarity = len(pairs & other_pairs) / len(pairs | other_pairs)
            if similarity >= self.threshold:
                found.append((j, "exact" if words == others else "near", similarity))
        return sorted(found, key=lambda match: (-match[2], match[1], match[0]))


def _words(text: str) -> tuple[list[str], set[str]]:
    """A text's words and its set of neighbouring word pairs."""
    tokens = unicodedata.normalize("NFKC", text).casefold().split()
    words = [token.strip(".,;:!?\"'()[]{}*_-…") or token for token in tokens]
    return words, {" ".join(words[i : i + 2]) for i in range(max(1, len(words) - 1))}


def _bands(rows: Iterable[Row], text: Callable[[Row], str], threshold: float) -> np.ndarray:
    """(rows, b): each band of a row's MinHash as one number of 64 bits. Two bands that differ may share a number."""
    import numpy as np
    from datasketch import MinHash

    r = max(r for r in range(1, 65) if (1 - threshold**r) ** (_PERMUTATIONS // r) < 1e-3)
    b, empty, numbers = _PERMUTATIONS // r, MinHash(_PERMUTATIONS), array("Q")
    weights = np.random.default_rng(0).integers(1, 2**63, r, dtype=np.uint64)
    for row in rows:
        sketch = empty.copy()  # which spares it the drawing of its permutations
        sketch.update_batch([pair.encode("utf-8", "surrogatepass") for pair in _words(text(row))[1]])
        hashes = sketch.hashvalues[: b * r].astype(np.uint64).reshape(b, r)
        numbers.frombytes((hashes * weights).sum(axis=1, dtype=np.uint64).tobytes())
    return np.frombuffer(numbers, np.uint64).reshape(-1, b) if numbers else np.empty((0, b), np.uint64)


# --- Messages, template and loss mask ---------------------------------------------------------------------------------


def to_messages(row: Row) -> tuple[Messages, Messages]:
    """The prompt's and the completion's messages of a row of any kind.

    A chat row's completion is its last message; a preference row's is `chosen`. A string becomes one user or assistant
    message. TRL differs there: it trains on bare strings without any chat template. Give it these messages.
    """
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1:]
    prompt, completion = row["prompt"], row["chosen"] if "chosen" in row else row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return prompt, completion


def triage_rows(path: str | Path) -> list[Row]:
    """The prompt_completion rows of a split of data/triage: instruction and ticket in, the label as JSON out.

    The other keys (id, tags, skeleton) are kept.
    Raises ValueError with the first line that is no such ticket.
    """
    return [
        {
            "prompt": [{"role": "system", "content": TRIAGE_SYSTEM}, {"role": "user", "content": ticket["ticket"]}],
            "completion": [{"role": "assistant", "content": json.dumps(ticket["label"], ensure_ascii=False)}],
            **{key: value for key, value in ticket.items() if key not in ("ticket", "label")},
        }
        for ticket in _all_of(path, {"ticket": str, "label": dict})
    ]


def reply_pairs(path: str | Path) -> list[Row]:
    """The preference rows of a file of data/replies: instruction and ticket in, a good and a worse reply out.

    The ticket's label goes by the name `ticket_label`. The other keys (id, reason, skeleton) are kept.
    Raises ValueError with the first line that is no such pair.
    """
    texts = dict.fromkeys(("ticket", "chosen", "rejected", "id", "reason"), str)
    return [
        {
            "prompt": [{"role": "system", "content": REPLY_SYSTEM}, {"role": "user", "content": pair["ticket"]}],
            "chosen": [{"role": "assistant", "content": pair["chosen"]}],
            "rejected": [{"role": "assistant", "content": pair["rejected"]}],
            "ticket_label": pair["label"],
            **{key: pair[key] for key in ("id", "reason", "skeleton")},
        }
        for pair in _all_of(path, {**texts, "label": dict, "skeleton": str | None})
    ]


def _all_of(path: str | Path, keys: dict[str, type | UnionType]) -> list[Row]:
    """The rows of a file of the course's own, which has no bad line. Raises ValueError with the first bad one."""

    def check(row: Row) -> None:
        for key, kind in keys.items():
            if key not in row or not isinstance(row[key], kind):
                wanted = getattr(kind, "__name__", str(kind))
                raise _RowError(key, "missing key", f"got {short(row.get(key))}, wanted {wanted}")

    found = []
    for _, _, row in _scan(path, check, limit=1_000_000):
        if isinstance(row, Problem):
            raise ValueError(str(row))
        found.append(row)
    return found


@dataclass(frozen=True)
class Rendered:
    """A row as the model sees it: ids, which of them count in the loss (1), the text, and the text of each token."""

    input_ids: list[int]
    completion_mask: list[int]
    text: str
    tokens: list[str]

    def __repr__(self) -> str:
        return f"Rendered({len(self.input_ids)} tokens, {sum(self.completion_mask)} count in the loss)"

    def _repr_html_(self) -> str:
        colours = ("#eeeeee", "#9fe0cd")  # grey: only read; green-teal: counts in the loss
        spans = [
            f"<span style='background:{colours[bit]};color:#111;margin-right:1px'>"
            + html.escape(token).replace("\n", "↵</span><br><span>")
            + "</span>"
            for token, bit in zip(self.tokens, self.completion_mask, strict=True)
        ]
        return f"<div style='font-family:monospace;white-space:pre-wrap'>{''.join(spans)}</div>"


def render(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The row through the tokenizer's chat template, completion_mask being 1 on all that follows the generation prompt.

    That includes the end-of-turn token, and in ChatML the line break after it. Equals what TRL's SFTTrainer makes
    of {"prompt": messages, "completion": messages} with completion_only_loss (its default): tests/test_data.py.
    TRL only warns where this raises ValueError: if the prompt's ids are not the beginning of the whole.
    """
    [(text, ids, mask)] = _encode([row], tokenizer)
    return Rendered(ids, mask, text, [tokenizer.decode([i]) for i in ids])


def tokenize(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, list[int]]]:
    """What `render` gives as input_ids and completion_mask, row by row, for any number of rows in the memory of 256.

    Faster than `render`: rows share a call of the tokenizer, and no token is turned back into text. TRL's SFTTrainer
    trains on on_disk(tokenize(rows, tokenizer), file) as it is. Raises what `render` raises.
    """
    rows = iter(rows)
    while batch := list(islice(rows, 256)):
        for _, ids, mask in _encode(batch, tokenizer):
            yield {"input_ids": ids, "completion_mask": mask}


def on_disk(tokens: Iterable[dict[str, list[int]]], file: str | Path) -> Dataset:
    """What `tokenize` gives, as a datasets.Dataset in an Arrow file that is mapped into memory: 5 bytes a token.

    Some 1,000 rows are in memory on the way; a failure leaves no file, or the one that was there.
    """
    import pyarrow as pa
    from datasets import Dataset

    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "completion_mask": pa.list_(pa.int8())})
    part, tokens = Path(f"{file}.part"), iter(tokens)
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while batch := list(islice(tokens, 1000)):
                writer.write(pa.RecordBatch.from_pylist(batch, schema))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return Dataset.from_file(str(file))


def _encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int], list[int]]]:
    """(text, ids, completion_mask) of each row."""
    for prompt_text, text, prompt_ids, ids in _both(list(map(to_messages, rows)), tokenizer):
        if fault := _prefix_fault(prompt_text, text, prompt_ids, ids):
            raise ValueError(f"the prompt is not the beginning of the training text, so no loss mask is right: {fault}")
        yield text, ids, [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids))


def _both(
    conversations: Sequence[tuple[Messages, Messages]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str, list[int], list[int]]]:
    """Text of each prompt (with generation prompt) and of the whole, then the ids of the two."""
    prompts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt, _ in conversations
    ]
    texts = [tokenizer.apply_chat_template(prompt + completion, tokenize=False) for prompt, completion in conversations]
    # The template has written every special token already: the tokenizer must not add a second BOS.
    ids = tokenizer([*prompts, *texts], add_special_tokens=False)["input_ids"]
    return list(zip(prompts, texts, ids[: len(texts)], ids[len(texts) :], strict=True))


def _prefix_fault(prompt_text: str, text: str, prompt_ids: list[int], ids: list[int]) -> str:
    """Where the whole stops beginning with the prompt; empty if it does begin with it and goes on."""
    for what, prompt, whole in (("text", prompt_text, text), ("ids", prompt_ids, ids)):
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
            seen = slice(max(0, same - 8), same + 20)
            return f"{what} agree up to {same}, then the prompt has ...{prompt[seen]!r}, the whole ...{whole[seen]!r}"
    return ""


# --- Detectors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A fault of a tokenizer or its chat template: what was seen, why it hurts, how to mend it."""

    cause: str
    seen: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.cause}\n  seen: {self.seen}\n  why:  {self.why}\n  fix:  {self.fix}"


def check_template(tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """The faults of this tokenizer and chat template that spoil training silently; empty if there is none.

    Sought: no template, two BOS, padding with the end token, an answer without end-of-turn, an end-of-turn that is not
    eos, a generation prompt that training never shows. One question and answer is rendered to see them.
    """
    if not tokenizer.chat_template:
        why = "a base model's tokenizer: nobody has said where a turn begins and ends"
        return [Finding("no chat template", "chat_template is empty", why, "use the instruct model's tokenizer")]
    question, answer = "What is six times seven?", "Forty-two."
    messages = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    [(prompt_text, text, prompt_ids, ids)] = _both([messages], tokenizer)
    after = text.rpartition(answer)[2] if answer in text else ""
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ends = [i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in added]
    return [
        *_double_bos(tokenizer, text),
        *_pad_is_end(tokenizer, ends),
        *_no_end_of_turn(tokenizer, after, ends),
        *_prompt_not_in_training(prompt_text, text, prompt_ids, ids),
    ]


def _double_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Finding]:
    ids = tokenizer(text)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        yield Finding(
            "double BOS",
            f"tokenizer(rendered text) begins {ids[:4]} = {tokenizer.convert_ids_to_tokens(ids[:4])}",
            "the template writes BOS and the tokenizer adds another; pretraining never showed two",
            "tokenize rendered text with add_special_tokens=False, as render and apply_chat_template(tokenize=True) do",
        )


def _pad_is_end(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> Iterator[Finding]:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad in (eos, *ends):
        name = "no pad token" if pad is None else "pad is the end token"
        yield Finding(
            name,
            f"pad {tokenizer.pad_token!r} ({pad}), eos {tokenizer.eos_token!r} ({eos}), end of turn {ends}",
            "collators that know padding by its id (transformers' DataCollatorForLanguageModeling) take the end of "
            "turn out of the loss with it, and the model never learns to stop. TRL's own collator is safe"
            + ("; it would pad with eos here" if pad is None else ""),
            "set pad_token to a token of the vocabulary that no text uses",
        )


def _no_end_of_turn(tokenizer: PreTrainedTokenizerBase, after: str, ends: list[int]) -> Iterator[Finding]:
    eos = f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})"
    if not ends:
        pieces = tokenizer.tokenize(after, add_special_tokens=False)
        yield Finding(
            "no end-of-turn",
            f"after the answer comes {after!r} = tokens {pieces}; none is a special token; eos is {eos}",
            "nothing tells the model that the answer is over: it goes on until max_new_tokens",
            "let the template write eos_token after the assistant's content; if a marker shows here in pieces, "
            "this vocabulary lacks it and the template belongs to another model",
        )
    elif tokenizer.eos_token_id not in ends:
        yield Finding(
            "end-of-turn is not eos",
            f"after the answer come {tokenizer.convert_ids_to_tokens(ends)} ({ends}), eos is {eos}",
            "generate() stops at eos only: the model ends its turn, is not stopped, and begins to write the user's",
            "set tokenizer.eos_token to the end-of-turn, or list both in generation_config.eos_token_id",
        )


def _prompt_not_in_training(prompt_text: str, text: str, prompt_ids: list[int], ids: list[int]) -> Iterator[Finding]:
    if fault := _prefix_fault(prompt_text, text, prompt_ids, ids):
        yield Finding(
            "generation prompt differs from training",
            fault,
            "the model must go on from a text it was never trained on, and the loss mask is off by the difference",
            "let add_generation_prompt write exactly what the template writes before an assistant's content",
        )


# --- A row without a file ---------------------------------------------------------------------------------------------


def row_fault(row: Row, kind: str) -> str:
    """Why this is no row of the kind ("cause at place: detail"), empty for a good one: `read_jsonl` without a file."""
    try:
        _check(row, kind)
    except _RowError as bad:
        where, cause, detail = bad.args
        return f"{cause}{where and f' at {where}'}: {detail}"
    return ""
