"""Controls for `tidy`, that need no model: `python data/tidy/controls.py` scores them into controls.json.

`untouched` returns the note as it is. `Rules.library` is the quick way: the spelling library's own correction, capitals
and a full stop. `Rules.tidy` is what an experienced programmer would write in place of a model:

1. spelling by a kept library, symspellpy (pure Python, an English dictionary of 82,834 words and 243,342 word pairs in
   the package), with the words of the training rows added. What was typed may be right, or a near word is meant, or two
   words that ran together, or one that fell apart: the likeliest sequence of words wins (Viterbi over word pairs);
2. habits of typing, apostrophes and usual capitals as counted in the training rows ("pls" -> please, "ravi" -> Ravi);
3. commas where the training rows mostly set one between such words ("but", "so");
4. a capital at the start and for a word that nobody knows, a question mark if sentences that begin like this mostly end
   so, otherwise a full stop.

Everything counted is counted in train.jsonl. The few constants below were tuned on validation.jsonl, never on
hand_test.jsonl.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
from symspellpy import SymSpell, Verbosity

from ftlab.tasks.tidy import scorer

HERE = Path(__file__).parent
SPLITS = ("validation", "test", "hand_test")

# Prices in nats, tuned on validation.jsonl.
EDIT = {1: 7.0, 2: 16.0}  # a word that is so many letters away from the typed one
OTHER_START = 2.0  # more if the first letter is wrong
REAL_WORD = 3.0  # more if what was typed is a word
UNKNOWN = 16.0  # a typed word that nobody knows stays as it is: a name, a code
APART, TOGETHER = 6.0, 6.0  # a missing space, a space too many
BEAM = 12  # ways to read the words so far that are followed up
UNSEEN = 1e-11  # the share of a word that is in no list


def read_rows(name: str) -> list[dict]:
    """The rows of data/tidy/NAME.jsonl."""
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def note_of(row: dict) -> str:
    return row["prompt"][-1]["content"]


def clean_of(row: dict) -> str:
    return row["completion"][-1]["content"]


def untouched(note: str) -> str:
    """The note as it is."""
    return note


def bare(word: str) -> str:
    """A clean word without the punctuation around it: "Rohan's?" -> "Rohan's"."""
    return word.strip(",.?")


class Rules:
    """The rules, with what they count in training rows: `Rules(rows).tidy(note)` is the clean sentence."""

    def __init__(self, rows: list[dict]):
        sentences = sorted({clean_of(row) for row in rows})
        self._count_words(sentences)
        self._count_signs(sentences)
        self._count_habits(rows)
        self.spelling = SymSpell(max_dictionary_edit_distance=2)
        package = files("symspellpy")
        self.spelling.load_dictionary(package / "frequency_dictionary_en_82_765.txt", 0, 1)
        self.spelling.load_bigram_dictionary(package / "frequency_bigramdictionary_en_243_342.txt", 0, 2)
        self.total = sum(self.spelling.words.values())
        self.dictionary = dict(self.spelling.words)
        for word, count in self.words.items():
            if not any(letter.isdigit() for letter in word):
                self.spelling.create_dictionary_entry(word, count)
        self._price, self._proposals = cache(self._price), cache(self._proposals)

    # --- What is counted ---

    def _count_words(self, sentences: list[str]) -> None:
        """Words, word pairs and, for words inside a sentence, how they are written."""
        self.words, self.pairs, written = Counter(), Counter(), defaultdict(Counter)
        for sentence in sentences:
            words = sentence.split()
            lower = ["<s>", *(bare(word).lower() for word in words)]
            self.words.update(lower[1:])
            self.pairs.update(pairwise(lower))
            for before, word in pairwise(words):
                if before[-1] not in ".?":  # "Desk" after "Neem", "desk" else
                    for key in (bare(word).lower(), (bare(before).lower(), bare(word).lower())):
                        written[key][bare(word)] += 1
        self.own_total, self.followed = self.words.total(), Counter()
        for (first, _), count in self.pairs.items():
            self.followed[first] += count
        self.usual = {word: forms.most_common(1)[0][0] for word, forms in written.items()}

    def _count_signs(self, sentences: list[str]) -> None:
        """How often a comma or the end of a sentence stands before two words; how often a start asks a question."""
        self.signs, self.gaps = {",": Counter(), ".": Counter()}, Counter()
        self.questions, self.starts = Counter(), Counter()
        self.before_sign, self.seen = Counter(), Counter()
        for sentence in sentences:
            words = sentence.split()
            lower = [bare(word).lower() for word in words]
            for i in range(1, len(words)):
                for key in self._gap_keys(lower, i):
                    self.gaps[key] += 1
                    self.signs[","][key] += words[i - 1][-1] == ","
                    self.signs["."][key] += words[i - 1][-1] in ".?"
                self.seen[lower[i - 1]] += 1
                self.before_sign[lower[i - 1]] += words[i - 1] != bare(words[i - 1])
            for part in re.findall(r"[^.?]+[.?]", sentence):
                start = part.lower().split()
                for key in (" ".join(start[:2]), start[0]):
                    self.starts[key] += 1
                    self.questions[key] += part.endswith("?")

    def _count_habits(self, rows: list[dict]) -> None:
        """What is meant by a typed word: notes beside their sentences, where both have the same number of words."""
        meant = defaultdict(Counter)
        for row in rows:
            typed = [bare(word).lower() for word in note_of(row).split()]
            clean = [bare(word).lower() for word in clean_of(row).split()]
            for _, a, b, c, d in SequenceMatcher(None, typed, clean, autojunk=False).get_opcodes():
                if b - a == d - c:
                    for word, right in zip(typed[a:b], clean[c:d], strict=True):
                        meant[word][right] += 1
        self.meant = {word: forms for word, forms in meant.items() if set(forms) != {word}}

    @staticmethod
    def _gap_keys(words: list[str], i: int) -> list[tuple]:
        """The keys under which the gap before word i is counted, the most telling first."""
        after = words[i + 1] if i + 1 < len(words) else ""
        return [("2", words[i], after), ("1", words[i])]

    # --- Words ---

    def _price(self, first: str, second: str) -> float:
        """-log of the chance that `second` follows `first`: pairs and words of the training rows and of the library."""
        own_pair = self.pairs[first, second] / (self.followed[first] + 5)
        pair = self.spelling.bigrams.get(f"{first} {second}", 0) / max(self.dictionary.get(first, 0), 1e6)
        word = 0.5 * self.dictionary.get(second, 0) / self.total + 0.5 * self.words[second] / self.own_total
        return -math.log(0.4 * own_pair + 0.3 * min(pair, 1.0) + 0.3 * word + UNSEEN)

    def _known(self, word: str) -> bool:
        return word in self.spelling.words or word in self.words

    def _proposals(self, typed: str) -> dict[tuple[str, ...], float]:
        """What a typed word may stand for, one or two words, and the price of the slip."""
        if any(sign.isdigit() for sign in typed):
            parts = re.fullmatch(r"(rs)(\d[\d,]*)|(\d[\d.:]*)(am|pm|km|mins)", typed)
            return {tuple(part for part in parts.groups() if part) if parts else (typed,): 0.0}
        prices = {(typed,): 0.0 if self._known(typed) else UNKNOWN}
        reach = 2 if len(typed) > 3 and not self._known(typed) else 1
        for found in self.spelling.lookup(typed, Verbosity.ALL, reach)[:20]:  # near ones first, then by frequency
            if found.distance:
                prices[found.term,] = EDIT[found.distance] + OTHER_START * (found.term[0] != typed[0])
                prices[found.term,] += REAL_WORD * self._known(typed)
        forms = self.meant.get(typed, Counter())
        for word, count in forms.items():
            if count > 1:
                price = -math.log(count / forms.total())
                prices[word,] = min(prices.get((word,), math.inf), price)
        if forms.total() > 2 and typed not in forms:  # nobody meant what was typed: "dont"
            prices[typed,] = UNKNOWN
        for i in range(1, len(typed)):
            left, right = typed[:i], typed[i:]
            if all(self._known(part) and (len(part) > 1 or part in "ai") for part in (left, right)):
                prices[left, right] = APART
        return prices

    def _spell(self, typed: list[str]) -> list[str]:
        """The cheapest words for the typed ones: the price of the slips plus that of each word after the one before."""
        best = [{"<s>": (0.0, [])}] + [{} for _ in typed]  # after i typed words: last word -> (price, words)
        for i, word in enumerate(typed):
            steps = [(i + 1, words, price) for words, price in self._proposals(word).items()]
            if i + 1 < len(typed) and self._known(joined := word + typed[i + 1]):
                steps.append((i + 2, (joined,), TOGETHER))
            for last, (so_far, path) in sorted(best[i].items(), key=lambda state: state[1])[:BEAM]:
                for j, words, price in steps:
                    total = so_far + price + sum(self._price(a, b) for a, b in pairwise((last, *words)))
                    if words[-1] not in best[j] or total < best[j][words[-1]][0]:
                        best[j][words[-1]] = total, path + list(words)
        return min(best[-1].values())[1]

    # --- Signs ---

    def _written(self, before: str, word: str) -> str:
        """The word with its capitals: as in the training rows, else a name if nobody knows it, else small."""
        if re.fullmatch(r"[a-z]+-\d+", word):  # a form or a code: X-4
            return word.upper()
        name = (word.isalpha() and not self._known(word)) or word.startswith("i'")
        written = self.usual.get((before, word)) or self.usual.get(word) or (word.capitalize() if name else word)
        return written if before else written[0].upper() + written[1:]

    def _mostly(self, hits: Counter, seen: Counter, keys: Iterable) -> bool:
        """Whether the first of the keys that was seen often enough mostly has the sign."""
        return next((hits[key] / seen[key] > 0.5 for key in keys if seen[key] >= 3), False)

    def library(self, note: str) -> str:
        """The library's own correction of the whole note, usual capitals, a capital and a full stop: the quick way."""
        words = self.spelling.lookup_compound(note, 2, ignore_non_words=True)[0].term.split()
        text = " ".join(self.usual.get(word, word) for word in words)
        return text[:1].upper() + text[1:] + "." if text else ""

    def tidy(self, note: str) -> str:
        """The clean sentence that the rules make of a note; signs that the note has stay. An empty note stays empty."""
        words, marks = [], []  # marks[i] stands after words[i]
        for run in re.findall(r"\S.*?(?:[,.?](?=\s|$)|$)", note):
            spelled = self._spell([word for typed in run.split() if (word := bare(typed).lower())])
            words += spelled
            marks += [""] * (len(spelled) - 1) + [run[-1] if run[-1] in ",.?" else ""] * bool(spelled)
        for i in range(1, len(words)):
            if not marks[i - 1] and (self.before_sign[words[i - 1]] or self.seen[words[i - 1]] < 3):
                keys = self._gap_keys(words, i)
                marks[i - 1] = next((s for s in self.signs if self._mostly(self.signs[s], self.gaps, keys)), "")
        out, start = [], 0
        for i, (word, mark) in enumerate(zip(words, marks, strict=True)):
            out.append(self._written(words[i - 1] if i > start else "", word) + mark)
            if mark in (".", "?") or i == len(words) - 1:
                opening = " ".join(words[start : start + 2]), words[start]
                question = mark == "?" or self._mostly(self.questions, self.starts, opening)
                out[-1] = bare(out[-1]) + ("?" if question else ".")
                start = i + 1
        return " ".join(out)


