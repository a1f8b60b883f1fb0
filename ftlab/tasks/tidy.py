"""The task `tidy`: a colleague's hasty note in, the clean sentence out. How many words of an answer are right?

Capitals, punctuation, apostrophes and spelling belong to their word: "its" for "It's" is a wrong word, "tomorrow" for
"tomorrow?" too. The rows are in data/tidy; its README says what a clean sentence is.
"""

from difflib import SequenceMatcher

SYSTEM = "Clean up this note."


def words_right(answer: str, clean: str) -> float:
    """The share of words right: m / max(words of `answer`, words of `clean`), from 0 to 1.

    m is the number of words in the matching blocks of `difflib.SequenceMatcher`: the longest common run of words, then
    the same to its left and to its right. So one word too many or too few costs one word and does not make all later
    words wrong, and an answer that goes on and on loses by its length. Two empty texts are equal: 1.
    """
    got, want = answer.split(), clean.split()
    blocks = SequenceMatcher(None, got, want, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(len(got), len(want)) if got or want else 1.0


def scorer(answer: str, row: dict) -> float:
    """`words_right` of an answer for a row of data/tidy, whose completion is the clean sentence."""
    return words_right(answer, row["completion"][-1]["content"])
