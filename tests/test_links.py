"""The addresses in the notebooks' prose are https, with a host, and without the sentence's punctuation."""

import re
from urllib.parse import urlsplit

import pytest

from notebooks import NOTEBOOKS

LINK = re.compile(r"\]\((https?:[^\s)]*)\)|(?<![(\w\"'])(https?://[^\s)>\]`\"']+)")


def links(text: str) -> set[str]:
    """The addresses of a Markdown text, those in brackets and bare ones. Loopback ones are none."""
    found = {a or b for a, b in LINK.findall(text)}
    return {url for url in found if urlsplit(url).hostname not in ("127.0.0.1", "localhost")}


def faults(url: str) -> list[str]:
    """What is wrong with the form of an address."""
    parts, wrong = urlsplit(url), []
    if parts.scheme != "https":
        wrong.append("https is wanted")
    if not re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.hostname or ""):
        wrong.append("no host")
    if re.search(r"[.,;:!?'\"*_)]$", url) or re.search(r"[\s<>\"{}|\\^`]", url):
        wrong.append("punctuation at the end, or a character that stands in no address")
    return wrong


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_address_of_a_notebook_is_well_formed(name):
    prose = "\n".join("".join(cell["source"]) for cell in NOTEBOOKS[name] if cell["cell_type"] == "markdown")
    assert {url: faults(url) for url in links(prose) if faults(url)} == {}


def test_links_are_found_in_brackets_and_bare_and_a_bad_one_is_named():
    text = "See [TRL](https://hf.co/docs/trl), https://a.io/b?c=1 and `http://127.0.0.1:8000/v1`, ![x](../data/x.svg)."
    assert links(text) == {"https://hf.co/docs/trl", "https://a.io/b?c=1"}
    for bad in ("http://a.io", "https://a.io/b.", "https://a", "https://a.io/b c"):
        assert len(faults(bad)) == 1, bad
