"""experiments/*/statements.yaml: each sentence stands where it is quoted, holds on every held-out
set that it covers, and fails on a record that is broken there.
"""

import json
import re
from functools import cache

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import ROOT

from experiments import lab, report

LABS = {name: lab.load(name) for name in lab.names()}
BOUND = [
    pytest.param(LABS[name], statement, id=f"{name}#{statement.id}")
    for name in LABS
    for statement in LABS[name].statements.values()
]
COVERED = [
    pytest.param(LABS[name], check, set_, id=f"{name}#{statement.id}, {check.metric}, {set_}, {i}")
    for name in LABS
    for statement in LABS[name].statements.values()
    for i, check in enumerate(statement.checks)
    for set_ in check.sets
]


@cache
def cells(notebook: str) -> dict[str, str]:
    found = json.loads((ROOT / notebook).read_text("utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in found}


@cache
def place(quoted: str) -> str:
    """The text of a notebook's cell, of a card or a quiz, or of a whole file."""
    file, _, part = quoted.partition("#")
    if file.endswith(".ipynb"):
        return plain(cells(file)[part])
    if file.endswith(".yaml") and part:
        entries = yaml.safe_load((ROOT / file).read_text("utf-8"))
        entries = entries if isinstance(entries, list) else entries["questions"]
        [entry] = [one for one in entries if str(one["id"]) == part]
        return plain(json.dumps(entry, ensure_ascii=False).replace("\\n", " ").replace('\\"', '"'))
    return plain((ROOT / file).read_text("utf-8"))


def plain(text: str) -> str:
    """One space for any, no emphasis, and of a link only what one reads."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(text.replace("**", "").replace("*", "").split())


@pytest.mark.parametrize(("of", "statement"), BOUND)
def test_a_sentence_stands_verbatim_where_it_is_quoted(of, statement):
    assert all(plain(statement.says) in place(quoted) for quoted in statement.quoted), (
        statement.quoted
    )
    assert plain(statement.says) in plain((ROOT / f"experiments/{of.name}/report.md").read_text())


@pytest.mark.parametrize(("of", "statement"), BOUND)
def test_a_sentence_holds_on_every_held_out_set_that_it_covers(of, statement):
    for verdict in of.verdicts(statement):
        found = f"{verdict.check} on {verdict.set}: {verdict.interval.shown()}"
        assert verdict.holds, found


@pytest.mark.parametrize(("of", "statement"), BOUND)
def test_a_sentence_covers_every_set_of_its_metric_or_names_those_that_it_covers(of, statement):
    for check in statement.checks:
        for set_ in check.sets:
            left_out = of.metrics[check.metric].sets.keys() - set(check.sets)
            named = of.about.get("drop", {}).get(set_, set_)
            assert not left_out or re.search(rf"\b{named}\b", statement.says, re.I), left_out


@pytest.mark.parametrize(("of", "statement"), BOUND)
def test_below_six_seeds_a_sentence_names_their_number(of, statement):
    missing = [n for n in lab.few(of, statement) if not lab.seeds_said(statement.says, n)]
    assert not missing, f"it rests on {missing} seeds and does not say so: {statement.says}"


@pytest.mark.parametrize(("of", "statement"), BOUND)
def test_every_number_of_a_sentence_follows_from_its_checks(of, statement):
    assert lab.unsupported(of, statement) == []


@pytest.mark.parametrize(("of", "check", "set_"), COVERED)
def test_a_sentence_fails_on_a_record_that_is_broken_on_this_set(of, check, set_):
    broken = of.broken(check, set_)
    assert not broken.holds, f"{check} still holds on {set_}: {broken.interval.shown()}"


@pytest.mark.parametrize("name", LABS)
def test_the_reports_are_what_the_records_give(name):
    for file, text in report.files(LABS[name]).items():
        kept = (ROOT / "experiments" / name / file).read_text("utf-8")
        assert kept == text, f"experiments/{name}/{file}: run python experiments/report.py {name}"


def test_the_list_of_experiments_is_what_the_records_give():
    kept = (ROOT / "experiments" / "README.md").read_text("utf-8")
    assert kept == report.readme(list(LABS.values())), "run python experiments/report.py"


# --- The machinery on made-up records -------------------------------------------------------------

BASE = {"title": "t", "question": "q", "sets": {"test": "the test", "hand": "the hand test"}}


def made(folder, left, right, statements, seeds=6, **more):
    """An experiment with two arms, whose scores are arrays (seeds, questions) of each set."""
    records = [
        {"arm": arm, "seed": seed, **{set_: scores[set_][seed].tolist() for set_ in scores}}
        for arm, scores in (("a", left), ("b", right))
        for seed in range(seeds)
    ]
    told = BASE | {
        "arms": {arm: {"what": arm, "where": {"arm": arm}} for arm in "ab"},
        "metrics": {"right": {"what": "share right", "sets": {one: one for one in left}}},
        "statements": statements,
    }
    here = folder / "made"
    here.mkdir(exist_ok=True)
    (here / "statements.yaml").write_text(yaml.safe_dump(told | more))
    (here / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return lab.load("made", folder)


def test_an_experiment_without_sentences_is_under_way_and_says_that_it_has_no_records(tmp_path):
    arms = {"a": {"what": "a", "where": {"arm": "a"}}}
    told = BASE | {"arms": arms, "metrics": {"right": {"what": "right", "sets": {"test": "r"}}}}
    for name, more in (("open", {}), ("empty", {"statements": []}), ("done", {"statements": [1]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "statements.yaml").write_text(yaml.safe_dump(told | more))
    assert lab.names(tmp_path) == ["done"]
    assert lab.under_way(tmp_path) == ["empty", "open"]
    with pytest.raises(lab.RecordError, match="open: no records yet"):
        lab.load("open", tmp_path)


def draws(share: float, seed: int, seeds: int = 6, n: int = 80) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, n)) < share).astype(float)


def check(is_: str, says: str = "A and b.", **more) -> list[dict]:
    arms = {"left": "a"} if is_.startswith("at ") else {"left": "a", "right": "b"}
    return [{"id": "s", "says": says, "checks": [{"metric": "right", "is": is_, **arms, **more}]}]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(0, 999), st.integers(2, 7))
def test_whatever_holds_fails_once_it_is_broken(tmp_path_factory, one, other, seed, seeds):
    """All predicates on random records; a value lies as near to its interval as it may."""
    folder = tmp_path_factory.mktemp("made")
    left = {s: draws(one, seed + i, seeds) for i, s in enumerate(("test", "hand"))}
    right = {s: draws(other, seed + 9 + i, seeds) for i, s in enumerate(("test", "hand"))}
    for is_ in lab.PREDICATES:
        value = {} if is_ in lab.PREDICATES[:3] else {"value": 0.5}
        of = made(folder, left, right, check(is_, **value), seeds)
        for verdict in of.verdicts(of.statements["s"]):
            if verdict.holds:
                assert not of.broken(verdict.check, verdict.set).holds


@pytest.mark.parametrize("wrong", ["test", "hand"])
def test_a_finding_of_one_set_does_not_hold_on_both(tmp_path, wrong):
    left = {s: draws(0.2 if s == wrong else 0.8, 1) for s in ("test", "hand")}
    right = {s: draws(0.5, 2) for s in ("test", "hand")}
    of = made(tmp_path, left, right, check("greater"))
    assert {v.set: v.holds for v in of.verdicts(of.statements["s"])} == {
        "test": wrong != "test",
        "hand": wrong != "hand",
    }


def test_five_seeds_that_disagree_are_no_difference_however_many_questions(tmp_path):
    """All questions of a seed are answered alike: the seeds are the sample."""
    of_seed = np.array([1.0, 1, 0, 1, 0])
    left = {"test": np.repeat(of_seed[:, None], 300, 1)}
    right = {"test": np.zeros((5, 300))}
    of = made(tmp_path, left, right, check("greater"), 5)
    [verdict] = of.verdicts(of.statements["s"])
    assert verdict.interval.mean == pytest.approx(0.6) and not verdict.holds


def test_only_seeds_that_both_arms_have_are_compared(tmp_path):
    of = made(tmp_path, {"test": draws(0.5, 1)}, {"test": draws(0.5, 2)}, [])
    kept = [one for one in of.records if one["arm"] == "a" or one["seed"] in (1, 4)]
    of = lab.replace(of, records=kept)
    assert of.difference("right", "a", "b", "test").seeds == 2


def test_a_baseline_that_was_not_trained_stands_beside_every_seed(tmp_path):
    left, right = draws(0.7, 1), draws(0.5, 2, 1)
    of = made(tmp_path, {"test": left}, {"test": np.repeat(right, 6, 0)}, [])
    fixed = lab.replace(of.arms["b"], fixed=True, where={"arm": "b", "seed": 0})
    of = lab.replace(of, arms=of.arms | {"b": fixed})
    gap = of.difference("right", "a", "b", "test")
    assert (gap.seeds, gap.mean) == (6, pytest.approx(left.mean() - right.mean()))


@pytest.mark.parametrize(
    ("says", "seeds", "named"),
    [
        ("With five seeds, dpo gains.", 5, True),
        ("Over 5 training seeds it gains.", 5, True),
        ("It gains (three seeds).", 3, True),
        ("It gains in five rounds, and three seeds were run.", 5, False),
        ("It gains.", 5, False),
        ("In one run it gains.", 1, True),
    ],
)
def test_the_number_of_seeds_is_read_off_a_sentence(says, seeds, named):
    assert lab.seeds_said(says, seeds) == named


def test_a_number_that_no_check_gives_is_found(tmp_path):
    left, right = {"test": draws(0.75, 1)}, {"test": draws(0.25, 2)}
    gap = left["test"].mean() - right["test"].mean()
    level = left["test"].mean()
    good = f"a gains {gap:.2f}, that is {100 * gap:.0f} points, and has {level:.1%} on 80 questions"
    for says, wrong in ((good, []), (good.replace("80", "90"), ["90"]), ("a gains 0.99", ["0.99"])):
        of = made(tmp_path, left, right, check("greater", says))
        assert lab.unsupported(of, of.statements["s"]) == wrong


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (check("better"), "better"),
        (check("at least"), "value"),
        (check("greater", value=0.3), "value"),
        (check("greater", sets=["other"]), "other"),
        (check("greater") * 2, "two statements"),
        ([{"id": "s", "says": "A.", "checks": [], "why": "?"}], "why"),
    ],
)
def test_a_wrong_statement_says_what_is_wrong(tmp_path, statements, message):
    with pytest.raises(lab.RecordError, match=message):
        made(tmp_path, {"test": draws(0.5, 1)}, {"test": draws(0.5, 2)}, statements)


def test_an_arm_whose_records_are_twice_there_or_not_at_all_is_an_error(tmp_path):
    of = made(tmp_path, {"test": draws(0.5, 1)}, {"test": draws(0.5, 2)}, [])
    with pytest.raises(lab.RecordError, match="more than once"):
        lab.replace(of, records=of.records * 2).level("right", "a", "test")
    with pytest.raises(lab.RecordError, match="no record"):
        lab.replace(of, records=of.records[6:]).level("right", "a", "test")


def test_a_report_has_a_table_for_each_search_and_counts_the_lines_of_the_file(tmp_path):
    """measures.py joins the runs of a seed, so there are fewer records than lines."""
    how = {"where": {}, "group": ["arm"], "by": "seed"}
    searches = [how | {"value": "seed", "what": one} for one in ("the first", "the second")]
    left, right = {"test": draws(0.5, 1)}, {"test": draws(0.5, 2)}
    made(tmp_path, left, right, [], search=searches)
    joins = "def records(lines):\n    return [{**one, 'joined': True} for one in lines[3:9]]\n"
    (tmp_path / "made" / "measures.py").write_text(joins)
    of = lab.load("made", tmp_path)
    text = report.report(of)
    assert len(of.records) == 6 and "| records | 12 |" in text and "in 12 of 12 records" in text
    assert text.count("| arm | seed: the first |") == text.count("| arm | seed: the second |") == 1


@pytest.mark.parametrize("sets", [1, 2])
def test_the_heading_of_a_picture_fits_its_width(tmp_path, sets):
    """A letter of 15 pixels in bold is up to 9 wide."""
    scores = {set_: draws(0.5, 1) for set_ in ("test", "hand")[:sets]}
    of = made(tmp_path, scores, scores, [])
    metric = lab.replace(of.metrics["right"], what="as long as a heading can be " * 9)
    svg = report.picture(lab.replace(of, metrics={"right": metric}), "right")
    width = int(re.search(r' width="(\d+)"', svg)[1])
    headings = re.findall(r'font-weight="600">([^<]*)<', svg)
    assert headings and all(len(line) * 9 <= width - 16 for line in headings)


@pytest.mark.parametrize("sets", [1, 2, 3, 4])
def test_a_picture_has_a_panel_for_each_held_out_set_and_a_dot_for_each_arm(tmp_path, sets):
    names = [f"set-{i}" for i in range(sets)]
    scores = [{name: draws(0.5, i + 10 * side) for i, name in enumerate(names)} for side in (1, 2)]
    of = made(tmp_path, *scores, [], sets={name: name for name in names})
    drawn = report.picture(of, "right")
    height = float(re.search(r'height="(\d+)"', drawn)[1])
    assert [drawn.count(f">{name}</text>") for name in names] == [1] * sets
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert len(set(dots)) == 2 * sets and all(float(y) < height for _, y in dots)


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        (lab.Interval(0.5, 0.4, 0.6, 3, 80), "0.500 (0.400 to 0.600)"),
        (lab.Interval(0.5, -np.inf, np.inf, 1, 1), "0.500 (one value)"),
        (lab.Interval(0.5, -3.0, 4.0, 2, 1), "0.500 (two values)"),
        (lab.Interval(0.5, 0.5, 0.5, 3, 1), "0.500 (the same in 3 runs)"),
    ],
)
def test_an_interval_of_two_values_or_of_equal_ones_is_not_shown_as_if_it_were_sure(
    interval, shown
):
    assert interval.shown() == shown


def test_a_search_shows_the_mean_where_several_seeds_tried_a_setting(tmp_path):
    how = {"where": {"phase": "search"}, "group": ["arm"], "by": "rate", "value": "v", "what": "v"}
    of = made(tmp_path, {"test": draws(0.5, 1)}, {"test": draws(0.5, 2)}, [], search=how)
    tried = [(0.1, 0.2), (0.1, 0.4), (0.3, 0.5), (0.3, None)]
    more = [{"arm": "c", "phase": "search", "rate": rate, "v": v} for rate, v in tried]
    assert "| c | 0.1: 0.300; 0.3: 0.500 |" in report.search(
        lab.replace(of, records=of.records + more)
    )


def test_seconds_that_several_records_share_are_counted_as_measures_py_says(tmp_path):
    of = made(tmp_path, {"test": draws(0.5, 1)}, {"test": draws(0.5, 2)}, [])
    assert "not recorded" in report.hours(of)
    lines = [one | {"cpu_seconds": 3600} for one in of.lines]
    assert report.hours(lab.replace(of, lines=lines)) == "12.0 CPU-hours"
    counted = lab.replace(of, lines=lines, functions={"cpu_seconds": lambda lines: 7200})
    assert report.hours(counted) == "2.0 CPU-hours"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b", 2),
        ("list[-1]", 6),
        ("list[1:]", [5, 6]),
        ("points[0].kl", 0.5),
        ("points[*].kl", [0.5, 0.7]),
        ("points[7].kl", None),
        ("a.none.b", None),
    ],
)
def test_a_path_names_a_value_of_a_record(path, value):
    record = {"a": {"b": 2}, "list": [4, 5, 6], "points": [{"kl": 0.5}, {"kl": 0.7}]}
    assert lab.at(record, path) == value
