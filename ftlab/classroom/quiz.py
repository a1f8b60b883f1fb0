"""Quizzes: `quiz.show("02_lora_math")` asks, checks and explains the questions of data/quizzes/02_lora_math.yaml.

Where the notebook runs, each question is a card with options to click or a field to type into. Elsewhere, on GitHub and
in the web edition, it is Markdown with its solution folded away.
"""

import contextlib
import functools
import html
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets
import mistune
from IPython.display import display

from ftlab.classroom import page, progress
from ftlab.classroom.show import CHOSEN, REJECTED
from ftlab.paths import DATA

KIND = "quiz"  # in the progress file
FOLDER = DATA / "quizzes"
LETTERS = "ABCDEFGH"
to_html = mistune.create_markdown(plugins=["math", "table"])  # HTML in a text is shown as it stands
to_html.renderer.register("inline_math", lambda _, formula: f"${html.escape(formula)}$")  # JupyterLab typesets it
STYLE = Path(__file__).with_name("quiz.html").read_text(encoding="utf-8")  # how cards look, and their keys


@dataclass(frozen=True)
class Question:
    """One question. `choices` are the texts behind the letters A, B, ... as shown; `right` is the answer's letters.

    proof: "notebook#cell", or a claim, "C20". whys: one for each letter, or for numeric and order one for the whole.
    Numeric: `answer`, relative `tolerance`, `unit`, and `wrong`, what typical slips give, each with its explanation.
    """

    id: str
    kind: str  # single, multiple, numeric, order
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
        known = LETTERS[: len(self.choices)]
        said = [letter for letter in response.upper() if letter in known]
        if not said or (self.kind == "order" and sorted(said) != list(known)):
            return False, f"Wanted letters from A to {known[-1]}."
        if self.kind == "order":
            slips = [f"{one} does not stand in place {i + 1}. " for i, one in enumerate(said) if one != self.right[i]]
            return not slips, "".join(slips[:1]) + self.whys[0]
        right, lines = sorted(said) == sorted(self.right), []
        for one, why in zip(known, self.whys, strict=True):
            if right or one in said:
                lines.append(f"- **{one}** is {'right' if one in self.right else 'wrong'}: {why}")
        if self.kind == "multiple" and set(self.right) - set(said):
            lines.append("\nNot all of the right ones are there.")
        return right, "\n".join(lines)

    def _grade_number(self, response: str) -> tuple[bool, str]:
        values = _readings(response.strip().removesuffix(self.unit).strip())
        for number, why in [(self.answer, self.whys[0]), *self.wrong]:
            if any(abs(value - number) <= self.tolerance * abs(number) + 1e-12 for value in values):
                return number == self.answer, why
        if values:
            return False, f"Not within {100 * self.tolerance:g} % of the right number. Work it out once more."
        return False, f"Not a number: write it like 0.69, 1,234.5 or 1.2e6{self.unit and f', in {self.unit}'}."

    def solution(self) -> str:
        """The answer and every explanation, in Markdown."""
        answer = {"numeric": f"{self.answer:,.10g} {self.unit}".strip(), "order": ", ".join(self.right)}.get(self.kind)
        slips = "".join(f"\n- Not {value:,.10g}: {why}" for value, why in self.wrong)
        return (f"**{answer}.** " if answer else "") + self.grade(self.right or repr(self.answer))[1] + "\n" + slips

    def options(self) -> str:
        """The choices with their letters, a Markdown list."""
        return "".join(f"- **{letter}** {text}\n" for letter, text in zip(LETTERS, self.choices, strict=False))

    def markdown(self, number: int) -> str:
        """The question with its choices; its solution is folded away, and marked for the web edition's page."""
        typed = {"numeric": f' data-answer="{self.answer!r}" data-tolerance="{self.tolerance:g}"',
                 "order": f' data-order="{self.right}"'}.get(self.kind, "")  # fmt: skip
        where = f"this cell of notebook {self.proof[:2]}" if "#" in self.proof else f"claim {self.proof}"
        proof = f"Proof: [{where}]({page.target(self.proof)[1]})"
        solution = f"<details{typed}><summary>Solution</summary>\n\n{self.solution()}\n\n{proof}\n\n</details>"
        return f"**{number}.** {self.text}\n\n{self.options()}\n{solution}"


def _readings(written: str) -> list[float]:
    """The numbers that it may mean: 0,69 is 0.69, and 1,234 is 1234 or, with a decimal comma, 1.234."""
    thousands = re.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d*)?", written)
    values = []
    for mark in [".", ""] if thousands else ["."]:  # what a comma may mean
        with contextlib.suppress(ValueError):
            values.append(float(written.replace(",", mark)))
    return values


def load(name: str, folder: Path = FOLDER) -> list[Question]:
    """The questions of one notebook, by its name without .ipynb."""
    return [_question(name, **entry) for entry in page.read(folder / f"{name}.yaml")]


