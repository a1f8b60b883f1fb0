"""Rows for training: every bad one named, strings made into messages, duplicates, leakage, the loss mask in colours.

report = read_rows("rows.jsonl")          # or .csv, .tsv, .parquet; in a notebook the report shows itself
trainer = SFTTrainer(model, train_dataset=report.dataset(), ...)
"""

from __future__ import annotations

import csv
import difflib
import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """Good rows, of a conversation one an answer; their kind, a key of KEYS or None; a Problem for each bad one."""

    name: str
    kind: str | None
    rows: list[Row]
    problems: list[Problem]

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
        return "\n".join([head, *(f"{count:>6,}  {cause:<24} first: {first[cause]}" for cause, count in counts)])


def read_rows(path: str | Path, system: str | None = None) -> Report:
    """The Report of a .jsonl, .csv, .tsv or .parquet file (.json: one object a line); its kind is that of most rows.

    A string becomes one user or assistant message, since TRL trains on bare strings without any chat template. Of a
    pair of conversations without a prompt, this is what both begin with.
    `system` is put before each prompt without a system message. Raises ValueError for another format, a column twice.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if (suffix := path.suffix.lower()) not in readers:
        raise ValueError(f"{path.name}: got the suffix {suffix!r}, wanted {', '.join(readers)}")
    found = [(line, _with_prompt(row) if isinstance(row, dict) else row) for line, row in readers[suffix](path)]
    kinds = Counter(filter(None, (_kind(row) for _, row in found if isinstance(row, dict))))
    report = Report(path.name, max(kinds, key=kinds.get, default=None), [], [])
    for line, row in found:
        try:
            report.rows += _checked(row, report.kind, system)
        except Problem as problem:
            problem.line = line
            report.problems.append(problem)
    return report


def hand_test(path: str | Path, rows: list[dict], system: str | None = None) -> list[dict]:
    """The rows of the hand_test.jsonl beside a file of rows; [] if there is none.

    Raises ValueError if it has bad rows, or a system message that none of `rows` has: then it is of
    another task, and a score on it would say nothing about the model.
    """
    file = Path(path).with_name("hand_test.jsonl")
    if not file.is_file():
        return []
    report = read_rows(file, system)
    if report.problems or not report.rows:
        raise ValueError(f"{file} has rows that cannot be asked: {report}")
    known = _instructions(rows)
    if strange := sorted(_instructions(report.rows) - known):
        raise ValueError(
            f"{file} asks with {strange[0]!r}, and no row of {Path(path).name} does: it has "
            f"{sorted(known)}. Is it a test of another task? Keep each task in a folder of its own"
        )
    return report.rows


def _instructions(rows: list[dict]) -> set[str]:
    """The system messages of rows with chat messages."""
    prompts = (message for row in rows for message in row["prompt"])
    return {message["content"] for message in prompts if message["role"] == "system"}


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


def _csv(path: Path) -> Iterator[tuple[int, Row | Problem]]:
    limit = csv.field_size_limit(2**31 - 1)  # of a cell, in the whole process; else 128 kB
    try:
        yield from _csv_rows(path)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path) -> Iterator[tuple[int, Row | Problem]]:
    """The rows, up to a quote that is never closed or a cell that goes on after it: then where does a row begin?"""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=file.readline().count)
        file.seek(0)
        lines, done = csv.DictReader(file, delimiter=delimiter, strict=True), 0
        try:
            if len(set(names := lines.fieldnames or ())) < len(names):
                raise ValueError(f"{path.name}: got the columns {names}, wanted each name once")
            for row in lines:
                if None in row:
                    row = Problem("too many cells", "", f"got {short(row[None])}: quote a text with {delimiter!r}")
                elif row.get("label"):
                    row["label"] = {"true": True, "false": False}.get(row["label"].strip().lower(), row["label"])
                yield (done := lines.line_num), row
        except csv.Error as error:
            why = f"{error}: a quote in a text is written twice. Lines after it, not read: {sum(1 for _ in file):,}"
            yield lines.reader.line_num, Problem("broken CSV", f"row after line {done}", why)


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
    ] if is_there]  # fmt: skip
