"""What the classroom puts on a page: HTML from plain text, links to cells and files, controls, buttons.

Whatever can be clicked has a still form for pages without a kernel, as on GitHub.
"""

import html
import re
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ipywidgets
import yaml

LEDGER = "11_interview_prep#ledger"  # where all claims stand
AGAIN = "Try again"
WRAPPED = {"flex_flow": "row wrap"}
QUICK = 0.25  # seconds in which a press on a new page is one for the page before: a double click, a busy kernel


def read(file: Path) -> Any:
    """What a YAML file holds."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def prose(text: str) -> str:
    """Plain text as HTML; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text.strip(), quote=False))


FOLDERS = ("data/", "experiments/")  # what a proof may name beside cells and claims


def target(proof: str) -> tuple[str, str]:
    """A short name and the address, seen from a notebook, of "notebook#cell", a claim "C20" or a file in FOLDERS."""
    if proof.startswith(FOLDERS):
        return proof, f"../{proof}"
    notebook, _, id = (proof if "#" in proof else LEDGER).partition("#")
    return f"{notebook[:2]}, {id.replace('-', ' ')}" if "#" in proof else proof, f"{notebook}.ipynb#cell-id={id}"


def link(proof: str) -> str:
    """HTML: a link to the `target` of a proof."""
    name, address = target(proof)
    return f'<a style="white-space: nowrap" href="{address}">{name}</a>'


def fold(summary: str, inside: str) -> str:
    """HTML: a line to click, and what it unfolds."""
    return f'<details><summary>{summary}</summary><div style="padding-left: 1em">{inside}</div></details>'


def view(widget: ipywidgets.Widget, says: str, still: str, kind: str = "html") -> dict:
    """For `display(..., raw=True)`: the widget where the notebook runs; elsewhere, as on GitHub, the still page.

    says: what it is, for viewers of text alone. kind: of the still page, "html" or "markdown";
    without a page nothing of it is left there.
    """
    live = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}  # ipywidgets 7 makes no bundle
    page = {f"text/{kind}": still} if still else {}
    return {"application/vnd.jupyter.widget-view+json": live, **page, "text/plain": says}


def fill(output: ipywidgets.Output, page: str) -> None:
    """Puts a page in the place of what an Output shows. (In an HTML widget JupyterLab would not follow its links.)"""
    output.outputs = ({"output_type": "display_data", "data": {"text/html": page}, "metadata": {}},)


class Live:
    """A page of HTML, `shown`, between widgets; where no kernel runs, `still`, or if that is empty what is shown."""

    def __init__(self, says: str, above: Sequence = (), below: Sequence = (), still: str = "") -> None:
        self._says, self.still, self._output = says, still, ipywidgets.Output()
        self._widget = ipywidgets.VBox([*above, self._output, *below])

    def draw(self, page: str) -> None:
        self.shown = page
        fill(self._output, page)

    def _repr_mimebundle_(self, **_) -> dict:
        return view(self._widget, self._says, self.still or self.shown)


def panel(says: str, page_of: Callable[..., str], controls: dict[str, ipywidgets.Widget], still: str = "") -> Live:
    """Controls above the HTML that page_of(**their values) gives, drawn again at each change."""
    # in a closed list JupyterLab takes the arrows for itself, and goes to the next cell
    how = "With the keyboard: Tab to a control; Space opens a list, arrows and Enter choose; arrows move a slider."
    live = Live(says, [ipywidgets.HTML(how), ipywidgets.HBox([*controls.values()], layout=WRAPPED)], still=still)
    live.controls = controls

    def update(_=None) -> None:
        live.draw(page_of(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(update, "value")
    update()
    return live


class Steps(Live):
    """Pages with buttons, one after the other: `steps()` yields (HTML, labels) and is sent the label that was pressed.

    If it fails, as where the disk is full, it says so and can be begun anew: so what counts is kept in a file.
    """

    def __init__(self, says: str, steps: Callable[[], Generator], still: str = "", extra: Sequence = ()) -> None:
        self._row = ipywidgets.HBox(layout=WRAPPED)
        super().__init__(says, below=[*extra, self._row], still=still)
        self._steps, self._running = steps, steps()
        self._turn_to(*next(self._running))

    def press(self, label: str) -> None:
        """Does what the button with this label does."""
        try:
            self._turn_to(*self._running.send(None if label == AGAIN else label))
        except Exception as error:  # a traceback would land in a log nobody reads
            self._running = self._steps()
            self._turn_to(f'<p role="alert"><b>Not done.</b> {html.escape(str(error))}</p>', [AGAIN])

    def _button(self) -> ipywidgets.Button:
        button = ipywidgets.Button(layout={"width": "auto"})
        button.on_click(lambda button: time.monotonic() - self._turned > QUICK and self.press(button.description))
        return button

    def _turn_to(self, page: str, labels: Iterable[str]) -> None:
        self.draw(page)
        self.labels, self._turned = list(labels), time.monotonic()
        lacking = len(self.labels) - len(self._row.children)
        self._row.children += tuple(self._button() for _ in range(lacking))
        for button, label in zip_longest(self._row.children, self.labels, fillvalue=""):
            button.description, button.layout.display = label, None if label else "none"
            button.button_style = "primary" if len(self.labels) == 1 else ""


def browse(items: Sequence, noun: str, group: Callable, said: Callable, as_html: Callable) -> Live:
    """All items, in a fold for each group(item), to be narrowed by words that stand in said(item)."""

    def page_of(search: str) -> str:
        words, shown = search.lower().split(), ""
        found = [item for item in items if all(word in said(item).lower() for word in words)]
        for name in dict.fromkeys(map(group, found)):
            mine = [as_html(item) for item in found if group(item) == name]
            head, inside = f"<b>{name}</b>: {len(mine)} {noun}", "".join(mine)
            shown += f"<p>{head}</p>{inside}" if words else fold(head, inside)
        count = f'<p role="status" style="margin: 0.3em 0">{len(found)} of {len(items)} {noun}</p>'
        return f'{count}<div style="max-height: 34em; overflow: auto" tabindex="0">{shown}</div>'

    search = ipywidgets.Text(placeholder="words that stand in them", description="search")
    return panel(f"{len(items)} {noun}", page_of, {"search": search})
