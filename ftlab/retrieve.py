"""Which of these texts is a question about? BM25 over words, for notebook 01: passages to read, examples for a prompt.

Reference: Robertson & Zaragoza 2009, *The Probabilistic Relevance Framework: BM25 and Beyond*.
"""

import re
from collections.abc import Sequence


class BM25:
    """An index of texts by bm25s: sum over the query's words of idf(w) * tf / (tf + k1 (1 - b + b len / mean len)).

    k1 = 1.5, b = 0.75; idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5)), with w in n of N texts (Lucene's form, never
    negative). Words: runs of letters and digits, lower case, no English stop words: "credit" does not find "credits".
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        if not any(words := [_words(text) for text in texts]):
            raise ValueError(f"got {len(texts)} texts without a word to search for, wanted some: are they stop words?")
        self._index.index(words, show_progress=False)

    def search(self, query: str, k: int) -> list[int]:
        """The row numbers of the k best texts, the best first; texts that share no word with the query are left out."""
        if not (words := _words(query)):
            return []
        scores = self._index.get_scores(words)
        return [int(row) for row in (-scores).argsort(kind="stable")[:k] if scores[row] > 0]


def _words(text: str) -> list[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return [word for word in re.findall(r"\w+", text.casefold()) if word not in STOPWORDS_EN]