def _question(notebook: str, id: str, proof: str, options=(), steps=(), why: str = "", wrong=(), **more) -> Question:
    """The question of an entry, its options or steps shuffled, in the same way each time."""
    mixed = random.Random(id).sample(options or steps, len(options or steps))
    if options:
        right = [letter for letter, option in zip(LETTERS, mixed, strict=False) if option.get("right")]
        choices, whys = (tuple(option[key] for option in mixed) for key in ("text", "why"))
    else:
        right, choices, whys = [LETTERS[mixed.index(step)] for step in steps], tuple(mixed), (why,)
    proof = proof if "#" in proof or re.fullmatch(r"[CX]\d+", proof) else f"{notebook}#{proof}"
    slips = tuple((slip["value"], slip["why"]) for slip in wrong)
    return Question(id=id, proof=proof, choices=choices, right="".join(right), whys=whys, wrong=slips, **more)


def items() -> list[str]:
    """All questions, as they are called in the progress file."""
    return [f"{path.stem}/{question.id}" for path in sorted(FOLDER.glob("*.yaml")) for question in load(path.stem)]


def on_page(*widgets: ipywidgets.Widget) -> ipywidgets.VBox:
    """Question cards, and what belongs to them, with the style and the keys that they need."""
    return ipywidgets.VBox([ipywidgets.HTML(STYLE), *widgets]).add_class("ftlab-quiz")


def show(name: str, folder: Path = FOLDER, file: Path | None = None) -> None:
    """Shows a quiz: a card for each question where widgets run, Markdown elsewhere. Each checked answer is stored."""
    questions, left = load(name, folder), ipywidgets.HTML()

    def count() -> None:
        states = [*progress.states(KIND, [f"{name}/{question.id}" for question in questions], file).values()]
        todo = ", ".join(str(number) for number, state in enumerate(states, 1) if state != "done")
        left.value = f"<b>{states.count('done')} of {len(states)} right.</b> {todo and f'To do: {todo}.'}"

    def store(question: Question, response: str, right: bool) -> None:
        progress.record(KIND, f"{name}/{question.id}", float(right), {"answer": response}, file=file)
        count()

    count()
    cards = [controls(question, functools.partial(store, question), i) for i, question in enumerate(questions, 1)]
    still = "\n\n".join(question.markdown(number) for number, question in enumerate(questions, 1))
    shown = page.view(on_page(left, *cards, left), f"a quiz of {len(questions)} questions", still, "markdown")
    display(shown, raw=True)


def controls(question: Question, store: Callable[[str, bool], None], number: int) -> ipywidgets.VBox:
    """A card: the question, a field, a Check button, which calls store(response, right), and the verdict."""
    choices = zip(LETTERS, question.choices, strict=False)
    labels = [f"{letter}  {re.sub('[`*]', '', choice)}" for letter, choice in choices]  # a label shows no Markdown
    text, wide = f"**{number}.** {question.text}", {"width": "auto", "align_self": "flex-start"}
    if question.kind == "single":
        field = ipywidgets.RadioButtons(options=list(zip(labels, LETTERS, strict=False)), value=None, layout=wide)
    elif question.kind == "multiple":
        text += " *(all that hold)*"
        field = ipywidgets.VBox([ipywidgets.Checkbox(description=label, indent=False, layout=wide) for label in labels])
    else:
        text += f"\n\n{question.options()}"
        hint = f"in order, like {LETTERS[len(labels) - 1 :: -1]}" if labels else (question.unit or "a number")
        field = ipywidgets.Text(description="Answer:", placeholder=hint, style={"description_width": "auto"})
    button = ipywidgets.Button(description="Check", tooltip=f"check the answer to {question.id}", layout=wide)
    said, proof = ipywidgets.HTMLMath(), ipywidgets.Output()

    def check(_) -> None:
        boxes = zip(LETTERS, getattr(field, "children", ()), strict=False)
        answer = (getattr(field, "value", "") or "".join(letter for letter, box in boxes if box.value)).strip()
        if not answer:
            said.value = '<p role="alert">Choose or type an answer first.</p>'
            return
        right, why = question.grade(answer)
        verdict = f"<b>{'Right.' if right else 'Not yet.'}</b> {to_html(why)}"
        try:
            store(answer, right)
        except progress.ProgressError as error:
            verdict += f"<p><b>Not stored.</b> {html.escape(str(error))}</p>"
        folded = "" if right else page.fold("Solution", to_html(question.solution()))
        line = f"border-left: 4px solid {CHOSEN if right else REJECTED}; padding-left: 0.8em; line-height: 1.6"
        said.value = f'<div style="{line}"><div role="alert">{verdict}</div>{folded}</div>'
        page.fill(proof, f"<p>Proof: {page.link(question.proof)}</p>" if right else "<p></p>")

    button.on_click(check)
    card = ipywidgets.VBox([ipywidgets.HTMLMath(to_html(text)), field, button, said, proof])
    return card.add_class("ftlab-question").add_class(f"ftlab-question-{number}")
