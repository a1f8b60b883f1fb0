"""The forgetting check: easy facts that SmolLM2 knows before any training, and technical English for perplexity.

    python data/general/make.py            asks the model candidates.jsonl and rewrites facts.jsonl (minutes)
    python data/general/make.py --text     rewrites text.jsonl; only under a Python that ships the same topics (3.11.7)
    python data/general/make.py --rehearse rewrites rehearsal.jsonl: the model's own answers to every fourth candidate

candidates.jsonl is written by hand. A fact is *known* if the model's greedy answer contains it: see `is_right`.
"""

import hashlib
import json
import random
import re
import sys
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import order

HERE = Path(__file__).parent
KEYS = ["id", "question", "answer", "accept", "topic"]
MAX_NEW_TOKENS = 24
PER_TOPIC = 6  # facts kept of one topic, at most
REHEARSED = slice(1, None, 4)  # of the candidates; the forgetting check asks those of slice(0, None, 4)
LUCKY = {  # the reply contains the answer and says something else ("Kepler-41B ... similar to Earth"): read by hand
    "gf-022", "gf-025", "gf-026", "gf-053", "gf-078", "gf-081", "gf-096", "gf-115", "gf-128", "gf-150", "gf-165",
    "gf-176", "gf-178", "gf-180", "gf-212", "gf-241", "gf-278", "gf-299", "gf-420", "gf-465", "gf-479", "gf-564",
}  # fmt: skip

# of the topics of Python 3.11.7; even 3.11.2 has others
TOPICS_SHA256 = "37b51a0283fe86090af40650ef680bba22b90f74777f29909eceb83e57cc7ff1"
PASSAGES, SHORTEST, LONGEST = 60, 80, 160  # the last two in words


# --- Facts ------------------------------------------------------------------------------------------------------------


def read(name: str) -> list[dict]:
    """The rows of a JSONL file in this folder."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def dump(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def normalise(text: str) -> str:
    """Lower-case words with one blank around each, punctuation gone: "It's 1,000.5 kg!" is " it s 1000.5 kg "."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold())
    return " " + " ".join(re.findall(r"\d+\.\d+|\w+", text)) + " "


def contains(text: str, phrase: str) -> bool:
    """Whether the words of `phrase` stand in `text` in a row: "ice" is in "It's ice.", not in "mice" or "nice"."""
    return normalise(phrase) in normalise(text)


def is_right(reply: str, row: dict) -> bool:
    """Whether the reply contains the answer or an accepted form of it."""
    return any(contains(reply, form) for form in [row["answer"], *row["accept"]])


def check_candidates(rows: list[dict]) -> None:
    """Raises ValueError, naming the row, if one is malformed, repeated, or could be right by echoing its question."""
    seen: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if list(row) != KEYS or row["id"] != f"gf-{number:03d}":
            raise ValueError(f"row {number}: want the id gf-{number:03d} and the keys {KEYS} in this order, got {row}")
        if seen.setdefault(normalise(row["question"]), row["id"]) != row["id"]:
            raise ValueError(f"{row['id']}: {seen[normalise(row['question'])]} asks the same: {row['question']!r}")
        for form in [row["answer"], *row["accept"]]:
            if not normalise(form).strip():
                raise ValueError(f"{row['id']}: {form!r} has no letter or digit, so every reply would contain it")
            if contains(row["question"], form):
                raise ValueError(f"{row['id']}: the question contains {form!r}: an echo would count as right")


