"""What the classroom puts on a page: HTML from plain text, links to cells and files, controls, buttons.

Whatever can be clicked has a still form for pages without a kernel, as on GitHub.
"""

import base64
import html
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import yaml

LEDGER = "11_interview_prep#ledger"  # where all claims stand


def read(file: Path) -> Any:
    """What a YAML file holds."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def prose(text: str) -> str:
    """Plain text as HTML; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text.strip(), quote=False))


def target(proof: str) -> tuple[str, str]:
    """A short name and the address, seen from a notebook, of "notebook#cell", of a claim "C20", of "data/gpus.json"."""
    if proof.startswith("data/"):
        return proof, f"../{proof}"
    notebook, _, id = (proof if "#" in proof else LEDGER).partition("#")
    return f"{notebook[:2]} {id}" if "#" in proof else proof, f"{notebook}.ipynb#cell-id={id}"


def link(proof: str, says: str = "") -> str:
    """HTML: a link to the `target` of a proof."""
    name, address = target(proof)
    return f'<a style="white-space: nowrap" href="{address}">{says or name}</a>'


def picture(kind: str, data: bytes, says: str) -> str:
    """HTML: a picture, kind "png" or "svg+xml", with words for those who do not see it; ipywidgets.Image has none."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html.escape(says)}" style="max-width: 100%" src="{source}">'


def fold(summary: str, inside: str) -> str:
    """HTML: a line to click, and what it unfolds."""
    return f'<details><summary>{summary}</summary><div style="padding-left: 1em">{inside}</div></details>'


def bundle(page: str) -> dict[str, str]:
    """The page for `display(..., raw=True)`; for viewers without HTML what is left of it without its tags."""
    return {"text/html": page, "text/plain": html.unescape(re.sub(r"<[^>]+>", " ", page))}


def view(widget: ipywidgets.Widget, still: str, plain: str = "", kind: str = "html") -> dict:
    """For `display(..., raw=True)`: the widget where the notebook runs; elsewhere, as on GitHub, the still page.

    plain: the same for viewers that show text alone; left out, what is left of an HTML page without its tags.
    """
    live = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}  # ipywidgets 7 makes no bundle
    shown = {f"text/{kind}": still, "text/plain": plain} if plain else bundle(still)
    return {"application/vnd.jupyter.widget-view+json": live, **shown}


def fill(output: ipywidgets.Output, page: str) -> None:
    """Puts a page in the place of what an Output shows. (In an HTML widget JupyterLab would not follow its links.)"""
    output.outputs = ({"output_type": "display_data", "data": bundle(page), "metadata": {}},)


class Live:
    """A page of HTML, `shown`, between widgets; where no kernel runs, `still`, or if that is empty what is shown."""

    def __init__(self, says: str, above: Sequence = (), below: Sequence = (), still: str = "") -> None:
        """says: what it is, in a few words, for viewers that show text alone."""
        self.says, self.still, self._output = says, still, ipywidgets.Output()
        self._widget = ipywidgets.VBox([*above, self._output, *below])

    def draw(self, page: str) -> None:
        self.shown = page
        fill(self._output, page)

    def _repr_mimebundle_(self, **_) -> dict:
        return view(self._widget, self.still or self.shown, self.says)


def panel(says: str, page_of: Callable[..., str], controls: dict[str, ipywidgets.Widget], still: str = "") -> Live:
    """Controls above the HTML that page_of(**their values) gives, with each change anew."""
    keys = ipywidgets.HTML(  # in a closed list JupyterLab takes the arrows for itself, and goes to the next cell
        "With the keyboard: Tab to a control; Space opens a list, arrows and Enter choose; arrows move a slider."
    )
    live = Live(says, [keys, _row(controls.values())], still=still)
    live.controls = controls

    def update(_=None) -> None:
        live.draw(page_of(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(update, "value")
    update()
    return live


def _row(widgets: Iterable[ipywidgets.Widget]) -> ipywidgets.HBox:
    return ipywidgets.HBox([*widgets], layout={"flex_flow": "row wrap"})


class Steps(Live):
    """Pages with buttons, one after the other: `steps()` yields (HTML, labels) and is sent the label that was pressed.

    If it fails, as where the disk is full, it says so and can be begun anew: so what counts is kept in a file.
    """

    AGAIN = "Try again"

    def __init__(self, says: str, steps: Callable[[], Generator], still: str = "", extra: Sequence = ()) -> None:
        self._buttons = [ipywidgets.Button(layout={"width": "auto"}) for _ in range(4)]
        for button in self._buttons:
            button.on_click(lambda button: self.press(button.description))
        super().__init__(says, below=[*extra, _row(self._buttons)], still=still)
        self._steps, self._running = steps, steps()
        self._turn_to(*next(self._running))

    def press(self, label: str) -> None:
        """Does what the button with this label does. Raises ValueError if there is none now."""
        if label not in self.labels:
            raise ValueError(f"got {label!r}, wanted one of {self.labels}")
        try:
            self._turn_to(*self._running.send(None if label == self.AGAIN else label))
        except Exception as error:  # a traceback would land in a log nobody reads
            self._running = self._steps()
            self._turn_to(f'<p role="alert"><b>Not done.</b> {html.escape(str(error))}</p>', [self.AGAIN])

    def _turn_to(self, page: str, labels: Iterable[str]) -> None:
        self.draw(page)
        self.labels = list(labels)
        for button, label in zip(self._buttons, self.labels + [""] * 4, strict=False):
            button.description, button.layout.display = label, None if label else "none"
            button.button_style = "primary" if len(self.labels) == 1 else ""


def browse(items: Sequence, noun: str, by: dict[str, tuple[Iterable[str], Callable]], said: Callable,
           as_html: Callable[[list], str]) -> Live:  # fmt: skip
    """All items, to be narrowed by words in said(item) and by tags; folded by the first tag where no kernel runs.

    by: what a tag is called -> (its values, item -> those that it has). as_html: a list of items on a page.
    """

    def fitting(search: str = "", **wanted: str) -> list:
        """The items with all these words, large or small, and tags; "" asks for nothing."""
        words, asked = search.lower().split(), [(by[tag][1], value) for tag, value in wanted.items() if value]
        return [item for item in items if all(value in has(item) for has, value in asked)
                and all(word in said(item).lower() for word in words)]  # fmt: skip

    def page_of(**chosen: str) -> str:
        shown = fitting(**chosen)
        count = f'<p role="status" style="margin: 0.3em 0">{len(shown)} of {len(items)} {noun}</p>'
        return f'{count}<div style="max-height: 34em; overflow: auto" tabindex="0">{as_html(shown)}</div>'

    options = {tag: [(f"every {tag}", ""), *((value, value) for value in values)] for tag, (values, _) in by.items()}
    controls = {tag: ipywidgets.Dropdown(options=lines, description=tag) for tag, lines in options.items()}
    controls["search"] = ipywidgets.Text(placeholder="words", description="search")
    first = next(iter(by))
    groups = {value: fitting(**{first: value}) for _, value in options[first][1:]}
    folds = (fold(f"<b>{value}</b>: {len(mine)} {noun}", as_html(mine)) for value, mine in groups.items())
    return panel(f"{len(items)} {noun}", page_of, controls, "".join(folds))
