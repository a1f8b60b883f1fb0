"""Notebook 00's box: ask the table of orders in English, and see what each model answers."""

import html
import re
import time
from collections.abc import Callable, Mapping
from functools import cache

import ipywidgets

from ftlab.classroom import page
from ftlab.tasks import ask

EXAMPLES = (
    "Which city had the most big orders?",
    "What was our revenue from gold members in March?",
    "How many sushi orders in Delhi have no rating?",
    "What is the capital of France?",
)
HOUSE = "late big unrated revenue turnover tipped"
PLAIN = "order rating rated customer member delivery deliveries"
MONTHS = "january february march april may june"
BEYOND = (
    "No word of this question names a column, a value or a house word of the table, so the query "
    "is a guess. Every training row ends in a query: the model has never seen anybody say no."
)
REFUSED = (
    "The database refuses this query. Either the table can't answer the question, or the model got "
    "it wrong: it has never seen anybody say no."
)


class AskBox(page.Live):
    """A question is typed or chosen, and each model answers it, one after the other.

    models: what each is called -> a function from a question to an answer; the last one is the one
    whose answer a sentence is said about. What such a function raises is shown in its place.
    """

    def __init__(self, models: Mapping[str, Callable[[str], str]], first: str = "") -> None:
        self._models, self._ended = models, 0.0
        self.text = ipywidgets.Text(first, placeholder=EXAMPLES[0], layout={"width": "32em"})
        self.button = ipywidgets.Button(description="Ask", button_style="primary")
        self.examples = [ipywidgets.Button(description=each) for each in EXAMPLES]
        for each in self.examples:
            each.layout.width = "auto"
            each.on_click(lambda example: self.press(example.description))
        self.button.on_click(lambda _: self.press())
        self.text.on_msg(lambda _, said, __: said.get("event") == "submit" and self.press())
        columns = ipywidgets.HTML(f"<b>Columns</b> <code>{', '.join(ask.COLUMNS)}</code>")
        asking = ipywidgets.HBox([self.text, self.button], layout=page.WRAPPED)
        examples = ipywidgets.HBox(self.examples, layout=page.WRAPPED)
        super().__init__("a box for questions about the orders", [columns, asking, examples])
        self.draw("")
        if first:
            self.ask(first)

    def press(self, question: str = "") -> None:
        """Asks the question, or what is typed, unless it was pressed while the models worked."""
        if time.monotonic() - self._ended > page.QUICK:
            self.text.value = question or self.text.value
            self.ask(self.text.value)

    def ask(self, question: str) -> None:
        """Fills the page: one column a model, as soon as its answer is there."""
        if not question.strip():
            self.draw('<p role="alert">Type a question about the orders first.</p>')
            return
        self._wait(True)
        columns, query = {}, ""
        try:
            for name, model in self._models.items():
                self.draw(_page(question, columns | {name: "<i>asking ...</i>"}))
                columns[name], query = _answered(model, question.strip())
            self.draw(_page(question, columns, remark(question, query)))
        finally:
            self._wait(False)
            self._ended = time.monotonic()

    def _wait(self, on: bool) -> None:
        for control in (self.text, self.button, *self.examples):
            control.disabled = on


def _answered(model: Callable[[str], str], question: str) -> tuple[str, str]:
    """The answer's query with its rows, as HTML, and the query; what went wrong and no query."""
    try:
        query = ask.query_in(model(question))
        return ask.show_table(query).data, query
    except (Exception, KeyboardInterrupt) as error:  # in a callback nobody would see it
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        return f'<p role="alert"><b>No answer.</b> {html.escape(said)}</p>', ""


def remark(question: str, query: str) -> str:
    """What to say of a question that the table can't answer, as far as that can be seen."""
    if not query:
        return ""
    if not about_orders(question):
        return BEYOND
    return "" if ask.runs(query) else REFUSED


def about_orders(question: str) -> bool:
    """Whether a word of the question names a column, a value, a month or a house word."""
    words = re.findall(r"[a-z]+", question.lower())
    return any(word in known() or word.removesuffix("s") in known() for word in words)


@cache
def known() -> frozenset[str]:
    """The words that name something in the table, in small letters."""
    words = {*ask.COLUMNS, *f"{HOUSE} {PLAIN} {MONTHS}".split()}
    for column in ("city", "plan", "cuisine", "status", "payment"):
        rows = ask.run_query(f"SELECT {column} FROM orders GROUP BY {column}", ask.databases()[0])
        words |= {value.lower() for (value,) in rows}
    return frozenset(words - {"id"})


def _page(question: str, columns: Mapping[str, str], said: str = "") -> str:
    """The question, and below it the columns side by side, or one below the other on a phone."""
    look = "flex:1 1 18em;min-width:0;overflow-wrap:anywhere"
    boxes = ""
    for name, inside in columns.items():
        boxes += f'<div style="{look}"><b>{html.escape(name)}</b>{inside}</div>'
    boxes = f'<div style="display:flex;flex-wrap:wrap;gap:0 1.5em">{boxes}</div>'
    heading = f"<p><b>“{html.escape(question.strip(), quote=False)}”</b></p>"
    said = html.escape(said, quote=False)
    return f'<div role="status">{heading}{boxes}<p>{said}</p></div>'
