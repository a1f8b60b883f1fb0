"""Hasty notes from clean sentences: `python data/tidy/make.py` writes train.jsonl, validation.jsonl and test.jsonl.

The clean sentences are those of sentences/*.txt and of the handbook's pages. A topic file or a page is one *group*, and
all sentences of a group are in one split. A note is what a hurried colleague types for one sentence, or for two short
ones: no capitals, no punctuation, and slips of several kinds. One seed, plain Python: the same bytes on every machine.
"""

import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import order

HERE = Path(__file__).parent
PAGES = HERE.parent / "handbook" / "pages"
SEED = 20
ROUNDS = {"train": 2, "validation": 1, "test": 1}  # each sentence is in as many notes, with slips of their own
HELD_OUT = {"topic": 4, "page": 7}  # groups in validation, and as many in test
SYSTEM = "Clean up this note."

# What people type for a word. The first table is habit, the second holds words that sound or look alike.
HABITS = {
    "please": ["pls", "plz"],
    "you": ["u"],
    "your": ["ur"],
    "thanks": ["thx"],
    "tomorrow": ["tmrw", "tommorow", "tomorow"],
    "tonight": ["tonite"],
    "because": ["becuase", "bcoz", "becaus"],
    "people": ["ppl"],
    "before": ["b4", "befor"],
    "though": ["tho"],
    "through": ["thru"],
    "message": ["msg"],
    "messages": ["msgs"],
    "minutes": ["mins"],
    "receive": ["recieve"],
    "received": ["recieved"],
    "receipt": ["reciept"],
    "until": ["untill"],
    "which": ["wich"],
    "friend": ["freind"],
    "their": ["thier"],
    "definitely": ["definately"],
    "separate": ["seperate"],
    "address": ["adress"],
    "calendar": ["calender"],
    "Wednesday": ["wensday", "wednsday"],
    "February": ["febuary"],
    "really": ["realy"],
    "always": ["allways"],
    "business": ["buisness"],
    "written": ["writen"],
    "coming": ["comming"],
    "believe": ["beleive"],
    "enough": ["enuf"],
    "night": ["nite"],
    "didn't": ["didnt", "dint"],
}
SOUNDALIKES = [
    ["their", "there", "they're"],
    ["its", "it's"],
    ["your", "you're"],
    ["too", "to"],
    ["than", "then"],
    ["off", "of"],
    ["where", "were", "we're"],
    ["who's", "whose"],
    ["from", "form"],
    ["quite", "quiet"],
    ["lose", "loose"],
    ["here", "hear"],
    ["know", "no"],
    ["whether", "weather"],
    ["whole", "hole"],
    ["brake", "break"],
    ["week", "weak"],
    ["by", "buy"],
    ["right", "write"],
    ["wait", "weight"],
    ["passed", "past"],
    ["piece", "peace"],
]
# How people misspell: (what is in the word, what they write), after the first letter.
MISSPELLINGS = [
    (r"([bcdfglmnprst])\1", r"\1"),  # runing, acount
    (r"(?<=[aeiou])([lmnprst])(?=(?:ing|ed|er|y)$)", r"\1\1"),  # comming, rainned
    (r"ie", "ei"),
    (r"ei", "ie"),
    (r"(?<=[a-z])e(?=ly$|ment$)", ""),
    (r"ent$", "ant"),
    (r"an(?=t$|ce$)", "en"),
    (r"able$", "ible"),
    (r"ould", "uld"),
    (r"ough", "ouh"),
    (r"(?<=[a-z])ght", "gth"),
    (r"ph", "f"),
    (r"(?<=[cwr])h", ""),  # wich, scool
    (r"ery$", "ary"),
    (r"(?<=[bcdfglmnprstv])e(?=[lmnr][a-z])", "a"),  # calandar
    (r"(?<=[bcdfglmnprstv])a(?=[lmnr][a-z])", "e"),  # seperate
    (r"or$", "er"),
    (r"tion", "sion"),
    (r"(?<=[a-z])k(?=n|ed$)", "ck"),
    (r"(?<=[a-z])ck", "k"),
    (r"(?<=[a-z])ed$", "d"),  # askd
    (r"(?<=[a-z])e(?=[nr]$)", ""),
]
KEYBOARD = ["qwertyuiop", "asdfghjkl", "zxcvbnm"]


