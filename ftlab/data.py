"""Rows for training: every bad one named, strings made into messages, duplicates, leakage, the loss mask in colours.

    report = read_rows("rows.jsonl")          # or .csv, .parquet; in a notebook the report shows itself
    trainer = SFTTrainer(model, train_dataset=report.dataset(), ...)

A file holds one kind of rows; other keys are kept in `report.rows`. A prompt or an answer is a string or messages:

    prompt_completion   prompt, completion               SFTTrainer
    messages            messages, one or several turns   SFTTrainer, in a row for each assistant turn
    preference          prompt, chosen, rejected         DPOTrainer
    thumbs              prompt, completion, label        KTOTrainer; label is true or false
"""

from __future__ import annotations

import csv
import html
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
KEYS = {
    "preference": ("prompt", "chosen", "rejected"),
    "thumbs": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
}
LINE_LIMIT = 10_000_000  # characters
DEPTH_LIMIT = 100  # brackets in each other; Python's own limit depends on how deep its caller stands


class Problem(NamedTuple):
    """Why a line (from 1; in Parquet a row) cannot be used: what, at which place in it, and the likely reason."""

    line: int
    cause: str
    place: str  # "column 12" or "prompt[0].role"
    detail: str

    def __str__(self) -> str:
        return f"line {self.line}{self.place and f', {self.place}'}: {self.detail}"


class _RowError(Exception):
    """Its args are the last three fields of a Problem."""


@dataclass
class Report:
    """How many good rows of which kind a file holds, and a Problem for each bad one.

    Iterating reads the good rows again, one at a time: the file may be larger than memory. `rows` is the list of them.
    """

    path: Path
    kind: str | None
    system: str | None
    good: int = 0
    problems: list[Problem] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        found = iter_rows(self.path, self.kind, self.system)
        return (row for _, row in found if not isinstance(row, Problem))

    @cached_property
    def rows(self) -> list[Row]:
        return list(self)

    def dataset(self) -> Dataset:
        """The good rows with the keys that TRL reads, in an Arrow file on disk.

        Raises ValueError if there is none, or if all thumbs are of one kind, on which KTO trains without a word.
        """
        from datasets import Dataset, Features, List, Value

        if not self.good:
            raise ValueError(f"no good row to train on\n{self}")
        if self.kind == "thumbs" and len(labels := {row["label"] for row in self}) == 1:
            (up,) = labels
            why = "for good answers alone there is SFT" if up else "were the thumbs up lost on the way?"
            raise ValueError(f"all {self.good:,} labels are {up}, and KTO needs both kinds: {why}")
        messages = List({"role": Value("string"), "content": Value("string")})
        keys = KEYS["prompt_completion" if self.kind == "messages" else self.kind]
        features = Features({key: Value("bool") if key == "label" else messages for key in keys})
        stat = self.path.stat()  # datasets keeps what it made: a changed file must not give the old rows
        arguments = {"path": str(self.path), "kind": self.kind, "system": self.system}
        return Dataset.from_generator(
            _for_trl, features, gen_kwargs=arguments | {"stamp": (stat.st_mtime_ns, stat.st_size)}
        )

    def _lines(self) -> tuple[str, list[tuple[str, str, str]]]:
        kind = self.kind or "no known kind"
        title = f"{self.path.name}: {self.good:,} good rows ({kind}), {len(self.problems):,} bad"
        first = {problem.cause: str(problem) for problem in reversed(self.problems)}
        counts = Counter(problem.cause for problem in self.problems).most_common()
        return title, [(f"{count:,}", cause, first[cause]) for cause, count in counts]

    def __repr__(self) -> str:
        title, lines = self._lines()
        return "\n".join([title, *(f"{count:>6}  {cause:<24} first: {first}" for count, cause, first in lines)])

    def _repr_html_(self) -> str:
        title, lines = self._lines()
        cell = '<td style="text-align:left;vertical-align:top">'
        table = [("rows", "cause", "the first"), *lines] if lines else []
        body = "".join(f"<tr>{''.join(f'{cell}{html.escape(text)}</td>' for text in line)}</tr>" for line in table)
        return f"<b>{html.escape(title)}</b><table>{body}</table>"