def control(rows: list[dict]) -> Callable[[str], str]:
    """The rules, counted in these rows, as a function from a note to a sentence: what notebook 10 races against."""
    return Rules(rows).tidy


# --- Scores -----------------------------------------------------------------------------------------------------------


def interval(values: list[float], draws: int = 10_000) -> list[float]:
    """The 95% interval of the mean of `values`, by a percentile bootstrap with a fixed seed."""
    values = np.asarray(values, dtype=float)
    means = values[np.random.default_rng(0).integers(0, len(values), (draws, len(values)))].mean(1)
    return [round(float(bound), 3) for bound in np.percentile(means, [2.5, 97.5])]


def exact(answer: str, row: dict) -> bool:
    """Whether an answer is the row's clean sentence, word for word; spaces around and between words do not count."""
    return scorer(answer, row) == 1


def scores(tidy, rows: list[dict]) -> dict:
    """Words right and exact sentences of a function from note to sentence, each with its 95% interval."""
    result = {"rows": len(rows)}
    for name, score in (("words_right", scorer), ("exact", exact)):
        values = [float(score(tidy(note_of(row)), row)) for row in rows]
        result[name] = {"mean": round(float(np.mean(values)), 3), "interval": interval(values)}
    return result


def main() -> None:
    rules = Rules(read_rows("train"))
    result = {
        "made_by": "python data/tidy/controls.py",
        "symspellpy": version("symspellpy"),
        "intervals": "95%, percentile bootstrap of the mean over the rows, 10,000 draws",
    }
    for name, tidy in (("untouched", untouched), ("library", rules.library), ("rules", rules.tidy)):
        result[name] = {split: scores(tidy, read_rows(split)) for split in SPLITS}
        for split, numbers in result[name].items():
            print(f"{name:10} {split:11}", *(f"{key} {numbers[key]['mean']:.3f}" for key in ("words_right", "exact")))
    (HERE / "controls.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