# --- Clean sentences --------------------------------------------------------------------------------------------------


def handbook_sentences(text: str) -> list[str]:
    """The plain sentences of a page: 6 to 24 words, no quotes, brackets, colons, semicolons or dashes.

    Those signs are left out because nobody can know from a note whether its writer would have set them.
    """
    sentences = []
    for line in text.splitlines()[1:]:
        line = re.sub(r"[*_`|]", "", line).strip().lstrip("- ")
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(line.split())):
            plain = re.fullmatch(r"[A-Z](?:[A-Za-z0-9 ,.'-]|(?<=\d):(?=\d))*[.?]", sentence)
            if plain and 6 <= len(sentence.split()) <= 24:
                sentences.append(sentence)
    return sentences


def read_groups() -> dict[str, list[str]]:
    """The clean sentences by group: "topic/NAME" for sentences/NAME.txt, "page/NN-slug" for a page of the handbook."""
    groups = {
        f"topic/{path.stem}": path.read_text(encoding="utf-8").splitlines()
        for path in sorted((HERE / "sentences").glob("*.txt"))
    }
    for path in sorted(PAGES.glob("*.md")):
        groups[f"page/{path.stem}"] = handbook_sentences(path.read_text(encoding="utf-8"))
    for group, sentences in groups.items():
        for sentence in sentences:
            if not 6 <= len(sentence.split()) <= 24 or not re.fullmatch(r"[A-Z][A-Za-z0-9 ,.':?-]*[.?]", sentence):
                raise ValueError(f"{group}: want 6 to 24 words from a capital to . or ?, plain signs; got {sentence!r}")
    return groups


# --- Slips ------------------------------------------------------------------------------------------------------------


def neighbours(letter: str) -> str:
    """The keys left and right of a letter on its row of the keyboard."""
    row = next(row for row in KEYBOARD if letter in row)
    i = row.index(letter)
    return row[max(i - 1, 0) : i] + row[i + 1 : i + 2]


def slip(word: str, rng: random.Random) -> str:
    """`word` (lower-case letters) with one slip of the fingers: a letter dropped, swapped, doubled or the next key.

    The first letter stays, as it mostly does when people type.
    """
    i = rng.randrange(1, len(word))
    kind = rng.random()
    if kind < 0.30:
        return word[:i] + word[i + 1 :]
    if kind < 0.75:
        i = min(i, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if kind < 0.88:
        return word[:i] + word[i] + word[i:]
    return word[:i] + rng.choice(neighbours(word[i])) + word[i + 1 :]


def misspell(word: str, rng: random.Random) -> str:
    """`word` as somebody spells it who has heard it more often than seen it; a slip if there is no such way."""
    ways = [word[0] + re.sub(old, new, word[1:], count=1) for old, new in MISSPELLINGS]
    ways = [way for way in ways if way != word]
    return rng.choice(ways) if ways else slip(word, rng)


def mistype(word: str, rng: random.Random) -> str:
    """What a hurried colleague types for one clean word without punctuation: mostly the word itself in lower case."""
    alike = [other for group in SOUNDALIKES if word.lower() in group for other in group if other != word.lower()]
    habits = HABITS.get(word, HABITS.get(word.lower(), []))
    dice = rng.random()
    if habits and dice < 0.20:
        return rng.choice(habits)
    if alike and dice < 0.15:
        return rng.choice(alike).replace("'", "")
    word = word.lower() if rng.random() < 0.97 else word
    if "'" in word and rng.random() < 0.9:
        word = word.replace("'", "")
    if word.isalpha() and word.islower() and len(word) > 3 and rng.random() < 0.08:
        word = misspell(word, rng) if rng.random() < 0.5 else slip(word, rng)
    return word


def split_word(word: str, known: set[str], rng: random.Random) -> str:
    """`word` with a space inside: between two words where it has such a place ("with out"), else rarely somewhere."""
    places = [i for i in range(2, len(word) - 1) if word[:i] in known and word[i:] in known]
    if not places and rng.random() < 0.7:
        return word
    i = rng.choice(places or range(2, len(word) - 1))
    return f"{word[:i]} {word[i:]}"


def mess(sentence: str, known: set[str], rng: random.Random) -> str:
    """A hasty note for `sentence`. `known` are the words that a split may leave; the note differs from the sentence."""
    keeps_signs = rng.random() < 0.1
    text = sentence if keeps_signs else re.sub(r"[,?]|\.(?!\d)", "", sentence)
    text = text.replace(":", rng.choice([":", " ", "."]))
    words = [mistype(word, rng) for word in text.split()]
    if len(words) > 5 and rng.random() < 0.12:  # two words run together
        i = rng.randrange(len(words) - 1)
        words[i : i + 2] = [words[i] + words[i + 1]]
    for i in range(len(words) - 1):  # "rs 35" -> "rs35", "6 pm" -> "6pm"
        if words[i] == "rs" or words[i + 1] in ("am", "pm", "km"):
            words[i : i + 2] = [words[i] + words[i + 1], ""] if rng.random() < 0.4 else words[i : i + 2]
    words = [word for word in words if word]
    long_words = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4]
    for i in long_words:
        if rng.random() < 0.03:
            words[i] = split_word(words[i], known, rng)
    note = " ".join(words)
    return note if note != sentence else mess(sentence, known, rng)


