"""Quizzes: `quiz.show("02_lora_math")`, from data/quizzes/<notebook>.yaml, graded and explained in the notebook.

Each question is shown as Markdown, which every viewer of notebooks can typeset, with its answer folded away; below it,
where widgets run, stand the controls: letters to choose, or a field to type into, then Check. Everything works offline
and with the keyboard (Tab and Space; JupyterLab keeps the arrow keys for its cells). What was checked is stored by
ftlab.classroom.progress, so that a quiz can say what is left; `quiz.overview()` says it of all. A question in the file:

    - id: lora-step-0              unique in the file
      kind: single                 single | multiple: `options` | numeric: `answer` | order: `steps`
      text: What is $BA$ at step 0?
      options:                     each with its own explanation, right or wrong
        - {text: zero, right: true, why: ...}
      answer: 131072               numeric: within `tolerance` (relative) of it, in `unit`
      wrong: [{value: 16384, why: ...}]    numeric: typical wrong numbers, explained
      steps: [first, second, ...]  order: in the right order; they are shown shuffled
      why: ...                     numeric, order: the explanation
      proof: step-0                the cell that proves it, of this notebook or as 02_lora_math#exercise-1; or the claim
"""

import functools
import html
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets
import pandas as pd
from IPython.display import Markdown, display

from ftlab.classroom import entries, page, progress
from ftlab.classroom.show import CHOSEN, REJECTED
from ftlab.paths import DATA, within
from ftlab.reading import short

KIND = "quiz"  # in the progress file
FOLDER = DATA / "quizzes"
LETTERS = "ABCDEFGH"
KEYS = {  # kind -> (keys it must have, keys it may have), besides id, kind, text, proof
    "single": ({"options"}, set()),
    "multiple": ({"options"}, set()),
    "numeric": ({"answer", "why"}, {"tolerance", "unit", "wrong"}),
    "order": ({"steps", "why"}, set()),
}


class QuizError(ValueError):
    """A quiz file that cannot be used: says the file, the question, what was got and what was wanted."""


