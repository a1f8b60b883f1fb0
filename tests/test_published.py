"""data/published and tools/published.py: each figure in its quote, each box in its links."""

import json
import re
from decimal import Decimal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scripts import script

published = script("tools/published.py")
KNOWN = published.sources()

# --- The files of the course ----------------------------------------------------------------------


def test_every_file_is_whole_and_each_figure_stands_in_its_quote():
    files = {path.name for path in published.FOLDER.glob("*.yaml")} - published.TABLES
    assert {f"{name}.yaml" for name in KNOWN} == files
    assert len(files) >= 40


def test_the_readme_says_where_each_source_belongs():
    told = (published.FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in KNOWN if f"`{name}`" not in told] == []


def test_every_box_of_the_course_keeps_to_the_sources_that_it_links():
    found = [(place, published.faults(text, KNOWN)) for place, text in published.boxes()]
    assert [(place, faults) for place, faults in found if faults] == []


def test_every_figure_can_be_printed_and_what_is_printed_is_no_fault():
    """Pipes and backticks of the quotes don't break a row."""
    ids = [f"{name}#{part}" for name in KNOWN for part in published.parts(KNOWN[name])]
    head, line, *rows = published.box(ids, KNOWN).splitlines()
    assert len(rows) == len(ids)
    broken = [row for row in rows if len(re.findall(r"(?<!\\)\|", row)) != 6]
    assert broken == []
    box = "\n".join(["**On a real model**", "", head, line, *rows])
    assert published.faults(box, KNOWN) == []


# --- A folder of made-up sources ------------------------------------------------------------------

SLOWER = {"id": "slower", "subject": "slower by", "sum": "3083 / 2413 - 1", "figure": "28 %"}
PAPER = {
    "id": "paper",
    "title": "A paper",
    "address": "https://paper.org/abs/1",
    "date": "2024-05",
    "opened": "2026-12-01",
    "how": "version 2",
    "figures": [
        {
            "id": "lora",
            "model": "Llama-3.1-8B",
            "card": "RTX 4090",
            "subject": "LoRA: tokens a second, AIME 2019",
            "figure": "3,083, 0.485",
            "kind": "quote",
            "where": "Table 7",
            "quote": "| LoRA | 3083 | 0.485 | lr=2e-4 |",
        },
        {
            "id": "qlora",
            "model": "Llama-3.1-8B",
            "subject": "QLoRA: tokens a second",
            "figure": "2413",
            "kind": "quote",
            "quote": "| QLoRA | 2413 |",
        },
    ],
    "derived": [SLOWER],
}
RANK = {"id": "rank", "model": "all", "subject": "rank", "figure": "32", "kind": "read"}
BLOG = {
    "id": "blog",
    "title": "A post",
    "address": "https://blog.io/post",
    "date": "undated",
    "opened": "2026-11-30",
    "how": "stored copy",
    "figures": [RANK | {"quote": "rank: 32"}],
}


def written(folder, **sources):
    """The folder with one file a source."""
    for name, source in sources.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(source), encoding="utf-8")
    return folder


def changed(source: dict, path: list, value) -> dict:
    """A copy with the value at a path of keys and positions; None takes the key away."""
    source = json.loads(json.dumps(source))
    place = source
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return source


@pytest.fixture
def known(tmp_path):
    return published.sources(written(tmp_path, paper=PAPER, blog=BLOG))


def test_sources_are_read_by_id_and_tables_of_runs_stand_beside(tmp_path):
    for name in published.TABLES:
        (tmp_path / name).write_text("- run: a\n", encoding="utf-8")
    known = published.sources(written(tmp_path, paper=PAPER, blog=BLOG))
    assert list(known) == ["blog", "paper"]
    assert known["blog"]["derived"] == {}
    assert known["paper"]["figures"]["lora"]["card"] == "RTX 4090"


def test_a_file_that_is_no_source_is_named(tmp_path):
    (tmp_path / "other.yaml").write_text("- run: a\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.yaml is .*wanted a mapping with id"):
        published.sources(tmp_path)


@pytest.mark.parametrize("date", ["2024", "2024-05", "2024-05-31", "undated"])
def test_a_bare_date_is_read_as_it_is_written(tmp_path, date):
    """YAML makes a number of the first and a date of the third."""
    text = yaml.safe_dump(PAPER).replace("'2026-12-01'", "2026-12-01")
    text = re.sub(r"(?m)^date:.*", f"date: {date}", text)
    (tmp_path / "paper.yaml").write_text(text, encoding="utf-8")
    source = published.sources(tmp_path)["paper"]
    assert (source["date"], source["opened"]) == (date, "2026-12-01")