def read_rows(path: str | Path, kind: str | None = None, system: str | None = None) -> Report:
    """The Report of a .jsonl, .csv or .parquet file. Without `kind`, the keys of the first 100 rows decide.

    A string becomes one user or assistant message, since TRL trains on bare strings without any chat template.
    `system` is put before every prompt that has no system message.

    Raises OSError for a missing file and ValueError for another file type or kind, never for what a row holds.
    """
    report = Report(Path(path), kind or _majority(Path(path)), system)
    for _, row in iter_rows(path, report.kind, system):
        if isinstance(row, Problem):
            report.problems.append(row)
        else:
            report.good += 1
    return report


def iter_rows(
    path: str | Path, kind: str | None = None, system: str | None = None
) -> Iterator[tuple[int, Row | Problem]]:
    """(line, row or Problem) of each row of a file, one at a time. Arguments and errors as in `read_rows`."""
    if kind not in (None, *KEYS):
        raise ValueError(f"got kind={kind!r}, wanted one of {', '.join(KEYS)}")
    kind = kind or _majority(Path(path))
    for line, found in _source(Path(path)):
        try:
            if isinstance(found, _RowError):
                raise found
            yield line, _checked(found, kind, system)
        except _RowError as bad:
            cause, place, detail = bad.args
            yield line, Problem(line, cause, place, detail[:400])


def turns(messages: list[Row]) -> Iterator[tuple[list[Row], list[Row]]]:
    """(prompt, completion) for each assistant message of a conversation: all that came before it, and itself.

    TRL's assistant_only_loss=True learns all of them in one row, if the chat template has {% generation %} marks.
    """
    return ((messages[:k], [message]) for k, message in enumerate(messages) if message["role"] == "assistant")


def _for_trl(path: str, kind: str, system: str | None, stamp: tuple[int, int]) -> Iterator[Row]:
    for _, row in iter_rows(path, kind, system):
        if isinstance(row, Problem):
            continue
        if kind == "messages":
            for prompt, completion in turns(row["messages"]):
                yield {"prompt": prompt, "completion": completion}
        else:
            yield {key: row[key] for key in KEYS[kind]}


# --- Files: (line, dict or _RowError) ---------------------------------------------------------------------------------


def _source(path: Path) -> Iterator[tuple[int, Row | _RowError]]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"got {path.name!r}, wanted a file that ends in {', '.join(readers)}")
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix.lower() != ".parquet" and (start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start):
        return iter([(1, _RowError("not UTF-8", "", 'this is UTF-16: save it as UTF-8 (in Excel "CSV UTF-8")'))])
    if start in (b"\xef", b"\xef\xbb"):  # Python's reader would see an empty file
        return iter([(1, _RowError("not UTF-8", "", "half a byte-order mark and nothing else: is the file cut off?"))])
    return readers[path.suffix.lower()](path)