@dataclass(frozen=True)
class Question:
    """One question. `choices` are the texts behind the letters A, B, ... as shown; `right` is the answer's letters.

    proof: "notebook#cell", or a claim, "C20".
    whys: one explanation per letter for single and multiple; else one for the whole. Numeric: `answer`, relative
    `tolerance`, `unit`, and `wrong`, numbers that a typical mistake gives, with the explanation of each.
    """

    id: str
    kind: str
    text: str
    proof: str
    choices: tuple[str, ...] = ()
    right: str = ""
    whys: tuple[str, ...] = ()
    answer: float = math.nan
    tolerance: float = 0.01
    unit: str = ""
    wrong: tuple[tuple[float, str], ...] = ()

    def grade(self, response: str) -> tuple[bool, str]:
        """Whether the response ("B"; "AC"; "2.4e5"; "CADB") is right, and the explanation in Markdown."""
        if self.kind == "numeric":
            return self._grade_number(response)
        letters = "".join(letter for letter in response.upper() if letter.isalpha())
        if not letters or set(letters) - set(LETTERS[: len(self.choices)]):
            return False, f"Wanted letters from A to {LETTERS[len(self.choices) - 1]}."
        verdict = sorted(letters) == sorted(self.right)
        if self.kind == "order":
            verdict = letters == self.right
            return verdict, self.whys[0] if verdict else f"{self._first_slip(letters)} {self.whys[0]}"
        return verdict, self._explain(letters if self.kind == "single" and not verdict else LETTERS)

    def _grade_number(self, response: str) -> tuple[bool, str]:
        try:
            value = float(response.strip().removesuffix(self.unit).replace(",", "").replace("_", ""))
        except ValueError:
            return False, f"Not a number: write it like 1,234.5 or 1.2e6{self._in_unit()}."
        if self._close(value, self.answer):
            return True, self.whys[0]
        for slip, why in self.wrong:
            if self._close(value, slip):
                return False, why
        percent = f"{100 * self.tolerance:g} %"
        return False, f"Not within {percent} of the right number. Work it out once more, then open the solution."

    def _close(self, value: float, wanted: float) -> bool:
        return abs(value - wanted) <= self.tolerance * abs(wanted) + 1e-12

    def _in_unit(self) -> str:
        return f", in {self.unit}" if self.unit else ""

    def _explain(self, letters: str) -> str:
        return "\n".join(
            f"- **{letter}** is {'right' if letter in self.right else 'wrong'}: {why}"
            for letter, why in zip(LETTERS, self.whys, strict=False)
            if letter in letters
        )

    def _first_slip(self, letters: str) -> str:
        if sorted(letters) != sorted(self.right):
            return f"Wanted each of {', '.join(sorted(self.right))} once, got {letters}."
        place = next(i for i, (got, want) in enumerate(zip(letters, self.right, strict=True)) if got != want)
        return f"{letters[place]} does not stand in place {place + 1}{'; what is before it is right' if place else ''}."

    def markdown(self, number: int) -> str:
        """The question with its choices, and the answer with every explanation folded away."""
        lines = [f"**{number}.** {self.text}", ""]
        lines += [f"- **{letter}** {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        if self.kind == "numeric":
            unit = f" {self.unit}" if self.unit else ""
            answer = f"**{self.answer:,.10g}{unit}.** {self.whys[0]}\n"
            answer += "".join(f"\n- Not {value:,.10g}: {why}" for value, why in self.wrong)
        elif self.kind == "order":
            answer = f"**{', '.join(self.right)}.** {self.whys[0]}"
        else:
            answer = self._explain(LETTERS)
        proof = f"Proof: {page.markdown_link(self.proof)}"
        return "\n".join([*lines, "", f"<details><summary>Solution</summary>\n\n{answer}\n\n{proof}\n\n</details>"])


# --- Files ------------------------------------------------------------------------------------------------------------


def load(name: str, folder: Path = FOLDER) -> list[Question]:
    """The questions of one notebook, by its name without .ipynb.

    Raises FileNotFoundError, with the names there are; ValueError for a name that leads out of the folder;
    QuizError for a question that does not follow the schema.
    """
    path = within(folder, f"{name}.yaml")
    if not path.is_file():
        raise FileNotFoundError(f"no quiz {name!r}: there are {sorted(p.stem for p in folder.glob('*.yaml'))}")
    return entries.read(path, functools.partial(_question, name), "question", QuizError)


def _question(notebook: str, entry: object, where: str) -> Question:
    def need(holds: bool, wanted: str) -> None:
        if not holds:
            raise QuizError(f"{where}: wanted {wanted}")

    need(isinstance(entry, dict), f"a mapping with id, kind, text and proof, got {short(entry)}")
    where = f"{where} ({short(entry.get('id'))})"
    kind = entry.get("kind")
    need(isinstance(kind, str) and kind in KEYS, f"a kind of {list(KEYS)}, got {short(kind)}")
    must, may = KEYS[kind]
    must = must | {"id", "kind", "text", "proof"}
    keys = short(sorted(map(str, entry)))
    need(must <= set(entry) <= must | may, f"the keys {sorted(must)}, perhaps {sorted(may)}; got {keys}")
    common = {key: entry[key] for key in ("id", "kind", "text", "proof")}
    need(_texts(common.values()), f"text in id, text and proof, got {short(common)}")
    need("options" in entry or _texts([entry["why"]]), "text in why")
    if not re.fullmatch(r"[CX]\d+|.*#.*", common["proof"]):
        common["proof"] = f"{notebook}#{common['proof']}"
    if kind == "numeric":
        slips, unit, tolerance = entry.get("wrong", []), entry.get("unit", ""), entry.get("tolerance", 0.01)
        pairs = isinstance(slips, list) and all(isinstance(s, dict) and set(s) == {"value", "why"} for s in slips)
        need(pairs and _texts(s["why"] for s in slips), f"wrong as a list of value and why, got {short(slips)}")
        need(isinstance(unit, str), f"text in unit, got {short(unit)}")
        numbers = [entry["answer"], tolerance, *(s["value"] for s in slips)]
        need(all(type(n) in (int, float) and abs(n) < 1e300 for n in numbers), f"numbers, got {short(numbers)}")
        need(0 < tolerance < 1, f"a tolerance between 0 and 1, got {tolerance}")
        wrong = tuple((float(s["value"]), s["why"]) for s in slips)
        question = Question(**common, whys=(entry["why"],), answer=float(entry["answer"]), tolerance=float(tolerance),
                            unit=unit, wrong=wrong)  # fmt: skip
        right = [value for value, _ in wrong if question._close(value, question.answer)]
        need(not right, f"wrong numbers outside the tolerance, got {right}")
        return question
    items = entry["steps"] if kind == "order" else entry["options"]
    need(isinstance(items, list) and 3 <= len(items) <= len(LETTERS), f"3 to {len(LETTERS)} steps or options")
    shuffled = random.Random(entry["id"]).sample(range(len(items)), len(items))  # the same at each showing
    if kind == "order":
        need(_texts(items) and len(set(items)) == len(items), f"steps that are text and differ, got {short(items)}")
        right = "".join(LETTERS[shuffled.index(i)] for i in range(len(items)))
        return Question(**common, choices=tuple(items[i] for i in shuffled), right=right, whys=(entry["why"],))
    for option in items:
        shape = isinstance(option, dict) and {"text", "why"} <= set(option) <= {"text", "why", "right"}
        need(
            shape and isinstance(option.get("right", False), bool),
            f"text, why, perhaps right: true; got {short(option)}",
        )
        need(_texts([option["text"], option["why"]]), f"text in text and why; got {short(option)}")
    options = [items[i] for i in shuffled]
    right = "".join(letter for letter, option in zip(LETTERS, options, strict=False) if option.get("right"))
    count = len(right)
    need(count == 1 or (kind == "multiple" and count > 1), f"one right option, or some for multiple; got {count}")
    choices, whys = (tuple(option[key] for option in options) for key in ("text", "why"))
    return Question(**common, choices=choices, right=right, whys=whys)


def _texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)


