"""What a cell shows, as its reader meets it: the live widget of an output, its buttons and fields, a page's text."""

from collections.abc import Callable
from html.parser import HTMLParser
from unittest import mock

import ipywidgets

from ftlab.classroom import page

page.QUICK = -1  # tests press buttons faster than hands
VIEW = "application/vnd.jupyter.widget-view+json"


def displayed(function: Callable, *arguments, **more):
    """The one thing that a function displays."""
    found = []
    with mock.patch.dict(function.__globals__, display=lambda shown, raw=False: found.append(shown)):
        function(*arguments, **more)
    (bundle,) = found
    return bundle


def visible(shown) -> list[ipywidgets.Widget]:
    """The live widget of an output, or of what shows itself, and all that can be seen in it, from top to bottom."""
    if not isinstance(shown, ipywidgets.Widget):
        bundle = shown if isinstance(shown, dict) else shown._repr_mimebundle_()
        shown = ipywidgets.widget_serialization["from_json"](f"IPY_MODEL_{bundle[VIEW]['model_id']}", None)
    inside = () if shown.layout.display == "none" else getattr(shown, "children", ())
    return [shown] * (shown.layout.display != "none") + [one for child in inside for one in visible(child)]


def named(shown, kind: type[ipywidgets.Widget] = ipywidgets.Button) -> dict[str, ipywidgets.Widget]:
    """Its widgets of a kind that can be seen and used, by what stands on them."""
    used = (one for one in visible(shown) if isinstance(one, kind) and not one.disabled)
    return {one.description: one for one in used}


def page_of(shown) -> str:
    """The HTML that stands in it."""
    parts = []
    for one in visible(shown):
        if isinstance(one, ipywidgets.Output):
            parts += [output["data"]["text/html"] for output in one.outputs]
        elif isinstance(one, ipywidgets.HTML | ipywidgets.HTMLMath):
            parts.append(one.value)
    return "\n".join(parts)


class Page(HTMLParser):
    """A page as it is read: `open` is what can be read without unfolding anything, `text` all of it.

    AssertionError if a tag is not closed, or something comes with the page that could act or be fetched.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.text, self.links, self._tags = "", "", [], []
        self.feed(html)
        self.close()
        assert self._tags == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "img", "link", "iframe", "style")
        if tag != "br":
            self._tags.append("opened" if tag == "details" and ("open", None) in attrs else tag)
        self.links += [value for name, value in attrs if name == "href"]

    def handle_endtag(self, tag):
        assert self._tags.pop().replace("opened", "details") == tag

    def handle_data(self, data):
        self.text += data
        self.open += data * (self._tags.count("details") <= self._tags.count("summary"))
