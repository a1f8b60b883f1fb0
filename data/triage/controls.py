"""A control for `triage` that needs no language model: `python data/triage/controls.py` scores it on validation.jsonl.

What a programmer does in an hour. Intent, urgency and language are three classifiers: logistic regression on the TF-IDF
of words and of runs of letters, which sees through typos and Hinglish spellings. The order number is the first run of
six digits that no word before it calls something else. The refund is a number after a word that asks for money back, if
a classifier of the same kind says that the ticket asks for it.

The constants were chosen on validation.jsonl; hand_test.jsonl chose nothing. The classifier is scikit-learn's
(TfidfVectorizer, LogisticRegression), written in torch: where scikit-learn is installed, transformers imports it, and
every notebook of the course starts two to three seconds later.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np
import torch

from ftlab.tasks import triage

ORDER = re.compile(r"(?<!\d)(?:\d{6}|\d{3} \d{3})(?!\d)")
NOT_AN_ORDER = re.compile(r"(?:pin\w*|code|otp|postal)\W*(?:is|hai|no\.?)?\W*$", re.I)
AMOUNT = re.compile(r"(?<![\d-])\d{1,2},\d{3}(?!\d)|(?<![\d-])\d{2,5}(?!\d)")


class Classic:
    """The control, fitted to rows of data/triage; `answer(ticket)` is a label as JSON."""

    def __init__(self, rows: Sequence[dict]) -> None:
        tickets = [row["prompt"][-1]["content"] for row in rows]
        labels = [json.loads(row["completion"][-1]["content"]) for row in rows]
        self.classes = {name: Classifier(tickets, [label[name] for label in labels]) for name in triage.CLASSES}
        shown, right = [], []
        for ticket, label in zip(tickets, labels, strict=True):
            for text, amount in amounts(ticket):
                shown.append(text)
                right.append(amount == label["refund_amount"])
        self.asked_back = Classifier(shown, right)

    def answer(self, ticket: str) -> str:
        label = {name: max(chances := model(ticket), key=chances.get) for name, model in self.classes.items()}
        label |= {"order_id": order_number(ticket), "refund_amount": self.refund(ticket)}
        return json.dumps({name: label[name] for name in triage.FIELDS})

    def refund(self, ticket: str) -> int | None:
        """The amount that is likeliest to be asked back, if that is likelier than not."""
        found = amounts(ticket)
        if not found:
            return None
        chances = [self.asked_back(text)[True] for text, _ in found]
        best = chances.index(max(chances))
        return found[best][1] if chances[best] > 0.5 else None


class Classifier:
    """Texts to the chances of labels: softmax(W x + b), where x is the TF-IDF of a text's words and runs of letters.

    W, b minimize sum_i v_i CE(W x_i + b, y_i) / N + |W|^2 / (2 C N); with two labels |W|^2 counts twice, since
    scikit-learn has one w = W_1 - W_0 there. v_i = N / (labels * texts of the label of i): a rare label counts as much.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[Hashable], C: float = 30) -> None:
        self.labels = sorted(set(labels))
        counts = [pieces(text) for text in texts]
        found = Counter(piece for kinds in counts for kind in kinds for piece in kind)
        self.place = {piece: i for i, piece in enumerate(found)}
        self.idf = {piece: math.log((1 + len(texts)) / (1 + n)) + 1 for piece, n in found.items()}
        y = torch.tensor([self.labels.index(label) for label in labels])
        balanced = len(y) / (len(self.labels) * y.bincount().double())
        x = self.tfidf(counts)
        W = torch.zeros(len(self.place), len(self.labels), dtype=torch.float64, requires_grad=True)
        b = torch.zeros(len(self.labels), dtype=torch.float64, requires_grad=True)
        weight = 2 if len(self.labels) == 2 else 1
        loss = torch.nn.CrossEntropyLoss(balanced, reduction="sum")
        steps = torch.optim.LBFGS([W, b], max_iter=200, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

        def closure():
            steps.zero_grad()
            total = loss(torch.sparse.mm(x, W) + b, y) / len(y) + weight * W.square().sum() / (2 * C * len(y))
            total.backward()
            return total

        steps.step(closure)
        self.W, self.b = W.detach(), b.detach()

    def tfidf(self, counts: Sequence[tuple[Counter, Counter]]) -> torch.Tensor:
        """(texts, pieces), sparse: (1 + ln n) idf of each piece that was seen in training; either kind has length 1."""
        rows, columns, values = [], [], []
        for i, kinds in enumerate(counts):
            for kind in kinds:
                weights = {p: (1 + math.log(n)) * self.idf[p] for p, n in kind.items() if p in self.idf}
                length = math.hypot(*weights.values())
                for piece, weight in weights.items():
                    rows.append(i)
                    columns.append(self.place[piece])
                    values.append(weight / length)
        shape = (len(counts), len(self.place))
        return torch.sparse_coo_tensor([rows, columns], values, shape, dtype=torch.float64, check_invariants=True)

    def __call__(self, text: str) -> dict[Hashable, float]:
        chances = (torch.sparse.mm(self.tfidf([pieces(text)]), self.W) + self.b).softmax(-1)[0]
        return dict(zip(self.labels, chances.tolist(), strict=True))


def pieces(text: str) -> tuple[Counter, Counter]:
    """Counts: of words and pairs of words, and of the runs of 2 to 5 letters in a word with a blank at either end."""
    words = re.findall(r"\b\w\w+\b", text.lower())
    letters = Counter()
    for word in text.lower().split():
        word = f" {word} "
        letters.update(("", word[i : i + n]) for n in range(2, min(5, len(word)) + 1) for i in range(len(word) - n + 1))
    return Counter([*words, *map(" ".join, pairwise(words))]), letters


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
        labels = [json.loads(row["completion"][0]["content"]) for row in rows["validation"]]
        pairs = list(zip(map(json.loads, said), labels, strict=True))
        shares = {name: round(float(np.mean([a[name] == b[name] for a, b in pairs])), 3) for name in triage.FIELDS}
        print(f"{n:,} tickets: {score(said, rows['validation'], triage.scorer)} {shares}")


if __name__ == "__main__":
    main()