# --- Progress ---------------------------------------------------------------------------------------------------------


def standing(name: str, folder: Path = FOLDER, file: Path | None = None) -> dict[str, list[int]]:
    """The numbers of a quiz's questions by how they were last answered: "right", "repeat" (wrongly), "open" (never)."""
    last = {event.item: event.score for event in progress.events(KIND, file)}
    found: dict[str, list[int]] = {"right": [], "repeat": [], "open": []}
    for number, question in enumerate(load(name, folder), 1):
        score = last.get(f"{name}/{question.id}")
        found["open" if score is None else "right" if score == 1 else "repeat"].append(number)
    return found


def overview(folder: Path = FOLDER, file: Path | None = None) -> pd.DataFrame:
    """One row a quiz: how many of its questions were last answered right, are to be repeated, are open."""
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    rows = {name: {state: len(numbers) for state, numbers in standing(name, folder, file).items()} for name in names}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("quiz")


def _left(name: str, folder: Path, file: Path | None) -> str:
    """HTML: what is left of a quiz."""
    try:
        now = standing(name, folder, file)
    except progress.ProgressError as error:
        return f"<b>Nothing is stored.</b> {html.escape(str(error))}"
    of = sum(map(len, now.values()))
    said = f"<b>{len(now['right'])} of {of} right.</b>"
    for state, words in (("repeat", "To repeat"), ("open", "Not answered yet")):
        if now[state]:
            said += f" {words}: {'all' if len(now[state]) == of else _in_words(now[state])}."
    return said


