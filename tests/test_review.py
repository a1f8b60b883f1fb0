"""ftlab.classroom.review through its buttons, its file and its still picture."""

import json
from pathlib import Path

import ipywidgets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import VIEW, Page, named, page_of

from ftlab.classroom import page
from ftlab.classroom.review import review

EVIL = "<script>alert('x')</script> & \u2028 <b>"


def items(n: int = 3) -> list[dict]:
    return [{"id": f"t-{i}", "prompt": f"ticket {i}", "answer": f"answer {i}", "reference": "r"} for i in range(n)]


def says(made) -> str:
    return Page(page_of(made)).open


def comment(made) -> ipywidgets.Text:
    return named(made, ipywidgets.Text)["comment"]


def stored(file) -> list[tuple]:
    return [tuple(json.loads(line).values()) for line in file.read_text("utf-8").splitlines()]


def test_click_through(tmp_path):
    file = tmp_path / "new" / "review.jsonl"
    made = review(items(), file, title="Tuned model")
    assert "Tuned model · 1 of 3 · nothing rated yet" in says(made) and "ticket 0" in says(made)
    assert not file.exists() and 'role="status"' in page_of(made)
    comment(made).value = "good"
    for label, expected in (("Approve", "2 of 3"), ("Skip", "3 of 3"), ("Reject", "2 of 3"), ("Back", "1 of 3")):
        named(made)[label].click()
        assert expected in says(made)  # after Reject on to the skipped one
    assert "1 of 3 · approve · " in says(made) and comment(made).value == "good"
    comment(made).value = "not good"
    named(made)["Reject"].click()
    assert comment(made).value == ""
    named(made)["Approve"].click()
    assert "all 3 rated · 1 of 3 approved" in says(made) and [*named(made)] == ["Skip", "Back"]
    for label in ("Skip", "Back"):
        named(made)[label].click()
    assert "3 of 3 · reject" in says(made) and "Approve" in named(made)
    assert stored(file) == [
        ("t-0", "answer 0", "approve", "good"), ("t-2", "answer 2", "reject", ""),
        ("t-0", "answer 0", "reject", "not good"), ("t-1", "answer 1", "approve", ""),
    ]  # fmt: skip


def test_the_interval(tmp_path):
    """41 of 50: centre (41 + 1.921) / (50 + 3.841) = 0.797, half width 0.105: 0.69 to 0.90."""
    rows = [{**item, "verdict": "approve" if i < 41 else "reject", "comment": ""} for i, item in enumerate(items(50))]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = review(items(60), tmp_path / "r.jsonl", "")
    assert "51 of 60 · 41 of 50 approved: 0.82, 95% interval 0.69 to 0.90" in says(made)


def test_verdicts_of_ones_own_are_counted(tmp_path):
    """The labels of an error analysis: three of five have one, and the last verdict on an item counts."""
    file, labels = tmp_path / "r.jsonl", ["condition", "column", "unclear"]
    made = review(items(5), file, "Errors", labels)
    assert [*named(made)] == [*labels, "Skip", "Back"] and "nothing rated yet" in says(made)
    for label in ("condition", "column", "condition"):
        made.press(label)
    assert "Errors · 4 of 5 · 3 rated: 2 condition, 1 column" in says(made)
    made.press("Back")
    made.press("unclear")
    assert "3 rated: 1 condition, 1 column, 1 unclear" in says(review(items(5), file, "Errors", labels))
    assert [row[2] for row in stored(file)] == ["condition", "column", "condition", "unclear"]


@pytest.mark.parametrize("n", [1, 7, 20])
def test_each_label_has_its_button_also_after_a_page_with_fewer(tmp_path, n):
    labels = [f"label {i}" for i in range(n)]
    made = review(items(1), tmp_path / "r.jsonl", "Errors", labels)
    for _ in range(2):
        assert [*named(made)] == [*labels, "Skip", "Back"]
        named(made)[labels[-1]].click()
        assert [*named(made)] == ["Skip", "Back"]
        named(made)["Back"].click()


def test_a_verdict_is_not_called_like_a_button_that_is_there(tmp_path):
    with pytest.raises(ValueError, match="Skip"):
        review(items(), tmp_path / "r.jsonl", "", ["good", "Skip"])


def test_every_verdict_is_on_disk_and_reopening_goes_on(tmp_path):
    file = tmp_path / "r.jsonl"
    for i in range(3):
        made = review(items(), file, "")  # a new kernel each time
        assert f"{i + 1} of 3" in says(made)
        made.press("Approve")
        assert len(stored(file)) == i + 1
    assert "all 3 rated" in says(review(items(), file, ""))
    assert "4 of 5" in says(review(items(5), file, ""))  # more of the same answers


