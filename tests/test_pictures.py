"""data/pictures: the committed drawings are what make.py builds, say what they show, and keep their text in its box."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from ftlab.classroom import show
from ftlab.scratch.rl import group_advantages
from ftlab.tasks import ask

FOLDER = Path(__file__).parents[1] / "data" / "pictures"
FILES = sorted(path.name for path in FOLDER.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


def root_of(name: str) -> ElementTree.Element:
    return ElementTree.fromstring((FOLDER / name).read_bytes())


def extent(text: ElementTree.Element, make) -> tuple[float, float, float]:
    """Left, right and baseline of a line of text, its width as make.py estimates it."""
    size, x = float(text.get("font-size")), float(text.get("x"))
    wide = make.text_width(text.text, size, text.get("font-weight") == "bold", text.get("font-family") is not None)
    left = x - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
    return left, left + wide, float(text.get("y"))


def test_making_them_again_gives_the_committed_bytes(make):
    built = make.build()
    assert sorted(built) == FILES
    for name, svg in built.items():
        assert (FOLDER / name).read_bytes() == svg.encode(), f"{name}: run python data/pictures/make.py"


@pytest.mark.parametrize("name", FILES)
def test_it_says_what_it_shows_and_asks_nobody(name):
    root = root_of(name)
    _, _, wide, high = map(float, root.get("viewBox").split())
    assert (wide, high) == (float(root.get("width")), float(root.get("height")))
    assert root.get("role") == "img"
    assert [root[0].tag, root[1].tag] == [SVG + "title", SVG + "desc"] and root[0].text and root[1].text
    assert root.get("aria-labelledby").split() == [root[0].get("id"), root[1].get("id")]
    text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|href|@import|<style|<script|<image", text)


@pytest.mark.parametrize("name", FILES)
def test_it_stands_on_an_opaque_card_with_readable_letters(name):
    root = root_of(name)
    card = root[2]
    assert card.tag == SVG + "rect" and card.get("fill") == "#FAFAF7"
    assert float(card.get("width")) >= float(root.get("width")) - 2
    assert min(float(text.get("font-size")) for text in root.iter(SVG + "text")) >= 13


@pytest.mark.parametrize("name", FILES)
def test_no_text_runs_out_of_its_box_or_into_another(name, make):
    root = root_of(name)
    boxes = [[float(rect.get(key)) for key in ("x", "y", "width", "height")] for rect in root.iter(SVG + "rect")]
    texts = [(*extent(text, make), float(text.get("font-size")), text.text) for text in root.iter(SVG + "text")]
    for left, right, base, size, words in texts:
        up, middle = base - 0.75 * size, base - 0.35 * size
        for x, y, w, h in boxes:
            meets = left < x + w and right > x and y < middle < y + h
            inside = x <= left and right <= x + w and y <= up and base <= y + h
            assert not meets or inside, f"{words!r} crosses the edge of the box at {x:g}, {y:g}"
    for i, (left, right, base, size, words) in enumerate(texts):
        for other_left, other_right, other_base, _, other in texts[:i]:
            apart = right <= other_left or other_right <= left or abs(base - other_base) >= size
            assert apart, f"{words!r} lies on {other!r}"


def test_the_colours_are_those_of_the_plots(make):
    for name in ("POLICY", "REFERENCE", "CHOSEN", "REJECTED", "LIBRARY"):
        assert getattr(make, name) == getattr(show, name)


def test_text_that_is_too_long_is_refused(make):
    assert "<text" in make.label(0, 20, "short", 60)
    with pytest.raises(ValueError, match="room is 60: shorten it"):
        make.label(0, 20, "much longer than its room", 60)
    with pytest.raises(ValueError, match="3 lines take 60 px, the box is 40 high"):
        make.box(0, 0, 200, 40, "a\nb\nc")


def test_the_first_drawing_leaves_both_answers_to_be_guessed():
    """Notebook 00 asks for a prediction: neither a query nor the number that it returns is told."""
    rows = (FOLDER.parent / "ask/databases/orders_0.csv").read_text(encoding="utf-8").splitlines()
    names, *rows = [line.split(",") for line in rows]
    city, minutes = names.index("city"), names.index("minutes")
    late = sum(row[city] == "Pune" and int(row[minutes]) > 45 for row in rows)
    root = root_of("first_look.svg")
    told = " ".join("".join(element.itertext()) for element in root)
    assert not re.search(rf"SELECT|error|\b{late}\b", told)
    assert [text.text for text in root.iter(SVG + "text")].count("?") == 2


def test_rewards_and_advantages_of_grpo_are_those_of_the_check_and_of_scratch():
    """The four queries, read off the drawing from top to bottom, answer its prompt: late orders in May."""
    elements = list(root_of("verifiable_rewards.svg").iter(SVG + "text"))
    texts = [text.text for text in elements]
    queries = [" ".join(texts[i : i + 2]) for i, text in enumerate(texts) if text.startswith("SELECT")]
    assert len(queries) == 4 and {"late orders", "in May?"} <= {*texts}
    gold = "SELECT COUNT(*) FROM orders WHERE minutes>45 AND month=5"
    rewards = [int(ask.is_right(query, gold)) for query in queries]
    assert rewards == [int(text.text) for text in elements if text.text in "01" and text.get("font-size") == "18"]
    verdicts = ["right rows" if reward else "wrong rows" if ask.runs(query) else "does not run"
                for query, reward in zip(queries, rewards, strict=True)]  # fmt: skip
    assert [text for text in texts if text in verdicts] == verdicts
    shown = [text for text in texts if re.fullmatch(r"[+-]\d\.\d\d", text)]
    assert shown == [f"{advantage:+.2f}" for advantage in group_advantages(torch.tensor(rewards).float(), 4)]
    described = root_of("verifiable_rewards.svg")[1].text
    assert f"the rewards are {', '.join(map(str, rewards))}." in described