def _in_words(numbers: list[int]) -> str:
    """Rising numbers, three or more in a row as "4 to 7"."""
    rows = [[n for _, n in row] for _, row in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows)


# --- In the notebook --------------------------------------------------------------------------------------------------

KEYBOARD = "With the keyboard: Tab to a letter, Space to choose it; Tab to Check, Enter."


def show(name: str, folder: Path = FOLDER, file: Path | None = None) -> None:
    """Shows every question of a quiz: text that reads well anywhere, and below it controls where widgets run.

    Above and below them stands what is left to answer or to repeat; each checked answer is stored.
    """
    left = ipywidgets.HTML(_left(name, folder, file))

    def store(question: Question, response: str, right: bool) -> None:
        progress.record(KIND, f"{name}/{question.id}", float(right), {"answer": response}, file=file)
        left.value = _left(name, folder, file)

    _live(ipywidgets.HTML(f"<i>{KEYBOARD}</i>"), "")
    _live(left, "(Where the notebook runs, it says here which questions are left.)")
    for number, question in enumerate(load(name, folder), 1):
        display(Markdown(question.markdown(number)))
        box = controls(question, functools.partial(store, question))
        _live(box, "(The answer can be checked here while the notebook runs.)")
    _live(left, "")


def _live(widget: ipywidgets.Widget, plain: str) -> None:
    display(widget._repr_mimebundle_() | {"text/plain": plain}, raw=True)


def controls(question: Question, store: Callable[[str, bool], None] = lambda response, right: None) -> ipywidgets.VBox:
    """What to answer with (letters or a field), a Check button, and what comes of it, in a line that is read aloud.

    store(response, right) is called with each answer that is checked.
    """
    letters, narrow = LETTERS[: len(question.choices)], {"width": "auto", "margin": "2px 0.8em 2px 2px"}
    if question.kind == "multiple":
        boxes = [ipywidgets.Checkbox(description=letter, indent=False, layout=narrow) for letter in letters]
        asked = [ipywidgets.Label("All that hold:", layout=narrow), ipywidgets.HBox(boxes)]
    elif question.kind == "single":
        field = ipywidgets.RadioButtons(options=list(letters), value=None, orientation="horizontal", layout=narrow)
        asked = [ipywidgets.Label("Answer:", layout=narrow), field]
    else:
        hint = f"a number{question._in_unit()}" if question.kind == "numeric" else f"in order, like {letters[::-1]}"
        field = ipywidgets.Text(placeholder=hint, description="Answer:", style={"description_width": "auto"})
        asked = [field]
    button = ipywidgets.Button(description="Check", tooltip=f"check the answer to {question.id}", layout=narrow)
    said = ipywidgets.HTMLMath()

    def check(_) -> None:
        if question.kind == "multiple":
            response = "".join(box.description for box in boxes if box.value)
        else:
            response = (field.value or "").strip()
        right, why = question.grade(response) if response else (False, "Choose or type an answer first.")
        look = f"border-left: 4px solid {CHOSEN if right else REJECTED}; padding-left: 0.8em; line-height: 1.6"
        verdict, lost = "Right." if right else "Not yet.", ""
        try:
            if response:
                store(response, right)
        except progress.ProgressError as error:
            lost = f"<p><b>Not stored.</b> {html.escape(str(error))}</p>"
        said.value = f'<div role="alert" style="{look}"><b>{verdict}</b> {_as_html(why)}{lost}</div>'

    button.on_click(check)
    row = ipywidgets.HBox([*asked, button], layout={"align_items": "center"})
    return ipywidgets.VBox([row, said], layout={"margin": "0 0 1.5em"})


def _as_html(markdown: str) -> str:
    """Markdown as HTML; LaTeX between $ stays as it is, for the browser to typeset."""
    from nbconvert.filters import markdown2html

    return markdown2html(markdown)
