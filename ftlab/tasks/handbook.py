"""The task `handbook`: a question about a page of rules made up for this course. Is the answer in the reply?"""

import re
import unicodedata
from collections.abc import Sequence

SYSTEM = "Answer with a few words from the handbook."


def passages(pages: Sequence[dict]) -> list[dict[str, str]]:
    """The paragraphs of pages ({id, title, text}) as {page, text}, led by the title, each with its list or table."""
    return [
        {"page": page["id"], "text": f"{page['title']}: " + block.replace("\n\n", "\n")}
        for page in pages
        for block in re.split(r"\n\n(?!- |\d+\. |\|)", page["text"])
    ]


def prompt(question: str, texts: Sequence[str] = ()) -> list[dict[str, str]]:
    """The chat that asks a question, with the texts before it: the model answers from what stands nearest."""
    user = "\n\n".join([*texts, f"Question: {question}"]) if texts else question
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def scorer(reply: str, question: dict) -> bool:
    """Whether `question["answer"]` or a form in `question["accept"]` stands in the reply, as whole words in a row.

    Case and punctuation do not count, except within a number. A form that is a bare number ("8" for "8 minutes")
    counts if it is the whole reply, since many a wrong reply holds it too; an answer that is one counts anywhere.
    """
    said, answer = _words(reply), _words(question["answer"])
    forms = {answer, *map(_words, question["accept"])} - {"  "}
    return said in forms or any(f in said for f in forms if f == answer or not re.fullmatch(r" [\d.:]+ ", f))


def _words(text: str) -> str:
    """The words of a text, lower case, each with a space on both sides; 1,850 is 1850, 4.20 and 4:20 are one word."""
    text = re.sub(r"(?<=\d),(?=\d)", "", unicodedata.normalize("NFKC", text).casefold())
    words = re.findall(r"\d+(?:[.:]\d+)+|\w+|%", text)
    return f" {' '.join(words)} "
