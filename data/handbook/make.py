"""The handbook of RasoiRun: `python data/handbook/make.py` checks questions.jsonl and rewrites pages.jsonl.

pages/*.md and questions.jsonl are written by hand; pages.jsonl is made from the pages.
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
TYPES = {
    "id": str,
    "question": str,
    "answer": str,
    "accept": list,
    "page": str,
    "split": str,
    "evidence": str,
    "paraphrases": list,
}


def read_pages() -> list[dict]:
    """One {"id", "title", "text"} per page, in order of the file names."""
    pages = []
    for path in sorted((HERE / "pages").glob("*.md")):
        first_line, _, text = path.read_text(encoding="utf-8").partition("\n")
        if not first_line.startswith("# ") or not text.strip():
            raise ValueError(f"{path.name}: want a first line '# Title' and a text below it, got {first_line!r}")
        pages.append({"id": path.stem, "title": first_line[2:].strip(), "text": text.strip()})
    return pages


def read_questions() -> list[dict]:
    """The rows of questions.jsonl."""
    rows = []
    for number, line in enumerate((HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"questions.jsonl, line {number}: not JSON ({error})") from None
    return rows


def contains(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` as whole words, whatever the case: "Rs 35" is not in "Rs 350"."""
    return re.search(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)(?![,.]\d)", text.casefold()) is not None


def check_row(row: dict, texts: dict[str, str]) -> None:
    """Raises ValueError, naming row and cause, if the row alone is wrong. `texts` maps page id to page text."""
    name = row.get("id", f"row without id, {row}")
    if list(row) != list(TYPES):
        raise ValueError(f"{name}: want the keys {list(TYPES)} in this order, got {list(row)}")
    for key, wanted in TYPES.items():
        if not isinstance(row[key], wanted):
            raise ValueError(f"{name}: {key} must be a {wanted.__name__}, got {row[key]!r}")
    for text in [row["question"], row["answer"], row["evidence"], *row["accept"], *row["paraphrases"]]:
        if not isinstance(text, str) or not text.strip() or text != text.strip():
            raise ValueError(f"{name}: want texts without blanks around them, got {text!r}")
    if row["split"] not in ("train", "test"):
        raise ValueError(f"{name}: split must be train or test, got {row['split']!r}")
    if len(row["paraphrases"]) != (2 if row["split"] == "train" else 0):
        raise ValueError(f"{name}: a train row has two paraphrases and a test row none, got {row['paraphrases']}")
    if len(row["answer"].split()) > 8:
        raise ValueError(f"{name}: the answer has more than 8 words: {row['answer']!r}")
    if row["page"] not in texts:
        raise ValueError(f"{name}: there is no page {row['page']!r} in pages/")
    if row["evidence"] not in texts[row["page"]]:
        raise ValueError(f"{name}: the evidence is not verbatim in pages/{row['page']}.md: {row['evidence']!r}")
    if not any(contains(row["evidence"], form) for form in [row["answer"], *row["accept"]]):
        raise ValueError(f"{name}: neither the answer nor an accepted form is in the evidence: {row['answer']!r}")


def check_questions(rows: list[dict], pages: list[dict]) -> None:
    """Raises ValueError, naming row and cause, if a row is wrong, repeats a question or has a fact of the other split.

    Two rows state one fact if they have the same page and either the same answer or overlapping evidence.
    """
    texts = {page["id"]: page["text"] for page in pages}
    seen: dict[str, str] = {}
    ids: set[str] = set()
    for row in rows:
        check_row(row, texts)
        if row["id"] in ids or not re.fullmatch(r"hq-\d{3}", row["id"]):
            raise ValueError(f"{row['id']}: want an id like hq-007 that no other row has")
        ids.add(row["id"])
        for question in [row["question"], *row["paraphrases"]]:
            if question.casefold() in seen:
                raise ValueError(f"{row['id']}: question already asked in {seen[question.casefold()]}: {question!r}")
            seen[question.casefold()] = row["id"]
    for page in pages:
        train, test = ([r for r in rows if r["page"] == page["id"] and r["split"] == s] for s in ("train", "test"))
        if not train or not test:
            raise ValueError(f"{page['id']}: {len(train)} train and {len(test)} test questions; want some of both")
        for a, b in [(a, b) for a in train for b in test]:
            if a["answer"].casefold() == b["answer"].casefold():
                raise ValueError(f"{b['id']}: same page and answer as train row {a['id']}: {b['answer']!r}")
            if a["evidence"] in b["evidence"] or b["evidence"] in a["evidence"]:
                raise ValueError(f"{b['id']}: shares its evidence with train row {a['id']}: {b['evidence']!r}")


def build() -> dict[str, bytes]:
    """File name -> bytes of every generated file, after checking the questions."""
    pages = read_pages()
    check_questions(read_questions(), pages)
    return {"pages.jsonl": "".join(json.dumps(page, ensure_ascii=False) + "\n" for page in pages).encode()}


if __name__ == "__main__":
    for name, content in build().items():
        (HERE / name).write_bytes(content)