# --- Rows and files ---------------------------------------------------------------------------------------------------


def split_groups(groups: dict[str, list[str]], rng: random.Random) -> dict[str, list[str]]:
    """The names of the groups of each split: of topics and of pages, `HELD_OUT` go to validation and to test."""
    splits = {"train": [], "validation": [], "test": []}
    for kind, held_out in HELD_OUT.items():
        names = [name for name in groups if name.startswith(kind)]
        rng.shuffle(names)
        splits["validation"] += names[:held_out]
        splits["test"] += names[held_out : 2 * held_out]
        splits["train"] += names[2 * held_out :]
    return splits


def join_short(sentences: list[str], rng: random.Random) -> list[str]:
    """The sentences in a random order, some short ones joined in twos: a note often says two things."""
    order, joined = rng.sample(sentences, len(sentences)), []
    while order:
        text = order.pop()
        if order and len(text.split()) + len(order[-1].split()) <= 20 and rng.random() < 0.4:
            text += " " + order.pop()
        joined.append(text)
    return joined


def make_rows(split: str, names: list[str], groups: dict[str, list[str]], rng: random.Random) -> list[dict]:
    """The rows of a split. In rounds: each sentence comes once, shuffled, before any comes again with other slips.

    So the first n rows are a smaller data set of the same kind, with as many different sentences as there can be.
    """
    known = {word for sentences in groups.values() for s in sentences for word in re.findall(r"[a-z]{2,}", s)}
    pairs, notes = [], set()
    for _ in range(ROUNDS[split]):
        round_ = [(text, name) for name in names for text in join_short(groups[name], rng)]
        rng.shuffle(round_)
        for text, name in round_:
            while (note := mess(text, known, rng)) in notes:
                pass
            notes.add(note)
            pairs.append((note, text, name))
    return [
        {
            "id": f"{split}-{number:04d}",
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": note}],
            "completion": [{"role": "assistant", "content": text}],
            "group": name,
        }
        for number, (note, text, name) in enumerate(pairs, start=1)
    ]


def build() -> dict[str, bytes]:
    """The bytes of each made file, by its name."""
    rng = random.Random(SEED)
    groups = read_groups()
    splits = split_groups(groups, rng)
    files = {}
    for split, names in splits.items():
        rows = make_rows(split, names, groups, rng)
        if split != "train":
            rows = order.ordered(f"tidy/{split}", rows)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        files[f"{split}.jsonl"] = ("\n".join(lines) + "\n").encode()
    return files


if __name__ == "__main__":
    for file, content in build().items():
        (HERE / file).write_bytes(content)
        print(f"{file}: {len(content.splitlines()):,} rows")
