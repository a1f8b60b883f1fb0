"""ftlab.classroom.review through its buttons, its file and its still picture."""

import json
import os

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbconvert import HTMLExporter
from shown import VIEW

from ftlab.classroom.review import results, review

EVIL = "<script>alert('x')</script> & \u2028 <b>"


def items(n: int = 3) -> list[dict]:
    return [{"id": f"t-{i}", "prompt": f"ticket {i}", "answer": f"answer {i}"} for i in range(n)]


def picture(made) -> str:
    return made._repr_mimebundle_()["text/html"]


def buttons(made) -> dict:
    return {button.description: button for button in made._widget.children[-2].children}


def failed(made) -> str:
    (output,) = made._failed.outputs
    return output["data"]["text/html"]


def test_click_through(tmp_path):
    file = tmp_path / "new" / "review.jsonl"
    made = review(items(), file, title="Tuned model")
    assert "Tuned model · 1 of 3 · nothing rated yet" in picture(made) and "ticket 0" in picture(made)
    assert not file.exists()
    made._comment.value = "good"
    buttons(made)["Approve"].click()
    assert "2 of 3" in picture(made) and made._comment.value == ""
    buttons(made)["Skip"].click()
    assert "3 of 3" in picture(made)
    buttons(made)["Reject"].click()
    assert "2 of 3" in picture(made)  # on to the skipped one
    buttons(made)["Back"].click()
    assert "1 of 3 · approve ·" in picture(made) and made._comment.value == "good"
    made._comment.value = "not good"
    buttons(made)["Reject"].click()
    buttons(made)["Approve"].click()
    assert "all 3 rated · 1 of 3 approved" in picture(made)
    assert buttons(made)["Approve"].disabled and buttons(made)["Reject"].disabled
    buttons(made)["Skip"].click()
    buttons(made)["Back"].click()
    assert "3 of 3 · reject" in picture(made) and not buttons(made)["Approve"].disabled
    table = results(file).set_index("id")
    assert table["verdict"].to_dict() == {"t-0": "reject", "t-2": "reject", "t-1": "approve"}
    assert table["comment"].tolist() == ["not good", "", ""] and table["answer"].tolist()[0] == "answer 0"


def test_one_line_of_python_and_the_interval(tmp_path):
    """41 of 50: centre (41 + 1.921) / (50 + 3.841) = 0.797, half width 0.105: 0.69 to 0.90."""
    made = review(items(60), tmp_path / "r.jsonl")
    for i in range(50):
        counts = made.rate(f"t-{i}", "approve" if i < 41 else "reject", "why")
    assert counts == made.counts == "41 of 50 approved: 0.82, 95% interval 0.69 to 0.90"
    assert "51 of 60" in picture(made)
    for id, verdict in (("t-60", "approve"), ("t-0", "approved")):
        with pytest.raises(ValueError, match="60 ids"):
            made.rate(id, verdict)
    assert len(results(tmp_path / "r.jsonl")) == 50


def test_every_verdict_is_on_disk_and_reopening_goes_on(tmp_path):
    file = tmp_path / "r.jsonl"
    for i in range(3):
        made = review(items(), file)  # a new kernel each time
        assert f"{i + 1} of 3" in picture(made)
        buttons(made)["Approve"].click()
        assert len(results(file)) == i + 1
    assert "all 3 rated" in picture(review(items(), file))
    assert "4 of 5" in picture(review(items(5), file))  # more of the same answers


def test_what_changes_is_read_aloud_and_the_comment_has_a_name(tmp_path):
    made = review(items(), tmp_path / "r.jsonl")
    assert made._comment.description == "comment"
    assert "<p role='status'><b>1 of 3" in made._head.value
    (tmp_path / "r.jsonl").write_text("none")
    buttons(made)["Approve"].click()
    assert failed(made).startswith('<p role="alert"><b>Not done.</b>') and made._widget.children[-1] is made._failed
    (tmp_path / "r.jsonl").unlink()
    buttons(made)["Approve"].click()
    assert made._failed.outputs == ()


def test_two_notebooks_on_one_file_lose_nothing(tmp_path):
    one, two = review(items(), tmp_path / "r.jsonl"), review(items(), tmp_path / "r.jsonl")
    one.rate("t-0", "approve")
    two.rate("t-1", "reject")
    assert results(tmp_path / "r.jsonl")["id"].tolist() == ["t-0", "t-1"]