FAULTS = [
    (["note"], "x", r"unknown keys \['note'\]"),
    (["how"], None, r"missing keys \['how'\]"),
    (["how"], "two\nlines", "how is .*one line"),
    (["id"], "papers", "id is 'papers', wanted the file's name"),
    (["address"], "http://paper.org/abs/1", "address is .*https"),
    (["address"], "https://paper.org/abs/1.", "address is"),
    (["address"], "https://paper", "address is"),
    (["address"], "https://paper.org/a_(b)", "address is"),
    (["date"], "May 2024", "date is 'May 2024', wanted YYYY"),
    (["date"], "2024-13", "date is"),
    (["date"], "2027-01", "opened is '2026-12-01', wanted no day before 2027-01"),
    (["opened"], "2026-12", "opened is '2026-12', wanted YYYY-MM-DD"),
    (["figures"], [], "figures is .*at least one"),
    (["figures", 0, "figure"], "3,084", "lora: its quote lacks 3084 of the figure"),
    (["figures", 0, "kind"], "memory", "lora: kind is 'memory', wanted quote"),
    (["figures", 0, "page"], "3", "lora: .*unknown keys"),
    (["figures", 0, "model"], None, "lora: missing keys"),
    (["figures", 1, "id"], "lora", "'lora' stands there twice"),
    (["figures", 1, "id"], "Q LoRA", "id is 'Q LoRA'"),
    (["figures", 1, "figure"], 2413, "figure is 2413, wanted one line of text"),
    (["derived", 0, "id"], "lora", "share the ids"),
    (["derived", 0, "figure"], "29 %", "is '27.76.*wanted the figure, 29"),
    (["derived", 0, "figure"], "28 to 29 %", "wanted one number"),
    (["derived", 0, "sum"], "3083 / 2414 - 1", "no quote holds 2414"),
    (["derived", 0, "sum"], "3083 ** 2413", "wanted numbers with"),
    (["derived", 0, "sum"], "3083 /", "wanted numbers with"),
]


@pytest.mark.parametrize("path, value, told", FAULTS)
def test_a_fault_of_a_file_is_named_with_the_file(tmp_path, path, value, told):
    folder = written(tmp_path, paper=changed(PAPER, path, value))
    with pytest.raises(ValueError, match=rf"^paper\.yaml: .*{told}"):
        published.sources(folder)


def test_one_address_is_one_file(tmp_path):
    folder = written(tmp_path, paper=PAPER, twin=changed(PAPER, ["id"], "twin"))
    with pytest.raises(ValueError, match=r"^twin\.yaml: .*that of paper\.yaml"):
        published.sources(folder)


def test_a_table_by_hand(known):
    paper, post = "[A paper](https://paper.org/abs/1), 2024-05", "[A post](https://blog.io/post)"
    assert published.box(["paper#qlora", "blog#rank", "paper#slower"], known).splitlines()[2:] == [
        rf"| {paper} | Llama-3.1-8B | QLoRA: tokens a second | 2413 | `\| QLoRA \| 2413 \|` |",
        f"| {post} | all | rank | 32 | read: `rank: 32` |",
        f"| {paper} |  | slower by | 28 % | worked out: `3083 / 2413 - 1` |",
    ]


@pytest.mark.parametrize(
    "id, told",
    [
        ("book#x", "one of blog, paper"),
        ("paper#x", "one of lora, qlora, slower"),
        ("paper", "one of lora"),
    ],
)
def test_an_id_that_is_not_there_names_those_that_are(known, id, told):
    with pytest.raises(ValueError, match=told):
        published.box([id], known)


# --- Boxes: what is right, and what is found ------------------------------------------------------

P, POST = "[a paper](https://paper.org/abs/1)", "[a post](https://blog.io/post)"
RIGHT = [
    f"In {P} LoRA ran at 3,083 tokens a second and QLoRA at 2413.",
    f"{P}: 3\u202f083 against 2{{,}}413.",
    f"{P}: 48.5 % right, 0.485 as printed, 48.5 percent in words.",
    f"{P} trained at 2e-4, that is 0.0002, $2\\times10^{{-4}}$ or 2 × 10⁻⁴.",
    f"{P} trained at $2\\times10^{{−4}}$, with another minus sign.",
    f"{P}: 2,413 to 3,083; 2413–3083; 2413-3083; about −2413.",
    f"QLoRA was 28 % slower ({P}, 2024, Table 7, on an RTX 4090).",
    f"{P} trained Llama 3.1 8B, an A100-80G, GPT-4, a 4-bit base and r8.",
    f"Our 135M lost 3 points in 5 runs. {P} has no such run.",
    f"`micro` stored 17 of 256 codes. We'd start at 16. {P}.",
    f"LoRA took 3083 ({P}).\n\n- QLoRA took 2413.\n- Our own took 7.\n\n1. Rank 32 ({POST}).",
    f"See [03](03_qlora_memory.ipynb#cell-id=fit-3) and {P}.",
    f"{P} measured it on AIME 2019.",
]
WRONG = [
    (f"{P}: 3,084 tokens a second.", "3,084"),
    (f"{P}: LoRA 3083, QLoRA 2414.", "2414"),
    (f"{P}: 4.85 % right.", "4.85"),
    (f"{P}: 485 right.", "485"),
    (f"{P}: 48.5 questions right.", "48.5"),
    (f"{P} trained at 2e-5.", "2e-5"),
    (f"{P} trained at $2\\times10^{{-5}}$.", "2e-5"),
    (f"{P}: 2,413 to 3,100.", "3,100"),
    (f"{P}: 2413–2500.", "2500"),
    (f"{P}: a 9-point gain.", "9"),
    (f"{P}: a gain of 1.5x.", "1.5x"),
    (f"In {P}, 2025.", "2025"),
    (f"{P}: rank 32.", "32 of .*it stands in blog"),
    ("LoRA ran at 3083.", "links no source"),
    (f"{P} and [another](https://paper.org/abs/2): 3083.", "https://paper.org/abs/2 is no source"),
    (f"{P} and https://arxiv.org/abs/2305.1.", "https://arxiv.org/abs/2305.1 is no source"),
    (f"Our 135M lost 3 points and {P} 4.", "3 of"),
    (f"Our 135M lost 3. Theirs lost 4 ({P}).", "4 of"),
    (f"- Our 135M lost 3\n- Theirs lost 4 ({P})", "4 of"),
]