def test_a_last_line_without_its_end_is_not_written_into(tmp_path):
    """Some editors leave a file so."""
    file = tmp_path / "review.jsonl"
    review(items(), file, "").press("Approve")
    file.write_text(file.read_text("utf-8").rstrip("\n"), "utf-8")
    review(items(), file, "").press("Reject")
    assert [row[:3] for row in stored(file)] == [("t-0", "answer 0", "approve"), ("t-1", "answer 1", "reject")]


def test_a_disk_that_is_full_half_way_costs_the_one_verdict(tmp_path, monkeypatch):
    file, write = tmp_path / "r.jsonl", Path.write_text
    made = review(items(), file, "")
    made.press("Approve")
    before = file.read_bytes()

    def full(path, text, **rest):
        write(path, text[: len(text) * 3 // 4], **rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    made.press("Reject")
    assert "No space left on device" in says(made) and file.read_bytes() == before
    monkeypatch.undo()
    named(made)["Try again"].click()
    assert "2 of 3 · 1 of 1 approved" in says(made)


def test_two_notebooks_on_one_file_lose_nothing_and_see_each_other(tmp_path):
    one, two = review(items(), tmp_path / "r.jsonl", ""), review(items(), tmp_path / "r.jsonl", "")
    one.press("Approve")
    two.press("Skip")
    two.press("Reject")
    assert [row[0] for row in stored(tmp_path / "r.jsonl")] == ["t-0", "t-1"] and "1 of 2 approved" in says(two)


GOOD = json.dumps({"id": "t-0", "answer": "answer 0", "verdict": "approve", "comment": ""}) + "\n"


@pytest.mark.parametrize("content", [
    GOOD + GOOD[:30], "id,verdict\nt-0,approve\n", '{"prompt": "a", "completion": "b"}\n',
    '["id", "answer", "verdict", "comment"]\n', GOOD.replace('"t-0"', '["t-0"]'),
    GOOD.replace("approve", "\udcff"),  # a byte that is not UTF-8
    GOOD.replace("t-0", "u-0"), GOOD + GOOD.replace("answer 0", "of another model"),
])  # fmt: skip
def test_a_corrupt_or_foreign_file_is_refused_and_kept(tmp_path, content):
    file = tmp_path / "r.jsonl"
    made = review(items(), file, "")
    before = content.encode(errors="surrogateescape")
    file.write_bytes(before)
    with pytest.raises(ValueError, match=r"r\.jsonl, line \d: not on one of these answers"):
        review(items(), file, "")
    made.press("Approve")
    assert "Not done." in says(made) and file.read_bytes() == before
    file.unlink()
    named(made)["Try again"].click()
    assert "1 of 3 · nothing rated yet" in says(made)


def test_a_second_click_is_not_one_for_the_next_answer(tmp_path, monkeypatch):
    made = review(items(), tmp_path / "r.jsonl", "")
    approve = named(made)["Approve"]
    approve.click()
    monkeypatch.setattr(page, "QUICK", 60)  # seconds
    approve.click()
    assert len(stored(tmp_path / "r.jsonl")) == 1 and "2 of 3" in says(made)


def test_the_verdict_on_another_models_answer_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text(GOOD + GOOD.replace("answer 0", "of another model"))
    with pytest.raises(ValueError, match="line 2: not on one of these answers; choose another file name"):
        review(items(), tmp_path / "r.jsonl", "")


@settings(max_examples=15, deadline=None)
@given(st.text(), st.text(), st.text() | st.integers())
def test_any_text_comes_back_from_the_file(tmp_path_factory, answer, said, id):
    file = tmp_path_factory.mktemp("review") / "r.jsonl"
    asked = [{"id": id, "prompt": "", "answer": answer, "reference": ""}]
    made = review(asked, file, "")
    comment(made).value = said
    made.press("Reject")
    assert json.loads(file.read_bytes()) == {"id": id, "answer": answer, "verdict": "reject", "comment": said}
    assert "0 of 1 approved" in says(review(asked, file, ""))


def test_user_text_is_escaped_and_a_page_without_kernel_shows_it(tmp_path):
    made = review([{"id": 1, "prompt": EVIL, "answer": EVIL, "reference": EVIL}], tmp_path / "r", title=EVIL)
    bundle = made._repr_mimebundle_()
    assert VIEW in bundle and Page(bundle["text/html"]).open.count(EVIL) == 4