def _jsonl(path: Path) -> Iterator[tuple[int, Row | _RowError]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line, text in enumerate(iter(lambda: file.readline(LINE_LIMIT), ""), start=1):
            if len(text) == LINE_LIMIT:
                yield line, _RowError("line too long", "", f"over {LINE_LIMIT:,} characters: are line breaks missing?")
                return
            if text.strip():
                try:
                    yield line, _parsed(text)
                except _RowError as bad:
                    yield line, bad


def _parsed(text: str) -> Row:
    """The object on a line. Raises _RowError with the mistake that most often gives this error."""
    _refuse(text, "", "bytes")
    said = text.rstrip(" \t\r\n")  # no other space may stand around JSON
    if said.count("[") + said.count("{") > DEPTH_LIMIT and (depth := _depth(said)) > DEPTH_LIMIT:
        why = f"got {depth:,} brackets in each other, wanted at most {DEPTH_LIMIT}: was a whole tree written into it?"
        raise _RowError("nested too deeply", "", why)
    try:
        row = json.loads(said, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError as error:
        rest = said[error.pos :]
        if not rest or error.msg.startswith("Unterminated"):
            why = "a line break inside a text is written \\n" if text.endswith("\n") else "was the writer cut off?"
            raise _RowError("row cut off", f"column {error.colno}", f"ends in the middle; {why}") from None
        why = "was it edited by hand? Use json.dumps"
        if rest.startswith(("'", "True", "False", "None")):
            why = "is this a Python dict written with str()? Use json.dumps"
        elif error.msg == "Extra data":
            why = "are two rows on one line?"
        raise _RowError("invalid JSON", f"column {error.colno}", f"{error.msg}, got {short(rest)}; {why}") from None
    except ValueError as error:  # an integer of over 4,300 digits
        raise _RowError("invalid JSON", "", f"{error}".partition(";")[0]) from None
    if not isinstance(row, dict):
        raise _RowError("not an object", "", f"got {short(row)}, wanted {{...}}: one object on each line")
    return row


def _depth(text: str) -> int:
    """How many brackets stand in each other at most. Those within strings do not count."""
    brackets = re.sub(r'"[^"\\]*(?:\\.[^"\\]*)*"?', "", text, flags=re.DOTALL)
    return max(accumulate((c in "[{") - (c in "]}") for c in brackets), default=0)


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """The object of these pairs. Python's own reader keeps the last of two equal keys, and says nothing."""
    if len(row := dict(pairs)) == len(pairs):
        return row
    [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
    raise _RowError("key twice", "", f"got {short(key)} {count} times in one object, wanted once: which one counts?")


def _finite(text: str) -> float:
    """A number with a point or an exponent; NaN, Infinity and -Infinity, which json.dumps writes, are no JSON."""
    if math.isfinite(value := float(text)):
        return value
    raise _RowError("not finite", "", f"got {short(text)}, wanted a finite number: leave it out or write null")


def _csv(path: Path) -> Iterator[tuple[int, Row | _RowError]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = max(",;\t", key=file.readline().count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line, bools = 1, {"true": True, "1": True, "false": False, "0": False}
        try:
            names = [name.strip() for name in next(reader, [])]
            if not _kind_of(dict.fromkeys(names)):
                yield 1, _RowError("missing column", "", _what_is_missing(names, None))
                return
            line = reader.line_num + 1
            for cells in reader:
                row = dict(zip(names, cells, strict=False))
                if len(cells) == len(names):
                    label = {"label": bools.get(row["label"].lower(), row["label"])} if "label" in row else {}
                    yield line, row | label
                elif cells:
                    why = f"got {len(cells)} cells, wanted {len(names)}: put quotes around a text with {delimiter!r}"
                    yield line, _RowError("wrong number of cells", "", why)
                line = reader.line_num + 1
        except csv.Error as error:
            yield line, _RowError("invalid CSV", "", f"{error}: is a quote wrong here? Nothing after it was read")


def _parquet(path: Path) -> Iterator[tuple[int, Row | _RowError]]:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
    except pyarrow.ArrowInvalid as error:
        return iter([(1, _RowError("not Parquet", "", str(error)))])
    return enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


# --- One row ----------------------------------------------------------------------------------------------------------


def _majority(path: Path) -> str | None:
    kinds = (_kind_of(row) for _, row in _source(path) if isinstance(row, dict))
    return max(Counter(islice(filter(None, kinds), 100)).items(), key=lambda kind: kind[1], default=(None,))[0]


def _kind_of(row: Row) -> str | None:
    kind = next((kind for kind, keys in KEYS.items() if row.keys() >= set(keys)), None)
    return "prompt_completion" if kind == "thumbs" and isinstance(row["label"], dict | list) else kind


def _what_is_missing(keys: Iterable[str], kind: str | None) -> str:
    names = {"instruction": "prompt", "question": "prompt", "input": "prompt", "output": "completion",
             "answer": "completion", "response": "completion", "conversations": "messages"}  # fmt: skip
    renames = [f"{key} -> {names[str(key).lower()]}" for key in keys if str(key).lower() in names]
    why = f"rename {', '.join(renames)}" if renames else "is one misspelt?"
    return f"got {short(list(keys))}, wanted {' and '.join(KEYS[kind or 'prompt_completion'])}; {why}"


def _checked(row: Row, kind: str | None, system: str | None) -> Row:
    """The row of this kind with messages for strings. Raises _RowError for its first fault."""
    own = _kind_of(row)
    if own is None:
        raise _RowError("missing key", "", _what_is_missing(row, kind))
    if not row.keys() >= set(KEYS[kind]) or (own, kind) == ("preference", "prompt_completion"):
        raise _RowError("another kind of row", "", f"{own} in a file of {kind}: make a file of each")
    if (own == "thumbs" != kind) or (kind == "thumbs" and not isinstance(row["label"], bool)):
        why = f"as KTO needs it, in a file of {kind}; if it means something else, give the key another name"
        raise _RowError("label is not true or false", "label", f"got {short(row['label'])}, {why}")
    made = {**row, **{key: _messages(row[key], key) for key in KEYS[kind] if key != "label"}}
    head = KEYS[kind][0]
    if system and made[head][0]["role"] != "system":
        made[head] = [{"role": "system", "content": system}, *made[head]]
    if kind == "preference" and made["chosen"] == made["rejected"]:
        raise _RowError("chosen equals rejected", "rejected", "the pair prefers nothing: was one text copied twice?")
    return made


def _messages(value: Any, key: str) -> list[Row]:
    """The messages of one side of a row, made of a string or checked."""
    side = "prompt" if key in ("prompt", "messages") else "answer"
    if isinstance(value, str) and key != "messages":
        value = [{"role": "user" if side == "prompt" else "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        cause = f"empty {key}" if value in (None, []) else "wrong type"
        raise _RowError(cause, key, f"got {short(value)}, wanted text or messages")
    for i, message in enumerate(value):
        place = f"{key}[{i}]"
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            why = 'wanted {"role": ..., "content": ...} (ShareGPT says from and value)'
            raise _RowError("no message", place, f"got {short(message)}, {why}")
        role, text = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            why = "wanted system, user or assistant (ShareGPT's human is user, its gpt assistant)"
            raise _RowError("unknown role", f"{place}.role", f"got {short(role)}, {why}")
        if not isinstance(text, str):
            raise _RowError("wrong type", f"{place}.content", f"got {short(text)}, wanted a string")
        if not any(c.isprintable() and not c.isspace() for c in text):
            raise _RowError(f"empty {role} message", f"{place}.content", f"got {short(text)}: was it never filled?")
        _refuse(text, f"{place}.content", *_TEXT_FAULTS)
    roles = [message["role"] for message in value]
    talk = roles[side == "prompt" and roles[0] == "system" :]
    last = "user" if key == "prompt" else "assistant"
    if side == "answer" and roles != ["assistant"]:
        why = "one assistant message: the loss would learn the user's turns too"
    elif side == "prompt" and (talk != ["user", "assistant"] * (len(talk) // 2) + ["user"] * (len(talk) % 2)
                               or talk[-1:] != [last]):  # fmt: skip
        why = f"an optional system message, then user and assistant in turn, {last} last"
    else:
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise _RowError("wrong role order", key, f"got {short(roles)}, wanted {why}")


_TEXT_FAULTS = {  # cause -> what one finds, why
    "bytes": ("[\udc80-\udcff]+", "as Windows-1252 it would read {}: save the file as UTF-8"),
    "half a character": ("[\ud800-\udfff]", "{}: was an emoji cut in two?"),
    "lost character": ("\ufffd", "{}: a wrong decoding lost a character; read the source again"),
    "control character": (
        "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]", "{}: invisible, but a token. From a terminal, or binary data?"),
    "chat marker": (
        r"<[|｜][^\s<>|｜]{1,40}[|｜]>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]",
        "{}: to the tokenizer a real turn boundary; only the template may write it"),
}  # fmt: skip


def _refuse(text: str, place: str, *causes: str) -> None:
    for cause in causes:
        pattern, why = _TEXT_FAULTS[cause]
        if found := re.search(pattern, text):
            around = text[max(0, found.start() - 12) : found.end() + 8]
            if cause == "bytes":
                cause, around = "not UTF-8", around.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
            raise _RowError(cause, place or f"column {found.start() + 1}", why.format(repr(around)))


# --- Duplicates and leakage -------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Text number `index` says what text number `of` says; `similarity` is their Jaccard index over word pairs."""

    index: int
    of: int
    similarity: float


def near_duplicates(texts: Sequence[str], threshold: float = 0.85) -> list[Pair]:
    """A Pair for each text that repeats an earlier one. Drop these, and every text stands once.

    Compared are pairs of neighbouring words, without case, punctuation and extra spaces; 1 is the same words. MinHash
    finds the candidates (of pairs at the threshold it misses one in a thousand), and each is then counted exactly.
    """
    seen = _Seen(threshold)
    return [Pair(i, *best) for i, text in enumerate(texts) if (best := seen.nearest(text, add=i))]


def leakage(train_texts: Sequence[str], test_texts: Sequence[str], threshold: float = 0.85) -> list[Pair]:
    """A Pair for each test text that a train text repeats: `index` counts in test, `of` in train."""
    seen = _Seen(threshold)
    for i, text in enumerate(train_texts):
        seen.nearest(text, add=i)
    return [Pair(i, *best) for i, text in enumerate(test_texts) if (best := seen.nearest(text))]


class _Seen:
    """Texts by their words, and by the MinHash of their word pairs."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        if not 0.1 <= threshold <= 1:
            raise ValueError(f"got threshold={threshold}, wanted a Jaccard index from 0.1 to 1")
        r = max(r for r in range(1, 65) if (1 - threshold**r) ** (128 // r) < 1e-3)  # rows of a band
        self.threshold, self.exact, self.pairs = threshold, {}, {}
        self.index, self.blank = MinHashLSH(num_perm=128, params=(128 // r, r)), MinHash(128)

    def nearest(self, text: str, add: int | None = None) -> tuple[int, float] | None:
        """(number, similarity) of the text most like this one. Without any, this one is added as number `add`."""
        tokens = unicodedata.normalize("NFKC", text).casefold().split()
        words = [token.strip(".,;:!?\"'()[]{}*_-…") or token for token in tokens]
        if (key := " ".join(words)) in self.exact:
            return self.exact[key], 1.0
        pairs, sketch = {" ".join(words[k : k + 2]) for k in range(max(1, len(words) - 1))}, self.blank.copy()
        sketch.update_batch([pair.encode("utf-8", "surrogatepass") for pair in pairs])
        found = [(len(pairs & self.pairs[j]) / len(pairs | self.pairs[j]), -j) for j in self.index.query(sketch)]
        if found and max(found)[0] >= self.threshold:
            return -max(found)[1], max(found)[0]
        if add is not None:
            self.exact[key], self.pairs[add] = add, pairs
            self.index.insert(add, sketch)
        return None


# --- Chat templates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """A row as the model sees it: its ids, and 1 for each that counts in the loss."""

    input_ids: list[int]
    completion_mask: list[int]
    pieces: list[tuple[str, int]]  # the text of a token, or of several that make one character, and whether it counts

    @classmethod
    def of(cls, input_ids: Sequence[int], mask: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Mask:
        """The view of ids and their mask, wherever they come from: a trainer's row, a template's assistant_masks."""
        pieces, waiting = [], []
        for token, bit in zip(input_ids, mask, strict=True):
            text = tokenizer.decode([*waiting, token])
            waiting = [*waiting, token] if text.endswith("\ufffd") and len(waiting) < 4 else []
            if not waiting:
                pieces.append((text, bit))
        return cls(list(input_ids), list(mask), pieces)

    def __repr__(self) -> str:
        return f"{sum(self.completion_mask)} of {len(self.input_ids)} tokens count in the loss"

    def _repr_html_(self) -> str:
        tags = ('<span style="opacity:0.65">', "</span>"), ('<mark style="background:#9fe0cd;color:#111">', "</mark>")
        text = "".join(
            f"{tags[bit][0]}{html.escape(piece).replace(chr(10), '↵')}{tags[bit][1]}{'<br>' * piece.count(chr(10))}"
            for piece, bit in self.pieces
        )
        return f'<b>{self}</b><div style="font-family:monospace;white-space:pre-wrap">{text}</div>'


def show_mask(row: Row, tokenizer: PreTrainedTokenizerBase) -> Mask:
    """The row through the chat template; marked is what counts in the loss: each answer with its end of turn.

    Equals the labels of TRL's SFTTrainer for `Report.dataset()`: tests/test_data.py. Of a pair, `chosen` is shown.
    Raises ValueError without a chat template, and where TRL only warns: a prompt whose ids do not begin the whole.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: it belongs to a base model. Take the instruct model's")
    if "messages" in row:
        whole = _messages(row["messages"], "messages")
        answers = list(turns(whole))
    else:
        key = "chosen" if "chosen" in row else "completion"
        answers = [(_messages(row["prompt"], "prompt"), _messages(row[key], key))]
        whole = answers[0][0] + answers[0][1]
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    mask = [0] * len(ids)
    for prompt, completion in answers:
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        end = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
        if end[: len(start)] != start or ids[: len(end)] != end:
            why = "the generation prompt is not what stands before an answer, or earlier turns are rewritten later"
            raise ValueError(f"no mask is right: the prompt's ids are not the beginning of the whole; {why}")
        mask[len(start) : len(end)] = [1] * (len(end) - len(start))
    return Mask.of(ids, mask, tokenizer)


class Trap(NamedTuple):
    """A fault of a tokenizer or chat template that spoils training without a word."""

    cause: str
    seen: str
    fix: str


def check_template(tokenizer: PreTrainedTokenizerBase) -> list[Trap]:
    """The traps of this tokenizer and template, found by rendering one question and answer; [] if there is none."""
    if not tokenizer.chat_template:
        return [Trap("no chat template", "a base model's tokenizer", "take the instruct model's tokenizer")]
    prompt, answer = [{"role": "user", "content": "What is six times seven?"}], "Forty-two."
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    after = text.rpartition(answer)[2] if answer in text else ""
    ends = [i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    traps = []
    if bos is not None and tokenizer(text)["input_ids"][:2] == [bos, bos]:
        seen = f"the template writes {tokenizer.bos_token}, and the tokenizer adds another"
        traps.append(Trap("double BOS", seen, "tokenize rendered text with add_special_tokens=False"))
    if pad is None or pad in (eos, *ends):
        seen = f"pad is {tokenizer.pad_token!r}: who knows padding by its id takes the end of turn out of the loss"
        traps.append(Trap("pad is the end token", seen, "set pad_token to a token that no text uses"))
    if not ends:
        seen = f"after the answer comes {after!r}, and no special token"
        traps.append(Trap("no end of turn", seen, "let the template write eos_token after the assistant's content"))
    elif eos not in ends:
        seen = f"a turn ends with {tokenizer.convert_ids_to_tokens(ends)}, eos is {tokenizer.eos_token!r}"
        traps.append(Trap("the end of turn is not eos", seen, "set eos_token to the end of turn"))
    if not text.startswith(start):
        seen = f"asked with ...{start[-30:]!r}, trained on ...{text[max(0, len(start) - 30) :][:42]!r}"
        fix = "let add_generation_prompt write what the template writes before an answer"
        traps.append(Trap("generation prompt differs from training", seen, fix))
    return traps
