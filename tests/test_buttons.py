"""[Hint] and [Solution] under a verdict: what they show, and when."""

import pytest
import shown
from ipywidgets import Widget

from ftlab import exercises, notebook
from ftlab.classroom import page, progress
from ftlab.exercises import check, core, hint, nb04, solution

Q = "04.4"
HINTS = exercises.exercises(Q[:2])[Q].hints
RIGHT, WRONG = nb04.my_group_advantages, lambda rewards, num_generations: rewards


@pytest.fixture(autouse=True)
def own_progress(file, monkeypatch):
    monkeypatch.setenv("FTLAB_PROGRESS", str(file))
    monkeypatch.setattr(exercises, "hints_given", {})
    monkeypatch.setattr(page, "QUICK", -1)


@pytest.fixture
def under(monkeypatch):
    """What stands under the verdict on an answer where a notebook runs."""

    def made(answer) -> Widget:
        displayed = []
        monkeypatch.setattr(notebook, "shell", lambda: "a shell")
        monkeypatch.setattr("IPython.display.display", lambda bundle, raw: displayed.append(bundle))
        feedback = check(Q, answer)
        feedback._ipython_display_()
        block, buttons = displayed
        assert block == {"text/plain": repr(feedback), "text/html": feedback._repr_html_()}
        assert shown.VIEW not in block
        return buttons

    return made


def press(buttons, label: str) -> None:
    (button,) = (one for name, one in shown.named(buttons).items() if name.startswith(label))
    button.click()


def read(buttons) -> str:
    """What can be read under the buttons without unfolding anything, in one line."""
    return " ".join(shown.Page(shown.page_of(buttons)).open.split())


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("answer", [..., WRONG], ids=["not tried", "wrong"])
def test_each_press_shows_the_next_hint_below_those_before(under, answer):
    buttons = under(answer)
    assert list(shown.named(buttons)) == ["Hint", "Solution"] and read(buttons) == ""
    for k in range(1, len(HINTS) + 1):
        press(buttons, "Hint")
        places = [read(buttons).find(flat(text)) for text in HINTS]
        assert places[:k] == sorted(places[:k]) and min(places[:k]) >= 0
        assert set(places[k:]) <= {-1}
    assert list(shown.named(buttons)) == ["Solution"]


def test_the_button_and_the_function_climb_one_ladder(under):
    buttons = under(WRONG)
    press(buttons, "Hint")
    assert HINTS[1] in repr(hint(Q))
    press(buttons, "Hint")
    assert flat(HINTS[2]) in read(buttons) and flat(HINTS[1]) not in read(buttons)


def test_the_solution_is_shown_by_the_second_press(under):
    buttons, code = under(WRONG), flat(exercises.exercises(Q[:2])[Q].source)
    press(buttons, "Solution")
    assert code not in read(buttons) and "Solution" not in shown.named(buttons)
    press(buttons, "Hint")  # thought better of it
    press(buttons, "Solution")
    assert code not in read(buttons)
    press(buttons, "Show the solution")
    assert code in read(buttons) and list(shown.named(buttons)) == ["Hint"]
    assert code in flat(repr(solution(Q)))


def test_a_double_click_counts_once(under, monkeypatch):
    buttons = under(WRONG)
    monkeypatch.setattr(page, "QUICK", 60)
    press(buttons, "Solution")
    press(buttons, "Show the solution")
    press(buttons, "Hint")
    assert read(buttons) == "" and hint(Q).heading == f"hint 1 of {len(HINTS)}"


def test_a_right_answer_is_compared_with_ours_by_one_press(under):
    buttons = under(RIGHT)
    assert list(shown.named(buttons)) == ["Solution"]
    press(buttons, "Solution")
    assert flat(exercises.exercises(Q[:2])[Q].source) in read(buttons) and not shown.named(buttons)


def test_presses_are_no_attempts(under):
    buttons = under(WRONG)
    before = progress.events()
    press(buttons, "Hint")
    press(buttons, "Solution")
    press(buttons, "Show")
    assert progress.events() == before and len(before) == 1


def test_a_hint_that_looks_like_html_is_text(under, monkeypatch):
    hints, effort = ("<b>a</b>", "b", "c"), {"difficulty": 1, "minutes": 5}
    trap = core.Exercise("t", lambda _: None, hints, "x = '<i>'", **effort)
    monkeypatch.setattr(exercises, "find", lambda q: trap)
    buttons = under(...)
    press(buttons, "Hint")
    press(buttons, "Solution")
    press(buttons, "Show")
    assert "<b>a</b>" in read(buttons) and "x = '<i>'" in read(buttons)


def test_where_no_notebook_runs_ipython_shows_the_block_as_ever():
    with pytest.raises(NotImplementedError):
        check(Q, WRONG)._ipython_display_()
