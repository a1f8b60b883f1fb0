"""Retrieval: which texts is a question about? BM25 counts words, `Dense` compares a model's hidden states.

Both indexes are built over a list of strings and answer `search(query, k)` with row numbers of that list, so the same
two serve the passages of a handbook and the labelled tickets of a training set.

References: Robertson & Zaragoza 2009, *The Probabilistic Relevance Framework: BM25 and Beyond*; the idf is Lucene's,
which is never negative. Lu 2024, arXiv:2407.03618 (bm25s). Lewis et al. 2020, arXiv:2005.11401 (retrieval-augmented
generation).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ftlab.pipeline.evaluate import plain_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftlab.pipeline.data import Messages

RAG_SYSTEM = "Answer with a few words from the handbook."


@dataclass(frozen=True)
class Hit:
    """One text that was found: its row number in the index, and its score, which only ranks hits of one query."""

    row: int
    score: float


class Index(Protocol):
    """What both indexes can do."""

    def search(self, query: str, k: int) -> list[Hit]: ...


def passages(pages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The paragraphs of pages ({id, title, text}) as {page, text}, each text led by its page's title.

    Paragraphs are separated by an empty line; a list or a table stays with the paragraph that introduces it.
    """
    found = []
    for page in pages:
        blocks: list[str] = []
        for block in page["text"].split("\n\n"):
            if blocks and re.match(r"- |\d+\. |\|", block):
                blocks[-1] += "\n" + block
            else:
                blocks.append(block)
        found += [{"page": page["id"], "text": f"{page['title']}: {block}"} for block in blocks]
    return found


class BM25:
    """BM25 over words, by bm25s: sum over the query's words of idf(w) * tf (k1 + 1) / (tf + k1 (1 - b + b len / mean)).

    k1 = 1.5, b = 0.75; idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5)), with w in n of N texts. Words are runs of letters
    and digits, lower case, English stop words left out; "credit" does not find "credits". bm25s leaves out the factor
    (k1 + 1), as Lucene does, which changes no ranking.

    Raises ValueError if there are no texts, or none has a word.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        words = [_words(text) for text in _checked(texts)]
        if not any(words):
            raise ValueError(f"got {len(texts)} texts without a single word: were the strings read right?")
        self.size, self.bm25 = len(texts), bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self.bm25.index(words, show_progress=False)

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best texts, the best first; texts that share no word with the query are left out."""
        words = _words(query)
        if _k(k, self.size) and not words:
            return []
        return _best(self.bm25.get_scores(words), k, above=0.0)


class Dense:
    """Cosine of mean last hidden states of a language model: what it costs nothing to try, and no trained embedder.

    Raises ValueError if there are no texts.
    """

    def __init__(self, texts: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.size = model, tokenizer, len(_checked(texts))
        vectors = np.stack([self._embed(text) for text in texts])  # (N, C)
        self.mean = vectors.mean(0)  # all states of a language model point much the same way; what differs counts
        self.vectors = _unit(vectors - self.mean)

    def search(self, query: str, k: int) -> list[Hit]:
        """The k texts whose vector lies nearest to the query's, the nearest first; score is the cosine."""
        _k(k, self.size)
        return _best(self.vectors @ _unit(self._embed(query) - self.mean), k, above=-2.0)

    def _embed(self, text: str) -> np.ndarray:
        import torch

        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(self.model.device)
        if not ids.numel():
            raise ValueError("got a text without a token, which has no hidden state to average")
        with torch.inference_mode():
            states = self.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        return states[-1][0].float().mean(0).cpu().numpy()  # (1, T, C) -> (C,)


def recall(index: Index, questions: Sequence[dict[str, Any]], found_in: Sequence[dict[str, str]], k: int) -> list[bool]:
    """For each question {question, page, evidence}: does one of its k hits come from the page and hold the evidence?

    `found_in` are the rows that the index was built over, {page, text} each.
    """
    hits = [[found_in[hit.row] for hit in index.search(question["question"], k)] for question in questions]
    return [
        any(row["page"] == question["page"] and question["evidence"] in row["text"] for row in rows)
        for question, rows in zip(questions, hits, strict=True)
    ]


def rag_prompt(question: str, texts: Sequence[str]) -> Messages:
    """The chat that asks a question with the texts in front of it; without texts, the same chat with the question only.

    The texts come first and the question last: the model answers from what stands nearest to the answer.
    """
    user = "\n\n".join([*texts, f"Question: {question}"]) if texts else question
    return [{"role": "system", "content": RAG_SYSTEM}, {"role": "user", "content": user}]


def few_shot(prompt: Messages, shots: Sequence[dict[str, Any]], system: str | None = None) -> Messages:
    """A prompt ([system, user]) with answered rows (data.py) as earlier turns of the chat, the first shot first.

    Without `system` the prompt's own system message stays.
    """
    first = {"role": "system", "content": system} if system else prompt[0]
    return [first, *(message for row in shots for message in (row["prompt"][-1], *row["completion"])), *prompt[1:]]


def score_answer(reply: str, question: dict[str, Any]) -> dict[str, bool]:
    """Whether a reply is the answer or an accepted form of it (`exact`), and whether it holds one (`contained`).

    exact is the rule of data/handbook: the whole reply, ignoring case and punctuation. contained is for models that
    were never shown how short an answer should be: the words stand in the reply in a row. A bare number ("8" for "8
    minutes") does not count there, since many a wrong reply holds it, unless the answer itself is a bare number.
    """
    said, answer = plain_words(reply), plain_words(question["answer"])
    forms = {answer, *map(plain_words, question["accept"])} - {"  "}
    telling = {form for form in forms if form == answer or not re.fullmatch(r" [\d.:]+ ", form)}
    return {"exact": said in forms, "contained": any(form in said for form in telling)}


def _words(text: str) -> list[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return [word for word in re.findall(r"\w+", text.casefold()) if word not in STOPWORDS_EN]


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not len(texts):
        what = "one string" if isinstance(texts, str) else "no texts"
        raise ValueError(f"got {what}, wanted a list of texts: is the file empty, or did a filter remove every row?")
    return texts


def _k(k: int, size: int) -> int:
    if not 1 <= k <= size:
        raise ValueError(f"got k={k}, wanted 1 to {size}, the number of texts in the index")
    return k


def _best(scores: np.ndarray, k: int, above: float) -> list[Hit]:
    order = np.argsort(-scores, kind="stable")[:k]
    return [Hit(int(row), float(scores[row])) for row in order if scores[row] > above]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
