"""The course in JupyterLab, with mouse and keyboard: what a learner does, and what the page and the disk hold then.

Most tests open their notebook without outputs, all among the learner's copies in a copy of the repository, with a
kernel of its own. At the end of each the `watch` says that nothing was asked of anybody but the server on this machine,
and that the console is without errors.
"""

import importlib
import json
import os
import pkgutil
import re
from pathlib import Path

import pytest
from gallery import GALLERY, QUIZ

from ftlab import classroom, memory
from ftlab.classroom import cards, flash, interview, progress, quiz
from ftlab.classroom.page import QUICK

expect = pytest.importorskip("playwright.sync_api").expect

MINUTE = 60_000  # milliseconds
ROOT = Path(__file__).resolve().parent.parent.parent
CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


def shot(locator, name: str) -> None:
    """A picture in the folder that E2E_SHOTS names, if it names one."""
    if folder := os.environ.get("E2E_SHOTS"):
        locator.screenshot(path=Path(folder) / f"{name}.png")


def press(widget, name: str) -> None:
    """The button, no sooner than a hand could: what follows a new page at once is taken for a double click."""
    widget.page.wait_for_timeout(1000 * QUICK + 100)
    widget.get_by_role("button", name=name, exact=True).click()


# --- The watch --------------------------------------------------------------------------------------------------------


def test_what_is_asked_of_others_is_seen_and_not_reached(opened, watch):
    notebook = opened("00_start_here")
    assert watch.requests > 20 and watch.outside == [] and watch.errors == []
    elsewhere = ["https://cdn.example/x.js", f"{watch.server}lab/api/news", "ws://elsewhere.example/socket"]
    for request in (f"fetch('{elsewhere[0]}')", f"fetch('{elsewhere[1]}')", f"void new WebSocket('{elsewhere[2]}')"):
        notebook.page.evaluate(f"() => Promise.resolve({request}).catch(() => null)")
    notebook.until(lambda: len(watch.outside) == 3, "all three are seen")
    assert watch.outside == elsewhere
    notebook.until(lambda: len(watch.errors) == 3, "the console has complained of each")
    notebook.page.evaluate("() => void setTimeout(() => { throw new Error('a bug') })")
    notebook.until(lambda: any("a bug" in error for error in watch.errors), "an error in the page is seen")
    watch.outside.clear()
    watch.errors.clear()


@pytest.mark.parametrize("run", [lambda notebook: notebook.run("a", "b"), lambda notebook: notebook.run_all(MINUTE)])
def test_a_cell_that_fails_is_seen_also_where_the_page_has_moved_on(opened, run):
    cells = {"a": "1 / 0", **{f"c{n}": "print('line\\n' * 30)" for n in range(20)}, "b": "1"}
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(opened(f"broken_{id(run)}", cells=cells))


# --- What `make lab` opens --------------------------------------------------------------------------------------------


def headings(notebook: str) -> list[str]:
    """The titles of a notebook's sections, as the table of contents shows them."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [re.sub("[`*]", "", title) for title in re.findall(r"^##? (.+)$", lines, re.M)]


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_make_lab_opens_the_first_notebook_with_its_contents_beside_it(lab, watch, theme):
    """On a small screen, the learner's copy: trusted, no outputs, what to press in sight, nothing in front of it."""
    lab.fresh("00_start_here")
    lab.theme(theme)
    page = watch.context.new_page()
    page.set_viewport_size({"width": 1366, "height": 768})
    page.goto(lab.first())
    expect(page.get_by_text("(ipykernel) | Idle")).to_be_visible()
    expect(page.locator(".jp-tocItem-content")).to_contain_text(headings("00_start_here"))
    expect(page.get_by_title(re.compile(r"^Notebook trusted"))).to_be_visible()
    expect(page.locator(".jp-Dialog, .Toastify__toast")).to_have_count(0)
    assert "/my/00_start_here.ipynb" in lab.first()
    expect(page.locator(".jp-OutputArea-output")).to_have_count(0)
    expect(page.locator("kbd, code").get_by_text("Shift", exact=True)).to_be_in_viewport(ratio=1)
    shot(page, f"{theme}-first-screen")


