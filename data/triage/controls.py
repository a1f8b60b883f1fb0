"""A control for `triage` that needs no language model: `python data/triage/controls.py` scores it on validation.jsonl.

What a programmer does in an hour. Intent, urgency and language are three classifiers of scikit-learn: logistic
regression on the TF-IDF of words and of runs of letters, which sees through typos and Hinglish spellings. The order
number is the first run of six digits that no word before it calls something else. The refund is a number after a word
that asks for money back, if a classifier of the same kind says that the ticket asks for an amount.

The constants were chosen on validation.jsonl; hand_test.jsonl chose nothing.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from ftlab.tasks import triage

ORDER = re.compile(r"(?<!\d)(?:\d{6}|\d{3} \d{3})(?!\d)")
NOT_AN_ORDER = re.compile(r"(?:pin\w*|code|otp|postal)\W*(?:is|hai|no\.?)?\W*$", re.I)
AMOUNT = re.compile(r"(?<![\d-])\d{1,2},\d{3}(?!\d)|(?<![\d-])\d{2,5}(?!\d)")


class Classic:
    """The control, fitted to rows of data/triage; `answer(ticket)` is a label as JSON."""

    def __init__(self, rows: Sequence[dict]) -> None:
        tickets = [row["prompt"][-1]["content"] for row in rows]
        labels = [json.loads(row["completion"][-1]["content"]) for row in rows]
        self.classes = {name: classifier().fit(tickets, [label[name] for label in labels]) for name in triage.CLASSES}
        shown, right = [], []
        for ticket, label in zip(tickets, labels, strict=True):
            for text, amount in amounts(ticket):
                shown.append(text), right.append(amount == label["refund_amount"])
        self.asked_back = classifier().fit(shown, right)

    def answer(self, ticket: str) -> str:
        label = {name: str(model.predict([ticket])[0]) for name, model in self.classes.items()}
        label |= {"order_id": order_number(ticket), "refund_amount": self.refund(ticket)}
        return json.dumps({name: label[name] for name in triage.FIELDS})

    def refund(self, ticket: str) -> int | None:
        """The amount that is likeliest to be asked back, if that is likelier than not."""
        found = amounts(ticket)
        if not found:
            return None
        chances = self.asked_back.predict_proba([text for text, _ in found])[:, 1]
        best = int(np.argmax(chances))
        return found[best][1] if chances[best] > 0.5 else None


def classifier():
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    return make_pipeline(make_union(words, letters), LogisticRegression(C=30, max_iter=1000, class_weight="balanced"))


def order_number(ticket: str) -> str | None:
    for match in ORDER.finditer(ticket):
        if not NOT_AN_ORDER.search(ticket[: match.start()]):
            return match.group().replace(" ", "")
    return None


def amounts(ticket: str) -> list[tuple[str, int]]:
    """Each number that may be rupees, with the ticket around it: the number is AMOUNT, the others are OTHER."""
    found = []
    for match in AMOUNT.finditer(ticket):
        around = (
            ticket[max(0, match.start() - 60) : match.start()] + " AMOUNT " + ticket[match.end() : match.end() + 40]
        )
        found.append((re.sub(r"\d+", "OTHER", around), int(match.group().replace(",", ""))))
    return found


def main() -> None:
    from ftlab.evaluate import score
    from ftlab.paths import DATA

    rows = {name: triage.read(DATA / "triage" / f"{name}.jsonl") for name in ("train", "validation")}
    for n in (600, len(rows["train"])):
        control = Classic(rows["train"][:n])
        said = [control.answer(row["prompt"][-1]["content"]) for row in rows["validation"]]
        fields = [triage.fields_right(*pair) for pair in zip(said, rows["validation"], strict=True)]
        shares = {name: round(float(np.mean([f[name] for f in fields])), 3) for name in triage.FIELDS}
        print(f"{n:,} tickets: {score(said, rows['validation'], triage.scorer)} {shares}")


if __name__ == "__main__":
    main()
