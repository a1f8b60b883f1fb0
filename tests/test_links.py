"""data/links.yaml: the links of notebooks 01, 08 and 09 are listed there, well formed, with when each was last seen."""

import datetime
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from notebooks import NOTEBOOKS

FILE = Path(__file__).resolve().parent.parent / "data" / "links.yaml"
LISTED = yaml.safe_load(FILE.read_text(encoding="utf-8"))
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


@pytest.mark.parametrize("entry", LISTED, ids=lambda entry: entry["url"])
def test_an_entry_is_whole_and_its_address_well_formed(entry):
    assert list(entry) == ["url", "title", "last_seen", "how"] and entry["title"].strip() and entry["how"].strip()
    assert faults(entry["url"]) == []
    assert isinstance(entry["last_seen"], datetime.date) or "not checked online" in entry["how"]


def test_entries_are_sorted_and_stand_once():
    urls = [entry["url"] for entry in LISTED]
    assert urls == sorted(set(urls))


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name[:2] in ("01", "08", "09")])
def test_every_link_of_the_notebook_is_listed(name):
    prose = "\n".join("".join(cell["source"]) for cell in NOTEBOOKS[name] if cell["cell_type"] == "markdown")
    assert sorted(links(prose) - {entry["url"] for entry in LISTED}) == []


def test_links_are_found_in_brackets_and_bare_and_a_bad_one_is_named():
    text = "See [TRL](https://hf.co/docs/trl), https://a.io/b?c=1 and `http://127.0.0.1:8000/v1`, ![x](../data/x.svg)."
    assert links(text) == {"https://hf.co/docs/trl", "https://a.io/b?c=1"}
    for bad in ("http://a.io", "https://a.io/b.", "https://a", "https://a.io/b c"):
        assert len(faults(bad)) == 1, bad