def test_prose_is_at_most_46em_wide_and_drawings_and_code_have_the_window(opened):
    notebook = opened("00_start_here")
    notebook.page.set_viewport_size({"width": 1920, "height": 1000})
    measure = "p => [p.getBoundingClientRect().width, parseFloat(getComputedStyle(p).fontSize)]"
    widths = [p.evaluate(measure) for p in notebook.cell("title").locator("p").all()]
    assert widths and all(width <= 46 * size + 1 for width, size in widths)
    assert max(width / size for width, size in widths) > 45  # the lines are as long as they may be
    for wide in (notebook.cell("idea").locator("img"), notebook.cell("imports").locator(".cm-editor")):
        assert wide.bounding_box()["width"] > 46 * widths[0][1] + 100


def test_the_whole_repository_can_be_reached_and_a_kernel_has_what_the_makefile_exports(opened):
    notebook = opened("08_modern_stack", cells={"colab": "import os\nprint(os.environ)"})
    picture = notebook.page.get_by_alt_text(re.compile("^One run, from rows to token ids"))
    notebook.cell("title").scroll_into_view_if_needed()
    notebook.until(lambda: picture.evaluate("image => image.naturalWidth") > 0, "the picture is there")
    notebook.page.locator('.lm-TabBar-tab[data-id="filebrowser"]').click()
    notebook.page.locator(".jp-BreadCrumbs-home").click()
    for name in ("README.md", "data"):
        expect(notebook.page.locator(".jp-DirListing-item").get_by_text(name, exact=True)).to_be_visible()
    notebook.run("colab")
    for setting in ("'GOMP_SPINCOUNT': '2000'", "'UNSLOTH_AUTO_INSTALL': '0'"):
        expect(notebook.output("colab")).to_contain_text(setting)


FAULTS = """async cell => {
  cell.scrollIntoView()
  const seen = selector => [...cell.querySelectorAll(selector)].filter(each => each.checkVisibility())
  await Promise.all(seen("img").map(image => image.decode().catch(() => null)))
  const wide = each => each.scrollWidth > each.clientWidth + 1
  const found = {
    "code that scrolls sideways": seen(".cm-scroller").some(wide),
    "an output that scrolls sideways": seen(".jp-OutputArea-output").some(wide),
    "a broken picture": seen("img").some(image => !image.naturalWidth),
    "an output taller than two screens":
      seen(".jp-Cell-outputArea").some(output => output.scrollHeight > 2 * window.innerHeight),
  }
  return Object.keys(found).filter(fault => found[fault])
}"""


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("notebooks/*.ipynb")))
def test_a_notebook_fits_a_small_screen_as_it_was_committed(opened, name):
    notebook = opened(name, outputs=True)
    notebook.page.set_viewport_size({"width": 1366, "height": 768})
    faults = {id: notebook.cell(id).evaluate(FAULTS) for id in notebook.ids}
    assert {id: found for id, found in faults.items() if found} == {}


# --- 00: all of it ----------------------------------------------------------------------------------------------------


def test_run_all_of_the_first_notebook_trains_a_model_that_answers(opened):
    notebook = opened("00_start_here")
    notebook.run_all(patience=15 * MINUTE)
    expect(notebook.output("train").locator("img")).to_be_visible()  # the curve
    cells = {cell["id"]: cell for cell in notebook.save() if cell["cell_type"] == "code"}
    assert [cell["execution_count"] for cell in cells.values()] == list(range(1, len(cells) + 1))
    printed = {id: "".join("".join(output.get("text", "")) for output in cell["outputs"]) for id, cell in cells.items()}
    assert re.search(r"\d+ s of training on \d+ rows", printed["after"])
    assert re.search(r"right on the hand test: 0\.\d", printed["score"])
    expect(notebook.output("before")).to_contain_text("wrong")
    expect(notebook.output("after")).to_contain_text("SELECT COUNT(*) FROM orders")
    expect(notebook.output("curve").locator("img")).to_be_visible()
    expect(notebook.output("exercise-1")).to_contain_text("not tried yet")
    shot(notebook.page, "run-all-00")

    own = notebook.output("own")
    own.get_by_role("textbox").fill("how many biryani orders in Kochi?")
    own.get_by_role("textbox").press("Enter")
    expect(own).to_contain_text("asking ...")
    expect(own).to_contain_text("cuisine='biryani' AND city='Kochi'", timeout=MINUTE)
    expect(own).not_to_contain_text("asking ...")
    press(own, "What is the capital of France?")
    expect(own).to_contain_text("the query is a guess", timeout=MINUTE)
    shot(own, "own-question")