def ask(candidates: list[dict], dtype: str, max_new_tokens: int) -> list[str]:
    """SmolLM2's greedy replies to the candidates' questions, each a chat of one message."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import answers, model_path

    model = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=dtype)
    chats = [[{"role": "user", "content": row["question"]}] for row in candidates]
    replies = answers(model, AutoTokenizer.from_pretrained(model_path("smollm2")), chats, max_new_tokens)
    return [reply.strip() for reply in replies]


def select(candidates: list[dict], replies: list[str]) -> list[dict]:
    """The candidates that were answered right and not by luck: PER_TOPIC of each topic, drawn with a fixed seed."""
    known: dict[str, list[dict]] = {}
    for row, reply in zip(candidates, replies, strict=True):
        if is_right(reply, row) and row["id"] not in LUCKY:
            known.setdefault(row["topic"], []).append(row)
    draw = random.Random(0)
    drawn = [draw.sample(rows, min(PER_TOPIC, len(rows))) for rows in known.values()]
    return [row for rows in drawn for row in sorted(rows, key=lambda row: row["id"])]


def rehearsal(candidates: list[dict], replies: list[str], tokenizer, max_tokens: int) -> list[dict]:
    """The replies that came to an end, right or wrong; one cut at max_tokens would teach the model to stop anywhere."""
    return [
        {"id": row["id"], "question": row["question"], "answer": reply}
        for row, reply in zip(candidates, replies, strict=True)
        if len(tokenizer(reply)["input_ids"]) < max_tokens
    ]


# --- Text -------------------------------------------------------------------------------------------------------------


def is_prose(block: str) -> bool:
    """Whether a block of the documentation is a plain paragraph: no code, heading, list, table or version note."""
    starts_as_prose = block[:1].isalpha() and not block.startswith(("Changed in", "New in"))
    return starts_as_prose and block.endswith(".") and not re.search(r"\n |^\W{3,}$", block, re.MULTILINE)


def passages(text: str, used: set[str]) -> list[str]:
    """Runs of paragraphs that follow one another, SHORTEST to LONGEST words each, without the paragraphs in `used`.

    Adds what it reads to `used`: topics repeat one another ("compound" holds all of "class").
    """
    found, run = [], []
    for block in text.strip().split("\n\n"):
        if block in used or not is_prose(block):
            run = []  # a passage never jumps over an example
            continue
        used.add(block)
        run += re.sub(r"(?<=\w)-\n(?=\w)", "-", block).split()  # "built-" at the end of a line
        if len(run) >= SHORTEST:
            if len(run) <= LONGEST:
                found.append(" ".join(run))
            run = []
    return found


def build_text() -> bytes:
    """The bytes of text.jsonl: the first passage of each topic, then the second ones, until there are PASSAGES.

    Raises RuntimeError under a Python whose topics differ from those that text.jsonl was made from.
    """
    from pydoc_data.topics import topics

    got = hashlib.sha256(json.dumps(topics, sort_keys=True).encode()).hexdigest()
    if got != TOPICS_SHA256:
        raise RuntimeError(
            f"text.jsonl is made from the topics of Python 3.11.7; Python {sys.version.split()[0]} has others"
        )
    used: set[str] = set()
    columns = [[(name, text) for text in passages(topics[name], used)] for name in sorted(topics)]
    rounds = [pair for column in zip_longest(*columns) for pair in column if pair][:PASSAGES]
    rows = [{"id": f"gt-{n:03d}", "topic": name, "text": text} for n, (name, text) in enumerate(rounds, start=1)]
    return dump(order.ordered("general/text", rows))


if __name__ == "__main__":
    if "--text" in sys.argv[1:]:
        (HERE / "text.jsonl").write_bytes(build_text())
    elif "--rehearse" in sys.argv[1:]:
        from transformers import AutoTokenizer

        from ftlab import model_path

        tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"))
        candidates = read("candidates.jsonl")[REHEARSED]
        replies = ask(candidates, "bfloat16", 48)  # the dtype that SmolLM2 is kept in
        (HERE / "rehearsal.jsonl").write_bytes(dump(rehearsal(candidates, replies, tokenizer, 48)))
    else:
        candidates = read("candidates.jsonl")
        check_candidates(candidates)
        replies = ask(candidates, "float32", MAX_NEW_TOKENS)
        facts = order.ordered("general/facts", select(candidates, replies))
        (HERE / "facts.jsonl").write_bytes(dump(facts))
        right = sum(map(is_right, replies, candidates))
        print(f"{len(candidates)} candidates, {right} answered right, {len(LUCKY)} of them by luck; {len(facts)} kept")