@pytest.mark.parametrize("text", RIGHT)
def test_a_right_box_has_no_fault(known, text):
    assert published.faults(f"**On a real model.** {text}", known) == []


@pytest.mark.parametrize("text, told", WRONG)
def test_a_wrong_box_is_found(known, text, told):
    found = published.faults(f"**On a real model.** {text}", known)
    assert any(re.search(told, fault) for fault in found), found


def test_a_printed_row_is_no_fault_and_a_changed_one_is(known):
    table = published.box(["paper#lora", "blog#rank"], known)
    assert published.faults(f"**On a real model**\n\n{table}", known) == []
    assert published.faults(f"**On a real model**\n\n{table.replace('3,083', '3,803')}", known)
    assert published.faults(f"**On a real model**\n\n{table}\n| theirs | 2 | 3 |", known)


NUMBERS = st.decimals(min_value="0.001", max_value="99999", places=3)
WAYS = ["{}", "**{}**", "({})", "{} %", "about {}, as said", "+{}", "−{}", "{} to {}", "{}–{}"]
WAYS = [way.replace("{}", "{0}") for way in WAYS]


@given(said=NUMBERS, quoted=NUMBERS, same=st.booleans(), way=st.sampled_from(WAYS))
def test_a_number_passes_exactly_if_it_is_quoted(said, quoted, same, way):
    """However it is written; a percentage may also stand as its hundredth."""
    said = quoted if same else said
    figure = RANK | {"figure": "a score", "quote": f"it scored {quoted:,} there"}
    source = BLOG | {"figures": {"rank": figure}, "derived": {}}
    text = f"**On a real model.** {POST} has {way.format(f'{said:,}')}."
    fine = said == quoted or ("%" in way and said / 100 == quoted)
    assert (published.faults(text, {"blog": source}) == []) == fine


@given(
    number=st.decimals(min_value=0, max_value=10**7, places=2),
    way=st.sampled_from(["{}", "{}GB", "x{}", "{}s/it", "a-{}-b", "rank={}", "{}±0.5"]),
)
def test_numbers_of_a_quote_are_read_inside_words_too(number, way):
    assert Decimal(number) in published.numbers(way.format(number))
    assert published.numbers(way.format(number)) == published.numbers(way.format(f"{number:,}"))


# --- Where boxes stand ----------------------------------------------------------------------------


def test_boxes_are_found_in_notebooks_cards_and_reports(tmp_path):
    box = "**On a real model.** Text.\n\nMore."
    cells = [
        {"id": "no", "source": ["On a real model, not a box.\n", "See **On a real model**."]},
        {"id": "two", "source": ["Before.\n", "**On a real model**\n", "One.\n", "## Next\n"]},
        {"id": "whole", "source": box.splitlines(keepends=True)},
    ]
    cards = [{"id": "card", "long": box, "by": ["a"], "core": True}, {"id": "none", "long": "No."}]
    report = f"# Report\n\n## On a real model\n\n| a |\n\n## Limits\n\n3.\n\n{box}\n\n{box}\n"
    for folder in ("notebooks", "data/cards", "experiments/qlora"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notebooks/02_a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    (tmp_path / "data/cards/a.yaml").write_text(yaml.safe_dump(cards), encoding="utf-8")
    (tmp_path / "experiments/qlora/report.md").write_text(report, encoding="utf-8")
    assert published.boxes(tmp_path) == [
        ("02_a.ipynb#two", "**On a real model**\nOne."),
        ("02_a.ipynb#whole", box),
        ("a.yaml#card", box),
        ("experiments/qlora/report.md", "## On a real model\n\n| a |"),
        ("experiments/qlora/report.md", box),
        ("experiments/qlora/report.md", box),
    ]