# --- 03: sliders and questions ----------------------------------------------------------------------------------------

UPPER_CELLS = ("imports", "dial", "load", "prepare")  # the last one defines `four`


def fits_says(rows: int) -> list[str]:
    """What the widget of 03 must say for so many rows, in the one line of Python each that the cell names."""
    settings = {"r": 16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    settings |= {"per_device_train_batch_size": rows, "max_length": 2048}
    peak = memory.estimate("Llama-3-8B", **settings).peak_bytes
    longest = memory.max_length("RTX 4090", "Llama-3-8B", **settings)
    verdict = memory.verdict("RTX 4090", "Llama-3-8B", **settings)
    return [f"{rows} x 2,048 tokens: {verdict} on RTX 4090", f"Peak {peak / 1e9:.1f} GB", f"batch: {longest:,} tokens"]


def test_a_moved_slider_changes_the_numbers_and_the_picture(opened):
    notebook = opened("03_qlora_memory")
    notebook.run(*UPPER_CELLS, "fit")
    widget = notebook.output("fit").locator(".jupyter-widgets.widget-vbox").first
    for text in fits_says(rows=1):
        expect(widget).to_contain_text(text)
    bars = widget.locator("[title=activations]").first.bounding_box()["width"]
    handle = widget.locator(".widget-slider", has_text="rows").locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    notebook.page.mouse.move(x, y)
    notebook.page.mouse.down()
    notebook.page.mouse.move(x + 2000, y, steps=8)  # beyond the end
    notebook.page.mouse.up()
    for text in fits_says(rows=32):
        expect(widget).to_contain_text(text)
    assert widget.locator("[title=activations]").first.bounding_box()["width"] != bars
    handle.press("ArrowLeft")
    for text in fits_says(rows=31):
        expect(widget).to_contain_text(text)


# --- Questions --------------------------------------------------------------------------------------------------------


def first(kind: str) -> quiz.Question:
    return next(question for question in quiz.load(QUIZ) if question.kind == kind)


def responses(question: quiz.Question) -> tuple[str, str]:
    """A wrong response to a question, of the kind that has an explanation, and the right one."""
    if question.kind == "numeric":
        return repr(question.wrong[0][0]), repr(question.answer)
    if question.kind == "order":
        return question.right[::-1], question.right
    wrong = next(letter for letter in quiz.LETTERS[: len(question.choices)] if letter not in question.right)
    return wrong, question.right


def explained(question: quiz.Question, response: str) -> str:
    """Words of the explanation of a response, as the page has them: the longest part without formula or emphasis."""
    why = question.grade(response)[1]
    if question.kind in ("single", "multiple"):
        letter = responses(question)[0] if response != question.right else question.right[0]
        why = question.whys[quiz.LETTERS.index(letter)]
    return max(re.split(r"\$[^$]*\$|[*`]", why), key=len).strip()


def box_of(notebook, question: quiz.Question, cell: str = "quiz"):
    """The card of a question."""
    button = notebook.page.locator(f'button[title="check the answer to {question.id}"]')
    return notebook.output(cell).locator(".ftlab-question").filter(has=button)


def answer(box, question: quiz.Question, response: str) -> None:
    """Gives this response with the mouse, letters and numbers typed, and checks it."""
    if question.kind == "single":
        box.locator("label", has=box.page.get_by_role("radio")).nth(quiz.LETTERS.index(response)).click()
    elif question.kind == "multiple":
        labels = box.locator("label", has=box.page.get_by_role("checkbox"))
        for letter, label in zip(quiz.LETTERS, labels.all(), strict=False):
            if label.get_by_role("checkbox").is_checked() != (letter in response):
                label.locator("span").click()
    else:
        box.get_by_role("textbox").fill(response)
    box.get_by_role("button", name="Check").click()


KINDS = ("single", "multiple", "numeric", "order")
ASK = {"before": "", "quiz": f"from ftlab.classroom import quiz; quiz.show({QUIZ!r})", "after": ""}


def test_a_question_of_each_kind_answered_wrong_then_right(opened, lab):
    """By clicking on the words of an option, or typing."""
    notebook = opened("quiz_by_mouse", cells=ASK)
    notebook.run("quiz")
    for kind in KINDS:
        question = first(kind)
        box, (wrong, right) = box_of(notebook, question), responses(question)
        before = len(scores(lab, question))
        answer(box, question, wrong)
        expect(box.get_by_role("alert")).to_contain_text("Not yet.")
        expect(box.get_by_role("alert")).to_contain_text(explained(question, wrong))
        expect(box.get_by_text("Solution", exact=True)).to_be_visible()
        answer(box, question, right)
        expect(box.get_by_role("alert")).to_contain_text("Right.")
        expect(box.get_by_role("alert")).to_contain_text(explained(question, right))
        expect(box.get_by_role("link")).to_be_visible()
        assert scores(lab, question)[before:] == [0, 1]
    expect(notebook.output("quiz")).to_contain_text(f"{len(KINDS)} of {len(quiz.load(QUIZ))} right")


def scores(lab, question: quiz.Question) -> list[float]:
    """How a question was answered so far, as the progress file has it."""
    return [event.score for event in progress.events("quiz", lab.progress) if event.item == f"{QUIZ}/{question.id}"]


def test_questions_answered_with_the_keyboard_only(opened, lab):
    """Tab to the question, arrow keys or Space among its options, or a number; then Enter. The cell stays the same."""
    notebook = opened("quiz_by_keys", cells=ASK)
    notebook.run("quiz")
    keyboard = notebook.page.keyboard

    def tab_to(control) -> None:
        for _ in range(200):
            if control.evaluate("control => control === document.activeElement"):
                return
            keyboard.press("Tab")
        raise AssertionError(f"200 times Tab, and not at {control}")

    for kind in ("single", "multiple", "numeric"):
        question = next(question for question in reversed(quiz.load(QUIZ)) if question.kind == kind)
        box, before = box_of(notebook, question), len(scores(lab, question))
        choices = box.locator("input[type=radio], input[type=checkbox]")
        for response in responses(question):
            if kind == "numeric":
                tab_to(box.get_by_role("textbox"))
                keyboard.press("Control+a")
                keyboard.type(response)
            elif kind == "single":
                checked = [i for i, control in enumerate(choices.all()) if control.is_checked()]
                at, to = (checked or [0])[0], quiz.LETTERS.index(response)
                tab_to(choices.nth(at))
                keyboard.press("Space")
                for _ in range(abs(to - at)):
                    keyboard.press("ArrowDown" if to > at else "ArrowUp")
                expect(choices.nth(to)).to_be_checked()
            else:
                for letter, control in zip(quiz.LETTERS, choices.all(), strict=False):
                    if (letter in response) != control.is_checked():
                        tab_to(control)
                        keyboard.press("Space")
                keyboard.press("b")  # in JupyterLab a new cell, where the focus is not in a card
            notebook.page.wait_for_timeout(1000)  # a busy kernel has heard of the last change
            keyboard.press("Enter")
            verdict = "Right." if response == responses(question)[1] else "Not yet."
            expect(box.get_by_role("alert")).to_contain_text(verdict)
            expect(box.get_by_role("alert")).to_contain_text(explained(question, response))
        assert scores(lab, question)[before:] == [0, 1]
    expect(notebook.page.locator(".jp-Cell")).to_have_count(len(ASK))
    expect(notebook.cell("quiz")).to_have_class(re.compile("jp-mod-active"))


# --- 05: error analysis -----------------------------------------------------------------------------------------------

SIX_ANSWERS = """
some = load_dataset("json", data_files="../data/ask/validation.jsonl", split="train[:6]")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=DTYPE)
sample = [{**row, "answer": answer, "gold": row["completion"][0]["content"]}
          for row, answer in zip(some, answers(model, tokenizer, some["prompt"]))]
"""


def test_three_answers_labelled_are_three_lines_on_disk(opened, lab):
    """The cells of 05 that its error analysis needs; the untrained model answers six questions in place of the run."""
    notebook = opened("05_practical_pipeline", cells={"errors": SIX_ANSWERS})
    notebook.run("imports", "dial", "errors", "label-widget")
    widget = notebook.output("label-widget").locator(".widget-vbox")
    said = [("does not run", ""), ("question unclear", "no such column"), ("does not run", "")]
    for done, (verdict, comment) in enumerate(said):
        expect(widget).to_contain_text(f"{done + 1} of 6")
        if comment:
            widget.get_by_role("textbox").fill(comment)
        press(widget, verdict)
    expect(widget).to_contain_text("4 of 6")
    expect(widget).to_contain_text("3 rated: 2 does not run, 1 question unclear")
    (file,) = lab.my.glob("runs/pipeline/errors-*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["verdict"], row["comment"]) for row in rows] == said
    asked = (ROOT / "data" / "ask" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    assert [row["id"] for row in rows] == [json.loads(line)["id"] for line in asked]
    assert all(row["answer"] for row in rows)
    shot(widget, "review-05")


# --- 11: cards, the mock interview, exercises -------------------------------------------------------------------------

PREP = json.loads((ROOT / "notebooks" / "11_interview_prep.ipynb").read_text(encoding="utf-8"))
SOURCES = {cell["id"]: "".join(cell["source"]) for cell in PREP["cells"]}


def plain(question: str) -> str:
    """The words of a question before its first code."""
    return question.partition("`")[0].strip()


def test_a_flash_card_is_asked_answered_rated_and_leads_to_its_proof(opened, lab):
    notebook = opened("11_interview_prep")
    notebook.run("imports", "dial", "flash")
    widget = notebook.output("flash").locator(".widget-vbox")
    asked = cards.mixed(cards.load())[0]
    expect(widget).to_contain_text(plain(asked.question))
    before = len(progress.events(flash.KIND, lab.progress))
    expect(widget.get_by_role("button", name="good")).to_have_count(0)
    press(widget, "Show the answer")
    expect(widget).to_contain_text("90 seconds")
    press(widget, "good")
    expect(widget).not_to_contain_text(plain(asked.question))
    (rated,) = progress.events(flash.KIND, lab.progress)[before:]
    assert (rated.item, rated.detail["rating"]) == (asked.id, "good")
    press(widget, "Show the answer")
    link = widget.get_by_role("link").filter(has_text=re.compile(r"^\d\d, ")).first
    name, id = re.search(r"(\w+)\.ipynb.*#cell-id=(.+)", link.get_attribute("href")).groups()
    link.click()
    there = type(notebook)(notebook.page, lab.notebooks / f"{name}.ipynb")
    expect(notebook.page.locator(".jp-mod-current .lm-TabBar-tabLabel").first).to_have_text(f"{name}.ipynb")
    expect(there.cell(id)).to_have_class(re.compile("jp-mod-active"))


def test_a_sitting_of_the_two_days_ends_when_each_card_is_known(opened, lab):
    """The first card is not known, comes back three cards later, and the cell that runs again goes on there."""
    notebook = opened("11_interview_prep")
    notebook.run("imports", "dial", "plan", "sitting")
    expect(notebook.output("plan")).to_contain_text("2 days before, 18:00")
    expected = cards.mixed(cards.load())[:13]
    expected.insert(4, expected[0])
    for place, card in enumerate(expected):
        if place == 6:
            notebook.run("sitting")
        widget = notebook.output("sitting").locator(".widget-vbox")
        expect(widget).to_contain_text(plain(card.question))
        press(widget, "Show the answer")
        if place == 0:
            shot(widget, "sitting-11")
        press(widget, "again" if place == 0 else "good")
    expect(notebook.output("sitting")).to_contain_text("Done: nothing is left to ask now.")
    rated = [event for event in progress.events(flash.KIND, lab.progress) if event.detail["sitting"]]
    assert [event.item for event in rated] == [card.id for card in expected]


def test_a_mock_interview_asks_the_follow_up_and_ends_in_a_report(opened, lab):
    notebook = opened("11_interview_prep", cells={"dial": SOURCES["dial"].replace("MINUTES = 6, 2", "MINUTES = 2, 2")})
    notebook.run("imports", "dial", "mock")
    widget = notebook.output("mock").locator(".widget-vbox").first
    press(widget, "Start")
    for number in (1, 2):
        expect(widget).to_contain_text(f"Question {number} of 2")
        expect(widget).not_to_contain_text("30 seconds")
        press(widget, "I have answered")
        expect(widget).to_contain_text("Asked next:")
        expect(widget).not_to_contain_text("30 seconds")
        press(widget, "I have answered")
        expect(widget).to_contain_text("Now judge what you said")
        for criterion in interview.RUBRIC:
            expect(widget).to_contain_text(f"{criterion}: ")
            press(widget, "yes" if number == 1 else "no")
        shot(widget, f"mock-{number}-11")
    expect(widget).to_contain_text("8 of 16 points.")
    expect(widget).to_contain_text("to repeat")
    shot(widget, "report-11")
    assert [event.score for event in progress.events("interview", lab.progress)] == [1, 0]


def test_an_exercise_written_wrong_then_right(opened, lab):
    stub = SOURCES["write-dpo"]
    notebook = opened("11_interview_prep")
    notebook.run("imports", "write-dpo")
    output = notebook.output("write-dpo")
    expect(output).to_contain_text("not tried yet")
    gap = "policy_chosen_logps - policy_rejected_logps"
    lines = {"not yet": gap, "right": f"{gap} - (ref_chosen_logps - ref_rejected_logps)"}
    for state, line in lines.items():
        code = f"return -nn.functional.logsigmoid(beta * ({line}))"
        notebook.cell("write-dpo").locator(".cm-content").click()
        notebook.page.keyboard.press("Control+a")
        notebook.page.keyboard.insert_text(stub.replace("...  ", f"{code}  "))
        notebook.page.keyboard.press("Control+Enter")
        expect(output).to_contain_text(state)
        shot(output, f"exercise-{state}-11")
        if state == "not yet":
            expect(output).to_contain_text("the reference is missing")
    assert [event.score for event in progress.events("exercise", lab.progress)] == [0, 1]


# --- How it looks -----------------------------------------------------------------------------------------------------


def test_the_gallery_shows_every_widget_of_the_course():
    modules = [
        importlib.import_module(f"ftlab.classroom.{found.name}") for found in pkgutil.iter_modules(classroom.__path__)
    ]
    shown = {
        name
        for module in modules
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and kind.__module__ == module.__name__
        and hasattr(kind, "_repr_mimebundle_")
        and name not in ("Live", "Steps")  # what those are made of
    }
    assert shown == {name.split("-")[0] for name in GALLERY if name[0].isupper()}


def test_contrast_is_wcags(watch):
    """On white #767676 has 4.54 and #777 4.48, as WCAG's tools say; black over white, at 136 of 255, is #777."""
    page = watch.context.new_page()
    page.set_content("""<body style="background: white"><p style="color: #767676">a</p><p style="color: #777">b</p>
        <p style="color: #0008">c</p><p style="opacity: 0.5333">d</p><p hidden style="color: #fff">e</p>
        <div style="background: #0008"><p style="color: #fff">f</p></div><button disabled>g</button>
        <input value="h" style="color: #777; background: white"></body>""")
    found = page.locator("body").evaluate(CONTRAST, 4.5)
    assert [text for _, text, _ in found["poor"]] == list("bcdfh")
    assert [contrast for contrast, _, _ in found["poor"]] == pytest.approx([4.48] * 5, abs=0.02)


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_every_widget_and_every_kind_of_question_can_be_read(opened, theme):
    """WCAG 2.2's least contrast for text, 4.5, for every piece of text that the cells of GALLERY put on the page."""
    notebook = opened(f"gallery_{theme}", theme, GALLERY)
    notebook.page.set_viewport_size({"width": 1300, "height": 5000})  # a picture holds what is in sight
    expect(notebook.page.locator("body")).to_have_attribute("data-jp-theme-light", str(theme == "Light").lower())
    notebook.run(*GALLERY)
    for kind in KINDS:
        of_kind = [question for question in quiz.load(QUIZ) if question.kind == kind][:2]
        for question, rightly in zip(of_kind, (False, True), strict=False):
            box = box_of(notebook, question)
            answer(box, question, responses(question)[rightly])
            expect(box.get_by_role("alert")).to_contain_text("Right." if rightly else "Not yet.")
            shot(box, f"{theme}-{kind}-{'right' if rightly else 'wrong'}")
    poor = {}
    for name in list(GALLERY)[1:]:
        output = notebook.output(name)
        shot(output, f"{theme}-{name}")
        output.evaluate("root => root.querySelectorAll('details').forEach(folded => { folded.open = true })")
        found = output.evaluate(CONTRAST, 4.5)
        assert found["looked"] > 0, f"{name}: no text seen"
        if found["poor"]:
            poor[name] = found["poor"]
    assert not poor, f"{theme}: contrast, text, colours: {json.dumps(poor, indent=1, ensure_ascii=False)}"
