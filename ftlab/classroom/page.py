"""What widgets put on a page: HTML from plain text, links to cells and files, pictures, buttons that say why not."""

import base64
import html
import re
from collections.abc import Callable

import ipywidgets

LEDGER = "11_interview_prep#ledger"  # where all claims stand


def prose(text: str) -> str:
    """Plain text as HTML; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text.strip(), quote=False))


def link(proof: str, says: str = "") -> str:
    """HTML: a link to the cell "notebook#cell" of a notebook beside this one; from a claim, "C20", to the ledger.

    From a file, "data/results/ask.jsonl", to that file in the folder above the notebooks.
    """
    name, target = _target(proof)
    return f'<a style="white-space: nowrap" href="{target}">{says or name}</a>'


def markdown_link(proof: str, says: str) -> str:
    """The same in Markdown."""
    return f"[{says}]({_target(proof)[1]})"


def _target(proof: str) -> tuple[str, str]:
    if proof.startswith("data/"):
        return proof, f"../{proof}"
    notebook, _, id = (proof if "#" in proof else LEDGER).partition("#")
    return f"{notebook[:2]} {id}" if "#" in proof else proof, f"{notebook}.ipynb#cell-id={id}"


def picture(kind: str, data: bytes, says: str) -> str:
    """HTML: a picture, kind "png" or "svg+xml", with words for those who do not see it; ipywidgets.Image has none."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html.escape(says)}" style="max-width: 100%" src="{source}">'


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


def fold(summary: str, inside: str) -> str:
    """HTML: a line to click, and what it unfolds."""
    return f'<details><summary>{summary}</summary><div style="padding-left: 1em">{inside}</div></details>'


def scrolled(inside: str) -> str:
    """HTML: at most about a screen of it at once; it can be scrolled with the keyboard."""
    return f'<div style="max-height: 34em; overflow: auto" tabindex="0">{inside}</div>'


def fill(output: ipywidgets.Output, page: str) -> None:
    """Puts a page in the place of what an Output shows. (In an HTML widget JupyterLab would not follow its links.)"""
    output.outputs = ({"output_type": "display_data", "data": bundle(page), "metadata": {}},)


def narrowed(listed: Callable[..., str], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """The controls above the HTML that listed(**their values) gives, with each change anew."""
    output = ipywidgets.Output()

    def draw(_=None) -> None:
        fill(output, listed(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(draw, "value")
    draw()
    return ipywidgets.VBox([ipywidgets.HBox([*controls.values()], layout={"flex_flow": "row wrap"}), output])


def button(label: str, action: Callable[[], None], output: ipywidgets.Output, style: str = "") -> ipywidgets.Button:
    """A button; what goes wrong in its action is shown in `output`, as a traceback would land in a log nobody reads."""

    def click(_) -> None:
        try:
            action()
        except Exception as error:
            fill(output, f'<p role="alert"><b>Not done.</b> {html.escape(str(error))}</p>')

    made = ipywidgets.Button(
        description=label, button_style=style, layout={"width": "auto", "align_self": "flex-start"}
    )
    if style == "success":  # ipywidgets' own green has a contrast of 4.1 with its white words
        made.style.button_color, made.style.text_color = "#2a6f2d", "white"
    made.on_click(click)
    return made


def choice(name: str, everything: str, options: list[tuple[str, str]], **more) -> ipywidgets.Dropdown:
    """A Dropdown of (text, value) whose first line leaves all in: value "", since it shows None as an empty line."""
    return ipywidgets.Dropdown(options=[(everything, ""), *options], description=name, **more)