GOOD = json.dumps({"id": "t-0", "answer": "answer 0", "verdict": "approve", "comment": ""}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + GOOD[:30], "line 2: no saved verdict"),
        ("id,verdict\nt-0,approve\n", "line 1: no saved verdict"),
        ('{"prompt": "a", "completion": "b"}\n', "line 1: no saved verdict"),
        ('["id", "answer", "verdict", "comment"]\n', "line 1: no saved verdict"),
        (GOOD.replace("approve", "maybe"), "line 1: no saved verdict"),
        (GOOD.replace('"t-0"', '["t-0"]'), "line 1: no saved verdict"),
        (GOOD.replace("approve", "\udcff"), "line 1: no saved verdict"),  # a byte that is not UTF-8
        ("[" * 100_000, "line 1: no saved verdict"),
        (GOOD.replace("t-0", "u-0"), "a review of other answers .see id 'u-0'"),
        (GOOD.replace("answer 0", "answer of another model"), "a review of other answers .see id 't-0'"),
    ],
)
def test_a_corrupt_or_foreign_file_is_refused_and_kept(tmp_path, content, message):
    file = tmp_path / "r.jsonl"
    made = review(items(), file)
    before = content.encode(errors="surrogateescape")
    file.write_bytes(before)
    for attempt in (lambda: review(items(), file), lambda: made.rate("t-1", "approve")):
        with pytest.raises(ValueError, match=message):
            attempt()
    buttons(made)["Approve"].click()  # shown, as a button's traceback would not be
    assert "Not done." in failed(made)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["r.jsonl"]


def test_a_failed_write_leaves_the_file_and_the_counts(tmp_path, monkeypatch):
    file = tmp_path / "r.jsonl"
    made = review(items(), file)
    made.rate("t-0", "approve")
    before = file.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        made.rate("t-1", "approve")
    assert file.read_bytes() == before and made.counts.startswith("1 of 1")


def test_results_of_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        results(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert list(results(tmp_path / "empty.jsonl")) == ["id", "answer", "verdict", "comment"]


@pytest.mark.parametrize("rows", [[], items(2) + items(1)])
def test_no_items_or_an_id_twice(tmp_path, rows):
    with pytest.raises(ValueError, match="wanted one each"):
        review(rows, tmp_path / "r.jsonl")


@settings(max_examples=40, deadline=None)
@given(st.text(), st.text(), st.text() | st.integers())
def test_any_text_comes_back_from_the_file(tmp_path_factory, answer, comment, id):
    file = tmp_path_factory.mktemp("review") / "r.jsonl"
    made = review([{"id": id, "prompt": "", "answer": answer, "reference": None}], file)
    made.rate(id, "reject", comment)
    expected = {"id": id, "answer": answer, "verdict": "reject", "comment": comment}
    assert results(file).to_dict("records") == [expected]
    assert review([{"id": id, "prompt": "", "answer": answer}], file).counts.startswith("0 of 1 approved")


def test_user_text_is_escaped(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": EVIL}]
    made = review([{"id": 1, "prompt": messages, "answer": EVIL, "reference": EVIL}], tmp_path / EVIL[-3:], title=EVIL)
    text = picture(made)
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp;") == 4
    assert "<script" not in text and "system: Be brief.\nuser: " in text
    (tmp_path / EVIL[-3:]).write_text(EVIL)
    buttons(made)["Reject"].click()
    assert "Not done." in failed(made) and "/<b>" not in failed(made)


def test_a_page_without_kernel_shows_the_picture(tmp_path):
    """nbconvert on a notebook whose widget state was stripped, as on GitHub."""
    made = review(items(), tmp_path / "r.jsonl", title="Tuned")
    made.rate("t-0", "approve")
    bundle = made._repr_mimebundle_(include=None, exclude=None)
    assert VIEW in bundle
    assert bundle["text/plain"] == f"Review of 3 answers: {made.counts}"
    output = nbformat.v4.new_output("display_data", data=bundle)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("review(...)", outputs=[output])])
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert "Tuned · 2 of 3 · 1 of 1 approved" in page and "ticket 1" in page
